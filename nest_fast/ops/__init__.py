"""The operations. Each is one public function: its checks, the choice of a backend, and its registration.

Their Triton kernels are imported as ``nest_fast.kernels``, which is the folder ``kernels/`` beside ``nest_fast/``.
"""

from nest_fast.ops import _flops
from nest_fast.ops._windows import windows
from nest_fast.ops.add_layer_norm import add_layer_norm
from nest_fast.ops.attention_layer import attention_layer
from nest_fast.ops.bias_gelu import bias_gelu
from nest_fast.ops.block_aggregate import block_aggregate
from nest_fast.ops.block_attention import block_attention
from nest_fast.ops.blockify import blockify, patchify, unblockify
from nest_fast.ops.layer_norm_mean import layer_norm_mean
from nest_fast.ops.linear import linear
from nest_fast.ops.mlp_layer import mlp_layer
from nest_fast.ops.projection_mlp import projection_mlp

__all__ = [
    "add_layer_norm",
    "attention_layer",
    "bias_gelu",
    "block_aggregate",
    "block_attention",
    "blockify",
    "layer_norm_mean",
    "linear",
    "mlp_layer",
    "patchify",
    "projection_mlp",
    "unblockify",
    "windows",
]

_flops.register()
