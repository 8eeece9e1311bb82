"""Block-local attention in Triton, forward and backward: a block's keys fit on chip, so no online softmax.

A sequence is one block under one head, at most 256 tokens. The forward holds a sequence's keys and values and softmaxes
a tile of query rows at once; the backward holds the query rows and walks over tiles of keys, so that one pass gives dq,
dk and dv. 196 is no power of two, so both sides are cut into powers of two that cover N with little to spare. With one
key head (multi-query) a program may own all heads of a block, stacked as query rows over the same keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._primitives import LN2, LOG2E, dot, fma, round_to

__all__ = ["MAX_HEAD_DIM", "MAX_SEQ", "block_attention_bwd", "block_attention_fwd"]

MAX_SEQ = 256
MAX_HEAD_DIM = 128


class View(NamedTuple):
    """A ``(B, T, N, heads, head_dim)`` tensor whose last dimension is dense, and its other strides."""

    ptr: Tensor
    b: int
    t: int
    n: int
    h: int


class Score(NamedTuple):
    """What makes scores of ``q @ k^T``: ``scale * q @ k^T + bias[head] + mask[t % groups]``; bool masks as uint8."""

    bias: Tensor | None
    mask: Tensor | None
    groups: int
    scale: float


@triton.jit
def _own(per_block, T):
    """Batch, block of the image, and place inside the block of this program; 64-bit, since strides multiply them."""
    block = tl.program_id(0) // per_block
    return (block // T).to(tl.int64), (block % T).to(tl.int64), (tl.program_id(0) % per_block).to(tl.int64)


@triton.jit
def _tile(x, at, rows, N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    """Pointers (rows, head_dim padded to a power of two) into view x, and which exist.

    ``at`` is (batch, block, first of HEADS heads); row r is token r % N of the head r // N places on.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(max(D, 16))
    b, t, head = at
    offsets = rows.to(tl.int64) * x.n
    if HEADS > 1:
        offsets = (rows % N).to(tl.int64) * x.n + (rows // N).to(tl.int64) * x.h
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < HEADS * N)[:, None]
    if D < BLOCK_D:
        inside = inside & (columns < D)
    return x.ptr + b * x.b + t * x.t + head * x.h + offsets[:, None] + columns, inside


