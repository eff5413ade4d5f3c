"""Time in tests: a clock that they alone move, and waiting for what others do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds, as the test has set them."""

    def __init__(self, now: float = 1.8e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


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
