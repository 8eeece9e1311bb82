"""Block aggregation in Triton: all of it in one kernel, or what follows the convolution, forward and backward.

LayerNorm needs all C' channels of a pixel in one program. C' is rarely a power of two, so it is cut into pieces that
are: 192 → 128 + 64. A program of norm_pool's forward walks down the image and keeps the maxima of the last row, which
two windows share, so a row of the convolution's output is normalised once but at the borders of strips.

The fused forward is an implicit matmul of pixels by (9 C, C'). A program walks down the rows of one image after the
other, two rows or more at a time, and keeps the normalised rows that the next windows need in a ring in device memory,
small enough to stay in the L2 cache. So its waste is a pair of rows for each program, and columns that no pixel fills.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from nest_fast.kernels._configs import architecture
from nest_fast.kernels._primitives import dot, round_to
from torch import Tensor

__all__ = ["MAX_CHANNELS", "MAX_FUSED_CHANNELS", "block_aggregate_fwd", "norm_pool_bwd", "norm_pool_fwd"]

MAX_CHANNELS = 1024
MAX_FUSED_CHANNELS = 512  # more do not fit in a program's registers
STRIP = 4  # rows of the output that a program of the forward makes
PROGRAMS = 2048  # of the backward, at most: each leaves one row of partial sums


class Pixels(NamedTuple):
    """A ``(B, H, W, C)`` image whose last dimension is dense, and its other strides."""

    ptr: Tensor
    b: int
    h: int
    w: int


class Blocks(NamedTuple):
    """``(B, T, N, C)`` blocks whose last dimension is dense, and their other strides; ``grid_w`` lie side by side."""

    ptr: Tensor
    b: int
    t: int
    n: int
    grid_w: int
    block_h: int
    block_w: int


class Norm(NamedTuple):
    """What is added to the convolution, and the LayerNorm's parameters; ``(C',)`` float32."""

    conv_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float


class Image(NamedTuple):
    """The convolution's output ``height`` x ``width``; the pooled image comes in blocks, ``grid_w`` side by side."""

    height: int
    width: int
    grid_w: int
    block_h: int
    block_w: int


