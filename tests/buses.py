"""What tests of message buses share: services over one store in this process, and the user's side of MQTT and AMQP (see rigs.py)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import aio_pika
import msgspec
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from msgspec.structs import replace
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from service.app import Service
from service.events import Result
from service.settings import Settings
from tests.brokers import Mosquitto, RabbitMQ
from tests.rigs import PARTITIONS, content_of, partition_of

WAIT_SECONDS = 60
OURS = "rig/"
"""How an identity begins that a message has only because it has to have one."""


class Replicas:
    """Services over one store, in this process, each with these sources."""

    def __init__(self, store: str, model: Path, stack: AsyncExitStack, *sources: Mapping[str, Any]) -> None:
        self._given: dict[str, Any] = {"redis_url": store, "model": model, "drain_seconds": 5, "sources": json.dumps(sources)}
        self._stack = stack

    async def start(self, **settings: Any) -> Service:
        return await self._stack.enter_async_context(Service(Settings(**(self._given | settings))).running())


def metric(service: Service, name: str, source: str) -> float:
    found = service.metrics.registry.get_sample_value(f"onset_{name}", {"source": source})
    return -1 if found is None else found


def outcomes(service: Service, door: str) -> dict[str, float]:
    names = ("scored", "duplicate", "late", "rejected")
    found = {n: service.metrics.registry.get_sample_value("onset_events_total", {"door": door, "outcome": n}) for n in names}
    return {name: count for name, count in found.items() if count}


class Heard(NamedTuple):
    topic: str
    content: bytes
    properties: dict[str, str]
    content_type: str


class Plant:
    """A client of the broker, in a thread of its own: publishes with QoS 1, and hears what comes to `listen`."""

    def __init__(self, broker: Mosquitto, name: str, listen: str) -> None:
        self.heard: list[Heard] = []
        self._client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(100)
        self._client.on_message = self._hear
        self._taken: set[int] = set()
        self.refused: list[str] = []
        self._client.on_publish = self._take
        self._client.on_connect = lambda client, *_: client.subscribe(listen, qos=1) and None
        self._listens = threading.Event()
        self._client.on_subscribe = lambda *_: self._listens.set()
        self._session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        self._session.SessionExpiryInterval = 3600
        self._client.reconnect_delay_set(1, 1)
        self._port = broker.port
        if broker.ca:
            self._client.tls_set(str(broker.ca))
            self._client.username_pw_set(broker.USER, broker.PASSWORD)

    def __enter__(self) -> Self:
        self._client.connect("127.0.0.1", self._port, clean_start=False, properties=self._session)
        self._client.loop_start()
        assert self._listens.wait(WAIT_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, content: Any, *, content_type: str = "", retain: bool = False, qos: int = 1, **properties: Any) -> int:
        """Its packet id. Returns at once; it is sent again until the broker has it, also after a restart."""
        about = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        about.UserProperty = list(properties.items())
        if content_type:
            about.ContentType = content_type
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self._client.publish(topic, payload, qos=qos, retain=retain, properties=about).mid

    async def publish_all(self, events: Sequence[tuple[str, Any]]) -> None:
        """Topic and content of each; returns when the broker has them."""
        await self.wait([self.publish(topic, content) for topic, content in events])

    async def wait(self, mids: Sequence[int]) -> None:
        """Until the broker has these."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._taken.issuperset(mids):
            assert time.monotonic() < deadline, self.refused
            await asyncio.sleep(0.005)

    def on(self, topic: str) -> list[Heard]:
        """Heard on topics that begin so."""
        return [heard for heard in list(self.heard) if heard.topic.startswith(topic)]

    def results(self, topic: str) -> list[Result]:
        """In the order they came out."""
        return [msgspec.json.decode(heard.content, type=Result) for heard in self.on(topic)]

    def _take(self, client: Client, data: Any, mid: int, code: ReasonCode, about: Properties) -> None:
        if code.is_failure:
            self.refused.append(str(code))
        self._taken.add(mid)

    def _hear(self, client: Client, data: Any, message: MQTTMessage) -> None:
        about = message.properties
        properties, kind = dict(getattr(about, "UserProperty", [])), getattr(about, "ContentType", "")
        self.heard.append(Heard(message.topic, bytes(message.payload), properties, kind))


class MqttRig:
    """A part of the broker that is a test's own. The service's session is there from the start, so nothing that is published gets lost."""

    partitions, shared, exactly, shows_acks, has_lag = 1, False, False, False, False

    def __init__(self, broker: Mosquitto, store: str, name: str, plant: Plant) -> None:
        self.store, self.broker, self.name, self.plant = store, broker, name, plant
        self._items = 0

    @property
    def declared(self) -> dict[str, Any]:
        return {
            "type": "mqtt",
            "url": self.broker.url,
            "topics": [f"{self.name}/in/#"],
            "session": self.name,
            "output": f"{self.name}/out/results/{{stream_id}}",
            "dead_letters": f"{self.name}/out/dead",
            "batch": 100,
            "lease_seconds": 3,
        }

    async def put(self, *payloads: Any, partition: int | None = None) -> None:
        self._items += sum(len(payload) if isinstance(payload, list) else 1 for payload in payloads)
        topic = f"{self.name}/in/line"
        await self.plant.wait([self.plant.publish(topic, content_of(payload), sent="by us") for payload in payloads])

    async def results(self) -> list[Result]:
        return self.plant.results(f"{self.name}/out/results")

    async def named(self) -> list[tuple[str, bytes]]:
        return [(heard.properties["id"], heard.content) for heard in self.plant.on(f"{self.name}/out/results")]

    async def dead(self) -> list[dict[str, str]]:
        return [heard.properties for heard in self.plant.on(f"{self.name}/out/dead")]

    async def drained(self) -> bool:
        names = {heard.properties["id"] for heard in self.plant.on(f"{self.name}/out/results")}
        return len(names) + len(await self.dead()) >= self._items

    async def restart(self) -> None:
        """SIGTERM: a mosquitto that is killed keeps only what it saved before."""
        await asyncio.to_thread(self.broker.stop)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(self.broker.start)


