"""block_attention as an operation: what each ``impl`` computes, how one is chosen, torch features, bad input."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.common import CPP_ISA, DEVICE, in_double, saved_bytes
from nest_fast import bias_gelu, block_aggregate, block_attention, reference, windows
from nest_fast.ops import _backends, _extension
from nest_fast.testing import assert_as_accurate, gradients, relative_error

IMPLS = ["sdpa"]
if CPP_ISA and DEVICE == "cpu":
    IMPLS.append("cpp")
if DEVICE == "cuda" or _extension.triton_interpreted:
    IMPLS.append("triton")


def inputs(B=2, T=4, N=16, heads=2, d=16, kv_heads=None, dtype=torch.float32):
    """Views of one packed projection, as a model has them."""
    kv_heads = heads if kv_heads is None else kv_heads
    packed = torch.randn(B, T, N, heads + 2 * kv_heads, d, dtype=dtype, device=DEVICE)
    return packed.split((heads, kv_heads, kv_heads), dim=3)


# Interpreted Triton, whose kernels have a file of their own: each once.
@pytest.mark.parametrize(
    ("impl", "kv_heads", "dtype"),
    [
        (impl, kv_heads, dtype)
        for impl in IMPLS
        for kv_heads, dtype in itertools.product((3, 1), (torch.float32, torch.bfloat16))
        if impl != "triton" or (kv_heads == 1) == (dtype == torch.bfloat16)
    ],
)
def test_is_as_accurate_as_pytorch(impl, kv_heads, dtype):
    q, k, v = inputs(N=20, heads=3, d=24, kv_heads=kv_heads, dtype=dtype)
    dout = torch.randn_like(q)
    golden = gradients(reference.block_attention, in_double((q, k, v)), dout)
    plain = gradients(lambda *a: block_attention(*a, impl="sdpa"), (q, k, v), dout)
    ours = gradients(lambda *a: block_attention(*a, impl=impl), (q, k, v), dout)
    factors = (1.5, *(3 if dtype == torch.float32 else 2,) * 3)
    for what, got, other, want, factor in zip(("out", "dq", "dk", "dv"), ours, plain, golden, factors, strict=True):
        assert_as_accurate(got, other, want, factor, f"{impl} {what}")
    assert ours[0].is_contiguous()


@settings(max_examples=60)
@given(
    impl=st.sampled_from([i for i in IMPLS if i != "triton"]),
    B=st.integers(0, 3),
    T=st.integers(1, 4),
    N=st.integers(1, 40),
    heads=st.integers(1, 4),
    d=st.sampled_from([1, 3, 8, 16, 33]),
    multi_query=st.booleans(),
    layout=st.sampled_from(["packed", "contiguous", "transposed", "expanded", "sliced"]),
    seed=st.integers(0, 2**16),
)
def test_of_any_shape_and_strides(impl, B, T, N, heads, d, multi_query, layout, seed):
    torch.manual_seed(seed)
    q, k, v = inputs(B, T, N, heads, d, 1 if multi_query else heads)
    make = {
        "packed": lambda x: x,
        "contiguous": torch.Tensor.contiguous,
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "expanded": lambda x: x[:, :1].expand(-1, T, -1, -1, -1),
        "sliced": lambda x: torch.cat((x, x), -1)[..., 1 : d + 1],
    }[layout]
    q, k, v = (make(x) for x in (q, k, v))
    out = block_attention(q, k, v, impl=impl)
    assert out.shape == q.shape
    assert out.is_contiguous()
    if B:
        assert relative_error(out, reference.block_attention(*in_double((q, k, v)))) < 1e-5


@pytest.mark.parametrize("impl", ["auto", "reference", *IMPLS])
@pytest.mark.parametrize("v_dim", [8, 40])
def test_v_of_another_head_dim(impl, v_dim):
    """In blocks, and in the windows of an image that reach beyond it."""
    cut, kv_heads = windows((6, 7), 4, shift=2), 1
    blocks, image = (2, 4, 16), (2, 42)
    for outer, more in ((blocks, {}), (image, {"windows": cut})):
        q, k = torch.randn(*outer, 2, 16, device=DEVICE), torch.randn(*outer, kv_heads, 16, device=DEVICE)
        given = q, k, torch.randn(*outer, kv_heads, v_dim, device=DEVICE)
        if more:
            given += torch.randn(cut.pads, kv_heads, 16, device=DEVICE), torch.randn(1, kv_heads, v_dim, device=DEVICE)
            given = (*given[:4], given[4].expand(cut.pads, -1, -1))

        def attend(q, k, v, *pads, impl=impl, more=more):
            pad_k, pad_v = pads or (None, None)
            return block_attention(q, k, v, pad_k=pad_k, pad_v=pad_v, **more, impl=impl)

        if impl == "triton":
            with pytest.raises(RuntimeError, match=r"v has another head_dim than k"):
                attend(*given)
            continue
        dout = torch.randn(*outer, 2, v_dim, device=DEVICE)
        golden = gradients(lambda *a: attend(*a, impl="reference"), in_double(given), dout)
        for got, want in zip(gradients(attend, given, dout), golden, strict=True):
            assert got.shape == want.shape
            assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [None, "float", "bool"])
def test_bias_and_mask(impl, masked):
    q, k, v = inputs()
    bias = torch.randn(2, 16, 16, device=DEVICE)
    mask = {None: None, "float": torch.randn(2, 16, 16), "bool": torch.rand(2, 16, 16) > 0.5}[masked]
    if masked == "bool":
        mask |= torch.eye(16, dtype=torch.bool)
    mask = mask if mask is None else mask.to(DEVICE)
    dout = torch.randn_like(q)
    *wide, wide_mask = in_double((q, k, v, bias, mask))
    golden = gradients(lambda q, k, v, b: reference.block_attention(q, k, v, bias=b, mask=wide_mask), wide, dout)
    ours = gradients(lambda q, k, v, b: block_attention(q, k, v, bias=b, mask=mask, impl=impl), (q, k, v, bias), dout)
    for got, want in zip(ours, golden, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_takes_any_scale_and_refuses_gradients_of_gradients(impl):
    q, k, v = (x.detach().requires_grad_() for x in inputs())
    out = block_attention(q, k, v, scale=0.5, impl=impl)
    assert relative_error(out, reference.block_attention(*in_double((q, k, v)), scale=0.5)) < 1e-5
    if impl != "sdpa":
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(
            RuntimeError, match="impl: expected 'reference' for a derivative of block_attention's gradients"
        ):
            dq.sum().backward()


@pytest.mark.skipif("cpp" not in IMPLS, reason="the C++ kernel is for CPU tensors")
def test_any_gradient_and_batches_of_them():
    """Expanded and transposed output gradients, and several at once."""
    leaf = torch.randn(2, 4, 16, 2, 16, requires_grad=True)
    out = block_attention(leaf, leaf, leaf, impl="cpp")
    golden = reference.block_attention(*(leaf.double(),) * 3)
    douts = torch.randn(3, *out.mT.shape).mT
    for dout in (torch.ones(()).expand(out.shape), douts[0]):
        (got,), (wanted,) = (torch.autograd.grad(x, leaf, dout, retain_graph=True) for x in (out, golden))
        assert relative_error(got, wanted) < 1e-5
    (batched,) = torch.autograd.grad(out, leaf, douts, is_grads_batched=True, retain_graph=True)
    for got, dout in zip(batched, douts, strict=True):
        assert torch.equal(got, torch.autograd.grad(out, leaf, dout, retain_graph=True)[0])


def test_dropout_drops_and_keeps_the_mean():
    q, k, v = inputs(B=64, T=16)
    out = block_attention(q, k, torch.ones_like(v), dropout_p=0.5)
    assert out.std() > 0.1
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("impl", IMPLS)
def test_keeps_special_values_where_pytorch_does(impl):
    """NaN in one block stays in that block."""
    q, k, v = (x.clone() for x in inputs())
    q[0, 1, 3, 0, 0] = math.nan
    out = block_attention(q, k, v, impl=impl)
    wanted = reference.block_attention(q, k, v)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert out.isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "sdpa"])
def test_opcheck(impl):
    op = getattr(torch.ops.nest_fast, f"block_attention_{impl}_fwd").default
    for kv_heads in (2, 1):
        q, k, v = (x.detach().requires_grad_() for x in inputs(T=2, kv_heads=kv_heads))
        if impl == "triton":
            torch.library.opcheck(op, (q, k, v, None, None, 0.25, None, None, None, []))
        else:
            nothing = None, None, None, None, None, None, 0.25, []
            torch.library.opcheck(op, (q, k, v, *nothing))
            torch.library.opcheck(op, (q, k, v[..., :8], *nothing))
            bias, mask = torch.randn(2, 16, 16).requires_grad_(), torch.randn(2, 16, 16)
            torch.library.opcheck(op, (q, k, v, None, None, bias, mask, None, None, 0.25, []))
            q, k, v, bias = (x.detach() for x in (q, k, v, bias))
            image, positions = [x[:, :1] for x in (q, k, v)], torch.randn(2, 2, 1, 16, 2, 4).unbind()
            pads = torch.randn(2, 1, kv_heads, 16).unbind()
            torch.library.opcheck(op, (*image, *positions, None, None, *pads, 0.25, [2, 8, 4, 4, 0, 0, 0, 0]))
            backward = torch.ops.nest_fast.block_attention_cpp_bwd.default
            for added in ((None, None), (bias, None), (bias, mask)):
                out, lse = op(q, k, v, None, None, *added, None, None, 0.25, [])
                call = torch.randn_like(out), q, k, v, out, lse, *added, 0.25
                torch.library.opcheck(backward, (*call, False))
                if added[0] is not None:
                    torch.library.opcheck(backward, (*call, True))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_one_graph(impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: block_attention(*a, impl=impl), fullgraph=True, backend=counter)
    for B in (2, 3, 4, 5, 7):
        arguments = inputs(B=B, T=2)
        assert relative_error(compiled(*arguments), block_attention(*arguments, impl="reference")) < 1e-5
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_exports_with_a_dynamic_batch(impl):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return block_attention(q, k, v, impl=impl)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Attention(), inputs(), dynamic_shapes=({0: batch},) * 3).module()
    arguments = inputs(B=5)
    assert relative_error(exported(*arguments), block_attention(*arguments, impl="reference")) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_saves_little_for_the_gradient(impl):
    q, k, v = (x.requires_grad_() * 1 for x in (t.clone() for t in inputs(N=64)))  # saved as activations are
    ours, plain = (saved_bytes(lambda i=i: block_attention(q, k, v, impl=i)) for i in (impl, "reference"))
    assert 0 < ours <= plain


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_over_the_batch(impl):
    q, k, v = (torch.stack([x, x + 1]) for x in inputs())
    out = torch.vmap(lambda a, b: block_attention(a, b, v[0], impl=impl))(q, k)
    for i in range(2):
        torch.testing.assert_close(out[i], block_attention(q[i], k[i], v[0], impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_over_biases(impl):
    q, k, v = inputs()
    bias = torch.randn(3, 2, 16, 16, device=DEVICE)
    out = torch.vmap(lambda b: block_attention(q, k, v, bias=b, impl=impl))(bias)
    for i in range(3):
        torch.testing.assert_close(out[i], block_attention(q, k, v, bias=bias[i], impl=impl))


def test_vmap_of_a_shared_biases_gradient():
    """A sum for each, not one for all."""
    if "cpp" not in IMPLS:
        return
    q, k, v = inputs()
    bias = torch.randn(2, 16, 16, device=DEVICE)
    out, lse = torch.ops.nest_fast.block_attention_cpp_fwd(q, k, v, None, None, bias, None, None, None, 0.3, [])
    douts = torch.stack([torch.randn_like(out), torch.randn_like(out)])

    def backward(dout):
        return torch.ops.nest_fast.block_attention_cpp_bwd(dout, q, k, v, out, lse, bias, None, 0.3, True)

    for got, *alone in zip(torch.vmap(backward)(douts), *map(backward, douts), strict=True):
        assert torch.equal(got, torch.stack(alone))


@pytest.mark.parametrize("impl", IMPLS)
def test_has_pytorchs_dtypes_under_autocast(impl):
    q, k, v = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block_attention(q, k.bfloat16(), v, impl=impl)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, reference.block_attention(*in_double((q, k, v)))) < 0.02


def test_auto_says_once_why_it_does_without_triton(monkeypatch):
    """With fake tensors of a GPU: what Triton cannot take goes elsewhere, with one warning at the caller's line."""
    monkeypatch.setattr(_backends, "_SAID", set())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        q, x = torch.empty(1, 1, 400, 1, 32, device="cuda"), torch.empty(1, 4, 4, 1032, device="cuda")
        conv_weight, vector = torch.empty(1032, 1032, 3, 3, device="cuda"), torch.empty(1032, device="cuda")
        for _ in range(3):
            block_attention(q, q, q)
            block_aggregate(x, conv_weight, None, vector, vector)
            bias_gelu(x.double(), None)
    assert [str(warning.message) for warning in caught] == [
        "block_attention runs scaled_dot_product_attention, since for triton N = 400 tokens are over 256",
        "block_aggregate runs plain PyTorch, since for two_step C' = 1032 channels are over 1024",
        "bias_gelu runs plain PyTorch, since for triton dtype torch.float64 is none of float32, float16, bfloat16",
    ]
    assert {warning.filename for warning in caught} == {__file__}


