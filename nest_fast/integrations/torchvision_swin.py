"""torchvision's Swin and Swin v2: attention in windows, shifted in every other layer, with a relative position bias.

Images are padded before they are shifted, and a window that reaches over a whole edge is not shifted there.

Source: torchvision/models/swin_transformer.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torchvision.models.swin_transformer as torchvision_swin
from torch import Tensor
from torchvision.ops.misc import MLP

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._swin import cosine_scale
from nest_fast.integrations._torchvision import KNOWN
from nest_fast.ops import windows

__all__ = ["ADAPTER"]

_NAMES = ("norm1", "attn", "", "stochastic_depth"), ("norm2", "mlp", "", "stochastic_depth")


class SwinTransformerBlock(Fast, torchvision_swin.SwinTransformerBlock):
    @instead_of(torchvision_swin.SwinTransformerBlock)
    def forward(self, x: Tensor) -> Tensor:
        return fusion.run(x, _halves(self))


class SwinTransformerBlockV2(Fast, torchvision_swin.SwinTransformerBlockV2):
    @instead_of(torchvision_swin.SwinTransformerBlockV2)
    def forward(self, x: Tensor) -> Tensor:
        return fusion.run(x, _halves_v2(self))


def _halves(layer: Any) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, _NAMES, operation=_attention)


def _halves_v2(layer: Any) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, _NAMES, post_norm=True, operation=_attention)


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale) -> Tensor:
    attn = half.body
    size, (h, w), (down, right) = (x.shape[1], x.shape[2]), attn.window_size, attn.shift_size
    own = windows(size, (h, w), shift=(0 if h >= size[0] else down, 0 if w >= size[1] else right), pad_first=True)
    by_cosines = {} if "logit_scale" not in attn._parameters else _by_cosines(attn)
    bias = attn.get_relative_position_bias().squeeze(0)
    return fusion.attention(x.flatten(1, 2), half, branch_scale, windows=own, bias=bias, **by_cosines).view(x.shape)


def _by_cosines(attn: Any) -> dict[str, Any]:
    """Swin v2's: k has no bias, whatever is in its place."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if bias is not None:
        q, k, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(k), v))
    return {"qkv": (weight, bias), "cosine_scale": cosine_scale(attn.logit_scale)}


# --- what fusion knows of torchvision's classes -----------------------------------------------------------------------


def _functions() -> tuple:
    return torchvision_swin.shifted_window_attention, torchvision_swin._get_relative_position_bias


_FUNCTIONS = _functions()
_ATTENTION: dict[str, Any] = {
    "methods": ("forward", "get_relative_position_bias"),
    "parts": (("qkv", fusion.QKV), ("proj", fusion.LINEAR)),
    "options": lambda attn: fusion.Attention(attn.num_heads),
}
_ATTENTION_RULES: fusion.Rules = (
    ("{name} drops", lambda m, x: m.training and (m.attention_dropout != 0.0 or m.dropout != 0.0)),
    ("a function of torchvision's Swin was patched", lambda m, x: _functions() != _FUNCTIONS),
)

_KNOWN: fusion.Known = {
    **KNOWN,
    MLP: fusion.as_written(
        "mlp",
        MLP,
        rules=(("{name} is no MLP of two linear layers", lambda m, x: len(m) != 5),),
        parts=tuple((str(at), place) for at, (_, place) in enumerate(fusion.MLP_PARTS)),
    ),
    torchvision_swin.ShiftedWindowAttention: fusion.as_written(
        "attention",
        torchvision_swin.ShiftedWindowAttention,
        rules=(
            *_ATTENTION_RULES,
            (
                "{name}'s table of the bias is no ordinary tensor, or has another dtype",
                lambda m, x: fusion.is_other(m, "relative_position_bias_table", x),
            ),
        ),
        **_ATTENTION,
    ),
    torchvision_swin.ShiftedWindowAttentionV2: fusion.as_written(
        "attention",
        torchvision_swin.ShiftedWindowAttentionV2,
        rules=(
            *_ATTENTION_RULES,
            (
                "{name}'s scale is no ordinary tensor, or has another dtype",
                lambda m, x: fusion.is_other(m, "logit_scale", x),
            ),
        ),
        **_ATTENTION,
    ),
    SwinTransformerBlock: fusion.as_written("layer", SwinTransformerBlock, torchvision_swin.SwinTransformerBlock),
    SwinTransformerBlockV2: fusion.as_written("layer", SwinTransformerBlockV2, torchvision_swin.SwinTransformerBlockV2),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, math.prod(getattr(layer.attn, "window_size", (1, 1)))


ADAPTER = Adapter(
    classes=(SwinTransformerBlock, SwinTransformerBlockV2),
    known=_KNOWN,
    told={
        SwinTransformerBlock: partial(tell_layer, halves=_halves, blocks=_blocks, windowed=True),
        SwinTransformerBlockV2: partial(tell_layer, halves=_halves_v2, blocks=_blocks, windowed=True),
    },
)
