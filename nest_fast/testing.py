"""Oracles for tests and benchmarks: errors against fp64, and timm beside a CPU-only torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["assert_as_accurate", "gradients", "import_timm", "max_error", "relative_error"]


def max_error(x: Tensor, golden: Tensor) -> float:
    """``max |x - golden|`` in float64; NaN where the two differ in being NaN."""
    x, golden = x.detach().double(), golden.detach().double()
    difference = (x - golden).abs()
    # Equal infinities and NaN on both sides are agreement; NaN on one side stays NaN and fails every bound.
    same = (x == golden) | (x.isnan() & golden.isnan())
    return difference.masked_fill(same, 0.0).max().item() if difference.numel() else 0.0


def relative_error(x: Tensor, golden: Tensor) -> float:
    """``||x - golden|| / ||golden||`` (L2) in float64."""
    x, golden = x.detach().double(), golden.detach().double()
    return ((x - golden).norm() / golden.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_as_accurate(kernel: Tensor, plain: Tensor, golden: Tensor, factor: float, what: str = "output") -> None:
    """Assert ``e(kernel) <= factor * e(plain) + 2 * eps * max|golden|``, the second term in half precision only.

    Args:
        kernel: the result under test.
        plain: plain PyTorch's result in the same dtype.
        golden: the result in float64 from the same (rounded) inputs.
        factor: how much worse than ``plain`` the kernel may be.
        what: named in the message, with both errors.
    """
    assert kernel.shape == golden.shape, f"{what}: shape {tuple(kernel.shape)}, expected {tuple(golden.shape)}"
    assert kernel.dtype == plain.dtype, f"{what}: dtype {kernel.dtype}, expected {plain.dtype}"
    ours, theirs = max_error(kernel, golden), max_error(plain, golden)
    band = 0.0
    if kernel.dtype in (torch.float16, torch.bfloat16) and golden.numel():
        band = 2 * torch.finfo(kernel.dtype).eps * golden.abs().max().item()
    bound = factor * theirs + band
    assert ours <= bound, f"{what}: error {ours:.3e}, plain PyTorch's {theirs:.3e}, allowed {bound:.3e}"


def gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """The output of ``function(*inputs)`` and the gradients of all ``inputs`` for the output gradient ``dout``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def import_timm() -> ModuleType:
    """timm, also where torchvision is a CUDA build whose operators cannot load beside a CPU-only torch.

    torchvision then imports as soon as the schemas it decorates exist; timm uses none of its operators for NesT.
    """
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP_ALIVE.append(library)
    import timm
    import timm.models.nest

    return timm


_KEEP_ALIVE: list[torch.library.Library] = []
