"""Fast forms of timm's NesT layers, given to instances by changing their class.

A class here is a subclass of the timm class of the same name, with another ``forward`` and no state of its own: what a
module is (parameters, buffers, hooks, keys, flags) stays untouched, deepcopy and pickle work, and giving the base class
back undoes it. What may be computed around is decided in :mod:`nest_fast.fusion`.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import timm.layers
import timm.models.nest as timm_nest
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from nest_fast import fusion
from nest_fast.explanation import Like, Row, Tell, explain, tell_aggregation, tell_attention, tell_layer
from nest_fast.integrations._trial import Trial, try_out
from nest_fast.ops import unblockify

__all__ = ["TOLD", "Report", "accelerate", "restore"]


def _instead_of(base: type, name: str = "forward") -> Callable:
    """A method in the place of timm's: stands back where that was patched, given back, or all modules are called."""
    ((_, _, timms),) = fusion.as_written("", base, methods=(name,)).methods

    def decorate(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        @wraps(method)
        def either(self: Any, x: Tensor) -> Tensor:
            now = getattr(base, name)
            if now is not timms or getattr(type(self), name) is timms or fusion.everywhere(x):
                return now(self, x)
            return method(self, x)

        return either

    return decorate


class _Fast:
    """What the classes here share; also how they are told."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "model: expected one for torch.jit.script, got an accelerated one;"
            " nest_fast.restore(model) gives timm's back"
        )


class Attention(_Fast, timm_nest.Attention):
    @_instead_of(timm_nest.Attention)
    def forward(self, x: Tensor) -> Tensor:
        inside = (("attn_drop", self.attn_drop, fusion.SILENT),)
        if fusion.flags(x, "attn", self, _KNOWN[Attention]) or fusion.why_not(x, inside, _KNOWN):
            return timm_nest.Attention.forward(self, x)  # it drops weights, and shows them, in its own order
        return self.proj_drop(fusion.attend(x, self, _options(self), _KNOWN))


class TransformerLayer(_Fast, timm_nest.TransformerLayer):
    @_instead_of(timm_nest.TransformerLayer)
    def forward(self, x: Tensor) -> Tensor:
        return fusion.run(x, self, _KNOWN)


class ConvPool(_Fast, timm_nest.ConvPool):
    @_instead_of(timm_nest.ConvPool)
    def forward(self, x: Tensor) -> Tensor:
        if fusion.why_not(x, _pool_parts(self), _KNOWN):
            return timm_nest.ConvPool.forward(self, x)
        return fusion.aggregate(x.permute(0, 2, 3, 1), self, _padding(self)).permute(0, 3, 1, 2)


class NestLevel(_Fast, timm_nest.NestLevel):
    @_instead_of(timm_nest.NestLevel)
    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x).permute(0, 2, 3, 1)
        grid_size = (x.shape[1] // self.block_size, x.shape[2] // self.block_size)
        x = _run_layers(self, fusion.cut(x, self.block_size, self.pos_embed))
        return unblockify(x, grid_size).permute(0, 3, 1, 2)


class Nest(_Fast, timm_nest.Nest):
    @_instead_of(timm_nest.Nest, "forward_features")
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
    encoder = level.transformer_encoder
    return checkpoint_seq(encoder, x) if level.grad_checkpointing else fusion.run_layers(x, encoder, _KNOWN)


def _padding(pool: Any) -> str:
    return "same" if isinstance(pool.pool, MaxPool2dSame) else "symmetric"


# --- what fusion knows of timm's classes ------------------------------------------------------------------------------


def _options(attn: Any) -> fusion.Attention:
    """timm's fused attention has a scale of its own."""
    return fusion.Attention(attn.num_heads, None if attn.fused_attn else attn.scale, head_minor=True)


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
    **fusion.TORCH,
    timm.layers.LayerNorm: fusion.as_written(
        "norm",
        timm.layers.LayerNorm,
        rules=(*fusion.NORM_RULES, ("{name} is timm's fast norm", lambda m, x: m._fast_norm)),
    ),
    timm.layers.DropPath: fusion.as_written("drop_path", timm.layers.DropPath, rate="drop_prob"),
    timm.layers.Mlp: fusion.as_written("mlp", timm.layers.Mlp, parts=(*fusion.MLP_PARTS, ("norm", fusion.IDENTITY))),
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
        rules=(("{name}'s attention drops", lambda m, x: m.training and getattr(m.attn_drop, "p", 1.0) != 0.0),),
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


# --- accelerate and restore -------------------------------------------------------------------------------------------


_CLASSES = (Attention, TransformerLayer, ConvPool, NestLevel, Nest)
_FAST: dict[type, type] = {fast.__mro__[2]: fast for fast in _CLASSES}


@dataclass(frozen=True)
class Report:
    """What :func:`nest_fast.accelerate` did.

    Attributes:
        replaced, already: names of modules and the classes they have, or had before, a fast form of.
        kept: names of modules that are computed as timm wrote them, and why.
        missing: what this machine could use and has not, such as the compiled extension.
        trial: what became of errors and speed on the example, if there was one.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    trial: Trial | None = None

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, already fast {len(self.already)}, kept {len(self.kept)}"]
        lines += [] if self.trial is None else [f"  {self.trial}"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.replaced.items()]
        lines += [f"  kept {name or '(model)'}: {why}" for name, why in self.kept.items()]
        return "\n".join([*lines, *(f"  missing: {what}" for what in self.missing)])


def accelerate(model: nn.Module, example: Any = None, tolerance: float | None = None) -> Report:
    replaced, already, kept, changes = {}, {}, {}, []
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, _Fast):
            already[name] = kind.__name__
        elif isinstance(module, tuple(_FAST)):
            why_not = _why_not(module)
            if why_not is None:
                changes.append((module, _FAST[kind]))
                replaced[name] = kind.__name__
            else:
                kept[name] = why_not
    if not replaced and not already:
        reasons = "; ".join(f"{name}: {why}" for name, why in kept.items())
        raise ValueError(
            f"model: expected one with timm's NesT layers, got {type(model).__name__} with nothing to replace"
            + (f" ({reasons})" if reasons else "")
        )
    trial = None if example is None else _tried(model, changes, example, tolerance)
    _give(changes)
    explained = explain(model, None, TOLD)
    for row in explained:
        if row.how.startswith("its modules"):
            kept[row.name] = "; ".join(filter(None, (kept.get(row.name), row.why)))
    return Report(replaced, already, kept, explained.missing, trial)


def _tried(model: nn.Module, changes: list[tuple[Any, type]], example: Any, tolerance: float | None) -> Trial:
    """What ``changes`` bring on the example; they are undone again."""
    before = [(module, type(module)) for module, _ in changes]
    try:
        trial = try_out(model, example, lambda: _give(before), lambda: _give(changes), tolerance)
    finally:
        _give(before)
    if not trial.error <= trial.allowed:
        raise RuntimeError(
            f"example: expected outputs within {trial.allowed:.1e} of float64, where the model's own error is"
            f" {trial.own_error:.1e}, got {trial.error:.1e}; the model is as it was"
        )
    return trial


def restore(model: nn.Module) -> int:
    changes, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, _Fast):
            timms = _without_fast(type(module))
            if timms is None:
                left.append(f"{name or '(model)'}: {type(module).__name__}")
            else:
                changes.append((module, timms))
    _give(changes)
    if left:
        warnings.warn(
            f"restore: left what was derived from the fast classes, whose methods may need them: {', '.join(left)}",
            stacklevel=3,
        )
    return len(changes)


def _give(classes: list[tuple[Any, type]]) -> None:
    """All modules their classes, or none."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, kind in classes:
            module.__class__ = kind
    except BaseException:
        for module, kind in before:
            module.__class__ = kind
        raise


def _without_fast(kind: type) -> type | None:
    """timm's class in the place of a fast one, also below a class that was made around it (FSDP, parametrizations).

    None where functions of such a class name it (``super()``) and so cannot move to another one.
    """
    if kind in _CLASSES:
        return kind.__mro__[2]
    names_itself = any(
        "__class__" in f.__code__.co_freevars for f in vars(kind).values() if isinstance(f, types.FunctionType)
    )
    if names_itself:
        return None
    bases = [_without_fast(base) if issubclass(base, _Fast) else base for base in kind.__bases__]
    if None in bases:
        return None
    attributes = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(bases), attributes)  # type: ignore[arg-type]


def _why_not(module: Any) -> str | None:
    """Why a module of timm's keeps its class: it is not what timm wrote."""
    kind = type(module)
    if kind not in _FAST:
        return f"{kind.__name__} is a subclass of timm's class, and may compute something else"
    written = _KNOWN[_FAST[kind]]
    if any(getattr(cls, name) is not method for cls, name, method in written.methods):
        return f"a method of its class {kind.__name__} was patched"
    if not vars(module).keys().isdisjoint(name for _, name, _ in written.methods):
        return "its forward was patched on the instance"
    return None


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


def _tell_timms(name: str, module: Any, like: Like) -> Iterator[Row]:
    yield Row(
        name, type(module).__name__, "its modules", _why_not(module) or "nest_fast.accelerate(model) was not called"
    )


TOLD: dict[type, Tell] = {
    **dict.fromkeys(_FAST, _tell_timms),
    TransformerLayer: partial(tell_layer, known=_KNOWN),
    Attention: partial(tell_attention, heads=lambda attn: attn.num_heads),
    ConvPool: partial(tell_aggregation, parts=_pool_parts, known=_KNOWN),
    Nest: _tell_nest,
}
del TOLD[timm_nest.NestLevel]
