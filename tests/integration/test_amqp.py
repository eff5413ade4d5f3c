"""AMQP in and out, against a real RabbitMQ: in order, once, one replica at a time, and nothing lost when something fails."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aio_pika
import msgspec
import pytest
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

from service.app import Service
from service.consumer import FUSE_ENTRIES, Consumer
from service.detector import Detector
from service.events import Result
from service.mapping import Mapper
from service.metrics import Metrics
from service.sources import Batch, Settlement, options
from service.sources.amqp import Amqp
from service.sources.options import AmqpSource
from tests.brokers import RabbitMQ
from tests.buses import Replicas, each_once, metric, outcomes
from tests.queues import Queue, in_order, queue, recorded, uninterrupted


class Yard:
    """A part of the broker that is a test's own, and a client of it."""

    def __init__(self, broker: RabbitMQ) -> None:
        self.name = uuid.uuid4().hex[:8]
        self.broker = broker
        self._connection: AbstractConnection | None = None

    @property
    def queues(self) -> list[str]:
        return [f"{self.name}.in.{i}" for i in range(3)]

    def source(self, **options: Any) -> dict[str, Any]:
        given = {
            "type": "amqp",
            "url": self.broker.url,
            "queues": self.queues,
            "output": f"{self.name}.out",
            "dead_letters": f"{self.name}.dead",
            "batch": 50,
        }
        return given | options

    async def open(self) -> None:
        """Make the exchange of the results, and a queue of all of them."""
        self._connection = await aio_pika.connect(self.broker.url)
        async with self._connection.channel() as channel:
            exchange = await channel.declare_exchange(f"{self.name}.out", "topic", durable=True)
            results = await channel.declare_queue(f"{self.name}.results", durable=True)
            await results.bind(exchange, "#")

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def put(self, *messages: aio_pika.Message | dict[str, Any], queue: int | None = None) -> None:
        """Returns when the broker has them; an event goes to the queue of its stream, with an identity."""
        assert self._connection is not None
        async with self._connection.channel(on_return_raises=True) as channel:
            await asyncio.gather(
                *(
                    channel.default_exchange.publish(
                        sent if isinstance(sent, aio_pika.Message) else message(sent, message_id=uuid.uuid4().hex),
                        self.queues[int(sent["stream_id"][1:]) % 3 if queue is None and isinstance(sent, dict) else queue or 0],
                    )
                    for sent in messages
                )
            )

    async def taken(self, queue: str) -> list[AbstractIncomingMessage]:
        """All that is in a queue, which is empty then."""
        assert self._connection is not None
        found = []
        async with self._connection.channel() as channel:
            opened = await channel.get_queue(f"{self.name}.{queue}", ensure=False)
            while (got := await opened.get(fail=False, no_ack=True)) is not None:
                found.append(got)
        return found

    async def depth(self, queue: str) -> int:
        assert self._connection is not None
        async with self._connection.channel() as channel:
            return (await channel.declare_queue(f"{self.name}.{queue}", passive=True)).declaration_result.message_count or 0

    async def results(self) -> list[Result]:
        return [msgspec.json.decode(sent.body, type=Result) for sent in await self.taken("results")]


def message(content: Any, **properties: Any) -> aio_pika.Message:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, **properties)


@pytest.fixture
async def yard(rabbitmq: RabbitMQ) -> AsyncIterator[Yard]:
    yard = Yard(rabbitmq)
    await yard.open()
    yield yard
    await yard.close()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def q(empty_server: str) -> AsyncIterator[Queue]:
    async with queue(empty_server) as opened:
        yield opened


def done(service: Service, count: int) -> bool:
    return metric(service, "source_acknowledged_total", "amqp") >= count


async def consuming(q: Queue, *services: Service, queues: int = 3) -> None:
    await q.until(lambda: sum(metric(service, "source_partitions", "amqp") for service in services) == queues)


async def test_what_comes_out_is_what_rest_answers_in_each_streams_order(
    yard: Yard, empty_server: str, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack, q: Queue
) -> None:
    events = recorded(40, 10)
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source()).start()
    await consuming(q, service)
    await yard.put(*events)
    await q.until(partial(done, service, 400))
    sent = await yard.taken("results")
    results = [msgspec.json.decode(one.body, type=Result) for one in sent]
    identities = {result.event_id for result in results}
    assert len(identities) == 400
    plain = [msgspec.structs.replace(result, event_id=None) for result in results]
    assert in_order(plain) == await uninterrupted(tiny_detector, events)
    for name in {event["stream_id"] for event in events}:
        assert [result.state_version for result in results if result.stream_id == name] == list(range(1, 41))
    first = next(one for one in sent if json.loads(one.body)["stream_id"] == "s3")
    assert (first.routing_key, first.message_id, first.headers) == ("s3", "tiny/s3/1", {"stream_id": "s3"})
    assert (first.content_type, first.delivery_mode) == ("application/json", aio_pika.DeliveryMode.PERSISTENT)
    assert outcomes(service, "amqp") == {"scored": 400}
    await q.until(lambda: metric(service, "source_lag", "amqp") == 0)


