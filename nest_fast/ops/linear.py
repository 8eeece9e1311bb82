"""A linear layer with what follows it in the same pass: bias, GELU, residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _choice, _extension

__all__ = ["linear"]

IMPLS = ("auto", "reference", "onednn")
ACTIVATIONS = ("none", "gelu", "gelu_tanh")

# oneDNN's names for the activation and its algorithm.
_ONEDNN = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


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
            fusing to the compiler. "reference" is plain PyTorch, with a pass over memory each for the bias (on a CPU),
            the activation and the sum. "onednn" has all in the matmul's epilogue, on a CPU and without gradients.

    Returns:
        ``(…, out)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.
    """
    _check(x, weight, bias, activation, residual, impl)
    plain = impl == "reference" or torch.compiler.is_compiling() or _checks.in_trace()
    if impl == "onednn":
        _choice.require("linear", impl, _onednn_why_not(x, weight, bias, residual))
    elif plain or _onednn_why_not(x, weight, bias, residual):
        return reference.linear(x, weight, bias, activation=activation, residual=residual)
    bias = _checks.dense(bias)  # oneDNN reads its memory, whatever the strides
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
        raise ValueError(f"x: wanted shape (…, {in_features}) as weight says, got {tuple(x.shape)}")
    _checks.alike("weight", weight, "x", x)
    if bias is not None:
        _checks.is_tensor("bias", bias, "(out,)")
        _checks.shape("bias", bias, (out_features,), "(out,)")
        _checks.alike("bias", bias, "x", x)
    if residual is not None:
        if activation != "none":
            raise ValueError(f"activation: wanted 'none' with a residual, got {activation!r}")
        _checks.is_tensor("residual", residual, "(…, out)")
        _checks.shape("residual", residual, (*x.shape[:-1], out_features), "(…, out)")
        _checks.promotes("residual", residual, "x", x)


def _onednn_why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[str]:
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device}, not on a CPU")
    elif not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        reasons.append("this torch has no oneDNN, or it is switched off")
    if x.dtype not in _extension.onednn_dtypes:
        reasons.append(f"oneDNN has no {x.dtype} on this processor")
    if residual is not None and residual.dtype != x.dtype:
        reasons.append(f"residual is {residual.dtype}")
    reasons += _choice.mode_why_not(x, weight, bias, residual)
    if x.numel() == 0:
        reasons.append("x is empty")
    if _choice.wants_gradients(x, weight, bias, residual):
        reasons.append("gradients are wanted")
    return reasons
