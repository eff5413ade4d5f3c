"""The whole service on this very machine in one minute: live readings in, a disturbance we cause ourselves, the onset out.

    psutil, 10 Hz ──► POST /v1/events ──► `python -m service serve` (child process, embedded store, temporary data)
        ▲                                      │
    disturbance: processors, disk, memory      ▼
    for 8 s, at a third of the time        live table, verdict, exit code

Nothing is staged: the readings are what psutil says, the detector is the shipped one at its default false-alarm rate, and when
it misses the disturbance the demo says so and exits with 1. Everything started here is ended here, also on Ctrl-C.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

RATE = 10
"""Readings a second."""
WINDOW = RATE
"""Rates are taken over the last second: kernel counters tick every 10 ms, so over 100 ms they would be mostly rounding."""
MIN_SECONDS = 25.0
QUIET_SHARE, BURST_SHARE = 1 / 3, 8 / 60
MIN_QUIET_SECONDS, MIN_BURST_SECONDS = 12.0, 6.0
"""Before the 100th reading, after ten seconds, nothing is judged."""
GRACE_SECONDS = 2.0
"""A reading covers the last second, so an onset this long after the burst still belongs to it."""
START_SECONDS, STOP_SECONDS = 60.0, 15.0
BURST_BYTES_PER_SECOND, BURST_FILE_BYTES = 100_000_000, 64 << 20
"""The disturbance writes at most this fast (under 1 GB in all), over and over into a file of at most 64 MiB."""
BURST_MEMORY_BYTES, BURST_MEMORY_SHARE = 512 << 20, 0.125
"""It holds so much memory, and this share of what is available at most."""
MAX_BURNERS = 32
WIDE = 125
"""Columns of a terminal that the whole table fits into."""
MUST_SEE = ("this-machine/cpu", "this-machine/disk-write", "this-machine/memory")
"""The disturbance is real on all of these; it must be flagged on one at least: of a busy machine the others may show nothing."""

_BURN = """
import os, sys, time
os.nice(10)
parent, end = os.getppid(), time.monotonic() + float(sys.argv[1])
while time.monotonic() < end and os.getppid() == parent:
    sum(i * i for i in range(20_000))
"""
_WRITE = """
import os, sys, time
path, parent, begin = sys.argv[2], os.getppid(), time.monotonic()
end, rate, size, block = begin + float(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), os.urandom(1 << 21)
file = os.open(path, os.O_WRONLY | os.O_CREAT)
written = 0
while time.monotonic() < end and os.getppid() == parent:
    written += os.pwrite(file, block, written % size)
    os.fsync(file)
    time.sleep(max(0.0, begin + written / rate - time.monotonic()))
"""
_HOLD = """
import contextlib, os, sys, time
with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")  # in a container that may have less, this is what goes
parent, end, held = os.getppid(), time.monotonic() + float(sys.argv[1]), bytearray(int(sys.argv[2]))
held[::4096] = bytes([1]) * len(held[::4096])
while time.monotonic() < end and os.getppid() == parent:
    time.sleep(0.05)
"""


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Phases:
    """When things happen, in seconds since the first reading."""

    begin: float
    end: float
    total: float

    @classmethod
    def of(cls, total: float) -> Phases:
        begin = max(MIN_QUIET_SECONDS, total * QUIET_SHARE)
        return cls(begin, begin + max(MIN_BURST_SECONDS, total * BURST_SHARE), total)


# ── readings ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gauge:
    """One stream of this machine. `read` gives a level, or a counter if `per_second`; None = this machine has no such thing."""

    stream: str
    unit: str
    read: Callable[[], float | None]
    per_second: bool = False
    most: float = math.inf
    """A rate cannot be more: what goes beyond is the rounding of two counters."""


def gauges() -> list[Gauge]:
    """What this machine can tell; one stream per subsystem."""
    found = [
        Gauge("this-machine/cpu", "%", _busy_seconds, per_second=True, most=100.0),
        Gauge("this-machine/memory", "MiB", lambda: psutil.virtual_memory().used / 2**20),
        Gauge("this-machine/disk-write", "kB/s", lambda: _disk("write_bytes"), per_second=True),
        Gauge("this-machine/disk-read", "kB/s", lambda: _disk("read_bytes"), per_second=True),
        Gauge("this-machine/network", "kB/s", _network, per_second=True),
        Gauge("this-machine/switches", "/s", lambda: float(psutil.cpu_stats().ctx_switches), per_second=True),
    ]
    return [gauge for gauge in found if gauge.read() is not None]


def _busy_seconds() -> float:
    """Processor time spent on anything, in percent-seconds of all processors together."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guest time is part of user time already
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return float(100 * (total - idle) / (psutil.cpu_count() or 1))


