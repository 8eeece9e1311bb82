"""Checkpoints in every wrapping, what is mistaken for one, the authors' parameters, resized position embeddings."""

import argparse
import datetime
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

import nest_fast
from nest_fast.testing import import_timm
from nest_fast.weights import from_jax, from_timm, to_timm

timm = import_timm()

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"img_size": 32, "num_levels": 2, "embed_dims": 16, "num_heads": 2, "depths": 1, "num_classes": 3}


def small_timm(seed=0):
    torch.manual_seed(seed)
    return timm.models.nest.Nest(**SMALL)


STATE, AVERAGED = small_timm().state_dict(), small_timm(1).state_dict()


def under(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


def same(got, wanted):
    """The same names and the very same tensors: nothing is copied, cast or moved."""
    return got.keys() == wanted.keys() and all(got[key] is wanted[key] for key in wanted)


def equal(got, wanted):
    return got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def lightning(**models):
    """A LightningModule of these models, as its checkpoint holds it."""
    module = nn.Module()
    module.loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))
    for name, model in models.items():
        setattr(module, name, model)
    return {"epoch": 3, "state_dict": module.state_dict(), "optimizer_states": [{}], "callbacks": {}}


WRAPPED = {
    "bare": STATE,
    "DDP": under("module."),
    "torch.compile": under("_orig_mod."),
    "compiled DDP": under("_orig_mod.module."),
    "DDP of a compiled one": under("module._orig_mod."),
    "Lightning": {"state_dict": under("model.")},
    "Lightning, compiled": {"state_dict": under("model._orig_mod.")},
    "MMPretrain": {"meta": {}, "state_dict": under("backbone.")},
    "any name, twice": under("a_student.net."),
    "timm's train.py": {"epoch": 1, "arch": "nest_tiny", "state_dict": STATE, "optimizer": {"state": {0: {}}}},
    "DeiT": {"model": STATE, "model_ema": None, "optimizer": {}, "scaler": {}},
    "DeepSpeed": {"module": STATE, "dp_world_size": 8},
    "wrappers in wrappers": {"checkpoint": {"network": {"params": under("module.")}}},
    "timm's order": {"model": AVERAGED, "state_dict": STATE},
    "averaged only": {"state_dict_ema": STATE},
    "averaged too": {"state_dict": AVERAGED, "state_dict_ema": STATE},
    "averaged too, by DeiT": {"model": AVERAGED, "model_ema": under("module.")},
    "averaged by torch": {"n_averaged": torch.tensor(3)} | under("module."),
    "an optimizer by names": {"model": STATE, "optimizer": {"state": {key: {"step": 1} for key in STATE}}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_from_timm_finds_the_state_dict(name):
    given = WRAPPED[name]
    names = list(given)
    assert same(from_timm(given), STATE)
    assert list(given) == names


def test_from_timm_reads_what_wrappers_really_write():
    """Not by our idea of their names: torch.compile, of parts too, averaging, activation checkpointing."""
    from timm.utils import ModelEmaV3

    model = small_timm()
    for wrapped in (
        torch.compile(model),
        nn.DataParallel(model),
        torch.optim.swa_utils.AveragedModel(model),
        ModelEmaV3(model),
    ):
        assert equal(from_timm(wrapped.state_dict()), STATE)
    model.levels[0] = torch.compile(model.levels[0])
    model.levels[1].transformer_encoder[0].mlp = torch.compile(model.levels[1].transformer_encoder[0].mlp)
    checkpoint_wrapper.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, timm.layers.Mlp))
    assert any("_orig_mod" in key.split(".")[2:] for key in model.state_dict())
    assert equal(from_timm(model.state_dict()), STATE)
    assert equal(from_timm(lightning(net=model)), STATE)


def test_from_timm_leaves_tensors_of_other_classes_alone():
    class Quantized(torch.Tensor):
        pass

    state = {key: value.as_subclass(Quantized) for key, value in STATE.items()}
    got = from_timm({"state_dict": state})
    assert same(got, state)
    assert {type(value) for value in got.values()} == {Quantized}


