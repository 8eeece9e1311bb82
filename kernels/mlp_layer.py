"""The MLP sub-layer in one Triton kernel: ``x + scale fc2(gelu(fc1(layer_norm(x))))``; gradients: _mlp_gradients.

Of wide rows it is two, norm_linear's and linear's.

Maths: 16 C^2 FLOP a row for 4 C hidden features, on the matrix units, and as many GELUs. Floor of a row in half
precision: 4 C bytes, x read and out written; what is hidden stays on chip. The weights, 16 C^2 bytes, stream by once
for each tile of rows, from the L2 cache.
Tiling: a program normalises TILE_ROWS rows, all their channels in pieces, and walks over the hidden features: TILE_H of
them are made, activated and multiplied into all C columns of the sum, which stays in registers. So C has an end.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._gelu import Gelu, gelu, gelu_of
from nest_fast.kernels._launch import launch
from nest_fast.kernels._norm_linear import norm_linear
from nest_fast.kernels._primitives import cdiv, channel_pieces, dot, load, piece, round_to, zeros
from nest_fast.kernels._rows import (
    Linear,
    Norm,
    Scale,
    add_bias,
    is_whole,
    linear,
    load_normed,
    load_weight,
    own_rows,
    row_mask,
    scaled,
    store_rows,
)
from nest_fast.kernels.linear import sum_fwd

__all__ = ["mlp_layer_fwd"]


class Spec(NamedTuple):
    """What the kernel is compiled for: channels and their pieces, hidden features, the activation."""

    C: int
    PIECES: tuple[tuple[int, int], ...]
    HIDDEN: int
    GELU: Gelu


class Tile(NamedTuple):
    """``ROWS`` by ``H`` hidden features at once, ``STAGES`` steps in flight. TF32: of float32 matmuls."""

    ROWS: int
    H: int
    STAGES: int
    TF32: bool


@triton.jit
def _add_fc2(acc, hidden, fc2, h, SPEC: tl.constexpr, TILE: tl.constexpr):
    """acc, [TILE_ROWS, size] for every piece of C, and fc2 of the features h."""
    PIECES: tl.constexpr = SPEC.PIECES
    new_acc = ()
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        exists = (c < SPEC.C)[:, None] & (h < SPEC.HIDDEN)[None, :]
        source = fc2.weight + c[:, None] * SPEC.HIDDEN + h[None, :]
        weight = load_weight(source, exists, SPEC.HIDDEN % TILE.H == 0 and is_whole(n, SPEC.C, PIECES))
        new_acc = new_acc + (dot(hidden, tl.trans(weight), acc[n], TILE.TF32),)
    return new_acc


@triton.jit
def add_mlp(acc, normed, fc1, fc2, scale, SPEC: tl.constexpr, TILE: tl.constexpr):
    """acc, [TILE_ROWS, size] for every piece of C, and ``(scale gelu(fc1(normed))) @ fc2.weight^T``; None is 1."""
    GELU: tl.constexpr = SPEC.GELU
    C: tl.constexpr = SPEC.C
    PIECES: tl.constexpr = SPEC.PIECES
    HIDDEN: tl.constexpr = SPEC.HIDDEN
    COMPLETE: tl.constexpr = HIDDEN % TILE.H == 0
    TF32: tl.constexpr = TILE.TF32
    for start in tl.range(0, HIDDEN, TILE.H, num_stages=TILE.STAGES):
        h = start + tl.arange(0, TILE.H)  # [TILE_H]
        sums = linear(normed, fc1, h, COMPLETE, HIDDEN, C, PIECES, TF32)
        hidden = gelu(sums, GELU)
        if scale is not None:
            hidden *= scale
        acc = _add_fc2(acc, round_to(hidden, normed[0].dtype), fc2, h, SPEC, TILE)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _mlp_layer_fwd_kernel(
    x_ptr,  # (rows, C)
    norm,  # Norm
    fc1,  # Linear (HIDDEN, C)
    fc2,  # Linear (C, HIDDEN)
    out_ptr,  # (rows, C)
    rows,
    scale,  # Scale of what is added to x
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_ROWS rows."""
    PIECES: tl.constexpr = SPEC.PIECES
    first, m, exists = own_rows(rows, TILE.ROWS)
    x_ptr += first * SPEC.C
    normed = load_normed(x_ptr, norm, m, exists, SPEC.C, PIECES)
    acc = add_mlp(zeros(PIECES, TILE.ROWS), normed, fc1, fc2, None, SPEC, TILE)
    branch = add_bias(acc, fc2.bias, None, SPEC.C, PIECES)
    out = ()
    for n in tl.static_range(len(PIECES)):
        offsets = m[:, None] * SPEC.C + piece(PIECES, n)[None, :]  # [TILE_ROWS, size]
        x = load(x_ptr, offsets, row_mask(exists, n, SPEC.C, PIECES))
        out = out + (x + scaled(branch[n], scale, first + m, exists),)
    store_rows(out_ptr + first * SPEC.C, out, m, exists, SPEC.C, PIECES)


def mlp_layer_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    tanh: bool,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch_scale: float,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """``x + branch_scale * fc2(gelu(fc1(layer_norm(x))))``. Checks nothing.

    Args:
        x: ``(..., C)``, float32, float16 or bfloat16, any strides, but one that is not contiguous is copied; C at most
            256 in float32.
        norm_weight, norm_bias: ``(C,)``, of x's dtype or float32; eps: added to the variance.
        fc1_weight, fc1_bias: ``(hidden, C)`` and ``(hidden,)`` or None, in x's dtype; fewer than 2^31 numbers. float32
            is multiplied as torch's matmuls do.
        tanh: whether tanh stands in for the normal distribution in the GELU.
        fc2_weight, fc2_bias: ``(C, hidden)`` and ``(C,)`` or None, in x's dtype.
        branch_scale: factor of what is added to x; sample_scale: in its place one for each sample ``(B,)``, or None.

    Returns:
        ``(..., C)`` in x's dtype.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden, C = fc1_weight.shape
    if C > _layer_configs.ON_CHIP:
        norm, fc1 = Norm.dense(norm_weight, norm_bias, eps), Linear.dense(fc1_weight, fc1_bias)
        features = norm_linear(x.contiguous(), norm, fc1, gelu_of(tanh, x.dtype))
        return sum_fwd(features, fc2_weight, fc2_bias, x, branch_scale, sample_scale)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[:-1].numel()
    operands = _configs.operands(x.dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")
    norm = Norm.dense(norm_weight, norm_bias, eps)
    fc1, fc2 = Linear.dense(fc1_weight, fc1_bias), Linear.dense(fc2_weight, fc2_bias)
    x, formula, scale = x.contiguous(), gelu_of(tanh, x.dtype), Scale.of(branch_scale, sample_scale, rows)

    def run(config, start):
        spec = Spec(C, channel_pieces(C, config.tile_c), hidden, formula)
        tile = Tile(config.tile_rows, config.tile_h, config.num_stages, operands == "tf32")
        start(
            _mlp_layer_fwd_kernel, cdiv(rows, config.tile_rows),
            x, norm, fc1, fc2, out, rows, scale, SPEC=spec, TILE=tile, num_warps=config.num_warps,
        )  # fmt: skip

    shape = (C, operands, hidden, tanh, x.dtype, norm_weight.dtype, sample_scale is None)
    launch(_layer_configs.mlp_layer, shape, x, run)
    return out
