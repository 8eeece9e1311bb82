"""The Triton launchers against float64: on a CPU in the interpreter (conftest switches it on), on a GPU compiled."""

import functools
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.attention import golden_softmax, sums_of_terms
from helpers.common import DEVICE, DTYPES, assert_stays_inside_its_buffers, in_double, run_python
from nest_fast import block_attention, reference
from nest_fast.kernels import _configs
from nest_fast.kernels.block_attention import MAX_HEAD_DIM, MAX_SEQ, block_attention_bwd, block_attention_fwd
from nest_fast.testing import assert_as_accurate, gradients, max_error

NAMES = ("out", "dq", "dk", "dv", "dbias")
sdpa = functools.partial(block_attention, impl="sdpa")  # 4-D scaled_dot_product_attention, the measure of accuracy


def draw(B, T, N, heads, head_dim, dtype, *, kv_heads=None, bias=False, mask=None):
    """dout, q, k, v (views of one packed tensor), bias and mask."""
    kv_heads = heads if kv_heads is None else kv_heads
    qkv = torch.randn(B, T, N, heads + 2 * kv_heads, head_dim, dtype=dtype, device=DEVICE)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 3)
    dout = torch.randn(B, T, N, heads, head_dim, dtype=dtype, device=DEVICE)
    bias = torch.randn(heads, N, N, dtype=dtype, device=DEVICE) if bias else None
    if mask == "bool":
        # Every token sees itself: a row without a key is NaN in both, which has a test of its own.
        mask = (torch.rand(T, N, N, device=DEVICE) < 0.7) | torch.eye(N, dtype=torch.bool, device=DEVICE)
    elif mask == "additive":
        mask = torch.randn(T, N, N, dtype=dtype, device=DEVICE)
    return dout, q, k, v, bias, mask


def differentiate(function, dout, q, k, v, bias, mask, scale):
    """(out, dq, dk, dv[, dbias]) by autograd."""
    leaves = (q, k, v) if bias is None else (q, k, v, bias)
    return gradients(lambda q, k, v, b=None: function(q, k, v, scale=scale, bias=b, mask=mask), leaves, dout)


def launch(dout, q, k, v, bias, mask, scale):
    """The same from the launchers, and lse, of whose parts a row's maximum is in the kernel's unit where it folds."""
    out, lse = block_attention_fwd(q, k, v, bias, mask, scale)
    dq, dk, dv, dbias, *_ = block_attention_bwd(dout, q, k, v, out, lse, bias, mask, scale, bias is not None)
    if bias is not None or mask is not None:
        row_max, log_sum = lse.double().unbind(-1)
        lse = row_max * (scale if scale > 1e-6 else 1.0) + log_sum
    assert (dbias is None) == (bias is None)
    results = [out, dq, dk, dv] + ([] if bias is None else [dbias])
    assert all(x.dtype == q.dtype and x.is_contiguous() for x in results)
    return results, lse


def check_results(*inputs):
    """Errors at most some times plain PyTorch's; returns lse."""
    ours, lse = launch(*inputs)
    plain = differentiate(sdpa, *inputs)
    *tensors, scale = inputs
    golden = differentiate(reference.block_attention, *in_double(tensors), scale)
    for name, x, y, g in zip(NAMES[: len(golden)], ours, plain, golden, strict=True):
        assert_as_accurate(x, y, g, 1.5 if name == "out" else 3 if x.dtype == torch.float32 else 2, name)
    return lse


def check(dout, q, k, v, bias, mask, scale):
    """The same, and the error of lse within float32's rounding."""
    lse = check_results(dout, q, k, v, bias, mask, scale)
    torch.testing.assert_close(lse.double(), golden_softmax(q, k, bias, mask, scale)[0], rtol=1e-5, atol=1e-5)


