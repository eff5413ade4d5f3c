"""What a fit says of its false onsets is what a service would raise that is asked for that rate."""

from __future__ import annotations

from rich.console import Console

from training.data import pad
from training.detector import DetectorStep
from training.evaluate import ASKED, run_streams
from training.fit import Plan
from training.pipeline import _evaluate, default_job
from training.verify import Runner

STREAMS, ROWS = 32, 2500


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
