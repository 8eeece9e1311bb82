"""What the kernels are launched with, compiled without a GPU for every architecture and with every Triton supported.

``python tests/test_kernel_resources.py --update`` compiles again and writes what came out to kernel_resources.json: the
commit that changes a kernel then shows what the change costs. The table has, for each Triton, the sources that its
figures are of; where they are these, a few kernels of every kind are compiled to see that they are true, and where not,
all. For the others of TRITONS: ``PYTHONPATH=<folder with that triton> python tests/test_kernel_resources.py --update``.
``--only REGEX`` updates a part, and the table is of these sources when all parts are.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import triton

# Of several processes that run tests one does all of these: compiling takes its time.
pytestmark = pytest.mark.xdist_group("kernel_resources")

TABLE = Path(__file__).with_name("kernel_resources.json")
SCRIPT = Path(__file__).parents[1] / "scripts" / "kernel_resources.py"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# The first has the figures of every shape, others those of the models'.
TRITONS = ("3.7.1", "3.8.0")
N = 196  # the models' blocks of 14 x 14


# Each kernel once, each architecture at least once.
SAMPLE = "|".join(
    [
        "sm_80 (fwd-N196-d32-bf16$|add-layer-norm-bwd-C96)",
        "sm_90 (bwd-N16-d64-h3-mq-bf16|aggregate-norm-pool-C256-512-bf16|bias-gelu-none|layer-norm-mean-C96)",
        "sm_89 (mlp|norm-linear)-C128-bf16",
        "sm_100 (aggregate-fwd-C192-384-bf16|add-layer-norm-fwd-C96)",
    ]
)


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())


@functools.cache
def script(*arguments: str) -> dict:
    """What scripts/kernel_resources.py finds, in a process of its own: this one's triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(SCRIPT), "--json", file.name, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not (text := Path(file.name).read_text()):
            raise RuntimeError(done.stderr)
    return json.loads(text)


def sample() -> dict:
    return script("--only", SAMPLE)


@functools.cache
def current() -> dict:
    """The figures of this Triton: the table's where it is of these kernels, otherwise all of them compiled."""
    known = table().get(triton.__version__, {})
    return known if known.get("sources") == sample()["sources"] else script()


def figures(architecture: int, case: str) -> dict:
    return {"HGMMA": 0, **current()["figures"][f"sm_{architecture} {case}"]}


def test_no_configuration_spills_or_overflows_or_leaves_the_matrix_units():
    """Of the candidates at least one does not, on any architecture and with any Triton."""
    assert current()["broken"] == sample()["broken"] == {}
    for version in TRITONS:
        known = table()[version]
        assert {name.split()[0] for name in known["figures"]} == {f"sm_{number}" for number in ARCHITECTURES}
        assert known["broken"] == {}, version
        assert not any(row.get("spill_bytes", 0) for row in known["figures"].values()), version


@pytest.mark.parametrize("version", TRITONS)
def test_the_table_is_of_these_sources_and_complete(version):
    assert table()[version]["sources"] == sample()["sources"], f"python {Path(__file__).name} --update"
    listed = sample()["cases"]["shipped" if version == TRITONS[0] else "models"]
    assert {name.rsplit(" ", 1)[0] for name in table()[version]["figures"]} == set(listed)


def test_figures_are_those_of_the_checked_in_table():
    if triton.__version__ not in table():
        pytest.skip(f"the table is of triton {', '.join(table())}, this is {triton.__version__}")
    known = table()[triton.__version__]["figures"]
    changed = {name: (known[name], row) for name, row in sample()["figures"].items() if known.get(name, row) != row}
    assert not changed, f"if meant, python {Path(__file__).name} --update"


def test_the_sample_has_every_kernel():
    def kernels(names):
        return {name.split()[-1] for name in names}

    known = table()[TRITONS[0]]["figures"]
    streamed = {name for name in kernels(known) if name.endswith(("_stream", "_dbias"))}
    assert kernels(sample()["figures"]) - streamed == kernels(known) - streamed


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


@pytest.mark.parametrize("channels", [96, 128, 192, 256])
@pytest.mark.parametrize(
    ("kind", "kernel"), [("mlp", "mlp_layer_fwd"), ("norm-linear", "linear_rows"), ("linear-sum", "linear_rows")]
)
def test_sub_layers_use_hopper_matrix_instructions(kind, kernel, channels):
    assert figures(90, f"{kind}-C{channels}-bf16 {kernel}")["HGMMA"] > 0


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


def update(found: dict, only: str) -> None:
    """Write what was found with this Triton; with ``only``, beside what is known of these sources."""
    del found["cases"]
    known = table().get(found["triton"], {})
    if only and known.get("sources") == found["sources"]:
        for part in ("figures", "broken"):
            kept = {name: row for name, row in known[part].items() if not re.search(only, name.rsplit(" ", 1)[0])}
            found[part] = {**kept, **found[part]}
    written = {**table(), found.pop("triton"): found}
    TABLE.write_text(_lines(written) + "\n")


def _lines(written: dict) -> str:
    """JSON with a line for each kernel, in the order of their names."""

    def rows(part: dict) -> str:
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(part[name])}" for name in sorted(part))
        return f"{{\n{lines}\n  }}" if part else "{}"

    blocks = [
        f' "{version}": {{\n  "sources": "{known["sources"]}",\n  "figures": {rows(known["figures"])},\n'
        f'  "broken": {rows(known["broken"])}\n }}'
        for version, known in sorted(written.items())
    ]
    return "{\n" + ",\n".join(blocks) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is compiled now to kernel_resources.json")
    parser.add_argument("--only", default="", help="cases in whose name, sm_90 fwd-N196-d32-bf16, this regex is")
    args = parser.parse_args()
    if args.update:
        found = script("--only", args.only, "--cases", "shipped" if triton.__version__ == TRITONS[0] else "models")
        count, broken = len(found["figures"]), found["broken"]
        update(found, args.only)
        print(f"{count} kernels of triton {triton.__version__} written to {TABLE}", *broken.items(), sep="\n")


if __name__ == "__main__":
    main()
