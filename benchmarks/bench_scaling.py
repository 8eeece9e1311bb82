"""How NesT-T's inference grows with the batch and with the image; measured with ``--sweep``.

With the image it is not quite linear: the number of blocks stays, so the tokens of a block grow, and attention with
their square.
"""

from __future__ import annotations

import pytest
from bench_model import ModelCase, build
from harness import DEVICE, DTYPES, parametrize

CUDA = DEVICE == "cuda"
BATCHES = (1, 4, 16, 64, 256, 1024) if CUDA else (1, 2, 4, 8, 16)
SIZES = (112, 224, 448, 672, 1024) if CUDA else (112, 224, 336)


def cases():
    for batch in BATCHES:
        yield _case("batch", batch, batch=batch, px=224)
    for px in SIZES:
        yield _case("image edge in pixels", px, batch=4, px=px)


def _case(axis: str, x: int, batch: int, px: int) -> ModelCase:
    return ModelCase(
        op="nest_tiny", name=f"{px} px", batch=batch, dtype=DTYPES[-1], px=px, compile=False, axis=axis, x=x
    )


@pytest.mark.sweep
@parametrize(cases(), lambda case: ("timm", "nest_fast NesT"))
def test_scaling(measure, case, peer):
    measure(build, case, peer)
