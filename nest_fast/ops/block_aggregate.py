"""Block aggregation: conv 3x3 → LayerNorm → max-pool 3x3 with stride 2, the only place where NesT's blocks talk."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _backends, _checks, _extension, _gpu, _layout, _modes, _packed, _tuned
from nest_fast.ops import _flops as flops
from nest_fast.ops._backends import Backend
from nest_fast.ops._register import operation
from nest_fast.ops.blockify import blockify, pos_embed_gradient, unblockify

__all__ = ["block_aggregate"]

IMPLS = ("auto", "reference", "triton", "two_step", "cpp")
Size2 = tuple[int, int]


@_tuned.tunable
def block_aggregate(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    grid_size: int | tuple[int, int] | None = None,
    block_size: int | tuple[int, int] | None = None,
    eps: float = 1e-6,
    padding: str = "symmetric",
    pos_embed: Tensor | None = None,
    packed: _packed.Packed | None = None,
    impl: str = "auto",
) -> Tensor:
    """``max_pool(layer_norm(conv3x3(x))) + pos_embed`` on blocks, or on an image: four blocks become one.

    Args:
        x: ``(B, T, N, C)`` blocks if ``grid_size`` is given, else an image ``(B, H, W, C)``.
        conv_weight: ``(C', C, 3, 3)``; the convolution pads one zero pixel on every side.
        conv_bias: ``(C',)`` or None.
        norm_weight, norm_bias: ``(C',)``, the LayerNorm over channels, of x's dtype, or both float32 beside float16 and
            bfloat16.
        grid_size: height and width of the grid of blocks, both even; an int for a square.
        block_size: height and width of a block in tokens; may be left out where blocks are square.
        eps: added to the variance.
        padding: of the max-pool: "symmetric", one pixel on every side (PyTorch, timm), or "same", one pixel right
            and below (the authors, timm's ``_jx`` models). Padding never wins the maximum.
        pos_embed: ``(1, T/4, N, C')`` added to blocks, or ``(1, H/2, W/2, C')`` to an image, or None. Any
            floating-point dtype; the result's is what PyTorch's promotion gives the sum.
        packed: where "cpp" keeps its transformed filters: a dict, empty at first, given again with the same weight
            only, and without gradients. None: they are transformed in every call.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch on channels-last
            memory. "two_step" is the library's convolution, then one kernel for all the rest: the extension's on a
            CPU, Triton's on a GPU (and on CPU tensors under ``TRITON_INTERPRET=1`` if there is no extension). "cpp" is
            one kernel for everything, on a CPU, its convolution by Winograd's algorithm; "triton" is one for everything
            on a GPU, C' at most 512, float32 in TF32 where torch's convolutions are. Only "auto" may choose.

    Returns:
        ``(B, T/4, N, C')``, or ``(B, H/2, W/2, C')`` of an image.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.
        RuntimeError: ``impl`` names one that cannot run here; the message says why.

    Source: the authors' ``libml/self_attention.py`` (ConvPool); timm's ``ConvPool``.
    """
    given = Given(x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed)
    sizes = _check(given, grid_size, block_size, padding, impl)
    _packed.check(packed, given)
    if impl == "auto":
        impl = choose(given)
    elif impl in BACKENDS:
        BACKENDS[impl].require("block_aggregate", given)
    if impl == "reference":
        grid_size, block_size = sizes or (None, None)
        return reference.block_aggregate(
            x,
            conv_weight,
            conv_bias,
            norm_weight,
            norm_bias,
            grid_size=grid_size,
            block_size=block_size,
            eps=eps,
            padding=padding,
            pos_embed=pos_embed,
        )
    return _run(impl, given, sizes, eps, padding == "same", packed)


def _check(given: Given, grid_size: object, block_size: object, padding: str, impl: str) -> tuple[Size2, Size2] | None:
    """Grid and block sizes of blocks, None of an image."""
    x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed = given
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("padding", padding, ("symmetric", "same"))
    sizes = _check_image(x, grid_size, block_size)
    _check_parameters(x, conv_weight, conv_bias, norm_weight, norm_bias)
    if pos_embed is not None:
        half = (x.shape[1] // 4, x.shape[2]) if sizes else (x.shape[1] // 2, x.shape[2] // 2)
        _checks.tensor("pos_embed", pos_embed, "(1, T/4, N, C')")
        _checks.shape("pos_embed", pos_embed, (1, *half, conv_weight.shape[0]), f"for x of shape {tuple(x.shape)}")
        _checks.promotes("pos_embed", pos_embed, "x", x)
    return sizes


def _check_image(x: Tensor, grid_size: object, block_size: object) -> tuple[Size2, Size2] | None:
    """Grid and block sizes of blocks, None of an image."""
    if grid_size is None:
        _checks.tensor("x", x, "(B, H, W, C)")
        _checks.floating("x", x)
        if block_size is not None:
            raise ValueError(f"block_size: expected None for an image (grid_size=None), got {block_size!r}")
        if x.shape[1] % 2 or x.shape[2] % 2:
            raise ValueError(f"x: expected an even height and width, got shape {tuple(x.shape)}")
        return None
    _checks.tensor("x", x, "(B, T, N, C)")
    _checks.floating("x", x)
    (gh, gw), block = _checks.grid(x, grid_size, block_size)
    if gh % 2 or gw % 2:
        raise ValueError(
            f"grid_size: expected an even height and width, since 2 x 2 blocks become one, got ({gh}, {gw})"
        )
    return (gh, gw), block


def _check_parameters(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor
) -> None:
    out_channels = _checks.tensor("conv_weight", conv_weight, "(C', C, 3, 3)").shape[0]
    _checks.shape("conv_weight", conv_weight, (out_channels, x.shape[3], 3, 3), "(C', C, 3, 3)")
    _checks.alike("conv_weight", conv_weight, "x", x)
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    if conv_bias is not None:
        vectors["conv_bias"] = conv_bias
    for name, value in vectors.items():
        _checks.tensor(name, value, "(C')")
        _checks.shape(name, value, (out_channels,), "(C',)")
    _checks.norm(norm_weight, norm_bias, x, "norm_")
    if conv_bias is not None:
        _checks.alike("conv_bias", conv_bias, "x", x)


# --- choice -----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    x: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    pos_embed: Tensor | None


def _triton(rules: _backends.Rules, most: int) -> _backends.Rules:
    """``rules``, and those of a Triton kernel for so many channels of its output."""
    return (
        *rules,
        (
            lambda given: f"C' = {given.conv_weight.shape[0]} channels are over {most}",
            lambda given: given.conv_weight.shape[0] > most,
        ),
    )


_NORM_POOL_TRITON = Backend("triton", _triton(_backends.TRITON, 1024))


def _is_interpreted(given: Given) -> bool:
    return given.x.device.type == "cpu" and _NORM_POOL_TRITON.can(given)


BACKENDS = {
    "cpp": Backend("cpp", _backends.CPP),
    "triton": Backend("triton", _triton(_backends.TRITON_MATMUL, 512)),
    "two_step": Backend(
        "two_step",
        (
            *_backends.where(lambda given: given.x.device.type == "cpu" and not _is_interpreted(given), _backends.CPP),
            *_backends.where(lambda given: given.x.device.type != "cpu", _NORM_POOL_TRITON.rules),
        ),
    ),
}

# (dtype, compute capability) → what "auto" takes on such a GPU; "two_step" where there is no row. Neither that nor
# "triton" has been measured on a GPU so far.
_ON_GPU: dict[tuple[torch.dtype, tuple[int, int]], str] = {}

_ABLE = (*BACKENDS.values(), Backend("reference", ()))  # what may be measured


def choose(given: Given, say: bool = True) -> str:
    """What "auto" is; whether it may ``say`` once what it does without."""
    if _modes.needs_plain(given):
        return "reference"
    return _tuned.implementation("block_aggregate", _ABLE, given, _rule, say)


def _rule(given: Given, say: bool) -> str:
    kind = given.x.device.type
    if kind == "cpu":
        if not BACKENDS["cpp"].can(given):
            if say:
                _backends.say_missing(given.x)
            return "reference"
        # The matrix unit, which only the library uses, gains more than Winograd's algorithm saves.
        amx = _extension.has_amx and _modes.autocast_dtype(given.x) == torch.bfloat16
        return "two_step" if amx else "cpp"
    if kind == "cuda":
        impl = _on_gpu(given.x)
        if BACKENDS[impl].can(given):
            return impl
        if say:
            _backends.say_once("block_aggregate", "plain PyTorch", BACKENDS[impl], given)
    return "reference"


def _on_gpu(x: Tensor) -> str:
    return _ON_GPU.get((_modes.autocast_dtype(x), _gpu.capability(x.device)), "two_step")


# --- computing --------------------------------------------------------------------------------------------------------


def _run(
    impl: str,
    given: Given,
    sizes: tuple[Size2, Size2] | None,
    eps: float,
    same: bool,
    packed: _packed.Packed | None,
) -> Tensor:
    x, conv_weight, *vectors, pos_embed = given
    training = _modes.wants_gradients(given)
    kind, autocast = x.device.type, _modes.under_autocast(x)
    x, conv_weight = _layout.dense_rows(_modes.autocast(x)), _modes.autocast(conv_weight)
    vectors = [None if t is None else t.float().contiguous() for t in vectors]
    # An image is one block, whose output is one block of half its size.
    H, W = x.shape[1:3]
    image_shape = None if sizes else (H // 2, W // 2)
    grid, block = sizes or ((1, 1), (H, W))
    out_block = block if sizes else (H // 2, W // 2)
    fused_pos = pos_embed
    if pos_embed is not None:
        # Under autocast the sum may be in another dtype than the rest.
        fused_pos = _layout.dense_rows(pos_embed.flatten(1, 2).unsqueeze(1) if image_shape else pos_embed)
        fused_pos = fused_pos if fused_pos.dtype == x.dtype and not autocast else None
    if impl != "two_step":
        x = x.reshape(x.shape[0], 1, H * W, x.shape[3]) if image_shape else x
        more = (_packed.filters(packed, "conv", conv_weight),) if impl == "cpp" else ()
        out = _FUSED[impl](x, conv_weight, *vectors, fused_pos, grid, block, out_block, eps, same, training, *more)[0]
    else:
        image = x if image_shape else unblockify(x, grid, block)
        # An NHWC image seen as NCHW is channels_last memory, and so is what the convolution makes of it.
        y = _layout.dense_rows(F.conv2d(image.permute(0, 3, 1, 2), conv_weight, padding=1).permute(0, 2, 3, 1))
        norm_pool = "cpp" if BACKENDS["cpp"].can(given) else "triton"
        out = _NORM_POOL[norm_pool](y, *vectors, fused_pos, out_block, eps, same, training)[0]
    out = out.unflatten(2, image_shape).squeeze(1) if image_shape else out
    if autocast and kind == "cuda":
        out = out.float()  # as layer_norm gives it there
    return out if pos_embed is None or fused_pos is not None else out + pos_embed


# --- registration: what follows the convolution, in C++ and in Triton -------------------------------------------------


def _outputs(like: Tensor, shape: tuple, out_block: Size2, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fake out, mean, rstd, argmax for a convolution's output of ``shape`` ``(B, H, W, C')``."""
    B, H, W, C = shape
    N = out_block[0] * out_block[1]
    T = H * W // (4 * N)
    kept = B if training else 0
    return (
        like.new_empty((B, T, N, C)),
        like.new_empty((kept, H, W), dtype=torch.float32),
        like.new_empty((kept, H, W), dtype=torch.float32),
        like.new_empty((kept, T, N, C), dtype=torch.uint8),
    )


def _norm_pool_fake(y, conv_bias, norm_weight, norm_bias, pos_embed, out_block, eps, same, training):
    return _outputs(y, y.shape, out_block, training)


def _norm_pool_bwd_fake(dout, y, conv_bias, norm_weight, mean, rstd, argmax, out_block, same):
    return y.new_empty(y.shape), y.new_empty((3, y.shape[3]), dtype=torch.float32)


def _norm_pool_gradients(part):
    def gradients(kept, dout):
        _checks.training(kept.training)
        saved = kept.y, kept.conv_bias, kept.norm_weight, kept.mean, kept.rstd, kept.argmax
        dy, dparams = _NORM_POOL_BWD[part](_layout.dense_rows(dout), *saved, kept.out_block_size, kept.same)
        dnorm_weight, dnorm_bias, dconv_bias = dparams.unbind(0)
        return {
            "y": dy,
            "conv_bias": None if kept.conv_bias is None else dconv_bias,
            "norm_weight": dnorm_weight,
            "norm_bias": dnorm_bias,
            "pos_embed": pos_embed_gradient(dout) if kept.needed["pos_embed"] else None,
        }

    return gradients


_NORM_POOL, _NORM_POOL_BWD = {}, {}
for _part in ("cpp", "triton"):
    _NORM_POOL[_part] = operation(
        f"norm_pool_{_part}_fwd(Tensor y, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, Tensor? pos_embed,"
        " SymInt[2] out_block_size, float eps, bool same, bool training)"
        " -> (Tensor out, Tensor mean, Tensor rstd, Tensor argmax)",
        launch="norm_pool.norm_pool_fwd" if _part == "triton" else "",
        fake=_norm_pool_fake,
        saved=("y", "conv_bias", "norm_weight", "mean", "rstd", "argmax"),
        gradients=_norm_pool_gradients(_part),
        vmap=(1, 5),
    )
    _NORM_POOL_BWD[_part] = operation(
        f"norm_pool_{_part}_bwd(Tensor dout, Tensor y, Tensor? conv_bias, Tensor norm_weight, Tensor mean, Tensor rstd,"
        " Tensor argmax, SymInt[2] out_block_size, bool same) -> (Tensor dy, Tensor dparams)",
        launch="norm_pool.norm_pool_bwd" if _part == "triton" else "",
        fake=_norm_pool_bwd_fake,
        backward_of="block_aggregate",
    )


# --- registration: everything in one kernel ---------------------------------------------------------------------------


def _fused_fake(x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed, grid, block, out_block, *rest):
    _, _, training, *_ = rest
    B, H, W, C = x.shape[0], grid[0] * block[0], grid[1] * block[1], conv_weight.shape[0]
    out, *statistics = _outputs(x, (B, H, W, C), out_block, training)
    return out, x.new_empty((B if training else 0, H, W, C)), *statistics


def _dx_fake(dy, conv_weight, grid, block):
    return dy.new_empty((dy.shape[0], grid[0] * grid[1], block[0] * block[1], conv_weight.shape[1]))


def _flops(x, conv_weight, *_, out_shape=None):
    return flops.convolution(x, conv_weight)


def _library_gradients(dy, x, conv_weight, grid, block, wanted):
    """dx and dweight by the library's convolution; None for what is not wanted."""
    if not any(wanted):
        return None, None
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2),
        unblockify(x, grid, block).permute(0, 3, 1, 2),
        conv_weight,
        None,
        *([1, 1], [1, 1], [1, 1], False, [0, 0], 1),  # stride, padding, dilation, transposed, its padding, groups
        [*wanted, False],
    )
    return blockify(dx.permute(0, 2, 3, 1), block) if wanted[0] else None, dweight


def _fused_gradients(part):
    norm_pool = _norm_pool_gradients(part)

    def gradients(kept, dout):
        found = norm_pool(kept, dout)
        dy, grid, block = found.pop("y"), kept.grid_size, kept.block_size
        own_dx = kept.needed["x"] and part == "cpp"
        wanted = [kept.needed["x"] and not own_dx, kept.needed["conv_weight"]]
        dx, dweight = _library_gradients(dy, kept.x, kept.conv_weight, grid, block, wanted)
        return found | {"x": _CPP_DX(dy, kept.conv_weight, grid, block) if own_dx else dx, "conv_weight": dweight}

    return gradients


_FUSED = {
    part: operation(
        f"block_aggregate_{part}_fwd(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight,"
        " Tensor norm_bias, Tensor? pos_embed, SymInt[2] grid_size, SymInt[2] block_size, SymInt[2] out_block_size,"
        f" float eps, bool same, bool training{more})"
        " -> (Tensor out, Tensor y, Tensor mean, Tensor rstd, Tensor argmax)",
        launch="block_aggregate.block_aggregate_fwd" if part == "triton" else "",
        fake=_fused_fake,
        saved=("x", "conv_weight", "conv_bias", "norm_weight", "y", "mean", "rstd", "argmax"),
        gradients=_fused_gradients(part),
        vmap=(1, 6),
        flops=_flops,
    )
    for part, more in (("cpp", ", Tensor? conv_packed=None"), ("triton", ""))
}
_CPP_DX = operation(
    "block_aggregate_cpp_dx(Tensor dy, Tensor conv_weight, SymInt[2] grid_size, SymInt[2] block_size) -> Tensor",
    fake=_dx_fake,
    backward_of="block_aggregate",
    flops=_flops,
)
