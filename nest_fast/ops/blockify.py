"""Between images and blocks: pixels change place, and a position embedding may be added on the way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _extension
from nest_fast.ops._backends import Backend
from nest_fast.ops._modes import ORDINARY
from nest_fast.ops._register import operation
from nest_fast.ops._vmap import fold, unfold

__all__ = ["blockify", "patchify", "unblockify"]

IMPLS = ("auto", "reference", "cpp", "cuda")
# The dtypes that the compiled kernels add; they move every dtype of 1 to 16 bytes.
_ADDED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# PyTorch is as fast or faster (measured) on a CPU below so many bytes where a gradient is recorded in Python;
_SMALL = 2**20
# and for plain copies where a gradient is recorded or a graph compiled, or above a cache's size.
_LARGE = 2**24


def blockify(
    x: Tensor, block_size: int | tuple[int, int], *, pos_embed: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Cut an image into blocks: ``(B, H, W, C)`` → ``(B, T, N, C)``, ``+ pos_embed``.

    Args:
        x: ``(B, H, W, C)`` of any dtype and strides; an image with channels first is passed as
            ``x.permute(0, 2, 3, 1)``, without a copy.
        block_size: height and width of a block in pixels, or one int for a square; has to divide H and W.
        pos_embed: ``(1, T, N, C)``, any floating-point dtype, added in the same pass; then ``x`` is fp64, fp32, fp16 or
            bf16, and the result of the dtype that PyTorch's promotion gives the sum.
        impl: "auto" takes the best this machine has for ``x``; that is "reference" too where it is as fast. "reference"
            is plain PyTorch, "cpp" the extension's CPU kernel, "cuda" its CUDA kernel: these never fall back.

    Returns:
        ``(B, T, N, C)``: T blocks of N pixels, both in row-major order. Contiguous, but a view of ``x`` where nothing
        has to move: where there is only one block, one column of blocks, or a block is one row.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/attn_utils.py`` (``block_images``); timm's ``blockify``.
    """
    _, H, W, C = _checks.tensor("x", x, "(B, H, W, C)").shape
    bh, bw = _checks.pair("block_size", block_size)
    _checks.divides("block_size", (bh, bw), (H, W), "image")
    gh, gw = H // bh, W // bw
    if pos_embed is not None:
        x, pos_embed = _check_pos_embed(x, pos_embed, (1, gh * gw, bh * bw, C))
    out = _run(_BLOCKIFY.op, impl, gw > 1 and bh > 1, x, (bh, bw), pos_embed)
    if out is None:
        out = reference.blockify(x, (bh, bw))
        return out if pos_embed is None else out + pos_embed
    return out