@asynccontextmanager
async def mqtt_rig(broker: Mosquitto, store: str) -> AsyncIterator[MqttRig]:
    name = uuid.uuid4().hex[:8]
    with Plant(broker, name, f"{name}/in/#"):  # makes the session, which the service takes over
        pass
    with Plant(broker, f"plant-{name}", f"{name}/out/#") as plant:
        yield MqttRig(broker, store, name, plant)


class AmqpRig:
    """Queues that are a test's own, and a client of their broker. One replica has all queues."""

    partitions, shared, exactly, shows_acks, has_lag = PARTITIONS, False, False, False, True

    def __init__(self, broker: RabbitMQ, store: str) -> None:
        self.store, self.broker = store, broker
        self.name = uuid.uuid4().hex[:8]
        self.queues = [f"{self.name}.in.{i}" for i in range(self.partitions)]
        self._connection: AbstractConnection | None = None
        self._items = 0
        self._out: list[AbstractIncomingMessage] = []
        self._dead: list[AbstractIncomingMessage] = []

    @property
    def declared(self) -> dict[str, Any]:
        return {
            "type": "amqp",
            "url": self.broker.url,
            "queues": self.queues,
            "output": f"{self.name}.out",
            "dead_letters": f"{self.name}.dead",
            "batch": 100,
        }

    @property
    def connection(self) -> AbstractConnection:
        assert self._connection is not None
        return self._connection

    async def open(self) -> None:
        """Make the queues, the exchange of the results, and a queue of all of them."""
        self._connection = await aio_pika.connect(self.broker.url)
        async with self._connection.channel() as channel:
            for queue in (*self.queues, f"{self.name}.dead"):
                await channel.declare_queue(queue, durable=True)
            exchange = await channel.declare_exchange(f"{self.name}.out", "topic", durable=True)
            await (await channel.declare_queue(f"{self.name}.results", durable=True)).bind(exchange, "#")

    async def close(self) -> None:
        await self.connection.close()

    async def put(self, *payloads: Any, partition: int | None = None) -> None:
        """Each with an identity, as aio-pika gives one anyway."""
        self._items += sum(len(payload) if isinstance(payload, list) else 1 for payload in payloads)
        places = [partition_of(payload) if partition is None else partition for payload in payloads]
        for place in range(self.partitions):
            mine = [payload for payload, at in zip(payloads, places, strict=True) if at == place]
            await self.send(*(message(one, message_id=f"{OURS}{uuid.uuid4().hex}", headers={"sent": "by us"}) for one in mine), queue=place)

    async def send(self, *messages: aio_pika.Message, queue: int = 0) -> None:
        """In order; returns when the broker has them."""
        async with self.connection.channel(on_return_raises=True) as channel:
            await asyncio.gather(*(channel.default_exchange.publish(sent, self.queues[queue]) for sent in messages))

    async def sent_results(self) -> list[AbstractIncomingMessage]:
        """As they came out so far."""
        self._out += await self._taken("results")
        return self._out

    async def letters(self) -> list[AbstractIncomingMessage]:
        self._dead += await self._taken("dead")
        return self._dead

    async def results(self) -> list[Result]:
        """Without the identities that `put` gave their events."""
        results = [msgspec.json.decode(sent.body, type=Result) for sent in await self.sent_results()]
        return [replace(result, event_id=None) if (result.event_id or "").startswith(OURS) else result for result in results]

    async def named(self) -> list[tuple[str, bytes]]:
        return [(sent.message_id or "", sent.body) for sent in await self.sent_results()]

    async def dead(self) -> list[dict[str, str]]:
        return [{name: str(value) for name, value in (letter.headers or {}).items()} for letter in await self.letters()]

    async def drained(self) -> bool:
        names = {sent.message_id for sent in await self.sent_results()}
        return len(names) + len(await self.letters()) >= self._items

    async def depth(self, queue: str) -> int:
        async with self.connection.channel() as channel:
            return (await channel.declare_queue(f"{self.name}.{queue}", passive=True)).declaration_result.message_count or 0

    async def restart(self) -> None:
        await asyncio.to_thread(self.broker.kill)
        await asyncio.to_thread(self.broker.start)
        await self.open()

    async def _taken(self, queue: str) -> list[AbstractIncomingMessage]:
        """All that is in a queue, which is empty then."""
        found = []
        async with self.connection.channel() as channel:
            opened = await channel.get_queue(f"{self.name}.{queue}", ensure=False)
            while (got := await opened.get(fail=False, no_ack=True)) is not None:
                found.append(got)
        return found


def message(content: Any, **properties: Any) -> aio_pika.Message:
    return aio_pika.Message(content_of(content), delivery_mode=aio_pika.DeliveryMode.PERSISTENT, **properties)


@asynccontextmanager
async def amqp_rig(broker: RabbitMQ, store: str) -> AsyncIterator[AmqpRig]:
    rig = AmqpRig(broker, store)
    await rig.open()
    yield rig
    await rig.close()
