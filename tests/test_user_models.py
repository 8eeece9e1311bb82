"""What users do to models: an accelerated timm model and NesT go on doing what timm's model does.

A table of changes, each made before ``accelerate``, after it and in NesT, in eval and in training mode; outputs,
gradients, the number of random draws and what hooks are given are those of timm's model after the same change.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from torch import nn

import nest_fast
from helpers.twins import (
    KINDS,
    TIMM_KINDS,
    ActingIdentity,
    Adapter,
    AlwaysDropout,
    AlwaysDropPath,
    Autocast,
    Doubled,
    Half,
    Int8,
    LoRA,
    LowRank,
    OwnGELU,
    QuickGELU,
    Scale,
    assert_same_run,
    image,
    layers,
    listen,
    mode_name,
    runs,
    timm,
    timm_nest,
    twin,
    width,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    name: str
    change: Callable[[Any], Any] | None
    kinds: tuple[str, ...] = KINDS
    modes: tuple = ("train", "inference")
    x: Callable[[], torch.Tensor] = image
    tolerance: float | None = None
    draws: bool = True
    backward: bool = True
    options: dict = dataclasses.field(default_factory=dict)


# Where something acts in one of them alone; elsewhere a step of training and an answer without gradients say more.
ACTING = ("eval", "train")
FAST = ("accelerated after", "NesT")
CASES: list[Case] = []


def case(name, change=None, *, options=None, **fields):
    CASES.append(Case(name, change, options=options or {}, **fields))


def replace(name, new):
    """Put ``new(old, channels)`` in the place of every layer's module ``name``."""

    def change(model):
        for layer in layers(model):
            old, channels = layer.get_submodule(name), width(layer, name)
            layer.set_submodule(name, new(old, channels))

    return change


def each_layer(function):
    return lambda model: [function(layer) for layer in layers(model)]


def at(name, function):
    """Call ``function(module)`` for one module of the model."""
    return lambda model: function(model.get_submodule(name))


def put(name, new):
    """Put ``new(old)`` in the place of one module of the model."""

    def change(model):
        owner, _, last = name.rpartition(".")
        old = model.get_submodule(name)
        setattr(model.get_submodule(owner), last, new(old))

    return change


def all_of(*changes):
    return lambda model: [change(model) for change in changes]


def manual_attention(model):
    """Attention weights that modules see: timm's own way without the fused attention; NesT has no other."""
    for layer in layers(model):
        layer.attn.fused_attn = False


def only(kind):
    """Training mode for the modules of one class."""

    def mode(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, kind):
                module.train()

    mode.__name__ = f"only {kind.__name__} in training"
    return mode


def only_named(name):
    def mode(model):
        model.eval()
        for layer in layers(model):
            layer.get_submodule(name).train()

    return mode


def all_but(kind):
    def mode(model):
        model.train()
        for module in model.modules():
            if isinstance(module, kind):
                module.eval()

    return mode


LAYER = "levels.1.transformer_encoder.0"
POOL = "levels.1.pool"

# --- modules in the place of those that do nothing in eval mode -------------------------------------------------------

for place in ("drop_path1", "drop_path2", "attn.proj_drop", "mlp.drop1", "mlp.drop2", "norm1", "norm2", "mlp.act"):
    case(f"layer scale as {place}", replace(place, lambda old, dim: Scale(dim)), modes=ACTING, kinds=FAST)
for label, new in {
    "an adapter": lambda old, dim: Adapter(dim),
    "a sequence of dropout and scale": lambda old, dim: nn.Sequential(old, Scale(dim)),
    "dropout that always acts": lambda old, dim: AlwaysDropout(0.3),
    "alpha dropout": lambda old, dim: nn.AlphaDropout(0.3),
    "channel dropout": lambda old, dim: nn.Dropout2d(0.3),
    "in-place dropout": lambda old, dim: nn.Dropout(0.3, inplace=True),
    "dropout of everything": lambda old, dim: nn.Dropout(1.0),
    "an identity that acts": lambda old, dim: ActingIdentity(),
    "an identity": lambda old, dim: nn.Identity(),
    "a scripted module": lambda old, dim: torch.jit.script(Scale(dim)),
    "a linear layer": lambda old, dim: nn.Linear(dim, dim),
    "a norm": lambda old, dim: nn.LayerNorm(dim),
}.items():
    case(f"{label} as attn.proj_drop", replace("attn.proj_drop", new), modes=ACTING)
    case(f"{label} as mlp.drop1", replace("mlp.drop1", new), modes=ACTING, kinds=FAST)
for label, new in {
    "stochastic depth that always acts": lambda old, dim: AlwaysDropPath(0.3),
    "dropout": lambda old, dim: nn.Dropout(0.3),
    "timm's stochastic depth": lambda old, dim: timm.layers.DropPath(0.4),
    "timm's stochastic depth, not scaled": lambda old, dim: timm.layers.DropPath(0.4, scale_by_keep=False),
    "stochastic depth of everything": lambda old, dim: timm.layers.DropPath(1.0),
    "our stochastic depth": lambda old, dim: (
        nest_fast.DropPath(0.4) if hasattr(nest_fast, "DropPath") else _drop_path()
    ),
    "an identity that acts": lambda old, dim: ActingIdentity(),
    "a sequence with scale": lambda old, dim: nn.Sequential(Scale(dim), timm.layers.DropPath(0.4)),
}.items():
    case(f"{label} as drop_path", all_of(replace("drop_path1", new), replace("drop_path2", new)), modes=ACTING)


