"""The families of models that accelerate knows beside NesT: they do what their library's do, whatever users do to them.

One table of small models, one of what is done to each; ``test_timm.py`` and ``test_user_*.py`` do the same to NesT at
length.
"""

import copy
import dataclasses
import importlib.util
import pickle
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.utils._pytree import tree_leaves

import nest_fast
from helpers.twins import Half, Int8, LoRA, Scale, agree, assert_close, distance, listen, run, timm

import torchvision  # isort: skip  # after timm, which may have to make room for it

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import transformers
models = timm.models


@dataclasses.dataclass(frozen=True)
class Family:
    """A small model of a family.

    Attributes:
        name: as the report has it.
        build: makes one.
        size, other: height and width of its images, and of others that it takes, which no window divides.
        fused: how many sub-layers each layer has that are one operation.
        dynamic: options with which it takes images of any size.
    """

    name: str
    build: Callable[..., nn.Module]
    size: tuple[int, int]
    other: tuple[int, int]
    fused: tuple[int, ...]
    dynamic: dict = dataclasses.field(default_factory=dict)


def torchvision_swin(block: str, merging: str, drop_path_rate: float = 0.0, **options: Any) -> nn.Module:
    swin = torchvision.models.swin_transformer
    classes = {"block": getattr(swin, block), "downsample_layer": getattr(swin, merging)}
    sizes = {"patch_size": [2, 2], "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": [4, 4]}
    return swin.SwinTransformer(**sizes, **classes, num_classes=7, stochastic_depth_prob=drop_path_rate, **options)


def timm_maxvit(**options: Any) -> nn.Module:
    maxvit = models.maxxvit
    cfg = maxvit.MaxxVitCfg(embed_dim=(32, 64), depths=(1, 1), block_type=("M", "M"), stem_width=16)
    return maxvit.MaxxVit(
        cfg, img_size=32, num_classes=7, transformer_window_size=(4, 4), **{"transformer_init_values": 0.5, **options}
    )


def torchvision_maxvit(drop_path_rate: float = 0.0, **options: Any) -> nn.Module:
    sizes = {"block_channels": [32, 64], "block_layers": [1, 1], "stem_channels": 16, "head_dim": 16}
    return torchvision.models.MaxVit(
        (32, 32), **sizes, partition_size=4, num_classes=7, stochastic_depth_prob=drop_path_rate, **options
    )


class Output(nn.Module):
    """The first output of a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]


def transformers_swin(kind: str, drop_path_rate: float = 0.0, **options: Any) -> nn.Module:
    sizes = {
        "image_size": 40,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=7, drop_path_rate=drop_path_rate, **options)
    return Output(getattr(transformers, f"{kind}ForImageClassification")(config))


def transformers_sam(drop_path_rate: float = 0.0, **options: Any) -> nn.Module:
    """Which has no stochastic depth."""
    sizes: dict[str, Any] = {"image_size": 40, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "mlp_ratio": 2.0, "window_size": 3, "global_attn_indexes": [1]}
    config = transformers.SamVisionConfig(**sizes, output_channels=16, **options)
    return Output(transformers.SamVisionModel(config))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
FAMILIES = {
    "vit": Family(
        "timm's ViT or DeiT",
        lambda **kw: models.vision_transformer.VisionTransformer(**VIT, init_values=0.5, reg_tokens=3, **kw),
        (32, 32),
        (40, 24),
        (2, 2),
        {"dynamic_img_size": True},
    ),
    "deit": Family(
        "timm's ViT or DeiT",
        lambda **kw: models.deit.VisionTransformerDistilled(**VIT, global_pool="token", **kw),
        (32, 32),
        (40, 24),
        (2, 2),
        {"dynamic_img_size": True},
    ),
    "sam": Family(
        "timm's SAM",
        lambda **kw: models.vision_transformer_sam.VisionTransformerSAM(
            **{**VIT, "img_size": 40}, window_size=3, global_attn_indexes=(1,), neck_chans=16, init_values=0.5,
            **{"use_rel_pos": True, **kw},
        ),
        (40, 40),
        (56, 24),
        (2, 2),
    ),
    "twins": Family(
        "timm's Twins",
        lambda **kw: models.twins.Twins(
            img_size=40, embed_dims=(32, 64), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2), sr_ratios=(2, 1),
            wss=(4, 3), num_classes=7, **kw,
        ),
        (40, 40),
        (56, 24),
        (2, 1, 2, 1),
    ),
    "davit": Family(
        "timm's DaViT",
        lambda **kw: models.davit.DaVit(
            depths=(1, 1), embed_dims=(32, 64), num_heads=(1, 2), window_size=3, num_classes=7, **kw
        ),
        (48, 48),
        (56, 24),
        (2, 1, 2, 1),
    ),
    "hiera": Family(
        "timm's Hiera",
        lambda **kw: models.hiera.Hiera(
            img_size=(64, 64), embed_dim=32, stages=(1, 2, 2), q_pool=2, mask_unit_size=(4, 4),
            mask_unit_attn=(True, True, False), num_classes=7, init_values=0.5, **kw,
        ),
        (64, 64),
        (64, 64),
        (2, 1, 2, 1, 2),
    ),
    "swin": Family(
        "timm's Swin",
        lambda **kw: models.swin_transformer.SwinTransformer(
            img_size=40, patch_size=2, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=7, **kw
        ),
        (40, 40),
        (56, 24),
        (2, 2, 2, 2),
        {"strict_img_size": False},
    ),
    "swin v2": Family(
        "timm's Swin v2",
        lambda **kw: models.swin_transformer_v2.SwinTransformerV2(
            img_size=40, patch_size=2, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=7, **kw
        ),
        (40, 40),
        (56, 24),
        (2, 2, 2, 2),
        {"strict_img_size": False},
    ),
    "gcvit": Family(
        "timm's GCViT",
        lambda **kw: models.gcvit.GlobalContextVit(
            img_size=32, window_size=(4, 4), embed_dim=32, depths=(2, 2), num_heads=(1, 2), mlp_ratio=2.0,
            num_classes=7, layer_scale=0.5, **kw,
        ),
        (32, 32),
        (32, 32),
        (2, 1, 2, 1),
    ),
    "maxvit": Family("timm's MaxViT", timm_maxvit, (32, 32), (64, 32), (2, 2, 2, 2)),
    "torchvision maxvit": Family("torchvision's MaxViT", torchvision_maxvit, (32, 32), (32, 32), (2, 2, 2, 2)),
    "torchvision swin": Family(
        "torchvision's Swin",
        lambda **kw: torchvision_swin("SwinTransformerBlock", "PatchMerging", **kw),
        (40, 40),
        (54, 6),
        (2, 2, 2, 2),
    ),
    "torchvision swin v2": Family(
        "torchvision's Swin",
        lambda **kw: torchvision_swin("SwinTransformerBlockV2", "PatchMergingV2", **kw),
        (40, 40),
        (54, 6),
        (2, 2, 2, 2),
    ),
    "transformers swin": Family(
        "transformers' Swin", lambda **kw: transformers_swin("Swin", **kw), (40, 40), (54, 18), (2, 2, 2, 2)
    ),
    "transformers sam": Family("transformers' SAM", transformers_sam, (40, 40), (40, 40), (2, 2)),
    "transformers donut": Family(
        "transformers' Donut", lambda **kw: transformers_swin("DonutSwin", **kw), (40, 40), (54, 18), (2, 2, 2, 2)
    ),
    "transformers swin v2": Family(
        "transformers' Swin v2", lambda **kw: transformers_swin("Swinv2", **kw), (40, 40), (54, 18), (2, 2, 2, 2)
    ),
}  # fmt: skip
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed: pip install '.[test]'"
)


def each_of(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "family",
        [pytest.param(name, marks=NEEDS_TRANSFORMERS if name.startswith("transformers") else ()) for name in names],
    )


ALL = each_of(FAMILIES)
# DeiT's layers are ViT's.
EACH_ADAPTER = each_of(name for name in FAMILIES if name != "deit")
# For what is no adapter's own doing: how classes are swapped, and what tracers see of a sub-layer.
EACH_LIBRARY = each_of(["swin", "torchvision swin", "transformers swin"])


def plain_model(family: str, dynamic: bool = False, **options: Any) -> Any:
    """The library's model in eval mode, in which every part acts: none of its weights is zero or one."""
    torch.manual_seed(1)
    model = FAMILIES[family].build(**(FAMILIES[family].dynamic if dynamic else {}), **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.3)
    return model