def _disk(what: str) -> float | None:
    counters = psutil.disk_io_counters()
    return None if counters is None else getattr(counters, what) / 1000


def _network() -> float | None:
    """Bytes in and out, loopback left out: the demo's own requests travel there."""
    cards = {name: card for name, card in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")}
    return sum(card.bytes_sent + card.bytes_recv for card in cards.values()) / 1000 if cards else None


class Sampler:
    """Turns gauges into readings; counters become rates over the last second."""

    def __init__(self, found: list[Gauge], clock: Callable[[], float] = time.monotonic) -> None:
        self._gauges = found
        self._clock = clock
        self._past: dict[str, deque[tuple[float, float]]] = {gauge.stream: deque(maxlen=WINDOW + 1) for gauge in found}

    def sample(self) -> dict[str, float]:
        """The readings of this moment; a rate is left out until a full second of it was seen."""
        readings = {}
        for gauge in self._gauges:
            value = gauge.read()
            if value is not None and gauge.per_second:
                value = self._rate(gauge, value)
            if value is not None:
                readings[gauge.stream] = round(value, 3)
        return readings

    def _rate(self, gauge: Gauge, counter: float) -> float | None:
        past = self._past[gauge.stream]
        past.append((self._clock(), counter))
        (then, before), (now, after) = past[0], past[-1]
        full = len(past) > WINDOW
        return min(gauge.most, max(0.0, after - before) / (now - then)) if full and now > then else None


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Disturbance:
    """Real work: every processor busy, blocks written to disk with fsync, memory held. Ends by itself, or when its parent is gone."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._file = folder / "disturbance.bin"
        self._seconds = seconds
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        burners = min(psutil.cpu_count() or 1, MAX_BURNERS)
        seconds = f"{self._seconds:.1f}"
        self._children = [_spawn([sys.executable, "-c", _BURN, seconds]) for _ in range(burners)]
        writer = [sys.executable, "-c", _WRITE, seconds, str(self._file), str(BURST_BYTES_PER_SECOND), str(BURST_FILE_BYTES)]
        self._children.append(_spawn(writer))
        memory = min(BURST_MEMORY_BYTES, int(BURST_MEMORY_SHARE * psutil.virtual_memory().available))
        self._children.append(_spawn([sys.executable, "-c", _HOLD, seconds, str(memory)]))

    def stop(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
        self._file.unlink(missing_ok=True)


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    """A child in a process group of its own: Ctrl-C reaches only us, and we end it."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, process_group=0)


@contextmanager
def served(folder: Path, model: Path | None) -> Iterator[str]:
    """`python -m service serve` with an embedded store below `folder`; gives its URL once it is ready. No model = the shipped one."""
    port = _free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
    env |= {"ONSET_HOST": "127.0.0.1", "ONSET_PORT": str(port), "ONSET_DATA_DIR": str(folder / "data"), "ONSET_LOG_LEVEL": "warning"}
    if model:
        env["ONSET_MODEL"] = str(model)
    log = folder / "service.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(url, child, log)
        yield url
    finally:
        _end(child)


def _await_ready(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise DemoFailed(f"The service ended with {child.returncode} while starting. Its last words:\n{_tail(log)}")
        try:
            if httpx.get(f"{url}/health/ready", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise DemoFailed(f"The service was not ready after {START_SECONDS:.0f} s. Its last words:\n{_tail(log)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that the service drains and ends its store; SIGKILL for it and its children if that takes too long."""
    if child.poll() is not None:
        return
    family = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    _, alive = psutil.wait_procs(family, timeout=2)
    for process in alive:
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) or "(nothing)"


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """On a disk where there is one: /tmp is often memory, and a burst of writes there would not be a burst of disk writes."""
    disk = Path("/var/tmp")  # noqa: S108 - mkdtemp makes a private folder in it
    folder = Path(tempfile.mkdtemp(prefix="onset-demo-", dir=disk if os.access(disk, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo like Ctrl-C does: by cleaning up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ── what is seen ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Track:
    """What is known of one stream so far. Times are seconds since the first reading."""

    stream: str
    unit: str
    last: dict[str, Any] = field(default_factory=dict)
    reading: float = 0.0
    events: int = 0
    onsets: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def see(self, at: float, reading: float, result: dict[str, Any]) -> bool:
        """Take one reply in; whether an anomaly begins with it."""
        self.last, self.reading = result, reading
        self.events += 1
        begins = bool((result["alert_score"] or 0.0) > result["threshold"])
        if begins:
            self.onsets.append((at, result))
        return begins

    def first_onset(self, begin: float, end: float) -> tuple[float, dict[str, Any]] | None:
        return next((onset for onset in self.onsets if begin <= onset[0] <= end), None)


class Board:
    """All streams, and how they look on a terminal."""

    def __init__(self, found: list[Gauge], phases: Phases, url: str) -> None:
        self.tracks = {gauge.stream: Track(gauge.stream, gauge.unit) for gauge in found}
        self.latencies: list[float] = []
        self.failed_requests = 0
        self._phases = phases
        self._url = url

    def render(self, at: float, width: int) -> Group:
        """A table for a terminal of `width` columns; the band is left out of a narrow one."""
        wide = width >= WIDE
        table = Table(box=box.ROUNDED if wide else box.SIMPLE, padding=(0, 1) if wide else (0, 1, 0, 0))
        table.add_column("stream")
        for name in ("reading", "expected", "band") if wide else ("reading", "expected"):
            table.add_column(name, justify="right", min_width=8)
        table.add_column("score (1 = as rare as 1 in 1000)" if wide else "score", min_width=15)
        table.add_column("status", min_width=16)
        for track in self.tracks.values():
            stream, reading, expected, band, bar, status = self._cells(track)
            table.add_row(stream, reading, expected, *([band] if wide else []), bar, status)
        return Group(
            Text(f"{at:5.1f} s  {self._phase(at)}", style="bold"), table, Text(f"Page: {self._url}/   API: {self._url}/docs", style="dim")
        )

    def lines(self, at: float) -> list[str]:
        """The same for an output that is no terminal."""
        cells = [[str(cell) for cell in self._cells(track)] for track in self.tracks.values()]
        rows = [f"        {c[0]:26}{c[1]:>12} expected {c[2]:>10}  band {c[3]:>22}  {c[5]}" for c in cells]
        return [f"{at:5.1f} s  {self._phase(at)}", *rows]

    def _phase(self, at: float) -> str:
        begin, end = self._phases.begin, self._phases.end
        if at < begin:
            return f"quiet: the detector learns this machine; the disturbance begins in {begin - at:.0f} s"
        return (
            f"DISTURBANCE: all processors busy, disk written, memory taken ({end - at:.0f} s to go)"
            if at < end
            else "the disturbance is over"
        )

    def _cells(self, track: Track) -> list[Text]:
        if not track.last:
            return [Text(track.stream), *(Text("-", style="dim") for _ in range(4)), Text("waiting for a full second", style="dim")]
        feature = next(iter(track.last["expected"]), None)
        expected, lower, upper = (track.last[name].get(feature) for name in ("expected", "lower", "upper"))
        return [
            Text(track.stream),
            Text(f"{_number(track.reading)} {track.unit}"),
            Text(_number(expected)),
            Text(f"{_number(lower)} .. {_number(upper)}", style="dim"),
            _bar(track.last["anomaly_score"]),
            self._status(track),
        ]

    def _status(self, track: Track) -> Text:
        onset = track.first_onset(self._phases.begin, self._phases.end + GRACE_SECONDS)
        if onset:
            return Text(f"▲ ONSET +{onset[0] - self._phases.begin:.1f} s", style="bold red")
        if track.last["status"] == "warming_up":
            return Text(f"warming up, {track.last['samples_until_ready']} to go", style="dim")
        if track.last["is_anomaly"]:
            return Text("anomalous", style="red")
        if track.onsets:
            return Text(f"normal, onset at {track.onsets[-1][0]:.1f} s", style="yellow")
        return Text("normal", style="green")


def _when(stream: str, seconds: float) -> str:
    return f"{seconds:.1f} s after it began" if stream in MUST_SEE else f"{seconds:.1f} s into it (perhaps of its own)"


def _bar(score: float | None) -> Text:
    width = 10
    if score is None:
        return Text("-", style="dim")
    filled = min(width, round(score / 2 * width))
    style = "red" if score > 1 else "yellow" if score > 0.5 else "green"
    return Text("█" * filled, style=style) + Text("·" * (width - filled), style="dim") + Text(f" {score:.2f}")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


# ── the minute ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(seconds: float, model: Path | None = None, console: Console | None = None) -> int:
    """Play the demo for about `seconds`; 0 when the disturbance was flagged, else 1 (130 when interrupted)."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=150)  # a pipe has no width
    if seconds < MIN_SECONDS:
        console.print(f"DEMO_SECONDS={seconds:g} is too short for a detector to know this machine; {MIN_SECONDS:g} it is.")
    phases = Phases.of(max(seconds, MIN_SECONDS))
    try:
        with _terminable(), _temporary_folder() as folder:
            console.print(f"Starting the service with {model or 'the shipped detector'} and an embedded store ...")
            with served(folder, model) as url:
                console.print(f"The page is at [bold]{url}/[/]", highlight=False)
                _open_page(url, console)
                board = Board(gauges(), phases, url)
                _play(board, phases, url, folder, console)
        return verdict(board, phases, console)
    except DemoFailed as failure:
        console.print(f"[bold red]The demo failed.[/] {failure}")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started has been ended.")
        return 130


def _open_page(url: str, console: Console) -> None:
    """In a browser, where somebody sits before a screen."""
    screen = sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if console.is_terminal and screen:
        webbrowser.open(f"{url}/")


def _play(board: Board, phases: Phases, url: str, folder: Path, console: Console) -> None:
    disturbance = Disturbance(folder, phases.end - phases.begin)
    try:
        with httpx.Client(base_url=url, timeout=10) as client, _screen(board, console) as show:
            feature = _feature(client)
            sampler = Sampler(gauges())
            for _ in _ticks(time.monotonic(), 1.5):  # until each rate has a full second, and the start of the service is over
                sampler.sample()
            start = time.monotonic()
            disturbed = False
            for at in _ticks(start, phases.total):
                if at >= phases.begin and not disturbed:
                    disturbance.start()
                    disturbed = True
                _tick(board, sampler.sample(), feature, client, at)
                show(at)
    finally:
        disturbance.stop()


def _ticks(start: float, total: float) -> Iterator[float]:
    """Seconds since `start`, ten times a second; a tick that comes too late is left out rather than hurried."""
    tick = 0
    while tick < total * RATE:
        time.sleep(max(0.0, start + tick / RATE - time.monotonic()))
        now = time.monotonic() - start
        yield now
        tick = max(tick + 1, int(now * RATE))


def _feature(client: httpx.Client) -> str:
    """The one feature of the detector."""
    models = client.get("/v1/models").raise_for_status().json()["models"]
    names = [feature["name"] for model in models if model["default"] for feature in model["features"]]
    if len(names) != 1:
        raise DemoFailed(f"The detector takes {len(names)} features, the demo has one reading a stream.")
    return str(names[0])


def _tick(board: Board, readings: dict[str, float], feature: str, client: httpx.Client, at: float) -> None:
    """Post the readings of one moment, one event a stream."""
    if not readings:
        return
    now = time.time()
    events = [{"stream_id": stream, "timestamp": now, "values": {feature: value}} for stream, value in readings.items()]
    began = time.perf_counter()
    try:
        response = client.post("/v1/events", json=events).raise_for_status()
    except httpx.HTTPError:
        board.failed_requests += 1
        return
    board.latencies.append(time.perf_counter() - began)
    for (stream, value), result in zip(readings.items(), response.json(), strict=True):
        board.tracks[stream].see(at, value, result)


@contextmanager
def _screen(board: Board, console: Console) -> Iterator[Callable[[float], None]]:
    """A table that stays in place on a terminal; elsewhere its lines every five seconds, and onsets at once."""
    if console.is_terminal:
        with Live(board.render(0, console.width), console=console, auto_refresh=False) as live:
            yield lambda at: live.update(board.render(at, console.width), refresh=True)
        return
    seen, due = 0, 0.0

    def show(at: float) -> None:
        nonlocal seen, due
        onsets = sorted((onset[0], track.stream) for track in board.tracks.values() for onset in track.onsets)
        for moment, stream in onsets[seen:]:
            console.print(f"{moment:5.1f} s  ▲ ONSET on {stream}", highlight=False)
        seen = len(onsets)
        if at >= due:
            due += 5
            console.print("\n".join(board.lines(at)), highlight=False, soft_wrap=True)

    yield show


def verdict(board: Board, phases: Phases, console: Console) -> int:
    """Say what was flagged; 0 when the disturbance was, where it must be."""
    if board.failed_requests:
        console.print(f"[red]{board.failed_requests} requests were not answered.[/]")
    flagged = {name: track.first_onset(phases.begin, phases.end + GRACE_SECONDS) for name, track in board.tracks.items()}
    console.print(_summary(board, phases, flagged))
    early = sum(1 for track in board.tracks.values() for at, _ in track.onsets if at < phases.begin)
    events = sum(track.events for track in board.tracks.values())
    console.print(
        f"{events:,} events scored, {_latency(board.latencies)}. Onsets before the disturbance, all false: {early}.", highlight=False
    )
    if not any(flagged.get(name) for name in MUST_SEE):
        console.print(f"[bold red]The disturbance was NOT flagged on {', '.join(MUST_SEE)}.[/] {_excuse(board)}")
        return 1
    console.print(_NEXT, highlight=False, soft_wrap=True)
    return 0


def _summary(board: Board, phases: Phases, flagged: dict[str, tuple[float, dict[str, Any]] | None]) -> Table:
    table = Table(title="The disturbance, as the detector saw it", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("stream", "flagged", "p-value", "alert score", "top contributor", "reading", "expected"):
        table.add_column(column, justify="left" if column in ("stream", "flagged", "top contributor") else "right")
    for name, onset in flagged.items():
        if onset is None:
            table.add_row(name, "no", *("-" for _ in range(5)))
            continue
        at, result = onset
        top = result["contributors"][0]
        table.add_row(
            name,
            _when(name, at - phases.begin),
            f"{result['p_value']:.1g}",
            f"{result['alert_score']:.2f}",
            f"{top['feature']} ({100 * top['contribution']:.0f} %)",
            f"{_number(top['actual'])} {board.tracks[name].unit}",
            _number(top["expected"]),
        )
    return table


def _latency(latencies: list[float]) -> str:
    if not latencies:
        return "no request was answered"
    ordered = sorted(1000 * latency for latency in latencies)
    p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
    return f"{len(ordered):,} requests answered in {p50:.1f} ms (median) and {p99:.1f} ms (99 of 100)"


def _excuse(board: Board) -> str:
    if not any(name in board.tracks and board.tracks[name].events for name in MUST_SEE):
        return "This machine gives no reading of any of them."
    return "Was the machine busy with something else? Try again, or give it longer: make demo DEMO_SECONDS=120"


_NEXT = """
Where to go next
  python -m service serve                                   the service and its page on http://127.0.0.1:8080, its API at /docs
  curl http://127.0.0.1:8080/v1/events -H 'content-type: application/json' -d '{"stream_id":"pump-7","values":{"value":21.5}}'
  python -m service replay FILE.csv --speed 100x            recorded data, posted as if it were live
  python -m service backtest FILE.csv --out out/scores      the same scores for whole files, without a server
  python -m training fit --data FOLDER --out out/model      a detector of your own data (make setup)"""