def check_rounding(dout, q, k, v, bias, mask, scale):
    """Results within a rounding bound: for tensors so small that plain PyTorch's error is a matter of luck.

    Every sum may be off by some eps of the sum of its terms' absolute values; a weight's eps are as many as its score.
    """
    inputs = (dout, q, k, v, bias, mask)
    ours, lse = launch(*inputs, scale)
    golden = differentiate(reference.block_attention, *in_double(inputs), scale)
    wide_lse, weights = golden_softmax(q, k, bias, mask, scale)
    torch.testing.assert_close(lse.double(), wide_lse, rtol=1e-5, atol=1e-5)
    eps = 4 * torch.finfo(dout.dtype).eps
    if dout.dtype == torch.float32:
        products = torch.einsum("btnhd,btmhd->bthnm", q.abs(), k.abs().expand_as(q))
        eps *= 1 + abs(scale) * products.max().item() + (0 if bias is None else bias.abs().max().item())
    sums = sums_of_terms(dout, q, k, v, weights, scale)
    for name, x, g, terms in zip(NAMES, ours, golden, sums, strict=False):
        bound = eps * terms.max().item()
        assert max_error(x, g) <= bound, f"{name}: error {max_error(x, g):.3e}, allowed {bound:.3e}"


# (B, T, N, heads, head_dim) around every edge: N below, at and past a tile, head_dim that is no power of two; each in
# one of the half precisions, which share their rows of the tables; in float32, which streams, each row and edge once.
CASES = [
    ((1, 1, 196, 2, 32), ("bf16",)),
    ((1, 1, 196, 1, 64), ("fp16",)),
    ((2, 2, 16, 3, 32), ("bf16", "fp32")),
    ((2, 2, 15, 2, 16), ("fp16", "fp32")),
    ((1, 3, 17, 2, 24), ("bf16", "fp32")),
    ((1, 2, 49, 3, 32), ("fp16", "fp32")),
    ((2, 1, 64, 2, 48), ("bf16",)),
    ((1, 1, 100, 1, 80), ("fp16", "fp32")),
    ((1, 1, 256, 1, 32), ("fp16",)),
    ((1, 1, 225, 1, 128), ("bf16",)),
]


def shape_id(shape):
    return "B{}-T{}-N{}-h{}-d{}".format(*shape)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [pytest.param(shape, DTYPES[d], id=f"{shape_id(shape)}-{d}") for shape, dtypes in CASES for d in dtypes],
)
def test_block_attention_is_as_accurate_as_sdpa(shape, dtype):
    check(*draw(*shape, dtype), shape[-1] ** -0.5)


@pytest.mark.parametrize(
    ("block_m", "block_n", "streams", "shape"),
    [
        (64, 128, False, (1, 2, 49, 3, 32)),
        (64, 32, False, (1, 2, 49, 3, 32)),
        (64, 64, True, (1, 2, 49, 3, 32)),
        (32, 128, True, (1, 2, 49, 3, 32)),
        (64, 32, False, (1, 1, 196, 1, 32)),  # several pieces
        (64, 64, True, (1, 1, 196, 1, 32)),  # several tiles
    ],
)
def test_block_attention_is_as_accurate_in_every_configuration(shape, block_m, block_n, streams, monkeypatch):
    """Whatever the tables hold, now or after tuning, float32 goes through each kernel here."""

    def attention(kernel, *_):
        resident = {"fwd": "keys", "bwd": "queries"}.get(kernel)
        return (_configs.AttentionConfig(block_m, block_n, 4, None if streams else resident),)

    monkeypatch.setattr(_configs, "attention", attention)
    check(*draw(*shape, torch.float32, bias=shape[2] == 49, mask="bool" if shape[2] == 49 else None), 0.2)


@pytest.mark.parametrize(
    ("bias", "mask", "dtype"),
    [
        (True, None, "fp32"),
        (True, None, "bf16"),
        (False, "bool", "fp32"),
        (False, "bool", "fp16"),
        (False, "additive", "bf16"),
        (True, "bool", "bf16"),
        (True, "additive", "fp16"),
        (True, "additive", "fp32"),
    ],
)
def test_block_attention_adds_bias_and_mask(bias, mask, dtype):
    check(*draw(1, 2, 49, 2, 32, DTYPES[dtype], bias=bias, mask=mask), 0.2)


