"""The compiled parts: loaded where they are built, done without where they are not, and built without surprises."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nest_fast
from helpers.common import CPP_ISA, ISAS, ROOT, instructions, run_python, with_threads
from nest_fast import blockify
from nest_fast.ops import _extension

OPS = torch.ops.nest_fast
PACKAGE = Path(nest_fast.__file__).parent

# Runs in a fresh interpreter: says what loaded, and that the operations work either way.
REPORT = """
import subprocess, sys
def refuse(*args, **kwargs):
    raise AssertionError("a process was started while importing")
popen, subprocess.Popen.__init__ = subprocess.Popen.__init__, refuse
import torch
from nest_fast.ops import _extension, blockify
from nest_fast.ops.blockify import reference
assert not torch.cuda.is_initialized()
subprocess.Popen.__init__ = popen
x = torch.randn(2, 8, 8, 3)
assert torch.equal(blockify(x, 4), reference.blockify(x, 4))
print(_extension.cpu_error)
print(_extension.cuda_error)
"""


def report(folder, **environment):
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return run_python("-c", REPORT, cwd=folder, env=environment).splitlines()


@pytest.fixture
def copied_package(tmp_path):
    """The package without its compiled parts, found before the installed one."""
    shutil.copytree(PACKAGE, tmp_path / "nest_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_cpu_part_is_loaded_where_there_is_a_compiler():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler: the install left the CPU part out")
    assert _extension.cpu_error is None


def test_cuda_part_is_loaded_only_beside_a_cuda_torch():
    if torch.version.cuda is None:
        assert _extension.cuda_error == "this torch is built without CUDA"
    else:
        assert _extension.cuda_error is None or "_C_cuda.abi3.so" in _extension.cuda_error


def test_import_without_the_compiled_parts(copied_package):
    cpu, _ = report(copied_package)
    assert cpu == "nest_fast/_C_cpu.abi3.so is not built: nest_fast was not installed (pip install)"


def test_what_is_missing_is_said_with_its_reason_and_price(copied_package):
    """At the first use of auto, once; by explain, so by accelerate's report; and by info."""
    (copied_package / "nest_fast" / "_C_cpu.abi3.txt").write_text("no C++ compiler: c++ not found\n")
    code = """
import warnings
import torch, nest_fast
from nest_fast import info
from nest_fast.ops import blockify
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    missing = nest_fast.explain(nest_fast.nest_tiny()).missing
    assert not said
    for _ in range(2):
        nest_fast.block_attention(*torch.randn(3, 1, 1, 4, 1, 32))
        blockify(torch.randn(1, 4, 4, 3), 2)
[warning] = said
assert warning.filename == "<string>", warning
print(warning.message)
print(missing[0])
print(info.report().partition("extension, CPU   not loaded: ")[2].splitlines()[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(copied_package)}
    said = run_python("-c", code, cwd=copied_package, env=environment).splitlines()
    why = "nest_fast/_C_cpu.abi3.so is not built: no C++ compiler: c++ not found"
    assert said == [f"{why}; {_extension.COSTS['cpu']}"] * 3


@pytest.fixture
def gpu_without_code(monkeypatch):
    """Fake tensors on a GPU that the CUDA part, as if it were loaded, has no code for; what it was asked."""
    asked = []
    library = torch.library.Library("nest_fast", "IMPL")
    answer = "no kernel image is available for execution on the device"
    library.impl("cuda_why_not", lambda device: asked.append(device) or answer, "CompositeExplicitAutograd")
    monkeypatch.setattr(_extension, "cuda_error", None)
    monkeypatch.setattr(_extension, "_CUDA_WHY_NOT", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    yield asked
    library._destroy()


@pytest.mark.skipif(_extension.cuda_error is None, reason="the CUDA part is loaded and answers itself")
def test_a_gpu_without_code_is_asked_once_and_is_a_reason(gpu_without_code):
    with FakeTensorMode():
        x = torch.empty(2, 8, 8, 3, device="cuda:1")
        why = "_C_cuda.abi3.so has nothing for Tesla V100, compute capability 7.0: no kernel image is available"
        with pytest.raises(RuntimeError, match=f"'cuda' cannot run blockify here: nest_fast/{why}"):
            blockify(x, 4, impl="cuda")
        with pytest.warns(UserWarning, match=f"{why}.*; GPUs run plain PyTorch for blockify"):
            assert blockify(x, 4).shape == (2, 4, 16, 3)
        assert blockify(x, 4).shape == (2, 4, 16, 3)
    assert gpu_without_code == [1]


@pytest.mark.gpu
def test_the_gpu_that_is_here_has_code():
    assert _extension.cuda_why_not(0) is None


def test_import_with_a_broken_compiled_part(copied_package):
    (copied_package / "nest_fast" / "_C_cpu.abi3.so").write_bytes(b"no shared object")
    cpu, _ = report(copied_package)
    assert cpu.startswith("nest_fast/_C_cpu.abi3.so does not load: ")


def test_import_compiles_nothing_and_leaves_cuda_alone(tmp_path):
    cpu, cuda = report(tmp_path, PATH="", PYTHONPATH="")
    assert (cpu, cuda) == (str(_extension.cpu_error), str(_extension.cuda_error))


def test_operations_are_defined_where_the_kernels_are_loaded_without_python():
    if _extension.cpu_error is not None:
        pytest.skip(_extension.cpu_error)
    code = f"""
