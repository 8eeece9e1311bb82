"""The ``measure`` fixture: checks a peer, then times it in turns with the case's yardstick; and what the JSON holds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from harness import CLOCK, DEVICE, SHORT, Case, Problem, Timed, check, peak_memory, runs_our_operators
from limits import Burst, done, has_loop
from runtimes import RUNTIMES

from nest_fast.ops._extension import cpp_isa

os.environ.setdefault("NEST_FAST_TUNED", "off")  # what there is without tuning; a path measures what tune found

START = time.monotonic()
# Messages of errors that mean "this one cannot run here": nest_fast's impl=, PyTorch's attention backends, its ONNX
# exporter.
CANNOT = ("impl: ", "No available kernel", "Failed to convert the exported program")
# Marks of what is measured only where an option of that name asks for it.
ON_DEMAND = {"sweep": "a scaling curve", "families": "one more family of models"}


def pytest_addoption(parser):
    group = parser.getgroup("nest_fast")
    group.addoption("--sweep", action="store_true", help="also the scaling curves over batch and image size")
    group.addoption("--families", action="store_true", help="also every family of models that accelerate knows")
    group.addoption("--time-limit", type=float, metavar="SECONDS", help="start no benchmark after this many seconds")


def pytest_configure(config):
    for name, what in ON_DEMAND.items():
        config.addinivalue_line("markers", f"{name}: {what}, measured with --{name}")


def pytest_collection_modifyitems(config, items):
    items.sort(key=_turn)
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=True))
        for name, what in ON_DEMAND.items():
            if item.get_closest_marker(name) is not None and not config.getoption(f"--{name}"):
                item.add_marker(pytest.mark.skip(reason=f"{what}, measured with --{name}"))


def _turn(item) -> tuple[int, int]:
    """What matters most comes first, in case of a time limit; what waits minutes for a compiler comes last, and before
    it other families in training and in other runtimes."""
    files = ("bench_ceilings.py", "bench_model.py", "bench_families.py")
    params = item.callspec.params if hasattr(item, "callspec") else {}
    peer = str(params.get("peer", ""))
    extra = item.path.name == "bench_families.py" and (peer in RUNTIMES or params["case"].backward)
    turn = 2 if "compile" in peer else int(extra)
    return turn, files.index(item.path.name) if item.path.name in files else len(files)


def pytest_runtest_setup(item):
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - START > limit:
        pytest.skip(f"the time limit of {limit:g} s is over")


def pytest_report_teststatus(report, config):
    """With ``-v`` a line says what was measured, where pytest would say PASSED."""
    measured = dict(report.user_properties).get("measured")
    return ("passed", ".", measured) if report.when == "call" and report.passed and measured else None


@pytest.fixture(scope="session")
def problems():
    """The problem of the last case: its peers come one after the other and share inputs, float64 and yardstick."""
    last: dict[Case, Problem] = {}

    def get(build: Callable[[Case], Problem], case: Case) -> Problem:
        if case not in last:
            last.clear()
            torch.manual_seed(0)
            last[case] = build(case)
        return last[case]

    return get


@pytest.fixture
def measure(benchmark, problems, record_property):
    """``measure(build, case, peer)`` checks the peer of ``build(case)`` against float64, then times it."""

    def run(build: Callable[[Case], Problem], case: Case, peer: str) -> None:
        if peer.endswith(" triton") and os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("TRITON_INTERPRET=1: interpreted kernels have no speed to measure")
        problem = problems(build, case)
        own = problem.solved_by(peer)
        if peer == own.yardstick:
            mine, errors = own.yardstick_run, own.yardstick_errors
        else:
            mine, results = _attempt(own.peers[peer], problem)
            errors = [] if peer in problem.limits else _check(own, peer, results)
            del results
        if peer == "nest_fast" and not runs_our_operators(mine, problem.inputs):
            pytest.skip(f"{case.op} is plain PyTorch here")
        benchmark.group = str(case)
        yardstick = problem.yardstick_timed
        timed = yardstick if peer == problem.yardstick else Timed(mine, problem.inputs, graph=problem.count_bytes)
        burst = Burst(case.dtype, own.bytes_read, own.bytes_written) if has_loop(case.dtype) else None
        theirs, ratios = _time(benchmark, timed, yardstick, problem.seconds, burst)
        if not benchmark.enabled:
            return
        median = benchmark.stats.stats.median
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        benchmark.extra_info.update(
            op=case.op,
            case=case.name,
            batch=case.batch,
            dtype=SHORT[case.dtype],
            direction=case.direction,
            axis=case.axis,
            x=case.x,
            peer=peer,
            yardstick=problem.yardstick,
            device=DEVICE,
            limit=peer in problem.limits,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            yardstick_seconds=theirs,
            errors=errors,
            yardstick_errors=own.yardstick_errors,
            bytes=own.bytes_read + own.bytes_written,
            flops=own.flops,
            done=done(own, peer, mine) if burst else own.flops,
            rate=burst.rate if burst else 0.0,
            bandwidth=burst.bandwidth if burst else 0.0,
            items=problem.items,
            memory=peak_memory(mine, problem.inputs) if case.backward or DEVICE == "cuda" else 0,
            timing=repr(CLOCK) if timed.graph is None else "CUDA graph",
        )
        record_property("measured", f"{_unit(median)} x{ratio:.2f}")

    return run


def _attempt(make, problem):
    """What ``make`` makes and its first results, which also warm up; a skip where it says that it cannot run here."""
    try:
        run = make()
        return run, run(*problem.inputs)
    except RuntimeError as error:
        if any(text in str(error) for text in CANNOT):
            pytest.skip(str(error).splitlines()[0])
        raise


def _check(problem, peer, results):
    """The errors of ``results``; what a compiler or another runtime makes of a model may be too far off."""
    try:
        return check(problem, results)
    except AssertionError as error:
        if peer.startswith("nest_fast") or not (" compiled" in peer or peer in RUNTIMES):
            raise
        pytest.skip(f"{peer}: {error}")


def _time(benchmark, timed: Timed, yardstick: Timed, seconds: float, burst: Burst | None) -> tuple[float, list[float]]:
    """Time ``timed``; returns the yardstick's median and the ratio of every round.

    The yardstick, and a ``burst`` at the processor's limits, run in the untimed setup of each round, so that a ratio
    compares neighbours: machines change their speed from minute to minute, by more than what is to be seen. Short
    ones are timed right after a call of their own, as one of many.
    """
    paired: list[float] = []

    def setup() -> None:
        if burst is not None:
            burst()
        if timed is not yardstick:
            yardstick.settle()
            paired.append(CLOCK.time(yardstick, yardstick.calls))
        timed.settle()
        CLOCK.calls = timed.calls

    one = timed.round_seconds + yardstick.round_seconds
    benchmark.pedantic(timed, setup=setup, rounds=min(50, max(3, int(seconds / one))))
    if not benchmark.enabled:
        return 0.0, []
    ours = benchmark.stats.stats.data
    paired = paired or ours
    return statistics.median(paired), [theirs / mine for theirs, mine in zip(paired, ours, strict=True)]


def _unit(seconds: float) -> str:
    scale, unit = next((s for s in ((1.0, "s"), (1e-3, "ms")) if seconds >= s[0]), (1e-6, "us"))
    return f"{seconds / scale:.3g} {unit}"


# --- what the JSON says of the machine --------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info(config):
    """What decides the speed, and nothing that names the machine's owner."""
    info = {
        "processor": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "extension_isa": cpp_isa,
        "onednn_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in ("nest_fast", "torch", "triton", "timm", "pytest-benchmark")},
    }
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info["project"] = "nest_fast"


# What pytest-benchmark's own comparison shows, and the quartiles.
STATISTICS = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "outliers", "ops", "rounds", "iterations")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Small enough to be committed: the single timings only where ``--benchmark-save-data`` asks for them."""
    for benchmark in output_json["benchmarks"]:
        for key in ("params", "param", "options"):
            benchmark.pop(key)
        if not config.getoption("benchmark_save_data"):
            benchmark["stats"] = {key: _short(benchmark["stats"][key]) for key in STATISTICS}
            benchmark["extra_info"] = {key: _short(value) for key, value in benchmark["extra_info"].items()}


def _short(value):
    if isinstance(value, list):
        return [_short(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
