"""Where events come from besides HTTP. One protocol for queues, interchangeable implementations; `consumer.py` is the door they lead to.

    receive ─► Batch ─► (consumer: parse, score, retry) ─► publish    the results of a part of it, where the queue takes results
                                                        ├► settle     its entries are done; some became dead letters
                                                        └► abandon    its partition is no longer ours, or we stop: whoever owns it
                                                                      next gets them again

A batch is of one partition, in its order, and the next one of that partition is handed out only once it is settled or abandoned. So a
stream whose events all go to one partition is scored in order, and a slow consumer pauses what it has not yet asked for: back-pressure
is not to receive.

What is delivered again is known by its position where the queue has such (it rises within a partition for ever), and otherwise by the
event's own identity. Results are out before the entries are acknowledged, at least once: a result's id is the same each time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from service.errors import ItemError
from service.events import Lease, Published

MAX_EVENTS = 2**16
"""Of one entry: the last bits of an event's position."""
POSITIONS = 2**79
"""Of the entries of a partition."""

_NO_CHARACTERS = "".join([chr(0x10000 * plane + last) for plane in range(17) for last in (0xFFFE, 0xFFFF)])
_UNCARRIED = re.compile(rf"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_NO_CHARACTERS}]")


class Message(msgspec.Struct, frozen=True, gc=False):
    """One entry of a queue, as sent."""

    id: bytes
    """As the queue names it."""
    position: int
    """Rises within the partition for ever; below POSITIONS, or the entry cannot be used. 0 where the queue has no positions."""
    arrived: float
    """When it came to the queue, seconds since 1970."""
    payload: bytes | None
    """One event or several; None = the headers are the fields of one event, flat."""
    headers: Mapping[bytes, bytes] = msgspec.field(default_factory=dict)
    """By name; what a queue calls headers, properties or fields."""
    key: str | None = None
    """Names the stream where neither the payload nor the mapping does: Kafka's message key."""
    topic: str = ""
    """Topic, subject or routing key it was sent to."""
    event_id: str | None = None
    """Names its event where neither the payload nor the mapping does: AMQP's message_id."""


@dataclass(frozen=True)
class Batch:
    """Entries of one partition, in order."""

    partition: str
    source: int
    """Identity of the partition, 32 bits; 0 = its messages have no positions, and only the events' own identities tell them apart."""
    messages: Sequence[Message]
    lease: Lease | None = None
    """Where the queue lies in the state store: entries of one event are acknowledged, and results published, by the commit itself."""


@dataclass(frozen=True)
class Letter:
    """What could not be used of an entry, and why; `index` = which of its several events."""

    message: Message
    error: ItemError
    index: int | None = None

    @property
    def about(self) -> dict[str, str]:
        """Why, as every queue can carry it: what is no text there is escaped. Names are those of ItemError."""
        error = self.error
        about = {name: printable(text) for name, text in (("reason", error.detail), ("field", error.field), ("value", error.value))}
        return about if self.index is None else about | {"index": str(self.index)}


@dataclass
class Settlement:
    """What became of a batch."""

    committed: set[bytes] = field(default_factory=set)
    """Entries that the commit has acknowledged."""
    letters: list[Letter] = field(default_factory=list)


def identity(name: str) -> int:
    """Of a partition, from what names it for ever: a Batch's `source`, never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") or 1


def address(url: str) -> str:
    """Of a broker, without user and password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def printable(text: str) -> str:
    """With escapes for control characters, halves of characters, and what is none: brokers and their clients refuse such."""
    return _UNCARRIED.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class Source(Protocol):
    """A queue. Its calls raise StoreUnavailable while the queue does not answer; then they may be made again."""

    name: str
    """As metrics and logs call it."""
    publishes: bool
    """Whether `publish` takes results; not where the commit publishes them (Batch.lease), nor without an output."""

    async def open(self) -> None:
        """Start to listen; returns at once, also while the queue does not answer."""

    async def receive(self) -> Batch:
        """The next batch of any partition that has none under way; waits for one."""

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        """Results of some of its events, in order; the queue has them when this returns. Raises Fenced where it is not ours."""

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        """Write the dead letters, then acknowledge all entries; in one step where the queue can. Raises Fenced where they are not ours."""

    def abandon(self, batch: Batch) -> None:
        """Its entries are to be delivered again."""

    async def lag(self) -> int | None:
        """Entries of our partitions that are not acknowledged yet; None = the queue cannot tell."""

    async def close(self) -> None:
        """Let others have our partitions, at once."""
