"""What follows the convolution, in C++ and in Triton: bias, LayerNorm, max-pool, blocks, and their gradients.

The Triton kernels run in the interpreter on a CPU (conftest switches it on), compiled on a GPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.aggregation import (
    PADDINGS,
    assert_forward,
    assert_gradients,
    for_the_interpreter,
    layouts,
    pool_at,
    pool_places,
    windows,
)
from helpers.common import CPP_ISA, DTYPES, ISAS, guarded, in_double, instructions, run_python, with_threads
from nest_fast import reference
from nest_fast.kernels import _configs
from nest_fast.kernels._primitives import channel_pieces
from nest_fast.kernels.norm_pool import MAX_CHANNELS
from nest_fast.testing import gradients, relative_error

OPS = torch.ops.nest_fast
NAMES = ("out", "dy", "dconv_bias", "dnorm_weight", "dnorm_bias", "dpos_embed")


class Part:
    """The two operations of one who computes them, on the device where they run."""

    def __init__(self, name):
        self.isa = "" if name == "triton" else name
        self.kind = "triton" if name == "triton" else "cpp"
        self.device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        self.fwd = getattr(OPS, f"norm_pool_{self.kind}_fwd")
        self.bwd = getattr(OPS, f"norm_pool_{self.kind}_bwd")


@pytest.fixture(params=["triton", *ISAS])
def part(request, monkeypatch):
    part = Part(request.param)
    if part.kind == "triton" and part.device == "cpu":
        for_the_interpreter(monkeypatch)
    with instructions(part.isa):
        yield part


def draw(B, H, W, C, dtype=torch.float32, device="cpu", blocks=1):
    """y, conv_bias, norm_weight, norm_bias, pos_embed."""
    sizes = [(B, H, W, C), (C,), (C,), (C,), (1, blocks, H * W // 4 // blocks, C)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def plain(y, conv_bias, norm_weight, norm_bias, pos_embed, *, block, padding, argmax=None):
    """In PyTorch, in the dtype of the tensors; with ``argmax`` (of the image) the maxima are taken from there."""
    y = y if conv_bias is None else y + conv_bias
    z = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, 1e-6)
    pooled = pool_at(z, pool_places(z, padding) if argmax is None else argmax, padding)
    out = reference.blockify(pooled, block)
    return out if pos_embed is None else out + pos_embed


def launch(part, y, conv_bias, norm_weight, norm_bias, pos_embed, *, block, padding, training=True):
    vectors = [None if x is None else x.float() for x in (conv_bias, norm_weight, norm_bias)]
    return part.fwd(y, *vectors, pos_embed, block, 1e-6, padding == "same", training)


def image_of(blocks, y, block):
    return reference.unblockify(blocks, (y.shape[1] // 2 // block[0], y.shape[2] // 2 // block[1]), block)


def check(part, inputs, block, padding):
    """Output and gradients within the bounds, statistics exact to float32, and flips no more than plain PyTorch's."""
    options = {"block": block, "padding": padding}
    out, mean, rstd, argmax = launch(part, *inputs, **options)
    places = image_of(argmax, inputs[0], block)
    exact_inputs = in_double(inputs)
    given = [x for x in inputs if x is not None]
    missing = [n for n, x in enumerate(inputs) if x is None]

    def full(tensors):
        tensors = list(tensors)
        for n in missing:
            tensors.insert(n, None)
        return tensors

    z = F.layer_norm(inputs[0] if inputs[1] is None else inputs[0] + inputs[1], inputs[2].shape, *inputs[2:4], 1e-6)
    plain_places = pool_places(z, padding)
    dout = torch.randn_like(out)
    ours = gradients(lambda *x: launch(part, *full(x), **options)[0], given, dout)
    theirs = gradients(lambda *x: plain(*full(x), **options), given, dout)
    wide = in_double(given)
    exact = gradients(lambda *x: plain(*full(x), **options, argmax=places), wide, dout)
    theirs_exact = gradients(lambda *x: plain(*full(x), **options, argmax=plain_places), wide, dout)
    assert torch.equal(ours[0], out)
    assert_forward(out, theirs[0], plain(*exact_inputs, **options))
    names = [name for name, x in zip(NAMES[1:], inputs, strict=True) if x is not None]
    assert_gradients(names, ours[1:], theirs[1:], exact[1:], theirs_exact[1:])

    y = exact_inputs[0] if exact_inputs[1] is None else exact_inputs[0] + exact_inputs[1]
    variance, wanted_mean = torch.var_mean(y, -1, correction=0)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd.double(), (variance + 1e-6).rsqrt(), rtol=1e-4, atol=0)
    z = F.layer_norm(y, y.shape[-1:], *exact_inputs[2:4], 1e-6)
    flips = [(x != pool_places(z, padding)).double().mean().item() for x in (places, plain_places)]
    assert flips[0] <= flips[1] + 1e-3


