"""What users do with models: hooks on every module, patched methods, copies, tracers, counters, torch.func, restore.

timm's model is the expectation. What cannot work for an accelerated model fails in one line that names
``nest_fast.restore``.
"""

import copy
import io
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves

import nest_fast
import nest_fast.modules
import nest_fast.nest
from helpers.twins import (
    EVENTS,
    KINDS,
    SMALL,
    Call,
    Half,
    Listener,
    LoRA,
    accelerated,
    agree,
    assert_close,
    assert_same_calls,
    assert_same_run,
    changed,
    distance,
    image,
    layers,
    listen,
    nest_model,
    plain_model,
    run,
    runs,
    strides,
    timm,
    timm_nest,
    twin,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore")

FAST = ("accelerated after", "NesT")
LAYER = "levels.1.transformer_encoder.0"
RATES = {"proj_drop_rate": 0.3, "drop_path_rate": 0.4, "drop_rate": 0.2}
# What NesT does not have, or never calls: containers, and modules that are its own.
NOT_IN_NEST = ("levels", "transformer_encoder", "pool.pool", "mlp.norm", "patch_embed.norm", "attn_drop")


def heard_modules(kind, plain):
    names = [name for name, _ in plain.named_modules()]
    if kind != "NesT":
        return names
    return [n for n in names if not n.endswith(NOT_IN_NEST) and not n.startswith(("global_pool", "levels.0.pool"))]


def values_of(calls, kind):
    """NesT's pool adds the position embedding: it is called as often, with values of its own."""
    return [call._replace(values=[]) if kind == "NesT" and call.name.endswith("pool") else call for call in calls]


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("event", EVENTS)
def test_hooks_on_every_module(event, kind):
    """All modules at once, in training mode: as many calls, in the same order, with the same values."""
    plain, other = twins(kind, **RATES)
    for model in (plain, other):
        model.train()
        for name in heard_modules(kind, plain):
            listen(model, name, event)
    wanted = run(plain, image(), calls=plain.calls)
    got = run(other, image(), calls=other.calls)
    assert len(wanted.calls) > 30
    # Branches of a graph are walked in an order that nobody promises.
    order = "gradient" not in event
    assert_same_calls(values_of(got.calls, kind), values_of(wanted.calls, kind), layout=kind != "NesT", order=order)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("event", ["forward", "forward pre", "gradient"])
def test_a_hook_on_one_module(event, kind):
    """Each module alone, while all the others are computed in the fastest way: the same call, of the same strides."""
    plain, other = twins(kind)
    names = heard_modules(kind, plain)
    if event == "gradient":  # slower, and the layers do not differ
        names = [name for name in names if "levels.0" not in name and "encoder.1" not in name]
    for name in names:
        listen(plain, name, event)
    wanted = run(plain, image(), backward=event == "gradient", calls=plain.calls).calls
    failures = []
    for name in names:
        handle = listen(other, name, event)
        got = run(other, image(), backward=event == "gradient", calls=other.calls).calls
        handle.remove()
        theirs = [call for call in wanted if call.name == name]
        try:
            assert_same_calls(values_of(got, kind), values_of(theirs, kind), layout=kind != "NesT")
        except AssertionError as error:
            failures.append(str(error).split("\n")[0])
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("event", ["forward", "forward pre"])
def test_a_hook_that_changes_values_on_one_module(event):
    def result(value):
        return 0.7 * value if isinstance(value, torch.Tensor) else (0.7 * value[0], *value[1:])

    def changed_by_a_hook(model, name):
        handle = listen(model, name, event, result)
        out = run(model, image(), backward=False).out[0]
        handle.remove()
        return out

    plain, others, failures = twin("plain"), {kind: twin(kind) for kind in FAST}, []
    for name in heard_modules("plain", plain):
        wanted = changed_by_a_hook(plain, name)
        for kind, other in others.items():
            if name not in heard_modules(kind, plain) or (name.endswith("pool") and kind == "NesT"):
                continue
            if (error := distance(changed_by_a_hook(other, name), wanted)) > 1e-4:
                failures.append(f"{kind}: {name}: off by {error:.1e}")
    assert not failures, "\n".join(failures)


GLOBAL = {
    "forward": nn_module.register_module_forward_hook,
    "forward always": lambda hook: nn_module.register_module_forward_hook(hook, always_call=True),
    "forward pre": nn_module.register_module_forward_pre_hook,
    "gradient": nn_module.register_module_full_backward_hook,
    "gradient pre": nn_module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("event", GLOBAL)
def test_global_hooks(event, kind):
    plain, other = twins(kind)
    heard = []
    for model in (plain, other):
        names = {module: name for name, module in model.named_modules() if name in heard_modules(kind, plain)}
        calls = []

        def hook(module, *given, names=names, calls=calls):
            if module in names:
                Listener(names[module], event, calls)(module, *given)

        with GLOBAL[event](hook):
            run(model.train(), image())
        heard.append(values_of(calls, kind))
    assert len(heard[0]) > 30
    assert_same_calls(heard[1], heard[0], layout=kind != "NesT", order="gradient" not in event)


@pytest.mark.parametrize("kind", FAST)
def test_hooks_come_and_go(kind):
    """A hook that is gone is forgotten, one that leaves by itself too; one that stops the forward breaks nothing."""
    plain, other = twins(kind)

    class Stop(Exception):
        pass

    def stop(module, args, out):
        raise Stop

    for model in (plain, other):
        model.calls = []
        with pytest.raises(Stop), model.get_submodule(f"{LAYER}.mlp.fc1").register_forward_hook(stop):
            model(image())
        handles = []

        def once(module, args, out, handles=handles, model=model):
            handles.pop().remove()
            model.calls.append(Call("norm2", "once", [out.detach()]))

        handles.append(model.get_submodule(f"{LAYER}.norm2").register_forward_hook(once))
    agree(plain, other, layout=kind != "NesT", modes=("eval",))
    agree(plain, other, layout=kind != "NesT")


@pytest.mark.parametrize("fused", [True, False])
def test_attention_maps_are_extracted(fused):
    """timm's own extractor, which hooks attn_drop: maps where timm gives them."""
    models = twins("accelerated after")
    maps = []
    for model in models:
        for layer in layers(model):
            layer.attn.fused_attn = fused
        extract = timm.utils.AttentionExtract(model, method="hook")
        maps.append(extract(image()))
    assert maps[0].keys() == maps[1].keys()
    for name, wanted in maps[0].items():
        assert_close(maps[1][name], wanted, name)


def test_shapes_are_summarised():
    """What printers of summaries do: a hook on every module, shapes and parameters."""
    rows = []
    for model in twins("accelerated after"):
        table, handles = [], []
        for name, module in model.named_modules():
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name, table=table: table.append(
                        (name, tuple(args[0].shape), tuple(out.shape))
                    )
                )
            )
        model(image())
        for handle in handles:
            handle.remove()
        rows.append(table)
    assert rows[1] == rows[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_parts_are_called_by_hand(mode):
    """A backbone's user calls its parts one by one: the same values in the same memory formats."""
    results = []
    for model in twins("accelerated after"):
        model.train(mode == "train")
        x = model.patch_embed(image())
        blocks = torch.randn(2, 4, 16, 32, generator=torch.Generator().manual_seed(1))
        first = model.levels[0](x)
        features = model.forward_features(image())
        results.append(
            {
                "patch_embed": x,
                "levels": model.levels(x),
                "levels.0": first,
                "levels.1": model.levels[1](first),
                "levels.1.pool": model.levels[1].pool(first),
                "transformer_encoder": model.levels[0].transformer_encoder(blocks),
                "a layer": layers(model)[0](blocks),
                "attn": layers(model)[0].attn(blocks),
                "forward_features": features,
                "forward_head": model.forward_head(features, pre_logits=True),
            }
        )
    for name, wanted in results[0].items():
        assert_close(results[1][name], wanted, name)
        assert strides(results[1][name]) == strides(wanted), name


# --- patched methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_forward_patched_on_one_instance(kind):
    plain, other = twin("plain"), plain_model()
    names = [name for name in heard_modules(kind, plain) if not (kind == "NesT" and name.endswith("pool"))]
    if kind == "accelerated before":
        names = [name for name in names if "levels.0" not in name and "encoder.1" not in name]
    other = twin("NesT" if kind == "NesT" else "accelerated after")
    failures = []
    for name in names:
        outs = []
        for model in (plain, other):
            if kind == "accelerated before" and model is other:
                nest_fast.restore(model)
            module = model.get_submodule(name)
            module.forward = lambda *args, inner=module.forward: 0.7 * inner(*args)
            if kind == "accelerated before" and model is other:
                nest_fast.accelerate(model)
            outs.append(run(model, image(), backward=False).out[0])
            del module.forward
        if (error := distance(outs[1], outs[0])) > 1e-4:
            failures.append(f"{name}: off by {error:.1e}")
    assert not failures, "\n".join(failures)
    assert distance(run(other, image()).out[0], run(plain, image()).out[0]) < 1e-4


CLASSES = {
    "timm's Nest": (timm_nest.Nest, "forward"),
    "timm's Attention": (timm_nest.Attention, "forward"),
    "timm's TransformerLayer": (timm_nest.TransformerLayer, "forward"),
    "timm's ConvPool": (timm_nest.ConvPool, "forward"),
    "timm's NestLevel": (timm_nest.NestLevel, "forward"),
    "timm's PatchEmbed": (timm.layers.PatchEmbed, "forward"),
    "timm's Mlp": (timm.layers.Mlp, "forward"),
    "timm's LayerNorm": (timm.layers.LayerNorm, "forward"),
    "timm's DropPath": (timm.layers.DropPath, "forward"),
    "Nest.forward_features": (timm_nest.Nest, "forward_features"),
    "Linear": (nn.Linear, "forward"),
    "LayerNorm": (nn.LayerNorm, "forward"),
    "GELU": (nn.GELU, "forward"),
    "Conv2d": (nn.Conv2d, "forward"),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward"),
    "Dropout": (nn.Dropout, "forward"),
    "Identity": (nn.Identity, "forward"),
    "MaxPool2d": (nn.MaxPool2d, "forward"),
    "Sequential": (nn.Sequential, "forward"),
}
# Classes whose place in NesT has a class of ours, or that meet other modules there.
OF_TORCH = ("Linear", "GELU", "Conv2d", "Conv2d._conv_forward", "Dropout")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in CLASSES for kind in KINDS if kind != "NesT" or name in OF_TORCH]
)
def test_a_class_is_patched(name, kind, monkeypatch):
    """As libraries patch classes; before accelerate or after it, and taken back at last."""
    cls, method = CLASSES[name]
    options = {"timm's DropPath": {"drop_path_rate": 0.4}, "LayerNorm": {"norm_layer": nn.LayerNorm}}.get(name, {})
    original = getattr(cls, method)

    def patched(self, *args):
        return 0.7 * original(self, *args)

    plain = plain_model(**options)
    other = nest_model(**options) if kind == "NesT" else plain_model(**options)
    if kind == "accelerated after":
        nest_fast.accelerate(other)
    if kind == "NesT":  # which calls attn_drop where it may act
        for layer in layers(plain):
            layer.attn.fused_attn = False
    before = run(plain, image(), backward=False).out[0]
    monkeypatch.setattr(cls, method, patched)
    if kind == "accelerated before":
        nest_fast.accelerate(other)
    modes = ("train", "eval")
    agree(plain, other, modes=modes, layout=kind != "NesT")
    assert distance(run(plain, image(), backward=False).out[0], before) > 1e-3 or name in ("timm's PatchEmbed",)
    monkeypatch.undo()
    agree(plain, other, modes=modes, layout=kind != "NesT")


