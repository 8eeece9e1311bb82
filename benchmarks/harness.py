"""What the benchmarks share: cases, their inputs and peers, the clock, and the check that comes before a time is taken.

A *case* is an operation or model at one shape, dtype and direction; a *peer* is one way to compute it. All peers of a
case get the same inputs, and each is held against float64 before it is timed, beside the case's *yardstick*.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nest_fast.ops._extension import onednn_dtypes
from nest_fast.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Where oneDNN has no bfloat16, PyTorch takes tens of times as long in it as in float32: nobody's yardstick.
DTYPES = (torch.float32, torch.bfloat16)[: 2 if DEVICE == "cuda" or torch.bfloat16 in onednn_dtypes else 1]
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}

Run = Callable[..., tuple[Tensor, ...]]  # the inputs of a case → its results: the output, then any gradients
Peers = Mapping[str, Callable[[], Run]]  # name → what builds it, called when its turn comes


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, at which shape, in which dtype and direction; of a scaling curve, where on its ``axis``."""

    op: str
    name: str
    batch: int
    dtype: torch.dtype
    backward: bool = False
    axis: str = ""
    x: int = 0

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def run(self, function: Callable[..., Tensor]) -> Run:
        """``function`` in the case's direction."""
        return with_gradients(function) if self.backward else forward(function)

    def __str__(self) -> str:
        return f"{self.op} {self.name} B{self.batch} {SHORT[self.dtype]} {self.direction}"


# Bytes that the largest cases take, timm's NesT-B in training at its full batch, which keeps its scores in fp32, and
# NesT-T at this batch.
LARGEST, FULL_BATCH = 70 << 30, 1024


