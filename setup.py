"""Package layout and the compiled parts; pyproject.toml has the metadata.

``csrc/*.cpp`` become ``nest_fast/_C_cpu.abi3.so`` and, where there is an nvcc, ``csrc/*.cu`` become
``nest_fast/_C_cuda.abi3.so``. Both use only libtorch's stable ABI, so one build serves every Python and torch that
pyproject.toml admits, and the CUDA part is built without a GPU, even against a CPU-only torch. What cannot be built is
left out, with a line that says why: the package works without it.

Environment: CXX (the C++ compiler), CUDA_HOME, TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX"), MAX_JOBS.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The stable ABI of torch 2.11, the oldest that is supported.
FLAGS = "-O3 -std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000"


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")  # found, not imported
    if spec is None or not spec.submodule_search_locations:
        raise CompileError("torch is not in the build environment (pip install --no-build-isolation uses yours)")
    return Path(spec.submodule_search_locations[0])


def find_cxx() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, wanted)), None)
    if found is None:
        raise CompileError(f"no C++ compiler: {', '.join(wanted)} not found")
    return found


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    found = found or (None if home else shutil.which("nvcc", path="/usr/local/cuda/bin"))
    if found is None:
        raise CompileError(f"no CUDA compiler: nvcc not found in {home or 'PATH or /usr/local/cuda'}")
    return found


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja") is not None:  # pip's package, which need not be in PATH
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("ninja not found (pip install ninja)")
    return [found]


def gencode(nvcc: str) -> str:
    """Machine code for each architecture, and PTX for what comes after the last."""
    wanted = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""]:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        wanted = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
        if not wanted:
            raise CompileError(f"{nvcc} is too old: it knows none of {', '.join(ARCHITECTURES)}")
        wanted[-1] += "+PTX"
    flags = []
    for arch in wanted:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected versions such as '8.0;9.0+PTX', got {arch!r}")
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},'code=[{code}]'")
    return " ".join(flags)


class BuildParts(build_ext):
    """Builds each part with ninja, objects kept in build/, so that only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_part(ext, target)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            print(f"nest_fast: left out {target.name}: {error}", file=sys.stderr, flush=True)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # an object of an earlier build would be worse than none
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_part(self, ext: Extension, target: Path) -> None:
        torch = find_torch()
        cxx = find_cxx()
        if ext.name.endswith("_cuda"):
            compiler = find_nvcc()
            # nvcc links its own static runtime; without the flag the linker would drop libtorch, of which only the CUDA
            # part, absent from a CPU-only torch, has what the objects need.
            compile_flags = f"{FLAGS} -ccbin {cxx} -Xcompiler -fPIC -DUSE_CUDA --threads 4 {gencode(compiler)}"
            link_flags = f"-ccbin {cxx} -Xlinker --no-as-needed"
        else:
            compiler, compile_flags, link_flags = cxx, f"{FLAGS} -fPIC -fvisibility=hidden -fopenmp", "-fopenmp"
        build = ROOT / "build" / ext.name.rpartition(".")[2]
        build.mkdir(parents=True, exist_ok=True)
        objects = {f"{Path(source).name}.o": f"../../{source}" for source in ext.sources}
        lines = [
            "rule compile",
            f"  command = {compiler} {compile_flags} -isystem '{torch}/include' -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared $in -o $out {link_flags} -L'{torch}/lib' -ltorch -ltorch_cpu -lc10",
            *(f"build {name}: compile {source}" for name, source in objects.items()),
            f"build {target.name}: link {' '.join(objects)}",
        ]
        (build / "build.ninja").write_text("\n".join([*lines, ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*find_ninja(), *jobs], cwd=build).returncode:
            raise CompileError("it does not compile, the compiler's messages are above")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / target.name, target)


def part(name: str, pattern: str) -> list[Extension]:
    """The extension made of the sources that match ``pattern``; none without such a source."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
    if not sources:
        return []
    return [Extension(f"nest_fast.{name}", sources, depends=headers, py_limited_api=True, optional=True)]


if __name__ == "__main__":
    setup(
        packages=["nest_fast", "nest_fast.ops", "nest_fast.integrations", "nest_fast.train", "nest_fast.kernels"],
        package_dir={"nest_fast": "nest_fast", "nest_fast.kernels": "kernels"},
        ext_modules=part("_C_cpu", "*.cpp") + part("_C_cuda", "*.cu"),
        cmdclass={"build_ext": BuildParts},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
