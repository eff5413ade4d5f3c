"""Fits the tail's constants on unlabelled streams: the pooled tails, the age profile, and how different streams are.

    streams ──► DetectorStep.judge, event by event ──► Observed (strengths, ratios) ──► Calibration

Nothing here sees a label. Shapes: T steps, B streams, F features, K signals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from training.data import Float32, Float64
from training.detector import DetectorStep
from training.tail import HOLD, LEAST, LEVEL_STEP, LEVELS, Calibration, Curve, Onsets, Support, Tail

Bool = NDArray[np.bool_]
CLOSEST = 0.02
"""Smallest distance of knots: units of evidence or decades."""
ENOUGH_STREAMS = 8
"""Different streams from which on the history itself says how novelty fades, and how far a stream's onsets go."""
ENOUGH_TO_DIFFER, ENOUGH_ONSETS = 40, 30
"""Different streams, and onsets in all of them, from which on the history itself says how much streams differ in their rate: of eight
streams with five onsets each the most likely shape is off by a factor of six (LOG.md), and most often as if all streams were alike.
"""
PRIOR = {"tau": 1200.0, "shape": 2.0, "weight": 13.0}
PRIOR_START = 2.0
"""Where few streams are drawn to: the synthetic generator's constants; its shape is 7, here less, because real fleets differ more."""
ENOUGH_YOUNG = 30
"""Onsets of beginning streams from which on they say themselves how much more frequent those are."""
YOUNG = 150
"""Age from which on onsets count for the age profile: the first are truncated by the warm-up."""


@dataclass(frozen=True)
class Rules:
    """How strengths become tails. The defaults are for sensors, whose novelty fades and whose tails are smooth."""

    ageing: bool = True
    settled: float = YOUNG  # age from which on onsets count
    alike: bool = False  # streams are too short to be told apart: what is seen of one says nothing of its next events
    draft: Calibration | None = None  # scales, band and floor, where they are not to be learned
    finest: int | None = None  # rank from which on a tail is extrapolated; None = 10, or 1 of 400
    steepest: float = 10.0  # decades per unit of a signal beyond what was seen; more is an edge that few or old streams happen to have
    steepest_sum: float = np.inf


SENSORS = Rules()
ALIKE = 400.0
"""Shape and weight of priors that a stream's own onsets hardly move."""


@dataclass(frozen=True)
class Observed:
    """What the detector saw in the streams, before any tail."""

    strengths: Float32  # [T, B, K]
    ratio: Float32  # [T, B, F] |residual| ÷ spread, NaN = missing
    valid: Bool  # [T, B] the event has a value
    age: Float32  # [T, B] events learned before this one
    ended: Bool | None = None  # [T, B] a session ends with this event, and emissions with it
    margin: float = 0.0  # see `Calibration`
    runs: Float32 | None = None  # [T, B, F] see `Runs.signed`; 0 of a single feature
    upheld: Bool | None = None  # [T, B, K] whether a strength counts in the event's p-value; None = all do


@torch.no_grad()
def observe(step: DetectorStep, x: Float32, t: Float32, on_step: Callable[[], None] = lambda: None) -> Observed:
    """Run x [T, B, F], t [T, B, 3] through everything before the tail."""
    T, B, _ = x.shape
    state = step.fresh_state(B)
    learn = torch.ones(B, dtype=torch.bool)
    strengths, ratios = np.zeros((T, B, len(step.signals.names)), np.float32), np.zeros(x.shape, np.float32)
    upheld = np.ones(strengths.shape, bool)
    valid, ages, runs = np.zeros((T, B), bool), np.zeros((T, B), np.float32), np.zeros(x.shape, np.float32)
    for i in range(T):
        parts = step.split(state, torch.from_numpy(x[i]).t(), learn)
        ages[i] = step.age(parts)[0].numpy()
        judged, after = step.judge(parts, torch.from_numpy(x[i]).t(), torch.from_numpy(t[i]).t(), learn)
        state = step.layout.join(parts, {**parts, **after}, judged.event.learns)
        present = judged.event.present
        strengths[i] = judged.strengths.t().numpy()
        ratio = judged.residual.abs() / judged.spread.clamp(min=1e-18)
        ratios[i] = torch.where(present & judged.event.known, ratio, torch.nan).t().numpy()
        valid[i] = step.judges(judged.event)[0].numpy()
        if judged.upheld is not None:
            upheld[i] = judged.upheld.t().numpy() > 0
        if judged.runs is not None:
            runs[i] = judged.runs.signed()
        on_step()
    return Observed(strengths, ratios, valid, ages, runs=runs, upheld=upheld)