def _drop_path():
    from nest_fast.modules import DropPath

    return DropPath(0.4)


for label, new in {
    "tanh GELU": lambda old, dim: nn.GELU("tanh"),
    "ReLU": lambda old, dim: nn.ReLU(),
    "in-place SiLU": lambda old, dim: nn.SiLU(inplace=True),
    "QuickGELU": lambda old, dim: QuickGELU(),
    "a GELU of their own": lambda old, dim: OwnGELU(),
    "timm's GELU": lambda old, dim: timm.layers.GELU(),
    "timm's tanh GELU": lambda old, dim: timm.layers.GELUTanh(),
    "PReLU": lambda old, dim: nn.PReLU(),
    "a random ReLU": lambda old, dim: nn.RReLU(),
    "an identity": lambda old, dim: nn.Identity(),
    "a scripted activation": lambda old, dim: torch.jit.script(QuickGELU()),
}.items():
    case(f"{label} as the activation", replace("mlp.act", new), modes=ACTING, kinds=FAST)
case("approximate changed", each_layer(lambda layer: setattr(layer.mlp.act, "approximate", "tanh")))

# --- dropout and stochastic depth in some modules alone ---------------------------------------------------------------

RATES = {"proj_drop_rate": 0.3, "drop_path_rate": 0.4, "drop_rate": 0.2}
case(
    "modes of dropouts and of the rest apart",
    modes=(
        "eval",
        only(nn.Dropout),
        only_named("mlp"),
        only_named("attn"),
        only_named("mlp.drop1"),
        only_named("mlp.drop2"),
        only_named("attn.proj_drop"),
        only_named("drop_path1"),
        only_named("drop_path2"),
        all_but(nn.Dropout),
        all_but((nn.Linear, nn.LayerNorm)),
        "train",
        "eval",
    ),
    options=RATES,
)
case("rates set to nothing", lambda model: set_rates(model, 0.0), modes=ACTING, options=RATES)
case("rates raised", lambda model: set_rates(model, 0.5), modes=ACTING)
case("rates of everything", lambda model: set_rates(model, 1.0), modes=ACTING, options=RATES)
case(
    "rates as tensors", lambda model: set_rates(model, torch.tensor(0.5)), modes=ACTING, kinds=TIMM_KINDS, options=RATES
)
case("batch of one with stochastic depth", x=lambda: image(1), modes=("train",) * 6, options={"drop_path_rate": 0.6})


def set_rates(model, p):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name in ("drop_prob", "p"):
            if type(module).__name__ == "DropPath" and hasattr(module, name):
                setattr(module, name, p)
    if isinstance(model, nest_fast.NesT):
        return
    for layer in layers(model):  # timm has no module where the rate was 0
        for name in ("drop_path1", "drop_path2"):
            if isinstance(getattr(layer, name), nn.Identity):
                setattr(layer, name, timm.layers.DropPath(p).train(layer.training))


# --- attention --------------------------------------------------------------------------------------------------------

case(
    "attention without the fused form",
    manual_attention,
    modes=ACTING,
    kinds=TIMM_KINDS,
    options={"attn_drop_rate": 0.3},
)
case("attention dropout", modes=ACTING, options={"attn_drop_rate": 0.4})
case("no attention dropout to draw", manual_attention, options={"attn_drop_rate": 0.0})
case("attn.scale changed", all_of(manual_attention, each_layer(lambda layer: setattr(layer.attn, "scale", 0.7))))
case(
    "attn.scale changed, fused",  # where timm does not look at it
    each_layer(lambda layer: setattr(layer.attn, "scale", 0.7)),
    kinds=TIMM_KINDS,
)
case("num_heads changed, fused", each_layer(lambda layer: setattr(layer.attn, "num_heads", 1)), kinds=TIMM_KINDS)
case(
    "num_heads changed",
    all_of(manual_attention, each_layer(lambda layer: setattr(layer.attn, "num_heads", 1))),
    kinds=TIMM_KINDS,
)
for label, new in {
    "an identity that acts": lambda old, dim: ActingIdentity(),
    "dropout that always acts": lambda old, dim: AlwaysDropout(0.3),
    "channel dropout": lambda old, dim: nn.Sequential(nn.Dropout(0.4)),
}.items():
    case(f"{label} as attn_drop", all_of(manual_attention, replace("attn.attn_drop", new)), modes=ACTING)
case(
    "a module without a rate as attn_drop, fused",  # timm does not look at it in eval mode
    replace("attn.attn_drop", lambda old, dim: nn.Identity()),
    kinds=TIMM_KINDS,
    modes=("eval",),
)
case(
    "hooks on attn_drop give attention maps",
    all_of(
        manual_attention,
        lambda model: [listen(model, f"{LAYER}.attn.attn_drop", e) for e in ("forward", "gradient")],
    ),
)
case(
    "hooks on attn_drop, fused",
    lambda model: listen(model, f"{LAYER}.attn.attn_drop", "forward"),
    kinds=TIMM_KINDS,
)
case(
    "a hook changes attention maps",
    all_of(
        manual_attention,
        at(f"{LAYER}.attn.attn_drop", lambda m: m.register_forward_hook(lambda module, args, out: out * 0.5)),
    ),
)
case(
    "attn_drop alone in training",
    manual_attention,
    modes=(only_named("attn.attn_drop"), all_but(timm_nest.Attention), only_named("attn")),
    kinds=TIMM_KINDS,
    options={"attn_drop_rate": 0.3},
)

