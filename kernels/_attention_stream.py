"""Attention's kernels where neither side of a sequence fits on chip: both go by in tiles.

Maths and floor as in block_attention, but the backward computes the scores twice, for dq and for dk and dv.
Tiling: a program of the forward or of dq has BLOCK_M queries and keys stream by, in the forward under an online
softmax; one of dk and dv has BLOCK_N keys and queries stream by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nest_fast.kernels._attention import (
    load_keys,
    load_lse,
    load_queries,
    load_vector,
    online_softmax_update,
    program_index,
    row_dot,
    scaled_keys,
    scaled_queries,
    scores,
    softmax_weights,
    store_attention,
    store_dkeys,
    store_dqueries,
    store_keys,
)
from nest_fast.kernels._primitives import dot, round_to

__all__ = [
    "block_attention_dkv_stream_kernel",
    "block_attention_dq_stream_kernel",
    "block_attention_fwd_stream_kernel",
]


@triton.jit
def block_attention_fwd_stream_kernel(
    qkv,  # three Views; k and v have one head or q's
    out,  # View
    lse_ptr,  # (B, T, heads, N) float32, or (B, T, heads, N, 2) with addends
    addends,  # bias (heads, N, N) or None; mask (groups, N, N) or None; groups
    scale,  # as in _attention
    blocks,  # T; sequences of a block; the cut of an image into blocks, or None
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a tile of BLOCK_M queries. Keys stream by under an online softmax, where they do not fit on chip."""
    M_TILES: tl.constexpr = triton.cdiv(SPEC.HEADS * SPEC.N, BLOCK_M)
    T, per_block, cut = blocks
    q, k, v = qkv
    b, t, program = program_index(per_block * M_TILES, T)
    index = (b, t, program // M_TILES * SPEC.HEADS, cut)
    sequence = (tl.program_id(0) // M_TILES).to(tl.int64)
    m = (program % M_TILES).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = scaled_queries(q, index, m, scale, SPEC)  # [BLOCK_M, HEAD_DIM]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros(query.shape, tl.float32)  # [BLOCK_M, HEAD_DIM]
    for start in range(0, SPEC.N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = scaled_keys(k, index, n, scale, SPEC)  # [BLOCK_N, HEAD_DIM]
        s, factor = scores(query, key, index, m, n, addends, scale, SPEC)
        p, alpha, row_max, row_sum = online_softmax_update(s, factor, row_max, row_sum, query.dtype, SPEC)
        acc = dot(round_to(p, query.dtype), load_keys(v, index, n, SPEC), acc * alpha[:, None], SPEC.TF32)
    store_attention(out, lse_ptr, sequence, index, m, acc, row_max, row_sum, SPEC)


@triton.jit
def block_attention_dq_stream_kernel(
    dout,  # View
    qkv,  # three Views; k and v have one head or q's
    out,  # View
    statistics,  # lse as above; delta = rowsum(dout * out), (B, T, heads, N) float32, which is written
    dq,  # View
    addends,  # as above
    scale,
    blocks,  # as above
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dq and delta of a tile of BLOCK_M queries. Keys stream by."""
    M_TILES: tl.constexpr = triton.cdiv(SPEC.HEADS * SPEC.N, BLOCK_M)
    T, per_block, cut = blocks
    q, k, v = qkv
    lse_ptr, delta_ptr = statistics
    b, t, program = program_index(per_block * M_TILES, T)
    index = (b, t, program // M_TILES * SPEC.HEADS, cut)
    m = (program % M_TILES).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    sequence = (tl.program_id(0) // M_TILES).to(tl.int64)
    query = scaled_queries(q, index, m, scale, SPEC)  # [BLOCK_M, HEAD_DIM]
    d = load_queries(dout, index, m, SPEC)
    delta = row_dot(d, load_queries(out, index, m, SPEC))  # [BLOCK_M]
    tl.store(delta_ptr + sequence * (SPEC.HEADS * SPEC.N) + m, delta, mask=m < SPEC.HEADS * SPEC.N)
    lse = load_lse(lse_ptr, sequence, m, SPEC)
    acc = tl.zeros(query.shape, tl.float32)  # [BLOCK_M, HEAD_DIM]
    for start in range(0, SPEC.N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = scaled_keys(k, index, n, scale, SPEC)  # [BLOCK_N, HEAD_DIM]
        s, factor = scores(query, key, index, m, n, addends, scale, SPEC)  # [BLOCK_M, BLOCK_N]
        dp = dot(d, tl.trans(load_keys(v, index, n, SPEC)), None, SPEC.TF32)
        ds = softmax_weights(s, factor, lse, key.dtype, SPEC) * (dp - delta[:, None])
        acc = dot(round_to(ds, key.dtype), key, acc, SPEC.TF32)
    store_dqueries(dq, q, index, sequence, m, acc, scale, SPEC)


@triton.jit
def block_attention_dkv_stream_kernel(
    dout,  # View
    qkv,  # three Views; k and v have one head or q's
    statistics,  # lse and delta as above
    grads,  # Views of dk, dv
    addends,  # as above
    scale,
    blocks,  # as above
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dk and dv of a tile of BLOCK_N keys. Queries stream by."""
    N_TILES: tl.constexpr = triton.cdiv(SPEC.N, BLOCK_N)
    T, per_block, cut = blocks
    q, k, v = qkv
    lse_ptr, delta_ptr = statistics
    dk, dv = grads
    b, t, program = program_index(per_block * N_TILES, T)
    index = (b, t, program // N_TILES * SPEC.HEADS, cut)
    n = (program % N_TILES).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    sequence = (tl.program_id(0) // N_TILES).to(tl.int64)
    key = scaled_keys(k, index, n, scale, SPEC)  # [BLOCK_N, HEAD_DIM]
    value = load_keys(v, index, n, SPEC)
    dkey = tl.zeros(key.shape, tl.float32)
    dvalue = tl.zeros(key.shape, tl.float32)
    for start in range(0, SPEC.HEADS * SPEC.N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        query = scaled_queries(q, index, m, scale, SPEC)  # [BLOCK_M, HEAD_DIM]
        d = load_queries(dout, index, m, SPEC)
        lse = load_lse(lse_ptr, sequence, m, SPEC)  # [BLOCK_M]
        delta = load_vector(delta_ptr, sequence, m, SPEC)
        s, factor = scores(query, key, index, m, n, addends, scale, SPEC)  # [BLOCK_M, BLOCK_N]
        p = tl.where((m < SPEC.HEADS * SPEC.N)[:, None], softmax_weights(s, factor, lse, key.dtype, SPEC), 0.0)
        dvalue = dot(tl.trans(round_to(p, key.dtype)), d, dvalue, SPEC.TF32)
        dp = dot(d, tl.trans(value), None, SPEC.TF32)
        dkey = dot(tl.trans(round_to(p * (dp - delta[:, None]), key.dtype)), query, dkey, SPEC.TF32)
    store_dkeys(dk, k, index, n, dkey, scale, SPEC)
    store_keys(dv, index, n, dvalue, SPEC)
