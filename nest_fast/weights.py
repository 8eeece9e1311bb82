"""Checkpoints: timm's state dicts and the authors' JAX parameters in, timm's format out, position embeddings resized.

Every function gives plain dictionaries of tensors; nothing here needs timm, JAX or a model.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nest_fast.reference import blockify, unblockify

__all__ = ["from_jax", "from_timm", "head_major_to_minor", "head_minor_to_major", "resize_pos_embed", "to_timm"]

# What torch.compile, FSDP, activation checkpointing and Lightning Fabric put into names, at any depth; no module of a
# NesT is called so. "module." (DataParallel, DDP, averaged models) is treated as any other prefix.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# The one name that timm's NesT has and no other model of timm.
_TIMM_NAME = ("levels", "0", "pos_embed")


def head_minor_to_major(weight: Tensor, num_heads: int) -> Tensor:
    """The input columns of a projection ``(out, C)`` from timm's order (head_dim, heads) to (heads, head_dim)."""
    return weight.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1)


def head_major_to_minor(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`head_minor_to_major`."""
    return weight.unflatten(1, (num_heads, -1)).transpose(1, 2).flatten(1)


def from_timm(
    checkpoint: Mapping[str, Any] | str | PathLike[str], *, use_ema: bool = True, prefix: str | None = None
) -> dict[str, Tensor]:
    """A checkpoint of timm's ``Nest`` as a state dict for :class:`nest_fast.NesT`.

    ``NesT`` keeps timm's names and layouts (head-minor projections included), so the tensors themselves pass through,
    whatever their class, dtype or device; what this does is find them and refuse what is something else.

    Args:
        checkpoint: the state dict of a timm ``nest_*`` model (``_jx`` or not), or dictionaries that hold one at any
            depth, as trainers save them ("state_dict", "model", ...), or the path of a file with either: safetensors
            by the name ``.safetensors`` (needs the safetensors library), everything else by
            ``torch.load(weights_only=True)`` onto the CPU. The names may have any prefix in common ("module.",
            "_orig_mod.", "model.", "backbone.", ...) and what torch.compile and FSDP put into their middle; both are
            taken off, and what lies outside the prefix is left out.
        use_ema: prefer averaged weights, as timm's loader does: those under a key such as "state_dict_ema" or
            "model_ema". False leaves them out.
        prefix: which model to take where ``checkpoint`` holds several, a student and its teacher say; the error that
            asks for it names them. Either the prefix of the names ("model.") or the whole way to them
            ("state_dict.model"). Without it timm's order decides between "state_dict" and "model".

    Raises:
        TypeError: ``checkpoint`` is neither a dictionary nor a path; a model, for instance.
        FileNotFoundError: there is no such file; a ValueError as well.
        ValueError: there is no NesT in ``checkpoint`` or more than one, or the file cannot be read.
        ModuleNotFoundError: a ``.safetensors`` file without safetensors.

    Source: timm, ``models/_helpers.py`` (``load_state_dict`` and ``clean_state_dict``).
    """
    return _timm_state("checkpoint", checkpoint, use_ema, prefix)


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of :class:`nest_fast.NesT` in timm's format: the inverse of :func:`from_timm`.

    Raises:
        TypeError: ``state_dict`` is no dictionary.
        ValueError: the model is multi-query, which timm has not, or ``state_dict`` is not ``NesT``'s.
    """
    found = _timm_state("state_dict", state_dict)
    for key, value in found.items():
        if key.endswith(".attn.qkv.weight") and value.shape[0] != 3 * value.shape[1]:
            raise ValueError(f"state_dict: expected multi-head attention, all that timm has, got multi-query in {key}")
    return found


def from_jax(
    tree: Mapping[str, Any] | str | PathLike[str],
    depths: tuple[int, ...] | None = None,
    *,
    use_ema: bool = True,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """The authors' parameters as a float32 state dict for :class:`nest_fast.NesT`.

    The model to load it into has ``padding="same"``, ``gelu="tanh"`` and, for their 32 px models, ``multi_query=True``.

    Args:
        tree: nested dictionaries as flax has them, flat ones with "/" in their names, the path of an ``.npz`` with such
            names, or of a flax msgpack checkpoint (needs flax). The parameters may lie at any depth; of several trees
            alike, as optimizers hold them, the one called "params", "target" or "param" is taken.
        depths: layers of each level. None reads them off the widths; levels of the same width share evenly.
        use_ema, prefix: as for :func:`from_timm`; ways are joined by dots here too ("optimizer.target").

    Raises:
        TypeError: ``tree`` is neither a dictionary nor a path.
        FileNotFoundError: there is no such file; a ValueError as well.
        ValueError: no NesT parameters are found, or several, or ``depths`` does not fit them, or the file cannot be
            read.
        ModuleNotFoundError: a msgpack file without flax.

    Source: github.com/google-research/nested-transformer, ``models/nest_net.py`` and ``libml/self_attention.py``.
    """
    params = _jax_params(tree, use_ema, prefix)
    try:
        return _from_jax_params(params, depths)
    except KeyError as error:
        raise ValueError(f"tree: expected all of NesT's parameters, got none called {error}") from error


def _from_jax_params(params: Mapping[str, Any], depths: tuple[int, ...] | None) -> dict[str, Tensor]:
    out = _jax_affine("patch_embed.proj", params["PatchEmbedding_0"]["Conv_0"])
    num_levels = sum(key.startswith("PositionEmbedding_") for key in params)
    depths = _jax_depths(params, num_levels) if depths is None else depths
    num_layers = sum(key.startswith("EncoderNDBlock_") for key in params)
    if len(depths) != num_levels or sum(depths) != num_layers:
        raise ValueError(f"depths: expected {num_levels} levels with {num_layers} layers in all, got {depths}")
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
        raise ValueError(f"pos_embed: expected a square grid of blocks, got T = {T}")
    if old_block_size is None:
        old_block_size = (math.isqrt(N), math.isqrt(N))
    if old_block_size[0] * old_block_size[1] != N:
        raise ValueError(f"old_block_size: expected height * width = N = {N} tokens, got {old_block_size}")
    image = unblockify(pos_embed, edge, old_block_size).permute(0, 3, 1, 2).float()
    size = (grid_size[0] * block_size[0], grid_size[1] * block_size[1])
    image = F.interpolate(image, size, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return blockify(image.permute(0, 2, 3, 1), block_size)


class _Model(NamedTuple):
    """Where a model was found: the keys that lead to a dictionary, and the prefix of the names in it."""

    way: tuple[str, ...]
    prefix: str
    state: Mapping[str, Any]

    @property
    def place(self) -> str:
        return ".".join((*self.way, *self.prefix.split("."))).rstrip(".")


class _NoFileError(FileNotFoundError, ValueError):
    """No file at a path: what ``open`` would raise, and what every other checkpoint without a NesT raises."""


def _timm_state(name: str, tree: Any, use_ema: bool = True, prefix: str | None = None) -> dict[str, Tensor]:
    if isinstance(tree, (str, PathLike)):
        tree = _read_torch(name, os.fspath(tree))
    expected = f"{name}: expected the state dict of a timm Nest"
    if isinstance(tree, nn.Module):
        raise TypeError(f"{expected}, got a {type(tree).__name__}; give its state_dict()")
    _check_mapping(expected, tree)
    models = list(_find(tree, _timm_prefixes))
    if not models:
        model = next((key for key, value in tree.items() if isinstance(value, nn.Module)), None)
        if model is not None:
            raise TypeError(f"{expected}, got a {type(tree[model]).__name__} under {model!r}; give its state_dict()")
        hint = "; nest_fast.weights.from_jax reads it" if _mentions(tree, "PatchEmbedding_0") else ""
        raise ValueError(f"{expected}, got names such as {list(tree)[:3]}{hint}")
    model = _choose(name, models, ("state_dict", "model"), use_ema, prefix)
    # A longer prefix in the same dictionary belongs to another model.
    others = tuple(m.prefix for m in models if m.state is model.state and len(m.prefix) > len(model.prefix))
    found: dict[str, Tensor] = {}
    for key, value in model.state.items():
        if key.startswith(model.prefix) and not key.startswith(others):
            clean = ".".join(part for part in key[len(model.prefix) :].split(".") if part not in _WRAPPERS)
            if clean in found:
                raise ValueError(f"{name}: expected one tensor for {clean}, got a second one as {key}")
            found[clean] = value
    return found


def _check_mapping(expected: str, tree: object) -> None:
    if not isinstance(tree, Mapping):
        raise TypeError(f"{expected}, in a dictionary or at the path of a file, got {type(tree).__name__}")


def _timm_prefixes(tree: Mapping[Any, Any]) -> list[str]:
    found = set()
    for key, value in tree.items():
        if isinstance(key, str) and key.endswith(_TIMM_NAME[-1]) and isinstance(value, Tensor):
            parts = key.split(".")
            names = [i for i, part in enumerate(parts) if part not in _WRAPPERS]
            if tuple(parts[i] for i in names[-3:]) == _TIMM_NAME:
                found.add("".join(f"{part}." for part in parts[: names[-3]]))
    return sorted(found)


def _jax_prefixes(tree: Mapping[Any, Any]) -> list[str]:
    return [""] if isinstance(tree.get("PatchEmbedding_0"), Mapping) else []


def _mentions(tree: Mapping[Any, Any], word: str) -> bool:
    return any(
        word in str(key) or (isinstance(value, Mapping) and _mentions(value, word)) for key, value in tree.items()
    )


def _find(
    tree: Mapping[Any, Any], prefixes: Callable[[Mapping[Any, Any]], list[str]], way: tuple[str, ...] = ()
) -> Iterator[_Model]:
    """Every model that ``tree`` holds, by the ``prefixes`` of the names in a dictionary."""
    for prefix in prefixes(tree):
        yield _Model(way, prefix, tree)
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _find(value, prefixes, (*way, str(key)))


def _choose(name: str, models: list[_Model], order: tuple[str, ...], use_ema: bool, prefix: str | None) -> _Model:
    """The one model that ``prefix`` names, ``use_ema`` asks for and, where that leaves several, ``order`` prefers."""
    chosen = models
    if prefix is not None:
        chosen = [m for m in models if prefix.rstrip(".") in (m.place, m.prefix.rstrip("."))]
    if len(chosen) > 1 or (prefix is None and not use_ema):
        averaged = [m for m in chosen if any("ema" in key.lower().split("_") for key in m.way)]
        plain = [m for m in chosen if m not in averaged]
        if not use_ema and not plain:
            places = ", ".join(repr(m.place) for m in averaged)
            raise ValueError(f"use_ema: expected True, since {name} holds averaged weights alone ({places}), got False")
        chosen = averaged if use_ema and averaged else plain
    for key in order:
        if len(chosen) > 1:
            chosen = [m for m in chosen if m.way[-1:] == (key,)] or chosen
    if len(chosen) != 1:
        places = ", ".join(repr(m.place) for m in models)
        raise ValueError(f"prefix: expected one of {places}, since {name} holds these models, got {prefix!r}")
    return chosen[0]


def _check_file(name: str, path: str) -> None:
    if not os.path.exists(path):
        raise _NoFileError(f"{name}: expected the path of a file, got {path!r}, where there is none")
    if os.path.isdir(path):
        raise ValueError(f"{name}: expected the path of a file, got the directory {path!r}")


def _reason(error: Exception) -> str:
    """The one sentence of a reader's error that says what was wrong."""
    found = re.search(r"WeightsUnpickler error: \s*(\S.*)", str(error))
    text = found[1] if found else str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


def _read_torch(name: str, path: str) -> Any:
    _check_file(name, path)
    if path.endswith((".npz", ".flax", ".msgpack")):
        raise ValueError(f"{name}: expected a file of PyTorch's, got {path!r}; nest_fast.weights.from_jax reads it")
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{name}: expected the safetensors library (pip install safetensors) to read {path!r}, got none"
            ) from error
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{name}: expected a safetensors file, got {path!r}: {_reason(error)}") from error
    try:
        # timm's training script saves its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling arbitrary bytes raises anything
        more = "; where you trust it, give what torch.load(path, weights_only=False) returns" * ("GLOBAL" in str(error))
        raise ValueError(
            f"{name}: expected tensors as torch.save writes them or a .safetensors file, got {path!r}:"
            f" {_reason(error)}{more}"
        ) from error


def _read_jax(path: str) -> Any:
    _check_file("tree", path)
    if path.endswith((".pth", ".pt", ".bin", ".ckpt", ".safetensors")):
        raise ValueError(f"tree: expected an .npz or flax file, got {path!r}; nest_fast.weights.from_timm reads it")
    if path.endswith(".npz"):
        import numpy as np

        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except Exception as error:
            raise ValueError(f"tree: expected an .npz file, got {path!r}: {_reason(error)}") from error
    try:
        from flax.serialization import msgpack_restore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"tree: expected flax (pip install flax) to read {path!r}, got none") from error
    with open(path, "rb") as file:
        content = file.read()
    try:
        return msgpack_restore(content)
    except Exception as error:
        raise ValueError(f"tree: expected a flax checkpoint, got {path!r}: {_reason(error)}") from error


def _nested(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """``tree`` with every "/" in a name made a dictionary, at any depth."""
    nested: dict[str, Any] = {}
    for path, value in tree.items():
        *parents, name = str(path).split("/")
        node = nested
        for parent in parents:
            node = _child(node, parent)
        if isinstance(value, Mapping):
            _child(node, name).update(_nested(value))
        else:
            node[name] = value
    return nested


def _child(node: dict[str, Any], name: str) -> dict[str, Any]:
    child = node.setdefault(name, {})
    if not isinstance(child, dict):
        raise ValueError(f"tree: expected names below {name!r} or a value there, got both")
    return child


def _jax_params(tree: Any, use_ema: bool, prefix: str | None) -> Mapping[str, Any]:
    if isinstance(tree, (str, PathLike)):
        tree = _read_jax(os.fspath(tree))
    expected = "tree: expected NesT's parameters with a PatchEmbedding_0"
    _check_mapping(expected, tree)
    models = list(_find(_nested(tree), _jax_prefixes))
    if not models:
        hint = "; nest_fast.weights.from_timm reads it" if list(_find(tree, _timm_prefixes)) else ""
        raise ValueError(f"{expected}, got names such as {sorted(map(str, tree))[:5]}{hint}")
    params = _choose("tree", models, ("params", "target", "param"), use_ema, prefix).state
    shape = getattr(params["PatchEmbedding_0"].get("Conv_0", {}).get("kernel"), "shape", ())
    if len(shape) != 4:  # five: pmap's copies, one for each device
        raise ValueError(f"tree: expected PatchEmbedding_0's kernel (h, w, in, out), unreplicated, got shape {shape}")
    return params


def _jax_depths(params: Mapping[str, Any], num_levels: int) -> tuple[int, ...]:
    levels = [params[f"PositionEmbedding_{i}"]["pos_embedding"].shape[-1] for i in range(num_levels)]
    num_layers = sum(key.startswith("EncoderNDBlock_") for key in params)
    layers = [params[f"EncoderNDBlock_{j}"]["LayerNorm_0"]["scale"].shape[-1] for j in range(num_layers)]
    level_runs = [(width, len(list(run))) for width, run in groupby(levels)]
    layer_runs = [(width, len(list(run))) for width, run in groupby(layers)]
    if [width for width, _ in level_runs] != [width for width, _ in layer_runs]:
        raise ValueError(f"depths: expected one value a level, since widths {levels} do not tell them, got None")
    depths: list[int] = []
    for (_, in_levels), (width, in_layers) in zip(level_runs, layer_runs, strict=True):
        if in_layers % in_levels:
            raise ValueError(
                f"depths: expected one value a level, since {in_layers} layers of width {width} do not share evenly"
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
