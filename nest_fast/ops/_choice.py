"""Choices that several operations share: Triton or plain PyTorch for a pass, C++ or the library's own for a layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from nest_fast.ops import _checks, _extension, _triton

IMPLS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    reasons = [*_triton.why_not(given[0]), *dtype_why_not(*(x.dtype for x in given)), *forward_mode_why_not(), *others]
    if impl == "triton":
        require(op, impl, reasons)
        return True
    # A compiler that sees plain PyTorch makes the same single pass of it, and fuses what stands around it as well.
    if given[0].device.type != "cuda" or torch.compiler.is_compiling() or _checks.in_functorch():
        return False
    if reasons:
        say_once(f"{op} runs plain PyTorch, since for triton {'; '.join(reasons)}")
    return not reasons


def use_layer(op: str, impl: str, x: Tensor, weights: list[Tensor | None]) -> bool:
    """Whether ``impl``, "auto" or "cpp", means the C++ kernel of the layer ``op``; an error if that cannot run."""
    if impl == "cpp":
        require(op, impl, _layer_cannot(x, weights))
        return True
    return not layer_why_not(x, weights)


def layer_why_not(x: Tensor, weights: list[Tensor | None]) -> list[str]:
    """Why "auto" does not take the C++ kernel of a layer."""
    reasons = _layer_cannot(x, weights)
    if any(t is not None and t.numel() == 0 for t in (x, *weights)):
        reasons.append("there is nothing to compute")
    if x.dtype == torch.bfloat16 and _extension.has_amx:
        reasons.append("PyTorch's matmuls use the matrix unit, which the C++ kernels do not know")
    if torch.compiler.is_compiling() and wants_gradients(x, *weights):
        reasons.append("a compiler that sees plain PyTorch decides itself what to keep for the gradient")
    return reasons


def _layer_cannot(x: Tensor, weights: list[Tensor | None]) -> list[str]:
    return [*_extension.cpp_why_not("x", x), *dtype_why_not(x.dtype), *mode_why_not(x)]


def dtype_why_not(*dtypes: torch.dtype) -> list[str]:
    """Why kernels of KERNEL_DTYPES cannot take ``dtypes``."""
    strange = dict.fromkeys(dtype for dtype in dtypes if dtype not in KERNEL_DTYPES)
    return [f"dtype {dtype} is none of float32, float16, bfloat16" for dtype in strange]


def mode_why_not(x: Tensor) -> list[str]:
    """What is on in PyTorch that does not reach inside a kernel."""
    reasons = forward_mode_why_not()
    if _checks.in_functorch():
        reasons.append("torch.func is transforming")
    if torch.is_autocast_enabled(x.device.type):
        reasons.append("autocast is on")
    return reasons


def forward_mode_why_not() -> list[str]:
    return ["it has no forward-mode derivative"] if _checks.in_forward_mode() else []


def require(op: str, impl: str, reasons: list[str]) -> None:
    """An error where there are reasons why ``impl``, which was asked for, cannot run ``op``."""
    if reasons:
        raise RuntimeError(f"impl: {impl!r} cannot run {op} here: {'; '.join(reasons)}")


def wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


_SAID: set[str] = set()


def say_once(message: str) -> None:
    """Warn at the line that called the operation; the operation calls the function that calls this one."""
    if message not in _SAID and not torch.compiler.is_compiling():
        _SAID.add(message)
        warnings.warn(message, stacklevel=4)
