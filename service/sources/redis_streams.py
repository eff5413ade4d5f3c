"""Redis Streams in the state store's own server: the queue whose entries are acknowledged by the commit that scored them.

Keys (each name once, here):

    onset:events                     the partition, where there is one (the name is a setting)
    onset:events:{0}, :{1}, …        the partitions, where there are several; a stream's entries all go to one of them
    {onset:events}:lease             who owns the partition, a token that expires; onset:events:{0}:lease, …
    {onset:events}:members           live replicas, a sorted set by when they are taken for dead
    {onset:events}:changes           the last change of members or leases, a stream of one entry that all wait on
    onset:dead-letters               what could not be used: the entry's own fields, and onset_reason, onset_field, onset_value, …

    keeper    attend (heartbeat, wakes the others) ─► renew what is ours ─► too many: release    too few: take what is free ─► wait
    partition take ─► claim all that its former owner left, in its order ─► read new entries ─► wait for more (XREAD BLOCK, a signal only)
                └── anything went wrong, or a batch was abandoned: what is under way ends, then claim again

A partition has one owner at a time, which alone can read from it, commit its events or settle them (streams.lua, stores/commit.lua): one
that was taken for dead and goes on is refused by the server. So entries are scored in their order, and a position in a stream's state
says exactly which of them were.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from service import tasks
from service.errors import Fenced, StoreUnavailable
from service.events import Lease, Published
from service.metrics import Metrics
from service.refusals import refusal
from service.sources import POSITIONS, Batch, Letter, Message, Settlement, identity
from service.sources.options import RedisStreamsSource

LIBRARY = Path(__file__).with_name("streams.lua")
VERSION = "v3"
"""Of the functions in the library, renamed together whenever their arguments change."""
GROUP_GONE = 2
"""What `hold` of the library says of a group that it had to make again."""
_UNANSWERED = (RedisError, OSError, RuntimeError)
"""As of the store, see stores/redis.py."""
TIMEOUT_SECONDS = 4.0
"""Longer than any call blocks."""
BLOCK_MS = 2000
FIRST_BACKOFF, MAX_BACKOFF = 0.05, 2.0
MS_BITS, SEQUENCE_BITS = 43, 36
"""Of an entry's id within its position: milliseconds up to the year 2248."""
EVENT = b"event"
"""The field with one event or several; without it the fields are those of one."""
MOST_FIELDS = 3000
"""Of an entry's own in its dead letter: a function can hand some 4,000 to a command."""
EARLIEST_MS = 10**12
"""Ids from here on (2001) are times, as `*` makes them."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Keys:
    """Of a queue, by the key and the number of partitions that are declared."""

    key: str
    partitions: int

    def partition(self, index: int) -> str:
        return self.key if self.partitions == 1 else f"{self.key}:{{{index}}}"

    def lease(self, index: int) -> str:
        return _beside(self.partition(index), "lease")

    @property
    def members(self) -> str:
        return _beside(self.key, "members")

    @property
    def changes(self) -> str:
        return _beside(self.key, "changes")


class RedisStreams:
    """Implements Source. `clock` gives seconds since 1970."""

    publishes = False

    def __init__(self, url: str, declared: RedisStreamsSource, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        """`url` as redis-py takes it; the server must be the state store's."""
        self.name = declared.called
        self.declared, self._metrics, self.clock = declared, metrics, clock
        self.keys = Keys(declared.key, declared.partitions)
        self.lease_ms = round(1000 * declared.lease_seconds)
        self._pool = redis.BlockingConnectionPool.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            max_connections=2 * declared.partitions + 8,
            timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        self._client = redis.Redis.from_pool(self._pool)
        self.member = uuid.uuid4().hex[:16]
        self._leases = 0
        self._owned: dict[int, _Partition] = {}
        self._ready: asyncio.Queue[Batch] = asyncio.Queue()  # holds one batch a partition at most
        self._keeper: asyncio.Task[None] | None = None
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def partitions(self) -> list[int]:
        """Those that are ours, as far as we know."""
        return sorted(self._owned)

    async def open(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name="streams-keeper")

    async def receive(self) -> Batch:
        return await self._ready.get()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        raise RuntimeError("Results of Redis Streams are published by the commit: this is a bug.")

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        lease = _lease_of(batch)
        ids = [message.id for message in batch.messages if message.id not in settlement.committed]
        if ids or settlement.letters:
            letters = [part for letter in settlement.letters for part in _letter(batch, letter)]
            arguments = [lease.group, int(lease.keep), self.declared.max_dead_letters, len(ids), *ids, *letters]
            if await self.call("settle", [lease.stream, lease.key, self.declared.dead_letters], lease.token, *arguments) is None:
                raise Fenced(f"Partition '{batch.partition}' is another replica's by now.")
        if partition := self._of(batch):
            partition.done()

    def abandon(self, batch: Batch) -> None:
        if partition := self._of(batch):
            partition.start_again()

    async def lag(self) -> int | None:
        declared, owned = self.declared, self.partitions

        async def ask() -> list[Any]:
            async with self._client.pipeline(transaction=False) as pipeline:
                for index in owned:
                    if declared.keep:
                        pipeline.xinfo_groups(self.keys.partition(index))
                    else:
                        pipeline.xlen(self.keys.partition(index))
                return await pipeline.execute()

        answers = await self.ask(ask) if owned else []
        if not declared.keep:
            return sum(map(int, answers))
        groups = [group for answer in answers for group in answer if group["name"] == declared.group.encode()]
        if any(group["lag"] is None for group in groups):
            return None
        return sum(int(group["lag"]) + int(group["pending"]) for group in groups)

    async def close(self) -> None:
        if self._keeper is not None:
            await tasks.end(self._keeper)
        while not self._ready.empty():
            self.abandon(self._ready.get_nowait())
        staying = [partition for partition in self._owned.values() if not partition.leaving]
        for partition in staying:  # at once: what its reader hands out from here on nobody receives, and it would be waited for
            partition.leaving = True
        releases = [asyncio.create_task(self._release(partition)) for partition in staying]
        if releases or self._releases:
            await asyncio.wait([*releases, *self._releases])
        with contextlib.suppress(StoreUnavailable):
            await self.ask(lambda: self._client.zrem(self.keys.members, self.member))
            await self._tell()
        await self._client.aclose()
        await self._pool.disconnect()

    # ── the keeper ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Heartbeat, and our share of the partitions, until cancelled."""
        failed = False
        while True:
            try:
                keys = [self.keys.members, self.keys.changes]
                members, rank, last = await self.call("attend", keys, self.member, self.lease_ms)
                await self._share(members, rank)
                failed = False
                await self.wait(self.keys.changes, last, self.lease_ms // 3)
            except StoreUnavailable as error:
                if not failed:
                    log.warning("streams_unavailable", error=error.detail)
                failed = True
                await asyncio.sleep(min(MAX_BACKOFF, self.declared.lease_seconds / 3))
            except Exception as error:  # a bug must not end the heartbeat for good; it is counted and logged
                self.bug(error)
                await asyncio.sleep(MAX_BACKOFF)

    async def _share(self, members: int, rank: int) -> None:
        """Renew, release or take, so that every live member has the same number of partitions, give or take one."""
        count = self.declared.partitions
        target = count // members + (rank < count % members)
        for partition in list(self._owned.values()):
            if not await partition.hold(take=False) and not partition.leaving:
                self._lose(partition)
        staying = [partition for partition in self._owned.values() if not partition.leaving]
        for partition in staying[target:]:
            partition.leaving = True
            task = asyncio.create_task(self._release(partition), name=f"release-{partition.key}")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
        wanted = target - len(staying)
        for index in (rank * count // members + i for i in range(count)):
            if wanted <= 0:
                break
            wanted -= await self._take(index % count)

    async def _take(self, index: int) -> bool:
        if index in self._owned:
            return False
        self._leases += 1
        partition = _Partition(self, index, f"{self.member}#{self._leases}")
        if not await partition.hold(take=True):
            return False
        self._own(partition)
        log.info("partition_taken", partition=partition.key, owned=self.partitions)
        partition.start()
        return True

    def _lose(self, partition: _Partition) -> None:
        """The server says that it is not ours: nothing of it can be committed or settled any more."""
        partition.stop()
        if self._disown(partition):
            self._metrics.source_fenced.labels(self.name).inc()
            log.warning("partition_lost", partition=partition.key, owned=self.partitions)

    async def _release(self, partition: _Partition) -> None:
        """Read no more, let what is under way end (the lease is renewed meanwhile), then let another replica have it. It is `leaving`."""
        await partition.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.declared.lease_seconds):
                await partition.free.wait()
        with contextlib.suppress(StoreUnavailable):  # then it expires
            await partition.release()
            await self._tell()
        if self._disown(partition):
            log.info("partition_released", partition=partition.key, owned=self.partitions)

    def _own(self, partition: _Partition) -> None:
        self._owned[partition.index] = partition
        self._metrics.source_partitions.labels(self.name).set(len(self._owned))

    def _disown(self, partition: _Partition) -> bool:
        """Whether it was still ours, as far as we knew."""
        known = self._owned.get(partition.index) is partition
        if known:
            del self._owned[partition.index]
            self._metrics.source_partitions.labels(self.name).set(len(self._owned))
        return known

    async def _tell(self) -> None:
        """Wake the other members."""
        fields: dict[Any, Any] = {"member": self.member}
        await self.ask(lambda: cast("Awaitable[bytes]", self._client.xadd(self.keys.changes, fields, maxlen=1, approximate=False)))

    def _of(self, batch: Batch) -> _Partition | None:
        return next((partition for partition in self._owned.values() if partition.lease == batch.lease), None)

    # ── what partitions use ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def hand_out(self, batch: Batch) -> None:
        """The partition has no other batch under way."""
        self._ready.put_nowait(batch)

    def claimed(self, entries: int) -> None:
        self._metrics.source_claimed.labels(self.name).inc(entries)

    def lost(self, partition: str, entries: int) -> None:
        self._metrics.source_lost.labels(self.name).inc(entries)
        log.error("streams_trimmed", source=self.name, partition=partition, entries=entries)

    def group_gone(self, partition: str) -> None:
        log.error("streams_group_gone", source=self.name, partition=partition, group=self.declared.group)

    def bug(self, error: Exception) -> None:
        self._metrics.bug(error, source=self.name)

    async def wait(self, key: str, last: bytes, ms: int) -> None:
        """Until there is an entry after `last`, or for `ms`."""
        streams: dict[Any, Any] = {key: last}
        await self.ask(lambda: self._client.xread(streams, count=1, block=max(1, min(ms, BLOCK_MS))))

    async def call(self, function: str, keys: Sequence[str | bytes], *arguments: Any) -> Any:
        """A function of streams.lua; loaded where the server does not know it."""

        async def ask() -> Any:
            return await self._client.fcall(f"onset_{function}_{VERSION}", len(keys), *keys, *arguments)

        try:
            return await ask()
        except ResponseError as error:
            if "Function not found" not in str(error):
                raise _unavailable(error) from error
        except _UNANSWERED as error:
            raise _unavailable(error) from error
        await self.ask(lambda: self._client.function_load(LIBRARY.read_text(), replace=True))
        return await self.ask(ask)

    async def ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            return await ask()
        except _UNANSWERED as error:
            raise _unavailable(error) from error


class _StartAgain(Exception):
    """What was read ahead is to be read again, after what was abandoned."""


class _Partition:
    """One partition while it is ours: its entries in order, one batch under way, one read ahead."""

    def __init__(self, source: RedisStreams, index: int, token: str) -> None:
        declared, keys = source.declared, source.keys
        self.index, self.key = index, keys.partition(index)
        self.lease = Lease(self.key.encode(), keys.lease(index).encode(), token.encode(), declared.group.encode(), declared.keep)
        self.free = asyncio.Event()
        """No batch is under way."""
        self.free.set()
        self.leaving = False
        self._source = source
        self._identity = identity(self.key)
        self._again = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"partition-{self.key}")

    def stop(self) -> None:
        """Read no more."""
        if self._task is not None:
            self._task.cancel()

    async def end(self) -> None:
        """Read no more; returns when its connection is back."""
        if self._task is not None:
            await tasks.end(self._task)

    def done(self) -> None:
        """The batch under way is."""
        self.free.set()

    def start_again(self) -> None:
        """The batch under way was abandoned: it comes before all that was read after it."""
        self._again = True
        self.free.set()

    async def hold(self, *, take: bool) -> bool:
        """Renew the lease, or take it where it is free; whether it is ours."""
        held = await self._call("hold", self.lease.group, int(take))
        if held == GROUP_GONE:
            self._source.group_gone(self.key)
        return bool(held)

    async def release(self) -> None:
        await self._source.call("release", [self.lease.stream, self.lease.key], self.lease.token)

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            try:
                await self.free.wait()
                self._again = False
                await self._claim()
                while not self._again:  # also where nothing new comes that would be held back
                    await self._read()
                    backoff = FIRST_BACKOFF
            except _StartAgain:
                continue
            except Fenced:
                return  # the keeper learns it too
            except StoreUnavailable:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
            except Exception as error:  # a bug must not end the partition for good; it is counted and logged
                self._source.bug(error)
                await asyncio.sleep(MAX_BACKOFF)

    async def _claim(self) -> None:
        """All entries that were delivered and not acknowledged, ours among them."""
        cursor = b"0-0"
        while True:
            cursor, entries = await self._owners("claim", self.lease.group, self._source.member, self._source.declared.batch, cursor)
            if entries:
                self._source.claimed(len(entries))
                await self._hand_out(entries)
            if cursor == b"0-0":
                return

    async def _read(self) -> None:
        entries, last, lost = await self._owners("read", self.lease.group, self._source.member, self._source.declared.batch)
        if lost:
            self._source.lost(self.key, lost)
        if entries:
            await self._hand_out(entries)
        else:
            await self._source.wait(self.key, last, BLOCK_MS)

    async def _hand_out(self, entries: Sequence[Any]) -> None:
        messages = [_message(entry, self._source.clock()) for entry in entries]
        await self.free.wait()
        if self.leaving:  # a cancellation that was swallowed (tasks.end): what was read since is for the next owner to claim
            raise Fenced(f"Partition '{self.key}' is being given back.")
        if self._again:
            raise _StartAgain
        self.free.clear()
        self._source.hand_out(Batch(self.key, self._identity, messages, self.lease))

    async def _owners(self, function: str, *arguments: Any) -> Any:
        """What only the owner may do. Raises Fenced."""
        answer = await self._call(function, *arguments)
        if answer is None:
            raise Fenced(f"Partition '{self.key}' is another replica's by now.")
        return answer

    async def _call(self, function: str, *arguments: Any) -> Any:
        return await self._source.call(function, [self.lease.stream, self.lease.key], self.lease.token, self._source.lease_ms, *arguments)


