"""What is fastest here: every implementation that a model's operations could take, checked and measured on the spot."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nest_fast.ops import _tuned
from nest_fast.testing import relative_error

__all__ = ["Measured", "Tuning", "tune"]

SAMPLES = 2  # of a batch, on which an implementation is checked
ROUNDS = 9
GAIN = 1.03  # what a choice must gain: less is not worth a row in a table
LAYERS = ("attention_layer", "mlp_layer", "projection_mlp")  # operations that have others as their parts


@dataclass(frozen=True)
class Measured:
    """What an operation took on tensors of one shape.

    Attributes:
        what: operation, dtype and shape.
        seconds: median time of a call, backward included where gradients are wanted, by implementation.
        rule: the implementation that "auto" is where nothing was measured.
        taken: the one that it is from now on.
        refused: why an implementation, or a launch configuration of it, was left out.
    """

    what: str
    seconds: dict[str, float]
    rule: str
    taken: str
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds.items())
        return "\n".join([f"{self.what}: {self.taken} ({times})", *(f"  left out {why}" for why in self.refused)])


@dataclass(frozen=True)
class Tuning:
    """What :func:`nest_fast.tune` did; print it.

    Attributes:
        rows: one for each operation and shape.
        left: how many the time limit left unmeasured.
        path: the file with the choices; None where none was written.
    """

    rows: tuple[Measured, ...]
    left: int
    path: Path | None

    def __str__(self) -> str:
        lines = [str(row) for row in self.rows]
        lines += [f"{self.left} not measured: the time was over"] if self.left else []
        return "\n".join([*lines, self.written])

    @property
    def written(self) -> str:
        """Where the choices are, in words."""
        return f"written to {self.path}" if self.path else "not written (NEST_FAST_TUNED=off, or no place for a file)"


def tune(
    model: nn.Module,
    images: Tensor | tuple,
    *,
    time_limit: float = 300.0,
    wide: bool = False,
    progress: bool = True,
) -> Tuning:
    """Measure what is fastest for the operations of ``model`` on this machine; "auto" takes it from then on.

    The model runs, and each operation that it calls is measured by itself on the tensors that it got, under the same
    autocast and, where gradients are wanted, with its backward: every implementation that can take them, and for
    Triton's kernels every launch configuration of the table. Each is first compared with float64 on two samples; what
    is further off than three times plain PyTorch is left out and reported. What "auto" would take anyway is kept unless
    another is faster in all rounds but one, and 3 % in the median.

    The choices go into a JSON file (``~/.cache/nest_fast``, or ``NEST_FAST_TUNED``), which later processes read at
    their first operation on the device. They hold for the same shapes with any batch, and for the device, driver,
    torch, Triton and nest_fast they were measured with. Programs of torch.compile keep the rules of "auto", but take
    the launch configurations.

    Args:
        model: with nest_fast's operations inside: a :class:`nest_fast.NesT`, or one that :func:`nest_fast.accelerate`
            made fast. It is called as it is, in its mode, and not changed.
        images: its input ``(B, 3, H, W)`` on the device, or a tuple of its inputs; the batch is what is measured.
        time_limit: seconds after which no further operation is measured; what was measured is kept. One is in any case.
        wide: on a GPU, also configurations that the tables leave out; takes minutes for each operation.
        progress: print a line to stderr for each operation.

    Returns:
        A :class:`nest_fast.tuning.Tuning`.

    Raises:
        TypeError: ``model`` is no module, or ``images`` no tensor and no tuple.
        ValueError: ``model`` calls no operation that has a choice; ``time_limit`` is no positive number.
    """
    inputs = images if isinstance(images, tuple) else (images,)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"images: expected a tensor (B, 3, H, W) or a tuple of inputs, got {type(images).__name__}")
    if not isinstance(time_limit, (int, float)) or not time_limit > 0:
        raise ValueError(f"time_limit: expected a positive number of seconds, got {time_limit!r}")
    end = time.monotonic() + time_limit
    device = next(x.device for x in inputs if isinstance(x, Tensor))
    before = _tuned.choices(device)
    _tuned.set_choices(device, _tuned.Choices())
    try:
        questions = _questions(model, inputs)
    except BaseException:
        _tuned.set_choices(device, before)
        raise
    if not questions:
        _tuned.set_choices(device, before)
        raise ValueError(
            f"model: expected one that calls operations of nest_fast with a choice, got {type(model).__name__};"
            " nest_fast.accelerate(model) gives it some"
        )
    rows: list[Measured] = []
    said: list[dict[str, Any]] = []
    implementations: dict[_tuned.Key, str] = {}
    configurations: dict[Any, Any] = {}
    path = None
    try:
        for question in questions:
            if rows and time.monotonic() > end:
                break
            row, launches = _measure(question, wide, end)
            configurations |= launches
            if row.taken != row.rule:
                implementations[question.key] = row.taken
            # The parts come first, so that a layer is measured with what is best for them.
            _tuned.set_choices(device, _tuned.Choices(implementations, _tuned.launches(configurations)))
            rows.append(row)
            said.append({"key": question.key, "date": time.strftime("%Y-%m-%d"), **asdict(row)})
            if progress:
                print(f"tune {len(rows)}/{len(questions)}: {row}", file=sys.stderr, flush=True)
    finally:  # also what was measured before somebody stopped it
        measured = {row["key"] for row in said}
        kept = {key: name for key, name in before.implementations.items() if key not in measured}
        launches = {**before.launches, **_tuned.launches(configurations)}
        _tuned.set_choices(device, _tuned.Choices({**kept, **implementations}, launches))
        try:
            path = _tuned.write(device, said, launches) if said else None
        except OSError as error:
            warnings.warn(f"what was measured counts in this process alone: {error}", stacklevel=2)
    return Tuning(tuple(rows), len(questions) - len(rows), path)


# --- what there is to measure -----------------------------------------------------------------------------------------


def _questions(model: nn.Module, inputs: tuple) -> list[_tuned.Question]:
    """The first call of each operation on tensors of each shape, parts of others first."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gpus = [x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda]
    with torch.random.fork_rng(gpus), _tuned.watched() as asked:
        # A chain calls a layer's operation only where that has kernels of its own, the last in the others' place.
        for kernels, joint in (("parts", "parts"), ("triton", "parts"), ("triton", "triton")):
            with _tuned.forced(**dict.fromkeys(LAYERS, kernels) | {"projection_mlp": joint}):
                model(*inputs)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # such as running averages
            buffer.copy_(buffers[name])
    # What drops at random has nothing to be compared with.
    found = [one for one in asked.values() if len(one.able) > 1 and not one.arguments.get("dropout_p")]
    # bias_gelu is a part of linear.
    return sorted(found, key=lambda question: (question.key[0] in LAYERS, question.key[0] != "bias_gelu"))


