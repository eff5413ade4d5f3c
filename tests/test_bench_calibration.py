"""What bench.calibration counts, on streams whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import typer

from bench.calibration import Judged, Part, main, measure, nab_score, segments
from service.policy import Policy
from training.data import Stream

ROWS = 20_000


def judged(onset_p: np.ndarray, anomalous: np.ndarray | None = None) -> Judged:
    T, B = onset_p.shape
    labels = np.zeros((T, B), bool) if anomalous is None else anomalous
    stream = Stream("s", np.zeros((T, 1), np.float32), np.zeros((T, 3), np.float32))
    return Judged([Part(stream, ~labels[:, i], labels[:, i]) for i in range(B)], onset_p.astype(np.float32), ~labels)


def test_uniform_p_values_keep_the_promise_and_reach_poissons_ceiling() -> None:
    row = measure("uniform", judged(np.random.default_rng(0).random((ROWS, 60))), Policy(alpha=1e-3, strict=True))
    assert row.ratio == pytest.approx(1, abs=0.1)
    assert row.within_two == pytest.approx(row.ceiling, abs=0.05)
    assert row.ceiling > 0.99


def test_the_allowance_counts_for_young_events_alone() -> None:
    p = np.random.default_rng(1).random((ROWS, 60))
    row = measure("uniform", judged(p), Policy(alpha=1e-3, tau=1500.0))
    assert row.by_age["100-300"] > 2
    assert row.by_age["8000-30000"] == pytest.approx(1.05, abs=0.1)


def test_nab_gives_100_for_first_rows_of_windows_and_0_for_silence() -> None:
    labels = np.zeros((4000, 2), bool)
    labels[2000:2200] = True
    p = np.ones(labels.shape)
    assert nab_score(judged(p, labels), Policy(strict=True)) == 0
    p[2000] = 1e-6
    assert nab_score(judged(p, labels), Policy(strict=True)) == 100
    p[1000] = 1e-6  # a false alert costs 0.11 of a window, twice of two
    assert nab_score(judged(p, labels), Policy(strict=True)) == pytest.approx(100 - 100 * 0.11 / 2, abs=0.1)


def test_segments_are_hit_inside_or_shortly_after() -> None:
    labels = np.zeros((4000, 3), bool)
    labels[2000:2200] = True
    p = np.ones(labels.shape)
    p[2100, 0] = p[2250, 1] = p[2350, 2] = 1e-6
    found = segments("s", judged(p, labels), Policy(strict=True))
    assert (found["hit"], found["segments"]) == (2, 3)
    assert 0 < found["by_chance"] < 1


def test_an_unknown_set_is_named_with_those_there_are() -> None:
    with pytest.raises(typer.BadParameter, match="no set is named 'smb'; there are generator, smd,"):
        main(sets="generator,smb")
