"""Installs nest_fast in the ways that users do, each in a fresh environment, and says what there is afterwards.

    python scripts/check_install.py                              every way from this checkout
    python scripts/check_install.py --wheel dist/nest_fast-*.whl the wheel, without a compiler

torch and what it needs are those of this interpreter, seen by the environments as their own; pip must leave them alone.
Exit status 1 if one of the ways does not give what it should. Takes some minutes: a clone compiles everything.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TOOLS = ["setuptools>=77", "ninja"]  # pyproject.toml's build requirements, which pip does not fetch then
# Prints what there is, one fact a line, in a fresh interpreter that is not in the checkout.
ASK = """
import warnings
import torch, nest_fast
from nest_fast.ops import _extension
q, k, v = torch.randn(3, 1, 2, 16, 2, 32)
wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(-3, -2) for x in (q, k, v))).transpose(-3, -2)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.allclose(nest_fast.block_attention(q, k, v), wanted, atol=1e-5)
print(_extension.cpu_error or f"loaded, {_extension.cpp_isa}")
print(_extension.cuda_error or "loaded")
print("; ".join(str(one.message) for one in said))
"""
# A way: pip's arguments, whether a compiler is in PATH, and what becomes of the CPU part.
SOURCES = {
    "pip install .": ([str(ROOT)], True, "loaded"),
    "pip install -e .": (["-e", str(ROOT)], True, "loaded"),
    "pip install --no-build-isolation .": (["--no-build-isolation", str(ROOT)], True, "loaded"),
    "pip install git+file://": ([f"git+file://{ROOT}"], True, "loaded"),
    "pip install ., no compiler": ([str(ROOT)], False, "is not built: no C++ compiler"),
}


def try_way(arguments: list[str], compiler: bool, folder: Path) -> list[str]:
    """CPU part, CUDA part, what auto said, what pip changed, seconds."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    [torch] = importlib.util.find_spec("torch").submodule_search_locations  # where a build finds it
    (site / "torch").symlink_to(torch)
    environment = dict(os.environ)
    if not compiler:
        environment["PATH"] = str(folder / "bin")
        for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
            environment.pop(name, None)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if "--no-build-isolation" in arguments:
        subprocess.run([*pip, "install", "-q", *TOOLS], check=True)
    start = time.monotonic()
    done = subprocess.run([*pip, "install", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        return [f"pip failed: {done.stderr.splitlines()[-1]}", "", "", "", ""]
    seconds = f"{time.monotonic() - start:.0f} s"
    own = subprocess.run([*pip, "list", "--local", "--format=json"], capture_output=True, check=True).stdout
    beside = {one["name"] for one in json.loads(own)} - {"nest_fast", "nest-fast", "pip", "setuptools", "ninja"}
    asked = subprocess.run([python, "-c", ASK], cwd=folder, env=environment, capture_output=True, text=True)
    if asked.returncode:
        return [f"failed: {asked.stderr.splitlines()[-1]}", "", "", ", ".join(sorted(beside)), seconds]
    return [*asked.stdout.removesuffix("\n").split("\n"), ", ".join(sorted(beside)), seconds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="try this wheel alone")
    parser.add_argument("--only", help="a part of the name of the ways to try")
    args = parser.parse_args()
    ways = SOURCES if args.wheel is None else {args.wheel.name: ([str(args.wheel.resolve())], False, "loaded")}
    failed = False
    print("| way | CPU part | CUDA part | auto says | pip installed beside it | time |\n|---|---|---|---|---|---|")
    for way, (arguments, compiler, wanted) in ways.items():
        if args.only and args.only not in way:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = try_way(arguments, compiler, Path(folder) / "env")
        failed |= wanted not in found[0] or bool(found[3])
        print(f"| `{way}` | {' | '.join(found)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
