"""What is written down of a chain of layers on a GPU and done again, and when it is not."""

import contextlib
import copy
import gc
import itertools
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import nest_fast
from helpers import twins
from helpers.common import CPP_ISA, run_python
from helpers.pretend_gpu import pretend_gpu
from nest_fast import fusion, modules
from nest_fast.ops import _tape, _tuned
from nest_fast.testing import import_timm

import_timm()
from timm.models.swin_transformer import SwinTransformerBlock  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing to pretend")

# Levels of one layer and of two, which are a first of a chain, a last one and both.
SMALLER = {"embed_dims": (16, 32), "num_heads": (1, 2), "depths": (1, 2)}
LAYERS = sum(SMALLER["depths"])
# In half precision a layer takes and returns complete sums: those of a level are alike, and one tape is for both.
KINDS = {torch.float32: LAYERS, torch.float16: len(SMALLER["depths"])}


@pytest.fixture(autouse=True)
def no_tapes(monkeypatch):
    """And what is seen for the first time is written down, too."""
    _tape.TAPES.clear()
    monkeypatch.setattr(_tape, "is_new", lambda key: False)


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by each layer that no tape computes."""
    calls, own = [], fusion.chained_layer
    monkeypatch.setattr(fusion, "chained_layer", lambda *args: calls.append(1) or own(*args))
    return calls


def model(kind="NesT", dtype=torch.float32):
    made = twins.nest_model(**SMALLER) if kind == "NesT" else twins.accelerated(twins.plain_model(**SMALLER))
    return made.to(dtype)


class Chain(nn.Sequential):
    """Two layers, as a level of a model runs them, without what is around them."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(*(modules.TransformerLayer(16, 2, head_minor=True) for _ in range(2)))
        self.eval()

    def forward(self, x):
        return fusion.run_layers(x, self, {**modules.KNOWN, Chain: fusion.as_written("sequential", nn.Sequential)})


def run(module, x):
    with pretend_gpu(listens=False), torch.no_grad():
        return module(x)


def as_written(module, x):
    """Without a tape."""
    with pretend_gpu(), torch.no_grad():
        return module(x)


def test_a_tape_has_its_own_tensors_copied():
    """The descriptors of a launch are of the tensors that are given now."""
    net, images = model(dtype=torch.float16), twins.image(dtype=torch.float16)
    with _tuned.forced(mlp_layer="parts", projection_mlp="parts", linear="triton"):
        first = run(net, images)
        assert None not in _tape.TAPES.values()
        again = run(net, 2 * images)
        assert not torch.equal(again, first)
        assert torch.equal(again, as_written(net, 2 * images))


