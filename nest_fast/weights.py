"""Checkpoints: timm's state dicts and the authors' JAX parameters in, timm's format out, position embeddings resized.

Every function takes and gives plain dictionaries of tensors; nothing here needs timm, JAX or a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from os import PathLike, fspath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nest_fast.reference import blockify, unblockify

__all__ = ["from_jax", "from_timm", "head_major_to_minor", "head_minor_to_major", "resize_pos_embed", "to_timm"]

_TIMM_KEYS = ("patch_embed.proj.weight", "module.patch_embed.proj.weight")


def head_minor_to_major(weight: Tensor, num_heads: int) -> Tensor:
    """The input columns of a projection ``(out, C)`` from timm's order (head_dim, heads) to (heads, head_dim)."""
    return weight.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1)


def head_major_to_minor(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`head_minor_to_major`."""
    return weight.unflatten(1, (num_heads, -1)).transpose(1, 2).flatten(1)


def from_timm(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of timm's ``Nest`` as one for :class:`nest_fast.NesT`.

    ``NesT`` keeps timm's names and layouts (head-minor projections included), so the tensors themselves pass through;
    what this does is find them and refuse what is something else.

    Args:
        checkpoint: the state dict of a timm ``nest_*`` model (``_jx`` or not), or a checkpoint that holds one under
            "state_dict", "model" or "module"; a "module." in front of every name is taken off.

    Raises:
        ValueError: there is no NesT state dict in ``checkpoint``.
    """
    found = {
        key.removeprefix("module."): value
        for key, value in _unwrap(checkpoint, ("state_dict", "model", "module"), _TIMM_KEYS).items()
    }
    if _TIMM_KEYS[0] not in found or "levels.0.pos_embed" not in found:
        raise ValueError(f"checkpoint: wanted the state dict of a timm Nest, got names such as {list(checkpoint)[:3]}")
    return found


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of :class:`nest_fast.NesT` in timm's format: the inverse of :func:`from_timm`.

    Raises:
        ValueError: the model is multi-query, which timm has not, or ``state_dict`` is not ``NesT``'s.
    """
    found = from_timm(state_dict)
    for key, value in found.items():
        if key.endswith(".attn.qkv.weight") and value.shape[0] != 3 * value.shape[1]:
            raise ValueError(f"state_dict: wanted multi-head attention, all that timm has, got multi-query in {key}")
    return found


def from_jax(tree: Mapping[str, Any] | str | PathLike[str], depths: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """The authors' parameters as a float32 state dict for :class:`nest_fast.NesT`.

    The model to load it into has ``padding="same"``, ``gelu="tanh"`` and, for their 32 px models, ``multi_query=True``.

    Args:
        tree: nested dictionaries as flax has them, a flat one with "/" in its names, the path of an ``.npz`` with such
            names, or of a flax msgpack checkpoint (needs flax). The parameters may lie under "params", "param",
            "target" or "optimizer".
        depths: layers of each level. None reads them off the widths; levels of the same width share evenly.

    Raises:
        ValueError: no NesT parameters are found, or ``depths`` does not fit them.
        ModuleNotFoundError: a msgpack file without flax.

    Source: github.com/google-research/nested-transformer, ``models/nest_net.py`` and ``libml/self_attention.py``.
    """
    params = _jax_params(tree if isinstance(tree, Mapping) else _read_jax(fspath(tree)))
    out = _jax_affine("patch_embed.proj", params["PatchEmbedding_0"]["Conv_0"])
    num_levels = sum(key.startswith("PositionEmbedding_") for key in params)
    depths = _jax_depths(params, num_levels) if depths is None else depths
    num_layers = sum(key.startswith("EncoderNDBlock_") for key in params)
    if len(depths) != num_levels or sum(depths) != num_layers:
        raise ValueError(f"depths: wanted {num_levels} levels with {num_layers} layers in all, got {depths}")
    layer = 0
    for i in range(num_levels):
        out[f"levels.{i}.pos_embed"] = _tensor(params[f"PositionEmbedding_{i}"]["pos_embedding"])
        if i > 0:
            pool = params[f"ConvPool_{i - 1}"]
            out |= _jax_affine(f"levels.{i}.pool.conv", pool["Conv_0"])
            out |= _jax_affine(f"levels.{i}.pool.norm", pool["LayerNorm_0"])
        for j in range(depths[i]):
            out |= _jax_layer(f"levels.{i}.transformer_encoder.{j}", params[f"EncoderNDBlock_{layer}"])
            layer += 1
    return out | _jax_affine("norm", params["LayerNorm_0"]) | _jax_affine("head", params["Dense_0"])


def resize_pos_embed(
    pos_embed: Tensor,
    grid_size: tuple[int, int],
    block_size: tuple[int, int],
    old_block_size: tuple[int, int] | None = None,
) -> Tensor:
    """A position embedding for another image size, bicubic as in timm: ``(1, T, N, C)`` → ``(1, T', N', C)``.

    Args:
        pos_embed: ``(1, T, N, C)`` of a square grid.
        grid_size, block_size: of the result: ``T' = gh * gw``, ``N' = bh * bw``.
        old_block_size: of ``pos_embed``, where its blocks are not square.

    Raises:
        ValueError: T is no square, or N is none and ``old_block_size`` is missing.
    """
    _, T, N, _ = pos_embed.shape
    edge = math.isqrt(T)
    if edge * edge != T:
        raise ValueError(f"pos_embed: wanted a square grid of blocks, got T = {T}")
    if old_block_size is None:
        old_block_size = (math.isqrt(N), math.isqrt(N))
    if old_block_size[0] * old_block_size[1] != N:
        raise ValueError(f"old_block_size: wanted height * width = N = {N} tokens, got {old_block_size}")
    image = unblockify(pos_embed, edge, old_block_size).permute(0, 3, 1, 2).float()
    size = (grid_size[0] * block_size[0], grid_size[1] * block_size[1])
    image = F.interpolate(image, size, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return blockify(image.permute(0, 2, 3, 1), block_size)


def _unwrap(tree: Mapping[str, Any], names: tuple[str, ...], until: tuple[str, ...]) -> Mapping[str, Any]:
    """The first tree that holds one of ``until``, going down through ``names``; ``tree`` itself if there is none."""
    found = tree
    while not any(key in found for key in until):
        name = next((n for n in names if isinstance(found.get(n), Mapping)), None)
        if name is None:
            return tree
        found = found[name]
    return found


def _read_jax(path: str) -> Mapping[str, Any]:
    if path.endswith(".npz"):
        import numpy as np

        with np.load(path) as arrays:
            return dict(arrays)
    from flax.serialization import msgpack_restore

    with open(path, "rb") as file:
        return msgpack_restore(file.read())


def _jax_params(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in tree.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    params = _unwrap(nested, ("params", "param", "target", "optimizer"), ("PatchEmbedding_0",))
    if "PatchEmbedding_0" not in params:
        raise ValueError(f"tree: wanted NesT's parameters with a PatchEmbedding_0, got {sorted(tree)[:5]}")
    return params


def _jax_depths(params: Mapping[str, Any], num_levels: int) -> tuple[int, ...]:
    levels = [params[f"PositionEmbedding_{i}"]["pos_embedding"].shape[-1] for i in range(num_levels)]
    num_layers = sum(key.startswith("EncoderNDBlock_") for key in params)
    layers = [params[f"EncoderNDBlock_{j}"]["LayerNorm_0"]["scale"].shape[-1] for j in range(num_layers)]
    level_runs = [(width, len(list(run))) for width, run in groupby(levels)]
    layer_runs = [(width, len(list(run))) for width, run in groupby(layers)]
    if [width for width, _ in level_runs] != [width for width, _ in layer_runs]:
        raise ValueError(f"depths: wanted one value a level, since widths {levels} do not tell them, got None")
    depths: list[int] = []
    for (_, in_levels), (width, in_layers) in zip(level_runs, layer_runs, strict=True):
        if in_layers % in_levels:
            raise ValueError(
                f"depths: wanted one value a level, since {in_layers} layers of width {width} do not share evenly"
                f" among {in_levels} levels, got None"
            )
        depths += [in_layers // in_levels] * in_levels
    return tuple(depths)


def _jax_layer(name: str, block: Mapping[str, Any]) -> dict[str, Tensor]:
    out = _jax_affine(f"{name}.norm1", block["LayerNorm_0"]) | _jax_affine(f"{name}.norm2", block["LayerNorm_1"])
    for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
        out |= _jax_affine(f"{name}.mlp.{ours}", block["MlpBlock_0"][theirs])
    multi_query = "MultiQueryAttention_0" in block
    attention = block["MultiQueryAttention_0" if multi_query else "MultiHeadAttention_0"]
    query, key_value = attention["DenseGeneral_0"], attention["Dense_0" if multi_query else "DenseGeneral_1"]
    for ours, theirs in (("weight", "kernel"), ("bias", "bias")):
        if theirs in query:
            q, kv = _tensor(query[theirs]), _tensor(key_value[theirs])
            lead = q.dim() - 2  # a kernel has the input channels in front of (heads, head_dim)
            packed = [part.flatten(lead) for part in (q, *kv.chunk(2, dim=-1))]
            out[f"{name}.attn.qkv.{ours}"] = torch.cat(packed, -1).t().contiguous() if lead else torch.cat(packed)
    kernel = _tensor(attention["proj_kernel"])  # (heads, head_dim, out)
    out[f"{name}.attn.proj.weight"] = head_major_to_minor(kernel.flatten(0, 1).t(), kernel.shape[0])
    out[f"{name}.attn.proj.bias"] = _tensor(attention["bias"])
    return out


def _jax_affine(name: str, node: Mapping[str, Any]) -> dict[str, Tensor]:
    """``weight`` and, if there is one, ``bias`` of a flax Dense, Conv or LayerNorm."""
    if "kernel" in node:
        kernel = _tensor(node["kernel"])
        weight = kernel.t() if kernel.dim() == 2 else kernel.permute(3, 2, 0, 1)  # (h, w, in, out) → (out, in, h, w)
    else:
        weight = _tensor(node["scale"])
    out = {f"{name}.weight": weight.contiguous()}
    if "bias" in node:
        out[f"{name}.bias"] = _tensor(node["bias"])
    return out


def _tensor(array: Any) -> Tensor:
    import numpy as np

    # A copy: checkpoints come as read-only views.
    return torch.from_numpy(np.array(array, dtype=np.float32))
