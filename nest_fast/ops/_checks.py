"""Argument checks shared by the operations. Every error is one line: the argument, what was expected, what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from nest_fast.ops import _modes
from nest_fast.reference import Windows

HALVES = (torch.float16, torch.bfloat16)


def pair(name: str, size: object, least: int = 1) -> tuple[int, int]:
    """Height and width from an int or a pair of ints, both ``least``, 1 or 0, or more."""
    if type(size) is int and size >= least:
        return size, size
    if _modes.in_trace():
        size = _traced(size)
    # A size that torch.compile traces is a SymInt, which is no int but compares and divides like one.
    ints = (int, torch.SymInt)
    height, width = (size, size) if isinstance(size, ints) else _two(name, size)
    for value in (height, width):
        if isinstance(value, bool) or not isinstance(value, ints):
            raise TypeError(f"{name}: expected an int or a pair of ints, got {size!r}")
    if height < least or width < least:
        raise ValueError(f"{name}: expected {'positive' if least else 'no negative'} sizes, got {size!r}")
    return height, width


def _two(name: str, size: object) -> tuple:
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise TypeError(f"{name}: expected an int or a pair of ints, got {size!r}")
    return tuple(size)


def _traced(size: object) -> object:
    """``size`` with ints, constants of the graph, for the 0-d tensors that ``torch.jit.trace`` makes of sizes."""
    if isinstance(size, Tensor) and size.dim() == 0:
        return int(size)
    return tuple(map(_traced, size)) if isinstance(size, (tuple, list)) else size


def is_tensor(name: str, x: object, shape: str) -> Tensor:
    """``x``, which ``shape`` describes, as a tensor of any rank."""
    if isinstance(x, Tensor):
        return x
    fx = sys.modules.get("torch.fx")
    if fx is not None and isinstance(x, fx.Proxy):
        raise TypeError(
            f"{name}: expected a tensor {shape}, got a Proxy: torch.fx cannot trace into the operations, but into"
            " plain PyTorch, which nest_fast.restore(model) gives back and nest_fast.reference has"
        )
    raise TypeError(f"{name}: expected a tensor {shape}, got {type(x).__name__}")


def tensor(name: str, x: object, shape: str) -> Tensor:
    """``x`` as a tensor whose rank is that of ``shape``, a text like "(B, H, W, C)"."""
    rank = shape.count(",") + 1
    x = is_tensor(name, x, shape)
    if x.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {shape}, got shape {tuple(x.shape)}")
    return x


def floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")


def floating_dtype(name: str, dtype: object) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}: expected a floating-point dtype or None, got {dtype!r}")


def shape(name: str, x: Tensor, expected: tuple, meaning: str = "") -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}{meaning and ' ' + meaning}, got {tuple(x.shape)}")


def alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` on the device and of the dtype of ``other``; under autocast dtypes may differ, since it casts them."""
    device(name, x, other_name, other)
    if x.dtype != other.dtype and not _modes.under_autocast(x):
        raise TypeError(f"{name}: expected dtype {other.dtype} as {other_name} has, got {x.dtype}")


