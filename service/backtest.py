"""The same step and policy over whole files, as fast as the machine allows, without a server. `training` uses it too.

    files ─► groups of at most 256, the longest first ─► chunks of rows of all files of a group
             each chunk: rounds.advance, exactly as the live scorer calls it ─► a CSV per file, written as it goes

All files of a group are streams of one batch, stepped in lockstep. Causal: a row's score knows the rows before it and nothing else.
Memory is bounded by the inputs of one group and one chunk of results, whatever the number of files.

A row of a CSV: timestamp as read, anomaly_score, alert_score, p_value, is_anomaly, then <feature>_expected for each feature.
Numbers are written so that they read back as the served ones to the last bit. Scores are always finite: while the stream warms up,
and for a row that is late (older than one before it, so never stepped), the scores are 0, p_value is 1 and is_anomaly false.
<feature>_expected is empty where nothing can be expected yet.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Grid

from service.artifact import find_artifacts
from service.detector import Detector
from service.errors import ArtifactError, TableError
from service.events import Readings, some
from service.outputs import naming, whole, write_text
from service.policy import THRESHOLD, Policy, judge
from service.rounds import Kind, Outcomes, advance
from service.sentinels import Sentinels, advice, columns_of
from service.state import ALERT_OPEN
from service.tables import Notify, ReadOptions, Rowless, Source, as_float32, find_sources, once_each, passed_over, read_for, refuse_idle
from service.terminal import terminal

LISTED = 60
"""Inputs shown in the summary; of more, those with the most alerts."""
SOME = 5
"""Inputs named in a sentence."""
TAIL = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001)
"""p-values below which rows are counted: what was asked for beside what came."""
SCORE_COLUMNS = ("timestamp", "anomaly_score", "alert_score", "p_value", "is_anomaly")


@dataclass(frozen=True)
class Limits:
    """What bounds the memory; results do not depend on it."""

    group_files: int = 256
    """Files scored together, all in memory."""
    chunk_events: int = 32_768
    """Rows of all of them together between two writes."""


@dataclass(frozen=True)
class Series:
    """One input: N rows of the detector's F features in the manifest's order."""

    name: str
    timestamps: Sequence[str]  # [N] as read
    seconds: NDArray[np.float64]  # [N] since 1970
    x: NDArray[np.float32]  # [N, F], NaN = missing

    def __len__(self) -> int:
        return len(self.seconds)


@dataclass(frozen=True)
class Scored:
    """Results of consecutive rows of one series, as columns; finite (see the module's docstring)."""

    anomaly_score: NDArray[np.float64]  # [n]
    alert_score: NDArray[np.float64]  # [n]
    p_value: NDArray[np.float32]  # [n]
    is_anomaly: NDArray[np.bool_]  # [n]
    alerting: NDArray[np.bool_]  # [n] whether the stream's alert is open with this row
    expected: NDArray[np.float32]  # [n, F], NaN = nothing to expect yet; the same for the band
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]
    contribution: NDArray[np.float32]  # [n, F] shares of the features in the score
    judged: NDArray[np.bool_]  # [n] False = the detector gave no p-value
    kinds: NDArray[np.uint8]  # [n] of Kind
    likely: NDArray[np.float32]  # [n, 2L] of lines, as in StepOutput; L = 0 for readings


