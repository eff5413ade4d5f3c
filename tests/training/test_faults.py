"""Injected faults: where they are put, and what they decide."""

from __future__ import annotations

import numpy as np
import pytest

from training.autoencoder import Sizes
from training.data import Stream, clock
from training.detector import DetectorStep
from training.faults import FAULTS, FEWEST, average_precision, faulty_streams, found, inject


def streams(rows: int, count: int = 2, features: int = 3) -> list[Stream]:
    rng = np.random.default_rng(0)
    t = clock(60.0 * np.arange(rows, dtype=np.float64))
    common = rng.normal(size=(count, rows, 1))
    return [Stream(f"s{i}", (common[i] + 0.1 * rng.normal(size=(rows, features))).astype(np.float32), t) for i in range(count)]


def test_faults_leave_the_first_part_context_and_gaps_untouched() -> None:
    x = streams(2000)[0].x
    x[np.random.default_rng(2).random(x.shape) < 0.1] = np.nan
    changed, faulty = inject(np.random.default_rng(1), x, np.array([True, False, True]), 1000)
    np.testing.assert_array_equal(changed[:1000], x[:1000])
    np.testing.assert_array_equal(changed[:, 1], x[:, 1])  # context
    np.testing.assert_array_equal(np.isnan(changed), np.isnan(x))
    assert (changed[faulty][:, [0, 2]] != x[faulty][:, [0, 2]]).any(axis=0).all()  # features with gaps have faults, too
    assert not faulty[:1000].any()
    assert 0.05 < faulty[1000:].mean() < 0.8
    np.testing.assert_array_equal(changed[~faulty], x[~faulty])


def test_a_history_in_which_nothing_moves_is_not_judged() -> None:
    still = [Stream(stream.name, np.zeros_like(stream.x), stream.t) for stream in streams(800)]
    assert faulty_streams(still, [True] * 3, seed=0) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_changes_what_it_is_given(fault: object) -> None:
    piece = np.random.default_rng(0).normal(size=50)
    assert callable(fault)
    changed = fault(np.random.default_rng(1), piece, 2.0, 1.0)
    assert changed.shape == piece.shape
    assert not np.array_equal(changed, piece)


def test_the_average_precision_is_scikit_learns() -> None:
    # sklearn.metrics.average_precision_score of the same, by hand: thresholds 0.8, 0.4 (a tie), 0.35, 0.1
    score, label = np.array([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([False, False, True, True, True])
    assert average_precision(score, label) == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4)


def test_a_detector_finds_injected_faults_better_than_chance() -> None:
    faulty = faulty_streams(streams(1500, count=3), [True] * 3, seed=0)
    assert faulty is not None
    precision = found(DetectorStep(3, Sizes(cell="none")), faulty)
    assert set(precision) == {"sum", "residual", "level", "distance"}
    assert precision["sum"] > 1.5 * faulty.share, (precision, faulty.share)


def test_short_history_is_not_judged() -> None:
    assert faulty_streams(streams(FEWEST - 1), [True] * 3, seed=0) is None
