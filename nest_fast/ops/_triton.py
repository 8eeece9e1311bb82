"""Whether Triton can run here. Triton itself is imported only when one of its kernels is launched."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

# Triton reads the same variable: under it kernels are interpreted, on CPU tensors too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
DISPATCH_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


def why_not(x: Tensor) -> list[str]:
    """The reasons why a Triton kernel cannot take ``x``; none if it can."""
    reasons = [] if INSTALLED else ["triton is not installed"]
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        reasons.append(f"the tensor is on {x.device}, and TRITON_INTERPRET=1 is not set")
    return reasons
