"""What SAM's encoder computes in every library: attention in windows or in the whole image, with relative positions.

The bias of a query and a key is a product of the query with an embedding of the key's row, and one with an embedding of
its column, relative to the query's. So it is part of the query's product with the key, once these have one more
dimension for each row and each column: the query holds its products with all embeddings there, the key a 1 at its own
row and column. No bias is ever stored, which for 64 x 64 tokens would be 4096 x 4096 numbers a head.

Source: Li et al., "MViTv2", CVPR 2022 (arXiv 2112.01526), for the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast import fusion
from nest_fast.ops import block_attention, blockify, linear, unblockify

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
    branch_scale: float,
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
    size = (window, window) if window > 0 else (H, W)
    y = torch.layer_norm(x, (C,), norm.weight, norm.bias, norm.eps)
    y = F.pad(y, (0, 0, 0, -W % size[1], 0, -H % size[0]))
    grid = y.shape[1] // size[0], y.shape[2] // size[1]
    packed = linear(blockify(y, size), attn.qkv.weight, attn.qkv.bias)
    q, k, v = packed.unflatten(-1, (3, options.num_heads, -1)).unbind(3)
    if attn.use_rel_pos:
        tables = zip(size, (attn.rel_pos_h, attn.rel_pos_w), strict=True)
        by_row, by_column = (embedding(edge, edge, table) for edge, table in tables)
        factor = q.shape[-1] ** -0.5 if options.scale is None else options.scale
        q, k = _with_positions(q * factor, q, k, by_row, by_column)
        y = block_attention(q, k, F.pad(v, (0, sum(size))), scale=1.0)[..., : v.shape[-1]]
    else:
        y = block_attention(q, k, v, scale=options.scale)
    y = unblockify(y.flatten(-2), grid, size)[:, :H, :W]
    weight, bias = fusion.scaled(attn.proj.weight, half), fusion.scaled(attn.proj.bias, half)
    if branch_scale == 1.0:
        return linear(y, weight, bias, residual=x)
    return x + branch_scale * linear(y, weight, bias)


def _with_positions(scaled: Tensor, q: Tensor, k: Tensor, by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor]:
    """q scaled and k, ``(B, T, N, heads, head_dim)``, with a dimension for each row and column of a window."""
    H, W = len(by_row), len(by_column)
    image = q.unflatten(2, (H, W))
    rows = torch.einsum("btyxhd,ykd->btyxhk", image, by_row).flatten(2, 3)
    columns = torch.einsum("btyxhd,xkd->btyxhk", image, by_column).flatten(2, 3)
    own_row = torch.eye(H, dtype=k.dtype, device=k.device).repeat_interleave(W, 0)
    own_column = torch.eye(W, dtype=k.dtype, device=k.device).repeat(H, 1)
    own = torch.cat((own_row, own_column), -1).unsqueeze(1).expand(*k.shape[:-1], -1)
    return torch.cat((scaled, rows, columns), -1), torch.cat((k, own), -1)


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
