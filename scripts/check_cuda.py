"""Compiles every ``csrc/*.cu`` for every architecture that is shipped and fails on a spill or a stack frame.

Needs nvcc and torch's headers, no GPU. ``python scripts/check_cuda.py`` prints one line per file and architecture;
where there is no nvcc it says so and succeeds.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import ARCHITECTURES, FLAGS, CompileError, find_nvcc, find_torch  # noqa: E402


def check(nvcc: str, source: Path, number: str, cubin: Path) -> bool:
    """Compile ``source`` for ``sm_<number>``, print its line; whether it is clean."""
    target = ["-gencode", f"arch=compute_{number},code=sm_{number}", "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    command = [nvcc, *FLAGS.split(), "-DUSE_CUDA", "-isystem", str(find_torch() / "include"), *target, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    name = f"{source.name} sm_{number}"
    if result.returncode:
        print(f"{name}: does not compile\n{result.stderr}", flush=True)
        return False
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    waste = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", result.stderr)]
    if not registers or not waste:
        print(f"{name}: ptxas reported no kernel\n{result.stderr}", flush=True)
        return False
    verdict = "no spill, no stack frame" if not any(waste) else f"SPILL OR STACK FRAME\n{result.stderr}"
    print(f"{name}: {len(registers)} kernels, at most {max(registers)} registers, {verdict}", flush=True)
    return not any(waste)


def main() -> int:
    try:
        nvcc = find_nvcc()
    except CompileError as error:
        print(f"check_cuda: not run, {error}")
        return 0
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    clean = True
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(ROOT.glob("csrc/*.cu")):
            for number in (arch.replace(".", "") for arch in ARCHITECTURES):
                if f"compute_{number}" in known:
                    clean &= check(nvcc, source, number, Path(folder) / "out.cubin")
                else:
                    print(f"{source.name} sm_{number}: not run, this nvcc does not know it")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