def calibrate(observed: Observed, burn: int, streams: int | None = None, rules: Rules = SENSORS) -> Calibration:
    """All constants, from the lanes in `observed`, which are of `streams` different streams (default: each its own).

    Few streams tell how rare an onset is in them, not how much the next one will differ: what describes a population (age constant,
    the priors of a stream's rate and chain) is then drawn towards the synthetic generator's, in proportion to what is missing.
    """
    streams = observed.valid.shape[1] if streams is None else streams
    K = observed.strengths.shape[2]
    draft = rules.draft or _draft(observed, burn)
    watched = Watched(observed, burn, streams, rules)
    evidence = evidence_of(observed, draft, burn)
    draft = replace(draft, signals=tuple(watched.onsets(evidence[:, :, k], rules.steepest) for k in range(K)))
    heights = heights_of(evidence, observed, draft, burn)
    onsets = watched.onsets(heights, rules.steepest_sum)
    total = (evidence if observed.upheld is None else evidence * observed.upheld).sum(axis=2)
    exposure = watched.exposure(onsets.tau)
    events = _aged_tail(total[(total > 0) & _live(observed, burn)], exposure.sum(), rules, rules.steepest)
    emitted = int((onsets_of(heights, observed) > 0).sum())
    support = Support(streams, int(_live(observed, burn).sum()), emitted, streams >= ENOUGH_STREAMS)
    return replace(draft, onsets=onsets, events=events, start=watched.start(heights, onsets), support=support)


def _draft(observed: Observed, burn: int) -> Calibration:
    """Scales and band, and nothing yet of tails."""
    K = observed.strengths.shape[2]
    quantile, mean = zip(*(_scale(observed.strengths[:, :, k][_live(observed, burn)]) for k in range(K)), strict=True)
    none = Onsets(Curve((0.0, 1.0), (0.0, 1.0), 1.0), tau=0.0, shape=10.0, weight=10.0)
    return Calibration(quantile, mean, (none,) * K, none.tail, none, _band(observed))


@dataclass(frozen=True)
class Watched:
    """When which of so many different streams was watched."""

    observed: Observed
    burn: int
    streams: int
    rules: Rules

    def exposure(self, tau: float) -> Float64:
        """[T, B] in events of an infinitely old stream."""
        return np.where(_live(self.observed, self.burn), 1 + tau / (self.observed.age + 1), 0.0)

    def onsets(self, heights: Float64, steepest: float) -> Onsets:
        """What the onsets of heights [T, B] have in common, and how streams differ in them."""
        heights, settled = onsets_of(heights, self.observed), self.observed.age >= self.rules.settled
        tau = self._drawn("tau", max(_age_profile(heights, self.observed), 1.0), ENOUGH_STREAMS) if self.rules.ageing else 0.0
        exposure = self.exposure(tau)
        tail = _aged_tail(heights[(heights > 0) & settled], exposure[settled].sum(), self.rules, steepest)
        if self.rules.alike:
            return Onsets(tail, tau, ALIKE, ALIKE)
        shape, weight = _heterogeneity(heights, exposure, tail)
        return Onsets(tail, tau, self._drawn("shape", shape, ENOUGH_TO_DIFFER), self._drawn("weight", weight, ENOUGH_STREAMS))

    def start(self, heights: Float64, onsets: Onsets) -> float:
        """See `Calibration`: by maximum likelihood of the onsets while none may be held yet, given how often they come later."""
        if not self.rules.ageing:
            return 0.0
        emitted, age = onsets_of(heights, self.observed) > 0, self.observed.age
        young = _live(self.observed, self.burn) & (age < self.burn + HOLD)
        growth = np.log1p(onsets.tau / (age + 1)) - np.log1p(onsets.tau / (self.burn + HOLD + 1))
        found, usual = growth[emitted & young].sum(), 10**-onsets.first_level * self.exposure(onsets.tau)[young]
        value = _maximise(lambda start: float(start * found - (usual * np.exp(start * growth[young])).sum()), 0.01, 10.0)
        return _between(PRIOR_START, value, self._trust(ENOUGH_STREAMS) * min(1.0, int((emitted & young).sum()) / ENOUGH_YOUNG))

    def _drawn(self, name: str, value: float, enough: int) -> float:
        return _between(PRIOR[name], value, self._trust(enough))

    def _trust(self, enough: int) -> float:
        """In what these streams say of others, 0..1."""
        return min(1.0, self.streams / enough)


