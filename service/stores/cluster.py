"""The state store in a Redis Cluster: the keys of redis.py, each command sent to the primary that has the slot of its key.

    load, commit   one MGET or one call of commit.lua for each shard, one pipeline for each node, all nodes at once

    MOVED          the slot's new owner is noted, the command goes there        ┐ the node has done nothing:
    ASK            the command goes there once, right behind ASKING             │ these are no retries
    TRYAGAIN       some keys of a call are already on their way to another      │
                   node: again until all are, TIMEOUT_SECONDS at most           │
    no function    a node that is new or lost its data: it is loaded, again     ┘
    other errors   StoreUnavailable or StoreRefused, as on one server; before the next call the cluster is asked which node has which slot

Each stream's write is one step, since its keys share a slot. A call is one step for each shard, not for the whole: when it fails, what
other shards wrote stays, and sent again it is a duplicate, as after any commit whose answer was lost.

redis-py's own client of clusters is not used (8.1): it sends ASKING and the command over whichever connections are free, refuses where
a pool would wait for a connection, tries commits again by itself, and runs MULTI in a thread that the event loop waits for.
"""

from __future__ import annotations

import asyncio
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, TryAgainError

from service.errors import StoreUnavailable
from service.stores import OUTPUT, Memory, Page, Write
from service.stores.clock import StoreClock
from service.stores.redis import (
    FUNCTION,
    LIBRARY,
    POLICY_KEY,
    SHARDS,
    TIMEOUT_SECONDS,
    TOO_OLD,
    UNANSWERED,
    Command,
    Commands,
    asked,
    calls,
    check_url,
    connections,
    counted,
    first_key,
    ids_of,
    leads_nowhere,
    log_key,
    memory_of,
    pattern,
    position_of,
    scanned,
    seconds_of,
    shard_of,
    state_key,
    too_old,
    unknown_function,
    watch_key,
)

SLOTS = [key_slot(watch_key("", shard)) for shard in range(SHARDS)]
"""Of each shard."""
OURS = frozenset([*SLOTS, *(key_slot(key) for key in (POLICY_KEY, b"{alerts}", b"{live}", b"{patterns}"))])
AT_ONCE = 2
"""Rounds of a call before it pauses between them."""
PAUSE_SECONDS = 0.02
PORT = 6379

Address = tuple[str, int]


@dataclass
class _Request:
    """Commands on keys of one slot, and what became of them."""

    slot: int
    commands: Sequence[Command]
    atomic: bool = False
    """Between MULTI and EXEC; otherwise there is one command."""
    reply: Any = None
    """An error means again."""
    asked: Address | None = None
    """Where ASK said to go."""

    def sent(self) -> list[Command]:
        commands = [("MULTI",), *self.commands, ("EXEC",)] if self.atomic else [*self.commands]
        return [("ASKING",), *commands] if self.asked else commands

    def outcome(self, replies: Sequence[Any]) -> Any:
        """The last of the replies to what was sent, or the first error in them."""
        within = replies[-1] if self.atomic and isinstance(replies[-1], list) else []
        return next((reply for reply in (*replies, *within) if isinstance(reply, Exception)), replies[-1])