@dataclass
class Tally:
    """What became of one input's rows."""

    name: str
    rows: int = 0
    warming_up: int = 0
    """Rows stepped but without a p-value: the first of a stream, and those with every feature missing."""
    late: int = 0
    anomalous: int = 0
    onsets: int = 0
    """Rows with an alert score above 1: that open an alert, or go far beyond all before within an open one."""
    alerts: int = 0
    alert_rows: list[int] = field(default_factory=list)
    """Where alerts open; the first row is 0."""
    alerting: bool = False
    """Whether one is open with the last row."""
    greatest: float = 0.0
    """The greatest alert score."""
    rarer: list[int] = field(default_factory=lambda: [0] * len(TAIL))
    """Judged rows with a p-value below each number of TAIL."""

    def add(self, first: int, scored: Scored) -> None:
        late = scored.kinds == Kind.LATE
        stepped = np.flatnonzero(scored.kinds == Kind.SCORED)
        alerting = scored.alerting[stepped]
        opened = stepped[alerting & ~np.r_[self.alerting, alerting[:-1]][: len(alerting)]]
        self.rows += len(scored.kinds)
        self.late += int(late.sum())
        self.warming_up += int((~scored.judged & ~late).sum())
        self.anomalous += int(scored.is_anomaly.sum())
        self.onsets += int((scored.alert_score > THRESHOLD).sum())
        self.alerts += len(opened)
        self.alerting = bool(alerting[-1]) if len(alerting) else self.alerting
        self.greatest = max(self.greatest, float(scored.alert_score.max(initial=0.0)))
        self.alert_rows += (first + opened).tolist()
        p_value = scored.p_value[scored.judged]
        self.rarer = [n + int((p_value < level).sum()) for n, level in zip(self.rarer, TAIL, strict=True)]

    @property
    def rank(self) -> tuple[int, float]:
        """What to look at first is greatest: most inputs of a large fleet have as many alerts as others."""
        return self.alerts, self.greatest

    @property
    def judged(self) -> int:
        """Rows with a p-value."""
        return self.rows - self.warming_up - self.late


Sink = Callable[[int, int, Scored], None]
"""Takes (series, first row, results) of a piece of one series; pieces of a series come in order."""


def score(series: Sequence[Series], detector: Detector, policy: Policy, sink: Sink, limits: Limits = Limits()) -> None:
    """Score all rows of all series in lockstep and hand the results on piece by piece."""
    codec = detector.codec()
    rows = codec.fresh(len(series))
    chunk = max(1, limits.chunk_events // max(1, len(series)))
    for first in range(0, max(map(len, series), default=0), chunk):
        live = [i for i, one in enumerate(series) if first < len(one)]
        sizes = [min(chunk, len(series[i]) - first) for i in live]
        slots = np.repeat(np.array(live, np.intp), sizes)
        readings = _readings([series[i] for i in live], first, chunk)
        outcomes = advance(detector, policy, rows, readings, slots)
        ends = np.cumsum(sizes).tolist()
        for i, size, end in zip(live, sizes, ends, strict=True):
            sink(i, first, finite(outcomes, slice(end - size, end)))


def _readings(series: Sequence[Series], first: int, count: int) -> Readings:
    part = slice(first, first + count)
    seconds = np.concatenate([one.seconds[part] for one in series])
    n = len(seconds)
    names = [one.name for one in series for _ in range(len(one.seconds[part]))]
    x = np.concatenate([one.x[part] for one in series])
    return Readings(names, x, seconds, np.ones(n, np.bool_), np.full(n, -1, np.int64), np.zeros(n, np.uint64))


def finite(outcomes: Outcomes, part: slice) -> Scored:
    """Outcomes → the columns that are written."""
    records, kinds = outcomes.records[part], outcomes.kinds[part]
    verdicts = judge(records)
    p_value = records["p_value"]
    scored = (kinds == Kind.SCORED)[:, None]
    expected, lower, upper = (np.where(scored, records[name], np.float32(np.nan)) for name in ("expected", "lower", "upper"))
    return Scored(
        np.nan_to_num(verdicts.anomaly_score, nan=0.0),
        np.nan_to_num(verdicts.alert_score, nan=0.0),
        np.where(np.isnan(p_value), np.float32(1), p_value),
        verdicts.is_anomaly,
        records["flags"] & ALERT_OPEN != 0,
        expected,
        lower,
        upper,
        records["contribution"],
        ~np.isnan(p_value),
        kinds,
        records["likely"],
    )


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Report:
    """What a run did."""

    model: str
    alpha: float
    seconds: float
    tallies: list[Tally]
    rowless: list[str] = field(default_factory=list)
    """Inputs that have no rows; they have no tally."""
    sources: list[Source] = field(default_factory=list)
    """Of readings: where each tally is from."""
    sentinels: str = ""
    """Which values look like no readings, with what to do."""

    @property
    def rows(self) -> int:
        return sum(tally.rows for tally in self.tallies)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "alpha": self.alpha,
            "seconds": self.seconds,
            "inputs": [asdict(tally) for tally in self.tallies],
            "without_rows": self.rowless,
        }