def _between(prior: float, value: float, trust: float) -> float:
    return float(prior ** (1 - trust) * value**trust)


def evidence_of(observed: Observed, calibration: Calibration, burn: int) -> Float64:
    """max(log1p(strength ÷ the stream's scale) - LEAST, 0), as `training.tail.Tail` computes it; [T, B, K]."""
    quantile, mean = np.array(calibration.quantile), np.array(calibration.mean)
    strengths = observed.strengths.astype(np.float64)
    live = _live(observed, burn)[:, :, None]
    clipped = np.where(live, np.minimum(strengths, 3 * quantile), 0.0)
    before = np.cumsum(clipped, axis=0) - clipped
    count = np.maximum(observed.age - burn, 0)[:, :, None]
    prior = calibration.prior_events
    scale = quantile / mean * (prior * mean + before) / (prior + count)
    return np.asarray(np.maximum(np.log1p(strengths / scale) - LEAST, 0.0))


def heights_of(evidence: Float64, observed: Observed, calibration: Calibration, burn: int) -> Float64:
    """Weighed Σ over the signals of their decades above the floor [T, B], as `training.tail.Tail` computes them."""
    signals = enumerate(calibration.signals)
    own = [own_decades(evidence[:, :, k], observed, onsets, burn) - calibration.floor for k, onsets in signals]
    above = np.where(evidence > 0, np.maximum(np.stack(own, axis=2), 0.0), 0.0)
    return np.asarray((above * (calibration.weights or 1.0)).sum(axis=2))


def own_decades(heights: Float64, observed: Observed, onsets: Onsets, burn: int) -> Float64:
    """-log10 of the rate of onsets as large as heights [T, B] in each stream, as known before each event."""
    emitted = onsets_of(heights, observed) > 0
    live = _live(observed, burn)
    places = (on_curve(onsets.tail, heights) - onsets.first_level)[:, None] / LEVEL_STEP + 1 - np.arange(LEVELS)[:, None]  # [T, L, B]
    reached = (places >= 1) & emitted[:, None]
    exposure = 10**-onsets.first_level * (1 + onsets.tau / (observed.age + 1))
    tries = np.concatenate([exposure[:, None], reached[:, :-1]], axis=1)
    rho = np.array([1.0] + [10**-LEVEL_STEP] * (LEVELS - 1))[:, None]
    prior = np.array([onsets.shape] + [onsets.weight] * (LEVELS - 1))[:, None]
    counted = live[:, None].astype(np.float64)
    passed, tried = (_faded(count, observed.valid) for count in (reached * counted, tries * counted))
    chain = np.log10((passed + prior * rho) / (tried + prior))
    beyond = np.maximum(places[:, -1] - 1, 0.0) * LEVEL_STEP
    return np.asarray(onsets.first_level + beyond - (np.clip(places, 0, 1) * chain).sum(axis=1))