def test_use_ema():
    both = {"state_dict": STATE, "state_dict_ema": AVERAGED}
    assert same(from_timm(both), AVERAGED)
    assert same(from_timm(both, use_ema=False), STATE)
    message = r"use_ema: expected True, since checkpoint holds averaged weights alone \('state_dict_ema'\), got False"
    with pytest.raises(ValueError, match=message):
        from_timm({"state_dict_ema": STATE}, use_ema=False)


def test_prefix_chooses_among_several_models():
    student, teacher = small_timm(), small_timm(1)
    given = lightning(student=student, teacher=nn.DataParallel(teacher))
    message = (
        r"prefix: expected one of 'state_dict\.student', 'state_dict\.teacher\.module', since checkpoint holds these"
        r" models, got "
    )
    with pytest.raises(ValueError, match=message + "None"):
        from_timm(given)
    with pytest.raises(ValueError, match=message + "'model'"):
        from_timm(given, prefix="model")
    for prefix in ("student", "student.", "state_dict.student"):
        assert equal(from_timm(given, prefix=prefix), STATE)
    assert equal(from_timm(given, prefix="teacher.module."), AVERAGED)
    inside = STATE | under("ema.", AVERAGED)  # one in the other: each gets its own names
    assert same(from_timm(inside, prefix=""), STATE)
    assert same(from_timm(inside, prefix="ema"), AVERAGED)


def test_from_timm_reads_files(tmp_path):
    saved = {"state_dict": under("module."), "state_dict_ema": AVERAGED, "args": argparse.Namespace(lr=0.1), "epoch": 2}
    for name in ("last.pth.tar", "pytorch_model.bin"):
        torch.save(saved, tmp_path / name)
        assert equal(from_timm(str(tmp_path / name), use_ema=False), STATE)
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(under("model."), tmp_path / "model.safetensors")
    assert equal(from_timm(tmp_path / "model.safetensors"), STATE)


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="checkpoint: expected the safetensors library"):
        from_timm(tmp_path / "model.safetensors")


JAX_NAMES = {"optimizer/target/PatchEmbedding_0/Conv_0/kernel": np.zeros((4, 4, 3, 8))}
NO_NEST = "checkpoint: expected the state dict of a timm Nest"
MISTAKES = {
    "a model": (small_timm, TypeError, rf"{NO_NEST}, got a Nest; give its state_dict\(\)"),
    "a wrapped model": (
        lambda: {"epoch": 1, "model": small_timm()},
        TypeError,
        rf"{NO_NEST}, got a Nest under 'model'; give its state_dict\(\)",
    ),
    "a method": (lambda: small_timm().state_dict, TypeError, f"{NO_NEST}, in a dictionary or at .* file, got method"),
    "a list": (lambda: list(STATE.items()), TypeError, "got list"),
    "None": (lambda: None, TypeError, "got NoneType"),
    "nothing": (dict, ValueError, r"got names such as \[\]"),
    "another model": (
        lambda: nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4)})}).state_dict(),
        ValueError,
        rf"{NO_NEST}, got names such as \['patch_embed.proj.weight'",
    ),
    "an optimizer's": (
        lambda: torch.optim.AdamW(small_timm().parameters()).state_dict(),
        ValueError,
        r"got names such as \['state', 'param_groups'\]",
    ),
    "the authors'": (lambda: JAX_NAMES, ValueError, "got names such as .*; nest_fast.weights.from_jax reads it"),
    "one name twice": (
        lambda: STATE | {"levels.0._orig_mod.pos_embed": STATE["levels.0.pos_embed"]},
        ValueError,
        "checkpoint: expected one tensor for levels.0.pos_embed, got a second one as levels.0._orig_mod.pos_embed",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_from_timm_says_what_it_was_given_instead(name):
    make, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message) as error:
        from_timm(make())
    assert "\n" not in str(error.value)


def save(content, path):
    torch.save(content, path)


