"""Loads the compiled parts, once, at import; what cannot be loaded is remembered with its reason.

``cpu_error`` and ``cuda_error`` are None where the part is loaded, else one line that says why not. Nothing is compiled
here and no CUDA context is made. The parts only register kernels; schemas are defined in Python, before or after.
``cpp_isa`` names the vector instructions of the CPU part: "avx512_bf16", "avx512", "avx2", or "" where there are none.
"""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["cpp_isa", "cpp_why_not", "cpu_error", "cuda_error", "has_amx", "use_layer", "wants_gradients"]

_LIB = torch.library.Library("nest_fast", "FRAGMENT")
_LIB.define("cpp_isa() -> str")
_LIB.define("cpp_set_isa(str isa) -> ()")  # another that the processor has, for tests

_PACKAGE = Path(__file__).resolve().parent.parent


def _load(name: str) -> str | None:
    path = _PACKAGE / name
    if not path.is_file():
        return f"nest_fast/{name} is not built (the install says why: pip install -v, line 'nest_fast:')"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"nest_fast/{name} does not load: {str(error.__cause__ or error).splitlines()[0]}"
    return None


cpu_error = _load("_C_cpu.abi3.so")
cuda_error = _load("_C_cuda.abi3.so") if torch.version.cuda is not None else "this torch is built without CUDA"


def _isa() -> str:
    try:
        return torch.ops.nest_fast.cpp_isa()
    except NotImplementedError:  # the part is not loaded
        return ""


cpp_isa = _isa()


# Whether PyTorch's matmuls in bfloat16 have a matrix unit. Asked once: the compiler cannot trace the question.
has_amx = torch.cpu._is_amx_tile_supported()


def cpp_why_not(name: str, x: torch.Tensor) -> list[str]:
    """Why the C++ kernels cannot take ``x``, dtype and shape aside."""
    reasons = []
    if cpu_error is not None:
        reasons.append(cpu_error)
    elif not cpp_isa:
        reasons.append("this processor has neither AVX-512 nor AVX2, or the extension was not built by GCC 11 or later")
    if x.device.type != "cpu":
        reasons.append(f"{name} is on {x.device}, not on a CPU")
    return reasons


def use_layer(op: str, impl: str, x: torch.Tensor, weights: list[torch.Tensor | None]) -> bool:
    """Whether ``impl``, "auto" or "cpp", means the C++ kernel of the layer ``op``; an error if that cannot run."""
    reasons = cpp_why_not("x", x)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {x.dtype} is none of float32, float16, bfloat16")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        reasons.append("torch.func is transforming")
    if torch.is_autocast_enabled(x.device.type):
        reasons.append("autocast is on")
    if impl == "cpp" and reasons:
        raise RuntimeError(f"impl: {impl!r} cannot run {op} here: {'; '.join(reasons)}")
    if impl == "cpp" or reasons:
        return impl == "cpp"
    if x.dtype == torch.bfloat16 and has_amx:
        return False  # PyTorch's matmuls use the matrix unit, which the C++ kernels do not know
    # A compiler that sees plain PyTorch decides itself what to keep for the gradient.
    return not (torch.compiler.is_compiling() and wants_gradients(x, *weights))


def wants_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
