"""The attention sub-layer of a transformer layer: LayerNorm, attention inside blocks or windows, residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _flops, _layer, _layout, _modes, _packed, _tuned
from nest_fast.ops._backends import Backend, Rules
from nest_fast.ops._layer import IMPLS, fake_branch_backward, layer_backward, no_gradients
from nest_fast.ops._register import nothing_like, operation
from nest_fast.ops._windows import from_windows, into_windows
from nest_fast.ops.block_attention import NO_GRADIENT_OF_A_MASK, as_scores, block_attention
from nest_fast.ops.linear import add_linear, linear
from nest_fast.reference import Windows

__all__ = ["attended", "attention_layer", "chosen"]


@_tuned.tunable
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
    packed: _packed.Packed | None = None,
    impl: str = "auto",
) -> Tensor:
    """``x + branch_scale * proj(attention(qkv(layer_norm(x))))`` inside each block, or each window of an image.

    Args:
        x: ``(B, T, N, C)``, or with ``windows`` ``(B, H * W, C)``, any floating-point dtype and strides.
        norm_weight, norm_bias: ``(C,)``, of x's dtype, or both float32 beside float16 and bfloat16.
        qkv_weight, qkv_bias: ``(C + 2 * kv, C)`` and its first dimension or None; q of every head, then k, then v. kv
            is C, or one head's C / num_heads with ``multi_query``.
        proj_weight, proj_bias: ``(C, C)``, its input ordered (heads, head_dim), and ``(C,)`` or None.
        num_heads: heads; divides C.
        multi_query: one key and value head for all query heads.
        windows: :func:`nest_fast.windows` of ``(H, W)``: T windows of N tokens, which stay where they are in the image.
            Where a window reaches beyond it, its tokens are zeros after the LayerNorm, as in Swin; they are attended.
            Where windows are shifted and there is no ``mask``, it is Swin's: -100 between tokens from beyond an edge of
            the image and those at it.
        bias: ``(heads, N, N)``, any floating-point dtype, added to the scores of every block (a relative position
            bias).
        mask: ``(groups, N, N)`` with ``groups`` dividing T: block ``t`` takes ``mask[t % groups]``, added where it is
            floating point, kept where true if bool.
        scale: factor of the scores; None is head_dim ** -0.5. With ``cosine`` a tensor ``(heads,)``.
        cosine: q and k of every head have length 1 before they are multiplied (Swin v2).
        post_norm: the LayerNorm is the branch's last step, not its first (Swin v2).
        branch_scale: factor of what is added to x: that of stochastic depth for samples that are kept. A tensor
            ``(B,)`` has one for each sample, which "reference" takes and, one by one, the parts that "auto" may be.
        eps: added to the variance.
        packed: where "cpp" keeps its packed weights: a dict, empty at first, given again with the same weights only,
            and without gradients. None: they are packed in every call.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch. "cpp", on a CPU,
            computes block by block, so that nothing but x and the result leaves the cache. Where gradients are wanted
            it keeps qkv and the attention's output and computes the LayerNorm's again. A mask has no gradient there.
            "triton" is three kernels on a GPU (on CPU tensors under ``TRITON_INTERPRET=1``), LayerNorm and qkv in one,
            block_attention, the projection and the sum in one, for inference, C at most 256, in half precision 768, and
            without post_norm; in half precision, of blocks of at most 208 tokens and 128 channels, heads of 16 or 32,
            the first two are one. Only "auto" may choose.

    Returns:
        As ``x``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock); Liu et al., "Swin Transformer", ICCV 2021 (arXiv
    2103.14030) and "Swin Transformer V2", CVPR 2022 (arXiv 2111.09883), and their code.
    """
    weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    kv_heads = 1 if multi_query else num_heads
    C = _check(x, *weights, num_heads, kv_heads, windows, bias, mask, scale, cosine, branch_scale, impl)
    scale = float((C // num_heads) ** -0.5) if scale is None else scale
    tokens = x.shape[2] if windows is None else windows.tokens
    factors = scale if isinstance(scale, Tensor) else None
    sizes = multi_query, num_heads, tokens, post_norm
    given = Given(x, *weights, bias, mask, factors, *sizes, _layer.of_samples(branch_scale))
    _packed.check(packed, given)
    impl = _layer.resolve("attention_layer", impl, BACKENDS, choose, given)
    if impl == "reference":
        return reference.attention_layer(
            *(x, *weights),
            num_heads=num_heads,
            multi_query=multi_query,
            windows=windows,
            bias=bias,
            mask=mask,
            scale=scale,
            cosine=cosine,
            post_norm=post_norm,
            branch_scale=branch_scale,
            eps=eps,
        )
    if impl == "cpp":
        dtype = _modes.autocast_dtype(x)
        qkv_weight, proj_weight = (_layout.dense_rows(weight.to(dtype)) for weight in (qkv_weight, proj_weight))
        out, *_ = _CPP(
            _layout.dense_rows(x.to(dtype) if post_norm else x).reshape(-1, C),
            *((None, None) if post_norm else (norm_weight.float().contiguous(), norm_bias.float().contiguous())),
            eps,
            qkv_weight,
            _layout.dense(qkv_bias, dtype),
            proj_weight,
            _layout.dense(proj_bias, dtype),
            as_scores(bias),
            as_scores(mask),
            scale.float().contiguous() if isinstance(scale, Tensor) else None,
            Windows.to_numbers(windows),
            tokens,
            *(num_heads, kv_heads, 1.0 if isinstance(scale, Tensor) else scale, branch_scale),
            _modes.wants_gradients(given),
            _packed.linear(packed, "qkv", qkv_weight),
            _packed.linear(packed, "proj", proj_weight),
        )
        out = out.view(x.shape)
        return x + branch_scale * torch.layer_norm(out, (C,), norm_weight, norm_bias, eps) if post_norm else out
    y = attended(
        *(x, norm_weight, norm_bias, qkv_weight, qkv_bias),
        num_heads=num_heads,
        multi_query=multi_query,
        windows=windows,
        bias=bias,
        mask=mask,
        scale=scale,
        cosine=cosine,
        post_norm=post_norm,
        eps=eps,
        impl=impl,
    )
    if impl == "triton":
        return _LINEAR_SUM(y, proj_weight, proj_bias, x, branch_scale)
    norm = (norm_weight, norm_bias, eps) if post_norm else None
    return add_linear(x, y, proj_weight, proj_bias, branch_scale, norm)


def attended(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    *,
    num_heads: int,
    multi_query: bool,
    scale: float | Tensor | None,
    eps: float,
    impl: str,
    windows: Windows | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cosine: bool = False,
    post_norm: bool = False,
) -> Tensor:
    """What :func:`attention_layer` projects, ``(…, C)``; its arguments, an ``impl`` that is found. Checks nothing."""
    if impl == "triton":
        if _is_one_kernel(x, num_heads, multi_query, bias, mask, windows, scale if cosine else None):
            return _NORM_ATTENTION(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, num_heads, scale)
        y = _NORM_LINEAR(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias)
    else:
        y = x if post_norm else torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        y = linear(y, qkv_weight, qkv_bias)
    heads = (num_heads, *(1 if multi_query else num_heads,) * 2)
    q, k, v = y.unflatten(-1, (sum(heads), -1)).split(heads, -2)
    pad_k = pad_v = None
    if windows is not None and qkv_bias is not None:  # what padding, zeros after the LayerNorm, becomes
        _, pad_k, pad_v = qkv_bias.to(y.dtype).view(1, sum(heads), -1).split(heads, -2)
    within = {"windows": windows, "pad_k": pad_k, "pad_v": pad_v}
    inner = "triton" if impl == "triton" else "auto"
    y = block_attention(q, k, v, scale=scale, cosine=cosine, bias=bias, mask=mask, **within, impl=inner)
    return y.flatten(-2)


def _is_one_kernel(x: Tensor, num_heads: int, multi_query: bool, *more: object) -> bool:
    """Whether LayerNorm, qkv and attention are one: in half precision, inside blocks, with few and narrow heads.

    There it compiles without spilling. ``more`` is what there is None of.
    """
    C = x.shape[-1]
    return (
        x.dtype != torch.float32
        and x.dim() == 4
        and C <= 128
        and C // num_heads in (16, 32)
        and x.shape[2] <= 208
        and not multi_query
        and all(one is None for one in more)
    )


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
    windows: Windows | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float | Tensor | None,
    cosine: bool,
    branch_scale: float | Tensor,
    impl: str,
) -> int:
    """The channels."""
    _checks.choice("impl", impl, IMPLS)
    if windows is None:
        _, T, N, C = _checks.tensor("x", x, "(B, T, N, C)").shape
    else:
        _, rows, C = _checks.tensor("x", x, "(B, H * W, C)").shape
        T, N = _checks.cut("x", windows, rows)
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
    _checks.added_to_scores(bias, mask, (T, num_heads, N), "x", x)
    _checks.scale(scale, cosine, num_heads, "x", x)
    _checks.branch_scale(branch_scale, x)
    return C


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    scale: Tensor | None
    multi_query: bool
    num_heads: int
    tokens: int
    post_norm: bool
    branch_scale: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.x.shape[-1] // self.num_heads


_CPP_RULES: Rules = (
    NO_GRADIENT_OF_A_MASK,
    ("it has no cosine attention to one key head", lambda given: given.scale is not None and given.multi_query),
)
BACKENDS = {
    "cpp": Backend("cpp", _layer.BACKENDS["cpp"].rules + _CPP_RULES),
    "triton": Backend(
        "triton",
        (
            *_layer.BACKENDS["triton"].rules,
            ("N = {given.tokens} tokens are over 256", lambda given: given.tokens > 256),
            ("head_dim {given.head_dim} is over 128", lambda given: given.head_dim > 128),
        ),
    ),
}
# Where nothing was measured, "auto" on a GPU is "parts"; of two kernels for a narrow layer projection_mlp says why.
_AUTO_ON_GPU = Backend("triton", (("it is taken where it was measured alone", lambda given: True),))
AUTO = Backend("cpp", _layer.AUTO.rules + _CPP_RULES)
_ABLE = tuple(Backend(one.name, one.rules + _CPP_RULES) if one.name == "cpp" else one for one in _layer.ABLE)


def choose(given: Given) -> str:
    """What "auto" is: "cpp" on a CPU, "triton" on a GPU where that was measured, or "parts"."""
    return _layer.choose("attention_layer", _ABLE, AUTO, _AUTO_ON_GPU, BACKENDS["triton"], given)


def chosen(x: Tensor, weights: Sequence[Tensor | None], num_heads: int, multi_query: bool, post_norm: bool) -> str:
    """What "auto" is inside the blocks of ``x``, to be given as ``impl``; of the six weights, and without a bias."""
    sizes = multi_query, num_heads, x.shape[2], post_norm
    return _tuned.Chosen(choose(Given._make((x, *weights, None, None, None, *sizes, None))))


# --- registration -----------------------------------------------------------------------------------------------------


def _rows(rows, windows):
    """So many of images are so many of their windows."""
    cut = Windows.of_numbers(windows)
    return rows if cut is None else rows // cut.rows * (cut.blocks * cut.tokens)


def _fake(x, norm_weight, norm_bias, eps, qkv, qkv_bias, proj, proj_bias, bias, mask, scales, *rest):
    windows, tokens, heads, _, _, _, training, *_ = rest
    C, kept = x.shape[1], _rows(x.shape[0], windows) if training else 0
    numbers = (2,) if any(x is not None for x in (bias, mask, scales)) or any(windows[4:6]) else ()
    lse = x.new_empty((kept // tokens, heads, tokens, *numbers), dtype=torch.float32)
    return x.new_empty(x.shape), qkv.new_empty((kept, qkv.shape[0])), qkv.new_empty((kept, C)), lse


def _bwd_fake(dout, x, qkv, attended, lse, qkv_weight, proj_weight, bias, mask, scales, *rest):
    *output_mask, need_dbias, need_dscales = rest[-1]
    dbias = bias.new_empty(bias.shape) if need_dbias else nothing_like(x)
    dscales = scales.new_empty(scales.shape) if need_dscales else nothing_like(x)
    return *fake_branch_backward(x, (qkv_weight, proj_weight), output_mask), dbias, dscales


def _gradients(kept, dout):
    _checks.training(kept.training)
    windows = Windows.of_numbers(kept.windows)

    def into(x):
        if windows is None:
            return x
        return into_windows(x.unflatten(0, (-1, windows.rows)), windows).flatten(0, 2)

    def branch_backward(dbranch, y, mask):
        saved = kept.qkv, kept.attended, kept.lse, kept.qkv_weight, kept.proj_weight
        scores, sizes = (kept.bias, kept.mask, kept.scales), (kept.windows, kept.tokens, kept.heads, kept.kv_heads)
        dy, *others = _CPP_BWD(into(dbranch), into(y), *saved, *scores, *sizes, kept.scale, mask)
        if windows is not None and mask[0]:
            dy = from_windows(dy.unflatten(0, (-1, windows.blocks, windows.tokens)), windows).flatten(0, 1)
        return dy, *others

    parameters = "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "bias", "scales"
    return layer_backward(kept, dout, parameters, branch_backward)


def _norm_attention_fake(x, *_):
    return x.new_empty(x.shape)


def _norm_attention_flops(x, norm_weight, norm_bias, eps, weight, *_, out_shape=None):
    return _flops.linear(x, weight) + _flops.attention(x)


def _norm_linear_fake(x, norm_weight, norm_bias, eps, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _norm_linear_flops(x, norm_weight, norm_bias, eps, weight, *_, out_shape=None):
    return _flops.linear(x, weight)


def _linear_sum_fake(x, weight, bias, residual, scale):
    return residual.new_empty(residual.shape)


def _linear_sum_flops(x, weight, *_, out_shape=None):
    return _flops.linear(x, weight)


def _attention_flops(x_shape, tokens, count):
    return _flops.attention((1, 1, tokens, x_shape[0] // max(tokens, 1), x_shape[1]), count)


def _cpp_flops(x, norm_weight, norm_bias, eps, qkv, qkv_bias, proj, proj_bias, bias, mask, scales, *rest, **unused):
    windows, tokens, *_ = rest
    rows = (_rows(x[0], windows), x[1])
    return _flops.linear(rows, qkv) + _attention_flops(rows, tokens, 2) + _flops.linear(rows, proj)


def _bwd_flops(dout, x, qkv_out, attended, lse, qkv, proj, bias, mask, scales, windows, tokens, *_, out_shape=None):
    dx, dqkv, _, dproj, *_ = out_shape
    linears = _flops.linear_gradients(x, qkv, dx, dqkv) + _flops.linear_gradients(x, proj, x, dproj)
    return linears + _attention_flops(x, tokens, 4)


_CPP = operation(
    "attention_layer_cpp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv_weight,"
    " Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, Tensor? bias, Tensor? mask, Tensor? scales,"
    " SymInt[] windows, SymInt tokens, int heads, int kv_heads, float scale, float branch_scale, bool training,"
    " Tensor? qkv_packed=None, Tensor? proj_packed=None) -> (Tensor out, Tensor qkv, Tensor attended, Tensor lse)",
    fake=_fake,
    saved=(
        *("x", "norm_weight", "norm_bias", "qkv_weight", "proj_weight", "bias", "mask", "scales"),
        *("qkv", "attended", "lse"),
    ),
    gradients=_gradients,
    flops=_cpp_flops,
)
_CPP_BWD = operation(
    "attention_layer_cpp_bwd(Tensor dout, Tensor x, Tensor qkv, Tensor attended, Tensor lse, Tensor qkv_weight,"
    " Tensor proj_weight, Tensor? bias, Tensor? mask, Tensor? scales, SymInt[] windows, SymInt tokens, int heads,"
    " int kv_heads, float scale, bool[7] output_mask) -> (Tensor dx, Tensor dqkv_weight, Tensor dqkv_bias,"
    " Tensor dproj_weight, Tensor dproj_bias, Tensor dbias, Tensor dscales)",
    fake=_bwd_fake,
    backward_of="attention_layer",
    flops=_bwd_flops,
)
_NORM_ATTENTION = operation(
    "norm_attention_triton_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias,"
    " int num_heads, float scale) -> Tensor",
    launch="attention_layer.norm_attention_fwd",
    fake=_norm_attention_fake,
    gradients=no_gradients,
    flops=_norm_attention_flops,
)
_NORM_LINEAR = operation(
    "norm_linear_triton_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias)"
    " -> Tensor",
    launch="attention_layer.norm_linear_fwd",
    fake=_norm_linear_fake,
    gradients=no_gradients,
    flops=_norm_linear_flops,
)
_LINEAR_SUM = operation(
    "linear_sum_triton_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, float scale) -> Tensor",
    launch="attention_layer.linear_sum_fwd",
    fake=_linear_sum_fake,
    gradients=no_gradients,
    flops=_linear_sum_flops,
)
