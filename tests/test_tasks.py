"""Background tasks go on through outages and bugs, and end, whatever swallows their cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from service import tasks
from service.errors import StoreUnavailable


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
    coming: list[Exception | None] = [away, away, gone, away, None, away, None]
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
