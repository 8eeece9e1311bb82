"""The layers of NesT as modules, on ``(B, T, N, C)``: batch, image blocks, tokens per block, channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nest_fast import fusion
from nest_fast.ops import _checks, blockify, unblockify
from nest_fast.ops.block_aggregate import IMPLS as AGGREGATE_IMPLS
from nest_fast.ops.block_attention import IMPLS as ATTENTION_IMPLS

__all__ = ["BlockAggregation", "BlockAttention", "DropPath", "Mlp", "PatchEmbed", "TransformerLayer", "layer_norm"]


def layer_norm(dim: int, device=None, dtype=None) -> nn.LayerNorm:
    """The LayerNorm of NesT: eps 1e-6, as the authors and timm have it."""
    return nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)


class BlockAttention(nn.Module):
    """Multi-head self-attention inside image blocks; a drop-in for timm's ``nest.Attention``.

    Args:
        dim: channels C of input and output.
        num_heads: heads; has to divide ``dim``.
        qkv_bias: whether the packed projection has a bias.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        multi_query: one key and value head for all query heads (the authors' 32 px models).
        head_minor: the input of ``proj`` is ordered (head_dim, heads), as timm's NesT weights expect; otherwise
            (heads, head_dim), as everywhere else.
        impl: see :func:`nest_fast.block_attention`; "reference" is plain PyTorch for the projections too.

    Shape: ``(B, T, N, dim)`` → ``(B, T, N, dim)``. Parameters: ``qkv`` (q, k, v in this order) and ``proj``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        *,
        multi_query: bool = False,
        head_minor: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        _checks.choice("impl", impl, ATTENTION_IMPLS)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.multi_query = multi_query
        self.head_minor = head_minor
        self.impl = impl
        kv_dim = self.head_dim if multi_query else dim
        self.qkv = nn.Linear(dim, dim + 2 * kv_dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        _checks.tensor("x", x, "(B, T, N, C)")
        return self.proj_drop(fusion.attend(x, self, self.options(), KNOWN))

    def options(self) -> fusion.Attention:
        return fusion.Attention(self.num_heads, self.scale, self.multi_query, self.head_minor, self.impl)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, multi_query={self.multi_query}, head_minor={self.head_minor}"


class BlockAggregation(nn.Module):
    """conv 3x3 → LayerNorm → max-pool 3x3 with stride 2; a drop-in for timm's ``nest.ConvPool``.

    Args:
        in_channels, out_channels: C and C'.
        padding: of the max-pool, "symmetric" (timm) or "same" (the authors, timm's ``_jx`` models).
        norm_layer: called as ``norm_layer(channels, device=, dtype=)``; builds an affine ``torch.nn.LayerNorm``.
        impl: see :func:`nest_fast.block_aggregate`.

    Shape: with ``grid_size`` given to ``forward``, blocks ``(B, T, N, C)`` → ``(B, T/4, N, C')``, ``pos_embed``
    ``(1, T/4, N, C')`` added; without, as timm has it, an image ``(B, C, H, W)`` → ``(B, C', H/2, W/2)``, computed and
    returned in channels-last memory. Parameters: ``conv`` and ``norm``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding: str = "symmetric",
        norm_layer: Callable[..., nn.Module] = layer_norm,
        impl: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _checks.choice("padding", padding, ("symmetric", "same"))
        _checks.choice("impl", impl, AGGREGATE_IMPLS)
        self.padding = padding
        self.impl = impl
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, device=device, dtype=dtype)
        norm = norm_layer(out_channels, device=device, dtype=dtype)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise TypeError(f"norm_layer: expected one that builds an affine torch.nn.LayerNorm, got {norm}")
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        grid_size: int | tuple[int, int] | None = None,
        block_size: int | tuple[int, int] | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        is_image = grid_size is None
        _checks.tensor("x", x, "(B, C, H, W)" if is_image else "(B, T, N, C)")
        why = fusion.everywhere(x) or fusion.why_not(x, self.parts(), KNOWN)
        if why and self.impl not in ("auto", "reference"):
            raise RuntimeError(f"impl: {self.impl!r} cannot run block_aggregate here: {why}")
        if why:
            return self._step_by_step(x, grid_size, block_size, pos_embed)
        options = {"grid_size": grid_size, "block_size": block_size, "impl": self.impl}
        image = x.permute(0, 2, 3, 1) if is_image else x
        out_shape = (image.shape[1] // 4, image.shape[2], self.conv.out_channels)
        if is_image or fusion.is_one_for_each(pos_embed, out_shape):
            out = fusion.aggregate(image, self, self.padding, pos_embed=pos_embed, **options)
            return out.permute(0, 3, 1, 2) if is_image else out
        out = fusion.aggregate(image, self, self.padding, **options)
        return out if pos_embed is None else out + pos_embed

    def parts(self) -> tuple[fusion.Part, ...]:
        own = self._modules
        return ("conv", own.get("conv"), fusion.CONV_3X3), ("norm", own.get("norm"), fusion.INNER_NORM)

    def _step_by_step(self, x: Tensor, grid_size: Any, block_size: Any, pos_embed: Tensor | None) -> Tensor:
        is_image = grid_size is None
        if not is_image:
            grid_size, block_size = _checks.grid(x, grid_size, block_size)
            x = unblockify(x, grid_size, block_size).permute(0, 3, 1, 2)
        y = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = F.max_pool2d(y, 3, 2, ceil_mode=True) if self.padding == "same" else F.max_pool2d(y, 3, 2, padding=1)
        out = y if is_image else blockify(y.permute(0, 2, 3, 1), block_size)
        return out if pos_embed is None else out + pos_embed

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}"


class DropPath(nn.Module):
    """Stochastic depth: in training drops a branch of whole samples with ``drop_prob`` and scales up the others.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob: expected a probability between 0 and 1, got {drop_prob}")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0.0 and self.scale_by_keep else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Linear → activation → linear, with dropout after both: ``(…, dim)`` → ``(…, dim)``.

    With ``impl`` "reference" it is never computed by ``mlp_layer``, the operation for a whole MLP sub-layer.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module],
        drop: float = 0.0,
        device=None,
        dtype=None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.impl = impl
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer inside image blocks: attention and MLP, each with a residual and stochastic depth.

    Shape: ``(B, T, N, dim)`` → ``(B, T, N, dim)``. The arguments are timm's; ``multi_query``, ``head_minor`` and
    ``impl`` are those of :class:`BlockAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = layer_norm,
        device=None,
        dtype=None,
        *,
        multi_query: bool = False,
        head_minor: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = BlockAttention(
            dim,
            num_heads,
            qkv_bias,
            attn_drop,
            proj_drop,
            multi_query=multi_query,
            head_minor=head_minor,
            impl=impl,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **dd)
        mlp_impl = "reference" if impl == "reference" else "auto"
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, proj_drop, impl=mlp_impl, **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return fusion.run(x, fusion.halves(self, KNOWN))


class PatchEmbed(nn.Module):
    """Image to embedded patches, already in block order, by one matmul: ``(B, C, H, W)`` → ``(B, T, N, dim)``.

    ``proj`` holds the weight ``(dim, C, p, p)`` and bias of the patch convolution this computes; ``impl`` is "auto"
    or "reference".
    """

    def __init__(
        self,
        patch_size: int,
        block_size: tuple[int, int],
        in_chans: int,
        dim: int,
        device=None,
        dtype=None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("impl", impl, ("auto", "reference"))
        self.patch_size = patch_size
        self.block_size = block_size
        self.impl = impl
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if fusion.everywhere(x) or fusion.why_not(x, self.parts(), KNOWN):
            return blockify(self.proj(x).permute(0, 2, 3, 1), self.block_size)
        return fusion.embed_patches(x, self.proj, self.block_size, self.impl)

    def parts(self) -> tuple[fusion.Part, ...]:
        return (("proj", self._modules.get("proj"), fusion.CONV_OF_PATCHES),)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, block_size={self.block_size}"


_IMPL: fusion.Rules = (("an impl of {name} was asked for", lambda m, x: m.impl != "auto"),)

# What fusion knows of these classes, beside PyTorch's own.
KNOWN: fusion.Known = {
    **fusion.TORCH,
    TransformerLayer: fusion.as_written("layer", TransformerLayer),
    BlockAttention: fusion.as_written(
        "attention",
        BlockAttention,
        rules=_IMPL,
        parts=fusion.ATTENTION_PARTS,
        options=BlockAttention.options,
    ),
    Mlp: fusion.as_written("mlp", Mlp, rules=_IMPL, parts=fusion.MLP_PARTS),
    DropPath: fusion.as_written("drop_path", DropPath, rate="drop_prob"),
}