# --- attributes and parts of other kinds ------------------------------------------------------------------------------

case("norm.eps changed", lambda model: [setattr(m, "eps", 0.1) for m in model.modules() if hasattr(m, "eps")])
for label, new in {
    "an identity": lambda old: nn.Identity(),
    "RMSNorm": lambda old: nn.RMSNorm(old.normalized_shape),
    "LayerNorm without bias": lambda old: nn.LayerNorm(old.normalized_shape, bias=False),
    "LayerNorm without weights": lambda old: nn.LayerNorm(old.normalized_shape, elementwise_affine=False),
    "LayerNorm in float32": lambda old: timm.layers.LayerNormFp32(old.normalized_shape[0]),
    "fast LayerNorm": lambda old: _fast_norm(old),
    "LayerNorm of their own": lambda old: OwnNorm(old.normalized_shape),
    "LayerNorm of a name of its own": lambda old: NamedNorm(old.normalized_shape),
    "a simple norm": lambda old: timm.layers.SimpleNorm(old.normalized_shape[0]),
}.items():
    case(f"{label} as a layer's norms", all_of(put(f"{LAYER}.norm1", new), put(f"{LAYER}.norm2", new)))
    case(f"{label} as the pool's norm", put(f"{POOL}.norm", new), kinds=FAST)
    case(f"{label} as the last norm", put("norm", new), kinds=FAST)
case("LayerNorm over two dimensions", put(f"{LAYER}.norm1", lambda old: nn.LayerNorm((16, 64))))
case("GroupNorm over blocks", put(f"{LAYER}.norm1", lambda old: nn.GroupNorm(1, 1)))
case("a norm is another's", each_layer(lambda layer: setattr(layer, "norm2", layer.norm1)))
case("mlp.norm", replace("mlp.norm", lambda old, dim: nn.LayerNorm(dim)), kinds=TIMM_KINDS)
case("mlp.norm acts", replace("mlp.norm", lambda old, dim: ActingIdentity()), kinds=TIMM_KINDS)
case("patch_embed.norm", put("patch_embed.norm", lambda old: nn.GroupNorm(4, 32)), kinds=TIMM_KINDS)
case("patch_embed.norm of channels", put("patch_embed.norm", lambda old: timm.layers.LayerNorm2d(32)), kinds=TIMM_KINDS)


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return 0.5 * super().forward(x)


class NamedNorm(nn.LayerNorm):
    pass


def _fast_norm(old):
    norm = timm.layers.LayerNorm(old.normalized_shape[0])
    norm._fast_norm = True
    return norm


for label, new in {
    "dilated": lambda old: nn.Conv2d(32, 64, 3, padding=2, dilation=2),
    "of groups": lambda old: nn.Conv2d(32, 64, 3, padding=1, groups=2),
    "1x1": lambda old: nn.Conv2d(32, 64, 1),
    "5x5": lambda old: nn.Conv2d(32, 64, 5, padding=2),
    "without a bias": lambda old: nn.Conv2d(32, 64, 3, padding=1, bias=False),
    "circular": lambda old: nn.Conv2d(32, 64, 3, padding=1, padding_mode="circular"),
    "with padding 'same'": lambda old: nn.Conv2d(32, 64, 3, padding="same"),
    "separable": lambda old: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1)),
    "standardised": lambda old: timm.layers.StdConv2d(32, 64, 3, padding=1),
}.items():
    case(f"pool.conv {label}", put(f"{POOL}.conv", new))
case("pool.conv.dilation set", at(f"{POOL}.conv", lambda c: vars(c).update(dilation=(2, 2), padding=(2, 2))))
case("pool.conv.padding_mode set", at(f"{POOL}.conv", lambda c: vars(c).update(padding_mode="reflect")))
case("pool.conv.padding set", at(f"{POOL}.conv", lambda c: vars(c).update(padding="same")))
case(
    "seamless convolutions",  # texture generators patch this method of the instances
    at(f"{POOL}.conv", lambda c: vars(c).update(_conv_forward=_circular(c))),
)
case("seamless patch embedding", at("patch_embed.proj", lambda c: vars(c).update(_conv_forward=_doubled(c))))
for label, new in {
    "an average": lambda old: nn.AvgPool2d(2),
    "2x2": lambda old: nn.MaxPool2d(2),
    "5x5": lambda old: nn.MaxPool2d(5, 2, 2),
    "in ceil mode": lambda old: nn.MaxPool2d(3, 2, ceil_mode=True),
    "timm's SAME average": lambda old: timm.layers.AvgPool2dSame(3, 2),
    "timm's SAME maximum": lambda old: timm.layers.pool2d_same.MaxPool2dSame(3, 2),
    "a strided convolution": lambda old: nn.Conv2d(64, 64, 2, 2),
    "blurred": lambda old: nn.Sequential(nn.MaxPool2d(2, 1), timm.layers.BlurPool2d(64)),
    "of their own": lambda old: OwnPool(3, 2, 1),
    "adaptive": lambda old: nn.AdaptiveMaxPool2d(4),
}.items():
    case(f"pool.pool {label}", put(f"{POOL}.pool", new), kinds=TIMM_KINDS)
