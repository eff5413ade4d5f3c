"""Collects submissions of concurrent clients into batches. Knows no store, model or HTTP.

    submit(items, sender) ──► a bounded queue for each sender ──► one loop: senders in turn, up to `max_batch` ──► handle(items) ──► answers
                                  │ full                             up to `depth` batches at once
                                  └──► Overloaded, at once

While batches are handled the next one gathers, so batches grow with the load. A batch of few costs nearly what one of many does, so few
items begin one only where the processor has nothing else to do, once those that were just answered have had a moment to join.

Two items that touch the same stream are never handled at once, and never in another order than they were submitted in by one sender; an
item that must wait for such a one is passed over. A long item (many events of one stream, hence many steps one after the other) shares
a batch with other long ones alone, one such batch at a time, so that it holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar, cast

import structlog

from service import tasks
from service.errors import OnsetError, Overloaded, no_memory

LOOK_AHEAD = 64
"""How many items of one sender are passed over at most for one that is free."""
LONG_ROUNDS = 64
"""Steps one after the other that a batch takes at most; an item that takes more by itself is long."""
LONGER = 2
"""Times the steps of its first item that a batch of long ones may take: so much longer that one waits for others at most."""
SHORT_BATCHES = 2
"""At once, long ones aside, where one of them is of few streams: it is computed while the other waits, for the store."""
SLOW_SECONDS = 0.010
"""How long a batch of few waits before another of few is begun beside it: two cost twice what one of both does, so the store's answer
is waited for, but not that of a slow one."""
LINGER_SECONDS, RETURN_SECONDS = 0.001, 0.010
"""How long after the last one nobody else is expected to join, and how long after its answer a client is expected at all."""
STUCK_SECONDS = 60.0
"""A batch that takes longer than this means the loop is not alive."""

log = structlog.get_logger(__name__)


class Work(Protocol):
    """What an item says of itself."""

    @property
    def events(self) -> int: ...

    @property
    def streams(self) -> AbstractSet[str]:
        """What it touches."""

    @property
    def rounds(self) -> int:
        """Steps that must be taken one after the other: events of its busiest stream."""


Waits = Callable[[], None]
Item = TypeVar("Item", bound=Work)
Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    future: asyncio.Future[Answer]
    later: Sequence[asyncio.Future[Answer]]
    """The items queued behind it by the same call: they must not be handled once this one has failed."""

    def fail(self, error: Exception) -> None:
        for future in (self.future, *self.later):
            if not future.done():
                future.set_exception(error)


@dataclass(eq=False)
class _Sender(Generic[Item, Answer]):
    waiting: deque[_Waiting[Item, Answer]] = field(default_factory=deque)
    queued: int = 0
    """Events."""


@dataclass(eq=False)
class _Batch(Generic[Item, Answer]):
    members: list[_Waiting[Item, Answer]] = field(default_factory=list)
    streams: set[str] = field(default_factory=set)
    events: int = 0
    rounds: int = 0
    makes_room: bool = False
    """A batch of few streams may be begun beside it."""
    began: float = field(default_factory=time.monotonic)

    @property
    def long(self) -> bool:
        return self.rounds > LONG_ROUNDS

    def with_(self, item: Item) -> int:
        """Rounds of this batch and the item."""
        return max(self.rounds, item.rounds) if self.streams.isdisjoint(item.streams) else self.rounds + item.rounds

    def add(self, waiting: _Waiting[Item, Answer]) -> None:
        self.members.append(waiting)
        self.rounds = self.with_(waiting.item)
        self.streams |= waiting.item.streams
        self.events += waiting.item.events


class Batcher(Generic[Item, Answer]):
    """One owner of all queues. `handle` gets some items and returns one answer for each, in order; it calls what it is given with them
    once all that is left to do is wait for others.

    An error of `handle` fails the items of that batch and no others. A client that left (its task was cancelled) is dropped before
    its item is handled; once handled, its answer is thrown away and its batch-mates do not notice.
    """

    def __init__(
        self,
        handle: Callable[[list[Item], Waits], Awaitable[Sequence[Answer]]],
        *,
        max_batch: int,
        max_streams: int,
        max_queue: int,
        depth: int = 1,
        gather: int = 1,
    ) -> None:
        """`max_batch` and `max_queue` are in events, `depth` in batches handled at once.

        Items share a batch up to `max_batch` events and `max_streams` streams. Fewer than `gather` streams are few: each batch and
        each of its rounds has a fixed cost, and few streams are answered sooner by sharing the next one than by one of their own
        beside another short batch that is computed.
        """
        self._handle = handle
        self._max_batch, self._max_streams = max_batch, max_streams
        self._max_queue = max_queue
        self._depth = depth
        self._gather = gather
        self._senders: OrderedDict[str, _Sender[Item, Answer]] = OrderedDict()
        """In the order of their next turn; only those that wait for something."""
        self._queued = self._queued_streams = 0
        self._expected, self._answered_at = 0, -math.inf
        """Events that are queued once all who were answered lately have sent as many again, and when the last were."""
        self._running: dict[asyncio.Task[None], _Batch[Item, Answer]] = {}
        self._busy: set[str] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def queued(self) -> int:
        """Events that wait."""
        return self._queued

    @property
    def healthy(self) -> bool:
        """Whether the loop runs and no batch is stuck."""
        running = self._task is not None and not self._task.done()
        return running and all(time.monotonic() - batch.began < STUCK_SECONDS for batch in self._running.values())

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="batcher")

    def queue(self, items: Sequence[Item], sender: str = "", *, admitted: bool = False) -> list[asyncio.Future[Answer]]:
        """Where the answers of all items will be, or the error that `handle` raised for one.

        All are queued, in order, or none: raises Overloaded at once when the queue is full. One sender may fill half of what the
        others leave free, so that however much it sends there is room for the next one. When an item fails, those after it fail
        with it and are not handled, so that sending all of them again keeps their order. What was `admitted` before is not refused.
        """
        if self._stopping or self._task is None or self._task.done():
            raise Overloaded("The service is stopping and takes no more events.", retry_after=2)
        events = sum(item.events for item in items)
        mine = self._senders.get(sender) or _Sender()
        # Dynamic threshold (Choudhury & Hahne 1998). An empty queue takes anything.
        if self._queued and not admitted and mine.queued + events > self._max_queue - self._queued:
            raise Overloaded(
                f"{self._queued} events are waiting to be scored, {mine.queued} of them from this sender; the queue holds "
                f"{self._max_queue}, and one sender may take half of what the others leave.",
                retry_after=1,
            )
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in items]
        for i, item in enumerate(items):
            mine.waiting.append(_Waiting(item, futures[i], futures[i + 1 :]))
        mine.queued += events
        self._queued += events
        self._queued_streams += sum(len(item.streams) for item in items)
        if items:
            self._senders[sender] = mine
            self._idle.clear()
            self._wake.set()
        return futures

    async def submit(self, items: Sequence[Item], sender: str = "", *, admitted: bool = False) -> list[Answer | Exception]:
        """Wait for the answers of all items, or the error that `handle` raised for one. As `queue`."""
        futures = self.queue(items, sender, admitted=admitted)
        if len(futures) == 1:  # as `gather` would, which costs as much as all of this
            try:
                return [await futures[0]]
            except Exception as error:
                return [error]
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
                self._wake.clear()
                if self._may_begin:
                    await self._company()
                self._start_batches()
        finally:
            for task in list(self._running):
                await tasks.end(task)
            for sender in self._senders.values():
                self._fail(sender.waiting, Overloaded("The service stopped before this was scored.", retry_after=2))
            self._senders.clear()
            self._queued = self._queued_streams = 0

    @property
    def _few(self) -> bool:
        return self._queued_streams < self._gather

    @property
    def _may_begin(self) -> bool:
        """Whether a batch may be begun beside those that run."""
        if len(self._running) == self._depth:
            return False
        short = [batch for batch in self._running.values() if not batch.long]
        return not self._few or (len(short) < SHORT_BATCHES and all(batch.makes_room for batch in short))

    async def _company(self) -> None:
        """Let those that were just answered join again, as long as they keep coming, and others with them."""
        queued, patience = 0, 0.0
        while self._few and 0 < self._queued < self._expected and (now := time.monotonic()) < self._answered_at + RETURN_SECONDS:
            if self._queued != queued:
                queued, patience = self._queued, now + LINGER_SECONDS
            elif now > patience:
                break
            await asyncio.sleep(0)

    def _start_batches(self) -> None:
        while self._may_begin:
            batch = self._take()
            if not batch.members:
                break
            self._busy |= batch.streams
            self._expected -= batch.events
            task = asyncio.create_task(self._answer(batch), name="batch")
            self._running[task] = batch
            task.add_done_callback(self._ended)
        if not self._senders and not self._running:
            self._idle.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._busy -= self._running.pop(task).streams  # batches that run at once share no stream
        self._wake.set()

    def _take(self) -> _Batch[Item, Answer]:
        """The next batch: whole items, senders in turn, each sender's in order but for those that have to wait."""
        batch: _Batch[Item, Answer] = _Batch()
        passed: set[str] = set()
        turns = deque(self._senders)
        while turns:
            name = turns.popleft()
            sender = self._senders[name]
            taken = self._first_free(sender, batch, passed)
            if taken is not None:
                batch.add(taken)
            if not sender.waiting:
                del self._senders[name]
            elif taken is not None:
                self._senders.move_to_end(name)
                turns.append(name)
        return batch

    def _first_free(self, sender: _Sender[Item, Answer], batch: _Batch[Item, Answer], passed: set[str]) -> _Waiting[Item, Answer] | None:
        """Take the sender's first item that may join the batch out of its queue; `passed` gets the streams of those that must wait."""
        place = 0
        while place < min(len(sender.waiting), LOOK_AHEAD):
            waiting = sender.waiting[place]
            gone = waiting.future.done()  # its client left
            if gone or self._joins(waiting.item, batch, passed):
                del sender.waiting[place]
                sender.queued -= waiting.item.events
                self._queued -= waiting.item.events
                self._queued_streams -= len(waiting.item.streams)
                if not gone:
                    return waiting
            else:
                passed |= waiting.item.streams
                place += 1
        return None

    def _joins(self, item: Item, batch: _Batch[Item, Answer], passed: set[str]) -> bool:
        if not (self._busy.isdisjoint(item.streams) and passed.isdisjoint(item.streams)):
            return False
        if batch.members:
            if batch.events + item.events > self._max_batch or len(batch.streams) + len(item.streams) > self._max_streams:
                return False
            if batch.long and item.rounds > LONG_ROUNDS and batch.streams.isdisjoint(item.streams):
                return item.rounds <= LONGER * batch.members[0].item.rounds  # steps of several streams take hardly longer than of one
            return batch.with_(item) <= LONG_ROUNDS
        return item.rounds <= LONG_ROUNDS or not any(other.long for other in self._running.values())

    async def _answer(self, batch: _Batch[Item, Answer]) -> None:
        members = batch.members
        try:
            answers = await self._handle([waiting.item for waiting in members], partial(self._waits, batch))
        except OnsetError as error:
            self._fail(members, error)
        except Exception as error:  # the loop outlives any bug in a batch; the batch's clients are told
            if (lack := no_memory(error)) is None:
                log.exception("batch_failed", items=len(members))
            self._fail(members, lack or error)
        except BaseException:
            self._fail(members, Overloaded("The service stopped before this was scored.", retry_after=2))
            raise
        else:
            self._expect(batch.events)
            for waiting, answer in zip(members, answers, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(answer)

    def _expect(self, events: int) -> None:
        """So many are about to be answered."""
        now = time.monotonic()
        lately = self._expected if now < self._answered_at + RETURN_SECONDS else 0
        self._expected, self._answered_at = max(lately, self._queued) + events, now

    def _waits(self, batch: _Batch[Item, Answer]) -> None:
        """All that is left of it is to wait."""
        if len(batch.streams) < self._gather:
            asyncio.get_running_loop().call_later(SLOW_SECONDS, self._makes_room, batch)
        else:
            self._makes_room(batch)

    def _makes_room(self, batch: _Batch[Item, Answer]) -> None:
        batch.makes_room = True
        self._wake.set()

    @staticmethod
    def _fail(batch: Iterable[_Waiting[Item, Answer]], error: Exception) -> None:
        for waiting in batch:
            waiting.fail(error)
