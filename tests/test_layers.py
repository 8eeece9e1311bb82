"""attention_layer and mlp_layer: every implementation against float64, registration, choosing, errors."""

import math
import random
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from common import CPP_ISA, DTYPES, ISAS, guarded, in_double, instructions, saved_bytes, with_threads
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strides import restrided
from torch.utils._python_dispatch import TorchDispatchMode

from nest_fast import attention_layer, mlp_layer, reference
from nest_fast.ops import _extension
from nest_fast.testing import gradients, relative_error

OPS = torch.ops.nest_fast
needs_cpp = pytest.mark.skipif(not CPP_ISA, reason="the extension is not built, or the processor has no AVX2")


@pytest.fixture(params=ISAS or [pytest.param("", marks=needs_cpp)])
def isa(request):
    with instructions(request.param):
        yield


def vectors(*sizes):
    return [torch.randn(size) * 0.3 for size in sizes]


def attention_inputs(B, T, N, C, num_heads, multi_query=False, dtype=torch.float32):
    """x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias; options."""
    packed = C + 2 * (C // num_heads if multi_query else C)
    norm_weight, norm_bias, qkv_bias, proj_bias = vectors(C, C, packed, C)
    qkv, proj = torch.randn(packed, C) * C**-0.5, torch.randn(C, C) * C**-0.5
    tensors = (torch.randn(B, T, N, C), 1 + norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias)
    return [t.to(dtype) for t in tensors], {"num_heads": num_heads, "multi_query": multi_query}


def mlp_inputs(B, T, N, C, hidden, activation="gelu", dtype=torch.float32):
    norm_weight, norm_bias, fc1_bias, fc2_bias = vectors(C, C, hidden, C)
    fc1, fc2 = torch.randn(hidden, C) * C**-0.5, torch.randn(C, hidden) * max(hidden, 1) ** -0.5
    tensors = (torch.randn(B, T, N, C), 1 + norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias)
    return [t.to(dtype) for t in tensors], {"activation": activation}


def both():
    return (attention_layer, *attention_inputs(2, 3, 5, 24, 3)), (mlp_layer, *mlp_inputs(2, 3, 5, 24, 40))


def assert_accurate(function, tensors, options, slack=0.0):
    """The L2 error at most 1.25 of plain PyTorch's, of the branch alone: x itself would hide it."""
    with torch.no_grad():
        ours, plain = (function(*tensors, **options, impl=impl) for impl in ("cpp", "reference"))
        wide = in_double(tensors)
        exact = function(*wide, **options, impl="reference")
    error, allowed = (relative_error(y.double() - wide[0], exact - wide[0]) for y in (ours, plain))
    assert ours.dtype == plain.dtype
    assert ours.is_contiguous()
    assert error <= 1.25 * allowed + slack, f"error {error:.3e}, plain PyTorch's {allowed:.3e}"


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        attention_inputs(1, 1, 196, 96, 3),
        attention_inputs(1, 9, 49, 64, 2),
        attention_inputs(2, 8, 16, 192, 3, True),
        attention_inputs(5, 2, 17, 70, 5),
        mlp_inputs(1, 1, 196, 96, 384),
        mlp_inputs(1, 3, 61, 384, 1536, "gelu_tanh"),
        mlp_inputs(2, 5, 29, 50, 77),
    ],
    ids=["attention-196", "attention-49", "attention-mq-16", "attention-odd", "mlp-96", "mlp-384-tanh", "mlp-odd"],
)
def test_as_accurate_as_plain_pytorch(isa, dtype, case):
    tensors, options = case
    function = attention_layer if "num_heads" in options else mlp_layer
    assert_accurate(function, [t.to(dtype) for t in tensors], options)


