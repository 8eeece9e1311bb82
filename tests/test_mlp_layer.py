"""mlp_layer: what it shares with attention_layer is imported, the rest is here."""

import math

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
    mlp_inputs,
    needs_cpp,
)
from nest_fast import mlp_layer, reference


def draw(*args, **kwargs):
    return mlp_layer, *mlp_inputs(*args, **kwargs)


@pytest.fixture
def layer():
    return draw(2, 3, 5, 24, 40)


@pytest.fixture
def any_layer():
    @st.composite
    def drawn(choose):
        B, T, N = choose(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)))
        C, hidden = choose(st.integers(1, 132)), choose(st.integers(1, 90))
        dtype, activation = choose(st.sampled_from([*DTYPES.values()])), choose(st.sampled_from(["gelu", "gelu_tanh"]))
        torch.manual_seed(choose(st.integers(0, 2**16)))
        function, tensors, options = draw(B, T, N, C, hidden, activation, dtype)
        if choose(st.booleans()):
            tensors[4] = tensors[6] = None
        return function, tensors, options

    return drawn()


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 196, 96, 384), (1, 3, 61, 384, 1536, "gelu_tanh"), (2, 5, 29, 50, 77)], ids=str
)
def test_is_as_accurate_as_pytorch(isa, dtype, sizes):
    assert_accurate(*draw(*sizes, dtype=dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(3, 2, 49, 64, 256), (1, 3, 61, 32, 8192, "gelu_tanh")],  # the last in several chunks of rows
    ids=str,
)
def test_gradient_is_as_accurate_as_pytorchs(isa, dtype, sizes):
    function, tensors, options = draw(*sizes, dtype=dtype)
    assert_accurate_gradients(function, tensors, options | {"branch_scale": 1.7})


@needs_cpp
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_everywhere(isa, activation):
    """On one channel whose LayerNorm is its bias, so that the layer is the activation: x = 0, fc1 = 0, fc2 = 1."""
    finite = torch.cat([torch.linspace(-14, 14, 50001), torch.tensor([-1e30, -100.0, 100.0, 1e30])])
    special = torch.tensor([math.nan, math.inf])
    hidden = torch.cat([finite, special])
    ours = torch.empty_like(hidden)
    for at in range(0, len(hidden), 4096):  # as fc1's bias, read back through the identity
        part = hidden[at : at + 4096]
        eye = torch.eye(len(part))
        x = torch.zeros(1, len(part))
        ones = torch.ones(len(part))
        if part.isfinite().all():
            ours[at : at + 4096] = mlp_layer(
                x, ones, 0 * ones, 0 * eye, part, eye, None, activation=activation, impl="cpp"
            )
        else:  # 0 x NaN of another channel: one at a time
            for i, value in enumerate(part):
                one = torch.ones(1, 1)
                args = (torch.zeros(1, 1), one[0], 0 * one[0], 0 * one, value.view(1), one, None)
                ours[at + i] = mlp_layer(*args, activation=activation, impl="cpp")[0, 0]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    exact = torch.nn.functional.gelu(hidden.double(), approximate=approximate)
    error = (ours - exact)[: len(finite) - 4].abs().max()
    assert error < 2e-6
    assert torch.equal(ours[-6:-2], torch.tensor([-0.0, -0.0, 100.0, 1e30]))
    assert ours[-2].isnan()
    assert ours[-1] == math.inf


@needs_cpp
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_slope_of_gelu_everywhere(isa, activation):
    """dx of fc2(activation(hidden)) with fc1 = fc2 = 1 and dout = 1 is the activation's derivative."""
    hidden = torch.cat([torch.linspace(-14, 14, 50001), torch.tensor([-1e18, -100.0, 100.0, 1e18])]).view(-1, 1)
    one, dout = torch.ones(1, 1), torch.ones_like(hidden)
    mask = [True] * 5
    ours, *_ = OPS.mlp_layer_cpp_bwd(dout, dout, hidden, one, activation, one, mask)
    wide = hidden.double().requires_grad_()
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    torch.nn.functional.gelu(wide, approximate=approximate).sum().backward()
    assert (ours - wide.grad).abs().max() < 2e-6
    assert OPS.mlp_layer_cpp_bwd(one, one, one * math.nan, one, activation, one, mask)[0].isnan()


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_with_the_norm_last_is_as_accurate_as_pytorch(isa, dtype):
    function, tensors, options = draw(2, 4, 49, 64, 256, dtype=dtype)
    options |= {"post_norm": True, "branch_scale": 1.7}
    assert_accurate(function, tensors, options)
    assert_accurate_gradients(function, tensors, options)


