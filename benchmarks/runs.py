"""A saved benchmark run: its rows, and the tables made of them.

All rows of a case are told in one minute's speed. Each peer was timed in pairs with the yardstick, so what is measured
is the ratio; the yardstick's time is the median over all pairs of the case, and a peer's is that time over its ratio.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# What a user gets, as against the single implementations.
ACCELERATED, FROZEN, NEST = "nest_fast accelerate", "nest_fast accelerate and freeze", "nest_fast NesT"
HEADLINE = ("nest_fast", ACCELERATED, FROZEN, NEST)
# What people call the models; the paper sets NesT beside Swin.
MODELS = {
    "nest_tiny": "NesT-T",
    "nest_small": "NesT-S",
    "nest_base": "NesT-B",
    "swin_tiny": "Swin-T",
    "swin_base": "Swin-B",
}


@dataclass(frozen=True)
class Row:
    """One peer of one case; errors relative to float64, ``ratio`` of the yardstick's time to the peer's.

    ``flops`` are those of the definition, ``done`` those of the peer. ``best`` is the best of its rounds, between which
    the processor's limits were ``rate`` and, for the case's bytes, ``bandwidth``; 0 where that was not measured.
    """

    op: str
    case: str
    batch: int
    dtype: str
    direction: str
    axis: str
    x: int
    peer: str
    yardstick: str
    device: str
    limit: bool
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    errors: list[float]
    yardstick_errors: list[float]
    bytes: int
    flops: int
    items: int
    memory: int
    best: float = 0.0
    done: int = 0
    rate: float = 0.0
    bandwidth: float = 0.0

    @property
    def ours(self) -> bool:
        return self.peer.startswith("nest_fast")

    @property
    def key(self) -> tuple[str, str, int, str, str, str]:
        return self.op, self.case, self.batch, self.dtype, self.direction, self.axis

    @property
    def beside(self) -> bool:
        """Whether the yardstick is another model, not this one computed otherwise."""
        return self.yardstick in MODELS

    @property
    def title(self) -> str:
        return f"{self.op}, {self.case}, batch {self.batch}, {self.dtype}, {self.direction}"

    @property
    def label(self) -> str:
        """Of a model: what is done, and by which one if two are compared."""
        models = [f"{MODELS[self.op]} / {MODELS[self.yardstick]}"] if self.beside else []
        drop_path = ["drop path"] if "drop path" in self.case else []
        return ", ".join([*models, f"{self.direction} {self.dtype}", f"batch {self.batch}", *drop_path])

    @property
    def speed(self) -> str:
        """Images per second of a model, the time of an operation."""
        return images_per_second(self.items / self.seconds) if self.items else duration(self.seconds)

    @property
    def spread(self) -> float:
        return (self.ratio_high - self.ratio_low) / (2 * self.ratio)


@dataclass(frozen=True)
class Run:
    """A saved run: its rows, the machine, and the ceilings measured with it, each by its best round.

    ``peaks`` are those of our own loops: what they do → threads → FLOP/s or bytes/s. ``bandwidth`` and ``matmul`` are
    PyTorch's, by dtype.
    """

    rows: list[Row]
    machine: dict
    commit: dict
    date: str
    bandwidth: dict[str, float]
    matmul: dict[str, float]
    peaks: dict[str, dict[int, float]]

    def cases(self, axis: bool = False) -> list[list[Row]]:
        """The rows of each case, the points of scaling curves apart."""
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            if bool(row.axis) == axis:
                found.setdefault(row.key, []).append(row)
        return list(found.values())

    def of_peak(self, row: Row) -> str:
        """The time of its products, or of its bytes, at the peak, as a share of its best; "" where none is known.

        The peak is our own loops', measured between its rounds, and on a GPU that of PyTorch's matmul and copy.
        """
        if row.rate:
            least = max(row.done / row.rate, row.bytes / row.bandwidth if row.bandwidth else 0.0)
        elif row.device == "cuda" and row.dtype in self.bandwidth and row.dtype in self.matmul:
            least = max(row.bytes / self.bandwidth[row.dtype], row.flops / self.matmul[row.dtype])
        else:
            return ""
        return f"{100 * least / row.best:.0f} %" if least else ""

    @property
    def where(self) -> str:
        machine = self.machine
        cpu = f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}"
        if not machine.get("onednn_bf16", True):
            cpu += " (oneDNN without bf16, which is not measured)"
        elif machine.get("extension_isa") in ("avx2", "avx512"):
            cpu += " (no instructions for bf16, in which PyTorch is slower than in fp32)"
        chip = machine.get("gpu") or cpu
        dirty = " with changes" if self.commit.get("dirty") else ""
        versions = f"torch {machine['torch']}, timm {machine['timm']}, Python {machine['python']}"
        return f"{chip}; {versions}; commit {self.commit.get('id', 'unknown')[:10]}{dirty}; {self.date[:10]}"


def load(path: Path) -> Run:
    data = json.loads(path.read_text())
    rows, bandwidth, matmul = [], {}, {}
    peaks: dict[str, dict[int, float]] = {}
    yardsticks: dict[tuple, list[float]] = {}
    for benchmark in data["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        if info["op"] == "peak":
            peaks.setdefault(info["case"], {})[info["threads"]] = info["rate"]
            continue
        known = {name: info[name] for name in Row.__annotations__ if name in info}
        row = Row(seconds=0.0, best=stats["min"], **known)
        if row.op == "copy":
            bandwidth[row.dtype] = row.bytes / stats["min"]
        elif row.op == "matmul":
            matmul[row.dtype] = row.flops / stats["min"]
        else:
            rows.append(row)
            yardsticks.setdefault(row.key, []).append(info["yardstick_seconds"])
    rows = [replace(row, seconds=statistics.median(yardsticks[row.key]) / row.ratio) for row in rows]
    return Run(rows, data["machine_info"], data["commit_info"], data["datetime"], bandwidth, matmul, peaks)


# --- numbers ----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    scale, unit = next((s for s in ((1.0, "s"), (1e-3, "ms")) if seconds >= s[0]), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"


def images_per_second(value: float) -> str:
    return f"{value:,.0f} img/s" if value >= 100 else f"{value:#.3g} img/s"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def with_spread(row: Row) -> str:
    if row.peer == row.yardstick:
        return "1"
    return f"{times(row.ratio)} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"


def error(values: Sequence[float]) -> str:
    return f"{max(values):.0e}" if values else ""


def memory(row: Row) -> str:
    return f"{row.memory / 2**20:,.0f} MiB" if row.memory else ""


def best_other(rows: Iterable[Row]) -> Row | None:
    """The fastest peer that is not ours and computes the same."""
    return max((row for row in rows if not row.ours and not row.limit), key=lambda row: row.ratio, default=None)


# --- tables: a list of rows, the first one the head -------------------------------------------------------------------

Table = list[list[str]]


def filled(table: Table) -> Table:
    """Without the columns that have nothing below their head."""
    columns = [i for i in range(len(table[0])) if len(table) == 1 or any(line[i] for line in table[1:])]
    return [[line[i] for i in columns] for line in table]


def short(run: Run, models: bool) -> Table:
    """What a user gets, one line for each case and way to get it."""
    table = [["case", "", "speed", "against", "torch.compile", "best other", "error (its)", "of peak"]]
    for rows in run.cases():
        other, compiled = best_other(rows), best_other(row for row in rows if "compile" in row.peer)
        for row in rows:
            if row.peer not in HEADLINE or bool(row.items) != models:
                continue
            table.append(
                [
                    row.title,
                    row.peer,
                    row.speed,
                    f"{row.yardstick}: {with_spread(row)}",
                    times(row.ratio / compiled.ratio) if compiled else "",
                    f"{other.peer}: {times(row.ratio / other.ratio)}" if other else "",
                    f"{error(row.errors)} ({error(row.yardstick_errors)})",
                    run.of_peak(row),
                ]
            )
    return filled(table)


def full(run: Run, rows: list[Row]) -> Table:
    """Every peer of one case."""
    other = best_other(rows)
    table = [["", "speed", f"against {rows[0].yardstick}", "against best other", "error", "memory", "of peak"]]
    for row in sorted(rows, key=lambda row: -row.ratio):
        table.append(
            [
                row.peer + (" (limit)" if row.limit else ""),
                row.speed,
                with_spread(row),
                times(row.ratio / other.ratio) if other and row.ours else "",
                error(row.errors),
                memory(row),
                run.of_peak(row),
            ]
        )
    return filled(table)


def scaling(run: Run) -> Table:
    """The points of the scaling curves: ours beside the yardstick."""
    table = [["case", "over", "at", "yardstick", "", "nest_fast", "that is"]]
    for rows in run.cases(axis=True):
        yardstick = next((row for row in rows if row.peer == row.yardstick), None)
        for row in rows:
            if yardstick is not None and row.ours:
                name = f"{row.op}, {row.dtype}, {row.direction}"
                speeds = [yardstick.peer, yardstick.speed, row.speed, with_spread(row)]
                table.append([name, row.axis, str(row.x), *speeds])
    return table


def aligned(table: Table) -> str:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def ceilings(run: Run) -> Table:
    """What the machine can do at most: our own loops on each number of threads, and PyTorch's copy and matmul."""
    threads = sorted({count for rates in run.peaks.values() for count in rates})
    table = [["at most", *(f"{count} thread{'s' if count > 1 else ''}" for count in threads)]]
    for what, rates in run.peaks.items():
        unit = "GB/s" if "MiB" in what else "GFLOP/s"
        table.append([what, *(f"{rates[count] / 1e9:,.1f} {unit}" if count in rates else "" for count in threads)])
    return table