def accelerated(plain: nn.Module) -> Any:
    model = copy.deepcopy(plain)
    nest_fast.accelerate(model)
    return model


def image(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def layers(model: nn.Module) -> list[Any]:
    return [module for _, module in named_layers(model)]


def named_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if {"attn", "attention", "attn_layer"} & set(module._modules)
    ]


# The names of parts where a library has others than most of timm's layers.
SPELLINGS = {
    "mlp": ("mlp_layer", "intermediate"),
    "mlp.fc1": ("mlp_layer.1", "mlp.0", "mlp.lin1", "intermediate.dense"),
    "mlp.act": ("mlp_layer.2", "mlp.1", "mlp.activation_fn", "intermediate.intermediate_act_fn"),
    "mlp.drop1": ("mlp_layer.4", "mlp.2", "dropout", "output.dropout"),
    "mlp.fc2": ("mlp_layer.3", "mlp.3", "mlp.lin2", "output.dense"),
    "mlp.drop2": ("mlp_layer.4", "mlp.4", "dropout", "output.dropout"),
    "attn": ("attn_layer.1", "attention"),
    "attn.attn_drop": ("attention.self.dropout",),
    "attn.proj": ("attn_layer.1.merge", "attention.o_proj", "attention.output.dense"),
    "norm1": ("attn_layer.0", "layernorm_before", "layer_norm1"),
    "norm2": ("mlp_layer.0", "layernorm_after", "layer_norm2"),
}


def spelled(layer: nn.Module, name: str) -> str:
    """The name of a part as the layer's library has it."""
    there = {full for full, _ in layer.named_modules()}
    return next((own for own in (name, *SPELLINGS.get(name, ())) if own in there), name)


def part(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(spelled(layer, name))


def reasons(model: nn.Module) -> list[str]:
    return [row.why for row in nest_fast.explain(model) if row.how.startswith("its modules")]


# --- the same numbers -------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_its_library(family, dtype):
    """Output and gradients against float64 from the same rounded weights: at most twice the library's own error."""
    plain = plain_model(family).to(dtype)
    golden, fast = copy.deepcopy(plain).double(), accelerated(plain)
    x = image(FAMILIES[family].size).to(dtype)
    wide, theirs, ours = run(golden, x.double()), run(plain, x), run(fast, x)
    for got, own, right in zip(ours.out, theirs.out, wide.out, strict=True):
        assert got.dtype == dtype
        assert distance(got, right) <= 2 * distance(own, right)
    together = [torch.cat([r.grads[name].flatten().double() for name in wide.grads]) for r in (ours, theirs, wide)]
    assert distance(together[0], together[2]) <= 2 * distance(together[1], together[2])
    with torch.no_grad():
        assert distance(fast(x), golden(x.double())) <= 2 * distance(plain(x), golden(x.double()))


@EACH_ADAPTER
def test_a_frozen_one_computes_the_same_and_sees_every_weight(family):
    model, x = accelerated(plain_model(family)), image(FAMILIES[family].size)
    with torch.no_grad():
        before = model(x)
        nest_fast.freeze(model)
        assert torch.equal(model(x), before)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "gamma" in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
                after = model(x)
                assert not torch.equal(after, before), name
                before = after
        nest_fast.unfreeze(model)
        assert torch.equal(model(x), before)


@ALL
def test_images_of_other_sizes_and_stochastic_depth(family):
    """Gradients too; as many random numbers are drawn, and the same samples dropped."""
    plain = plain_model(family, dynamic=True, drop_path_rate=0.5)
    fast = accelerated(plain)
    for size in (FAMILIES[family].size, FAMILIES[family].other):
        agree(plain, fast, image(size, batch=3), modes=("inference", "train"))


@ALL
def test_every_layer_is_fast_and_the_report_says_whose(family):
    plain = plain_model(family)
    fast = copy.deepcopy(plain)
    report = nest_fast.accelerate(fast, image(FAMILIES[family].size))
    assert report.families == (FAMILIES[family].name,)
    assert len(report.replaced) == len(layers(plain))
    assert report.trial.error <= report.trial.allowed
    by_name = {name: 0 for name, _ in named_layers(plain)}
    for row in nest_fast.explain(fast):
        by_name[row.name] += not row.how.startswith("its modules")
    assert tuple(by_name.values()) == FAMILIES[family].fused
    assert nest_fast.restore(fast) == len(report.replaced)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]


