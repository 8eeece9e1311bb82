"""Tensors in memory of any kind."""

import math

import torch


def restrided(x, random, expandable=None):
    """A tensor of the shape of ``x`` in memory of random strides, amid NaN; values of ``x`` but where it is expanded.

    Dimensions in any order, with steps, behind an offset, some of them expanded (stride 0), if among ``expandable``.
    """
    expandable = range(x.dim()) if expandable is None else expandable
    repeated = [d for d in expandable if x.shape[d] > 1 and random.random() < 0.2]
    source = x
    for d in repeated:
        source = source.narrow(d, 0, 1)
    order = random.sample(range(x.dim()), x.dim())
    steps = [random.choice((1, 1, 2, 3)) for _ in order]
    offsets = [random.choice((0, 0, 1)) for _ in order]
    sizes = [source.shape[d] * step + offset for d, step, offset in zip(order, steps, offsets, strict=True)]
    memory = torch.full(sizes, math.nan if x.is_floating_point() else True, dtype=x.dtype, device=x.device)
    memory = memory[tuple(slice(offset, None, step) for step, offset in zip(steps, offsets, strict=True))]
    strange = memory.permute([order.index(d) for d in range(x.dim())])
    return strange.copy_(source).expand(x.shape)
