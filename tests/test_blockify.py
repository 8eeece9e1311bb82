"""blockify, unblockify and patchify: bit-exact against the reference, in every dtype, layout and torch feature."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from helpers.common import ISAS, instructions, run_python
from nest_fast import reference
from nest_fast.ops import _extension, blockify, patchify, unblockify

OPS = torch.ops.nest_fast
DTYPES = (torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128)
ADDED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# B, grid, block, C: NesT's own, rectangles, an odd number of everything, runs that end inside a vector, nothing at all.
SHAPES = [
    (2, (4, 4), (14, 14), 24),
    (1, (2, 2), (14, 14), 32),
    (3, (1, 1), (7, 7), 8),
    (2, (8, 8), (4, 4), 12),
    (2, (4, 4), (1, 1), 16),
    (1, (2, 8), (4, 4), 48),
    (1, (8, 2), (4, 4), 48),
    (2, (2, 3), (5, 7), 3),
    (2, (3, 2), (7, 5), 5),
    (1, (1, 5), (3, 2), 7),
    (1, (5, 1), (2, 3), 7),
    (2, (3, 3), (1, 6), 4),
    (2, (3, 3), (6, 1), 4),
    (2, (4, 4), (4, 4), 1),
    (1, (1, 4), (4, 1), 1),
    (1, (4, 1), (1, 4), 1),
    (4, (2, 2), (2, 2), 2),
    (2, (2, 2), (3, 3), 17),
    (1, (16, 16), (2, 2), 6),
    (5, (3, 1), (3, 5), 9),
    (7, (2, 2), (2, 3), 33),
    (0, (2, 2), (4, 4), 8),
    (2, (2, 2), (4, 4), 0),
    (2, (2, 1), (8, 16), 64),
]
# The C++ kernels with every set of instructions that this processor has, and with what every processor has.
CPP_ISAS = (*ISAS, "baseline")
IMPLS = [*(f"cpp {isa}" for isa in CPP_ISAS), pytest.param("cuda", marks=pytest.mark.gpu)]


def backend(request):
    impl, _, isa = request.param.partition(" ")
    error = {"cpp": _extension.cpu_error, "cuda": _extension.cuda_error}[impl]
    if error is not None:
        pytest.skip(error)
    with instructions(isa):
        yield impl


impl = pytest.fixture(params=IMPLS)(backend)
# What PyTorch does with an operation does not hang on the instructions of its kernel.
any_isa = pytest.mark.parametrize("impl", [IMPLS[0], IMPLS[-1]], indirect=True)


def device_of(impl):
    return "cuda" if impl == "cuda" else "cpu"


def any_bits(shape, dtype, device="cpu"):
    """Every bit pattern, NaN with any payload included: a copy has to keep them all."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, itemsize), dtype=torch.uint8, device=device).view(dtype).squeeze(-1)


