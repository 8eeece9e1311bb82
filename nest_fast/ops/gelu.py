"""GELU in one pass with the bias that a matmul left out."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _choice, _triton

__all__ = ["bias_gelu"]

APPROXIMATIONS = ("none", "tanh")

_LIB = torch.library.Library("nest_fast", "FRAGMENT")
_LIB.define("bias_gelu_triton_fwd(Tensor x, Tensor? bias, ScalarType dtype, bool tanh) -> Tensor")
_LIB.define(
    "bias_gelu_triton_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh, bool need_dbias) -> (Tensor dx, Tensor dbias)"
)
_OPS = torch.ops.nest_fast


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: str = "none", impl: str = "auto") -> Tensor:
    """``gelu(x + bias)``.

    Args:
        x: ``(..., C)``, any floating-point dtype.
        bias: ``(C,)``, any floating-point dtype, or None.
        approximate: "none", ``x * Phi(x)`` with the normal distribution's Phi, or "tanh", its approximation.
        impl: "auto" takes the best this machine has for these tensors; while ``torch.compile`` traces, that is to leave
            fusing to the compiler. "reference" is plain PyTorch. "triton" is one CUDA kernel (on CPU tensors under
            ``TRITON_INTERPRET=1``), which keeps only x for the backward. Only "auto" may choose.

    Returns:
        ``(..., C)``, in the dtype that plain PyTorch gives it.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv 1606.08415).
    """
    _checks.choice("impl", impl, _choice.IMPLS)
    _checks.choice("approximate", approximate, APPROXIMATIONS)
    _checks.floating("x", _checks.is_tensor("x", x, "(..., C)"))
    if x.dim() == 0:
        raise ValueError(f"x: wanted 1 or more dimensions (..., C), got shape {tuple(x.shape)}")
    if bias is not None:
        _checks.shape("bias", _checks.is_tensor("bias", bias, "(C,)"), (x.shape[-1],), "(C,)")
        _checks.promotes("bias", bias, "x", x)
    if not _choice.use_triton("bias_gelu", impl, (x, bias)):
        return reference.bias_gelu(x, bias, approximate=approximate)
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return _OPS.bias_gelu_triton_fwd(x, bias, dtype, approximate == "tanh")


def _fwd(*args):
    from nest_fast.kernels import bias_gelu as kernels

    return kernels.bias_gelu_fwd(*args)


def _bwd(*args):
    from nest_fast.kernels import bias_gelu as kernels

    dx, dbias = kernels.bias_gelu_bwd(*args)
    return dx, dx.new_empty(0, dtype=torch.float32) if dbias is None else dbias


for _key in _triton.DISPATCH_KEYS:
    _LIB.impl("bias_gelu_triton_fwd", _fwd, _key)
    _LIB.impl("bias_gelu_triton_bwd", _bwd, _key)


@torch.library.register_fake("nest_fast::bias_gelu_triton_fwd", lib=_LIB)
def _fwd_fake(x, bias, dtype, tanh):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("nest_fast::bias_gelu_triton_bwd", lib=_LIB)
def _bwd_fake(dout, x, bias, tanh, need_dbias):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_dbias else 0, dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, bias, _, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx, dout):
    x, bias = ctx.saved_tensors
    need_dbias = ctx.needs_input_grad[1]
    dx, dbias = _OPS.bias_gelu_triton_bwd(dout, x, bias, ctx.tanh, need_dbias)
    return dx, dbias.to(bias.dtype) if need_dbias else None, None, None


torch.library.register_autograd("nest_fast::bias_gelu_triton_fwd", _autograd, setup_context=_setup, lib=_LIB)
torch.library.register_autograd("nest_fast::bias_gelu_triton_bwd", _checks.no_double_backward("bias_gelu"), lib=_LIB)


def _vmap(info, in_dims, x, bias, dtype, tanh):
    op = _OPS.bias_gelu_triton_fwd
    if in_dims[1] is None:
        return op(x.movedim(in_dims[0], 0), bias, dtype, tanh), 0
    # A bias of its own for each: the kernel knows one, so one call each.
    xs = [x] * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
    return torch.stack([op(*one, dtype, tanh) for one in zip(xs, bias.unbind(in_dims[1]), strict=True)]), 0


torch.library.register_vmap("nest_fast::bias_gelu_triton_fwd", _vmap, lib=_LIB)
