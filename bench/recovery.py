"""Seconds from `kill -9` to the first correct score, and from starting the service to its readiness.

    python -m bench.recovery [--quick] [--repetitions 5] [--streams 100000] [--json FILE]

    fresh      start → ready, with an empty data folder
    used       start → ready, with the streams in the append-only file
    service    kill -9 of the service → start → first correct score          (the embedded store ends with it, and is started with it)
    store      kill -9 of the store under the running service → first correct score   (the service starts it again)

Two services get the same events of the same streams; one of them is never killed. After a kill an event is sent until it is answered.
The score is correct if the whole reply is the uninterrupted service's, to the last bit; a wrong one ends the benchmark. The data folder
holds 100,000 warm streams. Seconds count from before the kill.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.table import Table

from bench.fleet import default_model
from bench.http import store_url
from bench.report import Goal, JsonFile, Machine, report, table
from bench.servers import Server, service
from bench.traffic import stream_id
from bench.warm import fill
from service.detector import Detector

GOAL_SECONDS, PATIENCE_SECONDS = 2.0, 60.0
PROBED = 4
"""Streams whose events are sent, one after the other."""
SERVERS = ("valkey-server", "redis-server")


@dataclass(frozen=True)
class Row:
    what: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def main(
    repetitions: Annotated[int, typer.Option(min=1, max=50, help="Of each line.")] = 5,
    streams: Annotated[int, typer.Option(min=1000, help="Warm streams in the data folder.")] = 100_000,
    quick: Annotated[bool, typer.Option("--quick", help="Two repetitions over 5,000 streams: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Kill, measure, compare, and print a table."""
    machine = Machine.now()
    repetitions, streams = (2, 5000) if quick else (repetitions, streams)
    with tempfile.TemporaryDirectory(prefix="onset-") as folder:
        rows = measure(Path(folder), repetitions, streams)
    goals = [Goal(f"{row.what}: median seconds", row.median, GOAL_SECONDS, at_least=False) for row in rows]
    report([_table(rows, streams)], goals, machine, {"streams": streams, "rows": [asdict(row) for row in rows]}, json_file)


def measure(folder: Path, repetitions: int, streams: int) -> list[Row]:
    fresh = [_start(folder / f"fresh-{i}") for i in range(repetitions)]
    detector = Detector.load(default_model())
    with service(folder / "used") as server:
        asyncio.run(fill(store_url(folder / "used"), detector, range(PROBED, streams)))
        del server
    used = [_start(folder / "used") for _ in range(repetitions)]
    with service(folder / "whole") as uninterrupted:
        events = Events(uninterrupted)
        for _ in range(PROBED * (detector.manifest.warmup + 20)):
            events.next()
        events.warm = True
        killed_service = _each(repetitions, folder / "used", events, kill_service)
        killed_store = _each(repetitions, folder / "used", events, kill_store)
    return [Row("fresh", fresh), Row("used", used), Row("service killed", killed_service), Row("store killed", killed_store)]


class Events:
    """Events of a few streams with the replies of a service that is never killed."""

    def __init__(self, uninterrupted: Server) -> None:
        self._server = uninterrupted
        self._rng = np.random.default_rng(3)
        self._sent = 0
        self.past: list[bytes] = []
        self.warm = False
        """Whether every reply must have a score."""

    def next(self) -> tuple[bytes, dict[str, Any]]:
        """An event and its reply."""
        value = round(float(self._rng.normal(20, 1)), 3)
        event = {"stream_id": stream_id(self._sent % PROBED), "values": {"value": value}, "timestamp": 1.7e9 + self._sent}
        event["event_id"] = f"e{self._sent}"
        self._sent += 1
        body = json.dumps(event).encode()
        reply = post(self._server.port, body)
        if reply is None:
            raise SystemExit("The service that is never killed did not answer.")
        if self.warm and reply["p_value"] is None:
            raise SystemExit(f"No score to compare with: {reply}")
        self.past.append(body)
        return body, reply


def post(port: int, body: bytes) -> dict[str, Any] | None:
    """One event's reply without `duplicate` (it was sent again); None = not answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/events", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        return None
    reply: dict[str, Any] = json.loads(content)
    del reply["duplicate"]
    return reply


def first_correct(port: int, body: bytes, want: dict[str, Any], began: float) -> float:
    """Send until it is answered; seconds since `began`. A wrong reply ends the benchmark."""
    while time.perf_counter() - began < PATIENCE_SECONDS:
        got = post(port, body)
        if got is not None:
            seconds = time.perf_counter() - began
            if got != want:
                raise SystemExit(f"A wrong score after a kill.\nwant {want}\ngot  {got}")
            return seconds
        time.sleep(0.005)
    raise SystemExit(f"No answer within {PATIENCE_SECONDS:.0f} s of a kill.")


def kill_service(server: Server, started: Callable[[], Server]) -> Server:
    server.process.kill()
    server.process.wait()
    return started()


def kill_store(server: Server, started: Callable[[], Server]) -> Server:
    (store,) = [child for child in psutil.Process(server.process.pid).children(recursive=True) if child.name() in SERVERS]
    store.kill()
    return server


def _each(repetitions: int, folder: Path, events: Events, kill: Callable[[Server, Callable[[], Server]], Server]) -> list[float]:
    """Kill in the middle of a stream of events, again and again."""
    taken = []
    with ExitStack() as running:

        def started() -> Server:
            return running.enter_context(service(folder, ready="/health/live"))

        server = running.enter_context(service(folder))
        for body in events.past:  # what another line sent is answered from the store or scored now: the streams are level again
            post(server.port, body)
        for _ in range(repetitions):
            for _ in range(4 * PROBED):
                body, want = events.next()
                first_correct(server.port, body, want, time.perf_counter())
            body, want = events.next()
            began = time.perf_counter()
            server = kill(server, started)
            taken.append(first_correct(server.port, body, want, began))
            time.sleep(1.0)
    return taken


def _start(folder: Path) -> float:
    with service(folder) as server:
        return server.ready_after


def _table(rows: list[Row], streams: int) -> Table:
    made = table(f"Seconds, {streams:,} warm streams in the used data folder", ("what",), ("median", "lowest", "highest", "times"))
    for row in rows:
        made.add_row(row.what, *(f"{value:.2f}" for value in (row.median, min(row.seconds), max(row.seconds))), str(len(row.seconds)))
    return made


if __name__ == "__main__":
    typer.run(main)
