"""Which file of a model is in force, where replicas were started with different ones: the one that was started last.

A state fits only the file it came from, so of the files of one name one alone may score. The store keeps a claim for each model, which
changes by compare-and-set alone:

    start       all else is ready ─► claimed, whatever was there
    restart     of an instance that has claimed this file before, while another one is in force ─► superseded
    each beat   ours, or none (a store that lost it)  ─► renewed
                another file's                        ─► superseded: this replica scores nothing, is not ready, lets others have its queues
                    not renewed for EXPIRY_SECONDS    ─► taken back   (of a store that took writes all the while)
    states      of another file were loaded ─► the claim is read after them; ours ─► these streams start afresh (`confirm`)

A beat tells a superseded replica within a second. It need not: who would start a stream of another file afresh asks first, and who goes
on with a stream of its own file loses the compare once the other has started it afresh. So no state that a file has written in force is
ever replaced by another file's, until that one is in force.

Time is this process's own, and only what was read while the store could be written to counts: neither an outage of it nor its refusals
(full memory or disk, too few replicas in step) take the claim from anybody.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from service import tasks
from service.detector import Detector
from service.errors import StoreUnavailable, Superseded
from service.metrics import Metrics
from service.state import FORMAT, Origin
from service.stores import StateStore

BEAT_SECONDS = 1.0
EXPIRY_SECONDS = 10.0
"""How long a claim that is not renewed holds: as long as those that renew it may be stopped or cut off."""
GAP_SECONDS = 3.0
"""Between two readings; after a longer one nobody knows what was renewed meanwhile."""

log = structlog.get_logger(__name__)


class Stake(msgspec.Struct, frozen=True):
    """A claim as the store keeps it."""

    sha256: str
    """First 16 digits of the file's hash, as its states carry them."""
    version: str
    format: int
    """Of the states: a build that knows another one is another file to these, too."""
    beat: str = ""
    """Another one with each renewal."""

    def __str__(self) -> str:
        return f"version {self.version} (sha256 {self.sha256}, states of format {self.format})"


class Claim(Protocol):
    """What a scorer asks: whether its model's file is in force."""

    @property
    def wrong(self) -> str | None:
        """Why nothing may be scored; None = it may."""

    def check(self) -> None:
        """Raises Superseded where our file is not in force, as far as we know, and StoreUnavailable before it was claimed."""

    async def confirm(self, origins: NDArray[np.uint8]) -> None:
        """After states [B] were loaded: may those of another file be started afresh? Raises as `check` does, and StoreUnavailable."""


class Uncontested:
    """Implements Claim where nobody else's states are met: for a scorer with streams of its own."""

    @property
    def wrong(self) -> str | None:
        return None

    def check(self) -> None:
        return

    async def confirm(self, origins: NDArray[np.uint8]) -> None:
        return