# --- what users do ----------------------------------------------------------------------------------------------------

Layers = list[tuple[str, Any]]


def each_layer(change):
    return lambda model, chosen: [change(layer) for _, layer in chosen]


def replaced(name, new):
    def change(layer):
        layer.set_submodule(spelled(layer, name), new(part(layer, name)))

    return each_layer(change)


def heard(name, event):
    """A hook on a module of the first layer."""

    def change(model, chosen):
        full, layer = chosen[0]
        listen(model, f"{full}.{spelled(layer, name)}".rstrip("."), event)

    return change


def quantised(layer):
    fc1 = part(layer, "mlp.fc1")
    fc1.weight = nn.Parameter(Int8(fc1.weight.detach()), requires_grad=False)


def own_forward(layer):
    mlp = part(layer, "mlp")
    mlp.forward = lambda x: 0.5 * type(mlp).forward(mlp, x)


class Wrapped(nn.Module):
    """Around a module, with nothing of its attributes."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return times(0.5, self.base(*args, **kwargs))


def times(factor, out):
    """Of several outputs the first."""
    return (factor * out[0], *out[1:]) if isinstance(out, tuple) else factor * out


def wrapped_attention(layer):
    if not getattr(layer, "do_expand", False):  # there timm's Hiera asks its attention for more than a call
        layer.set_submodule(spelled(layer, "attn"), Wrapped(part(layer, "attn")))


def attention_drops(layer):
    drop = spelled(layer, "attn.attn_drop")
    if drop in dict(layer.named_modules()):
        layer.get_submodule(drop).p = 0.3
    part(layer, "attn").attention_dropout = 0.3  # torchvision's and transformers'


# Changes of some layers, and what explain says of them, if they are before accelerate or after it.
ACTIONS = {
    "a hook on attention": (heard("attn", "forward"), "somebody listens to attn"),
    "a hook with keywords": (heard("attn", "forward with kwargs"), "somebody listens to attn"),
    "a hook on its projection": (heard("attn.proj", "forward pre"), "somebody listens to attn.proj"),
    "a wrapped attention": (each_layer(wrapped_attention), "attn is a Wrapped"),
    "LoRA": (replaced("attn.proj", LoRA), "attn.proj is a LoRA"),
    "another norm": (replaced("norm1", lambda old: nn.Identity()), "norm1 is a Identity"),
    "attention dropout": (each_layer(attention_drops), ""),
    "another scale": (each_layer(lambda layer: setattr(part(layer, "attn"), "fused_attn", False)), ""),
    "a hook on a norm": (heard("norm2", "gradient"), "somebody listens to norm2"),
    "a hook on the MLP": (heard("mlp.fc1", "forward"), "somebody listens to mlp.fc1"),
    "a parametrization": (
        each_layer(lambda layer: parametrize.register_parametrization(part(layer, "mlp.fc2"), "weight", Half())),
        "mlp.fc2 is a ParametrizedLinear",
    ),
    "a quantised weight": (each_layer(quantised), "a weight of mlp.fc1 is no ordinary tensor"),
    "another activation": (replaced("mlp.act", lambda old: nn.ReLU()), "mlp.act is a ReLU"),
    "a scale for a dropout": (
        each_layer(
            lambda layer: layer.set_submodule(spelled(layer, "mlp.drop2"), Scale(part(layer, "mlp.fc2").out_features))
        ),
        "mlp.drop2 is a Scale",
    ),
    "dropout in training": (each_layer(lambda layer: setattr(part(layer, "mlp.drop1"), "p", 0.3)), ""),
    "a forward of its own": (each_layer(own_forward), "somebody listens to mlp"),
    "a hook on a layer": (heard("", "forward always"), ""),
    "frozen": (each_layer(lambda layer: layer.requires_grad_(False)), ""),
    "float64": (lambda model, chosen: model.double(), ""),
}  # fmt: skip
# One of attention and one of the MLP are done to the first half of the layers, and others to the rest.
ROUNDS = [
    (("a hook on attention", "another activation"), ("LoRA", "a hook on a norm")),
    (("another norm", "a hook on the MLP"), ("a hook with keywords", "a forward of its own")),
    (("a wrapped attention", "a quantised weight"), ("attention dropout", "a scale for a dropout")),
    (("another scale", "dropout in training"), ("a hook on its projection", "a parametrization")),
    (("frozen",), ("a hook on a layer",)),
    (("float64",), ()),
]
# What a family has nothing to do it to.
WITHOUT = {"transformers sam": {"a scale for a dropout", "dropout in training"}}


@pytest.mark.parametrize("changes", ROUNDS, ids=lambda changes: ", ".join(sum(changes, ())))
@EACH_ADAPTER
def test_models_do_what_they_did(family, changes):
    """Whether it is done after accelerate or before; what a hook is given may lie otherwise in memory."""
    plain = plain_model(family)
    after, before = accelerated(plain), copy.deepcopy(plain)
    for model in (plain, after, before):
        torch.manual_seed(2)
        for action, chosen in spread(family, changes, model):
            ACTIONS[action][0](model, chosen)
    nest_fast.accelerate(before)
    x = image(FAMILIES[family].size).to(next(plain.parameters()).dtype)
    for fast, mode in ((before, "inference"), (after, "train")):  # in training batch norms change
        agree(plain, fast, x, modes=(mode,), layout=False)
        rows = [row for row in nest_fast.explain(fast) if row.how.startswith("its modules")]
        for action, chosen in spread(family, changes, fast):
            expected = " ".join(spelled(chosen[0][1], word) for word in ACTIONS[action][1].split())
            said = [row.why for row in rows if row.name in dict(chosen)]
            assert not expected or any(why.startswith(expected) for why in said), said


def spread(family, changes, model) -> list[tuple[str, Layers]]:
    """Which layers each action is done to."""
    named = named_layers(model)
    halves = named[: len(named) // 2], named[len(named) // 2 :]
    given = zip(changes, halves, strict=True)
    return [(name, chosen) for names, chosen in given for name in names if name not in WITHOUT.get(family, ())]


def test_every_action_is_done():
    assert sorted(name for changes in ROUNDS for names in changes for name in names) == sorted(ACTIONS)


class Doubled:
    """Put before a layer's class: a user's own layer."""

    def forward(self, *args, **kwargs):
        return times(2, super().forward(*args, **kwargs))


@EACH_LIBRARY
def test_classes_of_others_are_left_alone(family):
    """A subclass of the library's layer, a forward patched on one."""
    plain = plain_model(family)
    for layer in layers(plain)[:1]:
        layer.__class__ = type("Mine", (Doubled, type(layer)), {})
    fast = copy.deepcopy(plain)
    report = nest_fast.accelerate(fast)
    library = FAMILIES[family].name.partition("'")[0]
    assert f"Mine is a subclass of {library}'s class, and may compute something else" in report.kept.values()
    layer, its = layers(plain)[-1], layers(fast)[-1]
    base = type(layer)
    layer.forward = lambda *args, **kwargs: times(3, base.forward(layer, *args, **kwargs))
    its.forward = lambda *args, **kwargs: times(3, base.forward(its, *args, **kwargs))
    agree(plain, fast, image(FAMILIES[family].size), modes=("inference",))
    again = copy.deepcopy(plain_model(family))
    layers(again)[0].forward = lambda x, *args: x
    assert "its forward was patched on the instance" in nest_fast.accelerate(again).kept.values()


