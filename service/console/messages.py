"""What server-sent events carry: one JSON object each, by the name of its event. Missing numbers are null.

GET /v1/live                 fleet     which streams are shown and what is new to the watcher of them; the first, then with each change
                             changes   what was scored since the message before
GET /v1/live/{stream_id}     stream    what the next events are of: the first, and again where the history is sent again
                             events    its history, then everything newer, as columns: one entry for each event
both                         bye       {}: the service stops
"""

from __future__ import annotations

from typing import Literal

import msgspec

from service.events import Direction, Severity

Kind = Literal["sensor", "log"]
Number = float | None
Column = list[Number]


class LiveFeature(msgspec.Struct, frozen=True):
    name: str
    unit: str | None
    role: Literal["scored", "context"]


class LiveShown(msgspec.Struct, frozen=True):
    """A stream that is new to the watcher, or whose history has changed: its recent events, oldest first."""

    key: int
    """Stands for the stream in `keys` and in rows, as long as this connection lasts and the key is not given anew."""
    id: str
    t: list[float]
    """Seconds since 1970."""
    value: Column | None
    """Null where a model has several features."""
    score: Column
    """None while warming up."""
    bits: list[int]
    """Sums of 1 = anomalous, 2 = an alert is open, 4 = the state is frozen, 8 = an alert begins, 16 = warming up,
    32, 64, 96 = the open alert is minor, major, critical."""
    said: str | None
    """The last line of a log stream; while an alert is open and that is an ordinary one, or the session has ended, the one at its onset."""


class LiveFleet(msgspec.Struct, frozen=True):
    model: str
    kind: Kind
    version: str
    replica: str
    """The one that answers."""
    features: list[LiveFeature]
    keys: list[int]
    """All streams that are shown, first those with an open alert that nobody looks after and that is not muted, the most severe first,
    then with another one, then by how anomalous they were lately."""
    new: list[LiveShown]


class Counts(msgspec.Struct, frozen=True):
    """Of all streams whose recent events are held."""

    streams: int
    anomalous: int
    alerting: int
    warming_up: int
    capacity: int
    left_out: int
    """Events of streams that found no room."""


class LiveCounts(Counts, frozen=True):
    replicas: int
    """Whose events are seen here, the answering one among them."""
    thinned: int
    """Events that others did not tell of because they were too many."""


LiveRow = tuple[int, float, Number, Number, Number, int, float, int, Severity]


class LiveChanges(msgspec.Struct, frozen=True):
    """A row is of one stream: key; time, value and expected value of its last event, both of the feature that carries the most; greatest
    score since the message before; bits, with 128 = somebody looks after the open alert, 256 = it is muted; rank; place of that feature;
    severity.
    """

    counts: LiveCounts
    rows: list[LiveRow]
    said: list[str | None] | None
    """Of a log model, the line of each row's stream as in `LiveShown`; null = the end of a session."""


class LiveStream(msgspec.Struct, frozen=True):
    stream_id: str
    model: str
    kind: Kind
    version: str
    replica: str
    """The one that answers."""
    depth: int
    """Events that are kept of a stream."""
    warmup: int
    """Events until it is scored."""
    features: list[LiveFeature]
    chosen: list[int]
    """Places of the features whose values follow."""


class LiveContributor(msgspec.Struct, frozen=True):
    feature: str
    contribution: Number
    actual: Number
    expected: Number


class LiveLast(msgspec.Struct, frozen=True):
    """Of the last event."""

    severity: Severity
    direction: Direction
    state_version: int
    contributors: list[LiveContributor]


class LiveLines(msgspec.Struct, frozen=True):
    """Columns of a log stream beside the others: one entry for each event."""

    message: list[str | None]
    """At most its first MESSAGE_BYTES; null = the end of a session."""
    severity: list[Severity]
    code: list[int]
    """Of its pattern; 0 = none matches."""
    likely: list[list[tuple[int, float]]]
    """Codes of the likeliest lines as it stood before this one, best first, and their chances."""
    before: list[list[int]]
    """Codes of the session's lines before it, the newest first."""
    templates: dict[str, str]
    """Text of the codes that this connection has not been told of yet."""


class LiveEvents(msgspec.Struct, frozen=True):
    skipped: int
    """Events between the message before and this one that are not sent: the watcher is too slow."""
    t: list[float]
    """Seconds since 1970."""
    score: Column
    alert: Column
    p: Column
    bits: list[int]
    """As of LiveShown."""
    x: list[Column]
    """Values, a column for each of `chosen`; the next four likewise."""
    expected: list[Column]
    lower: list[Column]
    upper: list[Column]
    contribution: list[Column]
    lines: LiveLines | None
    """Null where a model takes numbers."""
    last: LiveLast


LIVE_EVENTS = {
    "/v1/live": {"fleet": LiveFleet, "changes": LiveChanges},
    "/v1/live/{stream_id}": {"stream": LiveStream, "events": LiveEvents},
}
"""By path and name of the event."""
