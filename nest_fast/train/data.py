"""Images and labels: where they come from, which a step takes, how they are changed; nothing depends on who loads them.

Step ``s`` of a run takes the same images, changed by the same random numbers, whatever ran before it, in which process
and worker: the order of an epoch follows from (seed, epoch), an image's augmentation from (seed, epoch, index).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nest_fast.testing import import_timm
from nest_fast.train.options import Options, UsageError

__all__ = ["Batch", "Source", "Steps", "load_sources", "preprocessing", "train_loader", "val_loader"]

import_timm()
from timm.data import create_transform  # noqa: E402
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402

_TRIES = 1000
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Mean and standard deviation of colours; the authors' for CIFAR (their libml/preprocess.py).
COLOURS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "digits": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass
class Source:
    """Labelled images: ``load(i)`` gives the i-th as RGB, ``name(i)`` what to call it."""

    classes: list[str]
    labels: Sequence[int]
    load: Callable[[int], Image.Image]
    name: Callable[[int], str]


class _Files:
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __call__(self, i: int) -> Image.Image:
        with Image.open(self.paths[i]) as image:
            return image.convert("RGB")

    def name(self, i: int) -> str:
        return str(self.paths[i])


class _Arrays:
    """uint8 images ``(n, height, width)`` or ``(n, height, width, 3)``."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __call__(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i]).convert("RGB")

    def name(self, i: int) -> str:
        return f"image {i}"


def _folder(root: Path) -> tuple[Source, Source]:
    train = root / "train"
    val = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), root / "val")
    classes = _classes(train)
    sources = []
    for part in (train, val):
        found = _classes(part)
        for missing, where in ((set(classes) - set(found), part), (set(found) - set(classes), train)):
            if missing:
                raise UsageError(f"data: expected the same classes in {train} and {val}, got none in {where} for "
                                 f"{_few(sorted(missing))}")  # fmt: skip
        files = [(path, i) for i, name in enumerate(classes) for path in _images(part / name)]
        empty = sorted(set(classes) - {classes[i] for _, i in files})
        if empty:
            raise UsageError(f"data: expected images in every class, got none in {part} for {_few(empty)}")
        loader = _Files([path for path, _ in files])
        sources.append(Source(classes, [label for _, label in files], loader, loader.name))
    return sources[0], sources[1]


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"data: expected digits, cifar10, cifar100 or a folder with train/CLASS/IMAGE and "
                         f"val/CLASS/IMAGE, got no folder {folder}")  # fmt: skip
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise UsageError(f"data: expected a folder a class in {folder}, got none")
    return classes


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and p.is_file()
    )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _digits() -> tuple[Source, Source]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("data: expected scikit-learn for digits, got none: pip install scikit-learn") from error
    found = load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    classes = [str(name) for name in found.target_names]
    sources = []
    for part in (order[360:], order[:360]):
        arrays = _Arrays(images[part])
        sources.append(Source(classes, found.target[part].tolist(), arrays, arrays.name))
    return sources[0], sources[1]


def _cifar(name: str, root: str, download: bool) -> tuple[Source, Source]:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise UsageError(f"data: expected torchvision for {name}, got none: pip install torchvision") from error
    kind = getattr(torchvision.datasets, name.upper())
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"data: expected {name} in {root} or a network to download it, got {reason}") from error
    sources = []
    for part in parts:
        arrays = _Arrays(part.data)
        sources.append(Source(list(part.classes), list(part.targets), arrays, arrays.name))
    return sources[0], sources[1]


def load_sources(options: Options, download: bool = True) -> tuple[Source, Source]:
    """Images to train on and to validate with.

    Raises:
        UsageError: they are not there, a class is empty or missing in one of the two, CIFAR cannot be downloaded.
    """
    if options.data == "digits":
        return _digits()
    if options.data in ("cifar10", "cifar100"):
        return _cifar(options.data, options.data_dir, download)
    return _folder(Path(options.data))


