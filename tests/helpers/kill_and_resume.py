"""kill -9 at random moments: every resumed run ends in bitwise the weights of one that nothing interrupted.

``python tests/helpers/kill_and_resume.py --kills 10`` prints what it did; ``test_train.py`` has a shorter form.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# Started once, with torch and timm loaded; every process is a copy of it.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["nest_fast.train.trainer", "torch.utils.tensorboard", "matplotlib.pyplot"])

EVERYTHING = [
    *("--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1", "--random-erasing", "0.25", "--ema", "0.99"),
    *("--auto-augment", "rand-m9-n2-p0.5-mstd0.5", "--clip-grad", "1", "--accumulate", "2", "--log-every", "1"),
]


def _main(arguments: list[str], environment: dict[str, str], told: str) -> None:
    os.environ.update(environment)
    with open(told, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    from nest_fast.train.__main__ import main

    sys.exit(main(arguments))


def start(arguments: list, told: Path, **environment: str) -> multiprocessing.process.BaseProcess:
    """``python -m nest_fast.train ARGUMENTS`` in a process of its own; what it prints goes to ``told``."""
    process = context.Process(target=_main, args=([str(a) for a in arguments], environment, str(told)))
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess, told: Path, status: int = 0) -> None:
    process.join(600)
    assert process.exitcode == status, f"{process.exitcode}\n{told.read_text()[-3000:]}"


def rows(out: Path) -> list[list[str]]:
    """Those of ``steps.csv`` that are whole."""
    path = out / "steps.csv"
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    return [line.strip().split(",") for line in lines if line.endswith("\n")]


def wait_for(step: int, out: Path, *processes: multiprocessing.process.BaseProcess) -> None:
    while not rows(out) or int(rows(out)[-1][0]) < step:
        assert all(p.is_alive() for p in processes), f"a process ended before step {step}"
        time.sleep(0.002)


def workers(told: Path) -> list[str]:
    """The loaders' processes that still write to ``told``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "comm").read_text() == "pt_data_worker\n" and (process / "fd/1").resolve() == told.resolve():
                found.append(process.name)
    return found


@dataclass
class Kill:
    step: int
    saved: int  # step of the checkpoint that was there
    seconds: float  # since that step


def _flat(tree: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat(value, f"{name}.{key}")
    else:
        yield name, tree


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same bit for bit in two checkpoints, but for the times and how often they were written."""
    first, second = (dict(_flat(torch.load(path, weights_only=True))) for path in (a, b))
    own = (".seconds", ".time", ".options.checkpoint_minutes")
    return [
        name
        for name, value in first.items()
        if name not in own
        and not (torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name])
    ] + sorted(first.keys() ^ second.keys())


def kill_and_resume(arguments: list, folder: Path, kills: int, minutes: float, seed: int) -> list[Kill]:
    """Train once, and once killed ``kills`` times; compare the two, and look at every checkpoint on the way."""
    told, out, rng = folder / "told.txt", folder / "killed", random.Random(seed)
    finish(start([*arguments, "--out", folder / "whole"], told), told)
    total = len(rows(folder / "whole"))
    again = [*arguments, "--out", out, "--resume", "--checkpoint-minutes", minutes]
    found = []
    for i in range(kills):
        run = start(again, told)
        wait_for(max(2, int(total * (i + rng.random()) / (kills + 1))), out, run)
        time.sleep(rng.uniform(0, 0.1))
        assert run.pid is not None
        os.kill(run.pid, signal.SIGKILL)
        now = time.time()
        run.join()
        for path in out.glob("*.pt"):
            torch.load(path, weights_only=True)  # raises unless it is whole
        there = torch.load(out / "last.pt", weights_only=True)
        found.append(Kill(int(rows(out)[-1][0]), there["step"], now - there["time"]))
    finish(start(again, told), told)
    for _ in range(100):
        if not workers(told):
            break
        time.sleep(0.1)
    assert not workers(told), "the loaders' processes outlive a killed run"
    differ = differences(folder / "whole" / "last.pt", out / "last.pt")
    assert not differ, differ[:9]
    for name, columns in (("steps.csv", 5), ("epochs.csv", 9)):  # the rest are times
        one, other = (
            [line.split(",")[:columns] for line in (folder / run / name).read_text().splitlines()]
            for run in ("whole", "killed")
        )
        assert one == other, name
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0.05, help="of --checkpoint-minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, started = Path(tempfile.mkdtemp()), time.time()
    arguments = ["--data", "digits", "--model", "nest_tiny_s16_32", "--epochs", "3", "--workers", "1", *EVERYTHING]
    arguments += ["--model-kwargs", "patch_size=4", "num_levels=2", "embed_dims=32", "num_heads=2", "depths=1"]
    found = kill_and_resume(arguments, folder, args.kills, args.minutes, args.seed)
    per_epoch = len(rows(folder / "whole")) // 3
    for i, kill in enumerate(found, 1):
        print(
            f"kill {i:2}: after step {kill.step} ({kill.step % per_epoch / per_epoch:.0%} of an epoch), resumed from "
            f"step {kill.saved}, {kill.seconds:.1f} s before, of {60 * args.minutes:.0f} s allowed"
        )
        assert kill.seconds <= 60 * args.minutes
    print("every checkpoint whole; weights, average, optimizer, generators end bitwise as without a kill;")
    print(f"{time.time() - started:.0f} s, torch {torch.__version__}, seed {args.seed}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
