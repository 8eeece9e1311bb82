"""nest_fast.tune: what is measured and checked, what of it "auto" takes, and the file between processes."""

import contextlib
import importlib
import json
import os

import pytest
import torch

import nest_fast
from helpers.common import run_python
from helpers.layer_tests import mlp_inputs
from helpers.pretend_gpu import pretend_gpu
from nest_fast.kernels import _launch
from nest_fast.ops import _extension, _tuned

CPU = torch.device("cpu")
SMALL = {"img_size": 16, "patch_size": 2, "num_levels": 2, "embed_dims": 16, "num_heads": 2, "depths": 1}
needs_cpp = pytest.mark.skipif(not _extension.cpp_isa, reason="needs the C++ kernels")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Where choices are written; what a test tunes is forgotten after it."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("NEST_FAST_TUNED", str(path))
    yield path
    _tuned.set_choices(CPU, _tuned.Choices())


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the name of an implementation, or by a launch configuration, in the place of a noisy machine's.

    Without interpreted kernels, which take minutes.
    """
    monkeypatch.setattr(_extension, "triton_interpreted", False)
    seconds = {}

    def timed(call):
        call()
        _, name, launches = call.args
        return min(seconds.get(key, 1.0) for key in (name, *(map(str, launches.values()) if name == "triton" else ())))

    monkeypatch.setattr("nest_fast.tuning._cpu_timer", timed)
    return seconds


def model():
    torch.manual_seed(0)
    return nest_fast.NesT(**SMALL, num_classes=3).eval()


def images(batch=2):
    return torch.randn(batch, 3, 16, 16)


def tune(gradients=False, **options):
    with torch.set_grad_enabled(gradients):
        return nest_fast.tune(model(), images(), progress=False, **options)


def taken(batch=5, gradients=False):
    """The implementation that "auto" is of each operation, for another batch."""
    with torch.set_grad_enabled(gradients), _tuned.watched() as asked:
        model()(images(batch))
    known = _tuned.choices(CPU).implementations
    return {key[0]: known.get(key, one.rule) for key, one in asked.items()}


@needs_cpp
def test_auto_takes_what_was_fastest(file, clock):
    clock["parts"], clock["two_step"] = 0.5, 0.5
    assert taken()["mlp_layer"] == "cpp"
    tuning = tune()
    assert {row.rule for row in tuning.rows} >= {"cpp"}
    assert not any(row.refused for row in tuning.rows)
    assert taken()["mlp_layer"] == taken()["attention_layer"] == "parts"
    assert taken()["block_aggregate"] == "two_step"
    assert taken(gradients=True)["mlp_layer"] == "cpp", "measured without gradients"
    assert file == tuning.path
    assert str(file) in str(tuning)


@needs_cpp
def test_a_later_process_reads_the_file(clock):
    clock["parts"] = 0.5
    tune()
    _tuned.set_choices(CPU, _tuned.Choices())
    assert taken()["mlp_layer"] == "cpp"
    _tuned.set_choices(CPU, _tuned.read(CPU))
    assert taken()["mlp_layer"] == "parts"


@needs_cpp
def test_noise_changes_nothing(clock):
    clock["parts"] = 0.98
    assert all(row.taken == row.rule for row in tune().rows)


@needs_cpp
def test_gradients_are_measured_where_they_are_wanted(clock):
    clock["parts"] = 0.5
    tune(gradients=True)
    assert taken(gradients=True)["mlp_layer"] == "parts"
    assert taken()["mlp_layer"] == "cpp"


@needs_cpp
def test_what_disagrees_or_fails_is_left_out(clock, monkeypatch):
    clock["sdpa"], clock["two_step"] = 0.5, 0.5
    attention = importlib.import_module("nest_fast.ops.block_attention")
    aggregation = importlib.import_module("nest_fast.ops.block_aggregate")
    own = aggregation._run

    def run(impl, *args):
        if impl == "two_step":
            raise RuntimeError("out of shared memory\nand a long trace")
        return own(impl, *args)

    monkeypatch.setattr(attention, "_sdpa", lambda q, *args: q.contiguous())
    monkeypatch.setattr(aggregation, "_run", run)
    tuning = tune()
    refused = [why for row in tuning.rows for why in row.refused]
    assert [why for why in refused if why.startswith("two_step")] == ["two_step: out of shared memory"]
    assert any(why.startswith("sdpa: its relative error from float64 is ") for why in refused)
    assert "left out two_step: out of shared memory" in str(tuning)
    assert taken()["block_aggregate"] == "cpp"


def test_the_time_limit_and_ctrl_c_keep_what_was_measured(file, clock, monkeypatch):
    tuning = tune(time_limit=1e-9)
    assert len(tuning.rows) == 1 == len(json.loads(file.read_text())["measured"])
    assert f"{tuning.left} not measured" in str(tuning)

    def stopped(call):
        if call.args[0].key[0] != "linear":
            raise KeyboardInterrupt
        call()
        return 1.0

    monkeypatch.setattr("nest_fast.tuning._cpu_timer", stopped)
    file.unlink()
    with pytest.raises(KeyboardInterrupt):
        tune()
    assert {row["key"][0] for row in json.loads(file.read_text())["measured"]} == {"linear"}


@needs_cpp
def test_the_file_keeps_what_was_measured_of_other_shapes(file, clock):
    clock["parts"] = 0.5
    tune()
    with torch.no_grad():
        nest_fast.tune(nest_fast.NesT(**{**SMALL, "embed_dims": 32}).eval(), images(), progress=False)
    _tuned.set_choices(CPU, _tuned.read(CPU))
    assert taken()["mlp_layer"] == "parts"
    clock["parts"] = 2.0
    tune()
    _tuned.set_choices(CPU, _tuned.read(CPU))
    assert taken()["mlp_layer"] == "cpp", "measured anew"


@needs_cpp
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace('"torch": "', '"torch": "0.'), id="another torch"),
        pytest.param(lambda text: text[:100], id="cut off"),
        pytest.param(lambda text: "{}", id="empty"),
    ],
)
def test_the_file_of_another_machine_is_named_and_not_used(file, clock, change):
    clock["parts"] = 0.5
    tune()
    file.write_text(change(file.read_text()))
    with pytest.warns(UserWarning, match=rf"{file} is not used, since .*python -m nest_fast.tune writes it anew"):
        assert _tuned.read(CPU) == _tuned.Choices()


@needs_cpp
def test_off_reads_and_writes_nothing(file, clock, monkeypatch):
    clock["parts"] = 0.5
    tune()
    monkeypatch.setenv("NEST_FAST_TUNED", "off")
    assert _tuned.read(CPU) == _tuned.Choices()
    assert "NEST_FAST_TUNED=off" in str(tune())
    monkeypatch.delenv("NEST_FAST_TUNED")
    with monkeypatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert _tuned.read(CPU) == _tuned.Choices()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent))
    assert torch.__version__ in _tuned.path(CPU).name
    assert _tuned.path(CPU).parent == file.parent / "nest_fast"


@needs_cpp
def test_a_file_that_cannot_be_written_costs_the_file_alone(file, clock):
    clock["parts"] = 0.5
    file.parent.write_text("no folder")
    with pytest.warns(UserWarning, match="what was measured counts in this process alone: .*cache"):
        assert "not written" in str(tune())
    assert taken()["mlp_layer"] == "parts"


def test_what_cannot_run_is_not_taken():
    x, weight = torch.randn(2, 4, 8), torch.randn(8, 8)
    with torch.no_grad(), _tuned.watched() as asked:
        nest_fast.linear(x, weight)
    _tuned.set_choices(CPU, _tuned.Choices(dict.fromkeys(asked, "onednn")))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(nest_fast.linear(x, weight), x @ weight.T)


def test_launch_configurations_are_checked_measured_and_taken(file, clock, monkeypatch):
    """By the interpreter, which launches Triton's kernels here."""
    monkeypatch.setattr(_extension, "triton_interpreted", True)
    q, k, v = torch.randn(3, 1, 1, 16, 2, 16)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return nest_fast.block_attention(q, k, v)

    (key,) = _tuned.launched(lambda: nest_fast.block_attention(q, k, v, impl="triton"))
    first, *others = _tuned.configurations(key, wide=False)
    assert len(_tuned.configurations(key, wide=True)) > len(others) + 1
    monkeypatch.setattr("nest_fast.tuning.ROUNDS", 2)
    clock[str(others[0])], clock["triton"] = 0.1, 0.5
    with torch.no_grad():
        (row,) = nest_fast.tune(Attention(), (q, k, v), progress=False).rows
    assert row.taken == "triton"
    nest_fast.block_attention(q, k, v, impl="triton")
    assert _launch.CHOSEN[key] == others[0] != first
    _tuned.set_choices(CPU, _tuned.Choices())
    nest_fast.block_attention(q, k, v, impl="triton")
    assert _launch.CHOSEN[key] == first
    _tuned.set_choices(CPU, _tuned.read(CPU))
    nest_fast.block_attention(q, k, v, impl="triton")
    assert _launch.CHOSEN[key] == others[0]