async def test_a_message_has_its_identity_from_its_id_and_its_time_from_its_timestamp(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source(queues=yard.queues[:1])).start()
    await consuming(q, service, queues=1)
    event = {"stream_id": "s0", "values": {"value": 1.0}}
    at = datetime(2026, 11, 26, 4, tzinfo=UTC)
    await yard.put(message(event, message_id="a", timestamp=at), message(event, message_id="b", timestamp=at))
    await yard.put(message(event, message_id="a", timestamp=at), message(event | {"event_id": "own"}, message_id="c"))
    await q.until(partial(done, service, 4))
    assert outcomes(service, "amqp") == {"scored": 3, "duplicate": 1}
    results = each_once(await yard.results())
    assert [result.event_id for result in results] == ["a", "b", "own"]
    assert [result.timestamp for result in results][:2] == [at.timestamp()] * 2


async def test_binary_cloudevents_have_their_attributes_in_headers(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    source = yard.source(queues=yard.queues[:1], payload={"format": "cloudevents"})
    service = await Replicas(empty_server, tiny_model_path, stack, source).start()
    await consuming(q, service, queues=1)
    about = {"specversion": "1.0", "source": "/plc/7", "type": "reading", "subject": "pump", "id": "x"}
    time = datetime(2026, 11, 26, 4, tzinfo=UTC)
    for prefix in ("cloudEvents:", "cloudEvents_"):
        headers: Any = {f"{prefix}{name}": value for name, value in about.items()} | {f"{prefix}time": time}
        await yard.put(message({"values": {"value": 1.5}}, content_type="application/json", headers=headers))
    await q.until(partial(done, service, 2))
    assert outcomes(service, "amqp") == {"scored": 1, "duplicate": 1}
    [result] = each_once(await yard.results())
    assert (result.stream_id, result.event_id) == ("pump", "/plc/7 x")


async def test_what_cannot_be_used_is_a_dead_letter_with_the_reason_and_its_neighbours_are_scored(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source()).start()
    await consuming(q, service)
    good = {"stream_id": "s0", "values": {"value": 1.0}}
    await yard.put(*[good] * 10)
    await yard.put(message(b"nonsense", headers={"batch": 7}, content_type="text/plain", message_id="bad"))
    await yard.put(message([good, {"stream_id": "s0", "values": {"speed": 2}}]))
    await yard.put(*[good] * 10)
    await q.until(partial(done, service, 22))
    assert outcomes(service, "amqp") == {"scored": 21, "rejected": 2}
    first, second = await yard.taken("dead")
    assert (first.body, first.content_type, first.message_id, first.headers["batch"]) == (b"nonsense", "text/plain", "bad", 7)
    assert str(first.headers["onset_reason"]).endswith(".")
    assert (first.headers["onset_field"], first.headers["onset_value"]) == ("payload", '"nonsense"')
    assert first.headers["onset_routing_key"] == yard.queues[0]
    assert (second.headers["onset_field"], second.headers["onset_index"]) == ("values.speed", 1)
    assert metric(service, "source_dead_lettered_total", "amqp") == 2


async def test_the_fuse_pauses_a_queue_and_its_depth_is_the_lag(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source(batch=200)).start()
    await consuming(q, service)
    await yard.put(*[message(b"nonsense")] * 450)
    await q.until(lambda: metric(service, "source_paused", "amqp") == 1)
    assert await service.ready() is None
    dead = await yard.depth("dead")
    assert dead < FUSE_ENTRIES, "what came before there was enough to judge by"
    await yard.put({"stream_id": "s1", "values": {"value": 1.0}})
    await q.until(lambda: outcomes(service, "amqp").get("scored") == 1)
    await q.until(lambda: metric(service, "source_lag", "amqp") == 450 - dead)


async def test_while_nothing_can_be_scored_the_broker_keeps_what_is_beyond_two_batches(
    yard: Yard, empty_server: str, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack, q: Queue
) -> None:
    events = recorded(600, 1)
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source()).start(max_queue_events=1)
    await consuming(q, service)
    [scorer] = service.scorers.values()
    scorer._held = True
    await yard.put(*events)
    await q.until(lambda: metric(service, "source_lag", "amqp") == 600)
    assert await yard.depth("in.0") >= 500, "two batches are here, and no more"
    scorer._held = False
    await q.until(partial(done, service, 600))
    results = [msgspec.structs.replace(result, event_id=None) for result in await yard.results()]
    assert results == await uninterrupted(tiny_detector, events)


