"""Every source keeps the same promises: at least once delivered, once scored, in order, and nothing lost when something fails.

Against real servers; Kafka is librdkafka's mock cluster, which speaks the protocol (bench/kafka_mock.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import TypeAdapter

from service import queues
from service.app import Service
from service.consumer import FUSE_ENTRIES, Consumer
from service.detector import Detector
from service.events import Published, Result
from service.mapping import Mapper
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.settings import Settings
from service.sources import Batch, Settlement, Source
from service.sources.amqp import Amqp
from service.sources.kafka import Kafka
from service.sources.mqtt import Mqtt
from service.sources.nats import Nats
from service.sources.options import AnyQueue, Payload
from service.sources.partitions import AHEAD
from service.stores.memory import MemoryStore
from tests.brokers import Mosquitto
from tests.buses import amqp_rig, mqtt_rig
from tests.queues import in_order, recorded, uninterrupted
from tests.rigs import KafkaRig, Rig, each_once, nats_rig, redis_rig
from tests.servers import Valkey
from tests.times import until
from tests.tiny import build_tiny
from tests.tiny_log import build_tiny_log

OUTSIDE = ("kafka", "nats", "mqtt", "amqp")
"""Queues that are not the state store's own."""
KINDS = ("redis_streams", *OUTSIDE)
DEATHS = [("redis_streams", "settle"), *((kind, at) for kind in OUTSIDE for at in ("publish", "settle"))]
"""Calls at which a process can die after the commit; Redis Streams publish with it."""


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One that keeps what it has when it is killed."""
    with Valkey(tmp_path_factory.mktemp("lasting"), appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture
def lasting(valkey: Valkey) -> Valkey:
    """The same, with nothing in it."""
    with valkey.client() as client:
        client.flushall()
    return valkey


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest, lasting: Valkey) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        match request.param:
            case "redis_streams":
                yield await stack.enter_async_context(redis_rig(lasting))
            case "kafka":
                yield KafkaRig(request.getfixturevalue("kafka"), lasting.url)
            case "nats":
                yield await stack.enter_async_context(nats_rig(request.getfixturevalue("jetstream"), lasting.url))
            case "mqtt":
                yield await stack.enter_async_context(mqtt_rig(request.getfixturevalue("mosquitto"), lasting.url))
            case _:
                yield await stack.enter_async_context(amqp_rig(request.getfixturevalue("rabbitmq"), lasting.url))


class Replicas:
    """Services that read one rig, in this process."""

    def __init__(self, rig: Rig, model: Path, stack: AsyncExitStack) -> None:
        self._rig, self._model, self._stack = rig, model, stack

    async def start(self, **declared: Any) -> Service:
        service = self.make(**declared)
        return await self._stack.enter_async_context(service.running())

    def make(self, **declared: Any) -> Service:
        sources = TypeAdapter(list[dict[str, Any]]).dump_json([self._rig.declared | {"name": "line"} | declared]).decode()
        return Service(Settings(sources=sources, redis_url=self._rig.store, model=self._model, drain_seconds=5))


@pytest.fixture
async def replicas(rig: Rig, tiny_model_path: Path) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        yield Replicas(rig, tiny_model_path, stack)


def metric(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(f"onset_source_{name}", {"source": "line"})
    return -1 if found is None else found


def outcome(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value("onset_events_total", {"door": "line", "outcome": name}) or 0


def lags(rig: Rig, metrics: Metrics, count: int) -> bool:
    """Whether the metric says that so much waits; there is none where nobody can tell."""
    return metric(metrics, "lag") == (count if rig.has_lag else -1)


async def test_every_event_is_scored_once_in_its_streams_order_and_its_result_is_published(
    rig: Rig, replicas: Replicas, tiny_detector: Detector
) -> None:
    events = recorded(30, 12)
    await rig.put(*events[:200])
    service = await replicas.start()
    await rig.put(*events[200:])
    await until(rig.drained)
    results = await rig.results()
    assert in_order(results) == await uninterrupted(tiny_detector, events)
    for stream in range(12):
        assert [result.state_version for result in results if result.stream_id == f"s{stream}"] == list(range(1, 31))
    await until(lambda: metric(service.metrics, "acknowledged_total") == len(events))
    await until(lambda: metric(service.metrics, "partitions") == rig.partitions)
    await until(lambda: lags(rig, service.metrics, 0))
    assert await rig.dead() == []


async def test_what_cannot_be_used_is_a_dead_letter_with_its_reason_and_its_neighbours_are_scored(rig: Rig, replicas: Replicas) -> None:
    good = {"stream_id": "a", "values": {"value": 1.0}}
    place = 1
    await rig.put(*[good] * 5, partition=place)
    await rig.put(b"nonsense", b"\xff\xfe", {"stream_id": "a", "values": {"value": "hot"}}, partition=place)
    await rig.put([good, {"stream_id": "a", "values": {"speed": 2}}, good], b"", *[good] * 5, partition=place)
    service = await replicas.start(fuse=1)
    await until(rig.drained)
    letters = await rig.dead()
    assert sorted(letter["onset_field"] for letter in letters) == ["payload", "payload", "payload", "values.speed", "values.value"]
    assert all(letter["onset_reason"].endswith(".") for letter in letters)
    assert [letter["onset_index"] for letter in letters if letter["onset_field"] == "values.speed"] == ["1"]
    assert [letter["onset_value"] for letter in letters if letter["onset_field"] == "values.value"] == ['"hot"']
    assert {letter.get("sent") for letter in letters} == {"by us"}, "its own headers stay"
    assert [result.state_version for result in await rig.results()] == list(range(1, 13))
    await until(lambda: metric(service.metrics, "dead_lettered_total") == 5)


class Dying:
    """A source whose process dies at one of its calls: nothing after it happens."""

    def __init__(self, source: Source, at: str) -> None:
        self._source, self._at = source, at
        self.name, self.publishes = source.name, source.publishes
        self.reached = asyncio.Event()

    async def open(self) -> None:
        await self._source.open()

    async def receive(self) -> Batch:
        return await self._source.receive()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        await self._dies("publish")
        await self._source.publish(batch, results)

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        await self._dies("settle")
        await self._source.settle(batch, settlement)

    def abandon(self, batch: Batch) -> None:
        self._source.abandon(batch)

    async def lag(self) -> int | None:
        return await self._source.lag()

    async def close(self) -> None:
        await self._source.close()

    async def _dies(self, call: str) -> None:
        if call == self._at:
            self.reached.set()
            await asyncio.Event().wait()


POISON = {
    "half a character as a feature": b'{"stream_id": "a", "values": {"\\ud800": 1}}',
    "half a character as a stream": b'{"stream_id": "\\udfff", "values": {"value": 1}}',
    "half a character for a truth": b'{"stream_id": "a", "values": {"value": 1}, "end": "\\ud800"}',
    "half a character as a field": b'{"\\ud800": 1}',
    "half a character in a time": b'{"stream_id": "a", "values": {"value": 1}, "timestamp": "2026-11-26\\ud80008:00:00"}',
    "a megabyte of nothing": b"x" * 990_000,
    "a control character of Latin-1": '{"stream_id": "a\x85b", "values": {"value": 1}}'.encode(),
    "a feature of such a name": '{"stream_id": "a", "values": {"\x85\ufffe": 1}}'.encode(),
    "no character of Unicode": '{"stream_id": "a\ufffe", "values": {"value": 1}}'.encode(),
    "a topic of the broker's own": b'{"stream_id": "$SYS/broker", "values": {"value": 1}}',
    "empty levels": b'{"stream_id": "//", "values": {"value": 1}}',
    "a long name": json.dumps({"stream_id": "\U0001f600" * 256, "values": {"value": 1}}).encode(),
    "a long identity": json.dumps({"stream_id": "a", "event_id": "\U0001f600" * 256, "values": {"value": 1}}).encode(),
}


async def test_no_message_whatever_it_holds_keeps_those_behind_it_from_being_scored(rig: Rig, replicas: Replicas) -> None:
    await rig.put(*POISON.values(), {"stream_id": "behind", "values": {"value": 1.0}}, partition=0)
    await replicas.start(fuse=1)
    await until(rig.drained)
    assert "behind" in {result.stream_id for result in await rig.results()}
    assert len(await rig.results()) + len(await rig.dead()) == len(POISON) + 1


@pytest.mark.parametrize(("rig", "at"), DEATHS, indirect=["rig"])
async def test_who_dies_between_the_commit_and_the_acknowledgement_leaves_nothing_to_score_twice_and_no_result_missing(
    rig: Rig, replicas: Replicas, tiny_detector: Detector, at: str
) -> None:
    events = recorded(30, 6)
    by_stream = [[event for event in events if event["stream_id"] == f"s{stream}"] for stream in range(6)]
    service = await replicas.start()  # one with a scorer, and a source of its own that is not looked at
    await until(lambda: metric(service.metrics, "partitions") == rig.partitions)
    await replicas._stack.aclose()
    holder = Service(Settings(redis_url=rig.store, model=service.settings.model))
    async with holder.running():
        [scorer] = holder.scorers.values()
        options: AnyQueue = TypeAdapter(AnyQueue).validate_python(rig.declared | {"name": "line"})
        assert holder.store is not None
        dying = Dying(queues.queue(options, rig.store, holder.store, Metrics()), at)
        consumer = Consumer(dying, scorer, Metrics(), Mapper(Payload(), max_events=1000), fuse=1)
        await consumer.start()
        await rig.put(*by_stream)  # a message each: Redis Streams too acknowledge such afterwards
        await asyncio.wait_for(dying.reached.wait(), 20)
        await until(lambda: scorer_has(scorer, "s0", 30))
        await consumer.stop(0)
        assert not (rig.shows_acks and await rig.drained())
    async with AsyncExitStack() as stack:
        second = await Replicas(rig, service.settings.model, stack).start()
        await until(rig.drained)
        await until(lambda: outcome(second.metrics, "duplicate") >= 30)
        await until(lambda: metric(second.metrics, "acknowledged_total") == len(by_stream))
    results = await rig.results()
    assert in_order(each_once(results)) == await uninterrupted(tiny_detector, events)
    if rig.exactly:
        assert len(results) == len(events)


async def scorer_has(scorer: Scorer, stream: str, version: int) -> bool:
    try:
        return (await scorer.streams.last(stream)).state_version == version
    except Exception:
        return False


async def test_the_fuse_pauses_a_partition_instead_of_emptying_it_into_the_dead_letters_and_nothing_of_it_is_lost(
    rig: Rig, replicas: Replicas, tiny_model_path: Path
) -> None:
    await rig.put(*[b"nonsense"] * 150, partition=0)
    others = 10 if rig.partitions > 1 else 0
    await rig.put(*[{"stream_id": "other", "values": {"value": 1.0}}] * others, partition=1)
    async with AsyncExitStack() as stack:
        service = await Replicas(rig, tiny_model_path, stack).start(batch=200)
        await until(lambda: metric(service.metrics, "paused") == 1)
        assert await service.ready() is None
        await until(lambda: outcome(service.metrics, "scored") == others)

        async def settled() -> bool:
            return metric(service.metrics, "acknowledged_total") == others + len(await rig.dead())

        await until(settled)
        dead = len(await rig.dead())
        assert dead < FUSE_ENTRIES, "those that were too few to judge by"
        await until(lambda: lags(rig, service.metrics, 150 - dead))
    second = await replicas.start(fuse=1)
    await until(lambda: metric(second.metrics, "acknowledged_total") == 150 - dead)
    await until(rig.drained)
    assert len(await rig.dead()) == 150


async def test_while_nothing_can_be_scored_no_more_is_taken_than_there_is_room_for_and_the_lag_says_so(
    rig: Rig, tiny_detector: Detector
) -> None:
    batch, count = 10, 600
    await rig.put(*(event | {"stream_id": "s0"} for event in recorded(count, 1)), partition=2)
    store = MemoryStore(state_ttl=60, result_ttl=60)
    held = Scorer(tiny_detector, Policy(), store, metrics := Metrics(), Limits(), held=True)
    held.start()
    options: AnyQueue = TypeAdapter(AnyQueue).validate_python(rig.declared | {"name": "line", "batch": batch})
    source = queues.queue(options, rig.store, store, metrics)
    consumer = Consumer(source, held, metrics, Mapper(Payload(), max_events=1000), fuse=1)
    await consumer.start()
    await until(lambda: metric(metrics, "received_total") > 0)
    await until(lambda: lags(rig, metrics, count))
    await asyncio.sleep(0.5)
    assert 0 < metric(metrics, "received_total") <= batch, "one batch is under way"
    assert waiting(source) <= AHEAD * batch + 500
    await consumer.stop(0)
    await held.drain(1)


def waiting(source: Any) -> int:
    """Messages of the partition with most of them that are in this process and not handed out."""
    match source:
        case Kafka() | Nats():
            return max(len(partition.waiting) for partition in source._partitions.owned)
        case Mqtt():
            return len(source._session._waiting) if source._session else 0
        case Amqp():
            return max(len(reader._session.waiting) if reader._session else 0 for reader in source._readers.values())
    return 0  # one batch is read ahead, and no more


@pytest.mark.parametrize("rig", OUTSIDE, indirect=True)
async def test_a_silent_store_stops_the_reading_and_not_the_service_and_nothing_is_lost(
    rig: Rig, replicas: Replicas, lasting: Valkey, tiny_detector: Detector
) -> None:
    events, batch = recorded(40, 9), 20
    service = await replicas.start(batch=batch)
    await rig.put(*events[:120])
    await until(rig.drained)
    await until(lambda: metric(service.metrics, "acknowledged_total") == 120)
    lasting.kill()
    await rig.put(*events[120:])
    await asyncio.sleep(0.5)
    assert metric(service.metrics, "received_total") <= 120 + batch * rig.partitions, "one batch is under way, and no more is taken"
    lasting.start()
    await until(rig.drained)
    assert in_order(each_once(await rig.results())) == await uninterrupted(tiny_detector, events)


async def test_replicas_share_the_partitions_or_one_has_all_and_one_that_leaves_hands_its_over(
    rig: Rig, replicas: Replicas, tiny_model_path: Path, tiny_detector: Detector
) -> None:
    events = recorded(40, 9)
    async with AsyncExitStack() as stack:
        first = await Replicas(rig, tiny_model_path, stack).start()
        await until(lambda: metric(first.metrics, "partitions") == rig.partitions)
        second = await replicas.start()
        both = (first, second)
        owned = [1, rig.partitions - 1] if rig.shared else [0, rig.partitions]
        await until(lambda: sorted(metric(service.metrics, "partitions") for service in both) == owned)
        await rig.put(*events[:180])
        await until(rig.drained)
        # How often each was acknowledged is not asked: on a busy machine a lease may expire and what is under way come again.
        await until(lambda: max(metric(service.metrics, "acknowledged_total") for service in both) > 0)
        await until(lambda: (min(metric(service.metrics, "acknowledged_total") for service in both) > 0) == rig.shared)
        leaving = asyncio.create_task(stack.aclose())
        await rig.put(*events[180:240])
        await leaving
    await rig.put(*events[240:])
    await until(lambda: metric(second.metrics, "partitions") == rig.partitions)
    await until(rig.drained)
    assert in_order(each_once(await rig.results())) == await uninterrupted(tiny_detector, events)


@pytest.mark.parametrize("rig", OUTSIDE, indirect=True)
async def test_under_load_the_queue_goes_over_to_another_file_and_back_with_nothing_lost_and_each_result_under_a_name_of_its_own(
    rig: Rig, tmp_path: Path
) -> None:
    """What one file has scored may be delivered to the other again: both results have names, and neither has the other's."""
    files = [build_tiny(tmp_path, version=version) for version in ("1", "2")]
    events, enough = recorded(1000, 6), asyncio.Event()
    async with AsyncExitStack() as stack:
        old = await Replicas(rig, files[0], stack).start()
        await until(lambda: metric(old.metrics, "partitions") == rig.partitions)
        sending = asyncio.create_task(_sent_until(enough, rig, events, 6))
        await until(lambda: outcome(old.metrics, "scored") > 60)
        new = await Replicas(rig, files[1], stack).start()
        await until(_scored_by(rig, 6, ["1", "2"]), 180)
        await until(lambda: metric(new.metrics, "partitions") == rig.partitions)
        undone = await Replicas(rig, files[0], stack).start()
        await until(_scored_by(rig, 6, ["1", "2", "1"]), 180)
        await until(lambda: metric(new.metrics, "partitions") == 0)
        enough.set()
        wanted = {(event["stream_id"], event["timestamp"]) for event in await sending}

        async def out() -> bool:
            return {(result.stream_id, result.timestamp) for result in await rig.results()} == wanted

        await until(out)
        assert [service.metrics.registry.get_sample_value("onset_unexpected_errors_total") for service in (old, new, undone)] == [0, 0, 0]
    named = await rig.named()
    once = dict(named)
    assert all(once[name] == content for name, content in named)
    for lives in _lives(named, 6):
        assert [life[0].model_version for life in lives] == ["1", "2", "1"]
        for life in lives:
            assert [result.state_version for result in life] == list(range(1, len(life) + 1))
            assert [float(result.timestamp) for result in life] == [float(life[0].timestamp) + i for i in range(len(life))]
            assert {result.model_version for result in life} == {life[0].model_version}


