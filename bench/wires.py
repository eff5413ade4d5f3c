"""The user's side of a queue, for soaks: events in, results out, as any producer and any reader of the broker would."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol, cast
from zlib import crc32

import msgspec
from redis.exceptions import RedisError

from bench.victims import Store, Victim
from service.events import Event, Result

READ = 5000
"""Results read at once."""


class NotSentError(Exception):
    """The broker did not confirm: the events may be in the queue or not, and are to be sent again."""


class Wire(Protocol):
    """One broker's."""

    exactly: bool
    """Whether results are published exactly once; otherwise at least once."""

    @property
    def victims(self) -> Sequence[Victim]:
        """What can be killed and started again without losing what was confirmed; the state store is not among them."""

    @property
    def settings(self) -> Mapping[str, str]:
        """ONSET_… variables of a replica, without the prefix."""

    async def open(self) -> None:
        """Everything is running by now."""

    async def send(self, events: Sequence[Event]) -> None:
        """In order, until the broker has confirmed them. Raises NotSentError."""

    async def results(self) -> list[Result]:
        """Those that came out since the last call, in order. Raises NotSentError while the broker does not answer."""

    async def waiting(self) -> int:
        """Entries that are not acknowledged. Raises NotSentError."""

    async def dead(self) -> int:
        """Dead letters so far. Raises NotSentError."""

    async def close(self) -> None: ...


class RedisStreamsWire:
    """Partitions in the state store itself."""

    exactly = True
    victims: Sequence[Victim] = ()

    def __init__(self, store: Store, partitions: int) -> None:
        self._store = store
        self._keys = [f"onset:events:{{{p}}}" for p in range(partitions)]
        self._last = "0"

    @property
    def settings(self) -> Mapping[str, str]:
        return {
            "STREAMS_INPUT": "onset:events",
            "STREAMS_PARTITIONS": str(len(self._keys)),
            "STREAMS_LEASE_SECONDS": "1",
            "STREAMS_MAX_RESULTS": str(100_000_000),
        }

    async def open(self) -> None: ...

    async def send(self, events: Sequence[Event]) -> None:
        async with self._store.client.pipeline(transaction=False) as pipeline:
            for event in events:
                key = self._keys[crc32((event.stream_id or "").encode()) % len(self._keys)]
                pipeline.xadd(key, {"event": msgspec.json.encode(event)})
            await _asked(pipeline.execute())

    async def results(self) -> list[Result]:
        entries = await _asked(self._store.client.xrange("onset:results", min=f"({self._last}", count=READ))
        if entries:
            self._last = entries[-1][0].decode()
        return [msgspec.json.decode(fields[b"result"], type=Result) for _, fields in entries]

    async def waiting(self) -> int:
        return sum([int(await _asked(self._store.client.xlen(key))) for key in self._keys])

    async def dead(self) -> int:
        return int(await _asked(self._store.client.xlen("onset:dead-letters")))

    async def close(self) -> None: ...


async def _asked(answer: Awaitable[Any]) -> Any:
    try:
        return cast("Any", await answer)
    except (RedisError, OSError) as error:
        raise NotSentError from error
