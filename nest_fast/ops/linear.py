"""A linear layer with what follows it in the same pass: bias, GELU, residual sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _extension, _flops, _layer, _layout, _modes, _tuned
from nest_fast.ops._backends import Backend
from nest_fast.ops._register import operation
from nest_fast.ops.bias_gelu import approximation, bias_gelu

__all__ = ["add_linear", "linear", "linear_gelu"]

IMPLS = ("auto", "reference", "onednn", "float32", "cublaslt", "triton")
ACTIVATIONS = ("none", "gelu", "gelu_tanh")

# oneDNN's names for the activation and its algorithm.
_ONEDNN = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


@_tuned.tunable
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``residual + activation(x @ weight^T + bias)``.

    Args:
        x: ``(…, in)``, any floating-point dtype and strides.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        activation: "none", "gelu" (exact) or "gelu_tanh".
        residual: ``(…, out)``, added last, of any floating-point dtype, or None; not together with an activation.
        impl: "auto" takes the best this machine has for these tensors; while ``torch.compile`` traces, that is to leave
            fusing to the compiler. "reference" is plain PyTorch, with one pass over memory each for the bias (on a
            CPU), the activation and the sum. "onednn" does all of them in the matmul's epilogue, on a CPU and without
            gradients; "float32" is the same, of half precision converted to float32: on a processor that has no
            instructions to multiply in it, that is faster. "cublaslt" has bias and GELU in the epilogue of the matmul,
            on a GPU, for "gelu_tanh", which is its form of GELU, and without gradients; for shapes without such an
            epilogue PyTorch adds a pass. "triton" has bias and either GELU in the epilogue of its own matmul, in half
            precision on a GPU (on CPU tensors under ``TRITON_INTERPRET=1``), without gradients and without a residual.

    Returns:
        ``(…, out)``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.
    """
    _check(x, weight, bias, activation, residual, impl)
    given = Given(x, weight, bias, residual, activation)
    impl = _layer.resolve("linear", impl, BACKENDS, choose, given)
    if impl == "reference":
        return reference.linear(x, weight, bias, activation=activation, residual=residual)
    if impl == "triton":
        return _TRITON(x, weight, bias, activation)
    if impl == "parts":
        return _in_parts(x, weight, bias, activation, _modes.autocast_dtype(x))
    if impl == "cublaslt":
        rows = x.reshape(-1, x.shape[-1])
        out = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)  # type: ignore[arg-type]
        return out.view(*x.shape[:-1], weight.shape[0])
    if impl == "float32":
        bias, residual = (None if t is None else t.float() for t in (bias, residual))
        return _by_onednn(x.float(), weight.float(), bias, residual, activation).to(x.dtype)
    return _by_onednn(x, weight, bias, residual, activation)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    bias = _layout.dense(bias)  # oneDNN reads its memory, whatever the strides
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, "add")
    name, algorithm = _ONEDNN[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, impl: str) -> None:
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("activation", activation, ACTIVATIONS)
    _checks.floating("x", _checks.is_tensor("x", x, "(…, in)"))
    out_features, in_features = _checks.tensor("weight", weight, "(out, in)").shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected shape (…, {in_features}) as weight says, got {tuple(x.shape)}")
    _checks.alike("weight", weight, "x", x)
    if bias is not None:
        _checks.is_tensor("bias", bias, "(out,)")
        _checks.shape("bias", bias, (out_features,), "(out,)")
        _checks.alike("bias", bias, "x", x)
    if residual is not None:
        if activation != "none":
            raise ValueError(f"activation: expected 'none' with a residual, got {activation!r}")
        _checks.is_tensor("residual", residual, "(…, out)")
        _checks.shape("residual", residual, (*x.shape[:-1], out_features), "(…, out)")
        _checks.promotes("residual", residual, "x", x)


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    activation: str = "none"