@pytest.mark.parametrize("kind", ["NesT", "timm's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_tape_computes_what_the_layers_do(kind, dtype, computed):
    """Bit by bit, of other images and in half precision by kernels for whole sub-layers; and reads the weights anew."""
    net, images = model(kind, dtype), twins.image(dtype=dtype)
    first = run(net, images)
    assert len(computed) == KINDS[dtype]
    assert torch.equal(first, as_written(net, images))
    for change in range(2):
        if change:
            with torch.no_grad():
                for weight in net.parameters():
                    weight.mul_(1.25)
        computed.clear()
        again = run(net, images.flip(-1))
        assert computed == []
        assert torch.equal(again, as_written(net, images.flip(-1)))
        assert not torch.equal(again, first)


def _with_data(change):
    def act(layer):
        for weight in layer.parameters():
            weight.data = change(weight.data)

    return act


def _hook(layer):
    layer.mlp.fc1.register_forward_hook(lambda module, args, out: out * 2)


def _replaced(layer):
    layer.mlp.fc1 = copy.deepcopy(layer.mlp.fc1)
    with torch.no_grad():
        layer.mlp.fc1.weight.mul_(2)


def _patched(layer):
    layer.attn.forward = lambda x: x


@pytest.mark.parametrize(
    ("act", "layers"),
    [
        (_with_data(lambda x: x * 2), 0),
        (_with_data(lambda x: (x * 2).t().contiguous().t() if x.dim() == 2 else x), 1),  # other strides
        (_replaced, 0),
        (_hook, 0),
        (_patched, 0),
        (lambda layer: setattr(layer.norm2, "eps", 1.0), 1),
        (lambda layer: setattr(layer.attn, "scale", 2.0), 1),
        (lambda layer: setattr(layer.attn, "head_minor", False), 1),
        (lambda layer: setattr(layer.mlp, "act", nn.GELU(approximate="tanh")), 1),
        (lambda layer: setattr(layer.mlp, "act", nn.Identity()), 0),
        (lambda layer: setattr(layer.attn.qkv, "bias", None), 1),
    ],
    ids=[
        *("data", "strides", "module replaced", "hook", "patched", "eps", "scale", "order of heads"),
        *("tanh", "no activation", "no bias"),
    ],
)
def test_what_a_user_does_between_two_calls_counts(act, layers, computed):
    """And as many of the two ``layers`` are computed anew; where one cannot be chained, no tape is asked."""
    chain, x = Chain(), torch.randn(1, 1, 16, 16)
    before = run(chain, x)
    act(chain[1])
    computed.clear()
    after = run(chain, x)
    assert len(computed) == layers
    assert torch.equal(after, as_written(chain, x))
    assert not torch.equal(after, before)


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["gradients", "autocast", "profiler", "function mode", "watched", "samples"])
def test_in_other_modes_layers_are_computed_as_they_are_written(mode, computed):
    """And where samples are dropped, by random numbers."""
    chain, x = Chain(), torch.randn(2, 1, 16, 16)
    run(chain, x)
    computed.clear()
    contexts = {
        "gradients": torch.enable_grad,
        "profiler": torch.profiler.profile,
        "function mode": _Mode,
        "watched": _tuned.watched,
    }
    if mode == "samples":
        for layer in chain.train():
            layer.drop_path1.drop_prob = 0.5
    autocast = torch.float16 if mode == "autocast" else None
    with torch.no_grad(), pretend_gpu(listens=False, autocast=autocast), contexts.get(mode, torch.no_grad)():
        chain(x)
    assert len(computed) == 2


@pytest.mark.parametrize("where", ["a GPU", "a CPU", "a CPU, frozen"])
def test_a_sub_layer_by_itself_is_on_tape_too(where, monkeypatch):
    """Swin's, with shifted windows and a bias, which is made anew in every call."""
    called = []
    for name in ("attention_layer", "mlp_layer"):
        own = getattr(fusion, name)
        monkeypatch.setattr(fusion, name, lambda *args, own=own, **options: called.append(1) or own(*args, **options))
    torch.manual_seed(1)
    block = SwinTransformerBlock(16, (8, 8), num_heads=2, window_size=4, shift_size=2).eval()
    plain = copy.deepcopy(block)
    nest_fast.accelerate(block)
    if where == "a CPU, frozen":
        nest_fast.freeze(block)

    def run(module, x):
        with pretend_gpu(listens=False) if where == "a GPU" else contextlib.nullcontext(), torch.no_grad():
            return module(x)

    for _ in range(3):
        x = torch.randn(2, 8, 8, 16)
        called.clear()
        out = run(block, x)
        torch.testing.assert_close(out, run(plain, x))
    assert called == []
    with torch.no_grad():
        block.attn.relative_position_bias_table.add_(torch.randn_like(block.attn.relative_position_bias_table))
        block.mlp.fc1.weight.mul_(2)
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(run(block, x), run(plain, x))
    assert not torch.equal(run(block, x), out)
    assert called == ([1] if where == "a CPU, frozen" else [])  # which packs fc1 anew
    block.shift_size, block.attn_mask = (0, 0), None
    plain.shift_size, plain.attn_mask = (0, 0), None
    torch.testing.assert_close(run(block, x), run(plain, x))


def test_what_is_measured_later_counts(computed):
    chain, x = Chain().half(), torch.randn(1, 1, 16, 16).half()
    run(chain, x)
    computed.clear()
    with _tuned.forced(mlp_layer="parts"):
        parts = run(chain, x)
    assert len(computed) == 2
    computed.clear()
    whole = run(chain, x)
    assert len(computed) == 1  # the tapes before are of another time; both layers are alike
    assert not torch.equal(parts, whole)


# --- what is no tape --------------------------------------------------------------------------------------------------

CONSTANT = torch.ones(4)


@pytest.mark.parametrize(
    ("compute", "is_written"),
    [
        (lambda x, y: F.linear(x, y), True),
        (lambda x, y: (x.contiguous().view(-1).add(y.flatten()), None), True),
        (lambda x, y: x, True),
        (lambda x, y: x.add_(y), False),  # writes what it is given
        (lambda x, y: x.mul(float(y.sum())), False),  # depends on a value
        (lambda x, y: x.add(CONSTANT), False),  # reads what is not given
        (lambda x, y: x + torch.rand(4), False),
        (lambda x, y: torch.zeros(4), False),
        (lambda x, y: x.data, False),
    ],
    ids=["linear", "views", "the input", "in place", "a value", "a constant", "random", "zeros", "no method"],
)
def test_only_what_depends_on_given_tensors_alone_is_written_down(compute, is_written):
    calls, outs = [], []
    for i in range(3):
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        expected = compute(x.clone(), y) if is_written else None

        def counted(x=x, y=y):
            calls.append(1)
            return compute(x, y)

        with torch.no_grad():
            out = _tape.again("key", (x, y), counted)
        outs.append(out)
        assert len(calls) == (1 if is_written else i + 1)
        if isinstance(expected, tuple):
            assert torch.equal(out[0], expected[0])
            assert out[1] is None
        elif expected is not None:
            assert torch.equal(out, expected)


def test_a_tensor_that_was_given_twice_is_not_taken_for_one():
    x, y = torch.randn(4), torch.randn(4)
    assert torch.equal(_tape.again("key", (x, x), lambda: x.add(x)), x + x)
    assert torch.equal(_tape.again("key", (x, y), lambda: x.add(y)), x + y)


def test_what_is_seen_once_is_not_written_down(monkeypatch):
    """Images of ever other sizes cost nothing but a key, of which only so many are remembered."""
    monkeypatch.undo()
    monkeypatch.setattr(_tape, "MAX_SEEN", 2)
    _tape.SEEN.clear()
    counts = []
    for key in (1, 1, 2, 3, 4, 2, 4):
        _tape.again(key, (torch.randn(2),), lambda: torch.empty(2))
        counts.append((len(_tape.TAPES), len(_tape.SEEN)))
    assert counts == [(0, 1), (1, 0), (1, 1), (1, 2), (1, 2), (1, 2), (2, 1)]


def test_there_are_only_so_many(monkeypatch):
    monkeypatch.setattr(_tape, "MAX_TAPES", 3)
    for key, _ in itertools.product(range(5), range(2)):
        x = torch.full((2,), float(key))
        assert torch.equal(_tape.again(key, (x,), lambda x=x: x.add(1)), x + 1)
    assert len(_tape.TAPES) == 3


def test_a_cpu_needs_no_triton_for_it():
    code = """
import sys, torch, nest_fast
from nest_fast.ops import _tape
model = nest_fast.NesT(img_size=16, num_levels=2, patch_size=2, embed_dims=32, num_heads=1, depths=1).eval()
images = torch.randn(2, 3, 16, 16)
with torch.no_grad():
    assert torch.equal(model(images), model(images))
print(sum(tape is not None for tape in _tape.TAPES.values()), "triton" in sys.modules)
"""
    assert run_python("-c", code, env={**os.environ, "TRITON_INTERPRET": "0"}).split() == [
        "4" if CPP_ISA else "2",
        "False",
    ]


def test_a_tape_keeps_no_tensor():
    given = [torch.randn(4)]
    _tape.again("key", given, lambda: given[0].mul(2).add(given[0]))
    seen = weakref.ref(given.pop())
    gc.collect()
    assert seen() is None
