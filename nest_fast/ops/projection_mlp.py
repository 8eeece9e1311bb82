"""What a transformer layer does after its attention: projection, residual sum, and the MLP sub-layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _flops, _layer, _tuned
from nest_fast.ops._backends import Backend
from nest_fast.ops._layer import no_gradients
from nest_fast.ops._register import operation
from nest_fast.ops.linear import add_linear
from nest_fast.ops.mlp_layer import ACTIVATIONS, TOO_LARGE, mlp_layer

__all__ = ["chosen", "projection_mlp"]

IMPLS = ("auto", "reference", "triton")
MAX_CHANNELS = 128  # more do not fit in a program's registers on every GPU


@_tuned.tunable
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
    impl: str = "auto",
) -> Tensor:
    """``total = x + proj_scale * proj(attended)``, and :func:`mlp_layer` of it: a layer from its attention on.

    Args:
        x: ``(…, C)``, any floating-point dtype and strides.
        attended: ``(…, C)``, what the attention of :func:`attention_layer` gives.
        proj_weight, proj_bias: ``(C, C)``, its input ordered (heads, head_dim), and ``(C,)`` or None.
        norm_weight, norm_bias: ``(C,)``, of x's dtype, or both float32 beside float16 and bfloat16.
        fc1_weight, fc1_bias: ``(hidden, C)`` and ``(hidden,)`` or None.
        fc2_weight, fc2_bias: ``(C, hidden)`` and ``(C,)`` or None.
        activation: "gelu" (exact) or "gelu_tanh".
        proj_scale, branch_scale: factors of what is added to x, and of what is added to the total.
        eps: added to the variance.
        impl: "auto" takes the best this machine has for these tensors: a linear layer and mlp_layer, each with a choice
            of its own, or "triton". That is one kernel on a GPU (on CPU tensors under ``TRITON_INTERPRET=1``), for
            inference, half precision and C at most 128; the total never leaves the chip. "reference" is plain PyTorch.

    Returns:
        ``(…, C)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (EncoderNDBlock).
    """
    proj, norm, fc1, fc2 = (
        (proj_weight, proj_bias), (norm_weight, norm_bias), (fc1_weight, fc1_bias), (fc2_weight, fc2_bias),
    )  # fmt: skip
    _check(x, attended, proj, norm, fc1, fc2, activation, (proj_scale, branch_scale), impl)
    impl = _layer.resolve("projection_mlp", impl, BACKENDS, choose, Given(x, attended, *proj, *norm, *fc1, *fc2))
    if impl == "triton":
        tanh = activation == "gelu_tanh"
        return _TRITON(x, attended, *proj, proj_scale, *norm, eps, *fc1, tanh, *fc2, branch_scale)
    if impl == "reference":
        return reference.projection_mlp(
            *(x, attended, *proj, *norm, *fc1, *fc2),
            activation=activation,
            proj_scale=proj_scale,
            branch_scale=branch_scale,
            eps=eps,
        )
    total = add_linear(x, attended, *proj, proj_scale)
    return mlp_layer(total, *norm, *fc1, *fc2, activation=activation, branch_scale=branch_scale, eps=eps)


def _check(
    x: Tensor,
    attended: Tensor,
    proj: tuple[Tensor, Tensor | None],
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    activation: str,
    scales: tuple[float, float],
    impl: str,
) -> None:
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("activation", activation, ACTIVATIONS)
    hidden, C = _checks.tensor("fc1_weight", fc1[0], "(hidden, C)").shape
    if _checks.is_tensor("x", x, "(…, C)").dim() == 0 or x.shape[-1] != C:
        raise ValueError(f"x: expected shape (…, {C}) as fc1_weight says, got {tuple(x.shape)}")
    _checks.shape("attended", _checks.is_tensor("attended", attended, "(…, C)"), tuple(x.shape), "as x has")
    _checks.alike("attended", attended, "x", x)
    weights = {
        "norm_weight": (norm[0], (C,)),
        "norm_bias": (norm[1], (C,)),
        "proj_weight": (proj[0], (C, C)),
        "proj_bias": (proj[1], (C,)),
        "fc1_weight": (fc1[0], (hidden, C)),
        "fc1_bias": (fc1[1], (hidden,)),
        "fc2_weight": (fc2[0], (C, hidden)),
        "fc2_bias": (fc2[1], (C,)),
    }
    _checks.parameters(x, weights, optional=("proj_bias", "fc1_bias", "fc2_bias"))
    for name, scale in zip(("proj_scale", "branch_scale"), scales, strict=True):
        _checks.number(name, scale)


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    attended: Tensor
    proj_weight: Tensor
    proj_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


BACKENDS = {
    "triton": Backend(
        "triton",
        (
            *_layer.TRITON,
            *_layer.at_most(MAX_CHANNELS),
            ("float32 does not fit in its registers", lambda given: given.x.dtype == torch.float32),
            TOO_LARGE,
        ),
    )
}
# Where nothing was measured, "auto" on a GPU is "parts". A model of time has a narrow layer 1.2 to 1.7 times as fast
# with this kernel beside norm_attention (docs/notes/passes.md), but there threads hand queries to each other in memory:
# what only a GPU can show to be right is taken where tune held it against float64.
_AUTO_ON_GPU = Backend("triton", (("it is taken where it was measured alone", lambda given: True),))


def choose(given: Given) -> str:
    """What "auto" is: "triton" on a GPU where that was measured, or "parts"."""
    if _layer.is_eager_on_a_gpu(given):
        return _layer.choose_on_a_gpu("projection_mlp", _AUTO_ON_GPU, BACKENDS["triton"], given)
    return "parts"


def chosen(*given: Any) -> str:
    """What "auto" is, to be given as ``impl``, of the tensors."""
    return _tuned.Chosen(choose(Given._make(given)))


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, *_):
    return x.new_empty(x.shape)


def _count(x, attended, proj, proj_bias, proj_scale, norm_weight, norm_bias, eps, fc1, *_, out_shape=None):
    return _flops.linear(x, proj) + 2 * _flops.linear(x, fc1)


_TRITON = operation(
    "projection_mlp_triton_fwd(Tensor x, Tensor attended, Tensor proj_weight, Tensor? proj_bias, float proj_scale,"
    " Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias, bool tanh,"
    " Tensor fc2_weight, Tensor? fc2_bias, float branch_scale) -> Tensor",
    launch="projection_mlp.projection_mlp_fwd",
    fake=_fake,
    gradients=no_gradients,
    flops=_count,
)
