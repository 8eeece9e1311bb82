"""Weights as the C++ kernels take them, packed by themselves, and kept from one call to the next by whoever asks.

``packed`` is a dict that the caller owns, empty at first: an operation puts in what it made of its weights and takes it
from there in the next call, without reading the weights again. That they are the same is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nest_fast.ops import _modes
from nest_fast.ops._register import operation

__all__ = ["Packed", "check", "filters", "linear"]

Packed = dict[tuple[str, torch.dtype], Tensor]


def check(packed: object, given: Sequence[object]) -> None:
    """An error where ``packed`` is no place to keep weights, or gradients of ``given`` are wanted, which need them."""
    if packed is None:
        return
    if not isinstance(packed, dict):
        raise TypeError(f"packed: expected a dict or None, got {type(packed).__name__}")
    if _modes.wants_gradients(given):
        raise ValueError("packed: expected None where gradients are recorded, got a dict")


def linear(packed: Packed | None, name: str, weight: Tensor) -> Tensor | None:
    """The weight ``(out, in)`` of a linear layer, floats ``(groups, K steps, NR)``; None where nobody keeps it."""
    return _kept(packed, name, weight, _PACK_LINEAR)


def filters(packed: Packed | None, name: str, weight: Tensor) -> Tensor | None:
    """Those ``(C', C, 3, 3)`` of a convolution, floats ``(groups, 16, K steps, NR)``; None where nobody keeps them."""
    return _kept(packed, name, weight, _PACK_FILTERS)


def _kept(packed: Packed | None, name: str, weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor | None:
    if packed is None:
        return None
    key = name, weight.dtype
    if key not in packed:
        packed[key] = pack(weight)
    return packed[key]


# --- registration -----------------------------------------------------------------------------------------------------
# How many floats there are depends on the processor, so nothing is traced through these: they have no fake.


def _no_fake(weight):
    raise NotImplementedError("packed weights are not traced")


def _no_gradients(kept, dpacked):
    raise RuntimeError("packed: expected no gradient through packed weights, got one")


_PACK_LINEAR = operation("pack_linear(Tensor weight) -> Tensor", fake=_no_fake, gradients=_no_gradients)
_PACK_FILTERS = operation("pack_filters(Tensor weight) -> Tensor", fake=_no_fake, gradients=_no_gradients)
