"""Events a second through each queue, from message to result, beside the raw client and the engine, each alone.

    python -m bench.sources [--source kafka] [--source nats] [--events 60000] [--quick] [--json FILE]

    raw      the queue's client in one process: read a batch, commit or acknowledge it, and nothing else
    publish  the same, which also publishes as much as a result for each event and waits until the broker has it, as the service must
    engine   the whole path in this process on the same store, as in bench.engine: a message's bytes → event → score → commit → the result's
             bytes, four batches in flight; before and after `served`, so that a slower minute of the machine is everybody's
    served   `python -m service serve`: read, parse, score, commit, publish each result, acknowledge
    of both  served ÷ 1 / (1/raw + 1/engine): what would be left if reading and scoring were done one after the other at no further cost;
             then with `publish` in the place of `raw`

All take the source's own batches. One event a message, four partitions (MQTT has one), all there before anybody reads: a backlog. Kafka is
librdkafka's mock cluster, in memory and on loopback: it measures clients, not Kafka. The store is the embedded one (an fsync for each
write), the streams are 1,000 warm ones. Rates leave out the first tenth; served also the last twentieth, so that it can be asked rarely.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import aio_pika
import httpx
import msgspec
import nats
import redis
import typer
import uvloop
from aio_pika import DeliveryMode, ExchangeType
from aio_pika.abc import AbstractIncomingMessage
from confluent_kafka import Consumer, Producer, TopicPartition
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from pydantic import TypeAdapter

from bench.bus_wires import Mosquitto, RabbitMQ
from bench.fleet import default_model
from bench.report import Goal, JsonFile, Machine, report, table
from bench.servers import service
from bench.traffic import stream_id
from bench.warm import fill
from bench.wires import Brokers, NatsServer
from service import memory
from service.detector import Detector
from service.embedded import EmbeddedStore
from service.events import Delivery, Event
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.sources.options import AnyQueue
from service.stores.redis import RedisStore

STREAMS, PARTITIONS, FILL, IN_FLIGHT = 1000, 4, 500, 4
PATIENCE_SECONDS = 300.0
RESULT = b"x" * 640
"""As large as a result of the default detector."""
GOAL = 0.7
GOALS = frozenset({"redis_streams", "kafka"})
FEWER = {"mqtt": 3, "amqp": 3}
"""These are slow: a part of the events is enough."""


@dataclass(frozen=True)
class Row:
    source: str
    batch: int
    raw: float
    publish: float
    engine: float
    served: float

    @property
    def of_both(self) -> float:
        return self.served * (1 / self.raw + 1 / self.engine)

    @property
    def of_all(self) -> float:
        return self.served * (1 / self.publish + 1 / self.engine)


class Queue(Protocol):
    """A broker of one measurement."""

    async def open(self) -> None:
        """Before anything else."""

    async def fill(self, events: Sequence[Event]) -> None:
        """Into the partitions, by stream."""

    async def raw(self, events: int, batch: int, *, publish: bool) -> float:
        """Events a second of the client alone, which reads `batch` of them at once. May be called once for each `publish`."""

    @property
    def source(self) -> dict[str, object]:
        """For ONSET_SOURCES."""

    async def results(self, url: str) -> int:
        """How many came out so far, of the service at `url`."""

    async def stop(self) -> None: ...


class Kafka:
    def __init__(self, folder: Path) -> None:
        self._brokers = Brokers(folder)
        self._brokers.start()
        for topic in ("events", "results", "dead-letters", "raw-results"):
            self._brokers.topic(topic, PARTITIONS)
        self._reader = Consumer(self._config("reader"))

    async def open(self) -> None: ...

    def _config(self, group: str) -> dict[str, str | bool | int]:
        options: dict[str, str | bool | int] = {"bootstrap.servers": self._brokers.servers, "group.id": group, "log_level": 0}
        return options | {"auto.offset.reset": "earliest", "enable.auto.commit": False}

    async def fill(self, events: Sequence[Event]) -> None:
        producer = Producer({"bootstrap.servers": self._brokers.servers, "queue.buffering.max.messages": 1_000_000})
        for i, event in enumerate(events):
            producer.produce("events", msgspec.json.encode(event), (event.stream_id or "").encode(), i % STREAMS % PARTITIONS)
        if await asyncio.to_thread(producer.flush, 60):
            raise SystemExit("Kafka did not take all events.")

    async def raw(self, events: int, batch: int, *, publish: bool) -> float:
        return await asyncio.to_thread(self._raw, events, batch, publish)

    def _raw(self, events: int, batch: int, publish: bool) -> float:
        consumer = Consumer(self._config(f"raw-{publish}"))
        producer = Producer({"bootstrap.servers": self._brokers.servers, "enable.idempotence": True, "acks": "all", "linger.ms": 5})
        consumer.subscribe(["events"])
        clock = _Clock(events)
        while clock.left:
            if records := consumer.consume(batch, 0.05):
                if publish:
                    for record in records:
                        producer.produce("raw-results", RESULT, record.key(), headers=[("onset_id", b"x" * 30)])
                    producer.flush(PATIENCE_SECONDS)
                consumer.commit(asynchronous=True)
            clock.count(len(records))
        consumer.close()
        return clock.rate

    @property
    def source(self) -> dict[str, object]:
        topics = {"topics": ["events"], "output": "results", "dead_letters": "dead-letters"}
        return {"type": "kafka", "brokers": self._brokers.servers, **topics}

    async def results(self, url: str) -> int:
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
        await self._js.add_stream(name="RAW", subjects=["raw"])

    async def fill(self, events: Sequence[Event]) -> None:
        for some in _parts(events):
            sent = [await self._js.publish_async(f"events.{i % STREAMS % PARTITIONS}.all", msgspec.json.encode(event)) for i, event in some]
            await asyncio.gather(*sent)

    async def raw(self, events: int, batch: int, *, publish: bool) -> float:
        subscription = await self._js.pull_subscribe("events.>", durable=f"raw-{publish}", stream="EVENTS")
        clock = _Clock(events)
        while clock.left:
            messages = await subscription.fetch(batch, timeout=5)
            if publish:
                await asyncio.gather(*[await self._js.publish_async("raw", RESULT) for _ in messages])
            for message in messages:
                await message.ack()
            clock.count(len(messages))
        return clock.rate

    @property
    def source(self) -> dict[str, object]:
        subjects = [f"events.{p}.>" for p in range(PARTITIONS)]
        return {"type": "nats", "servers": [self._server.url], "subjects": subjects, "output": "out.results", "dead_letters": "out.dead"}

    async def results(self, url: str) -> int:
        return (await self._js.stream_info("OUT")).state.messages

    async def stop(self) -> None:
        await self._client.close()
        self._server.stop()


class RedisStreams:
    """In the state store itself."""

    KEYS = tuple(f"bench:events:{{{p}}}" for p in range(PARTITIONS))

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)

    async def open(self) -> None: ...

    async def fill(self, events: Sequence[Event]) -> None:
        await asyncio.to_thread(self._fill, events)

    def _fill(self, events: Sequence[Event]) -> None:
        for some in _parts(events):
            with self._client.pipeline(transaction=False) as pipeline:
                for i, event in some:
                    pipeline.xadd(self.KEYS[i % STREAMS % PARTITIONS], {"event": msgspec.json.encode(event)})
                pipeline.execute()

    async def raw(self, events: int, batch: int, *, publish: bool) -> float:
        return await asyncio.to_thread(self._raw, events, batch, publish)

    def _raw(self, events: int, batch: int, publish: bool) -> float:
        for key in self.KEYS:
            self._client.xgroup_create(key, "raw", id="0")
        clock = _Clock(events)
        while clock.left:
            answer: Any = self._client.xreadgroup("raw", "me", dict.fromkeys(self.KEYS, ">"), count=batch)
            with self._client.pipeline(transaction=False) as pipeline:
                for key, entries in answer:
                    for _ in entries if publish else ():
                        pipeline.xadd("bench:raw-results", {"result": RESULT})
                    pipeline.xack(key, "raw", *(id_ for id_, _ in entries))
                pipeline.execute()
            clock.count(sum(len(entries) for _, entries in answer))
        for key in self.KEYS:
            self._client.xgroup_destroy(key, "raw")
        return clock.rate

    @property
    def source(self) -> dict[str, object]:
        return {"type": "redis_streams", "key": "bench:events", "partitions": PARTITIONS}

    async def results(self, url: str) -> int:
        return int(self._client.xlen("onset:results"))

    async def stop(self) -> None:
        self._client.close()


class Mqtt:
    """One session for the service and two for the raw client, all there before the first message."""

    def __init__(self, folder: Path) -> None:
        self._broker = Mosquitto(folder)
        self._broker.start()

    async def open(self) -> None:
        await self._broker.wait_ready()
        for session in ("raw-False", "raw-True", "onset"):
            heard = threading.Event()
            client = self._client(session)
            client.on_subscribe = lambda *_, heard=heard: heard.set()
            client.subscribe("events/+", qos=1)
            client.loop_start()
            await asyncio.to_thread(heard.wait, 10)
            client.disconnect()
            client.loop_stop()

    def _client(self, session: str) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, session, protocol=MQTTProtocolVersion.MQTTv5)
        about = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        about.SessionExpiryInterval, about.ReceiveMaximum = 3600, 2000
        client.connect("127.0.0.1", self._broker.port, clean_start=False, properties=about)
        return client

    async def fill(self, events: Sequence[Event]) -> None:
        client = self._client("filler")
        client.loop_start()
        for some in _parts(events):
            sent = [client.publish(f"events/{i % STREAMS}", msgspec.json.encode(event), qos=1) for i, event in some]
            await asyncio.to_thread(sent[-1].wait_for_publish, 60)
        client.disconnect()
        client.loop_stop()

    async def raw(self, events: int, batch: int, *, publish: bool) -> float:
        return await asyncio.to_thread(self._raw, events, publish)

    def _raw(self, events: int, publish: bool) -> float:
        client, clock = self._client(f"raw-{publish}"), _Clock(events)
        if publish:
            about = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            about.ContentType, about.UserProperty = "application/json", [("id", "x" * 30), ("stream_id", "x" * 12)]

            def answer(*_: object) -> None:
                client.publish("raw-results", RESULT, qos=1, properties=about)

            client.on_message, client.on_publish = answer, lambda *_: clock.count(1)
        else:
            client.on_message = lambda *_: clock.count(1)
        while clock.left:
            client.loop(1)
        client.disconnect()
        return clock.rate

    @property
    def source(self) -> dict[str, object]:
        topics = {"topics": ["events/+"], "output": "results", "dead_letters": "dead-letters"}
        return {"type": "mqtt", "url": f"mqtt://127.0.0.1:{self._broker.port}", **topics}

    async def results(self, url: str) -> int:
        return await _acknowledged(url, "mqtt")

    async def stop(self) -> None:
        self._broker.stop()


class Amqp:
    """Each event goes to a queue for the service and to two for the raw client."""

    def __init__(self, folder: Path) -> None:
        self._broker = RabbitMQ(folder)
        self._broker.start()

    async def open(self) -> None:
        await self._broker.wait_ready()
        self._connection = await aio_pika.connect(self._broker.url)
        self._channel = await self._connection.channel()
        self._exchange = await self._channel.declare_exchange("events", ExchangeType.TOPIC, durable=True)
        for p in range(PARTITIONS):
            for reader in ("raw-False", "raw-True", "events"):
                await (await self._channel.declare_queue(f"{reader}.{p}", durable=True)).bind(self._exchange, str(p))

    async def fill(self, events: Sequence[Event]) -> None:
        for some in _parts(events):
            messages = [
                (aio_pika.Message(msgspec.json.encode(event), delivery_mode=DeliveryMode.PERSISTENT), str(i % STREAMS % PARTITIONS))
                for i, event in some
            ]
            await asyncio.gather(*(self._exchange.publish(message, key) for message, key in messages))

    async def raw(self, events: int, batch: int, *, publish: bool) -> float:
        clock, here = _Clock(events), asyncio.Queue[AbstractIncomingMessage]()
        result = aio_pika.Message(RESULT, delivery_mode=DeliveryMode.PERSISTENT, message_id="x" * 30)
        async with self._connection.channel() as channel, asyncio.timeout(PATIENCE_SECONDS):
            out = await channel.declare_exchange("raw-results", ExchangeType.TOPIC, durable=True)
            await channel.set_qos(prefetch_count=2 * batch, global_=True)
            for p in range(PARTITIONS):
                await (await channel.get_queue(f"raw-{publish}.{p}", ensure=False)).consume(here.put)
            while clock.left:
                messages = [await here.get(), *(here.get_nowait() for _ in range(min(batch - 1, here.qsize())))]
                if publish:
                    await asyncio.gather(*(out.publish(result, "x", mandatory=False) for _ in messages))
                await messages[-1].ack(multiple=True)
                clock.count(len(messages))
        return clock.rate

    @property
    def source(self) -> dict[str, object]:
        queues = [f"events.{p}" for p in range(PARTITIONS)]
        return {"type": "amqp", "url": self._broker.url, "queues": queues, "output": "results", "dead_letters": "dead-letters"}

    async def results(self, url: str) -> int:
        return await _acknowledged(url, "amqp")

    async def stop(self) -> None:
        await self._connection.close()
        self._broker.stop()


class _Clock:
    """The rate of the last nine tenths of `events`."""

    def __init__(self, events: int) -> None:
        self._events, self._done, self._began, self._counted = events, 0, 0.0, 0
        self.rate = 0.0

    @property
    def left(self) -> bool:
        return self._done < self._events

    def count(self, done: int) -> None:
        self._done += done
        if not self._began and self._done >= self._events // 10:
            self._began, self._counted = time.perf_counter(), self._done
        if not self.left and not self.rate:
            self.rate = (self._done - self._counted) / (time.perf_counter() - self._began)


async def _acknowledged(url: str, source: str) -> int:
    """By the service's own count: a message is acknowledged when its result is with the broker."""
    name = f'onset_source_acknowledged_total{{source="{source}"}} '
    async with httpx.AsyncClient(timeout=10) as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return round(sum(float(line.removeprefix(name)) for line in lines if line.startswith(name)))


