"""The passes between the matmuls: residual sum with LayerNorm, bias with GELU, the last LayerNorm with its mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import COMPILE_MODES, DEVICE, DTYPES, Case, Peers, Problem, Run, compiled, parametrize
from torch import Tensor

from nest_fast import add_layer_norm, bias_gelu, layer_norm_mean, reference
from nest_fast.ops._choice import IMPLS


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
    # On a CPU they are plain PyTorch: one case each shows it.
    for op in OPS:
        for dtype in DTYPES if DEVICE == "cuda" else DTYPES[:1]:
            for backward in (False, True) if DEVICE == "cuda" else (False,):
                for name, (tokens, channels) in list(LEVELS.items())[: None if DEVICE == "cuda" else 1]:
                    yield PassCase(
                        op=op,
                        name=name,
                        batch=256 if DEVICE == "cuda" else 8,
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
    plain = getattr(reference, case.op)
    modes = COMPILE_MODES if DEVICE == "cuda" else {}
    return {
        "reference": lambda: _run(case, plain),
        **{
            "nest_fast" if impl == "auto" else f"nest_fast {impl}": partial(
                lambda impl: _run(case, partial(OPS[case.op], impl=impl)), impl
            )
            for impl in IMPLS
            if impl != "reference"
        },
        **{name: partial(lambda mode: _run(case, compiled(plain, mode)), mode) for name, mode in modes.items()},
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
        batched=tuple(shape[0] == case.batch for shape in inputs),
        per_sample=len(results[case.op]) + (rowwise if case.backward else 0),
        exact=_run(case, getattr(reference, case.op)),
        yardstick="reference",
        peers=peers(case),
    )


@parametrize(cases(), peers)
def test_pass(measure, case, peer):
    measure(build, case, peer)
