"""timm's Twins: every other layer attends in windows. Source: timm/models/twins.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.twins as timm_twins
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import ATTENTION_PARTS, ATTENTION_RULES, KNOWN, options
from nest_fast.ops import windows

__all__ = ["ADAPTER"]


class Block(Fast, timm_twins.Block):
    @instead_of(timm_twins.Block)
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return fusion.run(x, _halves(self, size))


def _halves(layer: Any, size: tuple[int, int]) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, call=partial(_called, layer, size), operation=partial(_attention, size=size))


def _called(layer: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    return layer.drop_path1(layer.attn(layer.norm1(x), size))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, size: tuple[int, int]) -> Tensor:
    return fusion.attention(x, half, branch_scale, windows=windows(size, half.body.ws))


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_twins.LocallyGroupedAttn: fusion.as_written(
        "attention", timm_twins.LocallyGroupedAttn, rules=ATTENTION_RULES, parts=ATTENTION_PARTS, options=options
    ),
    timm_twins.GlobalSubSampleAttn: fusion.as_written(
        "attention", timm_twins.GlobalSubSampleAttn, rules=(("{name} attends to sub-sampled keys", lambda m, x: True),)
    ),
    Block: fusion.as_written("layer", Block, timm_twins.Block),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, getattr(layer.attn, "ws", 1) ** 2


ADAPTER = Adapter(
    classes=(Block,),
    known=_KNOWN,
    told={Block: partial(tell_layer, halves=partial(_halves, size=(1, 1)), blocks=_blocks, windowed=True)},
)
