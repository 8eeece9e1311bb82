"""Triton helpers that more than one kernel uses unchanged."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "dot", "fma", "round_to"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; acc may be None. The interpreter gets bfloat16 wrong, so there it upcasts."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def fma(a, b, c):
    """``a * b + c`` rounded once, in the interpreter too."""
    if _INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return a * b + c  # the compiler fuses it


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even. The interpreter would truncate to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # Nothing may be left to truncate: of zero with a tail it makes the smallest normal number.
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
