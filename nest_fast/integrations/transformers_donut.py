"""transformers' Swin as Donut has it: attention in windows, shifted in every other layer, with a position bias.

Where attention weights are asked for, transformers' layer is called.

Source: transformers/models/donut/modeling_donut_swin.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers.models.donut.modeling_donut_swin as hf_donut
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._transformers import HANDED, KNOWN, attended, kept, mlp_parts, nested, packed
from nest_fast.ops import windows

__all__ = ["ADAPTER"]

_NAMES = ("layernorm_before", "attention", "", "drop_path"), ("layernorm_after", "intermediate", "output", "")
_METHODS = "forward", "set_shift_and_window_size", "get_attn_mask", "maybe_pad"


class DonutSwinLayer(Fast, hf_donut.DonutSwinLayer):
    @instead_of(hf_donut.DonutSwinLayer)
    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
        always_partition: bool | None = False,
    ) -> Any:
        x = hidden_states
        if output_attentions or fusion.flags(x, "the layer", self, _KNOWN[DonutSwinLayer]):
            return hf_donut.DonutSwinLayer.forward(self, x, input_dimensions, output_attentions, always_partition)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        return (fusion.run(x, _halves(self, input_dimensions)),)


def _halves(layer: Any, size: tuple[int, int]) -> list[fusion.Half]:
    attention, mlp = fusion.halves(
        layer,
        _KNOWN,
        _NAMES,
        call=partial(_called, layer, size),
        operation=partial(_attention, layer=layer, size=size),
    )
    return [attention, mlp._replace(scale_place=HANDED, path_place=fusion.ABSENT, more=mlp_parts(layer))]


def _called(layer: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    return layer.drop_path(attended(layer, hf_donut, size, layer.layernorm_before(x)))


def _attention(
    x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any, size: tuple[int, int]
) -> Tensor:
    attn = half.body.self
    own = windows(size, layer.window_size, shift=layer.shift_size, pad_first=True)
    qkv = packed(attn.query, attn.key, attn.value)
    return fusion.attention(x, half, branch_scale, qkv=qkv, windows=own, bias=_bias(attn))


def _bias(attn: Any) -> Tensor:
    """``(heads, N, N)``."""
    return attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)


# --- what fusion knows of transformers' classes -----------------------------------------------------------------------


_KNOWN: fusion.Known = {
    **KNOWN,
    hf_donut.DonutDropPath: fusion.as_written("drop_path", hf_donut.DonutDropPath, rate="drop_prob", draw=kept),
    **nested(hf_donut, "DonutSwin", "Donut", ("relative_position_bias_table", "table of the bias")),
    DonutSwinLayer: fusion.as_written(
        "layer",
        DonutSwinLayer,
        hf_donut.DonutSwinLayer,
        methods=_METHODS,
    ),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, layer.window_size**2


ADAPTER = Adapter(
    classes=(DonutSwinLayer,),
    known=_KNOWN,
    told={DonutSwinLayer: partial(tell_layer, halves=partial(_halves, size=(1, 1)), blocks=_blocks, windowed=True)},
)
