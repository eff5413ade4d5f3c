"""Waveforms: the network gives back the last window, the signals judge by it, and `fit --waveform` makes a detector of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from service.detector import Detector, session_of
from training.__main__ import app
from training.autoencoder import HORIZONS, WINDOW, Outlook, Sizes, WaveformAutoencoder
from training.data import Float32
from training.fit import Prepared, loss_of
from training.normaliser import Normalised
from training.signals import Residual, WaveformSignals
from training.verify import Runner

TINY = Sizes(hidden=6, code=3, decoder_hidden=4, waveform=True)


def pulses(rows: int, seed: int = 0) -> Float32:
    """A beat every 40 values, with a little noise [rows]."""
    phase = np.arange(rows) % 40
    return (np.exp(-((phase - 12) ** 2) / 8) + 0.02 * np.random.default_rng(seed).normal(size=rows)).astype(np.float32)


def outlooks(rows: int, streams: int) -> list[Outlook]:
    """Random ones, as good as any for arithmetic."""
    rng = torch.Generator().manual_seed(0)
    sizes = (1, WINDOW, len(HORIZONS), len(HORIZONS))
    return [Outlook(*(torch.randn(streams, size, generator=rng) for size in sizes)) for _ in range(rows)]


def judged(signals: WaveformSignals, said: list[Outlook], present: NDArray[np.bool_], age: float = 1000.0) -> Float32:
    """Strengths [T, B, 2] from a fresh state."""
    rows = present.shape[1]
    parts, strengths = {slot.name: torch.zeros(rows, slot.size) for slot in signals.slots}, []
    zeros = torch.zeros(rows, 1)
    for outlook, given in zip(said, present, strict=True):
        there = torch.from_numpy(given).unsqueeze(1)
        event = Normalised(zeros, zeros, there, there, there, zeros, zeros, zeros, there)
        strength, _, _, parts = signals(event, Residual(zeros, zeros, zeros, outlook), parts, torch.full((rows, 1), age))
        strengths.append(strength.numpy())
    return np.stack(strengths)


def test_the_strengths_are_those_of_a_loop_over_the_whole_past() -> None:
    T, B = 260, 3
    said, present = outlooks(T, B), np.ones((T, B), bool)
    present[150:153, 1] = False
    got = judged(WaveformSignals(), said, present)
    z, window, location, log_scale = (
        np.stack([getattr(outlook, name).numpy().astype(float) for outlook in said]) for name in ("seen", "window", "location", "log_scale")
    )
    z = z[:, :, 0]
    for b in range(B):
        errors = {h: np.zeros(T) for h in (8, 16, 32)}
        for i in range(T):
            recent = [z[i - k, b] if i >= k else 0.0 for k in range(96)]
            logs = 0.0
            for h, error in errors.items():
                j = HORIZONS.index(h)
                if not present[i, b]:
                    error[i] = error[i - 1]
                elif i >= h:
                    error[i] = abs(z[i, b] - location[i - h, b, j]) * np.exp(-log_scale[i - h, b, j])
                logs += np.log1p(sum(error[max(0, i - 63) : i + 1]) / 64) / 3
            want = [np.mean(np.abs(np.array(recent) - window[i, b])), np.expm1(logs)] if present[i, b] else [0.0, 0.0]
            np.testing.assert_allclose(got[i, b], want, rtol=2e-5, atol=2e-6)


def test_a_young_stream_is_not_judged() -> None:
    said, present = outlooks(3, 2), np.ones((3, 2), bool)
    assert (judged(WaveformSignals(burn=200), said, present, age=199) == 0).all()
    assert (judged(WaveformSignals(burn=200), said, present, age=200) > 0).any()


def test_a_sequence_says_what_its_events_say_one_by_one() -> None:
    torch.manual_seed(1)
    network = WaveformAutoencoder(2, 1, TINY)
    inputs, parts = torch.randn(30, 4, 2), network.fresh(4)
    with torch.no_grad():
        whole = network.sequence(inputs, network.fresh(4)).outlook
        for i, row in enumerate(inputs):
            one, parts = network.look(row, parts)
            for name in ("seen", "window", "location", "log_scale"):
                torch.testing.assert_close(getattr(one, name), getattr(whole, name)[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("lag", "right"), [(0, True), (1, False)])
def test_the_window_that_is_learned_has_the_newest_value_first(lag: int, right: bool) -> None:
    """A network that gave back exactly the window would have no window loss; one that is a value late would."""
    T = 200
    z = torch.from_numpy(pulses(T + WINDOW)).reshape(-1, 1, 1)
    window = torch.stack([z[i - lag - WINDOW + 1 : i - lag + 1, 0, 0].flip(0) for i in range(WINDOW, T + WINDOW)]).unsqueeze(1)
    zeros = torch.zeros(T, 1, len(HORIZONS))
    outputs = WaveformAutoencoder(2, 1, TINY).sequence(
        torch.zeros(T, 1, 2), {"encoder_hidden": torch.zeros(1, 6), "encoder_cell": torch.zeros(1, 6)}
    )
    z = z[WINDOW:]
    prepared = Prepared(torch.zeros(T, 1, 2), z, torch.ones(T, 1, 1, dtype=torch.bool))
    outputs = replace(outputs, outlook=Outlook(z, window, zeros, zeros))
    forecasts = np.mean([float(z[h:].abs().mean()) for h in HORIZONS])
    excess = float(loss_of(outputs, prepared, 0, torch.ones(T))) - forecasts
    assert (abs(excess) < 1e-5) == right


def test_fit_waveform_makes_a_detector_that_finds_a_beat_of_another_shape(tmp_path: Path) -> None:
    """Publishing verifies the graph: sequence = steps, ONNX = torch, rows independent of their batch."""
    folder = tmp_path / "beats"
    folder.mkdir()
    for stream in range(2):
        (folder / f"{stream}.csv").write_text("\n".join(["value", *map(str, pulses(1600, stream))]))
    arguments = [
        "fit",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--name",
        "beats",
        "--waveform",
        "--cell",
        "coupled",
        "--steps",
        "40",
        "--lanes",
        "8",
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    detector = Detector.load(tmp_path / "out" / "beats-1.onnx")
    x = pulses(1200, 7)
    x[1000:1040] = x[1000:1040][::-1]  # the usual values in another order
    state, p = np.zeros((1, detector.manifest.state_size), np.float32), []
    run = Runner(session_of((tmp_path / "out" / "beats-1.onnx").read_bytes()))
    ones = np.ones(1, np.float32)
    for value in x:
        out = run(state, np.array([[value]], np.float32), np.full((1, 3), np.nan, np.float32), ones, ones * 1e-3)
        state = out.state
        p.append(float(out.p_value[0]))
    assert min(p[1000:1100]) < min(p[500:1000])


@pytest.mark.parametrize(
    ("extra", "message"), [([], "A waveform is one column"), (["--exclude", "b", "--cell", "none"], "exclude each other")]
)
def test_what_cannot_be_a_waveform_is_refused_in_a_sentence(extra: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("a,b\n" + "1,2\n" * 500)
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path / "two.csv"), "--out", str(tmp_path / "out"), "--waveform", *extra])
    assert result.exit_code == 1
    assert message in result.output
