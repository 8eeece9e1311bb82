"""add_layer_norm and layer_norm_mean: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import functools
import math

import pytest
import torch
from common import DEVICE, DTYPES, in_double, in_guarded_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import assert_accurate, compile_offline, differentiate, strided

from nest_fast import add_layer_norm, layer_norm_mean, reference
from nest_fast.kernels import _configs
from nest_fast.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from nest_fast.kernels.layer_norm_mean import _parts, layer_norm_mean_bwd, layer_norm_mean_fwd
from nest_fast.ops import _layer_norm as ops
from nest_fast.testing import relative_error

OPS = torch.ops.nest_fast
ADD_NAMES = ("sum", "normed", "dx", "dbranch", "dweight", "dbias", "dbranch_bias")
MEAN_NAMES = ("out", "dx", "dweight", "dbias")


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


def check_add(inputs, scale, douts, slack=0.0):
    ours = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
    plain = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
    golden = differentiate(add(reference.add_layer_norm, scale), in_double(inputs), douts)
    assert_accurate(ADD_NAMES[: len(ours)], ours, plain, golden, 2, slack)


def check_mean(inputs, dout, slack=0.0):
    ours = differentiate(functools.partial(layer_norm_mean, impl="triton"), inputs, [dout])
    plain = differentiate(reference.layer_norm_mean, inputs, [dout])
    golden = differentiate(reference.layer_norm_mean, in_double(inputs), [dout])
    assert_accurate(MEAN_NAMES, ours, plain, golden, 1, slack)


def draw_mean(shape, dtype=torch.float32):
    """(x, weight, bias) and the gradient of the output."""
    inputs = [randn(*shape, dtype=dtype), *(randn(shape[-1], dtype=dtype) for _ in range(2))]
    return inputs, randn(shape[0], shape[-1], dtype=dtype)


# C of the models and between; rows that do not fill a tile, or many programs; two dimensions and more.
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 2, 49, 96), {}),
        ((5, 7, 384), {"branch_scale": False}),
        ((37, 100), {"branch_bias": False}),
        ((2, 3, 1536), {"branch_bias": False, "branch_scale": False}),
        ((3, 1, 4096), {}),
    ],
    ids=str,
)
def test_add_layer_norm_is_as_accurate_as_pytorch(shape, options, dtype):
    check_add(*draw(shape, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 49, 96), (2, 50, 100), (2, 7, 384), (1, 5, 4096)], ids=str)
def test_layer_norm_mean_is_as_accurate_as_pytorch(shape, dtype):
    check_mean(*draw_mean(shape, dtype))


@pytest.mark.parametrize("programs", [1, 2, 8])
def test_any_number_of_programs_shares_the_rows(programs, monkeypatch):
    """Few walk over many tiles each; one part writes an image's mean itself."""
    monkeypatch.setitem(_configs.PROGRAMS, "layer_norm", programs)
    check_add(*draw((4, 83, 48)))
    check_mean(*draw_mean((2, 200, 48)))


@pytest.mark.parametrize(
    ("batch", "tokens", "rows"), [(1, 1, 8), (1, 196, 2), (256, 196, 2), (5000, 196, 8), (3, 9, 8)]
)
def test_parts_have_every_token_once(batch, tokens, rows):
    parts, tiles = _parts(batch, tokens, rows)
    assert (parts - 1) * tiles * rows < tokens <= parts * tiles * rows
    assert parts == 1 or tiles >= 4


@pytest.mark.parametrize("branch_scale", [True, False])
@pytest.mark.parametrize("only", ["sum", "normed"])
def test_add_layer_norm_with_the_gradient_of_one_output(only, branch_scale):
    inputs, scale, douts = draw((3, 11, 40), branch_scale=branch_scale)
    check_add(inputs, scale, [dout if name == only else None for name, dout in zip(ADD_NAMES, douts, strict=False)])


def test_add_layer_norm_writes_one_gradient_for_both_terms():
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