case(
    "pool.pool.kernel_size set",
    at(f"{POOL}.pool", lambda p: vars(p).update(kernel_size=2, padding=0)),
    kinds=TIMM_KINDS,
)
case(
    "pool.pool.dilation set",
    at(f"{POOL}.pool", lambda p: vars(p).update(dilation=2, padding=1, ceil_mode=True)),
    kinds=TIMM_KINDS,
)
case(
    "the stride is the convolution's",
    at(POOL, lambda p: (vars(p.conv).update(stride=(2, 2)), vars(p.pool).update(stride=1))),
    kinds=TIMM_KINDS,
)
case("pool is a strided convolution", put(POOL, lambda old: nn.Conv2d(32, 64, 2, 2)), kinds=TIMM_KINDS)
case("pool and more", put(POOL, lambda old: nn.Sequential(old, nn.BatchNorm2d(64))), kinds=TIMM_KINDS)
case("pool.norm is a batch norm", put(f"{POOL}.norm", lambda old: BatchNormLast(64)))


class OwnPool(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) * 2


class BatchNormLast(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _circular(conv):
    def forward(x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    return forward


def _doubled(conv):
    return lambda x, weight, bias: 2 * nn.Conv2d._conv_forward(conv, x, weight, bias)


for label, new in {
    "overlapping": lambda old: nn.Conv2d(3, 32, 4, 2, 1),
    "without a bias": lambda old: nn.Conv2d(3, 32, 2, 2, bias=False),
    "of their own": lambda old: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 2, 2)),
    "reflecting": lambda old: nn.Conv2d(3, 32, 4, 2, 1, padding_mode="reflect"),
    "standardised": lambda old: timm.layers.StdConv2d(3, 32, 2, 2, padding=0),
}.items():
    case(f"patch_embed.proj {label}", put("patch_embed.proj", new))
case(
    "patch_embed is a stem",
    put("patch_embed", lambda old: nn.Sequential(nn.Conv2d(3, 32, 2, 2), nn.BatchNorm2d(32))),
    kinds=TIMM_KINDS,
)
case(
    "patch_embed pads",
    at("patch_embed", lambda p: vars(p).update(dynamic_img_pad=True, img_size=None)),
    x=lambda: image(size=15),
    kinds=TIMM_KINDS,
)
case("level.block_size changed", at("levels.1", lambda level: _smaller_blocks(level)), kinds=TIMM_KINDS)
case("head is an MLP", put("head", lambda old: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))))
case("head is gone", put("head", lambda old: nn.Identity()))
case("head is reset", lambda model: model.reset_classifier(3, "max"))
case("global pooling of another kind", lambda model: setattr(model, "global_pool", _pool_max()), kinds=TIMM_KINDS)
case("head_drop acts", put("head_drop", lambda old: Scale(64)))
case("one more level", lambda model: model.levels.append(nn.Identity()), kinds=TIMM_KINDS)
case(
    "a level is gone",
    lambda model: (
        setattr(model, "levels", model.levels[:1]),
        setattr(model, "norm", nn.LayerNorm(32)),
        setattr(model, "head", nn.Linear(32, 2)),
    ),
    kinds=TIMM_KINDS,
)
case(
    "something between levels",
    lambda model: setattr(
        model, "levels", nn.Sequential(model.levels[0], nn.Conv2d(32, 32, 3, padding=1), model.levels[1])
    ),
    kinds=TIMM_KINDS,
)
case(
    "levels of a class of their own",
    lambda model: setattr(model.levels, "__class__", HalvingSequential),
    kinds=TIMM_KINDS,
)
for checkpointing in ("eval", "train"):
    case(
        f"gradient checkpointing, {checkpointing}",
        lambda model: model.set_grad_checkpointing(),
        modes=(checkpointing,),
        options=RATES,
    )


def _smaller_blocks(level):
    level.block_size = 2
    level.pos_embed = nn.Parameter(torch.randn(1, 4, 4, 64))


def _pool_max():
    return timm.layers.SelectAdaptivePool2d(pool_type="max", flatten=True)


class HalvingSequential(nn.Sequential):
    def forward(self, x):
        return 0.5 * super().forward(x)


# --- layers of other classes ------------------------------------------------------------------------------------------


