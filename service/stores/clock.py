"""The store's clock: what replicas write for each other to compare (deadlines, trails, times of events that have none) is by it.

    a ping ─► the store's time, which it said between our asking and its answer ─► how far it is ahead of our uptime, within that
    asked  ─► uptime + that: no round trip, whatever this machine's clock shows, and also after the process was stopped

Each ping narrows it down: it is moved only as far as the answer requires, so that a slow one changes nothing. Where it has to be moved by
more than STEP_SECONDS the store's clock was set, or another server with another clock is the store by now: who judges by it begins anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import structlog

STEP_SECONDS = 0.5
READ_SECONDS = 1.0
"""How often it is read at least."""

log = structlog.get_logger(__name__)


def uptime() -> float:
    """Seconds that no clock set anew changes, those of a suspended machine among them where it tells (Linux)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class StoreClock:
    """Gives seconds since 1970 by the store's clock; by this machine's until it was read first. The store reads it when it is pinged."""

    def __init__(self, uptime: Callable[[], float] = uptime) -> None:
        self.uptime = uptime
        self._ahead = time.time() - uptime()
        self._read = False
        self._stepped: list[Callable[[], None]] = []

    def __call__(self) -> float:
        return self.uptime() + self._ahead

    def when_stepped(self, call: Callable[[], None]) -> None:
        """Call this whenever it was moved by more than STEP_SECONDS, before anybody sees that."""
        self._stepped.append(call)

    @property
    def ahead(self) -> float:
        """Seconds by which it is ahead of this machine's clock; NaN before it was read."""
        return self() - time.time() if self._read else math.nan

    def read(self, seconds: float, asked: float) -> None:
        """The store, which was asked at this `uptime`, has just answered that it is so many `seconds` since 1970."""
        before, least, most = self._ahead, seconds - self.uptime(), seconds - asked
        self._ahead = min(max(before, least), most) if self._read else (least + most) / 2
        moved = self._ahead - before
        if self._read and abs(moved) > STEP_SECONDS:
            log.warning("store_clock_stepped", seconds=round(moved, 3))
            for call in self._stepped:
                call()
        self._read = True
