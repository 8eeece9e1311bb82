"""``python -m nest_fast.classify photo.jpg``: the most likely classes of photographs. Needs ``nest_fast[train]``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nest_fast
from nest_fast import weights
from nest_fast.testing import import_timm
from nest_fast.train import checkpoint
from nest_fast.train.data import EXTENSIONS
from nest_fast.train.model import NAMES, build
from nest_fast.train.options import UsageError

__all__ = ["Classifier", "Prediction", "load", "main"]

timm = import_timm()
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config  # noqa: E402

JAX_SUFFIXES = (".npz", ".flax", ".msgpack")
# The authors' preprocessing (libml/preprocess.py): ImageNet's for 224 px, CIFAR's colours for 32 px.
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.875}
_CIFAR = {
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2471, 0.2435, 0.2616),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
MAX_BATCH = 256


@dataclass
class Prediction:
    """What an image is taken for: ``top`` holds (class, its index, probability), the most likely first."""

    file: str
    top: list[tuple[str, int, float]]


@dataclass
class Classifier:
    """A model, how images are prepared for it (arguments of timm's ``create_transform``), and the classes' names."""

    model: nn.Module
    preprocessing: dict[str, Any]
    classes: list[str]

    def __post_init__(self) -> None:
        self.model.eval()
        self.transform: Callable[[Image.Image], Tensor] = create_transform(**self.preprocessing)
        self.device = next(self.model.parameters()).device

    @torch.inference_mode()
    def batch_size(self) -> int:
        """As many images as half of the free memory holds, by what a pass over one of them makes."""
        image = torch.zeros(1, *self.preprocessing["input_size"], device=self.device)
        with _Bytes() as bytes_:
            self.model(image)
        fits = _free_memory(self.device) // (2 * max(1, bytes_.largest))
        return max(1, min(MAX_BATCH if self.device.type != "cpu" else 32, fits))

    @torch.inference_mode()
    def predict(self, images: Sequence[tuple[str, Tensor]], k: int) -> list[Prediction]:
        """The ``k`` most likely classes of prepared images, each with its name."""
        try:
            logits = self.model(torch.stack([image for _, image in images]).to(self.device)).float()
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise UsageError("batch_size: expected memory for one image at least, got none on the device") from None
            half = len(images) // 2
            return self.predict(images[:half], k) + self.predict(images[half:], k)
        values, indices = logits.softmax(1).topk(min(k, logits.shape[1]))
        return [
            Prediction(name, [(self.classes[i], i, p) for p, i in zip(ps, places, strict=True)])
            for (name, _), ps, places in zip(images, values.tolist(), indices.tolist(), strict=True)
        ]


class _Bytes(TorchDispatchMode):
    """The most that an operation's inputs and outputs took."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tree_leaves((args, kwargs, out))
            if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)
        }
        self.largest = max(self.largest, sum(tensors.values()))
        return out


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = pages * size
    try:  # a container's limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        pass
    return max(0, free)


# ------------------------------------------------------------------------------------------------------------- models


def load(
    file: Path | None = None, model: str | None = None, classes: list[str] | None = None, device=None
) -> Classifier:
    """A classifier from a checkpoint of ``nest_fast.train``, of timm or of the authors' JAX code, or from the hub.

    Args:
        file: the checkpoint; None for the hub's of ``model``.
        model: timm's name (default "nest_tiny_jx"); a timm checkpoint does not say it, the others do.
        classes: their names, where the checkpoint has none.
        device: of the model.

    Raises:
        UsageError: no such file or model, or they do not fit; no network.
    """
    if file is None:
        found = _from_hub(model or "nest_tiny_jx")
    elif not file.is_file():
        raise UsageError(f"checkpoint: expected a file, got {file}, where there is none")
    elif file.suffix in JAX_SUFFIXES:
        found = _from_jax(file)
    else:
        found = _own(file) or _from_timm(file, model)
    if classes is not None:
        if len(classes) != len(found.classes):
            raise UsageError(
                f"classes: expected {len(found.classes)} names as the model has classes, got {len(classes)}"
            )
        found.classes = classes
    found.model.to(device)
    found.device = next(found.model.parameters()).device
    return found


