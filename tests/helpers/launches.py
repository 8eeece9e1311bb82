"""Every launcher of kernels/ over the stub of a CUDA driver, each argument compared with what arrived; a command.

``python tests/helpers/launches.py`` prints JSON: for every case its launches, and what was wrong with them.
"""

import json
import struct
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import stub_driver

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

ARCHITECTURE = 90
BF16, FP32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """What a launcher was given and returned, and the programs of each of its launches, counted here."""

    given: tuple
    returned: tuple
    programs: list


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def unaligned(*shape, dtype=BF16):
    """Begins two bytes, or four, after a multiple of 16."""
    return torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


# --- cases: the smallest shapes that compile quickly and still have several programs ----------------------------------


def attention(heads=3, kv_heads=3, dtype=BF16, adds=False, B=2, T=4, N=16, make=empty):
    """q, k, v packed, bias and mask."""
    packed = make(B, T, N, heads + 2 * kv_heads, 16, dtype=dtype)
    bias, mask = empty(heads, N, N, dtype=dtype), torch.ones(T, N, N, dtype=torch.bool)
    return *packed.split([heads, kv_heads, kv_heads], 3), *((bias, mask) if adds else (None, None))


def attention_fwd(*, programs=24, **how):
    given = attention(**how)
    return Case(given, block_attention_fwd(*given, 0.25), [programs])


def attention_bwd(*, programs=(24,), **how):
    given = attention(**how)
    q, adds = given[0], how.get("adds", False)
    out, lse = (
        torch.empty(q.shape, dtype=q.dtype),
        empty(*q.shape[:2], q.shape[3], q.shape[2], *(2,) * adds, dtype=FP32),
    )
    grads = block_attention_bwd(out, *given[:3], out, lse, *given[3:], 0.25, adds)
    return Case((out, *given, lse), grads[:3], [*programs])  # dbias is summed afterwards


def windows(pads):
    """Two images of 20 x 20 in 9 shifted windows of 8 x 8: q, k, v, bias, and one token's pad_k and pad_v, or not."""
    q, k, v = empty(2, 1, 400, 9, 16).split(3, 3)
    padding = empty(2, 1, 3, 16).unbind() if pads else (None, None)
    return q, k, v, empty(3, 64, 64), *padding, (20, 20, 8, 8, 4, 4, 0, 0)


def windows_fwd(pads):
    *qkv, bias, pad_k, pad_v, numbers = windows(pads)
    returned = block_attention_fwd(*qkv, bias, None, 0.25, pad_k, pad_v, None, numbers)
    return Case((*qkv, bias, pad_k, pad_v), returned, [54])


def windows_bwd():
    """Its dpads is summed of what a kernel wrote, as dbias is."""
    *qkv, bias, pad_k, pad_v, numbers = windows(True)
    out, lse = empty(2, 1, 400, 3, 16), empty(2, 9, 3, 64, 2, dtype=FP32)
    kept = *qkv, out, lse, bias, None, 0.25, True
    grads = block_attention_bwd(out, *kept, pad_k, pad_v, numbers, True)
    return Case((out, *qkv, lse, bias, pad_k, pad_v), grads[:3], [54, 3 * 18])


def cosines(N=16, dtype=BF16, *, programs):
    """A factor for each head, and one key head: a program has one of three."""
    q, k, v = empty(2, 4, N, 5, 16, dtype=dtype).split([3, 1, 1], 3)
    given = q, k, v, empty(3, N, N), None, 1.0, None, None, empty(3)
    return Case((*given[:4], given[-1]), block_attention_fwd(*given), [programs])


def cosines_bwd(N=16, dtype=BF16, *, programs):
    """Its dbias and dscales are summed of what kernels wrote."""
    q, k, v = empty(2, 4, N, 9, 16, dtype=dtype).split(3, 3)
    out, lse = empty(*q.shape, dtype=dtype), empty(2, 4, 3, N, 2, dtype=FP32)
    given = out, q, k, v, out, lse, empty(3, N, N), None
    scales = empty(3)
    grads = block_attention_bwd(*given, 1.0, True, None, None, (), False, scales)
    return Case((*given[:-1], scales), grads[:3], [*programs])


