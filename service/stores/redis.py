"""The state store in any Redis >= 7.0 or Valkey.

Keys (each name once, here):

    onset:{SHARD}:MODEL:STREAM     a stream's value                SHARD = crc32(stream id) % 256, three digits, a hash tag:
    onset:{SHARD}:~MODEL:STREAM    its trail, a list of blobs      a shard's keys share one slot of a cluster
    onset:{SHARD}:!MODEL           a shard's watches, a sorted set of stream ids by time
    onset:policy                   what was changed of the policy at run time, a hash
    onset:results                  results of events that came from a queue in the store (Output); its entries have the one field `result`

Load is one MGET, commit one call of the server-side function in commit.lua. The client never retries by itself: whether a lost
commit was applied is for the sender to find out, by sending the same event ids again.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ReadOnlyError, RedisError, ResponseError, TimeoutError  # noqa: A004
from redis.maint_notifications import MaintNotificationsConfig

from service.errors import StoreUnavailable
from service.events import Lease
from service.stores import OUTPUT, SILENT, TRAIL_COMMITS, Output, Page, Write

SHARDS = 256
FUNCTION = "onset_commit_v4"
"""With the library in commit.lua renamed whenever its arguments change: replicas of two versions may share a server."""
LIBRARY = Path(__file__).with_name("commit.lua")
COMMIT_STREAMS, COMMIT_BYTES = 512, 4 * 1024 * 1024
"""One call of the function stays below both, so that the server answers others in between."""
TIMEOUT_SECONDS = 2.0
MAX_CONNECTIONS = 16
"""Further calls wait for one of these, TIMEOUT_SECONDS at most."""
SCAN_COUNT = 1000
MAX_CURSOR = 2**64 - 1

KEYS_CACHED = 65_536
POLICY_KEY = b"onset:policy"

T = TypeVar("T")

_GLOB = re.compile(rb"[*?\[\]\\^]")
_WATCH = struct.Struct("<Id")
_FRAME, _RESULT, _ACK = struct.Struct("<I16sI"), struct.Struct("<II"), struct.Struct("<IIB")  # in a commit, see commit.lua


@lru_cache(maxsize=KEYS_CACHED)
def state_key(model: str, stream_id: str) -> bytes:
    return b"onset:{%03d}:%s:%s" % (_shard(stream_id), model.encode(), stream_id.encode())


def trail_key(model: str, stream_id: str) -> bytes:
    return b"onset:{%03d}:~%s:%s" % (_shard(stream_id), model.encode(), stream_id.encode())


def watch_key(model: str, shard: int) -> bytes:
    return b"onset:{%03d}:!%s" % (shard, model.encode())


def _shard(stream_id: str) -> int:
    return zlib.crc32(stream_id.encode()) % SHARDS


class RedisStore:
    """Implements StateStore. `open` must have succeeded once; after an outage the same object works again."""

    def __init__(self, url: str, *, state_ttl: int, result_ttl: int, output: Output = OUTPUT) -> None:
        """TTLs in seconds; `url` as redis-py takes it: redis://, rediss://, unix://."""
        self._pool = redis.BlockingConnectionPool.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            max_connections=MAX_CONNECTIONS,
            timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            # With them on, redis-py would no longer look for unread replies when it reuses a connection.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        self._client = redis.Redis.from_pool(self._pool)
        self._ttls = (state_ttl, result_ttl, TRAIL_COMMITS)
        self._output = output

    async def open(self) -> None:
        """Load the commit function. Raises StoreUnavailable, also for a server that is too old."""
        try:
            await self._client.function_load(LIBRARY.read_text(), replace=True)
        except ResponseError as error:
            if "unknown command" in str(error).lower():
                raise StoreUnavailable("The server knows no FUNCTION command: Onset needs Redis 7.0 or Valkey 7.2 at least.") from error
            raise await self._unavailable(error) from error
        except (RedisError, OSError) as error:
            raise await self._unavailable(error) from error

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        keys = [state_key(model, stream_id) for stream_id in stream_ids]
        return await self._ask(lambda: cast("Awaitable[list[bytes | None]]", self._client.mget(keys))) if keys else []

    async def load_trails(self, model: str, stream_ids: Sequence[str]) -> list[list[bytes]]:
        async def ask() -> list[list[bytes]]:
            async with self._client.pipeline(transaction=False) as pipeline:
                for stream_id in stream_ids:
                    pipeline.lrange(trail_key(model, stream_id), 0, -1)
                return cast("list[list[bytes]]", await pipeline.execute())

        return await self._ask(ask)

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        done: list[int] = []
        for part in _calls(writes):
            trails = [(i, write) for i, write in enumerate(part, 1) if write.trail]
            watches = [(i, write) for i, write in enumerate(part, 1) if write.watch is not None]
            keys = [state_key(model, write.stream_id) for write in part] + [trail_key(model, write.stream_id) for _, write in trails]
            keys += [watch_key(model, _shard(write.stream_id)) for _, write in watches]
            frames = b"".join(_FRAME.pack(len(write.expected), write.expected, len(write.value)) for write in part)
            values = b"".join([write.value for write in part])
            blobs = [i.to_bytes(4, "little") + write.trail for i, write in trails]
            blobs += [_WATCH.pack(i, write.watch) + write.stream_id.encode() for i, write in watches]
            queued = [(i, write) for i, write in enumerate(part, 1) if write.acks or write.results]
            results = b"".join(_RESULT.pack(i, len(result)) + result for i, write in queued for result in write.results)
            leases, acks = _acks(queued)
            keys += [self._output.key.encode()] if results else []
            keys += [key for lease in leases for key in (lease.stream, lease.key)]
            blobs += [part for lease in leases for part in (lease.token, lease.group, b"%d" % lease.keep)]
            counts = (len(trails), len(watches), self._output.length)
            done += await self._call(len(keys), [*keys, *self._ttls, len(part), frames, values, *counts, results, acks, *blobs])
        return done

    async def delete(self, model: str, stream_id: str) -> bool:
        async def ask() -> bool:
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.delete(state_key(model, stream_id))
                pipeline.delete(trail_key(model, stream_id))
                pipeline.zrem(watch_key(model, _shard(stream_id)), stream_id.encode())
                return bool((await pipeline.execute())[0])

        return await self._ask(ask)

    async def scan(self, model: str, cursor: str, limit: int) -> Page:
        name = model.encode()
        pattern = b"onset:{[0-9][0-9][0-9]}:%s:*" % _GLOB.sub(rb"\\\g<0>", name)
        prefix = re.compile(rb"onset:\{\d{3}\}:" + re.escape(name) + rb":")

        async def ask() -> tuple[int, list[bytes]]:
            position, count = _position(cursor), max(limit, 10)
            found: list[bytes] = []
            while True:
                position, keys = await self._client.scan(position, match=pattern, count=count)
                found += cast("list[bytes]", keys)
                if position == 0 or len(found) >= limit:
                    return position, found
                if not keys:  # few of the keys are this model's: look at more of them in one call
                    count = max(count, min(2 * count, SCAN_COUNT))

        position, keys = await self._ask(ask)
        ids = [key[match.end() :].decode() for key in keys if (match := prefix.match(key))]
        return Page(list(dict.fromkeys(ids)), str(position) if position else "")

    async def due(self, model: str, now: float, limit: int) -> list[str]:
        return (await self._watched(model, ((0.0, now), (SILENT, SILENT + now)), limit))[:limit]

    async def silent(self, model: str, limit: int) -> tuple[int, list[str]]:
        async def ask() -> int:
            async with self._client.pipeline(transaction=False) as pipeline:
                for shard in range(SHARDS):
                    pipeline.zcount(watch_key(model, shard), SILENT, "+inf")
                return sum(cast("list[int]", await pipeline.execute()))

        total = await self._ask(ask)
        return total, (await self._watched(model, ((SILENT, math.inf),), limit))[:limit] if total and limit else []

    async def watch(self, model: str, times: Mapping[str, float]) -> None:
        async def ask() -> None:
            async with self._client.pipeline(transaction=False) as pipeline:
                for stream_id, time in times.items():
                    key = watch_key(model, _shard(stream_id))
                    if time:
                        pipeline.zadd(key, {stream_id.encode(): time})
                    else:
                        pipeline.zrem(key, stream_id.encode())
                await pipeline.execute()

        if times:
            await self._ask(ask)

    async def _watched(self, model: str, ranges: Sequence[tuple[float, float]], limit: int) -> list[str]:
        async def ask() -> list[list[bytes]]:
            async with self._client.pipeline(transaction=False) as pipeline:
                for shard in range(SHARDS):
                    for least, most in ranges:
                        pipeline.zrangebyscore(watch_key(model, shard), least, most, start=0, num=limit)
                return cast("list[list[bytes]]", await pipeline.execute())

        return [member.decode() for members in await self._ask(ask) for member in members]

    async def waited(self, model: str, limit: int) -> tuple[int, list[str]]:
        async def ask() -> tuple[int, list[list[bytes]]]:
            async with self._client.pipeline(transaction=False) as pipeline:
                for shard in range(SHARDS):
                    pipeline.zcard(watch_key(model, shard))
                    pipeline.zcount(watch_key(model, shard), SILENT, "+inf")
                counts = cast("list[int]", await pipeline.execute())
                watched, silent = counts[::2], counts[1::2]
                part = min(1.0, limit / max(sum(watched), 1))
                for shard, size in enumerate(watched):
                    if size:
                        pipeline.zrandmember(watch_key(model, shard), math.ceil(size * part))
                return sum(watched) - sum(silent), cast("list[list[bytes]]", await pipeline.execute())

        count, members = await self._ask(ask)
        return count, [member.decode() for some in members for member in some]

    async def policy(self) -> dict[str, bytes]:
        return _named(await self._ask(lambda: cast("Awaitable[dict[bytes, bytes]]", self._client.hgetall(POLICY_KEY))))

    async def change_policy(self, changes: Mapping[str, bytes | None]) -> dict[str, bytes]:
        async def ask() -> dict[bytes, bytes]:
            async with self._client.pipeline(transaction=True) as pipeline:
                for name, value in changes.items():
                    if value is None:
                        pipeline.hdel(POLICY_KEY, name)
                    else:
                        pipeline.hset(POLICY_KEY, name, value)
                pipeline.hgetall(POLICY_KEY)
                return cast("dict[bytes, bytes]", (await pipeline.execute())[-1])

        return _named(await self._ask(ask))

    async def count(self) -> int:
        return int(await self._ask(self._client.dbsize))

    async def ping(self) -> None:
        # A commit of nothing: refused where a real one would be (replica, full memory or disk).
        await self._call(0, [*self._ttls, 0, b"", b"", 0, 0, 0, b"", b""])

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, keys: int, arguments: list[Any]) -> list[int]:
        """The commit function; loaded again where the server does not know it (a failover, a replaced server)."""

        async def ask() -> list[int]:
            return cast("list[int]", await self._client.fcall(FUNCTION, keys, *arguments))

        try:
            return await ask()
        except ResponseError as error:
            if "Function not found" not in str(error):
                raise await self._unavailable(error) from error
        except (RedisError, OSError) as error:
            raise await self._unavailable(error) from error
        await self.open()
        return await self._ask(ask)

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            return await ask()
        except (RedisError, OSError) as error:
            raise await self._unavailable(error) from error

    async def _unavailable(self, error: Exception) -> StoreUnavailable:
        """What the door is told. Where one connection leads nowhere or to a demoted server, the others do too: connect anew."""
        if isinstance(error, ReadOnlyError | ConnectionError | TimeoutError):
            await self._pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
            with contextlib.suppress(RedisError, OSError):
                await self._pool.disconnect(inuse_connections=False)
        return StoreUnavailable(f"The state store does not answer ({type(error).__name__}: {error}).")


