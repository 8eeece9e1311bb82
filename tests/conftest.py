"""One process-wide choice before triton is imported: without a CUDA device its kernels run in the interpreter."""

import os

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("helpers")
# Interpreted kernels take their time, and fixtures only choose an implementation, the same for every example.
shared = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
# The same examples in every run, so that a green run stays green; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("stable", shared, derandomize=True)
hypothesis.settings.register_profile("explore", shared, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "stable"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