def far_apart():
    """A stride of 2^31 elements, in memory that nobody touches."""
    x = torch.empty(2**31 + 64, dtype=BF16)
    q = x.as_strided((2, 1, 1, 1, 16), (2**31, 16, 16, 16, 1))
    return Case((q,), block_attention_fwd(q, q, q, None, None, -0.25), [2])


def add_layer_norm(make=empty, C=24):
    given = (make(3, 50, C), empty(3, 50, C), empty(3), empty(C), empty(C, dtype=FP32), empty(C, dtype=FP32))
    # 32 columns, so 32 rows of 150 in a tile.
    return Case(given, add_layer_norm_fwd(*given, 1e-6, FP32, BF16), [5])


def add_layer_norm_gradients(dtotal, dnormed, branch_scale):
    total, mean, rstd, weight = empty(3, 50, 24), empty(3, 50, dtype=FP32), empty(3, 50, dtype=FP32), empty(24)
    given = (dtotal, dnormed, total, mean, rstd, branch_scale, weight)
    dx, dbranch, _ = add_layer_norm_bwd(*given, BF16, BF16, branch_scale is not None)
    # The statistics and weight of a gradient that is not there are not read, but passed.
    return Case(given, (dx, dbranch), [5])


def bias_gelu(bias):
    given = (empty(5, 70, 136), bias)  # 128 columns and 8 more; 16 rows of 350 in a tile
    return Case(given, (bias_gelu_fwd(*given, BF16, False),), [2 * 22])


def bias_gelu_gradients(bias, programs):
    given = (empty(5, 70, 136), empty(5, 70, 136), bias)
    return Case(given, bias_gelu_bwd(*given, True, bias is not None)[:1], [programs])


def gelu_linear_gradients():
    """The kernel has x and bias; dout goes through a matmul first."""
    given = (empty(5, 70, 136), empty(136))
    grads = gelu_linear_bwd(empty(5, 70, 40), *given, True, empty(40, 136), [True] * 4)
    return Case(given, grads[:1], [2 * 11])


def layer_norm_mean(tokens, programs):
    given = (empty(3, tokens, 24), empty(24), empty(24))
    return Case(given, layer_norm_mean_fwd(*given, 1e-6, BF16), programs)


def layer_norm_mean_gradients():
    x, row = empty(3, 100, 24), empty(3, 100, dtype=FP32)
    given = (empty(3, 24), x, row, row.clone(), empty(24))
    dx, _ = layer_norm_mean_bwd(given[0], x, empty(3, 24, dtype=FP32), *given[2:])
    return Case(given, (dx,), [3])  # an image is one part


def norm_linear(norm_dtype=BF16):
    """150 rows in tiles of 128."""
    given = (empty(3, 50, 24), empty(24, dtype=norm_dtype), empty(24, dtype=norm_dtype), empty(72, 24), empty(72))
    return Case(given, (norm_linear_fwd(*given[:3], 1e-6, *given[3:]),), [2])


def wide(C, out):
    """As norm_linear, two tiles of columns by a program each; of 300 channels or 67 columns by pointers."""
    given = (empty(3, 50, C), empty(C), empty(C), empty(out, C), empty(out))
    return Case(given, (norm_linear_fwd(*given[:3], 1e-6, *given[3:]),), [4])


def wide_sum(C, out, programs):
    """Tiles of 256 rows by 128 columns, or by pointers of 128."""
    given = (empty(3, 50, C), empty(out, C), empty(out), empty(3, 50, out))
    return Case(given, (linear_sum_fwd(*given, 1.7),), [programs])


def wide_mlp():
    """What is hidden is not returned. Factors of samples."""
    given = (empty(3, 50, 288), empty(288), empty(288), empty(72, 288), None, empty(288, 72), None, empty(3))
    x, norm_weight, norm_bias, fc1, _, fc2, _, samples = given
    out = mlp_layer_fwd(x, norm_weight, norm_bias, 1e-6, fc1, None, False, fc2, None, 1.0, samples)
    return Case(given, (out,), [4, 3])