def lay_out(x, layout):
    """``x`` (4-D) with the same values in other memory."""
    if layout == "channels first":
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == "sliced":  # cut from a larger tensor at an odd offset, strides in every dimension
        larger = torch.zeros([2 * size + 3 for size in x.shape], dtype=x.dtype, device=x.device)
        view = larger[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
        return view.copy_(x)
    if layout == "unaligned":  # contiguous, but starting between two vectors
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


LAYOUTS = ("contiguous", "channels first", "sliced", "unaligned")


def assert_same_bits(out, wanted, what=""):
    assert out.shape == wanted.shape, what
    assert out.dtype == wanted.dtype, what
    out, wanted = (x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (out, wanted))
    assert torch.equal(out, wanted), what


def blocks_of(shape):
    B, (gh, gw), (bh, bw), C = shape
    return (B, gh * gw, bh * bw, C)


def image_of(shape):
    B, (gh, gw), (bh, bw), C = shape
    return (B, gh * bh, gw * bw, C)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blockify_matches_reference_bit_by_bit(dtype, layout, impl):
    for shape in SHAPES:
        _, grid, block, _ = shape
        image = lay_out(any_bits(image_of(shape), dtype, device_of(impl)), layout)
        out = blockify(image, block, impl=impl)
        assert_same_bits(out, reference.blockify(image, block), f"blockify {shape}")
        assert_same_bits(unblockify(out, grid, block, impl=impl), image, f"round trip {shape}")
        blocks = lay_out(any_bits(blocks_of(shape), dtype, device_of(impl)), layout)
        wanted = reference.unblockify(blocks, grid, block)
        assert_same_bits(unblockify(blocks, grid, block, impl=impl), wanted, f"unblockify {shape}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ADDED, ids=str)
def test_blockify_adds_pos_embed_as_two_passes_do(dtype, layout, impl):
    for shape in SHAPES:
        _, grid, block, _ = shape
        image = lay_out(torch.randn(image_of(shape), device=device_of(impl)).to(dtype), layout)
        blocks = lay_out(torch.randn(blocks_of(shape), device=device_of(impl)).to(dtype), layout)
        pos = lay_out(torch.randn((1, *blocks_of(shape)[1:]), device=device_of(impl)).to(dtype), layout)
        wanted = reference.blockify(image, block) + pos
        assert_same_bits(blockify(image, block, pos_embed=pos, impl=impl), wanted, f"blockify {shape}")
        wanted = reference.unblockify(blocks + pos, grid, block)
        assert_same_bits(unblockify(blocks, grid, block, pos_embed=pos, impl=impl), wanted, f"unblockify {shape}")


@pytest.mark.parametrize("dtype", ADDED, ids=str)
def test_blockify_adds_infinities_nans_and_subnormals(dtype, impl):
    info, inf = torch.finfo(dtype), float("inf")
    numbers = [inf, -inf, float("nan"), 0.0, -0.0, info.max, 1.0, -1.0, info.tiny, info.tiny / 4, -info.tiny / 8]
    special = torch.tensor(numbers, dtype=torch.float64).repeat(3)[:24]
    image = special.repeat(4, 4, 1).unsqueeze(0).to(dtype).to(device_of(impl))  # (1, 4, 4, 24)
    pos = image.reshape(4, 4, 24).flip(2).roll(3, 2).reshape(1, 4, 4, 24)
    out = blockify(image, 2, pos_embed=pos, impl=impl)
    torch.testing.assert_close(out, reference.blockify(image, 2) + pos, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=300)
@given(isa=st.sampled_from(CPP_ISAS), data=st.data())
def test_of_any_shape_and_strides(isa, data):
    """Random sizes, permuted and offset memory, all three operations and the inverse of the third."""
    if _extension.cpu_error is not None:
        pytest.skip(_extension.cpu_error)
    with instructions(isa):
        compare_any(data.draw)


def compare_any(draw):
    B, C = draw(st.integers(0, 3)), draw(st.integers(1, 40))
    gh, gw, bh, bw = (draw(st.integers(1, 6)) for _ in range(4))
    ph, pw = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(DTYPES))

    def strided(x):
        order = draw(st.permutations(range(4)))
        offset = draw(st.integers(0, 3))
        flat = torch.cat([x.new_zeros(offset), x.permute(order).flatten()])[offset:]
        return flat.view([x.shape[d] for d in order]).permute([order.index(d) for d in range(4)])

    image = strided(any_bits((B, gh * bh, gw * bw, C), dtype))
    blocks = strided(any_bits((B, gh * gw, bh * bw, C), dtype))
    assert_same_bits(blockify(image, (bh, bw), impl="cpp"), reference.blockify(image, (bh, bw)))
    wanted = reference.unblockify(blocks, (gh, gw), (bh, bw))
    assert_same_bits(unblockify(blocks, (gh, gw), (bh, bw), impl="cpp"), wanted)
    if dtype in ADDED:
        image, blocks = (strided(torch.randn(x.shape).to(dtype)) for x in (image, blocks))
        pos = strided(torch.randn(1, gh * gw, bh * bw, C).to(dtype))
        out = blockify(image, (bh, bw), pos_embed=pos, impl="cpp")
        assert_same_bits(out, reference.blockify(image, (bh, bw)) + pos)
        out = unblockify(blocks, (gh, gw), (bh, bw), pos_embed=pos, impl="cpp")
        assert_same_bits(out, reference.unblockify(blocks + pos, (gh, gw), (bh, bw)))
    channels = min(C, 5)
    picture = strided(any_bits((B, channels, gh * bh * ph, gw * bw * pw), dtype))
    patches = patchify(picture, (ph, pw), (bh, bw), impl="cpp")
    assert_same_bits(patches, reference.patchify(picture, (ph, pw), (bh, bw)))
    assert_same_bits(OPS.unpatchify(strided(patches), (ph, pw), (gh, gw), (bh, bw)), picture)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patchify_matches_reference_bit_by_bit(dtype, impl):
    for B, C, patch, grid, block in [
        (2, 3, (4, 4), (2, 2), (7, 7)),
        (2, 3, (1, 1), (4, 4), (4, 4)),
        (1, 1, (16, 8), (1, 2), (2, 3)),
        (3, 4, (2, 3), (3, 1), (1, 5)),
        (0, 3, (4, 4), (2, 2), (2, 2)),
    ]:
        (ph, pw), (gh, gw), (bh, bw) = patch, grid, block
        picture = any_bits((B, C, gh * bh * ph, gw * bw * pw), dtype, device_of(impl))
        for x in (picture, picture.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            out = patchify(x, patch, block, impl=impl)
            assert_same_bits(out, reference.patchify(x, patch, block), f"{patch} {grid} {block}")
            assert_same_bits(OPS.unpatchify(out, patch, grid, block), picture, f"round trip {patch} {grid} {block}")


def test_patchify_with_one_matmul_is_the_patch_convolution():
    x, weight, bias = torch.randn(2, 3, 32, 48), torch.randn(8, 3, 4, 4), torch.randn(8)
    out = torch.nn.functional.linear(patchify(x, 4, (4, 6)), weight.flatten(1), bias)
    wanted = torch.nn.functional.conv2d(x, weight, bias, stride=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, reference.blockify(wanted, (4, 6)))


@pytest.mark.parametrize("threads", [1, 3])
def test_repeats_bit_by_bit_with_any_number_of_threads(threads, impl):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        image = torch.randn(3, 56, 42, 40, device=device_of(impl))
        pos = torch.randn(1, 12, 196, 40, device=device_of(impl))
        for x in (image, image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
            assert torch.equal(blockify(x, 14, impl=impl), reference.blockify(x, 14))
            assert torch.equal(blockify(x, 14, pos_embed=pos, impl=impl), reference.blockify(x, 14) + pos)
        picture = torch.randn(3, 3, 224, 168, device=device_of(impl))
        assert torch.equal(patchify(picture, 4, 14, impl=impl), reference.patchify(picture, 4, 14))
    finally:
        torch.set_num_threads(before)


def test_float8_and_bool(impl):
    x = torch.randint(0, 2, (2, 8, 8, 5), device=device_of(impl))
    for dtype in (torch.bool, torch.float8_e4m3fn):
        out = blockify(x.to(dtype), 4, impl=impl)
        assert torch.equal(out.to(torch.int64), reference.blockify(x, 4))


SPARSE = """
import torch
from nest_fast.ops import blockify, unblockify
# 3 GiB of addresses, of which a few pages are touched: offsets pass 2**31.
x = torch.empty_strided((3, 4, 4, 16), (2**30, 64, 16, 1), dtype=torch.uint8)
x.copy_(torch.randint(0, 256, x.shape, dtype=torch.uint8))
assert x[2].data_ptr() - x.data_ptr() == 2**31
small = x.clone(memory_format=torch.contiguous_format)
assert torch.equal(blockify(x, 2, impl="cpp"), blockify(small, 2, impl="reference"))
blocks = x.view(3, 4, 4, 16)
assert torch.equal(unblockify(blocks, 2, impl="cpp"), unblockify(small, 2, impl="reference"))
print("right")
"""


def test_offsets_are_64_bit():
    """In a process of its own, since an offset of 32 bits is an access violation."""
    if _extension.cpu_error is not None:
        pytest.skip(_extension.cpu_error)
    assert run_python("-c", SPARSE) == "right\n"


@pytest.mark.gpu
def test_offsets_are_64_bit_on_a_gpu():
    x = torch.empty_strided((3, 4, 4, 16), (2**30, 64, 16, 1), dtype=torch.uint8, device="cuda")
    x.copy_(torch.randint(0, 256, x.shape, dtype=torch.uint8))
    assert torch.equal(blockify(x, 2, impl="cuda"), reference.blockify(x.contiguous(), 2))
    # More than 2**31 elements, moved one by one (3 is odd): the index of a thread's element passes it too.
    image = torch.randint(0, 256, (1, 16383, 4, 1), dtype=torch.uint8, device="cuda").expand(32771, -1, -1, -1)
    assert torch.equal(blockify(image, (3, 1), impl="cuda")[-1], reference.blockify(image[-1:], (3, 1))[0])


# --- what it returns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference", "cpp"])
@pytest.mark.parametrize(("grid", "block"), [((1, 1), (4, 6)), ((3, 1), (4, 6)), ((2, 3), (1, 6))])
def test_nothing_to_move_is_a_view(grid, block, impl):
    if impl == "cpp" and _extension.cpu_error is not None:
        pytest.skip(_extension.cpu_error)
    x = torch.randn(2, grid[0] * block[0], grid[1] * block[1], 8)
    blocks = blockify(x, block, impl=impl)
    assert blocks.data_ptr() == x.data_ptr()
    back = unblockify(blocks, grid, block, impl=impl)
    assert back.data_ptr() == x.data_ptr()
    assert torch.equal(back, x)
    pos = torch.randn(1, *blocks.shape[1:])
    assert torch.equal(blockify(x, block, pos_embed=pos, impl=impl), reference.blockify(x, block) + pos)


def test_of_nothing(impl):
    x = torch.randn(2, 0, 8, 3, device=device_of(impl), requires_grad=True)
    out = blockify(x, 4, impl=impl)
    assert out.shape == (2, 0, 16, 3)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_output_is_contiguous(impl):
    x = torch.randn(2, 3, 8, 8, device=device_of(impl))
    assert blockify(x.permute(0, 2, 3, 1), 4, impl=impl).is_contiguous()
    assert patchify(x, 2, 2, impl=impl).is_contiguous()


def test_auto_computes_what_the_reference_does():
    for size in (8, 32):  # on both sides of where the compiled kernel takes over
        x = torch.randn(3, size, size, 32)
        pos = torch.randn(1, 4, size * size // 4, 32)
        assert torch.equal(blockify(x, size // 2), reference.blockify(x, size // 2))
        assert torch.equal(unblockify(blockify(x, size // 2), 2), x)
        assert torch.equal(blockify(x, size // 2, pos_embed=pos), reference.blockify(x, size // 2) + pos)


def test_auto_in_forward_mode():
    x, pos = torch.randn(2, 32, 32, 32), torch.randn(1, 4, 256, 32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, 2 * x)
        for out, wanted in (
            (blockify(dual, 16), reference.blockify(2 * x, 16)),
            (blockify(dual, 16, pos_embed=pos), reference.blockify(2 * x, 16)),
            (unblockify(blockify(dual, 16), 2, pos_embed=pos), 2 * x),
            (patchify(dual, 2, 2), reference.patchify(2 * x, 2, 2)),
        ):
            assert torch.equal(forward_ad.unpack_dual(out).tangent, wanted)
        if _extension.cpu_error is None:
            with pytest.raises(RuntimeError, match="impl: 'cpp' cannot run blockify here: it has no forward-mode"):
                blockify(dual, 16, impl="cpp")


@pytest.mark.parametrize("batch", [1, 2])
def test_auto_has_gradients_where_the_kernel_runs(batch):
    x = torch.randn(batch, 56, 56, 96, requires_grad=True)  # above the bytes from where it does so
    pos = torch.randn(1, 16, 196, 96, requires_grad=True)
    dout = torch.randn(batch, 16, 196, 96)
    grads = torch.autograd.grad(blockify(x, 14, pos_embed=pos), (x, pos), dout)
    wanted = torch.autograd.grad(reference.blockify(x, 14) + pos, (x, pos), dout)
    for got, want in zip(grads, wanted, strict=True):
        assert torch.equal(got, want)
    assert not blockify(x.detach(), 14).requires_grad
    assert blockify(x.detach(), 14, pos_embed=pos).requires_grad


def test_an_explicit_choice_never_falls_back_and_auto_does(monkeypatch):
    monkeypatch.setattr(_extension, "cpu_error", "nest_fast/_C_cpu.abi3.so is not built")
    x = torch.randn(1, 128, 128, 32)
    assert torch.equal(blockify(x, 32), reference.blockify(x, 32))
    assert torch.equal(patchify(x.permute(0, 3, 1, 2), 2, 4), reference.patchify(x.permute(0, 3, 1, 2), 2, 4))
    with pytest.raises(RuntimeError, match=r"impl: 'cpp' cannot run blockify here: .* is not built"):
        blockify(x, 32, impl="cpp")


# --- bad input --------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 8, 12, 3)
BLOCKS = torch.zeros(2, 6, 16, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: blockify(X[0], 4), ValueError, "x: expected 4 dimensions (B, H, W, C), got shape (8, 12, 3)"),
        (lambda: blockify([1], 4), TypeError, "x: expected a tensor (B, H, W, C), got list"),
        (
            lambda: blockify(X, 5),
            ValueError,
            "block_size: expected (5, 5) to divide the image (8, 12), got a remainder",
        ),
        (lambda: blockify(X, 0), ValueError, "block_size: expected positive sizes, got 0"),
        (lambda: blockify(X, 4.0), TypeError, "block_size: expected an int or a pair of ints, got 4.0"),
        (
            lambda: blockify(X, 4, impl="fast"),
            ValueError,
            "impl: expected one of 'auto', 'reference', 'cpp', 'cuda', got 'fast'",
        ),
        (lambda: blockify(X, 4, impl="cuda"), RuntimeError, "impl: 'cuda' cannot run blockify here: x is on cpu"),
        (
            lambda: blockify(X, 4, pos_embed=torch.zeros(1, 6, 15, 3)),
            ValueError,
            "pos_embed: expected shape (1, 6, 16, 3) (1, T, N, C), got (1, 6, 15, 3)",
        ),
        (
            lambda: blockify(X, 4, pos_embed=torch.zeros(1, 6, 16, 3).long()),
            TypeError,
            "pos_embed: expected a floating-point dtype, got torch.int64",
        ),
        (
            lambda: blockify(X.int(), 4, pos_embed=torch.zeros(1, 6, 16, 3).int()),
            TypeError,
            "x: expected float64, float32, float16 or bfloat16 to add pos_embed to, got torch.int32",
        ),
        (
            lambda: unblockify(BLOCKS, (2, 2)),
            ValueError,
            "grid_size: expected height * width = T = 6 blocks, got (2, 2)",
        ),
        (
            lambda: unblockify(BLOCKS, (2, 3), 3),
            ValueError,
            "block_size: expected height * width = N = 16 tokens, got (3, 3)",
        ),
        (
            lambda: unblockify(BLOCKS[:, :, :15], (2, 3)),
            ValueError,
            "block_size: expected height and width, since N = 15 is no square, got None",
        ),
        (
            lambda: patchify(X, 5, 1),
            ValueError,
            "patch_size: expected (5, 5) to divide the image (12, 3), got a remainder",
        ),
        (
            lambda: patchify(X, (4, 1), (2, 3)),
            ValueError,
            "block_size: expected (2, 3) to divide the grid of patches (3, 3), got a remainder",
        ),
    ],
)
def test_refuses_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_refuses_bad_arguments_that_would_be_read_out_of_bounds(impl):
    """The checks of the kernels themselves, should they be called without the public functions."""
    x = torch.zeros(2, 8, 12, 3, device=device_of(impl))
    for call in (
        lambda: OPS.blockify(x, (5, 4), None),
        lambda: OPS.blockify(x, (0, 4), None),
        lambda: OPS.blockify(x, (4, 4), x[:1]),
        lambda: OPS.unblockify(x, (2, 3), (3, 4), None),
        lambda: OPS.patchify(x, (5, 1), (1, 1)),
        lambda: OPS.unpatchify(x, (2, 2), (2, 4), (3, 4)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


# --- torch's features -------------------------------------------------------------------------------------------------


def samples(device):
    """One call of each operation, with a strided input and with and without a position embedding."""
    image = torch.randn(2, 3, 4, 9, dtype=torch.float64, device=device, requires_grad=True)  # channels first
    blocks = torch.randn(2, 6, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    pos = torch.randn(1, 6, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    patches = torch.randn(2, 6, 1, 18, dtype=torch.float64, device=device, requires_grad=True)
    return [
        ("blockify", (image.permute(0, 2, 3, 1), (2, 3), None)),
        ("blockify", (image.permute(0, 2, 3, 1), (2, 3), pos)),
        ("unblockify", (blocks, (2, 3), (2, 3), None)),
        ("unblockify", (blocks.transpose(1, 2), (3, 2), (3, 2), pos)),
        ("patchify", (image, (2, 3), (1, 1))),
        ("unpatchify", (patches, (2, 3), (2, 3), (1, 1))),
    ]


@any_isa
@pytest.mark.parametrize("index", range(6))
def test_opcheck(index, impl):
    name, args = samples(device_of(impl))[index]
    torch.library.opcheck(getattr(OPS, name).default, args)


@any_isa
@pytest.mark.parametrize("index", range(6))
def test_gradcheck_and_gradgradcheck(index, impl):
    name, args = samples(device_of(impl))[index]
    leaves = [x.detach().requires_grad_() for x in args if isinstance(x, torch.Tensor)]

    def call(*tensors):
        tensors = list(tensors)
        return getattr(OPS, name)(*(tensors.pop(0) if isinstance(x, torch.Tensor) else x for x in args))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_gradients_of_pos_embed_alone(impl):
    image = torch.randn(2, 4, 9, 3, device=device_of(impl))
    pos = torch.randn(1, 6, 6, 3, device=device_of(impl), requires_grad=True)
    weight = torch.randn(2, 6, 6, 3, device=device_of(impl))
    (blockify(image, (2, 3), pos_embed=pos, impl=impl) * weight).sum().backward()
    torch.testing.assert_close(pos.grad, weight.sum(0, keepdim=True))


def test_expanded_gradients(impl):
    image = torch.randn(2, 8, 8, 3, device=device_of(impl), requires_grad=True)
    blockify(image, 4, impl=impl).sum().backward()  # the gradient of sum() has strides of 0
    assert torch.equal(image.grad, torch.ones_like(image))


def test_vmap(impl):
    device = device_of(impl)
    image, pos = torch.randn(3, 2, 8, 8, 5, device=device), torch.randn(4, 1, 4, 16, 5, device=device)
    image_last = image.movedim(0, -1)
    out = torch.vmap(lambda x: blockify(x, 4, impl=impl), in_dims=-1)(image_last)
    assert torch.equal(out, torch.stack([reference.blockify(x, 4) for x in image]))
    add = lambda x, p: blockify(x, 4, pos_embed=p, impl=impl)  # noqa: E731
    both = torch.vmap(torch.vmap(add, in_dims=(0, None)), in_dims=(None, 0))(image, pos)
    wanted = torch.stack([torch.stack([reference.blockify(x, 4) + p for x in image]) for p in pos])
    assert torch.equal(both, wanted)
    back = torch.vmap(lambda x, p: unblockify(x, 2, pos_embed=p, impl=impl), in_dims=(None, 0))(wanted[0, 0], pos)
    assert torch.equal(back, torch.stack([reference.unblockify(wanted[0, 0] + p, 2) for p in pos]))
    picture = image.movedim(-1, 2)
    patches = torch.vmap(lambda x: patchify(x, 2, 2, impl=impl))(picture)
    assert torch.equal(patches, torch.stack([reference.patchify(x, 2, 2) for x in picture]))
    leaf = picture[0].clone().requires_grad_()
    douts = torch.randn_like(patches)
    out = patchify(leaf, 2, 2, impl=impl)
    (grads,) = torch.autograd.grad(out, leaf, douts, is_grads_batched=True)  # vmap over the backward
    assert torch.equal(patchify(grads.flatten(0, 1), 2, 2, impl=impl).view_as(douts), douts)


def test_has_pytorchs_dtypes_under_autocast(impl):
    device = device_of(impl)
    image = torch.randn(2, 8, 8, 4, device=device).bfloat16()
    pos = torch.randn(1, 4, 16, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = blockify(image, 4, pos_embed=pos, impl=impl)
    assert torch.equal(out, reference.blockify(image, 4) + pos)


def through(x, pos, impl="auto"):
    """Everything, so that one compilation shows it."""
    y = unblockify(blockify(x, 4, pos_embed=pos, impl=impl), (x.shape[1] // 4, 2), pos_embed=pos, impl=impl)
    return patchify(y.permute(0, 3, 1, 2), 2, 2, impl=impl)


@any_isa
def test_compiles_in_one_graph(impl):
    device = device_of(impl)
    pos = torch.randn(1, 4, 16, 3, device=device)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(through, backend=count, fullgraph=True)
    for batch in (2, 3, 5, 8, 1):
        x = torch.randn(batch, 8, 8, 3, device=device)
        assert torch.equal(compiled(x, pos, impl), through(x, pos, impl))
    assert len(graphs) <= 3  # a static size, a dynamic one, and the batch of 1, which torch always treats by itself


@any_isa
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_through_the_backward(dynamic, impl):
    device = device_of(impl)
    compiled = torch.compile(through, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for height in (8, 12):
        x = torch.randn(2, height, 8, 3, device=device, requires_grad=True)
        pos = torch.randn(1, height // 2, 16, 3, device=device, requires_grad=True)
        got, wanted = (torch.autograd.grad((f(x, pos, impl) ** 2).sum(), (x, pos)) for f in (compiled, through))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


class Through(torch.nn.Module):
    def forward(self, x, pos):
        return through(x, pos)


def test_exports_with_a_dynamic_batch():
    x, pos = torch.randn(2, 8, 8, 3), torch.randn(1, 4, 16, 3)
    exported = torch.export.export(Through(), (x, pos), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    module = exported.module()
    for batch in (2, 7):
        x = torch.randn(batch, 8, 8, 3)
        assert torch.equal(module(x, pos), through(x, pos))


def test_fake_tensors_have_the_real_metadata(impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = device_of(impl)
    x = torch.randn(2, 3, 8, 12, device=device).permute(0, 2, 3, 1)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = blockify(mode.from_tensor(x), 4, impl=impl)
    real = blockify(x, 4, impl=impl)
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


# --- a GPU's own ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_of_many_blocks():
    for batch in (65_535, 65_536, 70_000):
        x = torch.randint(0, 256, (batch, 4, 4, 1), dtype=torch.uint8, device="cuda")
        assert torch.equal(blockify(x, 2, impl="cuda"), reference.blockify(x, 2))


@pytest.mark.gpu
def test_side_stream_and_graph_replay():
    static = torch.randn(8, 56, 56, 96, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the input is written late: a kernel on another stream would read the old one
        static.copy_(torch.randn_like(static))
        out = blockify(static, 14, impl="cuda")
    torch.cuda.synchronize()
    assert torch.equal(out, reference.blockify(static, 14))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = blockify(static, 14, impl="cuda")
    for _ in range(3):
        static.copy_(torch.randn_like(static))
        graph.replay()
        assert torch.equal(out, reference.blockify(static, 14))


@pytest.mark.gpu
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(2, 8, 8, 3, device="cuda:1")
    assert torch.equal(blockify(x, 4, impl="cuda"), reference.blockify(x, 4))
    assert torch.cuda.current_device() == 0
