"""What the kernels cost on a GPU, found by compiling them without one.

``python scripts/kernel_resources.py`` prints registers, spills, shared memory and instruction counts of every shipped
launch; ``--json FILE`` writes them. The launchers run on meta tensors under a driver that names the architecture, says
what a compiled kernel spills and launches nothing, so they choose among their candidates as they would on such a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")

import torch
import triton
from kernel_sources import written
from stub_driver import SHARED_BYTES
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nest_fast.kernels import _configs, _launch
from nest_fast.kernels._mlp_gradients import mlp_layer_bwd
from nest_fast.kernels._wide_mlp import wide_mlp_bwd, wide_mlp_fwd
from nest_fast.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from nest_fast.kernels.attention_layer import linear_sum_fwd, norm_attention_fwd, norm_linear_fwd
from nest_fast.kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd, gelu_linear_bwd
from nest_fast.kernels.block_aggregate import block_aggregate_fwd
from nest_fast.kernels.block_attention import block_attention_bwd, block_attention_fwd
from nest_fast.kernels.layer_norm_mean import layer_norm_mean_bwd, layer_norm_mean_fwd
from nest_fast.kernels.linear import linear_fwd
from nest_fast.kernels.mlp_layer import mlp_layer_fwd
from nest_fast.kernels.norm_pool import norm_pool_bwd, norm_pool_fwd
from nest_fast.kernels.projection_mlp import projection_mlp_fwd

ARCHITECTURES = tuple(SHARED_BYTES)
TUNED = (80, 90, 100)  # those with rows of their own in the tables
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """A launch to compile; kv_heads is 1 or heads."""

    kind: str  # "fwd", or "bwd" with the bias's gradient where there is a bias
    N: int
    head_dim: int
    dtype: str
    heads: int = 4
    kv_heads: int = 4
    biased: bool = False  # bias and mask
    blocks: int = 16
    cut: str = ""  # blocks are square windows of an image: "windows", or "padded" ones; biased ones are shifted
    cosine: bool = False

    @property
    def name(self) -> str:
        heads = f"-h{self.heads}-mq" if self.kv_heads < self.heads else ""
        kinds = f"{'-biased' if self.biased else ''}{self.cut and '-' + self.cut}{'-cosine' * self.cosine}"
        return f"{self.kind}-N{self.N}-d{self.head_dim}{heads}-{self.dtype}{kinds}"


class Aggregation(NamedTuple):
    """A launch of block aggregation to compile: "fwd", "train" (the forward that keeps what the gradient needs) or
    "norm-pool", what follows the convolution, forward and backward."""

    kind: str
    C_in: int
    C_out: int
    dtype: str
    grid: int = 2
    block: int = 14

    @property
    def name(self) -> str:
        return f"aggregate-{self.kind}-C{self.C_in}-{self.C_out}-{self.dtype}"


class SubLayer(NamedTuple):
    """Launches of a sub-layer's kernels to compile: "mlp" or with tanh "mlp-tanh", of 4 C hidden features, or
    "mlp-train", all its gradients with a factor for each sample; of over 128 channels its forward and fc2's gradient,
    and as "mlp-train-fc1" those of what is hidden and of fc1; "projection-mlp"; "norm-linear", to 3 C columns,
    "linear-sum", to C, or "norm-attention", of heads of 32; or fc1 and its GELU, "linear-gelu" or "linear-tanh"."""

    kind: str
    C: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind}-C{self.C}-{self.dtype}"


class Pass(NamedTuple):
    """Launches of a pass between the matmuls to compile, in bf16; ``kind`` may end with what is special about them."""

    kind: str
    C: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.kind}-C{self.C}-{self.dtype}"


Shipped = Case | Aggregation | SubLayer | Pass


class _OfflineDriver:
    """As much of a triton driver as compiling and choosing ask for."""

    def __init__(self, architecture: int):
        self.architecture = architecture
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.architecture]}

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """A module and a function, registers, words spilled and the most threads, as CUDA's driver has them."""
        registers, stack = _resources(cubin)
        return 1, 1, registers, stack // 4, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[list]:
    """Inside, launches on meta tensors compile for sm_<architecture> and are appended as (kernel name, compiled, which
    of the candidates was chosen)."""
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            (table, shape, _), config = next(reversed(_launch.CHOSEN.items()))
            candidate = table(*shape, architecture).index(config)
            compiled.append((self.fn.__name__.strip("_").removesuffix("_kernel"), kernel, candidate))
        return kernel

    with _offline(architecture), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


