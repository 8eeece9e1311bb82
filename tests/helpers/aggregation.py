"""Inputs and oracles that the tests of block aggregation share."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast.kernels import _configs
from nest_fast.testing import max_error, relative_error

PADDINGS = ("symmetric", "same")


class Shape(NamedTuple):
    B: int
    grid: tuple[int, int]
    block: tuple[int, int]
    C: int
    C_out: int

    @property
    def T(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def N(self) -> int:
        return self.block[0] * self.block[1]

    @property
    def height(self) -> int:
        return self.grid[0] * self.block[0]

    @property
    def width(self) -> int:
        return self.grid[1] * self.block[1]

    def __str__(self) -> str:
        return "B{}-{}x{}-{}x{}-{}to{}".format(self.B, *self.grid, *self.block, self.C, self.C_out)


def draw(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed."""
    B, C, C_out = shape.B, shape.C, shape.C_out
    sizes = [(B, shape.T, shape.N, C), (C_out, C, 3, 3), *[(C_out,)] * 3, (1, shape.T // 4, shape.N, C_out)]
    scales = [1.0, (9 * C) ** -0.5, 0.1, 1.0, 0.1, 0.1]
    return tuple((torch.randn(size) * scale).to(dtype) for size, scale in zip(sizes, scales, strict=True))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """``x`` (4-D) in other memory whose channels are dense, by name."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), math.nan)
    wide[..., 4:-4] = x
    return {
        "padded channels": wide[..., 4:-4],
        "second and third dimension swapped": x.transpose(1, 2).contiguous().transpose(1, 2),
        "images last": x.movedim(0, 2).contiguous().movedim(2, 0),
        "every second of the second dimension": x.repeat_interleave(2, 1)[:, ::2],
    }


def windows(z: Tensor, padding: str) -> Tensor:
    """Pixels of the windows ``(B, C, 9, H/2, W/2)`` of an image ``(B, H, W, C)``; -inf for padding."""
    before, after = (0, 1) if padding == "same" else (1, 1)
    padded = F.pad(z.permute(0, 3, 1, 2), (before, after, before, after), value=-torch.inf)
    return padded.unfold(2, 3, 2).unfold(3, 3, 2).permute(0, 1, 4, 5, 2, 3).flatten(2, 3)


def pool_at(z: Tensor, argmax: Tensor, padding: str) -> Tensor:
    """The pooled image of ``z`` with each maximum taken where ``argmax`` says, 3 * row + column in its window."""
    return windows(z, padding).gather(2, argmax.long().permute(0, 3, 1, 2).unsqueeze(2)).squeeze(2).permute(0, 2, 3, 1)


def pool_places(z: Tensor, padding: str) -> Tensor:
    """Where max_pool2d finds each maximum, as ``argmax`` above."""
    before = 0 if padding == "same" else 1
    nchw = z.permute(0, 3, 1, 2)
    pool = {"ceil_mode": True} if padding == "same" else {"padding": 1}
    _, flat = F.max_pool2d(nchw, 3, 2, return_indices=True, **pool)
    start_h = 2 * torch.arange(flat.shape[2]).view(-1, 1) - before
    start_w = 2 * torch.arange(flat.shape[3]) - before
    places = 3 * (flat // z.shape[2] - start_h) + flat % z.shape[2] - start_w
    return places.permute(0, 2, 3, 1).to(torch.uint8)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)


def _assert_errors(what: str, out: Tensor, plain: Tensor, exact: Tensor, plain_exact: Tensor, factor: float) -> None:
    """Errors at most factor times plain PyTorch's: the L2 norm always, the largest where it does not hang on luck.

    Among a few thousand float32 numbers the ratio of the largest errors is 0.6 to 2.2 from seed to seed, where that of
    the norms is 0.9.
    """
    half = out.dtype != torch.float32
    eps = torch.finfo(out.dtype).eps
    error = relative_error(out, exact)
    allowed = factor * relative_error(plain, plain_exact) + (eps / 8 if half else 0.0)
    assert error <= allowed, f"{what}: relative error {error:.3e}, allowed {allowed:.3e}"
    if out.numel() >= 2**14:
        largest = max_error(out, exact)
        allowed = factor * max_error(plain, plain_exact) + (2 * eps * exact.abs().max().item() if half else 0.0)
        assert largest <= allowed, f"{what}: largest error {largest:.3e}, allowed {allowed:.3e}"


def assert_forward(out: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Within the bounds against plain PyTorch of the same dtype."""
    assert out.shape == exact.shape
    assert out.dtype == plain.dtype
    _assert_errors("out", out, plain, exact, exact, 1.25)


def assert_gradients(names, ours, plain, exact, plain_exact) -> None:
    """Each exact gradient took the maxima from where the other did: ours and plain PyTorch's differ in some places."""
    for name, got, other, want, other_want in zip(names, ours, plain, exact, plain_exact, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == other.dtype, name
        _assert_errors(name, got, other, want, other_want, 2)


def for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles and few programs: the interpreter takes its time per operation, not per number.

    What is shipped runs in tests of its own.
    """
    fused = _configs.AggregationConfig(tile_pixels=512, tile_k=128, tile_c=512, num_stages=1, num_warps=64)
    monkeypatch.setattr(_configs, "norm_pool", lambda *_: ({"TILE_PIXELS": 128, "num_warps": 4},))
    monkeypatch.setattr(_configs, "block_aggregate", lambda *_: (fused,))
    monkeypatch.setattr(_configs, "multiprocessors", lambda _: 2)
