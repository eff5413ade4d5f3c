"""p-values → verdicts: score, decision, severity, direction, and when an alert opens and closes. Pure and vectorised.

    anomaly_score = log p / log α        1 = as rare as asked for, 2 = α², for every model and stream
    alert_score   = log onset_p / log α  the same where an anomaly begins, 0 elsewhere; > 1 opens an alert

A run of errors begins with an event rarer than α (or an onset) and ends after `recovery` ordinary events in a row; an open alert
closes with its run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from service.events import Direction, Severity
from service.state import ALERT_OPEN, Rows

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
UP, DOWN, BOTH, NO_DIRECTION = range(4)
SEVERITY_STEPS = (1.0, 1.5, 2.0)
"""Scores above which an anomaly is minor, major and critical: p < α, α^1.5, α²."""
THRESHOLD = 1.0
"""On every score of ours 1 means: as rare as the asked false-alarm rate."""

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
    recovery: int = 10
    """Ordinary events in a row that end an anomaly."""
    prior_events: float = 1000.0
    """Events after which a stream's own evidence weighs as much as the pooled prior (confidence 0.5)."""

    def learns(self, flags: NDArray[np.uint32]) -> NDArray[np.float32]:
        """`learn` of the step for streams with these flags: 1 = the state learns from the event."""
        return np.ones(len(flags), np.float32)

    def confidence(self, version: NDArray[np.uint64]) -> Float64:
        events = version.astype(np.float64)
        return events / (events + self.prior_events)

    def track(
        self, rows: Rows, slots: NDArray[np.intp], timestamp: Float64, p_value: NDArray[np.float32], onset_p: NDArray[np.float32]
    ) -> None:
        """Advance the alert fields of `rows[slots]` by one event each, in place."""
        alpha = np.float32(self.alpha)
        opened = onset_p < alpha
        anomalous = opened | (p_value < alpha)
        quiet = np.where(anomalous, 0, np.minimum(rows["quiet"][slots], 2**32 - 2) + 1).astype(np.uint32)
        over = quiet >= self.recovery
        started = rows["last"]["started_at"][slots]
        started = np.where(anomalous & np.isnan(started), timestamp, started)
        was_open = (rows["flags"][slots] & ALERT_OPEN).astype(bool)
        rows["quiet"][slots] = quiet
        rows["last"]["started_at"][slots] = np.where(over, np.nan, started)
        rows["flags"][slots] = np.where((was_open | opened) & ~over, ALERT_OPEN, 0)


def judge(records: Rows) -> Verdicts:
    """Verdicts for N records, each against the α it was scored with."""
    anomaly_score = _score(records["p_value"], records["alpha"])
    alert_score = _score(records["onset_p"], records["alpha"])
    highest = np.fmax(np.nan_to_num(anomaly_score), np.nan_to_num(alert_score))
    is_anomaly = highest > THRESHOLD
    severity = np.searchsorted(SEVERITY_STEPS, highest, side="left")
    grade = np.where(is_anomaly, 1 - 1 / np.maximum(highest, 1.0), 0.0)
    direction = np.where(is_anomaly, _direction(records), NO_DIRECTION)
    return Verdicts(anomaly_score, alert_score, is_anomaly, grade, severity, direction)


def _score(p: NDArray[np.float32], alpha: NDArray[np.float32]) -> Float64:
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
