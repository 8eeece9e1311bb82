"""A linear layer with what follows it before its result is stored, in half precision.

Bias and GELU, ``act(x @ weight^T + bias)``, or a residual sum, ``residual + scale * (x @ weight^T + bias)``.

Maths: 2 K N FLOP a row, on the matrix units. Floor of a row: 2 K + 2 N bytes, x read and out written, and 2 N of the
residual; without the epilogue a pass over out follows, 4 N more, and 2 N of the residual.
Tiling: a program has TILE_ROWS rows by TILE_OUT columns of the result and walks over K. Those that run at once lie side
by side first, so that they share rows of x; a layer's weight stays in the L2 cache. Tiles of x and weight come by
pointers (cp.async), or by the copy engine of sm_90 and later, which wants rows that begin at multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._gelu import Gelu, gelu, gelu_of
from nest_fast.kernels._launch import Copied, launch
from nest_fast.kernels._primitives import cdiv, dot, load, load_row, round_to
from nest_fast.kernels._rows import Linear, Scale, scaled

__all__ = [
    "Spec", "Tile", "activated", "can_copy", "compiled_in", "copied", "linear_fwd", "load_tile", "no_sums",
    "own_columns", "sum_fwd",
]  # fmt: skip


class Spec(NamedTuple):
    """What the kernel is compiled for: columns of x and of the result, the activation, and that of x, if any."""

    K: int
    OUT: int
    GELU: Gelu | None
    BEFORE: Gelu | None = None


class Tile(NamedTuple):
    """``ROWS`` by ``OUT`` of the result, ``K`` columns of x a step, ``STAGES`` steps in flight; whether the copy engine
    brings and takes them, and whether whole rows stay on chip."""

    ROWS: int
    OUT: int
    K: int
    STAGES: int
    COPIES: bool
    RESIDENT: bool


@triton.jit
def no_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def load_tile(matrix, row, m, start, SPEC: tl.constexpr, TILE: tl.constexpr):
    """TILE_K columns from start on of a (.., K) matrix, 0 beyond K: of rows from row on, or by pointers of m, which
    exist."""
    K: tl.constexpr = SPEC.K
    if TILE.COPIES:
        tile = matrix.load([row, start])
    else:
        k = start + tl.arange(0, TILE.K)  # [TILE_K]
        source = matrix + m[:, None] * K + k[None, :]
        tile = tl.load(source, mask=(k < K)[None, :], other=0.0) if K % TILE.K else tl.load(source)
    return tile


@triton.jit
def own_columns(o, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Columns o, and the last one again where there is none: what reads their weights needs no mask."""
    if SPEC.OUT % TILE.OUT:
        o = tl.minimum(o, SPEC.OUT - 1)
    return o


