"""What a change of a model brings, tried on the spot: how far its outputs are from float64, and how fast it is."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nest_fast.testing import relative_error

__all__ = ["Trial", "try_out"]

SAMPLES, ROUNDS = 2, 5


class Trial(NamedTuple):
    """Relative L2 distances from float64 and the speed, in inference, of a model before and after a change.

    Attributes:
        error, own_error: the largest distance of an output after and before.
        allowed: what the error was held to.
        speedup: median of seconds before by seconds after, of runs in pairs.
        seconds: median time of a run after.
    """

    error: float
    own_error: float
    allowed: float
    speedup: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.speedup:.2f}x as fast on the example, {1e3 * self.seconds:.3g} ms; "
            f"relative error {self.error:.1e}, before {self.own_error:.1e}"
        )


def try_out(
    model: nn.Module,
    example: Tensor | tuple,
    before: Callable[[], None],
    after: Callable[[], None],
    tolerance: float | None = None,
) -> Trial:
    """Run ``model`` on ``example`` in eval mode as ``before()`` and as ``after()`` leave it; either may come last.

    The random state and the modules' modes are what they were. The model in float64 is a copy.

    Args:
        model: any module.
        example: its input, or a tuple of its inputs; tensors with the batch first.
        before, after: make the change undone and done.
        tolerance: largest relative error after; None: three times that before, and some roundings.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    few = tree_map_only(Tensor, lambda x: x[:SAMPLES], inputs)
    with torch.no_grad(), _in_eval_mode(model), torch.random.fork_rng(_devices(inputs)):
        before()
        golden = _outputs(copy.deepcopy(model).double(), tree_map_only(Tensor, _widened, few))
        own = _outputs(model, few)
        after()
        new = _outputs(model, few)
        own_error, error = (_largest_error(outs, golden) for outs in (own, new))
        eps = max((torch.finfo(x.dtype).eps for x in own), default=0.0)
        allowed = 3 * own_error + 4 * eps if tolerance is None else tolerance
        pairs: list[tuple[float, float]] = []
        if error <= allowed:
            for _ in range(ROUNDS + 1):
                before()
                slow = _seconds(model, inputs)
                after()
                pairs.append((slow, _seconds(model, inputs)))
        ratio = statistics.median(slow / fast for slow, fast in pairs[1:]) if pairs else float("nan")
        seconds = statistics.median(fast for _, fast in pairs[1:]) if pairs else float("nan")
    return Trial(error, own_error, allowed, ratio, seconds)


def _outputs(model: nn.Module, inputs: tuple) -> list[Tensor]:
    return [x for x in tree_leaves(model(*inputs)) if isinstance(x, Tensor) and x.is_floating_point()]


def _largest_error(outs: list[Tensor], golden: list[Tensor]) -> float:
    """NaN if one is."""
    errors = [relative_error(x, wide) for x, wide in zip(outs, golden, strict=True)]
    return torch.tensor(errors or [0.0], dtype=torch.float64).max().item()


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _seconds(model: nn.Module, inputs: tuple) -> float:
    devices = _devices(inputs)
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(*inputs)
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _devices(inputs: Any) -> list[torch.device]:
    return list({x.device for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_cuda})


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
