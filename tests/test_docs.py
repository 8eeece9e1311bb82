"""Every page of the documentation runs: its Python blocks one after the other, its commands in the checkout.

A comment above a block says what is special about it: ``<!-- slow: why -->`` is run by ``make docs`` only,
``<!-- needs: a package -->`` where that package is; a block inside ``<!-- hidden … -->`` runs and is not shown.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from helpers.common import ROOT
from nest_fast.testing import import_timm

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>slow|needs): (?P<why>[^>]*?) -->\n|<!-- hidden\n)?"
    r"^```(?P<kind>python|bash|console)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
SLOW = os.environ.get("NEST_FAST_DOCS") == "slow"  # set by make docs


def blocks(page):
    for match in BLOCK.finditer(page.read_text()):
        yield match["kind"], match["text"], match["mark"], match["why"], page.read_text()[: match.start()].count("\n")


def runs(mark, why):
    if mark == "needs":
        return all(importlib.util.find_spec(name) is not None for name in why.split())
    if mark == "slow" and "needs a GPU" in why:
        return torch.cuda.is_available() and SLOW
    return mark is None or SLOW


def run_command(text, cwd):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


RAN = set()  # what a page before it has run


def group(page):
    """Two pages have one run between them: the same command."""
    return "digits" if page.stem in ("train", "classify") else page.stem


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=pytest.mark.xdist_group(group(page))) for page in PAGES]
)
def test_page(page, monkeypatch, tmp_path):
    import_timm()
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    left_out = []
    for kind, text, mark, why, line in blocks(page):
        if kind == "console" or not runs(mark, why):
            left_out.append(f"line {line}: {mark}: {why}")
        elif kind == "bash":
            if text not in RAN:
                run_command(text, ROOT)
            RAN.add(text)
        else:
            # The lines of the page, so that a traceback names them.
            exec(compile("\n" * (line + 1) + text, str(page), "exec"), names)
    print("\n".join(left_out))


def test_nothing_on_a_page_is_forgotten():
    """Each fence is one that runs, or says why not."""
    fences = {"": 0}
    for page in PAGES:
        text = page.read_text()
        found = list(blocks(page))
        for kind in ("python", "bash", "console"):
            assert len(re.findall(rf"^```{kind}$", text, re.M)) == sum(block[0] == kind for block in found), page
        for opening in re.findall(r"^```(\S+)", text, re.M):
            assert opening in ("python", "bash", "console", "{toctree}", "{include}", "{eval-rst}", "mermaid"), page
        for kind, _, mark, why, line in found:
            assert kind != "console" or mark == "slow", (
                f"{page.name}, line {line}: commands that are only shown say why"
            )
            assert mark is None or why.strip(), f"{page.name}, line {line}: expected a reason"
        fences[page.stem] = len(found)
    assert sum(fences.values()) > 15


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="Sphinx is not installed (nest_fast[docs])")
def test_the_site_builds_without_a_warning(tmp_path):
    source = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", source)
    shutil.copy(ROOT / "README.md", tmp_path)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(source), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "explain.html").read_text()
    assert "GradCAT" in page
    assert "tempfile" not in page, "what is hidden is shown"