OWN = {
    "BlockAttention": ("attn",),
    "Mlp": ("mlp",),
    "TransformerLayer": ("",),
    "DropPath": ("drop_path1", "drop_path2"),
}


def scaled_class(cls):
    return type("Mine", (cls,), {"forward": lambda self, *args: 0.7 * cls.forward(self, *args)})


@pytest.mark.parametrize("how", ["subclass", "patched class", "subclass without a word of its own"])
@pytest.mark.parametrize("name", OWN)
def test_our_own_classes_are_derived_and_patched(name, how, monkeypatch):
    """NesT's layers follow a subclass, and a patch of the class, as timm's do theirs."""
    plain, ours = twins("NesT", drop_path_rate=0.4)
    cls = getattr(nest_fast.modules, name)
    forward = cls.forward
    for model in (plain, ours):
        for module in [layer.get_submodule(part) for layer in layers(model) for part in OWN[name]]:
            if how == "subclass without a word of its own":
                module.__class__ = type("Mine", (type(module),), {})
            elif how == "subclass" or model is plain:
                module.__class__ = scaled_class(type(module))
    if how == "patched class":
        monkeypatch.setattr(cls, "forward", lambda self, *args: 0.7 * forward(self, *args))
    agree(plain, ours, layout=False)


@pytest.mark.parametrize("name", ["BlockAggregation", "PatchEmbed"])
@pytest.mark.parametrize("how", ["subclass", "patched class"])
def test_our_pool_and_embedding_are_derived_and_patched(name, how, monkeypatch):
    ours = twin("NesT")
    cls = getattr(nest_fast.modules, name)
    forward = cls.forward
    module = ours.get_submodule("levels.1.pool" if name == "BlockAggregation" else "patch_embed")

    def mine(self, *args):
        return 0.7 * forward(self, *args)

    with module.register_forward_hook(lambda m, args, out: 0.7 * out):
        wanted = runs(ours, image(), ("eval", "train"))
    if how == "subclass":
        module.__class__ = type("Mine", (cls,), {"forward": mine})
    else:
        monkeypatch.setattr(cls, "forward", mine)
    for theirs, got in zip(wanted, runs(ours, image(), ("eval", "train")), strict=True):
        assert_same_run(got, theirs)


