"""Loads the compiled parts, once, at import; what cannot be loaded is remembered with its reason.

``cpu_error`` and ``cuda_error`` are None where the part is loaded, else one line that says why not. Nothing is compiled
here and no CUDA context is made. The parts only register kernels; schemas are defined in Python, before or after.
"""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["cpu_error", "cuda_error"]

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
