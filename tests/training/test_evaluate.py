"""What a fit says of its false onsets is what a service would raise that is asked for that rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from rich.console import Console

from training.data import pad
from training.detector import DetectorStep
from training.evaluate import ASKED, _injected, false_onsets, run_streams, too_few
from training.fit import Plan
from training.pipeline import _evaluate, default_job
from training.synthetic import level_shift
from training.verify import Runner

STREAMS, ROWS = 32, 2500


def test_anomalies_are_injected_into_what_is_scored_and_moves() -> None:
    """Context raises no alert, and a constant times the range of a constant is nothing: both counted as not found."""
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    x[:, 1], x[:, 2] = 50.0, np.nan
    for seed in range(20):
        changed = _injected(np.random.default_rng(seed), x, np.array([False, True, True, True]), 180, level_shift)
        assert np.array_equal(changed[:, :3], x[:, :3], equal_nan=True)
        assert not np.array_equal(changed[:, 3], x[:, 3])


def test_a_history_too_short_to_know_what_follows_a_first_onset_is_warned_of(univariate: DetectorStep, run: Runner) -> None:
    """500 streams of 200 rows: 31 times as many false onsets as asked for, and nothing but that figure said so."""
    quality, _ = _evaluate(univariate, default_job(Plan(), "1", "", lanes=8, length=224), run, Console(quiet=True))
    assert quality["warning"].startswith("Calibrated on 224 rows of a stream at most: what begins behind its first 225 was never seen")
    quality, _ = _evaluate(univariate, default_job(Plan(), "1", "", lanes=8, length=225), run, Console(quiet=True))
    assert "warning" not in quality
    assert quality["unseen_rows_are_few"] == too_few(quality["false_onsets_on_unseen_rows"]["0.001"]) != ""


def test_a_report_names_what_in_the_history_may_be_no_readings(univariate: DetectorStep, run: Runner) -> None:
    job = default_job(Plan(), "1", "", lanes=4, length=130)
    assert "values_that_may_be_no_readings" not in _evaluate(univariate, job, run, Console(quiet=True))[0]
    quality, _ = _evaluate(univariate, replace(job, sentinels="-9999 in load (1)."), run, Console(quiet=True))
    assert quality["values_that_may_be_no_readings"] == "-9999 in load (1)."


def test_a_report_says_where_unseen_rows_are_too_few_to_tell_a_rate() -> None:
    """Of 675 rows it said "0.0 times what was asked"; later rows had twice as many onsets as asked."""
    few, enough = (false_onsets(np.ones((3, rows, 1), np.float32), np.ones((rows, 1), bool))["0.001"] for rows in (675, 10_000))
    assert too_few(few).startswith(
        "At α = 0.001, 0.7 onsets were asked for in 675 unseen rows: how many there were is mostly chance. 10,000 rows or more tell a rate"
    )
    assert too_few(enough) == ""


def test_each_rate_is_measured_where_it_is_asked_for(univariate: DetectorStep, run: Runner) -> None:
    """A run at 1e-3 makes quiet streams more sensitive, up to a decade: its onsets below 1e-4 are not those of a service asked for 1e-4."""
    job = default_job(Plan(), "1", "", lanes=STREAMS, length=ROWS)
    quality, _ = _evaluate(univariate, job, run, Console(quiet=True))
    x, t = pad(job.evaluation, ROWS)
    onset_p = [run_streams(run, univariate.state_size, x, t, alpha=asked).onset_p for asked in ASKED]
    counts = [int((of_rate < asked).sum()) for of_rate, asked in zip(onset_p, ASKED, strict=True)]
    assert [row["onsets"] for row in quality["false_onsets_on_unseen_rows"].values()] == counts
    read_off_the_first = [int((onset_p[0] < asked).sum()) for asked in ASKED]
    assert read_off_the_first != counts
