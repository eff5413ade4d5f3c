"""Samples a second of the remote-write door, beside decoding alone, the protobuf library, and the same samples as NDJSON events.

    python -m bench.remote [--quick] [--seconds 10] [--json FILE]

Bodies of 2,000 series with one sample each, as a live Prometheus sends them: 8 labels (some 250 bytes), half of them gauges, half counters;
10,000 series in all, sent in turn, 15 s apart by their own time. In-process rows take one body after the other and are in
processor time; the doors are of one service with its embedded store and the shipped detector, loaded in turn over 4 connections by another
process on the same machine. With few processors every figure of a door is a floor.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import psutil
import typer
from rich.table import Table

from bench.prompb import Sent, body_1, body_2, message
from bench.report import LATENCY_COLUMNS, JsonFile, Latency, Machine, report
from bench.servers import service
from service.api import EVENTS
from service.names import Names, stream_id_of
from service.prompb import Written, decode_1, decode_2, pack, unpack
from service.remote_write import PATH

SERIES, BODY = 10_000, 2_000
STEP_MS = 15_000
WARM_UP = 4
"""Passes over all series before a door is measured."""
CONNECTIONS = 4
PLACEHOLDER = 1_790_000_000_000
MOST = 10_000
GAUGES = ("node_memory_MemAvailable_bytes", "container_memory_working_set_bytes", "process_open_fds", "go_goroutines")
COUNTERS = (
    "http_requests_total",
    "container_cpu_usage_seconds_total",
    "node_network_receive_bytes_total",
    "node_disk_io_time_seconds_total",
)
HEADERS = {"content-encoding": "snappy", "content-type": "application/x-protobuf"}
HEADERS_2 = HEADERS | {"content-type": "application/x-protobuf;proto=io.prometheus.write.v2.Request"}
NDJSON = {"content-type": "application/x-ndjson"}


@dataclass(frozen=True)
class Row:
    what: str
    samples_per_second: float
    latency: Latency
    """Of a body, or of a request."""
    failures: int = 0
    server_us: float = float("nan")
    """Processor time of the service for a sample, microseconds; its store is another process."""


@dataclass(frozen=True)
class Door:
    """One way in: how a body is made of its template and a time (ms), and where it goes."""

    name: str
    path: str
    headers: dict[str, str]
    make: Callable[[bytes, int], bytes]
    templates: list[bytes]


def labels(i: int) -> dict[str, str]:
    name = (GAUGES if i % 2 else COUNTERS)[i // 2 % 4]
    return {
        "__name__": name,
        "cluster": "production-eu-1",
        "container": f"app-{i % 17}",
        "instance": f"10.0.{i // 250 % 250}.{i % 250}:9100",
        "job": "kubernetes-pods",
        "namespace": f"team-{i % 23}",
        "node": f"ip-10-0-{i // 250 % 250}-17.eu-central-1.compute.internal",
        "pod": f"app-{i % 17}-7d9c5b8f6d-{i:05x}",
    }


def sent(first: int) -> list[Sent]:
    return [Sent(labels(i), [(PLACEHOLDER, 1000.0 + i)], type=2 if i % 2 else 1) for i in range(first, first + BODY)]


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def timed(template: bytes, milliseconds: int) -> bytes:
    """With another time in all its samples; both times take 6 bytes."""
    return template.replace(b"\x10" + varint(PLACEHOLDER), b"\x10" + varint(milliseconds))


def lines(first: int) -> bytes:
    return b"".join(
        b'{"stream_id":%s,"values":{"value":%d},"timestamp":%d}\n'
        % (msgspec.json.encode("ndjson " + stream_id_of(labels(i))), 1000 + i, PLACEHOLDER)
        for i in range(first, first + BODY)
    )


@cache
def doors() -> list[Door]:
    starts = range(0, SERIES, BODY)
    return [
        Door("remote-write 1.0", PATH, HEADERS, lambda body, ms: pack(timed(body, ms)), [body_1(sent(i)) for i in starts]),
        Door("remote-write 2.0", PATH, HEADERS_2, lambda body, ms: pack(timed(body, ms)), [body_2(sent(i)) for i in starts]),
        Door(
            "NDJSON /v1/events",
            EVENTS,
            NDJSON,
            lambda body, ms: body.replace(b"%d" % PLACEHOLDER, b"%.3f" % (ms / 1000)),
            [lines(i) for i in starts],
        ),
    ]


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Measured time of each row.")] = 10.0,
    quick: Annotated[bool, typer.Option("--quick", help="Two seconds each: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure decoding in this process, then the doors of a service, and print a table."""
    machine = Machine.now()
    seconds = 2.0 if quick else seconds
    rows = in_process(min(seconds, 0.7))
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder, service(Path(folder)) as server:
        rows += over_http(server.port, psutil.Process(server.process.pid), seconds)
    size = len(body_1(sent(0)))
    report([_table(rows)], [], machine, {"seconds": seconds, "rows": [asdict(row) for row in rows], "body_bytes": size}, json_file)
    typer.echo(f"A body of 1.0: {BODY:,} series, {size:,} bytes, {len(pack(body_1(sent(0)))):,} packed.")
    if any(row.failures for row in rows):
        raise SystemExit("Some requests failed; the figures do not count.")


