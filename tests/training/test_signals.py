"""Normaliser and signals: what they remember, forget and leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.training.conftest import random_step
from training.detector import DetectorStep
from training.signals import MemorySignals

Float64 = NDArray[np.float64]


def steps(step: DetectorStep, x: NDArray[Any], learn: float = 1.0) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:
    """Run x [T, B, F]; the outputs without the state, and the last state."""
    state, outputs = step.fresh_state(x.shape[1]), []
    t = torch.tensor([[60.0, 3600.0, 2.0]]).expand(x.shape[1], 3)
    with torch.no_grad():
        for row in x.astype(np.float32):
            state, *rest = step(state, torch.from_numpy(row), t, torch.full((x.shape[1],), learn), torch.full((x.shape[1],), 1e-3))
            outputs.append(tuple(rest))
    return outputs, state


def reference_memory(values: Float64, burn: int, slots: int, widest: float, forget: float) -> Float64:
    """Interval memory of one signal, with loops: novelty of each value before it is learned."""
    low, high, visits, last = np.zeros(slots), np.zeros(slots), np.zeros(slots), np.zeros(slots)
    low[0] = high[0] = minimum = maximum = values[0]
    visits[0] = 1  # an interval without visits is a free slot
    novelty = np.zeros(len(values))
    for i, value in enumerate(values[1:], 1):
        for k in range(slots):
            if visits[k] > 0 and i - last[k] > forget * visits[k]:
                visits[k] = 0
        used = np.flatnonzero(visits > 0)
        minimum, maximum = max(minimum, low[used].min()), min(maximum, high[used].max())
        width = max(maximum - minimum, 1e-18)
        gaps = np.maximum(np.maximum(value - high[used], low[used] - value), 0)
        nearest = used[gaps.argmin()]
        if i >= burn:
            novelty[i] = min(gaps.min() / width, 1e3)
        maximum = max(maximum, value if i < burn else min(value, maximum + width))
        minimum = min(minimum, value if i < burn else max(value, minimum - width))
        span = max(high[nearest], value) - min(low[nearest], value)
        free = np.flatnonzero(visits == 0)
        if gaps.min() == 0 or span <= widest * max(maximum - minimum, 1e-18) or len(free) == 0:
            k = nearest
            low[k], high[k], visits[k] = min(low[k], value), max(high[k], value), visits[k] + 1
        else:
            k = free[0]
            low[k] = high[k] = value
            visits[k] = 1
        last[k] = i
    return novelty


def test_the_interval_memory_equals_its_description_in_loops() -> None:
    rng = np.random.default_rng(3)
    T = 900
    level = np.cumsum(rng.random((T, 3)) < 0.01, axis=0) * 2.0
    values = np.round(rng.normal(size=(T, 3)) + level + 30 * (rng.random((T, 3)) < 0.01), 2)
    values -= values[0]
    memory = MemorySignals(intervals=6, burn=50, forget=40.0)
    state, got = torch.zeros(memory.slots[1].size, 1), np.zeros((T, 3))
    for i, value in enumerate(values.astype(np.float32)):
        novelty, state = memory.visit(torch.from_numpy(value)[:, None], state, torch.tensor([[i >= 50]]))
        got[i] = novelty[:, 0].numpy()
    want = np.stack([reference_memory(values[:, k], 50, 6, 0.3, 40.0) for k in range(3)], axis=1)
    assert (want > 0).sum() > 30
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("features", [1, 3])
def test_a_state_stays_finite_for_any_finite_reading(features: int) -> None:
    rng = np.random.default_rng(0)
    extremes = np.array([3.4e38, -3.4e38, 1e-38, 0.0, 1e18, -1e-20, 1.0, np.nan])
    x = rng.choice(extremes, size=(300, 16, features))
    x[150:] = np.where(rng.random((150, 16, features)) < 0.5, 1e6 + rng.normal(size=(150, 16, features)), x[150:])
    outputs, state = steps(random_step(features), x)
    assert torch.isfinite(state).all()
    for p_value, onset_p, *_ in outputs[100:]:
        for p in (p_value, onset_p):
            given = p[~torch.isnan(p)]
            assert ((given >= 1e-30) & (given <= 1)).all()


@pytest.mark.parametrize("features", [1, 3])
def test_the_outputs_keep_the_step_functions_promises(features: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(140, 4, features)) * np.array([1e-3, 1.0, 1e3, 1e6])[:, None]
    x[120, 1] = np.nan
    x[121, 2, 0] = np.nan
    outputs, _ = steps(random_step(features), x)
    for i, (p_value, onset_p, expected, lower, upper, contribution) in enumerate(outputs):
        silent = torch.isnan(p_value)
        assert torch.equal(silent, torch.isnan(onset_p))
        nothing = torch.from_numpy(np.isnan(x[i]).all(axis=1))
        assert silent.all() if i < 100 else torch.equal(silent, nothing)
        assert torch.isnan(expected).all() if i == 0 else torch.isfinite(torch.stack([expected, lower, upper])).all()
        if i > 0:
            assert ((lower <= expected) & (expected <= upper)).all()
        assert (contribution >= 0).all()
        missing = np.isnan(x[i])
        assert (contribution[torch.from_numpy(missing)] == 0).all()
        total = contribution.sum(dim=1).numpy()
        np.testing.assert_allclose(total, (~missing).any(axis=1), atol=1e-5)


def test_a_missing_reading_changes_nothing_that_is_learned_of_its_feature() -> None:
    step = random_step(3)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 2, 3))
    _, before = steps(step, x)
    x = np.concatenate([x, x[:1]])
    x[60, :, 1] = np.nan
    _, after = steps(step, x)
    old, new = step.layout.split(before), step.layout.split(after)
    for name in ("reference", "seen", "mean", "variance", "spread", "residual_scale"):
        assert torch.equal(old[name][:, 1], new[name][:, 1])
        assert not torch.equal(old[name][:, 0], new[name][:, 0]) or name == "reference"


@pytest.mark.parametrize("features", [1, 3])
def test_frozen_learning_keeps_a_fault_from_becoming_normal(features: int) -> None:
    step = random_step(features)
    x = np.random.default_rng(4).normal(size=(150, 2, features))
    _, normal = steps(step, x)
    state, t = normal, torch.tensor([[60.0, 3600.0, 2.0]]).expand(2, 3)
    with torch.no_grad():
        for _ in range(50):
            state, *_ = step(state, torch.full((2, features), 40.0), t, torch.zeros(2), torch.full((2,), 1e-3))
    before, after = step.layout.split(normal), step.layout.split(state)
    running = {"events", "level", "residual_level", "distance", "previous_z", "forecast", "cadence", "onset_height", "onset_age"}
    learned = [name for name in before if name not in running and not name.startswith(("encoder", "decoder"))]
    assert len(learned) > 8
    for name in learned:
        assert torch.equal(before[name], after[name]), name


def test_readings_far_from_zero_keep_their_digits() -> None:
    """At 2**27 float32 resolves 16: relative to the first value the same noise is still the same noise."""
    noise = np.round(np.random.default_rng(6).normal(size=(200, 1, 1)) * 16) * 16
    step = random_step(1)
    _, near = steps(step, noise)
    _, far = steps(step, noise + 2.0**27)
    old, new = step.layout.split(near), step.layout.split(far)
    for name in ("mean", "variance", "level"):
        assert torch.equal(old[name], new[name])
    assert torch.equal(old["memory"].reshape(-1, 3)[:, :2], new["memory"].reshape(-1, 3)[:, :2])
