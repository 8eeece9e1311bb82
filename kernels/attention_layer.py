"""The attention sub-layer in Triton, whose rows stay on chip; forward alone.

A linear layer after a LayerNorm, ``layer_norm(x) @ weight^T + bias``, and one before a residual sum, ``residual + scale
* (x @ weight^T + bias)``; between them is block_attention. And of narrow layers the first two in one. Of wide rows the
linear layers are norm_linear's and linear's.

Maths: 2 C OUT FLOP a row, on the matrix units. Floor of a row in half precision: 2 C + 2 OUT bytes, and 2 OUT of the
residual; neither what is normalised nor what is added is stored. The weight streams by once for each tile of rows, from
the L2 cache.
Tiling: a program holds TILE_ROWS rows, all their channels in pieces, and walks over the result, TILE_OUT columns at a
time. With the attention it has a block and a head, makes the LayerNorm of the block again for each head, and goes on as
block_attention's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _attention, _configs, _layer_configs
from nest_fast.kernels._attention import program_index, store_queries
from nest_fast.kernels._attention_operands import scales_of, view
from nest_fast.kernels._launch import launch
from nest_fast.kernels._norm_linear import norm_linear
from nest_fast.kernels._primitives import cdiv, channel_pieces, load, piece, round_to, tiles_and_tail
from nest_fast.kernels._rows import Linear, Norm, linear, load_normed, own_rows
from nest_fast.kernels.block_attention import _attend, _pieces
from nest_fast.kernels.linear import sum_fwd

__all__ = ["linear_sum_fwd", "norm_attention_fwd", "norm_linear_fwd"]


class Spec(NamedTuple):
    """What the kernel is compiled for: channels and their pieces, columns of the result."""

    C: int
    PIECES: tuple[tuple[int, int], ...]
    OUT: int


class Tile(NamedTuple):
    """``ROWS`` by ``OUT`` columns at once, ``STAGES`` steps in flight. TF32: of float32 matmuls."""

    ROWS: int
    OUT: int
    STAGES: int
    TF32: bool


@triton.jit(do_not_specialize=["rows"])
def _linear_rows_kernel(
    x_ptr,  # (rows, C)
    norm,  # Norm, or None: x is multiplied as it is
    layer,  # Linear (OUT, C)
    residual_ptr,  # (rows, OUT) or None
    out_ptr,  # (rows, OUT)
    rows,
    scale,  # of what is added to the residual
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_ROWS rows."""
    PIECES: tl.constexpr = SPEC.PIECES
    first, m, exists = own_rows(rows, TILE.ROWS)
    x = load_normed(x_ptr + first * SPEC.C, norm, m, exists, SPEC.C, PIECES)
    out_ptr += first * SPEC.OUT
    if residual_ptr is not None:
        residual_ptr += first * SPEC.OUT
    for start in tl.range(0, SPEC.OUT, TILE.OUT, num_stages=TILE.STAGES):
        o = start + tl.arange(0, TILE.OUT)  # [TILE_OUT]
        sums = linear(x, layer, o, SPEC.OUT % TILE.OUT == 0, SPEC.OUT, SPEC.C, PIECES, TILE.TF32)
        mask = exists[:, None]
        if SPEC.OUT % TILE.OUT:
            mask = mask & (o < SPEC.OUT)[None, :]
        offsets = m[:, None] * SPEC.OUT + o[None, :]  # [TILE_ROWS, TILE_OUT]
        if residual_ptr is not None:
            sums = load(residual_ptr, offsets, mask) + scale * sums
        tl.store(out_ptr + offsets, round_to(sums, out_ptr.dtype.element_ty), mask=mask)


