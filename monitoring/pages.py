"""Pages of docs/ that are made from data."""

from __future__ import annotations

from collections.abc import Iterable

from service.metrics import CATALOGUE, Metric
from service.series import SERIES

_METRICS = """# Metrics

<!-- Made by `python -m monitoring.generate` from service/metrics.py and service/series.py: change those. -->

`GET /metrics` in Prometheus' text format. One process serves, and each replica counts for itself: scrape every replica and sum over
them (`sum by (outcome) (rate(onset_events_total[5m]))`). What comes from the store (`onset_streams`, `onset_streams_live`,
`onset_streams_silent`) is the same on every replica: take `max`. Series whose labels are known beforehand exist from the start, at zero,
so rates and alerts have no gaps. Counters and histograms never have a stream's id. Histograms end in `_bucket`, `_sum` and `_count`.
Beside them are the Python client's `process_…` metrics (memory, processor time, open files).

{catalogue}

## Series of single streams

`ONSET_STREAM_METRICS=5000` shows up to so many streams of each model one by one: three series a stream and five a feature. Off by default:
it is the one thing here that grows with the fleet. A stream keeps its place until nothing of it was scored for five minutes; while all
places are taken others are not shown, which `onset_streams_not_shown_total` counts. Every replica shows the streams that it scores:
behind several, take `max by (stream)`.

{series}
"""


def metrics() -> str:
    """docs/metrics.md."""
    return _METRICS.format(catalogue=_table(CATALOGUE), series=_table(SERIES))


def _table(entries: Iterable[Metric]) -> str:
    head = ["| metric | kind, unit | labels | meaning | when it moves |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(_row(entry) for entry in entries)])


def _row(entry: Metric) -> str:
    kind = entry.kind if entry.unit == "1" else f"{entry.kind}, {entry.unit}"
    labels = " ".join(f"`{name}`" + (f" ({', '.join(values)})" if values else "") for name, values in entry.labels.items())
    return f"| `{entry.name}` | {kind} | {labels} | {entry.meaning} | {entry.action} |"
