"""What SAM's encoder computes in every library: attention in windows or in the whole image, with relative positions.

A score has the product of the query with an embedding of the key's row added, and one with an embedding of its column,
relative to the query's.

Source: Li et al., "MViTv2", CVPR 2022 (arXiv 2112.01526), for the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nest_fast import fusion
from nest_fast.ops import block_attention, linear, windows

__all__ = ["POSITIONS", "attention", "blocks", "extra_dim"]


def _has_strange_positions(attn: Any, x: Tensor) -> bool:
    return attn.use_rel_pos and (fusion.is_other(attn, "rel_pos_h", x) or fusion.is_other(attn, "rel_pos_w", x))


# Of a class of attention.
POSITIONS: fusion.Rules = (
    ("{name}'s relative positions are no ordinary tensors, or have another dtype", _has_strange_positions),
)


def attention(
    x: Tensor,
    half: fusion.Half,
    branch_scale: fusion.Scale,
    *,
    window: int,
    embedding: Callable[[int, int, Tensor], Tensor],
) -> Tensor:
    """The attention sub-layer of an image ``(B, H, W, C)``, in windows, or in the whole of it where ``window`` is 0.

    ``embedding`` makes of the numbers of rows of queries and of keys, and a table, ``(queries, keys, head_dim)``.
    """
    _, H, W, C = x.shape
    norm, attn = half.norm, half.body
    options = half.written.options(attn)  # type: ignore[misc]
    cut, scale = windows((H, W), window if window > 0 else (H, W)), options.scale
    y = linear(torch.layer_norm(x, (C,), norm.weight, norm.bias, norm.eps), attn.qkv.weight, attn.qkv.bias)
    q, k, v = y.flatten(1, 2).unflatten(-1, (3, options.num_heads, -1)).unbind(2)  # (B, H * W, heads, head_dim)
    positions: tuple[Tensor | None, Tensor | None] = None, None
    if attn.use_rel_pos:
        tables = zip(cut.window, (attn.rel_pos_h, attn.rel_pos_w), strict=True)
        positions = _products(cut, q, *(embedding(edge, edge, table) for edge, table in tables))
    if window > 0:
        bias = y.new_zeros(y.shape[-1]) if attn.qkv.bias is None else attn.qkv.bias.to(y.dtype)
        _, pad_k, pad_v = bias.view(3, 1, *k.shape[2:])  # padding is zeros after the norm
        rel_h, rel_w = positions
        y = block_attention(q, k, v, scale=scale, windows=cut, pad_k=pad_k, pad_v=pad_v, rel_h=rel_h, rel_w=rel_w)
    else:
        q, k, v, rel_h, rel_w = (x if x is None else x.unsqueeze(1) for x in (q, k, v, *positions))
        y = block_attention(q, k, v, scale=scale, rel_h=rel_h, rel_w=rel_w).squeeze(1)
    y = y.flatten(-2).unflatten(1, (H, W))
    weight, bias = fusion.scaled(attn.proj.weight, half), fusion.scaled(attn.proj.bias, half)
    if not isinstance(branch_scale, Tensor) and branch_scale == 1.0:
        return linear(y, weight, bias, residual=x)
    return fusion.add_branch(x, linear(y, weight, bias), branch_scale)


def _products(cut: Any, q: Tensor, by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor]:
    """The products of q ``(B, H * W, heads, head_dim)`` with the embedding of each row of its window, and column."""
    image = q.unflatten(1, cut.size)
    by_row, by_column = (
        x.repeat(count, 1, 1)[:edge] for x, count, edge in zip((by_row, by_column), cut.counts, cut.size, strict=True)
    )
    rows = torch.einsum("byxhd,ykd->byxhk", image, by_row).flatten(1, 2)
    return rows, torch.einsum("byxhd,xkd->byxhk", image, by_column).flatten(1, 2)


# --- what explain tells of them ---------------------------------------------------------------------------------------


def _edges(layer: Any) -> tuple[int, int]:
    """Of a window; of the whole image as far as the relative positions tell."""
    if layer.window_size > 0:
        return layer.window_size, layer.window_size
    attn = layer.attn
    if not getattr(attn, "use_rel_pos", False):
        return 1, 1
    return (len(attn.rel_pos_h) + 1) // 2, (len(attn.rel_pos_w) + 1) // 2


def blocks(layer: Any) -> tuple[int, int]:
    """T and N of its attention, of one window."""
    return 1, _edges(layer)[0] * _edges(layer)[1]


def extra_dim(layer: Any) -> int:
    """How many dimensions the positions add to a head."""
    return sum(_edges(layer)) if layer.attn.use_rel_pos else 0
