"""The attention sub-layer of a pre-norm transformer layer: LayerNorm, attention inside blocks, residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _flops, _layout, _modes
from nest_fast.ops._layer import BACKENDS, IMPLS, choose, fake_branch_backward, layer_backward
from nest_fast.ops._register import operation
from nest_fast.ops.block_attention import block_attention
from nest_fast.ops.linear import linear

__all__ = ["attention_layer"]


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
    branch_scale: float = 1.0,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """``x + branch_scale * proj(attention(qkv(layer_norm(x))))`` inside each block.

    Args:
        x: ``(B, T, N, C)``, any floating-point dtype and strides.
        norm_weight, norm_bias: ``(C,)``, of x's dtype, or both float32 beside float16 and bfloat16.
        qkv_weight, qkv_bias: ``(C + 2 * kv, C)`` and its first dimension or None; q of every head, then k, then v. kv
            is C, or one head's C / num_heads with ``multi_query``.
        proj_weight, proj_bias: ``(C, C)``, its input ordered (heads, head_dim), and ``(C,)`` or None.
        num_heads: heads; divides C.
        multi_query: one key and value head for all query heads.
        scale: factor of the scores; None is head_dim ** -0.5.
        branch_scale: factor of what is added to x: that of stochastic depth for samples that are kept.
        eps: added to the variance.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch. "cpp", on a CPU,
            computes block by block, so that nothing but x and the result leaves the cache. Where gradients are wanted
            it keeps qkv and the attention's output and computes the LayerNorm's again.

    Returns:
        ``(B, T, N, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock).
    """
    given = (x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    kv_heads = 1 if multi_query else num_heads
    C = _check(*given, num_heads, kv_heads, scale, branch_scale, impl)
    scale = float((C // num_heads) ** -0.5) if scale is None else scale
    if impl == "auto":
        impl = choose(given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("attention_layer", given)
    if impl == "reference":
        return reference.attention_layer(
            *given,
            num_heads=num_heads,
            multi_query=multi_query,
            scale=scale,
            branch_scale=branch_scale,
            eps=eps,
        )
    if impl == "cpp":
        out, *_ = _CPP(
            _layout.dense_rows(x.reshape(-1, C)),
            norm_weight.float().contiguous(),
            norm_bias.float().contiguous(),
            eps,
            _layout.dense_rows(qkv_weight),
            _layout.dense(qkv_bias),
            _layout.dense_rows(proj_weight),
            _layout.dense(proj_bias),
            *(x.shape[2], num_heads, kv_heads, scale, branch_scale),
            _modes.wants_gradients(given),
        )
        return out.view(x.shape)
    y = linear(torch.layer_norm(x, (C,), norm_weight, norm_bias, eps), qkv_weight, qkv_bias)
    q, k, v = y.unflatten(-1, (num_heads + 2 * kv_heads, -1)).split((num_heads, kv_heads, kv_heads), 3)
    y = block_attention(q, k, v, scale=scale).flatten(-2)
    if branch_scale == 1.0:
        return linear(y, proj_weight, proj_bias, residual=x)
    return x + branch_scale * linear(y, proj_weight, proj_bias)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    kv_heads: int,
    scale: float | None,
    branch_scale: float,
    impl: str,
) -> int:
    """The channels."""
    _checks.choice("impl", impl, IMPLS)
    C = _checks.tensor("x", x, "(B, T, N, C)").shape[3]
    if num_heads < 1 or C % num_heads:
        raise ValueError(f"num_heads: expected a divisor of C = {C}, got {num_heads}")
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
    _checks.number("scale", scale)
    _checks.number("branch_scale", branch_scale)
    return C


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, proj_weight, proj_bias, tokens, heads, *rest):
    rows, C = x.shape
    kept = rows if rest[-1] else 0
    qkv, attended = x.new_empty((kept, qkv_weight.shape[0])), x.new_empty((kept, C))
    return x.new_empty((rows, C)), qkv, attended, x.new_empty((kept // tokens, heads, tokens), dtype=torch.float32)


def _bwd_fake(dout, x, qkv, attended, lse, qkv_weight, proj_weight, tokens, heads, kv_heads, scale, output_mask):
    return fake_branch_backward(x, (qkv_weight, proj_weight), output_mask)


def _gradients(kept, dout):
    _checks.training(kept.training)

    def branch_backward(dbranch, y, mask):
        saved = kept.qkv, kept.attended, kept.lse, kept.qkv_weight, kept.proj_weight
        return _CPP_BWD(dbranch, y, *saved, kept.tokens, kept.heads, kept.kv_heads, kept.scale, mask)

    return layer_backward(kept, dout, ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"), branch_backward)


def _attention_flops(x_shape, tokens, count):
    return _flops.attention((1, 1, tokens, x_shape[0] // max(tokens, 1), x_shape[1]), count)


def _cpp_flops(x, norm_weight, norm_bias, eps, qkv, qkv_bias, proj, proj_bias, tokens, *_, out_shape=None):
    return _flops.linear(x, qkv) + _attention_flops(x, tokens, 2) + _flops.linear(x, proj)


def _bwd_flops(dout, x, qkv_out, attended, lse, qkv, proj, tokens, *_, out_shape=None):
    dx, dqkv, _, dproj, _ = out_shape
    linears = _flops.linear_gradients(x, qkv, dx, dqkv) + _flops.linear_gradients(x, proj, x, dproj)
    return linears + _attention_flops(x, tokens, 4)


_CPP = operation(
    "attention_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight,"
    " Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, SymInt tokens, int heads, int kv_heads, float scale,"
    " float branch_scale, bool training) -> (Tensor out, Tensor qkv, Tensor attended, Tensor lse)",
    fake=_fake,
    saved=("x", "norm_weight", "norm_bias", "qkv_weight", "proj_weight", "qkv", "attended", "lse"),
    gradients=_gradients,
    flops=_cpp_flops,
)
_CPP_BWD = operation(
    "attention_layer_cpp_bwd(Tensor dout, Tensor x, Tensor qkv, Tensor attended, Tensor lse, Tensor qkv_weight,"
    " Tensor proj_weight, SymInt tokens, int heads, int kv_heads, float scale, bool[5] output_mask)"
    " -> (Tensor dx, Tensor dqkv_weight, Tensor dqkv_bias, Tensor dproj_weight, Tensor dproj_bias)",
    fake=_bwd_fake,
    backward_of="attention_layer",
    flops=_bwd_flops,
)
