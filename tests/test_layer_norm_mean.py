"""layer_norm_mean: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, DTYPES, assert_stays_inside_its_buffers, in_double, saved_bytes
from helpers.passes import assert_accurate, differentiate, strided
from nest_fast import layer_norm_mean, reference
from nest_fast.kernels import _configs
from nest_fast.kernels.layer_norm_mean import _parts, layer_norm_mean_bwd, layer_norm_mean_fwd
from nest_fast.ops import _layer_norm as ops
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
NAMES = ("out", "dx", "dweight", "dbias")
triton = functools.partial(layer_norm_mean, impl="triton")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw(shape, dtype=torch.float32):
    """(x, weight, bias) and the gradient of the output."""
    inputs = [randn(*shape, dtype=dtype), *(randn(shape[-1], dtype=dtype) for _ in range(2))]
    return inputs, randn(shape[0], shape[-1], dtype=dtype)


def check(inputs, dout, slack=0.0, **options):
    ours = differentiate(functools.partial(triton, **options), inputs, [dout])
    plain = differentiate(functools.partial(reference.layer_norm_mean, **options), inputs, [dout])
    golden = differentiate(functools.partial(reference.layer_norm_mean, **options), in_double(inputs), [dout])
    assert_accurate(NAMES, ours, plain, golden, 1, slack)


# Each shape in two of three dtypes, by turn.
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((3, 2, 49, 96), "fp32 bf16"),
        ((2, 50, 100), "fp16 fp32"),
        ((2, 7, 384), "bf16 fp16"),
        ((1, 5, 4096), "fp32 bf16"),
    ],
    ids=str,
)
def test_is_as_accurate_as_pytorch(shape, dtypes):
    for dtype in dtypes.split():
        check(*draw(shape, DTYPES[dtype]))


@pytest.mark.parametrize("programs", [1, 2, 8])
def test_any_number_of_programs_shares_the_rows(programs, monkeypatch):
    """One part writes an image's mean itself."""
    monkeypatch.setattr(_configs, "at_once", lambda *_: programs)
    check(*draw((2, 200, 48)))


@pytest.mark.parametrize(
    ("batch", "tokens", "rows"), [(1, 1, 8), (1, 196, 2), (256, 196, 2), (5000, 196, 8), (3, 9, 8)]
)
def test_parts_have_every_token_once(batch, tokens, rows):
    parts, tiles = _parts(batch, tokens, rows, 1056)
    assert batch > 1056 or batch * parts <= 1056
    assert (parts - 1) * tiles * rows < tokens <= parts * tiles * rows
    assert parts == 1 or tiles >= 4


def test_of_any_strides():
    inputs, dout = draw((3, 4, 24))
    wanted = differentiate(triton, inputs, [dout])
    for views in zip(*map(strided, inputs), strict=True):
        leaves = [v.detach().requires_grad_() for v in views]  # a clone would be dense
        out = triton(*leaves)
        for view in strided(dout):
            grads = torch.autograd.grad(out, leaves, view, retain_graph=True)
            assert all(map(torch.equal, [out, *grads], wanted))


def test_expanded_gradients_are_read():
    check(draw((3, 4, 24))[0], torch.ones((), device=DEVICE).expand(3, 24), slack=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("C", [1, 20, 33])
def test_stays_inside_its_buffers(C, dtype):
    inputs, dout = draw((3, 15, C), dtype)

    def everything(copy):
        x, weight, bias = map(copy, inputs)
        pooled = layer_norm_mean_fwd(x, weight, bias, 1e-6, dtype)
        return [*pooled, *layer_norm_mean_bwd(copy(dout), x, *pooled[1:], weight)]

    assert_stays_inside_its_buffers(everything)


@settings(max_examples=15)
@given(
    B=st.integers(1, 5),
    middle=st.lists(st.integers(1, 6), max_size=2),
    C=st.one_of(st.integers(8, 70), st.sampled_from([200, 520, 1000])),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 2**16),
)
def test_of_any_shape(B, middle, C, dtype, seed):
    torch.manual_seed(seed)
    # Rows of a few channels have any variance, so that errors are those of 1 / 0: eps then keeps them in bounds.
    check(*draw((B, *middle, 3, C), dtype), slack=4 * torch.finfo(dtype).eps, eps=0.1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keeps_special_values_where_pytorch_does(value):
    """In their image."""
    inputs, _ = draw((3, 4, 24))
    inputs[0][1, 2, 5] = value
    assert triton(*inputs).isnan().all(1).tolist() == [False, True, False]


def test_a_large_mean_leaves_the_variance_exact():
    (x, *parameters), dout = draw((3, 50, 96))
    check([x + 1000, *parameters], dout)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_of_nothing(shape):
    inputs, dout = draw(shape)
    wanted = differentiate(reference.layer_norm_mean, inputs, [dout])
    for x, y in zip(differentiate(triton, inputs, [dout]), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_repeats_bit_by_bit():
    inputs, dout = draw((3, 50, 48), torch.bfloat16)
    assert all(map(torch.equal, *(differentiate(triton, inputs, [dout]) for _ in range(2))))


def test_saves_little_for_the_gradient():
    """An image's mean of what is normalised, which is as large as the output, beside what plain PyTorch keeps."""
    inputs, dout = draw((3, 50, 48))
    x, weight, bias = (t.requires_grad_() for t in inputs)
    leaf = x * 1  # saved as an activation is
    ours, plain = (saved_bytes(lambda f=f: f(leaf, weight, bias)) for f in (triton, reference.layer_norm_mean))
    assert 0 < ours <= plain + dout.nbytes


# --- what PyTorch does with the operation -----------------------------------------------------------------------------


def test_opcheck():
    inputs, dout = draw((2, 3, 16))
    x, weight, bias = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(OPS.layer_norm_mean_triton_fwd, (x, weight, bias, 1e-6, torch.float32))
    with torch.no_grad():
        _, *saved = OPS.layer_norm_mean_triton_fwd(x, weight, bias, 1e-6, torch.float32)
        torch.library.opcheck(OPS.layer_norm_mean_triton_bwd, (dout, x.detach(), *saved, weight.detach()))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_in_one_graph(impl):
    (x, weight, bias), _ = draw((2, 3, 16))

    def run(x):
        return layer_norm_mean(x, weight, bias, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 1, 2):
        assert relative_error(compiled(x[:B]), run(x[:B])) < 1e-6
    x = x.requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, run)))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_exports_with_a_dynamic_batch(impl):
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias):
            return layer_norm_mean(x, weight, bias, impl=impl)

    inputs, _ = draw((2, 3, 16))
    shapes = ({0: torch.export.Dim("batch")}, None, None)
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=shapes)
    others, _ = draw((5, 3, 16))
    assert relative_error(program.module()(*others), Module()(*others)) < 1e-6


