"""Training as people do it: mixed precision, checkpointing, data parallel, sharded; each against the plain step."""

import copy
import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import nest_fast
from nest_fast.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "img_size": 32,
    "embed_dims": (24, 48),
    "num_heads": (2, 4),
    "depths": (1, 2),
    "num_levels": 2,
    "num_classes": 5,
}
create = functools.partial(nest_fast.NesT, **SIZES, patch_size=2, drop_path_rate=0.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create().to(DEVICE).train()


def batch(n=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 32, 32, generator=generator).to(DEVICE), torch.arange(n, device=DEVICE) % 5


def gradients_of(model, images, labels, **autocast):
    with torch.autocast(DEVICE, **autocast) if autocast else torch.enable_grad():
        loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_mixed_precision(model, dtype):
    """Parameters and gradients stay float32, the loss falls, gradients are as exact as PyTorch's own."""
    images, labels = batch()
    plain = create(impl="reference").to(DEVICE).train()
    plain.load_state_dict(model.state_dict())
    exact = gradients_of(copy.deepcopy(plain).double(), images.double(), labels)
    ours, theirs = (gradients_of(copy.deepcopy(m), images, labels, dtype=dtype) for m in (model, plain))
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        with torch.autocast(DEVICE, dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_checkpointing_computes_again_what_it_dropped(model):
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    wanted = gradients_of(model, *batch())
    torch.testing.assert_close(gradients_of(other, *batch()), wanted, rtol=1e-5, atol=1e-7)


WORKER = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_training import batch, create, gradients_of

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{{path}}", rank=rank, world_size=2)
images, labels = batch()
half = slice(3 * rank, 3 * rank + 3)
for how in ("ddp", "fsdp2"):
    torch.manual_seed(0)
    model = create().train()
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for level in model.levels:
            for layer in level.transformer_encoder:
                fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    torch.nn.functional.cross_entropy(wrapped(images[half]), labels[half]).backward()
    full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    if rank == 0:
        torch.save(torch.cat([g.flatten() for g in full]), f"{{path}}.{{how}}")
dist.destroy_process_group()
"""


def test_two_processes_find_the_gradients_of_one(tmp_path):
    """Halves of the batch in two processes: gradients averaged (DDP), or sharded as the parameters are, too (FSDP2)."""
    code = textwrap.dedent(WORKER.format(folder=os.path.dirname(__file__)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    torch.manual_seed(0)
    images, labels = batch()
    wanted = gradients_of(create().train(), images.cpu(), labels.cpu())
    for how in ("ddp", "fsdp2"):
        torch.testing.assert_close(torch.load(tmp_path / f"store.{how}"), wanted, rtol=1e-4, atol=1e-6)
