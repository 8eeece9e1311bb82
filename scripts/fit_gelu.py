"""The polynomials of kernels/_gelu.py, fitted anew: ``python scripts/fit_gelu.py`` prints them.

log2 Phi(-u), or with tanh -log2(1 + exp(2z)), is -1 at 0 and nearly a parabola. What counts is the error of
gelu(-u) = -u 2 ** P(u): relative to itself, and below a floor, near which the dtype or the result ends, to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial, chebyshev
from torch import Tensor

POINTS, ROUNDS = 1000, 60


class Fit(NamedTuple):
    """A polynomial of this degree for ``0 <= u <= top``, the errors of results below ``floor`` relative to that."""

    degree: int
    top: float
    floor: float


FITS = {
    (False, torch.bfloat16): Fit(5, 5.0, 1e-3),
    (False, torch.float16): Fit(7, 5.7, 1e-5),
    (False, torch.float32): Fit(12, 5.7, 1e-6),
    (True, torch.bfloat16): Fit(7, 5.7, 1e-5),
    (True, torch.float16): Fit(10, 8.0, 1e-8),
    (True, torch.float32): Fit(14, 5.7, 1e-6),
}


def log2_tail(u: Tensor, tanh: bool) -> Tensor:
    """log2 of Phi(-u) in float64."""
    if tanh:
        z = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
        return -torch.nn.functional.softplus(2 * z, threshold=math.inf) / math.log(2)
    return torch.special.log_ndtr(-u) / math.log(2)


def fit(tanh: bool, degree: int, top: float, floor: float) -> tuple[float, list[float]]:
    """The largest error, and the coefficients, the highest power's first and -1 last.

    By Lawson's iteration: least squares whose weights grow where the error is large, which goes to the minimax.
    """
    u = top * (1 - np.cos(math.pi * (np.arange(POINTS) + 0.5) / POINTS)) / 2
    target = log2_tail(torch.from_numpy(u), tanh).numpy()
    result = u * 2.0**target
    scale = math.log(2) * result / (result + floor)
    scale[u < 1e-3] = math.log(2)  # there the result is u / 2 to the last digit
    basis = chebyshev.chebvander(2 * u / top - 1, degree - 1) * u[:, None]
    weights, best = np.ones(POINTS), (math.inf, np.zeros(degree))
    for _ in range(ROUNDS):
        rows = np.sqrt(weights) * scale
        found = np.linalg.lstsq(basis * rows[:, None], (target + 1) * rows)[0]
        error = np.abs(basis @ found - (target + 1)) * scale
        best = min(best, (error.max(), found), key=lambda one: one[0])
        weights *= error / error.max() + 1e-3
        weights /= weights.sum()
    powers = Chebyshev(best[1], domain=[0, top]).convert(kind=Polynomial).coef
    return best[0], [*powers[::-1], -1.0]


def main() -> None:
    for (tanh, dtype), how in FITS.items():
        error, coefficients = fit(tanh, *how)
        u = np.linspace(0, 100, 20_001)
        falls = np.all(np.diff(np.polyval(coefficients, u)) < 0)
        print(f"# {how}: error 2 ** {math.log2(error):.1f}{'' if falls else ', and it does not fall for ever'}")
        numbers = ", ".join(f"{c:.9g}" if c != -1.0 else "-1.0" for c in coefficients)
        print(f"    ({tanh}, {dtype}): ({numbers}),")


if __name__ == "__main__":
    main()