class StoredClaim:
    """Implements Claim for one detector's model. `clock` gives seconds.

    `instance` names what is restarted by itself, after a crash: its restarts are none of the starts that bring a file into force, or a
    crash of an old replica amid a rollout would undo it. "" = every start is one.
    """

    def __init__(
        self, detector: Detector, store: StateStore, metrics: Metrics, clock: Callable[[], float] = time.monotonic, *, instance: str = ""
    ) -> None:
        self.in_force, self.superseded = asyncio.Event(), asyncio.Event()
        """Neither before it was claimed, then always one of both."""
        self._model, self._store, self._metrics, self._clock = detector.name, store, metrics, clock
        self._instance = f"{detector.name}/{instance}" if instance else ""
        """What the store keeps of it, as another claim: no model has such a name."""
        self._ours = Stake(f"{detector.fingerprint:016x}", detector.manifest.version, FORMAT)
        self._gauge = metrics.in_force.labels(detector.name)
        self._gauge.set(0)
        self._found = b""
        self._since = self._read_at = 0.0
        """Since when another file's claim is `_found`, and when it was read last."""

    @property
    def wrong(self) -> str | None:
        if self.in_force.is_set():
            return None
        if not self.superseded.is_set():
            return f"Model '{self._model}' has not been claimed in the state store yet."
        return (
            f"Model '{self._model}' is superseded: this replica has {self._ours}, and {_shown(self._found)} was started after it. "
            "Replicas of that one answer; to go back to this file, start a replica of it anew."
        )

    def check(self) -> None:
        if not self.in_force.is_set():
            wrong = self.wrong or ""
            raise Superseded(wrong) if self.superseded.is_set() else StoreUnavailable(wrong)

    async def confirm(self, origins: NDArray[np.uint8]) -> None:
        self.check()
        if (origins < Origin.OTHER_MODEL).all():  # nearly always
            return
        found = await self._store.claimed(self._model)
        if not found:
            mine = self._renewed()
            found = await self._store.claim(self._model, b"", mine) or mine
        if not self._is_ours(found):
            self._lose(found)
        self.check()

    async def take(self) -> None:
        """Our file is in force from here on, whichever was before: it is started last. Not after a restart. Raises StoreUnavailable."""
        if self._instance and self._is_ours(await self._store.claimed(self._instance)):
            found = await self._store.claimed(self._model)
            if found and not self._is_ours(found):
                self._lose(found)
                return
        mine = self._renewed()
        before = await self._store.claim(self._model, None, mine)
        await self._remember(mine)
        self._win(mine, over=b"" if self._is_ours(before) else before)

    async def run(self, every: float = BEAT_SECONDS) -> None:
        """Beat until cancelled, once it was claimed."""

        def away(error: StoreUnavailable) -> None:
            log.warning("claim_not_renewed", model=self._model, error=error.detail)

        await tasks.repeat(self.beat, every, away, partial(self._metrics.bug, model=self._model))

    async def beat(self) -> None:
        """Renew our claim, or see whether another's still is. Raises StoreUnavailable."""
        if self.in_force.is_set():
            await self._renew()
        elif self.superseded.is_set():
            await self._watch()

    async def _renew(self) -> None:
        expected, mine = self._found, self._renewed()
        found = await self._store.claim(self._model, expected, mine)
        if not found:  # lost with the store's data; had it been there, another replica of ours would do
            expected = b""
            found = await self._store.claim(self._model, expected, mine)
        if found == expected:
            found = mine
        if self._is_ours(found):
            self._found = found if self.in_force.is_set() else self._found
            await self._remember(mine)
        else:
            self._lose(found)

    async def _remember(self, mine: bytes) -> None:
        """For a restart of this instance."""
        if self._instance:
            await self._store.claim(self._instance, None, mine)

    async def _watch(self) -> None:
        await self._store.ping()  # where nobody can write, nobody can renew
        found, now = await self._store.claimed(self._model), self._clock()
        if self._is_ours(found):  # a replica of our file was started, or has taken it back
            self._win(found, over=self._found)
            return
        if found != self._found or now - self._read_at > GAP_SECONDS:
            self._found, self._since = found, now
        self._read_at = now
        if now - self._since >= EXPIRY_SECONDS:
            mine = self._renewed()
            if await self._store.claim(self._model, found, mine) == found:
                self._win(mine, over=found)

    def _win(self, found: bytes, over: bytes) -> None:
        self._found = found
        self.superseded.clear()
        self.in_force.set()
        self._gauge.set(1)
        log.info("model_in_force", model=self._model, file=str(self._ours), before=_shown(over) if over else None)

    def _lose(self, found: bytes) -> None:
        if self.superseded.is_set():
            return
        self._found, self._since = found, self._clock()
        self._read_at = self._since
        self.in_force.clear()
        self.superseded.set()
        self._gauge.set(0)
        log.warning("model_superseded", model=self._model, file=str(self._ours), by=_shown(found))

    def _renewed(self) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(self._ours, beat=uuid.uuid4().hex[:12]))

    def _is_ours(self, found: bytes) -> bool:
        stake = _read(found)
        return stake is not None and (stake.sha256, stake.format) == (self._ours.sha256, self._ours.format)


def _read(claim: bytes) -> Stake | None:
    """None = there is none, or nobody can read it: it is nobody's, and is taken as one that is not renewed."""
    try:
        return msgspec.json.decode(claim, type=Stake)
    except (msgspec.MsgspecError, UnicodeError):
        return None


def _shown(claim: bytes) -> str:
    return str(_read(claim) or "another file")
