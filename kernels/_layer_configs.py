"""Launch configurations of the kernels that a layer's matmuls are in, found as those of _configs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from nest_fast.kernels._configs import row_architecture

__all__ = [
    "LINEAR", "MATMUL", "MATMUL_SUM", "MLP", "MLP_BWD_HIDDEN", "MLP_BWD_ROWS", "MLP_BWD_WEIGHT", "MLP_BWD_WEIGHTS",
    "NORM_ATTENTION", "NORM_MATMUL", "ON_CHIP", "PROJECTION_MLP", "LinearConfig", "MatmulConfig", "MlpConfig",
    "ResidentConfig", "linear", "linear_rows", "linear_sum", "mlp_layer", "mlp_layer_bwd_hidden", "mlp_layer_bwd_rows",
    "mlp_layer_bwd_weight", "mlp_layer_bwd_weights", "norm_attention", "norm_linear", "projection_mlp",
]  # fmt: skip

ON_CHIP = 256  # channels up to which a program holds whole rows; wider ones go by in pieces


class MlpConfig(NamedTuple):
    """A tile of ``tile_rows`` by ``tile_h`` hidden features; channels in pieces of ``tile_c`` at most."""

    tile_rows: int
    tile_h: int
    num_warps: int
    num_stages: int
    tile_c: int = 256


# (architecture, operands) -> configurations for at most so many channels, as in _configs.AGGREGATION; the first is the
# best: the most rows, which read the weights the least often, then the fewest instructions. The last of sm_80 are for
# the 99 KiB of shared memory that sm_86, sm_89 and sm_120 have.
MLP: dict[tuple[int, str], list[tuple[int, MlpConfig]]] = {
    (80, "half"): [
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (192, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2, tile_c=64)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2, tile_c=32)),
        (192, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2, tile_c=64)),
        (256, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (256, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
    ],
    (80, "tf32"): [
        (256, MlpConfig(tile_rows=32, tile_h=32, num_warps=4, num_stages=2)),
        (256, MlpConfig(tile_rows=64, tile_h=32, num_warps=8, num_stages=2)),
        (256, MlpConfig(tile_rows=32, tile_h=16, num_warps=4, num_stages=2)),
    ],
    (80, "ieee"): [
        (256, MlpConfig(tile_rows=32, tile_h=16, num_warps=8, num_stages=1)),
        (256, MlpConfig(tile_rows=16, tile_h=16, num_warps=4, num_stages=1)),
        (256, MlpConfig(tile_rows=16, tile_h=16, num_warps=8, num_stages=1)),
    ],
    (90, "half"): [
        (96, MlpConfig(tile_rows=128, tile_h=64, num_warps=4, num_stages=2, tile_c=32)),
        (192, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (256, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2, tile_c=64)),
        (256, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
        (256, MlpConfig(tile_rows=64, tile_h=32, num_warps=8, num_stages=2)),
    ],
    (90, "tf32"): [
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
        (256, MlpConfig(tile_rows=64, tile_h=32, num_warps=8, num_stages=2, tile_c=64)),
        (256, MlpConfig(tile_rows=32, tile_h=32, num_warps=4, num_stages=2)),
    ],
    (100, "half"): [
        (256, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (256, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2, tile_c=128)),
        (256, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
    ],
}

# As of MLP, by architecture alone: of programs that make their rows themselves, of a projection and a sum, in half
# precision.
PROJECTION_MLP: dict[int, list[tuple[int, MlpConfig]]] = {
    80: [
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2, tile_c=64)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2, tile_c=32)),
    ],
    90: [
        (96, MlpConfig(tile_rows=128, tile_h=64, num_warps=4, num_stages=2, tile_c=32)),
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
    ],
    100: [
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
    ],
}

# As of PROJECTION_MLP: the gradients of the MLP, first of its rows, then of its weights, of which a program has tile_h
# features.
MLP_BWD_ROWS: dict[int, list[tuple[int, MlpConfig]]] = {
    80: [
        (128, MlpConfig(tile_rows=128, tile_h=32, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2, tile_c=32)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=8, num_stages=2)),
    ],
    90: [
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2, tile_c=64)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
    ],
    100: [
        (96, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2, tile_c=32)),
        (128, MlpConfig(tile_rows=128, tile_h=64, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=128, tile_h=32, num_warps=8, num_stages=2, tile_c=32)),
        (128, MlpConfig(tile_rows=64, tile_h=32, num_warps=4, num_stages=2)),
    ],
}
MLP_BWD_WEIGHTS: dict[int, list[tuple[int, MlpConfig]]] = {
    80: [
        (128, MlpConfig(tile_rows=32, tile_h=64, num_warps=4, num_stages=2)),
        (128, MlpConfig(tile_rows=32, tile_h=64, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=32, tile_h=32, num_warps=4, num_stages=2)),
        (128, MlpConfig(tile_rows=16, tile_h=32, num_warps=4, num_stages=2)),
    ],
    90: [
        (96, MlpConfig(tile_rows=64, tile_h=128, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=64, tile_h=64, num_warps=4, num_stages=2)),
        (128, MlpConfig(tile_rows=32, tile_h=128, num_warps=8, num_stages=2)),
    ],
    100: [
        (128, MlpConfig(tile_rows=64, tile_h=128, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=32, tile_h=128, num_warps=8, num_stages=2)),
        (128, MlpConfig(tile_rows=32, tile_h=64, num_warps=4, num_stages=2)),
    ],
}


class LinearConfig(NamedTuple):
    """A tile of ``tile_rows`` by ``tile_out`` columns of the result; channels in pieces of ``tile_c`` at most."""

    tile_rows: int
    tile_out: int
    num_warps: int
    num_stages: int
    tile_c: int = 256


# As of MLP: linear layers of rows that stay on chip, after a LayerNorm or before a sum.
LINEAR: dict[tuple[int, str], list[tuple[int, LinearConfig]]] = {
    (80, "half"): [
        (256, LinearConfig(tile_rows=128, tile_out=32, num_warps=8, num_stages=2)),
        (256, LinearConfig(tile_rows=64, tile_out=64, num_warps=4, num_stages=2)),
    ],
    (80, "tf32"): [
        (256, LinearConfig(tile_rows=64, tile_out=32, num_warps=8, num_stages=2)),
        (256, LinearConfig(tile_rows=32, tile_out=32, num_warps=4, num_stages=2)),
    ],
    (80, "ieee"): [
        (256, LinearConfig(tile_rows=32, tile_out=16, num_warps=8, num_stages=1)),
        (256, LinearConfig(tile_rows=16, tile_out=16, num_warps=8, num_stages=1)),
    ],
    (90, "half"): [
        (96, LinearConfig(tile_rows=128, tile_out=32, num_warps=8, num_stages=2)),
        (256, LinearConfig(tile_rows=128, tile_out=64, num_warps=8, num_stages=2)),
        (256, LinearConfig(tile_rows=64, tile_out=64, num_warps=4, num_stages=2)),
    ],
}


class MatmulConfig(NamedTuple):
    """A tile of ``tile_rows`` by ``tile_out`` columns of the result, ``tile_k`` columns of the operands a step, which
    come by pointers or by the copy engine; or whole rows are ``resident``, in pieces of ``tile_k`` columns, and steps
    are tiles of the result."""

    tile_rows: int
    tile_out: int
    tile_k: int
    num_warps: int
    num_stages: int
    copies: bool = False
    resident: bool = False


# By architecture alone: a linear layer with its epilogue, in half precision. What reads the operands the least often
# comes first: they come from the L2 cache, which takes longer than the matrix units do. On sm_80, whose tiles of 256
# columns leave no register, two programs of 128 on a multiprocessor.
_HOPPER = [
    MatmulConfig(tile_rows=128, tile_out=256, tile_k=64, num_warps=8, num_stages=3, copies=True),
    MatmulConfig(tile_rows=128, tile_out=128, tile_k=64, num_warps=8, num_stages=4, copies=True),
    MatmulConfig(tile_rows=128, tile_out=128, tile_k=64, num_warps=8, num_stages=3),
    MatmulConfig(tile_rows=64, tile_out=64, tile_k=32, num_warps=4, num_stages=3),
]
MATMUL: dict[int, list[MatmulConfig]] = {
    80: [
        MatmulConfig(tile_rows=128, tile_out=128, tile_k=32, num_warps=8, num_stages=4),
        MatmulConfig(tile_rows=128, tile_out=128, tile_k=32, num_warps=4, num_stages=3),
        MatmulConfig(tile_rows=64, tile_out=64, tile_k=32, num_warps=4, num_stages=3),
    ],
    90: _HOPPER,
    100: _HOPPER,
}

# As of MATMUL: before a residual sum, where 256 columns may be more than there are. On sm_100 they spill beside it.
_TALL = MatmulConfig(tile_rows=256, tile_out=128, tile_k=64, num_warps=8, num_stages=3, copies=True)
MATMUL_SUM: dict[int, list[MatmulConfig]] = {
    **MATMUL,
    90: [_HOPPER[0], _TALL, *_HOPPER[1:]],
    100: [_TALL, *_HOPPER[1:]],
}
# After a LayerNorm, for at most so many channels: rows that stay are normalised once, and wider ones for every tile. On
# sm_100 they would take most of tensor memory. The second of sm_80 is for 99 KiB of shared memory.
NORM_MATMUL: dict[int, list[tuple[float, MatmulConfig]]] = {
    80: [
        (384, MatmulConfig(tile_rows=128, tile_out=64, tile_k=64, num_warps=8, num_stages=2, resident=True)),
        (512, MatmulConfig(tile_rows=64, tile_out=32, tile_k=64, num_warps=4, num_stages=2, resident=True)),
        (math.inf, MatmulConfig(tile_rows=128, tile_out=128, tile_k=32, num_warps=8, num_stages=4)),
        (math.inf, MatmulConfig(tile_rows=64, tile_out=64, tile_k=32, num_warps=4, num_stages=3)),
    ],
    90: [
        (384, MatmulConfig(tile_rows=128, tile_out=64, tile_k=64, num_warps=8, num_stages=2, resident=True)),
        *((math.inf, config) for config in _HOPPER),
        (512, MatmulConfig(tile_rows=128, tile_out=32, tile_k=64, num_warps=8, num_stages=2, resident=True)),
    ],
    100: [(math.inf, config) for config in _HOPPER],
}
# As of MATMUL: the gradient of what is hidden, and of a weight, whose tiles are columns by columns, tile_k rows a step.
MLP_BWD_HIDDEN: dict[int, list[MatmulConfig]] = {**MATMUL, 100: _HOPPER[1:]}
MLP_BWD_WEIGHT = MATMUL


class ResidentConfig(NamedTuple):
    """Keys in pieces of ``block_n`` at most, ``block_m`` queries at once; channels in pieces of ``tile_c`` at most."""

    block_m: int
    block_n: int
    num_warps: int
    tile_c: int


# By architecture alone: LayerNorm, qkv and attention in one, in half precision.
NORM_ATTENTION: dict[int, list[tuple[int, ResidentConfig]]] = {
    80: [
        (96, ResidentConfig(block_m=128, block_n=64, num_warps=8, tile_c=32)),
        (128, ResidentConfig(block_m=128, block_n=64, num_warps=8, tile_c=64)),
        (128, ResidentConfig(block_m=128, block_n=64, num_warps=8, tile_c=32)),
        (128, ResidentConfig(block_m=64, block_n=32, num_warps=8, tile_c=32)),
    ],
    90: [
        (128, ResidentConfig(block_m=64, block_n=128, num_warps=4, tile_c=32)),
        (128, ResidentConfig(block_m=64, block_n=64, num_warps=4, tile_c=32)),
    ],
    100: [
        (128, ResidentConfig(block_m=64, block_n=128, num_warps=4, tile_c=32)),
        (128, ResidentConfig(block_m=64, block_n=64, num_warps=4, tile_c=32)),
    ],
}


# --- candidates for rows of so many channels --------------------------------------------------------------------------


def mlp_layer(channels: int, operands: str, *shape_and_architecture: Any) -> tuple[MlpConfig, ...]:
    here = row_architecture(shape_and_architecture[-1])
    return _candidates(MLP.get((here, operands)) or MLP[80, operands], channels)


def projection_mlp(channels: int, *shape_and_architecture: Any) -> tuple[MlpConfig, ...]:
    return _candidates(PROJECTION_MLP[row_architecture(shape_and_architecture[-1])], channels)


def mlp_layer_bwd_rows(channels: int, *shape_and_architecture: Any) -> tuple[MlpConfig, ...]:
    return _candidates(MLP_BWD_ROWS[row_architecture(shape_and_architecture[-1])], channels)


def mlp_layer_bwd_weights(channels: int, *shape_and_architecture: Any) -> tuple[MlpConfig, ...]:
    return _candidates(MLP_BWD_WEIGHTS[row_architecture(shape_and_architecture[-1])], channels)


def linear_rows(channels: int, operands: str, *shape_and_architecture: Any) -> tuple[LinearConfig, ...]:
    here = row_architecture(shape_and_architecture[-1])
    return _candidates(LINEAR.get((here, operands)) or LINEAR[80, operands], channels)


def linear(*shape_and_architecture: Any) -> tuple[MatmulConfig, ...]:
    """Whether the operands can be copied is the shape's last."""
    *_, can_copy, architecture = shape_and_architecture
    return tuple(config for config in MATMUL[row_architecture(architecture)] if can_copy or not config.copies)


