"""Batches grow with the load, a full queue refuses at once, and nobody is hurt by a neighbour."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from service.batcher import RETURN_SECONDS, SLOW_SECONDS, Batcher, Waits
from service.errors import Overloaded, StoreUnavailable


@dataclass(frozen=True)
class Job:
    """A number to double, as so many events of some streams."""

    number: int
    streams: frozenset[str]
    events: int = 1
    rounds: int = 1


def jobs(*numbers: int) -> list[Job]:
    """Each of a stream of its own."""
    return [Job(number, frozenset({str(number)})) for number in numbers]


def of(stream: str, *numbers: int, events: int = 1, rounds: int = 1) -> list[Job]:
    return [Job(number, frozenset({stream}), events, rounds) for number in numbers]


Ints = Batcher[Job, int]


@asynccontextmanager
async def batcher(
    handle: Callable[[list[Job], Waits], Awaitable[Sequence[int]]],
    *,
    max_batch: int = 100,
    max_streams: int = 10_000,
    max_queue: int = 1000,
    depth: int = 1,
    gather: int = 1,
) -> AsyncIterator[Ints]:
    running: Ints = Batcher(handle, max_batch=max_batch, max_streams=max_streams, max_queue=max_queue, depth=depth, gather=gather)
    running.start()
    yield running
    await running.drain(1)


class Gate:
    """A handler that doubles numbers, and waits while it is closed."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.batches: list[list[int]] = []
        self.waits: list[Waits] = []

    async def __call__(self, items: list[Job], waits: Waits) -> list[int]:
        self.batches.append([item.number for item in items])
        self.waits.append(waits)
        await self.open.wait()
        return [2 * item.number for item in items]


async def waiting(running: Ints, count: int) -> None:
    async with asyncio.timeout(20):
        while running.queued < count:  # noqa: ASYNC110 - a test may look in
            await asyncio.sleep(0)


async def test_submissions_that_arrive_during_a_batch_form_the_next_one() -> None:
    gate = Gate()
    async with batcher(gate) as running:
        head = asyncio.create_task(running.submit(jobs(0)))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit(jobs(i))) for i in range(1, 10)]
        await waiting(running, 9)
        gate.open.set()
        assert await asyncio.gather(head, *tasks) == [[2 * i] for i in range(10)]
    assert gate.batches[0] == [0]
    assert gate.batches[1:] == [list(range(1, 10))]


async def test_a_batch_holds_no_more_than_its_limit_and_keeps_the_order() -> None:
    gate = Gate()
    gate.open.set()
    async with batcher(gate, max_batch=4) as running:
        assert await running.submit(jobs(*range(10))) == [2 * i for i in range(10)]
    assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_items_of_several_events_a_stream_share_a_batch_up_to_its_streams() -> None:
    gate = Gate()
    gate.open.set()
    items = [Job(i, frozenset({f"a{i}", f"b{i}"}), events=20, rounds=10) for i in range(5)]
    async with batcher(gate, max_batch=1000, max_streams=4) as running:
        assert await running.submit(items) == [0, 2, 4, 6, 8]
    assert gate.batches == [[0, 1], [2, 3], [4]]


async def test_an_item_of_more_streams_than_a_batch_may_have_gets_its_own() -> None:
    gate = Gate()
    gate.open.set()
    wide = Job(1, frozenset(map(str, range(10))), events=10)
    async with batcher(gate, max_streams=4) as running:
        assert await running.submit([*jobs(100), wide, *jobs(200)]) == [200, 2, 400]
    assert gate.batches == [[100, 200], [1]]


async def test_a_full_queue_refuses_at_once_and_takes_all_of_a_submission_or_nothing() -> None:
    gate = Gate()
    async with batcher(gate, max_queue=5) as running:
        first = asyncio.create_task(running.submit(jobs(0)))
        await asyncio.sleep(0.01)
        waits = asyncio.create_task(running.submit(jobs(1, 2, 3)))
        await waiting(running, 3)
        with pytest.raises(Overloaded, match="3 events are waiting to be scored, 3 of them from this sender; the queue holds 5") as refusal:
            await running.submit(jobs(4, 5, 6))
        assert refusal.value.retry_after >= 1
        assert running.queued == 3
        held = asyncio.create_task(running.submit(jobs(7, 8, 9), admitted=True))
        await waiting(running, 6)
        gate.open.set()
        assert await held == [14, 16, 18], "what was let in before is not refused"
        assert await first == [0]
        assert await waits == [2, 4, 6]