def test_every_layout_is_read():
    inputs, scale, douts = draw((3, 4, 24))
    wanted = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
    call = add(add_layer_norm, strided(scale)[0], impl="triton")
    for views in zip(*map(strided, inputs), strict=True):
        leaves = [x.detach().requires_grad_() for x in views]  # a clone would be dense
        outs = call(*leaves)
        for dout_views in zip(*map(strided, douts), strict=True):
            grads = torch.autograd.grad(outs, leaves, dout_views, retain_graph=True)
            assert all(map(torch.equal, [*outs, *grads], wanted))
    (x, weight, bias), dout = draw_mean((3, 4, 24))
    wanted = differentiate(functools.partial(layer_norm_mean, impl="triton"), (x, weight, bias), [dout])
    for views in zip(*map(strided, (x, weight, bias)), strict=True):
        leaves = [v.detach().requires_grad_() for v in views]
        out = layer_norm_mean(*leaves, impl="triton")
        for view in strided(dout):
            grads = torch.autograd.grad(out, leaves, view, retain_graph=True)
            assert all(map(torch.equal, [out, *grads], wanted))


def test_expanded_gradients_are_read():
    inputs, scale, _ = draw((3, 4, 24))
    ones = torch.ones((), device=DEVICE).expand(3, 4, 24)
    check_add(inputs, scale, [ones, ones], slack=1e-6)
    check_mean(draw_mean((3, 4, 24))[0], ones[:, 0], slack=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("C", [1, 20, 33])
def test_kernels_stay_inside_their_buffers(C, dtype):
    (x, branch, weight, bias, branch_bias), scale, douts = draw((3, 15, C), dtype)

    def everything(copy):
        dense = [copy(t) for t in (x, branch, scale, branch_bias, weight, bias)]
        total, normed, mean, rstd = add_layer_norm_fwd(*dense, 1e-6, dtype, dtype)
        backward = (total, mean, rstd, dense[2], dense[4], dtype, dtype, True)
        grads = add_layer_norm_bwd(*map(copy, douts), *backward)
        pooled = layer_norm_mean_fwd(dense[0], *dense[4:], 1e-6, dtype)
        mean_grads = layer_norm_mean_bwd(copy(douts[0][:, 0].contiguous()), dense[0], *pooled[1:], dense[4])
        return [total, normed, mean, rstd, *grads, *pooled, *mean_grads]

    wanted = everything(lambda t: t)
    for n, (a, b) in enumerate(zip(in_guarded_memory(everything), wanted, strict=True)):
        assert torch.equal(a, b), n


@settings(max_examples=15)
@given(
    B=st.integers(1, 5),
    middle=st.lists(st.integers(1, 9), max_size=2),
    C=st.one_of(st.integers(8, 70), st.sampled_from([200, 520, 1000])),
    dtype=st.sampled_from(list(DTYPES.values())),
    branch_bias=st.booleans(),
    branch_scale=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_fuzz(B, middle, C, dtype, branch_bias, branch_scale, seed):
    torch.manual_seed(seed)
    # Rows of a few channels have any variance, so that errors are those of 1 / 0: eps then keeps them in bounds.
    drawn = draw((B, *middle, C), dtype, branch_bias=branch_bias, branch_scale=branch_scale)
    inputs, scale, douts = drawn
    ours = differentiate(add(add_layer_norm, scale, eps=0.1, impl="triton"), inputs, douts)
    plain = differentiate(add(reference.add_layer_norm, scale, eps=0.1), inputs, douts)
    golden = differentiate(add(reference.add_layer_norm, scale, eps=0.1), in_double(inputs), douts)
    slack = 4 * torch.finfo(dtype).eps
    assert_accurate(ADD_NAMES[: len(ours)], ours, plain, golden, 2, slack)
    inputs, dout = draw_mean((B, *middle, 3, C), dtype)
    ours = differentiate(functools.partial(layer_norm_mean, eps=0.1, impl="triton"), inputs, [dout])
    plain = differentiate(functools.partial(reference.layer_norm_mean, eps=0.1), inputs, [dout])
    golden = differentiate(functools.partial(reference.layer_norm_mean, eps=0.1), in_double(inputs), [dout])
    assert_accurate(MEAN_NAMES, ours, plain, golden, 1, slack)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_special_values_stay_in_their_row(value):
    inputs, scale, douts = draw((3, 4, 24))
    inputs[0][1, 2, 5] = inputs[1][2, 3, 6] = value
    inputs[1][0, 1, 7] = value  # times a scale of 0
    ours = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
    plain = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
    for name, x, y in zip(ADD_NAMES, ours, plain, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), name
        assert torch.equal(x.isinf(), y.isinf()), name
    pooled = layer_norm_mean(inputs[0], *inputs[2:4], impl="triton")
    assert pooled.isnan().all(1).tolist() == [False, True, False]


def test_a_large_mean_leaves_the_variance_exact():
    inputs, scale, douts = draw((3, 50, 96))
    inputs[0] += 1000
    check_add(inputs, scale, douts)
    (x, *parameters), dout = draw_mean((3, 50, 96))
    check_mean([x + 1000, *parameters], dout)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_nothing(shape):
    inputs, scale, douts = draw(shape)
    wanted = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
    assert all(map(torch.equal, differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts), wanted))
    inputs, dout = draw_mean(shape)
    wanted = differentiate(reference.layer_norm_mean, inputs, [dout])
    ours = differentiate(functools.partial(layer_norm_mean, impl="triton"), inputs, [dout])
    for x, y in zip(ours, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_results_repeat_bit_by_bit():
    inputs, scale, douts = draw((3, 50, 48), torch.bfloat16)
    runs = [differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts) for _ in range(2)]
    assert all(map(torch.equal, *runs))


# --- what PyTorch does with the operations ----------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full):
    inputs, scale, douts = draw((2, 3, 16), branch_bias=full, branch_scale=full)
    x, branch, weight, bias, branch_bias = (t if t is None else t.requires_grad_() for t in inputs)
    dtypes = [torch.float32] * 2
    torch.library.opcheck(OPS.add_layer_norm_triton_fwd, (x, branch, scale, branch_bias, weight, bias, 1e-6, *dtypes))
    torch.library.opcheck(OPS.layer_norm_mean_triton_fwd, (x, weight, bias, 1e-6, torch.float32))
    with torch.no_grad():
        total, _, mean, rstd = OPS.add_layer_norm_triton_fwd(x, branch, scale, branch_bias, weight, bias, 1e-6, *dtypes)
        torch.library.opcheck(
            OPS.add_layer_norm_triton_bwd,
            (douts[0] if full else None, douts[1], total, mean, rstd, scale, weight.detach(), *dtypes, full),
        )
        _, *saved = OPS.layer_norm_mean_triton_fwd(x, weight, bias, 1e-6, torch.float32)
        torch.library.opcheck(
            OPS.layer_norm_mean_triton_bwd, (douts[0][:, 0].contiguous(), x.detach(), *saved, weight.detach())
        )


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_in_one_graph(impl):
    (x, branch, weight, bias, branch_bias), scale, _ = draw((2, 3, 16))

    def both(x, branch, scale):
        outs = add_layer_norm(x, branch, weight, bias, branch_bias=branch_bias, branch_scale=scale, impl=impl)
        return *outs, layer_norm_mean(x, weight, bias, impl=impl)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 1, 2):
        given = (x[:B], branch[:B], scale[:B])
        for got, wanted in zip(compiled(*given), both(*given), strict=True):
            assert relative_error(got, wanted) < 1e-6
    x = x.requires_grad_()
    (compiled_grad,) = torch.autograd.grad(sum(out.sum() for out in compiled(x, branch, scale)), x)
    (grad,) = torch.autograd.grad(sum(out.sum() for out in both(x, branch, scale)), x)
    torch.testing.assert_close(compiled_grad, grad)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_exports_with_a_dynamic_batch(impl):
    class Module(torch.nn.Module):
        def forward(self, x, branch, weight, bias):
            return *add_layer_norm(x, branch, weight, bias, impl=impl), layer_norm_mean(x, weight, bias, impl=impl)

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

    def both(impl, x, branch, weight):
        outs = add_layer_norm(x, branch, weight, bias, branch_bias=branch_bias, branch_scale=scale, impl=impl)
        return *outs, layer_norm_mean(x, weight, bias, impl=impl)

    for dims, tensors in (((0, 1, None), (xs, branches, weight)), ((0, None, 0), (xs, branch, weights))):
        wanted = torch.vmap(functools.partial(both, "reference"), dims)(*tensors)
        for got, want in zip(torch.vmap(functools.partial(both, "triton"), dims)(*tensors), wanted, strict=True):
            torch.testing.assert_close(got, want)
    assert torch.func.grad(lambda x: both("auto", x, branch, weight)[1].sum())(x).shape == x.shape


