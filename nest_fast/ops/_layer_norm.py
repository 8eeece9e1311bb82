"""What the operations with a LayerNorm over the last dimension share."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast.ops import _backends, _checks, _modes
from nest_fast.ops._backends import Backend

IMPLS = ("auto", "reference", "triton")

MAX_CHANNELS = 4096

BACKENDS = {
    "triton": Backend(
        "triton",
        (
            *_backends.TRITON_PASS,
            (
                lambda given: f"C = {given[0].shape[-1]} channels are over {MAX_CHANNELS}",
                lambda given: given[0].shape[-1] > MAX_CHANNELS,
            ),
        ),
    )
}


def rows(x: Tensor, rank: int, shape: str) -> int:
    """The channels of ``x``, whose shape is checked."""
    _checks.floating("x", _checks.is_tensor("x", x, shape))
    if x.dim() < rank:
        raise ValueError(f"x: expected {rank} or more dimensions {shape}, got shape {tuple(x.shape)}")
    return x.shape[-1]


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        _checks.shape(name, _checks.is_tensor(name, value, "(C,)"), (x.shape[-1],), "(C,)")
    _checks.norm(weight, bias, x, dtype=dtype)


def normed_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of layer_norm's output: float32 under CUDA's autocast, which casts the input; the CPU's does not."""
    return torch.float32 if x.device.type == "cuda" and _modes.under_autocast(x) else dtype