def _lives(named: Sequence[tuple[str, bytes]], streams: int) -> list[list[list[Result]]]:
    """Of each stream the results of its lives, one after the other: it starts afresh with another file."""
    results = [msgspec.json.decode(content, type=Result) for content in dict(named).values()]
    found: list[list[list[Result]]] = [[] for _ in range(streams)]
    for result in results:
        lives = found[int(result.stream_id.removeprefix("s"))]
        if result.state_version == 1:
            lives.append([])
        lives[-1].append(result)
    return found


def _scored_by(rig: Rig, streams: int, versions: list[str]) -> Callable[[], Awaitable[bool]]:
    """Whether each stream has been scored by these files, one after the other."""

    async def scored() -> bool:
        return all([life[0].model_version for life in lives] == versions for lives in _lives(await rig.named(), streams))

    return scored


async def _sent_until(enough: asyncio.Event, rig: Rig, events: Sequence[dict[str, Any]], streams: int) -> Sequence[dict[str, Any]]:
    """A round of all streams at a time; those that were sent."""
    for start in range(0, len(events), streams):
        if enough.is_set():
            return events[:start]
        await rig.put(*events[start : start + streams])
        await asyncio.sleep(0.01)
    raise AssertionError("The load ended before the queue had gone over and back.")


async def test_a_broker_that_is_gone_for_a_moment_costs_nothing(rig: Rig, replicas: Replicas, tiny_detector: Detector) -> None:
    events = recorded(40, 9)
    service = await replicas.start()
    await rig.put(*events[:180])
    await until(lambda: metric(service.metrics, "acknowledged_total") > 20)
    await rig.restart()
    assert await service.ready() is None
    await rig.put(*events[180:])
    await until(rig.drained)
    results = [result for result in await rig.results() if not result.late]  # AMQP: again from a broker that lost acknowledgements
    assert in_order(each_once(results)) == await uninterrupted(tiny_detector, events)
    assert await rig.dead() == []