def test_a_level_of_ours_is_derived():
    ours = twin("NesT")
    plain = copy.deepcopy(ours)
    plain.levels[0].register_forward_hook(lambda m, args, out: 0.7 * out)
    ours.levels[0].__class__ = scaled_class(nest_fast.nest.NesTLevel)
    agree(plain, ours)


# --- copies -----------------------------------------------------------------------------------------------------------


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(state, assign=True)
    return empty


def emptied(model):
    state = model.state_dict()
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    return empty


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average.module


def unplugged(model):
    twice = copy.copy(model)
    twice._modules = dict(model._modules)
    return twice


COPIES = {
    "deepcopy": copy.deepcopy,
    "shallow copy": copy.copy,
    "shallow copy with modules of its own": unplugged,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "share_memory": lambda model: model.share_memory(),
    "there and back": lambda model: model.double().float(),
    "assign": assigned,
    "to_empty": emptied,
    "AveragedModel": averaged,
    "timm's EMA": lambda model: timm.utils.ModelEmaV3(model).module,
    "accelerated again": lambda model: (isinstance(model, nest_fast.NesT) or nest_fast.accelerate(model), model)[1],
    "apply": lambda model: model.apply(lambda m: m.eval()),
}


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("how", COPIES)
def test_copies(how, kind):
    plain, other = twins(kind)
    for model in (plain, other):
        layers(model)[1].mlp.fc1 = LoRA(layers(model)[1].mlp.fc1)
        layers(model)[2].mlp.drop2 = nn.Dropout(0.4)
    torch.manual_seed(7)
    layers(plain)[1].mlp.fc1.load_state_dict(layers(other)[1].mlp.fc1.state_dict())
    clone = COPIES[how](other)
    agree(plain, clone, layout=kind != "NesT")
    if kind != "NesT":
        nest_fast.restore(clone)
        assert not [m for m in clone.modules() if "nest_fast" in type(m).__module__]
        agree(plain, clone)


