"""What replicas tell each other for the pages that watch them. It is a view: lost with the store's memory, and nobody misses it.

Keys (each name once, here), both in one slot of a cluster; each is gone EXPIRY_SECONDS after the last entry:

    onset:{live}:asks-v1    which replica has pages that watch, and what: a stream of ASKS entries at most with the one field `ask`
    onset:{live}:events-v1  what the others have scored since: a stream of the last KEPT_SECONDS, its entries with the one field `part`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Exchanged:
    """What one round trip brought."""

    asks: list[bytes]
    parts: list[bytes]
    more: bool
    """Whether there are more of either already."""


class LiveLog:
    """One replica's place in it: what it reads is what came after it read last, its own entries among them."""

    def __init__(self) -> None:
        self._store: Commands | None = None
        self._asks_after = "0-0"
        self._parts_after = ""
        self._told = 0

    def connect(self, store: Commands) -> None:
        self._store = store

    async def exchange(self, ask: bytes | None, parts: Sequence[bytes], *, reads: bool) -> Exchanged:
        """Add an ask and parts of at most some hundred kB each, and read what is new; of the parts only with `reads`: from the first
        exchange with it on. That one needs an ask, whose id says when it was. Raises StoreUnavailable.
        """
        if self._store is None:
            raise StoreUnavailable("The state store has not been opened yet.")
        if not reads:
            self._parts_after = ""
        commands = self._adding(ask, parts)
        added = len(commands)
        commands.append(_range(ASKS_KEY, self._asks_after))
        if self._parts_after:
            commands.append(_range(EVENTS_KEY, self._parts_after))
        replies = await self._store.pipe(commands)
        if ask is not None and reads and not self._parts_after:
            self._parts_after = replies[0].decode()
        if parts:
            self._told = int(replies[added - 2].partition(b"-")[0])
        asks, new = replies[added], replies[added + 1] if len(replies) > added + 1 else []
        self._asks_after = asks[-1][0].decode() if asks else self._asks_after
        self._parts_after = new[-1][0].decode() if new else self._parts_after
        return Exchanged(_values(asks), _values(new), READ in (len(asks), len(new)))

    def _adding(self, ask: bytes | None, parts: Sequence[bytes]) -> list[Command]:
        commands: list[Command] = []
        if ask is not None:
            commands += [("XADD", ASKS_KEY, "MAXLEN", "=", ASKS, "*", "ask", ask), ("EXPIRE", ASKS_KEY, EXPIRY_SECONDS)]
        oldest = max(0, self._told - 1000 * KEPT_SECONDS)
        for part in parts:
            commands += [("XADD", EVENTS_KEY, "MINID", "=", oldest, "*", "part", part), ("EXPIRE", EVENTS_KEY, EXPIRY_SECONDS)]
        return commands


def _range(key: bytes, after: str) -> Command:
    return "XRANGE", key, f"({after}", "+", "COUNT", READ


def _values(entries: Sequence[Any]) -> list[bytes]:
    """The one field of each, as either client answers XRANGE."""
    return [next(iter(fields.values())) if isinstance(fields, Mapping) else fields[1] for _, fields in entries]
