"""timm's SAM encoder: attention in windows, and in the whole image in some layers, with relative positions.

The bias of a query and a key is a product of the query with an embedding of the key's row, and one with an embedding of
its column, relative to the query's. So it is part of the query's product with the key, once these have one more
dimension for each row and each column: the query holds its products with all embeddings there, the key a 1 at its own
row and column. No bias is ever stored, which for 64 x 64 tokens would be 4096 x 4096 numbers a head.

Source: timm/models/vision_transformer_sam.py; Li et al., "MViTv2", CVPR 2022 (arXiv 2112.01526), for the positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.models.vision_transformer_sam as timm_sam
import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import ATTENTION_PARTS, ATTENTION_RULES, KNOWN, layer_scale, options, scale
from nest_fast.ops import block_attention, blockify, linear, unblockify

__all__ = ["ADAPTER"]


class Block(Fast, timm_sam.Block):
    @instead_of(timm_sam.Block)
    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = _halves(self)
        x = fusion.run(x, [attention])
        return fusion.run(x.flatten(1, 2), [mlp]).view(x.shape)


def _halves(layer: Any) -> list[fusion.Half]:
    place = _PATH_OF_WINDOWS if layer.window_size > 0 else fusion.PATH
    operation = partial(_attention, window=layer.window_size)
    return fusion.halves(
        layer, _KNOWN, names=fusion.SCALED_HALVES, path_place=place, call=partial(_called, layer), operation=operation
    )


def _called(layer: Any, x: Tensor) -> Tensor:
    y = layer.norm1(x)
    if layer.window_size == 0:
        return layer.drop_path1(layer.ls1(layer.attn(y)))
    y, padded = timm_sam.window_partition(y, layer.window_size)
    y = layer.drop_path1(layer.ls1(layer.attn(y)))
    return timm_sam.window_unpartition(y, layer.window_size, (x.shape[1], x.shape[2]), padded)


def _attention(x: Tensor, half: fusion.Half, branch_scale: float, *, window: int) -> Tensor:
    _, H, W, C = x.shape
    norm, attn = half.norm, half.body
    size = (window, window) if window > 0 else (H, W)
    y = torch.layer_norm(x, (C,), norm.weight, norm.bias, norm.eps)
    y = F.pad(y, (0, 0, 0, -W % size[1], 0, -H % size[0]))
    grid = y.shape[1] // size[0], y.shape[2] // size[1]
    packed = linear(blockify(y, size), attn.qkv.weight, attn.qkv.bias)
    q, k, v = packed.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    if attn.use_rel_pos:
        y = block_attention(*_with_positions(q, k, v, attn, size), scale=1.0)[..., : v.shape[-1]]
    else:
        y = block_attention(q, k, v, scale=scale(attn))
    y = unblockify(y.flatten(-2), grid, size)[:, :H, :W]
    weight, bias = fusion.scaled(attn.proj.weight, attn.proj.bias, half)
    if branch_scale == 1.0:
        return linear(y, weight, bias, residual=x)
    return x + branch_scale * linear(y, weight, bias)


def _with_positions(q: Tensor, k: Tensor, v: Tensor, attn: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``(B, T, N, heads, head_dim)`` with a dimension for each row and column of a window, q scaled."""
    H, W = size
    by_row, by_column = (
        timm_sam.get_rel_pos(edge, edge, table)
        for edge, table in zip(size, (attn.rel_pos_h, attn.rel_pos_w), strict=True)
    )
    image = q.unflatten(2, size)
    rows = torch.einsum("btyxhd,ykd->btyxhk", image, by_row).flatten(2, 3)
    columns = torch.einsum("btyxhd,xkd->btyxhk", image, by_column).flatten(2, 3)
    own_row = torch.eye(H, dtype=k.dtype, device=k.device).repeat_interleave(W, 0)
    own_column = torch.eye(W, dtype=k.dtype, device=k.device).repeat(H, 1)
    own = torch.cat((own_row, own_column), -1).unsqueeze(1).expand(*k.shape[:-1], -1)
    factor = attn.head_dim**-0.5 if scale(attn) is None else attn.scale
    return torch.cat((q * factor, rows, columns), -1), torch.cat((k, own), -1), F.pad(v, (0, H + W))


# --- what fusion knows of timm's classes ------------------------------------------------------------------------------

_PATH_OF_WINDOWS = fusion.Place(
    fusion.PATH.roles,
    (("{name} drops windows, not samples", lambda m, x: m.training and getattr(m, "drop_prob", 0.0) != 0.0),),
)


def _functions() -> tuple:
    return timm_sam.get_rel_pos, timm_sam.get_decomposed_rel_pos_bias, timm_sam.window_partition


_FUNCTIONS = _functions()


def _has_strange_positions(attn: Any, x: Tensor) -> bool:
    return attn.use_rel_pos and (fusion.is_other(attn, "rel_pos_h", x) or fusion.is_other(attn, "rel_pos_w", x))


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_sam.LayerScale: layer_scale(timm_sam.LayerScale),
    timm_sam.Attention: fusion.as_written(
        "attention",
        timm_sam.Attention,
        rules=(
            *ATTENTION_RULES,
            ("{name}'s relative positions are no ordinary tensors, or have another dtype", _has_strange_positions),
            ("a function of timm's SAM was patched", lambda m, x: _functions() != _FUNCTIONS),
        ),
        parts=(
            *ATTENTION_PARTS,
            ("q_norm", fusion.IDENTITY),
            ("k_norm", fusion.IDENTITY),
            ("rope", fusion.ABSENT),
        ),
        options=options,
    ),
    Block: fusion.as_written("layer", Block, timm_sam.Block),
}


# --- what explain tells of them ---------------------------------------------------------------------------------------


def _edges(layer: Any) -> tuple[int, int]:
    """Of a window; of the whole image as far as the relative positions tell."""
    if layer.window_size > 0:
        return layer.window_size, layer.window_size
    attn = layer.attn
    if not getattr(attn, "use_rel_pos", False):
        return 1, 1
    return (len(attn.rel_pos_h) + 1) // 2, (len(attn.rel_pos_w) + 1) // 2


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, _edges(layer)[0] * _edges(layer)[1]


def _extra_dim(layer: Any) -> int:
    return sum(_edges(layer)) if layer.attn.use_rel_pos else 0


ADAPTER = Adapter(
    classes=(Block,),
    known=_KNOWN,
    told={Block: partial(tell_layer, halves=_halves, blocks=_blocks, by_parts=_extra_dim)},
)
