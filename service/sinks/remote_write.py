"""Scores back into a Prometheus by remote-write 1.0, under the labels that their series came with: a panel draws series and band together.

    feed ─► queue, bounded; the oldest batch makes room ─► requests of REQUEST_SAMPLES at most ─► one connection, in order
    2xx  sent      429, 5xx, no answer  sent again, after Retry-After or a growing pause, until it is taken     other  dropped, counted

    node_load1{instance="a",job="node"}   →   yhat{for="node_load1",instance="a",job="node",model="default"}
    a stream that is no series            →   yhat{feature="value",model="default",stream="pump-7"}, as at /metrics

Best effort: a replica that dies loses what it has not sent, and nobody learns of it. Only what a receiver can take is sent: of a stream
each time (ms) after the one before it, and nothing older than `max_age`, for it would cost the whole request.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
import structlog

from service.asking import WRITTEN_BACK
from service.feed import Batch
from service.fleet import Judged, Seen
from service.metrics import Metrics
from service.names import FOR, MODEL, NAME, STREAM, Names, exported
from service.prompb import STALE, encode_labels, pack, series_of, times_of
from service.sinks.posting import UNANSWERED, retry_after
from service.wire import PROTOBUF

REQUEST_SAMPLES = 2000
LINGER_SECONDS = 0.5
"""How long samples wait for others before they are sent."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
LONGEST_RETRY_AFTER = 60.0
TOLD_SECONDS = 60.0
"""A receiver that refuses is told of once in this time."""

