"""Models by name: nest_fast's own, or timm's."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

import nest_fast
from nest_fast.testing import import_timm
from nest_fast.train.options import UsageError

__all__ = ["NAMES", "build", "image_size"]

NAMES = tuple(name for name in nest_fast.__all__ if name.startswith("nest_"))


def build(
    name: str,
    num_classes: int,
    kwargs: dict[str, Any] | None = None,
    drop_path: float | None = None,
    impl: str = "auto",
    accelerate: bool = False,
) -> nn.Module:
    """A new model.

    Args:
        name: one of ``NAMES``, or "timm/" and the name of one of timm's models.
        num_classes: outputs of the head.
        kwargs: arguments of the model.
        drop_path: rate of stochastic depth; None for the model's.
        impl: the implementation of nest_fast's layers.
        accelerate: give timm's model nest_fast's layers.

    Raises:
        UsageError: no such model, or it does not take these arguments.
    """
    kwargs = {"num_classes": num_classes, **(kwargs or {})}
    if drop_path is not None:
        kwargs["drop_path_rate"] = drop_path
    of_timm = name.removeprefix("timm/")
    if of_timm == name:
        if name not in NAMES:
            raise UsageError(f"model: expected one of {', '.join(NAMES)}, or timm/NAME, got {name!r}")
        if accelerate:
            raise UsageError(
                f"accelerate: expected one of timm's models (timm/NAME), got {name!r}, which is fast already"
            )
        known = {*inspect.signature(nest_fast.NesT).parameters} - {"impl", "device", "dtype"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise UsageError(f"model_kwargs: expected arguments of {name}, got {', '.join(unknown)}")
        return _made(name, lambda: getattr(nest_fast, name)(**kwargs, impl=impl))
    timm = import_timm()
    if not timm.is_model(of_timm):
        raise UsageError(f"model: expected one of timm's models after timm/, got {of_timm!r}")
    if impl != "auto":
        raise UsageError(f"impl: expected auto, since {name} is timm's, got {impl!r}")
    model = _made(name, lambda: timm.create_model(of_timm, **kwargs))
    if accelerate:
        nest_fast.accelerate(model)
    return model


def _made(name: str, make: Any) -> nn.Module:
    try:
        return make()
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"model: cannot make {name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that ``model`` takes."""
    size: Any = getattr(model, "img_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        size = tuple(cfg.get("input_size", (3, 224, 224))[1:])
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
