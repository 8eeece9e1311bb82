"""timm's ViT and DeiT: plain pre-norm layers, an image being one block. Source: timm/models/vision_transformer.py."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import timm.models.vision_transformer as timm_vit
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import ATTENTION_PARTS, ATTENTION_RULES, KNOWN, layer_scale, options

__all__ = ["ADAPTER"]

# What a layer hands to its attention beside x, as far as this version of timm has it.
_MASKING = {"attn_mask": None, "is_causal": False}
_UNMASKED = {name: _MASKING[name] for name in inspect.signature(timm_vit.Block.forward).parameters if name in _MASKING}


class Block(Fast, timm_vit.Block):
    @instead_of(timm_vit.Block)
    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        if any(mask is not None and mask is not False for mask in (*masks, *named_masks.values())):
            return timm_vit.Block.forward(self, x, *masks, **named_masks)
        return fusion.run(x, _halves(self))


def _halves(layer: Any) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, names=fusion.SCALED_HALVES, call=partial(_called, layer), operation=_attention)


def _called(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path1(layer.ls1(layer.attn(layer.norm1(x), **_UNMASKED)))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale) -> Tensor:
    return fusion.attention(x.unsqueeze(1), half, branch_scale).squeeze(1)


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_vit.LayerScale: layer_scale(timm_vit.LayerScale),
    timm_vit.Attention: fusion.as_written(
        "attention",
        timm_vit.Attention,
        rules=ATTENTION_RULES,
        parts=(
            *ATTENTION_PARTS,
            ("q_norm", fusion.IDENTITY),
            ("k_norm", fusion.IDENTITY),
            ("norm", fusion.OPTIONAL_IDENTITY),
            ("gate", fusion.ABSENT),
        ),
        options=options,
    ),
    Block: fusion.as_written("layer", Block, timm_vit.Block),
}

ADAPTER = Adapter(classes=(Block,), known=_KNOWN, told={Block: partial(tell_layer, halves=_halves)})
