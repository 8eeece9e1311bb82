"""What the machine can do at all, to hold the other figures against.

On a CPU the rate of products for each set of instructions, on one thread and on all, and of memory read and copied, by
loops of our own; everywhere PyTorch's copy and matmul.
"""

from __future__ import annotations

from collections.abc import Callable

import limits
import pytest
import torch
from harness import DEVICE, DTYPES, SHORT, Case, Problem, Run, forward, parametrize
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


THREADS = sorted({1, torch.get_num_threads()})
# bfloat16 is widened to float32 where there are no instructions for it.
PRODUCTS = [(isa, dtype) for isa in limits.ISAS for dtype in DTYPES if dtype == torch.float32 or isa == "avx512_bf16"]
MOVED = {"read": (BYTES, 0), "copied": (BYTES // 2, BYTES // 2)}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("isa", "dtype"), PRODUCTS, ids=lambda x: SHORT.get(x, x))
def test_peak_of_products(benchmark, isa, dtype, threads):
    peak(benchmark, isa, threads, f"{SHORT[dtype]} by {isa}", lambda: limits.OPS.peak_multiply(dtype))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("how", MOVED)
def test_peak_of_memory(benchmark, how, threads):
    if not limits.ISAS:
        pytest.skip("no loop of our own for this machine")
    peak(benchmark, limits.ISAS[0], threads, f"{BYTES >> 20} MiB {how}", limits.moving(*MOVED[how]))


def peak(benchmark, isa: str, threads: int, case: str, rate: Callable[[], float]) -> None:
    """The best of what ``rate()`` returns; it has a clock of its own."""
    rates: list[float] = []
    with limits.using(isa, threads):
        benchmark.pedantic(lambda: rates.append(rate()), rounds=200, warmup_rounds=1)
    benchmark.extra_info.update(op="peak", case=case, threads=threads, rate=max(rates))