async def test_what_is_handled_takes_none_of_its_senders_room() -> None:
    gate = Gate()
    async with batcher(gate, max_batch=1, max_queue=8) as running:
        first = asyncio.create_task(running.submit(jobs(1, 2, 3, 4)))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(running.submit(jobs(5, 6)))
        await waiting(running, 5)
        gate.open.set()
        assert [*await first, *await second] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("leaves", range(6))
async def test_a_client_that_leaves_does_not_hurt_its_batch_mates(leaves: int) -> None:
    gate = Gate()
    async with batcher(gate) as running:
        head = asyncio.create_task(running.submit(jobs(99)))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit(jobs(i))) for i in range(6)]
        await waiting(running, 6)
        tasks[leaves].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        stayed = [task for i, task in enumerate(tasks) if i != leaves]
        assert await asyncio.gather(*stayed) == [[2 * i] for i in range(6) if i != leaves]
        assert await head == [198]
        assert (running.queued, running._queued_streams) == (0, 0), "nor does it take room for good"
    assert leaves not in gate.batches[1], "who left before the batch began is not computed"


@pytest.mark.parametrize("leaves", range(4))
async def test_a_client_that_leaves_while_its_batch_runs_does_not_hurt_its_batch_mates(leaves: int) -> None:
    gate = Gate()
    async with batcher(gate) as running:
        head = asyncio.create_task(running.submit(jobs(99)))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit(jobs(i))) for i in range(4)]
        await waiting(running, 4)
        gate.open.set()
        await head
        gate.open.clear()
        await asyncio.sleep(0)
        tasks[leaves].cancel()
        gate.open.set()
        stayed = [task for i, task in enumerate(tasks) if i != leaves]
        assert await asyncio.gather(*stayed) == [[2 * i] for i in range(4) if i != leaves]


async def test_an_error_fails_its_batch_and_the_loop_goes_on() -> None:
    async def handle(items: list[Job], waits: Waits) -> list[int]:
        if items[0].number == 13:
            raise ZeroDivisionError("a bug")
        return [item.number for item in items]

    async with batcher(handle) as running:
        [failure] = await running.submit(jobs(13))
        assert isinstance(failure, ZeroDivisionError)
        assert await running.submit(jobs(1)) == [1]
        assert running.healthy


async def test_what_follows_a_failed_item_of_the_same_call_is_not_handled() -> None:
    handled: list[int] = []

    async def handle(items: list[Job], waits: Waits) -> list[int]:
        numbers = [item.number for item in items]
        handled.extend(numbers)
        if 2 in numbers:
            raise StoreUnavailable("down")
        return numbers

    async with batcher(handle, max_batch=2) as running:
        answers = await running.submit(jobs(0, 1, 2, 3, 4, 5))
    assert answers[:2] == [0, 1]
    assert all(isinstance(answer, StoreUnavailable) for answer in answers[2:])
    assert handled == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 3])
async def test_draining_finishes_what_runs_and_what_waits_and_refuses_what_comes(count: int) -> None:
    gate = Gate()
    async with batcher(gate) as running:
        tasks = [asyncio.create_task(running.submit(jobs(0)))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(running.submit(jobs(i))) for i in range(1, count)]
        await waiting(running, count - 1)
        drained = asyncio.create_task(running.drain(20))
        await asyncio.sleep(0.01)
        assert not drained.done()
        with pytest.raises(Overloaded, match="stopping"):
            await running.submit(jobs(9))
        gate.open.set()
        await drained
        assert await asyncio.gather(*tasks) == [[0], [2], [4]][:count]
        assert not running.healthy


async def test_what_is_not_finished_by_the_deadline_is_told_so() -> None:
    gate = Gate()
    async with batcher(gate) as running:
        tasks = [asyncio.create_task(running.submit(jobs(i))) for i in range(3)]
        await waiting(running, 2)
        await running.drain(0.05)
        for [answer] in await asyncio.gather(*tasks):
            assert isinstance(answer, Overloaded)


async def test_without_its_loop_nothing_is_accepted() -> None:
    idle: Ints = Batcher(Gate(), max_batch=1, max_streams=1, max_queue=1)
    assert not idle.healthy
    with pytest.raises(Overloaded):
        await idle.submit(jobs(1))


async def test_batches_that_share_no_stream_are_handled_at_once_and_those_that_do_one_after_the_other() -> None:
    gate = Gate()
    async with batcher(gate, depth=3) as running:
        first = asyncio.create_task(running.submit(of("a", 1)))
        await asyncio.sleep(0.01)
        same, other = asyncio.create_task(running.submit(of("a", 2))), asyncio.create_task(running.submit(of("b", 3)))
        await asyncio.sleep(0.01)
        assert gate.batches == [[1], [3]]
        assert running.queued == 1
        gate.open.set()
        answers: list[list[int | Exception]] = list(await asyncio.gather(first, same, other))
        assert answers == [[2], [4], [6]]
    assert gate.batches == [[1], [3], [2]]


