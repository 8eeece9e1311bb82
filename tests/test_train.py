"""``python -m nest_fast.train``: exact resume, many processes, broken input, one line for each error."""

import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.kill_and_resume import EVERYTHING, differences, finish, kill_and_resume, rows, start, wait_for
from nest_fast.train import checkpoint, data, meters, trainer
from nest_fast.train.__main__ import main
from nest_fast.train.options import complete, parse

TINY = [
    *("--model", "nest_tiny_s16_32", "--epochs", "2", "--batch-size", "8", "--lr", "0.03", "--workers", "0"),
    *("--model-kwargs", "img_size=16", "patch_size=2", "num_levels=2", "embed_dims=32", "num_heads=2", "depths=1"),
]


def make_folder(root, train=32, val=6):
    """Blue and red noise, 20 x 24."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for name, colour in (("blue", (40, 60, 200)), ("red", (200, 50, 40))):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                image = np.clip(rng.normal(colour, 60, (20, 24, 3)), 0, 255).astype("uint8")
                Image.fromarray(image).save(root / part / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments, status=0):
    assert main([str(a) for a in arguments]) == status


def last(out):
    return torch.load(out / "last.pt", weights_only=True)


def test_a_run_leaves_checkpoints_logs_and_curves_and_learns(folder, tmp_path, capsys):
    run(
        "--data",
        folder,
        "--out",
        tmp_path,
        *TINY,
        "--epochs",
        4,
        "--ema",
        0.5,
        "--log-every",
        4,
        "--mixup",
        0,
        "--cutmix",
        0,
    )
    assert "16/16" not in capsys.readouterr().out  # the bar is stderr's
    assert {p.name for p in tmp_path.iterdir()} == {
        "best.pt", "curves.png", "epochs.csv", "last.pt", "steps.csv", "tensorboard",
    }  # fmt: skip
    assert [int(r[0]) for r in rows(tmp_path)] == [4, 8, 12, 16, 20, 24, 28, 32]
    header, *epochs = [line.split(",") for line in (tmp_path / "epochs.csv").read_text().splitlines()]
    found = dict(zip(header, epochs[-1], strict=True))
    assert float(found["val_top1"]) > 90
    assert (found["step"], found["epoch"], found["val_images"], found["broken_images"]) == ("32", "4", "12", "0")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1320, 480)
    saved = last(tmp_path)
    assert saved["classes"] == ["blue", "red"]
    assert saved["preprocessing"]["input_size"] == [3, 16, 16]
    run("--resume", tmp_path / "last.pt")  # nothing is left to do
    assert last(tmp_path)["step"] == 32
    run("--data", folder, "--out", tmp_path, *TINY, status=2)
    assert "expected a folder without a run, or --resume" in capsys.readouterr().err


# Processes that are copies of one, started once in a worker (helpers/kill_and_resume.py).
forked = pytest.mark.xdist_group("forkserver")


@forked
def test_killed_runs_end_in_bitwise_the_same_weights(folder, tmp_path):
    found = kill_and_resume(["--data", folder, *TINY, *EVERYTHING, "--workers", 1], tmp_path, 2, 0.01, seed=0)
    assert any(kill.saved % 8 > 0 for kill in found)  # in mid-epoch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save(folder, tmp_path, monkeypatch, capsys, number):
    step = trainer.Trainer._step

    def interrupted(self, batches):
        if self.step == 4:
            signal.raise_signal(number)
        step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted)
    goes_on = number == signal.SIGUSR1
    saved = []
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda path, state: (saved.append(state["step"]), write(path, state)))
    run("--data", folder, "--out", tmp_path, *TINY, status=0 if goes_on else 128 + number)
    assert saved == ([1, 5, 8, 16] if goes_on else [1, 5])
    assert goes_on or "--resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_during_validation_is_not_lost(folder, tmp_path, monkeypatch):
    plain, validate = tmp_path / "plain", trainer.Trainer._validate
    run("--data", folder, "--out", plain, *TINY)

    def interrupted(self, model, seen):
        signal.raise_signal(signal.SIGTERM)
        return validate(self, model, seen)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_validate", interrupted)
        run("--data", folder, "--out", tmp_path / "cut", *TINY, status=143)
    assert (last(tmp_path / "cut")["step"], last(tmp_path / "cut")["evaluated"]) == (8, 0)
    run("--resume", tmp_path / "cut" / "last.pt")
    assert not differences(plain / "last.pt", tmp_path / "cut" / "last.pt")


@forked
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one_and_one_goes_on(folder, tmp_path, how):
    """The same images, mixed alike, in every step: losses differ by the order of sums. Stopped, then one goes on."""
    arguments = ["--data", folder, *TINY, "--log-every", 1, "--drop-path", 0, "--clip-grad", 1, "--ema", 0.9]
    one, two, told = tmp_path / "one", tmp_path / "two", tmp_path / "told.txt"
    alone = start([*arguments, "--out", one], told)
    if how == "ddp":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(told, "a") as file:
            command = [*torchrun, "-m", "nest_fast.train", *(str(a) for a in [*arguments, "--out", two])]
            both = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while len(rows(two)) < 5 and both.poll() is None:
            time.sleep(0.002)
        both.send_signal(signal.SIGTERM)
        both.wait(120)
    else:
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(random.randrange(20000, 30000)), "WORLD_SIZE": "2"}
        both = [
            start([*arguments, "--out", two, "--fsdp"], told, RANK=str(r), LOCAL_RANK=str(r), **meeting) for r in (0, 1)
        ]
        wait_for(5, two, *both)
        os.kill(both[1].pid, signal.SIGTERM)  # what one process hears, all do
        for process in both:
            finish(process, told, 143)
    finish(alone, told)
    stopped = last(two)["step"]
    assert 5 <= stopped < 16, told.read_text()[-2000:]
    run("--resume", two / "last.pt")
    assert [r[0] for r in rows(two)] == [r[0] for r in rows(one)]
    for column in (2, 4):  # loss, norm of the gradient
        ours, theirs = (np.array([float(r[column]) for r in rows(out)]) for out in (two, one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    a, b = last(one), last(two)
    for name in ("model", "ema"):
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)


def test_broken_images_are_skipped_counted_and_named(folder, tmp_path, capfd):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(folder, images)
    whole = (images / "train/red/003.png").read_bytes()
    (images / "train/red/003.png").write_bytes(whole[: len(whole) // 2])
    (images / "train/blue/031.png").write_bytes(b"")
    (images / "val/red/002.png").write_text("no image")
    run("--data", images, "--out", out, *TINY, "--workers", 2)
    told, said = capfd.readouterr()[::-1]
    for name in ("train/red/003.png", "train/blue/031.png", "val/red/002.png"):
        assert told.count(f"skipped a broken image: {images / name}: ") == 1
    assert "3 broken images were skipped" in said
    assert (out / "epochs.csv").read_text().splitlines()[-1].endswith(",11,3")
    for path in images.rglob("train/*/*.png"):
        path.write_bytes(b"")
    run("--data", images, "--out", tmp_path / "none", *TINY, status=2)
    assert "nothing but broken ones" in capfd.readouterr().err


def test_a_full_disk_is_one_line_and_the_checkpoint_from_before(folder, tmp_path, monkeypatch, capsys):
    run("--data", folder, "--out", tmp_path, *TINY, "--epochs", 1)
    before = (tmp_path / "last.pt").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", full)
    run("--resume", tmp_path / "last.pt", "--epochs", 2, status=2)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nest_fast.train: out")]
    assert told == [f"nest_fast.train: out: cannot write {tmp_path / 'last.pt'}: No space left on device; "
                    f"{tmp_path / 'last.pt'} is the one from before"]  # fmt: skip
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def _empty(root):
    root.mkdir()


def _empty_class(root):
    make_folder(root, 2, 2)
    (root / "train" / "green").mkdir()
    (root / "val" / "green").mkdir()


def _missing_class(root):
    make_folder(root, 2, 2)
    shutil.rmtree(root / "val" / "red")


def _another_class(root):
    make_folder(root, 2, 2)
    (root / "train" / "red").rename(root / "train" / "violet")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (None, "data: expected digits, cifar10, cifar100 or a folder"),
        (_empty, "got no folder"),
        (_empty_class, "expected images in every class, got none in {root}/train for green"),
        (_missing_class, "expected the same classes in {root}/train and {root}/val, got none in {root}/val for red"),
        (_another_class, "got none in {root}/val for violet"),
    ],
)
def test_bad_folders(tmp_path, capsys, make, words):
    root = tmp_path / "images"
    if make is not None:
        make(root)
    run("--data", root, "--out", tmp_path / "out", *TINY, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert words.format(root=root) in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "x"], "argument --epochs: invalid whole number value: 'x'"),
        (["--epoch", "1"], "unrecognized arguments: --epoch 1"),
        (["--batch-size", "65"], "batch_size: expected at most the 64 training images, got 65"),
        (["--batch-size", "12", "--accumulate", "5"], "batch_size: expected a multiple of processes x accumulate = 5"),
        (["--batch-size", "6", "--accumulate", "2"], "batch_size: expected an even number a part for mixup, got 3"),
        (["--warmup-epochs", "2"], "warmup_epochs: expected fewer than epochs = 2, got 2.0"),
        (["--lr", "nan"], "lr: expected more than 0, got nan"),
        (["--mixup", "-1"], "mixup: expected at least 0, got -1.0"),
        (["--hflip", "2"], "hflip: expected 0 to 1, got 2.0"),
        (["--model", "nest_huge"], "model: expected one of nest_base"),
        (["--model", "timm/nest_huge"], "model: expected one of timm's models"),
        (["--model-kwargs", "img_size=17"], "model: cannot make nest_tiny_s16_32: img_size: expected multiples"),
        (["--model-kwargs", "depht=1"], "model_kwargs: expected arguments of nest_tiny_s16_32, got depht"),
        (["--accelerate"], "accelerate: expected one of timm's models"),
        (["--impl", "magic"], "impl: expected one of"),
        (["--device", "cuda:77"], "device: expected one of this machine's, got 'cuda:77'"),
        (["--fsdp"], "fsdp: expected processes that torchrun started"),
        (["--resume", "missing.pt"], "resume: expected a checkpoint, got missing.pt: No such file"),
        (["--auto-augment", "nonsense"], "auto_augment: "),
    ],
)
def test_bad_flags(folder, tmp_path, capsys, arguments, words):
    run("--data", folder, "--out", tmp_path, *TINY, *arguments, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_checkpoints_of_something_else(folder, tmp_path, capsys):
    run("--data", folder, "--out", tmp_path, *TINY, "--epochs", 1)
    whole = tmp_path / "last.pt"
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:9999])
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    capsys.readouterr()
    images = make_folder(tmp_path / "images", 8, 8)
    for part in ("train", "val"):
        (images / part / "red").rename(images / part / "violet")
    for arguments, words in [
        (
            ["--resume", whole, "--model", "nest_tiny"],
            "expected a checkpoint of model 'nest_tiny', got one of 'nest_tiny_s",
        ),
        (["--resume", whole, "--model-kwargs", "depths=2"], "expected a checkpoint of model_kwargs {'depths': 2}"),
        (["--resume", whole, "--data", images], "expected a checkpoint of the classes ['blue', 'violet']"),
        (["--resume", tmp_path / "half.pt"], "half.pt, which is none or damaged"),
        (["--resume", tmp_path / "other.pt"], "other.pt: a file without a format"),
    ]:
        run(*arguments, "--out", tmp_path / "new", status=2)
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_cifar_needs_torchvision_and_a_network(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    arguments = ["--data", "cifar100", "--data-dir", tmp_path / "data", "--out", tmp_path / "out"]
    run(*arguments, status=2)
    assert "expected cifar100 in" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    run(*arguments, status=2)
    assert capsys.readouterr().err == (
        "nest_fast.train: data: expected torchvision for cifar100, got none: pip install torchvision\n"
    )


def test_cifar_comes_from_torchvision(tmp_path, monkeypatch):
    """Two batches of its files as torchvision reads them, without its download."""
    import torchvision.datasets

    class Few(torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download):
            self.data = np.random.default_rng(train).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
            self.targets, self.classes = [i % 10 for i in range(20)], [str(i) for i in range(10)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Few)
    options = complete(parse(["--data", "cifar10"]))
    assert (options.model, options.batch_size, options.lr, options.warmup_epochs) == (
        "nest_tiny_s16_32",
        192,
        2.5e-4,
        5,
    )
    train, _ = data.load_sources(options)
    assert np.array_equal(np.asarray(train.load(3)), Few(None, True, None).data[3])


@pytest.mark.parametrize("model", ["nest_tiny_s16_32", "timm/nest_tiny"])
def test_norms_biases_and_position_embeddings_do_not_decay(folder, tmp_path, monkeypatch, model):
    """And timm's model trains, accelerated."""
    found = []
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: found.append(self) or 0)
    timms = model.startswith("timm")
    size = ["img_size=64"] if timms else ["depths=1"]
    flags = ["--accelerate"] if timms else []
    run("--data", folder, "--out", tmp_path, *TINY, "--model", model, *flags, "--model-kwargs", *size)
    (made,) = found
    names = {id(p): name for name, p in made.model.named_parameters()}
    for group in made.optimizer.param_groups:
        for p in group["params"]:
            name = names.pop(id(p))
            decays = not (name.endswith(("bias", "pos_embed")) or "norm" in name)
            assert group["weight_decay"] == (0.05 if decays else 0.0), name
            assert group["initial_lr"] == 0.03 * 8 / 256
    assert not names
    assert any(type(m).__module__.startswith("nest_fast") for m in made.model.modules())


