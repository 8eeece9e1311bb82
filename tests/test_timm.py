"""timm's NesT: NesT from its weights and the accelerated model agree with timm's, forward and backward."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import nest_fast
from nest_fast.testing import import_timm, relative_error

timm = import_timm()

VARIANTS = ["nest_tiny", "nest_small", "nest_base", "nest_tiny_jx", "nest_small_jx", "nest_base_jx"]
# A reduced model with the same code: 3 levels of one layer, blocks of 4 x 4.
SMALL = {"img_size": 64, "embed_dims": (32, 64, 96), "num_heads": (1, 4, 3), "depths": 1, "num_classes": 7}


def small_timm(**kwargs):
    torch.manual_seed(1)
    model = timm.models.nest.Nest(**{**SMALL, "drop_path_rate": 0.0, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # what is initialised to ones and zeros would hide mistakes
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64)


def ours_of(variant, **kwargs):
    pad_type = "same" if variant.endswith("jx") else ""
    return getattr(nest_fast, "nest_" + variant.split("_")[1])(pad_type=pad_type, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_timms(variant):
    """Names and shapes of all that a checkpoint holds; heads, rates, paddings and eps, which it does not."""
    with torch.device("meta"):
        theirs = timm.create_model(variant, drop_path_rate=0.2)
    ours = ours_of(variant, drop_path_rate=0.2, device="meta")
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.num_blocks == theirs.num_blocks
    for level, other in zip(ours.levels, theirs.levels, strict=True):
        assert level.pos_embed.shape == other.pos_embed.shape
        if level.pool is not None:
            is_same = "Same" in type(other.pool.pool).__name__
            assert level.pool.padding == ("same" if is_same else "symmetric")
            assert level.pool.norm.eps == other.pool.norm.eps
        for layer, its in zip(level.transformer_encoder, other.transformer_encoder, strict=True):
            assert layer.attn.num_heads == its.attn.num_heads
            assert layer.attn.scale == its.attn.scale
            assert layer.norm1.eps == its.norm1.eps
            assert layer.drop_path1.drop_prob == pytest.approx(getattr(its.drop_path1, "drop_prob", 0.0))


def test_a_full_size_variant_agrees():
    theirs = timm.create_model("nest_tiny").eval()
    ours = ours_of("nest_tiny").eval()
    ours.load_state_dict(nest_fast.weights.from_timm(theirs.state_dict()))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs(x)
        nest_fast.accelerate(theirs)
        assert relative_error(ours(x), wanted) < 1e-5
        assert relative_error(theirs(x), wanted) < 1e-5


# What the variants are but for their widths and depths: heads of 32 channels, blocks of 14 x 14, the last level deeper.
NARROW = {"img_size": 224, "embed_dims": (32, 64, 96), "num_heads": (1, 2, 3), "depths": (1, 1, 2)}


@pytest.mark.parametrize("pad_type", ["", "same"])
def test_models_agree_in_eval_and_in_training(pad_type):
    """Stochastic depth on in training: the same random numbers are drawn in the same order."""
    theirs = small_timm(**NARROW, pad_type=pad_type, drop_path_rate=0.5)
    ours = nest_fast.NesT(**{**SMALL, **NARROW}, pad_type=pad_type, drop_path_rate=0.5)
    ours.load_state_dict(nest_fast.weights.from_timm(theirs.state_dict()))
    fast = copy.deepcopy(theirs)
    nest_fast.accelerate(fast)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs.eval()(x)
        assert relative_error(ours.eval()(x), wanted) < 1e-5
        assert relative_error(fast.eval()(x), wanted) < 1e-5
    # Gradients in float64: in float32 one rounding may flip the argmax of a max-pool (1 of 400,000 was seen to), after
    # which even two right answers are 1e-3 apart.
    logits, grads = {}, {}
    for name, model in (("theirs", theirs), ("ours", ours), ("fast", fast)):
        torch.manual_seed(0)
        logits[name] = model.double().train()(x.double())
        logits[name].square().mean().backward()
        grads[name] = {key: p.grad for key, p in model.named_parameters()}
    for name in ("ours", "fast"):
        assert relative_error(logits[name], logits["theirs"]) < 1e-12
        assert grads[name].keys() == grads["theirs"].keys()
        for key, grad in grads["theirs"].items():
            assert relative_error(grads[name][key], grad) < 1e-10, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_accurate_as_timms(dtype, image):
    """Against float64 from the same rounded weights, at most twice timm's own error in the same dtype (L2)."""
    theirs = small_timm().to(dtype)
    fast = copy.deepcopy(theirs)
    nest_fast.accelerate(fast)
    golden = copy.deepcopy(theirs).double()
    image = image.to(dtype)
    for model in (theirs, fast, golden):
        model(image.to(model.head.weight.dtype)).square().mean().backward()
    flat = [torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (theirs, fast, golden)]
    assert relative_error(flat[1], flat[2]) <= 2 * relative_error(flat[0], flat[2])


