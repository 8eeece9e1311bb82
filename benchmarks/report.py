"""The report of a benchmark run: a table to read, table.md, an HTML page, README's tables, a comparison of two runs.

    python benchmarks/report.py RUN.json [--out DIR] [--readme README.md] [--against OLDER.json]

RUN.json is what ``pytest benchmarks/ --benchmark-only --benchmark-json=RUN.json`` wrote. Ratios come from pairs: the
yardstick was timed beside every round of every peer, so they hold on machines whose speed changes by the minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from charts import html
from runs import Run, Table, aligned, full, headline_tables, load, markdown, notes, times

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# A ratio that fell by more than this, and by more than the rounds of both runs spread, is a regression.
REGRESSION = 0.1


def page(run: Run) -> str:
    """table.md: the short tables, then every peer of every case."""
    parts = ["# Benchmarks", run.where, notes(run)]
    for title, table in headline_tables(run):
        parts += [f"## {title}", markdown(table)]
    parts.append("## Every peer")
    for rows in run.cases() + run.cases(axis=True):
        parts += [f"### {rows[0].title}", markdown(full(run, rows))]
    return "\n\n".join(parts) + "\n"


def write_readme(run: Run, path: Path) -> None:
    """Put the short tables, one shape of every operation, between the markers of ``path``."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{path}: wanted the markers {BEGIN!r} and {END!r} once each")
    tables = [markdown(table) for _, table in headline_tables(run, every=False)]
    parts = [BEGIN, run.where, *tables, notes(run), END]
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + "\n\n".join(parts) + rest.partition(END)[2])


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
            verdict = "REGRESSION" if change < 1 and row.ours else "slower" if change < 1 else "faster"
            percent = f"{100 * (change - 1):+.0f} %"
            table.append([row.title, row.peer, times(past.ratio), times(row.ratio), percent, verdict])
    return table, any(line[-1] == "REGRESSION" for line in table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the JSON of a run")
    parser.add_argument("--out", type=Path, help="folder for table.md and report.html")
    parser.add_argument("--readme", type=Path, help="a Markdown file whose marked part is replaced by the tables")
    parser.add_argument("--against", type=Path, help="an older run; the exit status is 1 if something regressed")
    args = parser.parse_args()
    run = load(args.run)
    print(run.where)
    for title, table in headline_tables(run):
        print(f"\n{title}\n{aligned(table)}")
    print(f"\n{notes(run)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in (("table.md", page(run)), ("report.html", html(run))):
            (args.out / name).write_text(text)
            print(args.out / name)
    if args.readme:
        write_readme(run, args.readme)
    if args.against is None:
        return 0
    table, regressed = compare(run, load(args.against))
    print(f"\nAgainst {args.against}\n{aligned(table)}" if len(table) > 1 else f"\nAs fast as {args.against}")
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
