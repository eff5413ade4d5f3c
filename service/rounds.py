"""Many events of many streams → rounds of one event for each stream, each round one step of the detector.

    events      a1 b1 a2 c1 a3          (in order of arrival; a, b, c are streams)
    round 0     a1 b1 c1                one detector.step() on three distinct streams
    round 1     a2
    round 2     a3

Pure: states are changed in place, nothing else is touched. The live scorer and the backtest both call `advance`, so their scores
are the same numbers.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service import cadence
from service.detector import Detector, StepOutput
from service.events import PLACE, Readings
from service.policy import Policy
from service.state import FROZEN, LEARNER, SEEN, Rows

Float32 = NDArray[np.float32]
Positions = NDArray[np.intp]


PART_ROUNDS = 16
"""Some two milliseconds of a single stream's steps."""


class Kind(enum.IntEnum):
    """What became of an event."""

    SCORED = 0
    DUPLICATE = 1  # not stepped; its record is the stored one
    REPEATED = 2  # not stepped; its result is not at hand
    LATE = 3  # older than the stream's last event: not stepped
    CONFLICT = 4  # other replicas won three times
    REFUSED = 5  # a new stream beyond the limit
    FENCED = 6  # its partition of a queue is another replica's by now


@dataclass(frozen=True)
class Outcomes:
    """What became of N events: a record each (empty where nothing was scored), and its kind."""

    records: Rows  # [N] of record_dtype
    kinds: NDArray[np.uint8]  # [N] of Kind

    @classmethod
    def unscored(cls, readings: Readings, dtype: np.dtype[np.void], alpha: float) -> Outcomes:
        """No scores yet, for any of the readings."""
        records = np.zeros(len(readings), dtype)
        for name in ("p_value", "onset_p", "started_at"):
            records[name] = np.nan
        records["alpha"], records["onset_alpha"], records["timestamp"], records["key"] = alpha, alpha, readings.timestamp, readings.key
        return cls(records, np.full(len(readings), Kind.REPEATED, np.uint8))


def advance(
    detector: Detector, policy: Policy, rows: Rows, readings: Readings, slots: Positions, repeated: NDArray[np.bool_] | None = None
) -> Outcomes:
    """Step the states `rows` [B] by N readings; reading i belongs to `rows[slots[i]]`. Changes `rows` in place.

    `repeated` marks readings known to be old ones (from a trail): they are not stepped.
    """
    outcomes = Outcomes.unscored(readings, rows.dtype["last"], policy.alpha)
    for _ in advancing(detector, policy, rows, readings, slots, repeated, outcomes):
        pass
    return outcomes


def advancing(
    detector: Detector,
    policy: Policy,
    rows: Rows,
    readings: Readings,
    slots: Positions,
    repeated: NDArray[np.bool_] | None,
    outcomes: Outcomes,
) -> Iterator[None]:
    """The same in parts of PART_ROUNDS rounds, into `outcomes`: between two parts others may use the processor."""
    if len(readings) == 0:
        return
    if repeated is None:
        repeated = np.zeros(len(readings), np.bool_)
    for i, positions in enumerate(split_rounds(slots), 1):
        _round(detector, policy, rows, readings, slots, positions, repeated, outcomes)
        if i % PART_ROUNDS == 0:
            yield
    answer_within(outcomes, readings.key, slots)


def split_rounds(slots: Positions) -> Iterator[Positions]:
    """Positions of the first event of every stream, then of the second, … each in order of arrival."""
    order = np.argsort(slots, kind="stable")
    in_order = slots[order]
    starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]])
    rank = np.arange(len(slots)) - np.repeat(starts, np.diff(np.r_[starts, len(slots)]))
    by_round = np.argsort(rank, kind="stable")
    for positions in np.split(order[by_round], np.cumsum(np.bincount(rank))[:-1]):
        yield np.sort(positions)


def answer_within(outcomes: Outcomes, key: NDArray[np.uint64], slots: Positions) -> None:
    """Give events that repeat another one of the same batch that one's result."""
    open_ = np.flatnonzero(np.isin(outcomes.kinds, (Kind.REPEATED, Kind.LATE)) & (key != 0))
    if len(open_) == 0:
        return
    scored = np.flatnonzero((outcomes.kinds == Kind.SCORED) & (key != 0))
    found = {(slot, k): i for i, slot, k in zip(scored.tolist(), slots[scored].tolist(), key[scored].tolist(), strict=True)}
    for i in open_.tolist():
        first = found.get((int(slots[i]), int(key[i])))
        if first is not None:
            outcomes.records[i] = outcomes.records[first]
            outcomes.kinds[i] = Kind.DUPLICATE


