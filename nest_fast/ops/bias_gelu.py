"""GELU in one pass with the bias that a matmul left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _tuned
from nest_fast.ops._backends import Backend, choose_pass
from nest_fast.ops._register import nothing_like, operation

__all__ = ["approximation", "bias_gelu"]

IMPLS = ("auto", "reference", "triton")
APPROXIMATIONS = ("none", "tanh")


@_tuned.tunable
def bias_gelu(
    x: Tensor,
    bias: Tensor | None,
    *,
    approximate: str = "none",
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """``gelu(x + bias)``.

    Args:
        x: ``(..., C)``, any floating-point dtype.
        bias: ``(C,)``, any floating-point dtype, or None.
        approximate: "none", ``x * Phi(x)`` with the normal distribution's Phi, or "tanh", its approximation.
        dtype: of the output: what plain PyTorch gives it if None. Under autocast the matmul after it casts what it
            gets; in that dtype, it is spared to write and to read twice the bytes.
        impl: "auto" takes the best this machine has for these tensors; while ``torch.compile`` traces, that is to leave
            fusing to the compiler. "reference" is plain PyTorch. "triton" is one CUDA kernel (on CPU tensors under
            ``TRITON_INTERPRET=1``), which keeps only x for the backward. Only "auto" may choose.

    Returns:
        ``(..., C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv 1606.08415).
    """
    given = Given(x, bias)
    _check(*given, approximate, dtype, impl)
    if impl == "auto":
        impl = choose_pass("bias_gelu", BACKENDS["triton"], given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("bias_gelu", given)
    if impl == "reference":
        out = reference.bias_gelu(x, bias, approximate=approximate)
        return out if dtype is None else out.to(dtype)
    if dtype is None:
        dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return _TRITON(x, bias, dtype, approximate == "tanh")


def approximation(activation: str) -> str:
    """What ``approximate`` is of an activation "gelu" or "gelu_tanh"."""
    return "tanh" if activation == "gelu_tanh" else "none"


def _check(x: Tensor, bias: Tensor | None, approximate: str, dtype: torch.dtype | None, impl: str) -> None:
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("approximate", approximate, APPROXIMATIONS)
    _checks.floating_dtype("dtype", dtype)
    _checks.floating("x", _checks.is_tensor("x", x, "(..., C)"))
    if x.dim() == 0:
        raise ValueError(f"x: expected 1 or more dimensions (..., C), got shape {tuple(x.shape)}")
    if bias is not None:
        _checks.shape("bias", _checks.is_tensor("bias", bias, "(C,)"), (x.shape[-1],), "(C,)")
        _checks.promotes("bias", bias, "x", x)


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    bias: Tensor | None


BACKENDS = {"triton": Backend("triton", _backends.TRITON_PASS)}


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, bias, dtype, tanh):
    return x.new_empty(x.shape, dtype=dtype)


def _bwd_fake(dout, x, bias, tanh, need_dbias):
    dbias = x.new_empty(x.shape[-1], dtype=torch.float32) if need_dbias else nothing_like(x)
    return x.new_empty(x.shape), dbias


def _gradients(kept, dout):
    dx, dbias = _TRITON_BWD(dout, kept.x, kept.bias, kept.tanh, kept.needed["bias"])
    return {"x": dx, "bias": dbias if kept.needed["bias"] else None}


def _vmap(info, in_dims, x, bias, dtype, tanh):
    if in_dims[1] is None:
        return _TRITON(x.movedim(in_dims[0], 0), bias, dtype, tanh), 0
    # A bias of its own for each: the kernel knows one, so one call each.
    xs = [x] * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
    return torch.stack([_TRITON(*one, dtype, tanh) for one in zip(xs, bias.unbind(in_dims[1]), strict=True)]), 0


_TRITON = operation(
    "bias_gelu_triton_fwd(Tensor x, Tensor? bias, ScalarType dtype, bool tanh) -> Tensor",
    launch="bias_gelu.bias_gelu_fwd",
    fake=_fake,
    saved=("x", "bias"),
    gradients=_gradients,
    vmap=_vmap,
)
_TRITON_BWD = operation(
    "bias_gelu_triton_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh, bool need_dbias)"
    " -> (Tensor dx, Tensor dbias)",
    launch="bias_gelu.bias_gelu_bwd",
    fake=_bwd_fake,
    backward_of="bias_gelu",
)
