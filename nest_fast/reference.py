"""What every fast path must compute, in plain PyTorch.

Any device, any dtype, differentiable to any order; no argument checks (``nest_fast.ops`` has them) and no tuning.
Shapes: ``(B, T, N, C)`` is batch, image blocks, tokens per block, channels; ``(B, H, W, C)`` is an image.

Source: Zhang et al., "Nested Hierarchical Transformer", AAAI 2022 (arXiv 2105.12723), and the authors' code
(github.com/google-research/nested-transformer, ``libml/attn_utils.py`` and ``libml/self_attention.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Windows",
    "add_layer_norm",
    "attention_layer",
    "bias_gelu",
    "block_aggregate",
    "block_attention",
    "blockify",
    "from_windows",
    "into_windows",
    "layer_norm_mean",
    "linear",
    "mlp_layer",
    "patchify",
    "projection_mlp",
    "unblockify",
    "window_mask",
    "window_rows",
    "window_tokens",
    "with_length",
]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def blockify(x: Tensor, block_size: int | tuple[int, int]) -> Tensor:
    """Cut an image into blocks: ``(B, H, W, C)`` → ``(B, T, N, C)``, blocks and tokens in row-major order."""
    B, H, W, C = x.shape
    bh, bw = _pair(block_size)
    x = x.reshape(B, H // bh, bh, W // bw, bw, C)
    return x.transpose(2, 3).reshape(B, (H // bh) * (W // bw), bh * bw, C)


def unblockify(x: Tensor, grid_size: int | tuple[int, int], block_size: int | tuple[int, int] | None = None) -> Tensor:
    """Put blocks back together: ``(B, T, N, C)`` → ``(B, H, W, C)``. Without ``block_size`` the blocks are square."""
    B, _, N, C = x.shape
    gh, gw = _pair(grid_size)
    bh, bw = _pair(math.isqrt(N) if block_size is None else block_size)
    return x.reshape(B, gh, gw, bh, bw, C).transpose(2, 3).reshape(B, gh * bh, gw * bw, C)


def patchify(x: Tensor, patch_size: int | tuple[int, int], block_size: int | tuple[int, int]) -> Tensor:
    """Cut an image into patches, already in block order: ``(B, C, H, W)`` → ``(B, T, N, C * ph * pw)``.

    A patch is flattened channel first, as a convolution weight ``(out, C, ph, pw)`` is, so the patch embedding of
    ``weight`` is ``linear(patchify(x, ...), weight.flatten(1))``. ``block_size`` counts patches.
    """
    B, C, H, W = x.shape
    ph, pw = _pair(patch_size)
    bh, bw = _pair(block_size)
    gh, gw = H // (bh * ph), W // (bw * pw)
    x = x.reshape(B, C, gh, bh, ph, gw, bw, pw).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x.reshape(B, gh * gw, bh * bw, C * ph * pw)


class Windows(NamedTuple):
    """How an image of tokens is cut into windows; :func:`nest_fast.windows` makes and explains it."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    pad_first: bool = False
    grid: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        """Windows one below the other, and one beside the other."""
        (H, W), (h, w) = self.size, self.window
        return (H + h - 1) // h, (W + w - 1) // w

    @property
    def rows(self) -> int:
        """Tokens of the image."""
        return self.size[0] * self.size[1]

    @property
    def blocks(self) -> int:
        """All windows."""
        return self.counts[0] * self.counts[1]

    @property
    def tokens(self) -> int:
        """Tokens of a window, padding included."""
        return self.window[0] * self.window[1]

    @property
    def pads(self) -> int:
        """How many tokens of all windows are padding."""
        return self.blocks * self.tokens - self.rows

    @staticmethod
    def to_numbers(windows: Windows | None) -> list[int]:
        """All of it, as an operation of the extension takes it; zeros for no windows: AOTInductor loses []."""
        if windows is None:
            return [0] * 8
        return [*windows.size, *windows.window, *windows.shift, int(windows.pad_first), int(windows.grid)]

    @staticmethod
    def of_numbers(numbers: Sequence[int]) -> Windows | None:
        """The inverse."""
        if not numbers or numbers[2] == 0:
            return None
        H, W, h, w, down, right, pad_first, grid = numbers
        return Windows((H, W), (h, w), (down, right), bool(pad_first), bool(grid))