_OF_FEATURES = {"y": "x", "yhat": "expected", "yhat_lower": "lower", "yhat_upper": "upper"}
"""Metrics with a series for each feature, and their columns of the record."""
_NAMES = {name: encode_labels([(NAME, name)]) for name in WRITTEN_BACK}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """Where to write, and what."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = WRITTEN_BACK
    max_events: int = 100_000
    """Events waiting, at most; beside the batch that came last."""
    max_streams: int = 100_000
    """Streams whose labels are kept encoded, about 0.5 kB each."""
    max_age: float = 1800.0
    timeout: float = 30.0


@dataclass(frozen=True)
class _Ended:
    """Streams that have ended, and when (seconds since 1970)."""

    model: str
    ends: Mapping[str, float]


_Place = tuple[bytes, bytes]
"""Encoded labels: those before NAME, and those after it."""


class _Labels:
    """Of one stream and of each of its features."""

    __slots__ = ("features", "last", "stream")

    def __init__(self, stream: _Place, features: Sequence[_Place]) -> None:
        self.stream, self.features = [stream], features
        self.last = 0  # ms of the last sample

    def of(self, name: str) -> Sequence[_Place]:
        """Of each series of a metric."""
        return self.features if name in _OF_FEATURES else self.stream


@dataclass
class _Request:
    """Series for one request, the events that they are of (`sent`), and all events that it is done with."""

    series: list[bytes]
    sent: int = 0
    events: int = 0


class WriteBack:
    """Writes what it sees to a target. `clock` gives seconds since 1970."""

    def __init__(
        self,
        target: Target,
        names: Names,
        features: Mapping[str, Sequence[str]],
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`features` of each model."""
        self._target, self._names, self._features, self._clock = target, names, features, clock
        self._events, self._retries, self._bug = metrics.written_back, metrics.write_back_retries, metrics.bug
        self._queue: deque[Seen | _Ended] = deque()
        self._waiting = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._labels: dict[tuple[str, str], _Labels] = {}
        self._told_at = -math.inf
        self._numbers = [name for name in WRITTEN_BACK if name in target.metrics]
        metrics.write_back_waiting.set_function(lambda: self._waiting)

    def see(self, batch: Batch) -> None:
        """For the feed."""
        self._put(Seen.of(batch))

    def ended(self, model: str, ends: Mapping[str, float]) -> None:
        """What was written of these streams ends, too."""
        self._put(_Ended(model, ends))

    async def run(self) -> None:
        """Send until cancelled, or until `stop` finds nothing left."""
        async with httpx.AsyncClient(timeout=self._target.timeout) as client:
            while self._queue or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                if not self._closing:
                    await asyncio.sleep(LINGER_SECONDS)
                for request in self._requests():
                    if request.sent:
                        await self._sent(client, request)
                    self._waiting -= request.events

    async def stop(self, running: asyncio.Task[None], seconds: float) -> None:
        """Send what waits within `seconds`; the rest is lost."""
        self._closing = True
        self._wake.set()
        await asyncio.wait([running], timeout=seconds)
        running.cancel()
        await asyncio.wait([running])
        self._events.labels("lost").inc(self._waiting)

    def _put(self, item: Seen | _Ended) -> None:
        self._queue.append(item)
        self._waiting += _events_of(item)
        while self._waiting > self._target.max_events and len(self._queue) > 1:
            dropped = _events_of(self._queue.popleft())
            self._waiting -= dropped
            self._events.labels("overflow").inc(dropped)
        self._wake.set()

    def _requests(self) -> Iterator[_Request]:
        """All that waits, in order, also what comes while it is sent."""
        request = _Request([])
        while self._queue:
            for found in self._encoded(self._queue.popleft()):
                request.series.extend(found)
                request.events += 1
                request.sent += bool(found)
                if len(request.series) >= REQUEST_SAMPLES:
                    yield request
                    request = _Request([])
        yield request

    def _encoded(self, item: Seen | _Ended) -> list[list[bytes]]:
        """The series of each of its events."""
        try:
            return list(self._ends(item) if isinstance(item, _Ended) else self._scores(item))
        except Exception as error:  # a bug must not end the writing for all streams; it is counted and logged
            self._bug(error)
            return [[]] * _events_of(item)

    def _scores(self, batch: Seen) -> Iterator[list[bytes]]:
        """The series of each event, encoded; none of one that was not scored, or cannot be taken."""
        judged = Judged([batch])
        yield from [[]] * (len(batch.stream_ids) - len(judged.stream_ids))
        milliseconds = np.rint(judged.record("timestamp") * 1000).astype(np.int64)
        columns = [(name, *self._column(judged, name)) for name in self._numbers]
        oldest = max(1000 * (self._clock() - self._target.max_age), 0)
        encoded, times = times_of(np.maximum(milliseconds, 0)), milliseconds.tolist()
        for i, stream_id in enumerate(judged.stream_ids):
            labels = self._labels_of(batch.model, stream_id)
            if times[i] <= labels.last or times[i] < oldest:
                self._events.labels("old" if times[i] < oldest else "repeated").inc()
                yield []
                continue
            labels.last = times[i]
            found: list[bytes] = []
            for name, present, content in columns:
                places = labels.of(name)
                for j, place in enumerate(places, i * len(places)):
                    if present[j]:
                        found.append(series_of(_named(place, name), content[8 * j : 8 * j + 8], encoded[i]))
            yield found

    def _ends(self, ended: _Ended) -> Iterator[list[bytes]]:
        """Stale markers for what was written of each stream."""
        marker = STALE.to_bytes(8, "little")
        for stream_id, seconds in ended.ends.items():
            labels, milliseconds = self._labels.get((ended.model, stream_id)), round(seconds * 1000)
            if labels is None or milliseconds <= labels.last:
                yield []
                continue
            labels.last = milliseconds
            [time] = times_of(np.array([milliseconds]))
            yield [series_of(_named(place, name), marker, time) for name in self._numbers for place in labels.of(name)]

    def _column(self, judged: Judged, name: str) -> tuple[list[bool], bytes]:
        """Which numbers there are, and all of them as float64, event by event."""
        if name == "onset_anomaly":
            numbers = judged.verdict("is_anomaly").astype(np.float64)
        elif name in _OF_FEATURES:
            numbers = judged.record(_OF_FEATURES[name]).astype("<f8").ravel()
        else:
            numbers = judged.verdict(name).astype("<f8")
        return (~np.isnan(numbers)).tolist(), numbers.tobytes()

    def _labels_of(self, model: str, stream_id: str) -> _Labels:
        labels = self._labels.get((model, stream_id))
        if labels is None:
            if len(self._labels) >= self._target.max_streams:
                del self._labels[next(iter(self._labels))]
            labels = self._labels[model, stream_id] = self._made(model, stream_id)
        return labels

    def _made(self, model: str, stream_id: str) -> _Labels:
        sent = self._names.labels(stream_id)
        if sent is None or sent.keys() == {NAME}:  # a word alone may be any stream's id
            stream = {STREAM: stream_id, MODEL: model}
            return _Labels(_place(stream), [_place(stream | {"feature": feature}) for feature in self._features[model]])
        labels = exported({name: value for name, value in sent.items() if name != NAME}, (MODEL, FOR))
        labels |= {MODEL: model} | ({FOR: sent[NAME]} if NAME in sent else {})
        place = _place(labels)
        return _Labels(place, [place])

    async def _sent(self, client: httpx.AsyncClient, request: _Request) -> None:
        try:
            await self._send(client, request)
        except Exception as error:  # a bug must not end the writing for all streams; it is counted and logged
            self._events.labels("lost").inc(request.sent)
            self._bug(error)

    async def _send(self, client: httpx.AsyncClient, request: _Request) -> None:
        """Until it is taken or refused."""
        body, pause = pack(b"".join(request.series)), FIRST_PAUSE
        while True:
            try:
                answer = await client.post(self._target.url, content=body, headers={**_HEADERS, **self._target.headers})
            except UNANSWERED as error:
                wait, why = None, f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    self._events.labels("sent").inc(request.sent)
                    return
                why = f"{answer.status_code}: {answer.text[:200].strip()}"
                if answer.status_code != 429 and answer.status_code < 500:
                    self._events.labels("refused").inc(request.sent)
                    self._tell("write_back_refused", why)
                    return
                wait = retry_after(answer.headers.get("retry-after", ""), self._clock(), LONGEST_RETRY_AFTER)
            self._retries.inc()
            self._tell("write_back_waits", why)
            await asyncio.sleep(wait if wait is not None else pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tell(self, event: str, why: str) -> None:
        now = time.monotonic()
        if now - self._told_at >= TOLD_SECONDS:
            self._told_at = now
            address = httpx.URL(self._target.url)
            log.warning(event, host=address.host, path=address.path, answer=why)


_HEADERS = {
    "content-type": PROTOBUF,
    "content-encoding": "snappy",
    "x-prometheus-remote-write-version": "0.1.0",
    "user-agent": "onset",
}


def _named(place: _Place, name: str) -> bytes:
    return place[0] + _NAMES[name] + place[1]


def _events_of(item: Seen | _Ended) -> int:
    return len(item.ends) if isinstance(item, _Ended) else len(item.stream_ids)


def _place(labels: Mapping[str, str]) -> _Place:
    before = [label for label in labels.items() if label[0] < NAME]
    return encode_labels(before), encode_labels([label for label in labels.items() if label[0] > NAME])
