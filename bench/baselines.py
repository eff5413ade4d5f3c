"""What a detector has to beat: trivial, linear and tree detectors, causal and in one pass like ours, learned on the same unlabelled rows.

    x ─► normaliser (running mean and deviation of each stream, floor pooled over the set) ─► z ─► a score for each row

A row's score knows the rows before it and what was fitted on the `fit` rows. The threshold is fixed before the scored part: each
stream's own 99.9 % quantile over its `fit` rows. Shapes: T rows, B streams side by side (NaN after a stream's end), F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bench.metrics import Bool, Float64, alarms
from bench.sets import Case, DataSet
from training.data import Float32

SETTLED = 100
"""Rows of a stream that no threshold is taken from, as in our own warm-up."""
QUANTILE = 0.999


@dataclass(frozen=True)
class Answer:
    """A detector's answers on one case's n scored rows."""

    score: Float64  # [n]
    flagged: Bool  # [n] anomalous at a threshold that knows no label
    alarm: Bool  # [n] where an alarm begins
    contribution: Float32 | None = None  # [n, F] shares of the features


Baseline = Callable[[DataSet, int], list[Answer]]
"""Takes the set and the seed."""


@dataclass(frozen=True)
class Lanes:
    """The streams of a set side by side, the recordings that are only learned from behind them."""

    x: Float64  # [T, B, F]
    fit: list[int]  # [B] leading rows that may be learned from
    alike: bool  # a feature is the same quantity in all streams

    @classmethod
    def of(cls, data: DataSet) -> Lanes:
        parts = [case.x for case in data.cases] + data.history
        x = np.full((max(map(len, parts)), len(parts), data.features), np.nan)
        for i, part in enumerate(parts):
            x[: len(part), i] = part
        return cls(x, [case.fit for case in data.cases] + [len(part) for part in data.history], data.alike)

    def learned(self, values: Float64) -> Float64:
        """Settled `fit` rows of values [T, B, ...] behind one another, of each stream about as many."""
        pieces = [values[min(60, n // 4) : n : max(1, n // 3000), i] for i, n in enumerate(self.fit)]
        return np.concatenate(pieces)

    def floor(self) -> Float64:
        """Below this no feature's deviation falls [B, F]: a tenth of the pooled one, and more than nothing where it is constant.

        Where streams are not alike there is nothing to pool.
        """
        parts = [self.x[:n, i] for i, n in enumerate(self.fit)]
        deviation = np.stack([part.std(axis=0) for part in parts])
        size = np.stack([np.abs(part).mean(axis=0) for part in parts])
        if not self.alike:
            return 1e-3 * deviation + 1e-6 * size + 1e-9
        floor: Float64 = 0.1 * np.sqrt((deviation**2).mean(axis=0)) + 1e-3 * deviation.max() + 1e-6 * size.max(axis=0) + 1e-9
        return np.repeat(floor[None], len(self.fit), axis=0)


def normalise(x: Float64, floor: Float64, memory: float, clip: float) -> Float64:
    """Distance from the running mean in deviations, as asinh, by what was known before the row; 0 where x is missing [T, B, F]."""
    z = np.zeros_like(x)
    mean, variance = np.nan_to_num(x[0]), np.zeros_like(x[0])
    for i, row in enumerate(x):
        scale = np.sqrt(variance + floor**2)
        away = np.where(np.isfinite(row), row - mean, 0.0)
        z[i] = np.arcsinh(np.clip(away / scale, -clip, clip))
        rate = max(1 / (i + 1), 1 / memory)
        if i > 30:
            away = np.clip(away, -6 * scale, 6 * scale)
        mean = mean + rate * away
        variance = (1 - rate) * (variance + rate * away**2)
    return z


def smooth(values: Float64, rate: float) -> Float64:
    """Exponentially weighted mean over the first axis, a plain mean while it is young."""
    means, mean = np.zeros_like(values), np.zeros_like(values[0])
    for i, row in enumerate(values):
        mean = mean + max(rate, 1 / (i + 1)) * (row - mean)
        means[i] = mean
    return means


# ── trivial ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_random(data: DataSet, seed: int) -> list[Answer]:
    rng = np.random.default_rng(seed)
    draws = [rng.random(len(case.label)) for case in data.cases]
    return [Answer(score, score > QUANTILE, alarms(score > QUANTILE)) for score in draws]


def always(data: DataSet, seed: int) -> list[Answer]:
    ones = [np.ones(len(case.label)) for case in data.cases]
    return [Answer(score, score > 0, alarms(score > 0)) for score in ones]


def mean_z(data: DataSet, seed: int) -> list[Answer]:
    """Mean |z| over the features."""
    size = np.abs(_short_z(Lanes.of(data)))
    return _answers(data, size.mean(axis=2), size)


def level(data: DataSet, seed: int) -> list[Answer]:
    """Root mean square over the features of the slow level of z."""
    slow = smooth(_short_z(Lanes.of(data)), 1 / 30)
    return _answers(data, np.sqrt((slow**2).mean(axis=2)), np.abs(slow))


def _short_z(lanes: Lanes) -> Float64:
    return normalise(lanes.x, lanes.floor(), 2000, 1e4)


# ── linear ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def linear(data: DataSet, seed: int) -> list[Answer]:
    """VAR (ridge on z and two levels of it, one step ahead) and PCA (90 % of the variance), fitted on the pooled `fit` rows.

    Each residual is judged by its mean size, its slow level and its streaming Mahalanobis distance; the evidence is summed. One
    feature has no PCA.
    """
    lanes = Lanes.of(data)
    z = normalise(lanes.x, lanes.floor(), 1e4, 50)
    forecast = _forecast_residual(z, lanes)
    residuals = [forecast] if data.features == 1 else [forecast, _principal_residual(z, lanes)]
    signals = chain.from_iterable(_signals(residual, lanes) for residual in residuals)
    score = np.sum([_evidence(signal, lanes) for signal in signals], axis=0)
    return _answers(data, score, np.abs(forecast))


def _forecast_residual(z: Float64, lanes: Lanes) -> Float64:
    past = np.concatenate([z, smooth(z, 1 / 10), smooth(z, 1 / 30), np.ones((*z.shape[:2], 1))], axis=2)
    gram, moment = np.zeros((past.shape[2], past.shape[2])), np.zeros((past.shape[2], z.shape[2]))
    for i, n in enumerate(lanes.fit):
        first = min(60, n // 4)
        before, after = past[first : n - 1, i], z[first + 1 : n, i]
        gram += before.T @ before / len(before)
        moment += before.T @ after / len(before)
    weights = np.linalg.solve(gram + 1e-2 * np.trace(gram) / len(gram) * np.eye(len(gram)), moment)
    residual = z.copy()
    residual[1:] -= past[:-1] @ weights
    return residual


def _principal_residual(z: Float64, lanes: Lanes) -> Float64:
    history = lanes.learned(z)
    mean = history.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov((history - mean).T))
    kept = max(1, int(np.searchsorted(np.cumsum(variances[::-1]) / variances.sum(), 0.9) + 1))
    main = axes[:, ::-1][:, :kept]
    residual: Float64 = (z - mean) - ((z - mean) @ main) @ main.T
    return residual


def _signals(residual: Float64, lanes: Lanes) -> Iterator[Float64]:
    """Mean size, slow level, smoothed Mahalanobis distance [T, B]."""
    yield np.abs(residual).mean(axis=2)
    yield np.sqrt((smooth(residual, 1 / 30) ** 2).mean(axis=2))
    yield smooth(np.sqrt(_mahalanobis(residual, lanes)), 1 / 5)


def _mahalanobis(residual: Float64, lanes: Lanes) -> Float64:
    """Squared length [T, B] under each stream's own running precision (Sherman-Morrison), which starts at the pooled one."""
    F = residual.shape[2]
    history = np.clip(lanes.learned(residual), -6, 6)
    covariance = np.cov(history.T).reshape(F, F)
    covariance += 0.05 * np.trace(covariance) / F * np.eye(F)
    precision = np.repeat(np.linalg.inv(covariance)[None], residual.shape[1], axis=0)
    mean = np.repeat(history.mean(axis=0)[None], residual.shape[1], axis=0)
    squared, weight = np.zeros(residual.shape[:2]), 500.0
    for i, row in enumerate(residual):
        away = row - mean
        pulled = (precision @ away[:, :, None])[:, :, 0]
        squared[i] = (away * pulled).sum(axis=1)
        if i < 30:
            continue
        weight = min(weight + 1, 5000.0)
        rate = 1 / weight
        shrink = np.minimum(1.0, 10 * np.sqrt(F / np.maximum(squared[i], 1e-9)))[:, None]  # far rows teach little
        mean += rate * shrink * away
        pulled *= shrink
        gain = rate / (1 + rate * squared[i] * shrink[:, 0] ** 2)
        precision -= gain[:, None, None] * pulled[:, :, None] * pulled[:, None, :]
        precision /= 1 - rate
    return np.maximum(squared, 0.0)


