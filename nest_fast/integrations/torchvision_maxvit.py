"""torchvision's MaxViT: attention in windows, then in grids of tokens that lie apart, with a relative position bias.

Its modules cut an image into blocks before the attention, and put it together after the MLP.

Source: torchvision/models/maxvit.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torchvision.models.maxvit as torchvision_maxvit
from torch import Tensor, nn

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._torchvision import KNOWN

__all__ = ["ADAPTER"]

_NAMES = (
    ("attn_layer.0", "attn_layer.1", "attn_layer.2", "stochastic_dropout"),
    ("mlp_layer.0", "mlp_layer", "", "stochastic_dropout"),
)


class PartitionAttentionLayer(Fast, torchvision_maxvit.PartitionAttentionLayer):
    @instead_of(torchvision_maxvit.PartitionAttentionLayer)
    def forward(self, x: Tensor) -> Tensor:
        if fusion.flags(x, "the layer", self, _KNOWN[PartitionAttentionLayer]):
            return torchvision_maxvit.PartitionAttentionLayer.forward(self, x)
        height, width = self.grid_size
        x = self.partition_swap(self.partition_op(x, self.p))
        x = self.departition_swap(fusion.run(x, _halves(self)))
        return self.departition_op(x, self.p, height // self.p, width // self.p)


def _halves(layer: Any) -> list[fusion.Half]:
    attention, mlp = fusion.halves(layer, _KNOWN, _NAMES, operation=_attention)
    return [
        attention._replace(
            scale_place=fusion.SILENT,
            call=lambda x: layer.stochastic_dropout(layer.attn_layer(x)),
            more=(("attn_layer", layer.attn_layer, _OF_THREE),),
        ),
        mlp._replace(
            call=lambda x: layer.stochastic_dropout(layer.mlp_layer(x)),
            more=(("mlp_layer", layer.mlp_layer, _OF_FIVE),),
        ),
    ]


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale) -> Tensor:
    attn = half.body
    qkv = attn.to_qkv.weight, attn.to_qkv.bias
    bias = attn.get_relative_positional_bias().squeeze(0)
    return fusion.attention(x, half, branch_scale, qkv=qkv, bias=bias)


def _of(modules: int) -> fusion.Place:
    return fusion.Place(("mlp",), ((f"{{name}} has not {modules} modules", lambda m, x: len(m) != modules),))


_OF_THREE, _OF_FIVE = _of(3), _of(5)

_KNOWN: fusion.Known = {
    **KNOWN,
    nn.Sequential: fusion.as_written(
        "mlp",
        nn.Sequential,
        parts=(("1", fusion.LINEAR), ("2", fusion.ACTIVATION), ("3", fusion.LINEAR), ("4", fusion.SILENT)),
    ),
    torchvision_maxvit.RelativePositionalMultiHeadAttention: fusion.as_written(
        "attention",
        torchvision_maxvit.RelativePositionalMultiHeadAttention,
        rules=(
            (
                "{name}'s table of the bias is no ordinary tensor, or has another dtype",
                lambda m, x: fusion.is_other(m, "relative_position_bias_table", x),
            ),
        ),
        parts=(("to_qkv", fusion.QKV), ("merge", fusion.LINEAR)),
        options=lambda attn: fusion.Attention(attn.n_heads, attn.scale_factor),
    ),
    PartitionAttentionLayer: fusion.as_written(
        "layer",
        PartitionAttentionLayer,
        torchvision_maxvit.PartitionAttentionLayer,
        rules=(
            (
                "the windows of {name} do not divide its image",
                lambda m, x: any(edge % m.p != 0 for edge in m.grid_size),
            ),
        ),
    ),
}


def _blocks(layer: Any) -> tuple[int, int]:
    windows, tokens = layer.g**2, layer.p**2
    return (windows, tokens) if layer.partition_type == "window" else (tokens, windows)


ADAPTER = Adapter(
    classes=(PartitionAttentionLayer,),
    known=_KNOWN,
    told={PartitionAttentionLayer: partial(tell_layer, halves=_halves, blocks=_blocks)},
)