def test_compiled_and_in_mixed_precision(folder, tmp_path, monkeypatch):
    compiled, original = [], nn.Module.compile

    def compile_eagerly(self):
        compiled.append(self)
        original(self, backend="eager")  # the graphs are made; what a C++ compiler makes of them is not the point

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    arguments = ["--data", folder, *TINY, "--epochs", 1, "--drop-path", 0, "--log-every", 1]
    arguments += [
        "--model-kwargs",
        "img_size=8",
        "patch_size=2",
        "num_levels=1",
        "embed_dims=32",
        "num_heads=2",
        "depths=1",
    ]
    run(*arguments, "--out", tmp_path / "plain")
    run(*arguments, "--out", tmp_path / "compiled", "--compile")
    run(*arguments, "--out", tmp_path / "fp16", "--amp", "fp16")
    assert len(compiled) == 1
    losses = {name: [float(r[2]) for r in rows(tmp_path / name)] for name in ("plain", "compiled", "fp16")}
    np.testing.assert_allclose(losses["compiled"], losses["plain"], rtol=1e-5)
    np.testing.assert_allclose(losses["fp16"], losses["plain"], rtol=2e-2)
    assert last(tmp_path / "fp16")["scaler"]["scale"] == 65536
    assert last(tmp_path / "compiled")["model"].keys() == last(tmp_path / "plain")["model"].keys()


