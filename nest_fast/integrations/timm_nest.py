"""timm's NesT: its layers on blocks, and the whole model in block layout. Source: timm/models/nest.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm.layers
import timm.models.nest as timm_nest
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from nest_fast import fusion
from nest_fast.explanation import Like, Row, tell_aggregation, tell_attention, tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import ATTENTION_RULES, KNOWN, scale
from nest_fast.ops import unblockify

__all__ = ["ADAPTER"]


class Attention(Fast, timm_nest.Attention):
    @instead_of(timm_nest.Attention)
    def forward(self, x: Tensor) -> Tensor:
        inside = (("attn_drop", self.attn_drop, fusion.SILENT),)
        if fusion.flags(x, "attn", self, _KNOWN[Attention]) or fusion.why_not(x, inside, _KNOWN):
            return timm_nest.Attention.forward(self, x)  # it drops weights, and shows them, in its own order
        return self.proj_drop(fusion.attend(x, self, _options(self), _KNOWN))


class TransformerLayer(Fast, timm_nest.TransformerLayer):
    @instead_of(timm_nest.TransformerLayer)
    def forward(self, x: Tensor) -> Tensor:
        return fusion.run(x, fusion.halves(self, _KNOWN))


class ConvPool(Fast, timm_nest.ConvPool):
    @instead_of(timm_nest.ConvPool)
    def forward(self, x: Tensor) -> Tensor:
        if fusion.why_not(x, _pool_parts(self), _KNOWN):
            return timm_nest.ConvPool.forward(self, x)
        return fusion.aggregate(x.permute(0, 2, 3, 1), self, _padding(self)).permute(0, 3, 1, 2)


class NestLevel(Fast, timm_nest.NestLevel):
    @instead_of(timm_nest.NestLevel)
    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x).permute(0, 2, 3, 1)
        grid_size = (x.shape[1] // self.block_size, x.shape[2] // self.block_size)
        x = _run_layers(self, fusion.cut(x, self.block_size, self.pos_embed))
        return unblockify(x, grid_size).permute(0, 3, 1, 2)


class Nest(Fast, timm_nest.Nest):
    @instead_of(timm_nest.Nest, "forward_features")
    def forward_features(self, x: Tensor) -> Tensor:
        if fusion.why_not(x, _nest_parts(self), _KNOWN) or fusion.flags(x, "the model", self, _KNOWN[Nest]):
            return timm_nest.Nest.forward_features(self, x)
        levels: list[Any] = list(self.levels)
        edge = levels[0].block_size
        x = fusion.embed_patches(x, self.patch_embed.proj, (edge, edge))
        for level in levels:
            if isinstance(level.pool, nn.Identity):
                x = x + level.pos_embed
            else:
                grid, pos_embed = math.isqrt(x.shape[1]), level.pos_embed
                x = fusion.aggregate(x, level.pool, _padding(level.pool), grid_size=grid, pos_embed=pos_embed)
            x = _run_layers(level, x)
        x = unblockify(x, math.isqrt(x.shape[1]))
        return self.norm(x).permute(0, 3, 1, 2)


def _run_layers(level: Any, x: Tensor) -> Tensor:
    encoder, recomputed = level.transformer_encoder, level.grad_checkpointing
    if not recomputed or recomputed == "gelu":  # as nest_fast.NesT has it
        return fusion.run_layers(x, encoder, _KNOWN, keep_gelu=not recomputed)
    return checkpoint_seq(encoder, x)


def _padding(pool: Any) -> str:
    return "same" if isinstance(pool.pool, MaxPool2dSame) else "symmetric"


# --- what fusion knows of timm's classes ------------------------------------------------------------------------------


def _options(attn: Any) -> fusion.Attention:
    return fusion.Attention(attn.num_heads, scale(attn), head_minor=True)


def _pool_parts(pool: Any) -> tuple[fusion.Part, ...]:
    own = pool._modules
    return (
        ("conv", own.get("conv"), fusion.CONV_3X3),
        ("norm", own.get("norm"), fusion.INNER_NORM),
        ("pool", own.get("pool"), fusion.MAX_POOL),
    )


def _nest_parts(model: Any) -> Iterator[fusion.Part]:
    """What stands between the layers of a model: nothing of it is called where it stays in block layout."""
    embed, levels = model._modules.get("patch_embed"), model._modules.get("levels")
    yield "patch_embed", embed, _EMBEDDING
    yield "patch_embed.proj", embed._modules.get("proj"), fusion.CONV_OF_PATCHES
    yield "patch_embed.norm", embed._modules.get("norm"), fusion.IDENTITY
    yield "levels", levels, fusion.SEQUENTIAL
    for i, level in enumerate(levels._modules.values()):
        pool = level._modules.get("pool")
        yield f"levels.{i}", level, _LEVEL
        yield f"levels.{i}.pool", pool, _POOL if i else fusion.IDENTITY
        if i:
            yield from ((f"levels.{i}.pool.{name}", module, place) for name, module, place in _pool_parts(pool))


def _is_in_other_blocks(model: Any, x: Tensor) -> bool:
    """Whether the levels cut this image in another way than into the square blocks that merge by fours."""
    levels, patch = list(model.levels), model.patch_embed.patch_size
    edge = levels[0].block_size if levels else 0
    for i, level in enumerate(levels):
        grid = x.shape[2] // (edge * patch[0] * 2**i)
        size = tuple(edge * side * grid * 2**i for side in patch)
        conv = level.pool.conv if i else model.patch_embed.proj
        blocks = (grid * grid, edge * edge, conv.out_channels)
        if level.block_size != edge or x.shape[2:] != size or not fusion.is_one_for_each(level.pos_embed, blocks):
            return True
    return not levels


_EMBEDDING = fusion.Place(("patch_embed",))
_LEVEL = fusion.Place(("level",))
_POOL = fusion.Place(("pool",))

_KNOWN: fusion.Known = {
    **KNOWN,
    MaxPool2dSame: fusion.as_written("max_pool", MaxPool2dSame, rules=fusion.max_pool_rules(0)),
    timm.layers.PatchEmbed: fusion.as_written(
        "patch_embed",
        timm.layers.PatchEmbed,
        rules=(
            ("{name} flattens, pads or has another format", lambda m, x: m.flatten or m.dynamic_img_pad),
            ("{name} is for another size of image", lambda m, x: m.img_size not in (None, tuple(x.shape[2:]))),
        ),
    ),
    Attention: fusion.as_written(
        "attention",
        Attention,
        timm_nest.Attention,
        rules=ATTENTION_RULES,
        parts=fusion.ATTENTION_PARTS,
        options=_options,
    ),
    TransformerLayer: fusion.as_written("layer", TransformerLayer, timm_nest.TransformerLayer),
    ConvPool: fusion.as_written("pool", ConvPool, timm_nest.ConvPool),
    NestLevel: fusion.as_written("level", NestLevel, timm_nest.NestLevel),
    Nest: fusion.as_written(
        "nest",
        Nest,
        timm_nest.Nest,
        methods=("forward_features",),
        rules=(("{name} cuts the image in another way", lambda m, x: _is_in_other_blocks(m, x)),),
    ),
}


# --- what explain tells of timm's classes -----------------------------------------------------------------------------


def _tell_nest(name: str, model: Any, like: Like) -> Iterator[Row]:
    embed = model._modules.get("patch_embed")
    height, width = getattr(embed, "img_size", None) or (1, 1)
    x = like(getattr(getattr(embed, "proj", None), "in_channels", 1), height, width)
    why = fusion.everywhere(x) or fusion.why_not(x, _nest_parts(model), _KNOWN)
    why = why or fusion.flags(x, "the model", model, _KNOWN[Nest])
    if why:
        yield Row(name, "between levels", "its modules", str(why))
    else:
        yield Row(name, "between levels", "blocks, as the levels have them")


ADAPTER = Adapter(
    classes=(Attention, TransformerLayer, ConvPool, NestLevel, Nest),
    known=_KNOWN,
    told={
        TransformerLayer: partial(tell_layer, halves=partial(fusion.halves, known=_KNOWN), chains=True),
        Attention: partial(tell_attention, heads=lambda attn: attn.num_heads),
        ConvPool: partial(tell_aggregation, parts=_pool_parts, known=_KNOWN),
        Nest: _tell_nest,
    },
)
