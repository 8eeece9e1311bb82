"""What the project says of its speed is what benchmarks/report.py makes of the kept runs."""

import sys

import pytest

from helpers.common import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
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