def test_augmentation_does_not_depend_on_who_loads_when(folder):
    given = parse(["--data", str(folder), *TINY])
    batches = {}
    for workers, begin in ((0, 0), (2, 0), (1, 5)):
        options = complete({**given, "workers": workers})
        source, _ = data.load_sources(options)
        steps = data.Steps(len(source.labels), options, 0, 1, begin, 16)
        prepare = data.preprocessing(options, (16, 16), {})
        random.seed(workers)
        torch.manual_seed(workers)
        before = random.getstate(), torch.get_rng_state()
        batches[workers] = [b.images for b in data.train_loader(source, options, prepare, steps)][-11:]
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    for other in (2, 1):
        assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[other], strict=True))
    assert not torch.equal(batches[0][0], batches[0][8])


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_a_step_is_the_same_step_however_it_is_dealt_out(processes, accumulate):
    options = complete(parse(["--data", "digits", "--batch-size", "24", "--mixup", "1"]))
    whole = list(data.Steps(100, options, 0, 1, 0, 8))
    options.accumulate = accumulate
    dealt = [list(data.Steps(100, options, r, processes, 0, 8)) for r in range(processes)]
    for step, images in enumerate(whole):
        parts = [rank[step * accumulate + i] for rank in dealt for i in range(accumulate)]
        assert sorted(i for part in parts for i in part) == sorted(images)
        partner = dict(zip(images, reversed(images), strict=True))
        for part in parts:  # what mixup mixes an image with is in its part, and at its mirror place
            assert [partner[i] for i in part] == part[::-1]
    first = {i for images in whole[:4] for i in images}
    assert len(first) == 96  # an epoch takes every image once
    assert whole[:4] != whole[4:]


def test_no_checkpoint_is_older_than_the_interval(monkeypatch):
    """Steps, evaluations and checkpoints of random length, the longest half as long again as the shortest."""
    now, rng = 0.0, random.Random(0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = meters.Clock(60.0)
    safe, written = 0.0, 0
    for _ in range(3000):
        started, now = now, now + rng.uniform(2, 3)
        clock.stepped(started)
        oldest = now - safe
        if clock.due():
            started, now = now, now + rng.uniform(4, 6)
            oldest = now - safe if written else 0.0
            clock.saved(started)
            safe, written = started, written + 1
        assert oldest <= 60.0
    assert 100 < written < 3000 * 2.5 / 35


def test_the_recipe_is_the_authors():
    options = complete(parse(["--data", "somewhere"]))
    wanted = {"lr": 2.5e-4, "weight_decay": 0.05, "epochs": 300, "warmup_epochs": 20, "smoothing": 0.1, "mixup": 0.8,
              "cutmix": 1.0, "random_erasing": 0.25, "auto_augment": "rand-m9-n2-p0.5-mstd0.5"}  # fmt: skip
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert math.isclose(complete(parse(["--data", "somewhere", "--epochs", "30"])).warmup_epochs, 2)