@EACH_ADAPTER
def test_a_class_that_is_patched_later_is_called(family, monkeypatch):
    plain = plain_model(family)
    fast = accelerated(plain)
    for base in {type(layer) for layer in layers(plain)}:
        theirs = base.forward
        patched = lambda *args, theirs=theirs, **kwargs: times(0.5, theirs(*args, **kwargs))  # noqa: E731
        monkeypatch.setattr(base, "forward", patched)
    agree(plain, fast, image(FAMILIES[family].size), modes=("inference",))


@EACH_LIBRARY
def test_copies_and_pickles(family):
    plain = plain_model(family)
    fast = accelerated(plain)
    assert [type(p) for p in fast.parameters()] == [type(p) for p in plain.parameters()]
    wanted = run(fast, image(FAMILIES[family].size))
    for clone in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert [type(m) for m in clone.modules()] == [type(m) for m in fast.modules()]
        assert torch.equal(run(clone, image(FAMILIES[family].size)).out[0], wanted.out[0])
    with pytest.raises(RuntimeError, match=r"got an accelerated one; nest_fast\.restore"):
        torch.jit.script(fast)


@EACH_ADAPTER
def test_keys_features_autocast_and_checkpointing(family):
    plain = plain_model(family)
    fast = accelerated(plain)
    x = image(FAMILIES[family].size)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    timms = FAMILIES[family].name.startswith("timm")
    features = [m.forward_intermediates(x, intermediates_only=True) for m in (fast, plain)] if timms else [[], []]
    assert all(distance(got, wanted) < 1e-5 for got, wanted in zip(*features, strict=True))
    fast.load_state_dict(plain_model(family, drop_path_rate=0.3).state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        agree(plain, fast, x, modes=("eval",), tolerance=0.15)
    if timms and family != "twins":  # timm's Twins has none
        fast.set_grad_checkpointing(True)
        agree(plain, fast, x, modes=("train",))


@each_of(["sam", "swin v2", "torchvision swin", "transformers swin"])
def test_a_layer_is_one_graph_for_the_compiler_and_exports(family):
    plain = plain_model(family)
    layer = layers(accelerated(plain))[-1]
    own = layers(plain)[-1]
    calls = []
    own.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        plain(image(FAMILIES[family].size))
        ((x, *rest),) = calls
        (wanted,) = tensors(own(x, *rest))
        (compiled,) = tensors(torch.compile(layer, backend="eager", fullgraph=True)(x, *rest))
        assert_close(compiled, wanted, "compiled")
        batch = torch.export.Dim("batch", min=1, max=64)
        shapes = ({0: batch}, *((None, None) if isinstance(one, tuple) else None for one in rest))  # rest[0] is a size
        program = torch.export.export(layer, (x, *rest), dynamic_shapes=shapes).module()
        (exported,) = tensors(program(x[:1], *rest))
        assert_close(exported, wanted[:1], "exported")


def tensors(out):
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


# --- what is particular to one of them --------------------------------------------------------------------------------


def test_masks_of_vit_are_its_librarys_affair():
    plain = plain_model("vit")
    fast = accelerated(plain)
    x, mask = torch.randn(2, 9, 32), torch.rand(9, 9) > 0.3
    for options in ({"attn_mask": mask.float()}, {"is_causal": True}, {"attn_mask": None, "is_causal": False}):
        assert_close(fast.blocks[0](x, **options), plain.blocks[0](x, **options), str(options))
    assert_close(fast.blocks[0](x, mask), plain.blocks[0](x, mask), "a mask in place")


def test_layer_scales_are_read_in_every_call():
    plain = plain_model("vit")
    fast = accelerated(plain)
    x = image((32, 32))
    fast(x)
    for model in (plain, fast):
        model.blocks[0].ls1.gamma.data.mul_(-3.0)
        model.blocks[1].ls2 = Scale(32)
        model.blocks[1].ls1.register_forward_hook(lambda module, args, out: 2 * out)
    agree(plain, fast, x)
    assert reasons(fast) == [
        "somebody listens to ls1, or patched it",
        "ls2 is a Scale, which may compute something else",
    ]


class Marked(torch.Tensor):
    """A weight that is more than its numbers."""


STRANGE = {
    "vit": ("ls1", "gamma", "ls1's gamma is no ordinary tensor, or has another dtype than its input"),
    "sam": ("attn", "rel_pos_h", "attn's relative positions are no ordinary tensors, or have another dtype"),
    "swin": (
        "attn",
        "relative_position_bias_table",
        "attn's table of the bias is no ordinary tensor, or has another dtype",
    ),
    "swin v2": ("attn", "q_bias", "attn's scale or biases are no ordinary tensors, or have another dtype"),
    "gcvit": (
        "attn.rel_pos",
        "relative_position_bias_table",
        "attn.rel_pos's table is no ordinary tensor, or has another dtype",
    ),
    "maxvit": (
        "attn.rel_pos",
        "relative_position_bias_table",
        "attn.rel_pos's table is no ordinary tensor, or has another dtype",
    ),
    "torchvision maxvit": (
        "attn_layer.1",
        "relative_position_bias_table",
        "attn_layer.1's table of the bias is no ordinary tensor, or has another dtype",
    ),
    "torchvision swin": (
        "attn",
        "relative_position_bias_table",
        "attn's table of the bias is no ordinary tensor, or has another dtype",
    ),
    "transformers sam": (
        "attn",
        "rel_pos_w",
        "attn's relative positions are no ordinary tensors, or have another dtype",
    ),
    "transformers swin": (
        "attention.relative_position_bias",
        "relative_position_bias_table",
        "attention.relative_position_bias's table is no ordinary tensor, or has another dtype",
    ),
    "transformers donut": (
        "attention.self",
        "relative_position_bias_table",
        "attention.self's table of the bias is no ordinary tensor, or has another dtype",
    ),
    "transformers swin v2": (
        "attention.self",
        "logit_scale",
        "attention.self's scale is no ordinary tensor, or has another dtype",
    ),
    "torchvision swin v2": ("attn", "logit_scale", "attn's scale is no ordinary tensor, or has another dtype"),
}


@each_of(STRANGE)
def test_parameters_that_are_no_ordinary_tensors(family):
    name, parameter, why = STRANGE[family]
    plain = plain_model(family)
    fast = accelerated(plain)
    before = reasons(fast)
    for model in (plain, fast):
        own = layers(model)[0].get_submodule(name)._parameters
        own[parameter] = own[parameter].detach().as_subclass(Marked)
    x = image(FAMILIES[family].size)
    with torch.no_grad():
        assert_close(fast(x).as_subclass(torch.Tensor), plain(x).as_subclass(torch.Tensor), "output")
    assert reasons(fast) == [why, *before]


@pytest.mark.parametrize("family", ["davit", "swin", "swin v2"])
def test_attention_weights_are_shown_to_who_listens_to_the_softmax(family):
    plain = plain_model(family)
    fast = accelerated(plain)
    for model in (plain, fast):
        model.calls = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Softmax):
                model.get_submodule(name.rpartition(".")[0]).fused_attn = False
                listen(model, name, "forward")
    agree(plain, fast, image(FAMILIES[family].size), modes=("inference",))
    assert fast.calls
    assert "somebody listens to attn.softmax, or patched it" in reasons(fast)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
