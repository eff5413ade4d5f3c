"""Samples of raw lines, end to end: files, templates, training, published model, backtest, and only then the labels.

Of the 2,000 lines of loghub's BGL and Thunderbird the first 1,400 are learned from, whatever they are labelled, as one stream, and the
others are scored by the published file. The samples jump over months: new patterns come all the time, and the templates of two fifths
(BGL) and an eighth (Thunderbird) of the lines are not among those learned.
So this shows that raw lines go through; for a claim of quality the samples are too small.
"""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bench.lines import RAW
from bench.report import table
from service import log_backtest
from service.artifact import NEW_TEXT
from service.detector import Detector
from service.log_files import LogFormat
from service.policy import Policy
from training.data import Float64
from training.faults import average_precision
from training.lines import Mining
from training.logfit import LOG_SIZES, LogPlan
from training.logpipeline import LogJob, produce, sessions_of

RAW_SETS = {"bgl": "BGL", "thunderbird": "Thunderbird"}
LEARNED = 1400
ALPHA = 1e-3


@dataclass(frozen=True)
class RawRow:
    """One method on the lines of a sample that were not learned from. Shares are 0 to 1."""

    set: str
    method: str
    templates: int
    lines: int
    labelled: int
    new: int
    """Lines that match no template."""
    reported: int
    found: int
    """Labelled lines among the reported ones."""
    precision: float | None
    """Average precision; None where no line is labelled. A random score has the share of labelled lines."""


def raw_rows(name: str, data: Path, steps: int) -> list[RawRow]:
    """Learn, publish, score. Raises FileNotFoundError where `data` lacks the sample."""
    system, format_ = RAW_SETS[name], LogFormat(RAW[f"{RAW_SETS[name]}, raw"], "%s")
    folder = data / "loghub_2k"
    lines = (folder / f"{system}_2k.log").read_text(encoding="utf-8").splitlines()
    with (folder / f"{system}_2k.log_structured.csv").open(newline="", encoding="utf-8") as rows:
        labels = np.array([row["Label"] != "-" for row in csv.DictReader(rows)])[LEARNED:]
    with tempfile.TemporaryDirectory() as made:
        learned, scored = Path(made) / "learned.log", Path(made) / "scored.log"
        learned.write_text("\n".join(lines[:LEARNED]) + "\n", encoding="utf-8")
        scored.write_text("\n".join(lines[LEARNED:]) + "\n", encoding="utf-8")
        sessions, templates = sessions_of([learned], format_, Mining(), None)
        job = LogJob(name, "1", sessions, templates, LOG_SIZES, replace(LogPlan(), steps=steps), "python -m bench.logs", learned.name)
        detector = Detector.load(produce(job, Path(made) / "model"))
        log_backtest.run([scored], detector, Policy(alpha=ALPHA), Path(made) / "scores", format_)
        with (Path(made) / "scores" / "lines.csv").open(newline="", encoding="utf-8") as answers:
            rows_ = list(csv.DictReader(answers))
    labels = labels[_in_time(lines[LEARNED:])]
    codes = {text: code for code, text in enumerate(templates.templates, start=1)}
    often = Counter(int(code) for session in sessions.sessions for code in session.codes)
    new = np.array([row["template"] == NEW_TEXT for row in rows_])
    rare = np.array([-np.log(often[codes.get(row["template"], 0)] + 0.5) for row in rows_])
    ours = np.array([-np.log(float(row["p_value"])) for row in rows_])
    alerts = np.array([float(row["alert_score"]) > 1 for row in rows_])
    random = np.random.default_rng(0).random(len(labels))
    made_ = [
        ("random", random, random > 1 - ALPHA),
        ("new pattern", new.astype(np.float64), new),
        ("rarity of the template", rare, np.zeros(len(labels), bool)),
        ("ours", ours, alerts),
    ]
    return [_row(name, method, len(templates.templates), labels, new, score, told) for method, score, told in made_]


def _in_time(lines: Sequence[str]) -> NDArray[np.intp]:
    """The order in which the backtest has them."""
    return np.argsort(np.array([float(line.split()[1]) for line in lines]), kind="stable")


def _row(
    name: str, method: str, templates: int, labels: NDArray[np.bool_], new: NDArray[np.bool_], score: Float64, told: NDArray[np.bool_]
) -> RawRow:
    precision = average_precision(score, labels) if labels.any() else None
    found = int((told & labels).sum())
    return RawRow(name, method, templates, len(labels), int(labels.sum()), int(new.sum()), int(told.sum()), found, precision)


def raw_table(rows: Sequence[RawRow]) -> Table:
    numbers = ("templates", "lines scored", "labelled", "new patterns", "reported", "of them labelled", "average precision")
    made = table(f"Raw lines end to end, first {LEARNED:,} learned from, α = {ALPHA:g}", ("set", "method"), numbers)
    for one in rows:
        counts = (one.templates, one.lines, one.labelled, one.new, one.reported, one.found)
        made.add_row(one.set, one.method, *map(str, counts), f"{one.precision:.3f}" if one.precision is not None else "–")
    return made
