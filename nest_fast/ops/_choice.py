"""The choice between Triton and plain PyTorch, for the passes between the matmuls."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from nest_fast.ops import _checks, _triton

IMPLS = ("auto", "reference", "triton")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def use_triton(op: str, impl: str, tensors: Iterable[Tensor | None], others: Iterable[str] = ()) -> bool:
    """Whether ``impl`` means the Triton kernels of ``op``; an error where it names them and they cannot run.

    Args:
        op: the operation, for messages.
        impl: one of IMPLS.
        tensors: what the kernel would read, the first of them on the device that decides.
        others: reasons against the kernel that only the operation knows.
    """
    if impl == "reference":
        return False
    given = [x for x in tensors if x is not None]
    strange = dict.fromkeys(x.dtype for x in given if x.dtype not in _KERNEL_DTYPES)
    reasons = _triton.why_not(given[0])
    reasons += [f"dtype {dtype} is none of float32, float16, bfloat16" for dtype in strange] + list(others)
    if impl == "triton":
        if reasons:
            raise RuntimeError(f"impl: {impl!r} cannot run {op} here: {'; '.join(reasons)}")
        return True
    # A compiler that sees plain PyTorch makes the same single pass of it, and fuses what stands around it as well.
    if given[0].device.type != "cuda" or torch.compiler.is_compiling() or _checks.in_functorch():
        return False
    if reasons:
        _say_once(f"{op} runs plain PyTorch, since for triton {'; '.join(reasons)}")
    return not reasons


_SAID: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, stacklevel=4)
