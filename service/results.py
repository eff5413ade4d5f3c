"""Records and verdicts → the replies that clients read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, get_args

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from service.artifact import NEW, NEW_TEXT, Lines, Manifest
from service.errors import ItemError
from service.events import SEVERITIES, Contributor, Event, Line, Result, Status
from service.ordinary import Ordinary, whole
from service.policy import DIRECTIONS, NO_DIRECTION, THRESHOLD, Policy, Verdicts, judge
from service.rounds import Kind, Outcomes
from service.state import FROZEN, Rows

STATUSES: tuple[Status, ...] = get_args(Status)

Numbers = dict[str, float | None]

_encoder = msgspec.json.Encoder()

# Plain numbers, made once: on Python 3.11 each member of an Enum is a function call.
_SCORED, _DUPLICATE, _REPEATED, _LATE = map(int, (Kind.SCORED, Kind.DUPLICATE, Kind.REPEATED, Kind.LATE))
TOP = 10
"""Contributors told where a request does not say how many."""
TOGETHER = 256
"""Events of a long request whose replies are made, encoded and let go before those of the next ones: what those of 4,000 events of eight
features are made of is more than the processor's caches hold, and took twice as long."""

Values = list[Any]
"""A field of N results."""


@dataclass(frozen=True)
class Model:
    """What replies say of the detector that made them."""

    name: str
    version: str
    warmup: int
    names: tuple[str, ...]
    """Of the F features."""
    patterns: Patterns | None
    """Of a log model."""
    ordinary: Ordinary | None
    """Of any other."""

    @property
    def ranged(self) -> tuple[str, ...]:
        """The features that have a range: all but a line's code."""
        return self.names if self.patterns is None else self.names[1:]


