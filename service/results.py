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
from service.events import Contributor, Event, Result, Status
from service.policy import DIRECTIONS, SEVERITIES, THRESHOLD, Policy, judge
from service.rounds import Kind, Outcomes

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Answers:
    """What became of N events, as one row of plain values each: made once for a whole batch, with what is to be counted."""

    rows: list[tuple[Any, ...]]
    kinds: list[int]
    anomalies: int
    onsets: int

    def part(self, start: int, stop: int) -> Answers:
        return Answers(self.rows[start:stop], self.kinds[start:stop], 0, 0)


class Replies:
    """Makes the results of one detector."""

    def __init__(self, manifest: Manifest, policy: Policy) -> None:
        self._manifest = manifest
        self._policy = policy
        self._names = manifest.feature_names

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
            map(_shortest, records["alpha"].tolist()),
            *(_nullable(records[name]) for name in ("x", "expected", "lower", "upper", "contribution")),
        )
        return Answers(
            rows=list(zip(*columns, strict=True)),
            kinds=columns[0],
            anomalies=int((scored & (verdicts.anomaly_score > THRESHOLD)).sum()),
            onsets=int((scored & (verdicts.alert_score > THRESHOLD)).sum()),
        )

    def results(self, events: Sequence[Event], answers: Answers, *, top_contributors: int) -> list[Result]:
        """One result for each of N events, in order. A duplicate echoes the event it answers and carries the stored result."""
        return [self._result(event, *row, top_contributors=top_contributors) for event, row in zip(events, answers.rows, strict=True)]

    def _result(
        self,
        event: Event,
        kind: int,
        anomaly_score: float | None,
        p_value: float | None,
        alert_score: float | None,
        is_anomaly: bool,
        grade: float,
        severity: int,
        direction: int,
        confidence: float,
        version: int,
        timestamp: float,
        started_at: float | None,
        alpha: float,
        x: list[float | None],
        expected: list[float | None],
        lower: list[float | None],
        upper: list[float | None],
        contribution: list[float],
        *,
        top_contributors: int,
    ) -> Result:
        scored = kind in (Kind.SCORED, Kind.DUPLICATE)
        names = self._names
        missing = max(0, self._manifest.warmup - version)
        status: Status = "warming_up" if missing else "ready"
        return Result(
            stream_id=event.stream_id or "",
            event_id=event.event_id,
            timestamp=event.timestamp if event.timestamp is not None else timestamp,
            anomaly_score=anomaly_score if scored else None,
            p_value=p_value if scored else None,
            alert_score=alert_score if scored else None,
            is_anomaly=is_anomaly and scored,
            anomaly_grade=grade if scored and p_value is not None else None,
            severity=SEVERITIES[severity] if scored else "none",
            confidence=confidence,
            threshold=THRESHOLD,
            alpha=alpha,
            direction=DIRECTIONS[direction] if scored else "none",
            expected=dict(zip(names, expected, strict=True)) if scored else {},
            lower=dict(zip(names, lower, strict=True)) if scored else {},
            upper=dict(zip(names, upper, strict=True)) if scored else {},
            contributors=self._contributors(x, expected, contribution, top_contributors) if scored else [],
            anomaly_started_at=started_at if scored else None,
            imputed=[name for name, number in zip(names, x, strict=True) if number is None] if scored else [],
            status=status,
            samples_until_ready=missing,
            model=self._manifest.name,
            model_version=self._manifest.version,
            state_version=version,
            duplicate=kind in (Kind.DUPLICATE, Kind.REPEATED),
            late=kind == Kind.LATE,
        )

    def _contributors(self, x: list[float | None], expected: list[float | None], contribution: list[float], top: int) -> list[Contributor]:
        order = sorted(range(len(x)), key=contribution.__getitem__, reverse=True)[:top]
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
