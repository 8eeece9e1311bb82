"""What a GPU would be given: whole models through its choices, with Triton's kernels in the interpreter."""

import contextlib
import copy
import importlib
import re
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch

import nest_fast
from helpers import twins
from helpers.common import in_double
from helpers.layer_tests import mlp_inputs
from helpers.pretend_gpu import pretend_gpu
from nest_fast import reference
from nest_fast.ops import _tuned, _windows
from nest_fast.testing import import_timm, relative_error

import_timm()
from timm import models as timm_models  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing to pretend")

attention_ops, projection_ops = (
    importlib.import_module(f"nest_fast.ops.{name}") for name in ("attention_layer", "projection_mlp")
)
KERNELS = {"add_layer_norm_triton", "bias_gelu_triton", "block_attention_triton", "norm_pool_triton"}


def multi_query():
    torch.manual_seed(1)
    return nest_fast.NesT(**{**twins.SMALL, **SMALLER}, multi_query=True).eval()


# The interpreter takes its time for every block and head.
SMALLER = {"embed_dims": (16, 32), "num_heads": (1, 2), "depths": (1, 1)}
MODELS = {
    "timm's": lambda **options: twins.plain_model(**SMALLER, **options),
    "NesT": lambda **options: twins.nest_model(**SMALLER, **options),
    "multi-query NesT": lambda **options: multi_query(),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "mode", "options"),
    [
        ("timm's", torch.float32, "eval", {}),
        ("timm's", torch.float16, "train", {"pad_type": "same", "drop_path_rate": 0.5}),
        ("timm's", torch.float32, "autocast", {"pad_type": "same"}),
        ("NesT", torch.float16, "eval", {}),
        ("NesT", torch.float32, "train", {"drop_path_rate": 0.5}),
        ("NesT", torch.float32, "autocast", {}),
        ("multi-query NesT", torch.float32, "train", {}),
    ],
    ids=lambda value: str(value).removeprefix("torch.") if not isinstance(value, dict) else ",".join(value) or "plain",
)
def test_a_model_computes_on_a_gpu_what_plain_pytorch_does(kind, dtype, mode, options):
    def model():
        return MODELS[kind](**options).to(dtype).train(mode == "train")

    fast, plain, double = model(), as_reference(model()), as_reference(model().double())
    if kind == "timm's":
        nest_fast.accelerate(fast)
    x = twins.image(dtype=dtype)
    autocast = torch.float16 if mode == "autocast" else None
    with torch.autocast("cpu", torch.float16, enabled=mode == "autocast"):
        expected = twins.run(plain, x)
    with pretend_gpu(autocast=autocast) as calls:
        got = twins.run(fast, x)
    golden = twins.run(double, x.double())
    forward, backward = (Counter(name[:-4] for name, _ in calls if name.endswith(end)) for end in ("_fwd", "_bwd"))
    assert set(forward) == (KERNELS if kind == "timm's" else {*KERNELS, "layer_norm_mean_triton"})
    assert forward == backward
    if mode == "autocast":  # what a matmul takes is in its dtype: no cast reads and writes it again
        assert all(dtypes == [autocast] for name, dtypes in calls if name == "bias_gelu_triton_fwd")
        assert all(dtypes[1] == autocast for name, dtypes in calls if name == "add_layer_norm_triton_fwd")
    pairs = [("output", got.out[0], expected.out[0], golden.out[0])]
    pairs += [(name, got.grads[name], expected.grads[name], golden.grads[name]) for name in golden.grads]
    # In half precision one max-pool window in a thousand takes another of two nearly equal values, in plain PyTorch
    # too: a twentieth of these gradients.
    halves = torch.float16 in (autocast, dtype)
    for name, ours, theirs, exact in pairs:
        assert ours.dtype == theirs.dtype, name
        band = 0.1 if halves and name != "output" else 2 * torch.finfo(autocast or dtype).eps
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + band, name


