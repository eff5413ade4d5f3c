"""The user's side of each queue, for the contract suite of sources: events in, results and dead letters out, as any client would."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import confluent_kafka
import msgspec
import redis.asyncio as redis
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from nats.aio.client import Client
from nats.js import JetStreamContext

from bench.kafka_mock import MockKafka
from service.app import Service
from service.events import Result
from service.settings import Settings
from tests.brokers import NatsServer
from tests.servers import Valkey

PARTITIONS = 3
_number = itertools.count()


def service(rig: Rig, model: Path, **declared: Any) -> Service:
    """That reads the rig, with some of what it declares in place of its own."""
    return Service(Settings(sources=json.dumps([rig.declared | declared]), redis_url=rig.store, model=model, drain_seconds=5))


class Rig(Protocol):
    """One queue of one test, empty at its start."""

    store: str
    """URL of the state store."""
    partitions: int
    shared: bool
    """Whether replicas share the partitions; otherwise one has all of them."""
    exactly: bool
    """Whether results come out once; otherwise at least once."""
    shows_acks: bool
    """Whether the broker tells what is not acknowledged; otherwise `drained` knows only that something came out of every event."""
    has_lag: bool
    """Whether the source can tell how much waits for it."""

    @property
    def declared(self) -> dict[str, Any]:
        """The source, as in ONSET_SOURCES."""

    async def put(self, *payloads: Any, partition: int | None = None) -> None:
        """One message each: an event, a list of one stream's events, or bytes. By stream, unless the partition is named."""

    async def results(self) -> list[Result]:
        """All that came out so far, each stream's in order."""

    async def named(self) -> list[tuple[str, bytes]]:
        """The same as they came, each under its identity; of a queue outside the store."""

    async def dead(self) -> list[dict[str, str]]:
        """Headers of the dead letters."""

    async def drained(self) -> bool:
        """Whether the broker knows of no message that is not acknowledged."""

    async def restart(self) -> None:
        """The broker ends, is away for a moment and comes back with what it had confirmed. Where it keeps that, it ends without warning."""


class Shared:
    """A rig's broker with partitions that replicas share, which tells all about them."""

    partitions, shared, shows_acks, has_lag = PARTITIONS, True, True, True


def partition_of(payload: Any) -> int:
    first = payload[0] if isinstance(payload, list) else payload
    return crc32(str(first["stream_id"]).encode()) % PARTITIONS if isinstance(first, dict) and "stream_id" in first else 0


