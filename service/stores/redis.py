"""The state store in any Redis >= 7.0 or Valkey.

Keys (each name once, here):

    onset:{SHARD}:MODEL:STREAM     a stream's value                SHARD = crc32(stream id) % 256, three digits, a hash tag:
    onset:{SHARD}:~MODEL:STREAM    its trail, a list of blobs      a shard's keys share one slot of a cluster

Load is one MGET, commit one call of the server-side function in commit.lua. The client never retries by itself: whether a lost
commit was applied is for the sender to find out, by sending the same event ids again.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ReadOnlyError, RedisError, ResponseError, TimeoutError  # noqa: A004
from redis.maint_notifications import MaintNotificationsConfig

from service.errors import StoreUnavailable
from service.stores import TRAIL_COMMITS, Page, Write

SHARDS = 256
FUNCTION = "onset_commit_v2"
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

T = TypeVar("T")

_GLOB = re.compile(rb"[*?\[\]\\^]")
_FRAME = struct.Struct("<I16sI")  # of one stream in a commit, see commit.lua


@lru_cache(maxsize=KEYS_CACHED)
def state_key(model: str, stream_id: str) -> bytes:
    return b"onset:{%03d}:%s:%s" % (_shard(stream_id), model.encode(), stream_id.encode())


def trail_key(model: str, stream_id: str) -> bytes:
    return b"onset:{%03d}:~%s:%s" % (_shard(stream_id), model.encode(), stream_id.encode())


def _shard(stream_id: str) -> int:
    return zlib.crc32(stream_id.encode()) % SHARDS


class RedisStore:
    """Implements StateStore. `open` must have succeeded once; after an outage the same object works again."""

    def __init__(self, url: str, *, state_ttl: int, result_ttl: int) -> None:
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

    async def commit(self, model: str, writes: Sequence[Write]) -> list[bool]:
        done: list[bool] = []
        for part in _calls(writes):
            trails = [(i, write) for i, write in enumerate(part, 1) if write.trail]
            keys = [state_key(model, write.stream_id) for write in part] + [trail_key(model, write.stream_id) for _, write in trails]
            frames = b"".join(_FRAME.pack(len(write.expected), write.expected, len(write.value)) for write in part)
            values = b"".join([write.value for write in part])
            blobs = [i.to_bytes(4, "little") + write.trail for i, write in trails]
            outcome = await self._call(len(keys), [*keys, *self._ttls, len(part), frames, values, *blobs])
            done += [bool(written) for written in outcome]
        return done

    async def delete(self, model: str, stream_id: str) -> bool:
        async def ask() -> bool:
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.delete(state_key(model, stream_id))
                pipeline.delete(trail_key(model, stream_id))
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

    async def count(self) -> int:
        return int(await self._ask(self._client.dbsize))

    async def ping(self) -> None:
        await self._call(
            0, [*self._ttls, 0, b"", b""]
        )  # a commit of nothing: refused where a real one would be (replica, full memory or disk)

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
        more = len(write.value) + len(write.trail)
        if i > start and (i - start == COMMIT_STREAMS or size + more > COMMIT_BYTES):
            yield writes[start:i]
            start, size = i, 0
        size += more
    if start < len(writes):
        yield writes[start:]


def _position(cursor: str) -> int:
    """Where a scan goes on; a cursor that is none of ours starts afresh."""
    position = int(cursor) if re.fullmatch("[0-9]{1,20}", cursor) else 0
    return position if position <= MAX_CURSOR else 0
