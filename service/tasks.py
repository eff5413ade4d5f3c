"""Ending background tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

SWALLOWED_SECONDS = 0.5
"""How long a cancelled task may take to clean up before it is cancelled again."""


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
