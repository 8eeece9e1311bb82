"""NesT as a model: sizes, arguments, training, torch features, and what it says about bad input."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import nest_fast
from nest_fast.testing import relative_error

SMALL = {"img_size": 32, "embed_dims": (32, 64), "num_heads": (2, 4), "depths": (1, 2), "num_levels": 2}


def small(**kwargs):
    torch.manual_seed(1)
    return nest_fast.NesT(**{**SMALL, "num_classes": 5, "drop_path_rate": 0.0, **kwargs}).eval()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nest_tiny", 17_057_608),
        ("nest_small", 38_351_176),
        ("nest_base", 67_723_368),
        ("nest_tiny_s16_32", 6_006_730),
    ],
)
def test_parameter_counts(name, parameters):
    model = getattr(nest_fast, name)(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_default_rates_are_the_authors():
    rates = {}
    for name in ("nest_tiny", "nest_small", "nest_base", "nest_tiny_s16_32"):
        model = getattr(nest_fast, name)(device="meta")
        layers = [layer for level in model.levels for layer in level.transformer_encoder]
        rates[name] = (layers[0].drop_path1.drop_prob, layers[-1].drop_path2.drop_prob)
    assert rates == {
        "nest_tiny": (0.0, pytest.approx(0.2)),
        "nest_small": (0.0, pytest.approx(0.3)),
        "nest_base": (0.0, pytest.approx(0.5)),
        "nest_tiny_s16_32": (0.0, pytest.approx(0.1)),
    }


@pytest.mark.parametrize("options", [{}, {"padding": "same", "gelu": "tanh", "multi_query": True}])
def test_a_rectangle_is_computed_block_by_block(options):
    """At 64 x 32 px blocks are 8 x 4 tokens; the model is the reference's operations put together by hand."""
    model = small(img_size=(64, 32), **options).double()
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    ref, gelu = nest_fast.reference, "tanh" if options else "none"
    y = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
    y = ref.blockify(y.permute(0, 2, 3, 1), (8, 4))
    for i, level in enumerate(model.levels):
        if i > 0:
            conv, norm = level.pool.conv, level.pool.norm
            y = ref.block_aggregate(
                y, conv.weight, conv.bias, norm.weight, norm.bias,
                grid_size=2, block_size=(8, 4), padding=options.get("padding", "symmetric"),
            )  # fmt: skip
        y = y + level.pos_embed
        for layer in level.transformer_encoder:
            attn, heads = layer.attn, layer.attn.num_heads
            kv_heads = 1 if options else heads
            packed = attn.qkv(layer.norm1(y)).unflatten(-1, (heads + 2 * kv_heads, -1))
            out = ref.block_attention(*packed.split((heads, kv_heads, kv_heads), 3))
            y = y + attn.proj(out.transpose(-1, -2).flatten(-2))
            y = y + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(y)), approximate=gelu))
    logits = model.head(model.norm(y).mean((1, 2)))
    torch.testing.assert_close(model(x), logits)


def test_every_impl_computes_the_same():
    x = torch.randn(2, 3, 32, 32)
    golden = small(impl="reference").double()(x.double())
    for impl in ("auto", "reference"):
        assert relative_error(small(impl=impl)(x), golden) < 1e-5, impl
    with pytest.raises(ValueError, match="impl: expected one of 'auto', 'reference', got 'sdpa'"):
        small(impl="sdpa")  # there is none for all operations, and a model does not fall back


def test_trains_with_checkpointing_and_stochastic_depth():
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    grads = []
    for checkpointing in (False, True):
        model = small(drop_path_rate=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        F.cross_entropy(model(x), target).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    model = small(drop_path_rate=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("dtype", "bound", "training"),
    [(torch.float32, 1e-5, True), (torch.bfloat16, 0.02, False)],
    ids=["fp32, training", "bf16, inference"],
)
def test_compiles_in_one_graph_and_exports_with_a_dynamic_batch(dtype, bound, training):
    model = small().to(dtype).train(training).requires_grad_(training)
    batches = [torch.randn(b, 3, 32, 32, dtype=dtype) for b in (2, 3, 4, 5, 7)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for x in batches:
        assert relative_error(compiled(x), model(x)) < bound
    assert counter.frame_count <= 2
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (batches[0],), dynamic_shapes=({0: batch},)).module()
    assert relative_error(exported(batches[3]), model(batches[3])) < bound


def test_torch_func_takes_gradients_per_sample():
    model, x = small(), torch.randn(3, 3, 32, 32)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-5)


def test_forward_mode():
    """Kernels have no forward-mode derivatives and would lose them without a word: nothing on the way may be one."""
    model, plain, x = small(), small(impl="reference"), torch.randn(2, 3, 32, 32)
    _, wanted = torch.func.jvp(plain, (x,), (x,))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (x,))[1], wanted)
    for requires_grad in (True, False):
        model.requires_grad_(requires_grad)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent
            torch.testing.assert_close(tangent, wanted)


