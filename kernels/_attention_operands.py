"""What attention's kernels are given: views of tensors, the cut of an image, and what is compiled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nest_fast.kernels._attention import Spec
from nest_fast.kernels._windows import Cut, cut, sizes

__all__ = [
    "Addends", "Problem", "Scale", "View", "addends", "dense", "kinds", "operands", "problem", "scales_of", "sum_pads",
    "view",
]  # fmt: skip

# A View is a (B, T, N, heads, HEAD_DIM) tensor whose last dimension is dense, with its other strides; and of keys and
# values in windows that reach beyond an image, the same for what is there. Launching takes a NamedTuple apart in 2 us
# more than a plain tuple.
View = tuple[Tensor | int, ...]

Addends = tuple[Tensor | None, Tensor | None, int]

# A number; of cosines those of the heads, or None; and where a backward's programs leave parts of their gradients.
Scale = tuple[float, Tensor | None, Tensor | None]


class Problem(NamedTuple):
    """What the forward and the backward are asked for: the blocks, and what is compiled in."""

    B: int
    T: int
    N: int
    heads: int
    per_block: int  # programs for a block, of spec.HEADS heads each
    pads: int  # tokens of an image's windows that are beyond it
    cut: Cut | None
    spec: Spec

    @property
    def lse(self) -> tuple[int, ...]:
        """The shape of what the forward keeps for the backward."""
        return (self.B, self.T, self.heads, self.N, *(2,) * self.spec.ADDS)

    @property
    def blocks(self) -> tuple[int, int, Cut | None]:
        return self.T, self.per_block, self.cut

    @property
    def queries(self) -> int:
        """Of a program."""
        return self.spec.HEADS * self.N

    @property
    def programs(self) -> int:
        return self.B * self.T * self.per_block


def problem(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, windows: Sequence[int]
) -> Problem:
    B, T, N, heads, head_dim = q.shape
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    width, pads, regions, cuts = 0, 0, False, None
    if windows and windows[2]:
        (T, N, pads), width, cuts = sizes(windows), windows[3], cut(windows)
        regions = mask is None and any(windows[4:6])
    adds = bias is not None or mask is not None or regions
    per_block = k.shape[3]
    spec = Spec(N, head_dim, heads // per_block, adds, scale > 1e-6, tf32, width, pads > 0, regions)
    return Problem(B, T, N, heads, per_block, pads, cuts, spec)


def view(x: Tensor, padding: Tensor | None = None) -> View:
    b, t, n, h, _ = x.stride()
    return (x, b, t, n, h) if padding is None else (x, b, t, n, h, *view(padding))


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def operands(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None
) -> tuple[View, View, View]:
    """Views of q, k and v, of all heads; of padding, where there is any, of all images."""
    if k.shape != q.shape:
        k, v = k.expand_as(q), v.expand_as(q)
    if not problem.pads or pad_k is None or pad_v is None:
        return view(dense(q)), view(dense(k)), view(dense(v))
    shape = problem.B, 1, problem.pads, *q.shape[3:]
    pad_k, pad_v = (dense(x).expand(shape) for x in (pad_k, pad_v))
    return view(dense(q)), view(dense(k), pad_k), view(dense(v), pad_v)


def sum_pads(each: Tensor, dpads: Tensor) -> Tensor:
    """What ``dpads`` is to be, of the gradients of each token of padding ``(2, B, 1, pads, heads, head_dim)``."""
    total = each.sum((1, 2), dtype=torch.float32)
    return (total.sum(1, keepdim=True) if dpads.shape[1] == 1 else total).to(dpads.dtype)


def addends(bias: Tensor | None, mask: Tensor | None) -> Addends:
    if mask is not None:
        mask = mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return None if bias is None else bias.contiguous(), mask, 1 if mask is None else mask.shape[0]


def scales_of(scale: float, scales: Tensor | None, gradients: Tensor | None = None) -> Scale:
    return scale, None if scales is None else scales.contiguous(), gradients


def kinds(added: Addends, scales: Tensor | None, *keys: View) -> tuple[bool | str | torch.dtype | None, ...]:
    """What the kernels are compiled for beside a Spec: what is added, which of the views have padding, and whether
    by cosines."""
    bias, mask, _ = added
    padded = [len(view) > 5 for view in keys]
    by_cosines = () if scales is None else ("cosine",)
    return bias is None, None if mask is None else mask.dtype, *(padded if any(padded) else ()), *by_cosines
