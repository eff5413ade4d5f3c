"""MQTT 5 in and out, against a real mosquitto: in order, once, one replica at a time, and nothing lost when something fails."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from service.app import Service
from service.consumer import FUSE_ENTRIES
from service.detector import Detector
from service.sources.mqtt import _digest, _Session
from tests.brokers import Mosquitto
from tests.buses import Plant, Replicas, each_once, metric, outcomes
from tests.queues import Queue, in_order, queue, recorded, uninterrupted
from tests.servers import Valkey


class Site:
    """A part of the broker that is a test's own: its topics, its session."""

    def __init__(self, broker: Mosquitto) -> None:
        self.name = uuid.uuid4().hex[:8]
        self.broker = broker

    def source(self, **options: Any) -> dict[str, Any]:
        given = {
            "type": "mqtt",
            "url": self.broker.url,
            "topics": [f"{self.name}/in/#"],
            "session": self.name,
            "output": f"{self.name}/out/{{stream_id}}",
            "dead_letters": f"{self.name}/dead",
            "lease_seconds": 0.6,
        }
        return given | options

    def topic(self, event: dict[str, Any]) -> str:
        return f"{self.name}/in/{event['stream_id']}"


@pytest.fixture
def site(mosquitto: Mosquitto) -> Site:
    return Site(mosquitto)


@pytest.fixture
def plant(mosquitto: Mosquitto, site: Site) -> Iterator[Plant]:
    with Plant(mosquitto, f"plant-{site.name}", f"{site.name}/+/#") as plant:
        yield plant


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def q(empty_server: str) -> AsyncIterator[Queue]:
    async with queue(empty_server) as opened:
        yield opened


async def connected(q: Queue, *services: Any) -> None:
    """Until one of them has the session."""
    await q.until(lambda: sum(metric(service, "source_partitions", "mqtt") for service in services) == 1)


async def test_what_comes_out_is_what_rest_answers_in_each_streams_order(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack, q: Queue
) -> None:
    events = recorded(40, 10)
    service = await Replicas(empty_server, tiny_model_path, stack, site.source()).start()
    await connected(q, service)
    await plant.publish_all([(site.topic(event), event) for event in events])
    await q.until(lambda: len(plant.on(f"{site.name}/out")) == 400)
    results = plant.results(f"{site.name}/out")
    assert in_order(results) == await uninterrupted(tiny_detector, events)
    for name in {event["stream_id"] for event in events}:
        assert [result.state_version for result in results if result.stream_id == name] == list(range(1, 41))
    [first] = [heard for heard in plant.on(f"{site.name}/out/s3") if json.loads(heard.content)["state_version"] == 1]
    assert first.properties == {"id": "tiny/s3/1", "stream_id": "s3"}
    assert first.content_type == "application/json"
    await q.until(lambda: metric(service, "source_received_total", "mqtt") == metric(service, "source_acknowledged_total", "mqtt") == 400)
    assert outcomes(service, "mqtt") == {"scored": 400}