def norm_attention(bias):
    """Two heads of 16 in 6 blocks."""
    given = (empty(2, 3, 20, 32), empty(32), empty(32), empty(96, 32), bias)
    return Case(given, (norm_attention_fwd(*given[:3], 1e-6, *given[3:], 2, 0.25),), [12])


def linear_sum(bias):
    given = (empty(3, 50, 24), empty(40, 24), bias, empty(3, 50, 40))
    return Case(given, (linear_sum_fwd(*given, 1.7),), [2])


def linear(bias, activation, N=72):
    """Tiles of 128 rows of 150, and of 256 columns, or where a row of them is no multiple of 16 bytes, of 128."""
    given = (empty(3, 50, 24), empty(N, 24), bias)
    return Case(given, (linear_fwd(*given, activation),), [2])


def mlp_layer(biases, norm_dtype=BF16):
    """150 rows in tiles of 128; a tile of hidden features and a part of one."""
    norm, fc1, fc2 = (empty(24, dtype=norm_dtype), empty(24, dtype=norm_dtype)), empty(72, 24), empty(24, 72)
    fc1_bias, fc2_bias = (empty(72), empty(24)) if biases else (None, None)
    given = (empty(3, 50, 24), *norm, fc1, fc1_bias, fc2, fc2_bias)
    out = mlp_layer_fwd(given[0], *norm, 1e-6, fc1, fc1_bias, biases, fc2, fc2_bias, 1.7)
    return Case(given, (out,), [2])


def mlp_layer_of_samples():
    given = (empty(3, 50, 24), empty(24), empty(24), empty(72, 24), empty(72), empty(24, 72), empty(24), empty(3))
    x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, samples = given
    out = mlp_layer_fwd(x, norm_weight, norm_bias, 1e-6, fc1, fc1_bias, True, fc2, fc2_bias, 1.0, samples)
    return Case(given, (out,), [2])


def mlp_layer_gradients(samples, mask, programs):
    """Rows in tiles of 128, then features in tiles of 128 and stripes of 64 rows."""
    x, norm, fc1, fc2 = empty(3, 50, 24), (empty(24), empty(24)), empty(72, 24), empty(24, 72)
    fc1_bias = empty(72) if samples is None else None
    given = (empty(3, 50, 24), x, *norm, fc1, fc1_bias, fc2, samples)
    grads = mlp_layer_bwd(given[0], x, *norm, 1e-6, fc1, fc1_bias, True, fc2, 1.7, samples, mask)
    return Case(given, grads[:1], programs)  # the others are summed of what a kernel wrote


def wide_mlp_training(C, hidden, samples, programs):
    """Forward, gradients of what is hidden, of fc1's weight, of fc2's, and of x in the pass of the LayerNorm."""
    x, norm, fc1, fc2 = empty(3, 50, C), (empty(C), empty(C)), empty(hidden, C), empty(C, hidden)
    biases, factors, dout = (empty(hidden), empty(C)), (1.0, samples), empty(3, 50, C)
    out, *kept = wide_mlp_fwd(x, *norm, 1e-6, fc1, biases[0], True, fc2, biases[1], *factors)
    grads = wide_mlp_bwd(dout, x, *kept, *norm, fc1, True, fc2, *factors, [True] * 4)
    given = (dout, x, *norm, fc1, fc2, *biases, samples)
    return Case(given, (out, *kept, grads[0]), programs)  # the others are summed of what a kernel wrote


def projection_mlp(biases, norm_dtype=BF16):
    """As mlp_layer's."""
    norm, proj = (empty(24, dtype=norm_dtype), empty(24, dtype=norm_dtype)), empty(24, 24)
    fc1, fc2 = empty(72, 24), empty(24, 72)
    proj_bias, fc1_bias, fc2_bias = (empty(24), empty(72), empty(24)) if biases else (None, None, None)
    given = (empty(3, 50, 24), empty(3, 50, 24), proj, proj_bias, *norm, fc1, fc1_bias, fc2, fc2_bias)
    out = projection_mlp_fwd(*given[:4], 0.7, *norm, 1e-6, fc1, fc1_bias, biases, fc2, fc2_bias, 1.7)
    return Case(given, (out,), [2])