@needs_cpp
def test_saves_little_for_the_gradient():
    """fc1's output; x and what comes after x are there anyway."""
    assert_saves_little(*draw(2, 4, 16, 64, 256), 4, 0.5)


def test_gradcheck_of_the_reference():
    _, tensors, options = draw(1, 2, 3, 4, 6)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: reference.mlp_layer(*t, **options), leaves)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 8, 0), (2, 3, 0, 8, 16)], ids=["nothing hidden", "no tokens"])
def test_of_nothing_is_what_pytorch_has(sizes):
    assert_same_of_nothing(*draw(*sizes))


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(training):
    _, tensors, _ = draw(2, 3, 5, 24, 40)
    x, norm_weight, norm_bias, fc1, fc1_bias, *fc2 = (t.requires_grad_(training) for t in tensors)
    call = (x.view(-1, 24), norm_weight, norm_bias, 1e-6, fc1, fc1_bias, "gelu", *fc2, 0.5, training)
    torch.library.opcheck(OPS.mlp_layer_cpp.default, call)


@needs_cpp
def test_opcheck_of_the_backward():
    rows, hidden, fc1, fc2 = torch.randn(30, 24), torch.randn(30, 40), torch.randn(40, 24), torch.randn(24, 40)
    for mask in ([True] * 5, [True, False, False, True, False], [False, False, True, False, True], [False] * 5):
        torch.library.opcheck(OPS.mlp_layer_cpp_bwd.default, (rows, rows, hidden, fc1, "gelu", fc2, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 23)}, r"x: expected shape \(…, 24\) as fc1_weight says, got \(5, 23\)"),
        ({1: None}, r"norm_weight: expected a tensor \(24\), got NoneType"),
        ({4: torch.zeros(24)}, r"fc1_bias: expected shape \(40,\), got \(24,\)"),
        ({5: torch.zeros(40, 24)}, r"fc2_weight: expected shape \(24, 40\), got \(40, 24\)"),
        ({6: torch.zeros(24, device="meta")}, r"fc2_bias: expected device cpu as x has, got meta"),
        ({"activation": "relu"}, r"activation: expected one of 'gelu', 'gelu_tanh', got 'relu'"),
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
    x, norm_weight, norm_bias, fc1, _, fc2, _ = layer[1]
    rows, hidden, gaps = x.view(-1, 24), torch.zeros(30, 40), torch.zeros(30, 72)[:, :40]

    def forward(activation="gelu", fc2=fc2):
        return OPS.mlp_layer_cpp(rows, norm_weight, norm_bias, 1e-6, fc1, None, activation, fc2, None, 1.0, False)

    def backward(x=rows, hidden=hidden, fc1=fc1, fc2=fc2):
        return OPS.mlp_layer_cpp_bwd(rows, x, hidden, fc1, "gelu", fc2, [True] * 5)

    for message, wrong in {
        "fc2_weight: expected 2 dimensions, the last 40": lambda: forward(fc2=fc2[:, :30]),
        'activation: expected "gelu" or "gelu_tanh", got "relu"': lambda: forward("relu"),
        "hidden: expected 2 dimensions, the last 40": lambda: backward(hidden=rows),
        "hidden: expected 30 contiguous rows as dout has, got 29": lambda: backward(hidden=hidden[:29]),
        "hidden: expected 30 contiguous rows as dout has, got 30 with gaps": lambda: backward(hidden=gaps),
        "x: expected 2 dimensions, the last 24": lambda: backward(x=rows[:, :23]),
        "fc2_weight: expected 2 dimensions, the last 39": lambda: backward(fc1=fc1[:39]),
        "fc2_weight: expected 24 rows, got 23": lambda: backward(fc2=fc2[:23]),
        "x: expected 30 rows as dout has, got 29": lambda: backward(x=rows[:29]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            wrong()
