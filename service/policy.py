"""p-values → verdicts: score, decision, severity, direction, and when an alert opens and closes. Pure and vectorised.

    anomaly_score = log p / log α          1 = as rare as asked for, 2 = α², for every model and stream
    alert_score   = log onset_p / log α_n  the same where an anomaly begins, 0 elsewhere; > 1 opens an alert

Both p-values keep their promise at every age of a stream. α_n = α · g(n)^(1 - w) is what an alert may spend at the n-th event: while
a stream is new its normal novelties are larger, g(n) = 1 + τ/n times as frequent, and so are the anomalies worth seeing. Strict
(w = 1) is α always; the learning allowance (w = 1/2) lets a new stream alert more often, by a stated number.

A run of errors begins with an event rarer than α (or an onset) and ends after `recovery` ordinary events in a row; an open alert
closes with its run.

    learning ──onset──► alert open: the state is frozen, a learner beside it goes on ──`recovery` ordinary events──► learning
                           │  after `passing` events the learner is dropped                  (with the learner's state, if there is one)
                           └─ accepted (by call, or by age) ─► learning, no alert until `recovery` ordinary events in a row

So what passes is learned as it would have been, and what lasts never turns normal by itself. While a state is frozen an event is
ordinary only from p = CALM on: a fault's later events are less rare than its onset, whose shock the running network gets used to.
An onset within an open alert counts only if ESCALATION times rarer than all before. Figures: LOG.md, "Lasting faults".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from service.asking import LARGEST_ALPHA
from service.events import Direction
from service.state import ACCEPTED, ALERT_OPEN, ENDING, EXPIRED, FROZEN, LASTING, LEARNER, LEVEL, LEVEL_SHIFT, SILENT, Rows

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
UP, DOWN, BOTH, NO_DIRECTION = range(4)
SEVERITY_STEPS = (1.0, 1.5, 2.0)
"""Scores above which an anomaly is minor, major and critical (SEVERITIES): p < α, α^1.5, α²."""
ALLOWANCE = 0.5
"""The exponent 1 - w of g(n) that a new stream may spend; τ comes from the model's calibration."""
THRESHOLD = 1.0
"""On every score of ours 1 means: as rare as the asked false-alarm rate."""
CALM = 0.01
"""p-value from which an event is ordinary for a frozen state."""
ESCALATION = 0.1

_OPEN, _FROZEN, _LEARNER, _ACCEPTED, _EXPIRED, _LASTING = map(np.uint32, (ALERT_OPEN, FROZEN, LEARNER, ACCEPTED, EXPIRED, LASTING))
ALERT_FIELDS = ("flags", "quiet", "lasting", "peak", "started_at")

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdicts:
    """Decisions about N events."""

    anomaly_score: Float64  # [N], NaN = none
    alert_score: Float64  # [N], NaN = none
    is_anomaly: Bool  # [N]
    grade: Float64  # [N], 0..1
    severity: NDArray[np.intp]  # [N], index into SEVERITIES
    direction: NDArray[np.intp]  # [N], index into DIRECTIONS