# --- the MLP as one kernel --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm's", "NesT"])
def test_without_gradients_in_half_precision_an_mlp_is_one_kernel(kind):
    """In a chain of layers, one for each, and the sum before it is complete; explain says so."""
    fast, double = MODELS[kind]().half().eval(), as_reference(MODELS[kind]().eval().double())
    if kind == "timm's":
        nest_fast.accelerate(fast)
    x = twins.image(dtype=torch.float16)
    with pretend_gpu() as calls, torch.no_grad():
        out = fast(x)
        told = nest_fast.explain(fast, x)
    counted = Counter(name for name, _ in calls)
    layers = sum(SMALLER["depths"])
    assert counted["mlp_layer_triton_fwd"] == layers
    assert not counted["bias_gelu_triton_fwd"]
    assert [row.how for row in told if row.what == "mlp sub-layer"] == ["mlp_layer: Triton"] * layers
    with torch.no_grad():
        golden = double(x.double())
        plain = as_reference(MODELS[kind]().half().eval())(x)
    assert relative_error(out, golden) <= 2 * relative_error(plain, golden) + torch.finfo(torch.float16).eps


def test_an_mlp_of_which_samples_are_dropped_is_one_kernel():
    """Of two layers the second drops samples, in training; its kernel has a factor for each."""
    model = MODELS["NesT"](drop_path_rate=0.5).half().train()
    x = twins.image(dtype=torch.float16)
    outs = []
    for forced in ({}, {"mlp_layer": "parts"}):
        torch.manual_seed(3)
        with pretend_gpu() as calls, torch.no_grad(), _tuned.forced(**forced):
            outs.append(model(x))
        counted = Counter(name for name, _ in calls)
        kernels = counted["mlp_layer_triton_fwd"], counted["bias_gelu_triton_fwd"]
        assert kernels == ((0, 2) if forced else (2, 0))
    assert relative_error(*outs) < 0.01


@pytest.mark.parametrize("kind", ["timm's", "NesT"])
def test_an_mlp_that_was_measured_with_gradients_keeps_its_input_alone(kind):
    """In a chain of layers, the second of which drops samples. By the rules it has its parts."""

    def model():
        return MODELS[kind](drop_path_rate=0.5).half().train()

    fast, plain, double = model(), as_reference(model()), as_reference(model().double())
    if kind == "timm's":
        nest_fast.accelerate(fast)
    x, layers = twins.image(dtype=torch.float16), sum(SMALLER["depths"])
    expected, golden = twins.run(plain, x), twins.run(double, x.double())
    with pretend_gpu() as calls, _tuned.forced(mlp_layer="triton"):
        got = twins.run(fast, x)
    counted = Counter(name for name, _ in calls)
    assert counted["mlp_layer_triton_fwd"] == counted["mlp_layer_triton_bwd"] == layers
    assert not counted["bias_gelu_triton_fwd"]
    assert relative_error(got.out[0], golden.out[0]) <= 2 * relative_error(expected.out[0], golden.out[0]) + 0.002
    for name, exact in golden.grads.items():
        # A twentieth of these is the max-pools', which take another of two nearly equal values.
        theirs = relative_error(expected.grads[name], exact)
        assert relative_error(got.grads[name], exact) <= 2 * theirs + 0.1, name


def test_which_mlps_are_one_kernel_where_nothing_was_measured():
    """And tune may measure those that can be."""
    given = {"dtype": torch.bfloat16, "capability": (9, 0), "C": 192, "gradients": False}
    for change, rule, able in (
        ({}, "triton", ("triton", "parts")),
        ({"capability": (8, 6)}, "triton", ("triton", "parts")),
        ({"capability": (10, 0)}, "parts", ("triton", "parts")),
        ({"C": 256}, "parts", ("triton", "parts")),
        ({"dtype": torch.float32}, "parts", ("triton", "parts")),
        ({"gradients": True, "C": 128}, "parts", ("triton", "parts")),
        ({"gradients": True, "C": 512}, "parts", ("triton", "parts")),
        ({"gradients": True, "C": 513}, "parts", ("parts",)),
        ({"gradients": True, "C": 96, "dtype": torch.float32}, "parts", ("parts",)),
        ({"C": 768}, "parts", ("triton", "parts")),
        ({"C": 769}, "parts", ("parts",)),
        ({"capability": (7, 5)}, "parts", ("parts",)),
    ):
        made = {**given, **change}
        tensors, _ = mlp_inputs(1, 1, 3, made["C"], 8, dtype=made["dtype"])
        tensors[3].requires_grad_(made["gradients"])
        with (
            pretend_gpu(made["capability"]) as calls,
            torch.set_grad_enabled(made["gradients"]),
            _tuned.watched() as asked,
        ):
            nest_fast.mlp_layer(*tensors)
        assert [name for name, _ in calls] == ["mlp_layer_triton_fwd" if rule == "triton" else "bias_gelu_triton_fwd"]
        (question,) = (one for key, one in asked.items() if key[0] == "mlp_layer")
        assert (question.rule, question.able) == (rule, able), change


