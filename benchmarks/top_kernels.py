"""A short profile of NesT-T, inference and training step: which kernels the time goes to.

    python benchmarks/top_kernels.py [--out DIR]

Prints a table for each and, with ``--out``, writes traces that chrome://tracing and Perfetto open.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nest_fast import nest_tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def profiled(step: Callable[[], object], trace: Path | None) -> str:
    """The table of one profiled ``step``, after two to warm up."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    for _ in range(2):
        step()
    with profile(activities=activities) as profiler:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return profiler.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=20, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the traces")
    out = parser.parse_args().out
    if out:
        out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = torch.randn(256 if DEVICE == "cuda" else 4, 3, 224, 224, device=DEVICE)

    deployed = nest_tiny(device=DEVICE, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        table = profiled(lambda: deployed(images.bfloat16()), out and out / "inference.json")
    print(f"NesT-T, inference, bf16, batch {len(images)}\n{table}")

    model = nest_tiny(device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()

    table = profiled(step, out and out / "training.json")
    print(f"NesT-T, training step, bf16 autocast, batch {len(images)}\n{table}")


if __name__ == "__main__":
    main()
