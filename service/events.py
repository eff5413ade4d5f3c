"""The vocabulary of the service: an event comes in, a result goes out. Imports nothing of ours but the errors."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from service.errors import ItemError

MAX_NAME_LENGTH = 256
TENANT_HEADER = "X-Scope-OrgID"
"""Mimir's and Loki's name for it."""
MAX_MESSAGE_LENGTH = 65_536
FLOAT32_MAX = float(np.finfo(np.float32).max)
EARLIEST_SECONDS, LATEST_SECONDS = -62_135_510_400.0, 1e11
"""From the year 1 (a day late, for the zones) to 5138; a greater number is a time in milliseconds."""
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Whole, so that a time counted in one of them is the float next to it at every door and in every file: 1e9 rounds twice."""
UNPRINTABLE = r"[\x00-\x1f\x7f\ud800-\udfff]"
"""What a name must not hold: control characters, and halves of characters."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
Sequence_ = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Severity = Literal["none", "minor", "major", "critical"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
Direction = Literal["up", "down", "both", "none"]
Status = Literal["warming_up", "ready", "frozen"]


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One reading or log line, as a client sends it."""

    stream_id: Name | None = None
    """Which stream; may be left out where the address names it."""
    values: dict[Name, float | None] | None = None
    """Feature → number; null or left out = missing."""
    message: Annotated[str, Meta(max_length=MAX_MESSAGE_LENGTH)] | None = None
    """A log line, in place of `values`; the lines that follow its first one (a stack trace) belong to it."""
    timestamp: float | str | None = None
    """RFC 3339 (without a zone UTC), or seconds since 1970; left out = the time of arrival."""
    event_id: Name | None = None
    """Identity: the same id on the same stream is never scored twice."""
    sequence: Sequence_ | None = None
    """Position within the stream; orders the events in place of the timestamp."""
    end: bool = False
    """The stream's session ends here: an event of its own, in place of `message`."""


class Line(msgspec.Struct, frozen=True, gc=False):
    """What a log model made of a line."""

    message: str | None
    """As it was sent; null where it is not at hand (a stream that is looked up)."""
    template: str | None
    """The pattern that it matched; null = none, so it is a new one."""
    new: bool
    before: list[str]
    """Patterns of the session's lines before it, the newest first."""


class Contributor(msgspec.Struct, frozen=True, gc=False):
    """A feature that carries the error."""

    feature: str
    contribution: float
    """Its share; those of all features add up to 1."""
    actual: float | None
    """Null where it is missing: then that is what is improbable."""
    expected: float | None


class Result(msgspec.Struct, frozen=True, gc=False):
    """The answer to one event. Scores are null while the stream warms up, for a late event and for an old duplicate."""

    stream_id: str
    event_id: str | None
    timestamp: float | str
    """As it was sent; without one, when the event came, in seconds since 1970."""
    anomaly_score: float | None
    """log p / log α: above 1 = rarer than asked."""
    p_value: float | None
    """Chance of an event this unusual while the stream is normal."""
    alert_score: float | None
    """As anomaly_score where an anomaly begins, 0 elsewhere; above 1 opens an alert."""
    is_anomaly: bool
    """The decision: a score above 1, or p below 0.01 while the stream is frozen."""
    anomaly_grade: float | None
    """0 = ordinary, up to 1."""
    severity: Severity
    confidence: float
    """0 to 1, grows with the events that the stream has given."""
    threshold: float
    """Of both scores: 1."""
    alpha: float
    """The false-alarm rate in force when it was judged, per event."""
    direction: Direction
    """On which side of the band the features that carry the error lie."""
    expected: dict[str, float | None]
    """What each feature was expected to be."""
    lower: dict[str, float | None]
    """Of the band at alpha."""
    upper: dict[str, float | None]
    contributors: list[Contributor]
    """What carries the error, the most first; as many as top_contributors asks for."""
    anomaly_started_at: float | None
    """When the running anomaly began, seconds since 1970."""
    imputed: list[str]
    """Features that were missing."""
    status: Status
    """warming_up = scores are null; frozen = an alert is open, and nothing is learned."""
    samples_until_ready: int
    """Events until the stream is scored."""
    model: str
    model_version: str
    state_version: int
    """Events of the stream that were scored, this one among them."""
    duplicate: bool
    """Sent before: it was not scored again. The scores are those of then, null where they are not kept any more."""
    late: bool
    """Older than the stream's last event: not scored."""
    silent_since: float | None = None
    """Of a stream looked up or listed: time of its last event, where it has been silent for improbably long since."""
    line: Line | msgspec.UnsetType = msgspec.UNSET
    """Of a log model, left out elsewhere. `expected` are then the likeliest lines as it stood before this one: pattern → chance."""