# --- the attention sub-layer by kernels of its own --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MODELS])
def test_attention_sub_layers_that_were_measured_have_kernels_of_their_own(kind):
    """In a chain, each takes a complete sum and returns one; explain says so. By the rules none has."""
    fast, double = MODELS[kind]().half().eval(), as_reference(MODELS[kind]().eval().double())
    if kind == "timm's":
        nest_fast.accelerate(fast)
    x = twins.image(dtype=torch.float16)
    layers = sum(SMALLER["depths"])
    for forced in ({}, {"attention_layer": "triton"}):
        with pretend_gpu() as calls, torch.no_grad(), _tuned.forced(**forced):
            out = fast(x)
            told = nest_fast.explain(fast, x)
        counted = Counter(name for name, _ in calls)
        assert counted["linear_sum_triton_fwd"] == (layers if forced else 0)
        assert counted["norm_attention_triton_fwd"] == (layers if forced and kind != "multi-query NesT" else 0)
        assert counted["norm_linear_triton_fwd"] == (layers if forced and kind == "multi-query NesT" else 0)
        assert counted["block_attention_triton_fwd"] == layers - counted["norm_attention_triton_fwd"]
        assert counted["mlp_layer_triton_fwd"] == layers
        said = [row.how for row in told if row.what == "attn sub-layer"]
        assert (said == ["attention_layer: Triton"] * layers) == bool(forced)
    with torch.no_grad():
        golden = double(x.double())
        plain = as_reference(MODELS[kind]().half().eval())(x)
    assert relative_error(out, golden) <= 2 * relative_error(plain, golden) + torch.finfo(torch.float16).eps


def test_a_chain_asks_once_what_a_sub_layer_is(monkeypatch):
    """Whether it has kernels of its own; the operation is not asked again."""
    asked = Counter()
    implementation = _tuned.implementation

    def count(op, *args):
        asked[op] += 1
        return implementation(op, *args)

    monkeypatch.setattr(_tuned, "implementation", count)
    with pretend_gpu(), torch.no_grad(), _tuned.forced(attention_layer="triton"):
        MODELS["NesT"]().half().eval()(twins.image(dtype=torch.float16))
    layers = sum(SMALLER["depths"])
    assert (asked["attention_layer"], asked["mlp_layer"]) == (layers, layers)


# --- a layer from its projection on as one kernel ---------------------------------------------------------------------

JOINT = {"projection_mlp": "triton"}


@pytest.mark.parametrize(
    ("kind", "forced"),
    [*((kind, JOINT) for kind in MODELS), ("NesT", JOINT | {"attention_layer": "triton"})],
    ids=[*MODELS, "NesT with attention's kernel"],
)
def test_projection_and_mlp_that_were_measured_are_one_kernel(kind, forced):
    """Whatever computes the attention; explain says so. By the rules they are two."""
    fast, double = MODELS[kind]().half().eval(), as_reference(MODELS[kind]().eval().double())
    if kind == "timm's":
        nest_fast.accelerate(fast)
    x, layers = twins.image(dtype=torch.float16), sum(SMALLER["depths"])
    with pretend_gpu() as calls, torch.no_grad(), _tuned.forced(**forced):
        out = fast(x)
        told = nest_fast.explain(fast, x)
    counted = Counter(name for name, _ in calls)
    assert counted["projection_mlp_triton_fwd"] == layers
    one_kernel = {"norm_attention_triton_fwd": layers, "projection_mlp_triton_fwd": layers}
    assert counted["block_attention_triton_fwd"] == (layers if forced == JOINT else 0)
    assert forced == JOINT or {name: counted[name] for name in one_kernel} == one_kernel
    assert not {"mlp_layer_triton_fwd", "linear_sum_triton_fwd", "add_layer_norm_triton_fwd"} & {*counted}
    assert [row.how for row in told if row.what == "mlp sub-layer"] == ["projection_mlp: Triton"] * layers
    with torch.no_grad():
        golden = double(x.double())
        plain = as_reference(MODELS[kind]().half().eval())(x)
    assert relative_error(out, golden) <= 2 * relative_error(plain, golden) + torch.finfo(torch.float16).eps