@pytest.mark.parametrize(
    ("shape", "dtype"),  # heads stacked in one tile, in several, streamed
    [
        ((2, 3, 16, 3, 64), "fp32"),
        ((2, 3, 16, 3, 64), "bf16"),
        ((1, 2, 16, 12, 64), "fp16"),
        ((1, 2, 16, 12, 64), "fp32"),
        ((1, 1, 100, 3, 32), "bf16"),
        ((1, 1, 100, 3, 32), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else shape_id(value),
)
def test_block_attention_shares_one_key_head(shape, dtype):
    check(*draw(*shape, DTYPES[dtype], kv_heads=1), shape[-1] ** -0.5)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-9, 4.0])
def test_block_attention_takes_any_scale(scale):
    check_rounding(*draw(1, 2, 20, 2, 16, torch.float32, bias=True), scale)


def layouts(x):
    """x in other memory, last dimension dense or not."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), float("nan"))
    wide[..., 4:-4] = x
    orders = [(0, 1, 3, 2, 4), (1, 0, 2, 3, 4), (3, 2, 1, 0, 4), (4, 0, 1, 2, 3)]
    return [wide[..., 4:-4], *(x.permute(o).contiguous().permute([o.index(i) for i in range(5)]) for o in orders)]


def test_block_attention_of_any_strides():
    inputs = [x.contiguous() for x in draw(2, 2, 9, 2, 16, torch.float32)[:4]]
    wanted, lse = launch(*inputs, None, None, 0.25)
    moved = [layouts(x) for x in inputs]
    for turn in range(5):  # every input in every layout, all four in different ones
        got, got_lse = launch(*(moved[i][(i + turn) % 5] for i in range(4)), None, None, 0.25)
        for name, x, y in zip((*NAMES[:4], "lse"), [*got, got_lse], [*wanted, lse], strict=True):
            assert torch.equal(x, y), f"{name} in turn {turn}"


def test_block_attention_reads_expanded_gradients():
    _, q, k, v, _, _ = draw(2, 2, 20, 2, 16, torch.float32)
    dout = torch.ones((), device=DEVICE).expand(q.shape)
    check_rounding(dout, q, k, v, None, None, 0.25)


def test_block_attention_bwd_writes_into_given_gradients():
    dout, q, k, v, _, _ = draw(2, 2, 20, 3, 16, torch.float32, kv_heads=1)
    packed = q.new_full((2, 2, 20, 5, 16), float("nan"))
    grads = packed.split([3, 1, 1], 3)
    out, lse = block_attention_fwd(q, k, v, None, None, 0.25)
    got = block_attention_bwd(dout, q, k, v, out, lse, None, None, 0.25, False, grads=grads)
    wanted = block_attention_bwd(dout, q, k, v, out, lse, None, None, 0.25, False)
    assert torch.equal(packed, torch.cat(wanted[:3], 3))
    assert all(x is y for x, y in zip(got, grads, strict=False))


def test_block_attention_takes_masks_by_group():
    dout, q, k, v, _, mask = draw(1, 4, 17, 2, 16, torch.float32, mask="additive")
    check_rounding(dout, q, k, v, None, mask[:2], 0.25)
    grouped, _ = launch(dout, q, k, v, None, mask[:2], 0.25)
    repeated, _ = launch(dout, q, k, v, None, mask[:2].repeat(2, 1, 1), 0.25)
    assert all(map(torch.equal, grouped, repeated))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize(("N", "dtype"), [(1, torch.float32), (17, torch.float32), (52, torch.float16)])
def test_block_attention_stays_inside_its_buffers(N, dtype, kv_heads):
    inputs = draw(1, 2, N, 3, 24, dtype, kv_heads=kv_heads, bias=True, mask="additive")

    def everything(copy):
        results, lse = launch(*map(copy, inputs), 0.25)
        return [*results, lse]

    assert_stays_inside_its_buffers(everything)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum of a row of NaN
def test_block_attention_keeps_special_values_in_their_sequence():
    dout, q, k, v, _, _ = draw(2, 2, 16, 2, 16, torch.float32)
    wanted, _ = launch(dout, q, k, v, None, None, 0.25)
    q, k, v = q.clone(), k.clone(), v.clone()
    q[0, 0, 3, 0, 0] = k[0, 1, 3, 1, 0] = v[1, 1, 3, 0, 0] = float("nan")
    got, _ = launch(dout, q, k, v, None, None, 0.25)
    golden = differentiate(reference.block_attention, dout, q, k, v, None, None, 0.25)
    for x, y, g in zip(got, wanted, golden, strict=True):
        sick = g.isnan().any(-1).any(2)  # (B, T, heads)
        assert sick.any()
        assert x.isnan().any(-1).any(2).equal(sick)
        assert x.transpose(2, 3)[~sick].equal(y.transpose(2, 3)[~sick])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["stream", "resident"])
@pytest.mark.parametrize(
    ("by", "kv_heads", "scale"), [("bool", 1, 0.25), ("-inf", 2, 0.25), ("bias", 2, -0.25), ("both", 1, 0.25)]
)
def test_block_attention_of_a_row_without_a_key_is_zero_in_both_directions(by, kv_heads, scale, dtype):
    """Whatever takes the keys away; all other rows and their gradients are what they are without that query's dout."""
    dout, q, k, v, bias, mask = draw(1, 1, 17, 2, 16, dtype, kv_heads=kv_heads, bias=True, mask="additive")
    rows = [0, 5, 16]
    if by == "bool":
        mask = torch.ones_like(mask, dtype=torch.bool)
        mask[:, rows] = False
    elif by == "-inf":
        mask[:, rows] = -torch.inf
    else:  # the bias takes all keys, or those that the mask leaves
        bias[:, rows] = -torch.inf
        if by == "both":
            bias[:, rows, 3] = 0.0
            mask[:, rows, 3] = -torch.inf
    (out, dq, dk, dv, dbias), lse = launch(dout, q, k, v, bias, mask, scale)
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dbias))
    assert out[:, :, rows].eq(0).all()
    assert dq[:, :, rows].eq(0).all()
    assert dbias[:, rows].eq(0).all()
    assert lse[..., rows].isposinf().all()

    def without(x):  # those rows see every key, but their output is not asked for
        x = x.clone()
        x[:, rows] = True if x.dtype == torch.bool else 0
        return x

    quiet = dout.clone()
    quiet[:, :, rows] = 0
    others = [n for n in range(17) if n not in rows]
    (want_out, want_dq, want_dk, want_dv, want_dbias), _ = launch(quiet, q, k, v, without(bias), without(mask), scale)
    assert torch.equal(out[:, :, others], want_out[:, :, others])
    assert all(map(torch.equal, (dq, dk, dv, dbias), (want_dq, want_dk, want_dv, want_dbias)))


