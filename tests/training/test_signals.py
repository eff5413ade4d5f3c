"""Normaliser and signals: what they remember, forget and leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.training.conftest import TINY, random_step
from training.detector import DetectorStep
from training.normaliser import OUTSET, Normalised, Normaliser
from training.signals import WIDEST, MemorySignals, Residual, ResidualSignals
from training.stillness import SPAN

Float64 = NDArray[np.float64]


def steps(step: DetectorStep, x: NDArray[Any]) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:
    """Run x [T, B, F]; the outputs without the state, and the last state."""
    state, outputs = step.fresh_state(x.shape[1]), []
    t = torch.tensor([[60.0, 3600.0, 2.0]]).expand(x.shape[1], 3)
    with torch.no_grad():
        for row in x.astype(np.float32):
            state, *rest = step(state, torch.from_numpy(row), t, torch.ones(x.shape[1]), torch.full((x.shape[1],), 1e-3))
            outputs.append(tuple(rest))
    return outputs, state


def reference_memory(values: Float64, burn: int, slots: int, widest: float, forget: float) -> Float64:
    """Interval memory of one signal, with loops: novelty of each value before it is learned."""
    low, high, life = np.zeros(slots), np.zeros(slots), np.zeros(slots)
    low[0] = high[0] = minimum = maximum = values[0]
    life[0] = forget  # an interval without life is a free slot
    novelty = np.zeros(len(values))
    for i, value in enumerate(values[1:], 1):
        used = np.flatnonzero(life > 0)
        minimum, maximum = max(minimum, low[used].min()), min(maximum, high[used].max())
        width = max(maximum - minimum, 1e-18)
        gaps = np.maximum(np.maximum(value - high[used], low[used] - value), 0)
        nearest = used[gaps == gaps.min()]  # of several all
        if i >= burn:
            novelty[i] = min(gaps.min() / width, 1e3)
        maximum = max(maximum, value if i < burn else min(value, maximum + width))
        minimum = min(minimum, value if i < burn else max(value, minimum - width))
        span = (np.maximum(high[nearest], value) - np.minimum(low[nearest], value)).max()
        free = np.flatnonzero(life <= 0)
        life -= 1
        most = widest * max(maximum - minimum, 1e-18)
        if gaps.min() == 0 or span <= most or (len(free) == 0 and gaps.min() <= most):
            k = nearest
            low[k], high[k], life[k] = np.minimum(low[k], value), np.maximum(high[k], value), life[k] + 1 + forget
        else:
            k = free[:1] if len(free) else np.flatnonzero(life == life.min())
            low[k] = high[k] = value
            life[k] = forget
    return novelty


def test_the_interval_memory_equals_its_description_in_loops() -> None:
    rng = np.random.default_rng(3)
    T, K = 900, len(MemorySignals.names)
    level = np.cumsum(rng.random((T, K)) < 0.01, axis=0) * 2.0
    values = np.round(64 * (rng.normal(size=(T, K)) + level + 30 * (rng.random((T, K)) < 0.01))) / 64  # exact in float32
    values -= values[0]
    memory = MemorySignals(intervals=6, burn=50, forget=40.0)
    parts = {slot.name: torch.zeros(slot.size, 1) for slot in memory.slots}
    always, got = torch.tensor([[True]]), np.zeros((T, K))
    for i, value in enumerate(values.astype(np.float32)):
        novelty, parts = memory.visit(torch.from_numpy(value)[:, None], parts, torch.tensor([[i >= 50]]), always)
        got[i] = novelty[:, 0].numpy()
    want = np.stack([reference_memory(values[:, k], 50, 6, 0.3, 40.0) for k in range(K)], axis=1)
    assert (want > 0).sum() > 30
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


def test_a_reading_far_off_that_was_learned_does_not_hide_lesser_ones() -> None:
    """Where all intervals are taken the nearest one was extended to it: what lay between was known for good."""
    rng, B, K = np.random.default_rng(8), 64, len(MemorySignals.names)
    memory, always = MemorySignals(), torch.tensor([[True]])
    parts = {slot.name: torch.zeros(slot.size, B) for slot in memory.slots}

    def seen(values: NDArray[Any], at: int) -> NDArray[Any]:
        nonlocal parts
        novelty, parts = memory.visit(torch.from_numpy(values.astype(np.float32)), parts, torch.tensor([[at >= 100]]), always)
        return novelty.numpy()

    for i in range(1500):
        seen(rng.normal(size=(K, B)), i)
    full = (parts["debt"].reshape(memory.intervals, K, B) < 0).all(0).numpy()
    assert full.mean() > 0.5
    assert (seen(np.full((K, B), 50.0), 1500) > 1).all()
    for i in range(1501, 1502 + int(memory.forget)):
        seen(rng.normal(size=(K, B)), i)
    assert (seen(np.full((K, B), 12.0), 2502) > 0.5).all()


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
        none = torch.isnan(expected)  # of the first reading, and of one with which a feature begins again
        assert none.all() if i == 0 else not none.any() or i < OUTSET
        assert torch.equal(none, torch.isnan(lower))
        assert torch.equal(none, torch.isnan(upper))
        assert (none | ((lower <= expected) & (expected <= upper))).all()
        assert torch.isfinite(torch.stack([expected, lower, upper])[:, ~none]).all()
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
        assert torch.equal(old[name][1], new[name][1])
        assert not torch.equal(old[name][0], new[name][0]) or name == "reference"


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
    running = {"events", "level", "motion", "previous", "residual_level", "distance", "previous_z", "forecast", "cadence"}
    running |= {"onset_height", "onset_hold", "still", "steady_level", "steady_motion"}
    learned = [name for name in before if name not in running and not name.startswith(("encoder", "decoder"))]
    assert len(learned) > 8
    for name in learned:
        assert torch.equal(before[name], after[name]), name
    if features > 1:  # how long each stands still goes on, what is usual does not
        assert torch.equal(before["still"] // SPAN, after["still"] // SPAN)
        assert (after["still"] % SPAN == 49).all()


def test_what_a_normaliser_has_learned_fades_with_its_memory() -> None:
    parts = {"reference": torch.zeros(1, 1), "seen": torch.full((1, 1), 1e6), "mean": torch.zeros(1, 1), "variance": torch.ones(1, 1)}
    _, after = Normaliser(1, 1e4, memory=2000.0)(torch.ones(1, 1), torch.tensor([True]), parts)
    assert after["mean"].item() == pytest.approx(1 / 2000)


def test_readings_far_from_zero_keep_their_digits() -> None:
    """At 2**27 float32 resolves 16: relative to the first value the same noise is still the same noise."""
    noise = np.round(np.random.default_rng(6).normal(size=(200, 1, 1)) * 16) * 16
    step = random_step(1)
    _, near = steps(step, noise)
    _, far = steps(step, noise + 2.0**27)
    old, new = step.layout.split(near), step.layout.split(far)
    for name in ("mean", "variance", "level"):
        assert torch.equal(old[name], new[name])
    for name in ("ends", "debt", "range"):  # of the signals value and level
        assert torch.equal(old[name].reshape(-1, 4)[:, :2], new[name].reshape(-1, 4)[:, :2])


@pytest.mark.parametrize("outset", [[65535.0], [-9999.0] * 6, [3.4e38, 3.4e38], [2.0**31 - 1] * (OUTSET - 2)])
def test_a_stream_that_begins_with_no_readings_of_its_own_is_as_one_without_them(outset: list[float]) -> None:
    """With the second reading that is one: the first of all is as far from the others as these are."""
    step = random_step(1)
    x = 50 + np.random.default_rng(11).normal(size=(150, 1, 1))
    _, whole = steps(step, np.concatenate([np.full((1, 1, 1), outset[i]) for i in range(len(outset))] + [x[:1], x]))
    _, without = steps(step, x)
    got, want = step.layout.split(whole), step.layout.split(without)
    assert got["events"] == 150 + len(outset) + 1
    for name in ("seen", "mean", "variance", "reference", "previous", "steady_level", "usual_motion"):
        assert torch.equal(got[name], want[name]), name
    for name in ("ends", "debt", "range"):  # of the signals value and level; the network hears of the clock since the first event
        assert torch.equal(got[name].reshape(-1, 4)[:, :2], want[name].reshape(-1, 4)[:, :2]), name


def test_of_several_features_only_the_one_that_began_with_no_readings_begins_again() -> None:
    step = random_step(3)
    x = 50 + np.random.default_rng(12).normal(size=(150, 4, 3))
    x[:4, :, 1] = -9999.0
    x[5, :, 1] = x[4, :, 1] + 0.01
    _, state = steps(step, x)
    parts = step.layout.split(state)
    assert (parts["seen"][::2] == 150).all()
    assert ((parts["seen"][1] <= 145) & (parts["seen"][1] >= 150 - OUTSET)).all()
    np.testing.assert_allclose(parts["mean"] + parts["reference"], x.mean(axis=0, where=np.arange(150)[:, None, None] > 4).T, atol=0.1)
    assert (parts["variance"] < 2).all()


@pytest.mark.parametrize("pattern", [[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1e6, 1e6], [5.0] * 15 + [7.0] * 5])
@pytest.mark.parametrize("features", [1, 2])
def test_a_stream_begins_again_at_its_outset_alone(pattern: list[float], features: int) -> None:
    step = random_step(features)
    x = np.tile(np.array(pattern), 30)[:, None, None].repeat(features, 2)
    _, state = steps(step, x)
    assert (step.layout.split(state)["seen"] >= len(x) - OUTSET).all()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_last_value_is_known_from_what_the_normaliser_keeps(scale: float) -> None:
    """Of several features, and of a waveform, no state holds it."""
    step = random_step(2)
    x = scale * (3 + np.random.default_rng(13).normal(size=(OUTSET, 4, 2)))
    x[1:3] = 1e4 * scale
    for i in range(2, OUTSET):
        _, state = steps(step, x[:i])
        parts = step.layout.split(state)
        known = step.normaliser._previous(parts) + parts["reference"]
        np.testing.assert_allclose(known.T, x[i - 1], rtol=1e-3, atol=1e-3 * float(parts["variance"].max()) ** 0.5)


def activity(x: NDArray[Any]) -> Float64:
    """Strengths of the signal `activity` of one stream x [T]."""
    step = random_step(1)
    state, strengths = step.fresh_state(1), []
    at = MemorySignals.names.index("activity")
    learn = torch.tensor([True])
    with torch.no_grad():
        for value in x.astype(np.float32):
            parts = step.layout.split(state)
            judged, after = step.judge(parts, torch.tensor([[value]]), torch.tensor([[60.0], [3600.0], [2.0]]), learn)
            state = step.layout.join(parts, {**parts, **after}, judged.event.learns)
            strengths.append(float(judged.strengths[at, 0]))
    return np.array(strengths)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_value_that_stands_still_where_it_always_moved_is_new_and_one_that_often_stood_still_is_not(unit: float) -> None:
    x = np.random.default_rng(7).normal(size=700)
    x[500:560] = x[499]
    often = x.copy()
    for start in range(0, 500, 90):
        often[start : start + 60] = often[start]
    assert activity(unit * x)[500:560].max() > 0.05
    assert activity(unit * often)[500:560].max() < 0.01


def test_a_burst_does_not_make_what_follows_look_still() -> None:
    x = np.random.default_rng(8).normal(size=900)
    burst = x.copy()
    burst[500:560] += 500 * np.random.default_rng(9).normal(size=60)
    assert activity(burst)[500:505].max() > 0.3
    assert activity(burst)[620:].max() < 0.02


def test_level_and_motion_are_upheld_by_what_lasts_and_not_by_a_single_reading() -> None:
    rng = np.random.default_rng(10)
    x = rng.normal(size=(900, 3))
    x[500, 0] += 50  # a spike
    x[500:, 1] += 4  # a shift
    x[500:600, 2] = 6 * rng.normal(size=100)  # a burst
    step = random_step(1)
    state, t = step.fresh_state(3), torch.tensor([[60.0, 3600.0, 2.0]]).expand(3, 3)
    found = []
    with torch.no_grad():
        for row in torch.from_numpy(x).float():
            parts = step.layout.split(state)
            judged, after = step.judge(parts, row[None], t.t(), torch.ones(3, dtype=torch.bool))
            state = step.layout.join(parts, {**parts, **after}, judged.event.learns)
            assert judged.upheld is not None
            found.append(judged.upheld.numpy().copy())
    level, motion = (np.array(found)[:, MemorySignals.names.index(name)] > 0 for name in ("level", "activity"))
    assert not level[500:560, 0].any()
    assert not motion[500:530, 0].any()
    assert level[530:700, 1].all()
    assert motion[520:600, 2].mean() > 0.8  # some changes of a burst are small
    of_itself = np.array(found)[:, [MemorySignals.names.index(name) for name in ("value", "residual")]]
    assert (of_itself == 1).all()


def of_residual(values: torch.Tensor) -> tuple[Normalised, Residual]:
    """An event whose residuals are `values` [B, F], in whatever units; NaN = missing."""
    present = ~torch.isnan(values)
    filled = torch.where(present, values, 0.0)
    event = Normalised(filled, filled, present, present, present, filled, filled, torch.ones_like(filled), present)
    return event, Residual(filled, filled, filled)


def run_signals(signals: ResidualSignals, values: Float64) -> tuple[Float64, dict[str, torch.Tensor]]:
    """Residuals [T, B, F] → strengths [T, B, K] and the last parts; every event is learned."""
    B = values.shape[1]
    parts = {slot.name: torch.zeros(B, slot.size) for slot in signals.slots}
    strengths = []
    for age, row in enumerate(torch.from_numpy(values).float()):
        strength, _, _, parts = signals(*of_residual(row), parts, torch.full((B, 1), float(age)))
        strengths.append(strength.numpy())
    return np.stack(strengths).astype(np.float64), parts


def correlated(T: int, B: int, F: int, seed: int = 0) -> Float64:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(T, B, F)) @ rng.normal(size=(F, F)) * 0.5)


def test_the_distance_equals_mahalanobis_in_loops() -> None:
    F, T = 4, 400
    signals = ResidualSignals(F)
    signals.fit(*[torch.from_numpy(correlated(500, 1, F, 1)[:, 0]).float()] * 2)
    values = correlated(T, 1, F, 2)
    strengths, _ = run_signals(signals, values)
    prior = np.zeros((F, F))
    prior[signals.first, signals.second] = prior[signals.second, signals.first] = signals.usual_precision.numpy()
    P, mean, smooth = prior.copy(), signals.usual_mean.double().numpy(), 0.0
    for age, value in enumerate(values[:, 0]):
        d = value - mean
        q = P @ d
        square = d @ q
        smooth += max(1 / (age + 1), 0.2) * (np.sqrt(square) - smooth)
        if age >= signals.burn:
            assert strengths[age, 0, 2] == pytest.approx(smooth, rel=1e-3)
        if age >= 30:
            a, near = 1 / min(500 + age, 5000), min(1, 10 * np.sqrt(F / square))
            P = (1 + a) * (P - a * near**2 / (1 + a * square * near**2) * np.outer(q, q))
            mean = mean + a * near * d


def test_a_feature_that_stands_still_for_ever_leaves_the_precision_finite_and_definite() -> None:
    signals = ResidualSignals(3)
    signals.memory = 40.0  # each event weighs as much as a hundred
    signals.prior_rows = 1.0
    values = correlated(4000, 2, 3)
    values[:, :, 1] = 0.0
    _, parts = run_signals(signals, values)
    packed = (signals.usual_precision + parts["precision"]).double().numpy()
    for row in packed:
        P = row[signals.unpack.numpy()].reshape(3, 3)
        assert np.linalg.eigvalsh(P).min() > 0
        assert P[1, 1] < 150 * signals.usual_precision[signals.diagonal[1]]


def test_context_is_seen_by_nothing_that_judges() -> None:
    signals = ResidualSignals(3, [True, False, True])
    assert len(signals.first) == 3  # the precision of two features, not of three
    values = correlated(200, 2, 3)
    strengths, _ = run_signals(signals, values)
    values[150:, :, 1] += 50
    again, _ = run_signals(signals, values)
    np.testing.assert_array_equal(strengths, again)
    step = DetectorStep(2, TINY, scored=[True, False]).eval()
    outputs, _ = steps(step, np.stack([correlated(120, 1, 2)[:, 0]], axis=1))
    assert outputs[-1][-1].tolist() == [[1.0, 0.0]]
    x = correlated(120, 1, 2)
    x[110:, :, 0] = np.nan  # nothing left to score
    outputs, _ = steps(step, x)
    assert torch.isnan(outputs[-1][0]).all()


def test_very_many_features_are_measured_along_their_main_directions() -> None:
    F = WIDEST + 20
    signals = ResidualSignals(F)
    assert sum(slot.size for slot in signals.slots) == 3 * F + 1 + WIDEST * (WIDEST + 1) // 2
    rows = torch.from_numpy(correlated(300, 1, F)[:, 0]).float()
    signals.fit(rows, rows)
    assert torch.allclose(signals.directions.T @ signals.directions, torch.eye(WIDEST), atol=1e-5)
    strengths, _ = run_signals(signals, correlated(80, 2, F))
    assert np.isfinite(strengths).all()
