"""Background tasks: what goes on in spite of everything, and what ends for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from service.errors import StoreUnavailable

SWALLOWED_SECONDS = 0.5
"""How long a cancelled task may take to clean up before it is cancelled again."""
REST, LONGEST_REST = 4.0, 1.0
"""After it was made, what is made for many rests for so many times as long as that took, and for so many seconds at most."""

Made = TypeVar("Made")


class Together(Generic[Made]):
    """What takes long to `make`, for all who ask: at a time it is made once, and whoever asks before that begins gets it, too.

    Be it asked for by a thousand, who may have left meanwhile: what takes up to a quarter of a second has the loop or a processor for a
    fifth of the time at most, and what takes longer leaves it a second in between.
    """

    def __init__(self, make: Callable[[], Awaitable[Made]]) -> None:
        self._make, self._one = make, asyncio.Lock()
        self._next: asyncio.Task[Made] | None = None
        self._rests_until = 0.0

    async def get(self) -> Made:
        """As it is from now on, never as it was before."""
        if self._next is None:
            self._next = asyncio.create_task(self._made())
        return await asyncio.shield(self._next)

    async def _made(self) -> Made:
        loop = asyncio.get_running_loop()
        async with self._one:
            await asyncio.sleep(max(0.0, self._rests_until - loop.time()))
            self._next, began = None, loop.time()
            try:
                return await self._make()
            finally:
                self._rests_until = loop.time() + min(REST * (loop.time() - began), LONGEST_REST)


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
