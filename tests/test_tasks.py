"""Background tasks end, whatever swallows their cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from service import tasks


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
