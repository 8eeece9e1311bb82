"""linear with its epilogues."""

import importlib
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.strides import restrided
from nest_fast import linear, reference
from nest_fast.ops import _extension
from nest_fast.testing import assert_as_accurate

_LINEAR = importlib.import_module("nest_fast.ops.linear")
by_onednn = _LINEAR._by_onednn
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def tensors(*lead, dtype=torch.float32):
    x, residual = torch.randn(*lead, 24, dtype=dtype), torch.randn(*lead, 40, dtype=dtype)
    return x, torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype), residual


WAYS = [
    *(("onednn", dtype) for dtype in _extension.onednn_dtypes),
    *(("float32", dtype) for dtype in (torch.float16, torch.bfloat16)),
]


@onednn
@pytest.mark.parametrize(("impl", "dtype"), WAYS)
@pytest.mark.parametrize("case", ["none", "gelu", "gelu_tanh", "residual"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_as_accurate_as_pytorch(impl, dtype, case, with_bias):
    x, weight, bias, residual = tensors(2, 3, 50, dtype=dtype)
    bias = bias if with_bias else None
    options = {"residual": residual} if case == "residual" else {"activation": case}
    kept = residual.clone()
    ours = linear(x, weight, bias, **options, impl=impl)
    plain = reference.linear(x, weight, bias, **options)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    golden = reference.linear(x.double(), weight.double(), bias if bias is None else bias.double(), **double)
    assert_as_accurate(ours, plain, golden, 2)
    assert torch.equal(residual, kept)
    assert ours.shape == plain.shape
    assert ours.dtype == dtype


@onednn
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_multiplies_in_float32_where_the_processor_has_no_other(dtype, monkeypatch):
    """But for a few rows, for which converting the weight takes longer, and for gradients."""
    taken = []
    monkeypatch.setattr(_LINEAR, "_by_onednn", lambda *given: taken.append(given[0].dtype) or by_onednn(*given))
    given, few = tensors(50, dtype=dtype)[:3], tensors(15, dtype=dtype)[:3]
    for unmultiplied in ((torch.float16, torch.bfloat16), ()):
        monkeypatch.setattr(_extension, "unmultiplied", unmultiplied)
        taken.clear()
        with torch.no_grad():
            torch.testing.assert_close(linear(*given), linear(*given, impl="reference"), rtol=0.02, atol=0.1)
            assert (taken == [torch.float32]) == bool(unmultiplied)
            taken.clear()
            linear(*few)
        linear(given[0], given[1].clone().requires_grad_(), given[2])
        assert torch.float32 not in taken


@onednn
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 4, 5)])
def test_of_any_strides_and_rank(lead):
    x, weight, bias, residual = tensors(*lead)
    wanted = reference.linear(x, weight, bias, residual=residual)
    torch.testing.assert_close(linear(x, weight, bias, residual=residual), wanted, rtol=1e-5, atol=1e-5)
    chance = random.Random(len(lead))
    for _ in range(10):
        strange = [restrided(t, chance, expandable=()) for t in (x, weight, bias, residual)]
        for impl in ("auto", "onednn"):
            out = linear(*strange[:3], residual=strange[3], impl=impl)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_auto_has_gradients_and_runs_under_autocast_and_of_nothing():
    x, weight, bias, residual = tensors(6)
    weight.requires_grad_()
    linear(x, weight, bias, activation="gelu").sum().backward()
    assert weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.no_grad():
        assert linear(x[:0], weight, bias, residual=residual[:0]).shape == (0, 40)
        assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64


@onednn
def test_an_explicit_choice_never_falls_back():
    x, weight, bias, _ = tensors(6)
    for change, reason in (
        ({"x": x.double(), "weight": weight.double(), "bias": bias.double()}, "float64"),
        ({"weight": weight.clone().requires_grad_()}, "gradients are wanted"),
        ({"x": x[:0]}, "x is empty"),
    ):
        with pytest.raises(RuntimeError, match=f"impl: 'onednn' cannot run linear here: .*{reason}"):
            linear(**{"x": x, "weight": weight, "bias": bias, "impl": "onednn", **change})
    with pytest.raises(
        RuntimeError, match=r"impl: 'float32' cannot run linear here: torch\.float32 is no half precision"
    ):
        linear(x, weight, bias, impl="float32")


def test_an_explicit_choice_of_a_gpus_epilogue_never_falls_back():
    x, weight, _, _ = tensors(6)
    reasons = "x is on cpu, not on a GPU; its GELU is 'gelu_tanh', not 'gelu'; there is no bias"
    with pytest.raises(RuntimeError, match=f"^impl: 'cublaslt' cannot run linear here: {reasons}$"):
        linear(x, weight, activation="gelu", impl="cublaslt")


def test_a_gpus_epilogue_counts_its_flops():
    x, weight, bias, _ = tensors(6)
    with FlopCounterMode(display=False) as counter:
        torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpus_epilogue_is_as_accurate_as_pytorch(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(500, 384), torch.randn(1536, 384) / 384**0.5, torch.randn(1536)
    given = [t.to("cuda", dtype) for t in (x, weight, bias)]
    ours, plain = (linear(*given, activation="gelu_tanh", impl=impl) for impl in ("cublaslt", "reference"))
    golden = linear(*(t.double() for t in given), activation="gelu_tanh", impl="reference")
    assert_as_accurate(ours, plain, golden, factor=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x: expected shape \(…, 24\) as weight says, got \(3, 5\)"),
        ({"weight": torch.zeros(40)}, r"weight: expected 2 dimensions \(out, in\), got shape \(40,\)"),
        ({"bias": torch.zeros(24)}, r"bias: expected shape \(40,\) \(out,\), got \(24,\)"),
        ({"residual": torch.zeros(3, 24)}, r"residual: expected shape \(3, 40\) \(…, out\), got \(3, 24\)"),
        ({"activation": "relu"}, r"activation: expected one of 'none', 'gelu', 'gelu_tanh', got 'relu'"),
        ({"weight": torch.zeros(40, 24).double()}, r"weight: expected dtype torch.float32 as x has, got torch.float64"),
        (
            {"impl": "mkl"},
            r"impl: expected one of 'auto', 'reference', 'onednn', 'float32', 'cublaslt', 'triton', got 'mkl'",
        ),
    ],
)
def test_refuses_bad_arguments(change, message):
    arguments = {"x": torch.zeros(3, 24), "weight": torch.zeros(40, 24), "bias": torch.zeros(40), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        linear(**arguments)
    with pytest.raises(ValueError, match="activation: expected 'none' with a residual, got 'gelu'"):
        linear(torch.zeros(3, 24), torch.zeros(24, 24), activation="gelu", residual=torch.zeros(3, 24))
