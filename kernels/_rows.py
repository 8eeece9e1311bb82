"""Rows that stay on chip, all their C channels in pieces: their loads, their LayerNorm, linear layers of them."""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels._primitives import dot, load, load_row, piece, round_to

__all__ = [
    "Linear", "Norm", "Scale", "add_bias", "is_whole", "layer_norm", "linear", "load_normed", "load_rows",
    "load_scaled", "load_weight", "own_rows", "round_all", "row_mask", "scaled", "store_rows",
]  # fmt: skip


class Norm(NamedTuple):
    """A LayerNorm's parameters, ``(C,)``."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor, eps: float) -> Norm:
        return cls(weight.contiguous(), bias.contiguous(), eps)


class Linear(NamedTuple):
    """``(out, in)`` and ``(out,)`` or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None) -> Linear:
        return cls(weight.contiguous(), bias if bias is None else bias.contiguous())


class Scale(NamedTuple):
    """What is added to rows is multiplied by ``factor``, or, where there are ``samples`` ``(B,)``, by that of a row's
    sample, of ``rows`` rows."""

    factor: float
    samples: Tensor | None
    rows: int

    @classmethod
    def of(cls, factor: float, samples: Tensor | None, rows: int) -> Scale:
        """Of so many rows in all."""
        if samples is None:
            return cls(float(factor), None, 1)
        return cls(1.0, samples.contiguous(), rows // samples.shape[0])


@triton.jit
def own_rows(rows, ROWS: tl.constexpr):
    """The first of a program's ROWS rows, their numbers [ROWS] from there on, and which of them exist."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    m = tl.arange(0, ROWS)
    return first, m, first + m < rows


@triton.jit
def is_whole(n: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr):
    """Whether all channels of piece n exist; to be given on, as an if of Triton 3.6 takes no such answer."""
    return PIECES[n][0] + PIECES[n][1] <= C


@triton.jit
def row_mask(exists, n: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr):
    """Which of rows [ROWS] that may not exist and channels of piece n there are."""
    mask = exists[:, None]
    if PIECES[n][0] + PIECES[n][1] > C:
        mask = mask & (piece(PIECES, n) < C)[None, :]
    return mask


@triton.jit
def load_rows(x_ptr, m, exists, C: tl.constexpr, PIECES: tl.constexpr):
    """Rows m [ROWS] of a dense (rows, C) tensor, in its dtype: [ROWS, size] for every piece, 0 where there is none."""
    rows = ()
    for n in tl.static_range(len(PIECES)):
        source = x_ptr + m[:, None] * C + piece(PIECES, n)[None, :]
        rows = rows + (tl.load(source, mask=row_mask(exists, n, C, PIECES), other=0.0),)
    return rows


@triton.jit
def store_rows(out_ptr, rows, m, exists, C: tl.constexpr, PIECES: tl.constexpr):
    """float32 rows [ROWS, size] for every piece, to where :func:`load_rows` has them."""
    for n in tl.static_range(len(PIECES)):
        target = out_ptr + m[:, None] * C + piece(PIECES, n)[None, :]
        tl.store(target, round_to(rows[n], out_ptr.dtype.element_ty), mask=row_mask(exists, n, C, PIECES))


@triton.jit
def add_bias(rows, bias_ptr, scale, C: tl.constexpr, PIECES: tl.constexpr):
    """``rows + scale * bias`` of float32 rows, [ROWS, size] for every piece; no bias is 0, no scale 1."""
    sums = ()
    for n in tl.static_range(len(PIECES)):
        row = rows[n]
        if bias_ptr is not None:
            bias = load_row(bias_ptr, piece(PIECES, n), C)
            row += bias if scale is None else scale * bias
        sums = sums + (row,)
    return sums


@triton.jit
def scaled(x, scale, row, exists):
    """x [ROWS, size] times the Scale of its rows."""
    if scale.samples is not None:
        x *= load(scale.samples, row // scale.rows, exists)[:, None]
    else:
        x *= scale.factor
    return x


@triton.jit
def load_scaled(x_ptr, scale, first, m, exists, C: tl.constexpr, PIECES: tl.constexpr):
    """Rows first + m times their Scale, as load_rows has them, in float32."""
    rows = load_rows(x_ptr + first * C, m, exists, C, PIECES)
    products = ()
    for n in tl.static_range(len(PIECES)):
        products = products + (scaled(rows[n].to(tl.float32), scale, first + m, exists),)
    return products


@triton.jit
def _centred(x, mean, rest, n: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr):
    """x - mean - rest of piece n in float32, 0 beyond C."""
    x = x.to(tl.float32) - mean[:, None] - rest[:, None]
    if PIECES[n][0] + PIECES[n][1] > C:
        x = tl.where((piece(PIECES, n) < C)[None, :], x, 0.0)
    return x


@triton.jit
def layer_norm(rows, norm, C: tl.constexpr, PIECES: tl.constexpr, FAR: tl.constexpr):
    """LayerNorm in float32 of rows, [ROWS, size] for every piece and 0 beyond C; with mean and rstd [ROWS].

    norm has weight, bias and eps. FAR: rows may be far from zero, as sums of many layers are; their mean is rounded by
    more than what is left of it then. To sum that too costs a tenth of the instructions.
    """
    mean = tl.zeros([rows[0].shape[0]], tl.float32)
    for n in tl.static_range(len(PIECES)):
        mean += tl.sum(rows[n].to(tl.float32), 1)
    mean = mean / C
    rest = tl.zeros([rows[0].shape[0]], tl.float32)
    if FAR:
        left = rest
        for n in tl.static_range(len(PIECES)):
            left += tl.sum(_centred(rows[n], mean, rest, n, C, PIECES), 1)
        rest = left / C
    variance = tl.zeros([rows[0].shape[0]], tl.float32)
    for n in tl.static_range(len(PIECES)):
        x = _centred(rows[n], mean, rest, n, C, PIECES)
        variance += tl.sum(x * x, 1)
    rstd = 1.0 / tl.sqrt_rn(variance / C + norm.eps)
    normed = ()
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        x = _centred(rows[n], mean, rest, n, C, PIECES) * rstd[:, None]
        normed = normed + (x * load_row(norm.weight, c, C) + load_row(norm.bias, c, C),)
    return normed, mean + rest, rstd


@triton.jit
def round_all(tiles, dtype: tl.constexpr):
    """Every one of a tuple of float32 tiles, :func:`round_to` dtype."""
    rounded = ()
    for n in tl.static_range(len(tiles)):
        rounded = rounded + (round_to(tiles[n], dtype),)
    return rounded


@triton.jit
def load_weight(source, exists, COMPLETE: tl.constexpr):
    """A tile of a weight; with a mask only where some of it does not exist."""
    return tl.load(source) if COMPLETE else tl.load(source, mask=exists, other=0.0)


@triton.jit
def load_normed(x_ptr, norm, m, exists, C: tl.constexpr, PIECES: tl.constexpr):
    """The LayerNorm of rows as load_rows has them, in their dtype; these themselves where norm is None."""
    rows = load_rows(x_ptr, m, exists, C, PIECES)
    if norm is not None:
        normed, _, _ = layer_norm(rows, norm, C, PIECES, True)
        rows = round_all(normed, x_ptr.dtype.element_ty)
    return rows


@triton.jit
def linear(
    rows, layer, o, COMPLETE: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, TF32: tl.constexpr
):
    """Columns o [TILE_OUT] of ``rows @ weight^T + bias`` in float32, [ROWS, TILE_OUT].

    rows are tiles for every piece of C, layer is a Linear (OUT, C). COMPLETE: all of o are below OUT.
    """
    sums = tl.zeros([rows[0].shape[0], o.shape[0]], tl.float32)
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        exists = (o < OUT)[:, None] & (c < C)[None, :]
        source = layer.weight + o[:, None] * C + c[None, :]
        weight = load_weight(source, exists, COMPLETE and is_whole(n, C, PIECES))  # [TILE_OUT, size]
        sums = dot(rows[n], tl.trans(weight), sums, TF32)
    if layer.bias is not None:
        sums += load_row(layer.bias, o, OUT)
    return sums