class ClusterStore(Commands):
    """Implements StateStore in a Redis Cluster, for writes that are not of a queue.

    `open` must have succeeded once; after an outage the same object works again.
    """

    def __init__(self, url: str, *, state_ttl: int, result_ttl: int, clock: StoreClock | None = None) -> None:
        """TTLs in seconds; `url` of one of the nodes, or of several with commas between: redis:// or rediss://. Raises ValueError."""
        super().__init__(state_ttl=state_ttl, result_ttl=result_ttl, output=OUTPUT, clock=clock)
        self._seeds = dict(_seed(part) for part in re.split(r",(?=\w+://)", url))
        self._nodes = {address: _Node(url) for address, url in self._seeds.items()}
        self._owners: dict[int, Address] = {}
        """Which primary has a slot of ours, as far as we know."""
        self._stale = True
        self._lock = asyncio.Lock()

    async def read_log(self, after: Sequence[str], limit: int) -> list[tuple[int, Sequence[Any]]]:
        parts = await self.pipe([("XRANGE", log_key(shard), f"({id_}", "+", "COUNT", limit) for shard, id_ in enumerate(after)])
        return [(shard, entries) for shard, entries in enumerate(parts) if entries]

    async def open(self) -> None:
        """Load the commit function into every primary, read the clock. Raises StoreUnavailable, also for servers too old or not in
        cluster mode.
        """
        self._stale = True
        await self._know()
        await asyncio.gather(*(self._load_function(address) for address in self._primaries()))
        await self.ping()

    async def _watched(self, model: str, ranges: Sequence[tuple[float, float]], limit: int) -> list[str]:
        keys = [watch_key(model, shard) for shard in range(SHARDS)]
        commands = [("ZRANGEBYSCORE", key, least, most, "LIMIT", 0, limit) for key in keys for least, most in ranges]
        return [member.decode() for members in await self.pipe(commands) for member in members]

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        shards = _by_shard(stream_ids)
        requests = [
            _Request(SLOTS[shard], [("MGET", *(state_key(model, stream_ids[i]) for i in places))]) for shard, places in shards.items()
        ]
        values: list[bytes | None] = [None] * len(stream_ids)
        for places, found in zip(shards.values(), await self._run(requests), strict=True):
            for i, value in zip(places, found, strict=True):
                values[i] = value
        return values

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        requests, order = [], []
        for shard, places in _by_shard([write.stream_id for write in writes]).items():
            order += places
            for part in calls([writes[i] for i in places]):
                keys, arguments = self._commit_of(model, part)
                requests.append(_Request(SLOTS[shard], [("FCALL", FUNCTION, keys, *arguments)]))
        outcomes = [0] * len(writes)
        for i, outcome in zip(order, [outcome for some in await self._run(requests) for outcome in some], strict=True):
            outcomes[i] = outcome
        return outcomes

    async def scan(self, model: str, cursor: str, limit: int) -> Page:
        """A cursor holds for one distribution of the slots: after a change the scan starts afresh.

        Streams of a slot that is just being moved may be missed.
        """
        self._stale = True
        await self._know()
        primaries = self._primaries()
        place = zlib.crc32(repr(sorted(self._owners.items())).encode())
        index, position = _place(cursor, place)
        found: list[bytes] = []
        while index < len(primaries) and len(found) < limit:
            position, keys = await self._scan(primaries[index], model, position, limit - len(found))
            found += keys
            index += position == 0
        return Page(ids_of(model, found), f"{place:010d}{index:05d}{position}" if index < len(primaries) else "")

    async def count(self) -> int:
        await self._know()
        return sum(await asyncio.gather(*(counted(partial(self._all, address)) for address in self._primaries())))

    async def memory(self) -> Memory:
        await self._know()
        primaries = self._primaries()
        each = [memory_of(about) for about in await asyncio.gather(*map(self._about_memory, primaries))]
        evicting = [f"{one.evicting} ({host}:{port})" for one, (host, port) in zip(each, primaries, strict=True) if one.evicting]
        fullness = max((one.fullness for one in each if not math.isnan(one.fullness)), default=math.nan)
        return Memory(fullness, ", ".join(evicting), any(one.rewrite_failed for one in each))

    async def ping(self) -> None:
        # A commit of nothing to each primary, in one of its slots: refused where a real one would be. The first slot's has the clock.
        await self._know()
        shards: dict[Address, int] = {}
        for shard, slot in enumerate(SLOTS):
            if address := self._owners.get(slot):
                shards.setdefault(address, shard)
        _, arguments = self._commit_of("", [])
        asked = self._clock.uptime()
        commits = [_Request(SLOTS[shard], [("FCALL", FUNCTION, 1, watch_key("", shard), *arguments)]) for shard in shards.values()]
        for time in (await self._run(commits))[:1]:
            self._clock.read(seconds_of(time), asked)

    async def close(self) -> None:
        await asyncio.gather(*(node.pool.aclose() for node in self._nodes.values()))

    async def pipe(self, commands: Sequence[Command], *, atomic: bool = False) -> list[Any]:
        if not atomic:
            return await self._run([_Request(key_slot(first_key(command)), [command]) for command in commands])
        [replies] = await self._run([_Request(key_slot(commands[0][1]), commands, atomic=True)])
        return cast("list[Any]", replies)

    async def call(self, function: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        [reply] = await self._run([_Request(key_slot(keys[0]), [("FCALL", function, len(keys), *keys, *arguments)])])
        return reply

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self, requests: Sequence[_Request]) -> list[Any]:
        """The reply to each. Raises StoreUnavailable when all nodes have answered or failed."""
        clock = asyncio.get_running_loop().time
        until, rounds, todo = clock() + TIMEOUT_SECONDS, 0, requests
        while todo:
            if rounds >= AT_ONCE:
                if clock() > until:
                    raise self._unavailable(todo[0].reply)
                await asyncio.sleep(PAUSE_SECONDS)
            await self._round(todo)
            todo = [request for request in todo if isinstance(request.reply, Exception)]
            rounds += 1
        return [request.reply for request in requests]

    async def _round(self, requests: Sequence[_Request]) -> None:
        await self._know()
        batches: dict[Address, list[_Request]] = defaultdict(list)
        for request in requests:
            batches[request.asked or self._owner(request.slot)].append(request)
        outcomes = await asyncio.gather(*(self._send(address, batch) for address, batch in batches.items()), return_exceptions=True)
        for error in outcomes:
            if error is not None:
                raise error

    async def _send(self, address: Address, batch: Sequence[_Request]) -> None:
        replies = iter(await self._ask(address, [command for request in batch for command in request.sent()]))
        for request in batch:
            request.reply = request.outcome([next(replies) for _ in request.sent()])
            request.asked = None
        for request in batch:
            self._redirect(address, request)
        if any(unknown_function(request.reply) for request in batch):
            await self._load_function(address)

    def _redirect(self, address: Address, request: _Request) -> None:
        """Raises StoreUnavailable where going again would not help."""
        match request.reply:
            case MovedError() as error:
                self._owners[request.slot] = (error.host or address[0], error.port)
            case AskError() as error:
                request.asked = (error.host or address[0], error.port)
            case Exception() as error if not isinstance(error, TryAgainError) and not unknown_function(error):
                self._stale = True
                raise self._unavailable(error, address)

    async def _load_function(self, address: Address) -> None:
        reply = (await self._ask(address, [("FUNCTION", "LOAD", "REPLACE", LIBRARY)]))[0]
        if isinstance(reply, Exception):
            raise StoreUnavailable(TOO_OLD) if too_old(reply) else self._unavailable(reply, address)

    async def _about_memory(self, address: Address) -> dict[str, str]:
        """What a node says of it; nothing where we may not ask."""
        reply = (await self._ask(address, [("INFO", "memory", "persistence")]))[0]
        return dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line) if isinstance(reply, bytes) else {}

    async def _scan(self, address: Address, model: str, position: int, limit: int) -> tuple[int, list[bytes]]:
        async def scan(position: int, count: int) -> tuple[int, list[bytes]]:
            after, keys = await self._one(address, ("SCAN", position, "MATCH", pattern(model), "COUNT", count))
            return int(after), keys

        return await scanned(scan, position, limit)

    async def _one(self, address: Address, command: Command) -> Any:
        """The reply to a command without a key."""
        return (await self._all(address, [command]))[0]

    async def _all(self, address: Address, commands: Sequence[Command]) -> list[Any]:
        """The same for several, in one round trip."""
        replies = await self._ask(address, commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise self._unavailable(reply, address)
        return replies

    async def _ask(self, address: Address, commands: Sequence[Command]) -> list[Any]:
        """A reply or a ResponseError for each. Raises StoreUnavailable when the node does not answer."""
        node = self._nodes.get(address) or self._nodes.setdefault(address, _Node(_beside(next(iter(self._seeds.values())), address)))
        try:
            return await node.ask(commands)
        except UNANSWERED as error:
            self._stale = True
            raise self._unavailable(error, address) from error

    def _unavailable(self, error: Exception, address: Address | None = None) -> StoreUnavailable:
        return self._told(error, f"{address[0]}:{address[1]}, " if address else "")

    # ── who has which slot ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _owner(self, slot: int) -> Address:
        if slot not in self._owners:
            self._stale = True
            raise StoreUnavailable(f"The state store does not answer (no node of the cluster has slot {slot}).")
        return self._owners[slot]

    def _primaries(self) -> list[Address]:
        """Those that have slots of ours, in the order of their slots."""
        return list(dict.fromkeys(self._owners[slot] for slot in sorted(self._owners)))

    async def _know(self) -> None:
        """Ask which node has which slot, where what we know may no longer hold. Raises StoreUnavailable."""
        if not self._stale:
            return
        async with self._lock:
            if self._stale:
                self._owners = await self._asked()
                self._stale = False
                await self._forget()

    async def _asked(self) -> dict[int, Address]:
        """From the first node that answers, those that failed last."""
        why: StoreUnavailable | None = None
        for address in sorted(self._nodes, key=lambda address: self._nodes[address].failed):
            try:
                if ranges := await self._one(address, ("CLUSTER", "SLOTS")):
                    return _owners(ranges, address[0])
            except StoreUnavailable as error:
                why = error
        if why is not None and "cluster support disabled" in why.detail:
            raise StoreUnavailable("The server is not a node of a Redis Cluster: unset ONSET_REDIS_CLUSTER.") from why
        raise why or StoreUnavailable("The state store does not answer (no node of the cluster has any slot).")

    async def _forget(self) -> None:
        """Nodes that have left."""
        for address in self._nodes.keys() - self._seeds.keys() - set(self._owners.values()):
            await self._nodes.pop(address).pool.connect_anew()


class _Node:
    def __init__(self, url: str) -> None:
        self.pool = connections(url)
        self.failed = False
        """Whether it did not answer the last time."""

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """A reply or a ResponseError for each, in one round trip on one connection. Raises UNANSWERED."""
        try:
            replies = await asked(self.pool, commands)
        except UNANSWERED as error:
            self.failed = True
            if leads_nowhere(error):
                await self.pool.connect_anew()
            raise
        self.failed = False
        return replies


def _by_shard(stream_ids: Sequence[str]) -> dict[int, list[int]]:
    """Where in `stream_ids` the streams of each shard are, in order."""
    shards: dict[int, list[int]] = defaultdict(list)
    for i, stream_id in enumerate(stream_ids):
        shards[shard_of(stream_id)].append(i)
    return shards


def _owners(ranges: Sequence[Any], host: str) -> dict[int, Address]:
    """From the answer to CLUSTER SLOTS: first and last slot, then [host, port, …] of the primary; no host = the one that was asked."""
    owners: dict[int, Address] = {}
    for first, last, (name, port, *_), *_ in ranges:
        owners |= dict.fromkeys((slot for slot in OURS if first <= slot <= last), (name.decode() if name else host, int(port)))
    return owners


def _place(cursor: str, place: int) -> tuple[int, int]:
    """Index of the primary and position in it; a cursor that is none of ours, or of another distribution of the slots, starts afresh."""
    parts = re.fullmatch("([0-9]{10})([0-9]{5})([0-9]{1,20})", cursor)
    return (int(parts[2]), position_of(parts[3])) if parts and int(parts[1]) == place else (0, 0)


def _seed(url: str) -> tuple[Address, str]:
    check_url(url)
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.path.strip("/") not in ("", "0"):
        raise ValueError(f"a node of a cluster is redis://HOST:PORT or rediss://HOST:PORT, database 0, and this is '{parts.scheme}://…'")
    return (parts.hostname, parts.port or PORT), url


def _beside(url: str, address: Address) -> str:
    """The URL of another node."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return parts._replace(netloc=f"{user}{at}{host}:{address[1]}").geturl()
