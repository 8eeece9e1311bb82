"""Which kernels can take which tensors: the rules of every backend as tables, each row with its reason in words.

An operation makes a :class:`Backend` of a table below and of its own limits, further rows beside its code. Every rule
is asked of ``given``: what the kernel would read, first the tensor whose device decides; a NamedTuple where the
operation's own rules want names. "auto" asks what can run, which formats no text; the reasons are put into words
where somebody wants to read them: an explicit ``impl``, ``explain``, the warning that a GPU does without a kernel.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nest_fast.ops import _checks, _extension, _gpu, _modes, _tuned

__all__ = ["Backend", "Rules", "choose_pass", "missing", "reasons", "say_missing", "say_once", "where"]

# A reason, a template of ``given`` and the ``name`` of its first tensor or a function of ``given``; and whether it
# holds.
Rules = tuple[tuple[str | Callable[[Any], str], Callable[[Any], object]], ...]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Backend(NamedTuple):
    """One way to compute an operation, by the name that ``impl`` gives it, and what speaks against it."""

    name: str
    rules: Rules

    def can(self, given: Any) -> bool:
        """Whether it can take ``given``."""
        for _, broken in self.rules:  # noqa: SIM110, a generator costs as much as some of the rules
            if broken(given):
                return False
        return True

    def why_not(self, given: Any) -> list[str]:
        """All reasons why it cannot; none if it can."""
        return reasons(self.rules, given)

    def require(self, op: str, given: Any) -> None:
        """An error where it was asked for by name and cannot run ``op``."""
        if not self.can(given):
            raise RuntimeError(f"impl: {self.name!r} cannot run {op} here: {'; '.join(self.why_not(given))}")


def reasons(rules: Rules, given: Any) -> list[str]:
    """The rows of ``rules`` that ``given`` breaks, in words."""
    name = getattr(given, "_fields", ("x",))[0]
    broken = [why for why, is_broken in rules if is_broken(given)]
    return [why.format(given=given, name=name) if isinstance(why, str) else why(given) for why in broken]


# --- the tables -------------------------------------------------------------------------------------------------------

EXTENSION: Rules = (
    (lambda given: str(_extension.cpu_error), lambda given: _extension.cpu_error is not None),
    (
        "this processor has neither AVX-512 nor AVX2, or the extension was not built by GCC 11 or later",
        lambda given: not _extension.cpp_isa and _extension.cpu_error is None,
    ),
)
TRITON_INSTALLED: Rules = (("triton is not installed", lambda given: not _extension.has_triton),)


def where(asked: Callable[[Any], object], rules: Rules) -> Rules:
    """``rules`` that are rules only where ``asked`` holds."""
    return tuple((why, lambda given, broken=broken: asked(given) and broken(given)) for why, broken in rules)


def _is_on_gpu(given: Any) -> bool:
    return given[0].device.type == "cuda"


_ON_CPU: Rules = (("{name} is on {given[0].device}, not on a CPU", lambda given: given[0].device.type != "cpu"),)


def _for_triton(capability: tuple[int, int]) -> Rules:
    """What speaks against a Triton kernel, which is for GPUs of this compute capability and later."""
    since = "it is for compute capability {}.{} and later, not for {}.{}"
    on_gpu: Rules = (
        (lambda given: _gpu.launch_error(), lambda given: _gpu.launch_error() != ""),
        (
            lambda given: since.format(*capability, *_gpu.capability(given[0].device)),
            lambda given: _gpu.capability(given[0].device) < capability,
        ),
    )
    return (
        *TRITON_INSTALLED,
        (
            "the tensor is on {given[0].device}, and TRITON_INTERPRET=1 is not set",
            lambda given: not (_is_on_gpu(given) or (_extension.triton_interpreted and given[0].device.type == "cpu")),
        ),
        *where(lambda given: _extension.has_triton and _is_on_gpu(given), on_gpu),
    )


_DTYPE: Rules = (
    (
        "dtype {given[0].dtype} is none of float32, float16, bfloat16",
        lambda given: given[0].dtype not in KERNEL_DTYPES and _modes.autocast_dtype(given[0]) not in KERNEL_DTYPES,
    ),
)
_DTYPES: Rules = (
    (
        lambda given: "; ".join(
            f"dtype {dtype} is none of float32, float16, bfloat16" for dtype in dict.fromkeys(_other_dtypes(given))
        ),
        lambda given: _other_dtypes(given),
    ),
)
# What no kernel has.
PLAIN: Rules = (
    ("it has no forward-mode derivative", lambda given: _modes.in_forward_mode()),
    (lambda given: f"{getattr(_modes.subclass(given), '__name__', '')} is a subclass of torch.Tensor", _modes.subclass),
)
# What does not reach inside a kernel that stands for several of PyTorch's functions.
_FUNCTORCH: Rules = (("torch.func is transforming", lambda given: _modes.in_functorch()),)
_INSIDE: Rules = (*_FUNCTORCH, ("autocast is on", lambda given: _modes.under_autocast(given[0])))

CPP: Rules = EXTENSION + _ON_CPU + _DTYPE + PLAIN
# Under autocast they take weights in its dtype, beside an input in float32 or in that.
CPP_LAYER: Rules = (
    *CPP,
    *_FUNCTORCH,
    (
        "autocast is on, and {name} is {given[0].dtype}",
        lambda given: given[0].dtype not in (torch.float32, _modes.autocast_dtype(given[0])),
    ),
)
# Before 8.0 Triton's matmuls do not use the matrix units; what has none of them compiles cleanly from 7.5 on.
TRITON_MATMUL: Rules = _for_triton((8, 0)) + _DTYPE + PLAIN
TRITON_LAYER: Rules = TRITON_MATMUL + _INSIDE
TRITON: Rules = _for_triton((7, 5)) + _DTYPE + PLAIN
TRITON_PASS: Rules = _for_triton((7, 5)) + _DTYPES + PLAIN
PLAIN_MATMUL: Rules = _DTYPE + PLAIN + _INSIDE  # a library's, with more than PyTorch's function for it does
_ONEDNN: Rules = (
    *_ON_CPU,
    (
        "this torch has no oneDNN, or it is switched off",
        lambda given: (
            given[0].device.type == "cpu"
            and not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        ),
    ),
    *PLAIN,
    *_INSIDE,
)
ONEDNN: Rules = (
    *_ONEDNN,
    (
        "oneDNN has no {given[0].dtype} on this processor",
        lambda given: given[0].dtype not in _extension.onednn_dtypes,
    ),
)
ONEDNN_FLOAT32: Rules = (
    *_ONEDNN,
    ("{given[0].dtype} is no half precision", lambda given: given[0].dtype not in _checks.HALVES),
)


def _other_dtypes(given: Any) -> list[torch.dtype]:
    return [x.dtype for x in given if x is not None and x.dtype not in KERNEL_DTYPES]


# --- choosing ---------------------------------------------------------------------------------------------------------


_PLAIN_PASS = Backend("reference", ())


def choose_pass(op: str, triton: Backend, given: Any) -> str:
    """The choice of an operation that is one pass over memory: "triton", or "reference"."""
    # A compiler that sees plain PyTorch makes the same single pass of it, and fuses what stands around it as well.
    if given[0].device.type != "cuda" or torch.compiler.is_compiling() or _modes.needs_plain(given):
        return "reference"
    return _tuned.implementation(op, (triton, _PLAIN_PASS), given, _pass_rule, op, triton)


def _pass_rule(given: Any, op: str, triton: Backend) -> str:
    if triton.can(given):
        return "triton"
    say_once(op, "plain PyTorch", triton, given)
    return "reference"


_SAID: set[str] = set()


def say_once(op: str, instead: str, backend: Backend, given: Any) -> None:
    """Warn at the line that called the operation."""
    if not torch.compiler.is_compiling():
        _warn_once(f"{op} runs {instead}, since for {backend.name} {'; '.join(backend.why_not(given))}")


def say_missing(x: Tensor) -> None:
    """As :func:`say_once`, where the compiled part for x's device is missing: once for all operations."""
    if torch.compiler.is_compiling():
        return
    for what in missing(x.device):
        _warn_once(what)


def missing(device: torch.device) -> list[str]:
    """Why the compiled part for ``device`` is missing and what that costs; nothing where it is there."""
    error = None
    if device.type == "cpu":
        error = _extension.cpu_error
    elif device.type == "cuda":
        error = _extension.cuda_why_not(device.index or 0)
    return [] if error is None else [f"{error}; {_extension.COSTS[device.type]}"]


def _warn_once(message: str) -> None:
    if message in _SAID:
        return
    _SAID.add(message)
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(__package__):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
