"""The modules, each by itself: they are timm's of the same weights, and say what is wrong with their arguments.

What is computed around them, and when, is in test_fusion.py.
"""

import pytest
import torch
from torch import nn

import nest_fast
from nest_fast import reference
from nest_fast.modules import BlockAggregation, BlockAttention, DropPath, Mlp, PatchEmbed, TransformerLayer
from nest_fast.testing import import_timm, relative_error

timm = import_timm()
timm_nest = timm.models.nest


def assert_same(ours, theirs, x):
    """Output and gradients, those of the parameters by name, in float64, where no maximum flips."""
    results = []
    for module in (ours.double(), theirs.double()):
        leaf = x.double().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        results.append({"out": out, "dx": leaf.grad} | {name: p.grad for name, p in module.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        assert relative_error(results[0][name], wanted) < 1e-10, name


def test_block_attention_is_timms_attention():
    theirs = timm_nest.Attention(48, 3, qkv_bias=True)
    ours = BlockAttention(48, 3, qkv_bias=True, head_minor=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 48)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    major = BlockAttention(48, 3, qkv_bias=True)
    state = theirs.state_dict()
    state["proj.weight"] = nest_fast.weights.head_minor_to_major(state["proj.weight"], 3)
    major.load_state_dict(state)
    assert relative_error(major(x), theirs(x)) < 1e-5
    back = nest_fast.weights.head_major_to_minor(state["proj.weight"], 3)
    assert torch.equal(back, theirs.proj.weight)


def test_block_attention_calls_a_projection_that_is_more_than_a_linear():
    """A low-rank adapter in place of ``proj`` sees timm's order, in which it was trained."""

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x

    module = BlockAttention(32, 4, head_minor=True)
    x = torch.randn(1, 2, 4, 32)
    qkv = module.qkv(x).unflatten(-1, (3, 4, 8))
    minor = reference.block_attention(*qkv.unbind(3)).transpose(-1, -2).flatten(-2)
    plain = module.proj(minor)
    torch.testing.assert_close(module(x), plain)
    module.proj.__class__ = Adapter
    torch.testing.assert_close(module(x), plain + minor)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_block_aggregation_is_timms_conv_pool(padding):
    """On images as on blocks, whose position embedding is added."""
    theirs = timm_nest.ConvPool(12, 20, timm_nest.LayerNorm, "same" if padding == "same" else "")
    ours = BlockAggregation(12, 20, padding=padding)
    nn.init.normal_(theirs.norm.weight)
    ours.load_state_dict(theirs.state_dict())
    x, pos_embed = torch.randn(2, 12, 8, 12), torch.randn(1, 4, 6, 20)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    blocks = reference.blockify(x.permute(0, 2, 3, 1), (2, 3))
    wanted = reference.blockify(theirs(x).permute(0, 2, 3, 1), (2, 3)) + pos_embed
    assert relative_error(ours(blocks, (4, 4), (2, 3), pos_embed), wanted) < 1e-5
    assert_same(ours, theirs, x)


def test_transformer_layer_is_timms():
    theirs = timm_nest.TransformerLayer(48, 3, qkv_bias=True, norm_layer=timm_nest.LayerNorm).eval()
    ours = TransformerLayer(48, 3, head_minor=True).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, torch.randn(2, 4, 9, 48))


def test_mlp_is_timms():
    theirs, ours = timm.layers.Mlp(24, 40), Mlp(24, 40, nn.GELU)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, torch.randn(2, 3, 5, 24))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_patch_embed_is_the_patch_convolution_in_block_order(impl):
    ours, x = PatchEmbed(2, (3, 4), 3, 8, impl=impl), torch.randn(2, 3, 12, 16)
    convolved = nn.functional.conv2d(x, ours.proj.weight, ours.proj.bias, stride=2)
    assert relative_error(ours(x), reference.blockify(convolved.permute(0, 2, 3, 1), (3, 4))) < 1e-5


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3, 4))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amax(1), per_sample.amin(1))
    torch.testing.assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(out) is out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockAttention(32, 5), "num_heads: expected a divisor of dim = 32, got 5"),
        (lambda: BlockAttention(32, 4, impl="cuda"), "impl: expected one of"),
        (
            lambda: BlockAttention(32, 4)(torch.zeros(2, 4, 32)),
            r"x: expected 4 dimensions \(B, T, N, C\), got shape \(2, 4, 32\)",
        ),
        (lambda: BlockAggregation(8, 8, padding="valid"), "padding: expected one of 'symmetric', 'same', got 'valid'"),
        (lambda: BlockAggregation(8, 8, impl="sdpa"), "impl: expected one of"),
        (
            lambda: BlockAggregation(8, 8, norm_layer=lambda dim, **_: nn.RMSNorm(dim)),
            r"norm_layer: expected one that builds an affine torch.nn.LayerNorm, got RMSNorm",
        ),
        (
            lambda: BlockAggregation(8, 8)(torch.zeros(8, 4, 4)),
            r"x: expected 4 dimensions \(B, C, H, W\), got shape \(8, 4, 4\)",
        ),
        (lambda: TransformerLayer(32, 5), "num_heads: expected a divisor of dim = 32, got 5"),
        (lambda: DropPath(1.5), "drop_prob: expected a probability between 0 and 1, got 1.5"),
        (lambda: PatchEmbed(2, (2, 2), 3, 8, impl="cpp"), "impl: expected one of 'auto', 'reference', got 'cpp'"),
    ],
)
def test_modules_refuse_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make()
    assert "\n" not in str(error.value)
