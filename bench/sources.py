"""Events a second through Kafka and NATS JetStream, from message to result, beside the raw client and the engine, each alone.

    python -m bench.sources [--source kafka] [--source nats] [--events 60000] [--quick] [--json FILE]

    raw      the queue's client in one process: consume 500, commit or acknowledge them, and nothing else
    engine   the scorer in this process on the same store: events as a queue delivers them, already read, four batches of 500 in flight
    served   `python -m service serve`: read, parse, score, commit, publish each result, acknowledge
    of both  served ÷ 1 / (1/raw + 1/engine): what would be left if reading and scoring were done one after the other at no further cost

One event a message, four partitions, all there before anybody reads: a backlog. Kafka is librdkafka's mock cluster, in memory and on
loopback: it measures clients, not Kafka. The store is the embedded one (an fsync for each write), the streams are 1,000 warm ones.
Rates are of the last nine tenths. Redis Streams: bench.streams.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import nats
import typer
from confluent_kafka import Consumer, Producer, TopicPartition

from bench.fleet import default_model
from bench.report import Goal, Machine, report, table
from bench.servers import service
from bench.traffic import stream_id
from bench.warm import fill
from bench.wires import Brokers, NatsServer
from service.detector import Detector
from service.embedded import EmbeddedStore
from service.events import Delivery, Event
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.stores.redis import RedisStore

STREAMS, PARTITIONS, COUNT, IN_FLIGHT = 1000, 4, 500, 4
PATIENCE_SECONDS = 300.0
GOAL = 0.7
GOALS = frozenset({"kafka"})
"""Sources with a goal; JetStream's client alone is slower than the engine."""


@dataclass(frozen=True)
class Row:
    source: str
    raw: float
    engine: float
    served: float

    @property
    def of_both(self) -> float:
        return self.served * (1 / self.raw + 1 / self.engine)


class Queue(Protocol):
    """A broker of one measurement."""

    async def fill(self, events: Sequence[Event]) -> None:
        """Into the partitions, by stream."""

    async def raw(self, events: int) -> float:
        """Events a second of the client alone."""

    @property
    def source(self) -> dict[str, object]:
        """For ONSET_SOURCES."""

    async def results(self) -> int:
        """How many came out so far."""

    async def stop(self) -> None: ...


class Kafka:
    def __init__(self, folder: Path) -> None:
        self._brokers = Brokers(folder)
        self._brokers.start()
        for topic in ("events", "results", "dead-letters"):
            self._brokers.topic(topic, PARTITIONS)
        self._reader = Consumer(self._config("reader"))

    def _config(self, group: str) -> dict[str, str | bool | int]:
        options: dict[str, str | bool | int] = {"bootstrap.servers": self._brokers.servers, "group.id": group, "log_level": 0}
        return options | {"auto.offset.reset": "earliest", "enable.auto.commit": False}

    async def fill(self, events: Sequence[Event]) -> None:
        producer = Producer({"bootstrap.servers": self._brokers.servers, "queue.buffering.max.messages": 1_000_000})
        for i, event in enumerate(events):
            producer.produce("events", msgspec.json.encode(event), (event.stream_id or "").encode(), i % STREAMS % PARTITIONS)
        if await asyncio.to_thread(producer.flush, 60):
            raise SystemExit("Kafka did not take all events.")

    async def raw(self, events: int) -> float:
        return await asyncio.to_thread(self._raw, events)

    def _raw(self, events: int) -> float:
        consumer = Consumer(self._config("raw"))
        consumer.subscribe(["events"])
        done, began, counted = 0, 0.0, 0
        while done < events:
            if records := consumer.consume(COUNT, 0.05):
                consumer.commit(asynchronous=True)
            done += len(records)
            if not began and done >= events // 10:
                began, counted = time.perf_counter(), done
        rate = (done - counted) / (time.perf_counter() - began)
        consumer.close()
        return rate

    @property
    def source(self) -> dict[str, object]:
        topics = {"topics": ["events"], "output": "results", "dead_letters": "dead-letters"}
        return {"type": "kafka", "brokers": self._brokers.servers, **topics}

    async def results(self) -> int:
        ends = [self._reader.get_watermark_offsets(TopicPartition("results", p), 5)[1] for p in range(PARTITIONS)]
        return sum(ends)

    async def stop(self) -> None:
        self._reader.close()
        self._brokers.stop()


class JetStream:
    def __init__(self, folder: Path) -> None:
        self._server = NatsServer(folder)
        self._server.start()

    async def open(self) -> None:
        await self._server.wait_ready()
        self._client = await nats.connect(self._server.url)
        self._js = self._client.jetstream(timeout=10)
        await self._js.add_stream(name="EVENTS", subjects=["events.>"])
        await self._js.add_stream(name="OUT", subjects=["out.>"])

    async def fill(self, events: Sequence[Event]) -> None:
        for some in _parts(events):
            sent = [await self._js.publish_async(f"events.{i % STREAMS % PARTITIONS}.all", msgspec.json.encode(event)) for i, event in some]
            await asyncio.gather(*sent)

    async def raw(self, events: int) -> float:
        subscription = await self._js.pull_subscribe("events.>", durable="raw", stream="EVENTS")
        done, began, counted = 0, 0.0, 0
        while done < events:
            messages = await subscription.fetch(COUNT, timeout=5)
            for message in messages:
                await message.ack()
            done += len(messages)
            if not began and done >= events // 10:
                began, counted = time.perf_counter(), done
        return (done - counted) / (time.perf_counter() - began)

    @property
    def source(self) -> dict[str, object]:
        subjects = [f"events.{p}.>" for p in range(PARTITIONS)]
        return {"type": "nats", "servers": [self._server.url], "subjects": subjects, "output": "out.results", "dead_letters": "out.dead"}

    async def results(self) -> int:
        return (await self._js.stream_info("OUT")).state.messages

    async def stop(self) -> None:
        await self._client.close()
        self._server.stop()


