"""Fast layers inside models that other libraries built. Those libraries are imported only when asked for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from nest_fast.integrations.timm import Report

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Make the NesT layers inside ``model`` fast, in place: same parameters, state dict, hooks and outputs.

    Replaces the computation of timm's ``nest.Attention``, ``TransformerLayer``, ``ConvPool``, ``NestLevel`` and
    ``PatchEmbed`` by giving the instances a subclass of their own class; nothing of timm is patched, no tensor is
    copied or moved. Doing it twice changes nothing. Layers that someone subclassed or patched are left alone and
    reported.

    Args:
        model: timm's NesT, or any module with one inside.

    Returns:
        A :class:`nest_fast.integrations.timm.Report` of what was replaced and what was not, and why; print it.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: there is nothing in ``model`` to replace.
    """
    _check_module(model)
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"model: wanted one with timm's NesT layers, got {type(model).__name__} and no timm installed")
    from nest_fast.integrations import timm

    return timm.accelerate(model)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate` in place; returns how many layers were given back.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_module(model)
    if importlib.util.find_spec("timm") is None:
        return 0
    from nest_fast.integrations import timm

    return timm.restore(model)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