def _evidence(signal: Float64, lanes: Lanes, prior: float = 1000) -> Float64:
    """log(1 + signal ÷ its usual height): the pooled 99 % quantile, corrected by the stream's own mean so far [T, B]."""
    history = np.concatenate([signal[min(60, n // 4) : n, i] for i, n in enumerate(lanes.fit)])
    high = max(float(np.quantile(history, 0.99)), 1e-6)
    usual = max(float(np.minimum(history, 3 * high).mean()), 1e-6)
    counted = np.minimum(signal, 3 * high)
    counted[:60] = 0.0
    before = np.cumsum(counted, axis=0) - counted
    events = np.maximum(np.arange(len(signal)) - 60, 0)[:, None]
    own = (prior * usual + before) / (prior + events) / usual
    evidence: Float64 = np.log1p(signal / np.maximum(high * own, 1e-9))
    return evidence


# ── trees ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def trees(data: DataSet, seed: int) -> list[Answer]:
    """River's HalfSpaceTrees behind its MinMaxScaler, one for each stream. Raises ImportError without river."""
    scores = [_tree_scores(case, seed) for case in data.cases]
    return [_answer(case, score, None) for case, score in zip(data.cases, scores, strict=True)]


def _tree_scores(case: Case, seed: int) -> Float64:
    from river import anomaly, preprocessing  # noqa: PLC0415  optional: extra `bench`

    model = preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(seed=seed)
    scores = np.zeros(len(case.x))
    for i, row in enumerate(case.x.astype(np.float64).tolist()):
        event = dict(enumerate(row))
        scores[i] = model.score_one(event)
        model.learn_one(event)
    return scores


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _answers(data: DataSet, score: Float64, sizes: Float64) -> list[Answer]:
    """From scores [T, B] and the features' shares in them [T, B, F]."""
    named = any(case.named for case in data.cases)
    return [
        _answer(case, score[: len(case.x), i], sizes[: len(case.x), i].astype(np.float32) if named else None)
        for i, case in enumerate(data.cases)
    ]


def _answer(case: Case, score: NDArray[np.float64], contribution: Float32 | None) -> Answer:
    flagged = (score > threshold(score[: case.fit]))[case.scored :]
    return Answer(score[case.scored :], flagged, alarms(flagged), None if contribution is None else contribution[case.scored :])


def threshold(history: Sequence[float] | Float64) -> float:
    """The 99.9 % quantile of the scores of rows that may be learned from."""
    return float(np.quantile(history[min(SETTLED, len(history) // 4) :], QUANTILE))


BASELINES: dict[str, Baseline] = {
    "VAR + PCA": linear,
    "EW level": level,
    "|z|": mean_z,
    "HalfSpaceTrees": trees,
    "random": at_random,
    "always 1": always,
}
SEEDED = ("HalfSpaceTrees", "random")
