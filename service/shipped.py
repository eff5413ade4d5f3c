"""Log lines that shippers send in bulk, for the doors of Loki and OTLP: which model takes them, what names them, what became of them.

    lines of one request ─► each stream's by time ─► identity ─► scorer, PART_LINES at a time ─► Tally

A line's identity is its stream, its time in nanoseconds, its text, and how many equal ones came before it in the same request. So a
request may be sent again, whole or in other parts, and each line is scored once; two equal lines of the same nanosecond are two lines
where they come in one request, and one where they come in two (Loki takes them for one, either way).
A line without time has no identity. Of a line that is too long the beginning is scored; its identity is of all of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from service.api import Door, Sent
from service.artifact import Manifest
from service.bodies import Format
from service.errors import (
    BadEvent,
    BadParameter,
    BadSetting,
    FutureEvent,
    ItemError,
    StoreUnavailable,
    TooManyStreams,
)
from service.events import MAX_MESSAGE_LENGTH, PER_SECOND, Delivery, Event
from service.features import COUNTED_SECONDS, of_another_unit
from service.intake import Incoming
from service.metrics import Metrics
from service.names import bounded
from service.rounds import Kind
from service.sources.templates import Template

JSON = Format.JSON.value
PART_LINES = 4096
"""Lines scored at once, at most: a long request lets others in between."""
LONG = 32_768
"""Bytes of a body, unpacked, from which it is read beside the event loop: reading a thousand lines takes ten milliseconds and more."""
EARLIEST = COUNTED_SECONDS * PER_SECOND["ns"]
"""Nanoseconds: before that there are no lines, but times of a sender that counts in a larger unit."""

Read = TypeVar("Read")

_REASONS: Mapping[type[ItemError], str] = {
    BadEvent: "cannot be used",
    FutureEvent: "ahead of this clock",
    TooManyStreams: "of a new stream that the store has no room for (ONSET_MAX_STREAMS, its maxmemory)",
}


@dataclass(frozen=True)
class LogModel:
    """Which model takes lines at doors that name none; "" = there is none, or it was not said which."""

    name: str
    models: Sequence[str]
    """All that take lines."""

    def of(self, request: Incoming) -> str:
        """The model that a request's lines go to. Raises BadParameter."""
        asked = request.query("model")
        if asked or self.name:
            return asked or self.name
        if self.models:
            detail = f"Several models take log lines, {', '.join(self.models)}: set ONSET_LOGS_MODEL, or add ?model=NAME."
        else:
            detail = "No model that takes log lines is loaded (ONSET_MODEL)."
        raise BadParameter(detail, "model")


def log_model(manifests: Iterable[Manifest], setting: str) -> LogModel:
    """By ONSET_LOGS_MODEL, or the only one of kind log. Raises BadSetting."""
    models = sorted(manifest.name for manifest in manifests if manifest.kind == "log")
    if setting and setting not in models:
        raise BadSetting(f"ONSET_LOGS_MODEL is '{setting}'; of the loaded models {', '.join(models) or 'none'} take log lines.")
    return LogModel(setting or (models[0] if len(models) == 1 else ""), models)


class Naming:
    """Stream ids by a template that a setting holds."""

    def __init__(self, setting: str, text: str) -> None:
        """Raises BadSetting."""
        self._setting = setting
        try:
            self._template = Template(text)
        except ValueError as error:
            raise BadSetting(f"{setting} cannot be used: {error}.") from error

    def name(self, value_of: Callable[[str], str], owner: str) -> str:
        """The template with `value_of` each reference; "" = `owner` does not have it. Raises BadEvent."""
        references = self._template.references
        found = tuple(map(value_of, references))
        if not all(found):
            missing = references[found.index("")]
            raise BadEvent(f"{self._setting} names '{missing}', which {owner} does not have.", missing)
        return bounded(self._template.filled(found))


async def beside(read: Callable[[], Read], size: int, large: int = LONG) -> Read:
    """What `read` makes of a body of so many bytes; others get their turn meanwhile, where it is larger than `large`."""
    return await asyncio.to_thread(read) if size > large else read()


@dataclass(frozen=True)
class Shipped:
    """N lines, in the order sent."""

    stream_ids: list[str] = field(default_factory=list)
    nanoseconds: list[int | None] = field(default_factory=list)
    """Since 1970; None = not known: the time of arrival."""
    lines: list[str] = field(default_factory=list)

    def add(self, stream_id: str, nanoseconds: int | None, line: str) -> None:
        self.stream_ids.append(stream_id)
        self.nanoseconds.append(nanoseconds)
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.lines)


