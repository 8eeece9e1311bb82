"""Block aggregation: conv 3x3 → LayerNorm → max-pool 3x3 with stride 2, the only place where NesT's blocks talk."""

from __future__ import annotations

from torch import Tensor

from nest_fast import reference
from nest_fast.ops import _checks

__all__ = ["block_aggregate"]

IMPLS = ("auto", "reference")


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
    impl: str = "auto",
) -> Tensor:
    """``max_pool(layer_norm(conv3x3(x))) + pos_embed`` on blocks, or on an image: four blocks become one.

    Args:
        x: ``(B, T, N, C)`` blocks if ``grid_size`` is given, else an image ``(B, H, W, C)``.
        conv_weight: ``(C', C, 3, 3)``; the convolution pads one zero pixel on every side.
        conv_bias: ``(C',)`` or None.
        norm_weight, norm_bias: ``(C',)``, the LayerNorm over channels.
        grid_size: height and width of the grid of blocks, both even; an int for a square.
        block_size: height and width of a block in tokens; may be left out where blocks are square.
        eps: added to the variance.
        padding: of the max-pool: "symmetric", one pixel on every side (PyTorch, timm), or "same", one pixel right
            and below (the authors, timm's ``_jx`` models). Padding never wins the maximum.
        pos_embed: ``(1, T/4, N, C')`` added to blocks, or ``(1, H/2, W/2, C')`` to an image; None for none.
        impl: "auto" takes the best this machine has for these tensors; "reference" is plain PyTorch on
            channels-last memory.

    Returns:
        ``(B, T/4, N, C')``, or ``(B, H/2, W/2, C')`` of an image.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or name.

    Source: the authors' ``libml/self_attention.py`` (ConvPool); timm's ``ConvPool``.
    """
    _checks.choice("impl", impl, IMPLS)
    _checks.choice("padding", padding, ("symmetric", "same"))
    grid_size, block_size = _check_image(x, grid_size, block_size)
    _check_parameters(x, conv_weight, conv_bias, norm_weight, norm_bias)
    if pos_embed is not None:
        half = (x.shape[1] // 4, x.shape[2]) if grid_size else (x.shape[1] // 2, x.shape[2] // 2)
        _checks.tensor("pos_embed", pos_embed, "(1, T/4, N, C')")
        _checks.shape("pos_embed", pos_embed, (1, *half, conv_weight.shape[0]), f"for x of shape {tuple(x.shape)}")
        _checks.alike("pos_embed", pos_embed, "x", x)
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


def _check_image(
    x: Tensor, grid_size: object, block_size: object
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    if grid_size is None:
        _checks.tensor("x", x, "(B, H, W, C)")
        _checks.floating("x", x)
        if block_size is not None:
            raise ValueError(f"block_size: wanted None for an image (grid_size=None), got {block_size!r}")
        if x.shape[1] % 2 or x.shape[2] % 2:
            raise ValueError(f"x: wanted an even height and width, got shape {tuple(x.shape)}")
        return None, None
    _checks.tensor("x", x, "(B, T, N, C)")
    _checks.floating("x", x)
    (gh, gw), block = _checks.grid(x, grid_size, block_size)
    if gh % 2 or gw % 2:
        raise ValueError(f"grid_size: wanted an even height and width, since 2 x 2 blocks become one, got ({gh}, {gw})")
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
        _checks.alike(name, value, "x", x)
