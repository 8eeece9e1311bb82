"""``python -m nest_fast.info``: versions, hardware, what loaded, and why the rest did not. For bug reports.

Only the standard library is imported at the top, so it runs where torch does not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable

PACKAGES = ("nest_fast", "torch", "triton", "timm", "numpy")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    import torch

    return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none found (torch is built for CUDA {torch.version.cuda})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _cpu_extension() -> str:
    from nest_fast.ops import _extension

    if _extension.cpu_error is not None:
        return f"not loaded: {_extension.cpu_error}; {_extension.COSTS['cpu']}"
    return f"loaded, its kernels use {_extension.cpp_isa or 'nothing: no AVX2, or no GCC 11 that built it'}"


def _cuda_extension() -> str:
    import torch

    from nest_fast.ops import _extension

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    said = ["loaded"] if _extension.cuda_error is None else [f"not loaded: {_extension.cuda_error}"]
    without = [why_not for why_not in map(_extension.cuda_why_not, devices) if why_not is not None]
    if without:
        said += [*([] if _extension.cuda_error else without), _extension.COSTS["cuda"]]
    return "; ".join(dict.fromkeys(said))


def _triton() -> str:
    import torch

    from nest_fast.ops import _extension, _gpu

    if not _extension.has_triton:
        return "not installed" + (f"; {_extension.COSTS['triton']}" if torch.cuda.is_available() else "")
    if _extension.triton_interpreted:
        return "interpreted (TRITON_INTERPRET=1)"
    error = _gpu.launch_error() if torch.cuda.is_available() else ""
    return f"not used: {error}; {_extension.COSTS['triton']}" if error else "for CUDA tensors"


def _tuned() -> str:
    import torch

    from nest_fast.ops import _tuned

    said = []
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        known, file = _tuned.choices(torch.device(device)), _tuned.path(torch.device(device))
        number = len(known.implementations) + len(known.launches)
        said += [f"{device}: {number}, from {file}"] if number else []
    return "; ".join(said) or "none (python -m nest_fast.tune)"


def _line(what: Callable[[], str]) -> str:
    try:
        return what()
    except Exception as error:  # the report has to come out whatever is broken
        return f"failed: {type(error).__name__}: {error}"


def report() -> str:
    """The lines that ``python -m nest_fast.info`` prints."""
    lines = [("python", f"{sys.version.split()[0]} on {platform.platform()}")]
    lines += [(package, _version(package)) for package in PACKAGES]
    parts = {
        "processor": _processor,
        "GPU": _gpu,
        "extension, CPU": _cpu_extension,
        "extension, CUDA": _cuda_extension,
        "Triton kernels": _triton,
        "tuned choices": _tuned,
    }
    lines += [(name, _line(what)) for name, what in parts.items()]
    return "\n".join(f"{name:16} {value}" for name, value in lines)


if __name__ == "__main__":
    print(report())
