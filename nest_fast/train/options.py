"""The command line: flags, and the recipe that fills in what was not given."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["AMP", "RECIPE", "RECIPES", "Options", "UsageError", "complete", "parse"]

Options = SimpleNamespace
AMP = ("off", "bf16", "fp16")


class UsageError(Exception):
    """Bad input, told in one line."""


# The authors' configs/imagenet_nest.py; cutmix and the chance to switch between it and mixup as in the paper (DeiT's).
RECIPE: dict[str, Any] = {
    "model": "nest_tiny",
    "model_kwargs": {},
    "impl": "auto",
    "accelerate": False,
    "compile": False,
    "amp": "off",
    "device": None,
    "epochs": 300,
    "batch_size": 256,
    "accumulate": 1,
    "lr": 2.5e-4,
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "warmup_epochs": 20.0,
    "clip_grad": 0.0,
    "ema": 0.0,
    "drop_path": None,
    "auto_augment": "rand-m9-n2-p0.5-mstd0.5",
    "min_crop": 0.08,
    "hflip": 0.5,
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "data_dir": "data",
    "workers": None,
    "seed": 42,
    "checkpoint_minutes": 10.0,
    "log_every": 50,
    "fsdp": False,
}
# The authors' configs/cifar_nest.py.
_CIFAR = {"model": "nest_tiny_s16_32", "batch_size": 192, "warmup_epochs": 5.0, "min_crop": 0.64}
RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    # 1437 small grey images: a small model, no mirror images, of the augmentations the crops alone.
    "digits": {
        "model": "nest_tiny_s16_32",
        "model_kwargs": {"embed_dims": 64, "num_heads": 2, "depths": 1},
        "epochs": 9,
        "batch_size": 32,
        "lr": 1.6e-2,
        "warmup_epochs": 1.0,
        "clip_grad": 1.0,
        "drop_path": 0.0,
        "auto_augment": "",
        "min_crop": 0.7,
        "hflip": 0.0,
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.1,
        "workers": 0,
        "log_every": 10,
    },
}
# What may differ between a checkpoint and the run that resumes it without the run being another one.
_FREE = ("workers", "checkpoint_minutes", "log_every", "data_dir", "compile", "accelerate", "impl")
_NOT_SAVED = ("out", "resume", "device", "fsdp")
_SAME = ("model", "model_kwargs")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    """Every flag is absent from the result unless given, so that recipe, checkpoint and command line can be layered."""
    parser = _Parser(
        prog="python -m nest_fast.train",
        description="Train NesT. The defaults are the authors' recipe for ImageNet, for cifar10 and cifar100 theirs "
        "for CIFAR, for digits a light one. Many GPUs and machines: torchrun --nproc-per-node N -m nest_fast.train ...",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    whole, number = _number(int), _number(float)

    def flag(group: Any, name: str, help: str, **kwargs: Any) -> None:
        default = RECIPE.get(name.replace("-", "_"))
        if not (default in (None, "", {}) or "action" in kwargs):
            help += f" (default {default})"
        group.add_argument(f"--{name}", help=help, **kwargs)

    data = parser.add_argument_group("data")
    flag(data, "data", "digits, cifar10, cifar100, or a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    flag(data, "data-dir", "where CIFAR lies or is downloaded to")
    flag(data, "workers", "processes that load images (default: a core each, at most 8; digits 0)", type=whole)
    flag(data, "seed", "of weights, order and augmentation", type=whole)

    model = parser.add_argument_group("model")
    flag(model, "model", "nest_tiny, nest_small, nest_base, nest_tiny_s16_32, ..., or timm/NAME for one of timm's")
    flag(model, "model-kwargs", "arguments of the model", nargs="+", metavar="NAME=VALUE", action=_KeyValue)
    flag(model, "impl", "implementation of nest_fast's layers: auto or reference")
    flag(model, "accelerate", "nest_fast.accelerate(model), for timm's", action="store_true")
    flag(model, "compile", "torch.compile the model", action="store_true")
    flag(model, "drop-path", "rate of stochastic depth (default: the model's)", type=number)

    recipe = parser.add_argument_group("recipe")
    flag(recipe, "epochs", "passes over the training images", type=whole)
    flag(recipe, "batch-size", "images of a step, over all processes and parts", type=whole)
    flag(recipe, "accumulate", "parts that a step's gradient is added up from, one after the other", type=whole)
    flag(recipe, "lr", "AdamW's learning rate at 256 images a step, to which it is proportional", type=number)
    flag(recipe, "min-lr", "where the cosine ends, also for 256 images", type=number)
    flag(recipe, "warmup-epochs", "epochs in which the learning rate rises linearly", type=number)
    flag(recipe, "weight-decay", "but none of norms, biases and position embeddings", type=number)
    flag(recipe, "clip-grad", "largest norm of the gradient; 0 for any", type=number)
    flag(recipe, "ema", "decay of a moving average of the weights that is validated, too; 0 for none", type=number)
    flag(recipe, "auto-augment", "timm's auto_augment policy; '' for none")
    flag(recipe, "min-crop", "smallest share of an image that a random crop takes", type=number)
    flag(recipe, "hflip", "chance of a mirror image", type=number)
    flag(recipe, "random-erasing", "chance of an erased rectangle", type=number)
    flag(recipe, "mixup", "alpha of mixup; 0 for none", type=number)
    flag(recipe, "cutmix", "alpha of cutmix; 0 for none", type=number)
    flag(recipe, "smoothing", "of the labels", type=number)

    run = parser.add_argument_group("run")
    flag(run, "out", "folder for checkpoints, logs and curves (default runs/DATA-MODEL)", type=Path)
    flag(
        run,
        "resume",
        "go on from a checkpoint, or without a file from OUT/last.pt if there is one; flags that are not given are its",
        nargs="?",
        type=Path,
        const=None,
    )
    flag(run, "checkpoint-minutes", "how much of the work may be lost", type=number)
    flag(run, "log-every", "steps between rows of steps.csv", type=whole)
    flag(run, "device", "cpu, cuda, ... (default: a GPU if there is one)")
    flag(run, "amp", "autocast", choices=AMP)
    flag(run, "fsdp", "under torchrun: shard parameters, gradients and AdamW (FSDP2), not DDP", action="store_true")
    return parser


def _number(kind: type) -> Any:
    def parse(text: str) -> Any:
        return kind(text)

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: invalid ... value
    return parse


class _KeyValue(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        result = {}
        for pair in values:
            name, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"model_kwargs: expected NAME=VALUE, got {pair!r}")
            try:
                result[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                result[name] = value
        setattr(namespace, self.dest, result)


def parse(arguments: list[str] | None) -> dict[str, Any]:
    """What the command line says, and nothing else."""
    given = vars(_parser().parse_args(arguments))
    if "data" not in given and "resume" not in given:
        raise UsageError("data: expected digits, cifar10, cifar100 or a folder, got nothing")
    return given


def complete(given: dict[str, Any], saved: dict[str, Any] | None = None) -> Options:
    """The options of a run: those given, then the checkpoint's, then the recipe's.

    Raises:
        UsageError: a value out of its range, or one that makes of the checkpoint's another model.
    """
    saved = saved or {}
    data = str(given.get("data", saved.get("data")))
    recipe = {**RECIPE, **RECIPES.get(data, {})}
    values = {**recipe, **saved, **given, "data": data}
    if "warmup_epochs" not in {**saved, **given}:
        values["warmup_epochs"] *= min(1.0, values["epochs"] / recipe["epochs"])
    for name in _SAME:
        if name in saved and values[name] != saved[name]:
            raise UsageError(f"resume: expected a checkpoint of {name} {values[name]!r}, got one of {saved[name]!r}")
    _check(values)
    values["out"] = Path(values.get("out") or Path("runs") / f"{Path(data).name}-{values['model'].replace('/', '-')}")
    return Options(**values)


def changed(options: Options, saved: dict[str, Any]) -> list[str]:
    """What makes the rest of the run another one than the checkpoint's would have been."""
    return [
        f"{name} {saved[name]!r} → {value!r}"
        for name, value in vars(options).items()
        if name in saved and name not in _FREE and saved[name] != value
    ]


