"""Events that overtook each other are scored in their order; nothing waits for ever, and nothing is dropped."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import pytest

from service.detector import Detector
from service.errors import NotCommitted, Overloaded, StoreUnavailable
from service.events import Event, Parsed, Result
from service.metrics import Metrics
from service.policy import Policy
from service.reorder import Reorder
from service.scorer import Limits, Scorer
from service.stores import Write
from service.stores.memory import MemoryStore


class Order:
    """Notes the order in which events are released, and answers each with its value."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    async def __call__(self, parsed: Parsed) -> Sequence[float | None]:
        self.seen += parsed.values
        return parsed.values


def events(numbers: Sequence[int], stream: str = "s", *, sequenced: bool = False) -> Parsed:
    """Events whose value is their place."""
    n = len(numbers)
    times = [0.0 if sequenced else float(i) for i in numbers]
    return Parsed([stream] * n, [float(i) for i in numbers], times, [not sequenced] * n, list(numbers) if sequenced else [-1] * n, [0] * n)


def reorder(order: Order, seconds: float = 0.05, most: int = 64, max_held: int = 1000) -> Reorder[float | None]:
    return Reorder(order, seconds=seconds, events=most, max_held=max_held)


async def test_events_that_come_within_the_time_are_released_in_the_order_of_their_timestamps() -> None:
    order = Order()
    held = reorder(order)
    asked = [asyncio.create_task(held.score(events([i]))) for i in (3, 1, 2)]
    assert [answers[0] for answers in await asyncio.gather(*asked)] == [3, 1, 2]
    assert order.seen == [1, 2, 3]
    assert held.held == 0


async def test_with_one_whose_time_is_over_go_all_before_it_though_they_came_later() -> None:
    order = Order()
    held = reorder(order)
    first = asyncio.create_task(held.score(events([2])))
    await asyncio.sleep(0)
    held._seconds = 60
    second = asyncio.create_task(held.score(events([1])))
    async with asyncio.timeout(20):
        assert (await first, await second) == ([2], [1])
    assert order.seen == [1, 2]


async def test_a_sequence_without_a_gap_waits_for_nothing_once_its_place_is_known() -> None:
    order = Order()
    held = reorder(order, seconds=0.05)
    await held.score(events([0, 1], sequenced=True))
    held._seconds = 60
    async with asyncio.timeout(20):
        assert await held.score(events([2, 3], sequenced=True)) == [2, 3]
        later = asyncio.create_task(held.score(events([6, 5], sequenced=True)))
        await asyncio.sleep(0)
        assert held.held == 2
        await held.score(events([4], sequenced=True))
        assert await later == [6, 5]
        assert await held.score(events([1], sequenced=True)) == [1], "what is late already has nothing to wait for"
    assert order.seen == [0, 1, 2, 3, 4, 5, 6, 1]


async def test_of_more_streams_than_are_remembered_those_that_rested_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.reorder.REMEMBERED", 2)
    held = reorder(Order(), seconds=0.05)
    for stream, number in (("busy", 0), ("resting", 0), ("busy", 1), ("new", 0)):
        await held.score(events([number], stream, sequenced=True))
    held._seconds = 60
    async with asyncio.timeout(20):
        assert await held.score(events([2], "busy", sequenced=True)) == [2]
    waits = asyncio.create_task(held.score(events([1], "resting", sequenced=True)))
    await asyncio.sleep(0)
    assert held.held == 1
    await held.flush()
    await waits


async def test_sequences_that_no_float_tells_apart_keep_their_order() -> None:
    order = Order()
    held = reorder(order, seconds=60)
    numbers = [2**62 + 3, 2**62 + 1, 2**62 + 2]
    parsed = events(numbers, sequenced=True)
    parsed.values[:] = [float(number - 2**62) for number in numbers]
    asked = asyncio.create_task(held.score(parsed))
    await asyncio.sleep(0)
    await held.flush()
    await asked
    assert order.seen == [1, 2, 3]


async def test_beyond_the_number_of_a_stream_the_earliest_are_released() -> None:
    order = Order()
    held = reorder(order, seconds=60, most=3)
    asked = asyncio.create_task(held.score(events([5, 4, 3, 2, 1])))
    await asyncio.sleep(0.01)
    assert order.seen == [1, 2]
    await held.flush()
    assert await asked == [5, 4, 3, 2, 1]
    assert order.seen == [1, 2, 3, 4, 5]


async def test_more_than_may_be_held_is_refused_at_once() -> None:
    held = reorder(Order(), seconds=60, max_held=3)
    asked = asyncio.create_task(held.score(events([1, 2])))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 events are held until their turn; 3 may be"):
        await held.score(events([3, 4]))
    await held.flush()
    assert await asked == [1, 2]


async def test_an_event_without_time_and_sequence_is_not_held() -> None:
    held = reorder(Order(), seconds=60)
    async with asyncio.timeout(20):
        assert await held.score(Parsed(["s"], [7.0], [0.0], [False], [-1], [0])) == [7]