def _round(
    detector: Detector,
    policy: Policy,
    rows: Rows,
    readings: Readings,
    slots: Positions,
    positions: Positions,
    repeated: NDArray[np.bool_],
    outcomes: Outcomes,
) -> None:
    """One event of each of some distinct streams."""
    at = slots[positions]
    last = rows["last"]
    key, sequence = readings.key[positions], readings.sequence[positions]
    timestamp = np.where(
        readings.timed[positions], readings.timestamp[positions], np.fmax(readings.timestamp[positions], last["timestamp"][at])
    )
    answered = (key != 0) & (key == last["key"][at])
    duplicate = answered | repeated[positions] | ((key != 0) & (rows["seen"][at] == key[:, None]).any(axis=1))
    if readings.place is not None:
        duplicate |= _passed(rows, at, readings.place[positions])
    ordered = (sequence >= 0) & (last["sequence"][at] >= 0)
    late = ~duplicate & np.where(ordered, sequence <= last["sequence"][at], timestamp < last["timestamp"][at])
    outcomes.records["version"][positions] = rows["version"][at]
    outcomes.kinds[positions[answered]] = Kind.DUPLICATE
    outcomes.records[positions[answered]] = last[at[answered]]
    outcomes.kinds[positions[late]] = Kind.LATE
    go = ~duplicate & ~late
    if go.any():
        _step(detector, policy, rows, readings, at[go], positions[go], timestamp[go], outcomes)


