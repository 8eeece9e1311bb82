"""What follows block aggregation's convolution, in Triton: ``max_pool(layer_norm(y + bias)) + pos_embed``, in blocks.

Maths: 3 x 3 windows with stride 2, argmax as max_pool2d has it; the gradient of a normalised pixel is the sum over the
windows that chose it, then LayerNorm's backward as in add_layer_norm. Floor of n elements of y in half precision: 2.5n
bytes forward, 2.75n with what the gradient needs, 4.75n backward, some 15n FLOP each.
Tiling: a program of the forward has TILE_PIXELS columns of windows and walks down STRIP rows of them; it keeps the
maxima of the last row of pixels, which two windows share, so a row is normalised once but at the borders of strips.
LayerNorm needs all C' channels of a pixel in one program: they are cut into pieces. A program of the backward has some
tiles of TILE_PIXELS pixels of y.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import both, cdiv, channel_pieces, load, load_row, piece, round_to, zeros
from nest_fast.kernels._rows import layer_norm

__all__ = [
    "MAX_CHANNELS", "Image", "Norm", "Spec", "empty_statistics", "image_of",
    "norm_pixels", "norm_pool_bwd", "norm_pool_fwd", "pooled_offset",
]  # fmt: skip

MAX_CHANNELS = 1024
STRIP = 4  # rows of windows that a program of the forward walks down


class Pixels(NamedTuple):
    """A ``(B, H, W, C')`` image whose last dimension is dense, and its other strides."""

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


class Spec(NamedTuple):
    """What the kernels are compiled for: C' channels and their pieces, rows and columns of padding before the image,
    and whether what the gradient needs is stored."""

    C: int
    PIECES: tuple[tuple[int, int], ...]
    PAD: int
    TRAINING: bool


# --- what the fused forward does in the same way ----------------------------------------------------------------------


@triton.jit
def pooled_offset(image, b, i, j, C: tl.constexpr):
    """Where pixel (i, j) of pooled image b, which is 64-bit, begins in ``(B, T', N', C')``."""
    block = (i // image.block_h) * image.grid_w + j // image.block_w
    token = (i % image.block_h) * image.block_w + j % image.block_w
    pixel = block * (image.block_h * image.block_w) + token
    return (b * (image.height // 2 * (image.width // 2)) + pixel) * C


@triton.jit
def norm_pixels(convolved, norm, SPEC: tl.constexpr):
    """LayerNorm of pixels whose convolution has no bias yet: [TILE_PIXELS, size] for every piece; mean and rstd."""
    PIECES: tl.constexpr = SPEC.PIECES
    pixels = ()
    for n in tl.static_range(len(PIECES)):
        x = convolved[n]
        if norm.conv_bias is not None:
            x += load_row(norm.conv_bias, piece(PIECES, n), SPEC.C)
        pixels = pixels + (x,)
    return layer_norm(pixels, norm, SPEC.C, PIECES, False)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_pixels(rows, exists, SPEC: tl.constexpr):
    """Pixels that begin at pointers rows [TILE_PIXELS], float32 [TILE_PIXELS, size] for every piece."""
    PIECES: tl.constexpr = SPEC.PIECES
    pixels = ()
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        mask = exists[:, None] & (c < SPEC.C)[None, :]
        pixels = pixels + (load(rows[:, None], c[None, :], mask),)
    return pixels


@triton.jit
def _replaces(x, best, exists, alone):
    """Whether x replaces best, as max_pool2d has it: the first of equals stays, NaN wins over all.

    x does not count unless it exists; best does not where x is alone, being padding.
    """
    return exists & (alone | (x > best) | (x != x))


@triton.jit
def _max_along_width(y, b, h, j, is_mine, norm, statistics, image, SPEC: tl.constexpr):
    """Maxima of windows j [TILE_PIXELS] within row h of pixels, and their column in the window, for every piece.

    Stores the statistics of the row's pixels if they are this program's.
    """
    PIECES: tl.constexpr = SPEC.PIECES
    mean_ptr, rstd_ptr = statistics
    best = ()
    argmax = ()
    for k in tl.static_range(3):
        w = 2 * j - SPEC.PAD + k
        exists = (w >= 0) & (w < image.width)
        rows = y.ptr + b * y.b + h.to(tl.int64) * y.h + w.to(tl.int64) * y.w
        pixels = _load_pixels(rows, both(both(exists, h >= 0), h < image.height), SPEC)
        x, mean, rstd = norm_pixels(pixels, norm, SPEC)
        if SPEC.TRAINING:
            pixel = (b * image.height + h) * image.width + w
            mask = both(exists, is_mine) & (w // 2 == j)
            tl.store(mean_ptr + pixel, mean, mask=mask)
            tl.store(rstd_ptr + pixel, rstd, mask=mask)
        if k == 0:
            best = x
            if SPEC.TRAINING:
                for n in tl.static_range(len(PIECES)):
                    argmax = argmax + (tl.zeros(x[n].shape, tl.int32),)
        else:
            new_best = ()
            new_argmax = ()
            for n in tl.static_range(len(PIECES)):
                replaces = _replaces(x[n], best[n], exists[:, None], (w < 1)[:, None])
                new_best = new_best + (tl.where(replaces, x[n], best[n]),)
                if SPEC.TRAINING:
                    new_argmax = new_argmax + (tl.where(replaces, k, argmax[n]),)
            best = new_best
            argmax = new_argmax
    return best, argmax


@triton.jit
def _norm_pool_fwd_kernel(
    y,  # Pixels (B, H, W, C')
    norm,  # Norm
    pos_ptr,  # (1, T', N', C') or None
    out_ptr,  # (B, T', N', C')
    statistics,  # mean and rstd, (B, H, W) float32 each; stored when training
    argmax_ptr,  # (B, T', N', C') uint8: 3 * row + column in the window; stored when training
    image,  # Image
    strips,
    tiles,
    SPEC: tl.constexpr,
    STRIP: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
):
    """One program: TILE_PIXELS columns of STRIP rows of one pooled image, tiles x strips of them an image."""
    PIECES: tl.constexpr = SPEC.PIECES
    b = (tl.program_id(0) // (strips * tiles)).to(tl.int64)
    first = tl.program_id(0) // tiles % strips * STRIP
    j = tl.program_id(0) % tiles * TILE_PIXELS + tl.arange(0, TILE_PIXELS)  # [TILE_PIXELS]
    stop = tl.minimum(first + STRIP, image.height // 2)
    h = 2 * first - SPEC.PAD
    above, argmax_above = _max_along_width(y, b, h, j, h >= 2 * first, norm, statistics, image, SPEC)
    for i in range(first, stop):
        h = 2 * i - SPEC.PAD
        middle, argmax_middle = _max_along_width(y, b, h + 1, j, True, norm, statistics, image, SPEC)
        below, argmax_below = _max_along_width(y, b, h + 2, j, h + 2 < 2 * stop, norm, statistics, image, SPEC)
        pixel = pooled_offset(image, b, i, j, SPEC.C)
        for n in tl.static_range(len(PIECES)):
            c = piece(PIECES, n)  # [size]
            mask = (j < image.width // 2)[:, None] & (c < SPEC.C)[None, :]
            offsets = pixel[:, None] + c[None, :]  # [TILE_PIXELS, size]
            from_middle = _replaces(middle[n], above[n], True, h < 0)
            best = tl.where(from_middle, middle[n], above[n])
            from_below = _replaces(below[n], best, h + 2 < image.height, False)
            best = tl.where(from_below, below[n], best)
            if SPEC.TRAINING:
                argmax = tl.where(from_middle, argmax_middle[n] + 3, argmax_above[n])
                argmax = tl.where(from_below, argmax_below[n] + 6, argmax)
                tl.store(argmax_ptr + offsets, argmax.to(tl.uint8), mask=mask)
            if pos_ptr is not None:
                best += load(pos_ptr, pooled_offset(image, 0, i, j, SPEC.C)[:, None] + c[None, :], mask)
            tl.store(out_ptr + offsets, round_to(best, out_ptr.dtype.element_ty), mask=mask)
        above = below
        argmax_above = argmax_below


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _max_pool_gradient(dout_ptr, argmax_ptr, image, b, h, w, c, exists, SPEC: tl.constexpr):
    """Gradient [TILE_PIXELS, size] of normalised pixels (b, h, w) for channels c: what windows that chose them got."""
    dpool = tl.zeros([h.shape[0], c.shape[0]], tl.float32)
    for up in tl.static_range(2):
        for left in tl.static_range(2):
            i = (h + SPEC.PAD) // 2 - up
            j = (w + SPEC.PAD) // 2 - left
            row = h + SPEC.PAD - 2 * i
            column = w + SPEC.PAD - 2 * j
            in_window = (row < 3) & (i >= 0) & (i < image.height // 2)
            in_window = in_window & (column < 3) & (j >= 0) & (j < image.width // 2)
            mask = (exists & in_window)[:, None] & (c < SPEC.C)[None, :]
            offsets = pooled_offset(image, b, i, j, SPEC.C)[:, None] + c[None, :]  # [TILE_PIXELS, size]
            argmax = tl.load(argmax_ptr + offsets, mask=mask, other=255).to(tl.int32)
            dout = load(dout_ptr, offsets, mask)
            dpool += tl.where(argmax == (3 * row + column)[:, None], dout, 0.0)
    return dpool


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _norm_pool_bwd_kernel(
    dout_ptr,  # (B, T', N', C')
    y,  # Pixels (B, H, W, C')
    norm,  # Norm without bias
    statistics,  # mean and rstd, (B, H, W) float32 each
    argmax_ptr,  # (B, T', N', C') uint8
    dy_ptr,  # (B, H, W, C')
    partial_ptr,  # (programs, 3, C') float32: sums for the gradients of LayerNorm's weight and bias, of conv_bias
    image,  # Image
    pixels,  # B * H * W
    tiles,  # that a program has
    SPEC: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
):
    """One program: tiles times TILE_PIXELS pixels of the convolution's output, and their sums."""
    PIECES: tl.constexpr = SPEC.PIECES
    C: tl.constexpr = SPEC.C
    mean_ptr, rstd_ptr = statistics
    dweight = zeros(PIECES)
    dbias = zeros(PIECES)
    dconv_bias = zeros(PIECES)
    first = tl.program_id(0).to(tl.int64) * tiles * TILE_PIXELS
    for tile in range(tiles):
        pixel = first + tile * TILE_PIXELS + tl.arange(0, TILE_PIXELS)  # [TILE_PIXELS], as all up to the next comment
        exists = pixel < pixels
        b = pixel // (image.height * image.width)
        h = (pixel // image.width % image.height).to(tl.int32)
        w = (pixel % image.width).to(tl.int32)
        mean = load(mean_ptr, pixel, exists)
        rstd = load(rstd_ptr, pixel, exists)
        rows = y.ptr + b * y.b + h.to(tl.int64) * y.h + w.to(tl.int64) * y.w
        dnormed_sum = tl.zeros([TILE_PIXELS], tl.float32)
        dot = tl.zeros([TILE_PIXELS], tl.float32)
        normalised = ()
        dnormed = ()
        new_dweight = ()
        new_dbias = ()
        for n in tl.static_range(len(PIECES)):  # [TILE_PIXELS, size] each
            c = piece(PIECES, n)
            mask = exists[:, None] & (c < C)[None, :]
            x = load(rows[:, None], c[None, :], mask)
            if norm.conv_bias is not None:
                x += load_row(norm.conv_bias, c, C)
            x = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            dpool = _max_pool_gradient(dout_ptr, argmax_ptr, image, b, h, w, c, exists, SPEC)
            d = dpool * load_row(norm.weight, c, C)
            dnormed_sum += tl.sum(d, 1)
            dot += tl.sum(d * x, 1)
            new_dweight = new_dweight + (dweight[n] + tl.sum(dpool * x, 0),)
            new_dbias = new_dbias + (dbias[n] + tl.sum(dpool, 0),)
            normalised = normalised + (x,)
            dnormed = dnormed + (d,)
        new_dconv_bias = ()
        for n in tl.static_range(len(PIECES)):
            c = piece(PIECES, n)
            mask = exists[:, None] & (c < C)[None, :]
            dy = dnormed[n] - (dnormed_sum[:, None] + normalised[n] * dot[:, None]) / C
            dy = tl.where(mask, dy * rstd[:, None], 0.0)
            tl.store(dy_ptr + pixel[:, None] * C + c[None, :], round_to(dy, dy_ptr.dtype.element_ty), mask=mask)
            new_dconv_bias = new_dconv_bias + (dconv_bias[n] + tl.sum(dy, 0),)
        dweight = new_dweight
        dbias = new_dbias
        dconv_bias = new_dconv_bias
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * C
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        tl.store(partial_ptr + c, dweight[n], mask=c < C)
        tl.store(partial_ptr + C + c, dbias[n], mask=c < C)
        tl.store(partial_ptr + 2 * C + c, dconv_bias[n], mask=c < C)


# --- launchers --------------------------------------------------------------------------------------------------------


def image_of(height: int, width: int, out_block: tuple[int, int]) -> Image:
    return Image(height, width, width // 2 // out_block[1], *out_block)


def empty_statistics(out: Tensor, height: int, width: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean, rstd and argmax as norm_pool_fwd returns them, not filled."""
    B = out.shape[0] if training else 0
    mean, rstd = (torch.empty((B, height, width), dtype=torch.float32, device=out.device) for _ in range(2))
    return mean, rstd, torch.empty((B, *out.shape[1:]), dtype=torch.uint8, device=out.device)


def _pixels(x: Tensor) -> Pixels:
    x = x if x.stride(3) == 1 else x.contiguous()
    return Pixels(x, *x.stride()[:3])


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
    out = torch.empty((B, H * W // (4 * N), N, C), dtype=y.dtype, device=y.device)
    mean, rstd, argmax = empty_statistics(out, H, W, training)
    if out.numel() == 0:
        return out, mean, rstd, argmax
    spec, image = Spec(C, channel_pieces(C, MAX_CHANNELS), 0 if same else 1, training), image_of(H, W, out_block)
    pixels, norm = _pixels(y), Norm(conv_bias, norm_weight, norm_bias, eps)
    pos_embed = None if pos_embed is None else pos_embed.contiguous()

    def run(tile, start):
        strips, tiles = cdiv(H // 2, STRIP), cdiv(W // 2, tile["TILE_PIXELS"])
        start(
            _norm_pool_fwd_kernel, B * strips * tiles,
            pixels, norm, pos_embed, out, (mean, rstd), argmax, image, strips, tiles, SPEC=spec, STRIP=STRIP, **tile,
        )  # fmt: skip

    launch(_configs.norm_pool, ("fwd", C, y.dtype, same, training), y, run)
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
    spec = Spec(C, channel_pieces(C, MAX_CHANNELS), 0 if same else 1, True)
    image = image_of(y.shape[1], y.shape[2], out_block)
    dout, rows, norm = dout.contiguous(), _pixels(y), Norm(conv_bias, norm_weight, None, 0.0)

    def run(tile, start):
        tiles = cdiv(cdiv(pixels, tile["TILE_PIXELS"]), _configs.at_once(y.device, tile))
        programs = cdiv(pixels, tile["TILE_PIXELS"] * tiles)
        partial = torch.empty((programs, 3, C), dtype=torch.float32, device=y.device)
        start(
            _norm_pool_bwd_kernel, programs,
            dout, rows, norm, (mean, rstd), argmax, dy, partial, image, pixels, tiles, SPEC=spec, **tile,
        )  # fmt: skip
        return partial

    partial = launch(_configs.norm_pool, ("bwd", C, y.dtype, same), y, run)
    return dy, partial.sum(0)