def _faded(counts: Float64, valid: Bool) -> Float64:
    """What is counted before each event [T, L, B], fading with each valid one as in `Tail`; for at most tens of thousands of events."""
    rate, chain = 1 - 1 / Tail.memory_rate, 1 - 1 / Tail.memory_chain
    age = np.cumsum(valid, axis=0)[:, None].astype(np.float64)
    weight = np.concatenate([rate**age, *[chain**age] * (LEVELS - 1)], axis=1)
    total = np.cumsum(counts / weight, axis=0) * weight
    return np.concatenate([np.zeros_like(total[:1]), total[:-1]])


def on_curve(curve: Curve, value: Float64) -> Float64:
    x, y = np.asarray(curve.x), np.asarray(curve.y)
    return np.asarray(np.where(value > x[-1], y[-1] + curve.slope * (value - x[-1]), np.interp(value, x, y)))


def onsets_of(heights: Float64, observed: Observed) -> Float64:
    """Heights [T, B] where they exceed the last emission of the past HOLD events, else 0."""
    emitted = np.zeros_like(heights)
    last, age = np.zeros(heights.shape[1]), np.zeros(heights.shape[1])
    for i, height in enumerate(heights):
        age += 1
        onset = (height > np.where(age <= HOLD, last, 0.0) + observed.margin) & observed.valid[i]
        emitted[i] = np.where(onset, height, 0.0)
        last, age = np.where(onset, height, last), np.where(onset, 0.0, age)
        if observed.ended is not None:
            last, age = np.where(observed.ended[i], 0.0, last), np.where(observed.ended[i], 0.0, age)
    return emitted


def _live(observed: Observed, burn: int) -> Bool:
    return observed.valid & (observed.age >= burn)


def _scale(strengths: Float32) -> tuple[float, float]:
    """Pooled 99 % quantile and mean of min(strength, 3·quantile)."""
    quantile = max(float(np.quantile(strengths, 0.99)), 1e-3) if len(strengths) else 1.0
    return quantile, max(float(np.minimum(strengths, 3 * quantile).mean()), 1e-6) if len(strengths) else 0.1


