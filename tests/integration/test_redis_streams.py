"""Redis Streams in and out, against a real server: in order, once, shared by replicas, fenced, and nothing lost when something fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from structlog.testing import capture_logs

from service.app import Service
from service.consumer import Consumer
from service.detector import Detector
from service.errors import BadSetting, Fenced, StoreUnavailable
from service.events import Delivery, Event
from service.mapping import Mapper
from service.metrics import Metrics
from service.rounds import Kind
from service.settings import Settings
from service.sources import Batch, Settlement
from service.sources.options import Payload, RedisStreamsSource
from service.sources.redis_streams import Keys, RedisStreams
from tests.queues import Queue, in_order, queue, recorded, uninterrupted
from tests.servers import Valkey
from tests.times import until

KEY = "onset:events"


class Replicas:
    """Services over one server, in this process."""

    def __init__(self, url: str, model: Path, stack: AsyncExitStack) -> None:
        self._url, self._model, self._stack = url, model, stack

    async def start(self, **settings: Any) -> Service:
        given: dict[str, Any] = {"streams_input": KEY, "redis_url": self._url, "model": self._model, "drain_seconds": 5} | settings
        return await self._stack.enter_async_context(Service(Settings(**given)).running())


@pytest.fixture
async def replicas(empty_server: str, tiny_model_path: Path) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        yield Replicas(empty_server, tiny_model_path, stack)


@pytest.fixture
async def q(empty_server: str) -> AsyncIterator[Queue]:
    async with queue(empty_server) as opened:
        yield opened


def metric(service: Service, name: str, **labels: str) -> float:
    found = service.metrics.registry.get_sample_value(f"onset_{name}", {"source": "redis_streams"} | labels)
    return -1 if found is None else found


def outcomes(service: Service) -> dict[str, float]:
    names = ("scored", "duplicate", "late", "rejected")
    found = {n: service.metrics.registry.get_sample_value("onset_events_total", {"door": "redis_streams", "outcome": n}) for n in names}
    return {name: count for name, count in found.items() if count}


async def test_what_comes_out_is_what_rest_answers_in_each_streams_order_and_the_input_is_empty(
    replicas: Replicas, q: Queue, tiny_detector: Detector
) -> None:
    events = recorded(60, 20)
    await q.add(*events[:700])  # before anybody reads
    service = await replicas.start()
    await q.add(*events[700:])
    await q.empty()
    results = await q.results()
    assert in_order(results) == await uninterrupted(tiny_detector, events)
    for name in {event["stream_id"] for event in events}:
        versions = [result.state_version for result in results if result.stream_id == name]
        assert versions == list(range(1, 61))
    await until(lambda: outcomes(service) == {"scored": 1200})
    await until(lambda: metric(service, "source_received_total") == metric(service, "source_acknowledged_total") == 1200)
    assert metric(service, "source_partitions") == 1
    await until(lambda: metric(service, "source_lag") == 0)
    assert (await q.client.xpending(KEY, "onset"))["pending"] == 0


async def test_an_entry_may_hold_many_events_or_one_written_flat(replicas: Replicas, q: Queue, tiny_detector: Detector) -> None:
    events = recorded(700, 2)
    array, lines, flat = events[:1300], events[1300:1390], events[1390:]
    await q.client.xadd(KEY, {"event": json.dumps(array)})  # more than one batch of the scorer
    await q.client.xadd(KEY, {"event": "\n".join(map(json.dumps, lines))})
    for event in flat:
        await q.client.xadd(KEY, {"stream_id": event["stream_id"], "value": event["values"]["value"], "timestamp": event["timestamp"]})
    await q.client.xadd(KEY, {"event": json.dumps({"stream_id": "pretty", "values": {"value": 1}}, indent=2)})
    await q.client.xadd(KEY, {"event": "[]"})
    await replicas.start()
    await q.empty()
    results = await q.results()
    assert [result.stream_id for result in results if result.stream_id not in ("s0", "s1")] == ["pretty"]
    assert in_order([result for result in results if result.stream_id != "pretty"]) == await uninterrupted(tiny_detector, events)
    assert await q.dead() == []


async def test_what_cannot_be_used_is_a_dead_letter_with_the_reason_and_its_neighbours_are_scored(replicas: Replicas, q: Queue) -> None:
    good = {"stream_id": "a", "values": {"value": 1.0}}
    await q.add(*[good] * 10)
    ids = [
        await q.client.xadd(KEY, fields)
        for fields in (
            {"event": "nonsense"},
            {"event": json.dumps({"stream_id": "a", "values": {"value": "hot"}})},
            {"event": json.dumps([good, {"stream_id": "a", "values": {"speed": 2}}, good])},
            {"stream_id": "a", "value": "warm"},
            {"note": b"\xff"},
            {"stream_id": "a", "value": "1", "timestamp": "yesterday"},
        )
    ]
    await q.add(*[good] * 10)
    service = await replicas.start()
    await q.empty()
    dead = await q.dead()
    by_entry = {letter["onset_entry"]: (letter["onset_field"], letter["onset_value"]) for letter in dead}
    assert by_entry == dict(
        zip(
            [entry.decode() for entry in ids],
            [
                ("payload", '"nonsense"'),
                ("values.value", '"hot"'),
                ("values.speed", "2.0"),
                ("values.value", '"warm"'),
                ("note", ""),
                ("timestamp", '"yesterday"'),
            ],
            strict=True,
        )
    )
    assert {letter["onset_stream"] for letter in dead} == {KEY}
    assert all(letter["onset_reason"].endswith(".") for letter in dead)
    assert [letter.get("onset_index") for letter in dead if letter["onset_entry"] == ids[2].decode()] == ["1"]
    assert [letter["event"] for letter in dead if letter["onset_entry"] == ids[0].decode()] == ["nonsense"]
    assert [result.state_version for result in await q.results()] == list(range(1, 23))
    await until(lambda: metric(service, "source_dead_lettered_total") == 6)
    await until(lambda: outcomes(service) == {"scored": 22, "rejected": 6})


async def test_two_declared_sources_are_read_each_by_its_own_mapping(replicas: Replicas, q: Queue) -> None:
    mapped = {"stream_id": "{line}/{sensor}", "timestamp": "at", "timestamp_unit": "ms", "values": {"value": "reading.t"}}
    declared = [{"type": "redis_streams", "name": "mapped", "key": "a", "payload": mapped}, {"type": "redis_streams", "key": "b"}]
    service = await replicas.start(streams_input="", sources=json.dumps(declared))
    await q.add({"line": 7, "sensor": "t1", "at": 1.7e12 + 500, "reading": {"t": 3}}, {"line": 7}, key="a")
    await q.add({"stream_id": "plain", "values": {"value": 1}}, key="b")
    await q.empty("a", "b")
    found = {result.stream_id: result.timestamp for result in await q.results()}
    assert found["7/t1"] == 1_700_000_000.5
    assert set(found) == {"7/t1", "plain"}
    assert [letter["onset_field"] for letter in await q.dead()] == ["sensor"]
    await until(lambda: metric(service, "source_acknowledged_total", source="mapped") == 2)
    await until(lambda: metric(service, "source_acknowledged_total") == 1)


async def test_an_id_that_no_position_can_hold_is_a_dead_letter(replicas: Replicas, q: Queue) -> None:
    for entry in ("1-1", f"2-{2**36}", f"{2**43}-1"):
        await q.client.xadd(KEY, {"stream_id": "a", "value": "1", "timestamp": "1700000000"}, entry)
    await replicas.start(streams_fuse=1)
    await q.empty()
    assert [letter["onset_field"] for letter in await q.dead()] == ["id", "id"]
    assert len(await q.results()) == 1


async def test_a_dead_letter_has_as_many_of_its_entrys_fields_as_can_be_written_and_says_how_many_it_lacks(
    replicas: Replicas, q: Queue
) -> None:
    await q.client.xadd(KEY, {"stream_id": "plant", **{f"sensor {i}": 1.5 for i in range(5000)}})
    await q.add({"stream_id": "behind", "values": {"value": 1.0}})
    await replicas.start(streams_fuse=1)
    await q.empty()
    [letter] = await q.dead()
    assert (letter["onset_field"], letter["onset_omitted_fields"], len(letter)) == ("values.sensor 0", "2001", 3000 + 6)
    assert [result.stream_id for result in await q.results()] == ["behind"]


async def test_late_events_are_reported_and_repeated_ids_only_acknowledged(replicas: Replicas, q: Queue) -> None:
    def event(second: int, name: str) -> dict[str, Any]:
        return {"stream_id": "a", "values": {"value": 1}, "timestamp": 1.7e9 + second, "event_id": name}

    service = await replicas.start()
    await q.add(event(5, "x"), event(6, "y"), event(5, "x"), event(1, "late"))
    await q.empty()
    assert [(result.event_id, result.late, result.duplicate) for result in await q.results()] == [
        ("x", False, False),
        ("y", False, False),
        ("late", True, False),
    ]
    await until(lambda: outcomes(service) == {"scored": 2, "duplicate": 1, "late": 1})


async def test_acknowledged_entries_stay_where_another_group_reads_them(replicas: Replicas, q: Queue) -> None:
    service = await replicas.start(streams_keep=True)
    await q.add(*recorded(5, 2))
    await until(lambda: metric(service, "source_acknowledged_total") == 10)
    assert await q.client.xlen(KEY) == 10
    assert (await q.client.xpending(KEY, "onset"))["pending"] == 0
    await until(lambda: metric(service, "source_lag") == 0)


async def test_replicas_share_the_partitions_and_one_that_stops_hands_its_over_at_once(
    empty_server: str, tiny_model_path: Path, q: Queue, tiny_detector: Detector
) -> None:
    keys = [f"{KEY}:{{{p}}}" for p in range(5)]
    settings = {"streams_partitions": 5, "streams_lease_seconds": 60}
    events = recorded(30, 25)
    async with AsyncExitStack() as stack, AsyncExitStack() as first_stack:
        first = await Replicas(empty_server, tiny_model_path, first_stack).start(**settings)
        await until(lambda: metric(first, "source_partitions") == 5)
        second = await Replicas(empty_server, tiny_model_path, stack).start(**settings)
        await until(lambda: {metric(first, "source_partitions"), metric(second, "source_partitions")} == {2, 3})
        for i in range(0, len(events), 50):
            for event in events[i : i + 50]:
                await q.add(event, key=keys[int(event["stream_id"][1:]) % 5])
            if i == 300:
                await first_stack.aclose()
        await until(lambda: metric(second, "source_partitions") == 5)
        await q.empty(*keys)
        assert metric(first, "source_acknowledged_total") > 0
        await until(lambda: sum(metric(each, "source_acknowledged_total") for each in (first, second)) >= len(events))
    assert in_order(await q.results()) == await uninterrupted(tiny_detector, events)


async def test_entries_of_an_owner_that_died_are_claimed_in_their_order_before_new_ones(
    replicas: Replicas, q: Queue, tiny_detector: Detector
) -> None:
    events = recorded(10, 3)
    await q.client.xgroup_create(KEY, "onset", id="0", mkstream=True)
    await q.add(*events[:20])
    for start in range(3):  # read by three members that never come back
        await q.client.xreadgroup("onset", f"dead-{start}", {KEY: ">"}, count=5)
    await q.add(*events[20:])
    service = await replicas.start(streams_batch=4)
    await q.empty()
    assert in_order(await q.results()) == await uninterrupted(tiny_detector, events)
    assert [result.state_version for result in await q.results() if result.stream_id == "s0"] == list(range(1, 11))
    assert metric(service, "source_claimed_total") == 15
    names = {consumer["name"] for consumer in await q.client.xinfo_consumers(KEY, "onset")}
    assert len(names) == 1
    assert not any(name.startswith(b"dead") for name in names)


async def test_events_that_were_committed_but_not_acknowledged_are_not_scored_again(replicas: Replicas, q: Queue) -> None:
    events = recorded(40, 2)
    async with AsyncExitStack() as stack:
        await Replicas(replicas._url, replicas._model, stack).start(streams_keep=True)
        await q.client.xadd(KEY, {"event": json.dumps(events[:60])})
        await q.add(*events[60:])
        await until(_acknowledged(q))
    before = await q.results()
    [first, *_] = [entry for entry, _ in await q.client.xrange(KEY)]
    await q.client.xgroup_setid(KEY, "onset", "0")  # everything is delivered again, as after a lost acknowledgement
    service = await replicas.start()
    await q.empty()
    assert await q.results() == before
    await until(lambda: outcomes(service) == {"duplicate": 80})
    assert first


def _scored(service: Service, wanted: int) -> bool:
    return outcomes(service).get("scored", 0) >= wanted


def _acknowledged(q: Queue) -> Any:
    async def acknowledged() -> bool:
        groups = await q.client.xinfo_groups(KEY)  # none before the service has made it
        return bool(groups) and all(group["pending"] == 0 and group["lag"] == 0 for group in groups)

    return acknowledged


async def test_who_lost_a_lease_can_neither_read_nor_commit_nor_settle(replicas: Replicas, q: Queue, empty_server: str) -> None:
    service = await replicas.start(streams_input="other")  # its scorer is used with a source of our own
    zombie = RedisStreams(empty_server, RedisStreamsSource(lease_seconds=60), Metrics())
    await zombie.open()
    await q.add({"stream_id": "a", "values": {"value": 1.0}}, {"stream_id": "a", "values": {"value": 2.0}})
    batch = await asyncio.wait_for(zombie.receive(), 60)
    assert len(batch.messages) == 2
    assert batch.lease is not None
    await q.client.set(batch.lease.key, "another#1")
    message = batch.messages[0]
    event = Event(stream_id="a", values={"value": 1.0})
    delivery = Delivery(event, batch.source, message.position, message.arrived, batch.lease, message.id)
    [scorer] = service.scorers.values()
    assert await scorer.consume([delivery]) == ([Kind.FENCED], [])
    with pytest.raises(Fenced, match="another replica"):
        await zombie.settle(batch, Settlement())
    zombie.abandon(batch)
    await zombie.close()
    assert await q.client.get(batch.lease.key) == b"another#1", "a lease of another is not given up"
    assert await q.client.xlen(KEY) == 2
    assert await q.results() == []


async def test_what_was_abandoned_comes_again_though_nothing_new_does(q: Queue, empty_server: str) -> None:
    await q.add(*recorded(10, 2))
    source = RedisStreams(empty_server, RedisStreamsSource(lease_seconds=60), Metrics())
    await source.open()
    async with asyncio.timeout(20):
        first = await source.receive()
        await asyncio.sleep(0.1)  # its reader waits for new ones by now
        source.abandon(first)
        again = await source.receive()
        source.abandon(again)
        await source.close()
    assert [message.id for message in again.messages] == [message.id for message in first.messages]


async def test_a_batch_that_is_handed_out_while_its_source_closes_keeps_no_partition_from_its_next_owner(
    q: Queue, empty_server: str
) -> None:
    await q.add(*recorded(10, 2))
    source = RedisStreams(empty_server, RedisStreamsSource(lease_seconds=60), Metrics())
    call, ready, answered, drained = source.call, source._ready.empty, asyncio.Event(), asyncio.Event()

    async def late(function: str, keys: Any, *arguments: Any) -> Any:
        answer = await call(function, keys, *arguments)
        if function == "claim" and answer[1]:
            answered.set()
            await drained.wait()
        return answer

    def empty() -> bool:
        if answered.is_set():
            drained.set()  # the reader goes on before anything that close() begins from here on
        return ready()

    source.call, source._ready.empty = late, empty  # type: ignore[method-assign]
    await source.open()
    async with asyncio.timeout(20):
        source.abandon(await source.receive())
        await answered.wait()
        await source.close()
    other = RedisStreams(empty_server, RedisStreamsSource(lease_seconds=60), Metrics())
    await other.open()
    async with asyncio.timeout(20):
        batch = await other.receive()
        assert len(batch.messages) == 20
        other.abandon(batch)
        await other.close()


async def test_an_owner_that_was_taken_for_dead_gets_its_entries_back_with_a_new_lease(replicas: Replicas, q: Queue) -> None:
    service = await replicas.start(streams_lease_seconds=0.6)
    await until(lambda: metric(service, "source_partitions") == 1)
    lease = f"{{{KEY}}}:lease"
    mine = await q.client.get(lease)
    await q.client.set(lease, "another#1", px=700)  # a stall, seen from outside
    await q.add(*({"stream_id": "a", "values": {"value": i}} for i in range(5)))
    await q.empty()
    assert metric(service, "source_fenced_total") >= 1
    assert (await q.client.get(lease)) not in (mine, b"another#1")
    assert [result.state_version for result in await q.results()] == [1, 2, 3, 4, 5]


async def test_the_fuse_pauses_a_partition_instead_of_emptying_it_into_the_dead_letters(replicas: Replicas, q: Queue) -> None:
    bad = [await q.client.xadd(KEY, {"event": "nonsense"}) for _ in range(150)]
    await q.add({"stream_id": "a", "values": {"value": 1.0}})
    service = await replicas.start()
    await until(lambda: metric(service, "source_paused") == 1)
    assert await service.ready() is None
    assert await q.dead() == []
    assert await q.client.xlen(KEY) >= len(bad)


async def test_a_paused_partition_goes_on_once_the_bad_entries_are_gone(
    empty_server: str, tiny_model_path: Path, q: Queue, replicas: Replicas
) -> None:
    service = await replicas.start(streams_input="other")
    source = RedisStreams(empty_server, RedisStreamsSource(), service.metrics)
    mapper = Mapper(Payload(), max_events=1000)
    consumer = Consumer(source, next(iter(service.scorers.values())), service.metrics, mapper, fuse=0.5, fuse_seconds=0.2)
    bad = [await q.client.xadd(KEY, {"event": "nonsense"}) for _ in range(150)]
    await q.add({"stream_id": "a", "values": {"value": 1.0}})
    await consumer.start()
    await until(lambda: metric(service, "source_paused") == 1)
    await asyncio.sleep(0.5)
    assert await q.dead() == []
    await q.client.xdel(KEY, *bad)
    await q.add({"stream_id": "a", "values": {"value": 2.0}})
    await q.empty()
    assert [result.state_version for result in await q.results()] == [1, 2]
    await until(lambda: metric(service, "source_paused") == 0)
    await consumer.stop(5)


@pytest.mark.parametrize("keep", [False, True])
async def test_what_is_trimmed_before_it_was_read_is_counted_once_and_told(
    empty_server: str, tiny_model_path: Path, q: Queue, keep: bool
) -> None:
    events = recorded(26, 1)

    async def read(scored: int, lost: int, more: list[dict[str, Any]]) -> list[int]:
        """What is told of by a service that finds so many, then gets more."""
        with capture_logs() as logs:
            async with AsyncExitStack() as stack:
                service = await Replicas(empty_server, tiny_model_path, stack).start(streams_keep=keep)
                await until(lambda: metric(service, "source_lost_total") == lost)
                await until(lambda: outcomes(service).get("scored", 0) == scored)
                await q.add(*more)
                await until(lambda: outcomes(service).get("scored", 0) == scored + len(more))
                await until(_acknowledged(q))
                assert metric(service, "source_lost_total") == lost
        return [entry["entries"] for entry in logs if entry["event"] == "streams_trimmed"]

    assert await read(0, 0, events[:10]) == []
    await q.add(*events[10:20])
    await q.client.xtrim(KEY, maxlen=6, approximate=False)
    assert await read(6, 4, []) == [4]
    await q.add(*events[20:25])
    await q.client.xtrim(KEY, maxlen=0, approximate=False)
    assert await read(0, 5, events[25:]) == [5]


async def test_a_full_queue_pauses_reading_and_loses_nothing(replicas: Replicas, q: Queue, tiny_detector: Detector) -> None:
    events = recorded(50, 40)
    service = await replicas.start(max_queue_events=1, streams_batch=100, streams_partitions=3)
    keys = [f"{KEY}:{{{p}}}" for p in range(3)]
    for key, stream in ((key, p) for p, key in enumerate(keys)):
        await q.add(*(event for event in events if int(event["stream_id"][1:]) % 3 == stream), key=key)
    await q.empty(*keys)
    assert in_order(await q.results()) == await uninterrupted(tiny_detector, events)
    await until(lambda: outcomes(service).get("scored") == len(events))


async def test_a_store_that_dies_under_way_loses_nothing_and_nothing_is_scored_twice(
    tmp_path: Path, tiny_model_path: Path, tiny_detector: Detector
) -> None:
    events = recorded(100, 20)
    with Valkey(tmp_path / "own", appendonly="yes", appendfsync="always") as server:
        async with AsyncExitStack() as stack, queue(server.url) as q:
            service = await Replicas(server.url, tiny_model_path, stack).start(streams_batch=64, streams_lease_seconds=0.6)
            await q.add(*events)
            for wanted in (200, 900, 1500):
                await until(partial(_scored, service, wanted))
                server.kill()
                await asyncio.sleep(0.1)
                server.start()
            await q.empty()
            assert in_order(await q.results()) == await uninterrupted(tiny_detector, events)


async def test_a_group_or_functions_that_are_lost_are_made_again(replicas: Replicas, q: Queue) -> None:
    service = await replicas.start(streams_lease_seconds=0.6)
    await q.add({"stream_id": "a", "values": {"value": 1.0}})
    await q.empty()
    await q.client.function_flush("SYNC")
    await q.client.delete(KEY, f"{{{KEY}}}:lease")
    await until(lambda: metric(service, "source_fenced_total") >= 1)
    await q.add({"stream_id": "a", "values": {"value": 2.0}})
    await q.empty()
    assert [result.state_version for result in await q.results()] == [1, 2]


@pytest.mark.parametrize("lost", ["group", "stream"])
async def test_a_group_that_is_deleted_while_its_partition_is_read_is_made_again_and_told(empty_server: str, q: Queue, lost: str) -> None:
    source = RedisStreams(empty_server, RedisStreamsSource(key=KEY, lease_seconds=2), Metrics())

    async def take() -> list[Any]:
        batch: Batch = await asyncio.wait_for(source.receive(), 60)
        await source.settle(batch, Settlement())
        return [json.loads(message.payload or b"")["values"]["value"] for message in batch.messages]

    with capture_logs() as logs:
        await source.open()
        await q.add({"stream_id": "a", "values": {"value": 1}})
        assert await take() == [1]
        await (q.client.xgroup_destroy(KEY, "onset") if lost == "group" else q.client.delete(KEY))
        await q.add({"stream_id": "a", "values": {"value": 2}})
        assert await take() == [2]
        await source.close()
    [told] = [line for line in logs if line["event"] == "streams_group_gone"]
    assert (told["partition"], told["group"]) == (KEY, "onset")
    assert "streams_trimmed" not in {line["event"] for line in logs}


async def test_renewing_a_lease_is_no_error_in_the_statistics_of_the_server(empty_server: str, q: Queue) -> None:
    """Somebody may be woken when they grow."""
    source = RedisStreams(empty_server, RedisStreamsSource(key=KEY, lease_seconds=1), Metrics())

    async def renewals() -> int:
        stats = await q.client.info("commandstats")
        return int(stats.get("cmdstat_pexpire", {"calls": 0})["calls"])

    await source.open()
    await q.add({"stream_id": "a", "values": {"value": 1}})
    await asyncio.wait_for(source.receive(), 60)
    before, done = (await q.client.info("stats"))["total_error_replies"], await renewals()

    async def renewed() -> bool:
        return await renewals() >= done + 5

    await until(renewed)
    assert (await q.client.info("stats"))["total_error_replies"] == before
    await source.close()


async def test_a_key_of_another_kind_is_told(empty_server: str, q: Queue) -> None:
    source = RedisStreams(empty_server, RedisStreamsSource(), Metrics())
    await source.open()
    await q.add({"stream_id": "a", "values": {"value": 1.0}})
    batch: Batch = await asyncio.wait_for(source.receive(), 60)
    await q.client.set("onset:dead-letters", "x")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await source.settle(batch, Settlement())
    await source.close()


async def test_a_model_that_is_not_loaded_is_refused_by_name(replicas: Replicas) -> None:
    with pytest.raises(BadSetting, match="names the model 'none'"):
        await replicas.start(streams_model="none")


def test_a_partition_and_its_lease_share_a_slot(valkey_server: str) -> None:
    def slot(key: str) -> bytes:
        start = key.find("{")
        end = key.find("}", start + 1)
        return (key[start + 1 : end] if start >= 0 and end > start + 1 else key).encode()

    for keys in (Keys("onset:events", 1), Keys("onset:events", 3), Keys("plant {7}:in", 1), Keys("plant {7}:in", 3)):
        for p in range(keys.partitions):
            assert slot(keys.partition(p)) == slot(keys.lease(p))
        assert slot(keys.members) == slot(keys.changes)
    assert key_slot(Keys("onset:events", 1).lease(0).encode()) == key_slot(b"onset:events")
