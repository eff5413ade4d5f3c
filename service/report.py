"""A run of the backtest as one page: nothing in it is loaded from elsewhere, nothing in it is a script. `training fit` writes the same.

series ─► sketch.py, thinned to the page's pixels ─► SVG ─► one HTML file
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.backtest import TAIL, Series, Tally, total
from service.detector import Detector
from service.outputs import whole
from service.policy import Policy
from service.sketch import EARLIEST_TIME, Onset, Sketch, allowed, axis, sketch

SHOWN = 40
"""Inputs drawn: those with the most alerts."""
GROUP = 16
"""Of them in memory at once."""
ONSETS_LISTED = 25
WIDTH, LEFT, RIGHT = 1100, 64, 10
BUCKETS = (WIDTH - LEFT - RIGHT) // 2
"""One for every two pixels: each takes two points."""
VALUE_HEIGHT, SCORE_HEIGHT, GAP = 150, 84, 24
TAIL_WIDTH, TAIL_HEIGHT = 460, 300

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#17202b;--quiet:#55616f;--line:#e1e6ec;--blue:#1f66b5;--alarm:#b5410b;--mark:#d9692f}
@media(prefers-color-scheme:dark){:root{--paper:#0f141a;--ink:#e7ecf2;--quiet:#9dabba;--line:#27313d;--blue:#74b0f4;--alarm:#ff9a5c;--mark:#ff8a4c}}
body{margin:0;background:var(--paper);color:var(--ink);font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1148px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:36px 0 6px;overflow-wrap:anywhere}h3{font-size:14px;margin:0}
p{color:var(--quiet);margin:4px 0 14px;max-width:76ch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{text-align:right;padding:4px 16px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child,.text{text-align:left}thead th{color:var(--quiet);font-weight:500;font-size:12px}
a{color:var(--blue)}svg{display:block;width:100%;height:auto;max-width:1100px}.tail{max-width:460px;flex:1 1 300px}
.pair{display:flex;flex-wrap:wrap;gap:8px 48px;align-items:flex-start}
text{fill:var(--quiet);font-size:11px}.title{fill:var(--ink);font-size:12px;font-weight:600}
.grid{stroke:var(--line)}.band{fill:var(--blue);opacity:.14}.value{fill:none;stroke:var(--ink);stroke-width:1.2}
.expected{fill:none;stroke:var(--blue);stroke-width:1.2;stroke-dasharray:5 4}.score{fill:none;stroke:var(--ink);stroke-width:1.1}
.threshold{stroke:var(--quiet);stroke-dasharray:2 3}.wrong{fill:var(--mark);opacity:.12}.onset{stroke:var(--mark);stroke-dasharray:4 3}
.mark{fill:var(--mark)}.even{stroke:var(--blue);stroke-dasharray:5 4}.seen{fill:none;stroke:var(--ink);stroke-width:1.6}
.dot{fill:var(--ink);stroke:var(--ink)}.few{fill:var(--paper);stroke:var(--ink)}
.bar{display:inline-block;height:8px;background:var(--blue);border-radius:2px;margin-right:6px;vertical-align:1px}
.alarm{color:var(--alarm);font-weight:600}
"""
_BARS = "".join(f".w{width}{{width:{width * 0.8:g}px}}" for width in range(0, 101, 2))
"""Widths of bars as classes: styles of single elements are forbidden by many a server's content-security-policy."""

Load = Callable[[int], Series]
"""Reads the i-th input once more."""


@dataclass(frozen=True)
class Subject:
    """What a report is about."""

    title: str
    said: str
    """A paragraph under the title."""
    detector: Detector
    policy: Policy


def write(path: Path, subject: Subject, tallies: Sequence[Tally], load: Load) -> None:
    """The report of a run whose inputs were tallied. Reads and scores again what it draws, at most SHOWN of them. Raises NotWritten."""
    shown = sorted(range(len(tallies)), key=lambda i: tallies[i].rank, reverse=True)[:SHOWN]
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(_head(subject, tallies, len(shown)))
        for first in range(0, len(shown), GROUP):
            group = shown[first : first + GROUP]
            for place, one in enumerate(sketch([load(i) for i in group], subject.detector, subject.policy, BUCKETS), first):
                file.write(_section(one, place))
        file.write("</main></body></html>\n")