def to_save(options: Options) -> dict[str, Any]:
    """Plain values; where it is kept and which processes on which devices run it is no part of a run."""
    return {name: value for name, value in vars(options).items() if name not in _NOT_SAVED}


def _check(values: dict[str, Any]) -> None:
    def positive(*names: str) -> None:
        for name in names:
            if values[name] is not None and not values[name] > 0:
                raise UsageError(f"{name}: expected more than 0, got {values[name]}")

    def at_least_0(*names: str) -> None:
        for name in names:
            if values[name] is not None and not values[name] >= 0:
                raise UsageError(f"{name}: expected at least 0, got {values[name]}")

    def share(*names: str) -> None:
        for name in names:
            if values[name] is not None and not 0 <= values[name] <= 1:
                raise UsageError(f"{name}: expected 0 to 1, got {values[name]}")

    positive("epochs", "batch_size", "accumulate", "lr", "checkpoint_minutes", "log_every", "min_crop")
    at_least_0("min_lr", "weight_decay", "warmup_epochs", "clip_grad", "mixup", "cutmix", "workers", "seed")
    share("drop_path", "min_crop", "hflip", "random_erasing", "smoothing", "ema")
    if values["warmup_epochs"] >= values["epochs"]:
        raise UsageError(
            f"warmup_epochs: expected fewer than epochs = {values['epochs']}, got {values['warmup_epochs']}"
        )
    if values["amp"] not in AMP:
        raise UsageError(f"amp: expected one of {', '.join(AMP)}, got {values['amp']!r}")
