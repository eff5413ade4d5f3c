"""The user's side of the message buses, for soaks: RabbitMQ, and mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import aio_pika
import msgspec
from aio_pika import DeliveryMode, ExchangeType
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import AMQPError
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bench import brokers
from bench.servers import free_port
from bench.victims import Child, Server, Victim, listens
from bench.wires import ANSWER_SECONDS, READ, NotSentError
from service.events import Event, Result

OURS = "wire/"
"""How an identity begins that an event has from its message alone."""

T = TypeVar("T")


class RabbitMQ(Victim):
    """rabbitmq-server with an Erlang port mapper of its own. What it has confirmed is in the files of its machine's system."""

    def __init__(self, folder: Path) -> None:
        super().__init__("rabbitmq", folder)
        logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # connections that a kill ends are no news
        (folder / "rabbitmq").mkdir()
        self._rabbit = brokers.Rabbit(folder / "rabbitmq")
        self.url = self._rabbit.url
        self._child: Child | None = None
        self._mapper: Child | None = None

    def start(self) -> None:
        if self._mapper is None:
            self._mapper = Child(self._rabbit.mapper, {}, self.log)
        self._child = Child(self._rabbit.command(), self._rabbit.environment, self.log)
        self.starts += 1

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def stop(self) -> None:
        for child in (self._child, self._mapper):
            if child is not None:
                child.kill()

    async def ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._rabbit.port)
        except OSError:
            return False
        writer.write(b"AMQP\x00\x00\x09\x01")
        with contextlib.suppress(OSError, TimeoutError):
            greeted = await asyncio.wait_for(reader.read(1), 1)
            writer.close()
            return bool(greeted)
        return False


class AmqpWire:
    """A queue for each partition, one of the results, one of the dead letters."""

    exactly, forgets = False, True
    _OUT, _DEAD = "results", "dead-letters"

    def __init__(self, folder: Path, partitions: int) -> None:
        self._broker = RabbitMQ(folder)
        self._queues = [f"events.{p}" for p in range(partitions)]
        self._connection: AbstractConnection | None = None
        self._connecting = asyncio.Lock()

    @property
    def victims(self) -> Sequence[Victim]:
        return [self._broker]

    @property
    def settings(self) -> Mapping[str, str]:
        source = {"type": "amqp", "url": self._broker.url, "queues": self._queues, "output": self._OUT, "dead_letters": self._DEAD}
        return {"SOURCES": json.dumps([source])}

    async def open(self) -> None:
        async with self._channel() as channel:
            for queue in (*self._queues, self._DEAD):
                await channel.declare_queue(queue, durable=True)
            exchange = await channel.declare_exchange(self._OUT, ExchangeType.TOPIC, durable=True)
            await (await channel.declare_queue(self._OUT, durable=True)).bind(exchange, "#")

    async def send(self, events: Sequence[Event]) -> None:
        async with self._channel() as channel:
            for event in events:  # one after the other: what is sent again must not overtake what follows
                place = crc32((event.stream_id or "").encode()) % len(self._queues)
                identity = event.event_id or f"{OURS}{event.timestamp}"
                message = aio_pika.Message(msgspec.json.encode(event), delivery_mode=DeliveryMode.PERSISTENT, message_id=identity)
                await self._asked(channel.default_exchange.publish(message, self._queues[place], timeout=ANSWER_SECONDS))

    async def results(self) -> list[Result]:
        """Those that were had before the broker was gone count: it may have the acknowledgement. Without it they come again."""
        found: list[Result] = []
        with contextlib.suppress(NotSentError):
            async with self._channel() as channel:
                queue = await self._asked(channel.get_queue(self._OUT, ensure=False))
                last = None
                while len(found) < READ and (message := await self._asked(queue.get(fail=False, timeout=ANSWER_SECONDS))) is not None:
                    found.append(_with_its_own_identity(msgspec.json.decode(message.body, type=Result)))
                    last = message
                if last is not None:
                    await self._asked(last.ack(multiple=True))
        return found

    async def waiting(self) -> int:
        """Those that are under way are not counted: the broker does not tell over AMQP."""
        return sum([await self._depth(queue) for queue in self._queues])

    async def dead(self) -> int:
        return await self._depth(self._DEAD)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(NotSentError):
                await self._asked(connection.close())

    async def _depth(self, queue: str) -> int:
        async with self._channel() as channel:
            declared = await self._asked(channel.declare_queue(queue, passive=True, timeout=ANSWER_SECONDS))
            return declared.declaration_result.message_count or 0

    @contextlib.asynccontextmanager
    async def _channel(self) -> Any:
        async with self._connecting:
            if self._connection is None or self._connection.is_closed:
                self._connection = await self._asked(aio_pika.connect(self._broker.url, timeout=ANSWER_SECONDS))
        try:
            channel: AbstractChannel = await self._asked(self._connection.channel())
            try:
                yield channel
            finally:
                await self._asked(channel.close())
        except NotSentError:  # after a kill the client may take its connection for a good one for ever
            await self.close()
            raise

    async def _asked(self, answer: Awaitable[T]) -> T:
        asking = asyncio.ensure_future(answer)
        done, _ = await asyncio.wait({asking}, timeout=2 * ANSWER_SECONDS)
        if not done:  # and is not waited for: what hangs on a lost connection may not end when it is told to
            asking.cancel()
            raise NotSentError
        try:
            return asking.result()
        except (AMQPError, OSError, TimeoutError, RuntimeError, asyncio.CancelledError) as error:
            raise NotSentError from error


