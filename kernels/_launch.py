"""How kernels are launched: with the first of several configurations that suits this device and this Triton.

The tables of _configs hold candidates in order of merit. What was best with one Triton spills registers with another,
so the first launch of a shape on a device compiles them, one after the other, until one neither spills nor wants more
than the device has; nothing is timed. The choice stays for the process. The interpreter takes the first. Where
somebody measured on this device which is the fastest (nest_fast.tune), that one is taken.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nest_fast.kernels import _configs

__all__ = ["CHOSEN", "Copied", "fields", "launch", "measured", "name", "recorded"]

# (table, shape, device) -> configuration.
CHOSEN: dict[tuple[Callable, tuple, torch.device], Any] = {}
# device -> name of a table and a shape -> fields of the configuration that was measured to be the fastest.
_MEASURED: dict[torch.device, Mapping[str, Any]] = {}
_RECORDING = threading.local()  # its "heard", where this thread's launches are recorded


class Copied(NamedTuple):
    """An argument of a launch: a dense matrix that the copy engine reads or writes by tiles. A descriptor arrives.

    Made where it is launched, since who records a launch has to know its tensors.
    """

    matrix: Tensor
    tile: tuple[int, int]


def _arrive(args: Sequence[Any]) -> Sequence[Any]:
    """What a kernel gets."""
    if not any(type(x) is Copied for x in args):
        return args
    return [TensorDescriptor.from_tensor(x.matrix, [*x.tile]) if type(x) is Copied else x for x in args]


def name(table: Callable, shape: tuple) -> str:
    """What a file calls the configuration for ``shape``."""
    return f"{table.__name__}{shape}"


def fields(config: Any) -> Any:
    """A configuration as JSON has it."""
    return dict(config) if isinstance(config, dict) else list(config)


def measured(device: torch.device, configurations: Mapping[str, Any]) -> None:
    """From now on launches on ``device`` take these :func:`fields`, by :func:`name`, and are chosen anew."""
    _MEASURED[device] = configurations
    for key in [key for key in CHOSEN if key[2] == device]:
        del CHOSEN[key]


def launch(table: Callable[..., Sequence], shape: tuple, x: Tensor, run: Callable[..., Any]) -> Any:
    """``run(config, start)`` on x's device, with the configuration that suits it; returns what that returns.

    Args:
        table: of _configs; called with ``shape`` and the architecture it returns the candidates, the best first.
        shape: what the kernels are compiled for, dtypes included: of these the choice is made once.
        x: on the device.
        run: allocates what depends on the configuration, and calls ``start(kernel, programs, *args, **constants)`` for
            each kernel to launch. It does nothing else: to try a candidate it is called with a start that launches
            nothing.

    Raises:
        RuntimeError: a CUDA graph is being captured and the choice is not made yet; no candidate can run here.
    """
    key = (table, shape, x.device)
    with torch.cuda.device_of(x):
        config = CHOSEN.get(key)
        if config is None:
            config = CHOSEN[key] = _choose(table, shape, x, run)
        return run(config, _start)


# Multiplications and additions are fused, as the tables' figures are counted; Triton 3.10 does not unless told to.
_OPTIONS = {"enable_fp_fusion": True}


def _run(kernel: Any, programs: int, args: tuple, constants: Mapping[str, Any]) -> Any:
    return kernel.run(*_arrive(args), grid=(programs,), warmup=False, **constants, **_OPTIONS)


def _start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    heard = getattr(_RECORDING, "heard", None)
    if heard is None:
        _run(kernel, programs, args, constants)
        return
    with torch._C.DisableTorchFunction():  # how tensors get to a kernel is nobody's business
        compiled = _run(kernel, programs, args, constants)
    # The interpreter compiles nothing.
    start = None if compiled is None else compiled[(programs, 1, 1)]
    last = [constants[name] for name in kernel.arg_names if name in constants]

    def again(*args: Any) -> None:
        if start is None:
            _run(kernel, programs, args, constants)
        else:
            start(*_arrive(args), *last)

    heard(again, args)


@contextlib.contextmanager
def recorded(heard: Callable[[Callable[..., None], tuple], None]) -> Iterator[None]:
    """In here every launch of this thread is told: ``heard(launch, args)``.

    ``launch(*args)`` does it again, past Triton's search for the compiled kernel: with tensors of the same dtypes and
    alignment on the same device, which has to be the current one, and with all other arguments as they were.
    """
    _RECORDING.heard = heard
    try:
        yield
    finally:
        del _RECORDING.heard


def _choose(table: Callable[..., Sequence], shape: tuple, x: Tensor, run: Callable[..., Any]) -> Any:
    """What was measured, or else the first candidate that does not spill; if all do, the one that spills least."""
    candidates = table(*shape, _configs.architecture())
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{table.__name__}: expected a run of this shape before a CUDA graph is captured, got the first one inside;"
            " kernels are chosen and compiled then"
        )
    fastest = _MEASURED.get(x.device, {}).get(name(table, shape))
    if fastest is not None:
        return dict(fastest) if isinstance(fastest, dict) else type(candidates[0])(*fastest)
    if interpreted:
        return candidates[0]
    errors: list[Exception] = []
    best, least = None, math.inf
    for config in candidates:
        spills = _spills(config, run, errors)
        if spills < least:
            best, least = config, spills
        if spills == 0:
            break
    if best is None:
        raise errors[0]
    return best


def _spills(config: Any, run: Callable[..., Any], errors: list[Exception]) -> float:
    """Words that a thread of the kernels spills; infinite where one does not compile, or wants more than there is."""
    spills: list[float] = []

    def compile_only(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        try:
            compiled = kernel.warmup(*_arrive(args), grid=(programs,), **constants, **_OPTIONS)
            _ = compiled.run  # loads it, which is refused if its shared memory, threads or registers do not fit
            if not hasattr(compiled, "n_spills"):  # but once: Triton takes it for loaded then
                raise RuntimeError("a kernel that the GPU refused before, since it does not fit")
            spills.append(compiled.n_spills)
        except (triton.TritonError, RuntimeError) as error:
            errors.append(error)
            spills.append(math.inf)

    run(config, compile_only)
    return sum(spills)