def _band(observed: Observed) -> Curve:
    """Tail of |residual| ÷ spread for the typical stream: the median over streams and features of each one's own quantiles.

    Pooled over all rows instead, a few streams that are constant for hours would make everybody's band endless.
    """
    settled = observed.age >= min(200.0, float(observed.age.max()) / 2)
    decades: Float64 = np.array([0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    quantiles, longest = list[Float64](), 1
    for lane in range(observed.ratio.shape[1]):  # one at a time: of a wide fleet all rows are gigabytes
        for column in observed.ratio[settled[:, lane], lane].T:
            kept = column[column < 1e6]  # NaN is not
            if len(kept) >= 100:
                quantiles.append(np.quantile(kept, 1 - 10.0**-decades))
                longest = max(longest, len(kept))
    decades = decades[decades <= np.log10(longest / 2)]
    if len(decades) < 2:
        return Curve((1.0, 3.0), (0.5, 2.0), 0.5)
    ratios = np.maximum.accumulate(np.median([each[: len(decades)] for each in quantiles], axis=0))
    slope = float((decades[-1] - decades[-2]) / max(ratios[-1] - ratios[-2], 1e-3))
    return Curve(tuple(map(float, ratios)), tuple(map(float, decades)), min(slope, 10.0))


def _aged_tail(values: Float64, exposure: float, rules: Rules, steepest: float) -> Curve:
    """Tail of the positive `values` against an exposure in events of an infinitely old stream."""
    if len(values) < 10:
        return _sparse_tail(values, exposure, steepest)
    smallest_rank = max(10, len(values) // 400) if rules.finest is None else rules.finest
    ordered, total = np.sort(values)[::-1].astype(np.float64), float(exposure)
    ranks = np.unique(np.round(np.geomspace(min(smallest_rank, len(ordered) // 3), len(ordered), 24)).astype(int))
    x, y = _spaced(ordered[ranks - 1][::-1], -np.log10(ranks / total)[::-1])
    most = len(ordered) // 50 if rules.finest is None else rules.finest
    top = ordered[: max(10, min(len(ordered) // 2, max(30, most)))]
    slope = min(1 / (max(float((top - top[-1]).mean()), 1e-3) * np.log(10)), steepest)
    decades = np.maximum(y, 0.0)
    if len(x) == 1:
        x, decades = np.array([x[0], x[0] + 1.0]), np.array([decades[0], decades[0] + slope])
    return Curve(tuple(map(float, x)), tuple(map(float, decades)), float(slope))


def _sparse_tail(values: Float64, exposure: float, steepest: float) -> Curve:
    """Of fewer than 10: from the rate of what was, one decade per unit; where it may not be as steep, from the rate to once in all."""
    greatest = float(values.max()) if len(values) else 0.0
    start = float(np.log10(max(exposure, 10.0) / max(len(values), 1)))
    if steepest > 1:
        return Curve((0.0, greatest + 1.0), (start, start + 1.0), 1.0)
    slope = min(steepest, 0.2)
    return Curve((0.0, greatest + 1.0), (start, float(np.log10(max(exposure, 10.0))) + slope), slope)


def _spaced(x: Float64, y: Float64) -> tuple[Float64, Float64]:
    """Without knots closer than CLOSEST to the one before (ties among them): steep pieces magnify float32's rounding."""
    kept = [0]
    for i in range(1, len(x)):
        if x[i] - x[kept[-1]] >= CLOSEST:
            kept.append(i)
    return x[kept], y[kept]


def _age_profile(heights: Float64, observed: Observed) -> float:
    """τ of g(n) = 1 + τ/n by maximum likelihood of the ages at which onsets happened, given when streams were watched."""
    watched = observed.valid & (observed.age >= YOUNG)
    ages = observed.age[(heights > 0) & watched] + 1.0
    if len(ages) < 30:
        return 0.0 if len(ages) == 0 else 300.0
    inverse = 1 / (observed.age[watched] + 1.0)
    return _maximise(lambda tau: float(np.log1p(tau / ages).sum() - len(ages) * np.log((1 + tau * inverse).sum())), 1.0, 2e4)


def _heterogeneity(heights: Float64, exposure: Float64, onsets: Curve) -> tuple[float, float]:
    """How alike streams are: shape of the gamma prior of their rates, weight of the beta prior of their chains (marginal likelihood)."""
    decades = on_curve(onsets, heights)
    levels = onsets.y[0] + LEVEL_STEP * np.arange(LEVELS)
    counted = (heights > 0) & (exposure > 0)
    counts = np.array([(counted & (decades >= level)).sum(axis=0) for level in levels])  # [LEVELS, B]
    expected, number = 10 ** -levels[0] * exposure.sum(axis=0), counted.sum(axis=0)
    rho = 10**-LEVEL_STEP

    def rate(shape: float) -> float:
        odds = number * np.log(np.maximum(expected, 1e-12) / (shape + expected)) + shape * np.log(shape / (shape + expected))
        return float((_gammaln(number + shape) - _gammaln(np.array(shape)) + odds).sum())

    def chain(weight: float) -> float:
        passed, failed = counts[1:], counts[:-1] - counts[1:]
        a, b = weight * rho, weight * (1 - rho)
        return float((_betaln(passed + a, failed + b) - _betaln(np.array(a), np.array(b))).sum())

    if number.sum() < ENOUGH_ONSETS or heights.shape[1] < 4:
        return PRIOR["shape"], PRIOR["weight"]
    return _maximise(rate, 0.2, 400.0), _maximise(chain, 1.0, 400.0)


def _maximise(objective: Callable[[float], float], low: float, high: float) -> float:
    """The argument with the greatest value, on a logarithmic grid refined twice."""
    argument = low
    for _ in range(3):
        grid = [float(value) for value in np.geomspace(low, high, 40)]
        best = int(np.argmax([objective(value) for value in grid]))
        argument, low, high = grid[best], grid[max(0, best - 1)], grid[min(39, best + 1)]
    return argument


def _gammaln(value: Float64) -> Float64:
    return np.asarray(torch.lgamma(torch.from_numpy(np.asarray(value, dtype=np.float64))).numpy())


def _betaln(a: Float64, b: Float64) -> Float64:
    return np.asarray(_gammaln(a) + _gammaln(b) - _gammaln(a + b))
