"""The operations. Each is one public function: checks, one choice of who computes it, and its registration."""

from nest_fast.ops.attention_layer import attention_layer
from nest_fast.ops.block_aggregate import block_aggregate
from nest_fast.ops.block_attention import block_attention
from nest_fast.ops.blockify import blockify, patchify, unblockify
from nest_fast.ops.linear import linear
from nest_fast.ops.mlp_layer import mlp_layer

__all__ = [
    "attention_layer",
    "block_aggregate",
    "block_attention",
    "blockify",
    "linear",
    "mlp_layer",
    "patchify",
    "unblockify",
]
