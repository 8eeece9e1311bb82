"""windows, and attention_layer inside them: against Swin as its authors wrote it, and timm's blocks."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import (
    DTYPES,
    assert_stays_inside_its_buffers,
    guarded,
    in_double,
    saved_bytes,
    with_threads,
)
from helpers.layer_tests import LUCK, OPS, assert_accurate, assert_accurate_gradients, needs_cpp
from helpers.layer_tests import isa as isa
from nest_fast import attention_layer, block_attention, blockify, mlp_layer, reference, windows
from nest_fast.kernels.block_attention import block_attention_bwd, block_attention_fwd
from nest_fast.testing import gradients, import_timm, relative_error

import_timm()
from timm.models import swin_transformer, swin_transformer_v2  # noqa: E402

NAMES = ("x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "bias")
# Image, window, shift: divisible, padded below, on the right and on both sides, rectangles, a window over all of it.
SIZES = [
    ((14, 14), (7, 7), (3, 3)),
    ((10, 21), (7, 7), (3, 3)),
    ((9, 10), (4, 4), (0, 0)),
    ((9, 13), (4, 6), (1, 5)),
    ((8, 5), (4, 5), (2, 0)),
    ((5, 6), (7, 7), (3, 3)),
]


def swin_half(x, tensors, heads, bias, size, window, shift, pad_first):
    """Attention half of Swin's block for an image (B, H, W, C), after github.com/microsoft/Swin-Transformer.

    ``pad_first``: after torchvision's, which pads before it shifts.
    """
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = tensors
    (H, W), (h, w), (down, right) = size, window, shift
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
    room = (0, 0, 0, -W % w, 0, -H % h)
    y = F.pad(y, room) if pad_first else y
    y = torch.roll(y, (-down, -right), (1, 2))
    y = y if pad_first else F.pad(y, room)
    B, height, width, C = y.shape

    def partition(y):
        y = y.view(-1, height // h, h, width // w, w, y.shape[-1])
        return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, y.shape[-1])

    qkv = F.linear(partition(y), qkv_weight, qkv_bias).view(-1, h * w, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = (C // heads) ** -0.5 * qkv[0] @ qkv[1].mT + bias
    regions, number = torch.zeros(1, height, width, 1), 0
    for rows in (slice(0, -h), slice(-h, -down), slice(-down, None)):
        for columns in (slice(0, -w), slice(-w, -right), slice(-right, None)):
            regions[:, rows, columns] = number
            number += 1
    regions = partition(regions).squeeze(-1)
    mask = torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
    scores = (scores.view(B, -1, heads, h * w, h * w) + mask[:, None]).view(scores.shape)
    y = F.linear((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(-1, h * w, C), proj_weight, proj_bias)
    y = y.view(B, height // h, width // w, h, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, height, width, C)
    y = y if pad_first else y[:, :H, :W]
    return x + torch.roll(y, (down, right), (1, 2))[:, :H, :W]


def inputs(size, window, C=12, heads=3, B=2, dtype=torch.float32):
    """x (B, H * W, C), the weights, and a bias (heads, N, N); heads."""
    N = math.prod(window)
    vectors = 1 + torch.randn(C) / 3, torch.randn(C) / 3
    weights = torch.randn(3 * C, C) * C**-0.5, torch.randn(3 * C), torch.randn(C, C) * C**-0.5, torch.randn(C)
    tensors = torch.randn(B, math.prod(size), C), *vectors, *weights, torch.randn(heads, N, N)
    return [t.to(dtype) for t in tensors], heads


def halves(tensors, heads, given, impl, **options):
    *tensors, bias = tensors
    return attention_layer(*tensors, num_heads=heads, windows=given, bias=bias, impl=impl, **options)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("pad_first", [False, True], ids=["pad last", "pad first"])
@pytest.mark.parametrize(("size", "window", "shift"), SIZES, ids=str)
def test_attention_inside_windows_is_swins(size, window, shift, pad_first, impl):
    """Values and every gradient, in float64: padding on either side of the shift, the mask, the bias."""
    tensors, heads = inputs(size, window, dtype=torch.float64)
    given = windows(size, window, shift=shift, pad_first=pad_first)
    dout = torch.randn_like(tensors[0])

    def swin(x, *rest):
        *weights, bias = rest
        return swin_half(x.unflatten(1, size), weights, heads, bias, size, window, shift, pad_first).flatten(1, 2)

    wanted = gradients(swin, tensors, dout)
    got = gradients(lambda *t: halves(t, heads, given, impl), tensors, dout)
    for name, a, b in zip(("out", *NAMES), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(("size", "shift"), [((14, 14), 3), ((10, 17), 3), ((7, 20), 0)], ids=str)
def test_a_whole_layer_is_timms_swin_block(size, shift, impl):
    block = swin_transformer.SwinTransformerBlock(32, size, 2, window_size=7, shift_size=shift).eval()
    a, x = block.attn, torch.randn(2, *size, 32)
    given = windows(size, block.window_size, shift=block.shift_size)
    wanted = block(x).flatten(1, 2)
    weights = a.qkv.weight, a.qkv.bias, a.proj.weight, a.proj.bias
    y = attention_layer(
        *(x.flatten(1, 2), block.norm1.weight, block.norm1.bias, *weights),
        num_heads=2,
        windows=given,
        bias=a._get_rel_pos_bias()[0],
        eps=block.norm1.eps,
        impl=impl,
    )
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    y = mlp_layer(
        *(y, block.norm2.weight, block.norm2.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
        eps=block.norm2.eps,
        impl=impl,
    )
    torch.testing.assert_close(y, wanted)
    if any(block.shift_size):
        assert torch.equal(reference.window_mask(given), block.get_attn_mask())


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(("size", "shift"), [((16, 16), 4), ((8, 24), 0)], ids=str)
def test_a_whole_layer_is_timms_second_swin_block(size, shift, impl):
    """Cosine attention with a factor for each head, and the LayerNorm last."""
    block = swin_transformer_v2.SwinTransformerV2Block(32, size, 2, window_size=8, shift_size=shift).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    a, x = block.attn, torch.randn(2, *size, 32)
    table = a.cpb_mlp(a.relative_coords_table).view(-1, a.num_heads)
    N = a.window_size[0] * a.window_size[1]
    bias = 16 * table[a.relative_position_index.flatten()].view(N, N, -1).permute(2, 0, 1).sigmoid()
    qkv_bias = torch.cat((a.q_bias, a.k_bias, a.v_bias))
    y = attention_layer(
        *(x.flatten(1, 2), block.norm1.weight, block.norm1.bias, a.qkv.weight, qkv_bias, a.proj.weight, a.proj.bias),
        num_heads=2,
        windows=windows(size, block.window_size, shift=block.shift_size),
        bias=bias,
        scale=a.logit_scale.clamp(max=math.log(100.0)).exp().flatten(),
        cosine=True,
        post_norm=True,
        eps=block.norm1.eps,
        impl=impl,
    )
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    y = mlp_layer(
        *(y, block.norm2.weight, block.norm2.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
        eps=block.norm2.eps,
        post_norm=True,
        impl=impl,
    )
    torch.testing.assert_close(y, block(x).flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_blocks_and_grids_are_windows():
    """blockify's blocks; MaxViT's grid, which timm cuts by (B, h, H / h, w, W / w, C); Hiera's tokens, T apart."""
    x = torch.randn(2, 6, 8, 3)
    rows = x.flatten(1, 2)
    given = windows((6, 8), (3, 4))
    assert torch.equal(reference.into_windows(rows, given), blockify(x, (3, 4)))
    grid = x.view(2, 3, 2, 4, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 12, 3)
    assert torch.equal(reference.into_windows(rows, windows((6, 8), (3, 4), grid=True)), grid)
    apart = rows.view(2, 12, 4, 3).transpose(1, 2)
    assert torch.equal(reference.into_windows(rows, windows((1, 48), (1, 12), grid=True)), apart)
    tensors, heads = inputs((6, 8), (3, 4))
    tensors[0] = x.flatten(1, 2).repeat(1, 1, 4)
    blocks = attention_layer(blockify(tensors[0].unflatten(1, (6, 8)), (3, 4)), *tensors[1:7], num_heads=heads)
    inside = attention_layer(*tensors[:7], num_heads=heads, windows=given)
    torch.testing.assert_close(reference.into_windows(inside, given), blocks)


