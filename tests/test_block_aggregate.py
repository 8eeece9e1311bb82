"""block_aggregate: every impl against float64, its registration, its choosing, its errors."""

import functools
import math
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.aggregation import (
    PADDINGS,
    Shape,
    assert_forward,
    assert_gradients,
    convolve,
    draw,
    for_the_interpreter,
    layouts,
    pool_at,
    pool_places,
)
from helpers.common import CPP_ISA, DEVICE, DTYPES, ISAS, guarded, in_double, instructions, saved_bytes, with_threads
from nest_fast import reference
from nest_fast.kernels import _configs
from nest_fast.kernels import block_aggregate as fused_kernel
from nest_fast.ops import block_aggregate
from nest_fast.ops.block_aggregate import IMPLS
from nest_fast.testing import gradients, relative_error

OPS = torch.ops.nest_fast
MODULE = sys.modules["nest_fast.ops.block_aggregate"]
FAST = [impl for impl in IMPLS if impl not in ("auto", "reference")]
NAMES = ("dx", "dconv_weight", "dconv_bias", "dnorm_weight", "dnorm_bias", "dpos_embed")


@pytest.fixture(params=FAST)
def impl(request, monkeypatch):
    if request.param == "cpp" and (DEVICE != "cpu" or not CPP_ISA):
        pytest.skip("the C++ kernel is for CPU tensors, on a processor with AVX2")
    if DEVICE == "cpu":
        for_the_interpreter(monkeypatch)
    return request.param


IMPLS_AND_ISAS = (*(f"cpp {isa}" for isa in ISAS), "two_step", "triton")


@pytest.fixture(params=IMPLS_AND_ISAS)
def impl_and_isa(request, monkeypatch):
    """Every implementation, that in C++ with every set of instructions that this processor has."""
    impl, _, isa = request.param.partition(" ")
    if DEVICE == "cpu":
        for_the_interpreter(monkeypatch)
    if isa and DEVICE != "cpu":
        pytest.skip("the C++ kernel is for CPU tensors")
    with instructions(isa):
        yield impl


def inputs(shape=None, dtype=torch.float32):
    return tuple(x.to(DEVICE) for x in draw(shape or Shape(2, (2, 4), (2, 3), 12, 20), dtype))


def run(impl, shape, padding="symmetric"):
    options = {"grid_size": shape.grid, "block_size": shape.block, "padding": padding, "impl": impl}
    return lambda *x: block_aggregate(*x[:5], pos_embed=x[5], **options)


def places(impl, shape, padding, x, conv_weight, *rest):
    """Where in its window the implementation finds each maximum, as an image."""
    vectors = [v.float() for v in rest[:-1]]
    if impl in ("cpp", "triton"):
        sizes = (shape.grid, shape.block, shape.block)
        op = getattr(OPS, f"block_aggregate_{impl}_fwd")
        argmax = op(x, conv_weight, *vectors, None, *sizes, 1e-6, padding == "same", True)[-1]
    else:
        y = convolve(reference.unblockify(x, shape.grid, shape.block), conv_weight, None)
        op = OPS.norm_pool_triton_fwd if DEVICE == "cuda" else OPS.norm_pool_cpp_fwd
        argmax = op(y, *vectors, None, shape.block, 1e-6, padding == "same", True)[-1]
    return reference.unblockify(argmax, (shape.grid[0] // 2, shape.grid[1] // 2), shape.block)


def plain_places(shape, padding, x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed):
    y = convolve(reference.unblockify(x, shape.grid, shape.block), conv_weight, conv_bias)
    return pool_places(F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, 1e-6), padding)


def aggregate_at(shape, padding, argmax):
    """The reference with its maxima taken where ``argmax`` says: the oracle of gradients."""

    def aggregate(x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed):
        y = convolve(reference.unblockify(x, shape.grid, shape.block), conv_weight, conv_bias)
        z = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, 1e-6)
        return reference.blockify(pool_at(z, argmax, padding), shape.block) + pos_embed

    return aggregate


