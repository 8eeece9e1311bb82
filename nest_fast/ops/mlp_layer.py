"""The MLP half of a pre-norm transformer layer: LayerNorm, linear, GELU, linear, residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _extension
from nest_fast.ops.linear import linear

__all__ = ["mlp_layer"]

IMPLS = ("auto", "reference", "cpp")
ACTIVATIONS = ("gelu", "gelu_tanh")

_LIB = torch.library.Library("nest_fast", "FRAGMENT")
_LIB.define(
    "mlp_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias,"
    " str activation, Tensor fc2_weight, Tensor? fc2_bias) -> Tensor"
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
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """``x + fc2(gelu(fc1(layer_norm(x))))``.

    Args:
        x: ``(…, C)``, any floating-point dtype.
        norm_weight, norm_bias: ``(C,)``.
        fc1_weight, fc1_bias: ``(hidden, C)`` and ``(hidden,)`` or None.
        fc2_weight, fc2_bias: ``(C, hidden)`` and ``(C,)`` or None.
        activation: "gelu" (exact) or "gelu_tanh".
        eps: added to the variance.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch. "cpp" computes
            some rows at a time, so that what is hidden never leaves the cache: on a CPU, without gradients.

    Returns:
        ``(…, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.
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
    if impl == "reference":
        return reference.mlp_layer(
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation, eps=eps
        )
    reasons = _extension.layer_why_not(x, [weight for weight, _ in weights.values()])
    if impl == "cpp" and reasons:
        raise RuntimeError(f"impl: {impl!r} cannot run mlp_layer here: {'; '.join(reasons)}")
    if impl == "cpp" or (not reasons and not _extension.library_has_amx(x)):
        out = torch.ops.nest_fast.mlp_layer_cpp(
            x.reshape(-1, C),
            norm_weight.float(),
            norm_bias.float(),
            eps,
            _checks.dense_rows(fc1_weight),
            fc1_bias,
            activation,
            _checks.dense_rows(fc2_weight),
            fc2_bias,
        )
        return out.view(x.shape)
    y = torch.layer_norm(x, (C,), norm_weight, norm_bias, eps)
    return linear(linear(y, fc1_weight, fc1_bias, activation=activation), fc2_weight, fc2_bias, residual=x)


@torch.library.register_fake("nest_fast::mlp_layer_cpp", lib=_LIB)
def _fake(x, *_):
    return x.new_empty(x.shape)
