"""Tiny detectors, each exported once a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from service.detector import session_of
from tests.training import logs
from training.autoencoder import Sizes
from training.calibrate import Observed, calibrate, observe
from training.data import pad
from training.detector import DetectorStep
from training.export import to_onnx
from training.logfit import fit
from training.logs import LogStep
from training.synthetic import streams
from training.verify import Runner

TINY = Sizes(hidden=6, layers=2, code=3, decoder_hidden=4)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_step(features: int) -> DetectorStep:
    torch.manual_seed(0)
    return DetectorStep(features, TINY).eval()


@pytest.fixture(scope="session")
def observed() -> Observed:
    """What an untrained univariate detector sees in 24 synthetic streams of 900 events."""
    return observe(random_step(1), *pad(streams(np.random.default_rng(5), 24, 900), 900))


@pytest.fixture(scope="session")
def univariate(observed: Observed) -> DetectorStep:
    step = random_step(1)
    step.calibrate(calibrate(observed, step.signals.burn))
    return step.eval()


@pytest.fixture(scope="session")
def graph(univariate: DetectorStep) -> bytes:
    return to_onnx(univariate)


@pytest.fixture(scope="session")
def run(graph: bytes) -> Runner:
    return Runner(session_of(graph))


@pytest.fixture(scope="session")
def fleet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams of two related features, with a label column and a gap."""
    folder = tmp_path_factory.mktemp("fleet")
    rng = np.random.default_rng(0)
    for stream in range(2):
        wave = np.sin(np.arange(420) / 9 + stream)
        load, heat = 50 + 10 * wave + rng.normal(size=420), 2000 + 300 * wave + 20 * rng.normal(size=420)
        lines = ["timestamp,load,heat,label"]
        lines += [f"{1.7e9 + 60 * i},{load[i]:.3f},{'' if 100 <= i < 105 else f'{heat[i]:.2f}'},0" for i in range(420)]
        (folder / f"pump-{stream}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def host() -> LogStep:
    """Of a stream of log lines that never ends."""
    return fit(logs.one_host(), logs.TINY, logs.QUICK).step.eval()


@pytest.fixture(scope="session")
def host_graph(host: LogStep) -> bytes:
    return to_onnx(host)