def some(names: Iterable[str], most: int) -> str:
    """The first `most` of them, and how many more there are."""
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most:,} more" if len(known) > most else "")


def listed(names: Iterable[str]) -> str:
    """The same of a dozen, in quotes."""
    return some((f"'{name}'" for name in names), 12)


def shown(value: Any) -> str:
    """A value as JSON, shortened to what a message can hold."""
    try:
        text = json.dumps(_beginning(value), default=str)
    except RecursionError:
        return "a value nested too deeply"
    except TypeError:  # a map of msgpack, whose keys need not be text
        text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


def _beginning(value: Any) -> Any:
    """As much of a value as `shown` needs: it may be part of a large payload, and be told of for each event of that."""
    left = 64  # values, each of which is a character at least

    def cut(inner: Any) -> Any:
        nonlocal left
        left -= 1
        if isinstance(inner, str | bytes):
            return inner[:64]
        if isinstance(inner, dict):
            return {(name[:64] if isinstance(name, str) else name): cut(part) for name, part in islice(inner.items(), left) if left > 0}
        return [cut(part) for part in inner[:left] if left > 0] if isinstance(inner, list) else inner

    return cut(value)


class Lease(NamedTuple):
    """A partition of a queue in the state store: a replica's own, as long as the lease's key holds its token."""

    stream: bytes
    """Key of the entries."""
    key: bytes
    token: bytes
    group: bytes
    """Of the consumers that share the queue."""
    keep: bool = False
    """Whether acknowledged entries stay in the stream."""


class Delivery(NamedTuple):
    """An event as a queue delivered it."""

    event: Event
    source: int
    """Identity of the partition, 32 bits; 0 = it has no positions, only the event's own identity tells it from a repeated one."""
    position: int
    """Rises within the partition, below 2**95: an event at or before the position of its stream's last one was scored already."""
    arrived: float
    """When it came to the queue, seconds since 1970."""
    lease: Lease | None = None
    """Where the queue lies in the state store: the commit is refused once the lease is lost, and appends the result to the output."""
    entry: bytes = b""
    """Acknowledged with the commit; empty = by the source, afterwards."""


class Published(NamedTuple):
    """A result as a queue publishes it."""

    stream_id: str
    id: str
    """Identity: published again, it has the same."""
    content: bytes
    """The reply of REST, as JSON."""


PLACE = np.dtype([("source", "<u4"), ("part", "<u4"), ("offset", "<i8")])
"""Where an event was in its queue, as the state keeps it: position = offset · 2**32 + part; source 0 = it has none."""


@dataclass(frozen=True)
class Columns:
    """N events of one request as they were sent in columns. A row in `bad` is no event, whatever its columns hold."""

    stream_ids: list[str | None]
    event_ids: list[str | None]
    values: dict[str, NDArray[np.float64]]  # [N] of each feature that was sent, NaN = missing
    timestamp: NDArray[np.float64]  # [N] seconds since 1970, NaN = the time of arrival
    sequence: NDArray[np.int64]  # [N] -1 = none
    bad: dict[int, ItemError]
    raw: NDArray[np.float64] | None = None
    """[N] readings of counters: the first feature is their increase per second since the stream's last event. NaN = it is as sent."""
    messages: list[str | None] | None = None  # [N]
    ends: NDArray[np.bool_] | None = None  # [N] both as in Event; None = there is no such column

    def __len__(self) -> int:
        return len(self.stream_ids)

    def event(self, i: int) -> Event:
        """Row i by itself."""
        values = {name: float(column[i]) for name, column in self.values.items()}
        lines = self.messages is not None or self.ends is not None
        return Event(
            self.stream_ids[i],
            {name: None if math.isnan(number) else number for name, number in values.items()} if values or not lines else None,
            None if self.messages is None else self.messages[i],
            timestamp=None if math.isnan(self.timestamp[i]) else float(self.timestamp[i]),
            event_id=self.event_ids[i],
            sequence=None if self.sequence[i] < 0 else int(self.sequence[i]),
            end=self.ends is not None and bool(self.ends[i]),
        )

    def items(self) -> list[Event | ItemError]:
        """All rows, one by one."""
        return [self.bad.get(i) or self.event(i) for i in range(len(self))]


