"""projection_mlp in Triton: in the interpreter on a CPU (conftest switches it on), compiled on a GPU; and its parts."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, assert_stays_inside_its_buffers
from helpers.layer_kernel_tests import *  # noqa: F403
from helpers.layer_kernel_tests import on_device
from helpers.layer_tests import LUCK, assert_accurate, mlp_inputs
from nest_fast import projection_mlp
from nest_fast.kernels.projection_mlp import projection_mlp_fwd
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
HALVES = [torch.float16, torch.bfloat16]
SCALES = {"proj_scale": 0.7, "branch_scale": 1.7}


def layer(x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, attended, proj, proj_bias, **options):
    """With the tensors in the order of mlp_layer's, whose tests it has."""
    mlp = norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias
    return projection_mlp(x, attended, proj, proj_bias, *mlp, **options)


triton = partial(layer, impl="triton")


def draw(*sizes, dtype=torch.float16, biases=True):
    """Of layer: the tensors, and options."""
    tensors, options = on_device(mlp_inputs(*sizes, dtype=dtype), biases)
    C = sizes[3]
    projection = torch.randn(sizes[:4]), torch.randn(C, C) * C**-0.5, 0.3 * torch.randn(C)
    projection = [t.to(DEVICE, dtype) for t in projection]
    return [*tensors, *projection[:2], projection[2] if biases else None], options


@pytest.fixture
def layer_of():
    return lambda *sizes, **more: (layer, *draw(*sizes, 40, **more))


# Rows in several tiles, the last one partial; C and hidden features that fill their tiles, and that do not.
@pytest.mark.parametrize(
    ("sizes", "dtype", "biases"),
    [
        ((1, 3, 49, 64, 128, "gelu_tanh"), torch.bfloat16, True),
        ((1, 1, 196, 96, 384, "gelu"), torch.bfloat16, True),
        ((1, 1, 40, 96, 200, "gelu"), torch.float16, False),
        ((1, 2, 65, 100, 130, "gelu_tanh"), torch.float16, True),
        ((2, 4, 16, 128, 512, "gelu_tanh"), torch.bfloat16, False),
        ((1, 1, 130, 128, 256, "gelu"), torch.float16, True),
    ],
    ids=str,
)
def test_is_as_accurate_as_pytorch(sizes, dtype, biases):
    tensors, options = draw(*sizes, dtype=dtype, biases=biases)
    assert_accurate(layer, tensors, options | SCALES, impl="triton")


def test_of_rows_far_from_zero_in_triton():
    """Rounding the sum loses as much as in plain PyTorch, and no more is lost."""
    tensors, options = draw(1, 2, 20, 96, 40)
    tensors[0] += 1000.0
    assert_accurate(layer, tensors, options | {"branch_scale": 1000.0}, impl="triton")


