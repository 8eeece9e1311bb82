"""What a launch and an eager layer cost the host, beside plain PyTorch's dispatch; host_time.py says how.

On tensors so small, the time is the interpreter's and the dispatcher's, on a GPU as well, so no GPU is asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from harness import DEVICE

PEERS = ("torch", "nest_fast launch", "nest_fast")
CASES = [(op, peer) for op in ("add_layer_norm", "bias_gelu", "block_attention", "layer_norm_mean") for peer in PEERS]
CASES += [("layer", "torch"), ("layer", "nest_fast")]


class Replay:
    """A timer for pytest-benchmark, and what it times: rounds that another process has measured."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rounds: list[float] = []

    def __call__(self) -> float:
        return self.seconds

    def next_round(self) -> None:
        self.seconds += self.rounds.pop(0)


REPLAY = Replay()


@pytest.fixture(scope="module")
def host_times() -> dict[str, dict[str, list[float]]]:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    command = [sys.executable, str(Path(__file__).with_name("host_time.py"))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("case", "peer"), CASES, ids=lambda name: name.replace(" ", "-"))
def test_host(benchmark, host_times, record_property, case, peer):
    yardstick, seconds = host_times[case]["torch"], host_times[case][peer]
    low, ratio, high = statistics.quantiles((a / b for a, b in zip(yardstick, seconds, strict=True)), n=4)
    benchmark.group = f"host time of {case}"
    REPLAY.rounds = list(seconds)
    benchmark.pedantic(REPLAY.next_round, rounds=len(seconds))
    benchmark.extra_info.update(
        op="host time",
        case=case,
        batch=1,
        dtype="fp32",
        direction="forward",
        axis="",
        x=0,
        peer=peer,
        yardstick="torch",
        device=DEVICE,
        limit=False,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        yardstick_seconds=statistics.median(yardstick),
        errors=[],
        yardstick_errors=[],
        bytes=0,
        flops=0,
        items=0,
        memory=0,
        timing="time.thread_time, launches over a driver that launches nothing",
    )
    record_property("measured", f"{statistics.median(seconds) * 1e6:.3g} us x{ratio:.2f}")
