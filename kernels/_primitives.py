"""What more than one kernel uses unchanged: arithmetic, loads, tuples of tiles, and how lengths are cut into tiles.

A Triton tile has powers of two for sides. A length that is none, such as C' = 192, is cut into pieces that are, given
as (start, size): ((0, 128), (128, 64)); tiles of all pieces travel as a tuple that an unrolled loop goes through.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LN2", "LOG2E", "both", "cdiv", "channel_pieces", "dot", "exp2", "fma", "load", "load_row", "maximum",
    "next_power_of_2", "normalise", "piece", "pieces", "round_to", "tiles_and_tail", "zeros",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """``acc + a @ b`` in float32 of a [M, K] and b [K, N]; acc may be None. The interpreter upcasts: it gets bfloat16
    wrong."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def fma(a, b, c):
    """``a * b + c`` rounded once, in the interpreter too."""
    if _INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def exp2(x):
    """2 ** x by the special function unit alone: what would be subnormal is 0."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def maximum(x, y):
    """The larger of both, in their dtype; NaN where one is. The interpreter knows no order of bfloat16."""
    if _INTERPRETED:
        larger = tl.maximum(x.to(tl.float32), y.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        return larger.to(x.dtype)
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def both(mask, condition):
    """``mask & condition`` of a tile and a scalar. The interpreter makes integers of that, which are no mask."""
    mask = mask & condition
    if _INTERPRETED:
        mask = mask != 0
    return mask


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even. The interpreter would truncate to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # Nothing may be left to truncate: of zero with a tail it makes the smallest normal number.
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def load(ptr, offsets, mask):
    """float32 of ``ptr[offsets]``, 0 where the mask is false."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_row(ptr, c, C):
    """float32 [1, TILE_C] of a vector ``(C,)`` at channels ``c`` [TILE_C]."""
    return load(ptr, c, c < C)[None, :]


@triton.jit
def normalise(x, mask, eps, C):
    """``(x - mean) * rstd`` of rows x [TILE_ROWS, TILE_C], 0 outside the mask; mean and rstd [TILE_ROWS]."""
    mean = tl.sum(x, 1) / C
    x = tl.where(mask, x - mean[:, None], 0.0)
    # The mean of a row far from zero is rounded by more than such differences are.
    rest = tl.sum(x, 1) / C
    x = tl.where(mask, x - rest[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / C + eps)
    return x * rstd[:, None], mean + rest, rstd


@triton.jit
def piece(PIECES: tl.constexpr, n: tl.constexpr):
    """Indices [size] of piece n."""
    return PIECES[n][0] + tl.arange(0, PIECES[n][1])


@triton.jit
def zeros(PIECES: tl.constexpr, ROWS: tl.constexpr = None):
    """float32 zeros for every piece: [ROWS, size], or [size] without ROWS."""
    tiles = ()
    for n in tl.static_range(len(PIECES)):
        tiles = tiles + (_zeros(ROWS, PIECES[n][1]),)
    return tiles


@triton.jit
def _zeros(ROWS: tl.constexpr, SIZE: tl.constexpr):
    return tl.zeros([SIZE], tl.float32) if ROWS is None else tl.zeros([ROWS, SIZE], tl.float32)


# triton.cdiv and triton.next_power_of_2 are for kernels too, which costs several times a launch's look-up on the host.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0


def pieces(length: int, largest: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of falling powers of two, none over ``largest``, that add up to ``length``: 208 → 128 + 64 + 16."""
    start, cut = 0, []
    while start < length:
        size = min(largest, 1 << ((length - start).bit_length() - 1))
        cut.append((start, size))
        start += size
    return tuple(cut)


def channel_pieces(channels: int, largest: int) -> tuple[tuple[int, int], ...]:
    """Pieces that cover the channels, at most four unless ``largest`` cuts them: 192 → 128 + 64."""
    unit = max(16, next_power_of_2(channels) // 8)
    return pieces(cdiv(channels, unit) * unit, largest)


def tiles_and_tail(length: int, tile: int) -> tuple[int, int]:
    """How many whole tiles, and the power of two, 16 (the smallest matrix tile) or more, that covers the rest or 0."""
    whole, rest = divmod(length, tile)
    tail = max(16, next_power_of_2(rest)) if rest else 0
    return (whole + 1, 0) if tail == tile else (whole, tail)