_BY_ONEDNN: _backends.Rules = (
    (
        "residual is {given.residual.dtype}",
        lambda given: given.residual is not None and given.residual.dtype != given.x.dtype,
    ),
    ("PyTorch has no fake of it", lambda given: isinstance(given.x, FakeTensor)),
    ("x is empty", lambda given: given.x.numel() == 0),
    ("gradients are wanted", _modes.wants_gradients),
)
BACKENDS = {
    "onednn": Backend("onednn", (*_backends.ONEDNN, *_BY_ONEDNN)),
    "float32": Backend("float32", (*_backends.ONEDNN_FLOAT32, *_BY_ONEDNN)),
    "cublaslt": Backend(
        "cublaslt",
        (
            ("x is on {given.x.device}, not on a GPU", lambda given: not given.x.is_cuda),
            *_backends.PLAIN_MATMUL,
            ("this torch has no _addmm_activation", lambda given: not hasattr(torch, "_addmm_activation")),
            ("its GELU is 'gelu_tanh', not {given.activation!r}", lambda given: given.activation != "gelu_tanh"),
            ("there is no bias", lambda given: given.bias is None),
            ("x is empty", lambda given: given.x.numel() == 0),
            ("gradients are wanted", _modes.wants_gradients),
        ),
    ),
    "triton": Backend(
        "triton",
        (
            *_backends.TRITON_LAYER,
            ("float32 is left to the library", lambda given: given.x.dtype == torch.float32),
            ("it adds no residual", lambda given: given.residual is not None),
            ("the weight has 2^31 numbers or more", lambda given: given.weight.numel() >= 2**31),
            ("gradients are wanted, and it keeps nothing for them", _modes.wants_gradients),
        ),
    ),
}


# What may be measured; on an eager GPU with an activation, "parts" is the library's matmul and bias_gelu.
_ABLE = (BACKENDS["onednn"], BACKENDS["float32"], Backend("reference", ()))
_ABLE_ON_GPU = (BACKENDS["cublaslt"], BACKENDS["triton"], _layer.PARTS)
# Where nothing was measured, "auto" keeps these rules, or is "reference", or "parts".
_AUTO_FLOAT32 = Backend(
    "float32",
    (
        ("this processor multiplies in {given.x.dtype}", lambda given: given.x.dtype not in _extension.unmultiplied),
        *BACKENDS["float32"].rules,
        ("converting the weight takes longer", lambda given: given.x.numel() < 16 * given.x.shape[-1]),
    ),
)
_AUTO_ON_GPU = Backend(
    "cublaslt",
    (
        *BACKENDS["cublaslt"].rules,
        ("how exact its tanh is in float32 is not certain", lambda given: given.x.dtype == torch.float32),
    ),
)


def choose(given: Given) -> str:
    if torch.compiler.is_compiling() or _modes.in_trace():
        return "reference"
    if given.x.is_cuda and given.activation != "none":
        return _tuned.implementation("linear", _ABLE_ON_GPU, given, _rule, _AUTO_ON_GPU, "parts")
    if not given.x.is_cpu:
        return "reference"
    best = _AUTO_FLOAT32 if _AUTO_FLOAT32.can(given) else BACKENDS["onednn"]
    return _tuned.implementation("linear", _ABLE, given, _rule, best, "reference")


def _rule(given: Given, best: Backend, otherwise: str) -> str:
    return best.name if best.can(given) else otherwise


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`linear` with a GELU on an eager GPU: in the matmul's epilogue, or with the bias in the GELU's own pass.

    ``dtype``: of the output, as :func:`nest_fast.bias_gelu` has it.
    """
    if _tuned.is_watched():
        return linear(x, weight, bias, activation=activation)
    impl = choose(Given(x, weight, bias, None, activation))
    if impl != "parts":
        return linear(x, weight, bias, activation=activation, impl=_tuned.Chosen(impl))
    return _in_parts(x, weight, bias, activation, dtype)


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype | None) -> Tensor:
    return bias_gelu(F.linear(x, weight), bias, approximate=approximation(activation), dtype=dtype)


def add_linear(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """``x + scale * linear(y)``, or of its LayerNorm, with weight, bias and eps; ``(B,)`` is of samples."""
    if norm is None and not isinstance(scale, Tensor) and scale == 1.0:
        return linear(y, weight, bias, residual=x)
    branch = linear(y, weight, bias)
    if norm is not None:
        branch = torch.layer_norm(branch, norm[0].shape, *norm)
    return _layer.add_branch(x, branch, scale)


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, weight, bias, activation):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_flops(x, weight, *_, out_shape=None):
    return _flops.linear(x, weight)


_TRITON = operation(
    "linear_triton_fwd(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    launch="linear.linear_fwd",
    fake=_fake,
    gradients=_layer.no_gradients,
    flops=_linear_flops,
)