FILES = {
    "empty.pth": (lambda path: path.touch(), "got '.*empty.pth': EOFError"),
    "page.pth": (
        lambda path: path.write_text("<!DOCTYPE html>\n<html></html>"),
        "page.pth': Unsupported operand",
    ),
    "cut.pth": (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "got '.*cut.pth': PytorchStreamReader failed"),
    "folder.pth": (lambda path: path.mkdir(), "expected the path of a file, got the directory '.*folder.pth'"),
    "list.pth": (partial(save, [1]), r"expected the state dict .* got list"),
    "optimizer.pth": (partial(save, torch.optim.SGD([nn.Parameter(torch.ones(1))]).state_dict()), "'param_groups'"),
    "code.pth": (
        partial(save, {"state_dict": STATE, "when": datetime.date(2021, 5, 26)}),
        r"code.pth': .*datetime.date .*; where you trust it, give what torch.load\(path, weights_only=False\) returns",
    ),
    "model.pth": (lambda path: save(small_timm(), path), r"GLOBAL timm.models.nest.Nest .*; where you trust it"),
    "page.safetensors": (lambda path: path.write_text("<html></html>"), "expected a safetensors file, got '.*': "),
    "golden.npz": (lambda path: np.savez(path, a=1), "got '.*golden.npz'; nest_fast.weights.from_jax reads it"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoint(name, tmp_path):
    make, message = FILES[name]
    make(tmp_path / name)
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    with pytest.raises((ValueError, TypeError), match=message) as error:
        from_timm(tmp_path / name)
    assert str(error.value).startswith("checkpoint: expected")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", [from_timm, from_jax])
@pytest.mark.parametrize("kind", [FileNotFoundError, ValueError])
def test_a_path_without_a_file(function, kind):
    with pytest.raises(kind, match=r"^\w+: expected the path of a file, got 'none.pth', where there is none$"):
        function("none.pth")


def test_to_timm_is_the_inverse_and_refuses_what_timm_lacks():
    model = nest_fast.NesT(**SMALL)
    model.load_state_dict(from_timm(under("module.")))
    small_timm(1).load_state_dict(to_timm(model.state_dict()))
    assert same(to_timm(STATE), STATE)
    with pytest.raises(ValueError, match="multi-query"):
        to_timm(nest_fast.nest_tiny_s16_32(device="meta").state_dict())
    with pytest.raises(TypeError, match=r"state_dict: expected .*, got a NesT; give its state_dict\(\)"):
        to_timm(model)


# --- position embeddings of another size ------------------------------------------------------------------------------


def test_position_embeddings_are_resized_on_loading():
    theirs, larger = small_timm(), nest_fast.NesT(**{**SMALL, "img_size": (128, 96)})
    before = theirs.state_dict()
    larger.load_state_dict(before)
    square = nest_fast.NesT(**{**SMALL, "img_size": 128})
    square.load_state_dict(before)
    for i, level in enumerate(square.levels):
        wanted = timm.models.nest.resize_pos_embed(before[f"levels.{i}.pos_embed"], level.pos_embed)
        torch.testing.assert_close(level.pos_embed.data, wanted)
    assert larger.eval()(torch.randn(1, 3, 128, 96)).isfinite().all()
    assert before["levels.0.pos_embed"].shape == (1, 4, 16, 16)  # the dictionary given is left as it was


def test_what_cannot_be_resized_is_among_the_errors_of_load_state_dict():
    model = nest_fast.NesT(**SMALL)
    state = STATE | {"levels.0.pos_embed": torch.zeros(1, 3, 16, 16), "levels.1.pos_embed": torch.zeros(1, 4, 16, 8)}
    del state["norm.bias"]
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    message = str(error.value)
    assert 'Missing key(s) in state_dict: "norm.bias"' in message
    assert "levels.0.pos_embed cannot be resized: pos_embed: expected a square grid of blocks, got T = 3" in message
    assert "size mismatch for levels.1.pos_embed" in message


# --- the authors' parameters ------------------------------------------------------------------------------------------


def parameters(name):
    """A golden file's parameters, by the authors' names."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key.removeprefix("param/"): arrays[key] for key in arrays.files if key.startswith("param/")}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def test_from_jax_reads_trees():
    flat = parameters("mha_s16_64")
    tree, other = nested(flat), nested({key: 0 * value for key, value in flat.items()})
    wanted = from_jax(GOLDEN / "mha_s16_64.npz")
    for given in (
        flat,
        tree,
        {"params": tree},
        {"optimizer": {"target": flat, "state": {"step": 3, "param_states": other}}},
        {"step": 3, "params": tree, "opt_state": {"0": {"mu": other, "nu": other}}},
        {"model": {"params": other}, "ema_params": flat},
    ):
        assert equal(from_jax(given), wanted)
    assert equal(from_jax({"params": flat, "ema_params": other}, use_ema=False), wanted)
    assert torch.equal(from_jax({"a": other, "b": flat}, prefix="b")["head.bias"], wanted["head.bias"])


FLAT = parameters("mha_s16_64")
JAX_MISTAKES = {
    "another tree": (
        {"Dense_0": {}},
        ValueError,
        "tree: expected NesT's parameters with a PatchEmbedding_0, got names",
    ),
    "wrong depths": (FLAT, ValueError, r"depths: expected 3 levels with 4 layers in all, got \(1, 1, 1\)"),
    "timm's": ({"model": STATE}, ValueError, r"got names such as \['model'\]; nest_fast.weights.from_timm reads it"),
    "a model": (nn.Identity(), TypeError, "tree: expected .* in a dictionary or at the path of a file, got Identity"),
    "None": (None, TypeError, "got NoneType"),
    "several": (
        {"a": nested(FLAT), "b": nested(FLAT)},
        ValueError,
        "prefix: expected one of 'a', 'b', since tree holds",
    ),
    "no head": (
        {key: value for key, value in FLAT.items() if not key.startswith("Dense_0/")},
        ValueError,
        "tree: expected all of NesT's parameters, got none called 'Dense_0'",
    ),
    "one copy a device": (
        {key: np.stack([value] * 2) for key, value in FLAT.items()},
        ValueError,
        r"expected PatchEmbedding_0's kernel \(h, w, in, out\), unreplicated, got shape \(2, 4, 4, 3, 24\)",
    ),
    "a name twice": ({"a": 1, "a/b": 2}, ValueError, "tree: expected names below 'a' or a value there, got both"),
}


@pytest.mark.parametrize("name", JAX_MISTAKES)
def test_from_jax_says_what_it_was_given_instead(name):
    given, kind, message = JAX_MISTAKES[name]
    with pytest.raises(kind, match=message) as error:
        from_jax(given, depths=(1, 1, 1) if name == "wrong depths" else None)
    assert "\n" not in str(error.value)


def test_files_that_are_not_the_authors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.serialization", None)
    for name, kind, message in (
        ("page.npz", ValueError, "tree: expected an .npz file, got '.*page.npz': "),
        ("model.pth", ValueError, "tree: expected an .npz or flax file, got .*; nest_fast.weights.from_timm reads it"),
        ("ckpt-39.flax", ModuleNotFoundError, r"tree: expected flax \(pip install flax\) to read '.*', got none"),
    ):
        (tmp_path / name).write_text("<html>\n</html>")
        with pytest.raises(kind, match=message) as error:
            from_jax(tmp_path / name)
        assert "\n" not in str(error.value)


def test_from_jax_wants_depths_where_widths_do_not_tell():
    flat = parameters("mqa_s16_32")
    extra = {k.replace("Block_3", "Block_4"): v for k, v in flat.items() if "EncoderNDBlock_3" in k}
    with pytest.raises(ValueError, match="depths: expected one value a level"):
        from_jax(flat | extra)
    state = from_jax(flat | extra, depths=(1, 1, 1, 2))
    assert "levels.3.transformer_encoder.1.norm1.weight" in state


def test_from_jax_reads_flax_checkpoints(tmp_path):
    serialization = pytest.importorskip("flax.serialization", reason="flax is not installed")
    flat = parameters("mha_s16_64")
    path = tmp_path / "ckpt-39.flax"
    path.write_bytes(serialization.msgpack_serialize({"optimizer": {"target": flat}}))
    got, wanted = from_jax(path), from_jax(flat)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
