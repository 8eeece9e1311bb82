"""Tensors in the memory layouts that kernels take."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not dense.

    Not by ``contiguous``, which leaves any strides to a tensor without elements or with one in its last dimension.
    """
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor | None) -> Tensor | None:
    """``x``, a vector, contiguous."""
    return x if x is None else x.contiguous()