@st.composite
def any_layers(draw):
    """Both layers of any shape: function, inputs, options."""
    B, T, N = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)))
    heads, head_dim, hidden = draw(st.tuples(st.integers(1, 4), st.integers(1, 33), st.integers(1, 90)))
    dtype, activation = draw(st.sampled_from([*DTYPES.values()])), draw(st.sampled_from(["gelu", "gelu_tanh"]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    C = heads * head_dim
    layers = (
        (attention_layer, *attention_inputs(B, T, N, C, heads, draw(st.booleans()), dtype)),
        (mlp_layer, *mlp_inputs(B, T, N, C, hidden, activation, dtype)),
    )
    if draw(st.booleans()):
        for _, tensors, _ in layers:
            tensors[4] = tensors[6] = None
    return layers


# In a handful of numbers the error of either is luck, of sums that happen to cancel: so many roundings are allowed.
LUCK = 16


@needs_cpp
@settings(max_examples=60)
@given(any_layers())
def test_any_shape(isa, layers):
    for function, tensors, options in layers:
        assert_accurate(function, tensors, options, LUCK * torch.finfo(tensors[0].dtype).eps)


@needs_cpp
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_everywhere(isa, activation):
    """On one channel whose LayerNorm is its bias, so that the layer is the activation: x = 0, fc1 = 0, fc2 = 1."""
    finite = torch.cat([torch.linspace(-14, 14, 50001), torch.tensor([-1e30, -100.0, 100.0, 1e30])])
    special = torch.tensor([math.nan, math.inf])
    hidden = torch.cat([finite, special])
    ours = torch.empty_like(hidden)
    for at in range(0, len(hidden), 4096):  # as fc1's bias, read back through the identity
        part = hidden[at : at + 4096]
        eye = torch.eye(len(part))
        x = torch.zeros(1, len(part))
        ones = torch.ones(len(part))
        if part.isfinite().all():
            ours[at : at + 4096] = mlp_layer(
                x, ones, 0 * ones, 0 * eye, part, eye, None, activation=activation, impl="cpp"
            )
        else:  # 0 x NaN of another channel: one at a time
            for i, value in enumerate(part):
                one = torch.ones(1, 1)
                args = (torch.zeros(1, 1), one[0], 0 * one[0], 0 * one, value.view(1), one, None)
                ours[at + i] = mlp_layer(*args, activation=activation, impl="cpp")[0, 0]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    exact = torch.nn.functional.gelu(hidden.double(), approximate=approximate)
    error = (ours - exact)[: len(finite) - 4].abs().max()
    assert error < 2e-6
    assert torch.equal(ours[-6:-2], torch.tensor([-0.0, -0.0, 100.0, 1e30]))
    assert ours[-2].isnan()
    assert ours[-1] == math.inf


@needs_cpp
def test_special_values_stay_in_their_rows(isa):
    for function, tensors, options in both():
        for value in (math.nan, math.inf):
            tensors[0][1, 2, 3, 4] = value
            out = function(*tensors, **options, impl="cpp")
            wanted = function(*tensors, **options, impl="reference")
            assert torch.equal(out.isnan(), wanted.isnan())
            assert out.isnan().any()
            tensors[0][1, 2, 3, 4] = 0


@needs_cpp
def test_same_bits_for_any_number_of_threads_and_any_neighbours(isa):
    """1 thread takes whole blocks, 64 divide the parts of each; a block is computed alike beside any others."""
    for function, tensors, options in both():
        first, *others = with_threads(lambda f=function, t=tensors, o=options: f(*t, **o, impl="cpp"), (1, 2, 64))
        assert all(torch.equal(first, other) for other in others)
    function, tensors, options = both()[0]
    alone = function(tensors[0][1:, 1:2], *tensors[1:], **options, impl="cpp")
    assert torch.equal(function(*tensors, **options, impl="cpp")[1:, 1:2], alone)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reads_nothing_around_the_inputs(isa, dtype):
    for function, tensors, options in both():
        tensors = [t.to(dtype) for t in tensors]
        dout = torch.randn_like(tensors[0])
        results = []
        for where in (guarded, torch.clone):
            leaves = [where(t).requires_grad_() for t in tensors]
            out = function(*leaves, **options, impl="cpp")
            results.append((out, *torch.autograd.grad(out, leaves, where(dout))))
        assert all(map(torch.equal, *results))
        assert not any(x.isnan().any() for x in results[0])


@needs_cpp
def test_strided_operands_give_the_same_bits():
    chance = random.Random(0)
    for function, tensors, options in both() * 5:
        strange = [restrided(t, chance, expandable=()) for t in tensors]
        assert not all(t.is_contiguous() for t in strange)
        calls = [partial(function, *given, **options, impl="cpp") for given in (tensors, strange)]
        assert torch.equal(*(call() for call in calls))


@pytest.mark.parametrize("impl", ["auto", pytest.param("cpp", marks=needs_cpp)])
def test_rows_that_are_a_view_and_not_dense(impl):
    """As the features of a convolution are tokens, at batch 1, and every second channel."""
    for function, tensors, options in both():
        for x in (torch.randn(1, 24, 3, 5).flatten(2).mT.unsqueeze(1), torch.randn(2, 3, 5, 48)[..., ::2]):
            assert x.reshape(-1, 24).data_ptr() == x.data_ptr()
            dout = torch.randn_like(x)
            ours = gradients(partial(function, **options, impl=impl), (x, *tensors[1:]), dout)
            plain = gradients(partial(function, **options, impl="reference"), (x, *tensors[1:]), dout)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


NAMES = ("x", "norm_weight", "norm_bias", "weight", "bias", "weight 2", "bias 2")


def assert_accurate_gradients(function, tensors, options, slack=0.0):
    """The L2 error of each gradient at most twice plain PyTorch's."""
    dout = torch.randn_like(tensors[0])
    given = [t for t in tensors if t is not None]

    def run(*t, impl):
        t = iter(t)
        return function(*(None if x is None else next(t) for x in tensors), **options, impl=impl)

    ours, plain = (gradients(lambda *t, impl=impl: run(*t, impl=impl), given, dout) for impl in ("cpp", "reference"))
    exact = gradients(lambda *t: run(*t, impl="reference"), in_double(given), dout)
    with torch.no_grad():
        assert torch.equal(run(*given, impl="cpp"), ours[0])
    names = ("out", *(name for name, x in zip(NAMES, tensors, strict=True) if x is not None))
    for name, a, b, golden in zip(names, ours, plain, exact, strict=True):
        assert a.dtype == given[0].dtype, name
        assert a.shape == golden.shape, name
        error, theirs = relative_error(a, golden), relative_error(b, golden)
        assert error <= 2 * theirs + slack, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}"


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        attention_inputs(2, 4, 49, 64, 2),
        attention_inputs(3, 2, 16, 96, 3, True),
        attention_inputs(1, 70, 16, 256, 4),  # several chunks of rows, the last one shorter
        mlp_inputs(3, 2, 49, 64, 256),
        mlp_inputs(1, 3, 61, 32, 8192, "gelu_tanh"),  # several chunks
    ],
    ids=["attention", "attention-mq", "attention-long", "mlp", "mlp-wide-tanh"],
)
def test_gradients_are_as_accurate_as_plain_pytorchs(isa, dtype, case):
    tensors, options = [t.to(dtype) for t in case[0]], case[1] | {"branch_scale": 1.7}
    assert_accurate_gradients(attention_layer if "num_heads" in options else mlp_layer, tensors, options)


