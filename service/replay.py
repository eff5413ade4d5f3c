"""Recorded data posted as if it happened now: paced by the recorded times, safe to interrupt and to repeat.

    files ─► streams ─► events in order of time ─► requests, one at a time ─► POST /v1/events ─► onsets as they happen, summary

Each event carries an identity made of its stream and row, and each request is sent again until it is answered, so a service that is
killed on the way loses nothing, and a replay that is interrupted goes on where it was when it is started again: what was scored
before is answered from the store and never scored twice.
"""

from __future__ import annotations

import contextlib
import csv
import heapq
import io
import itertools
import json
import random
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

import httpx
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Grid

from service.artifact import NEW_TEXT
from service.errors import NotWritten, OnsetError
from service.log_files import LogFormat, by_stream
from service.outputs import naming
from service.tables import ReadOptions, Rowless, Source, Table, find_sources, read_for
from service.terminal import terminal

RETRY_STATUS = frozenset({429, 502, 503, 504})
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between tries: doubled from the first to the longest, or what Retry-After says."""
REQUEST_SECONDS = 60.0
TOLD_SECONDS = 3600.0
"""Age of an event from which no sink is told of its alert, unless the service has another ONSET_ALERTS_MAX_AGE_SECONDS."""
SHOWN_REFUSALS = 5
LISTED = 40
"""Streams of the tables at the end; of more, those with the most anomalies."""
ALL_CONTRIBUTORS = 300
"""As many as a model can have features: the summary adds them all up."""
Timestamps = Literal["original", "now"]


class ReplayFailed(OnsetError):
    """The replay cannot go on."""


@dataclass(frozen=True)
class Options:
    """How to replay."""

    url: str
    model: str | None = None
    """Which of the served models scores; None: the service's default."""
    speed: float = 1.0
    """Recorded seconds a second; infinite = as fast as the service answers."""
    timestamps: Timestamps = "original"
    stream: str | None = None
    """All files are one stream of this name; None: each file is a stream named after it."""
    batch: int = 1000
    """Events of a request at most."""
    top: int = 3
    """Contributors shown."""
    patience: float = 120.0
    """Seconds to go on trying while nothing is answered."""


# ── recordings ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Recording:
    """One file as a stream: N rows of the model's F features; or one stream of log files: N lines."""

    stream: str
    source: str  # path as given: part of each event's identity
    seconds: NDArray[np.float64]  # [N] since 1970
    values: NDArray[np.float64]  # [N, F], NaN = missing
    lines: Sequence[str | None] | None = None  # [N] in place of values; None = the end of a session


def record(sources: Sequence[Source], tables: Sequence[tuple[Table, NDArray[np.float64]]], stream: str | None) -> list[Recording]:
    """Name the streams: `stream` for all, or each file by its path without suffix."""
    names = [stream or str(PurePosixPath(source.name).with_suffix("")) for source in sources]
    twice = sorted(name for name, count in Counter(names).items() if count > 1) if stream is None else []
    if twice:
        raise ReplayFailed(f"Two files would be stream '{twice[0]}': replay them one after the other, or name the stream with --stream.")
    pairs = zip(names, sources, tables, strict=True)
    return [Recording(name, source.path.as_posix(), table.timestamps, values) for name, source, (table, values) in pairs]


def record_lines(files: Sequence[Path], model: Served, format_: LogFormat, stream: str | None) -> list[Recording]:
    """Log files; what is cut off before the message is the model's to say, where the format does not. Raises TableError."""
    format_ = replace(format_, timestamp=format_.timestamp or model.header)
    found = by_stream(files, format_, model.session_seconds)
    if stream is not None and len(found) > 1:
        raise ReplayFailed(f"{len(found)} streams cannot be one: leave --stream out, or leave --stream-regex out for one file.")
    nothing = np.zeros((0, 0))
    return [Recording(stream or one.stream, f"{one.source}:{one.stream}", one.seconds, nothing, one.texts) for one in found]


def in_order(recordings: Sequence[Recording], *, together: bool) -> Iterator[tuple[float, Recording, int]]:
    """(seconds since the replay's start, recording, row) of all rows, in order of time.

    `together`: the recordings are independent streams and all begin at once. Otherwise they are parts of one, at their recorded times.
    """
    first = min((float(one.seconds.min()) for one in recordings), default=0.0)

    def rows(one: Recording) -> Iterator[tuple[float, Recording, int]]:
        start = float(one.seconds.min()) if together else first
        # A time that goes back is sent in its place and is the service's business.
        due = np.maximum.accumulate(one.seconds - start).tolist()
        return ((at, one, row) for row, at in enumerate(due))

    return heapq.merge(*(rows(one) for one in recordings), key=lambda item: item[0])


