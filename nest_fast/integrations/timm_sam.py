"""timm's SAM encoder: attention in windows, and in the whole image in some layers, with relative positions.

Source: timm/models/vision_transformer_sam.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.vision_transformer_sam as timm_sam
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations import _sam
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import ATTENTION_PARTS, ATTENTION_RULES, KNOWN, layer_scale, options

__all__ = ["ADAPTER"]


class Block(Fast, timm_sam.Block):
    @instead_of(timm_sam.Block)
    def forward(self, x: Tensor) -> Tensor:
        return fusion.run_on_image(x, _halves(self))


def _halves(layer: Any) -> list[fusion.Half]:
    place = _PATH_OF_WINDOWS if layer.window_size > 0 else fusion.PATH
    operation = partial(_sam.attention, window=layer.window_size, embedding=timm_sam.get_rel_pos)
    return fusion.halves(
        layer, _KNOWN, names=fusion.SCALED_HALVES, path_place=place, call=partial(_called, layer), operation=operation
    )


def _called(layer: Any, x: Tensor) -> Tensor:
    y = layer.norm1(x)
    if layer.window_size == 0:
        return layer.drop_path1(layer.ls1(layer.attn(y)))
    y, padded = timm_sam.window_partition(y, layer.window_size)
    y = layer.drop_path1(layer.ls1(layer.attn(y)))
    return timm_sam.window_unpartition(y, layer.window_size, (x.shape[1], x.shape[2]), padded)


# --- what fusion knows of timm's classes ------------------------------------------------------------------------------

_PATH_OF_WINDOWS = fusion.Place(
    fusion.PATH.roles,
    (("{name} drops windows, not samples", lambda m, x: m.training and getattr(m, "drop_prob", 0.0) != 0.0),),
)


def _functions() -> tuple:
    return timm_sam.get_rel_pos, timm_sam.get_decomposed_rel_pos_bias, timm_sam.window_partition


_FUNCTIONS = _functions()

_KNOWN: fusion.Known = {
    **KNOWN,
    timm_sam.LayerScale: layer_scale(timm_sam.LayerScale),
    timm_sam.Attention: fusion.as_written(
        "attention",
        timm_sam.Attention,
        rules=(
            *ATTENTION_RULES,
            *_sam.POSITIONS,
            ("a function of timm's SAM was patched", lambda m, x: _functions() != _FUNCTIONS),
        ),
        parts=(
            *ATTENTION_PARTS,
            ("q_norm", fusion.IDENTITY),
            ("k_norm", fusion.IDENTITY),
            ("rope", fusion.ABSENT),
        ),
        options=options,
    ),
    Block: fusion.as_written("layer", Block, timm_sam.Block),
}

ADAPTER = Adapter(
    classes=(Block,),
    known=_KNOWN,
    told={Block: partial(tell_layer, halves=_halves, blocks=_sam.blocks, by_parts=_sam.extra_dim)},
)