def unblockify(
    x: Tensor,
    grid_size: int | tuple[int, int],
    block_size: int | tuple[int, int] | None = None,
    *,
    pos_embed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put blocks back together, the inverse of :func:`blockify`: ``(B, T, N, C) + pos_embed`` → ``(B, H, W, C)``.

    Args:
        x: ``(B, T, N, C)`` of any dtype and strides.
        grid_size: height and width of the grid in blocks, or one int for a square; their product is T.
        block_size: height and width of a block; their product is N. May be left out where blocks are square.
        pos_embed: ``(1, T, N, C)``, any floating-point dtype, added in the same pass; then ``x`` is fp64, fp32, fp16 or
            bf16, and the result of the dtype that PyTorch's promotion gives the sum.
        impl: as for :func:`blockify`.

    Returns:
        ``(B, H, W, C)``, contiguous, but a view of ``x`` where nothing has to move.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/attn_utils.py`` (``unblock_images``); timm's ``deblockify``.
    """
    _checks.tensor("x", x, "(B, T, N, C)")
    (gh, gw), (bh, bw) = _checks.grid(x, grid_size, block_size)
    if pos_embed is not None:
        x, pos_embed = _check_pos_embed(x, pos_embed, (1, *x.shape[1:]))
    out = _run(_UNBLOCKIFY.op, impl, gw > 1 and bh > 1, x, (gh, gw), (bh, bw), pos_embed)
    if out is None:
        return reference.unblockify(x if pos_embed is None else x + pos_embed, (gh, gw), (bh, bw))
    return out


def patchify(
    x: Tensor, patch_size: int | tuple[int, int], block_size: int | tuple[int, int], *, impl: str = "auto"
) -> Tensor:
    """Cut an image into patches, already in block order: ``(B, C, H, W)`` → ``(B, T, N, C * ph * pw)``.

    A patch is flattened channel first, as a convolution weight ``(out, C, ph, pw)`` is, so the patch embedding of
    ``weight`` is ``linear(patchify(x, ...), weight.flatten(1))``, and the patches need no blockify.

    Args:
        x: ``(B, C, H, W)`` of any dtype and strides.
        patch_size: height and width of a patch in pixels, or one int for a square.
        block_size: height and width of a block in patches, or one int for a square.
        impl: as for :func:`blockify`.

    Returns:
        ``(B, T, N, C * ph * pw)``: T blocks of N patches, both in row-major order, contiguous.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (``PatchEmbedding``) and ``libml/attn_utils.py``
    (``block_images``).
    """
    _, _, H, W = _checks.tensor("x", x, "(B, C, H, W)").shape
    ph, pw = _checks.pair("patch_size", patch_size)
    bh, bw = _checks.pair("block_size", block_size)
    _checks.divides("patch_size", (ph, pw), (H, W), "image")
    _checks.divides("block_size", (bh, bw), (H // ph, W // pw), "grid of patches")
    out = _run(_PATCHIFY.op, impl, True, x, (ph, pw), (bh, bw))
    return reference.patchify(x, (ph, pw), (bh, bw)) if out is None else out


def _check_pos_embed(x: Tensor, pos_embed: Tensor, wanted: tuple) -> tuple[Tensor, Tensor]:
    """Both in one dtype, ``pos_embed`` contiguous, as the kernels take them."""
    _checks.tensor("pos_embed", pos_embed, "(1, T, N, C)")
    _checks.shape("pos_embed", pos_embed, wanted, "(1, T, N, C)")
    if x.dtype not in _ADDED:
        raise TypeError(f"x: expected float64, float32, float16 or bfloat16 to add pos_embed to, got {x.dtype}")
    _checks.promotes("pos_embed", pos_embed, "x", x)
    if x.dtype != pos_embed.dtype:
        dtype = torch.promote_types(x.dtype, pos_embed.dtype)
        x, pos_embed = x.to(dtype), pos_embed.to(dtype)
    return x, pos_embed.contiguous()


# --- choice -----------------------------------------------------------------------------------------------------------


def _kernels(name: str, kind: str) -> Backend:
    """The compiled kernels for a ``kind`` of device."""
    return Backend(
        name,
        (
            *_backends.PLAIN,
            ("x is on {given[0].device}", lambda given: given[0].device.type != kind),
            (lambda given: str(_missing(given[0])), lambda given: given[0].device.type == kind and _missing(given[0])),
        ),
    )


def _missing(x: Tensor) -> str | None:
    """Why no compiled kernel is there for x's device."""
    if x.is_cpu:
        return _extension.cpu_error
    return _extension.cuda_why_not(x.get_device()) if x.is_cuda else f"x is on {x.device}"


BACKENDS = {"cpp": _kernels("cpp", "cpu"), "cuda": _kernels("cuda", "cuda")}


def _run(op: torch._ops.OpOverload, impl: str, moves: bool, x: Tensor, *args: object) -> Tensor | None:
    """``op(x, *args)``, or None where plain PyTorch is to compute it; an ``impl`` that cannot run is an error.

    ``moves``: whether any pixel changes place; else the result is a view. Written out in one function: the kernel
    evicts Python's code from the cache, and each function that the next call needs costs some µs (measured).
    """
    if impl == "reference":
        return None
    eager = not is_compiling()
    functorch = eager and torch._C._are_functorch_transforms_active()
    recorded = eager and torch.is_grad_enabled() and torch._C._any_requires_grad(x, *args)
    if impl == "auto":
        if functorch or (not eager and torch.onnx.is_in_onnx_export()):
            return None
        if _missing(x) is not None:
            _backends.say_missing(x)
            return None
        # _modes.needs_plain, written out
        if eager and (
            forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
            or not ORDINARY.issuperset(map(type, (x, *args)))
        ):
            return None
        if x.is_cpu:
            plain = args[-1] is None and x.stride(-1) == 1  # patchify ends with a size
            nbytes = x.numel() * x.itemsize  # also of a size that is traced, unlike x.nbytes
            if (plain and (recorded or not eager or nbytes >= _LARGE)) or (recorded and nbytes < _SMALL):
                return None
    else:
        _checks.choice("impl", impl, IMPLS)
        BACKENDS[impl].require(op.overloadpacket.__name__, (x, *args))
    if not moves:
        return None
    if not eager or functorch or recorded:
        return op(x, *args)
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python that records gradients, half of a call's time
        return op(x, *args)


# --- registration -----------------------------------------------------------------------------------------------------


def pos_embed_gradient(dout: Tensor) -> Tensor:
    """The gradient of a ``(1, T, N, C)`` added to every image, from ``dout`` ``(B, T, N, C)``."""
    return dout.sum_to_size(1, *dout.shape[1:])


def _blockify_fake(x, block_size, pos_embed):
    B, H, W, C = x.shape
    bh, bw = block_size
    return x.new_empty((B, (H // bh) * (W // bw), bh * bw, C))


def _unblockify_fake(x, grid_size, block_size, pos_embed):
    return x.new_empty((x.shape[0], grid_size[0] * block_size[0], grid_size[1] * block_size[1], x.shape[3]))


def _patchify_fake(x, patch_size, block_size):
    B, C, H, W = x.shape
    (ph, pw), (bh, bw) = patch_size, block_size
    return x.new_empty((B, (H // (ph * bh)) * (W // (pw * bw)), bh * bw, C * ph * pw))


def _unpatchify_fake(x, patch_size, grid_size, block_size):
    (ph, pw), (gh, gw), (bh, bw) = patch_size, grid_size, block_size
    return x.new_empty((x.shape[0], x.shape[3] // (ph * pw), gh * bh * ph, gw * bw * pw))


def _blockify_gradients(kept, dout):
    (_, H, W, _), (bh, bw) = kept.shapes["x"], kept.block_size
    dx = _UNBLOCKIFY(dout, (H // bh, W // bw), (bh, bw), None) if kept.needed["x"] else None
    return {"x": dx, "pos_embed": pos_embed_gradient(dout) if kept.needed["pos_embed"] else None}


def _unblockify_gradients(kept, dout):
    dx = _BLOCKIFY(dout, kept.block_size, None)
    return {"x": dx, "pos_embed": pos_embed_gradient(dx) if kept.needed["pos_embed"] else None}


def _patchify_gradients(kept, dout):
    (_, _, H, W), (ph, pw), (bh, bw) = kept.shapes["x"], kept.patch_size, kept.block_size
    return {"x": _UNPATCHIFY(dout, (ph, pw), (H // (ph * bh), W // (pw * bw)), (bh, bw))}


def _unpatchify_gradients(kept, dout):
    return {"x": _PATCHIFY(dout, kept.patch_size, kept.block_size)}


def _blockify_vmap(info, in_dims, x, block_size, pos_embed):
    shared = None if in_dims[2] is not None else pos_embed
    out = unfold(_BLOCKIFY(fold(x, in_dims[0], info.batch_size), block_size, shared), info.batch_size)
    return out if in_dims[2] is None else out + pos_embed.movedim(in_dims[2], 0), 0


def _unblockify_vmap(info, in_dims, x, grid_size, block_size, pos_embed):
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[3] is not None:
        x, pos_embed = x + pos_embed.movedim(in_dims[3], 0), None
    return unfold(_UNBLOCKIFY(x.flatten(0, 1), grid_size, block_size, pos_embed), info.batch_size), 0


def _patchify_vmap(info, in_dims, x, *sizes):
    return unfold(_PATCHIFY(fold(x, in_dims[0], info.batch_size), *sizes), info.batch_size), 0


def _unpatchify_vmap(info, in_dims, x, *sizes):
    return unfold(_UNPATCHIFY(fold(x, in_dims[0], info.batch_size), *sizes), info.batch_size), 0


_BLOCKIFY = operation(
    "blockify(Tensor x, SymInt[2] block_size, Tensor? pos_embed) -> Tensor",
    fake=_blockify_fake,
    gradients=_blockify_gradients,
    vmap=_blockify_vmap,
)
_UNBLOCKIFY = operation(
    "unblockify(Tensor x, SymInt[2] grid_size, SymInt[2] block_size, Tensor? pos_embed) -> Tensor",
    fake=_unblockify_fake,
    gradients=_unblockify_gradients,
    vmap=_unblockify_vmap,
)
_PATCHIFY = operation(
    "patchify(Tensor x, SymInt[2] patch_size, SymInt[2] block_size) -> Tensor",
    fake=_patchify_fake,
    gradients=_patchify_gradients,
    vmap=_patchify_vmap,
)
_UNPATCHIFY = operation(
    "unpatchify(Tensor x, SymInt[2] patch_size, SymInt[2] grid_size, SymInt[2] block_size) -> Tensor",
    fake=_unpatchify_fake,
    gradients=_unpatchify_gradients,
    vmap=_unpatchify_vmap,
)
