"""Tensors in the memory layouts that kernels take."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not dense.

    Not by ``contiguous``, which leaves any strides to a tensor without elements or with one in its last dimension.
    """
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x``, a vector, contiguous, and of ``dtype`` where one is given."""
    if x is None:
        return None
    return (x if dtype is None else x.to(dtype)).contiguous()
