"""Windows of an image in Triton: where a window's tokens are in it, computed from their numbers alone.

Along an axis a token has a place among those that the windows cover, padding included. Shifted, it is another place,
which wraps at the image's edge or, where padding comes first, at that of the last window. So no index is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from nest_fast.kernels._primitives import cdiv

__all__ = ["Cut", "cut", "pads", "regions", "rows", "sizes"]

# Of an axis: windows; steps from a window and from a token to the next; shift; where that wraps; the image's edge, and
# that of the last window; the first token in the last window that comes from beyond the image's edge.
Axis = tuple[int, int, int, int, int, int, int, int]
Cut = tuple[Axis, Axis]


def sizes(windows: Sequence[int]) -> tuple[int, int, int]:
    """T and N of windows, and how many of all their tokens are padding.

    ``windows`` are height and width of the image and of a window, the shift down and right, whether padding comes
    first, and whether the tokens of a window lie apart (``nest_fast.windows``).
    """
    H, W, h, w, *_ = windows
    blocks = cdiv(H, h) * cdiv(W, w)
    return blocks, h * w, blocks * h * w - H * W


def cut(windows: Sequence[int]) -> Cut:
    """What the kernels take of ``windows``."""
    H, W, h, w, down, right, pad_first, grid = windows

    def axis(size: int, window: int, shift: int) -> Axis:
        count = cdiv(size, window)
        period = count * window if pad_first else size
        steps = (1, count) if grid else (window, 1)
        return count, *steps, shift % period, period, size, count * window, window - shift

    return axis(H, h, down), axis(W, w, right)


@triton.jit
def _place(axis, window, token):
    """The place in the image of a token of a window along an axis, from the image's edge on for padding."""
    _, window_step, token_step, shift, period, _, _, _ = axis
    at = window * window_step + token * token_step
    shifted = at + shift
    return tl.where(at < period, tl.where(shifted < period, shifted, shifted - period), at)


@triton.jit
def _places(cut, t, token, WIDTH: tl.constexpr):
    y, x = cut
    window = t.to(tl.int32)
    return _place(y, window // x[0], token // WIDTH), _place(x, window % x[0], token % WIDTH)


@triton.jit
def rows(cut, t, token, WIDTH: tl.constexpr):
    """Which row ``y * W + x`` of the image tokens of window t are; whether they are in it, which padding is not."""
    y, x = _places(cut, t, token, WIDTH)
    H, W = cut[0][5], cut[1][5]
    return y * W + x, (y < H) & (x < W)


@triton.jit
def pads(cut, t, token, WIDTH: tl.constexpr):
    """The number of each token of window t that is padding, counted row by row through the padded image."""
    y, x = _places(cut, t, token, WIDTH)
    H, W, padded = cut[0][5], cut[1][5], cut[1][6]
    return y * padded + x - tl.minimum(y + 1, H) * W


@triton.jit
def regions(cut, t, token, WIDTH: tl.constexpr):
    """A number for each token of window t: those from beyond an edge of the image have another than those at it."""
    y, x = cut
    window = t.to(tl.int32)
    below = (window // x[0] == y[0] - 1) & (token // WIDTH >= y[7])
    beside = (window % x[0] == x[0] - 1) & (token % WIDTH >= x[7])
    return below.to(tl.int32) * 2 + beside.to(tl.int32)
