"""``python -m nest_fast.tune``: :func:`nest_fast.tune` for a model by name; see ``--help``."""

from __future__ import annotations

import argparse
import sys

import torch

import nest_fast
from nest_fast.testing import import_timm
from nest_fast.train.model import NAMES, build, image_size
from nest_fast.train.options import UsageError
from nest_fast.tuning import Tuning

__all__ = ["main"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Tune as ``arguments`` (by default the command line) say.

    Returns:
        0; 2 for bad input, told in one line.
    """
    args = _parser().parse_args(arguments)
    try:
        tuning = _tune(args)
    except (UsageError, ValueError, OSError) as error:
        print(f"nest_fast.tune: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"nest_fast.tune: batch_size: {args.batch_size} images do not fit this GPU's memory", file=sys.stderr)
        return 2
    changed = sum(row.taken != row.rule for row in tuning.rows)
    print(f"{len(tuning.rows)} operations measured, {changed} of them faster than auto's choice; {tuning.written}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nest_fast.tune", description=__doc__)
    parser.description = "Measure what is fastest on this machine for a model's operations; auto takes it from then on."
    parser.add_argument("--model", default="nest_tiny", help=f"{', '.join(NAMES)}, or timm/NAME (default nest_tiny)")
    parser.add_argument("--batch-size", type=int, help="images in a step (default 64 on a GPU, 8 on a CPU)")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="default: the model's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (default fp32)")
    parser.add_argument("--amp", choices=("fp16", "bf16"), help="autocast to it instead")
    parser.add_argument("--train", action="store_true", help="measure training: modes, and backward too")
    parser.add_argument("--wide", action="store_true", help="also configurations that the tables leave out (minutes)")
    parser.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS", help="(default 300)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _tune(args: argparse.Namespace) -> Tuning:
    if args.model.startswith("timm/"):
        import_timm()
    model = build(args.model, 1000, accelerate=args.model.startswith("timm/"))
    model = model.to(args.device, DTYPES[args.dtype]).train(args.train)
    batch = (64 if args.device.startswith("cuda") else 8) if args.batch_size is None else args.batch_size
    if batch < 1:
        raise UsageError(f"batch_size: expected a positive number, got {batch}")
    height, width = args.image_size or image_size(model)
    images = torch.randn(batch, 3, height, width, device=args.device, dtype=DTYPES[args.dtype])
    with (
        torch.set_grad_enabled(args.train),
        torch.autocast(images.device.type, DTYPES[args.amp or "bf16"], enabled=args.amp is not None),
    ):
        return nest_fast.tune(model, images, time_limit=args.time_limit, wide=args.wide)


if __name__ == "__main__":
    sys.exit(main())
