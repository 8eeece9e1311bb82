"""What is computed by one operation and what by its modules: every rule, with its reason."""

import functools

import pytest
import torch
from torch import nn

import nest_fast
from nest_fast import fusion
from nest_fast.modules import KNOWN, Mlp
from nest_fast.testing import relative_error


def layer(**kwargs):
    return nest_fast.TransformerLayer(32, 2, **kwargs).eval()


def step_by_step(module, x):
    x = x + module.drop_path1(module.attn(module.norm1(x)))
    return x + module.drop_path2(module.mlp(module.norm2(x)))


def reasons(module, x):
    return [str(half.why_not(x) or "") for half in fusion.halves(module, KNOWN)]


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


class Scaled(torch.Tensor):
    """A weight that is more than its numbers."""


def patch(cls, method="forward"):
    """A change of a class, undone by the test's monkeypatch."""

    def change(module, monkeypatch):
        original = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda self, *args: original(self, *args))

    return change


def listen(name, how="register_forward_hook"):
    def change(module, monkeypatch):
        getattr(module.get_submodule(name), how)(lambda *args: None)

    return change


def put(name, make):
    def change(module, monkeypatch):
        module.set_submodule(name, make())

    return change


def set_weight(name, value):
    def change(module, monkeypatch):
        parent, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent)
        parent._parameters[attribute] = value(parent._parameters[attribute])

    return change


def patch_instance(module, monkeypatch):
    module.mlp.fc1.forward = lambda x: nn.Linear.forward(module.mlp.fc1, x)


# A change, and the reasons of the attention's and the MLP's half.
RULES = {
    "nothing": (lambda module, monkeypatch: None, "", ""),
    "another class": (put("attn.proj", lambda: Adapter(32, 32)), "attn.proj is a Adapter, which may", ""),
    "another body": (put("mlp", nn.Identity), "", "mlp is a Identity, which may compute something else"),
    "another role": (put("norm2", nn.Identity), "", "norm2 is a Identity, which may compute something else"),
    "a patched class": (patch(nn.GELU), "", "the class of mlp.act, GELU, was patched"),
    "a patched class of ours": (patch(Mlp), "", "the class of mlp, Mlp, was patched"),
    "a hook": (listen("attn.qkv"), "somebody listens to attn.qkv", ""),
    "a pre-hook": (listen("norm1", "register_forward_pre_hook"), "somebody listens to norm1", ""),
    "a backward hook": (listen("mlp", "register_full_backward_hook"), "", "somebody listens to mlp"),
    "a backward pre-hook": (listen("mlp.act", "register_full_backward_pre_hook"), "", "somebody listens to mlp.act"),
    "a patched instance": (patch_instance, "", "somebody listens to mlp.fc1, or patched it"),
    "a compiled part": (lambda m, _: m.mlp.act.compile(), "", "somebody listens to mlp.act, or patched it"),
    "a strange weight": (
        set_weight("attn.qkv.weight", lambda w: w.detach().as_subclass(Scaled)),
        "a weight of attn.qkv is no ordinary tensor",
        "",
    ),
    "a strange bias": (
        set_weight("norm2.bias", lambda w: w.detach().as_subclass(Scaled)),
        "",
        "a weight of norm2 is no ordinary tensor",
    ),
    "a norm without bias": (put("norm1", lambda: nn.LayerNorm(32, bias=False)), "norm1 is no affine LayerNorm", ""),
    "a norm of more": (put("norm1", lambda: nn.LayerNorm((9, 32))), "norm1 normalises more than the channels", ""),
    "a norm of another width": (put("norm2", lambda: nn.LayerNorm(16)), "", "norm2 is not for its input"),
    "another dtype": (
        set_weight("mlp.fc2.weight", torch.Tensor.double),
        "",
        "mlp.fc2 has another dtype than its input",
    ),
    "a dropout that acts": (
        lambda m, _: (setattr(m.attn.proj_drop, "p", 0.1), m.attn.proj_drop.train()),
        "attn.proj_drop drops",
        "",
    ),
    "attention dropout": (
        lambda m, _: (setattr(m.attn.attn_drop, "p", 0.1), m.attn.attn_drop.train()),
        "attn.attn_drop drops",
        "",
    ),
    "an implementation": (lambda m, _: setattr(m.attn, "impl", "sdpa"), "an impl of attn was asked for", ""),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_have_reasons_and_modules_are_called(case, monkeypatch):
    change, *wanted = RULES[case]
    module, x = layer(), torch.randn(2, 4, 9, 32)
    change(module, monkeypatch)
    for got, want in zip(reasons(module, x), wanted, strict=True):
        assert got.startswith(want) if want else not got
    if case in ("another dtype", "a norm of another width"):
        with pytest.raises(RuntimeError) as refused:
            step_by_step(module, x)
        with pytest.raises(RuntimeError) as here:
            module(x)
        assert str(here.value) == str(refused.value)
    else:
        torch.manual_seed(0)
        expected = step_by_step(module, x)
        torch.manual_seed(0)
        assert relative_error(module(x), expected) < 1e-6


def test_nothing_is_fused_where_all_modules_are_called(monkeypatch):
    x = torch.randn(2, 1, 4, 32)
    assert fusion.everywhere(x) is None
    assert "no ordinary tensor" in str(fusion.everywhere(x.as_subclass(Scaled)))
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    assert str(fusion.everywhere(x)) == "somebody listens to all modules"
    handle.remove()
    torch.func.vmap(lambda x: seen.append(fusion.everywhere(x)) or x)(x) if (seen := []) is not None else None
    assert str(seen[0]) == "torch.func is transforming"
    seen.clear()
    torch.jit.trace(lambda x: seen.append(fusion.everywhere(x)) or x + 1, x)
    assert str(seen[0]) == "torch.jit is tracing"
    with monkeypatch.context() as patched:
        sdpa = nn.functional.scaled_dot_product_attention
        patched.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: sdpa(*args, **kwargs))
        assert str(fusion.everywhere(x)) == "a function of torch.nn.functional was patched"
    original = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: original(self, *args))
    assert str(fusion.everywhere(x)) == "the call of nn.Module was patched"


