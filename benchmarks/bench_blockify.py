"""blockify, unblockify, patchify, and both permutations with an added position embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import DEVICE, DTYPES, Case, Peers, Problem, compiled_peers, impl_peers, parametrize
from torch import Tensor

from nest_fast import blockify, patchify, reference, unblockify
from nest_fast.ops.blockify import IMPLS

BLOCK = 14  # NesT at 224 px: blocks of 14 x 14 tokens, a token of 4 x 4 pixels
PATCH = 4


@dataclass(frozen=True, kw_only=True)
class BlockifyCase(Case):
    """A grid of ``grid`` x ``grid`` blocks with ``channels``; ``compile`` where that peer is worth its time."""

    grid: int
    channels: int
    compile: bool

    @property
    def fused(self) -> bool:
        return self.op.endswith("+pos_embed")


OPS = ("blockify", "unblockify", "blockify+pos_embed", "unblockify+pos_embed")
SIZE, WIDTH, BATCH = ("T", 96, 8) if DEVICE == "cpu" else ("B", 128, 256)
LEVELS = [(f"NesT-{SIZE} L1", 4, WIDTH), (f"NesT-{SIZE} L2", 2, 2 * WIDTH)][: 1 if DEVICE == "cpu" else 2]


def cases():
    for dtype in DTYPES:
        # The C++ compiler behind torch.compile takes seconds a shape, so on a CPU only one is compiled.
        compile = DEVICE == "cuda" or dtype == DTYPES[0]
        for name, grid, channels in LEVELS:
            shape: dict[str, Any] = {"name": name, "batch": BATCH, "dtype": dtype, "grid": grid, "channels": channels}
            for op in OPS:
                yield BlockifyCase(op=op, compile=compile and grid == 4, **shape)
            if grid == 4:
                yield BlockifyCase(op="blockify+pos_embed", compile=False, backward=True, **shape)
                yield BlockifyCase(op="patchify", compile=compile, **{**shape, "name": "224 px", "channels": 3})


def peers(case: BlockifyCase) -> Peers:
    plain, fast = _functions(case)
    return {
        "reference": lambda: case.run(plain),
        **impl_peers(case, IMPLS, fast),
        **(compiled_peers(case, plain) if case.compile else {}),
        **({} if case.op == "patchify" else {"index_select": lambda: case.run(_indexed(case))}),
        **({} if case.backward else {"clone": lambda: case.run(lambda x, *pos: x.clone())}),
    }


def _functions(case: BlockifyCase) -> tuple[Callable[..., Tensor], Callable[[str], Callable[..., Tensor]]]:
    """The reference, and nest_fast's function for an ``impl``."""
    if case.op == "patchify":
        return (
            lambda x: reference.patchify(x, PATCH, BLOCK),
            lambda impl: lambda x: patchify(x, PATCH, BLOCK, impl=impl),
        )
    if case.op.startswith("blockify"):
        return (
            lambda x, *pos: _add(reference.blockify(x, BLOCK), *pos),
            lambda impl: lambda x, *pos: blockify(x, BLOCK, pos_embed=pos[0] if pos else None, impl=impl),
        )
    return (
        lambda x, *pos: reference.unblockify(_add(x, *pos), case.grid),
        lambda impl: lambda x, *pos: unblockify(x, case.grid, pos_embed=pos[0] if pos else None, impl=impl),
    )


def _indexed(case: BlockifyCase) -> Callable[..., Tensor]:
    """The obvious kernel: every pixel's place is looked up."""
    grid, edge = case.grid, case.grid * BLOCK
    pixels = torch.arange(edge**2, device=DEVICE)
    if case.op.startswith("blockify"):
        index = reference.blockify(pixels.view(1, edge, edge, 1), BLOCK).flatten()
        return lambda x, *pos: _add(x.flatten(1, 2).index_select(1, index).unflatten(1, (grid**2, BLOCK**2)), *pos)
    index = reference.unblockify(pixels.view(1, grid**2, BLOCK**2, 1), grid).flatten()
    return lambda x, *pos: _add(x, *pos).flatten(1, 2).index_select(1, index).unflatten(1, (edge, edge))


def _add(x: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    return x if pos_embed is None else x + pos_embed


def build(case: BlockifyCase) -> Problem:
    edge = case.grid * BLOCK
    image = (case.batch, edge, edge, case.channels)
    blocks = (case.batch, case.grid**2, BLOCK**2, case.channels)
    shape = {"b": image, "u": blocks, "p": (case.batch, case.channels, edge * PATCH, edge * PATCH)}[case.op[0]]
    shapes = [shape] + [(1, *blocks[1:])] * case.fused + [blocks] * case.backward
    return Problem(
        inputs=tuple(torch.randn(s, device=DEVICE, dtype=case.dtype) for s in shapes),
        has_batch=(True, False, True)[: len(shapes)],
        per_sample_results=2 if case.backward else 1,
        exact=case.run(_functions(case)[0]),
        yardstick="reference",
        peers=peers(case),
        limits=frozenset({"clone"}),
    )


@parametrize(cases(), peers)
def test_blockify(measure, case, peer):
    measure(build, case, peer)
