"""Host time of launches and of an eager layer: a command, which prints JSON for bench_host.py.

Everything but the kernels runs, over the CUDA driver of scripts/stub_driver.py, which launches nothing: no GPU is
needed, and none waited for. The tensors are the CPU's and small enough for plain PyTorch, which does compute, to take
little longer than its dispatch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The operations take CPU tensors because the interpreter would; the launches then find that there is none.
os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch import nn
from torch.nn import functional as F

from nest_fast import add_layer_norm, bias_gelu, block_attention, fusion, layer_norm_mean, modules, reference

del os.environ["TRITON_INTERPRET"]
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import stub_driver

from nest_fast.kernels import _launch
from nest_fast.kernels.add_layer_norm import add_layer_norm_fwd
from nest_fast.kernels.bias_gelu import bias_gelu_fwd
from nest_fast.kernels.block_attention import block_attention_fwd
from nest_fast.kernels.layer_norm_mean import layer_norm_mean_fwd

ROUNDS, CALLS, LAYERS = 40, 25, 4
Peers = dict[str, Callable[[], Any]]  # the yardstick first


def launches() -> dict[str, Peers]:
    """A launcher alone, the operation around it with checks and dispatch, and plain PyTorch."""
    x, vector = torch.randn(1, 1, 16, 32), torch.randn(32)
    q, k, v = torch.randn(1, 1, 16, 6, 16).split(2, 3)
    dtype = x.dtype
    return {
        "add_layer_norm": {
            "torch": lambda: reference.add_layer_norm(x, x, vector, vector),
            "nest_fast launch": lambda: add_layer_norm_fwd(x, x, None, None, vector, vector, 1e-6, dtype, dtype),
            "nest_fast": lambda: add_layer_norm(x, x, vector, vector, impl="triton"),
        },
        "bias_gelu": {
            "torch": lambda: reference.bias_gelu(x, vector),
            "nest_fast launch": lambda: bias_gelu_fwd(x, vector, dtype, False),
            "nest_fast": lambda: bias_gelu(x, vector, impl="triton"),
        },
        "block_attention": {
            "torch": lambda: reference.block_attention(q, k, v),
            "nest_fast launch": lambda: block_attention_fwd(q, k, v, None, None, 0.25),
            "nest_fast": lambda: block_attention(q, k, v, impl="triton"),
        },
        "layer_norm_mean": {
            "torch": lambda: reference.layer_norm_mean(x, vector, vector),
            "nest_fast launch": lambda: layer_norm_mean_fwd(x, vector, vector, 1e-6, dtype),
            "nest_fast": lambda: layer_norm_mean(x, vector, vector, impl="triton"),
        },
    }


def layer() -> dict[str, Peers]:
    """An eager pre-norm layer as on a GPU, chained with its neighbours, and the same in plain PyTorch."""
    layers = nn.Sequential(*(modules.TransformerLayer(32, 2) for _ in range(LAYERS))).eval()
    x = torch.randn(1, 1, 16, 32)
    fusion.is_chained = lambda x: True
    names = ("add_layer_norm", "bias_gelu", "block_attention", "linear")
    ops: dict[str, Any] = {name: sys.modules[f"nest_fast.ops.{name}"] for name in names}
    ops["add_layer_norm"].choose_pass = ops["bias_gelu"].choose_pass = _as_on_a_gpu
    attention = ops["block_attention"].BACKENDS["triton"]
    ops["block_attention"].choose = lambda given: _as_on_a_gpu("", attention, given)
    ops["linear"].choose = lambda given: "parts"
    fusion.run_layers(x, layers, modules.KNOWN)
    launched = {table.__name__ for table, *_ in _launch.CHOSEN}
    assert launched >= {"layer_norm", "attention", "bias_gelu"}, f"not chained: {launched}"
    return {
        "layer": {
            "torch": lambda: [_plain(x, one) for one in layers],
            "nest_fast": lambda: fusion.run_layers(x, layers, modules.KNOWN),
        }
    }


def _as_on_a_gpu(op: str, triton: Any, given: Any) -> str:
    return "triton" if triton.can(given) else "reference"


def _plain(x: torch.Tensor, layer: Any) -> torch.Tensor:
    norm1, attn, norm2, mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp
    y = F.layer_norm(x, (32,), norm1.weight, norm1.bias)
    q, k, v = F.linear(y, attn.qkv.weight, attn.qkv.bias).view(1, 1, 16, 3, 2, 16).permute(3, 0, 1, 4, 2, 5)
    y = F.scaled_dot_product_attention(q[0], k[0], v[0]).transpose(1, 2).reshape(1, 1, 16, 32)
    x = x + F.linear(y, attn.proj.weight, attn.proj.bias)
    y = F.layer_norm(x, (32,), norm2.weight, norm2.bias)
    return x + F.linear(F.gelu(F.linear(y, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)


def measure(peers: Peers, calls: int, each: int) -> dict[str, list[float]]:
    """Seconds of this thread that a call takes, in rounds where the peers take turns."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        call()
    for _ in range(ROUNDS):
        for name, call in peers.items():
            start = time.thread_time()
            for _ in range(calls):
                call()
            found[name].append((time.thread_time() - start) / (calls * each))
    return found


def main() -> None:
    torch.set_num_threads(1)
    with stub_driver.stub(90), torch.no_grad():
        times = {name: measure(peers, 2, LAYERS) for name, peers in layer().items()}
        times |= {name: measure(peers, CALLS, 1) for name, peers in launches().items()}
    print(json.dumps(times))


if __name__ == "__main__":
    main()
