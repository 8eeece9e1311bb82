"""vmap for operations whose first dimension is a batch: what vmap hides becomes part of it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["fold", "unfold"]


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """``x`` with the hidden dimension ``dim`` of ``size`` (None: the same for all) in front of its batch."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def unfold(x: Tensor, size: int) -> Tensor:
    """The inverse on a result; the hidden dimension comes first."""
    return x.unflatten(0, (size, x.shape[0] // size))
