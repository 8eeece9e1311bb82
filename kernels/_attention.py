"""Tiles of attention in Triton: loads and stores of queries and keys, scores, softmax.

Queries are rows m of a tile, keys are its columns n, in every direction. With one key head (multi-query) a program may
own all heads of a block, stacked as HEADS * N queries over the same N keys; otherwise HEADS is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from nest_fast.kernels._primitives import LN2, LOG2E, dot, fma, round_to
from nest_fast.kernels._windows import pads, regions, rows

__all__ = [
    "Spec", "exp_scores", "load_keys", "load_lse", "load_queries", "load_vector", "online_softmax_update",
    "program_index", "row_dot", "scaled_keys", "scaled_queries", "scores", "softmax_weights", "store_attention",
    "store_dkeys", "store_dqueries", "store_keys", "store_queries",
]  # fmt: skip


class Spec(NamedTuple):
    """What the kernels are compiled for, beside tiles.

    ADDS: there is a bias, a mask or REGIONS. FOLD_SCALE: the scale is positive and not tiny, so that it can be left to
    the exponent. TF32: of float32 matmuls. WIDTH: of the windows of an image, where blocks are these. PADS: some reach
    beyond the image. REGIONS: scores between tokens from beyond an edge of the image and those at it have -100 added.
    """

    N: int
    HEAD_DIM: int
    HEADS: int
    ADDS: bool
    FOLD_SCALE: bool
    TF32: bool
    WIDTH: int = 0
    PADS: bool = False
    REGIONS: bool = False


@triton.jit
def program_index(per_block, T):
    """Batch, block of the image, and which of the block's programs this is; 64-bit, since strides multiply them."""
    block = tl.program_id(0) // per_block
    return (block // T).to(tl.int64), (block % T).to(tl.int64), (tl.program_id(0) % per_block).to(tl.int64)


@triton.jit
def _pointers(x, index, row, SPEC: tl.constexpr, HEADS: tl.constexpr):
    """Pointers [rows, HEAD_DIM padded to a power of two] into x, and which exist.

    x is a ``(B, T, N, heads, HEAD_DIM)`` tensor whose last dimension is dense, with its other strides; index is batch,
    block, the first of HEADS heads, and the cut of an image or None; row r is token r % N of the head r // N further
    on. With a cut x is ``(B, 1, H * W, heads, HEAD_DIM)``; padding exists where x goes on with a
    ``(B, 1, pads, heads, HEAD_DIM)`` for it.
    """
    N: tl.constexpr = SPEC.N
    PADDED_DIM: tl.constexpr = triton.next_power_of_2(max(SPEC.HEAD_DIM, 16))
    b, t, head, cut = index
    token = row if HEADS == 1 else row % N
    exists = row < HEADS * N
    if SPEC.WIDTH:
        place, inside = rows(cut, t, token, SPEC.WIDTH)
        pointers = _rows(x[:5], b, 0, place, head, row, N, HEADS)
        if SPEC.PADS:
            if len(x) > 5:
                padding = _rows(x[5:], b, 0, pads(cut, t, token, SPEC.WIDTH), head, row, N, HEADS)
                pointers = tl.where(inside, pointers, padding)
            else:
                exists = exists & inside
    else:
        pointers = _rows(x, b, t, token, head, row, N, HEADS)
    d = tl.arange(0, PADDED_DIM)[None, :]
    exists = exists[:, None]
    if SPEC.HEAD_DIM < PADDED_DIM:
        exists = exists & (d < SPEC.HEAD_DIM)
    return pointers[:, None] + d, exists


@triton.jit
def _rows(x, b, t, token, head, row, N: tl.constexpr, HEADS: tl.constexpr):
    """Pointers [rows] to the first of HEAD_DIM numbers of tokens."""
    ptr, stride_b, stride_t, stride_n, stride_h = x
    offsets = token.to(tl.int64) * stride_n
    if HEADS > 1:
        offsets += (row // N).to(tl.int64) * stride_h
    return ptr + b * stride_b + t * stride_t + head * stride_h + offsets


@triton.jit
def load_queries(x, index, m, SPEC: tl.constexpr):
    """[BLOCK_M, HEAD_DIM] of x, which has all heads, at queries m [BLOCK_M]; 0 past the last."""
    pointers, exists = _pointers(x, index, m, SPEC, SPEC.HEADS)
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def load_keys(x, index, n, SPEC: tl.constexpr):
    """[BLOCK_N, HEAD_DIM] of x, which has one head here, at keys n [BLOCK_N]; 0 past the last."""
    pointers, exists = _pointers(x, index, n, SPEC, 1)
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def load_vector(ptr, sequence, m, SPEC: tl.constexpr):
    """float32 [BLOCK_M] of a vector (sequences, HEADS * N) such as delta, 0 past the last query."""
    return tl.load(ptr + sequence * (SPEC.HEADS * SPEC.N) + m, mask=m < SPEC.HEADS * SPEC.N, other=0.0)


@triton.jit
def _pair(lse_ptr, sequence, m, SPEC: tl.constexpr):
    """Pointers [BLOCK_M] to the first part of lse where it has two."""
    return lse_ptr + sequence * (2 * SPEC.HEADS * SPEC.N) + 2 * m


@triton.jit
def load_lse(lse_ptr, sequence, m, SPEC: tl.constexpr):
    """lse [BLOCK_M] of queries m of a sequence, or with ADDS its two parts, as store_attention left them."""
    if SPEC.ADDS:
        pairs = _pair(lse_ptr, sequence, m, SPEC)
        exists = m < SPEC.HEADS * SPEC.N
        lse = tl.load(pairs, mask=exists, other=0.0), tl.load(pairs + 1, mask=exists, other=0.0)
    else:
        lse = load_vector(lse_ptr, sequence, m, SPEC)
    return lse


@triton.jit
def store_queries(x, index, m, value, SPEC: tl.constexpr):
    pointers, exists = _pointers(x, index, m, SPEC, SPEC.HEADS)
    tl.store(pointers, round_to(value, x[0].dtype.element_ty), mask=exists)


@triton.jit
def store_keys(x, index, n, value, SPEC: tl.constexpr):
    pointers, exists = _pointers(x, index, n, SPEC, 1)
    tl.store(pointers, round_to(value, x[0].dtype.element_ty), mask=exists)


# --- q and k as they are multiplied: of cosines every row has a length ------------------------------------------------

# A scale is a number; of cosines, when that is 1, one for each head (heads,), or None; and where their gradients, those
# of each query (B, T, heads, N), go.
# 1e-12 is the shortest vector that F.normalize makes long.
_SHORTEST = tl.constexpr(1e-24)


@triton.jit
def _length(scale, index):
    """Of the queries of a head."""
    return tl.load(scale[1] + index[2]).to(tl.float32)


@triton.jit
def _with_length(x, length):
    """Rows x [rows, HEAD_DIM] of this length, in x's dtype; rows of zeros stay."""
    wide = x.to(tl.float32)
    # An exact root or quotient takes registers that keys on chip want.
    factor = length * tl.rsqrt(tl.maximum(tl.sum(wide * wide, 1), _SHORTEST))
    return round_to(wide * factor[:, None], x.dtype)


@triton.jit
def _length_gradients(x, dy, length):
    """Of _with_length, whose result has the gradient dy: those of x [rows, HEAD_DIM] and of the length [rows]."""
    wide = x.to(tl.float32)
    squares = tl.sum(wide * wide, 1)
    factor = tl.rsqrt(tl.maximum(squares, _SHORTEST))
    unit = wide * factor[:, None]
    along = tl.sum(unit * dy, 1)
    kept = tl.where(squares > _SHORTEST, along, 0.0)  # a shorter x is divided by a constant
    return (dy - unit * kept[:, None]) * (length * factor)[:, None], along


@triton.jit
def scaled_queries(x, index, m, scale, SPEC: tl.constexpr):
    """load_queries of what is multiplied by keys."""
    query = load_queries(x, index, m, SPEC)
    if scale[1] is not None:
        query = _with_length(query, _length(scale, index))
    return query


@triton.jit
def scaled_keys(x, index, n, scale, SPEC: tl.constexpr):
    """load_keys of what is multiplied by queries."""
    key = load_keys(x, index, n, SPEC)
    if scale[1] is not None:
        key = _with_length(key, 1.0)
    return key


@triton.jit
def store_dqueries(dx, x, index, sequence, m, dquery, scale, SPEC: tl.constexpr):
    """Store the gradient of x at queries m, which scaled_queries gave, and that of their length."""
    if scale[1] is not None:
        dquery, dlength = _length_gradients(load_queries(x, index, m, SPEC), dquery, _length(scale, index))
        # A number each: their sum here, of a vector in tensor memory's layout, Triton 3.7 does not compile for sm_100.
        tl.store(scale[2] + sequence * SPEC.N + m, dlength, mask=m < SPEC.N)
    else:
        dquery *= scale[0]
    store_queries(dx, index, m, dquery, SPEC)


@triton.jit
def store_dkeys(dx, x, index, n, dkey, scale, SPEC: tl.constexpr):
    """Store the gradient of x at keys n, which scaled_keys gave."""
    if scale[1] is not None:
        dkey, _ = _length_gradients(load_keys(x, index, n, SPEC), dkey, 1.0)
    else:
        dkey *= scale[0]
    store_keys(dx, index, n, dkey, SPEC)


# --- scores and softmax -----------------------------------------------------------------------------------------------


@triton.jit
def _bounded(x):
    """What is added to scores; numbers not below a bound that is finite over any folded scale.

    -inf takes a key away, the most negative number does not: a row of nothing else has the mean of its keys.
    """
    LARGE: tl.constexpr = 1e30
    return tl.where(x == float("-inf"), x, tl.maximum(x, -LARGE, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def scores(q, k, index, m, n, addends, scale, SPEC: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] of q [BLOCK_M, HEAD_DIM] and k [BLOCK_N, HEAD_DIM] but for a factor, and that factor.

    They are ``scale[0] * q @ k^T + bias[head] + mask[t % groups]``, and -inf beyond the last key. addends are bias
    ``(heads, N, N)`` or None, mask ``(groups, N, N)``, bool as uint8, or None, and groups. Instead of a mask, with
    REGIONS, there is Swin's, compared here.

    With FOLD_SCALE the scale is left to the exponent, where it is free (a fused multiply-add) and the largest score
    stays the largest; bias and mask, divided by the scale, start the accumulator. Added afterwards, they would drag the
    softmax out of the accumulator's layout into that of their loads.
    """
    N: tl.constexpr = SPEC.N
    bias_ptr, mask_ptr, groups = addends
    scale = scale[0]
    _, t, head, cut = index
    token = m if SPEC.HEADS == 1 else m % N
    exists = (m < SPEC.HEADS * N)[:, None] & (n < N)[None, :]
    added = tl.zeros([m.shape[0], n.shape[0]], tl.float32)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        # Rows of stacked heads follow each other in bias as they do here.
        bias = bias_ptr + head * (N * N) + m[:, None] * N + n[None, :]
        added += tl.load(bias, mask=exists, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        mask = mask_ptr + t % groups * (N * N) + token[:, None] * N + n[None, :]
        mask = tl.load(mask, mask=exists, other=1)
        added = tl.where(mask != 0, added, float("-inf")) if mask.dtype == tl.uint8 else added + mask.to(tl.float32)
    if SPEC.REGIONS:
        of_queries, of_keys = regions(cut, t, token, SPEC.WIDTH), regions(cut, t, n, SPEC.WIDTH)
        added += tl.where(of_queries[:, None] != of_keys[None, :], -100.0, 0.0)
    if SPEC.ADDS:
        added = _bounded(added)
    if SPEC.FOLD_SCALE:
        s = dot(q, tl.trans(k), added * (1.0 / scale) if SPEC.ADDS else None, SPEC.TF32)
        factor = scale
    else:
        s = dot(q, tl.trans(k), None, SPEC.TF32) * scale + added
        factor = 1.0
    return tl.where((n < N)[None, :], s, float("-inf")), factor


@triton.jit
def exp_scores(s, factor, shift, dtype: tl.constexpr, SPEC: tl.constexpr):
    """``exp(s * factor - shift)`` [BLOCK_M, BLOCK_N] of scores s and a shift [BLOCK_M] for every row.

    With ADDS the shift is in the unit of s, ``exp((s - shift) * factor)``: what is added can be so large that its
    products with the factor would round to numbers far apart, where its differences are exact.
    """
    if SPEC.ADDS:
        exponent = (s - shift[:, None]) * (factor * LOG2E)
    elif dtype == tl.float32:
        # The difference is small where it matters; the product of each side with LOG2E would be rounded at full size.
        exponent = fma(s, factor, -shift[:, None]) * LOG2E
    else:
        exponent = fma(s, factor * LOG2E, -(shift * LOG2E)[:, None])
    return tl.exp2(exponent)


@triton.jit
def softmax_weights(s, factor, lse, dtype: tl.constexpr, SPEC: tl.constexpr):
    """The softmax [BLOCK_M, BLOCK_N] of scores s, from what load_lse gave for its rows."""
    if SPEC.ADDS:
        row_max, log_sum = lse
        weights = tl.exp2(fma(s - row_max[:, None], factor * LOG2E, -(log_sum * LOG2E)[:, None]))
    else:
        weights = exp_scores(s, factor, lse, dtype, SPEC)
    return weights


@triton.jit
def online_softmax_update(s, factor, row_max, row_sum, dtype: tl.constexpr, SPEC: tl.constexpr):
    """The next tile s of scores: p [BLOCK_M, BLOCK_N], alpha that rescales what was summed before, row_max, row_sum."""
    unit = factor if SPEC.ADDS else 1.0  # of row_max, as exp_scores takes its shift
    new_max = tl.maximum(row_max, tl.max(s, 1) if SPEC.ADDS else tl.max(s, 1) * factor)  # [BLOCK_M]
    # While a row has nothing but -inf, any finite shift will do; if that stays so, its sum is 0 at the end.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = exp_scores(s, factor, shift, dtype, SPEC)
    alpha = tl.exp2((row_max - shift) * (unit * LOG2E))
    return p, alpha, new_max, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def store_attention(out, lse_ptr, sequence, index, m, acc, row_max, row_sum, SPEC: tl.constexpr):
    """out and lse of queries m from the softmax's statistics and acc, the values weighted by exp(score - row_max).

    With ADDS row_max and log(row_sum) are kept apart, since their sum may not have the digits for both. A row without a
    key, whose sum is 0, gives zeros, and inf for its maximum: all that the backward makes of it is 0.
    """
    exists = m < SPEC.HEADS * SPEC.N
    if SPEC.ADDS:
        row_max = tl.where(row_sum == 0.0, float("inf"), row_max)
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        pairs = _pair(lse_ptr, sequence, m, SPEC)
        tl.store(pairs, row_max, mask=exists)
        tl.store(pairs + 1, tl.log2(row_sum) * LN2, mask=exists)
    else:
        tl.store(lse_ptr + sequence * (SPEC.HEADS * SPEC.N) + m, row_max + tl.log2(row_sum) * LN2, mask=exists)
    store_queries(out, index, m, acc * (1.0 / row_sum)[:, None], SPEC)


@triton.jit
def row_dot(a, b):
    """Dot products [BLOCK_M] of the rows of a and b [BLOCK_M, HEAD_DIM], float32."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