@dataclass(frozen=True)
class Policy:
    """What the operator asks for."""

    alpha: float = 1e-3
    """False onsets per event of a normal stream."""
    strict: bool = False
    """No learning allowance: α from the first judged event on."""
    recovery: int = 10
    """Ordinary events in a row that end an anomaly."""
    prior_events: float = 1000.0
    """Events after which a stream's own evidence weighs as much as the pooled prior (confidence 0.5)."""
    tau: float = 0.0
    """Age constant of the model's calibration: a stream's n-th event is 1 + τ/n times as likely to start a false alarm as a late one."""

    settled: int = 500
    """Events before which no state is frozen: a stream this young does not know yet what is normal for it."""
    passing: int = 250
    """Events after which an open alert is a lasting fault: nothing of it is learned unless it is accepted."""
    silence: bool = True
    """Whether streams are waited for, see silence.py."""
    accept_after: float = math.inf
    """Seconds (of the events' own time) after which a running anomaly is accepted as the new normal by itself."""

    def onset_alpha(self, version: NDArray[Any]) -> NDArray[np.float32]:
        """α_n: what onsets at a stream's n-th events are compared with."""
        if self.strict:
            return np.full(len(version), self.alpha, np.float32)
        growth = 1 + self.tau / np.maximum(version.astype(np.float64), 1)
        return np.minimum(self.alpha * growth**ALLOWANCE, LARGEST_ALPHA).astype(np.float32)

    def promise(self, warmup: int) -> dict[str, float]:
        """False alarms that the setting means for one normal stream, and how many of them its first 10,000 events may add."""
        events = np.arange(warmup + 1, 10_001)
        extra = float((self.onset_alpha(events) - np.float32(self.alpha)).sum(dtype=np.float64))
        return {"per_stream_and_1000_events": 1000 * self.alpha, "extra_while_learning": round(extra, 3)}

    def confidence(self, version: NDArray[np.uint64]) -> Float64:
        events = version.astype(np.float64)
        return events / (events + self.prior_events)

    def track(
        self,
        rows: Rows,
        timestamp: Float64,
        p_value: NDArray[np.float32],
        onset_p: NDArray[np.float32],
        onset_alpha: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Advance the alert fields of `rows` [B] by one event each, in place; returns the onsets that count, 1 where none does.

        `onset_alpha` is α_n of these events.
        """
        stirred = (rows["flags"] != 0) | (onset_p < onset_alpha) | (p_value < np.float32(self.alpha)) | ~np.isnan(rows["started_at"])
        quiet = _one_more(rows["quiet"], p_value)
        if not stirred.any():  # most batches
            rows["quiet"] = quiet
            return onset_p
        at = np.flatnonzero(stirred)
        counts = onset_p.copy()
        counts[at] = self._track(rows, at, timestamp[at], p_value[at], onset_p[at], onset_alpha[at])
        rows["quiet"] = np.where(stirred, rows["quiet"], quiet)
        return counts

    def _track(
        self,
        rows: Rows,
        slots: NDArray[np.intp],
        timestamp: Float64,
        p_value: NDArray[np.float32],
        onset_p: NDArray[np.float32],
        onset_alpha: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """The same for `rows[slots]`, whatever they are: mostly a few, so it is the number of calls that counts."""
        flags, quiet, lasting, peak, started = (rows[name][slots] for name in ALERT_FIELDS)
        was_open, frozen, accepted = flags & ALERT_OPEN != 0, flags & FROZEN != 0, flags & ACCEPTED != 0
        alpha = np.float32(self.alpha)
        known = accepted | (was_open & (onset_p >= peak * np.float32(ESCALATION)))
        onset_p = np.where(known, np.float32(1), onset_p)  # NaN is not known
        opened = onset_p < onset_alpha
        rare = p_value < alpha
        stirred = opened | np.where(frozen | accepted, p_value < np.float32(max(self.alpha, CALM)), rare)
        quiet = np.where(stirred, 0, _one_more(quiet, p_value))
        over = quiet >= self.recovery
        started = np.where((opened | rare) & np.isnan(started), timestamp, started)

        open_ = (was_open | opened) & ~over
        expired = open_ & (timestamp - started >= self.accept_after)
        open_ &= ~expired
        lasting = np.where(was_open & open_, np.minimum(lasting, 2**32 - 2) + 1, 0)
        freezes = open_ & np.where(was_open, frozen, rows["version"][slots] >= self.settled)
        learner = freezes & (~was_open | (flags & LEARNER != 0)) & (lasting < self.passing)
        rows["quiet"][slots], rows["lasting"][slots] = quiet, lasting
        rows["peak"][slots] = np.where(open_, np.fmin(np.where(was_open, peak, np.float32(1)), onset_p), 0)
        rows["started_at"][slots] = np.where(over | expired, np.nan, started)
        bits = open_ * _OPEN | freezes * _FROZEN | learner * _LEARNER | (accepted & ~over | expired) * _ACCEPTED
        bits |= expired * _EXPIRED | (freezes & stirred) * _LASTING
        if open_.any():
            bits |= _level(open_, flags, _highest(_score(p_value, alpha), _score(onset_p, onset_alpha)))
        rows["flags"][slots] = bits
        return onset_p

    def accept(self, row: Rows) -> bool:
        """Take what the stream `row` [1] is alerted about for its new normal, in place; False if no alert is open."""
        flags = int(row["flags"][0])
        if not flags & ALERT_OPEN:
            return False
        if flags & LEARNER:
            row["vector"] = row["learner"]
        row["learner"], row["flags"], row["started_at"] = 0, ACCEPTED | flags & (SILENT | ENDING), np.nan
        row["quiet"] = row["lasting"] = row["peak"] = 0
        return True


def judge(records: Rows) -> Verdicts:
    """Verdicts for N records, each against the α it was scored with."""
    anomaly_score = _score(records["p_value"], records["alpha"])
    alert_score = _score(records["onset_p"], records["onset_alpha"])
    highest = _highest(anomaly_score, alert_score)
    lasting = records["flags"] & LASTING != 0
    is_anomaly = (highest > THRESHOLD) | lasting
    grade, direction = np.zeros(len(records)), np.full(len(records), NO_DIRECTION)
    at = np.flatnonzero(is_anomaly)
    if len(at):
        height = highest[at]
        # An open alert is judged against CALM, which lasting events stay below.
        calm = _score(records["p_value"][at], np.fmax(records["alpha"][at], np.float32(CALM)))
        height = np.where(lasting[at], np.fmax(height, calm), height)
        grade[at] = 1 - 1 / np.fmax(height, 1.0)
        direction[at] = _direction(records[at])
        highest[lasting] = np.fmax(highest[lasting], np.nextafter(THRESHOLD, 2))
    return Verdicts(anomaly_score, alert_score, is_anomaly, grade, _severity(highest), direction)


def _one_more(quiet: NDArray[np.uint32], p_value: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.minimum(quiet, 2**32 - 2) + ~np.isnan(p_value)  # no value is no evidence


def _highest(anomaly_score: Float64, alert_score: Float64) -> Float64:
    highest: Float64 = np.fmax(np.fmax(anomaly_score, alert_score), 0.0)  # NaN is no evidence
    return highest


def _severity(highest: Float64) -> NDArray[np.intp]:
    return np.searchsorted(SEVERITY_STEPS, highest, side="left")


def _level(open_: Bool, flags: NDArray[np.uint32], highest: Float64) -> NDArray[np.uint32]:
    """Bits of the severity that open alerts have reached with an event; what they had before is in `flags`, of no alert 0."""
    reached = np.maximum(np.maximum(_severity(highest), 1), (flags & LEVEL) >> LEVEL_SHIFT)
    return np.where(open_, reached.astype(np.uint32) << LEVEL_SHIFT, np.uint32(0))


def _score(p: NDArray[np.float32], alpha: NDArray[np.float32] | np.float32) -> Float64:
    # The comparison p < α is made in float32; log is monotone, so the score exceeds 1 exactly then.
    scores: Float64 = np.log(p.astype(np.float64)) / np.log(alpha.astype(np.float64)) + 0.0
    return scores


def _direction(records: Rows) -> NDArray[np.intp]:
    """Where the features that carry the anomaly lie: outside their band, or else the greatest contributor beside its expectation."""
    x, contribution = records["x"], records["contribution"]
    above = ((x > records["upper"]) & (contribution > 0)).any(axis=1)
    below = ((x < records["lower"]) & (contribution > 0)).any(axis=1)
    top = contribution.argmax(axis=1)[:, None]
    difference = np.take_along_axis(x - records["expected"], top, axis=1)[:, 0]
    fallback = np.where(difference > 0, UP, np.where(difference < 0, DOWN, NO_DIRECTION))
    return np.where(above & below, BOTH, np.where(above, UP, np.where(below, DOWN, fallback)))
