"""Exported models: plain PyTorch for ONNX and for who has no nest_fast, kernels for who has the extension only."""

import copy
import functools
import importlib.util
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nest_fast
from helpers.common import ROOT, run_python
from nest_fast.ops._extension import cpu_error
from nest_fast.testing import import_timm, relative_error

import_timm()  # before restore does: here a torchvision of another torch is no obstacle, whatever ran before
OPS = torch.ops.nest_fast
EXTENSION = Path(nest_fast.__file__).parent / "_C_cpu.abi3.so"
SMALL = {"img_size": 32, "embed_dims": (32, 64), "num_heads": (2, 4), "depths": (1, 1), "num_levels": 2}
AUTHORS = {"padding": "same", "gelu": "tanh", "multi_query": True}
without_extension = pytest.mark.skipif(cpu_error is not None, reason=str(cpu_error))


def installed(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed (pip install nest_fast[export])"
    )


def small(**kwargs):
    model = nest_fast.NesT(**{**SMALL, "num_classes": 5, "drop_path_rate": 0.0, **kwargs}).eval()
    with torch.no_grad():  # as large as trained ones: at first every logit is nearly 0
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def accelerated_timm():
    model = import_timm().models.nest.Nest(**SMALL, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    nest_fast.accelerate(model)
    return model


def exported(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


@functools.cache
def traced():
    """A model of two levels, its program for inference, and that in plain PyTorch: what takes seconds, once."""
    torch.manual_seed(0)
    model = small()
    with torch.no_grad():
        program = exported(model, torch.randn(2, 3, 32, 32))
        return model, program, program.run_decompositions(nest_fast.export.decompositions())


one_process = pytest.mark.xdist_group("export")  # that of traced()


def operations(program):
    return {node.target.name() for node in program.graph.nodes if getattr(node.target, "namespace", "") == "nest_fast"}


def as_accurate(results, model, x):
    """Each of ``results`` at most 3 times as far from float64 as plain PyTorch in float32, or 1e-6 at least."""
    with torch.no_grad():
        golden = _plain(model).double()(x.double())
        bound = max(3 * relative_error(_plain(model)(x), golden), 1e-6)
    for result in results:
        assert relative_error(torch.as_tensor(result), golden) <= bound


def _plain(model):
    model = copy.deepcopy(model)
    nest_fast.restore(model)
    return model


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def test_every_recorded_operation_has_a_decomposition():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nest_fast::")}
    backward = {name for name in names if name.endswith(("_bwd", "_dx"))}
    tools = ("cpp_isa", "cpp_set_isa", "cuda_why_not", "peak_move", "peak_multiply")
    eager = ("pack_linear", "pack_filters")  # weights are packed by themselves where nothing is recorded
    recorded = names - backward - {f"nest_fast::{name}" for name in tools + eager}
    assert {op.name() for op in nest_fast.export.decompositions()} == recorded


def decomposition_cases():
    r, dtype = torch.randn, torch.float32
    layer = r(30, 8), r(8), r(8), 1e-6, r(16, 8), r(16)
    image = r(2, 8, 12, 5), r(7, 5, 3, 3), r(7), r(7), r(7), r(1, 2, 12, 7), (2, 4), (4, 3), (4, 3), 1e-6
    yield OPS.blockify, (r(2, 8, 12, 5).transpose(0, 3).contiguous().transpose(0, 3), (4, 3), r(1, 8, 12, 5))
    yield OPS.unblockify, (r(2, 8, 12, 5), (2, 4), (4, 3), r(1, 8, 12, 5))
    yield OPS.patchify, (r(2, 3, 16, 24), (4, 2), (2, 4))
    yield OPS.unpatchify, (r(2, 6, 8, 24), (4, 2), (2, 3), (2, 4))
    alone = None, None, None, None, None, None, 0.3, []
    yield OPS.block_attention_cpp_fwd, (r(2, 3, 5, 4, 8), r(2, 3, 5, 1, 8), r(2, 3, 5, 1, 8), *alone)
    for mask in (r(3, 5, 5), r(3, 5, 5) > 0, None):
        mask = mask if mask is None or mask.dtype != torch.bool else mask | torch.eye(5, dtype=torch.bool)
        bias = None if mask is None else r(2, 5, 5)
        if mask is None or mask.dtype != torch.bool:
            yield OPS.block_attention_cpp_fwd, (*r(3, 2, 3, 5, 2, 16), None, None, bias, mask, None, None, 0.3, [])
        yield OPS.block_attention_triton_fwd, (*r(3, 2, 3, 5, 2, 16), bias, mask, 0.3, None, None, None, [])
    windows = [5, 6, 3, 2, 1, 1, 0, 0]
    positions = r(2, 1, 30, 2, 3), r(2, 1, 30, 2, 2)
    for added, cut in (((*positions, None), [5, 6, 3, 2, 0, 0, 0, 0]), ((None, None, r(2, 6, 6)), windows)):
        pads = r(2, 1, 2, 16)
        yield OPS.block_attention_cpp_fwd, (*r(3, 2, 1, 30, 2, 16), *added, None, *pads, 0.3, cut)
    for bias, pads in ((r(2, 6, 6), r(2, 6, 2, 16)), (None, (None, None))):
        yield OPS.block_attention_triton_fwd, (*r(3, 2, 1, 30, 2, 16), bias, None, 0.3, *pads, None, windows)
        yield OPS.block_attention_triton_fwd, (*r(3, 2, 1, 30, 2, 16), bias, None, 1.0, *pads, r(2).abs(), windows)
    for training in (False, True):
        yield OPS.attention_layer_cpp, (*layer, r(8, 8), None, None, None, None, [], 5, 2, 1, 0.4, 0.7, training)
        for windows in ([], [5, 6, 3, 2, 1, 1, 1, 0]):
            bias, mask = r(2, 6, 6), None if windows else r(5, 6, 6)
            call = (*layer, r(8, 8), None, bias, mask, None, windows, 6, 2, 1, 0.4, 0.7, training)
            yield OPS.attention_layer_cpp, call
        alone = r(30, 8), None, None, 1e-6, r(24, 8), r(24), r(8, 8), None, r(2, 6, 6), None, r(2)
        yield OPS.attention_layer_cpp, (*alone, [5, 6, 3, 2, 0, 0, 0, 0], 6, 2, 2, 0.4, 0.7, training)
        yield OPS.mlp_layer_cpp, (*alone[:4], r(16, 8), r(16), "gelu", r(8, 16), None, 0.7, training)
        yield OPS.mlp_layer_cpp, (*layer, "gelu_tanh", r(8, 16), None, 0.7, training)
        yield OPS.mlp_layer_triton_fwd, (*layer, training, r(8, 16), None, *((0.7,) if training else (1.0, r(30))))
        factors = (0.7, None) if training else (1.0, r(30))
        yield OPS.mlp_layer_triton_wide, (*layer, training, r(8, 16), None, *factors)
        projection = r(30, 8), r(8, 8), r(8) if training else None, 0.6
        yield OPS.projection_mlp_triton_fwd, (layer[0], *projection, *layer[1:], training, r(8, 16), None, 0.7)
        for same in (False, True):
            yield OPS.block_aggregate_cpp_fwd, (*image, same, training)
            yield OPS.norm_pool_cpp_fwd, (r(2, 8, 12, 5), None, r(5), r(5), None, (2, 3), 1e-6, same, training)
    yield OPS.norm_linear_triton_fwd, layer
    narrow = r(2, 2, 5, 32), r(32), r(32), 1e-6, 0.2 * r(96, 32), r(96)
    yield OPS.norm_attention_triton_fwd, (*narrow, 2, 0.3)
    yield OPS.linear_triton_fwd, (r(3, 30).mT, r(16, 3), r(16), "gelu_tanh")
    yield OPS.linear_sum_triton_fwd, (r(3, 30).mT, r(16, 3), r(16), r(30, 16), 0.7)
    yield OPS.norm_pool_triton_fwd, (r(1, 4, 4, 5), None, r(5), r(5), None, (1, 2), 1e-6, False, True)
    image = r(1, 4, 4, 5), r(7, 5, 3, 3), r(7), r(7), r(7), r(1, 1, 4, 7), (2, 2), (2, 2), (2, 2), 1e-6
    yield OPS.block_aggregate_triton_fwd, (*image, False, True)
    yield OPS.bias_gelu_triton_fwd, (r(2, 3, 8), r(8), dtype, True)
    yield OPS.gelu_linear_triton_fwd, (r(2, 3, 8), r(8), True, r(5, 8), r(5))
    yield OPS.add_layer_norm_triton_fwd, (*r(2, 2, 3, 8), r(2), r(8), r(8), r(8), 1e-6, dtype, dtype)
    yield OPS.layer_norm_mean_triton_fwd, (r(2, 3, 4, 8), r(8), r(8), 1e-6, dtype)


def test_decompositions_return_what_the_kernels_do():
    """All results, what is kept for gradients too: values, shapes, dtypes and strides, which the graph relies on."""
    table, tested = nest_fast.export.decompositions(), set()
    for op, args in decomposition_cases():
        if "cpp" in str(op) or "triton" not in str(op):
            if cpu_error is not None:
                continue
        elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"nest_fast::{op.__name__}", "CPU"):
            continue  # without Triton's interpreter
        tested.add(op.default)
        wanted, got = op(*args), table[op.default](*args)
        wanted, got = (x if isinstance(x, tuple) else (x,) for x in (wanted, got))
        for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
            what = f"{op} {args[-2:]}: result {i}"
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), what
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5, msg=lambda text, what=what: f"{what}: {text}")
    assert tested == set(table) or cpu_error is not None or torch.cuda.is_available()


