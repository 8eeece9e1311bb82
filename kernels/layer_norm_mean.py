"""LayerNorm and the mean over an image's tokens in Triton: ``out = mean over tokens of layer_norm(x)``.

Maths: with z = (x - mean) rstd, out = mean(z) weight + bias; with g = dout weight / tokens, one for all tokens of an
image, dx = rstd (g - mean(g) - z mean(g z)), means over C. Floor of n elements in half precision: 2n bytes forward, 4n
backward; some 8n and 7n FLOP. Tiling: a program holds TILE_ROWS whole tokens of C channels, several such tiles below
each other; where an image has several programs ("parts"), a second kernel adds up what they leave.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, load, load_row, normalise, round_to

__all__ = ["layer_norm_mean_bwd", "layer_norm_mean_fwd"]


@triton.jit
def _store_mean(normed_sum, b, affine, outs, tokens, c, C):
    """Image b's outputs from the sum [TILE_C] of its normalised tokens; the affine map commutes with the mean."""
    weight_ptr, bias_ptr = affine
    out_ptr, normed_mean_ptr = outs
    mean = normed_sum / tokens
    out = mean * load(weight_ptr, c, c < C) + load(bias_ptr, c, c < C)
    tl.store(out_ptr + b * C + c, round_to(out, out_ptr.dtype.element_ty), mask=c < C)
    tl.store(normed_mean_ptr + b * C + c, mean, mask=c < C)


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def _layer_norm_mean_fwd_kernel(
    x_ptr,  # (B, tokens, C)
    affine,  # weight and bias, (C,) each
    eps,
    outs,  # out (B, C); the same before weight and bias, (B, C) float32
    statistics,  # mean and rstd, (B, tokens) float32 each
    partial_ptr,  # (B, parts, C) float32: sums of normalised tokens, or None where an image is one part
    tokens,
    parts,
    tiles,  # that a part has
    C,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: a part, tiles times TILE_ROWS tokens of an image."""
    mean_ptr, rstd_ptr = statistics
    b = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * tiles * TILE_ROWS
    c = tl.arange(0, TILE_C)  # [TILE_C]
    normed_sum = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for tile in range(tiles):
        token = first + tile * TILE_ROWS + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
        exists = token < tokens
        row = b * tokens + token
        mask = exists[:, None] & (c < C)[None, :]
        x = load(x_ptr, row[:, None] * C + c[None, :], mask)  # [TILE_ROWS, TILE_C]
        normed, mean, rstd = normalise(x, mask, eps, C)
        normed_sum += tl.where(mask, normed, 0.0)
        tl.store(mean_ptr + row, mean, mask=exists)
        tl.store(rstd_ptr + row, rstd, mask=exists)
    if partial_ptr is None:
        _store_mean(tl.sum(normed_sum, 0), b, affine, outs, tokens, c, C)
    else:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(normed_sum, 0), mask=c < C)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _layer_norm_mean_join_kernel(
    partial_ptr,  # (B, parts, C) float32
    affine,  # weight and bias, (C,) each
    outs,  # as above
    tokens,
    parts,
    C,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: an image's parts, TILE_ROWS at a time."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, TILE_C)  # [TILE_C]
    normed_sum = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for first in range(0, parts, TILE_ROWS):
        part = first + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
        offsets = (b * parts + part)[:, None] * C + c[None, :]  # [TILE_ROWS, TILE_C]
        normed_sum += load(partial_ptr, offsets, (part < parts)[:, None] & (c < C)[None, :])
    _store_mean(tl.sum(normed_sum, 0), b, affine, outs, tokens, c, C)


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def _layer_norm_mean_bwd_kernel(
    dout_ptr,  # (B, C)
    x_ptr,  # (B, tokens, C)
    statistics,  # mean and rstd, (B, tokens) float32 each
    weight_ptr,  # (C,)
    dx_ptr,  # (B, tokens, C)
    tokens,
    parts,
    tiles,  # that a part has
    C,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: a part, as the forward's. All tokens of an image have the same gradient."""
    mean_ptr, rstd_ptr = statistics
    b = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * tiles * TILE_ROWS
    c = tl.arange(0, TILE_C)  # [TILE_C]
    dnormed = load(dout_ptr, b * C + c, c < C)[None, :] * load_row(weight_ptr, c, C) / tokens  # [1, TILE_C]
    centred = dnormed - tl.sum(dnormed, 1)[:, None] / C
    for tile in range(tiles):
        token = first + tile * TILE_ROWS + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
        exists = token < tokens
        row = b * tokens + token
        mask = exists[:, None] & (c < C)[None, :]
        offsets = row[:, None] * C + c[None, :]  # [TILE_ROWS, TILE_C]
        rstd = load(rstd_ptr, row, exists)[:, None]  # [TILE_ROWS, 1]
        normed = (load(x_ptr, offsets, mask) - load(mean_ptr, row, exists)[:, None]) * rstd  # [TILE_ROWS, TILE_C]
        dot_mean = tl.sum(dnormed * normed, 1)[:, None] / C  # [TILE_ROWS, 1]
        dx = (centred - normed * dot_mean) * rstd
        tl.store(dx_ptr + offsets, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


def _parts(batch: int, tokens: int, rows: int, programs: int) -> tuple[int, int]:
    """How many of the ``programs`` share an image's tokens, and how many tiles of ``rows`` each of them has."""
    all_tiles = cdiv(tokens, rows)
    # Fewer than four tiles in a part would make the parts' sums as much work as the tokens.
    most = min(cdiv(all_tiles, 4), max(1, programs // batch))
    tiles = cdiv(all_tiles, most)
    return cdiv(all_tiles, tiles), tiles


def layer_norm_mean_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``layer_norm(x)``'s mean over tokens. Checks nothing.

    Args:
        x: ``(B, ..., C)``, any strides, but one that is not contiguous is copied; C at most MAX_LAYER_NORM_CHANNELS.
        weight, bias: ``(C,)``. Any of float32, float16 and bfloat16, also different ones.
        eps: added to the variance.
        dtype: of the output.

    Returns:
        ``out`` ``(B, C)``, NaN where there is no token; ``normed_mean`` ``(B, C)`` float32, out before the affine
        map; ``mean`` and ``rstd`` ``(B, ...)`` float32.
    """
    B, C, tokens = x.shape[0], x.shape[-1], x.shape[1:-1].numel()
    out = torch.empty((B, C), dtype=dtype, device=x.device)
    normed_mean = torch.empty((B, C), dtype=torch.float32, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return out.fill_(float("nan")), normed_mean.zero_(), mean, rstd
    x, affine, outs = x.contiguous(), (weight.contiguous(), bias.contiguous()), (out, normed_mean)

    def run(tile, start):
        parts, tiles = _parts(B, tokens, tile["TILE_ROWS"], _configs.at_once(x.device, tile))
        partial = None if parts == 1 else torch.empty((B, parts, C), dtype=torch.float32, device=x.device)
        start(
            _layer_norm_mean_fwd_kernel, B * parts,
            x, affine, eps, outs, (mean, rstd), partial, tokens, parts, tiles, C, **tile,
        )  # fmt: skip
        if partial is not None:
            start(_layer_norm_mean_join_kernel, B, partial, affine, outs, tokens, parts, C, **tile)

    launch(_configs.layer_norm, ("layer_norm_mean_fwd", C, x.dtype), x, run)
    return out, normed_mean, mean, rstd


def layer_norm_mean_bwd(
    dout: Tensor, x: Tensor, normed_mean: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of layer_norm_mean_fwd. No atomics: the same input gives the same bits.

    Args:
        dout: ``(B, C)``, any strides.
        x, weight: as the forward took them; normed_mean, mean, rstd: as it returned them.

    Returns:
        ``dx`` in x's shape and dtype; the gradients of weight and bias, ``(2, C)`` float32.
    """
    B, C, tokens = x.shape[0], x.shape[-1], x.shape[1:-1].numel()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros((2, C), dtype=torch.float32, device=x.device)
    dout, x, weight = dout.contiguous(), x.contiguous(), weight.contiguous()

    def run(tile, start):
        parts, tiles = _parts(B, tokens, tile["TILE_ROWS"], _configs.at_once(x.device, tile))
        start(
            _layer_norm_mean_bwd_kernel, B * parts,
            dout, x, (mean, rstd), weight, dx, tokens, parts, tiles, C, **tile,
        )  # fmt: skip

    launch(_configs.layer_norm, ("layer_norm_mean_bwd", C, x.dtype), x, run)
    # A token's gradient is its image's, so that the sums over tokens are the forward's.
    dout = dout.float()
    return dx, torch.stack([(dout * normed_mean).sum(0), dout.sum(0)])
