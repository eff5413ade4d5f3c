"""A seeded generator of unlabelled streams as services and machines make them, and of named anomalies to judge a detector with.

The shipped default detector learns from this alone: no recorded data set is used in its training or calibration.
Recipe of a stream: season × week + trend + walk + level regimes + noise + bursts, then floor, ceiling, quantisation, units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data import Block, Float32, Float64, Stream, clock

Bool = NDArray[np.bool_]

CADENCES = np.array([300.0, 3600.0, 600.0, 60.0, 10.0, 1.0, 0.1])
CADENCE_SHARES = np.array([0.3, 0.15, 0.1, 0.15, 0.1, 0.1, 0.1])
VALIDATION_SEED = 7_001


@dataclass(frozen=True)
class Fake:
    """B streams of T events."""

    x: Float64  # [B, T], NaN = missing
    times: Float64  # [B, T] epoch seconds


def generate(rng: np.random.Generator, B: int, T: int) -> Fake:
    cadence = rng.choice(CADENCES, size=(B, 1), p=CADENCE_SHARES)
    times = 1.7e9 + rng.uniform(0, 7 * 86400, (B, 1)) + np.cumsum(cadence * _gaps(rng, B, T), axis=1)
    index = np.arange(T)[None]
    season = _season(rng, times, cadence, index)
    x = season + _slow(rng, B, T)
    x += _noise(rng, B, T, season)
    x += _chance(rng, B, 0.3) * _bursts(rng, B, T)
    x = _bounded(rng, x)
    scale, offset = np.exp(rng.normal(size=(B, 1)) * 2), rng.normal(size=(B, 1)) * 5
    x = x * scale + np.where(_chance(rng, B, 0.25), 0.0, offset)
    missing = (rng.random((B, T)) < 0.03) & _chance(rng, B, 0.1)
    missing[:, 0] = False
    return Fake(np.where(missing, np.nan, x), times)


def streams(rng: np.random.Generator, B: int, T: int) -> list[Stream]:
    fake = generate(rng, B, T)
    return [Stream(f"synthetic-{i}", fake.x[i, :, None].astype(np.float32), clock(fake.times[i])) for i in range(B)]


class Synthetic:
    """A `Source` that never ends."""

    def __init__(self, seed: int, validation_lanes: int = 32, validation_length: int = 768) -> None:
        self.seed, self.validation_lanes, self.validation_length = seed, validation_lanes, validation_length

    def block(self, rng: np.random.Generator, lanes: int, length: int) -> Block:
        return Block(*_time_major(generate(rng, lanes, length)))

    def validation(self) -> Block:
        rng = np.random.default_rng([self.seed, VALIDATION_SEED])
        return Block(*_time_major(generate(rng, self.validation_lanes, self.validation_length)), counts_from=64)


def _time_major(fake: Fake) -> tuple[Float32, Float32]:
    x = np.ascontiguousarray(fake.x.T[:, :, None], np.float32)
    t = np.stack([clock(times) for times in fake.times], axis=1)
    return x, t


# ── what a stream is made of; x in units of its own, about one ───────────────────────────────────────────────────────


def _chance(rng: np.random.Generator, B: int, share: float) -> Bool:
    return rng.random((B, 1)) < share


def _log_uniform(rng: np.random.Generator, low: float, high: float, B: int) -> Float64:
    return np.exp(rng.uniform(np.log(low), np.log(high), (B, 1)))


def _gaps(rng: np.random.Generator, B: int, T: int) -> Float64:
    """Steps between events in units of the cadence: exact, jittered, or with outages."""
    steps = np.where(_chance(rng, B, 0.3), np.clip(1 + 0.1 * rng.normal(size=(B, T)), 0.2, None), 1.0)
    outage = (rng.random((B, T)) < 0.003) & _chance(rng, B, 0.2)
    return np.where(outage, steps * rng.uniform(2, 40, (B, T)), steps)


def _season(rng: np.random.Generator, times: Float64, cadence: Float64, index: NDArray[np.intp]) -> Float64:
    B = len(times)
    daily = _chance(rng, B, 0.6) & (cadence >= 60)
    period = _log_uniform(rng, 6, 400, B)
    phase = np.where(daily, times / 86400, index / period + rng.random((B, 1))) % 1
    wave = np.zeros_like(times)
    for k in range(1, 5):
        wave += rng.normal(size=(B, 1)) / k * np.sin(2 * np.pi * (k * phase + rng.random((B, 1))))
    square = ((phase - rng.random((B, 1))) % 1 < rng.uniform(0.05, 0.6, (B, 1))) * 1.0
    kind = rng.random((B, 1))
    shape = np.where(kind < 0.35, square * rng.uniform(1, 3, (B, 1)), np.where(kind < 0.5, square * (1 + 0.5 * wave), wave))
    weekend = ((times / 86400 + 3) % 7 > 5) * rng.uniform(0, 0.8, (B, 1)) * _chance(rng, B, 0.5)
    used = _chance(rng, B, 0.7)
    return np.asarray(shape * (1 - weekend) * used)


def _slow(rng: np.random.Generator, B: int, T: int) -> Float64:
    trend = _chance(rng, B, 0.2) * rng.normal(size=(B, 1)) * np.arange(T)[None] / T * 2
    walk = np.cumsum(rng.normal(size=(B, T)), axis=1) * _log_uniform(rng, 0.005, 0.2, B) * _chance(rng, B, 0.25)
    jumps = (rng.random((B, T)) < 0.002) * rng.normal(size=(B, T)) * 1.5
    return np.asarray(trend + walk + np.cumsum(jumps, axis=1) * _chance(rng, B, 0.25))


def _noise(rng: np.random.Generator, B: int, T: int, season: Float64) -> Float64:
    kind = rng.random((B, 1))
    noise = rng.normal(size=(B, T))
    noise = np.where(kind < 0.25, rng.laplace(size=(B, T)), noise)
    noise = np.where((kind >= 0.25) & (kind < 0.4), rng.standard_t(3, size=(B, T)), noise)
    noise = np.where((kind >= 0.4) & (kind < 0.6), np.exp(rng.normal(size=(B, T))) - 1.6, noise)
    memory = np.where(_chance(rng, B, 0.5), 0.0, rng.uniform(0, 0.97, (B, 1)))[:, 0]
    for i in range(1, T):
        noise[:, i] = memory * noise[:, i - 1] + np.sqrt(1 - memory**2) * noise[:, i]
    follows_season = np.where(_chance(rng, B, 0.3), np.maximum(0.1, 0.3 + 0.7 * np.abs(season)), 1)
    return np.asarray(noise * _log_uniform(rng, 0.01, 1.5, B) * follows_season)


def _bursts(rng: np.random.Generator, B: int, T: int) -> Float64:
    """Spikes that are normal for their stream."""
    return np.asarray((rng.random((B, T)) < rng.uniform(0.002, 0.05, (B, 1))) * rng.exponential(size=(B, T)) * rng.uniform(1, 6, (B, 1)))


def _bounded(rng: np.random.Generator, x: Float64) -> Float64:
    B = len(x)
    x = np.where(_chance(rng, B, 0.3), np.maximum(x, 0), x)
    x = np.where(_chance(rng, B, 0.1), np.minimum(x, rng.uniform(0.5, 3, (B, 1))), x)
    grain = np.where(_chance(rng, B, 0.3), rng.uniform(0.05, 1, (B, 1)), 1e-6)
    return np.asarray(np.round(x / grain) * grain)


# ── named anomalies, to judge with; x [T] of one stream, changed from `at` on ────────────────────────────────────────

Anomaly = Callable[[np.random.Generator, Float64, int], Float64]


def _spread(x: Float64, at: int) -> float:
    past = x[:at][np.isfinite(x[:at])]
    return float(max(past.max() - past.min(), 1e-6)) if len(past) else 1.0


def spike(rng: np.random.Generator, x: Float64, at: int) -> Float64:
    """One to three events at twice the range above everything seen."""
    y = x.copy()
    y[at : at + rng.integers(1, 4)] += 2 * _spread(x, at) * rng.choice([-1, 1])
    return y


def level_shift(rng: np.random.Generator, x: Float64, at: int) -> Float64:
    """The level moves by 1.5 times the range and stays."""
    y = x.copy()
    y[at:] += 1.5 * _spread(x, at) * rng.choice([-1, 1])
    return y


def surge(rng: np.random.Generator, x: Float64, at: int) -> Float64:
    """A load: 100 events at four times the range, as when a processor is kept busy."""
    y = x.copy()
    y[at : at + 100] += 4 * _spread(x, at) * rng.uniform(0.9, 1.1, len(y[at : at + 100]))
    return y


def noise_burst(rng: np.random.Generator, x: Float64, at: int) -> Float64:
    """60 events of noise as wide as the range."""
    y = x.copy()
    y[at : at + 60] += _spread(x, at) * rng.normal(size=len(y[at : at + 60]))
    return y


def ramp(rng: np.random.Generator, x: Float64, at: int) -> Float64:
    """A drift by twice the range within 100 events."""
    y = x.copy()
    rest = len(y) - at
    y[at:] += 2 * _spread(x, at) * np.minimum(np.arange(rest) / 100, 1) * rng.choice([-1, 1])
    return y


def frozen(_: np.random.Generator, x: Float64, at: int) -> Float64:
    """The sensor repeats its last value for 200 events."""
    y = x.copy()
    y[at : at + 200] = y[at - 1]
    return y


ANOMALIES: dict[str, Anomaly] = {
    "spike": spike,
    "surge": surge,
    "level_shift": level_shift,
    "noise_burst": noise_burst,
    "ramp": ramp,
    "frozen": frozen,
}
