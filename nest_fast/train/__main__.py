"""``python -m nest_fast.train``; see ``--help``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["main"]

NEEDED = ("timm", "torchvision", "tensorboard", "matplotlib", "tqdm", "numpy", "PIL")


def main(arguments: list[str] | None = None) -> int:
    """Train as ``arguments`` (by default the command line) say.

    Returns:
        0; 2 for bad input, told in one line; 128 and a signal's number where one stopped the run, after a checkpoint.
    """
    from nest_fast.train.options import UsageError, parse

    world = None
    try:
        given = parse(arguments)
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"expected the packages of nest_fast[train], got none of {', '.join(missing)}: "
                             "pip install 'nest_fast[train]'")  # fmt: skip
        from nest_fast.train.distributed import World

        world = World(given.get("device"))
        return _run(given, world)
    except UsageError as error:
        print(f"nest_fast.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second one
        return 130
    finally:
        if world is not None:
            world.close()


def _run(given: dict, world) -> int:
    from nest_fast.train import checkpoint
    from nest_fast.train.options import UsageError, changed, complete
    from nest_fast.train.trainer import Trainer

    saved = None
    if "resume" in given:
        path = given["resume"] or complete(given).out / "last.pt"
        if given["resume"] or path.exists():
            saved = checkpoint.read(path)
            given.setdefault("out", path.parent)
        elif world.first:
            print(f"nest_fast.train: no {path} yet, a new run", file=sys.stderr)
    options = complete(given, saved and saved["options"])
    if options.fsdp and not world.started:
        raise UsageError("fsdp: expected processes that torchrun started, got a single one")
    if options.workers is None:
        options.workers = min(8, os.cpu_count() or 1)
    error = None
    if world.first:
        try:
            _prepare(options.out, new=saved is None)
        except UsageError as e:
            error = e
        if saved:
            for line in changed(options, saved["options"]):
                print(f"nest_fast.train: other than in the checkpoint: {line}", file=sys.stderr)
    world.check(error)
    return Trainer(options, world, saved).fit()


def _prepare(out: Path, new: bool) -> None:
    from nest_fast.train import checkpoint
    from nest_fast.train.options import UsageError

    if new and (out / "last.pt").exists():
        raise UsageError(f"out: expected a folder without a run, or --resume, got {out} with a last.pt")
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(out)
    except OSError as error:
        raise UsageError(f"out: cannot write {out}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
