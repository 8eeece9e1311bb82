"""A linear layer with what follows it in the same pass: bias, GELU, residual sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _layout, _modes, _tuned
from nest_fast.ops._backends import Backend

__all__ = ["linear"]

IMPLS = ("auto", "reference", "onednn")
ACTIVATIONS = ("none", "gelu", "gelu_tanh")

# oneDNN's names for the activation and its algorithm.
_ONEDNN = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


@_tuned.tunable
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``residual + activation(x @ weight^T + bias)``.

    Args:
        x: ``(…, in)``, any floating-point dtype and strides.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        activation: "none", "gelu" (exact) or "gelu_tanh".
        residual: ``(…, out)``, added last, of any floating-point dtype, or None; not together with an activation.
        impl: "auto" takes the best this machine has for these tensors; while ``torch.compile`` traces, that is to leave
            fusing to the compiler. "reference" is plain PyTorch, with one pass over memory each for the bias (on a
            CPU), the activation and the sum. "onednn" does all of them in the matmul's epilogue, on a CPU and without
            gradients.

    Returns:
        ``(…, out)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.
    """
    _check(x, weight, bias, activation, residual, impl)
    given = Given(x, weight, bias, residual)
    if impl == "auto":
        impl = choose(given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("linear", given)
    if impl == "reference":
        return reference.linear(x, weight, bias, activation=activation, residual=residual)
    bias = _layout.dense(bias)  # oneDNN reads its memory, whatever the strides
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, "add")
    name, algorithm = _ONEDNN[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, impl: str) -> None:
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("activation", activation, ACTIVATIONS)
    _checks.floating("x", _checks.is_tensor("x", x, "(…, in)"))
    out_features, in_features = _checks.tensor("weight", weight, "(out, in)").shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected shape (…, {in_features}) as weight says, got {tuple(x.shape)}")
    _checks.alike("weight", weight, "x", x)
    if bias is not None:
        _checks.is_tensor("bias", bias, "(out,)")
        _checks.shape("bias", bias, (out_features,), "(out,)")
        _checks.alike("bias", bias, "x", x)
    if residual is not None:
        if activation != "none":
            raise ValueError(f"activation: expected 'none' with a residual, got {activation!r}")
        _checks.is_tensor("residual", residual, "(…, out)")
        _checks.shape("residual", residual, (*x.shape[:-1], out_features), "(…, out)")
        _checks.promotes("residual", residual, "x", x)


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None


BACKENDS = {
    "onednn": Backend(
        "onednn",
        (
            *_backends.ONEDNN,
            (
                "residual is {given.residual.dtype}",
                lambda given: given.residual is not None and given.residual.dtype != given.x.dtype,
            ),
            ("PyTorch has no fake of it", lambda given: isinstance(given.x, FakeTensor)),
            ("x is empty", lambda given: given.x.numel() == 0),
            ("gradients are wanted", _modes.wants_gradients),
        ),
    )
}


_ABLE = (BACKENDS["onednn"], Backend("reference", ()))  # what may be measured


def choose(given: Given) -> str:
    if torch.compiler.is_compiling() or _modes.in_trace():
        return "reference"
    if not given.x.is_cpu:
        return "reference"
    return _tuned.implementation("linear", _ABLE, given, _rule)


def _rule(given: Given) -> str:
    return "onednn" if BACKENDS["onednn"].can(given) else "reference"
