"""timm's Swin v2: attention by cosines in windows, with a bias that a small network computes, and norms that come last.

What ``set_input_size`` changes, the sizes, the shift, the coordinates of the bias and the mask, is read in every call.

Source: timm/models/swin_transformer_v2.py; Liu et al., "Swin Transformer V2", CVPR 2022 (arXiv 2111.09883).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.swin_transformer_v2 as timm_swin
import torch
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._swin import cosine_scale
from nest_fast.integrations._timm import ATTENTION_PARTS, ATTENTION_RULES, KNOWN, in_windows, shifting

__all__ = ["ADAPTER"]


class SwinTransformerV2Block(Fast, timm_swin.SwinTransformerV2Block):
    @instead_of(timm_swin.SwinTransformerV2Block)
    def forward(self, x: Tensor) -> Tensor:
        if fusion.flags(x, "the layer", self, _KNOWN[SwinTransformerV2Block]):
            return timm_swin.SwinTransformerV2Block.forward(self, x)
        return fusion.run_on_image(x, _halves(self))


def _halves(layer: Any) -> list[fusion.Half]:
    call, operation = partial(_called, layer), partial(_attention, layer=layer)
    return fusion.halves(layer, _KNOWN, post_norm=True, call=call, operation=operation)


def _called(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path1(layer.norm1(layer._attn(x)))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any) -> Tensor:
    attn = half.body
    scale = cosine_scale(attn.logit_scale)
    return in_windows(x, half, branch_scale, layer, qkv=_qkv(attn), cosine_scale=scale, bias=_bias(attn))


def _qkv(attn: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = attn.qkv.weight, attn.qkv.bias
    return weight, bias if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def _bias(attn: Any) -> Tensor:
    """``(heads, N, N)``, where the network is called as it is."""
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
    return table[attn.relative_position_index].permute(2, 0, 1)


def _has_strange_parameters(attn: Any, x: Tensor) -> bool:
    names = ("logit_scale",) if attn.q_bias is None else ("logit_scale", "q_bias", "v_bias")
    return any(fusion.is_other(attn, name, x) for name in names)


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_swin.WindowAttention: fusion.as_written(
        "attention",
        timm_swin.WindowAttention,
        rules=(
            *ATTENTION_RULES,
            ("{name}'s scale or biases are no ordinary tensors, or have another dtype", _has_strange_parameters),
            (
                "{name} has two biases of q, k and v",
                lambda m, x: m.q_bias is not None and getattr(m.qkv, "bias", None) is not None,
            ),
        ),
        parts=(*ATTENTION_PARTS, ("softmax", fusion.SOFTMAX)),
        options=lambda attn: fusion.Attention(attn.num_heads),
    ),
    SwinTransformerV2Block: shifting(SwinTransformerV2Block, timm_swin.SwinTransformerV2Block),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, layer.window_area


ADAPTER = Adapter(
    classes=(SwinTransformerV2Block,),
    known=_KNOWN,
    told={SwinTransformerV2Block: partial(tell_layer, halves=_halves, blocks=_blocks, windowed=True)},
)