@dataclass(frozen=True)
class Batch:
    """A judged batch."""

    outcomes: Outcomes
    verdicts: Verdicts
    confidence: NDArray[np.float64]
    model: Model

    def of(self, here: slice | list[int]) -> Batch:
        """The events there alone."""
        outcomes, verdicts = self.outcomes, self.verdicts
        some = Verdicts(*(getattr(verdicts, name)[here] for name in Verdicts.__dataclass_fields__))
        return Batch(Outcomes(outcomes.records[here], outcomes.kinds[here]), some, self.confidence[here], self.model)

    @cached_property
    def timestamp(self) -> Values:
        timestamps: Values = self.outcomes.records["timestamp"].tolist()
        return timestamps

    @cached_property
    def heads(self) -> list[tuple[Any, ...]]:
        """Fields of Result between `timestamp` and `contributors`, one row an event: made once for all replies."""
        records, verdicts, model, N = self.outcomes.records, self.verdicts, self.model, len(self.outcomes.kinds)
        told = self.told
        fields = (
            _nullable(verdicts.anomaly_score),
            _nullable(records["p_value"]),
            _nullable(verdicts.alert_score),
            verdicts.is_anomaly.tolist(),
            _nullable(np.where(np.isnan(records["p_value"]), np.nan, verdicts.grade)),
            [SEVERITIES[level] for level in verdicts.severity.tolist()],
            self.confidence.tolist(),
            [THRESHOLD] * N,
            [_shortest(alpha) for alpha in records["alpha"].tolist()],
            [DIRECTIONS[direction] for direction in verdicts.direction.tolist()],
            _named(records["expected"], model.names) if told is None else [one.expected for one in told],
            *(_named(records[name], model.ranged) for name in ("lower", "upper")),
        )
        self._hide(fields, (None, None, None, False, None, "none", ..., ..., ..., "none", {}, {}, {}))
        return list(zip(*fields, strict=True))

    @cached_property
    def tails(self) -> list[tuple[Any, ...]]:
        """Fields of Result after `contributors` and up to `late`."""
        records, model, kinds = self.outcomes.records, self.model, self.outcomes.kinds
        N, missing = len(kinds), np.maximum(0, model.warmup - records["version"].astype(np.int64))
        fields = (
            _nullable(records["started_at"]),
            self._imputed(),
            [STATUSES[status] for status in status_of(missing, records["flags"]).tolist()],
            missing.tolist(),
            [model.name] * N,
            [model.version] * N,
            records["version"].tolist(),
            ((kinds == _DUPLICATE) | (kinds == _REPEATED)).tolist(),
            (kinds == _LATE).tolist(),
        )
        self._hide(fields, (None, [], *[...] * 7))
        return list(zip(*fields, strict=True))

    @cached_property
    def ends(self) -> list[bytes | None]:
        """Of each reply that tells TOP contributors, as JSON, from its scores on; None = the event is not ordinary."""
        records, verdicts, model = self.outcomes.records, self.verdicts, self.model
        ends: list[bytes | None] = [None] * len(records)
        if model.ordinary is None:
            return ends
        ordinary = (self.outcomes.kinds == _SCORED) & ~verdicts.is_anomaly & (verdicts.alert_score == 0) & (records["flags"] == 0)
        ordinary &= ~np.isnan(records["p_value"]) & np.isnan(records["started_at"]) & ~np.isnan(records["x"]).any(axis=1)
        at = np.flatnonzero(ordinary & (records["version"] >= model.warmup))
        every = len(at) == len(records)
        some = slice(None) if every else at
        alpha = [_shortest(alpha) for alpha in records["alpha"][some].tolist()]
        made = model.ordinary.ends(records[some], verdicts.anomaly_score[some], self.confidence[some], alpha)
        if every:
            return list(made)
        for i, end in zip(at.tolist(), made, strict=True):
            ends[i] = end
        return ends

    @cached_property
    def rest(self) -> tuple[dict[int, int], Batch]:
        """The events that are not ordinary as a batch of their own, and where each is in it."""
        at = [i for i, end in enumerate(self.ends) if end is None]
        return {i: place for place, i in enumerate(at)}, self.of(at)

    @cached_property
    def told(self) -> list[Told] | None:
        """Of lines."""
        return None if self.model.patterns is None else self.model.patterns.told(self.outcomes.records)

    @cached_property
    def has(self) -> NDArray[np.bool_]:
        """[N] whether an event has a result."""
        kinds = self.outcomes.kinds
        has: NDArray[np.bool_] = (kinds == _SCORED) | (kinds == _DUPLICATE)
        return has

    @cached_property
    def usual(self) -> list[list[Contributor]]:
        """Of all events, TOP contributors."""
        return self.contributors(slice(None), TOP)

    def contributors(self, at: slice | list[int], top: int) -> list[list[Contributor]]:
        """Of the events there, the `top` features that contribute most; of missing ones those that are why it is anomalous."""
        records, names = self.outcomes.records, self.model.names
        columns = [records["contribution"][at], _actual(records[at], self.model), records["expected"][at]]
        if not top:
            found: list[list[Contributor]] = [[] for _ in columns[0]]
        elif len(names) == 1:  # of most streams, and nothing to be sorted
            [name] = names
            rows = zip(*(_nullable(column[:, 0]) for column in columns), strict=True)
            found = [[] if number is None else [Contributor(name, part, number, likely)] for part, number, likely in rows]
        else:
            found = _largest(names, top, *columns)
        has = self.has[at]
        return found if has.all() else [one if there else [] for one, there in zip(found, has.tolist(), strict=True)]

    def _imputed(self) -> list[list[str]]:
        """Names of the missing values."""
        missing = np.isnan(self.outcomes.records["x"])
        found: list[list[str]] = [[] for _ in range(len(missing))]
        if self.model.patterns is None:  # numbers that a line does not have are none that are missing
            for i in np.flatnonzero(missing.any(axis=1)).tolist():
                found[i] = [name for name, gone in zip(self.model.names, missing[i].tolist(), strict=True) if gone]
        return found

    def _hide(self, fields: Sequence[Values], instead: Sequence[Any]) -> None:
        """Put `instead` in the place of what events without a result do not tell, in place; ... = it is told."""
        for i in np.flatnonzero(~self.has).tolist():
            for values, nothing in zip(fields, instead, strict=True):
                if nothing is not ...:
                    values[i] = nothing