@pytest.mark.parametrize(("size", "window", "shift"), SIZES, ids=str)
def test_every_row_has_one_place(size, window, shift):
    """And so has all padding, which is counted row by row of the padded image."""
    for pad_first in (False, True):
        given = windows(size, window, shift=shift, pad_first=pad_first)
        rows, tokens = reference.window_rows(given), reference.window_tokens(given)
        assert torch.equal(rows.flatten()[tokens], torch.arange(math.prod(size)))
        assert torch.equal(rows.flatten().sort().values, torch.arange(rows.numel()))


def test_a_mask_takes_the_place_of_swins():
    """Alone, added or of truths, with groups; on both the image's windows and plain blocks."""
    tensors, heads = inputs((4, 8), (4, 4))
    given = windows((4, 8), 4, shift=2)
    swins = reference.window_mask(given)
    wanted = halves(tensors, heads, given, "reference")
    for impl in ("reference", "auto"):
        for mask in (swins, swins.double(), swins == 0):
            torch.testing.assert_close(halves(tensors, heads, given, impl, mask=mask), wanted)
        open_ = halves(tensors, heads, given, impl, mask=torch.zeros(1, 16, 16))
        assert not torch.allclose(open_, wanted, atol=1e-2)
        x = reference.into_windows(tensors[0], given)
        blocks = halves([x, *tensors[1:]], heads, None, impl, mask=swins)
        torch.testing.assert_close(reference.from_windows(blocks, given), wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: windows(0, 7), "size: expected positive sizes, got 0"),
        (lambda: windows(14, (7, 7.0)), r"window: expected an int or a pair of ints, got \(7, 7.0\)"),
        (lambda: windows(14, 7, shift=7), r"shift: expected less than the window \(7, 7\), got \(7, 7\)"),
        (lambda: windows(14, 7, shift=(0, -1)), r"shift: expected no negative sizes, got \(0, -1\)"),
        (lambda: windows((14, 15), 7, grid=True), r"window: expected \(7, 7\) to divide the image \(14, 15\), got a"),
        (lambda: windows(14, 7, shift=3, grid=True), r"shift: expected 0 with grid=True, got \(3, 3\)"),
    ],
)
def test_windows_refuses_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (8, 4)}, "windows: expected what nest_fast.windows returns, got tuple"),
        ({"windows": windows(8, 4)}, r"windows: expected an image of 32 tokens as x has, got size \(8, 8\)"),
        ({"windows": windows((4, 8), 2)}, r"bias: expected shape \(3, 4, 4\) \(heads, N, N\), got \(3, 16, 16\)"),
        ({"mask": torch.zeros(3, 16, 16)}, "mask: expected a number of groups that divides T = 2, got 3"),
        ({"mask": torch.zeros(2, 9, 9)}, r"mask: expected shape \(2, 16, 16\) \(groups, N, N\), got \(2, 9, 9\)"),
        ({"scale": torch.ones(3)}, r"scale: expected a number, which has no gradient, got a tensor \(3,\)"),
        ({"cosine": True}, r"scale: expected a tensor \(heads,\), got NoneType"),
        ({"cosine": True, "scale": torch.ones(2)}, r"scale: expected shape \(3,\) \(heads,\), got \(2,\)"),
    ],
)
def test_attention_inside_windows_refuses_bad_arguments(change, message):
    (*tensors, bias), heads = inputs((4, 8), (4, 4))
    given = {"windows": windows((4, 8), 4), "bias": bias} | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        attention_layer(*tensors, num_heads=heads, **given)
    assert "\n" not in str(error.value)


