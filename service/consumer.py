"""The queue door: receive ─► parse ─► score ─► publish ─► settle. Nothing below knows where events come from.

a batch    entries of one partition, in order; one of each partition is under way at a time
parse      an entry is one event or several (mapping.py); what is none is a dead letter, its neighbours are not; without a reading it is
           passed over
score      in order, MAX_BATCH events at most at once. Full queue, silent store, lost races: the same events again, after a while,
           and none behind them before; so nothing is lost and nothing overtakes
publish    results go to the queue before anything behind them is scored: what is delivered again after a crash is in the states' last
           commit, whose results are kept, and is published again. Not where the commit itself publishes (Redis Streams)
fuse       too large a share of the recent entries cannot be used (of one with several events, the share of these): it is the producer or
           the model, not the entries. The partition waits for a person instead of emptying itself into the dead letters
settle     dead letters written, and acknowledged what the commit has not acknowledged already
superseded another file of the model is in force (claims.py): batches are abandoned, and others have the queue until ours is again (Tap)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from service import tasks, tracing
from service.claims import StoredClaim
from service.errors import BadEvent, Fenced, ItemError, NoReading, OnsetError, Overloaded, StoreUnavailable, Superseded, no_memory
from service.events import Delivery, Published
from service.mapping import Mapper
from service.metrics import Metrics
from service.rounds import Kind
from service.scorer import MAX_BATCH, Scorer
from service.sources import MAX_EVENTS, Batch, Letter, Message, Settlement, Source

FIRST_BACKOFF, MAX_BACKOFF = 0.02, 2.0
FUSE_ENTRIES, FUSE_WINDOW = 100, 1000
"""The fuse looks at about the last FUSE_WINDOW entries, once there were FUSE_ENTRIES."""
FUSE_SECONDS = 30.0
"""After this a partition that waits looks again at what is in the queue."""
LAG_SECONDS = 2.0
BUG_ATTEMPTS = 3
"""Then the events are scored one by one, and the one that fails is a dead letter."""
_OUTCOMES = {int(Kind.SCORED): "scored", int(Kind.DUPLICATE): "duplicate", int(Kind.REPEATED): "duplicate", int(Kind.LATE): "late"}
_CONFLICT = int(Kind.CONFLICT)
"""Plain numbers, as in results.py."""

log = structlog.get_logger(__name__)


@dataclass
class _Work:
    """A batch, parsed."""

    deliveries: list[Delivery] = field(default_factory=list)
    origins: list[tuple[Message, int | None]] = field(default_factory=list)  # of each delivery: its entry, and which of several
    settlement: Settlement = field(default_factory=Settlement)
    unread: int = 0
    """Of its letters, those of what is no event: the first ones."""

    @property
    def bad(self) -> float:
        """Entries that could not be used; one of which some events could, by the share of the others."""
        letters = self.settlement.letters
        bad = Counter(letter.message.id for letter in letters)
        events = Counter(letter.message.id for letter in letters[: self.unread])
        events.update(message.id for message, _ in self.origins if message.id in bad)
        return sum(count / events[id_] for id_, count in bad.items())


class Fuse:
    """Blows when more than `share` of about the last FUSE_WINDOW entries are bad."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._recent: deque[tuple[int, float]] = deque()
        self._entries, self._bad = 0, 0.0
        self._blown: set[str] = set()

    def passes(self, partition: str, entries: int, bad: float) -> bool:
        """Whether a batch with so many bad entries, or parts of such, may go on; then it counts. One that may not is asked about again."""
        share = (self._bad + bad) / max(1, self._entries + entries)
        enough = self._entries + entries >= FUSE_ENTRIES or partition in self._blown
        if bad and enough and share > self._share:
            self._blown.add(partition)
            return False
        self._blown.discard(partition)
        self._recent.append((entries, bad))
        self._entries, self._bad = self._entries + entries, self._bad + bad
        while self._entries - self._recent[0][0] >= FUSE_WINDOW:
            old = self._recent.popleft()
            self._entries, self._bad = self._entries - old[0], self._bad - old[1]
        return True


