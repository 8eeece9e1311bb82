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
    branch_backward: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """The gradients of ``x + branch_scale * branch(layer_norm(x))`` for rows ``x`` ``(rows, C)``.

    ``branch_backward`` takes the gradient of the branch's output and its input, which is computed again, and returns
    the gradients of that input and of its parameters. Returns those of x, norm_weight, norm_bias and the parameters.
    """
    C = x.shape[1]
    y, mean, rstd = torch.native_layer_norm(x, (C,), norm_weight, norm_bias, eps)
    dbranch = dout if branch_scale == 1.0 else dout * branch_scale
    dy, *parameters = branch_backward(_checks.dense_rows(dbranch), y)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        dy, x, (C,), mean, rstd, norm_weight, norm_bias, [True] * 3
    )
    return dx.add_(dout), dnorm_weight, dnorm_bias, *parameters