def test_a_chain_takes_the_sub_layers_that_were_measured(monkeypatch):
    """A chain calls them only where they have kernels of their own, which by the rules they have not in float32."""
    gpu, x, fast = torch.device("cuda", 0), images(1), set()

    def measure(question, *_):
        assert set(question.able) >= {question.rule, *({"triton", "parts"} if question.key[0] in fast else ())}
        fastest = "triton" if question.key[0] in fast else question.rule
        return nest_fast.tuning.Measured(question.key[0], {}, question.rule, fastest), {}

    monkeypatch.setattr("nest_fast.tuning._measure", measure)
    monkeypatch.setattr(_tuned, "write", lambda *_: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    launched = []
    try:
        for faster, dtype in (
            ((), torch.float32),
            (("attention_layer", "mlp_layer"), torch.float32),
            (("projection_mlp",), torch.float16),
        ):
            with pretend_gpu() as calls, torch.no_grad():
                given = model().to(dtype), x.to(dtype)
                if faster:
                    fast.update(faster)
                    assert fast <= {row.what for row in nest_fast.tune(*given, progress=False).rows}
                    calls.clear()
                given[0](given[1])
            of_interest = "bias_gelu", "norm_linear", "mlp_layer", "projection_mlp"
            names = (name.removesuffix("_triton_fwd") for name, _ in calls)
            launched.append([name for name in names if name in of_interest])
    finally:
        _tuned.set_choices(gpu, _tuned.Choices())
    assert launched == [
        ["bias_gelu"] * 2,
        ["norm_linear", "mlp_layer"] * 2,
        ["norm_linear", "projection_mlp"] * 2,
    ]


def test_an_mlp_with_gradients_is_held_against_float64_and_taken(monkeypatch):
    """With a factor for each sample, as a chain has it where stochastic depth drops some."""
    gpu = torch.device("cuda", 0)

    def timed(call):
        call()
        return 0.5 if call.args[1] == "triton" else 1.0

    monkeypatch.setattr("nest_fast.tuning._gpu_timer", lambda device: timed)
    monkeypatch.setattr("nest_fast.tuning.ROUNDS", 2)
    monkeypatch.setattr(_tuned, "configurations", lambda key, wide: [])
    monkeypatch.setattr(_tuned, "write", lambda *_: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    torch.manual_seed(0)
    tensors, _ = mlp_inputs(4, 1, 5, 16, 24, dtype=torch.float16)
    x, scale, weights = tensors[0], torch.tensor([0.0, 2.0, 2.0, 0.0]).half(), [t.requires_grad_() for t in tensors[1:]]

    class Layer(torch.nn.Module):
        def forward(self, x):
            return nest_fast.mlp_layer(x, *weights, branch_scale=scale)

    try:
        with pretend_gpu() as calls:
            rows = {row.what.partition(" ")[0]: row for row in nest_fast.tune(Layer(), x, progress=False).rows}
            calls.clear()
            Layer()(x).sum().backward()
    finally:
        _tuned.set_choices(gpu, _tuned.Choices())
    assert (rows["mlp_layer"].taken, rows["mlp_layer"].refused) == ("triton", ())
    assert [name for name, _ in calls if name.startswith("mlp_layer")] == [
        "mlp_layer_triton_fwd",
        "mlp_layer_triton_bwd",
    ]


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        nest_fast.tune(3, images())
    with pytest.raises(TypeError, match=r"images: expected a tensor .* got list"):
        nest_fast.tune(model(), [images()])
    with pytest.raises(ValueError, match="time_limit: expected a positive number of seconds, got 0"):
        nest_fast.tune(model(), images(), time_limit=0)
    with pytest.raises(ValueError, match=r"model: expected one that calls operations of nest_fast .* got Identity"):
        nest_fast.tune(torch.nn.Identity(), images())


def test_the_command(file):
    command = "-m nest_fast.tune --model nest_tiny_s16_32 --batch-size 1 --time-limit 0.1"
    said = run_python(*command.split(), env={**os.environ, "NEST_FAST_TUNED": str(file), "TRITON_INTERPRET": "0"})
    assert "operations measured" in said
    assert str(file) in said
    assert json.loads(file.read_text())["machine"] == _tuned.machine(CPU)