import torch
torch.ops.load_library({str(PACKAGE / "_C_cpu.abi3.so")!r})
print(tuple(torch.ops.nest_fast.patchify(torch.zeros(1, 3, 8, 8), (2, 2), (2, 2)).shape))
"""
    assert run_python("-c", code) == "(1, 4, 4, 12)\n"


@pytest.mark.skipif(not CPP_ISA, reason="there are no C++ kernels")
def test_instructions_that_the_processor_has_not_are_refused():
    with pytest.raises(RuntimeError, match='isa: expected one that this processor has, got "mmx"'):
        OPS.cpp_set_isa("mmx")
    assert OPS.cpp_isa() == CPP_ISA


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_py():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not run from a source tree")
    spec = importlib.util.spec_from_file_location("nest_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_leaves_out_what_it_cannot_build_and_says_why(setup_py, tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "CXX": "/nowhere/c++"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("nest_fast:")]
    reason = "no C++ compiler: /nowhere/c++ not found"
    assert said == [f"nest_fast: left out _C_{part}.abi3.so: {reason}" for part in ("cpu", "cuda")]
    assert {path.name: path.read_text() for path in tmp_path.glob("nest_fast/*")} == {
        f"_C_{part}.abi3.txt": f"{reason}\n" for part in ("cpu", "cuda")
    }


def torch_of(folder, monkeypatch, cuda):
    """A torch where build isolation hides it: not in sys.path, but in the interpreter's own folder."""
    (folder / "torch").mkdir()
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.14.1'\ncuda: Optional[str] = {cuda}\n")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("site.getusersitepackages", lambda: str(folder / "none"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    return folder / "torch"


def test_build_asks_for_a_torch_only_where_there_is_none(setup_py, monkeypatch, tmp_path):
    torch = torch_of(tmp_path, monkeypatch, "None")
    assert setup_py.find_torch() == torch
    assert setup_py.build_requirements() == []
    shutil.rmtree(torch)
    with pytest.raises(setup_py.CompileError, match=r"no torch to build against \(pip install 'torch>=2.11'\)"):
        setup_py.find_torch()
    assert setup_py.build_requirements() == ["torch>=2.11"]


def test_missing_nvcc_is_named(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup_py.CompileError, match=f"no CUDA compiler: nvcc not found in {tmp_path}"):
        setup_py.find_nvcc()


def nvcc_of(folder, release):
    nvcc = folder / "nvcc"
    known = "\\n".join(f"compute_{number}" for number in (75, 80, 86, 89, 90))
    nvcc.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo 'Cuda compilation tools, release {release}, V{release}.88' && exit\n"
        f"printf '{known}\\n'\n"
    )
    nvcc.chmod(0o755)
    return str(nvcc)


def test_architectures(setup_py, monkeypatch, tmp_path):
    nvcc = nvcc_of(tmp_path, "12.9")

    def given(wanted):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        return setup_py.gencode(nvcc)

    known = given("")
    lowest = "-gencode=arch=compute_75,'code=[sm_75,compute_75]' -gencode=arch=compute_80,'code=[sm_80]' "
    assert known.startswith(lowest)
    assert known.endswith("-gencode=arch=compute_90,'code=[sm_90,compute_90]'")
    assert "100" not in known
    both = "-gencode=arch=compute_80,'code=[sm_80]' -gencode=arch=compute_90a,'code=[sm_90a,compute_90a]'"
    assert given("8.0 9.0a+PTX") == given(" 8.0; 9.0a+PTX;") == both
    assert given("Hopper;") == given("Hopper+PTX") == given("9.0+PTX")
    with pytest.raises(setup_py.CompileError, match=r"TORCH_CUDA_ARCH_LIST: expected versions .* got 'Maxwell'"):
        given("8.0;Maxwell")


@pytest.mark.parametrize(("cuda", "newer"), [("'12.6'", True), ("'13.2'", False), ("None", False)])
def test_a_driver_too_old_for_nvccs_runtime_is_foreseen(setup_py, monkeypatch, tmp_path, cuda, newer):
    torch = torch_of(tmp_path, monkeypatch, cuda)
    nvcc = nvcc_of(tmp_path, "13.0")
    if newer:
        with pytest.raises(setup_py.CompileError, match=r"expected one of CUDA 12 or older, .* CUDA 12.6, got 13.0"):
            setup_py.check_nvcc(nvcc, torch)
    else:
        setup_py.check_nvcc(nvcc, torch)


# --- the processor's limits, for benchmarks ---------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_peak_of_products_is_above_what_a_matmul_reaches(isa):
    """PyTorch's matmul, of the same instructions or narrower ones, stays below; threads add up."""

    def matmul():
        start = time.perf_counter()
        torch.mm(x, x, out=out)
        return 2 * len(x) ** 3 / (time.perf_counter() - start)

    def best(rate):
        return max(rate() for _ in range(20))

    x, out = torch.randn(256, 256), torch.empty(256, 256)
    with instructions(isa):
        one, two = with_threads(lambda: best(lambda: OPS.peak_multiply(torch.float32)), (1, 2))
    assert 0.9 * one < two < 2.5 * one
    if isa == CPP_ISA:
        assert one > 0.9 * with_threads(lambda: best(matmul), (1,))[0]


@pytest.mark.skipif(not CPP_ISA, reason="the extension is not built, or the processor has no AVX2")
def test_peak_of_memory_moves_all_of_it():
    def moved(read, written):
        x, out = torch.randn(read), torch.full((written,), torch.nan)
        assert OPS.peak_move(x, out) > 0
        return x, out

    for read, written in ((640, 64), (64, 640), (448, 448), (64, 0), (0, 64)):
        both = min(read, written)
        one, *more = with_threads(lambda read=read, written=written: moved(read, written))
        assert torch.equal(one[0][:both], one[1][:both])
        assert all(out.isfinite().all() for _, out in (one, *more))
    with pytest.raises(RuntimeError, match="read, written: expected multiples of 64 elements, got 3 and 64"):
        OPS.peak_move(torch.zeros(3), torch.zeros(64))
