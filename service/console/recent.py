"""What one model has scored lately: a ring of events for each stream, bounded in memory.

    feed ──batches──► read ──► put aside ──many at once──► rings [slots, depth], rank of each stream ──pulled──► live.py
    other replicas (shared.py) ──────────► merged by time ─┘

Taking a batch costs next to nothing: it is kept until somebody looks, or until there is enough to write with a few array operations.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.artifact import Manifest
from service.console.messages import Counts
from service.feed import Batch
from service.policy import THRESHOLD
from service.rounds import Kind
from service.state import ALERT_OPEN, FROZEN
from service.state import LEVEL as STATE_LEVEL
from service.state import LEVEL_SHIFT as STATE_SHIFT

PENDING_EVENTS = 4096
"""Events put aside at most: their rings are written in some two milliseconds."""
HALF_LIFE = 15.0
"""Seconds in which the rank of a stream that has gone calm halves."""
QUIET_SECONDS = 60.0
"""A stream that has not spoken for so long makes room for a new one."""
ADMISSIONS = 64
"""New streams that may push out others, for each writing."""
MESSAGE_BYTES = 300
"""Kept of a log line."""
LOG_EVENTS = 300
"""Kept of a log stream, at most: a line takes more room than a reading."""
MOST_AGE = 3600.0
"""Seconds: of what was longer ago than that no rank is left."""
ANOMALY, OPEN, HELD, ONSET, COLD = 1, 2, 4, 8, 16
"""Bits of an event: anomalous, an alert is open, the state is frozen, an alert begins, warming up."""
LEVEL_SHIFT = 5
"""Of two bits more: the severity that the open alert has reached, an index into SEVERITIES."""
ATTENDED, MUTED = 128, 256
"""Somebody looks after the open alert, or it is muted: of a stream as it is now, in no event."""

_FIELDS = ("x", "expected", "lower", "upper", "contribution")


def event_dtype(manifest: Manifest) -> np.dtype[Any]:
    """An event as it is kept: NaN = none. Of a log model with its line, as UTF-8; b"" = the end of a session."""
    features, lines = len(manifest.features), manifest.lines
    own: list[Any] = []
    if lines is not None:
        own = [("likely", "<f4", (2 * lines.likely,)), ("before", "<f4", (lines.before,)), ("message", f"S{MESSAGE_BYTES}")]
    return np.dtype(
        [
            ("t", "<f8"),  # seconds since 1970
            ("score", "<f4"),
            ("alert", "<f4"),
            ("p", "<f4"),
            ("version", "<u8"),  # events of the stream up to it; with `t` it says which one it is
            ("bits", "u1"),
            ("severity", "u1"),
            ("direction", "u1"),
            *((name, "<f4", (features,)) for name in _FIELDS),
            *own,
        ]
    )


@dataclass(frozen=True)
class Tail:
    """How often small p-values came: what was asked for beside what is seen."""

    events: int
    judged: int
    onsets: int
    rarer: list[int]
    """Events with a p-value below each of the levels asked for."""


@dataclass(frozen=True)
class Put:
    """What is kept of a batch until it is written."""

    stream_ids: list[str]
    events: NDArray[Any]  # [n] of event_dtype
    at: float


@dataclass(frozen=True)
class Resting:
    """A stream whose last event has an open alert, and that has been quiet since."""

    stream_id: str
    slot: int
    written: int
    """Events ever written of it."""


class Room:
    """Bytes that the rings of all `models` have together. An eighth is kept for them in equal parts; who comes first has the rest.

    A model whose one ring is larger than its part has that all the same, and takes nothing from the parts of others.
    """

    def __init__(self, most_bytes: int, models: Iterable[str]) -> None:
        self.most_bytes = most_bytes
        self._taken = dict.fromkeys(models, 0)
        self._kept = most_bytes // (8 * len(self._taken)) if len(self._taken) > 1 else 0

    def left(self, model: str) -> int:
        """What the model may still take."""
        others = (max(taken, self._kept) for name, taken in self._taken.items() if name != model)
        return max(self._kept, self.most_bytes - sum(others)) - self._taken[model]

    def take(self, model: str, size: int) -> None:
        self._taken[model] += size


class Recent:
    """The last `depth` events of as many streams as there is room for, of one at least. `clock` gives monotonic seconds."""

    def __init__(self, manifest: Manifest, room: Room, depth: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.manifest = manifest
        self._room = room
        self.depth = depth if manifest.lines is None else min(depth, LOG_EVENTS)
        self.dtype = event_dtype(manifest)
        self._slot_bytes = self.depth * self.dtype.itemsize
        most = max(1, room.most_bytes // self._slot_bytes)
        self._clock = clock
        # Zeros of the operating system: a ring takes memory once it is written.
        self._ring = np.zeros((most, self.depth), self.dtype)
        self._written = np.zeros(most, np.int64)
        self._changed = np.zeros(most, np.int64)
        self._bits = np.zeros(most, np.uint8)
        self._rank = np.zeros(most, np.float64)
        self._at = np.zeros(most, np.float64)
        self._spoke = np.zeros(most, np.float64)
        self._mixed = np.zeros(most, np.int64)
        self._attended = np.zeros(most, np.uint16)
        self._names: list[str] = []
        self._slots: dict[str, int] = {}
        self._pending: list[Put] = []
        self._pending_events = 0
        self._left_out = 0
        self.writes = 0
        """Goes up with every writing; see `changed_since`."""
        self.pushes = 0
        """Streams that another took the slot of, and those whose past has changed; see `mixed`."""

    def read(self, batch: Batch) -> Put | None:
        """The scored events of a committed batch; None = there are none."""
        answers = batch.answers
        kinds = np.array(answers.kinds, np.uint8)
        scored = np.flatnonzero(kinds == Kind.SCORED)
        if len(scored) == 0:
            return None
        places = scored + answers.start
        records, verdicts = answers.batch.outcomes.records[places], answers.batch.verdicts
        events = np.empty(len(scored), self.dtype)
        events["t"], events["p"], events["version"] = records["timestamp"], records["p_value"], records["version"]
        events["score"], events["alert"] = verdicts.anomaly_score[places], verdicts.alert_score[places]
        events["severity"], events["direction"] = verdicts.severity[places], verdicts.direction[places]
        flags = records["flags"]
        events["bits"] = (
            ANOMALY * verdicts.is_anomaly[places]
            + OPEN * (flags & ALERT_OPEN != 0)
            + HELD * (flags & FROZEN != 0)
            + ONSET * (events["alert"] > THRESHOLD)
            + COLD * (records["version"] < self.manifest.warmup)
            + (((flags & STATE_LEVEL) >> STATE_SHIFT) << LEVEL_SHIFT)
        )
        for name in _FIELDS:
            events[name] = records[name]
        if batch.messages is not None:
            events["likely"], events["before"] = records["likely"], records["before"]
            events["message"] = [(batch.messages[i] or "").encode() for i in scored.tolist()]
        ids = batch.stream_ids
        return Put([ids[i] for i in scored.tolist()], events, self._clock())

    def put(self, put: Put) -> None:
        """Put events aside that come after all of theirs that are here."""
        self._pending.append(put)
        self._pending_events += len(put.events)
        if self._pending_events >= PENDING_EVENTS:
            self.write()

    def write(self) -> None:
        """Write what was put aside."""
        if not self._pending:
            return
        puts, self._pending, self._pending_events = self._pending, [], 0
        self.writes += 1
        slots, events, at = self._placed(puts, np.repeat([put.at for put in puts], [len(put.events) for put in puts]))
        if len(slots):
            self._write(slots, events, at)

    def merge(self, puts: Sequence[Put], *, aged: bool = False, lasts: bool = False) -> None:
        """Write events of several origins by their time; those that are here already are dropped. `aged`: they may be of long ago.

        `lasts`: those before what is here are dropped, too.
        """
        self.write()
        at = np.repeat([put.at for put in puts], [len(put.events) for put in puts])
        if len(at) == 0:
            return
        self.writes += 1
        if aged:
            at = at - np.clip(time.time() - np.concatenate([put.events["t"] for put in puts]), 0.0, MOST_AGE)
        slots, events, at = self._placed(puts, at)
        if len(slots) == 0:
            return
        order = np.lexsort((events["version"], events["t"], slots))
        slots, events, at = slots[order], events[order], at[order]
        starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])
        sizes = np.diff(np.r_[starts, len(slots)])
        each = slots[starts]
        behind = (self._written[each] > 0) & (events["t"][starts] <= self.last(each)["t"])
        ahead = ~np.repeat(behind, sizes)
        if ahead.any():
            self._write(slots[ahead], events[ahead], at[ahead])
        if lasts:
            return
        for slot, start, size in zip(each[behind].tolist(), starts[behind].tolist(), sizes[behind].tolist(), strict=True):
            part = slice(start, start + size)
            self._mix(slot, events[part], at[part])

    @property
    def capacity(self) -> int:
        """Streams that are held, or would find room."""
        held = len(self._names)
        return max(1, min(len(self._ring), held + max(0, self._room.left(self.manifest.name)) // self._slot_bytes))

    def counts(self) -> Counts:
        held = self._bits[: len(self._names)]
        alerting, cold = held & OPEN != 0, held & COLD != 0
        return Counts(
            len(self._slots), int((held & ANOMALY != 0).sum()), int(alerting.sum()), int(cold.sum()), self.capacity, self._left_out
        )

    def tail(self, levels: Sequence[float]) -> Tail:
        """Of all events held now. Looks at every one: not for the event loop."""
        n = len(self._names)
        ring, held = self._ring[:n], np.minimum(self._written[:n], self.depth)
        here = np.arange(self.depth) < held[:, None]
        p_value = ring["p"][here]
        p_value = p_value[~np.isnan(p_value)]
        rarer = [int((p_value < np.float32(level)).sum()) for level in levels]
        return Tail(int(held.sum()), len(p_value), int((ring["bits"][here] & ONSET != 0).sum()), rarer)

    def slot(self, stream_id: str) -> int | None:
        return self._slots.get(stream_id)

    def name(self, slot: int) -> str:
        return self._names[slot]

    def written(self, slot: int) -> int:
        """Events ever written of the stream in this slot."""
        return int(self._written[slot])

    def mixed(self, slot: int) -> int:
        """Goes up when events were put between those of this slot: whoever has them needs all again."""
        return int(self._mixed[slot])

    def version(self, slot: int) -> int:
        """Events of the stream up to its last one."""
        return int(self._ring[slot, (self._written[slot] - 1) % self.depth]["version"])

    def changed_since(self, writes: int, slots: NDArray[np.intp]) -> NDArray[np.intp]:
        """Those of `slots` that were written after `self.writes` was `writes`."""
        return slots[self._changed[slots] > writes]

    def top(self, most: int, holds: str = "", bits: int = 0) -> NDArray[np.intp]:
        """Slots of at most `most` streams, first those with an open alert (that nobody looks after and that is not muted, the most
        severe first, then the others so), then by how anomalous they were lately.

        `holds`: what their names hold, whatever its case; `bits`: at least one of which their last event has.
        """
        n = len(self._names)
        found = np.arange(n)
        if holds:
            wanted = holds.casefold()
            found = np.array([i for i, name in enumerate(self._names) if wanted in name.casefold()], np.intp)
        if bits:
            found = found[self._bits[found] & bits != 0]
        rank = self.rank(found)
        if len(found) > most:
            best = np.argpartition(-rank, most - 1)[:most]
            found, rank = found[best], rank[best]
        return found[np.lexsort((found, -rank))]

    def rank(self, slots: NDArray[np.intp]) -> NDArray[np.float64]:
        """Peak score, halved every HALF_LIFE since; an open alert is above all without one, by 1,000 for each step of severity, and one
        that nobody looks after and that is not muted by three such steps more.
        """
        calm: NDArray[np.float64] = self._rank[slots] * 0.5 ** ((self._clock() - self._at[slots]) / HALF_LIFE)
        bits = self._bits[slots]
        steps = np.maximum(bits >> LEVEL_SHIFT, 1) + np.where(self._attended[slots] != 0, 0, 3)
        return calm + np.where(bits & OPEN != 0, 1000.0 * steps, 0.0)

    def attend(self, marks: Mapping[str, int]) -> bool:
        """The open alerts of these streams, and of no others, are ATTENDED or MUTED; whether that is new of any."""
        self.write()
        attended = np.zeros(len(self._ring), np.uint16)
        for stream_id, mark in marks.items():
            if (slot := self._slots.get(stream_id)) is not None:
                attended[slot] = mark
        new = np.flatnonzero(attended != self._attended)
        if len(new):
            self.writes += 1
            self._changed[new] = self.writes
            self._attended = attended
        return len(new) > 0

    def attended(self, slots: NDArray[np.intp]) -> NDArray[np.uint16]:
        """Of each that has an open alert whether it is ATTENDED or MUTED; 0 = neither."""
        found: NDArray[np.uint16] = np.where(self._bits[slots] & OPEN != 0, self._attended[slots], np.uint16(0))
        return found

    def last(self, slots: NDArray[np.intp]) -> NDArray[Any]:
        """The last event of each stream."""
        events: NDArray[Any] = self._ring[slots, (self._written[slots] - 1) % self.depth]
        return events

    def peak(self, slot: int, seen: int) -> tuple[float, int]:
        """Greatest score and all bits of the events written after the first `seen` ones, the severity of the last; NaN = no score."""
        events = self.events(slot, seen)
        scores = events["score"][~np.isnan(events["score"])]
        marks, level = int(np.bitwise_or.reduce(events["bits"])) % (1 << LEVEL_SHIFT), int(events["bits"][-1]) >> LEVEL_SHIFT
        return float(scores.max()) if len(scores) else float("nan"), marks | level << LEVEL_SHIFT

    def line(self, slot: int) -> bytes:
        """What to read first of a log stream: its last line, b"" = the end of a session.

        While an alert is open and the last event is no anomalous line, the one at the greatest onset that is held.
        """
        written = int(self._written[slot])
        place = (written - 1) % self.depth
        bits, last = self._ring["bits"][slot, place], self._ring["message"][slot, place]
        if bits & OPEN and not (bits & ANOMALY and last):
            places = np.arange(max(written - self.depth, 0), written) % self.depth
            onsets = places[self._ring["bits"][slot, places] & ONSET != 0]
            if len(onsets):
                place = int(onsets[self._ring["alert"][slot, onsets].argmax()])
        line: bytes = self._ring["message"][slot, place]
        return line

    def events(self, slot: int, seen: int = 0) -> NDArray[Any]:
        """Those still held of the events written after the first `seen` ones, in order."""
        written = int(self._written[slot])
        first = max(seen, written - self.depth, 0)
        events: NDArray[Any] = self._ring[slot, np.arange(first, written) % self.depth]
        return events

    def resting(self) -> list[Resting]:
        """Streams that have been quiet for QUIET_SECONDS with an alert open."""
        self.write()
        n = len(self._names)
        quiet = self._clock() - self._spoke[:n] > QUIET_SECONDS
        slots = np.flatnonzero(quiet & (self._bits[:n] & OPEN != 0)).tolist()
        return [Resting(self._names[slot], slot, int(self._written[slot])) for slot in slots]

    def over(self, resting: Sequence[Resting]) -> int:
        """The alerts of these are over, but for those that have spoken meanwhile; how many that were."""
        self.write()
        slots = [rest.slot for rest in resting if self._names[rest.slot] == rest.stream_id and self._written[rest.slot] == rest.written]
        if slots:
            self.writes += 1
            self.pushes += 1
            self._mixed[slots] += 1
            self._changed[slots] = self.writes
            self._bits[slots] &= ANOMALY | ONSET | COLD
            self._ring["bits"][slots, (self._written[slots] - 1) % self.depth] &= ANOMALY | ONSET | COLD
        return len(slots)

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _placed(self, puts: Sequence[Put], at: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
        """Slots, events and times [N] of what finds room."""
        events = np.concatenate([put.events for put in puts])
        slots = self._slots_of([name for put in puts for name in put.stream_ids], events, at)
        kept = np.flatnonzero(slots >= 0)
        self._left_out += len(slots) - len(kept)
        return slots[kept], events[kept], at[kept]

    def _slots_of(self, names: Sequence[str], events: NDArray[Any], at: NDArray[np.float64]) -> NDArray[np.intp]:
        """[N] slots, -1 = no room."""
        slots = self._known(names)
        new = np.flatnonzero(slots < 0).tolist()
        if new:
            speaks = np.zeros(len(self._ring), bool)  # none of these is pushed out
            speaks[slots[slots >= 0]] = True
            loud = (events["bits"][new] & (ANOMALY | OPEN) != 0).tolist()
            self._admit([names[i] for i in new], loud, at[new].tolist(), float(at.max()), speaks)
            slots[new] = self._known([names[i] for i in new])
        placed = slots >= 0
        np.maximum.at(self._spoke, slots[placed], at[placed])
        return slots

    def _known(self, names: Sequence[str]) -> NDArray[np.intp]:
        return np.array(list(map(self._slots.get, names, itertools.repeat(-1))), np.intp)

    def _admit(self, names: Sequence[str], loud: Sequence[bool], at: Sequence[float], newest: float, speaks: NDArray[np.bool_]) -> None:
        """Give streams slots by their events, of which some are `loud`: anomalous, or with an alert open."""
        tries, none_for = ADMISSIONS, {False: False, True: False}  # where one found no slot no later one will: none becomes quieter
        for name, anomalous, spoke in zip(names, loud, at, strict=True):
            if none_for[anomalous] or name in self._slots:
                continue
            if len(self._names) < self.capacity:
                slot = len(self._names)
                self._names.append(name)
                self._room.take(self.manifest.name, self._slot_bytes)
            else:
                slot = self._pushed(anomalous, newest, speaks)
                tries -= slot >= 0
                none_for[anomalous] = slot < 0 or tries < 1
                if slot < 0:
                    continue
                del self._slots[self._names[slot]]
                self._names[slot] = name
            self._begin(slot, spoke)
            speaks[slot] = True

    def _pushed(self, anomalous: bool, newest: float, speaks: NDArray[np.bool_]) -> int:
        """The slot of the calm stream that has been quiet longest, or -1: an ordinary stream pushes out only what says nothing any more.

        Those that speak now stay, as their events have their slots already; `newest` = when the last of them spoke.
        """
        n = len(self._names)
        lately = newest - self._spoke[:n] <= QUIET_SECONDS
        calm = (self._bits[:n] & np.where(lately, ANOMALY | OPEN, OPEN) == 0) & ~speaks[:n]
        slot = int(np.where(calm, self._spoke[:n], np.inf).argmin())
        quiet = newest - self._spoke[slot]
        return slot if calm[slot] and quiet > (0 if anomalous else QUIET_SECONDS) else -1

    def _begin(self, slot: int, at: float) -> None:
        self.pushes += self._written[slot] > 0
        self._slots[self._names[slot]] = slot
        self._written[slot] = self._rank[slot] = self._bits[slot] = self._mixed[slot] = 0
        self._at[slot] = self._spoke[slot] = at
        self._attended[slot] = 0

    def _write(self, slots: NDArray[np.intp], events: NDArray[Any], at: NDArray[np.float64]) -> None:
        order = np.argsort(slots, kind="stable")
        slots, events, at = slots[order], events[order], at[order]
        starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])
        sizes = np.diff(np.r_[starts, len(slots)])
        number = np.arange(len(slots)) - np.repeat(starts, sizes)
        # Of more than a ring holds only the last are written: of equal places in one assignment none is sure to win.
        fits = np.repeat(sizes, sizes) - number <= self.depth
        places = (self._written[slots] + number) % self.depth
        self._ring[slots[fits], places[fits]] = events[fits]
        each, ends = slots[starts], starts + sizes - 1
        peaks = np.maximum.reduceat(np.nan_to_num(np.fmax(events["score"], events["alert"]), posinf=1e3), starts)
        self._rank[each] = np.maximum(self._rank[each] * 0.5 ** ((at[ends] - self._at[each]) / HALF_LIFE), peaks)
        self._written[each] += sizes
        self._changed[each] = self.writes
        self._bits[each], self._at[each] = events["bits"][ends], at[ends]

    def _mix(self, slot: int, new: NDArray[Any], at: NDArray[np.float64]) -> None:
        """Put events of one stream, sorted, between those that are held."""
        held = self.events(slot)
        both = np.concatenate([held, new])
        order = np.lexsort((both["version"], both["t"]))
        t, version = both["t"][order], both["version"][order]
        again = np.r_[False, (t[1:] == t[:-1]) & (version[1:] == version[:-1])]
        more = len(order) - int(again.sum()) - len(held)
        if more <= 0 or (len(held) == self.depth and new["t"][-1] < held["t"][0]):
            return
        merged = both[order[~again]][-self.depth :]
        written = int(self._written[slot]) + more
        self._ring[slot, np.arange(written - len(merged), written) % self.depth] = merged
        peak = float(np.nan_to_num(np.fmax(new["score"], new["alert"]), posinf=1e3).max())
        fade = 0.5 ** (max(0.0, float(at[-1]) - self._at[slot]) / HALF_LIFE)
        self._rank[slot] = max(self._rank[slot] * fade, peak * 0.5 ** (max(0.0, self._at[slot] - float(at[-1])) / HALF_LIFE))
        self._at[slot] = max(self._at[slot], float(at[-1]))
        self._written[slot], self._changed[slot] = written, self.writes
        self._bits[slot] = merged["bits"][-1]
        self._mixed[slot] += 1
        self.pushes += 1
