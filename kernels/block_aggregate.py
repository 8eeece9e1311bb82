"""Block aggregation in Triton: what follows the convolution, forward and backward, in one kernel each.

LayerNorm needs all C' channels of a pixel in one program. C' is rarely a power of two, so it is cut into pieces that
are: 192 → 128 + 64. A program of the forward walks down the image and keeps the maxima of the last row, which two
windows share, so a row of the convolution's output is normalised once but at the borders of strips.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from nest_fast.kernels._primitives import round_to
from torch import Tensor

__all__ = ["MAX_CHANNELS", "norm_pool_bwd", "norm_pool_fwd"]

MAX_CHANNELS = 1024
STRIP = 4  # rows of the output that a program of the forward makes
PROGRAMS = 2048  # of the backward, at most: each leaves one row of partial sums


class Pixels(NamedTuple):
    """A ``(B, H, W, C)`` image whose last dimension is dense, and its other strides."""

    ptr: Tensor
    b: int
    h: int
    w: int


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
def _normalised(rows, inside, norm, C: tl.constexpr, PIECES: tl.constexpr):
    """The LayerNorm of pixels that begin at pointers rows, piece by piece of the channels, their mean and rstd."""
    pixels = ()
    total = tl.zeros(rows.shape, tl.float32)
    for n in tl.static_range(len(PIECES)):
        c = PIECES[n][0] + tl.arange(0, PIECES[n][1])
        mask = inside[:, None] & (c < C)[None, :]
        x = tl.load(rows[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if norm.conv_bias is not None:
            x += _vector(norm.conv_bias, c, C)
        total += tl.sum(x, 1)
        pixels = pixels + (x,)
    mean = total / C
    total = tl.zeros(rows.shape, tl.float32)
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
        x, mean, rstd = _normalised(rows, exists & (h >= 0) & (h < image.height), norm, C, PIECES)
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


def _pieces(channels: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of at most four falling powers of two that cover the channels: 192 → 128 + 64."""
    unit = max(16, triton.next_power_of_2(channels) // 8)
    left, start, pieces = triton.cdiv(channels, unit) * unit, 0, []
    while left:
        size = 1 << (left.bit_length() - 1)
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