class Pace:
    """Hands events out when they are due, in portions of at most `batch`."""

    def __init__(self, speed: float, batch: int, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep):
        self._speed, self._batch = speed, batch
        self._clock, self._sleep = clock, sleep

    def portions(self, events: Iterable[tuple[float, Recording, int]]) -> Iterator[list[tuple[Recording, int]]]:
        waiting = iter(events)
        began = self._clock()
        first = next(waiting, None)
        while first is not None:
            self._sleep(max(0.0, first[0] / self._speed - (self._clock() - began)))
            now = (self._clock() - began) * self._speed if self._speed != float("inf") else float("inf")
            portion = [first[1:]]
            first = next(waiting, None)
            while first is not None and first[0] <= now and len(portion) < self._batch:
                portion.append(first[1:])
                first = next(waiting, None)
            yield portion


class Encoder:
    """Rows → events as JSON lines. Replayed again, an event keeps its identity, unless its timestamp is new."""

    def __init__(self, features: Sequence[str], timestamps: Timestamps, clock: Callable[[], float] = time.time) -> None:
        self._features = features
        self._now = clock if timestamps == "now" else None
        self._run = f"{uuid.uuid4().hex[:12]}:" if timestamps == "now" else ""

    def lines(self, portion: Sequence[tuple[Recording, int]]) -> list[bytes]:
        now = self._now() if self._now else None
        return [self._line(one, row, now) for one, row in portion]

    def _line(self, one: Recording, row: int, now: float | None) -> bytes:
        timestamp = float(one.seconds[row]) if now is None else now
        # An identity is at most 256 characters; the end of a long path tells more than its start.
        identity = f"{self._run}{one.source[-200:]}:{row}"
        return json.dumps({"stream_id": one.stream, "event_id": identity, "timestamp": timestamp} | self._said(one, row)).encode()

    def _said(self, one: Recording, row: int) -> dict[str, Any]:
        if one.lines is not None:
            text = one.lines[row]
            return {"end": True} if text is None else {"message": text}
        numbers = one.values[row].tolist()
        return {"values": {name: None if number != number else number for name, number in zip(self._features, numbers, strict=True)}}  # noqa: PLR0124


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Served:
    """The model that scores."""

    name: str
    features: list[str]
    log: bool
    header: str = ""
    session_seconds: float | None = None