def test_which_layers_can_be_two_kernels():
    """Where it was measured: by the rules none is."""
    given = {"dtype": torch.bfloat16, "C": 96, "gradients": False}
    for change, able in (
        ({}, True),
        ({"C": 160}, False),
        ({"dtype": torch.float32}, False),
        ({"gradients": True}, False),
    ):
        made = {**given, **change}
        C, x = made["C"], torch.empty(1, 1, 196, made["C"], dtype=made["dtype"])
        norm, weight, wide, qkv = (x.new_empty(size) for size in ((C,), (C, C), (4 * C, C), (3 * C, C)))
        weight.requires_grad_(made["gradients"])
        attention = attention_ops.Given(
            *(x, norm, norm, qkv, None, weight, None), *(None,) * 3, False, C // 32, 196, False
        )
        projection = projection_ops.Given(x, x, weight, None, norm, norm, wide, None, wide.mT, None)
        with pretend_gpu((9, 0)), torch.set_grad_enabled(made["gradients"]):
            for ops, asked in ((attention_ops, attention), (projection_ops, projection)):
                assert ops.choose(asked) == "parts", change
            assert projection_ops.BACKENDS["triton"].can(projection) == able, change
            # The attention's kernels have float32 and more channels, too.
            assert attention_ops.BACKENDS["triton"].can(attention) != made["gradients"], change


def _hear(model, name):
    model.levels[0].transformer_encoder[0].get_submodule(name).register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "joint"),
    [
        (lambda model: None, 2),
        (lambda model: _hear(model, "norm2"), 1),
        (lambda model: _hear(model, "attn.proj"), 1),
        (lambda model: _hear(model, "attn"), 1),
        (lambda model: model.levels[0].transformer_encoder[0].norm1.requires_grad_(), 0),
        (lambda model: model.train(), 1),
    ],
    ids=["no change", "hook on norm2", "hook on proj", "hook on attn", "gradients of norm1", "dropped samples"],
)
def test_a_layer_keeps_its_parts_where_one_kernel_would_compute_something_else(change, joint):
    """Of two layers the first; in training the second drops samples. The values are the reference's."""
    model = MODELS["NesT"](drop_path_rate=0.9).requires_grad_(False).half().eval()
    double = as_reference(copy.deepcopy(model).double())
    change(model)
    x = twins.image(dtype=torch.float16)
    with pretend_gpu() as calls, _tuned.forced(**JOINT):
        out = model(x)
    assert Counter(name for name, _ in calls)["projection_mlp_triton_fwd"] == joint
    if not model.training:
        assert relative_error(out, double(x.double())) < 0.01


# --- fc1 with the GELU in its epilogue --------------------------------------------------------------------------------


@pytest.fixture
def epilogue(monkeypatch):
    """PyTorch's matmul with a GELU as CUDA has it, with tanh: its CPU kernel has erf. Counts its calls."""
    calls = []

    def addmm_activation(bias, x, weight, *, use_gelu):
        assert use_gelu
        calls.append(x.dtype)
        return torch.nn.functional.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", addmm_activation)
    return calls


