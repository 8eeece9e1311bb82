"""Between images and blocks: pixels change place, and a position embedding may be added on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks, _extension
from nest_fast.ops._vmap import fold, unfold

__all__ = ["blockify", "patchify", "unblockify"]

IMPLS = ("auto", "reference", "cpp", "cuda")
# What the compiled kernels add; they move every dtype of 1 to 16 bytes.
_ADDED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_LIB = torch.library.Library("nest_fast", "FRAGMENT")
_LIB.define("blockify(Tensor x, SymInt[2] block_size, Tensor? pos_embed) -> Tensor")
_LIB.define("unblockify(Tensor x, SymInt[2] grid_size, SymInt[2] block_size, Tensor? pos_embed) -> Tensor")
_LIB.define("patchify(Tensor x, SymInt[2] patch_size, SymInt[2] block_size) -> Tensor")
_LIB.define("unpatchify(Tensor x, SymInt[2] patch_size, SymInt[2] grid_size, SymInt[2] block_size) -> Tensor")
_OPS = torch.ops.nest_fast


def blockify(
    x: Tensor, block_size: int | tuple[int, int], *, pos_embed: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Cut an image into blocks: ``(B, H, W, C)`` → ``(B, T, N, C)``, ``+ pos_embed``.

    Args:
        x: ``(B, H, W, C)`` of any dtype and strides; an image with channels first is passed as
            ``x.permute(0, 2, 3, 1)``, without a copy.
        block_size: height and width of a block in pixels, or one int for a square; has to divide H and W.
        pos_embed: ``(1, T, N, C)``, added in the same pass; then ``x`` is fp64, fp32, fp16 or bf16.
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
    x, pos_embed = _check_pos_embed(x, pos_embed, (1, gh * gw, bh * bw, C))
    if _compiled("blockify", impl, x, plain=pos_embed is None and x.stride(-1) == 1) and gw > 1 and bh > 1:
        return _OPS.blockify(x, (bh, bw), pos_embed)
    out = reference.blockify(x, (bh, bw))
    return out if pos_embed is None else out + pos_embed


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
        pos_embed: ``(1, T, N, C)``, added in the same pass; then ``x`` is fp64, fp32, fp16 or bf16.
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
    x, pos_embed = _check_pos_embed(x, pos_embed, (1, *x.shape[1:]))
    if _compiled("unblockify", impl, x, plain=pos_embed is None and x.stride(-1) == 1) and gw > 1 and bh > 1:
        return _OPS.unblockify(x, (gh, gw), (bh, bw), pos_embed)
    return reference.unblockify(x if pos_embed is None else x + pos_embed, (gh, gw), (bh, bw))


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
    if _compiled("patchify", impl, x):
        return _OPS.patchify(x, (ph, pw), (bh, bw))
    return reference.patchify(x, (ph, pw), (bh, bw))


def _check_pos_embed(x: Tensor, pos_embed: Tensor | None, wanted: tuple) -> tuple[Tensor, Tensor | None]:
    """Both in one dtype, ``pos_embed`` contiguous, as the kernels take them."""
    if pos_embed is None:
        return x, None
    _checks.tensor("pos_embed", pos_embed, "(1, T, N, C)")
    _checks.shape("pos_embed", pos_embed, wanted, "(1, T, N, C)")
    _checks.alike("pos_embed", pos_embed, "x", x)
    if x.dtype not in _ADDED:
        raise TypeError(f"x: wanted float64, float32, float16 or bfloat16 to add pos_embed to, got {x.dtype}")
    if x.dtype != pos_embed.dtype:  # under autocast
        dtype = torch.promote_types(x.dtype, pos_embed.dtype)
        x, pos_embed = x.to(dtype), pos_embed.to(dtype)
    return x, pos_embed.contiguous()


def _compiled(op: str, impl: str, x: Tensor, *, plain: bool = False) -> bool:
    """Whether a compiled kernel takes ``x``; an ``impl`` that cannot is an error.

    ``plain``: long runs are copied and nothing is added. On a CPU PyTorch does that as fast (measured).
    """
    _checks.choice("impl", impl, IMPLS)
    if impl == "reference":
        return False
    kind = x.device.type
    error = {"cpu": _extension.cpu_error, "cuda": _extension.cuda_error}.get(kind, f"there is no kernel for {kind}")
    if impl == "auto":
        return error is None and not _checks.in_functorch() and not (kind == "cpu" and (plain or _is_small(x)))
    if kind != {"cpp": "cpu", "cuda": "cuda"}[impl]:
        error = f"x is on {x.device}"
    if error is not None:
        raise RuntimeError(f"impl: {impl!r} cannot run {op} here: {error}")
    return True


def _is_small(x: Tensor) -> bool:
    """Where a custom operation's few µs per call are more than it saves over PyTorch's passes (measured)."""
    return not torch.compiler.is_compiling() and x.nbytes < 2**15


# --- registration; the kernels themselves are csrc/blockify_cpu.cpp and csrc/blockify_cuda.cu -------------------------


@torch.library.register_fake("nest_fast::blockify", lib=_LIB)
def _blockify_fake(x, block_size, pos_embed):
    B, H, W, C = x.shape
    bh, bw = block_size
    return x.new_empty((B, (H // bh) * (W // bw), bh * bw, C))


@torch.library.register_fake("nest_fast::unblockify", lib=_LIB)
def _unblockify_fake(x, grid_size, block_size, pos_embed):
    return x.new_empty((x.shape[0], grid_size[0] * block_size[0], grid_size[1] * block_size[1], x.shape[3]))


@torch.library.register_fake("nest_fast::patchify", lib=_LIB)
def _patchify_fake(x, patch_size, block_size):
    B, C, H, W = x.shape
    (ph, pw), (bh, bw) = patch_size, block_size
    return x.new_empty((B, (H // (ph * bh)) * (W // (pw * bw)), bh * bw, C * ph * pw))


@torch.library.register_fake("nest_fast::unpatchify", lib=_LIB)
def _unpatchify_fake(x, patch_size, grid_size, block_size):
    (ph, pw), (gh, gw), (bh, bw) = patch_size, grid_size, block_size
    return x.new_empty((x.shape[0], x.shape[3] // (ph * pw), gh * bh * ph, gw * bw * pw))


def _blockify_setup(ctx, inputs, output):
    x, (bh, bw), _ = inputs
    ctx.grid_size, ctx.block_size = (x.shape[1] // bh, x.shape[2] // bw), (bh, bw)


def _blockify_bwd(ctx, dout):
    dx = _OPS.unblockify(dout, ctx.grid_size, ctx.block_size, None) if ctx.needs_input_grad[0] else None
    dpos_embed = dout.sum_to_size(1, *dout.shape[1:]) if ctx.needs_input_grad[2] else None
    return dx, None, dpos_embed


def _unblockify_setup(ctx, inputs, output):
    ctx.block_size = inputs[2]


def _unblockify_bwd(ctx, dout):
    dx = _OPS.blockify(dout, ctx.block_size, None)
    dpos_embed = dx.sum_to_size(1, *dx.shape[1:]) if ctx.needs_input_grad[3] else None
    return dx, None, None, dpos_embed


def _patchify_setup(ctx, inputs, output):
    x, (ph, pw), (bh, bw) = inputs
    ctx.sizes = (ph, pw), (x.shape[2] // (ph * bh), x.shape[3] // (pw * bw)), (bh, bw)


def _patchify_bwd(ctx, dout):
    return _OPS.unpatchify(dout, *ctx.sizes), None, None


def _unpatchify_setup(ctx, inputs, output):
    ctx.patch_size, ctx.block_size = inputs[1], inputs[3]


def _unpatchify_bwd(ctx, dout):
    return _OPS.patchify(dout, ctx.patch_size, ctx.block_size), None, None, None


def _blockify_vmap(info, in_dims, x, block_size, pos_embed):
    shared = None if in_dims[2] is not None else pos_embed
    out = unfold(_OPS.blockify(fold(x, in_dims[0], info.batch_size), block_size, shared), info.batch_size)
    return out if in_dims[2] is None else out + pos_embed.movedim(in_dims[2], 0), 0


def _unblockify_vmap(info, in_dims, x, grid_size, block_size, pos_embed):
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[3] is not None:
        x, pos_embed = x + pos_embed.movedim(in_dims[3], 0), None
    return unfold(_OPS.unblockify(x.flatten(0, 1), grid_size, block_size, pos_embed), info.batch_size), 0


def _patchify_vmap(info, in_dims, x, *sizes):
    return unfold(_OPS.patchify(fold(x, in_dims[0], info.batch_size), *sizes), info.batch_size), 0


def _unpatchify_vmap(info, in_dims, x, *sizes):
    return unfold(_OPS.unpatchify(fold(x, in_dims[0], info.batch_size), *sizes), info.batch_size), 0


for _name, _bwd, _setup, _vmap in (
    ("blockify", _blockify_bwd, _blockify_setup, _blockify_vmap),
    ("unblockify", _unblockify_bwd, _unblockify_setup, _unblockify_vmap),
    ("patchify", _patchify_bwd, _patchify_setup, _patchify_vmap),
    ("unpatchify", _unpatchify_bwd, _unpatchify_setup, _unpatchify_vmap),
):
    torch.library.register_autograd(f"nest_fast::{_name}", _bwd, setup_context=_setup, lib=_LIB)
    torch.library.register_vmap(f"nest_fast::{_name}", _vmap, lib=_LIB)
