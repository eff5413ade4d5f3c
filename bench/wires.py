"""The user's side of a queue, for soaks: events in, results out, as any producer and any reader of the broker would."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from zlib import crc32

import msgspec
import nats
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from redis.exceptions import RedisError

from bench import brokers
from bench.kafka_mock import MockKafka
from bench.servers import free_port
from bench.victims import Server, Store, Victim, listens
from service.events import Event, Result

READ = 1000
"""Results read at once."""
ANSWER_SECONDS = 5.0

T = TypeVar("T")


class NotSentError(Exception):
    """The broker did not confirm: the events may be in the queue or not, and are to be sent again."""


class Wire(Protocol):
    """One broker's."""

    exactly: bool
    """Whether results are published exactly once; otherwise at least once."""
    forgets: bool
    """Whether a kill of the broker may bring a message again long after it was sent: then no events are sent that have an id alone."""

    @property
    def victims(self) -> Sequence[Victim]:
        """What can be killed and started again without losing what was confirmed; the state store is not among them."""

    @property
    def settings(self) -> Mapping[str, str]:
        """ONSET_… variables of a replica, without the prefix."""

    async def open(self) -> None:
        """Everything is running by now."""

    async def send(self, events: Sequence[Event]) -> None:
        """In order, until the broker has confirmed them. Raises NotSentError."""

    async def results(self) -> list[Result]:
        """Those that came out since the last call, in order. Raises NotSentError while the broker does not answer."""

    async def waiting(self) -> int:
        """Entries that are not acknowledged. Raises NotSentError."""

    async def dead(self) -> int:
        """Dead letters so far. Raises NotSentError."""

    async def close(self) -> None: ...


class RedisStreamsWire:
    """Partitions in the state store itself."""

    exactly, forgets = True, False
    victims: Sequence[Victim] = ()

    def __init__(self, store: Store, partitions: int) -> None:
        self._store = store
        self._keys = [f"onset:events:{{{p}}}" for p in range(partitions)]
        self._last = "0"

    @property
    def settings(self) -> Mapping[str, str]:
        return {
            "STREAMS_INPUT": "onset:events",
            "STREAMS_PARTITIONS": str(len(self._keys)),
            "STREAMS_LEASE_SECONDS": "1",
            "STREAMS_MAX_RESULTS": str(100_000_000),
        }

    async def open(self) -> None: ...

    async def send(self, events: Sequence[Event]) -> None:
        async with self._store.client.pipeline(transaction=False) as pipeline:
            for event in events:
                key = self._keys[crc32((event.stream_id or "").encode()) % len(self._keys)]
                pipeline.xadd(key, {"event": msgspec.json.encode(event)})
            await _asked(pipeline.execute())

    async def results(self) -> list[Result]:
        entries = await _asked(self._store.client.xrange("onset:results", min=f"({self._last}", count=READ))
        if entries:
            self._last = entries[-1][0].decode()
        return [msgspec.json.decode(fields[b"result"], type=Result) for _, fields in entries]

    async def waiting(self) -> int:
        return sum([int(await _asked(self._store.client.xlen(key))) for key in self._keys])

    async def dead(self) -> int:
        return int(await _asked(self._store.client.xlen("onset:dead-letters")))

    async def close(self) -> None: ...


class Brokers(Victim):
    """Kafka's mock cluster: a kill takes its brokers from the network, what they hold in memory stays."""

    def __init__(self, folder: Path) -> None:
        super().__init__("kafka", folder)
        self._cluster = MockKafka(1)
        self._up = False

    @property
    def servers(self) -> str:
        return self._cluster.servers

    def start(self) -> None:
        if self.starts:
            self._cluster.up()
        else:
            self._cluster.__enter__()
        self.starts, self._up = self.starts + 1, True

    def topic(self, name: str, partitions: int) -> None:
        self._cluster.topic(name, partitions)

    def kill(self) -> None:
        self._cluster.down()
        self._up = False

    def stop(self) -> None:
        self._cluster.__exit__(None, None, None)

    async def ready(self) -> bool:
        return self._up