def test_the_epilogue_has_the_gelu_that_is_asked_for_and_nothing_else(epilogue):
    """In half precision, without gradients, with a bias; of one float32 it is tune's to say."""
    given = {"dtype": torch.bfloat16, "activation": "gelu_tanh", "bias": True, "gradients": False, "autocast": None}
    for change, taken in (
        ({}, True),
        ({"activation": "gelu"}, False),
        ({"bias": False}, False),
        ({"gradients": True}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float32, "autocast": torch.float16}, False),
    ):
        made = {**given, **change}
        # Of so many channels the MLP is no kernel of its own.
        tensors, options = mlp_inputs(1, 2, 3, 264, 40, made["activation"], dtype=made["dtype"])
        tensors[4] = tensors[4] if made["bias"] else None
        tensors[3].requires_grad_(made["gradients"])
        epilogue.clear()
        with pretend_gpu(autocast=made["autocast"]) as calls, torch.set_grad_enabled(made["gradients"]):
            out = nest_fast.mlp_layer(*tensors, **options)
        passes = [name for name, _ in calls if name == "bias_gelu_triton_fwd"]
        assert (len(epilogue), len(passes)) == ((1, 0) if taken else (0, 1)), change
        golden, plain = (nest_fast.mlp_layer(*t, **options, impl="reference") for t in (in_double(tensors), tensors))
        eps = torch.finfo(made["autocast"] or made["dtype"]).eps
        assert relative_error(out, golden) <= 2 * relative_error(plain, golden) + eps, change


def test_a_chain_takes_the_epilogue_and_tune_asks_for_it(epilogue):
    """NesT's own GELU is exact; a model of the authors' has tanh."""
    sizes = {**twins.SMALL, **SMALLER, "embed_dims": (264, 264), "num_heads": (3, 3)}
    model = nest_fast.NesT(**sizes, gelu="tanh").half().eval()
    x = twins.image(dtype=torch.float16)
    with pretend_gpu() as calls, torch.no_grad(), _tuned.watched() as asked:
        out = model(x)
    assert epilogue == [torch.float16] * sum(SMALLER["depths"])
    assert not any(name == "bias_gelu_triton_fwd" for name, _ in calls)
    assert {(one.rule, one.able) for key, one in asked.items() if key[0] == "linear"} == {
        ("cublaslt", ("cublaslt", "triton", "parts"))
    }
    with torch.no_grad():
        plain, golden = as_reference(model)(x), as_reference(model.double())(x.double())
    assert relative_error(out, golden) <= 2 * relative_error(plain, golden) + torch.finfo(torch.float16).eps


