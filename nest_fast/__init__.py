"""nest_fast: fast layers for NesT (nested hierarchical transformers), drop-in for timm's, checked against a reference.

Importing needs no GPU, no triton, no compiler and no timm.
"""

from nest_fast import export, reference, weights
from nest_fast.frozen import freeze, unfreeze
from nest_fast.integrations import accelerate, explain, restore
from nest_fast.interpretation import attention_maps, gradcat
from nest_fast.modules import BlockAggregation, BlockAttention, TransformerLayer
from nest_fast.nest import (
    NesT,
    nest_base,
    nest_base_s16_32,
    nest_small,
    nest_small_s16_32,
    nest_tiny,
    nest_tiny_s16_32,
)
from nest_fast.ops import (
    add_layer_norm,
    attention_layer,
    bias_gelu,
    block_aggregate,
    block_attention,
    blockify,
    layer_norm_mean,
    linear,
    mlp_layer,
    patchify,
    projection_mlp,
    unblockify,
    windows,
)
from nest_fast.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "BlockAggregation",
    "BlockAttention",
    "NesT",
    "TransformerLayer",
    "accelerate",
    "add_layer_norm",
    "attention_layer",
    "attention_maps",
    "bias_gelu",
    "block_aggregate",
    "block_attention",
    "blockify",
    "explain",
    "export",
    "freeze",
    "gradcat",
    "layer_norm_mean",
    "linear",
    "mlp_layer",
    "nest_base",
    "nest_base_s16_32",
    "nest_small",
    "nest_small_s16_32",
    "nest_tiny",
    "nest_tiny_s16_32",
    "patchify",
    "projection_mlp",
    "reference",
    "restore",
    "tune",
    "unblockify",
    "unfreeze",
    "weights",
    "windows",
]