LOG_LINES = ("Accepted connection from 10.0.0.7", "Took 12.5 ms for /cart", "Closed connection from 10.0.0.7")


async def test_log_lines_are_mapped_from_fields_and_sessions_end_where_a_field_says_so(rig: Rig, tmp_path: Path) -> None:
    sessions = [[{"request": f"r{n}", "log": {"msg": line}, "n": i, "last": i == 2} for i, line in enumerate(LOG_LINES)] for n in range(20)]
    messages = [sent for turn in zip(*sessions, strict=True) for sent in turn]
    payload = {"stream_id": "web/{request}", "message": "log.msg", "sequence": "n", "end": "last"}
    async with AsyncExitStack() as stack:
        replicas = Replicas(rig, build_tiny_log(tmp_path), stack)
        await rig.put(*messages[:25], partition=0)
        await rig.put(b"no line", partition=0)
        service = await replicas.start(payload=payload, fuse=1)
        await rig.put(*messages[25:], partition=0)
        await until(rig.drained)
        await until(lambda: metric(service.metrics, "acknowledged_total") == 61)

        async def out() -> bool:
            return len(each_once(await rig.results())) == 80 and len(await rig.dead()) == 1

        await until(out)
    results = each_once(await rig.results())
    for n in range(20):
        told = [result for result in results if result.stream_id == f"web/r{n}"]
        assert [result.line and result.line.message for result in told] == [*LOG_LINES, None]
        assert [result.line and result.line.template for result in told][3] == "(end of session)"
        assert [result.state_version for result in told] == [1, 2, 3, 4]
    [letter] = await rig.dead()
    assert letter["onset_field"] == "payload"