@without_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_sub_layer_is_under_autocast_is_decomposed(dtype):
    """Its input is float32 and its weights are not."""
    r = torch.randn
    norm, first, second = (r(30, 8), r(8), r(8), 1e-6), (r(16, 8), r(16)), (r(8, 16), r(8))
    first, second, proj = ([t.to(dtype) for t in pair] for pair in (first, second, (r(8, 8), r(8))))
    attention = (*norm, *first, *proj, None, None, None, [], 5, 2, 1, 0.4, 0.7, True)
    cases = (OPS.attention_layer_cpp, attention), (OPS.mlp_layer_cpp, (*norm, *first, "gelu", *second, 0.7, True))
    for op, args in cases:
        wanted, got = op(*args), nest_fast.export.decompositions()[op.default](*args)
        assert wanted[0].dtype == torch.float32
        assert wanted[1].dtype == dtype
        for a, b in zip(wanted, got, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert relative_error(b, a) < 4 * torch.finfo(dtype).eps  # roundings on the way differ


@without_extension
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30)
def test_any_aggregation_is_decomposed(sizes, block, dtype, same, training):
    B, gh, gw, C = sizes
    bh, bw = block
    x = torch.randn(B, 4 * gh * gw, bh * bw, C).to(dtype)
    weight, pos = torch.randn(5, C, 3, 3).to(dtype), torch.randn(1, gh * gw, bh * bw, 5).to(dtype)
    args = (x, weight, None, torch.randn(5), torch.randn(5), pos, (2 * gh, 2 * gw), block, block, 1e-6, same, training)
    table = nest_fast.export.decompositions()
    wanted, got = OPS.block_aggregate_cpp_fwd(*args), table[OPS.block_aggregate_cpp_fwd.default](*args)
    for a, b in zip(wanted[:4], got[:4], strict=True):  # which of two equal maxima is first may depend on rounding
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        # Winograd's rounding is divided by the deviation of few channels.
        torch.testing.assert_close(b.float(), a.float(), rtol=0.1, atol=0.1 if dtype != torch.float32 else 2e-2)
    assert wanted[4].shape == got[4].shape