# --- tracers, counters, modes -----------------------------------------------------------------------------------------


def features(model, x):
    from timm.models._features_fx import create_feature_extractor

    return create_feature_extractor(model, ["levels.0", "levels.1", "norm"])(x)


def traced(model, x):
    return torch.jit.trace(model, x)(image(3))


def frozen(model, x):
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.script(model))(x)


def fake(model, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = model(mode.from_tensor(x)).shape
    return torch.zeros(shape)


def symbolic(model, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model, tracing_mode="symbolic")(x)(image(3))


def on_meta(model, x):
    return torch.zeros(copy.deepcopy(model).to("meta")(x.to("meta")).shape)


def dispatched(model, x):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Log():
        return model(x)


def functions(model, x):
    from torch.overrides import TorchFunctionMode

    class Log(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Log():
        return model(x)


def anomaly(model, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        out = model(x.requires_grad_())
        out.sum().backward()
        return x.grad


def offloaded(model, x):
    x.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        out = model(x)
    out.sum().backward()
    return x.grad


def inference(model, x):
    with torch.inference_mode():
        return model(x.clone())


def profiled(model, x):
    with torch.profiler.profile(with_modules=True, record_shapes=True, with_flops=True):
        return model(x)


def named_calls(model, x):
    from torch.utils.module_tracker import ModuleTracker

    with ModuleTracker():
        return model(x)


def subclass(model, x):
    class Seen(torch.Tensor):
        pass

    return model(x.as_subclass(Seen)).as_subclass(torch.Tensor)


def compiled(model, x):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def compiled_part(model, x):
    torch._dynamo.reset()
    layers(model)[1].mlp.compile(backend="eager")
    return model(x)


def quantised(model, x):
    torch.backends.quantized.engine = "onednn"
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x)


def intermediates(model, x):
    return model.forward_intermediates(x, norm=True)


def pruned_intermediates(model, x):
    model.prune_intermediate_layers([0], prune_norm=True, prune_head=True)
    return model.forward_features(x)


SHALLOW = {"num_levels": 1, "embed_dims": (32,), "num_heads": (2,), "depths": (1,)}
TRACERS = {
    "jit.trace": traced,
    "jit.script": lambda model, x: torch.jit.script(model)(x),
    "jit.script and freeze": frozen,
    "fx features": features,
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "fake tensors": fake,
    "make_fx, symbolic": symbolic,
    "the meta device": on_meta,
    "a dispatch mode": dispatched,
    "a function mode": functions,
    "anomaly detection": anomaly,
    "saved tensors offloaded": offloaded,
    "inference mode": inference,
    "the profiler": profiled,
    "the module tracker": named_calls,
    "an image of a class of its own": subclass,
    "compile": compiled,
    "a compiled part": compiled_part,
    "dynamic quantisation": quantised,
    "intermediates": intermediates,
    "intermediates, pruned": pruned_intermediates,
}
# What may be refused, in one line that says what to do; everything else has to work.
MAY_REFUSE = ("jit.trace", "jit.script", "jit.script and freeze", "fx features", "fx", "make_fx, symbolic")


@pytest.mark.parametrize("name", TRACERS)
def test_tracers_and_modes(name):
    options = SHALLOW if name == "compile" else {"depths": 1}
    try:
        wanted = TRACERS[name](twin("plain", **options), image())
    except Exception as error:
        pytest.fail(f"plain model: {type(error).__name__}: {error}") if name not in MAY_REFUSE else None
        return
    for kind in FAST:
        try:
            got = TRACERS[name](twin(kind, **options), image())
        except Exception as error:
            said = str(error).strip().split("\n")
            refused = name in MAY_REFUSE and (kind == "NesT" or any("restore" in line for line in said[:3] + said[-3:]))
            if not refused:
                raise
            continue
        tolerance = 0.05 if name == "dynamic quantisation" else None
        for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
            assert_close(a, b, f"{kind}: {name}", tolerance=tolerance)


@pytest.mark.parametrize("kind", FAST)
def test_flops_are_counted(kind):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in twins(kind):
        with FlopCounterMode(display=False) as counter:
            out = model(image())
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    for got, wanted in zip(counts[1], counts[0], strict=True):
        assert 0.8 * wanted < got < 1.25 * wanted, counts


# --- torch.func -------------------------------------------------------------------------------------------------------


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def per_sample(model, x):
    def loss(p, x):
        return functional_call(model, p, (x[None],)).square().sum()

    return vmap(grad(loss), (None, 0), randomness="different")(parameters_of(model), x)


def ensemble(model, x):
    stacked, buffers = stack_module_state([model, copy.deepcopy(model)])
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)), randomness="same")(stacked, buffers)