def test_autocast_gives_pytorch_s_dtypes():
    (x, _, weight, bias, branch_bias), scale, douts = draw((2, 30, 16))
    branch = randn(2, 30, 16, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        for stream in (x, x.bfloat16()):  # before the first layer, and where a matmul made it
            inputs = [stream, branch, weight, bias, branch_bias]
            ours = differentiate(add(add_layer_norm, scale, impl="triton"), inputs, douts)
            plain = differentiate(add(reference.add_layer_norm, scale), inputs, douts)
            assert [t.dtype for t in ours] == [t.dtype for t in plain]
            assert all(relative_error(a, b) < 1e-2 for a, b in zip(ours, plain, strict=True))
            ours = layer_norm_mean(stream, weight, bias, impl="triton")
            plain = reference.layer_norm_mean(stream, weight, bias)
            assert ours.dtype == plain.dtype
            assert relative_error(ours, plain) < 1e-2


def test_reference_gradients():
    (x, branch, *vectors), scale, _ = draw((2, 2, 3, 5), torch.float64)
    leaves = [t.requires_grad_() for t in (x, branch, *vectors)]
    assert torch.autograd.gradcheck(add(reference.add_layer_norm, scale), leaves)
    assert torch.autograd.gradcheck(reference.layer_norm_mean, (x, *vectors[:2]))


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
        ({"impl": "cuda"}, "impl: expected one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(2, 3, 16), "branch": torch.zeros(2, 3, 16)}
    arguments |= {"weight": torch.zeros(16), "bias": torch.zeros(16), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        add_layer_norm(**arguments)


def test_bad_input_of_the_mean():
    vector = torch.zeros(16)
    with pytest.raises(
        ValueError, match=r"x: expected 3 or more dimensions \(B, ..., C\) with tokens, got shape \(2, 16"
    ):
        layer_norm_mean(torch.zeros(2, 16), vector, vector)
    with pytest.raises(ValueError, match=r"weight: expected shape \(16,\) \(C,\), got \(8,\)"):
        layer_norm_mean(torch.zeros(2, 3, 16), vector[:8], vector)


def test_an_explicit_choice_never_falls_back():
    inputs, scale, _ = draw((2, 3, 16), torch.float64)
    with pytest.raises(
        RuntimeError, match=r"impl: 'triton' cannot run add_layer_norm here: dtype torch.float64 is none"
    ):
        add(add_layer_norm, scale, impl="triton")(*inputs)
    assert _configs.MAX_LAYER_NORM_CHANNELS == ops.MAX_CHANNELS
    wide, vector = torch.zeros(1, 1, 4097, device=DEVICE), torch.zeros(4097, device=DEVICE)
    with pytest.raises(RuntimeError, match="cannot run layer_norm_mean here: C = 4097 channels are over 4096"):
        layer_norm_mean(wide, vector, vector, impl="triton")
    assert layer_norm_mean(wide, vector, vector, impl="reference").shape == (1, 4097)


def test_kernels_neither_spill_nor_overflow():
    """At the tiles of the models' narrowest, middle and widest rows."""
    found = compile_offline("""
from nest_fast.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from nest_fast.kernels.layer_norm_mean import layer_norm_mean_bwd, layer_norm_mean_fwd
half = torch.bfloat16
for C in (96, 384, 1536):
    x, v, s, m = empty(8, 16, 196, C), empty(C), empty(8), empty(8, 16, 196, dtype=torch.float32)
    add_layer_norm_bwd(x, x, x, m, m, s, v, half, half, True)
    if C != 384:  # the others hold far less in registers
        add_layer_norm_bwd(x, x, x, m, m, None, v, half, half, False)
        add_layer_norm_fwd(x, x, s, v, v, v, 1e-6, half, half)
        layer_norm_mean_fwd(x, v, v, 1e-6, half)
        layer_norm_mean_bwd(x[:, 0, 0], x, empty(8, C, dtype=torch.float32), m, m, v)
""")
    assert len(found) == 3 * (3 + 2 * 5)
    assert {name: row for name, row in found.items() if row != [0, True]} == {}


@pytest.mark.gpu
def test_over_two_to_the_31_elements():
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
