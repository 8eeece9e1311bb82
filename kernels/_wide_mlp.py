"""Gradients of the MLP sub-layer of wide rows, which keeps x, its statistics and what fc1 gives, in half precision.

With h = fc1(layer_norm(x)) and d = scale dout: dh = (d W2) gelu'(h), dW2 = d^T gelu(h), dW1 = dh^T layer_norm(x), and
dx is dout and dh W1 through the LayerNorm, by a library's matmul and the pass of add_layer_norm.

Maths: 32 C^2 FLOP a row for 4 C hidden features, as the library has. Floor of a row in half precision: 18 C bytes for
dh, dout and h read and dh written, 10 C for dW2, 10 C for dW1; neither gelu(h) nor what is normalised is stored.
Tiling: dh's is linear's. A weight's gradient has tiles of both matrices' columns, as sums in registers, and walks over
a stripe of the rows; what is made anew is the operand that may come from registers. Each stripe leaves a term of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._gelu import Gelu, gelu, gelu_derivative, gelu_of
from nest_fast.kernels._launch import launch
from nest_fast.kernels._mlp_gradients import _of_nothing
from nest_fast.kernels._norm_linear import norm_linear
from nest_fast.kernels._primitives import cdiv, dot, load, round_to
from nest_fast.kernels._rows import Linear, Norm, Scale, load_weight, scaled
from nest_fast.kernels.add_layer_norm import add_layer_norm_bwd
from nest_fast.kernels.linear import Spec, can_copy, compiled_in, copied, load_tile, no_sums, sum_fwd

__all__ = ["wide_mlp_bwd", "wide_mlp_fwd"]


# --- of what is hidden ------------------------------------------------------------------------------------------------


@triton.jit
def _load_back(weight, start, column, o, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Rows from start on and columns from column on, or o, of the (K, OUT) weight; [TILE_K, TILE_OUT], 0 where there is
    none."""
    K: tl.constexpr = SPEC.K
    OUT: tl.constexpr = SPEC.OUT
    if TILE.COPIES:
        tile = weight.load([start, column])
    else:
        k = start + tl.arange(0, TILE.K)
        exists = (k < K)[:, None] & (o < OUT)[None, :]
        tile = load_weight(weight + k[:, None] * OUT + o[None, :], exists, K % TILE.K == 0 and OUT % TILE.OUT == 0)
    return tile


@triton.jit
def _through_gelu(sums, hidden, scale, row, exists, sums_ptr, o, SPEC: tl.constexpr):
    """``scale * sums * gelu'(hidden)``; sums over rows of that are stored for columns o."""
    GELU: tl.constexpr = SPEC.GELU
    dhidden = scaled(sums, scale, row, exists) * gelu_derivative(hidden.to(tl.float32), GELU)
    if sums_ptr is not None:
        tl.store(sums_ptr + o, tl.sum(tl.where(exists[:, None], dhidden, 0.0), 0), mask=o < SPEC.OUT)
    return dhidden


