"""What a function did with its tensors, written down and done again with others of the same kinds.

An eager layer of a few images waits for Python: the questions that lead to a kernel cost several times its launch.
Where all answers are known to be what they were, a :class:`torch.fx.Graph` of PyTorch's functions and of launches
stands in for the function. It is written by calling the function once more, as it is: only of calls whose outputs
depend on nothing but their arguments, and only of tensors that were given or made on the way; of anything else there is
no tape. Writing takes some milliseconds, so nothing is written that is seen for the first time.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from nest_fast.ops import _extension, _modes, _tuned

__all__ = ["again", "call", "modes"]

MAX_TAPES = 1024  # after which no more are written: some 10 KB each
# By key; None: what was done could not be written down.
TAPES: dict[Hashable, Callable[..., Any] | None] = {}
MAX_SEEN = 4096  # of which the oldest is forgotten
SEEN: dict[Hashable, None] = {}  # keys that were asked for once
_ORDINARY = frozenset((Tensor, nn.Parameter))
_written = -1  # at this _tuned.age()

# Functions of their arguments alone, which write none of them.
_PURE = frozenset(
    (
        *(F.linear, F.layer_norm, torch.layer_norm, F.scaled_dot_product_attention, torch._addmm_activation, F.gelu),
        *(torch.empty, Tensor.new_empty, Tensor.contiguous, Tensor.to, Tensor.float),
        *(Tensor.add, torch.addcmul, Tensor.mul),
        *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze),
        *(Tensor.transpose, Tensor.permute, Tensor.t, Tensor.expand, Tensor.expand_as, Tensor.split),
        *(Tensor.split_with_sizes, Tensor.unbind),
    )
)
# Questions about a tensor's kind, with answers that are no tensors.
_QUESTIONS = frozenset(
    (
        *("__get__", "data_ptr", "dim", "get_device", "is_contiguous", "is_floating_point", "is_neg", "numel", "size"),
        *("promote_types", "stride"),
    )
)


def modes(x: Tensor) -> Hashable | None:
    """What is on, a part of a key; None where nothing is done again: a mode changes it, or somebody looks on."""
    if (
        type(x) in _ORDINARY
        and _modes.is_eager()
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not _modes.under_autocast(x)
        and not torch._C._len_torch_function_stack()
        and not torch.autograd._profiler_enabled()
        and not _tuned.is_watched()
    ):
        return torch.backends.cuda.matmul.fp32_precision
    return None


def call(function: Callable[..., Any], x: Tensor, *tensors: Tensor | None, **options: Any) -> Any:
    """``function(x, *tensors, **options)`` of an operation; options are tensors, dicts of them, and what has a hash."""
    on = modes(x)
    if on is None:
        return function(x, *tensors, **options)
    given, settings = [x, *tensors], []
    for option in options.values():
        if isinstance(option, Tensor):
            given.append(option)
        elif isinstance(option, dict):
            if not option:  # it is filled now
                return function(x, *tensors, **options)
            given += option.values()
        else:
            settings.append(option)
    return again((on, function, *options, *settings), given, partial(function, x, *tensors, **options))


def again(key: Hashable, tensors: Sequence[Any], compute: Callable[[], Any]) -> Any:
    """``compute()``: a tensor, or a tuple of them and of None, made of ``tensors``.

    Args:
        key: all that it depends on beside tensors, :func:`modes` included.
        tensors: those that it reads, and None; the first is one, whose device launches are for.
        compute: called the first two times, and where it does what cannot be written down.
    """
    global _written
    if _written != _tuned.age():
        TAPES.clear()
        _written = _tuned.age()
    key = key, *map(_kind, tensors)
    tape = TAPES.get(key)
    if tape is not None:
        with torch.cuda.device_of(tensors[0]):
            return tape(*tensors)
    if key in TAPES or len(TAPES) >= MAX_TAPES or is_new(key):
        return compute()
    recorder = _Recorder(tensors)
    with recorder:
        out = recorder.launches(compute, tensors[0].is_cuda)
    TAPES[key] = recorder.tape(out)
    return out


def is_new(key: Hashable) -> bool:
    """Whether it is asked for the first time, or was not for long."""
    if key in SEEN:
        del SEEN[key]
        return False
    if len(SEEN) >= MAX_SEEN:
        SEEN.pop(next(iter(SEEN)), None)
    SEEN[key] = None
    return True


_LAUNCHES = "nest_fast.kernels._launch"
_DTYPE_AND_SHAPE = operator.attrgetter("dtype", "shape")


def _kind(x: Tensor | None) -> Hashable:
    """What a tape depends on of a tensor."""
    if x is None:
        return None
    # The address is asked for in a way that does not count as writing, which memory that is copied on write would show.
    return _DTYPE_AND_SHAPE(x), x.stride(), x.get_device(), torch._C._data_address(x) & 15, x.is_neg()  # type: ignore[attr-defined]


def _below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """Of what has no gradient now; autograd's Python costs more than an operation on little."""

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


class _Unknown(Exception):
    """A tensor that was neither given nor made on the way."""


class _Recorder(TorchFunctionMode):
    """Writes a graph of what is done with ``tensors`` while it is entered."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []  # so that no other tensor has its id
        # Of a tensor that was given twice, it would not be known which is read.
        self.is_whole = len({id(x) for x in tensors if x is not None}) == sum(x is not None for x in tensors)
        for i, x in enumerate(tensors):
            self.know(x, self.graph.placeholder(f"given_{i}"))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        if function in _PURE or getattr(function, "namespace", "") == "nest_fast":
            if not all(id(x) in self.nodes for x in made):  # or it returned what it was given
                self.write(function, args, kwargs or {}, out)
        elif made or getattr(function, "__name__", "") not in _QUESTIONS:
            self.is_whole = False
        return out

    def launches(self, compute: Callable[[], Any], on_gpu: bool) -> Any:
        """``compute()``, whose launches are written down, too; Triton is imported for a GPU only."""
        if not (_extension.has_triton and (on_gpu or _LAUNCHES in sys.modules)):
            out = compute()
            self.is_whole &= _LAUNCHES not in sys.modules
            return out
        from nest_fast.kernels import _launch

        with _launch.recorded(lambda launch, args: self.write(launch, args, {}, None)):
            return compute()

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        if isinstance(function, torch._ops.OpOverload):
            function = _below_autograd(function)
        try:
            node = self.graph.call_function(function, self.slots(args), self.slots(kwargs))
        except _Unknown:
            self.is_whole = False
            return
        if isinstance(out, Tensor):
            self.know(out, node)
        for i, x in enumerate(out if isinstance(out, (tuple, list)) else ()):
            self.know(x, self.graph.call_function(operator.getitem, (node, i)))

    def know(self, x: Tensor | None, node: fx.Node) -> None:
        if x is not None:
            self.nodes[id(x)] = node
            self.alive.append(x)

    def slots(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.nodes:
                raise _Unknown
            return self.nodes[id(value)]
        if isinstance(value, (tuple, list)):
            slots = map(self.slots, value)
            return type(value)(*slots) if hasattr(value, "_fields") else tuple(slots)
        return {name: self.slots(x) for name, x in value.items()} if isinstance(value, dict) else value

    def tape(self, out: Any) -> Callable[..., Any] | None:
        """What does it again; None where not all of it was written down."""
        try:
            self.graph.output(self.slots(out))
        except _Unknown:
            return None
        if not self.is_whole:
            return None
        code = self.graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)
        return partial(names["forward"], None)
