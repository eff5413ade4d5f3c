"""What is JetStream's own, against a real nats-server; what all sources share is in the contract suite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, ConsumerInfo, StreamConfig, StreamSource, SubjectTransform
from nats.js.errors import NotFoundError, ServerError
from structlog.testing import capture_logs

from service.detector import Detector
from service.errors import BadSetting, StoreUnavailable
from service.events import Published
from service.metrics import Metrics
from service.queues import queue
from service.sources import Settlement
from service.sources.nats import Nats, _whole, subjects_of
from service.sources.options import NatsSource
from service.stores.memory import MemoryStore
from tests.brokers import NatsServer
from tests.queues import in_order, recorded, uninterrupted
from tests.rigs import NatsRig, content_of, each_once, nats_rig, service
from tests.times import until


@pytest.fixture
async def rig(jetstream: NatsServer, empty_server: str) -> AsyncIterator[NatsRig]:
    async with nats_rig(jetstream, empty_server) as made:
        yield cast("NatsRig", made)


class Relay:
    """Stands between a client and the server."""

    def __init__(self, port: int) -> None:
        self._to, self._stalled = port, asyncio.Event()
        self._connections: list[tuple[asyncio.StreamWriter, asyncio.Task[None]]] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Its address."""
        async with await asyncio.start_server(self._relay, "127.0.0.1", 0) as server:
            yield "nats://{}:{}".format(*server.sockets[0].getsockname())
            self.cut()
            await asyncio.gather(*(task for _, task in self._connections))

    def stall(self) -> None:
        """What is sent is taken no further, by none of the connections that there are."""
        self._stalled.set()
        self._stalled = asyncio.Event()

    def cut(self) -> None:
        """Every connection, with what is under way in it."""
        for writer, _ in self._connections:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, server = await asyncio.open_connection("127.0.0.1", self._to)
        for source, target in ((reader, server), (upstream, writer)):
            self._connections.append((target, asyncio.create_task(self._copy(source, target, self._stalled))))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stalled: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while not stalled.is_set() and (data := await reader.read(65536)):
                writer.write(data)
                await writer.drain()


async def delete_consumer(rig: NatsRig, partition: int) -> None:
    """Although a busy server says now and then that a folder of its own is in its way."""
    for _ in range(20):
        with contextlib.suppress(ServerError):
            with contextlib.suppress(NotFoundError):  # by the time before
                await rig.js.delete_consumer(f"IN{rig.at}", f"{rig.declared['group']}-{partition}")
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the consumer could not be deleted")


async def test_messages_that_another_client_takes_away_are_delivered_again_in_their_order(
    rig: NatsRig, tiny_model_path: Path, tiny_detector: Detector
) -> None:
    events = recorded(40, 3)
    async with service(rig, tiny_model_path, ack_seconds=30).running():
        await rig.put(*events[:60])
        await until(rig.drained)
        name = f"{rig.declared['group']}-0"
        thief = await rig.js.pull_subscribe_bind(durable=name, stream=f"IN{rig.at}")
        stealing = asyncio.create_task(thief.fetch(5, timeout=3))
        await asyncio.sleep(0.1)
        await rig.put(*events[60:])
        await asyncio.gather(stealing, return_exceptions=True)
        await until(rig.drained)
    assert in_order(each_once(await rig.results())) == await uninterrupted(tiny_detector, events)


async def test_a_message_that_leaves_no_room_for_a_reason_is_a_dead_letter_without_its_content(rig: NatsRig, tiny_model_path: Path) -> None:
    size = rig.client.max_payload - 16
    await rig.js.publish(rig.subjects[0].replace(">", "a"), b"x" * size)
    await rig.js.publish(rig.subjects[0].replace(">", "a"), b'{"stream_id": "behind", "values": {"value": 1}}')
    async with service(rig, tiny_model_path, fuse=1).running():
        await until(rig.drained)
    [letter] = await rig.dead()
    assert (letter["onset_field"], letter["onset_omitted_bytes"]) == ("payload", str(size))
    assert [result.stream_id for result in await rig.results()] == ["behind"]