@dataclass(frozen=True)
class Parsed:
    """N events of one request as columns of plain values; arrays are made once for a whole batch, see `Readings.of`."""

    stream_ids: list[str]
    values: list[float | None]  # [N·F], event after event, None = missing
    timestamp: list[float]
    timed: list[bool]
    sequence: list[int]
    key: list[int]
    deliveries: list[Delivery] | None = None
    """Where they came from a queue."""
    raw: list[float] | None = None
    """As in Columns; None = no counters."""
    messages: list[str | None] | None = None
    """Lines as they were sent; None = a sensor model's."""

    def __len__(self) -> int:
        return len(self.stream_ids)

    def part(self, start: int, stop: int) -> Parsed:
        F = len(self.values) // len(self) if self.stream_ids else 0
        columns = (self.timestamp, self.timed, self.sequence, self.key, self.deliveries, self.raw, self.messages)
        rest = (column and column[start:stop] for column in columns)
        return Parsed(self.stream_ids[start:stop], self.values[F * start : F * stop], *rest)  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: Iterable[Parsed]) -> Parsed:
        """One after the other; none of a queue."""
        parts = list(parts)
        whole = Parsed([], [], [], [], [], [], raw=_raw(parts), messages=_messages(parts))
        for part in parts:
            for field in fields(Parsed):
                if field.name not in ("deliveries", "raw", "messages"):
                    getattr(whole, field.name).extend(getattr(part, field.name))
        return whole


@dataclass(frozen=True)
class Readings:
    """N events as columns, in order of arrival, ready for a detector of F features."""

    stream_ids: Sequence[str]
    x: NDArray[np.float32]  # [N, F], NaN = missing
    timestamp: NDArray[np.float64]  # [N] seconds since 1970
    timed: NDArray[np.bool_]  # [N] False = `timestamp` is the time of arrival
    sequence: NDArray[np.int64]  # [N] -1 = none
    key: NDArray[np.uint64]  # [N] identity, 0 = none
    deliveries: Sequence[Delivery | None] | None = None  # [N] None = over REST
    place: NDArray[np.void] | None = None  # [N] of PLACE; both None where no event came from a queue
    raw: NDArray[np.float64] | None = None  # [N] as in Columns
    messages: Sequence[str | None] | None = None  # [N] as in Parsed

    def __len__(self) -> int:
        return len(self.stream_ids)

    def take(self, positions: NDArray[np.intp]) -> Readings:
        """The readings at these positions, in their order."""
        ids, deliveries, messages = self.stream_ids, self.deliveries, self.messages
        return Readings(
            [ids[i] for i in positions.tolist()],
            self.x[positions],
            self.timestamp[positions],
            self.timed[positions],
            self.sequence[positions],
            self.key[positions],
            [deliveries[i] for i in positions.tolist()] if deliveries is not None else None,
            self.place[positions] if self.place is not None else None,
            self.raw[positions] if self.raw is not None else None,
            [messages[i] for i in positions.tolist()] if messages is not None else None,
        )

    @staticmethod
    def of(parts: Sequence[Parsed], F: int) -> Readings:
        """The events of several requests, one after the other."""
        stream_ids = _chained(parts, "stream_ids")
        deliveries, raw = _deliveries(parts), _raw(parts)
        return Readings(
            stream_ids,
            np.array(_chained(parts, "values"), np.float64).reshape(len(stream_ids), F).astype(np.float32),
            np.array(_chained(parts, "timestamp"), np.float64),
            np.array(_chained(parts, "timed"), np.bool_),
            np.array(_chained(parts, "sequence"), np.int64),
            np.array(_chained(parts, "key"), np.uint64),
            deliveries,
            None if deliveries is None else np.array([_place(delivery) for delivery in deliveries], PLACE),
            None if raw is None else np.array(raw, np.float64),
            _messages(parts),
        )


def _chained(parts: Sequence[Parsed], column: str) -> list[Any]:
    return list(itertools.chain.from_iterable(getattr(part, column) for part in parts))


def _deliveries(parts: Sequence[Parsed]) -> list[Delivery | None] | None:
    if all(part.deliveries is None for part in parts):
        return None
    found: list[Delivery | None] = []
    for part in parts:
        found += part.deliveries if part.deliveries is not None else [None] * len(part)
    return found


def _raw(parts: Sequence[Parsed]) -> list[float] | None:
    if all(part.raw is None for part in parts):
        return None
    return [number for part in parts for number in (part.raw if part.raw is not None else [math.nan] * len(part))]


def _messages(parts: Sequence[Parsed]) -> list[str | None] | None:
    if all(part.messages is None for part in parts):
        return None
    return [message for part in parts for message in (part.messages if part.messages is not None else [None] * len(part))]


def _place(delivery: Delivery | None) -> tuple[int, int, int]:
    if delivery is None:
        return 0, 0, -1
    return delivery.source, delivery.position & 0xFFFF_FFFF, delivery.position >> 32
