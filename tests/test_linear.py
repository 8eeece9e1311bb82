"""linear with its epilogues, and the fused layer that is made of it."""

import functools

import pytest
import torch
from torch import nn

import nest_fast
from nest_fast import linear, modules, reference
from nest_fast.modules import chained_layers, fused_layer
from nest_fast.testing import assert_as_accurate, relative_error

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def tensors(*lead, dtype=torch.float32):
    x, residual = torch.randn(*lead, 24, dtype=dtype), torch.randn(*lead, 40, dtype=dtype)
    return x, torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype), residual


@onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["none", "gelu", "gelu_tanh", "residual"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_onednn_is_as_accurate_as_plain_pytorch(dtype, case, with_bias):
    x, weight, bias, residual = tensors(2, 3, 50, dtype=dtype)
    bias = bias if with_bias else None
    options = {"residual": residual} if case == "residual" else {"activation": case}
    kept = residual.clone()
    ours = linear(x, weight, bias, **options, impl="onednn")
    plain = reference.linear(x, weight, bias, **options)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    golden = reference.linear(x.double(), weight.double(), bias if bias is None else bias.double(), **double)
    assert_as_accurate(ours, plain, golden, 2)
    assert torch.equal(residual, kept)
    assert ours.shape == plain.shape


@onednn
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 4, 5)])
def test_any_rank_and_strided_operands(lead):
    x, weight, bias, residual = tensors(*lead)
    wanted = reference.linear(x, weight, bias, residual=residual)
    torch.testing.assert_close(linear(x, weight, bias, residual=residual), wanted, rtol=1e-5, atol=1e-5)
    x, residual = (t.unsqueeze(-1).expand(*t.shape, 2)[..., 0] for t in (x, residual))  # stride 2, same values
    weight = weight.t().contiguous().t()
    for impl in ("auto", "onednn"):
        out = linear(x, weight, bias, residual=residual, impl=impl)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_auto_keeps_gradients_autocast_and_empty_inputs():
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x: wanted shape \(…, 24\) as weight says, got \(3, 5\)"),
        ({"weight": torch.zeros(40)}, r"weight: wanted 2 dimensions \(out, in\), got shape \(40,\)"),
        ({"bias": torch.zeros(24)}, r"bias: wanted shape \(40,\) \(out,\), got \(24,\)"),
        ({"residual": torch.zeros(3, 24)}, r"residual: wanted shape \(3, 40\) \(…, out\), got \(3, 24\)"),
        ({"activation": "relu"}, r"activation: wanted one of 'none', 'gelu', 'gelu_tanh', got 'relu'"),
        ({"weight": torch.zeros(40, 24).double()}, r"weight: wanted dtype torch.float32 as x has, got torch.float64"),
        ({"impl": "mkl"}, r"impl: wanted one of 'auto', 'reference', 'onednn', got 'mkl'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(3, 24), "weight": torch.zeros(40, 24), "bias": torch.zeros(40), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        linear(**arguments)
    with pytest.raises(ValueError, match="activation: wanted 'none' with a residual, got 'gelu'"):
        linear(torch.zeros(3, 24), torch.zeros(24, 24), activation="gelu", residual=torch.zeros(3, 24))


# --- the fused layer --------------------------------------------------------------------------------------------------


def layer(**kwargs):
    return nest_fast.TransformerLayer(32, 2, **kwargs).eval()


def step_by_step(module, x):
    x = x + module.attn(module.norm1(x))
    return x + module.mlp(module.norm2(x))


@pytest.mark.parametrize("act_layer", [nn.GELU, lambda: nn.GELU("tanh"), nn.ReLU])
def test_fused_layer_is_the_layer(act_layer):
    module, x = layer(act_layer=act_layer), torch.randn(2, 4, 9, 32)
    with torch.no_grad():
        assert relative_error(module(x), step_by_step(module, x)) < 1e-6
        assert (fused_layer(x, module) is None) == (act_layer is nn.ReLU)


@pytest.mark.parametrize("name", ["attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "norm2"])
def test_fused_layer_never_hides_a_module_someone_listens_to(name):
    module, x = layer(), torch.randn(2, 4, 9, 32)
    seen = []
    module.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        wanted = step_by_step(module, x)
        assert len(seen) == 1
        assert relative_error(module(x), wanted) < 1e-6
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])


def test_fused_layer_stands_back_where_something_drops():
    module, x = layer(proj_drop=0.5), torch.randn(8, 4, 9, 32)
    assert fused_layer(x, module) is not None
    module.train()
    assert fused_layer(x, module) is None
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("rate", [0.3, 0.999])
def test_stochastic_depth_computes_only_what_it_keeps(rate):
    """The same samples, outputs and gradients as the module drops; where all are dropped, zeros and not None."""
    module, x = layer(drop_path=rate).train(), torch.randn(12, 2, 9, 32)

    def plainly(x):
        x = x + module.drop_path1(module.attn(module.norm1(x)))
        return x + module.drop_path2(module.mlp(module.norm2(x)))

    results = []
    for function in (functools.partial(fused_layer, layer=module), plainly):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    unchanged = (results[0][0] == x).flatten(1).all(1).sum()
    assert unchanged == (results[1][0] == x).flatten(1).all(1).sum()
    assert 0 < unchanged < 12 if rate == 0.3 else unchanged == 12
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_chained_layers_are_the_layers(rate):
    """What a GPU runs: here its plain definitions, with the same draws of stochastic depth."""
    layers = [layer(drop_path=rate).train() for _ in range(3)]
    x, results = torch.randn(8, 2, 9, 32), []
    parameters = [p for module in layers for p in module.parameters()]
    for function in (chained_layers, lambda x, layers: functools.reduce(lambda x, module: module(x), layers, x)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = function(leaf, layers)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *parameters])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_layers_are_chained_where_nothing_else_is_asked_for():
    x = torch.randn(1)
    assert modules._can_chain(x, layer(drop_path=0.3).train())
    assert modules._can_chain(x, layer(proj_drop=0.3))
    assert not modules._can_chain(x, layer(proj_drop=0.3).train())
    assert not modules._can_chain(x, layer(act_layer=nn.ReLU))
    for name in ("", "attn", "attn.qkv", "mlp", "mlp.fc1", "mlp.act", "norm2"):
        module = layer()
        module.get_submodule(name).register_forward_hook(lambda m, args, out: None)
        assert not modules._can_chain(x, module), name