@pytest.mark.parametrize("scale", [0.25, -0.25, 2e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["stream", "resident"])
def test_block_attention_of_a_row_of_huge_numbers(dtype, scale):
    """Neither the scale nor the exponent makes infinities of them, and beside them no sum of weights is lost."""
    dout, q, k, v, bias, mask = draw(1, 1, 17, 2, 16, dtype, bias=True, mask="additive")
    mask[:, 0] = torch.finfo(dtype).min
    bias[:, 5] = -1e30
    bias[:, 16, 3:], mask[:, 16, :3] = 1e30, -1e20
    check_results(dout, q, k, v, bias, mask, scale)


@pytest.mark.parametrize("shape", [(0, 4, 16, 2, 32), (2, 0, 16, 2, 32)], ids=shape_id)
def test_block_attention_of_nothing(shape):
    (out, dq, dk, dv, dbias), lse = launch(*draw(*shape, torch.float32, bias=True), 0.25)
    assert out.shape == dq.shape == dk.shape == dv.shape == shape
    assert lse.shape == (*shape[:2], 2, 16)
    assert dbias.shape == (2, 16, 16)
    assert dbias.eq(0).all()


def test_block_attention_repeats_bit_by_bit():
    inputs = draw(2, 2, 49, 3, 32, torch.float16, kv_heads=1, bias=True)
    first, lse = launch(*inputs, 0.2)
    again, lse_again = launch(*inputs, 0.2)
    assert all(map(torch.equal, [*first, lse], [*again, lse_again]))


@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.integers(1, 40)),
    dtype=st.sampled_from(list(DTYPES.values())),
    multi_query=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from([None, "bool", "additive"]),
)
def test_block_attention_of_any_shape(shape, dtype, multi_query, bias, mask):
    check_rounding(*draw(*shape, dtype, kv_heads=1 if multi_query else None, bias=bias, mask=mask), 0.3)


