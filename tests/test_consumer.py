"""The queue door by itself: what an entry may hold, the fuse, and that a bug or a lost race stops neither the queue nor its order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
import structlog

from service.bodies import Items, from_fields
from service.consumer import BUG_ATTEMPTS, FUSE_ENTRIES, FUSE_WINDOW, Consumer, Fuse
from service.detector import Detector
from service.errors import BadEvent, Fenced, ItemError, StoreUnavailable, Superseded
from service.events import Delivery, Event, Lease, Published, Result
from service.mapping import Mapper
from service.metrics import Metrics
from service.policy import Policy
from service.rounds import Kind
from service.scorer import Limits, Scorer
from service.sources import Batch, Message, Settlement
from service.sources.options import Payload
from service.stores.memory import MemoryStore

MAPPER = Mapper(Payload(), max_events=100)


def test_a_flat_entry_is_an_event_and_what_is_no_field_of_one_is_a_feature() -> None:
    event = from_fields({b"stream_id": b"a", b"timestamp": b"1.5", b"sequence": b"7", b"value": b"2", b"other": b"", b"third": b"null"})
    assert event == Event(stream_id="a", timestamp=1.5, sequence=7, values={"value": 2, "other": None, "third": None})
    assert from_fields({b"stream_id": b"a", b"timestamp": b"2026-11-23T08:00:00Z", b"event_id": b"12"}) == Event(
        stream_id="a", timestamp="2026-11-23T08:00:00Z", event_id="12"
    )


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({b"value": b"hot"}, "values.value", '"hot"'),
        ({b"value": b"nan"}, "values.value", "NaN"),
        ({b"sequence": b"first"}, "sequence", '"first"'),
        ({b"sequence": b"-1"}, "sequence", "-1"),
        ({b"stream_id": b""}, "stream_id", '""'),
        ({b"value": b"\xff"}, "value", ""),
    ],
)
def test_what_is_wrong_with_a_flat_entry_is_named(fields: dict[bytes, bytes], field: str, value: str) -> None:
    with pytest.raises(BadEvent) as caught:
        from_fields({b"stream_id": b"a"} | fields)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_the_fuse_blows_on_a_share_of_recent_entries_and_not_on_a_few() -> None:
    fuse = Fuse(0.5)
    assert fuse.passes("p", FUSE_ENTRIES - 1, FUSE_ENTRIES - 1), "too few to judge by"
    assert not fuse.passes("p", 10, 10)
    assert not fuse.passes("p", 10, 10)
    assert fuse.passes("q", 200, 0), "a partition without bad entries goes on"
    assert fuse.passes("p", 10, 10), "the good entries of others have made the share small"
    assert Fuse(0.5).passes("p", 2 * FUSE_ENTRIES, FUSE_ENTRIES), "as many as may be"


def test_a_partition_that_waits_is_not_let_go_because_few_entries_are_left() -> None:
    fuse = Fuse(0.5)
    assert not fuse.passes("p", 1000, 600)
    assert not fuse.passes("p", 50, 50)
    assert fuse.passes("p", 40, 0)
    assert fuse.passes("p", 50, 50), "it is an ordinary partition again"


def test_the_fuse_forgets_what_is_long_past() -> None:
    fuse = Fuse(0.5)
    for _ in range(10):
        assert fuse.passes("p", FUSE_WINDOW, 0)
    assert not fuse.passes("p", FUSE_WINDOW + 1, FUSE_WINDOW + 1)


class Line:
    """A source of our own: one partition outside the store, in memory."""

    name = "line"
    publishes = True

    def __init__(self, source: int = 7) -> None:
        self.source = source
        self.position = 0
        self.published: list[Published] = []
        self.publish_failures: list[Exception] = []
        self.waiting: asyncio.Queue[Batch] = asyncio.Queue()
        self.settled: list[tuple[Batch, Settlement]] = []
        self.abandoned: list[Batch] = []
        self.failures: list[Exception] = []
        self.closed = False

    async def open(self) -> None: ...

    async def receive(self) -> Batch:
        return await self.waiting.get()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        if self.publish_failures:
            raise self.publish_failures.pop(0)
        self.published += results

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.settled.append((batch, settlement))

    def abandon(self, batch: Batch) -> None:
        self.abandoned.append(batch)

    async def lag(self) -> int | None:
        return None

    async def close(self) -> None:
        self.closed = True

    def put(self, *contents: Any, lease: Lease | None = None) -> Batch:
        messages = []
        for i, content in enumerate(contents):
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            messages.append(Message(b"%d" % i, self.position, 1.7e9 + self.position, payload))
            self.position += 1
        batch = Batch("line-0", self.source, messages, lease)
        self.waiting.put_nowait(batch)
        return batch

    def results(self) -> list[tuple[str, int, bool]]:
        results = [msgspec.json.decode(published.content, type=Result) for published in self.published]
        return [(result.stream_id, result.state_version, result.duplicate) for result in results]

    async def until(self, count: int, what: Sequence[Any]) -> None:
        async with asyncio.timeout(30):
            while len(what) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


class Trying(Scorer):
    """Loses some races before it wins them, and has a bug that one value brings out."""

    conflicts = 0
    superseded = False
    no_memory = 0
    """How often there is none."""
    entries: tuple[bytes, ...] = ()
    """Of the deliveries that came last: what their commit is to acknowledge."""

    async def consume(
        self, deliveries: Sequence[Delivery], sender: str = "", *, replies: bool = False
    ) -> tuple[list[Kind | ItemError], list[Published]]:
        self.entries = tuple(delivery.entry for delivery in deliveries)
        if self.superseded:
            raise Superseded("Another file of the model is in force.")
        if self.no_memory:
            self.no_memory -= 1
            raise RuntimeError("can't start new thread") if self.no_memory % 2 else MemoryError
        if any(delivery.event.values == {"value": 13.0} for delivery in deliveries):
            raise ZeroDivisionError("a bug")
        if self.conflicts:
            self.conflicts -= 1
            lost = [delivery for delivery in deliveries if delivery.event.stream_id == "hot"]
            kept = [delivery for delivery in deliveries if delivery not in lost]
            kinds, results = await super().consume(kept, sender, replies=replies)
            rest = iter(kinds)
            return [Kind.CONFLICT if delivery in lost else next(rest) for delivery in deliveries], results
        return await super().consume(deliveries, sender, replies=replies)


@pytest.fixture
async def scorer(tiny_detector: Detector) -> AsyncIterator[Trying]:
    scorer = Trying(tiny_detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), Metrics(), Limits())
    scorer.start()
    yield scorer
    await scorer.drain(1)


@pytest.fixture
async def line(scorer: Trying) -> AsyncIterator[Line]:
    line = Line()
    consumer = Consumer(line, scorer, Metrics(), MAPPER, fuse=0.9, fuse_seconds=0.05)
    await consumer.start()
    yield line
    await consumer.stop(5)
    assert line.closed


def event(value: float, stream: str = "a") -> dict[str, Any]:
    return {"stream_id": stream, "values": {"value": value}}


async def test_a_queue_outside_the_store_is_acknowledged_after_its_commits(line: Line, scorer: Trying) -> None:
    line.put(event(1), event(2), [event(3), event(4)], b"nonsense")
    await line.until(1, line.settled)
    [(batch, settlement)] = line.settled
    assert len(batch.messages) == 4
    assert settlement.committed == set(), "the source acknowledges all"
    assert [letter.message.id for letter in settlement.letters] == [b"3"]
    assert (await scorer.streams.last("a")).state_version == 4


async def test_a_lost_race_is_run_again_in_order_before_anything_else(line: Line, scorer: Trying) -> None:
    scorer.conflicts = 2
    line.put(event(1, "hot"), event(1, "cool"), event(2, "hot"), event(3, "hot"))
    await line.until(1, line.settled)
    assert (await scorer.streams.last("hot")).state_version == 3
    assert (await scorer.streams.last("hot")).contributors[0].actual == 3
    assert (await scorer.streams.last("cool")).state_version == 1


async def test_an_event_that_brings_out_a_bug_is_a_dead_letter_and_does_not_stop_those_behind_it(line: Line, scorer: Trying) -> None:
    line.put(event(1), event(13), event(2))
    await line.until(1, line.settled)
    [letter] = line.settled[0][1].letters
    assert letter.message.id == b"1"
    assert "ZeroDivisionError" in letter.error.detail
    assert (await scorer.streams.last("a")).state_version == 2


async def test_what_there_is_no_memory_for_is_scored_later_and_no_dead_letter(
    line: Line, scorer: Trying, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer.no_memory = 2 * BUG_ATTEMPTS
    monkeypatch.setattr("service.consumer.MAX_BACKOFF", 0.02)
    line.put(event(1), event(2))
    with structlog.testing.capture_logs() as logs:
        await line.until(1, line.settled)
    assert [(entry["event"], entry["entries"]) for entry in logs if entry["log_level"] in ("warning", "error")] == [("no_memory", 2)]
    assert not line.settled[0][1].letters
    assert (await scorer.streams.last("a")).state_version == 2


async def test_a_message_that_there_is_no_memory_to_read_is_delivered_again(scorer: Trying) -> None:
    class Full(Mapper):
        def events(self, message: Message) -> tuple[Items, bool]:
            raise MemoryError

    line = Line()
    consumer = Consumer(line, scorer, Metrics(), Full(Payload(), max_events=100), fuse=0.9)
    await consumer.start()
    line.put(event(1))
    await line.until(1, line.abandoned)
    await consumer.stop(5)
    assert not line.settled


async def test_settling_is_tried_until_the_queue_answers_and_given_up_where_it_is_anothers(line: Line) -> None:
    line.failures = [StoreUnavailable("down"), StoreUnavailable("down")]
    line.put(event(1))
    await line.until(1, line.settled)
    line.failures = [Fenced("lost")]
    line.put(event(2))
    await line.until(1, line.abandoned)
    assert len(line.settled) == 1


async def test_a_stop_hands_back_what_could_not_be_finished(tiny_detector: Detector) -> None:
    held = Scorer(tiny_detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), Metrics(), Limits(), held=True)
    held.start()
    line = Line()
    consumer = Consumer(line, held, Metrics(), MAPPER, fuse=0.9)
    await consumer.start()
    line.put(event(1))
    async with asyncio.timeout(30):
        while not line.waiting.empty():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await consumer.stop(0.1)
    assert len(line.abandoned) == 1
    assert (line.settled, line.closed) == ([], True)
    await held.drain(1)


async def test_a_stop_finishes_what_is_under_way_and_of_the_queue_nothing_more_waits_here(scorer: Trying) -> None:
    line, metrics = Line(), Metrics()
    consumer = Consumer(line, scorer, metrics, MAPPER, fuse=0.9)
    await consumer.start()
    line.failures = [StoreUnavailable("down")] * 4  # 0.3 s
    line.put(event(1))
    await line.until(1, line.published)
    metrics.source_lag.labels(line.name).set(1)
    await consumer.stop(30)
    assert (len(line.settled), line.abandoned) == (1, [])
    assert metrics.registry.get_sample_value("onset_source_lag", {"source": "line"}) == 0


async def test_a_batch_that_another_file_of_the_model_is_to_score_is_given_back_at_once(line: Line, scorer: Trying) -> None:
    scorer.superseded = True
    line.put(event(1))
    await line.until(1, line.abandoned)
    assert line.settled == []


async def test_an_entry_of_several_events_is_not_acknowledged_by_the_commit_of_one_of_them(line: Line, scorer: Trying) -> None:
    line.put(event(1), [event(2), event(3)], [event(4)], lease=Lease(b"line", b"lease", b"another's", b"group"))
    await line.until(1, line.abandoned)
    assert scorer.entries == (b"0", b"", b"", b"")


@pytest.mark.parametrize(
    ("part", "passes"),
    [
        ([event(1)] * 8 + [{"stream_id": "a", "values": "none"}], True),  # a gateway with a tag that is no number
        ([event(1)] + [{"stream_id": "a", "values": {"pressure": 1}}] * 8, False),  # bad ones that only the scorer finds
        ([{"stream_id": "a", "values": "none"}] * 9, False),
    ],
)
async def test_of_an_entry_with_several_events_the_fuse_counts_the_share_that_cannot_be_used(
    scorer: Trying, part: list[dict[str, Any]], passes: bool
) -> None:
    line = Line()
    consumer = Consumer(line, scorer, Metrics(), MAPPER, fuse=0.5, fuse_seconds=0.02)
    await consumer.start()
    line.put(*[part] * FUSE_ENTRIES)
    await line.until(1, line.settled if passes else line.abandoned)
    await consumer.stop(5)
    assert (len(line.settled), len(line.abandoned)) == ((1, 0) if passes else (0, 1))


async def test_an_entry_with_many_bad_events_is_one_bad_entry_to_the_fuse(scorer: Trying) -> None:
    line = Line()
    consumer = Consumer(line, scorer, Metrics(), MAPPER, fuse=0.5, fuse_seconds=0.02)
    await consumer.start()
    line.put(*[event(1)] * FUSE_ENTRIES, [{"stream_id": "a", "values": "none"}] * 99)
    await line.until(1, line.settled)
    await consumer.stop(5)
    assert (len(line.settled[0][1].letters), line.abandoned) == (99, [])


async def test_results_are_published_in_order_before_their_entries_are_acknowledged(line: Line) -> None:
    line.publish_failures = [StoreUnavailable("down"), StoreUnavailable("down")]
    line.put(event(1), event(2, "b"), b"nonsense", event(3))
    await line.until(1, line.settled)
    assert line.results() == [("a", 1, False), ("b", 1, False), ("a", 2, False)]
    assert [published.id for published in line.published] == [
        f"tiny/1/{named}.0" for named in ("a/1/1700000000", "b/1/1700000001", "a/2/1700000003")
    ]


async def test_what_is_delivered_again_is_published_again_with_the_same_numbers_and_scored_once(
    line: Line, scorer: Trying, tiny_detector: Detector
) -> None:
    batch = line.put(*(event(value, stream) for value in range(20, 50) for stream in ("a", "b")), event(1, "once"))
    await line.until(1, line.settled)
    before = list(line.published)
    line.waiting.put_nowait(batch)  # as after a crash between the commit and the acknowledgement
    await line.until(2, line.settled)
    again = line.published[len(before) :]
    assert [published.id for published in again] == [published.id for published in before]
    assert [published.content for published in again] == [published.content for published in before]
    assert (await scorer.streams.last("a")).state_version == 30


async def test_events_without_positions_are_told_apart_by_their_own_identity_alone(scorer: Trying) -> None:
    line = Line(source=0)
    consumer = Consumer(line, scorer, Metrics(), MAPPER, fuse=0.9)
    await consumer.start()
    batch = line.put(event(1) | {"event_id": "x"}, event(2), event(3) | {"event_id": "y"})
    await line.until(1, line.settled)
    line.waiting.put_nowait(batch)
    await line.until(2, line.settled)
    await consumer.stop(5)
    assert line.results() == [("a", 1, False), ("a", 2, False), ("a", 3, False), ("a", 1, False), ("a", 4, False), ("a", 3, False)]


async def test_a_batch_that_the_fuse_holds_is_published_once_however_often_it_is_looked_at(scorer: Trying) -> None:
    line = Line()
    metrics = Metrics()
    consumer = Consumer(line, scorer, metrics, MAPPER, fuse=0.5, fuse_seconds=0.02)
    await consumer.start()
    batch = line.put(event(1), *[b"nonsense"] * FUSE_ENTRIES, event(2))
    for looks in range(1, 4):
        await line.until(looks, line.abandoned)
        line.waiting.put_nowait(batch)
    await consumer.stop(5)
    assert line.results() == [("a", 1, False), ("a", 2, False)]
    assert line.settled == []


async def test_bad_readings_are_passed_over_and_do_not_stop_the_good_ones(scorer: Trying) -> None:
    line, metrics = Line(), Metrics()
    mapper = Mapper(Payload(stream_id="stream_id", values="values", missing=("Bad",)), max_events=10)
    consumer = Consumer(line, scorer, metrics, mapper, fuse=0.5, fuse_seconds=0.02)
    await consumer.start()
    bad = {"stream_id": "b", "values": {"value": "Bad"}}
    line.put(event(1), *[bad] * FUSE_ENTRIES, [event(2), bad, event(3)])
    await line.until(1, line.settled)
    await consumer.stop(5)
    assert line.results() == [("a", 1, False), ("a", 2, False), ("a", 3, False)]
    assert line.settled[0][1].letters == []
    assert metrics.source_no_reading.labels(line.name)._value.get() == FUSE_ENTRIES + 1


async def test_a_late_event_is_published_as_late_under_an_identity_of_its_own(line: Line) -> None:
    line.put(event(1) | {"timestamp": 1.7e9 + 5}, event(2) | {"timestamp": 1.7e9 + 1}, event(3) | {"timestamp": 1.7e9 + 2})
    await line.until(1, line.settled)
    assert len({published.id for published in line.published}) == 3
    assert [msgspec.json.decode(published.content)["late"] for published in line.published] == [False, True, True]


async def test_a_queue_that_takes_no_results_for_long_is_told_once(scorer: Trying, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.consumer.MAX_BACKOFF", 0.04)
    line.publish_failures = [StoreUnavailable("no such topic.") for _ in range(6)]
    with structlog.testing.capture_logs() as logs:
        line.put(event(1))
        await line.until(1, line.settled)
        line.publish_failures = [StoreUnavailable("no right.") for _ in range(6)]
        line.put(event(2))
        await line.until(2, line.settled)
    assert [entry["reason"] for entry in logs if entry["event"] == "source_waits"] == ["no such topic.", "no right."], "once each time"
