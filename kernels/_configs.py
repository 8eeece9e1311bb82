"""Launch configurations of all kernels, by shape, dtype and architecture: candidates, of which _launch takes one.

Found without a GPU, from what the compiler makes of each (scripts/kernel_resources.py): no spill, then the fewest
instructions a sequence, weighed with the warps that fit on a multiprocessor. The best comes first; the others are for
a Triton or a GPU with which the best one spills. Where nest_fast.tune measured on a GPU, that counts instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import triton

from nest_fast.kernels._primitives import cdiv, next_power_of_2

if TYPE_CHECKING:
    from nest_fast.kernels._attention import Spec

__all__ = [
    "AGGREGATION", "ATTENTION", "MAX_LAYER_NORM_CHANNELS", "AggregationConfig", "AggregationRow",
    "AttentionConfig", "AttentionRow", "architecture", "at_once", "attention", "bias_gelu", "block_aggregate",
    "layer_norm", "multiprocessors", "norm_pool", "operands", "row_architecture", "stripes",
]  # fmt: skip

ANY = math.inf
MOST = 6  # candidates: where none is clean, compiling more of them would only cost time

REGISTERS = 65536  # of a multiprocessor


def architecture() -> int:
    """The compute capability of the current device, 90 for 9.0; the interpreter counts as an H100."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def row_architecture(architecture: int) -> int:
    """The architecture whose rows of the tables serve ``architecture``."""
    # What is neither Hopper nor data-centre Blackwell has sm_80's matrix instructions (sm_86, sm_89, sm_120).
    return {9: 90, 10: 100}.get(architecture // 10, 80)


def operands(dtype: torch.dtype, tf32: bool) -> str:
    """What the tables call those of a matmul: "half", or for float32 "tf32" or "ieee"."""
    return ("tf32" if tf32 else "ieee") if dtype == torch.float32 else "half"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor each run at once; where there is no GPU, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def at_once(device: torch.device, tile: Mapping[str, int]) -> int:
    """How many programs run at once: as many as there are of a kernel that leaves a row of sums for each.

    More would leave most of a GPU idle behind the last of them. Their registers are counted by ``tile``'s bound, so
    that GPUs of one kind add up in one order, whatever the compiler makes of it.
    """
    registers = 32 * tile["num_warps"] * tile.get("maxnreg", 255)
    return multiprocessors(device) * max(1, REGISTERS // registers)


def stripes(device: torch.device, num_warps: int, tiles: int, columns: int) -> tuple[int, int]:
    """So many stripes of tiles of rows as run at once, each by so many programs for ``columns``; the tiles of each."""
    each = cdiv(tiles, max(1, at_once(device, {"num_warps": num_warps}) // columns))
    return cdiv(tiles, each), each


# --- block_attention --------------------------------------------------------------------------------------------------


class AttentionConfig(NamedTuple):
    """``block_m`` queries and ``block_n`` keys in a tile, in every direction.

    ``resident``: the side that stays on chip whole, "keys" (forward) or "queries" (backward), in pieces no larger than
    its tile, while the program walks over the other side. None: neither does, both go by in tiles.
    """

    block_m: int
    block_n: int
    num_warps: int
    resident: Literal["keys", "queries"] | None = None
    num_stages: int = 1


class AttentionRow(NamedTuple):
    """``config`` for at most so many ``queries`` over the same ``keys`` (all heads' over one key head) and head_dim."""

    queries: float
    keys: float
    head_dim: int
    config: AttentionConfig


def _row(*, queries: float, keys: float, head_dim: int, **config) -> AttentionRow:
    return AttentionRow(queries, keys, head_dim, AttentionConfig(**config))


# (kernel, architecture, operands) -> rows; all that fit are candidates, the first is the best. Operands are "half"
# (fp16, bf16), "tf32" or "ieee", with "+" where a bias or mask is added. Without a list with "+" the one without it
# counts; an architecture without either has sm_80's.
ATTENTION: dict[tuple[str, int, str], list[AttentionRow]] = {
    ("bwd", 80, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=32, num_warps=4, resident="queries"),
        _row(queries=128, keys=128, head_dim=32, block_m=64, block_n=32, num_warps=4, resident="queries"),
        _row(queries=192, keys=192, head_dim=32, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=256, keys=256, head_dim=32, block_m=64, block_n=32, num_warps=4, resident="queries"),
        _row(queries=256, keys=256, head_dim=32, block_m=64, block_n=16, num_warps=4, resident="queries"),
        _row(queries=256, keys=256, head_dim=32, block_m=128, block_n=16, num_warps=8, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 80, "half+"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 80, "ieee"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=32, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
    ],
    ("bwd", 80, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
    ],
    ("bwd", 90, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=256, keys=16, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=144, keys=144, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=160, keys=160, head_dim=32, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=16, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 90, "half+"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=128, keys=128, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
    ],
    ("bwd", 90, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 100, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=256, keys=16, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        # Tiles of 64 keys would take all columns of tensor memory, and a multiprocessor had one program.
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=16, num_warps=4, resident="queries"),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=32, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 100, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("dbias", 80, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=2, resident=None),
    ],
    ("dbias", 80, "ieee"): [
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
    ],
    ("dbias", 80, "tf32"): [
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
    ],
    ("dbias", 90, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 80, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=2, resident="keys"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=128, keys=128, head_dim=32, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=16, head_dim=64, block_m=64, block_n=16, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=256, head_dim=32, block_m=128, block_n=64, num_warps=8, resident="keys"),
        _row(queries=256, keys=256, head_dim=32, block_m=128, block_n=128, num_warps=8, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=128, block_n=64, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 80, "ieee"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=32, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=16, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
    ],
    ("fwd", 80, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 90, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=2, resident="keys"),
        _row(queries=ANY, keys=256, head_dim=64, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=256, keys=256, head_dim=32, block_m=128, block_n=64, num_warps=8, resident="keys"),
        _row(queries=208, keys=208, head_dim=128, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 90, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 100, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=2, resident="keys"),
        _row(queries=ANY, keys=256, head_dim=32, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=160, keys=160, head_dim=128, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=256, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 100, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=256, keys=256, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
}
ATTENTION["dbias", 100, "half"] = ATTENTION["dbias", 90, "half"]
# The last candidate where no load is of 16 bytes: addresses take the registers.
NARROW = {"fwd": AttentionConfig(64, 16, 8), "bwd": AttentionConfig(32, 16, 8)}


def attention(kernel: str, spec: Spec, dtype: torch.dtype, *shape_and_architecture: Any) -> tuple[AttentionConfig, ...]:
    """Candidates for ``kernel`` ("fwd", "bwd", "dbias")."""
    own = operands(dtype, spec.TF32)
    names = [own + "+", own] if spec.ADDS else [own]
    rows = next(
        ATTENTION[kernel, here, name]
        for here in (row_architecture(shape_and_architecture[-1]), 80)
        for name in names
        if (kernel, here, name) in ATTENTION
    )
    queries, keys = spec.HEADS * spec.N, spec.N
    fit = (row for row in rows if queries <= row.queries and keys <= row.keys and row.head_dim >= spec.HEAD_DIM)
    found = tuple(dict.fromkeys(row.config for row in fit))
    return (*found[: MOST - 1], NARROW[kernel]) if spec.HEAD_DIM % 16 and kernel in NARROW else found[:MOST]


# --- block_aggregate, norm_pool ---------------------------------------------------------------------------------------


class AggregationConfig(NamedTuple):
    """A tile of the convolution: ``tile_pixels`` by ``tile_c`` output channels at most, ``tile_k`` input channels a
    step.

    ``maxnreg``: a bound that keeps the compiler from spilling a little to have more warps; None leaves it alone.
    """

    tile_pixels: int
    tile_k: int
    tile_c: int
    num_stages: int
    maxnreg: int | None = None
    num_warps: int = 8


class AggregationRow(NamedTuple):
    """``config`` for at most so many output ``channels``."""

    channels: int
    config: AggregationConfig


def _channels(channels: int, **config) -> AggregationRow:
    return AggregationRow(channels, AggregationConfig(**config))


# (architecture, operands) -> rows; all that fit are candidates, the first is the best: no spill in training either,
# then the most pixels. Operands are as for attention; an architecture without a list has sm_80's.
AGGREGATION: dict[tuple[int, str], list[AggregationRow]] = {
    (80, "half"): [
        _channels(192, tile_pixels=128, tile_k=32, tile_c=64, num_stages=3),
        _channels(256, tile_pixels=128, tile_k=32, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=64, tile_k=32, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=128, num_stages=2, maxnreg=255),
    ],
    (80, "tf32"): [
        _channels(512, tile_pixels=32, tile_k=32, tile_c=128, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=16, tile_k=16, tile_c=128, num_stages=2, maxnreg=255),
    ],
    (80, "ieee"): [
        _channels(512, tile_pixels=32, tile_k=16, tile_c=128, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=16, tile_k=16, tile_c=128, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=32, tile_k=16, tile_c=64, num_stages=2, maxnreg=255),
    ],
    (90, "half"): [
        _channels(192, tile_pixels=128, tile_k=32, tile_c=128, num_stages=3),
        _channels(256, tile_pixels=128, tile_k=64, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=64, tile_k=64, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=256, num_stages=3),
    ],
    (90, "tf32"): [
        _channels(256, tile_pixels=64, tile_k=32, tile_c=256, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=256, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=32, tile_k=16, tile_c=128, num_stages=2, maxnreg=255),
    ],
    (100, "half"): [
        _channels(192, tile_pixels=128, tile_k=32, tile_c=128, num_stages=3),
        _channels(384, tile_pixels=64, tile_k=32, tile_c=128, num_stages=3),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=128, num_stages=2, maxnreg=255),
    ],
    (100, "tf32"): [
        _channels(192, tile_pixels=32, tile_k=16, tile_c=128, num_stages=2),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=128, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=32, tile_k=16, tile_c=128, num_stages=2, maxnreg=255),
    ],
}


def block_aggregate(channels: int, operands: str, *shape_and_architecture: Any) -> tuple[AggregationConfig, ...]:
    """Candidates for the fused forward with so many output ``channels``."""
    here = row_architecture(shape_and_architecture[-1])
    rows = AGGREGATION.get((here, operands)) or AGGREGATION[80, operands]
    return tuple(row.config for row in rows if channels <= row.channels)


def norm_pool(kernel: str, channels: int, *_: Any) -> tuple[dict[str, int], ...]:
    """Pixels in a tile and warps: a warp for each pixel, so that no sum over channels waits for other warps; where that
    takes too many registers, 4 values for each thread."""
    padded = next_power_of_2(channels)
    pixels = max(4 if padded <= 512 else 2, 512 // padded)
    whole = {"TILE_PIXELS": max(8, pixels), "num_warps": 8 if padded >= 128 else 4}
    cut = {"TILE_PIXELS": pixels, "num_warps": max(4, pixels * padded // 128)}
    if kernel == "bwd":
        return {**whole, "maxnreg": 128}, {**whole, "maxnreg": 255}, *_or_more_warps(cut, 96)
    return whole, {**whole, "maxnreg": 128}, *_or_more_warps(cut)


def _or_more_warps(tile: dict[str, int], registers: int | None = None) -> tuple[dict[str, int], ...]:
    """The tile, then with more registers, then with twice the warps.

    Left alone, the compiler spills a little to have more warps; and of what leaves a row of sums for each program
    nobody would know how many run at once.
    """
    wider = {**tile, "num_warps": 2 * tile["num_warps"]}
    if registers is None:
        return tile, wider
    return {**tile, "maxnreg": registers}, {**tile, "maxnreg": 128}, {**wider, "maxnreg": registers}


# --- add_layer_norm, layer_norm_mean, bias_gelu -----------------------------------------------------------------------

MAX_LAYER_NORM_CHANNELS = 4096  # a tile holds whole rows


def layer_norm(kernel: str, channels: int, *_: Any) -> tuple[dict[str, int], ...]:
    """Whole rows in a tile, and warps: eight values for each thread, which half precision loads at once."""
    padded = max(16, next_power_of_2(channels))
    tile = {"TILE_ROWS": max(1, 1024 // padded), "TILE_C": padded, "num_warps": max(4, padded // 256)}
    return _or_more_warps(tile, {"add_layer_norm_fwd": None, "add_layer_norm_bwd": 96}.get(kernel, 64))


def bias_gelu(kernel: str, channels: int, *_: Any) -> tuple[dict[str, int], ...]:
    """16 values for each thread: with 8 each takes a third more instructions. 128 columns are whole cache lines, and
    divide the widths of MLPs."""
    columns = min(128, max(16, next_power_of_2(channels)))
    tile = {"TILE_ROWS": 2048 // columns, "TILE_C": columns, "num_warps": 4}
    return _or_more_warps(tile, 72 if kernel == "bwd" else None)
