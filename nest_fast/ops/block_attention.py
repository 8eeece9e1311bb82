"""Block-local multi-head attention: ``softmax(scale * q @ k^T + bias + mask) @ v`` inside every block and head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _layout, _modes, _positions, _tuned, _vmap
from nest_fast.ops import _flops as flops
from nest_fast.ops._backends import Backend
from nest_fast.ops._register import nothing_like, operation
from nest_fast.ops._windows import from_windows, into_windows, window_mask
from nest_fast.reference import Windows

__all__ = ["block_attention"]

IMPLS = ("auto", "reference", "sdpa", "cpp", "triton")


@_tuned.tunable
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
    impl: str = "auto",
) -> Tensor:
    """Attention inside image blocks: ``out[b, t, :, h] = softmax(scale * q @ k^T + bias[h] + mask[t]) @ v``.

    Args:
        q: ``(B, T, N, heads, head_dim)``, fp32, fp16, bf16 or fp64: batch, blocks, tokens per block. Views of a packed
            ``(B, T, N, 3, heads, head_dim)`` projection are taken as they are. With ``windows`` an image
            ``(B, H * W, heads, head_dim)``.
        k, v: as ``q``, or with one head that all heads of ``q`` share (multi-query). v may have another head_dim than
            q and k, which the result has, too; not in "triton".
        scale: factor of the scores; ``head_dim ** -0.5`` if None. With ``cosine`` a tensor ``(heads,)``.
        cosine: q and k of every head have length 1 before they are multiplied (Swin v2). "triton" makes them so
            itself, but where gradients are wanted and heads of q share a key head.
        bias: ``(heads, N, N)``, any floating-point dtype, added to the scores of every block (a relative position
            bias).
        mask: ``(groups, N, N)`` with ``groups`` dividing T: block ``t`` takes ``mask[t % groups]``, added where it is
            floating point, kept where true if bool (a shifted-window mask). A row whose keys are all masked, by false
            or by -inf, gives zeros and no gradient.
        windows: :func:`nest_fast.windows` of ``(H, W)``: the blocks are T windows of N tokens. "triton", and "cpp"
            without gradients and where all padding is alike, read and write them where they are in the image; the
            others take them from it and put them back. Where windows are shifted and there is no ``mask``, it is
            Swin's: -100 between tokens from beyond an edge of the image and those at it.
        pad_k, pad_v: ``(1, k's heads, head_dim)``, k and v of all tokens where windows reach beyond the image, or
            ``(pads, k's heads, head_dim)``, of each of them, row by row of the image with padding below and on the
            right; both, or None for zeros. They are attended.
        rel_h, rel_w: ``(B, T, N, heads, h)`` and ``(B, T, N, heads, w)`` with h * w = N, or with ``windows``
            ``(B, H * W, heads, ...)`` and their height and width, in q's dtype; both, or None. The score of a query
            and the key ``(y, x)`` of its block has ``rel_h[..., y] + rel_w[..., x]`` added (decomposed relative
            positions). "cpp" adds them where no gradients are wanted and nothing else is added; elsewhere they become
            dimensions of q and k.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        impl: "auto" takes the best this machine has for these tensors; that is "reference", which has all derivatives,
            under ``torch.func``, and on a CPU where "cpp" cannot run and gradients are wanted. "reference" is plain
            PyTorch, "sdpa" is ``torch.nn.functional.scaled_dot_product_attention`` on 4-D views, "cpp" the extension's
            CPU kernel, "triton" the CUDA kernel (on CPU tensors under ``TRITON_INTERPRET=1``); a mask has no gradient
            in either. Only "auto" may choose. The gradients of "sdpa" are PyTorch's, also where it errs: on a CPU, in
            rows that have the most negative number for every key.

    Returns:
        As q, ``(B, T, N, heads, v's head_dim)`` in its dtype, contiguous, so ``.flatten(-2)`` is the head-major
        ``(B, T, N, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (MultiHeadAttention, MultiQueryAttention); for the positions Li et
    al., "MViTv2", CVPR 2022 (arXiv 2112.01526).
    """
    _check(q, k, v, bias, mask, windows, pad_k, pad_v, rel_h, rel_w, scale, cosine, dropout_p, impl)
    factors = scale if isinstance(scale, Tensor) else None
    tokens = q.shape[2] if windows is None else windows.tokens
    given = Given(q, k, v, bias, mask, dropout_p, tokens, windows, pad_k, pad_v, factors, rel_h, rel_w)
    if rel_h is not None and rel_w is not None and impl != "reference":
        if impl == "auto" and q.is_cpu:  # on a GPU it hangs on the dimensions that q and k get
            impl = choose(given)
        if impl != "reference" and not (impl == "cpp" and _adds_positions(given)):
            if isinstance(scale, Tensor):
                q, k, pad_k = _of_length(q, k, pad_k, scale)
            else:
                q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
            one_dim = q.is_cuda or impl == "triton"  # whose kernel has one head_dim for all
            q, k, v, pad_k, pad_v = _positions.joined((q, k, v, pad_k, pad_v), rel_h, rel_w, windows, one_dim)
            options: dict[str, Any] = {"bias": bias, "mask": mask, "windows": windows, "pad_k": pad_k, "pad_v": pad_v}
            out = block_attention(q, k, v, scale=1.0, **options, dropout_p=dropout_p, impl=impl)
            return out[..., : given.v.shape[-1]].contiguous()
    if impl == "auto":
        impl = choose(given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("block_attention", given)
    if isinstance(scale, Tensor):
        if impl != "triton" or (k.shape[-2] != q.shape[-2] and _modes.wants_gradients(given)):
            (q, k, pad_k), factors = _of_length(q, k, pad_k, scale), None
        scale = 1.0
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if windows is not None and not (impl == "triton" or (impl == "cpp" and _gathers(given))):
        q, k, v = into_windows(q, windows), into_windows(k, windows, pad_k), into_windows(v, windows, pad_v)
        rel_h, rel_w = (None if x is None else into_windows(x, windows) for x in (rel_h, rel_w))
        if any(windows.shift) and mask is None:
            mask = window_mask(windows, q)
        added: dict[str, Any] = {"bias": bias, "mask": mask, "rel_h": rel_h, "rel_w": rel_w}
        return from_windows(block_attention(q, k, v, scale=scale, **added, dropout_p=dropout_p, impl=impl), windows)
    if impl == "reference":
        added = {"bias": bias, "mask": mask, "rel_h": rel_h, "rel_w": rel_w}
        return reference.block_attention(q, k, v, scale=scale, **added, dropout_p=dropout_p).contiguous()
    if impl == "sdpa":
        return _sdpa(q, k, v, scale, bias, mask, dropout_p)
    q, k, v = (_layout.dense_rows(_modes.autocast(x)) for x in (q, k, v))
    positions = [None if x is None else _layout.dense_rows(_modes.autocast(x)) for x in (rel_h, rel_w)]
    pads = [None if x is None else x.to(q.dtype).contiguous() for x in (pad_k, pad_v)]
    if windows is not None:  # as one block
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        positions = [None if x is None else x.unsqueeze(1) for x in positions]
    numbers = Windows.to_numbers(windows)
    if impl == "cpp":
        out = _CPP(q, k, v, *positions, as_scores(bias), as_scores(mask), *pads, scale, numbers)[0]
    else:
        bias, mask = (x if x is None or x.dtype == torch.bool else _in_range(x, torch.float32) for x in (bias, mask))
        out = _TRITON(q, k, v, bias, mask, scale, *pads, factors, numbers)[0]
    return out if windows is None else out.squeeze(1)


def _of_length(q: Tensor, k: Tensor, pad_k: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """q as long as its head's ``scale``, k and its padding of length 1."""
    pad_k = None if pad_k is None else reference.with_length(pad_k)
    return reference.with_length(q, scale.unsqueeze(-1)), reference.with_length(k), pad_k


def _gathers(given: Given) -> bool:
    """Whether "cpp" takes windows from where they are."""
    return not _modes.wants_gradients(given) and (given.pad_k is None or given.pad_k.shape[0] == 1)


def _adds_positions(given: Given) -> bool:
    """Whether "cpp" adds them to the scores."""
    added = given.bias is not None or given.mask is not None or (given.windows is not None and any(given.windows.shift))
    return not added and not _modes.wants_gradients(given)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    windows: Windows | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    scale: float | Tensor | None,
    cosine: bool,
    dropout_p: float,
    impl: str,
) -> None:
    _checks.choice("impl", impl, IMPLS)
    dims = "(B, T, N, heads, head_dim)" if windows is None else "(B, H * W, heads, head_dim)"
    *outer, heads, head_dim = _checks.tensor("q", q, dims).shape
    _checks.floating("q", q)
    _checks.tensor("k", k, dims)
    if [*k.shape[:-2], k.shape[-1]] != [*outer, head_dim] or k.shape[-2] not in (1, heads):
        expected = f"({', '.join(map(str, outer))}, {heads} or 1, {head_dim})"
        raise ValueError(f"k: expected shape {expected} as q has, got {tuple(k.shape)}")
    _checks.tensor("v", v, dims)
    _checks.shape("v", v, (*k.shape[:-1], v.shape[-1]), "as k has, but for the last")
    for name, x in (("k", k), ("v", v)):
        _checks.alike(name, x, "q", q)
    if windows is None:
        T, N = outer[1:]
        for name, pad in (("pad_k", pad_k), ("pad_v", pad_v)):
            if pad is not None:
                raise ValueError(f"{name}: expected None without windows, got a tensor {tuple(pad.shape)}")
    else:
        T, N = _checks.cut("q", windows, outer[1])
        _check_pads(k, v, windows, pad_k, pad_v)
    if rel_h is not None or rel_w is not None:
        _check_positions(q, dims, rel_h, rel_w, windows, N)
    _checks.added_to_scores(bias, mask, (T, heads, N), "q", q)
    _checks.scale(scale, cosine, heads, "q", q)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p}")


def _check_pads(k: Tensor, v: Tensor, windows: Windows, pad_k: Tensor | None, pad_v: Tensor | None) -> None:
    if pad_k is None and pad_v is None:
        return
    for name, pad, other, x, of in (("pad_k", pad_k, "pad_v", k, "k"), ("pad_v", pad_v, "pad_k", v, "v")):
        if pad is None:
            raise ValueError(f"{name}: expected a tensor beside {other}, got None")
        _checks.tensor(name, pad, "(1 or pads, heads, head_dim)")
        if pad.shape[0] not in (1, windows.pads) or pad.shape[1:] != x.shape[2:]:
            expected = f"(1 or {windows.pads}, {x.shape[2]}, {x.shape[3]})"
            raise ValueError(f"{name}: expected shape {expected} as {of} has, got {tuple(pad.shape)}")
        _checks.alike(name, pad, of, x)
    pads = pad_k.shape[0]  # type: ignore[union-attr]
    _checks.shape("pad_v", pad_v, (pads, *v.shape[2:]), "as pad_k has")  # type: ignore[arg-type]


def _check_positions(
    q: Tensor, dims: str, rel_h: Tensor | None, rel_w: Tensor | None, windows: Windows | None, N: int
) -> None:
    given = {"rel_h": rel_h, "rel_w": rel_w}
    for name, x in given.items():
        if x is None:
            raise ValueError(f"{name}: expected a tensor beside {'rel_w' if name == 'rel_h' else 'rel_h'}, got None")
        edge = _checks.tensor(name, x, dims.replace("head_dim", name[-1])).shape[-1]
        if windows is not None:
            edge = windows.window[name == "rel_w"]
        _checks.shape(name, x, (*q.shape[:-1], edge), "as q and the windows have" if windows else "as q has")
        _checks.alike(name, x, "q", q)
    if rel_h.shape[-1] * rel_w.shape[-1] != N:  # type: ignore[union-attr]
        expected = f"{N} keys of {rel_h.shape[-1]} rows"  # type: ignore[union-attr]
        raise ValueError(f"rel_w: expected {expected}, got {rel_w.shape[-1]} columns")  # type: ignore[union-attr]


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    dropout_p: float
    tokens: int
    windows: Windows | None = None
    pad_k: Tensor | None = None
    pad_v: Tensor | None = None
    scale: Tensor | None = None
    rel_h: Tensor | None = None
    rel_w: Tensor | None = None


def _may_stream(given: Given) -> bool:
    """Whether "triton" takes more tokens than fit on chip: in windows that the library's attention would want copied,
    or whose bias its fastest kernels do not take."""
    return given.windows is not None and (given.windows.blocks > 1 or given.bias is not None)


NO_GRADIENT_OF_A_MASK = ("it has no gradient of a mask", lambda given: _modes.wants_gradients((given.mask,)))
BACKENDS = {
    "cpp": Backend(
        "cpp",
        (
            *_backends.CPP,
            ("it has no dropout", lambda given: given.dropout_p),
            NO_GRADIENT_OF_A_MASK,
        ),
    ),
    "triton": Backend(
        "triton",
        (
            *_backends.TRITON_MATMUL,
            ("N = {given.tokens} tokens are over 256", lambda given: given.tokens > 256 and not _may_stream(given)),
            ("N = {given.tokens} tokens are over 1024", lambda given: given.tokens > 1024 and _may_stream(given)),
            (lambda given: f"head_dim {given.q.shape[-1]} is over 128", lambda given: given.q.shape[-1] > 128),
            ("v has another head_dim than k", lambda given: given.v.shape[-1] != given.k.shape[-1]),
            ("it has no dropout", lambda given: given.dropout_p),
            NO_GRADIENT_OF_A_MASK,
        ),
    ),
}


# What may be measured.
_ABLE = (
    *BACKENDS.values(),
    Backend("reference", ()),
    # On a CPU its gradient is wrong where a row's largest score is so large that the logarithm of the sum is rounded
    # away.
    Backend("sdpa", (("its gradients err", lambda given: given.q.is_cpu and _modes.wants_gradients(given)),)),
)


def choose(given: Given, say: bool = True) -> str:
    """What "auto" is; whether it may ``say`` once what it does without."""
    if _modes.needs_plain(given):
        return "reference"
    return _tuned.implementation("block_attention", _ABLE, given, _rule, say)


def _rule(given: Given, say: bool) -> str:
    kind = given.q.device.type
    if kind == "cpu":
        if BACKENDS["cpp"].can(given):
            return "cpp"
        if say:
            _backends.say_missing(given.q)
        # PyTorch's fused attention for CPUs has no second derivative (nor has compiled code), and its gradients err.
        compiled = torch.compiler.is_compiling() and given.bias is None and given.mask is None
        return "reference" if _modes.wants_gradients(given) and not compiled else "sdpa"
    if kind == "cuda":
        if BACKENDS["triton"].can(given):
            return "triton"
        if say:
            _backends.say_once("block_attention", "scaled_dot_product_attention", BACKENDS["triton"], given)
    return "sdpa"


# --- the library's attention ------------------------------------------------------------------------------------------


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None, dropout_p: float
) -> Tensor:
    B, T, _, heads, _ = q.shape
    # 4-D is what the fused backends take; (B, T) of a packed projection flatten without a copy.
    q4, k4, v4 = (x.flatten(0, 1).transpose(1, 2).expand(-1, heads, -1, -1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q4, k4, v4, _score_mask(q, bias, mask), dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous().unflatten(0, (B, T))


def _score_mask(q: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """``bias`` and ``mask`` as one ``attn_mask`` that broadcasts to (blocks, heads, N, N)."""
    added = [x.dtype for x in (bias, mask) if x is not None and x.dtype != torch.bool]
    # Beside float16 and bfloat16 a CPU takes a float32 mask, too, which has room for -1e9; the GPU's kernels do not.
    dtype = torch.float32 if q.dtype in _checks.HALVES and q.is_cpu and any(x != q.dtype for x in added) else q.dtype
    if mask is None:
        return None if bias is None else _in_range(bias, dtype).to(dtype).unsqueeze(0)
    if mask.dtype == torch.bool and bias is not None:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    scores = mask.unsqueeze(1) if bias is None else mask.unsqueeze(1) + bias
    scores = scores if scores.dtype == torch.bool else _in_range(scores, dtype).to(dtype)
    return scores.repeat(q.shape[0] * (q.shape[1] // mask.shape[0]), 1, 1, 1)


def as_scores(x: Tensor | None) -> Tensor | None:
    """A bias or mask as the C++ kernels take it: float32 and contiguous, -inf where a bool takes a key away."""
    if x is None:
        return None
    if x.dtype == torch.bool:
        return torch.zeros(x.shape, device=x.device).masked_fill(~x, float("-inf"))
    return _in_range(x, torch.float32).float().contiguous()


def _in_range(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` with its finite values clamped to those of ``dtype``: rounded to -inf they would mask keys."""
    largest = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max <= largest:
        return x
    return torch.where(x.isinf(), x, x.clamp(-largest, largest))


# --- registration -----------------------------------------------------------------------------------------------------


def _in_blocks(shape, windows=()):
    """(B, T, N, heads, head_dim) of q: of its windows, where it is an image of them."""
    B, T, N, heads, head_dim = shape
    cut = Windows.of_numbers(windows)
    return (B, T, N, heads, head_dim) if cut is None else (B, cut.blocks, cut.tokens, heads, head_dim)


def _cpp_fake(q, k, v, rel_h, rel_w, bias, mask, pad_k, pad_v, scale, windows):
    return _fwd_fake(q, k, v, rel_h if bias is None else bias, mask, scale, windows=windows)


def _fwd_fake(q, k, v, bias, mask, scale, pad_k=None, pad_v=None, scales=None, windows=()):
    B, T, N, heads, _ = _in_blocks(q.shape, windows)
    adds = bias is not None or mask is not None or any(windows[4:6])
    numbers = (2,) if adds else ()
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty((B, T, heads, N, *numbers), dtype=torch.float32)


def _flops(q, k, v, bias, mask, scale, pad_k=None, pad_v=None, scales=None, windows=(), out_shape=None):
    *outer, _ = q = _in_blocks(q, windows)
    return flops.attention(q, 1) + flops.attention((*outer, v[-1]), 1)


def _cpp_flops(q, k, v, rel_h, rel_w, bias, mask, pad_k, pad_v, scale, windows, out_shape=None):
    return _flops(q, k, v, bias, mask, scale, windows=windows)


def _flops_bwd(dout, q, k, v, out, lse, bias, mask, scale, need, pad_k=None, pad_v=None, windows=(), *_, **unused):
    return flops.attention(_in_blocks(q, windows), 4)


def _bwd_fake(dout, q, k, v, out, lse, bias, mask, scale, need_dbias):
    dbias = bias.new_empty(bias.shape) if need_dbias else nothing_like(q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _gradients(kept, dout, backward, *more):
    need_dbias = kept.bias is not None and kept.needed["bias"]
    tensors = kept.q, kept.k, kept.v, kept.out, kept.lse, kept.bias, kept.mask
    dq, dk, dv, dbias, *others = backward(dout, *tensors, kept.scale, need_dbias, *more)
    return {"q": dq, "k": dk, "v": dv, "bias": dbias if need_dbias else None}, others


def _cpp_gradients(kept, dout):
    """Where v's head_dim is less than k's, v, out and dout get zeros beside them; where it is more, q and k do."""
    if kept.rel_h is not None or any(kept.windows):
        raise RuntimeError("rel_h, windows: expected none in the forward whose gradient is asked for, got some")
    q_dim, v_dim, dout = kept.q.shape[-1], kept.v.shape[-1], _layout.dense_rows(dout)
    if q_dim == v_dim:
        return _gradients(kept, dout, _CPP_BWD)[0]

    def backward(dout, q, k, v, out, *more):
        q, k, v, out, dout = (F.pad(x, (0, max(q_dim, v_dim) - x.shape[-1])) for x in (q, k, v, out, dout))
        dq, dk, dv, dbias = _CPP_BWD(dout, q, k, v, out, *more)
        return dq[..., :q_dim], dk[..., :q_dim], dv[..., :v_dim], dbias

    return _gradients(kept, dout, backward)[0]


def _cpp_bwd_vmap(info, in_dims, *args):
    """The gradient of a bias that all share is a sum for each: as if each had its own."""
    if args[-1] and in_dims[6] is None:
        args = (*args[:6], args[6].expand(info.batch_size, *args[6].shape), *args[7:])
        in_dims = (*in_dims[:6], 0, *in_dims[7:])
    return _vmap.batching_rule(_CPP_BWD, 6, 8)(info, in_dims, *args)


_CPP = operation(
    "block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, Tensor? rel_h, Tensor? rel_w, Tensor? bias, Tensor? mask,"
    " Tensor? pad_k, Tensor? pad_v, float scale, SymInt[] windows) -> (Tensor out, Tensor lse)",
    fake=_cpp_fake,
    saved=("q", "k", "v", "rel_h", "bias", "mask", "out", "lse"),
    gradients=_cpp_gradients,
    vmap=(5, 9),
    flops=_cpp_flops,
)
_CPP_BWD = operation(
    "block_attention_cpp_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias,"
    " Tensor? mask, float scale, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    fake=_bwd_fake,
    backward_of="block_attention",
    vmap=_cpp_bwd_vmap,
    flops=_flops_bwd,
)


def _triton_gradients(kept, dout):
    need_dpads = kept.pad_k is not None and (kept.needed["pad_k"] or kept.needed["pad_v"])
    pads = kept.pad_k, kept.pad_v
    more = *pads, kept.windows, need_dpads, kept.scales
    found, (dpads, dscales) = _gradients(kept, dout.contiguous(), _TRITON_BWD, *more)
    found["scales"] = None if kept.scales is None else dscales
    return {**found, **(dict(zip(("pad_k", "pad_v"), dpads, strict=True)) if need_dpads else {})}


def _triton_bwd_fake(dout, q, k, v, out, lse, bias, mask, scale, need_dbias, pad_k, pad_v, windows, need_dpads, scales):
    dpads = pad_k.new_empty((2, *pad_k.shape)) if need_dpads else nothing_like(q)
    dscales = nothing_like(q) if scales is None else scales.new_empty(scales.shape, dtype=torch.float32)
    return *_bwd_fake(dout, q, k, v, out, lse, bias, mask, scale, need_dbias), dpads, dscales


_TRITON = operation(
    "block_attention_triton_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, float scale, Tensor? pad_k,"
    " Tensor? pad_v, Tensor? scales, SymInt[] windows) -> (Tensor out, Tensor lse)",
    launch="block_attention.block_attention_fwd",
    fake=_fwd_fake,
    saved=("q", "k", "v", "bias", "mask", "pad_k", "pad_v", "scales", "out", "lse"),
    gradients=_triton_gradients,
    vmap=(3, 9),
    flops=_flops,
)
_TRITON_BWD = operation(
    "block_attention_triton_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias,"
    " Tensor? mask, float scale, bool need_dbias, Tensor? pad_k, Tensor? pad_v, SymInt[] windows, bool need_dpads,"
    " Tensor? scales) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dpads, Tensor dscales)",
    launch="block_attention.block_attention_bwd",
    fake=_triton_bwd_fake,
    backward_of="block_attention",
    flops=_flops_bwd,
)