def test_attention_with_more_norms_is_called(options):
    plain = plain_model("vit", **options)
    fast = accelerated(plain)
    agree(plain, fast, image((32, 32)), modes=("inference",))
    assert [why for why in reasons(fast) if "norm is a LayerNorm, which may compute something else" in why]


def test_pruned_heads_are_called():
    """Attention narrower than its input, as after pruning heads."""
    plain = plain_model("vit")
    for block in plain.blocks:
        attn = block.attn
        attn.num_heads, attn.attn_dim = 1, 16
        attn.qkv, attn.proj = nn.Linear(32, 48), nn.Linear(16, 32)
    fast = accelerated(plain)
    agree(plain, fast, image((32, 32)), modes=("inference",))
    assert reasons(fast) == ["attn.qkv has heads of another width than its input"] * 2


def test_sam_resizes_its_positions_and_drops_windows():
    """Positions of another size are interpolated; stochastic depth draws for each window."""
    plain = plain_model("sam")
    for block in plain.blocks:
        block.attn.rel_pos_h = nn.Parameter(torch.randn(21, 16))
        block.drop_path1 = timm.layers.DropPath(0.6)
    fast = accelerated(plain)
    agree(plain, fast, image((56, 24)), modes=("inference", "train"))
    assert reasons(fast.train()) == ["drop_path1 drops windows, not samples"]


@pytest.mark.parametrize("rope", [False, True])
def test_sam_without_relative_positions(rope):
    options = {"use_rope": True, "ref_feat_shape": ((5, 5), (3, 3))} if rope else {}
    plain = plain_model("sam", use_rel_pos=False, **options)
    fast = accelerated(plain)
    agree(plain, fast, image((40, 40)))
    assert bool(reasons(fast)) == rope


def test_a_patched_function_of_sam_is_called(monkeypatch):
    plain = plain_model("sam")
    fast = accelerated(plain)
    module = models.vision_transformer_sam
    monkeypatch.setattr(module, "get_rel_pos", lambda q_size, k_size, table: 0.5 * table[:1].expand(q_size, k_size, -1))
    agree(plain, fast, image((40, 40)), modes=("inference",))
    assert reasons(fast) == ["a function of timm's SAM was patched"] * 2


