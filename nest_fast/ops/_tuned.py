"""Choices that were measured on this machine: which implementation "auto" takes, and how its kernels are launched.

:func:`nest_fast.tune` writes them into a file, one for each device; the first choice on a device reads it. Without one,
or with ``NEST_FAST_TUNED=off``, "auto" decides by its rules alone. What was measured counts for tensors of the same
shapes but for the batch, and only where that implementation can run: its rules are asked again.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nest_fast.ops import _extension, _modes

if TYPE_CHECKING:
    from nest_fast.ops._backends import Backend

__all__ = [
    "BATCHED", "Choices", "Chosen", "Key", "Question", "age", "choices", "configurations", "describe", "forced",
    "implementation", "is_watched", "launched", "launches", "leaf", "machine", "path", "read", "set_choices", "tunable",
    "watched", "with_launches", "write",
]  # fmt: skip

Key = tuple  # the operation, its dtype, whether gradients are wanted, then what each of its arguments is
# Arguments with the batch first.
BATCHED = frozenset(("x", "attended", "q", "k", "v", "rel_h", "rel_w", "residual", "branch", "branch_scale"))


class Choices(NamedTuple):
    """What was measured on a device.

    Attributes:
        implementations: an operation's implementation, by its key.
        launches: the fields of a launch configuration, by its table and shape as kernels/_launch.py names them.
    """

    implementations: Mapping[Key, str] = {}
    launches: Mapping[str, Any] = {}


class Chosen(str):
    """What "auto" was found to be, given as ``impl``: nothing is asked again, unless somebody watches."""


class Question(NamedTuple):
    """A call of an operation that somebody watched.

    Attributes:
        key: of the choice that it was.
        call: the operation.
        arguments: by name; tensors are leaves of a graph of their own.
        rule: the implementation that "auto" is where nothing was measured.
        able: all that can answer it.
        modes: enters the modes that were on: gradients and autocast.
    """

    key: Key
    call: Callable[..., Any]
    arguments: dict[str, Any]
    rule: str
    able: tuple[str, ...]
    modes: Callable[[], contextlib.ExitStack]


_CHOICES: dict[int, Choices] = {}  # by the index of a GPU, -1 for the CPU
_FORCED: dict[str, str] = {}
# Key, rule and able of what was asked since watched(); None while nobody watches.
_ASKED: list[tuple[Key, str, tuple[str, ...]]] | None = None
_QUESTIONS: dict[Key, Question] = {}
_age = 0


# --- asking -----------------------------------------------------------------------------------------------------------


def implementation(op: str, able: Iterable[Backend], given: Any, rule: Callable[..., str], *options: Any) -> str:
    """What "auto" is of ``op`` for ``given``: what was measured to be the fastest, else ``rule(given, *options)``.

    Args:
        op: the operation's name.
        able: all that may be measured, each with its rules.
        given: what the operation was given, a NamedTuple; its first tensor is on the device that counts.
        rule, options: the operation's own choice.
    """
    # A compiler's sizes may be symbols, which no table knows: compiled programs keep the rules.
    if _modes.is_compiling():
        return rule(given, *options)
    x = given[0]
    known = (_CHOICES.get(x.get_device()) or choices(x.device)).implementations
    if not (known or _FORCED or _ASKED is not None):
        return rule(given, *options)
    key = (op, *_described(given))
    if _ASKED is not None:
        _ASKED.append((key, rule(given, *options), tuple(backend.name for backend in able if backend.can(given))))
    name = _FORCED.get(op) or known.get(key)
    if name is not None and any(backend.name == name and backend.can(given) for backend in able):
        return name
    return rule(given, *options)


def _described(given: Any) -> Iterator[Any]:
    yield str(_modes.autocast_dtype(given[0]))
    yield _modes.wants_gradients(given)
    for name, x in zip(given._fields, given, strict=True):
        yield tuple(x.shape[name in BATCHED :]) if isinstance(x, Tensor) else x


def describe(key: Key) -> str:
    """A key in words: ``linear float32 (4, 196, 192) (768, 192)``, with the shapes of tensors and of matrices."""
    op, dtype, gradients, *arguments = key
    shapes = [str(shape) for shape in arguments if isinstance(shape, tuple) and len(shape) > 1]
    return " ".join([op, dtype.removeprefix("torch."), *shapes, *(["with gradients"] if gradients else [])])


# --- watching and forcing, for tune -----------------------------------------------------------------------------------


def tunable(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of which :func:`watched` hears."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _ASKED is None:
            return function(*args, **kwargs)
        before = len(_ASKED)
        out = function(*args, **kwargs)
        if len(_ASKED) > before and _ASKED[before][0][0] == function.__name__:
            key, rule, able = _ASKED[before]
            if key not in _QUESTIONS:
                arguments = inspect.signature(function).bind(*args, **kwargs).arguments
                leaves = {name: leaf(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
                leaves["impl"] = "auto"  # and not what was chosen now
                _QUESTIONS[key] = Question(key, call, leaves, rule, able, _modes_now(leaves))
        return out

    return call


def leaf(x: Tensor) -> Tensor:
    """``x`` cut off from what computed it."""
    return x.detach().requires_grad_() if x.requires_grad else x.detach()


def _modes_now(arguments: Mapping[str, Any]) -> Callable[[], contextlib.ExitStack]:
    kind = next(x.device.type for x in arguments.values() if isinstance(x, Tensor))
    gradients, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind)

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.autocast(kind, dtype, enabled=autocast))
        return stack

    return enter


def is_watched() -> bool:
    """Whether somebody wants to hear every question."""
    return _ASKED is not None


def age() -> int:
    """Another number than before where "auto" may now be something else, or kernels are launched in another way."""
    return _age


def _changed() -> None:
    global _age
    _age += 1


@contextlib.contextmanager
def watched() -> Iterator[dict[Key, Question]]:
    """The first call for each key, of what is called in here with ``impl="auto"``."""
    global _ASKED
    _QUESTIONS.clear()
    _ASKED = []
    try:
        yield _QUESTIONS
    finally:
        _ASKED = None


@contextlib.contextmanager
def forced(**implementations: str) -> Iterator[None]:
    """In here "auto" is these implementations of these operations, where they can run."""
    before = dict(_FORCED)
    _FORCED.update(implementations)
    _changed()
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)
        _changed()


def launched(call: Callable[[], Any]) -> list[Any]:
    """The keys of the launch configurations that ``call()`` takes, which are chosen anew."""
    call()
    if "nest_fast.kernels._launch" not in sys.modules:  # no kernel, and perhaps no Triton
        return []
    from nest_fast.kernels import _launch

    kept = dict(_launch.CHOSEN)
    _launch.CHOSEN.clear()
    _changed()
    try:
        call()
        return list(_launch.CHOSEN)
    finally:
        _launch.CHOSEN.update(kept)


def configurations(key: Any, wide: bool) -> list[Any]:
    """The launch configurations worth measuring for one of :func:`launched`'s keys; ``wide``, of the whole space."""
    from nest_fast.kernels import _search

    table, shape, device = key
    with torch.cuda.device(device if device.type == "cuda" else -1):
        return _search.space(table, shape, wide)


