"""What a detector's answers are worth, measured on labels. Scores are ranked as given; nothing is point-adjusted.

VUS-PR is TSB-AD's (Liu and Paparrizos, NeurIPS 2024; `version="opt"`, 250 thresholds): the area under the precision-recall curve with a
label that fades over w/2 rows on both sides of a segment, averaged over w = 0..window. Rows T, everything boolean or float [T].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = 250
RECOVERY = 10
"""Unflagged rows in a row that end an alarm, as in the service's policy."""

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]
Ints = NDArray[np.intp]


def segments(flags: Bool) -> list[tuple[int, int]]:
    """Runs of true rows, [start, stop)."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def vus_window(x: Float64) -> int:
    """TSB-AD's `find_length_rank(x, rank=1)`: the lag of the highest peak of the autocorrelation of the first 20,000 values, or 125."""
    centred = x[:20_000] - x[:20_000].mean()
    n = len(centred)
    power = np.abs(np.fft.rfft(centred, 2 ** (2 * n - 1).bit_length())) ** 2
    covariance = np.fft.irfft(power)[: min(401, n)]
    if not covariance[0] > 0:
        return 125
    correlation = (covariance / covariance[0])[3:]
    inner = correlation[1:-1]
    peaks = np.flatnonzero((inner > correlation[:-2]) & (inner > correlation[2:])) + 1
    if len(peaks) == 0:
        return 125
    best = int(peaks[np.argsort(correlation[peaks])[-1]])
    return best + 3 if 3 <= best <= 300 else 125


def vus_pr(score: Float64, label: Bool, window: int) -> float:
    """Mean over w = 0..window of the area under the PR curve with labels that fade over w/2 rows. `label` has a true row."""
    falling = -np.sort(-score)
    thresholds = falling[np.linspace(0, len(score) - 1, THRESHOLDS).astype(int)]
    first = np.searchsorted(-thresholds, -score, side="left")  # first threshold that a row reaches
    predicted = np.searchsorted(-falling, -thresholds, side="right").astype(float)
    runs = np.array(segments(label), np.intp)
    return float(np.mean([_faded_area(first, predicted, label, runs, w) for w in range(window + 1)]))


def _faded_area(first: Ints, predicted: Float64, label: Bool, runs: Ints, w: int) -> float:
    rows, half = len(label), w // 2
    faded = np.minimum(label + _ramps(runs, rows, w), 1.0)
    starts, stops = runs[:, 0] - half, runs[:, 1] + half
    apart = np.flatnonzero(stops[:-1] < starts[1:] + 1)  # the windows [start, stop) neither overlap nor touch on a row
    begin = np.maximum(starts[np.r_[0, apart + 1]], 0)
    end = np.minimum(stops[np.r_[apart, len(runs) - 1]], rows)
    earliest = np.minimum.reduceat(np.append(first, THRESHOLDS), np.stack([begin, end], axis=1).ravel())[::2]
    found = np.cumsum(np.bincount(earliest, minlength=THRESHOLDS)) / len(begin)
    positives = np.cumsum(np.bincount(first, weights=faded, minlength=THRESHOLDS))
    beside = np.cumsum(np.bincount(first, weights=np.where(label, 0.0, faded), minlength=THRESHOLDS))
    total = label.sum() + beside / 2
    recall = np.minimum(positives / total, 1.0) * found
    return float(np.sum(np.diff(recall, prepend=0.0) * positives / predicted))


def _ramps(runs: Ints, rows: int, w: int) -> Float64:
    """What the fading adds around the runs: sqrt(1 - d / w) at distance d = 1..w // 2 [T]."""
    distance = np.arange(1, w // 2 + 1)
    at = np.concatenate([(runs[:, 1:] - 1 + distance).ravel(), (runs[:, :1] - distance).ravel()])
    height = np.tile(np.sqrt(1 - distance / max(w, 1)), 2 * len(runs))
    inside = (at >= 0) & (at < rows)
    return np.bincount(at[inside], weights=height[inside], minlength=rows).astype(float)


def f1(flagged: Bool, label: Bool) -> float:
    hits = int((flagged & label).sum())
    return 2 * hits / max(1, int(flagged.sum()) + int(label.sum()))


def alarms(flagged: Bool) -> Bool:
    """Flagged rows that begin an alarm: no flag in the RECOVERY rows before."""
    starts = np.zeros(len(flagged), bool)
    rows = np.flatnonzero(flagged)
    starts[rows[np.diff(rows, prepend=-RECOVERY - 1) > RECOVERY]] = True
    return starts


def delays(flagged: Bool, label: Bool) -> list[int | None]:
    """For each labelled segment the rows from its start to its first flag, None where it has none."""
    first = [(start, np.flatnonzero(flagged[start:stop])) for start, stop in segments(label)]
    return [int(rows[0]) if len(rows) else None for _, rows in first]


@dataclass(frozen=True)
class Named:
    """Rows [start, stop) of an anomaly and the features that made it."""

    start: int
    stop: int
    features: frozenset[int]


def blamed(contribution: NDArray[np.float32], flagged: Bool, named: Sequence[Named]) -> list[tuple[bool, float]]:
    """For each anomaly with a flag: is the feature with the largest mean share over the flagged rows a named one; the odds by chance."""
    judged = []
    for anomaly in named:
        rows = np.flatnonzero(flagged[anomaly.start : anomaly.stop]) + anomaly.start
        if len(rows):
            shares = np.nan_to_num(contribution[rows])
            top = int((shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)).mean(axis=0).argmax())
            judged.append((top in anomaly.features, len(anomaly.features) / contribution.shape[1]))
    return judged


def nab_score(alarm: Sequence[Bool], anomalous: Sequence[Bool]) -> float:
    """NAB's standard profile of alarms [T] on whole files: 0 = no alarm at all, 100 = all windows at their first row and no false one.

    What numenta/NAB's own scorer says of the same alarms at a threshold of 1 (checked: 64.8 and 66.1 both ways).
    """
    total, windows = 0.0, 0
    for raised, labels in zip(alarm, anomalous, strict=True):
        rows = len(labels)
        spans = [(start, stop - 1) for start, stop in segments(labels)]
        alerts = np.flatnonzero(raised)
        alerts = alerts[alerts >= nab_probation(rows)]
        windows += len(spans)
        for start, end in spans:
            inside = alerts[(alerts >= start) & (alerts <= end)]
            total += _sigmoid(-(end - int(inside[0]) + 1) / (end - start + 1)) / _sigmoid(-1.0) if len(inside) else -1.0
        for at in alerts[~labels[alerts]].tolist():
            before = [span for span in spans if span[1] < at]
            total += 0.11 * (_sigmoid((at - before[-1][1]) / (before[-1][1] - before[-1][0])) if before else -1.0)
    return round(100 * (total + windows) / (2 * windows), 1)


def nab_probation(rows: int) -> int:
    """Leading rows of a NAB file that may be learned from and are never scored."""
    return min(int(0.15 * rows), 750)


def _sigmoid(position: float) -> float:
    return -1.0 if position > 3 else 2 / (1 + math.exp(5 * position)) - 1
