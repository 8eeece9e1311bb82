"""What the kernels are launched with, compiled without a GPU for every architecture and with every Triton supported.

``python tests/test_kernel_resources.py --update`` compiles what changed and writes what came out to
kernel_resources.json: the commit that changes a kernel then shows what the change costs. Each of its rows has a digest
of the sources that it is of, for each Triton; a few kernels of every kind are compiled to see that the figures are
true. For the others of TRITONS: ``PYTHONPATH=<its folder> python tests/test_kernel_resources.py --update``. With
``--only REGEX`` it updates a part, with ``--minutes M`` what can be begun in so many; called again it goes on.
"""

import argparse
import ast
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import triton

from helpers.common import ROOT

# Of several processes that run tests one does all of these: compiling takes its time.
pytestmark = pytest.mark.xdist_group("kernel_resources")

TABLE = Path(__file__).with_name("kernel_resources.json")
SCRIPT = ROOT / "scripts" / "kernel_resources.py"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# The first has the figures of every shape, others those of the models'.
TRITONS = ("3.7.1", "3.6.0", "3.8.0", "3.9.0")
N = 196  # the models' blocks of 14 x 14


# Each kernel once, each architecture at least once.
SAMPLE = "|".join(
    [
        "sm_80 (fwd-N196-d32-bf16$|add-layer-norm-bwd-C96)",
        "sm_90 (bwd-N16-d64-h3-mq-bf16|aggregate-norm-pool-C256-512-bf16|bias-gelu-none|layer-norm-mean-C96)",
        "sm_89 (projection-mlp|mlp|mlp-train|norm-linear|norm-attention)-C128-bf16",
        "sm_100 (aggregate-fwd-C192-384-bf16|add-layer-norm-fwd-C96)",
        "sm_100 (linear-gelu|norm-linear|mlp-train-fc1)-C384-bf16",
    ]
)


@functools.cache
def table() -> dict[str, dict[str, dict]]:
    """Of each Triton the rows: "sm_90 fwd-N196-d32-bf16 block_attention_fwd" and its figures."""
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


def which(version: str) -> str:
    """Of which cases there are figures of a Triton."""
    return "shipped" if version == TRITONS[0] else "models"


def stale(rows: dict[str, dict], cases: dict[str, str]) -> list[str]:
    """The cases whose rows are missing, of other sources, or of a case that there is no more."""
    known = {case_of(name): row["sources"] for name, row in rows.items()}
    return sorted(case for case in {*known, *cases} if known.get(case) != cases.get(case))


def case_of(name: str) -> str:
    return name.rpartition(" ")[0]


@functools.cache
def current() -> dict[str, dict]:
    """The rows of this Triton: the table's, or where it has none, of all kernels compiled now."""
    known = table().get(triton.__version__)
    return script()["figures"] if known is None else known


def figures(architecture: int, case: str) -> dict:
    return {"HGMMA": 0, **current()[f"sm_{architecture} {case}"]}


def test_no_configuration_spills_or_overflows_or_leaves_the_matrix_units():
    """Of the candidates at least one does not, on any architecture and with any Triton."""
    for rows in (current(), sample()["figures"], *(table()[version] for version in TRITONS)):
        assert {name: row["broken"] for name, row in rows.items() if "broken" in row} == {}
        assert not any(row.get("spill_bytes", 0) for row in rows.values())
    for version in TRITONS:
        assert {name.split()[0] for name in table()[version]} == {f"sm_{number}" for number in ARCHITECTURES}


@pytest.mark.parametrize("version", TRITONS)
def test_the_table_is_of_these_sources_and_complete(version):
    assert stale(table()[version], sample()["cases"][which(version)]) == [], f"python {Path(__file__).name} --update"


def test_a_change_makes_the_figures_stale_of_the_kernels_that_reach_it(tmp_path, monkeypatch):
    """Of others it does not; a comment, a docstring or a launcher's line is nobody's."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import kernel_sources

    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    names = [
        (f"nest_fast.kernels.{path.stem}", node.name)
        for path in (tmp_path / "kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]

    def changed(file, *replacements):
        path = tmp_path / "kernels" / file
        before, text = {name: kernel_sources.written([name], tmp_path) for name in names}, path.read_text()
        for old, new in replacements:
            assert text.count(old) == 1
            path.write_text(path.read_text().replace(old, new))
        kernel_sources.read.cache_clear()
        found = {name[1] for name in names if kernel_sources.written([name], tmp_path) != before[name]}
        path.write_text(text)
        kernel_sources.read.cache_clear()
        return found

    nothing = ("    # The mean of a row", "    # That of a row"), ("``(x - mean) * rstd`` of rows x", "Rows x")
    assert changed("_primitives.py", *nothing) == set()
    assert changed("_primitives.py", ("start, cut = 0, []", "start, cut = 0, [][:]")) == set()
    normalising = {"_add_layer_norm_fwd_kernel", "_layer_norm_mean_fwd_kernel"}
    assert changed("_primitives.py", ("1) / C + eps)", "1) / C + 2.0 * eps)")) == normalising
    attention = {name for _, name in names if "attention" in name}
    assert len(attention) == 7
    assert changed("_windows.py", ("return y * W + x,", "return x + y * W,")) == attention
    assert changed("_attention.py", ("LARGE: tl.constexpr = 1e30", "LARGE: tl.constexpr = 1e31")) == attention


def test_figures_are_those_of_the_checked_in_table():
    if triton.__version__ not in table():
        pytest.skip(f"the table is of triton {', '.join(table())}, this is {triton.__version__}")
    known = table()[triton.__version__]
    changed = {name: (known[name], row) for name, row in sample()["figures"].items() if known.get(name, row) != row}
    assert not changed, f"if meant, python {Path(__file__).name} --update"


def test_the_sample_has_every_kernel():
    def kernels(names):
        return {name.split()[-1] for name in names}

    known = kernels(table()[TRITONS[0]])
    streamed = {name for name in known if name.endswith(("_stream", "_dbias"))}
    assert kernels(sample()["figures"]) - streamed == known - streamed


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


def update(found: dict) -> list[str]:
    """Write what was found with this Triton, beside what is known of these cases; returns those that are left."""
    version, rows = found["triton"], found["figures"]
    cases, compiled = found["cases"][which(version)], {case_of(name) for name in rows}
    known = table().get(version, {})
    kept = {name: row for name, row in known.items() if case_of(name) in cases and case_of(name) not in compiled}
    TABLE.write_text(_lines({**table(), version: {**kept, **rows}}) + "\n")
    return stale({**kept, **rows}, cases)


def _lines(written: dict) -> str:
    """JSON with a line for each kernel, in the order of their names."""
    tables = []
    for version, rows in sorted(written.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
        tables.append(f' "{version}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(tables) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is compiled now to kernel_resources.json")
    parser.add_argument("--only", default="", help="cases in whose name, sm_90 fwd-N196-d32-bf16, this regex is")
    parser.add_argument("--minutes", default="inf", help="after which no other case is begun")
    args = parser.parse_args()
    if args.update:
        limits = "--only", args.only, "--minutes", args.minutes
        found = script("--cases", which(triton.__version__), "--known", str(TABLE), *limits)
        left, rows = update(found), found["figures"]
        print(f"{len(rows)} kernels of triton {triton.__version__} written to {TABLE}, {len(left)} cases left")
        print(*(f"{name}  {row['broken']}" for name, row in rows.items() if "broken" in row), sep="\n")


if __name__ == "__main__":
    main()
