"""transformers' SAM encoder: attention in windows, and in the whole image in some layers, with relative positions.

Where hidden states or attention weights were asked for once, transformers leaves hooks on the attention, which is
called from then on.

Source: transformers/models/sam/modeling_sam.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers.models.sam.modeling_sam as hf_sam
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations import _sam
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._transformers import KNOWN

__all__ = ["ADAPTER"]

_NAMES = ("layer_norm1", "attn", "", ""), ("layer_norm2", "mlp", "", "")
_METHODS = "forward", "window_partition", "window_unpartition"


class SamVisionLayer(Fast, hf_sam.SamVisionLayer):
    @instead_of(hf_sam.SamVisionLayer)
    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states
        if fusion.flags(x, "the layer", self, _KNOWN[SamVisionLayer]):
            return hf_sam.SamVisionLayer.forward(self, x)
        return fusion.run_on_image(x, _halves(self))


def _halves(layer: Any) -> list[fusion.Half]:
    embedding: Any = getattr(layer.attn, "get_rel_pos", None)
    operation = partial(_sam.attention, window=layer.window_size, embedding=embedding)
    attention, mlp = fusion.halves(
        layer, _KNOWN, _NAMES, path_place=fusion.ABSENT, call=partial(_called, layer), operation=operation
    )
    return [attention, mlp._replace(path_place=fusion.ABSENT)]


def _called(layer: Any, x: Tensor) -> Tensor:
    y = layer.layer_norm1(x)
    if layer.window_size == 0:
        return layer.attn(hidden_states=y)[0]
    y, padded = layer.window_partition(y, layer.window_size)
    y, _ = layer.attn(hidden_states=y)
    return layer.window_unpartition(y, layer.window_size, padded, (x.shape[1], x.shape[2]))


# --- what fusion knows of transformers' classes -----------------------------------------------------------------------


# That of sdpa has no scale of its own, and never drops.
_ATTENTION: dict[str, Any] = {
    "methods": ("forward", "get_rel_pos", "get_decomposed_rel_pos"),
    "parts": (("qkv", fusion.QKV), ("proj", fusion.LINEAR)),
}

_KNOWN: fusion.Known = {
    **KNOWN,
    hf_sam.SamMLPBlock: fusion.as_written(
        "mlp",
        hf_sam.SamMLPBlock,
        parts=(("lin1", fusion.LINEAR), ("act", fusion.ACTIVATION), ("lin2", fusion.LINEAR)),
    ),
    hf_sam.SamVisionAttention: fusion.as_written(
        "attention",
        hf_sam.SamVisionAttention,
        rules=(*_sam.POSITIONS, ("{name}'s attention drops", lambda m, x: m.training and m.dropout != 0.0)),
        options=lambda attn: fusion.Attention(attn.num_attention_heads, attn.scale),
        **_ATTENTION,
    ),
    hf_sam.SamVisionSdpaAttention: fusion.as_written(
        "attention",
        hf_sam.SamVisionSdpaAttention,
        rules=_sam.POSITIONS,
        options=lambda attn: fusion.Attention(attn.num_attention_heads),
        **_ATTENTION,
    ),
    SamVisionLayer: fusion.as_written(
        "layer",
        SamVisionLayer,
        hf_sam.SamVisionLayer,
        methods=_METHODS,
    ),
}

ADAPTER = Adapter(
    classes=(SamVisionLayer,),
    known=_KNOWN,
    told={SamVisionLayer: partial(tell_layer, halves=_halves, blocks=_sam.blocks, by_parts=_sam.extra_dim)},
)