def test_tune_measures_each_implementation_and_a_chain_takes_it(monkeypatch):
    """Each is what it was asked to be: of an MLP, of fc1 and its GELU inside one that is not one kernel."""
    model, x = nest_fast.NesT(**{**twins.SMALL, **SMALLER}).half().eval(), twins.image(dtype=torch.float16)
    fastest, launched = {"linear": "triton", "mlp_layer": "parts"}, {}

    def measure(question, *_):
        op = question.key[0]
        if op in fastest:
            assert question.able == ("triton", "parts")
            for name in question.able:
                calls.clear()
                with question.modes(), _tuned.forced(**{op: name}):
                    question.call(**question.arguments)
                launched[op, name] = {call for call, _ in calls}
        return nest_fast.tuning.Measured(op, {}, question.rule, fastest.get(op, question.rule)), {}

    monkeypatch.setattr("nest_fast.tuning._measure", measure)
    monkeypatch.setattr(_tuned, "write", lambda *_: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    try:
        with pretend_gpu() as calls, torch.no_grad():
            nest_fast.tune(model, x, progress=False)
            calls.clear()
            out = model(x)
    finally:
        _tuned.set_choices(torch.device("cuda", 0), _tuned.Choices())
    assert launched == {
        ("linear", "triton"): {"linear_triton_fwd"},
        ("linear", "parts"): {"bias_gelu_triton_fwd"},
        ("mlp_layer", "triton"): {"mlp_layer_triton_fwd"},
        ("mlp_layer", "parts"): {"linear_triton_fwd"},
    }
    counted = Counter(name for name, _ in calls)
    assert counted["linear_triton_fwd"] == sum(SMALLER["depths"])
    assert not counted["bias_gelu_triton_fwd"]
    with torch.no_grad():
        plain, golden = as_reference(model)(x), as_reference(model.double())(x.double())
    assert relative_error(out, golden) <= 2 * relative_error(plain, golden) + torch.finfo(torch.float16).eps


def as_reference(model):
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    return model


# --- windows of an image ----------------------------------------------------------------------------------------------


def swin(**options):
    """10 x 10 tokens in windows of 4 x 4, padded and in every other layer shifted, then 5 x 5."""
    torch.manual_seed(1)
    sizes = {"img_size": 20, "patch_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    return varied(timm_models.swin_transformer.SwinTransformer(**sizes, num_classes=7, **options))


def swin_v2(**options):
    """Attention by cosines, and LayerNorms that come last: 8 x 8 tokens in windows of 4 x 4, shifted, then 4 x 4."""
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    return varied(timm_models.swin_transformer_v2.SwinTransformerV2(**sizes, num_classes=7, **options))


def varied(model):
    """None of its parameters is zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, "eval"), (torch.float16, "train")], ids=str)
def test_swin_attends_in_its_image_without_a_copy(dtype, mode):
    """Values and gradients, those of the position bias and of what padding is made of among them."""

    def model():
        return swin(drop_path_rate=0.0).to(dtype).train(mode == "train")

    assert_computes_what_timm_does(model, torch.randn(2, 3, 20, 20, dtype=dtype), {"block_attention_triton": 3})


def test_swins_second_version_has_its_cosines_in_the_kernel():
    """Without gradients."""
    fast, plain, double = swin_v2().half().eval(), swin_v2().half().eval(), swin_v2().double().eval()
    nest_fast.accelerate(fast)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float16)
    computed = mock.patch.object(reference, "with_length", side_effect=AssertionError("q and k are written again"))
    with pretend_gpu() as calls, torch.no_grad(), computed:
        out = fast(x)
    assert Counter(name for name, _ in calls)["block_attention_triton_fwd"] == 3
    with torch.no_grad():
        allowed = relative_error(plain(x), double(x.double()))
        assert relative_error(out, double(x.double())) <= 2 * allowed + torch.finfo(x.dtype).eps


def swin_v2_of_large_windows():
    """18 x 18 tokens in one window of 324, as Swin v2 has them of 576 at 384 pixels."""
    torch.manual_seed(1)
    sizes = {"img_size": 36, "patch_size": 2, "embed_dim": 16, "depths": (1,), "num_heads": (1,), "window_size": 18}
    return varied(timm_models.swin_transformer_v2.SwinTransformerV2(**sizes, num_classes=7))


@pytest.mark.parametrize(
    ("make", "batch", "size", "dtype", "layers"),
    [(swin_v2, 2, 16, torch.float32, 3), (swin_v2_of_large_windows, 1, 36, torch.float16, 1)],
    ids=["small", "large windows"],
)
def test_swins_second_version_trains_with_its_cosines_in_the_kernel(make, batch, size, dtype, layers):
    """Every gradient, the scales' of the heads among them; windows of more tokens than fit on chip stream by."""

    def model():
        return make().to(dtype).train()

    x = torch.randn(batch, 3, size, size, dtype=dtype)
    with mock.patch.object(reference, "with_length", side_effect=AssertionError("q and k are written again")):
        told = assert_computes_what_timm_does(model, x, {"block_attention_triton": layers})
    assert all(row.how.endswith("block_attention: Triton") for row in told if row.what == "attn sub-layer")


@pytest.mark.parametrize(
    ("make", "size", "dtype"), [(swin, 20, torch.float16), (swin_v2, 16, torch.float32)], ids=["swin", "swin v2"]
)
def test_swin_drops_samples_by_a_factor_for_each(make, size, dtype):
    """One operation for each sub-layer, also where stochastic depth drops some; nobody waits to know which."""

    def model():
        return make(drop_path_rate=0.6).to(dtype).train()

    with mock.patch.object(torch.Tensor, "nonzero", side_effect=AssertionError("the device is waited for")):
        x = torch.randn(2, 3, size, size, dtype=dtype)
        told = assert_computes_what_timm_does(model, x, {"block_attention_triton": 3})
    assert not any("modules" in row.how for row in told if row.what.endswith("sub-layer"))


def sam():
    """17 x 17 tokens: in windows of 6 x 6, padded on both sides, and then all 289 at once."""
    torch.manual_seed(1)
    sizes = {"img_size": 34, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 1, "window_size": 6}
    options = {"global_attn_indexes": (1,), "use_rel_pos": True, "neck_chans": 8, "num_classes": 7}
    return varied(timm_models.vision_transformer_sam.VisionTransformerSAM(**sizes, **options)).eval()


@pytest.mark.filterwarnings("ignore:block_attention runs scaled_dot_product_attention")
def test_sam_attends_in_its_image_and_over_256_tokens_by_the_library():
    """Where each token of padding has a key of its own; explain says why the whole image has no kernel."""
    x = torch.randn(1, 3, 34, 34)
    told = assert_computes_what_timm_does(sam, x, {"block_attention_triton": 1})
    windowed, whole = (row for row in told if row.what == "attn sub-layer")
    assert not windowed.why
    assert "N = 289 tokens are over 256" in whole.why


def assert_computes_what_timm_does(make, x, kernels):
    """Of outputs and gradients; ``kernels`` are those of attention, and how often each is called."""
    fast, plain, double = make(), make(), make().double()
    nest_fast.accelerate(fast)
    expected, golden = twins.run(plain, x), twins.run(double, x.double())
    with pretend_gpu() as calls:
        with mock.patch.object(_windows, "computed", side_effect=AssertionError("an index or a mask is made")):
            got = twins.run(fast, x)
        told = nest_fast.explain(fast, x)
    counted = Counter(name for name, _ in calls)
    for name, count in kernels.items():
        assert counted[f"{name}_fwd"] == counted[f"{name}_bwd"] == count
    pairs = [("output", got.out[0], expected.out[0], golden.out[0])]
    pairs += [(name, got.grads[name], expected.grads[name], golden.grads[name]) for name in golden.grads]
    for name, ours, theirs, exact in pairs:
        assert ours.dtype == theirs.dtype, name
        band = 4 * torch.finfo(x.dtype).eps
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + band, name
    return told


# --- reasons ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:block_attention runs")
def test_a_gpu_before_8_0_has_the_passes_and_the_library_for_the_rest():
    model = twins.accelerated(twins.plain_model(**SMALLER))
    with pretend_gpu((7, 5)) as calls, torch.no_grad():
        model(twins.image())
        told = str(nest_fast.explain(model))
    assert {name for name, _ in calls} == {"add_layer_norm_triton_fwd", "bias_gelu_triton_fwd", "norm_pool_triton_fwd"}
    why = "it is for compute capability 8.0 and later, not for 7.5"
    assert why in told


@pytest.mark.filterwarnings("ignore:.* runs (plain PyTorch|scaled_dot_product_attention)")
@pytest.mark.parametrize(
    ("capability", "launch_error"), [((7, 0), ""), ((9, 0), "Triton cannot launch here: Failed to find C compiler.")]
)
def test_a_gpu_on_which_nothing_runs_has_plain_pytorch(capability, launch_error):
    model = twins.accelerated(twins.plain_model(**SMALLER))
    plain = twins.plain_model(**SMALLER)
    with pretend_gpu(capability, launch_error) as calls, torch.no_grad():
        out = model(twins.image())
        told = str(nest_fast.explain(model))
    assert not calls
    assert (launch_error or "not for 7.0") in told
    torch.testing.assert_close(out, plain(twins.image()))


def test_auto_says_once_that_it_does_without_the_kernel():
    x = torch.randn(1, 1, 16, 1, 16)
    why = "Triton cannot launch here: no such thing as a launcher"
    with pretend_gpu(launch_error=why):
        with pytest.warns(UserWarning, match=f"^block_attention runs scaled_dot.*, since for triton {why}$"):
            nest_fast.block_attention(x, x, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nest_fast.block_attention(x, x, x)


def test_an_implementation_asked_for_by_name_says_why_it_cannot_launch():
    x = torch.randn(1, 1, 16, 1, 16)
    why = "Triton cannot launch here: Failed to find C compiler."
    with (
        pretend_gpu(launch_error=why),
        pytest.raises(RuntimeError, match=f"impl: 'triton' cannot run .*{re.escape(why)}"),
    ):
        nest_fast.block_attention(x, x, x, impl="triton")
