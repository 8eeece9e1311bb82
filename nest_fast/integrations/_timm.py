"""What fusion knows of the layers that timm's families of models share."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import Tensor, nn

from nest_fast import fusion
from nest_fast.ops import windows

__all__ = [
    "ATTENTION_PARTS",
    "ATTENTION_RULES",
    "KNOWN",
    "KNOWN_BIASES",
    "PLAIN_PARTS",
    "POSITION_BIAS",
    "in_windows",
    "layer_scale",
    "options",
    "partitioned",
    "position_bias",
    "scale",
    "shifting",
]

KNOWN: fusion.Known = {
    **fusion.TORCH,
    timm.layers.LayerNorm: fusion.as_written(
        "norm",
        timm.layers.LayerNorm,
        rules=(*fusion.NORM_RULES, ("{name} is timm's fast norm", lambda m, x: m._fast_norm)),
    ),
    timm.layers.GELU: fusion.as_written("gelu", timm.layers.GELU),
    timm.layers.GELUTanh: fusion.as_written("gelu_tanh", timm.layers.GELUTanh),
    timm.layers.DropPath: fusion.as_written("drop_path", timm.layers.DropPath, rate="drop_prob"),
    timm.layers.Mlp: fusion.as_written("mlp", timm.layers.Mlp, parts=(*fusion.MLP_PARTS, ("norm", fusion.IDENTITY))),
}

# For a class of attention: timm's drops weights by the mode of the attention, not by that of its dropout.
ATTENTION_RULES: fusion.Rules = (
    ("{name}'s attention drops", lambda m, x: m.training and getattr(m.attn_drop, "p", 1.0) != 0.0),
)
# The modules of an attention without dropouts, and of one with them; width is changed where heads are pruned.
PLAIN_PARTS = (("qkv", fusion.QKV), ("proj", fusion.LINEAR))
ATTENTION_PARTS = (*PLAIN_PARTS, ("attn_drop", fusion.SILENT), ("proj_drop", fusion.SILENT))


def layer_scale(cls: type) -> fusion.Written:
    """A class of LayerScale, of which versions of timm have several."""
    return fusion.as_written(
        "layer_scale",
        cls,
        rules=(
            (
                "{name}'s gamma is no ordinary tensor, or has another dtype than its input",
                lambda m, x: fusion.is_other(m, "gamma", x),
            ),
        ),
    )


def scale(attn: Any) -> float | None:
    """timm's fused attention has a scale of its own."""
    return None if attn.fused_attn else attn.scale


def options(attn: Any) -> fusion.Attention:
    """What an attention computes that has its heads one behind the other."""
    return fusion.Attention(attn.num_heads, scale(attn))


# --- layers that shift their windows, of both of timm's Swins ---------------------------------------------------------


def shifting(fast: type, theirs: type) -> fusion.Written:
    """A class of layers that attend in shifted windows, and what it stands for."""
    return fusion.as_written(
        "layer",
        fast,
        theirs,
        methods=("forward", "_attn", "get_attn_mask"),
        rules=(
            (
                "{name} shifts its windows and has no mask",
                lambda m, x: any(m.shift_size) and not _makes_masks(m) and m.attn_mask is None,
            ),
        ),
    )


def in_windows(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, layer: Any, **attention: Any) -> Tensor:
    """The attention of such a layer: ``(B, H, W, C)`` → the same."""
    own = windows((x.shape[1], x.shape[2]), layer.window_size, shift=layer.shift_size)
    mask = None if _makes_masks(layer) else layer.attn_mask  # the operation makes the same as timm would
    return fusion.attention(x.flatten(1, 2), half, branch_scale, windows=own, mask=mask, **attention).view(x.shape)


def _makes_masks(layer: Any) -> bool:
    return getattr(layer, "dynamic_mask", False)


# --- layers that attend in the windows that an image is cut into, of timm's MaxViT and GCViT --------------------------


def _drops(bias: Any) -> bool:
    """Whether random numbers are drawn for a bias, which stochastic depth would draw before."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p != 0.0 for m in bias.modules())


def _bias(cls: type, rules: fusion.Rules = ()) -> fusion.Written:
    return fusion.as_written("bias", cls, rules=rules)


_TABLE: fusion.Rules = (
    (
        "{name}'s table is no ordinary tensor, or has another dtype",
        lambda m, x: fusion.is_other(m, "relative_position_bias_table", x),
    ),
)
KNOWN_BIASES: fusion.Known = {
    timm.layers.RelPosBias: _bias(timm.layers.RelPosBias, _TABLE),
    timm.layers.RelPosBiasTf: _bias(timm.layers.RelPosBiasTf, _TABLE),
    timm.layers.RelPosMlp: _bias(timm.layers.RelPosMlp, (("{name} drops", lambda m, x: _drops(m)),)),
}
POSITION_BIAS = fusion.Place(("bias",), optional=True)


def position_bias(attn: Any) -> Tensor | None:
    """``(heads, N, N)``, as its module makes it."""
    return None if attn.rel_pos is None else attn.rel_pos.get_bias().flatten(0, -3)


def partitioned(fast: type, theirs: type, method: str, window: str) -> fusion.Written:
    """A class of such layers and what it stands for: its ``method`` attends, its ``window`` has the size of one."""

    def does_not_divide(layer: Any, x: Tensor) -> bool:
        h, w = getattr(layer, window)
        return x.shape[1] % h != 0 or x.shape[2] % w != 0

    return fusion.as_written(
        "layer",
        fast,
        theirs,
        methods=("forward", method),
        rules=(("the windows of {name} do not divide its image", does_not_divide),),
    )