class OwnAttention(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.gate * self.inner(x)


class Plain(nn.MultiheadAttention):
    def forward(self, x):
        flat = x.flatten(0, 1)
        return super().forward(flat, flat, flat, need_weights=False)[0].view_as(x)


case("attn is wrapped", replace("attn", lambda old, dim: OwnAttention(old)))
case("attn is another", replace("attn", lambda old, dim: Plain(dim, 2, batch_first=True)))
case("attn is gone", replace("attn", lambda old, dim: nn.Identity()))
case(
    "mlp is a sequence",
    replace("mlp", lambda old, dim: nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim))),
)
case("mlp is wrapped", replace("mlp", lambda old, dim: nn.Sequential(old, Scale(dim))))
case("mlp is SwiGLU", replace("mlp", lambda old, dim: timm.layers.SwiGLU(dim, 2 * dim)))
case("mlp is timm's with a norm", replace("mlp", lambda old, dim: timm.layers.Mlp(dim, 32, norm_layer=nn.LayerNorm)))
case("mlp is narrower", each_layer(lambda layer: _narrow(layer.mlp, 33)))
case("a layer is wrapped", put(LAYER, lambda old: OwnAttention(old)))
case("a layer is gone", put(LAYER, lambda old: nn.Identity()))
case("a layer comes twice", lambda model: _set_encoder(model.levels[1], [0, 0, 1]))
case("layers are dropped", lambda model: _set_encoder(model.levels[1], [1]))
case("layers share attention", lambda model: setattr(layers(model)[2], "attn", layers(model)[1].attn))
case(
    "the encoder is of a class of its own",
    at("levels.1.transformer_encoder", lambda m: setattr(m, "__class__", HalvingSequential)),
    kinds=TIMM_KINDS,
)
case("the encoder is empty", lambda model: _set_encoder(model.levels[1], []))
case(
    "the encoder is one layer",
    lambda model: setattr(model.levels[1], "transformer_encoder", layers(model)[1]),
    kinds=TIMM_KINDS,
)
case("one more step in the encoder", lambda model: model.levels[1].transformer_encoder.append(Scale(64)))


def _narrow(mlp, hidden):
    for old, new in (
        (mlp.fc1, nn.Linear(mlp.fc1.in_features, hidden)),
        (mlp.fc2, nn.Linear(hidden, mlp.fc2.out_features)),
    ):
        setattr(mlp, "fc1" if old is mlp.fc1 else "fc2", new)


def _set_encoder(level, order):
    encoder = level.transformer_encoder
    level.transformer_encoder = type(encoder)(*_arguments(encoder, [encoder[i] for i in order]))


def _arguments(encoder, chosen):
    return chosen if isinstance(encoder, nn.Sequential) else [chosen]


# --- weights that are not plain ---------------------------------------------------------------------------------------