@triton.jit
def _pooled_offset(image, b, i, j, C: tl.constexpr):
    """Where pixel (i, j) of pooled image b, which is 64-bit, begins in ``(B, T, N, C)``."""
    block = (i // image.block_h) * image.grid_w + j // image.block_w
    token = (i % image.block_h) * image.block_w + j % image.block_w
    pixel = block * (image.block_h * image.block_w) + token
    return (b * (image.height // 2 * (image.width // 2)) + pixel) * C


@triton.jit
def _vector(ptr, c, C: tl.constexpr):
    return tl.load(ptr + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _normalised(convolved, norm, C: tl.constexpr, PIECES: tl.constexpr):
    """The LayerNorm of pixels, whose convolution has no bias yet, piece by piece of the channels; mean and rstd."""
    pixels = ()
    total = tl.zeros([convolved[0].shape[0]], tl.float32)
    for n in tl.static_range(len(PIECES)):
        c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
        x = convolved[n]
        if norm.conv_bias is not None:
            x += _vector(norm.conv_bias, c, C)
        total += tl.sum(x, 1)
        pixels = pixels + (x,)
    mean = total / C
    total = tl.zeros([convolved[0].shape[0]], tl.float32)
    shifted = ()
    for n in tl.static_range(len(PIECES)):
        c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
        x = tl.where((c < C)[None, :], pixels[n] - mean[:, None], 0.0)
        total += tl.sum(x * x, 1)
        shifted = shifted + (x,)
    rstd = 1.0 / tl.sqrt_rn(total / C + norm.eps)
    normalised = ()
    for n in tl.static_range(len(PIECES)):
        c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
        x = shifted[n] * rstd[:, None] * _vector(norm.weight, c, C)
        normalised = normalised + (x + _vector(norm.bias, c, C),)
    return normalised, mean, rstd


@triton.jit
def _loaded(rows, inside, C: tl.constexpr, PIECES: tl.constexpr):
    """Pixels that begin at pointers rows, piece by piece of the channels, in float32."""
    pixels = ()
    for n in tl.static_range(len(PIECES)):
        c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
        mask = inside[:, None] & (c < C)[None, :]
        pixels = pixels + (tl.load(rows[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32),)
    return pixels


@triton.jit
def _larger(x, best, exists, alone):
    """Whether x replaces best, as max_pool2d has it: the first of equals stays, NaN wins over all.

    x does not count unless it exists; best does not where x is alone, being padding.
    """
    return exists & (alone | (x > best) | (x != x))


@triton.jit
def _row_maxima(
    y, b, h, j, own, norm, mean_ptr, rstd_ptr, image,
    BEFORE: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Maxima of windows j along the width in row h, and where in the window; statistics of pixels if own."""
    best = ()
    places = ()
    for k in tl.static_range(3):
        w = 2 * j - BEFORE + k
        exists = (w >= 0) & (w < image.width)
        rows = y.ptr + b * y.b + h.to(tl.int64) * y.h + w.to(tl.int64) * y.w
        y_row = _loaded(rows, exists & (h >= 0) & (h < image.height), C, PIECES)
        x, mean, rstd = _normalised(y_row, norm, C, PIECES)
        if TRAINING:
            pixel = (b * image.height + h) * image.width + w
            mask = exists & own & (w // 2 == j)
            tl.store(mean_ptr + pixel, mean, mask=mask)
            tl.store(rstd_ptr + pixel, rstd, mask=mask)
        if k == 0:
            best = x
            if TRAINING:
                for n in tl.static_range(len(PIECES)):
                    places = places + (tl.zeros(x[n].shape, tl.int32),)
        else:
            values = ()
            where = ()
            for n in tl.static_range(len(PIECES)):
                larger = _larger(x[n], best[n], exists[:, None], (w < 1)[:, None])
                values = values + (tl.where(larger, x[n], best[n]),)
                if TRAINING:
                    where = where + (tl.where(larger, k, places[n]),)
            best = values
            places = where
    return best, places


@triton.jit
def _norm_pool_fwd_kernel(
    y, norm, pos_ptr, out_ptr, mean_ptr, rstd_ptr, argmax_ptr, image, strips, tiles,
    BEFORE: tl.constexpr, TRAINING: tl.constexpr, STRIP: tl.constexpr, PIXELS: tl.constexpr, C: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS columns of STRIP rows of one pooled image, tiles x strips of them an image."""
    b = (tl.program_id(0) // (strips * tiles)).to(tl.int64)
    first = tl.program_id(0) // tiles % strips * STRIP
    j = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    stop = tl.minimum(first + STRIP, image.height // 2)
    h = 2 * first - BEFORE
    above, places_above = _row_maxima(
        y, b, h, j, h >= 2 * first, norm, mean_ptr, rstd_ptr, image, BEFORE, TRAINING, C, PIECES
    )  # fmt: skip
    for i in range(first, stop):
        h = 2 * i - BEFORE
        middle, places_middle = _row_maxima(
            y, b, h + 1, j, True, norm, mean_ptr, rstd_ptr, image, BEFORE, TRAINING, C, PIECES
        )  # fmt: skip
        below, places_below = _row_maxima(
            y, b, h + 2, j, h + 2 < 2 * stop, norm, mean_ptr, rstd_ptr, image, BEFORE, TRAINING, C, PIECES
        )  # fmt: skip
        pixel = _pooled_offset(image, b, i, j, C)
        for n in tl.static_range(len(PIECES)):
            c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
            mask = (j < image.width // 2)[:, None] & (c < C)[None, :]
            to = pixel[:, None] + c[None, :]
            from_middle = _larger(middle[n], above[n], True, h < 0)
            best = tl.where(from_middle, middle[n], above[n])
            from_below = _larger(below[n], best, h + 2 < image.height, False)
            best = tl.where(from_below, below[n], best)
            if TRAINING:
                place = tl.where(from_middle, places_middle[n] + 3, places_above[n])
                place = tl.where(from_below, places_below[n] + 6, place)
                tl.store(argmax_ptr + to, place.to(tl.uint8), mask=mask)
            if pos_ptr is not None:
                pos = _pooled_offset(image, 0, i, j, C)[:, None] + c[None, :]
                best += tl.load(pos_ptr + pos, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + to, round_to(best, out_ptr.dtype.element_ty), mask=mask)
        above = below
        places_above = places_below


@triton.jit
def _nowhere(OFFSET: tl.constexpr):
    """So far below zero that a row's and a column's offset cannot add up to a pixel of the image."""
    return tl.full([], -(1 << (OFFSET.primitive_bitwidth - 2)), OFFSET)


@triton.jit
def _row_offset(x, h, exists, OFFSET: tl.constexpr):
    """What row h of the image adds to the offset of a pixel in x, which is in blocks."""
    offset = (h // x.block_h * x.grid_w).to(OFFSET) * x.t + (h % x.block_h * x.block_w).to(OFFSET) * x.n
    return tl.where(exists, offset, _nowhere(OFFSET))


@triton.jit
def _column_offset(x, w, exists, OFFSET: tl.constexpr):
    offset = (w // x.block_w).to(OFFSET) * x.t + (w % x.block_w).to(OFFSET) * x.n
    return tl.where(exists, offset, _nowhere(OFFSET))


@triton.jit
def _of_three(n, first, second, third):
    return tl.where(n == 0, first, tl.where(n == 1, second, third))


@triton.jit
def _zero_tile(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros([M, N], tl.float32)


@triton.jit
def _accumulators(PIXELS: tl.constexpr, PIECES: tl.constexpr):
    zeros = ()
    for n in tl.static_range(len(PIECES)):
        zeros = zeros + (_zero_tile(PIXELS, PIECES[n][1]),)
    return zeros


@triton.jit
def _convolved(
    x, weight_ptr, b, h, w, inside, image,
    C_IN: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The convolution without bias of pixels (b, h, w), piece by piece of the channels C."""
    rows = x.ptr + b * x.b
    above = _row_offset(x, h - 1, inside & (h > 0), OFFSET)
    same_row = _row_offset(x, h, inside, OFFSET)
    below = _row_offset(x, h + 1, inside & (h < image.height - 1), OFFSET)
    left = _column_offset(x, w - 1, w > 0, OFFSET)
    same_column = _column_offset(x, w, (w >= 0) & (w < image.width), OFFSET)
    right = _column_offset(x, w + 1, w < image.width - 1, OFFSET)
    sums = _accumulators(h.shape[0], PIECES)
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    for k in tl.range(9 * CHUNKS, num_stages=STAGES):
        tap = k // CHUNKS
        c_in = k % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        offset = _of_three(tap // 3, above, same_row, below) + _of_three(tap % 3, left, same_column, right)
        mask = (offset >= 0)[:, None]
        if C_IN % BLOCK_K:
            mask = mask & (c_in < C_IN)[None, :]
        pixels = tl.load((rows + offset)[:, None] + c_in[None, :], mask=mask, other=0.0)
        added = ()
        for n in tl.static_range(len(PIECES)):
            c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
            source = weight_ptr + (tap * C_IN + c_in)[:, None] + c[None, :] * (9 * C_IN)
            if C_IN % BLOCK_K or PIECES[n][0] + PIECES[n][1] > C:
                weight = tl.load(source, mask=(c_in < C_IN)[:, None] & (c < C)[None, :], other=0.0)
            else:
                weight = tl.load(source)
            added = added + (dot(pixels, weight, sums[n], INPUT_PRECISION),)
        sums = added
    return sums


@triton.jit
def _window_maxima(
    ring_ptr, window_row, i, j, c, mask, first_column, image,
    BEFORE: tl.constexpr, TRAINING: tl.constexpr, RING: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Maxima of windows (i, j) for channels c, and where in the window, as max_pool2d has them."""
    best = tl.full([i.shape[0], c.shape[0]], float("-inf"), tl.float32)
    # The first place that exists, should nothing be larger than -inf.
    place = tl.zeros([i.shape[0], c.shape[0]], tl.int32)
    if BEFORE:
        place += (tl.where(i == 0, 3, 0) + tl.where(j == 0, 1, 0))[:, None]
    for up in tl.static_range(3):
        for left in tl.static_range(3):
            h = 2 * i - BEFORE + up
            w = 2 * j - BEFORE + left
            exists = (h >= 0) & (h < image.height) & (w >= 0) & (w < image.width)
            slot = (2 * window_row - BEFORE + up + RING) % RING * COLUMNS + w - first_column
            at = ring_ptr + slot[:, None] * C + c[None, :]
            x = tl.load(at, mask=mask & exists[:, None], other=float("-inf")).to(tl.float32)
            larger = (x > best) | (x != x)
            best = tl.where(larger, x, best)
            if TRAINING:
                place = tl.where(larger, 3 * up + left, place)
    return best, place


@triton.jit
def _block_aggregate_fwd_kernel(
    x, weight_ptr, norm, pos_ptr, out_ptr, ring_ptr, y_ptr, mean_ptr, rstd_ptr, argmax_ptr, image, pairs, share, tiles,
    windows,
    BEFORE: tl.constexpr, TRAINING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POOLED: tl.constexpr,
    C_IN: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: share rows of the pooled images, one image after the other, and windows of their columns."""
    half = image.height // 2
    first = tl.program_id(0) // tiles * share
    stop = tl.minimum(first + share, pairs)
    first_window = tl.program_id(0) % tiles * windows
    # Where one tile is the whole width, nothing is beside it.
    first_column = 2 * first_window
    if tiles > 1:
        first_column -= BEFORE
    RING: tl.constexpr = ROWS + 2
    ring_ptr += tl.program_id(0).to(tl.int64) * (RING * COLUMNS * C)
    m = tl.arange(0, ROWS * COLUMNS)
    for start in range(first - BEFORE, stop + 1 - BEFORE, ROWS // 2):
        pair = start + m // (2 * COLUMNS)
        row = 2 * pair + m // COLUMNS % 2
        w = first_column + m % COLUMNS
        inside = (pair >= 0) & (pair < pairs) & (w >= 0) & (w < image.width)
        b = (tl.maximum(pair, 0) // half).to(tl.int64)
        h = tl.maximum(row, 0) % image.height
        convolved = _convolved(
            x, weight_ptr, b, h, w, inside, image, C_IN, C, PIECES, BLOCK_K, INPUT_PRECISION, STAGES, OFFSET
        )
        if TRAINING:
            # Neighbours store what lies around.
            own = inside & (pair >= first) & (pair < stop)
            own &= (w // 2 >= first_window) & (w // 2 < first_window + windows)
            pixel = (b * image.height + h) * image.width + w
            for n in tl.static_range(len(PIECES)):
                c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
                y = round_to(convolved[n], y_ptr.dtype.element_ty)
                tl.store(y_ptr + pixel[:, None] * C + c[None, :], y, mask=own[:, None] & (c < C)[None, :])
        normalised, mean, rstd = _normalised(convolved, norm, C, PIECES)
        if TRAINING:
            tl.store(mean_ptr + pixel, mean, mask=own)
            tl.store(rstd_ptr + pixel, rstd, mask=own)
        slot = (row + RING) % RING * COLUMNS + m % COLUMNS
        for n in tl.static_range(len(PIECES)):
            c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
            z = round_to(normalised[n], ring_ptr.dtype.element_ty)
            tl.store(ring_ptr + slot[:, None] * C + c[None, :], z, mask=(c < C)[None, :])
        tl.debug_barrier()
        for at in range(0, ROWS * COLUMNS // 4, POOLED):
            k = at + tl.arange(0, POOLED)
            window_row = start - (1 - BEFORE) + k // (COLUMNS // 2)
            j = first_window + k % (COLUMNS // 2)
            exists = (window_row >= first) & (window_row < stop)
            exists &= (j < first_window + windows) & (j < image.width // 2)
            i = tl.maximum(window_row, 0) % half
            out_pixel = _pooled_offset(image, (tl.maximum(window_row, 0) // half).to(tl.int64), i, j, C)
            for n in tl.static_range(len(PIECES)):
                c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
                mask = exists[:, None] & (c < C)[None, :]
                best, place = _window_maxima(
                    ring_ptr, window_row, i, j, c, mask, first_column, image, BEFORE, TRAINING, RING, COLUMNS, C
                )
                to = out_pixel[:, None] + c[None, :]
                if TRAINING:
                    tl.store(argmax_ptr + to, place.to(tl.uint8), mask=mask)
                if pos_ptr is not None:
                    pos = _pooled_offset(image, 0, i, j, C)[:, None] + c[None, :]
                    best += tl.load(pos_ptr + pos, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + to, round_to(best, out_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # before the rows just read are overwritten


@triton.jit
def _zero_vector(SIZE: tl.constexpr):
    return tl.zeros([SIZE], tl.float32)


@triton.jit
def _zeros(PIECES: tl.constexpr):
    zeros = ()
    for n in tl.static_range(len(PIECES)):
        zeros = zeros + (_zero_vector(PIECES[n][1]),)
    return zeros


@triton.jit
def _pooled_gradient(dout_ptr, argmax_ptr, image, b, h, w, c, inside, BEFORE: tl.constexpr, C: tl.constexpr):
    """Gradient of normalised pixels (b, h, w) for channels c: what the windows that chose them got."""
    total = tl.zeros([h.shape[0], c.shape[0]], tl.float32)
    for up in tl.static_range(2):
        for left in tl.static_range(2):
            i = (h + BEFORE) // 2 - up
            j = (w + BEFORE) // 2 - left
            row = h + BEFORE - 2 * i
            column = w + BEFORE - 2 * j
            exists = (row < 3) & (i >= 0) & (i < image.height // 2) & (column < 3) & (j >= 0) & (j < image.width // 2)
            mask = (inside & exists)[:, None] & (c < C)[None, :]
            at = _pooled_offset(image, b, i, j, C)[:, None] + c[None, :]
            place = tl.load(argmax_ptr + at, mask=mask, other=255).to(tl.int32)
            dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(place == (3 * row + column)[:, None], dout, 0.0)
    return total


@triton.jit
def _norm_pool_bwd_kernel(
    dout_ptr, y, norm, mean_ptr, rstd_ptr, argmax_ptr, dy_ptr, partial_ptr, image, pixels, tiles,
    BEFORE: tl.constexpr, PIXELS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: tiles times PIXELS pixels of the convolution's output, and their sums of parameter gradients."""
    dweight = _zeros(PIECES)
    dbias = _zeros(PIECES)
    dconv_bias = _zeros(PIECES)
    start = tl.program_id(0).to(tl.int64) * tiles * PIXELS
    for tile in range(tiles):
        pixel = start + tile * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        b = pixel // (image.height * image.width)
        h = (pixel // image.width % image.height).to(tl.int32)
        w = (pixel % image.width).to(tl.int32)
        mean = tl.load(mean_ptr + pixel, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + pixel, mask=inside, other=0.0)
        from_rows = y.ptr + b * y.b + h.to(tl.int64) * y.h + w.to(tl.int64) * y.w
        total = tl.zeros([PIXELS], tl.float32)
        along = tl.zeros([PIXELS], tl.float32)
        normalised = ()
        gradients = ()
        dweight_sums = ()
        dbias_sums = ()
        for n in tl.static_range(len(PIECES)):
            c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
            mask = inside[:, None] & (c < C)[None, :]
            x = tl.load(from_rows[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if norm.conv_bias is not None:
                x += _vector(norm.conv_bias, c, C)
            x = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            dpool = _pooled_gradient(dout_ptr, argmax_ptr, image, b, h, w, c, inside, BEFORE, C)
            gradient = dpool * _vector(norm.weight, c, C)
            total += tl.sum(gradient, 1)
            along += tl.sum(gradient * x, 1)
            dweight_sums = dweight_sums + (dweight[n] + tl.sum(dpool * x, 0),)
            dbias_sums = dbias_sums + (dbias[n] + tl.sum(dpool, 0),)
            normalised = normalised + (x,)
            gradients = gradients + (gradient,)
        dconv_bias_sums = ()
        for n in tl.static_range(len(PIECES)):
            c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
            mask = inside[:, None] & (c < C)[None, :]
            rest = gradients[n] - (total[:, None] + normalised[n] * along[:, None]) / C
            dy = tl.where(mask, rest * rstd[:, None], 0.0)
            tl.store(dy_ptr + pixel[:, None] * C + c[None, :], round_to(dy, dy_ptr.dtype.element_ty), mask=mask)
            dconv_bias_sums = dconv_bias_sums + (dconv_bias[n] + tl.sum(dy, 0),)
        dweight = dweight_sums
        dbias = dbias_sums
        dconv_bias = dconv_bias_sums
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * C
    for n in tl.static_range(len(PIECES)):
        c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
        tl.store(partial_ptr + c, dweight[n], mask=c < C)
        tl.store(partial_ptr + C + c, dbias[n], mask=c < C)
        tl.store(partial_ptr + 2 * C + c, dconv_bias[n], mask=c < C)


class FusedConfig(NamedTuple):
    """``pixels`` of the convolution in a tile, ``block_k`` input channels a step, ``piece``: the most of C' in one.

    ``registers``: a bound that keeps the compiler from spilling a little to have more warps; None leaves it alone.
    """

    pixels: int
    block_k: int
    piece: int
    num_stages: int
    registers: int | None = None


# (architecture, operands) -> (C' at most, configuration), chosen without a GPU for no spill in training either, then
# the most pixels. Operands are as for attention; an architecture without a list has sm_80's.
_F = FusedConfig
FUSED: dict[tuple[int, str], list[tuple[int, FusedConfig]]] = {
    (80, "half"): [(192, _F(128, 32, 64, 3)), (256, _F(128, 32, 256, 3)), (512, _F(64, 32, 256, 3))],
    (80, "tf32"): [(512, _F(32, 32, 128, 2, 255))],
    (80, "ieee"): [(512, _F(32, 16, 128, 2, 255))],
    (90, "half"): [(192, _F(128, 32, 128, 3)), (256, _F(128, 64, 256, 3)), (512, _F(64, 64, 256, 3))],
    (90, "tf32"): [(256, _F(64, 32, 256, 2, 255)), (512, _F(32, 32, 256, 2, 255))],
    (100, "half"): [(192, _F(128, 32, 128, 3)), (384, _F(64, 32, 128, 3)), (512, _F(32, 32, 256, 3))],
    (100, "tf32"): [(192, _F(32, 16, 128, 2)), (512, _F(32, 32, 128, 2, 255))],
}
POOLED = 4  # windows that a program of the fused forward pools at once: more cost registers
FUSED_WARPS = 8


def _fused_config(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[FusedConfig, str]:
    """The configuration, and the precision of float32 matmuls: as torch's convolutions have it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    precision = "tf32" if tf32 else "ieee"
    operands = precision if dtype == torch.float32 else "half"
    table = FUSED.get((architecture(device), operands)) or FUSED[80, operands]
    return next(config for most, config in table if channels <= most), precision


def _multiprocessors(device: torch.device) -> int:
    """How many programs of the fused forward run at once; where there is no GPU, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class Cut(NamedTuple):
    """A tile is ``rows`` x ``columns`` pixels; ``tiles`` side by side, each of ``windows``, make an image's width.

    ``share``: pairs of rows, counted through all images, that a program goes through, after one that it repeats.
    """

    rows: int
    columns: int
    windows: int
    tiles: int
    share: int


def _cut(pairs: int, width: int, pixels: int, programs: int) -> Cut:
    columns = min(triton.next_power_of_2(width), pixels // 2)
    # Where the width does not fit, neighbours overlap by what a window reaches beyond its two columns.
    windows = width // 2 if columns >= width else columns // 2 - 1
    tiles = triton.cdiv(width // 2, windows)
    rows = pixels // columns
    share = triton.cdiv(pairs * tiles, programs)
    share = triton.cdiv(share + 1, rows // 2) * (rows // 2) - 1  # with the pair that it repeats it fills whole tiles
    return Cut(rows, columns, windows, tiles, share)


def _pieces(channels: int, largest: int = MAX_CHANNELS) -> tuple[tuple[int, int], ...]:
    """(start, size) of falling powers of two that cover the channels, at most four unless cut: 192 → 128 + 64."""
    unit = max(16, triton.next_power_of_2(channels) // 8)
    left, start, pieces = triton.cdiv(channels, unit) * unit, 0, []
    while left:
        size = min(1 << (left.bit_length() - 1), largest)
        pieces.append((start, size))
        start, left = start + size, left - size
    return tuple(pieces)


def _tile(channels: int) -> dict[str, int]:
    """Pixels in a tile and warps: 4 values for each thread, which leaves room for the others it keeps in registers."""
    padded = triton.next_power_of_2(channels)
    pixels = max(4 if padded <= 512 else 2, 512 // padded)
    return {"PIXELS": pixels, "num_warps": max(4, pixels * padded // 128)}


def _pixels(x: Tensor) -> Pixels:
    x = x if x.stride(3) == 1 else x.contiguous()
    return Pixels(x, *x.stride()[:3])


def _image(y: Tensor, out_block: tuple[int, int]) -> Image:
    return Image(y.shape[1], y.shape[2], y.shape[2] // 2 // out_block[1], *out_block)


def norm_pool_fwd(
    y: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pos_embed: Tensor | None,
    out_block: tuple[int, int],
    eps: float,
    same: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``max_pool(layer_norm(y + conv_bias)) + pos_embed``, written in blocks. Checks nothing.

    Args:
        y: ``(B, H, W, C')``, the convolution's output; float32, float16 or bfloat16, H and W even, any strides, but a
            last dimension that is not dense is copied.
        conv_bias, norm_weight, norm_bias: ``(C',)`` float32, contiguous.
        pos_embed: ``(1, T', N', C')`` or None.
        out_block: height and width of the output's blocks, N' pixels; they divide H / 2 and W / 2.
        eps: added to the variance.
        same: whether the pool is padded by one pixel right and below, and not on every side.
        training: whether what the gradient needs is wanted.

    Returns:
        ``out`` ``(B, T', N', C')`` in y's dtype; and, empty without ``training``, ``mean`` and ``rstd`` ``(B, H, W)``
        float32 and ``argmax``, uint8 and shaped as out, each maximum's place in its window, 3 * row + column.
    """
    B, H, W, C = y.shape
    N = out_block[0] * out_block[1]
    shape = (B, H * W // (4 * N), N, C)
    out = torch.empty(shape, dtype=y.dtype, device=y.device)
    kept = B if training else 0
    mean, rstd = (torch.empty((kept, H, W), dtype=torch.float32, device=y.device) for _ in range(2))
    argmax = torch.empty((kept, *shape[1:]), dtype=torch.uint8, device=y.device)
    if out.numel() == 0:
        return out, mean, rstd, argmax
    tile = _tile(C)
    strips, tiles = triton.cdiv(H // 2, STRIP), triton.cdiv(W // 2, tile["PIXELS"])
    with torch.cuda.device_of(y):
        _norm_pool_fwd_kernel[(B * strips * tiles,)](
            _pixels(y), Norm(conv_bias, norm_weight, norm_bias, eps),
            None if pos_embed is None else pos_embed.contiguous(),
            out, mean, rstd, argmax, _image(y, out_block), strips, tiles,
            BEFORE=0 if same else 1, TRAINING=training, STRIP=STRIP, C=C, PIECES=_pieces(C), **tile,
        )  # fmt: skip
    return out, mean, rstd, argmax


def norm_pool_bwd(
    dout: Tensor,
    y: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    argmax: Tensor,
    out_block: tuple[int, int],
    same: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of norm_pool_fwd. No atomics: the same input gives the same bits.

    Args:
        dout: shape and dtype of out, any strides.
        y, conv_bias, norm_weight, out_block, same: as the forward took them; mean, rstd, argmax: as it returned them.

    Returns:
        ``dy`` ``(B, H, W, C')``, contiguous, in y's dtype; ``(3, C')`` float32, the gradients of norm_weight, norm_bias
        and conv_bias.
    """
    C, pixels = y.shape[3], y.shape[:3].numel()
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if dy.numel() == 0:
        return dy, torch.zeros((3, C), dtype=torch.float32, device=y.device)
    tile = _tile(C)
    tiles = triton.cdiv(triton.cdiv(pixels, tile["PIXELS"]), PROGRAMS)
    programs = triton.cdiv(pixels, tile["PIXELS"] * tiles)
    partial = torch.empty((programs, 3, C), dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        _norm_pool_bwd_kernel[(programs,)](
            dout.contiguous(), _pixels(y), Norm(conv_bias, norm_weight, None, 0.0), mean, rstd, argmax, dy, partial,
            _image(y, out_block), pixels, tiles,
            BEFORE=0 if same else 1, C=C, PIECES=_pieces(C), **tile,
            maxnreg=96,  # left alone, the compiler spills a little to have more warps
        )  # fmt: skip
        return dy, partial.sum(0)


def block_aggregate_fwd(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pos_embed: Tensor | None,
    grid: tuple[int, int],
    block: tuple[int, int],
    out_block: tuple[int, int],
    eps: float,
    same: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``max_pool(layer_norm(conv3x3(x) + conv_bias)) + pos_embed``, from blocks to blocks. Checks nothing.

    Args:
        x: ``(B, T, N, C)``; float32, float16 or bfloat16, any strides, but copied if the last dimension is not dense.
        conv_weight: ``(C', C, 3, 3)`` in x's dtype, C' at most MAX_FUSED_CHANNELS; copied, 18 C C' bytes in half
            precision, unless it is channels_last. float32 is multiplied as torch's convolutions do, TF32 by default.
        grid, block: height and width of x's grid of blocks and of a block, in blocks and pixels.
        conv_bias, norm_weight, norm_bias, pos_embed, out_block, eps, same, training: as norm_pool_fwd takes them.

    Returns:
        ``out`` ``(B, T', N', C')`` in x's dtype; and, empty without ``training``, ``y`` ``(B, H, W, C')`` in x's dtype,
        the convolution without bias, and ``mean``, ``rstd``, ``argmax`` as norm_pool_fwd returns them.
    """
    B, C_in, C = x.shape[0], x.shape[3], conv_weight.shape[0]
    H, W = grid[0] * block[0], grid[1] * block[1]
    N = out_block[0] * out_block[1]
    kept = B if training else 0
    out = torch.empty((B, H * W // (4 * N), N, C), dtype=x.dtype, device=x.device)
    y = torch.empty((kept, H, W, C), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((kept, H, W), dtype=torch.float32, device=x.device) for _ in range(2))
    argmax = torch.empty((kept, *out.shape[1:]), dtype=torch.uint8, device=x.device)
    if out.numel() == 0:
        return out, y, mean, rstd, argmax
    x = x if x.stride(3) == 1 else x.contiguous()
    weight = conv_weight.permute(0, 2, 3, 1).contiguous()
    config, precision = _fused_config(C, x.dtype, x.device)
    pairs = B * (H // 2)
    cut = _cut(pairs, W, config.pixels, _multiprocessors(x.device))
    programs = triton.cdiv(pairs, cut.share) * cut.tiles
    ring = torch.empty((programs, cut.rows + 2, cut.columns, C), dtype=x.dtype, device=x.device)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    with torch.cuda.device_of(x):
        _block_aggregate_fwd_kernel[(programs,)](
            Blocks(x, x.stride(0), x.stride(1), x.stride(2), grid[1], *block), weight,
            Norm(conv_bias, norm_weight, norm_bias, eps), None if pos_embed is None else pos_embed.contiguous(),
            out, ring, y, mean, rstd, argmax, Image(H, W, W // 2 // out_block[1], *out_block),
            pairs, cut.share, cut.tiles, cut.windows,
            BEFORE=0 if same else 1, TRAINING=training, ROWS=cut.rows, COLUMNS=cut.columns, POOLED=POOLED, C_IN=C_in,
            C=C, PIECES=_pieces(C, config.piece), BLOCK_K=config.block_k, INPUT_PRECISION=precision,
            STAGES=config.num_stages, OFFSET=tl.int32 if reach < 2**30 else tl.int64, num_warps=FUSED_WARPS,
            maxnreg=config.registers,
        )  # fmt: skip
    return out, y, mean, rstd, argmax