@dataclass(frozen=True)
class Told:
    """What is told of a line besides its scores."""

    code: int
    template: str | None
    before: list[str]
    expected: Numbers
    """Pattern → its chance."""


def _actual(records: Rows, model: Model) -> NDArray[np.float32]:
    """[N, F] values as they are told: of a new pattern its code, without its kind."""
    x: NDArray[np.float32] = records["x"]
    return x if model.patterns is None else np.concatenate([np.floor(x[:, :1]), x[:, 1:]], axis=1)


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
            template = None if int(code) == NEW else texts[int(code)]
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
        patterns = None if manifest.lines is None else Patterns(manifest.lines)
        name, version, features = manifest.name, manifest.version, manifest.feature_names
        ordinary = None if patterns is not None else Ordinary(name, version, features, TOP)
        self._model = Model(name, version, manifest.warmup, features, patterns, ordinary)

    def judged(self, outcomes: Outcomes) -> Answers:
        """Verdicts over a batch."""
        records, kinds = outcomes.records, outcomes.kinds
        verdicts = judge(records)
        scored = kinds == Kind.SCORED
        return Answers(
            Batch(outcomes, verdicts, self._policy.confidence(records["version"]), self._model),
            0,
            len(kinds),
            kinds.tolist(),
            anomalies=int((scored & (verdicts.anomaly_score > THRESHOLD)).sum()),
            onsets=int((scored & (verdicts.alert_score > THRESHOLD)).sum()),
            expected=float(records["onset_alpha"][scored & ~np.isnan(records["onset_p"])].sum(dtype=np.float64)),
        )

    def results(self, events: Sequence[Event], answers: Answers, *, top_contributors: int) -> list[Result]:
        """One result for each of N events, in order. A duplicate echoes the event it answers and carries the stored result."""
        return _results(events, answers.batch, slice(answers.start, answers.stop), top_contributors)

    def as_json(self, events: Sequence[Event], answers: Answers, *, top_contributors: int) -> list[msgspec.Raw]:
        """The same as JSON."""
        N, texts = len(events), list[bytes]()
        if N <= TOGETHER:
            texts = _texts(events, answers.batch, slice(answers.start, answers.stop), top_contributors)
        else:
            for i in range(0, N, TOGETHER):
                some = events[i : i + TOGETHER]
                batch = answers.batch.of(slice(answers.start + i, answers.start + i + len(some)))
                texts += _texts(some, batch, slice(None), top_contributors)
        return list(map(msgspec.Raw, texts))

    def picked(self, events: Sequence[Event], answers: Answers, places: Sequence[int]) -> list[Result]:
        """Results of the events at these places of `answers`."""
        batch, at = answers.batch, [answers.start + i for i in places]
        if 2 * len(at) < len(batch.outcomes.kinds):  # a batch may have thousands of events, and one whose alert moves
            return _results(events, batch.of(at), slice(None), TOP)
        return _results(events, batch, at, TOP)

    def scores(self, answers: Sequence[Answers]) -> Scores:
        """The results of several answers, one after the other, as columns."""
        parts = [(part.batch.outcomes, slice(part.start, part.stop)) for part in answers]
        kinds = np.concatenate([outcomes.kinds[here] for outcomes, here in parts])
        records = np.concatenate([outcomes.records[here] for outcomes, here in parts])
        verdicts, version = judge(records), records["version"]
        has = (kinds == Kind.SCORED) | (kinds == Kind.DUPLICATE)
        missing = np.maximum(0, self._model.warmup - version.astype(np.int64))
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
            x=_actual(records, self._model),
            expected=records["expected"],
            lower=records["lower"],
            upper=records["upper"],
            contribution=records["contribution"],
            anomaly_started_at=np.where(has, records["started_at"], np.nan),
            status=status_of(missing, records["flags"]),
            samples_until_ready=missing,
            state_version=version,
        )


