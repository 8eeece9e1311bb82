"""The HTML page of a run, bars and curves as inline SVG, and README's picture; both for light and for dark screens."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from runs import (
    ACCELERATED,
    OTHERS,
    Row,
    Run,
    Table,
    best_other,
    duration,
    error,
    headline_tables,
    notes,
    shown_cases,
    times,
)

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --text: #1f2328; --faint: #667; --line: #d8dee4; --card: #f6f8fa;
        --ours: #0a7d6c; --yardstick: #57606a; --peer: #b3bcc6; --limit: #e3d9b8; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #0e1116; --text: #e6edf3; --faint: #9aa4af; --line: #30363d; --card: #161b22;
          --ours: #2fc3ab; --yardstick: #8b949e; --peer: #4c5561; --limit: #6b6240; } }
body { background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .5rem; }
p { color: var(--faint); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; } th, td { padding: .3rem .5rem; text-align: left;
        border-bottom: 1px solid var(--line); white-space: nowrap; } th { color: var(--faint); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--text); font-size: 12px; }
svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .faint { fill: var(--faint); } svg .axis { stroke: var(--line); }
svg .unit { stroke: var(--faint); stroke-dasharray: 3 3; }
.ours { fill: var(--ours); } .yardstick { fill: var(--yardstick); }
.peer { fill: var(--peer); } .limit { fill: var(--limit); }
path { fill: none; stroke-width: 2; } path.ours { stroke: var(--ours); fill: none; }
path.yardstick { stroke: var(--yardstick); fill: none; } path.roof { stroke: var(--faint); }
.key span { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 1em; }
@media (max-width: 34rem) { .cards { grid-template-columns: 1fr; } }
"""
KEY = (
    ("ours", "nest_fast"),
    ("yardstick", "yardstick (the ratio's 1)"),
    ("peer", "others"),
    ("limit", "limit of the hardware"),
)


def html(run: Run) -> str:
    parts = [f"<h1>nest_fast benchmarks</h1><p>{escape(run.where)}</p>"]
    for title, table in headline_tables(run):
        parts.append(f'<h2>{title}</h2><div class="scroll">{_table(table)}</div>')
    parts.append(f"<p>{escape(notes(run))}</p>")
    key = "".join(f'<span style="background:var(--{kind})"></span>{escape(text)}' for kind, text in KEY)
    parts.append(f'<h2>Every peer</h2><p class="key">Speed relative to the yardstick: longer is faster.{key}</p>')
    by_op: dict[str, list[str]] = {}
    for rows in run.cases():
        by_op.setdefault(rows[0].op, []).append(_card(rows[0].title, bars(rows)))
    parts += [f'<h2>{escape(op)}</h2><div class="cards">{"".join(cards)}</div>' for op, cards in by_op.items()]
    curves = [_card(title, chart) for title, chart in (*rooflines(run), *scaling(run))]
    if curves:
        parts.append(f'<h2>Roofline and scaling</h2><div class="cards">{"".join(curves)}</div>')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>nest_fast benchmarks</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _card(title: str, chart: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>'


def _table(table: Table) -> str:
    head, *lines = ([escape(cell) for cell in line] for line in table)
    body = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in lines)
    return f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>{body}</table>"


def _kind(row: Row) -> str:
    if row.ours:
        return "ours"
    if row.limit:
        return "limit"
    return "yardstick" if row.peer == row.yardstick else "peer"


# --- bars -------------------------------------------------------------------------------------------------------------

WIDTH, LABEL, VALUE, STEP = 620, 190, 150, 22


def bars(rows: list[Row]) -> str:
    """One bar for each peer, as long as it is fast; a dashed line at the yardstick."""
    rows = sorted(rows, key=lambda row: -row.ratio)
    scale = (WIDTH - LABEL - VALUE) / max(row.ratio for row in rows)
    height = STEP * len(rows)
    shapes = []
    for i, row in enumerate(rows):
        y, length = i * STEP, max(1.0, row.ratio * scale)
        value = f"{times(row.ratio)}, {row.speed}"
        title = f"{row.peer}: {value}, {duration(row.seconds)} a call, error {error(row.errors) or 'not measured'}"
        shapes.append(
            f"<g><title>{escape(title)}</title>"
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row.peer)}</text>'
            f'<rect class="{_kind(row)}" x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{STEP - 6}" rx="2"/>'
            f'<text class="value faint" x="{LABEL + length + 6:.1f}" y="{y + 15}">{escape(value)}</text></g>'
        )
    one = LABEL + scale
    line = f'<line class="unit" x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="{height}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{line}{"".join(shapes)}</svg>'


