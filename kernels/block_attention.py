"""Block-local attention in Triton, forward and backward: a block's keys fit on chip, so no online softmax.

Maths: out = softmax(S) v, S = scale q k^T + bias + mask; dv = P^T dout, dS = P (dout v^T - delta), delta = rowsum(dout
out), dq = scale dS k, dk = scale dS^T q, dbias = sum over blocks of dS. Floor of a sequence (a block under one head, at
most 256 tokens) in half precision: 4 N^2 HEAD_DIM FLOP and 8 N HEAD_DIM bytes forward, 10 and 16 backward.
Tiling: the forward holds a sequence's keys and values and softmaxes a tile of BLOCK_M queries at once; the backward
holds the queries and walks over tiles of BLOCK_N keys, so that one pass gives dq, dk and dv. 196 is no power of two, so
both sides are cut into powers of two that cover N with little to spare. What does not fit on chip streams
by (_attention_stream). Blocks may be the windows of an image, whose tokens are read and written where they are in it
(_windows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.kernels._attention import (
    exp_scores,
    load_keys,
    load_lse,
    load_queries,
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
from nest_fast.kernels._attention_operands import addends, dense, kinds, operands, problem, scales_of, sum_pads, view
from nest_fast.kernels._attention_stream import (
    block_attention_dkv_stream_kernel,
    block_attention_dq_stream_kernel,
    block_attention_fwd_stream_kernel,
)
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, dot, piece, pieces, round_to, tiles_and_tail

__all__ = ["MAX_HEAD_DIM", "MAX_SEQ", "block_attention_bwd", "block_attention_fwd"]

MAX_SEQ = 256
MAX_HEAD_DIM = 128

# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    start, BLOCK_M: tl.constexpr, q, keys, values, out, lse_ptr, index, addends, scale,
    SPEC: tl.constexpr, KEY_PIECES: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries from start on, over keys and values that are on chip: all scores at once."""
    m = start + tl.arange(0, BLOCK_M)
    query = scaled_queries(q, index, m, scale, SPEC)  # [BLOCK_M, HEAD_DIM]
    all_scores = ()
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in tl.static_range(len(KEY_PIECES)):
        s, factor = scores(query, keys[i], index, m, piece(KEY_PIECES, i), addends, scale, SPEC)  # [BLOCK_M, size]
        row_max = tl.maximum(row_max, tl.max(s, 1))
        all_scores += (s,)
    if SPEC.ADDS:
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # of a row without a key: any finite one will do
    else:
        row_max *= factor
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros(query.shape, tl.float32)  # [BLOCK_M, HEAD_DIM]
    for i in tl.static_range(len(KEY_PIECES)):
        # Masking keys again lets the compiler drop exponentials of keys that never exist.
        p = exp_scores(all_scores[i], factor, row_max, query.dtype, SPEC)  # [BLOCK_M, size]
        p = tl.where((piece(KEY_PIECES, i) < SPEC.N)[None, :], p, 0.0)
        row_sum += tl.sum(p, 1)
        acc = dot(round_to(p, query.dtype), values[i], acc, SPEC.TF32)
    store_attention(out, lse_ptr, tl.program_id(0).to(tl.int64), index, m, acc, row_max, row_sum, SPEC)