async def test_an_event_whose_client_left_is_not_scored_and_hurts_no_other() -> None:
    order = Order()
    held = reorder(order)
    leaves, stays = asyncio.create_task(held.score(events([1]))), asyncio.create_task(held.score(events([2])))
    await asyncio.sleep(0)
    leaves.cancel()
    assert await stays == [2]
    assert order.seen == [2]


def scorer_of(detector: Detector, store: MemoryStore, seconds: float) -> Scorer:
    limits = Limits(reorder_seconds=seconds, reorder_events=100)
    scorer = Scorer(detector, Policy(), store, Metrics(), limits)
    scorer.start()
    return scorer


def walk(count: int, stream: str) -> list[Event]:
    rng = random.Random(stream)
    return [Event(stream_id=stream, values={"value": rng.gauss(0, 1)}, timestamp=1e9 + i, event_id=f"{stream}-{i}") for i in range(count)]


def by_id(answers: Sequence[object]) -> dict[str | None, tuple[float | None, int, bool]]:
    return {answer.event_id: (answer.p_value, answer.state_version, answer.late) for answer in answers if isinstance(answer, Result)}


async def test_shuffled_requests_get_the_scores_of_ordered_ones(tiny_detector: Detector) -> None:
    ordered = [event for pair in zip(walk(40, "a"), walk(40, "b"), strict=True) for event in pair]
    plain = scorer_of(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60), 0)
    want = by_id(await plain.score(ordered))
    shuffled = ordered.copy()
    random.Random(3).shuffle(shuffled)
    held = scorer_of(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60), 0.2)
    parts = await asyncio.gather(*(held.score(shuffled[i : i + 7]) for i in range(0, len(shuffled), 7)))
    assert by_id([answer for part in parts for answer in part]) == want
    for scorer in (plain, held):
        await scorer.drain(5)


async def test_what_comes_too_late_is_reported_late_and_never_stepped(tiny_detector: Detector) -> None:
    scorer = scorer_of(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60), 0.02)
    first, second, third = walk(3, "s")
    await scorer.score([first, third])
    [late] = await scorer.score([second])
    assert isinstance(late, Result)
    assert (late.late, late.state_version, late.p_value) == (True, 2, None)
    await scorer.drain(5)


class Down(MemoryStore):
    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        if any(write.stream_id == "down" for write in writes):
            raise StoreUnavailable("The store does not answer.")
        return await super().commit(model, writes)


async def test_an_error_is_that_of_the_events_it_concerns(tiny_detector: Detector) -> None:
    scorer = scorer_of(tiny_detector, Down(state_ttl=60, result_ttl=60), 0.02)
    good = asyncio.create_task(scorer.score(walk(2, "good")))
    await asyncio.sleep(0.05)
    assert all(isinstance(answer, Result) for answer in await good)
    with pytest.raises(StoreUnavailable):
        await scorer.score(walk(2, "down"))
    await scorer.drain(5)


async def test_a_stopping_service_releases_what_it_holds(tiny_detector: Detector) -> None:
    scorer = scorer_of(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60), 60)
    assert scorer.begin(walk(1, "s")[0], "") is None, "of a single event, too, an earlier one may come"
    asked = asyncio.create_task(scorer.score(walk(3, "s")))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(20):
        scorer.stopping()
        assert [answer.state_version for answer in await asked if isinstance(answer, Result)] == [1, 2, 3]
        assert len(await scorer.score(walk(1, "t"))) == 1, "what comes yet is not held either"
    await scorer.drain(5)


class Stuck(MemoryStore):
    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        await asyncio.sleep(60)
        return await super().commit(model, writes)


async def test_a_stop_takes_no_longer_than_it_may_with_events_held(tiny_detector: Detector) -> None:
    scorer = scorer_of(tiny_detector, Stuck(state_ttl=60, result_ttl=60), 60)
    asked = asyncio.create_task(scorer.score(walk(3, "s")))
    await asyncio.sleep(0.01)
    began = time.monotonic()
    await scorer.drain(5)
    assert time.monotonic() - began < 10, "not once for what is held and once more for what is queued"
    with pytest.raises(Overloaded, match="stopped before this was scored"):
        await asked


async def test_pieces_that_fail_leave_the_answers_of_the_others_in_their_places(tiny_detector: Detector) -> None:
    scorer = scorer_of(tiny_detector, Down(state_ttl=60, result_ttl=60), 0)
    bulk = [Event(stream_id="down" if i < 1024 else f"s{i}", values={"value": 1.0}, event_id=str(i)) for i in range(2048)]
    answers = await scorer.score(bulk)
    assert all(isinstance(answer, NotCommitted) for answer in answers[:1024])
    done = [answer for answer in answers[1024:] if isinstance(answer, Result)]
    assert [answer.stream_id for answer in done] == [f"s{i}" for i in range(1024, 2048)]
    await scorer.drain(5)