GOOD = (2, 4, 16, 2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(2, 4, 16, 32)},
            r"q: expected 5 dimensions \(B, T, N, heads, head_dim\), got shape \(2, 4, 16, 32\)",
        ),
        ({"q": [1.0]}, r"q: expected a tensor \(B, T, N, heads, head_dim\), got list"),
        ({"q": torch.zeros(GOOD, dtype=torch.int64)}, r"q: expected a floating-point dtype, got torch.int64"),
        (
            {"k": torch.zeros(2, 4, 16, 3, 16)},
            r"k: expected shape \(2, 4, 16, 2 or 1, 16\) as q has, got \(2, 4, 16, 3, 16\)",
        ),
        (
            {"v": torch.zeros(2, 4, 16, 1, 16)},
            r"v: expected shape \(2, 4, 16, 2, 16\) as k has, but for the last, got \(2, 4, 16, 1, 16\)",
        ),
        ({"k": torch.zeros(GOOD, dtype=torch.float64)}, r"k: expected dtype torch.float32 as q has, got torch.float64"),
        ({"v": torch.zeros(GOOD, device="meta")}, r"v: expected device cpu as q has, got meta"),
        ({"bias": torch.zeros(2, 16, 15)}, r"bias: expected shape \(2, 16, 16\) \(heads, N, N\), got \(2, 16, 15\)"),
        ({"mask": torch.zeros(3, 16, 16)}, r"mask: expected a number of groups that divides T = 4, got 3"),
        ({"mask": torch.zeros(2, 16, 16, dtype=torch.int8)}, r"mask: expected a floating-point dtype, got torch.int8"),
        ({"dropout_p": 1.5}, r"dropout_p: expected a probability between 0 and 1, got 1.5"),
        ({"impl": "flash"}, r"impl: expected one of 'auto', 'reference', 'sdpa', 'cpp', 'triton', got 'flash'"),
    ],
)
def test_refuses_bad_arguments(change, message):
    arguments = {"q": torch.zeros(GOOD), "k": torch.zeros(GOOD), "v": torch.zeros(GOOD), **change}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        block_attention(**arguments)
    assert "\n" not in str(error.value)


def test_an_explicit_choice_never_falls_back():
    q, k, v = in_double(inputs())
    for impl in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"impl: '{impl}' cannot run block_attention here: .*float64"):
            block_attention(q, k, v, impl=impl)
    with pytest.raises(RuntimeError, match=r"impl: 'cpp' cannot .*: it has no dropout"):
        block_attention(*inputs(), dropout_p=0.1, impl="cpp")
    with pytest.raises(RuntimeError, match=r"impl: 'triton' cannot .*N = 300 tokens are over 256"):
        block_attention(*inputs(N=300), impl="triton")