def test_a_method_that_was_patched_before_is_not_taken_for_the_librarys(monkeypatch):
    class Mine(nn.Linear):
        pass

    assert fusion.as_written("linear", Mine).methods == ((Mine, "forward", nn.Linear.forward),)
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(nn.Linear.forward)(lambda self, x: x))
    ((_, _, method),) = fusion.as_written("linear", nn.Linear).methods
    assert method is not nn.Linear.forward


@pytest.mark.parametrize("rate", [0.3, 0.999])
def test_stochastic_depth_computes_only_what_it_keeps(rate, monkeypatch):
    """The same samples, outputs and gradients as the module drops; where all are dropped, zeros and not None."""
    module, x = layer(drop_path=rate).train(), torch.randn(12, 2, 9, 32)
    computed = []
    operation = fusion._operation
    monkeypatch.setattr(fusion, "_operation", lambda x, *args: computed.append(len(x)) or operation(x, *args))
    results = []
    for function in (module, functools.partial(step_by_step, module)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    assert len(computed) == 2
    assert max(computed) < 12
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
    pairs = [fusion.halves(module, KNOWN) for module in layers]
    for function in (
        functools.partial(fusion.chained, layers=pairs),
        lambda x: functools.reduce(lambda x, module: module(x), layers, x),
    ):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *parameters])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_attention_dropout_shows_its_weights_to_who_asks():
    module, x = nest_fast.BlockAttention(32, 4), torch.randn(2, 3, 9, 32)
    plain, seen = module(x), []
    module.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out))
    assert relative_error(module(x), plain) < 1e-6
    (weights,) = seen
    assert weights.shape == (2, 4, 3, 9, 9)  # as timm lays them out: heads before blocks
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3, 9))
    module.impl = "sdpa"
    with pytest.raises(RuntimeError, match="impl: 'sdpa' cannot run block_attention here: somebody listens"):
        module(x)


