"""mlp_layer in Triton: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, DTYPES, assert_stays_inside_its_buffers, in_double
from helpers.layer_kernel_tests import *  # noqa: F403
from helpers.layer_kernel_tests import on_device
from helpers.layer_tests import LUCK, assert_accurate, mlp_inputs
from nest_fast import mlp_layer, reference
from nest_fast.kernels.mlp_layer import mlp_layer_fwd
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
triton = partial(mlp_layer, impl="triton")


def draw(*sizes, dtype=torch.float32, biases=True):
    """(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias), options."""
    return on_device(mlp_inputs(*sizes, dtype=dtype), biases)


@pytest.fixture
def layer_of():
    return lambda *sizes, **more: (mlp_layer, *draw(*sizes, 40, **more))


# Rows in several tiles, the last one partial; C and hidden features that fill their tiles, and that do not.
@pytest.mark.parametrize(
    ("sizes", "dtype", "biases"),
    [
        ((1, 2, 20, 64, 128, "gelu_tanh"), torch.float32, True),
        ((2, 1, 98, 96, 384, "gelu"), torch.bfloat16, True),
        ((1, 1, 40, 96, 200, "gelu"), torch.float32, False),
        ((1, 2, 65, 100, 130, "gelu_tanh"), torch.float16, True),
        ((2, 4, 16, 128, 512, "gelu_tanh"), torch.bfloat16, False),
        ((1, 1, 130, 192, 256, "gelu"), torch.float16, True),
        ((1, 1, 40, 256, 256, "gelu"), torch.bfloat16, True),
    ],
    ids=str,
)
def test_mlp_layer_is_as_accurate_as_pytorch(sizes, dtype, biases):
    tensors, options = draw(*sizes, dtype=dtype, biases=biases)
    assert_accurate(mlp_layer, tensors, options | {"branch_scale": 1.7}, impl="triton")


@settings(max_examples=15)
@given(data=st.data())
def test_mlp_layer_of_any_shape(data):
    rows, C, hidden = data.draw(st.tuples(st.integers(1, 150), st.integers(1, 70), st.integers(1, 90)))
    dtype = data.draw(st.sampled_from([*DTYPES.values()]))
    activation = data.draw(st.sampled_from(["gelu", "gelu_tanh"]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    tensors, options = draw(1, 1, rows, C, hidden, activation, dtype=dtype, biases=data.draw(st.booleans()))
    assert_accurate(mlp_layer, tensors, options, LUCK * torch.finfo(dtype).eps, impl="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
def test_mlp_layer_keeps_special_values_of_a_bias():
    """Of a hidden feature: inf times fc2's weights. PyTorch's GELU of inf is NaN in float32 with AVX-512."""
    tensors, options = draw(2, 3, 5, 24, 40)
    tensors[4][7] = math.inf
    out = mlp_layer(*tensors, **options, impl="triton")
    assert torch.equal(out, mlp_layer(*in_double(tensors), **options, impl="reference").float())
    assert not out.isfinite().any()


def test_mlp_layer_repeats_bit_by_bit():
    """A row of a tile is computed alike beside any others."""
    tensors, options = draw(2, 1, 150, 24, 40, dtype=torch.bfloat16)
    first = triton(*tensors, **options)
    assert torch.equal(triton(*tensors, **options), first)
    assert torch.equal(triton(tensors[0][:1, :, :77], *tensors[1:], **options), first[:1, :, :77])


@pytest.mark.parametrize(("C", "hidden", "dtype"), [(20, 70, torch.bfloat16), (100, 64, torch.float32)])
def test_mlp_layer_stays_inside_its_buffers(C, hidden, dtype):
    tensors, _ = draw(1, 1, 45, C, hidden, dtype=dtype)

    def everything(copy):
        x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias = map(copy, tensors)
        return [mlp_layer_fwd(x, norm_weight, norm_bias, 1e-6, fc1, fc1_bias, False, fc2, fc2_bias, 1.0)]

    assert_stays_inside_its_buffers(everything)


def test_mlp_layer_of_nothing_hidden():
    tensors, options = draw(2, 3, 4, 8, 0)
    torch.testing.assert_close(triton(*tensors, **options), mlp_layer(*tensors, **options, impl="reference"))


# --- what PyTorch does with the operation -----------------------------------------------------------------------------


def test_mlp_layer_opcheck():
    (x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias), _ = draw(2, 3, 5, 24, 40)
    for bias in (fc1_bias, None):
        call = (x, norm_weight, norm_bias, 1e-6, fc1, bias, True, fc2, fc2_bias, 0.5)
        torch.library.opcheck(OPS.mlp_layer_triton_fwd.default, call)


def test_mlp_layer_compiles_in_one_graph_and_exports_with_a_dynamic_batch():
    tensors, options = draw(2, 3, 5, 24, 40)

    class Module(torch.nn.Module):
        def forward(self, x):
            return triton(x, *tensors[1:], **options)

    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(Module(), (tensors[0],), dynamic_shapes=({0: batch},)).module()
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 3, 5, 24, device=DEVICE)
        wanted = Module()(x)
        assert torch.equal(compiled(x), wanted)
        assert torch.equal(exported(x), wanted)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is none of float32, float16, bfloat16"),
        ({"C": 257}, "C = 257 channels are over 256"),
        ({"post_norm": True}, "the LayerNorm comes last"),
        ({"autocast": True}, "autocast is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mlp_layer_an_explicit_choice_never_falls_back(change, why):
    tensors, options = draw(1, 1, 3, change.get("C", 24), 40, dtype=change.get("dtype", torch.float32))
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=change.get("autocast", False)),
        pytest.raises(RuntimeError, match=f"^impl: 'triton' cannot run mlp_layer here: {why}$"),
    ):
        triton(*tensors, **options, post_norm=change.get("post_norm", False))


def test_mlp_layer_refuses_weights_whose_offsets_would_not_fit():
    C, hidden = 256, 2**23
    x, norm, fc2 = torch.zeros(1, C), torch.zeros(C), torch.zeros(()).expand(C, hidden)
    with pytest.raises(RuntimeError, match="a weight has 2\\^31 numbers or more"):
        triton(*(t.to(DEVICE) for t in (x, norm, norm, fc2.T)), None, fc2.to(DEVICE), None)


@pytest.mark.gpu
def test_mlp_layer_offsets_are_64_bit():
    rows, C = 2**31 // 128 + 77, 128
    tensors, options = draw(1, 1, 1, C, 32, dtype=torch.bfloat16)
    x = torch.zeros(rows, C, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(C)
    out = triton(x, *tensors[1:], **options)
    for row in (0, rows - 1):
        assert relative_error(out[row], reference.mlp_layer(x[row], *tensors[1:], **options)) < 1e-2
