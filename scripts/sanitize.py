"""The tests of the C++ kernels under the AddressSanitizer and the UndefinedBehaviorSanitizer: ``make sanitize``.

The CPU part is built a second time, in build/sanitize, as a whole package that comes before the installed one. First it
is shown that a read beyond a tensor, one beyond a piece of a kernel's scratch memory and an overflow are reported; then
the tests run with every instruction set of this processor, and the fuzzer of ``tests/helpers/guard_pages.py``. Whatever
is reported, in whatever process, is printed and fails. Other arguments are pytest's, in place of the tests.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
REPORTS = BUILD / "reports"
CASES = "3000"  # of the fuzzer
# What runs a kernel of the CPU part; the rest of these files, kernels for GPUs in Triton's interpreter, does not.
TESTS = [
    *("test_attention_layer", "test_block_aggregate", "test_block_attention", "test_block_attention_cpu"),
    *("test_blockify", "test_freeze", "test_guard_pages", "test_mlp_layer", "test_norm_pool", "test_operations"),
    *("test_positions", "test_windows"),
]
NOT = "not triton and not compile and not export and not opcheck and not interpret"

PROOF = """
#include <cstdint>
#include "scratch.h"
extern "C" __attribute__((visibility("default"))) float beyond_a_tensor(const float* x, int64_t i) { return x[i]; }
extern "C" __attribute__((visibility("default"))) float beyond_a_piece(int64_t i) {
  const auto [a, b] = nest_fast::scratch(5, 64);
  a[i] = b[0] = 1;
  return a[i];
}
extern "C" __attribute__((visibility("default"))) int64_t overflow(int64_t i) { return INT64_MAX - 7 + i; }
"""
# Calls each function with its number, library first.
PROVE = """
import ctypes, sys, torch
library, x = ctypes.CDLL(sys.argv[1]), torch.ones(8)
for call in sys.argv[2:]:
    name, number = call.split(":")
    tensor = (ctypes.c_void_p(x.data_ptr()),) if name == "beyond_a_tensor" else ()
    getattr(library, name)(*tensor, ctypes.c_int64(int(number)))
"""


def load_setup():
    spec = importlib.util.spec_from_file_location("nest_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(cxx: str) -> dict[str, str]:
    """The sanitizers' runtimes before all others, as an interpreter that is built without them needs."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # the last, so that they find its exceptions
    said = [subprocess.check_output([cxx, f"-print-file-name={name}"], text=True).strip() for name in names]
    missing = [path for path in said if not Path(path).is_file()]
    if missing:
        sys.exit(f"sanitize: {cxx} has no {', '.join(missing)} (GCC's sanitizers: libasan, libubsan)")
    # Without leaks: the interpreter and torch keep much until the process ends.
    options = f"detect_leaks=0:halt_on_error=1:print_stacktrace=1:log_path={REPORTS}/report"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(said),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": options,
        "PYTHONPATH": str(BUILD),
        "NEST_FAST_GUARD_CASES": CASES,
        "OMP_NUM_THREADS": "1",
    }


def reports() -> str:
    """What the AddressSanitizer said since the last call; GCC's other one says it on stderr alone."""
    found = sorted(REPORTS.glob("report.*"))
    text = "\n".join(path.read_text(errors="replace") for path in found)
    for path in found:
        path.unlink()
    return text


def prove(cxx: str, flags: str, env: dict[str, str]) -> None:
    """That each kind of error is reported, and nothing where there is none."""
    source, library = BUILD / "proof.cpp", BUILD / "proof.so"
    source.write_text(PROOF)
    command = [cxx, *flags.split(), "-fPIC", "-shared", f"-I{ROOT}/csrc", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    for calls, wanted in (
        (["beyond_a_tensor:7", "beyond_a_piece:4", "overflow:7"], ""),
        (["beyond_a_tensor:8"], "AddressSanitizer: heap-buffer-overflow"),
        (["beyond_a_piece:5"], "AddressSanitizer: use-after-poison"),
        (["overflow:8"], "runtime error: signed integer overflow"),
    ):
        command = [sys.executable, "-c", PROVE, str(library), *calls]
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
        said = reports() + done.stderr
        if wanted not in said or (done.returncode == 0) != (wanted == ""):
            expected = wanted or "nothing"
            sys.exit(f"{said}\nsanitize: {calls}: expected {expected}, got exit {done.returncode} and what is above")
    print("sanitize: reads beyond a tensor and beyond a piece of scratch memory, and an overflow, are reported")


def main() -> None:
    start = time.monotonic()
    os.environ["NEST_FAST_SANITIZE"] = "1"
    setup = load_setup()
    cxx, env = setup.find_cxx(), environment(setup.find_cxx())
    shutil.rmtree(BUILD, ignore_errors=True)  # the objects are kept elsewhere
    build = ["setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
    REPORTS.mkdir(exist_ok=True)
    reports()
    prove(cxx, f"{setup.FLAGS} {setup.SANITIZED}", env)
    loaded = "from nest_fast.ops import _extension as e; print(e.__file__, e.cpu_error, e.cpp_isa)"
    said = subprocess.check_output([sys.executable, "-c", loaded], cwd=BUILD, env=env, text=True).split()
    if not Path(said[0]).is_relative_to(BUILD) or said[1] != "None":
        sys.exit(f"sanitize: expected the package in {BUILD} with its CPU part, got {' '.join(said)}")
    built = time.monotonic()
    print(f"sanitize: built and shown in {built - start:.0f} s; instruction sets up to {said[2]}", flush=True)
    chosen = sys.argv[1:] or [*(f"{name}.py" for name in TESTS), "-k", NOT]
    # Not --capture=fd: what a process says that then dies would be lost. The first that dies ends the run: pytest-xdist
    # would give its test to the next one, again and again.
    options = ["--capture=sys", "-n", "2", "--dist", "loadgroup", "--max-worker-restart", "0"]
    command = [sys.executable, "-m", "pytest", "-q", *options, *chosen]
    done = subprocess.run(command, cwd=ROOT / "tests", env=env, check=False)
    said = reports()
    print(said, f"sanitize: tests {time.monotonic() - built:.0f} s", sep="")
    if said or done.returncode:
        sys.exit("sanitize: " + ("the sanitizers report what is above" if said else "a test failed"))


if __name__ == "__main__":
    main()