def preprocessing(options: Options, size: tuple[int, int], pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared to be classified: arguments of timm's ``create_transform``, kept in checkpoints."""
    named = options.data in COLOURS
    mean, std = COLOURS.get(options.data, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    if not named and pretrained_cfg.get("mean"):
        mean, std = pretrained_cfg["mean"], pretrained_cfg["std"]
    return {
        "input_size": [3, *size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear" if options.data == "digits" else pretrained_cfg.get("interpolation", "bicubic"),
        "crop_pct": 1.0 if named else pretrained_cfg.get("crop_pct", 0.875),
    }


def _augmentation(options: Options, prepare: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    config = {key: value for key, value in prepare.items() if key != "crop_pct"}
    try:
        return create_transform(
            **config,
            is_training=True,
            scale=(options.min_crop, 1.0),
            hflip=options.hflip,
            color_jitter=None,
            auto_augment=options.auto_augment or None,
            re_prob=options.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:  # that is how timm tells it
        policy = options.auto_augment
        raise UsageError(f"auto_augment: expected one of timm's policies, got {policy!r} ({error})") from error


class _Seeded:
    """Every generator that augmentation draws from, seeded by numbers and put back afterwards."""

    def __init__(self, *numbers: int) -> None:
        self.words = np.random.SeedSequence(numbers).generate_state(3)

    def __enter__(self) -> None:
        self.before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        one, two, three = (int(word) for word in self.words)
        random.seed(one)
        np.random.seed(two)
        torch.default_generator.manual_seed(three)

    def __exit__(self, *_: object) -> None:
        random.setstate(self.before[0])
        np.random.set_state(self.before[1])
        torch.set_rng_state(self.before[2])


Item = tuple[Tensor, int, bool, list[str]]


class _Images(Dataset):
    """``dataset[epoch, index]``: image, label, whether it counts, and the broken images that were met on the way."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], seed: int, train: bool) -> None:
        self.source, self.transform, self.seed, self.train = source, transform, seed, train

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        broken: list[str] = []
        if index < 0:  # fills up a process's share
            return self.transform(Image.new("RGB", (64, 64))), 0, False, broken
        n = len(self.source.labels)
        # In the place of a broken image comes the next one, so that every step has as many as the others.
        for i in range(index, index + (min(n, _TRIES) if self.train else 1)):
            try:
                image = self.source.load(i % n)
            except Exception as error:  # decoders raise whatever they like
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                broken.append(f"{self.source.name(i % n)}: {reason}")
                continue
            with _Seeded(self.seed, epoch, i % n):
                return self.transform(image), self.source.labels[i % n], True, broken
        return self.transform(Image.new("RGB", (64, 64))), 0, False, broken


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    valid: Tensor
    broken: list[str]

    @staticmethod
    def collate(items: list[Item]) -> Batch:
        images, labels, valid = default_collate([item[:3] for item in items])
        return Batch(images, labels, valid, [name for item in items for name in item[3]])

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.valid, self.broken)


class Steps(Sampler):
    """The images of each part of each step, from ``start`` to ``stop``, for process ``rank`` of ``size``.

    A step's images are dealt to its parts (processes x accumulation) such that image i stays with image -1 - i, which
    mixup and cutmix mix it with: a step is the same step however many parts it has.
    """

    def __init__(self, n: int, options: Options, rank: int, size: int, start: int, stop: int) -> None:
        self.n, self.seed, self.rank, self.size = n, options.seed, rank, size
        self.start, self.stop = start, stop
        self.batch, self.accumulate = options.batch_size, options.accumulate
        parts = size * options.accumulate
        if self.batch > n:
            raise UsageError(f"batch_size: expected at most the {n} training images, got {self.batch}")
        if self.batch % parts:
            raise UsageError(f"batch_size: expected a multiple of processes x accumulate = {parts}, got {self.batch}")
        self.share = self.batch // parts
        if self.share % 2 and (options.mixup or options.cutmix):
            raise UsageError(f"batch_size: expected an even number a part for mixup, got {self.share} "
                             f"({self.batch} / {parts})")  # fmt: skip
        self.per_epoch = n // self.batch

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.stop):
            epoch, at = divmod(step, self.per_epoch)
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
            images = order[at * self.batch : (at + 1) * self.batch]
            for part in range(self.accumulate):
                half, part = self.share // 2, part * self.size + self.rank
                if self.share % 2:
                    mine = images[part * self.share : (part + 1) * self.share]
                else:
                    end = self.batch - part * half
                    mine = np.concatenate([images[part * half : (part + 1) * half], images[end - half : end]])
                yield [(epoch, int(i)) for i in mine]


def train_loader(source: Source, options: Options, prepare: dict[str, Any], steps: Steps) -> DataLoader:
    dataset = _Images(source, _augmentation(options, prepare), options.seed, train=True)
    return _loader(dataset, options, batch_sampler=steps)


def val_loader(source: Source, options: Options, prepare: dict[str, Any], rank: int, size: int) -> DataLoader:
    """Every process gets as many batches, of an equal number of images: -1 where there is none left."""
    n = len(source.labels)
    mine = [i if i < n else -1 for i in range(rank, -(-n // size) * size, size)]
    dataset = _Images(source, create_transform(**prepare), options.seed, train=False)
    share = max(1, options.batch_size // (size * options.accumulate))
    batches = [[(0, i) for i in mine[at : at + share]] for at in range(0, len(mine), share)]
    return _loader(dataset, options, batch_sampler=batches)


def _loader(dataset: _Images, options: Options, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=options.workers,
        collate_fn=Batch.collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=options.workers > 0,
        worker_init_fn=_live_and_die_with_the_parent,
        generator=torch.Generator(),  # or every iterator would draw from the global one
        **kwargs,
    )


def _live_and_die_with_the_parent(_: int) -> None:
    """A signal goes to every process of a group; the workers are wanted until the checkpoint is written, and not when
    the parent was killed, which PyTorch's own watch does not see where a server forks the workers (Python 3.14)."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