SHAPES = [
    Shape(1, (4, 4), (14, 14), 96, 192),  # NesT-T, level 1 to 2
    Shape(2, (2, 2), (7, 7), 192, 384),
    Shape(6, (2, 4), (5, 3), 24, 40),
    Shape(2, (2, 2), (4, 4), 256, 512),
    Shape(3, (6, 2), (3, 7), 33, 70),
]


# Every two of shape, dtype and padding.
PAIRS = [(shape, dtype, PADDINGS[(i + j) % 2]) for i, shape in enumerate(SHAPES) for j, dtype in enumerate(DTYPES)]
# Interpreted Triton is slow: each shape once, of the largest a quarter, each dtype with each padding once.
ONCE = [
    (SHAPES[0]._replace(grid=(2, 2)), "bf16", "symmetric"),
    (SHAPES[1], "fp16", "same"),
    (SHAPES[2], "fp32", "same"),
    (SHAPES[2], "bf16", "same"),
    (SHAPES[3], "fp16", "symmetric"),
    (SHAPES[4], "fp32", "symmetric"),
]


@pytest.mark.parametrize(
    ("impl_and_isa", "shape", "dtype", "padding"),
    [(name, *case) for name in IMPLS_AND_ISAS for case in (ONCE if name == "triton" else PAIRS)],
    indirect=["impl_and_isa"],
    ids=str,
)
def test_is_as_accurate_as_pytorch(impl_and_isa, shape, dtype, padding):
    impl, tensors = impl_and_isa, inputs(shape, DTYPES[dtype])
    check(impl, shape, padding, tensors)


@pytest.mark.parametrize(("C_out", "grid", "block"), [(192, (2, 2), (2, 3)), (320, (2, 12), (1, 3))])
def test_is_as_accurate_as_pytorch_as_triton_is_shipped(monkeypatch, C_out, grid, block):
    """The widest image is wider than the tile. The backward's tile has a test of its own."""
    monkeypatch.setattr(_configs, "multiprocessors", lambda _: 2)
    if DEVICE == "cpu":
        monkeypatch.setattr(_configs, "norm_pool", lambda *_: ({"TILE_PIXELS": 128, "num_warps": 4},))
    shape = Shape(1, grid, block, 24, C_out)
    check("triton", shape, "same", inputs(shape, torch.bfloat16))


def check(impl, shape, padding, tensors):
    """Output and gradients within the bounds, and flips no more than plain PyTorch's."""
    dtype = tensors[0].dtype
    function, plain = run(impl, shape, padding), run("reference", shape, padding)
    wide = in_double(tensors)
    exact = plain(*wide)
    dout = torch.randn_like(exact).to(dtype)
    ours, theirs = gradients(function, tensors, dout), gradients(plain, tensors, dout)
    with torch.no_grad():
        assert torch.equal(function(*tensors), ours[0])
    assert_forward(ours[0], theirs[0], exact)
    assert ours[0].is_contiguous()
    chosen = places(impl, shape, padding, *tensors), plain_places(shape, padding, *tensors)
    oracles = [gradients(aggregate_at(shape, padding, argmax), wide, dout) for argmax in chosen]
    assert_gradients(NAMES, ours[1:], theirs[1:], oracles[0][1:], oracles[1][1:])
    flips = [(argmax != plain_places(shape, padding, *wide)).double().mean().item() for argmax in chosen]
    assert flips[0] <= flips[1] + 1e-3


def any_shape(examples, most):
    """Half grids of ``most`` x ``most`` blocks at most."""
    fuzz = given(
        B=st.integers(1, 3),
        half_grid=st.tuples(st.integers(1, most), st.integers(1, most)),
        block=st.tuples(st.integers(1, most + 2), st.integers(1, most + 2)),
        C=st.integers(1, 70),
        C_out=st.integers(8, 140),
        dtype=st.sampled_from(list(DTYPES.values())),
        padding=st.sampled_from(PADDINGS),
        missing=st.sets(st.sampled_from(["conv_bias", "pos_embed"])),
        seed=st.integers(0, 2**16),
    )
    return lambda test: settings(max_examples=examples)(fuzz(test))


@pytest.mark.parametrize("impl_and_isa", IMPLS_AND_ISAS[:-1], indirect=True)
@any_shape(120, most=3)
def test_of_any_shape(impl_and_isa, **shape):
    check_any_shape(impl_and_isa, **shape)


