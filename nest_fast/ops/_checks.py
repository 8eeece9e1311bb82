"""Argument checks shared by the operations. Every error is one line: the argument, what was wanted, what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def pair(name: str, size: object) -> tuple[int, int]:
    """Height and width from an int or a pair of ints, both positive."""
    if type(size) is int and size > 0:
        return size, size
    # A traced size is a SymInt, which is no int but compares and divides like one.
    ints = (int, torch.SymInt)
    height, width = (size, size) if isinstance(size, ints) else _two(name, size)
    for value in (height, width):
        if isinstance(value, bool) or not isinstance(value, ints):
            raise TypeError(f"{name}: wanted an int or a pair of ints, got {size!r}")
    if height < 1 or width < 1:
        raise ValueError(f"{name}: wanted positive sizes, got {size!r}")
    return height, width


def _two(name: str, size: object) -> tuple:
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise TypeError(f"{name}: wanted an int or a pair of ints, got {size!r}")
    return tuple(size)


def tensor(name: str, x: object, shape: str) -> Tensor:
    """``x`` as a tensor whose rank is that of ``shape``, a text like "(B, H, W, C)"."""
    rank = shape.count(",") + 1
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a tensor {shape}, got {type(x).__name__}")
    if x.dim() != rank:
        raise ValueError(f"{name}: wanted {rank} dimensions {shape}, got shape {tuple(x.shape)}")
    return x


def floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: wanted a floating-point dtype, got {x.dtype}")


def shape(name: str, x: Tensor, wanted: tuple, meaning: str = "") -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name}: wanted shape {wanted}{meaning and ' ' + meaning}, got {tuple(x.shape)}")


def alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` on the device and of the dtype of ``other``; under autocast dtypes may differ, since it casts them."""
    device(name, x, other_name, other)
    if x.dtype != other.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: wanted dtype {other.dtype} as {other_name} has, got {x.dtype}")


def parameters(x: Tensor, weights: dict[str, tuple[Tensor | None, tuple]], optional: tuple[str, ...]) -> None:
    """Each of ``weights``, given with the shape wanted, on the device and of the dtype of ``x``."""
    floating("x", x)
    for name, (weight, wanted) in weights.items():
        if weight is not None or name not in optional:
            tensor(name, weight, f"({', '.join(map(str, wanted))})")
            shape(name, weight, wanted)  # type: ignore[arg-type]
            alike(name, weight, "x", x)  # type: ignore[arg-type]


def choice(name: str, value: object, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: wanted one of {', '.join(map(repr, wanted))}, got {value!r}")


def divides(name: str, divisor: tuple[int, int], size: tuple[int, int], what: str) -> None:
    if size[0] % divisor[0] or size[1] % divisor[1]:
        raise ValueError(f"{name}: wanted {divisor} to divide the {what} {tuple(size)}, got a remainder")


def grid(x: Tensor, grid_size: object, block_size: object) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block sizes of ``x`` ``(B, T, N, C)``, both agreeing with its T and N."""
    T, N = x.shape[1], x.shape[2]
    gh, gw = pair("grid_size", grid_size)
    if gh * gw != T:
        raise ValueError(f"grid_size: wanted height * width = T = {T} blocks, got ({gh}, {gw})")
    if block_size is None:
        edge = math.isqrt(N)
        if edge * edge != N:
            raise ValueError(f"block_size: wanted height and width, since N = {N} is no square, got None")
        return (gh, gw), (edge, edge)
    bh, bw = pair("block_size", block_size)
    if bh * bw != N:
        raise ValueError(f"block_size: wanted height * width = N = {N} tokens, got ({bh}, {bw})")
    return (gh, gw), (bh, bw)


def device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: wanted device {other.device} as {other_name} has, got {x.device}")


def no_double_backward(op: str) -> Callable[..., NoReturn]:
    """The backward of a kernel that is the backward of ``op``: what it would need the forward did not keep."""

    def backward(ctx, *grads):
        raise RuntimeError(f"impl: wanted 'reference' for a derivative of {op}'s gradients, got a kernel")

    return backward


def training(given: bool) -> None:
    """An error where the forward was not told that a gradient would be asked for, and kept nothing for it."""
    if not given:
        raise RuntimeError("training: wanted True in the forward whose gradient is asked for, got False")


def in_functorch() -> bool:
    """Whether ``torch.func`` is transforming: its gradients cannot pass through a registered operation."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are on: a registered operation would lose them without a word."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def onnx_why_not() -> list[str]:
    """Why no kernel may be chosen while ``torch.onnx.export`` traces."""
    exporting = torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
    return ["ONNX has PyTorch's operations only"] if exporting else []


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast, where it is on, gives the matmuls of ``x``'s device."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def dense_rows(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()