def _own(file: Path) -> Classifier | None:
    if file.suffix == ".safetensors":
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # from_timm tells what it is
        return None
    if not isinstance(saved, dict) or saved.get("format") != checkpoint.FORMAT:
        return None
    options = saved["options"]
    model = build(options["model"], len(saved["classes"]), options["model_kwargs"], accelerate=options["accelerate"])
    model.load_state_dict(saved["ema"] if saved["use_ema"] else saved["model"])
    return Classifier(model, saved["preprocessing"], saved["classes"])


def _from_timm(file: Path, name: str | None) -> Classifier:
    try:
        state = weights.from_timm(file)
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
    if name is None or not name.startswith("nest_") or not timm.is_model(name):
        raise UsageError(f"model: expected timm's name of the model (nest_tiny, nest_tiny_jx, ...), which {file} does "
                         f"not say, got {name!r}")  # fmt: skip
    ours = name.split(".")[0]
    padding = "same" if ours.endswith("_jx") else ""
    model = _filled(ours.removesuffix("_jx"), state, file, pad_type=padding)
    config = timm.get_pretrained_cfg(name).to_dict()
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return Classifier(model, {key: config[key] for key in keys}, _names(len(state["head.bias"])))


def _from_jax(file: Path) -> Classifier:
    try:
        state = weights.from_jax(file)
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
    small = len({k.split(".")[1] for k in state if k.startswith("levels.")}) == 4  # the authors' 32 px models

    def fits(name: str) -> bool:
        with torch.device("meta"):
            wanted = getattr(nest_fast, name)(num_classes=len(state["head.bias"])).state_dict()
        skip = (".pos_embed",)
        return {k: v.shape for k, v in wanted.items() if not k.endswith(skip)} == {
            k: v.shape for k, v in state.items() if not k.endswith(skip)
        }

    name = next((name for name in NAMES if name.endswith("_s16_32") == small and fits(name)), None)
    if name is None:
        raise UsageError(
            f"checkpoint: expected one of the authors' models, got {file}, which is none of {', '.join(NAMES)}"
        )
    model = _filled(name, state, file, padding="same", gelu="tanh")
    size = 32 if small else 224
    return Classifier(model, {**(_CIFAR if small else _IMAGENET), "input_size": (3, size, size)},
                      _names(len(state["head.bias"])))  # fmt: skip


def _filled(name: str, state: dict[str, Tensor], file: Path, **kwargs: Any) -> nn.Module:
    model = getattr(nest_fast, name)(num_classes=len(state["head.bias"]), **kwargs)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f"checkpoint: expected one of {name}, got {file}: {' '.join(str(error).split())[:200]}"
        ) from error
    return model


def _from_hub(name: str) -> Classifier:
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        raise UsageError(f"model: expected one of timm's, got {name!r}")
    offline = _no_network()
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or offline  # or it would try for a minute
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = "no network" if offline or before else str(error).splitlines()[0]
        raise UsageError(f"model: cannot get {name}'s weights from the hub ({reason}); --checkpoint FILE reads "
                         "one that is here") from error  # fmt: skip
    finally:
        hub.HF_HUB_OFFLINE = before
    nest_fast.accelerate(model)
    subset = infer_imagenet_subset(model)
    return Classifier(model, resolve_model_data_config(model), _names(model.num_classes, subset))


