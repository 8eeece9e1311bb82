"""Launch configurations worth measuring: those of the tables in _configs, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nest_fast.kernels import _configs
from nest_fast.kernels._configs import AttentionConfig
from nest_fast.kernels._primitives import next_power_of_2

__all__ = ["space"]


def space(table: Callable[..., Sequence], shape: tuple, wide: bool = False) -> list[Any]:
    """Configurations for ``shape``, without repetition, the table's own first.

    Args:
        table: of _configs.
        shape: what it is called with, beside the current device's architecture.
        wide: also what the table leaves out: half and twice the warps and, of attention, all tiles. Each is compiled
            before it is measured, which takes a second or so.
    """
    found = list(table(*shape, _configs.architecture()))
    if wide:
        found += [other for config in found for other in _with_other_warps(config)]
        found += _attention(*shape[:2]) if table is _configs.attention else ()
    return [config for i, config in enumerate(found) if config not in found[:i]]


def _with_other_warps(config: Any) -> Iterator[Any]:
    warps = config["num_warps"] if isinstance(config, dict) else config.num_warps
    for other in (warps // 2, 2 * warps):
        if 1 <= other <= 16:
            yield {**config, "num_warps": other} if isinstance(config, dict) else config._replace(num_warps=other)


def _attention(kernel: str, spec: Any) -> list[AttentionConfig]:
    """No tile larger than the sequence, one program's worth of work at most."""
    rows = spec.HEADS * spec.N
    tile = max(16, next_power_of_2(rows))
    if kernel == "dbias":
        return [AttentionConfig(m, m, warps) for m in (16, 32, 64) for warps in (1, 4, 8) if m <= tile]
    resident = "keys" if kernel == "fwd" else "queries"
    if rows <= 32:
        return [AttentionConfig(tile, tile, warps, resident) for warps in (1, 2, 4)]
    keep = [
        AttentionConfig(*((walked, held) if resident == "keys" else (held, walked)), warps, resident)
        for walked in (16, 32, 64)
        for held in (32, 64, 128)
        for warps in (4, 8)
    ]
    stream = [
        AttentionConfig(m, n, warps, None, stages)
        for m, warps in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8))
        for n in (16, 32, 64)
        for stages in (1, 2)
    ]
    return keep + stream if spec.N <= 256 else stream
