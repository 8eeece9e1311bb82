"""The C++ kernel of block_attention, with every instruction set of this processor: accuracy, memory, special values."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.attention import amid_nan, golden_softmax, sums_of_terms
from helpers.common import CPP_ISA, DTYPES, ISAS, guarded, in_double, instructions, with_threads
from nest_fast import reference
from nest_fast.ops import _extension, block_attention
from nest_fast.testing import assert_as_accurate, gradients, relative_error

if not CPP_ISA:
    why_not = _extension.cpu_error or "this processor has neither AVX2 nor AVX-512"
    pytest.skip(why_not, allow_module_level=True)
OPS = torch.ops.nest_fast


@pytest.fixture(params=ISAS)
def isa(request):
    with instructions(request.param):
        yield


def packed(B, T, N, heads, d, dtype=torch.float32, kv_heads=None):
    kv_heads = heads if kv_heads is None else kv_heads
    return torch.randn(B, T, N, heads + 2 * kv_heads, d).to(dtype).split((heads, kv_heads, kv_heads), dim=3)


def forward(q, k, v, bias, mask, scale):
    """The operation inside blocks, with nothing added by position."""
    return OPS.block_attention_cpp_fwd(q, k, v, None, None, bias, mask, None, None, scale, [])


def kernel(q, k, v, scale=None, bias=None, mask=None):
    return forward(q, k, v, bias, mask, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def backward(dout, q, k, v, scale=None, bias=None, mask=None):
    """dq, dk and dv of the kernel, and dbias where there is a bias."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kept = forward(q, k, v, bias, mask, scale)
    grads = OPS.block_attention_cpp_bwd(dout, q, k, v, *kept, bias, mask, scale, bias is not None)
    return grads[: 3 if bias is None else 4]


def plain(q, k, v, scale=None, bias=None, mask=None):
    """4-D scaled_dot_product_attention, the measure of accuracy."""
    return block_attention(q, k, v, scale=scale, bias=bias, mask=mask, impl="sdpa")


def golden(q, k, v, scale=None, bias=None, mask=None):
    return reference.block_attention(*in_double((q, k, v)), scale=scale, bias=bias, mask=mask)


