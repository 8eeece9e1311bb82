"""Compiles every ``csrc/*.cu`` for every architecture that is shipped and fails on a spill or a stack frame.

Needs nvcc and torch's headers, no GPU. ``python scripts/check_cuda.py`` prints one line per file and architecture;
where there is no nvcc it says so and succeeds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import ARCHITECTURES, FLAGS, CompileError, find_nvcc, find_torch  # noqa: E402


def check(nvcc: str, known: list[str], source: Path, number: str) -> tuple[bool, str]:
    """Compile ``source`` for ``sm_<number>``: whether it is clean, and what to say of it."""
    name = f"{source.name} sm_{number}"
    if f"compute_{number}" not in known:
        return True, f"{name}: not run, this nvcc does not know it"
    target = ["-gencode", f"arch=compute_{number},code=sm_{number}", "-Xptxas", "-v", "-cubin", "-o", os.devnull]
    command = [nvcc, *FLAGS.split(), "-DUSE_CUDA", "-isystem", str(find_torch() / "include"), *target, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return False, f"{name}: does not compile\n{result.stderr}"
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    waste = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", result.stderr)]
    if not registers or not waste:
        return False, f"{name}: ptxas reported no kernel\n{result.stderr}"
    verdict = "no spill, no stack frame" if not any(waste) else f"SPILL OR STACK FRAME\n{result.stderr}"
    return not any(waste), f"{name}: {len(registers)} kernels, at most {max(registers)} registers, {verdict}"


def main() -> int:
    try:
        nvcc = find_nvcc()
    except CompileError as error:
        print(f"check_cuda: not run, {error}")
        return 0
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    clean = True
    cases = [(source, arch.replace(".", "")) for source in sorted(ROOT.glob("csrc/*.cu")) for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for good, said in pool.map(check, repeat(nvcc), repeat(known), *zip(*cases, strict=True)):
            print(said, flush=True)
            clean &= good
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
