"""LayerNorm with what stands around it: the residual sum before it, or the mean over tokens after it.

A program holds whole rows of C channels in one tile, so the variance is taken about the mean, and every tensor is read
or written once. The gradient of a parameter is one row of partial sums for each program, added up afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from nest_fast.kernels._primitives import round_to
from torch import Tensor

__all__ = ["MAX_CHANNELS", "add_layer_norm_bwd", "add_layer_norm_fwd", "layer_norm_mean_bwd", "layer_norm_mean_fwd"]

MAX_CHANNELS = 4096
# Enough programs to keep every multiprocessor's memory pipeline full; a constant, so that sums have the same bits on
# every GPU.
PROGRAMS = 1024


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(ptr, c, C):
    return _load(ptr, c, c < C)[None, :]


@triton.jit
def _normalise(x, mask, eps, C):
    """``(x - mean) * rstd`` of the rows of ``x``, which is 0 outside the mask, and their mean and rstd."""
    mean = tl.sum(x, 1) / C
    x = tl.where(mask, x - mean[:, None], 0.0)
    # The mean of a row far from zero is rounded by more than such differences are.
    rest = tl.sum(x, 1) / C
    x = tl.where(mask, x - rest[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / C + eps)
    return x * rstd[:, None], mean + rest, rstd


# --- residual sum + LayerNorm -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "rows_per_sample"])
def _add_layer_norm_fwd_kernel(
    x_ptr, branch_ptr, branch_scale_ptr, branch_bias_ptr, weight_ptr, bias_ptr, eps,
    total_ptr, normed_ptr, mean_ptr, rstd_ptr, rows, rows_per_sample, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = row < rows
    mask = inside[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    branch = _load(branch_ptr, at, mask)
    if branch_bias_ptr is not None:
        branch += _vector(branch_bias_ptr, c, C)
    if branch_scale_ptr is not None:
        branch *= _load(branch_scale_ptr, row // rows_per_sample, inside)[:, None]
    total = round_to(_load(x_ptr, at, mask) + branch, total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=mask)
    # What is normalised is the sum as it is stored, since that is all the backward knows.
    normed, mean, rstd = _normalise(total.to(tl.float32), mask, eps, C)
    normed = normed * _vector(weight_ptr, c, C) + _vector(bias_ptr, c, C)
    tl.store(normed_ptr + at, round_to(normed, normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "tiles"])
def _add_layer_norm_bwd_kernel(
    dtotal_ptr, dnormed_ptr, total_ptr, mean_ptr, rstd_ptr, branch_scale_ptr, weight_ptr,
    dx_ptr, dbranch_ptr, partial_ptr, rows, rows_per_sample, tiles, C,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: tiles times ROWS rows, and their SUMS rows of parameter gradients."""
    c = tl.arange(0, BLOCK_C)
    weight = _vector(weight_ptr, c, C)
    # Sums over rows stay apart by row of the tile until the end, so that the loop waits for no other warp's columns.
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbranch_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    start = tl.program_id(0).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = start + tile * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        mask = inside[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        gradient = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if dnormed_ptr is not None:
            rstd = _load(rstd_ptr, row, inside)[:, None]
            normalised = (_load(total_ptr, at, mask) - _load(mean_ptr, row, inside)[:, None]) * rstd
            dnormed = _load(dnormed_ptr, at, mask)
            dweight += dnormed * normalised
            dbias += dnormed
            gradient = dnormed * weight
            along = tl.sum(gradient * normalised, 1)[:, None] / C
            gradient = (gradient - tl.sum(gradient, 1)[:, None] / C - normalised * along) * rstd
        if dtotal_ptr is not None:
            gradient += _load(dtotal_ptr, at, mask)
        tl.store(dx_ptr + at, round_to(gradient, dx_ptr.dtype.element_ty), mask=mask)
        if branch_scale_ptr is not None:
            gradient *= _load(branch_scale_ptr, row // rows_per_sample, inside)[:, None]
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + at, round_to(gradient, dbranch_ptr.dtype.element_ty), mask=mask)
        if SUMS == 3:
            dbranch_bias += gradient
    partial_ptr += tl.program_id(0).to(tl.int64) * SUMS * C + c
    tl.store(partial_ptr, tl.sum(dweight, 0), mask=c < C)
    tl.store(partial_ptr + C, tl.sum(dbias, 0), mask=c < C)
    if SUMS == 3:
        tl.store(partial_ptr + 2 * C, tl.sum(dbranch_bias, 0), mask=c < C)


# --- LayerNorm + mean over tokens -------------------------------------------------------------------------------------


@triton.jit
def _store_mean(total, b, weight_ptr, bias_ptr, out_ptr, normed_mean_ptr, tokens, c, C):
    """Image b's outputs from the sum of its normalised tokens; the affine map commutes with the mean."""
    mean = total / tokens
    out = mean * _load(weight_ptr, c, c < C) + _load(bias_ptr, c, c < C)
    tl.store(out_ptr + b * C + c, round_to(out, out_ptr.dtype.element_ty), mask=c < C)
    tl.store(normed_mean_ptr + b * C + c, mean, mask=c < C)


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def _layer_norm_mean_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, eps, out_ptr, normed_mean_ptr, mean_ptr, rstd_ptr, partial_ptr,
    tokens, parts, tiles, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: tiles times ROWS tokens of an image, of which parts programs share the work."""
    b = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * tiles * ROWS
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(tiles):
        token = first + tile * ROWS + tl.arange(0, ROWS)
        inside = token < tokens
        row = b * tokens + token
        mask = inside[:, None] & (c < C)[None, :]
        x = _load(x_ptr, row[:, None] * C + c[None, :], mask)
        normalised, mean, rstd = _normalise(x, mask, eps, C)
        total += tl.where(mask, normalised, 0.0)
        tl.store(mean_ptr + row, mean, mask=inside)
        tl.store(rstd_ptr + row, rstd, mask=inside)
    if partial_ptr is None:
        _store_mean(tl.sum(total, 0), b, weight_ptr, bias_ptr, out_ptr, normed_mean_ptr, tokens, c, C)
    else:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _layer_norm_mean_join_kernel(
    partial_ptr, weight_ptr, bias_ptr, out_ptr, normed_mean_ptr, tokens, parts, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: an image's parts."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        at = (b * parts + part)[:, None] * C + c[None, :]
        total += _load(partial_ptr, at, (part < parts)[:, None] & (c < C)[None, :])
    _store_mean(tl.sum(total, 0), b, weight_ptr, bias_ptr, out_ptr, normed_mean_ptr, tokens, c, C)


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def _layer_norm_mean_bwd_kernel(
    dout_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, tokens, parts, tiles, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: what one of the forward's took. All tokens of an image have the same gradient."""
    b = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * tiles * ROWS
    c = tl.arange(0, BLOCK_C)
    gradient = _load(dout_ptr, b * C + c, c < C)[None, :] * _vector(weight_ptr, c, C) / tokens
    centred = gradient - tl.sum(gradient, 1)[:, None] / C
    for tile in range(tiles):
        token = first + tile * ROWS + tl.arange(0, ROWS)
        inside = token < tokens
        row = b * tokens + token
        mask = inside[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        rstd = _load(rstd_ptr, row, inside)[:, None]
        normalised = (_load(x_ptr, at, mask) - _load(mean_ptr, row, inside)[:, None]) * rstd
        along = tl.sum(gradient * normalised, 1)[:, None] / C
        dx = (centred - normalised * along) * rstd
        tl.store(dx_ptr + at, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


def _tile(channels: int) -> dict[str, int]:
    """Rows in a tile and warps: eight values for each thread, which half precision loads at once."""
    padded = max(16, triton.next_power_of_2(channels))
    return {"ROWS": max(1, 1024 // padded), "BLOCK_C": padded, "num_warps": max(4, padded // 256)}


def _parts(batch: int, tokens: int, rows: int) -> tuple[int, int]:
    """How many programs share an image's tokens, and how many tiles of ``rows`` each of them has."""
    all_tiles = triton.cdiv(tokens, rows)
    # Fewer than four tiles in a part would make the parts' sums as much work as the tokens.
    tiles = triton.cdiv(all_tiles, min(triton.cdiv(all_tiles, 4), triton.cdiv(PROGRAMS, batch)))
    return triton.cdiv(all_tiles, tiles), tiles


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


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

    Floor: x and branch read, total and normed written, 8 bytes an element in half precision.

    Args:
        x, branch: ``(B, ..., C)``, any strides, but one that is not contiguous is copied; C at most MAX_CHANNELS.
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
    mean, rstd = _statistics(x)
    if x.numel() == 0:
        return total, normed, mean, rstd
    rows, tile = x.shape[:-1].numel(), _tile(C)
    vectors = [v if v is None else v.contiguous() for v in (branch_scale, branch_bias, weight, bias)]
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x.contiguous(), branch.contiguous(), *vectors, eps,
            total, normed, mean, rstd, rows, rows // x.shape[0], C, **tile,
        )  # fmt: skip
    return total, normed, mean, rstd


def add_layer_norm_bwd(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_scale: Tensor | None,
    weight: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    need_dbranch_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of add_layer_norm_fwd. No atomics: the same input gives the same bits.

    Floor: total, dtotal and dnormed read, dx written, 8 bytes an element in half precision; 10 with a branch_scale,
    whose dbranch is another tensor.

    Args:
        dtotal, dnormed: ``(B, ..., C)`` or None, any strides.
        total, mean, rstd: as the forward returned them; branch_scale, weight: as it took them.
        dtypes: of x and of branch.
        need_dbranch_bias: whether the gradient of branch_bias is wanted.

    Returns:
        ``dx`` ``(B, ..., C)``; ``dbranch``, None where it equals dx; the gradients of weight, bias and, if wanted,
        branch_bias, ``(2 or 3, C)`` float32.
    """
    C, sums = total.shape[-1], 3 if need_dbranch_bias else 2
    dx = torch.empty(total.shape, dtype=dtypes[0], device=total.device)
    same = branch_scale is None and dtypes[0] == dtypes[1]
    dbranch = None if same else torch.empty(total.shape, dtype=dtypes[1], device=total.device)
    if total.numel() == 0:
        return dx, dbranch, torch.zeros((sums, C), dtype=torch.float32, device=total.device)
    rows, tile = total.shape[:-1].numel(), _tile(C)
    # With 32 rows or more to a program the partial sums are a small part of what is moved.
    tiles = triton.cdiv(max(32, triton.cdiv(rows, PROGRAMS)), tile["ROWS"])
    programs = triton.cdiv(rows, tiles * tile["ROWS"])
    partial = torch.empty((programs, sums, C), dtype=torch.float32, device=total.device)
    dtotal, dnormed, branch_scale = (t if t is None else t.contiguous() for t in (dtotal, dnormed, branch_scale))
    with torch.cuda.device_of(total):
        _add_layer_norm_bwd_kernel[(programs,)](
            dtotal, dnormed, total, mean, rstd, branch_scale, weight.contiguous(),
            dx, dbranch, partial, rows, rows // total.shape[0], tiles, C, SUMS=sums, **tile,
            maxnreg=96,  # left alone, the compiler spills a little to have more warps
        )  # fmt: skip
        return dx, dbranch, partial.sum(0)


def layer_norm_mean_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``layer_norm(x)``'s mean over tokens. Checks nothing.

    Floor: x read, 2 bytes an element in half precision.

    Args:
        x: ``(B, ..., C)``, any strides, but one that is not contiguous is copied; C at most MAX_CHANNELS.
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
    mean, rstd = _statistics(x)
    if x.numel() == 0:
        return out.fill_(float("nan")), normed_mean.zero_(), mean, rstd
    tile = _tile(C)
    parts, tiles = _parts(B, tokens, tile["ROWS"])
    partial = None if parts == 1 else torch.empty((B, parts, C), dtype=torch.float32, device=x.device)
    weight, bias = weight.contiguous(), bias.contiguous()
    with torch.cuda.device_of(x):
        _layer_norm_mean_fwd_kernel[(B * parts,)](
            x.contiguous(), weight, bias, eps, out, normed_mean, mean, rstd, partial, tokens, parts, tiles, C, **tile
        )  # fmt: skip
        if partial is not None:
            _layer_norm_mean_join_kernel[(B,)](partial, weight, bias, out, normed_mean, tokens, parts, C, **tile)
    return out, normed_mean, mean, rstd


def layer_norm_mean_bwd(
    dout: Tensor, x: Tensor, normed_mean: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of layer_norm_mean_fwd. No atomics: the same input gives the same bits.

    Floor: x read, dx written, 4 bytes an element in half precision.

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
    tile = _tile(C)
    parts, tiles = _parts(B, tokens, tile["ROWS"])
    with torch.cuda.device_of(x):
        _layer_norm_mean_bwd_kernel[(B * parts,)](
            dout.contiguous(), x.contiguous(), mean, rstd, weight.contiguous(), dx, tokens, parts, tiles, C, **tile
        )  # fmt: skip
        # A token's gradient is its image's, so that the sums over tokens are the forward's.
        dout = dout.float()
        return dx, torch.stack([(dout * normed_mean).sum(0), dout.sum(0)])
