"""Fast layers inside models that other libraries built. Those libraries are imported only when asked for."""

from __future__ import annotations

import importlib
import re
import sys
import warnings

from torch import Tensor, nn

from nest_fast import explanation
from nest_fast.integrations import _swap
from nest_fast.integrations._swap import Adapters, Report

__all__ = ["Report", "accelerate", "explain", "restore"]

# The families: what they are called, the library's module that has their layers, and ours for it.
_FAMILIES = {
    "timm's NesT": ("timm.models.nest", "timm_nest"),
    "timm's ViT or DeiT": ("timm.models.vision_transformer", "timm_vit"),
    "timm's SAM": ("timm.models.vision_transformer_sam", "timm_sam"),
    "timm's Twins": ("timm.models.twins", "timm_twins"),
    "timm's DaViT": ("timm.models.davit", "timm_davit"),
    "timm's Hiera": ("timm.models.hiera", "timm_hiera"),
    "timm's Swin": ("timm.models.swin_transformer", "timm_swin"),
    "timm's Swin v2": ("timm.models.swin_transformer_v2", "timm_swin_v2"),
    "timm's GCViT": ("timm.models.gcvit", "timm_gcvit"),
    "timm's MaxViT": ("timm.models.maxxvit", "timm_maxvit"),
    "torchvision's MaxViT": ("torchvision.models.maxvit", "torchvision_maxvit"),
    "torchvision's Swin": ("torchvision.models.swin_transformer", "torchvision_swin"),
    "transformers' SAM": ("transformers.models.sam.modeling_sam", "transformers_sam"),
    "transformers' Swin": ("transformers.models.swin.modeling_swin", "transformers_swin"),
    "transformers' Donut": ("transformers.models.donut.modeling_donut_swin", "transformers_donut"),
    "transformers' Swin v2": ("transformers.models.swinv2.modeling_swinv2", "transformers_swin_v2"),
}
# The first version whose layers are those that we know, where a library had others before.
_SINCE = {"transformers": (5, 24)}


def accelerate(model: nn.Module, example: Tensor | tuple | None = None, *, tolerance: float | None = None) -> Report:
    """Make the layers inside ``model`` that it knows fast, in place: same parameters, state dict, hooks and outputs.

    It knows those of timm's NesT, ViT and DeiT, SAM, Twins, DaViT, Hiera, GCViT, MaxViT, Swin and Swin v2, of
    torchvision's MaxViT, Swin and Swin v2, and of transformers' SAM, Donut, Swin and Swin v2, in these models or in any
    other. Their instances are given a subclass of their own class; nothing of these libraries is patched, no tensor is
    copied or moved. Doing it twice changes nothing; an error leaves the model as it was. Layers that someone subclassed
    or patched are left alone and reported, with those of which a part is called as it is (a hook, a LoRA, a dropout).

    Args:
        model: one of these models, or any module with such layers inside.
        example: an input of the model, or a tuple of its inputs: it then runs in eval mode before and after, and the
            report says how far both are from the model in float64 (a copy, on two samples) and how much faster it
            became here. Gradients are not tried.
        tolerance: the largest relative L2 error from float64 on the example; None: three times the error before, and
            some roundings. Beyond it the model is left as it was.

    Returns:
        A :class:`nest_fast.integrations.Report` of what was replaced and what was not, and why; print it.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``, or ``example`` no tensor and no tuple.
        ValueError: there is nothing in ``model`` to replace.
        RuntimeError: on the example the error was over the tolerance.
    """
    _check_module(model)
    if example is not None and not isinstance(example, (Tensor, tuple)):
        raise TypeError(f"example: expected a tensor or a tuple of inputs, got {type(example).__name__}")
    if tolerance is not None and example is None:
        raise ValueError(f"tolerance: expected an example to hold it to, got {tolerance!r} and none")
    return _swap.accelerate(model, _adapters(), ", ".join(map(_with_version, _FAMILIES)), example, tolerance)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate` in place; returns how many layers were given back.

    Also below what was put around since: wrapped ``forward`` methods, FSDP, parametrizations. A class that someone
    derived from a fast one by hand stays, with a warning that names it.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_module(model)
    return _swap.restore(model)


def explain(model: nn.Module, x: Tensor | None = None) -> explanation.Explanation:
    """How every layer inside ``model`` would be computed on this machine, and why not in a faster way.

    Nothing is computed and nothing changes. What decides is asked as the model stands: its mode, hooks, weights and
    parts, and whether autocast and gradients are on.

    Args:
        model: a :class:`nest_fast.NesT`, a model that :func:`accelerate` knows, accelerated or not, or any module with
            such layers inside.
        x: an image ``(B, C, H, W)`` as the model would get it: its batch, dtype and device are taken; without one a
            single image of the dtype and on the device of the weights.

    Returns:
        A :class:`nest_fast.explanation.Explanation` with a row for every step; print it.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``, or ``x`` no tensor.
    """
    _check_module(model)
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor (B, C, H, W), got {type(x).__name__}")
    return explanation.explain(model, x, _swap.told(_adapters()))


def _adapters() -> Adapters:
    """Those of the families whose modules are imported; nothing in a model can be of another."""
    found = {}
    for family, (library, ours) in _FAMILIES.items():
        if library in sys.modules and _is_known(library.partition(".")[0]):
            try:
                found[family] = importlib.import_module(f"{__name__}.{ours}").ADAPTER
            except (AttributeError, ImportError) as error:  # a version with other classes, later than ours
                warnings.warn(f"{family} is left as it is, since this version differs: {error}", stacklevel=3)
    return found


def _is_known(library: str) -> bool:
    version = re.match(r"(\d+)\.(\d+)", getattr(sys.modules.get(library), "__version__", ""))
    return library not in _SINCE or (version is not None and tuple(map(int, version.groups())) >= _SINCE[library])


def _with_version(family: str) -> str:
    library = _FAMILIES[family][0].partition(".")[0]
    return f"{family} from {'.'.join(map(str, _SINCE[library]))} on" if library in _SINCE else family


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