@pytest.mark.parametrize("family", ["swin", "swin v2"])
def test_swin_follows_its_input_size_and_mask(family, monkeypatch):
    """What set_input_size changes is read in every call; a mask of one's own, or none, is the one that counts."""
    plain = plain_model(family)
    fast = accelerated(plain)
    for model in (plain, fast):
        model.set_input_size((56, 24), window_size=6)
    agree(plain, fast, image((56, 24)))
    for model in (plain, fast):
        model.layers[0].blocks[1].attn_mask.mul_(0.01)
    agree(plain, fast, image((56, 24)))
    assert not reasons(fast)
    for model in (plain, fast):
        model.layers[0].blocks[1].attn_mask = None
        model.layers[1].blocks[0]._attn = lambda x: 0.5 * x
    agree(plain, fast, image((56, 24)), modes=("inference",))
    base = type(plain.layers[0].blocks[0])
    original = base._attn
    monkeypatch.setattr(base, "_attn", lambda self, x: 0.5 * original(self, x))
    agree(plain, fast, image((56, 24)), modes=("inference",))


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"pretrained_window_sizes": (8, 8)}], ids=str)
def test_swin_v2_without_biases_and_with_windows_of_another_training(options):
    plain = plain_model("swin v2", **options)
    fast = accelerated(plain)
    agree(plain, fast, image((40, 40)))
    assert not reasons(fast)


def test_swin_v2_reads_its_scale_and_biases_in_every_call():
    """A scale over the largest; a network of the bias that is heard; biases that timm adds beside the one of qkv."""
    plain = plain_model("swin v2")
    fast = accelerated(plain)
    x = image((40, 40))
    fast(x)
    for model in (plain, fast):
        first, second, *_ = layers(model)
        first.attn.logit_scale.data.fill_(6.0)
        first.attn.v_bias.data.mul_(-2.0)
        listen(model, "layers.0.blocks.0.attn.cpb_mlp.0", "forward")
        second.attn.qkv_bias_separate = True
    agree(plain, fast, x)
    assert fast.calls
    assert not reasons(fast)
    for model in (plain, fast):
        torch.manual_seed(2)
        layers(model)[1].attn.qkv = nn.Linear(32, 96)
    agree(plain, fast, x)
    assert reasons(fast) == ["attn has two biases of q, k and v"]


def test_gelus_by_their_names():
    for act, factor in (("gelu", 0), ("gelu_tanh", 0), ("quick_gelu", 4)):
        plain = plain_model("swin v2", act_layer=act)
        fast = accelerated(plain)
        agree(plain, fast, image((40, 40)), modes=("inference",), tolerance=1e-5)
        assert len(reasons(fast)) == factor


def test_davits_other_attention_over_channels():
    plain = plain_model("davit", channel_attn_v2=True, cpe_act=True)
    agree(plain, accelerated(plain), image((56, 24)))


def test_hiera_without_projection_and_with_masked_units():
    plain = plain_model("hiera", use_expand_proj=False)
    fast = accelerated(plain)
    keep = torch.rand(2, 16).argsort(1) < 9  # of 4 x 4 units, the same number in each sample
    with torch.no_grad():
        for got, wanted in zip(*(m.forward_features(image((64, 64)), keep) for m in (fast, plain)), strict=True):
            assert_close(got, wanted, "of masked units")


def test_of_over_512_channels_the_librarys_matmuls_are_taken():
    """Where the C++ kernels read weights too often; not where gradients are wanted, for which they keep less."""
    block = models.vision_transformer.Block(576, 8)
    nest_fast.accelerate(block)
    with torch.no_grad():
        rows = list(nest_fast.explain(block, torch.empty(1, 3, 8, 8)))
        assert all("of C = 576 channels, over 512, the library's matmuls are faster" in row.why for row in rows)
    assert not [row for row in nest_fast.explain(block) if "over 512" in row.why]


@pytest.mark.parametrize("family", ["torchvision swin", "torchvision swin v2"])
def test_what_torchvision_drops_adds_and_traces(family, monkeypatch):
    plain = plain_model(family, drop_path_rate=0.5)
    fast = accelerated(plain)
    for model in (plain, fast):
        first, second, third, fourth = layers(model)
        first.attn.dropout = 0.3
        second.stochastic_depth.mode = "batch"
        third.mlp.append(nn.ReLU())
        fourth.attn.qkv.bias.data.fill_(2.0)  # of Swin v2's k it does not count
    x = image((40, 40))
    agree(plain, fast, x, modes=("inference", "train"))
    assert reasons(fast.train()) == [
        "attn drops",
        *["stochastic_depth drops whole batches"] * 2,
        "mlp is no MLP of two linear layers",
    ]
    extractor = torchvision.models.feature_extraction.create_feature_extractor
    got, wanted = (extractor(model.eval(), ["features.3"])(x)["features.3"] for model in (fast, plain))
    assert_close(got, wanted, "features")
    module = torchvision.models.swin_transformer
    original = module.shifted_window_attention
    monkeypatch.setattr(module, "shifted_window_attention", lambda *args, **named: 0.5 * original(*args, **named))
    agree(plain, fast, x, modes=("inference",))
    assert "a function of torchvision's Swin was patched" in reasons(fast)


@pytest.mark.parametrize(("kind", "heads_first"), [("bias", False), ("bias_tf", True), ("mlp", False), (None, True)])
def test_maxvits_of_all_kinds_of_bias(kind, heads_first):
    """Orders of q, k and v, with biases and without, and other windows; a bias that drops in training."""
    options = {"rel_pos_type": kind, "head_first": heads_first, "attn_bias": heads_first, "init_values": None}
    plain = plain_model("maxvit", **{f"transformer_{name}": value for name, value in options.items()})
    fast = accelerated(plain)
    x = image((64, 32))
    agree(plain, fast, image((32, 32)), modes=("inference",))
    for model in (plain, fast):
        model.set_input_size((64, 32), window_size=(4, 2), grid_size=(2, 4))
    agree(plain, fast, x, modes=("inference", "train"))
    assert reasons(fast) == ["attn.rel_pos drops"] * (4 if kind == "mlp" else 0)

    def train_but_the_dropouts(model):
        model.train()
        for layer in layers(model):
            layer.attn.attn_drop.eval().p = 0.3  # which timm's fused attention does not ask

    agree(plain, fast, x, modes=(train_but_the_dropouts,))


