"""GELU and its derivative with one exponential: gelu(x) = x Phi(x), Phi(-u) = 2 ** P(u) for u = |x|.

log2 Phi(-u) is nearly a parabola, so a polynomial P of low degree does, and nothing cancels below zero, where 1 + erf
does: results in half precision are rounded right but for 0.02 units in the last place (docs/notes/passes.md). So it is
with tanh, whose (1 + tanh z) / 2 is 1 / (1 + exp(-2z)). scripts/fit_gelu.py finds the coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nest_fast.kernels._primitives import exp2, fma

__all__ = ["Gelu", "gelu", "gelu_derivative", "gelu_of"]

HALF_LOG2E = tl.constexpr(0.7213475204444817)
LOG2_DENSITY = tl.constexpr(-1.3257480647361593)  # of the normal distribution at 0, 1 / sqrt(2 pi)
TWO_ROOT_2_OVER_PI = tl.constexpr(1.5957691216057308)
THREE_CUBIC = tl.constexpr(0.134145)  # 3 times 0.044715


class Gelu(NamedTuple):
    """What a kernel is compiled for: whether tanh stands in for the normal distribution; P, highest power first.

    All P fall for ever, to where 2 ** P is 0, and are -1 at 0, so that gelu(x) of a tiny x is x / 2.
    """

    TANH: bool
    P: tuple[float, ...]


# By tanh and the dtype that results are rounded to.
_POLYNOMIALS = {
    (False, torch.bfloat16): (-0.000387016161, 0.00645218606, -0.0502774331, -0.461407595, -1.15046616, -1.0),
    (False, torch.float16): (
        *(-1.36944726e-06, 5.4030348e-05, -0.000882458957, 0.00835709744, -0.0537167383),
        *(-0.458654943, -1.15119066, -1.0),
    ),
    (False, torch.float32): (
        *(-2.66499098e-10, 1.15622284e-08, -2.2791858e-07, 2.69367827e-06, -2.10608055e-05, 0.000111029588),
        *(-0.00035381453, 9.73197653e-05, 0.00687286925, -0.0524118445, -0.459225783, -1.15110399, -1.0),
    ),
    (True, torch.bfloat16): (
        *(-4.20278317e-05, 0.00101707242, -0.00880371124, 0.0286140118, -0.0753216259),
        *(-0.446961742, -1.15319159, -1.0),
    ),
    (True, torch.float16): (
        *(-4.35345746e-07, 1.52949558e-05, -0.000221548931, 0.00168288865, -0.00689150331, 0.0131447372),
        *(-0.00772362125, -0.04153232, -0.462340472, -1.15076911, -1.0),
    ),
    (True, torch.float32): (
        *(-2.16627784e-09, 8.33608665e-08, -1.39041857e-06, 1.29804527e-05, -7.25202686e-05, 0.000236226816),
        *(-0.000385363583, 0.000199903801, -0.000283972065, -0.000454886689, 0.00802853043, -0.0516226592),
        *(-0.45919539, -1.15110594, -1.0),
    ),
}


def gelu_of(tanh: bool, dtype: torch.dtype) -> Gelu:
    """The GELU whose results are rounded to ``dtype``."""
    return Gelu(tanh, _POLYNOMIALS[tanh, dtype])


@triton.jit
def _phi(x, GELU: tl.constexpr):
    """Phi(x), and Phi(-|x|)."""
    P: tl.constexpr = GELU.P
    u = tl.abs(x)
    p = fma(u, P[0], P[1])
    for i in tl.static_range(2, len(P)):
        p = fma(p, u, P[i])
    tail = exp2(p)
    return tl.where(x >= 0.0, 1.0 - tail, tail), tail


@triton.jit
def gelu(x, GELU: tl.constexpr):
    """gelu of float32 x, NaN of -inf as PyTorch has it."""
    phi, _ = _phi(x, GELU)
    return x * phi


@triton.jit
def gelu_derivative(x, GELU: tl.constexpr):
    """Phi(x) + x Phi'(x), where Phi' is the density, or 2z' Phi(x) Phi(-x) for z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    phi, tail = _phi(x, GELU)
    if GELU.TANH:
        slope = tail * (1.0 - tail) * (TWO_ROOT_2_OVER_PI * (1.0 + THREE_CUBIC * (x * x)))
    else:
        slope = exp2(fma(x * x, -HALF_LOG2E, LOG2_DENSITY))
    return phi + x * slope
