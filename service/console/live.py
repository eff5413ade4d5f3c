"""Server-sent events of what was scored: `GET /v1/live` (the fleet) and `GET /v1/live/{stream_id}` (every event of one stream).

    fleet     event `fleet`: which streams are shown, with their recent history; again when that changes, once a second at most
              event `changes`: their newest values, RATE times a second at most
    stream    event `stream`: what it is of; event `events`: its history, then everything newer, as columns

A watcher takes what is newer than it has, when it can take more: a slow one gets fewer points, and nothing is queued for it. One that
takes nothing at all is let go (writing.py). What other replicas score is seen too, about a second later (shared.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from service import tasks
from service.artifact import NEW_TEXT, Lines, Manifest
from service.console.messages import (
    LiveChanges,
    LiveContributor,
    LiveCounts,
    LiveEvents,
    LiveFeature,
    LiveFleet,
    LiveLast,
    LiveLines,
    LiveShown,
    LiveStream,
)
from service.console.recent import ANOMALY, COLD, MESSAGE_BYTES, OPEN, Recent
from service.console.shared import FLEET, Shared
from service.errors import Overloaded
from service.events import SEVERITIES
from service.feed import Batch
from service.metrics import Metrics
from service.policy import DIRECTIONS

RATE = 10
"""Messages a second to one watcher at most."""
MEMBERS_SECONDS = 1.0
"""Which streams are shown changes at most this often."""
HEARTBEAT_SECONDS = 15.0
SPARK_EVENTS = 96
"""Events of a stream's history that the fleet gets."""
FLOAT32_DIGITS = 8
"""Of values that can be zoomed into: one at a great height, or beside a -9999, would stand still with fewer."""
DECADES = 1e4
"""Greatest reading over the smallest up to which the digits of one scale say enough of both."""
FEATURES_SENT = 8
"""Features of a stream whose values are sent unless others are asked for: those that carried the most lately."""
TOP_SENT = 8
"""Contributors to the last event."""
STATES = {"anomalous": ANOMALY | OPEN, "alerting": OPEN, "warming_up": COLD}

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True)
class FleetQuery:
    """Which streams a watcher wants: at most `limit`, whose names hold `holds`, in one of the states of `bits`."""

    limit: int
    holds: str = ""
    bits: int = 0


@dataclass(eq=False)
class _Watcher:
    """An answer under way: whose, what wakes it, and whether it is to end."""

    who: str
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def end(self) -> None:
        self.ended = True
        self.news.set()


