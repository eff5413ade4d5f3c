"""Many events of many streams → rounds of one event for each stream, each round one step of the detector.

    events      a1 b1 a2 c1 a3          (in order of arrival; a, b, c are streams)
    round 0     a1 b1 c1                one detector.step() on three distinct streams
    round 1     a2
    round 2     a3

Which events are stepped is known before (order.py). The states of a batch are laid out so that those of every round are its first k,
and what does not depend on the step is computed for all rounds at once: a round of a hundred streams then takes little beside its step.

Pure: states are changed in place, nothing else is touched. The live scorer and the backtest both call `advance`, so their scores
are the same numbers.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import cadence, order
from service.detector import Detector, StepOutput
from service.events import FLOAT32_MAX, PLACE, Readings
from service.order import STORED, Plan, Turns
from service.policy import Policy
from service.state import ACCEPTED, FROZEN, LEARNER, SEEN, Rows

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
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
    plan = order.plan(rows, readings, slots, repeated)
    _answer_unstepped(plan, rows, slots, outcomes)
    turns = order.turns(slots, plan.go)
    if turns.sizes:
        batch = _Batch(detector, policy, rows, readings, plan, turns)
        for i, _ in enumerate(turns.sizes, 1):
            batch.step()
            if i % PART_ROUNDS == 0:
                yield
        batch.keep(rows, readings, outcomes)
    for i, source in plan.answered.items():
        if source != STORED:
            outcomes.records[i] = outcomes.records[source]
    answer_within(outcomes, readings.key, slots)


def answer_within(outcomes: Outcomes, key: NDArray[np.uint64], slots: Positions) -> None:
    """Give events that repeat another one of the same batch that one's result."""
    if not outcomes.kinds.any():  # all SCORED
        return
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


def _answer_unstepped(plan: Plan, rows: Rows, slots: Positions, outcomes: Outcomes) -> None:
    if plan.go.all():
        return
    outcomes.records["version"] = plan.version
    outcomes.kinds[plan.late] = Kind.LATE
    for i, source in plan.answered.items():
        outcomes.kinds[i] = Kind.DUPLICATE
        if source == STORED:
            outcomes.records[i] = rows["last"][slots[i]]


