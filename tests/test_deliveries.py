"""Events of a queue within the flow of a batch: stepped once by position, published and acknowledged with the commit, fenced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from service.detector import Detector
from service.errors import BadEvent, ItemError, StoreUnavailable, TooManyStreams
from service.events import Delivery, Event, Lease, Published, Result
from service.metrics import Metrics
from service.policy import Policy
from service.rounds import Kind
from service.scorer import Limits, Scorer
from service.stores import Write
from service.stores.memory import MemoryStore

NOW = 1.8e9
SOURCE = 0xFFFF_FFFF
LEASE = Lease(b"in", b"in:lease", b"me#1", b"onset")


def make(detector: Detector, store: MemoryStore, limits: Limits | None = None) -> Scorer:
    scorer = Scorer(detector, Policy(), store, Metrics(), limits or Limits(), lambda: NOW)
    scorer.start()
    return scorer


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore(state_ttl=3600, result_ttl=600)
    store.leases[LEASE.key] = LEASE.token
    return store


@pytest.fixture
async def scorer(tiny_detector: Detector, store: MemoryStore) -> AsyncIterator[Scorer]:
    running = make(tiny_detector, store)
    yield running
    await running.drain(5)


async def kinds(scorer: Scorer, items: Sequence[Delivery]) -> list[Kind | ItemError]:
    return (await scorer.consume(items))[0]


def event(i: int, stream: str = "s", **fields: Any) -> Event:
    value = float(np.random.default_rng(i).normal())
    return msgspec.convert({"stream_id": stream, "values": {"value": value}, "timestamp": 1e9 + i} | fields, Event)


def delivery(event: Event, position: int, *, source: int = SOURCE, lease: Lease | None = LEASE) -> Delivery:
    return Delivery(event, source, position, NOW - 5, lease, b"%d-0" % position if lease else b"")


def deliveries(numbers: Sequence[int]) -> list[Delivery]:
    return [delivery(event(i), i) for i in numbers]


def pend(store: MemoryStore, items: Sequence[Delivery]) -> None:
    store.pending[LEASE.stream, LEASE.group] = [item.entry for item in items]


def pending(store: MemoryStore) -> list[bytes]:
    return store.pending[LEASE.stream, LEASE.group]


def published(store: MemoryStore) -> list[Result]:
    return [msgspec.json.decode(result, type=Result) for result in store.results]


async def test_what_is_published_is_what_rest_would_have_answered_and_its_entries_are_acknowledged(
    scorer: Scorer, store: MemoryStore, tiny_detector: Detector
) -> None:
    items = [one for i in range(20) for one in (delivery(event(i, "a"), 2 * i), delivery(event(i, "b"), 2 * i + 1))]
    pend(store, [*items, delivery(event(99), 99)])
    assert await kinds(scorer, items[:25]) == [Kind.SCORED] * 25
    assert await kinds(scorer, items[25:]) == [Kind.SCORED] * 15
    assert pending(store) == [b"99-0"]
    alone = make(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60))
    answers = await alone.score([item.event for item in items])
    for stream in ("a", "b"):
        want = [answer for answer in answers if isinstance(answer, Result) and answer.stream_id == stream]
        assert [result for result in published(store) if result.stream_id == stream] == want
        assert want[-1].state_version == 20
    await alone.drain(1)


@pytest.mark.parametrize("fields", [{}, {"timestamp": None}, {"event_id": "same"}], ids=["timed", "untimed", "one id"])
async def test_an_event_at_or_before_its_streams_position_is_never_stepped_nor_published_again(
    scorer: Scorer, store: MemoryStore, fields: dict[str, Any]
) -> None:
    [one, two, three] = [delivery(event(5, **fields), position) for position in (2**94, 2**94 + 1, 2**94 + 2**32)]
    other = delivery(event(5, "other"), 2**94 + 3)
    await kinds(scorer, [one, two, other])
    results, [state] = list(store.results), await store.load("tiny", ["s"])
    again = [one._replace(entry=b"8-0"), two._replace(entry=b"9-0")]
    pend(store, again)
    assert all(kind in (Kind.DUPLICATE, Kind.REPEATED) for kind in await kinds(scorer, again))
    assert (store.results, pending(store)) == (results, [])
    assert await store.load("tiny", ["s"]) == [state]
    if not fields.get("event_id"):
        assert await kinds(scorer, [three]) == [Kind.SCORED]


async def test_a_position_in_another_partition_says_nothing_and_rest_leaves_it_alone(scorer: Scorer, store: MemoryStore) -> None:
    await kinds(scorer, [delivery(event(1), 1000)])
    await scorer.score([event(2)])
    assert await kinds(scorer, [delivery(event(2), 1000)]) == [Kind.REPEATED]
    assert await kinds(scorer, [delivery(event(3), 5, source=7)]) == [Kind.SCORED]
    assert (await scorer.streams.last("s")).state_version == 3


async def test_rest_events_of_the_same_batch_leave_the_place_in_the_queue(scorer: Scorer) -> None:
    queued = delivery(event(1, timestamp=None), 1000)
    became, [answer] = await asyncio.gather(kinds(scorer, [queued]), scorer.score([event(2, timestamp=None)]))
    assert became == [Kind.SCORED]
    assert isinstance(answer, Result)
    assert answer.state_version == 2
    assert await kinds(scorer, [queued]) == [Kind.REPEATED]


async def test_a_copy_alone_publishes_and_acknowledges_nothing(scorer: Scorer, store: MemoryStore, tiny_detector: Detector) -> None:
    """By the copy it is late, but the stream has been forgotten elsewhere."""
    await kinds(scorer, [delivery(event(10), 1)])
    other = make(tiny_detector, store)
    assert await other.streams.forget("s")
    store.results.clear()
    again = delivery(event(3), 2)
    pend(store, [again])
    assert await kinds(scorer, [again]) == [Kind.SCORED]
    assert [(result.late, result.state_version) for result in published(store)] == [(False, 1)]
    assert pending(store) == []
    await other.drain(1)


async def test_a_late_event_is_published_as_late_and_acknowledged(scorer: Scorer, store: MemoryStore) -> None:
    items = [delivery(event(10), 1), delivery(event(3), 2), delivery(event(4), 3)]
    pend(store, items)
    assert await kinds(scorer, items[:2]) == [Kind.SCORED, Kind.LATE]
    assert await kinds(scorer, items[2:]) == [Kind.LATE]
    assert [(result.timestamp, result.late, result.p_value) for result in published(store)][1:] == [
        (1e9 + 3, True, None),
        (1e9 + 4, True, None),
    ]
    assert pending(store) == []
    assert (await scorer.streams.last("s")).state_version == 1


async def test_results_of_late_events_have_identities_of_their_own_though_of_one_time(scorer: Scorer) -> None:
    """A broker that drops what it has already would drop them."""
    _, told = await scorer.consume([delivery(event(i), n, lease=None) for n, i in enumerate((10, 3, 3))], replies=True)
    assert len({result.id for result in told}) == 3


async def test_a_repeated_id_is_acknowledged_and_not_published_again(scorer: Scorer, store: MemoryStore) -> None:
    first = [delivery(event(i, event_id=f"e{i}"), i) for i in range(20)]
    again = [delivery(event(i, event_id=f"e{i}"), 100 + i) for i in range(20)]
    pend(store, [*first, *again])
    assert await kinds(scorer, first) == [Kind.SCORED] * 20
    assert set(await kinds(scorer, again)) <= {Kind.DUPLICATE, Kind.REPEATED}
    assert len(store.results) == 20
    assert pending(store) == []


async def test_an_event_without_a_time_has_that_of_its_arrival_in_the_queue(scorer: Scorer, store: MemoryStore) -> None:
    await kinds(scorer, [delivery(event(1, timestamp=None), 1), delivery(event(2), 2)])
    assert [result.timestamp for result in published(store)] == [NOW - 5, 1e9 + 2]
    assert [result.late for result in published(store)] == [False, True]


async def test_under_a_lost_lease_nothing_is_written_and_rest_events_of_the_same_batch_are_scored(
    scorer: Scorer, store: MemoryStore
) -> None:
    items = deliveries([1, 2])
    pend(store, items)
    store.leases[LEASE.key] = b"you#2"
    became, answers = await asyncio.gather(kinds(scorer, items), scorer.score([event(3), event(4, "other")]))
    assert became == [Kind.FENCED, Kind.FENCED]
    assert [answer.state_version for answer in answers if isinstance(answer, Result)] == [1, 1]
    assert (store.results, len(pending(store))) == ([], 2)


class Down(MemoryStore):
    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        raise StoreUnavailable("The store does not answer.")


async def test_what_a_store_that_is_away_has_not_kept_is_not_done(tiny_detector: Detector) -> None:
    scorer = make(tiny_detector, Down(state_ttl=60, result_ttl=60))
    with pytest.raises(StoreUnavailable):
        await scorer.consume([delivery(event(1), 1, lease=None)])
    await scorer.drain(1)


class Contended(MemoryStore):
    """A store in which another replica always commits first to the stream `hot`."""

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        written = iter(await super().commit(model, [write for write in writes if write.stream_id != "hot"]))
        return [0 if write.stream_id == "hot" else next(written) for write in writes]


async def test_all_events_of_a_stream_that_loses_every_race_are_to_be_sent_again(tiny_detector: Detector) -> None:
    store = Contended(state_ttl=60, result_ttl=60)
    store.leases[LEASE.key] = LEASE.token
    scorer = make(tiny_detector, store)
    items = [delivery(event(i, name), i) for i, name in enumerate(["hot", "cool", "hot"])]
    pend(store, items)
    assert await kinds(scorer, items) == [Kind.CONFLICT, Kind.SCORED, Kind.CONFLICT]
    assert pending(store) == [b"0-0", b"2-0"]
    await scorer.drain(1)


async def test_bad_events_are_named_in_their_place_and_not_acknowledged(tiny_detector: Detector, store: MemoryStore) -> None:
    scorer = make(tiny_detector, store, Limits(max_streams=1))
    items = [
        delivery(event(1), 1),
        delivery(event(2, values={"speed": 1.0}), 2),
        delivery(event(3), 3),
        delivery(event(4, "one too many"), 4),
    ]
    pend(store, items)
    first, second, third, fourth = await kinds(scorer, items)
    assert (first, third) == (Kind.SCORED, Kind.SCORED)
    assert isinstance(second, BadEvent)
    assert (second.field, second.value) == ("values.speed", "1.0")
    assert isinstance(fourth, TooManyStreams)
    assert pending(store) == [b"2-0", b"4-0"]
    await scorer.drain(1)


async def test_events_of_a_queue_outside_the_store_are_neither_published_nor_acknowledged(scorer: Scorer, store: MemoryStore) -> None:
    items = [delivery(event(i), i, lease=None) for i in range(3)]
    assert await kinds(scorer, items) == [Kind.SCORED] * 3
    assert await kinds(scorer, items) == [Kind.REPEATED] * 3
    assert store.results == []


async def test_without_positions_an_event_without_id_is_known_by_its_time_and_values(scorer: Scorer) -> None:
    items = [delivery(event(i), 0, source=0, lease=None) for i in (1, 2, 2, 3)]
    assert await kinds(scorer, items) == [Kind.SCORED, Kind.SCORED, Kind.DUPLICATE, Kind.SCORED]
    assert [kind in (Kind.DUPLICATE, Kind.REPEATED) for kind in await kinds(scorer, items)] == [True] * 4
    other = event(3, values={"value": 99.0})
    assert await kinds(scorer, [delivery(other, 0, source=0, lease=None)]) == [Kind.SCORED], "another reading of the same moment"
    untimed = delivery(event(4, timestamp=None), 0, source=0, lease=None)
    assert await kinds(scorer, [untimed, untimed]) == [Kind.SCORED, Kind.SCORED], "nothing tells them apart"


async def test_a_replica_that_was_taken_for_dead_and_goes_on_beside_the_new_owner_changes_nothing(
    tiny_detector: Detector, store: MemoryStore
) -> None:
    items = [delivery(event(i // 2, "ab"[i % 2], timestamp=None), 1000 + i, lease=None) for i in range(60)]
    zombie, owner = make(tiny_detector, store), make(tiny_detector, store)

    async def run(scorer: Scorer, size: int) -> list[Published]:
        results: list[Published] = []
        for start in range(0, len(items), size):
            left = items[start : start + size]
            while left:
                kinds, published = await scorer.consume(left, replies=True)
                results += published
                left = [item for item, kind in zip(left, kinds, strict=True) if kind is Kind.CONFLICT]
        return results

    both = await asyncio.gather(run(zombie, 7), run(owner, 10))
    alone = make(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60))
    want = {result.id: result.content for result in await run(alone, 60)}
    assert len(want) == 60
    assert {result.id: result.content for results in both for result in results} == want
    assert all(want[result.id] == result.content for results in both for result in results)
    for scorer in (zombie, owner, alone):
        await scorer.drain(1)


async def test_nothing_is_consumed_before_the_policy_is_known(tiny_detector: Detector, store: MemoryStore) -> None:
    scorer = Scorer(tiny_detector, Policy(), store, Metrics(), Limits(), lambda: NOW, held=True)
    scorer.start()
    with pytest.raises(StoreUnavailable, match="policy"):
        await kinds(scorer, deliveries([1]))
    await scorer.drain(1)
