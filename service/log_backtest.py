"""The backtest of log files: which lines would have raised an alert, without a server.

    files ─► lines by stream, in order of time ─► codes ─► service.backtest.score, as for readings ─► OUT/lines.csv

A session that fell silent for the model's `session_seconds` has an end, which is a row without a line. Rows are in the order of time;
a stream's lines may lie in several files. Scores are those that the service gives of the same lines, to the last bit.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.artifact import GAP, NUMBERS, TEMPLATE, Lines
from service.backtest import Limits, Report, Scored, Series, Tally, score, tell
from service.detector import Detector
from service.errors import ArtifactError
from service.features import coded
from service.lines import plain
from service.log_files import Counted, LogFormat, Spoken, by_stream
from service.outputs import whole
from service.policy import Policy
from service.terminal import terminal

COLUMNS = (
    *("timestamp", "stream_id", "anomaly_score", "alert_score", "p_value", "is_anomaly", "template", "likeliest", "chance"),
    *("carried_by", "share", "line"),
)
FEATURES = (TEMPLATE, GAP, *NUMBERS)
ALERTS_SHOWN, SHOWN_LENGTH = 20, 160


def command(paths: Sequence[Path], detector: Detector, out: Path, policy: Policy, format_: LogFormat, json_file: Path | None) -> Report:
    """What `python -m service backtest` does with log files. Raises ArtifactError, TableError, NotWritten."""
    console, counted = terminal(), Counted()
    report, alerts = run(paths, detector, replace(policy, tau=detector.manifest.age_constant), out, format_, counted)
    words = detector.matcher.splitter.words if detector.matcher is not None else str.split
    for row in alerts[:ALERTS_SHOWN]:
        said = plain(" ".join(words(str(row[-1]))) or str(row[6]))  # without what it begins with: its time is there already
        scores = f"alert {float(str(row[3])):.2f}  p {float(str(row[4])):.1g}  {row[9]} {float(str(row[10])):.0%}"
        console.print(f"{row[0]}  ▲ {row[1]}  {scores}  {said}"[:SHOWN_LENGTH], highlight=False)
    if len(alerts) > ALERTS_SHOWN:
        console.print(
            f"{len(alerts) - ALERTS_SHOWN:,} more alerts: each opens at a row of {out / 'lines.csv'} with an alert_score above 1."
        )
    tell(console, report, out, json_file)
    console.print(counted.left_out)
    return report


Row = tuple[object, ...]


def run(
    paths: Sequence[Path],
    detector: Detector,
    policy: Policy,
    out: Path,
    format_: LogFormat,
    counted: Counted | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> tuple[Report, list[Row]]:
    """Score all lines into OUT/lines.csv; a tally for each stream, and the rows at which alerts open. Raises ArtifactError, TableError,
    NotWritten.
    """
    lines, matcher = detector.manifest.lines, detector.matcher
    if lines is None or matcher is None:
        raise ArtifactError(f"Model '{detector.manifest.name}' takes readings, not log lines: give one that was trained on logs.")
    began = time.perf_counter()
    spoken = by_stream(paths, replace(format_, timestamp=format_.timestamp or lines.header), lines.session_seconds, counted)
    F = len(detector.manifest.features)
    series = [Series(one.stream, (), one.seconds, coded(one.texts, F, lines, matcher).astype(np.float32)) for one in spoken]
    tallies = [Tally(one.stream) for one in spoken]
    pieces: list[list[Scored]] = [[] for _ in spoken]
    longest = sorted(range(len(series)), key=lambda i: len(series[i]), reverse=True)
    for first in range(0, len(longest), limits.group_files):
        group = longest[first : first + limits.group_files]

        def sink(i: int, at: int, scored: Scored, group: list[int] = group) -> None:
            pieces[group[i]].append(scored)
            tallies[group[i]].add(at, scored)

        score([series[i] for i in group], detector, policy, sink, limits)
    alerts = _write(out, spoken, series, pieces, lines, tallies)
    return Report(detector.manifest.filename, policy.alpha, time.perf_counter() - began, tallies), alerts


def _write(
    out: Path,
    spoken: Sequence[Spoken],
    series: Sequence[Series],
    pieces: Sequence[Sequence[Scored]],
    lines: Lines,
    tallies: Sequence[Tally],
) -> list[Row]:
    """OUT/lines.csv; returns its rows at which alerts open."""
    alerts: list[Row] = []
    starts = np.cumsum([0, *(len(one) for one in series)]).tolist()
    opening = {start + row for start, tally in zip(starts, tallies, strict=False) for row in tally.alert_rows}
    seconds = np.concatenate([one.seconds for one in spoken])
    rows = [row for which in range(len(spoken)) for row in _rows(spoken[which], series[which].x[:, 0], pieces[which], lines)]
    with whole(out / "lines.csv") as place, place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i in np.argsort(seconds, kind="stable").tolist():
            writer.writerow(rows[i])
            if i in opening:
                alerts.append(rows[i])
    return alerts


def _rows(spoken: Spoken, codes: NDArray[np.float32], pieces: Sequence[Scored], lines: Lines) -> Iterator[Row]:
    """Of one stream; floats are written by repr, which reads back to the same bits."""
    texts = lines.texts
    at = 0
    for piece in pieces:
        columns = (piece.anomaly_score.tolist(), piece.alert_score.tolist(), piece.p_value.tolist(), piece.is_anomaly.tolist())
        likely = piece.likely[:, [0, lines.likely]].tolist()
        carried = zip(piece.contribution.argmax(axis=1).tolist(), piece.contribution.max(axis=1).tolist(), strict=True)
        for anomaly, alert, p_value, flag, (code, chance), (most, share) in zip(*columns, likely, carried, strict=True):
            moment = datetime.fromtimestamp(float(spoken.seconds[at]), UTC).isoformat()
            expected = (texts[int(code)], chance) if code == code else ("", "")  # noqa: PLR0124 - NaN
            own, text = texts[int(codes[at])], spoken.texts[at]
            first = (text or "").lstrip().partition("\n")[0]
            yield (
                moment,
                spoken.stream,
                anomaly,
                alert,
                p_value,
                "true" if flag else "false",
                own,
                *expected,
                FEATURES[most],
                share,
                first,
            )
            at += 1
