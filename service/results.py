"""Records and verdicts → the replies that clients read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat
from typing import Any, get_args

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from service.artifact import NEW, NEW_TEXT, Lines, Manifest
from service.errors import ItemError
from service.events import SEVERITIES, Contributor, Event, Line, Result, Status
from service.policy import DIRECTIONS, NO_DIRECTION, THRESHOLD, Policy, Verdicts, judge
from service.rounds import Kind, Outcomes
from service.state import FROZEN, Rows

STATUSES: tuple[Status, ...] = get_args(Status)

Numbers = dict[str, float | None]

# Plain numbers, made once: a reply is made for every event, and on Python 3.11 each member of an Enum is a function call.
_WITH_RECORD, _OLD, _LATE = (int(Kind.SCORED), int(Kind.DUPLICATE)), (int(Kind.DUPLICATE), int(Kind.REPEATED)), int(Kind.LATE)


@dataclass(frozen=True)
class Batch:
    """A judged batch."""

    outcomes: Outcomes
    verdicts: Verdicts
    confidence: NDArray[np.float64]
    names: tuple[str, ...]
    """Of the F features."""
    patterns: Patterns | None = None
    """Of a log model."""

    @cached_property
    def rows(self) -> list[tuple[Any, ...]]:
        """Everything a reply needs as plain values, one row an event: made once for all replies."""
        records, verdicts = self.outcomes.records, self.verdicts
        columns = (
            self.outcomes.kinds.tolist(),
            *(_nullable(column) for column in (verdicts.anomaly_score, records["p_value"], verdicts.alert_score)),
            verdicts.is_anomaly.tolist(),
            verdicts.grade.tolist(),
            verdicts.severity.tolist(),
            verdicts.direction.tolist(),
            self.confidence.tolist(),
            records["version"].tolist(),
            records["timestamp"].tolist(),
            _nullable(records["started_at"]),
            (records["flags"] & FROZEN != 0).tolist(),
            map(_shortest, records["alpha"].tolist()),
            _tuples(records["x"]),
            self._named(records["expected"], self.names),
            *(self._named(records[name], self._ranged) for name in ("lower", "upper")),
            _tuples(records["contribution"]),
            repeat(None) if self.patterns is None else self.patterns.told(records),
        )
        return list(zip(*columns, strict=False))  # the last may be endless

    @property
    def _ranged(self) -> tuple[str, ...]:
        """The features that have a range: all but a line's code."""
        return self.names if self.patterns is None else self.names[1:]

    def _named(self, column: NDArray[np.floating], names: tuple[str, ...]) -> list[Numbers]:
        """[N, F] → feature → number for each event, of the last features if there are fewer names."""
        if len(names) == 1:
            [name] = names
            return [{name: number} for number in _nullable(column[:, -1])]
        return [dict(zip(names, numbers, strict=True)) for numbers in _nullable(column[:, -len(names) :])]


@dataclass(frozen=True)
class Told:
    """What is told of a line besides its scores."""

    code: int
    template: str | None
    before: list[str]
    expected: Numbers
    """Pattern → its chance."""


class Patterns:
    """The texts of one log model's codes."""

    def __init__(self, lines: Lines) -> None:
        self._texts = lines.texts
        self._likely = lines.likely

    def told(self, records: Rows) -> list[Told]:
        """Of N records."""
        texts, k = self._texts, self._likely
        found = []
        for code, likely, before in zip(records["x"][:, 0].tolist(), records["likely"].tolist(), records["before"].tolist(), strict=True):
            expected = {self._text(one): chance for one, chance in zip(likely[:k], likely[k:], strict=True) if not math.isnan(one)}
            template = None if code == NEW else texts[int(code)]
            found.append(Told(int(code), template, [self._text(one) for one in before if not math.isnan(one)], expected))
        return found

    def _text(self, code: float) -> str:
        """Of what the graph says, which may be beyond its own codes: then it is NEW."""
        return self._texts[int(code)] if 0 <= code < len(self._texts) else NEW_TEXT


@dataclass(frozen=True)
class Answers:
    """What became of N events: a stretch of a batch, with what is to be counted."""

    batch: Batch
    start: int
    stop: int
    kinds: list[int]
    anomalies: int
    onsets: int
    expected: float
    """Onsets that the asked rate allows among the judged events."""

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        return self.batch.rows[self.start : self.stop]

    def part(self, start: int, stop: int) -> Answers:
        return Answers(self.batch, self.start + start, self.start + stop, self.kinds[start:stop], 0, 0, 0.0)


@dataclass(frozen=True)
class Scores:
    """The results of N events as columns, by the names of Result. NaN = null; codes are positions in SEVERITIES, DIRECTIONS, STATUSES."""

    kinds: NDArray[np.uint8]  # [N] of Kind
    has: NDArray[np.bool_]  # [N] whether there is a result: not of a late event, and not of an old duplicate
    timestamp: NDArray[np.float64]
    anomaly_score: NDArray[np.float64]
    p_value: NDArray[np.float64]
    alert_score: NDArray[np.float64]
    is_anomaly: NDArray[np.bool_]
    anomaly_grade: NDArray[np.float64]
    severity: NDArray[np.int8]
    confidence: NDArray[np.float64]
    alpha: NDArray[np.float64]
    direction: NDArray[np.int8]
    x: NDArray[np.float32]  # [N, F], as the next three
    expected: NDArray[np.float32]
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]
    contribution: NDArray[np.float32]
    anomaly_started_at: NDArray[np.float64]
    status: NDArray[np.int8]
    samples_until_ready: NDArray[np.int64]
    state_version: NDArray[np.uint64]


