"""Attention inside blocks, from a packed projection as in a model: NesT's levels, the 32 px multi-query model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from harness import DEVICE, DTYPES, Case, Peers, Problem, Run, compiled, compiled_peers, impl_peers, parametrize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nest_fast import block_attention, reference
from nest_fast.ops.block_attention import IMPLS

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """``blocks`` of ``tokens`` with ``heads`` of 32 or 64 channels; ``kv_heads`` is 1 for multi-query."""

    blocks: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    compile: bool


# name: blocks, tokens, heads, kv_heads, head_dim
SHAPES = {
    "NesT-T L1": (16, 196, 3, 3, 32),
    "NesT-T L2": (4, 196, 6, 6, 32),
    "NesT-T L3": (1, 196, 12, 12, 32),
    "NesT-B L1": (16, 196, 4, 4, 32),
    "NesT-B L2": (4, 196, 8, 8, 32),
    "NesT-B L3": (1, 196, 16, 16, 32),
    "32 px multi-query L1": (64, 16, 3, 1, 64),
}

# By tokens: images in a batch.
BATCH = {196: 256, 16: 1024} if DEVICE == "cuda" else {196: 8, 16: 32}


def cases():
    for dtype in DTYPES:
        for backward in (False, True):
            for name, (blocks, tokens, heads, kv_heads, head_dim) in SHAPES.items():
                if DEVICE == "cpu" and name.startswith("NesT-B"):
                    continue
                first = name == "NesT-T L1"
                if DEVICE == "cpu" and backward and not first:
                    continue
                yield AttentionCase(
                    op="block_attention",
                    name=name,
                    batch=BATCH[tokens],
                    dtype=dtype,
                    backward=backward,
                    blocks=blocks,
                    tokens=tokens,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    compile=DEVICE == "cuda" or (first and not backward),
                )


def peers(case: AttentionCase) -> Peers:
    def peer(attention: Attention) -> Callable[[], Run]:
        return lambda: case.run(_on_packed(case, attention))

    found = {
        "reference": peer(reference.block_attention),
        **impl_peers(case, IMPLS, lambda impl: _on_packed(case, partial(block_attention, impl=impl))),
        **(compiled_peers(case, _on_packed(case, reference.block_attention)) if case.compile else {}),
    }
    if case.kv_heads == case.heads:
        found["timm"] = peer(_timm)
    if DEVICE == "cuda":
        found["sdpa flash"] = peer(_sdpa(SDPBackend.FLASH_ATTENTION))
        found["sdpa cudnn"] = peer(_sdpa(SDPBackend.CUDNN_ATTENTION))
        found["sdpa efficient"] = peer(_sdpa(SDPBackend.EFFICIENT_ATTENTION))
        found["flex_attention"] = lambda: case.run(_on_packed(case, _flex()))
    return found


def _on_packed(case: AttentionCase, attention: Attention) -> Callable[[Tensor], Tensor]:
    """``attention`` of q, k, v packed in ``(B, T, N, (heads + 2 kv_heads) * head_dim)``; contiguous, for ``proj``."""
    sizes = (case.heads, case.kv_heads, case.kv_heads)

    def run(packed: Tensor) -> Tensor:
        return attention(*packed.unflatten(-1, (-1, case.head_dim)).split(sizes, dim=3)).contiguous()

    return run


def _timm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What timm's ``nest.Attention`` does between its projections, 5-D and head-minor; only the view back is added."""
    B, T, N, heads, head_dim = q.shape
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 4, 1).reshape(B, T, N, heads * head_dim)
    return out.unflatten(-1, (head_dim, heads)).transpose(-1, -2)


def _four_d(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[3]
    q, k, v = (x.flatten(0, 1).transpose(1, 2).expand(-1, heads, -1, -1) for x in (q, k, v))
    return q, k, v


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*_four_d(q, k, v))
        return out.transpose(1, 2).unflatten(0, q.shape[:2])

    return attention


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    flex = compiled(flex_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(*_four_d(q, k, v)).transpose(1, 2).unflatten(0, q.shape[:2])

    return attention


def build(case: AttentionCase) -> Problem:
    rows = (case.batch, case.blocks, case.tokens)
    inputs = [torch.randn(*rows, (case.heads + 2 * case.kv_heads) * case.head_dim, device=DEVICE, dtype=case.dtype)]
    if case.backward:
        inputs.append(torch.randn(*rows, case.heads, case.head_dim, device=DEVICE, dtype=case.dtype))
    return Problem(
        inputs=tuple(inputs),
        has_batch=(True,) * len(inputs),
        per_sample_results=len(inputs),
        exact=case.run(_on_packed(case, reference.block_attention)),
        yardstick="reference",
        peers=peers(case),
    )


@parametrize(cases(), peers)
def test_block_attention(measure, case, peer):
    measure(build, case, peer)