def _calls(writes: Sequence[Write]) -> Iterator[Sequence[Write]]:
    """Runs of writes that one call may carry."""
    start = size = 0
    for i, write in enumerate(writes):
        more = len(write.value) + len(write.trail) + sum(map(len, write.results))
        if i > start and (i - start == COMMIT_STREAMS or size + more > COMMIT_BYTES):
            yield writes[start:i]
            start, size = i, 0
        size += more
    if start < len(writes):
        yield writes[start:]


def _acks(writes: Sequence[tuple[int, Write]]) -> tuple[list[Lease], bytes]:
    """The distinct leases that a call is under, and its acks as commit.lua reads them."""
    index: dict[Lease, int] = {}
    acks = b"".join(
        _ACK.pack(i, index.setdefault(lease, len(index) + 1), len(entry)) + entry for i, write in writes for lease, entry in write.acks
    )
    return list(index), acks


def _named(fields: Mapping[bytes, bytes]) -> dict[str, bytes]:
    return {name.decode(errors="replace"): value for name, value in fields.items()}


def _position(cursor: str) -> int:
    """Where a scan goes on; a cursor that is none of ours starts afresh."""
    position = int(cursor) if re.fullmatch("[0-9]{1,20}", cursor) else 0
    return position if position <= MAX_CURSOR else 0
