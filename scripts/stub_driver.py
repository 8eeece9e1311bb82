"""Triton's own CUDA driver over a libcuda that launches nothing (stub_cuda.c): all of a launch but the kernel, no GPU.

Triton specialises and compiles, its C launcher packs the arguments, and the stub keeps what arrives. Tensors are the
CPU's. For a process of its own: a real libcuda cannot be loaded beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("TRITON_INTERPRET is set: nothing would be launched")

import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import max_shared_mem
from triton.runtime.jit import JITFunction

# A block's shared memory in bytes, by compute capability; CUDA's programming guide, "Technical Specifications".
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_MAX_PARAMETERS = 128
_SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}


class _Device(ctypes.Structure):
    _fields_ = [
        ("capability", ctypes.c_int * 2),
        ("shared_bytes", ctypes.c_int),
        ("functions", ctypes.c_int),
        ("local_bytes", ctypes.c_int * 8),
    ]


class _Parameters(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int), ("sizes", ctypes.c_int * _MAX_PARAMETERS)]


class _Launched(ctypes.Structure):
    _fields_ = [
        ("launches", ctypes.c_ulonglong),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("values", ctypes.c_ulonglong * _MAX_PARAMETERS),
    ]


class Launch(NamedTuple):
    """A launch as Python made it and as it arrived: the kernel's name; what Triton compiled; ``arguments`` by name, and
    the values of the PTX's parameters, the two that Triton adds left out."""

    name: str
    compiled: Any
    arguments: dict[str, Any]
    values: list[int]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int


class _Driver(nvidia.CudaDriver):
    """On device 0 and stream 0."""

    def __init__(self, architecture: int):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device=None: divmod(architecture, 10)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.set_current_device = lambda device: None


class Stub:
    """The stub and Triton's driver over it; ``device`` is what it says of itself, ``launched`` the last launch."""

    def __init__(self, folder: Path):
        include = Path(nvidia.__file__).parent / "include"
        library = folder / "libcuda.so.1"
        command = ["gcc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", str(library)]
        subprocess.run([*command, str(Path(__file__).with_name("stub_cuda.c"))], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        # Loaded first, it is what everybody finds under its name.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.device = _Device.in_dll(self._library, "stub_device")
        self.launched = _Launched.in_dll(self._library, "stub_launched")
        self._parameters = _Parameters.in_dll(self._library, "stub_parameters")

    def become(self, architecture: int, shared_bytes: int = 0, local_bytes: Sequence[int] = ()) -> None:
        """From now on the device is sm_<architecture>, whose blocks may have so much shared memory instead of its own;
        and of the next kernels that are loaded the first spills so many bytes, and so on."""
        self.device.capability[:] = divmod(architecture, 10)
        self.device.shared_bytes = shared_bytes or SHARED_BYTES[architecture]
        self.device.functions, self.device.local_bytes[:] = 0, [*local_bytes, *[0] * (8 - len(local_bytes))]
        self._parameters.count = 0
        max_shared_mem.cache_clear()
        triton.runtime.driver.set_active(_Driver(architecture))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """Inside, every launch is appended."""
        launches: list[Launch] = []
        run = JITFunction.run

        def recorded(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if warmup:
                return run(kernel, *args, grid=grid, warmup=True, **kwargs)
            sizes = _parameter_sizes(run(kernel, *args, grid=grid, warmup=True, **kwargs).asm["ptx"])
            self._parameters.count, self._parameters.sizes[: len(sizes)] = len(sizes), sizes
            before = self.launched.launches
            compiled = run(kernel, *args, grid=grid, warmup=False, **kwargs)
            if self.launched.launches != before + 1:
                raise RuntimeError(f"{kernel.fn.__name__} launched {self.launched.launches - before} kernels, not one")
            arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            values = self.launched.values[: len(sizes) - 2]  # Triton's own two, for scratch memory, are last
            sides = tuple(self.launched.grid), tuple(self.launched.block)
            launches.append(Launch(kernel.fn.__name__, compiled, arguments, values, *sides, self.launched.shared))
            return compiled

        JITFunction.run = recorded
        try:
            yield launches
        finally:
            JITFunction.run = run
            self._parameters.count = 0


def _parameter_sizes(ptx: str) -> list[int]:
    """Bytes of the parameters of the kernel in ``ptx``; of a tensor map those that the stub fills."""
    signature = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.S)
    assert signature is not None
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)[^,\[]*(\[128\])?", signature[1])
    return [8 if is_map else _SIZES[bits] for bits, is_map in found]


@contextlib.contextmanager
def stub(architecture: int = 90) -> Iterator[Stub]:
    """Triton's driver over the stub, while the process has no other; sm_<architecture>."""
    with tempfile.TemporaryDirectory() as folder:
        made = Stub(Path(folder))
        made.become(architecture)
        try:
            yield made
        finally:
            triton.runtime.driver._active = None
