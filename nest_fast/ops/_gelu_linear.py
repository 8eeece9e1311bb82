"""GELU and the linear layer after it, which keep for the gradient what is before the GELU and not what is after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nest_fast.ops import _flops, _modes
from nest_fast.ops._register import nothing_like, operation
from nest_fast.ops.bias_gelu import BACKENDS, bias_gelu

__all__ = ["gelu_linear"]


def gelu_linear(
    x: Tensor, bias: Tensor | None, weight: Tensor, weight_bias: Tensor | None, *, approximate: str = "none"
) -> Tensor:
    """``linear(gelu(x + bias))`` on an eager GPU, where gradients are wanted with a quarter less memory kept.

    The gradient makes the activation again in the pass that reads x anyway: it writes one tensor more, and one is kept
    less. Where that kernel cannot run, both are kept.

    Args:
        x: ``(..., C)``, what a matmul gave.
        bias: ``(C,)`` or None, which it left out.
        weight, weight_bias: ``(out, C)`` and ``(out,)`` or None; in x's dtype, as autocast has them.
        approximate: "none" or "tanh".
    """
    if not (_modes.wants_gradients((x, bias, weight, weight_bias)) and BACKENDS["triton"].can((x, bias))):
        return F.linear(bias_gelu(x, bias, approximate=approximate, dtype=x.dtype), weight, weight_bias)
    weights = (each if each is None else each.to(x.dtype) for each in (weight, weight_bias))
    return _TRITON(x, bias, approximate == "tanh", *weights)


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, bias, tanh, weight, weight_bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _bwd_fake(dout, x, bias, tanh, weight, output_mask):
    wants_x, wants_bias, wants_weight, wants_weight_bias = output_mask
    dbias = nothing_like(x).new_empty(x.shape[-1]) if wants_bias else nothing_like(x)
    return (
        x.new_empty(x.shape) if wants_x else nothing_like(x),
        dbias,
        x.new_empty(weight.shape) if wants_weight else nothing_like(x),
        x.new_empty(weight.shape[0]) if wants_weight_bias else nothing_like(x),
    )


def _gradients(kept, dout):
    names = ("x", "bias", "weight", "weight_bias")
    wanted = [kept.needed[name] for name in names]
    found = _TRITON_BWD(dout, kept.x, kept.bias, kept.tanh, kept.weight, wanted)
    return {name: grad for name, grad, want in zip(names, found, wanted, strict=True) if want}


def _count(x, bias, tanh, weight, *_, out_shape=None):
    return _flops.linear(x, weight)


def _bwd_count(dout, x, bias, tanh, weight, *_, out_shape=None):
    dx, dbias, dweight, _ = out_shape
    return _flops.linear_gradients(x, weight, dx if dx != (0,) else dbias, dweight)


_TRITON = operation(
    "gelu_linear_triton_fwd(Tensor x, Tensor? bias, bool tanh, Tensor weight, Tensor? weight_bias) -> Tensor",
    launch="bias_gelu.gelu_linear_fwd",
    fake=_fake,
    saved=("x", "bias", "weight"),
    gradients=_gradients,
    flops=_count,
)
_TRITON_BWD = operation(
    "gelu_linear_triton_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh, Tensor weight, bool[4] output_mask)"
    " -> (Tensor dx, Tensor dbias, Tensor dweight, Tensor dweight_bias)",
    launch="bias_gelu.gelu_linear_bwd",
    fake=_bwd_fake,
    backward_of="the GELU and linear layer",
    flops=_bwd_count,
)
