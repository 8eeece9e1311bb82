"""Exported programs: without nest_fast's kernels, for what knows PyTorch's operations only, or with them.

``torch.export.export`` traces a model into the operations that the layers chose, kernels among them. Such a program is
as fast as the model where nest_fast is there. :func:`decompositions` makes plain PyTorch of it, for everything else;
``torch.onnx.export(model, …, dynamo=True)`` needs no call, since the layers choose plain PyTorch for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from nest_fast import reference

__all__ = ["decompositions", "save"]

Size2 = tuple[int, int]


def decompositions() -> dict[Any, Callable]:
    """What each operation of nest_fast that a forward pass records is in plain PyTorch.

    ``program.run_decompositions(nest_fast.export.decompositions())`` is a program that needs nothing of nest_fast, with
    every other operation as it was; it computes the same within rounding, at PyTorch's speed. Operations of a backward
    pass have none.
    """
    ops = torch.ops.nest_fast
    return {
        ops.blockify.default: _blockify,
        ops.unblockify.default: _unblockify,
        ops.patchify.default: _patchify,
        ops.unpatchify.default: _unpatchify,
        ops.block_attention_cpp_fwd.default: _block_attention,
        ops.block_attention_triton_fwd.default: _block_attention_triton,
        ops.attention_layer_cpp.default: _attention_layer,
        ops.mlp_layer_cpp.default: _mlp_layer,
        ops.norm_attention_triton_fwd.default: _norm_attention,
        ops.norm_linear_triton_fwd.default: _norm_linear,
        ops.linear_sum_triton_fwd.default: _linear_sum,
        ops.linear_triton_fwd.default: _linear,
        ops.mlp_layer_triton_fwd.default: _mlp_layer_triton,
        ops.mlp_layer_triton_wide.default: _mlp_layer_triton_wide,
        ops.projection_mlp_triton_fwd.default: _projection_mlp,
        ops.block_aggregate_cpp_fwd.default: _block_aggregate,
        ops.block_aggregate_triton_fwd.default: _block_aggregate,
        ops.norm_pool_cpp_fwd.default: _norm_pool,
        ops.norm_pool_triton_fwd.default: _norm_pool,
        ops.bias_gelu_triton_fwd.default: _bias_gelu,
        ops.gelu_linear_triton_fwd.default: _gelu_linear,
        ops.add_layer_norm_triton_fwd.default: _add_layer_norm,
        ops.layer_norm_mean_triton_fwd.default: _layer_norm_mean,
    }


def save(program: ExportedProgram, f: str | os.PathLike[str] | IO[bytes], **kwargs: Any) -> None:
    """``torch.export.save``, with a note for who loads the file without nest_fast.

    PyTorch refuses a program whose operations it does not know; the note is then in what it prints, and in the file's
    ``extra_files["nest_fast"]``. A program without operations of nest_fast gets none.

    Args:
        program: what ``torch.export.export`` returned.
        f, kwargs: as ``torch.export.save`` takes them.

    Raises:
        TypeError: ``program`` is no ``torch.export.ExportedProgram``.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: expected a torch.export.ExportedProgram, got {type(program).__name__}")
    nodes = [node for node in program.graph.nodes if getattr(node.target, "namespace", None) == "nest_fast"]
    if nodes:
        note = "this program needs `import nest_fast` before torch.export.load"
        kwargs["extra_files"] = {"nest_fast": note} | (kwargs.get("extra_files") or {})
    traces = [node.meta.get("stack_trace") for node in nodes]
    try:
        for node in nodes:  # PyTorch prints it of the node that it cannot load
            node.meta["stack_trace"] = note
        torch.export.save(program, f, **kwargs)
    finally:
        for node, trace in zip(nodes, traces, strict=True):
            node.meta["stack_trace"] = trace


# --- each operation, with the arguments and results of its schema -----------------------------------------------------
# Results are contiguous, as the kernels make them: what follows was traced with their strides.


