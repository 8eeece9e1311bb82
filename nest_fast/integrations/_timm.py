"""What fusion knows of the layers that timm's families of models share."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import Tensor

from nest_fast import fusion
from nest_fast.fusion import TENSORS

__all__ = ["ATTENTION_PARTS", "ATTENTION_RULES", "KNOWN", "PLAIN_PARTS", "is_other", "layer_scale", "options", "scale"]

KNOWN: fusion.Known = {
    **fusion.TORCH,
    timm.layers.LayerNorm: fusion.as_written(
        "norm",
        timm.layers.LayerNorm,
        rules=(*fusion.NORM_RULES, ("{name} is timm's fast norm", lambda m, x: m._fast_norm)),
    ),
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
                lambda m, x: is_other(m, "gamma", x),
            ),
        ),
    )


def is_other(module: Any, name: str, x: Tensor) -> bool:
    """Whether the parameter ``name`` is no ordinary tensor, or has another dtype than ``x``."""
    parameter = module._parameters.get(name)
    return type(parameter) not in TENSORS or parameter.dtype != x.dtype


def scale(attn: Any) -> float | None:
    """timm's fused attention has a scale of its own."""
    return None if attn.fused_attn else attn.scale


def options(attn: Any) -> fusion.Attention:
    """What an attention computes that has its heads one behind the other."""
    return fusion.Attention(attn.num_heads, scale(attn))