def test_state_dicts_are_interchangeable(image):
    theirs = small_timm()
    ours = nest_fast.NesT(**SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    assert relative_error(ours(image), theirs(image)) < 1e-5
    nn.init.normal_(ours.norm.weight)
    theirs.load_state_dict(nest_fast.weights.to_timm(ours.state_dict()))
    assert relative_error(ours(image), theirs(image)) < 1e-5


def test_features_and_intermediates_are_timms(image):
    theirs = small_timm()
    ours = nest_fast.NesT(**SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    assert relative_error(ours.forward_features(image), theirs.forward_features(image)) < 1e-5
    features = theirs.forward_features(image)
    assert relative_error(ours.forward_head(features, True), theirs.forward_head(features, True)) < 1e-6
    for kwargs in ({}, {"indices": 2, "norm": True}, {"indices": [0, 1], "stop_early": True}, {"indices": [-1]}):
        got, wanted = ours.forward_intermediates(image, **kwargs), theirs.forward_intermediates(image, **kwargs)
        assert relative_error(got[0], wanted[0]) < 1e-5
        assert len(got[1]) == len(wanted[1])
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(got[1], wanted[1], strict=True))
    assert ours.feature_info == theirs.feature_info


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_constructor_arguments_are_timms(pool, image):
    arguments = {
        "global_pool": pool,
        "qkv_bias": False,
        "mlp_ratio": 2.0,
        "in_chans": 3,
        "patch_size": 2,
        "img_size": 32,
        "num_classes": 0 if pool == "" else 5,
        "act_layer": nn.ReLU,
        "weight_init": "nlhb" if pool == "avg" else "",
    }
    theirs = small_timm(**arguments)
    ours = nest_fast.NesT(**{**SMALL, **arguments}).eval()
    if pool == "avg":
        assert torch.equal(ours.head.bias, torch.full((5,), -torch.log(torch.tensor(5.0)).item()))
    ours.load_state_dict(theirs.state_dict())
    x = image[:, :, :32, :32]
    assert relative_error(ours(x), theirs(x)) < 1e-5
    for model in (ours, theirs):
        model.reset_classifier(3, "catavgmax")
    assert ours.head.weight.shape == theirs.head.weight.shape
    assert ours.head_hidden_size == theirs.head_hidden_size


def twins(**kwargs):
    theirs = small_timm(**kwargs)
    ours = nest_fast.NesT(**{**SMALL, "drop_path_rate": 0.0, **kwargs}).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_public_names_are_timms():
    """Every public name that timm's model and its parts of ours have; values too, where they are plain."""
    theirs, ours = twins()
    assert {name for name in dir(theirs) if not name.startswith("_")} <= set(dir(ours))
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    names = ("num_classes", "in_chans", "num_features", "head_hidden_size", "drop_rate", "num_levels", "patch_size",
             "num_blocks", "num_patches", "seq_length", "feature_info", "training")  # fmt: skip
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.block_size == (theirs.block_size, theirs.block_size)
    for name in ("img_size", "grid_size", "num_patches"):
        assert getattr(ours.patch_embed, name) == getattr(theirs.patch_embed, name), name
    for pool in ("avg", "max", "avgmax", "catavgmax", ""):
        for model in (theirs, ours):
            model.reset_classifier(0, pool)
        assert ours.global_pool.pool_type == theirs.global_pool.pool_type == pool
        assert ours.global_pool.feat_mult() == theirs.global_pool.feat_mult()
        assert ours.global_pool.is_identity() == theirs.global_pool.is_identity()


def test_data_configuration_is_that_of_timms_model():
    theirs = timm.create_model("nest_tiny", img_size=64)
    ours = nest_fast.nest_tiny(img_size=64, device="meta")
    from timm.data import resolve_model_data_config as resolve

    assert resolve(ours) == resolve(theirs) | {"input_size": (3, 64, 64)}
    for key in ("first_conv", "classifier", "num_classes", "fixed_input_size"):
        assert ours.default_cfg[key] == ours.pretrained_cfg[key] == theirs.default_cfg[key]


@pytest.mark.parametrize(
    ("indices", "prune_head", "prune_norm"),
    [(1, False, False), (3, True, True), ([0], True, False), ([0, 1], False, True), ([-2, 0], True, True)],
)
def test_pruned_models_are_timms(indices, prune_norm, prune_head, image):
    theirs, ours = twins()
    left = []
    for model in (theirs, ours):
        taken = model.prune_intermediate_layers(indices, prune_norm, prune_head)
        names = (model.num_features, model.head_hidden_size, model.num_classes, model.global_pool.pool_type)
        left.append((taken, names, list(model.state_dict()), model.no_weight_decay(), str(model.get_classifier())))
    assert left[0] == left[1]
    for norm in (False, True):
        got, wanted = (model.forward_intermediates(image, norm=norm) for model in (ours, theirs))
        for a, b in zip([got[0], *got[1]], [wanted[0], *wanted[1]], strict=True):
            assert relative_error(a, b) < 1e-5
    assert relative_error(ours.forward_features(image), theirs.forward_features(image)) < 1e-5
    assert relative_error(ours(image), theirs(image)) < 1e-5
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.reset_classifier(5, "avg")
    assert relative_error(ours(image), theirs(image)) < 1e-5


def exchange_norm(model):
    model.norm = nn.Identity()
    model.reset_classifier(5)


def exchange_pool(model):
    model.global_pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())


