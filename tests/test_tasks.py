"""Background tasks go on through outages and bugs, and end, whatever swallows their cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from service import tasks
from service.errors import StoreUnavailable
from tests.times import Unwaiting


@pytest.mark.parametrize("swallowed", [0, 1, 3])
async def test_a_task_ends_even_if_what_it_awaits_swallows_cancellations(swallowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SWALLOWED_SECONDS", 0.01)
    left = swallowed

    async def loops() -> None:
        nonlocal left
        while True:
            with contextlib.suppress(asyncio.CancelledError) if left else contextlib.nullcontext():
                await asyncio.sleep(3600)
            left -= 1

    task = asyncio.create_task(loops())
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await tasks.end(task)
    assert task.cancelled()
    assert left == 0


async def test_a_task_that_failed_before_is_ended_quietly() -> None:
    async def fails() -> None:
        raise ValueError("early")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    await tasks.end(task)
    assert task.done()


async def test_turns_are_taken_through_outages_and_bugs_and_each_outage_is_told_once() -> None:
    away, gone = StoreUnavailable("away"), ValueError("a bug")
    coming: list[Exception | None] = [away, away, away, gone, away, None, away, None]
    told: list[Exception] = []
    over = asyncio.Event()

    async def turn() -> None:
        if not coming:
            over.set()
        elif (error := coming.pop(0)) is not None:
            raise error

    task = asyncio.create_task(tasks.repeat(turn, 0.001, told.append, told.append))
    async with asyncio.timeout(20):
        await over.wait()
    await tasks.end(task)
    assert told == [away, gone, away]


async def test_what_many_ask_for_is_made_once_for_those_who_asked_before_it_began() -> None:
    made, began, gate = 0, asyncio.Event(), asyncio.Event()

    async def make() -> int:
        nonlocal made
        made += 1
        began.set()
        await gate.wait()
        return made

    together = tasks.Together(make)
    first = [asyncio.create_task(together.get()) for _ in range(100)]
    await asyncio.wait_for(began.wait(), 20)
    later = [asyncio.create_task(together.get()) for _ in range(100)]  # who want it as it is from now on
    await asyncio.sleep(0)
    for left in (first[0], later[0]):
        left.cancel()
    gate.set()
    async with asyncio.timeout(20):
        assert set(await asyncio.gather(*first[1:])) == {1}
        assert set(await asyncio.gather(*later[1:])) == {2}
    assert made == 2


async def test_what_fails_fails_for_all_who_asked_and_is_made_again() -> None:
    coming: list[Exception | None] = [ValueError("once"), None]

    async def make() -> str:
        if (error := coming.pop(0)) is not None:
            raise error
        return "made"

    together = tasks.Together(make)
    async with asyncio.timeout(20):
        failed = await asyncio.gather(*(together.get() for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in failed] == ["once"] * 3
        assert await together.get() == "made"


def test_it_rests_four_times_as_long_as_it_took_and_a_second_at_most() -> None:
    takes, began = [0.05, 0.25, 0.5, 30.0, 0.0, 0.0], list[float]()

    async def make() -> None:
        began.append(asyncio.get_running_loop().time())
        await asyncio.sleep(takes[len(began) - 1])

    async def ask() -> None:
        together = tasks.Together(make)
        for _ in takes:
            await together.get()

    with asyncio.Runner(loop_factory=Unwaiting) as runner:
        runner.run(ask())
    assert began == pytest.approx([0.0, 0.25, 1.5, 3.0, 34.0, 34.0])
