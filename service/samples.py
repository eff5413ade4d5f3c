"""Samples of series that come in bulk, for the doors of Prometheus and of OTLP's metrics: which are scored, and what became of them.

    samples of some series ─► scored as events of their streams, ended, or only counted ─► Tally

A sample's identity is its stream and its time in ms: sent again it is a duplicate. A NaN is a missing value, ±Inf too. The stale marker
ends a stream: it is no anomaly, and nobody waits for the stream any longer. A failed scrape has the same marker, so an open alert waits
for a while before it ends with its stream.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.api import Sent
from service.errors import (
    BadEvent,
    BadParameter,
    FutureEvent,
    ItemError,
    NotCommitted,
    StateConflict,
    StoreUnavailable,
    TooManyStreams,
    UnknownStream,
)
from service.events import FLOAT32_MAX, Columns
from service.features import COUNTED_SECONDS, of_another_unit
from service.metrics import Metrics
from service.names import Series
from service.prompb import STALE, Written
from service.results import Scored
from service.rounds import Kind
from service.scorer import Scorer

AHEAD_SECONDS = 5.0
"""A stream's last sample that is further ahead of this clock is told as such: its sender's clock was wrong."""

_REASONS: Mapping[type[ItemError], str] = {
    BadEvent: "of a series or with a time that cannot be used",
    FutureEvent: "ahead of this clock",
    TooManyStreams: "of a new stream that the store has no room for (ONSET_MAX_STREAMS, its maxmemory)",
    StateConflict: "not written, other replicas were faster",
    NotCommitted: "not written, the store stopped answering",
}
_AGAIN = (StateConflict, NotCommitted)
"""What may be taken when it is sent again."""
_LATE = "older than the last one of their stream"

Ended = Callable[[str, Mapping[str, float]], None]
"""Told of a model's streams that have ended, and when (seconds since 1970)."""


@dataclass
class Tally:
    """What became of the samples of one request."""

    outcomes: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Of each reason the first sentence, which names a series."""
    again: bool = False

    def refuse(self, reason: str, count: int, sentence: str, *, again: bool = False) -> None:
        self.refused[reason] += count
        self.first.setdefault(reason, sentence)
        self.again |= again
        self.outcomes["failed" if again else "late" if reason == _LATE else "rejected"] += count

    @property
    def reasons(self) -> str:
        """Why samples were refused, with the first of each kind."""
        return "; ".join(f"{count} {reason} (the first: {self.first[reason].removesuffix('.')})" for reason, count in self.refused.items())


class Samples:
    """Scores the samples of a door. `ended` are told of the streams that stale markers have ended."""

    def __init__(self, door: str, metrics: Metrics, ended: Sequence[Ended] = (), end_seconds: float = 0) -> None:
        """An open alert outlives its stream's stale marker by `end_seconds`."""
        self._door, self._metrics, self._ended, self._end_seconds = door, metrics, ended, end_seconds

    async def take(self, sent: Sent, written: Written[Series], feature: str) -> Tally:
        """Score them as values of `feature`. Raises StoreUnavailable where none is written, Overloaded."""
        tally = Tally(unscored=Counter(histogram=written.histograms, exemplar=written.exemplars, metadata=written.metadata))
        taken = _taken(written, tally)
        ends = written.bits == STALE
        await self._score(sent, written, np.flatnonzero(taken & ~ends), feature, tally)
        await self._end(sent.scorer, written, np.flatnonzero(taken & ends), tally)
        self._count(tally)
        return tally

    async def _score(self, sent: Sent, written: Written[Series], places: NDArray[np.intp], feature: str, tally: Tally) -> None:
        if len(places) == 0:
            return
        columns = _columns(written, places, feature, tally)
        try:
            scored = await sent.scorer.score_columns(columns, sender=sent.sender)
        except StoreUnavailable:
            self._metrics.events.labels(self._door, "failed").inc(len(places))
            raise
        for error in scored.errors.values():
            tally.refuse(_REASONS[type(error)], 1, error.detail, again=isinstance(error, _AGAIN))
        kinds = scored.scores.kinds
        if scored.errors:
            kinds = kinds[~np.isin(scored.places, list(scored.errors))]
        counts = np.bincount(kinds, minlength=len(Kind)).tolist()
        tally.outcomes["scored"] += counts[Kind.SCORED]
        tally.outcomes["duplicate"] += counts[Kind.DUPLICATE] + counts[Kind.REPEATED]
        if counts[Kind.LATE]:
            tally.refuse(_LATE, counts[Kind.LATE], await _first_late(sent.scorer, scored))

    async def _end(self, scorer: Scorer, written: Written[Series], places: NDArray[np.intp], tally: Tally) -> None:
        if len(places) == 0:
            return
        seconds = written.milliseconds[places] / 1000
        owners = written.owner[places].tolist()
        ends = {written.series[owner].stream_id: second for owner, second in zip(owners, seconds.tolist(), strict=True)}
        tally.unscored["ended"] += len(places)
        await scorer.streams.end(ends, self._end_seconds)
        for tell in self._ended:
            tell(scorer.detector.name, ends)

    def _count(self, tally: Tally) -> None:
        for outcome, count in (+tally.outcomes).items():
            self._metrics.events.labels(self._door, outcome).inc(count)
        for what, count in (+tally.unscored).items():
            self._metrics.unscored.labels(what).inc(count)


