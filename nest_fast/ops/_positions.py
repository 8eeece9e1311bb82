"""Decomposed relative positions as dimensions of q and k, for attention that adds nothing to its scores.

The score of a query and a key gets a number of the query for the key's row, and one for its column. With a 1 in k at
the key's own row and column, and these numbers in q, that is part of the product of q and k: no bias is ever stored,
which for 64 x 64 tokens would be 4096 x 4096 numbers a head, and every kernel has its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast import reference
from nest_fast.ops._windows import computed
from nest_fast.reference import Windows

__all__ = ["joined"]


def joined(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    rel_h: Tensor,
    rel_w: Tensor,
    windows: Windows | None,
    one_dim: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``q, k, v, pad_k, pad_v`` of block_attention, q and k with more dimensions, whose product is what ``rel_h`` and
    ``rel_w`` add to that of the others.

    Theirs are a multiple of 16, which a GPU reads in wide loads; with ``one_dim`` v has as many, zeros behind its own.
    """
    q, k, v, pad_k, pad_v = tensors
    h, w = rel_h.shape[-1], rel_w.shape[-1]
    cut = Windows((h, w), (h, w)) if windows is None else windows
    more = -(q.shape[-1] + h + w) % 16
    places = computed(_places, cut, more, k.device, k.dtype)
    q, k = F.pad(torch.cat((q, rel_h, rel_w), -1), (0, more)), _cat(k, places[: cut.rows])
    if one_dim:
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    if windows is not None:
        pads = (x.new_zeros(1, *x.shape[2:]) if pad is None else pad for x, pad in ((tensors[1], pad_k), (v, pad_v)))
        pad_k, pad_v = (pad.expand(windows.pads, -1, -1) for pad in pads)
        pad_k, pad_v = _cat(pad_k, places[windows.rows :]), F.pad(pad_v, (0, v.shape[-1] - pad_v.shape[-1]))
    return q, k, v, pad_k, pad_v


def _places(windows: Windows, more: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A 1 at the row and at the column that a token has in its window, of those of the image and then of padding."""
    place = reference.window_rows(windows, device).flatten().argsort() % windows.tokens
    (h, w), (y, x) = windows.window, (place // windows.window[1], place % windows.window[1])
    rows, columns = torch.eye(h, dtype=dtype, device=device)[y], torch.eye(w, dtype=dtype, device=device)[x]
    return F.pad(torch.cat((rows, columns), -1), (0, more))


def _cat(x: Tensor, places: Tensor) -> Tensor:
    """x ``(..., rows, heads, head_dim)`` with the places ``(rows, dims)`` of its rows."""
    return torch.cat((x, places.unsqueeze(1).expand(*x.shape[:-1], -1)), -1)
