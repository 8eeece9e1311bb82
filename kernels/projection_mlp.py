"""What a transformer layer does after its attention, in one Triton kernel: projection, sum and the MLP sub-layer.

``total = x + proj_scale (attended @ proj^T + bias)``, and of that ``total + branch_scale
fc2(gelu(fc1(layer_norm(total))))``, forward alone.

Maths: 18 C^2 FLOP a row for 4 C hidden features, on the matrix units, and as many GELUs. Floor of a row in half
precision: 6 C bytes, x and attended read and out written; neither the sum nor what is hidden leaves the chip.
Tiling: as mlp_layer's; a program makes the sum of its TILE_ROWS rows first, all its channels in pieces, and goes on
adding to it. In float32, whose sums would lose digits on top of a total far from zero, both do not fit in registers.
"""
# ruff: noqa: RUF005 (Triton's tuples grow by +; it knows no starred elements)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _layer_configs
from nest_fast.kernels._gelu import gelu_of
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, channel_pieces, piece
from nest_fast.kernels._rows import (
    Linear,
    Norm,
    add_bias,
    is_whole,
    layer_norm,
    linear,
    load_rows,
    own_rows,
    round_all,
    store_rows,
)
from nest_fast.kernels.mlp_layer import Spec, Tile, add_mlp

__all__ = ["projection_mlp_fwd"]


@triton.jit
def _projected(x, attended, proj, scale, SPEC: tl.constexpr, TILE: tl.constexpr):
    """x + scale proj(attended) in float32, all of them [TILE_ROWS, size] for every piece of C."""
    C: tl.constexpr = SPEC.C
    PIECES: tl.constexpr = SPEC.PIECES
    TF32: tl.constexpr = TILE.TF32
    total = ()
    for n in tl.static_range(len(PIECES)):
        c = piece(PIECES, n)
        branch = linear(attended, proj, c, is_whole(n, C, PIECES), C, C, PIECES, TF32)
        total = total + (x[n].to(tl.float32) + scale * branch,)
    return total


@triton.jit(do_not_specialize=["rows"])
def _projection_mlp_fwd_kernel(
    x_ptr,  # (rows, C)
    attended_ptr,  # (rows, C)
    proj,  # Linear (C, C)
    proj_scale,  # of what is added to x
    norm,  # Norm
    fc1,  # Linear (HIDDEN, C)
    fc2,  # Linear (C, HIDDEN)
    branch_scale,  # of what is added to that, None for 1
    out_ptr,  # (rows, C)
    rows,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE_ROWS rows."""
    PIECES: tl.constexpr = SPEC.PIECES
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first, m, exists = own_rows(rows, TILE.ROWS)
    x = load_rows(x_ptr + first * SPEC.C, m, exists, SPEC.C, PIECES)
    attended = load_rows(attended_ptr + first * SPEC.C, m, exists, SPEC.C, PIECES)
    out_ptr += first * SPEC.C
    total = _projected(x, attended, proj, proj_scale, SPEC, TILE)
    normed, _, _ = layer_norm(total, norm, SPEC.C, PIECES, True)
    acc = add_mlp(total, round_all(normed, dtype), fc1, fc2, branch_scale, SPEC, TILE)
    store_rows(out_ptr, add_bias(acc, fc2.bias, branch_scale, SPEC.C, PIECES), m, exists, SPEC.C, PIECES)


def projection_mlp_fwd(
    x: Tensor,
    attended: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    proj_scale: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    tanh: bool,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch_scale: float,
) -> Tensor:
    """``total + branch_scale * fc2(gelu(fc1(layer_norm(total))))`` of ``total = x + proj_scale *
    proj(attended)``, which has x's dtype. Checks nothing.

    Args:
        x, attended: ``(..., C)``, float16 or bfloat16, any strides, but one that is not contiguous is copied; C at most
            128.
        proj_weight, proj_bias: ``(C, C)`` and ``(C,)`` or None, in x's dtype.
        norm_weight to branch_scale: as of mlp_layer_fwd.

    Returns:
        ``(..., C)`` in x's dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    hidden, C = fc1_weight.shape
    rows = x.shape[:-1].numel()
    proj, norm = Linear.dense(proj_weight, proj_bias), Norm.dense(norm_weight, norm_bias, eps)
    fc1, fc2 = Linear.dense(fc1_weight, fc1_bias), Linear.dense(fc2_weight, fc2_bias)
    x, attended, formula = x.contiguous(), attended.contiguous(), gelu_of(tanh, x.dtype)
    scale = None if branch_scale == 1.0 else float(branch_scale)

    def run(config, start):
        spec = Spec(C, channel_pieces(C, config.tile_c), hidden, formula)
        tile = Tile(config.tile_rows, config.tile_h, config.num_stages, False)
        start(
            _projection_mlp_fwd_kernel, cdiv(rows, config.tile_rows),
            x, attended, proj, float(proj_scale), norm, fc1, fc2, scale, out, rows,
            SPEC=spec, TILE=tile, num_warps=config.num_warps,
        )  # fmt: skip

    shape = (C, hidden, tanh, x.dtype, norm_weight.dtype, scale is None)
    launch(_layer_configs.projection_mlp, shape, x, run)
    return out