@settings(max_examples=15)
@given(data=st.data())
def test_of_any_shape(data):
    rows, C, hidden = data.draw(st.tuples(st.integers(1, 150), st.integers(1, 70), st.integers(1, 90)))
    dtype = data.draw(st.sampled_from(HALVES))
    activation = data.draw(st.sampled_from(["gelu", "gelu_tanh"]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    tensors, options = draw(1, 1, rows, C, hidden, activation, dtype=dtype, biases=data.draw(st.booleans()))
    assert_accurate(layer, tensors, options | SCALES, LUCK * torch.finfo(dtype).eps, impl="triton")


def test_repeats_bit_by_bit():
    """A row of a tile is computed alike beside any others."""
    tensors, options = draw(2, 1, 150, 24, 40, dtype=torch.bfloat16)
    first = triton(*tensors, **options)
    assert torch.equal(triton(*tensors, **options), first)
    x, attended = (tensors[n][:1, :, :77] for n in (0, 7))
    assert torch.equal(triton(x, *tensors[1:7], attended, *tensors[8:], **options), first[:1, :, :77])


@pytest.mark.parametrize(("C", "hidden", "dtype"), [(20, 70, torch.bfloat16), (100, 64, torch.float16)])
def test_stays_inside_its_buffers(C, hidden, dtype):
    tensors, _ = draw(1, 1, 45, C, hidden, dtype=dtype)

    def everything(copy):
        x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, *projection = map(copy, tensors)
        norm, mlp = (norm_weight, norm_bias, 1e-6), (fc1, fc1_bias, False, fc2, fc2_bias, 1.0)
        return [projection_mlp_fwd(x, *projection, 0.7, *norm, *mlp)]

    assert_stays_inside_its_buffers(everything)


@pytest.mark.gpu
def test_offsets_are_64_bit():
    rows, C = 2**31 // 128 + 77, 128
    tensors, options = draw(1, 1, 1, C, 32, dtype=torch.bfloat16)
    x = torch.zeros(rows, C, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(C)
    out = triton(x, *tensors[1:7], x, *tensors[8:], **options)
    for row in (0, rows - 1):
        wanted = layer(x[row], *tensors[1:7], x[row], *tensors[8:], **options, impl="reference")
        assert relative_error(out[row], wanted) < 1e-2


# --- what PyTorch does with the operation -----------------------------------------------------------------------------


def test_opcheck():
    x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, *projection = draw(2, 3, 5, 24, 40)[0]
    for bias in (fc1_bias, None):
        call = (x, *projection, 0.7, norm_weight, norm_bias, 1e-6, fc1, bias, True, fc2, fc2_bias, 0.5)
        torch.library.opcheck(OPS.projection_mlp_triton_fwd.default, call)


@pytest.mark.parametrize(("impl", "dtype"), [("auto", torch.float32), ("triton", torch.float16)])
def test_compiles_in_one_graph_and_exports_with_a_dynamic_batch(impl, dtype):
    tensors, options = draw(2, 3, 5, 24, 40, dtype=dtype)

    class Module(torch.nn.Module):
        def forward(self, x):
            return layer(x, *tensors[1:7], 2 * x, *tensors[8:], **options, impl=impl)

    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(Module(), (tensors[0],), dynamic_shapes=({0: batch},)).module()
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 3, 5, 24, device=DEVICE).to(dtype)
        wanted = Module()(x)
        torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(exported(x), wanted)


def test_auto_under_autocast():
    tensors, options = draw(2, 3, 5, 24, 40, dtype=torch.float32)
    tensors[7] = tensors[7].bfloat16()  # what is attended is in the dtype of a matmul
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        out, wanted = (layer(*tensors, **options | SCALES, impl=impl) for impl in ("auto", "reference"))
    assert out.dtype == wanted.dtype
    assert relative_error(out, wanted) < 0.02


def test_gradcheck_of_the_reference():
    tensors, options = draw(1, 2, 3, 4, 6)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: layer(*t, **options | SCALES, impl="reference"), leaves)


def test_refuses_bad_arguments():
    tensors, options = draw(2, 3, 5, 24, 40, dtype=torch.float32)
    for n, value, error, message in (
        (0, torch.randn(2, 3, 5, 25), ValueError, r"x: expected shape \(…, 24\) as fc1_weight says"),
        (7, torch.randn(2, 3, 6, 24), ValueError, r"attended: expected shape \(2, 3, 5, 24\) as x has"),
        (7, tensors[7].double(), TypeError, "attended: expected dtype torch.float32 as x has, got torch.float64"),
        (7, None, TypeError, r"attended: expected a tensor \(…, C\), got NoneType"),
        (8, torch.randn(24, 23), ValueError, r"proj_weight: expected shape \(24, 24\), got \(24, 23\)"),
        (9, tensors[9].half(), TypeError, "proj_bias: expected dtype torch.float32 as x has"),
        (5, torch.randn(24, 41), ValueError, r"fc2_weight: expected shape \(24, 40\), got \(24, 41\)"),
    ):
        value = None if value is None else value.to(DEVICE)
        with pytest.raises(error, match=f"^{message}"):
            layer(*tensors[:n], value, *tensors[n + 1 :], **options)
    learnt = torch.ones(1)
    for name, value in (("impl", "cpp"), ("activation", "relu"), ("proj_scale", learnt), ("branch_scale", learnt)):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            layer(*tensors, **options | {name: value})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is none of float32, float16, bfloat16"),
        ({"dtype": torch.float32}, "float32 does not fit in its registers"),
        ({"C": 129}, "C = 129 channels are over 128"),
        ({"gradients": 3}, "gradients are wanted, and it keeps nothing for them"),
        ({"gradients": 7}, "gradients are wanted, and it keeps nothing for them"),
        ({"autocast": True}, "autocast is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_explicit_choice_never_falls_back(change, why):
    tensors, options = draw(1, 1, 3, change.get("C", 24), 40, dtype=change.get("dtype", torch.float16))
    if "gradients" in change:
        tensors[change["gradients"]].requires_grad_()
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=change.get("autocast", False)),
        pytest.raises(RuntimeError, match=f"^impl: 'triton' cannot run projection_mlp here: {why}$"),
    ):
        triton(*tensors, **options)


def test_has_no_gradient():
    """Where the operation was called by its own name."""
    x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, *projection = draw(1, 1, 3, 24, 40)[0]
    norm, mlp = (norm_weight, norm_bias, 1e-6), (fc1, fc1_bias, False, fc2, fc2_bias, 1.0)
    out = OPS.projection_mlp_triton_fwd(x.requires_grad_(), *projection, 1.0, *norm, *mlp)
    with pytest.raises(RuntimeError, match="impl: expected 'auto' or 'reference' where gradients are wanted"):
        out.sum().backward()
