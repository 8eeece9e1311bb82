"""linear in Triton: in the interpreter on a CPU (conftest switches it on), compiled on a GPU."""

import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from helpers.common import DEVICE, assert_stays_inside_its_buffers, in_double
from helpers.layer_tests import LUCK
from helpers.strides import restrided
from nest_fast import linear, reference
from nest_fast.kernels import _launch, _layer_configs
from nest_fast.kernels._layer_configs import MatmulConfig
from nest_fast.kernels.linear import linear_fwd
from nest_fast.testing import assert_as_accurate, relative_error

OPS = torch.ops.nest_fast
HALVES = [torch.float16, torch.bfloat16]
FORMS = {
    "pointers": MatmulConfig(tile_rows=32, tile_out=64, tile_k=16, num_warps=4, num_stages=2),
    "copies": MatmulConfig(tile_rows=32, tile_out=64, tile_k=16, num_warps=4, num_stages=2, copies=True),
}
triton = partial(linear, impl="triton")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Small tiles of either form, where they are chosen anew; the copy engine's only where it can."""
    candidates = [FORMS[request.param], FORMS["pointers"]]
    monkeypatch.setattr(_layer_configs, "MATMUL", dict.fromkeys((80, 90, 100), candidates))
    monkeypatch.setattr(_launch, "CHOSEN", {})
    return request.param


def draw(lead, K, N, dtype=torch.float16, bias=True):
    tensors = torch.randn(*lead, K), torch.randn(N, K) * max(K, 1) ** -0.5, 0.3 * torch.randn(N)
    x, weight, vector = (t.to(DEVICE, dtype) for t in tensors)
    return [x, weight, vector if bias else None]


# Whole tiles and partial ones, in every direction; of 35 or 67 numbers no row but the first begins at 16 bytes.
@pytest.mark.parametrize(
    ("lead", "K", "N", "activation", "dtype", "bias"),
    [
        ((2, 32), 32, 128, "none", torch.bfloat16, True),
        ((3, 25), 56, 72, "gelu", torch.float16, True),
        ((70,), 40, 136, "gelu_tanh", torch.bfloat16, False),
        ((1,), 8, 8, "gelu", torch.bfloat16, True),
        ((33,), 35, 67, "gelu_tanh", torch.float16, True),
        ((2, 5, 7), 48, 67, "none", torch.float16, False),
    ],
    ids=str,
)
def test_is_as_accurate_as_pytorch(form, lead, K, N, activation, dtype, bias):
    tensors = draw(lead, K, N, dtype, bias)
    ours, plain = (linear(*tensors, activation=activation, impl=impl) for impl in ("triton", "reference"))
    golden = reference.linear(*in_double(tensors), activation=activation)
    assert ours.shape == plain.shape
    assert ours.is_contiguous()
    assert_as_accurate(ours, plain, golden, factor=1.2)


def test_with_the_tables_own_tiles_as_accurate_as_pytorch():
    """Of an H100: more rows and columns than a tile has, and half of one."""
    for dtype, K, N, activation in ((torch.bfloat16, 96, 384, "gelu"), (torch.float16, 97, 129, "gelu_tanh")):
        tensors = draw((200,), K, N, dtype)
        ours, plain = (linear(*tensors, activation=activation, impl=impl) for impl in ("triton", "reference"))
        assert_as_accurate(ours, plain, reference.linear(*in_double(tensors), activation=activation), factor=1.2)


