"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operations: the matmuls of plain PyTorch, no more.

A gradient that was not computed has no elements and counts nothing; what a kernel computes twice counts once.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys

import torch

_COUNTER = "torch.utils.flop_counter"


def _linear(rows_shape, weight_shape):
    """``rows @ weight^T``; the gradient of either costs the same."""
    return 2 * math.prod(rows_shape) * weight_shape[0]


def _attention(q_shape, count=2):
    """``count`` products ``(N, head_dim)`` by ``(N, N)`` for every block and head; N comes third, as in PyTorch's."""
    return count * 2 * math.prod(q_shape) * q_shape[2]


def _convolution(image_shape, weight_shape):
    """A 3 x 3 convolution whose input ``(B, …, C)`` has as many pixels as its output, or the gradient of that."""
    return 2 * math.prod(image_shape[:-1]) * math.prod(weight_shape)


def _gradients(rows_shape, weight_shape, drows, dweight):
    return _linear(rows_shape, weight_shape) * sum(math.prod(shape) > 0 for shape in (drows, dweight))


def _attention_layer(x, norm_weight, norm_bias, eps, qkv, qkv_bias, proj, proj_bias, tokens, *_, out_shape=None):
    return _linear(x, qkv) + _attention((1, 1, tokens, x[0] // max(tokens, 1), x[1])) + _linear(x, proj)


def _attention_layer_bwd(dout, x, qkv_out, attended, lse, qkv, proj, tokens, *_, out_shape=None):
    dx, dqkv, _, dproj, _ = out_shape
    inner = _attention((1, 1, tokens, x[0] // max(tokens, 1), x[1]), 4)
    return _gradients(x, qkv, dx, dqkv) + inner + _gradients(x, proj, x, dproj)


def _mlp_layer(x, norm_weight, norm_bias, eps, fc1, fc1_bias, activation, fc2, *_, out_shape=None):
    return _linear(x, fc1) + _linear((x[0], fc1[0]), fc2)


def _mlp_layer_bwd(dout, x, hidden, fc1, activation, fc2, *_, out_shape=None):
    dx, dfc1, _, dfc2, _ = out_shape
    return _gradients(x, fc1, dx, dfc1) + _gradients(hidden, fc2, hidden, dfc2)


def _block_attention(q, *_, out_shape=None, **options):
    return _attention(q)


def _block_attention_bwd(dout, q, *_, out_shape=None, **options):
    return _attention(q, 4)


def _block_aggregate(x, conv_weight, *_, out_shape=None):
    return _convolution(x, conv_weight)


def _linear_pointwise(x, *_, out_shape=None):
    return 2 * math.prod(out_shape) * x[-1]


_FORMULAS = {
    "attention_layer_cpp": _attention_layer,
    "attention_layer_cpp_bwd": _attention_layer_bwd,
    "mlp_layer_cpp": _mlp_layer,
    "mlp_layer_cpp_bwd": _mlp_layer_bwd,
    "block_attention_cpp_fwd": _block_attention,
    "block_attention_cpp_bwd": _block_attention_bwd,
    "block_attention_triton_fwd": _block_attention,
    "block_attention_triton_bwd": _block_attention_bwd,
    "block_aggregate_cpp_fwd": _block_aggregate,
    "block_aggregate_cpp_dx": _block_aggregate,
    "block_aggregate_triton_fwd": _block_aggregate,
}


def register() -> None:
    """The formulas, now or as soon as somebody imports the counter: its import imports Triton, which takes its time."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WithCounter())


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {getattr(torch.ops.nest_fast, name): formula for name, formula in _FORMULAS.items()}
    # What the operations call of PyTorch's and PyTorch has no formula for.
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear_pointwise
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _block_attention
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward] = _block_attention_bwd
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)  # type: ignore[arg-type]


class _WithCounter(importlib.abc.MetaPathFinder):
    """Finds nothing itself; steps aside and registers once the counter has been loaded by who finds it."""

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
