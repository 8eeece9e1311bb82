"""One process-wide choice before triton is imported: without a CUDA device its kernels run in the interpreter."""

import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
import warnings

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("helpers")
from helpers.interpreter import make_faster  # noqa: E402

# Interpreted kernels take their time, and fixtures only choose an implementation, the same for every example.
shared = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
# The same examples in every run, so that a green run stays green; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("stable", shared, derandomize=True)
hypothesis.settings.register_profile("explore", shared, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "stable"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    make_faster()
os.environ.setdefault("NEST_FAST_TUNED", "off")  # what this machine's user measured is not what is tested


def pytest_configure(config):
    """xdist 3.8 marks tests of a group in vain from pytest 9.2 on, and distributes them without a word."""
    if config.getoption("dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        xdist = importlib.metadata.version("pytest-xdist")
        if tuple(map(int, xdist.split(".")[:2])) <= (3, 8):
            raise pytest.UsageError(f"--dist: expected pytest below 9.2 beside xdist {xdist}, which loses its groups")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # a parameter of that name is a keyword, too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Whose code only passes a deprecated call on.
LIBRARIES = re.compile(rf"<|{re.escape(sysconfig.get_path('stdlib'))}|.*/(site|dist)-packages/")


def _is_ours(frame):
    """Whether nest_fast made the call that warns: its code is the first that is neither a library's nor generated."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "nest_fast":
            return True
        if not LIBRARIES.match(frame.f_code.co_filename):
            return False
        frame = frame.f_back
    return False


@pytest.fixture(autouse=True)
def _no_deprecated_call_of_ours(monkeypatch):
    """Fails where nest_fast calls what torch, Triton or Python deprecates, wherever they say the warning comes from.

    A filter of warnings sees only that place, inside the library as often as not.
    """
    show = warnings.showwarning

    def raise_ours(message, category, *rest):
        deprecated = issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning)
        interpreters = "NumPy" in str(message)  # Triton's interpreter calls it, for our kernels
        if (deprecated or "deprecated" in str(message)) and not interpreters and _is_ours(sys._getframe(1)):
            raise AssertionError(f"nest_fast causes {category.__name__}: {message}")
        show(message, category, *rest)

    monkeypatch.setattr(warnings, "showwarning", raise_ours)
