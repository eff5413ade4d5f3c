"""A log detector from files to published artifact, told in order.

log files ─► templates (training.lines) ─► codes ─► sessions ─┐
files of key sequences ───────────────────────────────────────┴─► fit ─► export ─► publish (verifies, refuses) ─► report
"""

from __future__ import annotations

import hashlib
import html
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from service.artifact import GAP, NEW, NUMBERS, TEMPLATE, Feature, Lines
from service.errors import TableError
from service.lines import Matcher, plain
from service.log_files import Counted, Entry, LogFormat, files_of, read
from service.outputs import write_text
from service.tables import Notify
from training import report
from training.autoencoder import Sizes
from training.data import Float32, Float64
from training.export import manifest_of, publish, to_onnx, training_record
from training.fit import Progress
from training.lines import Idle, Mining, mine
from training.logfit import (
    ENOUGH_NUMBERS,
    Fitted,
    Held,
    LogPlan,
    Place,
    by_session,
    calibration_of,
    fit,
    onset_p_of,
    side_by_side,
    smallest_of,
)
from training.logs import LogStep
from training.sessions import MOST_NUMBERS, Ints, Session, Sessions, read_sessions

ASKED = (1e-2, 1e-3, 1e-4)
HELD_OUT = "onsets_on_lines_held_out"
"""Neither the network nor the tail saw the sessions: both are of the other folds."""
FAULTS_FOUND = "injected_faults_found"
SHOWN_LINES, SHOWN_LENGTH, SHOWN_BEFORE = 20, 300, 3
CODED_AT_ONCE = 10_000
NO_CODES: Ints = np.zeros(0, np.int64)
MAX_LINES = 5_000_000
"""Lines of a training run: they are kept in memory as codes, with the first SHOWN_LENGTH characters of each."""
Step = Callable[[str], object]
"""Told now and then what is being done, and how far that is."""


@dataclass(frozen=True)
class LogJob:
    """What is to be made, from what."""

    name: str
    version: str
    data: Sessions
    lines: Lines
    sizes: Sizes
    plan: LogPlan
    command: str
    files: str
    keep_network: bool = False
    """Also where injected faults are found as well without it."""

    @property
    def numbers(self) -> int:
        """How many numbers a line has, where any of them come often enough to be judged."""
        often = sum((np.isfinite(session.numbers).sum(axis=0) for session in self.data.sessions), np.zeros(MOST_NUMBERS, np.int64))
        return int(np.flatnonzero(often >= ENOUGH_NUMBERS).max(initial=-1)) + 1


def keys_of(paths: Sequence[Path], session_seconds: float | None) -> tuple[Sessions, Lines]:
    """Files of key sequences: a key is its own template, and a line that is sent to the service is a key."""
    data = read_sessions(paths)
    return data, Lines(templates=data.templates, session_seconds=session_seconds)


def sessions_of(
    paths: Sequence[Path],
    format_: LogFormat,
    mining: Mining,
    session_seconds: float | None,
    known: Sequence[str] = (),
    said: Counted | None = None,
    notify: Notify = lambda _: None,
    doing: Step = lambda _: None,
    most: int = MAX_LINES,
) -> tuple[Sessions, Lines]:
    """Log files: templates are mined from all lines and from `known` ones. Raises TableError; for too many lines once it has met them.

    Tells of masks that no line needs, and of `known` lines that the files have none like.
    """
    mining = replace(mining, header=format_.header)
    idle = Idle(mining)
    lines = mine(_texts(paths, format_, known, idle, doing, most), mining, session_seconds)
    for sentence in idle.said():
        notify(sentence)
    streams = _coded(paths, format_, lines, said, doing)
    for sentence in _absent(known, lines, streams.values()):
        notify(sentence)
    newest = max((float(np.nanmax(coded.times)) for coded in streams.values() if np.isfinite(coded.times).any()), default=np.nan)
    sessions = [session for name, coded in streams.items() for session in _sessions(name, coded, session_seconds, newest)]
    if not sessions:
        raise TableError(f"{', '.join(map(str, paths))}: no line of a stream in there; see `python -m training lines`.")
    digest = hashlib.sha256()
    for path in files_of(paths):
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return Sessions(sessions, lines.templates, digest.hexdigest()), lines


