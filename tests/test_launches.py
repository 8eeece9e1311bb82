"""Every launcher of the Triton kernels by Triton's own launch path, over a CUDA driver that launches nothing.

Needs gcc and no GPU. With another Triton: ``PYTHONPATH=<folder with triton> python -m pytest tests/test_launches.py``.
"""

import ast
import functools
import json
import os

import pytest

from helpers.common import ROOT, run_python

# One process launches them all.
pytestmark = pytest.mark.xdist_group("launches")


@functools.cache
def launches():
    """What helpers/launches.py found in a process of its own: this one's triton may be the interpreter."""
    return json.loads(run_python("helpers/launches.py", env={**os.environ, "TRITON_INTERPRET": "0"}))


def test_every_argument_arrives():
    """Pointers, integers of 32 and 64 bits, floats and what is compiled in; multiples of 16 are what Triton took for
    such; threads and shared memory are the compiler's."""
    assert {case: row["wrong"] for case, row in launches().items() if row["wrong"]} == {}
    assert max(row["shared"] for row in launches().values()) <= 227 << 10


def test_every_tensor_is_seen_by_a_kernel():
    """Those given to a launcher and those it returned."""
    assert [case for case, row in launches().items() if row["missing"]] == []


def test_as_many_programs_as_there_is_work():
    for case, row in launches().items():
        assert row["grids"] == [[programs, 1, 1] for programs in row["programs"]], case


def test_a_tensor_at_an_odd_address_is_not_taken_for_an_aligned_one():
    assert launches()["block_attention_fwd"]["unpromised"] == launches()["add_layer_norm_fwd"]["unpromised"] == 0
    assert launches()["block_attention_fwd, unaligned"]["unpromised"] == 3  # q, k and v
    assert launches()["add_layer_norm_fwd, unaligned"]["unpromised"] == 1  # x


def test_no_kernel_is_left_out():
    decorated = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorated.add(node.name)
    assert {kernel for row in launches().values() for kernel in row["kernels"]} == decorated
