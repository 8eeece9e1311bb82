"""What is tested of attention_layer as of mlp_layer; their files import these tests and say which layer it is.

Such a file has two fixtures: ``layer``, which is the function, its tensors and its options, and ``any_layer``, a
strategy that draws the same three in every shape and dtype.
"""

import math
import random
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.common import CPP_ISA, DTYPES, ISAS, guarded, in_double, instructions, saved_bytes, with_threads
from helpers.strides import restrided
from nest_fast import attention_layer
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


def assert_accurate(function, tensors, options, slack=0.0, impl="cpp"):
    """The L2 error at most 1.25 of plain PyTorch's, of the branch alone: x itself would hide it."""
    with torch.no_grad():
        ours, plain = (function(*tensors, **options, impl=one) for one in (impl, "reference"))
        wide = in_double(tensors)
        exact = function(*wide, **options, impl="reference")
    error, allowed = (relative_error(y.double() - wide[0], exact - wide[0]) for y in (ours, plain))
    assert ours.dtype == plain.dtype
    assert ours.is_contiguous()
    assert error <= 1.25 * allowed + slack, f"error {error:.3e}, plain PyTorch's {allowed:.3e}"


# In a handful of numbers the error of either is luck, of sums that happen to cancel: so many roundings are allowed.
LUCK = 16


@needs_cpp
@settings(max_examples=60)
@given(data=st.data())
def test_of_any_shape(isa, any_layer, data):
    function, tensors, options = data.draw(any_layer)
    assert_accurate(function, tensors, options, LUCK * torch.finfo(tensors[0].dtype).eps)


@needs_cpp
def test_keeps_special_values_where_pytorch_does(isa, layer):
    function, tensors, options = layer
    for value in (math.nan, math.inf):
        tensors[0][1, 2, 3, 4] = value
        out = function(*tensors, **options, impl="cpp")
        wanted = function(*tensors, **options, impl="reference")
        assert torch.equal(out.isnan(), wanted.isnan())
        assert out.isnan().any()


@needs_cpp
def test_repeats_bit_by_bit(isa, layer):
    """1 thread takes whole blocks, 64 divide the parts of each; a block is computed alike beside any others."""
    function, tensors, options = layer
    call = partial(function, **options, impl="cpp")
    first, *others = with_threads(lambda: call(*tensors), (1, 2, 64))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(call(tensors[0][1:, 1:2], *tensors[1:]), first[1:, 1:2])


@needs_cpp
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [*((dtype, None) for dtype in DTYPES.values()), (torch.float32, torch.bfloat16)],
    ids=[*DTYPES, "fp32 under autocast"],
)
def test_stays_inside_its_buffers(isa, layer, dtype, autocast):
    function, tensors, options = layer
    tensors = [t.to(dtype) for t in tensors]
    dout = torch.randn_like(tensors[0])
    results = []
    for where in (guarded, torch.clone):
        leaves = [where(t).requires_grad_() for t in tensors]
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = function(*leaves, **options, impl="cpp")
        results.append((out, *torch.autograd.grad(out, leaves, where(dout))))
    assert all(map(torch.equal, *results))
    assert not any(x.isnan().any() for x in results[0])


@needs_cpp
def test_of_any_strides(layer):
    function, tensors, options = layer
    chance = random.Random(0)
    for _ in range(5):
        strange = [restrided(t, chance, expandable=()) for t in tensors]
        assert not all(t.is_contiguous() for t in strange)
        calls = [partial(function, *given, **options, impl="cpp") for given in (tensors, strange)]
        assert torch.equal(*(call() for call in calls))


@pytest.mark.parametrize("impl", ["auto", pytest.param("cpp", marks=needs_cpp)])
def test_of_any_strides_whose_rows_are_a_view(layer, impl):
    """As the features of a convolution are tokens, at batch 1, and every second channel."""
    function, tensors, options = layer
    for x in (torch.randn(1, 24, 3, 5).flatten(2).mT.unsqueeze(1), torch.randn(2, 3, 5, 48)[..., ::2]):
        assert x.reshape(-1, 24).data_ptr() == x.data_ptr()
        dout = torch.randn_like(x)
        ours = gradients(partial(function, **options, impl=impl), (x, *tensors[1:]), dout)
        plain = gradients(partial(function, **options, impl="reference"), (x, *tensors[1:]), dout)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


# Of the tensors; a layer may have more than the first seven.
NAMES = ("x", "norm_weight", "norm_bias", "weight", "bias", "weight 2", "bias 2", "bias of the scores", "scales")


