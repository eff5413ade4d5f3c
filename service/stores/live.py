"""What replicas tell each other for the pages that watch them. It is a view: lost with the store's memory, and nobody misses it.

Keys (each name once, here), both in one slot of a cluster; each is gone EXPIRY_SECONDS after the last entry:

    onset:{live}:asks-v1    which replica has pages that watch, and what: a stream of ASKS entries at most with the one field `ask`
    onset:{live}:events-v1  what the others have scored since: a stream of the last KEPT_SECONDS, its entries with the one field `part`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import StoreUnavailable
from service.stores.redis import Command, Commands

ASKS_KEY, EVENTS_KEY = b"onset:{live}:asks-v1", b"onset:{live}:events-v1"
ASKS = 256
KEPT_SECONDS = 5
"""By the store's clock: who reads less often than that misses something."""
EXPIRY_SECONDS = 30
READ = 32
"""Entries read in one go."""
START = "0-0"
"""Before all of a stream."""


@dataclass(frozen=True)
class Exchanged:
    """What one round trip brought."""

    asks: list[bytes]
    parts: list[bytes]
    more: bool
    """Whether there are more of either already."""


class _Place:
    """Up to where a stream was read. Ids follow the store's clock: after a pause in which a stream expires they may begin at less."""

    def __init__(self, key: bytes, clock: Callable[[], float]) -> None:
        self._key, self._clock, self._after = key, clock, START
        self._moved_at = clock()

    def next(self) -> Command:
        if self._clock() - self._moved_at > 2 * EXPIRY_SECONDS:
            self.move(START)
        return "XRANGE", self._key, f"({self._after}", "+", "COUNT", READ

    def move(self, to: str) -> None:
        self._after, self._moved_at = to, self._clock()

    def read(self, entries: Sequence[Any]) -> None:
        """What `next` brought."""
        if entries:
            self.move(entries[-1][0].decode())


class LiveLog:
    """One replica's place in it: what it reads is what came after it read last, its own entries among them. `clock` gives monotonic
    seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._store: Commands | None = None
        self._asks, self._parts = _Place(ASKS_KEY, clock), _Place(EVENTS_KEY, clock)
        self._reads = False
        self._told = 0

    def connect(self, store: Commands) -> None:
        self._store = store

    async def exchange(self, ask: bytes | None, parts: Sequence[bytes], *, reads: bool) -> Exchanged:
        """Add an ask and parts of at most some hundred kB each, and read what is new; of the parts only with `reads`, from the first
        exchange with it on. Raises StoreUnavailable.
        """
        if self._store is None:
            raise StoreUnavailable("The state store has not been opened yet.")
        begins = reads and not self._reads
        commands: list[Command] = [("XREVRANGE", EVENTS_KEY, "+", "-", "COUNT", 1)] if begins else []  # before it is asked
        commands += self._adding(ask, parts)
        added = len(commands)
        commands.append(self._asks.next())
        if reads and not begins:
            commands.append(self._parts.next())
        replies = await self._store.pipe(commands)
        self._reads = reads
        if begins:
            self._parts.move(replies[0][0][0].decode() if replies[0] else START)
        if parts:
            self._told = int(replies[added - 2].partition(b"-")[0])
        asks, new = replies[added], replies[added + 1] if len(replies) > added + 1 else []
        self._asks.read(asks)
        self._parts.read(new)
        return Exchanged(_values(asks), _values(new), READ in (len(asks), len(new)))

    def _adding(self, ask: bytes | None, parts: Sequence[bytes]) -> list[Command]:
        commands: list[Command] = []
        if ask is not None:
            commands += [("XADD", ASKS_KEY, "MAXLEN", "=", ASKS, "*", "ask", ask), ("EXPIRE", ASKS_KEY, EXPIRY_SECONDS)]
        oldest = max(0, self._told - 1000 * KEPT_SECONDS)
        for part in parts:
            commands += [("XADD", EVENTS_KEY, "MINID", "=", oldest, "*", "part", part), ("EXPIRE", EVENTS_KEY, EXPIRY_SECONDS)]
        return commands


def _values(entries: Sequence[Any]) -> list[bytes]:
    """The one field of each, as either client answers XRANGE."""
    return [next(iter(fields.values())) if isinstance(fields, Mapping) else fields[1] for _, fields in entries]
