"""Fast forms of timm's NesT layers, given to instances by changing their class.

A class here is a subclass of the timm class of the same name, with another ``forward`` and no state of its own: what a
module is (parameters, buffers, hooks, keys, flags) stays untouched, deepcopy and pickle work, and giving the base class
back undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import timm.models.nest as timm_nest
import torch
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from nest_fast.modules import DROP_PATHS, LAYER_NORMS, aggregate, attend, fused_layer, has_hooks, run_layers
from nest_fast.ops import blockify, unblockify

__all__ = ["Report", "accelerate", "restore"]


LAYER_NORMS.add(timm.layers.LayerNorm)
DROP_PATHS[timm.layers.DropPath] = "drop_prob"


class Attention(timm_nest.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.attend(x))

    def attend(self, x: Tensor, norm: nn.Module | None = None, **options) -> Tensor:
        return attend(x, self, norm, head_minor=True, **options)


class TransformerLayer(timm_nest.TransformerLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = fused_layer(x, self) if self.is_known() else None
        return super().forward(x) if y is None else y

    def is_known(self) -> bool:
        """Whether the parts are those of ``nest_fast.TransformerLayer``."""
        known = type(self.attn) is Attention and type(self.mlp) is timm.layers.Mlp
        return known and isinstance(self.mlp.norm, nn.Identity)


class ConvPool(timm_nest.ConvPool):
    def forward(self, x: Tensor) -> Tensor:
        if has_hooks(self.conv, self.norm, self.pool):
            return super().forward(x)
        return aggregate(x, self.conv, self.norm, "same" if isinstance(self.pool, MaxPool2dSame) else "symmetric")


class NestLevel(timm_nest.NestLevel):
    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x).permute(0, 2, 3, 1)
        grid_size = (x.shape[1] // self.block_size, x.shape[2] // self.block_size)
        x = blockify(x, self.block_size, pos_embed=self.pos_embed)
        x = self._run_layers(x)
        return unblockify(x, grid_size).permute(0, 3, 1, 2)

    def _run_layers(self, x: Tensor) -> Tensor:
        encoder = self.transformer_encoder
        if self.grad_checkpointing:
            return checkpoint_seq(encoder, x)
        known = all(type(layer) is TransformerLayer and layer.is_known() for layer in encoder)
        if type(encoder) is not nn.Sequential or not known or has_hooks(encoder):
            return encoder(x)
        return run_layers(x, list(encoder), TransformerLayer)


class PatchEmbed(timm.layers.PatchEmbed):
    def forward(self, x: Tensor) -> Tensor:
        # Channels-last in, channels-last out: the level's blockify then reads rows of channels.
        return super().forward(x.contiguous(memory_format=torch.channels_last))


_KINDS = (timm_nest.Attention, timm_nest.TransformerLayer, timm_nest.ConvPool, timm_nest.NestLevel)
_FAST: dict[type, type] = {
    fast.__mro__[1]: fast for fast in (Attention, TransformerLayer, ConvPool, NestLevel, PatchEmbed)
}


def _conv_pool_why_not(module: Any) -> str | None:
    conv, norm, pool = module.conv, module.norm, module.pool
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if type(conv) is not nn.Conv2d or geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or conv.padding_mode != "zeros":
        return f"its convolution is not a plain 3x3 with padding 1: {conv}"
    if type(norm) not in LAYER_NORMS or norm.weight is None or norm.bias is None:
        return f"its norm is not an affine LayerNorm: {norm}"
    if type(pool) not in (nn.MaxPool2d, MaxPool2dSame):
        return f"its pool is not a max-pool: {pool}"
    return None


_WHY_NOT: dict[type, Callable[[Any], str | None]] = {timm_nest.ConvPool: _conv_pool_why_not}


@dataclass(frozen=True)
class Report:
    """What :func:`nest_fast.accelerate` did: names of modules and their classes, or the reason why not."""

    replaced: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, already fast {len(self.already)}, kept {len(self.kept)}"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.replaced.items()]
        lines += [f"  kept {name or '(model)'}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    report = Report()
    inside = _nest_modules(model)
    for name, module in inside.items():
        kind = type(module)
        if kind in _FAST.values():
            report.already[name] = kind.__name__
            continue
        why_not = _why_not(module)
        if why_not is None:
            module.__class__ = _FAST[kind]
            report.replaced[name] = kind.__name__
        else:
            report.kept[name] = why_not
    if not report.replaced and not report.already:
        reasons = "; ".join(f"{name}: {why}" for name, why in report.kept.items())
        raise ValueError(
            f"model: wanted one with timm's NesT layers, got {type(model).__name__} with nothing to replace"
            + (f" ({reasons})" if reasons else "")
        )
    return report


def restore(model: nn.Module) -> int:
    accelerated = [module for module in model.modules() if type(module) in _FAST.values()]
    for module in accelerated:
        module.__class__ = type(module).__mro__[1]
    return len(accelerated)


def _nest_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of timm's NesTs inside ``model`` that have a fast form; a patch embedding only inside a ``Nest``."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, _KINDS):
            found[name] = module
        elif isinstance(module, timm_nest.Nest) and isinstance(module.patch_embed, timm.layers.PatchEmbed):
            found[f"{name}.patch_embed".lstrip(".")] = module.patch_embed
    return found


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in _FAST:
        return f"{kind.__name__} is a subclass of timm's class, and may compute something else"
    if "forward" in vars(module):
        return "its forward was patched on the instance"
    check = _WHY_NOT.get(kind)
    return check(module) if check else None
