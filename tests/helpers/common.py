"""What the tests of several operations share: dtypes, instruction sets, memory amid NaN, threads, other processes."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from nest_fast.ops._extension import cpp_isa as CPP_ISA

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_ISAS = ("avx512_bf16", "avx512", "avx2")
# Those that this processor has, the best first.
ISAS = ALL_ISAS[ALL_ISAS.index(CPP_ISA) :] if CPP_ISA else ()
BAND = 1024


@contextlib.contextmanager
def instructions(isa):
    """The C++ kernels with another set of instructions; "" leaves them alone."""
    if isa:
        torch.ops.nest_fast.cpp_set_isa(isa)
    try:
        yield
    finally:
        if isa:
            torch.ops.nest_fast.cpp_set_isa(CPP_ISA or "baseline")


def in_double(tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def _amid_nan(shape, *, dtype, device):
    """Memory full of NaN (255 in bytes) and the tensor in its middle."""
    size = torch.Size(shape)
    fill = math.nan if dtype.is_floating_point else 255
    memory = torch.full((size.numel() + 2 * BAND,), fill, dtype=dtype, device=device)
    return memory, memory[BAND : BAND + size.numel()].view(size)


def guarded(x):
    """A copy of x between NaN, or 255."""
    return _amid_nan(x.shape, dtype=x.dtype, device=x.device)[1].copy_(x)


def assert_stays_inside_its_buffers(function):
    """``function(copy)`` gives the same where what it copies and allocates lies between NaN, and overwrites none."""
    memories = []

    def empty(shape, *, dtype, device):
        memory, x = _amid_nan(shape, dtype=dtype, device=device)
        memories.append(memory)
        return x

    def copy(x):
        return None if x is None else empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

    with mock.patch.object(torch, "empty", side_effect=empty) as allocate:
        results = function(copy)
    assert allocate.called
    for memory in memories:
        assert memory[:BAND].isnan().all()
        assert memory[-BAND:].isnan().all()
    for n, (got, wanted) in enumerate(zip(results, function(lambda x: x), strict=True)):
        assert torch.equal(got, wanted), n


def with_threads(function, numbers=(1, 2, 7)):
    """What ``function()`` returns with each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for number in numbers:
            torch.set_num_threads(number)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


def saved_bytes(function):
    """Bytes of what ``function()`` keeps for its gradient, leaves aside."""
    saved = {}

    def pack(x):
        if not (x.is_leaf and x.requires_grad):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(saved.values())


def run_python(*arguments, cwd=ROOT / "tests", env=None):
    """What another interpreter prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
