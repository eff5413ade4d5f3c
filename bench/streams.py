"""Events a second through Redis Streams, from XADD to the result in the output stream, beside the raw client alone.

    python -m bench.streams [--quick] [--entries 60000] [--json FILE]

    raw        redis-py in one process: XREADGROUP COUNT 500, XACK, XDEL, and nothing else
    one event an entry, one partition     `python -m service serve`: read, parse, score, and state, result and acknowledgement in one commit
    one event an entry, four partitions   the same, four batches under way at once
    100 events an entry                   the same events as arrays: acknowledged after their commits

Entries are all there before anybody reads, so what is measured is a backlog. The store is the embedded one (an fsync for each
write), the streams are 1,000 warm ones, each event is of another one than the last. Rates are of the last nine tenths of the entries.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import redis
import typer

from bench.fleet import default_model
from bench.report import Machine, report, table
from bench.servers import service
from bench.traffic import stream_id
from bench.warm import fill
from service.detector import Detector
from service.embedded import EmbeddedStore

STREAMS, RAW_COUNT, ARRAY = 1000, 500, 100
KEY, OUTPUT = "bench:events", "bench:results"
PATIENCE_SECONDS = 300.0
PIPELINE = 1000


@dataclass(frozen=True)
class Row:
    what: str
    events_per_second: float
    events: int


def main(
    entries: Annotated[int, typer.Option(min=5000, max=1_000_000, help="Events of each line.")] = 60_000,
    quick: Annotated[bool, typer.Option("--quick", help="10,000 events: does it run?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Fill, read, and print a table."""
    machine = Machine.now()
    with tempfile.TemporaryDirectory(prefix="onset-") as folder:
        rows = asyncio.run(measure(Path(folder), 10_000 if quick else entries))
    made = table("Through Redis Streams", ["what"], ["events/s", "of raw"])
    for row in rows:
        made.add_row(row.what, f"{row.events_per_second:,.0f}", f"{row.events_per_second / rows[0].events_per_second:.2f}")
    report([made], [], machine, {"rows": [asdict(row) for row in rows]}, json_file)


async def measure(folder: Path, events: int) -> list[Row]:
    store = EmbeddedStore(folder / "store")
    url = await store.start()
    try:
        detector = Detector.load(default_model())
        await fill(url, detector, range(STREAMS))
        return await asyncio.to_thread(_rows, url, folder, events, detector)
    finally:
        await store.stop()


def _rows(url: str, folder: Path, events: int, detector: Detector) -> list[Row]:
    [name, *_] = detector.manifest.feature_names
    count, now = itertools.count(), time.time()

    def one(i: int) -> dict[str, Any]:
        # Each is later than the one before, whatever was measured before.
        return {"stream_id": stream_id(i % STREAMS), "values": {name: 20 + i * 7919 % 101 / 100}, "timestamp": now + next(count) / 1e5}

    with redis.Redis.from_url(url) as client:
        rows = [Row("raw: XREADGROUP, XACK, XDEL", _raw(client, events, one), events)]
        for what, partitions, array in (
            ("one event an entry, one partition", 1, 1),
            ("one event an entry, four partitions", 4, 1),
            (f"{ARRAY} events an entry, one partition", 1, ARRAY),
        ):
            rate = _served(client, url, folder, events, one, partitions, array)
            rows.append(Row(what, rate, events))
    return rows


def _raw(client: redis.Redis, events: int, one: Callable[[int], dict[str, Any]]) -> float:
    _add(client, [KEY], events, one, 1)
    client.xgroup_create(KEY, "raw", id="0")
    done, began, counted = 0, 0.0, 0
    while done < events:
        answer: Any = client.xreadgroup("raw", "me", {KEY: ">"}, count=RAW_COUNT)
        ids = [id_ for id_, _ in answer[0][1]]
        with client.pipeline(transaction=False) as pipeline:
            pipeline.xack(KEY, "raw", *ids)
            pipeline.xdel(KEY, *ids)
            pipeline.execute()
        done += len(ids)
        if not began and done >= events // 10:
            began, counted = time.perf_counter(), done
    rate = (done - counted) / (time.perf_counter() - began)
    client.delete(KEY)
    return rate


def _served(
    client: redis.Redis, url: str, folder: Path, events: int, one: Callable[[int], dict[str, Any]], partitions: int, array: int
) -> float:
    keys = [KEY] if partitions == 1 else [f"{KEY}:{{{p}}}" for p in range(partitions)]
    client.delete(OUTPUT, *keys)
    _add(client, keys, events, one, array)
    settings = {
        "ONSET_STREAMS_INPUT": KEY,
        "ONSET_STREAMS_OUTPUT": OUTPUT,
        "ONSET_STREAMS_PARTITIONS": str(partitions),
        "ONSET_STREAMS_MAX_RESULTS": str(10 * events),
    }
    with service(folder / "data", redis_url=url, settings=settings):
        began, first = _until(client, events // 10)
        ended, last = _until(client, events)
    if last != events or any(map(client.xlen, keys)):
        raise SystemExit(f"{events} events were added, {last} results came out and {sum(map(client.xlen, keys))} entries are left.")
    return (last - first) / (ended - began)


def _until(client: redis.Redis, results: int) -> tuple[float, int]:
    """When there were so many results, and how many."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while True:
        count, now = int(client.xlen(OUTPUT)), time.perf_counter()
        if count >= results:
            return now, count
        if now > deadline:
            raise SystemExit(f"Only {count} of {results} results after {PATIENCE_SECONDS:.0f} s.")
        time.sleep(0.005)


def _add(client: redis.Redis, keys: Sequence[str], events: int, one: Callable[[int], dict[str, Any]], array: int) -> None:
    """Each stream's events go to one of the keys."""
    waiting: list[list[dict[str, Any]]] = [[] for _ in keys]
    with client.pipeline(transaction=False) as pipeline:
        for i in range(events):
            part = i % STREAMS % len(keys)
            waiting[part].append(one(i))
            if len(waiting[part]) == array:
                content = json.dumps(waiting[part] if array > 1 else waiting[part][0])
                pipeline.xadd(keys[part], {"event": content})
                waiting[part] = []
            if len(pipeline) >= PIPELINE:
                pipeline.execute()
        pipeline.execute()


if __name__ == "__main__":
    typer.run(main)