def window_rows(windows: Windows, device: torch.device | str = "cpu") -> Tensor:
    """Which row of an image ``(B, H * W, C)`` each token of each window is: ``(T, N)``.

    Padding has the numbers from ``H * W`` on, row by row of the padded image.
    """
    (H, W), padded = windows.size, windows.counts[1] * windows.window[1]
    y, x = (_tokens_of_axis(windows, axis, device) for axis in (0, 1))
    y, x = y[:, None, :, None], x[None, :, None, :]
    rows = torch.where((y < H) & (x < W), y * W + x, H * W + y * padded + x - (y + 1).clamp(max=H) * W)
    return rows.flatten(2).flatten(0, 1)


def _tokens_of_axis(windows: Windows, axis: int, device: torch.device | str) -> Tensor:
    """Along one axis, the place in the image of each token of each window, from its edge on for padding."""
    size, window, shift, count = (x[axis] for x in (windows.size, windows.window, windows.shift, windows.counts))
    at = torch.arange(count * window, device=device)
    period = count * window if windows.pad_first else size
    place = torch.where(at < period, (at + shift) % period, at)
    return place.view(window, count).T if windows.grid else place.view(count, window)


def window_tokens(windows: Windows, device: torch.device | str = "cpu") -> Tensor:
    """The inverse: which token, counted through all windows, each row of the image is, ``(H * W,)``."""
    (y, token_y), (x, token_x) = (_windows_of_axis(windows, axis, device) for axis in (0, 1))
    window, token = y[:, None] * windows.counts[1] + x, token_y[:, None] * windows.window[1] + token_x
    return (window * windows.tokens + token).flatten()


