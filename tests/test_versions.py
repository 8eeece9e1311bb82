"""The table of versions in README, and that a deprecated call of nest_fast's fails the tests."""

import json
import sysconfig
import types
import warnings

import pytest

from helpers.common import ROOT


def module(name, path, text):
    made = types.ModuleType(name)
    exec(compile(text, path, "exec"), made.__dict__)
    return made


OLD = """
import warnings
def old(category=DeprecationWarning):
    warnings.warn("old() is deprecated", category)
"""
LIBRARY = module("library", f"{sysconfig.get_path('purelib')}/library.py", OLD)
OURS = module("nest_fast.ours", "/src/nest_fast/ours.py", "def call(old, *args):\n    old(*args)\n")


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, UserWarning])
def test_a_deprecated_call_of_ours_is_an_error(category):
    with pytest.raises(AssertionError, match=rf"nest_fast causes {category.__name__}: old\(\) is deprecated"):
        OURS.call(LIBRARY.old, category)


@pytest.mark.filterwarnings("ignore:old")
def test_a_deprecated_call_of_others_is_none():
    LIBRARY.old()
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        OURS.call(LIBRARY.old)  # where a test looks at the warnings, it decides itself
    assert len(recorded) == 1


def test_readme_says_which_versions_were_tested(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check_versions

    rows = json.loads(check_versions.PUBLISHED.read_text())
    assert check_versions.PLACE.search(check_versions.README.read_text())[0] == check_versions.table(rows)
    assert all(row["result"] == "passed" for row in rows)
