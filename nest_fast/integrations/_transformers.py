"""What fusion knows of the modules that transformers' families of models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.activations import GELUActivation

from nest_fast import fusion
from nest_fast.fusion import LINEAR, SILENT, Place

__all__ = ["HANDED", "KNOWN", "SQUARE", "attended", "is_asked", "kept", "mlp_parts", "nested", "packed"]

KNOWN: fusion.Known = {
    **fusion.TORCH,
    GELUActivation: fusion.as_written(
        "gelu",
        GELUActivation,
        rules=(("{name} has a function of its own", lambda m, x: m.act is not torch.nn.functional.gelu),),
    ),
}

# Of q, of k or of v, which have the width of the input.
SQUARE = Place(
    LINEAR.roles,
    (*LINEAR.rules, ("{name} has heads of another width than its input", lambda m, x: m.out_features != x.shape[-1])),
)
# A linear layer and a dropout that are a module of their own.
HANDED = Place(("output",))
_NESTED_ATTENTION = (
    ("self", Place(("self attention",))),
    ("self.query", SQUARE),
    ("self.key", SQUARE),
    ("self.value", SQUARE),
    ("self.dropout", SILENT),
    ("output", HANDED),
    ("output.dense", LINEAR),
    ("output.dropout", SILENT),
)


def nested(library: Any, prefix: str, family: str, parameter: tuple[str, str]) -> fusion.Known:
    """The modules of layers whose attention and MLP are two modules each, of which the second hands on the result.

    Args:
        library: the module of transformers with their classes.
        prefix: before the names of these.
        family: what a reason calls it.
        parameter: of the attention, beside its linear layers: its name, and what a reason calls it.
    """
    name, meaning = parameter

    def own(role: str, cls: str, **what: Any) -> fusion.Known:
        theirs = getattr(library, f"{prefix}{cls}")
        return {theirs: fusion.as_written(role, theirs, **what)}

    def functions() -> tuple:
        return library.window_partition, library.window_reverse

    written = functions()
    strange = f"{{name}}'s {meaning} is no ordinary tensor, or has another dtype"
    return {
        **own("self attention", "SelfAttention", rules=((strange, lambda m, x: fusion.is_other(m, name, x)),)),
        **own("output", "SelfOutput"),
        **own("output", "Output"),
        **own("mlp", "Intermediate", parts=(("dense", LINEAR), ("intermediate_act_fn", fusion.ACTIVATION))),
        **own(
            "attention",
            "Attention",
            rules=((f"a function of transformers' {family} was patched", lambda m, x: functions() != written),),
            parts=_NESTED_ATTENTION,
            options=lambda attn: fusion.Attention(getattr(attn.self, "num_attention_heads", 1)),  # of any module
        ),
    }


def mlp_parts(layer: Any) -> tuple[fusion.Part, ...]:
    """The second half of an MLP whose first is ``layer.intermediate``."""
    inside = getattr(layer.output, "_modules", {})
    return ("output.dense", inside.get("dense"), LINEAR), ("output.dropout", inside.get("dropout"), SILENT)


def is_asked(options: dict[str, Any]) -> bool:
    """Whether one of these options of a call is given."""
    return any(value is not None and value is not False for value in options.values())


def kept(x: Tensor, keep: float) -> Tensor:
    """Which samples stochastic depth keeps, as transformers draws them."""
    return torch.floor(torch.rand(x.shape[0], dtype=x.dtype, device=x.device) + keep)


def packed(*linears: Any) -> tuple[Callable[[], Tensor], Tensor | None]:
    """What makes the weight of several linear layers, one below the other, and their biases."""

    def weight() -> Tensor:
        return torch.cat([linear.weight for linear in linears])

    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
    return weight, torch.cat(biases)


def attended(layer: Any, library: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    """The attention of a layer in windows, where its modules are called: ``(B, H * W, C)`` → the same."""
    (B, _, C), (H, W), window, shift = x.shape, size, layer.window_size, layer.shift_size
    y, _ = layer.maybe_pad(x.view(B, H, W, C), H, W)
    _, *padded, _ = y.shape
    y = torch.roll(y, (-shift, -shift), (1, 2)) if shift > 0 else y
    mask = layer.get_attn_mask(*padded, dtype=y.dtype, device=y.device)
    y = library.window_partition(y, window).view(-1, window * window, C)
    y, *_ = layer.attention(y, mask, output_attentions=False)
    y = library.window_reverse(y.view(-1, window, window, C), window, *padded)
    y = torch.roll(y, (shift, shift), (1, 2)) if shift > 0 else y
    return y[:, :H, :W].contiguous().view(x.shape)
