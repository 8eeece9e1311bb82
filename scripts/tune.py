"""Measure the launch configurations of the attention kernels on this machine's GPU and keep the fastest.

``python scripts/tune.py`` rewrites the rows of this GPU's architecture in the table of kernels/_configs.py.
``--dry-run`` needs no GPU: it lists the candidates, compiles each for ``--architecture`` and says what it costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import kernel_resources
import torch
import triton
from kernel_resources import DTYPES, Case

from nest_fast.kernels import _configs, _launch
from nest_fast.kernels._configs import ANY, ATTENTION, AttentionConfig, AttentionRow
from nest_fast.kernels.block_attention import MAX_HEAD_DIM, block_attention_bwd, block_attention_fwd

OPERANDS = {"half": "bf16", "tf32": "tf32", "ieee": "fp32"}
# What is measured, each for all that is smaller and not covered before: (query rows over the same keys, keys).
SIZES = [(16, 16), (32, 32), (64, 64), (256, 16), (128, 128), (208, 208), (256, 256)]
HEAD_DIMS = [32, 64, 128]
KEPT = 2  # of the fastest: the second is for a Triton that spills with the first
TOLERANCE = {"half": 2e-2, "tf32": 5e-3, "ieee": 1e-4}  # of the largest value, between two configurations


class Job(NamedTuple):
    """Rows of the table to fill: a kernel's, for operands "half", "tf32" or "ieee", "+" with a bias."""

    kernel: str
    operands: str
    rows: int
    keys: int
    head_dim: int

    @property
    def case(self) -> Case:
        stacked = self.rows // self.keys
        return Case(
            kind="fwd" if self.kernel == "fwd" else "bwd",
            N=self.keys,
            head_dim=self.head_dim,
            dtype=OPERANDS[self.operands.rstrip("+")],
            heads=stacked if stacked > 1 else 4,
            kv_heads=1 if stacked > 1 else 4,
            biased=self.operands.endswith("+"),
        )


def jobs(kernels: list[str], operands: list[str]) -> Iterator[Job]:
    for kernel in kernels:
        for kind in operands:
            if kernel != "dbias" or kind.endswith("+"):
                yield from (Job(kernel, kind, rows, keys, d) for d in HEAD_DIMS for rows, keys in SIZES)


def candidates(job: Job) -> list[AttentionConfig]:
    """Configurations worth compiling: no tile larger than the sequence, one program's worth of work at most."""
    tile = max(16, triton.next_power_of_2(job.rows))
    if job.kernel == "dbias":
        return [AttentionConfig(m, m, warps) for m in (16, 32, 64) for warps in (1, 4, 8) if m <= tile]
    resident = "keys" if job.kernel == "fwd" else "queries"
    if job.rows <= 32:
        return [AttentionConfig(tile, tile, warps, resident) for warps in (1, 2, 4)]
    keep = [
        AttentionConfig(*((walked, held) if resident == "keys" else (held, walked)), warps, resident)
        for walked in (16, 32, 64)
        for held in (32, 64, 128)
        for warps in (4, 8)
    ]
    stream = [
        AttentionConfig(m, n, warps, None, stages)
        for m, warps in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8))
        for n in (16, 32, 64)
        for stages in (1, 2)
    ]
    return keep + stream


def use(job: Job, architecture: int, config: AttentionConfig) -> None:
    """Make the launchers take ``config`` for ``job``."""
    _launch.CHOSEN.clear()
    ATTENTION[job.kernel, architecture, job.operands] = [AttentionRow(ANY, ANY, MAX_HEAD_DIM, config)]


def dry_run(job: Job, architecture: int, limit: int | None) -> None:
    """Compile the candidates and print what they cost."""
    for config in candidates(job)[:limit]:
        use(job, architecture, config)
        try:
            with kernel_resources.compiling(architecture) as compiled:
                kernel_resources.launch(job.case)
        except triton.TritonError as error:
            print(f"  {config} does not compile: {type(error).__name__}")
            continue
        for name, kernel, _ in compiled:
            if (job.kernel == "dbias") == name.endswith("dbias"):
                row = kernel_resources.figures(kernel)
                print(f"  {config} {name}", *(f"{k} {v}" for k, v in row.items() if v), flush=True)


