"""The passes between a GPU's matmuls: residual sum with LayerNorm, bias with GELU, the last LayerNorm with its mean.

On a CPU all three are plain PyTorch, so there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import COMPILE_MODES, DEVICE, DTYPES, Case, Peers, Problem, Run, compiled, parametrize
from torch import Tensor

from nest_fast import add_layer_norm, bias_gelu, layer_norm_mean, reference


@dataclass(frozen=True, kw_only=True)
class PassCase(Case):
    """``op`` on ``tokens`` an image with ``channels``."""

    tokens: int
    channels: int


OPS: dict[str, Callable[..., Any]] = {
    "add_layer_norm": add_layer_norm,
    "bias_gelu": bias_gelu,
    "layer_norm_mean": layer_norm_mean,
}
# name: tokens of an image, channels
LEVELS = {"NesT-T L1": (16 * 196, 96), "NesT-B L1": (16 * 196, 128), "NesT-B L3": (196, 512)}


def cases():
    for op in OPS if DEVICE == "cuda" else ():
        for dtype in DTYPES:
            for backward in (False, True):
                for name, (tokens, channels) in LEVELS.items():
                    yield PassCase(
                        op=op,
                        name=name,
                        batch=256,
                        dtype=dtype,
                        backward=backward,
                        tokens=tokens,
                        channels=channels * (4 if op == "bias_gelu" else 1),
                    )


def _run(case: PassCase, op: Callable[..., Any]) -> Run:
    """``case.run``, also of the operation with two results."""
    if case.op != "add_layer_norm":
        return case.run(op)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        if not case.backward:
            with torch.no_grad():
                return op(*inputs)
        *tensors, dsum, dnormed = inputs
        leaves = [x.detach().requires_grad_() for x in tensors]
        outs = op(*leaves)
        return (*outs, *torch.autograd.grad(outs, leaves, (dsum, dnormed)))

    return run


def peers(case: PassCase) -> Peers:
    plain, op = getattr(reference, case.op), OPS[case.op]

    def compiled_in(mode: str) -> Callable[[], Run]:
        return lambda: _run(case, compiled(plain, mode))

    return {
        "reference": lambda: _run(case, plain),
        "nest_fast": lambda: _run(case, op),
        "nest_fast triton": lambda: _run(case, partial(op, impl="triton")),
        **{name: compiled_in(mode) for name, mode in COMPILE_MODES.items()},
    }


def build(case: PassCase) -> Problem:
    rows, vector = (case.batch, case.tokens, case.channels), (case.channels,)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "add_layer_norm": [rows, rows, vector, vector],
        "bias_gelu": [rows, vector],
        "layer_norm_mean": [rows, vector, vector],
    }
    results: dict[str, list[tuple[int, ...]]] = {
        "add_layer_norm": [rows, rows],
        "bias_gelu": [rows],
        "layer_norm_mean": [(case.batch, case.channels)],
    }
    inputs = [*shapes[case.op], *(results[case.op] if case.backward else [])]
    rowwise = sum(shape == rows for shape in shapes[case.op])
    return Problem(
        inputs=tuple(torch.randn(shape, device=DEVICE).to(case.dtype) for shape in inputs),
        has_batch=tuple(shape[0] == case.batch for shape in inputs),
        per_sample_results=len(results[case.op]) + (rowwise if case.backward else 0),
        exact=_run(case, getattr(reference, case.op)),
        yardstick="reference",
        peers=peers(case),
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="plain PyTorch on a CPU")  # of the one item that no case makes
@parametrize(cases(), peers)
def test_pass(measure, case, peer):
    measure(build, case, peer)
