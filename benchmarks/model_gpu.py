"""What a NesT should take on a GPU: a model of time, not a measurement.

    python benchmarks/model_gpu.py [--layers] [--beside RUN.json]

Every kernel of a forward pass, and of a layer's training step, has its bytes, its FLOPs and, where it is ours, the warp
instructions that the compiled kernel executes (tests/kernel_resources.json: what stands in its loop counts as often as
it is run). From these and the GPU's rates follow microseconds, img/s of the models, and, for what others have measured,
a predicted time beside theirs: how far the model may be trusted.

The rules, in seconds, and what they were fitted to:

- a library's matmul: the 1.2-norm of FLOPs / sustained rate and bytes / bandwidth (cuBLAS at 65536 x 1024 x 1024);
- a pass over memory: 1.05 bytes / bandwidth, or 1.1 instructions / issue rate if that is more;
- a kernel of ours that multiplies: matrix and vector work one after the other, as a Triton kernel overlaps little
  inside a warp group, 1.1 times, and memory, or what comes from the L2 cache if that takes longer, by the 1.5-norm.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runs import MODELS as NAMES
from runs import Run, load, markdown

from nest_fast.kernels import _configs, _layer_configs
from nest_fast.kernels._primitives import tiles_and_tail
from nest_fast.ops.mlp_layer import CERTAIN_CHANNELS

TABLE = Path(__file__).resolve().parent.parent / "tests" / "kernel_resources.json"
HALF = 2  # bytes of bf16 and fp16
BATCH = 256
# Instructions of a step of a loop with copies, counted in the code for sm_90: linear's, and of each number of x that it
# takes the GELU of; of the gradient of fc1's weight, and of fc2's.
COPY_STEP, GELU_EACH, NORM_WEIGHT_STEP, GELU_WEIGHT_STEP = 110, 14, 297, 680
# And of norm_linear where rows do not stay, by kind of architecture: of the sweep for the statistics, of the product,
# and how many stand before and in these.
NORM_STEPS = {90: (195, 315, 1126), 80: (107, 197, 722)}


class Gpu(NamedTuple):
    """``matmul`` FLOP a clock and multiprocessor in half precision, summed in float32; ``sustained`` is what long
    matmuls keep of that; rates a second. From the vendor's white papers, bandwidths as copies measure them."""

    architecture: int  # whose kernels it runs, of those in the table
    multiprocessors: int
    clock: float
    matmul: int
    sustained: float
    bandwidth: float
    cache: float  # bytes a second from L2

    @property
    def issue(self) -> float:
        """Warp instructions a second: four schedulers a multiprocessor."""
        return self.multiprocessors * 4 * self.clock

    @property
    def exponentials(self) -> float:
        return self.multiprocessors * 16 * self.clock

    @property
    def tensor(self) -> float:
        return self.multiprocessors * self.matmul * self.clock


GPUS = {
    "H100": Gpu(90, 132, 1.70e9, 4096, 800e12, 3.0e12, 5.5e12),
    "A100": Gpu(80, 108, 1.41e9, 2048, 270e12, 1.7e12, 4.0e12),
    "RTX 4090": Gpu(89, 128, 2.52e9, 512, 160e12, 0.93e12, 4.5e12),
}


class Work(NamedTuple):
    """What a kernel does; ``kind`` is "library", "pass" or "kernel"."""

    name: str
    kind: str
    bytes: float
    flops: float = 0.0
    instructions: float = 0.0  # of a warp
    exponentials: float = 0.0
    again: float = 0.0  # bytes that were read before, from L2


def seconds(work: Work, gpu: Gpu) -> float:
    memory = work.bytes / gpu.bandwidth
    vector = max(work.instructions / gpu.issue, work.exponentials / gpu.exponentials)
    if work.kind == "library":
        return _norm(1.2, work.flops / gpu.sustained, memory)
    if work.kind == "pass":
        return max(1.05 * memory, 1.1 * vector)
    memory = max(memory, (work.bytes + work.again) / gpu.cache)
    return _norm(1.5, 1.1 * (work.flops / gpu.tensor + vector), 1.05 * memory)


def _norm(p: float, *parts: float) -> float:
    return sum(part**p for part in parts) ** (1 / p)


# --- what the compiled kernels execute --------------------------------------------------------------------------------


@functools.cache
def figures() -> dict[str, dict]:
    """Of the Triton with which every shape was compiled; others have fewer."""
    return max(json.loads(TABLE.read_text()).values(), key=len)


