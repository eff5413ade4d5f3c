"""The report of a run: report.png (loss curve, a stream with its band and scores), report.md and report.json.

report.html is what the backtest would write of the last rows of the streams.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.artifact import Manifest, find_artifacts
from service.backtest import Series, Tally, score
from service.detector import Detector, load_detectors
from service.errors import ArtifactError
from service.outputs import whole, write_text
from service.policy import Policy
from service.report import Subject
from service.report import write as write_page
from training.data import EPOCH_WEEKDAY, Stream, cut
from training.evaluate import Scores
from training.fit import Progress

SHOWN_FEATURES = 3
PAGE_STREAMS, PAGE_ROWS = 16, 5000
"""Streams on report.html, and their last rows."""
INK, QUIET, GLOW, ALARM = "#1f2933", "#9aa5b1", "#2f7ed8", "#d64545"


@dataclass(frozen=True)
class Shown:
    """The stream of the picture."""

    stream: Stream
    scores: Scores  # of one stream, B = 1
    names: list[str]
    first: int  # first row shown
    changed_at: int | None  # where an anomaly was injected
    anomaly: str


def draw(path: Path, progress: Progress, shown: Shown) -> None:
    """Loss on top; then the features that carry the injected anomaly; then the score."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes half a second, and one process of a run draws

    features = _most_telling(shown)
    figure = Figure(figsize=(11, 3 + 2.1 * (len(features) + 1)), layout="constrained")
    axes = figure.subplots(len(features) + 2, 1, height_ratios=[1.1, *([1.3] * len(features)), 1])
    _draw_loss(axes[0], progress)
    for axis, feature in zip(axes[1:-1], features, strict=True):
        _draw_feature(axis, shown, feature)
    _draw_score(axes[-1], shown)
    for axis in axes[1:]:
        axis.set_xlim(shown.first, len(shown.stream) - 1)
        axis.sharex(axes[1])
    axes[-1].set_xlabel("event of the stream")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """As a PNG. Raises NotWritten."""
    with whole(path) as place:
        figure.savefig(place, dpi=110, format="png")


def _most_telling(shown: Shown) -> list[int]:
    start = shown.changed_at or shown.first
    share = np.nan_to_num(shown.scores.contribution[start : start + 50, 0]).mean(axis=0)
    return [int(i) for i in np.argsort(-share)[:SHOWN_FEATURES]]


def _draw_loss(axis: Any, progress: Progress) -> None:
    for points, colour, label in ((progress.training, QUIET, "training (corrupted input)"), (progress.validation, GLOW, "validation")):
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4)
    axis.set_title("Loss by training step" if progress.training else "No network, nothing to train", loc="left", fontsize=10)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    _tidy(axis)


def _draw_feature(axis: Any, shown: Shown, feature: int) -> None:
    rows = np.arange(len(shown.stream))[shown.first :]
    part = slice(shown.first, None)
    lower, upper = shown.scores.lower[part, 0, feature], shown.scores.upper[part, 0, feature]
    actual = shown.stream.x[part, feature]
    axis.fill_between(rows, lower, upper, color=GLOW, alpha=0.15, linewidth=0, label="band")
    axis.plot(rows, shown.scores.expected[part, 0, feature], color=GLOW, linewidth=1.1, label="expected")
    axis.plot(rows, actual, color=INK, linewidth=0.8, label="actual")
    given = actual[np.isfinite(actual)]
    if len(given):
        margin = 0.25 * max(float(np.ptp(given)), 1e-9)
        axis.set_ylim(float(given.min()) - margin, float(given.max()) + margin)
    axis.set_title(f"{shown.stream.name} · {shown.names[feature]}", loc="left", fontsize=10, parse_math=False)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    _mark(axis, shown)
    _tidy(axis)


