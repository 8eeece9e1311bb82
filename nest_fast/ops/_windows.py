"""Windows of an image: where their tokens come from, computed once for each size while nothing traces."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _modes
from nest_fast.reference import Windows

__all__ = ["computed", "from_windows", "into_windows", "window_mask", "windows"]


def windows(
    size: int | tuple[int, int],
    window: int | tuple[int, int],
    *,
    shift: int | tuple[int, int] = 0,
    pad_first: bool = False,
    grid: bool = False,
) -> Windows:
    """How an image is cut into windows, for :func:`nest_fast.attention_layer` and :func:`nest_fast.block_attention`.

    ``windows((H, W), 7)`` are the windows of a Swin layer, ``windows((H, W), 7, shift=3)`` those of the next. Blocks of
    :func:`nest_fast.blockify` are ``windows((H, W), block_size)``. It is numbers only: nothing is computed, and nothing
    need be stored.

    Args:
        size: height and width of the image in tokens, or both.
        window: height and width of a window, or both.
        shift: by how many tokens, down and right, the windows lie off the image's corner; less than ``window``. The
            image goes on beyond its edge with what is at the opposite one, which is attended with Swin's mask.
        pad_first: what comes first where ``window`` does not divide ``size``: the shift, and then padding at the bottom
            and on the right, as in timm, or the padding, as in torchvision and transformers.
        grid: tokens of a window lie apart, each as many rows and columns from the next as there are windows (MaxViT's
            grid attention). ``window`` then divides ``size``.

    Returns:
        A tuple of these numbers.

    Raises:
        ValueError, TypeError: an argument of the wrong value or type.

    Source: Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030), and its code; Tu et al., "MaxViT", ECCV 2022
    (arXiv 2204.01697).
    """
    size, window, shift = _checks.pair("size", size), _checks.pair("window", window), _checks.pair("shift", shift, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"shift: expected less than the window {window}, got {shift}")
    if grid:
        _checks.divides("window", window, size, "image")
        if any(shift):
            raise ValueError(f"shift: expected 0 with grid=True, got {shift}")
    return Windows(size, window, shift, bool(pad_first), bool(grid))


def into_windows(x: Tensor, windows: Windows, pad: Tensor | None = None) -> Tensor:
    """As :func:`nest_fast.reference.into_windows`."""
    rows = computed(reference.window_rows, windows, x.device)
    if _may_pad(windows):
        pad = x.new_zeros(1, *x.shape[2:]) if pad is None else pad
        x = torch.cat((x, pad.expand(x.shape[0], *pad.shape)), 1)
        if pad.shape[0] == 1:  # for all of it
            rows = rows.clamp(max=windows.rows)
    return x.index_select(1, rows.flatten()).unflatten(1, rows.shape)


def _may_pad(windows: Windows) -> bool:
    """Whether there is padding; a size that is traced is asked nothing: that would be a guard."""
    pairs = zip(windows.size, windows.window, strict=True)
    return any(isinstance(size, torch.SymInt) or size % edge != 0 for size, edge in pairs)


def from_windows(x: Tensor, windows: Windows) -> Tensor:
    """As :func:`nest_fast.reference.from_windows`."""
    return x.flatten(1, 2).index_select(1, computed(reference.window_tokens, windows, x.device))


def window_mask(windows: Windows, like: Tensor) -> Tensor:
    """As :func:`nest_fast.reference.window_mask`, on the device and of the dtype of ``like``."""
    return computed(reference.window_mask, windows, like.device, like.dtype)


def computed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """``function(*args)``, in eager mode remembered: of the last arguments it is computed once."""
    return (_remembered if _modes.is_eager() else _call)(function, *args)


def _call(function: Callable[..., Tensor], *args: object) -> Tensor:
    return function(*args)


@lru_cache(maxsize=64)
def _remembered(function: Callable[..., Tensor], *args: object) -> Tensor:
    with torch.inference_mode(False):  # what is made in inference mode could not be used in training later
        return function(*args)