def promotes(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` on the device of ``other`` and of any floating-point dtype: PyTorch's promotion gives the sum's."""
    floating(name, x)
    device(name, x, other_name, other)


def norm(weight: Tensor, bias: Tensor, x: Tensor, prefix: str = "", dtype: torch.dtype | None = None) -> None:
    """A LayerNorm's parameters on the device of ``x`` and of dtypes that ``F.layer_norm`` takes beside its ``dtype``.

    That is the same one, or float32 for both beside float16 and bfloat16.
    """
    dtype = x.dtype if dtype is None else dtype
    for name, value in ((prefix + "weight", weight), (prefix + "bias", bias)):
        device(name, value, "x", x)
        if value.dtype == dtype or _modes.under_autocast(x):
            continue
        if dtype not in HALVES:
            raise TypeError(f"{name}: expected dtype {dtype} as x has, got {value.dtype}")
        if not weight.dtype == bias.dtype == torch.float32:
            both = f"{dtype} as x has, or torch.float32 for {prefix}weight and {prefix}bias"
            raise TypeError(f"{name}: expected dtype {both}, got {value.dtype}")


def parameters(x: Tensor, weights: dict[str, tuple[Tensor | None, tuple]], optional: tuple[str, ...]) -> None:
    """Each of ``weights``, given with the shape expected, on the device of ``x`` and of a dtype that goes with it.

    The first two are the weight and bias of the LayerNorm.
    """
    floating("x", x)
    for name, (weight, expected) in weights.items():
        if weight is None and name in optional:
            continue
        if not (isinstance(weight, Tensor) and weight.shape == expected):  # words cost more than all that is right
            shape(name, tensor(name, weight, f"({', '.join(map(str, expected))})"), expected)
        if not name.startswith("norm_"):
            alike(name, weight, "x", x)  # type: ignore[arg-type]
    norm(weights["norm_weight"][0], weights["norm_bias"][0], x, "norm_")  # type: ignore[arg-type]


def choice(name: str, value: object, expected: tuple[object, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, expected))}, got {value!r}")


def divides(name: str, divisor: tuple[int, int], size: tuple[int, int], what: str) -> None:
    if size[0] % divisor[0] or size[1] % divisor[1]:
        raise ValueError(f"{name}: expected {divisor} to divide the {what} {tuple(size)}, got a remainder")


def grid(x: Tensor, grid_size: object, block_size: object) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block sizes of ``x`` ``(B, T, N, C)``, both agreeing with its T and N."""
    T, N = x.shape[1], x.shape[2]
    gh, gw = pair("grid_size", grid_size)
    if gh * gw != T:
        raise ValueError(f"grid_size: expected height * width = T = {T} blocks, got ({gh}, {gw})")
    if block_size is None:
        edge = math.isqrt(N)
        if edge * edge != N:
            raise ValueError(f"block_size: expected height and width, since N = {N} is no square, got None")
        return (gh, gw), (edge, edge)
    bh, bw = pair("block_size", block_size)
    if bh * bw != N:
        raise ValueError(f"block_size: expected height * width = N = {N} tokens, got ({bh}, {bw})")
    return (gh, gw), (bh, bw)


def device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name} has, got {x.device}")


def added_to_scores(
    bias: Tensor | None, mask: Tensor | None, sizes: tuple[int, int, int], other_name: str, other: Tensor
) -> None:
    """An attention's ``bias`` and ``mask`` for (blocks T, heads, tokens N), on the device of ``other``."""
    T, heads, N = sizes
    if bias is not None:
        tensor("bias", bias, "(heads, N, N)")
        shape("bias", bias, (heads, N, N), "(heads, N, N)")
        promotes("bias", bias, other_name, other)
    if mask is not None:
        groups = tensor("mask", mask, "(groups, N, N)").shape[0]
        shape("mask", mask, (groups, N, N), "(groups, N, N)")
        if mask.dtype != torch.bool:
            floating("mask", mask)
        if groups == 0 or T % groups:
            raise ValueError(f"mask: expected a number of groups that divides T = {T}, got {groups}")
        device("mask", mask, other_name, other)


def scale(value: object, cosine: bool, heads: int, other_name: str, other: Tensor) -> None:
    """The factor of an attention's scores: a number or None, or of cosines a tensor with one for each head."""
    if cosine:
        factors = is_tensor("scale", value, "(heads,)")
        shape("scale", factors, (heads,), "(heads,)")
        alike("scale", factors, other_name, other)
    else:
        number("scale", value)


def branch_scale(value: object, x: Tensor) -> None:
    """The factor of a sub-layer's branch: a number, or a tensor with one for each sample of ``x``."""
    if isinstance(value, Tensor) and value.dim() == 1:
        shape("branch_scale", value, (x.shape[0],), "(B,)")
        alike("branch_scale", value, "x", x)
    else:
        number("branch_scale", value)


def cut(name: str, windows: object, rows: int) -> tuple[int, int]:
    """T and N of ``windows`` of an image of so many ``rows``, which ``name`` has."""
    if not isinstance(windows, Windows):
        raise TypeError(f"windows: expected what nest_fast.windows returns, got {type(windows).__name__}")
    if rows != windows.rows:
        raise ValueError(f"windows: expected an image of {rows} tokens as {name} has, got size {windows.size}")
    return windows.blocks, windows.tokens


def training(given: bool) -> None:
    """An error where the forward was called with ``training=False`` and so kept nothing for a gradient."""
    if not given:
        raise RuntimeError("training: expected True in the forward whose gradient is asked for, got False")


def number(name: str, value: object) -> None:
    """An error for a tensor, whose gradient would be lost silently."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, which has no gradient, got a tensor {tuple(value.shape)}")
