"""Decomposed relative positions in block_attention, as SAM has them: what they mean, their kernel, their gradients."""

import math

import pytest
import torch

import nest_fast
from helpers.attention import amid_nan
from helpers.common import CPP_ISA, DTYPES, ISAS, in_double, instructions, with_threads
from nest_fast import reference
from nest_fast.ops import _extension, block_attention, windows
from nest_fast.testing import assert_as_accurate, gradients, relative_error

IMPLS = ["reference", "sdpa", "auto"] + ["cpp"] * bool(CPP_ISA) + ["triton"] * _extension.triton_interpreted
NAMES = "q", "k", "v", "rel_h", "rel_w"

needs_cpp = pytest.mark.skipif(not CPP_ISA, reason="the C++ kernels are not there")


@pytest.fixture(params=ISAS)
def isa(request):
    with instructions(request.param):
        yield


def blocks(h, w, d, dtype=torch.float32, kv_heads=3, B=2, T=2):
    """q, k, v and the scores by row and by column of ``h`` x ``w`` keys, q, k and v of a packed projection."""
    packed = torch.randn(B, T, h * w, 3 + 2 * kv_heads, d).to(dtype)
    positions = (2 * torch.randn(B, T, h * w, 3, edge) for edge in (h, w))
    return *packed.split((3, kv_heads, kv_heads), 3), *(x.to(dtype) for x in positions)


def attend(q, k, v, rel_h, rel_w, impl="auto", **options):
    return block_attention(q, k, v, rel_h=rel_h, rel_w=rel_w, impl=impl, **options)


