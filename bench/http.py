"""Throughput and latency of POST /v1/events, beside the same application with nothing behind its door.

    python -m bench.http [--quick] [--seconds 10] [--json FILE]

    bulk 1    NDJSON bodies of 1,000 events over 10,000 warm streams, one event a stream (the hardest case), 4 connections
    bulk 10   the same with ten events a stream: 100 streams a body
    single    one event a request over the same streams, 64 connections

Four servers, each a process of its own: the service with its embedded store and the shipped detector; the same application with a
scorer that answers a constant; with a handler of Starlette's that only reads the body; and with such a one in plain ASGI (`bench.empty`).
They run side by side and are loaded in turn, in rounds, so that a slower minute of the machine is everybody's. The engine's floor
(`bench.engine`) is measured in every round, too. The load generator is a process of its own on the same machine, so with few processors
every figure is a floor.

Goals, of durable states: bulk at least 0.7 of 1 / (1/empty handler's rate + 1/engine's floor); single at least 0.6 of the empty handler's
rate, its p99 at most 3 times the empty handler's.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import harmonic_mean
from typing import Annotated

import psutil
import typer
from rich.table import Table

from bench import engine
from bench.fleet import default_model
from bench.load import Request, Tally, drive
from bench.report import LATENCY_COLUMNS, Goal, JsonFile, Latency, Machine, report, table
from bench.servers import Server, service, started
from bench.traffic import BODY_EVENTS, JSON, bodies, requests, singles
from bench.warm import fill
from service.detector import Detector

STREAMS = engine.STREAMS
SERVICE, CONSTANT, EMPTY, BARE = "service", "constant scorer", "empty handler", "empty, plain ASGI"
ROUNDS = 2
BULK_GOAL, SINGLE_GOAL, P99_GOAL = 0.7, 0.6, 3.0


@dataclass(frozen=True)
class Load:
    """One kind of load; `each` events of a stream in a request of `events`."""

    name: str
    each: int
    events: int
    connections: int

    def requests(self) -> Request:
        if self.events == 1:
            return requests(singles(range(STREAMS)), JSON)
        return requests(bodies(range(STREAMS), self.each), each=self.each)


LOADS = (Load("bulk 1", 1, BODY_EVENTS, 4), Load("bulk 10", 10, BODY_EVENTS, 4), Load("single", 1, 1, 64))


@dataclass
class Spent:
    """One server under one load, over all rounds."""

    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    """Warm-up included, as are the processor's seconds."""
    server: float = 0.0
    store: float = 0.0


