"""vmap for operations whose first dimension is a batch: the dimension that vmap hides is folded into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["batching_rule", "fold", "unfold"]


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """``x`` with the hidden dimension ``dim`` of ``size`` (None: the same for all) in front of its batch."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def unfold(x: Tensor, size: int) -> Tensor:
    """The inverse on a result; the hidden dimension comes first."""
    return x.unflatten(0, (size, x.shape[0] // size))


def batching_rule(op: Callable[..., tuple[Tensor, ...]], batched: int, tensors: int) -> Callable:
    """The vmap of ``op``, whose first ``batched`` arguments have a batch dimension; up to ``tensors`` are parameters.

    Any of them may be None, and all outputs have a batch dimension.
    """

    def vmap(info, in_dims, *args):
        size = info.batch_size
        if all(dim is None for dim in in_dims[batched:tensors]):
            pairs = zip(args[:batched], in_dims, strict=False)
            folded = [x if x is None else fold(x, dim, size) for x, dim in pairs]
            outs = [unfold(out, size) for out in op(*folded, *args[batched:])]
        else:  # the kernel knows one set of parameters, so one call each
            pairs = zip(args[:tensors], in_dims, strict=False)
            slices = [[x] * size if dim is None else x.unbind(dim) for x, dim in pairs]
            calls = [op(*one, *args[tensors:]) for one in zip(*slices, strict=True)]
            outs = [torch.stack(out) for out in zip(*calls, strict=True)]
        return tuple(outs), (0,) * len(outs)

    return vmap
