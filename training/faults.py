"""Faults injected into unlabelled history: does the network earn its place in this fleet, and what does each signal find?

    history ──► faults in its later half ──► strengths of the detector, with and without its network ──► average precision of each

Nothing is known of the fleet's real faults; these are of many kinds, sizes, lengths and numbers of features. On SMD, ASD and SKAB they
rank network against none as the labels do. They do not choose weights of the signals well (LOG.md), so those are summed as they are.
Shapes: T steps, B streams, F features, K signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.calibrate import Observed, observe
from training.data import Float32, Float64, Stream, cut, pad, variance_of
from training.detector import DetectorStep

Bool = NDArray[np.bool_]
ROWS, STREAMS = 3000, 16
"""At most this much history is looked at."""
DRAWS = 16
"""Of faults into the same history. One leaves a small fleet's choice to chance (LOG.md); side by side they take few times as long."""
VALUES = 1 << 24
"""Numbers of all draws together at most: of many features each draw takes fewer streams, in turns."""
CLEAR = 2.0
"""Standard errors by which a difference between the means of draws is more than chance."""
LONGEST = 300
ENOUGH, FEWEST = 400, 250
"""Rows a stream needs to take part, the fewer where none has more: signals speak from the 60th or 100th on, and half is without faults."""

Fault = Callable[[np.random.Generator, Float64, float, float], Float64]
"""(rng, piece [L], size in deviations, deviation) → the piece with the fault."""


def _offset(rng: np.random.Generator, piece: Float64, size: float, deviation: float) -> Float64:
    return np.asarray(piece + rng.choice([-1, 1]) * size * deviation)


def _noise(rng: np.random.Generator, piece: Float64, size: float, deviation: float) -> Float64:
    return np.asarray(piece + rng.normal(size=len(piece)) * size * deviation)


def _stuck(rng: np.random.Generator, piece: Float64, size: float, deviation: float) -> Float64:
    return np.full_like(piece, piece[0])


def _ramp(rng: np.random.Generator, piece: Float64, size: float, deviation: float) -> Float64:
    return np.asarray(piece + rng.choice([-1, 1]) * 1.5 * size * deviation * np.arange(len(piece)) / len(piece))


def _amplified(rng: np.random.Generator, piece: Float64, size: float, deviation: float) -> Float64:
    return np.asarray(piece.mean() + (piece - piece.mean()) * (1 + size))


def _shuffled(rng: np.random.Generator, piece: Float64, size: float, deviation: float) -> Float64:
    """Its usual values in an unusual order: what only a look at the course, or at the other features, can find."""
    return rng.permutation(piece)


FAULTS: tuple[Fault, ...] = (_offset, _noise, _stuck, _ramp, _amplified, _shuffled)


def inject(rng: np.random.Generator, x: Float32, scored: Bool, start: int) -> tuple[Float32, Bool]:
    """Faults into x [T, F] from row `start` on, with quiet in between; returns the changed copy and which rows [T] are faulty."""
    y, faulty = x.astype(np.float64), np.zeros(len(x), bool)
    deviation = np.sqrt(variance_of(x[:start]))
    given = np.isfinite(y)
    able = np.flatnonzero(scored & (deviation > 0) & given[start:].any(axis=0))
    at = start + int(rng.integers(10, 60))
    while len(able) and at < len(x) - 12:
        length = min(int(math.exp(rng.uniform(math.log(3), math.log(LONGEST)))), len(x) - at)
        count = round(math.exp(rng.uniform(0, math.log(len(able)))))
        fault, size = FAULTS[rng.integers(len(FAULTS))], math.exp(rng.uniform(math.log(0.5), math.log(4)))
        for feature in rng.choice(able, count, replace=False):
            rows = at + np.flatnonzero(given[at : at + length, feature])  # a gap stays a gap
            if len(rows):
                y[rows, feature] = fault(rng, y[rows, feature], size, deviation[feature])
                faulty[at : at + length] = True
        at += length + int(rng.integers(100, 300))
    return y.astype(np.float32), faulty