def _head(subject: Subject, tallies: Sequence[Tally], shown: int) -> str:
    manifest, policy, whole = subject.detector.manifest, subject.policy, total(tallies)
    expected = sum(allowed(policy, tally.rows, tally.judged) for tally in tallies)
    first = f" The {shown} with the most alerts, and of as many those with the greatest score, are listed and drawn."
    more = first if shown < len(tallies) else ""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{html.escape(subject.title)}</title><link rel="icon" href="data:,"><style>{STYLE}{_BARS}</style></head><body><main>'
        f"<h1>{html.escape(subject.title)}</h1><p>{html.escape(subject.said)} Made {made}.</p>"
        f"<p>{len(tallies):,} input{'s' if len(tallies) != 1 else ''}, {whole.rows:,} rows scored by {html.escape(manifest.name)} "
        f"{html.escape(manifest.version)} at α = {policy.alpha:g}{', strict' if policy.strict else ''}: "
        f'<span class="alarm">{_counted(whole.alerts, "alert")}</span> of {_counted(whole.onsets, "onset")}. If nothing were wrong with '
        f"these streams, about {expected:,.1f} onsets would be expected.{more}</p>{_table(tallies, whole)}"
        f"<h2>Calibration</h2><p>How often a p-value below p came, anomalies included. On the dashed line: as often as it means. Hollow: "
        f"fewer than ten rows.</p>{_tail(whole)}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _table(tallies: Sequence[Tally], whole: Tally) -> str:
    ranked = sorted(enumerate(tallies), key=lambda pair: pair[1].rank, reverse=True)[:SHOWN]
    rows = "".join(_row(f'<a href="#i{place}">{html.escape(tally.name)}</a>', tally) for place, (_, tally) in enumerate(ranked))
    last = _row("all", whole) if len(tallies) > 1 else ""
    names = ("Input", "Rows", "Judged", "Late", "Alerts", "Onsets", "Greatest score", "Anomalous rows")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}{last}</tbody></table>"


def _row(name: str, tally: Tally) -> str:
    greatest = f"{tally.greatest:.2f}" if tally.alerts else ""
    cells = (
        f"{tally.rows:,}",
        f"{tally.judged:,}",
        f"{tally.late:,}",
        f"{tally.alerts:,}",
        f"{tally.onsets:,}",
        greatest,
        f"{tally.anomalous:,}",
    )
    return f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


# ── one input ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _section(one: Sketch, place: int) -> str:
    tally = one.tally
    many = (
        f" Of {len(one.names)} features the {len(one.features)} are drawn that carry the anomalies most."
        if len(one.features) < len(one.names)
        else ""
    )
    thin = " Each pixel shows the least and the greatest of its rows." if one.thinned else ""
    return (
        f'<section><h2 id="i{place}">{html.escape(tally.name)}</h2><p>{tally.rows:,} rows, {_counted(tally.alerts, "alert")}, '
        f"{tally.anomalous:,} anomalous rows.{thin}{many}</p>{_drawing(one)}{_onsets(one)}</section>"
    )


@dataclass(frozen=True)
class _Frame:
    """Where numbers of one panel lie on the drawing."""

    x: NDArray[np.float64]
    low: float
    high: float
    top: float
    height: float

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - (min(max(value, self.low), self.high) - self.low) / (self.high - self.low))

    def path(self, numbers: NDArray[np.floating]) -> str:
        """A line through the numbers, broken at NaN."""
        parts, down = [], False
        for x, value in zip(self.x.tolist(), numbers.tolist(), strict=True):
            if math.isnan(value):
                down = False
                continue
            parts.append(f"{'L' if down else 'M'}{x:.1f} {self.y(value):.1f}")
            down = True
        return "".join(parts)

    def area(self, lower: NDArray[np.floating], upper: NDArray[np.floating]) -> str:
        known = ~(np.isnan(lower) | np.isnan(upper))
        parts = []
        for run in _runs(known):
            xs = self.x[run].tolist()
            there = [f"{x:.1f} {self.y(value):.1f}" for x, value in zip(xs, upper[run].tolist(), strict=True)]
            back = [f"{x:.1f} {self.y(value):.1f}" for x, value in zip(xs[::-1], lower[run].tolist()[::-1], strict=True)]
            parts.append(f"M{'L'.join(there + back)}Z")
        return "".join(parts)


