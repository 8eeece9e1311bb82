"""What "auto" would take for tensors like these, in words, and what keeps it from something faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nest_fast.ops import _backends, _extension, _gpu, _layer
from nest_fast.ops.bias_gelu import BACKENDS as PASS
from nest_fast.ops.block_aggregate import BACKENDS as AGGREGATE
from nest_fast.ops.block_aggregate import Given as AggregateGiven
from nest_fast.ops.block_aggregate import choose as choose_aggregate
from nest_fast.ops.block_attention import BACKENDS as ATTENTION
from nest_fast.ops.block_attention import Given as AttentionGiven
from nest_fast.ops.block_attention import choose as choose_attention
from nest_fast.ops.blockify import BACKENDS as PATCHES
from nest_fast.ops.linear import Given as LinearGiven
from nest_fast.ops.linear import choose as choose_linear
from nest_fast.reference import Windows

Plan = tuple[str, str]  # the operation and its kernels; what keeps it from faster ones

_KERNELS = {
    "cpp": f"C++ ({_extension.cpp_isa})",
    "triton": "Triton",
    "two_step": "PyTorch's convolution, one kernel for the rest",
    "sdpa": "scaled_dot_product_attention",
    "reference": "plain PyTorch",
}


def sub_layer(x: Tensor, attention: Plan | None, weights: Sequence[Tensor | None], chained: bool) -> Plan:
    """For the sub-layer of ``attention``, or of the MLP: one operation, or its parts, ``chained`` on a GPU."""
    inside, slow = attention or ("", "")
    if chained:
        reasons = PASS["triton"].why_not((x,))
        how = f"add_layer_norm{'' if attention else ', bias_gelu'}: {'plain PyTorch' if reasons else 'Triton'}"
    else:
        operation = "attention_layer" if attention else "mlp_layer"
        reasons = _layer.AUTO.why_not((x, *weights))
        if not reasons:
            return f"{operation}: {_KERNELS['cpp']}", ""
        how = f"{operation}: {linear(x, weights)}"
    return "; ".join(filter(None, (how, inside))), "; ".join(dict.fromkeys(filter(None, (*reasons, slow))))


def linear(x: Tensor, weights: Iterable[Tensor | None]) -> str:
    """For the linear layers of ``weights``, one by one."""
    learned = next((weight for weight in weights if weight is not None and weight.requires_grad), None)
    impl = choose_linear(LinearGiven(x, x, learned, None))
    return {"onednn": "linear by oneDNN", "float32": "linear by oneDNN in float32"}.get(impl, "linear by plain PyTorch")


def attention(x: Tensor, num_heads: int, extra_dim: int = 0, windowed: bool = False) -> Plan:
    """For block_attention inside ``x`` ``(B, T, N, C)``, the heads of which have ``extra_dim`` more dimensions.

    ``windowed``: the blocks are windows of an image that has several, or a bias.
    """
    head_dim = max(x.shape[-1] // num_heads, 1) + extra_dim
    q = x.new_empty(1).expand(*x.shape[:-1], num_heads, head_dim)
    N = q.shape[2]
    given = AttentionGiven(q, q, q, None, None, 0.0, N, Windows((2 * N, 1), (N, 1)) if windowed else None)
    impl = choose_attention(given, say=False)
    best = "triton" if x.is_cuda else "cpp"
    why = [] if impl == best else ATTENTION[best].why_not(given)
    return f"block_attention: {_KERNELS[impl]}", "; ".join(why)


def aggregation(x: Tensor, conv_weight: Tensor) -> Plan:
    """For block_aggregate of ``x`` ``(B, T, N, C)``."""
    given = AggregateGiven(x, conv_weight, None, conv_weight, conv_weight, None)
    impl = choose_aggregate(given, say=False)
    why = AGGREGATE["two_step" if x.is_cuda else "cpp"].why_not(given) if impl == "reference" else []
    return f"block_aggregate: {_KERNELS[impl]}", "; ".join(why)


def patches(x: Tensor) -> Plan:
    """For patchify and the matmul of a patch embedding."""
    reasons = PATCHES["cuda" if x.is_cuda else "cpp"].why_not((x,))
    return f"patchify: {'plain PyTorch' if reasons else 'CUDA' if x.is_cuda else 'C++'}; linear", "; ".join(reasons)


def missing() -> list[str]:
    """Compiled parts and packages that this machine could use but does not have, and what that costs."""
    said = _backends.missing(torch.device("cpu")) or _backends.reasons(_backends.EXTENSION, ())
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            said += _backends.missing(torch.device("cuda", device))
        why = _backends.reasons(_backends.TRITON_INSTALLED, ()) or list(filter(None, [_gpu.launch_error()]))
        said += [f"{one}; {_extension.COSTS['triton']}" for one in why]
    return list(dict.fromkeys(said))
