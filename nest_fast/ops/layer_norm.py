"""LayerNorm in one pass with the residual sum before it, or with the mean over tokens after it."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _choice, _triton, _vmap

__all__ = ["add_layer_norm", "layer_norm_mean"]

MAX_CHANNELS = 4096

_LIB = torch.library.Library("nest_fast", "FRAGMENT")
_LIB.define(
    "add_layer_norm_triton_fwd(Tensor x, Tensor branch, Tensor? branch_scale, Tensor? branch_bias, Tensor weight,"
    " Tensor bias, float eps, ScalarType dtype, ScalarType normed_dtype)"
    " -> (Tensor total, Tensor normed, Tensor mean, Tensor rstd)"
)
_LIB.define(
    "add_layer_norm_triton_bwd(Tensor? dtotal, Tensor? dnormed, Tensor total, Tensor mean, Tensor rstd,"
    " Tensor? branch_scale, Tensor weight, ScalarType x_dtype, ScalarType branch_dtype, bool need_dbranch_bias)"
    " -> (Tensor dx, Tensor dbranch, Tensor dparams)"
)
_LIB.define(
    "layer_norm_mean_triton_fwd(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor out, Tensor normed_mean, Tensor mean, Tensor rstd)"
)
_LIB.define(
    "layer_norm_mean_triton_bwd(Tensor dout, Tensor x, Tensor normed_mean, Tensor mean, Tensor rstd, Tensor weight)"
    " -> (Tensor dx, Tensor dparams)"
)
_OPS = torch.ops.nest_fast


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-6,
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
        impl: "auto" takes the best this machine has for these tensors; while ``torch.compile`` traces, that is to leave
            fusing to the compiler. "reference" is plain PyTorch. "triton" is one CUDA kernel for all (on CPU tensors
            under ``TRITON_INTERPRET=1``). Only "auto" may choose.

    Returns:
        ``(sum, normed)``, both ``(B, ..., C)``, in the dtypes that plain PyTorch gives them, under autocast too.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock); Huang et al., "Deep Networks with Stochastic
    Depth" (arXiv 1603.09382).
    """
    _checks.choice("impl", impl, _choice.IMPLS)
    C = _rows(x, 2, "(B, ..., C)")
    dtype = x.dtype  # of the sum
    for name, value, wanted, meaning in (
        ("branch", branch, tuple(x.shape), "as x has"),
        ("branch_bias", branch_bias, (C,), "(C,)"),
        ("branch_scale", branch_scale, (x.shape[0],), "(B,)"),
    ):
        if value is not None or name == "branch":
            value = _checks.is_tensor(name, value, meaning)
            _checks.shape(name, value, wanted, meaning)
            _checks.promotes(name, value, "x", x)
            dtype = torch.promote_types(dtype, value.dtype)
    _check_norm(x, weight, bias, dtype)
    branch_scale = None if branch_scale is None else branch_scale.detach()
    tensors = (x, branch, branch_scale, branch_bias, weight, bias)
    if not _choice.use_triton("add_layer_norm", impl, tensors, _too_wide(x)):
        return reference.add_layer_norm(
            x, branch, weight, bias, branch_bias=branch_bias, branch_scale=branch_scale, eps=eps
        )
    return _OPS.add_layer_norm_triton_fwd(*tensors, eps, dtype, _normed_dtype(x, dtype))[:2]


