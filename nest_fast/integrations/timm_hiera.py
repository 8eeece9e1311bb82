"""timm's Hiera: attention in mask units, whose tokens lie apart, or in all tokens. Source: timm/models/hiera.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.hiera as timm_hiera
import torch
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import KNOWN, PLAIN_PARTS, layer_scale, scale
from nest_fast.ops import windows

__all__ = ["ADAPTER"]


class HieraBlock(Fast, timm_hiera.HieraBlock):
    @instead_of(timm_hiera.HieraBlock)
    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = _halves(self)
        x = _expanded(self, x) if self.do_expand else fusion.run(x, [attention])
        return fusion.run(x, [mlp])


def _halves(layer: Any) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, names=fusion.SCALED_HALVES, operation=_attention)


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale) -> Tensor:
    attn = half.body
    if not attn.use_mask_unit_attn:
        return fusion.attention(x.unsqueeze(1), half, branch_scale).squeeze(1)
    # Token n of unit t is row n * units + t: those of a grid in an image of one column.
    tokens, units = x.shape[1], x.shape[1] // attn.window_size
    return fusion.attention(x, half, branch_scale, windows=windows((tokens, 1), (tokens // units, 1), grid=True))


def _expanded(layer: Any, x: Tensor) -> Tensor:
    """The attention that makes a stage wider, as timm writes it."""
    y = layer.norm1(x)
    if layer.proj is not None:
        x = layer.proj(y).unflatten(1, (layer.attn.q_stride, -1)).amax(1)
    else:
        pooled = x.unflatten(1, (layer.attn.q_stride, -1))
        x = torch.cat((pooled.amax(1), pooled.mean(1)), -1)
    return x + layer.drop_path1(layer.ls1(layer.attn(y)))


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_hiera.LayerScale: layer_scale(timm_hiera.LayerScale),
    timm_hiera.MaskUnitAttention: fusion.as_written(
        "attention",
        timm_hiera.MaskUnitAttention,
        rules=(
            ("{name} makes the stage wider", lambda m, x: m.dim != m.dim_out),
            ("{name} pools its queries", lambda m, x: m.q_stride != 1),
        ),
        parts=PLAIN_PARTS,
        options=lambda attn: fusion.Attention(attn.heads, scale(attn)),
    ),
    HieraBlock: fusion.as_written("layer", HieraBlock, timm_hiera.HieraBlock),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, getattr(layer.attn, "window_size", 1)


ADAPTER = Adapter(
    classes=(HieraBlock,), known=_KNOWN, told={HieraBlock: partial(tell_layer, halves=_halves, blocks=_blocks)}
)