def content_of(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else json.dumps(payload).encode()


class RedisRig(Shared):
    exactly = True

    def __init__(self, server: Valkey, client: Any) -> None:
        self.store, self._server, self._client = server.url, server, client
        self._keys = [f"in:{{{p}}}" for p in range(PARTITIONS)]

    @property
    def declared(self) -> dict[str, Any]:
        return {"type": "redis_streams", "key": "in", "partitions": PARTITIONS, "lease_seconds": 3, "batch": 100}

    async def put(self, *payloads: Any, partition: int | None = None) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            for payload in payloads:
                pipeline.xadd(
                    self._keys[partition_of(payload) if partition is None else partition], {"event": content_of(payload), "sent": "by us"}
                )
            await pipeline.execute()

    async def results(self) -> list[Result]:
        return [msgspec.json.decode(fields[b"result"], type=Result) for _, fields in await self._client.xrange("onset:results")]

    async def named(self) -> list[tuple[str, bytes]]:
        raise NotImplementedError("They come out once.")

    async def dead(self) -> list[dict[str, str]]:
        entries = await self._client.xrange("onset:dead-letters")
        return [{name.decode(): value.decode(errors="replace") for name, value in fields.items()} for _, fields in entries]

    async def drained(self) -> bool:
        return not any([await self._client.xlen(key) for key in self._keys])

    async def restart(self) -> None:
        await asyncio.to_thread(self._server.kill)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(self._server.start)


class KafkaRig(Shared):
    exactly = False

    def __init__(self, cluster: MockKafka, store: str) -> None:
        self.store, self._cluster, self._at = store, cluster, next(_number)
        self._in, self._out, self._dead = (f"{name}-{self._at}" for name in ("in", "out", "dead"))
        for topic in (self._in, self._out, self._dead):
            cluster.topic(topic, PARTITIONS)
        self._producer = Producer({"bootstrap.servers": cluster.servers, "log_level": 0})

    @property
    def declared(self) -> dict[str, Any]:
        return {
            "type": "kafka",
            "brokers": self._cluster.servers,
            "topics": [self._in],
            "group": f"group-{self._at}",
            "output": self._out,
            "dead_letters": self._dead,
            "batch": 100,
            "options": {"session.timeout.ms": 3000, "heartbeat.interval.ms": 200},
        }

    async def put(self, *payloads: Any, partition: int | None = None) -> None:
        for payload in payloads:
            place = partition_of(payload) if partition is None else partition
            self._producer.produce(self._in, content_of(payload), partition=place, headers={"sent": b"by us"})
        assert await asyncio.to_thread(self._producer.flush, 20) == 0

    def send(self, payload: bytes, *, key: bytes) -> None:
        self._producer.produce(self._in, payload, key)
        assert self._producer.flush(20) == 0

    def again(self) -> KafkaRig:
        """A client that knows nothing of the topics."""
        rig = KafkaRig.__new__(KafkaRig)
        rig.__dict__ |= self.__dict__ | {"_producer": Producer({"bootstrap.servers": self._cluster.servers, "log_level": 0})}
        return rig

    async def results(self) -> list[Result]:
        records = await asyncio.to_thread(self._read, self._out)
        assert all((record.key() or b"").decode() == msgspec.json.decode(record.value() or b"")["stream_id"] for record in records)
        return [msgspec.json.decode(record.value() or b"", type=Result) for record in records]

    async def named(self) -> list[tuple[str, bytes]]:
        records = await asyncio.to_thread(self._read, self._out)
        return [(dict(record.headers() or [])["onset_id"].decode(), record.value() or b"") for record in records]  # type: ignore[union-attr]

    async def dead(self) -> list[dict[str, str]]:
        records = await asyncio.to_thread(self._read, self._dead)
        return [{name: value.decode() for name, value in (record.headers() or [])} for record in records]  # type: ignore[union-attr, str-unpack]

    async def drained(self) -> bool:
        return await asyncio.to_thread(self._drained)

    async def restart(self) -> None:
        await asyncio.to_thread(self._cluster.down)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(self._cluster.up)

    def _client(self) -> Consumer:
        return Consumer({"bootstrap.servers": self._cluster.servers, "group.id": f"group-{self._at}", "log_level": 0})

    def _drained(self) -> bool:
        consumer = self._client()
        try:
            places = consumer.committed([TopicPartition(self._in, p) for p in range(PARTITIONS)], timeout=10)
            return all(max(0, place.offset) == consumer.get_watermark_offsets(place, 10)[1] for place in places)
        finally:
            consumer.close()

    def _read(self, topic: str) -> list[confluent_kafka.Message]:
        consumer = self._client()
        try:
            places = [TopicPartition(topic, p, OFFSET_BEGINNING) for p in range(PARTITIONS)]
            left = sum(consumer.get_watermark_offsets(place, 10)[1] for place in places)
            consumer.assign(places)
            records: list[confluent_kafka.Message] = []
            while len(records) < left:
                records += [record for record in consumer.consume(left - len(records), 0.2) if record.error() is None]
            return records
        finally:
            consumer.close()


class NatsRig(Shared):
    exactly = False

    def __init__(self, server: NatsServer, store: str, client: Client) -> None:
        self.store, self.server, self.client, self.at = store, server, client, next(_number)
        self.js: JetStreamContext = client.jetstream(timeout=10)
        self.subjects = [f"in{self.at}.{p}.>" for p in range(PARTITIONS)]

    async def open(self) -> None:
        await self.js.add_stream(name=f"IN{self.at}", subjects=[f"in{self.at}.>"])
        await self.js.add_stream(name=f"OUT{self.at}", subjects=[f"out{self.at}.>"])

    @property
    def declared(self) -> dict[str, Any]:
        return {
            "type": "nats",
            "servers": [self.server.url],
            "subjects": self.subjects,
            "group": f"group-{self.at}",
            "output": f"out{self.at}.results",
            "dead_letters": f"out{self.at}.dead",
            "batch": 100,
            "lease_seconds": 2,
            "ack_seconds": 2,
        }

    async def put(self, *payloads: Any, partition: int | None = None) -> None:
        for payload in payloads:
            subject = self.subjects[partition_of(payload) if partition is None else partition].replace(">", "line.sensor")
            await self.js.publish(subject, content_of(payload), headers={"sent": "by us"})

    async def outputs(self) -> list[bytes]:
        return [content for content, _ in await self._read(f"out{self.at}.results")]

    async def results(self) -> list[Result]:
        return [msgspec.json.decode(content, type=Result) for content in await self.outputs()]

    async def named(self) -> list[tuple[str, bytes]]:
        return [(headers["Nats-Msg-Id"], content) for content, headers in await self._read(f"out{self.at}.results")]

    async def dead(self) -> list[dict[str, str]]:
        return [headers for _, headers in await self._read(f"out{self.at}.dead")]

    async def drained(self) -> bool:
        try:
            infos = await self.js.consumers_info(f"IN{self.at}")
        except AttributeError:  # the server lists nothing in place of a consumer that is being made, which the client takes for one
            return False
        return len(infos) == PARTITIONS and not any((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)

    async def restart(self) -> None:
        self.server.kill()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(self.server.start)
        while not self.client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def _read(self, subject: str) -> list[tuple[bytes, dict[str, str]]]:
        info = await self.js.stream_info(f"OUT{self.at}")
        found = []
        for sequence in range(info.state.first_seq, info.state.last_seq + 1):
            message = await self.js.get_msg(f"OUT{self.at}", sequence)
            if message.subject == subject:
                found.append((message.data or b"", dict(message.headers or {})))
        return found


@asynccontextmanager
async def redis_rig(server: Valkey) -> AsyncIterator[Rig]:
    async with redis.Redis.from_url(server.url) as client:
        yield RedisRig(server, client)


@asynccontextmanager
async def nats_rig(server: NatsServer, store: str) -> AsyncIterator[Rig]:
    client = await server.connect()
    rig = NatsRig(server, store, client)
    await rig.open()
    yield rig
    await client.close()


def each_once(results: Sequence[Result]) -> list[Result]:
    """Of results that may have been published again, each as it first came out: it is the same each time."""
    once: dict[tuple[str, int], Result] = {}
    for result in results:
        first = once.setdefault((result.stream_id, result.state_version), result)
        assert first == result, f"{result} is not what came out first: {first}"
    return list(once.values())
