"""attention_layer: what it shares with mlp_layer is imported, the rest is here."""

import pytest
import torch
from hypothesis import strategies as st

from helpers.common import DTYPES
from helpers.layer_tests import *  # noqa: F403
from helpers.layer_tests import (
    OPS,
    assert_accurate,
    assert_accurate_gradients,
    assert_same_of_nothing,
    assert_saves_little,
    attention_inputs,
    needs_cpp,
)
from nest_fast import attention_layer, reference


def draw(*args, **kwargs):
    return attention_layer, *attention_inputs(*args, **kwargs)


@pytest.fixture
def layer():
    return draw(2, 3, 5, 24, 3)


@pytest.fixture
def any_layer():
    @st.composite
    def drawn(choose):
        B, T, N = choose(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)))
        heads, head_dim = choose(st.tuples(st.integers(1, 4), st.integers(1, 33)))
        dtype, multi_query = choose(st.sampled_from([*DTYPES.values()])), choose(st.booleans())
        torch.manual_seed(choose(st.integers(0, 2**16)))
        function, tensors, options = draw(B, T, N, heads * head_dim, heads, multi_query, dtype)
        if choose(st.booleans()):
            tensors[4] = tensors[6] = None
        return function, tensors, options

    return drawn()


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 196, 96, 3), (1, 9, 49, 64, 2), (2, 8, 16, 192, 3, True), (5, 2, 17, 70, 5)], ids=str
)
def test_is_as_accurate_as_pytorch(isa, dtype, sizes):
    assert_accurate(*draw(*sizes, dtype=dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 49, 64, 2), (3, 2, 16, 96, 3, True), (1, 70, 16, 256, 4)],  # the last in several chunks of rows, one short
    ids=str,
)
def test_gradient_is_as_accurate_as_pytorchs(isa, dtype, sizes):
    function, tensors, options = draw(*sizes, dtype=dtype)
    assert_accurate_gradients(function, tensors, options | {"branch_scale": 1.7})


@needs_cpp
def test_saves_little_for_the_gradient():
    """qkv, attention's output and its sums; x and what comes after x are there anyway."""
    assert_saves_little(*draw(2, 4, 16, 64, 2), 4 + 2 / 64, 0.8)


def test_gradcheck_of_the_reference():
    _, tensors, options = draw(1, 2, 3, 4, 2)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: reference.attention_layer(*t, **options), leaves)


@pytest.mark.parametrize("sizes", [(2, 2, 0, 8, 2), (2, 0, 4, 8, 2)], ids=["no tokens", "no blocks"])
def test_of_nothing_is_what_pytorch_has(sizes):
    assert_same_of_nothing(*draw(*sizes))


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(training):
    _, tensors, _ = draw(2, 3, 5, 24, 3)
    x, norm_weight, norm_bias, *weights = (t.requires_grad_(training) for t in tensors)
    call = (x.view(-1, 24), norm_weight, norm_bias, 1e-6, *weights)
    torch.library.opcheck(OPS.attention_layer_cpp.default, (*call, None, None, None, [], 5, 3, 3, 0.3, 0.5, training))
    bias, windows = torch.randn(3, 9, 9).requires_grad_(training), [3, 5, 3, 3, 1, 0, 0, 0]
    call = (*call, bias, None)
    torch.library.opcheck(OPS.attention_layer_cpp.default, (*call, None, windows, 9, 3, 3, 0.3, 0.5, training))
    call, scales = (call[0], None, None, *call[3:]), torch.rand(3).requires_grad_(training)
    torch.library.opcheck(OPS.attention_layer_cpp.default, (*call, scales, windows, 9, 3, 3, 0.3, 0.5, training))


