"""``python -m nest_fast.classify``: own, timm's and JAX checkpoints, what it reads and writes, what it says."""

import csv
import io
import json
import socket
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import TINY, make_folder
from timm.data import create_transform

import nest_fast
from nest_fast import classify, weights
from nest_fast.classify import main
from nest_fast.testing import import_timm
from nest_fast.train.__main__ import main as train

timm = import_timm()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images and the checkpoint of a run on it."""
    root = make_folder(tmp_path_factory.mktemp("classify") / "images", 32, 6)
    arguments = ["--data", root, "--out", root.parent / "run", *TINY, "--mixup", 0, "--cutmix", 0, "--ema", 0.5]
    assert train([str(a) for a in arguments]) == 0
    return root, root.parent / "run" / "best.pt"


def run(*arguments, status=0):
    assert main([str(a) for a in arguments]) == status


def test_own_checkpoint_knows_its_classes_and_preprocessing(trained, capsys):
    root, file = trained
    run(root / "val", "--checkpoint", file, "--format", "json")
    found = json.loads(capsys.readouterr().out)
    assert [f["file"] for f in found] == [str(p) for p in sorted((root / "val").rglob("*.png"))]
    assert all(f["top"][0]["class"] in f["file"] for f in found)
    # The same as by hand.
    saved = torch.load(file, weights_only=True)
    model = nest_fast.nest_tiny_s16_32(num_classes=2, **saved["options"]["model_kwargs"]).eval()
    model.load_state_dict(saved["ema"] if saved["use_ema"] else saved["model"])
    with Image.open(found[3]["file"]) as image, torch.no_grad():
        wanted = model(create_transform(**saved["preprocessing"])(image.convert("RGB"))[None]).softmax(1)[0]
    assert {t["index"]: t["probability"] for t in found[3]["top"]} == pytest.approx(
        dict(enumerate(wanted.tolist())), abs=2e-6
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_csv_in_the_images_order_whatever_the_batch(trained, tmp_path, batch_size):
    root, file = trained
    images = sorted((root / "val").rglob("*.png"), reverse=True)
    run(
        *images,
        "--checkpoint",
        file,
        "--format",
        "csv",
        "--top",
        1,
        "--batch-size",
        batch_size,
        "--out",
        tmp_path / "x.csv",
    )
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [r["file"] for r in rows] == [str(p) for p in images]
    assert all(r["class"] in r["file"] and float(r["probability"]) > 0.5 and r["rank"] == "1" for r in rows)


def test_stdin_is_an_image_or_paths(trained, monkeypatch, capsys):
    root, file = trained
    image = root / "val" / "red" / "000.png"
    for data in (image.read_bytes(), f"{image}\n".encode(), f"{image}\0".encode()):
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
        run("-", "--checkpoint", file)
        name, first, _ = capsys.readouterr().out.splitlines()
        assert name in ("-", str(image))
        assert first.endswith(" %  red")


def test_broken_images_are_named_and_skipped(trained, tmp_path, capsys):
    root, file = trained
    good, broken, missing = root / "val" / "blue" / "000.png", tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    broken.write_bytes(b"no image")
    run(broken, good, missing, "--checkpoint", file, "--format", "csv", "--top", 1, status=1)
    told = capsys.readouterr()
    assert [line.split(",")[0] for line in told.out.splitlines()] == ["file", str(good)]
    assert f"skipped {broken}: cannot identify image file" in told.err
    assert f"skipped {missing}: [Errno 2] No such file" in told.err
    assert told.err.endswith("2 of 3 images skipped\n")


def photograph(path):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((320, 240)).save(path)
    return path


def test_timms_checkpoint(tmp_path, capsys):
    """The model, its preprocessing and ImageNet's names, as timm has them."""
    torch.manual_seed(0)
    theirs = timm.create_model("nest_tiny_jx").eval()
    torch.nn.init.normal_(theirs.head.weight)  # else the classes are one as likely as another
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "model.pth")
    image = photograph(tmp_path / "photo.png")
    run(image, "--checkpoint", tmp_path / "model.pth", "--model", "nest_tiny_jx", "--format", "json")
    ((found,),) = [json.loads(capsys.readouterr().out)]
    config = timm.data.resolve_model_data_config(theirs)
    with Image.open(image) as opened, torch.no_grad():
        wanted = theirs(create_transform(**config)(opened)[None]).softmax(1)[0].topk(5)
    assert [t["index"] for t in found["top"]] == wanted.indices.tolist()
    assert [t["probability"] for t in found["top"]] == pytest.approx(wanted.values.tolist(), rel=1e-3, abs=2e-6)
    names = timm.data.ImageNetInfo()
    assert found["top"][0]["class"] == names.index_to_description(found["top"][0]["index"])
    run(image, "--checkpoint", tmp_path / "model.pth", status=2)
    assert "model: expected timm's name of the model" in capsys.readouterr().err
    run(image, "--checkpoint", tmp_path / "model.pth", "--model", "nest_small", status=2)
    assert "checkpoint: expected one of nest_small, got" in capsys.readouterr().err