# --- the kernel in C++ ------------------------------------------------------------------------------------------------

# Image, window, shift, pad_first, channels, heads: N of 49, 16 and 144, head_dim 32 and 64, padded both ways.
KERNEL = {
    "shifted": ((14, 21), (7, 7), (3, 3), False, 96, 3),
    "padded last": ((10, 16), (7, 7), (3, 3), False, 64, 1),
    "padded first": ((9, 14), (4, 4), (2, 2), True, 128, 2),
    "large": ((24, 12), (12, 12), (6, 0), False, 64, 2),
    "rectangles": ((6, 15), (3, 5), (0, 2), False, 40, 5),
}


def half(*tensors, **options):
    *tensors, bias = tensors
    return attention_layer(*tensors, bias=bias, **options)


def second_half(*tensors, **options):
    """As Swin's second version has it."""
    *tensors, bias, scale = tensors
    return attention_layer(*tensors, bias=bias, scale=scale, cosine=True, post_norm=True, **options)


def kernel_case(name, dtype=torch.float32, B=2):
    size, window, shift, pad_first, C, heads = KERNEL[name]
    tensors, _ = inputs(size, window, C, heads, B, dtype)
    return tensors, {"num_heads": heads, "windows": windows(size, window, shift=shift, pad_first=pad_first)}


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", KERNEL)
def test_inside_windows_is_as_accurate_as_pytorch(isa, dtype, name):
    """Values and the gradient of every input."""
    tensors, options = kernel_case(name, dtype)
    assert_accurate(half, tensors, options)
    assert_accurate_gradients(half, tensors, options | {"branch_scale": 1.7})


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["shifted", "padded first"])
def test_cosine_attention_is_as_accurate_as_pytorch(isa, dtype, name):
    """With the LayerNorm last; values and the gradient of every input, the heads' factors among them."""
    tensors, options = kernel_case(name, dtype)
    tensors.append(1 + 4 * torch.rand(options["num_heads"]).to(dtype))
    assert_accurate(second_half, tensors, options)
    assert_accurate_gradients(second_half, tensors, options | {"branch_scale": 1.7}, draws=8)