@needs_cpp
@settings(max_examples=40)
@given(any_layers())
def test_gradients_of_any_shape(isa, layers):
    for function, tensors, options in layers:
        assume(tensors[0].shape[-1] > 3)  # the LayerNorm of less is as good as constant
        # The chains of a gradient are longer.
        assert_accurate_gradients(function, tensors, options, 4 * LUCK * torch.finfo(tensors[0].dtype).eps)


class WhatBackwardComputes(TorchDispatchMode):
    """Which of their gradients the backwards of the branch and of the LayerNorm compute."""

    branch = norm = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        computed = [x is not None and x.numel() > 0 for x in results] if isinstance(results, tuple) else None
        if op.name().endswith("_cpp_bwd"):
            self.branch = computed
        elif op is torch.ops.aten.native_layer_norm_backward.default:
            self.norm = computed
        return results


@needs_cpp
@settings(max_examples=60)
@given(any_layers(), st.data())
def test_gradients_nobody_asked_for_are_not_computed(isa, layers, data):
    """Frozen weights, in any combination: the others' gradients keep their bits."""
    for function, tensors, options in layers:
        given = [n for n, t in enumerate(tensors) if t is not None]
        wanted = sorted(data.draw(st.sets(st.sampled_from(given), min_size=1)))
        dout, results = torch.randn_like(tensors[0]), []
        for trained in (given, wanted):
            leaves = [t if t is None else t.clone().requires_grad_(n in trained) for n, t in enumerate(tensors)]
            out = function(*leaves, **options, impl="cpp")
            with WhatBackwardComputes() as computed:
                out.backward(dout)
            results.append([None if t is None else t.grad for t in leaves])
        for n, (alone, together) in enumerate(zip(results[1], results[0], strict=True)):
            assert torch.equal(alone, together) if n in wanted else alone is None, NAMES[n]
        before, *linear = any(n in wanted for n in range(3)), *(n in wanted for n in range(3, 7))
        assert computed.branch == [before, *linear]
        assert computed.norm == ([n in wanted for n in range(3)] if before else None)


