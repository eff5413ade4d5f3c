"""What the service does when it is offered more than it can do, and whether one sender can starve the others.

    python -m bench.overload [--quick] [--seconds 60] [--json FILE]

Overload: the capacity is measured by closed loops; then an open loop (requests are due at a rate, whatever the service does) offers three
times as much for a minute: bodies of 100 events over 10,000 warm streams, on at most CONNECTIONS connections; what is due while all of them
wait is not sent, and counted. Shown: latencies of what was accepted, counted from when it was due; the rest must be 429 with Retry-After;
the service's resident memory; and how long after the load's end single events are answered as before.

    bound on the accepted p99 = 2 × ONSET_MAX_QUEUE_EVENTS / capacity + 1 s: a full queue's wait at half the capacity (the other half goes
    into refusing), and a batch

Fairness: 50 quiet clients' single events, 100 a second in all, each its own streams; alone, then beside a noisy tenant (4 connections that
send bodies of 1,000 events over 1,000 streams as fast as they are answered), then beside a hot stream (the same bodies, all of one stream).
Each client names itself in X-Scope-OrgID: a service that goes by it, or by nothing, is measured alike.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from rich.table import Table

from bench.http import STREAMS, warm_service
from bench.load import Offered, Request, drive, offer
from bench.report import LATENCY_COLUMNS, Goal, JsonFile, Latency, Machine, report, table
from bench.servers import Server
from bench.traffic import BODY_EVENTS, JSON, NDJSON, bodies, requests, singles
from service.settings import Settings

EVENTS, FACTOR, CONNECTIONS = 100, 3.0, 400
QUIET_CLIENTS, QUIET_RATE = 50, 100.0
QUIET_STREAMS, NOISY_STREAMS, NOISY_CONNECTIONS = range(1000), range(5000, 6000), 4
FLAT, RECOVERY_SECONDS = 1.1, 1.0
PROBE_SECONDS = 0.02


@dataclass(frozen=True)
class Overload:
    capacity_events_per_second: float
    offered_events_per_second: float
    seconds: float
    accepted_events_per_second: float
    accepted: Latency
    bound_ms: float
    refused_share: float
    """Of all that was due: 429."""
    unsent_share: float
    """Due while all connections waited."""
    hintless: int
    failed: int
    resident_mib: list[float]
    """Of the service, every half second of the load."""
    recovery_seconds: float
    """From the last request's sending, see `recovery_seconds`."""

    @property
    def growth(self) -> float:
        """The largest resident memory of the last three quarters ÷ that at the end of the first: what a queue takes is taken by then."""
        quarter = max(1, len(self.resident_mib) // 4)
        return max(self.resident_mib[quarter:]) / max(self.resident_mib[:quarter])


@dataclass(frozen=True)
class Quiet:
    """The quiet clients beside something."""

    beside: str
    latency: Latency
    refused: int
    failed: int
    unsent: int
    noisy_events_per_second: float


@dataclass
class Resident:
    """Samples of a process's resident memory."""

    mib: list[float] = field(default_factory=list)

    @contextmanager
    def watched(self, pid: int) -> Iterator[None]:
        done, process = threading.Event(), psutil.Process(pid)

        def watch() -> None:
            while not done.wait(0.5):
                self.mib.append(round(process.memory_info().rss / 2**20, 1))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def main(
    seconds: Annotated[float, typer.Option(min=4, help="Of the overload; the fairness lines take a third each.")] = 60.0,
    quick: Annotated[bool, typer.Option("--quick", help="Six seconds of overload: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Overload a service, then disturb quiet clients of another one, and print both."""
    machine = Machine.now()
    seconds = 6.0 if quick else seconds
    with tempfile.TemporaryDirectory(prefix="onset-") as folder:
        with warm_service(Path(folder) / "a") as server:
            overload = asyncio.run(overloaded(server, seconds))
        with warm_service(Path(folder) / "b") as server:
            quiet = [asyncio.run(beside(server, name, seconds / 3)) for name in NOISES]
    figures = {"overload": asdict(overload) | {"resident_growth": overload.growth}, "fairness": [asdict(one) for one in quiet]}
    report([_overload_table(overload), _quiet_table(quiet)], goals(overload, quiet), machine, figures, json_file)


async def overloaded(server: Server, seconds: float) -> Overload:
    make = requests(_small_bodies())
    alone = await drive(server.port, make, connections=8, seconds=max(2.0, seconds / 10))
    capacity = alone.rate * EVENTS
    usual = await _probed(server.port, 1.0)
    resident, rate = Resident(), FACTOR * capacity / EVENTS
    with resident.watched(server.process.pid):
        load = asyncio.create_task(offer(server.port, make, rate=rate, seconds=seconds, connections=CONNECTIONS))
        await asyncio.sleep(seconds)
        probes = await _probed(server.port, 5.0)  # beside the answers that are still to come
        tally = await load
    return Overload(
        round(capacity),
        round(FACTOR * capacity),
        seconds,
        round(len(tally.accepted) * EVENTS / seconds),
        tally.latency,
        bound_ms(capacity),
        tally.refused / tally.offered,
        tally.unsent / tally.offered,
        tally.hintless,
        tally.failed,
        resident.mib,
        recovery_seconds(probes, usual, tally.ended),
    )


def bound_ms(capacity: float) -> float:
    """The stated bound on the p99 of accepted requests; `capacity` in events a second."""
    queue: int = Settings.model_fields["max_queue_events"].default
    return round(1000 * (2 * queue / capacity + 1), 1)


def _small_bodies() -> list[bytes]:
    """Bodies of EVENTS events, cut from the usual ones."""
    made = []
    for body in bodies(range(STREAMS)):
        lines = body.splitlines(keepends=True)
        made += [b"".join(lines[i : i + EVENTS]) for i in range(0, len(lines), EVENTS)]
    return made


Probes = list[tuple[float, float]]
"""When each single event was due, and how long its answer took; inf = refused, lost or not sent."""


async def _probed(port: int, seconds: float) -> Probes:
    """Single events, one every PROBE_SECONDS."""
    tally = await offer(port, requests(singles(QUIET_STREAMS), JSON), rate=1 / PROBE_SECONDS, seconds=seconds, connections=100)
    lost = tally.refused + tally.failed + tally.unsent
    return sorted(tally.accepted + [(tally.ended - seconds, math.inf)] * lost)


def recovery_seconds(probes: Probes, usual: Probes, ended: float) -> float:
    """Seconds from `ended` on until nine of ten probes in a row take what they usually do: below three times the median, or 20 ms more.

    inf = never within the probes.
    """
    median = float(np.median([seconds for _, seconds in usual]))
    limit = max(3 * median, median + 0.02)
    after = [(due, seconds <= limit) for due, seconds in probes if due >= ended]
    for i in range(len(after) - 9):
        if sum(good for _, good in after[i : i + 10]) >= 9:
            return after[i][0] - ended
    return math.inf


async def beside(server: Server, name: str, seconds: float) -> Quiet:
    """The quiet clients' events while `name` goes on."""
    make = requests(singles(QUIET_STREAMS), JSON, tenants=[f"quiet-{i}" for i in range(QUIET_CLIENTS)])
    noise = NOISES[name]
    quiet = offer(server.port, make, rate=QUIET_RATE, seconds=seconds, connections=QUIET_CLIENTS)
    if noise is None:
        return _quiet(name, await quiet, 0.0)
    loud = drive(server.port, noise, connections=NOISY_CONNECTIONS, seconds=seconds, warmup=0.5)
    tally, noisy = await asyncio.gather(quiet, loud)
    return _quiet(name, tally, noisy.rate * BODY_EVENTS)


def _quiet(name: str, tally: Offered, noisy: float) -> Quiet:
    return Quiet(name, tally.latency, tally.refused, tally.failed, tally.unsent, round(noisy))


def hot_body() -> bytes:
    """1,000 events of one stream, without a time: several such bodies are in flight, and none of their events may be late."""
    values = np.random.default_rng(5).normal(20.0, 1.0, BODY_EVENTS).round(3).tolist()
    return b"".join(b'{"stream_id":"bench-hot","values":{"value":%s}}\n' % str(value).encode() for value in values)


NOISES: dict[str, Request | None] = {
    "nothing": None,
    "a noisy tenant": requests(bodies(NOISY_STREAMS), NDJSON, tenants=("noisy",)),
    "a hot stream": requests([hot_body()], NDJSON, tenants=("noisy",)),
}


def goals(overload: Overload, quiet: list[Quiet]) -> list[Goal]:
    wrong = overload.failed + overload.hintless
    made = [
        Goal("overload: p99 of accepted requests, ms", overload.accepted.p99_ms, overload.bound_ms, at_least=False),
        Goal("overload: answers that are neither 200 nor 429 with Retry-After", wrong, 0, at_least=False),
        Goal("overload: growth of resident memory", overload.growth, FLAT, at_least=False),
        Goal("overload: seconds to recover", overload.recovery_seconds, RECOVERY_SECONDS, at_least=False),
    ]
    lost = {one.beside: one.refused + one.failed + one.unsent for one in quiet}
    return made + [
        Goal(f"quiet clients beside {name}: refused, failed or not sent", count, 0, at_least=False) for name, count in lost.items()
    ]


def _overload_table(row: Overload) -> Table:
    numbers = (
        "capacity, events/s",
        "offered",
        "accepted",
        *LATENCY_COLUMNS,
        "429",
        "not sent",
        "resident MiB, first to most",
        "recovery s",
    )
    made = table(f"Offered {FACTOR:g} times the capacity for {row.seconds:g} s, bodies of {EVENTS} events", (), numbers)
    rates = (row.capacity_events_per_second, row.offered_events_per_second, row.accepted_events_per_second)
    resident = f"{row.resident_mib[0]:.0f} to {max(row.resident_mib):.0f}"
    shares = (f"{row.refused_share:.0%}", f"{row.unsent_share:.0%}")
    made.add_row(*(f"{rate:,.0f}" for rate in rates), *row.accepted.cells(), *shares, resident, f"{row.recovery_seconds:.2f}")
    return made


def _quiet_table(rows: list[Quiet]) -> Table:
    numbers = ("requests", *LATENCY_COLUMNS, "429", "failed", "not sent", "noisy events/s")
    made = table(f"{QUIET_CLIENTS} quiet clients, {QUIET_RATE:g} single events a second in all", ("beside",), numbers)
    for row in rows:
        counts = (row.refused, row.failed, row.unsent, row.noisy_events_per_second)
        made.add_row(row.beside, f"{row.latency.samples:,}", *row.latency.cells(), *(f"{count:,.0f}" for count in counts))
    return made


if __name__ == "__main__":
    typer.run(main)
