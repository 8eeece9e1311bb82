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
    bias = y.new_zeros(y.shape[-1]) if attn.qkv.bias is None else attn.qkv.bias.to(y.dtype)
    _, pad_k, pad_v = bias.view(3, 1, *k.shape[2:]).expand(-1, cut.pads, -1, -1)  # padding is zeros after the norm
    head_dim = q.shape[-1]
    if attn.use_rel_pos:
        tables = zip(cut.window, (attn.rel_pos_h, attn.rel_pos_w), strict=True)
        by_row, by_column = (embedding(edge, edge, table) for edge, table in tables)
        own, of_padding = _places(cut, k)
        factor = head_dim**-0.5 if scale is None else scale
        products = _products(cut, q, by_row, by_column)
        q = F.pad(torch.cat((q * factor, *products), -1), (0, own.shape[-1] - sum(cut.window)))
        k, pad_k = _cat(k, own), _cat(pad_k, of_padding)
        if x.is_cuda:  # where its kernel has one head_dim for all
            v, pad_v = (F.pad(x, (0, own.shape[-1])) for x in (v, pad_v))
        scale = 1.0
    if window > 0:
        y = block_attention(q, k, v, scale=scale, windows=cut, pad_k=pad_k, pad_v=pad_v)
    else:
        y = block_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale).squeeze(1)
    y = y[..., :head_dim].flatten(-2).unflatten(1, (H, W))
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


def _places(cut: Any, k: Tensor) -> tuple[Tensor, Tensor]:
    """A 1 at the row and the column that a token has in its window: for those of the image, and for padding.

    With k's they are a multiple of 16 dimensions, which a GPU reads in wide loads.
    """
    (H, W), (h, w) = cut.size, cut.window
    rows, columns = (
        torch.eye(x, dtype=k.dtype, device=k.device).repeat(n, 1) for x, n in zip((h, w), cut.counts, strict=True)
    )
    own = torch.cat((rows.unsqueeze(1).expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)), -1)
    own = F.pad(own, (0, -(k.shape[-1] + h + w) % 16))
    return own[:H, :W].flatten(0, 1), torch.cat((own[:H, W:].flatten(0, 1), own[H:].flatten(0, 1)))


def _cat(x: Tensor, places: Tensor) -> Tensor:
    """x ``(..., rows, heads, head_dim)`` with the places ``(rows, dims)`` of its rows."""
    return torch.cat((x, places.unsqueeze(1).expand(*x.shape[:-1], -1)), -1)


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
