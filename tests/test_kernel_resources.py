"""Every shipped launch configuration of the kernels, compiled for sm_80, sm_90 and sm_100 without a GPU.

``python tests/test_kernel_resources.py --update`` compiles again and writes what came out to kernel_resources.json:
the commit that changes a kernel then shows what the change costs. The table names the sources and the Triton that it
is of; where it is of these, a few kernels of every kind are compiled to see that it is true, and where not, all.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Of several processes that run tests one does all of these: compiling takes its time.
pytestmark = pytest.mark.xdist_group("kernel_resources")

TABLE = Path(__file__).with_name("kernel_resources.json")
SCRIPT = Path(__file__).parents[1] / "scripts" / "kernel_resources.py"
ARCHITECTURES = (80, 90, 100)
N = 196  # the models' blocks of 14 x 14


# Each kernel once, each architecture at least once.
SAMPLE = "|".join(
    [
        "sm_80 (fwd-N196-d32-bf16$|add-layer-norm-bwd-C96)",
        "sm_90 (bwd-N16-d64-h3-mq-bf16|aggregate-norm-pool-C256-512-bf16|bias-gelu-none|layer-norm-mean-C96)",
        "sm_100 (aggregate-fwd-C192-384-bf16|add-layer-norm-fwd-C96)",
    ]
)


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())


@functools.cache
def compiled(only: str = "") -> dict:
    """What scripts/kernel_resources.py finds, in a process of its own: this one's triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(SCRIPT), "--json", file.name, "--only", only]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not (text := Path(file.name).read_text()):
            raise RuntimeError(done.stderr)
    return json.loads(text)


def current() -> dict:
    """The table where it is of these kernels and this triton, otherwise all of them compiled."""
    sample = compiled(SAMPLE)
    return table() if all(table()[key] == sample[key] for key in ("triton", "sources")) else compiled()


def figures(architecture: int, case: str) -> dict:
    return current()["figures"][f"sm_{architecture} {case}"]


def test_no_configuration_spills_or_overflows_or_leaves_the_matrix_units():
    for architecture in ARCHITECTURES:
        assert any(name.startswith(f"sm_{architecture} ") for name in current()["figures"])
    assert current()["broken"] == compiled(SAMPLE)["broken"] == {}


def test_figures_are_those_of_the_checked_in_table():
    if table()["triton"] != current()["triton"]:
        pytest.skip(f"the table is triton {table()['triton']}'s, this is {current()['triton']}")
    found = {**current()["figures"], **compiled(SAMPLE)["figures"]}
    changed = {
        name: (table()["figures"].get(name), row) for name, row in found.items() if table()["figures"].get(name) != row
    }
    assert not changed, f"if meant, python {Path(__file__).name} --update"
    assert found.keys() == table()["figures"].keys(), f"if meant, python {Path(__file__).name} --update"
    assert current() is table(), f"of other sources: python {Path(__file__).name} --update"


def test_the_sample_has_every_kernel():
    def kernels(names):
        return {name.split()[-1] for name in names}

    streamed = {name for name in kernels(table()["figures"]) if name.endswith(("_stream", "_dbias"))}
    assert kernels(compiled(SAMPLE)["figures"]) == kernels(table()["figures"]) - streamed


@pytest.mark.parametrize(
    "case",
    [
        "fwd-N196-d32-bf16 block_attention_fwd",
        "bwd-N196-d32-bf16 block_attention_bwd",
        "fwd-N16-d64-h3-mq-bf16 block_attention_fwd",
        "bwd-N16-d64-h3-mq-bf16 block_attention_bwd",
    ],
)
def test_models_use_hopper_matrix_instructions(case):
    assert figures(90, case)["HGMMA"] > 0


@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_models_waste_few_exponentials_on_hopper(kernel):
    """At most 1.1 times the 196 x 196 a block and head needs: the loop runs 3 times, its short tile once."""
    row = figures(90, f"{kernel}-N{N}-d32-bf16 block_attention_{kernel}")
    per_thread = row["EX2"] + (N // 64 - 1) * row["EX2 in loop"]
    assert per_thread * 32 * row["warps"] <= 1.1 * N * N


def test_models_waste_little_matrix_work_on_hopper():
    """At most 1.35 times 196 x 196 scores, from the tiles that the launchers cut."""
    from nest_fast.kernels import _configs
    from nest_fast.kernels._primitives import tiles_and_tail
    from nest_fast.kernels.block_attention import _pieces

    for kernel, resident in (("fwd", "keys"), ("bwd", "queries")):
        table = _configs.ATTENTION[kernel, 90, "half"]
        config = next(row.config for row in table if min(row.queries, row.keys) >= N and row.head_dim >= 32)
        held, tile = (config.block_n, config.block_m) if kernel == "fwd" else (config.block_m, config.block_n)
        whole, tail = tiles_and_tail(N, tile)
        assert config.resident == resident
        assert (whole * tile + tail) * sum(size for _, size in _pieces(N, held)) <= 1.35 * N * N


@pytest.mark.parametrize("channels", ["C96-192", "C128-256", "C192-384", "C256-512"])
@pytest.mark.parametrize("kind", ["fwd", "train"])
def test_fused_aggregation_uses_hopper_matrix_instructions(kind, channels):
    assert figures(90, f"aggregate-{kind}-{channels}-bf16 block_aggregate_fwd")["HGMMA"] > 0


@pytest.mark.parametrize(("channels", "edge"), [(192, 56), (256, 56), (384, 28), (512, 28)])
def test_fused_aggregation_wastes_little_matrix_work(channels, edge):
    """At most 1.35 times the convolution's pixels, at batch 256, from the tiles that the launcher cuts."""
    from nest_fast.kernels._configs import AGGREGATION
    from nest_fast.kernels.block_aggregate import cut

    for (_, operands), table in AGGREGATION.items():
        config = next(row.config for row in table if channels <= row.channels)
        for programs in (108, 132, 148):  # multiprocessors of an A100, H100 and B200
            rows, _, walk = cut(256 * edge // 2, edge, config.tile_pixels, programs)
            steps = -(-(walk.share + 1) // (rows // 2))
            computed = -(-walk.pairs // walk.share) * walk.tiles * steps * config.tile_pixels
            assert computed <= 1.35 * 256 * edge**2, (operands, walk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is compiled now to kernel_resources.json")
    if parser.parse_args().update:
        found = compiled()
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found['figures'])} kernels written to {TABLE}", *found["broken"].items(), sep="\n")


if __name__ == "__main__":
    main()