@pytest.mark.parametrize("family", ["gcvit", "maxvit"])
def test_what_users_do_to_windows_and_their_bias(family, monkeypatch):
    """A hook on a bias, a method patched on a layer or on its class; windows that do not divide the image."""
    plain = plain_model(family)
    fast = accelerated(plain)
    x = image(FAMILIES[family].size)
    for model in (plain, fast):
        (_, first), _, (name, third), _ = named_layers(model)
        with pytest.raises((AssertionError, RuntimeError), match=r"must be divisible by window|is invalid for input"):
            first(torch.randn(1, 7, 8, 32))
        third.attn.fused_attn = False
        listen(model, f"{name}.attn.rel_pos", "forward")
        method = next(own for own in ("_partition_attn", "_window_attn") if hasattr(first, own))
        setattr(first, method, lambda x, *args: 0.5 * x)
    agree(plain, fast, x, modes=("inference",))
    assert fast.calls
    assert "somebody listens to attn.rel_pos, or patched it" in reasons(fast)
    assert reasons(fast).count("attn has queries of the whole image") == (2 if family == "gcvit" else 0)
    base = type(layers(plain)[0])
    original = getattr(base, method)
    monkeypatch.setattr(base, method, lambda self, x, *args: 0.5 * original(self, x, *args))
    agree(plain, fast, x, modes=("inference",))


def test_torchvisions_maxvit_reads_its_parts_in_every_call():
    """More modules in a row, dropouts, a swap and a partition that are heard, sizes that windows do not divide."""
    plain = plain_model("torchvision maxvit", attention_dropout=0.2, mlp_dropout=0.2, drop_path_rate=0.5)
    fast = accelerated(plain)
    x = image((32, 32))
    agree(plain, fast, x, modes=("inference", "train"))
    assert reasons(fast) == ["attn_layer.2 drops", "mlp_layer.4 drops"] * 4
    for model in (plain, fast):
        first, second, third, _ = layers(model)
        first.attn_layer.append(Scale(32))
        second.mlp_layer.append(Scale(32))
        listen(model, f"{named_layers(model)[2][0]}.partition_op", "forward")
        listen(model, f"{named_layers(model)[3][0]}.departition_swap", "forward")
        third.attn_layer.register_forward_hook(lambda module, args, out: 2 * out)
    agree(plain, fast, x, modes=("inference",), layout=False)
    assert len(fast.calls) == 2
    assert reasons(fast) == [
        "attn_layer has not 3 modules",
        "mlp_layer has not 5 modules",
        "somebody listens to attn_layer, or patched it",
    ]
    for model in (plain, fast):
        layers(model)[2].grid_size = (6, 6)
        with pytest.raises(AssertionError, match="Grid size must be divisible by partition size"):
            model(x)


@NEEDS_TRANSFORMERS
def test_what_transformers_asks_of_its_swin(monkeypatch):
    """Attention weights, hidden states, checkpointing, keywords, other implementations and activations."""
    swin = transformers.models.swin.modeling_swin
    x = image((40, 40))
    plain = plain_model("transformers swin")
    fast = accelerated(plain)
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        got, wanted = (tensors(model.model(x, **options)) for model in (fast, plain))
        assert len(got) == len(wanted)
        assert all(distance(mine, theirs) < 1e-5 for mine, theirs in zip(got, wanted, strict=True))
    fast.model.activation_checkpointing_enable()
    agree(plain, fast, x, modes=("train",))
    got, wanted = (
        layers(model)[0](hidden_states=torch.ones(1, 81, 32), input_dimensions=(9, 9), always_partition=True)[0]
        for model in (fast, plain)
    )
    assert_close(got, wanted, "by keywords")
    assert not reasons(fast)
    for model in (plain, fast):
        model.model.set_attn_implementation("eager")
    got, wanted = (tensors(model.model(x, output_attentions=True)) for model in (fast, plain))
    assert len(got) == len(wanted) == 3
    assert all(distance(mine, theirs) < 1e-5 for mine, theirs in zip(got, wanted, strict=True))
    assert reasons(fast) == ["attention has another implementation than sdpa"] * 4
    for act in ("gelu_new", "gelu_python"):
        plain = plain_model("transformers swin", hidden_act=act, qkv_bias=False)
        fast = accelerated(plain)
        agree(plain, fast, x, modes=("inference",), tolerance=1e-5)
        assert all(reason.startswith("mlp.activation_fn") for reason in reasons(fast))
        assert len(reasons(fast)) == 4
    original = swin.window_partition
    monkeypatch.setattr(swin, "window_partition", lambda *args: 0.5 * original(*args))
    agree(plain, fast, x, modes=("inference",))
    assert "a function of transformers' Swin was patched" in reasons(fast)


@NEEDS_TRANSFORMERS
def test_what_transformers_asks_of_its_swin_v2(monkeypatch):
    """Attention weights, keywords; scores that one mask would not put out; biases that are not there."""
    swin = transformers.models.swinv2.modeling_swinv2
    x = image((40, 40))
    plain = plain_model("transformers swin v2", qkv_bias=False)
    fast = accelerated(plain)
    for model in (plain, fast):
        for layer in layers(model):
            layer.attention.self.logit_scale.data.fill_(6.0)
    agree(plain, fast, x, modes=("inference",))
    got, wanted = (tensors(model.model(x, output_attentions=True)) for model in (fast, plain))
    assert len(got) == len(wanted) == 3
    assert all(distance(mine, theirs) < 1e-4 for mine, theirs in zip(got, wanted, strict=True))
    # Each half of the image looks for the other one, which lies behind the mask at the edge.
    x_of_layer = torch.randn(1, 1, 32) * torch.tensor([1.0, -1.0]).repeat_interleave(32)[:, None]
    x_of_layer += 0.1 * torch.randn(1, 64, 32)
    for model in (plain, fast):
        attn = layers(model)[1].attention.self
        attn.query.weight.data.copy_(-attn.key.weight)
    got, wanted = (layers(model)[1](hidden_states=x_of_layer, input_dimensions=(8, 8))[0] for model in (fast, plain))
    assert_close(got, wanted, "by keywords")
    assert not reasons(fast)
    for model in (plain, fast):
        layers(model)[1].attention.self = Wrapped(layers(model)[1].attention.self)
    agree(plain, fast, x, modes=("inference",))
    assert reasons(fast) == ["attention.self is a Wrapped, which may compute something else"]
    original = swin.window_reverse
    monkeypatch.setattr(swin, "window_reverse", lambda *args: 0.5 * original(*args))
    agree(plain, fast, x, modes=("inference",))
    assert reasons(fast) == ["a function of transformers' Swin v2 was patched"] * 4


