"""The attention half of a pre-norm transformer layer: LayerNorm, attention inside blocks, residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _extension
from nest_fast.ops.block_attention import block_attention
from nest_fast.ops.linear import linear

__all__ = ["attention_layer"]

IMPLS = ("auto", "reference", "cpp")

_LIB = torch.library.Library("nest_fast", "FRAGMENT")
_LIB.define(
    "attention_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight,"
    " Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, SymInt tokens, int heads, int kv_heads, float scale)"
    " -> Tensor"
)


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
    scale: float | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """``x + proj(attention(qkv(layer_norm(x))))`` inside each block.

    Args:
        x: ``(B, T, N, C)``, any floating-point dtype.
        norm_weight, norm_bias: ``(C,)``.
        qkv_weight, qkv_bias: ``(C + 2 * kv, C)`` and its first dimension or None; q of every head, then k, then v. kv
            is C, or one head's C / num_heads with ``multi_query``.
        proj_weight, proj_bias: ``(C, C)``, its input ordered (heads, head_dim), and ``(C,)`` or None.
        num_heads: heads; divides C.
        multi_query: one key and value head for all query heads.
        scale: factor of the scores; None is head_dim ** -0.5.
        eps: added to the variance.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch. "cpp" computes
            block by block, so that nothing but x and the result leaves the cache: on a CPU, without gradients.

    Returns:
        ``(B, T, N, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock).
    """
    _checks.choice("impl", impl, IMPLS)
    C = _checks.tensor("x", x, "(B, T, N, C)").shape[3]
    if num_heads < 1 or C % num_heads:
        raise ValueError(f"num_heads: wanted a divisor of C = {C}, got {num_heads}")
    kv_heads = 1 if multi_query else num_heads
    packed = C + 2 * kv_heads * (C // num_heads)
    weights = {
        "norm_weight": (norm_weight, (C,)),
        "norm_bias": (norm_bias, (C,)),
        "qkv_weight": (qkv_weight, (packed, C)),
        "qkv_bias": (qkv_bias, (packed,)),
        "proj_weight": (proj_weight, (C, C)),
        "proj_bias": (proj_bias, (C,)),
    }
    _checks.parameters(x, weights, optional=("qkv_bias", "proj_bias"))
    scale = (C // num_heads) ** -0.5 if scale is None else scale
    if impl == "reference":
        return reference.attention_layer(
            x,
            norm_weight,
            norm_bias,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            num_heads=num_heads,
            multi_query=multi_query,
            scale=scale,
            eps=eps,
        )
    reasons = _extension.layer_why_not(x, [weight for weight, _ in weights.values()])
    if impl == "cpp" and reasons:
        raise RuntimeError(f"impl: {impl!r} cannot run attention_layer here: {'; '.join(reasons)}")
    if impl == "cpp" or (not reasons and not _extension.library_has_amx(x)):
        out = torch.ops.nest_fast.attention_layer_cpp(
            x.reshape(-1, C),
            norm_weight.float(),
            norm_bias.float(),
            eps,
            _checks.dense_rows(qkv_weight),
            qkv_bias,
            _checks.dense_rows(proj_weight),
            proj_bias,
            *(x.shape[2], num_heads, kv_heads, scale),
        )
        return out.view(x.shape)
    y = linear(torch.layer_norm(x, (C,), norm_weight, norm_bias, eps), qkv_weight, qkv_bias)
    q, k, v = y.unflatten(-1, (num_heads + 2 * kv_heads, -1)).split((num_heads, kv_heads, kv_heads), 3)
    return linear(block_attention(q, k, v, scale=scale).flatten(-2), proj_weight, proj_bias, residual=x)


@torch.library.register_fake("nest_fast::attention_layer_cpp", lib=_LIB)
def _fake(x, *_):
    return x.new_empty(x.shape)