def headline_tables(run: Run) -> list[tuple[str, Table]]:
    found = (
        ("Models", short(run, models=True)),
        ("Operations", short(run, models=False)),
        ("Scaling", scaling(run)),
        ("The processor", ceilings(run)),
    )
    return [(title, table) for title, table in found if len(table) > 1]


# What people call the other peers.
OTHERS = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "timm 4-D": "timm, 4-D",
    "timm compiled": "torch.compile",
}


def shown_cases(run: Run) -> tuple[list[list[Row]], list[list[Row]]]:
    """What README shows: NesT-T against timm's, and NesT beside the models that the paper sets it beside."""
    cases = run.cases()
    own = [rows for rows in cases if rows[0].op == "nest_tiny" and rows[0].yardstick == "timm"]
    return own, [rows for rows in cases if rows[0].beside]


def notes(run: Run) -> str:
    said = [
        "Ratios are medians of pairs timed one after the other, with their quartiles; above 1 is faster. The speed of "
        "the row that the others are set against is the median over all pairs of the case, theirs is that times their "
        "ratio. torch.compile is that of the yardstick in its best mode. Errors are relative L2 distances from "
        "float64, the largest of output and gradients."
    ]
    if run.bandwidth and run.matmul:
        copies = ", ".join(f"{name} {value / 1e9:,.0f} GB/s" for name, value in run.bandwidth.items())
        rates = ", ".join(f"{name} {value / 1e12:,.2f} TFLOP/s" for name, value in run.matmul.items())
        said.append(f"In this run torch's copy reached {copies}, its matmul {rates}.")
    if any(row.rate for row in run.rows):
        said.append(
            "Of peak is a row's best round against the best that loops of our own reach between its rounds: products "
            "in registers, and its bytes read and written, of each thread while it has its processor, added up. "
            "Products are those that are done: of Winograd's convolution 16 where the definition has 36, and none for "
            "samples that are dropped."
        )
    elif "gpu" in run.machine:
        said.append("Of peak is a row's best round against torch's matmul, or its copy.")
    return " ".join(said)
