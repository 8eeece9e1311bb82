"""transformers' Swin: attention in windows, shifted in every other layer, with a relative position bias.

Images are padded before they are shifted. q, k and v have a linear layer each, whose weights are put together in every
call. Attention whose weights are wanted (``attn_implementation="eager"``) is called as it is.

Source: transformers/models/swin/modeling_swin.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers.models.swin.modeling_swin as hf_swin
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._transformers import KNOWN, SQUARE, is_asked, kept, packed
from nest_fast.ops import windows

__all__ = ["ADAPTER"]

_NAMES = ("layernorm_before", "attention", "dropout", "drop_path"), ("layernorm_after", "mlp", "", "dropout")
_METHODS = "forward", "set_shift_and_window_size", "get_attn_mask", "maybe_pad", "cyclic_shift"


class SwinLayer(Fast, hf_swin.SwinLayer):
    @instead_of(hf_swin.SwinLayer)
    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **options: Any
    ) -> Any:
        x = hidden_states
        weights: list[Tensor | None] = []
        if is_asked(options) or fusion.flags(x, "the layer", self, _KNOWN[SwinLayer]):
            return hf_swin.SwinLayer.forward(self, x, input_dimensions, always_partition, **options)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        x = fusion.run(x, _halves(self, input_dimensions, weights))
        return x, weights[0] if weights else None


def _halves(layer: Any, size: tuple[int, int], weights: list[Tensor | None]) -> list[fusion.Half]:
    """``weights`` is given those of the attention where that is called."""
    attention, mlp = fusion.halves(
        layer,
        _KNOWN,
        _NAMES,
        scale_place=fusion.SILENT,
        call=partial(_called, layer, size, weights),
        operation=partial(_attention, layer=layer, size=size),
    )
    return [attention, mlp._replace(path_place=fusion.SILENT)]


def _called(layer: Any, size: tuple[int, int], weights: list[Tensor | None], x: Tensor) -> Tensor:
    (B, _, C), (H, W), window = x.shape, size, layer.window_size
    y, _ = layer.maybe_pad(layer.layernorm_before(x).view(B, H, W, C), H, W)
    _, *padded, _ = y.shape
    mask = layer.get_attn_mask(*padded, dtype=y.dtype, device=y.device)
    y = hf_swin.window_partition(layer.cyclic_shift(y), window)
    y, own = layer.attention(y.view(-1, window * window, C), mask)
    weights.append(own)
    y = layer.dropout(y).view(-1, window, window, C)
    y = layer.cyclic_shift(hf_swin.window_reverse(y, window, *padded), reverse=True)
    return layer.drop_path(y[:, :H, :W].contiguous().view(x.shape))


def _attention(
    x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, layer: Any, size: tuple[int, int]
) -> Tensor:
    attn = half.body
    own = windows(size, layer.window_size, shift=layer.shift_size, pad_first=True)
    bias = attn.relative_position_bias().squeeze(0)
    qkv = packed(attn.q_proj, attn.k_proj, attn.v_proj)
    return fusion.attention(x, half, branch_scale, qkv=qkv, windows=own, bias=bias)


# --- what fusion knows of transformers' classes -----------------------------------------------------------------------


def _functions() -> tuple:
    return hf_swin.window_partition, hf_swin.window_reverse


def _implementation(attn: Any) -> object:
    name = attn.config._attn_implementation
    return hf_swin.ALL_ATTENTION_FUNCTIONS.get_interface(name, hf_swin.eager_attention_forward)


_FUNCTIONS = _functions()
_BIAS = fusion.Place(
    ("bias",),
    (
        (
            "{name}'s table is no ordinary tensor, or has another dtype",
            lambda m, x: fusion.is_other(m, "relative_position_bias_table", x),
        ),
    ),
)


_KNOWN: fusion.Known = {
    **KNOWN,
    hf_swin.SwinDropPath: fusion.as_written("drop_path", hf_swin.SwinDropPath, rate="drop_prob", draw=kept),
    hf_swin.SwinRelativePositionBias: fusion.as_written("bias", hf_swin.SwinRelativePositionBias),
    hf_swin.SwinMLP: fusion.as_written(
        "mlp",
        hf_swin.SwinMLP,
        parts=(("fc1", fusion.LINEAR), ("activation_fn", fusion.ACTIVATION), ("fc2", fusion.LINEAR)),
    ),
    hf_swin.SwinAttention: fusion.as_written(
        "attention",
        hf_swin.SwinAttention,
        rules=(
            ("{name}'s attention drops", lambda m, x: m.training and m.attention_dropout != 0.0),
            (
                "{name} has another implementation than sdpa",
                lambda m, x: _implementation(m) is not sdpa_attention_forward,
            ),
            ("a function of transformers' Swin was patched", lambda m, x: _functions() != _FUNCTIONS),
        ),
        parts=(
            ("q_proj", SQUARE),
            ("k_proj", SQUARE),
            ("v_proj", SQUARE),
            ("o_proj", fusion.LINEAR),
            ("relative_position_bias", _BIAS),
        ),
        options=lambda attn: fusion.Attention(attn.num_attention_heads, attn.scaling),
    ),
    SwinLayer: fusion.as_written(
        "layer",
        SwinLayer,
        hf_swin.SwinLayer,
        methods=_METHODS,
    ),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, layer.window_size**2


ADAPTER = Adapter(
    classes=(SwinLayer,),
    known=_KNOWN,
    told={
        SwinLayer: partial(tell_layer, halves=partial(_halves, size=(1, 1), weights=[]), blocks=_blocks, windowed=True)
    },
)