def _texts(events: Sequence[Event], batch: Batch, at: slice, top: int) -> list[bytes]:
    """The same as JSON."""
    if top != TOP or batch.model.ordinary is None:
        return [_encoder.encode(result) for result in _results(events, batch, at, top)]
    ends = batch.ends[at]
    texts = whole(events, batch.timestamp[at], [end or b"" for end in ends])
    odd = [i for i, end in enumerate(ends) if end is None]
    if odd:
        places, rest = batch.rest
        first = at.start or 0
        results = _results([events[i] for i in odd], rest, [places[first + i] for i in odd], TOP)
        for i, result in zip(odd, results, strict=True):
            texts[i] = _encoder.encode(result)
    return texts


def _results(events: Sequence[Event], batch: Batch, at: slice | list[int], top: int) -> list[Result]:
    """Results of the events there. By position: with its 28 names a call would take five times as long."""
    contributors = _of(batch.usual, at) if top == TOP else batch.contributors(at, top)
    rows = zip(events, _of(batch.timestamp, at), _of(batch.heads, at), contributors, _of(batch.tails, at), strict=True)
    results = [
        Result(event.stream_id or "", event.event_id, taken if event.timestamp is None else event.timestamp, *(*head, parts, *tail))
        for event, taken, head, parts, tail in rows
    ]
    if batch.told is None:
        return results
    lines = _lines(events, _of(batch.told, at), batch.has[at].tolist())
    return [replace(result, line=line) for result, line in zip(results, lines, strict=True)]


def _lines(events: Sequence[Event], told: Sequence[Told], has: Sequence[bool]) -> list[Line | msgspec.UnsetType]:
    return [
        Line(event.message, one.template, one.code == NEW, one.before) if there else msgspec.UNSET
        for event, one, there in zip(events, told, has, strict=True)
    ]


def _of(values: list[Any], at: slice | list[int]) -> list[Any]:
    return values[at] if isinstance(at, slice) else [values[i] for i in at]


def _named(column: NDArray[np.floating], names: tuple[str, ...]) -> list[Numbers]:
    """[N, F] → feature → number for each event, of the last features if there are fewer names."""
    if len(names) == 1:
        [name] = names
        return [{name: number} for number in _nullable(column[:, -1])]
    # A comprehension, and a zip that compares lengths, would take twice as long.
    return list(map(dict, map(zip, itertools.repeat(names), _nullable(column[:, -len(names) :]))))


def _largest(
    names: tuple[str, ...], top: int, share: NDArray[np.floating], x: NDArray[np.floating], expected: NDArray[np.floating]
) -> list[list[Contributor]]:
    """Of each of N events, shares, values and expected ones [N, F]: the `top` features of the largest share.

    Missing ones have none but where it is that they are missing that is improbable.
    """
    order = np.argsort(-share, axis=1, kind="stable")[:, :top]
    chosen = [_nullable(np.take_along_axis(column, order, axis=1).ravel()) for column in (share, x, expected)]
    flat = list(map(Contributor, map(names.__getitem__, order.ravel().tolist()), *chosen))
    found = [flat[i : i + order.shape[1]] for i in range(0, len(flat), order.shape[1])]
    return [[one for one in some if one.actual is not None or one.contribution > 0] for some in found] if np.isnan(x).any() else found


def status_of(missing: NDArray[np.int64], flags: NDArray[np.uint32]) -> NDArray[np.int8]:
    """[N] of STATUSES; `missing` are the events until a stream has warmed up."""
    return np.where(missing > 0, 0, np.where(flags & FROZEN != 0, 2, 1)).astype(np.int8)


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
