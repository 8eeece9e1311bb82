"""The MLP sub-layer of a transformer layer: LayerNorm, linear, GELU, linear, residual sum."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _flops, _gpu, _layer, _layout, _modes, _packed, _tuned
from nest_fast.ops._backends import Backend, Rules
from nest_fast.ops._layer import IMPLS, fake_branch_backward, layer_backward
from nest_fast.ops._register import nothing_like, operation
from nest_fast.ops.linear import add_linear, linear, linear_gelu

__all__ = ["chosen", "mlp_layer"]

ACTIVATIONS = ("gelu", "gelu_tanh")


@_tuned.tunable
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
    packed: _packed.Packed | None = None,
    impl: str = "auto",
) -> Tensor:
    """``x + branch_scale * fc2(gelu(fc1(layer_norm(x))))``.

    Args:
        x: ``(…, C)``, any floating-point dtype and strides.
        norm_weight, norm_bias: ``(C,)``, of x's dtype, or both float32 beside float16 and bfloat16.
        fc1_weight, fc1_bias: ``(hidden, C)`` and ``(hidden,)`` or None.
        fc2_weight, fc2_bias: ``(C, hidden)`` and ``(C,)`` or None.
        activation: "gelu" (exact) or "gelu_tanh".
        post_norm: the LayerNorm is the branch's last step, not its first (Swin v2).
        branch_scale: factor of what is added to x: that of stochastic depth for samples that are kept. A tensor
            ``(B,)`` has one for each sample, which "reference" and "triton" take and, one by one, the parts that "auto"
            may be; for "triton" it has no gradient.
        eps: added to the variance.
        packed: where "cpp" keeps its packed weights: a dict, empty at first, given again with the same weights only,
            and without gradients. None: they are packed in every call.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch. "cpp", on a CPU,
            computes some rows at a time, so that the hidden activations never leave the cache. Where gradients are
            wanted it keeps fc1's output and computes those of the LayerNorm and the GELU again. "triton" is one kernel
            on a GPU (on CPU tensors under ``TRITON_INTERPRET=1``), for C at most 256 and the LayerNorm first; the
            hidden activations never leave the chip. In half precision and for C at most 768 it is two, LayerNorm, fc1
            and GELU, and fc2 and the sum. Its gradients are two kernels more, which know x alone and make the rest
            anew, in half precision for C at most 128; of C at most 512 they keep what fc1 gives, too. Only "auto" may
            choose.

    Returns:
        ``(…, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock).
    """
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    C = _check(*tensors, activation, branch_scale, impl)
    given = Given(*tensors, post_norm, _layer.of_samples(branch_scale))
    _packed.check(packed, given)
    impl = _layer.resolve("mlp_layer", impl, BACKENDS, choose, given)
    if impl == "reference":
        return reference.mlp_layer(
            *tensors, activation=activation, post_norm=post_norm, branch_scale=branch_scale, eps=eps
        )
    if impl == "triton":
        tanh = activation == "gelu_tanh"
        scales = (1.0, branch_scale) if isinstance(branch_scale, Tensor) else (branch_scale, None)
        call = x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, tanh, fc2_weight, fc2_bias, *scales
        if C > GRADIENT_CHANNELS and _modes.wants_gradients(given):
            return _TRITON_WIDE(*call)[0]
        return _TRITON(*call)
    if impl == "cpp":
        dtype = _modes.autocast_dtype(x)
        fc1_weight, fc2_weight = (_layout.dense_rows(weight.to(dtype)) for weight in (fc1_weight, fc2_weight))
        out, _ = _CPP(
            _layout.dense_rows(x.to(dtype) if post_norm else x).reshape(-1, C),
            *((None, None) if post_norm else (norm_weight.float().contiguous(), norm_bias.float().contiguous())),
            eps,
            fc1_weight,
            _layout.dense(fc1_bias, dtype),
            activation,
            fc2_weight,
            _layout.dense(fc2_bias, dtype),
            branch_scale,
            _modes.wants_gradients(given),
            _packed.linear(packed, "fc1", fc1_weight),
            _packed.linear(packed, "fc2", fc2_weight),
        )
        out = out.view(x.shape)
        return x + branch_scale * torch.layer_norm(out, (C,), norm_weight, norm_bias, eps) if post_norm else out
    y = x if post_norm else torch.layer_norm(x, (C,), norm_weight, norm_bias, eps)
    if _layer.is_eager_on_a_gpu(given):
        dtype = _modes.autocast_dtype(y)  # of what the next matmul takes
        y = linear_gelu(y, fc1_weight, fc1_bias, activation, dtype)
    else:
        y = linear(y, fc1_weight, fc1_bias, activation=activation)
    norm = (norm_weight, norm_bias, eps) if post_norm else None
    return add_linear(x, y, fc2_weight, fc2_bias, branch_scale, norm)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    branch_scale: float | Tensor,
    impl: str,
) -> int:
    """The channels."""
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("activation", activation, ACTIVATIONS)
    hidden, C = _checks.tensor("fc1_weight", fc1_weight, "(hidden, C)").shape
    if _checks.is_tensor("x", x, "(…, C)").dim() == 0 or x.shape[-1] != C:
        raise ValueError(f"x: expected shape (…, {C}) as fc1_weight says, got {tuple(x.shape)}")
    weights = {
        "norm_weight": (norm_weight, (C,)),
        "norm_bias": (norm_bias, (C,)),
        "fc1_weight": (fc1_weight, (hidden, C)),
        "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (C, hidden)),
        "fc2_bias": (fc2_bias, (C,)),
    }
    _checks.parameters(x, weights, optional=("fc1_bias", "fc2_bias"))
    _checks.branch_scale(branch_scale, x)
    return C


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    post_norm: bool
    branch_scale: Tensor | None = None


TOO_LARGE = ("a weight has 2^31 numbers or more", lambda given: given.fc1_weight.numel() >= 2**31)
CERTAIN_CHANNELS = 192  # up to which a model of its gain leaves room for the model's errors (docs/notes/passes.md)
GRADIENT_CHANNELS = 128  # of which a program holds the gradients in registers, beside their input
WIDE_GRADIENT_CHANNELS = 512

_FOR_GRADIENTS: Rules = (
    ("its gradients are in half precision", lambda given: given.x.dtype == torch.float32),
    *_layer.at_most(WIDE_GRADIENT_CHANNELS),
    (
        "branch_scale wants a gradient",
        lambda given: given.branch_scale is not None and given.branch_scale.requires_grad,
    ),
)
BACKENDS = {
    **_layer.BACKENDS,
    "triton": Backend(
        "triton",
        (
            *_backends.TRITON_LAYER,
            ("the LayerNorm comes last", lambda given: given.post_norm),
            *_layer.CHANNELS,
            TOO_LARGE,
            *_backends.where(_modes.wants_gradients, _FOR_GRADIENTS),
        ),
    ),
}
# Where nothing was measured, "auto" on a GPU keeps these rules, or is "parts".
_AUTO_ON_GPU = Backend(
    "triton",
    (
        *BACKENDS["triton"].rules,
        ("its gain with gradients is not certain", _modes.wants_gradients),
        ("its gain in float32 is not certain", lambda given: given[0].dtype == torch.float32),
        (
            lambda given: f"its gain with C = {given[0].shape[-1]} channels, over {CERTAIN_CHANNELS}, is not certain",
            lambda given: given[0].shape[-1] > CERTAIN_CHANNELS,
        ),
        (
            "its gain on compute capability 10.x is not certain",
            lambda given: given[0].device.type == "cuda" and _gpu.capability(given[0].device)[0] == 10,
        ),
    ),
)


def choose(given: Given) -> str:
    """What "auto" is: "cpp" on a CPU, "triton" on a GPU, or "parts"."""
    return _layer.choose("mlp_layer", _layer.ABLE, _layer.AUTO, _AUTO_ON_GPU, BACKENDS["triton"], given)


def chosen(*given: Any) -> str:
    """What "auto" is, to be given as ``impl``, of the first seven arguments, ``post_norm`` and a ``branch_scale``
    for each sample."""
    return _tuned.Chosen(choose(Given(*given)))


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, *rest):
    _, training, *_ = rest
    return x.new_empty(x.shape), fc1_weight.new_empty((x.shape[0] if training else 0, fc1_weight.shape[0]))


def _bwd_fake(dout, x, hidden, fc1_weight, activation, fc2_weight, output_mask):
    return fake_branch_backward(x, (fc1_weight, fc2_weight), output_mask)


def _gradients(kept, dout):
    _checks.training(kept.training)

    def branch_backward(dbranch, y, mask):
        return _CPP_BWD(dbranch, y, kept.hidden, kept.fc1_weight, kept.activation, kept.fc2_weight, mask)

    return layer_backward(kept, dout, ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), branch_backward)


def _cpp_flops(x, norm_weight, norm_bias, eps, fc1, fc1_bias, activation, fc2, *_, out_shape=None):
    return _flops.linear(x, fc1) + _flops.linear((x[0], fc1[0]), fc2)


def _bwd_flops(dout, x, hidden, fc1, activation, fc2, *_, out_shape=None):
    dx, dfc1, _, dfc2, _ = out_shape
    return _flops.linear_gradients(x, fc1, dx, dfc1) + _flops.linear_gradients(hidden, fc2, hidden, dfc2)


def _triton_fake(x, *_):
    return x.new_empty(x.shape)


def _triton_bwd_fake(dout, x, norm_weight, norm_bias, eps, fc1, fc1_bias, tanh, fc2, scale, scales, output_mask):
    before, wants_fc1, wants_fc2, wants_bias = output_mask
    shapes = (2, x.shape[-1]), fc1.shape, fc1.shape[:1], fc2.shape, x.shape[-1:]
    wanted = before, wants_fc1, wants_fc1, wants_fc2, wants_bias
    sums = (x.new_empty(shape if want else 0, dtype=torch.float32) for shape, want in zip(shapes, wanted, strict=True))
    return x.new_empty(x.shape) if before else nothing_like(x), *sums


def _triton_gradients(kept, dout):
    def backward(*wanted):
        norm, linear_1 = (kept.norm_weight, kept.norm_bias, kept.eps), (kept.fc1_weight, kept.fc1_bias)
        scales = kept.branch_scale, kept.sample_scale
        return _TRITON_BWD(dout, kept.x, *norm, *linear_1, kept.tanh, kept.fc2_weight, *scales, wanted)

    return _asked_for(kept, backward)


def _wide_gradients(kept, dout):
    def backward(*wanted):
        saved = kept.x, kept.hidden, kept.mean, kept.rstd, kept.norm_weight, kept.norm_bias
        scales = kept.branch_scale, kept.sample_scale
        return _TRITON_WIDE_BWD(dout, *saved, kept.fc1_weight, kept.tanh, kept.fc2_weight, *scales, wanted)

    return _asked_for(kept, backward)


def _asked_for(kept, backward):
    """The gradients that ``backward`` returns, called with which are wanted, by name."""
    before, fc1, fc2, bias = wanted = [
        any(kept.needed[name] for name in names)
        for names in (("x", "norm_weight", "norm_bias"), ("fc1_weight", "fc1_bias"), ("fc2_weight",), ("fc2_bias",))
    ]
    dx, dnorm, dfc1, dfc1_bias, dfc2, dfc2_bias = backward(*wanted)
    found: dict[str, Tensor | None] = {}
    if before:
        found |= {"x": dx, "norm_weight": dnorm[0], "norm_bias": dnorm[1]}
    if fc1:
        found |= {"fc1_weight": dfc1, "fc1_bias": dfc1_bias}
    if fc2:
        found["fc2_weight"] = dfc2
    if bias:
        found["fc2_bias"] = dfc2_bias
    return {name: grad for name, grad in found.items() if kept.needed[name]}


def _wide_fake(x, norm_weight, norm_bias, eps, fc1, *_):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], fc1.shape[0])), mean, rstd


def _wide_bwd_fake(dout, x, hidden, mean, rstd, norm_weight, norm_bias, fc1, tanh, fc2, scale, scales, output_mask):
    norm = norm_weight, norm_bias, 0.0
    return _triton_bwd_fake(dout, x, *norm, fc1, None, tanh, fc2, scale, scales, output_mask)


def _triton_flops(x, norm_weight, norm_bias, eps, fc1, fc1_bias, tanh, fc2, *_, out_shape=None):
    return _flops.linear(x, fc1) + _flops.linear((*x[:-1], fc1[0]), fc2)


def _triton_bwd_flops(dout, x, norm_weight, norm_bias, eps, fc1, fc1_bias, tanh, fc2, *_, out_shape=None):
    dx, _, dfc1, _, dfc2, _ = out_shape
    hidden = (*x[:-1], fc1[0])
    through_fc2 = hidden if math.prod(dx) + math.prod(dfc1) else (0,)
    return _flops.linear_gradients(x, fc1, dx, dfc1) + _flops.linear_gradients(hidden, fc2, through_fc2, dfc2)


def _wide_bwd_flops(dout, x, hidden, mean, rstd, norm_weight, norm_bias, fc1, tanh, fc2, *_, out_shape=None):
    norm = norm_weight, norm_bias, 0.0
    return _triton_bwd_flops(dout, x, *norm, fc1, None, tanh, fc2, out_shape=out_shape)


_CPP = operation(
    "mlp_layer_cpp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor fc1_weight,"
    " Tensor? fc1_bias, str activation, Tensor fc2_weight, Tensor? fc2_bias, float branch_scale, bool training,"
    " Tensor? fc1_packed=None, Tensor? fc2_packed=None) -> (Tensor out, Tensor hidden)",
    fake=_fake,
    saved=("x", "norm_weight", "norm_bias", "fc1_weight", "fc2_weight", "hidden"),
    gradients=_gradients,
    flops=_cpp_flops,
)
_CPP_BWD = operation(
    "mlp_layer_cpp_bwd(Tensor dout, Tensor x, Tensor hidden, Tensor fc1_weight, str activation, Tensor fc2_weight,"
    " bool[5] output_mask) -> (Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias)",
    fake=_bwd_fake,
    backward_of="mlp_layer",
    flops=_bwd_flops,
)
_TRITON = operation(
    "mlp_layer_triton_fwd(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight,"
    " Tensor? fc1_bias, bool tanh, Tensor fc2_weight, Tensor? fc2_bias, float branch_scale, Tensor? sample_scale=None)"
    " -> Tensor",
    launch="mlp_layer.mlp_layer_fwd",
    fake=_triton_fake,
    saved=("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "sample_scale"),
    gradients=_triton_gradients,
    flops=_triton_flops,
)
_TRITON_BWD = operation(
    "mlp_layer_triton_bwd(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight,"
    " Tensor? fc1_bias, bool tanh, Tensor fc2_weight, float branch_scale, Tensor? sample_scale, bool[4] output_mask)"
    " -> (Tensor dx, Tensor dnorm, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias)",
    launch="_mlp_gradients.mlp_layer_bwd",
    fake=_triton_bwd_fake,
    backward_of="mlp_layer",
    flops=_triton_bwd_flops,
)
_TRITON_WIDE = operation(
    "mlp_layer_triton_wide(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight,"
    " Tensor? fc1_bias, bool tanh, Tensor fc2_weight, Tensor? fc2_bias, float branch_scale, Tensor? sample_scale)"
    " -> (Tensor out, Tensor hidden, Tensor mean, Tensor rstd)",
    launch="_wide_mlp.wide_mlp_fwd",
    fake=_wide_fake,
    saved=(
        *("x", "norm_weight", "norm_bias", "fc1_weight", "fc2_weight", "sample_scale"),
        *("hidden", "mean", "rstd"),
    ),
    gradients=_wide_gradients,
    flops=_triton_flops,
)
_TRITON_WIDE_BWD = operation(
    "mlp_layer_triton_wide_bwd(Tensor dout, Tensor x, Tensor hidden, Tensor mean, Tensor rstd, Tensor norm_weight,"
    " Tensor norm_bias, Tensor fc1_weight, bool tanh, Tensor fc2_weight, float branch_scale, Tensor? sample_scale,"
    " bool[4] output_mask)"
    " -> (Tensor dx, Tensor dnorm, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias)",
    launch="_wide_mlp.wide_mlp_bwd",
    fake=_wide_bwd_fake,
    backward_of="mlp_layer",
    flops=_wide_bwd_flops,
)