async def test_raw_text_is_a_line(rig: Rig, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        replicas = Replicas(rig, build_tiny_log(tmp_path), stack)
        await rig.put(*[line.encode() for line in LOG_LINES], b"Took 7 ms for /a?x={}\n  and what follows", partition=1)
        await replicas.start(payload={"format": "text", "stream_id": "{headers.sent}"})
        await until(rig.drained)
    results = each_once(await rig.results())
    assert [result.line and result.line.new for result in results] == [False] * 4
    assert {result.stream_id for result in results} == {"by us"}


async def test_several_sources_feed_one_service_at_once(
    lasting: Valkey, mosquitto: Mosquitto, tiny_model_path: Path, tiny_detector: Detector
) -> None:
    events = recorded(20, 6)
    by_queue, by_bus = ([event for event in events if (event["stream_id"] < "s3") is early] for early in (True, False))
    async with redis_rig(lasting) as queue, mqtt_rig(mosquitto, lasting.url) as bus:
        sources = TypeAdapter(list[dict[str, Any]]).dump_json([queue.declared, bus.declared]).decode()
        async with Service(Settings(sources=sources, redis_url=lasting.url, model=tiny_model_path, drain_seconds=5)).running():
            await asyncio.gather(queue.put(*by_queue), bus.put(*by_bus))
            await until(queue.drained)
            await until(bus.drained)
        assert in_order(await queue.results()) == await uninterrupted(tiny_detector, by_queue)
        assert in_order(each_once(await bus.results())) == await uninterrupted(tiny_detector, by_bus)
