"""Prometheus' door: POST /api/v1/write takes remote-write 1.0 and 2.0; every series is a stream, scored by a one-feature model.

    body ─► snappy, protobuf (prompb.py) ─► series by name and rule (names.py) ─► scorer.score_columns ─► 204, or what was refused

A sample's identity is its time in ms: sent again it is a duplicate, and counts as written. So a request may be repeated as a whole.

    status   when                                                                          the sender
    204      everything was taken: scored, a duplicate, or ignored on purpose (counted)    goes on
    400      some samples can never be taken: late, in the future, of a bad series, one    drops the request; its good samples are scored
             stream too many; or the body cannot be read, and then nothing is scored
    413 415  over a limit; not snappy, or not one of the two messages                      drops it, or tries the other message
    429      the queue is full                                                             waits if retry_on_http_429 is set
    503      the store does not answer, for all samples or some                            sends all of it again

A NaN is a missing value, ±Inf too. The stale marker ends a stream: it is no anomaly, and nobody waits for the stream any longer. A failed
scrape has the same marker, so an open alert waits for a while before it ends with its stream.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from service.api import Door, Sent
from service.errors import (
    BadEvent,
    BadParameter,
    FutureEvent,
    ItemError,
    NotCommitted,
    StateConflict,
    StoreUnavailable,
    TooManyStreams,
    TooSlow,
    Unfinished,
    UnknownStream,
    UnsupportedMedia,
)
from service.events import Columns
from service.features import FLOAT32_MAX
from service.intake import Incoming
from service.metrics import Metrics
from service.names import Names, Series
from service.problems import Problem, respond
from service.prompb import STALE, Written, decode_1, decode_2, unpack, unpacked_size
from service.results import Scored
from service.rounds import Kind
from service.scorer import Scorer
from service.shipped import beside

DOOR = "remote_write"
PATH = "/api/v1/write"
MEDIA_TYPE = "application/x-protobuf"
MESSAGE_1, MESSAGE_2 = "prometheus.WriteRequest", "io.prometheus.write.v2.Request"
RETRY_SECONDS = 1
LARGE = 2 * 1024 * 1024
"""Bytes of a body, unpacked, from which it is read beside the event loop. A sender's usual one is smaller, and read in a few ms; one of
millions of fields that mean nothing here takes seconds.
"""
AHEAD_SECONDS = 5.0
"""A stream's last sample that is further ahead of this clock is told as such: its sender's clock was wrong."""

_Decode = Callable[..., Written[Series]]
_DECODERS: Mapping[str, _Decode] = {MESSAGE_1: decode_1, MESSAGE_2: decode_2}
_REASONS: Mapping[type[ItemError], str] = {
    BadEvent: "of a series or with a time that cannot be used",
    FutureEvent: "ahead of this clock",
    TooManyStreams: "of a new stream beyond ONSET_MAX_STREAMS",
    StateConflict: "not written, other replicas were faster",
    NotCommitted: "not written, the store stopped answering",
}
_AGAIN = (StateConflict, NotCommitted)
"""What may be taken when it is sent again."""
_LATE = "older than the last one of their stream"

Ended = Callable[[str, Mapping[str, float]], None]
"""Told of a model's streams that have ended, and when (seconds since 1970)."""


@dataclass
class _Tally:
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