class Door:
    """The service's HTTP door, with patience: what it could not answer is sent again, with the same identities."""

    def __init__(self, client: httpx.Client, options: Options, notify: Callable[[str], None]) -> None:
        self._client = client
        self._options = options
        self._notify = notify
        self.latencies: list[float] = []
        self.retries = 0

    def model(self) -> Served:
        """The one that will score. Raises ReplayFailed when it is not served."""
        response = self._send(lambda: self._client.get("/v1/models"))
        models = response.json()["models"]
        wanted = self._options.model
        chosen = next((model for model in models if (model["name"] == wanted if wanted else model["default"])), None)
        if chosen is None:
            names = ", ".join(f"'{model['name']}'" for model in models)
            raise ReplayFailed(f"{self._options.url} serves {names}, not '{wanted or 'a default'}': choose one with --model.")
        features, lines = [feature["name"] for feature in chosen["features"]], chosen.get("lines")
        if lines is None:
            return Served(chosen["name"], features, log=False)
        return Served(chosen["name"], features, log=True, header=lines["header"], session_seconds=lines["session_seconds"])

    def score(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        """One reply for each event line, in order; an event that is refused for good has a problem as its reply."""
        replies: list[dict[str, Any]] = [{} for _ in lines]
        left = list(range(len(lines)))
        for pause in self._pauses():
            answers = self._post([lines[i] for i in left])
            for i, answer in zip(left, answers, strict=True):
                replies[i] = answer
            left = [i for i in left if problem_status(replies[i]) == httpx.codes.SERVICE_UNAVAILABLE]
            if not left:
                return replies
            self._wait(pause, replies[left[0]].get("detail", "some events were not committed"))
        raise ReplayFailed(f"{self._options.url} did not score {len(left)} events within {self._options.patience:g} s.")

    def _post(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        params: dict[str, str | int] = {"top_contributors": ALL_CONTRIBUTORS}
        if self._options.model:
            params["model"] = self._options.model
        body = b"\n".join(lines)
        began = time.perf_counter()
        headers = {"Content-Type": "application/x-ndjson"}
        response = self._send(lambda: self._client.post("/v1/events", content=body, params=params, headers=headers))
        self.latencies.append(time.perf_counter() - began)
        answers = [json.loads(line) for line in response.text.splitlines() if line]
        if len(answers) != len(lines):
            raise ReplayFailed(f"{self._options.url} gave {len(answers)} replies to {len(lines)} events: is it an Onset service?")
        return answers

    def _send(self, request: Callable[[], httpx.Response]) -> httpx.Response:
        """Try until there is an answer that is not 'later'. Raises ReplayFailed when patience ends or the answer is a refusal."""
        trouble = ""
        for pause in self._pauses():
            try:
                response = request()
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
                self._wait(pause, trouble)
                continue
            if response.status_code not in RETRY_STATUS:
                return _accepted(response)
            trouble = f"{response.status_code} {response.text[:200]}"
            self._wait(max(pause, _retry_after(response)), f"{response.status_code} {response.reason_phrase}")
        raise ReplayFailed(
            f"{self._options.url} did not answer within {self._options.patience:g} s ({trouble}). Is the service running? Start this "
            "replay again when it is: it goes on where it was."
        )

    def _pauses(self) -> Iterator[float]:
        deadline = time.monotonic() + self._options.patience
        for attempt in itertools.count():
            if time.monotonic() > deadline:
                return
            yield min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)

    def _wait(self, seconds: float, why: str) -> None:
        self.retries += 1
        self._notify(f"sending again in {seconds:.1f} s: {why}")
        time.sleep(seconds)


def problem_status(reply: dict[str, Any]) -> int:
    """The HTTP status of a reply that is a problem; 0 for a result (whose `status` is a word)."""
    status = reply.get("status")
    return status if isinstance(status, int) else 0


def _accepted(response: httpx.Response) -> httpx.Response:
    if response.status_code != httpx.codes.OK:
        raise ReplayFailed(f"{response.request.url} answered {response.status_code}: {response.text[:1000]}")
    return response


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(60.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


# ── what came back ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class StreamReport:
    """What became of one stream's events."""

    events: int = 0
    scored: int = 0
    anomalous: int = 0
    runs: int = 0
    """Anomalies: runs of errors in which an alert opened."""
    onsets: int = 0
    """Events with an alert score above the threshold; a growing anomaly has several."""
    duplicates: int = 0
    late: int = 0
    refused: int = 0
    blame: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Feature → sum of its contributions over anomalous events."""
    blame_running: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The same over all events of running anomalies (from the first error to the end of the run)."""

    last_run: float | None = None
    """When the last such run began."""
    opened: float | None = None
    """Time of the last event with which an alert opened."""

    def add(self, reply: dict[str, Any]) -> bool:
        """Take a reply in; whether an alert opens with it."""
        self.events += 1
        if problem_status(reply):
            self.refused += 1
            return False
        self.scored += reply["anomaly_score"] is not None
        self.duplicates += reply["duplicate"]
        self.late += reply["late"]
        self.anomalous += reply["is_anomaly"]
        onset = is_onset(reply)
        opens = onset and reply["anomaly_started_at"] != self.last_run
        self.onsets += onset
        self.runs += opens
        if onset:
            self.last_run = reply["anomaly_started_at"]
        if opens:
            self.opened = reply["timestamp"]
        if reply["anomaly_started_at"] is not None:
            for part in reply["contributors"]:
                self.blame_running[part["feature"]] += part["contribution"]
                if reply["is_anomaly"]:
                    self.blame[part["feature"]] += part["contribution"]
        return opens


def is_onset(reply: dict[str, Any]) -> bool:
    """Whether an anomaly begins, or goes beyond what it was, with this reply."""
    return bool((reply.get("alert_score") or 0.0) > reply.get("threshold", 1.0))


LINE_COLUMNS = ("template", "likeliest", "chance", "line")


def _of_line(reply: dict[str, Any]) -> tuple[object, ...]:
    """LINE_COLUMNS of a reply; an old duplicate tells nothing, and where nothing is known nothing is likely."""
    line = reply.get("line") or {}
    likeliest, chance = next(iter((reply.get("expected") or {}).items()), ("", ""))
    template = NEW_TEXT if line.get("new") else line.get("template")
    return template, likeliest, chance, (line.get("message") or "").lstrip().partition("\n")[0]


class Output:
    """Replies as a CSV, in the order they came; empty where there is no score. It is as long as the replay got, in whole lines: what was
    answered is not answered so again.
    """

    COLUMNS = ("stream_id", "event_id", "timestamp", "anomaly_score", "alert_score", "p_value", "is_anomaly", "duplicate", "late")

    def __init__(self, path: Path, model: Served, files: ExitStack) -> None:
        self._path, self._features, self._log = path, model.features, model.log
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = files.enter_context(path.open("wb", buffering=0))
        self._bytes = 0
        self._append([[*self.COLUMNS, *(LINE_COLUMNS if model.log else (f"{name}_expected" for name in model.features))]])

    def write(self, replies: Sequence[dict[str, Any]]) -> None:
        """Raises NotWritten; then none of them is in the file."""
        self._append([self._row(reply) for reply in replies if not problem_status(reply)])

    def _row(self, reply: dict[str, Any]) -> list[Any]:
        cells = [str(cell).lower() if isinstance(cell, bool) else cell for cell in (reply[name] for name in self.COLUMNS)]
        return [*cells, *(_of_line(reply) if self._log else (reply["expected"].get(name) for name in self._features))]

    def _append(self, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        left = memoryview(text.getvalue().encode())
        whole = self._bytes + len(left)
        try:
            with naming(self._path, whole):
                while left:
                    left = left[self._file.write(left) :]
        except NotWritten:
            with contextlib.suppress(OSError):  # a pipe or a device has no end to cut
                self._file.truncate(self._bytes)
            raise
        self._bytes = whole


# ── command ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_speed(text: str) -> float:
    """'100x', '100' or 'max' → recorded seconds a second. Raises ReplayFailed."""
    try:
        speed = float("inf") if text.lower() == "max" else float(text.lower().removesuffix("x"))
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise ReplayFailed(f"--speed is {text!r}: give a number greater than 0, such as 100x, or max.")
    return speed


def timestamps_of(text: str) -> Timestamps:
    """Raises ReplayFailed when `text` is neither of the two."""
    for choice in get_args(Timestamps):
        if text == choice:
            return cast(Timestamps, choice)
    raise ReplayFailed(f"--timestamps is {text!r}: give original or now.")


def run(
    files: Sequence[Path],
    options: Options,
    read: ReadOptions,
    out: Path | None = None,
    console: Console | None = None,
    format_: LogFormat = LogFormat(),  # noqa: B008 - frozen
) -> dict[str, StreamReport]:
    """Replay `files` and print what happens; what became of each stream. `format_` is of log files. Raises ReplayFailed, TableError,
    NotWritten.
    """
    console = console or terminal()
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=options.url, timeout=REQUEST_SECONDS))
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        door = Door(client, options, lambda message: progress.console.print(message, style="yellow", highlight=False))
        model = door.model()
        if model.log:
            recordings = record_lines(files, model, format_, options.stream)
        else:
            sources = find_sources(files)
            tables, rowless = [], Rowless(sources, progress.console.print)
            for source in sources:
                with rowless.left_out(source):
                    tables.append((source, read_for(source, model.features, read, progress.console.print)))
            rowless.refuse_all()
            recordings = record([source for source, _ in tables], [table for _, table in tables], options.stream)
        output = Output(out, model, stack) if out else None
        total = sum(len(one.seconds) for one in recordings)
        console.print(
            f"{total:,} events of {len({one.stream for one in recordings})} streams to '{model.name}' at {options.url}", highlight=False
        )
        reports = _play(recordings, model, options, door, output, Screen(progress, total, options.top))
    console.print(_summary(reports))
    if len(model.features) > 1:
        console.print(_blame(_listed(reports), options.top))
    _closing(reports, door, console)
    return reports


def _play(
    recordings: Sequence[Recording],
    model: Served,
    options: Options,
    door: Door,
    output: Output | None,
    screen: Screen,
) -> dict[str, StreamReport]:
    encoder = Encoder(model.features, options.timestamps)
    reports = {one.stream: StreamReport() for one in recordings}
    events = in_order(recordings, together=options.stream is None and not model.log)
    for portion in Pace(options.speed, options.batch).portions(events):
        replies = door.score(encoder.lines(portion))
        for (one, _), reply in zip(portion, replies, strict=True):
            screen.show(reply, opens=reports[one.stream].add(reply))
        if output:
            output.write(replies)
        screen.advance(len(replies))
    return reports


class Screen:
    """Onsets and refusals as they happen, above the progress bar."""

    def __init__(self, progress: Progress, total: int, top: int) -> None:
        self._progress = progress
        self._task = progress.add_task("replay", total=total)
        self._top = top
        self._refusals = 0

    def advance(self, events: int) -> None:
        self._progress.advance(self._task, events)

    def show(self, reply: dict[str, Any], *, opens: bool) -> None:
        """One line for an event that is refused or that opens an alert."""
        if problem_status(reply):
            self._refused(reply)
        elif opens:
            self._print(self._onset(reply))

    def _onset(self, reply: dict[str, Any]) -> str:
        parts = ", ".join(f"{part['feature']} {100 * part['contribution']:.0f} %" for part in reply["contributors"][: self._top])
        score = f"alert {reply['alert_score']:.2f}  p {reply['p_value']:.1g}"
        said = f"  {_of_line(reply)[-1] or reply['line']['template']}" if reply.get("line") else ""
        return f"{_moment(reply['timestamp'])}  ▲ {reply['stream_id']}  {score}  {parts}{said}"

    def _refused(self, reply: dict[str, Any]) -> None:
        self._refusals += 1
        if self._refusals <= SHOWN_REFUSALS:
            self._print(f"refused: {reply.get('detail', reply)}", "red")
        if self._refusals == SHOWN_REFUSALS:
            self._print("further refusals are only counted", "red")

    def _print(self, line: str, style: str = "") -> None:
        self._progress.console.print(line, style=style, highlight=False, soft_wrap=True)


def _moment(timestamp: float | str) -> str:
    if isinstance(timestamp, str):
        return timestamp
    return datetime.fromtimestamp(timestamp, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _listed(reports: dict[str, StreamReport]) -> dict[str, StreamReport]:
    """All, or the worst ones, where they are too many to read."""
    if len(reports) <= LISTED:
        return reports
    worst = sorted(reports.items(), key=lambda item: (item[1].runs, item[1].refused, item[1].anomalous), reverse=True)
    return dict(worst[:LISTED])


def _summary(reports: dict[str, StreamReport]) -> Grid:
    grid = Grid(title="Replay", box=box.SIMPLE)
    grid.add_column("stream", overflow="fold")
    names = ("events", "scored", "runs", "onsets", "anomalous", "duplicates", "late", "refused")
    for name in names:
        grid.add_column("anomalies" if name == "runs" else name, justify="right")
    listed = _listed(reports)
    for stream, report in listed.items():
        grid.add_row(stream, *(f"{getattr(report, name):,}" for name in names))
    if len(reports) > 1:
        whole = f"all {len(reports):,}" + (
            f", of which the {LISTED} with the most anomalies are shown" if len(listed) < len(reports) else ""
        )
        grid.add_row(whole, *(f"{sum(getattr(report, name) for report in reports.values()):,}" for name in names))
    return grid


def _blame(reports: dict[str, StreamReport], top: int) -> Grid:
    grid = Grid(title="Top contributors, by share", box=box.SIMPLE)
    for name in ("stream", "while anomalous", "over the whole runs of errors"):
        grid.add_column(name, overflow="fold")
    for stream, report in reports.items():
        if not report.blame and not report.blame_running and len(reports) > 1:
            continue  # nothing to say
        grid.add_row(stream, _shares(report.blame, top), _shares(report.blame_running, top))
    return grid


def _shares(blame: dict[str, float], top: int) -> str:
    total = sum(blame.values())
    ordered = sorted(blame.items(), key=lambda item: item[1], reverse=True)[:top]
    return ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in ordered) or "-"


def _closing(reports: dict[str, StreamReport], door: Door, console: Console) -> None:
    if door.latencies:
        p50, p99 = np.percentile(1000 * np.array(door.latencies), [50, 99])
        retries = f"; {door.retries} times sent again" if door.retries else ""
        console.print(f"{len(door.latencies):,} requests, median {p50:.1f} ms, 99 of 100 below {p99:.1f} ms{retries}", highlight=False)
    opened = [report.opened for report in reports.values() if report.opened is not None]
    if opened and max(opened) < time.time() - TOLD_SECONDS:
        console.print(
            "Alerts of events older than an hour (ONSET_ALERTS_MAX_AGE_SECONDS) are listed, and no sink is told of them. "
            "To have them told, as a trial: --timestamps now with another --stream.",
            highlight=False,
        )
    old = [stream for stream, report in reports.items() if report.events and report.duplicates + report.late == report.events]
    if old and not door.retries:
        console.print(
            f"All events of {', '.join(old[:5])} were older than what the service has seen: this was replayed before. For a fresh "
            "start give another --stream, or forget the stream: curl -X DELETE .../v1/streams/NAME",
            style="yellow",
        )
    backwards = [stream for stream, report in reports.items() if stream not in old and 2 * report.late > report.events]
    if backwards:
        console.print(
            f"Most events of {', '.join(backwards[:5])} were older than one before them: where the newest row of a file is the first, "
            "sort it by time, forget the stream (curl -X DELETE .../v1/streams/NAME), and replay it again.",
            style="yellow",
        )
