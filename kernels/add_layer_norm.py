"""Residual sum and LayerNorm in Triton: ``total = x + scale (branch + bias)``, ``normed = layer_norm(total)``.

Maths: with z = (total - mean) rstd and g = dnormed weight, dx = dtotal + rstd (g - mean(g) - z mean(g z)), means over
C; dbranch = scale dx. Floor of n elements in half precision: 8n bytes forward, 8n backward (10n with a scale, whose
dbranch is another tensor), some 12n and 14n FLOP.
Tiling: a program holds TILE_ROWS whole rows of C channels, so the variance is taken about the mean; in the backward
several such tiles below each other, whose sums are one row of partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, load, load_row, normalise, round_to

__all__ = ["add_layer_norm_bwd", "add_layer_norm_fwd"]


@triton.jit(do_not_specialize=["rows", "rows_per_sample"])
def _add_layer_norm_fwd_kernel(
    x_ptr,  # (rows, C)
    branch,  # (rows, C); its scale (B,) or None; its bias (C,) or None
    affine,  # LayerNorm's weight and bias, (C,) each; eps
    outs,  # total and normed, (rows, C) each
    statistics,  # mean and rstd, (rows,) float32 each
    rows,
    rows_per_sample,
    C,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: TILE_ROWS rows."""
    branch_ptr, branch_scale_ptr, branch_bias_ptr = branch
    weight_ptr, bias_ptr, eps = affine
    total_ptr, normed_ptr = outs
    mean_ptr, rstd_ptr = statistics
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
    c = tl.arange(0, TILE_C)  # [TILE_C]
    exists = row < rows
    mask = exists[:, None] & (c < C)[None, :]
    offsets = row[:, None] * C + c[None, :]  # [TILE_ROWS, TILE_C]
    added = load(branch_ptr, offsets, mask)  # [TILE_ROWS, TILE_C]
    if branch_bias_ptr is not None:
        added += load_row(branch_bias_ptr, c, C)
    if branch_scale_ptr is not None:
        added *= load(branch_scale_ptr, row // rows_per_sample, exists)[:, None]
    total = round_to(load(x_ptr, offsets, mask) + added, total_ptr.dtype.element_ty)
    tl.store(total_ptr + offsets, total, mask=mask)
    # What is normalised is the sum as it is stored, since that is all the backward knows.
    normed, mean, rstd = normalise(total.to(tl.float32), mask, eps, C)
    normed = normed * load_row(weight_ptr, c, C) + load_row(bias_ptr, c, C)
    tl.store(normed_ptr + offsets, round_to(normed, normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=exists)
    tl.store(rstd_ptr + row, rstd, mask=exists)


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "tiles"])
def _add_layer_norm_bwd_kernel(
    douts,  # gradients of total and normed, (rows, C) or None each
    saved,  # total (rows, C); mean and rstd, (rows,) float32 each
    branch_scale_ptr,  # (B,) or None
    weight_ptr,  # (C,)
    grads,  # dx (rows, C); dbranch (rows, C), or None where it equals dx; the sums (programs, SUMS, C) float32
    rows,
    rows_per_sample,
    tiles,  # that a program has
    C,
    SUMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: tiles times TILE_ROWS rows, and SUMS sums over them: dweight, dbias, the branch's dbias."""
    dtotal_ptr, dnormed_ptr = douts
    total_ptr, mean_ptr, rstd_ptr = saved
    dx_ptr, dbranch_ptr, partial_ptr = grads
    c = tl.arange(0, TILE_C)  # [TILE_C]
    weight = load_row(weight_ptr, c, C)  # [1, TILE_C]
    # Sums over rows stay apart by row of the tile until the end, so that the loop waits for no other warp's columns.
    dweight = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    dbias = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    dbranch_bias = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles * TILE_ROWS
    for tile in range(tiles):
        row = first + tile * TILE_ROWS + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
        exists = row < rows
        mask = exists[:, None] & (c < C)[None, :]
        offsets = row[:, None] * C + c[None, :]  # [TILE_ROWS, TILE_C]
        dx = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
        if dnormed_ptr is not None:
            rstd = load(rstd_ptr, row, exists)[:, None]  # [TILE_ROWS, 1]
            normalised = (load(total_ptr, offsets, mask) - load(mean_ptr, row, exists)[:, None]) * rstd
            dnormed = load(dnormed_ptr, offsets, mask)  # [TILE_ROWS, TILE_C]
            dweight += dnormed * normalised
            dbias += dnormed
            dx = dnormed * weight
            dot_mean = tl.sum(dx * normalised, 1)[:, None] / C  # [TILE_ROWS, 1]
            dx = (dx - tl.sum(dx, 1)[:, None] / C - normalised * dot_mean) * rstd
        if dtotal_ptr is not None:
            dx += load(dtotal_ptr, offsets, mask)
        tl.store(dx_ptr + offsets, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
        dbranch = dx
        if branch_scale_ptr is not None:
            dbranch *= load(branch_scale_ptr, row // rows_per_sample, exists)[:, None]
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offsets, round_to(dbranch, dbranch_ptr.dtype.element_ty), mask=mask)
        if SUMS == 3:
            dbranch_bias += dbranch
    partial_ptr += tl.program_id(0).to(tl.int64) * SUMS * C + c
    tl.store(partial_ptr, tl.sum(dweight, 0), mask=c < C)
    tl.store(partial_ptr + C, tl.sum(dbias, 0), mask=c < C)
    if SUMS == 3:
        tl.store(partial_ptr + 2 * C, tl.sum(dbranch_bias, 0), mask=c < C)


def add_layer_norm_fwd(
    x: Tensor,
    branch: Tensor,
    branch_scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``total = x + branch_scale * (branch + branch_bias)`` and ``layer_norm(total)``. Checks nothing.

    Args:
        x, branch: ``(B, ..., C)``, any strides, but one that is not contiguous is copied; C at most
            MAX_LAYER_NORM_CHANNELS.
        branch_scale: ``(B,)`` or None; branch_bias: ``(C,)`` or None; weight, bias: ``(C,)``. Any of float32, float16
            and bfloat16, also different ones.
        eps: added to the variance.
        dtype, normed_dtype: of total and of normed.

    Returns:
        ``total`` and ``normed`` ``(B, ..., C)``; ``mean`` and ``rstd`` ``(B, ...)`` float32.
    """
    C = x.shape[-1]
    total = torch.empty(x.shape, dtype=dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=normed_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return total, normed, mean, rstd
    rows = x.shape[:-1].numel()
    branch_scale, branch_bias = (v if v is None else v.contiguous() for v in (branch_scale, branch_bias))
    args = (
        x.contiguous(), (branch.contiguous(), branch_scale, branch_bias),
        (weight.contiguous(), bias.contiguous(), eps), (total, normed), (mean, rstd), rows, rows // x.shape[0], C,
    )  # fmt: skip

    def run(tile, start):
        start(_add_layer_norm_fwd_kernel, cdiv(rows, tile["TILE_ROWS"]), *args, **tile)

    launch(_configs.layer_norm, ("add_layer_norm_fwd", C, x.dtype, dtype, normed_dtype), x, run)
    return total, normed, mean, rstd


def add_layer_norm_bwd(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_scale: Tensor | None,
    weight: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    need_dbranch_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of add_layer_norm_fwd. No atomics: the same input gives the same bits.

    Args:
        dtotal, dnormed: ``(B, ..., C)`` or None, any strides.
        total, mean, rstd: as the forward returned them; branch_scale, weight: as it took them.
        x_dtype, branch_dtype: of x and of branch.
        need_dbranch_bias: whether the gradient of branch_bias is wanted.

    Returns:
        ``dx`` ``(B, ..., C)``; ``dbranch``, None where it equals dx; the gradients of weight, bias and, if wanted,
        branch_bias, ``(2 or 3, C)`` float32.
    """
    C, sums = total.shape[-1], 3 if need_dbranch_bias else 2
    dx = torch.empty(total.shape, dtype=x_dtype, device=total.device)
    same = branch_scale is None and x_dtype == branch_dtype
    dbranch = None if same else torch.empty(total.shape, dtype=branch_dtype, device=total.device)
    if total.numel() == 0:
        return dx, dbranch, torch.zeros((sums, C), dtype=torch.float32, device=total.device)
    rows, weight = total.shape[:-1].numel(), weight.contiguous()
    dtotal, dnormed, branch_scale = (t if t is None else t.contiguous() for t in (dtotal, dnormed, branch_scale))

    def run(tile, start):
        tile_rows = tile["TILE_ROWS"]
        # With 32 rows or more to a program the partial sums are a small part of what is moved.
        tiles = cdiv(max(32, cdiv(rows, _configs.at_once(total.device, tile))), tile_rows)
        programs = cdiv(rows, tiles * tile_rows)
        partial = torch.empty((programs, sums, C), dtype=torch.float32, device=total.device)
        start(
            _add_layer_norm_bwd_kernel, programs,
            (dtotal, dnormed), (total, mean, rstd), branch_scale, weight, (dx, dbranch, partial),
            rows, rows // total.shape[0], tiles, C, SUMS=sums, **tile,
        )  # fmt: skip
        return partial

    parts = (dtotal is None, dnormed is None, dbranch is None, sums)
    partial = launch(_configs.layer_norm, ("add_layer_norm_bwd", C, total.dtype, x_dtype, *parts), total, run)
    return dx, dbranch, partial.sum(0)
