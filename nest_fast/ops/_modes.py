"""What is on in PyTorch: autocast, torch.func, forward mode, tracing, compiling, gradients, tensors of a subclass.

``given`` is whatever an operation passes on: tensors first of all, with None, numbers and sizes between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# Tensors that kernels take: ordinary ones, and those of tracers, which the registrations provide for. How another
# subclass of torch.Tensor computes, only its owner knows.
TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
ORDINARY = TENSORS | {type(None), float, int, bool, tuple}
# The device types that autocast knows; it raises where it is asked about another, such as "meta".
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(kind)
)


def needs_plain(given: Iterable[object]) -> bool:
    """Whether "auto" has to be plain PyTorch, whatever kernels there are."""
    if is_compiling():
        return torch.onnx.is_in_onnx_export()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or subclass(given) is not None
    )


def in_functorch() -> bool:
    """Whether ``torch.func`` is transforming: its gradients cannot pass through a registered operation."""
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are on: a registered operation would lose them silently."""
    return not is_compiling() and forward_ad._current_level >= 0


def in_trace() -> bool:
    """Whether ``torch.jit.trace`` or ONNX's exporter records: they want operations that others know."""
    if is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._get_tracing_state() is not None


def is_eager() -> bool:
    """Whether what is computed now can be kept for later: nothing compiles, traces, transforms or fakes it."""
    return not (
        is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def subclass(given: Iterable[object]) -> type | None:
    """The first class of tensors among ``given`` that no kernel can take; None while compiling."""
    if is_compiling() or ORDINARY.issuperset(map(type, given)):
        return None
    return next((type(x) for x in given if isinstance(x, Tensor) and type(x) not in ORDINARY), None)


def wants_gradients(given: Sequence[object]) -> bool:
    """Whether autograd records what is computed from ``given``."""
    if not torch.is_grad_enabled():
        return False
    if is_compiling():  # it cannot trace PyTorch's own, faster way to ask
        return any(isinstance(x, Tensor) and x.requires_grad for x in given)
    return torch._C._any_requires_grad(*given)


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    kind = x.device.type
    return kind in _AUTOCAST and torch.is_autocast_enabled(kind)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, gives the matmuls of ``x``; otherwise that of ``x``."""
    if under_autocast(x) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast(x: Tensor) -> Tensor:
    """``x`` in its :func:`autocast_dtype`."""
    dtype = autocast_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)
