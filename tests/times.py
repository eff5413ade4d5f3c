"""Time in tests: a clock that they alone move, and waiting for what others do."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds, as the test has set them."""

    def __init__(self, now: float = 1.8e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Unwaiting(asyncio.SelectorEventLoop):
    """Begins at 0 and is at its next timer at once, so that what rests for a minute is tested in none."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Unwaiting(self))

    def time(self) -> float:
        return self.now


class _Unwaiting(selectors.DefaultSelector):
    def __init__(self, loop: Unwaiting) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.now += timeout or 0.0
        return super().select(0)


async def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for a condition, which may be a coroutine's."""
    async with asyncio.timeout(seconds):
        while True:
            answer = true()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            await asyncio.sleep(0.01)


def wait(true: Callable[[], Any], seconds: float = 60) -> float:
    """The same where there is no loop; how many seconds it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + seconds
        time.sleep(0.02)
    return time.monotonic() - began
