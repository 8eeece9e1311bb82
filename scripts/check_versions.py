"""Tests one wheel of nest_fast with every torch that pip can get, each in an environment of its own.

    python scripts/check_versions.py                        each minor release of torch but the one of constraints.txt
    python scripts/check_versions.py --torch 2.15.0 --python python3.13
    python scripts/check_versions.py --publish              tests/versions.json and README's table are made of the rows

Triton is what that torch asks for. The tests of the operations and the models run, FILES below, against the installed
wheel, whose compiled part was built once. A row is printed and written to ``--out`` as soon as there is one; rows of
other versions stay in that file. Exit status 1 if an environment failed. Needs gigabytes: torch's CUDA builds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "tests" / "versions.json"
README = ROOT / "README.md"
PLACE = re.compile(r"(?<=<!-- versions: begin -->\n\n).*?(?=\n\n<!-- versions: end -->)", re.S)
# What a version of torch or Triton can change: registrations, compiling, exporting, gradients, interpreted kernels.
# Not the values of C++, compiled once, nor what is looked for in many shapes or numbers.
FILES = (
    *("attention_layer", "mlp_layer", "linear", "add_layer_norm", "bias_gelu", "layer_norm_mean", "blockify"),
    *("block_attention", "block_attention_kernel", "positions", "block_aggregate", "norm_pool"),
    *("operations", "modules", "fusion", "freeze", "nest", "timm", "export"),
)
WITHOUT = "not any_shape and not special_values and not buffers and not repeats and not every and not gradcheck"
# Triton 3.6 interprets nothing with a later numpy, which no longer takes an array of one number for that number.
PACKAGES = ("timm", "pytest", "pytest-xdist", "hypothesis", "numpy<2.4")
# What a row is: the versions that were there, and what came of the tests.
ASK = """
import importlib.metadata, json, platform, torch
version = importlib.metadata.version
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
    "timm": version("timm")}))
"""


def run(command: list, log: Path, deadline: float, **environment: str) -> int:
    """The exit status of a command whose output goes to the end of ``log``; 124 where it took too long."""
    with log.open("a") as file:
        try:
            return subprocess.run(
                [str(word) for word in command],
                cwd=log.parent,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(deadline - time.monotonic(), 1),
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    return dict(lines)


def releases() -> list[str]:
    """The newest torch of each minor release that pyproject.toml admits and pip can get, but the one that is pinned."""
    oldest = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    said = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True, check=True
    ).stdout
    newest: dict[tuple[int, int], str] = {}
    for version, major, minor in re.findall(r"\b((\d+)\.(\d+)\.\d+)\b", said.partition("Available versions:")[2]):
        newest.setdefault((int(major), int(minor)), version)
    without = tuple(int(n) for n in pinned()["torch"].split(".")[:2])
    return [newest[key] for key in sorted(newest) if key >= (int(oldest[1]), int(oldest[2])) and key != without]


def test(python: str, torch: str, wheel: Path, root: Path, limit: float) -> dict:
    """The row of one environment, made if it is not there yet."""
    deadline = time.monotonic() + limit
    said = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout  # "Python 3.11.7"
    asked = f"{'.'.join(said.strip().split('.')[:2])}, torch {torch}"
    name = asked.lower().replace(", torch ", "-torch-").replace(" ", "")
    env, log = root / name, root / f"{name}.log"
    row: dict = {"asked": asked, "result": "not installed"}
    log.write_text("")
    if not (env / "ready").is_file():
        shutil.rmtree(env, ignore_errors=True)
        wanted = [f"torch=={torch}", *(f"{one}=={pinned()[one]}" if one in pinned() else one for one in PACKAGES)]
        steps = [[python, "-m", "venv", env], [env / "bin/python", "-m", "pip", "install", "-q", *wanted]]
        if any(run(step, log, deadline) for step in steps):
            return row
        (env / "ready").touch()
    if run([env / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel], log, deadline):
        return row
    row |= json.loads(subprocess.run([env / "bin/python", "-c", ASK], capture_output=True, check=True).stdout)
    tests, report = root / name / "tests", root / f"{name}.xml"  # away from the sources: the wheel is tested
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", env / "examples", dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", env)
    report.unlink(missing_ok=True)
    start = time.monotonic()
    options = ["-q", "-k", WITHOUT, "-n", "2", "--dist", "loadgroup", f"--rootdir={env}", f"--junitxml={report}"]
    command = [env / "bin/python", "-m", "pytest", *options, *(tests / f"test_{file}.py" for file in FILES)]
    status = run(command, log, deadline, OMP_NUM_THREADS="1")
    row |= {"seconds": round(time.monotonic() - start), "result": {0: "passed", 124: "too long"}.get(status, "failed")}
    if report.is_file():
        suite = ElementTree.parse(report).getroot()[0].attrib
        bad = int(suite["failures"]) + int(suite["errors"])
        row |= {"passed": int(suite["tests"]) - bad - int(suite["skipped"]), "failed": bad}
        row |= {"skipped": int(suite["skipped"])}
    return row | {"date": datetime.date.today().isoformat(), "machine": machine()}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def table(rows: list[dict]) -> str:
    """Markdown."""
    if not rows:
        return "No run of `make test-versions` is published yet."
    lines = ["| torch | Triton | Python | tests | date |", "|---|---|---|---|---|"]
    for row in rows:
        if "passed" in row:
            tests = f"{row['passed']} passed" + (f", {row['failed']} failed" if row["failed"] else "")
            tests += f", {row['skipped']} skipped" if row["skipped"] else ""
        else:
            tests = row["result"]
        versions = (row.get(name, row["asked"]) for name in ("torch", "triton", "python"))
        lines.append(f"| {' | '.join([*versions, tests, row.get('date', '')])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", help="versions of torch (one of each minor release that pip can get)")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters (this one)")
    parser.add_argument("--root", type=Path, default=ROOT / "build" / "versions", help="folder for environments")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "versions.json", help="rows, old ones too")
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds for one environment (1800)")
    parser.add_argument("--wheel", type=Path, help="of nest_fast (one is built)")
    parser.add_argument("--publish", action="store_true", help="write the table instead of running tests")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    if args.publish:
        PUBLISHED.write_text(json.dumps(rows, indent=1) + "\n")
        README.write_text(PLACE.sub(lambda _: table(rows), README.read_text()))
        return 0
    root = args.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    wheel = args.wheel and args.wheel.resolve()
    if wheel is None:
        built = root / "wheel"
        shutil.rmtree(built, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, ROOT], check=True)
        [wheel] = built.glob("*.whl")
    failed = False
    for python in args.python:
        for torch in args.torch or releases():
            print(f"{python}, torch {torch}: output in {root}/*.log", file=sys.stderr, flush=True)
            row = test(python, torch, wheel, root, args.time_limit)
            failed |= row["result"] != "passed"
            rows = [old for old in rows if old["asked"] != row["asked"]] + [row]
            versions = [re.findall(r"[\d.]+", row["asked"]) for row in rows]
            order = [[[int(n) for n in one.split(".")] for one in reversed(both)] for both in versions]
            rows = [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(table([row]), flush=True)
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