def assert_accurate_gradients(function, tensors, options, slack=0.0, draws=1):
    """The L2 error of each gradient at most twice plain PyTorch's.

    It is that of so many ``draws`` of what comes back, all together: where a gradient has a few numbers one is luck.
    """
    given = [t for t in tensors if t is not None]

    def run(*t, impl):
        t = iter(t)
        return function(*(None if x is None else next(t) for x in tensors), **options, impl=impl)

    def drawn(impl, given):
        found = (gradients(lambda *t: run(*t, impl=impl), given, dout) for dout in douts)
        return [torch.stack(each) for each in zip(*found, strict=True)]

    douts = torch.randn(draws, *tensors[0].shape, dtype=tensors[0].dtype)
    ours, plain = drawn("cpp", given), drawn("reference", given)
    exact = drawn("reference", in_double(given))
    with torch.no_grad():
        assert torch.equal(run(*given, impl="cpp"), ours[0][0])
    names = ("out", *(name for name, x in zip(NAMES, tensors, strict=False) if x is not None))
    for name, a, b, golden in zip(names, ours, plain, exact, strict=True):
        assert a.dtype == given[0].dtype, name
        assert a.shape == golden.shape, name
        error, theirs = relative_error(a, golden), relative_error(b, golden)
        assert error <= 2 * theirs + slack, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}"


@needs_cpp
@settings(max_examples=40)
@given(data=st.data())
def test_gradients_of_any_shape(isa, any_layer, data):
    function, tensors, options = data.draw(any_layer)
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
@given(data=st.data())
def test_gradients_nobody_asked_for_are_not_computed(isa, any_layer, data):
    """Frozen weights, in any combination: the others' gradients keep their bits."""
    function, tensors, options = data.draw(any_layer)
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
    assert computed.branch[:5] == [before, *linear]
    assert computed.norm == ([n in wanted for n in range(3)] if before else None)


@needs_cpp
def test_gradient_repeats_bit_by_bit(isa, layer):
    function, tensors, options = layer
    call = partial(function, **options, impl="cpp")
    results = with_threads(partial(gradients, call, tensors, torch.randn_like(tensors[0])), (1, 2, 64))
    for name, *same in zip(("out", *NAMES[: len(tensors)]), *results, strict=True):
        if name.startswith("norm"):  # PyTorch's, a sum for each thread
            torch.testing.assert_close(same[1:], same[:1] * 2)
        else:
            assert all(torch.equal(same[0], other) for other in same[1:]), name


@needs_cpp
def test_of_nothing(layer):
    function, tensors, options = layer
    empty = [tensors[0][:0], *tensors[1:]]
    out, dx, *others = gradients(partial(function, **options, impl="cpp"), empty, empty[0])
    assert out.shape == dx.shape == (0, 3, 5, 24)
    assert not any(map(torch.any, others))
    assert function(*empty, **options).shape == (0, 3, 5, 24)


@needs_cpp
def test_refuses_gradients_of_gradients(layer):
    function, tensors, options = layer
    leaves = [t.clone().requires_grad_() for t in tensors]
    (dx,) = torch.autograd.grad(function(*leaves, **options, impl="cpp").sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"impl: expected 'reference' for a derivative of {function.__name__}'s"):
        dx.square().sum().backward()


