"""Triton's interpreter, made faster, and Triton 3.6's for NumPy from 2.4 on: values are what they are."""

from __future__ import annotations

import dataclasses
import inspect

__all__ = ["make_faster"]


def make_faster() -> None:
    _patch_once_a_launch()
    _check_no_overflow()
    _take_numbers_of_arrays()


def _take_numbers_of_arrays() -> None:
    """Let a kernel's number bound a range: it is an array of one element, which Triton 3.6 hands to int()."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _check_no_overflow() -> None:
    """Let integers be added and multiplied once.

    Triton does it once more in 64 bits, to assert that the result fits in 32; without ``debug``, which the interpreter
    never has, the assertion is none.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once_a_launch() -> None:
    """Let the interpreter replace the functions of ``triton.language`` once in a launch.

    It does so anew whenever a kernel calls another function, which takes about half of the time and changes nothing:
    they are replaced until the launch ends.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()  # by the names under which functions know the language

    def once(fn):
        known = frozenset(
            value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
        )
        if known in replaced:
            return None
        replaced.add(known)
        return patch(fn)

    def launched(self, *args, **kwargs):
        replaced.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched
