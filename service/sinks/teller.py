"""Where alerts go: what happened to them is told to each sink by itself, in order, at least once.

    changes after the sink's cursor ─► leave out alerts of the past, muted ones, those of less than `least` severity, and what is beyond the
    flood limit ─► tell (again and again, with back-off) ─► cursor, dead letters and what was withheld, in one step under the desk's lease

A flood (a whole plant goes wrong) is told as such: the first alert beyond `per_minute` of its severity brings one notice that more follow
which are not told one by one, and each minute another one says how many. Each severity has room of its own, so that a thousand minor
alerts do not hide a critical one. What is told of a withheld alert later on is withheld too, unless it escalates to where there is room.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import stamina
import structlog

from service.alerts import Alert, AlertReply
from service.errors import Fenced, OnsetError, StoreUnavailable
from service.events import SEVERITIES, Severity
from service.metrics import Metrics
from service.stores.book import Book, Told

POLL_SECONDS = 0.25
FLOOD_SECONDS = 60.0
READ = 100
"""Changes read, and gone beyond, at once."""
NAMED = 10
"""Streams that a notice of a flood names."""

log = structlog.get_logger(__name__)


class Unreachable(OnsetError):
    """The sink cannot take it now: it is told again. `after` seconds where it said when."""

    def __init__(self, detail: str, after: float | None = None) -> None:
        super().__init__(detail)
        self.after = after


class Refused(OnsetError):
    """The sink will never take it: it becomes a dead letter."""


class Flood(msgspec.Struct, frozen=True):
    """Alerts that are not told one by one."""

    withheld: int
    since: float
    by_severity: dict[Severity, int]
    streams: list[str]
    """Some of them."""
    link: str | None


class Notice(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a sink is told."""

    id: str
    """The same whenever it is told again."""
    event: Literal["opened", "escalated", "acknowledged", "unacknowledged", "resolved", "flood"]
    at: float
    """When it happened, seconds since 1970."""
    alert: AlertReply | None = None
    severity_before: Severity | None = None
    flood: Flood | None = None

    @property
    def subject(self) -> str:
        return f"{self.event} {self.alert.stream_id if self.alert else ''}".strip()


class Sink(Protocol):
    """One place that takes notices one by one."""

    @property
    def name(self) -> str: ...

    async def tell(self, notice: Notice) -> None:
        """Raises Unreachable or Refused."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How a sink that does not answer is told again."""

    give_up: float = 3600.0
    """Age of a notice (s) at which it becomes a dead letter, after one attempt at least."""
    first_wait: float = 0.5
    longest_wait: float = 60.0


PATIENCE = Patience()


def retries(sink: str, patience: Patience, *, attempts: int | None, timeout: float | None) -> AsyncIterator[stamina.Attempt]:
    """Attempts with back-off while a sink is unreachable, told once; the last one's error is let through."""
    told = False

    def again(error: Exception) -> bool | float:
        nonlocal told
        if not isinstance(error, Unreachable):
            return False
        if not told:
            told = True
            log.warning("sink_waits", sink=sink, reason=error.detail)
        return error.after or True  # after 0 s: with back-off all the same

    stamina.instrumentation.set_on_retry_hooks(())  # its own line is one for each attempt, and names no sink
    context = stamina.retry_context(
        on=again,
        attempts=attempts,
        timeout=timeout,
        wait_initial=patience.first_wait,
        wait_max=patience.longest_wait,
        wait_jitter=patience.first_wait,
    )
    return context.__aiter__()


async def tell_on(turn: Callable[[], Awaitable[bool]], metrics: Metrics, sink: str) -> None:
    """Turn after turn, at once where the last one had something to tell. Returns once the desk's lease is another's."""
    while True:
        try:
            if not await turn():
                await asyncio.sleep(POLL_SECONDS)
        except Fenced:
            return
        except StoreUnavailable:
            await asyncio.sleep(POLL_SECONDS)
        except Exception as error:  # a bug must not silence the sink for good; it is counted and logged
            metrics.bug(error, sink=sink)
            await asyncio.sleep(1.0)