def norm_pool(optional, training):
    y, weight, bias = empty(2, 16, 12, 24), empty(24, dtype=FP32), empty(24, dtype=FP32)
    conv_bias, pos_embed = (empty(24, dtype=FP32), empty(1, 1, 48, 24)) if optional else (None, None)
    given = (y, conv_bias, weight, bias, pos_embed)
    outs = norm_pool_fwd(*given, (8, 6), 1e-6, optional, training)
    # 2 images, strips of 4 of 8 rows, 16 of 6 columns
    return Case(given, outs if training else outs[:1], [2 * 2])


def norm_pool_gradients():
    y, row, weight = empty(2, 16, 12, 24), empty(2, 16, 12, dtype=FP32), empty(24, dtype=FP32)
    dout, argmax = empty(2, 1, 48, 24), torch.empty(2, 1, 48, 24, dtype=torch.uint8)
    given = (dout, y, weight.clone(), weight, row, row.clone(), argmax)
    dy, _ = norm_pool_bwd(*given, (8, 6), False)
    return Case(given, (dy,), [24])  # 384 pixels, 16 each


def aggregate():
    """Four blocks of 8 x 8 to one of 8 x 8."""
    x, vectors = empty(2, 4, 64, 16), [empty(16, dtype=FP32) for _ in range(3)]
    weight = empty(16, 16, 3, 3).to(memory_format=torch.channels_last)
    given = (x, weight, *vectors, empty(1, 1, 64, 16))
    outs = block_aggregate_fwd(*given, (2, 2), (8, 8), (8, 8), 1e-6, False, True)
    # 16 pairs of rows; tiles of 128 pixels are 8 rows of 16, of which one pair is repeated
    return Case(given, outs, [6])


CASES = {
    "block_attention_fwd": attention_fwd,
    "block_attention_fwd, multi-query": lambda: attention_fwd(kv_heads=1, programs=8),
    "block_attention_fwd, bias and mask": lambda: attention_fwd(adds=True),
    "block_attention_fwd, one block": lambda: attention_fwd(B=1, T=1, N=1, heads=1, kv_heads=1, programs=1),
    "block_attention_fwd, unaligned": lambda: attention_fwd(make=unaligned),
    "block_attention_fwd, far apart": far_apart,
    "block_attention_fwd, streaming": lambda: attention_fwd(N=40, dtype=FP32, programs=48),
    "block_attention_fwd, cosines": lambda: cosines(programs=24),
    "block_attention_fwd, cosines, streaming": lambda: cosines(40, FP32, programs=48),
    "block_attention_bwd, cosines": lambda: cosines_bwd(programs=(24, 24)),
    "block_attention_bwd, cosines, streaming": lambda: cosines_bwd(40, FP32, programs=(48, 72, 216)),
    "block_attention_fwd, windows": lambda: windows_fwd(False),
    "block_attention_fwd, padded windows": lambda: windows_fwd(True),
    "block_attention_bwd, padded windows": windows_bwd,
    "block_attention_bwd": attention_bwd,
    "block_attention_bwd, bias and mask": lambda: attention_bwd(adds=True, programs=(24, 3 * 8)),
    "block_attention_bwd, streaming": lambda: attention_bwd(N=40, dtype=FP32, programs=(48, 72)),
    "add_layer_norm_fwd": add_layer_norm,
    "add_layer_norm_fwd, unaligned": lambda: add_layer_norm(make=unaligned, C=23),
    "add_layer_norm_bwd": lambda: add_layer_norm_gradients(empty(3, 50, 24), empty(3, 50, 24), empty(3)),
    "add_layer_norm_bwd, of normed alone": lambda: add_layer_norm_gradients(None, empty(3, 50, 24), None),
    "bias_gelu_fwd": lambda: bias_gelu(empty(136)),
    "bias_gelu_fwd, without bias": lambda: bias_gelu(None),
    "bias_gelu_bwd": lambda: bias_gelu_gradients(empty(136), 2 * 11),
    "bias_gelu_bwd, without bias": lambda: bias_gelu_gradients(None, 2 * 22),
    "gelu_linear_bwd": gelu_linear_gradients,
    "layer_norm_mean_fwd": lambda: layer_norm_mean(100, [3]),
    "layer_norm_mean_fwd, in parts": lambda: layer_norm_mean(300, [9, 3]),
    "layer_norm_mean_bwd": layer_norm_mean_gradients,
    "norm_linear_fwd": norm_linear,
    "norm_linear_fwd, norm in float32": lambda: norm_linear(FP32),
    "norm_linear_fwd, wide": lambda: wide(288, 72),
    "norm_linear_fwd, wide, by pointers": lambda: wide(300, 67),
    "linear_sum_fwd, wide": lambda: wide_sum(288, 40, 1),
    "linear_sum_fwd, wide, by pointers": lambda: wide_sum(300, 67, 2),
    "mlp_layer_fwd, wide": wide_mlp,
    "norm_attention_fwd": lambda: norm_attention(empty(96)),
    "norm_attention_fwd, without bias": lambda: norm_attention(None),
    "linear_sum_fwd": lambda: linear_sum(empty(40)),
    "linear_sum_fwd, without bias": lambda: linear_sum(None),
    "linear_fwd": lambda: linear(empty(72), "gelu"),
    "linear_fwd, bare": lambda: linear(None, "none"),
    "linear_fwd, by pointers": lambda: linear(empty(67), "gelu_tanh", 67),
    "mlp_layer_fwd": lambda: mlp_layer(True),
    "mlp_layer_fwd, without biases": lambda: mlp_layer(False, FP32),
    "mlp_layer_fwd, of samples": mlp_layer_of_samples,
    "mlp_layer_bwd": lambda: mlp_layer_gradients(None, [True] * 4, [2, 3]),
    "mlp_layer_bwd, of samples": lambda: mlp_layer_gradients(empty(3), [True, False, True, False], [2, 3]),
    "mlp_layer_bwd, of what is before fc1": lambda: mlp_layer_gradients(empty(3), [True, False, False, False], [2]),
    "wide_mlp": lambda: wide_mlp_training(136, 72, empty(3), [4, 2, 2, 6, 6, 5]),
    "wide_mlp, by pointers": lambda: wide_mlp_training(140, 67, None, [4, 4, 2, 6, 6, 5]),
    "projection_mlp_fwd": lambda: projection_mlp(True),
    "projection_mlp_fwd, without biases": lambda: projection_mlp(False, FP32),
    "norm_pool_fwd": lambda: norm_pool(True, True),
    "norm_pool_fwd, bare": lambda: norm_pool(False, False),
    "norm_pool_bwd": norm_pool_gradients,
    "block_aggregate_fwd, training": aggregate,
}


