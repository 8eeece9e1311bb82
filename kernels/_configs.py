"""Launch configurations of all kernels, by shape, dtype and architecture; no tuning at run time.

Chosen without a GPU, from what the compiler makes of each candidate (scripts/kernel_resources.py): no spill, then the
fewest instructions a sequence, weighed with the warps that fit on a multiprocessor. scripts/tune.py replaces the
attention rows of the GPU it runs on by measured ones.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
import triton

__all__ = [
    "AGGREGATION", "ATTENTION", "MAX_LAYER_NORM_CHANNELS", "PROGRAMS", "AggregationConfig", "AggregationRow",
    "AttentionConfig", "AttentionRow", "architecture", "attention", "bias_gelu", "block_aggregate", "layer_norm",
    "multiprocessors", "norm_pool",
]  # fmt: skip

ANY = math.inf

# At most so many programs of a kernel that leaves one row of partial sums for each. Constants, so that sums have the
# same bits on every GPU; enough of them to keep every multiprocessor's memory pipeline full.
PROGRAMS = {"bias_gelu": 2048, "layer_norm": 1024, "norm_pool": 2048}


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture whose rows of the tables serve ``device``; the interpreter on the CPU counts as sm_90."""
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    # What is neither Hopper nor data-centre Blackwell has sm_80's matrix instructions (sm_86, sm_89, sm_120).
    return {9: 90, 10: 100}.get(major, 80)


def multiprocessors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor each run at once; where there is no GPU, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


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


# (kernel, architecture, operands) -> rows, of which the first that fits counts. Operands are "half" (fp16, bf16),
# "tf32" or "ieee", with "+" where a bias or mask is added. Without a list with "+" the one without counts; an
# architecture without either has sm_80's.
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
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 80, "half+"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("bwd", 80, "ieee"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=32, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
    ],
    ("bwd", 80, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
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
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
    ],
    ("bwd", 90, "half+"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=128, keys=128, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
    ],
    ("bwd", 90, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=64, block_n=64, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=64, num_warps=4, resident=None),
    ],
    ("bwd", 100, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=32, block_m=32, block_n=32, num_warps=1, resident="queries"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=2, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident="queries"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=256, keys=16, head_dim=64, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="queries"),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
    ],
    ("bwd", 100, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident="queries"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=16, head_dim=128, block_m=64, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
    ],
    ("dbias", 80, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
    ],
    ("dbias", 80, "ieee"): [
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
    ],
    ("dbias", 80, "tf32"): [
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=16, block_n=16, num_warps=8, resident=None),
    ],
    ("dbias", 90, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=8, resident=None),
    ],
    ("dbias", 100, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=4, resident=None),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=8, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=8, resident=None),
    ],
    ("fwd", 80, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=2, resident="keys"),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=128, keys=128, head_dim=32, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=16, head_dim=64, block_m=64, block_n=16, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=32, block_m=128, block_n=64, num_warps=8, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=64, block_n=32, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=128, block_n=64, num_warps=8, resident=None),
    ],
    ("fwd", 80, "ieee"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=32, block_n=16, num_warps=4, resident=None),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=32, block_n=16, num_warps=8, resident=None),
    ],
    ("fwd", 80, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 90, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=2, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=64, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=208, keys=208, head_dim=128, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 90, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=208, keys=208, head_dim=32, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=32, num_warps=4, resident=None),
    ],
    ("fwd", 100, "half"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=64, block_m=32, block_n=32, num_warps=1, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=2, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=32, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=160, keys=160, head_dim=128, block_m=64, block_n=128, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
    ],
    ("fwd", 100, "tf32"): [
        _row(queries=16, keys=16, head_dim=128, block_m=16, block_n=16, num_warps=2, resident="keys"),
        _row(queries=32, keys=32, head_dim=128, block_m=32, block_n=32, num_warps=4, resident=None),
        _row(queries=64, keys=64, head_dim=128, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=256, keys=256, head_dim=32, block_m=64, block_n=64, num_warps=4, resident="keys"),
        _row(queries=ANY, keys=ANY, head_dim=128, block_m=64, block_n=64, num_warps=4, resident=None),
    ],
}


def attention(
    kernel: str, queries: int, keys: int, head_dim: int, operands: str, adds: bool, device: torch.device
) -> AttentionConfig:
    """The configuration of ``kernel`` ("fwd", "bwd", "dbias") for so many ``queries`` over the same ``keys``."""
    here = architecture(device)
    names = [operands + "+", operands] if adds else [operands]
    key = next(k for a in (here, 80) for name in names if (k := (kernel, a, name)) in ATTENTION)
    return next(
        row.config for row in ATTENTION[key] if queries <= row.queries and keys <= row.keys and head_dim <= row.head_dim
    )


