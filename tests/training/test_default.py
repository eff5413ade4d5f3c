"""The detector that ships with the service: small, from synthetic data alone, and good for what the demo shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import service
from service.detector import Detector
from training.data import Float32, pad
from training.evaluate import false_onsets, onset_p_at, run_streams
from training.synthetic import streams

STREAMS, CALM, LOAD = 32, 200, 100


@pytest.fixture(scope="module")
def default() -> Detector:
    models = Path(service.__file__).parent / "models"
    return Detector.load(next(models.glob("default-*.onnx")))


def at_10_hz(x: Float32) -> tuple[Float32, Float32]:
    """x [T, B] as readings ten times a second."""
    T, B = x.shape
    t = np.stack([np.full((T, B), 0.1), 40_000 + 0.1 * np.arange(T)[:, None] * np.ones(B), np.full((T, B), 2.0)], axis=2)
    t[0, :, 0] = np.nan
    return x[:, :, None].astype(np.float32), t.astype(np.float32)


def cpu(rng: np.random.Generator) -> Float32:
    """Percent busy, 5 to 20, then 100 for ten seconds."""
    calm = np.clip(rng.normal(12, 4, (CALM, STREAMS)), 0, None)
    return np.concatenate([calm, np.clip(rng.normal(99.5, 1, (LOAD, STREAMS)), 0, 100)]).round(1).astype(np.float32)


def disk(rng: np.random.Generator) -> Float32:
    """Bytes written a second: small writes now and then, then a hundred times as much."""
    usual = rng.exponential(4e4, (CALM + LOAD, STREAMS)) * (rng.random((CALM + LOAD, STREAMS)) < 0.3)
    usual[CALM:] = rng.exponential(4e6, (LOAD, STREAMS)) + 4e6
    return usual.astype(np.float32)


def test_it_is_small_and_says_where_it_comes_from(default: Detector) -> None:
    manifest = default.manifest
    assert (manifest.name, manifest.feature_names) == ("default", ("value",))
    assert 4 * manifest.state_size <= 1500
    assert manifest.warmup <= 100
    assert manifest.training.command.startswith("python -m training default")
    assert "synthetic" in manifest.training.data
    models = Path(service.__file__).parent / "models"
    assert (models / manifest.filename).stat().st_size <= 1_000_000


@pytest.mark.parametrize("readings", [cpu, disk])
def test_it_flags_a_disturbance_of_the_machine_within_two_seconds(default: Detector, readings: object) -> None:
    assert callable(readings)
    scores = run_streams(default.step, default.state_size, *at_10_hz(readings(np.random.default_rng(0))))
    found = (scores.onset_p[CALM : CALM + 20] < 1e-3).any(axis=0)
    assert found.mean() > 0.95


def test_it_keeps_quiet_in_noise(default: Detector) -> None:
    noise = np.random.default_rng(1).normal(50, 3, (600, STREAMS)).astype(np.float32)
    scores = run_streams(default.step, default.state_size, *at_10_hz(noise))
    assert np.nanmean(scores.onset_p < 1e-3) < 2e-3
    assert np.isfinite(scores.onset_p[100:]).all()


def test_false_onsets_on_unseen_synthetic_streams_come_about_as_often_as_asked(default: Detector) -> None:
    x, t = pad(streams(np.random.default_rng(77), 64, 1500), 1500)
    onset_p = onset_p_at(default.step, default.state_size, x, t, [1e-3])
    settled = np.arange(1500)[:, None] >= 500
    ratio = false_onsets(onset_p, settled & np.ones((1, 64), bool), [1e-3])["0.001"]["ratio"]
    assert 0.3 < ratio < 3