async def test_few_streams_wait_for_the_next_batch_together_unless_only_long_ones_run() -> None:
    gate = Gate()
    async with batcher(gate, depth=3, gather=3, max_queue=10_000, max_batch=10_000) as running:
        long = asyncio.create_task(running.submit(of("hot", 1, events=500, rounds=500)))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit(jobs(2)))]
        await asyncio.sleep(0.01)
        assert gate.batches == [[1], [2]]
        tasks += [asyncio.create_task(running.submit(jobs(i))) for i in (3, 4)]
        await asyncio.sleep(0.01)
        assert gate.batches == [[1], [2]]
        tasks.append(asyncio.create_task(running.submit(jobs(5))))
        await asyncio.sleep(0.01)
        assert gate.batches == [[1], [2], [3, 4, 5]]
        gate.open.set()
        await asyncio.gather(long, *tasks)


async def test_few_streams_are_computed_while_one_large_batch_only_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.batcher.SLOW_SECONDS", 60.0)  # which a large one does not wait
    gate = Gate()
    async with batcher(gate, depth=3, gather=3) as running:
        tasks = [asyncio.create_task(running.submit(jobs(0, 1, 2)))]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(running.submit(jobs(3))))
        await asyncio.sleep(0.01)
        assert gate.batches == [[0, 1, 2]]
        gate.waits[0]()
        await asyncio.sleep(0.01)
        assert gate.batches == [[0, 1, 2], [3]]
        gate.waits[1]()
        tasks.append(asyncio.create_task(running.submit(jobs(4))))
        await asyncio.sleep(0.01)
        assert gate.batches == [[0, 1, 2], [3]], "a third one would have few streams and wait behind both"
        gate.open.set()
        assert await asyncio.gather(*tasks) == [[0, 2, 4], [6], [8]]


async def test_few_streams_wait_for_a_quick_store_and_are_computed_while_others_wait_for_a_slow_one() -> None:
    gate = Gate()
    async with batcher(gate, depth=3, gather=100) as running:
        tasks = [asyncio.create_task(running.submit(jobs(0)))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(running.submit(jobs(i))) for i in (1, 2)]
        gate.waits[0]()
        asked = time.monotonic()
        async with asyncio.timeout(20):
            while len(gate.batches) < 2:  # noqa: ASYNC110 - a test may look in
                await asyncio.sleep(0)
        assert time.monotonic() - asked >= 0.9 * SLOW_SECONDS
        gate.open.set()
        assert await asyncio.gather(*tasks) == [[0], [2], [4]]
    assert gate.batches == [[0], [1, 2]]


async def test_those_that_were_just_answered_share_the_next_batch_while_they_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LINGER_SECONDS", "RETURN_SECONDS"):
        monkeypatch.setattr(f"service.batcher.{name}", 60.0)  # this machine may be slow
    gate = Gate()
    gate.open.set()

    async def client(number: int, turns: int) -> None:
        for _ in range(3):
            assert await running.submit(jobs(number)) == [2 * number]
            for _ in range(turns):  # of the event loop, until its next event is there
                await asyncio.sleep(0)

    async with batcher(gate, gather=100) as running:
        await asyncio.gather(*(client(i, turns=i) for i in range(10)))
        assert [sorted(batch) for batch in gate.batches] == [list(range(10))] * 3


async def test_nobody_waits_for_those_who_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.batcher.LINGER_SECONDS", 60.0)  # as if others kept coming for ever
    gate = Gate()
    gate.open.set()
    async with batcher(gate, gather=100) as running:
        await asyncio.gather(*(running.submit(jobs(i)) for i in range(10)))
        async with asyncio.timeout(20):
            assert await running.submit(jobs(10)) == [20]
            await asyncio.sleep(2 * RETURN_SECONDS)
            assert await running.submit(jobs(11)) == [22]
    assert gate.batches == [list(range(10)), [10], [11]]


async def test_no_more_batches_are_handled_at_once_than_the_depth() -> None:
    gate = Gate()
    async with batcher(gate, depth=2, max_batch=1) as running:
        tasks = [asyncio.create_task(running.submit(jobs(i))) for i in range(4)]
        await waiting(running, 2)
        await asyncio.sleep(0.01)
        assert gate.batches == [[0], [1]]
        gate.open.set()
        assert await asyncio.gather(*tasks) == [[0], [2], [4], [6]]