@dataclass
class _Flooding:
    """How many alerts of each severity were opened lately, and what has been withheld since the last notice of it."""

    per_minute: int
    opened: defaultdict[Severity, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    since: float | None = None
    withheld: Counter[Severity] = field(default_factory=Counter)
    streams: list[str] = field(default_factory=list)

    def takes(self, severity: Severity, now: float) -> bool:
        """Whether there is room for another alert of this severity; it is taken then."""
        opened = self.opened[severity]
        while opened and not 0 <= now - opened[0] < FLOOD_SECONDS:  # or the clock was set back
            opened.popleft()
        if len(opened) >= self.per_minute:
            return False
        opened.append(now)
        return True

    def withhold(self, alert: Alert) -> None:
        self.withheld[alert.severity] += 1
        if len(self.streams) < NAMED:
            self.streams.append(alert.stream_id)

    def shown(self, now: float, link: str | None) -> Flood:
        """What to tell of it."""
        return Flood(self.withheld.total(), self.since or now, dict(self.withheld), self.streams, link)

    def told(self, now: float) -> None:
        """Counting begins anew."""
        self.since = now if self.withheld else None
        self.withheld, self.streams = Counter(), []


class Teller:
    """Tells one sink of what happens, while the desk's lease is ours. `clock` gives seconds since 1970."""

    def __init__(
        self,
        sink: Sink,
        book: Book,
        metrics: Metrics,
        *,
        public_url: str = "",
        least: Severity = "minor",
        per_minute: int = 30,
        patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink, self._book, self._metrics, self._clock = sink, book, metrics, clock
        self._public_url, self._least, self._patience = public_url, least, patience
        self._flooding = _Flooding(per_minute)
        self._decided = ("", True)
        """The last change that was asked of, and whether there was room for it."""
        self._waiting: Told | None = None
        self._cursor = "0-0"
        self._next: Sequence[Told] = []
        """Changes after the cursor, as far as they are read."""
        self.name = sink.name
        metrics.alert_lag.labels(sink.name).set_function(lambda: self._clock() - self._waiting.at if self._waiting else 0.0)

    async def begin(self, token: str) -> None:
        """Before the first fold under this lease. A sink that was never told of anything is told of what comes from now on."""
        self._cursor, self._next = await first_cursor(self._book, token, self._sink.name), []

    async def run(self, token: str) -> None:
        """Tell of changes until cancelled. Returns when the lease is lost."""
        try:
            await tell_on(lambda: self.turn(token), self._metrics, self._sink.name)
        finally:
            self._waiting = None  # who has the lease now says how long it waits

    async def turn(self, token: str) -> bool:
        """Tell of the next change; whether there was one. Raises Fenced, StoreUnavailable."""
        now = self._clock()
        if self._flooding.since is not None and not 0 <= now - self._flooding.since < FLOOD_SECONDS:
            await self._tell_of_flood(token, f"flood-{self._cursor}-{now:.0f}", now)
        if not self._next:
            self._next = await self._book.changes(self._cursor, READ)
        told = self._waiting = next(iter(self._next), None)
        if told is None:
            return False
        if passed := await self._pass_over(token, self._next):
            self._cursor, self._waiting, self._next = self._next[passed - 1].id, None, self._next[passed:]
            return True
        await self._handle(token, told, now)
        self._cursor, self._waiting, self._next = told.id, None, self._next[1:]
        return True

    async def close(self) -> None:
        await self._sink.close()

    async def _pass_over(self, token: str, changes: Sequence[Told]) -> int:
        """Go beyond those first changes that the sink is not told of whether or not there is room, in one step; how many.

        One by one, thousands of a shutdown that is muted would keep what is told waiting for minutes.
        """
        if _opens(changes[0]) and changes[0].change.alert.live and changes[0].change.alert.muted is None:
            return 0
        known = await self._book.withheld(self._sink.name, list({told.change.alert.id for told in changes}))
        withheld = dict.fromkeys(known, True)
        outcomes = Counter[str]()
        for told in changes:
            alert, opens = told.change.alert, _opens(told)
            if not alert.live:
                outcomes["past"] += 1
            elif opens and alert.muted is not None:
                outcomes["muted"] += 1
                if alert.muted.told is None:
                    withheld[alert.id] = True
            elif not opens and withheld.get(alert.id):
                outcomes["withheld"] += 1
                withheld[alert.id] = alert.open
            else:
                break
        if passed := outcomes.total():
            over = [id_ for id_, kept in withheld.items() if not kept]
            withhold = [id_ for id_, kept in withheld.items() if kept and id_ not in known]
            await self._book.delivered(token, self._sink.name, changes[passed - 1].id, withhold=withhold, over=over)
            for outcome, count in outcomes.items():
                self._count(outcome, count)
        return passed

    async def _handle(self, token: str, told: Told, now: float) -> None:
        change, alert = told.change, told.change.alert
        name = self._sink.name
        known = not await self._book.withheld(name, [alert.id])
        event = change.event
        if event == "opened" or (event == "escalated" and not known):
            if SEVERITIES.index(alert.severity) < SEVERITIES.index(self._least):
                self._count("below")
                await self._book.delivered(token, name, told.id, withhold=[alert.id])
                return
            if not self._admits(told, now):
                await self._withhold(token, told, now)
                return
            event = "opened"
        before = change.severity_before if event == "escalated" else None
        notice = Notice(told.id, event, told.at, AlertReply.of(alert, self._public_url), before)
        letters = await self._attempt(token, notice)
        await self._book.delivered(token, name, told.id, over=[alert.id], letters=letters)

    def _admits(self, told: Told, now: float) -> bool:
        """Whether there is room for it. That is said once: a change comes again where the store failed to keep that it was told."""
        if self._decided[0] != told.id:
            takes = self._flooding.takes(told.change.alert.severity, now)
            if not takes:
                self._flooding.withhold(told.change.alert)
            self._decided = told.id, takes
        return self._decided[1]

    async def _withhold(self, token: str, told: Told, now: float) -> None:
        self._count("withheld")
        letters: list[bytes] = []
        if self._flooding.since is None:
            letters = await self._attempt(token, self._flood_notice(f"flood-{told.id}", now))
            self._flooding.told(now)
        await self._book.delivered(token, self._sink.name, told.id, withhold=[told.change.alert.id], letters=letters)

    async def _tell_of_flood(self, token: str, id_: str, now: float) -> None:
        notice = self._flood_notice(id_, now)
        letters = await self._attempt(token, notice) if self._flooding.withheld else []
        self._flooding.told(now)
        if letters:
            await self._book.delivered(token, self._sink.name, self._cursor, letters=letters)

    def _flood_notice(self, id_: str, now: float) -> Notice:
        link = f"{self._public_url.rstrip('/')}/" if self._public_url else None
        return Notice(id_, "flood", now, flood=self._flooding.shown(now, link))

    async def _attempt(self, token: str, notice: Notice) -> list[bytes]:
        """Tell, as often as it takes; the dead letter if it was in vain. Raises Fenced, StoreUnavailable."""
        age, patience = self._clock() - notice.at, self._patience
        attempts = None if age < patience.give_up else 1
        try:
            async for attempt in retries(self._sink.name, patience, attempts=attempts, timeout=max(patience.give_up - age, 0.001)):
                with attempt:
                    if attempt.num > 1:
                        self._count("retried")
                    await self._book.renew(token)  # who was suspended meanwhile would tell what another has long gone beyond
                    await self._sink.tell(notice)
        except (Unreachable, Refused) as error:
            self._count("dead_lettered")
            log.error("alert_undeliverable", sink=self._sink.name, notice=notice.id, about=notice.subject, reason=error.detail)
            return [msgspec.json.encode({"sink": self._sink.name, "reason": error.detail, "at": self._clock(), "notice": notice})]
        self._count("delivered")
        self._metrics.alert_delivery.labels(self._sink.name).observe(max(0.0, self._clock() - notice.at))
        return []

    def _count(self, outcome: str, times: int = 1) -> None:
        self._metrics.alert_deliveries.labels(self._sink.name, outcome).inc(times)


def _opens(told: Told) -> bool:
    return told.change.event in ("opened", "escalated")


async def first_cursor(book: Book, token: str, sink: str) -> str:
    """Where a sink goes on; one that is new begins with what comes from now on. Raises Fenced, StoreUnavailable."""
    cursor = (await book.cursors()).get(f"sink:{sink}")
    if cursor is None:
        cursor = await book.last_change()
        await book.delivered(token, sink, cursor)
    return cursor
