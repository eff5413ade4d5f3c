"""What is AMQP's own, against a real RabbitMQ; what all sources share is in the contract suite."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from pamqp import encode
from structlog.testing import capture_logs

from service import tasks
from service.app import Service
from service.consumer import Consumer
from service.detector import Detector
from service.errors import Fenced, StoreUnavailable
from service.events import Published
from service.mapping import Mapper
from service.metrics import Metrics
from service.sources import Batch, Settlement, options
from service.sources.amqp import Amqp
from service.sources.options import AmqpSource
from tests.brokers import RabbitMQ
from tests.buses import AmqpRig, Replicas, amqp_rig, message, metric, outcomes
from tests.queues import in_order, recorded, uninterrupted
from tests.rigs import each_once
from tests.times import until


@pytest.fixture
async def rig(rabbitmq: RabbitMQ, empty_server: str) -> AsyncIterator[AmqpRig]:
    async with amqp_rig(rabbitmq, empty_server) as made:
        yield made


def done(service: Service, count: int) -> bool:
    return metric(service, "source_acknowledged_total", "amqp") >= count


async def consuming(*services: Service, queues: int = 3) -> None:
    await until(lambda: sum(metric(service, "source_partitions", "amqp") for service in services) == queues)


async def test_a_result_and_a_dead_letter_say_in_their_properties_what_they_are_of(
    rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"queues": rig.queues[:1]}).start()
    await consuming(service, queues=1)
    await rig.send(message({"stream_id": "s0", "values": {"value": 1.0}}))
    await rig.send(message(b"nonsense", headers={"batch": 7}, content_type="text/plain", message_id="bad"))
    await until(partial(done, service, 2))
    [result] = await rig.sent_results()
    named = f"tiny/1/s0/1/{json.loads(result.body)['timestamp']}"
    assert (result.routing_key, result.message_id, result.headers) == ("s0", named, {"stream_id": "s0"})
    assert (result.content_type, result.delivery_mode) == ("application/json", aio_pika.DeliveryMode.PERSISTENT)
    [letter] = await rig.letters()
    assert (letter.body, letter.content_type, letter.message_id, letter.headers["batch"]) == (b"nonsense", "text/plain", "bad", 7)
    assert letter.headers["onset_routing_key"] == rig.queues[0]


async def test_a_message_has_its_identity_from_its_id_and_its_time_from_its_timestamp(
    rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"queues": rig.queues[:1]}).start()
    await consuming(service, queues=1)
    event = {"stream_id": "s0", "values": {"value": 1.0}}
    at = datetime(2026, 11, 26, 4, tzinfo=UTC)
    await rig.send(message(event, message_id="a", timestamp=at), message(event, message_id="b", timestamp=at))
    await rig.send(message(event, message_id="a", timestamp=at), message(event | {"event_id": "own"}, message_id="c"))
    await until(partial(done, service, 4))
    assert outcomes(service, "amqp") == {"scored": 3, "duplicate": 1}
    results = each_once(await rig.results())
    assert [result.event_id for result in results] == ["a", "b", "own"]
    assert [result.timestamp for result in results][:2] == [at.timestamp()] * 2


async def test_binary_cloudevents_have_their_attributes_in_headers(rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack) -> None:
    source = rig.declared | {"queues": rig.queues[:1], "payload": {"format": "cloudevents"}}
    service = await Replicas(rig.store, tiny_model_path, stack, source).start()
    await consuming(service, queues=1)
    about = {"specversion": "1.0", "source": "/plc/7", "type": "reading", "subject": "pump", "id": "x"}
    time = datetime(2026, 11, 26, 4, tzinfo=UTC)
    for prefix in ("cloudEvents:", "cloudEvents_"):
        headers: Any = {f"{prefix}{name}": value for name, value in about.items()} | {f"{prefix}time": time}
        await rig.send(message({"values": {"value": 1.5}}, content_type="application/json", headers=headers))
    await until(partial(done, service, 2))
    assert outcomes(service, "amqp") == {"scored": 1, "duplicate": 1}
    [result] = each_once(await rig.results())
    assert (result.stream_id, result.event_id) == ("pump", "/plc/7 x")


async def test_the_broker_keeps_what_is_beyond_two_batches(rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"batch": 50}).start(max_queue_events=1)
    await consuming(service)
    [scorer] = service.scorers.values()
    scorer._held = True
    await rig.put(*recorded(600, 1))
    await until(lambda: metric(service, "source_lag", "amqp") == 600)
    assert await service.ready() is None
    assert await rig.depth("in.0") + await rig.depth("in.1") + await rig.depth("in.2") >= 500
    scorer._held = False
    await until(partial(done, service, 600))


async def test_replicas_stand_in_line_at_a_queue_with_a_single_active_consumer(
    rig: AmqpRig, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack
) -> None:
    events = recorded(60, 10)
    queues = [f"{rig.name}.line.{i}" for i in range(rig.partitions)]
    source = rig.declared | {"queues": queues, "single_active_consumer": True}
    rig.queues[:] = queues
    async with AsyncExitStack() as first_stack:
        first = await Replicas(rig.store, tiny_model_path, first_stack, source).start()
        await consuming(first)
        second = await Replicas(rig.store, tiny_model_path, stack, source).start()
        await rig.put(*events[:300])
        await until(lambda: outcomes(first, "amqp").get("scored", 0) > 100)
        leaving = asyncio.create_task(first_stack.aclose())
        await rig.put(*events[300:])
        await leaving
    await consuming(second)
    await until(rig.drained)
    assert in_order(each_once(await rig.results())) == await uninterrupted(tiny_detector, events)


class Dying(Amqp):
    """Its process dies when it is to acknowledge: nothing after that happens."""

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        await asyncio.Event().wait()


async def test_what_has_no_time_is_known_by_its_id_when_it_is_delivered_again_after_a_crash(
    rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    own = {"queues": rig.queues[:1]}
    [declared] = options.read(json.dumps([rig.declared | own]))
    assert isinstance(declared, AmqpSource)
    events = [{name: event[name] for name in ("stream_id", "values")} for event in recorded(20, 2)]
    async with AsyncExitStack() as first:
        service = await Replicas(rig.store, tiny_model_path, first, rig.declared | {"queues": rig.queues[1:]}).start()
        metrics = Metrics()
        dying = Dying(declared, metrics)
        consumer = Consumer(dying, service.scorers["tiny"], metrics, Mapper(declared.payload, max_events=100), fuse=1)
        await consumer.start()
        await until(lambda: metrics.registry.get_sample_value("onset_source_partitions", {"source": "amqp"}) == 1)
        await rig.put(*events, partition=0)
        await until(lambda: metrics.registry.get_sample_value("onset_events_total", {"door": "amqp", "outcome": "scored"}))
        await until(rig.sent_results)  # they are out, and nothing is acknowledged
        await consumer.stop(0)
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | own).start()
    await until(partial(done, service, 40))
    assert outcomes(service, "amqp").get("duplicate", 0) > 0
    results = each_once(await rig.results())
    assert len(results) == 40
    for stream, values in (("s0", events[::2]), ("s1", events[1::2])):
        got = [result.contributors[0].actual for result in results if result.stream_id == stream]
        assert got == pytest.approx([event["values"]["value"] for event in values])


async def test_a_queue_is_made_and_bound_where_it_is_missing(rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack) -> None:
    source = rig.declared | {"queues": [f"{rig.name}.made"], "exchange": "amq.topic", "binding_keys": [f"{rig.name}.#"]}
    service = await Replicas(rig.store, tiny_model_path, stack, source).start()
    await consuming(service, queues=1)
    async with rig.connection.channel() as channel:
        exchange = await channel.get_exchange("amq.topic", ensure=False)
        await exchange.publish(message({"stream_id": "s0", "values": {"value": 1}}), f"{rig.name}.line.7")
    await until(partial(done, service, 1))


async def test_a_queue_is_not_made_before_the_exchange_that_it_is_to_be_bound_to(
    rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    named, host = f"{rig.name}.late", rig.declared["url"].rstrip("/").rpartition("@")[2]
    source = rig.declared | {"queues": [named], "exchange": named, "binding_keys": ["#"]}
    nowhere = rig.declared | {"name": "nowhere", "url": f"{rig.declared['url'].rstrip('/')}/none%2Fsuch"}
    with capture_logs() as logs:
        service = await Replicas(rig.store, tiny_model_path, stack, source, nowhere).start()

        def told(part: str) -> bool:
            return any(part in line["error"] for line in logs if line["event"] == "amqp_unavailable")

        await until(lambda: told(f"no exchange '{named}'"))
        await until(lambda: told(f"{host} refuses the virtual host 'none/such'"))
    async with rig.connection.channel() as channel:
        exchange = await channel.declare_exchange(named, "topic")
        await consuming(service, queues=1)
        await exchange.publish(message({"stream_id": "s0", "values": {"value": 1}}), "line.7")
    await until(partial(done, service, 1))


async def test_a_queue_that_cannot_be_bound_is_not_left_behind(rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack) -> None:
    source = rig.declared | {"queues": [f"{rig.name}.unbound"], "exchange": "amq.topic", "binding_keys": [f"{rig.name}.#"]}
    source["url"] = await asyncio.to_thread(rig.broker.add_user, rig.name)
    await asyncio.to_thread(rig.broker.permit, rig.name, read=f"^{rig.name}")
    with capture_logs() as logs:
        service = await Replicas(rig.store, tiny_model_path, stack, source).start()
        await until(lambda: any("amq.topic" in line["error"] for line in logs if line["event"] == "amqp_unavailable"))
        await asyncio.to_thread(rig.broker.permit, rig.name, read=".*")
        await consuming(service, queues=1)
    async with rig.connection.channel() as channel:
        exchange = await channel.get_exchange("amq.topic", ensure=False)
        await exchange.publish(message({"stream_id": "s0", "values": {"value": 1}}), f"{rig.name}.line.7")
    await until(partial(done, service, 1))


async def test_dead_letters_that_no_queue_takes_are_not_acknowledged(rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"queues": rig.queues[:1]}).start()
    await consuming(service, queues=1)
    async with rig.connection.channel() as channel:
        await channel.queue_delete(f"{rig.name}.dead")
    await rig.send(message(b"nonsense"))
    await until(lambda: metric(service, "source_received_total", "amqp") == 1)
    await asyncio.sleep(0.3)
    assert not done(service, 1)
    async with rig.connection.channel() as channel:
        await channel.declare_queue(f"{rig.name}.dead", durable=True)
    await until(partial(done, service, 1))
    assert [letter.body for letter in await rig.letters()] == [b"nonsense"]


async def test_a_dead_letter_is_not_sent_on_to_where_its_message_was_to_go_as_well(
    rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack
) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"queues": rig.queues[:2], "fuse": 1}).start()
    await consuming(service, queues=2)
    await rig.send(message(b"nonsense", headers={"CC": [rig.queues[1]]}))
    await until(partial(done, service, 2))
    await rig.send(message({"stream_id": "a", "values": {"value": 1.0}}), queue=1)  # behind what would have come again
    await until(lambda: outcomes(service, "amqp").get("scored") == 1)
    letters = await rig.letters()
    assert [letter.body for letter in letters] == [b"nonsense"] * 2
    assert [(letter.headers.get("CC"), letter.headers["onset_CC"]) for letter in letters] == [(None, [rig.queues[1]])] * 2


async def test_a_timestamp_that_no_calendar_shows_stops_nothing(
    rig: AmqpRig, tiny_model_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await Replicas(rig.store, tiny_model_path, stack, rig.declared | {"queues": rig.queues[:1]}).start()
    await consuming(service, queues=1)
    event, now = {"stream_id": "a", "values": {"value": 1.0}}, datetime.now(UTC)
    later = now + timedelta(minutes=10)
    with monkeypatch.context() as patched:
        patched.setitem(encode.METHODS, "timestamp", lambda time: struct.pack(">Q", round(1e6 * now.timestamp())))
        await rig.send(message(event, message_id="us", timestamp=now, headers={"at": now}))
    await rig.send(message(event, message_id="s", timestamp=later))
    await until(partial(done, service, 2))
    first, second = [json.loads(result.body) for result in await rig.sent_results()]
    assert (first["event_id"], abs(first["timestamp"] - now.timestamp()) < 600) == ("us", True), "the time of its arrival"
    assert (second["event_id"], second["timestamp"]) == ("s", int(later.timestamp()))


async def test_the_question_for_the_depth_may_be_given_up_without_losing_the_consumer(rig: AmqpRig) -> None:
    [declared] = options.read(json.dumps([rig.declared | {"queues": rig.queues[:1]}]))
    assert isinstance(declared, AmqpSource)
    source = Amqp(declared, Metrics())
    await source.open()
    try:
        await until(lambda: source.metrics.registry.get_sample_value("onset_source_partitions", {"source": "amqp"}) == 1)
        await rig.put({"stream_id": "s0", "values": {"value": 1.0}}, partition=0)
        batch = await source.receive()
        for turns in range(20):
            asking = asyncio.create_task(source.lag())
            for _ in range(turns):
                await asyncio.sleep(0)
            await tasks.end(asking)
        await source.publish(batch, [Published("s0", "name", b"{}")])
        await source.settle(batch, Settlement())
        assert [sent.message_id for sent in await rig.sent_results()] == ["name"]
    finally:
        await source.close()


async def test_a_connection_that_ends_amid_a_publication_is_no_bug(rig: AmqpRig) -> None:
    [declared] = options.read(json.dumps([rig.declared | {"queues": rig.queues[:1]}]))
    assert isinstance(declared, AmqpSource)
    await rig.put({"stream_id": "s0", "values": {"value": 1.0}}, partition=0)
    for turns in range(12):
        source = Amqp(declared, Metrics())
        await source.open()
        batch = await source.receive()
        publishing = asyncio.create_task(source.publish(batch, [Published("s0", "name", b"{}")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        await source.close()
        outcome = (await asyncio.gather(publishing, return_exceptions=True))[0]
        assert outcome is None or isinstance(outcome, StoreUnavailable | Fenced), repr(outcome)