async def test_a_stream_keeps_its_order_past_what_is_passed_over() -> None:
    gate = Gate()
    async with batcher(gate, depth=2, max_batch=4) as running:
        head = asyncio.create_task(running.submit(of("a", 1)))
        await asyncio.sleep(0.01)
        both = Job(2, frozenset({"a", "b"}))
        rest = asyncio.create_task(running.submit([both, *of("b", 3), *of("c", 4)]))
        await asyncio.sleep(0.01)
        assert gate.batches == [[1], [4]], "3 must not overtake 2, which waits for stream a"
        gate.open.set()
        assert await head == [2]
        assert await rest == [4, 6, 8]
    assert gate.batches == [[1], [4], [2, 3]]


@pytest.mark.parametrize("max_batch", [1, 4])
async def test_senders_take_turns_however_much_one_of_them_has_queued(max_batch: int) -> None:
    gate = Gate()
    async with batcher(gate, max_batch=max_batch) as running:
        head = asyncio.create_task(running.submit(jobs(0)))
        await asyncio.sleep(0.01)
        noisy = asyncio.create_task(running.submit(jobs(*range(100, 120)), "noisy"))
        quiet = [asyncio.create_task(running.submit(jobs(i), "quiet")) for i in (1, 2)]
        await waiting(running, 22)
        gate.open.set()
        await asyncio.gather(head, noisy, *quiet)
    assert [number for batch in gate.batches[1:] for number in batch][:4] == [100, 1, 101, 2]


async def test_however_much_one_sender_has_queued_there_is_room_for_the_next() -> None:
    gate = Gate()
    async with batcher(gate, max_queue=100) as running:
        head = asyncio.create_task(running.submit(jobs(0)))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit(jobs(10 * i + 1, 10 * i + 2, 10 * i + 3, 10 * i + 4), "noisy")) for i in range(30)]
        await asyncio.sleep(0.01)
        refused = [task for task in tasks if task.done() and isinstance(task.exception(), Overloaded)]
        assert 48 <= running.queued <= 52
        assert len(refused) == 30 - running.queued // 4
        quiet = asyncio.create_task(running.submit(jobs(*range(1000, 1020)), "quiet"))
        await asyncio.sleep(0.01)
        gate.open.set()
        assert await quiet == [2 * i for i in range(1000, 1020)]
        await asyncio.gather(head, *(task for task in tasks if task not in refused))


async def test_long_items_share_one_batch_at_a_time_and_leave_the_others_alone() -> None:
    gate = Gate()

    def long(number: int, name: str) -> asyncio.Task[list[int | Exception]]:
        return asyncio.create_task(running.submit(of(name, number, events=500, rounds=500), name))

    async with batcher(gate, depth=3, max_batch=1000, max_queue=10_000) as running:
        tasks = [long(i, name) for i, name in enumerate(("hot", "hotter", "hottest"), 1)]
        short = asyncio.create_task(running.submit(jobs(7, 8), "quiet"))
        await asyncio.sleep(0.01)
        assert gate.batches == [[1, 2], [7, 8]]
        gate.open.set()
        assert await asyncio.gather(*tasks, short) == [[2], [4], [6], [14, 16]]
    assert gate.batches == [[1, 2], [7, 8], [3]]


async def test_a_long_item_waits_for_others_no_longer_than_for_itself() -> None:
    gate = Gate()
    gate.open.set()
    rounds = {1: 100, 2: 201, 3: 200, 4: 65, 5: 300}
    async with batcher(gate, max_batch=10_000, max_queue=10_000) as running:
        tasks = [asyncio.create_task(running.submit(of(f"s{i}", i, events=n, rounds=n), f"s{i}")) for i, n in rounds.items()]
        assert await asyncio.gather(*tasks) == [[2 * i] for i in rounds]
    assert gate.batches == [[1, 3, 4], [2, 5]]


async def test_long_items_of_one_stream_stay_in_turn() -> None:
    gate = Gate()
    gate.open.set()
    async with batcher(gate, max_batch=10_000, max_queue=10_000) as running:
        items = [*of("a", 1, 2, events=100, rounds=100), *of("b", 3, events=100, rounds=100), *of("a", 4), *of("b", 5), *of("c", 6)]
        assert await running.submit(items) == [2, 4, 6, 8, 10, 12]
    assert gate.batches == [[1, 3], [2], [4, 5, 6]]


async def test_events_of_one_stream_fill_a_batch_up_to_its_rounds_only() -> None:
    gate = Gate()
    async with batcher(gate, max_batch=1000) as running:
        head = asyncio.create_task(running.submit(jobs(0)))
        await asyncio.sleep(0.01)
        hot = asyncio.create_task(running.submit(of("hot", *range(1, 101))))
        await waiting(running, 100)
        gate.open.set()
        await asyncio.gather(head, hot)
    assert [len(batch) for batch in gate.batches] == [1, 64, 36]