@needs_cpp
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_slope_of_gelu_everywhere(isa, activation):
    """dx of fc2(activation(hidden)) with fc1 = fc2 = 1 and dout = 1 is the activation's derivative."""
    hidden = torch.cat([torch.linspace(-14, 14, 50001), torch.tensor([-1e18, -100.0, 100.0, 1e18])]).view(-1, 1)
    one, dout = torch.ones(1, 1), torch.ones_like(hidden)
    mask = [True] * 5
    ours, *_ = OPS.mlp_layer_cpp_bwd(dout, dout, hidden, one, activation, one, mask)
    wide = hidden.double().requires_grad_()
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    torch.nn.functional.gelu(wide, approximate=approximate).sum().backward()
    assert (ours - wide.grad).abs().max() < 2e-6
    assert OPS.mlp_layer_cpp_bwd(one, one, one * math.nan, one, activation, one, mask)[0].isnan()


@needs_cpp
def test_gradients_have_the_same_bits_for_any_number_of_threads(isa):
    for function, tensors, options in both():
        call = partial(function, **options, impl="cpp")
        results = with_threads(partial(gradients, call, tensors, torch.randn_like(tensors[0])), (1, 2, 64))
        for name, *same in zip(("out", *NAMES), *results, strict=True):
            if name.startswith("norm"):  # PyTorch's, a sum for each thread
                torch.testing.assert_close(same[1:], same[:1] * 2)
            else:
                assert all(torch.equal(same[0], other) for other in same[1:]), name


@needs_cpp
def test_gradients_of_nothing_are_zeros():
    for function, tensors, options in both():
        empty = [tensors[0][:0], *tensors[1:]]
        out, dx, *others = gradients(lambda *t, f=function, o=options: f(*t, **o, impl="cpp"), empty, empty[0])
        assert out.shape == dx.shape == (0, 3, 5, 24)
        assert not any(map(torch.any, others))


@needs_cpp
def test_gradients_have_no_gradients():
    for function, tensors, options in both():
        leaves = [t.clone().requires_grad_() for t in tensors]
        (dx,) = torch.autograd.grad(function(*leaves, **options, impl="cpp").sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match=f"impl: wanted 'reference' for a derivative of {function.__name__}'s"):
            dx.square().sum().backward()


