"""How every layer of a model would be computed on this machine: by which kernels, and why not by faster ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nest_fast import frozen, fusion
from nest_fast.modules import KNOWN, BlockAggregation, BlockAttention, PatchEmbed, TransformerLayer
from nest_fast.ops import _plan

__all__ = ["Explanation", "Row", "explain"]


class Row(NamedTuple):
    """One step of a model.

    Attributes:
        name: of the module, as ``named_modules`` has it.
        what: which step of it: "attn sub-layer", "mlp sub-layer", "aggregation", ...
        how: the operation and its kernel, or "its modules".
        why: what keeps it from the fast way; "" where this is it.
    """

    name: str
    what: str
    how: str
    why: str = ""


@dataclass(frozen=True)
class Explanation:
    """The rows of :func:`nest_fast.explain`; ``print`` shows them as a table."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        named = (row._replace(name=row.name or "(model)") for row in self.rows)
        table = [Row("module", "step", "computed by", "why not faster"), *named]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        columns = [[cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)] for row in table]
        lines = ["  ".join([*cells, row.why]).rstrip() for cells, row in zip(columns, table, strict=True)]
        return "\n".join([*lines, *(f"missing: {what}" for what in self.missing)])


Like = Callable[..., Tensor]  # makes a tensor as a module would get it, with these sizes after the batch
Tell = Callable[[str, Any, Like], Iterator[Row]]


def explain(model: nn.Module, x: Tensor | None, others: dict[type, Tell]) -> Explanation:
    """See :func:`nest_fast.explain`; ``others`` tells of the classes of other libraries."""
    return Explanation(tuple(_rows(model, x, _OURS | others)), tuple(_plan.missing()))


def _rows(model: nn.Module, x: Tensor | None, tables: dict[type, Tell]) -> Iterator[Row]:
    blocks: tuple[int, ...] = (1, 1)  # the (T, N) of the level that is being told
    told = ""
    for name, module in model.named_modules():
        pos_embed = getattr(module, "pos_embed", None)
        if isinstance(pos_embed, Tensor) and pos_embed.dim() in (3, 4):
            blocks = tuple(pos_embed.shape[-3:-1])  # of an image that is one block (1, N)
        tell = next((tables[cls] for cls in type(module).__mro__ if cls in tables), None)
        if tell is None or (told and name.startswith(told)):
            continue
        if isinstance(tell, partial) and tell.func is tell_layer:
            told = f"{name}." if name else ""  # its rows say all of what is inside
        yield from tell(name, module, partial(_like, module, x, blocks))


def _like(module: nn.Module, x: Tensor | None, blocks: tuple[int, ...], *sizes: int) -> Tensor:
    """``(B, *sizes)``, or ``(B, T, N, C)`` of one size C; dtype and device of ``x``, else of the module's weights."""
    given = next(module.parameters(), torch.empty(0)) if x is None else x
    sizes = (*blocks, *sizes) if len(sizes) == 1 else sizes
    return torch.empty(1, dtype=given.dtype, device=given.device).expand(1 if x is None else len(x), *sizes)