@settings(max_examples=15)
@given(data=st.data())
def test_of_any_shape(data):
    """Every other one of numbers that the copy engine takes."""
    unit = data.draw(st.sampled_from([1, 8]))
    K, N = (unit * data.draw(st.integers(1, most // unit)) for most in (150, 300))
    rows, dtype = data.draw(st.integers(1, 150)), data.draw(st.sampled_from(HALVES))
    activation = data.draw(st.sampled_from(["none", "gelu", "gelu_tanh"]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    tensors = draw((rows,), K, N, dtype, data.draw(st.booleans()))
    ours, plain = (linear(*tensors, activation=activation, impl=impl) for impl in ("triton", "reference"))
    golden = reference.linear(*in_double(tensors), activation=activation)
    allowed = 1.2 * relative_error(plain, golden) + LUCK * torch.finfo(dtype).eps
    assert relative_error(ours, golden) <= allowed


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
def test_keeps_special_values_where_pytorch_does(form):
    """Those of a row, and those of the row that is read once more for rows that do not exist, stay in it."""
    tensors = draw((33,), 24, 72)
    for row, value in ((3, math.nan), (32, math.nan), (5, math.inf), (6, -math.inf)):
        tensors[0][row, 7] = value
    for activation in ("none", "gelu", "gelu_tanh"):
        out, wanted = (linear(*tensors, activation=activation, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(out.isinf(), wanted.isinf())
        assert out.isnan().any()


def test_of_any_strides(form):
    tensors = draw((2, 3, 5), 24, 40)
    chance, wanted = random.Random(0), triton(*tensors, activation="gelu")
    for _ in range(5):
        strange = [restrided(t, chance, expandable=()) for t in tensors]
        assert torch.equal(triton(*strange, activation="gelu"), wanted)
    negated = [torch._neg_view(t) for t in tensors]
    torch.testing.assert_close(triton(*negated), triton(*(-t for t in tensors)))


def test_at_an_odd_address_layout_is_by_pointers():
    """The copy engine wants multiples of 16 bytes."""
    tensors = draw((40,), 24, 40)
    wanted = triton(*tensors)
    for n in range(3):
        shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape).copy_(t) for t in tensors]
        torch.testing.assert_close(triton(*tensors[:n], shifted[n], *tensors[n + 1 :]), wanted)


@pytest.mark.parametrize(("rows", "K", "N"), [(0, 24, 40), (7, 24, 0), (7, 0, 40)], ids=str)
def test_of_nothing_in_triton(rows, K, N):
    tensors = draw((2, rows), K, N)
    torch.testing.assert_close(triton(*tensors, activation="gelu"), reference.linear(*tensors, activation="gelu"))


def test_repeats_bit_by_bit(form):
    """A row is computed alike beside any others."""
    x, weight, bias = draw((150,), 40, 72, torch.bfloat16)
    first = triton(x, weight, bias, activation="gelu")
    assert torch.equal(triton(x, weight, bias, activation="gelu"), first)
    assert torch.equal(triton(x[:77], weight, bias, activation="gelu"), first[:77])


@pytest.mark.parametrize(("K", "N"), [(40, 72), (35, 67)])
def test_stays_inside_its_buffers(form, K, N):
    tensors = draw((45,), K, N, torch.bfloat16)
    assert_stays_inside_its_buffers(lambda copy: [linear_fwd(*map(copy, tensors), "gelu")])


@pytest.mark.gpu
def test_offsets_are_64_bit():
    rows, K = 2**31 // 64 + 77, 64
    weight = torch.randn(8, K, device=DEVICE).bfloat16()
    x = torch.zeros(rows, K, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(K)
    for columns in (slice(None), slice(1, None)):
        out, wanted = triton(x[:, columns], weight[:, columns]), reference.linear(x[-1:, columns], weight[:, columns])
        assert relative_error(out[-1:], wanted) < 1e-2


# --- what PyTorch does with the operation -----------------------------------------------------------------------------


def test_opcheck():
    x, weight, bias = draw((2, 5), 24, 40)
    for vector, activation in ((bias, "gelu"), (None, "none")):
        torch.library.opcheck(OPS.linear_triton_fwd.default, (x, weight, vector, activation))


def test_compiles_in_one_graph_and_exports_with_a_dynamic_batch():
    x, weight, bias = draw((2, 5), 24, 40)

    class Module(torch.nn.Module):
        def forward(self, x):
            return triton(x, weight, bias, activation="gelu")

    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},)).module()
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 5, 24, device=DEVICE).half()
        wanted = Module()(x)
        torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(exported(x), wanted)


def test_counts_the_flops_of_plain_pytorch_in_triton():
    tensors, counted = draw((2, 5), 24, 40), []
    for impl in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter:
            linear(*tensors, impl=impl)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is none of float32, float16, bfloat16"),
        ({"dtype": torch.float32}, "float32 is left to the library"),
        ({"residual": True}, "it adds no residual"),
        ({"gradients": 1}, "gradients are wanted, and it keeps nothing for them"),
        ({"autocast": True}, "autocast is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_explicit_choice_in_triton_never_falls_back(change, why):
    tensors = draw((3,), 24, 40, change.get("dtype", torch.float16))
    residual = torch.zeros(3, 40, dtype=torch.float16, device=DEVICE) if change.get("residual") else None
    if "gradients" in change:
        tensors[change["gradients"]].requires_grad_()
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=change.get("autocast", False)),
        pytest.raises(RuntimeError, match=f"^impl: 'triton' cannot run linear here: {why}$"),
    ):
        triton(*tensors, residual=residual)


def test_has_no_gradient():
    """Where the operation was called by its own name."""
    x, weight, bias = draw((3,), 24, 40)
    out = OPS.linear_triton_fwd(x.requires_grad_(), weight, bias, "gelu")
    with pytest.raises(RuntimeError, match="impl: expected 'auto' or 'reference' where gradients are wanted"):
        out.sum().backward()
