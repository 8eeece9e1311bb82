"""What fusion knows of the layers that timm's families of models share."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import Tensor

from nest_fast import fusion
from nest_fast.ops import windows

__all__ = [
    "ATTENTION_PARTS",
    "ATTENTION_RULES",
    "KNOWN",
    "PLAIN_PARTS",
    "in_windows",
    "layer_scale",
    "options",
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
            ("a method of {name} was patched", lambda m, x: "_attn" in m.__dict__ or "get_attn_mask" in m.__dict__),
            (
                "{name} shifts its windows and has no mask",
                lambda m, x: any(m.shift_size) and not _makes_masks(m) and m.attn_mask is None,
            ),
        ),
    )


def in_windows(x: Tensor, half: fusion.Half, branch_scale: float, layer: Any, **attention: Any) -> Tensor:
    """The attention of such a layer: ``(B, H, W, C)`` → the same."""
    own = windows((x.shape[1], x.shape[2]), layer.window_size, shift=layer.shift_size)
    mask = None if _makes_masks(layer) else layer.attn_mask  # the operation makes the same as timm would
    return fusion.attention(x.flatten(1, 2), half, branch_scale, windows=own, mask=mask, **attention).view(x.shape)


def _makes_masks(layer: Any) -> bool:
    return getattr(layer, "dynamic_mask", False)