@contextlib.contextmanager
def _offline(architecture: int) -> Iterator[None]:
    triton.runtime.driver.set_active(_OfflineDriver(architecture))
    _launch.CHOSEN.clear()
    try:
        yield
    finally:
        _launch.CHOSEN.clear()
        triton.runtime.driver._active = None


@functools.cache
def sources(architecture: int, case: Shipped) -> str:
    """A digest of what the figures of a case follow from; nothing is compiled.

    That is what the launchers would give the compiler with each of their candidates, what the kernels are written of,
    how one is chosen, and how its figures are read.
    """
    told: list = []
    names = {
        *(("nest_fast.kernels._launch", own) for own in ("_choose", "_OPTIONS")),
        *(("kernel_resources", own) for own in ("compiling", "figures")),
    }

    def start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        names.add((kernel.fn.__module__, kernel.fn.__name__))
        told.append((kernel.fn.__name__, _described(args), sorted(constants.items())))

    def choose(table: Callable, shape: tuple, x: torch.Tensor, run: Callable) -> Any:
        candidates = table(*shape, architecture)
        for config in candidates:
            told.append(config)
            run(config, start)
        return candidates[0]

    with _offline(architecture), mock.patch.multiple(_launch, _choose=choose, _start=lambda *_, **__: None):
        launch(case)
    digest = hashlib.sha256(repr(told).encode())
    for _, source in sorted(_written(frozenset(names)).items()):
        digest.update(source.encode())
    return digest.hexdigest()[:12]


_written = functools.cache(written)