@needs_cpp
def test_each_gradient_alone_and_without_biases():
    for function, tensors, options in both():
        dout = torch.randn_like(tensors[0])
        together = gradients(lambda *t, f=function, o=options: f(*t, **o, impl="cpp"), tensors, dout)[1:]
        for wanted in range(len(tensors)):
            leaves = [t.clone().requires_grad_(n == wanted) for n, t in enumerate(tensors)]
            (alone,) = torch.autograd.grad(function(*leaves, **options, impl="cpp"), leaves[wanted], dout)
            assert torch.equal(alone, together[wanted]), NAMES[wanted]
        some = [n for n in range(7) if n not in (4, 6)]

        def unbiased(*t, impl, f=function, o=options):
            return f(*t[:4], None, t[4], None, **o, impl=impl)

        given = [tensors[n] for n in some]
        ours, plain = (
            gradients(lambda *t, impl=impl, run=unbiased: run(*t, impl=impl), given, dout)
            for impl in ("cpp", "reference")
        )
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_cpp
def test_keeps_little_for_the_gradient():
    """A layer in all: qkv, attention's output, its sums and fc1's output; x and what comes after x are there anyway."""
    for (function, tensors, options), widths, ours_at_most in zip(
        (
            (attention_layer, *attention_inputs(2, 4, 16, 64, 2)),
            (mlp_layer, *mlp_inputs(2, 4, 16, 64, 256)),
        ),
        (4 + 2 / 64, 4),
        (0.8, 0.5),
        strict=True,
    ):
        leaves = [t.requires_grad_() for t in tensors]
        x = leaves[0] * 1  # saved as an activation is
        ours = saved_bytes(lambda f=function, o=options, x=x, t=leaves: f(x, *t[1:], **o, impl="cpp"))
        plain = saved_bytes(lambda f=function, o=options, x=x, t=leaves: f(x, *t[1:], **o, impl="reference"))
        assert ours == (widths + 1) * x.nbytes
        assert ours <= ours_at_most * plain


