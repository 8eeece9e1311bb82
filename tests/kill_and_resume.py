"""kill -9 at random moments: every resumed run ends in bitwise the weights of one that nothing interrupted.

``python tests/kill_and_resume.py --kills 10`` prints what it did; ``test_train.py`` has a shorter form.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Started once, its copies have torch and timm loaded.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["nest_fast.train.trainer"])

TINY = [
    *("--model", "nest_tiny_s16_32", "--epochs", "3", "--batch-size", "32", "--log-every", "1", "--workers", "1"),
    *("--model-kwargs", "patch_size=4", "num_levels=2", "embed_dims=32", "num_heads=2", "depths=1"),
    *("--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1", "--random-erasing", "0.25", "--ema", "0.99"),
    *("--auto-augment", "rand-m9-n2-p0.5-mstd0.5", "--clip-grad", "1", "--accumulate", "2"),
]


def _main(arguments: list[str], environment: dict[str, str], told: str) -> None:
    os.environ.update(environment)
    with open(told, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    from nest_fast.train.__main__ import main

    sys.exit(main(arguments))


def start(arguments: list[str], told: Path, **environment: str) -> multiprocessing.process.BaseProcess:
    """``python -m nest_fast.train ARGUMENTS`` in a process of its own; what it prints goes to ``told``."""
    process = context.Process(target=_main, args=([str(a) for a in arguments], environment, str(told)))
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess, told: Path) -> None:
    process.join(300)
    assert process.exitcode == 0, f"{process.exitcode}\n{told.read_text()[-3000:]}"


@dataclass
class Kill:
    step: int  # of the checkpoint that was there
    lost_steps: int
    lost_seconds: float
    of_epoch: float


def flat(tree: object, name: str = "") -> dict[str, object]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if pairs is None:
        return {name: tree}
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}.{key}").items()}


def differences(a: Path, b: Path) -> list[str]:
    """What two checkpoints do not have in common bit for bit, but for times and when checkpoints are written."""
    first, second = (flat(torch.load(path, weights_only=True)) for path in (a, b))
    assert first.keys() == second.keys()
    same = {k: torch.equal(v, second[k]) if isinstance(v, torch.Tensor) else v == second[k] for k, v in first.items()}
    own = (".seconds", ".time", ".options.checkpoint_minutes")
    return [name for name, equal in same.items() if not equal and name not in own]


def kill_and_resume(
    arguments: list[str], folder: Path, kills: int, minutes: float, wait: float, seed: int
) -> list[Kill]:
    """Train once, and once killed ``kills`` times within ``wait`` seconds after a step was done; compare the two."""
    told, out, rng = folder / "told.txt", folder / "killed", random.Random(seed)
    whole = start([*arguments, "--out", folder / "whole"], told)
    found: list[Kill] = []
    finish(whole, told)
    while len(found) < kills:
        before = _last_step(out)
        run = start([*arguments, "--out", out, "--resume", "--checkpoint-minutes", minutes], told)
        while _last_step(out) == before and run.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, wait))
        if not run.is_alive():
            raise AssertionError(f"the run ended after {len(found)} kills:\n{told.read_text()[-3000:]}")
        assert run.pid is not None
        os.kill(run.pid, signal.SIGKILL)
        now = time.time()
        run.join()
        last = _last_step(out)
        for path in out.glob("*.pt"):
            torch.load(path, weights_only=True)  # whole
        there = torch.load(out / "last.pt", weights_only=True)
        per_epoch = len(_rows(folder / "whole")) // 3
        found.append(Kill(there["step"], last - there["step"], now - there["time"], last % per_epoch / per_epoch))
    rest = start([*arguments, "--out", out, "--resume", "--checkpoint-minutes", minutes], told)
    finish(rest, told)
    assert not differences(folder / "whole" / "last.pt", out / "last.pt")
    # Losses and rates are the same; the speed is not, and the times.
    for name, columns in (("steps.csv", 5), ("epochs.csv", 9)):
        rows = [
            [line.split(",")[:columns] for line in (folder / run / name).read_text().splitlines()]
            for run in ("whole", "killed")
        ]
        assert rows[0] == rows[1], name
    left = [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    assert not left, left
    return found


def _rows(out: Path) -> list[str]:
    path = out / "steps.csv"
    return path.read_text().splitlines()[1:] if path.exists() else []


def _last_step(out: Path) -> int:
    whole = [row for row in _rows(out) if row.count(",") == 6]
    return int(whole[-1].split(",")[0]) if whole else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    started = time.time()
    found = kill_and_resume(
        ["--data", "digits", *TINY], folder, args.kills, args.minutes, 60 * args.minutes * 1.5, args.seed
    )
    for i, kill in enumerate(found, 1):
        print(
            f"kill {i:2}: at {100 * kill.of_epoch:3.0f} % of an epoch, checkpoint of step {kill.step}, lost "
            f"{kill.lost_steps} steps, {kill.lost_seconds:.1f} s of {60 * args.minutes:.0f} s"
        )
        assert kill.lost_seconds <= 60 * args.minutes
    print(
        f"bitwise the weights, averages, optimizer, generators of the run without a kill; {time.time() - started:.0f} s"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
