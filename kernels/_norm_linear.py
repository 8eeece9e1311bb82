"""A linear layer after a LayerNorm, of rows that are too long to stay on chip, in half precision.

``act(layer_norm(x) @ weight^T + bias)``; what is normalised is not stored.

Maths: 2 K N FLOP a row, on the matrix units. Floor of a row: 2 K + 2 N bytes, x read and out written; a pass for the
LayerNorm would move 4 K more, and one for bias and GELU 4 N.
Tiling: as linear's, but that a program keeps its TILE_ROWS rows: it sweeps over them once for their mean and variance,
then over K again for every TILE_OUT columns, normalises what comes, from the L2 cache now, and multiplies it. Rows that
fit in shared memory are normalised once and stay there; then a step is a tile of the weight, all its columns. Where
there are too few rows for all multiprocessors, several programs share the columns of the same rows.
"""

# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._gelu import Gelu
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import both, cdiv, dot, load_row, round_to
from nest_fast.kernels._rows import Linear, Norm
from nest_fast.kernels.linear import Spec, activated, can_copy, compiled_in, copied, load_tile, no_sums, own_columns

__all__ = ["norm_linear"]


@triton.jit
def _statistics(x, eps, row, m, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Mean and rstd [TILE_ROWS] in float32 of rows of x."""
    K: tl.constexpr = SPEC.K
    # Squares are summed of what is left of the first columns' mean: that is near enough to the row's, in units of its
    # deviation, for their difference to lose few digits.
    shift = tl.sum(load_tile(x, row, m, 0, SPEC, TILE).to(tl.float32), 1) / (K if K < TILE.K else TILE.K)
    sums = no_sums(TILE.ROWS, TILE.K)
    squares = no_sums(TILE.ROWS, TILE.K)
    for start in tl.range(0, K, TILE.K, num_stages=TILE.STAGES):
        left = load_tile(x, row, m, start, SPEC, TILE).to(tl.float32) - shift[:, None]
        if K % TILE.K:
            left = tl.where((start + tl.arange(0, TILE.K) < K)[None, :], left, 0.0)
        sums += left
        squares += left * left
    rest = tl.sum(sums, 1) / K
    return shift + rest, 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / K - rest * rest + eps)


@triton.jit
def normalised(x, mean, rstd, norm, start, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The LayerNorm of columns from start on, in x's dtype; no row is so far from zero that it could be told there."""
    k = start + tl.arange(0, TILE.K)
    y = x.to(tl.float32) * rstd[:, None] - (mean * rstd)[:, None]
    return round_to(y * load_row(norm.weight, k, SPEC.K) + load_row(norm.bias, k, SPEC.K), x.dtype)


@triton.jit
def _store(out, sums, row, column, first, m, o, rows, SPEC: tl.constexpr, TILE: tl.constexpr):
    OUT: tl.constexpr = SPEC.OUT
    if TILE.COPIES:
        out.store([row, column], round_to(sums, out.dtype))
    else:
        mask = (first + m < rows)[:, None]
        if OUT % TILE.OUT:
            mask = mask & (o < OUT)[None, :]
        target = out + first * OUT + m[:, None] * OUT + o[None, :]
        tl.store(target, round_to(sums, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "groups"])
def _norm_linear_kernel(
    x,  # (rows, K); it, weight and out are descriptors where the copy engine reads them
    norm,  # Norm
    weight,  # (OUT, K)
    bias_ptr,  # (OUT,) or None
    out,  # (rows, OUT)
    statistics,  # mean and rstd, (rows,) float32 each, or None
    rows,
    groups,  # programs that share rows
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_ROWS rows, and every one of so many tiles of columns as there are groups."""
    OUT: tl.constexpr = SPEC.OUT
    COLUMNS: tl.constexpr = (OUT + TILE.OUT - 1) // TILE.OUT
    PIECES: tl.constexpr = (SPEC.K + TILE.K - 1) // TILE.K
    row = tl.program_id(0) // groups * TILE.ROWS
    first = (tl.program_id(0) // groups).to(tl.int64) * TILE.ROWS
    m = tl.arange(0, TILE.ROWS)  # [TILE_ROWS]
    # Where there is no row, the last one is read once more.
    own_m = tl.minimum(m, (rows - first - 1).to(tl.int32))
    if not TILE.COPIES:
        x += first * SPEC.K
    mean, rstd = _statistics(x, norm.eps, row, own_m, SPEC, TILE)
    if statistics is not None:
        own = both(first + m < rows, tl.program_id(0) % groups == 0)
        tl.store(statistics[0] + first + m, mean, mask=own)
        tl.store(statistics[1] + first + m, rstd, mask=own)
    group = tl.program_id(0) % groups
    if TILE.RESIDENT:
        normed = ()
        for n in tl.static_range(PIECES):
            part = load_tile(x, row, own_m, n * TILE.K, SPEC, TILE)  # [TILE_ROWS, TILE_K]
            normed = normed + (normalised(part, mean, rstd, norm, n * TILE.K, SPEC, TILE),)
        for tile in tl.range(group, COLUMNS, groups, num_stages=TILE.STAGES):
            column = tile * TILE.OUT
            o = column + tl.arange(0, TILE.OUT)  # [TILE_OUT]
            own_o = own_columns(o, SPEC, TILE)
            sums = no_sums(TILE.ROWS, TILE.OUT)
            for n in tl.static_range(PIECES):
                columns = load_tile(weight, column, own_o, n * TILE.K, SPEC, TILE)  # [TILE_OUT, TILE_K]
                sums = dot(normed[n], tl.trans(columns), sums, False)
            _store(out, activated(sums, bias_ptr, o, SPEC), row, column, first, m, o, rows, SPEC, TILE)
    else:
        for tile in tl.range(group, COLUMNS, groups):
            column = tile * TILE.OUT
            o = column + tl.arange(0, TILE.OUT)
            own_o = own_columns(o, SPEC, TILE)
            sums = no_sums(TILE.ROWS, TILE.OUT)
            for start in tl.range(0, SPEC.K, TILE.K, num_stages=TILE.STAGES):
                part = normalised(load_tile(x, row, own_m, start, SPEC, TILE), mean, rstd, norm, start, SPEC, TILE)
                sums = dot(part, tl.trans(load_tile(weight, column, own_o, start, SPEC, TILE)), sums, False)
            _store(out, activated(sums, bias_ptr, o, SPEC), row, column, first, m, o, rows, SPEC, TILE)


def _groups(row_tiles: int, columns: int, at_once: int, before: float) -> int:
    """So many programs for the same rows that all end the soonest, in units of a tile of columns; what comes before the
    tiles each of them does anew."""

    def time(groups: int) -> float:
        return cdiv(row_tiles * groups, at_once) * (cdiv(columns, groups) + before)

    return min(range(1, columns + 1), key=time)


def norm_linear(
    x: Tensor, norm: Norm, layer: Linear, gelu: Gelu | None, statistics: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``gelu(layer_norm(x) @ weight^T + bias)``, or without the GELU where that is None. Checks nothing.

    Args:
        x: ``(..., K)``, float16 or bfloat16, contiguous.
        norm: ``(K,)``, of x's dtype or float32.
        layer: ``(out, K)``, fewer than 2^31 numbers, and ``(out,)`` or None, in x's dtype.
        statistics: where mean and rstd of the rows are left, ``(...)`` float32 each, or None.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    outputs, K = layer.weight.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.shape[:-1].numel()
    spec = Spec(K, outputs, gelu)

    def run(config, start):
        row_tiles = cdiv(rows, config.tile_rows)
        at_once = _configs.at_once(x.device, {"num_warps": config.num_warps})
        # As the instructions for sm_90 are: 4 tiles' that are kept, or half of one's whose steps are normalised.
        groups = _groups(row_tiles, cdiv(outputs, config.tile_out), at_once, 4.0 if config.resident else 0.5)
        xs, weights, outs = operands = x, layer.weight, out
        if config.copies:
            tile_rows, tile_out, tile_k, *_ = config
            xs, weights, outs = copied(operands, ((tile_rows, tile_k), (tile_out, tile_k), (tile_rows, tile_out)))
        start(
            _norm_linear_kernel, row_tiles * groups,
            xs, norm, weights, layer.bias, outs, statistics, rows, groups, **compiled_in(spec, config),
        )  # fmt: skip

    copies = can_copy(rows, K, outputs, x, layer.weight)
    tanh = None if gelu is None else gelu.TANH
    shape = (K, outputs, tanh, x.dtype, norm.weight.dtype, layer.bias is None, statistics is None, copies)
    launch(_layer_configs.norm_linear, shape, x, run)
    return out
