"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operations: the matmuls of plain PyTorch, no more.

A gradient that was not computed has no elements and counts as 0; what a kernel computes twice counts once.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable

import torch

_COUNTER = "torch.utils.flop_counter"


# The formula of each registered operation, from its arguments' shapes.
FORMULAS: dict[str, Callable[..., int]] = {}


def linear(rows_shape, weight_shape):
    """``rows @ weight^T``; the gradient of either costs the same."""
    return 2 * math.prod(rows_shape) * weight_shape[0]


def linear_gradients(rows_shape, weight_shape, drows, dweight):
    """The gradients of rows and weight, none for one of the shape ``(0,)``."""
    return linear(rows_shape, weight_shape) * sum(math.prod(shape) > 0 for shape in (drows, dweight))


def attention(q_shape, count=2):
    """``count`` products ``(N, head_dim)`` by ``(N, N)`` for every block and head; N comes third, as in PyTorch's."""
    return count * 2 * math.prod(q_shape) * q_shape[2]


def convolution(image_shape, weight_shape):
    """A 3 x 3 convolution whose input ``(B, …, C)`` has as many pixels as its output, or the gradient of that."""
    return 2 * math.prod(image_shape[:-1]) * math.prod(weight_shape)


def _addmm_activation(bias, x, weight, *_, **unused):
    return 2 * math.prod(x) * weight[1]


def _sdpa(q, *_, out_shape=None, **options):
    return attention(q)


def _sdpa_backward(dout, q, *_, out_shape=None, **options):
    return attention(q, 4)


def _linear_pointwise(x, *_, out_shape=None):
    return 2 * math.prod(out_shape) * x[-1]


def register() -> None:
    """Now, or as soon as somebody imports the counter, which we do not: it imports Triton, which is slow."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WithCounter())


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {getattr(torch.ops.nest_fast, name): formula for name, formula in FORMULAS.items()}
    # Operations of PyTorch that ours call and PyTorch has no formula for.
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear_pointwise
    if hasattr(torch.ops.aten, "_addmm_activation"):
        formulas[torch.ops.aten._addmm_activation] = _addmm_activation
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _sdpa
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward] = _sdpa_backward
    for op, formula in formulas.items():
        if op not in flop_registry:  # as a later PyTorch may know it
            register_flop_formula(op)(formula)


class _WithCounter(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders load the counter, and registers after that."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module):
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