def test_an_explicit_kernel_says_that_it_has_no_forward_mode():
    x = torch.randn(1, 4, 16, 8)
    weights = torch.ones(8), torch.ones(8), torch.ones(8, 8), None, torch.ones(8, 8), None
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, x)
        q = x.unflatten(-1, (2, 4))
        for call in (
            lambda: nest_fast.block_attention(q, q, q, impl="cpp"),
            lambda: nest_fast.block_attention(q, q, q, impl="triton"),
            lambda: nest_fast.mlp_layer(x, *weights, impl="cpp"),
            lambda: nest_fast.block_aggregate(
                x, torch.ones(8, 8, 3, 3), None, *weights[:2], grid_size=2, impl="two_step"
            ),
            lambda: nest_fast.bias_gelu(x, None, impl="triton"),
            lambda: nest_fast.linear(x, weights[2], impl="onednn"),
        ):
            with pytest.raises(RuntimeError, match="it has no forward-mode derivative"):
                call()


def test_copies_and_pickles():
    model, x = small(), torch.randn(2, 3, 32, 32)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)


def test_autocast_and_low_precision():
    model, x = small(), torch.randn(4, 3, 32, 32)
    golden = model.double()(x.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, golden) < 0.02
    low = small(dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    assert relative_error(low(x.bfloat16()), golden) < 0.02


def test_device_and_dtype_arguments_and_the_empty_batch():
    model = small(dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {p.device.type for p in small(device="meta").parameters()} == {"meta"}
    assert model(torch.randn(0, 3, 32, 32, dtype=torch.float64)).shape == (0, 5)


def test_position_embeddings_do_not_decay():
    model = small()
    names = dict(model.named_parameters())
    assert model.no_weight_decay() == {"levels.0.pos_embed", "levels.1.pos_embed"}
    assert model.no_weight_decay() <= names.keys()


def test_reset_classifier_and_pooled_features():
    model, x = small(), torch.randn(2, 3, 32, 32)
    model.reset_classifier(0)
    features = model(x)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(9, "catavgmax")
    assert model(x).shape == (2, 9)
    assert model.num_classes == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 30}, r"img_size: expected multiples of patch_size .* = 8, got \(30, 30\)"),
        ({"img_size": "32"}, r"img_size: expected an int or a pair of ints, got '32'"),
        ({"num_heads": (2, 3)}, r"num_heads: expected a divisor of dim = 64, got 3"),
        ({"depths": (1, 2, 3)}, r"depths: expected one value for each of 2 levels, got \(1, 2, 3\)"),
        ({"padding": "valid"}, r"padding: expected one of 'symmetric', 'same', got 'valid'"),
        ({"padding": "symmetric", "pad_type": "same"}, r"padding: expected 'same' as pad_type says, got 'symmetric'"),
        ({"gelu": "fast"}, r"gelu: expected one of 'exact', 'tanh', got 'fast'"),
        ({"act_layer": nn.ReLU, "gelu": "tanh"}, r"gelu: expected 'exact', since act_layer is given, got 'tanh'"),
        ({"norm_layer": nn.RMSNorm}, r"norm_layer: expected one that builds an affine torch.nn.LayerNorm, got RMSNorm"),
        ({"global_pool": "mean"}, r"global_pool: expected one of 'avg', 'max', 'avgmax', 'catavgmax', '', got 'mean'"),
        ({"weight_init": "jax"}, r"weight_init: expected one of '', 'nlhb', got 'jax'"),
        ({"impl": "cudnn"}, r"impl: expected one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        small(**arguments)
    assert "\n" not in str(error.value)


def test_bad_images_and_indices():
    model = small()
    wanted = r"x: expected shape \(B, 3, 32, 32\) as in_chans and img_size say, got \(1, 3, 64, 32\)"
    with pytest.raises(ValueError, match=wanted):
        model(torch.randn(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions \(B, C, H, W\), got shape \(3, 32, 32\)"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match=r"indices: expected some of the 2 levels, got \[2\]"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), [2])
    with pytest.raises(ValueError, match=r"output_fmt: expected one of 'NCHW', got 'NHWC'"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NHWC")


@pytest.mark.parametrize("training", [False, True])
def test_reference_is_plain_pytorch_throughout(training, monkeypatch):
    monkeypatch.delattr("nest_fast.nest.layer_norm_mean")  # plain PyTorch on a CPU, but not everywhere
    model = nest_fast.nest_tiny_s16_32(impl="reference").train(training)
    x = torch.randn(1, 3, 32, 32)
    with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
        model(x)
    called = {event.key for event in profile.key_averages()}
    assert "aten::gelu" in called
    assert not {key for key in called if key.startswith(("nest_fast::", "mkldnn::_linear"))}


def test_checkpointing_recomputes_in_eval_mode_too():
    """As timm does: who asks for gradients there has no more memory than in training."""
    model, calls = small().eval(), []
    model.set_grad_checkpointing()
    model.levels[0].transformer_encoder[0].norm1.register_forward_hook(lambda *args: calls.append(1))
    model(torch.randn(1, 3, 32, 32, requires_grad=True)).sum().backward()
    assert len(calls) == 2
