"""What is Kafka's own, against librdkafka's mock cluster; what all sources share is in the contract suite."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from structlog.testing import capture_logs

from bench.kafka_mock import MockKafka
from bench.servers import free_port
from service.errors import BadSetting, StoreUnavailable
from service.metrics import Metrics
from service.sources import Settlement
from service.sources.kafka import Kafka, Outgoing, _Sender
from service.sources.options import KafkaSource
from tests.rigs import KafkaRig, partition_of, service


async def until_drained(rig: KafkaRig) -> None:
    async with asyncio.timeout(30):
        while not await rig.drained():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_topic_that_was_made_again_is_not_taken_for_the_old_one(kafka: MockKafka, empty_server: str, tiny_model_path: Path) -> None:
    rig = KafkaRig(kafka, empty_server)
    events = [{"stream_id": "a", "values": {"value": float(i)}} for i in range(5)]
    async with service(rig, tiny_model_path).running():
        await rig.put(*events)
        await until_drained(rig)
    [topic] = rig.declared["topics"]
    kafka.delete(topic)
    kafka.topic(topic, 3)
    rig = rig.again()
    async with service(rig, tiny_model_path).running() as second:
        await rig.put(*events[:3])  # at offsets that were scored once
        await until_drained(rig)
        scored = second.metrics.registry.get_sample_value("onset_events_total", {"door": "kafka", "outcome": "scored"})
    assert scored == 3
    assert [result.state_version for result in await rig.results()] == list(range(1, 9))


async def test_a_group_that_begins_with_what_is_new_reads_that_alone(kafka: MockKafka, empty_server: str, tiny_model_path: Path) -> None:
    rig = KafkaRig(kafka, empty_server)
    events = [{"stream_id": "a", "values": {"value": float(i)}, "timestamp": 1.7e9 + i} for i in range(3)]
    await rig.put(*events[:2])
    async with service(rig, tiny_model_path, start="latest").running() as running:
        async with asyncio.timeout(30):
            while running.metrics.registry.get_sample_value("onset_source_partitions", {"source": "kafka"}) != 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await rig.put(events[2])
        await until_drained(rig)
    assert [result.timestamp for result in await rig.results()] == [1.7e9 + 2]


def filled(events: list[dict[str, Any]]) -> list[bytes]:
    """So large that the mock cluster, which keeps 5 MiB of a partition, deletes some."""
    return [json.dumps(event).encode() + b" " * 700_000 for event in events]


@pytest.mark.parametrize("start", ["earliest", "latest"])
async def test_what_the_brokers_deleted_unread_is_told_and_all_that_they_still_have_is_scored(
    kafka: MockKafka, empty_server: str, tiny_model_path: Path, start: str
) -> None:
    rig = KafkaRig(kafka, empty_server)
    events = [{"stream_id": "a", "values": {"value": float(i)}, "timestamp": 1.7e9 + i} for i in range(20)]
    async with service(rig, tiny_model_path, start=start).running() as first:
        async with asyncio.timeout(30):
            while first.metrics.registry.get_sample_value("onset_source_partitions", {"source": "kafka"}) != 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await rig.put(events[0])
        await until_drained(rig)
    await rig.put(*filled(events[1:]))
    reader = Consumer({"bootstrap.servers": kafka.servers, "group.id": "of-a-test"})
    low, high = reader.get_watermark_offsets(TopicPartition(rig.declared["topics"][0], partition_of(events[0])), 10)
    reader.close()
    assert (low > 1, high) == (True, 20)
    with capture_logs() as logs:
        async with service(rig, tiny_model_path, start=start).running() as second:
            await until_drained(rig)
            lost = second.metrics.registry.get_sample_value("onset_source_lost_total", {"source": "kafka"})
    assert lost == low - 1
    told = [(entry["offset"], entry["reads_on_at"]) for entry in logs if entry["event"] == "kafka_offset_gone"]
    assert told == [(1, low)]
    assert [result.timestamp for result in await rig.results()] == [1.7e9, *(1.7e9 + i for i in range(low, 20))]


async def test_a_log_that_ends_before_the_groups_offset_is_another_one(kafka: MockKafka, empty_server: str, tiny_model_path: Path) -> None:
    rig = KafkaRig(kafka, empty_server)
    events = [{"stream_id": "a", "values": {"value": float(i)}} for i in range(5)]
    async with service(rig, tiny_model_path).running():
        await rig.put(*events)
        await until_drained(rig)
    [topic], at = rig.declared["topics"], partition_of(events[0])
    group = Consumer({"bootstrap.servers": kafka.servers, "group.id": rig.declared["group"]})
    [place] = group.committed([TopicPartition(topic, at)], 10)
    group.close()
    kafka.delete(topic)
    kafka.topic(topic, 3)
    rig = rig.again()
    await rig.put(*events[:3])
    name = f"{rig.declared['group']}-cut-off"
    group = Consumer({"bootstrap.servers": kafka.servers, "group.id": name})
    group.commit(offsets=[TopicPartition(topic, at, place.offset, place.metadata)], asynchronous=False)  # as if the log had lost its end
    group.close()
    with capture_logs() as logs:
        async with service(rig, tiny_model_path, group=name).running() as second:
            async with asyncio.timeout(30):
                while len(await rig.results()) < 8:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            scored = second.metrics.registry.get_sample_value("onset_events_total", {"door": "kafka", "outcome": "scored"})
    assert scored == 3
    assert [(entry["offset"], entry["reads_on_at"]) for entry in logs if entry["event"] == "kafka_offset_gone"] == [(5, 0)]


async def test_every_offset_has_the_incarnation_that_its_group_began_with(
    kafka: MockKafka, empty_server: str, tiny_model_path: Path
) -> None:
    rig = KafkaRig(kafka, empty_server)
    seen = set()
    event = {"stream_id": "a", "values": {"value": 1.0}}
    for _ in range(2):
        async with service(rig, tiny_model_path).running():
            await rig.put(event)
            await until_drained(rig)
        reader = Consumer({"bootstrap.servers": kafka.servers, "group.id": rig.declared["group"]})
        [place] = reader.committed([TopicPartition(rig.declared["topics"][0], partition_of(event))], 10)
        reader.close()
        seen.add(place.metadata)
    assert place.offset == 2
    assert len(seen) == 1
    assert str(seen.pop()).startswith("onset-")


async def test_options_that_librdkafka_does_not_take_stop_the_service(kafka: MockKafka, empty_server: str, tiny_model_path: Path) -> None:
    rig = KafkaRig(kafka, empty_server)
    with pytest.raises(BadSetting, match=r"Source 'kafka': librdkafka does not take these options: .*nonsense"):
        async with service(rig, tiny_model_path, options={"nonsense": "1"}).running():
            pass


async def test_brokers_that_do_not_answer_are_told_with_the_reason(kafka: MockKafka, empty_server: str, tiny_model_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with capture_logs() as logs:
        async with service(KafkaRig(kafka, empty_server), tiny_model_path, brokers=nobody).running(), asyncio.timeout(60):
            while not (told := [line for line in logs if line["event"] == "kafka_unavailable"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert nobody in told[0]["error"]
    assert "Connection refused" in told[0]["error"]


async def test_a_stop_does_not_wait_for_brokers_that_are_gone_with_an_offset_uncommitted(kafka: MockKafka, empty_server: str) -> None:
    rig = KafkaRig(kafka, empty_server)
    session = {"session.timeout.ms": 45_000}  # for as long the client waits; orchestrators kill after 30 s
    source = Kafka(KafkaSource(**(rig.declared | {"options": session})), Metrics())
    await rig.put({"stream_id": "a", "values": {"value": 1.0}})
    await source.open()
    batch = await source.receive()
    kafka.down()
    try:
        await source.settle(batch, Settlement())
        with capture_logs() as logs:
            async with asyncio.timeout(30):
                await source.close()
    finally:
        kafka.up()
    assert any("when the session times out" in entry["error"] for entry in logs if entry["event"] == "kafka_unavailable")


async def test_the_topic_that_records_do_not_get_to_is_named() -> None:
    bugs: list[Exception] = []
    config = {"bootstrap.servers": f"127.0.0.1:{free_port()}", "delivery.timeout.ms": 200}
    sender = _Sender(config, asyncio.get_running_loop(), bugs.append)
    sender.start()
    with pytest.raises(StoreUnavailable, match=r"did not take all records for 'onset-results' \(.*timed out"):
        await sender.send([Outgoing("onset-results", b"x", None, [])])
    await sender.end()
    assert bugs == []


async def test_the_key_is_the_stream_and_what_is_too_large_for_a_dead_letter_loses_its_payload(
    kafka: MockKafka, empty_server: str, tiny_model_path: Path
) -> None:
    rig = KafkaRig(kafka, empty_server)
    async with service(rig, tiny_model_path, fuse=1, options=rig.declared["options"] | {"message.max.bytes": 2000}).running():
        rig.send(b'{"values": {"value": 1}}', key=b"pump-7")
        rig.send(b"x" * 3000, key=b"pump-7")
        await until_drained(rig)
    assert [result.stream_id for result in await rig.results()] == ["pump-7"]
    [letter] = await rig.dead()
    assert (letter["onset_omitted_bytes"], letter["onset_field"]) == ("3000", "payload")