class Consumer:
    """Feeds one scorer from one source, whose messages `mapper` reads. `fuse` is the share of bad entries that pauses a partition."""

    def __init__(
        self, source: Source, scorer: Scorer, metrics: Metrics, mapper: Mapper, *, fuse: float, fuse_seconds: float = FUSE_SECONDS
    ) -> None:
        self._source, self._scorer, self._metrics, self._mapper = source, scorer, metrics, mapper
        metrics.begin(door=[source.name], source=[source.name])
        metrics.source_paused.labels(source.name).set(0)
        metrics.source_partitions.labels(source.name).set(0)
        self._fuse, self._fuse_seconds = Fuse(fuse), fuse_seconds
        self._published: dict[str, set[str]] = {}  # of each partition's batch that is not settled yet: ids of results that are out
        self._told = False  # that the queue takes nothing
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._working: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._source.open()
        self._tasks = [asyncio.create_task(self._receive(), name="consumer"), asyncio.create_task(self._watch(), name="source-lag")]

    async def stop(self, seconds: float) -> None:
        """Receive nothing more, finish what is under way within `seconds`, let other replicas have the rest."""
        self._stopping.set()
        for task in self._tasks:
            await tasks.end(task)
        if self._working:
            await asyncio.wait(self._working, timeout=seconds)
        for task in list(self._working):
            await tasks.end(task)
        await self._source.close()
        self._metrics.source_lag.labels(self._source.name).set(0)  # nothing of it is ours

    async def _receive(self) -> None:
        while True:
            batch = await self._source.receive()
            self._metrics.source_received.labels(self._source.name).inc(len(batch.messages))
            task = asyncio.create_task(self._process(batch), name=f"batch-{batch.partition}")
            self._working.add(task)
            task.add_done_callback(self._working.discard)

    async def _watch(self) -> None:
        lag, name = self._metrics.source_lag, self._source.name
        while True:
            try:
                waiting = await self._source.lag()
                if waiting is None:
                    lag.remove(name)
                else:
                    lag.labels(name).set(waiting)
            except StoreUnavailable:
                lag.labels(name).set(float("nan"))
            except Exception as error:  # a bug must not end the watch for good; it is counted and logged
                self._metrics.bug(error, source=self._source.name)
            await asyncio.sleep(LAG_SECONDS)

    async def _process(self, batch: Batch) -> None:
        """One batch to its end; abandoned where it cannot be."""
        try:
            with tracing.receiving(self._source.name, batch.partition, len(batch.messages)):
                await self._finish(batch)
        except Fenced as error:
            log.warning("batch_fenced", partition=batch.partition, entries=len(batch.messages), reason=error.detail)
            self._source.abandon(batch)
        except Superseded:
            self._source.abandon(batch)
        except asyncio.CancelledError:
            self._source.abandon(batch)
            raise
        except Exception as error:  # the door outlives any bug; the entries are delivered again
            if no_memory(error):
                self._no_memory(batch, error)
            else:
                self._metrics.bug(error, partition=batch.partition)
            await asyncio.sleep(MAX_BACKOFF)
            self._source.abandon(batch)

    async def _finish(self, batch: Batch) -> None:
        work = self._parse(batch)
        for start in range(0, len(work.deliveries), MAX_BATCH):
            await self._score(batch, work, range(start, min(start + MAX_BATCH, len(work.deliveries))))
        if not self._may_settle(batch, work):
            await self._pause()
            self._source.abandon(batch)
            return
        self._count(Counter({"rejected": len(work.settlement.letters)}))
        await self._insist(lambda: self._source.settle(batch, work.settlement))
        self._metrics.source_acknowledged.labels(self._source.name).inc(len(batch.messages))
        self._metrics.source_dead_lettered.labels(self._source.name).inc(len(work.settlement.letters))
        self._published.pop(batch.partition, None)
        self._told = False

    async def _publish(self, batch: Batch, results: Sequence[Published]) -> None:
        """Those that are not out already, since the fuse or a failure had their batch delivered again."""
        out = self._published.setdefault(batch.partition, set())
        new = [result for result in results if result.id not in out]
        if new:
            await self._insist(lambda: self._source.publish(batch, new))
            out.update(result.id for result in new)

    async def _insist(self, call: Callable[[], Awaitable[None]]) -> None:
        """Until the queue answers."""
        backoff = FIRST_BACKOFF
        while True:
            try:
                return await call()
            except StoreUnavailable as error:
                if backoff == MAX_BACKOFF and not self._told:  # not of a moment: a topic that is missing, a right that is not given
                    self._told = True
                    log.warning("source_waits", source=self._source.name, reason=error.detail)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF)

    async def _pause(self) -> None:
        """Until it is time to look again, or to stop."""
        with self._metrics.source_paused.labels(self._source.name).track_inprogress(), contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), self._fuse_seconds)

    def _parse(self, batch: Batch) -> _Work:
        work, events = _Work(), self._mapper.events
        deliveries, origins, letters = work.deliveries, work.origins, work.settlement.letters
        source, lease = batch.source, batch.lease
        for message in batch.messages:
            try:
                items, bare = events(message)
            except OnsetError as error:
                named = error if isinstance(error, ItemError) else BadEvent(error.detail, "payload")
                letters.append(Letter(message, named))
                continue
            except Exception as error:  # a bug that one message brings out must not stop those behind it for ever
                if no_memory(error):  # no fault of the message
                    raise
                self._metrics.bug(error, partition=batch.partition)
                letters.append(Letter(message, _unexpected(error)))
                continue
            entry = message.id if bare and lease is not None else b""
            for i, item in enumerate(items):
                index = None if bare else i
                if isinstance(item, NoReading):
                    self._metrics.source_no_reading.labels(self._source.name).inc()
                    continue
                if isinstance(item, ItemError):
                    letters.append(Letter(message, item, index))
                    continue
                position = message.position * MAX_EVENTS + i if source else 0
                deliveries.append(Delivery(item, source, position, message.arrived, lease, entry))
                origins.append((message, index))
        work.unread = len(letters)
        return work

    async def _score(self, batch: Batch, work: _Work, places: Sequence[int]) -> None:
        """Score these deliveries, however long it takes; no other of the partition is under way meanwhile. Raises Fenced, Superseded."""
        backoff, bugs, told = FIRST_BACKOFF, 0, False
        while places:
            try:
                deliveries = [work.deliveries[i] for i in places]
                outcomes, results = await self._scorer.consume(
                    deliveries, f"{self._source.name}/{batch.partition}", replies=self._source.publishes
                )
            except Superseded:
                raise
            except (Overloaded, StoreUnavailable) as error:
                log.debug("batch_waits", partition=batch.partition, reason=error.detail)
            except Exception as error:  # a bug that one event brings out must not stop those behind it for ever
                if no_memory(error):
                    if not told:
                        self._no_memory(batch, error)
                    told = True
                    await asyncio.sleep(MAX_BACKOFF)
                    continue
                bugs += 1
                self._metrics.bug(error, partition=batch.partition)
                if bugs == BUG_ATTEMPTS:
                    await self._score_apart(batch, work, places, error)
                    return
            else:
                places = self._note(work, places, outcomes)
                await self._publish(batch, results)
                if not places:
                    return
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF)

    def _no_memory(self, batch: Batch, error: Exception) -> None:
        log.warning("no_memory", source=self._source.name, partition=batch.partition, entries=len(batch.messages), reason=repr(error))

    async def _score_apart(self, batch: Batch, work: _Work, places: Sequence[int], error: Exception) -> None:
        if len(places) > 1:
            for i in places:
                await self._score(batch, work, [i])
            return
        message, index = work.origins[places[0]]
        work.settlement.letters.append(Letter(message, _unexpected(error), index))

    def _note(self, work: _Work, places: Sequence[int], outcomes: Sequence[Kind | ItemError]) -> list[int]:
        """Keep what became of these; those that are to be scored again. Raises Fenced."""
        again: list[int] = []
        became = [0] * len(Kind)
        for i, outcome in zip(places, outcomes, strict=True):
            if isinstance(outcome, ItemError):
                work.settlement.letters.append(Letter(work.origins[i][0], outcome, work.origins[i][1]))
                continue
            became[outcome] += 1
            if outcome == _CONFLICT:
                again.append(i)
            elif outcome < _CONFLICT and work.deliveries[i].entry:
                work.settlement.committed.add(work.origins[i][0].id)
        counts: Counter[str] = Counter()
        for kind, name in _OUTCOMES.items():
            counts[name] += became[kind]
        self._count(counts)
        if fenced := became[Kind.FENCED]:
            raise Fenced(f"The partition was lost before {fenced} of its events were committed.")
        return again

    def _may_settle(self, batch: Batch, work: _Work) -> bool:
        """Ask the fuse. Of one that blows, the log says why."""
        bad = work.bad if work.settlement.letters else 0
        passes = self._fuse.passes(batch.partition, len(batch.messages), bad)
        if not passes:
            first = work.settlement.letters[0]
            log.error(
                "source_paused",
                partition=batch.partition,
                bad_entries=round(bad, 1),
                of=len(batch.messages),
                first=first.message.id.decode(),
                reason=first.error.detail,
                again_in_seconds=self._fuse_seconds,
            )
        return passes

    def _count(self, outcomes: Counter[str]) -> None:
        for outcome, count in outcomes.items():
            self._metrics.events.labels(self._source.name, outcome).inc(count)


