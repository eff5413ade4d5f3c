"""Keeps the book of alerts: one replica at a time, under a lease that another takes over when its holder dies.

    fold    every POLL_SECONDS   alert log ─► alerts and what sinks are told of them, with the log's cursors, in one step
    look    every `look` s       the states of all streams with an open alert: what they show by now, and whether they are still there
    tidy                         forget what was resolved long ago, and what all sinks have been told of
    sinks   each by itself       changes after its cursor ─► told, in order ─► its cursor   (sinks/)

Nothing is lost with its holder: the log, the cursors and the changes are in the store. What a sink was told in the last moment before
that, it may be told again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import msgspec
import structlog
from msgspec.structs import replace

from service import alerts, mutes, tasks
from service.alerts import Alert, Change, Stand, Transition
from service.errors import Fenced, StoreUnavailable
from service.events import SEVERITIES
from service.metrics import Metrics
from service.mutes import Mute, Muted
from service.stores.book import AT_ONCE, Book, Entry

POLL_SECONDS = 0.5
PAUSE_SECONDS = 5.0
"""After a bug."""
READ = 50
"""Entries of each part of the log read at once."""
LATEST = 20
"""Alerts of a stream that are looked at when it is forgotten."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Keeping:
    """How long and how many."""

    max_age: float = 3600.0
    """Seconds between an event and its commit, beyond which its alert is of the past: it is kept and goes to no sink."""
    look: float = 60.0
    """Seconds between two looks at the open alerts."""
    max_open: int = 20_000
    max_resolved: int = 10_000
    retention: float = 7 * 86_400.0
    """Seconds for which resolved alerts are kept."""


class Streams(Protocol):
    """What the desk asks of a model's streams, see `service.streams`."""

    async def stand(self, stream_ids: Sequence[str]) -> list[Stand]: ...


class Sink(Protocol):
    """Where alerts go."""

    @property
    def name(self) -> str: ...

    async def begin(self, token: str) -> None:
        """Called before the first fold under this lease. Raises Fenced, StoreUnavailable."""

    async def run(self, token: str) -> None:
        """Tell of changes until cancelled, under the desk's lease; return once it is another's."""

    async def close(self) -> None: ...


