"""What the tests of attention's kernels share: its softmax, how large the terms of its sums are, NaN around tensors."""

import math

import torch

from helpers.common import in_double


def golden_softmax(q, k, bias, mask, scale):
    """The logarithm of the softmax denominators, and the weights, (B, T, heads, N[, N]), in float64."""
    q, k, bias, mask = in_double((q, k, bias, mask))
    scores = scale * torch.einsum("btnhd,btmhd->bthnm", q, k.expand_as(q))
    scores = scores if bias is None else scores + bias
    if mask is not None:
        mask = mask.repeat(q.shape[1] // mask.shape[0], 1, 1).unsqueeze(1)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(-1), scores.softmax(-1)


def sums_of_terms(dout, q, k, v, weights, scale):
    """What out, dq, dk, dv and dbias would be, did no terms cancel: a sum may be off by some eps of that."""
    kv_heads = k.shape[3], v.shape[3]
    d, q, k, v = (x.double().abs().expand_as(q).transpose(2, 3) for x in (dout, q, k, v))
    out = weights @ v
    ds = weights * (d @ v.mT + (d * out).sum(-1, keepdim=True))
    dk, dv = abs(scale) * ds.mT @ q, weights.mT @ d
    dk, dv = (x.sum(2) if heads == 1 else x for x, heads in zip((dk, dv), kv_heads, strict=True))
    return out, abs(scale) * ds @ k, dk, dv, ds.sum((0, 1))


def amid_nan(x):
    """x with NaN on every side in every dimension."""
    return x.new_full([size + 2 for size in x.shape], math.nan)[(slice(1, -1),) * x.dim()].copy_(x)