@dataclass(frozen=True)
class Faulty:
    """Streams with injected faults, side by side: the same ones DRAWS times over, draw by draw, each time with other faults."""

    x: Float32  # [T, B, F]
    t: Float32  # [T, B, 3]
    faulty: Bool  # [T, B]
    start: int  # the first row that may be faulty

    @property
    def share(self) -> float:
        """Of faulty rows: the average precision of random scores."""
        return float(self.faulty[self.start :].mean())

    def by_draw(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Of [T, B], those of the rows that may be faulty, of each draw in which any is."""
        parts = (np.split(whole[self.start :], DRAWS, axis=1) for whole in (values, self.faulty))
        return [part.ravel() for part, faulty in zip(*parts, strict=True) if faulty.any()]


def faulty_streams(streams: Sequence[Stream], scored: Sequence[bool], seed: int) -> Faulty | None:
    """The longest streams, cut to the same rows; None where the history is too short, or nothing in it ever moves."""
    least = ENOUGH if max(map(len, streams)) >= ENOUGH else FEWEST
    longest = sorted((stream for stream in streams if len(stream) >= least), key=len, reverse=True)[:STREAMS]
    if not longest:
        return None
    rows = min(ROWS, len(longest[-1]))
    rng = np.random.default_rng([seed, rows])
    each = min(len(longest), max(1, VALUES // (DRAWS * rows * len(scored))))
    changed, labels = [], []
    for lane in range(DRAWS * each):
        piece = cut(longest[lane % len(longest)], 0, rows)
        x, faulty = inject(rng, piece.x, np.array(scored), rows // 2)
        changed.append(Stream(piece.name, x, piece.t))
        labels.append(faulty)
    if not np.any(labels):
        return None
    x, t = pad(changed, rows)
    return Faulty(x, t, np.stack(labels, axis=1), rows // 2)


def found(step: DetectorStep, streams: Faulty) -> dict[str, Float64]:
    """Average precision of the sum of the evidence over the rows that may be faulty, and of each signal alone; by draw [D]."""
    observed = observe(step, streams.x, streams.t)
    evidence = _evidence(observed, streams.start, step.signals.burn)
    labels = streams.by_draw(streams.faulty)
    scores = {"sum": evidence.sum(axis=2)} | {name: evidence[:, :, k] for k, name in enumerate(step.signals.names)}
    return {name: np.array(list(map(average_precision, streams.by_draw(score), labels))) for name, score in scores.items()}


@dataclass(frozen=True)
class Gain:
    """By how much more is found with one thing than with another, in the mean over draws."""

    mean: float
    error: float  # standard error of the mean; infinite for a single draw
    better: int  # draws in which it is more
    draws: int

    @classmethod
    def of(cls, one: Float64, other: Float64) -> Gain:
        """Of average precisions by draw, [D] each."""
        gain = one - other
        error = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        return cls(float(gain.mean()), error, int((gain > 0).sum()), len(gain))

    @property
    def clear(self) -> bool:
        return self.mean > CLEAR * self.error

    def __str__(self) -> str:
        more, every = "more" if self.mean > 0 else "less", f"{self.draws} draws of faults"
        return f"{abs(self.mean):.3f} ±{self.error:.3f} {more} average precision in the mean of {every}, more in {self.better} of them"


def _evidence(observed: Observed, start: int, burn: int) -> Float64:
    """log1p(strength ÷ its 99 % quantile in the clean part), [T, B, K]."""
    clean = observed.strengths[burn:start].reshape(-1, observed.strengths.shape[2])
    quantile = np.maximum(np.quantile(clean, 0.99, axis=0), 1e-6)
    return np.asarray(np.log1p(observed.strengths / quantile), np.float64)


def average_precision(score: Float64, label: Bool) -> float:
    """Σ precision · Δrecall over the distinct thresholds, as in scikit-learn. `label` has a true row."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(label[order])
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    recall = hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * hits[last] / (last + 1)))