@NEEDS_TRANSFORMERS
def test_what_transformers_asks_of_its_donut(monkeypatch):
    """Attention weights, keywords; windows as large as the image; biases that are not there; a patched function."""
    donut = transformers.models.donut.modeling_donut_swin
    x = image((40, 40))
    plain = plain_model("transformers donut", qkv_bias=False)
    fast = accelerated(plain)
    agree(plain, fast, x)
    got, wanted = (tensors(m.model(x, output_attentions=True, output_hidden_states=True)) for m in (fast, plain))
    assert len(got) == len(wanted) > 6
    assert all(distance(mine, theirs) < 1e-5 for mine, theirs in zip(got, wanted, strict=True))
    options = {"hidden_states": torch.randn(1, 36, 32), "input_dimensions": (4, 9)}
    for always in (True, False):  # as it is the window is shifted, then there is one row of them
        got, wanted = (layers(model)[1](**options, always_partition=always)[0] for model in (fast, plain))
        assert_close(got, wanted, "by keywords")
    assert layers(fast)[1].shift_size == layers(plain)[1].shift_size == 0
    assert not reasons(fast)
    for model in (plain, fast):
        layers(model)[3].get_attn_mask = lambda *args, **named: None
    agree(plain, fast, x, modes=("inference",))
    original = donut.window_partition
    monkeypatch.setattr(donut, "window_partition", lambda *args: 0.5 * original(*args))
    agree(plain, fast, x, modes=("inference",))
    assert reasons(fast) == ["a function of transformers' Donut was patched"] * 4


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_transformers_asks_of_its_sam(implementation, monkeypatch):
    """Positions of another size, dropout, a scale, keywords, checkpointing; attention weights and hidden states."""
    sam = transformers.models.sam.modeling_sam
    x = image((40, 40))
    plain = plain_model("transformers sam", attn_implementation=implementation, qkv_bias=False)
    fast = accelerated(plain)
    assert not reasons(fast)
    for model in (plain, fast):
        torch.manual_seed(2)
        for layer in layers(model):
            layer.attn.rel_pos_h = nn.Parameter(torch.randn(21, 16))
            layer.attn.dropout = 0.3
            layer.attn.scale = 0.1
    agree(plain, fast, x)
    eager = implementation == "eager"
    assert reasons(fast.train()) == ["attn's attention drops"] * (2 if eager else 0)
    fast.model.activation_checkpointing_enable()
    agree(plain, fast, x, modes=("train",))
    got, wanted = (layers(model.eval())[0](hidden_states=torch.ones(1, 4, 7, 32)) for model in (fast, plain))
    assert_close(got, wanted, "by keywords")
    got, wanted = (tensors(m.model(x, output_attentions=True, output_hidden_states=True)) for m in (fast, plain))
    assert len(got) == len(wanted) == (6 if eager else 4)
    assert all(distance(mine, theirs) < 1e-5 for mine, theirs in zip(got, wanted, strict=True))
    assert reasons(fast) == ["somebody listens to attn, or patched it"] * 2  # transformers does, from now on
    plain = plain_model("transformers sam", attn_implementation=implementation, use_rel_pos=False)
    fast = accelerated(plain)
    assert not reasons(fast)
    agree(plain, fast, x)
    for model in (plain, fast):
        layer = layers(model)[0]
        layer.window_partition = lambda x, window, layer=layer: type(layer).window_partition(layer, 0.5 * x, window)
    agree(plain, fast, x, modes=("inference",))
    monkeypatch.setattr(sam.SamVisionAttention, "get_rel_pos", lambda self, q, k, table: table[:1].expand(q, k, -1))
    plain = plain_model("transformers sam", attn_implementation=implementation)
    fast = accelerated(plain)
    agree(plain, fast, x, modes=("inference",))
    assert reasons(fast) == [f"the class of attn, {type(layers(plain)[0].attn).__name__}, was patched"] * 2


@NEEDS_TRANSFORMERS
def test_other_versions_of_transformers_are_left_alone(monkeypatch):
    """Whose layers were written otherwise; models of other libraries are accelerated beside them."""
    plain = plain_model("transformers swin")
    module = sys.modules["transformers"]  # another than before its models were imported
    monkeypatch.setattr(module, "__version__", "5.9.1")
    with pytest.raises(ValueError, match=r"transformers' Swin from 5\.24 on"):
        nest_fast.accelerate(plain)
    assert nest_fast.accelerate(plain_model("swin")).replaced
    monkeypatch.setattr(module, "__version__", "10.0.0.dev0")
    assert nest_fast.accelerate(plain).replaced


def test_a_version_with_other_classes_is_left_as_it_is(monkeypatch):
    """And is said; no other family's models suffer from it."""
    monkeypatch.delitem(sys.modules, "nest_fast.integrations.timm_davit", raising=False)
    monkeypatch.delattr(models.davit, "WindowAttention")
    model = plain_model("vit")
    said = r"timm's DaViT is left as it is, since this version differs: .*WindowAttention"
    with pytest.warns(UserWarning, match=said):
        report = nest_fast.accelerate(model)
    assert report.families == (FAMILIES["vit"].name,)
