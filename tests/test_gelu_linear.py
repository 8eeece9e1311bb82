"""What a layer keeps for its gradient on a GPU, and the MLP's second linear layer that keeps no activation for it."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nest_fast
from helpers import twins
from helpers.common import DEVICE, assert_stays_inside_its_buffers
from helpers.passes import assert_accurate, differentiate, strided
from helpers.pretend_gpu import pretend_gpu
from nest_fast import fusion
from nest_fast.kernels.bias_gelu import gelu_linear_bwd
from nest_fast.modules import KNOWN, TransformerLayer
from nest_fast.ops import _tuned
from nest_fast.testing import import_timm

import_timm()

OPS = torch.ops.nest_fast
NAMES = ("x", "bias", "weight", "weight_bias")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing to pretend")


def plain(tanh):
    approximate = "tanh" if tanh else "none"

    def function(x, bias, weight, weight_bias):
        hidden = torch.nn.functional.gelu(x if bias is None else x + bias, approximate=approximate)
        return torch.nn.functional.linear(hidden, weight, weight_bias)

    return function


def ours(tanh):
    return lambda x, bias, weight, weight_bias: OPS.gelu_linear_triton_fwd(x, bias, tanh, weight, weight_bias)


def draw(*sizes, out=40, dtype=torch.float32, biases=True):
    C = sizes[-1]
    given = torch.randn(sizes), torch.randn(C), torch.randn(out, C) * max(C, 1) ** -0.5, torch.randn(out)
    x, bias, weight, weight_bias = (t.to(DEVICE, dtype) for t in given)
    return [x, bias if biases else None, weight, weight_bias if biases else None]


@pytest.mark.parametrize(
    ("sizes", "dtype", "tanh", "biases"),
    [
        ((2, 3, 50, 200), torch.float32, False, True),
        ((3, 70, 100), torch.float16, True, True),
        ((130, 384), torch.bfloat16, False, False),
        ((1, 300, 24), torch.bfloat16, True, True),
    ],
    ids=str,
)
def test_is_as_accurate_as_pytorch(sizes, dtype, tanh, biases):
    inputs = draw(*sizes, dtype=dtype, biases=biases)
    dout = torch.randn(*sizes[:-1], 40, device=DEVICE).to(dtype)
    results = [differentiate(function(tanh), inputs, [dout]) for function in (ours, plain)]
    wide = [x if x is None else x.double() for x in inputs]
    golden = differentiate(plain(tanh), wide, [dout.double()])
    names = ("out", *(name for name, x in zip(NAMES, inputs, strict=True) if x is not None))
    assert_accurate(names, *results, golden, 1)


def test_each_gradient_alone():
    """Or two; the others keep their bits, and nothing else is computed."""
    inputs = draw(3, 50, 24)
    dout = torch.randn(3, 50, 40, device=DEVICE)
    together = gelu_linear_bwd(dout, *inputs[:2], False, inputs[2], [True] * 4)
    for wanted in ((0,), (1,), (2,), (3,), (0, 2), (1, 3)):
        leaves = [x.clone().requires_grad_(n in wanted) for n, x in enumerate(inputs)]
        ours(False)(*leaves).backward(dout)
        assert [x.grad is not None for x in leaves] == [n in wanted for n in range(4)]
        assert all(torch.equal(leaves[n].grad, together[n]) for n in wanted)


def test_repeats_bit_by_bit_and_takes_any_strides():
    inputs = draw(3, 50, 136, dtype=torch.bfloat16)
    dout = torch.randn(3, 50, 40, device=DEVICE).bfloat16()
    first = differentiate(ours(True), inputs, [dout])
    for other in (dout, *strided(dout)):
        assert all(map(torch.equal, differentiate(ours(True), inputs, [other]), first))
    for other in strided(inputs[0]):
        assert all(map(torch.equal, differentiate(ours(True), [other, *inputs[1:]], [dout]), first))


def test_stays_inside_its_buffers():
    inputs = draw(45, 100)
    dout = torch.randn(45, 40, device=DEVICE)

    def everything(copy):
        x, bias, weight, _ = map(copy, inputs)
        return gelu_linear_bwd(copy(dout), x, bias, False, weight, [True] * 4)

    assert_stays_inside_its_buffers(everything)


@pytest.mark.parametrize("sizes", [(0, 24), (3, 0)], ids=str)
def test_of_nothing(sizes):
    inputs = draw(*sizes)
    dout = torch.randn(*sizes[:-1], 40, device=DEVICE)
    results = [differentiate(function(False), inputs, [dout]) for function in (ours, plain)]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_opcheck_and_flops():
    inputs = draw(3, 5, 24)
    for biases in (True, False):
        given = [x if biases or n % 2 == 0 else None for n, x in enumerate(inputs)]
        leaves = [x if x is None else x.clone().requires_grad_() for x in given]
        torch.library.opcheck(OPS.gelu_linear_triton_fwd.default, (*leaves[:2], True, *leaves[2:]))
        dout = torch.randn(3, 5, 40, device=DEVICE)
        for mask in ([True, biases, True, biases], [False, biases, False, False]):
            torch.library.opcheck(OPS.gelu_linear_triton_bwd.default, (dout, *given[:2], False, given[2], mask))
    counted = []
    for function in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            differentiate(function(False), inputs, [torch.randn(3, 5, 40, device=DEVICE)])
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_refuses_gradients_of_gradients():
    leaves = [x.requires_grad_() for x in draw(3, 24)]
    (dx,) = torch.autograd.grad(ours(False)(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="impl: expected 'reference' for a derivative of the GELU"):
        dx.square().sum().backward()


# --- what a layer keeps -----------------------------------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize(
    ("keep_gelu", "forced", "units"),
    [(True, {}, 16), (False, {}, 12), (True, {"mlp_layer": "triton"}, 7)],
    ids=["all", "no activation", "the MLP's input alone"],
)
def test_how_much_a_layer_in_a_chain_keeps(keep_gelu, forced, units):
    """In tensors of x's size: x and what is normalised, twice; q, k and v; what is attended; the hidden features.

    Statistics, and the sums of attention's weights, are a quarter of such a tensor.
    """
    kept = []
    for count in (1, 2):
        encoder = torch.nn.Sequential(*(TransformerLayer(64, 2, qkv_bias=True) for _ in range(count))).half()
        x = torch.randn(2, 1, 16, 64, dtype=torch.float16, requires_grad=True)
        weights = {parameter.data_ptr() for parameter in encoder.parameters()}
        storages = {}

        def pack(saved, weights=weights, storages=storages):
            storage = saved.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return saved, storage  # whose memory is nobody else's then

        with (
            pretend_gpu(),
            _tuned.forced(**forced),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]),
        ):
            out = fusion.run_layers(x, encoder, KNOWN, keep_gelu)
        out.sum()  # is there until here, and so is what it keeps
        kept.append(sum(storages.values()))
    assert units <= (kept[1] - kept[0]) / x.nbytes < units + 0.5


@needs_no_gpu
@pytest.mark.parametrize("mode", ["half", "autocast"])
@pytest.mark.parametrize("kind", ["timm's", "NesT"])
def test_a_model_that_keeps_no_activation_has_the_same_gradients(kind, mode):
    """And its output the same bits."""
    sizes = {"embed_dims": (16, 32), "num_heads": (1, 2), "depths": (1, 1), "drop_path_rate": 0.5}
    x = twins.image(dtype=torch.float16 if mode == "half" else torch.float32)
    results = []
    for kept in (False, "gelu"):
        model = (twins.plain_model if kind == "timm's" else twins.nest_model)(**sizes).to(x.dtype).train()
        if kind == "timm's":
            nest_fast.accelerate(model)
        model.set_grad_checkpointing(kept)
        with pretend_gpu(autocast=torch.float16 if mode == "autocast" else None) as calls:
            results.append(twins.run(model, x))
        counted = Counter(name for name, _ in calls)
        backward = counted["gelu_linear_triton_bwd"], counted["bias_gelu_triton_bwd"]
        assert backward == ((2, 0) if kept else (0, 2))
    kept, again = results
    assert torch.equal(kept.out[0], again.out[0])
    for name, wanted in kept.grads.items():
        torch.testing.assert_close(again.grads[name], wanted, rtol=2e-3, atol=1e-4)


def test_what_a_model_may_recompute_is_checked():
    with pytest.raises(ValueError, match="enable: expected one of True, False, 'gelu', got 'relu'"):
        nest_fast.NesT(
            img_size=16, num_levels=2, patch_size=2, embed_dims=32, num_heads=1, depths=1
        ).set_grad_checkpointing("relu")
