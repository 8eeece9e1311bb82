"""bias_gelu: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, DTYPES, assert_stays_inside_its_buffers, in_double, saved_bytes
from helpers.passes import assert_accurate, differentiate, strided
from nest_fast import bias_gelu, reference
from nest_fast.kernels import _configs
from nest_fast.kernels import bias_gelu as kernels
from nest_fast.ops.bias_gelu import APPROXIMATIONS
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
NAMES = ("out", "dx", "dbias")


def draw(shape, dtype=torch.float32, *, bias=True):
    """(x, bias) and the gradient of the output."""
    x, dout = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    return [x, torch.randn(shape[-1], device=DEVICE).to(dtype) if bias else None], dout


def check(inputs, dout, approximate, slack=0.0):
    plain = functools.partial(reference.bias_gelu, approximate=approximate)
    ours = differentiate(functools.partial(bias_gelu, approximate=approximate, impl="triton"), inputs, [dout])
    golden = differentiate(plain, in_double(inputs), [dout])
    assert_accurate(NAMES[: len(ours)], ours, differentiate(plain, inputs, [dout]), golden, 1, slack)


# Each shape in two of the six formulas and dtypes, the latter all in turn.
@pytest.mark.parametrize(
    ("shape", "bias", "approximate", "dtype"),
    [
        ((3, 2, 49, 384), True, "none", torch.bfloat16),
        ((3, 2, 49, 384), True, "tanh", torch.float32),
        ((2, 50, 100), True, "tanh", torch.float16),
        ((2, 50, 100), True, "none", torch.float32),
        ((300, 131), False, "none", torch.float16),
        ((300, 131), False, "tanh", torch.bfloat16),
        ((40,), False, "none", torch.float32),
        ((40,), False, "tanh", torch.bfloat16),
        ((1200, 16), True, "tanh", torch.float32),
        ((1200, 16), True, "none", torch.float16),
    ],
    ids=str,
)
def test_is_as_accurate_as_pytorch(shape, bias, approximate, dtype):
    check(*draw(shape, dtype, bias=bias), approximate)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("scale", "approximate"), [(1e-3, "none"), (100.0, "tanh"), (100.0, "none")])
def test_is_as_accurate_as_pytorch_with_small_and_large_numbers(scale, approximate, dtype):
    (x, bias), dout = draw((60, 100), dtype)
    check([scale * x, scale * bias], dout, approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_is_as_accurate_as_pytorch_in_every_number(approximate):
    """Relative errors, number by number, where gelu(x) is not about to vanish."""
    x = torch.linspace(-3, 12, 30_001, device=DEVICE)
    golden = reference.bias_gelu(x.double(), None, approximate=approximate)
    error = (bias_gelu(x, None, approximate=approximate, impl="triton").double() - golden).abs()
    plain = (reference.bias_gelu(x, None, approximate=approximate).double() - golden).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error <= torch.maximum(plain, 2 * eps * x.abs())).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on 0 * inf, which is what is meant
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_keeps_special_values_where_pytorch_does(approximate, dtype):
    top = torch.finfo(dtype).max
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, top, -top, 12.0, -12.0, 60.0, -60.0, 3e4, -3e4, 1e-7]
    x = torch.tensor(values, device=DEVICE).to(dtype)
    call = functools.partial(bias_gelu, approximate=approximate, impl="triton")
    ours = differentiate(call, [x, None], [torch.ones_like(x)])
    # One number at a time: PyTorch's vector instructions on a CPU make NaN of the inf that its scalar ones keep.
    plain = functools.partial(reference.bias_gelu, approximate=approximate)
    single = [differentiate(plain, [one, None], [torch.ones_like(one)]) for one in x.split(1)]
    wanted = [torch.cat(parts) for parts in zip(*single, strict=True)]
    for name, got, want in zip(NAMES, ours, wanted, strict=False):
        # What vanishes does so with another number of digits.
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True, msg=name)
    assert torch.equal(ours[0].signbit()[3:5], x.signbit()[3:5])


@pytest.mark.parametrize("programs", [1, 3])
def test_any_number_of_programs_shares_the_rows(programs, monkeypatch):
    monkeypatch.setitem(_configs.PROGRAMS, "bias_gelu", programs)
    check(*draw((500, 150)), "none")


def test_of_any_strides():
    (x, bias), dout = draw((3, 4, 24))
    call = functools.partial(bias_gelu, impl="triton")
    wanted = differentiate(call, [x, bias], [dout])
    for views in zip(strided(x), strided(bias), strict=True):
        leaves = [v.detach().requires_grad_() for v in views]  # a clone would be dense
        out = call(*leaves)
        for view in [*strided(dout), dout]:
            grads = torch.autograd.grad(out, leaves, view, retain_graph=True)
            assert all(map(torch.equal, [out, *grads], wanted))
    ones = torch.ones((), device=DEVICE).expand(3, 4, 24)
    check([x, bias], ones, "none", slack=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("C", [1, 20, 131])
def test_stays_inside_its_buffers(C, dtype):
    (x, bias), dout = draw((45, C), dtype)

    def everything(copy):
        dense = [copy(x), copy(bias)]
        return [kernels.bias_gelu_fwd(*dense, dtype, False), *kernels.bias_gelu_bwd(copy(dout), *dense, False, True)]

    assert_stays_inside_its_buffers(everything)


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 9), max_size=2),
    C=st.integers(1, 300),
    dtype=st.sampled_from(list(DTYPES.values())),
    approximate=st.sampled_from(APPROXIMATIONS),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_of_any_shape(shape, C, dtype, approximate, bias, seed):
    torch.manual_seed(seed)
    check(*draw((*shape, C), dtype, bias=bias), approximate, slack=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0)], ids=str)
def test_of_nothing(shape):
    inputs, dout = draw(shape)
    wanted = differentiate(reference.bias_gelu, inputs, [dout])
    ours = differentiate(functools.partial(bias_gelu, impl="triton"), inputs, [dout])
    assert all(map(torch.equal, ours, wanted))


def test_repeats_bit_by_bit():
    inputs, dout = draw((300, 48), torch.bfloat16)
    call = functools.partial(bias_gelu, impl="triton")
    assert all(map(torch.equal, *(differentiate(call, inputs, [dout]) for _ in range(2))))


def test_saves_little_for_the_gradient():
    x, bias = (t.requires_grad_() for t in draw((300, 48))[0])
    leaf = x * 1  # saved as an activation is
    ours, plain = (saved_bytes(lambda impl=i: bias_gelu(leaf, bias, impl=impl)) for i in ("triton", "reference"))
    assert 0 < ours <= plain


# --- what PyTorch does with the operation -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    (x, vector), dout = draw((2, 3, 16), bias=bias)
    leaves = [t if t is None else t.requires_grad_() for t in (x, vector)]
    torch.library.opcheck(OPS.bias_gelu_triton_fwd, (*leaves, torch.float32, bias))
    plain = [t if t is None else t.detach() for t in leaves]
    torch.library.opcheck(OPS.bias_gelu_triton_bwd, (dout, *plain, bias, bias))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_in_one_graph_and_exports_with_a_dynamic_batch(impl):
    class Module(torch.nn.Module):
        def forward(self, x, bias):
            return bias_gelu(x, bias, approximate="tanh", impl=impl)

    (x, bias), dout = draw((5, 3, 16))
    wanted = differentiate(Module(), [x, bias], [dout])
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    for got, want in zip(differentiate(compiled, [x, bias], [dout]), wanted, strict=True):
        assert relative_error(got, want) < 1e-6
    program = torch.export.export(Module(), (x[:2], bias), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    assert relative_error(program.module()(x, bias), wanted[0]) < 1e-6


def test_vmap():
    (x, bias), _ = draw((4, 3, 16))
    biases = torch.randn(4, 16, device=DEVICE)
    for dims, tensors in (((1, None), (x, bias)), ((0, 0), (x, biases)), ((None, 0), (x, biases))):
        wanted = torch.vmap(reference.bias_gelu, dims)(*tensors)
        torch.testing.assert_close(torch.vmap(functools.partial(bias_gelu, impl="triton"), dims)(*tensors), wanted)
    assert torch.func.grad(lambda x: bias_gelu(x, bias).sum())(x).shape == x.shape


def test_has_pytorchs_dtypes_under_autocast():
    (x, bias), dout = draw((30, 16))
    x = x.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = differentiate(functools.partial(bias_gelu, impl="triton"), [x, bias], [dout])
        plain = differentiate(reference.bias_gelu, [x, bias], [dout])
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gives_the_dtype_it_is_asked_for_under_autocast(impl):
    """The same numbers as where the next matmul casts them."""
    (x, bias), dout = draw((30, 16))
    x = x.half()
    with torch.autocast(DEVICE, torch.float16):
        ours = differentiate(functools.partial(bias_gelu, dtype=torch.float16, impl=impl), [x, bias], [dout])
        cast = differentiate(lambda *given: bias_gelu(*given, impl=impl).half(), [x, bias], [dout])
    assert ours[0].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(ours, cast, strict=True))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gradcheck_of_the_reference(approximate):
    leaves = [t.requires_grad_() for t in draw((3, 4), torch.float64)[0]]
    assert torch.autograd.gradcheck(functools.partial(reference.bias_gelu, approximate=approximate), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected 1 or more dimensions \(..., C\), got shape \(\)"),
        ({"x": torch.zeros(3, 16, dtype=torch.int64)}, "x: expected a floating-point dtype, got torch.int64"),
        ({"bias": torch.zeros(8)}, r"bias: expected shape \(16,\) \(C,\), got \(8,\)"),
        ({"bias": torch.zeros(16).int()}, "bias: expected a floating-point dtype, got torch.int32"),
        ({"approximate": "erf"}, "approximate: expected one of 'none', 'tanh', got 'erf'"),
        ({"dtype": torch.int8}, "dtype: expected a floating-point dtype or None, got torch.int8"),
        ({"impl": "cuda"}, "impl: expected one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
)
def test_refuses_bad_arguments(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bias_gelu(**{"x": torch.zeros(3, 16), "bias": torch.zeros(16), **change})


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(RuntimeError, match=r"impl: 'triton' cannot run bias_gelu here: dtype torch.float64 is none of"):
        bias_gelu(torch.zeros(3, 16, dtype=torch.float64, device=DEVICE), None, impl="triton")


@pytest.mark.gpu
def test_offsets_are_64_bit():
    rows, C = 2**31 // 128 + 77, 128
    x = torch.zeros(rows, C, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 1.0
    bias = torch.randn(C, device=DEVICE).bfloat16()
    dx, dbias = OPS.bias_gelu_triton_bwd(x, x, bias, False, True)
    out = OPS.bias_gelu_triton_fwd(x, bias, torch.bfloat16, False)
    for row in (0, rows - 1):
        assert relative_error(out[row], reference.bias_gelu(x[row], bias)) < 1e-2
    assert dx[:-1].eq(0).all()
    assert relative_error(dbias, dx[-1]) < 1e-2