@one_process
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "the authors', grad"])
def test_a_program_of_plain_pytorch(grad):
    if grad:
        model = small(**AUTHORS)
        program = exported(model, torch.randn(2, 3, 32, 32))
        plain = program.run_decompositions(nest_fast.export.decompositions())
    else:
        model, program, plain = traced()
    assert operations(program) or cpu_error is not None
    assert not operations(plain)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        as_accurate([program.module()(x).detach(), plain.module()(x).detach()], model, x)


# --- saved programs ---------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
{first}
program = torch.export.load(sys.argv[1])
print(program.module()(torch.zeros(3, 3, 32, 32)).shape)
"""


@one_process
@without_extension
def test_a_saved_program_says_what_it_needs(tmp_path):
    _, program, plain = traced()
    traces = [node.meta.get("stack_trace") for node in program.graph.nodes]
    nest_fast.export.save(program, tmp_path / "kernels.pt2", extra_files={"labels": "cat, dog"})
    assert [node.meta.get("stack_trace") for node in program.graph.nodes] == traces
    extra = {"nest_fast": "", "labels": ""}
    loaded = torch.export.load(tmp_path / "kernels.pt2", extra_files=extra)
    assert loaded.module()(torch.zeros(3, 3, 32, 32)).shape == (3, 5)
    assert "import nest_fast" in extra["nest_fast"]
    assert extra["labels"] == "cat, dog"
    with pytest.raises(AssertionError, match=r"this program needs `import nest_fast` before torch\.export\.load"):
        run_python("-c", LOAD.format(first=""), str(tmp_path / "kernels.pt2"))
    nest_fast.export.save(plain, str(tmp_path / "plain.pt2"))
    assert "[3, 5]" in run_python(
        "-c", LOAD.format(first="sys.modules['nest_fast'] = None"), str(tmp_path / "plain.pt2")
    )


def test_only_a_program_is_saved():
    with pytest.raises(TypeError, match=r"program: expected a torch\.export\.ExportedProgram, got NesT"):
        nest_fast.export.save(small(), "model.pt2")


# --- ONNX -------------------------------------------------------------------------------------------------------------


def runtimes(path):
    """The model at ``path`` in every runtime that is installed: images to logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    yield lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        yield lambda x: compiled([x.numpy()])[0]