@pytest.mark.parametrize("impl_and_isa", ["triton"], indirect=True)
@any_shape(8, most=2)
def test_of_any_shape_in_triton(impl_and_isa, **shape):
    check_any_shape(impl_and_isa, **shape)


@pytest.mark.parametrize(
    ("B", "block", "C", "C_out", "dtype", "padding", "missing"),
    [
        (1, (3, 3), 20, 72, torch.bfloat16, "symmetric", ()),
        (1, (1, 5), 7, 64, torch.float32, "same", ("pos_embed",)),
        (3, (2, 1), 17, 8, torch.float16, "symmetric", ("conv_bias",)),
    ],
    ids=str,
)
def test_of_any_shape_in_triton_with_small_tiles(monkeypatch, B, block, C, C_out, dtype, padding, missing):
    """Four columns by two rows, 64 channels: tiles beside and below each other, and one more for the last channels; one
    window and 32 channels are pooled at once."""
    if DEVICE == "cpu":
        config = _configs.AggregationConfig(tile_pixels=8, tile_k=128, tile_c=64, num_stages=1)
        monkeypatch.setattr(_configs, "block_aggregate", lambda *_: (config,))
        monkeypatch.setattr(_configs, "multiprocessors", lambda _: 5)
        monkeypatch.setattr(fused_kernel, "pool_tile", lambda *_: (1, 32))
    check_any_shape("triton", B, (1, 1), block, C, C_out, dtype, padding, missing, seed=0)


def check_any_shape(impl, B, half_grid, block, C, C_out, dtype, padding, missing, seed):
    torch.manual_seed(seed)
    shape = Shape(B, (2 * half_grid[0], 2 * half_grid[1]), block, C, C_out)
    x, conv_weight, conv_bias, *norm, pos_embed = inputs(shape, dtype)
    tensors = (x, conv_weight, None if "conv_bias" in missing else conv_bias, *norm)
    pos_embed = None if "pos_embed" in missing else pos_embed
    options = {"grid_size": shape.grid, "block_size": block, "padding": padding}
    out = block_aggregate(*tensors, **options, pos_embed=pos_embed, impl=impl)
    wide = in_double((*tensors, pos_embed))
    exact = reference.block_aggregate(*wide[:5], **options, pos_embed=wide[5])
    plain = reference.block_aggregate(*tensors, **options, pos_embed=pos_embed)
    assert out.shape == exact.shape
    # In a handful of numbers the error of either is luck, of sums that happen to cancel: some roundings are allowed.
    assert relative_error(out, exact) <= 1.25 * relative_error(plain, exact) + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("wanted", range(6), ids=NAMES)