def _runs(on: NDArray[np.bool_]) -> Iterator[slice]:
    edges = np.flatnonzero(np.diff(np.r_[False, on, False]))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield slice(begin, end)


def _drawing(one: Sketch) -> str:
    rows, columns = one.points(), one.drawn()
    over, is_time = axis(one.series.seconds[rows], rows)
    span = float(over[-1] - over[0]) or 1.0
    x = LEFT + (WIDTH - LEFT - RIGHT) * (over - over[0]) / span
    height = len(one.features) * (VALUE_HEIGHT + GAP) + SCORE_HEIGHT + 2 * GAP
    marks = [(float(x[max(0, int(np.searchsorted(rows, onset.row, "right")) - 1)]), onset) for onset in one.onsets]
    parts = []
    for i, j in enumerate(one.features):
        top = GAP + i * (VALUE_HEIGHT + GAP)
        value, expected, lower, upper = (columns[name][:, i] for name in ("value", "expected", "lower", "upper"))
        frame = _Frame(x, *_limits(value, expected, lower, upper), top, VALUE_HEIGHT)
        parts += [_panel(frame, one.names[j]), _wrong(frame, columns["anomalous"])]
        parts.append(f'<path class="band" d="{frame.area(lower, upper)}"/><path class="expected" d="{frame.path(expected)}"/>')
        parts.append(f'<path class="value" d="{frame.path(value)}"/>')
        parts += [_mark(frame, at, i == 0, f"{_when(one, onset)}: alert score {onset.alert_score:.2f}") for at, onset in marks]
    top = GAP + len(one.features) * (VALUE_HEIGHT + GAP)
    score = columns["score"]
    frame = _Frame(x, 0.0, max(1.5, 1.1 * float(np.nanmax(score, initial=0.0))), top, SCORE_HEIGHT)
    parts += [_panel(frame, "anomaly score"), _wrong(frame, columns["anomalous"]), f'<path class="score" d="{frame.path(score)}"/>']
    parts.append(f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(1):.1f}" y2="{frame.y(1):.1f}"/>')
    parts += [_mark(frame, at, False, "") for at, _ in marks]
    parts.append(_times(over, is_time, top + SCORE_HEIGHT + 16))
    label = html.escape(f"{one.tally.name}: values with what was expected, and the score; {one.tally.onsets} onsets")
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _limits(
    value: NDArray[np.floating], expected: NDArray[np.floating], lower: NDArray[np.floating], upper: NDArray[np.floating]
) -> tuple[float, float]:
    """All of the values and what was expected; of the band no more than once the same again."""
    known = np.concatenate([value, expected])
    known = known[np.isfinite(known)].astype(np.float64)
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    span = high - low or abs(high) * 0.1 or 1.0
    band = [float(fn(side)) for fn, side in ((np.nanmin, lower), (np.nanmax, upper)) if not np.isnan(side).all()]
    if len(band) == 2:
        low, high = min(low, max(band[0], low - span)), max(high, min(band[1], high + span))
    return low - 0.04 * span, high + 0.04 * span