def test_vmap():
    (x, weight, bias), _ = draw((2, 3, 16))
    xs, weights = randn(2, 4, 3, 16), randn(4, 16)
    for dims, tensors in (((1, None), (xs, weight)), ((1, 0), (xs, weights)), ((None, 0), (x, weights))):
        ours, plain = (
            torch.vmap(lambda x, w, f=f: f(x, w, bias), dims)(*tensors) for f in (triton, reference.layer_norm_mean)
        )
        torch.testing.assert_close(ours, plain)


def test_has_pytorchs_dtypes_under_autocast():
    (x, weight, bias), _ = draw((2, 30, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        for stream in (x, x.bfloat16()):
            ours, plain = triton(stream, weight, bias), reference.layer_norm_mean(stream, weight, bias)
            assert ours.dtype == plain.dtype
            assert relative_error(ours, plain) < 1e-2


def test_gradcheck_of_the_reference():
    leaves = [t.requires_grad_() for t in draw((2, 2, 3, 5), torch.float64)[0]]
    assert torch.autograd.gradcheck(reference.layer_norm_mean, leaves)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 16)}, r"x: expected 3 or more dimensions \(B, ..., C\) with tokens, got shape \(2, 16"),
        ({"weight": torch.zeros(8)}, r"weight: expected shape \(16,\) \(C,\), got \(8,\)"),
        ({"bias": torch.zeros(16).double()}, "bias: expected dtype torch.float32 as x has, got torch.float64"),
        ({"impl": "cuda"}, "impl: expected one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
)
def test_refuses_bad_arguments(change, message):
    arguments = {"x": torch.zeros(2, 3, 16), "weight": torch.zeros(16), "bias": torch.zeros(16), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        layer_norm_mean(**arguments)


def test_an_explicit_choice_never_falls_back():
    assert _configs.MAX_LAYER_NORM_CHANNELS == ops.MAX_CHANNELS
    wide, vector = torch.zeros(1, 1, 4097, device=DEVICE), torch.zeros(4097, device=DEVICE)
    with pytest.raises(RuntimeError, match="cannot run layer_norm_mean here: C = 4097 channels are over 4096"):
        layer_norm_mean(wide, vector, vector, impl="triton")
    assert layer_norm_mean(wide, vector, vector, impl="reference").shape == (1, 4097)


@pytest.mark.gpu
def test_offsets_are_64_bit():
    check_second_image_alone(tokens=2**31 // 128 + 77)


def check_second_image_alone(tokens):
    """Of two images, the second behind so many tokens: of one kind, whose mean is any one's."""
    x = torch.zeros(2, tokens, 128, dtype=torch.bfloat16, device=DEVICE)
    x[1] = randn(128, dtype=torch.bfloat16)
    weight, bias = randn(2, 128, dtype=torch.bfloat16)
    out, *saved = OPS.layer_norm_mean_triton_fwd(x, weight, bias, 1e-6, torch.bfloat16)
    assert torch.equal(out[0], bias)
    assert relative_error(out[1:], reference.layer_norm_mean(x[1:, :1], weight, bias)) < 1e-2
    dx = OPS.layer_norm_mean_triton_bwd(torch.ones_like(out), x, *saved, weight)[0]
    assert dx[1, 0].any()
    assert torch.equal(dx[1, -1], dx[1, 0])