def dense_head(model):
    model.reset_classifier(0, "")
    model.head = nn.Conv2d(model.num_features, 3, 1)


def patched_pool(model):
    model.global_pool.forward = lambda x: x.amax((2, 3))


def listen_to_pool(model):
    model.global_pool.register_forward_hook(lambda module, args, out: 2 * out + args[0].sum((2, 3)))


@pytest.mark.parametrize(
    "surgery", [exchange_norm, exchange_pool, dense_head, patched_pool, listen_to_pool], ids=lambda f: f.__name__
)
def test_surgery_on_the_head_does_what_it_does_to_timms(surgery, image):
    theirs, ours = twins()
    for model in (theirs, ours):
        torch.manual_seed(0)
        surgery(model)
    assert type(ours.get_classifier()) is type(theirs.get_classifier())
    assert relative_error(ours(image), theirs(image)) < 1e-5


def test_a_new_head_has_the_parameters_dtype():
    for model in twins():
        model.bfloat16().norm.float()
        model.reset_classifier(3)
        assert model.head.weight.dtype == torch.bfloat16
        assert nest_fast.NesT(**SMALL, device="meta").head.weight.is_meta


def test_timms_tools_take_a_nest(image):
    """Layer-wise learning rates, freezing, averaging, feature extraction: the same groups, names and numbers."""
    from timm import optim, utils
    from timm.models._features import FeatureGetterNet

    theirs, ours = twins()
    results = []
    for model in (theirs, ours):
        names = {id(p): name for name, p in model.named_parameters()}
        optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
        groups = [
            (group["weight_decay"], group["lr_scale"], sorted(names[id(p)] for p in group["params"]))
            for group in optimizer.param_groups
        ]
        utils.freeze(model, ["patch_embed", "levels.0"])
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        results.append((groups, model.group_matcher(True), frozen))
    assert results[0] == results[1]
    features = []
    for model in (theirs, ours):
        average = utils.ModelEmaV3(model, decay=0.5)
        with torch.no_grad():
            model.head.bias.add_(1.0)
        average.update(model)
        net = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1))
        features.append([average.module(image), *net(image)])
        assert net.feature_info.channels() == [32, 64]
        assert net.feature_info.reduction() == [4, 8]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*features, strict=True))