LINEARS = [f"{LAYER}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
CONVS = [f"{POOL}.conv", "patch_embed.proj"]
NORMS = [f"{LAYER}.norm1", f"{LAYER}.norm2", f"{POOL}.norm", "norm"]
for name in LINEARS + CONVS + ["head"]:
    short = name.removeprefix("levels.1.").removeprefix("transformer_encoder.0.")
    case(f"LoRA on {short}", put(name, LoRA))
    case(
        f"parametrized {short}",
        at(name, lambda m: parametrize.register_parametrization(m, "weight", LowRank(m.weight))),
    )
for name in [LINEARS[0], LINEARS[3], *CONVS]:
    short = name.removeprefix("levels.1.").removeprefix("transformer_encoder.0.")
    case(f"pruned {short}", at(name, lambda m: prune.l1_unstructured(m, "weight", 0.5)))
    case(f"weight_norm on {short}", at(name, nn.utils.weight_norm))
    case(f"parametrized weight_norm on {short}", at(name, nn.utils.parametrizations.weight_norm))
    case(f"spectral_norm on {short}", at(name, nn.utils.spectral_norm), tolerance=1e-3)
case("parametrized spectral_norm", at(LINEARS[2], nn.utils.parametrizations.spectral_norm))
for name in [*LINEARS, *CONVS, *NORMS]:
    short = name.removeprefix("levels.1.").removeprefix("transformer_encoder.0.")
    case(
        f"parametrized bias of {short}",
        at(name, lambda m: parametrize.register_parametrization(m, "bias", Half())),
        kinds=FAST,
    )
    case(
        f"pruned bias of {short}",
        at(name, lambda m: prune.l1_unstructured(m, "bias", 0.5)),
        kinds=FAST,
    )
for name in NORMS:
    short = name.removeprefix("levels.1.").removeprefix("transformer_encoder.0.")
    case(
        f"parametrized weight of {short}", at(name, lambda m: parametrize.register_parametrization(m, "weight", Half()))
    )
for level in ("levels.0", "levels.1"):
    case(
        f"parametrized pos_embed of {level}",
        at(level, lambda m: parametrize.register_parametrization(m, "pos_embed", Half())),
    )
case(
    "parametrized, then no more",
    at(
        LINEARS[0],
        lambda m: (
            parametrize.register_parametrization(m, "weight", Half()),
            parametrize.remove_parametrizations(m, "weight"),
        ),
    ),
)


def each(names, function):
    return lambda model: [function(model.get_submodule(name)) for name in names]


def new_weight(function, name="weight"):
    """Replace a parameter by ``function(its data)``, as a parameter."""

    def change(module):
        old = getattr(module, name)
        setattr(module, name, nn.Parameter(function(old.data), requires_grad=old.requires_grad))

    return change


def computed(module):
    """A hypernetwork's weight: no parameter, set by a hook before each call."""
    weight = module.weight
    del module.weight
    module.base = nn.Parameter(weight.data)
    module.register_forward_pre_hook(lambda m, args: setattr(m, "weight", m.base * 0.5))


def buffered(module):
    weight = module.weight.data
    del module.weight
    module.register_buffer("weight", weight)


def as_int8(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8(module.weight.data), requires_grad=False)


def doubled(x):
    return x.as_subclass(Doubled)


def strided(x):
    return torch.stack([x, x + 9], -1)[..., 0]


case("linear weights that know F.linear alone", as_int8)
case("linear weights of a class of their own", each(LINEARS, new_weight(doubled)))
case("linear biases of a class of their own", each(LINEARS, new_weight(doubled, "bias")))
case("norm weights of a class of their own", each(NORMS, new_weight(doubled)))
case("convolutions' weights of a class of their own", each(CONVS, new_weight(doubled)))
case("transposed linear weights", each(LINEARS, new_weight(lambda w: w.t().contiguous().t())))
case("strided weights", each(LINEARS + CONVS + NORMS, new_weight(strided)))
case("strided biases", each(LINEARS + CONVS + NORMS, new_weight(strided, "bias")))
case(
    "expanded biases",
    each(LINEARS + CONVS + NORMS, lambda m: setattr(m.bias, "data", torch.tensor([0.3]).expand_as(m.bias))),
)
case("expanded norm weights", each(NORMS, lambda m: setattr(m.weight, "data", torch.tensor([0.3]).expand_as(m.weight))))
case("biases in one memory", each(NORMS, lambda m: setattr(m.bias, "data", m.weight.data)))
case("channels-last weights", lambda model: model.to(memory_format=torch.channels_last))
case("biases are None", each(LINEARS + CONVS + NORMS, lambda m: setattr(m, "bias", None)))
case("norm weights are None", each(NORMS, lambda m: setattr(m, "weight", None)))
case("norms without any weights", each(NORMS, lambda m: (setattr(m, "weight", None), setattr(m, "bias", None))))
case("one bias is None", at(LINEARS[1], lambda m: setattr(m, "bias", None)))
case("weights are buffers", each(LINEARS + CONVS + NORMS, buffered))
case("weights are computed by hooks", each([*LINEARS, *CONVS, *NORMS], computed))
case("everything frozen", lambda model: model.requires_grad_(False))
case("frozen but the head", lambda model: (model.requires_grad_(False), model.head.requires_grad_(True)))
case("frozen but the biases", lambda model: [p.requires_grad_("bias" in n) for n, p in model.named_parameters()])
case("frozen norms", each(NORMS, lambda m: m.requires_grad_(False)))
case("tied weights", lambda model: setattr(layers(model)[1].mlp.fc1, "weight", layers(model)[2].mlp.fc1.weight))
case("tied transposed weights", lambda model: _tie_transposed(layers(model)[1].mlp))
case("weights edited in place", each(LINEARS + CONVS, lambda m: m.weight.data.mul_(0.5)))
case("pos_embed for all blocks", at("levels.0", new_weight(lambda p: p[:, :1], "pos_embed")))
case("pos_embed for all tokens", at("levels.1", new_weight(lambda p: p[:, :, :1], "pos_embed")))
case("pos_embed of one number", each(["levels.0", "levels.1"], new_weight(lambda p: p[:, :1, :1, :1], "pos_embed")))
case(
    "pos_embed expanded",
    each(
        ["levels.0", "levels.1"], lambda m: setattr(m.pos_embed, "data", m.pos_embed.data[:, :1].expand_as(m.pos_embed))
    ),
)
case("pos_embed strided", each(["levels.0", "levels.1"], new_weight(strided, "pos_embed")))
case("pos_embed in bfloat16", each(["levels.0", "levels.1"], new_weight(lambda p: p.bfloat16(), "pos_embed")))
case("pos_embed is a buffer", each(["levels.0", "levels.1"], lambda m: _buffer_of(m, "pos_embed")))
case(
    "pos_embed is zero",
    each(["levels.0", "levels.1"], lambda m: (delattr(m, "pos_embed"), setattr(m, "pos_embed", 0.0))),
)
case("pos_embed without a batch dimension", each(["levels.0", "levels.1"], new_weight(lambda p: p[0], "pos_embed")))
case("pos_embed of a class of its own", at("levels.1", new_weight(lambda p: p.as_subclass(Named), "pos_embed")))
case("weights of a class that does nothing", each(LINEARS + CONVS + NORMS, new_weight(lambda w: w.as_subclass(Named))))


class Named(torch.Tensor):
    pass


def _buffer_of(module, name):
    value = getattr(module, name).data
    delattr(module, name)
    module.register_buffer(name, value)


def _tie_transposed(mlp):
    mlp.fc2.weight = nn.Parameter(mlp.fc1.weight.data.t())


# --- dtypes -----------------------------------------------------------------------------------------------------------


def to_dtype(model, dtype, norms=None):
    model.to(dtype)
    for module in model.modules():
        if norms and isinstance(module, nn.LayerNorm):
            module.to(norms)


def bf16():
    return image(dtype=torch.bfloat16)


case("double", lambda model: model.double(), x=lambda: image(dtype=torch.float64), options=RATES)
case("bfloat16", lambda model: to_dtype(model, torch.bfloat16), x=bf16)
case(
    "bfloat16 with norms in float32",
    lambda model: to_dtype(model, torch.bfloat16, torch.float32),
    x=bf16,
    tolerance=5e-2,
)
case(
    "float16 with norms in float32",
    lambda model: to_dtype(model, torch.float16, torch.float32),
    x=lambda: image(dtype=torch.float16),
    tolerance=5e-2,
)
case(
    "bfloat16 with the pool's norm in float32",
    lambda model: (to_dtype(model, torch.bfloat16), model.levels[1].pool.norm.float()),
    x=bf16,
)
case(
    "bfloat16 with pos_embed in float32",
    lambda model: (
        model.bfloat16(),
        model.levels[0].float(),
        model.levels[1].float(),
        model.norm.float(),
        model.head.float(),
    ),
    x=bf16,
    kinds=TIMM_KINDS,
    tolerance=5e-2,
)
case(
    "bfloat16 with a hook",
    lambda model: (to_dtype(model, torch.bfloat16), listen(model, LINEARS[2], "forward")),
    x=bf16,
    kinds=FAST,
)
case(
    "bfloat16 with a dropout",
    lambda model: to_dtype(model, torch.bfloat16),
    x=bf16,
    options={"proj_drop_rate": 0.3},
    kinds=FAST,
)
case(
    "a head in float64",
    lambda model: put("head", lambda old: nn.Sequential(ToDouble(), old.double()))(model),
    tolerance=1e-4,
)
case("autocast", Autocast, tolerance=5e-2)
case(
    "autocast with hooks",
    lambda model: ([listen(model, name, "forward") for name in (*LINEARS, *NORMS[:2], POOL)], Autocast(model))[1],
    tolerance=5e-2,
    kinds=TIMM_KINDS,
)
case(
    "autocast with norms of their own",
    lambda model: (put(f"{LAYER}.norm1", lambda old: nn.RMSNorm(64))(model), Autocast(model))[1],
    tolerance=5e-2,
)
case("autocast of a bfloat16 model", lambda model: (model.bfloat16(), Autocast(model))[1], x=bf16, tolerance=5e-2)
case("autocast switched off", lambda model: Autocast(model, enabled=False))


class ToDouble(nn.Module):
    def forward(self, x):
        return x.double()


# --- images -----------------------------------------------------------------------------------------------------------

for label, x in {
    "channels last": lambda: image().contiguous(memory_format=torch.channels_last),
    "a batch of one": lambda: image(1),
    "a batch of one, channels last": lambda: image(1).contiguous(memory_format=torch.channels_last),
    "a part of a larger image": lambda: image(size=40)[:, :, 3:35:2, 5:21],
    "one image expanded": lambda: image(1).expand(3, -1, -1, -1),
    "grey expanded": lambda: image()[:, :1].expand(-1, 3, -1, -1),
    "width before height": lambda: image().transpose(2, 3),
    "channels in steps": lambda: torch.cat([image(), image()], 1)[:, ::2],
    "non-finite values": lambda: image().index_fill(0, torch.tensor([0]), torch.inf),
}.items():
    case(f"images: {label}", x=x, kinds=FAST, backward=label != "non-finite values")
    case(
        f"images with a hook: {label}",
        lambda model: listen(model, POOL, "forward", torch.Tensor.contiguous),
        x=x,
        kinds=("accelerated after",),
        backward=label != "non-finite values",
    )

# --- hooks that act ---------------------------------------------------------------------------------------------------


def view_flat(module, args, out):
    out.view(len(out), -1)


case(
    "hooks that view outputs flat",
    each(["patch_embed", "patch_embed.proj", *LINEARS], lambda m: m.register_forward_hook(view_flat)),
)
case(
    "a hook changes outputs",
    each([*LINEARS, *CONVS, *NORMS], lambda m: m.register_forward_hook(lambda module, args, out: out * 0.7)),
)
case(
    "a hook changes inputs",
    each([*LINEARS, *CONVS, *NORMS], lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 0.7,))),
)
case(
    "a hook changes outputs in place",
    each([*LINEARS, *CONVS], lambda m: m.register_forward_hook(lambda module, args, out: out.add_(0.3))),
)
case(
    "a hook changes a block's output in place",
    each(
        [LAYER, f"{LAYER}.attn", f"{LAYER}.mlp", "levels.0", "levels.1", "patch_embed"],
        lambda m: m.register_forward_hook(lambda module, args, out: out.mul_(0.5)),
    ),
    kinds=FAST,
)
case(
    "a hook changes outputs of levels and pool",
    each(
        ["levels.0", "patch_embed", "levels.1"], lambda m: m.register_forward_hook(lambda module, args, out: 0.7 * out)
    ),
)
case(
    "a hook makes outputs contiguous",
    each(
        ["levels.0", POOL, "patch_embed"], lambda m: m.register_forward_hook(lambda module, args, out: out.contiguous())
    ),
    kinds=TIMM_KINDS,
    x=lambda: image(1),
)
case(
    "a hook gives channels last",
    each(
        ["levels.0", POOL, "patch_embed"],
        lambda m: m.register_forward_hook(lambda module, args, out: out.contiguous(memory_format=torch.channels_last)),
    ),
    kinds=TIMM_KINDS,
    x=lambda: image(1),
)
case(
    "a hook changes gradients",
    each(
        [*LINEARS, *CONVS, *NORMS],
        lambda m: m.register_full_backward_hook(
            lambda module, grads, outs: tuple(g if g is None else g * 0.7 for g in grads)
        ),
    ),
)
case(
    "a hook changes gradients before",
    each(
        [*LINEARS, *CONVS, *NORMS],
        lambda m: m.register_full_backward_pre_hook(lambda module, outs: tuple(g * 0.7 for g in outs)),
    ),
)
case(
    "hooks on outputs' gradients",
    each(
        [*LINEARS, f"{LAYER}.mlp.act", f"{LAYER}.drop_path1"],
        lambda m: m.register_forward_hook(hook_gradient),
    ),
)
case("hooks on parameters' gradients", lambda model: [p.register_hook(lambda g: g * 0.7) for p in model.parameters()])
case("a hook inside registers another", lambda model: _late_hook(model))
case("a hook changes another module's rate", lambda model: _late_rate(model))
case(
    "a hook changes another module's mode",
    at(
        "levels.0",
        lambda m: m.register_forward_hook(
            lambda module, args, out: module.transformer_encoder[0].mlp.drop1.train() and None
        ),
    ),
    options=RATES,
    modes=("eval", "eval"),
)
case("a hook exchanges a part", lambda model: _late_part(model))
case("weights are brought in by hooks", lambda model: _offload(model))
case("weights are brought in around forward", lambda model: _offload_forward(model))


