"""What there is to compute with: the compiled parts, loaded once, at import, Triton, and units of the processor.

``cpu_error`` and ``cuda_error`` are None where the part is loaded, else one line that says why not. Nothing is compiled
here and no CUDA context is made. The parts register kernels. The CPU part defines its operations, too, for programs
that load it without Python; here they are defined where it is missing.
``cpp_isa`` names the vector instructions of the CPU part: "avx512_bf16", "avx512", "avx2", or "" where there are none.
Triton is imported only when one of its kernels is launched.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import torch

__all__ = [
    "COSTS",
    "Library",
    "cpp_isa",
    "cpu_error",
    "cuda_error",
    "cuda_why_not",
    "has_amx",
    "has_triton",
    "onednn_dtypes",
    "triton_interpreted",
    "unmultiplied",
]

_PACKAGE = Path(__file__).resolve().parent.parent


def _load(name: str) -> str | None:
    path = _PACKAGE / name
    if not path.is_file():
        left_out = path.with_suffix(".txt")  # setup.py writes it
        why = left_out.read_text().strip() if left_out.is_file() else "nest_fast was not installed (pip install)"
        return f"nest_fast/{name} is not built: {why}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"nest_fast/{name} does not load: {str(error.__cause__ or error).splitlines()[0]}"
    return None


cpu_error = _load("_C_cpu.abi3.so")
cuda_error = _load("_C_cuda.abi3.so") if torch.version.cuda is not None else "this torch is built without CUDA"

# What there is instead of a part that is missing, and what that costs where it was measured.
COSTS = {
    "cpu": "CPUs run plain PyTorch (the cost is not measured)",
    "cuda": "GPUs run plain PyTorch for blockify, unblockify and patchify (the cost is not measured)",
    "triton": "GPUs run plain PyTorch for everything between the matmuls (the cost is not measured)",
}


class Library(torch.library.Library):
    """The operations of nest_fast; one that the compiled part has defined is compared, not defined again."""

    def __init__(self) -> None:
        super().__init__("nest_fast", "FRAGMENT")

    def define(self, schema: str, *args, **kwargs) -> str:
        expected = torch._C.parse_schema(f"nest_fast::{schema}")
        known = torch._C._jit_get_schemas_for_operator(expected.name)
        if not known:
            return super().define(schema, *args, **kwargs)
        if known != [expected]:
            raise ImportError(
                f"nest_fast/_C_cpu.abi3.so: expected {expected}, got {known[0]}; build it again (pip install)"
            )
        return expected.name


_LIB = Library()
_LIB.define("cpp_isa() -> str")
_LIB.define("cpp_set_isa(str isa) -> ()")  # another that the processor has, for tests
# The processor's limits, for benchmarks: FLOP/s of products in registers, bytes/s of memory read and written.
_LIB.define("peak_multiply(ScalarType dtype) -> float")
_LIB.define("peak_move(Tensor read, Tensor(a!) written) -> float")
_LIB.define("cuda_why_not(int device) -> str")


def _isa() -> str:
    try:
        return torch.ops.nest_fast.cpp_isa()
    except NotImplementedError:  # the part is not loaded
        return ""


cpp_isa = _isa()


_CUDA_WHY_NOT: dict[int, str | None] = {}


def cuda_why_not(device: int) -> str | None:
    """Why the CUDA part has no kernel for the GPU of this index, in its driver's words; None where it has."""
    if cuda_error is not None:
        return cuda_error
    if device not in _CUDA_WHY_NOT:
        _CUDA_WHY_NOT[device] = _ask(device)
    return _CUDA_WHY_NOT[device]


def _ask(device: int) -> str | None:
    if not torch.cuda.is_available():  # a fake tensor, of a program for another machine
        return None
    with torch._C._DisableTorchDispatch():
        why_not = torch.ops.nest_fast.cuda_why_not(device)
    if not why_not:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return f"nest_fast/_C_cuda.abi3.so has nothing for {name}, compute capability {major}.{minor}: {why_not}"


# Dynamo calls it and keeps the answer; torch.compiler.assume_constant_result marks it so, too, but imports Dynamo.
cuda_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]

has_triton = importlib.util.find_spec("triton") is not None
# Triton reads the same variable: under it kernels are interpreted, on CPU tensors too.
triton_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Whether PyTorch's matmuls in bfloat16 have a matrix unit. Asked once: the compiler cannot trace the question.
has_amx = torch.cpu._is_amx_tile_supported()
# The dtypes that oneDNN has on this processor; an operation of its own in another raises.
_ONEDNN = torch.backends.mkldnn.is_available()
onednn_dtypes = (torch.float32,) * _ONEDNN
if _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    onednn_dtypes += (torch.bfloat16,)
# Half precision that this processor has no instructions to multiply in: PyTorch's matmuls are slower than in float32.
unmultiplied: tuple[torch.dtype, ...] = ()
if _ONEDNN and platform.machine().lower() in ("x86_64", "amd64"):
    unmultiplied += () if has_amx or torch.cpu._is_avx512_bf16_supported() else (torch.bfloat16,)
    unmultiplied += () if torch.ops.mkldnn._is_mkldnn_fp16_supported() else (torch.float16,)
