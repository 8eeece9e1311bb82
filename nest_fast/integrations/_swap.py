"""Instances given a fast subclass of their own class, and their class back; what that did is a report.

A fast class has another ``forward`` and no state of its own: what a module is (parameters, buffers, hooks, keys, flags)
stays untouched, deepcopy and pickle work, and giving the base class back undoes it.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from nest_fast import fusion
from nest_fast.explanation import Like, Row, Tell, explain
from nest_fast.integrations._trial import Trial, try_out

__all__ = ["Adapter", "Fast", "Report", "accelerate", "instead_of", "restore", "told"]


class Fast:
    """The base of every fast class; the library's class comes after it."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "model: expected one for torch.jit.script, got an accelerated one;"
            " nest_fast.restore(model) gives its library's back"
        )


class Adapter(NamedTuple):
    """What is known of one family of another library's models.

    Attributes:
        classes: the fast classes, each derived from :class:`Fast` and then from the class that it stands for.
        known: what fusion knows of the library's classes, and of ``classes``.
        told: what explain tells of the modules of ``classes``; the others' owners tell of them.
    """

    classes: tuple[type, ...]
    known: fusion.Known
    told: Mapping[type, Tell]

    def fast(self) -> dict[type, type]:
        """The fast classes by those that they stand for."""
        return {fast.__mro__[2]: fast for fast in self.classes}


Adapters = Mapping[str, Adapter]  # by the names of the families


def instead_of(base: type, name: str = "forward") -> Callable:
    """A method in the place of the library's: stands back where that was patched, given back, or modules are called."""
    ((_, _, theirs),) = fusion.as_written("", base, methods=(name,)).methods

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        _, first, *_ = signature(method).parameters

        @wraps(method)
        def either(self: Any, *args: Any, **kwargs: Any) -> Any:
            now = getattr(base, name)
            x: Any = args[0] if args else kwargs.get(first)
            if now is not theirs or getattr(type(self), name) is theirs or fusion.everywhere(x):
                return now(self, *args, **kwargs)
            return method(self, *args, **kwargs)

        return either

    return decorate


# --- accelerate and restore -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What :func:`nest_fast.accelerate` did.

    Attributes:
        replaced, already: names of modules and the classes they have, or had before, a fast form of.
        kept: names of modules that are computed as their library wrote them, and why.
        families: whose modules those are: "timm's NesT", ...
        missing: what this machine could use and has not, such as the compiled extension.
        trial: what became of errors and speed on the example, if there was one.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    trial: Trial | None = None

    def __str__(self) -> str:
        counts = f"replaced {len(self.replaced)}, already fast {len(self.already)}, kept {len(self.kept)}"
        lines = [f"{', '.join(self.families)}: {counts}"]
        lines += [] if self.trial is None else [f"  {self.trial}"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.replaced.items()]
        lines += [f"  kept {name or '(model)'}: {why}" for name, why in self.kept.items()]
        return "\n".join([*lines, *(f"  missing: {what}" for what in self.missing)])


def accelerate(
    model: nn.Module, adapters: Adapters, looked_for: str, example: Any = None, tolerance: float | None = None
) -> Report:
    """See :func:`nest_fast.accelerate`; ``looked_for`` says in words whose layers ``adapters`` are for."""
    replaced, already, kept, changes, families = {}, {}, {}, [], {}
    for family, adapter in adapters.items():
        fast = adapter.fast()
        for name, module in model.named_modules():
            kind = type(module)
            if not isinstance(module, tuple(fast)):
                continue
            families[family] = adapter
            if isinstance(module, Fast):
                already[name] = kind.__name__
                continue
            why_not = _why_not(module, adapter)
            if why_not is None:
                changes.append((module, fast[kind]))
                replaced[name] = kind.__name__
            else:
                kept[name] = why_not
    if not replaced and not already:
        reasons = "; ".join(f"{name}: {why}" for name, why in kept.items())
        raise ValueError(
            f"model: expected one with layers of {looked_for}, got {type(model).__name__} with nothing to replace"
            + (f" ({reasons})" if reasons else "")
        )
    trial = None if example is None else _tried(model, changes, example, tolerance)
    _give(changes)
    explained = explain(model, None, told(adapters))
    for row in explained:
        if row.how.startswith("its modules"):
            kept[row.name] = "; ".join(dict.fromkeys(filter(None, (kept.get(row.name), row.why))))
    return Report(replaced, already, kept, tuple(families), explained.missing, trial)