def _no_network() -> bool:
    """Whether the hub's name cannot even be looked up; a proxy would do that by itself."""
    import huggingface_hub.constants as hub

    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlparse(hub.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _names(n: int, subset: str | None = None) -> list[str]:
    """ImageNet's names where there are as many classes as it has."""
    subset = subset or infer_imagenet_subset({"num_classes": n})
    if subset is None:
        return [f"class {i}" for i in range(n)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(n)]


# ------------------------------------------------------------------------------------------------------------- images


Named = tuple[str, Path | bytes]


def find(inputs: Iterable[str], stdin: Any) -> Iterator[Named]:
    """The images that the arguments name: files, those in folders, "-" for stdin (an image, or a path a line).

    Raises:
        UsageError: a folder without an image, nothing on stdin.
    """
    for given in inputs:
        if given == "-":
            yield from _stdin(stdin.read())
        elif Path(given).is_dir():
            files = sorted(p for p in Path(given).rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not files:
                raise UsageError(f"images: expected a folder with images, got {given} with none")
            yield from ((str(path), path) for path in files)
        else:
            yield given, Path(given)


def _stdin(data: bytes) -> Iterator[Named]:
    if not data.strip():
        raise UsageError("images: expected an image or paths on stdin, got nothing")
    try:
        with Image.open(io.BytesIO(data)):
            pass
        yield "-", data
        return
    except Exception:  # no image: then paths
        pass
    try:
        lines = data.decode().replace("\0", "\n").splitlines()
    except UnicodeDecodeError:
        raise UsageError("images: expected an image or paths on stdin, got neither") from None
    yield from find((line for line in lines if line and line != "-"), None)


def classify(
    classifier: Classifier, images: Iterable[Named], k: int, batch_size: int, broken: Callable[[str, str], None]
) -> Iterator[Prediction]:
    """Predictions in the images' order; ``broken(name, reason)`` is called for one that cannot be read."""

    def prepare(item: Named) -> tuple[str, Tensor | Exception]:
        name, source = item
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return name, classifier.transform(image.convert("RGB"))
        except Exception as error:  # decoders raise whatever they like
            return name, error

    def chunks() -> Iterator[list[Named]]:
        chunk = []
        for item in images:
            chunk.append(item)
            if len(chunk) == batch_size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for chunk in chunks():
            ready = []
            for name, image in pool.map(prepare, chunk):
                if isinstance(image, Exception):
                    broken(name, (str(image).splitlines() or [type(image).__name__])[0])
                else:
                    ready.append((name, image))
            if ready:
                yield from classifier.predict(ready, k)


def write(predictions: Iterable[Prediction], form: str, to: TextIO) -> None:
    """As "text", "csv" (a row a class) or "json" (a list); the first two as they come."""
    if form == "json":
        rows = [
            {"file": p.file, "top": [{"class": c, "index": i, "probability": round(q, 6)} for c, i, q in p.top]}
            for p in predictions
        ]
        json.dump(rows, to, indent=1, ensure_ascii=False)
        to.write("\n")
        return
    if form == "csv":
        table = csv.writer(to)
        table.writerow(("file", "rank", "class", "index", "probability"))
        for p in predictions:
            table.writerows((p.file, rank, c, i, f"{q:.6f}") for rank, (c, i, q) in enumerate(p.top, 1))
        return
    for p in predictions:
        to.write(f"{p.file}\n" + "".join(f"  {100 * q:5.1f} %  {c}\n" for c, _, q in p.top))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def main(arguments: list[str] | None = None) -> int:
    """Classify what ``arguments`` (by default the command line) name.

    Returns:
        0; 1 where an image was broken and skipped; 2 for other bad input, told in one line.
    """
    parser = _Parser(prog="python -m nest_fast.classify", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("images", nargs="+", help="photographs, folders of them, or - for stdin (an image, or paths)")
    parser.add_argument("--checkpoint", type=Path, help="of nest_fast.train, of timm, of the authors (.npz, .flax)")
    parser.add_argument("--model", help="timm's name, for its checkpoints and the hub (default nest_tiny_jx)")
    parser.add_argument("--classes", type=Path, help="a file with the classes' names, one a line")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    parser.add_argument("--out", type=Path, help="a file to write to (default: stdout)")
    parser.add_argument("--batch-size", type=int, help="images at a time (default: what half of the free memory holds)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    skipped = 0

    def broken(name: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        print(f"nest_fast.classify: skipped {name}: {reason}", file=sys.stderr)

    try:
        args = parser.parse_args(arguments)
        for name, value in (("top", args.top), ("batch_size", args.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected at least 1, got {value}")
        images = list(find(args.images, sys.stdin.buffer))
        classes = args.classes and args.classes.read_text().splitlines()
        classifier = load(args.checkpoint, args.model, classes, args.device)
        batch_size = args.batch_size or (classifier.batch_size() if len(images) > 1 else 1)
        predictions = classify(classifier, images, args.top, batch_size, broken)
        if args.out:
            with open(args.out, "w", newline="") as file:
                write(predictions, args.format, file)
        else:
            write(predictions, args.format, sys.stdout)
    except (UsageError, OSError) as error:
        print(f"nest_fast.classify: {error}", file=sys.stderr)
        return 2
    if skipped:
        print(f"nest_fast.classify: {skipped} of {len(images)} images skipped", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
