"""One view over all replicas: while a page watches one of them, the others tell it through the store what they score.

    watch here  ─► ask, every ASK_SECONDS ─► store ─► others: what was scored since, every TELL_SECONDS; history once, for a new watch
    others' parts ─► held for HOLD_SECONDS with our own events ─► rings, in the order of their time (recent.py)

Nobody watches: one small command a second, and nothing is sent or held. One replica alone sends nothing. What a replica tells is bounded
(TELL_BYTES each time): of more, the events of streams that are looked at come first, then anomalous ones, then the last of each stream.
An event is held until those of its stream that another replica scored before it must have come, so that no ring is written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import structlog
from msgspec.structs import replace
from numpy.typing import NDArray

from service.artifact import Manifest
from service.console.recent import ANOMALY, ONSET, OPEN, Put, Recent
from service.errors import StoreUnavailable
from service.metrics import Metrics
from service.stores.live import LiveLog

IDLE_SECONDS = 1.0
"""How often a replica looks whether anyone asks."""
TELL_SECONDS = 0.2
HOLD_SECONDS = 0.7
"""From when it was scored; more than TELL_SECONDS three times: until another replica has told, and we have read, what it scored before,
and because the events of one part count as of its first.
"""
MOST_BYTES = 8 * 1024 * 1024
"""Held at most, then the oldest are written; and waiting to be told, then the newest are not."""
ASK_SECONDS = 2.0
ASKED_SECONDS = 6.0
"""How long an ask counts: its replica may have gone."""
GLANCE_SECONDS = 10.0
"""How long one look at the plain table counts as watching."""
HEARTBEAT_SECONDS = 1.0
"""A replica that is asked tells something at least this often."""
HEARD_SECONDS = 4.0
"""A replica not heard of for so long is no longer counted."""
TELL_BYTES = 256 * 1024
"""Of one model, told by a replica each time, at most."""
HISTORY_BYTES = 2 * 1024 * 1024
"""Told once to a replica that begins to watch a model, about at most."""
HISTORY_STREAMS, HISTORY_EVENTS = 500, 96
"""Of the fleet: as much as a page shows of it. Of the other streams the last event, in half of the bytes: they are counted, and found."""
LASTS = 500
"""Streams in one part of last events."""
FLEET = ""
"""In place of a stream's name: all streams."""
PAUSE_SECONDS = 5.0
"""After a bug."""

log = structlog.get_logger(__name__)


class Ask(msgspec.Struct, frozen=True):
    """What the pages of a replica watch, by model: stream ids and FLEET; `history` of those that are new."""

    replica: str
    watched: dict[str, list[str]]
    history: dict[str, list[str]]


class Part(msgspec.Struct, frozen=True):
    """Events [N] of a model that a replica scored; N = 0 says that it is there. `to` = history for one replica, "" = news for all."""

    replica: str
    to: str
    model: str
    takes: str
    """What its numbers mean, see `_takes`."""
    names: list[str]
    """[S], the streams."""
    which: bytes
    """[N] u4, the stream of each."""
    events: bytes
    """[N] of `recent.event_dtype`."""
    age: float = 0.0
    """Seconds since the first of them was scored."""
    left_out: int = 0
    """Events that were too many."""
    lasts: bool = False
    """Of history: the last event of each stream alone, of no use where a later one is known."""


_asks, _parts, _encoder = msgspec.msgpack.Decoder(Ask), msgspec.msgpack.Decoder(Part), msgspec.msgpack.Encoder()


@dataclass
class _Asked:
    """By another replica."""

    at: float
    watched: dict[str, list[str]]