class Tap:
    """Reads a source while its model's file is in force, each time by a consumer of its own; in between others have its partitions."""

    def __init__(self, make: Callable[[], Consumer], claim: StoredClaim, metrics: Metrics, seconds: float) -> None:
        """`make` is called now for the first time: what is wrong with a source's settings is raised here. `seconds` as of Consumer.stop."""
        self._make, self._claim, self._metrics, self._seconds = make, claim, metrics, seconds
        self._made: Consumer | None = make()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="tap")

    async def stop(self) -> None:
        """As Consumer.stop."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while await self._until(self._claim.in_force):
            try:
                consumer, self._made = self._made or self._make(), None
                await consumer.start()
                await self._until(self._claim.superseded)
                await consumer.stop(self._seconds)
            except Exception as error:  # a bug must not end the reading for good; it is counted and logged
                self._metrics.bug(error, task="tap")
                await asyncio.sleep(MAX_BACKOFF)

    async def _until(self, event: asyncio.Event) -> bool:
        """Whether it has come, and no stop before it."""
        waits = [asyncio.create_task(one.wait()) for one in (event, self._stopping)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return not self._stopping.is_set()


def _unexpected(error: Exception) -> ItemError:
    return ItemError(f"An unexpected error: {type(error).__name__}; it is in the log.")