def test_methods_of_a_subclass_are_called():
    class Own(nest_fast.NesT):
        def forward_head(self, x, pre_logits=False):
            return super().forward_head(x, pre_logits) * 2

    plain, x = small_nest(), torch.randn(2, 3, 32, 32)
    own = small_nest()
    own.load_state_dict(plain.state_dict())
    own.__class__ = Own
    torch.testing.assert_close(own(x), plain(x) * 2)


def test_deciding_costs_little():
    """Under 100 calls of Python functions a layer: the bound is a count, since times are noise here."""
    import sys

    module, x, calls = layer(), torch.randn(1, 1, 4, 32), []
    sys.setprofile(lambda frame, event, arg: calls.append(event) if event == "call" else None)
    fusion.everywhere(x)
    decisions = [half.why_not(x) for half in fusion.halves(module, KNOWN)]
    sys.setprofile(None)
    assert decisions == [None, None]
    assert len(calls) < 100


# --- explain ----------------------------------------------------------------------------------------------------------


def small_nest(**kwargs):
    dims = {"img_size": 32, "num_levels": 2, "embed_dims": (32, 64), "num_heads": 2, "depths": 1, "num_classes": 5}
    return nest_fast.NesT(**dims, drop_path_rate=0.0, **kwargs).eval()


def test_explain_says_how_every_step_is_computed_and_why():
    model = small_nest()
    model.levels[0].transformer_encoder[0].attn.qkv.register_forward_hook(lambda *args: None)
    model.levels[1].pool.conv = nn.Conv2d(32, 64, 3, padding=1, padding_mode="circular")
    rows = {(row.name, row.what): row for row in nest_fast.explain(model)}
    assert [name for name, _ in rows] == [
        "patch_embed",
        *["levels.0.transformer_encoder.0"] * 2,
        "levels.1.pool",
        *["levels.1.transformer_encoder.0"] * 2,
    ]
    attention = rows["levels.0.transformer_encoder.0", "attn sub-layer"]
    assert attention.why == "somebody listens to attn.qkv, or patched it"
    assert attention.how.startswith("its modules; block_attention: ")
    assert rows["levels.1.pool", "aggregation"].why == "conv pads otherwise than with zeros"
    in_double = nest_fast.explain(small_nest().double(), torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    why = [row.why for row in in_double if row.what == "mlp sub-layer"]
    assert all("dtype torch.float64 is none of float32, float16, bfloat16" in reason for reason in why)
    assert "why not faster" in str(in_double).splitlines()[0]


def test_explain_names_missing_compiled_parts(monkeypatch):
    from nest_fast.ops import _extension

    monkeypatch.setattr(_extension, "cpu_error", "nest_fast/_C_cpu.abi3.so is not built")
    explained = nest_fast.explain(small_nest())
    assert explained.missing == (f"nest_fast/_C_cpu.abi3.so is not built; {_extension.COSTS['cpu']}",)
    assert all("is not built" in row.why for row in explained)


def test_explain_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        nest_fast.explain("nest_tiny")
    with pytest.raises(TypeError, match=r"x: expected a tensor \(B, C, H, W\), got int"):
        nest_fast.explain(small_nest(), 3)


def test_norms_in_float32_are_fused_beside_half_precision():
    module, x = layer().bfloat16(), torch.randn(2, 1, 4, 32).bfloat16()
    module.norm1.float(), module.norm2.float()
    assert reasons(module, x) == ["", ""]
    assert relative_error(module(x), step_by_step(module, x)) < 0.01
    module.norm1.bias.data = module.norm1.bias.data.bfloat16()
    assert reasons(module, x)[0] == "norm1 has another dtype than its input"
