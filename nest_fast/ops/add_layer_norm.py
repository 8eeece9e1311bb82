"""A residual sum and the LayerNorm after it in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _layer_norm, _tuned
from nest_fast.ops._backends import choose_pass
from nest_fast.ops._layer_norm import BACKENDS, IMPLS
from nest_fast.ops._register import nothing_like, operation

__all__ = ["add_layer_norm"]


@_tuned.tunable
def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-6,
    normed_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``sum = x + branch_scale * (branch + branch_bias)`` and ``normed = layer_norm(sum) * weight + bias``.

    Args:
        x: ``(B, ..., C)``, the residual stream, any floating-point dtype.
        branch: shape of ``x``, what is added to it: the last matmul's output. The sum's dtype is what PyTorch's
            promotion makes of x, branch, branch_bias and branch_scale.
        weight, bias: ``(C,)``, the LayerNorm's parameters, of the sum's dtype, or both float32 beside float16 and
            bfloat16.
        branch_bias: ``(C,)``, the bias which that matmul left out, or None.
        branch_scale: ``(B,)``, a factor for each sample's branch, or None; for stochastic depth, 0 or 1 / keep. It has
            no gradient.
        eps: added to the variance.
        normed_dtype: of ``normed``: what plain PyTorch gives it if None, float32 under CUDA's autocast. The matmul
            after it casts what it gets; in that dtype, it is spared to write and to read twice the bytes.
        impl: "auto" takes the best this machine has for these tensors; while ``torch.compile`` traces, that is to leave
            fusing to the compiler. "reference" is plain PyTorch. "triton" is one CUDA kernel for all (on CPU tensors
            under ``TRITON_INTERPRET=1``). Only "auto" may choose.

    Returns:
        ``(sum, normed)``, both ``(B, ..., C)``; the sum in the dtype that plain PyTorch gives it, under autocast too.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock); Huang et al., "Deep Networks with Stochastic
    Depth" (arXiv 1603.09382).
    """
    dtype = _check(x, branch, weight, bias, branch_bias, branch_scale, normed_dtype, impl)
    branch_scale = None if branch_scale is None else branch_scale.detach()
    given = Given(x, branch, branch_scale, branch_bias, weight, bias)
    if impl == "auto":
        impl = choose_pass("add_layer_norm", BACKENDS["triton"], given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("add_layer_norm", given)
    if impl == "reference":
        total, normed = reference.add_layer_norm(
            x, branch, weight, bias, branch_bias=branch_bias, branch_scale=branch_scale, eps=eps
        )
        return total, normed if normed_dtype is None else normed.to(normed_dtype)
    normed_dtype = _layer_norm.normed_dtype(x, dtype) if normed_dtype is None else normed_dtype
    return _TRITON(*given, eps, dtype, normed_dtype)[:2]


class Given(NamedTuple):
    x: Tensor
    branch: Tensor
    branch_scale: Tensor | None
    branch_bias: Tensor | None
    weight: Tensor
    bias: Tensor


def _check(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    branch_scale: Tensor | None,
    normed_dtype: torch.dtype | None,
    impl: str,
) -> torch.dtype:
    """The dtype of the sum."""
    _checks.choice("impl", impl, IMPLS)
    _checks.floating_dtype("normed_dtype", normed_dtype)
    C = _layer_norm.rows(x, 2, "(B, ..., C)")
    dtype = x.dtype
    for name, value, expected, meaning in (
        ("branch", branch, tuple(x.shape), "as x has"),
        ("branch_bias", branch_bias, (C,), "(C,)"),
        ("branch_scale", branch_scale, (x.shape[0],), "(B,)"),
    ):
        if value is not None or name == "branch":
            value = _checks.is_tensor(name, value, meaning)
            _checks.shape(name, value, expected, meaning)
            _checks.promotes(name, value, "x", x)
            dtype = torch.promote_types(dtype, value.dtype)
    _layer_norm.check_norm(x, weight, bias, dtype)
    return dtype


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, branch, branch_scale, branch_bias, weight, bias, eps, dtype, normed_dtype):
    statistics = [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=normed_dtype), *statistics


def _bwd_fake(dtotal, dnormed, total, mean, rstd, branch_scale, weight, x_dtype, branch_dtype, need_dbranch_bias):
    same = branch_scale is None and x_dtype == branch_dtype
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        nothing_like(total) if same else total.new_empty(total.shape, dtype=branch_dtype),
        total.new_empty((3 if need_dbranch_bias else 2, total.shape[-1]), dtype=torch.float32),
    )


def _gradients(kept, dtotal, dnormed):
    need_dbranch_bias = kept.needed["branch_bias"]
    saved = kept.total, kept.mean, kept.rstd, kept.branch_scale, kept.weight
    x_dtype, branch_dtype = kept.dtypes["x"], kept.dtypes["branch"]
    dx, dbranch, dparams = _TRITON_BWD(dtotal, dnormed, *saved, x_dtype, branch_dtype, need_dbranch_bias)
    if kept.branch_scale is None and x_dtype == branch_dtype:
        dbranch = dx  # a sum's terms have the same gradient
    dbranch_bias = dparams[2] if need_dbranch_bias else None
    return {"x": dx, "branch": dbranch, "branch_bias": dbranch_bias, "weight": dparams[0], "bias": dparams[1]}


_TRITON = operation(
    "add_layer_norm_triton_fwd(Tensor x, Tensor branch, Tensor? branch_scale, Tensor? branch_bias, Tensor weight,"
    " Tensor bias, float eps, ScalarType dtype, ScalarType normed_dtype)"
    " -> (Tensor total, Tensor normed, Tensor mean, Tensor rstd)",
    launch="add_layer_norm.add_layer_norm_fwd",
    fake=_fake,
    saved=("total", "mean", "rstd", "branch_scale", "weight"),
    gradients=_gradients,
    differentiable=2,
    vmap=(3, 6),
)
_TRITON_BWD = operation(
    "add_layer_norm_triton_bwd(Tensor? dtotal, Tensor? dnormed, Tensor total, Tensor mean, Tensor rstd,"
    " Tensor? branch_scale, Tensor weight, ScalarType x_dtype, ScalarType branch_dtype, bool need_dbranch_bias)"
    " -> (Tensor dx, Tensor dbranch, Tensor dparams)",
    launch="add_layer_norm.add_layer_norm_bwd",
    fake=_bwd_fake,
    backward_of="add_layer_norm",
)
