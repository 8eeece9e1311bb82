"""timm's MaxViT: attention in windows, then in grids of tokens that lie apart, with a relative position bias.

Attention in NCHW layout, and that of CoAtNet over all of an image, are other classes, and left as they are.

Source: timm/models/maxxvit.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.models.maxxvit as timm_maxvit
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import (
    ATTENTION_PARTS,
    ATTENTION_RULES,
    KNOWN,
    KNOWN_BIASES,
    POSITION_BIAS,
    layer_scale,
    options,
    partitioned,
    position_bias,
)
from nest_fast.ops import windows

__all__ = ["ADAPTER"]


class PartitionAttentionCl(Fast, timm_maxvit.PartitionAttentionCl):
    @instead_of(timm_maxvit.PartitionAttentionCl)
    def forward(self, x: Tensor) -> Tensor:
        if fusion.flags(x, "the layer", self, _KNOWN[PartitionAttentionCl]):
            return timm_maxvit.PartitionAttentionCl.forward(self, x)
        return fusion.run_on_image(x, _halves(self))


def _halves(layer: Any) -> list[fusion.Half]:
    call, operation = partial(_called, layer), partial(_attention, layer=layer)
    return fusion.halves(layer, _KNOWN, names=fusion.SCALED_HALVES, call=call, operation=operation)


def _called(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path1(layer.ls1(layer._partition_attn(layer.norm1(x))))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any) -> Tensor:
    attn = half.body
    own = windows((x.shape[1], x.shape[2]), layer.partition_size, grid=not layer.partition_block)
    qkv = _qkv_major(attn) if attn.head_first else None
    y = fusion.attention(x.flatten(1, 2), half, branch_scale, qkv=qkv, windows=own, bias=position_bias(attn))
    return y.view(x.shape)


def _qkv_major(attn: Any) -> tuple[Callable[[], Tensor], Tensor | None]:
    """What makes the weight, and the bias, of q, k and v, each of all heads, where each head has its own three."""

    def sorted_(x: Tensor) -> Tensor:
        return x.unflatten(0, (attn.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    return lambda: sorted_(attn.qkv.weight), None if attn.qkv.bias is None else sorted_(attn.qkv.bias)


_KNOWN: fusion.Known = {
    **KNOWN,
    **KNOWN_BIASES,
    timm_maxvit.LayerScale: layer_scale(timm_maxvit.LayerScale),
    timm_maxvit.AttentionCl: fusion.as_written(
        "attention",
        timm_maxvit.AttentionCl,
        rules=ATTENTION_RULES,
        parts=(*ATTENTION_PARTS, ("rel_pos", POSITION_BIAS)),
        options=options,
    ),
    PartitionAttentionCl: partitioned(
        PartitionAttentionCl, timm_maxvit.PartitionAttentionCl, "_partition_attn", "partition_size"
    ),
}


def _blocks(layer: Any) -> tuple[int, int]:
    height, width = layer.partition_size
    return 1, height * width


ADAPTER = Adapter(
    classes=(PartitionAttentionCl,),
    known=_KNOWN,
    told={PartitionAttentionCl: partial(tell_layer, halves=_halves, blocks=_blocks, windowed=True)},
)
