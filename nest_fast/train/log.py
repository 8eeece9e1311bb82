"""What a run tells: a progress bar, rows of CSV, TensorBoard, and the curves at the end."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

from nest_fast.train.options import UsageError

__all__ = ["EPOCH_FIELDS", "STEP_FIELDS", "Log"]

STEP_FIELDS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "seconds")
EPOCH_FIELDS = (
    "step", "epoch", "train_loss", "val_loss", "val_top1", "val_top5", "ema_loss", "ema_top1", "lr", "seconds",
    "val_images", "broken_images",
)  # fmt: skip


class Log:
    """Of the first process; the others have one that writes nothing.

    Args:
        folder: gets ``steps.csv``, ``epochs.csv``, ``tensorboard/`` and ``curves.png``.
        step, evaluated: where the run goes on and its last evaluation; rows after them were lost with the run that
            wrote them, and are written again.
        total: images of all steps.
        batch: images of a step.
    """

    def __init__(self, folder: Path, step: int, evaluated: int, total: int, batch: int, active: bool) -> None:
        self.folder, self.active = folder, active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.steps = _Table(folder / "steps.csv", STEP_FIELDS, step)
        self.epochs = _Table(folder / "epochs.csv", EPOCH_FIELDS, evaluated)
        self.board = _written(folder, SummaryWriter, str(folder / "tensorboard"), purge_step=step + 1)
        every = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=total, initial=step * batch, unit="img", unit_scale=True, mininterval=every, dynamic_ncols=True,
            desc="training", file=sys.stderr,
        )  # fmt: skip

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """From any process, at once."""
        print(f"nest_fast.train: {text}", file=sys.stderr, flush=True)

    def advance(self, images: int) -> None:
        if self.active:
            self.bar.update(images)

    def step(self, row: dict[str, Any]) -> None:
        if self.active:
            self.bar.set_postfix(
                epoch=f"{row['epoch']:.2f}", loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}", refresh=False
            )
            self._write(self.steps, "train", row)

    def epoch(self, row: dict[str, Any]) -> None:
        if self.active:
            self._write(self.epochs, "epoch", row)

    def _write(self, table: _Table, tag: str, row: dict[str, Any]) -> None:
        table.add(row)
        for name, value in row.items():
            if name not in ("step", "epoch") and value is not None:
                _written(self.folder, self.board.add_scalar, f"{tag}/{name}", value, row["step"])

    def close(self) -> None:
        if self.active:
            self.bar.close()
            _written(self.folder, self.board.close)

    def plot(self, title: str) -> Path | None:
        """``curves.png``: losses and accuracies over the epochs."""
        if not self.active:
            return None
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        steps, epochs = self.steps.read(), self.epochs.read()
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        left.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], lw=0.7, alpha=0.6, label="training")
        for axis, names in (
            (left, {"val_loss": "validation", "ema_loss": "moving average"}),
            (right, {"val_top1": "top 1", "val_top5": "top 5", "ema_top1": "top 1, moving average"}),
        ):
            for name, label in names.items():
                points = [(r["epoch"], r[name]) for r in epochs if r[name] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            axis.legend()
        left.set_title("loss")
        right.set_title("validation accuracy, %")
        figure.suptitle(title)
        path = self.folder / "curves.png"
        _written(self.folder, figure.savefig, path, dpi=120)
        plt.close(figure)
        return path


class _Table:
    """A CSV file that keeps its rows up to a step and gets new ones."""

    def __init__(self, path: Path, fields: tuple[str, ...], step: int) -> None:
        self.path, self.fields = path, fields
        rows = [row for row in self.read() if row["step"] <= step]
        new = path.with_suffix(".csv.tmp")

        def rewrite() -> None:
            with open(new, "w", newline="") as file:
                csv.writer(file).writerow(fields)
                csv.writer(file).writerows([_text(row[f]) for f in fields] for row in rows)
            os.replace(new, path)

        _written(path, rewrite)

    def read(self) -> list[dict[str, Any]]:
        """Its rows as numbers (None where there is none); a row that was cut off is left out."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(self.fields)]
        kinds = [int if name in ("step", "val_images", "broken_images") else float for name in self.fields]
        values = [[kind(v) if v else None for kind, v in zip(kinds, row, strict=True)] for row in rows[1:]]
        return [dict(zip(self.fields, row, strict=True)) for row in values]

    def add(self, row: dict[str, Any]) -> None:
        def append() -> None:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow(_text(row.get(name)) for name in self.fields)

        _written(self.path, append)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)


def _written(path: Path, write: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return write(*args, **kwargs)
    except OSError as error:
        raise UsageError(f"out: cannot write {path}: {error.strerror or error}") from error
