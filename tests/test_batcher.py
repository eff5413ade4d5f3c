"""Batches grow with the load, a full queue refuses at once, and nobody is hurt by a neighbour."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from service.batcher import Batcher
from service.errors import Overloaded, StoreUnavailable

Ints = Batcher[int, int]


@asynccontextmanager
async def batcher(
    handle: Callable[[list[int]], Awaitable[Sequence[int]]], *, max_batch: int = 100, max_queue: int = 1000
) -> AsyncIterator[Ints]:
    """A running batcher whose items count one event each."""
    running: Ints = Batcher(handle, size=lambda item: 1, max_batch=max_batch, max_queue=max_queue)
    running.start()
    yield running
    await running.drain(1)


class Gate:
    """A handler that doubles numbers, and waits while it is closed."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.batches: list[list[int]] = []

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.open.wait()
        return [2 * item for item in items]


async def waiting(running: Ints, count: int) -> None:
    async with asyncio.timeout(5):
        while running.queued < count:  # noqa: ASYNC110 - a test may look in
            await asyncio.sleep(0)


async def test_submissions_that_arrive_during_a_batch_form_the_next_one() -> None:
    gate = Gate()
    async with batcher(gate) as running:
        head = asyncio.create_task(running.submit([0]))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit([i])) for i in range(1, 10)]
        await waiting(running, 9)
        gate.open.set()
        assert await asyncio.gather(head, *tasks) == [[2 * i] for i in range(10)]
    assert gate.batches[0] == [0]
    assert gate.batches[1:] == [list(range(1, 10))]


async def test_a_batch_holds_no_more_than_its_limit_and_keeps_the_order() -> None:
    gate = Gate()
    gate.open.set()
    async with batcher(gate, max_batch=4) as running:
        assert await running.submit(list(range(10))) == [2 * i for i in range(10)]
    assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_a_full_queue_refuses_at_once_and_takes_all_of_a_submission_or_nothing() -> None:
    gate = Gate()
    async with batcher(gate, max_queue=5) as running:
        first = asyncio.create_task(running.submit([0]))
        await asyncio.sleep(0.01)
        waits = asyncio.create_task(running.submit([1, 2, 3]))
        await waiting(running, 3)
        with pytest.raises(Overloaded, match="3 events are waiting to be scored; the queue holds 5") as refusal:
            await running.submit([4, 5, 6])
        assert refusal.value.retry_after >= 1
        assert running.queued == 3
        gate.open.set()
        assert await first == [0]
        assert await waits == [2, 4, 6]


@pytest.mark.parametrize("leaves", range(6))
async def test_a_client_that_leaves_does_not_hurt_its_batch_mates(leaves: int) -> None:
    gate = Gate()
    async with batcher(gate) as running:
        head = asyncio.create_task(running.submit([99]))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit([i])) for i in range(6)]
        await waiting(running, 6)
        tasks[leaves].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        stayed = [task for i, task in enumerate(tasks) if i != leaves]
        assert await asyncio.gather(*stayed) == [[2 * i] for i in range(6) if i != leaves]
        assert await head == [198]
    assert leaves not in gate.batches[1], "who left before the batch began is not computed"


@pytest.mark.parametrize("leaves", range(4))
async def test_a_client_that_leaves_while_its_batch_runs_does_not_hurt_its_batch_mates(leaves: int) -> None:
    gate = Gate()
    async with batcher(gate) as running:
        head = asyncio.create_task(running.submit([99]))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(running.submit([i])) for i in range(4)]
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
    async def handle(items: list[int]) -> list[int]:
        if 13 in items:
            raise ZeroDivisionError("a bug")
        return items

    async with batcher(handle) as running:
        [failure] = await running.submit([13])
        assert isinstance(failure, ZeroDivisionError)
        assert await running.submit([1]) == [1]
        assert running.healthy


async def test_what_follows_a_failed_item_of_the_same_call_is_not_handled() -> None:
    handled: list[int] = []

    async def handle(items: list[int]) -> list[int]:
        handled.extend(items)
        if 2 in items:
            raise StoreUnavailable("down")
        return items

    async with batcher(handle, max_batch=2) as running:
        answers = await running.submit([0, 1, 2, 3, 4, 5])
    assert answers[:2] == [0, 1]
    assert all(isinstance(answer, StoreUnavailable) for answer in answers[2:])
    assert handled == [0, 1, 2, 3]


async def test_draining_finishes_what_waits_and_refuses_what_comes() -> None:
    gate = Gate()
    async with batcher(gate) as running:
        tasks = [asyncio.create_task(running.submit([i])) for i in range(3)]
        await waiting(running, 2)
        drained = asyncio.create_task(running.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="stopping"):
            await running.submit([9])
        gate.open.set()
        await drained
        assert await asyncio.gather(*tasks) == [[0], [2], [4]]
        assert not running.healthy


async def test_what_is_not_finished_by_the_deadline_is_told_so() -> None:
    gate = Gate()
    async with batcher(gate) as running:
        tasks = [asyncio.create_task(running.submit([i])) for i in range(3)]
        await waiting(running, 2)
        await running.drain(0.05)
        for [answer] in await asyncio.gather(*tasks):
            assert isinstance(answer, Overloaded)


async def test_without_its_loop_nothing_is_accepted() -> None:
    idle: Ints = Batcher(Gate(), size=lambda item: 1, max_batch=1, max_queue=1)
    assert not idle.healthy
    with pytest.raises(Overloaded):
        await idle.submit([1])
