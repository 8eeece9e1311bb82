"""Train the 32 px multi-query model on scikit-learn's digits, by the reference and by nest_fast, from the same seeds.

An accuracy check that is no tolerance: rounding differs, so two runs of one seed drift apart, but the curves of the two
implementations must differ no more than those of two seeds do. ``python scripts/train_digits.py --out FILE`` writes
losses and accuracies; the exit status says whether they agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import nest_fast

IMPLS = ("reference", "auto")


def digits(size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(n, 3, size, size)`` and labels to train on, then those to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:-256], order[-256:]
    return images[train], labels[train], images[test], labels[test]


def train(impl: str, seed: int, steps: int, batch: int, device: str) -> dict:
    """Losses of every step and the accuracy on what was not trained on."""
    x, y, test_x, test_y = (t.to(device) for t in digits())
    torch.manual_seed(seed)
    model = nest_fast.nest_tiny_s16_32(num_classes=10, drop_path_rate=0.1, impl=impl).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        picked = torch.randint(len(y), (batch,), generator=order).to(device)
        loss = F.cross_entropy(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        hits = sum(
            (model(a).argmax(1) == b).sum().item() for a, b in zip(test_x.split(32), test_y.split(32), strict=True)
        )
    return {"impl": impl, "seed": seed, "losses": losses, "accuracy": hits / len(test_y), "seconds": seconds}


def distance(a: dict, b: dict) -> float:
    """Mean absolute difference of two loss curves, each smoothed over 10 steps."""

    def smooth(run: dict) -> Tensor:
        return torch.tensor(run["losses"]).unfold(0, min(10, len(run["losses"])), 1).mean(1)

    return (smooth(a) - smooth(b)).abs().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: expected at least 2, to have a spread")
    runs = {}
    for seed, impl in itertools.product(range(args.seeds), IMPLS):
        run = runs[impl, seed] = train(impl, seed, args.steps, args.batch, args.device)
        line = f"seed {seed} {impl:9} loss {statistics.mean(run['losses'][-10:]):.3f} accuracy {run['accuracy']:.3f}"
        print(f"{line}  {run['seconds']:.0f} s", flush=True)
    between = [distance(runs["reference", seed], runs["auto", seed]) for seed in range(args.seeds)]
    spread = [
        distance(runs["reference", a], runs["reference", b]) for a, b in itertools.combinations(range(args.seeds), 2)
    ]
    accuracies = {impl: [runs[impl, seed]["accuracy"] for seed in range(args.seeds)] for impl in IMPLS}
    means = {impl: statistics.mean(values) for impl, values in accuracies.items()}
    widest = max(accuracies["reference"]) - min(accuracies["reference"])
    agree = statistics.mean(between) <= statistics.mean(spread) and abs(means["auto"] - means["reference"]) <= widest
    print(
        f"loss curves differ by {statistics.mean(between):.4f} between implementations, {statistics.mean(spread):.4f} "
        f"between seeds; mean accuracy {means['auto']:.3f} against {means['reference']:.3f}, seeds' range {widest:.3f}"
    )
    print("they agree within the seeds' spread" if agree else "they do NOT agree within the seeds' spread")
    if args.out:
        result = {"torch": torch.__version__, "device": args.device, "steps": args.steps, "batch": args.batch}
        result |= {"between": between, "spread": spread, "runs": list(runs.values())}
        args.out.write_text(json.dumps(result) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