def _windows_of_axis(windows: Windows, axis: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Along one axis, the window of each place of the image, and the token in it."""
    size, window, shift, count = (x[axis] for x in (windows.size, windows.window, windows.shift, windows.counts))
    at = (torch.arange(size, device=device) - shift) % (count * window if windows.pad_first else size)
    return (at % count, at // count) if windows.grid else (at // window, at % window)


def into_windows(x: Tensor, windows: Windows, pad: Tensor | None = None) -> Tensor:
    """The tokens of an image in windows: ``(B, H * W, ...)`` → ``(B, T, N, ...)``.

    ``pad`` ``(1 or pads, ...)`` is what padding has, for all of it or row by row of the padded image; zeros if None.
    """
    pad = x.new_zeros(1, *x.shape[2:]) if pad is None else pad
    return torch.cat((x, pad.expand(x.shape[0], windows.pads, *x.shape[2:])), 1)[:, window_rows(windows, x.device)]


def from_windows(x: Tensor, windows: Windows) -> Tensor:
    """The inverse: ``(B, T, N, C)`` → ``(B, H * W, C)``, without what became of the padding."""
    return x.flatten(1, 2)[:, window_tokens(windows, x.device)]


def window_mask(windows: Windows, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """Swin's mask ``(T, N, N)``: -100 where one token is from beyond the edge of the image that the other is at."""
    regions = []
    for axis in (0, 1):
        window, shift, count = (x[axis] for x in (windows.window, windows.shift, windows.counts))
        last = torch.arange(count, device=device)[:, None] == count - 1
        regions.append(last & (torch.arange(window, device=device) >= window - shift) if shift else last[:, :1] & False)
    y, x = regions
    region = 2 * y[:, None, :, None] + 1 * x[None, :, None, :]
    region = region.expand(*windows.counts, *windows.window).flatten(2).flatten(0, 1)
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill(apart, -100.0)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    cosine: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    windows: Windows | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``softmax(scale * q @ k^T + bias + mask) @ v`` inside each block and head.

    ``q`` is ``(B, T, N, heads, head_dim)``; ``k`` and ``v`` are the same or have one head. ``bias`` is
    ``(heads, N, N)``; ``mask`` is ``(groups, N, N)``, block ``t`` taking ``mask[t % groups]``, either added (floating
    point) or kept where true (bool). Both may be of another dtype than ``q``: scores and softmax are in the one that
    PyTorch's promotion gives, the result ``(B, T, N, heads, head_dim)`` in that of ``q``. A row whose keys are all
    masked, by false or by -inf, gives zeros and has no gradient, as in ``F.scaled_dot_product_attention``. Finite
    numbers, however negative, take no key away: where all keys of a row have one so large that the scores are rounded
    away beside it, the row gives the mean of its values. With ``cosine`` q and k have length 1 and ``scale`` is
    ``(heads,)``.

    ``rel_h`` ``(B, T, N, heads, h)`` and ``rel_w`` ``(B, T, N, heads, w)``, with ``h * w`` = N, are added to the scores
    as well: of key ``j``, ``rel_h[..., j // w] + rel_w[..., j % w]``.

    With ``windows``, ``q``, ``k``, ``v``, ``rel_h``, ``rel_w`` and the result are images ``(B, H * W, heads, ...)`` and
    the blocks are these windows; k and v of padding are ``pad_k`` and ``pad_v`` ``(1 or pads, heads, head_dim)``, as
    :func:`into_windows` takes them. Where windows are shifted and there is no ``mask``, it is :func:`window_mask`.
    """
    if cosine:
        q, k, scale = with_length(q, scale.unsqueeze(-1)), with_length(k), 1.0  # type: ignore[union-attr]
        pad_k = None if pad_k is None else with_length(pad_k)
    if windows is not None:
        q, k, v = (into_windows(x, windows, pad) for x, pad in ((q, None), (k, pad_k), (v, pad_v)))
        rel_h, rel_w = (None if x is None else into_windows(x, windows) for x in (rel_h, rel_w))
        if any(windows.shift) and mask is None:
            mask = window_mask(windows, q.device, q.dtype)
        added: dict = {"bias": bias, "mask": mask, "rel_h": rel_h, "rel_w": rel_w}
        out = block_attention(q, k, v, scale=scale, **added, dropout_p=dropout_p)
        return from_windows(out, windows)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # (B, T, heads, N, head_dim)
    scores = (q * scale) @ k.transpose(-2, -1)
    if rel_h is not None and rel_w is not None:
        by_row, by_column = (x.transpose(2, 3) for x in (rel_h, rel_w))
        scores = scores + (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        groups = mask.repeat(q.shape[1] // mask.shape[0], 1, 1).unsqueeze(1)  # (T, 1, N, N)
        scores = scores.masked_fill(~groups, -math.inf) if mask.dtype == torch.bool else scores + groups
    weights = scores.softmax(-1) if bias is None and mask is None else _masked_softmax(scores)
    return (F.dropout(weights, dropout_p).to(v.dtype) @ v).transpose(2, 3)


def with_length(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """``x`` with vectors of this length in its last dimension, in its dtype."""
    return (F.normalize(x, dim=-1) * length).to(x.dtype)


def _masked_softmax(scores: Tensor) -> Tensor:
    """The softmax over the last dimension, zeros where all is -inf."""
    masked = (scores == -math.inf).all(-1, keepdim=True)
    # Filled before as well, since the gradient of a softmax that is NaN is NaN.
    return scores.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)


def block_aggregate(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    grid_size: int | tuple[int, int] | None = None,
    block_size: int | tuple[int, int] | None = None,
    eps: float = 1e-6,
    padding: str = "symmetric",
    pos_embed: Tensor | None = None,
) -> Tensor:
    """``max_pool(layer_norm(conv3x3(x))) + pos_embed``, on blocks or on an image: four blocks become one.

    With ``grid_size``, ``x`` is ``(B, T, N, C)`` on that grid of blocks, ``pos_embed`` ``(1, T/4, N, C')`` and the
    result ``(B, T/4, N, C')``; without, ``x`` is ``(B, H, W, C)`` and the result ``(B, H/2, W/2, C')``.
    ``conv_weight`` is ``(C', C, 3, 3)``. The pool is 3x3 with stride 2; ``padding`` is "symmetric" (one pixel on
    every side, PyTorch's way) or "same" (one pixel right and below, the authors' way). Padding never wins the maximum.
    """
    block = math.isqrt(x.shape[2]) if block_size is None else block_size
    if grid_size is not None:
        x = unblockify(x, grid_size, block)
    # An NHWC image seen as NCHW is channels_last memory: nothing here makes a layout copy.
    y = F.conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1).permute(0, 2, 3, 1)
    y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps).permute(0, 3, 1, 2)
    # At even height and width ceil_mode without padding is exactly one -inf pixel right and below.
    y = F.max_pool2d(y, 3, 2, ceil_mode=True) if padding == "same" else F.max_pool2d(y, 3, 2, padding=1)
    out = y.permute(0, 2, 3, 1)
    if grid_size is not None:
        out = blockify(out, block)
    return out if pos_embed is None else out + pos_embed


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + activation(x @ weight^T + bias)``: ``(…, in)`` → ``(…, out)``.

    ``activation`` is "none", "gelu" (exact) or "gelu_tanh"; ``residual`` ``(…, out)`` or None.
    """
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else residual + y


def attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    multi_query: bool = False,
    windows: Windows | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | Tensor | None = None,
    cosine: bool = False,
    post_norm: bool = False,
    branch_scale: float | Tensor = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """``x + branch_scale * proj(attention(qkv(layer_norm(x))))`` inside each block: ``(B, T, N, C)`` → the same.

    ``qkv`` gives q of every head, then k, then v, of every head or, with ``multi_query``, of one; ``proj`` takes
    (heads, head_dim). ``bias`` ``(heads, N, N)`` and ``mask`` ``(groups, N, N)`` are those of :func:`block_attention`.
    With ``windows``, ``x`` is ``(B, H * W, C)`` and its blocks are these windows: they are cut after the LayerNorm, so
    that padding is zeros there, attended with the bias of qkv; and where they are shifted and there is no ``mask``, it
    is :func:`window_mask`. With ``cosine`` q and k have length 1 and ``scale`` is ``(heads,)``. ``post_norm`` is
    ``x + branch_scale * layer_norm(proj(attention(qkv(x))))``. ``branch_scale`` may be ``(B,)``.
    """
    kv_heads = 1 if multi_query else num_heads
    y = x if post_norm else F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    y = y if windows is None else into_windows(y, windows)
    packed = F.linear(y, qkv_weight, qkv_bias)
    q, k, v = packed.unflatten(-1, (num_heads + 2 * kv_heads, -1)).split((num_heads, kv_heads, kv_heads), 3)
    if windows is not None and any(windows.shift) and mask is None:
        mask = window_mask(windows, q.device, q.dtype)
    y = block_attention(q, k, v, scale=scale, cosine=cosine, bias=bias, mask=mask).flatten(-2)
    y = F.linear(y, proj_weight, proj_bias)
    y = y if windows is None else from_windows(y, windows)
    y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps) if post_norm else y
    return x + _for_each_sample(branch_scale, x) * y


def _for_each_sample(scale: float | Tensor, x: Tensor) -> float | Tensor:
    return scale.view(-1, *(1,) * (x.dim() - 1)) if isinstance(scale, Tensor) else scale


def mlp_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    post_norm: bool = False,
    branch_scale: float | Tensor = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """``x + branch_scale * fc2(gelu(fc1(layer_norm(x))))``: ``(…, C)`` → the same, "gelu" or "gelu_tanh".

    With ``post_norm`` ``x + branch_scale * layer_norm(fc2(gelu(fc1(x))))``. ``branch_scale`` may be ``(B,)``.
    """
    y = x if post_norm else F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    hidden = F.linear(y, fc1_weight, fc1_bias)
    hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = F.linear(hidden, fc2_weight, fc2_bias)
    y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps) if post_norm else y
    return x + _for_each_sample(branch_scale, x) * y


def projection_mlp(
    x: Tensor,
    attended: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    proj_scale: float = 1.0,
    branch_scale: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`mlp_layer` of ``x + proj_scale * proj(attended)``, all of these ``(…, C)``."""
    total = x + proj_scale * F.linear(attended, proj_weight, proj_bias)
    weights = norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    return mlp_layer(total, *weights, activation=activation, branch_scale=branch_scale, eps=eps)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``x + branch_scale * (branch + branch_bias)`` and the LayerNorm of that sum, both ``(B, ..., C)``.

    ``x`` and ``branch`` are ``(B, ..., C)``; ``weight``, ``bias`` and ``branch_bias`` ``(C,)``; ``branch_scale`` is
    ``(B,)``, the factors of stochastic depth.
    """
    if branch_bias is not None:
        branch = branch + branch_bias
    if branch_scale is not None:
        branch = branch * branch_scale.reshape(-1, *(1,) * (x.dim() - 1))
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def layer_norm_mean(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The mean over tokens of ``layer_norm(x)``: ``(B, ..., C)`` → ``(B, C)``."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).flatten(1, -2).mean(1)


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: str = "none") -> Tensor:
    """``gelu(x + bias)``: ``(..., C)`` → the same. ``approximate`` is "none" (exact) or "tanh"."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)
