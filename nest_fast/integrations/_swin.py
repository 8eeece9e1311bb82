"""What Swin v2 computes in every library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["cosine_scale"]

_LARGEST = math.log(100.0)


def cosine_scale(logit_scale: Tensor) -> Tensor:
    """The factors ``(heads,)`` of attention by cosines, of which the logarithms are learned."""
    return torch.clamp(logit_scale, max=_LARGEST).exp().flatten()
