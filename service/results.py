"""Records and verdicts → the replies that clients read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.artifact import Manifest
from service.events import Contributor, Event, Result
from service.policy import DIRECTIONS, SEVERITIES, THRESHOLD, Policy, judge
from service.rounds import Kind, Outcomes
from service.state import FROZEN

Numbers = dict[str, float | None]

# Plain numbers, made once: a reply is made for every event, and on Python 3.11 each member of an Enum is a function call.
_WITH_RECORD, _OLD, _LATE = (int(Kind.SCORED), int(Kind.DUPLICATE)), (int(Kind.DUPLICATE), int(Kind.REPEATED)), int(Kind.LATE)
_FIRST = [0]


@dataclass(frozen=True)
class Answers:
    """What became of N events, as one row of plain values each: made once for a whole batch, with what is to be counted."""

    rows: list[tuple[Any, ...]]
    kinds: list[int]
    anomalies: int
    onsets: int
    expected: float
    """Onsets that the asked rate allows among the judged events."""

    def part(self, start: int, stop: int) -> Answers:
        return Answers(self.rows[start:stop], self.kinds[start:stop], 0, 0, 0.0)


class Replies:
    """Makes the results of one detector."""

    def __init__(self, manifest: Manifest, policy: Policy) -> None:
        self._policy = policy
        self._model, self._model_version = manifest.name, manifest.version
        self._warmup = manifest.warmup
        self._names = manifest.feature_names
        self._single = len(self._names) == 1

    def judged(self, outcomes: Outcomes) -> Answers:
        """Verdicts over a batch, and everything a reply needs as Python values."""
        records, kinds = outcomes.records, outcomes.kinds
        verdicts = judge(records)
        scored = kinds == Kind.SCORED
        columns = (
            kinds.tolist(),
            *(_nullable(column) for column in (verdicts.anomaly_score, records["p_value"], verdicts.alert_score)),
            verdicts.is_anomaly.tolist(),
            verdicts.grade.tolist(),
            verdicts.severity.tolist(),
            verdicts.direction.tolist(),
            self._policy.confidence(records["version"]).tolist(),
            records["version"].tolist(),
            records["timestamp"].tolist(),
            _nullable(records["started_at"]),
            (records["flags"] & FROZEN != 0).tolist(),
            map(_shortest, records["alpha"].tolist()),
            *(_nullable(records[name]) for name in ("x", "expected", "lower", "upper", "contribution")),
        )
        return Answers(
            rows=list(zip(*columns, strict=True)),
            kinds=columns[0],
            anomalies=int((scored & (verdicts.anomaly_score > THRESHOLD)).sum()),
            onsets=int((scored & (verdicts.alert_score > THRESHOLD)).sum()),
            expected=float(records["onset_alpha"][scored & ~np.isnan(records["onset_p"])].sum(dtype=np.float64)),
        )

    def results(self, events: Sequence[Event], answers: Answers, *, top_contributors: int) -> list[Result]:
        """One result for each of N events, in order. A duplicate echoes the event it answers and carries the stored result."""
        return [self._result(event, row, top_contributors) for event, row in zip(events, answers.rows, strict=True)]

    def _result(self, event: Event, row: tuple[Any, ...], top: int) -> Result:
        kind, score, p_value, alert, is_anomaly, grade, severity, direction, confidence, version, timestamp, started_at = row[:12]
        frozen, alpha, x, expected, lower, upper, contribution = row[12:]
        scored = kind in _WITH_RECORD
        missing = max(0, self._warmup - version)
        return Result(  # by position: with its 27 names this call would take five times as long
            event.stream_id or "",
            event.event_id,
            event.timestamp if event.timestamp is not None else timestamp,
            score if scored else None,
            p_value if scored else None,
            alert if scored else None,
            is_anomaly and scored,
            grade if scored and p_value is not None else None,  # anomaly_grade
            SEVERITIES[severity] if scored else "none",
            confidence,
            THRESHOLD,
            alpha,
            DIRECTIONS[direction] if scored else "none",
            self._named(expected) if scored else {},
            self._named(lower) if scored else {},
            self._named(upper) if scored else {},
            self._contributors(x, expected, contribution, top) if scored else [],
            started_at if scored else None,
            [name for name, number in zip(self._names, x, strict=True) if number is None] if scored and None in x else [],  # imputed
            "warming_up" if missing else "frozen" if frozen else "ready",
            missing,
            self._model,
            self._model_version,
            version,
            kind in _OLD,  # duplicate
            kind == _LATE,
        )

    def _named(self, values: list[float | None]) -> Numbers:
        return {self._names[0]: values[0]} if self._single else dict(zip(self._names, values, strict=True))

    def _contributors(self, x: list[float | None], expected: list[float | None], contribution: list[float], top: int) -> list[Contributor]:
        order = _FIRST[:top] if self._single else sorted(range(len(x)), key=contribution.__getitem__, reverse=True)[:top]
        return [Contributor(self._names[j], contribution[j], x[j], expected[j]) for j in order if x[j] is not None]


@lru_cache(maxsize=64)
def _shortest(alpha: float) -> float:
    """The decimal number that a float32 was written as: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(alpha)))


def _nullable(column: NDArray[np.floating]) -> list[Any]:
    """[N] or [N, F] floats → Python floats with None in place of NaN."""
    values: list[Any] = column.tolist()
    if not np.isnan(column).any():
        return values
    if column.ndim == 1:
        return [None if math.isnan(v) else v for v in values]
    return [[None if math.isnan(v) else v for v in row] for row in values]