def _parts(events: Sequence[Event]) -> list[list[tuple[int, Event]]]:
    numbered = list(enumerate(events))
    return [numbered[i : i + FILL] for i in range(0, len(numbered), FILL)]


QUEUES: dict[str, Callable[[Path, str], Queue]] = {
    "redis_streams": lambda folder, url: RedisStreams(url),
    "kafka": lambda folder, url: Kafka(folder),
    "nats": lambda folder, url: JetStream(folder),
    "mqtt": lambda folder, url: Mqtt(folder),
    "amqp": lambda folder, url: Amqp(folder),
}
"""By the state store's address, and a folder for what a broker keeps."""


def main(
    source: Annotated[list[str] | None, typer.Option(help=f"{', '.join(QUEUES)}; may be given again. Default: all.")] = None,
    events: Annotated[int, typer.Option(min=5000, max=500_000)] = 60_000,
    quick: Annotated[bool, typer.Option("--quick", help="10,000 events: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Fill, read, and print a table."""
    machine = Machine.now()
    memory.settle()  # as served
    rows = []
    for name in source or list(QUEUES):
        count = (10_000 if quick else events) // FEWER.get(name, 1)
        with tempfile.TemporaryDirectory(prefix="onset-") as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows.append(runner.run(measure(name, Path(folder), count)))
    columns = ["batch", "raw client", "which publishes", "engine", "served", "of both", "publishing"]
    made = table("Through queues, events/s", ["source"], columns)
    for row in rows:
        rates = [f"{rate:,.0f}" for rate in (row.batch, row.raw, row.publish, row.engine, row.served)]
        made.add_row(row.source, *rates, f"{row.of_both:.2f}", f"{row.of_all:.2f}")
    goals = [Goal(f"{row.source}: served ÷ 1/(1/raw + 1/engine)", row.of_both, GOAL) for row in rows if row.source in GOALS]
    report([made], goals, machine, {"rows": [asdict(row) for row in rows]}, json_file)


async def measure(name: str, folder: Path, events: int) -> Row:
    store = EmbeddedStore(folder / "store")
    async with AsyncExitStack() as stack:
        url = await store.start()
        stack.push_async_callback(store.stop)
        detector = Detector.load(default_model())
        await fill(url, detector, range(STREAMS))
        queue = QUEUES[name](folder, url)
        await queue.open()
        stack.push_async_callback(queue.stop)
        batch = TypeAdapter[AnyQueue](AnyQueue).validate_python(queue.source).batch
        made, now = _made(detector, events), time.time()
        await queue.fill(_timed(made, now))
        raw, publish = [await queue.raw(events, batch, publish=publish) for publish in (False, True)]
        before = await _engine(detector, url, _timed(made[: events // 2], now - 60), batch)
        served = await _served(queue, url, folder, events)
        after = await _engine(detector, url, _timed(made[: events // 2], now + 60), batch)
        return Row(name, batch, raw, publish, 2 / (1 / before + 1 / after), served)


def _made(detector: Detector, events: int) -> list[Event]:
    [name, *_] = detector.manifest.feature_names
    return [Event(stream_id(i % STREAMS), {name: 20 + i * 7919 % 101 / 100}) for i in range(events)]


def _timed(events: Sequence[Event], start: float) -> list[Event]:
    return [msgspec.structs.replace(event, timestamp=start + i / 1e5) for i, event in enumerate(events)]


async def _engine(detector: Detector, url: str, events: Sequence[Event], batch: int) -> float:
    """Without a queue: each stream's events in order, IN_FLIGHT parts of the streams at once."""
    store = RedisStore(url, state_ttl=86_400, result_ttl=600)
    await store.open()
    scorer = Scorer(detector, Policy(tau=detector.manifest.age_constant), store, Metrics(), Limits())
    scorer.start()
    payloads, decoder = [msgspec.json.encode(event) for event in events], msgspec.json.Decoder(Event)

    async def run(part: int, first: int, last: int) -> None:
        mine = [i for i in range(first, last) if i % STREAMS % IN_FLIGHT == part]
        for start in range(0, len(mine), batch):
            read = [Delivery(decoder.decode(payloads[i]), part + 1, i, 0.0) for i in mine[start : start + batch]]
            await scorer.consume(read, str(part), replies=True)

    first = len(events) // 10
    await asyncio.gather(*(run(part, 0, first) for part in range(IN_FLIGHT)))
    began = time.perf_counter()
    await asyncio.gather(*(run(part, first, len(events)) for part in range(IN_FLIGHT)))
    rate = (len(events) - first) / (time.perf_counter() - began)
    await scorer.drain(5)
    await store.close()
    return rate


async def _served(queue: Queue, url: str, folder: Path, events: int) -> float:
    with service(folder / "data", redis_url=url, settings={"ONSET_SOURCES": json.dumps([queue.source])}) as running:
        began, first = await _until(queue, f"http://127.0.0.1:{running.port}", events // 10)
        ended, last = await _until(queue, f"http://127.0.0.1:{running.port}", events * 19 // 20)
    return (last - first) / (ended - began)


async def _until(queue: Queue, url: str, results: int) -> tuple[float, int]:
    """When there were so many results, and how many."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while True:
        count, now = await queue.results(url), time.perf_counter()
        if count >= results:
            return now, count
        if now > deadline:
            raise SystemExit(f"Only {count} of {results} results after {PATIENCE_SECONDS:.0f} s.")
        await asyncio.sleep(0.1)  # each asking costs the service something


if __name__ == "__main__":
    typer.run(main)
