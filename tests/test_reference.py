"""The reference, which everything else is measured by: against timm, against first principles, and in gradcheck."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from nest_fast import reference
from nest_fast.testing import import_timm

timm_nest = import_timm().models.nest


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("edge", [1, 2, 7])
def test_blockify_is_timms(edge):
    x = torch.randn(2, 14, 14, 3)
    blocks = reference.blockify(x, edge)
    assert torch.equal(blocks, timm_nest.blockify(x, edge))
    assert torch.equal(reference.unblockify(blocks, 14 // edge), x)


def test_blockify_rectangles_by_index():
    x = torch.arange(2 * 6 * 12).reshape(2, 6, 12, 1)
    blocks = reference.blockify(x, (3, 4))
    assert blocks.shape == (2, 6, 12, 1)
    for t, n in ((0, 0), (2, 5), (4, 11)):
        row, col = t // 3 * 3 + n // 4, t % 3 * 4 + n % 4
        assert torch.equal(blocks[:, t, n], x[:, row, col])
    assert torch.equal(reference.unblockify(blocks, (2, 3), (3, 4)), x)


def test_patchify_is_the_patch_convolution_in_block_order():
    x, weight = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    image = torch.nn.functional.conv2d(x, weight, stride=2).permute(0, 2, 3, 1)
    patches = reference.patchify(x, 2, (4, 6))
    torch.testing.assert_close(patches @ weight.flatten(1).T, reference.blockify(image, (4, 6)))


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("masked", [None, "float", "bool"])
def test_block_attention_entry_by_entry(kv_heads, masked):
    B, T, N, heads, d = 2, 4, 5, 3, 8
    q = torch.randn(B, T, N, heads, d, dtype=torch.float64)
    k, v = torch.randn(2, B, T, N, kv_heads, d, dtype=torch.float64)
    bias = torch.randn(heads, N, N, dtype=torch.float64)
    mask = {None: None, "float": torch.randn(2, N, N).double(), "bool": torch.rand(2, N, N) > 0.3}[masked]
    if masked == "bool":
        mask |= torch.eye(N, dtype=torch.bool)  # a row with nothing to attend to has no softmax
    out = reference.block_attention(q, k, v, scale=0.3, bias=bias, mask=mask)
    b, t, n, h = 1, 3, 2, 1
    kh = h if kv_heads > 1 else 0
    scores = [0.3 * torch.dot(q[b, t, n, h], k[b, t, m, kh]) + bias[h, n, m] for m in range(N)]
    if masked == "float":
        scores = [s + mask[t % 2, n, m] for m, s in enumerate(scores)]
    if masked == "bool":
        scores = [s if mask[t % 2, n, m] else torch.tensor(-math.inf).double() for m, s in enumerate(scores)]
    weights = torch.stack(scores).softmax(0)
    torch.testing.assert_close(out[b, t, n, h], sum(weights[m] * v[b, t, m, kh] for m in range(N)))


@pytest.mark.parametrize(("padding", "pad_type"), [("symmetric", ""), ("same", "same")])
def test_block_aggregate_is_timms_conv_pool(padding, pad_type):
    norm_layer = timm_nest.LayerNorm
    pool = timm_nest.ConvPool(6, 10, norm_layer, pad_type).double()
    torch.nn.init.normal_(pool.norm.weight)
    image = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    wanted = reference.blockify(pool(image).permute(0, 2, 3, 1), (2, 3))
    got = reference.block_aggregate(
        reference.blockify(image.permute(0, 2, 3, 1), (2, 3)),
        pool.conv.weight,
        pool.conv.bias,
        pool.norm.weight,
        pool.norm.bias,
        grid_size=(4, 4),
        block_size=(2, 3),
        padding=padding,
    )
    torch.testing.assert_close(got, wanted)


def test_gradcheck_permutations():
    assert gradcheck(lambda x: reference.blockify(x, (2, 3)), double(2, 4, 6, 2))
    assert gradcheck(lambda x: reference.unblockify(x, (2, 1), (2, 3)), double(2, 2, 6, 2))
    assert gradcheck(lambda x: reference.patchify(x, 2, (2, 1)), double(1, 2, 4, 4))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gradcheck_attention(kv_heads):
    inputs = (double(1, 2, 3, 2, 4), double(1, 2, 3, kv_heads, 4), double(1, 2, 3, kv_heads, 4), double(2, 3, 3))
    mask = torch.randn(2, 3, 3, dtype=torch.float64)
    assert gradcheck(lambda q, k, v, bias: reference.block_attention(q, k, v, bias=bias, mask=mask), inputs)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_gradcheck_aggregate(padding):
    inputs = (double(1, 4, 4, 3), double(4, 3, 3, 3), double(4), double(4), double(4), double(1, 1, 4, 4))
    assert gradcheck(
        lambda x, w, b, g, s, p: reference.block_aggregate(x, w, b, g, s, grid_size=2, padding=padding, pos_embed=p),
        inputs,
    )


def test_padding_never_wins_the_maximum():
    """With every normalised value negative, a padding of 0 would win at the edges."""
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64)
    norm_weight, norm_bias = torch.full((4,), 0.1).double(), torch.full((4,), -5.0).double()
    for padding in ("symmetric", "same"):
        out = reference.block_aggregate(
            x, torch.randn(4, 3, 3, 3).double(), None, norm_weight, norm_bias, grid_size=2, padding=padding
        )
        assert out.max() < -4
