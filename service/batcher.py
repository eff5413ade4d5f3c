"""Collects submissions of concurrent clients into batches. Knows no store, model or HTTP.

    submit(item) ──► bounded queue ──► one loop: take all that waits, up to `max_batch`  ──► handle(items) ──► each client its answer
                         │ full
                         └──► Overloaded, at once

While a batch is handled the next one gathers, so batches grow with the load and nobody waits for company.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import structlog

from service import tasks
from service.errors import OnsetError, Overloaded

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    future: asyncio.Future[Answer]
    later: Sequence[asyncio.Future[Answer]]
    """The items queued behind it by the same call: they must not be handled once this one has failed."""

    def fail(self, error: Exception) -> None:
        for future in (self.future, *self.later):
            if not future.done():
                future.set_exception(error)


STUCK_SECONDS = 60.0
"""A batch that takes longer than this means the loop is not alive."""

log = structlog.get_logger(__name__)


class Batcher(Generic[Item, Answer]):
    """One owner of one queue. `handle` gets some items and returns one answer for each, in order.

    An error of `handle` fails the items of that batch and no others. A client that left (its task was cancelled) is dropped before
    its item is handled; once handled, its answer is thrown away and its batch-mates do not notice.
    """

    def __init__(
        self,
        handle: Callable[[list[Item]], Awaitable[Sequence[Answer]]],
        *,
        size: Callable[[Item], int],
        max_batch: int,
        max_queue: int,
    ) -> None:
        """`size` of an item, `max_batch` and `max_queue` are in events."""
        self._handle = handle
        self._size = size
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._queued = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self._stopping = False

    @property
    def queued(self) -> int:
        """Events that wait."""
        return self._queued

    @property
    def healthy(self) -> bool:
        """Whether the loop runs and its current batch is not stuck."""
        running = self._task is not None and not self._task.done()
        return running and (self._busy_since is None or time.monotonic() - self._busy_since < STUCK_SECONDS)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="batcher")

    async def submit(self, items: Sequence[Item]) -> list[Answer | Exception]:
        """Wait for the answers of all items, or the error that `handle` raised for one.

        All are queued, in order, or none: raises Overloaded at once when the queue is full. When one fails, those after it
        fail with it and are not handled, so that sending all of them again keeps their order.
        """
        if self._stopping or self._task is None or self._task.done():
            raise Overloaded("The service is stopping and takes no more events.", retry_after=2)
        events = sum(self._size(item) for item in items)
        if self._queued and self._queued + events > self._max_queue:  # an empty queue takes anything
            raise Overloaded(f"{self._queued} events are waiting to be scored; the queue holds {self._max_queue}.", retry_after=1)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in items]
        self._waiting.extend(_Waiting(item, future, futures[i + 1 :]) for i, (item, future) in enumerate(zip(items, futures, strict=True)))
        self._queued += events
        self._idle.clear()
        self._wake.set()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        return cast("list[Answer | Exception]", answers)  # futures fail with Exceptions only, see _fail

    async def drain(self, seconds: float) -> None:
        """Take nothing more, finish what waits within `seconds`, then stop; what is left fails with Overloaded."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        if self._task is not None:
            await tasks.end(self._task)

    async def _run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                batch = self._take()
                if batch:
                    await self._answer(batch)
                if not self._waiting:
                    self._wake.clear()
                    self._idle.set()
        finally:
            self._fail(self._waiting, Overloaded("The service stopped before this was scored.", retry_after=2))
            self._waiting.clear()
            self._queued = 0

    def _take(self) -> list[_Waiting[Item, Answer]]:
        """The next batch: whole items in order of arrival, at least one; clients that left are dropped."""
        batch: list[_Waiting[Item, Answer]] = []
        events = 0
        while self._waiting:
            first = self._waiting[0]
            size = self._size(first.item)
            if batch and events + size > self._max_batch:
                break
            self._waiting.popleft()
            self._queued -= size
            if not first.future.done():
                batch.append(first)
                events += size
        return batch

    async def _answer(self, batch: list[_Waiting[Item, Answer]]) -> None:
        self._busy_since = time.monotonic()
        try:
            answers = await self._handle([waiting.item for waiting in batch])
        except OnsetError as error:
            self._fail(batch, error)
        except Exception as error:  # the loop outlives any bug in a batch; the batch's clients are told
            log.exception("batch_failed", items=len(batch))
            self._fail(batch, error)
        except BaseException:
            self._fail(batch, Overloaded("The service stopped before this was scored.", retry_after=2))
            raise
        else:
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(answer)
        finally:
            self._busy_since = None

    @staticmethod
    def _fail(batch: Iterable[_Waiting[Item, Answer]], error: Exception) -> None:
        for waiting in batch:
            waiting.fail(error)