def run(
    inputs: Sequence[Path],
    detector: Detector,
    policy: Policy,
    out: Path,
    options: ReadOptions,
    console: Console | None = None,
    limits: Limits = Limits(),
) -> Report:
    """Score every file under `inputs` that has rows into a CSV of the same relative path under `out`. Raises TableError, NotWritten."""
    console = console or terminal(stderr=True)
    began = time.perf_counter()
    sources = find_sources(inputs)
    refuse_idle(sources, options)
    targets = _targets(sources, out)
    by_size = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
    tallies, sentinels = dict[str, Tally](), Sentinels()
    with Progress(console=console, transient=True) as progress:
        if left := passed_over(inputs):
            progress.console.print(left)
        task, rowless = progress.add_task("scoring", total=None), Rowless(sources, progress.console.print)
        for first in range(0, len(by_size), limits.group_files):
            notify = once_each(progress.console.print)
            series = []
            for source in by_size[first : first + limits.group_files]:
                with rowless.left_out(source):
                    series.append(read_series(source, detector, options, notify, sentinels))
            progress.update(task, total=(progress.tasks[0].total or 0) + sum(map(len, series)))
            written = _score_group(series, detector, policy, targets, limits, lambda rows: progress.advance(task, rows))
            tallies |= {tally.name: tally for tally in written}
    rowless.refuse_all()
    scored = [source for source in sources if source.name in tallies]
    seconds, ordered = time.perf_counter() - began, [tallies[source.name] for source in scored]
    said = advice(sentinels.found(), "Each is scored, and lesser faults are not seen beside it for a while.")
    return Report(detector.manifest.filename, policy.alpha, seconds, ordered, rowless.names, scored, said)


def _targets(sources: Sequence[Source], out: Path) -> dict[str, Path]:
    """Input's name → its CSV. Raises TableError when two inputs would be written to the same one."""
    targets: dict[str, Path] = {}
    for source in sources:
        target = out / PurePosixPath(source.name).with_suffix(".csv")
        if target in targets.values():
            raise TableError(f"{source.path} and another input would both be written to {target}: run them one after the other.")
        if target.exists() and target.samefile(source.path):
            raise TableError(f"{target} would be overwritten with its own scores: name another folder with --out.")
        targets[source.name] = target
    return targets


def read_series(source: Source, detector: Detector, options: ReadOptions, notify: Notify, sentinels: Sentinels | None = None) -> Series:
    """One file for this detector; `sentinels` looks at it. Raises TableError."""
    table, values = read_for(source, detector.manifest.feature_names, options, notify)
    if sentinels is not None:
        sentinels.look(columns_of(source.name, detector.manifest.feature_names), values)
    x = as_float32(source, detector.manifest.feature_names, values, notify)
    return Series(source.name, table.written, table.timestamps, x)


def _score_group(
    series: Sequence[Series],
    detector: Detector,
    policy: Policy,
    targets: dict[str, Path],
    limits: Limits,
    advanced: Callable[[int], None],
) -> list[Tally]:
    """Score some series together and write their files; one tally each."""
    tallies = [Tally(one.name) for one in series]
    with ExitStack() as files:
        writers = []
        for one in series:
            place = files.enter_context(whole(targets[one.name]))
            writer = csv.writer(files.enter_context(place.open("w", newline="", encoding="utf-8")), lineterminator="\n")
            writer.writerow([*SCORE_COLUMNS, *(f"{name}_expected" for name in detector.manifest.feature_names)])
            writers.append(writer)

        def sink(i: int, first: int, scored: Scored) -> None:
            rows = len(scored.kinds)
            with naming(targets[series[i].name]):
                writers[i].writerows(csv_rows(series[i].timestamps[first : first + rows], scored))
            tallies[i].add(first, scored)
            advanced(rows)

        score(series, detector, policy, sink, limits)
    return tallies


def csv_rows(timestamps: Sequence[str], scored: Scored) -> Iterator[tuple[object, ...]]:
    """Lines of a CSV; floats are written by repr, which reads back to the same bits."""
    expected = [["" if number != number else number for number in row] for row in scored.expected.tolist()]  # noqa: PLR0124 - NaN
    flags = ("false", "true")
    columns = (scored.anomaly_score.tolist(), scored.alert_score.tolist(), scored.p_value.tolist(), scored.is_anomaly.tolist())
    for timestamp, anomaly, alert, p_value, flag, row in zip(timestamps, *columns, expected, strict=True):
        yield (timestamp, anomaly, alert, p_value, flags[flag], *row)


