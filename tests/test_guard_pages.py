"""The C++ kernels touch nothing beside their tensors: a fuzzer, whose tensors end, or begin, at a guard page."""

import os
import subprocess
import sys

import pytest

from helpers.common import CPP_ISA, ROOT

pytestmark = pytest.mark.skipif(not CPP_ISA, reason="the extension is not built, or the processor has no AVX2")
# ``make sanitize`` draws thousands.
CASES = os.environ.get("NEST_FAST_GUARD_CASES", "60")


def test_no_operation_goes_beyond_its_tensors():
    """That it would be seen, the command shows itself first."""
    command = [sys.executable, ROOT / "tests" / "helpers" / "guard_pages.py", "--cases", CASES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"6 bytes beyond a tensor are seen; {CASES} cases from number 0 on, 0 failed\n"
