"""Gradients of the MLP sub-layer in two Triton kernels, from its input alone.

With normed = layer_norm(x), h = fc1(normed) and d = scale dout: dh = (d W2) gelu'(h), dnormed = dh W1, dx = dout and
dnormed through the LayerNorm as add_layer_norm has it; dW1 = dh^T normed, dW2 = d^T gelu(h), and sums over rows.

Maths: both kernels make h and d W2 anew: 24 C^2 FLOP a row in the first and 32 C^2 in the second for 4 C hidden
features, where 32 C^2 in all would do with h and gelu(h) kept, 16 C bytes a row. Floor of a row in half precision: 8 C
bytes in the first, x and dout read, dx and normed written, or 10 C, with d where samples have factors of their own, and
4 C in the second.
Tiling: the first is tiled as the forward. In the second a program has TILE_H hidden features, whose rows of dW1 and
columns of dW2 stay in registers, and a stripe of the rows, TILE_ROWS at a time. Programs of one stripe read the same
rows, at about the same time: once from memory, the other times from the L2 cache. What each has is one term of a sum.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._gelu import gelu, gelu_derivative, gelu_of
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import (
    cdiv,
    channel_pieces,
    dot,
    load,
    load_row,
    next_power_of_2,
    piece,
    pieces,
    round_to,
    zeros,
)
from nest_fast.kernels._rows import (
    Linear,
    Norm,
    Scale,
    is_whole,
    layer_norm,
    load_rows,
    load_scaled,
    load_weight,
    own_rows,
    round_all,
    store_rows,
)
from nest_fast.kernels.mlp_layer import Spec, Tile

__all__ = ["mlp_layer_bwd"]


@triton.jit
def _through_mlp(normed, dbranch, fc1, fc2_ptr, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The gradient of normed in float32, all three [TILE_ROWS, size] for every piece of C."""
    PIECES: tl.constexpr = SPEC.PIECES
    HIDDEN: tl.constexpr = SPEC.HIDDEN
    GELU: tl.constexpr = SPEC.GELU
    ROWS: tl.constexpr = TILE.ROWS
    H: tl.constexpr = TILE.H
    COMPLETE: tl.constexpr = HIDDEN % H == 0
    dnormed = zeros(PIECES, ROWS)
    for start in tl.range(0, HIDDEN, H, num_stages=TILE.STAGES):
        h = start + tl.arange(0, H)  # [TILE_H]
        hidden = tl.zeros([ROWS, H], tl.float32)
        dhidden = tl.zeros([ROWS, H], tl.float32)
        w1, w2 = _load_features(fc1.weight, fc2_ptr, h, COMPLETE, SPEC)
        for n in tl.static_range(len(PIECES)):
            hidden = dot(normed[n], tl.trans(w1[n]), hidden, False)
            dhidden = dot(dbranch[n], w2[n], dhidden, False)
        if fc1.bias is not None:
            hidden += load_row(fc1.bias, h, HIDDEN)
        dhidden *= gelu_derivative(hidden, GELU)
        dnormed = _add_products(dnormed, dhidden, w1)
    return dnormed


@triton.jit
def _load_features(fc1_ptr, fc2_ptr, h, COMPLETE: tl.constexpr, SPEC: tl.constexpr):
    """fc1's rows h [TILE_H, size] and fc2's columns h [size, TILE_H] for every piece of C. COMPLETE: all exist."""
    C: tl.constexpr = SPEC.C
    PIECES: tl.constexpr = SPEC.PIECES
    w1 = ()
    w2 = ()
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        exists = (h < SPEC.HIDDEN)[:, None] & (c < C)[None, :]
        source = fc1_ptr + h[:, None] * C + c[None, :]
        w1 = w1 + (load_weight(source, exists, COMPLETE and is_whole(n, C, PIECES)),)
        exists = (c < C)[:, None] & (h < SPEC.HIDDEN)[None, :]
        source = fc2_ptr + c[:, None] * SPEC.HIDDEN + h[None, :]
        w2 = w2 + (load_weight(source, exists, COMPLETE and is_whole(n, C, PIECES)),)
    return w1, w2


