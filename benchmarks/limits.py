"""What the processor can do at most, by loops of our own: products in registers, and memory read and written.

They are measured in a burst before each round of a row, since the machine changes its speed from minute to minute; the
rate of all threads is the sum of what each reaches while it has its processor. On a GPU there are no such loops, nor
for a matrix unit (AMX): there the rates of PyTorch's own matmul and copy are the ceilings, measured once in a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from harness import DEVICE, Problem, Run
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from nest_fast.ops._extension import cpp_isa, has_amx

OPS = torch.ops.nest_fast
ALL_ISAS = ("avx512_bf16", "avx512", "avx2")
# Those that this processor has, the best first.
ISAS = ALL_ISAS[ALL_ISAS.index(cpp_isa) :] if cpp_isa and DEVICE == "cpu" else ()
FLOATS = 64  # that memory is moved by


@contextlib.contextmanager
def using(isa: str, threads: int) -> Iterator[None]:
    """The loops with a set of instructions, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    OPS.cpp_set_isa(isa)
    try:
        yield
    finally:
        OPS.cpp_set_isa(cpp_isa)
        torch.set_num_threads(before)


def has_loop(dtype: torch.dtype) -> bool:
    """Whether our products are the fastest that this machine has for ``dtype``."""
    return bool(ISAS) and not (dtype == torch.bfloat16 and has_amx)


def moving(read: int, written: int) -> Callable[[], float]:
    """A call that reads and writes so many bytes, of its own, and returns bytes/s."""
    read, written = (max(count // 4 // FLOATS, 1) * FLOATS for count in (read, written))
    memory = torch.zeros(read), torch.zeros(written)
    return lambda: OPS.peak_move(*memory)


class Burst:
    """The limits of a case of ``dtype`` that reads and writes so many bytes: the best of all bursts so far.

    Attributes:
        rate: FLOP/s of products.
        bandwidth: bytes/s; 0 where bytes are not counted.
    """

    def __init__(self, dtype: torch.dtype, read: int, written: int) -> None:
        self.dtype = dtype
        self.rate = 0.0
        self.bandwidth = 0.0
        self._move = moving(read, written) if read + written else lambda: 0.0

    def __call__(self) -> None:
        self.rate = max(self.rate, OPS.peak_multiply(self.dtype))
        self.bandwidth = max(self.bandwidth, self._move())


# --- the products that are done ---------------------------------------------------------------------------------------


def _winograd(x: Tensor, conv_weight: Tensor, *_: object, out_val: object = None) -> int:
    """Of F(2x2, 3x3): 16 products for 2 x 2 pixels, where the definition has 36."""
    return 2 * x[..., 0].numel() * conv_weight[..., 0, 0].numel() * 16 // 4


class Products(TorchDispatchMode):
    """Counts FLOPs as PyTorch's counter does, without its hooks on all modules, which have them called one by one."""

    def __init__(self) -> None:
        super().__init__()
        fewer = {OPS.block_aggregate_cpp_fwd: _winograd, OPS.block_aggregate_cpp_dx: _winograd}
        self.formulas = flop_counter.flop_registry | fewer
        self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        formula = self.formulas.get(op.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def done(problem: Problem, peer: str, run: Run) -> int:
    """The FLOPs that a peer does, which for ours may be fewer than its definition has.

    They are where the convolution is Winograd's, or stochastic depth drops samples that are then not computed. Programs
    that run without Python hide their operations, and are taken for the definition.
    """
    if not peer.startswith("nest_fast") or peer.endswith("AOTInductor"):
        return problem.flops
    with torch.compiler.set_stance("force_eager"), Products() as products:
        run(*problem.inputs)
    return products.flops