def launches(configurations: Mapping[Any, Any]) -> dict[str, Any]:
    """Launch configurations, by :func:`launched`'s keys, as :class:`Choices` has them."""
    if not configurations:
        return {}
    from nest_fast.kernels import _launch

    return {_launch.name(*key[:2]): _launch.fields(config) for key, config in configurations.items()}


@contextlib.contextmanager
def with_launches(launches: Mapping[Any, Any]) -> Iterator[None]:
    """In here kernels are launched with these configurations, by :func:`launched`'s keys."""
    if not launches:
        yield
        return
    from nest_fast.kernels import _launch

    kept = dict(_launch.CHOSEN)
    _launch.CHOSEN.update(launches)
    _changed()
    try:
        yield
    finally:
        _launch.CHOSEN.clear()
        _launch.CHOSEN.update(kept)
        _changed()


# --- the file ---------------------------------------------------------------------------------------------------------


def choices(device: torch.device) -> Choices:
    """What was measured on ``device``, read from the file the first time."""
    known = _CHOICES.get(_index(device))
    if known is None:
        known = read(device)
        set_choices(device, known)
    return known


def set_choices(device: torch.device, measured: Choices) -> None:
    """From now on "auto" goes by ``measured`` on ``device``."""
    index = _index(device)
    if measured != _CHOICES.get(index, Choices()):
        _changed()
    _CHOICES[index] = measured
    if measured.launches or "nest_fast.kernels._launch" in sys.modules:
        from nest_fast.kernels import _launch

        _launch.measured(device, measured.launches)