@dataclass(frozen=True)
class Scored:
    """What became of the events of one request that came as columns: scores [M] of some, and what is wrong with the others."""

    stream_ids: list[str]  # [M]
    event_ids: list[str | None]  # [M]
    timestamp: NDArray[np.float64]  # [M] as sent, or else when it was taken to be
    places: NDArray[np.intp]  # [M] rows of the request
    scores: Scores
    errors: dict[int, ItemError]
    """By row; such a row counts for nothing in `scores`."""


class Replies:
    """Makes the results of one detector."""

    def __init__(self, manifest: Manifest, policy: Policy) -> None:
        self._policy = policy
        self._model, self._model_version = manifest.name, manifest.version
        self._warmup = manifest.warmup
        self._names = manifest.feature_names
        self._single = len(self._names) == 1
        self._patterns = None if manifest.lines is None else Patterns(manifest.lines)

    def judged(self, outcomes: Outcomes) -> Answers:
        """Verdicts over a batch."""
        records, kinds = outcomes.records, outcomes.kinds
        verdicts = judge(records)
        scored = kinds == Kind.SCORED
        return Answers(
            Batch(outcomes, verdicts, self._policy.confidence(records["version"]), self._names, self._patterns),
            0,
            len(kinds),
            kinds.tolist(),
            anomalies=int((scored & (verdicts.anomaly_score > THRESHOLD)).sum()),
            onsets=int((scored & (verdicts.alert_score > THRESHOLD)).sum()),
            expected=float(records["onset_alpha"][scored & ~np.isnan(records["onset_p"])].sum(dtype=np.float64)),
        )

    def results(self, events: Sequence[Event], answers: Answers, *, top_contributors: int) -> list[Result]:
        """One result for each of N events, in order. A duplicate echoes the event it answers and carries the stored result."""
        result = self._result if self._patterns is None else self._line_result
        return [result(event, row, top_contributors) for event, row in zip(events, answers.rows, strict=True)]

    def picked(self, events: Sequence[Event], answers: Answers, places: Sequence[int]) -> list[Result]:
        """Results of the events at these places of `answers`."""
        rows = answers.rows
        result = self._result if self._patterns is None else self._line_result
        return [result(event, rows[i], 10) for event, i in zip(events, places, strict=True)]

    def scores(self, answers: Sequence[Answers]) -> Scores:
        """The results of several answers, one after the other, as columns."""
        parts = [(part.batch.outcomes, slice(part.start, part.stop)) for part in answers]
        kinds = np.concatenate([outcomes.kinds[here] for outcomes, here in parts])
        records = np.concatenate([outcomes.records[here] for outcomes, here in parts])
        verdicts, version = judge(records), records["version"]
        has = (kinds == Kind.SCORED) | (kinds == Kind.DUPLICATE)
        missing = np.maximum(0, self._warmup - version.astype(np.int64))
        alphas, which = np.unique(records["alpha"], return_inverse=True)
        return Scores(
            kinds=kinds,
            has=has,
            timestamp=records["timestamp"],
            anomaly_score=np.where(has, verdicts.anomaly_score, np.nan),
            p_value=np.where(has, records["p_value"], np.nan),
            alert_score=np.where(has, verdicts.alert_score, np.nan),
            is_anomaly=verdicts.is_anomaly & has,
            anomaly_grade=np.where(has & ~np.isnan(records["p_value"]), verdicts.grade, np.nan),
            severity=np.where(has, verdicts.severity, 0).astype(np.int8),
            confidence=self._policy.confidence(version),
            alpha=np.array([_shortest(alpha) for alpha in alphas.tolist()], np.float64)[which],
            direction=np.where(has, verdicts.direction, NO_DIRECTION).astype(np.int8),
            x=records["x"],
            expected=records["expected"],
            lower=records["lower"],
            upper=records["upper"],
            contribution=records["contribution"],
            anomaly_started_at=np.where(has, records["started_at"], np.nan),
            status=np.where(missing > 0, 0, np.where(records["flags"] & FROZEN != 0, 2, 1)).astype(np.int8),
            samples_until_ready=missing,
            state_version=version,
        )

    def _result(self, event: Event, row: tuple[Any, ...], top: int) -> Result:
        kind, score, p_value, alert, is_anomaly, grade, severity, direction, confidence, version, timestamp, started_at = row[:12]
        frozen, alpha, x, expected, lower, upper, contribution, _ = row[12:]
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
            expected if scored else {},
            lower if scored else {},
            upper if scored else {},
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

    def _line_result(self, event: Event, row: tuple[Any, ...], top: int) -> Result:
        """The same of a log model: patterns in place of numbers; a number that a line does not have is none that is missing."""
        result, told = self._result(event, row, top), row[-1]
        if row[0] not in _WITH_RECORD:
            return result
        line = Line(event.message, told.template, told.code == NEW, told.before)
        return replace(result, expected=told.expected, imputed=[], line=line)

    def _contributors(self, x: tuple[float | None, ...], expected: Numbers, contribution: tuple[float, ...], top: int) -> list[Contributor]:
        names = self._names
        if self._single:  # of most streams, and nothing to be sorted
            number = x[0]
            return [Contributor(names[0], contribution[0], number, expected[names[0]])] if top and number is not None else []
        order = sorted(range(len(x)), key=contribution.__getitem__, reverse=True)[:top]
        return [Contributor(names[j], contribution[j], x[j], expected[names[j]]) for j in order if x[j] is not None]


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


def _tuples(column: NDArray[np.floating]) -> list[tuple[Any, ...]]:
    """[N, F] → the numbers of each event."""
    return list(zip(_nullable(column[:, 0]), strict=True)) if column.shape[1] == 1 else list(map(tuple, _nullable(column)))