class Desk:
    """`clock` gives seconds since 1970: the store's, which the log's entries have their times of."""

    def __init__(
        self,
        book: Book,
        streams: Mapping[str, Streams],
        metrics: Metrics,
        keeping: Keeping,
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`streams` by model."""
        self._book, self._streams, self._metrics, self._keeping, self._clock = book, streams, metrics, keeping, clock
        self._sinks = sinks
        self._token = uuid.uuid4().hex
        self._cursors: dict[str, str] | None = None
        """Of the log, while the lease is ours."""
        self._looked_at = -math.inf
        self._tellers: list[asyncio.Task[None]] = []

    @property
    def keeps(self) -> bool:
        """Whether the book is ours, as far as we know."""
        return self._cursors is not None

    async def run(self) -> None:
        """Keep the book whenever it is ours, until cancelled; then leave it to another."""
        try:
            while True:
                try:
                    await self.turn()
                except StoreUnavailable as error:
                    if self.keeps:
                        log.warning("alerts_not_kept", error=error.detail)
                    await self._lose()
                except Fenced:
                    log.warning("alerts_lease_lost")
                    await self._lose()
                except Exception as error:  # a bug must not end the alerts of all streams; it is counted and logged
                    self._metrics.bug(error, task="alerts")
                    await asyncio.sleep(PAUSE_SECONDS)
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await self._leave()

    async def turn(self) -> None:
        """Take or renew the lease; if it is ours, fold the log and, when it is time, look and tidy. Raises StoreUnavailable, Fenced."""
        if self.keeps:
            await self._book.renew(self._token)
        elif not await self._book.take(self._token):
            return
        if self._cursors is None:
            for sink in self._sinks:
                await sink.begin(self._token)
            self._cursors = await self._book.cursors()
            self._looked_at = -math.inf
            self._metrics.alerts_keeper.set(1)
            log.info("alerts_kept_here")
            self._tellers = [asyncio.create_task(sink.run(self._token), name="alerts-sink") for sink in self._sinks]
        await self.fold()
        if not 0 <= self._clock() - self._looked_at < self._keeping.look:  # or the clock was set back
            self._looked_at = self._clock()
            await self.look()
            await self._tidy()

    async def fold(self) -> None:
        """Everything that the log has. Raises StoreUnavailable, Fenced."""
        cursors = self._cursors or {}
        while entries := await self._book.read(cursors, READ):
            for i in range(0, len(entries), AT_ONCE):
                await self._fold(entries[i : i + AT_ONCE], cursors)

    async def look(self) -> None:
        """Bring the open alerts up to what their streams show by now. Raises StoreUnavailable, Fenced."""
        counted: Counter[tuple[str, str]] = Counter()
        unattended: Counter[tuple[str, str]] = Counter()
        gone: list[str] = []
        muted = 0
        in_force = await self._book.mutes()
        ids = await self._book.open_ids()
        for i in range(0, len(ids), AT_ONCE):
            await self._book.renew(self._token)
            some = [alert for alert in await self._book.alerts(ids[i : i + AT_ONCE]) if alert is not None]
            counted.update((alert.kind, alert.severity) for alert in some)
            lost, known = await self._refresh(some, in_force)
            muted += sum(alert.muted is not None for alert in known)
            left = [alert for alert in known if alert.acknowledgement is None and alert.muted is None]
            unattended.update((alert.kind, alert.severity) for alert in left)
            gone += lost
        self._count(counted, unattended, muted)
        if gone:
            # A stream's state and its entry of the log are one step: what the state said is in the log by now, if it was ever told.
            await self.fold()
            left = [alert for alert in await self._book.alerts(gone) if alert is not None and alert.open]
            await self._forget(left)

    async def _refresh(self, some: Sequence[Alert], in_force: Sequence[Mute]) -> tuple[list[str], list[Alert]]:
        """Keep what the streams of these open alerts show, and tell of those that are muted no more.

        Returns ids of those that their streams know nothing of, and the others as they are then.
        """
        stands = await self._stands(some)
        # By the store's clock, which may have been set back.
        held = await _holding(in_force, [(alert.model, alert.stream_id, max(self._clock(), alert.updated_at)) for alert in some])
        renewed, changes, gone, left = [], [], [], []
        for alert, mute in zip(some, held, strict=True):
            stand, known = stands[alert.id], alert
            if not stand.there or (stand.open is not None and alert.id not in stand.open):
                gone.append(alert.id)
                continue
            if stand.last is not None and alert.kind == "anomaly" and stand.last != alert.last:
                live = alert.live or self._clock() - stand.last.timestamp <= self._keeping.max_age
                known = replace(alert, last=stand.last, live=live)
            known, change = _unmuted(alert, known, mute)
            left.append(known)
            if known != alert:
                renewed.append(known)
            changes += [change] if change is not None else []
        if renewed:
            await self._book.write(self._token, renewed, changes, {})
        return gone, left

    async def _stands(self, some: Sequence[Alert]) -> dict[str, Stand]:
        """How the streams of these alerts stand, by alert; of models that are not loaded here only whether they are there."""
        by_model: dict[str, list[Alert]] = defaultdict(list)
        for alert in some:
            by_model[alert.model].append(alert)
        stands: dict[str, Stand] = {}
        for model, of_model in by_model.items():
            stream_ids = [alert.stream_id for alert in of_model]
            if (streams := self._streams.get(model)) is not None:
                found = await streams.stand(stream_ids)
            else:
                found = [Stand(there, None, None) for there in await self._book.there(model, stream_ids)]
            stands |= {alert.id: stand for alert, stand in zip(of_model, found, strict=True)}
        return stands

    async def _forget(self, left: Sequence[Alert]) -> None:
        now = self._clock()
        forgotten = [alerts.advanced(alert, Transition("forgotten", alert.model, alert.stream_id), now, 0) for alert in left]
        over = [alert for alert in forgotten if alert is not None]
        if over:
            await self._book.write(self._token, over, [Change("resolved", alert) for alert in over], {})
            self._counted(zip(left, over, strict=True))

    async def _tidy(self) -> None:
        while await self._book.forget(self._token, self._clock() - self._keeping.retention, self._keeping.max_resolved) >= AT_ONCE:
            pass
        await self._book.forget_mutes(self._clock() - self._keeping.retention)
        await self._book.trim(self._token, [sink.name for sink in self._sinks], self._clock() - self._keeping.retention)

    async def _fold(self, entries: Sequence[Entry], cursors: dict[str, str]) -> None:
        read = [(entry, transition) for entry in entries if (transition := self._transition(entry)) is not None]
        known = await self._known([transition for _, transition in read])
        room = self._keeping.max_open - await self._book.open_count()
        in_force = await self._book.mutes()  # after the log: what was muted before an alert was committed mutes it
        held = await _holding(in_force, [(transition.model, transition.stream_id, entry.at) for entry, transition in read])
        again: list[str] = []
        changed: dict[str, Alert] = {}
        moves: list[tuple[Alert | None, Alert]] = []
        changes: list[Change] = []
        for (entry, transition), mute in zip(read, held, strict=True):
            for id_ in _meant(transition, known):
                before = known.get(id_)
                after = alerts.advanced(before, transition, entry.at, self._keeping.max_age)
                if after is None:
                    continue
                was_open = before is not None and before.open
                opens = after.open and not was_open
                if opens and room <= 0:
                    self._metrics.alerts_dropped.inc()
                    log.warning("alert_dropped", stream_id=after.stream_id, model=after.model, max_open=self._keeping.max_open)
                    continue
                room += was_open - after.open
                if not (was_open or after.open):  # it is over, and was accepted after all
                    known[id_] = changed[id_] = after
                    continue
                if opens:
                    again.append(id_)
                change = _muted(before, _change(before, after), mute)
                changes.append(change)
                known[id_] = changed[id_] = after = change.alert
                moves.append((before, after))
        folded = {entry.shard: entry.id for entry in entries}
        await self._book.write(self._token, list(changed.values()), changes, folded, again)
        cursors.update({f"log:{shard}": id_ for shard, id_ in folded.items()})
        self._counted(moves)

    async def _known(self, transitions: Sequence[Transition]) -> dict[str, Alert]:
        """The alerts that these are about, as they are in the book."""
        ids = {transition.alert for transition in transitions if transition.what != "forgotten"}
        for transition in transitions:
            if transition.what == "forgotten":
                ids.update(await self._book.latest_of(transition.stream_id, LATEST))
        some = list(ids)
        return {id_: alert for id_, alert in zip(some, await self._book.alerts(some), strict=True) if alert is not None}

    def _transition(self, entry: Entry) -> Transition | None:
        try:
            return alerts.decoded(entry.content)
        except msgspec.MsgspecError as error:
            self._metrics.bugs.inc()
            log.error("alert_log_unreadable", entry=entry.id, shard=entry.shard, error=str(error))
            return None

    def _counted(self, moves: Iterable[tuple[Alert | None, Alert]]) -> None:
        """What was done to alerts, each before and after."""
        for before, after in moves:
            was = before if before is not None and before.open else None
            if was is None or not after.open or was.severity != after.severity:
                event = "opened" if was is None else "escalated" if after.open else "resolved"
                self._metrics.alert_transitions.labels(after.kind, event).inc()
            if after.open:
                self._metrics.alerts_open.labels(after.kind, after.severity).inc()
            if was is not None:
                self._metrics.alerts_open.labels(was.kind, was.severity).dec()

    def _count(self, counted: Counter[tuple[str, str]], unattended: Counter[tuple[str, str]], muted: int = 0) -> None:
        """The open alerts, as they were just looked at, those that nobody looks after, and those that nobody is told of."""
        self._metrics.alerts_muted.set(muted)
        for kind, severity in itertools.product(get_args(alerts.Kind), SEVERITIES[1:]):
            self._metrics.alerts_open.labels(kind, severity).set(counted[kind, severity])
            self._metrics.alerts_unattended.labels(kind, severity).set(unattended[kind, severity])

    async def _lose(self) -> None:
        self._cursors = None
        self._metrics.alerts_keeper.set(0)
        self._count(Counter(), Counter())
        tellers, self._tellers = self._tellers, []
        for task in tellers:
            await tasks.end(task)

    async def _leave(self) -> None:
        kept = self.keeps
        await self._lose()
        if kept:
            with contextlib.suppress(StoreUnavailable, Fenced):
                await self._book.release(self._token)
        for sink in self._sinks:
            await sink.close()


def _meant(transition: Transition, known: Mapping[str, Alert]) -> list[str]:
    """Ids of the alerts that a transition is about."""
    if transition.what != "forgotten":
        return [transition.alert]
    of = (transition.model, transition.stream_id)
    return [id_ for id_, alert in known.items() if (alert.model, alert.stream_id) == of]


def _change(before: Alert | None, after: Alert) -> Change:
    if before is None or not before.open:
        return Change("opened", after)
    if not after.open:
        return Change("resolved", after)
    if after.live and not before.live:  # an alert of the past, of which nobody was told
        return Change("opened", after)
    return Change("escalated", after, before.severity)


async def _holding(in_force: Sequence[Mute], asked: Sequence[tuple[str, str, float]]) -> list[Mute | None]:
    """Which mute holds the alerts of each model and stream at that time. Thousands of both take seconds, of a thread."""
    first, last = min((at for *_, at in asked), default=0.0), max((at for *_, at in asked), default=0.0)
    some = [mute for mute in in_force if mute.covers(first, last)]
    return await asyncio.to_thread(lambda: [mutes.holding(some, *one) for one in asked]) if some else [None] * len(asked)


def _muted(before: Alert | None, change: Change, mute: Mute | None) -> Change:
    """The change as it is told while `mute` is in force."""
    if mute is None or change.event == "resolved" or change.alert.muted is not None:
        return change
    told = before.severity if change.event == "escalated" and before is not None and before.live else None
    return replace(change, alert=replace(change.alert, muted=Muted(mute.name, mute.ends_at, told)))


def _unmuted(before: Alert, after: Alert, mute: Mute | None) -> tuple[Alert, Change | None]:
    """An open alert that a look has found to be so, as it is under the `mute` in force, and what is told of it."""
    muted = after.muted
    caught_up = after.live and not before.live  # an alert of the past, of which nobody was told
    if mute is not None and (muted is not None or caught_up):
        after = replace(after, muted=Muted(mute.name, mute.ends_at, muted.told if muted is not None else None))
        return after, Change("opened", after) if caught_up else None
    after = replace(after, muted=None)
    if caught_up or (muted is not None and muted.told is None):
        return after, Change("opened", after)
    return after, Change("escalated", after, muted.told) if muted is not None else None
