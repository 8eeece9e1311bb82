"""What the machine can do at all: copy bandwidth and matmul rate, to hold the other figures against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import DEVICE, DTYPES, Case, Problem, Run, forward, parametrize
from torch import Tensor

# On a CPU as large as the operations' tensors, which its caches hold; on CUDA larger than any cache.
BYTES = 2**23 if DEVICE == "cpu" else 2**30
EDGE = 1024 if DEVICE == "cpu" else 8192


def build(case: Case) -> Problem:
    if case.op == "copy":
        x = torch.ones(BYTES // case.dtype.itemsize, device=DEVICE, dtype=case.dtype)
        out = torch.empty_like(x)
        # Into memory that is there already: fresh memory on a CPU costs more than the copy.
        copy = forward(lambda x: out.copy_(x))
        return _ceiling((x,), (True,), copy, torch.clone)
    matrices = tuple(torch.randn(EDGE, EDGE, device=DEVICE, dtype=case.dtype) for _ in range(2))
    return _ceiling(matrices, (True, False), forward(torch.matmul), torch.matmul)


def _ceiling(
    inputs: tuple[Tensor, ...], has_batch: tuple[bool, ...], run: Run, exact: Callable[..., Tensor]
) -> Problem:
    return Problem(
        inputs=inputs,
        has_batch=has_batch,
        per_sample_results=1,
        exact=forward(exact),
        yardstick="torch",
        peers={"torch": lambda: run},
        chunk_size=inputs[0].shape[0],
        seconds=2.0,
    )


CASES = [
    Case(op=op, name=f"{BYTES >> 20} MiB" if op == "copy" else f"{EDGE} x {EDGE}", batch=1, dtype=dtype)
    for op in ("copy", "matmul")
    for dtype in DTYPES
]


@parametrize(CASES, lambda case: ["torch"])
def test_ceilings(measure, case, peer):
    measure(build, case, peer)