async def test_numbers_by_themselves_are_streams_by_topic_and_retained_ones_are_no_events(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    await plant.wait([plant.publish(f"{site.name}/in/line-1/pump/temperature", b"99", retain=True)])
    number = {"format": "number", "topic": f"{site.name}/in/{{line}}/{{machine}}/+", "stream_id": "{line}:{machine}"}
    service = await Replicas(empty_server, tiny_model_path, stack, site.source(payload=number)).start()
    await connected(q, service)
    await asyncio.sleep(0.2)  # what is retained would come now
    await plant.publish_all([(f"{site.name}/in/line-1/pump/temperature", 20.5 + i % 2) for i in range(20)])
    plant.publish(f"{site.name}/in/line-1/pump/temperature", b" 21 ", qos=0)
    await q.until(lambda: outcomes(service, "mqtt") == {"scored": 21})
    result = await service.scorers["tiny"].stream("line-1:pump")
    assert (result.state_version, result.contributors[0].actual) == (21, 21)
    assert result.event_id is None


async def test_binary_cloudevents_have_their_attributes_in_user_properties(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    service = await Replicas(empty_server, tiny_model_path, stack, site.source(payload={"format": "cloudevents"})).start()
    await connected(q, service)
    about: dict[str, Any] = {"specversion": "1.0", "source": "/plc/7", "type": "reading", "subject": "pump", "time": "2026-11-26T04:00:00Z"}
    for id_ in ("a", "b", "a"):
        plant.publish(f"{site.name}/in/x", {"values": {"value": 1.5}}, content_type="application/json", id=id_, **about)
    await q.until(lambda: outcomes(service, "mqtt") == {"scored": 2, "duplicate": 1})
    await q.until(lambda: len(plant.on(f"{site.name}/out/pump")) >= 2)  # a result is told after its commit is counted
    assert [result.event_id for result in plant.results(f"{site.name}/out/pump")][:2] == ["/plc/7 a", "/plc/7 b"]


async def test_what_cannot_be_used_is_a_dead_letter_with_the_reason_and_its_neighbours_are_scored(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    service = await Replicas(empty_server, tiny_model_path, stack, site.source()).start()
    await connected(q, service)
    good = {"values": {"value": 1.0}}
    await plant.publish_all([(f"{site.name}/in/a", good)] * 10)
    plant.publish(f"{site.name}/in/a", b"nonsense", content_type="text/plain", batch="7")
    plant.publish(f"{site.name}/in/a", [good, {"values": {"speed": 2}}])
    await plant.publish_all([(f"{site.name}/in/a", good)] * 10)
    await q.until(lambda: len(plant.on(f"{site.name}/dead")) == 2)
    await q.until(lambda: outcomes(service, "mqtt") == {"scored": 21, "rejected": 2})
    first, second = plant.on(f"{site.name}/dead")
    assert (first.content, first.content_type, first.properties["batch"]) == (b"nonsense", "text/plain", "7")
    assert first.properties["onset_reason"].endswith(".")
    assert (first.properties["onset_field"], first.properties["onset_value"]) == ("payload", '"nonsense"')
    assert first.properties["onset_topic"] == f"{site.name}/in/a"
    assert (second.properties["onset_field"], second.properties["onset_index"]) == ("values.speed", "1")
    await q.until(lambda: metric(service, "source_dead_lettered_total", "mqtt") == 2)


async def test_the_fuse_pauses_the_session_and_nothing_of_it_is_lost(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    async with AsyncExitStack() as first:
        service = await Replicas(empty_server, tiny_model_path, first, site.source()).start()
        await connected(q, service)
        await plant.publish_all([(f"{site.name}/in/a", b"nonsense")] * 150)
        await q.until(lambda: metric(service, "source_paused", "mqtt") == 1)
        assert await service.ready() is None
        assert len(plant.on(f"{site.name}/dead")) < FUSE_ENTRIES, "what came before there was enough to judge by"
        acknowledged = metric(service, "source_acknowledged_total", "mqtt")
    service = await Replicas(empty_server, tiny_model_path, stack, site.source(fuse=1)).start()
    await plant.publish_all([(f"{site.name}/in/a", {"values": {"value": 1.0}})])
    await q.until(lambda: acknowledged + metric(service, "source_acknowledged_total", "mqtt") == 151)
    await q.until(lambda: len(plant.on(f"{site.name}/dead")) >= 150)
    assert len(plant.on(f"{site.name}/dead")) == 150


async def test_a_silent_store_stops_the_reading_and_not_the_service_and_nothing_is_lost(
    site: Site, plant: Plant, tmp_path: Path, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack
) -> None:
    events = recorded(100, 10)
    with Valkey(tmp_path / "own", appendonly="yes", appendfsync="always") as server:
        async with queue(server.url) as q, AsyncExitStack() as inner:
            service = await Replicas(server.url, tiny_model_path, inner, site.source(batch=50)).start()
            await connected(q, service)
            await plant.publish_all([(site.topic(event), event) for event in events[:500]])
            await q.until(lambda: outcomes(service, "mqtt").get("scored", 0) == 500)
            server.kill()
            await plant.publish_all([(site.topic(event), event) for event in events[500:]])
            await asyncio.sleep(0.5)
            handed = metric(service, "source_received_total", "mqtt")
            assert handed <= 550, "one batch is under way, and no more is taken"
            server.start()
            await q.until(lambda: len({heard.properties["id"] for heard in plant.on(f"{site.name}/out")}) == 1000)
            assert in_order(each_once(plant.results(f"{site.name}/out"))) == await uninterrupted(tiny_detector, events)


async def test_one_replica_at_a_time_has_the_session_and_one_that_stops_hands_it_over(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack, q: Queue
) -> None:
    events = recorded(60, 10)
    async with AsyncExitStack() as first_stack:
        source = site.source(lease_seconds=5)
        first = await Replicas(empty_server, tiny_model_path, first_stack, source).start()
        await connected(q, first)
        second = await Replicas(empty_server, tiny_model_path, stack, source).start()
        await plant.publish_all([(site.topic(event), event) for event in events[:300]])
        await q.until(lambda: outcomes(first, "mqtt").get("scored", 0) > 100)
        assert metric(second, "source_partitions", "mqtt") == 0
        handing = asyncio.create_task(first_stack.aclose())
        await plant.publish_all([(site.topic(event), event) for event in events[300:]])
        await handing
    await q.until(lambda: metric(second, "source_partitions", "mqtt") == 1)
    await q.until(lambda: len({heard.properties["id"] for heard in plant.on(f"{site.name}/out")}) == 600)
    results = each_once(plant.results(f"{site.name}/out"))
    assert in_order(results) == await uninterrupted(tiny_detector, events)
    for name in {event["stream_id"] for event in events}:
        assert [result.state_version for result in results if result.stream_id == name] == list(range(1, 61))


async def test_a_replica_that_was_taken_for_dead_scores_nothing_twice(
    site: Site, plant: Plant, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    number = {"format": "number"}
    service = await Replicas(empty_server, tiny_model_path, stack, site.source(payload=number, batch=20)).start()
    await connected(q, service)
    [lease] = [key async for key in q.client.scan_iter("onset:*=mqtt/*")]
    for _ in range(3):
        await plant.publish_all([(f"{site.name}/in/same", 1.5)] * 200)
        await q.client.set(lease, "another", px=700)  # a stall, seen from outside
        await q.until(lambda: metric(service, "source_partitions", "mqtt") == 0)
    await q.until(lambda: metric(service, "source_partitions", "mqtt") == 1)
    assert metric(service, "source_fenced_total", "mqtt") >= 1
    await q.until(lambda: outcomes(service, "mqtt").get("scored", 0) == 600)
    await asyncio.sleep(0.3)
    assert (await service.scorers["tiny"].stream(f"{site.name}/in/same")).state_version == 600


async def test_a_broker_that_restarts_loses_nothing_and_nothing_is_scored_twice(
    tmp_path: Path, empty_server: str, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack, q: Queue
) -> None:
    events = [event | {"event_id": f"{event['stream_id']}-{i}"} for i, event in enumerate(recorded(100, 10))]
    with Mosquitto(tmp_path / "own") as broker:
        site = Site(broker)
        service = await Replicas(empty_server, tiny_model_path, stack, site.source(batch=50)).start()
        await connected(q, service)
        with Plant(broker, "plant", f"{site.name}/+/#") as plant:
            for start in range(0, 1000, 250):
                sent = [plant.publish(site.topic(event), event) for event in events[start : start + 250]]
                await q.until(partial(_scored, service, start + 1))
                broker.stop()
                await asyncio.sleep(0.1)
                await asyncio.to_thread(broker.start)
                await plant.wait(sent)
            await q.until(lambda: len({heard.properties["id"] for heard in plant.on(f"{site.name}/out")}) == 1000)
            results = each_once(plant.results(f"{site.name}/out"))
    assert in_order(results) == await uninterrupted(tiny_detector, events)


async def test_a_broker_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    broker = Mosquitto(tmp_path / "own")
    site = Site(broker)
    service = await Replicas(empty_server, tiny_model_path, stack, site.source()).start()
    await asyncio.sleep(0.3)
    assert await service.ready() is None
    with broker:
        await connected(q, service)
        with Plant(broker, "plant", f"{site.name}/out/#") as plant:
            await plant.publish_all([(f"{site.name}/in/a", {"values": {"value": 1}})])
            await q.until(lambda: outcomes(service, "mqtt") == {"scored": 1})


async def test_over_tls_and_with_a_password_and_without_it_refused_by_name(
    tmp_path: Path, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    with Mosquitto(tmp_path / "own", secure=True) as broker:
        site = Site(broker)
        source = site.source(tls_ca=str(broker.ca))
        service = await Replicas(empty_server, tiny_model_path, stack, source).start()
        await connected(q, service)
        with Plant(broker, "plant", f"{site.name}/out/#") as plant:
            await plant.publish_all([(f"{site.name}/in/{i % 50}", {"values": {"value": i}}) for i in range(300)])
            await q.until(lambda: len(plant.on(f"{site.name}/out")) == 300)
        wrong = source | {"url": broker.url.replace("plant:", "other:"), "name": "wrong", "session": "wrong"}
        await Replicas(empty_server, tiny_model_path, stack, wrong).start()
        said = ""
        while "Not authorized" not in said:
            await asyncio.sleep(0.05)
            said += capsys.readouterr().out
        assert broker.PASSWORD not in said
        assert broker.url not in said


def _scored(service: Service, count: int) -> bool:
    return outcomes(service, "mqtt").get("scored", 0) >= count


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