def one_parameter(transform):
    """``transform`` of the output as a function of one bias."""

    def call(model, x):
        name = f"{LAYER}.norm1.bias"
        rest = parameters_of(model)
        return transform(lambda p: functional_call(model, {**rest, name: p}, (x,)))(rest[name])

    return call


def along(model, x):
    return jvp(model, (x,), (image(2) * 0.1,))[1]


FUNC = {
    "per-sample gradients": per_sample,
    "vmap": lambda model, x: vmap(lambda x: model(x[None]), randomness="different")(x),
    "vmap, the same draws": lambda model, x: vmap(lambda x: model(x[None]), randomness="same")(x),
    "vmap over chunks": lambda model, x: vmap(model, randomness="different")(x[None]),
    "an ensemble": ensemble,
    "grad": lambda model, x: grad(lambda x: model(x).sum())(x),
    "vjp": lambda model, x: vjp(model, x)[1](torch.ones(2, 7)),
    "jvp": along,
    "jacrev": one_parameter(jacrev),
    "jacfwd": one_parameter(lambda f: jacfwd(f, randomness="same")),
    "hessian": one_parameter(lambda f: hessian(lambda p: f(p).square().sum())),
    "grad of grad": lambda model, x: grad(lambda x: grad(lambda y: model(y).sum())(x).square().sum())(x),
    "functional_call": lambda model, x: functional_call(
        model, {name: 0.5 * p for name, p in parameters_of(model).items()}, (x,)
    ),
    "functional_call, buffers of another dtype": lambda model, x: functional_call(
        model, {name: p.double() for name, p in parameters_of(model).items()}, (x.double(),)
    ),
    "forward mode by hand": lambda model, x: dual(model, x),
    "autograd's jacobian": lambda model, x: torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x),
}


