"""Launch configurations of the attention kernels by rows, head_dim, dtype and architecture; no tuning at run time.

Chosen without a GPU, from what the compiler makes of each candidate (scripts/kernel_resources.py): no spill, then the
fewest instructions a sequence, weighed with the warps that fit on a multiprocessor. scripts/tune.py replaces the rows
of the GPU it runs on by measured ones.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

__all__ = ["ATTENTION", "AttentionConfig", "architecture", "attention"]

ANY = math.inf


class AttentionConfig(NamedTuple):
    """``block``: rows of the tile that the program walks in (queries forward, keys backward; queries if it streams).

    ``piece``: the largest piece of the side that stays on chip (keys forward, queries backward; if it streams, keys).
    ``stream``: neither side stays; for what does not fit, see the stream kernels.
    """

    block: int
    piece: int
    num_warps: int
    stream: bool = False
    num_stages: int = 1


# (kernel, architecture, operands) -> (query rows over the same keys, keys, head_dim, configuration), each at most; the
# first that fits counts. Operands are "half" (fp16, bf16), "tf32" or "ieee", with "+" where a bias or mask is added.
# Without a list with "+" the one without counts; an architecture without either has sm_80's.
_C = AttentionConfig
ATTENTION: dict[tuple[str, int, str], list[tuple[float, float, float, AttentionConfig]]] = {
    ("bwd", 80, "half"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 32, _C(32, 32, 1)),
        (32, 32, 64, _C(32, 32, 2)),
        (32, 32, 128, _C(32, 32, 4)),
        (64, 64, 64, _C(64, 64, 4)),
        (64, 64, 128, _C(32, 64, 4)),
        (128, 128, 32, _C(32, 64, 4)),
        (192, 192, 32, _C(64, 32, 4, True)),
        (256, 256, 32, _C(32, 64, 4)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 128, _C(64, 32, 4, True)),
    ],
    ("bwd", 80, "half+"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 32, _C(32, 32, 1)),
        (32, 32, 64, _C(32, 32, 2)),
        (32, 32, 128, _C(32, 32, 4)),
        (64, 64, 64, _C(64, 64, 4)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 128, _C(64, 32, 4, True)),
    ],
    ("bwd", 80, "ieee"): [
        (16, 16, 128, _C(16, 16, 4)),
        (ANY, ANY, 64, _C(32, 16, 4, True)),
        (ANY, ANY, 128, _C(16, 16, 8, True)),
    ],
    ("bwd", 80, "tf32"): [
        (16, 16, 128, _C(16, 16, 4)),
        (ANY, ANY, 128, _C(32, 32, 4, True)),
    ],
    ("bwd", 90, "half"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 32, _C(32, 32, 1)),
        (32, 32, 64, _C(32, 32, 2)),
        (32, 32, 128, _C(32, 32, 4)),
        (64, 64, 128, _C(64, 64, 4)),
        (256, 16, 64, _C(64, 64, 4)),
        (144, 144, 32, _C(64, 64, 4)),
        (160, 160, 32, _C(64, 64, 4, True)),
        (208, 208, 32, _C(64, 64, 4)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 128, _C(64, 64, 4, True)),
    ],
    ("bwd", 90, "half+"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 32, _C(32, 32, 1)),
        (32, 32, 64, _C(32, 32, 2)),
        (32, 32, 128, _C(32, 32, 4)),
        (64, 64, 128, _C(64, 64, 4)),
        (128, 128, 32, _C(64, 64, 4)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 128, _C(64, 64, 4, True)),
    ],
    ("bwd", 90, "tf32"): [
        (16, 16, 128, _C(16, 16, 4)),
        (32, 32, 128, _C(32, 32, 4, True)),
        (64, 64, 64, _C(64, 64, 4)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 64, _C(64, 64, 4, True)),
        (ANY, ANY, 128, _C(32, 64, 4, True)),
    ],
    ("bwd", 100, "half"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 32, _C(32, 32, 1)),
        (32, 32, 64, _C(32, 32, 2)),
        (32, 32, 128, _C(32, 32, 4)),
        (64, 64, 128, _C(64, 64, 4)),
        (256, 16, 64, _C(64, 64, 4)),
        (208, 208, 32, _C(64, 64, 4)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 128, _C(64, 64, 4, True)),
    ],
    ("bwd", 100, "tf32"): [
        (16, 16, 128, _C(16, 16, 4)),
        (32, 32, 128, _C(32, 32, 4, True)),
        (ANY, 16, 128, _C(64, 16, 4, True)),
        (ANY, ANY, 128, _C(64, 64, 4, True)),
    ],
    ("dbias", 80, "half"): [
        (16, 16, 128, _C(16, 16, 4)),
        (ANY, ANY, 128, _C(32, 32, 4)),
    ],
    ("dbias", 80, "ieee"): [
        (ANY, ANY, 128, _C(16, 16, 8)),
    ],
    ("dbias", 80, "tf32"): [
        (ANY, ANY, 128, _C(16, 16, 8)),
    ],
    ("dbias", 90, "half"): [
        (16, 16, 128, _C(16, 16, 4)),
        (32, 32, 128, _C(32, 32, 8)),
        (ANY, ANY, 128, _C(64, 64, 8)),
    ],
    ("dbias", 100, "half"): [
        (16, 16, 128, _C(16, 16, 4)),
        (32, 32, 128, _C(32, 32, 8)),
        (ANY, ANY, 128, _C(64, 64, 8)),
    ],
    ("fwd", 80, "half"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 64, _C(32, 32, 1)),
        (32, 32, 128, _C(32, 32, 2)),
        (64, 64, 128, _C(64, 64, 4)),
        (128, 128, 32, _C(64, 128, 4)),
        (ANY, 16, 64, _C(64, 16, 4)),
        (ANY, ANY, 32, _C(128, 64, 8)),
        (ANY, ANY, 64, _C(64, 32, 4, True)),
        (ANY, ANY, 128, _C(128, 64, 8, True)),
    ],
    ("fwd", 80, "ieee"): [
        (16, 16, 128, _C(16, 16, 2)),
        (ANY, ANY, 64, _C(32, 16, 4, True)),
        (ANY, ANY, 128, _C(32, 16, 8, True)),
    ],
    ("fwd", 80, "tf32"): [
        (16, 16, 128, _C(16, 16, 2)),
        (32, 32, 128, _C(32, 32, 4, True)),
        (64, 64, 32, _C(64, 64, 4)),
        (ANY, ANY, 128, _C(64, 32, 4, True)),
    ],
    ("fwd", 90, "half"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 64, _C(32, 32, 1)),
        (32, 32, 128, _C(32, 32, 2)),
        (ANY, ANY, 64, _C(64, 128, 4)),
        (208, 208, 128, _C(64, 128, 4)),
        (ANY, ANY, 128, _C(64, 32, 4, True)),
    ],
    ("fwd", 90, "tf32"): [
        (16, 16, 128, _C(16, 16, 2)),
        (32, 32, 128, _C(32, 32, 4, True)),
        (64, 64, 128, _C(64, 64, 4)),
        (208, 208, 32, _C(64, 128, 4)),
        (ANY, ANY, 128, _C(64, 32, 4, True)),
    ],
    ("fwd", 100, "half"): [
        (16, 16, 128, _C(16, 16, 1)),
        (32, 32, 64, _C(32, 32, 1)),
        (32, 32, 128, _C(32, 32, 2)),
        (ANY, ANY, 32, _C(64, 128, 4)),
        (160, 160, 128, _C(64, 128, 4)),
        (ANY, ANY, 128, _C(64, 64, 4)),
    ],
    ("fwd", 100, "tf32"): [
        (16, 16, 128, _C(16, 16, 2)),
        (32, 32, 128, _C(32, 32, 4, True)),
        (64, 64, 128, _C(64, 64, 4)),
        (256, 256, 32, _C(64, 64, 4)),
        (ANY, ANY, 128, _C(64, 64, 4, True)),
    ],
}


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture whose rows of the table serve ``device``; the interpreter on the CPU counts as sm_90."""
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    # What is neither Hopper nor data-centre Blackwell has sm_80's matrix instructions (sm_86, sm_89, sm_120).
    return {9: 90, 10: 100}.get(major, 80)


def attention(
    kernel: str, rows: int, keys: int, head_dim: int, operands: str, adds: bool, device: torch.device
) -> AttentionConfig:
    """The configuration of ``kernel`` ("fwd", "bwd", "dbias") for ``rows`` query rows over the same ``keys``."""
    here = architecture(device)
    names = [operands + "+", operands] if adds else [operands]
    key = next(k for a in (here, 80) for name in names if (k := (kernel, a, name)) in ATTENTION)
    return next(c for r, n, d, c in ATTENTION[key] if rows <= r and keys <= n and head_dim <= d)