class Mosquitto(Server):
    """It is restarted by SIGTERM, which has it save what it holds: a mosquitto that is killed loses what came since it last saved."""

    def __init__(self, folder: Path) -> None:
        super().__init__("mosquitto (SIGTERM)", folder)
        self.port = free_port()

    def _command(self) -> Sequence[str]:
        return brokers.mosquitto(self.folder, self.port, ["allow_anonymous true", "set_tcp_nodelay true"])

    def kill(self) -> None:
        self.stop()

    async def ready(self) -> bool:
        return await listens(self.port)


class MqttWire:
    """One session, all streams in it."""

    exactly = forgets = False

    def __init__(self, folder: Path) -> None:
        self._broker = Mosquitto(folder)
        self._out: deque[Result] = deque()
        self._dead = 0
        self._taken: set[int] = set()
        self._listens = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, "wire", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_message, self._client.on_publish = self._hear, lambda client, data, mid, *_: self._taken.add(mid)
        self._client.on_subscribe = lambda *_: self._listens.set()

    @property
    def victims(self) -> Sequence[Victim]:
        return [self._broker]

    @property
    def settings(self) -> Mapping[str, str]:
        source = {"type": "mqtt", "url": f"mqtt://127.0.0.1:{self._broker.port}", "topics": ["events/+"], "lease_seconds": 1}
        return {"SOURCES": json.dumps([source | {"output": "out/results", "dead_letters": "out/dead"}])}

    async def open(self) -> None:
        session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        session.SessionExpiryInterval = 3600
        # The service's session must be there before the first event: what nobody has subscribed to is nobody's.
        other = Client(CallbackAPIVersion.VERSION2, "onset", protocol=MQTTProtocolVersion.MQTTv5)
        other.on_subscribe = lambda *_: self._listens.set()
        for client, topic in ((other, "events/+"), (self._client, "out/#")):
            self._listens.clear()
            client.connect("127.0.0.1", self._broker.port, clean_start=False, properties=session)
            client.loop_start()
            client.subscribe(topic, qos=1)
            await asyncio.to_thread(self._listens.wait, ANSWER_SECONDS)
        other.disconnect()
        other.loop_stop()

    async def send(self, events: Sequence[Event]) -> None:
        mids = [
            self._client.publish(f"events/{crc32((e.stream_id or '').encode()) % 8}", msgspec.json.encode(e), qos=1).mid for e in events
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4 * ANSWER_SECONDS):
                while not self._taken.issuperset(mids):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                self._taken.difference_update(mids)
                return
        raise NotSentError

    async def results(self) -> list[Result]:
        return [self._out.popleft() for _ in range(min(READ, len(self._out)))]

    async def waiting(self) -> int:
        """MQTT does not tell."""
        return 0

    async def dead(self) -> int:
        return self._dead

    async def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _hear(self, client: Client, data: Any, message: MQTTMessage) -> None:
        if message.topic == "out/results":
            self._out.append(msgspec.json.decode(message.payload, type=Result))
        else:
            self._dead += 1


def _with_its_own_identity(result: Result) -> Result:
    if result.event_id is not None and result.event_id.startswith(OURS):
        return msgspec.structs.replace(result, event_id=None)
    return result
