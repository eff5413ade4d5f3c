"""Alerts to an Alertmanager (POST /api/v2/alerts), which groups, routes, silences and notifies.

    open         told at once, and again every `resend` seconds: Alertmanager takes what it is not told of for its resolve_timeout
                 (5 minutes) for resolved
    escalated    the severity is a label, so it is another alert there: the one of the lower severity is resolved in the same request
    resolved     with endsAt, `keep_firing` seconds after it opened at the earliest: Alertmanager tells nobody of what is over before its
                 group_wait (or, in a group that was told of, the next group_interval) has passed

It is told how things stand, not what happened: what it missed while it was down is of no use to it any more. So there is neither a flood
limit (its grouping is that) nor a dead letter but for what it refuses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import structlog

from service.alerts import EPOCH, Alert, AlertReply
from service.metrics import Metrics
from service.names import FOR, NAME, exported, labels_of
from service.relabel import LABEL
from service.sinks.posting import TIMEOUT_SECONDS, post
from service.sinks.teller import PATIENCE, Refused, Unreachable, first_cursor, retries, tell_on
from service.stores.book import AT_ONCE, Book, Told

TOO_LARGE = 413
_HEADERS = {"content-type": "application/json", "user-agent": "onset"}
NAMES = {"anomaly": "OnsetAnomaly", "silence": "OnsetSilence"}

Posted = dict[str, Any]
"""One alert as the API takes it."""

log = structlog.get_logger(__name__)


class Alertmanager:
    """Tells one Alertmanager, while the desk's lease is ours. `clock` gives seconds since 1970."""

    def __init__(
        self,
        url: str,
        book: Book,
        metrics: Metrics,
        *,
        public_url: str = "",
        runbook_url: str = "",
        resend: float = 60.0,
        keep_firing: float = 300.0,
        clock: Callable[[], float] = time.time,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        self.name = f"alertmanager {parts.hostname}{port}{parts.path.rstrip('/')}"
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._book, self._metrics, self._clock = book, metrics, clock
        self._public_url, self._runbook_url = public_url, runbook_url
        self._resend, self._keep_firing, self._timeout = resend, keep_firing, timeout
        self._client = httpx.AsyncClient(timeout=timeout)
        self._since: float | None = None
        """When the oldest change that is being told happened; or since when it is told again how things stand: changes wait behind that."""
        self._cursor = "0-0"
        self._resent_at = -math.inf
        metrics.alert_lag.labels(self.name).set_function(lambda: 0.0 if self._since is None else self._clock() - self._since)

    async def begin(self, token: str) -> None:
        """Before the first fold under this lease."""
        self._cursor = await first_cursor(self._book, token, self.name)
        self._resent_at = -math.inf

    async def run(self, token: str) -> None:
        """Tell how things stand until cancelled. Returns when the lease is lost."""
        try:
            await tell_on(lambda: self.turn(token), self._metrics, self.name)
        finally:
            self._since = None  # who has the lease now says how long it waits

    async def turn(self, token: str) -> bool:
        """Tell of the next changes, and when it is time of all that is open; whether there were any. Raises Fenced, StoreUnavailable."""
        changes = await self._book.changes(self._cursor, AT_ONCE)
        self._since = changes[0].at if changes else None
        if changes:
            letters = await self._tell(token, self._of_changes(changes))
            if not letters:
                self._delivered(changes)
            await self._book.delivered(token, self.name, changes[-1].id, letters=letters)
            self._cursor, self._since = changes[-1].id, None
        if len(changes) < AT_ONCE and not 0 <= self._clock() - self._resent_at < self._resend:  # or the clock was set back
            self._resent_at = self._since = self._clock()
            await self._tell_again(token)
            self._since = None
        return bool(changes)

    async def close(self) -> None:
        await self._client.aclose()

    def _of_changes(self, changes: Sequence[Told]) -> list[Posted]:
        """The latest of each alert; of a severity that it has left, that it is over."""
        latest: dict[str, Alert] = {}
        left: list[Posted] = []
        for told in changes:
            alert, before = told.change.alert, told.change.severity_before
            if _told(alert):
                latest[alert.id] = alert
                if before is not None and alert.muted is None:
                    left.append(self._posted(alert, severity=before, ends=told.at))
        return _one_each([*left, *map(self._posted, latest.values())])

    async def _tell_again(self, token: str) -> None:
        """All that is open, or still held open."""
        now = self._clock()
        # Open ones last: a stream's alert that is held open ends it there, also where the next one has begun.
        ids = await self._book.resolved_since(now - self._keep_firing) + await self._book.open_ids()
        for i in range(0, len(ids), AT_ONCE):
            some = [alert for alert in await self._book.alerts(ids[i : i + AT_ONCE]) if alert is not None and _told(alert)]
            firing = [alert for alert in some if alert.open or alert.opened_at + self._keep_firing > now]
            if firing:
                await self._tell(token, _one_each([self._posted(alert) for alert in firing]))

    async def _tell(self, token: str, posted: Sequence[Posted]) -> list[bytes]:
        """As often as it takes; a dead letter where it is refused. Raises Fenced, StoreUnavailable."""
        if not posted:
            return []
        try:
            async for attempt in retries(self.name, PATIENCE, attempts=None, timeout=None):
                with attempt:
                    if attempt.num > 1:
                        self._count("retried")
                    await self._book.renew(token)  # who was suspended meanwhile would have alerts fire that are long over
                    await self._post(posted)
        except Refused as error:
            self._count("dead_lettered")
            log.error("alert_undeliverable", sink=self.name, alerts=len(posted), reason=error.detail)
            return [msgspec.json.encode({"sink": self.name, "reason": error.detail, "at": self._clock(), "alerts": posted})]
        self._count("delivered")
        return []

    async def _post(self, posted: Sequence[Posted]) -> None:
        answer = await post(self._client, "Alertmanager", self._url, msgspec.json.encode(posted), _HEADERS, self._timeout)
        if answer.status == TOO_LARGE and len(posted) > 1:  # a proxy before it, of 1 MB as a rule
            half = len(posted) // 2
            await self._post(posted[:half])
            await self._post(posted[half:])
            return
        detail = f"Alertmanager answered {answer.status}: {answer.said}"
        if answer.status >= 500 or answer.status in (404, 408, 429):  # 404: behind a proxy, while it starts
            raise Unreachable(detail)
        if not answer.taken:
            raise Refused(detail)

    def _posted(self, alert: Alert, *, severity: str | None = None, ends: float | None = None) -> Posted:
        reply = AlertReply.of(alert, self._public_url)
        starts = min(alert.started_at, alert.opened_at)
        annotations = {
            "summary": reply.summary,
            "description": reply.description,
            "alert_id": alert.id,
            "link": reply.link or "",
            "runbook_url": self._runbook_url,
            "acknowledged_by": alert.acknowledgement.by if alert.acknowledgement else "",
        }
        posted: Posted = {
            "labels": labels(NAMES[alert.kind], alert.stream_id, alert.model, severity or _severity(alert)),
            "annotations": {name: text for name, text in annotations.items() if text},
            "startsAt": _time(starts),
        }
        if reply.link:
            posted["generatorURL"] = reply.link
        if ends is None and alert.resolved_at is not None:
            ends = max(alert.resolved_at, alert.opened_at + self._keep_firing)
        if ends is not None:
            posted["endsAt"] = _time(max(ends, starts + 0.001))
        return posted

    def _delivered(self, changes: Sequence[Told]) -> None:
        for told in changes:
            alert = told.change.alert
            if _told(alert):
                self._metrics.alert_delivery.labels(self.name).observe(max(0.0, self._clock() - told.at))
            else:
                self._count("muted" if alert.live else "past")

    def _count(self, outcome: str) -> None:
        self._metrics.alert_deliveries.labels(self.name, outcome).inc()


def _told(alert: Alert) -> bool:
    """Whether it is to be there at all: alerts of the past are not, nor those that opened while they were muted."""
    return alert.live and (alert.muted is None or alert.muted.told is not None)


def _severity(alert: Alert) -> str:
    """That it has there: of one that escalated while it was muted the one before."""
    return (alert.muted.told if alert.muted else None) or alert.severity


def labels(alertname: str, stream_id: str, model: str, severity: str) -> dict[str, str]:
    """What an alert is there, the same whoever tells of it: so of a series those labels that its stream's name has, unless hashed."""
    ours = {"alertname": alertname, "stream": stream_id, "model": model, "severity": severity}
    series = (labels_of(stream_id) if "{" in stream_id else None) or {}
    metric = {FOR: series[NAME]} if NAME in series else {}
    theirs = {name: value for name, value in series.items() if name != NAME and LABEL.fullmatch(name)}
    return exported(theirs, {*ours, FOR}) | metric | ours


def _one_each(posted: Sequence[Posted]) -> list[Posted]:
    """One of each set of labels, which is what an alert is there: an open one before those that are over."""
    chosen: dict[tuple[str, ...], Posted] = {}
    for one in posted:
        labels = tuple(one["labels"].values())
        if labels not in chosen or "endsAt" in chosen[labels]:
            chosen[labels] = one
    return list(chosen.values())


def _time(seconds: float) -> str:
    return (EPOCH + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
