"""What a run measures of itself: means, its speed, and when a checkpoint is due."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from nest_fast.train.distributed import World

__all__ = ["Clock", "Mean", "Rate"]


class Mean:
    """A mean over images, parts, processes and resumed runs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.local = torch.zeros(2, dtype=torch.float64, device="cpu" if world.device.type == "mps" else world.device)
        self.total = [0.0, 0.0]

    def add(self, value: Tensor, images: int) -> None:
        self.local[0] += value.double() * images
        self.local[1] += images

    def reduce(self) -> None:
        self.total = [a + b for a, b in zip(self.total, self.world.sum(self.local), strict=True)]
        self.local.zero_()

    def take(self) -> float:
        self.reduce()
        mean, self.total = self.total[0] / max(self.total[1], 1.0), [0.0, 0.0]
        return mean


class Rate:
    """Images a second since it was last asked; evaluations and checkpoints count as they fall into the time."""

    def __init__(self, images: int) -> None:
        self.images, self.time = images, time.monotonic()

    def take(self, images: int) -> float:
        now = time.monotonic()
        rate = (images - self.images) / max(now - self.time, 1e-9)
        self.images, self.time = images, now
        return rate


class Clock:
    """When the next checkpoint has to begin for none to be older than ``interval`` seconds at any moment."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.born = time.monotonic()
        # At the first step: it tells what a checkpoint costs, and a full disk before hours are spent.
        self.last = -math.inf
        self.step = self.cost = 0.0

    def alive(self) -> float:
        return time.monotonic() - self.born

    def stepped(self, started: float) -> None:
        self.step = max(time.monotonic() - started, 0.9 * self.step)

    def saved(self, started: float) -> None:
        self.last, self.cost = started, max(time.monotonic() - started, 0.9 * self.cost)

    def due(self, ahead: float = 0.0) -> bool:
        """Whether it would be late after another step, or ``ahead`` seconds."""
        return time.monotonic() + 1.5 * (max(ahead, self.step) + self.cost) > self.last + self.interval
