"""bias_gelu: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import functools
import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, DTYPES, ROOT, assert_stays_inside_its_buffers, in_double, saved_bytes
from helpers.passes import assert_accurate, differentiate, strided
from nest_fast import bias_gelu, reference
from nest_fast.kernels import _configs
from nest_fast.kernels import bias_gelu as kernels
from nest_fast.kernels._gelu import gelu_of
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
        ((1200, 64), True, "tanh", torch.float32),
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


def every_number(dtype):
    """Every number of half precision up to 40, beyond which nothing changes; of float32 some of every size.

    But for bfloat16's subnormal results, which Triton's interpreter makes 0.
    """
    if dtype == torch.float32:
        small = 10 ** torch.linspace(-30, 0, 4096)
        x = torch.cat([torch.linspace(-14, 14, 57344), small, -small])
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[(x.abs() < 40) & (x.abs() > (0 if dtype == torch.float16 else 4 * torch.finfo(dtype).tiny))]
    return x[: len(x) // 128 * 128].view(-1, 128).to(DEVICE)


def units(x, golden):
    """Errors in units in the last place of the dtype of x."""
    step = torch.finfo(x.dtype).eps * 2.0 ** golden.abs().clamp(min=torch.finfo(x.dtype).tiny).log2().floor()
    return (x.double() - golden).abs() / step


# Where PyTorch is better: half a unit in the last place in half precision, and what a polynomial's rounding leaves.
IN_UNITS = {torch.bfloat16: 0.52, torch.float16: 0.52, torch.float32: 4}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_is_as_accurate_as_pytorch_in_every_number(approximate, dtype):
    """The largest error in units in the last place, from one number to another, and of the derivative as it is."""
    x = every_number(dtype)
    dout = torch.ones_like(x)
    plain = functools.partial(reference.bias_gelu, approximate=approximate)
    out, dx = differentiate(functools.partial(bias_gelu, approximate=approximate, impl="triton"), [x, None], [dout])
    plain_out, plain_dx = differentiate(plain, [x, None], [dout])
    golden, golden_dx = differentiate(plain, in_double([x, None]), [dout])
    for low, high in ((0, 40), (-1, 0), (-3, -1), (-5, -3)):
        here = (low < x) & (x < high)
        error, theirs = (units(y[here], golden[here]).max() for y in (out, plain_out))
        assert error <= max(theirs, IN_UNITS[dtype]), f"{low} < x < {high}: {error:.3f} units, PyTorch {theirs:.3f}"
    error, theirs = ((y - golden)[x <= -5].abs().max() for y in (out, plain_out))
    assert error <= theirs
    error, theirs = ((y - golden_dx).abs().max() for y in (dx, plain_dx))
    assert error <= max(1.01 * theirs, 4 * torch.finfo(torch.float32).eps)


def test_the_polynomials_are_those_of_the_fit():
    """scripts/fit_gelu.py, where they are polynomials for."""
    spec = importlib.util.spec_from_file_location("fit_gelu", ROOT / "scripts" / "fit_gelu.py")
    fitting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fitting)
    for key, how in fitting.FITS.items():
        u = np.linspace(0, how.top, 1000)
        _, found = fitting.fit(key[0], *how)
        np.testing.assert_allclose(np.polyval(gelu_of(*key).P, u), np.polyval(found, u), atol=2e-6)


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
    monkeypatch.setattr(_configs, "at_once", lambda *_: programs)
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
    """As where the next matmul casts them: the kernel's polynomial is another, good to the last place."""
    (x, bias), dout = draw((30, 16))
    x = x.half()
    with torch.autocast(DEVICE, torch.float16):
        ours = differentiate(functools.partial(bias_gelu, dtype=torch.float16, impl=impl), [x, bias], [dout])
        cast = differentiate(lambda *given: bias_gelu(*given, impl=impl).half(), [x, bias], [dout])
    assert ours[0].dtype == torch.float16
    slack = torch.finfo(torch.float16).eps if impl == "triton" else 0.0
    torch.testing.assert_close(ours[0], cast[0], rtol=slack, atol=slack**2)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], cast[1:], strict=True))


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