def linear_sum(K: int, outputs: int, *shape_and_architecture: Any) -> tuple[MatmulConfig, ...]:
    return _that_fill(MATMUL_SUM, outputs, *shape_and_architecture)


def norm_linear(K: int, outputs: int, *shape_and_architecture: Any) -> tuple[MatmulConfig, ...]:
    table = {number: [config for most, config in rows if most >= K] for number, rows in NORM_MATMUL.items()}
    return _that_fill(table, outputs, *shape_and_architecture)


def mlp_layer_bwd_hidden(K: int, outputs: int, *shape_and_architecture: Any) -> tuple[MatmulConfig, ...]:
    return _that_fill(MLP_BWD_HIDDEN, outputs, *shape_and_architecture)


def mlp_layer_bwd_weight(P: int, Q: int, *shape_and_architecture: Any) -> tuple[MatmulConfig, ...]:
    return _that_fill(MLP_BWD_WEIGHT, Q, *shape_and_architecture)


def _that_fill(table: dict[int, list[MatmulConfig]], outputs: int, *rest: Any) -> tuple[MatmulConfig, ...]:
    """As of :func:`linear`; tiles of 256 columns come last where these would be over a sixth more than there are."""
    *_, can_copy, architecture = rest
    fit = [config for config in table[row_architecture(architecture)] if can_copy or not config.copies]
    return tuple(sorted(fit, key=lambda config: config.tile_out == 256 and 6 * (-outputs % 256) > outputs))


def norm_attention(channels: int, *shape_and_architecture: Any) -> tuple[ResidentConfig, ...]:
    return _candidates(NORM_ATTENTION[row_architecture(shape_and_architecture[-1])], channels)


def _candidates(rows: list, channels: int) -> tuple:
    return tuple(dict.fromkeys(config for most, config in rows if channels <= most))