def _described(x: Any) -> Any:
    """Of tensors what the compiler may know."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride()
    return tuple(map(_described, x)) if isinstance(x, tuple) else x


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def launch(case: Shipped) -> None:
    """Run the launcher of case on meta tensors."""
    with _tf32(case.dtype == "tf32"):
        if isinstance(case, Pass):
            _launch_pass(case)
        elif isinstance(case, SubLayer):
            _launch_sub_layer(case)
        elif isinstance(case, Aggregation):
            _launch_aggregation(case)
        else:
            _launch_attention(case)


def _launch_aggregation(case: Aggregation) -> None:
    """Batch 64 of level 1 (4 x 4 blocks of 14 x 14) or 2, with bias and position embedding."""

    def empty(*shape, dtype=DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    B, T, N, C, block = 64, case.grid**2, case.block**2, case.C_out, (case.block, case.block)
    vectors = [empty(C, dtype=torch.float32) for _ in range(3)]
    pos_embed = empty(1, T // 4, N, C)
    if case.kind == "norm-pool":
        edge = case.grid * case.block
        y = empty(B, edge, edge, C)
        outs = norm_pool_fwd(y, *vectors, pos_embed, block, 1e-6, False, True)
        norm_pool_bwd(outs[0], y, *vectors[:2], *outs[1:], block, False)
        return
    x, conv_weight, grid = empty(B, T, N, case.C_in), empty(C, case.C_in, 3, 3), (case.grid, case.grid)
    block_aggregate_fwd(x, conv_weight, *vectors, pos_embed, grid, block, block, 1e-6, False, case.kind == "train")


def _launch_attention(case: Case) -> None:
    """Batch 2, q, k, v packed. In windows with a bias and Swin's mask, or padding that all differs, as SAM has it."""

    def empty(*shape, dtype=DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    B, T, N, heads = 2, case.blocks, case.N, case.heads
    rows: tuple[int, int] = (T, N)
    windows: tuple[int, ...] = ()
    pads = None, None
    if case.cut:
        window, is_padded = math.isqrt(N), case.cut == "padded"
        edge, shift = math.isqrt(T) * window - is_padded, window // 2 * case.biased
        rows, windows = (1, edge**2), (edge, edge, window, window, shift, shift, 0, 0)
        if is_padded:
            pads = empty(2, 1 if case.biased else T * N - edge**2, case.kv_heads, case.head_dim).unbind()
    packed = empty(B, *rows, heads + 2 * case.kv_heads, case.head_dim)
    q, k, v = packed.split([heads, case.kv_heads, case.kv_heads], 3)
    bias = empty(heads, N, N) if case.biased else None
    mask = empty(T, N, N, dtype=torch.bool) if case.biased and not windows else None
    scale, scales = (1.0, empty(heads)) if case.cosine else (0.125, None)
    if case.kind == "fwd":
        block_attention_fwd(q, k, v, bias, mask, scale, *pads, scales, windows)
    else:
        out, lse = empty(*q.shape), empty(B, T, heads, N, *(2,) * case.biased, dtype=torch.float32)
        kept = out, q, k, v, out, lse, bias, mask, scale
        block_attention_bwd(*kept, case.biased, *pads, windows, pads[0] is not None, scales)


def _launch_sub_layer(case: SubLayer) -> None:
    """Batch 8 of 16 blocks of 14 x 14."""

    def empty(*shape):
        return torch.empty(shape, dtype=DTYPES[case.dtype], device="meta")

    C, hidden, x = case.C, 4 * case.C, empty(8, 16, 196, case.C)
    if case.kind.startswith("linear-") and case.kind != "linear-sum":
        linear_fwd(x, empty(hidden, C), empty(hidden), "gelu" if case.kind == "linear-gelu" else "gelu_tanh")
        return
    if case.kind == "norm-linear":
        norm_linear_fwd(x, empty(C), empty(C), 1e-6, empty(3 * C, C), empty(3 * C))
        return
    if case.kind == "norm-attention":
        norm_attention_fwd(x, empty(C), empty(C), 1e-6, empty(3 * C, C), empty(3 * C), C // 32, 0.17)
        return
    if case.kind == "linear-sum":
        linear_sum_fwd(x, empty(C, C), empty(C), x, 1.0)
        return
    norm, fc1, fc2 = (empty(C), empty(C), 1e-6), (empty(hidden, C), empty(hidden)), (empty(C, hidden), empty(C))
    if case.kind == "projection-mlp":
        projection_mlp_fwd(x, x, empty(C, C), empty(C), 1.0, *norm, *fc1, False, *fc2, 1.0)
        return
    if case.kind.startswith("mlp-train") and C > 128:
        for_fc1, factors = case.kind == "mlp-train-fc1", (1.0, empty(8))
        if not for_fc1:
            wide_mlp_fwd(x, *norm, *fc1, False, *fc2, *factors)
        kept = empty(8, 16, 196, hidden), *(torch.empty(8, 16, 196, device="meta") for _ in range(2))
        wide_mlp_bwd(x, x, *kept, *norm[:2], fc1[0], False, fc2[0], *factors, [False, for_fc1, not for_fc1, False])
        return
    if case.kind == "mlp-train":
        mlp_layer_bwd(x, x, *norm, *fc1, False, fc2[0], 1.0, empty(8), [True] * 4)
        return
    mlp_layer_fwd(x, *norm, *fc1, case.kind == "mlp-tanh", *fc2, 1.0)


def _launch_pass(case: Pass) -> None:
    """Batch 8 of 16 blocks of 14 x 14; what is optional is there, but in a "bare" pass."""

    def empty(*shape, dtype=DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, vector, dtype = empty(8, 16, 196, case.C), empty(case.C), DTYPES[case.dtype]
    scale, row = empty(8), empty(8, 16, 196, dtype=torch.float32)
    if case.kind.startswith("bias-gelu"):
        tanh = case.kind.endswith("tanh")
        bias_gelu_fwd(x, vector, dtype, tanh)
        bias_gelu_bwd(x, x, vector, tanh, True)
    elif case.kind == "gelu-linear":
        gelu_linear_bwd(x, x, vector, False, empty(case.C, case.C), [True] * 4)
    elif case.kind == "add-layer-norm-fwd":
        add_layer_norm_fwd(x, x, scale, vector, vector, vector, 1e-6, dtype, dtype)
    elif case.kind == "add-layer-norm-bwd":
        add_layer_norm_bwd(x, x, x, row, row, scale, vector, dtype, dtype, True)
    elif case.kind == "add-layer-norm-bwd-bare":
        add_layer_norm_bwd(x, x, x, row, row, None, vector, dtype, dtype, False)
    else:
        layer_norm_mean_fwd(x, vector, vector, 1e-6, dtype)
        layer_norm_mean_bwd(x[:, 0, 0], x, empty(8, case.C, dtype=torch.float32), row, row, vector)


def figures(kernel) -> dict[str, int]:
    """Registers, spill bytes and shared memory of a compiled kernel, and how often instructions stand in it."""
    registers, stack = _resources(kernel.asm["cubin"])
    opcodes, looped = _opcodes(_tool(kernel.asm["cubin"], "nvdisasm", "-c"))
    return {
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "warps": kernel.metadata.num_warps,
        "instructions": len(opcodes),
        "in loop": len(looped),
        "HGMMA": opcodes.count("HGMMA"),
        "HMMA": opcodes.count("HMMA"),
        "UTCMMA": opcodes.count("UTCHMMA"),
        "EX2": opcodes.count("MUFU.EX2"),
        "EX2 in loop": looped.count("MUFU.EX2"),
    }


def _opcodes(sass: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the largest loop: from a label to the branch back to it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loop = (0, 0)
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.EX2)?)(.*)", line):
            opcodes.append(found[1])
            back = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1] == "BRA" and back and back[1] in labels:
                loop = max(loop, (labels[back[1]], len(opcodes)), key=lambda ends: ends[1] - ends[0])
    return opcodes, opcodes[slice(*loop)]


@functools.lru_cache(maxsize=8)
def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what is spilled."""
    usage = _tool(cubin, "cuobjdump", "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return found["REG"], found["STACK"]


def _tool(cubin: bytes, name: str, *args: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / name, *args, file.name], capture_output=True, text=True, check=True).stdout


MODELS = [
    Case("fwd", 196, 32, "bf16"),
    Case("bwd", 196, 32, "bf16"),
    Case("fwd", 16, 64, "bf16", heads=3, kv_heads=1),
    Case("bwd", 16, 64, "bf16", heads=3, kv_heads=1),
    Case("fwd", 16, 64, "bf16", heads=12, kv_heads=1),
    Case("bwd", 16, 64, "bf16", heads=12, kv_heads=1),
]
WINDOWS = [Case(kind, N, 32, "bf16", biased=True) for kind in ("fwd", "bwd") for N in (49, 64, 144, 196)]
# Windows where they are in the image: Swin's, its second version's, and SAM's, whose heads have 28 dimensions more.
CUTS = [
    *(Case(kind, N, 32, "bf16", biased=True, cut="windows") for kind in ("fwd", "bwd") for N in (49, 64, 144, 256)),
    *(Case(kind, 576, 32, "bf16", biased=True, cut="windows") for kind in ("fwd", "bwd")),
    *(Case(kind, 49, 32, "bf16", biased=True, cut="padded") for kind in ("fwd", "bwd")),
    *(Case(kind, 196, 92, "bf16", cut="padded") for kind in ("fwd", "bwd")),
    *(Case(kind, 197, 64, "bf16") for kind in ("fwd", "bwd")),
]
COSINES = [
    Case(kind, N, 32, "bf16", biased=True, cut="windows", cosine=True)
    for kind in ("fwd", "bwd")
    for N in (64, 256, 576)
]
_WIDTHS = ((96, 192, 4), (128, 256, 4), (192, 384, 2), (256, 512, 2))  # C, C', edge of the grid of blocks
_LAUNCHES = (("fwd", "bf16"), ("train", "bf16"), ("train", "tf32"), ("train", "fp32"), ("norm-pool", "bf16"))
AGGREGATIONS = [
    *(Aggregation(kind, C_in, C_out, dtype, grid) for kind, dtype in _LAUNCHES for C_in, C_out, grid in _WIDTHS),
    Aggregation("norm-pool", 192, 384, "fp32"),
]
# The models' channels, those of level 3 in half precision, and what has to be padded.
SUB_LAYERS = [
    *(
        SubLayer(kind, C, dtype)
        for kind in ("mlp", "norm-linear", "linear-sum")
        for dtype in ("bf16", "tf32", "fp32")
        for C in (96, 128, 192, 256)
    ),
    *(SubLayer(kind, C, "bf16") for kind in ("projection-mlp", "norm-attention", "mlp-train") for C in (96, 128)),
    SubLayer("mlp-tanh", 192, "fp16"),
    *(SubLayer(kind, C, "bf16") for kind in ("norm-linear", "linear-sum", "mlp") for C in (384, 512)),
    *(SubLayer(kind, C, "bf16") for kind in ("mlp-train", "mlp-train-fc1") for C in (384, 512)),
    *(SubLayer(kind, 300, "bf16") for kind in ("mlp", "mlp-train")),
    *(SubLayer("linear-gelu", C, "bf16") for C in (100, 256, 384, 512)),
    SubLayer("linear-tanh", 384, "fp16"),
    *(SubLayer(kind, 100, "bf16") for kind in ("mlp", "projection-mlp", "norm-linear", "linear-sum", "mlp-train")),
]
# The tiles of the models' narrowest, middle and widest rows: in the middle, what holds most in registers.
PASSES = [
    *(Pass(f"bias-gelu-{approximate}", 384) for approximate in ("none", "tanh")),
    Pass("gelu-linear", 384),
    *(Pass("add-layer-norm-bwd", C) for C in (96, 384, 1536)),
    *(
        Pass(kind, C)
        for kind in ("add-layer-norm-fwd", "add-layer-norm-bwd-bare", "layer-norm-mean")
        for C in (96, 1536)
    ),
]


def models(architecture: int) -> list[Shipped]:
    """What the models launch in half precision, and window models with bias and mask."""
    aggregations = [case for case in AGGREGATIONS if case.dtype == "bf16"]
    sub_layers = [case for case in SUB_LAYERS if case.dtype == "bf16"]
    cuts = [*(case for case in CUTS if case.cut == "padded" or case.N == 256), *COSINES]
    if architecture < 80:  # without matrix instructions that Triton knows
        return [*(case for case in aggregations if case.kind == "norm-pool"), *PASSES]
    if architecture in (86, 89):  # as sm_80 but for ptxas and the shared memory: what takes most of both
        return [*MODELS[:2], *cuts, *(case for case in aggregations if case.C_out == 256), *sub_layers]
    windows = [case for case in WINDOWS if case.N in (49, 196)]
    return [*MODELS, *windows, *cuts, *aggregations, *sub_layers, *PASSES]


def shipped(architecture: int) -> list[Shipped]:
    """And, where the tables have rows of their own, float32 and the largest shape of every row of attention's."""
    cases = models(architecture)
    if architecture not in TUNED:
        return cases
    cases += [*WINDOWS, *CUTS, *AGGREGATIONS, *SUB_LAYERS]
    for kernel in ("fwd", "bwd"):
        for operands, dtype in (("half", "bf16"), ("tf32", "tf32"), ("ieee", "fp32")):
            table = _configs.ATTENTION
            own = table.get((kernel, architecture, operands)) or table[kernel, 80, operands]
            for row in own:
                N = int(min(row.keys, 256))
                stacked = int(row.queries) // N if row.queries < math.inf else 1
                heads = (stacked, 1) if stacked > 1 else (4, 4)
                cases.append(Case(kernel, N, row.head_dim, dtype, *heads))
    return list(dict.fromkeys(cases))


def every_shape(architecture: int) -> Iterator[Case]:
    """Every size that pads differently, with and without bias and mask: about an hour for an architecture."""
    for biased, dtype, kind in itertools.product((False, True), ("bf16", "tf32", "fp32"), ("fwd", "bwd")):
        for N, head_dim in itertools.product((16, 32, 64, 80, 96, 128, 144, 160, 192, 208, 224, 256), (32, 64, 128)):
            yield Case(kind, N, head_dim, dtype, biased=biased)


def windows(architecture: int) -> Iterator[Case]:
    """Attention with a bias in shifted and padded windows, of every window and head dimension that models have."""
    for head_dim, N, kind in itertools.product((32, 64, 80, 96, 128), (16, 49, 64, 100, 144, 196, 256), ("fwd", "bwd")):
        yield Case(kind, N, head_dim, "bf16", biased=True, cut="padded")


CASES = {"models": models, "shipped": shipped, "windows": windows, "every": every_shape}


def broken_bars(architecture: int, case: Shipped, row: dict[str, int]) -> list[str]:
    """What no shipped configuration may do."""
    broken = []
    if row["spill_bytes"]:
        broken.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > SHARED_BYTES[architecture]:
        broken.append(f"wants {row['shared_bytes']} bytes of shared memory")
    if row["tensor_memory"] > 512:
        broken.append(f"wants {row['tensor_memory']} columns of tensor memory")
    multiplies = case.dtype != "fp32" and case.kind != "norm-pool" and not isinstance(case, Pass)
    if multiplies and not row["HGMMA"] + row["HMMA"] + row["UTCMMA"]:
        broken.append("uses no matrix unit")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures, what is zero left out")
    parser.add_argument("--cases", choices=CASES, default="shipped", help="which shapes; every one takes hours")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases in whose name, sm_90 fwd-N196-d32-bf16, this regex is")
    parser.add_argument("--known", type=Path, help="a table; cases that it has, of these sources, are left out")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no other case is begun")
    args = parser.parse_args()
    began = time.monotonic()
    cases = {
        name: {
            f"sm_{architecture} {case.name}": (architecture, case, sources(architecture, case))
            for architecture in args.architectures
            for case in CASES[name](architecture)
        }
        for name in dict.fromkeys(("models", "shipped", args.cases))
    }
    known = json.loads(args.known.read_text()).get(triton.__version__, {}) if args.known else {}
    done = {(name.rpartition(" ")[0], row["sources"]) for name, row in known.items()}
    found: dict[str, dict] = {}
    for where, (architecture, case, digest) in cases[args.cases].items():
        if not re.search(args.only, where) or (where, digest) in done or time.monotonic() > began + 60 * args.minutes:
            continue
        with compiling(architecture) as compiled:
            launch(case)
        for kernel_name, kernel, candidate in compiled:
            row: dict = {"candidate": candidate, **figures(kernel)}
            row["broken"] = broken_bars(architecture, case, row)
            row = {key: value for key, value in row.items() if value}
            print(f"{where} {kernel_name}", *(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
            found[f"{where} {kernel_name}"] = {**row, "sources": digest}
    if args.json:
        table = {
            "triton": triton.__version__,
            "figures": found,
            "cases": {name: {case: digest for case, (*_, digest) in rows.items()} for name, rows in cases.items()},
        }
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    return sum("broken" in row for row in found.values())


if __name__ == "__main__":
    sys.exit(main())