def tell_layer(
    name: str,
    layer: Any,
    like: Like,
    *,
    halves: Callable[[Any], Sequence[fusion.Half]],
    blocks: Callable[[Any], tuple[int, int]] | None = None,
    by_parts: Callable[[Any], int] | None = None,
    windowed: bool = False,
    chains: bool = False,
) -> Iterator[Row]:
    """The two sub-layers of a layer.

    Args:
        name, layer, like: of a :data:`Tell`.
        halves: the sub-layers of ``layer``.
        blocks: T and N of its attention, where the model's position embedding does not say.
        by_parts: of attention that is one operation after the other: how many dimensions that adds to a head.
        windowed: whether its attention is given the windows of an image, which has several, or a bias.
        chains: whether :func:`nest_fast.fusion.run_layers` runs it.
    """
    both = halves(layer)
    for half in both:
        channels = _channels(half)
        x = like(channels) if blocks is None else like(*blocks(layer), channels)
        chained = chains and fusion.is_chained(x)
        why = fusion.everywhere(x) or half.why_not(x)
        options = half.known[type(half.body)].options if type(half.body) in half.known else None
        extra_dim = by_parts(layer) if by_parts and options and not why else 0
        attention = _plan.attention(x, options(half.body).num_heads, extra_dim, windowed) if options else None
        if why:
            plan = _called(why, None if half.operation else attention)  # there its library's attention is called
        elif by_parts and attention:
            plan = f"{_plan.linear(x, list(layer.parameters()))}; {attention[0]}", attention[1]
        elif chains and not options and _is_projected(x, *both):
            plan = "projection_mlp: Triton", ""
        elif fusion.chosen(x, half) == "triton":
            plan = f"{'attention' if options else 'mlp'}_layer: Triton", ""
        else:
            plan = _frozen(half.body, x, _plan.sub_layer(x, attention, list(layer.parameters()), chained))
        yield Row(name, f"{half.names[1]} sub-layer", *plan)


def _is_projected(x: Tensor, attention: fusion.Half, mlp: fusion.Half) -> bool:
    """Whether projection_mlp's kernel computes the MLP sub-layer with what is before it."""
    weights = map(fusion.weights_of, (attention, mlp))
    return not attention.why_not(x) and fusion.chosen_projection_mlp(x, attention, mlp, *weights) == "triton"


def _channels(half: fusion.Half) -> int:
    """The channels of the sub-layer's input, as far as its modules tell."""
    inside = getattr(half.body, "_modules", {})
    first = inside.get("qkv", inside.get("fc1"))
    known = getattr(first, "in_features", None)
    return known if known is not None else getattr(half.norm, "normalized_shape", (1,))[-1]


def _frozen(module: Any, x: Tensor, plan: _plan.Plan) -> _plan.Plan:
    """The plan, or why a frozen module would raise an error now."""
    if not frozen.is_frozen(module):
        return plan
    why = frozen.why_not(module, x, list(module.parameters()))
    if why:
        return "an error", why
    return (f"{plan[0]}, frozen" if "C++" in plan[0] else plan[0], plan[1])


def _called(why: object, inside: _plan.Plan | None = None) -> _plan.Plan:
    return "its modules" + (f"; {inside[0]}" if inside else ""), str(why)


def tell_attention(name: str, attn: Any, like: Like, *, heads: Callable[[Any], int]) -> Iterator[Row]:
    """Attention outside a layer."""
    yield Row(name, "attention", *_plan.attention(like(getattr(attn.proj, "in_features", 1)), heads(attn)))


def tell_aggregation(name: str, pool: Any, like: Like, *, parts: Callable, known: fusion.Known) -> Iterator[Row]:
    conv = pool._modules.get("conv")
    x = like(conv.in_channels if isinstance(conv, nn.Conv2d) else 1)
    why = fusion.everywhere(x) or fusion.why_not(x, parts(pool), known)
    yield Row(name, "aggregation", *(_called(why) if why else _frozen(pool, x, _plan.aggregation(x, pool.conv.weight))))


def _tell_patches(name: str, embed: Any, like: Like) -> Iterator[Row]:
    x = like(getattr(embed.proj, "in_channels", 1), 1, 1)
    why = fusion.everywhere(x) or fusion.why_not(x, embed.parts(), KNOWN)
    yield Row(name, "patch embedding", *(_called(why) if why else _plan.patches(x)))


_OURS: dict[type, Tell] = {
    TransformerLayer: partial(tell_layer, halves=partial(fusion.halves, known=KNOWN), chains=True),
    BlockAttention: partial(tell_attention, heads=lambda attn: attn.num_heads),
    BlockAggregation: partial(tell_aggregation, parts=BlockAggregation.parts, known=KNOWN),
    PatchEmbed: _tell_patches,
}
