"""The compiled parts: loaded where they are built, done without where they are not, and built without surprises."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import CPP_ISA, ROOT, run_python

import nest_fast
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
    assert cpu == "nest_fast/_C_cpu.abi3.so is not built (the install says why: pip install -v, line 'nest_fast:')"


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


@pytest.mark.parametrize(
    ("hide", "environment", "reason"),
    [
        ("torch", {}, "torch is not in the build environment (pip install --no-build-isolation uses yours)"),
        ("", {"CXX": "/nowhere/c++"}, "no C++ compiler: /nowhere/c++ not found"),
    ],
)
def test_build_leaves_out_what_it_cannot_build_and_says_why(setup_py, tmp_path, hide, environment, reason):
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({hide.split()!r}))
sys.argv = ["setup.py", "build_ext", "--build-lib", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = {**os.environ, **environment}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("nest_fast:")]
    assert said == [f"nest_fast: left out _C_{part}.abi3.so: {reason}" for part in ("cpu", "cuda")]
    assert not list(tmp_path.rglob("*.so"))


def test_missing_nvcc_is_named(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup_py.CompileError, match=f"no CUDA compiler: nvcc not found in {tmp_path}"):
        setup_py.find_nvcc()


def test_architectures(setup_py, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    known = setup_py.gencode(str(nvcc))
    assert "'code=[sm_80]'" in known
    assert known.endswith("-gencode=arch=compute_90,'code=[sm_90,compute_90]'")
    assert "100" not in known
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")
    assert setup_py.gencode(str(nvcc)) == (
        "-gencode=arch=compute_80,'code=[sm_80]' -gencode=arch=compute_90a,'code=[sm_90a,compute_90a]'"
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(setup_py.CompileError, match=r"TORCH_CUDA_ARCH_LIST: wanted versions .*, got 'Hopper'"):
        setup_py.gencode(str(nvcc))
