"""Block aggregation between the levels: conv 3x3, LayerNorm, max-pool and the next position embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import DEVICE, DTYPES, Case, Peers, Problem, compiled_peers, impl_peers, parametrize
from torch import Tensor

from nest_fast import block_aggregate, reference
from nest_fast.modules import layer_norm
from nest_fast.ops.block_aggregate import IMPLS
from nest_fast.testing import import_timm

BLOCK = 14


@dataclass(frozen=True, kw_only=True)
class AggregateCase(Case):
    """From ``grid`` x ``grid`` blocks with ``channels`` to a quarter of them with ``out_channels``."""

    grid: int
    channels: int
    out_channels: int
    compile: bool


WIDTHS = {"NesT-T": 96} if DEVICE == "cpu" else {"NesT-T": 96, "NesT-B": 128}
BATCH = 8 if DEVICE == "cpu" else 256


def cases():
    for dtype in DTYPES:
        for backward in (False, True):
            for model, width in WIDTHS.items():
                for level in (1, 2):
                    if DEVICE == "cpu" and backward and level == 2:
                        continue
                    yield AggregateCase(
                        op="block_aggregate",
                        name=f"{model} L{level} to L{level + 1}",
                        batch=BATCH,
                        dtype=dtype,
                        backward=backward,
                        grid=4 // level,
                        channels=width * level,
                        out_channels=2 * width * level,
                        compile=DEVICE == "cuda" or (level == 1 and not backward),
                    )


def peers(case: AggregateCase) -> Peers:
    plain = _aggregate(case, reference.block_aggregate)
    return {
        "reference": lambda: case.run(plain),
        **impl_peers(case, IMPLS, lambda impl: _aggregate(case, partial(block_aggregate, impl=impl))),
        **(compiled_peers(case, plain) if case.compile else {}),
        "timm": lambda: case.run(_timm(case)),
    }


def _aggregate(case: AggregateCase, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, pos_embed: Tensor, *parameters: Tensor) -> Tensor:
        return op(x, *parameters, grid_size=case.grid, pos_embed=pos_embed)

    return run


def _timm(case: AggregateCase) -> Callable[..., Tensor]:
    """timm's ``ConvPool`` between its own ``deblockify`` and ``blockify``, as two of its levels have it."""
    timm = import_timm().models.nest
    module = timm.ConvPool(case.channels, case.out_channels, layer_norm, device=DEVICE, dtype=case.dtype)
    names = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")

    def run(x: Tensor, pos_embed: Tensor, *parameters: Tensor) -> Tensor:
        image = timm.deblockify(x, BLOCK).permute(0, 3, 1, 2)  # channels-last memory
        y = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (image,))
        return timm.blockify(y.permute(0, 2, 3, 1), BLOCK) + pos_embed

    return run


def build(case: AggregateCase) -> Problem:
    inputs, outputs = case.channels, case.out_channels
    blocks, new_blocks = (case.grid**2, BLOCK**2), (case.grid**2 // 4, BLOCK**2)
    shapes = [(case.batch, *blocks, inputs), (1, *new_blocks, outputs), (outputs, inputs, 3, 3), *[(outputs,)] * 3]
    scales = [1.0, 0.02, (9 * inputs) ** -0.5, 0.1, 1.0, 0.1]
    if case.backward:
        shapes.append((case.batch, *new_blocks, outputs))
        scales.append(1.0)
    return Problem(
        inputs=tuple(
            (torch.randn(s, device=DEVICE) * scale).to(case.dtype) for s, scale in zip(shapes, scales, strict=True)
        ),
        has_batch=(True, False, False, False, False, False, True)[: len(shapes)],
        per_sample_results=2 if case.backward else 1,
        exact=case.run(_aggregate(case, reference.block_aggregate)),
        yardstick="reference",
        peers=peers(case),
        has_maxpool=True,
    )


@parametrize(cases(), peers)
def test_block_aggregate(measure, case, peer):
    measure(build, case, peer)