def _draw_score(axis: Any, shown: Shown) -> None:
    alpha = 1e-3
    rows = np.arange(len(shown.stream))[shown.first :]
    score = np.log(np.nan_to_num(shown.scores.p_value[shown.first :, 0], nan=1.0)) / np.log(alpha)
    alert = np.log(np.nan_to_num(shown.scores.onset_p[shown.first :, 0], nan=1.0)) / np.log(alpha)
    axis.plot(rows, score, color=QUIET, linewidth=0.9, label="anomaly_score")
    onsets = alert > 1
    axis.scatter(rows[onsets], alert[onsets], color=ALARM, s=22, zorder=3, label="alert (onset)")
    axis.axhline(1, color=ALARM, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, max(2.0, 1.1 * float(max(score.max(), alert.max()))))
    axis.set_title(f"log p / log α, α = {alpha:g}; above 1 is rarer than asked", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    _mark(axis, shown)
    _tidy(axis)


def _mark(axis: Any, shown: Shown) -> None:
    if shown.changed_at is not None:
        axis.axvline(shown.changed_at, color=ALARM, linewidth=0.8, alpha=0.6)
        axis.annotate(f" {shown.anomaly} injected", (shown.changed_at, 0.9), xycoords=("data", "axes fraction"), fontsize=8, color=ALARM)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def page(path: Path, model: Path, streams: Sequence[Stream], fitted: Sequence[int]) -> None:
    """The published model's backtest of these streams, as `python -m service backtest --report` draws it.

    The model was fitted to the first `fitted` rows of each. Raises NotWritten.
    """
    detector = Detector.load(model)
    policy = Policy(tau=detector.manifest.age_constant)
    series = [_series(cut(stream, max(0, len(stream) - PAGE_ROWS), len(stream))) for stream in streams[:PAGE_STREAMS]]
    tallies = [Tally(one.name) for one in series]
    score(series, detector, policy, lambda i, first, scored: tallies[i].add(first, scored))
    rows, left_out = sum(map(len, series)), [len(whole) - len(shown) for whole, shown in zip(streams, series, strict=False)]
    known = sum(max(0, first - before) for first, before in zip(fitted, left_out, strict=False))
    said = (
        f"{rows:,} rows of {len(series)} of {len(streams)} streams, {PAGE_ROWS:,} at most of each, as the published model scores them. "
        f"It was fitted to {f'{known:,}' if known else 'none'} of them{', the first of each stream' if known else ''}."
    )
    write_page(path, Subject(f"{detector.manifest.name} {detector.manifest.version}", said, detector, policy), tallies, series.__getitem__)


def _series(stream: Stream) -> Series:
    """With times that have the stream's gaps, hours and weekdays: its dates are not kept."""
    weekday, second = float(stream.t[0, 2]), float(stream.t[0, 1])
    gaps = np.nan_to_num(stream.t[1:, 0].astype(np.float64))
    seconds = (weekday - EPOCH_WEEKDAY) % 7 * 86_400 + second + np.r_[0.0, np.cumsum(gaps)]
    return Series(stream.name, (), seconds, np.asarray(stream.x, np.float32))


def servable(model: Path) -> str:
    """What to serve: the folder of a published file, or the file where its folder cannot be served as a whole, and why."""
    try:
        if len(find_artifacts(model.parent)) > 1:
            load_detectors(model.parent)
        return str(model.parent)
    except ArtifactError as error:
        return f"{model}      # the file: {error.detail}"


def write(folder: Path, manifest: Manifest, progress: Progress, model: Path, seconds: dict[str, float], next_steps: list[str]) -> None:
    """report.json for machines, report.md for people. Raises NotWritten."""
    content = {
        "model": model.name,
        "bytes": model.stat().st_size,
        "state_bytes": 4 * manifest.state_size,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "loss": {
            "training": progress.training,
            "validation": progress.validation,
            "best": progress.best_loss if progress.validation else None,
        },
        "quality": manifest.quality,
        "training": manifest.training.model_dump(),
    }
    write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")
    write_text(folder / "report.md", "\n".join(_markdown(manifest, progress, content, next_steps)) + "\n")


def _markdown(manifest: Manifest, progress: Progress, content: dict[str, Any], next_steps: list[str]) -> list[str]:
    cell, training = manifest.cell, manifest.training
    network = f"{cell.variant}, {cell.layers} × {cell.hidden} → code {cell.code} → {cell.decoder_hidden}"
    if cell.variant == "none":
        network = "none"
    shown = ("loss, a stream with its band, scores", "The last rows of its streams, their onsets and the calibration")
    if manifest.kind == "log":
        shown = ("loss, onsets measured against asked", "The most surprising lines held out, and the templates")
    best = f"Best validation loss {progress.best_loss:.4f}; " if progress.validation else ""
    lines = [
        f"# {manifest.name} {manifest.version}",
        "",
        manifest.description,
        "",
        f"- Features: {', '.join(manifest.feature_names)}",
        f"- Trained on {training.data}: {training.streams} streams, {training.rows} rows; `{training.command}`, seed {training.seed}",
        f"- Network: {network}; file {content['bytes']:,} bytes, {content['state_bytes']:,} bytes a stream",
        f"- {best}took {', '.join(f'{n} {s} s' for n, s in content['seconds'].items())}",
        "",
        f"![{shown[0]}](report.png)",
        "",
        f"{shown[1]}: [report.html](report.html)",
        "",
    ]
    for name, table in manifest.quality.items():
        lines += [f"## {name.replace('_', ' ').capitalize()}", "", *_table(table), ""]
    return [*lines, "## Next", "", *(f"    {step}" for step in next_steps)]


def _table(table: Any) -> list[str]:
    if isinstance(table, str):
        return [table]
    if not table or not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        return [f"`{json.dumps(table, ensure_ascii=False)}`"]
    columns = list(next(iter(table.values())))
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return head + [f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |" for name, row in table.items()]