def hook_gradient(module, args, out):
    if out.requires_grad:
        out.register_hook(lambda g: g * 0.7)


def _late_hook(model):
    model.calls = []
    handles = []

    def register(module, args):
        while handles:
            handles.pop().remove()
        handles.append(listen(model, LINEARS[2], "forward"))

    model.get_submodule("levels.0").register_forward_pre_hook(register)
    # and one for the second half of the layer that is computing its first
    half = []

    def second(module, args, out):
        while half:
            half.pop().remove()
        half.append(listen(model, f"{LAYER}.mlp.fc2", "forward"))

    model.get_submodule(f"{LAYER}.attn.proj").register_forward_hook(second)


def _late_rate(model):
    dropout = model.get_submodule(f"{LAYER}.mlp.drop2")
    model.get_submodule("levels.0").register_forward_pre_hook(lambda module, args: setattr(dropout, "p", 0.5))
    model.get_submodule("levels.0").register_forward_hook(lambda module, args, out: dropout.train() and None)


def _late_part(model):
    layer = model.get_submodule(LAYER)
    torch.manual_seed(5)
    new = nn.Linear(64, 256)
    model.get_submodule("levels.0").register_forward_hook(lambda module, args, out: setattr(layer.mlp, "fc1", new))


def _load(module, weights):
    for name, value in weights.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _offload(model):
    """Weights are on the meta device but while their module runs."""
    for module in model.modules():
        weights = {name: p.data for name, p in module._parameters.items() if p is not None}
        if not weights or hasattr(module, "pos_embed"):
            continue
        empty = {name: value.to("meta") for name, value in weights.items()}
        _load(module, empty)
        module.register_forward_pre_hook(lambda m, args, weights=weights: _load(m, weights))
        module.register_forward_hook(lambda m, args, out, empty=empty: _load(m, empty))