class Shared:
    """One replica's side. `clock` gives monotonic seconds."""

    def __init__(
        self, recent: Mapping[str, Recent], replica: str, live: LiveLog, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._recent, self._replica, self._log, self._metrics, self._clock = recent, replica, live, metrics, clock
        self._watched: Counter[tuple[str, str]] = Counter()
        self._history: set[tuple[str, str]] = set()
        self._glanced = self._told_at = self._asked_at = float("-inf")
        self._asked: dict[str, _Asked] = {}
        self._owed: dict[tuple[str, str], set[str]] = defaultdict(set)
        """By replica and model, of which streams it waits for history."""
        self._out: dict[str, list[Put]] = {}
        """By model that others watch: what was scored since we told."""
        self._out_bytes = 0
        self._unsaid: Counter[str] = Counter()
        self._held: list[tuple[str, Put]] = []
        self._held_bytes = 0
        self._heard: dict[str, float] = {}
        self._wake = asyncio.Event()
        self.news: Callable[[], None] = lambda: None
        """Called when others' events have been written."""
        self.left_out = 0
        """Events that others have not told of, because they were too many."""

    @property
    def replicas(self) -> int:
        """Replicas whose events are seen here, this one among them."""
        return 1 + len(self._heard)

    def watch(self, model: str, stream_id: str) -> Callable[[], None]:
        """From now on what others score of a stream, or of all (FLEET), is wanted; returns what ends that."""
        key = (model, stream_id)
        self._watched[key] += 1
        if self._watched[key] == 1:
            self._history.add(key)
            self._wake.set()

        def end() -> None:
            self._watched[key] -= 1
            self._watched += Counter()  # without those at 0
            if key not in self._watched:
                self._history.discard(key)

        return end

    def glance(self) -> None:
        """Somebody looks at all models for a moment."""
        if not self.watches():
            self._history |= {(model, FLEET) for model in self._recent}
            self._wake.set()
        self._glanced = self._clock()

    def take(self, model: str, put: Put) -> None:
        """Events that were scored here."""
        if model in self._out:
            if self._out_bytes < MOST_BYTES:
                self._out[model].append(put)
                self._out_bytes += put.events.nbytes
            else:
                self._unsaid[model] += len(put.events)
        if self._heard:
            self._hold(model, put)
        else:
            self._recent[model].put(put)

    async def run(self) -> None:
        """Ask, tell and hear, until cancelled."""
        away = False
        while True:
            self._wake.clear()
            pause = TELL_SECONDS if self._out or self.watches() else IDLE_SECONDS
            try:
                more = await self.turn()
                pause, away = 0 if more else pause, False
            except StoreUnavailable as error:
                if not away:
                    log.warning("live_view_is_of_this_replica_alone", error=error.detail)
                away = True
                self._alone()
            except Exception as error:  # a bug must not end the page; it is counted and logged
                self._metrics.bug(error, task="live")
                self._alone()
                pause = PAUSE_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def turn(self) -> bool:
        """One exchange; whether there is more to do at once. Raises StoreUnavailable."""
        watches, begun, ask = self.watches(), set(self._history), self._ask()
        parts = self._told()
        exchanged = await self._log.exchange(ask, parts, reads=watches)
        if ask is not None:
            self._history -= begun
        for message in exchanged.asks:
            self._take_ask(_asks.decode(message))
        for message in exchanged.parts:
            self._take_part(_parts.decode(message))
            await asyncio.sleep(0)  # events that wait go on: of many new streams each part takes its time
        now = self._clock()
        self._asked = {replica: asked for replica, asked in self._asked.items() if now - asked.at < ASKED_SECONDS}
        wanted = {model for asked in self._asked.values() for model in asked.watched if model in self._recent}
        self._out = {model: self._out.get(model, []) for model in wanted}
        self._heard = {replica: at for replica, at in self._heard.items() if watches and now - at < HEARD_SECONDS}
        self._release(now - HOLD_SECONDS if self._heard else now)
        return exchanged.more or bool(self._owed)

    # ── asking and hearing ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def watches(self) -> bool:
        """Whether anybody looks at a page of this replica."""
        return bool(self._watched) or self._clock() - self._glanced < GLANCE_SECONDS

    def _ask(self) -> bytes | None:
        now = self._clock()
        if not self.watches() or (now - self._asked_at < ASK_SECONDS and not self._history):
            return None
        self._asked_at = now
        watched = set(self._watched)
        if now - self._glanced < GLANCE_SECONDS:
            watched |= {(model, FLEET) for model in self._recent}
        return _encoder.encode(Ask(self._replica, _by_model(watched), _by_model(self._history)))

    def _take_part(self, part: Part) -> None:
        recent = self._recent.get(part.model)
        if part.replica == self._replica or part.to not in ("", self._replica):
            return
        if recent is None or part.takes != _takes(recent.manifest):  # a replica with other models: an update is under way
            return
        self._heard[part.replica] = self._clock()
        self.left_out += part.left_out
        names, which = part.names, np.frombuffer(part.which, "<u4").tolist()
        events = np.frombuffer(part.events, recent.dtype)
        put = Put([names[i] for i in which], events, self._clock() - part.age)
        if part.to:
            recent.merge([put], aged=True, lasts=part.lasts)
            self.news()
        else:
            self._hold(part.model, put)

    def _hold(self, model: str, put: Put) -> None:
        self._held.append((model, put))
        self._held_bytes += put.events.nbytes
        while self._held_bytes > MOST_BYTES:
            self._release(min(put.at for _, put in self._held))

    def _release(self, until: float) -> None:
        """Write what was scored at `until` or before."""
        ready: dict[str, list[Put]] = defaultdict(list)
        for model, put in self._held:
            if put.at <= until:
                ready[model].append(put)
                self._held_bytes -= put.events.nbytes
        self._held = [(model, put) for model, put in self._held if put.at > until]
        for model, puts in ready.items():
            self._recent[model].merge(puts)
        if ready:
            self.news()

    def _alone(self) -> None:
        """Go on with what is scored here."""
        self._heard, self._out, self._asked, self._out_bytes = {}, {}, {}, 0
        self._owed.clear()
        self._release(self._clock())

    # ── telling ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_ask(self, ask: Ask) -> None:
        if ask.replica == self._replica:
            return
        self._asked[ask.replica] = _Asked(self._clock(), ask.watched)
        for model, streams in ask.history.items():
            if model in self._recent:
                self._owed[ask.replica, model] |= set(streams)

    def _told(self) -> list[bytes]:
        """What is to be told now, and with it forgotten."""
        parts: list[Part] = []
        heartbeat = self._clock() - self._told_at >= HEARTBEAT_SECONDS
        for model, puts in self._out.items():
            if puts or heartbeat:
                parts.append(self._news(model, puts))
                self._out[model] = []
        self._out_bytes = 0
        for (replica, model), streams in self._owed.items():
            parts.extend(self._past(replica, model, streams))
        self._owed.clear()
        if parts:
            self._told_at = self._clock()
        return [_encoder.encode(part) for part in parts]

    def _news(self, model: str, puts: Sequence[Put]) -> Part:
        recent = self._recent[model]
        if not puts:
            return self._part(model, [], np.empty(0, recent.dtype))
        names = [name for put in puts for name in put.stream_ids]
        events = np.concatenate([put.events for put in puts])
        kept = self._first(model, names, events, max(1, TELL_BYTES // (recent.dtype.itemsize + 32)))
        part = self._part(model, [names[i] for i in kept.tolist()], events[kept])
        left_out = len(events) - len(kept) + self._unsaid.pop(model, 0)
        return replace(part, age=self._clock() - puts[0].at, left_out=left_out)

    def _first(self, model: str, names: Sequence[str], events: NDArray[np.void], most: int) -> NDArray[np.intp]:
        """Places of the events that are told, in order."""
        if len(events) <= most:
            return np.arange(len(events))
        looked_at = {stream for asked in self._asked.values() for stream in asked.watched.get(model, ())}
        place = {name: i for i, name in enumerate(names)}
        last = np.zeros(len(events), np.int64)
        last[list(place.values())] = 1
        weight = last + 2 * (events["bits"] & (ANOMALY | OPEN | ONSET) != 0) + 4 * np.array([name in looked_at for name in names])
        return np.sort(np.argsort(-weight, kind="stable")[:most])

    def _past(self, replica: str, model: str, streams: set[str]) -> Iterator[Part]:
        recent = self._recent[model]
        recent.write()
        most = HISTORY_BYTES // recent.dtype.itemsize
        wanted = {slot: most for name in streams if name and (slot := recent.slot(name)) is not None}
        others = np.empty(0, np.intp)
        if FLEET in streams:
            ranked = recent.top(HISTORY_STREAMS + most // 2)
            fleet, others = ranked[:HISTORY_STREAMS].tolist(), ranked[HISTORY_STREAMS:]
            each = min(HISTORY_EVENTS, max(1, (most - len(others)) // max(1, len(fleet))))
            wanted = dict.fromkeys(fleet, each) | wanted
        names: list[str] = []
        events: list[NDArray[np.void]] = []
        for slot, count in wanted.items():
            events.append(recent.events(slot)[-count:])
            names += [recent.name(slot)] * len(events[-1])
            if len(names) * recent.dtype.itemsize >= TELL_BYTES or slot == next(reversed(wanted)):
                yield self._part(model, names, np.concatenate(events), to=replica)
                names, events = [], []
        yield from self._lasts(replica, model, others)

    def _lasts(self, replica: str, model: str, slots: NDArray[np.intp]) -> Iterator[Part]:
        """The last event of each."""
        recent = self._recent[model]
        for i in range(0, len(slots), LASTS):
            part = slots[i : i + LASTS]
            names = [recent.name(slot) for slot in part.tolist()]
            yield replace(self._part(model, names, recent.last(part), to=replica), lasts=True)

    def _part(self, model: str, names: Sequence[str], events: NDArray[np.void], to: str = "") -> Part:
        number: dict[str, int] = {}
        which = np.array([number.setdefault(name, len(number)) for name in names], "<u4")
        return Part(self._replica, to, model, _takes(self._recent[model].manifest), list(number), which.tobytes(), events.tobytes())


def _takes(manifest: Manifest) -> str:
    """Events are of one meaning where this is the same: names of features, and of a log model the release whose codes they are."""
    return " ".join([*manifest.feature_names, *([manifest.version] if manifest.lines else [])])


def _by_model(keys: set[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for model, stream in sorted(keys):
        found[model].append(stream)
    return found
