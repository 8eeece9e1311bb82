"""Every launcher of the Triton kernels by Triton's own launch path, over a CUDA driver that launches nothing.

Needs gcc and no GPU. With another Triton: ``PYTHONPATH=<folder with triton> python -m pytest tests/test_launches.py``.
"""

import ast
import functools
import itertools
import json
import os
from types import SimpleNamespace

import pytest
import torch
import triton

from helpers.common import ROOT, run_python
from nest_fast.kernels import _configs, _launch, _layer_configs
from nest_fast.kernels._attention import Spec
from nest_fast.kernels.add_layer_norm import add_layer_norm_bwd
from nest_fast.kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
from nest_fast.kernels.layer_norm_mean import layer_norm_mean_fwd
from nest_fast.kernels.norm_pool import norm_pool_bwd

FP32 = torch.float32

# One process launches them all.
pytestmark = pytest.mark.xdist_group("launches")


@functools.cache
def launches():
    """What helpers/launches.py found in a process of its own: this one's triton may be the interpreter."""
    return json.loads(run_python("helpers/launches.py", env={**os.environ, "TRITON_INTERPRET": "0"}))


def cases():
    return launches()["cases"]


def test_every_argument_arrives():
    """Pointers, integers of 32 and 64 bits, floats and what is compiled in; multiples of 16 are what Triton took for
    such; threads and shared memory are the compiler's."""
    assert {case: row["wrong"] for case, row in cases().items() if row["wrong"]} == {}
    assert max(row["shared"] for row in cases().values()) <= 227 << 10


def test_a_recorded_launch_is_done_again_as_it_was():
    """With the same parameters, grid, threads and shared memory; every launch is recorded."""
    for case, row in cases().items():
        assert row["again"] == [False] * len(row["grids"]), case


def test_every_tensor_is_seen_by_a_kernel():
    """Those given to a launcher and those it returned."""
    assert [case for case, row in cases().items() if row["missing"]] == []


def test_as_many_programs_as_there_is_work():
    for case, row in cases().items():
        assert row["grids"] == [[programs, 1, 1] for programs in row["programs"]], case


def test_a_tensor_at_an_odd_address_is_not_taken_for_an_aligned_one():
    assert cases()["block_attention_fwd"]["unpromised"] == cases()["add_layer_norm_fwd"]["unpromised"] == 0
    assert cases()["block_attention_fwd, unaligned"]["unpromised"] == 3  # q, k and v
    assert cases()["add_layer_norm_fwd, unaligned"]["unpromised"] == 1  # x


def test_a_graph_of_one_batch_has_the_kernels_of_every_other():
    """One call of any batch compiles and loads what a capture of another needs: numbers that change with it are not
    compiled in, nor whether 16 divides them."""
    assert {kernel: more for kernel, (_, more) in launches()["variants"].items() if more} == {}


def test_no_kernel_is_left_out():
    decorated = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorated.add(node.name)
    assert {kernel for row in cases().values() for kernel in row["kernels"]} == decorated
    assert set(launches()["variants"]) == decorated


def test_the_benchmark_of_host_time_goes_the_way_of_a_gpu():
    """It puts choices in the place of what asks for a GPU, and says so where a layer is not chained."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import host_time
host_time.ROUNDS = host_time.CALLS = 1
host_time.main()
"""
    times = json.loads(run_python("-c", code, env={**os.environ, "TRITON_INTERPRET": "0"}))
    assert set(times) == {"layer", "add_layer_norm", "bias_gelu", "block_attention", "layer_norm_mean"}
    assert all(len(rounds) == 1 for peers in times.values() for rounds in peers.values())


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "candidate", "loaded"),
    [
        ("the first is clean", 0, 1),
        ("the first spills", 1, 2),
        ("all spill", 1, 3),
        ("the first does not compile", 1, 1),
        ("the first does not fit", 1, 1),
        ("it does not fit again", 1, 0),
    ],
)
def test_the_first_candidate_that_suits_is_taken(where, candidate, loaded):
    """Or the one that spills least; a second call compiles and loads nothing."""
    assert launches()["choices"][where] == [candidate, loaded, 0]


def test_where_no_candidate_fits_the_first_ones_error_is_raised():
    assert launches()["choices"]["none fits"].startswith("OutOfResources: out of resource: shared memory")
    assert launches()["choices"]["none fits again"].startswith("RuntimeError: a kernel that the GPU refused before")


