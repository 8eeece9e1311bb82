"""Models whose weights stay as they are: what the C++ kernels make of a weight is kept from one call to the next.

What is kept holds while nobody writes the weight, and PyTorch knows that: a clone shares the weight's memory, copy on
write. Whatever would then write this memory through PyTorch (in place, through ``.data``, a view, an optimizer, a
storage) is given a copy of it first, so that the weight has another address, which the next call sees. What writes by
an address of its own, such as a NumPy array of a weight, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nest_fast.ops import _modes

__all__ = ["freeze", "is_frozen", "kept", "unfreeze"]


def freeze(model: nn.Module) -> None:
    """Keep the weights inside ``model`` packed for the C++ kernels from one call to the next, instead of in each.

    For inference on a CPU with few images at a time: the fewer there are, the more of a call is packing. It holds for
    the sub-layers and aggregations of a :class:`nest_fast.NesT`, and of what :func:`nest_fast.accelerate` made fast, in
    one operation each, whose weights are packed in their first call and take as much memory again. Parameters, state
    dict and outputs, bit by bit, stay what they are.

    A weight may change, in place, also through ``.data``, by ``load_state_dict``, an optimizer, a new parameter or
    ``.to``: it is packed anew in the next call. The one change that is not seen is made past PyTorch, through a NumPy
    array of a weight or by its address. A copy, by ``deepcopy`` or pickle, is not frozen.

    Under ``torch.compile``, ``torch.export`` and other tracers, and where it was moved to a GPU, a frozen model
    computes as it would without.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: it is in training mode, or on a GPU.
        RuntimeError: later, in a call in training mode, or that would record gradients, or with weights in memory that
            is not PyTorch's own (a mapped file, NumPy's, shared).
    """
    _check_module(model)
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; model.eval() switches")
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        raise ValueError(f"model: expected weights on a CPU, got {device}, where none is packed")
    for module in model.modules():
        _KEPT.setdefault(module, None)


def unfreeze(model: nn.Module) -> None:
    """Undo :func:`freeze`: weights are packed in every call, and what was kept of them is released.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_module(model)
    for module in model.modules():
        _KEPT.pop(module, None)


def is_frozen(module: nn.Module) -> bool:
    return module in _KEPT


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


class _Kept(NamedTuple):
    """What is kept of a module: ``made`` of its weights, and packed.

    Attributes:
        key: what it depends on beside weights.
        seen: :func:`_identity` of each weight when it was made.
        clones: those that keep the weights' memory from being written.
        made: what it was made for.
        packed: where the operations keep what they make of that.
    """

    key: Hashable
    seen: list[tuple]
    clones: list[Tensor]
    made: Any
    packed: dict


# Frozen modules, and what is kept of them so far. Not on the modules: copies of these are not frozen.
_KEPT: WeakKeyDictionary[nn.Module, _Kept | None] = WeakKeyDictionary()


def kept(
    module: nn.Module, x: Tensor, made_of: Callable[[], Sequence[Tensor]], make: Callable[[], Any], *key: Hashable
) -> tuple[Any, dict | None]:
    """What ``make`` makes of the weights ``made_of()``, and where an operation may keep it packed.

    Nobody keeps it, and None is the place, if ``module``, which is called with ``x``, is not frozen. Otherwise it is
    made once for a ``key``, and again where one of the weights has changed.
    """
    if torch.compiler.is_compiling() or module not in _KEPT or not _modes.is_eager() or x.device.type != "cpu":
        return make(), None
    found, weights = _KEPT[module], made_of()
    why = why_not(module, x, weights)
    if why:
        raise RuntimeError(why)
    if found is None or found.key != key or found.seen != [_identity(weight) for weight in weights]:
        clones = [_watch(weight) for weight in weights]  # first, so that no later change is missed
        found = _Kept(key, [_identity(clone) for clone in clones], clones, make(), {})
        _KEPT[module] = found
    return found.made, found.packed


def why_not(module: nn.Module, x: Tensor, weights: Sequence[Tensor]) -> str:
    """Why a frozen module cannot be called with ``x``; "" if it can."""
    if module.training:
        return "model: expected eval mode while it is frozen, got training mode; nest_fast.unfreeze(model) ends it"
    if _modes.wants_gradients((x, *weights)):
        return (
            "model: expected torch.no_grad() or inference_mode() while it is frozen, got a call that records gradients;"
            " nest_fast.unfreeze(model) ends it"
        )
    return ""


def _watch(weight: Tensor) -> Tensor:
    """A clone of ``weight`` in the same memory, which whoever writes the weight leaves to the clone."""
    try:
        return torch._lazy_clone(weight.detach())
    except RuntimeError:
        raise RuntimeError(
            "model: expected weights in memory of PyTorch's own while it is frozen, got another's (a mapped file,"
            " NumPy's, shared); parameter.data = parameter.data.clone() makes it its own"
        ) from None


def _identity(x: Tensor) -> tuple:
    """Its memory and how it lies there; asked in a way that does not count as writing."""
    address = torch._C._data_address(x)  # type: ignore[attr-defined]
    return address, x.shape, x.stride(), x.dtype, x.is_neg()
