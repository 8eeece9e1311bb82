"""``gelu(x + bias)`` and its gradients in Triton, one pass over memory each.

Maths: gelu(x) as _gelu has it; dx = dout gelu'(x + bias), dbias = sum over rows of dx. Floor of n elements in half
precision: 4n bytes forward, 6n backward, a dozen FLOP each.
Tiling: a program has TILE_ROWS rows of TILE_C channels, in the backward several such tiles below each other, whose sums
are one row of partial sums of dbias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.kernels._gelu import gelu, gelu_derivative, gelu_of
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, load, load_row, round_to

__all__ = ["bias_gelu_bwd", "bias_gelu_fwd"]


@triton.jit
def _load_with_bias(x_ptr, bias_ptr, offsets, c, mask, C):
    x = load(x_ptr, offsets, mask)  # [TILE_ROWS, TILE_C]
    if bias_ptr is not None:
        x += load_row(bias_ptr, c, C)
    return x


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (rows, C)
    bias_ptr,  # (C,) or None
    out_ptr,  # (rows, C)
    rows,
    column_tiles,  # tiles side by side that cover C
    C,
    GELU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: a tile of TILE_ROWS rows by TILE_C channels."""
    pid = tl.program_id(0)
    row = (pid // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
    c = pid % column_tiles * TILE_C + tl.arange(0, TILE_C)  # [TILE_C]
    mask = (row < rows)[:, None] & (c < C)[None, :]
    offsets = row[:, None] * C + c[None, :]  # [TILE_ROWS, TILE_C]
    x = _load_with_bias(x_ptr, bias_ptr, offsets, c, mask, C)
    tl.store(out_ptr + offsets, round_to(gelu(x, GELU), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles", "column_tiles"])
def _bias_gelu_bwd_kernel(
    dout_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    bias_ptr,  # (C,) or None
    dx_ptr,  # (rows, C)
    partial_ptr,  # (programs below each other, C) float32: sums of dx, or None
    rows,
    column_tiles,  # tiles side by side that cover C
    tiles,  # tiles below each other that a program has
    C,
    GELU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program: tiles times TILE_ROWS rows by TILE_C channels, and the sums of their gradients."""
    pid = tl.program_id(0)
    first = (pid // column_tiles).to(tl.int64) * tiles * TILE_ROWS
    c = pid % column_tiles * TILE_C + tl.arange(0, TILE_C)  # [TILE_C]
    dbias = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for tile in range(tiles):
        row = first + tile * TILE_ROWS + tl.arange(0, TILE_ROWS)  # [TILE_ROWS]
        mask = (row < rows)[:, None] & (c < C)[None, :]
        offsets = row[:, None] * C + c[None, :]  # [TILE_ROWS, TILE_C]
        x = _load_with_bias(x_ptr, bias_ptr, offsets, c, mask, C)
        dx = load(dout_ptr, offsets, mask) * gelu_derivative(x, GELU)  # [TILE_ROWS, TILE_C]
        tl.store(dx_ptr + offsets, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
        # Rows past the end have the bias's derivative, which may be NaN.
        dbias += tl.where(mask, dx, 0.0)
    if partial_ptr is not None:
        tl.store(partial_ptr + (pid // column_tiles).to(tl.int64) * C + c, tl.sum(dbias, 0), mask=c < C)


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, dtype: torch.dtype, tanh: bool) -> Tensor:
    """``gelu(x + bias)``. Checks nothing.

    Args:
        x: ``(..., C)``, any strides, but one that is not contiguous is copied.
        bias: ``(C,)`` or None. Any of float32, float16 and bfloat16, also another than x's.
        dtype: of the output.
        tanh: whether tanh stands in for the normal distribution.

    Returns:
        ``(..., C)``.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out
    C, rows = x.shape[-1], x.shape[:-1].numel()
    x, bias = x.contiguous(), bias if bias is None else bias.contiguous()
    formula = gelu_of(tanh, dtype)

    def run(tile, start):
        column_tiles = cdiv(C, tile["TILE_C"])
        programs = cdiv(rows, tile["TILE_ROWS"]) * column_tiles
        start(_bias_gelu_fwd_kernel, programs, x, bias, out, rows, column_tiles, C, GELU=formula, **tile)

    launch(_configs.bias_gelu, ("fwd", C, tanh, x.dtype, dtype), x, run)
    return out


def bias_gelu_bwd(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of bias_gelu_fwd. No atomics: the same input gives the same bits.

    Args:
        dout: ``(..., C)``, any strides.
        x, bias, tanh: as the forward took them.
        need_dbias: whether the gradient of bias is wanted.

    Returns:
        ``dx`` in x's shape and dtype; the gradient of bias, ``(C,)`` float32, or None.
    """
    C, rows = x.shape[-1], x.shape[:-1].numel()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros(C, dtype=torch.float32, device=x.device) if need_dbias else None
    dout, x, bias = dout.contiguous(), x.contiguous(), bias if bias is None else bias.contiguous()
    # The bias may be more exact than x, and so is its gradient then.
    formula = gelu_of(tanh, torch.promote_types(x.dtype, bias.dtype) if need_dbias and bias is not None else x.dtype)

    def run(tile, start):
        tile_rows, column_tiles = tile["TILE_ROWS"], cdiv(C, tile["TILE_C"])
        # With 32 rows or more to a program the partial sums are a small part of what is moved.
        most = max(1, _configs.at_once(x.device, tile) // column_tiles)
        tiles = cdiv(max(32, cdiv(rows, most)) if need_dbias else tile_rows, tile_rows)
        programs = cdiv(rows, tiles * tile_rows)
        partial = torch.empty((programs, C), dtype=torch.float32, device=x.device) if need_dbias else None
        start(
            _bias_gelu_bwd_kernel, programs * column_tiles,
            dout, x, bias, dx, partial, rows, column_tiles, tiles, C, GELU=formula, **tile,
        )  # fmt: skip
        return partial

    partial = launch(_configs.bias_gelu, ("bwd", C, tanh, x.dtype, need_dbias), x, run)
    return dx, None if partial is None else partial.sum(0)
