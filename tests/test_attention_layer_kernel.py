"""attention_layer in Triton: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, DTYPES, assert_stays_inside_its_buffers, in_double
from helpers.layer_kernel_tests import *  # noqa: F403
from helpers.layer_kernel_tests import on_device
from helpers.layer_tests import LUCK, assert_accurate, attention_inputs
from nest_fast import attention_layer, reference, windows
from nest_fast.kernels.attention_layer import linear_sum_fwd, norm_attention_fwd, norm_linear_fwd
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
triton = partial(attention_layer, impl="triton")


def draw(*sizes, dtype=torch.float32, biases=True):
    """(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias), options."""
    return on_device(attention_inputs(*sizes, dtype=dtype), biases)


@pytest.fixture
def layer_of():
    return lambda *sizes, **more: (attention_layer, *draw(*sizes, 3, **more))


# (B, T, N, C, heads, one key head): rows in several tiles, the last one partial; widths that fill tiles, and do not.
@pytest.mark.parametrize(
    ("sizes", "dtype", "biases"),
    [
        ((1, 3, 49, 64, 2, False), torch.float32, True),
        ((1, 1, 196, 96, 3, False), torch.bfloat16, True),
        ((2, 2, 49, 128, 4, False), torch.float16, False),
        ((2, 4, 16, 100, 2, False), torch.float16, False),
        ((2, 5, 16, 128, 4, True), torch.bfloat16, True),
        ((1, 2, 49, 192, 6, False), torch.float16, True),
        ((1, 4, 16, 256, 8, False), torch.bfloat16, False),
    ],
    ids=str,
)
def test_attention_layer_is_as_accurate_as_pytorch_in_triton(sizes, dtype, biases):
    tensors, options = draw(*sizes, dtype=dtype, biases=biases)
    assert_accurate(attention_layer, tensors, options | {"branch_scale": 1.7}, impl="triton")


def test_attention_layer_in_triton_adds_a_bias_and_a_mask():
    tensors, options = draw(2, 4, 9, 32, 2, dtype=torch.bfloat16)
    mask = torch.rand(2, 9, 9, device=DEVICE) < 0.7
    more = {"bias": torch.randn(2, 9, 9, device=DEVICE), "mask": mask | torch.eye(9, dtype=torch.bool, device=DEVICE)}
    assert_accurate(attention_layer, tensors, options | more | {"scale": 0.3}, impl="triton")


def test_attention_layer_in_triton_attends_by_cosines():
    tensors, options = draw(2, 3, 9, 32, 2, dtype=torch.float16)
    tensors.append(1 + 4 * torch.rand(2, device=DEVICE).half())

    def layer(*tensors, **options):
        *tensors, scale = tensors
        return attention_layer(*tensors, scale=scale, cosine=True, **options)

    assert_accurate(layer, tensors, options, impl="triton")


@pytest.mark.parametrize("biases", [True, False], ids=["padding is a bias", "padding is zeros"])
def test_attention_layer_in_triton_attends_in_the_windows_of_an_image(biases):
    tensors, options = draw(2, 1, 42, 32, 2, dtype=torch.float16, biases=biases)
    tensors[0] = tensors[0].flatten(1, 2)
    cut = windows((6, 7), 4, shift=2)  # beyond the image, too
    assert_accurate(attention_layer, tensors, options | {"windows": cut, "branch_scale": 0.7}, impl="triton")


@settings(max_examples=10)
@given(data=st.data())
def test_attention_layer_of_any_shape_in_triton(data):
    rows, C, out = data.draw(st.tuples(st.integers(1, 150), st.integers(1, 70), st.integers(1, 90)))
    dtype = data.draw(st.sampled_from([*DTYPES.values()]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    x, weight, residual = torch.randn(rows, C), torch.randn(out, C) * C**-0.5, torch.randn(rows, out)
    x, weight, residual, norm_weight, norm_bias = (
        t.to(DEVICE, dtype) for t in (x, weight, residual, torch.randn(C), torch.randn(C))
    )

    def both(x, norm_weight, norm_bias, weight, residual):
        y = torch.layer_norm(x, (C,), norm_weight, norm_bias, 1e-6)
        return y @ weight.mT, residual + 1.7 * (x @ weight.mT)

    tensors = x, norm_weight, norm_bias, weight, residual
    ours = norm_linear_fwd(*tensors[:3], 1e-6, weight, None), linear_sum_fwd(x, weight, None, residual, 1.7)
    for got, plain, exact in zip(ours, both(*tensors), both(*in_double(tensors)), strict=True):
        assert got.dtype == dtype
        allowed = 1.25 * relative_error(plain, exact) + LUCK * torch.finfo(dtype).eps
        assert relative_error(got, exact) <= allowed


def test_attention_layer_repeats_bit_by_bit_in_triton():
    """A block is computed alike beside any others, in whatever tile its rows are."""
    tensors, options = draw(2, 10, 9, 24, 3, dtype=torch.bfloat16)
    first = triton(*tensors, **options)
    assert torch.equal(triton(*tensors, **options), first)
    assert torch.equal(triton(tensors[0][1:, 1:2], *tensors[1:], **options), first[1:, 1:2])


@pytest.mark.parametrize(("C", "out", "dtype"), [(20, 70, torch.bfloat16), (100, 64, torch.float32)])
def test_attention_layer_stays_inside_its_buffers_in_triton(C, out, dtype):
    """Its linear layers; the attention has a test of its own."""
    sizes = (45, C), (C,), (C,), (out, C), (out,), (45, out)
    tensors = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]

    def everything(copy):
        x, norm_weight, norm_bias, weight, bias, residual = map(copy, tensors)
        normed = norm_linear_fwd(x, norm_weight, norm_bias, 1e-6, weight, bias)
        return [normed, linear_sum_fwd(x, weight, bias, residual, 0.5)]

    assert_stays_inside_its_buffers(everything)


@pytest.mark.parametrize(("N", "C", "heads", "dtype"), [(20, 48, 3, torch.bfloat16), (70, 32, 1, torch.float16)])
def test_attention_layer_in_one_kernel_stays_inside_its_buffers_and_repeats_bit_by_bit(N, C, heads, dtype):
    """LayerNorm, qkv and attention: of a strided x, and whatever other blocks there are."""
    sizes = (2, 3, N, C), (C,), (C,), (3 * C, C), (3 * C,)
    tensors = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]

    def call(x, norm_weight, norm_bias, weight, bias):
        return norm_attention_fwd(x, norm_weight, norm_bias, 1e-6, weight, bias, heads, 0.25)

    assert_stays_inside_its_buffers(lambda copy: [call(*map(copy, tensors))])
    x, *weights = tensors
    strange = x.mT.contiguous().mT
    assert torch.equal(call(strange[:, 1:], *weights), call(x, *weights)[:, 1:])


# --- what PyTorch does with the operations ----------------------------------------------------------------------------


def test_attention_layer_opcheck_of_its_linear_layers():
    (x, norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias), _ = draw(2, 3, 5, 24, 3)
    torch.library.opcheck(OPS.norm_linear_triton_fwd.default, (x, norm_weight, norm_bias, 1e-6, qkv, qkv_bias))
    for bias in (proj_bias, None):
        torch.library.opcheck(OPS.linear_sum_triton_fwd.default, (x, proj, bias, x, 0.5))
    x, norm_weight, norm_bias, qkv, qkv_bias, *_ = draw(1, 2, 5, 32, 2, dtype=torch.float16)[0]
    for bias in (qkv_bias, None):
        call = (x, norm_weight, norm_bias, 1e-6, qkv, bias, 2, 0.25)
        torch.library.opcheck(OPS.norm_attention_triton_fwd.default, call)


def test_attention_layer_compiles_in_one_graph_in_triton():
    tensors, options = draw(2, 3, 5, 24, 3)

    def layer(x):
        return triton(x, *tensors[1:], **options)

    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(tensors[0]), layer(tensors[0]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is none of float32, float16, bfloat16"),
        ({"C": 258}, "C = 258 channels are over 256"),
        ({"N": 257}, "N = 257 tokens are over 256"),
        ({"C": 200, "heads": 1}, "head_dim 200 is over 128"),
        ({"post_norm": True}, "the LayerNorm comes last"),
        ({"gradients": True}, "gradients are wanted, and it keeps nothing for them"),
        ({"autocast": True}, "autocast is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_attention_layer_an_explicit_choice_never_falls_back_in_triton(change, why):
    change = dict(change)
    heads = change.pop("heads", 3)
    sizes = 1, 1, change.pop("N", 4), change.pop("C", 24), heads
    tensors, options = draw(*sizes, dtype=change.pop("dtype", torch.float32))
    tensors[3].requires_grad_(change.pop("gradients", False))
    autocast = change.pop("autocast", False)
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=autocast),
        pytest.raises(RuntimeError, match=f"^impl: 'triton' cannot run attention_layer here: {why}$"),
    ):
        triton(*tensors, **options, **change)


def test_attention_layer_has_no_gradient_in_triton():
    """Where its operations were called by their own names."""
    x, norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias = draw(1, 1, 3, 48, 3, dtype=torch.float16)[0]
    x.requires_grad_()
    for out in (
        OPS.norm_linear_triton_fwd(x, norm_weight, norm_bias, 1e-6, qkv, qkv_bias),
        OPS.linear_sum_triton_fwd(x, proj, proj_bias, x, 1.0),
        OPS.norm_attention_triton_fwd(x, norm_weight, norm_bias, 1e-6, qkv, qkv_bias, 3, 1.0),
    ):
        with pytest.raises(RuntimeError, match="impl: expected 'auto' or 'reference' where gradients are wanted"):
            out.sum().backward()


@pytest.mark.gpu
def test_attention_layer_offsets_are_64_bit_in_triton():
    rows, C = 2**31 // 128 + 77, 128
    x = torch.zeros(rows, C, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(C)
    weight, one, zero = torch.randn(C, C).to(x), x.new_ones(C), x.new_zeros(C)
    out = OPS.norm_linear_triton_fwd(x, one, zero, 1e-6, weight, None)
    total = OPS.linear_sum_triton_fwd(x, weight, None, x, 1.0)
    for row in (0, rows - 1):
        y = torch.layer_norm(x[row], (C,), one, zero, 1e-6)
        torch.testing.assert_close(out[row], y @ weight.mT, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(total[row], reference.linear(x[row], weight, residual=x[row]), rtol=1e-2, atol=1e-2)
    blocks = x[: rows // 16 * 16].view(1, -1, 16, C)
    blocks[0, -1] = torch.randn(16, C)
    call = one, zero, 1e-6, torch.randn(3 * C, C).to(x) * C**-0.5, None, 4, 0.2
    attended, alone = (OPS.norm_attention_triton_fwd(some, *call) for some in (blocks, blocks[:, -1:]))
    assert torch.equal(attended[:, -1:], alone)
