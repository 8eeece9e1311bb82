"""GELU of a sum with a bias, and its gradient with the bias's, in one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from nest_fast.kernels._primitives import round_to
from torch import Tensor

__all__ = ["bias_gelu_bwd", "bias_gelu_fwd"]

PROGRAMS = 2048  # of the backward, at most: each leaves one row of partial sums of the bias's gradient
ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # at 0: 1 / sqrt(2 pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh_argument(x):
    """``u = sqrt(2 / pi) (x + 0.044715 x^3)`` and ``exp(-2|u|)``, which cannot overflow."""
    u = ROOT_2_OVER_PI * (x + CUBIC * (x * x * x))
    return u, tl.exp(-2.0 * tl.abs(u))


@triton.jit
def _divide(x, y, ROUNDED: tl.constexpr):
    """``x / y``; ROUNDED if the result ends in half precision, which hides the last bits of a cheaper division."""
    return x / y if ROUNDED else tl.div_rn(x, y)


@triton.jit
def _gelu(x, TANH: tl.constexpr, ROUNDED: tl.constexpr):
    if TANH:
        # (1 + tanh u) / 2 = sigmoid(2u), whose digits do not cancel below zero. NaN is not >= 0 and stays in the sum.
        u, small = _tanh_argument(x)
        return _divide(tl.where(u >= 0.0, x, x * small), 1.0 + small, ROUNDED)
    return x * _normal_cdf(x)


@triton.jit
def _gelu_derivative(x, TANH: tl.constexpr, ROUNDED: tl.constexpr):
    if TANH:
        u, small = _tanh_argument(x)
        whole = _divide(1.0, 1.0 + small, ROUNDED)
        slope = 2.0 * ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * (x * x))
        return tl.where(u >= 0.0, whole, small * whole) + x * (small * whole * whole) * slope
    return _normal_cdf(x) + x * (NORMAL_DENSITY * tl.exp(-0.5 * (x * x)))


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * ROOT_HALF))


@triton.jit
def _sum_with_bias(x_ptr, bias_ptr, at, c, mask, C):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, out_ptr, rows, column_tiles, C,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of BLOCK_C columns."""
    pid = tl.program_id(0)
    row = (pid // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = pid % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    x = _sum_with_bias(x_ptr, bias_ptr, at, c, mask, C)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, round_to(_gelu(x, TANH, dtype != tl.float32), dtype), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles", "column_tiles"])
def _bias_gelu_bwd_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows, column_tiles, tiles, C,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: tiles times ROWS rows of BLOCK_C columns, and the sums of their gradients."""
    pid = tl.program_id(0)
    start = (pid // column_tiles).to(tl.int64) * tiles * ROWS
    c = pid % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    for tile in range(tiles):
        row = start + tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        x = _sum_with_bias(x_ptr, bias_ptr, at, c, mask, C)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gradient = dout * _gelu_derivative(x, TANH, dtype != tl.float32)
        tl.store(dx_ptr + at, round_to(gradient, dtype), mask=mask)
        # Rows past the end have the bias's derivative, which may be NaN.
        total += tl.where(mask, gradient, 0.0)
    if partial_ptr is not None:
        tl.store(partial_ptr + (pid // column_tiles).to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


def _tile(channels: int) -> dict[str, int]:
    """Eight values for each thread. 128 columns are whole cache lines, and divide the widths of MLPs."""
    columns = min(128, max(16, triton.next_power_of_2(channels)))
    return {"ROWS": 1024 // columns, "BLOCK_C": columns, "num_warps": 4}


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, dtype: torch.dtype, tanh: bool) -> Tensor:
    """``gelu(x + bias)``. Checks nothing.

    Floor: x read, the output written, 4 bytes an element in half precision.

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
    tile = _tile(C)
    column_tiles = triton.cdiv(C, tile["BLOCK_C"])
    with torch.cuda.device_of(x):
        _bias_gelu_fwd_kernel[(triton.cdiv(rows, tile["ROWS"]) * column_tiles,)](
            x.contiguous(), bias if bias is None else bias.contiguous(), out, rows, column_tiles, C, TANH=tanh, **tile
        )  # fmt: skip
    return out


def bias_gelu_bwd(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of bias_gelu_fwd. No atomics: the same input gives the same bits.

    Floor: dout and x read, dx written, 6 bytes an element in half precision.

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
    tile = _tile(C)
    column_tiles = triton.cdiv(C, tile["BLOCK_C"])
    # With 32 rows or more to a program the partial sums are a small part of what is moved.
    per_program = max(32, triton.cdiv(rows, triton.cdiv(PROGRAMS, column_tiles))) if need_dbias else tile["ROWS"]
    tiles = triton.cdiv(per_program, tile["ROWS"])
    programs = triton.cdiv(rows, tiles * tile["ROWS"])
    partial = torch.empty((programs, C), dtype=torch.float32, device=x.device) if need_dbias else None
    with torch.cuda.device_of(x):
        _bias_gelu_bwd_kernel[(programs * column_tiles,)](
            dout.contiguous(), x.contiguous(), bias if bias is None else bias.contiguous(),
            dx, partial, rows, column_tiles, tiles, C, TANH=tanh, **tile,
        )  # fmt: skip
        return dx, None if partial is None else partial.sum(0)