def test_models_are_saved_whole(image):
    _, ours = twins()
    ours.prune_intermediate_layers([1])
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(image), ours(image))


def test_what_timm_does_elsewhere_says_so():
    with pytest.raises(
        ValueError, match=r"pretrained: expected False, since NesT has no weights .*, got True"
    ) as error:
        nest_fast.nest_tiny(pretrained=True)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"features_only: expected False, since forward_intermediates.*, got True"):
        nest_fast.nest_tiny_s16_32(features_only=True)
    assert nest_fast.nest_tiny(pretrained=False, features_only=False, num_classes=3, device="meta").num_classes == 3


# --- accelerate -------------------------------------------------------------------------------------------------------


def test_accelerate_keeps_the_model_and_restores_it(image):
    model = small_timm()
    wanted = model(image)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    report = nest_fast.accelerate(model)
    assert len(report.replaced) == 3 + 3 + 2 + 3 + 1  # attention, layers, pools, levels, the model
    assert not report.kept
    assert "levels.0.transformer_encoder.0.attn: Attention" in str(report)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.state_dict().keys() == state.keys()
    assert relative_error(model(image), wanted) < 1e-5

    again = nest_fast.accelerate(model)
    assert not again.replaced
    assert again.already.keys() == report.replaced.keys()

    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(clone(image), wanted) < 1e-5
        assert isinstance(clone.levels[0].transformer_encoder[0].attn, timm.models.nest.Attention)
        clone.levels[0].transformer_encoder[0].attn.proj.weight.data.zero_()  # its own weights, not the original's
    assert relative_error(model(image), wanted) < 1e-5

    assert nest_fast.restore(model) == len(report.replaced)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(image), wanted)


FLAGS = {
    "a fast norm": ("levels.0.transformer_encoder.0.norm1", {"_fast_norm": True}, "norm1 is timm's fast norm"),
    "padded images": ("patch_embed", {"dynamic_img_pad": True}, "patch_embed flattens, pads or has another format"),
    "attention dropout": ("levels.0.transformer_encoder.0.attn.attn_drop", {"p": 0.1}, "attn's attention drops"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_of_timms_classes_are_reasons(case, image):
    name, values, why = FLAGS[case]
    model = small_timm()
    nest_fast.accelerate(model)
    assert not [row.why for row in nest_fast.explain(model, image) if why in row.why]
    module = model.train().get_submodule(name)
    for key, value in values.items():
        setattr(module, key, value)
    assert [row.why for row in nest_fast.explain(model, image) if row.why.startswith(why)]


def test_images_of_another_size_are_refused_as_timm_does(image):
    def refusals(model):
        for size, wanted in ((32, (64, 64)), (64, (32, 32))):
            model.patch_embed.img_size = wanted
            with pytest.raises(AssertionError) as refused:
                model(image[..., :size, :size])
            yield str(refused.value)

    timms = list(refusals(small_timm()))
    accelerated = small_timm()
    nest_fast.accelerate(accelerated)
    assert list(refusals(accelerated)) == timms


def test_accelerate_sees_new_weights_at_once(image):
    """Whatever way they change: nothing about a weight is remembered."""
    model, plain = small_timm(), small_timm()
    nest_fast.accelerate(model)
    model(image)
    for m in (model, plain):
        for level in m.levels:
            level.transformer_encoder[0].attn.proj.weight.data.mul_(-1.5)
    assert relative_error(model(image), plain(image)) < 1e-5


def test_accelerate_calls_hooks(image):
    def listen(model):
        calls = []
        heard = ("attn", "attn.qkv", "attn.proj", "pool", "pool.conv", "patch_embed", "levels.1")
        for name, module in model.named_modules():
            if name.endswith(heard):
                module.register_forward_hook(lambda _, a, out, n=name: calls.append((n, out.shape, out.sum().item())))
        model(image)
        return calls

    wanted = listen(small_timm())
    model = small_timm()
    nest_fast.accelerate(model)
    got = listen(model)
    assert [call[:2] for call in got] == [call[:2] for call in wanted]
    assert torch.allclose(torch.tensor([c[2] for c in got]), torch.tensor([c[2] for c in wanted]), rtol=1e-3, atol=1e-2)


def test_accelerate_leaves_what_it_does_not_know(image):
    class Mine(timm.models.nest.Attention):
        def forward(self, x):
            return super().forward(x) * 2

    model = small_timm()
    layers = [level.transformer_encoder[0] for level in model.levels]
    layers[0].attn.__class__ = Mine
    layers[1].attn.forward = lambda x: torch.zeros_like(x)
    model.levels[1].pool.norm = nn.Identity()
    wanted = model(image)
    report = nest_fast.accelerate(model)
    assert report.kept == {
        "": "levels.1.pool.norm is a Identity, which may compute something else",
        "levels.0.transformer_encoder.0.attn": "Mine is a subclass of timm's class, and may compute something else",
        "levels.0.transformer_encoder.0": "attn is a Mine, which may compute something else",
        "levels.1.transformer_encoder.0.attn": "its forward was patched on the instance",
        "levels.1.transformer_encoder.0": "attn is a Attention, which may compute something else",
        "levels.1.pool": "norm is a Identity, which may compute something else",
    }
    assert relative_error(model(image), wanted) < 1e-5


def test_accelerate_inside_another_model_and_where_there_is_nothing():
    wrapper = nn.Sequential(small_timm(), nn.Linear(7, 2))
    assert all(name.split(".")[0] == "0" for name in nest_fast.accelerate(wrapper).replaced)
    with pytest.raises(
        ValueError, match=r"model: expected one with layers of timm's NesT, .*, got Linear with nothing"
    ):
        nest_fast.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        nest_fast.accelerate("nest_tiny")
    # Other models of timm have a PatchEmbed too; it is not ours to touch.
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=32, num_heads=1)
    with pytest.raises(ValueError, match="got Beit with nothing to replace"):
        nest_fast.accelerate(beit)


def test_accelerated_model_checkpoints_saves_and_exports(image):
    model = small_timm()
    wanted = model(image)
    nest_fast.accelerate(model)
    model.set_grad_checkpointing()
    model.train()
    out = model(image)
    out.sum().backward()
    assert relative_error(out, wanted) < 1e-5
    model.set_grad_checkpointing(False)
    model.eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = small_timm()
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(image), wanted)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
    five = torch.randn(5, 3, 64, 64)
    assert relative_error(exported(five), model(five)) < 1e-5