def _offload_forward(model):
    """The same around the instance's forward, as Hugging Face's accelerate has it."""
    for module in model.modules():
        weights = {name: p.data for name, p in module._parameters.items() if p is not None}
        if not weights or hasattr(module, "pos_embed"):
            continue
        empty = {name: value.to("meta") for name, value in weights.items()}
        _load(module, empty)

        def forward(*args, module=module, weights=weights, empty=empty, inner=module.forward):
            _load(module, weights)
            try:
                return inner(*args)
            finally:
                _load(module, empty)

        module.forward = forward


# --- what acts in the model's own methods -----------------------------------------------------------------------------

case("forward_features patched", lambda model: setattr(model, "forward_features", _scaled(model.forward_features)))
case("forward_head patched", lambda model: setattr(model, "forward_head", _scaled(model.forward_head)))
case(
    "the model's class is derived",
    lambda model: setattr(
        model,
        "__class__",
        type("Mine", (type(model),), {"forward_head": lambda self, x, pre_logits=False: x.mean((2, 3))}),
    ),
)
case(
    "the model's features are derived",
    lambda model: setattr(
        model,
        "__class__",
        type(
            "Mine",
            (type(model),),
            {"forward_features": lambda self, x: 0.5 * type(self).__mro__[1].forward_features(self, x)},
        ),
    ),
)
case(
    "the model's class is derived and nothing else",
    lambda model: setattr(model, "__class__", type("Mine", (type(model),), {})),
)


def _scaled(function):
    return lambda *args, **kwargs: 0.5 * function(*args, **kwargs)


# --- the table is run -------------------------------------------------------------------------------------------------


def kinds_of(number, case):
    """All, but of "before" and "after" one by turn: which it was makes no difference to what is computed.

    Each rule has many cases, and test_user_actions.py accelerates and restores between any two changes.
    """
    return [kind for kind in case.kinds if kind != TIMM_KINDS[number % 2] or not set(TIMM_KINDS) <= set(case.kinds)]


@pytest.mark.parametrize(
    ("case", "kinds"), [pytest.param(case, kinds_of(n, case), id=case.name) for n, case in enumerate(CASES)]
)
def test_whatever_is_changed_is_computed(case, kinds):
    def done(kind):
        return runs(twin(kind, case.change, **case.options), case.x(), case.modes, case.backward)

    expected = done("plain")
    for kind in kinds:
        for mode, mine, theirs in zip(case.modes, done(kind), expected, strict=True):
            assert_same_run(
                mine,
                theirs,
                layout=kind != "NesT",
                tolerance=case.tolerance,
                draws=case.draws,
                where=f"{kind}, {mode_name(mode)}: ",
            )
