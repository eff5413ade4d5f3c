"""Kafka, by confluent-kafka: offsets are committed after the states, positions in the states tell what is delivered again.

    reader (a thread, owns the client)             event loop
    poll ─► each partition's waiting messages ───► a batch of a partition that has none under way ─► publish ─► settle
     │ full: pause   room again: resume                                                               sender       │
     ├ commit ◄──────────────── offset behind the last settled batch ◄─────────────────────────────────────────────┘
     ├ assigned: committed offset and incarnation ─► partition is ours
     ├ revoked:  no new batch, wait for the one under way, commit, let go (cooperative: the other partitions go on)
     ├ lost:     what is under way is Fenced
     └ nothing there any more: told, and on from the first message that is left
    sender (event loop)   idempotent producer, acks=all: results and dead letters are at the brokers before an offset moves

A replica that was taken for dead and goes on can do no harm: whoever has the partition next steps the same events against the same
states, where compare-and-set lets one of them write and the position makes the other's a duplicate; its offsets are refused by the group.

A position is only good as long as the partition's log is the same one. A group without a committed offset begins an *incarnation*, kept as
the metadata of its offsets and part of the partition's identity: a topic that was deleted and made again is not taken for the old one,
nor is a log that ends before the group's offset (a leader was elected that had not all of it).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

import structlog
from confluent_kafka import (
    OFFSET_INVALID,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
    admin,
)
from confluent_kafka import Message as Record

from service import tasks
from service.errors import BadSetting, StoreUnavailable
from service.events import Published
from service.metrics import Metrics
from service.sources import Batch, Letter, Message, Settlement, identity
from service.sources.options import KafkaSource
from service.sources.partitions import HANDOVER_SECONDS, Partition, Partitions

POLL_SECONDS = 0.05
READ = 500
"""Messages taken from the client at once."""
COMMIT_SECONDS = 0.2
ANSWER_SECONDS = 5.0
"""Of a request to the brokers."""
DELIVERY_SECONDS = 10.0
REPORT_SECONDS = 0.001
"""Between two looks for reports while some are awaited."""
BACKOFF_SECONDS = 1.0
_GONE = (KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION)
"""What is said where an offset is not there any more."""
_PRODUCER_ONLY = ("linger.ms", "compression.type", "compression.codec", "batch.size", "message.max.bytes", "queue.buffering.")
_CONSUMER_ONLY = (
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "max.poll.interval.ms",
    "fetch.",
    "queued.",
    "isolation.level",
    "group.",
    "check.crcs",
)

log = structlog.get_logger(__name__)
_library = logging.getLogger("librdkafka")


class Outgoing(NamedTuple):
    """A record to be produced."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, str | bytes | None]]


class _Partition(Partition):
    """One partition while it is ours. The reader adds what waits, the event loop takes it."""

    def __init__(self, topic: str, index: int, start: int, incarnation: str) -> None:
        """`start` is the offset of the first message that is not done."""
        super().__init__(f"{topic}-{index}", identity(f"kafka\0{topic}\0{index}\0{incarnation}"), start - 1)
        self.topic, self.index, self.incarnation = topic, index, incarnation
        self.committed = self.settled
        self.paused = False

    @property
    def key(self) -> tuple[str, int]:
        return self.topic, self.index

    @property
    def place(self) -> TopicPartition:
        """As it is committed."""
        return TopicPartition(self.topic, self.index, self.settled + 1, self.incarnation)