def in_process(seconds: float) -> list[Row]:
    """Decoding alone, ours and the library's; a new body each time."""
    one, two = [body_1(sent(i)) for i in range(0, SERIES, BODY)], [body_2(sent(i)) for i in range(0, SERIES, BODY)]
    packed, names = [pack(body) for body in one], Names((), SERIES * 4)
    request_1, request_2 = message("prometheus", "WriteRequest"), message("io.prometheus.write.v2", "Request")
    ways: dict[str, tuple[list[bytes], Callable[[bytes], Any]]] = {
        "snappy alone": (packed, unpack),
        "decode 1.0, known series": (one, lambda body: decoded(decode_1, body, names)),
        "decode 1.0, new series (names, rules)": (one, lambda body: decoded(decode_1, body, Names((), SERIES))),
        "decode 2.0, known series": (two, lambda body: decoded(decode_2, body, names)),
        "protobuf library 1.0, parse": (one, request_1.FromString),
        "protobuf library 1.0, parse and read": (one, lambda body: read_1(request_1.FromString(body))),
        "protobuf library 2.0, parse": (two, request_2.FromString),
        "protobuf library 2.0, parse and read": (two, lambda body: read_2(request_2.FromString(body))),
    }
    return [_alone(what, bodies, do, seconds) for what, (bodies, do) in ways.items()]


def decoded(decode: Callable[..., Written[Any]], body: bytes, names: Names) -> Written[Any]:
    return decode(body, names.find, names.name, most=MOST)


def read_1(request: Any) -> list[tuple[tuple[str, ...], float, int]]:
    """As a receiver needs it: labels that can be looked up, value and time."""
    return [
        (tuple(text for label in series.labels for text in (label.name, label.value)), series.samples[0].value, series.samples[0].timestamp)
        for series in request.timeseries
    ]


def read_2(request: Any) -> list[tuple[tuple[str, ...], float, int]]:
    symbol = list(request.symbols).__getitem__
    return [(tuple(map(symbol, s.labels_refs)), s.samples[0].value, s.samples[0].timestamp) for s in request.timeseries]


def _alone(what: str, bodies: Sequence[bytes], do: Callable[[bytes], Any], seconds: float) -> Row:
    for body in bodies:
        do(body)
    took: list[float] = []
    while sum(took) < seconds:
        for body in bodies:
            start = time.process_time()
            do(body)
            took.append(time.process_time() - start)
    return Row(what, BODY * len(took) / sum(took), Latency.of(took))


def over_http(port: int, process: psutil.Process, seconds: float) -> list[Row]:
    """Every door in turn, after WARM_UP passes over its series."""
    rows = []
    clock = time.time_ns() // 1_000_000 - 4 * 3600 * 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for i, door in enumerate(doors()):
            pool.apply(load, (port, i, clock, WARM_UP * SERIES // BODY, 600.0))
            clock += WARM_UP * STEP_MS
            before = process.cpu_times()
            took, failures, passes = pool.apply(load, (port, i, clock, 0, seconds))
            after = process.cpu_times()
            clock += passes * STEP_MS
            spent = after.user + after.system - before.user - before.system
            samples = BODY * len(took)
            rows.append(Row(f"door: {door.name}", samples / seconds, Latency.of(took), failures, 1e6 * spent / max(samples, 1)))
    return rows


def load(port: int, which: int, clock: int, requests: int, seconds: float) -> tuple[list[float], int, int]:
    """Send `requests`, or as many as go within `seconds`: how long each took, how many failed, and passes over all series."""
    return asyncio.run(_load(port, doors()[which], clock, requests, seconds))


async def _load(port: int, door: Door, clock: int, requests: int, seconds: float) -> tuple[list[float], int, int]:
    took: list[float] = []
    failures = sent_bodies = 0
    until = time.perf_counter() + seconds
    bodies = _bodies(door, clock)

    async def connection(client: httpx.AsyncClient) -> None:
        nonlocal failures, sent_bodies
        while time.perf_counter() < until and (not requests or sent_bodies < requests):
            sent_bodies += 1
            content = next(bodies)
            start = time.perf_counter()
            answer = await client.post(f"http://127.0.0.1:{port}{door.path}", content=content, headers=door.headers)
            took.append(time.perf_counter() - start)
            failures += answer.status_code not in (200, 204)

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=CONNECTIONS)) as client:
        await asyncio.gather(*(connection(client) for _ in range(CONNECTIONS)))
    return took, failures, sent_bodies * BODY // SERIES + 1


def _bodies(door: Door, clock: int) -> Iterator[bytes]:
    """Bodies of one series after the other, pass after pass. Fewer connections than templates: no series is under way twice."""
    for n in itertools.count():
        for template in door.templates:
            yield door.make(template, clock + n * STEP_MS)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Remote-write", title_justify="left")
    for column in ("", "samples/s", *LATENCY_COLUMNS, "service CPU, us a sample"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        cpu = "" if row.server_us != row.server_us else f"{row.server_us:.1f}"
        table.add_row(row.what, f"{row.samples_per_second:,.0f}", *row.latency.cells(), cpu)
    return table


if __name__ == "__main__":
    typer.run(main)