class KafkaWire:
    """A topic, one for the results, one for the dead letters."""

    exactly = forgets = False
    _IN, _OUT, _DEAD = "events", "results", "dead-letters"

    def __init__(self, folder: Path, partitions: int) -> None:
        self._brokers, self._partitions = Brokers(folder), partitions
        self._producer: Producer | None = None
        self._reader: Consumer | None = None

    @property
    def victims(self) -> Sequence[Victim]:
        return [self._brokers]

    @property
    def settings(self) -> Mapping[str, str]:
        options = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 300}
        source = {"type": "kafka", "brokers": self._brokers.servers, "topics": [self._IN], "output": self._OUT, "dead_letters": self._DEAD}
        return {"SOURCES": json.dumps([source | {"options": options}])}

    async def open(self) -> None:
        for topic in (self._IN, self._OUT, self._DEAD):
            self._brokers.topic(topic, self._partitions)
        self._producer = Producer(self._config(**{"enable.idempotence": True, "delivery.timeout.ms": 5000}))
        self._reader = Consumer(self._config(**{"group.id": "onset"}))
        self._reader.assign([TopicPartition(self._OUT, p, OFFSET_BEGINNING) for p in range(self._partitions)])

    async def send(self, events: Sequence[Event]) -> None:
        failed: list[Any] = []

        def told(error: Any, record: Any) -> None:
            failed.extend([error] if error is not None else [])

        def send() -> int:
            for event in events:
                key = (event.stream_id or "").encode()
                place = crc32(key) % self._partitions
                producer.produce(self._IN, msgspec.json.encode(event), key, place, on_delivery=told)
            return producer.flush(2 * ANSWER_SECONDS)

        producer = cast("Producer", self._producer)
        if await self._asked(send) or failed:
            raise NotSentError

    async def results(self) -> list[Result]:
        reader = cast("Consumer", self._reader)
        records = await self._asked(lambda: reader.consume(READ, 0.05))
        return [msgspec.json.decode(record.value() or b"", type=Result) for record in records if record.error() is None]

    async def waiting(self) -> int:
        reader = cast("Consumer", self._reader)

        def ask() -> int:
            places = reader.committed([TopicPartition(self._IN, p) for p in range(self._partitions)], ANSWER_SECONDS)
            return sum(self._end(place) - max(0, place.offset) for place in places)

        return await self._asked(ask)

    async def dead(self) -> int:
        return await self._asked(lambda: sum(self._end(TopicPartition(self._DEAD, p)) for p in range(self._partitions)))

    async def close(self) -> None:
        if self._reader is not None:
            await asyncio.to_thread(self._reader.close)

    def _config(self, **more: Any) -> dict[str, Any]:
        return {"bootstrap.servers": self._brokers.servers, "log_level": 0, "enable.auto.commit": False, **more}

    def _end(self, place: TopicPartition) -> int:
        return int(cast("Consumer", self._reader).get_watermark_offsets(place, ANSWER_SECONDS)[1])

    async def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(ask)
        except KafkaException as error:
            raise NotSentError from error


class NatsServer(Server):
    """nats-server with JetStream. What it has confirmed is in the files of its machine's system."""

    def __init__(self, folder: Path) -> None:
        super().__init__("nats", folder)
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"

    def _command(self) -> Sequence[str]:
        return brokers.nats_server(self.folder / "jetstream", self.port)

    async def ready(self) -> bool:
        return await listens(self.port)


class NatsWire:
    """A JetStream stream of the events, one of what comes out."""

    exactly = forgets = False

    def __init__(self, folder: Path, partitions: int) -> None:
        self._server = NatsServer(folder)
        self._subjects = [f"events.{p}.>" for p in range(partitions)]
        self._client: Client | None = None
        self._next = 1

    @property
    def victims(self) -> Sequence[Victim]:
        return [self._server]

    @property
    def settings(self) -> Mapping[str, str]:
        source = {"type": "nats", "servers": [self._server.url], "subjects": self._subjects, "lease_seconds": 1, "ack_seconds": 5}
        return {"SOURCES": json.dumps([source | {"output": "out.results", "dead_letters": "out.dead"}])}

    async def open(self) -> None:
        self._client = await nats.connect(
            self._server.url, max_reconnect_attempts=-1, reconnect_time_wait=1, error_cb=_quiet, pending_size=0
        )
        await self._js.add_stream(name="EVENTS", subjects=["events.>"])
        await self._js.add_stream(name="OUT", subjects=["out.>"])

    async def send(self, events: Sequence[Event]) -> None:
        for event in events:  # one after the other: what is sent again must not overtake what follows
            place = crc32((event.stream_id or "").encode()) % len(self._subjects)
            await self._asked(self._js.publish(self._subjects[place].replace(">", "all"), msgspec.json.encode(event)))

    async def results(self) -> list[Result]:
        """By sequence number: whatever is killed, none is missed or read twice."""
        found: list[Result] = []
        last = (await self._asked(self._js.stream_info("OUT"))).state.last_seq
        while self._next <= last and len(found) < READ:
            try:
                message = await self._asked(self._js.get_msg("OUT", self._next))
            except NotSentError:
                break  # what was read so far is not read again
            self._next += 1
            if message.subject == "out.results":
                found.append(msgspec.json.decode(message.data or b"", type=Result))
        return found

    async def waiting(self) -> int:
        infos = await self._asked(self._js.consumers_info("EVENTS"))
        if len(infos) < len(self._subjects):  # nobody has read anything yet
            return 1
        return sum((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)

    async def dead(self) -> int:
        state = (await self._asked(self._js.stream_info("OUT", subjects_filter="out.dead"))).state
        return sum((state.subjects or {}).values())

    async def close(self) -> None:
        if self._client is not None:
            with contextlib.suppress(NatsError, OSError):
                await self._client.close()

    @property
    def _js(self) -> JetStreamContext:
        if self._client is None:
            raise NotSentError
        context: JetStreamContext = self._client.jetstream(timeout=ANSWER_SECONDS)
        return context

    async def _asked(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except (NatsError, OSError, TimeoutError, AttributeError, TypeError) as error:  # or the answer lacks what it should tell
            raise NotSentError from error


async def _quiet(error: Exception) -> None:
    """The client goes on by itself."""


async def _asked(answer: Awaitable[Any]) -> Any:
    try:
        return cast("Any", await answer)
    except (RedisError, OSError) as error:
        raise NotSentError from error