def _message(entry: Any, now: float) -> Message:
    id_, fields = entry
    ms, _, sequence = id_.partition(b"-")
    time_ms, number = int(ms), int(sequence)
    fits = time_ms < 1 << MS_BITS and number < 1 << SEQUENCE_BITS
    position = time_ms << SEQUENCE_BITS | number if fits else POSITIONS
    arrived = time_ms / 1000 if time_ms >= EARLIEST_MS else now
    headers = dict(zip(fields[::2], fields[1::2], strict=True))
    return Message(id_, position, arrived, headers.pop(EVENT, None), headers)


def _letter(batch: Batch, letter: Letter) -> list[Any]:
    """Number of fields and values, and these: the entry's own, then why and where from."""
    message = letter.message
    about: dict[str, Any] = {**letter.about, "stream": batch.partition, "entry": message.id}
    fields = list(message.headers.items())
    if len(fields) > MOST_FIELDS:
        about["omitted_fields"] = str(len(fields) - MOST_FIELDS)
    parts: list[Any] = [part for name_value in fields[:MOST_FIELDS] for part in name_value]
    parts += [] if message.payload is None else [EVENT, message.payload]
    parts += [part for name, value in about.items() for part in (f"onset_{name}".encode(), value)]
    return [len(parts), *parts]


def _lease_of(batch: Batch) -> Lease:
    if batch.lease is None:
        raise RuntimeError(f"A batch of '{batch.partition}' has no lease: this is a bug.")
    return batch.lease


def _unavailable(error: Exception) -> StoreUnavailable:
    said = f"{type(error).__name__}: {error}"
    if known := refusal(said):
        return StoreUnavailable(f"Redis Streams refuse: {known.why} ({said}).")
    return StoreUnavailable(f"Redis Streams do not answer ({said}).")


def _beside(key: str, name: str) -> str:
    """A key in the same slot of a cluster."""
    return f"{key}:{name}" if "{" in key else f"{{{key}}}:{name}"