def dual(model, x):
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


# PyTorch's fused attention has no forward-mode derivative and no second one: timm's model is asked for another.
UNFUSED = ("jvp", "jacfwd", "hessian", "grad of grad", "forward mode by hand")


# torch.func.hessian takes no randomness.
@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in FUNC for m in ("eval", "train") if (n, m) != ("hessian", "train")]
)
def test_torch_func(name, mode):
    def leaves(model):
        torch.manual_seed(0)
        return tree_leaves(FUNC[name](model.train(mode == "train"), image()))

    plain = twin("plain", **RATES)
    if name in UNFUSED:
        for layer in layers(plain):
            layer.attn.fused_attn = False
    wanted = leaves(plain)
    floor = 1e-3 * max(leaf.norm().item() for leaf in wanted)
    for kind in FAST:
        for a, b in zip(leaves(twin(kind, **RATES)), wanted, strict=True):
            assert_close(a, b, f"{kind}: {name}", floor=floor)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_penalty(dtype, kind):
    """In float64 as in timm's model; in float32 the same, or a line that says what to do."""
    plain, other = twins(kind, lambda model: model.to(dtype))

    def penalty(model):
        x = image(dtype=dtype).requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.square().sum().backward()
        return x.grad

    for layer in layers(plain):
        layer.attn.fused_attn = False
    wanted = penalty(plain)
    try:
        got = penalty(other)
    except RuntimeError as error:
        if dtype is not torch.float32 or ("restore" if kind != "NesT" else "reference") not in str(error):
            raise
        return
    assert_close(got, wanted, "gradient")


# --- accelerate and restore -------------------------------------------------------------------------------------------


def classes(model):
    return [type(module) for module in model.modules()]


def assert_untouched(model, before):
    assert classes(model) == before
    assert not [name for name, module in model.named_modules() if "nest_fast" in str(type(module).__mro__)]


def test_accelerate_is_all_or_nothing(monkeypatch):
    """An error on the way leaves the model as it was."""
    for failing in range(1, 8):
        model = plain_model()
        before = classes(model)
        original, count = nn.Module.__setattr__, SimpleNamespace(value=0)

        def fails(self, name, value, count=count, failing=failing, original=original):
            if name == "__class__":
                count.value += 1
                if count.value == failing:
                    raise MemoryError
            original(self, name, value)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__setattr__", fails)
            try:
                nest_fast.accelerate(model)
            except MemoryError:
                assert_untouched(model, before)
                assert "forward" not in vars(model)
                continue
        nest_fast.restore(model)
        assert_untouched(model, before)