@dataclass(frozen=True)
class Row:
    server: str
    load: str
    events_per_second: float
    latency: Latency
    """Of a request."""
    server_cores: float
    """Processor seconds the server used for a second of the load."""
    store_cores: float
    """The same of its child, the embedded store."""
    failures: int


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Measured time of each load on each server.")] = 10.0,
    quick: Annotated[bool, typer.Option("--quick", help="Two seconds each, in one round: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure the four servers in turn and print a table."""
    machine = Machine.now()
    seconds, rounds = (2.0, 1) if quick else (seconds, ROUNDS)
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder, ExitStack() as running:
        servers = {
            SERVICE: running.enter_context(warm_service(Path(folder))),
            CONSTANT: running.enter_context(_baseline("constant")),
            EMPTY: running.enter_context(_baseline("empty")),
            BARE: running.enter_context(_baseline("bare")),
        }
        rows, floors = measure(servers, seconds, rounds)
        stages = _stages(servers[SERVICE])
    figures = {"seconds": seconds, "rows": [asdict(row) for row in rows], "engine_floor_events_per_second": floors, "stages_ms": stages}
    report([_table(rows)], goals(rows, floors), machine, figures, json_file)
    shown = ", ".join(f"{stage} {mean:.1f} ms" for stage, mean in stages.items())
    typer.echo(f"A batch in the service, mean wall time of its stages over all loads: {shown}")
    if any(row.failures for row in rows):
        raise SystemExit("Some requests failed; the figures do not count.")


def measure(servers: Mapping[str, Server], seconds: float, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Every load on every server, in turn and round by round; and the engine's floor, events a second, for each bulk load."""
    spent = {(name, load.name): Spent() for name in servers for load in LOADS}
    makes = {load.name: load.requests() for load in LOADS}
    floors: dict[str, list[float]] = {load.name: [] for load in LOADS if load.events > 1}
    for _ in range(rounds):
        for load in LOADS:
            for name, server in servers.items():
                _add(spent[name, load.name], server, makes[load.name], load, seconds / rounds)
            if load.name in floors:
                floors[load.name].append(engine.measure(default_model(), load.each, seconds / rounds).floor_events_per_second)
    rows = [_row(name, load, spent[name, load.name]) for load in LOADS for name in servers]
    return rows, {name: round(harmonic_mean(rates)) for name, rates in floors.items()}


def goals(rows: list[Row], floors: Mapping[str, float]) -> list[Goal]:
    """What issue and docs ask for."""
    rate = {(row.server, row.load): row.events_per_second for row in rows}
    p99 = {row.server: row.latency.p99_ms for row in rows if row.load == "single"}
    made = []
    for load, floor in floors.items():
        reachable = 1 / (1 / rate[EMPTY, load] + 1 / floor)
        made.append(Goal(f"{load}: events/s of 1 / (1/empty + 1/floor) = {reachable:,.0f}", rate[SERVICE, load] / reachable, BULK_GOAL))
    made.append(Goal("single: events/s of the empty handler's", rate[SERVICE, "single"] / rate[EMPTY, "single"], SINGLE_GOAL))
    made.append(Goal("single: p99 of the empty handler's", p99[SERVICE] / p99[EMPTY], P99_GOAL, at_least=False))
    return made


@contextmanager
def warm_service(folder: Path) -> Iterator[Server]:
    """The service with its embedded store in `folder`, which holds STREAMS warm streams."""
    model = default_model()
    with service(folder, model=str(model)) as server:
        asyncio.run(fill(store_url(folder), Detector.load(model), range(STREAMS)))
        yield server


def store_url(data_dir: Path) -> str:
    """Of the embedded store of a service with this data folder (its path must be a short one)."""
    return f"unix://{data_dir / 'store.sock'}"


def _baseline(kind: str) -> AbstractContextManager[Server]:
    return started([sys.executable, "-m", "bench.empty", kind], {}, ready="/health/live")


def _add(spent: Spent, server: Server, make: Request, load: Load, seconds: float) -> None:
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True)
    before, began = (_cpu([process]), _cpu(children)), time.perf_counter()
    spent.tally.add(asyncio.run(drive(server.port, make, connections=load.connections, seconds=seconds)))
    spent.seconds += time.perf_counter() - began
    spent.server += _cpu([process]) - before[0]
    spent.store += _cpu(children) - before[1]


def _row(name: str, load: Load, spent: Spent) -> Row:
    cores = spent.server / spent.seconds, spent.store / spent.seconds
    return Row(name, load.name, round(spent.tally.rate * load.events), spent.tally.latency, *cores, spent.tally.failures)


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


def _table(rows: list[Row]) -> Table:
    numbers = ("events/s", *LATENCY_COLUMNS, "cores: server", "store", "events/s a core of the server")
    made = table(f"POST /v1/events over {STREAMS:,} warm streams, load generator on the same machine", ("load", "server"), numbers)
    for row in rows:
        cores = (f"{row.server_cores:.2f}", f"{row.store_cores:.2f}", f"{row.events_per_second / max(0.01, row.server_cores):,.0f}")
        made.add_row(row.load, row.server, f"{row.events_per_second:,.0f}", *row.latency.cells(), *cores)
    return made


if __name__ == "__main__":
    typer.run(main)