def _absent(known: Sequence[str], lines: Lines, streams: Iterable[Coded]) -> Iterator[str]:
    """Which templates of `known` lines no line of the streams has: what never came is as rare as what is new."""
    came = np.unique(np.concatenate([NO_CODES, *(coded.codes for coded in streams)]))
    absent = np.setdiff1d(Matcher(lines).codes(list(known))[0].astype(np.int64), [NEW, *came.tolist()])
    if len(absent):
        yield (
            f"{len(absent):,} of the patterns that are given come in no line of these files, such as {plain(lines.texts[absent[0]])!r}: "
            "they have templates now, but stay as rare as new ones, and alert as those do. "
            "Train on files that have them, too, such as those of the last days."
        )


def _texts(paths: Sequence[Path], format_: LogFormat, known: Sequence[str], idle: Idle, doing: Step, most: int) -> Iterator[str]:
    count = 0
    for entries in _in_pieces(read(paths, format_)):
        count += len(entries)
        if count > most:  # before any of them has cost more than to be read
            raise TableError(
                f"More than {most:,} lines, which are kept in memory while a model is made: train on a part of them, such as the last "
                "weeks, or on some hosts of many that are alike. In the files as given they are reached in the stream "
                f"'{entries[-1].stream[:64]}'."
            )
        doing(f"Finding templates: {count:,} lines")
        for entry in entries:
            idle.look(entry.text)
            yield entry.text
    for text in known:
        idle.look(text)
        yield text


@dataclass(frozen=True)
class Coded:
    """The lines of one stream, in order of time."""

    codes: Ints  # [T]
    times: Float64  # [T]
    numbers: Float32  # [T, 4]
    texts: list[str]


def _coded(paths: Sequence[Path], format_: LogFormat, lines: Lines, said: Counted | None, doing: Step) -> dict[str, Coded]:
    """By stream."""
    matcher = Matcher(lines)
    streams: dict[str, list[tuple[float, float, Float32, str]]] = {}
    count = 0
    for entries in _in_pieces(read(paths, format_, said)):
        count += len(entries)
        doing(f"Matching lines: {count:,}")
        codes, numbers = matcher.codes([entry.text for entry in entries])
        for entry, code, number in zip(entries, codes, numbers, strict=True):
            streams.setdefault(entry.stream, []).append((float(code), entry.seconds, number, entry.text[:SHOWN_LENGTH]))
    ordered = {}
    for name, rows in streams.items():
        if all(np.isfinite(row[1]) for row in rows):
            rows.sort(key=lambda row: row[1])
        codes_, times, numbers_, texts = zip(*rows, strict=True)
        ordered[name] = Coded(np.array(codes_, np.int64), np.array(times, np.float64), np.stack(numbers_), list(texts))
    return ordered


