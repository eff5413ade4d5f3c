"""What is asked and done about single streams of a model besides scoring them: how they stand, accept, forget, end.

Whatever changes a state does so as a batch does: it loads, compares the version and writes, and tries again where it lost.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import structlog
from msgspec.structs import replace
from numpy.typing import NDArray

from service import alerts, cadence, lessons, silence
from service.alerts import Alert, Stand, Transition
from service.claims import Claim, Uncontested
from service.copies import Copies
from service.detector import Detector
from service.errors import StateConflict, UnknownStream
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.results import TOP, Replies
from service.rounds import Kind, Outcomes
from service.state import ALERT_OPEN, LEARNER, SILENT, Origin, Rows, StateCodec, header_of
from service.stores import WRITTEN, StateStore, Write

ATTEMPTS = 4
"""Times that streams are tried to be ended."""
ACCEPT_ATTEMPTS = 20
ACCEPTED_AT_ONCE = 50
"""Alerts accepted in one step of the event loop, which takes some milliseconds."""

log = structlog.get_logger(__name__)


class Streams:
    """Of one detector. `policy` gives the one in force; of a changed state the copy is dropped. `alerting`, `claim` as of the scorer.

    What is asked raises Superseded where the model's file is not in force: others can answer.
    """

    def __init__(
        self,
        detector: Detector,
        codec: StateCodec,
        policy: Callable[[], Policy],
        store: StateStore,
        copies: Copies,
        replies: Replies,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        *,
        alerting: bool = True,
        claim: Claim | None = None,
    ) -> None:
        self._claim = claim or Uncontested()
        self._detector, self._model = detector, detector.name
        self._codec, self._policy, self._store, self._copies = codec, policy, store, copies
        self._replies, self._metrics, self._clock, self._alerting = replies, metrics, clock, alerting

    async def last(self, stream_id: str) -> Result:
        """The last result of a stream. Raises UnknownStream."""
        self._claim.check()
        results = self._summaries([stream_id], await self._store.load(self._model, [stream_id]))
        if not results:
            raise self._unknown(stream_id)
        return results[0]

    async def page(self, cursor: str, limit: int) -> tuple[list[Result], str]:
        """Last results of about `limit` streams from `cursor` on ("" = the start), and the next cursor ("" = the end)."""
        self._claim.check()
        page = await self._store.scan(self._model, cursor, limit)
        values = await self._store.load(self._model, page.stream_ids) if page.stream_ids else []
        return self._summaries(page.stream_ids, values), page.cursor

    async def silent(self, limit: int) -> list[Result]:
        """Last results of at most `limit` streams that are silent for improbably long."""
        self._claim.check()
        _, stream_ids = await self._store.silent(self._model, limit)
        values = await self._store.load(self._model, stream_ids) if stream_ids else []
        return [result for result in self._summaries(stream_ids, values) if result.silent_since is not None]

    async def pace(self, limit: int) -> tuple[int, NDArray[np.float64]]:
        """How many live streams there are whose cadence is known, and the events a second of at most about `limit` of them."""
        count, stream_ids = await self._store.waited(self._model, limit)
        loaded = self._codec.decode(await self._store.load(self._model, stream_ids) if stream_ids else [])
        live = (loaded.origins == Origin.STORED) & (loaded.rows["flags"] & SILENT == 0)
        rates = cadence.rate(loaded.rows[live])
        return count, rates[~np.isnan(rates)]

    async def stand(self, stream_ids: Sequence[str]) -> list[Stand]:
        """The alerts of streams as their states have them, whichever file of the model those are of."""
        values = await self._store.load(self._model, stream_ids)
        loaded = self._codec.decode(values)
        stored = np.flatnonzero(loaded.origins == Origin.STORED)
        results = self._summary([stream_ids[i] for i in stored.tolist()], loaded.rows[stored])
        evidence = {i: alerts.Evidence.of(result) for i, result in zip(stored.tolist(), results, strict=True)}
        return [
            Stand(value is not None, evidence.get(i), self._ids_open(stream_ids[i], value, Origin(loaded.origins[i])))
            for i, value in enumerate(values)
        ]

    async def calm(self, stream_ids: Sequence[str]) -> list[bool]:
        """Whether no anomaly of theirs is open; of a state that cannot be read that is not known."""
        values = await self._store.load(self._model, stream_ids)
        origins = self._codec.decode(values).origins.tolist()
        readable = (Origin.STORED, Origin.OTHER_MODEL)
        return [
            value is None or (origin in readable and not int(header_of(value)["flags"]) & ALERT_OPEN)
            for value, origin in zip(values, origins, strict=True)
        ]

    async def accept(self, stream_id: str) -> Result:
        """Take what the stream is alerted about for its new normal; without an open alert nothing changes. Returns the stream's summary.

        Raises UnknownStream, and StateConflict when other replicas won ACCEPT_ATTEMPTS times.
        """
        row, outcome = (await self._accept({stream_id: None}))[stream_id]
        if outcome in ("unknown", "model_not_loaded"):
            raise self._unknown(stream_id)
        if outcome == "conflict":
            raise StateConflict(
                f"Stream '{stream_id[:256]}' changed {ACCEPT_ATTEMPTS} times while its alert was being accepted: call again."
            )
        return self._summary([stream_id], row)[0]

    async def accept_alerts(self, ids: Mapping[str, str]) -> dict[str, alerts.Outcome]:
        """The same of several streams, each by the id of its alert: `resolved` = that is no longer open, and nothing changes;
        `model_not_loaded` = the state is of another file of the model until the next event; `conflict` = other replicas won ACCEPT_ATTEMPTS
        times. By stream.
        """
        outcomes: dict[str, alerts.Outcome] = {}
        names = list(ids)
        for i in range(0, len(names), ACCEPTED_AT_ONCE):
            became = await self._accept({name: ids[name] for name in names[i : i + ACCEPTED_AT_ONCE]})
            outcomes |= {name: "resolved" if outcome == "unknown" else outcome for name, (_, outcome) in became.items()}
        return outcomes

    async def accept_past(self, past: Sequence[Alert]) -> dict[str, alerts.Outcome]:
        """Alerts of log lines that are over: the rare lines that they show are usual for their streams from now on. By id.

        `resolved` = it teaches nothing (it was about a pause, a number, or a line that did not come), or its stream is gone; else as above.
        """
        outcomes: dict[str, alerts.Outcome] = {}
        for i in range(0, len(past), ACCEPTED_AT_ONCE):
            some = past[i : i + ACCEPTED_AT_ONCE]
            heard = lessons.heard(self._detector, some)
            if heard is None:
                return dict.fromkeys((alert.id for alert in past), "resolved")
            learned = await asyncio.to_thread(lessons.learned, self._detector, heard)
            taught: dict[str, list[tuple[Alert, NDArray[np.float32]]]] = {}
            for alert, lesson in zip(some, learned, strict=True):
                if lesson.any():
                    taught.setdefault(alert.stream_id, []).append((alert, lesson))
                else:
                    outcomes[alert.id] = "resolved"
            became = await self._teach(taught)
            for stream_id, about in taught.items():
                outcome = became[stream_id][1]
                outcomes |= {alert.id: "resolved" if outcome == "unknown" else outcome for alert, _ in about}
        return outcomes

    async def _accept(self, ids: Mapping[str, str | None]) -> dict[str, tuple[Rows, alerts.Outcome]]:
        """Each stream's row [1] as it is then, and what became of its alert: that with this id, None = whichever is open."""

        def accept(stream_id: str, row: Rows, value: bytes | None) -> bool:
            id_ = ids[stream_id]
            meant = id_ is None or id_ in (self._ids_open(stream_id, value, Origin.STORED) or ())
            return meant and self._policy().accept(row)

        return await self._change(list(ids), accept, self._accepting, lambda stream_id, row: self.accepted(stream_id, row, by="call"))

    async def _teach(self, taught: Mapping[str, Sequence[tuple[Alert, NDArray[np.float32]]]]) -> dict[str, tuple[Rows, alerts.Outcome]]:
        """The same of alerts that are over, of which these slices OWN_LINES [W] are learned."""
        own = self._detector.manifest.part(lessons.OWN_LINES)

        def learn(stream_id: str, row: Rows, value: bytes | None) -> bool:
            for state in ("vector", "learner") if row["flags"][0] & LEARNER else ("vector",):
                row[state][:, own] = np.max([row[state][0, own], *(lesson for _, lesson in taught[stream_id])], axis=0)
            return True

        def told(stream_ids: Sequence[str], rows: Rows) -> list[list[bytes]]:
            return [[alerts.encoded(Transition.accepted(alert)) for alert, _ in taught[stream_id]] for stream_id in stream_ids]

        def done(stream_id: str, row: Rows) -> None:
            for alert, _ in taught[stream_id]:
                self.accepted(stream_id, row, by="call", started=alert.started_at)

        return await self._change(list(taught), learn, told, done)

    async def _change(
        self,
        stream_ids: Sequence[str],
        change: Callable[[str, Rows, bytes | None], bool],
        told: Callable[[Sequence[str], Rows], list[list[bytes]]],
        done: Callable[[str, Rows], None],
    ) -> dict[str, tuple[Rows, alerts.Outcome]]:
        """Each stream's row [1] as it is then, and what became of it: `change` makes it another one, in place, or says that it is to stay.

        `told` gives the log's entries of the rows [B] before that, `done` is called for each that was written.
        """
        became: dict[str, tuple[Rows, alerts.Outcome]] = {}
        left = list(stream_ids)
        for _ in range(ACCEPT_ATTEMPTS):
            values = await self._store.load(self._model, left)
            loaded = self._codec.decode(values)
            await self._claim.confirm(loaded.origins)
            before, changed = loaded.rows.copy(), []
            for i, (stream_id, value) in enumerate(zip(left, values, strict=True)):
                row = loaded.rows[i : i + 1]
                if loaded.origins[i] != Origin.STORED:
                    became[stream_id] = row, "model_not_loaded" if loaded.origins[i] == Origin.OTHER_MODEL else "unknown"
                elif change(stream_id, row, value):
                    changed.append(i)
                else:
                    became[stream_id] = row, "resolved"
            if changed:
                names = [left[i] for i in changed]
                entries = told(names, before[changed])
                encoded = self._codec.encode(loaded.rows[changed])
                writes = [Write(left[i], loaded.tokens[i], value, log=log) for i, value, log in zip(changed, encoded, entries, strict=True)]
                self._copies.drop(names)
                for i, written in zip(changed, await self._store.commit(self._model, writes), strict=True):
                    if written == WRITTEN:
                        done(left[i], before[i])
                        became[left[i]] = loaded.rows[i : i + 1], "accepted"
                    else:
                        self._metrics.conflicts.inc()
            left = [stream_id for stream_id in left if stream_id not in became]
            if not left:
                return became
        return became | dict.fromkeys(left, (loaded.rows[:0], "conflict"))

    async def forget(self, stream_id: str) -> bool:
        """Delete a stream's state; whether there was one."""
        self._copies.drop([stream_id])
        entry = alerts.encoded(Transition("forgotten", self._model, stream_id)) if self._alerting else b""
        return await self._store.delete(self._model, stream_id, entry)

    async def end(self, ends: Mapping[str, float], grace: float = 0) -> None:
        """Streams that have ended, and when (seconds since 1970): their alerts are resolved and nobody waits for them. Safe to repeat.

        An alert that is open stays so for `grace` seconds more, and the stream with it should it speak again; where nobody sweeps, 0.
        What a stream has learned is kept for when it returns. One with a later event is left as it is. Raises StoreUnavailable, and
        StateConflict when other replicas won that often.
        """
        pending = list(ends)
        for _ in range(ATTEMPTS):
            loaded = self._codec.decode(await self._store.load(self._model, pending) if pending else [])
            await self._claim.confirm(loaded.origins)
            times = np.array([ends[stream_id] for stream_id in pending], np.float64)
            over = (loaded.origins == Origin.STORED) & silence.awaited(loaded.rows) & (loaded.rows["last"]["timestamp"] <= times)
            places = np.flatnonzero(over).tolist()
            if not places:
                return
            rows, stream_ids = loaded.rows[places], [pending[i] for i in places]
            waits = (rows["flags"] & ALERT_OPEN != 0) & (grace > 0 and self._policy().silence)
            logs = self._told_at_end(stream_ids, rows, waits)
            for at, change in ((waits, partial(silence.begin_end, until=self._clock() + grace)), (~waits, silence.end)):
                changed = rows[at]
                change(changed)
                rows[at] = changed
            values = self._codec.encode(rows)
            tokens = [loaded.tokens[i] for i in places]
            ended = zip(stream_ids, tokens, values, logs, rows["watch_until"].tolist(), strict=True)
            self._copies.drop(stream_ids)
            written = await self._store.commit(
                self._model, [Write(name, token, value, watch=watch, log=entries) for name, token, value, entries, watch in ended]
            )
            pending = [name for name, became in zip(stream_ids, written, strict=True) if became != WRITTEN]
        raise StateConflict(f"{len(pending)} streams changed {ATTEMPTS} times while they were being ended: send the request again.")

    def accepted(self, stream_id: str, row: Rows, by: str, started: float | None = None) -> None:
        """For the audit: a change of regime was accepted. `row` is a value before it, or the record of the event that did it; `started` of
        what is over.
        """
        self._metrics.accepted.labels(self._model, by).inc()
        started = float(row["started_at"]) if started is None else started
        log.info(
            "regime_accepted",
            stream_id=stream_id,
            model=self._model,
            by=by,
            anomaly_started_at=None if math.isnan(started) else started,
            event_timestamp=float(row["timestamp"] if by == "age" else row["last"]["timestamp"]),
            state_version=int(row["version"]),
        )

    def _summaries(self, stream_ids: Sequence[str], values: Sequence[bytes | None]) -> list[Result]:
        loaded = self._codec.decode(values)
        stored = np.flatnonzero(loaded.origins == Origin.STORED)
        return self._summary([stream_ids[i] for i in stored.tolist()], loaded.rows[stored])

    def _summary(self, stream_ids: Sequence[str], rows: Rows) -> list[Result]:
        """The last result of each stream, with its alert as it stands now."""
        records = rows["last"].copy()
        records["flags"], records["started_at"] = rows["flags"], rows["started_at"]
        outcomes = Outcomes(records, np.full(len(rows), Kind.SCORED, np.uint8))
        events = [Event(stream_id=stream_id) for stream_id in stream_ids]
        results = self._replies.results(events, self._replies.judged(outcomes), top_contributors=TOP)
        for i in np.flatnonzero(rows["flags"] & SILENT).tolist():
            severity = results[i].severity if results[i].severity != "none" else "minor"
            results[i] = replace(results[i], silent_since=float(rows["silent_since"][i]), is_anomaly=True, severity=severity)
        return results

    def _unknown(self, stream_id: str) -> UnknownStream:
        return UnknownStream(f"Model '{self._model}' keeps no state of stream '{stream_id[:256]}'.")

    def _ids_open(self, stream_id: str, value: bytes | None, origin: Origin) -> frozenset[str] | None:
        if value is None or origin not in (Origin.STORED, Origin.OTHER_MODEL):
            return None
        row = header_of(value)
        kinds = ((ALERT_OPEN, "anomaly", "started_at"), (SILENT, "silence", "silent_since"))
        return frozenset(
            alerts.alert_id(self._model, stream_id, cast("alerts.Kind", kind), float(row[since]))
            for flag, kind, since in kinds
            if row["flags"] & flag
        )

    def _accepting(self, stream_ids: Sequence[str], rows: Rows) -> list[list[bytes]]:
        """For the log: the open alerts of `rows` [B] are about to be accepted by call."""
        return [
            [
                alerts.encoded(
                    Transition(
                        "resolved",
                        self._model,
                        stream_id,
                        "anomaly",
                        float(row["started_at"]),
                        alerts.level(row["flags"]),
                        "accepted",
                        alerts.Evidence.of(result),
                    )
                )
            ]
            for stream_id, row, result in zip(stream_ids, rows, self._summary(stream_ids, rows), strict=True)
        ]

    def _told_at_end(self, stream_ids: Sequence[str], rows: Rows, waits: NDArray[np.bool_]) -> list[list[bytes]]:
        """For the log: what is resolved as the streams of these rows [B] end; where one `waits`, its anomaly is not."""
        if not self._alerting:
            return [[] for _ in stream_ids]
        flags = np.where(waits, SILENT, SILENT | ALERT_OPEN).tolist()
        return [silence.told_at_end(self._model, stream_id, row, of=of) for stream_id, row, of in zip(stream_ids, rows, flags, strict=True)]