# --- what arrived -----------------------------------------------------------------------------------------------------


def leaves(value, kind, path):
    """(path, value, type) of every value in an argument, type "constexpr" where no parameter carries it."""
    if isinstance(kind, tuple):
        for n, (x, one) in enumerate(zip(value, kind, strict=True)):
            yield from leaves(x, one, (*path, n))
    elif kind.startswith("tensordesc"):  # a tensor map, then lengths and strides
        yield path, value.base, "*"
        for numbers, one in ((value.shape, "i32"), (value.strides, "i64")):
            yield from ((path, number, one) for number in numbers)
    else:
        yield path, value, kind


def bits(value, kind):
    """The parameter that ``value`` should be, as unsigned integer."""
    if kind.startswith("*"):
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return value % 2 ** {"i32": 32, "i64": 64}[kind]


def wrong_with(launch):
    """What did not arrive as it was given, or was promised and does not hold."""
    source = launch.compiled.src
    promised = {path: dict(attributes) for path, attributes in source.attrs.items()}
    values, wrong = iter(launch.values), []
    for n, (name, kind) in enumerate(source.signature.items()):
        for path, value, leaf in leaves(launch.arguments[name], kind, (n,)):
            where = ".".join([name, *map(str, path[1:])])
            if leaf == "constexpr":
                if (compiled := source.constants[path]) != value:
                    wrong.append(f"{where}: {value!r} was compiled in as {compiled!r}")
                continue
            if (got := next(values, None)) != (wanted := bits(value, leaf)):
                wrong.append(f"{where}: {wanted:#x} arrived as {got}")
            unit = promised.get(path, {}).get("tt.divisibility", 1)
            if wanted % unit:
                wrong.append(f"{where}: {wanted:#x} is no multiple of {unit}")
    if rest := list(values):
        wrong.append(f"{len(rest)} more parameters than arguments")
    shared, threads = launch.compiled.metadata.shared, 32 * launch.compiled.metadata.num_warps
    if (launch.shared, launch.block) != (shared, (threads, 1, 1)):
        wrong.append(f"{launch.block} threads with {launch.shared} bytes, compiled for {threads} with {shared}")
    return wrong


