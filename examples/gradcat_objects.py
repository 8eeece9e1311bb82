"""GradCAT finds small objects: train a tiny NesT to say which are there, then walk to them in images it has not seen.

An image of 64 x 64 px is a noisy texture with two objects of 9 px, each somewhere inside one of its 4 x 4 blocks: a
disc, ring, square, cross, saltire or stripes, in one of six hues, which are the classes. The model is told the hues and
never the places. Then :func:`nest_fast.gradcat` is asked for each of the two and has to end in the block that holds it.

``python examples/gradcat_objects.py --out DIR`` writes gradcat_objects.png and gradcat_objects.json there; the exit
status says whether nine walks in ten found their object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import nest_fast

SIZE, OBJECT, GRID = 64, 9, 4
BLOCK = SIZE // GRID
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
    """Images ``(number, 3, SIZE, SIZE)`` in [0, 1]; of their two objects the classes ``(number, 2)`` and blocks.

    A block is a number, 4 * row + column; each object lies somewhere inside one, the two in different ones.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def two_of(choices: int) -> Tensor:
        return uniform(number, choices).argsort(1)[:, :2]

    clouds = F.interpolate(uniform(number, 1, 8, 8), SIZE, mode="bilinear")
    images = 0.2 + 0.4 * clouds + 0.2 * uniform(number, 3, SIZE, SIZE)
    classes, blocks = two_of(len(HUES)), two_of(GRID * GRID)
    colours = (torch.tensor(HUES)[classes] + 0.2 * uniform(number, 2, 3) - 0.1).clamp(0, 1)
    masks = shapes()[torch.randint(6, (number, 2), generator=generator)]
    inside = torch.randint(BLOCK - OBJECT + 1, (number, 2, 2), generator=generator)
    corners = BLOCK * torch.stack((blocks // GRID, blocks % GRID), -1) + inside
    for i in range(number):
        for j in range(2):
            top, left = corners[i, j].tolist()
            patch = images[i, :, top : top + OBJECT, left : left + OBJECT]
            patch.lerp_(colours[i, j, :, None, None].expand_as(patch), masks[i, j])
    return images, classes, blocks


def present(classes: Tensor) -> Tensor:
    """Whether there is an object of each class: ``(number, 6)``, 0 or 1."""
    return F.one_hot(classes, len(HUES)).sum(1).float()


def normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def train(steps: int, batch: int, seed: int, smoothing: float) -> nest_fast.NesT:
    torch.manual_seed(seed)
    # Stochastic depth, as the authors train: without it what speaks for a class is spread over all tokens by attention.
    model = nest_fast.NesT(
        img_size=SIZE,
        embed_dims=(32, 64, 128),
        num_heads=(2, 4, 8),
        depths=1,
        num_classes=len(HUES),
        drop_path_rate=0.5,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for step in range(steps):
        images, classes, _ = draw_images(batch, generator)
        wanted = present(classes) * (1 - smoothing) + smoothing / 2
        loss = F.binary_cross_entropy_with_logits(model(normalise(images)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def evaluate(model: nest_fast.NesT, number: int) -> tuple[dict, list[Image.Image]]:
    """Accuracy and hits on images drawn from another seed, and pictures of the first walks."""
    images, classes, blocks = draw_images(number, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        accuracy = ((model(normalise(images)) > 0) == present(classes).bool()).float().mean().item()
    hits, negated, pictures = 0, 0, []
    for image, targets, places in zip(images, classes.tolist(), blocks.tolist(), strict=True):
        for target, place in zip(targets, places, strict=True):
            walk = nest_fast.gradcat(model, normalise(image), target)
            hits += walk.blocks[-1] == divmod(place, GRID)
            negated += lowest(walk.maps) == divmod(place, GRID)
            if len(pictures) < 16:
                photo = Image.fromarray((255 * image.clamp(0, 1)).byte().permute(1, 2, 0).numpy())
                photo = photo.resize((192, 192), Image.Resampling.NEAREST)
                hue = tuple(round(255 * value) for value in HUES[target])
                pictures += [framed(walk.draw(photo), hue), framed(walk.draw(photo, level=1), hue)]
    walks = 2 * number
    rates = {"accuracy": accuracy, "hits": hits / walks, "hits_with_the_papers_sign": negated / walks}
    return {"images": number, "walks": walks, **rates}, pictures


def lowest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Where the walk would end with a minus sign before the gradient."""
    row, column = 0, 0
    for i, values in enumerate(maps[:-1]):
        tiles = -F.adaptive_avg_pool2d(values[None], 2 ** (i + 1))[0]
        quarter = int(tiles[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].argmax())
        row, column = 2 * row + quarter // 2, 2 * column + quarter % 2
    return row, column


def framed(picture: Image.Image, hue: tuple[int, ...]) -> Image.Image:
    """The picture in a frame of the hue that was asked for."""
    return ImageOps.expand(picture, 6, fill=hue)


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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    # As the authors train, too. Logits that only ever grow, as without it, leave gradients that point anywhere.
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--images", type=int, default=300, help="held-out images, two walks each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    model = train(args.steps, args.batch, args.seed, args.smoothing)
    result, pictures = evaluate(model, args.images)
    print(f"accuracy {result['accuracy']:.1%}, walks that end in the object's block {result['hits']:.1%}", end=", ")
    print(f"with the paper's sign {result['hits_with_the_papers_sign']:.1%}")
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(args.out / "gradcat_objects.png")
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    about = {"date": date.today().isoformat(), "machine": machine, "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "nest_fast": nest_fast.__version__, "python": platform.python_version()}
    given = {"steps": args.steps, "batch": args.batch, "smoothing": args.smoothing, "seed": args.seed}
    text = json.dumps({**result, **given, **about, **versions}, indent=1)
    (args.out / "gradcat_objects.json").write_text(text + "\n")
    return 0 if result["hits"] >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