def layer_norm_mean(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """``mean over tokens of (layer_norm(x) * weight + bias)``: the end of the model.

    Args:
        x: ``(B, ..., C)`` with at least one dimension of tokens, any floating-point dtype.
        weight, bias: ``(C,)``, the LayerNorm's parameters, of x's dtype, or both float32 beside float16 and bfloat16.
        eps: added to the variance.
        impl: see :func:`add_layer_norm`.

    Returns:
        ``(B, C)``, in the dtype that plain PyTorch gives it, under autocast too.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``models/nest_net.py`` (the norm and the mean before the head).
    """
    _checks.choice("impl", impl, _choice.IMPLS)
    _rows(x, 3, "(B, ..., C) with tokens")
    _check_norm(x, weight, bias, x.dtype)
    if not _choice.use_triton("layer_norm_mean", impl, (x, weight, bias), _too_wide(x)):
        return reference.layer_norm_mean(x, weight, bias, eps=eps)
    return _OPS.layer_norm_mean_triton_fwd(x, weight, bias, eps, _normed_dtype(x, x.dtype))[0]


def _rows(x: Tensor, rank: int, shape: str) -> int:
    """The channels of ``x``, whose shape is checked."""
    _checks.floating("x", _checks.is_tensor("x", x, shape))
    if x.dim() < rank:
        raise ValueError(f"x: wanted {rank} or more dimensions {shape}, got shape {tuple(x.shape)}")
    return x.shape[-1]


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        _checks.shape(name, _checks.is_tensor(name, value, "(C,)"), (x.shape[-1],), "(C,)")
    _checks.norm(weight, bias, x, dtype=dtype)


def _too_wide(x: Tensor) -> list[str]:
    return [f"C = {x.shape[-1]} channels are over {MAX_CHANNELS}"] if x.shape[-1] > MAX_CHANNELS else []


def _normed_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What layer_norm makes of ``dtype``: float32 under CUDA's autocast, which casts its input; the CPU's does not."""
    return torch.float32 if x.device.type == "cuda" and _checks.under_autocast(x) else dtype


# --- registration: add_layer_norm -------------------------------------------------------------------------------------


def _add_fwd(*args):
    from nest_fast.kernels import add_layer_norm as kernels

    return kernels.add_layer_norm_fwd(*args)


def _add_bwd(dtotal, dnormed, total, mean, rstd, branch_scale, weight, x_dtype, branch_dtype, need_dbranch_bias):
    from nest_fast.kernels import add_layer_norm as kernels

    dx, dbranch, dparams = kernels.add_layer_norm_bwd(
        dtotal, dnormed, total, mean, rstd, branch_scale, weight, (x_dtype, branch_dtype), need_dbranch_bias
    )
    return dx, total.new_empty(0, dtype=branch_dtype) if dbranch is None else dbranch, dparams


@torch.library.register_fake("nest_fast::add_layer_norm_triton_fwd", lib=_LIB)
def _add_fwd_fake(x, branch, branch_scale, branch_bias, weight, bias, eps, dtype, normed_dtype):
    statistics = [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=normed_dtype), *statistics


@torch.library.register_fake("nest_fast::add_layer_norm_triton_bwd", lib=_LIB)
def _add_bwd_fake(dtotal, dnormed, total, mean, rstd, branch_scale, weight, x_dtype, branch_dtype, need_dbranch_bias):
    same = branch_scale is None and x_dtype == branch_dtype
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(0 if same else total.shape, dtype=branch_dtype),
        total.new_empty((3 if need_dbranch_bias else 2, total.shape[-1]), dtype=torch.float32),
    )


def _add_setup(ctx, inputs, output):
    x, branch, branch_scale, branch_bias, weight, bias, *_ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, branch_scale, weight)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, branch_bias, weight, bias)]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_autograd(ctx, dtotal, dnormed, *_):
    if dtotal is None and dnormed is None:
        return (None,) * 9
    total, mean, rstd, branch_scale, weight = ctx.saved_tensors
    x_dtype, branch_dtype, branch_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
    need_dbranch_bias = ctx.needs_input_grad[3]
    dx, dbranch, dparams = _OPS.add_layer_norm_triton_bwd(
        dtotal, dnormed, total, mean, rstd, branch_scale, weight, x_dtype, branch_dtype, need_dbranch_bias
    )
    if branch_scale is None and x_dtype == branch_dtype:
        dbranch = dx  # a sum's terms have the same gradient
    dbranch_bias = dparams[2].to(branch_bias_dtype) if need_dbranch_bias else None
    return dx, dbranch, None, dbranch_bias, dparams[0].to(weight_dtype), dparams[1].to(bias_dtype), None, None, None


torch.library.register_autograd(
    "nest_fast::add_layer_norm_triton_fwd", _add_autograd, setup_context=_add_setup, lib=_LIB
)
torch.library.register_vmap(
    "nest_fast::add_layer_norm_triton_fwd", _vmap.batching_rule(_OPS.add_layer_norm_triton_fwd, 3, 6), lib=_LIB
)


# --- registration: layer_norm_mean ------------------------------------------------------------------------------------


def _mean_fwd(*args):
    from nest_fast.kernels import layer_norm_mean as kernels

    return kernels.layer_norm_mean_fwd(*args)


def _mean_bwd(*args):
    from nest_fast.kernels import layer_norm_mean as kernels

    return kernels.layer_norm_mean_bwd(*args)


@torch.library.register_fake("nest_fast::layer_norm_mean_triton_fwd", lib=_LIB)
def _mean_fwd_fake(x, weight, bias, eps, dtype):
    pooled = (x.shape[0], x.shape[-1])
    floats = [x.new_empty(shape, dtype=torch.float32) for shape in (pooled, x.shape[:-1], x.shape[:-1])]
    return x.new_empty(pooled, dtype=dtype), *floats


@torch.library.register_fake("nest_fast::layer_norm_mean_triton_bwd", lib=_LIB)
def _mean_bwd_fake(dout, x, normed_mean, mean, rstd, weight):
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _mean_setup(ctx, inputs, output):
    x, weight, bias, *_ = inputs
    _, *saved = output
    ctx.save_for_backward(x, *saved, weight)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _mean_autograd(ctx, dout, *_):
    if dout is None:
        return (None,) * 5
    dx, dparams = _OPS.layer_norm_mean_triton_bwd(dout, *ctx.saved_tensors)
    weight = ctx.saved_tensors[-1]
    return dx, dparams[0].to(weight.dtype), dparams[1].to(ctx.bias_dtype), None, None


torch.library.register_autograd(
    "nest_fast::layer_norm_mean_triton_fwd", _mean_autograd, setup_context=_mean_setup, lib=_LIB
)
for _op in ("add_layer_norm", "layer_norm_mean"):
    torch.library.register_autograd(f"nest_fast::{_op}_triton_bwd", _checks.no_double_backward(_op), lib=_LIB)
torch.library.register_vmap(
    "nest_fast::layer_norm_mean_triton_fwd", _vmap.batching_rule(_OPS.layer_norm_mean_triton_fwd, 1, 3), lib=_LIB
)

for _key in _triton.DISPATCH_KEYS:
    _LIB.impl("add_layer_norm_triton_fwd", _add_fwd, _key)
    _LIB.impl("add_layer_norm_triton_bwd", _add_bwd, _key)
    _LIB.impl("layer_norm_mean_triton_fwd", _mean_fwd, _key)
    _LIB.impl("layer_norm_mean_triton_bwd", _mean_bwd, _key)