# (B, H, W, block, C'): C' of the models and with every kind of tail; rectangles; edges of tiles and strips.
SHAPES = [
    (1, 12, 20, (3, 5), 192),
    (1, 18, 12, (3, 2), 24),
    (1, 10, 6, (5, 3), 384),
    (2, 4, 6, (2, 3), 512),
    (1, 16, 16, (4, 4), 40),
    (2, 2, 70, (1, 7), 96),
]
EVERY = [(shape, dtype, padding) for shape in SHAPES for dtype in DTYPES for padding in PADDINGS]
# Interpreted Triton is slow: each shape once, each dtype with each padding once.
ONCE = [case for n, case in enumerate(EVERY) if n // 6 == n % 6]


@pytest.mark.parametrize(
    ("part", "shape", "dtype", "padding"),
    [(name, *case) for name in ("triton", *ISAS) for case in (ONCE if name == "triton" else EVERY)],
    indirect=["part"],
    ids=str,
)
def test_is_as_accurate_as_pytorch(part, shape, dtype, padding):
    B, H, W, block, C = shape
    blocks = H * W // 4 // (block[0] * block[1])
    check(part, draw(B, H, W, C, DTYPES[dtype], part.device, blocks), block, padding)


@pytest.mark.parametrize("C", [24, 192])
def test_is_as_accurate_as_pytorch_with_the_tile_that_is_shipped(C):
    check(Part("triton"), draw(1, 10, 6, C, device=Part("triton").device), (5, 3), "symmetric")


def test_is_as_accurate_as_pytorch_without_bias_or_pos_embed(part):
    """One without the other is in the fuzz."""
    _, _, *norm, _ = inputs = draw(2, 8, 12, 48, device=part.device, blocks=4)
    check(part, [inputs[0], None, *norm, None], (2, 3), "symmetric")


def any_shape(examples, most, block, wide):
    """Grids of ``most`` x ``most`` blocks at most, of ``block`` x ``block`` pixels at most; ``wide`` channels."""
    fuzz = given(
        B=st.integers(1, most),
        grid=st.tuples(st.integers(1, most), st.integers(1, most)),
        block=st.tuples(st.integers(1, block), st.integers(1, block)),
        C=st.one_of(st.integers(8, 70), st.sampled_from(wide)),
        dtype=st.sampled_from(list(DTYPES.values())),
        padding=st.sampled_from(PADDINGS),
        missing=st.sampled_from([None, 1, 4]),
        seed=st.integers(0, 2**16),
    )
    return lambda test: settings(max_examples=examples)(fuzz(test))


@pytest.mark.parametrize("part", ISAS, indirect=True)
@any_shape(60, most=3, block=4, wide=[96, 200, 320, 1000])
def test_of_any_shape_in_cpp(part, **shape):
    check_any_shape(part, **shape)


@pytest.mark.parametrize("part", ["triton"], indirect=True)
@any_shape(8, most=2, block=2, wide=[96, 200])
def test_of_any_shape_in_triton(part, **shape):
    check_any_shape(part, **shape)


def check_any_shape(part, B, grid, block, C, dtype, padding, missing, seed):
    torch.manual_seed(seed)
    blocks = grid[0] * grid[1]
    inputs = draw(B, 2 * grid[0] * block[0], 2 * grid[1] * block[1], C, dtype, part.device, blocks)
    if missing is not None:
        inputs[missing] = None
    exact = plain(*in_double(inputs), block=block, padding=padding)
    out, _, _, argmax = launch(part, *inputs, block=block, padding=padding)
    quiet, *empty = launch(part, *inputs, block=block, padding=padding, training=False)
    # In a handful of numbers the error of either is luck, of sums that happen to cancel: some roundings are allowed.
    error = relative_error(plain(*inputs, block=block, padding=padding), exact)
    assert relative_error(out, exact) <= 1.25 * error + 8 * torch.finfo(dtype).eps
    assert torch.equal(out, quiet)
    assert all(x.numel() == 0 for x in empty)
    assert argmax.max() < 9


@pytest.mark.parametrize("padding", PADDINGS)
def test_ties_go_to_the_first_in_row_major_order(part, padding):
    """Pixels of three kinds only: nearly every window has ties."""
    y, *rest = draw(2, 12, 16, 24, device=part.device)
    kinds = torch.randn(3, 24, device=part.device)
    y = kinds[torch.randint(3, y.shape[:3], device=part.device)]
    _, _, _, argmax = launch(part, y, *rest, block=(6, 8), padding=padding)
    z = F.layer_norm((y + rest[0]).double(), (24,), rest[1].double(), rest[2].double(), 1e-6)
    assert torch.equal(image_of(argmax, y, (6, 8)), pool_places(z, padding))


@pytest.mark.parametrize(
    ("where", "padding"), [("y", "symmetric"), ("y", "same"), ("norm_bias", "same"), ("pos_embed", "symmetric")]
)
def test_keeps_special_values_where_pytorch_does(part, where, padding):
    """NaN and both infinities, in places whose windows have nothing in common."""
    inputs = draw(3, 4, 8, 20, device=part.device, blocks=2)
    for n, value in enumerate((math.nan, math.inf, -math.inf)):
        {"y": inputs[0][n, 3, 4], "norm_bias": inputs[3], "pos_embed": inputs[4][0, 1, n]}[where][7 + n] = value
    options = {"block": (2, 2), "padding": padding}
    out, _, _, argmax = launch(part, *inputs, **options)
    wanted = plain(*inputs, **options)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(out), test(wanted))
    z = F.layer_norm(inputs[0] + inputs[1], (20,), *inputs[2:4], 1e-6)
    places, image = pool_places(z, padding), image_of(argmax, inputs[0], (2, 2))
    assert torch.equal(image, places)
    dout = torch.randn_like(out)
    ours = gradients(lambda *x: launch(part, *x, **options)[0], inputs, dout)
    theirs = gradients(lambda *x: plain(*x, **options, argmax=places), inputs, dout)
    for name, got, want in zip(NAMES, ours, theirs, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_never_wins(part, padding):
    inputs = draw(1, 4, 6, 16, device=part.device)
    inputs[3] -= 1e30
    _, _, _, argmax = launch(part, *inputs, block=(2, 3), padding=padding)
    chosen = windows(torch.zeros(1, 4, 6, 1, device=part.device), padding)
    place = image_of(argmax, inputs[0], (2, 3)).long().permute(0, 3, 1, 2).unsqueeze(2)
    assert (chosen.expand(-1, 16, -1, -1, -1).gather(2, place) == 0).all()


def test_of_any_strides(part):
    y, *rest = draw(2, 8, 12, 24, device=part.device, blocks=4)
    options = {"block": (2, 3), "padding": "symmetric"}
    dout = torch.randn(2, 4, 6, 24, device=part.device)
    wanted = launch(part, y, *rest, **options)
    vectors = rest[0].float(), rest[1].float()
    gradient = part.bwd(dout, y, *vectors, *wanted[1:], (2, 3), False)
    moved = [list(layouts(x).items()) for x in (y, rest[3], dout)]
    for turn in range(len(moved[0])):  # each in every layout, all three in different ones
        names, (y_view, pos_view, dout_view) = zip(*(m[(turn + n) % len(m)] for n, m in enumerate(moved)), strict=True)
        got = launch(part, y_view, *rest[:3], pos_view, **options)
        assert all(map(torch.equal, got, wanted)), names
        grads = part.bwd(dout_view, y_view, *vectors, *wanted[1:], (2, 3), False)
        assert all(map(torch.equal, grads, gradient)), names


@pytest.mark.parametrize(("C", "dtype"), [(1, torch.float32), (16, torch.bfloat16), (33, torch.float16)])
def test_stays_inside_its_buffers(part, dtype, C):
    y, *rest = draw(1, 6, 4, C, dtype, part.device)
    vectors = [x.float() for x in rest[:3]]
    call = (y, *vectors, rest[3])
    wanted = part.fwd(*call, (3, 2), 1e-6, True, True)
    assert all(map(torch.equal, part.fwd(*map(guarded, call), (3, 2), 1e-6, True, True), wanted))
    call = (torch.randn_like(wanted[0]), y, *vectors[:2], *wanted[1:])
    gradient = part.bwd(*call, (3, 2), True)
    assert all(map(torch.equal, part.bwd(*map(guarded, call), (3, 2), True), gradient))


def test_of_nothing(part):
    y, *rest = draw(0, 4, 4, 16, device=part.device)
    out, *statistics = launch(part, y, *rest, block=(2, 2), padding="same")
    assert out.shape == (0, 1, 4, 16)
    dy, dparams = part.bwd(out, y, rest[0], rest[1], *statistics, (2, 2), True)
    assert dy.shape == y.shape
    assert torch.equal(dparams, torch.zeros(3, 16, device=part.device))


@pytest.mark.parametrize("part", ISAS, indirect=True)
def test_repeats_bit_by_bit(part):
    y, *rest = draw(3, 20, 12, 24, torch.bfloat16, part.device)
    dout = torch.randn(3, 1, 60, 24, device=part.device).bfloat16()

    def compute():
        outs = launch(part, y, *rest, block=(10, 6), padding="symmetric")
        return *outs, *part.bwd(dout, y, rest[0].float(), rest[1].float(), *outs[1:], (10, 6), False)

    first, *others = with_threads(compute)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(part, training):
    y, *rest = draw(2, 4, 8, 16, device=part.device, blocks=2)
    tensors = [y, *rest]
    if training:
        tensors = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(part.fwd, (*tensors, (2, 2), 1e-6, False, training))


def test_opcheck_of_the_backward(part):
    y, *rest = draw(2, 4, 8, 16, device=part.device, blocks=2)
    out, *saved = part.fwd(y, *rest, (2, 2), 1e-6, False, True)
    torch.library.opcheck(part.bwd, (torch.randn_like(out), y, *rest[:2], *saved, (2, 2), False))


def test_says_what_a_gradient_needs(part):
    y, *rest = draw(1, 4, 4, 16, device=part.device)
    out = launch(part, y.requires_grad_(), *rest, block=(2, 2), padding="same", training=False)[0]
    with pytest.raises(RuntimeError, match="training: expected True in the forward whose gradient is asked for"):
        out.sum().backward()


@pytest.mark.parametrize("channels", range(1, MAX_CHANNELS + 1, 7))
def test_pieces_cover_the_channels(channels):
    pieces = channel_pieces(channels, MAX_CHANNELS)
    ends = [start + size for start, size in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]]
    assert all(size & (size - 1) == 0 and size >= 16 for _, size in pieces)
    assert channels <= ends[-1] < channels + max(16, channels / 4)
    assert len(pieces) <= 4
    assert all(tile["num_warps"] <= 32 for kernel in ("fwd", "bwd") for tile in _configs.norm_pool(kernel, channels))


