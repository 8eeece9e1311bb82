"""The report of a benchmark run: tables to read, an HTML page, the project's figures, a comparison of two runs.

    python benchmarks/report.py RUN.json [--out DIR] [--publish MACHINE] [--against OLDER.json]

RUN.json is what ``pytest benchmarks/ --benchmark-only --benchmark-json=RUN.json`` wrote. ``--publish`` keeps it as
benchmarks/results/MACHINE/<its date>.json and makes all that the project says of its speed from what is kept there:
README's rows and pictures from this run, the tables in benchmarks/results/README.md from every machine's newest.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from charts import html, picture
from runs import (
    ACCELERATED,
    FROZEN,
    NEST,
    OTHERS,
    Row,
    Run,
    Table,
    aligned,
    best_other,
    filled,
    full,
    headline_tables,
    images_per_second,
    load,
    markdown,
    notes,
    shown_cases,
    times,
    with_spread,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# A ratio that fell by more than this, and by more than the rounds of both runs spread, is a regression.
REGRESSION = 0.1


def page(run: Run, heading: str = "##") -> str:
    """The short tables of ``run``, then every peer of every case behind a fold."""
    parts = [run.where, notes(run)]
    for title, table in headline_tables(run):
        parts += [f"{heading} {title}", markdown(table)]
    parts += [f"{heading} Every peer", "<details><summary>All ways to compute each case</summary>"]
    for rows in run.cases() + run.cases(axis=True):
        parts += [f"**{rows[0].title}**", markdown(full(run, rows))]
    return "\n\n".join([*parts, "</details>"]) + "\n"


# --- what the project says of its speed -------------------------------------------------------------------------------


OURS = {ACCELERATED: "`accelerate(timm)`", FROZEN: "and `freeze`", NEST: "`nest_fast.NesT`"}
BESIDE = {"timm": "NesT, timm", ACCELERATED: "NesT, `accelerate`"}


def publish(source: Path, machine: str) -> list[Path]:
    """Keep the run ``source`` as one of ``machine`` and write what is made of it; returns the files."""
    run = load(source)
    kept = RESULTS / machine / f"{run.date[:10]}.json"
    if source.resolve() != kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, kept)
    light, dark = RESULTS / "speed-light.svg", RESULTS / "speed-dark.svg"
    light.write_text(picture(run, dark=False))
    dark.write_text(picture(run, dark=True))
    own, beside = shown_cases(run)
    replace_marked(ROOT / "README.md", "speed", summary(run, own))
    replace_marked(ROOT / "README.md", "swin", paper(beside))
    newest = [max(folder.glob("????-??-??.json")) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    tables = [f"## {path.parent.name}\n\n{page(load(path), '###')}" for path in newest]
    replace_marked(RESULTS / "README.md", "tables", "\n".join(tables))
    return [kept, light, dark, ROOT / "README.md", RESULTS / "README.md"]


def replace_marked(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers ``name`` of ``path``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = path.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        sys.exit(f"{path}: expected the markers {begin!r} and {end!r} once each")
    before, _, rest = old.partition(begin)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}")


def summary(run: Run, cases: list[list[Row]]) -> str:
    """README's first: the picture, and a row for each way to run NesT-T."""
    folder = RESULTS.relative_to(ROOT).as_posix()
    where = "a GPU" if "gpu" in run.machine else f"{run.machine['threads']} CPU threads"
    said = [f"{rows[0].label} {times(row.ratio)}" for rows in cases for row in rows if row.peer == ACCELERATED]
    return f"""
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{folder}/speed-dark.svg">
<img src="{folder}/speed-light.svg" width="520" alt="NesT-T accelerated, relative to timm: {"; ".join(said)}">
</picture>

{markdown(compared(cases, f"NesT-T, 224 px, {where}", "timm", OURS))}

<sub>Medians of pairs timed one after the other, with their quartiles. {run.where}</sub>
"""


def paper(cases: list[list[Row]]) -> str:
    """The paper's comparison; nothing where it was not measured."""
    return markdown(compared(cases, "NesT beside Swin", "Swin", BESIDE)) if cases else ""


def compared(cases: list[list[Row]], title: str, yardstick: str, peers: dict[str, str]) -> Table:
    """A line for each case: the yardstick's images per second, then how many times as fast each of ``peers`` is, and
    the fastest that is not ours."""
    table = [[title, yardstick, *peers.values(), "best of all others"]]
    for rows in cases:
        by_peer = {row.peer: row for row in rows}
        cells = [with_spread(by_peer[peer]) if peer in by_peer else "" for peer in peers]
        best = best_other(rows)
        if best is None or best.peer in (best.yardstick, *peers):
            cells.append("")
        else:
            cells.append(f"{OTHERS.get(best.peer, best.peer)} {with_spread(best)}")
        speed = images_per_second(rows[0].items / (rows[0].seconds * rows[0].ratio))
        # Quartiles below the median, so that all columns fit a page.
        words = (cell.replace(" (", "<br>(").replace(" ", "&nbsp;") for cell in (speed, *cells))
        table.append([rows[0].label, *words])
    return filled(table)


# --- two runs ---------------------------------------------------------------------------------------------------------


def compare(new: Run, old: Run) -> tuple[Table, bool]:
    """What became slower or faster against its yardstick by more than noise, and whether anything became slower."""
    before = {(row.key, row.peer, row.device): row for row in old.rows}
    table = [["case", "", "was", "is", "change", ""]]
    for row in new.rows:
        past = before.get((row.key, row.peer, row.device))
        if past is None or row.peer == row.yardstick or row.limit:
            continue
        change = row.ratio / past.ratio
        if abs(change - 1) > max(REGRESSION, row.spread + past.spread):
            verdict = "faster" if change > 1 else "slower"
            if verdict == "slower" and row.ours:
                verdict = "REGRESSION"
            percent = f"{100 * (change - 1):+.0f} %"
            table.append([row.title, row.peer, times(past.ratio), times(row.ratio), percent, verdict])
    return table, any(line[-1] == "REGRESSION" for line in table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the JSON of a run")
    parser.add_argument("--out", type=Path, help="folder for table.md and report.html")
    parser.add_argument("--publish", metavar="MACHINE", help="keep the run under this name; write what is made of it")
    parser.add_argument("--against", type=Path, help="an older run; the exit status is 1 if something regressed")
    args = parser.parse_args()
    run = load(args.run)
    print(run.where)
    for title, table in headline_tables(run):
        print(f"\n{title}\n{aligned(table)}")
    print(f"\n{notes(run)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in (("table.md", f"# Benchmarks\n\n{page(run)}"), ("report.html", html(run))):
            (args.out / name).write_text(text)
            print(args.out / name)
    if args.publish:
        print(*publish(args.run, args.publish), sep="\n")
    if args.against is None:
        return 0
    table, regressed = compare(run, load(args.against))
    print(f"\nAgainst {args.against}\n{aligned(table)}" if len(table) > 1 else f"\nAs fast as {args.against}")
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
