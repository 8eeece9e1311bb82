"""The layers of NesT as modules, on ``(B, T, N, C)``: batch, image blocks, tokens per block, channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nest_fast.ops import (
    _checks,
    add_layer_norm,
    attention_layer,
    bias_gelu,
    block_aggregate,
    block_attention,
    linear,
    mlp_layer,
    patchify,
)
from nest_fast.ops.block_aggregate import IMPLS as AGGREGATE_IMPLS
from nest_fast.ops.block_attention import IMPLS as ATTENTION_IMPLS
from nest_fast.weights import head_minor_to_major

__all__ = ["BlockAggregation", "BlockAttention", "DropPath", "Mlp", "PatchEmbed", "TransformerLayer", "layer_norm"]


# Classes of LayerNorm that compute nothing else; an integration adds its library's.
LAYER_NORMS: set[type[nn.Module]] = {nn.LayerNorm}


def layer_norm(dim: int, device=None, dtype=None) -> nn.LayerNorm:
    """The LayerNorm of NesT: eps 1e-6, as the authors and timm have it."""
    return nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether someone listens to these modules or patched them, so that they have to be called."""
    return any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )


def project(
    x: Tensor, module: nn.Module, *, activation: str = "none", residual: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """``residual + activation(module(x))``, in one pass where ``module`` is a linear layer and nothing more."""
    if type(module) is nn.Linear and not has_hooks(module):
        return linear(x, module.weight, module.bias, activation=activation, residual=residual, impl=impl)
    y = module(x)  # a LoRA, a parametrization, a listener
    if activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else residual + y


def attend(
    x: Tensor,
    attn: Any,
    norm: Any = None,
    *,
    multi_query: bool = False,
    head_minor: bool = False,
    residual: bool = False,
    branch_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Attention inside blocks with its projections: ``(B, T, N, C)`` → the same.

    ``norm`` comes before it; with ``residual`` it is x plus ``branch_scale`` times that. ``attn`` has ``qkv``,
    ``proj``, ``num_heads``, ``scale`` and ``attn_drop`` as :class:`BlockAttention` has.
    """
    heads, qkv, proj = attn.num_heads, attn.qkv, attn.proj
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    if norm is not None and residual and impl == "auto" and dropout_p == 0.0 and _are_plain(x, norm, qkv, proj):
        weight = head_minor_to_major(proj.weight, heads) if head_minor else proj.weight
        return attention_layer(
            *(x, norm.weight, norm.bias, qkv.weight, qkv.bias, weight, proj.bias),
            num_heads=heads,
            multi_query=multi_query,
            scale=attn.scale,
            branch_scale=branch_scale,
            eps=norm.eps,
        )
    kv_heads, linear_impl = 1 if multi_query else heads, "reference" if impl == "reference" else "auto"
    packed = project(x if norm is None else norm(x), qkv, impl=linear_impl).unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=3)
    out = block_attention(q, k, v, scale=attn.scale, dropout_p=dropout_p, impl=impl)
    if head_minor and type(proj) is nn.Linear and not has_hooks(proj):
        # Reordering the weight's C x C columns is far less than reordering every token. It is done anew every time: a
        # remembered copy could not see a weight that changes through ``.data``.
        branch = partial(linear, out.flatten(-2), head_minor_to_major(proj.weight, heads), proj.bias, impl=linear_impl)
    else:
        branch = partial(project, (out.transpose(-1, -2) if head_minor else out).flatten(-2), proj, impl=linear_impl)
    if not residual:
        return branch()
    return branch(residual=x) if branch_scale == 1.0 else x + branch_scale * branch()


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
            raise ValueError(f"num_heads: wanted a divisor of dim = {dim}, got {num_heads}")
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
        return self.proj_drop(self.attend(x))

    def attend(self, x: Tensor, norm: nn.Module | None = None, **options) -> Tensor:
        """``forward`` without the output's dropout; ``norm``, ``residual`` and ``branch_scale`` as in `attend`."""
        _checks.tensor("x", x, "(B, T, N, C)")
        return attend(
            x, self, norm, multi_query=self.multi_query, head_minor=self.head_minor, impl=self.impl, **options
        )

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
            raise TypeError(f"norm_layer: wanted one that builds an affine torch.nn.LayerNorm, got {norm}")
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        grid_size: int | tuple[int, int] | None = None,
        block_size: int | tuple[int, int] | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        return aggregate(
            x, self.conv, self.norm, self.padding, grid_size, block_size, pos_embed=pos_embed, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}"


def aggregate(
    x: Tensor,
    conv: nn.Conv2d,
    norm: Any,
    padding: str,
    grid_size: int | tuple[int, int] | None = None,
    block_size: int | tuple[int, int] | None = None,
    *,
    pos_embed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``block_aggregate`` with the parameters of ``conv`` and ``norm``; an image comes and goes as ``(B, C, H, W)``."""
    _checks.tensor("x", x, "(B, C, H, W)" if grid_size is None else "(B, T, N, C)")
    out = block_aggregate(
        x.permute(0, 2, 3, 1) if grid_size is None else x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        grid_size=grid_size,
        block_size=block_size,
        eps=norm.eps,
        padding=padding,
        pos_embed=pos_embed,
        impl=impl,
    )
    return out.permute(0, 3, 1, 2) if grid_size is None else out


class DropPath(nn.Module):
    """Stochastic depth: in training drops a whole sample's branch with probability ``p``, scaling the others up.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p: wanted a probability in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


class Mlp(nn.Module):
    """Linear → activation → linear, with dropout after both: ``(…, dim)`` → ``(…, dim)``."""

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module], drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def gelu_of(act: nn.Module) -> str | None:
    """The name of ``act`` as an activation of ``linear``, None if it is no GELU that may be computed around."""
    if type(act) is not nn.GELU or has_hooks(act):
        return None
    return "gelu_tanh" if act.approximate == "tanh" else "gelu"


def fused_layer(x: Tensor, layer: Any) -> Tensor | None:
    """A pre-norm layer in as few passes as this machine knows; None where something has to happen between them.

    That is a dropout in training, a hook, another activation than GELU; on a GPU, stochastic depth. ``layer`` has
    ``norm1``, ``attn``, ``drop_path1``, ``norm2``, ``mlp`` and ``drop_path2`` as :class:`TransformerLayer` has.
    """
    attn, mlp = layer.attn, layer.mlp
    activation = gelu_of(mlp.act)
    dropouts, paths = (attn.proj_drop, mlp.drop1, mlp.drop2), (layer.drop_path1, layer.drop_path2)
    if activation is None or _is_reference(attn) or has_hooks(attn, mlp, *dropouts, *paths):
        return None
    if layer.training and not all(_never_drops(module) for module in dropouts):
        return None
    if not all(_never_drops(path) or _can_skip(x, path) for path in paths):
        return None
    x = _kept_samples(x, layer.drop_path1, partial(_attention_half, layer))
    return _kept_samples(x, layer.drop_path2, partial(_mlp_half, layer, activation))


def run_layers(x: Tensor, layers: Sequence[Any], known: type) -> Tensor:
    """Layers of the class ``known``, one after the other; on a GPU, where nothing else is asked for, chained."""
    eager_gpu = x.device.type == "cuda" and not torch.compiler.is_compiling()
    if eager_gpu and all(type(layer) is known and _can_chain(x, layer) for layer in layers):
        return chained_layers(x, layers)
    for layer in layers:
        x = layer(x)
    return x


def chained_layers(x: Tensor, layers: Sequence[Any]) -> Tensor:
    """Pre-norm layers, each residual sum in the pass of the LayerNorm that comes after it."""
    branch: Tensor | None = None
    scale: Tensor | None = None
    for layer in layers:
        fc1, fc2, approximate = layer.mlp.fc1, layer.mlp.fc2, layer.mlp.act.approximate
        x, y = _add_norm(x, branch, scale, layer.norm1)
        branch, scale = layer.attn.attend(y), _sample_scale(x, layer.drop_path1)
        x, y = _add_norm(x, branch, scale, layer.norm2)
        hidden = bias_gelu(linear(y, fc1.weight), fc1.bias, approximate=approximate)
        branch, scale = linear(hidden, fc2.weight, fc2.bias), _sample_scale(x, layer.drop_path2)
    if branch is None:
        return x
    return x + branch if scale is None else torch.addcmul(x, branch, scale.view(-1, 1, 1, 1))


def _add_norm(x: Tensor, branch: Tensor | None, scale: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    if branch is None:
        return x, norm(x)
    return add_layer_norm(x, branch, norm.weight, norm.bias, branch_scale=scale, eps=norm.eps)


def _can_chain(x: Tensor, layer: Any) -> bool:
    attn, mlp = layer.attn, layer.mlp
    dropouts, paths = (attn.proj_drop, mlp.drop1, mlp.drop2), (layer.drop_path1, layer.drop_path2)
    if gelu_of(mlp.act) is None or _is_reference(attn) or has_hooks(layer, attn, mlp, *dropouts, *paths):
        return False
    if not all(map(_never_drops, dropouts)) or any(math.isnan(_drop_rate(path)) for path in paths):
        return False
    norms, linears = (layer.norm1, layer.norm2), (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    if any(type(module) is not nn.Linear for module in linears) or has_hooks(*norms, *linears):
        return False
    return all(type(norm) in LAYER_NORMS and norm.bias is not None for norm in norms)


def _sample_scale(x: Tensor, path: nn.Module) -> Tensor | None:
    """The factors ``(B,)`` of stochastic depth: the module's own draw. None where nothing is dropped."""
    rate = _drop_rate(path)
    if rate == 0.0:
        return None
    scale = x.new_empty(x.shape[0]).bernoulli_(1.0 - rate)
    return scale.div_(1.0 - rate) if rate < 1.0 and getattr(path, "scale_by_keep", True) else scale


def _attention_half(layer: Any, x: Tensor, branch_scale: float) -> Tensor:
    return layer.attn.attend(x, layer.norm1, residual=True, branch_scale=branch_scale)


def _mlp_half(layer: Any, activation: str, x: Tensor, branch_scale: float) -> Tensor:
    norm, fc1, fc2 = layer.norm2, layer.mlp.fc1, layer.mlp.fc2
    if _are_plain(x, norm, fc1, fc2):
        weights = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return mlp_layer(x, *weights, activation=activation, branch_scale=branch_scale, eps=norm.eps)
    hidden = project(norm(x), fc1, activation=activation)
    return project(hidden, fc2, residual=x) if branch_scale == 1.0 else x + branch_scale * project(hidden, fc2)


# Classes of stochastic depth by whole samples and the attribute that has their rate; an integration adds its library's.
DROP_PATHS: dict[type[nn.Module], str] = {DropPath: "p"}


def _drop_rate(module: nn.Module) -> float:
    """With what probability stochastic depth drops a sample now; NaN of another module that acts."""
    if isinstance(module, nn.Identity) or not module.training:
        return 0.0
    return getattr(module, DROP_PATHS[type(module)]) if type(module) in DROP_PATHS else math.nan


def _can_skip(x: Tensor, path: nn.Module) -> bool:
    """Whether samples that are dropped need not be computed: which, a GPU would have to tell first."""
    return type(path) in DROP_PATHS and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _kept_samples(x: Tensor, path: nn.Module, half: Callable[[Tensor, float], Tensor]) -> Tensor:
    """``half`` of a layer with stochastic depth, computed for the samples that it keeps and for no others."""
    rate = _drop_rate(path)
    if rate == 0.0:
        return half(x, 1.0)
    keep = 1.0 - rate
    kept = x.new_empty(x.shape[0]).bernoulli_(keep).nonzero().flatten()  # the same draw as the module's
    scale = 1.0 / keep if keep > 0.0 and getattr(path, "scale_by_keep", True) else 1.0
    if len(kept) == x.shape[0]:
        return half(x, scale)
    return x.index_copy(0, kept, half(x.index_select(0, kept), scale))


def _are_plain(x: Tensor, norm: Any, *linears: nn.Module) -> bool:
    """Whether an operation may compute a LayerNorm and linear layers, in the dtype of ``x``, without calling them."""
    if type(norm) not in LAYER_NORMS or norm.bias is None or norm.normalized_shape != x.shape[-1:]:
        return False
    if any(type(module) is not nn.Linear for module in linears) or has_hooks(norm, *linears):
        return False
    return all(module.weight.dtype == x.dtype for module in (norm, *linears))


def _is_reference(attn: nn.Module) -> bool:
    return getattr(attn, "impl", "auto") == "reference"


def _never_drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or not module.training or getattr(module, "p", None) == 0.0


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
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = fused_layer(x, self)
        if y is not None:
            return y
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


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
        patches = patchify(x, self.patch_size, self.block_size, impl=self.impl)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias, impl=self.impl)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, block_size={self.block_size}"