def fitting(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, on a GPU with less than LARGEST free with batches halved until they should fit; of a curve over the
    batch those points that do."""
    halvings = 0
    if DEVICE == "cuda":
        halvings = max(0, math.ceil(math.log2(LARGEST / torch.cuda.mem_get_info()[0])))
    for case in cases:
        if case.axis != "batch":
            yield replace(case, batch=max(1, case.batch >> halvings))
        elif case.batch <= FULL_BATCH >> halvings:
            yield case


def parametrize(cases: Iterable[Case], peers: Callable[[Any], Iterable[str]]) -> pytest.MarkDecorator:
    """A test of ``(case, peer)`` for every case and each of its peers, the peers of a case one after the other."""
    pairs = [(case, peer) for case in fitting(cases) for peer in peers(case)]
    ids = [f"{case} {peer}".replace(" ", "-") for case, peer in pairs]
    return pytest.mark.parametrize(("case", "peer"), pairs, ids=ids)


@dataclass
class Problem:
    """The inputs of a case, the right results, and the implementations that are compared.

    Args:
        inputs: what every peer is called with; the first one has the batch.
        has_batch: for each input whether its first dimension is the batch.
        per_sample_results: how many of the results have the batch, too; the others are summed over it.
        exact: computes the results, given ``inputs`` in float64.
        yardstick: the peer whose time and error the others are set against.
        peers: the implementations, the yardstick first.
        limits: peers that show how fast the hardware is, and do not compute the right thing.
        items: images in ``inputs``; 0 for an operation.
        count_bytes: whether the bytes of inputs and results say anything about the time (not so for a whole model).
        has_maxpool: whether gradients pass through a max-pool.
        chunk_size: samples that ``exact`` is given at a time.
        seconds: what timing one peer may take, its share of the yardstick included; three rounds are made anyway.
        beside: of a comparison of two models: the problem that peers other than the yardstick solve and are held to.
    """

    inputs: tuple[Tensor, ...]
    has_batch: tuple[bool, ...]
    per_sample_results: int
    exact: Run
    yardstick: str
    peers: Peers
    limits: frozenset[str] = frozenset()
    items: int = 0
    count_bytes: bool = True
    has_maxpool: bool = False
    chunk_size: int = 8
    seconds: float = 0.2
    beside: Problem | None = None
    flops: int = field(init=False, default=0)

    def solved_by(self, peer: str) -> Problem:
        """What ``peer`` computes: this, or what stands beside it."""
        return self if self.beside is None or peer == self.yardstick else self.beside

    @cached_property
    def golden(self) -> list[Tensor]:
        """The results in float64, a few samples at a time, so that they fit; counts the operations on the way."""
        chunks = []
        with FlopCounterMode(display=False) as counter:
            for start in range(0, self.inputs[0].shape[0], self.chunk_size):
                part = slice(start, start + self.chunk_size)
                cut = (x[part] if batch else x for x, batch in zip(self.inputs, self.has_batch, strict=True))
                chunks.append([y.detach() for y in self.exact(*(x.double() for x in cut))])
        self.flops = counter.get_total_flops()
        results = enumerate(zip(*chunks, strict=True))
        return [torch.cat(parts) if i < self.per_sample_results else sum(parts[1:], parts[0]) for i, parts in results]

    def errors(self, results: Sequence[Tensor]) -> list[float]:
        """Relative L2 errors of the results; gradients of parameters count as one vector, as an optimizer sees them."""
        n = self.per_sample_results
        pairs = list(zip(results[:n], self.golden[:n], strict=True))
        if len(results) > n:
            ours, golden = (torch.cat([y.flatten() for y in x[n:]]) for x in (results, self.golden))
            pairs.append((ours, golden))
        return [relative_error(y, golden) for y, golden in pairs]

    @cached_property
    def yardstick_run(self) -> Run:
        return self.peers[self.yardstick]()

    @cached_property
    def yardstick_errors(self) -> list[float]:
        results = self.yardstick_run(*self.inputs)
        errors, sane = self.errors(results), SANE[results[0].dtype]
        assert all(error <= sane for error in errors), f"{self.yardstick} itself is {errors} off, allowed {sane}"
        return errors

    @cached_property
    def yardstick_timed(self) -> Timed:
        return Timed(self.yardstick_run, self.inputs, graph=self.count_bytes)

    @property
    def bytes_read(self) -> int:
        """Each input once, and once more in a backward pass."""
        if not self.count_bytes:
            return 0
        again = sum(x.nbytes for x in self.inputs[:-1]) if len(self.golden) > 1 else 0
        return sum(x.nbytes for x in self.inputs) + again

    @property
    def bytes_written(self) -> int:
        """Each result once."""
        return sum(y.numel() for y in self.golden) * self.inputs[0].element_size() if self.count_bytes else 0


# --- what is right ----------------------------------------------------------------------------------------------------

# A peer may be this much further from float64 than the yardstick, plain PyTorch in the same dtype.
FACTOR = {torch.float32: 3.0, torch.float16: 2.0, torch.bfloat16: 2.0}
# And a yardstick further off than this measures something else.
SANE = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.5}
# Rounding may change which of two nearly equal values a max-pool takes, and with it where a gradient goes: right
# answers differ by this much if one window in 100,000 does. (In half precision the yardstick has such errors, too.)
FLIPS = math.sqrt(2 * 1e-5)


def check(problem: Problem, results: Sequence[Tensor]) -> list[float]:
    """The errors of ``results``, or an assertion that says which one is too large."""
    errors, factor = problem.errors(results), FACTOR[results[0].dtype]
    for i, (error, plain) in enumerate(zip(errors, problem.yardstick_errors, strict=True)):
        what = "output" if i == 0 else f"gradient {i}"
        bound = factor * plain + (FLIPS if problem.has_maxpool and i > 0 else 0.0)
        assert error <= bound, f"{what}: error {error:.1e}, {problem.yardstick}'s {plain:.1e}, allowed {bound:.1e}"
    return errors


# --- directions -------------------------------------------------------------------------------------------------------


def forward(function: Callable[..., Tensor]) -> Run:
    """``function`` without gradients: ``(*inputs)`` → ``(output,)``."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    return run


def with_gradients(function: Callable[..., Tensor]) -> Run:
    """``(*inputs, dout)`` → output and the gradients of all inputs."""

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        *inputs, dout = args
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))

    return run