class Compiled:
    """Warp instructions of the kernels that are chosen on ``architecture``."""

    def __init__(self, architecture: int) -> None:
        # sm_89 compiles few shapes of its own: it has sm_80's instructions.
        self.architectures = (architecture, 80)

    def of(self, case: str, kernel: str) -> dict:
        for architecture in self.architectures:
            if (found := figures().get(f"sm_{architecture} {case} {kernel}")) is not None:
                return found
        raise KeyError(f"{case}: expected a case of {TABLE.name}, of sm_{self.architectures[0]} or sm_80")

    def layer_norm(self, rows: float, C: int) -> float:
        """A tile of whole rows; of the compiled widths, the one nearer to C."""
        row = self.of(f"add-layer-norm-fwd-C{96 if C < 768 else 1536}-bf16", "add_layer_norm_fwd")
        tile = _configs.layer_norm("add_layer_norm_fwd", C)[row.get("candidate", 0)]
        return row["instructions"] * row["warps"] * math.ceil(rows / tile["TILE_ROWS"])

    def gelu(self, values: float) -> float:
        """Without a loop: a program has the same number of values for each thread at any width."""
        row = self.of("bias-gelu-none-C384-bf16", "bias_gelu_fwd")
        tile = _configs.bias_gelu("fwd", 384)[row.get("candidate", 0)]
        return row["instructions"] * row["warps"] / (tile["TILE_ROWS"] * tile["TILE_C"]) * values

    def attention(self, sequences: float, N: int) -> float:
        """One program a block and head, of 196 tokens: a loop over the whole tiles of queries, then the partial one."""
        row = self.of("fwd-N196-d32-bf16", "block_attention_fwd")
        table = _configs.ATTENTION["fwd", _configs.row_architecture(self.architectures[0]), "half"]
        fit = [one.config for one in table if min(one.queries, one.keys) >= 196 and one.head_dim >= 32]
        trips, _ = tiles_and_tail(196, fit[row.get("candidate", 0)].block_m)
        return _with_loop(row, trips) * sequences * (N / 196) ** 2

    def norm_attention(self, sequences: float, C: int) -> float:
        """As :meth:`attention`, of 196 tokens."""
        row = self.of(f"norm-attention-C{C}-bf16", "norm_attention_fwd")
        config = _layer_configs.norm_attention(C, self.architectures[0])[row.get("candidate", 0)]
        return _with_loop(row, tiles_and_tail(196, config.block_m)[0]) * sequences

    def mlp(self, rows: float, C: int) -> tuple[float, int]:
        """Its loop walks over the hidden features; and how many rows a program has."""
        candidates = _layer_configs.mlp_layer(C, "half", self.architectures[0])
        return self._over_hidden(f"mlp-C{C}-bf16", "mlp_layer_fwd", candidates, rows, C)

    def projection_mlp(self, rows: float, C: int) -> tuple[float, int]:
        """As :meth:`mlp`."""
        candidates = _layer_configs.projection_mlp(C, self.architectures[0])
        return self._over_hidden(f"projection-mlp-C{C}-bf16", "projection_mlp_fwd", candidates, rows, C)

    def _over_hidden(self, case: str, kernel: str, candidates: tuple, rows: float, C: int) -> tuple[float, int]:
        row = self.of(case, kernel)
        config = candidates[row.get("candidate", 0)]
        return _with_loop(row, 4 * C / config.tile_h) * rows / config.tile_rows, config.tile_rows

    def over_rows(self, case: str, kernel: str, rows: float, tile_rows: Callable[[int], int]) -> float:
        """Its loop walks over the tiles of rows that a program has; of candidate n so many rows each."""
        row = self.of(case, kernel)
        return row["in loop"] * row["warps"] * math.ceil(rows / tile_rows(row.get("candidate", 0)))

    def layer_norm_backward(self, rows: float, C: int) -> float:
        """As :meth:`layer_norm`; the middle width is compiled, too."""
        width = min((96, 384, 1536), key=lambda width: abs(width - C))
        tiles = _configs.layer_norm("add_layer_norm_bwd", C)
        case = f"add-layer-norm-bwd-C{width}-bf16"
        return self.over_rows(case, "add_layer_norm_bwd", rows, lambda n: tiles[n]["TILE_ROWS"])

    def gelu_backward(self, values: float, case: str) -> float:
        tiles = _configs.bias_gelu("bwd", 384)
        rows = values / tiles[0]["TILE_C"]
        return self.over_rows(f"{case}-C384-bf16", "bias_gelu_bwd", rows, lambda n: tiles[n]["TILE_ROWS"])

    def attention_backward(self, sequences: float, N: int) -> float:
        """As :meth:`attention`: the loop is over the whole tiles of keys."""
        row = self.of("bwd-N196-d32-bf16", "block_attention_bwd")
        table = _configs.ATTENTION["bwd", _configs.row_architecture(self.architectures[0]), "half"]
        fit = [one.config for one in table if min(one.queries, one.keys) >= 196 and one.head_dim >= 32]
        trips, _ = tiles_and_tail(196, fit[row.get("candidate", 0)].block_n)
        return _with_loop(row, trips) * sequences * (N / 196) ** 2

    def mlp_rows_backward(self, rows: float, C: int) -> tuple[float, int]:
        """As :meth:`mlp`."""
        candidates = _layer_configs.mlp_layer_bwd_rows(C, self.architectures[0])
        return self._over_hidden(f"mlp-train-C{C}-bf16", "mlp_layer_bwd_rows", candidates, rows, C)

    def mlp_weights_backward(self, rows: float, C: int) -> tuple[float, int]:
        """Its loop walks over rows; and how many programs share them."""
        candidates = _layer_configs.mlp_layer_bwd_weights(C, self.architectures[0])
        case, kernel = f"mlp-train-C{C}-bf16", "mlp_layer_bwd_weights"
        slabs = math.ceil(4 * C / candidates[self.of(case, kernel).get("candidate", 0)].tile_h)
        return self.over_rows(case, kernel, rows, lambda n: candidates[n].tile_rows) * slabs, slabs

    def linear(self, kind: str, rows: float, C: int, out: int) -> tuple[float, int]:
        """Its loop walks over the columns of the result; and how many rows a program has."""
        row = self.of(f"{kind}-C{C}-bf16", "linear_rows")
        config = _layer_configs.linear_rows(C, "half", self.architectures[0])[row.get("candidate", 0)]
        return _with_loop(row, math.ceil(out / config.tile_out)) * rows / config.tile_rows, config.tile_rows

    def activated(self, rows: float, C: int) -> tuple[float, Any]:
        """fc1 with bias and GELU, tile by tile: its loop walks over C; and its configuration."""
        row = self.of(f"linear-gelu-C{C}-bf16", "linear")
        config = _layer_configs.linear(True, self.architectures[0])[row.get("candidate", 0)]
        tiles = math.ceil(rows / config.tile_rows) * math.ceil(4 * C / config.tile_out)
        if config.copies:  # what is largest between a label and a branch back to it is no loop there
            row = {**row, "in loop": COPY_STEP}
        return _with_loop(row, math.ceil(C / config.tile_k)) * tiles, config

    def matmul(
        self, case: str, kernel: str, table: Callable, M: float, K: int, N: int, each: int = 0
    ) -> tuple[float, Any]:
        """As :meth:`activated`, of a matmul of ours, that makes each number of x by so many instructions."""
        row = self.of(case, kernel)
        config = table(K, N, True, self.architectures[0])[row.get("candidate", 0)]
        tiles = math.ceil(M / config.tile_rows) * math.ceil(N / config.tile_out)
        if config.copies:
            made = config.tile_rows * config.tile_k / (32 * config.num_warps)  # by a thread
            row = {**row, "in loop": COPY_STEP + each * made}
        return _with_loop(row, math.ceil(K / config.tile_k)) * tiles, config

    def normed(self, case: str, rows: float, C: int, out: int) -> tuple[float, Any]:
        """norm_linear, a program of which has whole rows: its loop walks over the columns of the result."""
        row = self.of(case, "norm_linear")
        config = _layer_configs.norm_linear(C, out, True, self.architectures[0])[row.get("candidate", 0)]
        programs, tiles = math.ceil(rows / config.tile_rows), math.ceil(out / config.tile_out)
        if config.resident:
            return _with_loop(row, tiles) * programs, config
        sweep, step, once = NORM_STEPS[_configs.row_architecture(self.architectures[0])]
        steps = math.ceil(C / config.tile_k)
        in_tile = row["instructions"] - once + steps * step
        return (once - step + (steps - 1) * sweep + tiles * in_tile) * row["warps"] * programs, config

    def weight_gradient(self, case: str, rows: float, P: int, Q: int, step: int) -> tuple[float, Any]:
        """Its loop walks over rows."""
        row = self.of(case, "mlp_layer_bwd_weight")
        config = _layer_configs.mlp_layer_bwd_weight(P, Q, True, self.architectures[0])[row.get("candidate", 0)]
        tiles = math.ceil(P / config.tile_rows) * math.ceil(Q / config.tile_out)
        each = step if config.copies else row["in loop"]
        return each * row["warps"] * math.ceil(rows / config.tile_k) * tiles, config