@pytest.mark.parametrize("single_active_consumer", [False, True])
async def test_one_replica_at_a_time_consumes_a_queue_and_one_that_stops_hands_it_over(
    yard: Yard,
    empty_server: str,
    tiny_model_path: Path,
    tiny_detector: Detector,
    stack: AsyncExitStack,
    q: Queue,
    single_active_consumer: bool,
) -> None:
    events = recorded(60, 10)
    source = yard.source(single_active_consumer=single_active_consumer)
    async with AsyncExitStack() as first_stack:
        first = await Replicas(empty_server, tiny_model_path, first_stack, source).start()
        await consuming(q, first)
        second = await Replicas(empty_server, tiny_model_path, stack, source).start()
        await yard.put(*events[:300])
        await q.until(lambda: outcomes(first, "amqp").get("scored", 0) > 100)
        handing = asyncio.create_task(first_stack.aclose())
        await yard.put(*events[300:])
        await handing
    await consuming(q, second)
    both = (first, second)
    await q.until(lambda: sum(metric(service, "source_acknowledged_total", "amqp") for service in both) == 600)
    results = [msgspec.structs.replace(result, event_id=None) for result in each_once(await yard.results())]
    assert in_order(results) == await uninterrupted(tiny_detector, events)
    for name in {event["stream_id"] for event in events}:
        assert [result.state_version for result in results if result.stream_id == name] == list(range(1, 61))


async def test_a_broker_that_is_killed_loses_nothing_and_nothing_is_scored_twice(
    yard: Yard, empty_server: str, tiny_model_path: Path, tiny_detector: Detector, stack: AsyncExitStack, q: Queue, rabbitmq: RabbitMQ
) -> None:
    events = recorded(100, 10)
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source()).start()
    await consuming(q, service)
    await yard.put(*events)
    await q.until(lambda: outcomes(service, "amqp").get("scored", 0) > 100)
    await asyncio.to_thread(rabbitmq.kill)
    assert await service.ready() is None
    await asyncio.to_thread(rabbitmq.start)
    await yard.open()
    await consuming(q, service)
    await q.until(partial(_empty, yard), 60)
    results = [msgspec.structs.replace(result, event_id=None) for result in each_once(await yard.results())]
    assert in_order([result for result in results if not result.late]) == await uninterrupted(tiny_detector, events)


class Dying(Amqp):
    """Its process dies when it is to acknowledge: nothing after that happens."""

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("timed", [True, False])
async def test_what_is_delivered_again_after_a_crash_is_known_by_its_id(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue, timed: bool
) -> None:
    [declared] = options.read(json.dumps([yard.source(queues=yard.queues[:1])]))
    assert isinstance(declared, AmqpSource)
    events = [event if timed else {name: event[name] for name in ("stream_id", "values")} for event in recorded(20, 2)]
    async with AsyncExitStack() as first:
        service = await Replicas(empty_server, tiny_model_path, first, yard.source(queues=yard.queues[1:])).start()
        metrics = Metrics()
        dying = Dying(declared, metrics)
        consumer = Consumer(dying, service.scorers["tiny"], metrics, Mapper(declared.payload, max_events=100), fuse=1)
        await consumer.start()
        await q.until(lambda: metrics.registry.get_sample_value("onset_source_partitions", {"source": "amqp"}) == 1)
        await yard.put(*events, queue=0)
        await q.until(lambda: metrics.registry.get_sample_value("onset_events_total", {"door": "amqp", "outcome": "scored"}))
        await asyncio.sleep(0.3)
        await consumer.stop(0)
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source(queues=yard.queues[:1])).start()
    await q.until(partial(done, service, 40))
    assert outcomes(service, "amqp").get("duplicate", 0) > 0
    results = each_once(await yard.results())
    assert len(results) == 40
    for stream, values in (("s0", events[::2]), ("s1", events[1::2])):
        got = [result.contributors[0].actual for result in results if result.stream_id == stream]
        assert got == pytest.approx([event["values"]["value"] for event in values])


async def _empty(yard: Yard) -> bool:
    return not any([await yard.depth(f"in.{i}") for i in range(3)])


async def test_a_queue_is_made_and_bound_where_it_is_missing(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    source = yard.source(queues=[f"{yard.name}.made"], exchange="amq.topic", binding_keys=[f"{yard.name}.#"])
    service = await Replicas(empty_server, tiny_model_path, stack, source).start()
    await consuming(q, service, queues=1)
    assert yard._connection is not None
    async with yard._connection.channel() as channel:
        exchange = await channel.get_exchange("amq.topic", ensure=False)
        await exchange.publish(message({"stream_id": "s0", "values": {"value": 1}}), f"{yard.name}.line.7")
    await q.until(partial(done, service, 1))


async def test_dead_letters_that_no_queue_takes_are_not_acknowledged(
    yard: Yard, empty_server: str, tiny_model_path: Path, stack: AsyncExitStack, q: Queue
) -> None:
    service = await Replicas(empty_server, tiny_model_path, stack, yard.source(queues=yard.queues[:1])).start()
    await consuming(q, service, queues=1)
    assert yard._connection is not None
    async with yard._connection.channel() as channel:
        await channel.queue_delete(f"{yard.name}.dead")
    await yard.put(message(b"nonsense"))
    await q.until(lambda: metric(service, "source_received_total", "amqp") == 1)
    await asyncio.sleep(0.3)
    assert not done(service, 1)
    async with yard._connection.channel() as channel:
        await channel.declare_queue(f"{yard.name}.dead", durable=True)
    await q.until(partial(done, service, 1))
    assert [letter.body for letter in await yard.taken("dead")] == [b"nonsense"]