class Kafka:
    """Implements Source. Raises BadSetting where librdkafka does not take the options. `clock` gives seconds since 1970."""

    def __init__(self, options: KafkaSource, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self.name = options.called
        self.publishes = bool(options.output)
        self._options, self._metrics, self._clock = options, metrics, clock
        self._partitions: Partitions[_Partition] = Partitions(self.name, metrics, options.batch)
        self._reader: _Reader | None = None
        self._sender: _Sender | None = None
        self._admin: admin.AdminClient | None = None
        self._check()

    async def open(self) -> None:
        producing, shared, consuming = self._configs()
        self._sender = _Sender(producing, asyncio.get_running_loop(), self.bug)
        self._admin = admin.AdminClient(shared)
        self._reader = _Reader(self, self._options, consuming, asyncio.get_running_loop())
        self._sender.start()
        self._reader.start()

    async def receive(self) -> Batch:
        return await self._partitions.receive()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        self._partitions.ours(batch)
        await self._send([_outgoing(self._options.output, result) for result in results])

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        self._partitions.ours(batch)
        if settlement.letters:
            await self._send([_letter(self._options.dead_letters, batch, letter) for letter in settlement.letters])
        self._partitions.settle(batch)

    def abandon(self, batch: Batch) -> None:
        self._partitions.abandon(batch)

    async def lag(self) -> int | None:
        owned = self._partitions.owned
        if not owned or self._admin is None:
            return 0
        latest: Any = admin.OffsetSpec.latest()  # type: ignore[attr-defined, no-untyped-call]
        places = {TopicPartition(partition.topic, partition.index): latest for partition in owned}
        try:
            asked = self._admin.list_offsets(places, request_timeout=ANSWER_SECONDS)
            ends = {(place.topic, place.partition): (await asyncio.wrap_future(answer)).offset for place, answer in asked.items()}
        except KafkaException as error:
            raise _unavailable(error) from error
        left = [int(ends[partition.key]) - partition.settled - 1 for partition in owned if partition.key in ends]
        return sum(max(0, count) for count in left)

    async def close(self) -> None:
        if self._reader is not None:
            await self._reader.end()
        if self._sender is not None:
            await self._sender.end()

    def _configs(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Of the producer, the admin client and the consumer."""
        common: dict[str, Any] = {"bootstrap.servers": self._options.brokers, "client.id": self.name, "logger": _library, "log_level": 2}
        given = self._options.options
        shared = {name: value for name, value in given.items() if not name.startswith((*_PRODUCER_ONLY, *_CONSUMER_ONLY))}
        return common | _producing(given) | shared, common | shared, common | _consuming(given, self._options) | shared

    def _check(self) -> None:
        """Have librdkafka look at the options, by clients that are never used. Raises BadSetting."""
        producing, shared, consuming = self._configs()
        try:
            Producer(producing)
            admin.AdminClient(shared)
            Consumer(consuming).close()
        except (KafkaException, TypeError, ValueError) as error:
            raise BadSetting(f"Source '{self.name}': librdkafka does not take these options: {_reason(error)}.") from error

    # ── what the reader tells, in the event loop ────────────────────────────────────────────────────────────────────────────────

    def assigned(self, partitions: Sequence[_Partition]) -> None:
        self._partitions.own(partitions)

    def arrived(self, partitions: Iterable[_Partition]) -> None:
        for partition in partitions:
            self._partitions.offer(partition)

    async def hand_over(self, partitions: Sequence[_Partition]) -> None:
        await self._partitions.release(partitions)

    def lost(self, partitions: Sequence[_Partition]) -> None:
        self._partitions.lose(partitions)

    def gone(self, partition: _Partition, wanted: int, first: int) -> None:
        """What was to be read next is not there any more; from `first` on it is."""
        self._metrics.source_lost.labels(self.name).inc(max(0, first - wanted))
        log.error("kafka_offset_gone", source=self.name, partition=partition.name, offset=wanted, reads_on_at=first)
        if partition.batch is None and not partition.waiting:
            partition.settled = max(partition.settled, first - 1)

    async def _send(self, records: Sequence[Outgoing]) -> None:
        if self._sender is None:
            raise RuntimeError("A source that is not open has a batch: this is a bug.")
        await self._sender.send(records)

    # ── for the reader, in its thread ───────────────────────────────────────────────────────────────────────────────────────────

    def message(self, record: Record) -> Message:
        """As the consumer takes it."""
        offset, key, headers = record.offset() or 0, record.key(), record.headers()
        kind, ms = record.timestamp()
        return Message(
            b"%d" % offset,
            offset,
            ms / 1000 if kind != TIMESTAMP_NOT_AVAILABLE else self._clock(),
            _bytes(record.value()),
            {name.encode(): _bytes(value) for name, value in _pairs(headers)} if headers else {},
            None if key is None else _bytes(key).decode(errors="surrogateescape"),
            record.topic() or "",
        )

    def bug(self, error: Exception) -> None:
        self._metrics.bug(error, source=self.name)


class _Reader:
    """The thread that owns the consumer."""

    def __init__(self, source: Kafka, options: KafkaSource, config: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        """Raises what librdkafka says of its options."""
        self._source, self._options, self._loop = source, options, loop
        self._config = config | {"on_commit": self._on_commit, "error_cb": self._on_error}
        self._consumer: Consumer | None = Consumer(self._config)
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._stopping = threading.Event()
        self._commit_at = 0.0
        self._said: set[int] = set()
        self._why = ""
        """What the client last said of a broker."""
        self._raised: Exception | None = None
        """By a callback: what passes through the client comes out as no exception that can be caught."""
        self._thread = threading.Thread(target=self._run, name=f"kafka-{source.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def end(self) -> None:
        """Commit, leave the group; where the brokers do not answer the client waits for the session to end (45 s), and we do not."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, ANSWER_SECONDS)
        if self._thread.is_alive():
            detail = "The brokers do not answer that we leave: others have our partitions when the session times out."
            log.warning("kafka_unavailable", source=self._source.name, error=detail)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._read()
            except KafkaException as error:
                log.warning("kafka_unavailable", source=self._source.name, error=_reason(error))
            except Exception as error:  # a bug must not end the thread for good; it is counted and logged
                self._tell(self._source.bug, error)
            self._stopping.wait(BACKOFF_SECONDS)

    def _read(self) -> None:
        """Until the source is closed. Raises KafkaException."""
        consumer, self._consumer = self._consumer or Consumer(self._config), None
        self._raised = None
        try:
            consumer.subscribe(
                list(self._options.topics),
                on_assign=self._guarded(self._on_assign),
                on_revoke=self._guarded(self._on_revoke),
                on_lost=self._guarded(self._on_lost),
            )
            while not self._stopping.is_set():
                record = consumer.poll(POLL_SECONDS)
                if self._raised is not None:
                    raise self._raised
                if record is not None:
                    self._take(consumer, [record, *consumer.consume(READ, 0)])
                self._flow(consumer)
                self._commit(consumer)
        finally:
            consumer.close()  # calls on_revoke for what is ours
            if self._partitions:
                self._on_lost(consumer, [])

    def _guarded(self, callback: Callable[[Consumer, list[TopicPartition]], None]) -> Callable[[Consumer, list[TopicPartition]], None]:
        def call(consumer: Consumer, places: list[TopicPartition]) -> None:
            try:
                callback(consumer, places)
            except Exception as error:
                self._raised = error

        return call

    def _take(self, consumer: Consumer, records: Sequence[Record]) -> None:
        touched: dict[tuple[str, int], _Partition] = {}
        for record in records:
            key = (record.topic() or "", record.partition() or 0)
            if (error := record.error()) is not None:
                if error.code() in _GONE:
                    self._on_gone(consumer, key, truncated=error.code() == KafkaError._LOG_TRUNCATION)
                else:
                    self._failed(error)
                continue
            partition = self._partitions.get(key)
            if partition is not None:
                partition.add(self._source.message(record))
                touched[key] = partition
        if touched:
            self._tell(self._source.arrived, list(touched.values()))

    def _on_gone(self, consumer: Consumer, key: tuple[str, int], *, truncated: bool) -> None:
        """The brokers have nothing at the offset that comes next: it was deleted, or the log is another one. Raises KafkaException."""
        partition = self._partitions.get(key)
        if partition is None:
            return
        [position] = consumer.position([partition.place])
        wanted = position.offset if position.offset >= 0 else partition.settled + 1
        low, high = consumer.get_watermark_offsets(TopicPartition(*key), ANSWER_SECONDS)
        first = low
        consumer.incremental_unassign([partition.place])
        if truncated or wanted > high:
            del self._partitions[key]
            self._wait(self._source.hand_over([partition]))
            partition = self._partitions[key] = self._new(consumer, *key)
            self._tell(self._source.assigned, [partition])
            first = partition.settled + 1
        consumer.incremental_assign([TopicPartition(*key, first)])
        partition.paused = False
        self._tell(self._source.gone, partition, wanted, first)

    def _failed(self, error: KafkaError) -> None:
        """Raises KafkaException where the client is of no use any more."""
        if error.fatal():
            raise KafkaException(error)
        if error.code() not in self._said:  # once each: librdkafka goes on by itself
            self._said.add(error.code())
            log.warning("kafka_error", source=self._source.name, error=error.str())

    def _on_error(self, error: KafkaError) -> None:
        """Many times a second while a broker is gone; librdkafka tries again by itself. Told where none is left, every 10 s."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._why = error.str()
            return
        log.warning("kafka_unavailable", source=self._source.name, error=self._why or error.str())
        self._why = ""

    def _flow(self, consumer: Consumer) -> None:
        """Pause the partitions that have enough waiting, resume those that have not."""
        for partition in self._partitions.values():
            if not partition.paused and partition.full(self._options.batch):
                consumer.pause([partition.place])
                partition.paused = True
            elif partition.paused and partition.low(self._options.batch):
                consumer.resume([partition.place])
                partition.paused = False

    def _commit(self, consumer: Consumer) -> None:
        """What has been settled since, from time to time."""
        if (now := time.monotonic()) < self._commit_at:
            return
        self._commit_at = now + COMMIT_SECONDS
        if moved := self._moved(self._partitions.values()):
            consumer.commit(offsets=moved, asynchronous=True)

    def _moved(self, partitions: Iterable[_Partition]) -> list[TopicPartition]:
        moved = []
        for partition in partitions:
            place = partition.place
            if place.offset - 1 != partition.committed:
                partition.committed = place.offset - 1
                moved.append(place)
        return moved

    def _on_commit(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        for place in places:
            failed = error or place.error
            if failed is not None and failed.code() != KafkaError._NO_OFFSET:
                log.warning(
                    "kafka_commit_failed", source=self._source.name, partition=f"{place.topic}-{place.partition}", error=failed.str()
                )
                if partition := self._partitions.get((place.topic, place.partition)):
                    partition.committed = OFFSET_INVALID  # again, unless it is not ours any more

    def _on_assign(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        partitions = [self._begun(consumer, place) for place in (consumer.committed(places, ANSWER_SECONDS) if places else [])]
        self._partitions |= {partition.key: partition for partition in partitions}
        if partitions:
            self._tell(self._source.assigned, partitions)
        consumer.incremental_assign([partition.place for partition in partitions])

    def _begun(self, consumer: Consumer, place: TopicPartition) -> _Partition:
        """A partition from where its group is; where it is nowhere, a new incarnation begins. Raises KafkaException."""
        if place.error is not None:
            raise KafkaException(place.error)
        if place.offset >= 0:
            return _Partition(place.topic, place.partition, place.offset, place.metadata or "")
        return self._new(consumer, place.topic, place.partition)

    def _new(self, consumer: Consumer, topic: str, index: int) -> _Partition:
        """The beginning of an incarnation. Raises KafkaException."""
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, index), ANSWER_SECONDS)
        partition = _Partition(topic, index, low if self._options.start == "earliest" else high, f"onset-{time.time_ns():x}")
        consumer.commit(offsets=[partition.place], asynchronous=False)
        return partition

    def _on_revoke(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        partitions = self._dropped(places)
        if partitions:
            self._wait(self._source.hand_over(partitions))
            if moved := self._moved(partitions):
                try:
                    consumer.commit(offsets=moved, asynchronous=False)
                except KafkaException as error:  # then it is delivered again, and known by its positions
                    log.warning("kafka_commit_failed", source=self._source.name, error=_reason(error))
        consumer.incremental_unassign(places)

    def _on_lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        partitions = self._dropped(places) if places else [self._partitions.pop(key) for key in list(self._partitions)]
        if partitions:
            self._tell(self._source.lost, partitions)
        if places:
            consumer.incremental_unassign(places)

    def _dropped(self, places: list[TopicPartition]) -> list[_Partition]:
        keys = [(place.topic, place.partition) for place in places]
        return [self._partitions.pop(key) for key in keys if key in self._partitions]

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def _wait(self, coroutine: Any) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        with contextlib.suppress(TimeoutError):
            done.result(HANDOVER_SECONDS + ANSWER_SECONDS)


class _Sender:
    """The producer, served by the event loop, which so learns what became of its records.

    Not by a thread: librdkafka's client takes and gives up the interpreter for each record's report, and a thread would wait for it up
    to 5 ms each time as long as the loop is at work.
    """

    def __init__(self, config: dict[str, Any], loop: asyncio.AbstractEventLoop, bug: Callable[[Exception], None]) -> None:
        """Raises what librdkafka says of its options."""
        self._config = config | {"error_cb": self._on_error}
        self._loop, self._bug = loop, bug
        self._producer = Producer(self._config)
        self._broken: list[Producer] = []
        """By their own account of no use any more; until all is told of what they had."""
        self._under_way = 0
        """Calls of `send`."""
        self._sending = asyncio.Event()
        self._server: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._server = asyncio.create_task(self._serve(), name="kafka-sender")

    async def end(self) -> None:
        if self._server is not None:
            await tasks.end(self._server)
        await asyncio.to_thread(self._producer.flush, ANSWER_SECONDS)

    async def send(self, records: Sequence[Outgoing]) -> None:
        """All of them are at the brokers when it returns. Raises StoreUnavailable: some may be."""
        done: asyncio.Future[KafkaError | None] = self._loop.create_future()
        told = self._told(len(records), done)
        self._under_way += 1
        self._sending.set()
        try:
            for record in records:
                while not self._produced(record, told):  # noqa: ASYNC110 - as many are on their way as may be
                    await asyncio.sleep(POLL_SECONDS)
            error = await done
        finally:
            self._under_way -= 1
        if error is not None:
            raise StoreUnavailable(f"Kafka did not take all records for '{records[0].topic}' ({error.str()}).")

    def _produced(self, record: Outgoing, told: Callable[[KafkaError | None, Record], None]) -> bool:
        """Whether there was room for it. Raises StoreUnavailable."""
        topic, value, key, headers = record
        try:
            self._producer.produce(topic, value, key, on_delivery=told, headers=headers)
        except BufferError:
            return False
        except KafkaException as error:
            if error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE or value is None:
                raise _unavailable(error) from error
            log.error("record_too_large", topic=topic, bytes=len(value))
            return self._produced(Outgoing(topic, None, key, [*headers, ("onset_omitted_bytes", b"%d" % len(value))]), told)
        return True

    def _told(self, left: int, done: asyncio.Future[KafkaError | None]) -> Callable[[KafkaError | None, Record], None]:
        """To be told of `left` records; then `done` has the last error."""
        last: KafkaError | None = None

        def told(error: KafkaError | None, record: Record) -> None:
            nonlocal left, last
            left -= 1
            last = error or last
            if left == 0 and not done.done():
                done.set_result(last)

        return told

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            log.error("kafka_producer_failed", error=error.str())
            self._broken.append(self._producer)

    async def _serve(self) -> None:
        while True:
            try:
                self._poll()
            except Exception as error:  # a bug must not end this for good; it is counted and logged
                self._bug(error)
            if self._under_way:
                await asyncio.sleep(REPORT_SECONDS)
                continue
            self._sending.clear()
            with contextlib.suppress(TimeoutError):  # what the client has to say of itself
                await asyncio.wait_for(self._sending.wait(), BACKOFF_SECONDS)

    def _poll(self) -> None:
        """Hear what the client has to tell. What a broken one had under way is sent again, by a new one."""
        self._producer.poll(0)
        if self._producer in self._broken:
            self._producer.purge()
            self._producer = Producer(self._config)
        for broken in self._broken:
            broken.poll(0)
        self._broken = [broken for broken in self._broken if len(broken)]


def _consuming(given: dict[str, Any], options: KafkaSource) -> dict[str, Any]:
    return {
        "group.id": options.group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",  # a group's beginning is ours to choose, and what is deleted unread is told
        "partition.assignment.strategy": "cooperative-sticky",
        "queued.max.messages.kbytes": 16_384,
        **{name: value for name, value in given.items() if name.startswith(_CONSUMER_ONLY)},
    }


def _producing(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 1,
        "delivery.timeout.ms": round(1000 * DELIVERY_SECONDS),
        "message.max.bytes": 10_000_000,
        **{name: value for name, value in given.items() if name.startswith(_PRODUCER_ONLY)},
    }


def _outgoing(topic: str, result: Published) -> Outgoing:
    return Outgoing(topic, result.content, result.stream_id.encode(), [("onset_id", result.id.encode())])


def _letter(topic: str, batch: Batch, letter: Letter) -> Outgoing:
    message = letter.message
    about = letter.about | {"topic": message.topic}
    about |= {"partition": batch.partition.rpartition("-")[2], "offset": str(message.position)}
    headers: list[tuple[str, str | bytes | None]] = [(name.decode(), value) for name, value in message.headers.items()]
    headers += [(f"onset_{name}", value.encode()) for name, value in about.items()]
    return Outgoing(topic, message.payload, None if message.key is None else message.key.encode(errors="surrogateescape"), headers)


def _pairs(headers: Any) -> list[tuple[str, bytes | None]]:
    """As the consumer gives them, whatever its annotations say."""
    return cast("list[tuple[str, bytes | None]]", headers)


def _bytes(value: bytes | str | None) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""


def _reason(error: Exception) -> str:
    first = error.args[0] if error.args else error
    return first.str() if isinstance(first, KafkaError) else str(first)


def _unavailable(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"Kafka does not answer ({_reason(error)}).")