# The NesT shapes (196; 16 for 32 px), windows (49, 64), one beyond what registers were sized for, odd sizes.
@pytest.mark.parametrize(("N", "d"), [(196, 32), (16, 64), (49, 24), (64, 48), (256, 16), (197, 33), (17, 128)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_is_as_accurate_as_sdpa(isa, dtype, N, d):
    # So many numbers that the largest error does not hang on luck.
    q, k, v = packed(2, 1 + 2**18 // (N * 3 * d), N, 3, d, dtype)
    ours, theirs, exact = kernel(q, k, v), plain(q, k, v), golden(q, k, v)
    assert_as_accurate(ours, theirs, exact, 1.5)
    assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


# 700 tokens need several passes over dq.
@pytest.mark.parametrize(
    ("N", "d", "kv_heads"),
    [(196, 32, 3), (196, 32, 1), (16, 64, 3), (49, 24, 1), (256, 16, 3), (197, 33, 1), (17, 128, 3), (700, 40, 3)],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_is_as_accurate_as_sdpas(isa, dtype, N, d, kv_heads):
    q, k, v = packed(2, 1 + 2**15 // (N * 3 * d), N, 3, d, dtype, kv_heads)
    dout = torch.randn_like(q)
    ours, theirs, exact = (
        gradients(f, x, dout) for f, x in ((kernel, (q, k, v)), (plain, (q, k, v)), (golden, (q, k, v)))
    )
    factor = 3 if dtype == torch.float32 else 2
    for name, *each in zip(("dq", "dk", "dv"), ours[1:], theirs[1:], exact[1:], strict=True):
        assert_as_accurate(*each, factor, name)
        assert relative_error(each[0], each[2]) <= factor * relative_error(each[1], each[2]), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", [0.2, -0.7, 0.0, 8.0])
def test_lse_and_any_scale(isa, dtype, scale):
    q, k, v = packed(2, 2, 50, 2, 16, dtype)
    out, lse = forward(q, k, v, None, None, scale)
    scores = scale * q.double().transpose(2, 3) @ k.double().transpose(2, 3).transpose(-1, -2)
    exact = scores.logsumexp(-1)
    assert lse.dtype == torch.float32
    # A few roundings of the largest intermediate; and 2^x in bf16 is good to 3e-6.
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=4e-6 + 4e-7 * scores.abs().max().item())
    assert_as_accurate(out, plain(q, k, v, scale), golden(q, k, v, scale), 1.5)

    dout = torch.randn_like(q)
    ours = backward(dout, q, k, v, scale)
    theirs, wanted = (gradients(lambda *a: f(*a, scale), (q, k, v), dout)[1:] for f in (plain, golden))  # noqa: B023
    for name, *each in zip(("dq", "dk", "dv"), ours, theirs, wanted, strict=True):
        assert_as_accurate(*each, 3 if dtype == torch.float32 else 2, name)


# A relative position bias, a mask of groups with none in one of them, both, and multi-query attention with both.
@pytest.mark.parametrize(
    ("N", "d", "kv_heads", "names"),
    [
        (49, 32, 3, "bias"),
        (16, 64, 3, "mask"),
        (144, 32, 3, "bias mask"),
        (49, 32, 1, "bias mask"),
        (29, 20, 3, "bias"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bias_and_mask_are_as_accurate_as_sdpas(isa, dtype, N, d, kv_heads, names):
    q, k, v = packed(2, 2 * (1 + 2**14 // (N * 3 * d)), N, 3, d, dtype, kv_heads)
    mask = torch.randn(2, N, N).masked_fill(torch.rand(2, N, N) < 0.2, -100.0)
    mask[1] = 0
    bias = [torch.randn(3, N, N).to(dtype)] if "bias" in names else []
    dout = torch.randn_like(q)

    def differentiated(function, tensors, dout, mask):
        mask = {"mask": mask} if "mask" in names else {}
        call = lambda q, k, v, bias=None: function(q, k, v, bias=bias, **mask)  # noqa: E731
        return gradients(call, tensors, dout)

    given = (q, k, v, *bias)
    exact = differentiated(golden, in_double(given), dout.double(), mask.double())
    ours, theirs = (differentiated(partial(block_attention, impl=i), given, dout, mask) for i in ("cpp", "sdpa"))
    assert_as_accurate(ours[0], theirs[0], exact[0], 1.5)
    for name, *each in zip(("out", "dq", "dk", "dv", "dbias"), ours, theirs, exact, strict=False):
        factor = 1.5 if name == "out" else 3 if dtype == torch.float32 else 2
        assert relative_error(each[0], each[2]) <= factor * relative_error(each[1], each[2]), name


@settings(max_examples=200)
@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(list(DTYPES.values())),
    B=st.integers(1, 2),
    T=st.integers(1, 3),
    N=st.one_of(st.integers(1, 70), st.integers(180, 300)),
    heads=st.integers(1, 4),
    d=st.integers(1, 128),
    multi_query=st.booleans(),
    layout=st.sampled_from(["packed", "contiguous", "head-major", "expanded", "sliced"]),
    seed=st.integers(0, 2**16),
)
def test_of_any_shape_and_strides(isa, dtype, B, T, N, heads, d, multi_query, layout, seed):
    torch.manual_seed(seed)
    inputs = packed(B, T, N, heads, d, dtype, 1 if multi_query else heads)
    make = {
        "packed": lambda x: x,
        "contiguous": torch.Tensor.contiguous,
        "head-major": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:, :1].expand(-1, T, -1, -1, -1),
        "sliced": lambda x: torch.cat((x, x), -1)[..., 1 : d + 1],
    }[layout]
    q, k, v = (make(x) for x in inputs)
    dout = make(torch.randn(B, T, N, heads, d).to(dtype))
    with instructions(isa):
        ours = kernel(q, k, v), *backward(dout, q, k, v)
    exact = gradients(golden, (q, k, v), dout)
    theirs = gradients(plain, (q, k, v), dout)
    factors = (1.5, *(3 if dtype == torch.float32 else 2,) * 3)
    # Where terms cancel, wholly for N = 1, or numbers are few, the error of either is luck: a rounding of the terms.
    _, weights = golden_softmax(q, k, None, None, d**-0.5)
    sums = sums_of_terms(dout, q, k, v, weights, d**-0.5)
    eps = torch.finfo(dtype).eps
    for like, our, their, wanted, factor, terms in zip((q, q, k, v), ours, theirs, exact, factors, sums, strict=False):
        assert our.is_contiguous()
        assert our.shape == like.shape
        error, others = ((x.double() - wanted).norm().item() for x in (our, their))
        assert error <= factor * others + eps * terms.norm().item()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "d"), [(1, 1), (15, 7), (29, 40), (197, 33), (270, 5)])
def test_stays_inside_its_buffers(isa, dtype, N, d):
    q, k, v = packed(2, 2, N, 2, d, dtype)
    for v_dim in (d, max(1, d // 2), 2 * d + 1):
        alone = q, k, torch.cat((v, v, v), -1)[..., :v_dim]
        assert torch.equal(kernel(*map(amid_nan, alone)), kernel(*alone))


# Keys are packed 256 at a time: one piece, one and a part, whole ones.
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "d", "v_dim", "kv_heads"), [(49, 48, 20, 3), (300, 24, 65, 1), (512, 40, 16, 3)])
def test_v_of_another_head_dim(isa, dtype, N, d, v_dim, kv_heads):
    T = 1 + 2**17 // (N * 3 * v_dim)
    q, k, _ = packed(1, T, N, 3, d, dtype, kv_heads)
    v = torch.randn(1, T, N, kv_heads, v_dim).to(dtype)
    bias = torch.randn(3, N, N)
    for added in (None, bias):
        ours, theirs, exact = (f(q, k, v, bias=added) for f in (kernel, plain, golden))
        assert ours.shape == exact.shape == (1, T, N, 3, v_dim)
        assert_as_accurate(ours, theirs, exact, 1.5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "d"), [(1, 1), (15, 7), (29, 40), (197, 33)])
def test_backward_stays_inside_its_buffers(isa, dtype, N, d):
    q, k, v = packed(2, 2, N, 2, d, dtype, kv_heads=1)
    bias, mask = torch.randn(2, N, N), torch.randn(2, N, N)
    for added in ((None, None), (bias, mask)):
        out, lse = forward(q, k, v, *added, 0.3)
        banded = [x if x is None else guarded(x) for x in added]
        assert torch.equal(forward(q, k, v, *banded, 0.3)[0], out)
        alone, rest = (torch.randn_like(q), q, k, v, out), (0.3, added[0] is not None)
        ours = OPS.block_attention_cpp_bwd(*map(amid_nan, alone), guarded(lse), *banded, *rest)
        for got, wanted in zip(ours, OPS.block_attention_cpp_bwd(*alone, lse, *added, *rest), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["q", "k", "v"])
def test_keeps_special_values_where_pytorch_does(isa, dtype, value, where):
    inputs = [x.clone() for x in packed(1, 2, 20, 2, 8, dtype)]
    inputs[where][0, 1, 7, 1, 3] = value
    out, wanted = kernel(*inputs).double(), golden(*inputs)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    assert out.isfinite()[:, 0].all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("N", [20, 21])
def test_gradient_keeps_special_values_where_pytorchs_does(isa, dtype, value, where, N):
    """NaN and infinity reach what they reach in plain PyTorch, and no other head or block."""
    inputs = [x.clone() for x in (*packed(1, 2, N, 2, 8, dtype), torch.randn(1, 2, N, 2, 8).to(dtype))]
    inputs[where][0, 1, 7, 1, 3] = value
    *qkv, dout = inputs
    wanted = gradients(golden, qkv, dout)[1:]
    for got, want in zip(backward(dout, *qkv), wanted, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        assert got.isfinite()[:, 0].all()
        assert got.isfinite()[:, 1, :, 0].all()


def test_a_key_without_weight_has_no_gradient(isa):
    """An infinite key that every query is opposed to, behind which an odd number of queries leaves half a unit."""
    q, k, v = (x.abs().clone() for x in packed(1, 1, 21, 1, 8, torch.bfloat16))
    k[0, 0, 4] = -math.inf
    _, dk, dv = backward(torch.randn_like(q), q, k, v)
    assert (dk[0, 0, 4] == 0).all()
    assert (dv[0, 0, 4] == 0).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_extreme_scores(isa):
    """One key takes all the weight, or keys share it, however large the scores are."""
    q = torch.full((1, 1, 3, 1, 4), 1e4)
    k = q * torch.tensor([1.0, 1.0, -1.0]).view(3, 1, 1)
    v = torch.tensor([1.0, 3.0, 100.0]).view(1, 1, 3, 1, 1).expand(q.shape).contiguous()
    torch.testing.assert_close(kernel(q, k, v), torch.full_like(q, 2.0), rtol=0, atol=0)


def test_repeats_bit_by_bit(isa):
    """Run to run, for any number of threads, and with k and v of one head repeated."""
    q, k, v = packed(3, 2, 61, 5, 16, torch.bfloat16, kv_heads=1)
    dout = torch.randn_like(q)
    whole_k, whole_v = k.expand(q.shape), v.expand(q.shape).contiguous()
    many = [x.repeat(9, 1, 1, 1, 1) for x in (dout, q, whole_k, whole_v)]  # more blocks than sum a bias's gradient
    added = {"bias": torch.randn(5, 61, 61), "mask": torch.randn(2, 61, 61)}

    def compute():
        biased = kernel(*many[1:], **added), *backward(*many, **added), *backward(dout, q, k, v, **added)
        return kernel(q, k, v), *backward(dout, q, k, v), *backward(dout, q, whole_k, whole_v), *biased

    wanted = compute()
    for got in with_threads(compute):
        assert all(map(torch.equal, got, wanted))
    assert torch.equal(kernel(q, whole_k, whole_v), wanted[0])
    assert torch.equal(wanted[4], wanted[1])


def test_only_one_of_k_and_v_is_shared(isa):
    q, k, v = packed(2, 2, 30, 3, 16)
    dout = torch.randn_like(q)
    for a, b in ((k[..., :1, :], v), (k, v[..., :1, :])):
        wanted = gradients(golden, (q, a, b), dout)[1:]
        for got, want in zip(backward(dout, q, a, b), wanted, strict=True):
            assert got.shape == want.shape
            assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("shape", [(0, 4, 16, 2, 8), (2, 0, 16, 2, 8), (2, 4, 0, 2, 8), (2, 4, 16, 0, 8)])
def test_of_nothing(isa, shape):
    q = torch.empty(shape)
    out, lse = forward(q, q, q, None, None, 1.0)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[1], shape[3], shape[2])
    *grads, _ = OPS.block_attention_cpp_bwd(q, q, q, q, out, lse, None, None, 1.0, False)
    assert all(x.shape == shape for x in grads)
    bias = torch.ones(shape[3], shape[2], shape[2])
    out, lse = forward(q, q, q, bias, None, 1.0)
    *_, dbias = OPS.block_attention_cpp_bwd(q, q, q, q, out, lse, bias, None, 1.0, True)
    assert dbias.shape == bias.shape
    assert not dbias.any()


def test_long_sequences(isa):
    q, k, v = packed(1, 1, 2500, 1, 40)
    dout = torch.randn_like(q)
    ours, theirs, exact = (gradients(f, (q, k, v), dout) for f in (kernel, plain, golden))
    for each, factor in zip(zip(ours, theirs, exact, strict=True), (1.5, 3, 3, 3), strict=True):
        assert relative_error(each[0], each[2]) <= factor * relative_error(each[1], each[2])


GOOD = (1, 2, 5, 3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 3, 8)}, r"q: expected 5 dimensions \(B, T, N, heads, head_dim\), got 3"),
        ({"k": torch.zeros(GOOD).bfloat16()}, "k: expected dtype Float as q has, got BFloat16"),
        ({"v": torch.zeros(1, 2, 6, 3, 8)}, "v: expected size 5 of dimension 2 as q has, got 6"),
        ({"k": torch.zeros(1, 2, 5, 3, 9)}, "k: expected size 8 of dimension 4 as q has, got 9"),
        ({"k": torch.zeros(1, 2, 5, 2, 8)}, "k: expected 3 heads or 1, got 2"),
        ({"q": torch.zeros(1, 2, 5, 8, 3).mT}, "q: expected stride 1 of the last dimension, got 3"),
        ({x: torch.zeros(GOOD).double() for x in "qkv"}, "q: expected dtype Float, Half or BFloat16, got Double"),
        ({x: torch.zeros(GOOD)[..., :0] for x in "qkv"}, "q: expected a head_dim of at least 1, got 0"),
        ({"bias": torch.zeros(3, 5, 5).half()}, "bias: expected dtype Float, got Half"),
        ({"bias": torch.zeros(3, 5, 4)}, "bias: expected 3 dimensions, the last two 5, contiguous"),
        ({"bias": torch.zeros(2, 5, 5)}, "bias: expected 3 heads, got 2"),
        ({"mask": torch.zeros(2, 5, 5).mT}, "mask: expected 3 dimensions, the last two 5, contiguous"),
        ({"mask": torch.zeros(4, 5, 5)}, "mask: expected a divisor of 2 blocks, got 4 groups"),
        ({"rel_h": torch.zeros(1, 2, 5, 3, 5)}, "rel_w: expected as rel_h, None or not"),
        (
            {x: torch.zeros(1, 2, 5, 3, 2) for x in ("rel_h", "rel_w")},
            "rel_w: expected 5 keys in 2 rows, got 2 in each",
        ),
        ({x: torch.zeros(1, 2, 5, 1, 2) for x in ("rel_h", "rel_w")}, "rel_h: expected 3 heads as q has, got 1"),
        (
            {"rel_h": torch.zeros(GOOD)[..., :5], "rel_w": torch.zeros(GOOD)[..., :1], "bias": torch.zeros(3, 5, 5)},
            "rel_h: expected None beside a bias or mask",
        ),
        ({"windows": [5, 1, 3, 1, 0, 0, 0, 0]}, "q: expected one block, an image, beside windows, got 2"),
        (
            {x: torch.zeros(1, 1, 9, 3, 8) for x in "qkv"} | {"windows": [5, 2, 3, 1, 0, 0, 0, 0]},
            "windows: expected an image of 9 tokens as q has, got 10",
        ),
        (
            {x: torch.zeros(1, 1, 10, 3, 8) for x in "qkv"}
            | {"windows": [5, 2, 3, 1, 0, 0, 0, 0], "pad_k": torch.zeros(2, 3, 8)},
            r"pad_k: expected \(1, 3, 8\), contiguous",
        ),
    ],
)
def test_refuses_bad_arguments(change, message):
    names = *"qkv", "rel_h", "rel_w", "bias", "mask", "pad_k", "pad_v"
    arguments = dict.fromkeys(names) | {x: torch.zeros(GOOD) for x in "qkv"} | {"scale": 1.0, "windows": []} | change
    with pytest.raises(RuntimeError, match=message):
        OPS.block_attention_cpp_fwd(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.zeros(GOOD).bfloat16()}, "dout: expected dtype Float as q has, got BFloat16"),
        ({"dout": torch.zeros(1, 2, 5, 8, 3).mT}, "dout: expected stride 1 of the last dimension, got 3"),
        ({"dout": torch.zeros(1, 2, 5, 1, 8)}, "dout: expected 3 heads as q has, got 1"),
        ({"out": torch.zeros(1, 2, 6, 3, 8)}, "out: expected size 5 of dimension 2 as q has, got 6"),
        ({"lse": torch.zeros(1, 2, 3, 5).double()}, "lse: expected dtype Float, got Double"),
        ({"lse": torch.zeros(1, 2, 3, 4)}, r"lse: expected 30 contiguous elements \(B, T, heads, N\), got 24"),
        ({"lse": torch.zeros(1, 2, 5, 3).mT}, "lse: expected 30 contiguous elements .*, got 30 with gaps"),
    ],
)
def test_refuses_bad_arguments_of_the_backward(change, message):
    arguments = {x: torch.zeros(GOOD) for x in ("dout", "q", "k", "v", "out")} | {"lse": torch.zeros(1, 2, 3, 5)}
    with pytest.raises(RuntimeError, match=message):
        OPS.block_attention_cpp_bwd(*(arguments | change).values(), None, None, 1.0, False)
