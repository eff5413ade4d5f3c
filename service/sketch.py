"""Series of any length → what a picture of them needs: the console's backtest and the report draw from it.

A series is cut into at most `buckets` stretches of rows, one for each pixel or so. Of a stretch its least and greatest value are kept,
the widest band and the greatest score, so a single spike among a million rows is seen. Where there are no more rows than buckets,
everything is kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.backtest import Scored, Series, Tally, score
from service.detector import Detector
from service.policy import THRESHOLD, Policy

FEATURES = 8
"""Features of a series that are drawn: those that carry its anomalies the most."""
CONTRIBUTORS = 6
ONSETS = 200
"""Onsets of a series that are listed."""

EARLIEST_TIME = 1e8
"""Seconds since 1970 from which a column of times is one, and not a counter of rows."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Contribution:
    feature: str
    contribution: float
    actual: float
    expected: float


@dataclass(frozen=True)
class Onset:
    """Where an alert opens, or goes far beyond what it was."""

    row: int
    timestamp: str
    """As the file writes it."""
    seconds: float
    alert_score: float
    p_value: float
    contributors: list[Contribution]
    """The greatest first."""


@dataclass
class Sketch:
    """One series of N rows in B stretches, of its f drawn features. NaN = nothing to draw."""

    series: Series
    names: tuple[str, ...]
    """Of all F features."""
    features: list[int]  # [f] positions in `names`
    first: NDArray[np.intp]  # [B] first row of each stretch
    low: Float32  # [B, f], as the next four
    high: Float32
    expected: Float32  # at the stretch's last row
    lower: Float32
    upper: Float32
    score: Float32  # [B] the greatest
    anomalous: NDArray[np.bool_]  # [B] any of them
    tally: Tally
    onsets: list[Onset] = field(default_factory=list)

    @property
    def thinned(self) -> bool:
        return len(self.first) < len(self.series)

    @classmethod
    def empty(cls, series: Series, names: tuple[str, ...], features: list[int], buckets: int) -> Sketch:
        count = min(len(series), buckets)
        first = np.arange(count, dtype=np.intp) * len(series) // max(1, count)

        def blank() -> Float32:
            return np.full((count, len(features)), np.nan, np.float32)

        score = np.full(count, np.nan, np.float32)
        parts = (blank(), blank(), blank(), blank(), blank())
        return cls(series, names, features, first, *parts, score, np.zeros(count, np.bool_), Tally(series.name))

    def add(self, first: int, scored: Scored) -> None:
        """The results of rows first, first + 1, …; in order."""
        rows = len(scored.kinds)
        self.tally.add(first, scored)
        begin = int(np.searchsorted(self.first, first, "right")) - 1
        end = int(np.searchsorted(self.first, first + rows, "left"))
        starts = np.maximum(self.first[begin:end] - first, 0)
        last = np.r_[starts[1:], rows] - 1
        part = slice(begin, end)
        x = self.series.x[first : first + rows][:, self.features]
        self.low[part] = np.fmin(self.low[part], np.fmin.reduceat(x, starts))
        self.high[part] = np.fmax(self.high[part], np.fmax.reduceat(x, starts))
        self.lower[part] = np.fmin(self.lower[part], np.fmin.reduceat(scored.lower[:, self.features], starts))
        self.upper[part] = np.fmax(self.upper[part], np.fmax.reduceat(scored.upper[:, self.features], starts))
        self.expected[part] = scored.expected[last][:, self.features]
        points = np.where(scored.judged, np.fmax(scored.anomaly_score, scored.alert_score), np.nan).astype(np.float32)
        self.score[part] = np.fmax(self.score[part], np.fmax.reduceat(points, starts))
        self.anomalous[part] |= np.logical_or.reduceat(scored.is_anomaly, starts)
        for i in np.flatnonzero(scored.alert_score > THRESHOLD)[: ONSETS - len(self.onsets)].tolist():
            self.onsets.append(self._onset(first, i, scored))

    def _onset(self, first: int, i: int, scored: Scored) -> Onset:
        row = first + i
        share, x, expected = scored.contribution[i], self.series.x[row], scored.expected[i]
        order = [j for j in np.argsort(-share, kind="stable")[:CONTRIBUTORS].tolist() if share[j] > 0]
        contributors = [Contribution(self.names[j], float(share[j]), float(x[j]), float(expected[j])) for j in order]
        seconds = float(self.series.seconds[row])
        return Onset(row, _written(self.series, row), seconds, float(scored.alert_score[i]), float(scored.p_value[i]), contributors)

    def points(self) -> NDArray[np.intp]:
        """Rows to draw at: each stretch's first, and where it has several its middle too, for the least and the greatest value."""
        if not self.thinned:
            return self.first
        ends = np.r_[self.first[1:], len(self.series)]
        return np.stack([self.first, (self.first + ends) // 2], axis=1).reshape(-1)

    def drawn(self) -> dict[str, Any]:
        """Columns over `points`: value, expected, lower, upper [points, f]; score, anomalous [points]."""
        both = np.stack([self.low, self.high], axis=1).reshape(-1, len(self.features))
        value = both if self.thinned else self.low
        times = 2 if self.thinned else 1
        twice = {name: np.repeat(getattr(self, name), times, axis=0) for name in ("expected", "lower", "upper", "score", "anomalous")}
        return {"value": value, **twice}


def _written(series: Series, row: int) -> str:
    return str(series.timestamps[row]) if len(series.timestamps) else str(row + 1)


def sketch(series: Sequence[Series], detector: Detector, policy: Policy, buckets: int) -> list[Sketch]:
    """Score some series and draw them. Wide ones are scored twice: first to find the features that matter."""
    names = detector.manifest.feature_names
    if len(names) <= FEATURES:
        features = [list(range(len(names)))] * len(series)
    else:
        features = [_telling(weight) for weight in _weights(series, detector, policy)]
    sketches = [Sketch.empty(one, names, shown, buckets) for one, shown in zip(series, features, strict=True)]
    score(series, detector, policy, lambda i, first, scored: sketches[i].add(first, scored))
    return sketches


def _telling(weight: NDArray[np.float64]) -> list[int]:
    chosen: list[int] = sorted(np.argsort(-weight, kind="stable")[:FEATURES].tolist())
    return chosen


def _weights(series: Sequence[Series], detector: Detector, policy: Policy) -> list[NDArray[np.float64]]:
    """[F] each: what the features carry, of anomalous rows above all."""
    weights = [np.zeros(detector.features) for _ in series]

    def sink(i: int, first: int, scored: Scored) -> None:
        importance = np.where(scored.is_anomaly, 1.0, 1e-6) * scored.judged
        weights[i] += importance @ np.nan_to_num(scored.contribution.astype(np.float64))

    score(series, detector, policy, sink)
    return weights


def axis(seconds: NDArray[np.float64], rows: NDArray[np.intp]) -> tuple[NDArray[np.float64], bool]:
    """What to draw over, never decreasing: times where they are times and in order, else row numbers. And whether it is times."""
    in_order = bool((np.diff(seconds) >= 0).all()) and bool((seconds >= EARLIEST_TIME).all())
    return (seconds, True) if in_order else ((rows + 1).astype(np.float64), False)


def allowed(policy: Policy, rows: int, judged: int) -> float:
    """False alarms that the asked rate allows a stream of so many rows, its learning allowance included, if nothing is wrong with it."""
    ages = np.arange(rows - judged + 1, rows + 1)
    return round(float(policy.onset_alpha(ages).sum(dtype=np.float64)), 3) if judged else 0.0
