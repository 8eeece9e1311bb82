"""GradCAT finds small objects: train a tiny NesT to name them, then walk to them in images it has not seen.

An image of 64 x 64 px is a noisy texture with one object of 9 px, a disc, ring, square, cross, saltire or stripes, pasted
anywhere; the class is its hue. The model is told the class and never the place. Then :func:`nest_fast.gradcat` walks down the tree to
one of 4 x 4 blocks, which has to be the one that holds (most of) the object.

``python examples/gradcat_objects.py --out DIR`` writes gradcat_objects.png and gradcat_objects.json there; the exit
status says whether nine walks in ten found the object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import nest_fast

SIZE, OBJECT, GRID = 64, 9, 4
# Red, green, blue, cyan, magenta, yellow.
HUES = ((0.9, 0.1, 0.1), (0.1, 0.7, 0.1), (0.1, 0.2, 0.9), (0.1, 0.8, 0.8), (0.8, 0.1, 0.8), (0.9, 0.8, 0.1))


def shapes() -> Tensor:
    """The objects' masks ``(6, OBJECT, OBJECT)``: disc, ring, square, cross, saltire, stripes."""
    at = torch.arange(OBJECT) - OBJECT // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    radius = (x**2 + y**2).float().sqrt()
    disc = radius <= 4.2
    masks = [
        disc,
        disc & (radius >= 2.5),
        torch.ones_like(disc),
        (x.abs() <= 1) | (y.abs() <= 1),
        ((x - y).abs() <= 1) | ((x + y).abs() <= 1),
        (y % 3 != 0),
    ]
    return torch.stack(masks).float()


def draw_images(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(number, 3, SIZE, SIZE)`` in [0, 1], classes, and the objects' upper left corners ``(number, 2)``."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    coarse = F.interpolate(uniform(number, 3, 8, 8), SIZE, mode="bilinear")
    images = 0.25 + 0.35 * coarse + 0.15 * uniform(number, 3, SIZE, SIZE)
    classes = torch.randint(len(HUES), (number,), generator=generator)
    corners = torch.randint(SIZE - OBJECT + 1, (number, 2), generator=generator)
    colours = (torch.tensor(HUES)[classes] + 0.2 * uniform(number, 3) - 0.1).clamp(0, 1)
    masks = shapes()[torch.randint(len(shapes()), (number,), generator=generator)]
    for image, mask, (top, left), colour in zip(images, masks, corners.tolist(), colours, strict=True):
        patch = image[:, top : top + OBJECT, left : left + OBJECT]
        patch.lerp_(colour[:, None, None].expand_as(patch), mask)
    return images, classes, corners


def normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def holder(corner: Tensor) -> tuple[int, int]:
    """Row and column of the block that has most of the object's pixels: that of its centre."""
    row, column = ((corner + OBJECT // 2) * GRID // SIZE).tolist()
    return row, column


def train(steps: int, batch: int, seed: int) -> nest_fast.NesT:
    torch.manual_seed(seed)
    model = nest_fast.NesT(
        img_size=SIZE, embed_dims=(48, 96, 192), num_heads=(2, 4, 8), depths=(1, 1, 2), num_classes=6, drop_path_rate=0.0
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for step in range(steps):
        images, classes, _ = draw_images(batch, generator)
        loss = F.cross_entropy(model(normalise(images)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1} loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def evaluate(model: nest_fast.NesT, number: int) -> tuple[dict, list[Image.Image]]:
    """Accuracy and hits on images drawn from another seed, and pictures of the first walks."""
    images, classes, corners = draw_images(number, torch.Generator().manual_seed(10**6))
    correct, hits, pictures = 0, 0, []
    for image, label, corner in zip(images, classes, corners, strict=True):
        walk = nest_fast.gradcat(model, normalise(image))
        correct += walk.target == label.item()
        hits += walk.blocks[-1] == holder(corner)
        if len(pictures) < 8:
            photo = Image.fromarray((255 * image.clamp(0, 1)).byte().permute(1, 2, 0).numpy()).resize((192, 192), 0)
            pictures += [walk.draw(photo), walk.draw(photo, level=-2)]
    return {"images": number, "accuracy": correct / number, "hits": hits / number}, pictures


def sheet(pictures: list[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures in pairs, one above the other."""
    size, gap = pictures[0].width, 8
    rows = -(-len(pictures) // (2 * columns)) * 2
    canvas = Image.new("RGB", (columns * (size + gap) - gap, rows * (size + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        pair, lower = divmod(i, 2)
        canvas.paste(picture, (pair % columns * (size + gap), (2 * (pair // columns) + lower) * (size + gap)))
    return canvas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=500, help="held-out images to walk in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    start = time.perf_counter()
    model = train(args.steps, args.batch, args.seed)
    seconds = time.perf_counter() - start
    result, pictures = evaluate(model, args.images)
    print(f"accuracy {result['accuracy']:.1%}, walks that end in the object's block {result['hits']:.1%}")
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(args.out / "gradcat_objects.png")
    about = {"date": date.today().isoformat(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "nest_fast": nest_fast.__version__, "python": platform.python_version()}
    given = {"steps": args.steps, "batch": args.batch, "seed": args.seed, "training_seconds": round(seconds)}
    text = json.dumps({**result, **given, **about, **versions}, indent=1)
    (args.out / "gradcat_objects.json").write_text(text + "\n")
    return 0 if result["hits"] >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