def feature_of(scorer: Scorer) -> str:
    """The one feature of a scorer's model. Raises BadParameter."""
    names = scorer.detector.manifest.feature_names
    if len(names) != 1:
        detail = f"Model '{scorer.detector.name}' has {len(names)} features, a sample is one number: add ?model=NAME of a model with one."
        raise BadParameter(detail, "model")
    return names[0]


def _taken(written: Written[Series], tally: Tally) -> NDArray[np.bool_]:
    """[N] whether a sample is of a series that is scored; why the others are not goes into the tally."""
    scored = np.array([not series.skip and series.error is None for series in written.series], np.bool_)
    taken: NDArray[np.bool_] = scored[written.owner] if len(scored) else np.zeros(0, np.bool_)
    counts = np.bincount(written.owner, minlength=len(written.series))
    for i in np.flatnonzero(~scored & (counts > 0)).tolist():
        series = written.series[i]
        if series.error is not None:
            tally.refuse(_REASONS[BadEvent], int(counts[i]), series.error.detail)
        else:
            tally.unscored[series.skip] += int(counts[i])
    past = taken & (written.milliseconds < 1000 * COUNTED_SECONDS)
    if past.any():
        error = of_another_unit(int(written.milliseconds[past][0]), "milliseconds", "time")
        tally.refuse(_REASONS[BadEvent], int(past.sum()), error.detail)
    return taken & ~past


def _columns(written: Written[Series], places: NDArray[np.intp], feature: str, tally: Tally) -> Columns:
    """The samples at these places as events."""
    of = [written.series[owner] for owner in written.owner[places].tolist()]
    values = written.values[places]
    missing = np.isnan(values)
    infinite = np.abs(values) > FLOAT32_MAX
    tally.unscored["missing"] += int(missing.sum())
    counter = np.array([series.rate for series in of], np.bool_)
    infinite &= ~counter | np.isinf(values)
    tally.unscored["infinite"] += int(infinite.sum())
    values = np.where(infinite, np.nan, values)
    milliseconds = written.milliseconds[places]
    return Columns(
        [series.stream_id for series in of],
        [None] * len(of),
        {feature: np.where(counter, np.nan, values)},
        milliseconds / 1000,
        milliseconds,
        {},
        raw=np.where(counter, values, np.nan) if counter.any() else None,
    )


async def _first_late(scorer: Scorer, scored: Scored) -> str:
    """Names a late sample, and by how much: other replicas send the series too where it is little, where it is much a clock was wrong."""
    i = int(np.flatnonzero(scored.scores.kinds == Kind.LATE)[0])
    said = f"{scored.stream_ids[i]} at {scored.timestamp[i]:.3f}"
    try:
        last = float((await scorer.streams.last(scored.stream_ids[i])).timestamp)
    except UnknownStream:  # forgotten meanwhile
        return said
    said += f", {last - scored.timestamp[i]:.3f} s before that one"
    ahead = last - time.time()
    return f"{said}, which is {ahead:.0f} s ahead of this clock" if ahead > AHEAD_SECONDS else said
