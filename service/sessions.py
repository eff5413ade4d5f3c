"""Ends the sessions of log streams that no line has come for, for as long as the model says. One sweeper per model and replica.

    commit ─► value: deadline = arrival + session_seconds     watch: when to look at the stream   (both written in one step)
    sweep  ─► due watches ─► value's deadline is later: look again then
                          ─► else: the session's end is stepped on the value as it was read, and written by compare-and-set

So a session ends once, however many replicas there are, and whenever they were killed; a line that was written meanwhile wins, and it
goes on. The end is an event like any other: scored, told to those that watch, in the alerts. It has the time of the session's last
line: one that comes after it, of whatever time since then, is not late, and begins the next session. Whether lines come is asked of
the store's clock, not of their own times: sessions of an old file end, too. After a start or an outage of the store every session has its
time anew, as in silence.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.claims import Claim
from service.metrics import Metrics
from service.silence import FOREIGN_SECONDS, Sweep, watched
from service.state import Loaded, Origin, Rows, StateCodec
from service.stores import StateStore

End = Callable[[Sequence[str], Loaded], Awaitable[None]]
"""Ends the sessions of these streams, whose states are as loaded, but for those that were written meanwhile. Raises StoreUnavailable."""


def waits(rows: Rows, seconds: float, now: float, ended: NDArray[np.bool_]) -> list[float | None]:
    """As silence.waits, for sessions that end after so many `seconds` without a line, and are not `ended` [B] yet."""
    return watched(rows, ~ended, np.full(len(rows), seconds), now)


class SessionSweeper(Sweep):
    """Ends the sessions of one model that are over."""

    def __init__(
        self,
        model: str,
        codec: StateCodec,
        seconds: float,
        end: End,
        store: StateStore,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        claim: Claim | None = None,
        unread: float = 0.0,
    ) -> None:
        """`unread` as `silence.Sweeper` takes it: a session whose lines wait in a queue is not over."""
        super().__init__(model, codec, store, metrics, clock, claim)
        self._seconds, self._end, self._unread = seconds, end, unread

    async def _look(self, stream_ids: list[str], loaded: Loaded, now: float, since: float) -> bool:
        waited = (loaded.origins == Origin.STORED) & (loaded.rows["deadline"] > 0)
        until = loaded.rows["deadline"] + self._unread
        later = waited & (until > now)
        over = waited & ~later & (now >= self._grace(since, self._seconds))
        watches = {stream_ids[i]: float(until[i]) for i in np.flatnonzero(later).tolist()}
        foreign = loaded.origins >= Origin.OTHER_MODEL
        watches |= {stream_ids[i]: 0.0 for i in np.flatnonzero(~waited & ~foreign).tolist()}
        watches |= {stream_ids[i]: now + FOREIGN_SECONDS for i in np.flatnonzero(foreign).tolist()}
        await self._store.watch(self._model, watches)
        places = np.flatnonzero(over)
        if len(places) and await self._still(since):
            some = places.tolist()
            await self._end(
                [stream_ids[i] for i in some], Loaded(loaded.rows[places], [loaded.tokens[i] for i in some], loaded.origins[places])
            )
        return bool(watches) or bool(len(places))
