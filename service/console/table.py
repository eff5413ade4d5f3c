"""The page of a service that was installed without its console: a table made here, reloaded by the browser, without a script."""

from __future__ import annotations

import html
import math
import time
from urllib.parse import quote

import numpy as np

from service.console.live import said_of
from service.console.recent import ANOMALY, ATTENDED, COLD, HELD, LEVEL_SHIFT, MUTED, ONSET, OPEN, Recent
from service.events import SEVERITIES

LISTED = 200
POINTS = 60
RELOAD_SECONDS = 2
WIDTH, HEIGHT = 160, 28
_MARKED = {ATTENDED: "acknowledged", MUTED: "muted"}
_LIVE = 'The <a href="./">live page</a> has charts, alerts and backtests.'
_MISSING = (
    "This is the plain page: the live one, with charts, alerts and backtests, was not built into this installation. With Node.js 20.19 "
    "or later on this machine, run <code>make console</code> where Onset's source is, and start the service again."
)


def page(models: list[Recent], replica: str, *, alone: bool) -> str:
    """All streams of all models, the most anomalous first. `alone`: there is no other page, and it says how to get it."""
    parts = "".join(_model(recent) for recent in models)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}"><title>Onset</title><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="table.css"></head><body><main><h1>Onset</h1>'
        f"<p>What was scored lately, as the replica {html.escape(replica)} knows it, reloaded every {RELOAD_SECONDS} seconds. "
        f"{_MISSING if alone else _LIVE}</p>{parts}"
        '<p><a href="docs">The REST API</a> · <a href="metrics">Metrics</a></p></main></body></html>'
    )


def _model(recent: Recent) -> str:
    recent.write()
    slots = recent.top(LISTED)
    counts = recent.counts()
    title = f"<h2>{html.escape(recent.manifest.name)} {html.escape(recent.manifest.version)}</h2>"
    if not len(slots):
        return f"{title}<p>No events yet. Send some to <code>v1/events</code>, and they are here.</p>"
    said = f"{counts.streams:,} streams, {counts.anomalous:,} anomalous, {counts.alerting:,} with an open alert."
    reading = "<th>Value</th><th>Expected</th>" if recent.manifest.lines is None else '<th colspan="2">Last line</th>'
    head = f"<tr><th>Stream</th>{reading}<th>Score</th><th>Lately</th><th>State</th></tr>"
    rows = "".join(_row(recent, slot) for slot in slots.tolist())
    more = f" The first {LISTED} are shown." if counts.streams > LISTED else ""
    return f"{title}<p>{said}{more}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _row(recent: Recent, slot: int) -> str:
    events = recent.events(slot)[-POINTS:]
    last = events[-1]
    top = int(last["contribution"].argmax())
    feature = recent.manifest.feature_names[top]
    named = "" if len(recent.manifest.features) == 1 else f" {html.escape(feature)}"
    name = recent.name(slot)
    mark = int(recent.attended(np.array([slot]))[0])
    state, kind = _state(int(last["bits"]), events["bits"], mark)
    score = "-" if math.isnan(last["score"]) else f"{last['score']:.2f}"
    return (
        f'<tr class="{kind}"><th scope="row"><a href="v1/streams/{quote(name)}">{html.escape(name)}</a></th>'
        f"{_reading(None if recent.manifest.lines is None else recent.line(slot), last, top, named)}<td>{score}</td>"
        f"<td>{_sparkline(events['score'])}</td><td>{state}, {_ago(float(last['t']))}</td></tr>"
    )


def _reading(line: bytes | None, last: np.void, top: int, named: str) -> str:
    """Value and what was expected; of a log stream its last line, or the one that an open alert is about."""
    if line is not None:
        return f'<td colspan="2">{html.escape(said_of(line) or "(end of session)")}</td>'
    return f"<td>{_number(last['x'][top])}{named}</td><td>{_number(last['expected'][top])}</td>"


def _state(bits: int, lately: np.ndarray[tuple[int], np.dtype[np.uint8]], mark: int) -> tuple[str, str]:
    """In words, and its class."""
    if bits & OPEN:
        severity, frozen = SEVERITIES[max(1, bits >> LEVEL_SHIFT)], ", frozen" if bits & HELD else ""
        return (f"△ {severity} alert {_MARKED[mark]}{frozen}", "attended") if mark else (f"▲ {severity} alert open{frozen}", "alert")
    if bits & ANOMALY:
        return "anomalous", "anomalous"
    if bits & COLD:
        return "warming up", "cold"
    return ("normal, an onset lately" if (lately & ONSET).any() else "normal"), "normal"


def _ago(seconds: float) -> str:
    age = max(0, round(time.time() - seconds))
    return "now" if age < RELOAD_SECONDS + 1 else f"{age} s ago" if age < 120 else f"{age // 60} min ago"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5g}"


def _sparkline(scores: np.ndarray[tuple[int], np.dtype[np.float32]]) -> str:
    """Scores from 0 to 2, and the threshold at 1."""
    step = WIDTH / max(1, POINTS - 1)
    points = [
        f"{i * step:.1f},{HEIGHT - 1 - min(2.0, max(0.0, score)) / 2 * (HEIGHT - 2):.1f}"
        for i, score in enumerate(scores.tolist())
        if not math.isnan(score)
    ]
    middle = HEIGHT / 2
    label = f"score of the last {len(scores)} events"
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<line class="threshold" x1="0" x2="{WIDTH}" y1="{middle}" y2="{middle}"/><polyline points="{" ".join(points)}"/></svg>'
    )
