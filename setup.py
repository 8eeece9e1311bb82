"""Package layout and the compiled parts; pyproject.toml has the metadata.

``csrc/*.cpp`` become ``nest_fast/_C_cpu.abi3.so`` and, where there is an nvcc, ``csrc/*.cu`` become
``nest_fast/_C_cuda.abi3.so``. Both use only libtorch's stable ABI, so one build serves every Python and torch that
pyproject.toml admits. What cannot be built is left out, with a line that says why, which ``nest_fast.info`` repeats:
the package works without it.

They are built against the torch of the environment they are installed into, which pip's build isolation hides but need
not: the stable ABI makes another one as good. Where there is none, as in uv's builds, the build asks for one.

Environment: CXX (the C++ compiler), CUDA_HOME, TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX"), MAX_JOBS;
NEST_FAST_SANITIZE=1, the CPU part alone, as ``make sanitize`` tests it: with the AddressSanitizer and the
UndefinedBehaviorSanitizer.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The names that torch.utils.cpp_extension has for those that nest_fast knows.
NAMES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}
# The stable ABI of torch 2.11, the oldest that is supported.
FLAGS = "-O3 -std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000"
TORCH = "torch>=2.11"
# Without vptr, which is about virtual classes: csrc/ has none.
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
SANITIZE = os.environ.get("NEST_FAST_SANITIZE") == "1"


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


def find_torch() -> Path:
    """The folder of a torch to build against: found, not imported.

    First this interpreter's; then, under pip's build isolation, that of the environment it installs for: it is still
    that environment's interpreter.
    """
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for folder in folders:
        if Path(folder, "torch", "version.py").is_file():
            return Path(folder, "torch")
    raise CompileError(f"no torch to build against (pip install '{TORCH}')")


def build_requirements() -> list[str]:
    """What a build needs besides pyproject.toml's: a torch, where there is none, as in uv's builds."""
    try:
        find_torch()
    except CompileError:
        return [TORCH]
    return []


def check_nvcc(nvcc: str, torch: Path) -> None:
    """An error where its runtime, which the CUDA part contains, wants a newer driver than torch does."""
    cuda = re.search(r"^cuda\b.*= *'([\d.]+)'", (torch / "version.py").read_text(), re.M)
    wanted = cuda and cuda[1]
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise CompileError(f"{nvcc} --version: expected 'release', got {said.strip()!r}")
    if wanted and int(found[1]) > int(wanted.partition(".")[0]):
        raise CompileError(
            f"{nvcc}: expected one of CUDA {wanted.partition('.')[0]} or older, as torch is built with CUDA {wanted},"
            f" got {found[1]}.{found[2]} (CUDA_HOME names another)"
        )


def gencode(nvcc: str) -> str:
    """Machine code for each architecture, and PTX of the first and the last for the devices between and after them."""
    wanted = [arch for arch in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if arch]
    wanted = [one for arch in wanted for one in NAMES.get(arch.removesuffix("+PTX"), arch).split(";")]
    if not wanted:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        wanted = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
        if not wanted:
            raise CompileError(f"{nvcc} is too old: it knows none of {', '.join(ARCHITECTURES)}")
        wanted = [f"{arch}+PTX" if arch in (wanted[0], wanted[-1]) else arch for arch in wanted]
    flags = []
    for arch in dict.fromkeys(wanted):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST: expected versions such as '8.0;9.0+PTX' or of {', '.join(NAMES)}, got {arch!r}"
            )
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},'code=[{code}]'")
    return " ".join(flags)


def say(text: str) -> None:
    """To the log, and to the terminal, if there is one: pip shows the log of a build that fails, or with -v."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{text}", file=terminal)


class BuildParts(build_ext):
    """Builds each part with ninja, objects kept in build/, so that only what changed is compiled again.

    Where a part is left out, a text file of its name has the reason.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        left_out = target.with_suffix(".txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        left_out.unlink(missing_ok=True)
        try:
            self.build_part(ext, target)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            left_out.write_text(f"{error}\n")
            say(f"nest_fast: left out {target.name}: {error}")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # an object of an earlier build would be worse than none
            built, target = (Path(folder, self.get_ext_filename(ext.name)) for folder in (self.build_lib, ROOT))
            target.unlink(missing_ok=True)
            target.with_suffix(".txt").unlink(missing_ok=True)
            if not built.is_file():
                shutil.copy(built.with_suffix(".txt"), target.with_suffix(".txt"))
        super().copy_extensions_to_source()

    def build_part(self, ext: Extension, target: Path) -> None:
        torch, cxx = find_torch(), find_cxx()
        if ext.name.endswith("_cuda"):
            compiler = find_nvcc()
            check_nvcc(compiler, torch)
            # nvcc links its own static runtime; without the flag the linker would drop libtorch, of which only the CUDA
            # part, absent from a CPU-only torch, has what the objects need.
            compile_flags = f"{FLAGS} -ccbin {cxx} -Xcompiler -fPIC -DUSE_CUDA --threads 4 {gencode(compiler)}"
            link_flags = f"-ccbin {cxx} -Xlinker --no-as-needed"
        else:
            compiler, compile_flags, link_flags = cxx, f"{FLAGS} -fPIC -fvisibility=hidden", ""
            if SANITIZE:
                compile_flags, link_flags = f"{compile_flags} {SANITIZED}", SANITIZED
        build = ROOT / "build" / (ext.name.rpartition(".")[2] + "_sanitized" * SANITIZE)
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
        shutil.copy(build / target.name, target)


def part(name: str, pattern: str) -> list[Extension]:
    """The extension made of the sources that match ``pattern``; none without such a source."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
    if not sources:
        return []
    return [Extension(f"nest_fast.{name}", sources, depends=headers, py_limited_api=True, optional=True)]


if __name__ == "__main__":
    asked = sys.argv[1:2] == ["egg_info"]  # by pip, uv or build, which install what they are told
    setup(
        setup_requires=build_requirements() if asked else [],
        packages=["nest_fast", "nest_fast.ops", "nest_fast.integrations", "nest_fast.train", "nest_fast.kernels"],
        package_dir={"nest_fast": "nest_fast", "nest_fast.kernels": "kernels"},
        ext_modules=part("_C_cpu", "*.cpp") + ([] if SANITIZE else part("_C_cuda", "*.cu")),
        cmdclass={"build_ext": BuildParts},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