@needs_cpp
def test_each_gradient_alone_and_without_biases(layer):
    function, tensors, options = layer
    dout = torch.randn_like(tensors[0])
    together = gradients(partial(function, **options, impl="cpp"), tensors, dout)[1:]
    for wanted in range(len(tensors)):
        leaves = [t.clone().requires_grad_(n == wanted) for n, t in enumerate(tensors)]
        (alone,) = torch.autograd.grad(function(*leaves, **options, impl="cpp"), leaves[wanted], dout)
        assert torch.equal(alone, together[wanted]), NAMES[wanted]

    def unbiased(*t, impl):
        return function(*t[:4], None, t[4], None, **options, impl=impl)

    given = [t for n, t in enumerate(tensors) if n not in (4, 6)]
    ours, plain = (gradients(partial(unbiased, impl=impl), given, dout) for impl in ("cpp", "reference"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def assert_saves_little(function, tensors, options, widths, at_most):
    """``widths`` of x and the output's, ``at_most`` of plain PyTorch's."""
    leaves = [t.requires_grad_() for t in tensors]
    x = leaves[0] * 1  # saved as an activation is
    ours, plain = (
        saved_bytes(lambda impl=impl: function(x, *leaves[1:], **options, impl=impl)) for impl in ("cpp", "reference")
    )
    assert ours == (widths + 1) * x.nbytes
    assert ours <= at_most * plain


def test_gradients_with_auto(layer):
    function, tensors, options = layer
    dout = torch.randn_like(tensors[0])
    got, wanted = (gradients(partial(function, **options, impl=i), tensors, dout) for i in ("auto", "reference"))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_each_sample_has_a_branch_scale_of_its_own(layer):
    """As alone with its number; what has one for all of them says so."""
    function, tensors, options = layer
    options |= {"branch_scale": torch.arange(len(tensors[0])) * 0.8}
    dout = torch.randn_like(tensors[0])

    def one_by_one(x, *rest):
        alone = [options | {"branch_scale": scale} for scale in options["branch_scale"].tolist()]
        return torch.cat([function(x[n : n + 1], *rest, **own, impl="reference") for n, own in enumerate(alone)])

    wanted = gradients(one_by_one, tensors, dout)
    for impl in ("auto", "reference"):
        torch.testing.assert_close(
            gradients(partial(function, **options, impl=impl), tensors, dout), wanted, rtol=1e-4, atol=1e-5
        )
    for impl in ("cpp", *("triton",) * (function is attention_layer)):
        with pytest.raises(RuntimeError, match="it has one branch_scale for all samples"):
            function(*tensors, **options, impl=impl)
    with pytest.raises(ValueError, match=r"^branch_scale: expected shape \(2,\) \(B,\), got \(3,\)$"):
        function(*tensors, **options | {"branch_scale": torch.ones(3)})


class Called(TorchDispatchMode):
    """The names of nest_fast's operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "nest_fast":
            self.names.add(op.name().partition("::")[2])
        return op(*args, **(kwargs or {}))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_last", [False, True], ids=["norm first", "norm last"])
def test_under_autocast_products_are_in_its_dtype(isa, layer, dtype, is_last):
    """What is float32 stays so, gradients too, with the errors of plain PyTorch under the same autocast."""
    function, tensors, options = layer
    options |= {"post_norm": is_last}
    dout = torch.randn_like(tensors[0])

    def under_autocast(*given, impl):
        with torch.autocast("cpu", dtype):
            return function(*given, **options, impl=impl)

    with Called() as called:
        ours = gradients(partial(under_autocast, impl="auto"), tensors, dout)
    assert called.names == {f"{function.__name__}_cpp", f"{function.__name__}_cpp_bwd"}
    plain = gradients(partial(under_autocast, impl="reference"), tensors, dout)
    exact = gradients(partial(function, **options, impl="reference"), in_double(tensors), dout.double())
    for name, a, b, golden in zip(("out", *NAMES[: len(tensors)]), ours, plain, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32, name
        error, theirs = relative_error(a, golden), relative_error(b, golden)
        most = (1.25 if name == "out" else 2) * theirs + torch.finfo(torch.float32).eps
        assert error <= most, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}"


def test_under_autocast_of_other_dtypes(layer):
    """An input that has autocast's dtype beside float32 weights; one in another is for plain PyTorch; and float64."""
    function, tensors, options = layer
    for x in (tensors[0].bfloat16(), tensors[0].half()):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out, wanted = (function(x, *tensors[1:], **options, impl=impl) for impl in ("auto", "reference"))
        assert out.dtype == wanted.dtype
        assert relative_error(out, wanted) < 0.02
    wide = in_double(tensors)
    torch.testing.assert_close(function(*wide, **options), function(*wide, **options, impl="reference"))


def assert_same_of_nothing(function, tensors, options):
    """No blocks, no tokens, no features, nothing hidden: as plain PyTorch has it, gradients included."""
    dout = torch.randn_like(tensors[0])
    ours, plain = (gradients(partial(function, **options, impl=i), tensors, dout) for i in ("auto", "reference"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


class Layer(torch.nn.Module):
    def __init__(self, function, tensors, options):
        super().__init__()
        self.function, self.options = function, options
        for n, t in enumerate(tensors):
            self.register_buffer(f"p{n}", t)

    def forward(self, x):
        return self.function(x, *self.buffers(), **self.options)


def test_compiles_in_one_graph_and_exports_with_a_dynamic_batch(layer):
    function, tensors, options = layer
    torch._dynamo.reset()
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
def test_an_explicit_choice_never_falls_back(layer, monkeypatch):
    function, tensors, options = layer
    with pytest.raises(RuntimeError, match=f"impl: 'cpp' cannot run {function.__name__} here: .*torch.float64"):
        function(*in_double(tensors), **options, impl="cpp")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast is on, and x is"):
        function(tensors[0].half(), *tensors[1:], **options, impl="cpp")
    monkeypatch.setattr(_extension, "cpp_isa", "")
    with pytest.raises(RuntimeError, match="neither AVX-512 nor AVX2"):
        function(*tensors, **options, impl="cpp")
    assert relative_error(function(*tensors, **options), function(*tensors, **options, impl="reference")) < 1e-5