@triton.jit
def _load(x, at, rows, N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr = 1):
    pointers, inside = _tile(x, at, rows, N, D, HEADS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(x, at, rows, value, N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr = 1):
    pointers, inside = _tile(x, at, rows, N, D, HEADS)
    tl.store(pointers, round_to(value, x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    q, k, at, rows, cols, score, N: tl.constexpr, HEADS: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores (rows, cols) but for a factor, -inf beyond the last key, and that factor.

    With FOLD (a scale that is positive and not tiny) the scale is left to the exponent, where it is free (a fused
    multiply-add) and the largest score stays the largest; bias and mask, divided by the scale, start the accumulator.
    Added afterwards, they would drag the softmax out of the accumulator's layout into that of their loads.
    """
    ADDS: tl.constexpr = score.bias is not None or score.mask is not None
    _, t, head = at
    inside = (rows < HEADS * N)[:, None] & (cols < N)[None, :]
    added = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    if score.bias is not None:
        # Rows of stacked heads follow each other in bias as they do here.
        bias = score.bias + head * (N * N) + rows[:, None] * N + cols[None, :]
        added += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    if score.mask is not None:
        tokens = rows if HEADS == 1 else rows % N
        mask = score.mask + t % score.groups * (N * N) + tokens[:, None] * N + cols[None, :]
        mask = tl.load(mask, mask=inside, other=1)
        added = tl.where(mask != 0, added, float("-inf")) if mask.dtype == tl.uint8 else added + mask.to(tl.float32)
    if FOLD:
        s = dot(q, tl.trans(k), added * (1.0 / score.scale) if ADDS else None, PRECISION)
        factor = score.scale
    else:
        s = dot(q, tl.trans(k), None, PRECISION) * score.scale + added
        factor = 1.0
    return tl.where((cols < N)[None, :], s, float("-inf")), factor


@triton.jit
def _exp(s, factor, shift, dtype: tl.constexpr):
    """exp(s * factor - shift) of scores (rows, cols) and a shift for every row."""
    if dtype == tl.float32:
        # The difference is small where it matters; the product of each side with LOG2E would be rounded at full size.
        return tl.exp2(fma(s, factor, -shift[:, None]) * LOG2E)
    return tl.exp2(fma(s, factor * LOG2E, -(shift * LOG2E)[:, None]))


@triton.jit
def _finish(out, lse_ptr, at, rows, acc, top, total, N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    # A row whose keys are all masked gives zeros; its lse makes zeros of the backward's exponentials.
    masked = total == 0.0
    _store(out, at, rows, acc * tl.where(masked, 0.0, 1.0 / total)[:, None], N, D, HEADS)
    lse = tl.where(masked, float("inf"), top + tl.log2(total) * LN2)
    tl.store(lse_ptr + rows, lse, mask=rows < HEADS * N)


@triton.jit
def _attend(
    start, BLOCK: tl.constexpr, keys, values, q, out, lse_ptr, at, score,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of the BLOCK query rows from start on, over keys that are on chip: all scores at once."""
    rows = start + tl.arange(0, BLOCK)
    query = _load(q, at, rows, N, D, HEADS)
    scores = ()
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in tl.static_range(len(KEYS)):
        cols = KEYS[i][0] + tl.arange(0, KEYS[i][1])
        s, factor = _scores(query, keys[i], at, rows, cols, score, N, HEADS, FOLD, PRECISION)
        top = tl.maximum(top, tl.max(s, 1))
        scores += (s,)
    top *= factor
    top = tl.where(top == float("-inf"), 0.0, top)  # any finite shift will do where all is masked
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros(query.shape, tl.float32)
    for i in tl.static_range(len(KEYS)):
        cols = KEYS[i][0] + tl.arange(0, KEYS[i][1])
        # Said once more for columns, the mask lets the compiler drop exponentials of keys that never exist.
        p = tl.where((cols < N)[None, :], _exp(scores[i], factor, top, query.dtype), 0.0)
        total += tl.sum(p, 1)
        acc = dot(round_to(p, query.dtype), values[i], acc, PRECISION)
    _finish(out, lse_ptr, at, rows, acc, top, total, N, D, HEADS)


@triton.jit
def _block_attention_fwd_kernel(
    q, k, v, out, lse_ptr, score, T, per_block,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    TAIL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of a block, per_block programs a block.

    Keys come in the (start, size) pieces of KEYS and stay, query rows in FULL tiles of BLOCK and one of TAIL, if any.
    """
    b, t, place = _own(per_block, T)
    at = (b, t, place * HEADS)
    lse_ptr += tl.program_id(0).to(tl.int64) * (HEADS * N)
    keys = ()
    values = ()
    for i in tl.static_range(len(KEYS)):
        cols = KEYS[i][0] + tl.arange(0, KEYS[i][1])
        keys += (_load(k, at, cols, N, D),)
        values += (_load(v, at, cols, N, D),)
    # The short tile goes first: after the loop, its copy of keys and values would have to live through it.
    if TAIL:
        _attend(FULL * BLOCK, TAIL, keys, values, q, out, lse_ptr, at, score, N, D, HEADS, KEYS, FOLD, PRECISION)
    for i in range(FULL):
        _attend(i * BLOCK, BLOCK, keys, values, q, out, lse_ptr, at, score, N, D, HEADS, KEYS, FOLD, PRECISION)


@triton.jit
def _block_attention_fwd_stream_kernel(
    q, k, v, out, lse_ptr, score, T, per_block,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward where a sequence's keys and scores do not fit on chip: one tile of BLOCK query rows a program.

    Keys stream by in tiles of PIECE under an online softmax.
    """
    TILES: tl.constexpr = triton.cdiv(HEADS * N, BLOCK)
    b, t, place = _own(per_block * TILES, T)
    at = (b, t, place // TILES * HEADS)
    lse_ptr += (tl.program_id(0) // TILES).to(tl.int64) * (HEADS * N)
    rows = (place % TILES).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    query = _load(q, at, rows, N, D, HEADS)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros(query.shape, tl.float32)
    for start in range(0, N, PIECE):
        cols = start + tl.arange(0, PIECE)
        s, factor = _scores(query, _load(k, at, cols, N, D), at, rows, cols, score, N, HEADS, FOLD, PRECISION)
        # While a row has nothing but -inf, any finite shift will do; its total is 0 then.
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = _exp(s, factor, shift, query.dtype)
        shrink = tl.exp2((top - shift) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(round_to(p, query.dtype), _load(v, at, cols, N, D), acc * shrink[:, None], PRECISION)
        top = new_top
    _finish(out, lse_ptr, at, rows, acc, top, total, N, D, HEADS)


@triton.jit
def _delta(dout, out):
    return tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)


@triton.jit
def _gradients(
    start, BLOCK: tl.constexpr, queries, douts, lses, deltas, dqs, k, v, dk, dv, at, score,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the BLOCK keys from start on; returns dqs with their part added."""
    cols = start + tl.arange(0, BLOCK)
    key = _load(k, at, cols, N, D)
    value = _load(v, at, cols, N, D)
    dkey = tl.zeros(key.shape, tl.float32)
    dvalue = tl.zeros(key.shape, tl.float32)
    added = ()
    for i in tl.static_range(len(ROWS)):
        rows = ROWS[i][0] + tl.arange(0, ROWS[i][1])
        s, factor = _scores(queries[i], key, at, rows, cols, score, N, HEADS, FOLD, PRECISION)
        # Said once more for rows, the mask lets the compiler drop exponentials of rows that never exist.
        p = tl.where((rows < HEADS * N)[:, None], _exp(s, factor, lses[i], key.dtype), 0.0)
        dvalue = dot(tl.trans(round_to(p, key.dtype)), douts[i], dvalue, PRECISION)
        dp = dot(douts[i], tl.trans(value), None, PRECISION)
        ds = round_to(p * (dp - deltas[i][:, None]), key.dtype)
        dkey = dot(tl.trans(ds), queries[i], dkey, PRECISION)
        added += (dot(ds, key, dqs[i], PRECISION),)
    _store(dk, at, cols, dkey * score.scale, N, D)
    _store(dv, at, cols, dvalue, N, D)
    return added


@triton.jit
def _block_attention_bwd_kernel(
    dout, q, k, v, out, lse_ptr, dq, dk, dv, score, T, per_block,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, TAIL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of a block.

    Query rows come in the (start, size) pieces of ROWS and stay, keys in FULL tiles of BLOCK and one of TAIL.
    """
    b, t, place = _own(per_block, T)
    at = (b, t, place * HEADS)
    lse_ptr += tl.program_id(0).to(tl.int64) * (HEADS * N)
    queries = ()
    douts = ()
    lses = ()
    deltas = ()
    dqs = ()
    for i in tl.static_range(len(ROWS)):
        rows = ROWS[i][0] + tl.arange(0, ROWS[i][1])
        d = _load(dout, at, rows, N, D, HEADS)
        deltas += (_delta(d, _load(out, at, rows, N, D, HEADS)),)
        lses += (tl.load(lse_ptr + rows, mask=rows < HEADS * N, other=0.0),)
        queries += (_load(q, at, rows, N, D, HEADS),)
        douts += (d,)
        dqs += (tl.zeros(d.shape, tl.float32),)
    if TAIL:  # first, as in the forward
        dqs = _gradients(
            FULL * BLOCK, TAIL, queries, douts, lses, deltas, dqs, k, v, dk, dv, at, score,
            N, D, HEADS, ROWS, FOLD, PRECISION,
        )  # fmt: skip
    for i in range(FULL):
        dqs = _gradients(
            i * BLOCK, BLOCK, queries, douts, lses, deltas, dqs, k, v, dk, dv, at, score,
            N, D, HEADS, ROWS, FOLD, PRECISION,
        )  # fmt: skip
    for i in tl.static_range(len(ROWS)):
        rows = ROWS[i][0] + tl.arange(0, ROWS[i][1])
        _store(dq, at, rows, dqs[i] * score.scale, N, D, HEADS)


@triton.jit
def _block_attention_dq_stream_kernel(
    dout, q, k, v, out, lse_ptr, dq, delta_ptr, score, T, per_block,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq and delta = rowsum(dout * out) of a tile of BLOCK query rows; keys stream by."""
    TILES: tl.constexpr = triton.cdiv(HEADS * N, BLOCK)
    b, t, place = _own(per_block * TILES, T)
    at = (b, t, place // TILES * HEADS)
    rows = (place % TILES).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    sequence = (tl.program_id(0) // TILES).to(tl.int64) * (HEADS * N)
    query = _load(q, at, rows, N, D, HEADS)
    d = _load(dout, at, rows, N, D, HEADS)
    delta = _delta(d, _load(out, at, rows, N, D, HEADS))
    tl.store(delta_ptr + sequence + rows, delta, mask=rows < HEADS * N)
    lse = tl.load(lse_ptr + sequence + rows, mask=rows < HEADS * N, other=0.0)
    acc = tl.zeros(query.shape, tl.float32)
    for start in range(0, N, PIECE):
        cols = start + tl.arange(0, PIECE)
        key = _load(k, at, cols, N, D)
        s, factor = _scores(query, key, at, rows, cols, score, N, HEADS, FOLD, PRECISION)
        dp = dot(d, tl.trans(_load(v, at, cols, N, D)), None, PRECISION)
        ds = _exp(s, factor, lse, key.dtype) * (dp - delta[:, None])
        acc = dot(round_to(ds, key.dtype), key, acc, PRECISION)
    _store(dq, at, rows, acc * score.scale, N, D, HEADS)


@triton.jit
def _block_attention_dkv_stream_kernel(
    dout, q, k, v, lse_ptr, delta_ptr, dk, dv, score, T, per_block,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of a tile of PIECE keys; query rows stream by."""
    TILES: tl.constexpr = triton.cdiv(N, PIECE)
    b, t, place = _own(per_block * TILES, T)
    at = (b, t, place // TILES * HEADS)
    cols = (place % TILES).to(tl.int32) * PIECE + tl.arange(0, PIECE)
    sequence = (tl.program_id(0) // TILES).to(tl.int64) * (HEADS * N)
    key = _load(k, at, cols, N, D)
    value = _load(v, at, cols, N, D)
    dkey = tl.zeros(key.shape, tl.float32)
    dvalue = tl.zeros(key.shape, tl.float32)
    for start in range(0, HEADS * N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        query = _load(q, at, rows, N, D, HEADS)
        d = _load(dout, at, rows, N, D, HEADS)
        lse = tl.load(lse_ptr + sequence + rows, mask=rows < HEADS * N, other=0.0)
        delta = tl.load(delta_ptr + sequence + rows, mask=rows < HEADS * N, other=0.0)
        s, factor = _scores(query, key, at, rows, cols, score, N, HEADS, FOLD, PRECISION)
        p = tl.where((rows < HEADS * N)[:, None], _exp(s, factor, lse, key.dtype), 0.0)
        dvalue = dot(tl.trans(round_to(p, key.dtype)), d, dvalue, PRECISION)
        dp = dot(d, tl.trans(value), None, PRECISION)
        dkey = dot(tl.trans(round_to(p * (dp - delta[:, None]), key.dtype)), query, dkey, PRECISION)
    _store(dk, at, cols, dkey * score.scale, N, D)
    _store(dv, at, cols, dvalue, N, D)


@triton.jit
def _block_attention_dbias_kernel(
    dout, q, k, v, out, lse_ptr, dbias_ptr, score, T, heads, blocks,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the score gradients of a (BLOCK, BLOCK) tile of a head, summed over every SPLITS-th block."""
    TILES: tl.constexpr = triton.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    head = (pid // (TILES * TILES) % heads).to(tl.int64)
    split = (pid // (TILES * TILES) // heads).to(tl.int64)
    rows = pid // TILES % TILES * BLOCK + tl.arange(0, BLOCK)
    cols = pid % TILES * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(split, blocks, SPLITS):
        at = (block // T, block % T, head)
        key = _load(k, at, cols, N, D)
        s, factor = _scores(_load(q, at, rows, N, D), key, at, rows, cols, score, N, 1, FOLD, PRECISION)
        lse = tl.load(lse_ptr + (block * heads + head) * N + rows, mask=rows < N, other=0.0)
        p = _exp(s, factor, lse, key.dtype)
        d = _load(dout, at, rows, N, D)
        dp = dot(d, tl.trans(_load(v, at, cols, N, D)), None, PRECISION)
        acc += p * (dp - _delta(d, _load(out, at, rows, N, D))[:, None])
    place = (split * heads + head) * (N * N) + rows[:, None] * N + cols[None, :]
    tl.store(dbias_ptr + place, acc, mask=(rows < N)[:, None] & (cols < N)[None, :])


def _view(x: Tensor) -> View:
    b, t, n, h, _ = x.stride()
    return View(x, b, t, n, h)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _meta(q: Tensor, heads: int, bias: Tensor | None, mask: Tensor | None, scale: float) -> tuple[Score, dict]:
    """What all kernels are told: score, and the constants that do not depend on the configuration."""
    bias = None if bias is None else bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "ieee"
    meta = {"N": q.shape[2], "D": q.shape[4], "HEADS": heads, "FOLD": scale > 1e-6, "PRECISION": precision}
    return Score(bias, mask, 1 if mask is None else mask.shape[0], scale), meta


def _config(kernel: str, rows: int, q: Tensor, score: Score, meta: dict) -> _configs.AttentionConfig:
    """The launch configuration, no larger than the sequence; what every kernel takes of it goes into meta."""
    operands = meta["PRECISION"] if q.dtype == torch.float32 else "half"
    adds = score.bias is not None or score.mask is not None
    config = _configs.attention(kernel, rows, meta["N"], meta["D"], operands, adds, q.device)
    meta.update(BLOCK=config.block, num_warps=config.num_warps, num_stages=config.num_stages)
    return config


def _cut(n: int, tile: int) -> tuple[int, int]:
    """How many full tiles, and the power of two (at least 16, the smallest matrix tile) that covers the rest of n."""
    full, rest = divmod(n, tile)
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (full + 1, 0) if tail == tile else (full, tail)


def _pieces(n: int, largest: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of falling powers of two that cover n: 196 → 128 + 64 + 16."""
    tile = min(64, largest)
    full, tail = _cut(n, tile)
    left, start, pieces = full * tile + tail, 0, []
    while left:
        size = min(largest, 1 << (left.bit_length() - 1))
        pieces.append((start, size))
        start, left = start + size, left - size
    return tuple(pieces)


def block_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q @ k^T + bias + mask) @ v`` inside each block and head. Checks nothing.

    Args:
        q: ``(B, T, N, heads, head_dim)``, float32, float16 or bfloat16, N up to MAX_SEQ, head_dim up to MAX_HEAD_DIM;
            any strides, but a last dimension that is not dense is copied.
        k, v: as q, or with one head.
        bias: ``(heads, N, N)``, floating point, added to the scores of every block.
        mask: ``(groups, N, N)``, groups dividing T: block t takes ``mask[t % groups]``, added to the scores or, if
            bool, keeping those that are true. A row whose keys are all masked, by false or -inf, gives zeros.
        scale: factor of ``q @ k^T``.

    Returns:
        ``out``, contiguous, shape and dtype of q; ``lse`` ``(B, T, heads, N)`` float32, the natural logarithm of the
        softmax denominators, for the backward.
    """
    B, T, N, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, heads, N), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    heads_each = heads // k.shape[3]
    rows, programs = heads_each * N, B * T * k.shape[3]
    score, meta = _meta(q, heads_each, bias, mask, scale)
    q, k, v = (_dense(x) for x in (q, k.expand_as(q), v.expand_as(q)))
    args = (_view(q), _view(k), _view(v), _view(out), lse, score, T, heads // heads_each)
    config = _config("fwd", rows, q, score, meta)
    with torch.cuda.device_of(q):
        if config.stream:
            tiles = triton.cdiv(rows, config.block)
            _block_attention_fwd_stream_kernel[(programs * tiles,)](*args, PIECE=config.piece, **meta)
        else:
            full, tail = _cut(rows, config.block)
            keys = _pieces(N, config.piece)
            _block_attention_fwd_kernel[(programs,)](*args, KEYS=keys, FULL=full, TAIL=tail, **meta)
    return out, lse


def block_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_dbias: bool,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of block_attention_fwd. No atomics: the same input gives the same bits.

    Args:
        dout: shape and dtype of out, any strides.
        q, k, v, bias, mask, scale: as the forward took them; out, lse: as it returned them.
        need_dbias: whether to compute the gradient of bias (a kernel of its own, which reads everything again).
        grads: tensors to write dq, dk and dv into, such as views of one packed gradient; last dimensions dense.

    Returns:
        dq, dk, dv (contiguous unless given), and dbias, contiguous and in bias's dtype, or None.
    """
    B, T, N, heads, _ = q.shape
    dq, dk, dv = grads or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv, torch.zeros_like(bias) if need_dbias and bias is not None else None
    heads_each = heads // k.shape[3]
    rows, programs = heads_each * N, B * T * k.shape[3]
    score, meta = _meta(q, heads_each, bias, mask, scale)
    dout, q, k, v, out = (_dense(x) for x in (dout, q, k.expand_as(q), v.expand_as(q), out))
    inputs = (_view(dout), _view(q), _view(k), _view(v), _view(out), lse)
    rest = (score, T, heads // heads_each)
    config = _config("bwd", rows, q, score, meta)
    with torch.cuda.device_of(q):
        if config.stream:
            delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
            tiles = triton.cdiv(rows, config.block)
            _block_attention_dq_stream_kernel[(programs * tiles,)](
                *inputs, _view(dq), delta, *rest, PIECE=config.piece, **meta
            )
            tiles = triton.cdiv(N, config.piece)
            _block_attention_dkv_stream_kernel[(programs * tiles,)](
                *inputs[:4], lse, delta, _view(dk), _view(dv), *rest, PIECE=config.piece, **meta
            )
        else:
            full, tail = _cut(N, config.block)
            pieces = _pieces(rows, config.piece)
            _block_attention_bwd_kernel[(programs,)](
                *inputs, _view(dq), _view(dk), _view(dv), *rest, ROWS=pieces, FULL=full, TAIL=tail, **meta
            )
        dbias = _dbias(inputs, score, heads, meta).to(bias.dtype) if need_dbias and bias is not None else None
    return dq, dk, dv, dbias


def _dbias(inputs: tuple, score: Score, heads: int, meta: dict) -> Tensor:
    """The sum over all blocks in two stages: enough partial sums to fill a device, then theirs."""
    q = inputs[1].ptr
    B, T, N, _, _ = q.shape
    meta.pop("HEADS")
    config = _config("dbias", N, q, score, meta)
    tiles = triton.cdiv(N, config.block) ** 2
    splits = min(B * T, triton.cdiv(1024, heads * tiles))
    partial = torch.empty((splits, heads, N, N), dtype=torch.float32, device=q.device)
    _block_attention_dbias_kernel[(splits * heads * tiles,)](
        *inputs, partial, score, T, heads, B * T, SPLITS=splits, **meta
    )
    return partial.sum(0)