@installed("onnx", "onnxscript", "onnxruntime")
@one_process
@pytest.mark.parametrize("case", ["the authors' NesT, a rectangle", "accelerated timm", "a program with kernels"])
def test_onnx(case, tmp_path):
    size = (32, 64) if "rectangle" in case else (32, 32)
    if "program" in case:
        model, _, what = traced()
        args, dynamic = (), {}
    else:
        model = what = accelerated_timm() if "timm" in case else small(img_size=size, **AUTHORS)
        args = (torch.randn(2, 3, *size),)
        dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        torch.onnx.export(what, args, path, dynamo=True, opset_version=18, verbose=False, **dynamic)
    for run in runtimes(path):
        for batch in (1, 3):
            x = torch.randn(batch, 3, *size)
            with torch.no_grad():
                as_accurate([model(x), run(x)], model, x)


@installed("onnx", "onnxscript")
def test_an_explicit_kernel_is_refused_in_onnx():
    class Blocks(torch.nn.Module):
        def forward(self, x):
            return nest_fast.blockify(x, 2, impl="cpp")

    # Refused while tracing, PyTorch's exporter traces in another way, and then has no translation.
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"nest_fast\.blockify"):
        torch.onnx.export(Blocks().eval(), (torch.randn(1, 4, 4, 3),), dynamo=True, verbose=False)


# --- without Python ---------------------------------------------------------------------------------------------------


@without_extension
def test_the_extension_alone_defines_what_a_forward_pass_calls():
    """And nest_fast is imported after it as well as before."""
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    assert torch._C._jit_get_schemas_for_operator(name), name
x = torch.arange(16.).view(1, 4, 4, 1)
assert torch.ops.nest_fast.blockify(x, [2, 2], None)[0, 1, :, 0].tolist() == [2, 3, 6, 7]
import nest_fast
assert nest_fast.ops._extension.cpu_error is None
assert nest_fast.blockify(x, 2, impl="cpp").shape == (1, 4, 4, 1)
"""
    table = nest_fast.export.decompositions()
    names = {op.name() for op in table if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")}
    forward = {name for name in names if "triton" not in name} - {"nest_fast::unpatchify"}  # patchify's backward
    assert len(forward) == 8
    run_python("-c", code, str(EXTENSION), *sorted(forward))


@without_extension
def test_an_extension_of_other_sources_is_refused():
    code = """
import torch
library = torch.library.Library("nest_fast", "FRAGMENT")
library.define("blockify(Tensor x, int edge) -> Tensor")
torch.ops.load_library = lambda path: None
import nest_fast
"""
    wanted = r"_C_cpu.abi3.so: expected nest_fast::blockify\(Tensor x, SymInt\[2\] block_size, .* build it again"
    with pytest.raises(AssertionError, match=wanted):
        run_python("-c", code)


@one_process
@without_extension
def test_an_inductor_package_runs_with_the_extension_only(tmp_path):
    """In Python without nest_fast, and in C++: examples/cpp is built and run."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler, which AOTInductor needs")
    model, program, _ = traced()
    package, images = str(tmp_path / "model.pt2"), str(tmp_path / "images.pt")
    with torch.no_grad():
        assert operations(program) >= {"nest_fast::attention_layer_cpp", "nest_fast::block_aggregate_cpp_fwd"}
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        torch._inductor.aoti_compile_and_package(copy.deepcopy(program), package_path=package, inductor_configs=quick)
    x = torch.randn(3, 3, 32, 32)
    torch.save(x, images)
    code = """
import sys, torch
sys.modules["nest_fast"] = None
torch.ops.load_library(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
print(model(torch.load(sys.argv[3])).tolist())
"""
    python = torch.tensor(eval(run_python("-c", code, str(EXTENSION), package, images)))
    as_accurate([python], model, x)
    if shutil.which("cmake") is None:
        pytest.skip("no cmake, which the C++ example is built with; Python's part has passed")
    lines = run_example(tmp_path / "build", package, images)
    as_accurate([torch.tensor([[float(value) for value in line.split()] for line in lines])], model, x)


def run_example(build, package, images):
    def run(*command):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "CXXFLAGS": "-O0"}
        )
        if "uses CUDA but I cannot find the CUDA" in done.stderr:
            pytest.skip("the CMake files of this torch want a CUDA toolkit; Python's part has passed")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    run(
        "cmake",
        "-S",
        str(ROOT / "examples/cpp"),
        "-B",
        str(build),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    )
    run("cmake", "--build", str(build))
    return run(str(build / "run_nest"), package, str(EXTENSION), images)
