"""Block-local multi-head attention: ``softmax(scale * q @ k^T + bias + mask) @ v`` inside every block and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _choice, _extension, _triton, _vmap

__all__ = ["block_attention"]

IMPLS = ("auto", "reference", "sdpa", "cpp", "triton")

_LIB = _extension.Library()
_LIB.define("block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)")
_LIB.define(
    "block_attention_cpp_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
_LIB.define(
    "block_attention_triton_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, float scale)"
    " -> (Tensor out, Tensor lse)"
)
_LIB.define(
    "block_attention_triton_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias,"
    " Tensor? mask, float scale, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)
_OPS = torch.ops.nest_fast


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention inside image blocks: ``out[b, t, :, h] = softmax(scale * q @ k^T + bias[h] + mask[t]) @ v``.

    Args:
        q: ``(B, T, N, heads, head_dim)``, fp32, fp16, bf16 or fp64: batch, blocks, tokens per block. Views of a packed
            ``(B, T, N, 3, heads, head_dim)`` projection are taken as they are.
        k, v: as ``q``, or with one head that all heads of ``q`` share (multi-query).
        scale: factor of the scores; ``head_dim ** -0.5`` if None.
        bias: ``(heads, N, N)``, added to the scores of every block (a relative position bias).
        mask: ``(groups, N, N)`` with ``groups`` dividing T: block ``t`` takes ``mask[t % groups]``, added where it is
            floating point, kept where true if bool (a shifted-window mask).
        dropout_p: probability of dropping an attention weight; 0 outside training.
        impl: "auto" takes the best this machine has for these tensors. "reference" is plain PyTorch, "sdpa" is
            ``torch.nn.functional.scaled_dot_product_attention`` on 4-D views, "cpp" the extension's CPU kernel,
            "triton" the CUDA kernel (on CPU tensors under ``TRITON_INTERPRET=1``). Only "auto" may choose.

    Returns:
        ``(B, T, N, heads, head_dim)``, contiguous, so ``.flatten(-2)`` is the head-major ``(B, T, N, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (MultiHeadAttention, MultiQueryAttention).
    """
    _check(q, k, v, bias, mask, dropout_p, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if impl == "auto":
        impl = _choose(q, bias, mask, dropout_p)
    elif impl in _WHY_NOT:
        _choice.require("block_attention", impl, _WHY_NOT[impl](q, bias, mask, dropout_p))
    if impl == "reference":
        out = reference.block_attention(q, k, v, scale=scale, bias=bias, mask=mask, dropout_p=dropout_p)
        return out.contiguous()
    if impl == "sdpa":
        return _sdpa(q, k, v, scale, bias, mask, dropout_p)
    q, k, v = (_checks.dense_rows(_checks.autocast(x)) for x in (q, k, v))
    if impl == "cpp":
        return _OPS.block_attention_cpp_fwd(q, k, v, scale)[0]
    return _OPS.block_attention_triton_fwd(q, k, v, bias, mask, scale)[0]


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float, impl: str
) -> None:
    _checks.choice("impl", impl, IMPLS)
    B, T, N, heads, head_dim = _checks.tensor("q", q, "(B, T, N, heads, head_dim)").shape
    _checks.floating("q", q)
    for name, x in (("k", k), ("v", v)):
        _checks.tensor(name, x, "(B, T, N, heads, head_dim)")
        if x.shape[:3] != q.shape[:3] or x.shape[4] != head_dim or x.shape[3] not in (1, heads):
            wanted = f"({B}, {T}, {N}, {heads} or 1, {head_dim})"
            raise ValueError(f"{name}: wanted shape {wanted} as q has, got {tuple(x.shape)}")
        _checks.alike(name, x, "q", q)
    _checks.shape("v", v, tuple(k.shape), "as k has")
    if bias is not None:
        _checks.tensor("bias", bias, "(heads, N, N)")
        _checks.shape("bias", bias, (heads, N, N), "(heads, N, N)")
        _checks.floating("bias", bias)
        _checks.device("bias", bias, "q", q)
    if mask is not None:
        groups = _checks.tensor("mask", mask, "(groups, N, N)").shape[0]
        _checks.shape("mask", mask, (groups, N, N), "(groups, N, N)")
        if mask.dtype != torch.bool:
            _checks.floating("mask", mask)
        if groups == 0 or T % groups:
            raise ValueError(f"mask: wanted a number of groups that divides T = {T}, got {groups}")
        _checks.device("mask", mask, "q", q)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: wanted a probability between 0 and 1, got {dropout_p}")


# --- choosing ---------------------------------------------------------------------------------------------------------


def _cpp_why_not(q: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float) -> list[str]:
    reasons = _extension.cpp_why_not("q", q) + _choice.dtype_why_not(q.dtype) + _choice.forward_mode_why_not()
    if bias is not None or mask is not None:
        reasons.append("it takes no bias or mask")
    if dropout_p:
        reasons.append("it has no dropout")
    return reasons


def _triton_why_not(q: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float) -> list[str]:
    reasons = _triton.why_not(q) + _choice.dtype_why_not(q.dtype) + _choice.forward_mode_why_not()
    if q.shape[2] > 256:
        reasons.append(f"N = {q.shape[2]} tokens are over 256")
    if q.shape[-1] > 128:
        reasons.append(f"head_dim {q.shape[-1]} is over 128")
    if dropout_p:
        reasons.append("it has no dropout")
    return reasons


