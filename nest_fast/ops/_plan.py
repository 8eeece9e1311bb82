"""What "auto" would take for tensors like these, in words, and what keeps it from something faster."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nest_fast.ops import _choice, _extension, _triton
from nest_fast.ops.block_aggregate import WHY_NOT as AGGREGATE_WHY_NOT
from nest_fast.ops.block_aggregate import choose as choose_aggregate
from nest_fast.ops.block_attention import WHY_NOT as ATTENTION_WHY_NOT
from nest_fast.ops.block_attention import choose as choose_attention

Plan = tuple[str, str]  # by which kernels, and why not by faster ones

_KERNELS = {
    "cpp": f"C++ ({_extension.cpp_isa})",
    "triton": "Triton",
    "two_step": "PyTorch's convolution, one kernel for the rest",
    "sdpa": "scaled_dot_product_attention",
    "reference": "plain PyTorch",
}


def half_layer(x: Tensor, attention: Plan | None, weights: Iterable[Tensor | None], chained: bool) -> Plan:
    """For half a layer, ``attention``'s or the MLP's: one operation, or its parts, ``chained`` on a GPU."""
    inside, slow = attention or ("", "")
    if chained:
        reasons = [*_triton.why_not(x), *_choice.dtype_why_not(x.dtype)]
        how = f"add_layer_norm{'' if attention else ', bias_gelu'}: {'plain PyTorch' if reasons else 'Triton'}"
    else:
        operation = "attention_layer" if attention else "mlp_layer"
        reasons = _choice.layer_why_not(x, list(weights))
        if not reasons:
            return f"{operation}: {_KERNELS['cpp']}", ""
        how = f"{operation}: plain PyTorch"
    return "; ".join(filter(None, (how, inside))), "; ".join(dict.fromkeys(filter(None, (*reasons, slow))))


def attention(x: Tensor, num_heads: int) -> Plan:
    """For block_attention inside ``x`` ``(B, T, N, C)``."""
    q = x.unflatten(-1, (num_heads, -1))
    given = q, q, q, None, None
    impl = choose_attention(given, 0.0)
    wanted = "triton" if x.is_cuda else "cpp"
    why = [] if impl == wanted else ATTENTION_WHY_NOT[wanted](given, 0.0)
    return f"block_attention: {_KERNELS[impl]}", "; ".join(why)


def aggregation(x: Tensor, conv_weight: Tensor) -> Plan:
    """For block_aggregate of ``x`` ``(B, T, N, C)``."""
    given = x, conv_weight, None, conv_weight, conv_weight, None
    impl = choose_aggregate(given)
    why = AGGREGATE_WHY_NOT["two_step" if x.is_cuda else "cpp"](given) if impl == "reference" else []
    return f"block_aggregate: {_KERNELS[impl]}", "; ".join(why)


def patches(x: Tensor) -> Plan:
    """For patchify and the matmul of a patch embedding."""
    error = _extension.cpu_error if x.is_cpu else _extension.cuda_error if x.is_cuda else f"x is on {x.device.type}"
    return f"patchify: {'plain PyTorch' if error else 'C++' if x.is_cpu else 'CUDA'}; linear", error or ""


def missing() -> list[str]:
    """Compiled parts and packages that this machine could use and has not."""
    said = [_extension.cpu_error] if _extension.cpu_error else []
    if not said and not _extension.cpp_isa:
        said = ["this processor has neither AVX-512 nor AVX2, or the extension was not built by GCC 11 or later"]
    if torch.cuda.is_available():
        said += [_extension.cuda_error] if _extension.cuda_error else []
        said += [] if _triton.INSTALLED else ["triton is not installed"]
    return said
