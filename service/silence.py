"""Looks for streams that have fallen silent, while they are silent. One sweeper per model and replica; all see the same watches.

    commit ─► value: deadline = arrival + patience(α)     watch: when to look at the stream   (both written in one step)
    sweep  ─► due watches ─► value's deadline is later: look again then
                          ─► else claim: compare-and-set of the value with SILENT ─► the one who wins raises it

A stream that is said to have ended while its alert is open (`begin_end`) is swept in the same way: at its deadline it has ended.

So a silence is raised once, however many replicas there are. The next event clears it and is judged as any other. Only streams whose
events are not of the past are waited for (`waits`). After a start, an outage of the store (also one that is too slow or takes no writes: by
that a replica is not ready, and nobody is sent to it), a pause of this process or a step of the clock every stream gets its patience
anew, and RETURN_SECONDS at least: it may have been the service that was silent, and senders and queues take a while to come back to it.
After an outage of less than RETURN_SECONDS only these: a store that stalls for a second an hour hides no stream that speaks twice a day.

The clock is the store's (stores/clock.py), read by the ping that every sweep begins with, and again before anything is raised: whatever
clocks replicas have, what one writes another judges by the same. Where the store's is set back, deadlines of before are so much too late.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from service import alerts, cadence
from service.alerts import Transition
from service.claims import Claim, Uncontested
from service.errors import StoreUnavailable, Superseded
from service.metrics import Metrics
from service.policy import Policy
from service.state import ALERT_OPEN, ENDING, SILENT, Loaded, Origin, Rows, StateCodec
from service.stores import SILENT as SILENT_WATCH
from service.stores import StateStore, Write, usable

SWEEP_SECONDS, COUNT_SECONDS = 1.0, 10.0
LONGEST_SECONDS = 60.0
"""What a sweep takes at most, with a store that hardly answers: after more this process was stopped meanwhile."""
SWEPT = 1000
"""Streams looked at in one go."""
ROUNDS = 10
"""Goes of one sweep, at most."""
LIVE_SECONDS = 300.0
"""A stream is live while its events are no older than this (or its patience) when they arrive. One that is ahead has a wrong clock."""
RETURN_SECONDS = 10.0
"""How long those that were turned away while the service was down wait at most before they come again, or catch up from a queue."""
GRACE_SECONDS = 30.0
"""How long a stream that is given its patience anew is not looked at, so that many of them leave room for those that fall silent now; at
most, since another replica may have been listening for longer."""
FOREIGN_SECONDS = 300.0
"""After which a stream is looked at again whose state is of another file of the model: that file may be in force again by then."""
CLAIMED = 1.0
"""`watch_until` of a silent stream: it is watched, and its next commit sets the watch anew."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Silence:
    """A stream that should have spoken by now."""

    model: str
    stream_id: str
    last_event: float  # its own time, seconds since 1970
    patience: float  # seconds of silence that were still ordinary


Raise = Callable[[Silence], None]
"""Where silences go; called once for each."""


def to_log(silence: Silence) -> None:
    log.warning(
        "stream_silent",
        stream_id=silence.stream_id,
        model=silence.model,
        silent_since=silence.last_event,
        patience_seconds=round(silence.patience, 3),
    )


def waits(rows: Rows, alpha: float, now: float, ended: NDArray[np.bool_] | None = None) -> list[float | None]:
    """Set the deadlines of streams that are about to be committed, in place; returns the watch to write for each, None = as it is.

    Nobody waits for streams that `ended` [B], nor for one before its second arrival: the first says nothing of how often they are. Until
    then a deadline is negative, the time of the last arrival.
    """
    patience = cadence.patience(rows, alpha)
    before = rows["deadline"].copy()
    arrived = np.where(before > 0, before - patience, -before)  # 0 or -inf = not known
    gap = np.where(arrived > 0, now - arrived, np.nan)
    learned = cadence.learn_arrivals(rows, gap, np.where(before > 0, patience, np.inf))
    if len(learned):
        patience[learned] = cadence.patience(rows[learned], alpha)
    known = np.isfinite(patience)
    about_now = now - rows["last"]["timestamp"] <= np.where(known, np.maximum(patience, LIVE_SECONDS), LIVE_SECONDS)
    if ended is not None:
        about_now &= ~ended
    same = (before < 0) & (gap < 0.5 * np.exp(rows["pace"].astype(np.float64)))  # a part of what arrived then
    live = about_now & known & (before != 0) & ~same
    watches = watched(rows, live, patience, now)
    rows["deadline"] = np.where(about_now & ~live, np.where(same, before, -now), rows["deadline"])
    return watches