# --- curves -----------------------------------------------------------------------------------------------------------

HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 330, 70, 42, 14, 130


class Axes:
    """Two logarithmic axes over the given values."""

    def __init__(self, xs: list[float], ys: list[float]) -> None:
        self.x0, self.x1 = min(xs) / 1.2, max(xs) * 1.2
        self.y0, self.y1 = min(ys) / 1.5, max(ys) * 1.5

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / self.x0) / math.log(self.x1 / self.x0)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.log(value / self.y0) / math.log(self.y1 / self.y0)

    def path(self, kind: str, points: list[tuple[float, float]]) -> str:
        return f'<path class="{kind}" d="M{" L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)}"/>'

    def frame(self, xs: list[float], x_label: str, y_label: str, y_text: Callable[[float], str]) -> str:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        lines = [
            f'<text class="faint" x="{self.x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>' for x in xs
        ]
        low, high = math.floor(math.log10(self.y0)), math.ceil(math.log10(self.y1))
        marks = [m * 10.0**e for e in range(low, high) for m in (1, 2, 5)]
        for mark in (m for m in marks if self.y0 <= m <= self.y1):
            y = self.y(mark)
            lines.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text class="faint" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_text(mark)}</text>')
        lines.append(f'<text class="faint" x="{right}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
        lines.append(f'<text class="faint" x="0" y="{TOP - 2}">{escape(y_label)}</text>')
        return "".join(lines)


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{content}</svg>'


def rooflines(run: Run) -> list[tuple[str, str]]:
    """For each dtype: arithmetic per byte against the rate reached, under PyTorch's ceilings in the same run."""
    charts = []
    for dtype, peak in run.matmul.items():
        points = [
            (row, (row.done or row.flops) / row.bytes, (row.done or row.flops) / row.seconds)
            for rows in run.cases()
            for row in rows
            if row.dtype == dtype and row.flops and row.bytes and _kind(row) in ("ours", "yardstick")
        ]
        if not points or dtype not in run.bandwidth:
            continue
        ridge = peak / run.bandwidth[dtype]
        xs = [x for _, x, _ in points] + [ridge]
        axes = Axes([min(xs) / 2, max(xs)], [y for _, _, y in points] + [peak])
        roof = [(axes.x0, run.bandwidth[dtype] * axes.x0), (ridge, peak), (axes.x1, peak)]
        roof = [(x, max(y, axes.y0)) for x, y in roof] if ridge > axes.x0 else [(axes.x0, peak), (axes.x1, peak)]
        dots = "".join(
            f'<circle class="{_kind(row)}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4">'
            f"<title>{escape(f'{row.peer}: {row.title}, {y / 1e9:,.0f} GFLOP/s')}</title></circle>"
            for row, x, y in points
        )
        marks = [2.0**e for e in range(-2, 14, 2) if axes.x0 <= 2.0**e <= axes.x1]
        frame = axes.frame(marks, "FLOP per byte", "GFLOP/s", lambda y: f"{y / 1e9:,g}")
        name = f'<text class="faint" x="{axes.x(axes.x1) + 6:.1f}" y="{axes.y(peak) + 4:.1f}">matmul</text>'
        title = f"Roofline, {dtype}: copy bandwidth, then matmul rate"
        charts.append((title, _svg(frame + axes.path("roof", roof) + name + dots)))
    return charts


def scaling(run: Run) -> list[tuple[str, str]]:
    """Images per second over batch and over image size."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for rows in run.cases(axis=True):
        for row in rows:
            curves.setdefault((row.op, row.dtype, row.axis), []).append(row)
    charts = []
    for (op, dtype, axis), rows in curves.items():
        axes = Axes([row.x for row in rows], [row.items / row.seconds for row in rows])
        xs = sorted({float(row.x) for row in rows})
        shapes = [axes.frame(xs, axis, "images per second", lambda y: f"{y:,g}")]
        for peer in dict.fromkeys(row.peer for row in rows):
            line = sorted((row for row in rows if row.peer == peer), key=lambda row: row.x)
            points = [(float(row.x), row.items / row.seconds) for row in line]
            kind = "ours" if line[0].ours else "yardstick"
            shapes.append(axes.path(kind, points))
            shapes += [f'<circle class="{kind}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4"/>' for x, y in points]
            x, y = points[-1]
            shapes.append(f'<text x="{axes.x(x) + 9:.1f}" y="{axes.y(y) + 4:.1f}">{escape(peer)}</text>')
        charts.append((f"{op}, inference over {axis}, {dtype}", _svg("".join(shapes))))
    return charts


# --- README's picture -------------------------------------------------------------------------------------------------

# Text, faint text, ours, others; the background is the page's.
LIGHT = ("#1f2328", "#59636e", "#0a7d6c", "#afb8c1")
DARK = ("#f0f6fc", "#9198a1", "#2fc3ab", "#59636e")
# Narrow enough that its letters can be read on a telephone.
PICTURE_WIDTH, BAR_LEFT, BAR_RIGHT, BAR = 480, 158, 118, 17


def picture(run: Run, dark: bool) -> str:
    """Bars with their quartiles, as long as it is fast: NesT-T against timm's, NesT beside Swin."""
    own, beside = shown_cases(run)
    shapes: list[str] = []
    y = 0
    for title, one, cases in (("NesT-T, speed", "timm = 1", own), ("NesT beside Swin", "Swin = 1", beside)):
        if cases:
            lines, y = _panel(title, one, cases, y)
            shapes += lines
    text, faint, ours, others = DARK if dark else LIGHT
    style = (
        f"text{{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:{text}}}.title{{font-weight:600}}"
        f".faint{{fill:{faint};font-size:12px}}.ours{{fill:{ours}}}.other{{fill:{others}}}"
        f".ours-value{{font-weight:600}}path{{stroke:{text};fill:none}}.one{{stroke:{faint};stroke-dasharray:3 3}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PICTURE_WIDTH} {y}" role="img">'
        f"<title>How fast nest_fast is</title><style>{style}</style>{''.join(shapes)}</svg>\n"
    )


def _panel(title: str, one: str, cases: list[list[Row]], top: int) -> tuple[list[str], int]:
    """The bars of ``cases`` under a title, from ``top`` on; and where they end. ``one`` is what the dashed line is."""
    bars = [(rows, _shown(rows)) for rows in cases]
    scale = (PICTURE_WIDTH - BAR_LEFT - BAR_RIGHT) / max(row.ratio_high for _, shown in bars for row in shown)
    shapes = [f'<text class="title" x="0" y="{top + 15}">{escape(title)}</text>']
    start = y = top + 26
    for rows, shown in bars:
        what, *more = rows[0].label.split(", ")
        shapes.append(f'<text x="0" y="{y + 12}">{escape(what)}</text>')
        shapes.append(f'<text class="faint" x="0" y="{y + 27}">{escape(", ".join(more))}</text>')
        for i, row in enumerate(shown):
            shapes.append(_bar(row, y + i * BAR, scale))
        y += max(2, len(shown)) * BAR + 7
    x = BAR_LEFT + scale
    shapes.append(f'<path class="one" d="M{x:.1f} {start - 4}V{y - 4}"/>')
    shapes.append(f'<text class="faint" x="{x:.1f}" y="{top + 15}" text-anchor="middle">{escape(one)}</text>')
    return shapes, y + 6


def _shown(rows: list[Row]) -> list[Row]:
    """Ours, the best of all others, and timm's where the yardstick is another model."""
    best = best_other(rows)
    wanted = (ACCELERATED, best and best.peer, "timm")
    shown = [row for peer in dict.fromkeys(wanted) for row in rows if row.peer == peer]
    return [row for row in shown if row.peer != row.yardstick]


def _bar(row: Row, y: int, scale: float) -> str:
    low, ratio, high = (BAR_LEFT + scale * value for value in (row.ratio_low, row.ratio, row.ratio_high))
    kind, weight = ("ours", "ours-value") if row.ours else ("other", "faint")
    name, middle = "nest_fast" if row.ours else OTHERS.get(row.peer, row.peer), y + 7
    return (
        f'<rect class="{kind}" x="{BAR_LEFT}" y="{y}" width="{ratio - BAR_LEFT:.1f}" height="{BAR - 3}" rx="2"/>'
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6"/>'
        f'<text class="{weight}" x="{max(high, BAR_LEFT + scale) + 6:.1f}" y="{y + 12}">'
        f"{times(row.ratio)} {escape(name)}</text>"
    )