class Broken(nn.Module):
    """A part that raises where it is looked at."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        if name in ("weight", "kernel_size", "stride", "bias", "padding", "eps", "normalized_shape", "p"):
            raise ValueError(f"no {name}")
        return super().__getattr__(name)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.proj_drop", "mlp.fc1", "mlp.act", "drop_path1"])
def test_a_part_that_cannot_be_looked_at(name):
    def change(model):
        old = layers(model)[1].get_submodule(name)
        layers(model)[1].set_submodule(name, Broken(old))

    for kind in KINDS:
        agree(*twins(kind, change), layout=kind != "NesT")


@pytest.mark.parametrize("part", ["levels.0", "levels.1", "levels", LAYER, f"{LAYER}.attn", "levels.1.pool"])
def test_parts_are_accelerated_and_restored(part):
    plain, model = plain_model(), plain_model()
    before = classes(model)
    report = nest_fast.accelerate(model.get_submodule(part))
    assert report.replaced
    agree(plain, model)
    nest_fast.accelerate(model)
    agree(plain, model, modes=("eval",))
    nest_fast.restore(model.get_submodule(part))
    assert_untouched(model.get_submodule(part), classes(plain.get_submodule(part)))
    agree(plain, model, modes=("eval",))
    nest_fast.restore(model)
    assert_untouched(model, before)


def test_twice_and_back():
    plain, model = plain_model(), plain_model()
    before = classes(model)
    first = nest_fast.accelerate(model)
    accelerated_classes = classes(model)
    assert not nest_fast.accelerate(model).replaced
    assert classes(model) == accelerated_classes
    assert nest_fast.restore(model) == len(first.replaced)
    assert nest_fast.restore(model) == 0
    assert_untouched(model, before)
    wanted, got = run(plain, image()), run(model, image())
    assert torch.equal(got.out[0], wanted.out[0])
    assert nest_fast.accelerate(model).replaced == first.replaced
    agree(plain, model)


def wrap_forward(module):
    inner = module.forward
    module.forward = lambda *args: inner(*args)


def shard(module):
    """As fully_shard does: the class is derived once more."""
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (Sharded, cls), {})


class Sharded:
    pass


def parametrized(module):
    name = next(name for name, _ in module.named_parameters(recurse=False))
    parametrize.register_parametrization(module, name, Half())


WRAPPED = {
    "forward wrapped": (
        wrap_forward,
        ("", "patch_embed", "levels.0", "levels.1", "levels.1.pool", LAYER, f"{LAYER}.attn"),
    ),
    "class derived": (shard, ("", "patch_embed", "levels.0", "levels.1", "levels.1.pool", LAYER, f"{LAYER}.attn")),
    "parametrized": (parametrized, ("levels.0", "levels.1")),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_restore_under_wrappers(how):
    """Nothing of ours is left, what the user put on stays and works; or it is said what could not be undone."""
    wrap, names = WRAPPED[how]
    failures = []
    for name in names:
        plain, model = plain_model(), accelerated(plain_model())
        for m in (plain, model):
            wrap(m.get_submodule(name))
        try:
            agree(plain, model, modes=("eval",))
            with warnings.catch_warnings(record=True) as said:
                nest_fast.restore(model)
            left = [n for n, m in model.named_modules() if any("nest_fast" in c.__module__ for c in type(m).__mro__)]
            if left and not said:
                failures.append(f"{name or '(model)'}: {left} are still accelerated, and nothing is said")
            agree(plain, model, modes=("eval",))
            nest_fast.accelerate(model)
            agree(plain, model, modes=("eval",))
        except (AssertionError, AttributeError, TypeError, RuntimeError) as error:
            failures.append(f"{name or '(model)'}: {type(error).__name__}: {str(error)[:150]}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("how", WRAPPED)
def test_accelerate_under_wrappers(how):
    wrap, names = WRAPPED[how]
    for name in names:
        plain, model = plain_model(), plain_model()
        for m in (plain, model):
            wrap(m.get_submodule(name))
        nest_fast.accelerate(model)
        agree(plain, model, modes=("eval",))


def operations(model):
    """The operations of nest_fast that one forward runs."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(image())
    return sorted(e.key for e in profile.key_averages() if e.key.startswith("nest_fast::") for _ in range(e.count))


def test_models_do_not_change_one_another():
    """What one model fuses does not depend on what was accelerated, imported or patched in another."""
    ours, first = twin("NesT", drop_path_rate=0.4), twin("accelerated after")
    before = operations(ours), operations(first)
    assert all(before)
    for layer in layers(ours):
        layer.drop_path1 = timm.layers.DropPath(0.4)
    mixed = operations(ours)
    second = twin("accelerated after", drop_path_rate=0.4)
    layers(second)[0].attn.qkv = LoRA(layers(second)[0].attn.qkv)
    layers(second)[1].mlp.fc1.register_forward_hook(lambda *args: None)
    second(image())
    assert (operations(ours), operations(first)) == (mixed, before[1])
    nest_fast.restore(second)
    assert (operations(ours), operations(first)) == (mixed, before[1])