def _linear_rows(x: Tensor, norm: Norm | None, layer: Linear, residual: Tensor | None, scale: float) -> Tensor:
    outputs, C = layer.weight.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.shape[:-1].numel()
    operands = _configs.operands(x.dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")

    def run(config, start):
        spec = Spec(C, channel_pieces(C, config.tile_c), outputs)
        tile = Tile(config.tile_rows, config.tile_out, config.num_stages, operands == "tf32")
        start(
            _linear_rows_kernel, cdiv(rows, config.tile_rows),
            x, norm, layer, residual, out, rows, float(scale), SPEC=spec, TILE=tile, num_warps=config.num_warps,
        )  # fmt: skip

    shape = (C, operands, outputs, x.dtype, None if norm is None else norm.weight.dtype)
    launch(_layer_configs.linear_rows, shape, x, run)
    return out


def norm_linear_fwd(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``layer_norm(x) @ weight^T + bias``. Checks nothing.

    Args:
        x: ``(..., C)``, float32, float16 or bfloat16, any strides, but one that is not contiguous is copied; C at most
            256 in float32.
        norm_weight, norm_bias: ``(C,)``, of x's dtype or float32; eps: added to the variance.
        weight, bias: ``(out, C)`` and ``(out,)`` or None, in x's dtype. float32 is multiplied as torch's matmuls do.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    x, norm, layer = x.contiguous(), Norm.dense(norm_weight, norm_bias, eps), Linear.dense(weight, bias)
    if x.shape[-1] > _layer_configs.ON_CHIP:
        return norm_linear(x, norm, layer, None)
    return _linear_rows(x, norm, layer, None, 1.0)


def linear_sum_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: float) -> Tensor:
    """``residual + scale * (x @ weight^T + bias)``. Checks nothing.

    Args:
        x, weight, bias: as of norm_linear_fwd.
        residual: ``(..., out)`` in x's dtype; as x, any strides.
        scale: factor of what is added.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    if x.shape[-1] > _layer_configs.ON_CHIP:
        return sum_fwd(x, weight, bias, residual, scale)
    return _linear_rows(x.contiguous(), None, Linear.dense(weight, bias), residual.contiguous(), scale)


# --- LayerNorm, qkv and attention in one ------------------------------------------------------------------------------


class Resident(NamedTuple):
    """Pieces of the channels, of the keys, which stay on chip, tiles of the queries, which go by: block_attention's."""

    C: int
    PIECES: tuple[tuple[int, int], ...]
    KEY_PIECES: tuple[tuple[int, int], ...]
    BLOCK_M: int
    M_TILES: tuple[int, int]


@triton.jit
def _norm_attention_fwd_kernel(
    x_ptr,  # (B, T, N, C)
    norm,  # Norm
    qkv,  # Linear (3 C, C)
    out,  # View of (B, T, N, heads, HEAD_DIM)
    lse_ptr,  # (B, T, heads, N) float32
    scale,  # as in _attention
    blocks,  # T, heads and no cut of an image
    SPEC: tl.constexpr,
    CUT: tl.constexpr,  # Resident
):
    """One program: a head of a block. Its part of out has the queries until it has what they attend."""
    C: tl.constexpr = CUT.C
    PIECES: tl.constexpr = CUT.PIECES
    KEY_PIECES: tl.constexpr = CUT.KEY_PIECES
    BLOCK_M: tl.constexpr = CUT.BLOCK_M
    M_TILES: tl.constexpr = CUT.M_TILES
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    T, heads, cut = blocks
    b, t, head = program_index(heads, T)
    index = (b, t, head, cut)
    x_ptr += (b * T + t) * (SPEC.N * C)
    d = head.to(tl.int32) * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM)
    keys = ()
    values = ()
    for i in tl.static_range(len(KEY_PIECES)):
        n = piece(KEY_PIECES, i)
        exists = n < SPEC.N
        normed = load_normed(x_ptr, norm, n, exists, C, PIECES)
        store_queries(out, index, n, linear(normed, qkv, d, True, 3 * C, C, PIECES, False), SPEC)
        keys += (round_to(linear(normed, qkv, C + d, True, 3 * C, C, PIECES, False), dtype),)
        value = linear(normed, qkv, 2 * C + d, True, 3 * C, C, PIECES, False)
        values += (round_to(tl.where(exists[:, None], value, 0.0), dtype),)
    tl.debug_barrier()  # what one thread stored of the queries another one loads
    addends = (None, None, 1)
    if M_TILES[1]:
        start = M_TILES[0] * BLOCK_M
        _attend(start, M_TILES[1], out, keys, values, out, lse_ptr, index, addends, scale, SPEC, KEY_PIECES)
    for tile in range(M_TILES[0]):
        _attend(tile * BLOCK_M, BLOCK_M, out, keys, values, out, lse_ptr, index, addends, scale, SPEC, KEY_PIECES)


def norm_attention_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention inside blocks to ``q, k, v = layer_norm(x) @ weight^T + bias``. Checks nothing.

    Args:
        x: ``(B, T, N, C)``, float16 or bfloat16, any strides, but one that is not contiguous is copied; C at most 128,
            N at most 208.
        norm_weight, norm_bias: ``(C,)``, of x's dtype or float32; eps: added to the variance.
        weight, bias: ``(3 C, C)`` and ``(3 C,)`` or None, in x's dtype; q of every head, then k, then v.
        num_heads: divides C into 16 or 32.
        scale: factor of ``q @ k^T``.

    Returns:
        ``(B, T, N, C)`` in x's dtype.
    """
    B, T, N, C = x.shape
    head_dim = C // num_heads
    out = torch.empty((B, T, N, num_heads, head_dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out.flatten(-2)
    lse = torch.empty((B, T, num_heads, N), dtype=torch.float32, device=x.device)  # which nobody reads
    spec = _attention.Spec(N, head_dim, 1, False, scale > 1e-6, False)
    x, norm, qkv = x.contiguous(), Norm.dense(norm_weight, norm_bias, eps), Linear.dense(weight, bias)

    def run(config, start):
        pieces = channel_pieces(C, config.tile_c), _pieces(N, config.block_n)
        resident = Resident(C, *pieces, config.block_m, tiles_and_tail(N, config.block_m))
        start(
            _norm_attention_fwd_kernel, B * T * num_heads,
            x, norm, qkv, view(out), lse, scales_of(float(scale), None), (T, num_heads, None),
            SPEC=spec, CUT=resident, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip

    launch(_layer_configs.norm_attention, (C, spec, x.dtype, norm_weight.dtype), x, run)
    return out.flatten(-2)