def test_each_gradient_alone(impl, wanted):
    shape = Shape(2, (2, 4), (2, 3), 12, 20)
    tensors = inputs(shape)
    dout = torch.randn(2, 2, 6, 20, device=DEVICE)
    together = gradients(run(impl, shape), tensors, dout)[1 + wanted]
    leaves = [x.clone().requires_grad_(n == wanted) for n, x in enumerate(tensors)]
    (alone,) = torch.autograd.grad(run(impl, shape)(*leaves), leaves[wanted], dout)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_refuses_gradients_of_gradients(impl):
    shape = Shape(1, (2, 2), (2, 2), 8, 8)
    leaves = [x.requires_grad_() for x in inputs(shape)]
    (dx,) = torch.autograd.grad(run(impl, shape)(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(
        RuntimeError, match="impl: expected 'reference' for a derivative of block_aggregate's gradients"
    ):
        dx.square().sum().backward()


@pytest.mark.parametrize("padding", PADDINGS)
def test_an_image_is_what_its_blocks_are(impl, padding):
    shape = Shape(2, (2, 4), (2, 3), 12, 20)
    x, *parameters, pos_embed = inputs(shape)
    image, pos_image = reference.unblockify(x, (2, 4), (2, 3)), reference.unblockify(pos_embed, (1, 2), (2, 3))
    dout = torch.randn(2, 2, 6, 20, device=DEVICE)
    of_blocks = gradients(run(impl, shape, padding), (x, *parameters, pos_embed), dout)
    of_image = gradients(
        lambda *t: block_aggregate(*t[:5], pos_embed=t[5], padding=padding, impl=impl),
        (image, *parameters, pos_image),
        reference.unblockify(dout, (1, 2), (2, 3)),
    )
    assert torch.equal(reference.blockify(of_image[0], (2, 3)), of_blocks[0])
    torch.testing.assert_close(reference.blockify(of_image[1], (2, 3)), of_blocks[1])
    for got, want in zip(of_image[2:-1], of_blocks[2:-1], strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(reference.blockify(of_image[-1], (2, 3)), of_blocks[-1])


def test_of_any_strides(impl):
    def strided(x):
        return {**layouts(x), "channels first": x.movedim(-1, 1).contiguous().movedim(1, -1)}

    shape = Shape(2, (2, 4), (2, 3), 12, 20)
    x, conv_weight, *vectors, pos_embed = inputs(shape)
    dout = torch.randn(2, 2, 6, 20, device=DEVICE)

    def outputs(x, conv_weight, vectors, pos_embed, dout):
        leaves = [t.requires_grad_() for t in (x.detach(), conv_weight.detach(), *(v.detach() for v in vectors))]
        out = run(impl, shape)(*leaves, pos_embed)
        return out, *torch.autograd.grad(out, leaves, dout)

    def same(got, name):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")

    wanted = outputs(x, conv_weight, vectors, pos_embed, dout)
    for name, view in strided(x).items():
        same(outputs(view, conv_weight, vectors, pos_embed, dout), f"x, {name}")
    for name, view in strided(dout).items():
        same(outputs(x, conv_weight, vectors, pos_embed, view), f"dout, {name}")
    channels_last = conv_weight.contiguous(memory_format=torch.channels_last)
    every_second = [torch.stack([v, v], 1)[:, 0] for v in vectors]
    same(outputs(x, channels_last, every_second, strided(pos_embed)["channels first"], dout), "parameters")
    leaf = x.clone().requires_grad_()  # the gradient of sum() has strides of 0
    run(impl, shape)(leaf, conv_weight, *vectors, pos_embed).sum().backward()
    dense = x.clone().requires_grad_()
    run(impl, shape)(dense, conv_weight, *vectors, pos_embed).backward(torch.ones_like(dout))
    torch.testing.assert_close(leaf.grad, dense.grad)


EVERY_C_AND_DTYPE = [(C, dtype) for C in (1, 17, 32) for dtype in DTYPES]


@pytest.mark.parametrize(
    ("impl_and_isa", "C", "dtype"),
    [
        (name, *case)
        for name in IMPLS_AND_ISAS
        for case in (EVERY_C_AND_DTYPE[::4] if name == "triton" else EVERY_C_AND_DTYPE)
    ],
    indirect=["impl_and_isa"],
)
def test_stays_inside_its_buffers(impl_and_isa, dtype, C):
    shape = Shape(2, (2, 2), (3, 1), C, C + 5)
    tensors = inputs(shape, DTYPES[dtype])
    dout = torch.randn(2, 1, 3, C + 5, device=DEVICE).to(DTYPES[dtype])
    function = run(impl_and_isa, shape)
    leaves = [guarded(x).requires_grad_() for x in tensors]
    out = function(*leaves)
    got = (out, *torch.autograd.grad(out, leaves, guarded(dout)))
    wanted = gradients(function, tensors, dout)
    for name, a, b in zip(("out", *NAMES), got, wanted, strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("where", ["x", "norm_bias"])
def test_keeps_special_values_where_pytorch_does(impl_and_isa, where, padding):
    """NaN and both infinities, each in an image or a channel of its own."""
    shape = Shape(3, (2, 4), (2, 3), 12, 20)
    tensors = inputs(shape)
    for n, value in enumerate((math.nan, math.inf, -math.inf)):
        (tensors[0][n, 5, 2] if where == "x" else tensors[4])[3 + n] = value
    out, wanted = (run(i, shape, padding)(*tensors) for i in (impl_and_isa, "reference"))
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(out), test(wanted))
    assert all(image.isnan().any() and not image.isnan().all() for image in wanted)


def test_repeats_bit_by_bit(impl_and_isa):
    interpreted = impl_and_isa == "triton" and DEVICE == "cpu"  # by one thread, slowly
    shape = Shape(2, (2, 2), (5, 3), 24, 40) if interpreted else Shape(3, (4, 2), (5, 3), 24, 40)
    tensors = inputs(shape, torch.bfloat16)
    dout = torch.randn(shape.B, shape.T // 4, 15, 40, device=DEVICE).bfloat16()
    # The convolution's gradients are the library's, which may divide its sums among threads.
    ours = [0, 1, 3, 4, 5, 6] if impl_and_isa == "cpp" else [0, 3, 4, 5, 6]
    compute = functools.partial(gradients, run(impl_and_isa, shape), tensors, dout)
    first, *others = [compute(), compute()] if interpreted else with_threads(compute)
    for other in others:
        for n in ours:
            assert torch.equal(first[n], other[n]), ("out", *NAMES)[n]


def test_of_nothing(impl):
    shape = Shape(0, (2, 2), (2, 2), 8, 16)
    tensors = [x.requires_grad_() for x in inputs(shape)]
    out = run(impl, shape)(*tensors)
    assert out.shape == (0, 1, 4, 16)
    out.sum().backward()
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in tensors)


def test_saves_little_for_the_gradient(impl):
    shape = Shape(4, (4, 4), (4, 4), 32, 64)
    tensors = [x.requires_grad_() for x in inputs(shape)]
    ours, plain = (saved_bytes(lambda i=i: run(i, shape)(*tensors)) for i in (impl, "reference"))
    assert 0 < ours <= plain


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("impl", ["cpp", "triton"], indirect=True)
def test_opcheck(impl, training):
    op = getattr(OPS, f"block_aggregate_{impl}_fwd").default
    tensors = [t.requires_grad_(training) for t in inputs()]
    torch.library.opcheck(op, (*tensors, (2, 4), (2, 3), (2, 3), 1e-6, False, training))


@pytest.mark.skipif(not CPP_ISA or DEVICE != "cpu", reason="the C++ kernel cannot run")
def test_opcheck_of_dx():
    conv_weight = inputs()[1]
    torch.library.opcheck(OPS.block_aggregate_cpp_dx.default, (torch.randn(2, 4, 12, 20), conv_weight, (2, 4), (2, 3)))


def test_compiles_in_one_graph(impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = run(impl, Shape(1, (2, 4), (2, 3), 12, 20))
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for B in (2, 3, 5) if impl == "triton" else (2, 3, 4, 5, 7):
        tensors = [x.requires_grad_() for x in inputs(Shape(B, (2, 4), (2, 3), 12, 20))]
        out, wanted = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(out, wanted)
        dout = torch.randn_like(out)
        for got, want in zip(*(torch.autograd.grad(o, tensors, dout) for o in (out, wanted)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


class Aggregation(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl = impl
        _, *parameters = inputs()
        for n, value in enumerate(parameters):
            self.register_buffer(f"p{n}", value)

    def forward(self, x):
        function = run(self.impl, Shape(1, (2, 4), (2, 3), 12, 20))
        return function(x, *self.buffers())


def test_exports_with_a_dynamic_batch(impl):
    module = Aggregation(impl)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (inputs()[0],), dynamic_shapes=({0: batch},)).module()
    for B in (1, 5):
        x = inputs(Shape(B, (2, 4), (2, 3), 12, 20))[0]
        torch.testing.assert_close(exported(x), module(x))


def test_vmap(impl):
    shape = Shape(2, (2, 4), (2, 3), 12, 20)
    x, conv_weight, *rest = inputs(shape)
    xs = torch.stack([x, x + 1, x - 1], 1)
    function = run(impl, shape)
    out = torch.vmap(lambda x: function(x, conv_weight, *rest), in_dims=1)(xs)
    for i in range(3):
        torch.testing.assert_close(out[i], function(xs[:, i], conv_weight, *rest))
    weights = torch.stack([conv_weight, -conv_weight])
    out = torch.vmap(lambda w: function(x, w, *rest))(weights)
    for i in range(2):
        torch.testing.assert_close(out[i], function(x, weights[i], *rest))


def test_torch_func_takes_gradients_with_auto():
    tensors = inputs()
    function = run("auto", Shape(2, (2, 4), (2, 3), 12, 20))
    got = torch.func.grad(lambda x: function(x, *tensors[1:]).square().sum())(tensors[0])
    leaf = tensors[0].clone().requires_grad_()
    function(leaf, *tensors[1:]).square().sum().backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_pos", [True, False])
def test_has_pytorchs_dtypes_under_autocast(impl, given, with_pos):
    x, *rest, pos_embed = inputs()
    options = {"grid_size": (2, 4), "block_size": (2, 3), "pos_embed": pos_embed if with_pos else None}
    leaves = [x.to(given).requires_grad_(), *(t.requires_grad_() for t in rest)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out, wanted = (block_aggregate(*leaves, **options, impl=i) for i in (impl, "reference"))
    assert out.dtype == wanted.dtype
    assert relative_error(out, wanted) < 0.02
    out.float().sum().backward()
    assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]


def test_auto_chooses(monkeypatch):
    def choose(dtype, C_out=64):
        x, conv_weight = (torch.empty(C_out, 0, dtype=dtype, device=DEVICE) for _ in range(2))
        return MODULE.choose(MODULE.Given(x, conv_weight, None, x, x, None))

    assert choose(torch.float64) == "reference"
    if DEVICE == "cuda":
        assert choose(torch.bfloat16) == "two_step"
        return
    assert choose(torch.float32) == ("cpp" if CPP_ISA else "reference")
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(MODULE._extension, "has_amx", True)
        assert choose(torch.float32) == ("two_step" if CPP_ISA else "reference")
    monkeypatch.setattr(MODULE._extension, "cpp_isa", "")
    assert choose(torch.float32) == "reference"


def test_auto_on_a_gpu_is_what_its_table_says(monkeypatch):
    class Properties:
        major, minor = 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    x = torch.empty(0, dtype=torch.bfloat16)
    assert MODULE._on_gpu(x) == "two_step"
    monkeypatch.setitem(MODULE._ON_GPU, (torch.bfloat16, (9, 0)), "triton")
    assert MODULE._on_gpu(x) == "triton"
    assert MODULE._on_gpu(x.float()) == "two_step"


def test_two_step_runs_in_triton_where_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(MODULE._extension, "cpp_isa", "")
    shape = Shape(1, (2, 2), (2, 2), 8, 16)
    tensors = inputs(shape)
    dout = torch.randn(1, 1, 4, 16, device=DEVICE)
    ours, theirs = (gradients(run(i, shape), tensors, dout) for i in ("two_step", "reference"))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_explicit_choice_never_falls_back(monkeypatch):
    shape = Shape(2, (2, 4), (2, 3), 12, 20)
    for impl in FAST:
        with pytest.raises(RuntimeError, match=f"impl: '{impl}' cannot run block_aggregate here: .*torch.float64"):
            run(impl, shape)(*(x.double() for x in inputs(shape)))
    monkeypatch.setattr(MODULE._extension, "cpp_isa", "")
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match=r"impl: 'cpp' cannot .*neither AVX-512 nor AVX2"):
            run("cpp", shape)(*inputs(shape))
    wide = Shape(1, (2, 2), (1, 1), 8, 520)
    with pytest.raises(RuntimeError, match=r"impl: 'triton' cannot .*C' = 520 channels are over 512"):
        run("triton", wide)(*inputs(wide))
    monkeypatch.setattr(MODULE._extension, "triton_interpreted", False)
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match=r"impl: 'two_step' cannot .*neither AVX-512 nor AVX2"):
            run("two_step", shape)(*inputs(shape))
        with pytest.raises(RuntimeError, match=r"impl: 'triton' cannot .*the tensor is on cpu"):
            run("triton", shape)(*inputs(shape))


GOOD = {
    "x": torch.zeros(2, 4, 6, 8),
    "conv_weight": torch.zeros(16, 8, 3, 3),
    "conv_bias": torch.zeros(16),
    "norm_weight": torch.zeros(16),
    "norm_bias": torch.zeros(16),
    "grid_size": 2,
    "block_size": (2, 3),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6, 8)}, r"x: expected 4 dimensions \(B, T, N, C\), got shape \(4, 6, 8\)"),
        ({"x": torch.zeros(2, 4, 6, 8).long()}, r"x: expected a floating-point dtype, got torch.int64"),
        ({"grid_size": 3}, r"grid_size: expected height \* width = T = 4 blocks, got \(3, 3\)"),
        ({"grid_size": (1, 4)}, r"grid_size: expected an even height and width.* got \(1, 4\)"),
        ({"block_size": None}, r"block_size: expected height and width, since N = 6 is no square, got None"),
        ({"grid_size": None}, r"block_size: expected None for an image \(grid_size=None\), got \(2, 3\)"),
        (
            {"grid_size": None, "block_size": None, "x": torch.zeros(2, 4, 5, 8)},
            r"x: expected an even height and width, got shape \(2, 4, 5, 8\)",
        ),
        (
            {"conv_weight": torch.zeros(16, 7, 3, 3)},
            r"conv_weight: expected shape \(16, 8, 3, 3\) \(C', C, 3, 3\), got \(16, 7, 3, 3\)",
        ),
        ({"conv_bias": torch.zeros(8)}, r"conv_bias: expected shape \(16,\) \(C',\), got \(8,\)"),
        ({"norm_weight": torch.zeros(16).double()}, r"norm_weight: expected dtype torch.float32 as x has, got torch.f"),
        ({"norm_bias": torch.zeros(16, device="meta")}, r"norm_bias: expected device cpu as x has, got meta"),
        (
            {"pos_embed": torch.zeros(1, 4, 6, 16)},
            r"pos_embed: expected shape \(1, 1, 6, 16\) for x of shape \(2, 4, 6, 8\), got \(1, 4, 6, 16\)",
        ),
        ({"padding": "valid"}, r"padding: expected one of 'symmetric', 'same', got 'valid'"),
        ({"impl": "cudnn"}, r"impl: expected one of 'auto', 'reference', 'triton', 'two_step', 'cpp', got 'cudnn'"),
    ],
)
def test_refuses_bad_arguments(change, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        block_aggregate(**GOOD | change)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not CPP_ISA, reason="the C++ kernel cannot run")
def test_refuses_bad_arguments_that_would_be_read_out_of_bounds():
    x, conv_weight, *vectors, pos_embed = draw(Shape(2, (2, 4), (2, 3), 12, 20))
    sizes = ((2, 4), (2, 3), (2, 3))

    def call(x=x, conv_weight=conv_weight, vectors=vectors, pos_embed=pos_embed, sizes=sizes):
        return OPS.block_aggregate_cpp_fwd(x, conv_weight, *vectors, pos_embed, *sizes, 1e-6, False, True)

    _, y, mean, rstd, argmax = call()
    for message, wrong in {
        "x: expected .* T = 8 and N = 6": lambda: call(x=x[:, :4]),
        "x: expected stride 1": lambda: call(x=x.transpose(2, 3).contiguous().transpose(2, 3)),
        "x: expected dtype Float, Half or BFloat16, got Double": lambda: call(x=x.double()),
        "conv_weight: expected dtype Float, got Half": lambda: call(conv_weight=conv_weight.half()),
        "conv_weight: expected .C', 12, 3, 3.": lambda: call(conv_weight=conv_weight[:, :5]),
        "norm_weight: expected 20 contiguous floats": lambda: call(vectors=[vectors[0], vectors[1][:5], vectors[2]]),
        "pos_embed: expected": lambda: call(pos_embed=pos_embed[:, :1]),
        "out_block_size: expected .3, 3. to divide": lambda: call(sizes=(*sizes[:2], (3, 3))),
        "mean, rstd: expected contiguous": lambda: OPS.norm_pool_cpp_bwd(
            torch.zeros(2, 2, 6, 20), y, *vectors[:2], mean[:1], rstd, argmax, (2, 3), False
        ),
        "dout, argmax: expected the batch": lambda: OPS.norm_pool_cpp_bwd(
            torch.zeros(1, 2, 6, 20), y, *vectors[:2], mean, rstd, argmax, (2, 3), False
        ),
        "dy: expected an even height and width": lambda: OPS.block_aggregate_cpp_dx(y, conv_weight, (2, 4), (2, 2)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            wrong()