def test_one_layer_listened_to_leaves_the_others_fast():
    for kind in FAST:
        model = twin(kind)
        before = operations(model)
        layers(model)[1].mlp.act.register_forward_hook(lambda *args: None)
        after = operations(model)
        assert set(before) >= {"nest_fast::attention_layer_cpp_fwd"} or before
        assert len([name for name in after if "attention_layer" in name]) == 3, (kind, after)
        assert len([name for name in after if "mlp_layer" in name]) == 2, (kind, after)


def test_an_empty_batch():
    """timm's cannot cut nothing into blocks; a layer can compute it, and its gradients are zeros."""
    for kind in FAST:
        layer, plain = layers(twin(kind, **RATES))[1].train(), layers(twin("plain", **RATES))[1].train()
        x = torch.zeros(0, 1, 16, 64, requires_grad=True)
        for module in (plain, layer):
            module.zero_grad()
            module(x).sum().backward()
        for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_options_are_the_same():
    """Same weights, other constructor arguments: the twins of the other tests are not the only ones that agree."""
    for options in (
        {"pad_type": "same"},
        {"qkv_bias": False},
        {"act_layer": nn.ReLU},
        {"norm_layer": nn.LayerNorm},
        {"global_pool": "max"},
        {"num_classes": 0},
        {"img_size": 32, "num_levels": 3, "embed_dims": (32, 64, 96), "num_heads": (1, 4, 3), "depths": 1},
        {"depths": 1, "mlp_ratio": 1.5, **RATES},
    ):
        for kind in FAST:
            size = options.get("img_size", SMALL["img_size"])
            agree(*twins(kind, **{"depths": 1, **options}), image(size=size), layout=kind != "NesT", modes=("train",))


def test_data_parallel_style_replicas():
    """Modules whose parameters are plain attributes, as ``nn.parallel.replicate`` makes them."""
    plain, other = twins("accelerated after")
    outs = []
    for model in (plain, other):
        replica = model._replicate_for_data_parallel()
        for name, child in list(model._modules.items()):
            setattr(replica, name, child)
        replica = copy.copy(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                clone = module._replicate_for_data_parallel()
                for key, value in module._parameters.items():
                    if value is not None:
                        setattr(clone, key, 0.5 * value)
                model.set_submodule(name, clone)
        outs.append(run(replica, image(), backward=False).out[0])
    assert_close(outs[1], outs[0], "output")


def test_changes_one_after_another_are_seen_at_once():
    """One pair of twins lives through everything: nothing is remembered from one call to the next."""
    for kind in FAST:
        plain, other = twins(kind)

        def both(function, plain=plain, other=other, kind=kind):
            for model in (plain, other):
                changed(model, function)
            agree(plain, other, layout=kind != "NesT", modes=("train",))

        agree(plain, other, layout=kind != "NesT")
        both(lambda m: layers(m)[0].mlp.fc1.weight.data.mul_(0.5))
        both(lambda m: setattr(layers(m)[1].mlp.fc1, "weight", nn.Parameter(torch.randn(256, 64) * 0.1)))
        both(lambda m: setattr(layers(m)[1].mlp.drop1, "p", 0.5))
        both(lambda m: setattr(layers(m)[1].mlp.drop1, "p", 0.0))
        both(lambda m: layers(m)[2].norm1.__class__.__name__ and setattr(layers(m)[2].norm1, "eps", 0.5))
        both(lambda m: setattr(layers(m)[2].mlp, "act", nn.ReLU()))
        both(lambda m: setattr(layers(m)[2].mlp, "act", nn.GELU("tanh")))
        both(lambda m: layers(m)[2].attn.proj.register_parameter("bias", None))
        both(lambda m: m.requires_grad_(False) and None)
        both(lambda m: m.requires_grad_(True) and None)
        both(lambda m: setattr(m.levels[1].pool.conv, "padding_mode", "circular"))
        both(lambda m: setattr(m.levels[1].pool.conv, "padding_mode", "zeros"))
        both(lambda m: setattr(m, "norm", nn.LayerNorm(64)))
        both(lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}, assign=True) and None)
