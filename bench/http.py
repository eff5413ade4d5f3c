"""Throughput and latency of POST /v1/events, beside the same application with nothing behind its door.

    python -m bench.http [--json FILE]

Bulk: bodies of 1,000 events as NDJSON, one event for each of 1,000 streams, a few connections at a time. Single: one event a
request on 64 connections. Three servers in turn, each a process of its own: the service with its embedded store and the shipped
detector; the same application with a scorer that answers a constant; and with a handler that only reads the body (`bench.empty`).
The load generator runs on the same machine, so with few cores every figure is a floor.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import platform
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from rich.table import Table

from bench.load import Request, Tally, drive, post
from bench.servers import Server, console, service, started

STREAMS, BULK_EVENTS = 1000, 1000
BULK_CONNECTIONS, SINGLE_CONNECTIONS = 4, 64


@dataclass(frozen=True)
class Row:
    """One server under both loads."""

    server: str
    bulk_events_per_second: float
    bulk_p50_ms: float
    bulk_p99_ms: float
    single_per_second: float
    single_p50_ms: float
    single_p99_ms: float
    server_cores: float
    """Processor seconds the server used for a second of the bulk load."""
    store_cores: float
    """The same of its child, the embedded store."""
    failures: int
    bulk_stages_ms: dict[str, float]
    """Wall time of a batch by stage, mean; while it waits, the event loop decodes and answers other requests."""


def main(
    seconds: Annotated[float, typer.Option(help="Measured time of each of the six loads.")] = 10.0,
    model: Annotated[str, typer.Option(help="A model file of the one feature `value`; without it, the shipped one.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure the three servers in turn and print a table."""
    screen = console()
    rows: list[Row] = []
    for name, start in _servers(model).items():
        with start() as server:
            rows.append(measure(name, server, seconds))
            screen.print(f"{name}: done", style="dim")
    screen.print(_table(rows))
    shown = ", ".join(f"{stage} {mean:.1f} ms" for stage, mean in rows[0].bulk_stages_ms.items())
    screen.print(f"A bulk batch in the service, mean wall time of its stages: {shown}", highlight=False)
    if json_file:
        json_file.write_text(json.dumps({"machine": _machine(), "seconds": seconds, "rows": [asdict(row) for row in rows]}, indent=2))
    if any(row.failures for row in rows):
        raise SystemExit("Some requests failed; the figures do not count.")


def measure(name: str, server: Server, seconds: float) -> Row:
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True)
    before, began = (_cpu([process]), _cpu(children)), time.perf_counter()
    bulk = asyncio.run(drive(server.port, bulk_requests(), connections=BULK_CONNECTIONS, seconds=seconds))
    after, elapsed = (_cpu([process]), _cpu(children)), time.perf_counter() - began
    stages = _stages(server) if name == "service" else {}
    single = asyncio.run(drive(server.port, single_requests(), connections=SINGLE_CONNECTIONS, seconds=seconds))
    return Row(
        name,
        bulk.rate * BULK_EVENTS,
        *_percentiles(bulk),
        single.rate,
        *_percentiles(single),
        server_cores=(after[0] - before[0]) / elapsed,
        store_cores=(after[1] - before[1]) / elapsed,
        failures=bulk.failures + single.failures,
        bulk_stages_ms=stages,
    )


def bulk_requests(streams: int = STREAMS) -> Request:
    """Bodies of 1,000 events, one for each of the next 1,000 of `streams` streams; time goes on by a second from body to body."""
    rng = np.random.default_rng(0)
    bodies = []
    for first in range(0, streams, BULK_EVENTS):
        values = rng.normal(20.0, 1.0, (8, BULK_EVENTS)).round(3).tolist()
        for row in values:
            lines = (event_line(first + i, value) for i, value in enumerate(row))
            bodies.append(post("/v1/events", b"".join(lines), "application/x-ndjson"))
    # eight bodies for every thousand streams, thousand after thousand, so that a stream's values change
    order = [body for turn in range(8) for body in bodies[turn::8]]
    return _stamped(order)


def single_requests() -> Request:
    """One event a request, stream after stream."""
    rng = np.random.default_rng(1)
    values = rng.normal(20.0, 1.0, 4 * STREAMS).round(3).tolist()
    return _stamped([post("/v1/events", event_line(i % STREAMS, value), "application/json") for i, value in enumerate(values)])


def event_line(stream: int, value: float) -> bytes:
    return b'{"stream_id":"bench-%06d","values":{"value":%s},"timestamp":%s}\n' % (stream, str(value).encode(), _STAMP)


_STAMP = b"1700000000.000"
"""Stands for the time of sending; of the same length, so that Content-Length holds."""


def _stamped(templates: list[bytes]) -> Request:
    rounds = itertools.cycle(templates)
    return lambda: next(rounds).replace(_STAMP, b"%.3f" % time.time())


def _servers(model: str) -> dict[str, Callable[[], AbstractContextManager[Server]]]:
    return {
        "service": lambda: _service(model),
        "constant scorer": lambda: _baseline("constant"),
        "empty handler": lambda: _baseline("empty"),
    }


@contextmanager
def _service(model: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder, service(Path(folder), model=model) as server:
        yield server


def _baseline(kind: str) -> AbstractContextManager[Server]:
    return started([sys.executable, "-m", "bench.empty", kind], {}, ready="/health/live")


def _stages(server: Server) -> dict[str, float]:
    """Mean milliseconds of a batch in each stage so far, from the service's own metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {
        part: dict(re.findall(rf'^onset_stage_seconds_{part}{{stage="(\w+)"}} (\S+)$', text, re.MULTILINE)) for part in ("sum", "count")
    }
    return {stage: 1000 * float(total) / max(1.0, float(found["count"][stage])) for stage, total in found["sum"].items()}


def _cpu(processes: list[psutil.Process]) -> float:
    return sum(float(times.user + times.system) for times in (process.cpu_times() for process in processes))


def _percentiles(tally: Tally) -> tuple[float, float]:
    return tally.percentile(50), tally.percentile(99)


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"POST /v1/events, {_machine()}, load generator on the same machine")
    table.add_column("server")
    for column in ("bulk, events/s", "body p50", "p99", "single/s", "p50", "p99", "cores in bulk: server", "store", "events/s a core"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.server,
            f"{row.bulk_events_per_second:,.0f}",
            f"{row.bulk_p50_ms:.1f} ms",
            f"{row.bulk_p99_ms:.1f} ms",
            f"{row.single_per_second:,.0f}",
            f"{row.single_p50_ms:.1f} ms",
            f"{row.single_p99_ms:.1f} ms",
            f"{row.server_cores:.2f}",
            f"{row.store_cores:.2f}",
            f"{row.bulk_events_per_second / max(0.01, row.server_cores):,.0f}",
        )
    return table


def _machine() -> str:
    return f"{psutil.cpu_count()} processors, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


if __name__ == "__main__":
    typer.run(main)
