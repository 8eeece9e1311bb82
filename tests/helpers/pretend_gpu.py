"""A GPU that is none: CPU tensors that say cuda:0, so that all is chosen as on such a GPU, with Triton's interpreter.

PyTorch's own dispatch sees CPU tensors: what it computes is right, and what only its CUDA kernels do is not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nest_fast.ops import _gpu

CUDA = torch.device("cuda", 0)


def _on_cpu(factory):
    """``factory`` with a CPU's memory where cuda is asked for."""

    def make(*args, device=None, **kwargs):
        return factory(*args, device="cpu" if device == CUDA else device, **kwargs)

    return make


# The name of an operation and the dtypes of what it returned, call by call.
Calls = list[tuple[str, list[torch.dtype]]]


class _Listen(TorchDispatchMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "nest_fast":
            self.calls.append((func.name().partition("::")[2], [x.dtype for x in tree_leaves(out)]))
        return out


@contextlib.contextmanager
def pretend_gpu(
    capability: tuple[int, int] = (9, 0),
    launch_error: str = "",
    autocast: torch.dtype | None = None,
    listens: bool = True,
) -> Iterator[Calls]:
    """Every tensor says cuda:0 inside; gives the calls of nest_fast's operations. ``autocast``: to this dtype.

    Where somebody ``listens`` to what PyTorch is given, nothing is done by a tape (ops/_tape.py).
    """
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    calls: Calls = []
    with contextlib.ExitStack() as stack:
        for name, value in (("device", CUDA), ("is_cuda", True), ("is_cpu", False)):
            stack.enter_context(mock.patch.object(torch.Tensor, name, property(lambda x, value=value: value)))
        stack.enter_context(mock.patch.object(torch.Tensor, "get_device", return_value=0))
        for name, value in (
            ("get_device_capability", lambda device=None: capability),
            ("get_device_properties", lambda device=None: properties),
            ("device_of", lambda x: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(_gpu, "_capability", return_value=capability))
        stack.enter_context(mock.patch.object(_gpu, "_launch_error", return_value=launch_error))
        for name in ("empty", "empty_like", "zeros", "arange", "eye"):
            stack.enter_context(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))))
        if autocast is not None:  # torch.autocast("cuda") refuses without a GPU; PyTorch's own matmuls see a CPU
            stack.enter_context(torch.autocast("cpu", autocast))
            torch.set_autocast_dtype("cuda", autocast)
            torch.set_autocast_enabled("cuda", True)
            stack.callback(torch.set_autocast_enabled, "cuda", False)
        if listens:
            stack.enter_context(_Listen(calls))
        yield calls
