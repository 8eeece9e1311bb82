"""The linear layers of the attention sub-layer in Triton, whose rows stay on chip; forward alone.

One after a LayerNorm, ``layer_norm(x) @ weight^T + bias``, one before a residual sum, ``residual + scale * (x @
weight^T + bias)``; between them is block_attention.

Maths: 2 C OUT FLOP a row, on the matrix units. Floor of a row in half precision: 2 C + 2 OUT bytes, and 2 OUT of the
residual; neither what is normalised nor what is added is stored. The weight streams by once for each tile of rows, from
the L2 cache.
Tiling: a program holds TILE_ROWS rows, all their channels in pieces, and walks over the result, TILE_OUT columns at a
time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._launch import launch
from nest_fast.kernels._primitives import cdiv, channel_pieces, load, round_to
from nest_fast.kernels._rows import Linear, Norm, linear, load_normed, own_rows

__all__ = ["linear_sum_fwd", "norm_linear_fwd"]


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
            256.
        norm_weight, norm_bias: ``(C,)``, of x's dtype or float32; eps: added to the variance.
        weight, bias: ``(out, C)`` and ``(out,)`` or None, in x's dtype. float32 is multiplied as torch's matmuls do.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    norm = Norm.dense(norm_weight, norm_bias, eps)
    return _linear_rows(x.contiguous(), norm, Linear.dense(weight, bias), None, 1.0)


def linear_sum_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: float) -> Tensor:
    """``residual + scale * (x @ weight^T + bias)``. Checks nothing.

    Args:
        x, weight, bias: as of norm_linear_fwd.
        residual: ``(..., out)`` in x's dtype; as x, any strides.
        scale: factor of what is added.

    Returns:
        ``(..., out)`` in x's dtype.
    """
    return _linear_rows(x.contiguous(), None, Linear.dense(weight, bias), residual.contiguous(), scale)