def test_gradients_with_auto():
    for function, tensors, options in both():
        dout = torch.randn_like(tensors[0])
        got = gradients(lambda *t, f=function, o=options: f(*t, **o), tensors, dout)
        wanted = gradients(lambda *t, f=function, o=options: f(*t, **o, impl="reference"), tensors, dout)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_reference_gradcheck():
    for function, (tensors, options) in (
        (reference.attention_layer, attention_inputs(1, 2, 3, 4, 2)),
        (reference.mlp_layer, mlp_inputs(1, 2, 3, 4, 6)),
    ):
        leaves = [t.double().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(lambda *t, f=function, o=options: f(*t, **o), leaves)


def test_auto_under_autocast_of_nothing_and_of_doubles():
    for function, tensors, options in both():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out, wanted = (function(*tensors, **options, impl=impl) for impl in ("auto", "reference"))
            assert out.dtype == wanted.dtype
            assert relative_error(out, wanted) < 0.02
        nothing = function(tensors[0][:0], *tensors[1:], **options)
        assert nothing.shape == (0, 3, 5, 24)
        wide = in_double(tensors)
        torch.testing.assert_close(function(*wide, **options), function(*wide, **options, impl="reference"))


def test_auto_takes_layers_of_nothing():
    """No blocks, no tokens, no features, nothing hidden: as plain PyTorch has it, gradients included."""
    for function, (tensors, options) in (
        (attention_layer, attention_inputs(2, 2, 0, 8, 2)),
        (attention_layer, attention_inputs(2, 0, 4, 8, 2)),
        (mlp_layer, mlp_inputs(2, 3, 4, 8, 0)),
        (mlp_layer, mlp_inputs(2, 3, 0, 8, 16)),
    ):
        dout = torch.randn_like(tensors[0])
        ours, plain = (
            gradients(partial(function, **options, impl=impl), tensors, dout) for impl in ("auto", "reference")
        )
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(training):
    (_, tensors, _), (_, others, _) = both()
    for t in (*tensors, *others):
        t.requires_grad_(training)
    x, norm_weight, norm_bias, *weights = tensors
    call = (x.view(-1, 24), norm_weight, norm_bias, 1e-6, *weights, 5, 3, 3, 0.3, 0.5, training)
    torch.library.opcheck(OPS.attention_layer_cpp.default, call)
    x, norm_weight, norm_bias, fc1, fc1_bias, *fc2 = others
    call = (x.view(-1, 24), norm_weight, norm_bias, 1e-6, fc1, fc1_bias, "gelu", *fc2, 0.5, training)
    torch.library.opcheck(OPS.mlp_layer_cpp.default, call)


@needs_cpp
def test_opcheck_of_the_backward():
    rows, packed, hidden = torch.randn(30, 24), torch.randn(30, 72), torch.randn(30, 40)
    fc1, fc2, qkv, proj = (torch.randn(size) for size in ((40, 24), (24, 40), (72, 24), (24, 24)))
    call = (rows, rows, packed, rows, torch.randn(6, 3, 5), qkv, proj, 5, 3, 3, 0.3)
    for mask in ([True] * 5, [True, False, False, True, False], [False, False, True, False, True], [False] * 5):
        torch.library.opcheck(OPS.mlp_layer_cpp_bwd.default, (rows, rows, hidden, fc1, "gelu", fc2, mask))
        torch.library.opcheck(OPS.attention_layer_cpp_bwd.default, (*call, mask))


def test_compiles_and_exports_with_a_dynamic_batch():
    class Layer(torch.nn.Module):
        def __init__(self, function, tensors, options):
            super().__init__()
            self.function, self.options = function, options
            for n, t in enumerate(tensors):
                self.register_buffer(f"p{n}", t)

        def forward(self, x):
            return self.function(x, *self.buffers(), **self.options)

    torch._dynamo.reset()
    for function, tensors, options in both():
        module, batch = Layer(function, tensors[1:], options), torch.export.Dim("batch", min=1, max=64)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        exported = torch.export.export(module, (tensors[0],), dynamic_shapes=({0: batch},)).module()
        with torch.no_grad():
            for B in (2, 3, 5, 7):
                x = torch.randn(B, 3, 5, 24)
                torch.testing.assert_close(compiled(x), module(x))
                torch.testing.assert_close(exported(x), module(x))
        assert counter.frame_count <= 2


@needs_cpp
def test_an_explicit_choice_never_falls_back(monkeypatch):
    for function, tensors, options in both():
        name = function.__name__
        with pytest.raises(RuntimeError, match=f"impl: 'cpp' cannot run {name} here: .*torch.float64"):
            function(*(t.double() for t in tensors), **options, impl="cpp")
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast is on"):
            function(*tensors, **options, impl="cpp")
        monkeypatch.setattr(_extension, "cpp_isa", "")
        with pytest.raises(RuntimeError, match="neither AVX-512 nor AVX2"):
            function(*tensors, **options, impl="cpp")
        assert relative_error(function(*tensors, **options), function(*tensors, **options, impl="reference")) < 1e-5
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, {0: torch.zeros(3, 5, 24)}, r"x: wanted 4 dimensions \(B, T, N, C\), got shape \(3, 5, 24\)"),
        (0, {0: torch.zeros(2, 3, 5, 24).long()}, r"x: wanted a floating-point dtype, got torch.int64"),
        (0, {3: torch.zeros(71, 24)}, r"qkv_weight: wanted shape \(72, 24\), got \(71, 24\)"),
        (0, {"num_heads": 5}, r"num_heads: wanted a divisor of C = 24, got 5"),
        (0, {"multi_query": True}, r"qkv_weight: wanted shape \(40, 24\), got \(72, 24\)"),
        (0, {5: torch.zeros(24, 24).half()}, r"proj_weight: wanted dtype torch.float32 as x has, got torch.float16"),
        (0, {"impl": "triton"}, r"impl: wanted one of 'auto', 'reference', 'cpp', got 'triton'"),
        (1, {0: torch.zeros(5, 23)}, r"x: wanted shape \(…, 24\) as fc1_weight says, got \(5, 23\)"),
        (1, {1: None}, r"norm_weight: wanted a tensor \(24\), got NoneType"),
        (1, {4: torch.zeros(24)}, r"fc1_bias: wanted shape \(40,\), got \(24,\)"),
        (1, {5: torch.zeros(40, 24)}, r"fc2_weight: wanted shape \(24, 40\), got \(40, 24\)"),
        (1, {6: torch.zeros(24, device="meta")}, r"fc2_bias: wanted device cpu as x has, got meta"),
        (1, {"activation": "relu"}, r"activation: wanted one of 'gelu', 'gelu_tanh', got 'relu'"),
    ],
)
def test_bad_input(which, change, message):
    function, tensors, options = both()[which]
    args = [change.get(n, t) for n, t in enumerate(tensors)]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        function(*args, **options | {k: v for k, v in change.items() if isinstance(k, str)})
    assert "\n" not in str(error.value)


