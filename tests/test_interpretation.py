"""GradCAT and attention maps: right on every kind of model that has a NesT inside, and without a trace left on it."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nest_fast
from nest_fast.testing import import_timm

SMALL = {"img_size": 32, "embed_dims": (32, 64, 64), "num_heads": (2, 4, 4), "depths": (1, 2, 1), "num_levels": 3}
SMALL |= {"patch_size": 2, "num_classes": 5}


def randomised(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def small(**kwargs):
    return randomised(nest_fast.NesT(**{**SMALL, **kwargs}))


def timms(accelerated):
    model = randomised(import_timm().models.nest.Nest(**SMALL))
    if accelerated:
        nest_fast.accelerate(model)
    return model


def by_hand(model, image, target):
    """The maps of a NesT, root first, from the reference's operations alone, in float64."""
    model, ref, given = copy.deepcopy(model).double(), nest_fast.reference, []
    x = image.double()[None].requires_grad_()
    y = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=2).permute(0, 2, 3, 1)
    y = ref.blockify(y, model.levels[0].block_size)
    for i, level in enumerate(model.levels):
        size = model.levels[0].block_size
        if level.pool is None:
            y = y + level.pos_embed
        else:
            conv, norm, grid = level.pool.conv, level.pool.norm, 2 ** (3 - i)
            y = ref.block_aggregate(
                *(y, conv.weight, conv.bias, norm.weight, norm.bias),
                grid_size=grid,
                block_size=size,
                pos_embed=level.pos_embed,
            )
        given.append(y)
        for layer in level.transformer_encoder:
            y = layer.double()(y)
    logit = model.head(model.norm(y).mean((1, 2)))[0, target]
    maps = []
    for i, (a, d) in enumerate(zip(given, torch.autograd.grad(logit, given), strict=True)):
        maps.append(ref.unblockify((a * d).sum(-1, keepdim=True), 2 ** (2 - i), model.levels[0].block_size)[0, ..., 0])
    return logit.item(), maps[::-1]


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (24, 40)])
def test_the_maps_are_activation_times_gradient_and_the_walk_follows_them(size):
    """At 24 x 40 px blocks are 3 x 5 tokens, whose quarters share a row and a column."""
    # In float64: in float32 a max-pool may take the other of two nearly equal values.
    model, image = small(img_size=size).double(), torch.randn(3, *size).double()
    walk = nest_fast.gradcat(model, image, 2)
    logit, maps = by_hand(model, image, 2)
    assert walk.target == 2
    assert walk.logit == pytest.approx(logit, rel=1e-9)
    for ours, theirs in zip(walk.maps, maps, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
    assert len(walk.path) == 2
    assert walk.blocks[0] == (0, 0)
    height, width = size
    for i, ((row, column), box) in enumerate(zip(walk.blocks, walk.boxes, strict=True)):
        h, w = height / 2**i, width / 2**i
        assert box == (round(column * w), round(row * h), round((column + 1) * w), round((row + 1) * h))
        if i:
            assert walk.blocks[i - 1] == (row // 2, column // 2)
            assert walk.path[i - 1] == 2 * (row % 2) + column % 2
            quarters = F.adaptive_avg_pool2d(maps[i - 1][None].float(), 2**i)[0]
            parent_row, parent_column = walk.blocks[i - 1]
            quarters = quarters[2 * parent_row : 2 * parent_row + 2, 2 * parent_column : 2 * parent_column + 2]
            assert quarters.flatten().argmax() == walk.path[i - 1] or size == (24, 40)


def test_each_quarter_can_be_taken():
    """The walk goes where the map is large, whatever the rest says: into every leaf of the tree."""
    from nest_fast.interpretation import _walk

    for row in range(4):
        for column in range(4):
            maps = [-torch.ones(8 * 2**i, 4 * 2**i) for i in range(3)]
            for i, values in enumerate(maps):
                values[2 * row * 2**i, column * 2**i] = 1e3
            path, blocks = _walk(maps)
            assert blocks == ((0, 0), (row // 2, column // 2), (row, column))
            assert path == (2 * (row // 2) + column // 2, 2 * (row % 2) + column % 2)


def test_timm_accelerated_and_our_own_model_agree():
    image, plain, fast, ours = torch.randn(1, 3, 32, 32), timms(False), timms(True), small()
    ours.load_state_dict(plain.state_dict())
    wrapped = nn.Sequential(nn.Identity(), ours)
    compiled = torch.compile(ours, backend="eager")
    compiled(image)
    in_place = small()
    in_place.load_state_dict(plain.state_dict())
    in_place.compile(backend="eager")
    in_place(image)
    models = {"accelerated": fast, "ours": ours, "wrapped": wrapped, "compiled": compiled, "in place": in_place}
    expected, attention = nest_fast.gradcat(plain, image), nest_fast.attention_maps(plain, image)
    for name, model in models.items():
        walk = nest_fast.gradcat(model, image)
        assert (walk.target, walk.path, walk.blocks, walk.boxes) == (
            *(expected.target, expected.path, expected.blocks),
            expected.boxes,
        ), name
        for a, b in zip(walk.maps, expected.maps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=lambda m, n=name: n + m)
        maps = nest_fast.attention_maps(model, image)
        for a, b in zip(maps.values(), attention.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("multi_query", [False, True])
def test_attention_maps_give_the_layers_output(multi_query):
    """Weights times values, projected, is what the module returns."""
    model, x = small(multi_query=multi_query), torch.randn(2, 3, 32, 32)
    calls = {}
    attn = model.levels[1].transformer_encoder[1].attn
    handle = attn.register_forward_hook(lambda module, args, output: calls.update(x=args[0], out=output))
    maps = nest_fast.attention_maps(model, x)
    handle.remove()
    assert list(maps) == [name for name, m in model.named_modules() if isinstance(m, nest_fast.BlockAttention)]
    assert [tuple(w.shape) for w in maps.values()] == [(2, 16, 2, 16, 16), *[(2, 4, 4, 16, 16)] * 2, (2, 1, 4, 16, 16)]
    weights = maps["levels.1.transformer_encoder.1.attn"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    kv = 1 if multi_query else 4
    v = attn.qkv(calls["x"]).unflatten(-1, (4 + 2 * kv, -1))[..., 4 + kv :, :].transpose(2, 3)
    out = (weights @ v).permute(0, 1, 3, 4, 2).flatten(-2)  # timm's order, (head_dim, heads)
    torch.testing.assert_close(attn.proj(out), calls["out"], rtol=1e-4, atol=1e-4)
    last = "levels.2.transformer_encoder.0.attn"
    assert list(nest_fast.attention_maps(model, x[0], layers=[last])) == [last]


@pytest.mark.parametrize("surrounding", ["grad", "no_grad", "inference_mode"])
def test_the_model_stays_as_it_was(surrounding):
    model, image = small(drop_path_rate=0.5), torch.randn(1, 3, 32, 32)
    model.train()
    model.levels[0].eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True).grad = torch.ones_like(model.head.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[surrounding]
    with context():
        given = image.clone()
        walk = nest_fast.gradcat(model, given)
        nest_fast.attention_maps(model, given)
        assert torch.equal(given, image)
    assert walk.path == nest_fast.gradcat(model, image).path
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(level.requires_grad for level in walk.maps)


def test_a_failing_model_stays_as_it_was():
    model = small()
    model.train()
    with pytest.raises(ValueError, match="x"):
        nest_fast.gradcat(model, torch.randn(3, 20, 20))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_half_precision_and_one_level():
    model = small(num_levels=1, embed_dims=32, num_heads=2, depths=1).bfloat16()
    walk = nest_fast.gradcat(model, torch.randn(3, 32, 32).bfloat16())
    assert (walk.path, walk.blocks, walk.boxes) == ((), ((0, 0),), ((0, 0, 32, 32),))
    assert walk.maps[0].dtype == torch.float32


def test_draw():
    Image = pytest.importorskip("PIL.Image", reason="pillow draws")
    walk = nest_fast.gradcat(small(img_size=(32, 64)), torch.randn(3, 32, 64), 1)
    photo = Image.new("L", (640, 320), 128)
    picture = walk.draw(photo)
    assert picture.size == photo.size
    assert photo.getpixel((0, 0)) == 128
    left, top, right, bottom = (10 * value for value in walk.boxes[-1])
    red = (255, 0, 0)
    assert picture.getpixel((left, top)) == picture.getpixel((right - 1, bottom - 1)) == red
    assert picture.getpixel(((left + right) // 2, (top + bottom) // 2)) == (128, 128, 128)
    shaded = walk.draw(photo, level=0)
    row, column = divmod(int(walk.maps[0].abs().argmax()), walk.maps[0].shape[1])
    h, w = walk.maps[0].shape
    r, _, b = shaded.getpixel((int((column + 0.5) * 640 / w), int((row + 0.5) * 320 / h)))
    assert (r > b) == bool(walk.maps[0][row, column] > 0)
    with pytest.raises(ValueError, match=r"level: expected one of 3 maps, got 3"):
        walk.draw(photo, level=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(3, 3), torch.randn(3, 32, 32)), "model: expected one NesT inside, got Linear with 0"),
        (("nest", torch.randn(3, 32, 32)), "model: expected a torch.nn.Module, got str"),
        ((small(), torch.randn(2, 3, 32, 32)), "image: expected one, .* got shape"),
        ((small(), "photo.jpg"), "image: expected a tensor"),
        ((small(), torch.randn(3, 32, 32), 5), "target: expected one of 5 classes, 0 to 4, got 5"),
        ((small(), torch.randn(3, 32, 32), -1), "target: expected one of 5 classes, 0 to 4, got -1"),
        ((small(), torch.randn(3, 32, 32), "cat"), "target: expected the number of a class or None, got 'cat'"),
        ((small(global_pool="", num_classes=0), torch.randn(3, 32, 32)), "model: expected a classifier that gives"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        nest_fast.gradcat(*arguments)
    assert "\n" not in str(error.value)


def test_unknown_layers_are_named():
    with pytest.raises(
        ValueError, match=r"layers: expected one of 'levels.0.transformer_encoder.0.attn', .* got 'attn'"
    ):
        nest_fast.attention_maps(small(), torch.randn(3, 32, 32), layers=["attn"])


@pytest.mark.skipif(importlib.util.find_spec("pytorch_grad_cam") is None, reason="pytorch-grad-cam is not installed")
@pytest.mark.parametrize("kind", ["NesT", "accelerated timm"])
def test_beside_pytorch_grad_cam(kind):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = small() if kind == "NesT" else timms(True)
    image, level = torch.randn(1, 3, 32, 32), model.levels[1]
    options = {"reshape_transform": level.to_image} if kind == "NesT" else {}
    before = nest_fast.gradcat(model, image, 3)
    with GradCAM(model, [level], **options) as cam:
        heat = cam(image, [ClassifierOutputTarget(3)])
        inside = nest_fast.gradcat(model, image, 3)
    assert heat.shape == (1, 32, 32)
    assert heat.max() > 0
    assert before.path == inside.path == nest_fast.gradcat(model, image, 3).path