def test_block_attention_offsets_are_64_bit():
    """Strides whose products pass 2^31: virtual memory only, and in a process of its own, which 32 bits would kill."""
    program = f"""
        import os
        os.environ.setdefault("TRITON_INTERPRET", "{int(DEVICE == "cpu")}")
        import torch
        from nest_fast.kernels.block_attention import block_attention_bwd, block_attention_fwd

        def far(x, strides):
            return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)

        x = torch.randn(1, 1, 3, 2, 16, dtype=torch.float16, device="{DEVICE}")
        wanted = block_attention_fwd(x, x, x, None, None, 0.25)
        by_token, by_head = far(x, (0, 0, 2**30, 16, 1)), far(x, (0, 0, 16, 2**31 + 2**10, 1))
        got = block_attention_fwd(by_token, by_head, x, None, None, 0.25)
        assert all(map(torch.equal, got, wanted))
        wanted = block_attention_bwd(x, x, x, x, *wanted, None, None, 0.25, False)[:3]
        got = block_attention_bwd(by_head, x, by_token, x, *got, None, None, 0.25, False)[:3]
        assert all(map(torch.equal, got, wanted))
        cut = dict(windows=(1, 3, 1, 2, 0, 1, 0, 0), pad_k=x[0, :, 0], pad_v=x[0, :, 1])
        wanted = block_attention_fwd(x, x, x, None, None, 0.25, **cut)
        got = block_attention_fwd(by_token, by_head, by_token, None, None, 0.25, **cut)
        assert all(map(torch.equal, got, wanted))
        print("equal")
    """
    assert run_python("-c", textwrap.dedent(program)) == "equal\n"


def test_limits_are_what_the_kernels_take():
    check(*draw(1, 1, MAX_SEQ, 1, MAX_HEAD_DIM, torch.float16), MAX_HEAD_DIM**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [65_535, 65_536, 70_000])
def test_block_attention_of_many_blocks(blocks):
    dout, q, k, v, _, _ = draw(1, blocks, 16, 3, 64, torch.bfloat16, kv_heads=1)
    check_results(dout, q, k, v, None, None, 0.125)


@pytest.mark.gpu
def test_block_attention_repeats_bit_by_bit_beside_a_busy_stream():
    inputs = draw(64, 16, 196, 4, 32, torch.bfloat16)
    first, lse = launch(*inputs, 0.2)
    busy, x = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(250):
        with torch.cuda.stream(busy):
            x = x @ x / 64
        again, lse_again = launch(*inputs, 0.2)
        assert all(map(torch.equal, [*first, lse], [*again, lse_again]))


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [100.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_block_attention_of_large_and_small_inputs(dtype, factor):
    dout, q, k, v, _, _ = draw(4, 4, 196, 4, 32, dtype)
    check(*(x * factor for x in (dout, q, k, v)), None, None, 32**-0.5 / factor)
