"""The state store in any Redis >= 7.0 or Valkey.

Keys (each name once, here):

    onset:{SHARD}:MODEL:STREAM     a stream's value                SHARD = crc32(stream id) % 256, three digits, a hash tag:
    onset:{SHARD}:~MODEL:STREAM    its trail, a list of blobs      a shard's keys share one slot of a cluster
    onset:{SHARD}:!MODEL           a shard's watches, a sorted set of stream ids by time
    onset:{SHARD}:@alerts          a shard's part of the alert log, a stream; its entries have the one field `transition`
    onset:policy                   what was changed of the policy at run time, a hash
    onset:{SHARD}:=NAME            a lease, which expires: its holder      SHARD as if NAME were a stream id
    onset:{SHARD}:+NAME            the notes beside it, a list
    onset:{SHARD}:^MODEL           the claim of one of the model's files, see claims.py; SHARD as if MODEL were a stream id
    onset:{SHARD}:^MODEL/INSTANCE  which of them this instance has claimed; SHARD as if both were a stream id
    onset:results                  results of events that came from a queue in the store (Output); its entries have the one field `result`

Load is one MGET, commit one call of the server-side function in commit.lua. The client never retries by itself: whether a lost
commit was applied is for the sender to find out, by sending the same event ids again. The same keys in a cluster: cluster.py.
"""

from __future__ import annotations

import asyncio
import builtins
import math
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs

import hiredis
import redis.asyncio as redis
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, NoPermissionError, ReadOnlyError, RedisError, ResponseError, TimeoutError  # noqa: A004
from redis.maint_notifications import MaintNotificationsConfig

from service.errors import StoreRefused, StoreUnavailable
from service.events import Lease
from service.refusals import UNKNOWN, refusal
from service.stores import LOG_LENGTH, OUTPUT, SILENT, TRAIL_COMMITS, Memory, Output, Page, Write
from service.stores.clock import StoreClock

SHARDS = 256
FUNCTION, WATCHED = "onset_commit_v7", "onset_watched_v7"
"""With the other functions and their library renamed whenever its arguments change: replicas of two versions may share a server."""
LIBRARY = "\n".join(Path(__file__).with_name(name).read_text() for name in ("commit.lua", "book.lua", "watch.lua"))
COMMIT_STREAMS, COMMIT_BYTES = 512, 4 * 1024 * 1024
"""One call of the function stays below both, so that the server answers others in between."""
UNANSWERED = (RedisError, OSError, RuntimeError)
"""What a server that does not answer raises. RuntimeError: uvloop's, where a socket has failed and nobody has read of it yet."""
TIMEOUT_SECONDS = 2.0
MAX_CONNECTIONS = 16
"""Further calls wait for one of these, TIMEOUT_SECONDS at most."""
SCAN_COUNT = 1000
COUNTED = 10_000
"""Keys of a server that are all looked at to count its streams."""
DRAWN = 1000
"""Keys that are drawn by chance where there are more: the count is then some 3 % off where half the keys are streams."""
MAX_CURSOR = 2**64 - 1

KEYS_CACHED = 65_536
POLICY_KEY = b"onset:policy"
HOLD = """local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1"""
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
NOTE = """if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('LTRIM', KEYS[2], -ARGV[3], -1)
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1"""
CLAIM = """local claim = redis.call('GET', KEYS[1]) or ''
if ARGV[1] == '' or ARGV[2] == claim then redis.call('SET', KEYS[1], ARGV[3], 'EX', ARGV[4]) end
return claim"""
TOO_OLD = "The server knows no FUNCTION command: Onset needs Redis 7.0 or Valkey 7.2 at least."

REFUSED_SECONDS = 60.0
"""A store that refuses is told of in the log once in this time: who waits at a queue hears nothing of it."""

T = TypeVar("T")

log = structlog.get_logger(__name__)

_ADDRESS = re.compile(r"rediss?://([^/?#]*@)?(\[[^/?#\]]*\]|[^/?#@:]*)(:[0-9]+)?(/[0-9]*/?)?(\?([^=]+=.*)?)?\s*")
_GLOB = re.compile(rb"[*?\[\]\\^]")
_STATE_KEY = re.compile(rb"onset:\{\d{3}\}:[a-z0-9][^:]*:")
_WATCH, _LOG = struct.Struct("<Id"), struct.Struct("<I")
_FRAME, _RESULT, _ACK = struct.Struct("<I16sII"), struct.Struct("<II"), struct.Struct("<IIB")  # in a commit, see commit.lua


