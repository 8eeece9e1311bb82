"""What is tested of attention_layer as of mlp_layer in Triton; their files import it and say which layer it is.

Such a file has a fixture: ``layer_of``, called with B, T, N, C and a dtype, returns the function, its tensors and its
options.
"""

import math
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.common import DEVICE, in_double
from helpers.layer_tests import LUCK, assert_accurate
from helpers.strides import restrided
from nest_fast.testing import relative_error


def on_device(inputs, biases=True):
    """The tensors and options of attention_inputs or mlp_inputs where the kernels run, with or without their biases."""
    tensors, options = inputs
    tensors = [t.to(DEVICE) for t in tensors]
    if not biases:
        tensors[4] = tensors[6] = None
    return tensors, options


def test_of_rows_far_from_zero_in_triton(layer_of):
    """In float32, where the mean is a thousand times the deviation; the branch so large that the sum hides nothing."""
    layer, tensors, options = layer_of(1, 2, 20, 96)
    tensors[0] += 1000.0
    options |= {"branch_scale": 1000.0}
    wide = in_double(tensors)
    branch = layer(*wide, **options, impl="reference") - wide[0]
    assert relative_error(layer(*tensors, **options, impl="triton").double() - wide[0], branch) < 1e-6


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_dtypes_norms_in_float32_in_triton(layer_of, half):
    layer, tensors, options = layer_of(1, 2, 20, 24, dtype=half)
    tensors[1:3] = (t.float() for t in tensors[1:3])
    assert_accurate(layer, tensors, options, LUCK * torch.finfo(half).eps, impl="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
def test_keeps_special_values_where_pytorch_does_in_triton(layer_of):
    layer, tensors, options = layer_of(2, 3, 5, 24)
    for value in (math.nan, math.inf, -math.inf):
        tensors[0][1, 2, 3, 4] = value
        out, wanted = (layer(*tensors, **options, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(out.isnan(), wanted.isnan())
        assert out.isnan().any()


def test_of_any_strides_in_triton(layer_of):
    layer, tensors, options = layer_of(2, 3, 5, 24)
    options |= {"impl": "triton"}
    chance, wanted = random.Random(0), layer(*tensors, **options)
    for _ in range(5):
        strange = [restrided(t, chance, expandable=()) for t in tensors]
        assert not all(t.is_contiguous() for t in strange)
        assert torch.equal(layer(*strange, **options), wanted)
    negated = [torch._neg_view(t) for t in tensors]
    torch.testing.assert_close(layer(*negated, **options), layer(*(-t for t in tensors), **options))


@pytest.mark.parametrize("sizes", [(0, 3, 5, 24), (2, 3, 0, 24)], ids=str)
def test_of_nothing_in_triton(layer_of, sizes):
    layer, tensors, options = layer_of(*sizes)
    ours, plain = (layer(*tensors, **options, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, plain)


def test_counts_the_flops_of_plain_pytorch_in_triton(layer_of):
    layer, tensors, options = layer_of(2, 3, 5, 24)
    counted = []
    for impl in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter:
            layer(*tensors, **options, impl=impl)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
