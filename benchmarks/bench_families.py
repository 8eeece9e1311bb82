"""Other families, as their libraries ship them and compiled, against the same accelerated; all with ``--families``.

On a CPU OpenVINO is beside them where it takes their export, and beside the two that are always measured, which have a
training step as well, ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from bench_model import ModelCase, build, peers
from harness import DEVICE, DTYPES, parametrize

# Models, pixels and batch on a CPU; on a GPU the batch is 64 times that.
Model = tuple[str, int, int]
FEW: list[Model] = [("vit_small_patch16_224", 224, 8), ("swin_tiny_patch4_window7_224", 224, 8)]
MORE: list[Model] = [
    ("deit3_small_patch16_224", 224, 8),
    ("swin_base_patch4_window7_224", 224, 4),
    ("samvit_base_patch16", 512, 1),
    ("samvit_base_patch16", 1024, 1),
    ("twins_svt_small", 224, 8),
    ("davit_tiny", 224, 8),
    ("hiera_tiny_224", 224, 8),
    ("swinv2_tiny_window8_256", 256, 8),
    ("gcvit_tiny", 224, 8),
    ("maxvit_tiny_rw_224", 224, 8),
    ("torchvision.maxvit_t", 224, 8),
    ("torchvision.swin_t", 224, 8),
    ("torchvision.swin_v2_t", 256, 8),
    ("transformers.SamVisionModel", 512, 1),
    ("transformers.DonutSwinForImageClassification", 224, 8),
    ("transformers.SwinForImageClassification", 224, 8),
    ("transformers.Swinv2ForImageClassification", 224, 8),
]


def cases(models: Iterable[Model], *deployed: str) -> Iterator[ModelCase]:
    for op, px, batch in models:
        for dtype in DTYPES:
            yield ModelCase(op=op, dtype=dtype, deployed=deployed, **_size(px, batch))


def steps() -> Iterator[ModelCase]:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    for op, px, batch in FEW:
        yield ModelCase(op=op, dtype=dtype, backward=True, compile=False, **_size(px, batch // 2))


def _size(px: int, batch: int) -> dict[str, Any]:
    return {"name": f"{px} px", "px": px, "batch": batch if DEVICE == "cpu" else 64 * batch}


@parametrize(cases(FEW, "onnxruntime", "openvino"), peers)
def test_family(measure, case, peer):
    measure(build, case, peer)


@parametrize(steps(), peers)
def test_family_training(measure, case, peer):
    measure(build, case, peer)


@pytest.mark.families
@parametrize(cases(MORE, "openvino"), peers)
def test_more_families(measure, case, peer):
    measure(build, case, peer)