@lru_cache(maxsize=KEYS_CACHED)
def state_key(model: str, stream_id: str) -> bytes:
    return b"onset:{%03d}:%s:%s" % (shard_of(stream_id), model.encode(), stream_id.encode())


def trail_key(model: str, stream_id: str) -> bytes:
    return b"onset:{%03d}:~%s:%s" % (shard_of(stream_id), model.encode(), stream_id.encode())


def watch_key(model: str, shard: int) -> bytes:
    return b"onset:{%03d}:!%s" % (shard, model.encode())


def log_key(shard: int) -> bytes:
    return b"onset:{%03d}:@alerts" % shard


def lease_key(name: str) -> bytes:
    return b"onset:{%03d}:=%s" % (shard_of(name), name.encode())


def notes_key(name: str) -> bytes:
    return b"onset:{%03d}:+%s" % (shard_of(name), name.encode())


def claim_key(model: str) -> bytes:
    return b"onset:{%03d}:^%s" % (shard_of(model), model.encode())


def shard_of(stream_id: str) -> int:
    return zlib.crc32(stream_id.encode()) % SHARDS


Command = tuple[Any, ...]
"""Name, key and more, as they are sent; of EVAL the script, the number of keys, and the keys."""


def first_key(command: Command) -> bytes:
    return cast("bytes", command[3 if command[0] == "EVAL" else 1])


LOGS = {log_key(shard): shard for shard in range(SHARDS)}