@needs_cpp
def test_the_operations_refuse_what_would_be_read_out_of_bounds():
    (_, tensors, _), (_, others, _) = both()
    x, norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias = tensors
    rows = x.view(-1, 24)

    def attention(rows=rows, norm=norm_weight, qkv=qkv, bias=qkv_bias, tokens=5, heads=3, kv=3):
        call = (rows, norm, norm_bias, 1e-6, qkv, bias, proj, proj_bias, tokens, heads, kv, 0.3, 1.0, False)
        return OPS.attention_layer_cpp(*call)

    hidden, packed, lse = torch.zeros(30, 40), torch.zeros(30, 72), torch.zeros(6, 3, 5)

    def mlp_backward(x=rows, hidden=hidden, fc1=others[3], fc2=others[5]):
        return OPS.mlp_layer_cpp_bwd(rows, x, hidden, fc1, "gelu", fc2, [True] * 5)

    def attention_backward(packed=packed, attended=rows, lse=lse, qkv=qkv):
        return OPS.attention_layer_cpp_bwd(rows, rows, packed, attended, lse, qkv, proj, 5, 3, 3, 0.3, [True] * 5)

    for message, wrong in {
        "x: expected dense rows": lambda: attention(rows.t().contiguous().t()),
        "tokens: expected a divisor of 30 rows, got 4": lambda: attention(tokens=4),
        "heads: expected a divisor of 24 features": lambda: attention(heads=5),
        "kv_heads: expected 3 or 1, got 2": lambda: attention(kv=2),
        "norm_weight: expected 24 contiguous elements": lambda: attention(norm=norm_weight[:5]),
        "norm_weight: expected dtype Float": lambda: attention(norm=norm_weight.half()),
        "qkv_weight: expected 72 output features, got 70": lambda: attention(qkv=qkv[:70], bias=None),
        "bias: expected 72 contiguous": lambda: attention(bias=qkv_bias[:5]),
        "fc2_weight: expected 2 dimensions, the last 40": lambda: OPS.mlp_layer_cpp(
            rows, norm_weight, norm_bias, 1e-6, others[3], None, "gelu", others[5][:, :30], None, 1.0, False
        ),
        'activation: expected "gelu" or "gelu_tanh", got "relu"': lambda: OPS.mlp_layer_cpp(
            rows, norm_weight, norm_bias, 1e-6, others[3], None, "relu", others[5], None, 1.0, False
        ),
        "hidden: expected 2 dimensions, the last 40": lambda: mlp_backward(hidden=rows),
        "hidden: expected 30 contiguous rows as dout has, got 29": lambda: mlp_backward(hidden=hidden[:29]),
        "hidden: expected 30 contiguous rows .*, got 30 with gaps": lambda: mlp_backward(hidden=packed[:, :40]),
        "x: expected 2 dimensions, the last 24": lambda: mlp_backward(x=rows[:, :23]),
        "fc2_weight: expected 2 dimensions, the last 39": lambda: mlp_backward(fc1=others[3][:39]),
        "fc2_weight: expected 24 rows, got 23": lambda: mlp_backward(fc2=others[5][:23]),
        "x: expected 30 rows as dout has, got 29": lambda: mlp_backward(x=rows[:29]),
        "lse: expected 90": lambda: attention_backward(lse=lse[:5]),
        "qkv: expected 2 dimensions, the last 72": lambda: attention_backward(packed=rows),
        "attended: expected dtype Float, got Half": lambda: attention_backward(attended=rows.half()),
        "qkv_weight: expected 72 rows, got 71": lambda: attention_backward(qkv=qkv[:71]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            wrong()
