"""What the gradients of the layers in C++ share: the LayerNorm before the branch and the sum after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nest_fast.ops import _checks


def layer_backward(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    branch_scale: float,
    biases: tuple[bool, bool],
    branch_backward: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``x + branch_scale * branch(layer_norm(x))`` for rows ``x`` ``(rows, C)``.

    ``branch_backward`` takes the gradient of the branch's output and its input, which is computed again, and returns
    the gradients of that input and of the weight and bias of its two linear layers; ``biases``: which of them have one.
    Returns those of x, norm_weight, norm_bias, and weight and bias of both, None for a bias that is missing.
    """
    C = x.shape[1]
    y, mean, rstd = torch.native_layer_norm(x, (C,), norm_weight, norm_bias, eps)
    dbranch = dout if branch_scale == 1.0 else dout * branch_scale
    dy, dweight_1, dbias_1, dweight_2, dbias_2 = branch_backward(_checks.dense_rows(dbranch), y)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        dy, x, (C,), mean, rstd, norm_weight, norm_bias, [True] * 3
    )
    first, second = (dbias if given else None for dbias, given in zip((dbias_1, dbias_2), biases, strict=True))
    return dx.add_(dout), dnorm_weight, dnorm_bias, dweight_1, first, dweight_2, second


def fake_branch_backward(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """What a branch's backward returns: the gradients of ``x`` and of each of ``weights`` (out, in) and its bias."""
    shapes = [shape for weight in weights for shape in (weight.shape, weight.shape[:1])]
    return x.new_empty(x.shape), *(x.new_empty(shape) for shape in shapes)