@triton.jit
def _block_attention_fwd_kernel(
    qkv,  # three Views; k and v have one head or q's
    out,  # View
    lse_ptr,  # (B, T, heads, N) float32, or (B, T, heads, N, 2) with addends
    addends,  # bias (heads, N, N) or None; mask (groups, N, N) or None; groups
    scale,  # as in _attention
    blocks,  # T; programs for a block, of HEADS heads each; the cut of an image into blocks, or None
    SPEC: tl.constexpr,
    KEY_PIECES: tl.constexpr,  # (start, size) of each
    BLOCK_M: tl.constexpr,
    M_TILES: tl.constexpr,  # whole tiles of BLOCK_M queries, and the size of a last shorter one or 0
):
    """One program: HEADS heads of a block. Keys and values stay, queries go by."""
    T, per_block, cut = blocks
    q, k, v = qkv
    b, t, program = program_index(per_block, T)
    index = (b, t, program * SPEC.HEADS, cut)
    keys = ()
    values = ()
    for i in tl.static_range(len(KEY_PIECES)):
        n = piece(KEY_PIECES, i)
        keys += (scaled_keys(k, index, n, scale, SPEC),)  # [size, HEAD_DIM]
        values += (load_keys(v, index, n, SPEC),)
    # The short tile goes first: after the loop, its copy of keys and values would have to live through it.
    if M_TILES[1]:
        start = M_TILES[0] * BLOCK_M
        _attend(start, M_TILES[1], q, keys, values, out, lse_ptr, index, addends, scale, SPEC, KEY_PIECES)
    for i in range(M_TILES[0]):
        _attend(i * BLOCK_M, BLOCK_M, q, keys, values, out, lse_ptr, index, addends, scale, SPEC, KEY_PIECES)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of_keys(
    start, BLOCK_N: tl.constexpr, held, dqs, kv, dkv, index, addends, scale,
    SPEC: tl.constexpr, QUERY_PIECES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys from start on, for what is on chip; returns dqs with their part added."""
    queries, douts, lses, deltas = held  # a tile [size, HEAD_DIM] or vector [size] for every piece
    k, v = kv
    dk, dv = dkv
    n = start + tl.arange(0, BLOCK_N)
    key = scaled_keys(k, index, n, scale, SPEC)  # [BLOCK_N, HEAD_DIM]
    value = load_keys(v, index, n, SPEC)
    dkey = tl.zeros(key.shape, tl.float32)  # [BLOCK_N, HEAD_DIM]
    dvalue = tl.zeros(key.shape, tl.float32)
    new_dqs = ()
    for i in tl.static_range(len(QUERY_PIECES)):
        m = piece(QUERY_PIECES, i)
        s, factor = scores(queries[i], key, index, m, n, addends, scale, SPEC)  # [size, BLOCK_N]
        # Masking queries again lets the compiler drop exponentials of queries that never exist.
        p = tl.where((m < SPEC.HEADS * SPEC.N)[:, None], softmax_weights(s, factor, lses[i], key.dtype, SPEC), 0.0)
        dvalue = dot(tl.trans(round_to(p, key.dtype)), douts[i], dvalue, SPEC.TF32)
        dp = dot(douts[i], tl.trans(value), None, SPEC.TF32)  # [size, BLOCK_N]
        ds = round_to(p * (dp - deltas[i][:, None]), key.dtype)
        dkey = dot(tl.trans(ds), queries[i], dkey, SPEC.TF32)
        new_dqs += (dot(ds, key, dqs[i], SPEC.TF32),)
    store_dkeys(dk, k, index, n, dkey, scale, SPEC)
    store_keys(dv, index, n, dvalue, SPEC)
    return new_dqs


@triton.jit
def _block_attention_bwd_kernel(
    dout,  # View
    qkv,  # three Views; k and v have one head or q's
    out,  # View
    lse_ptr,  # (B, T, heads, N) float32, or (B, T, heads, N, 2) with addends
    grads,  # Views of dq, dk, dv
    addends,  # as above
    scale,
    blocks,  # as above
    SPEC: tl.constexpr,
    QUERY_PIECES: tl.constexpr,  # (start, size) of each
    BLOCK_N: tl.constexpr,
    N_TILES: tl.constexpr,  # whole tiles of BLOCK_N keys, and the size of a last shorter one or 0
):
    """One program: HEADS heads of a block. Queries stay, keys and values go by."""
    T, per_block, cut = blocks
    q, k, v = qkv
    dq, dk, dv = grads
    b, t, program = program_index(per_block, T)
    index = (b, t, program * SPEC.HEADS, cut)
    queries = ()
    douts = ()
    lses = ()
    deltas = ()
    dqs = ()
    for i in tl.static_range(len(QUERY_PIECES)):
        m = piece(QUERY_PIECES, i)
        d = load_queries(dout, index, m, SPEC)  # [size, HEAD_DIM]
        deltas += (row_dot(d, load_queries(out, index, m, SPEC)),)  # [size]
        lses += (load_lse(lse_ptr, tl.program_id(0).to(tl.int64), m, SPEC),)
        queries += (scaled_queries(q, index, m, scale, SPEC),)
        douts += (d,)
        dqs += (tl.zeros(d.shape, tl.float32),)
    held = (queries, douts, lses, deltas)
    if N_TILES[1]:  # first, as in the forward
        start = N_TILES[0] * BLOCK_N
        dqs = _tile_of_keys(
            start, N_TILES[1], held, dqs, (k, v), (dk, dv), index, addends, scale, SPEC, QUERY_PIECES
        )  # fmt: skip
    for i in range(N_TILES[0]):
        dqs = _tile_of_keys(
            i * BLOCK_N, BLOCK_N, held, dqs, (k, v), (dk, dv), index, addends, scale, SPEC, QUERY_PIECES
        )  # fmt: skip
    for i in tl.static_range(len(QUERY_PIECES)):
        m = piece(QUERY_PIECES, i)
        store_dqueries(dq, q, index, tl.program_id(0).to(tl.int64), m, dqs[i], scale, SPEC)


@triton.jit(do_not_specialize=["blocks", "splits"])
def _block_attention_dbias_kernel(
    dout,  # View
    qkv,  # three Views; k and v have q's heads
    out,  # View
    lse_ptr,  # (B, T, heads, N) float32, or (B, T, heads, N, 2) with addends
    dbias_ptr,  # (splits, heads, N, N) float32
    addends,  # as above
    scale,
    sizes,  # T, heads, and the cut of an image
    blocks,  # B * T
    splits,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dS of a tile of BLOCK_M queries by BLOCK_N keys under a head, summed over every splits-th block."""
    N: tl.constexpr = SPEC.N
    M_TILES: tl.constexpr = triton.cdiv(N, BLOCK_M)
    N_TILES: tl.constexpr = triton.cdiv(N, BLOCK_N)
    T, heads, cut = sizes
    q, k, v = qkv
    pid = tl.program_id(0)
    head = (pid // (M_TILES * N_TILES) % heads).to(tl.int64)
    split = (pid // (M_TILES * N_TILES) // heads).to(tl.int64)
    m = pid // N_TILES % M_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split, blocks, splits):
        index = (block // T, block % T, head, cut)
        query, key = scaled_queries(q, index, m, scale, SPEC), scaled_keys(k, index, n, scale, SPEC)
        s, factor = scores(query, key, index, m, n, addends, scale, SPEC)
        lse = load_lse(lse_ptr, block * heads + head, m, SPEC)
        p = softmax_weights(s, factor, lse, key.dtype, SPEC)  # [BLOCK_M, BLOCK_N]
        d = load_queries(dout, index, m, SPEC)  # [BLOCK_M, HEAD_DIM]
        dp = dot(d, tl.trans(load_keys(v, index, n, SPEC)), None, SPEC.TF32)
        acc += p * (dp - row_dot(d, load_queries(out, index, m, SPEC))[:, None])
    offsets = (split * heads + head) * (N * N) + m[:, None] * N + n[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(dbias_ptr + offsets, acc, mask=(m < N)[:, None] & (n < N)[None, :])


# --- launchers --------------------------------------------------------------------------------------------------------


def _options(config: _configs.AttentionConfig) -> dict[str, int]:
    """What the compiler is told."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _pieces(length: int, largest: int) -> tuple[tuple[int, int], ...]:
    """Pieces that cover a side that stays on chip: 196 → 128 + 64 + 16."""
    tile = min(64, largest)
    whole, tail = tiles_and_tail(length, tile)
    return pieces(whole * tile + tail, largest)


def block_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    scales: Tensor | None = None,
    windows: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q @ k^T + bias + mask) @ v`` inside each block and head. Checks nothing.

    Args:
        q: ``(B, T, N, heads, head_dim)``, float32, float16 or bfloat16, head_dim up to MAX_HEAD_DIM; more tokens than
            MAX_SEQ stream by; any strides, but a last dimension that is not dense is copied. With ``windows``
            ``(B, 1, H * W, heads, head_dim)``, an image, T and N being those of its windows.
        k, v: as q, or with one head.
        bias: ``(heads, N, N)``, floating point, added to the scores of every block.
        mask: ``(groups, N, N)``, groups dividing T: block t takes ``mask[t % groups]``, added to the scores or, if
            bool, keeping those that are true. A row that keeps no key, or has -inf for every one, gives zeros.
        scale: factor of ``q @ k^T``.
        pad_k, pad_v: ``(1 or pads, heads or 1, head_dim)``, what k and v are where windows reach beyond the image, row
            by row of the padded image, or for all of it; zeros if None.
        scales: ``(heads,)``, factors of the cosines of q and k; ``scale`` is 1 then.
        windows: the numbers of ``nest_fast.windows``; none, or all of them 0, for blocks. Windows that are shifted have
            Swin's mask where ``mask`` is None.

    Returns:
        ``out``, contiguous, shape and dtype of q; ``lse`` float32, for the backward: ``(B, T, heads, N)``, the natural
        logarithm of the softmax denominators, or with a bias or mask ``(B, T, heads, N, 2)``, a row's largest score in
        the kernel's unit (inf where there is no key) and the logarithm of its sum beside that.
    """
    # Of cosines a program has one head, and its scale.
    given = problem(q, k if scales is None else k.expand_as(q), bias, mask, scale, windows)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(given.lse, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    spec, programs, added = given.spec, given.programs, addends(bias, mask)
    qkv = operands(given, q, k, v, pad_k, pad_v)
    args = (qkv, view(out), lse, added, scales_of(scale, scales), given.blocks)

    def run(config, start):
        if config.resident == "keys":
            start(
                _block_attention_fwd_kernel, programs, *args,
                SPEC=spec, KEY_PIECES=_pieces(given.N, config.block_n), BLOCK_M=config.block_m,
                M_TILES=tiles_and_tail(given.queries, config.block_m), **_options(config),
            )  # fmt: skip
        else:
            start(
                block_attention_fwd_stream_kernel, programs * cdiv(given.queries, config.block_m), *args,
                SPEC=spec, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **_options(config),
            )  # fmt: skip

    shape = ("fwd", spec, q.dtype, *kinds(added, scales, qkv[1]))
    launch(_configs.attention, shape, q, run)
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
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    windows: Sequence[int] = (),
    need_dpads: bool = False,
    scales: Tensor | None = None,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of block_attention_fwd. No atomics: the same input gives the same bits.

    Args:
        dout: shape and dtype of out, any strides.
        q, k, v, bias, mask, scale, pad_k, pad_v, windows, scales: as the forward took them, but of cosines k has q's
            heads; out, lse: as it returned them.
        need_dbias: whether to compute the gradient of bias (a kernel of its own, which reads everything again).
        need_dpads: whether to compute those of pad_k and pad_v.
        grads: tensors to write dq, dk and dv into, such as views of one packed gradient; last dimensions dense.

    Returns:
        dq, dk, dv (contiguous unless given), dbias, contiguous and in bias's dtype, or None, the gradients of pad_k and
        pad_v one behind the other ``(2, 1 or pads, heads or 1, head_dim)``, or None, and that of scales, float32, or
        None.
    """
    given = problem(q, k, bias, mask, scale, windows)
    dq, dk, dv = grads or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = torch.zeros_like(bias) if need_dbias and bias is not None else None
    dpads = pad_k.new_zeros((2, *pad_k.shape)) if need_dpads and pad_k is not None else None
    if q.numel() == 0:
        return dq, dk, dv, dbias, dpads, None if scales is None else scales.new_zeros(scales.shape, dtype=torch.float32)
    spec, programs, added = given.spec, given.programs, addends(bias, mask)
    qkv = operands(given, q, k, v, pad_k, pad_v)
    dout_view, out_view = view(dense(dout)), view(dense(out))
    padding = None  # the gradients of each token that is padding, which are summed afterwards
    if dpads is not None and given.pads:
        padding = k.new_empty((2, given.B, 1, given.pads, *k.shape[3:]))
    dkv = (view(dk), view(dv)) if padding is None else (view(dk, padding[0]), view(dv, padding[1]))
    # Of the gradient of a head's scale each query has a part.
    each = None if scales is None else torch.empty(given.lse[:4], dtype=torch.float32, device=q.device)
    rest = (added, scales_of(scale, scales, each), given.blocks)

    def run(config, start):
        if config.resident == "queries":
            start(
                _block_attention_bwd_kernel, programs,
                dout_view, qkv, out_view, lse, (view(dq), *dkv), *rest,
                SPEC=spec, QUERY_PIECES=_pieces(given.queries, config.block_m), BLOCK_N=config.block_n,
                N_TILES=tiles_and_tail(given.N, config.block_n), **_options(config),
            )  # fmt: skip
            return
        delta = torch.empty(given.lse[:4], dtype=torch.float32, device=q.device)
        constants = {"SPEC": spec, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **_options(config)}
        start(
            block_attention_dq_stream_kernel, programs * cdiv(given.queries, config.block_m),
            dout_view, qkv, out_view, (lse, delta), view(dq), *rest, **constants,
        )  # fmt: skip
        start(
            block_attention_dkv_stream_kernel, programs * cdiv(given.N, config.block_n),
            dout_view, qkv, (lse, delta), dkv, *rest, **constants,
        )  # fmt: skip

    launch(_configs.attention, ("bwd", spec, q.dtype, *kinds(added, scales, qkv[1], *dkv)), q, run)
    dscales = None if each is None else each.sum((0, 1, 3))
    if dpads is not None and padding is not None:
        dpads = sum_pads(padding, dpads)
    if dbias is None:
        return dq, dk, dv, None, dpads, dscales
    one_head = spec._replace(HEADS=1)

    def run_dbias(config, start):
        # The sum over all blocks in two stages: enough partial sums to fill a device, then theirs.
        blocks, N, heads = given.B * given.T, given.N, given.heads
        tiles_each = cdiv(N, config.block_m) * cdiv(N, config.block_n)
        splits = min(blocks, cdiv(1024, heads * tiles_each))
        partial = torch.empty((splits, heads, N, N), dtype=torch.float32, device=q.device)
        start(
            _block_attention_dbias_kernel, splits * heads * tiles_each,
            dout_view, qkv, out_view, lse, partial, added, scales_of(scale, scales),
            (given.T, heads, given.cut), blocks, splits,
            SPEC=one_head, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **_options(config),
        )  # fmt: skip
        return partial

    partial = launch(_configs.attention, ("dbias", one_head, q.dtype, *kinds(added, scales, qkv[1])), q, run_dbias)
    return dq, dk, dv, partial.sum(0).to(dbias.dtype), dpads, dscales
