"""Bytes that a stream takes in the store, all included, and whether rates fall with the number of streams.

    python -m bench.memory [--quick] [--streams 1000,100000,1000000] [--model FILE] [--seconds 8] [--json FILE]

For the shipped default and for a detector of eight features, or one named by --model: a store for each number of streams is filled
with warm streams by the service's own commit (`bench.warm`; each has its value, its key and its watch), and gets a service. For each:
    bytes    the growth of the server's `used_memory` ÷ streams: values, keys, expiry, watches, the allocator's and the tables' overhead
    load     streams a second that the service's store reads, 1,000 at a time, drawn from all
    score    events a second through HTTP: bodies of 1,000 streams drawn from all, one event each, four connections
The rates are measured in turn, round by round, so that a slower minute of the machine is everybody's. The same number of bodies is drawn
at each size, so at 1,000 streams the same ones come back at once and at a million they hardly do.

Goals: at most 1,536 bytes for the default and 2,048 at eight features, at the largest number of streams; rates there at least 0.8 of those
at the smallest.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import redis
import typer
from rich.table import Table

from bench.fleet import default_model, fleet_model
from bench.load import Request, Tally, drive
from bench.report import LATENCY_COLUMNS, Goal, JsonFile, Latency, Machine, report, table
from bench.servers import Server, service
from bench.traffic import BODY_EVENTS, bodies, requests, stream_id
from bench.warm import TTL_SECONDS, fill
from service.detector import Detector
from service.embedded import EmbeddedStore
from service.stores.redis import RedisStore, state_key

ROUNDS = 4
BODIES = 200
"""Drawn at each number of streams."""
CONNECTIONS = 4
MOST_BYTES = {1: 1536, 8: 2048}
RATE_GOAL = 0.8


@dataclass(frozen=True)
class Row:
    """One detector with that many streams."""

    model: str
    features: int
    streams: int
    bytes_a_stream: float
    resident_bytes_a_stream: float
    value_bytes: int
    key_bytes: int
    filled_per_second: float
    """Streams written by the commit, without a step."""
    loaded_per_second: float
    scored_per_second: float
    latency: Latency
    """Of a body of 1,000 events."""


def main(
    streams: Annotated[str, typer.Option(help="Numbers of streams, rising, separated by commas.")] = "1000,100000,1000000",
    model: Annotated[Path | None, typer.Option(help="A model file in place of the two.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Measured time of each rate.")] = 8.0,
    quick: Annotated[bool, typer.Option("--quick", help="The shipped default, up to 20,000 streams, two seconds each.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Fill the stores and print what a stream takes and what it costs."""
    machine = Machine.now()
    sizes = [1000, 20_000] if quick else [int(size) for size in streams.split(",")]
    models = [model] if model else [default_model()] if quick else [default_model(), fleet_model()]
    rows = [row for one in models for row in asyncio.run(measure(one, sizes, 2.0 if quick else seconds))]
    report([_table(rows)], goals(rows), machine, {"rows": [asdict(row) for row in rows]}, json_file)


@dataclass
class Store:
    """One filled store with the service on it, and what was measured of both."""

    size: int
    client: RedisStore
    server: Server
    draws: list[list[int]]
    make: Request
    size_of: tuple[float, float, int, int]
    """Bytes a stream, resident; of the value, of the key."""
    filled: float
    loaded: int = 0
    load_seconds: float = 0.0
    scored: Tally = field(default_factory=Tally)


async def measure(model: Path, sizes: Sequence[int], seconds: float) -> list[Row]:
    """All sizes side by side."""
    detector = Detector.load(model)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onset-bench-")))
        stores = [await _opened(stack, folder / str(size), detector, model, size) for size in sizes]
        for _ in range(ROUNDS):
            for store in stores:
                await _load(store, detector.name, seconds / ROUNDS)
                make, connections = store.make, CONNECTIONS
                store.scored.add(await drive(store.server.port, make, connections=connections, seconds=seconds / ROUNDS))
        if failures := sum(store.scored.failures for store in stores):
            raise SystemExit(f"{failures} requests failed; the figures do not count.")
        return [_row(detector, store) for store in stores]


async def _opened(stack: AsyncExitStack, folder: Path, detector: Detector, model: Path, size: int) -> Store:
    embedded = EmbeddedStore(folder / "store")
    url = await embedded.start()
    stack.push_async_callback(embedded.stop)
    with redis.Redis.from_url(url) as client:
        empty = client.info("memory")
        filled = await fill(url, detector, range(size))
        full = client.info("memory")
        key = state_key(detector.name, stream_id(0))
        grown, resident = ((full[name] - empty[name]) / size for name in ("used_memory", "used_memory_rss"))
        size_of = (grown, resident, client.strlen(key), len(key))
        while client.info("persistence")["aof_rewrite_in_progress"]:  # noqa: ASYNC110 - the server tells nobody when it is done
            await asyncio.sleep(0.1)  # it takes a processor, and only large stores do it
    store = RedisStore(url, state_ttl=TTL_SECONDS, result_ttl=600)
    stack.push_async_callback(store.close)
    settings = {"ONSET_MAX_STREAMS": str(10 * size)}
    server = stack.enter_context(service(folder / "data", redis_url=url, model=str(model), settings=settings))
    draws = drawn(size)
    names = detector.manifest.feature_names
    make = requests([bodies(some, names=names, passes=1, seed=i)[0] for i, some in enumerate(draws)])
    return Store(size, store, server, draws, make, size_of, filled)


async def _load(store: Store, model: str, seconds: float) -> None:
    draws = itertools.cycle([[stream_id(i) for i in some] for some in store.draws])
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        store.loaded += len(await store.client.load(model, next(draws)))
    store.load_seconds += time.perf_counter() - began


def _row(detector: Detector, store: Store) -> Row:
    loaded, scored = store.loaded / store.load_seconds, store.scored.rate * BODY_EVENTS
    return Row(detector.name, detector.features, store.size, *store.size_of, store.filled, loaded, scored, store.scored.latency)


def drawn(size: int) -> list[list[int]]:
    """BODIES times 1,000 distinct ones of `size` streams."""
    rng = np.random.default_rng(size)
    return [rng.choice(size, BODY_EVENTS, replace=False).tolist() for _ in range(BODIES)]


def goals(rows: Sequence[Row]) -> list[Goal]:
    made = []
    for name in dict.fromkeys(row.model for row in rows):
        first, *_, last = [row for row in rows if row.model == name]
        if last.features in MOST_BYTES:
            made.append(Goal(f"{name}: bytes a stream", last.bytes_a_stream, MOST_BYTES[last.features], at_least=False))
        of = f"at {last.streams:,} streams of that at {first.streams:,}"
        made.append(Goal(f"{name}: load rate {of}", last.loaded_per_second / first.loaded_per_second, RATE_GOAL))
        made.append(Goal(f"{name}: score rate {of}", last.scored_per_second / first.scored_per_second, RATE_GOAL))
    return made


def _table(rows: Sequence[Row]) -> Table:
    numbers = ("streams", "bytes a stream", "resident", "value", "key", "filled/s", "loaded/s", "scored/s", *LATENCY_COLUMNS)
    made = table("One store, all included", ("model",), numbers)
    for row in rows:
        sizes = (row.streams, row.bytes_a_stream, row.resident_bytes_a_stream, row.value_bytes, row.key_bytes)
        rates = (row.filled_per_second, row.loaded_per_second, row.scored_per_second)
        made.add_row(f"{row.model}, {row.features}", *(f"{value:,.0f}" for value in (*sizes, *rates)), *row.latency.cells())
    return made


if __name__ == "__main__":
    typer.run(main)
