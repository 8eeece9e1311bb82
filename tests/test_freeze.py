"""Frozen models: the same bits, weights packed once, and no change of a weight goes unseen."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nest_fast
from helpers.common import CPP_ISA, ISAS, instructions
from nest_fast.testing import import_timm

pytestmark = pytest.mark.skipif(not CPP_ISA, reason="the extension is not built, or the processor has no AVX2")
SIZES = {"img_size": 32, "embed_dims": (16, 32, 48), "num_heads": (1, 2, 4), "depths": (1, 1, 1), "num_classes": 5}
MODELS = ("NesT", "timm's NesT", "timm's ViT", "timm's Swin")


def build(kind="NesT"):
    """A model in which every part acts, LayerScale and head-minor projections among them."""
    timm = import_timm()
    if kind == "NesT":
        model = nest_fast.NesT(**SIZES)
    elif kind == "timm's NesT":
        model = timm.models.nest.Nest(**SIZES, num_levels=3)
    elif kind == "timm's ViT":
        vit = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "init_values": 0.5}
        model = timm.models.vision_transformer.VisionTransformer(img_size=32, **vit)
    else:
        swin = {"patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
        model = timm.models.swin_transformer.SwinTransformer(img_size=32, num_classes=5, **swin)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind != "NesT":
        nest_fast.accelerate(model)
    return model.eval()


def image(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def run(model, x):
    with torch.no_grad():
        return model(x)


def thawed(model, x):
    """What ``model`` gives with all weights as they are now; it stays frozen."""
    nest_fast.unfreeze(model)
    out = run(model, x)
    nest_fast.freeze(model)
    return out


def operations(model, x):
    with torch.autograd.profiler.profile() as profiler:
        run(model, x)
    return [event.name.partition("::")[2] for event in profiler.function_events if event.name.startswith("nest_fast::")]


@pytest.mark.parametrize("kind", MODELS)
def test_gives_the_same_bits_and_packs_once(kind):
    model, x = build(kind), image()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [run(model, image(batch)) for batch in (1, 2)]
    nest_fast.freeze(model)
    first = operations(model, x)
    layers = [name for name in first if name in ("attention_layer_cpp", "mlp_layer_cpp")]
    assert first.count("pack_linear") == 2 * len(layers) > 0
    assert first.count("pack_filters") == first.count("block_aggregate_cpp_fwd")
    assert not {"pack_linear", "pack_filters"} & set(operations(model, x))
    for batch, out in zip((1, 2), wanted, strict=True):
        assert torch.equal(run(model, image(batch)), out)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    nest_fast.unfreeze(model)
    assert "pack_linear" not in operations(model, x)
    assert torch.equal(run(model, x), wanted[1])


@pytest.mark.parametrize("isa", ISAS)
def test_gives_the_same_bits_in_every_dtype(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, x = build().to(dtype), image().to(dtype)
        with instructions(isa):
            nest_fast.freeze(model)
            run(model, x)
            assert torch.equal(run(model, x), thawed(model, x))


# --- every change is seen ---------------------------------------------------------------------------------------------


def new_parameter(module, p):
    module.weight = nn.Parameter(p.detach() + 0.1)


def new_data(module, p):
    p.data = p.data + 0.1


def transposed(module, p):
    """The same memory, of the same shape where it is a square."""
    p.data = p.data.transpose(0, 1) if p.shape[0] == p.shape[1] else p.data.flip(0)


def negated(module, p):
    """The same memory, whose numbers mean others."""
    p.data = torch._neg_view(p.data)


def in_place(module, p):
    with torch.no_grad():
        p.mul_(1.1)


def in_inference_mode(module, p):
    with torch.inference_mode():
        p.mul_(1.1)


def optimized(cls, **options):
    def step(module, p):
        optimizer = cls([p], lr=0.1, **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = None

    return step


def loaded(**options):
    return lambda module, p: module.load_state_dict({"weight": p.detach() + 0.1}, strict=False, **options)


CHANGES = {
    "in place": in_place,
    "in inference mode": in_inference_mode,
    "through data": lambda module, p: p.data.add_(0.1),
    "one number through a view of data": lambda module, p: p.data.view(-1)[-1:].fill_(7.0),
    "through detach": lambda module, p: p.detach().mul_(1.1),
    "through its storage": lambda module, p: p.untyped_storage().copy_((p.detach() + 0.1).untyped_storage()),
    "new data": new_data,
    "transposed data": transposed,
    "negated data": negated,
    "a new parameter": new_parameter,
    "load_state_dict": loaded(),
    "load_state_dict by assignment": loaded(assign=True),
    "another dtype and back": lambda module, p: module.to(torch.bfloat16).to(torch.float32),
    "SGD": optimized(torch.optim.SGD),
    "AdamW, foreach": optimized(torch.optim.AdamW, foreach=True),
    "AdamW, fused": optimized(torch.optim.AdamW, fused=True),
    "a vector of parameters": lambda module, p: nn.utils.vector_to_parameters(p.detach().flatten() + 0.1, [p]),
}
CHANGED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_a_weight_is_missed(change):
    model, x = build(), image()
    nest_fast.freeze(model)
    level = model.levels[2]
    layer = level.transformer_encoder[0]
    for module in (*(layer.get_submodule(name) for name in CHANGED), level.pool.conv):
        if change == "a new parameter" or not (change == "negated data" and module is level.pool.conv):
            before = run(model, x)
            CHANGES[change](module, module.weight)
            after = run(model, x)
            assert not torch.equal(after, before), module
            assert torch.equal(after, run(model, x))
            assert torch.equal(after, thawed(model, x))


def test_other_changes_than_of_weights_are_seen():
    """Flags, biases, and which modules there are."""
    model, x = build(), image()
    nest_fast.freeze(model)
    run(model, x)
    layer = model.levels[2].transformer_encoder[0]
    layer.attn.num_heads, layer.attn.scale = 2, 24**-0.5  # by which columns of proj are ordered
    assert torch.equal(run(model, x), thawed(model, x))
    layer.mlp.fc2.bias.data.add_(1.0)
    layer.attn.proj.bias = nn.Parameter(torch.ones(48))
    assert torch.equal(run(model, x), thawed(model, x))
    layer.mlp.fc1 = nn.Linear(48, 20)
    layer.mlp.fc2 = nn.Linear(20, 48)
    assert torch.equal(run(model, x), thawed(model, x))
    heard = []
    layer.mlp.fc2.register_forward_hook(lambda *call: heard.append(1))
    assert torch.equal(run(model, x), thawed(model, x))
    assert heard


def test_layer_scale_and_ties_are_seen():
    model, x = build("timm's ViT"), image()
    one, other = model.blocks
    other.mlp.fc1.weight = one.mlp.fc1.weight
    nest_fast.freeze(model)
    before = run(model, x)
    for p in (one.ls1.gamma, other.ls2.gamma, one.mlp.fc1.weight):
        p.data.mul_(1.1)
        after = run(model, x)
        assert not torch.equal(after, before)
        assert torch.equal(after, thawed(model, x))
        before = after


def test_reading_is_no_change():
    """But reading it as if to write it, as ``torch.save`` does, costs packing it once more and nothing else."""
    model, x = build(), image()
    nest_fast.freeze(model)
    wanted = run(model, x)
    torch.save(model.state_dict(), io.BytesIO())
    assert "pack_linear" in operations(model, x)
    assert "pack_linear" not in operations(model, x)
    model.state_dict()
    copy.deepcopy(model)
    [p.norm() + p.double().sum() for p in model.parameters()]
    assert "pack_linear" not in operations(model, x)
    assert torch.equal(run(model, x), wanted)


# --- what is frozen, and what is refused ------------------------------------------------------------------------------


def test_a_copy_is_not_frozen_and_a_model_that_is_gone_is_not_kept():
    model, x = build(), image()
    nest_fast.freeze(model)
    run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "pack_linear" not in operations(twin, x)
        assert torch.equal(run(twin, x), run(model, x))
        assert not any("frozen" in row.how for row in nest_fast.explain(twin, x))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_explain_says_frozen():
    model, x = build(), image()
    nest_fast.freeze(model)
    with torch.no_grad():
        rows = [row.how for row in nest_fast.explain(model, x) if "layer" in row.how or "aggregate" in row.how]
        assert len(rows) == 8
        assert all(row.endswith(", frozen") for row in rows)
    assert {row.how for row in nest_fast.explain(model, x) if "records gradients" in row.why} == {"an error"}
    nest_fast.unfreeze(model)
    assert not any("frozen" in row.how for row in nest_fast.explain(model, x))


def test_refuses_training_gradients_and_memory_that_cannot_be_watched():
    model, x = build(), image()
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int$"):
        nest_fast.freeze(3)
    with pytest.raises(ValueError, match=r"^model: expected eval mode, got training mode; model.eval\(\) switches$"):
        nest_fast.freeze(model.train())
    with pytest.raises(ValueError, match=r"^model: expected weights on a CPU, got meta, where none is packed$"):
        nest_fast.freeze(nest_fast.NesT(**SIZES, device="meta").eval())
    nest_fast.freeze(model.eval())
    with pytest.raises(RuntimeError, match=r"^model: expected torch.no_grad\(\) .* got a call that records gradients"):
        model(x)
    with pytest.raises(RuntimeError, match=r"^model: expected eval mode while it is frozen, got training mode"):
        run(model.train(), x)
    fc1 = model.eval().levels[0].transformer_encoder[0].mlp.fc1
    fc1.weight.data = torch.from_numpy(fc1.weight.detach().numpy().copy())
    with pytest.raises(RuntimeError, match=r"^model: expected weights in memory of PyTorch's own"):
        run(model, x)
    fc1.weight.data = fc1.weight.data.clone()
    assert torch.equal(run(model, x), thawed(model, x))
    nest_fast.unfreeze(model)
    model(x).sum().backward()


def test_under_other_modes_it_computes_as_if_it_were_not():
    model, x = build(), image()
    with FlopCounterMode(display=False) as plain:
        run(model, x)
    nest_fast.freeze(model)
    with FlopCounterMode(display=False) as counter:
        run(model, x)
    assert counter.get_total_flops() == plain.get_total_flops() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), model(x))
    with torch.inference_mode():
        kept = model(x)
    assert torch.equal(run(model, x), kept)


def test_operations_keep_what_they_are_told_to():
    x, vector, weight = torch.randn(3, 16), torch.ones(16), torch.randn(16, 16)
    call = (x, vector, vector, weight, vector, weight, vector)
    packed = {}
    out = nest_fast.mlp_layer(*call, packed=packed, impl="cpp")
    assert set(packed) == {("fc1", torch.float32), ("fc2", torch.float32)}
    assert torch.equal(out, nest_fast.mlp_layer(*call, impl="cpp"))
    with pytest.raises(TypeError, match=r"^packed: expected a dict or None, got list$"):
        nest_fast.mlp_layer(*call, packed=[])
    with pytest.raises(ValueError, match=r"^packed: expected None where gradients are recorded, got a dict$"):
        nest_fast.mlp_layer(x.requires_grad_(), *call[1:], packed={})
    wrong = {(name, torch.float32): torch.zeros(3, 7, 5) for name in ("fc1", "conv")}
    with pytest.raises(RuntimeError, match=r"fc1_weight: expected packed floats \(\d+, \d+, \d+\), got \("):
        nest_fast.mlp_layer(x.detach(), *call[1:], packed=wrong, impl="cpp")
    blocks, filters = torch.randn(1, 4, 4, 16), torch.randn(16, 16, 3, 3)
    with pytest.raises(RuntimeError, match=r"conv_packed: expected packed floats \(\d+, 16, \d+, \d+\), got \("):
        nest_fast.block_aggregate(blocks, filters, vector, vector, vector, packed=wrong, impl="cpp")