def _blockify(x: Tensor, block_size: Size2, pos_embed: Tensor | None) -> Tensor:
    out = reference.blockify(x, block_size)
    return (out if pos_embed is None else out + pos_embed).contiguous()


def _unblockify(x: Tensor, grid_size: Size2, block_size: Size2, pos_embed: Tensor | None) -> Tensor:
    x = x if pos_embed is None else x + pos_embed
    return reference.unblockify(x, grid_size, block_size).contiguous()


def _patchify(x: Tensor, patch_size: Size2, block_size: Size2) -> Tensor:
    return reference.patchify(x, patch_size, block_size).contiguous()


def _unpatchify(x: Tensor, patch_size: Size2, grid_size: Size2, block_size: Size2) -> Tensor:
    (ph, pw), (gh, gw), (bh, bw) = patch_size, grid_size, block_size
    x = x.reshape(x.shape[0], gh, gw, bh, bw, -1, ph, pw).permute(0, 5, 1, 3, 6, 2, 4, 7)
    return x.reshape(*x.shape[:2], gh * bh * ph, gw * bw * pw).contiguous()


def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    scale: float,
    numbers: list[int],
) -> tuple[Tensor, ...]:
    windows = reference.Windows.of_numbers(numbers)
    if windows is None:
        return _attention(q, k, v, rel_h, rel_w, bias, mask, scale)
    q, k, v = (reference.into_windows(x.squeeze(1), windows, pad) for x, pad in ((q, None), (k, pad_k), (v, pad_v)))
    rel_h, rel_w = (None if x is None else reference.into_windows(x.squeeze(1), windows) for x in (rel_h, rel_w))
    if any(windows.shift) and mask is None:
        mask = reference.window_mask(windows, q.device)
    out, lse = _attention(q, k, v, rel_h, rel_w, bias, mask, scale)
    return reference.from_windows(out, windows).unsqueeze(1), lse


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    out = reference.block_attention(q, k, v, scale=scale, bias=bias, mask=mask, rel_h=rel_h, rel_w=rel_w)
    scores = (q.float() * scale).transpose(2, 3) @ k.float().permute(0, 1, 3, 4, 2)
    if rel_h is not None and rel_w is not None:
        by_row, by_column = (x.float().transpose(2, 3) for x in (rel_h, rel_w))
        scores = scores + (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        groups = mask.repeat(q.shape[1] // mask.shape[0], 1, 1).unsqueeze(1)
        scores = scores.masked_fill(~groups, float("-inf")) if mask.dtype == torch.bool else scores + groups
    out = out.to(q.dtype).contiguous()
    if bias is None and mask is None and rel_h is None:
        return out, scores.logsumexp(-1)
    row_max = scores.amax(-1)
    empty = row_max == float("-inf")
    log_sum = (scores - row_max.masked_fill(empty, 0.0).unsqueeze(-1)).exp().sum(-1).log().masked_fill(empty, 0.0)
    return out, torch.stack((row_max.masked_fill(empty, float("inf")), log_sum), -1)


def _block_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    scales: Tensor | None,
    numbers: list[int],
) -> tuple[Tensor, ...]:
    if scales is not None:
        q, k = reference.with_length(q, scales.unsqueeze(-1)), reference.with_length(k)
        pad_k = None if pad_k is None else reference.with_length(pad_k)
    out, lse = _block_attention(q, k, v, None, None, bias, mask, pad_k, pad_v, scale, numbers)
    if lse.dim() == 4:
        return out, lse
    row_max, log_sum = lse.unbind(-1)  # the maximum in the unit of the kernel that leaves the scale to the exponent
    return out, torch.stack((row_max / (scale if scale > 1e-6 else 1.0), log_sum), -1)


def _attention_layer(
    x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, proj_weight, proj_bias, bias, mask, scales, *rest
) -> tuple[Tensor, ...]:
    numbers, tokens, heads, kv_heads, scale, branch_scale, training, *_ = rest  # nothing is packed in a program
    C, windows = x.shape[1], reference.Windows.of_numbers(numbers)
    y = x if norm_weight is None else _layer_norm(x, norm_weight, norm_bias, eps, qkv_weight.dtype)
    if windows is None:
        y = y.reshape(-1, 1, tokens, C)
    else:
        y = reference.into_windows(y.reshape(-1, windows.rows, C), windows)
        if any(windows.shift) and mask is None:
            mask = reference.window_mask(windows, x.device)
    qkv = F.linear(y, qkv_weight, qkv_bias)
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, C // heads)).split((heads, kv_heads, kv_heads), 3)
    if scales is not None:
        q, k, scale = reference.with_length(q, scales.unsqueeze(-1)), reference.with_length(k), 1.0
    groups = 1 if mask is None else mask.shape[0]
    q, k, v = (x.reshape(-1, groups, *x.shape[2:]) for x in (q, k, v))
    out, lse = _attention(q, k, v, None, None, bias, mask, scale)
    attended = out.reshape(-1, C)
    out = F.linear(attended, proj_weight, proj_bias)
    if windows is not None:
        out = reference.from_windows(out.reshape(-1, windows.blocks, tokens, C), windows).reshape(-1, C)
    out = out if norm_weight is None else x + branch_scale * out
    return out, *_kept(training, qkv.reshape(-1, qkv.shape[-1]), attended, lse.flatten(0, 1))


def _mlp_layer(
    x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, *rest
) -> tuple[Tensor, ...]:
    branch_scale, training, *_ = rest
    y = x if norm_weight is None else _layer_norm(x, norm_weight, norm_bias, eps, fc1_weight.dtype)
    hidden = F.linear(y, fc1_weight, fc1_bias)
    y = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    out = F.linear(y, fc2_weight, fc2_bias)
    return out if norm_weight is None else x + branch_scale * out, *_kept(training, hidden)


def _norm_linear(x, norm_weight, norm_bias, eps, weight, bias) -> Tensor:
    return F.linear(
        _layer_norm(x, norm_weight.float(), norm_bias.float(), eps, weight.dtype), weight, bias
    ).contiguous()


def _norm_attention(x, norm_weight, norm_bias, eps, weight, bias, num_heads, scale) -> Tensor:
    qkv = _norm_linear(x, norm_weight, norm_bias, eps, weight, bias).unflatten(-1, (3, num_heads, -1))
    return reference.block_attention(*qkv.unbind(3), scale=scale).flatten(-2).contiguous()


def _linear(x, weight, bias, activation) -> Tensor:
    return reference.linear(x, weight, bias, activation=activation).contiguous()


def _linear_sum(x, weight, bias, residual, scale) -> Tensor:
    return (residual + scale * F.linear(x, weight, bias)).contiguous()


def _mlp_layer_triton(
    x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, tanh, fc2_weight, fc2_bias, branch_scale, sample_scale=None
) -> Tensor:
    y = F.gelu(
        _norm_linear(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias), approximate="tanh" if tanh else "none"
    )
    scale = branch_scale if sample_scale is None else sample_scale.view(-1, *(1,) * (x.dim() - 1))
    return _linear_sum(y, fc2_weight, fc2_bias, x, scale)


def _mlp_layer_triton_wide(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, *rest) -> tuple[Tensor, ...]:
    before = x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias
    variance, mean = torch.var_mean(x.float(), -1, correction=0)
    return _mlp_layer_triton(*before, *rest), _norm_linear(*before), mean, (variance + eps).rsqrt()


def _projection_mlp(x, attended, proj_weight, proj_bias, proj_scale, *mlp) -> Tensor:
    return _mlp_layer_triton(_linear_sum(attended, proj_weight, proj_bias, x, proj_scale), *mlp)


def _block_aggregate(
    x, conv_weight, conv_bias, norm_weight, norm_bias, pos_embed, grid_size, block_size, *rest
) -> tuple[Tensor, ...]:
    image = reference.unblockify(x, grid_size, block_size).permute(0, 3, 1, 2)
    y = F.conv2d(image, conv_weight, padding=1).permute(0, 2, 3, 1).contiguous()
    out_block, eps, same, training, *_ = rest
    out, *statistics = _norm_pool(y, conv_bias, norm_weight, norm_bias, pos_embed, out_block, eps, same, training)
    return out, *_kept(training, y), *statistics


def _norm_pool(
    y, conv_bias, norm_weight, norm_bias, pos_embed, out_block_size, eps, same, training
) -> tuple[Tensor, ...]:
    x = y.float() if conv_bias is None else y.float() + conv_bias
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    padding = 0 if same else 1  # as reference.block_aggregate pools
    channels_first = normed.permute(0, 3, 1, 2)
    if training:
        pooled, index = F.max_pool2d_with_indices(channels_first, (3, 3), (2, 2), (padding, padding), ceil_mode=same)
        argmax = reference.blockify(_place_in_window(index, y.shape[2], padding), out_block_size)
    else:
        pooled = F.max_pool2d(channels_first, 3, 2, padding, ceil_mode=same)
    out = reference.blockify(pooled.permute(0, 2, 3, 1), out_block_size)
    if not training:
        argmax = out.new_empty((0, *out.shape[1:]), dtype=torch.uint8)
    out = out if pos_embed is None else out + pos_embed
    return out.to(y.dtype).contiguous(), *_kept(training, mean.squeeze(-1), rstd.squeeze(-1)), argmax.contiguous()


def _place_in_window(index: Tensor, width: int, padding: int) -> Tensor:
    """``3 * row + column`` inside its window of each maximum ``(B, C, H', W')``, channels last."""
    row, column = (2 * torch.arange(n, device=index.device) - padding for n in index.shape[2:])
    place = 3 * (index // width - row[:, None]) + index % width - column
    return place.to(torch.uint8).permute(0, 2, 3, 1)


def _gelu_linear(x, bias, tanh, weight, weight_bias) -> Tensor:
    return F.linear(_bias_gelu(x, bias, x.dtype, tanh), weight, weight_bias)


def _bias_gelu(x: Tensor, bias: Tensor | None, dtype: torch.dtype, tanh: bool) -> Tensor:
    x = x.float() if bias is None else x.float() + bias.float()
    return F.gelu(x, approximate="tanh" if tanh else "none").to(dtype).contiguous()


def _add_layer_norm(x, branch, branch_scale, branch_bias, weight, bias, eps, dtype, normed_dtype) -> tuple[Tensor, ...]:
    scale = None if branch_scale is None else branch_scale.float()
    branch_bias = None if branch_bias is None else branch_bias.float()
    branch = branch.float() if branch_bias is None else branch.float() + branch_bias
    branch = branch if scale is None else branch * scale.reshape(-1, *(1,) * (x.dim() - 1))
    total = x.float() + branch
    normed, mean, rstd = torch.native_layer_norm(total, x.shape[-1:], weight.float(), bias.float(), eps)
    return total.to(dtype).contiguous(), normed.to(normed_dtype).contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def _layer_norm_mean(x, weight, bias, eps, dtype) -> tuple[Tensor, ...]:
    normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)
    normed_mean = normed.flatten(1, -2).mean(1)
    out = normed_mean * weight.float() + bias.float()
    return out.to(dtype), normed_mean, mean.squeeze(-1), rstd.squeeze(-1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Of weight and bias in float32, in the dtype of what comes next: under autocast another than that of ``x``."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)


def _kept(training: bool, *saved: Tensor) -> tuple[Tensor, ...]:
    """What is kept for a gradient, where there will be one."""
    return saved if training else tuple(x[:0] for x in saved)