def test_is_a_bias_of_every_query():
    q, k, v, rel_h, rel_w = in_double(blocks(3, 4, 5))
    scores = torch.einsum("btihd,btjhd->bthij", q, k) / math.sqrt(5)
    for j in range(12):
        scores[..., j] += (rel_h[..., j // 4] + rel_w[..., j % 4]).transpose(2, 3)
    wanted = torch.einsum("bthij,btjhd->btihd", scores.softmax(-1), v)
    for ours in (reference.block_attention(q, k, v, rel_h=rel_h, rel_w=rel_w), attend(q, k, v, rel_h, rel_w)):
        torch.testing.assert_close(ours, wanted)


# Edges that are, and are not, whole vectors; one row, one column; windows of SAM; several pieces of keys.
@needs_cpp
@pytest.mark.parametrize(
    ("h", "w", "d", "kv_heads"),
    [(14, 14, 24, 3), (2, 15, 7, 3), (1, 9, 16, 1), (9, 1, 16, 3), (4, 32, 40, 1), (20, 31, 8, 3)],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_is_as_accurate_as_sdpa(isa, dtype, h, w, d, kv_heads):
    given = blocks(h, w, d, dtype, kv_heads, T=1 + 2**16 // (h * w * 3 * d))
    with torch.no_grad():
        ours, theirs, exact = attend(*given, "cpp"), attend(*given, "sdpa"), attend(*in_double(given), "reference")
    assert_as_accurate(ours, theirs, exact, 1.5)
    assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


@needs_cpp
def test_kernel_stays_inside_its_buffers_and_repeats_bit_by_bit(isa):
    for h, w in ((3, 5), (14, 14), (2, 15), (17, 16)):
        given = blocks(h, w, 6)
        wanted = attend(*given, "cpp")
        assert torch.equal(attend(*map(amid_nan, given), "cpp"), wanted)
        assert all(torch.equal(got, wanted) for got in with_threads(lambda given=given: attend(*given, "cpp")))


CUTS = {
    "SAM's": ((6, 7), 4, {}),
    "shifted": ((6, 7), 4, {"shift": 2}),
    "padded first": ((6, 7), (3, 4), {"shift": 1, "pad_first": True}),
    "grids": ((6, 8), (3, 4), {"grid": True}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CUTS)
def test_in_windows_with_gradients(name, impl):
    """Without gradients, too, where "cpp" reads the windows where they are; padding alike, and each its own."""
    size, window, options = CUTS[name]
    cut = windows(size, window, **options)
    q, k, v = torch.randn(2, cut.rows, 3 * 3, 8).split(3, 2)
    k, v = k[:, :, :1], v[:, :, :1]
    positions = [torch.randn(2, cut.rows, 3, edge) for edge in cut.window]
    dout = torch.randn_like(q)
    for pads in {1, cut.pads} if cut.pads else {0}:
        given = q, k, v, *positions, *(torch.randn(2, pads, 1, 8) if pads else ())

        def call(q, k, v, rel_h, rel_w, pad_k=None, pad_v=None, impl=impl):
            return attend(q, k, v, rel_h, rel_w, impl, windows=cut, pad_k=pad_k, pad_v=pad_v)

        wanted = gradients(lambda *x, call=call: call(*x, impl="reference"), in_double(given), dout)
        for n, (ours, exact) in enumerate(zip(gradients(call, given, dout), wanted, strict=True)):
            assert relative_error(ours, exact) < 1e-5, ("out", *NAMES, "pad_k", "pad_v")[n]
        with torch.no_grad():
            assert relative_error(call(*given), wanted[0]) < 1e-5
    with torch.no_grad():  # zeros
        ours, exact = (attend(q, k, v, *positions, i, windows=cut) for i in (impl, "reference"))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_beside_a_bias_and_of_cosines(impl):
    given, bias, scale = blocks(3, 4, 8), torch.randn(3, 12, 12), torch.rand(3) + 1
    for options in (
        {"bias": bias},
        {"mask": torch.randn(2, 12, 12)},
        {"scale": scale, "cosine": True},
        {"scale": -0.3},
    ):
        torch.testing.assert_close(attend(*given, impl, **options), attend(*given, "reference", **options))


@needs_cpp
def test_nothing_is_copied_on_a_cpu_without_gradients():
    """But for what one operation makes of all; with gradients q and k have the positions as dimensions."""
    called = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    q, k, v = torch.randn(1, 30, 3 * 2, 8).split(2, 2)
    rel_h, rel_w = torch.randn(1, 30, 2, 4), torch.randn(1, 30, 2, 3)
    with torch.no_grad(), Calls():
        attend(q, k, v, rel_h, rel_w, windows=windows((5, 6), (4, 3)))
    moving = {"cat", "index_select", "index", "clone", "copy_", "constant_pad_nd", "_to_copy"}
    assert "block_attention_cpp_fwd" in called
    assert not moving.intersection(called)
    called.clear()
    with Calls():
        attend(q.requires_grad_(), k, v, rel_h, rel_w, windows=windows((5, 6), (4, 3)))
    assert "cat" in called


@needs_cpp
def test_the_kernel_has_no_gradient_of_its_own():
    q, k, v, rel_h, rel_w = blocks(2, 3, 4)
    call = torch.ops.nest_fast.block_attention_cpp_fwd
    for more in ((rel_h, rel_w, None, None, None, None, 0.5, []), (*[None] * 6, 0.5, [2, 3, 2, 3, 0, 0, 0, 0])):
        given = (q, k, v) if more[0] is not None else (x[:, :1] for x in (q, k, v))
        out = call(*(x.detach().requires_grad_() for x in given), *more)[0]
        with pytest.raises(RuntimeError, match="rel_h, windows: expected none in the forward whose gradient is asked"):
            out.sum().backward()


def test_under_a_functional_transform_and_a_compiler():
    given = blocks(2, 3, 4)
    wanted = gradients(lambda *x: attend(*x, "reference"), given, torch.ones_like(given[0]))[1:]
    got = torch.func.grad(lambda given: attend(*given).sum())(given)
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for edge in (3, 4):
            given = blocks(2, edge, 4)
            torch.testing.assert_close(compiled(*given), attend(*given, "reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_w": None}, "rel_w: expected a tensor beside rel_h, got None"),
        ({"rel_h": None}, "rel_h: expected a tensor beside rel_w, got None"),
        ({"rel_h": torch.zeros(1, 2, 6, 3)}, r"rel_h: expected 5 dimensions \(B, T, N, heads, h\), got shape"),
        (
            {"rel_h": torch.zeros(1, 2, 6, 1, 2)},
            r"rel_h: expected shape \(1, 2, 6, 3, 2\) as q has, got \(1, 2, 6, 1, 2\)",
        ),
        ({"rel_w": torch.zeros(1, 2, 6, 3, 4)}, "rel_w: expected 6 keys of 2 rows, got 4 columns"),
        ({"rel_w": torch.zeros(1, 2, 6, 3, 3).double()}, "rel_w: expected dtype torch.float32 as q has, got"),
    ],
)
def test_refuses_bad_arguments(change, message):
    names = dict.fromkeys(("q", "k", "v"), torch.zeros(1, 2, 6, 3, 4))
    positions = {"rel_h": torch.zeros(1, 2, 6, 3, 2), "rel_w": torch.zeros(1, 2, 6, 3, 3)}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        block_attention(**(names | positions | change))
    assert "\n" not in str(error.value)


def test_refuses_positions_of_another_window():
    x = torch.zeros(1, 30, 1, 8)
    rel_h, rel_w = torch.zeros(1, 30, 1, 3), torch.zeros(1, 30, 1, 3)
    with pytest.raises(ValueError, match=r"rel_h: expected shape \(1, 30, 1, 4\) as q and the windows have, got"):
        nest_fast.block_attention(x, x, x, rel_h=rel_h, rel_w=rel_w, windows=windows((5, 6), (4, 3)))