@triton.jit(do_not_specialize=["rows"])
def _mlp_layer_bwd_hidden_kernel(
    dout,  # (rows, K); it, weight, hidden and dhidden are descriptors where the copy engine reads them
    weight,  # (K, OUT)
    hidden,  # (rows, OUT)
    dhidden,  # (rows, OUT)
    sums_ptr,  # over the rows of a tile, (tiles of rows, OUT) float32, or None
    rows,
    scale,  # Scale of dout
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of the gradient, or with copies every one of so many as there are programs."""
    OUT: tl.constexpr = SPEC.OUT
    COLUMNS: tl.constexpr = (OUT + TILE.OUT - 1) // TILE.OUT
    HALF: tl.constexpr = TILE.OUT // 2
    m = tl.arange(0, TILE.ROWS)  # [TILE_ROWS]
    if TILE.COPIES:
        tiles = (rows + TILE.ROWS - 1) // TILE.ROWS * COLUMNS
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row = tile // COLUMNS * TILE.ROWS
            column = tile % COLUMNS * TILE.OUT
            sums = no_sums(TILE.ROWS, TILE.OUT)
            for k in tl.range(0, SPEC.K, TILE.K, num_stages=TILE.STAGES):
                sums = dot(dout.load([row, k]), weight.load([k, column]), sums, False)
            own_sums = sums_ptr
            if sums_ptr is not None:
                own_sums += tl.cast(tile // COLUMNS, tl.int64) * OUT
            # Half of the columns at a time, since what is hidden takes registers, too.
            halves = tl.split(tl.permute(tl.reshape(sums, [TILE.ROWS, 2, HALF]), [0, 2, 1]))
            for n in tl.static_range(2):
                o = column + n * HALF + tl.arange(0, HALF)  # [HALF]
                h = hidden.load([row, column + n * HALF])
                half = _through_gelu(halves[n], h, scale, row + m, row + m < rows, own_sums, o, SPEC)
                dhidden.store([row, column + n * HALF], round_to(half, dhidden.dtype))
    else:
        row_tile = (tl.program_id(0) // COLUMNS).to(tl.int64)
        first = row_tile * TILE.ROWS
        o = tl.program_id(0) % COLUMNS * TILE.OUT + tl.arange(0, TILE.OUT)  # [TILE_OUT]
        own_m = tl.minimum(m, (rows - first - 1).to(tl.int32))
        sums = no_sums(TILE.ROWS, TILE.OUT)
        for k in tl.range(0, SPEC.K, TILE.K, num_stages=TILE.STAGES):
            x = load_tile(dout + first * SPEC.K, None, own_m, k, SPEC, TILE)
            sums = dot(x, _load_back(weight, k, None, o, SPEC, TILE), sums, False)
        exists = first + m < rows
        mask = exists[:, None] & (o < OUT)[None, :]
        offsets = m[:, None] * OUT + o[None, :]  # [TILE_ROWS, TILE_OUT]
        h = tl.load(hidden + first * OUT + offsets, mask=mask, other=0.0)
        own_sums = sums_ptr
        if sums_ptr is not None:
            own_sums += row_tile * OUT
        sums = _through_gelu(sums, h, scale, first + m, exists, own_sums, o, SPEC)
        tl.store(dhidden + first * OUT + offsets, round_to(sums, dhidden.dtype.element_ty), mask=mask)


def _hidden_gradient(
    dout: Tensor, weight: Tensor, hidden: Tensor, scale: Scale, formula: Gelu, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``(scale dout @ weight) gelu'(hidden)`` and, if wanted, its sum over rows in float32."""
    K, outputs = weight.shape
    rows = hidden.shape[:-1].numel()
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    spec = Spec(K, outputs, formula)

    def run(config, start):
        row_tiles = cdiv(rows, config.tile_rows)
        sums = torch.empty((row_tiles, outputs), dtype=torch.float32, device=dout.device) if wants_sums else None
        programs, operands = row_tiles * cdiv(outputs, config.tile_out), (dout, weight, hidden, dhidden)
        if config.copies:
            programs = min(programs, _configs.multiprocessors(dout.device))
            half = config.tile_rows, config.tile_out // 2
            sides = (config.tile_rows, config.tile_k), (config.tile_k, config.tile_out), half, half
            operands = copied(operands, sides)
        start(_mlp_layer_bwd_hidden_kernel, programs, *operands, sums, rows, scale, **compiled_in(spec, config))
        return sums

    copies = can_copy(rows, K, outputs, dout, weight, hidden)
    shape = (K, outputs, formula.TANH, dout.dtype, scale.samples is None, wants_sums, copies)
    sums = launch(_layer_configs.mlp_layer_bwd_hidden, shape, dout, run)
    return dhidden, sums if sums is None else sums.sum(0)


# --- of a weight ------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """What the kernel is compiled for: of the matrix made anew, of the other, and the first's GELU, or a LayerNorm."""

    P: int
    Q: int
    GELU: Gelu | None


@triton.jit
def _load_rows(matrix, row, m, column, columns, COUNT: tl.constexpr, SIZE: tl.constexpr, COPIES: tl.constexpr):
    """Rows from row on, or m, and SIZE columns from column on, or columns, of a (rows, COUNT) matrix; 0 beyond it."""
    if COPIES:
        tile = matrix.load([row, column])
    else:
        own, exists = m
        mask = exists[:, None]
        if COUNT % SIZE:
            mask = mask & (columns < COUNT)[None, :]
        tile = tl.load(matrix + own.to(tl.int64)[:, None] * COUNT + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit(do_not_specialize=["rows", "tiles"])
def _mlp_layer_bwd_weight_kernel(
    p,  # (rows, P), that is made anew; it and q are descriptors where the copy engine reads them
    q,  # (rows, Q)
    norm,  # Norm of p, or None: its GELU is taken
    statistics,  # of a LayerNorm, mean and rstd (rows,)
    scale,  # Scale
    out_ptr,  # (stripes, Q, P) float32
    rows,
    tiles,  # that a stripe has
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_ROWS columns of p by TILE_OUT of q, and a stripe of tiles times TILE_K rows."""
    P: tl.constexpr = SPEC.P
    Q: tl.constexpr = SPEC.Q
    GELU: tl.constexpr = SPEC.GELU
    ACROSS: tl.constexpr = (P + TILE.ROWS - 1) // TILE.ROWS
    DOWN: tl.constexpr = (Q + TILE.OUT - 1) // TILE.OUT
    stripe = tl.program_id(0) // (ACROSS * DOWN)
    p_column = tl.program_id(0) % ACROSS * TILE.ROWS
    q_column = tl.program_id(0) // ACROSS % DOWN * TILE.OUT
    p_own = p_column + tl.arange(0, TILE.ROWS)  # [TILE_ROWS]
    q_own = q_column + tl.arange(0, TILE.OUT)  # [TILE_OUT]
    if norm is not None:
        factor = load(norm.weight, p_own, p_own < P)[None, :]
        addend = load(norm.bias, p_own, p_own < P)[None, :]
    # What is made anew is the first operand, which warp groups take from registers; of sm_80's warps, which lie two by
    # four, fewer make the same of the second one.
    sums = no_sums(TILE.ROWS, TILE.OUT) if TILE.COPIES else no_sums(TILE.OUT, TILE.ROWS)
    for tile in tl.range(tiles, num_stages=TILE.STAGES):
        row = (stripe * tiles + tile) * TILE.K
        m = row + tl.arange(0, TILE.K)  # [TILE_K], fewer than 2^31
        exists = m < rows
        made = _load_rows(p, row, (m, exists), p_column, p_own, P, TILE.ROWS, TILE.COPIES)  # [TILE_K, TILE_ROWS]
        other = _load_rows(q, row, (m, exists), q_column, q_own, Q, TILE.OUT, TILE.COPIES)  # [TILE_K, TILE_OUT]
        value = made.to(tl.float32)
        if norm is not None:
            rstd = load(statistics[1], m, exists)
            value = value * rstd[:, None] - (load(statistics[0], m, exists) * rstd)[:, None]
            value = value * factor + addend
        else:
            value = gelu(value, GELU)
            if scale.samples is not None:
                value *= load(scale.samples, m // scale.rows, exists)[:, None]
        value = round_to(value, made.dtype)
        sums = dot(tl.trans(value), other, sums, False) if TILE.COPIES else dot(tl.trans(other), value, sums, False)
    if TILE.COPIES:
        sums = tl.trans(sums)
    sums *= scale.factor
    mask = (q_own < Q)[:, None] & (p_own < P)[None, :]
    target = out_ptr + stripe.to(tl.int64) * Q * P + q_own[:, None] * P + p_own[None, :]
    tl.store(target, sums, mask=mask)


def _weight_gradient(
    p: Tensor,
    q: Tensor,
    norm: Norm | None,
    statistics: tuple[Tensor, Tensor] | None,
    scale: Scale,
    formula: Gelu | None,
) -> Tensor:
    """``scale q^T @ layer_norm(p)``, or of gelu(p) where there is a formula, ``(Q, P)`` float32, summed over rows."""
    P, Q, rows = p.shape[-1], q.shape[-1], p.shape[:-1].numel()
    spec = Columns(P, Q, formula)

    def run(config, start):
        tiles_of_weight = cdiv(P, config.tile_rows) * cdiv(Q, config.tile_out)
        stripes, each = _configs.stripes(p.device, config.num_warps, cdiv(rows, config.tile_k), tiles_of_weight)
        out = torch.empty((stripes, Q, P), dtype=torch.float32, device=p.device)
        operands: Any = (p, q)
        if config.copies:
            operands = copied(operands, ((config.tile_k, config.tile_rows), (config.tile_k, config.tile_out)))
        start(
            _mlp_layer_bwd_weight_kernel, stripes * tiles_of_weight,
            *operands, norm, statistics, scale, out, rows, each, **compiled_in(spec, config),
        )  # fmt: skip
        return out

    tanh, norm_dtype = None if formula is None else formula.TANH, None if norm is None else norm.weight.dtype
    shape = (P, Q, tanh, p.dtype, norm_dtype, scale.samples is None, can_copy(rows, P, Q, p, q))
    return launch(_layer_configs.mlp_layer_bwd_weight, shape, p, run).sum(0)


def wide_mlp_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    tanh: bool,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch_scale: float,
    sample_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As mlp_layer_fwd, of any C in half precision; it keeps what the gradient needs. Checks nothing.

    Returns:
        ``out`` ``(..., C)`` and ``hidden`` ``(..., hidden)``, what fc1 gives, in x's dtype; ``mean`` and ``rstd`` of
        the rows, ``(...)`` float32.
    """
    x, norm = x.contiguous(), Norm.dense(norm_weight, norm_bias, eps)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    hidden = norm_linear(x, norm, Linear.dense(fc1_weight, fc1_bias), None, (mean, rstd))
    out = sum_fwd(hidden, fc2_weight, fc2_bias, x, branch_scale, sample_scale, gelu_of(tanh, x.dtype))
    return out, hidden, mean, rstd


def wide_mlp_bwd(
    dout: Tensor,
    x: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    tanh: bool,
    fc2_weight: Tensor,
    branch_scale: float,
    sample_scale: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of wide_mlp_fwd. No atomics: the same input gives the same bits on a GPU.

    Args:
        dout: ``(..., C)``, any strides.
        x, norm_weight to sample_scale: as the forward took them; hidden, mean, rstd: as it returned them.
        output_mask: which are wanted: of what is before fc1, of fc1, of fc2's weight, of its bias.

    Returns:
        ``dx`` ``(..., C)`` in x's dtype; the gradients of norm_weight and norm_bias, ``(2, C)``; of fc1_weight
        ``(hidden, C)``, fc1_bias ``(hidden,)``, fc2_weight ``(C, hidden)`` and fc2_bias ``(C,)``, in float32. None is
        not wanted.
    """
    if hidden.numel() == 0:
        return _of_nothing(dout, x, hidden.shape[-1], branch_scale, sample_scale, output_mask)
    wants_dx, wants_dfc1, wants_dfc2, wants_dbias2 = output_mask
    rows, formula = x.shape[:-1].numel(), gelu_of(tanh, x.dtype)
    scale, one = Scale.of(branch_scale, sample_scale, rows), Scale(1.0, None, 1)
    dout, x, fc1_weight, fc2_weight = (t.contiguous() for t in (dout, x, fc1_weight, fc2_weight))
    dx = dnorm = dfc1 = dfc1_bias = dfc2 = dfc2_bias = None
    if wants_dx or wants_dfc1:
        dhidden, dfc1_bias = _hidden_gradient(dout, fc2_weight, hidden, scale, formula, wants_dfc1)
    if wants_dfc1:
        norm = Norm.dense(norm_weight, norm_bias, 0.0)
        dfc1 = _weight_gradient(x, dhidden, norm, (mean, rstd), one, None)
    if wants_dfc2:
        dfc2 = _weight_gradient(hidden, dout, None, None, scale, formula)
    if wants_dbias2:
        dfc2_bias = _sum_over_rows(dout, scale)
    if wants_dx:
        dnormed = (dhidden.view(rows, -1) @ fc1_weight).view(x.shape)
        dx, _, dnorm = add_layer_norm_bwd(dout, dnormed, x, mean, rstd, None, norm_weight, x.dtype, x.dtype, False)
    return dx, dnorm, dfc1, dfc1_bias, dfc2, dfc2_bias


def _sum_over_rows(dout: Tensor, scale: Scale) -> Tensor:
    if scale.samples is None:
        return dout.view(-1, dout.shape[-1]).sum(0, dtype=torch.float32) * scale.factor
    of_samples = dout.view(scale.samples.shape[0], -1, dout.shape[-1]).sum(1, dtype=torch.float32)
    return (of_samples * scale.samples.float()[:, None]).sum(0)
