"""transformers' Swin v2: attention by cosines in windows, a bias that a small network computes, norms that come last.

Where windows are shifted the mask is added twice, as transformers does. Where attention weights are asked for,
transformers' layer is called.

Source: transformers/models/swinv2/modeling_swinv2.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers.models.swinv2.modeling_swinv2 as hf_swin
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._swin import cosine_scale
from nest_fast.integrations._transformers import HANDED, KNOWN, attended, kept, mlp_parts, nested, packed
from nest_fast.ops import windows

__all__ = ["ADAPTER"]

_NAMES = ("layernorm_before", "attention", "", "drop_path"), ("layernorm_after", "intermediate", "output", "drop_path")
_METHODS = "forward", "get_attn_mask", "maybe_pad"


class Swinv2Layer(Fast, hf_swin.Swinv2Layer):
    @instead_of(hf_swin.Swinv2Layer)
    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
    ) -> Any:
        if output_attentions or fusion.flags(hidden_states, "the layer", self, _KNOWN[Swinv2Layer]):
            return hf_swin.Swinv2Layer.forward(self, hidden_states, input_dimensions, output_attentions)
        return (fusion.run(hidden_states, _halves(self, input_dimensions)),)


def _halves(layer: Any, size: tuple[int, int]) -> list[fusion.Half]:
    attention, mlp = fusion.halves(
        layer,
        _KNOWN,
        _NAMES,
        post_norm=True,
        call=partial(_attention_called, layer, size),
        operation=partial(_attention, layer=layer, size=size),
    )
    return [attention, mlp._replace(scale_place=HANDED, more=mlp_parts(layer), call=partial(_mlp_called, layer))]


def _attention_called(layer: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    return layer.drop_path(layer.layernorm_before(attended(layer, hf_swin, size, x)))


def _mlp_called(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path(layer.layernorm_after(layer.output(layer.intermediate(x))))


def _attention(
    x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any, size: tuple[int, int]
) -> Tensor:
    attn = half.body.self
    own = windows(size, layer.window_size, shift=layer.shift_size, pad_first=True)
    (H, W), (h, w) = own.counts, own.window
    mask = layer.get_attn_mask(H * h, W * w, dtype=x.dtype, device=x.device)
    return fusion.attention(
        x,
        half,
        branch_scale,
        qkv=packed(attn.query, attn.key, attn.value),
        cosine_scale=cosine_scale(attn.logit_scale),
        windows=own,
        bias=_bias(attn),
        mask=None if mask is None else 2 * mask,
    )


def _bias(attn: Any) -> Tensor:
    """``(heads, N, N)``, where the network is called as it is."""
    table = attn.continuous_position_bias_mlp(attn.relative_coords_table).view(-1, attn.num_attention_heads)
    return (16 * torch.sigmoid(table))[attn.relative_position_index].permute(2, 0, 1)


# --- what fusion knows of transformers' classes -----------------------------------------------------------------------


_KNOWN: fusion.Known = {
    **KNOWN,
    hf_swin.Swinv2DropPath: fusion.as_written("drop_path", hf_swin.Swinv2DropPath, rate="drop_prob", draw=kept),
    **nested(hf_swin, "Swinv2", "Swin v2", ("logit_scale", "scale")),
    Swinv2Layer: fusion.as_written(
        "layer",
        Swinv2Layer,
        hf_swin.Swinv2Layer,
        methods=_METHODS,
    ),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, layer.window_size**2


ADAPTER = Adapter(
    classes=(Swinv2Layer,),
    known=_KNOWN,
    told={Swinv2Layer: partial(tell_layer, halves=partial(_halves, size=(1, 1)), blocks=_blocks, windowed=True)},
)