def _parts(events: Sequence[Event]) -> list[list[tuple[int, Event]]]:
    numbered = list(enumerate(events))
    return [numbered[i : i + COUNT] for i in range(0, len(numbered), COUNT)]


async def kafka(folder: Path) -> Queue:
    return Kafka(folder)


async def jetstream(folder: Path) -> Queue:
    queue = JetStream(folder)
    await queue.open()
    return queue


QUEUES: dict[str, Callable[[Path], Awaitable[Queue]]] = {"kafka": kafka, "nats": jetstream}


def main(
    source: Annotated[list[str] | None, typer.Option(help=f"{', '.join(QUEUES)}; may be given again. Default: all.")] = None,
    events: Annotated[int, typer.Option(min=5000, max=500_000)] = 60_000,
    quick: Annotated[bool, typer.Option("--quick", help="10,000 events: does it run?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Fill, read, and print a table."""
    machine = Machine.now()
    rows = []
    for name in source or list(QUEUES):
        with tempfile.TemporaryDirectory(prefix="onset-") as folder:
            rows.append(asyncio.run(measure(name, Path(folder), 10_000 if quick else events)))
    made = table("Through queues, events/s", ["source"], ["raw client", "engine", "served", "of both"])
    for row in rows:
        made.add_row(row.source, f"{row.raw:,.0f}", f"{row.engine:,.0f}", f"{row.served:,.0f}", f"{row.of_both:.2f}")
    goals = [Goal(f"{row.source}: served ÷ 1/(1/raw + 1/engine)", row.of_both, GOAL) for row in rows if row.source in GOALS]
    report([made], goals, machine, {"rows": [asdict(row) for row in rows]}, json_file)


async def measure(name: str, folder: Path, events: int) -> Row:
    store = EmbeddedStore(folder / "store")
    async with AsyncExitStack() as stack:
        url = await store.start()
        stack.push_async_callback(store.stop)
        detector = Detector.load(default_model())
        await fill(url, detector, range(STREAMS))
        queue = await QUEUES[name](folder)
        stack.push_async_callback(queue.stop)
        made, now = _made(detector, 2 * events), time.time()
        await queue.fill([msgspec.structs.replace(event, timestamp=now + i / 1e5) for i, event in enumerate(made[events:])])
        raw = await queue.raw(events)
        early = [msgspec.structs.replace(event, timestamp=now - 60 + i / 1e5) for i, event in enumerate(made[:events])]
        engine = await _engine(detector, url, early)
        return Row(name, raw, engine, await _served(queue, url, folder, events))


def _made(detector: Detector, events: int) -> list[Event]:
    [name, *_] = detector.manifest.feature_names
    return [Event(stream_id(i % STREAMS), {name: 20 + i * 7919 % 101 / 100}) for i in range(events)]


async def _engine(detector: Detector, url: str, events: Sequence[Event]) -> float:
    """The scorer alone: each stream's events in order, IN_FLIGHT parts of the streams at once."""
    store = RedisStore(url, state_ttl=86_400, result_ttl=600)
    await store.open()
    scorer = Scorer(detector, Policy(tau=detector.manifest.age_constant), store, Metrics(), Limits())
    scorer.start()

    async def run(part: int, first: int, last: int) -> None:
        mine = [(i, events[i]) for i in range(first, last) if i % STREAMS % IN_FLIGHT == part]
        for start in range(0, len(mine), COUNT):
            await scorer.consume([Delivery(event, part + 1, i, 0.0) for i, event in mine[start : start + COUNT]], str(part))

    first = len(events) // 10
    await asyncio.gather(*(run(part, 0, first) for part in range(IN_FLIGHT)))
    began = time.perf_counter()
    await asyncio.gather(*(run(part, first, len(events)) for part in range(IN_FLIGHT)))
    rate = (len(events) - first) / (time.perf_counter() - began)
    await scorer.drain(5)
    await store.close()
    return rate


async def _served(queue: Queue, url: str, folder: Path, events: int) -> float:
    with service(folder / "data", redis_url=url, settings={"ONSET_SOURCES": json.dumps([queue.source])}):
        began, first = await _until(queue, events // 10)
        ended, last = await _until(queue, events)
    return (last - first) / (ended - began)


async def _until(queue: Queue, results: int) -> tuple[float, int]:
    """When there were so many results, and how many."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while True:
        count, now = await queue.results(), time.perf_counter()
        if count >= results:
            return now, count
        if now > deadline:
            raise SystemExit(f"Only {count} of {results} results after {PATIENCE_SECONDS:.0f} s.")
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    typer.run(main)
