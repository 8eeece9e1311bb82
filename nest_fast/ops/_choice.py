"""Choices that several operations share: Triton or plain PyTorch for a pass, C++ or the library's own for a layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from nest_fast.ops import _checks, _extension, _triton

IMPLS = ("auto", "reference", "triton")
# What a kernel may be given; of another subclass of torch.Tensor only its owner knows how it computes.
TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor, type(None)))
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
    reasons = [*_triton.why_not(given[0]), *dtype_why_not(*(x.dtype for x in given)), *plain_why(*given), *others]
    if impl == "triton":
        require(op, impl, reasons)
        return True
    # A compiler that sees plain PyTorch makes the same single pass of it, and fuses what stands around it as well.
    if given[0].device.type != "cuda" or torch.compiler.is_compiling() or _checks.in_functorch() or plain_only(*given):
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
    if _checks.in_trace():
        reasons.append("torch.jit is tracing")
    if any(t is not None and t.numel() == 0 for t in (x, *weights)):
        reasons.append("there is nothing to compute")
    if x.dtype == torch.bfloat16 and _extension.has_amx:
        reasons.append("PyTorch's matmuls use the matrix unit, which the C++ kernels do not know")
    if torch.compiler.is_compiling() and wants_gradients(x, *weights):
        reasons.append("a compiler that sees plain PyTorch decides itself what to keep for the gradient")
    return reasons


def _layer_cannot(x: Tensor, weights: list[Tensor | None]) -> list[str]:
    return [*_extension.cpp_why_not("x", x), *dtype_why_not(x.dtype), *mode_why_not(x, *weights)]


def dtype_why_not(*dtypes: torch.dtype) -> list[str]:
    """Why kernels of KERNEL_DTYPES cannot take ``dtypes``."""
    strange = dict.fromkeys(dtype for dtype in dtypes if dtype not in KERNEL_DTYPES)
    return [f"dtype {dtype} is none of float32, float16, bfloat16" for dtype in strange]


def mode_why_not(x: Tensor, *others: Tensor | None) -> list[str]:
    """What is on in PyTorch that does not reach inside a kernel of a whole layer."""
    reasons = plain_why(x, *others)
    if _checks.in_functorch():
        reasons.append("torch.func is transforming")
    if _checks.under_autocast(x):
        reasons.append("autocast is on")
    return reasons


def plain_why(*tensors: Tensor | None) -> list[str]:
    """Why no kernel can take ``tensors``, whatever it is."""
    if torch.compiler.is_compiling():
        return []
    reasons = ["it has no forward-mode derivative"] if _checks.in_forward_mode() else []
    if not TENSORS.issuperset(map(type, tensors)):
        strange = next(type(x) for x in tensors if type(x) not in TENSORS)
        reasons.append(f"{strange.__name__} is a subclass of torch.Tensor")
    return reasons


def plain_only(*tensors: Tensor | None) -> bool:
    """Whether "auto" has to be plain PyTorch for ``tensors``."""
    return _checks.in_trace() or bool(plain_why(*tensors))


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