@needs_cpp
def test_opcheck_of_the_backward():
    rows, packed = torch.randn(30, 24), torch.randn(30, 72)
    qkv, proj = torch.randn(72, 24), torch.randn(24, 24)
    call = (rows, rows, packed, rows, torch.randn(6, 3, 5), qkv, proj, None, None, None, [], 5, 3, 3, 0.3)
    for mask in ([True] * 5, [True, False, False, True, False], [False, False, True, False, True], [False] * 5):
        torch.library.opcheck(OPS.attention_layer_cpp_bwd.default, (*call, [*mask, False, False]))
    added = torch.randn(6, 3, 5, 2).abs(), qkv, proj, torch.randn(3, 5, 5), torch.randn(2, 5, 5), torch.rand(3)
    for mask in ([True] * 7, [False] * 6 + [True]):
        torch.library.opcheck(OPS.attention_layer_cpp_bwd.default, (*call[:4], *added, *call[10:], mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 5, 24)}, r"x: expected 4 dimensions \(B, T, N, C\), got shape \(3, 5, 24\)"),
        ({0: torch.zeros(2, 3, 5, 24).long()}, r"x: expected a floating-point dtype, got torch.int64"),
        ({3: torch.zeros(71, 24)}, r"qkv_weight: expected shape \(72, 24\), got \(71, 24\)"),
        ({"num_heads": 5}, r"num_heads: expected a divisor of C = 24, got 5"),
        ({"multi_query": True}, r"qkv_weight: expected shape \(40, 24\), got \(72, 24\)"),
        ({5: torch.zeros(24, 24).half()}, r"proj_weight: expected dtype torch.float32 as x has, got torch.float16"),
        ({"impl": "sdpa"}, r"impl: expected one of 'auto', 'reference', 'cpp', 'triton', got 'sdpa'"),
    ],
)
def test_refuses_bad_arguments(layer, change, message):
    function, tensors, options = layer
    args = [change.get(n, t) for n, t in enumerate(tensors)]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        function(*args, **options | {k: v for k, v in change.items() if isinstance(k, str)})
    assert "\n" not in str(error.value)


@needs_cpp
def test_refuses_bad_arguments_that_would_be_read_out_of_bounds(layer):
    x, norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias = layer[1]
    rows, packed, lse = x.view(-1, 24), torch.zeros(30, 72), torch.zeros(6, 3, 5)

    def forward(
        rows=rows,
        norm=norm_weight,
        qkv=qkv,
        bias=qkv_bias,
        tokens=5,
        heads=3,
        kv=3,
        added=None,
        windows=(),
        scales=None,
    ):
        call = (rows, norm, norm_bias, 1e-6, qkv, bias, proj, proj_bias, added, None, scales, windows)
        return OPS.attention_layer_cpp(*call, tokens, heads, kv, 0.3, 1.0, False)

    def backward(packed=packed, attended=rows, lse=lse, qkv=qkv, mask=(True,) * 5 + (False,) * 2):
        call = (rows, rows, packed, attended, lse, qkv, proj, None, None, None, [], 5, 3, 3, 0.3)
        return OPS.attention_layer_cpp_bwd(*call, mask)

    for message, wrong in {
        "x: expected dense rows": lambda: forward(rows.t().contiguous().t()),
        "tokens: expected a divisor of 30 rows, got 4": lambda: forward(tokens=4),
        "heads: expected a divisor of 24 features": lambda: forward(heads=5),
        "kv_heads: expected 3 or 1, got 2": lambda: forward(kv=2),
        "norm_weight: expected 24 contiguous elements": lambda: forward(norm=norm_weight[:5]),
        "norm_weight: expected dtype Float": lambda: forward(norm=norm_weight.half()),
        "qkv_weight: expected 72 output features, got 70": lambda: forward(qkv=qkv[:70], bias=None),
        "bias: expected 72 contiguous": lambda: forward(bias=qkv_bias[:5]),
        "bias: expected 3 dimensions, the last two 5": lambda: forward(added=torch.zeros(3, 4, 4)),
        "windows: expected 8 numbers or none, got 2": lambda: forward(windows=[5, 6]),
        "windows: expected a divisor of 30 rows, got an image of 35": lambda: forward(windows=[5, 7, 1, 5, 0, 0, 0, 0]),
        "tokens: expected 4 as windows has, got 5": lambda: forward(windows=[5, 6, 2, 2, 0, 0, 0, 0]),
        "windows: expected a shift less than the window": lambda: forward(windows=[5, 6, 1, 5, 1, 0, 0, 0]),
        "windows: expected positive sizes": lambda: forward(windows=[5, 6, 0, 5, 0, 0, 0, 0]),
        "windows: expected a grid that divides the image": lambda: forward(windows=[5, 6, 1, 5, 0, 0, 0, 1]),
        "output_mask: expected no gradient of a bias": lambda: backward(mask=[True] * 7),
        "output_mask: expected no gradient of scales": lambda: backward(mask=[True] * 5 + [False, True]),
        "scales: expected 3 contiguous elements": lambda: forward(scales=torch.ones(2)),
        "scales: expected none where one key head": lambda: forward(scales=torch.ones(3), kv=1),
        "norm_bias: expected as norm_weight, None or not": lambda: forward(norm=None),
        "lse: expected 90": lambda: backward(lse=lse[:5]),
        "qkv: expected 2 dimensions, the last 72": lambda: backward(packed=rows),
        "attended: expected dtype Float, got Half": lambda: backward(attended=rows.half()),
        "qkv_weight: expected 72 rows, got 71": lambda: backward(qkv=qkv[:71]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            wrong()
