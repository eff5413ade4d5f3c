"""What becomes of each event of a batch before any is stepped: which are duplicates or late, and the turn of the others.

None of it depends on scores, so it is found out for the whole batch at once; only streams with something out of the ordinary are gone
through event by event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.events import PLACE, Readings
from service.state import SEEN, Rows

Positions = NDArray[np.intp]
Bool = NDArray[np.bool_]

STORED = -1
"""The record that answers an event is the stored one."""


@dataclass
class Plan:
    """What becomes of N events."""

    go: Bool  # [N] to be stepped
    late: Bool  # [N] older than the stream's last event; those that neither go nor are late are duplicates
    version: NDArray[np.uint64]  # [N] events of the stream before this one
    timestamp: NDArray[np.float64]  # [N] an event without time is never older than the one before
    previous: NDArray[np.float64]  # [N] of the event before, NaN = there was none
    sequence: NDArray[np.int64]  # [N] the stream's with this event, -1 = none
    answered: dict[int, int]
    """Repetitions of what was then the stream's last event, and the event that it was, or STORED."""


@dataclass(frozen=True)
class Turns:
    """E events in rounds, each with a stream once. In every round the streams are the first k of `streams`, in that order."""

    positions: Positions  # [E] round after round
    streams: Positions  # [n] slots
    sizes: list[int]  # [R] events of each round, never growing


def plan(rows: Rows, readings: Readings, slots: Positions, repeated: Bool | None) -> Plan:
    """For the states `rows` [B] and N readings, of which i belongs to `rows[slots[i]]`; `repeated` [N] are known to be old ones."""
    N, last = len(readings), rows["last"]
    once = len(rows) == N and bool((slots[1:] > slots[:-1]).all())  # each stream, in order: the usual batch of single events
    order = np.arange(N) if once else np.argsort(slots, kind="stable")
    at = slots[order]  # from here on events are ordered by stream, then by arrival
    first = np.ones(N, np.bool_)
    if once:
        starts, rank = slots, np.zeros(N, np.intp)
    else:
        np.not_equal(at[1:], at[:-1], out=first[1:])
        starts = np.flatnonzero(first)
        rank = np.arange(N) - np.repeat(starts, np.diff(starts, append=N))
    timestamp, sequence = readings.timestamp[order], readings.sequence[order]
    previous = _before(timestamp, first, last["timestamp"][at[starts]])
    known = last["sequence"][at]
    earlier = _before(sequence, first, known[starts])
    odd = (
        (timestamp < previous) | ((sequence >= 0) & (earlier >= 0) & (sequence <= earlier)) | (~first & ((sequence >= 0) != (earlier >= 0)))
    )
    if repeated is not None:
        odd |= repeated[order]
    if readings.key.any():
        odd |= _seen(rows, at, readings.key[order])
    if readings.place is not None:
        odd |= _misplaced(rows, at, first, readings.place[order])
    back = np.empty(N, np.intp)
    back[order] = np.arange(N)
    version = rows["version"][at] + rank.astype(np.uint64)
    sequence = np.where(sequence >= 0, sequence, known)
    made = Plan(np.ones(N, np.bool_), np.zeros(N, np.bool_), version[back], readings.timestamp.copy(), previous[back], sequence[back], {})
    if odd.any():
        of_odd = np.zeros(len(rows), np.bool_)
        of_odd[at[odd]] = True
        _go_through(made, rows, readings, slots, repeated, np.flatnonzero(of_odd[slots]))
    return made


def turns(slots: Positions, go: Bool) -> Turns:
    """Rounds of the events that go."""
    positions = np.flatnonzero(go)
    counts = np.bincount(slots[positions])
    if len(positions) == 0 or counts.max() == 1:
        return Turns(positions, slots[positions], [len(positions)] if len(positions) else [])
    streams = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    place = np.empty(len(counts), np.intp)
    place[streams] = np.arange(len(streams))
    positions = positions[np.argsort(place[slots[positions]], kind="stable")]
    each = counts[streams]
    rank = np.arange(len(positions)) - np.repeat(np.cumsum(each) - each, each)
    return Turns(positions[np.argsort(rank, kind="stable")], streams, np.bincount(rank).tolist())


