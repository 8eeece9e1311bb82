"""What the two sub-layers of a transformer layer share: their choice, and the gradients around their branch in C++."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from nest_fast.ops import _backends, _extension, _layout, _modes, _tuned
from nest_fast.ops._backends import Backend, Rules

IMPLS = ("auto", "reference", "cpp", "triton")
MAX_CHANNELS = 256  # of the Triton kernels: more do not fit in a program's registers
WIDE_CHANNELS = 768  # of those that take rows in pieces, in half precision

# --- choice -----------------------------------------------------------------------------------------------------------

_ONE_SCALE: Rules = (
    ("it has one branch_scale for all samples", lambda given: getattr(given, "branch_scale", None) is not None),
)
TRITON: Rules = (
    *_backends.TRITON_LAYER,
    *_ONE_SCALE,
    ("gradients are wanted, and it keeps nothing for them", _modes.wants_gradients),
)


def at_most(channels: int, in_half: int = 0) -> Rules:
    """A rule for kernels whose rows have to fit, where in half precision there may be more."""

    def most(given: Any) -> int:
        return channels if given[0].dtype == torch.float32 else max(channels, in_half)

    return (
        (
            lambda given: f"C = {given[0].shape[-1]} channels are over {most(given)}",
            lambda given: given[0].shape[-1] > most(given),
        ),
    )


CHANNELS = at_most(MAX_CHANNELS, WIDE_CHANNELS)
BACKENDS = {
    "cpp": Backend("cpp", _backends.CPP_LAYER + _ONE_SCALE),
    "triton": Backend("triton", (*TRITON, ("the LayerNorm comes last", lambda given: given.post_norm), *CHANNELS)),
}
# The C++ kernels multiply some rows by C x 16 numbers of a weight at a time (32 with AVX-512). Of more channels these
# leave the 32 KiB of a first-level cache, and beside the MLP's hidden features fewer than 20 rows fit half of a second
# level of 1 MiB, so that weights are read anew for every 20 rows. The library's matmuls cut the depth, too.
WIDE = 512
_CAN = Backend(
    "cpp",
    (
        *_backends.CPP_LAYER,
        *_ONE_SCALE,
        ("torch.jit is tracing", lambda given: _modes.in_trace()),
        ("there is nothing to compute", lambda given: any(isinstance(x, Tensor) and x.numel() == 0 for x in given)),
    ),
)
PARTS = Backend("parts", ())  # one operation after the other, each with a choice of its own
ABLE = (_CAN, PARTS)  # what may be measured
# Where nothing was measured, "auto" keeps these rules, or is "parts".
AUTO = Backend(
    "cpp",
    (
        *_CAN.rules,
        (
            "PyTorch's matmuls use the matrix unit, which the C++ kernels do not know",
            lambda given: _extension.has_amx and _modes.autocast_dtype(given[0]) == torch.bfloat16,
        ),
        (
            "a compiler that sees plain PyTorch decides itself what to keep for the gradient",
            lambda given: torch.compiler.is_compiling() and _modes.wants_gradients(given),
        ),
        (
            lambda given: f"of C = {given[0].shape[-1]} channels, over {WIDE}, the library's matmuls are faster",
            lambda given: (
                given[0].shape[-1] > WIDE
                and _modes.autocast_dtype(given[0]) == torch.float32
                and not _modes.wants_gradients(given)
            ),
        ),
    ),
)


def resolve(op: str, impl: str, backends: Mapping[str, Backend], choose: Callable[[Any], str], given: Any) -> str:
    """``impl`` of ``op``, what "auto" is by ``choose``, and an error where an explicit one cannot run."""
    if impl == "auto" or (type(impl) is _tuned.Chosen and _tuned.is_watched()):
        return choose(given)
    if impl in backends and type(impl) is not _tuned.Chosen:
        backends[impl].require(op, given)
    return impl


def choose(op: str, able: Sequence[Backend], auto: Backend, on_gpu: Backend, triton: Backend, given: Any) -> str:
    """What "auto" is of ``op``: "cpp" on a CPU, of what is ``able``, "triton" on a GPU, or "parts".

    Where nothing was measured it is the first two where ``auto`` and ``on_gpu`` can.
    """
    if is_eager_on_a_gpu(given):
        return choose_on_a_gpu(op, on_gpu, triton, given)
    if not given[0].is_cpu:
        return "parts"
    return _tuned.implementation(op, able, given, _rule, auto)


def is_eager_on_a_gpu(given: Any) -> bool:
    """A compiler that sees plain PyTorch decides itself what to fuse."""
    return given[0].is_cuda and not (torch.compiler.is_compiling() or _modes.needs_plain(given))


def choose_on_a_gpu(op: str, on_gpu: Backend, triton: Backend, given: Any) -> str:
    """What "auto" is of ``op`` on an eager GPU: "triton" or "parts", what was measured or else ``on_gpu`` says."""
    return _tuned.implementation(op, (triton, PARTS), given, _rule_on_a_gpu, on_gpu)


def _rule_on_a_gpu(given: Any, on_gpu: Backend) -> str:
    return "triton" if on_gpu.can(given) else "parts"


def _rule(given: Any, auto: Backend) -> str:
    if auto.can(given):
        return "cpp"
    _backends.say_missing(given[0])
    return "parts"


# --- the sum ----------------------------------------------------------------------------------------------------------


def of_samples(scale: float | Tensor) -> Tensor | None:
    """What a choice is given of a branch_scale."""
    return scale if isinstance(scale, Tensor) else None


def add_branch(x: Tensor, branch: Tensor, scale: float | Tensor) -> Tensor:
    """``x + scale * branch``; a tensor ``(B,)`` has a factor for each sample."""
    if isinstance(scale, Tensor):
        return torch.addcmul(x, branch, scale.view(-1, *(1,) * (x.dim() - 1)))
    return x + (branch if scale == 1.0 else scale * branch)


# --- gradients --------------------------------------------------------------------------------------------------------


def layer_backward(
    kept: Any,
    dout: Tensor,
    parameters: Sequence[str],
    branch_backward: Callable[[Tensor, Tensor, list[bool]], tuple[Tensor, ...]],
) -> dict[str, Tensor | None]:
    """The gradients of ``x + branch_scale * branch(layer_norm(x))`` for rows ``x`` ``(rows, C)``, by name.

    Without a LayerNorm's weight they are those of ``branch(x)``.

    ``parameters`` names what else the branch has, the weights and biases of its two linear layers first.
    ``branch_backward`` is called with the gradient of the branch's output, the branch's input, which is computed again,
    and a mask of the gradients that are needed: of that input and of ``parameters``. It returns these. A gradient that
    is not needed is None and not computed.
    """
    C, norm = kept.x.shape[1], ("x", "norm_weight", "norm_bias")
    if kept.norm_weight is None:
        names = ("x", *parameters)
        mask = [kept.needed[name] for name in names]
        given = branch_backward(_layout.dense_rows(dout), kept.x, mask)
        return {name: dx if wanted else None for name, dx, wanted in zip(names, given, mask, strict=True)}
    norm_mask, mask = ([kept.needed[name] for name in names] for names in (norm, parameters))
    y, mean, rstd = torch.native_layer_norm(kept.x, (C,), kept.norm_weight, kept.norm_bias, kept.eps)
    dbranch = dout if kept.branch_scale == 1.0 else dout * kept.branch_scale
    dtype = kept.dtypes[parameters[0]]  # of the products: under autocast another than x's
    dy, *others = branch_backward(_layout.dense_rows(dbranch).to(dtype), y.to(dtype), [any(norm_mask), *mask])
    dy = dy.to(kept.x.dtype)
    found = {name: dx if wanted else None for name, dx, wanted in zip(parameters, others, mask, strict=True)}
    if any(norm_mask):
        dx, found["norm_weight"], found["norm_bias"] = torch.ops.aten.native_layer_norm_backward(
            dy, kept.x, (C,), mean, rstd, kept.norm_weight, kept.norm_bias, norm_mask
        )
        found["x"] = dx.add_(dout) if kept.needed["x"] else None
    return found


def no_gradients(kept: Any, dout: Tensor) -> NoReturn:
    """Of a kernel for inference, which was called by its own name."""
    raise RuntimeError("impl: expected 'auto' or 'reference' where gradients are wanted, got 'triton'")


def fake_branch_backward(x: Tensor, weights: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """The fakes of a branch's gradients: those of ``x``, and of each of ``weights`` (out, in) and its bias."""
    shapes = [x.shape, *(shape for weight in weights for shape in (weight.shape, weight.shape[:1]))]
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))