def unpromised(launch):
    """How many pointers the kernel was not promised to be multiples of 16."""
    source, arguments = launch.compiled.src, launch.arguments
    kinds = enumerate(source.signature.items())
    parameters = [leaf for n, (name, kind) in kinds for leaf in leaves(arguments[name], kind, (n,))]
    pointers = [path for path, _, kind in parameters if kind.startswith("*")]
    return sum(["tt.divisibility", 16] not in source.attrs.get(path, []) for path in pointers)


def launched_again(stub, differ):
    """To be told of every launch: does it again, and adds to ``differ`` those that then arrive otherwise."""

    def seen():
        launched = stub.launched
        return list(launched.values), tuple(launched.grid), tuple(launched.block), launched.shared

    def heard(launch, args):
        launches, arrived = stub.launched.launches, seen()
        launch(*args)
        differ.append((stub.launched.launches, seen()) != (launches + 1, arrived))

    return heard


# --- how many kernels there are for batches of any size ---------------------------------------------------------------

BATCHES = (1, 2, 3, 16, 48, 512)  # one, and numbers that 16 does and does not divide


def batches(B):
    """Every launcher on a batch of B."""
    x, vector, row = empty(B, 4, 4, 32), empty(32), empty(B, 4, 4, dtype=FP32)
    qkv, proj, fc1, fc2 = empty(96, 32), empty(32, 32), empty(128, 32), empty(32, 128)
    norm = vector, vector, 1e-6
    for adds in (False, True):
        attention_fwd(B=B, adds=adds)
        attention_bwd(B=B, adds=adds)
    attention_fwd(B=B, N=40, dtype=FP32)
    attention_bwd(B=B, N=40, dtype=FP32)
    add_layer_norm_fwd(x, x, empty(B), vector, *norm, BF16, BF16)
    add_layer_norm_bwd(x, x, x, row, row, empty(B), vector, BF16, BF16, True)
    bias_gelu_fwd(x, vector, BF16, False)
    bias_gelu_bwd(x, x, vector, False, True)
    tokens = empty(B, 300, 32)
    outs = layer_norm_mean_fwd(tokens, *norm, BF16)
    layer_norm_mean_bwd(empty(B, 32), tokens, *outs[1:], vector)
    linear_fwd(x, fc1, None, "gelu")
    linear_fwd(empty(B, 5, 31), empty(67, 31), None, "gelu")
    norm_linear_fwd(x, *norm, qkv, None)
    norm_attention_fwd(x, *norm, qkv, None, 2, 0.25)
    linear_sum_fwd(x, proj, None, x, 1.0)
    mlp_layer_fwd(x, *norm, fc1, None, False, fc2, None, 1.0)
    mlp_layer_fwd(x, *norm, fc1, None, False, fc2, None, 1.0, empty(B))
    mlp_layer_bwd(x, x, *norm, fc1, None, False, fc2, 1.0, empty(B), [True] * 4)
    rows, vector = empty(B, 4, 4, 288), empty(288)
    fc1, fc2 = empty(64, 288), empty(288, 64)
    for samples in (None, empty(B)):
        call = vector, vector, 1e-6, fc1, None, False, fc2, None, 1.0, samples
        mlp_layer_fwd(rows, *call)
        _, *kept = wide_mlp_fwd(rows, *call)
        wide_mlp_bwd(rows, rows, *kept, vector, vector, fc1, False, fc2, 1.0, samples, [True] * 4)
    mlp_layer_fwd(empty(B, 5, 300), *[empty(300)] * 2, 1e-6, empty(64, 300), None, False, empty(300, 64), None, 1.0)
    vector, fc1, fc2 = empty(32), empty(128, 32), empty(32, 128)
    projection_mlp_fwd(x, x, proj, None, 1.0, *norm, fc1, None, False, fc2, None, 1.0)
    floats = [vector.float() for _ in range(3)]
    y, pos_embed = empty(B, 8, 8, 32), empty(1, 1, 16, 32)
    outs = norm_pool_fwd(y, *floats, pos_embed, (4, 4), 1e-6, False, True)
    norm_pool_bwd(outs[0], y, *floats[:2], *outs[1:], (4, 4), False)
    weight = empty(32, 32, 3, 3)
    block_aggregate_fwd(empty(B, 4, 16, 32), weight, *floats, pos_embed, (2, 2), (4, 4), (4, 4), 1e-6, False, True)