def test_a_choice_inside_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(_configs, "architecture", lambda: 90)
    with pytest.raises(RuntimeError, match=r"^bias_gelu: expected a run .* got the first one inside"):
        _launch._choose(_configs.bias_gelu, ("fwd", 8), SimpleNamespace(is_cuda=True), None)


def test_every_launch_has_a_choice():
    """Two to six candidates, those of the interpreter's architecture among them; over 256 tokens all stream."""
    shape = Spec(196, 32, 1, False, True, False)
    for N, head_dim, adds, tf32, dtype in itertools.product(
        (16, 49, 196, 256, 576), (32, 64, 128), (False, True), (False, True), (torch.bfloat16, torch.float32)
    ):
        spec = shape._replace(N=N, HEAD_DIM=head_dim, ADDS=adds, TF32=tf32)
        for kernel, architecture in itertools.product(("fwd", "bwd", "dbias"), (80, 86, 89, 90, 100, 120)):
            candidates = _configs.attention(kernel, spec, dtype, architecture)
            assert 2 <= len(candidates) <= 6
            assert N <= 256 or not any(config.resident for config in candidates)
    for operands, architecture in itertools.product(("half", "tf32", "ieee"), (80, 90, 100, 120)):
        assert 2 <= len(_configs.block_aggregate(512, operands, architecture)) <= 6
        for channels in (16, 96, 192, 256):
            assert 2 <= len(_layer_configs.mlp_layer(channels, operands, architecture)) <= 6
            assert 2 <= len(_layer_configs.linear_rows(channels, operands, architecture)) <= 6
        for can_copy in (False, True):
            assert 2 <= len(_layer_configs.linear(can_copy, architecture)) <= 6
            for name in ("linear_sum", "norm_linear", "mlp_layer_bwd_hidden", "mlp_layer_bwd_weight"):
                assert 2 <= len(getattr(_layer_configs, name)(384, 1152, can_copy, architecture)) <= 6
        for channels in (16, 96, 128):
            assert 2 <= len(_layer_configs.projection_mlp(channels, architecture)) <= 6
            assert 2 <= len(_layer_configs.mlp_layer_bwd_rows(channels, architecture)) <= 6
            assert 2 <= len(_layer_configs.mlp_layer_bwd_weights(channels, architecture)) <= 6
            assert 2 <= len(_layer_configs.norm_attention(channels, architecture)) <= 6


@pytest.mark.parametrize("multiprocessors", [46, 108, 132])
def test_programs_that_leave_sums_run_at_once(monkeypatch, multiprocessors):
    """No second wave of them with little to do; and where there is work for all, few multiprocessors have none."""
    started = {}

    def start(kernel, programs, *args, **tile):
        started[kernel.fn.__name__] = programs, tile

    monkeypatch.setattr(_configs, "multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(_launch, "_choose", lambda table, shape, x, run: table(*shape, 90)[0])
    monkeypatch.setattr(_launch, "_start", start)
    monkeypatch.setattr(_launch, "CHOSEN", {})
    for C, rows in itertools.product((96, 384, 1536, 2048, 4096), (1, 5_000, 50_000, 803_000)):
        x, row = (torch.empty(*shape, device="meta") for shape in ((1, rows, C), (1, rows)))
        add_layer_norm_bwd(x, x, x, row, row, None, x[0, 0], FP32, FP32, False)
        bias_gelu_bwd(x, x, x[0, 0], False, True)
        layer_norm_mean_fwd(x, x[0, 0], x[0, 0], 1e-6, FP32)
        if C <= 1024:
            y, argmax = torch.empty(1, rows, 4, C, device="meta"), torch.empty(1, dtype=torch.uint8, device="meta")
            norm_pool_bwd(x, y, None, x[0, 0], row, row, argmax, (2, 2), True)
        for kernel, (programs, tile) in started.items():
            at_once = _configs.at_once(x.device, tile)
            assert programs <= at_once, kernel
            assert programs > 0.8 * at_once or rows < 100_000 or kernel == "_layer_norm_mean_join_kernel", kernel
    assert len(started) == 5


@pytest.mark.gpu
def test_a_cuda_graph_takes_what_ran_before():
    x, bias = torch.randn(64, 24, device="cuda"), torch.randn(24, device="cuda")
    wanted = bias_gelu_fwd(x, bias, x.dtype, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bias_gelu_fwd(x, bias, x.dtype, False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
