"""What a NesT looks at: GradCAT, the paper's walk down the tree of blocks, and the attention inside them.

Both work on :class:`nest_fast.NesT` and on timm's, accelerated or not, alone or inside another module, and leave the
model as it was: mode, gradients, hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nest_fast.ops import _checks, unblockify

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GradCAT", "attention_maps", "gradcat"]

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class GradCAT:
    """Where the evidence for a class lies: a walk from the root of the tree of blocks to one of its leaves.

    Attributes:
        target: the class.
        logit: its logit.
        path: the quarter taken at each node, 0 to 3 in row-major order: ``num_levels - 1`` of them, none for one level.
        blocks: ``(row, column)`` of the block in the grid of each level: ``num_levels``, the root's ``(0, 0)`` first.
        boxes: the same blocks as ``(left, top, right, bottom)`` in pixels of the image, the whole image first.
        maps: activation times gradient of the logit, added up over channels: for each level ``(H', W')``, the root's,
            the smallest, first; float32. Positive speaks for the class.
    """

    target: int
    logit: float
    path: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    boxes: tuple[Box, ...]
    maps: tuple[Tensor, ...]

    def draw(self, photo: Image, level: int | None = None) -> Image:
        """A copy of ``photo``, which may be larger or smaller than the model's image, with the boxes of the walk.

        Args:
            photo: the picture that the model saw, before it was resized and normalised, but not cropped otherwise.
            level: lay this one of ``maps`` over it, red where it speaks for the class, blue where against it.

        Raises:
            ValueError: there is no such level.
        """
        from PIL import ImageDraw

        canvas = photo.convert("RGB")
        if level is not None:
            if not -len(self.maps) <= level < len(self.maps):
                raise ValueError(f"level: expected one of {len(self.maps)} maps, got {level}")
            canvas = _overlay(canvas, self.maps[level])
        draw = ImageDraw.Draw(canvas)
        _, _, width, height = self.boxes[0]
        sx, sy = canvas.width / width, canvas.height / height
        line = max(2, round(min(canvas.size) / 100))
        for i, (left, top, right, bottom) in enumerate(self.boxes):
            strength = (i + 1) / len(self.boxes)
            colour = (255, round(230 * (1 - strength)), 0)  # yellow to red
            corners = (left * sx, top * sy, right * sx - 1, bottom * sy - 1)
            draw.rectangle(corners, outline=colour, width=line)
        return canvas


def gradcat(model: nn.Module, image: Tensor, target: int | None = None) -> GradCAT:
    """GradCAT: walk down the tree of blocks to the part of ``image`` that speaks most for a class.

    At each node, the root first, the walk enters the quarter of the node's block whose activation times gradient of
    the class's logit, averaged over the quarter, is largest. A node's activations are what its level's layers are
    given: the features that its children handed up, whose quarters are the children. (Behind the layers attention has
    carried what speaks for the class to other tokens.)

    Args:
        model: a classifier that is, or has inside, one :class:`nest_fast.NesT` or one of timm's; accelerated,
            compiled or plain, in any mode: it is evaluated, and its own mode given back.
        image: ``(1, C, H, W)`` or ``(C, H, W)``, as the model takes it.
        target: the class; that of the highest logit if None.

    Returns:
        A :class:`GradCAT`: the path, its blocks and boxes, a map for each level; ``.draw(photo)`` shows it.

    Raises:
        TypeError, ValueError: ``model`` is no such classifier, ``image`` not one image, or there is no such class.

    Source: Zhang et al., AAAI 2022 (arXiv 2105.12723), the algorithm GradCAT. Its minus sign before the gradient is
    left out: with it the walk avoids the object (examples/gradcat_objects.py measures both).
    """
    nest = _nest(model)
    image = _image(image)
    layers = [level.transformer_encoder[0] for level in nest.levels]
    given: dict[nn.Module, Tensor] = {}
    with _evaluated(model), torch.inference_mode(False), torch.enable_grad():
        with _listening(layers, lambda layer, x, _: given.setdefault(layer, x)):
            # Some have frozen every parameter; then only the image asks for gradients.
            logits = model(image.detach().clone().requires_grad_())
        _check_logits(logits)
        target = int(logits[0].argmax()) if target is None else _class(target, logits.shape[1])
        activations = [given[layer] for layer in layers]
        gradients = torch.autograd.grad(logits[0, target], activations)
    relevances = [(x * dx).detach().float().sum(-1, keepdim=True) for x, dx in zip(activations, gradients, strict=True)]
    maps = tuple(_map(level, x) for level, x in zip(nest.levels[::-1], relevances[::-1], strict=True))
    path, blocks = _walk(maps)
    boxes = tuple(_box(i, block, image.shape[-2:]) for i, block in enumerate(blocks))
    return GradCAT(target, logits[0, target].item(), path, blocks, boxes, maps)


def attention_maps(model: nn.Module, image: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The attention weights of every block and head, as the softmax gives them, without dropout.

    They are computed from the packed projections that the model makes on the way, in float32 at least; the model itself
    never has them in memory. A map of ``nest_tiny`` at 224 px takes 1.8 to 7.4 MB an image and layer.

    Args:
        model: as for :func:`gradcat`; needs no head.
        image: ``(B, C, H, W)`` or ``(C, H, W)``.
        layers: names of attention modules, as ``model.named_modules()`` has them; all if None.

    Returns:
        By the module's name, in the order of the layers, ``(B, T, heads, N, N)``: image blocks, queries by keys; each
        row of N keys adds up to 1.

    Raises:
        TypeError, ValueError: ``model`` has no such NesT inside, ``image`` is no image, a name is none of a layer.
    """
    _nest(model)
    image = image[None] if isinstance(image, Tensor) and image.dim() == 3 else image
    _checks.tensor("image", image, "(B, C, H, W)")
    known = {name: module for name, module in model.named_modules() if _is_attention(module)}
    for name in layers or ():
        _checks.choice("layers", name, tuple(known))
    wanted = {name: module for name, module in known.items() if layers is None or name in layers}
    packed: dict[nn.Module, Tensor] = {}
    projections = [module.qkv for module in wanted.values()]
    with _evaluated(model), torch.no_grad(), _listening(projections, lambda qkv, _, out: packed.setdefault(qkv, out)):
        model(image)
    return {name: _weights(module, packed[module.qkv].detach()) for name, module in wanted.items()}