@dataclass
class Tally:
    """What became of the lines of one request."""

    outcomes: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    cut: int = 0
    """Lines of which the beginning was scored."""
    late: int = 0
    first_late: str = ""
    refused: Counter[str] = field(default_factory=Counter)
    """For good, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Of each reason the first sentence."""
    again: int = 0
    """Lines that are to be sent again."""

    def refuse(self, error: ItemError, count: int = 1) -> None:
        reason = next(_REASONS[kind] for kind in type(error).__mro__ if kind in _REASONS)
        self.refused[reason] += count
        self.first.setdefault(reason, error.detail.removesuffix("."))
        self.outcomes["rejected"] += count

    @property
    def reasons(self) -> str:
        """Why lines were refused, in words."""
        return "; ".join(f"{count} {reason} (the first: {self.first[reason]})" for reason, count in self.refused.items())


class Shipping:
    """Scores what one door brings, and counts it under the door's name."""

    def __init__(
        self, door: Door, name: str, model: LogModel, metrics: Metrics, max_queue: int, clock: Callable[[], float] = time.time
    ) -> None:
        """`max_queue` is what may wait in the scorer's queue; `clock` gives seconds since 1970."""
        self._part = min(PART_LINES, max(1, max_queue // 4))  # a sender may have half of what the others leave free
        self.door, self.model = door, model
        self._name, self._metrics, self._clock = name, metrics, clock
        self._latency = metrics.latency.labels(name)

    async def score(self, sent: Sent, shipped: Shipped, tally: Tally) -> None:
        """Lines of any streams. Raises Overloaded and StoreUnavailable: then the whole request is to be sent again."""
        if sent.scorer.detector.manifest.kind != "log":
            raise BadParameter(
                f"Model '{sent.scorer.detector.name}' takes numbers, not log lines: add ?model=NAME of one that does.", "model"
            )
        deliveries = self._deliveries(shipped, tally)
        part: list[Delivery] = []
        try:
            while part := list(islice(deliveries, self._part)):
                kinds, _ = await sent.scorer.consume(part, sent.sender)
                for delivery, kind in zip(part, kinds, strict=True):
                    _tell(tally, delivery.event, kind)
        except StoreUnavailable:
            tally.outcomes["failed"] += len(part) + sum(1 for _ in deliveries)
            raise
        finally:  # also of a request of which a part was scored
            self._count(tally)

    def answered(self, seconds: float) -> None:
        """A request is, after so long."""
        self._latency.observe(seconds)

    def _count(self, tally: Tally) -> None:
        for outcome, count in (+tally.outcomes).items():
            self._metrics.events.labels(self._name, outcome).inc(count)
        if tally.blank:
            self._metrics.blank.labels(self._name).inc(tally.blank)
        if tally.cut:
            self._metrics.cut.labels(self._name).inc(tally.cut)

    def _deliveries(self, shipped: Shipped, tally: Tally) -> Iterator[Delivery]:
        """Lines that can be events, each stream's in the order of their times."""
        now, equals = self._clock(), Counter[tuple[str, int, str]]()
        moments = [now * 1e9 if moment is None else moment for moment in shipped.nanoseconds]
        for i in sorted(range(len(shipped)), key=moments.__getitem__):
            stream_id, moment, line = shipped.stream_ids[i], shipped.nanoseconds[i], shipped.lines[i]
            if not line or line.isspace():
                tally.blank += 1
                continue
            event_id = None
            if moment is not None:
                if moment < EARLIEST:
                    tally.refuse(of_another_unit(moment, "nanoseconds", "time"))
                    continue
                equals[key := (stream_id, moment, line)] += 1
                event_id = _identity(moment, line, equals[key])
            if len(line) > MAX_MESSAGE_LENGTH:  # as those in files are read: nobody would see what was refused, or could send it otherwise
                tally.cut += 1
                line = line[:MAX_MESSAGE_LENGTH]
            event = Event(stream_id, None, line, None if moment is None else moment / PER_SECOND["ns"], event_id)
            yield Delivery(event, 0, 0, now)


def _identity(nanoseconds: int, line: str, nth: int) -> str:
    content = f"{nanoseconds} {nth} {line}".encode(errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _tell(tally: Tally, event: Event, kind: Kind | ItemError) -> None:
    if kind is Kind.CONFLICT:
        tally.again += 1
        tally.outcomes["failed"] += 1
    elif isinstance(kind, ItemError):
        tally.refuse(kind)
    elif kind is Kind.LATE:
        tally.late += 1
        tally.outcomes["late"] += 1
        tally.first_late = tally.first_late or f"{event.stream_id} at {event.timestamp}"
    else:
        tally.outcomes["scored" if kind is Kind.SCORED else "duplicate"] += 1