async def test_what_the_publisher_asked_of_its_stream_is_not_asked_of_the_dead_letters(rig: NatsRig, tiny_model_path: Path) -> None:
    subject, stream = rig.subjects[0].replace(">", "a"), f"IN{rig.at}"
    asked = {"Nats-Expected-Stream": stream, "Nats-Msg-Id": "theirs", "nats-expected-last-sequence": "0", "sent": "by us"}
    async with service(rig, tiny_model_path, fuse=1).running():
        await rig.js.publish(subject, b"nonsense", headers=asked)
        await rig.put({"stream_id": "a", "values": {"value": 1.0}}, partition=0)
        await until(rig.drained)
    [letter] = await rig.dead()
    assert (letter["sent"], letter["onset_Nats-Expected-Stream"], "Nats-Expected-Stream" in letter) == ("by us", stream, False)
    assert [result.stream_id for result in await rig.results()] == ["a"]


async def test_results_that_no_stream_takes_are_waited_with_and_their_subject_is_told(rig: NatsRig, tiny_model_path: Path) -> None:
    output = f"nowhere{rig.at}.results"
    with capture_logs() as logs:
        async with service(rig, tiny_model_path, output=output).running():
            await rig.put({"stream_id": "a", "values": {"value": 1.0}})
            async with asyncio.timeout(60):
                while not (waits := [line["reason"] for line in logs if line["event"] == "source_waits"]):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert waits[0].startswith(f"No JetStream stream takes '{output}'")
            assert not await rig.drained()
            await rig.js.add_stream(name=f"LATE{rig.at}", subjects=[output])
            await until(rig.drained)


