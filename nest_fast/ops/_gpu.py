"""What a GPU, and the software for it on this machine, can run. Asked once; a compiler that traces takes the answer."""

from __future__ import annotations

import functools

import torch

__all__ = ["capability", "launch_error"]


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, such as (9, 0)."""
    return _capability(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # Without a GPU it is a fake tensor's, of a program for another machine.
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def launch_error() -> str:
    """Why Triton cannot launch kernels on this machine's GPUs, in a line; empty if it can."""
    return _launch_error()


# Dynamo calls them and keeps the answers; torch.compiler.assume_constant_result marks them so, too, but imports Dynamo.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
launch_error._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _launch_error() -> str:
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, and this torch is built for AMD's"
    try:
        from triton.runtime import driver

        # Triton compiles its launcher here: that needs a C compiler and Python.h, which images for serving often lack.
        driver.active.utils  # noqa: B018
    except Exception as error:  # whatever a compiler, a linker or a driver may say
        return f"Triton cannot launch here: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""
