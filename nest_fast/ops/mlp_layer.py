"""The MLP half of a pre-norm transformer layer: LayerNorm, linear, GELU, linear, residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _choice, _extension
from nest_fast.ops._layer import fake_branch_backward, layer_backward
from nest_fast.ops.linear import linear

__all__ = ["mlp_layer"]

IMPLS = ("auto", "reference", "cpp")
ACTIVATIONS = ("gelu", "gelu_tanh")

_OPS = torch.ops.nest_fast
_LIB = _extension.Library()
_LIB.define(
    "mlp_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias,"
    " str activation, Tensor fc2_weight, Tensor? fc2_bias, float branch_scale, bool training)"
    " -> (Tensor out, Tensor hidden)"
)
_LIB.define(
    "mlp_layer_cpp_bwd(Tensor dout, Tensor x, Tensor hidden, Tensor fc1_weight, str activation, Tensor fc2_weight)"
    " -> (Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias)"
)


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
    branch_scale: float = 1.0,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """``x + branch_scale * fc2(gelu(fc1(layer_norm(x))))``.

    Args:
        x: ``(…, C)``, any floating-point dtype.
        norm_weight, norm_bias: ``(C,)``.
        fc1_weight, fc1_bias: ``(hidden, C)`` and ``(hidden,)`` or None.
        fc2_weight, fc2_bias: ``(C, hidden)`` and ``(C,)`` or None.
        activation: "gelu" (exact) or "gelu_tanh".
        branch_scale: factor of what is added to x: that of stochastic depth for samples that are kept.
        eps: added to the variance.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch. "cpp", on a CPU,
            computes some rows at a time, so that what is hidden never leaves the cache. Where gradients are wanted it
            keeps fc1's output; the LayerNorm's and the GELU's are computed again.

    Returns:
        ``(…, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock).
    """
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("activation", activation, ACTIVATIONS)
    hidden, C = _checks.tensor("fc1_weight", fc1_weight, "(hidden, C)").shape
    if x.dim() == 0 or x.shape[-1] != C:
        raise ValueError(f"x: wanted shape (…, {C}) as fc1_weight says, got {tuple(x.shape)}")
    weights = {
        "norm_weight": (norm_weight, (C,)),
        "norm_bias": (norm_bias, (C,)),
        "fc1_weight": (fc1_weight, (hidden, C)),
        "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (C, hidden)),
        "fc2_bias": (fc2_bias, (C,)),
    }
    _checks.parameters(x, weights, optional=("fc1_bias", "fc2_bias"))
    given = [weight for weight, _ in weights.values()]
    if impl == "reference":
        return reference.mlp_layer(
            *(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias),
            activation=activation,
            branch_scale=branch_scale,
            eps=eps,
        )
    if _choice.use_layer("mlp_layer", impl, x, given):
        out, _ = _OPS.mlp_layer_cpp(
            x.reshape(-1, C),
            norm_weight.float(),
            norm_bias.float(),
            eps,
            _checks.dense_rows(fc1_weight),
            fc1_bias,
            activation,
            _checks.dense_rows(fc2_weight),
            fc2_bias,
            branch_scale,
            _choice.wants_gradients(x, *given),
        )
        return out.view(x.shape)
    y = linear(torch.layer_norm(x, (C,), norm_weight, norm_bias, eps), fc1_weight, fc1_bias, activation=activation)
    if branch_scale == 1.0:
        return linear(y, fc2_weight, fc2_bias, residual=x)
    return x + branch_scale * linear(y, fc2_weight, fc2_bias)


@torch.library.register_fake("nest_fast::mlp_layer_cpp", lib=_LIB)
def _fake(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, scale, training):
    return x.new_empty(x.shape), x.new_empty((x.shape[0] if training else 0, fc1_weight.shape[0]))


@torch.library.register_fake("nest_fast::mlp_layer_cpp_bwd", lib=_LIB)
def _fake_bwd(dout, x, hidden, fc1_weight, activation, fc2_weight):
    return fake_branch_backward(x, fc1_weight, fc2_weight)


def _setup(ctx, inputs, output):
    x, norm_weight, norm_bias, ctx.eps, fc1_weight, fc1_bias, ctx.activation, fc2_weight, fc2_bias, *rest = inputs
    ctx.branch_scale, ctx.training = rest
    ctx.biases = fc1_bias is not None, fc2_bias is not None
    ctx.save_for_backward(x, norm_weight, norm_bias, fc1_weight, fc2_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 11
    _checks.training(ctx.training)
    x, norm_weight, norm_bias, fc1_weight, fc2_weight, hidden = ctx.saved_tensors

    def branch_backward(dbranch, y):
        return _OPS.mlp_layer_cpp_bwd(dbranch, y, hidden, fc1_weight, ctx.activation, fc2_weight)

    dx, dnorm_weight, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias = layer_backward(
        dout, x, norm_weight, norm_bias, ctx.eps, ctx.branch_scale, ctx.biases, branch_backward
    )
    return dx, dnorm_weight, dnorm_bias, None, dfc1, dfc1_bias, None, dfc2, dfc2_bias, None, None


torch.library.register_autograd("nest_fast::mlp_layer_cpp", _backward, setup_context=_setup, lib=_LIB)
torch.library.register_autograd("nest_fast::mlp_layer_cpp_bwd", _checks.no_double_backward("mlp_layer"), lib=_LIB)