# --- the model --------------------------------------------------------------------------------------------------------


def _nest(model: nn.Module) -> Any:
    """The NesT inside ``model``: what has a list of levels with layers, as ours and timm's have."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if _is_nest(module)]
    if len(found) != 1:
        raise ValueError(f"model: expected one NesT inside, got {type(model).__name__} with {len(found)}")
    return found[0]


def _is_nest(module: nn.Module) -> bool:
    levels = module._modules.get("levels")  # its own: what torch.compile wraps has the attributes of what is inside
    if not isinstance(levels, (nn.ModuleList, nn.Sequential)) or len(levels) == 0:
        return False
    return all(len(getattr(level, "transformer_encoder", ())) > 0 for level in levels)


def _is_attention(module: Any) -> bool:
    return isinstance(getattr(module, "qkv", None), nn.Module) and hasattr(module, "num_heads")


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _listening(modules: Sequence[nn.Module], say: Callable[[nn.Module, Tensor, Tensor], object]) -> Iterator[None]:
    """``say(module, input, output)`` whenever one of ``modules`` is called; to be heard, fused layers call it."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # a result would replace the output
        say(module, args[0], output)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call hooks that came later
            yield
    finally:
        for handle in handles:
            handle.remove()


def _image(image: Tensor) -> Tensor:
    image = image[None] if isinstance(image, Tensor) and image.dim() == 3 else image
    if _checks.tensor("image", image, "(1, C, H, W)").shape[0] != 1:
        raise ValueError(f"image: expected one, (1, C, H, W) or (C, H, W), got shape {tuple(image.shape)}")
    return image


def _check_logits(logits: object) -> None:
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 1:
        raise ValueError(f"model: expected a classifier that gives (1, classes), got {shape}")


def _class(target: int, classes: int) -> int:
    if isinstance(target, bool) or not isinstance(target, int):
        raise TypeError(f"target: expected the number of a class or None, got {target!r}")
    if not 0 <= target < classes:
        raise ValueError(f"target: expected one of {classes} classes, 0 to {classes - 1}, got {target}")
    return target


# --- the walk ---------------------------------------------------------------------------------------------------------


def _map(level: Any, x: Tensor) -> Tensor:
    """Blocks ``(1, T, N, 1)`` of a level as an image ``(H', W')``."""
    return unblockify(x, math.isqrt(x.shape[1]), level.block_size)[0, :, :, 0]


def _walk(maps: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    row, column = 0, 0
    path, blocks = [], [(0, 0)]
    for i, values in enumerate(maps[:-1]):
        edge = 2**i  # of the grid of blocks
        height, width = values.shape[0] // edge, values.shape[1] // edge
        block = values[row * height : (row + 1) * height, column * width : (column + 1) * width]
        # Where a block's edge is odd, the quarters share its middle.
        quarter = int(F.adaptive_avg_pool2d(block[None], 2).argmax())
        row, column = 2 * row + quarter // 2, 2 * column + quarter % 2
        path.append(quarter)
        blocks.append((row, column))
    return tuple(path), tuple(blocks)


def _box(depth: int, block: tuple[int, int], size: Sequence[int]) -> Box:
    height, width = size[0] / 2**depth, size[1] / 2**depth
    row, column = block
    return round(column * width), round(row * height), round((column + 1) * width), round((row + 1) * height)


def _overlay(photo: Image, values: Tensor) -> Image:
    from PIL import Image

    strength = values.abs() / values.abs().max().clamp(min=1e-30)
    alpha = Image.fromarray((160 * strength).byte().cpu().numpy()).resize(photo.size, Image.Resampling.NEAREST)
    sign = Image.fromarray((values > 0).byte().mul(255).cpu().numpy()).resize(photo.size, Image.Resampling.NEAREST)
    colour = Image.composite(
        Image.new("RGB", photo.size, (220, 0, 0)), Image.new("RGB", photo.size, (0, 60, 220)), sign
    )
    return Image.composite(colour, photo, alpha)


# --- attention --------------------------------------------------------------------------------------------------------


def _weights(attn: Any, packed: Tensor) -> Tensor:
    """``softmax(scale * q @ k^T)`` from q, k and v in one ``(B, T, N, C + 2 kv)``."""
    heads = attn.num_heads
    kv_heads = 1 if getattr(attn, "multi_query", False) else heads
    x = packed.to(torch.promote_types(packed.dtype, torch.float32)).unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, _ = x.transpose(2, 3).split((heads, kv_heads, kv_heads), 2)  # (B, T, heads, N, head_dim)
    return (attn.scale * q @ k.transpose(-2, -1)).softmax(-1)
