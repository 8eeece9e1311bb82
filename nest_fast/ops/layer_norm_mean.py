"""LayerNorm and the mean over tokens after it in one pass: the end of the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _layer_norm, _tuned
from nest_fast.ops._backends import choose_pass
from nest_fast.ops._layer_norm import BACKENDS, IMPLS
from nest_fast.ops._register import operation

__all__ = ["layer_norm_mean"]


@_tuned.tunable
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
    given = Given(x, weight, bias)
    _check(*given, impl)
    if impl == "auto":
        impl = choose_pass("layer_norm_mean", BACKENDS["triton"], given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("layer_norm_mean", given)
    if impl == "reference":
        return reference.layer_norm_mean(x, weight, bias, eps=eps)
    return _TRITON(x, weight, bias, eps, _layer_norm.normed_dtype(x, x.dtype))[0]


class Given(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor


def _check(x: Tensor, weight: Tensor, bias: Tensor, impl: str) -> None:
    _checks.choice("impl", impl, IMPLS)
    _layer_norm.rows(x, 3, "(B, ..., C) with tokens")
    _layer_norm.check_norm(x, weight, bias, x.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, weight, bias, eps, dtype):
    pooled = (x.shape[0], x.shape[-1])
    floats = [x.new_empty(shape, dtype=torch.float32) for shape in (pooled, x.shape[:-1], x.shape[:-1])]
    return x.new_empty(pooled, dtype=dtype), *floats


def _bwd_fake(dout, x, normed_mean, mean, rstd, weight):
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _gradients(kept, dout):
    dx, dparams = _TRITON_BWD(dout, kept.x, kept.normed_mean, kept.mean, kept.rstd, kept.weight)
    return {"x": dx, "weight": dparams[0], "bias": dparams[1]}


_TRITON = operation(
    "layer_norm_mean_triton_fwd(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor out, Tensor normed_mean, Tensor mean, Tensor rstd)",
    launch="layer_norm_mean.layer_norm_mean_fwd",
    fake=_fake,
    saved=("x", "weight", "normed_mean", "mean", "rstd"),
    gradients=_gradients,
)
_TRITON_BWD = operation(
    "layer_norm_mean_triton_bwd(Tensor dout, Tensor x, Tensor normed_mean, Tensor mean, Tensor rstd, Tensor weight)"
    " -> (Tensor dx, Tensor dparams)",
    launch="layer_norm_mean.layer_norm_mean_bwd",
    fake=_bwd_fake,
    backward_of="layer_norm_mean",
)
