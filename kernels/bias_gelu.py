"""``gelu(x + bias)`` and its gradients in Triton, one pass over memory each.

Maths: gelu(x) as _gelu has it; dx = dout gelu'(x + bias), dbias = sum over rows of dx. Floor of n elements in half
precision: 4n bytes forward, 6n backward, a dozen FLOP each.
Tiling: a program has TILE_ROWS rows of TILE_C channels, in the backward several such tiles below each other, whose sums
are one row of partial sums of dbias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.kernels._gelu import gelu, gelu_derivative, gelu_of
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, load, load_row, round_to

__all__ = ["bias_gelu_bwd", "bias_gelu_fwd", "gelu_linear_bwd", "gelu_linear_fwd"]


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
    outs,  # dx (rows, C); gelu(x + bias) (rows, C) or None
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
    dx_ptr, out_ptr = outs
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
        if out_ptr is not None:
            tl.store(out_ptr + offsets, round_to(gelu(x, GELU), out_ptr.dtype.element_ty), mask=mask)
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
    dx, dbias, _ = _backward(dout, x, bias, tanh, need_dbias, False)
    return dx, dbias


def _backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool, need_out: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients, and what the forward returned."""
    C, rows = x.shape[-1], x.shape[:-1].numel()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_out else None
    if x.numel() == 0:
        return dx, torch.zeros(C, dtype=torch.float32, device=x.device) if need_dbias else None, out
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
            dout, x, bias, (dx, out), partial, rows, column_tiles, tiles, C, GELU=formula, **tile,
        )  # fmt: skip
        return partial

    partial = launch(_configs.bias_gelu, ("bwd", C, tanh, x.dtype, need_dbias, need_out), x, run)
    return dx, None if partial is None else partial.sum(0), out


# --- and the linear layer after it ------------------------------------------------------------------------------------


def gelu_linear_fwd(x: Tensor, bias: Tensor | None, tanh: bool, weight: Tensor, weight_bias: Tensor | None) -> Tensor:
    """``gelu(x + bias) @ weight^T + weight_bias``, the matmul by the library. Checks nothing.

    Args:
        x, bias: as of bias_gelu_fwd, C features; tanh: too.
        weight, weight_bias: ``(out, C)`` and ``(out,)`` or None, in x's dtype.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    hidden = bias_gelu_fwd(x, bias, x.dtype, tanh).view(x.shape[:-1].numel(), x.shape[-1])
    out = hidden @ weight.t() if weight_bias is None else torch.addmm(weight_bias, hidden, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def gelu_linear_bwd(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of gelu_linear_fwd, which makes gelu(x + bias) again in the pass that reads x for its derivative.

    Args:
        dout: ``(..., out)``, any strides.
        x, bias, tanh, weight: as the forward took them.
        output_mask: which gradients are wanted: of x, bias, weight and weight_bias.

    Returns:
        These, None where not wanted; bias's in float32.
    """
    wants_x, wants_bias, wants_weight, wants_weight_bias = output_mask
    rows = x.shape[:-1].numel()
    douts, dx, dbias, out = dout.reshape(rows, weight.shape[0]), None, None, None
    if wants_x or wants_bias:
        dx, dbias, out = _backward((douts @ weight).view(x.shape), x, bias, tanh, wants_bias, wants_weight)
    elif wants_weight:
        out = bias_gelu_fwd(x, bias, x.dtype, tanh)
    dweight = None if out is None else douts.t() @ out.view(rows, x.shape[-1])
    return dx if wants_x else None, dbias, dweight, douts.sum(0) if wants_weight_bias else None