def _index(device: torch.device) -> int:
    return (device.index or 0) if device.type == "cuda" else -1


def path(device: torch.device) -> Path | None:
    """The file of ``device``; None where there is to be none, or no home for it.

    ``NEST_FAST_TUNED``: a path, or "off"; else the file is in ``$XDG_CACHE_HOME`` or ``~/.cache``, under a name for the
    device, its driver, torch, Triton and nest_fast.
    """
    named = os.environ.get("NEST_FAST_TUNED", "")
    if named:
        return None if named == "off" else Path(named).expanduser()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return None
    words = "-".join(str(word) for word in machine(device).values() if word)
    name = "".join(c if c.isalnum() or c in ".+" else "-" for c in words)
    return cache / "nest_fast" / f"{name}.json"


def machine(device: torch.device) -> dict[str, str]:
    """What the measured choices depend on."""
    versions = {name: _version(name) for name in ("torch", "triton", "nest_fast")}
    if device.type == "cuda":
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        return {"device": torch.cuda.get_device_name(device), "driver": str(driver), **versions}
    del versions["triton"]
    threads = f"{torch.get_num_threads()} threads"
    return {"device": _processor(), "driver": f"{_extension.cpp_isa or 'no C++'} {threads}", **versions}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read(device: torch.device) -> Choices:
    """What the file of ``device`` says; nothing, with a warning, where it is another machine's or broken."""
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        return Choices()
    file = path(device)
    if file is None:
        return Choices()
    try:
        if not file.is_file():
            return Choices()
        said = json.loads(file.read_text())
        if said["machine"] != machine(device):
            raise ValueError(f"it was measured on {said['machine']}, and this is {machine(device)}")
        implementations = {_frozen(row["key"]): row["taken"] for row in said["measured"] if row["taken"] != row["rule"]}
        return Choices(implementations, dict(said["launches"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file} is not used, since {error}; python -m nest_fast.tune writes it anew", stacklevel=2)
        return Choices()


def write(device: torch.device, rows: Iterable[Mapping[str, Any]], launches: Mapping[str, Any]) -> Path | None:
    """Add to the file of ``device`` what was measured, and return its path: rows of "key", "rule", "taken" and more.

    What the file has of the same machine stays, but for these keys. It is replaced as a whole, or not at all.
    """
    file = path(device)
    if file is None:
        return None
    before: dict[str, Any] = {"machine": machine(device), "measured": [], "launches": {}}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        said = json.loads(file.read_text())
        if said["machine"] == before["machine"]:
            before |= said
    known = {_frozen(row["key"]): row for row in before["measured"]} | {row["key"]: row for row in rows}
    now = before | {"measured": list(known.values()), "launches": {**before["launches"], **launches}}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
        try:
            json.dump(now, temporary, indent=1)
            temporary.flush()
            os.fsync(temporary.fileno())
            os.replace(temporary.name, file)
        except BaseException:
            os.unlink(temporary.name)
            raise
    return file


def _frozen(x: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_frozen, x)) if isinstance(x, list) else x
