"""timm's GCViT: attention in windows with a relative position bias; every other layer's queries are of the whole image.

Those are the same in all windows, and such attention is called as it is.

Source: timm/models/gcvit.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.gcvit as timm_gcvit
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import (
    ATTENTION_PARTS,
    KNOWN,
    KNOWN_BIASES,
    POSITION_BIAS,
    layer_scale,
    partitioned,
    position_bias,
)
from nest_fast.ops import windows

__all__ = ["ADAPTER"]


class GlobalContextVitBlock(Fast, timm_gcvit.GlobalContextVitBlock):
    @instead_of(timm_gcvit.GlobalContextVitBlock)
    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if fusion.flags(x, "the layer", self, _KNOWN[GlobalContextVitBlock]):
            return timm_gcvit.GlobalContextVitBlock.forward(self, x, q_global)
        return fusion.run_on_image(x, _halves(self, q_global))


def _halves(layer: Any, q_global: Tensor | None = None) -> list[fusion.Half]:
    call, operation = partial(_called, layer, q_global), partial(_attention, layer=layer)
    return fusion.halves(layer, _KNOWN, names=fusion.SCALED_HALVES, call=call, operation=operation)


def _called(layer: Any, q_global: Tensor | None, x: Tensor) -> Tensor:
    return layer.drop_path1(layer.ls1(layer._window_attn(layer.norm1(x), q_global)))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any) -> Tensor:
    own = windows((x.shape[1], x.shape[2]), layer.window_size)
    bias = position_bias(half.body)
    return fusion.attention(x.flatten(1, 2), half, branch_scale, windows=own, bias=bias).view(x.shape)


_KNOWN: fusion.Known = {
    **KNOWN,
    **KNOWN_BIASES,
    timm_gcvit.LayerScale: layer_scale(timm_gcvit.LayerScale),
    timm_gcvit.WindowAttentionGlobal: fusion.as_written(
        "attention",
        timm_gcvit.WindowAttentionGlobal,
        rules=(("{name} has queries of the whole image", lambda m, x: m.use_global),),
        parts=(*ATTENTION_PARTS, ("rel_pos", POSITION_BIAS)),
        options=lambda attn: fusion.Attention(attn.num_heads, attn.scale),
    ),
    GlobalContextVitBlock: partitioned(
        GlobalContextVitBlock, timm_gcvit.GlobalContextVitBlock, "_window_attn", "window_size"
    ),
}


def _blocks(layer: Any) -> tuple[int, int]:
    height, width = layer.window_size
    return 1, height * width


ADAPTER = Adapter(
    classes=(GlobalContextVitBlock,),
    known=_KNOWN,
    told={GlobalContextVitBlock: partial(tell_layer, halves=_halves, blocks=_blocks, windowed=True)},
)
