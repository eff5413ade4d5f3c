"""The linear forecast beside the network of a single feature: what it learns, and what is judged by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.artifact import Feature
from service.detector import Detector
from tests.training.conftest import TINY
from training.autoencoder import Sizes
from training.cache import Cached
from training.calibrate import calibrate, observe
from training.data import Stream, clock, pad
from training.detector import DetectorStep
from training.export import manifest_of, publish, to_onnx, training_record
from training.fit import Plan
from training.layout import Parts
from training.linear import LAGS, LinearForecast
from training.pipeline import Job, _step, default_job, fleet_job
from training.signals import MemorySignals
from training.synthetic import streams
from training.verify import verify_same_answers

COEFFICIENTS = (1.6, -0.8)


def autoregression(rng: np.random.Generator, rows: int) -> NDArray[np.float64]:
    x = np.zeros(rows)
    for i in range(2, rows):
        x[i] = COEFFICIENTS[0] * x[i - 1] + COEFFICIENTS[1] * x[i - 2] + 0.1 * rng.normal()
    return x


@pytest.fixture(scope="module")
def linear_step() -> DetectorStep:
    """Untrained beside a linear forecast of random numbers, calibrated on synthetic streams."""
    torch.manual_seed(0)
    step = DetectorStep(1, TINY, linear=True).eval()
    assert step.linear is not None
    step.linear.weights.normal_(0, 0.4)
    step.linear.offset.fill_(0.1)
    step.calibrate(calibrate(observe(step, *pad(streams(np.random.default_rng(5), 8, 400), 400)), step.signals.burn))
    return step.eval()


def test_it_learns_how_a_value_follows_from_those_before_it() -> None:
    rng = np.random.default_rng(0)
    z = np.stack([autoregression(rng, 2000) for _ in range(3)], axis=1).astype(np.float32)
    linear = LinearForecast()
    linear.fit(z, np.ones(z.shape, bool), [2000, 2000, 1500])
    weights = linear.weights[:, 0].numpy()
    np.testing.assert_allclose(weights[:2], COEFFICIENTS, atol=0.1)
    np.testing.assert_allclose(weights[2:], 0, atol=0.12)
    past = torch.from_numpy(np.stack([z[99 - lag] for lag in range(LAGS)], axis=1))
    expected = [float(weights @ z[99 - np.arange(LAGS), lane]) + float(linear.offset) for lane in range(3)]
    np.testing.assert_allclose(linear(past)[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_it_learns_from_the_rows_of_each_lane_alone_and_of_no_gap() -> None:
    """Beyond a lane's rows, and where nothing was read, there may be anything."""
    rng = np.random.default_rng(1)
    z = np.stack([autoregression(rng, 900) for _ in range(2)], axis=1).astype(np.float32)
    present = rng.random(z.shape) > 0.02
    z[~present] = 0
    one, other = LinearForecast(), LinearForecast()
    one.fit(z, present, [900, 600])
    z[600:, 1] = 1e3
    other.fit(z, present, [900, 600])
    assert torch.equal(one.weights, other.weights)
    assert 1 < float(one.weights[0]) < 1.8


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_of_what_never_moves_or_hardly_began_it_expects_the_mean(rows: int) -> None:
    linear = LinearForecast()
    linear.fit(np.zeros((rows, 2), np.float32), np.ones((rows, 2), bool), [rows, 1])
    assert not linear(torch.zeros(1, LAGS)).any()
    assert torch.isfinite(linear.weights).all()


def test_a_signal_judges_what_it_leaves_and_a_missing_value_is_the_last_one(
    linear_step: DetectorStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop: mean + deviation · sinh(weights · last values in z + offset), with what was known before the event."""
    step, signals, seen = linear_step, linear_step.signals, []
    assert isinstance(signals, MemorySignals)
    assert step.linear is not None
    visit = signals.visit

    def watched(values: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Parts]:
        seen.append(values[-1].numpy().copy())
        return visit(values, *rest)

    monkeypatch.setattr(signals, "visit", watched)
    rng = np.random.default_rng(2)
    x = (50 + 3 * np.stack([autoregression(rng, 160) for _ in range(4)], axis=1)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    weights, offset = step.linear.weights[:, 0].numpy().astype(np.float64), float(step.linear.offset)
    past, state, learn, expected = np.zeros((4, LAGS)), step.fresh_state(4), torch.ones(4, dtype=torch.bool), []
    with torch.no_grad():
        for row in x:
            parts = step.split(state, torch.from_numpy(row)[None], learn)
            judged, after = step.judge(parts, torch.from_numpy(row)[None], torch.ones(3, 4), learn)
            state = step.layout.join(parts, {**parts, **after}, judged.event.learns)
            u, z, mean, scale = (
                part[0].numpy().astype(np.float64) for part in (judged.event.u, judged.event.z, judged.event.mean, judged.event.scale)
            )
            given = judged.event.present[0].numpy()
            ahead = mean + scale * np.sinh(np.clip(past @ weights + offset, -8, 8))
            expected.append(np.where(given & judged.event.known[0].numpy(), u - ahead, 0))
            past = np.concatenate([np.where(given, z, past[:, 0])[:, None], past[:, :-1]], axis=1)
    np.testing.assert_allclose(np.array(seen), np.array(expected), rtol=1e-4, atol=1e-4)


def test_it_is_published_and_served_as_it_answers_here(linear_step: DetectorStep, tmp_path: Path) -> None:
    record = training_record(command="python -m training", seed=0, data="none", data_sha256="", streams=1, rows=1)
    manifest = manifest_of(linear_step, name="probe", version="1", features=[Feature(name="value")], training=record)
    detector = Detector.load(publish(linear_step, to_onnx(linear_step), manifest, tmp_path))
    verify_same_answers(linear_step, detector.step)
    assert "past" in {part.name for part in detector.manifest.layout}


def job_of(features: int, sizes: Sizes = TINY) -> Job:
    rng = np.random.default_rng(3)
    lanes = [
        Stream(name, np.stack([autoregression(rng, 500) for _ in range(features)], axis=1).astype(np.float32), clock(np.arange(500.0)))
        for name in "ab"
    ]
    cached = Cached([f"f{i}" for i in range(features)], lanes, [], 0, "", "", "")
    return fleet_job(cached, [Path("fleet")], sizes, Plan(), 0.15, None, "1", "")


def test_models_fitted_to_a_single_feature_have_one_and_nothing_else_has() -> None:
    """The shipped default's file must come out of its command as it was; on servers and pumps it lowers what is found (LOG.md)."""
    linear = _step(job_of(1), TINY).linear
    assert linear is not None
    np.testing.assert_allclose(linear.weights[:2, 0], COEFFICIENTS, atol=0.2)
    assert _step(job_of(2), TINY).linear is None
    waveform = Sizes(hidden=4, code=3, decoder_hidden=4, waveform=True)
    assert _step(job_of(1, waveform), waveform).linear is None
    assert not default_job(Plan(), "1", "", lanes=2, length=300).linear
    assert DetectorStep(1, TINY).signal_names == MemorySignals.names