@triton.jit(do_not_specialize=["rows"])
def _mlp_layer_bwd_rows_kernel(
    dout_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    norm,  # Norm
    fc1,  # Linear (HIDDEN, C)
    fc2_ptr,  # (C, HIDDEN)
    scale,  # Scale of what is added to x
    outs,  # dx, what is normalised, and dout times its Scale, (rows, C) or None each
    sums,  # over rows, float32 or None: of the LayerNorm (programs, 2, C), of fc2's bias (programs, C)
    rows,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_ROWS rows; sums, and is asked for dx, where gradients before fc1 are wanted."""
    C: tl.constexpr = SPEC.C
    PIECES: tl.constexpr = SPEC.PIECES
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    dx_ptr, normed_ptr, dbranch_ptr = outs
    norm_sums_ptr, bias_sums_ptr = sums
    first, m, exists = own_rows(rows, TILE.ROWS)
    x = load_rows(x_ptr + first * C, m, exists, C, PIECES)
    normed, mean, rstd = layer_norm(x, norm, C, PIECES, True)
    if normed_ptr is not None:
        store_rows(normed_ptr + first * C, normed, m, exists, C, PIECES)
    dbranch = load_scaled(dout_ptr, scale, first, m, exists, C, PIECES)
    if dbranch_ptr is not None:
        store_rows(dbranch_ptr + first * C, dbranch, m, exists, C, PIECES)
    if bias_sums_ptr is not None:
        for n in tl.static_range(len(PIECES)):
            c = piece(PIECES, n)
            tl.store(bias_sums_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(dbranch[n], 0), mask=c < C)
    if dx_ptr is not None:
        dnormed = _through_mlp(round_all(normed, dtype), round_all(dbranch, dtype), fc1, fc2_ptr, SPEC, TILE)
        x = load_rows(x_ptr + first * C, m, exists, C, PIECES)
        norm_sums_ptr += tl.program_id(0).to(tl.int64) * 2 * C
        dx = _through_norm(dnormed, x, mean, rstd, norm.weight, norm_sums_ptr, C, PIECES)
        dout = load_rows(dout_ptr + first * C, m, exists, C, PIECES)
        total = ()
        for n in tl.static_range(len(PIECES)):
            total = total + (dx[n] + dout[n].to(tl.float32),)
        store_rows(dx_ptr + first * C, total, m, exists, C, PIECES)


@triton.jit
def _through_norm(dnormed, x, mean, rstd, weight_ptr, sums_ptr, C: tl.constexpr, PIECES: tl.constexpr):
    """The gradient of x in float32; sums over rows of those of weight and bias are stored, C numbers each."""
    mean_dot = tl.zeros([x[0].shape[0]], tl.float32)
    mean_sum = tl.zeros([x[0].shape[0]], tl.float32)
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        normalised = (x[n].to(tl.float32) - mean[:, None]) * rstd[:, None]  # [TILE_ROWS, size]
        tl.store(sums_ptr + c, tl.sum(dnormed[n] * normalised, 0), mask=c < C)
        tl.store(sums_ptr + C + c, tl.sum(dnormed[n], 0), mask=c < C)
        g = dnormed[n] * load_row(weight_ptr, c, C)
        mean_dot += tl.sum(g * normalised, 1) / C
        mean_sum += tl.sum(g, 1) / C
    dx = ()
    for n in tl.static_range(len(PIECES)):
        normalised = (x[n].to(tl.float32) - mean[:, None]) * rstd[:, None]
        g = dnormed[n] * load_row(weight_ptr, piece(PIECES, n), C)
        dx = dx + ((g - mean_sum[:, None] - normalised * mean_dot[:, None]) * rstd[:, None],)
    return dx


@triton.jit(do_not_specialize=["rows", "tiles"])
def _mlp_layer_bwd_weights_kernel(
    dbranch_ptr,  # (rows, C)
    normed_ptr,  # (rows, C)
    fc1,  # Linear (HIDDEN, C)
    fc2_ptr,  # (C, HIDDEN)
    factor,  # of dbranch
    grads,  # sums over a stripe's rows, float32: dW1 (stripes, HIDDEN, C) and dbias1 (stripes, HIDDEN), or None both;
    #         dW2 (stripes, C, HIDDEN) or None
    rows,
    tiles,  # that a stripe has
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_H hidden features and a stripe of tiles times TILE_ROWS rows."""
    C: tl.constexpr = SPEC.C
    PIECES: tl.constexpr = SPEC.PIECES
    HIDDEN: tl.constexpr = SPEC.HIDDEN
    GELU: tl.constexpr = SPEC.GELU
    ROWS: tl.constexpr = TILE.ROWS
    H: tl.constexpr = TILE.H
    SLABS: tl.constexpr = (HIDDEN + H - 1) // H
    dfc1_ptr, dbias_ptr, dfc2_ptr = grads
    stripe = (tl.program_id(0) // SLABS).to(tl.int64)
    h = tl.program_id(0) % SLABS * H + tl.arange(0, H)  # [TILE_H]
    w1, w2 = _load_features(fc1.weight, fc2_ptr, h, HIDDEN % H == 0, SPEC)
    w2_rows = ()
    for n in tl.static_range(len(PIECES)):
        w2_rows = w2_rows + (tl.trans(w2[n]),)
    bias = tl.zeros([H], tl.float32)
    if fc1.bias is not None:
        bias = load(fc1.bias, h, h < HIDDEN)
    dw1 = zeros(PIECES, H)
    dw2 = zeros(PIECES, H)
    dbias = tl.zeros([H], tl.float32)
    m = tl.arange(0, ROWS)
    for tile in tl.range(tiles, num_stages=TILE.STAGES):
        first = (stripe * tiles + tile) * ROWS
        exists = first + m < rows
        normed = load_rows(normed_ptr + first * C, m, exists, C, PIECES)
        dbranch = load_rows(dbranch_ptr + first * C, m, exists, C, PIECES)
        hidden = tl.zeros([H, ROWS], tl.float32) + bias[:, None]
        for n in tl.static_range(len(PIECES)):
            hidden = dot(w1[n], tl.trans(normed[n]), hidden, False)
        if dfc2_ptr is not None:
            dw2 = _add_products(dw2, gelu(hidden, GELU), dbranch)
        if dfc1_ptr is not None:
            dhidden = tl.zeros([H, ROWS], tl.float32)
            for n in tl.static_range(len(PIECES)):
                dhidden = dot(w2_rows[n], tl.trans(dbranch[n]), dhidden, False)
            dhidden *= gelu_derivative(hidden, GELU)
            dbias += tl.sum(dhidden, 1)
            dw1 = _add_products(dw1, dhidden, normed)
    exists = h < HIDDEN
    if dfc1_ptr is not None:
        tl.store(dbias_ptr + stripe * HIDDEN + h, dbias * factor, mask=exists)
        dfc1_ptr += stripe * HIDDEN * C
    if dfc2_ptr is not None:
        dfc2_ptr += stripe * HIDDEN * C
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        mask = exists[:, None] & (c < C)[None, :]
        if dfc1_ptr is not None:
            tl.store(dfc1_ptr + h[:, None] * C + c[None, :], dw1[n] * factor, mask=mask)
        if dfc2_ptr is not None:
            tl.store(dfc2_ptr + c[None, :] * HIDDEN + h[:, None], dw2[n] * factor, mask=mask)


@triton.jit
def _add_products(sums, x, rows):
    """sums, [M, size] for every piece, and float32 x [M, K] @ rows [K, size]."""
    x = round_to(x, rows[0].dtype)
    new_sums = ()
    for n in tl.static_range(len(rows)):
        new_sums = new_sums + (dot(x, rows[n], sums[n], False),)
    return new_sums


def _pieces(channels: int, largest: int) -> tuple[tuple[int, int], ...]:
    """As of the forward, or equal ones: three falling ones take more registers than the channels that they spare."""
    whole = max(16, next_power_of_2(channels))
    if len(channel_pieces(channels, whole)) > 2:
        return pieces(whole, largest)
    return channel_pieces(channels, largest)


def mlp_layer_bwd(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    tanh: bool,
    fc2_weight: Tensor,
    branch_scale: float,
    sample_scale: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of mlp_layer_fwd in half precision. No atomics: the same input gives the same bits on a GPU.

    Args:
        dout: ``(..., C)``, any strides.
        x to sample_scale: as the forward took them, float16 or bfloat16.
        output_mask: which are wanted: of what is before fc1, of fc1, of fc2's weight, of its bias.

    Returns:
        ``dx`` ``(..., C)`` in x's dtype; the gradients of norm_weight and norm_bias, ``(2, C)``; of fc1_weight
        ``(hidden, C)``, fc1_bias ``(hidden,)``, fc2_weight ``(C, hidden)`` and fc2_bias ``(C,)``, in float32. None is
        not wanted.
    """
    hidden, C = fc1_weight.shape
    wants_dx, wants_dfc1, wants_dfc2, wants_dbias2 = output_mask

    if x.numel() == 0 or hidden == 0:
        return _of_nothing(dout, x, hidden, branch_scale, sample_scale, output_mask)

    def empty(want, *size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=x.device) if want else None

    rows, formula = x.shape[:-1].numel(), gelu_of(tanh, x.dtype)
    scale = Scale.of(branch_scale, sample_scale, rows)
    norm, fc1 = Norm.dense(norm_weight, norm_bias, eps), Linear.dense(fc1_weight, fc1_bias)
    dout, x, fc2_weight = dout.contiguous(), x.contiguous(), fc2_weight.contiguous()
    wants_weights = wants_dfc1 or wants_dfc2
    wanted = wants_dx, wants_weights, wants_weights and sample_scale is not None
    dx, normed, dbranch = (empty(want, *x.shape, dtype=x.dtype) for want in wanted)

    def compiled_in(config):
        spec = Spec(C, _pieces(C, config.tile_c), hidden, formula)
        tile = Tile(config.tile_rows, config.tile_h, config.num_stages, False)
        return {"SPEC": spec, "TILE": tile, "num_warps": config.num_warps}

    def of_rows(config, start):
        programs = cdiv(rows, config.tile_rows)
        sums = empty(wants_dx, programs, 2, C), empty(wants_dbias2, programs, C)
        start(
            _mlp_layer_bwd_rows_kernel, programs,
            dout, x, norm, fc1, fc2_weight, scale, (dx, normed, dbranch), sums, rows, **compiled_in(config),
        )  # fmt: skip
        return sums

    def of_weights(config, start):
        slabs = cdiv(hidden, config.tile_h)
        stripes, each = _configs.stripes(x.device, config.num_warps, cdiv(rows, config.tile_rows), slabs)
        sums = (
            empty(wants_dfc1, stripes, hidden, C),
            empty(wants_dfc1, stripes, hidden),
            empty(wants_dfc2, stripes, C, hidden),
        )
        start(
            _mlp_layer_bwd_weights_kernel, stripes * slabs,
            dout if dbranch is None else dbranch, normed, fc1, fc2_weight, scale.factor, sums, rows, each,
            **compiled_in(config),
        )  # fmt: skip
        return sums

    shape = (C, hidden, tanh, x.dtype, norm_weight.dtype, sample_scale is None)
    norm_sums, bias_sums, weight_sums = None, None, (None,) * 3
    if any(output_mask):
        parts = (wants_dx, wants_weights, wants_dbias2)
        norm_sums, bias_sums = launch(_layer_configs.mlp_layer_bwd_rows, (*shape, *parts), x, of_rows)
    if wants_weights:
        parts = (wants_dfc1, wants_dfc2)
        weight_sums = launch(_layer_configs.mlp_layer_bwd_weights, (*shape, *parts), x, of_weights)
    return dx, *(sums if sums is None else sums.sum(0) for sums in (norm_sums, *weight_sums, bias_sums))


def _of_nothing(
    dout: Tensor, x: Tensor, hidden: int, branch_scale: float, sample_scale: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of no rows or no hidden features: dx is dout, fc2's bias has a sum, everything else is zero."""
    C, (wants_dx, wants_dfc1, wants_dfc2, wants_dbias2) = x.shape[-1], output_mask
    scale = branch_scale if sample_scale is None else sample_scale.float().view(-1, *(1,) * (x.dim() - 1))
    dbias2 = (dout.float() * scale).flatten(0, -2).sum(0) if wants_dbias2 else None
    sizes = (wants_dx, (2, C)), (wants_dfc1, (hidden, C)), (wants_dfc1, (hidden,)), (wants_dfc2, (C, hidden))
    zeros = (torch.zeros(size, dtype=torch.float32, device=x.device) if want else None for want, size in sizes)
    return dout.clone() if wants_dx else None, *zeros, dbias2