def _passed(rows: Rows, at: Positions, place: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether each event of a queue is at or before its stream's last one in it."""
    offset, last = place["offset"], rows["offset"][at]
    before = (offset < last) | ((offset == last) & (place["part"] <= rows["part"][at]))
    passed: NDArray[np.bool_] = (place["source"] != 0) & (place["source"] == rows["source"][at]) & before
    return passed


def _step(
    detector: Detector,
    policy: Policy,
    rows: Rows,
    readings: Readings,
    at: Positions,
    positions: Positions,
    timestamp: NDArray[np.float64],
    outcomes: Outcomes,
) -> None:
    """Step distinct streams `rows[at]` by the readings at `positions`, and keep the results in both."""
    x, alpha = readings.x[positions], np.full(len(at), policy.alpha, np.float32)
    if readings.raw is None:
        rows["raw"][at] = np.nan
    else:
        x = _with_rates(rows, at, readings.raw[positions], timestamp, x)
    _ask_less(detector, rows, at, alpha)
    inputs = (x, _time_features(timestamp, rows["last"]["timestamp"][at]))
    cadence.learn(rows, at, timestamp - rows["last"]["timestamp"][at])
    rows["silent_since"][at] = np.nan
    before = rows["flags"][at]
    learners = np.flatnonzero(before & LEARNER)
    out, learned = _judged(detector, rows, at, learners, inputs, alpha)
    out = replace(out, onset_p=policy.track(rows, at, timestamp, out.p_value, out.onset_p))
    after = rows["flags"][at]
    state = out.state
    over = after[learners] & FROZEN == 0
    state[learners[over]] = learned[over]
    begun = np.flatnonzero(after & ~before & FROZEN)
    if len(begun):  # what this event teaches is the learner's alone
        learners, learned = np.r_[learners, begun], np.r_[learned, state[begun]]
        state[begun] = _frozen(detector, rows, at[begun], begun, inputs, alpha)
    rows["learner"][at[learners]] = np.where((after[learners] & LEARNER != 0)[:, None], learned, 0)
    record = _record(rows, at, x, alpha, timestamp, readings.sequence[positions], readings.key[positions], out)
    record["onset_alpha"] = policy.onset_alpha(record["version"])
    rows["vector"][at] = state
    rows["version"][at] = record["version"]
    # In every model of ours version counts events, so version % SEEN walks the ring.
    rows["seen"][at, (record["version"] % SEEN).astype(np.intp)] = record["key"]
    rows["last"][at] = record
    if readings.place is not None:
        queued = readings.place["source"][positions] != 0
        for name in PLACE.fields or ():
            rows[name][at[queued]] = readings.place[name][positions[queued]]
    outcomes.records[positions] = record
    outcomes.kinds[positions] = Kind.SCORED


def _with_rates(rows: Rows, at: Positions, raw: NDArray[np.float64], timestamp: NDArray[np.float64], x: Float32) -> Float32:
    """`x` with the increase per second of counters as its first feature; keeps their readings. A counter that fell began again at 0.

    The first reading, and one after an event without a reading, have no increase: missing.
    """
    previous, seconds = rows["raw"][at], timestamp - rows["last"]["timestamp"][at]
    increase = np.where(raw < previous, raw, raw - previous)
    rate = np.divide(increase, seconds, out=np.full(len(at), np.nan), where=(seconds > 0) & ~np.isnan(previous))
    rate = np.where(np.abs(rate) <= np.finfo(np.float32).max, rate, np.nan)
    rows["raw"][at] = raw
    x = x.copy()
    x[:, 0] = np.where(np.isnan(raw), x[:, 0], rate)
    return x


def _ask_less(detector: Detector, rows: Rows, at: Positions, alpha: Float32) -> None:
    """Take back, in place, what quiet earned at a larger α: kept, it would mean several times the false alarms that are asked for now."""
    fewer = at[rows["last"]["alpha"][at] > alpha]
    if len(fewer) and detector.audit is not None:
        for name in ("vector", "learner"):
            rows[name][fewer, detector.audit] = 0


def _judged(
    detector: Detector, rows: Rows, at: Positions, learners: Positions, inputs: tuple[Float32, Float32], alpha: Float32
) -> tuple[StepOutput, Float32]:
    """One step of `rows[at]`, frozen where they are, and the next states of the learners beside those at `learners`."""
    learn = (rows["flags"][at] & FROZEN == 0).astype(np.float32)
    vector = rows["vector"][at]
    if len(learners) == 0:
        return detector.step(vector, *inputs, learn, alpha), vector[:0]
    vector = np.concatenate([vector, rows["learner"][at[learners]]])
    x, t = (np.concatenate([values, values[learners]]) for values in inputs)
    both = detector.step(vector, x, t, np.r_[learn, np.ones(len(learners), np.float32)], np.r_[alpha, alpha[learners]])
    judged = StepOutput(*(getattr(both, name)[: len(at)] for name in StepOutput.__dataclass_fields__))
    return judged, both.state[len(at) :]


def _frozen(detector: Detector, rows: Rows, at: Positions, places: Positions, inputs: tuple[Float32, Float32], alpha: Float32) -> Float32:
    """States after the same event had nothing been learned from it."""
    x, t = (values[places] for values in inputs)
    return detector.step(rows["vector"][at], x, t, np.zeros(len(at), np.float32), alpha[places]).state


def _record(
    rows: Rows,
    at: Positions,
    x: NDArray[np.float32],
    alpha: NDArray[np.float32],
    timestamp: NDArray[np.float64],
    sequence: NDArray[np.int64],
    key: NDArray[np.uint64],
    out: StepOutput,
) -> Rows:
    record = np.zeros(len(at), rows.dtype["last"])
    record["key"], record["timestamp"] = key, timestamp
    record["version"] = rows["version"][at] + 1
    record["sequence"] = np.where(sequence >= 0, sequence, rows["last"]["sequence"][at])
    record["started_at"] = rows["started_at"][at]
    record["flags"] = rows["flags"][at]
    record["p_value"], record["onset_p"], record["alpha"] = out.p_value, out.onset_p, alpha
    record["x"], record["expected"], record["lower"] = x, out.expected, out.lower
    record["upper"], record["contribution"] = out.upper, out.contribution
    return record


def _time_features(timestamp: NDArray[np.float64], previous: NDArray[np.float64]) -> NDArray[np.float32]:
    """[B, 3]: seconds since the previous event (NaN on the first), second of the day, day of the week (Monday 0), UTC."""
    days = np.floor(timestamp / 86400)
    # 1970-01-01 was a Thursday, day 3 of a week that starts on Monday.
    return np.stack([np.maximum(timestamp - previous, 0), timestamp - 86400 * days, (days + 3) % 7], axis=1).astype(np.float32)
