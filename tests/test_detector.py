"""A row of a batch is scored to the last bit the same, whatever its batch-mates: exact replay rests on it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from service.app import Service
from service.asking import SHIPPED_MODELS
from service.detector import MAX_ROWS, Detector, StepOutput, bucket
from service.errors import BadSetting
from service.settings import Settings
from tests.tiny import build_tiny

FIELDS = tuple(StepOutput.__dataclass_fields__)
GPU = Path("/dev/nvidia0").exists()


@pytest.fixture(scope="module", params=["tiny", "shipped"])
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    if request.param == "shipped":
        return Detector.load(next(SHIPPED_MODELS.glob("default-*.onnx")))
    return Detector.load(build_tiny(tmp_path_factory.mktemp("tiny"), ("a", "b", "c")))


def inputs(detector: Detector, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    state = detector.fresh_states(rows)
    x = rng.normal(size=(rows, detector.features)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    t = np.stack([np.ones(rows), rng.random(rows) * 86400, rng.integers(0, 7, rows)], axis=1).astype(np.float32)
    return state, x, t, np.ones(rows, np.float32), np.full(rows, 1e-3, np.float32)


def warmed(detector: Detector, rows: int, steps: int) -> np.ndarray:
    state = detector.fresh_states(rows)
    for i in range(steps):
        _, x, t, learn, alpha = inputs(detector, rows, seed=i)
        state = detector.step(state, x, t, learn, alpha).state
    return state


def assert_same(got: StepOutput, want: StepOutput, where: slice) -> None:
    for name in FIELDS:
        assert np.array_equal(getattr(got, name), getattr(want, name)[where], equal_nan=True), name


def test_buckets_hold_their_rows_and_are_multiples_of_eight() -> None:
    for rows in range(1, MAX_ROWS + 1):
        assert bucket(rows) >= rows
        assert bucket(rows) % 8 == 0
        assert bucket(bucket(rows)) == bucket(rows)
    assert [bucket(rows) for rows in (1, 8, 9, 33, 64, 65, 520, 1024)] == [8, 8, 16, 48, 64, 80, 528, 1024]


def test_a_row_is_the_same_to_the_last_bit_in_every_size_of_batch(detector: Detector) -> None:
    rows = 1100  # more than one slice of MAX_ROWS
    _, *rest = inputs(detector, rows, seed=99)
    state = warmed(detector, rows, 130)
    whole = detector.step(state, *rest)
    sizes = [1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65, 100, 127, 128, 129, 255, 300, 500, 777, 1023, 1024, 1100]
    for size in sizes:
        part = slice(rows - size, rows)
        assert_same(detector.step(state[part], *(values[part] for values in rest)), whole, part)


def test_a_row_does_not_feel_extreme_neighbours(detector: Detector) -> None:
    state, x, t, learn, alpha = inputs(detector, 16, seed=5)
    state = warmed(detector, 16, 120)
    want = detector.step(state, x, t, learn, alpha)
    wild = x.copy()
    wild[1::2] = np.array([3e38, -3e38, np.nan, 0, 1e-38, 1e20, -1e20, 1])[:, None]
    got = detector.step(state, wild, t, learn, alpha)
    for name in FIELDS:
        assert np.array_equal(getattr(got, name)[::2], getattr(want, name)[::2], equal_nan=True), name
    assert np.isfinite(got.state).all()


def test_steps_in_any_slicing_give_the_same_scores(detector: Detector) -> None:
    rng = np.random.default_rng(3)
    rows, steps = 40, 30
    whole = sliced = warmed(detector, rows, 110)
    for i in range(steps):
        _, *rest = inputs(detector, rows, seed=1000 + i)
        out = detector.step(whole, *rest)
        cuts = [0, *sorted(rng.choice(np.arange(1, rows), 3, replace=False).tolist()), rows]
        parts = [detector.step(sliced[a:b], *(v[a:b] for v in rest)) for a, b in itertools.pairwise(cuts)]
        for name in FIELDS:
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(out, name), equal_nan=True), name
        whole, sliced = out.state, np.concatenate([p.state for p in parts])


def test_warm_up_gives_no_score_and_then_always_one(detector: Detector) -> None:
    state = detector.fresh_states(8)
    for i in range(detector.manifest.warmup + 5):
        _, x, t, learn, alpha = inputs(detector, 8, seed=i)
        x = np.nan_to_num(x)
        out = detector.step(state, x, t, learn, alpha)
        cold = i < detector.manifest.warmup
        assert np.isnan(out.p_value).all() == cold
        assert np.isnan(out.onset_p).all() == cold
        if not cold:
            assert ((out.p_value > 0) & (out.p_value <= 1) & (out.onset_p > 0) & (out.onset_p <= 1)).all()
        state = out.state


def test_loading_the_same_file_twice_gives_the_same_fingerprint(tmp_path: Path) -> None:
    path = build_tiny(tmp_path)
    assert Detector.load(path).fingerprint == Detector.load(path).fingerprint != 0


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_provider_that_cannot_be_had_is_refused_and_not_replaced_by_the_cpu(tiny_model_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"ONSET_PROVIDER is 'cuda', but .*CUDAExecutionProvider"):
        Detector.load(tiny_model_path, provider="cuda")
    with pytest.raises(BadSetting, match="ONSET_PROVIDER"):
        Service(Settings(model=tiny_model_path, provider="cuda"))


@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_on_a_gpu_the_asked_provider_runs_every_batch_and_answers_as_the_cpu() -> None:
    path = next(SHIPPED_MODELS.glob("default-*.onnx"))
    on_gpu, on_cpu = (Detector.load(path, provider=provider) for provider in ("cuda", "cpu"))
    assert on_gpu.providers[0] == "CUDAExecutionProvider"
    given = inputs(on_cpu, 100)
    for name in FIELDS:
        got, want = getattr(on_gpu.step(*given), name), getattr(on_cpu.step(*given), name)
        assert np.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True), name


def test_where_a_model_runs_is_a_metric(tiny_model_path: Path) -> None:
    service = Service(Settings(model=tiny_model_path))
    (line,) = [text for text in generate_latest(service.metrics.registry).decode().splitlines() if text.startswith("onset_model_info{")]
    assert 'model="tiny"' in line
    assert 'provider="CPUExecutionProvider"' in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are read from /proc")
@pytest.mark.parametrize("module", ["service.detector", "training.verify"])
def test_onnx_runtime_keeps_no_telemetry(module: str, tmp_path: Path) -> None:
    """Its wheels begin with it while they are imported: a database, which stays open, in the user's cache."""
    code = f"import os, {module}; print(*(os.path.realpath(f'/proc/self/fd/{{fd}}') for fd in os.listdir('/proc/self/fd')))"
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    told = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    ).stdout
    assert "onnxruntime" not in told
    assert not list(tmp_path.rglob("*onnxruntime*"))