def launcher(case: Case) -> Callable[[], tuple]:
    """A call of the launcher on random tensors, q of about 2^25 elements."""
    dtype, N, heads, D = DTYPES[case.dtype], case.N, case.heads, case.head_dim
    B = max(1, 2**25 // (case.blocks * N * heads * D))
    qkv = torch.randn(B, case.blocks, N, heads + 2 * case.kv_heads, D, device="cuda").to(dtype)
    q, k, v = qkv.split([heads, case.kv_heads, case.kv_heads], 3)
    bias = torch.randn(heads, N, N, device="cuda").to(dtype) if case.biased else None
    mask = torch.rand(case.blocks, N, N, device="cuda") < 0.9 if case.biased else None
    if mask is not None:
        mask |= torch.eye(N, dtype=torch.bool, device="cuda")
    forward = (q, k, v, bias, mask, D**-0.5)
    if case.kind == "fwd":
        return lambda: block_attention_fwd(*forward)
    out, lse = block_attention_fwd(*forward)
    dout = torch.randn_like(out)
    return lambda: block_attention_bwd(dout, q, k, v, out, lse, *forward[3:], case.biased)


def measure(job: Job, architecture: int) -> dict[AttentionConfig, float]:
    """Microseconds of every candidate that runs; its results must agree with the shipped configuration's."""
    call = launcher(job.case)
    wanted = [x for x in call() if x is not None]
    allowed = [TOLERANCE[job.operands.rstrip("+")] * x.abs().max() for x in wanted]
    times = {}
    for config in candidates(job):
        use(job, architecture, config)
        try:
            results = [x for x in call() if x is not None]
        except triton.TritonError as error:  # out of registers, shared memory or tensor memory
            print(f"  {config} does not run: {type(error).__name__}")
            continue
        if any((x - y).abs().max() > most for x, y, most in zip(results, wanted, allowed, strict=True)):
            raise RuntimeError(f"{job}: {config} disagrees with the shipped configuration")
        times[config] = statistics.median(triton.testing.do_bench_cudagraph(call, return_mode="all")) * 1e3
    return times


def tune(kernels: list[str], operands: list[str]) -> None:
    """Measure all jobs on the current GPU and write their winners into kernels/_configs.py."""
    architecture = _configs.row_architecture(_configs.architecture())
    shipped, tuned = dict(ATTENTION), {}
    for job in jobs(kernels, operands):
        ATTENTION.clear()
        ATTENTION.update(shipped)
        torch.backends.cuda.matmul.fp32_precision = "tf32" if job.operands.startswith("tf32") else "ieee"
        times = measure(job, architecture)
        ranked = sorted(times, key=times.__getitem__)
        print(f"{job}: {ranked[0]} {times[ranked[0]]:.1f} us, of {len(times)} candidates", flush=True)
        rows = tuned.setdefault((job.kernel, architecture, job.operands), [])
        rows += [AttentionRow(job.rows, job.keys, job.head_dim, config) for config in ranked[:KEPT]]
        if (job.rows, job.keys) == SIZES[-1]:
            # More rows than this are the heads of a multi-query block: only a kernel that keeps none takes any number.
            any_rows = [config for config in ranked if config.resident != "queries"]
            rows += [AttentionRow(ANY, ANY, job.head_dim, config) for config in any_rows[:KEPT]]
    write_table(shipped | tuned)


def write_table(table: dict) -> None:
    """Replace the table's rows in kernels/_configs.py."""

    def line(row: AttentionRow) -> str:
        config = {**row._asdict(), **row.config._asdict()}
        del config["config"]
        if row.config.num_stages == 1:
            del config["num_stages"]
        values = (f"{name}={'ANY' if value == ANY else json.dumps(value)}" for name, value in config.items())
        return f"        _row({', '.join(values).replace('null', 'None')}),\n"

    blocks = []
    for (kernel, architecture, operands), rows in sorted(table.items()):
        blocks += [f'    ("{kernel}", {architecture}, "{operands}"): [\n', *map(line, rows), "    ],\n"]
    path = Path(_configs.__file__)
    lines = path.read_text().splitlines(keepends=True)
    start = next(i for i, text in enumerate(lines) if text.startswith("ATTENTION:")) + 1
    end = next(i for i, text in enumerate(lines) if i > start and text == "}\n")
    path.write_text("".join([*lines[:start], *blocks, *lines[end:]]))


def main() -> None:
    names = [kind + plus for kind in OPERANDS for plus in ("", "+")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=["fwd", "bwd", "dbias"], choices=["fwd", "bwd", "dbias"])
    parser.add_argument("--operands", nargs="+", default=names, choices=names)
    parser.add_argument("--dry-run", action="store_true", help="list and compile the candidates; no GPU needed")
    parser.add_argument("--architecture", type=int, default=90, choices=kernel_resources.TUNED)
    parser.add_argument("--limit", type=int, help="compile at most so many candidates of each")
    args = parser.parse_args()
    if not args.dry_run:
        return tune(args.kernels, args.operands)
    for job in jobs(args.kernels, args.operands):
        print(job)
        dry_run(job, args.architecture, args.limit)


if __name__ == "__main__":
    main()
