"""Injected faults: where they are put, and what they decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tests.training.conftest import TINY
from training.autoencoder import NoNetwork, Sizes, Variant
from training.cache import Cached
from training.data import Stream, clock
from training.detector import DetectorStep
from training.faults import DRAWS, FAULTS, FEWEST, Gain, average_precision, faulty_streams, found, inject
from training.fit import Plan
from training.pipeline import Job, _step, _what_pays, fleet_job


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
    assert precision["sum"].mean() > 1.5 * faulty.share, (precision, faulty.share)


def test_each_draw_has_faults_of_its_own_and_is_judged_as_if_it_were_alone() -> None:
    history = streams(800)
    faulty = faulty_streams(history, [True] * 3, seed=0)
    assert faulty is not None
    assert faulty.x.shape == (800, 2 * DRAWS, 3)
    assert len({faulty.faulty[:, lane].tobytes() for lane in range(2 * DRAWS)}) == 2 * DRAWS
    for lane in range(2 * DRAWS):
        np.testing.assert_array_equal(faulty.x[: faulty.start, lane], history[lane % 2].x[: faulty.start])
    step = DetectorStep(3, Sizes(cell="none"))
    beside = found(step, faulty)
    second = slice(2, 4)
    x, t, faults = faulty.x[:, second], faulty.t[:, second], faulty.faulty[:, second]
    alone = replace(faulty, x=np.tile(x, (1, DRAWS, 1)), t=np.tile(t, (1, DRAWS, 1)), faulty=np.tile(faults, (1, DRAWS)))
    for name, precision in found(step, alone).items():
        np.testing.assert_allclose(precision, beside[name][1], atol=0.02)


def test_of_many_features_each_draw_takes_fewer_streams_in_turns() -> None:
    wide = [Stream(one.name, np.tile(one.x, (1, 100)), one.t) for one in streams(3000, count=3)]
    faulty = faulty_streams(wide, [True] * 300, seed=0)
    assert faulty is not None
    assert faulty.x.shape == (3000, DRAWS, 300)
    np.testing.assert_array_equal(faulty.x[:1500, 4], wide[1].x[:1500])


def test_what_differs_by_chance_is_no_gain() -> None:
    """One draw by itself had decided: of a fleet of one machine the network was published for 9 seeds of 16."""
    without, chance = np.array([0.65, 0.66, 0.64, 0.67]), np.array([0.05, -0.03, 0.04, -0.02])
    assert Gain.of(without + 0.05, without).clear
    assert not Gain.of(without + chance, without).clear
    assert not Gain.of(without - 0.05, without).clear
    assert not Gain.of(without[:1] + 0.05, without[:1]).clear
    said = str(Gain.of(without + chance, without))
    assert said == "0.010 ±0.020 more average precision in the mean of 4 draws of faults, more in 2 of them"


def test_short_history_is_not_judged() -> None:
    assert faulty_streams(streams(FEWEST - 1), [True] * 3, seed=0) is None


def test_short_streams_are_judged_where_there_are_no_longer_ones() -> None:
    """Of 380 rows, 323 of them learned from, the network was published and never compared with none."""
    short, long = streams(323), streams(1500, count=1)
    alone, beside = (faulty_streams(history, [True] * 3, seed=0) for history in (short, [*short, *long]))
    assert alone is not None
    assert alone.x.shape[0] == 323
    assert beside is not None
    assert beside.x.shape[:2] == (1500, DRAWS)


def job_of(rows: int, network: Literal["keep", "if it pays"], cell: Variant = "standard") -> Job:
    history = streams(rows)
    cached = Cached(["a", "b", "c"], history, [], 0, "", "", "")
    made = fleet_job(cached, [Path("pumps")], replace(TINY, cell=cell), Plan(chunk=24), 0.15, None, "1", "")
    return replace(made, network=network)


@pytest.mark.parametrize(
    ("rows", "network", "with_it", "said"),
    [
        (800, "if it pays", False, " average precision in the mean of 16 draws of faults, more in "),
        (800, "keep", True, "; --keep-network asks for it."),
        (300, "if it pays", False, " average precision in the mean of 16 draws of faults, more in "),
        (280, "if it pays", True, "with the network, which was not compared with none: of the rows that it learned from no stream has 250"),
    ],
)
def test_a_report_says_whether_the_network_pays_how_sure_that_is_or_why_it_was_not_asked(
    rows: int, network: Literal["keep", "if it pays"], with_it: bool, said: str
) -> None:
    """With --keep-network and of short histories it had said nothing."""
    job = job_of(rows, network)
    step, quality = _what_pays(_step(job, job.sizes), job)  # it has learned nothing
    assert isinstance(step.autoencoder, NoNetwork) != with_it
    assert said in quality["published"]
    assert ("injected_faults_average_precision" in quality) == (rows > 280)


def test_a_detector_that_has_no_network_is_not_compared() -> None:
    job = job_of(800, "if it pays", "none")
    assert _what_pays(_step(job, job.sizes), job)[1] == {}