_WHY_NOT = {"cpp": _cpp_why_not, "triton": _triton_why_not}


def _choose(q: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_p: float) -> str:
    if _checks.in_forward_mode():
        return "reference"
    if _checks.in_functorch():
        return "sdpa"
    if q.device.type == "cpu":
        return "sdpa" if _cpp_why_not(q, bias, mask, dropout_p) else "cpp"
    if q.device.type == "cuda":
        reasons = _triton_why_not(q, bias, mask, dropout_p)
        if not reasons:
            return "triton"
        _choice.say_once(f"block_attention runs scaled_dot_product_attention, since for triton {'; '.join(reasons)}")
    return "sdpa"


# --- the library's attention ------------------------------------------------------------------------------------------


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None, dropout_p: float
) -> Tensor:
    B, T, _, heads, _ = q.shape
    # 4-D is what the fused backends take; (B, T) of a packed projection flatten without a copy.
    q4, k4, v4 = (x.flatten(0, 1).transpose(1, 2).expand(-1, heads, -1, -1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q4, k4, v4, _score_mask(bias, mask, B * T, q.dtype), dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous().unflatten(0, (B, T))


def _score_mask(bias: Tensor | None, mask: Tensor | None, blocks: int, dtype: torch.dtype) -> Tensor | None:
    """``bias`` and ``mask`` as one ``attn_mask`` that broadcasts to (blocks, heads, N, N)."""
    if mask is None:
        return None if bias is None else bias.to(dtype).unsqueeze(0)
    if mask.dtype == torch.bool and bias is not None:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    scores = mask.unsqueeze(1) if bias is None else mask.unsqueeze(1) + bias
    scores = scores if scores.dtype == torch.bool else scores.to(dtype)
    return scores.repeat(blocks // mask.shape[0], 1, 1, 1)


# --- registration: both kernels --------------------------------------------------------------------------------------


for _op in ("cpp", "triton"):
    torch.library.register_autograd(
        f"nest_fast::block_attention_{_op}_bwd", _checks.no_double_backward("block_attention"), lib=_LIB
    )


# --- registration: the C++ kernel -------------------------------------------------------------------------------------


@torch.library.register_fake("nest_fast::block_attention_cpp_fwd", lib=_LIB)
def _cpp_fwd_fake(q, k, v, scale):
    return _out_and_lse(q)


@torch.library.register_fake("nest_fast::block_attention_cpp_bwd", lib=_LIB)
def _cpp_bwd_fake(dout, q, k, v, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _out_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, N, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, T, heads, N), dtype=torch.float32)


def _cpp_setup(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _cpp_bwd(ctx, dout, _dlse):
    if dout is None:
        return None, None, None, None
    return *_OPS.block_attention_cpp_bwd(_checks.dense_rows(dout), *ctx.saved_tensors, ctx.scale), None


torch.library.register_autograd("nest_fast::block_attention_cpp_fwd", _cpp_bwd, setup_context=_cpp_setup, lib=_LIB)


torch.library.register_vmap(
    "nest_fast::block_attention_cpp_fwd", _vmap.batching_rule(_OPS.block_attention_cpp_fwd, 3, 3), lib=_LIB
)
torch.library.register_vmap(
    "nest_fast::block_attention_cpp_bwd", _vmap.batching_rule(_OPS.block_attention_cpp_bwd, 6, 6), lib=_LIB
)


# --- registration: the Triton kernels ---------------------------------------------------------------------------------


def _triton_fwd(q, k, v, bias, mask, scale):
    from nest_fast.kernels import block_attention as kernels

    return kernels.block_attention_fwd(q, k, v, bias, mask, scale)


def _triton_bwd(dout, q, k, v, out, lse, bias, mask, scale, need_dbias):
    from nest_fast.kernels import block_attention as kernels

    dq, dk, dv, dbias = kernels.block_attention_bwd(dout, q, k, v, out, lse, bias, mask, scale, need_dbias)
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if dbias is None else dbias


for _key in _triton.DISPATCH_KEYS:
    _LIB.impl("block_attention_triton_fwd", _triton_fwd, _key)
    _LIB.impl("block_attention_triton_bwd", _triton_bwd, _key)


@torch.library.register_fake("nest_fast::block_attention_triton_fwd", lib=_LIB)
def _triton_fwd_fake(q, k, v, bias, mask, scale):
    return _out_and_lse(q)


@torch.library.register_fake("nest_fast::block_attention_triton_bwd", lib=_LIB)
def _triton_bwd_fake(dout, q, k, v, out, lse, bias, mask, scale, need_dbias):
    dbias = bias.new_empty(bias.shape) if need_dbias else q.new_empty(0, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _triton_setup(ctx, inputs, output):
    q, k, v, bias, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _triton_autograd(ctx, dout, _dlse):
    if dout is None:
        return None, None, None, None, None, None
    q, k, v, bias, mask, out, lse = ctx.saved_tensors
    need_dbias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _OPS.block_attention_triton_bwd(
        dout.contiguous(), q, k, v, out, lse, bias, mask, ctx.scale, need_dbias
    )
    return dq, dk, dv, dbias if need_dbias else None, None, None


torch.library.register_autograd(
    "nest_fast::block_attention_triton_fwd", _triton_autograd, setup_context=_triton_setup, lib=_LIB
)
torch.library.register_vmap(
    "nest_fast::block_attention_triton_fwd", _vmap.batching_rule(_OPS.block_attention_triton_fwd, 3, 5), lib=_LIB
)
