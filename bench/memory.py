"""Bytes that one stream takes in the store, all included: value, key, and the server's own overhead.

    python -m bench.memory [--streams 100000] [--model FILE] [--json FILE]

Really fills the embedded store through the service's HTTP door, one event a stream, and divides the growth of the server's
`used_memory`; beside it the size of the value alone.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import redis
import typer
from rich.table import Table

from bench.http import BULK_EVENTS
from bench.servers import console, service
from service.embedded import EmbeddedStore

MAX_STREAMS = 1_000_000


@dataclass(frozen=True)
class Figures:
    model: str
    features: int
    streams: int
    bytes_a_stream: float
    value_bytes: int
    key_bytes: int
    resident_bytes_a_stream: float
    seconds: float


def main(
    streams: Annotated[int, typer.Option(min=1000, max=MAX_STREAMS, help="How many streams to fill the store with.")] = 100_000,
    model: Annotated[str, typer.Option(help="A model file; without it, the shipped one.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Fill the store and print the bytes a stream takes."""
    figures = asyncio.run(measure(streams, model))
    console().print(_table(figures))
    if json_file:
        json_file.write_text(json.dumps(asdict(figures), indent=2))


async def measure(streams: int, model: str) -> Figures:
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder:
        store = EmbeddedStore(Path(folder) / "store")
        url = await store.start()
        try:
            return await asyncio.to_thread(_fill, url, streams, model, Path(folder))
        finally:
            await store.stop()


def _fill(url: str, streams: int, model: str, folder: Path) -> Figures:
    with redis.Redis.from_url(url) as store, service(folder / "data", redis_url=url, model=model) as server:
        door = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        served = _served(door)
        names = [feature["name"] for feature in served["features"]]
        empty, began = store.info("memory"), time.perf_counter()
        for first in range(0, streams, BULK_EVENTS):
            _send(door, [_event(i, names) for i in range(first, min(first + BULK_EVENTS, streams))])
        full, seconds = store.info("memory"), time.perf_counter() - began
        keys = [key for key in store.scan_iter(count=1000) if b"bench-" in key]
        if len(keys) != streams:
            raise SystemExit(f"{streams} streams were sent, the store holds {len(keys)} keys.")
        return Figures(
            served["name"],
            len(names),
            streams,
            (full["used_memory"] - empty["used_memory"]) / streams,
            store.strlen(keys[0]),
            len(keys[0]),
            (full["used_memory_rss"] - empty["used_memory_rss"]) / streams,
            seconds,
        )


def _send(door: http.client.HTTPConnection, events: list[bytes]) -> None:
    door.request("POST", "/v1/events", b"\n".join(events), {"Content-Type": "application/x-ndjson"})
    answer = door.getresponse()
    body = answer.read()
    if answer.status != http.HTTPStatus.OK:
        raise SystemExit(f"The service answered {answer.status}: {body[:500]!r}")


def _event(stream: int, names: list[str]) -> bytes:
    values = {name: round(20 + math.sin(stream + j), 3) for j, name in enumerate(names)}
    return json.dumps({"stream_id": f"bench-{stream:06d}", "values": values, "timestamp": time.time()}).encode()


def _served(door: http.client.HTTPConnection) -> Any:
    """The one model that is served."""
    door.request("GET", "/v1/models")
    return json.loads(door.getresponse().read())["models"][0]


def _table(figures: Figures) -> Table:
    table = Table(
        title=f"{figures.streams:,} streams of '{figures.model}' ({figures.features} features), filled in {figures.seconds:.1f} s"
    )
    table.add_column("a stream")
    table.add_column("bytes", justify="right")
    table.add_row("all included (used_memory)", f"{figures.bytes_a_stream:,.0f}")
    table.add_row("the value", f"{figures.value_bytes:,}")
    table.add_row("the key", f"{figures.key_bytes:,}")
    table.add_row("resident memory of the server", f"{figures.resident_bytes_a_stream:,.0f}")
    return table


if __name__ == "__main__":
    typer.run(main)