def _tried(model: nn.Module, changes: list[tuple[Any, type]], example: Any, tolerance: float | None) -> Trial:
    """What ``changes`` bring on the example; they are undone again."""
    before = [(module, type(module)) for module, _ in changes]
    try:
        trial = try_out(model, example, lambda: _give(before), lambda: _give(changes), tolerance)
    finally:
        _give(before)
    if not trial.error <= trial.allowed:
        raise RuntimeError(
            f"example: expected outputs within {trial.allowed:.1e} of float64, where the model's own error is"
            f" {trial.own_error:.1e}, got {trial.error:.1e}; the model is as it was"
        )
    return trial


def restore(model: nn.Module) -> int:
    """See :func:`nest_fast.restore`."""
    changes, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, Fast):
            theirs = _without_fast(type(module))
            if theirs is None:
                left.append(f"{name or '(model)'}: {type(module).__name__}")
            else:
                changes.append((module, theirs))
    _give(changes)
    if left:
        warnings.warn(
            f"restore: left what was derived from the fast classes, whose methods may need them: {', '.join(left)}",
            stacklevel=3,
        )
    return len(changes)


def _give(classes: list[tuple[Any, type]]) -> None:
    """All modules their classes, or none."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, kind in classes:
            module.__class__ = kind
    except BaseException:
        for module, kind in before:
            module.__class__ = kind
        raise


def _without_fast(kind: type) -> type | None:
    """The library's class in the place of a fast one, also below one that was made around it (FSDP, parametrizations).

    None where functions of such a class name it (``super()``) and so cannot move to another one.
    """
    if Fast in kind.__bases__:
        return kind.__mro__[2]
    names_itself = any(
        "__class__" in f.__code__.co_freevars for f in vars(kind).values() if isinstance(f, types.FunctionType)
    )
    if names_itself:
        return None
    bases = [_without_fast(base) if issubclass(base, Fast) else base for base in kind.__bases__]
    if None in bases:
        return None
    attributes = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(bases), attributes)  # type: ignore[arg-type]


def _why_not(module: Any, adapter: Adapter) -> str | None:
    """Why a module of the library's keeps its class: it is not what the library wrote."""
    kind, fast = type(module), adapter.fast()
    if kind not in fast:
        library = next(base for base in kind.__mro__ if base in fast).__module__.partition(".")[0]
        return f"{kind.__name__} is a subclass of {library}'s class, and may compute something else"
    written = adapter.known[fast[kind]]
    if any(getattr(cls, name) is not method for cls, name, method in written.methods):
        return f"a method of its class {kind.__name__} was patched"
    if not vars(module).keys().isdisjoint(name for _, name, _ in written.methods):
        return "its forward was patched on the instance"
    return None


# --- what explain tells of them ---------------------------------------------------------------------------------------


def told(adapters: Adapters) -> dict[type, Tell]:
    """What explain tells of the fast classes, and of the library's own before ``accelerate``."""
    tables: dict[type, Tell] = {}
    for adapter in adapters.values():
        tables |= {base: _tell_plain(adapter) for base, fast in adapter.fast().items() if fast in adapter.told}
        tables |= adapter.told
    return tables


def _tell_plain(adapter: Adapter) -> Tell:
    def tell(name: str, module: Any, like: Like) -> Iterator[Row]:
        why = _why_not(module, adapter) or "nest_fast.accelerate(model) was not called"
        yield Row(name, type(module).__name__, "its modules", why)

    return tell