class RemoteWrite:
    """The route's handler over a door. `ended` are told of the streams that stale markers have ended."""

    def __init__(
        self, door: Door, names: Names, max_events: int, metrics: Metrics, ended: Sequence[Ended] = (), end_seconds: float = 0
    ) -> None:
        """At most `max_events` samples, and series, a request. An open alert outlives its stream's stale marker by `end_seconds`."""
        self._end_seconds = end_seconds
        self._door, self._names, self._max_events, self._metrics, self._ended = door, names, max_events, metrics, ended
        self._latency = metrics.latency.labels(DOOR)

    async def post(self, request: Incoming) -> Response:
        """Score what a Prometheus sends."""
        started = time.perf_counter()
        message = _message(request)
        try:
            async with self._door.sent(request, unpacked_size) as sent:
                tally, written = await self._take(sent, message)
        except TooSlow as error:  # as a 408 it would be dropped
            raise Unfinished(error.detail) from error
        self._count(tally)
        self._latency.observe(time.perf_counter() - started)
        return _answer(tally, written, message)

    async def _take(self, sent: Sent, message: str) -> tuple[_Tally, Written[Series]]:
        feature = _feature(sent.scorer)
        written = await beside(partial(self._read, sent.content, message), unpacked_size(sent.content), LARGE)
        tally = _Tally(unscored=Counter(histogram=written.histograms, exemplar=written.exemplars, metadata=written.metadata))
        taken = _taken(written, tally)
        ends = written.bits == STALE
        await self._score(sent, written, np.flatnonzero(taken & ~ends), feature, tally)
        await self._end(sent.scorer, written, np.flatnonzero(taken & ends), tally)
        return tally, written

    def _read(self, content: bytes, message: str) -> Written[Series]:
        return _DECODERS[message](unpack(content), self._names.find, self._names.name, most=self._max_events)

    async def _score(self, sent: Sent, written: Written[Series], places: NDArray[np.intp], feature: str, tally: _Tally) -> None:
        if len(places) == 0:
            return
        columns = _columns(written, places, feature, tally)
        try:
            scored = await sent.scorer.score_columns(columns, sender=sent.sender)
        except StoreUnavailable:
            self._metrics.events.labels(DOOR, "failed").inc(len(places))
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

    async def _end(self, scorer: Scorer, written: Written[Series], places: NDArray[np.intp], tally: _Tally) -> None:
        if len(places) == 0:
            return
        seconds = written.milliseconds[places] / 1000
        owners = written.owner[places].tolist()
        ends = {written.series[owner].stream_id: second for owner, second in zip(owners, seconds.tolist(), strict=True)}
        tally.unscored["ended"] += len(places)
        await scorer.streams.end(ends, self._end_seconds)
        for tell in self._ended:
            tell(scorer.detector.name, ends)

    def _count(self, tally: _Tally) -> None:
        for outcome, count in (+tally.outcomes).items():
            self._metrics.events.labels(DOOR, outcome).inc(count)
        for what, count in (+tally.unscored).items():
            self._metrics.unscored.labels(what).inc(count)


def _message(request: Incoming) -> str:
    """Which message the body is. Raises UnsupportedMedia."""
    encoding = (request.header(b"content-encoding") or "snappy").lower()
    if encoding != "snappy":
        raise UnsupportedMedia(f"Content-Encoding '{encoding[:64]}' is not read here; send snappy.")
    sent = request.header(b"content-type") or ""
    media, *parameters = (part.strip() for part in sent.split(";"))
    names = [parameter[6:].strip('"') for parameter in parameters if parameter.lower().startswith("proto=")]
    message = names[0] if names else MESSAGE_1
    if media.lower() != MEDIA_TYPE or message not in _DECODERS:
        shown = (request.header(b"content-type") or "")[:128]
        raise UnsupportedMedia(
            f"Content-Type '{shown}' is not read here; send {MEDIA_TYPE}, alone or with proto={MESSAGE_1} or {MESSAGE_2}."
        )
    return message


def _feature(scorer: Scorer) -> str:
    names = scorer.detector.manifest.feature_names
    if len(names) != 1:
        detail = f"Model '{scorer.detector.name}' has {len(names)} features, a sample is one number: add ?model=NAME of a model with one."
        raise BadParameter(detail, "model")
    return names[0]


def _taken(written: Written[Series], tally: _Tally) -> NDArray[np.bool_]:
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
    past = taken & (written.milliseconds < 0)
    if past.any():
        first = int(written.milliseconds[past][0])
        tally.refuse(_REASONS[BadEvent], int(past.sum()), f"The time {first} ms is before 1970.")
    return taken & ~past


def _columns(written: Written[Series], places: NDArray[np.intp], feature: str, tally: _Tally) -> Columns:
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


def _answer(tally: _Tally, written: Written[Series], message: str) -> Response:
    refused = sum(tally.refused.values())
    headers = {
        "x-prometheus-remote-write-samples-written": str(len(written) - refused),
        "x-prometheus-remote-write-histograms-written": str(written.histograms),
        "x-prometheus-remote-write-exemplars-written": str(written.exemplars),
    }
    if not refused:
        return Response(status_code=204, headers=headers)
    response = respond(_problem(tally, refused, len(written)))
    response.headers.update(headers)
    return response


def _problem(tally: _Tally, refused: int, sent: int) -> Problem:
    reasons = [f"{count} {reason} (the first: {tally.first[reason].removesuffix('.')})" for reason, count in tally.refused.items()]
    detail = f"{refused} of {sent} samples were refused: {'; '.join(reasons)}. The others were taken."
    if tally.again:
        return Problem("urn:onset:partly-written", "Not all samples were written", 503, detail, retry_after=RETRY_SECONDS)
    return Problem("urn:onset:partly-refused", "Some samples can never be taken", 400, detail)
