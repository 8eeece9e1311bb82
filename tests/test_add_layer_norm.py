"""add_layer_norm: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import DEVICE, DTYPES, assert_stays_inside_its_buffers, in_double, saved_bytes
from helpers.passes import assert_accurate, differentiate, strided
from nest_fast import add_layer_norm, reference
from nest_fast.kernels import _configs
from nest_fast.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
NAMES = ("sum", "normed", "dx", "dbranch", "dweight", "dbias", "dbranch_bias")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw(shape, dtype=torch.float32, *, branch_bias=True, branch_scale=True):
    """(x, branch, weight, bias, branch_bias), branch_scale and the gradients of both outputs."""
    B, C = shape[0], shape[-1]
    inputs = [*(randn(*shape, dtype=dtype) for _ in range(2)), *(randn(C, dtype=dtype) for _ in range(3))]
    scale = torch.tensor([0.0, 1.25, 1.25], device=DEVICE).repeat(B)[:B].to(dtype) if branch_scale else None
    inputs[4] = inputs[4] if branch_bias else None
    return inputs, scale, [randn(*shape, dtype=dtype) for _ in range(2)]


def add(function, scale, **options):
    """``function`` of (x, branch, weight, bias, branch_bias) alone."""

    def call(x, branch, weight, bias, branch_bias):
        own = scale if scale is None else scale.to(torch.promote_types(scale.dtype, x.dtype))
        return function(x, branch, weight, bias, branch_bias=branch_bias, branch_scale=own, **options)

    return call


def check(inputs, scale, douts, slack=0.0):
    ours = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
    plain = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
    golden = differentiate(add(reference.add_layer_norm, scale), in_double(inputs), douts)
    assert_accurate(NAMES[: len(ours)], ours, plain, golden, 2, slack)


# C of the models and between; rows that do not fill a tile, or many programs; two dimensions and more; each shape in
# two of three dtypes.
@pytest.mark.parametrize(
    ("shape", "options", "dtypes"),
    [
        ((3, 2, 49, 96), {}, "fp32 bf16"),
        ((5, 7, 384), {"branch_scale": False}, "fp16 fp32"),
        ((37, 100), {"branch_bias": False}, "bf16 fp16"),
        ((2, 3, 1536), {"branch_bias": False, "branch_scale": False}, "fp32 bf16"),
        ((3, 1, 4096), {}, "fp16 fp32"),
    ],
    ids=str,
)
def test_is_as_accurate_as_pytorch(shape, options, dtypes):
    for dtype in dtypes.split():
        check(*draw(shape, DTYPES[dtype], **options))


@pytest.mark.parametrize("programs", [1, 2, 8])
def test_any_number_of_programs_shares_the_rows(programs, monkeypatch):
    """Few walk over many tiles each."""
    monkeypatch.setattr(_configs, "at_once", lambda *_: programs)
    check(*draw((4, 83, 48)))


@pytest.mark.parametrize("branch_scale", [True, False])
@pytest.mark.parametrize("only", ["sum", "normed"])
def test_is_as_accurate_as_pytorch_with_the_gradient_of_one_output(only, branch_scale):
    inputs, scale, douts = draw((3, 11, 40), branch_scale=branch_scale)
    check(inputs, scale, [dout if name == only else None for name, dout in zip(NAMES, douts, strict=False)])


def test_writes_one_gradient_for_both_terms():
    inputs, _, douts = draw((3, 11, 40), branch_scale=False)
    dx, dbranch = differentiate(add(add_layer_norm, None, impl="triton"), inputs, douts)[2:4]
    assert torch.equal(dx, dbranch)
    _, normed, mean, rstd = OPS.add_layer_norm_triton_fwd(
        *inputs[:2], None, None, *inputs[2:4], 1e-6, *[torch.float32] * 2
    )
    backward = (douts[0], douts[1], normed, mean, rstd, None, inputs[2], *[torch.float32] * 2, False)
    assert OPS.add_layer_norm_triton_bwd(*backward)[1].numel() == 0


def test_branch_scale_has_no_gradient():
    inputs, scale, _ = draw((3, 11, 40))
    inputs[0].requires_grad_()
    scale.requires_grad_()
    for impl in ("reference", "triton"):
        add(add_layer_norm, scale, impl=impl)(*inputs)[1].sum().backward()
    assert scale.grad is None


def test_of_any_strides():
    inputs, scale, douts = draw((3, 4, 24))
    wanted = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
    call = add(add_layer_norm, strided(scale)[0], impl="triton")
    for views in zip(*map(strided, inputs), strict=True):
        leaves = [x.detach().requires_grad_() for x in views]  # a clone would be dense
        outs = call(*leaves)
        for dout_views in zip(*map(strided, douts), strict=True):
            grads = torch.autograd.grad(outs, leaves, dout_views, retain_graph=True)
            assert all(map(torch.equal, [*outs, *grads], wanted))


def test_expanded_gradients_are_read():
    inputs, scale, _ = draw((3, 4, 24))
    ones = torch.ones((), device=DEVICE).expand(3, 4, 24)
    check(inputs, scale, [ones, ones], slack=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("C", [1, 20, 33])
def test_stays_inside_its_buffers(C, dtype):
    (x, branch, weight, bias, branch_bias), scale, douts = draw((3, 15, C), dtype)

    def everything(copy):
        dense = [copy(t) for t in (x, branch, scale, branch_bias, weight, bias)]
        total, normed, mean, rstd = add_layer_norm_fwd(*dense, 1e-6, dtype, dtype)
        backward = (total, mean, rstd, dense[2], dense[4], dtype, dtype, True)
        grads = add_layer_norm_bwd(*map(copy, douts), *backward)
        return [total, normed, mean, rstd, *grads]

    assert_stays_inside_its_buffers(everything)


@settings(max_examples=15)
@given(
    B=st.integers(1, 5),
    middle=st.lists(st.integers(1, 6), max_size=2),
    C=st.one_of(st.integers(8, 70), st.sampled_from([200, 520, 1000])),
    dtype=st.sampled_from(list(DTYPES.values())),
    branch_bias=st.booleans(),
    branch_scale=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_of_any_shape(B, middle, C, dtype, branch_bias, branch_scale, seed):
    torch.manual_seed(seed)
    # Rows of a few channels have any variance, so that errors are those of 1 / 0: eps then keeps them in bounds.
    inputs, scale, douts = draw((B, *middle, C), dtype, branch_bias=branch_bias, branch_scale=branch_scale)
    ours = differentiate(add(add_layer_norm, scale, eps=0.1, impl="triton"), inputs, douts)
    plain = differentiate(add(reference.add_layer_norm, scale, eps=0.1), inputs, douts)
    golden = differentiate(add(reference.add_layer_norm, scale, eps=0.1), in_double(inputs), douts)
    assert_accurate(NAMES[: len(ours)], ours, plain, golden, 2, 4 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keeps_special_values_where_pytorch_does(value):
    inputs, scale, douts = draw((3, 4, 24))
    inputs[0][1, 2, 5] = inputs[1][2, 3, 6] = value
    inputs[1][0, 1, 7] = value  # times a scale of 0
    ours = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
    plain = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
    for name, x, y in zip(NAMES, ours, plain, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), name
        assert torch.equal(x.isinf(), y.isinf()), name


def test_a_large_mean_leaves_the_variance_exact():
    inputs, scale, douts = draw((3, 50, 96))
    inputs[0] += 1000
    check(inputs, scale, douts)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_of_nothing(shape):
    inputs, scale, douts = draw(shape)
    wanted = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
    assert all(map(torch.equal, differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts), wanted))


def test_repeats_bit_by_bit():
    inputs, scale, douts = draw((3, 50, 48), torch.bfloat16)
    runs = [differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_saves_little_for_the_gradient():
    inputs, scale, _ = draw((3, 50, 48))
    x, *others = (t.requires_grad_() for t in inputs)
    leaf = x * 1  # saved as an activation is
    calls = (add(add_layer_norm, scale, impl="triton"), add(reference.add_layer_norm, scale))
    ours, plain = (saved_bytes(lambda f=f: f(leaf, *others)) for f in calls)
    assert 0 < ours <= plain


# --- what PyTorch does with the operation ----------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full):
    inputs, scale, douts = draw((2, 3, 16), branch_bias=full, branch_scale=full)
    x, branch, weight, bias, branch_bias = (t if t is None else t.requires_grad_() for t in inputs)
    dtypes = [torch.float32] * 2
    torch.library.opcheck(OPS.add_layer_norm_triton_fwd, (x, branch, scale, branch_bias, weight, bias, 1e-6, *dtypes))
    with torch.no_grad():
        total, _, mean, rstd = OPS.add_layer_norm_triton_fwd(x, branch, scale, branch_bias, weight, bias, 1e-6, *dtypes)
        torch.library.opcheck(
            OPS.add_layer_norm_triton_bwd,
            (douts[0] if full else None, douts[1], total, mean, rstd, scale, weight.detach(), *dtypes, full),
        )


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_in_one_graph(impl):
    (x, branch, weight, bias, branch_bias), scale, _ = draw((2, 3, 16))

    def run(x, branch, scale):
        return add_layer_norm(x, branch, weight, bias, branch_bias=branch_bias, branch_scale=scale, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 1, 2):
        given = (x[:B], branch[:B], scale[:B])
        for got, wanted in zip(compiled(*given), run(*given), strict=True):
            assert relative_error(got, wanted) < 1e-6
    x = x.requires_grad_()
    (compiled_grad,) = torch.autograd.grad(sum(out.sum() for out in compiled(x, branch, scale)), x)
    (grad,) = torch.autograd.grad(sum(out.sum() for out in run(x, branch, scale)), x)
    torch.testing.assert_close(compiled_grad, grad)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_exports_with_a_dynamic_batch(impl):
    class Module(torch.nn.Module):
        def forward(self, x, branch, weight, bias):
            return add_layer_norm(x, branch, weight, bias, impl=impl)

    (x, branch, weight, bias, _), _, _ = draw((2, 3, 16))
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Module(), (x, branch, weight, bias), dynamic_shapes=({0: batch}, {0: batch}, None, None)
    )
    (x, branch, *_), _, _ = draw((5, 3, 16))
    wanted = Module()(x, branch, weight, bias)
    for got, want in zip(program.module()(x, branch, weight, bias), wanted, strict=True):
        assert relative_error(got, want) < 1e-6


def test_vmap():
    (x, branch, weight, bias, branch_bias), scale, _ = draw((2, 3, 16))
    xs, branches, weights = randn(4, 2, 3, 16), randn(2, 4, 3, 16), randn(4, 16)

    def run(impl, x, branch, weight):
        return add_layer_norm(x, branch, weight, bias, branch_bias=branch_bias, branch_scale=scale, impl=impl)

    for dims, tensors in (((0, 1, None), (xs, branches, weight)), ((0, None, 0), (xs, branch, weights))):
        wanted = torch.vmap(functools.partial(run, "reference"), dims)(*tensors)
        for got, want in zip(torch.vmap(functools.partial(run, "triton"), dims)(*tensors), wanted, strict=True):
            torch.testing.assert_close(got, want)
    assert torch.func.grad(lambda x: run("auto", x, branch, weight)[1].sum())(x).shape == x.shape


def test_has_pytorchs_dtypes_under_autocast():
    (x, _, weight, bias, branch_bias), scale, douts = draw((2, 30, 16))
    branch = randn(2, 30, 16, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        for stream in (x, x.bfloat16()):  # before the first layer, and where a matmul made it
            inputs = [stream, branch, weight, bias, branch_bias]
            ours = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
            plain = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
            assert [t.dtype for t in ours] == [t.dtype for t in plain]
            assert all(relative_error(a, b) < 1e-2 for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gives_the_dtype_it_is_asked_for_under_autocast(impl):
    """The same numbers as where the next matmul casts them; the sum stays what it is."""
    inputs, scale, douts = draw((2, 30, 16))
    with torch.autocast(DEVICE, torch.float16):
        ours = differentiate(add(add_layer_norm, scale, normed_dtype=torch.float16, impl=impl), inputs, douts)

        def cast(*given):
            total, normed = add(add_layer_norm, scale, impl=impl)(*given)
            return total, normed.half()

        expected = differentiate(cast, inputs, douts)
    assert [x.dtype for x in ours[:2]] == [torch.float32, torch.float16]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_gradcheck_of_the_reference():
    (x, branch, *vectors), scale, _ = draw((2, 2, 3, 5), torch.float64)
    leaves = [t.requires_grad_() for t in (x, branch, *vectors)]
    assert torch.autograd.gradcheck(add(reference.add_layer_norm, scale), leaves)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x: expected 2 or more dimensions \(B, ..., C\), got shape \(16,\)"),
        ({"x": torch.zeros(2, 3, 16, dtype=torch.int64)}, "x: expected a floating-point dtype, got torch.int64"),
        ({"branch": torch.zeros(2, 16)}, r"branch: expected shape \(2, 3, 16\) as x has, got \(2, 16\)"),
        ({"branch": torch.zeros(2, 3, 16).int()}, "branch: expected a floating-point dtype, got torch.int32"),
        ({"weight": torch.zeros(8)}, r"weight: expected shape \(16,\) \(C,\), got \(8,\)"),
        ({"bias": torch.zeros(16).double()}, "bias: expected dtype torch.float32 as x has, got torch.float64"),
        ({"branch_bias": torch.zeros(3)}, r"branch_bias: expected shape \(16,\) \(C,\), got \(3,\)"),
        ({"branch_scale": torch.zeros(3)}, r"branch_scale: expected shape \(2,\) \(B,\), got \(3,\)"),
        ({"normed_dtype": 16}, "normed_dtype: expected a floating-point dtype or None, got 16"),
        ({"impl": "cuda"}, "impl: expected one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
)
def test_refuses_bad_arguments(change, message):
    arguments = {"x": torch.zeros(2, 3, 16), "branch": torch.zeros(2, 3, 16)}
    arguments |= {"weight": torch.zeros(16), "bias": torch.zeros(16), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        add_layer_norm(**arguments)


def test_an_explicit_choice_never_falls_back():
    inputs, scale, _ = draw((2, 3, 16), torch.float64)
    with pytest.raises(
        RuntimeError, match=r"impl: 'triton' cannot run add_layer_norm here: dtype torch.float64 is none"
    ):
        add(add_layer_norm, scale, impl="triton")(*inputs)


@pytest.mark.gpu
def test_offsets_are_64_bit():
    rows, C = 2**31 // 128 + 77, 128
    x = torch.zeros(rows, 1, C, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = randn(1, C, dtype=torch.bfloat16)
    weight, bias = randn(2, C, dtype=torch.bfloat16)
    _, normed, mean, rstd = OPS.add_layer_norm_triton_fwd(x, x, None, None, weight, bias, 1e-6, *[torch.bfloat16] * 2)
    wanted = reference.add_layer_norm(x[-1:], x[-1:], weight, bias)[1]
    assert torch.equal(normed[:1], bias.expand(1, 1, C))
    assert relative_error(normed[-1:], wanted) < 1e-2
    dx = OPS.add_layer_norm_triton_bwd(x, x, x, mean, rstd, None, weight, *[torch.bfloat16] * 2, False)[0]
    assert dx[:-1].eq(0).all()
    assert not dx[-1].eq(0).all()