def watched(rows: Rows, live: NDArray[np.bool_], patience: NDArray[np.float64], now: float) -> list[float | None]:
    """Wait `patience` [B] seconds for those of the streams that are `live` [B]; changes and returns what `waits` does."""
    rows["deadline"] = np.where(live, now + np.where(live, patience, 0), 0)
    begins = live & ((rows["watch_until"] <= now) | (rows["watch_until"] > rows["deadline"]))
    ends = ~live & (rows["watch_until"] > 0)
    rows["watch_until"] = np.where(begins, rows["deadline"], np.where(ends, 0, rows["watch_until"]))
    changed, until = (begins | ends).tolist(), rows["watch_until"].tolist()
    return [watch if change else None for change, watch in zip(changed, until, strict=True)]


def awaited(rows: Rows) -> NDArray[np.bool_]:
    """[B] whether `end` or `begin_end` would change anything."""
    waited: NDArray[np.bool_] = (rows["deadline"] != 0) | (rows["watch_until"] > 0) | (rows["flags"] & (SILENT | ALERT_OPEN) != 0)
    waited |= ~np.isnan(rows["raw"])
    waited &= rows["flags"] & ENDING == 0
    return waited


def end(rows: Rows) -> None:
    """These streams have ended, in place: nobody waits for them, their alerts are closed, a counter begins anew.

    A frozen state stays as it was before the fault: should the stream return with it, that is an onset again.
    """
    rows["deadline"] = rows["watch_until"] = 0
    rows["flags"] = rows["learner"] = 0
    rows["quiet"] = rows["lasting"] = rows["peak"] = 0
    rows["silent_since"] = rows["started_at"] = rows["raw"] = np.nan


def begin_end(rows: Rows, until: float) -> None:
    """These streams, whose alerts are open, are said to have ended, in place: they have at `until`, unless they speak before."""
    rows["flags"] = rows["flags"] & ~np.uint32(SILENT) | np.uint32(ENDING)
    rows["silent_since"] = rows["raw"] = np.nan
    rows["deadline"] = rows["watch_until"] = until


def told_at_end(model: str, stream_id: str, row: Rows, *, of: int = ALERT_OPEN | SILENT) -> list[bytes]:
    """For the alert log: what is resolved as the stream of this row ends, as far as its flags are `of` these."""
    resolved = []
    flags = int(row["flags"]) & of
    if flags & SILENT:
        resolved.append(Transition("resolved", model, stream_id, "silence", float(row["silent_since"]), "minor", "ended"))
    if flags & ALERT_OPEN:
        severity, started_at = alerts.level(int(row["flags"])), float(row["started_at"])
        resolved.append(Transition("resolved", model, stream_id, "anomaly", started_at, severity, "ended"))
    return list(map(alerts.encoded, resolved))