def variants(stub):
    """Of each kernel for how many sorts of arguments it was compiled, and so many more with other batches."""
    compiled = {}
    for B in BATCHES:
        with stub.recording() as launches:
            batches(B)
        for launch in launches:
            compiled.setdefault(launch.name, {}).setdefault(B, set()).add(launch.compiled.hash)
    first = BATCHES[0]
    return {name: [len(of[first]), len(set.union(*of.values()) - of[first])] for name, of in compiled.items()}


# --- which candidate is taken -----------------------------------------------------------------------------------------


def chosen(stub, call, **device):
    """Which candidate ``call()`` takes on such a device; how many kernels were loaded to find out, and by a second
    call; or the error."""
    _launch.CHOSEN.clear()
    stub.become(ARCHITECTURE, **device)
    try:
        call()
        ((table, shape, _), config), loaded = next(iter(_launch.CHOSEN.items())), stub.device.functions
        call()
        return table(*shape, ARCHITECTURE).index(config), loaded, stub.device.functions - loaded
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        stub.become(ARCHITECTURE)


def choices(stub):
    def gradients(C):
        x, row = empty(1, 8, C), empty(1, 8, dtype=FP32)
        return lambda: add_layer_norm_bwd(None, x, x, row, row, None, empty(C), BF16, BF16, False)

    def attends(N, *candidates):
        q = empty(1, 1, N, 1, 16)
        configs = [_configs.AttentionConfig(tile, tile, warps, resident) for tile, warps, resident in candidates]

        def with_these():
            with mock.patch.object(_configs, "attention", table):
                return block_attention_fwd(q, q, q, None, None, 0.25)

        table = mock.Mock(return_value=configs, __name__="attention")
        return with_these

    one_fits, none_fits = attends(64, (64, 4, "keys"), (16, 1, None)), attends(64, (64, 2, "keys"), (32, 1, None))
    return {
        "the first is clean": chosen(stub, gradients(16)),
        "the first spills": chosen(stub, gradients(32), local_bytes=[16]),
        "all spill": chosen(stub, gradients(64), local_bytes=[32, 8, 16]),
        "the first does not compile": chosen(stub, attends(16, (8, 1, "keys"), (16, 2, "keys"))),
        "the first does not fit": chosen(stub, one_fits, shared_bytes=4096),
        "it does not fit again": chosen(stub, one_fits, shared_bytes=4096),
        "none fits": chosen(stub, none_fits, shared_bytes=64),
        "none fits again": chosen(stub, none_fits, shared_bytes=64),
    }


def main():
    rows = {}
    with stub_driver.stub(ARCHITECTURE) as stub:
        for name, make in CASES.items():
            differ = []
            with stub.recording() as launches, _launch.recorded(launched_again(stub, differ)):
                case = make()
            arrived = {value for launch in launches for value in launch.values}
            rows[name] = {
                "kernels": [launch.name for launch in launches],
                "grids": [launch.grid for launch in launches],
                "programs": case.programs,
                "again": differ,
                "wrong": [f"{launch.name}: {line}" for launch in launches for line in wrong_with(launch)],
                "shared": max(launch.shared for launch in launches),
                "unpromised": sum(unpromised(launch) for launch in launches),
                "missing": sum(x is not None and x.data_ptr() not in arrived for x in (*case.given, *case.returned)),
            }
        found, kernels = choices(stub), variants(stub)
    print(json.dumps({"cases": rows, "choices": found, "variants": kernels}))


if __name__ == "__main__":
    main()