def _before(values: NDArray[Any], first: Bool, stored: NDArray[Any]) -> NDArray[Any]:
    """The value before each one, of each stream's first the stored one."""
    before = np.empty_like(values)
    before[1:] = values[:-1]
    before[first] = stored
    return before


def _seen(rows: Rows, at: Positions, key: NDArray[np.uint64]) -> Bool:
    """Identities that their stream has seen lately, or twice in this batch."""
    has = key != 0
    seen: Bool = has & (rows["seen"][at] == key[:, None]).any(axis=1)
    by_key = np.lexsort((key, at))
    twice = (at[by_key][1:] == at[by_key][:-1]) & (key[by_key][1:] == key[by_key][:-1])
    seen[by_key[1:][twice]] |= has[by_key[1:][twice]]
    return seen


def _misplaced(rows: Rows, at: Positions, first: Bool, place: NDArray[np.void]) -> Bool:
    """Events of queues that are not beyond the one before in their partition; and those that follow on one that is of no queue."""
    before = _before(place, first, np.zeros(int(first.sum()), PLACE))
    for name in PLACE.names or ():
        before[name][first] = rows[name][at[first]]
    passed = (place["source"] != 0) & (place["source"] == before["source"]) & _not_beyond(place, before)
    misplaced: Bool = passed | (~first & ((place["source"] != 0) != (before["source"] != 0)))
    return misplaced


def _not_beyond(place: NDArray[np.void], before: NDArray[np.void]) -> Bool:
    beyond: Bool = (place["offset"] < before["offset"]) | ((place["offset"] == before["offset"]) & (place["part"] <= before["part"]))
    return beyond


@dataclass
class _Stream:
    """A stream as it is before its next event."""

    timestamp: float
    sequence: int
    key: int
    version: int
    seen: list[int]
    place: tuple[int, int, int]  # source, offset, part
    stepped: set[int] = field(default_factory=set)
    """Identities of its events in this batch that go."""
    last: int = STORED


def _go_through(made: Plan, rows: Rows, readings: Readings, slots: Positions, repeated: Bool | None, positions: Positions) -> None:
    """Events one by one, into `made`."""
    streams: dict[int, _Stream] = {}
    for i in positions.tolist():
        slot = int(slots[i])
        stream = streams.get(slot) or streams.setdefault(slot, _stream(rows[slot]))
        time, key, sequence = float(readings.timestamp[i]), int(readings.key[i]), int(readings.sequence[i])
        if not readings.timed[i] and time < stream.timestamp:
            time = stream.timestamp
        place = _place(readings, i)
        answered = key != 0 and key == stream.key
        passed = place[0] != 0 and place[0] == stream.place[0] and place[1:] <= stream.place[1:]
        known = key != 0 and (key in stream.seen or key in stream.stepped)
        duplicate = answered or passed or known or (repeated is not None and bool(repeated[i]))
        ordered = sequence >= 0 and stream.sequence >= 0
        made.late[i] = not duplicate and (sequence <= stream.sequence if ordered else time < stream.timestamp)
        made.go[i] = go = not duplicate and not made.late[i]
        made.version[i], made.timestamp[i], made.previous[i] = stream.version, time, stream.timestamp
        made.sequence[i] = sequence = sequence if sequence >= 0 else stream.sequence
        if answered:
            made.answered[i] = stream.last
        if go:
            stream.timestamp, stream.sequence, stream.key, stream.last = time, sequence, key, i
            stream.version += 1
            stream.stepped.add(key)
            stream.seen[stream.version % SEEN] = key
            stream.place = place if place[0] else stream.place


def _stream(row: np.void) -> _Stream:
    last = row["last"]
    place = int(row["source"]), int(row["offset"]), int(row["part"])
    return _Stream(float(last["timestamp"]), int(last["sequence"]), int(last["key"]), int(row["version"]), row["seen"].tolist(), place)


def _place(readings: Readings, i: int) -> tuple[int, int, int]:
    if readings.place is None:
        return 0, 0, 0
    place = readings.place[i]
    return int(place["source"]), int(place["offset"]), int(place["part"])
