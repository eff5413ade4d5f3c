"""Where stream states live. One protocol, one contract suite (`tests/contracts/test_stores.py`), interchangeable implementations.

A stream's value and its trail:

    state key   one value, see `state.py`; replaced by every commit if its token is still the expected one
    watch       of each stream that is waited for, the time at which it is due: a deadline, or SILENT + when a silent one is forgotten.
                Written by the commit; a watch may be due too early (the value has the true deadline), never missing for long
    alert log   what happened to the alerts of the streams (alerts.py), in the order of the commits; at most LOG_LENGTH entries of each of
                some parts, each with all entries of its streams. Whoever folds them into alerts takes them out (book.py)
    trail key   results of the stream's last commits of several events at once, and of one that was sent again beside its successors, so
                that what is sent once more gets its scores again; at most TRAIL_COMMITS blobs, gone after the result TTL

    commit, atomic for each stream:
        a lease it is written under is lost      →  nothing is written                                           →  FENCED
        token of the stored value == expected ?  →  SET value EX ttl; RPUSH trail; LTRIM; EXPIRE; watch;
                                                    XADD the alert log, and results to the output stream;
                                                    XACK the input's entries                                     →  WRITTEN
                                      otherwise  →  nothing is written                                           →  LOST

Beside the streams it keeps one small mapping for all replicas, the policy as it was changed at run time (control.py); leases: names
that one replica holds at a time, each with notes that its next holder reads (sources/mqtt.py); and of each model a claim, which says
which file of it is in force (claims.py).

What a crash, of the replica, its connection or the client, leaves (tests/test_protocol_model.py stops at each of these points):

    before the commit is sent        nothing: the event may be sent again, to any replica
    while it is on its way           nothing yet; it may be applied at any later time, and is LOST if anyone else has committed by then
    applied, its answer is lost      the state with the event's identity and result: sent again it is answered, not stepped again. A copy
                                     that the replica holds is stale; a fresh start it was is not in the replica's counter
    answered, the reply is lost      the same, and the replica's copy is good: the next commit compares it

An event of a queue in the store cannot even be delivered again: its entry is acknowledged, and its result published, by the very step
that scored it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from service.errors import StoreUnavailable
from service.events import Lease

LOST, WRITTEN, FENCED = 0, 1, 2
"""What became of a write: another writer was first; it is in the store; a lease it was to be written under is no longer ours."""
TRAIL_COMMITS = 8
LOG_LENGTH = 10_000
CURSOR_DIGITS = 40
PING_SECONDS = 1.0
"""Within which a store says that it can be written to; a replica whose store takes longer is not ready, and sent nothing."""
NEARLY_FULL = 0.9
"""A store whose memory is fuller takes no new streams: what is left is for what known ones grow by, and for results."""
SILENT = 1e12
"""Watches from here on are of silent streams."""


class Write(msgspec.Struct, frozen=True, gc=False):
    """The new value of one stream, to be written if the stored one still has the token `expected` (b"" = absent).

    `value` b"" leaves the stream as it is, whatever it is; then `results` and `acks` alone are written.
    """

    stream_id: str
    expected: bytes
    value: bytes | memoryview
    trail: bytes = b""
    watch: float | None = None
    """When the stream is due (s), 0 = no longer watched, None = as it is."""
    results: Sequence[bytes] = ()
    """For the output stream, in order."""
    acks: Sequence[tuple[Lease, bytes]] = ()
    """Entries of a queue that are done with this write, each under its lease; b"" = under the lease only."""
    log: Sequence[bytes] = ()
    """For the alert log, in order; only with a value."""
    ttl: int = 0
    """Seconds after which the value is forgotten; 0 = the state TTL."""


@dataclass(frozen=True)
class Output:
    """The stream that results are appended to, and about how many of them it keeps."""

    key: str = "onset:results"
    length: int = 1_000_000


OUTPUT = Output()


@dataclass(frozen=True)
class Page:
    """One page of stream ids; `cursor` "" = that was the last one, otherwise it is of CURSOR_DIGITS digits at most."""

    stream_ids: list[str]
    cursor: str


@dataclass(frozen=True)
class Memory:
    """How the store's memory is used, and its disk."""

    fullness: float = math.nan
    """Part of its limit, of several servers of the fullest; NaN = there is none, or it does not say."""
    evicting: str = ""
    """Its maxmemory-policy where that throws states away, of several servers with which; "" = it does not, or does not say."""
    rewrite_failed: bool = False
    """Whether its append-only file, of any server, could not be written anew the last time: it grows until the disk is full."""

    @property
    def nearly_full(self) -> bool:
        """A full one refuses by itself, and loses nothing then; one that evicts makes room."""
        return NEARLY_FULL < self.fullness < 1 and not self.evicting


