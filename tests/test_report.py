"""What the project says of its speed is what benchmarks/report.py makes of the kept runs."""

import re
import sys

import pytest
import torch

from helpers.common import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness
import model_gpu
import report
from charts import picture
from runs import load, shown_cases

RUNS = sorted(report.RESULTS.glob("*/????-??-??.json"))
README = (ROOT / "README.md").read_text()


def published():
    """The run that README shows."""
    (run,) = [run for run in map(load, RUNS) if run.where in README]
    return run


def test_readme_shows_a_kept_run():
    run = published()
    own, beside = shown_cases(run)
    assert report.summary(run, own).strip() in README
    assert report.paper(beside) in README


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_show_the_same_run(dark):
    path = report.RESULTS / f"speed-{'dark' if dark else 'light'}.svg"
    assert path.read_text() == picture(published(), dark)


def test_the_tables_show_every_machine_s_newest_run():
    text = (report.RESULTS / "README.md").read_text()
    newest = {path.parent: path for path in RUNS}
    assert newest
    for path in newest.values():
        assert report.page(load(path), "###").strip() in text


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_rows_of_a_case_do_not_contradict_one_another(path):
    for rows in load(path).cases():
        yardstick_seconds = [row.seconds * row.ratio for row in rows]
        assert yardstick_seconds == pytest.approx(yardstick_seconds[:1] * len(rows))


def test_the_model_of_time_is_near_what_others_measured():
    """Within what docs/gpu.md says; and each GPU's kernels are in the table of compiled ones."""
    ratios = {one.what: one.predict(model_gpu.GPUS[one.gpu]) / one.seconds for one in model_gpu.PUBLISHED}
    assert all(0.5 < ratio < 1.25 for ratio in ratios.values()), ratios
    for gpu in model_gpu.GPUS.values():
        tiny, small, base = (model_gpu.model(levels, gpu) for levels in model_gpu.MODELS.values())
        assert tiny < small < base
        assert tiny < model_gpu.model(model_gpu.MODELS["NesT-T"], gpu, one_mlp=False)


def test_the_gains_of_families_are_those_of_kept_runs():
    """In docs/models.md every row of the run of all families; in README's table nothing that no run has."""
    runs = [load(path) for name in ("*avx2*", "*avx512*") for path in report.RESULTS.glob(f"{name}/*.json")]
    gains = {report.with_spread(row) for run in runs for row in run.rows if row.peer == report.ACCELERATED}
    page = (ROOT / "docs" / "models.md").read_text()
    families = [load(path) for path in report.RESULTS.glob("*/*-families.json")]
    assert len(families) == 3
    for row in (row for run in families for row in run.rows):
        if row.peer != row.yardstick:
            assert any(f"| {row.op} |" in line and report.with_spread(row) in line for line in page.splitlines())
    table = README[README.index("| Family |") : README.index("Gains on two threads")]
    quoted = re.findall(r"\d\.\d\dx \([^)]*\)", table)
    assert len(quoted) > 5
    assert set(quoted) <= gains
    rounded = {gain.split()[0] for gain in gains}
    assert set(re.findall(r"\d\.\d\dx", table)) <= rounded


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_the_page_about_gpus_quotes_the_predictions(gpu):
    page = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
    speeds = [model_gpu.BATCH / model_gpu.model(levels, model_gpu.GPUS[gpu]) for levels in model_gpu.MODELS.values()]
    tiny, small, base = (f"{round(speed, -2):,.0f}" for speed in speeds)
    assert f"{tiny}, {small} and {base} on an {gpu}" in page


@pytest.mark.parametrize(("free", "batches"), [(79, [256, 1]), (40, [128, 1]), (23, [64, 1]), (15, [32, 1])])
def test_batches_fit_the_memory(monkeypatch, free, batches):
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free << 30, 80 << 30))
    case = {"op": "nest_base", "name": "224 px", "dtype": torch.bfloat16}
    model = harness.fitting(harness.Case(batch=batch, **case) for batch in (256, 1))
    assert [one.batch for one in model] == batches
    curve = [harness.Case(batch=batch, axis="batch", x=batch, **case) for batch in (1, 64, 256, 1024)]
    most = 4 * batches[0]
    assert list(harness.fitting(curve)) == [one for one in curve if one.batch <= most]