class Sweep(ABC):
    """Looks at the streams of one model that are due, every SWEEP_SECONDS. `clock` gives seconds since 1970.

    Not while another file of the model is in force (`claim`); after that streams get their patience anew.
    """

    def __init__(
        self, model: str, codec: StateCodec, store: StateStore, metrics: Metrics, clock: Callable[[], float], claim: Claim | None
    ) -> None:
        self._file = claim or Uncontested()
        self._model, self._codec, self._store, self._metrics, self._clock = model, codec, store, metrics, clock
        self._listening_since: float | None = None
        self._away_since = self._away_at = -math.inf  # of the last outage of the store, by the clock
        self._count_at = 0.0

    @abstractmethod
    async def _look(self, stream_ids: list[str], loaded: Loaded, now: float, since: float) -> bool:
        """Look at these streams, `since` when we have been listening without a long break; whether any was dealt with."""

    async def run(self, every: float = SWEEP_SECONDS) -> None:
        """Sweep until cancelled."""
        failing = False
        while True:
            began = self._clock()
            try:
                await self.sweep()
                failing = False
            except Superseded:
                failing, self._listening_since = False, None
                for gauge in (self._metrics.silent, self._metrics.live):  # those in force count them
                    gauge.labels(self._model).set(math.nan)
            except StoreUnavailable as error:
                if not failing:  # an outage is one line, however long it lasts
                    log.warning("sweep_failed", model=self._model, error=error.detail)
                failing = True
            except Exception as error:  # a bug must not end the watch for all streams; it is counted and logged
                self._metrics.bug(error, model=self._model)
            asleep = self._clock()
            await asyncio.sleep(every)
            now = self._clock()
            if not (0 <= now - asleep <= RETURN_SECONDS and 0 <= now - began <= LONGEST_SECONDS):
                self.anew()

    def anew(self) -> None:
        """Every stream gets its patience anew: this process was stopped, or the clock has stepped."""
        self._listening_since, self._away_at = None, -math.inf

    async def sweep(self) -> None:
        """Look at every stream that is due. Raises StoreUnavailable, Superseded."""
        began = self._clock()
        try:
            await self._sweep()
        except StoreUnavailable:
            self._away(began)
            raise

    async def _still(self, since: float) -> bool:
        """Whether the clock is the one that the sweep began with: the states were loaded after that. Raises StoreUnavailable."""
        await usable(self._store)
        return self._listening_since == since

    def _away(self, began: float) -> None:
        """A sweep that began then found no store. What is not a while apart is one outage."""
        if began > self._away_at + RETURN_SECONDS:
            self._away_since = began
        self._away_at = self._clock()
        if self._away_at > self._away_since + RETURN_SECONDS:
            self._listening_since = None

    def _grace(self, since: float, patience: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Until when nobody who has so much patience is judged: it may have been the service that was silent."""
        return np.maximum(since + np.maximum(patience, RETURN_SECONDS), self._away_at + RETURN_SECONDS)

    async def _sweep(self) -> None:
        self._file.check()
        await usable(self._store)
        now = self._clock()
        if self._listening_since is None:
            self._listening_since = self._count_at = now
        for _ in range(ROUNDS):
            due = await self._store.due(self._model, now, SWEPT)
            if not due or not await self._look(due, await self._load(due), now, self._listening_since) or len(due) < SWEPT:
                break
        if now >= self._count_at:
            self._count_at = now + COUNT_SECONDS
            count, _ = await self._store.silent(self._model, 0)
            self._metrics.silent.labels(self._model).set(count)
            waited, _ = await self._store.waited(self._model, 0)
            self._metrics.live.labels(self._model).set(waited)

    async def _load(self, stream_ids: list[str]) -> Loaded:
        loaded = self._codec.decode(await self._store.load(self._model, stream_ids))
        await self._file.confirm(loaded.origins)
        return loaded


class Sweeper(Sweep):
    """Raises the silences of one model's streams, by the policy in force."""

    def __init__(
        self,
        model: str,
        codec: StateCodec,
        policy: Callable[[], Policy],
        store: StateStore,
        metrics: Metrics,
        state_ttl: float,
        raise_: Raise = to_log,
        clock: Callable[[], float] = time.time,
        *,
        claim: Claim | None = None,
        unread: float = 0.0,
    ) -> None:
        """`unread` = seconds for which nobody may read a queue, since the replica that did was killed: so much longer than its patience a
        stream is waited for, by all replicas, who do not know which one reads it.
        """
        super().__init__(model, codec, store, metrics, clock, claim)
        self._policy, self._state_ttl, self._raise, self._unread = policy, state_ttl, raise_, unread

    async def _look(self, stream_ids: list[str], loaded: Loaded, now: float, since: float) -> bool:
        rows = loaded.rows
        patience = cadence.patience(rows, self._policy().alpha)
        kept = (loaded.origins == Origin.STORED) & (rows["deadline"] > 0)
        ending = kept & (rows["flags"] & ENDING != 0)
        waited = kept & (rows["flags"] & SILENT == 0)
        until = rows["deadline"] + np.where(ending, 0.0, self._unread)
        later = waited & (until > now)
        grace = self._grace(since, np.where(np.isfinite(patience) & ~ending, patience, 0))
        due = waited & ~later
        over_now, silent = due & ending & (now >= grace), due & ~ending & (now >= grace)
        foreign = loaded.origins >= Origin.OTHER_MODEL
        over = ~kept & ~foreign
        watches = {stream_ids[i]: float(until[i]) for i in np.flatnonzero(later).tolist()}
        watches |= {stream_ids[i]: min(float(grace[i]), now + GRACE_SECONDS) for i in np.flatnonzero(due & (now < grace)).tolist()}
        watches |= {stream_ids[i]: 0.0 for i in np.flatnonzero(over).tolist()}
        watches |= {stream_ids[i]: now + FOREIGN_SECONDS for i in np.flatnonzero(foreign).tolist()}
        # Claimed already, and due again: its value outlived the time it was to be forgotten by.
        claimed = kept & (rows["flags"] & SILENT != 0)
        watches |= {stream_ids[i]: SILENT_WATCH + now + self._state_ttl for i in np.flatnonzero(claimed).tolist()}
        await self._store.watch(self._model, watches)
        if (silent.any() or over_now.any()) and not await self._still(since):
            return False
        await self._claim(stream_ids, rows, loaded.tokens, np.flatnonzero(silent), now, patience)
        await self._end(stream_ids, rows, loaded.tokens, np.flatnonzero(over_now))
        return bool(watches) or bool(silent.any()) or bool(over_now.any())

    async def _end(self, stream_ids: list[str], rows: Rows, tokens: list[bytes], places: NDArray[np.intp]) -> None:
        """These have ended, but for those that have spoken meanwhile."""
        if len(places) == 0:
            return
        ended = rows[places]
        logs = [told_at_end(self._model, stream_ids[i], rows[i]) for i in places.tolist()]
        end(ended)
        of = zip(places.tolist(), self._codec.encode(ended), logs, strict=True)
        await self._store.commit(self._model, [Write(stream_ids[i], tokens[i], value, watch=0.0, log=entries) for i, value, entries in of])

    async def _claim(
        self, stream_ids: list[str], rows: Rows, tokens: list[bytes], places: NDArray[np.intp], now: float, patience: NDArray[np.float64]
    ) -> None:
        if len(places) == 0:
            return
        claimed = rows[places]
        claimed["flags"] |= np.uint32(SILENT)
        claimed["silent_since"], claimed["watch_until"] = claimed["last"]["timestamp"], CLAIMED
        forgotten = SILENT_WATCH + now + self._state_ttl
        values = self._codec.encode(claimed)
        entries = [self._told(stream_ids[i], float(rows["last"]["timestamp"][i]), float(patience[i])) for i in places.tolist()]
        writes = [
            Write(stream_ids[i], tokens[i], value, watch=forgotten, log=[entry])
            for i, value, entry in zip(places.tolist(), values, entries, strict=True)
        ]
        for i, won in zip(places.tolist(), await self._store.commit(self._model, writes), strict=True):
            if won:
                self._metrics.silences.labels(self._model).inc()
                self._raise(Silence(self._model, stream_ids[i], float(rows["last"]["timestamp"][i]), float(patience[i])))

    def _told(self, stream_id: str, since: float, patience: float) -> bytes:
        """For the alert log."""
        return alerts.encoded(Transition("opened", self._model, stream_id, "silence", since, patience=patience))
