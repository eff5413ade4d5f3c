"""Pages of docs/ that are made from data."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterable
from itertools import pairwise
from pathlib import Path

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

`ONSET_STREAM_METRICS=5000` shows up to so many streams of each model one by one: five series a stream and five a feature. Off by default:
it is the one thing here that grows with the fleet. A stream keeps its place until nothing of it was scored for five minutes; while all
places are taken others are not shown, which `onset_streams_not_shown_total` counts. Every replica shows the streams that it scores:
of one behind several take the newest ([monitoring.md](monitoring.md#start-it), *several replicas*).

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


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_SETTINGS_SOURCE = Path(__file__).parents[1] / "service/settings.py"
_SETTINGS = """# Settings

<!-- Made by `python -m monitoring.generate` from service/settings.py: change that. -->

Environment variables of the service, read once at its start; a value that cannot be used stops it with a sentence that names it, and a
variable `ONSET_…` that is none of these is told in the log (`unknown_setting`). Options of `serve` go before them. What can be changed
at run time: the false-alarm rate (`PUT /v1/policy`) and the level of the log (`PUT /v1/log-level`), see [api.md](api.md).

| variable | default | |
|---|---|---|
{rows}
"""


def settings() -> str:
    """docs/settings.md."""
    [declared] = [node for node in ast.parse(_SETTINGS_SOURCE.read_text()).body if isinstance(node, ast.ClassDef)]
    names = [node.target.id for node in declared.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    rows = []
    for node, following in pairwise([*declared.body, ast.Pass()]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        told = following.value.value if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) else ""
        rows.append(
            f"| `ONSET_{node.target.id.upper()}` | {_default(node.value)} | {_in_a_row(str(told), names)}{_allowed(node.annotation)} |"
        )
    return _SETTINGS.format(rows="\n".join(rows))


def _default(value: ast.expr) -> str:
    """As one writes it in the environment; "" = none."""
    if ast.unparse(value) == "SHIPPED_MODELS":
        return "`shipped`"
    if isinstance(value, ast.Call):  # SecretStr(""), Path("onset-data")
        value = value.args[0]
    if isinstance(value, ast.Dict):
        return ""
    found = _number(value) if isinstance(value, ast.BinOp) else ast.literal_eval(value)
    said = str(found).lower() if isinstance(found, bool) else "" if found is None else str(found)
    return said and f"`{said}`"


def _number(value: ast.expr) -> int:
    """A product such as 64 * 1024 * 1024."""
    return _number(value.left) * _number(value.right) if isinstance(value, ast.BinOp) else int(ast.literal_eval(value))


def _allowed(annotation: ast.expr) -> str:
    """What the type says of the values, in words."""
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    said = [
        f"{bounds[keyword.arg]} {ast.unparse(keyword.value)}"
        for call in ast.walk(annotation)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg in bounds and not isinstance(keyword.value, ast.Name)
    ]
    words = [
        f"`{ast.literal_eval(part)}`"
        for literal in ast.walk(annotation)
        if isinstance(literal, ast.Subscript) and ast.unparse(literal.value) == "Literal"
        for part in ast.walk(literal.slice)
        if isinstance(part, ast.Constant)
    ]
    return "".join(f" ({', '.join(one)})" for one in (said, words) if one)


def _in_a_row(text: str, names: Container[str]) -> str:
    """Other settings by their variables, other pages as links."""
    text = re.sub(r"`([a-z_]+)`", lambda found: f"`ONSET_{found[1].upper()}`" if found[1] in names else found[0], text)
    return " ".join(re.sub(r"docs/([a-z-]+\.md)", r"[\1](\1)", text).replace("|", "\\|").split())
