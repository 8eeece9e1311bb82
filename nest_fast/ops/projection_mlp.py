"""What a transformer layer does after its attention: projection, residual sum, and the MLP sub-layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _flops, _gpu, _layer, _tuned
from nest_fast.ops._backends import Backend, Rules
from nest_fast.ops._layer import no_gradients
from nest_fast.ops._register import operation
from nest_fast.ops.linear import linear
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
    is_plain = proj_scale == 1.0
    total = linear(attended, *proj, residual=x) if is_plain else x + proj_scale * linear(attended, *proj)
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
# Up to how many channels a model of time has a whole layer 1.25 times as fast with its two kernels, norm_attention and
# projection_mlp, as with the MLP's alone, by compute capability; of blocks of 14 x 14 (docs/notes/passes.md).
CERTAIN_CHANNELS = {(8, 0): 96, (8, 9): 128, (9, 0): 128}
CERTAIN: Rules = (
    ("its gain is certain for blocks of 144 to 208 tokens alone", lambda given: not _is_of_blocks(given[0])),
    (
        "its gain with so many channels on this GPU is not certain",
        lambda given: given[0].shape[-1] > CERTAIN_CHANNELS.get(_gpu.capability(given[0].device), 0),
    ),
)


def _is_of_blocks(x: Tensor) -> bool:
    return x.dim() == 4 and 144 <= x.shape[2] <= 208


# Where nothing was measured, "auto" on a GPU keeps these rules, or is "parts"; what most layers break comes first.
_AUTO_ON_GPU = Backend("triton", (*CERTAIN, *BACKENDS["triton"].rules))


def choose(given: Given) -> str:
    """What "auto" is: "triton" on a GPU, or "parts"."""
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