# --- the example ------------------------------------------------------------------------------------------------------


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("again", [False, True])
def test_an_example_is_tried_before_and_after(image, again):
    """The report has errors and a speed; mode, random state and gradients are what they were."""
    model = small_timm(drop_path_rate=0.5)
    model.train()
    model.levels[0].eval()
    modes = [module.training for module in model.modules()]
    if again:
        nest_fast.accelerate(model)
    state = torch.random.get_rng_state()
    report = nest_fast.accelerate(model, (image,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    trial = report.trial
    assert 0 < trial.error <= trial.allowed
    assert 0 < trial.own_error < 1e-6
    assert trial.speedup > 0
    assert trial.seconds > 0
    assert f"relative error {trial.error:.1e}, before {trial.own_error:.1e}" in str(report)
    assert classes(model) == classes(timm_accelerated())


def timm_accelerated():
    model = small_timm(drop_path_rate=0.5)
    nest_fast.accelerate(model)
    return model


def test_an_example_beyond_the_tolerance_leaves_the_model_as_it_was(image):
    model = small_timm()
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"example: expected outputs within 1\.0e-12 of float64, where"):
        nest_fast.accelerate(model, image, tolerance=1e-12)
    assert classes(model) == before
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"got nan; the model is as it was"):
        nest_fast.accelerate(model, image)
    with pytest.raises(AssertionError):  # timm's own, of an image of another size
        nest_fast.accelerate(model, image[..., :32])
    assert classes(model) == before
    with pytest.raises(TypeError, match=r"example: expected a tensor or a tuple of inputs, got list"):
        nest_fast.accelerate(model, [image])
    with pytest.raises(ValueError, match=r"tolerance: expected an example to hold it to, got 0\.1 and none"):
        nest_fast.accelerate(model, tolerance=0.1)