def _with_loop(row: dict, trips: float) -> float:
    """What all warps of a program execute."""
    return (row["instructions"] + (trips - 1) * row["in loop"]) * row["warps"]


# --- what a model launches --------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """``layers`` layers of C channels on so many tokens of one image, which attend N at a time."""

    C: int
    layers: int
    tokens: int
    N: int = 196


def _nest(dims: tuple[int, int, int], depth: int) -> tuple[Level, ...]:
    return tuple(Level(C, layers, 196 * 4**up) for C, layers, up in zip(dims, (2, 2, depth), (2, 1, 0), strict=True))


MODELS = {
    "NesT-T": _nest((96, 192, 384), 8),
    "NesT-S": _nest((96, 192, 384), 20),
    "NesT-B": _nest((128, 256, 512), 20),
}
VIT_S = (Level(384, 12, 197, 197),)
SWIN_T = tuple(Level(96 << n, layers, 3136 >> 2 * n, 49) for n, layers in enumerate((2, 2, 6, 2)))


def matmul(name: str, M: float, K: float, N: float) -> Work:
    return Work(name, "library", HALF * (M * (K + N) + K * N), 2 * M * K * N)


def chain(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """A layer as it runs eagerly on a GPU: the residual sum in the pass of the LayerNorm after it."""
    C, M = level.C, batch * level.tokens
    x = HALF * C * M
    sequences = M / level.N * C / 32
    norm = Work("add_layer_norm", "pass", 4 * x, instructions=compiled.layer_norm(M, C))
    yield norm
    yield matmul("qkv", M, C, 3 * C)
    yield Work(
        "block_attention",
        "kernel",
        4 * x,
        4 * level.N**2 * 32 * sequences,
        compiled.attention(sequences, level.N),
        level.N**2 * sequences,
    )
    yield matmul("projection", M, C, C)
    yield norm
    yield matmul("fc1", M, C, 4 * C)
    yield Work("bias_gelu", "pass", 8 * x, instructions=compiled.gelu(4 * C * M))
    yield matmul("fc2", M, 4 * C, C)


def with_one_mlp(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """A layer whose MLP sub-layer is one kernel, which takes a complete sum and returns one."""
    C, M = level.C, batch * level.tokens
    x = HALF * C * M
    yield Work("LayerNorm", "pass", 2 * x)
    yield from itertools.islice(chain(level, batch, compiled), 1, 4)
    yield Work("sum", "pass", 3 * x)
    instructions, rows = compiled.mlp(M, C)
    again = HALF * 8 * C * C * M / rows
    yield Work("mlp_layer", "kernel", 2 * x, 16 * C * C * M, instructions, 4 * C * M, again)


def with_activated_fc1(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """The chain, whose fc1 has bias and GELU before its result is stored."""
    C, M = level.C, batch * level.tokens
    before = list(chain(level, batch, compiled))
    instructions, config = compiled.activated(M, C)
    again = HALF * C * M * (4 * C / config.tile_out - 1 + 4 * C / config.tile_rows)
    yield from before[:5]
    yield Work("linear, GELU", "kernel", 5 * HALF * C * M, 8 * C * C * M, instructions, 4 * C * M, again)
    yield before[-1]


def of_tiles(C: int, out: int, M: float, config: Any, rows_stay: bool = False) -> float:
    """Bytes from L2 of a matmul by tiles: of x again for every tile of columns, and of the weight for each of rows."""
    again = 1 if rows_stay else math.ceil(out / config.tile_out) - 1
    return HALF * C * M * (again + out / config.tile_rows)


def norm_linear(name: str, case: str, level: Level, batch: int, compiled: Compiled, out: int) -> Work:
    C, M = level.C, batch * level.tokens
    instructions, config = compiled.normed(case, M, C, out)
    # What was swept over comes again for the first tile, or to stay.
    again = of_tiles(C, out, M, config, config.resident) + (0 if config.resident else HALF * C * M)
    exponentials = out * M if "GELU" in name else 0
    return Work(name, "kernel", HALF * (C + out) * M, 2 * C * out * M, instructions, exponentials, again)


def linear_sum(name: str, case: str, level: Level, batch: int, compiled: Compiled, K: int, each: int = 0) -> Work:
    C, M = level.C, batch * level.tokens
    instructions, config = compiled.matmul(case, "linear", _layer_configs.linear_sum, M, K, C, each)
    again = of_tiles(K, C, M, config)
    exponentials = K * M * math.ceil(C / config.tile_out) if each else 0
    return Work(name, "kernel", HALF * (K + 2 * C) * M, 2 * C * K * M, instructions, exponentials, again)


def by_five_kernels(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """A wide layer: LayerNorm and qkv, attention, projection and sum, LayerNorm, fc1 and GELU, fc2 and sum."""
    C, given = level.C, (level, batch, compiled)
    yield norm_linear("LayerNorm, qkv", f"norm-linear-C{C}-bf16", *given, 3 * C)
    yield next(work for work in chain(*given) if work.name == "block_attention")
    yield linear_sum("projection, sum", f"linear-sum-C{C}-bf16", *given, C)
    yield norm_linear("LayerNorm, fc1, GELU", f"mlp-C{C}-bf16", *given, 4 * C)
    yield linear_sum("fc2, sum", f"mlp-C{C}-bf16", *given, 4 * C)


def with_a_wide_mlp(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """The MLP sub-layer by the last two of them, beside one operation after the other."""
    x = HALF * level.C * batch * level.tokens
    yield Work("LayerNorm", "pass", 2 * x)
    yield from itertools.islice(chain(level, batch, compiled), 1, 4)
    yield Work("sum", "pass", 3 * x)
    yield from itertools.islice(by_five_kernels(level, batch, compiled), 3, 5)


def attention_in_parts(level: Level, batch: int, compiled: Compiled) -> list[Work]:
    """The attention sub-layer beside an MLP that is one kernel."""
    return list(with_one_mlp(level, batch, compiled))[:5]


def attention_by_kernels(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """attention_layer's kernels: LayerNorm and qkv, attention, projection and sum."""
    C, M = level.C, batch * level.tokens
    x = HALF * C * M
    for name, kind, out, moved in (
        ("norm_linear", "norm-linear", 3 * C, 4 * x),
        ("linear_sum", "linear-sum", C, 3 * x),
    ):
        instructions, rows = compiled.linear(kind, M, C, out)
        yield Work(name, "kernel", moved, 2 * C * out * M, instructions, again=HALF * C * out * M / rows)
    yield attention_in_parts(level, batch, compiled)[2]


def projected_by_the_mlp(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """A layer whose projection, sum and MLP sub-layer are one kernel."""
    yield from attention_in_parts(level, batch, compiled)[:3]
    yield projection_mlp(level, batch, compiled)


def by_three_kernels(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """And its LayerNorm and qkv one."""
    yield from list(attention_by_kernels(level, batch, compiled))[::2]
    yield projection_mlp(level, batch, compiled)


def by_two_kernels(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """And the attention in that one, which reads x for each head."""
    C, M, N = level.C, batch * level.tokens, level.N
    x, sequences = HALF * C * M, M / N * C / 32
    instructions = compiled.norm_attention(sequences, C)
    again = x * (C / 32 - 1) + HALF * 3 * C * C * M / N
    flops = 6 * C * C * M + 4 * N * C * M
    yield Work("norm_attention", "kernel", 2 * x, flops, instructions, N * N * sequences, again)
    yield projection_mlp(level, batch, compiled)


def projection_mlp(level: Level, batch: int, compiled: Compiled) -> Work:
    C, M = level.C, batch * level.tokens
    x = HALF * C * M
    instructions, rows = compiled.projection_mlp(M, C)
    again = HALF * 9 * C * C * M / rows
    return Work("projection_mlp", "kernel", 3 * x, 18 * C * C * M, instructions, 4 * C * M, again)


# --- and where it is trained ------------------------------------------------------------------------------------------


def gradients_of(name: str, M: float, K: float, N: float) -> Iterator[Work]:
    """Of a matmul: of its input and of its weight, which is as much work each."""
    yield matmul(f"{name}'s input", M, N, K)
    yield matmul(f"{name}'s weight", M, K, N)


def train_chain(level: Level, batch: int, compiled: Compiled, keep_gelu: bool = True) -> Iterator[Work]:
    """A training step of a layer of :func:`chain`; where the activation is not kept, the GELU's gradient writes it."""
    C, M = level.C, batch * level.tokens
    x = HALF * C * M
    yield from chain(level, batch, compiled)
    yield from gradients_of("fc2", M, 4 * C, C)
    case, units = ("bias-gelu-none", 12) if keep_gelu else ("gelu-linear", 16)
    instructions = compiled.gelu_backward(4 * C * M, case)
    yield Work("bias_gelu, backward", "pass", units * x, instructions=instructions)
    yield from gradients_of("fc1", M, C, 4 * C)
    norm = Work("add_layer_norm, backward", "pass", 4 * x, instructions=compiled.layer_norm_backward(M, C))
    yield norm
    yield from attention_gradients(level, batch, compiled)
    yield norm


def attention_gradients(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """Of qkv, attention and projection."""
    C, M, N = level.C, batch * level.tokens, level.N
    x, sequences = HALF * C * M, M / level.N * C / 32
    yield from gradients_of("projection", M, C, C)
    instructions = compiled.attention_backward(sequences, N)
    name, flops = "block_attention, backward", 10 * N**2 * 32 * sequences
    yield Work(name, "kernel", 8 * x, flops, instructions, N**2 * sequences)
    yield from gradients_of("qkv", M, C, 3 * C)


def train_one_mlp(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """A training step where the MLP sub-layer is a kernel, and two backward, which know its input alone."""
    C, M = level.C, batch * level.tokens
    x = HALF * C * M
    yield from with_one_mlp(level, batch, compiled)
    instructions, rows = compiled.mlp_rows_backward(M, C)
    again = HALF * 8 * C * C * M / rows
    name = "mlp_layer, backward, rows"
    yield Work(name, "kernel", 4 * x, 24 * C * C * M, instructions, 8 * C * M, again)
    instructions, slabs = compiled.mlp_weights_backward(M, C)
    name = "mlp_layer, backward, weights"
    yield Work(name, "kernel", 2 * x, 32 * C * C * M, instructions, 8 * C * M, 2 * x * (slabs - 1))
    yield from attention_gradients(level, batch, compiled)
    yield Work("LayerNorm, backward", "pass", 3 * x, instructions=compiled.layer_norm_backward(M, C))
    yield Work("sum of two gradients", "pass", 3 * x)


def train_wide_mlp(level: Level, batch: int, compiled: Compiled) -> Iterator[Work]:
    """A training step where the MLP sub-layer of wide rows keeps what fc1 gives alone, and makes the rest anew."""
    C, M = level.C, batch * level.tokens
    x, given = HALF * C * M, (level, batch, compiled)
    yield from itertools.islice(with_a_wide_mlp(*given), 5)
    case = f"mlp-train-C{C}-bf16"
    yield norm_linear("LayerNorm, fc1", case, *given, 4 * C)
    yield linear_sum("GELU, fc2, sum", case, *given, 4 * C, GELU_EACH)
    hidden = f"mlp-train-fc1-C{C}-bf16", "mlp_layer_bwd_hidden", _layer_configs.mlp_layer_bwd_hidden
    instructions, config = compiled.matmul(*hidden, M, C, 4 * C)
    again = of_tiles(C, 4 * C, M, config)
    yield Work("hidden, backward", "kernel", 9 * x, 8 * C * C * M, instructions, 8 * C * M, again)
    for name, of, P, Q, step in (
        ("fc1's weight", f"mlp-train-fc1-C{C}-bf16", C, 4 * C, NORM_WEIGHT_STEP),
        ("fc2's weight", case, 4 * C, C, GELU_WEIGHT_STEP),
    ):
        instructions, config = compiled.weight_gradient(of, M, P, Q, step)
        across, down = math.ceil(P / config.tile_rows), math.ceil(Q / config.tile_out)
        again = HALF * M * (P * (down - 1) + Q * (across - 1))
        exponentials = P * M * down if P > Q else 0
        yield Work(f"{name}, backward", "kernel", 5 * x, 8 * C * C * M, instructions, exponentials, again)
    yield matmul("fc1's input", M, 4 * C, C)
    yield Work("add_layer_norm, backward", "pass", 4 * x, instructions=compiled.layer_norm_backward(M, C))
    yield from attention_gradients(*given)
    yield Work("LayerNorm, backward", "pass", 3 * x, instructions=compiled.layer_norm_backward(M, C))
    yield Work("sum of two gradients", "pass", 3 * x)


def train_times() -> list[list[str]]:
    """Microseconds, and the parts that the forward, the MLP's gradients and the attention's have of them."""
    lines = []
    for level in (*MODELS["NesT-T"], *MODELS["NesT-B"]):
        times = []
        for gpu in GPUS.values():
            compiled = Compiled(gpu.architecture)
            each = [seconds(work, gpu) for work in train_chain(level, BATCH, compiled)]
            parts = sum(each[:8]), sum(each[8:14]), sum(each[14:])
            times.append(f"{sum(each) * 1e6:.0f} ({' + '.join(f'{part * 1e6:.0f}' for part in parts)})")
        lines.append([f"C = {level.C}", *times])
    return lines


def gains(before: Callable, after: Callable, channels: Container[int]) -> list[list[str]]:
    """How many times as long as ``after`` a layer, or a part of it, takes as ``before``, of so many channels."""
    lines = []
    for level in (*MODELS["NesT-T"], *MODELS["NesT-B"]):
        if level.C not in channels:
            continue
        ratios = []
        for gpu in GPUS.values():
            compiled = Compiled(gpu.architecture)
            was, now = (
                sum(seconds(work, gpu) for work in design(level, BATCH, compiled)) for design in (before, after)
            )
            ratios.append(f"{was / now:.2f}")
        lines.append([f"C = {level.C}", *ratios])
    return lines


def layer(level: Level, batch: int, compiled: Compiled, one_mlp: bool = True) -> list[Work]:
    """As "auto" has it where nothing was measured, or without the MLP in one kernel."""
    design = with_one_mlp if one_mlp and level.C <= CERTAIN_CHANNELS else chain
    return list(design(level, batch, compiled))


def around(levels: tuple[Level, ...], batch: int) -> Iterator[Work]:
    """Patch embedding and aggregations of a NesT; these by a library's convolution at 70 % of its matmuls' rate."""
    first = levels[0]
    image = HALF * batch * 3 * 16 * first.tokens
    yield Work("patchify", "pass", 2 * image)
    yield matmul("patch embedding", batch * first.tokens, 48, first.C)
    for level, after in itertools.pairwise(levels):
        pixels = batch * level.tokens
        x, y = (HALF * C * pixels for C in (level.C, after.C))
        yield Work("convolution", "library", x + y, 18 * level.C * after.C * pixels / 0.7)
        yield Work("norm_pool", "pass", y + y / 4)
    yield Work("layer_norm_mean", "pass", HALF * levels[-1].C * batch * levels[-1].tokens)


def model(levels: tuple[Level, ...], gpu: Gpu, batch: int = BATCH, one_mlp: bool = True) -> float:
    """Seconds of a forward pass in half precision, of a NesT with what is around its layers."""
    compiled = Compiled(gpu.architecture)
    works = [(level.layers, work) for level in levels for work in layer(level, batch, compiled, one_mlp)]
    if levels in MODELS.values():
        works += [(1, work) for work in around(levels, batch)]
    return sum(times * seconds(work, gpu) for times, work in works)


# --- what others measured ---------------------------------------------------------------------------------------------


class Published(NamedTuple):
    what: str
    gpu: str
    seconds: float
    predict: Callable[[Gpu], float]
    source: str


def _matmul(what: str, gpu: str, M: int, K: int, N: int, source: str, *, tflops: float = 0.0, ms: float = 0.0):
    """Published in TFLOP/s or milliseconds."""
    work = matmul(what, M, K, N)
    taken = ms / 1e3 if ms else work.flops / (tflops * 1e12)
    return Published(f"{what}, {M} x {N} x {K}", gpu, taken, lambda chip: seconds(work, chip), source)


def _flash(gpu: Gpu) -> float:
    """One head of 128 dimensions over 8,192 tokens: its exponentials are all that stands beside the matmuls."""
    N, D = 8192, 128
    return seconds(Work("attention", "kernel", 4 * HALF * N * D, 4 * N * N * D, exponentials=N * N), gpu)


PUBLISHED = (
    _matmul("cuBLAS", "H100", 65536, 1024, 1024, "facebookexperimental/triton PR 1038; fitted to", tflops=584),
    _matmul("cuBLAS", "H100", 4096, 4096, 4096, "facebookexperimental/triton PR 210", tflops=569),
    _matmul("cuBLAS", "H100", 8192, 512, 8192, "triton-lang/triton PR 7136", tflops=417),
    _matmul("CUTLASS", "A100", 913920, 256, 1024, "NVIDIA/cutlass PR 942", ms=3.25),
    Published(
        "attention in Triton, two warp groups, D = 128", "H100", 4 * 8192**2 * 128 / 608e12, _flash,
        "facebookexperimental/triton PR 829",
    ),
    Published(
        "ViT-S, compiled, batch 256", "RTX 4090", 256 / 9949, lambda gpu: model(VIT_S, gpu, one_mlp=False),
        "pytorch-image-models, results/, torch 2.9.1",
    ),
    Published(
        "Swin-T, FasterTransformer, batch 64", "A100", 10.35e-3, lambda gpu: model(SWIN_T, gpu, 64, one_mlp=False),
        "NVIDIA/FasterTransformer, docs/swin_guide.md",
    ),
)  # fmt: skip


# --- printing ---------------------------------------------------------------------------------------------------------


def checks() -> list[list[str]]:
    lines = []
    for one in PUBLISHED:
        predicted = one.predict(GPUS[one.gpu])
        times = f"{one.seconds * 1e3:.3g} ms", f"{predicted * 1e3:.3g} ms", f"{predicted / one.seconds:.2f}"
        lines.append([one.what, one.gpu, *times, one.source])
    return lines


def layers() -> list[list[str]]:
    """Microseconds of each kernel of a layer, the chain's and then what else other designs have."""
    lines = []
    for levels in (MODELS["NesT-T"], MODELS["NesT-B"]):
        for level in levels:
            taken: dict[str, list[str]] = {}
            for gpu in GPUS.values():
                compiled = Compiled(gpu.architecture)
                designs = chain, *(with_one_mlp,) * (level.C <= CERTAIN_CHANNELS), *(by_two_kernels,) * (level.C <= 128)
                designs += (with_activated_fc1,) * (level.C > CERTAIN_CHANNELS)
                designs += (by_five_kernels, train_wide_mlp) * (level.C > _layer_configs.ON_CHIP)
                works = {work.name: work for design in designs for work in design(level, BATCH, compiled)}
                for name, work in works.items():
                    taken.setdefault(name, []).append(f"{seconds(work, gpu) * 1e6:.0f}")
            lines += [[f"C = {level.C}", name, *each] for name, each in taken.items()]
    return lines


def beside(run: Run) -> list[list[str]]:
    """The models' inference in ``run`` that the model of time knows, with what it predicts."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in run.machine.get("gpu", "")), None)
    lines: list[list[str]] = []
    if gpu is None:
        return lines
    for rows in run.cases():
        row = rows[0]
        levels = MODELS.get(NAMES.get(row.op, ""))
        if levels is None or row.dtype != "bf16" or row.direction != "inference" or row.beside:
            continue
        predicted = model(levels, gpu, row.batch)
        for row in rows:
            times = f"{row.seconds * 1e3:.3g} ms", f"{predicted * 1e3:.3g} ms", f"{predicted / row.seconds:.2f}"
            lines.append([row.title, row.peer, *times])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help="also each kernel of a layer")
    parser.add_argument("--beside", type=Path, metavar="RUN.json", help="also a benchmark run on a GPU, as measured")
    args = parser.parse_args()
    print(f"Predicted, not measured: img/s of a forward pass in bf16, batch {BATCH}.\n")
    speeds = [
        [name + what, *(f"{BATCH / model(levels, gpu, one_mlp=one_mlp):,.0f}" for gpu in GPUS.values())]
        for name, levels in MODELS.items()
        for what, one_mlp in (("", True), (", the MLP in parts", False))
    ]
    print(markdown([["model", *GPUS], *speeds]))
    print("\nWhat others measured, and what is predicted for it.\n")
    print(markdown([["what", "GPU", "published", "predicted", "ratio", "source"], *checks()]))
    if args.layers:
        print("\nPredicted microseconds of a layer's kernels.\n")
        print(markdown([["level", "kernel", *GPUS], *layers()]))
        print("\nPredicted gain of attention_layer's kernels over one operation after the other.\n")
        print(markdown([["level", *GPUS], *gains(attention_in_parts, attention_by_kernels, range(257))]))
        print("\nPredicted gain of fc1 with its GELU in one kernel, for the whole layer.\n")
        print(markdown([["level", *GPUS], *gains(chain, with_activated_fc1, range(193, 513))]))
        for what, design in (("MLP's kernels", with_a_wide_mlp), ("layer's five kernels", by_five_kernels)):
            print(f"\nPredicted gain of a wide {what}, for the whole layer.\n")
            print(markdown([["level", *GPUS], *gains(chain, design, range(257, 513))]))
        for what, design in (
            ("", projected_by_the_mlp),
            (", LayerNorm and qkv in one", by_three_kernels),
            (", LayerNorm, qkv and attention in one", by_two_kernels),
        ):
            print(f"\nPredicted gain of projection_mlp's kernel{what}, for the whole layer.\n")
            print(markdown([["level", *GPUS], *gains(with_one_mlp, design, range(129))]))
        print(
            "\nPredicted microseconds of a layer's training step, in parts (forward + MLP's gradients + attention's).\n"
        )
        print(markdown([["level", *GPUS], *train_times()]))
        print("\nPredicted gain of mlp_layer's kernels with gradients, for the whole layer's training step.\n")
        print(markdown([["level", *GPUS], *gains(train_chain, train_one_mlp, range(129))]))
        print("\nPredicted gain of a wide mlp_layer's kernels with gradients, for the whole layer's training step.\n")
        print(markdown([["level", *GPUS], *gains(train_chain, train_wide_mlp, range(257, 513))]))
        print("\nPredicted gain where no activation is kept, for the whole layer's training step.\n")
        again = functools.partial(train_chain, keep_gelu=False)
        print(markdown([["level", *GPUS], *gains(train_chain, again, range(513))]))
    if args.beside is not None:
        measured = beside(load(args.beside))
        print("\nMeasured, beside what is predicted for nest_fast's chain of kernels.\n")
        heading = ["case", "peer", "measured", "predicted", "ratio"]
        print(markdown([heading, *measured]) if measured else "Nothing of that.")


if __name__ == "__main__":
    main()
