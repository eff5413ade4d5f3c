"""What sources outside the state store share: partitions whose messages wait here, and batches of them, one under way at a time.

All of it lives in the event loop; only `waiting` is added to from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import structlog

from service.errors import Fenced
from service.metrics import Metrics
from service.sources import Batch, Message

AHEAD = 4
"""Batches of a partition that wait at most; at half of them more is asked for."""
BATCH_BYTES = 4 * 1024 * 1024
"""Of one batch's payloads; a larger message is a batch by itself."""
HANDOVER_SECONDS = 10.0
"""How long what is under way may take once its partition is asked back."""

log = structlog.get_logger(__name__)


class Partition:
    """One partition while it is ours."""

    def __init__(self, name: str, identity: int, settled: int) -> None:
        """`settled` is the position up to which all is done."""
        self.name, self.identity, self.settled = name, identity, settled
        self.waiting: deque[Message] = deque()
        self._added = self._removed = 0  # bytes; each is counted on one side alone
        self.batch: Batch | None = None
        """Handed out, or to be."""
        self.received = False
        self.free = asyncio.Event()
        """Nothing is under way."""
        self.free.set()
        self.leaving = False

    @property
    def bytes(self) -> int:
        """Of the payloads that wait."""
        return self._added - self._removed

    def full(self, batch: int) -> bool:
        """Whether as much waits as may."""
        return len(self.waiting) >= AHEAD * batch or self.bytes >= AHEAD * BATCH_BYTES

    def low(self, batch: int) -> bool:
        return 2 * len(self.waiting) <= AHEAD * batch and 2 * self.bytes <= AHEAD * BATCH_BYTES

    def add(self, message: Message) -> None:
        self._added += len(message.payload or b"")
        self.waiting.append(message)

    def take(self, most: int) -> list[Message]:
        """The next messages, for one batch."""
        taken: list[Message] = []
        size = 0
        while self.waiting and len(taken) < most:
            length = len(self.waiting[0].payload or b"")
            if taken and size + length > BATCH_BYTES:
                break
            taken.append(self.waiting.popleft())
            size += length
        self._removed += size
        return taken

    def give_back(self, messages: Sequence[Message]) -> None:
        self.waiting.extendleft(reversed(messages))
        self._removed -= sum(len(message.payload or b"") for message in messages)

    def forget(self) -> None:
        """All that waits."""
        while self.waiting:
            self.take(len(self.waiting))


P = TypeVar("P", bound=Partition)


class Partitions(Generic[P]):
    """The partitions of one source, and the batches that are ready."""

    def __init__(self, source: str, metrics: Metrics, batch: int) -> None:
        """`batch` = messages of one at most."""
        self._source, self._metrics, self._most = source, metrics, batch
        self._ready: asyncio.Queue[Batch] = asyncio.Queue()  # holds one batch a partition at most
        self._owned: dict[str, P] = {}

    @property
    def owned(self) -> list[P]:
        return list(self._owned.values())

    @property
    def names(self) -> list[str]:
        return sorted(self._owned)

    def own(self, partitions: Iterable[P]) -> None:
        for partition in partitions:
            self._owned[partition.name] = partition
            log.info("partition_taken", source=self._source, partition=partition.name, owned=len(self._owned))
        self._count()

    def offer(self, partition: P) -> None:
        """A batch, unless one is under way."""
        if partition.leaving or partition.batch is not None or not partition.waiting:
            return
        partition.batch = Batch(partition.name, partition.identity, partition.take(self._most))
        partition.free.clear()
        self._ready.put_nowait(partition.batch)

    async def receive(self) -> Batch:
        while True:
            batch = await self._ready.get()
            partition = self.of(batch)
            if partition is not None:
                partition.received = True
                return batch

    def settle(self, batch: Batch) -> None:
        """All of the batch is done. Raises Fenced."""
        partition = self.ours(batch)
        partition.settled = batch.messages[-1].position
        self._done(partition)

    def abandon(self, batch: Batch) -> None:
        """Its messages come again, before all others; where the partition is another's by now, there."""
        partition = self.of(batch)
        if partition is not None:
            partition.give_back(batch.messages)
            self._done(partition)

    async def release(self, partitions: Sequence[P]) -> None:
        """They are to be another's: nothing more of them is handed out, and what is under way ends within HANDOVER_SECONDS."""
        for partition in partitions:
            partition.leaving = True
            partition.forget()
            if not partition.received:
                self._done(partition)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANDOVER_SECONDS):
                for partition in partitions:
                    await partition.free.wait()
        self._disown(partitions)
        for partition in partitions:
            log.info("partition_released", source=self._source, partition=partition.name, owned=len(self._owned))

    def lose(self, partitions: Sequence[P]) -> None:
        """They are another's already: what is under way is Fenced."""
        self._metrics.source_fenced.labels(self._source).inc(len(partitions))
        self._disown(partitions)
        for partition in partitions:
            log.warning("partition_lost", source=self._source, partition=partition.name, owned=len(self._owned))

    def of(self, batch: Batch) -> P | None:
        """The partition of a batch, while it is ours."""
        partition = self._owned.get(batch.partition)
        return partition if partition is not None and partition.batch is batch else None

    def ours(self, batch: Batch) -> P:
        """Raises Fenced."""
        partition = self.of(batch)
        if partition is None:
            raise Fenced(f"Partition '{batch.partition}' is another replica's by now.")
        return partition

    def _done(self, partition: P) -> None:
        partition.batch, partition.received = None, False
        partition.free.set()
        self.offer(partition)

    def _disown(self, partitions: Iterable[P]) -> None:
        for partition in partitions:
            partition.leaving = True
            partition.forget()
            if self._owned.get(partition.name) is partition:
                del self._owned[partition.name]
        self._count()

    def _count(self) -> None:
        self._metrics.source_partitions.labels(self._source).set(len(self._owned))
