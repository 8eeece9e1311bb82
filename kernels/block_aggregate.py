"""All of block aggregation's forward in one Triton kernel, from blocks to blocks.

Maths: ``max_pool(layer_norm(conv3x3(x) + bias)) + pos_embed``. Floor of a pixel of x in half precision: 18 C C' FLOP on
the matrix units, 2 C + C' / 2 bytes, 2.25 C' more with what the gradient needs; once 18 C C' bytes of weights.
Tiling: an implicit matmul of pixels by (9 C, C'). A program walks down the rows of one image after the other, two rows
or more at a time, and keeps the normalised rows that the next windows need in a ring in device memory, small enough to
stay in the L2 cache. So its waste is a pair of rows for each program, and columns that no pixel fills.
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
from nest_fast.kernels._primitives import (
    cdiv,
    channel_pieces,
    dot,
    load,
    maximum,
    next_power_of_2,
    piece,
    round_to,
    zeros,
)
from nest_fast.kernels.norm_pool import (
    Norm,
    Spec,
    empty_statistics,
    image_of,
    norm_pixels,
    pooled_offset,
)

__all__ = ["MAX_FUSED_CHANNELS", "block_aggregate_fwd", "cut"]

MAX_FUSED_CHANNELS = 512  # more do not fit in a program's registers


class Blocks(NamedTuple):
    """``(B, T, N, C)`` blocks whose last dimension is dense, and their other strides; ``grid_w`` lie side by side."""

    ptr: Tensor
    b: int
    t: int
    n: int
    grid_w: int
    block_h: int
    block_w: int


class Walk(NamedTuple):
    """Which part of the pooled images a program has, in pairs of rows of pixels, each a row of windows.

    ``pairs`` of all images, of which a program goes through ``share``, after one that it repeats; ``tiles`` side by
    side, each of ``windows``, make an image's width.
    """

    pairs: int
    share: int
    tiles: int
    windows: int


class Tile(NamedTuple):
    """``ROWS`` x ``COLUMNS`` pixels are convolved at once, ``K`` input channels a step, ``STAGES`` steps in flight;
    ``WINDOWS`` x ``CHANNELS`` are pooled at once. TF32: of float32 matmuls; OFFSET, the integer that holds an offset in
    x."""

    ROWS: int
    COLUMNS: int
    K: int
    STAGES: int
    WINDOWS: int
    CHANNELS: int
    TF32: bool
    OFFSET: tl.dtype


@triton.jit
def _outside(OFFSET: tl.constexpr):
    """So far below zero that a row's and a column's offset cannot add up to a pixel of the image."""
    return tl.full([], -(1 << (OFFSET.primitive_bitwidth - 2)), OFFSET)


@triton.jit
def _row_offset(x, h, exists, OFFSET: tl.constexpr):
    """What row h of the image adds to the offset of a pixel in x, which is in blocks."""
    offset = (h // x.block_h * x.grid_w).to(OFFSET) * x.t + (h % x.block_h * x.block_w).to(OFFSET) * x.n
    return tl.where(exists, offset, _outside(OFFSET))


@triton.jit
def _column_offset(x, w, exists, OFFSET: tl.constexpr):
    offset = (w // x.block_w).to(OFFSET) * x.t + (w % x.block_w).to(OFFSET) * x.n
    return tl.where(exists, offset, _outside(OFFSET))


@triton.jit
def _of_three(n, first, second, third):
    return tl.where(n == 0, first, tl.where(n == 1, second, third))


@triton.jit
def _conv3x3(x, weight_ptr, b, h, w, exists, image, C_IN: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The convolution without bias of pixels (b, h, w) [TILE_PIXELS]: [TILE_PIXELS, size] for every piece of C'."""
    PIECES: tl.constexpr = SPEC.PIECES
    K: tl.constexpr = TILE.K
    rows = x.ptr + b * x.b  # [TILE_PIXELS], as all up to the loop
    above = _row_offset(x, h - 1, exists & (h > 0), TILE.OFFSET)
    same_row = _row_offset(x, h, exists, TILE.OFFSET)
    below = _row_offset(x, h + 1, exists & (h < image.height - 1), TILE.OFFSET)
    left = _column_offset(x, w - 1, w > 0, TILE.OFFSET)
    same_column = _column_offset(x, w, (w >= 0) & (w < image.width), TILE.OFFSET)
    right = _column_offset(x, w + 1, w < image.width - 1, TILE.OFFSET)
    acc = zeros(PIECES, h.shape[0])
    STEPS: tl.constexpr = (C_IN + K - 1) // K
    for k in tl.range(9 * STEPS, num_stages=TILE.STAGES):
        tap = k // STEPS
        c_in = k % STEPS * K + tl.arange(0, K)  # [K]
        offset = _of_three(tap // 3, above, same_row, below) + _of_three(tap % 3, left, same_column, right)
        mask = (offset >= 0)[:, None]
        if C_IN % K:
            mask = mask & (c_in < C_IN)[None, :]
        pixels = tl.load((rows + offset)[:, None] + c_in[None, :], mask=mask, other=0.0)  # [TILE_PIXELS, K]
        new_acc = ()
        for n in tl.static_range(len(PIECES)):
            c = piece(PIECES, n)  # [size]
            source = weight_ptr + (tap * C_IN + c_in)[:, None] + c[None, :] * (9 * C_IN)  # [K, size]
            if C_IN % K or PIECES[n][0] + PIECES[n][1] > SPEC.C:
                weight = tl.load(source, mask=(c_in < C_IN)[:, None] & (c < SPEC.C)[None, :], other=0.0)
            else:
                weight = tl.load(source)
            new_acc = new_acc + (dot(pixels, weight, acc[n], TILE.TF32),)
        acc = new_acc
    return acc


@triton.jit
def _max_pool(ring_ptr, window_row, i, j, c, mask, first_column, image, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Maxima [TILE_WINDOWS, TILE_CHANNELS] of windows (i, j) for channels c, and when training where in the window, as
    max_pool2d has them."""
    RING: tl.constexpr = TILE.ROWS + 2
    dtype: tl.constexpr = tl.float32 if SPEC.TRAINING else ring_ptr.dtype.element_ty
    best = tl.full([i.shape[0], c.shape[0]], float("-inf"), tl.float32).to(dtype)
    # The first place that exists, should nothing be larger than -inf.
    argmax = tl.zeros([i.shape[0], c.shape[0]], tl.int32)
    if SPEC.PAD:
        argmax += (tl.where(i == 0, 3, 0) + tl.where(j == 0, 1, 0))[:, None]
    for up in tl.static_range(3):
        for left in tl.static_range(3):
            h = 2 * i - SPEC.PAD + up
            w = 2 * j - SPEC.PAD + left
            exists = (h >= 0) & (h < image.height) & (w >= 0) & (w < image.width)
            slot = (2 * window_row - SPEC.PAD + up + RING) % RING * TILE.COLUMNS + w - first_column
            source = ring_ptr + slot[:, None] * SPEC.C + c[None, :]  # [TILE_WINDOWS, TILE_CHANNELS]
            x = tl.load(source, mask=mask & exists[:, None], other=float("-inf")).to(dtype)
            if SPEC.TRAINING:
                replaces = (x > best) | (x != x)
                best = tl.where(replaces, x, best)
                argmax = tl.where(replaces, 3 * up + left, argmax)
            else:
                best = maximum(best, x)
    return best.to(tl.float32), argmax


@triton.jit(do_not_specialize=["pairs", "share"])
def _block_aggregate_fwd_kernel(
    x,  # Blocks (B, T, N, C)
    weight_ptr,  # (C', 3, 3, C)
    norm,  # Norm
    pos_ptr,  # (1, T', N', C') or None
    out_ptr,  # (B, T', N', C')
    ring_ptr,  # (programs, ROWS + 2, COLUMNS, C'): normalised pixels, row h of a program at h % (ROWS + 2)
    saved,  # when training: y (B, H, W, C'); mean, rstd (B, H, W) float32; argmax (B, T', N', C') uint8
    image,  # Image
    pairs,  # of Walk, whose batch makes no other kernel
    share,
    side,  # tiles and windows of Walk
    C_IN: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a share of rows of the pooled images, one image after the other, and some of their columns."""
    PIECES: tl.constexpr = SPEC.PIECES
    C: tl.constexpr = SPEC.C
    PAD: tl.constexpr = SPEC.PAD
    COLUMNS: tl.constexpr = TILE.COLUMNS
    RING: tl.constexpr = TILE.ROWS + 2
    CHUNKS: tl.constexpr = (C + TILE.CHANNELS - 1) // TILE.CHANNELS
    y_ptr, mean_ptr, rstd_ptr, argmax_ptr = saved
    tiles, windows = side
    half = image.height // 2
    first = tl.program_id(0) // tiles * share
    stop = tl.minimum(first + share, pairs)
    first_window = tl.program_id(0) % tiles * windows
    # Where one tile is the whole width, nothing is beside it.
    first_column = 2 * first_window
    if tiles > 1:
        first_column -= PAD
    ring_ptr += tl.program_id(0).to(tl.int64) * (RING * COLUMNS * C)
    m = tl.arange(0, TILE.ROWS * COLUMNS)  # [TILE_PIXELS], row by row
    for start in range(first - PAD, stop + 1 - PAD, TILE.ROWS // 2):
        pair = start + m // (2 * COLUMNS)  # [TILE_PIXELS], as all up to the ring
        row = 2 * pair + m // COLUMNS % 2
        w = first_column + m % COLUMNS
        exists = (pair >= 0) & (pair < pairs) & (w >= 0) & (w < image.width)
        b = (tl.maximum(pair, 0) // half).to(tl.int64)
        h = tl.maximum(row, 0) % image.height
        convolved = _conv3x3(x, weight_ptr, b, h, w, exists, image, C_IN, SPEC, TILE)
        if SPEC.TRAINING:
            # Neighbours store what lies around.
            is_mine = exists & (pair >= first) & (pair < stop)
            is_mine &= (w // 2 >= first_window) & (w // 2 < first_window + windows)
            pixel = (b * image.height + h) * image.width + w
            for n in tl.static_range(len(PIECES)):
                c = piece(PIECES, n)  # [size]
                y = round_to(convolved[n], y_ptr.dtype.element_ty)
                tl.store(y_ptr + pixel[:, None] * C + c[None, :], y, mask=is_mine[:, None] & (c < C)[None, :])
        normed, mean, rstd = norm_pixels(convolved, norm, SPEC)
        if SPEC.TRAINING:
            tl.store(mean_ptr + pixel, mean, mask=is_mine)
            tl.store(rstd_ptr + pixel, rstd, mask=is_mine)
        slot = (row + RING) % RING * COLUMNS + m % COLUMNS
        for n in tl.static_range(len(PIECES)):
            c = piece(PIECES, n)
            z = round_to(normed[n], ring_ptr.dtype.element_ty)  # [TILE_PIXELS, size]
            tl.store(ring_ptr + slot[:, None] * C + c[None, :], z, mask=(c < C)[None, :])
        tl.debug_barrier()
        for tile in range(0, TILE.ROWS * COLUMNS // 4, TILE.WINDOWS):
            k = tile + tl.arange(0, TILE.WINDOWS)  # [TILE_WINDOWS]
            window_row = start - (1 - PAD) + k // (COLUMNS // 2)
            j = first_window + k % (COLUMNS // 2)
            in_share = (window_row >= first) & (window_row < stop)
            in_share &= (j < first_window + windows) & (j < image.width // 2)
            i = tl.maximum(window_row, 0) % half
            window = pooled_offset(image, (tl.maximum(window_row, 0) // half).to(tl.int64), i, j, C)
            for n in tl.static_range(CHUNKS):
                pooled = n * TILE.CHANNELS + tl.arange(0, TILE.CHANNELS)  # [TILE_CHANNELS]
                mask = in_share[:, None]
                if C % TILE.CHANNELS:
                    mask = mask & (pooled < C)[None, :]
                best, argmax = _max_pool(ring_ptr, window_row, i, j, pooled, mask, first_column, image, SPEC, TILE)
                offsets = window[:, None] + pooled[None, :]  # [TILE_WINDOWS, TILE_CHANNELS]
                if SPEC.TRAINING:
                    tl.store(argmax_ptr + offsets, argmax.to(tl.uint8), mask=mask)
                if pos_ptr is not None:
                    best += load(pos_ptr, pooled_offset(image, 0, i, j, C)[:, None] + pooled[None, :], mask)
                tl.store(out_ptr + offsets, round_to(best, out_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # before the rows just read are overwritten


def cut(pairs: int, width: int, pixels: int, programs: int) -> tuple[int, int, Walk]:
    """Rows and columns of a tile of so many pixels, and the walk that keeps so many programs busy."""
    columns = min(next_power_of_2(width), pixels // 2)
    # Where the width does not fit, neighbours overlap by what a window reaches beyond its two columns.
    windows = width // 2 if columns >= width else columns // 2 - 1
    tiles = cdiv(width // 2, windows)
    rows = pixels // columns
    share = cdiv(pairs * tiles, programs)
    share = cdiv(share + 1, rows // 2) * (rows // 2) - 1  # with the pair that it repeats it fills whole tiles
    return rows, columns, Walk(pairs, share, tiles, windows)


def pool_tile(windows: int, channels: int, threads: int, training: bool) -> tuple[int, int]:
    """How many of a tile's ``windows`` and of the channels are pooled at once: 8 values for each thread, which half
    precision loads at once; when training 4, since their places take registers, too."""
    values = (4 if training else 8) * threads
    divisor = channels & -channels  # the largest power of two that divides them
    chunk = min(divisor if divisor >= 64 else next_power_of_2(channels), 256, values)
    return min(windows, values // chunk), chunk


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
    out = torch.empty((B, H * W // (4 * N), N, C), dtype=x.dtype, device=x.device)
    y = torch.empty((B if training else 0, H, W, C), dtype=x.dtype, device=x.device)
    mean, rstd, argmax = empty_statistics(out, H, W, training)
    if out.numel() == 0:
        return out, y, mean, rstd, argmax
    x = x if x.stride(3) == 1 else x.contiguous()
    weight = conv_weight.permute(0, 2, 3, 1).contiguous()
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    operands = _configs.operands(x.dtype, tf32)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    offset = tl.int32 if reach < 2**30 else tl.int64
    blocks, image = Blocks(x, x.stride(0), x.stride(1), x.stride(2), grid[1], *block), image_of(H, W, out_block)
    norm, saved = Norm(conv_bias, norm_weight, norm_bias, eps), (y, mean, rstd, argmax)
    pos_embed = None if pos_embed is None else pos_embed.contiguous()
    multiprocessors = _configs.multiprocessors(x.device)

    def run(config, start):
        rows, columns, walk = cut(B * (H // 2), W, config.tile_pixels, multiprocessors)
        programs = cdiv(walk.pairs, walk.share) * walk.tiles
        ring = torch.empty((programs, rows + 2, columns, C), dtype=x.dtype, device=x.device)
        pooled = pool_tile(rows * columns // 4, C, 32 * config.num_warps, training)
        tile = Tile(rows, columns, config.tile_k, config.num_stages, *pooled, operands == "tf32", offset)
        spec = Spec(C, channel_pieces(C, config.tile_c), 0 if same else 1, training)
        start(
            _block_aggregate_fwd_kernel, programs,
            blocks, weight, norm, pos_embed, out, ring, saved, image, walk.pairs, walk.share, walk[2:],
            C_IN=C_in, SPEC=spec, TILE=tile, num_warps=config.num_warps, maxnreg=config.maxnreg,
        )  # fmt: skip

    launch(_configs.block_aggregate, (C, operands, C_in, W, x.dtype, same, training), x, run)
    return out, y, mean, rstd, argmax
