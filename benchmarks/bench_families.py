"""Other families, as their libraries ship them and compiled, against the same accelerated; all with ``--families``."""

from __future__ import annotations

from typing import Any

import pytest
from bench_model import ModelCase, build, peers
from harness import DEVICE, DTYPES, parametrize

# Models, pixels and batch on a CPU; on a GPU the batch is 64 times that.
FEW = {"vit_small_patch16_224": (224, 8), "swin_tiny_patch4_window7_224": (224, 8)}
MORE = {
    "deit3_small_patch16_224": (224, 8),
    "samvit_base_patch16": (512, 1),
    "twins_svt_small": (224, 8),
    "davit_tiny": (224, 8),
    "hiera_tiny_224": (224, 8),
    "swinv2_tiny_window8_256": (256, 8),
    "gcvit_tiny": (224, 8),
    "maxvit_tiny_rw_224": (224, 8),
    "torchvision.maxvit_t": (224, 8),
    "torchvision.swin_t": (224, 8),
    "torchvision.swin_v2_t": (256, 8),
    "transformers.SamVisionModel": (512, 1),
    "transformers.DonutSwinForImageClassification": (224, 8),
    "transformers.SwinForImageClassification": (224, 8),
    "transformers.Swinv2ForImageClassification": (224, 8),
}


def cases(models: dict[str, tuple[int, int]]):
    for op, (px, batch) in models.items():
        size: dict[str, Any] = {"name": f"{px} px", "px": px, "batch": batch if DEVICE == "cpu" else 64 * batch}
        for dtype in DTYPES:
            yield ModelCase(op=op, dtype=dtype, **size)


@parametrize(cases(FEW), peers)
def test_family(measure, case, peer):
    measure(build, case, peer)


@pytest.mark.families
@parametrize(cases(MORE), peers)
def test_more_families(measure, case, peer):
    measure(build, case, peer)