@needs_cpp
@settings(max_examples=30)
@given(data=st.data())
def test_inside_windows_of_any_shape(isa, data):
    """Images, windows, shifts and paddings, grids, masks in the place of Swin's, one key head, no biases."""
    draw, side = data.draw, st.integers(1, 6)
    window = draw(st.tuples(side, side))
    grid = draw(st.integers(0, 4)) == 0
    size = tuple(edge * draw(st.integers(1, 3)) if grid else draw(st.integers(1, 15)) for edge in window)
    shift = (0, 0) if grid else tuple(draw(st.integers(0, edge - 1)) for edge in window)
    cut = windows(size, window, shift=shift, pad_first=draw(st.booleans()), grid=grid)
    heads, head_dim, dtype = (
        draw(st.integers(1, 3)),
        draw(st.integers(2, 20)),
        draw(st.sampled_from([*DTYPES.values()])),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tensors, _ = inputs(size, window, heads * head_dim, heads, draw(st.integers(1, 3)), dtype)
    options = {"num_heads": heads, "windows": cut}
    if draw(st.booleans()):
        options["mask"] = torch.randn(1, cut.tokens, cut.tokens)
    for n in draw(st.sampled_from([(), (7,), (4, 6)])):
        tensors[n] = None
    if draw(st.integers(0, 3)) == 0:
        options["multi_query"] = True
        kept = heads * head_dim + 2 * head_dim
        tensors[3], tensors[4] = tensors[3][:kept], tensors[4] if tensors[4] is None else tensors[4][:kept]
    slack = LUCK * torch.finfo(dtype).eps
    assert_accurate(half, tensors, options, slack)
    if tensors[0].shape[-1] > 3 and cut.tokens > 3:  # otherwise terms cancel, all of them where a window is a token
        assert_accurate_gradients(half, tensors, options, 4 * slack)


@needs_cpp
def test_inside_windows_repeats_bit_by_bit(isa):
    """With any number of threads, that of the bias included; each image alike beside any others."""
    for function, name, B in ((half, "shifted", 1), (second_half, "padded last", 5), (half, "rectangles", 9)):
        tensors, options = kernel_case(name, B=B)
        tensors += [torch.rand(options["num_heads"])] if function is second_half else []
        dout = torch.randn_like(tensors[0])
        call = lambda *t: function(*t, **options, impl="cpp")  # noqa: B023, E731
        results = with_threads(lambda: gradients(call, tensors, dout), (1, 2, 64))  # noqa: B023
        for what, *same in zip(("out", *NAMES, "scale"), *results, strict=False):
            if not what.startswith("norm"):  # PyTorch's, a sum for each thread
                assert all(torch.equal(same[0], other) for other in same[1:]), what
        assert torch.equal(call(tensors[0][-1:], *tensors[1:]), results[0][0][-1:])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inside_windows_stays_inside_its_buffers(isa, dtype):
    for name in ("padded last", "padded first"):
        tensors, options = kernel_case(name, dtype, B=1)
        dout = torch.randn_like(tensors[0])
        results = []
        for where in (guarded, torch.clone):
            leaves = [where(t).requires_grad_() for t in tensors]
            out = half(*leaves, **options, impl="cpp")
            results.append((out, *torch.autograd.grad(out, leaves, where(dout))))
        assert all(map(torch.equal, *results))
        assert not any(x.isnan().any() for x in results[0])


@needs_cpp
def test_inside_windows_keeps_special_values_where_pytorch_does(isa):
    tensors, options = kernel_case("padded last")
    for value in (math.nan, math.inf):
        tensors[0][1, 20, 4] = value
        out, wanted = (half(*tensors, **options, impl=impl) for impl in ("cpp", "reference"))
        assert torch.equal(out.isnan(), wanted.isnan())
        assert out.isnan().any()


@needs_cpp
def test_inside_windows_keeps_little_for_the_gradient():
    """qkv, attention's output and its sums: no scores, no copies in the order of windows."""
    tensors, options = kernel_case("large")
    leaves = [t.requires_grad_() for t in tensors]
    x = leaves[0] * 1  # saved as an activation is
    ours, plain = (
        saved_bytes(lambda impl=impl: half(x, *leaves[1:], **options, impl=impl)) for impl in ("cpp", "reference")
    )
    assert ours == (1 + 4 + 2 * 2 / 64) * x.nbytes
    assert ours < 0.4 * plain


# --- the kernel in Triton ---------------------------------------------------------------------------------------------

# Image, window, shift; whether padding comes first, or windows are grids; heads, key heads, head_dim; dtype. What stays
# on chip and what streams by, a window wider than the image, one over all of it, padding of which each token differs.
IMAGES = {
    "shifted": ((14, 7), (7, 7), (3, 0), {}, 1, 1, 32, "bf16"),
    "padded last": ((9, 6), (4, 4), (1, 2), {}, 2, 2, 24, "fp32"),
    "padded first": ((5, 9), (4, 4), (2, 1), {"pad_first": True}, 2, 1, 16, "fp16"),
    "grid": ((6, 8), (3, 4), (0, 0), {"grid": True}, 1, 1, 20, "fp32"),
    "one window": ((5, 6), (7, 7), (6, 6), {}, 1, 1, 32, "fp16"),
    "sam": ((10, 14), (14, 14), (0, 0), {}, 1, 1, 80, "bf16"),
    "small": ((3, 3), (2, 2), (1, 1), {}, 1, 1, 16, "fp32"),
    "over 256 tokens": ((16, 16), (16, 17), (0, 8), {}, 1, 1, 32, "bf16"),
}
# Swin v2's windows; with fp32 their tokens stream by.
COSINES = {
    "49 tokens, padded": ((6, 7), (7, 7), (3, 3), {}, 2, 2, 32, "fp32"),
    "64 tokens": ((8, 16), (8, 8), (4, 4), {}, 2, 2, 32, "fp16"),
    "144 tokens": ((12, 12), (12, 12), (0, 0), {}, 2, 2, 32, "bf16"),
    "256 tokens": ((16, 16), (16, 16), (0, 0), {}, 1, 1, 32, "bf16"),
    "a shared key head": ((8, 4), (4, 4), (0, 0), {}, 2, 1, 16, "fp32"),
}


def images(size, window, shift, options, heads, kv_heads, head_dim, dtype, each_pad=False, B=2, bias=True, pads=True):
    """q, k, v, bias, pad_k and pad_v, the three first of a packed projection; the gradient of the output; windows."""
    dtype, cut = DTYPES[dtype], windows(size, window, shift=shift, **options)
    packed = torch.randn(B, cut.rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
    padding = cut.blocks * cut.tokens - cut.rows
    pad_k, pad_v = torch.randn(2, padding if each_pad else 1, kv_heads, head_dim, dtype=dtype)
    pad_k, pad_v = (pad_k, pad_v) if pads and padding else (None, None)
    tensors = [*packed.split((heads, kv_heads, kv_heads), 2), None, pad_k, pad_v]
    tensors[3] = torch.randn(heads, cut.tokens, cut.tokens, dtype=dtype) if bias else None
    return tensors, torch.randn(B, cut.rows, heads, head_dim, dtype=dtype), cut


def attended(tensors, dout, cut, impl, **options):
    """The output and, of its gradient ``dout`` if there is one, that of every tensor that is there."""
    every = "q", "k", "v", "bias", "pad_k", "pad_v", "scale"
    names = [name for name, x in zip(every, tensors, strict=False) if x is not None]

    def call(*given):
        return block_attention(**dict(zip(names, given, strict=True)), windows=cut, impl=impl, **options)

    given = [x for x in tensors if x is not None]
    if dout is None:
        return {"out": call(*given)}
    return dict(zip(("out", *names), gradients(call, given, dout), strict=True))


def assert_attends(tensors, dout, cut, slack=4, **options):
    """Each L2 error at most 1.25 of plain PyTorch's in the same dtype, and some roundings, since the sums are short."""
    ours, plain = (attended(tensors, dout, cut, impl, **options) for impl in ("triton", "reference"))
    golden = attended(in_double(tensors), None if dout is None else dout.double(), cut, "reference", **options)
    for name, exact in golden.items():
        error, allowed = (relative_error(found[name], exact) for found in (ours, plain))
        assert ours[name].dtype == tensors[0].dtype, name
        bound = 1.25 * allowed + slack * torch.finfo(tensors[0].dtype).eps
        assert error <= bound, f"{name}: error {error:.3e}, plain PyTorch's {allowed:.3e}"


@pytest.mark.parametrize("name", IMAGES)
def test_triton_attends_where_the_tokens_are(name):
    """Values and every gradient, that of padding among them."""
    B = 1 if name in ("sam", "over 256 tokens") else 2
    tensors, dout, cut = images(*IMAGES[name], each_pad=name in ("sam", "one window"), B=B)
    assert_attends(tensors, dout, cut)


@pytest.mark.parametrize("name", ["shifted", "padded last", "one window", *COSINES])
def test_triton_attends_by_cosines(name):
    """And the gradients of q and k before they have their lengths, of padding's, and of each head's scale."""
    tensors, dout, cut = images(*{**IMAGES, **COSINES}[name], each_pad=name == "one window", B=2 - (name in COSINES))
    tensors.append((1 + 9 * torch.rand(tensors[0].shape[2])).to(dout.dtype))
    for douts in (dout, None):
        assert_attends(tensors, douts, cut, cosine=True)


def test_triton_normalises_q_and_k_itself():
    """Where gradients are wanted, too."""
    (q, k, v, bias, *_), dout, cut = images(*IMAGES["small"])
    scale = torch.ones(1, requires_grad=True)
    with mock.patch.object(reference, "with_length", side_effect=AssertionError("q and k are written again")):
        out = block_attention(q.requires_grad_(), k, v, scale=scale, cosine=True, bias=bias, windows=cut, impl="triton")
        out.backward(dout)
    assert q.grad.isfinite().all()
    assert scale.grad.isfinite().all()


@pytest.mark.parametrize(("edge", "dtype"), [(4, "fp32"), (5, "fp32"), (5, "bf16")], ids=str)
def test_triton_by_cosines_of_rows_too_short_to_be_made_long(edge, dtype):
    """F.normalize divides them by 1e-12, which is all that their gradients follow from; held on chip, and streamed."""
    tensors, dout, cut = images((edge, edge), (edge, edge), (0, 0), {}, 1, 1, 16, dtype, B=1)
    q, k = (x.clone() for x in tensors[:2])
    q[:, :3], k[:, 5:7] = 0.0, 0.0
    q[:, 1, :, 4] = k[:, 6, :, 2] = 1e-13
    tensors = [q, k, *tensors[2:], torch.tensor([3.0], dtype=dout.dtype)]
    assert_attends(tensors, dout, cut, cosine=True)
    ours, plain = (attended(tensors, dout, cut, impl, cosine=True) for impl in ("triton", "reference"))
    golden = attended(in_double(tensors), dout.double(), cut, "reference", cosine=True)
    for name, short in (("q", slice(0, 3)), ("k", slice(5, 7))):
        for rows in (short, slice(7, None)):  # the others vanish beside them
            error, allowed = (relative_error(x[name][:, rows], golden[name][:, rows]) for x in (ours, plain))
            assert error <= 1.25 * allowed + 4 * torch.finfo(dout.dtype).eps, name


def test_triton_takes_a_mask_in_the_place_of_swins():
    tensors, dout, cut = images(*IMAGES["padded last"], pads=False)
    mask = torch.rand(cut.counts[1], 16, 16) < 0.8
    assert_attends(tensors, dout, cut, mask=mask | torch.eye(16, dtype=torch.bool))
    assert_attends(tensors, dout, cut, mask=torch.randn(1, 16, 16))


@settings(max_examples=8)
@given(data=st.data())
def test_triton_attends_in_windows_of_any_shape(data):
    draw, side = data.draw, st.integers(1, 5)
    window = draw(st.tuples(side, side))
    grid = draw(st.integers(0, 3)) == 0
    size = tuple(edge * draw(st.integers(1, 2)) if grid else draw(st.integers(1, 9)) for edge in window)
    shift = (0, 0) if grid else tuple(draw(st.integers(0, edge - 1)) for edge in window)
    options = {"grid": True} if grid else {"pad_first": draw(st.booleans())}
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(2, 20))
    kv_heads, dtype = draw(st.sampled_from([1, heads])), draw(st.sampled_from([*DTYPES]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    more = {name: draw(st.booleans()) for name in ("each_pad", "bias", "pads")}
    tensors, dout, cut = images(size, window, shift, options, heads, kv_heads, head_dim, dtype, B=1, **more)
    assert_attends(tensors, dout, cut, LUCK if cut.tokens > 3 else 64)  # of few keys most terms cancel


def test_triton_in_windows_stays_inside_its_buffers():
    for name in ("padded last", "one window"):
        tensors, dout, cut = images(*IMAGES[name], each_pad=name == "one window")
        numbers = cut.to_numbers(cut)
        scale, factors = (1.0, torch.rand(1)) if name == "one window" else (0.25, None)

        def everything(copy, tensors=tensors, dout=dout, numbers=numbers, scale=scale, factors=factors):
            q, k, v, bias, pad_k, pad_v = (copy(x) for x in tensors)
            q, k, v, d = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), copy(dout).unsqueeze(1)
            scales = copy(factors)
            out, lse = block_attention_fwd(q, k, v, bias, None, scale, pad_k, pad_v, scales, numbers)
            kept = q, k, v, out, lse, bias, None, scale, True
            grads = block_attention_bwd(d, *kept, pad_k, pad_v, numbers, True, scales)
            return out, lse, *(x for x in grads if x is not None)

        assert_stays_inside_its_buffers(everything)


def test_triton_in_windows_is_what_opcheck_expects():
    forward, backward = (getattr(OPS, f"block_attention_triton_{end}").default for end in ("fwd", "bwd"))
    (q, k, v, bias, pad_k, pad_v), dout, cut = images(*IMAGES["small"], B=1)
    q, k, v, dout = (x.unsqueeze(1) for x in (q, k, v, dout))
    pads, numbers = (pad_k.requires_grad_(), pad_v), cut.to_numbers(cut)
    given = q, k.requires_grad_(), v, bias.requires_grad_(), None, 0.25, *pads, None, numbers
    torch.library.opcheck(forward, given)
    by_cosines = *given[:5], 1.0, *pads, torch.rand(1).requires_grad_(), numbers
    torch.library.opcheck(forward, by_cosines)
    for needed, these in ((False, given), (True, by_cosines)):
        with torch.no_grad():
            kept = q, k, v, *forward(*these), bias, None, these[5]
        torch.library.opcheck(backward, tuple(_detached(dout, *kept, needed, *pads, numbers, needed, these[8])))


def _detached(*given):
    return (x.detach() if isinstance(x, torch.Tensor) else x for x in given)


@pytest.mark.parametrize("impl", ["sdpa", "cpp", "auto"])
def test_others_take_windows_from_the_image_and_put_them_back(impl):
    tensors, dout, cut = images(*IMAGES["padded first"][:-1], "fp32", each_pad=True)
    ours, wanted = (attended(tensors, dout, cut, one) for one in (impl, "reference"))
    for name, x in wanted.items():
        torch.testing.assert_close(ours[name], x, msg=lambda text, name=name: f"{name}: {text}")
    plain = reference.block_attention(*tensors[:3], bias=tensors[3], windows=cut, pad_k=tensors[4], pad_v=tensors[5])
    torch.testing.assert_close(wanted["out"], plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": None}, r"q: expected 5 dimensions \(B, T, N, heads, head_dim\), got shape \(2, 30, 1, 8\)"),
        ({"windows": windows(5, 7)}, r"windows: expected an image of 30 tokens as q has, got size \(5, 5\)"),
        ({"pad_v": None}, "pad_v: expected a tensor beside pad_k, got None"),
        ({"pad_k": torch.zeros(2, 1, 8)}, r"pad_k: expected shape \(1 or 19, 1, 8\) as k has, got \(2, 1, 8\)"),
        ({"pad_k": torch.zeros(1, 1, 8).double()}, "pad_k: expected dtype torch.float32 as k has, got torch.float64"),
        ({"bias": torch.zeros(1, 9, 9)}, r"bias: expected shape \(1, 49, 49\) \(heads, N, N\), got \(1, 9, 9\)"),
        ({"cosine": True, "scale": 0.5}, r"scale: expected a tensor \(heads,\), got float"),
        ({"cosine": True, "scale": torch.ones(3)}, r"scale: expected shape \(1,\) \(heads,\), got \(3,\)"),
    ],
)
def test_block_attention_in_windows_refuses_bad_arguments(change, message):
    x, pad = torch.zeros(2, 30, 1, 8), torch.zeros(1, 1, 8)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        block_attention(x, x, x, **({"windows": windows((5, 6), 7), "pad_k": pad, "pad_v": pad} | change))
    assert "\n" not in str(error.value)


def test_padding_without_windows_is_refused():
    x = torch.zeros(1, 1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"pad_k: expected None without windows, got a tensor \(1, 1, 8\)"):
        block_attention(x, x, x, pad_k=x[0, 0, :1], pad_v=x[0, 0, :1])


# --- tracers ----------------------------------------------------------------------------------------------------------


class Half(torch.nn.Module):
    """A Swin layer's attention half whose windows are those of any image."""

    def __init__(self, tensors, heads):
        super().__init__()
        self.heads = heads
        for n, t in enumerate(tensors):
            self.register_buffer(f"p{n}", t)

    def forward(self, x):
        _, H, W, _ = x.shape
        *weights, bias = self.buffers()
        given = windows((H, W), 4, shift=2)
        y = attention_layer(x.flatten(1, 2), *weights, num_heads=self.heads, windows=given, bias=bias)
        return y.unflatten(1, (H, W))


def test_exports_with_any_image_size():
    (_, *tensors), heads = inputs((8, 8), (4, 4))
    module, dim = Half(tensors, heads), torch.export.Dim
    sizes = {1: dim("H", min=5, max=64), 2: dim("W", min=5, max=64)}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, 9, 14, 12),), dynamic_shapes=(sizes,)).module()
        for size in ((9, 14), (12, 12), (30, 7)):
            x = torch.randn(2, *size, 12)
            torch.testing.assert_close(program(x), module(x))


def test_compiles_in_one_graph():
    (_, *tensors), heads = inputs((8, 8), (4, 4))
    module = Half(tensors, heads)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 14, 12)
    torch.testing.assert_close(gradients(compiled, (x,), x), gradients(module, (x,), x))
