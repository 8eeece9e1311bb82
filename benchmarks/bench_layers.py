"""The two halves of a transformer layer, each with its LayerNorm before and its residual sum after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import DEVICE, DTYPES, Case, Peers, Problem, compiled_peers, impl_peers, parametrize
from torch import Tensor

from nest_fast import attention_layer, mlp_layer, reference
from nest_fast.ops.attention_layer import IMPLS as ATTENTION_IMPLS
from nest_fast.ops.mlp_layer import IMPLS as MLP_IMPLS
from nest_fast.testing import import_timm


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """``op`` on ``blocks`` of ``tokens`` with ``channels``."""

    blocks: int
    tokens: int
    channels: int
    heads: int
    compile: bool


OPS: dict[str, Callable[..., Tensor]] = {"attention_layer": attention_layer, "mlp_layer": mlp_layer}
IMPLS = {"attention_layer": ATTENTION_IMPLS, "mlp_layer": MLP_IMPLS}
# name: blocks, channels, heads, at 14 x 14 tokens a block
LEVELS = {"NesT-T L1": (16, 96, 3), "NesT-T L2": (4, 192, 6), "NesT-T L3": (1, 384, 12)}
WIDE = {"NesT-B L1": (16, 128, 4), "NesT-B L2": (4, 256, 8), "NesT-B L3": (1, 512, 16)}


def cases():
    shapes = LEVELS if DEVICE == "cpu" else LEVELS | WIDE
    for op in OPS:
        for dtype in DTYPES:
            for backward in (False, True):
                for name, (blocks, channels, heads) in shapes.items():
                    first = name == "NesT-T L1"
                    if DEVICE == "cpu" and backward and not first:
                        continue
                    yield LayerCase(
                        op=op,
                        name=name,
                        batch=8 if DEVICE == "cpu" else 256,
                        dtype=dtype,
                        backward=backward,
                        blocks=blocks,
                        tokens=196,
                        channels=channels,
                        heads=heads,
                        compile=DEVICE == "cuda" or (first and not backward),
                    )


def peers(case: LayerCase) -> Peers:
    plain = _layer(case, getattr(reference, case.op))
    op = OPS[case.op]
    return {
        "reference": lambda: case.run(plain),
        **impl_peers(case, IMPLS[case.op], lambda impl: _layer(case, partial(op, impl=impl))),
        **(compiled_peers(case, plain) if case.compile else {}),
        **({"timm": lambda: case.run(_timm_attention(case))} if case.op == "attention_layer" else {}),
    }


def _layer(case: LayerCase, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(op, num_heads=case.heads) if case.op == "attention_layer" else op


def _timm_attention(case: LayerCase) -> Callable[..., Tensor]:
    """timm's: 5-D attention, and an output projection whose input is ordered (head_dim, heads)."""
    module = import_timm().models.nest.Attention(case.channels, case.heads, qkv_bias=True)
    module = module.to(DEVICE, case.dtype)
    names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")

    def run(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *weights: Tensor) -> Tensor:
        qkv_weight, qkv_bias, proj_weight, proj_bias = weights
        proj_weight = proj_weight.unflatten(1, (case.heads, -1)).transpose(1, 2).flatten(1)
        y = torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-6)
        parameters = dict(zip(names, (qkv_weight, qkv_bias, proj_weight, proj_bias), strict=True))
        return x + torch.func.functional_call(module, parameters, (y,))

    return run


def build(case: LayerCase) -> Problem:
    C = case.channels
    x = (case.batch, case.blocks, case.tokens, C)
    inner, outer = (3 * C, C) if case.op == "attention_layer" else (4 * C, 4 * C)
    shapes = [x, (C,), (C,), (inner, C), (inner,), (C, outer), (C,)]
    scales = [1.0, 1.0, 0.1, C**-0.5, 0.1, outer**-0.5, 0.1]
    if case.backward:
        shapes.append(x)
        scales.append(1.0)
    return Problem(
        inputs=tuple(
            (torch.randn(s, device=DEVICE) * scale).to(case.dtype) for s, scale in zip(shapes, scales, strict=True)
        ),
        has_batch=(True, *(False,) * 6, True)[: len(shapes)],
        per_sample_results=2 if case.backward else 1,
        exact=case.run(_layer(case, getattr(reference, case.op))),
        yardstick="reference",
        peers=peers(case),
    )


@parametrize(cases(), peers)
def test_layer(measure, case, peer):
    measure(build, case, peer)