def with_parameter_gradients(model: nn.Module, call: Callable[..., Tensor]) -> Run:
    """``(images, dout)`` → output of ``call`` and the gradients of the parameters of ``model``, in sorted order."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]

    def run(images: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = call(images)
        return (out, *torch.autograd.grad(out, parameters, dout.to(out.dtype)))

    return run


def compiled(function: Callable, mode: str = "default") -> Callable:
    """``torch.compile`` for one shape and in one graph, or an error; what was compiled before is forgotten."""
    torch.compiler.reset()  # else the recompile limit would silently hand out eager code
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


COMPILE_MODES = {"torch.compile": "default"}
if DEVICE == "cuda":
    # Without its own CUDA graphs, since every peer here is replayed from one.
    COMPILE_MODES["torch.compile max-autotune"] = "max-autotune-no-cudagraphs"


def compiled_peers(case: Case, function: Callable[..., Tensor]) -> Peers:
    """``torch.compile`` of the plain ``function``, in every mode that is worth a row on this device."""

    def peer(mode: str) -> Callable[[], Run]:
        return lambda: case.run(compiled(function, mode))

    return {name: peer(mode) for name, mode in COMPILE_MODES.items()}


def impl_peers(case: Case, impls: Sequence[str], function: Callable[[str], Callable[..., Tensor]]) -> Peers:
    """A peer for each ``impl`` of an operation; "nest_fast" alone is the automatic choice, what a user gets."""

    def peer(impl: str) -> Callable[[], Run]:
        return lambda: case.run(function(impl))

    named = {"nest_fast" if impl == "auto" else f"nest_fast {impl}": impl for impl in impls if impl != "reference"}
    return {name: peer(impl) for name, impl in named.items()}


def runs_our_operators(run: Run, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a call of ``run`` reaches a kernel of nest_fast's, or is plain PyTorch on this device."""
    with torch.autograd.profiler.profile() as profiler:
        run(*inputs)
    return any(event.name.startswith("nest_fast::") for event in profiler.function_events)


# --- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """A timer for pytest-benchmark, in seconds per call, where a round makes ``calls`` calls.

    On CUDA it is the device's time: an event recorded and waited for, which is also the synchronisation.
    """

    def __init__(self) -> None:
        self.calls = 1
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        if DEVICE == "cpu":
            return time.perf_counter() / self.calls
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._event is not None:
            # Added up from one event to the next: CUDA's elapsed time is a float32 and coarse over minutes.
            self._seconds += self._event.elapsed_time(event) / 1e3
        self._event = event
        return self._seconds / self.calls

    def time(self, function: Callable[[], object], calls: int = 1) -> float:
        self.calls = calls
        start = self()
        function()
        return self() - start

    def __repr__(self) -> str:
        return "CUDA events" if DEVICE == "cuda" else "time.perf_counter"


CLOCK = Clock()
SETTLED_SECONDS = 0.5
ROUND_SECONDS = 1e-3  # a round takes at least this long, so that the clock and the launch do not matter


class Timed:
    """A peer with its inputs, ready to be called for one round; ``calls`` of ``run`` each.

    Args:
        run: the peer, warm.
        inputs: what it is called with.
        graph: on CUDA, replay the round from a CUDA graph, so that no launch is timed, on inputs that take turns, so
            that none is left in the L2 cache from the call before.
    """

    def __init__(self, run: Run, inputs: tuple[Tensor, ...], graph: bool) -> None:
        self.run = run
        self.inputs = [inputs]
        self.calls = 1
        self.seconds = CLOCK.time(self._loop)
        self.calls = max(1, math.ceil(ROUND_SECONDS / self.seconds))
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph and DEVICE == "cuda":
            cache = 2 * torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
            turns = min(self.calls, 1 + cache // sum(x.nbytes for x in inputs))
            self.inputs += [tuple(x.clone() for x in inputs) for _ in range(turns - 1)]
            self.graph = self._capture()
        if self.calls > 1:
            self.seconds = CLOCK.time(self, self.calls)

    def __call__(self) -> None:
        if self.graph is None:
            self._loop()
        else:
            self.graph.replay()

    @property
    def is_short(self) -> bool:
        """Whether what another peer left matters: on a CPU its data in the caches, and its threads that still spin."""
        return DEVICE == "cpu" and self.seconds < SETTLED_SECONDS

    @property
    def round_seconds(self) -> float:
        return self.seconds * (self.calls + self.is_short)

    def settle(self) -> None:
        """A call that is not timed, where that matters."""
        if self.is_short:
            self.run(*self.inputs[0])

    def _loop(self) -> None:
        for i in range(self.calls):
            self.run(*self.inputs[i % len(self.inputs)])

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._loop()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loop()
        return graph


def peak_memory(run: Run, inputs: tuple[Tensor, ...]) -> int:
    """Bytes ``run`` needs beside its inputs: the peak on CUDA; elsewhere what the forward saves for the backward."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    given = {x.untyped_storage().data_ptr() for x in inputs}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        parameter = x.is_leaf and x.requires_grad  # which is there anyway
        if not parameter and storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(*inputs)
    return sum(saved.values())
