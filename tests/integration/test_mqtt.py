"""What is MQTT's own, against a real mosquitto; what all sources share is in the contract suite."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog
from paho.mqtt.client import MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from structlog.testing import capture_logs

from bench.servers import free_port
from service.errors import StoreUnavailable
from service.metrics import Metrics
from service.sources import options
from service.sources.mqtt import Mqtt, Written, _digest, _Link, _Session
from service.sources.options import MqttSource
from tests.brokers import Mosquitto
from tests.buses import MqttRig, Plant, Replicas, metric, mqtt_rig, outcomes
from tests.queues import Queue, queue
from tests.times import until


@pytest.fixture
async def rig(mosquitto: Mosquitto, empty_server: str) -> AsyncIterator[MqttRig]:
    async with mqtt_rig(mosquitto, empty_server) as made:
        yield made


@pytest.fixture
async def q(empty_server: str) -> AsyncIterator[Queue]:
    async with queue(empty_server) as opened:
        yield opened


async def connected(*services: Any) -> None:
    """Until one of them has the session."""
    await until(lambda: sum(metric(service, "source_partitions", "mqtt") for service in services) == 1)


async def test_a_result_and_a_dead_letter_say_in_user_properties_what_they_are_of(
    rig: MqttRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared).start()
    await connected(service)
    rig.plant.publish(f"{rig.name}/in/a", {"values": {"value": 1.0}})
    rig.plant.publish(f"{rig.name}/in/a", b"nonsense", content_type="text/plain", batch="7")
    await until(lambda: len(rig.plant.on(f"{rig.name}/out")) == 2)
    [result] = rig.plant.on(f"{rig.name}/out/results/{rig.name}/in/a")
    named = f"tiny/1/{rig.name}/in/a/1/{json.loads(result.content)['timestamp']}"
    assert (result.properties, result.content_type) == (
        {"id": named, "stream_id": f"{rig.name}/in/a"},
        "application/json",
    )
    [letter] = rig.plant.on(f"{rig.name}/out/dead")
    assert (letter.content, letter.content_type, letter.properties["batch"]) == (b"nonsense", "text/plain", "7")
    assert letter.properties["onset_topic"] == f"{rig.name}/in/a"


async def test_numbers_by_themselves_are_streams_by_topic_and_retained_ones_are_no_events(
    rig: MqttRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    topic = f"{rig.name}/in/line-1/pump/temperature"
    own = {"session": f"{rig.name}-new"}  # one that does not know the topics yet, or what is retained would be a message to it
    await rig.plant.wait([rig.plant.publish(topic, b"99", retain=True)])
    number = {"format": "number", "topic": f"{rig.name}/in/{{line}}/{{machine}}/+", "stream_id": "{line}:{machine}"}
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | own | {"payload": number}).start()
    await connected(service)
    await asyncio.sleep(0.2)  # what is retained would come now
    await rig.plant.publish_all([(topic, 20.5 + i % 2) for i in range(20)])
    rig.plant.publish(topic, b" 21 ", qos=0)
    await until(lambda: outcomes(service, "mqtt") == {"scored": 21})
    result = await service.scorers["tiny"].streams.last("line-1:pump")
    assert (result.state_version, result.contributors[0].actual) == (21, 21)
    assert result.event_id is None


async def test_binary_cloudevents_have_their_attributes_in_user_properties(
    rig: MqttRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"payload": {"format": "cloudevents"}}).start()
    await connected(service)
    about: dict[str, Any] = {"specversion": "1.0", "source": "/plc/7", "type": "reading", "subject": "pump", "time": "2026-11-26T04:00:00Z"}
    for id_ in ("a", "b", "a"):
        rig.plant.publish(f"{rig.name}/in/x", {"values": {"value": 1.5}}, content_type="application/json", id=id_, **about)
    await until(lambda: outcomes(service, "mqtt") == {"scored": 2, "duplicate": 1})
    await until(lambda: len(rig.plant.on(f"{rig.name}/out/results/pump")) >= 2)
    assert [result.event_id for result in await rig.results()][:2] == ["/plc/7 a", "/plc/7 b"]


async def test_a_replica_that_was_taken_for_dead_scores_nothing_twice(
    rig: MqttRig, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    source = rig.declared | {"payload": {"format": "number"}, "batch": 20, "lease_seconds": 0.6}
    service = await Replicas(rig.store, tiny_model_path, stack, source).start()
    await connected(service)
    [lease] = [key async for key in q.client.scan_iter("onset:*=mqtt/*")]
    for _ in range(3):
        await rig.plant.publish_all([(f"{rig.name}/in/same", 1.5)] * 200)
        await q.client.set(lease, "another", px=1500)  # a stall, seen from outside
        await until(lambda: metric(service, "source_partitions", "mqtt") == 0)
    await until(lambda: metric(service, "source_partitions", "mqtt") == 1)
    assert metric(service, "source_fenced_total", "mqtt") >= 1
    await until(lambda: outcomes(service, "mqtt").get("scored", 0) == 600)
    await asyncio.sleep(0.3)
    assert (await service.scorers["tiny"].streams.last(f"{rig.name}/in/same")).state_version == 600


async def test_a_client_of_others_that_uses_the_same_session_is_told(rig: MqttRig, tiny_model_path: Path, stack: AsyncExitStack) -> None:
    with capture_logs() as logs:
        service = await Replicas(rig.store, tiny_model_path, stack, rig.declared).start()
        await connected(service)
        with Plant(rig.broker, rig.name, f"{rig.name}/in/#"):
            await until(lambda: any(line["event"] == "mqtt_session_contested" for line in logs))
    [told] = [line for line in logs if line["event"] == "mqtt_session_contested"]
    assert told["session"].partition("@")[0] == rig.name


async def test_a_broker_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    broker = Mosquitto(tmp_path / "own")
    source = {"type": "mqtt", "url": broker.url, "topics": ["in/#"], "output": "out/results", "dead_letters": "out/dead"}
    service = await Replicas(empty_server, tiny_model_path, stack, source).start()
    await asyncio.sleep(0.3)
    assert await service.ready() is None
    with broker:
        await connected(service)
        with Plant(broker, "plant", "out/#") as plant:
            await plant.publish_all([("in/a", {"values": {"value": 1}})])
            await until(lambda: outcomes(service, "mqtt") == {"scored": 1})


async def test_over_tls_and_with_a_password_and_without_it_refused_by_name(
    tmp_path: Path, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    with Mosquitto(tmp_path / "own", secure=True) as broker:
        async with mqtt_rig(broker, empty_server) as rig:
            source = rig.declared | {"tls_ca": str(broker.ca)}
            service = await Replicas(empty_server, tiny_model_path, stack, source).start()
            await connected(service)
            await rig.put(*({"stream_id": f"s{i % 50}", "values": {"value": i}} for i in range(300)))
            await until(rig.drained)
        wrong = source | {"url": broker.url.replace("plant:", "other:"), "name": "wrong", "session": "wrong"}
        await Replicas(empty_server, tiny_model_path, stack, wrong).start()
        said = ""
        async with asyncio.timeout(30):
            while "Not authorized" not in said:
                await asyncio.sleep(0.05)
                said += capsys.readouterr().out
        assert broker.PASSWORD not in said
        assert broker.url not in said


async def test_a_socket_whose_handle_the_event_loop_has_closed_is_a_lost_connection(rig: MqttRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> None:
        raise RuntimeError("unable to perform operation on <UVPoll closed=True>; the handler is closed")  # as uvloop says it

    [declared] = options.read(json.dumps([rig.declared]))
    assert isinstance(declared, MqttSource)
    link = _Link(declared, f"{rig.name}-other")
    await link.open()
    monkeypatch.setattr(asyncio.get_running_loop(), "add_writer", closed)
    link.subscribe([f"{rig.name}/other"])
    assert "the handler is closed" in link.lost.result()
    await link.close()


class Wire:
    """A connection of a broker that gives packet ids again at once."""

    resumed = True

    def __init__(self) -> None:
        self.reads: list[bool] = []

    def read(self, *, on: bool) -> None:
        self.reads.append(on)


def arrival(mid: int, content: bytes, *, dup: bool = False) -> MQTTMessage:
    message = MQTTMessage(mid, b"t")
    message.payload, message.qos, message.dup = content, 1, dup
    return message


def test_properties_are_written_as_the_client_would() -> None:
    names = {"id": "default/å/1", "onset_reason": "x" * 300, "empty": ""}
    own = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    own.ContentType, own.UserProperty = "application/json", list(names.items())
    assert Written("application/json", names).pack() == own.pack()  # type: ignore[no-untyped-call]
    assert Written("", {}).pack() == Properties(PacketTypes.PUBLISH).pack()  # type: ignore[no-untyped-call]


def test_what_comes_again_has_the_position_it_had_and_the_same_packet_id_without_the_flag_tells_nothing() -> None:
    wire: Any = Wire()
    session = _Session(wire, {7: (_digest(arrival(7, b"a")), 70), 8: (_digest(arrival(8, b"b")), 80)}, 100)
    positions = iter(range(1000, 2000))
    for message in (arrival(7, b"a", dup=True), arrival(8, b"other", dup=True), arrival(9, b"new")):
        wire.on_message(message)
    taken = session.take(10, lambda: next(positions))
    assert [one.position for one in taken] == [70, 1000, 1001]
    assert not session.reused
    session.noted(taken)
    wire.on_message(arrival(7, b"a"))
    assert session.reused
    wire.on_message(arrival(7, b"a", dup=True))
    assert [one.position for one in session.take(10, lambda: next(positions))] == [1002, 1003]


def test_a_broker_that_sends_more_than_it_may_is_not_read_from() -> None:
    wire: Any = Wire()
    session = _Session(wire, {}, 3)
    for mid in range(1, 5):
        wire.on_message(arrival(mid, b""))
    assert wire.reads == [True, True, False, False]
    taken = session.take(2, lambda: 1)
    assert wire.reads[-1]
    session.again(taken)
    assert not wire.reads[-1]


async def test_a_new_session_at_the_broker_makes_the_notes_of_the_old_one_void() -> None:
    wire: Any = Wire()
    wire.resumed = False
    session = _Session(wire, {7: (_digest(arrival(7, b"a")), 70)}, 100)
    wire.on_open()
    wire.on_message(arrival(7, b"a", dup=True))
    assert [one.position for one in session.take(10, lambda: 1000)] == [1000]


class Going:
    """Leases of a store that is there once."""

    asked = 0

    async def hold(self, name: str, holder: str, seconds: float) -> bool:
        self.asked += 1
        if self.asked > 1:
            raise StoreUnavailable("the store is away.")
        return True

    async def release(self, name: str, holder: str) -> None: ...

    async def note(self, name: str, holder: str, note: bytes, keep: int) -> bool:
        return True

    async def notes(self, name: str) -> list[bytes]:
        return []


async def test_a_store_that_is_away_is_told_once_and_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.sources.mqtt.STEADY_SECONDS", 0)  # what came before counts as a good connection
    leases = Going()
    source = Mqtt(MqttSource(url=f"mqtt://127.0.0.1:{free_port()}", topics=["a"]), leases, Metrics())
    with structlog.testing.capture_logs() as logs:
        await source.open()
        await until(lambda: leases.asked == 6)
        await source.close()
    assert [entry["error"] for entry in logs if entry["event"] == "mqtt_unavailable"][1:] == ["the store is away."]


async def test_a_message_that_leaves_no_room_for_a_reason_is_a_dead_letter_without_its_content(
    empty_server: str, tmp_path: Path, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    broker = stack.enter_context(Mosquitto(tmp_path / "small", options=["max_packet_size 2000"]))
    rig = await stack.enter_async_context(mqtt_rig(broker, empty_server))
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"fuse": 1}).start()
    await connected(service)
    rig.plant.publish(f"{rig.name}/in/a", b"x" * 1900)
    rig.plant.publish(f"{rig.name}/in/a", {"values": {"value": 1.0}})
    await until(lambda: len(rig.plant.on(f"{rig.name}/out")) == 2)
    [letter] = rig.plant.on(f"{rig.name}/out/dead")
    assert (letter.content, letter.properties["onset_omitted_bytes"]) == (b"", "1900")
