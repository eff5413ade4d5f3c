"""What tests of message buses share: services over one store in this process, and the plant that talks to them over MQTT."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
from msgspec.structs import replace
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from service.app import Service
from service.events import Result
from service.settings import Settings
from tests.brokers import Mosquitto

WAIT_SECONDS = 30


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


def each_once(results: Sequence[Result]) -> list[Result]:
    """Of results that may have been published again, in the order they first came out; all of one name are the same numbers."""
    once: dict[tuple[str, int], Result] = {}
    for result in results:
        plain = replace(result, duplicate=False)
        first = once.setdefault((result.stream_id, result.state_version), plain)
        assert first == plain, f"{result} is not what came out first: {first}"
    return list(once.values())


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