class StateStore(Protocol):
    """All methods raise StoreUnavailable when the server does not answer, as StoreRefused when it refuses. `model` is a detector's name."""

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        """Values of the streams, None where there is none. One round trip."""

    async def load_trails(self, model: str, stream_ids: Sequence[str]) -> list[list[bytes]]:
        """Blobs of records of the streams' recent multi-event commits, oldest first."""

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        """Write each value if its stream is unchanged: WRITTEN, LOST or FENCED for each. Atomic for each stream; one round trip."""

    async def delete(self, model: str, stream_id: str, entry: bytes = b"") -> bool:
        """Forget a stream with its trail and its watch; whether there was one. `entry` goes into the alert log in the same step."""

    async def due(self, model: str, now: float, limit: int) -> list[str]:
        """At most about `limit` streams whose watch is due at `now`, silent ones that should be forgotten by now among them."""

    async def silent(self, model: str, limit: int) -> tuple[int, list[str]]:
        """How many streams are watched as silent, and at most about `limit` of them."""

    async def watch(self, model: str, times: Mapping[str, float]) -> None:
        """Set the watches of streams outside a commit; 0 = no longer watched."""

    async def scan(self, model: str, cursor: str, limit: int) -> Page:
        """About `limit` stream ids from `cursor` on ("" = from the start). Every stream that stays is seen at least once."""

    async def waited(self, model: str, limit: int) -> tuple[int, list[str]]:
        """How many streams are watched and not silent, and at most about `limit` of all watched ones, drawn by chance."""

    async def policy(self) -> dict[str, bytes]:
        """What was changed at run time, by name; empty = nothing."""

    async def change_policy(self, changes: Mapping[str, bytes | None]) -> dict[str, bytes]:
        """Set these (None = remove) in one step and leave the others; returns all as they are then."""

    async def hold(self, name: str, holder: str, seconds: float) -> bool:
        """Take the lease `name` where it is free, or renew one's own; whether it is `holder`'s now, for that long."""

    async def release(self, name: str, holder: str) -> None:
        """Give one's own lease up."""

    async def note(self, name: str, holder: str, note: bytes, keep: int) -> bool:
        """Add to the notes beside a lease, of which the last `keep` stay; False = the lease is not `holder`'s and nothing is added."""

    async def notes(self, name: str) -> list[bytes]:
        """Oldest first. They outlive the lease by the state TTL."""

    async def claimed(self, model: str) -> bytes:
        """The model's claim; b"" = there is none."""

    async def claim(self, model: str, expected: bytes | None, claim: bytes) -> bytes:
        """Replace the model's claim if it is `expected` (b"" = there is none, None = whatever it is), in one step; what it was before.

        It outlives its last replacement by the state TTL.
        """

    async def count(self) -> int:
        """About how many streams the store keeps a state of, those of canaries aside."""

    async def memory(self) -> Memory: ...

    async def ping(self) -> None:
        """Returns when the store can be written to; its clock (clock.py) has been read by then."""

    async def close(self) -> None: ...


async def usable(store: StateStore) -> None:
    """Returns when the store has said, within PING_SECONDS, that it can be written to; raises StoreUnavailable."""
    try:
        async with asyncio.timeout(PING_SECONDS):
            await store.ping()
    except TimeoutError as error:
        raise StoreUnavailable("The state store does not answer a ping: no answer within a second.") from error