# ── command ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Done:
    """A run, and what it takes to score one of its inputs again."""

    report: Report
    detector: Detector
    policy: Policy
    options: ReadOptions

    def load(self, i: int) -> Series:
        """The i-th input once more."""
        return read_series(self.report.sources[i], self.detector, self.options, lambda message: None)


def command(
    inputs: Sequence[Path],
    detector: Detector,
    out: Path,
    policy: Policy,
    timestamp: str | None,
    exclude: Sequence[str],
    json_file: Path | None,
) -> Done:
    """What `python -m service backtest` does with readings; returns what its report is made from. Raises TableError, NotWritten."""
    console = terminal()
    options = ReadOptions(timestamp=timestamp, exclude=frozenset(exclude), unsorted=True)
    policy = replace(policy, tau=detector.manifest.age_constant)
    report = run(inputs, detector, policy, out, options)
    tell(console, report, out, json_file)
    for line in _left_unsaid(report, detector.manifest.warmup):
        console.print(line)
    return Done(report, detector, policy, options)


def _left_unsaid(report: Report, warmup: int) -> Iterator[str]:
    """Why rows have no score, where it is more than each stream's first ones."""
    late = sum(tally.late for tally in report.tallies)
    if late:
        yield f"{late:,} rows are late (older than a row before them): never stepped, score 0."
    backwards = [tally.name for tally in report.tallies if 2 * tally.late > tally.rows]
    if backwards:
        yield f"Most rows of {some(backwards, SOME)} are late: where the newest row is the first, sort the file by time."
    if report.sentinels:
        yield report.sentinels
    unjudged = [tally.name for tally in report.tallies if not tally.judged and tally.name not in backwards]
    if unjudged:
        yield (
            f"Nothing of {some(unjudged, SOME)} was judged, so that there is no alert says nothing: "
            f"from the first {warmup:,} rows of a stream the detector only learns."
        )


def tell(console: Console, report: Report, out: Path, json_file: Path | None) -> None:
    """The summary, and where the scores are. Raises NotWritten."""
    console.print(_summary(report))
    console.print(f"{report.rows:,} rows in {report.seconds:.1f} s, {report.rows / report.seconds:,.0f} rows/s, written to {out}")
    if report.rowless:
        console.print(f"{len(report.rowless):,} of {len(report.rowless) + len(report.tallies):,} inputs have no rows and are left out.")
    if json_file:
        write_text(json_file, json.dumps(report.as_json(), indent=2))


def load_one(model: Path) -> Detector:
    """The one detector that `model` names. Raises ArtifactError when a folder holds several."""
    files = find_artifacts(model)
    if len(files) > 1:
        raise ArtifactError(f"{model} holds {len(files)} models: name one of {', '.join(file.name for file in files)} with --model.")
    return Detector.load(files[0])


def _summary(report: Report) -> Grid:
    grid = Grid(title=f"Backtest with {report.model} at a false-alarm rate of {report.alpha:g}", box=box.SIMPLE)
    grid.add_column("input", overflow="fold")
    for column in ("rows", "judged", "late", "alerts", "alerts per 1000 judged", "onsets", "anomalous rows"):
        grid.add_column(column, justify="right")
    shown = sorted(report.tallies, key=lambda tally: tally.rank, reverse=True)[:LISTED] if len(report.tallies) > LISTED else report.tallies
    for tally in [*shown, total(report.tallies)]:
        rate, share = (per * number / max(1, tally.judged) for per, number in ((1000, tally.alerts), (100, tally.anomalous)))
        counts = (f"{number:,}" for number in (tally.rows, tally.judged, tally.late, tally.alerts))
        grid.add_row(tally.name, *counts, f"{rate:.2f}", f"{tally.onsets:,}", f"{share:.2f} %")
    return grid


def total(tallies: Sequence[Tally]) -> Tally:
    """Of all inputs together; without their rows of alerts."""
    whole = Tally("all")
    for tally in tallies:
        for name in ("rows", "warming_up", "late", "anomalous", "onsets", "alerts"):
            setattr(whole, name, getattr(whole, name) + getattr(tally, name))
        whole.greatest = max(whole.greatest, tally.greatest)
        whole.rarer = [mine + other for mine, other in zip(whole.rarer, tally.rarer, strict=True)]
    return whole