class Live:
    """The recent events of all models, and who watches them."""

    def __init__(self, recent: Mapping[str, Recent], most_watchers: int, replica: str, metrics: Metrics, shared: Shared) -> None:
        self.recent = recent
        self.replica = replica
        self.shared = shared
        self._most = most_watchers
        self._metrics = metrics
        self._watchers: list[_Watcher] = []
        self._closing = False
        shared.news = self.news

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def take(self, batch: Batch) -> None:
        """For `Feed.watch`."""
        put = self.recent[batch.model].read(batch)
        if put is None:
            return
        self.shared.take(batch.model, put)
        self.news()

    def close(self) -> None:
        """End every watcher's answer, so that a stopping server need not wait for them; new ones are refused."""
        self._closing = True
        self.news()

    def fleet(self, model: str, query: FleetQuery, who: str = "") -> Events:
        """An endless answer to `who`, a tenant or an address. Raises Overloaded."""
        return self._events(who, model, FLEET, lambda: _Fleet(self.recent[model], query, self.replica, self.shared))

    def stream(self, model: str, stream_id: str, features: list[str], who: str = "") -> Events:
        """The same for one stream, which may be yet to come. Raises Overloaded."""
        return self._events(who, model, stream_id, lambda: _Stream(self.recent[model], stream_id, features, self.replica))

    def news(self) -> None:
        """Wake all that watch."""
        for watcher in self._watchers:
            watcher.news.set()

    def _events(self, who: str, model: str, watched: str, view: Callable[[], _Fleet | _Stream]) -> Events:
        self._make_room(who)
        watcher = _Watcher(who)
        self._watchers.append(watcher)
        end = self.shared.watch(model, watched)

        def done() -> None:
            self._watchers.remove(watcher)
            end()

        return Events(self._messages(watcher, view()), self._metrics, done)

    def _make_room(self, who: str) -> None:
        """Where all places are taken, whoever has two more than `who` gives the last one up. Raises Overloaded."""
        watching = [watcher for watcher in self._watchers if not watcher.ended]
        if not self._closing and len(watching) < self._most:
            return
        held = Counter(watcher.who for watcher in watching)
        richest = max(held, key=lambda one: held[one], default=who)
        slow = len(self._watchers) >= 2 * self._most  # so many that were ended take nothing, and are not gone yet
        if self._closing or slow or held[richest] < held[who] + 2:
            said = f"{len(watching)} pages watch this replica (ONSET_CONSOLE_WATCHERS), {held[who]} of them yours."
            raise Overloaded(said, retry_after=5)
        next(watcher for watcher in reversed(watching) if watcher.who == richest).end()

    async def _messages(self, watcher: _Watcher, view: _Fleet | _Stream) -> AsyncIterator[bytes]:
        yield b"retry: 2000\n\n"
        sent, news = time.monotonic(), watcher.news
        while not (self._closing or watcher.ended):
            news.clear()
            began = time.monotonic()
            message = view.message()
            if message or began - sent >= HEARTBEAT_SECONDS:
                yield message or b": still here\n\n"
                sent = time.monotonic()
            await asyncio.sleep(max(0.0, began + 1 / RATE - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MEMBERS_SECONDS):
                    await news.wait()
        yield _message("bye", {})


class Events:
    """An ASGI answer of server-sent events, ended by either side; `done` is called once, at its end."""

    def __init__(self, messages: AsyncIterator[bytes], metrics: Metrics, done: Callable[[], None]) -> None:
        self._messages = messages
        self._metrics = metrics
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._guarded(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                await tasks.end(task)
            self._done()

    async def _guarded(self, send: Send) -> None:
        try:
            await self._send(send)
        except OSError:  # it takes nothing any more
            pass
        except Exception as error:  # a bug ends this answer alone; it is counted and logged
            self._metrics.bug(error, watcher="console")

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for message in self._messages:
            await send({"type": "http.response.body", "body": message, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Fleet:
    """What one watcher of the fleet has, and what is new to it."""

    def __init__(self, recent: Recent, query: FleetQuery, replica: str, shared: Shared) -> None:
        self._recent = recent
        self._query = query
        self._replica = replica
        self._shared = shared
        self._slots = np.zeros(0, np.intp)
        self._known: dict[int, tuple[str, int]] = {}
        self._seen: dict[int, int] = {}
        self._writes = 0
        self._told: tuple[int, int] | None = None
        self._pushes = 0
        self._members_at = -MEMBERS_SECONDS
        self._single = len(recent.manifest.features) == 1

    def message(self) -> bytes:
        """Everything new, b"" where nothing is."""
        recent = self._recent
        recent.write()
        now = time.monotonic()
        message, new = b"", list[int]()
        if now - self._members_at >= MEMBERS_SECONDS or recent.pushes != self._pushes:
            first, self._members_at, self._pushes = self._members_at < 0, now, recent.pushes
            slots = recent.top(self._query.limit, self._query.holds, self._query.bits)
            named = {slot: (recent.name(slot), recent.mixed(slot)) for slot in slots.tolist()}
            if first or named != self._known:
                new = [slot for slot, known in named.items() if self._known.get(slot) != known]
                message = self._members(slots, named, new)
        return message + self._changes(new)

    def _members(self, slots: NDArray[np.intp], named: dict[int, tuple[str, int]], new: list[int]) -> bytes:
        recent = self._recent
        self._slots, self._known = slots, named
        self._seen = {slot: self._seen.get(slot, 0) if slot not in new else 0 for slot in named}
        manifest, shown = recent.manifest, [self._shown(slot, named[slot][0]) for slot in new]
        fleet = LiveFleet(manifest.name, manifest.kind, manifest.version, self._replica, _features(manifest), slots.tolist(), shown)
        return _message("fleet", fleet)

    def _shown(self, slot: int, name: str) -> LiveShown:
        events = self._recent.events(slot)[-SPARK_EVENTS:]
        self._seen[slot] = self._recent.written(slot)
        value = series(events["x"][:, 0]) if self._single else None
        said = None if self._recent.manifest.lines is None else said_of(self._recent.line(slot))
        times, bits = np.round(events["t"], 3).tolist(), events["bits"].tolist()
        return LiveShown(slot, name, times, value, series(events["score"], 4), bits, said)

    def _changes(self, new: list[int]) -> bytes:
        """Of those that are `new` to the watcher the last event too, which may have been told before they were shown."""
        recent = self._recent
        changed = np.union1d(recent.changed_since(self._writes, self._slots), np.array(new, np.intp))
        state = (recent.writes, self._shared.replicas)
        if state == self._told and not new:
            return b""
        self._told, self._writes = state, recent.writes
        last, rank = recent.last(changed), recent.rank(changed)
        peaks = [self._peak(slot) for slot in changed.tolist()]
        attended = recent.attended(changed)
        top = last["contribution"].argmax(axis=1) if len(changed) else np.zeros(0, np.intp)
        rows = np.arange(len(changed))
        columns = (
            changed.tolist(),
            np.round(last["t"], 3).tolist(),
            short(last["x"][rows, top]),
            short(last["expected"][rows, top]),
            short(np.array([peak[0] for peak in peaks]), 3),
            [peak[1] | mark for peak, mark in zip(peaks, attended.tolist(), strict=True)],
            short(rank, 3),
            top.tolist(),
            [SEVERITIES[i] for i in last["severity"].tolist()],
        )
        counts = LiveCounts(**structs.asdict(recent.counts()), replicas=self._shared.replicas, thinned=self._shared.left_out)
        said = None if recent.manifest.lines is None else [said_of(recent.line(slot)) for slot in changed.tolist()]
        return _message("changes", LiveChanges(counts, list(zip(*columns, strict=True)), said))

    def _peak(self, slot: int) -> tuple[float, int]:
        """Of what is new: a spike between two messages must not be lost. Its bits: onsets of any event, the rest of the last one."""
        seen, self._seen[slot] = self._seen.get(slot, 0), self._recent.written(slot)
        return self._recent.peak(slot, min(seen, self._seen[slot] - 1))


class _Stream:
    """The same for a watcher of one stream."""

    def __init__(self, recent: Recent, stream_id: str, features: list[str], replica: str) -> None:
        self._recent = recent
        self._stream_id = stream_id
        self._asked = features
        self._replica = replica
        self._chosen: list[int] | None = None
        self._patterns: _Patterns | None = None
        self._seen = 0
        self._mixed = 0
        self._began = False

    def message(self) -> bytes:
        """Everything new, b"" where nothing is."""
        recent = self._recent
        recent.write()
        slot = recent.slot(self._stream_id)
        if slot is None:
            began, self._began, self._chosen, self._seen = self._began, True, None, 0
            return b"" if began else self._about([])
        message = b""
        again = recent.written(slot) < self._seen or recent.mixed(slot) != self._mixed
        if self._chosen is None or again:  # it was pushed out and is back, or its past has changed
            events, self._mixed = recent.events(slot), recent.mixed(slot)
            self._chosen, self._seen, self._began = self._choose(events), recent.written(slot) - len(events), True
            message = self._about(self._chosen)
        written = recent.written(slot)
        if written == self._seen:
            return message
        events = recent.events(slot, self._seen)
        skipped, self._seen = written - self._seen - len(events), written
        return message + _message("events", self._columns(slot, events, skipped, self._chosen))

    def _choose(self, events: NDArray[Any]) -> list[int]:
        """The features asked for, or else those that carry the most."""
        names = self._recent.manifest.feature_names
        return [names.index(name) for name in self._asked if name in names] or carrying(events)

    def _about(self, chosen: list[int]) -> bytes:
        manifest, depth = self._recent.manifest, self._recent.depth
        features = _features(manifest)
        who = (self._stream_id, manifest.name, manifest.kind, manifest.version, self._replica)
        self._patterns = None if manifest.lines is None else _Patterns(manifest.lines)
        return _message("stream", LiveStream(*who, depth, manifest.warmup, features, chosen))

    def _columns(self, slot: int, events: NDArray[Any], skipped: int, chosen: list[int]) -> LiveEvents:
        columns = {name: [readings(events[name][:, j]) for j in chosen] for name in ("x", "expected", "lower", "upper")}
        columns["contribution"] = [series(events["contribution"][:, j]) for j in chosen]
        return LiveEvents(
            skipped,
            np.round(events["t"], 3).tolist(),
            series(events["score"], 5),
            series(events["alert"], 5),
            short(events["p"], 3),
            events["bits"].tolist(),
            **columns,
            lines=None if self._patterns is None else self._patterns.lines(events),
            last=self._last(slot, events[-1]),
        )

    def _last(self, slot: int, last: Any) -> LiveLast:
        order = np.argsort(-last["contribution"], kind="stable")[:TOP_SENT].tolist()
        names = self._recent.manifest.feature_names
        top = zip(order, *(short(last[name][order]) for name in ("contribution", "x", "expected")), strict=True)
        contributors = [LiveContributor(names[j], share, actual, expected) for j, share, actual, expected in top]
        return LiveLast(SEVERITIES[last["severity"]], DIRECTIONS[last["direction"]], self._recent.version(slot), contributors)


class _Patterns:
    """The lines of a log model's events, as a watcher gets them; it is told each pattern's text once."""

    def __init__(self, lines: Lines) -> None:
        self._texts = lines.texts
        self._likely = lines.likely
        self._told: set[int] = set()

    def lines(self, events: NDArray[Any]) -> LiveLines:
        k = self._likely
        codes = [int(code) for code in events["x"][:, 0].tolist()]
        likely = [
            [(int(code), float(f"{share:.3g}")) for code, share in zip(row[:k], row[k:], strict=True) if not math.isnan(code)]
            for row in events["likely"].tolist()
        ]
        before = [[int(code) for code in row if not math.isnan(code)] for row in events["before"].tolist()]
        named = {*codes, *(code for row in likely for code, _ in row), *(code for row in before for code in row)} - self._told
        self._told |= named
        templates = {str(code): self._texts[code] if code < len(self._texts) else NEW_TEXT for code in sorted(named)}
        severity = [SEVERITIES[i] for i in events["severity"].tolist()]
        return LiveLines([said_of(message) for message in events["message"]], severity, codes, likely, before, templates)


def said_of(message: bytes) -> str | None:
    """A line as it is kept; None = the end of a session."""
    text = message.decode(errors="ignore")  # it may have been cut within a character
    return (f"{text}…" if len(message) == MESSAGE_BYTES else text) or None


def _features(manifest: Manifest) -> list[LiveFeature]:
    return [LiveFeature(one.name, one.unit, one.role) for one in manifest.features]


def carrying(events: NDArray[Any]) -> list[int]:
    """Up to FEATURES_SENT features of N events of a stream, those that carried the most: in their order, or the most first while something
    is the matter, so that a sensor that is found faulty is not below seven others.
    """
    weight = np.fmax(np.nan_to_num(events["score"]), 0.01)[:, None] * np.nan_to_num(events["contribution"])
    most: list[int] = np.argsort(-weight.sum(axis=0), kind="stable")[:FEATURES_SENT].tolist()
    return most if len(events) and events["bits"][-1] & (ANOMALY | OPEN) else sorted(most)


def short(numbers: NDArray[np.floating], digits: int = 6) -> list[float | None]:
    """[N], each with so many significant digits; None = NaN."""
    return [None if number != number else float(f"{number:.{digits}g}") for number in numbers.tolist()]  # noqa: PLR0124 - NaN


def series(numbers: NDArray[np.floating], digits: int = 6) -> list[float | None]:
    """[N] on one scale: so many significant digits of the largest, quicker than `short`. None = NaN."""
    wide = numbers.astype(np.float64)
    finite = np.abs(wide[np.isfinite(wide)])
    largest = float(finite.max()) if len(finite) else 0.0
    decimals = digits - 1 - math.floor(math.log10(largest)) if largest > 0 else 0
    rounded: list[float | None] = np.round(wide, min(decimals, 300)).tolist()
    return [None if number != number else number for number in rounded] if len(finite) < len(wide) else rounded  # noqa: PLR0124 - NaN


def readings(numbers: NDArray[np.floating]) -> list[float | None]:
    """[N] as float32 has them; None = NaN. Of several decades, as of a vacuum gauge, each by itself: on one scale the small ones are 0."""
    sizes = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
    return (short if len(sizes) and sizes.max() > DECADES * sizes.min() else series)(numbers, FLOAT32_DIGITS)


def _message(event: str, body: msgspec.Struct | Mapping[str, Any]) -> bytes:
    return b"event: " + event.encode() + b"\ndata: " + _encoder.encode(body) + b"\n\n"