class _Batch:
    """E events of n streams on their way through the rounds."""

    def __init__(self, detector: Detector, policy: Policy, rows: Rows, readings: Readings, plan: Plan, turns: Turns) -> None:
        at, E = turns.positions, len(turns.positions)
        self._detector, self._policy, self._turns = detector, policy, turns
        self._whole = np.array_equal(turns.streams, np.arange(len(rows)))
        self._rows = rows if self._whole else rows[turns.streams]  # [n] in the order of the rounds
        self._vector: Float32 = np.ascontiguousarray(self._rows["vector"])  # [n, S] kept apart: it is all that the step reads and writes
        timestamp, previous = plan.timestamp[at], plan.previous[at]
        self._gap = timestamp - previous
        self._t = _time_features(timestamp, self._gap)
        self._accepts = np.uint32(0 if detector.manifest.lines is None else ACCEPTED)  # a sensor's graph may learn twice as much by 2
        self._learn, self._alpha = np.ones(len(turns.streams), np.float32), np.full(len(turns.streams), policy.alpha, np.float32)
        record = self._records = np.empty(E, rows.dtype["last"])  # in the order of the rounds
        record["key"], record["timestamp"], record["version"] = readings.key[at], timestamp, plan.version[at] + np.uint64(1)
        # Events of a stream are in its order, and of several values for one place numpy keeps the last.
        self._of = np.concatenate([np.arange(k) for k in turns.sizes])  # [E] place of each event's stream
        self._x, self._timestamp = readings.x[at], timestamp
        if readings.raw is None:
            self._rows["raw"] = np.nan
        else:
            raw = readings.raw[at]
            self._x = _with_rates(self._x, raw, self._before(raw, self._rows["raw"]), self._gap)
            self._rows["raw"][self._of] = raw
        if (lines := detector.manifest.lines) is not None:
            self._x = _with_gaps(self._x, self._t[:, 0], self._before(self._x[:, 0], self._rows["last"]["x"][:, 0]), lines.end)
        record["sequence"], record["x"], record["alpha"] = plan.sequence[at], self._x, policy.alpha
        self._onset_alpha = record["onset_alpha"] = policy.onset_alpha(record["version"])
        _ask_less(detector, self._rows, self._vector, self._alpha)
        self._rows["silent_since"] = np.nan
        self._round = self._done = 0

    def step(self) -> None:
        """The next round."""
        k = self._turns.sizes[self._round]
        here = slice(self._done, self._done + k)
        rows, record, x, t = self._rows[:k], self._records[here], self._x[here], self._t[here]
        cadence.learn(rows, self._gap[here])
        before = rows["flags"].copy()
        learners = np.flatnonzero(before & LEARNER)
        frozen = before & FROZEN != 0
        accepted = before & self._accepts != 0
        learn = np.float32(1) * ~frozen + accepted if frozen.any() or accepted.any() else self._learn[:k]
        out, learned = self._judged(rows, learners, x, t, learn)
        onset_p = self._policy.track(rows, self._timestamp[here], out.p_value, out.onset_p, self._onset_alpha[here])
        if before.any() or rows["flags"].any():
            self._freeze(rows, before, learners, learned, x, t, out.state)
        self._vector[:k] = out.state
        rows["version"] = record["version"]
        record["started_at"], record["flags"] = rows["started_at"], rows["flags"]
        record["p_value"], record["onset_p"] = out.p_value, onset_p
        record["expected"], record["lower"], record["upper"] = out.expected, out.lower, out.upper
        record["contribution"], record["likely"], record["before"] = out.contribution, out.likely, out.before
        self._round, self._done = self._round + 1, self._done + k

    def keep(self, rows: Rows, readings: Readings, outcomes: Outcomes) -> None:
        """All rounds are done: results into `outcomes`, states into `rows`."""
        at, streams, record, mine = self._turns.positions, self._turns.streams, self._records, self._rows
        outcomes.records[at], outcomes.kinds[at] = record, Kind.SCORED
        mine["vector"] = self._vector
        of = self._of
        mine["last"][of] = record
        # In every model of ours version counts events, so version % SEEN walks the ring.
        mine["seen"][of, (record["version"] % SEEN).astype(np.intp)] = record["key"]
        if readings.place is not None:
            place = readings.place[at]
            queued = place["source"] != 0
            for name in PLACE.names or ():
                mine[name][of[queued]] = place[name][queued]
        if not self._whole:
            rows[streams] = mine

    def _before(self, own: NDArray[Any], stored: NDArray[Any]) -> NDArray[Any]:
        """[E] of each event what the stream's event before it had: `own` [E], or `stored` [n] of the one before this batch."""
        starts, sizes = np.cumsum([0, *self._turns.sizes]), self._turns.sizes
        later = [own[start : start + k] for start, k in zip(starts, sizes[1:], strict=False)]  # the round before, its first k
        return np.concatenate([stored[: sizes[0]], *later])

    def _judged(self, rows: Rows, learners: Positions, x: Float32, t: Float32, learn: Float32) -> tuple[StepOutput, Float32]:
        """One step of the states, frozen where they are, and the next states of the learners beside those at `learners`."""
        k, step = len(rows), self._detector.step
        vector, alpha = self._vector[:k], self._alpha[:k]
        if len(learners) == 0:
            return step(vector, x, t, learn, alpha), vector[:0]
        vector = np.concatenate([vector, rows["learner"][learners]])
        both = step(
            vector,
            np.concatenate([x, x[learners]]),
            np.concatenate([t, t[learners]]),
            np.concatenate([learn, np.ones(len(learners), np.float32)]),
            np.concatenate([alpha, alpha[learners]]),
        )
        return StepOutput(*(getattr(both, name)[:k] for name in StepOutput.__dataclass_fields__)), both.state[k:]

    def _freeze(
        self, rows: Rows, before: NDArray[np.uint32], learners: Positions, learned: Float32, x: Float32, t: Float32, state: Float32
    ) -> None:
        """Set right, in place, the next states of streams whose alert opened, goes on or closed with this event."""
        after = rows["flags"]
        begun = np.flatnonzero(after & ~before & FROZEN)
        if len(learners) == len(begun) == 0:
            return
        over = after[learners] & FROZEN == 0
        state[learners[over]] = learned[over]
        if len(begun):  # what this event teaches is the learner's alone
            learners, learned = np.concatenate([learners, begun]), np.concatenate([learned, state[begun]])
            nothing = np.zeros(len(begun), np.float32)
            state[begun] = self._detector.step(self._vector[begun], x[begun], t[begun], nothing, self._alpha[begun]).state
        rows["learner"][learners] = np.where((after[learners] & LEARNER != 0)[:, None], learned, 0)


def _with_rates(x: Float32, raw: Float64, previous: Float64, seconds: Float64) -> Float32:
    """`x` with the increase per second of counters as its first feature. A counter that fell began again at 0.

    The first reading, and one after an event without a reading, have no increase: missing.
    """
    increase = np.where(raw < previous, raw, raw - previous)
    rate = np.divide(increase, seconds, out=np.full(len(raw), np.nan), where=(seconds > 0) & ~np.isnan(previous))
    rate = np.where(np.abs(rate) <= FLOAT32_MAX, rate, np.nan)
    x = x.copy()
    x[:, 0] = np.where(np.isnan(raw), x[:, 0], rate)
    return x


def _with_gaps(x: Float32, seconds: Float32, code_before: Float32, end: int) -> Float32:
    """`x` of lines with the seconds since the stream's previous event as its second feature, where a session goes on."""
    x = x.copy()
    x[:, 1] = np.where(code_before == end, np.float32(np.nan), seconds)
    return x


def _ask_less(detector: Detector, rows: Rows, vector: Float32, alpha: Float32) -> None:
    """Take back, in place, what quiet earned at a larger α: kept, it would mean several times the false alarms that are asked for now."""
    fewer = np.flatnonzero(rows["last"]["alpha"] > alpha)
    if len(fewer) and detector.audit is not None:
        vector[fewer, detector.audit] = 0
        rows["learner"][fewer, detector.audit] = 0


def _time_features(timestamp: Float64, gap: Float64) -> Float32:
    """[B, 3]: seconds since the previous event (NaN on the first), second of the day, day of the week (Monday 0), UTC."""
    days = np.floor(timestamp / 86400)
    # 1970-01-01 was a Thursday, day 3 of a week that starts on Monday.
    return np.stack([np.maximum(gap, 0), timestamp - 86400 * days, (days + 3) % 7], axis=1).astype(np.float32)
