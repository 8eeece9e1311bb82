"""NesT against the authors' own JAX code: logits, intermediate outputs and gradients, to 1e-4 in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nest_fast

GOLDEN = Path(__file__).parent / "golden"
MODELS = {
    "mha_s16_64": {
        "img_size": 64,
        "patch_size": 4,
        "num_levels": 3,
        "embed_dims": (24, 48, 96),
        "num_heads": (3, 6, 12),
        "depths": (1, 1, 2),
    },
    "mqa_s16_32": {
        "img_size": 32,
        "patch_size": 1,
        "num_levels": 4,
        "embed_dims": 48,
        "num_heads": 3,
        "depths": 1,
        "multi_query": True,
    },
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=MODELS)
def case(request):
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        golden = dict(arrays)
    model = nest_fast.NesT(**MODELS[request.param], num_classes=10, padding="same", gelu="tanh", drop_path_rate=0.0)
    model.load_state_dict(nest_fast.weights.from_jax(GOLDEN / f"{request.param}.npz"))
    image = torch.from_numpy(golden["image"].astype(np.float32)).permute(0, 3, 1, 2)
    return model, golden, image


def test_logits_and_intermediate_outputs(case):
    model, golden, image = case
    seen = {}
    for i, level in enumerate(model.levels):
        # What enters the first layer has the position embedding added; the authors' ConvPool output has not.
        level.transformer_encoder[0].register_forward_pre_hook(
            lambda _, args, i=i, level=level: seen.update({i: args[0] - level.pos_embed})
        )
    logits = model.eval()(image)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), **TOLERANCE)
    patches = torch.from_numpy(golden["out/PatchEmbedding_0"])
    torch.testing.assert_close(seen[0], nest_fast.reference.blockify(patches, model.block_size), **TOLERANCE)
    for i in range(1, model.num_levels):
        torch.testing.assert_close(seen[i], torch.from_numpy(golden[f"out/ConvPool_{i - 1}"]), **TOLERANCE)


def test_gradients(case):
    model, golden, image = case
    loss = F.cross_entropy(model.train()(image), torch.arange(len(image)) % 10)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    # Gradients go through the same renaming as parameters; what the file lacks is filled with the parameters.
    theirs = {key: value for key, value in golden.items() if key.startswith("param/")}
    theirs |= {key.replace("grad/", "param/"): value for key, value in golden.items() if key.startswith("grad/")}
    converted = nest_fast.weights.from_jax(theirs)
    plain = nest_fast.weights.from_jax({k: v for k, v in golden.items() if k.startswith("param/")})
    compared = 0
    for name, parameter in model.named_parameters():
        if not torch.equal(converted[name], plain[name]):
            torch.testing.assert_close(parameter.grad, converted[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared == sum(key.startswith("grad/") for key in golden) - 2  # q and kv make one qkv, weight and bias
