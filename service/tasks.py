"""Background tasks: what goes on in spite of everything, and what ends for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from service.errors import StoreUnavailable

SWALLOWED_SECONDS = 0.5
"""How long a cancelled task may take to clean up before it is cancelled again."""


async def repeat(
    turn: Callable[[], Awaitable[None]], every: float, away: Callable[[StoreUnavailable], None], bug: Callable[[Exception], None]
) -> None:
    """Take a turn `every` so many seconds until cancelled. An outage of the store, which `away` is told of once, ends it as little as a
    bug, which `bug` counts and logs.
    """
    reached = True
    while True:
        await asyncio.sleep(every)
        try:
            await turn()
            reached = True
        except StoreUnavailable as error:
            if reached:
                away(error)
            reached = False
        except Exception as error:
            bug(error)


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel the task until it has ended; what it raises is dropped.

    Once is not enough: up to Python 3.11 asyncio.wait_for, which redis-py connects through, swallows a cancellation that meets its
    completion (https://github.com/python/cpython/issues/86296), and a loop around it then runs on for ever.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=SWALLOWED_SECONDS)
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not report it