def _in_pieces(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    piece: list[Entry] = []
    for entry in entries:
        piece.append(entry)
        if len(piece) == CODED_AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece


def _sessions(name: str, coded: Coded, silence: float | None, newest: float) -> list[Session]:
    """One that never ends, or as many as there are silences; the last one has ended where the files go on that long."""
    codes, times = coded.codes, coded.times
    gaps = np.diff(times, prepend=np.nan).astype(np.float32)
    whole = Session(name, codes, gaps, coded.numbers, ended=False, lines=tuple(coded.texts))
    if silence is None:
        return [whole]
    starts = np.flatnonzero(np.r_[True, gaps[1:] > silence])
    sessions = []
    for start, stop in itertools.pairwise([*starts.tolist(), len(codes)]):
        piece = replace(whole.cut(start, stop), first=True, ended=stop < len(codes) or bool(newest - times[-1] > silence))
        piece.gaps[0] = np.nan
        sessions.append(piece)
    return sessions


def produce(job: LogJob, out: Path, *, threads: int = 1, console: Console | None = None) -> Path:
    """Make the model of `job` and its report in `out`; returns the published file. Raises ArtifactError when it is refused."""
    if job.sizes.cell == "none":
        raise TableError("A log model has a network: `none` is for readings. `memoryless` is what an LSTM has to beat here.")
    torch.set_num_threads(threads)
    console = console or Console(quiet=True)
    out.mkdir(parents=True, exist_ok=True)
    seconds, losses, began = {}, list[float](), time.monotonic()
    replaced = (out / f"{job.name}-{job.version}.onnx").is_file()
    with console.status("Training") as status:
        steps = (job.plan.folds + 1) * job.plan.steps

        def on_step(loss: float) -> None:
            losses.append(loss)
            if len(losses) % 10 == 0:
                left = (time.monotonic() - began) / len(losses) * (steps - len(losses))
                status.update(f"Training, step {len(losses):,} of {steps:,}, loss {loss:.3f}, about {left / 60:.0f} min left of these")

        fitted = fit(job.data, job.sizes, job.plan, job.numbers, on_step, job.keep_network)
    step, held = fitted.step, fitted.held
    seconds["training"] = time.monotonic() - began
    with console.status("Exporting and verifying"):
        observed, places = side_by_side(held, len(step.signals))
        onset_p = onset_p_of(step.tail, observed)
        odd = most_surprising(held, places, onset_p, job.lines)
        validated = onsets_held_out(fitted, _asked(fitted))
        quality = _quality(fitted, validated)
        record = training_record(
            command=job.command,
            seed=job.plan.seed,
            data=job.files,
            data_sha256=job.data.sha256,
            streams=job.data.streams,
            rows=job.data.lines,
        )
        manifest = manifest_of(
            step,
            name=job.name,
            version=job.version,
            features=[Feature(name=name) for name in (TEMPLATE, GAP, *NUMBERS)[: step.features]],
            training=record,
            description=f"Log lines of {job.data.streams:,} stream(s) by {len(job.lines.templates):,} templates.",
            quality=quality,
            lines=job.lines,
        )
        model = publish(step, to_onnx(step), manifest, out)
    seconds["in all"] = time.monotonic() - began
    last = losses[-job.plan.steps :]
    reached = Progress(training=list(enumerate(last, start=1)))
    _draw(out / "report.png", last, validated[1e-3].onset_p)
    next_steps = [
        f"python -m service serve --model {report.servable(model)}",
        f"python -m service backtest FILES... --model {model} --out scores/     # with the same --time-format and the like",
    ]
    report.write(out, manifest, reached, model, seconds, next_steps)
    write_text(out / "report.html", _page(job, manifest.name, quality, odd))
    _tell(console, job, step, model, quality, odd, seconds["in all"])
    if replaced:
        console.print(
            "It replaces a file of the same name: streams that a service scores by that begin anew. Another --version leaves it as it is.",
            style="yellow",
        )
    console.print("Next:")
    for command in next_steps:
        console.print(f"  {command}", soft_wrap=True, highlight=False)
    return model


@dataclass(frozen=True)
class HeldOut:
    """What begins an anomaly in sessions that neither the judging network nor its tail saw."""

    onset_p: Float64  # [lines], ends among them
    smallest: Float64  # [sessions]


def onsets_held_out(fitted: Fitted, asked: Sequence[float] = ASKED) -> dict[float, HeldOut]:
    """At each rate, as it would be asked for: each fold by a tail of the other ones; nothing where there is but one fold."""
    step, weights = fitted.step, fitted.step.calibration.weights or (1.0,)
    parts = {rate: [HeldOut(np.ones(0), np.ones(0))] for rate in asked}
    for own, others in fitted.held.folds():
        observed, places = side_by_side(own, len(step.signals))
        tail = step.tail_of(calibration_of(step, others, weights[0]))
        for rate, found in parts.items():
            onset_p = onset_p_of(tail, observed, rate)
            found.append(HeldOut(onset_p[observed.valid], smallest_of(onset_p, own, places)))
    return {
        rate: HeldOut(np.concatenate([part.onset_p for part in found]), np.concatenate([part.smallest for part in found]))
        for rate, found in parts.items()
    }


def _quality(fitted: Fitted, validated: dict[float, HeldOut]) -> dict[str, Any]:
    measured = {}
    for asked, found in validated.items():
        lines = len(found.onset_p)
        if not lines:
            continue
        onsets = int((found.onset_p < asked).sum())
        ratio = round(onsets / lines / asked, 3)
        reported = int((found.smallest < asked).sum())
        measured[f"{asked:.2g}"] = {"asked": asked, "lines": lines, "onsets": onsets, "ratio": ratio, "sessions reported": reported}
    weights = dict(zip(fitted.step.signals, fitted.step.calibration.weights or (), strict=False))
    quality: dict[str, Any] = {HELD_OUT: measured, "signals": {"names": list(fitted.step.signals), "weights": weights}}
    if fitted.found.smallest:
        quality[FAULTS_FOUND] = _faults(fitted)
    quality["published"] = f"{'with' if fitted.with_network else 'without'} the network's chances of lines"
    if fitted.alpha is not None:
        quality["recommended_alpha"] = fitted.alpha
    if (events := sum(map(len, fitted.held.nats))) < 10_000:
        quality["warning"] = f"Calibrated on {events:,} events held out: chances below {10 / events:.1g} are a guess."
    return quality


def _asked(fitted: Fitted) -> list[float]:
    return sorted({*ASKED, *([fitted.alpha] if fitted.alpha is not None else [])}, reverse=True)


def _faults(fitted: Fitted) -> dict[str, dict[str, float]]:
    """Fault → with or without the network, at which rate → share found."""
    table: dict[str, dict[str, float]] = {kind: {} for kind in fitted.found.smallest}
    for name, found in (("network", fitted.found), ("without", fitted.found_without)):
        for asked in _asked(fitted):
            for kind, share in found.shares(asked).items():
                table[kind][f"{name}, {asked:.2g}"] = round(share, 3)
    return table


@dataclass(frozen=True)
class Odd:
    """A line of a session held out that was among the most surprising ones."""

    onset_p: float
    stream: str
    line: str
    before: list[str]


def most_surprising(held: Held, places: Sequence[Place], onset_p: Float64, lines: Lines) -> list[Odd]:
    """The SHOWN_LINES with the smallest p, one of a session at most, as they were written, or else their templates."""
    texts = lines.texts
    found = [(float(p.min()), i, int(p.argmin())) for i, p in by_session(onset_p, held, places)]
    odd = []
    for value, i, place in sorted(found)[:SHOWN_LINES]:
        session = held.sessions[i]
        said = [*(session.lines or [texts[code] for code in session.codes]), texts[-1]]
        if value < 1:
            odd.append(Odd(value, session.stream, said[place], said[max(0, place - SHOWN_BEFORE) : place]))
    return odd


def _draw(path: Path, losses: Sequence[float], onset_p: Float64) -> None:
    """The loss of the published network, and how often onsets as rare come in sessions held out against how often they should."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - see training.report
    from matplotlib.ticker import NullFormatter  # noqa: PLC0415

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, color=report.GLOW, linewidth=1.2)
    left.set_title("Loss by training step", loc="left", fontsize=10)
    ordered = np.sort(onset_p[onset_p < 1])
    if len(ordered):
        right.loglog(ordered, np.arange(1, len(ordered) + 1) / len(onset_p), color=report.INK, linewidth=1.2, label="measured")
        right.loglog([ordered[0], ordered[-1]], [ordered[0], ordered[-1]], color=report.ALARM, linestyle=":", label="asked")
        right.xaxis.set_minor_formatter(NullFormatter())  # over less than a decade they would lie over each other
        right.legend(frameon=False, fontsize=8)
    right.set_title("Share of lines held out that begin an anomaly, by p", loc="left", fontsize=10)
    report.save_figure(figure, path)


def _page(job: LogJob, name: str, quality: dict[str, Any], odd: Sequence[Odd]) -> str:
    """report.html: the most surprising lines held out, and the templates."""
    counts = np.bincount(np.concatenate([session.codes for session in job.data.sessions]), minlength=job.data.codes)
    surprising = [(f"{one.onset_p:.2g}", one.stream, one.line, "\n".join(one.before)) for one in odd]
    templates = [(str(code), f"{counts[code]:,}", text) for code, text in enumerate(job.lines.templates, start=1)]
    columns = ("lines", "onsets", "ratio", "sessions reported")
    measured = [(asked, *(f"{row[column]:,}" for column in columns)) for asked, row in quality[HELD_OUT].items()]
    faults = [(kind, *map(str, row.values())) for kind, row in quality.get(FAULTS_FOUND, {}).items()]
    rates = tuple(next(iter(quality.get(FAULTS_FOUND, {"": {}}).values())))
    style = (
        "body{font:14px system-ui;margin:2em;color:#1f2933}td,th{text-align:left;padding:.2em .8em;vertical-align:top;white-space:pre-wrap}"
    )
    return "\n".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(name)}</title><style>{style}</style>",
            f"<h1>{html.escape(name)} {html.escape(job.version)}</h1>",
            f"<p>{_size(job)}; <code>{html.escape(job.command)}</code></p>",
            "<img src='report.png' alt='loss, and onsets measured against asked' style='max-width:100%'>",
            _rows("Onsets in sessions held out", ("asked", "lines", "onsets", "measured / asked", "sessions reported"), measured),
            _rows("Injected faults found, by the rate that is asked for", ("fault", *rates), faults),
            _rows("The most surprising lines held out", ("p", "stream", "line", "lines before"), surprising),
            _rows("Templates", ("code", "lines", "template"), templates),
            "</html>",
        ]
    )


def _size(job: LogJob) -> str:
    return f"{job.data.lines:,} lines of {job.data.streams:,} streams in {len(job.data.sessions):,} sessions"


def _rows(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{cells}</tr>{lines}</table>"


def _tell(console: Console, job: LogJob, step: LogStep, model: Path, quality: dict[str, Any], odd: Sequence[Odd], seconds: float) -> None:
    console.print(f"\nPublished {model}: {model.stat().st_size:,} bytes, {4 * step.state_size:,} bytes a stream, {seconds:.0f} s in all.")
    console.print(f"{_size(job)}, {len(job.lines.templates):,} templates.")
    if "warning" in quality:
        console.print(quality["warning"], style="yellow")
    if measured := quality[HELD_OUT].get("0.001"):
        console.print(
            f"Onsets at α = 0.001 on {measured['lines']:,} lines that neither network nor tail saw: {measured['onsets']}, "
            f"{measured['ratio']} times what was asked."
        )
    if FAULTS_FOUND in quality:
        console.print("Injected faults: see the report.")
    console.print(f"Published {quality['published']}.")
    if "recommended_alpha" in quality:
        console.print(f"Recommended: ONSET_ALPHA={quality['recommended_alpha']:.2g}, at which most of them are found for the false alarms.")
    console.print(f"Report: {model.parent / 'report.md'}")
    for one in odd[:3]:
        console.print(f"  p {one.onset_p:.1g}  {one.stream}: {plain(one.line)}"[:200], highlight=False)
