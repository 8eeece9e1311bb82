"""timm's DaViT: layers that attend in windows and layers that attend over channels. Source: timm/models/davit.py."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import timm.models.davit as timm_davit
import torch.nn.functional as F
from torch import Tensor

from nest_fast import fusion
from nest_fast.explanation import tell_layer
from nest_fast.integrations._swap import Adapter, Fast, instead_of
from nest_fast.integrations._timm import KNOWN, PLAIN_PARTS, options
from nest_fast.ops import windows

__all__ = ["ADAPTER"]


class SpatialBlock(Fast, timm_davit.SpatialBlock):
    @instead_of(timm_davit.SpatialBlock)
    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, _spatial_halves(self, (x.shape[2], x.shape[3])))


class ChannelBlock(Fast, timm_davit.ChannelBlock):
    @instead_of(timm_davit.ChannelBlock)
    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, _channel_halves(self))


def _forward(layer: Any, x: Tensor, halves: list[fusion.Half]) -> Tensor:
    """Each sub-layer after a convolution: ``(B, C, H, W)`` → the same."""
    for convolution, half in zip((layer.cpe1, layer.cpe2), halves, strict=True):
        x = convolution(x)
        if half.body is not None:
            x = fusion.run(x.flatten(2).transpose(1, 2), [half]).transpose(1, 2).view(x.shape)
    return x


def _spatial_halves(layer: Any, size: tuple[int, int]) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN, call=partial(_called, layer, size), operation=partial(_attention, size=size))


def _channel_halves(layer: Any) -> list[fusion.Half]:
    return fusion.halves(layer, _KNOWN)


def _called(layer: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    (H, W), (h, w) = size, layer.window_size
    y = layer.norm1(x).view(-1, H, W, x.shape[-1])
    y = F.pad(y, (0, 0, 0, -W % w, 0, -H % h))
    padded = y.shape
    y = timm_davit.window_partition(y, layer.window_size)
    y = layer.attn(y.view(-1, h * w, x.shape[-1])).view(y.shape)
    y = timm_davit.window_reverse(y, layer.window_size, padded[1], padded[2])
    return layer.drop_path1(y[:, :H, :W].contiguous().view(x.shape))


def _attention(x: Tensor, half: fusion.Half, branch_scale: fusion.Scale, *, size: tuple[int, int]) -> Tensor:
    return fusion.attention(x, half, branch_scale, windows=windows(size, half.body.window_size))


def _channels_instead(cls: type) -> fusion.Written:
    return fusion.as_written("attention", cls, rules=(("{name} attends over channels", lambda m, x: True),))


_KNOWN: fusion.Known = {
    **KNOWN,
    timm_davit.WindowAttention: fusion.as_written(
        "attention", timm_davit.WindowAttention, parts=(*PLAIN_PARTS, ("softmax", fusion.SOFTMAX)), options=options
    ),
    timm_davit.ChannelAttention: _channels_instead(timm_davit.ChannelAttention),
    timm_davit.ChannelAttentionV2: _channels_instead(timm_davit.ChannelAttentionV2),
    SpatialBlock: fusion.as_written("layer", SpatialBlock, timm_davit.SpatialBlock),
    ChannelBlock: fusion.as_written("layer", ChannelBlock, timm_davit.ChannelBlock),
}


def _blocks(layer: Any) -> tuple[int, int]:
    return 1, math.prod(getattr(layer, "window_size", (1, 1)))


def _there(halves: list[fusion.Half]) -> list[fusion.Half]:
    return [half for half in halves if half.body is not None]


ADAPTER = Adapter(
    classes=(SpatialBlock, ChannelBlock),
    known=_KNOWN,
    told={
        SpatialBlock: partial(
            tell_layer,
            halves=lambda layer: _there(_spatial_halves(layer, layer.window_size)),
            blocks=_blocks,
            windowed=True,
        ),
        ChannelBlock: partial(tell_layer, halves=lambda layer: _there(_channel_halves(layer)), blocks=_blocks),
    },
)