# --- block_aggregate, norm_pool ---------------------------------------------------------------------------------------


class AggregationConfig(NamedTuple):
    """A tile of the convolution: ``tile_pixels`` by ``tile_c`` output channels at most, ``tile_k`` input channels a
    step; then ``tile_windows`` are pooled at once, of which more cost registers.

    ``maxnreg``: a bound that keeps the compiler from spilling a little to have more warps; None leaves it alone.
    """

    tile_pixels: int
    tile_k: int
    tile_c: int
    num_stages: int
    maxnreg: int | None = None
    tile_windows: int = 4
    num_warps: int = 8


class AggregationRow(NamedTuple):
    """``config`` for at most so many output ``channels``."""

    channels: int
    config: AggregationConfig


def _channels(channels: int, **config) -> AggregationRow:
    return AggregationRow(channels, AggregationConfig(**config))


# (architecture, operands) -> rows, of which the first that fits counts: no spill in training either, then the most
# pixels. Operands are as for attention; an architecture without a list has sm_80's.
AGGREGATION: dict[tuple[int, str], list[AggregationRow]] = {
    (80, "half"): [
        _channels(192, tile_pixels=128, tile_k=32, tile_c=64, num_stages=3),
        _channels(256, tile_pixels=128, tile_k=32, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=64, tile_k=32, tile_c=256, num_stages=3),
    ],
    (80, "tf32"): [_channels(512, tile_pixels=32, tile_k=32, tile_c=128, num_stages=2, maxnreg=255)],
    (80, "ieee"): [_channels(512, tile_pixels=32, tile_k=16, tile_c=128, num_stages=2, maxnreg=255)],
    (90, "half"): [
        _channels(192, tile_pixels=128, tile_k=32, tile_c=128, num_stages=3),
        _channels(256, tile_pixels=128, tile_k=64, tile_c=256, num_stages=3),
        _channels(512, tile_pixels=64, tile_k=64, tile_c=256, num_stages=3),
    ],
    (90, "tf32"): [
        _channels(256, tile_pixels=64, tile_k=32, tile_c=256, num_stages=2, maxnreg=255),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=256, num_stages=2, maxnreg=255),
    ],
    (100, "half"): [
        _channels(192, tile_pixels=128, tile_k=32, tile_c=128, num_stages=3),
        _channels(384, tile_pixels=64, tile_k=32, tile_c=128, num_stages=3),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=256, num_stages=3),
    ],
    (100, "tf32"): [
        _channels(192, tile_pixels=32, tile_k=16, tile_c=128, num_stages=2),
        _channels(512, tile_pixels=32, tile_k=32, tile_c=128, num_stages=2, maxnreg=255),
    ],
}


def block_aggregate(channels: int, operands: str, device: torch.device) -> AggregationConfig:
    """The configuration of the fused forward for so many output ``channels``."""
    rows = AGGREGATION.get((architecture(device), operands)) or AGGREGATION[80, operands]
    return next(row.config for row in rows if channels <= row.channels)


def norm_pool(channels: int) -> dict[str, int]:
    """Pixels in a tile and warps: 4 values for each thread, which leaves room for the others it keeps in registers."""
    padded = triton.next_power_of_2(channels)
    pixels = max(4 if padded <= 512 else 2, 512 // padded)
    return {"TILE_PIXELS": pixels, "num_warps": max(4, pixels * padded // 128)}


# --- add_layer_norm, layer_norm_mean, bias_gelu -----------------------------------------------------------------------

MAX_LAYER_NORM_CHANNELS = 4096  # a tile holds whole rows


def layer_norm(channels: int) -> dict[str, int]:
    """Whole rows in a tile, and warps: eight values for each thread, which half precision loads at once."""
    padded = max(16, triton.next_power_of_2(channels))
    return {"TILE_ROWS": max(1, 1024 // padded), "TILE_C": padded, "num_warps": max(4, padded // 256)}


def bias_gelu(channels: int) -> dict[str, int]:
    """Eight values for each thread. 128 columns are whole cache lines, and divide the widths of MLPs."""
    columns = min(128, max(16, triton.next_power_of_2(channels)))
    return {"TILE_ROWS": 1024 // columns, "TILE_C": columns, "num_warps": 4}