class Commands(ABC):
    """What is done in the same way on one server and in a cluster: which commands a call is, and what their replies mean."""

    def __init__(self, *, state_ttl: int, result_ttl: int, output: Output, clock: StoreClock | None) -> None:
        """TTLs in seconds; `clock` is read at each ping."""
        self._clock = clock or StoreClock()
        self._ttls = (state_ttl, result_ttl, TRAIL_COMMITS)
        self._output = output
        self._refused_at = -math.inf

    @abstractmethod
    async def pipe(self, commands: Sequence[Command], *, atomic: bool = False) -> list[Any]:
        """Their replies, in one round trip; `atomic` = in one step, for keys of one shard only. Raises StoreUnavailable."""

    @abstractmethod
    async def read_log(self, after: Sequence[str], limit: int) -> list[tuple[int, Sequence[Any]]]:
        """Shards, and at most `limit` entries of each one's part of the alert log that come after the id it has in `after`."""

    @abstractmethod
    async def call(self, function: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """The reply of a function of ours, whose keys are of one slot. Raises StoreUnavailable."""

    @abstractmethod
    async def _watched(self, model: str, ranges: Sequence[tuple[float, float]], limit: int) -> list[str]:
        """At least `limit` of the streams whose watch is of a time in one of the ranges, or all."""

    async def load_trails(self, model: str, stream_ids: Sequence[str]) -> list[list[bytes]]:
        return await self.pipe([("LRANGE", trail_key(model, stream_id), 0, -1) for stream_id in stream_ids])

    async def delete(self, model: str, stream_id: str, entry: bytes = b"") -> bool:
        commands: list[Command] = [
            ("DEL", state_key(model, stream_id)),
            ("DEL", trail_key(model, stream_id)),
            ("ZREM", watch_key(model, shard_of(stream_id)), stream_id.encode()),
        ]
        if entry:
            commands.append(("XADD", log_key(shard_of(stream_id)), "MAXLEN", "~", LOG_LENGTH, "*", "transition", entry))
        return bool((await self.pipe(commands, atomic=True))[0])

    async def due(self, model: str, now: float, limit: int) -> list[str]:
        return (await self._watched(model, ((0.0, now), (SILENT, SILENT + now)), limit))[:limit]

    async def silent(self, model: str, limit: int) -> tuple[int, list[str]]:
        total = sum(await self.pipe([("ZCOUNT", watch_key(model, shard), SILENT, "+inf") for shard in range(SHARDS)]))
        return total, (await self._watched(model, ((SILENT, math.inf),), limit))[:limit] if total and limit else []

    async def watch(self, model: str, times: Mapping[str, float]) -> None:
        commands: list[Command] = []
        for stream_id, time in times.items():
            key = watch_key(model, shard_of(stream_id))
            commands.append(("ZADD", key, time, stream_id.encode()) if time else ("ZREM", key, stream_id.encode()))
        if commands:
            await self.pipe(commands)

    async def waited(self, model: str, limit: int) -> tuple[int, list[str]]:
        keys = [watch_key(model, shard) for shard in range(SHARDS)]
        counts = await self.pipe([command for key in keys for command in (("ZCARD", key), ("ZCOUNT", key, SILENT, "+inf"))])
        watched, silent = counts[::2], counts[1::2]
        part = min(1.0, limit / max(sum(watched), 1))
        drawn = [("ZRANDMEMBER", key, math.ceil(size * part)) for key, size in zip(keys, watched, strict=True) if size and limit]
        return sum(watched) - sum(silent), [member.decode() for some in await self.pipe(drawn) for member in some]

    async def policy(self) -> dict[str, bytes]:
        return _named((await self.pipe([("HGETALL", POLICY_KEY)]))[0])

    async def change_policy(self, changes: Mapping[str, bytes | None]) -> dict[str, bytes]:
        commands: list[Command] = [
            ("HDEL", POLICY_KEY, name) if value is None else ("HSET", POLICY_KEY, name, value) for name, value in changes.items()
        ]
        return _named((await self.pipe([*commands, ("HGETALL", POLICY_KEY)], atomic=True))[-1])

    async def hold(self, name: str, holder: str, seconds: float) -> bool:
        return bool((await self.pipe([("EVAL", HOLD, 1, lease_key(name), holder, round(1000 * seconds))]))[0])

    async def release(self, name: str, holder: str) -> None:
        await self.pipe([("EVAL", RELEASE, 1, lease_key(name), holder)])

    async def note(self, name: str, holder: str, note: bytes, keep: int) -> bool:
        state_ttl = self._ttls[0]
        return bool((await self.pipe([("EVAL", NOTE, 2, lease_key(name), notes_key(name), holder, note, keep, state_ttl)]))[0])

    async def notes(self, name: str) -> list[bytes]:
        return cast("list[bytes]", (await self.pipe([("LRANGE", notes_key(name), 0, -1)]))[0])

    async def claimed(self, model: str) -> bytes:
        return cast("bytes | None", (await self.pipe([("GET", claim_key(model))]))[0]) or b""

    async def claim(self, model: str, expected: bytes | None, claim: bytes) -> bytes:
        compare = (b"", b"") if expected is None else (b"1", expected)
        return cast("bytes", (await self.pipe([("EVAL", CLAIM, 1, claim_key(model), *compare, claim, self._ttls[0])]))[0])

    def _told(self, error: Exception, where: str = "") -> StoreUnavailable:
        """What the door is told of an error; of a refusal the log, too. `where` = which of several servers."""
        said = f"{type(error).__name__}: {error}"
        known = refusal(said) or (UNKNOWN if isinstance(error, ResponseError) else None)
        if known is None:
            return StoreUnavailable(f"The state store does not answer ({where}{said}).")
        detail = f"The state store refuses: {known.why} ({where}{said})."
        if not known.lasting:
            return StoreUnavailable(detail)
        if (now := monotonic()) - self._refused_at >= REFUSED_SECONDS:
            self._refused_at = now
            log.error("store_refuses", reason=detail)
        return StoreRefused(detail)

    def _commit_of(self, model: str, part: Sequence[Write]) -> tuple[int, list[Any]]:
        """Number of keys, then keys and arguments of the call of commit.lua that writes these."""
        trails = [(i, write) for i, write in enumerate(part, 1) if write.trail]
        watches = [(i, write) for i, write in enumerate(part, 1) if write.watch is not None]
        keys = [state_key(model, write.stream_id) for write in part] + [trail_key(model, write.stream_id) for _, write in trails]
        keys += [watch_key(model, shard_of(write.stream_id)) for _, write in watches]
        logged = [(i, write.stream_id, entry) for i, write in enumerate(part, 1) for entry in write.log]
        keys += [log_key(shard_of(stream_id)) for _, stream_id, _ in logged]
        frames = b"".join(_FRAME.pack(len(write.expected), write.expected, len(write.value), write.ttl) for write in part)
        values = b"".join([write.value for write in part])
        blobs = [i.to_bytes(4, "little") + write.trail for i, write in trails]
        blobs += [_WATCH.pack(i, write.watch) + write.stream_id.encode() for i, write in watches]
        blobs += [_LOG.pack(i) + entry for i, _, entry in logged]
        queued = [(i, write) for i, write in enumerate(part, 1) if write.acks or write.results]
        results = b"".join(_RESULT.pack(i, len(result)) + result for i, write in queued for result in write.results)
        leases, acks = _acks(queued)
        keys += [self._output.key.encode()] if results else []
        keys += [key for lease in leases for key in (lease.stream, lease.key)]
        blobs += [part for lease in leases for part in (lease.token, lease.group, b"%d" % lease.keep)]
        counts = (len(trails), len(watches), len(logged), self._output.length)
        return len(keys), [*keys, *self._ttls, LOG_LENGTH, len(part), frames, values, *counts, results, acks, *blobs]


class RedisStore(Commands):
    """Implements StateStore on one server. `open` must have succeeded once; after an outage the same object works again."""

    def __init__(self, url: str, *, state_ttl: int, result_ttl: int, output: Output = OUTPUT, clock: StoreClock | None = None) -> None:
        """TTLs in seconds; `url` as redis-py takes it: redis://, rediss://, unix://."""
        super().__init__(state_ttl=state_ttl, result_ttl=result_ttl, output=output, clock=clock)
        self._pool = connections(url)
        self._client = redis.Redis.from_pool(self._pool)

    async def read_log(self, after: Sequence[str], limit: int) -> list[tuple[int, Sequence[Any]]]:
        # One command for all parts: it takes a sixth of the time of one for each.
        [reply] = await self.pipe([("XREAD", "COUNT", limit, "STREAMS", *LOGS, *after)])
        parts = reply.items() if isinstance(reply, Mapping) else reply or []
        return [(LOGS[key], entries) for key, entries in parts]

    async def open(self) -> None:
        """Load the commit function, read the clock. Raises StoreUnavailable, also for a server that is too old or part of a cluster."""
        about = await self._about("cluster")
        if about.get("cluster_enabled"):
            raise StoreUnavailable("The server is a node of a Redis Cluster: set ONSET_REDIS_CLUSTER=true.")
        await self._load_function()
        await self.ping()

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        keys = [state_key(model, stream_id) for stream_id in stream_ids]
        return cast("list[bytes | None]", (await self.pipe([("MGET", *keys)]))[0]) if keys else []

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        done: list[int] = []
        for part in calls(writes):
            keys, arguments = self._commit_of(model, part)
            done += await self.call(FUNCTION, arguments[:keys], arguments[keys:])
        return done

    async def _watched(self, model: str, ranges: Sequence[tuple[float, float]], limit: int) -> list[str]:
        # One call for all shards, once a second, in place of a command for each range of each shard.
        keys, scores = [watch_key(model, shard) for shard in range(SHARDS)], [score for both in ranges for score in both]
        return [member.decode() for member in await self.call(WATCHED, keys, [limit, *scores])]

    async def scan(self, model: str, cursor: str, limit: int) -> Page:
        async def scan(position: int, count: int) -> tuple[int, list[bytes]]:
            return cast("tuple[int, list[bytes]]", await self._client.scan(position, match=pattern(model), count=count))

        position, keys = await self._ask(lambda: scanned(scan, position_of(cursor), limit))
        return Page(ids_of(model, keys), str(position) if position else "")

    async def count(self) -> int:
        return await counted(self.pipe)

    async def memory(self) -> Memory:
        return memory_of(await self._about("memory", "persistence"))

    async def ping(self) -> None:
        # A commit of nothing: refused where a real one would be (replica, full memory or disk).
        asked = self._clock.uptime()
        self._clock.read(seconds_of(await self.call(FUNCTION, [], self._commit_of("", [])[1])), asked)

    async def close(self) -> None:
        await self._client.aclose()

    async def call(self, function: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        command = ("FCALL", function, len(keys), *keys, *arguments)
        [reply] = await self._ask(lambda: asked(self._pool, [command]))
        if isinstance(reply, ResponseError) and unknown_function(reply):  # a failover, a replaced server: they are loaded again
            await self._load_function()
            [reply] = await self._ask(lambda: asked(self._pool, [command]))
        if isinstance(reply, ResponseError):
            raise await self._unavailable(reply) from reply
        return reply

    async def _about(self, *sections: str) -> Mapping[str, Any]:
        """What the server says of itself; nothing where we may not ask: then the first call that fails says it."""
        try:
            return cast("Mapping[str, Any]", await self._client.info(*sections))
        except NoPermissionError:
            return {}
        except UNANSWERED as error:
            raise await self._unavailable(error) from error

    async def _load_function(self) -> None:
        try:
            await self._client.function_load(LIBRARY, replace=True)
        except ResponseError as error:
            if too_old(error):
                raise StoreUnavailable(TOO_OLD) from error
            raise await self._unavailable(error) from error
        except UNANSWERED as error:
            raise await self._unavailable(error) from error

    async def pipe(self, commands: Sequence[Command], *, atomic: bool = False) -> list[Any]:
        async def ask() -> list[Any]:
            async with self._client.pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute()

        if atomic:
            return await self._ask(ask)
        replies = await self._ask(lambda: asked(self._pool, commands))
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise await self._unavailable(reply)
        return replies

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            return await ask()
        except UNANSWERED as error:
            raise await self._unavailable(error) from error

    async def _unavailable(self, error: Exception) -> StoreUnavailable:
        """What the door is told. Where one connection leads nowhere or to a demoted server, the others do too: connect anew."""
        if leads_nowhere(error):
            await self._pool.connect_anew()
        return self._told(error)


class _Packing(AbstractConnection):
    """Writes commands by hiredis, by which redis-py only reads replies on asyncio: a commit of 1,000 streams in a third of the time."""

    def pack_command(self, *args: Any) -> list[bytes]:
        words = (*args[0].encode().split(), *args[1:]) if isinstance(args[0], str) else args
        try:
            return [hiredis.pack_command(words)]
        except TypeError:  # redis-py takes more types, or says what is wrong
            packed: list[bytes] = super().pack_command(*args)
            return packed


_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
"""Parameters of a URL."""


def check_url(url: str) -> None:
    """Raises ValueError without a word of the URL: redis-py shows a part of its password, and takes what is no number for database 0."""
    if url.startswith(("redis://", "rediss://")) and not _ADDRESS.fullmatch(url):
        raise ValueError(
            "it is to be redis://:PASSWORD@HOST:PORT/DATABASE, with numbers for port and database; in a password / ? # are %2F %3F %23"
        )
    query = parse_qs(url.partition("?")[2])
    for name, path in ((key, path) for key in _FILES for path in query.get(key, [])):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:  # of which OpenSSL tells no name, at each try to connect
            raise ValueError(f"{name} is {path}, which cannot be read ({error.strerror})") from error


class Connections(redis.BlockingConnectionPool):
    """To one server, opened when they are needed.

    None waits in line to be given back: in redis-py's own pool it does where others are being closed, and a call that is cancelled there
    keeps it for good.
    """

    async def release(self, connection: AbstractConnection) -> None:
        self._in_use_connections.remove(connection)
        if connection.should_reconnect():  # type: ignore[no-untyped-call]
            await connection.disconnect(nowait=True)
        self._available_connections.append(connection)
        async with self._condition:  # free: nobody waits while he holds it
            self._condition.notify()

    async def connect_anew(self) -> None:
        """Close the idle ones now and the others when they are given back."""
        for connection in self._in_use_connections:
            connection.mark_for_reconnect()  # type: ignore[no-untyped-call]
        for connection in self._available_connections:
            await connection.disconnect(nowait=True)


def connections(url: str) -> Connections:
    """Raises ValueError for a URL that redis-py does not take."""
    check_url(url)
    pool = Connections.from_url(
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
    pool.connection_class = type("PackingConnection", (_Packing, pool.connection_class), {})
    return pool


async def asked(pool: Connections, commands: Sequence[Command]) -> list[Any]:
    """A reply or a ResponseError for each, in one round trip on one connection. Raises UNANSWERED.

    redis-py's pipeline has a timer for each reply: with 512 commands every second it took a tenth of the service's processor time.
    """
    if not commands:
        return []
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.send_packed_command(connection.pack_commands(commands))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return [await _reply(connection) for _ in commands]
    except builtins.TimeoutError as error:
        raise TimeoutError(f"no answer within {TIMEOUT_SECONDS:g} s") from error
    finally:
        await pool.release(connection)


async def _reply(connection: Any) -> Any:
    try:
        return await connection.read_response(timeout=math.inf)  # `asked` has one for all
    except ResponseError as error:
        return error


def memory_of(about: Mapping[str, Any]) -> Memory:
    """Of what INFO says of a server's memory and persistence."""
    most, policy = int(about.get("maxmemory", 0)), about.get("maxmemory_policy", "noeviction")
    failed = about.get("aof_last_bgrewrite_status", "ok") != "ok"
    if not most:
        return Memory(rewrite_failed=failed)
    used = int(about["used_memory"]) - int(about.get("mem_not_counted_for_evict", 0))
    return Memory(used / most, "" if policy == "noeviction" else policy, failed)


def seconds_of(time: Sequence[bytes]) -> float:
    """Since 1970, as TIME says it."""
    seconds, microseconds = map(int, time)
    return seconds + microseconds / 1e6


def leads_nowhere(error: BaseException) -> bool:
    """Whether the connection does, or to a demoted server."""
    return isinstance(error, ReadOnlyError | ConnectionError | TimeoutError)


def unknown_function(error: BaseException) -> bool:
    return isinstance(error, ResponseError) and "Function not found" in str(error)


def too_old(error: BaseException) -> bool:
    """The answer to FUNCTION LOAD."""
    return "unknown command" in str(error).lower()


async def scanned(scan: Callable[[int, int], Awaitable[tuple[int, list[bytes]]]], position: int, limit: int) -> tuple[int, list[bytes]]:
    """About `limit` keys of one server from `position` on, and the position after them (0 = the end).

    `scan(position, count)` is one step that looks at about `count` keys.
    """
    count, found = max(limit, 10), cast("list[bytes]", [])
    while True:
        position, keys = await scan(position, count)
        found += keys
        if position == 0 or len(found) >= limit:
            return position, found
        if not keys:  # few of the keys are this model's: look at more of them in one call
            count = max(count, min(2 * count, SCAN_COUNT))


async def counted(pipe: Callable[[Sequence[Command]], Awaitable[list[Any]]]) -> int:
    """About how many streams one server keeps a state of. Its other keys are none: trails, watches, and what others keep there."""
    size = int((await pipe([("DBSIZE",)]))[0])
    if size > COUNTED:
        drawn = await pipe([("RANDOMKEY",)] * DRAWN)
        return round(size * sum(key is not None and _STATE_KEY.match(key) is not None for key in drawn) / DRAWN)
    states, position = set[bytes](), 0
    while True:
        [(after, keys)] = await pipe([("SCAN", position, "MATCH", b"onset:{[0-9][0-9][0-9]}:[a-z0-9]*:*", "COUNT", SCAN_COUNT)])
        states.update(keys)
        if (position := int(after)) == 0:
            return len(states)


def pattern(model: str) -> bytes:
    """Of the state keys of a model, as SCAN takes it."""
    return b"onset:{[0-9][0-9][0-9]}:%s:*" % _GLOB.sub(rb"\\\g<0>", model.encode())


def ids_of(model: str, keys: Sequence[bytes]) -> list[str]:
    """The stream ids of a model's state keys, each once."""
    prefix = re.compile(rb"onset:\{\d{3}\}:" + re.escape(model.encode()) + rb":")
    ids = [key[match.end() :].decode() for key in keys if (match := prefix.match(key))]
    return list(dict.fromkeys(ids))


def calls(writes: Sequence[Write]) -> Iterator[Sequence[Write]]:
    """Runs of writes that one call may carry."""
    start = size = 0
    for i, write in enumerate(writes):
        more = len(write.value) + len(write.trail) + sum(map(len, write.results)) + sum(map(len, write.log))
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


def _named(fields: Mapping[bytes, bytes] | Sequence[bytes]) -> dict[str, bytes]:
    """`fields`: as the one protocol answers HGETALL, or as the other does."""
    pairs = fields.items() if isinstance(fields, Mapping) else zip(fields[::2], fields[1::2], strict=True)
    return {name.decode(errors="replace"): value for name, value in pairs}


def position_of(cursor: str) -> int:
    """Where a scan goes on; a cursor that is none of ours starts afresh."""
    position = int(cursor) if re.fullmatch("[0-9]{1,20}", cursor) else 0
    return position if position <= MAX_CURSOR else 0
