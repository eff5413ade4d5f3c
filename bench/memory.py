"""Bytes that a stream takes in the store, all included, and whether rates fall with the number of streams.

    python -m bench.memory [--quick] [--streams 1000,100000,1000000] [--model FILE] [--seconds 8] [--json FILE]

For the shipped default and for a detector of eight features, or one named by --model: an embedded store is filled, in steps, with warm
streams by the service's own commit (`bench.warm`; each has its value, its key and its watch), and at each number of streams
    bytes    the growth of the server's `used_memory` ÷ streams: values, keys, expiry, watches, the allocator's and the tables' overhead
    load     streams a second that the service's store reads, 1,000 at a time, drawn from all
    score    events a second through HTTP: bodies of 1,000 streams drawn from all, one event each, four connections
The same number of bodies is drawn at each size, so at 1,000 streams the same ones come back at once and at a million they hardly do.

Goals: at most 1,536 bytes for the default and 2,048 at eight features, at the largest number of streams; rates there at least 0.8 of those
at the smallest.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import redis
import typer
from rich.table import Table

from bench.fleet import default_model, fleet_model
from bench.load import drive
from bench.report import LATENCY_COLUMNS, Goal, Latency, Machine, report, table
from bench.servers import service
from bench.traffic import BODY_EVENTS, bodies, requests, stream_id
from bench.warm import TTL_SECONDS, fill
from service.detector import Detector
from service.embedded import EmbeddedStore
from service.stores.redis import RedisStore, state_key

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
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Fill the store and print what a stream takes and what it costs."""
    machine = Machine.now()
    sizes = [1000, 20_000] if quick else [int(size) for size in streams.split(",")]
    models = [model] if model else [default_model()] if quick else [default_model(), fleet_model()]
    rows = [row for one in models for row in asyncio.run(measure(one, sizes, 2.0 if quick else seconds))]
    report([_table(rows)], goals(rows), machine, {"rows": [asdict(row) for row in rows]}, json_file)


async def measure(model: Path, sizes: Sequence[int], seconds: float) -> list[Row]:
    """One store, filled further and further."""
    detector = Detector.load(model)
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder:
        embedded = EmbeddedStore(Path(folder) / "store")
        url = await embedded.start()
        try:
            return await _grow(detector, model, url, Path(folder), sizes, seconds)
        finally:
            await embedded.stop()


async def _grow(detector: Detector, model: Path, url: str, folder: Path, sizes: Sequence[int], seconds: float) -> list[Row]:
    rows, held = [], 0
    with redis.Redis.from_url(url) as client:
        empty = client.info("memory")
        for size in sizes:
            filled = await fill(url, detector, range(held, size))
            held, full = size, client.info("memory")
            key = state_key(detector.name, stream_id(0))
            loaded = await _load_rate(detector, url, size, seconds)
            scored, latency = await asyncio.to_thread(_score_rate, detector, model, url, folder / str(size), size, seconds)
            grown, resident = ((full[name] - empty[name]) / size for name in ("used_memory", "used_memory_rss"))
            taken = (grown, resident, client.strlen(key), len(key))
            rows.append(Row(detector.name, detector.features, size, *taken, filled, loaded, scored, latency))
    return rows


async def _load_rate(detector: Detector, url: str, size: int, seconds: float) -> float:
    store = RedisStore(url, state_ttl=TTL_SECONDS, result_ttl=600)
    draws = itertools.cycle([[stream_id(i) for i in some] for some in drawn(size)])
    began, done = time.perf_counter(), 0
    try:
        while time.perf_counter() - began < seconds:
            done += len(await store.load(detector.name, next(draws)))
    finally:
        await store.close()
    return done / (time.perf_counter() - began)


def _score_rate(detector: Detector, model: Path, url: str, data: Path, size: int, seconds: float) -> tuple[float, Latency]:
    templates = [bodies(some, names=detector.manifest.feature_names, passes=1, seed=i)[0] for i, some in enumerate(drawn(size))]
    with service(data, redis_url=url, model=str(model), settings={"ONSET_MAX_STREAMS": str(10 * size)}) as server:
        tally = asyncio.run(drive(server.port, requests(templates), connections=CONNECTIONS, seconds=seconds))
    if tally.failures:
        raise SystemExit(f"{tally.failures} requests failed; the figures do not count.")
    return tally.rate * BODY_EVENTS, tally.latency


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