def _run(question: _tuned.Question, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs of the call, and gradients where they are wanted: of a loss whose own gradient is 1 everywhere."""
    outs = tree_leaves(question.call(**arguments))
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    if not leaves or not torch.is_grad_enabled():
        return outs
    found = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs], allow_unused=True)
    return [*outs, *(x for x in found if x is not None)]


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(question: _tuned.Question, wide: bool, end: float) -> tuple[Measured, dict[Any, Any]]:
    """What is fastest for a question, and the launch configurations with which it is."""
    op = question.key[0]
    refused: list[str] = []
    with question.modes():
        too_far = _oracle(question)

        def refuses(name: str, what: str = "") -> bool:
            """Whether an implementation cannot be taken; it is named with the reason."""
            try:
                with _tuned.forced(**{op: name}):
                    why = too_far()
            except Exception as error:  # whatever a compiler, a driver or a kernel may say
                why = (str(error).splitlines() or [""])[0] or type(error).__name__
            refused.extend([f"{name}{what}: {why}"] if why else [])
            return bool(why)

        able = [name for name in question.able if not refuses(name)]
        launches: dict[Any, Any] = {}
        for name in able:
            with _tuned.forced(**{op: name}):
                keys = _tuned.launched(lambda: _run(question, question.arguments))
            for key in keys:
                launches |= _fastest_launch(question, name, key, launches, wide, end, refuses)
        times = _times({name: partial(_once, question, name, launches) for name in able}, question, question.rule)
    seconds = {name: statistics.median(some) for name, some in times.items()}
    taken = _fastest(times, question.rule)
    return Measured(_tuned.describe(question.key), seconds, question.rule, taken, tuple(refused)), launches


def _fastest_launch(
    question: _tuned.Question,
    name: str,
    key: Any,
    others: dict[Any, Any],
    wide: bool,
    end: float,
    refuses: Callable[..., bool],
) -> dict[Any, Any]:
    """The launch configuration of ``key`` that is the fastest; nothing where it is the one that is taken anyway."""
    configurations = _tuned.configurations(key, wide)
    calls: dict[str, Callable[[], object]] = {_TAKEN: partial(_once, question, name, others)}
    for number, config in enumerate(configurations):
        if time.monotonic() > end:
            break
        with _tuned.with_launches({**others, key: config}):
            if not refuses(name, f", {config}"):
                calls[str(number)] = partial(_once, question, name, {**others, key: config})
    fastest = _fastest(_times(calls, question, _TAKEN), _TAKEN)
    return {} if fastest == _TAKEN else {key: configurations[int(fastest)]}


_TAKEN = "taken anyway"


def _once(question: _tuned.Question, name: str, launches: dict[Any, Any]) -> None:
    """What is timed."""
    with _tuned.forced(**{question.key[0]: name}), _tuned.with_launches(launches):
        _run(question, question.arguments)


def _oracle(question: _tuned.Question) -> Callable[[], str]:
    """What says how the call is too far from float64, on some samples; "" where it is as near as plain PyTorch."""
    few = {
        name: _tuned.leaf(x[:SAMPLES]) if isinstance(x, Tensor) and name in _tuned.BATCHED else x
        for name, x in question.arguments.items()
    }
    plain = {**few, "impl": "reference"}
    wide = {
        name: _tuned.leaf(x.double()) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in plain.items()
        if not name.endswith("dtype")  # to which an output is rounded
    }
    with torch.autocast(_device(question).type, enabled=False):
        golden = _run(question, wide)
    own = _errors(_run(question, plain), golden)

    def too_far() -> str:
        outs = _run(question, few)
        eps = torch.finfo(outs[0].dtype).eps
        for error, plain_error in zip(_errors(outs, golden), own, strict=True):
            if not error <= 3 * plain_error + 4 * eps:
                return f"its relative error from float64 is {error:.1e}, plain PyTorch's {plain_error:.1e}"
        return ""

    return too_far


def _errors(got: list[Tensor], golden: list[Tensor]) -> list[float]:
    """Of the first output, and of everything else together."""
    together = [torch.cat([x.detach().double().flatten() for x in some[1:]] or [_NOTHING]) for some in (got, golden)]
    return [relative_error(got[0], golden[0]), relative_error(*together)]


_NOTHING = torch.zeros(1)


def _device(question: _tuned.Question) -> torch.device:
    return next(x.device for x in question.arguments.values() if isinstance(x, Tensor))


def _fastest(times: dict[str, list[float]], own: str) -> str:
    """The call that takes least; ``own`` unless that is surely faster: on a busy machine two runs of one differ."""
    if own not in times:
        return min(times, key=lambda name: statistics.median(times[name]), default=own)
    fastest = min(times, key=lambda name: statistics.median(times[name]))
    gains = [mine / other for mine, other in zip(times[own], times[fastest], strict=True)]
    surely = statistics.median(gains) > GAIN and sum(gain > 1 for gain in gains) >= ROUNDS - 1
    return fastest if surely else own


def _times(calls: dict[str, Callable[[], object]], question: _tuned.Question, own: str) -> dict[str, list[float]]:
    """Seconds of each call in every round; they take turns, so that a machine that slows down slows all of them."""
    timer = _gpu_timer(_device(question)) if _device(question).type == "cuda" else _cpu_timer
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timer(call))
        if number == 1:  # what is far behind is not measured to the end
            best = min(min(some) for some in times.values())
            calls = {name: call for name, call in calls.items() if min(times[name]) < 2 * best or name == own}
    return times


def _cpu_timer(call: Callable[[], object]) -> float:
    """Seconds of a call: the mean of so many as last a millisecond."""
    start, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - start < 1e-3:
        call()
        n += 1
    return (time.perf_counter() - start) / n


def _gpu_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds that the GPU works on a call, whose inputs come from memory: the second-level cache is overwritten."""
    cache = torch.empty(2**28, dtype=torch.int8, device=device)

    def timer(call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            cache.zero_()
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the call is launched: not what is measured
            start.record()
            call()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return timer
