"""A linear layer with bias and GELU before its result is stored, in half precision: ``act(x @ weight^T + bias)``.

Maths: 2 K N FLOP a row, on the matrix units. Floor of a row: 2 K + 2 N bytes, x read and out written; without the
epilogue a pass over out follows, 4 N more.
Tiling: a program has TILE_ROWS rows by TILE_OUT columns of the result and walks over K. Those that run at once lie side
by side first, so that they share rows of x; a layer's weight stays in the L2 cache. Tiles of x and weight come by
pointers (cp.async), or by the copy engine of sm_90 and later, which wants rows that begin at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._gelu import Gelu, gelu, gelu_of
from nest_fast.kernels._launch import Copied, launch
from nest_fast.kernels._primitives import cdiv, dot, load_row, round_to

__all__ = ["linear_fwd"]


class Spec(NamedTuple):
    """What the kernel is compiled for: columns of x and of the result, the activation."""

    K: int
    OUT: int
    GELU: Gelu | None


class Tile(NamedTuple):
    """``ROWS`` by ``OUT`` of the result, ``K`` columns of x a step, ``STAGES`` steps in flight; whether the copy engine
    brings and takes them."""

    ROWS: int
    OUT: int
    K: int
    STAGES: int
    COPIES: bool


@triton.jit
def _no_sums(ROWS: tl.constexpr, OUT: tl.constexpr):
    return tl.zeros([ROWS, OUT], tl.float32)


@triton.jit
def _products(x_ptr, weight_ptr, m, o, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Sums [TILE_ROWS, TILE_OUT] in float32 of rows m of x and o of the weight, all of which exist."""
    K: tl.constexpr = SPEC.K
    sums = _no_sums(TILE.ROWS, TILE.OUT)
    for start in tl.range(0, K, TILE.K, num_stages=TILE.STAGES):
        k = start + tl.arange(0, TILE.K)  # [TILE_K]
        x = x_ptr + m[:, None] * K + k[None, :]
        weight = weight_ptr + o[:, None] * K + k[None, :]
        if K % TILE.K:
            mask = (k < K)[None, :]
            sums = dot(tl.load(x, mask=mask, other=0.0), tl.trans(tl.load(weight, mask=mask, other=0.0)), sums, False)
        else:
            sums = dot(tl.load(x), tl.trans(tl.load(weight)), sums, False)
    return sums


@triton.jit
def _products_of_copies(x, weight, row, column, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The same of the rows from row and from column on; of what does not exist they are 0."""
    sums = _no_sums(TILE.ROWS, TILE.OUT)
    for k in tl.range(0, SPEC.K, TILE.K, num_stages=TILE.STAGES):
        sums = dot(x.load([row, k]), tl.trans(weight.load([column, k])), sums, False)
    return sums


@triton.jit
def _activated(sums, bias_ptr, o, SPEC: tl.constexpr):
    GELU: tl.constexpr = SPEC.GELU
    if bias_ptr is not None:
        sums += load_row(bias_ptr, o, SPEC.OUT)
    if GELU is not None:
        sums = gelu(sums, GELU)
    return sums


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # (rows, K); it, weight and out are descriptors where the copy engine reads them
    weight,  # (OUT, K)
    bias_ptr,  # (OUT,) or None
    out,  # (rows, OUT)
    rows,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of the result, or with copies every one of so many as there are programs."""
    K: tl.constexpr = SPEC.K
    OUT: tl.constexpr = SPEC.OUT
    COLUMNS: tl.constexpr = (OUT + TILE.OUT - 1) // TILE.OUT
    m = tl.arange(0, TILE.ROWS)  # [TILE_ROWS]
    if TILE.COPIES:
        tiles = (rows + TILE.ROWS - 1) // TILE.ROWS * COLUMNS
        # Flattened, the first steps of the next tile are under way while the GELU of this one is computed.
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row = tile // COLUMNS * TILE.ROWS
            column = tile % COLUMNS * TILE.OUT
            sums = _products_of_copies(x, weight, row, column, SPEC, TILE)
            sums = _activated(sums, bias_ptr, column + tl.arange(0, TILE.OUT), SPEC)
            out.store([row, column], round_to(sums, out.dtype))
    else:
        first = (tl.program_id(0) // COLUMNS).to(tl.int64) * TILE.ROWS
        o = tl.program_id(0) % COLUMNS * TILE.OUT + tl.arange(0, TILE.OUT)  # [TILE_OUT]
        mask = (first + m < rows)[:, None]
        # Where there is no row or column, the last one is read once more: the loop needs no mask for it.
        own_m = tl.minimum(m, (rows - first - 1).to(tl.int32))
        own_o = o
        if OUT % TILE.OUT:
            own_o = tl.minimum(o, OUT - 1)
            mask = mask & (o < OUT)[None, :]
        sums = _products(x + first * K, weight, own_m, own_o, SPEC, TILE)
        sums = round_to(_activated(sums, bias_ptr, o, SPEC), out.dtype.element_ty)
        tl.store(out + first * OUT + m[:, None] * OUT + o[None, :], sums, mask=mask)


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x @ weight^T + bias)``. Checks nothing.

    Args:
        x: ``(..., K)``, float16 or bfloat16, any strides, but one that is not contiguous is copied.
        weight, bias: ``(out, K)`` and ``(out,)`` or None, in x's dtype; the weight has fewer than 2^31 numbers.
        activation: "none", "gelu" or "gelu_tanh".

    Returns:
        ``(..., out)`` in x's dtype.
    """
    outputs, K = weight.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.shape[:-1].numel()
    x, weight, bias = x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous()
    spec = Spec(K, outputs, None if activation == "none" else gelu_of(activation == "gelu_tanh", x.dtype))
    # Rows at multiples of 16 bytes, whose numbers fit in 32 bits.
    can_copy = K > 0 and K % 8 == outputs % 8 == 0 and rows < 2**30 and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0

    def run(config, start):
        tile = Tile(config.tile_rows, config.tile_out, config.tile_k, config.num_stages, config.copies)
        operands, programs = (x, weight, out), cdiv(rows, tile.ROWS) * cdiv(outputs, tile.OUT)
        if config.copies:
            programs = min(programs, _configs.multiprocessors(x.device))
            sides = (tile.ROWS, tile.K), (tile.OUT, tile.K), (tile.ROWS, tile.OUT)
            operands = tuple(map(Copied, (x.view(rows, K), weight, out.view(rows, outputs)), sides))
        start(
            _linear_kernel, programs,
            *operands[:2], bias, operands[2], rows, SPEC=spec, TILE=tile, num_warps=config.num_warps,
        )  # fmt: skip

    shape = (K, outputs, activation, x.dtype, bias is None, can_copy)
    launch(_layer_configs.linear, shape, x, run)
    return out