SPARSE = """
import torch
from nest_fast.ops import block_aggregate
y = torch.empty_strided((3, 2, 4, 8), (2**31, 32, 8, 1))
y.copy_(torch.randn(y.shape))
vectors = torch.randn(3, 8)
x = torch.empty_strided((1, 4, 2, 8), (8, 2**30, 8, 1))
x.copy_(torch.randn(x.shape))
for part in {parts}:
    fwd, bwd = (getattr(torch.ops.nest_fast, f"norm_pool_{{part}}_{{way}}") for way in ("fwd", "bwd"))
    wanted = fwd(y.contiguous(), *vectors, None, (1, 2), 1e-6, False, True)
    got = fwd(y, *vectors, None, (1, 2), 1e-6, False, True)
    assert all(map(torch.equal, got, wanted))
    dout = torch.randn(got[0].shape)
    args = (*vectors[:2], *got[1:], (1, 2), False)
    assert all(map(torch.equal, bwd(dout, y, *args), bwd(dout, y.contiguous(), *args)))
    fused = getattr(torch.ops.nest_fast, f"block_aggregate_{{part}}_fwd")
    args = (torch.randn(8, 8, 3, 3), *vectors, None, (2, 2), (1, 2), (1, 2), 1e-6, False, True)
    assert all(map(torch.equal, fused(x, *args), fused(x.contiguous(), *args)))
print("right")
"""


def test_offsets_are_64_bit():
    """In a process of its own, since an offset of 32 bits is an access violation. Virtual memory only."""
    parts = ("triton", "cpp") if CPP_ISA else ("triton",)
    assert run_python("-c", SPARSE.format(parts=parts)) == "right\n"