async def test_a_subject_that_the_named_stream_does_not_take_is_refused(rig: NatsRig, tiny_model_path: Path) -> None:
    with capture_logs() as logs:
        async with service(rig, tiny_model_path, stream=f"IN{rig.at}", subjects=["elsewhere.>"]).running(), asyncio.timeout(60):
            while not (refused := [line["reason"] for line in logs if line["event"] == "source_refused"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert refused[0] == f"JetStream stream 'IN{rig.at}' takes in{rig.at}.>, and so nothing of 'elsewhere.>'."


async def test_over_tls_and_not_where_the_server_does_not_ask_for_it(rig: NatsRig, tmp_path: Path) -> None:
    metrics = Metrics()
    with NatsServer(tmp_path / "secure", secure=True) as server:
        secure = NatsSource(name="secure", servers=[server.url], tls_ca=str(server.ca), subjects=["a"])
        plain = NatsSource(name="plain", servers=[rig.server.url.replace("nats:", "tls:")], subjects=["a"])
        sources = [Nats(secure, metrics), Nats(plain, metrics)]
        with capture_logs() as logs:
            for source in sources:
                await source.open()
            await until(lambda: metrics.registry.get_sample_value("onset_source_partitions", {"source": "secure"}) == 1)
            await until(lambda: any(entry["event"] == "nats_unavailable" for entry in logs))
            for source in sources:
                await source.close()
    [told] = [entry for entry in logs if entry["event"] == "nats_unavailable"]
    assert (told["source"], "TLS is declared and the server does not ask for it" in told["error"]) == ("plain", True)
    assert metrics.registry.get_sample_value("onset_source_partitions", {"source": "plain"}) is None


async def test_an_outage_is_told_with_each_of_its_reasons_and_its_end(tmp_path: Path) -> None:
    class Locked(NatsServer):
        locked = False

        def _command(self) -> Sequence[str]:
            return [*super()._command(), *(["--user", "somebody", "--pass", "else"] if self.locked else [])]

    metrics = Metrics()
    with Locked(tmp_path / "locked") as server, capture_logs() as logs:
        source = Nats(NatsSource(servers=[server.url], subjects=["a"], lease_seconds=1), metrics)
        await source.open()
        await until(lambda: metrics.registry.get_sample_value("onset_source_partitions", {"source": "nats"}) == 1)
        await asyncio.to_thread(server.kill)
        server.locked = True
        await asyncio.to_thread(server.start)
        await until(lambda: any("Authorization" in entry["error"] for entry in logs if entry["event"] == "nats_unavailable"))
        await asyncio.to_thread(server.kill)
        server.locked = False
        await asyncio.to_thread(server.start)
        await until(lambda: any(entry["event"] == "nats_connected" for entry in logs))
        await source.close()
    told = [entry["error"] for entry in logs if entry["event"] == "nats_unavailable"]
    assert len(told) == len(set(told))
    [connected] = [entry for entry in logs if entry["event"] == "nats_connected"]
    assert connected["server"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read \\(No such file or directory\\)"), ("nonsense", "are not what nsc writes")],
)
def test_credentials_that_cannot_be_used_stop_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", ModuleType("nkeys"))
    path = tmp_path / "onset.creds"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadSetting, match=says):
        Nats(NatsSource(servers=["nats://nats"], subjects=["a"], credentials=str(path)), Metrics())


def test_credentials_that_nothing_can_sign_with_name_what_is_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", None)
    source, store = NatsSource(servers=["nats://nats"], subjects=["a"], credentials="onset.creds"), MemoryStore(state_ttl=60, result_ttl=60)
    with pytest.raises(BadSetting, match=r"needs the extra 'nats': pip install 'onset\[nats\]' .*nkeys"):
        queue(source, "", store, Metrics())


@pytest.mark.parametrize(
    "elsewhere",
    [{"mirror": StreamSource("OTHER")}, {"sources": [StreamSource("OTHER")]}, {"subject_transform": SubjectTransform("raw.>", "plant.>")}],
)
def test_what_a_stream_takes_is_not_known_where_its_messages_are_another_streams_or_renamed(elsewhere: dict[str, Any]) -> None:
    assert subjects_of(StreamConfig(subjects=["raw.>"])) == ["raw.>"]
    assert subjects_of(StreamConfig(subjects=["raw.>"], **elsewhere)) == []  # renamed ones are read by the name they have in the stream


async def test_the_server_is_told_that_what_is_under_way_is_worked_on(rig: NatsRig) -> None:
    source = Nats(NatsSource.model_validate(rig.declared), Metrics())
    told: list[tuple[str, bytes]] = []

    async def hear(message: Msg) -> None:
        told.append((message.subject, message.data))

    await rig.client.subscribe("$JS.ACK.>", cb=hear)
    await source.open()
    await rig.put({"stream_id": "a", "values": {"value": 1.0}}, {"stream_id": "a", "values": {"value": 2.0}}, partition=0)
    batch = await source.receive()
    names = {message.id.decode() for message in batch.messages}
    await until(lambda: names <= {subject for subject, said in told if said == b"+WPI"})
    await source.close()


async def test_a_client_that_the_server_has_turned_out_for_good_is_made_anew(rig: NatsRig) -> None:
    source = Nats(NatsSource(**(rig.declared | {"subjects": rig.subjects[:1]})), Metrics())
    await source.open()
    for i in range(2):
        await rig.put({"stream_id": "a", "values": {"value": i}}, partition=0)
        async with asyncio.timeout(30):
            batch = await source.receive()
            assert [message.payload for message in batch.messages] == [content_of({"stream_id": "a", "values": {"value": i}})]
            await source.settle(batch, Settlement())
        await source.client.close()
    await source.close()


@pytest.mark.parametrize("ends", ["is cut", "falls silent"])
async def test_a_connection_that_ends_amid_results_leaves_none_out(rig: NatsRig, ends: str) -> None:
    relay = Relay(rig.server.port)
    async with relay.open() as url:
        metrics, declared = Metrics(), rig.declared | {"subjects": rig.subjects[:1], "servers": [url], "ack_seconds": 0.3}
        source = Nats(NatsSource(**declared), metrics)
        await source.open()
        await rig.put({"stream_id": "a", "values": {"value": 1}}, partition=0)
        batch = await source.receive()
        results = [Published("a", f"a-{i}", f"{i:04d}".encode() * 25_000) for i in range(300)]
        relay.stall()  # which is found out when the client holds more than the connection takes
        publishing = asyncio.create_task(source.publish(batch, results))
        async with asyncio.timeout(10):
            while not source.client.pending_data_size:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        if ends == "is cut":
            relay.cut()
        with pytest.raises(StoreUnavailable):
            await publishing
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await source.publish(batch, results)
                    break
                await asyncio.sleep(0.1)
        assert f"progress-{rig.subjects[0]}" in {task.get_name() for task in asyncio.all_tasks()}
        source.abandon(batch)
        await source.close()
    assert not metrics.registry.get_sample_value("onset_unexpected_errors_total")
    assert [int(content[:4]) for content in await rig.outputs()] == list(range(300))


async def received(source: Nats) -> list[Any]:
    """What comes until nothing more does, settled."""
    values = []
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(2):
                batch = await source.receive()
            values += [json.loads(message.payload or b"")["values"]["value"] for message in batch.messages]
            await source.settle(batch, Settlement())
    return values


async def test_a_group_that_begins_with_what_is_new_keeps_to_it_also_when_killed_while_it_makes_its_consumer_again(
    rig: NatsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*values: int) -> Any:
        return rig.put(*({"stream_id": "a", "values": {"value": value}} for value in values), partition=0)

    def source() -> Nats:
        return Nats(NatsSource(**(rig.declared | {"subjects": rig.subjects[:1], "start": "latest"})), Metrics())

    await put(1, 2)
    first = source()
    await first.open()
    assert await received(first) == []
    await put(3, 4)
    assert await received(first) == [3, 4]
    await put(5, 6)
    async with asyncio.timeout(10):
        first.abandon(await first.receive())  # they stay unacknowledged
        await first.close()

    died = asyncio.Event()

    async def never(js: Any, stream: str, config: ConsumerConfig, **more: Any) -> Any:
        if config.durable_name == rig.declared["group"]:
            died.set()
            await asyncio.Event().wait()
        return await add(js, stream, config, **more)

    add = JetStreamContext.add_consumer
    with monkeypatch.context() as patch:
        patch.setattr(JetStreamContext, "add_consumer", never)
        second = source()
        await second.open()
        async with asyncio.timeout(10):
            await died.wait()
        await second.close()
    third = source()
    await third.open()
    assert await received(third) == [5, 6]
    await third.close()
    names = {info.name for info in await rig.js.consumers_info(f"IN{rig.at}")}
    assert names == {rig.declared["group"]}


class Restored:
    """A NATS of its own that can come back with an older copy of its data."""

    def __init__(self, folder: Path) -> None:
        self.server, self._copy = NatsServer(folder / "nats"), folder / "copy"

    def keep(self) -> None:
        self.server.stop()
        shutil.copytree(self.server.folder, self._copy)
        self.server.start()

    async def restore(self, *sent: int) -> None:
        """With what was sent to the copy before it listens where the server did."""
        self.server.kill()
        shutil.rmtree(self.server.folder)
        shutil.copytree(self._copy, self.server.folder)
        elsewhere = NatsServer(self.server.folder)
        with elsewhere:
            await self.send(*sent, to=elsewhere)
            elsewhere.stop()
        self.server.start()

    async def send(self, *values: int, to: NatsServer | None = None) -> None:
        client = await (to or self.server).connect()
        for value in values:
            await client.jetstream().publish("plant.a", json.dumps({"values": {"value": value}}).encode())
        await client.close()


async def take(source: Nats, count: int) -> list[tuple[int, int]]:
    """Values of so many messages, settled, and the identity of the log that each is of."""
    taken: list[tuple[int, int]] = []
    async with asyncio.timeout(60):
        while len(taken) < count:
            batch = await source.receive()
            taken += [(json.loads(message.payload or b"")["values"]["value"], batch.source) for message in batch.messages]
            await source.settle(batch, Settlement())
    return taken


@pytest.mark.parametrize("first", [(), (10, 11, 12)])
async def test_a_stream_that_comes_back_without_its_last_messages_is_read_on_as_another_one(tmp_path: Path, first: Sequence[int]) -> None:
    restored = Restored(tmp_path)
    options = NatsSource(servers=[restored.server.url], subjects=["plant.>"], stream="PLANT", lease_seconds=1)
    with restored.server as server, capture_logs() as logs:
        client = await server.connect()
        await client.jetstream().add_stream(name="PLANT", subjects=["plant.>"])
        await client.close()
        source = Nats(options, Metrics())
        await source.open()
        await restored.send(1, 2)
        [(_, old), _] = await take(source, 2)
        restored.keep()
        await restored.send(3, 4)
        assert await take(source, 2) == [(3, old), (4, old)]
        await restored.restore(*first)  # so that its numbers end before what was acknowledged, or after it
        await restored.send(20, 21)
        sent = [*first, 20, 21]
        taken = await take(source, len(sent))
        assert [value for value, _ in taken] == sent
        assert old not in (new := {identity for _, identity in taken})
        await source.close()
        successor = Nats(options, Metrics())
        await successor.open()
        await restored.send(22)
        [(value, its)] = await take(successor, 1)
        assert (value, {its}) == (22, new)
        await successor.close()
    [told] = [line for line in logs if line["event"] == "nats_stream_replaced"]
    assert (told["reads_on_at"], "was acknowledged" in told["reason"]) == (3, True)


async def test_a_group_that_begins_with_what_is_new_keeps_to_it_also_when_the_server_restarts_before_anything_came(tmp_path: Path) -> None:
    restored = Restored(tmp_path)
    options = NatsSource(servers=[restored.server.url], subjects=["plant.>"], stream="PLANT", lease_seconds=1, start="latest")
    with restored.server as server:
        client = await server.connect()
        await client.jetstream().add_stream(name="PLANT", subjects=["plant.>"])
        await client.close()
        await restored.send(1, 2)
        source = Nats(options, Metrics())
        await source.open()
        await until(lambda: any(partition._next for partition in source._partitions.owned))
        server.stop()
        server.start()
        await restored.send(3)
        taken = await take(source, 1)
        await source.close()
    assert [value for value, _ in taken] == [3]


async def test_of_a_stream_that_comes_back_without_the_consumer_nothing_new_is_left_out(tmp_path: Path) -> None:
    restored = Restored(tmp_path)
    options = NatsSource(servers=[restored.server.url], subjects=["plant.>"], stream="PLANT", lease_seconds=1)
    with restored.server as server:
        client = await server.connect()
        await client.jetstream().add_stream(name="PLANT", subjects=["plant.>"])
        await client.close()
        restored.keep()
        source = Nats(options, Metrics())
        await source.open()
        await restored.send(1, 2)
        [(_, old), _] = await take(source, 2)
        await restored.restore(10, 11, 12)
        taken = await take(source, 3)
        await source.close()
    assert [value for value, _ in taken] == [10, 11, 12]
    assert old not in {identity for _, identity in taken}


async def test_who_read_a_stream_that_comes_back_reads_it_on_although_another_replica_was_there_before(tmp_path: Path) -> None:
    """The leases are gone with the server; the other one could not know that it gives numbers again."""
    restored = Restored(tmp_path)
    options = NatsSource(servers=[restored.server.url], subjects=["plant.>"], stream="PLANT", lease_seconds=8)
    with restored.server as server, capture_logs() as logs:
        client = await server.connect()
        await client.jetstream().add_stream(name="PLANT", subjects=["plant.>"])
        await client.close()
        reader, other = Nats(options, Metrics()), Nats(options, Metrics())
        reader.member, other.member = "first", "second"
        await reader.open()
        await restored.send(1, 2)
        [(_, old), _] = await take(reader, 2)
        await other.open()
        await until(lambda: other._leases is not None)
        restored.keep()
        await restored.send(3, 4)
        await take(reader, 2)
        may_connect, connect = asyncio.Event(), reader._connect

        async def last() -> None:
            await may_connect.wait()
            await connect()

        reader._connect = last  # type: ignore[method-assign]
        await restored.restore(10, 11, 12)
        attends = Attends(other)
        await attends.once.wait()
        may_connect.set()
        taken = await take(reader, 3)
        await other.close()
        await reader.close()
    assert [value for value, _ in taken] == [10, 11, 12]
    assert old not in {identity for _, identity in taken}
    assert [line for line in logs if line["event"] == "nats_stream_replaced"]


class Attends:
    """`once` is set when the source has shared out what is there, again."""

    def __init__(self, source: Nats) -> None:
        self.once, self._share = asyncio.Event(), source._share
        source._share = self._attend  # type: ignore[method-assign]

    async def _attend(self) -> None:
        await self._share()
        self.once.set()


@pytest.mark.parametrize("start", ["earliest", "latest"])
async def test_a_stream_that_is_made_again_while_it_is_read_is_read_from_its_beginning(rig: NatsRig, start: Any) -> None:
    source = Nats(NatsSource(**(rig.declared | {"subjects": rig.subjects[:1], "start": start})), Metrics())

    async def consumes() -> bool:
        return bool(await rig.js.consumers_info(f"IN{rig.at}"))

    with capture_logs() as logs:
        await source.open()
        await until(consumes)
        await rig.put(*({"stream_id": "a", "values": {"value": value}} for value in (1, 2, 3)), partition=0)
        [(_, old), *_] = await take(source, 3)
        await rig.js.delete_stream(f"IN{rig.at}")
        await rig.js.add_stream(name=f"IN{rig.at}", subjects=[f"in{rig.at}.>"])
        await rig.put(*({"stream_id": "a", "values": {"value": value}} for value in (4, 5)), partition=0)
        taken = await take(source, 2)
        await source.close()
    assert [value for value, _ in taken] == [4, 5]
    assert old not in {identity for _, identity in taken}
    [told] = [line for line in logs if line["event"] == "nats_stream_replaced"]
    assert told["reason"].startswith("It was deleted and made again")


async def test_a_consumer_that_is_deleted_is_made_again_where_it_was(rig: NatsRig, tiny_model_path: Path, tiny_detector: Detector) -> None:
    events = recorded(40, 3)
    async with service(rig, tiny_model_path).running() as running:
        await rig.put(*events[:60])
        await until(rig.drained)
        for p in range(3):
            await delete_consumer(rig, p)
        await rig.put(*events[60:])
        await until(rig.drained)
        duplicates = running.metrics.registry.get_sample_value("onset_events_total", {"door": "nats", "outcome": "duplicate"})
    assert in_order(await rig.results()) == await uninterrupted(tiny_detector, events)
    assert not duplicates


async def test_a_consumer_of_something_else_is_left_alone_and_told(
    rig: NatsRig, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{rig.declared['group']}-1"
    await rig.js.add_consumer(f"IN{rig.at}", ConsumerConfig(durable_name=name, filter_subject=f"in{rig.at}.other"))
    said = ""
    async with service(rig, tiny_model_path).running():
        async with asyncio.timeout(20):
            while "source_refused" not in said:
                await asyncio.sleep(0.05)
                said += "".join(capsys.readouterr())
    assert f"has filter_subject 'in{rig.at}.other'" in said
    assert (await rig.js.consumer_info(f"IN{rig.at}", name)).config.filter_subject == f"in{rig.at}.other"


async def test_a_result_that_is_published_again_is_dropped_by_the_server(rig: NatsRig, tiny_model_path: Path) -> None:
    events = recorded(5, 3)
    async with service(rig, tiny_model_path).running():
        await rig.put(*events)
        await until(rig.drained)
    before = await rig.results()
    for p in range(3):  # as if nothing had been acknowledged
        await delete_consumer(rig, p)
    async with service(rig, tiny_model_path).running() as second:
        await until(rig.drained)
        duplicates = second.metrics.registry.get_sample_value("onset_events_total", {"door": "nats", "outcome": "duplicate"})
    assert duplicates == 15
    assert await rig.results() == before


async def test_an_answer_about_a_consumer_that_is_just_being_deleted_is_none() -> None:
    async def answered() -> Any:
        return ConsumerInfo.from_response({"type": "io.nats.jetstream.api.v1.consumer_info_response"})  # as a server sent it

    with pytest.raises(NatsError, match="lacks what it should tell"):
        await _whole(answered())
