"""What the gradients of the layers in C++ share: the LayerNorm before the branch and the sum after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    output_mask: Sequence[bool],
    branch_backward: Callable[[Tensor, Tensor, list[bool]], tuple[Tensor, ...]],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``x + branch_scale * branch(layer_norm(x))`` for rows ``x`` ``(rows, C)``.

    ``output_mask``: which of them are wanted, of x, norm_weight, norm_bias, and weight and bias of the branch's two
    linear layers; the others are None and not computed. ``branch_backward`` takes the gradient of the branch's output,
    its input, which is computed again, and a mask of its own, and returns the gradients of that input and of the four.
    """
    C, norm_mask, linear_mask = x.shape[1], list(output_mask[:3]), list(output_mask[3:])
    y, mean, rstd = torch.native_layer_norm(x, (C,), norm_weight, norm_bias, eps)
    dbranch = dout if branch_scale == 1.0 else dout * branch_scale
    dy, *dlinear = branch_backward(_checks.dense_rows(dbranch), y, [any(norm_mask), *linear_mask])
    dx = dnorm_weight = dnorm_bias = None
    if any(norm_mask):  # None for what is not wanted
        dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dy, x, (C,), mean, rstd, norm_weight, norm_bias, norm_mask
        )
    asked = (gradient if wanted else None for gradient, wanted in zip(dlinear, linear_mask, strict=True))
    return None if dx is None else dx.add_(dout), dnorm_weight, dnorm_bias, *asked


def fake_branch_backward(x: Tensor, weights: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a branch's backward returns: the gradients of ``x`` and of each of ``weights`` (out, in) and its bias."""
    shapes = [x.shape, *(shape for weight in weights for shape in (weight.shape, weight.shape[:1]))]
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))