def to_jax(model):
    """The authors' flat parameters of ``nest_tiny_s16_32``: what ``weights.from_jax`` undoes."""
    out, state = {}, {k: v.numpy() for k, v in model.state_dict().items()}

    def affine(theirs, ours, kind):
        weight = state[f"{ours}.weight"]
        out[f"{theirs}/{kind}"] = (
            weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T if weight.ndim == 2 else weight
        )
        out[f"{theirs}/bias"] = state[f"{ours}.bias"]

    affine("PatchEmbedding_0/Conv_0", "patch_embed.proj", "kernel")
    affine("LayerNorm_0", "norm", "scale")
    affine("Dense_0", "head", "kernel")
    n = 0
    for i, level in enumerate(model.levels):
        out[f"PositionEmbedding_{i}/pos_embedding"] = state[f"levels.{i}.pos_embed"]
        if i:
            affine(f"ConvPool_{i - 1}/Conv_0", f"levels.{i}.pool.conv", "kernel")
            affine(f"ConvPool_{i - 1}/LayerNorm_0", f"levels.{i}.pool.norm", "scale")
        for j, layer in enumerate(level.transformer_encoder):
            ours, theirs = f"levels.{i}.transformer_encoder.{j}", f"EncoderNDBlock_{n}"
            affine(f"{theirs}/LayerNorm_0", f"{ours}.norm1", "scale")
            affine(f"{theirs}/LayerNorm_1", f"{ours}.norm2", "scale")
            affine(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.mlp.fc1", "kernel")
            affine(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.mlp.fc2", "kernel")
            heads, d = layer.attn.num_heads, layer.attn.qkv.in_features // layer.attn.num_heads
            q, kv = np.split(state[f"{ours}.attn.qkv.weight"].T, [heads * d], 1)
            qb, kvb = np.split(state[f"{ours}.attn.qkv.bias"], [heads * d])
            attention = f"{theirs}/MultiQueryAttention_0"
            out[f"{attention}/DenseGeneral_0/kernel"] = q.reshape(-1, heads, d)
            out[f"{attention}/DenseGeneral_0/bias"] = qb.reshape(heads, d)
            out[f"{attention}/Dense_0/kernel"], out[f"{attention}/Dense_0/bias"] = kv, kvb
            proj = weights.head_minor_to_major(torch.from_numpy(state[f"{ours}.attn.proj.weight"]), heads)
            out[f"{attention}/proj_kernel"] = proj.T.reshape(heads, d, -1).numpy()
            out[f"{attention}/bias"] = state[f"{ours}.attn.proj.bias"]
            n += 1
    return out


def test_the_authors_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    model = nest_fast.nest_tiny_s16_32().eval()
    torch.nn.init.normal_(model.head.weight)
    np.savez(tmp_path / "nest.npz", **to_jax(model))
    (tmp_path / "names.txt").write_text("\n".join(f"thing {i}" for i in range(10)))
    image = photograph(tmp_path / "photo.png")
    run(image, "--checkpoint", tmp_path / "nest.npz", "--format", "json", "--classes", tmp_path / "names.txt")
    (found,) = json.loads(capsys.readouterr().out)
    prepare = create_transform((3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
                               interpolation="bicubic", crop_pct=1.0)  # fmt: skip
    with Image.open(image) as opened, torch.no_grad():
        wanted = model(prepare(opened)[None]).softmax(1)[0].topk(5)
    assert [t["class"] for t in found["top"]] == [f"thing {i}" for i in wanted.indices.tolist()]
    assert [t["probability"] for t in found["top"]] == pytest.approx(wanted.values.tolist(), abs=1e-5)


def test_without_a_network_the_hub_is_one_line(trained, monkeypatch, tmp_path, capsys):
    def no_network(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run(trained[0], status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "nest_fast.classify: model: cannot get nest_tiny_jx's weights from the hub (no network); --check"
    )


def test_the_hubs_model_is_accelerated(trained, monkeypatch, capsys):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    run(trained[0] / "val" / "red" / "000.png", "--model", "nest_tiny", "--format", "csv")
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert any("nest_fast" in type(m).__module__ for m in classify.load(model="nest_tiny").model.modules())


def test_batches_are_sized_by_memory(trained, monkeypatch):
    found = classify.load(trained[1])
    sizes = {}
    for free in (1, 2**20, 2**21, 2**40):
        monkeypatch.setattr(classify, "_free_memory", lambda _, free=free: free)
        sizes[free] = found.batch_size()
    assert sizes[1] == 1
    assert sizes[2**40] == 32
    assert 1 < sizes[2**20] < sizes[2**21] <= 2 * sizes[2**20] + 1
    monkeypatch.undo()
    assert 0 < classify._free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: images"),
        (["{empty}"], "images: expected a folder with images, got {empty} with none"),
        (["x.jpg", "--top", "0"], "top: expected at least 1, got 0"),
        (["x.jpg", "--checkpoint", "missing.pt"], "checkpoint: expected a file, got missing.pt, where there is none"),
        (["x.jpg", "--checkpoint", "{text}"], "checkpoint: expected"),
        (
            ["x.jpg", "--checkpoint", "{own}", "--classes", "{text}"],
            "classes: expected 2 names as",
        ),
        (["x.jpg", "--model", "nest_huge"], "model: expected one of timm's, got 'nest_huge'"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, arguments, words):
    places = {"empty": tmp_path / "empty", "text": tmp_path / "text.pt", "own": trained[1]}
    places["empty"].mkdir()
    places["text"].write_text("one line")
    run(*(a.format(**places) for a in arguments), status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert words.format(**places) in line
