"""The processes of a run: one, or as many as torchrun starts. What they agree on, and how the model is spread."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nest_fast.train.options import UsageError

__all__ = ["World"]


class World:
    """This process among those of the run; its collectives are no-ops for a single one.

    Attributes:
        rank, size: of this process, of the run.
        device: what this process computes on.
    """

    def __init__(self, device: str | None) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.started = "TORCHELASTIC_RUN_ID" in os.environ or self.size > 1
        self.device = _device(device, int(os.environ.get("LOCAL_RANK", 0)) if self.started else None)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.started:
            # What processes tell each other stays on the CPU; only tensors of the model go through NCCL.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def close(self) -> None:
        if self.started:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> list[float]:
        """The sums over all processes of a float64 tensor."""
        values = values.cpu()
        if self.started:
            dist.all_reduce(values)
        return values.tolist()

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if not self.started:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process."""
        if not self.started:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def check(self, error: Exception | None) -> None:
        """Raise in every process what was raised in one, so that none waits for the others."""
        errors = [e for e in self.gather(error and f"{error}") if e]
        if error is not None:
            raise error
        if errors:
            raise UsageError(errors[0])

    def spread(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """The model to call in training: ``model`` itself, sharded in place (FSDP2), or wrapped (DDP)."""
        if fsdp:
            self.shard(model)
        elif self.started:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids)
        return model

    def shard(self, model: nn.Module) -> None:
        """FSDP2: a NesT layer at a time, then what is left."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for level in getattr(model, "levels", ()):
            for layer in getattr(level, "transformer_encoder", ()):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)


def _device(name: str | None, local_rank: int | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank or 0)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: expected one of this machine's, got {name!r} ({_first_line(error)})") from error
    return device


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