def _panel(frame: _Frame, title: str) -> str:
    lines = []
    for value in _ticks(frame.low, frame.high):
        y = frame.y(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    return f'<text class="title" x="{LEFT}" y="{frame.top - 8:.1f}">{html.escape(title)}</text>{"".join(lines)}'


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between the two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    for times in (5, 2, 1):
        if (high - low) / (step * times) >= 3:
            step *= times
            break
    first = math.ceil(low / step)
    return [float(f"{(first + i) * step:.6g}") for i in range(7) if (first + i) * step <= high]


def _wrong(frame: _Frame, anomalous: NDArray[np.bool_]) -> str:
    parts = []
    for run in _runs(anomalous):
        begin, end = float(frame.x[run.start]), float(frame.x[min(run.stop, len(frame.x) - 1)])
        parts.append(f'<rect class="wrong" x="{begin:.1f}" width="{max(1.0, end - begin):.1f}" y="{frame.top}" height="{frame.height}"/>')
    return "".join(parts)


def _mark(frame: _Frame, x: float, head: bool, said: str) -> str:
    line = f'<line class="onset" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.top + frame.height}"/>'
    if not head:
        return line
    top = frame.top
    triangle = f"M{x:.1f} {top}L{x - 5:.1f} {top - 8}L{x + 5:.1f} {top - 8}Z"
    return f'{line}<path class="mark" d="{triangle}"><title>{html.escape(said)}</title></path>'


def _times(over: NDArray[np.float64], is_time: bool, y: float) -> str:
    first, last = float(over[0]), float(over[-1])
    parts = []
    for i in range(6):
        at = first + (last - first) * i / 5
        words = _moment(at, last - first) if is_time else f"row {at:,.0f}"
        x = LEFT + (WIDTH - LEFT - RIGHT) * i / 5
        anchor = "start" if i == 0 else "end" if i == 5 else "middle"
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>')
    return "".join(parts)


def _moment(seconds: float, span: float) -> str:
    shown = "%Y-%m-%d" if span > 20 * 86_400 else "%Y-%m-%d %H:%M" if span > 1800 else "%H:%M:%S"
    return datetime.fromtimestamp(seconds, UTC).strftime(shown)


def _onsets(one: Sketch) -> str:
    if not one.onsets:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(_when(one, onset))}</td><td>{onset.row + 1:,}</td><td>{onset.alert_score:.2f}</td>"
        f'<td>{onset.p_value:.2g}</td><td class="text">{_carried(onset)}</td></tr>'
        for onset in one.onsets[:ONSETS_LISTED]
    )
    more = one.tally.onsets - ONSETS_LISTED
    said = f"<p>{more:,} more onsets are not listed.</p>" if more > 0 else ""
    head = '<tr><th>Onset</th><th>Row</th><th>Alert score</th><th>p-value</th><th class="text">Carried by</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>{said}"


def _when(one: Sketch, onset: Onset) -> str:
    """As the file has it, so that it is found there; but seconds since 1970 as people read them."""
    seconds = float(one.series.seconds[onset.row])
    counted = onset.timestamp.replace(".", "", 1).isdigit() and seconds >= EARLIEST_TIME
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}" if counted else onset.timestamp


def _carried(onset: Onset) -> str:
    return "<br>".join(
        f'<span class="bar w{2 * round(50 * one.contribution)}"></span>{html.escape(one.feature)} {100 * one.contribution:.0f} %: '
        f"{'no value' if math.isnan(one.actual) else format(one.actual, '.5g')}, expected {one.expected:.5g}"
        for one in onset.contributors
    )


# ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tail(whole: Tally) -> str:
    """Asked against seen, on logarithmic axes from 1 in 100,000 to all."""
    decades, left, bottom, right, top = 5, 84, TAIL_HEIGHT - 28, TAIL_WIDTH - 12, 10

    def x(p: float) -> float:
        return left + (right - left) * (1 + math.log10(p) / decades)

    def y(share: float) -> float:
        return bottom - (bottom - top) * (1 + max(-1.0, math.log10(share) / decades))

    parts = []
    for power in range(-decades, 1):
        value = 10.0**power
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{"all" if power == 0 else f"1 in {10**-power:,}"}</text>'
        )
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line class="even" x1="{x(10.0**-decades):.1f}" y1="{y(10.0**-decades):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}"/>')
    seen = [(x(p), y(rows / whole.judged), rows) for p, rows in zip(TAIL, whole.rarer, strict=True) if rows and whole.judged]
    if seen:
        parts.append(f'<path class="seen" d="M{"L".join(f"{at:.1f} {share:.1f}" for at, share, _ in seen)}"/>')
    parts += [f'<circle class="{"dot" if rows >= 10 else "few"}" cx="{at:.1f}" cy="{share:.1f}" r="3.5"/>' for at, share, rows in seen]
    label = "Share of rows with a p-value below p, against p; the numbers are in the table"
    drawing = f'<svg class="tail" viewBox="0 0 {TAIL_WIDTH} {TAIL_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    rows = "".join(
        f"<tr><td>{p:g}</td><td>{p * whole.judged:,.1f}</td><td>{count:,}</td></tr>" for p, count in zip(TAIL, whole.rarer, strict=True)
    )
    head = "<tr><th>p below</th><th>Rows expected</th><th>Rows seen</th></tr>"
    return f'<div class="pair">{drawing}<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
