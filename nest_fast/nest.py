"""NesT, the nested hierarchical transformer, kept in block layout from the patch embedding to the head.

Source: Zhang et al., AAAI 2022 (arXiv 2105.12723); the authors' ``models/nest_net.py``. Constructor arguments,
``forward_*`` methods and feature information are those of timm's ``Nest``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nest_fast import fusion, weights
from nest_fast.modules import KNOWN, BlockAggregation, PatchEmbed, TransformerLayer, layer_norm
from nest_fast.ops import _checks, layer_norm_mean, unblockify

__all__ = [
    "NesT",
    "nest_base",
    "nest_base_s16_32",
    "nest_small",
    "nest_small_s16_32",
    "nest_tiny",
    "nest_tiny_s16_32",
]

POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class NesTLevel(nn.Module):
    """One level of the hierarchy: block aggregation (from the second level on), position embedding, layers.

    Shape: ``(B, T_in, N, C_in)`` → ``(B, T, N, C)``, with ``T_in = 4 T`` where there is an aggregation.
    """

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int],
        block_size: tuple[int, int],
        pool: BlockAggregation | None,
        layers: Sequence[TransformerLayer],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.block_size = block_size
        self.grad_checkpointing: bool | str = False
        self.pool = pool
        num_blocks, seq_length = grid_size[0] * grid_size[1], block_size[0] * block_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_blocks, seq_length, dim, device=device, dtype=dtype))
        self.transformer_encoder = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is None:
            x = x + self.pos_embed
        else:
            gh, gw = self.grid_size
            x = self.pool(x, (2 * gh, 2 * gw), self.block_size, self.pos_embed)
        if not self.grad_checkpointing or self.grad_checkpointing == "gelu":
            return fusion.run_layers(x, self.transformer_encoder, KNOWN, keep_gelu=not self.grad_checkpointing)
        for layer in self.transformer_encoder:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def to_image(self, x: Tensor) -> Tensor:
        """``(B, T, N, C)`` → ``(B, C, H, W)`` in channels-last memory."""
        return unblockify(x, self.grid_size, self.block_size).permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        key = prefix + "pos_embed"
        saved = state_dict.get(key)
        if isinstance(saved, Tensor) and saved.dim() == 4 and saved.shape[1:3] != self.pos_embed.shape[1:3]:
            try:
                state_dict[key] = weights.resize_pos_embed(saved, self.grid_size, self.block_size)
            except ValueError as error:  # load_state_dict collects all errors and raises them together
                errors: list[str] = args[-1]
                errors.append(f"{key} cannot be resized: {error}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class GlobalPool(nn.Module):
    """Pooling before the head: ``(B, C, H, W)`` → ``(B, C * feat_mult())``, or unchanged for "".

    ``pool_type`` is "avg", "max", "avgmax" (their mean), "catavgmax" (both) or ""; the attributes are those of timm's
    ``SelectAdaptivePool2d``.
    """

    def __init__(self, pool_type: str) -> None:
        super().__init__()
        _checks.choice("global_pool", pool_type, POOLS)
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        if self.pool_type == "avg":
            return x.mean((2, 3))
        if self.pool_type == "max":
            return x.amax((2, 3))
        if self.pool_type == "avgmax":
            return 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
        if self.pool_type == "catavgmax":
            return torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)
        return x

    def is_identity(self) -> bool:
        return not self.pool_type

    def feat_mult(self) -> int:
        return 2 if self.pool_type == "catavgmax" else 1

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"


class NesT(nn.Module):
    """NesT for images of ``img_size``, by default NesT-B at 224 px.

    Args:
        img_size: height and width in pixels, an int for a square. ``patch_size * 2 ** (num_levels - 1)`` has to
            divide both: the grid of the first level is ``2 ** (num_levels - 1)`` blocks high and wide.
        in_chans: channels of the image.
        patch_size: edge of a patch in pixels.
        num_levels: levels of the hierarchy; the last one has a single block.
        embed_dims, num_heads, depths: channels, heads and layers of each level; an int holds for all.
        num_classes: outputs of the head; 0 for none.
        mlp_ratio: hidden over outer channels of the MLP.
        qkv_bias: whether the packed projection has a bias.
        drop_rate: dropout before the head.
        proj_drop_rate, attn_drop_rate: dropout after projections and of attention weights.
        drop_path_rate: stochastic depth of the last layer, growing from 0 at the first; the authors' rates are 0.2,
            0.3 and 0.5 for tiny, small and base, 0.1 at 32 px.
        norm_layer: called as ``norm_layer(dim, device=, dtype=)``, builds a ``torch.nn.LayerNorm``; eps 1e-6 if None.
        act_layer: activation of the MLP; None for the GELU that ``gelu`` names.
        pad_type: timm's name for ``padding``: "" for symmetric, "same".
        weight_init: "" for zero biases, "nlhb" for a head bias of ``-log(num_classes)``.
        global_pool: "avg", "max", "avgmax" (their mean), "catavgmax" (both) or "" (none) before the head.
        device, dtype: of the parameters.
        padding: of the max-pools: "symmetric" (timm's default) or "same" (the authors); None follows ``pad_type``.
        gelu: "exact" (timm) or "tanh" (the authors).
        multi_query: one key and value head for all query heads (the authors' 32 px models).
        impl: "auto" takes the best this machine has for each operation; "reference" is plain PyTorch throughout.

    Shape: ``(B, in_chans, H, W)`` → ``(B, num_classes)``.

    Attributes and methods are timm's and mean the same, with three exceptions: ``block_size`` is (height, width), since
    blocks need not be square; a level maps blocks ``(B, T, N, C)`` to blocks, where timm's maps images to images;
    ``pretrained_cfg`` has the model's sizes and names only, since there are no weights with a normalisation to name.

    State dict: timm's names and layouts, so timm's checkpoints load as they are (:mod:`nest_fast.weights` also reads
    wrapped ones and the authors' JAX parameters). Position embeddings of another size are resized when loaded.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 4,
        num_levels: int = 3,
        embed_dims: int | Sequence[int] = (128, 256, 512),
        num_heads: int | Sequence[int] = (4, 8, 16),
        depths: int | Sequence[int] = (2, 2, 20),
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.5,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        pad_type: str = "",
        weight_init: str = "",
        global_pool: str = "avg",
        device=None,
        dtype=None,
        *,
        padding: str | None = None,
        gelu: str = "exact",
        multi_query: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        padding = _padding(padding, pad_type)
        act_layer = _activation(act_layer, gelu)
        norm_layer = norm_layer or layer_norm
        _checks.choice("impl", impl, ("auto", "reference"))
        dims, heads, depth = (
            _per_level(name, value, num_levels)
            for name, value in (("embed_dims", embed_dims), ("num_heads", num_heads), ("depths", depths))
        )
        self.img_size, self.block_size = _image_and_block(img_size, patch_size, num_levels)
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.num_levels = num_levels
        self.num_blocks = [4**i for i in reversed(range(num_levels))]
        self.seq_length = self.block_size[0] * self.block_size[1]
        self.num_features = dims[-1]
        self.drop_rate = drop_rate
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(dims)
        ]

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = torch.linspace(0, drop_path_rate, sum(depth), device="cpu").split(depth)
        self.impl = impl
        patch_embed: Any = PatchEmbed(patch_size, self.block_size, in_chans, dims[0], impl=impl, **dd)
        patch_embed.img_size = self.img_size
        patch_embed.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = patch_embed.num_patches = self.num_blocks[0] * self.seq_length
        self.patch_embed = patch_embed
        self.levels: Any = nn.Sequential()  # of NesTLevel
        for i in range(num_levels):
            pool = None
            if i > 0:
                pool = BlockAggregation(dims[i - 1], dims[i], padding=padding, norm_layer=norm_layer, impl=impl, **dd)
            layers = [
                TransformerLayer(
                    dims[i],
                    heads[i],
                    mlp_ratio,
                    qkv_bias,
                    proj_drop_rate,
                    attn_drop_rate,
                    rate,
                    act_layer,
                    norm_layer,
                    multi_query=multi_query,
                    head_minor=True,
                    impl=impl,
                    **dd,
                )
                for rate in rates[i].tolist()
            ]
            edge = 2 ** (num_levels - 1 - i)
            self.levels.append(NesTLevel(dims[i], (edge, edge), self.block_size, pool, layers, **dd))
        self.norm = norm_layer(dims[-1], **dd)
        self.global_pool: Any = GlobalPool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights(weight_init)
        # What timm's helpers read from a model. The images' normalisation belongs to weights, and is not here.
        self.pretrained_cfg = self.default_cfg = {
            "input_size": (in_chans, *self.img_size),
            "fixed_input_size": True,
            "num_classes": num_classes,
            "pool_size": self.block_size,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }

    @torch.no_grad()
    def init_weights(self, mode: str = "") -> None:
        """Truncated normal weights of std 0.02, zero biases; "nlhb": a head bias of ``-log(num_classes)``."""
        _checks.choice("weight_init", mode, ("", "nlhb"))
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    head = name == "head" and mode == "nlhb"
                    nn.init.constant_(module.bias, -math.log(self.num_classes) if head else 0.0)
            elif isinstance(module, NesTLevel):
                nn.init.trunc_normal_(module.pos_embed, std=0.02)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError("model: expected one for torch.jit.script, got a NesT; use torch.export or torch.jit.trace")

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` → normalised features ``(B, num_features, H', W')``."""
        return self.levels[-1].to_image(self.norm(self._run_levels(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``(B, num_features, H', W')`` → logits ``(B, num_classes)``, or the pooled features."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        end = (("norm", self.norm, fusion.INNER_NORM), ("global_pool", self.global_pool, _MEAN))
        if fusion.everywhere(x) or fusion.flags(x, "the model", self, _WRITTEN) or fusion.why_not(x, end, _KNOWN):
            return self.forward_head(self.forward_features(x))
        norm: Any = self.norm
        return self.head(self.head_drop(layer_norm_mean(self._run_levels(x), norm.weight, norm.bias, eps=norm.eps)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the levels, each ``(B, C, H, W)``.

        Args:
            x: image ``(B, in_chans, H, W)``.
            indices: which levels: the last n if an int, all if None; negative ones count from the end.
            norm: normalise the last level's output.
            stop_early: stop after the last of these levels.
            output_fmt: "NCHW".
            intermediates_only: leave out the final features.

        Returns:
            The intermediates, or (final features, intermediates).
        """
        _checks.choice("output_fmt", output_fmt, ("NCHW",))
        wanted = self._feature_indices(indices)
        stop = max(wanted) + 1 if stop_early else len(self.levels)
        intermediates = []
        x = self._embed(x)
        for i, level in enumerate(self.levels[:stop]):
            x = level(x)
            if i in wanted:
                normed = norm and i == len(self.levels) - 1
                intermediates.append(level.to_image(self.norm(x) if normed else x))
        if intermediates_only:
            return intermediates
        x = self.norm(x) if stop == len(self.levels) else x
        return self.levels[stop - 1].to_image(x), intermediates

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of ``num_classes`` outputs (0 for none), and another pooling unless ``global_pool`` is None.

        The head has the device and dtype of the first parameter. A pooling module of the user's own is replaced only
        where ``global_pool`` is given; its ``feat_mult()``, where it has one, says how many features it makes of one.
        """
        if global_pool is not None:
            self.global_pool = GlobalPool(global_pool).train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * getattr(self.global_pool, "feat_mult", lambda: 1)()
        head: nn.Module = nn.Identity()
        if num_classes > 0:
            first = next(self.parameters())
            head = nn.Linear(self.head_hidden_size, num_classes, device=first.device, dtype=first.dtype)
        self.head = head.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need for the levels ``indices``; they are returned.

        Args:
            indices: as :meth:`forward_intermediates` has them, but 1 by default: the last level.
            prune_norm: drop the last LayerNorm, too.
            prune_head: drop the head and the pooling. Where levels are dropped, all three go, since they are of the
                last level's width; ``num_features`` and ``head_hidden_size`` are then those of the last level left.
        """
        wanted = self._feature_indices(indices)
        end = max(wanted) + 1
        shorter = end < len(self.levels)
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.levels = self.levels[:end]
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[end - 1]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not to decay: the position embeddings."""
        return {f"levels.{i}.pos_embed" for i in range(len(self.levels))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups by depth, as timm's layer-wise learning rates take them."""
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^levels\.(\d+)" if coarse else r"^levels\.(\d+)\.transformer_encoder\.(\d+)", None),
                (r"^levels\.(\d+)\.(?:pool|pos_embed)", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them.

        ``"gelu"``: only what the MLPs' GELUs return, on an eager GPU; a quarter of what a layer keeps, for the price of
        one more tensor written. On a CPU the C++ kernels do so anyway.

        Raises:
            ValueError: ``enable`` is none of True, False and "gelu".
        """
        _checks.choice("enable", enable, (True, False, "gelu"))
        for level in self.levels:
            level.grad_checkpointing = enable

    def _run_levels(self, x: Tensor) -> Tensor:
        return self.levels(self._embed(x))

    def _embed(self, x: Tensor) -> Tensor:
        _checks.tensor("x", x, "(B, C, H, W)")
        channels = getattr(self.patch_embed.proj, "in_channels", self.in_chans)  # of another stem, if one was put there
        if tuple(x.shape[1:]) != (channels, *self.img_size):
            expected = f"(B, {channels}, {self.img_size[0]}, {self.img_size[1]})"
            raise ValueError(f"x: expected shape {expected} as in_chans and img_size say, got {tuple(x.shape)}")
        return self.patch_embed(x)

    def _feature_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        n = len(self.levels)
        if indices is None:
            return list(range(n))
        wanted = list(range(n - indices, n)) if isinstance(indices, int) else [i + n if i < 0 else i for i in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= n:
            raise ValueError(f"indices: expected some of the {n} levels, got {indices!r}")
        return wanted


_KNOWN = KNOWN | {GlobalPool: fusion.as_written("global_pool", GlobalPool)}
_MEAN = fusion.Place(("global_pool",), (("{name} pools in another way", lambda m, x: m.pool_type != "avg"),))

# What the model must be for the last LayerNorm and the mean over tokens to be one pass.
_WRITTEN = fusion.as_written(
    "nest",
    NesT,
    methods=("forward_features", "forward_head"),
    rules=(
        ("impl='reference' was asked for", lambda m, x: m.impl == "reference"),
        ("{name} was patched", lambda m, x: "forward_features" in m.__dict__ or "forward_head" in m.__dict__),
    ),
)


def _padding(padding: str | None, pad_type: str) -> str:
    _checks.choice("pad_type", pad_type, ("", "same"))
    if padding is None:
        return pad_type or "symmetric"
    _checks.choice("padding", padding, ("symmetric", "same"))
    if pad_type and pad_type != padding:
        raise ValueError(f"padding: expected {pad_type!r} as pad_type says, got {padding!r}")
    return padding


def _activation(act_layer: Callable[[], nn.Module] | None, gelu: str) -> Callable[[], nn.Module]:
    _checks.choice("gelu", gelu, ("exact", "tanh"))
    if act_layer is None:
        return partial(nn.GELU, approximate="tanh" if gelu == "tanh" else "none")
    if gelu != "exact":
        raise ValueError(f"gelu: expected 'exact', since act_layer is given, got {gelu!r}")
    return act_layer


def _per_level(name: str, value: int | Sequence[int], num_levels: int) -> list[int]:
    if isinstance(value, int):
        return [value] * num_levels
    if len(value) != num_levels:
        raise ValueError(f"{name}: expected one value for each of {num_levels} levels, got {tuple(value)}")
    return list(value)


def _image_and_block(
    img_size: int | tuple[int, int], patch_size: int, num_levels: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    if num_levels < 1:
        raise ValueError(f"num_levels: expected at least 1, got {num_levels}")
    height, width = _checks.pair("img_size", img_size)
    _checks.pair("patch_size", patch_size)
    step = patch_size * 2 ** (num_levels - 1)
    if height % step or width % step:
        raise ValueError(
            f"img_size: expected multiples of patch_size * 2 ** (num_levels - 1) = {step}, got ({height}, {width})"
        )
    return (height, width), (height // step, width // step)


def _create(defaults: dict[str, Any], kwargs: dict[str, Any]) -> NesT:
    for name, instead in _TIMM_ONLY.items():
        if kwargs.pop(name, False):
            raise ValueError(f"{name}: expected False, since {instead}, got True")
    return NesT(**{**defaults, **kwargs})


# What timm's model functions take beside the constructor's arguments, and what to do instead.
_TIMM_ONLY = {
    "pretrained": "NesT has no weights of its own: accelerate(timm.create_model(..., pretrained=True)) has timm's, and"
    " load_state_dict(weights.from_timm(...)) takes them",
    "features_only": "forward_intermediates(x, indices, intermediates_only=True) gives the levels' outputs",
}


def nest_tiny(**kwargs: Any) -> NesT:
    """NesT-T, 224 px, 17.1 M parameters. ``kwargs`` are :class:`NesT`'s."""
    dims = {"embed_dims": (96, 192, 384), "num_heads": (3, 6, 12), "depths": (2, 2, 8)}
    return _create({**dims, "drop_path_rate": 0.2}, kwargs)


def nest_small(**kwargs: Any) -> NesT:
    """NesT-S, 224 px, 38.4 M parameters. ``kwargs`` are :class:`NesT`'s."""
    dims = {"embed_dims": (96, 192, 384), "num_heads": (3, 6, 12), "depths": (2, 2, 20)}
    return _create({**dims, "drop_path_rate": 0.3}, kwargs)


def nest_base(**kwargs: Any) -> NesT:
    """NesT-B, 224 px, 67.7 M parameters. ``kwargs`` are :class:`NesT`'s."""
    dims = {"embed_dims": (128, 256, 512), "num_heads": (4, 8, 16), "depths": (2, 2, 20)}
    return _create({**dims, "drop_path_rate": 0.5}, kwargs)


def _s16_32(dim: int, num_heads: int, kwargs: dict[str, Any]) -> NesT:
    """The authors' 32 px models: a pixel is a patch, 4 levels of 3 layers, multi-query, tanh GELU, SAME padding."""
    defaults = {
        "img_size": 32,
        "patch_size": 1,
        "num_levels": 4,
        "embed_dims": dim,
        "num_heads": num_heads,
        "depths": 3,
        "num_classes": 10,
        "drop_path_rate": 0.1,
        "padding": "same",
        "gelu": "tanh",
        "multi_query": True,
    }
    return _create(defaults, kwargs)


def nest_tiny_s16_32(**kwargs: Any) -> NesT:
    """The authors' 32 px NesT-T, 6.0 M parameters at 10 classes. ``kwargs`` are :class:`NesT`'s."""
    return _s16_32(192, 3, kwargs)


def nest_small_s16_32(**kwargs: Any) -> NesT:
    """The authors' 32 px NesT-S. ``kwargs`` are :class:`NesT`'s."""
    return _s16_32(384, 6, kwargs)


def nest_base_s16_32(**kwargs: Any) -> NesT:
    """The authors' 32 px NesT-B. ``kwargs`` are :class:`NesT`'s."""
    return _s16_32(768, 12, kwargs)
