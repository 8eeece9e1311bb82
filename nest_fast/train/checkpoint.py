"""Checkpoint files: whole or not there, the same for one process, DDP and FSDP2, readable without running code."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from nest_fast.train.options import UsageError

__all__ = ["FORMAT", "copy", "load_states", "read", "remove_leftovers", "rng_state", "set_rng_state", "states", "write"]

FORMAT = "nest_fast.train 1"
_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole tensors by name, of model and optimizer, on the CPU; all processes call it, the first gets them."""
    return dcp.get_state_dict(model, optimizer, options=_FULL)


def model_state(model: nn.Module) -> dict[str, Any]:
    return dcp.get_model_state_dict(model, options=_FULL)


def load_states(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, model_state: dict, optimizer_state: dict | None = None
) -> None:
    """The inverse of ``states``: every process has read the file, and takes its part."""
    options = dcp.StateDictOptions(full_state_dict=True)
    try:
        dcp.set_model_state_dict(model, model_state, options=options)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"resume: expected a checkpoint of this model, got one with other parameters ({reason})"
        ) from error
    if optimizer is not None and optimizer_state is not None:
        dcp.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Of every generator that a step may draw from, as plain values."""
    kind, words, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """``checkpoint`` at ``path``, which until then stays what it was: another name, then flushed, then renamed.

    Raises:
        UsageError: it cannot be written (a full disk, no permission).
    """
    # In memory first: torch.save tells a full disk as an error of its own archive.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with _replacing(path) as new, open(new, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def copy(path: Path, to: Path) -> None:
    """``to`` becomes what ``path`` is: another name of the same file where the file system has such."""
    with _replacing(to) as new:
        try:
            os.link(path, new)
        except OSError:
            shutil.copyfile(path, new)
            with open(new, "rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Any:
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        new.unlink(missing_ok=True)
        yield new
        os.replace(new, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        before = f"; {path} is the one from before" if path.exists() else ""
        raise UsageError(f"out: cannot write {path}: {error.strerror or error}{before}") from error


def remove_leftovers(folder: Path) -> None:
    """What a process left that was killed while it wrote."""
    for path in folder.glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint that :func:`write` wrote, its tensors on the CPU.

    Raises:
        UsageError: there is none, or it is something else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UsageError(f"resume: expected a checkpoint, got {path}: {error.strerror or error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"resume: expected a checkpoint of nest_fast.train, got {path}, which is none or damaged"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format", "a file without a format") if isinstance(found, dict) else type(found).__name__
        raise UsageError(f"resume: expected a checkpoint of nest_fast.train ({FORMAT!r}), got {path}: {kind}")
    return found