@triton.jit
def _product(x, weight, row, m, column, o, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Sums [TILE_ROWS, TILE_OUT] in float32 of those rows of x and of the weight."""
    # What is made in registers is warp groups' first operand, which they take from there. Of sm_80's warps, which lie
    # two by four, fewer make the same of the second one.
    BEFORE: tl.constexpr = SPEC.BEFORE
    ACROSS: tl.constexpr = BEFORE is not None and not TILE.COPIES
    sums = no_sums(TILE.OUT, TILE.ROWS) if ACROSS else no_sums(TILE.ROWS, TILE.OUT)
    for start in tl.range(0, SPEC.K, TILE.K, num_stages=TILE.STAGES):
        rows = load_tile(x, row, m, start, SPEC, TILE)
        columns = load_tile(weight, column, o, start, SPEC, TILE)
        if BEFORE is not None:
            rows = round_to(gelu(rows.to(tl.float32), BEFORE), rows.dtype)
        sums = dot(columns, tl.trans(rows), sums, False) if ACROSS else dot(rows, tl.trans(columns), sums, False)
    return tl.trans(sums) if ACROSS else sums


@triton.jit
def activated(sums, bias_ptr, o, SPEC: tl.constexpr):
    GELU: tl.constexpr = SPEC.GELU
    if bias_ptr is not None:
        sums += load_row(bias_ptr, o, SPEC.OUT)
    if GELU is not None:
        sums = gelu(sums, GELU)
    return sums


@triton.jit
def _store_sum(sums, residual, scale, out, row, column, m, rows, HALF: tl.constexpr):
    """residual + scale * sums by the copy engine; half of the columns at a time, since the residual takes registers."""
    halves = tl.split(tl.permute(tl.reshape(sums, [m.shape[0], 2, HALF]), [0, 2, 1]))
    for n in tl.static_range(2):
        total = residual.load([row, column + n * HALF]).to(tl.float32)
        total += scaled(halves[n], scale, row + m, row + m < rows)
        out.store([row, column + n * HALF], round_to(total, out.dtype))


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # (rows, K); it, weight and out are descriptors where the copy engine reads them
    weight,  # (OUT, K)
    bias_ptr,  # (OUT,) or None
    residual,  # (rows, OUT) or None
    out,  # (rows, OUT)
    rows,
    scale,  # Scale of what is added to the residual, or None
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of the result, or with copies every one of so many as there are programs."""
    OUT: tl.constexpr = SPEC.OUT
    COLUMNS: tl.constexpr = (OUT + TILE.OUT - 1) // TILE.OUT
    m = tl.arange(0, TILE.ROWS)  # [TILE_ROWS]
    if TILE.COPIES:
        tiles = (rows + TILE.ROWS - 1) // TILE.ROWS * COLUMNS
        # Flattened, the first steps of the next tile are under way while the GELU of this one is computed.
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row = tile // COLUMNS * TILE.ROWS
            column = tile % COLUMNS * TILE.OUT
            sums = _product(x, weight, row, None, column, None, SPEC, TILE)
            sums = activated(sums, bias_ptr, column + tl.arange(0, TILE.OUT), SPEC)
            if residual is not None:
                _store_sum(sums, residual, scale, out, row, column, m, rows, TILE.OUT // 2)
            else:
                out.store([row, column], round_to(sums, out.dtype))
    else:
        first = (tl.program_id(0) // COLUMNS).to(tl.int64) * TILE.ROWS
        o = tl.program_id(0) % COLUMNS * TILE.OUT + tl.arange(0, TILE.OUT)
        # Where there is no row or column, the last one is read once more: the loop needs no mask for it.
        own_m = tl.minimum(m, (rows - first - 1).to(tl.int32))
        sums = _product(x + first * SPEC.K, weight, None, own_m, None, own_columns(o, SPEC, TILE), SPEC, TILE)
        sums = activated(sums, bias_ptr, o, SPEC)
        mask = (first + m < rows)[:, None]
        if OUT % TILE.OUT:
            mask = mask & (o < OUT)[None, :]
        offsets = m[:, None] * OUT + o[None, :]  # [TILE_ROWS, TILE_OUT]
        if residual is not None:
            sums = load(residual + first * OUT, offsets, mask) + scaled(sums, scale, first + m, first + m < rows)
        tl.store(out + first * OUT + offsets, round_to(sums, out.dtype.element_ty), mask=mask)


def can_copy(rows: int, K: int, outputs: int, *tensors: Tensor) -> bool:
    """Whether the copy engine takes matrices: their rows at multiples of 16 bytes, whose numbers fit in 32 bits."""
    return K > 0 and K % 8 == outputs % 8 == 0 and rows < 2**30 and all(t.data_ptr() % 16 == 0 for t in tensors)


def compiled_in(spec: Spec, config: _layer_configs.MatmulConfig) -> dict[str, Any]:
    tile = Tile(config.tile_rows, config.tile_out, config.tile_k, config.num_stages, config.copies, config.resident)
    return {"SPEC": spec, "TILE": tile, "num_warps": config.num_warps}


def copied(tensors: Sequence[Tensor | None], sides: Sequence[tuple[int, int]]) -> tuple[Copied | None, ...]:
    """Matrices, or None, as kernels take them from the copy engine, in tiles of these sides."""
    pairs = zip(tensors, sides, strict=True)
    return tuple(None if t is None else Copied(t.view(-1, t.shape[-1]), side) for t, side in pairs)


def _linear(
    table: Callable, x: Tensor, layer: Linear, gelus: tuple, residual: Tensor | None, scale: Scale | None
) -> Tensor:
    """``gelus``: of the result and of x, or None each."""
    outputs, K = layer.weight.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.shape[:-1].numel()
    spec = Spec(K, outputs, *gelus)

    def run(config, start):
        programs = cdiv(rows, config.tile_rows) * cdiv(outputs, config.tile_out)
        xs, weights, *rest = operands = x, layer.weight, residual, out
        if config.copies:
            programs = min(programs, _configs.multiprocessors(x.device))
            result = config.tile_rows, config.tile_out if residual is None else config.tile_out // 2
            sides = (config.tile_rows, config.tile_k), (config.tile_out, config.tile_k), result, result
            xs, weights, *rest = copied(operands, sides)
        start(_linear_kernel, programs, xs, weights, layer.bias, *rest, rows, scale, **compiled_in(spec, config))

    copies = can_copy(rows, K, outputs, *(t for t in (x, layer.weight, residual) if t is not None))
    tanh = [None if gelu is None else gelu.TANH for gelu in gelus]
    samples = scale is not None and scale.samples is not None
    launch(table, (K, outputs, *tanh, x.dtype, layer.bias is None, samples, copies), x, run)
    return out


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x @ weight^T + bias)``. Checks nothing.

    Args:
        x: ``(..., K)``, float16 or bfloat16, any strides, but one that is not contiguous is copied.
        weight, bias: ``(out, K)`` and ``(out,)`` or None, in x's dtype; the weight has fewer than 2^31 numbers.
        activation: "none", "gelu" or "gelu_tanh".

    Returns:
        ``(..., out)`` in x's dtype.
    """
    formula = None if activation == "none" else gelu_of(activation == "gelu_tanh", x.dtype)
    return _linear(_layer_configs.linear, x.contiguous(), Linear.dense(weight, bias), (formula, None), None, None)


def sum_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: float,
    samples: Tensor | None = None,
    gelu: Gelu | None = None,
) -> Tensor:
    """``residual + scale * (x @ weight^T + bias)``, or of ``gelu(x)``. Checks nothing.

    Args:
        x, weight, bias: as of linear_fwd.
        residual: ``(..., out)`` in x's dtype; as x, any strides.
        scale: factor of what is added; samples: in its place one for each sample ``(B,)``, or None.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    factors = Scale.of(scale, samples, x.shape[:-1].numel())
    operands = x.contiguous(), Linear.dense(weight, bias), (None, gelu), residual.contiguous()
    return _linear(_layer_configs.linear_sum, *operands, factors)
