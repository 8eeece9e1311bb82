"""timm's Swin: attention in windows with a bias, shifted in every other layer.

What ``set_input_size`` changes, the sizes, the shift, the table of the bias and the mask, is read in every call.

Source: timm/models/swin_transformer.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.swin_transformer as timm_swin
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import (
    ATTENTION_PARTS,
    ATTENTION_RULES,
    KNOWN,
    in_windows,
    options,
    shifting,
)

__all__ = ["ADAPTER"]


class SwinTransformerBlock(Fast, timm_swin.SwinTransformerBlock):
    @instead_of(timm_swin.SwinTransformerBlock)
    def forward(self, x: Tensor) -> Tensor:
        if fusion.flags(x, "the layer", self, _KNOWN[SwinTransformerBlock]):
            return timm_swin.SwinTransformerBlock.forward(self, x)
        return fusion.run_on_image(x, _halves(self))


def _halves(layer: Any) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, call=partial(_called, layer), operation=partial(_attention, layer=layer))


def _called(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path1(layer._attn(layer.norm1(x)))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any) -> Tensor:
    return in_windows(x, half, branch_scale, layer, bias=half.body._get_rel_pos_bias().squeeze(0))


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_swin.WindowAttention: fusion.as_written(
        "attention",
        timm_swin.WindowAttention,
        methods=("forward", "_get_rel_pos_bias"),
        rules=(
            *ATTENTION_RULES,
            (
                "{name}'s table of the bias is no ordinary tensor, or has another dtype",
                lambda m, x: fusion.is_other(m, "relative_position_bias_table", x),
            ),
        ),
        parts=(*ATTENTION_PARTS, ("softmax", fusion.SOFTMAX)),
        options=options,
    ),
    SwinTransformerBlock: shifting(SwinTransformerBlock, timm_swin.SwinTransformerBlock),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, layer.window_area


ADAPTER = Adapter(
    classes=(SwinTransformerBlock,),
    known=_KNOWN,
    told={SwinTransformerBlock: partial(tell_layer, halves=_halves, blocks=_blocks, windowed=True)},
)
