"""An alert's life: one for each anomaly of a stream, and one for each silence, however many events there are.

    commit ─► transitions   read off the stream's flags before and after each event; in the log by the step that writes the state
    log    ─► alerts        folded, one replica at a time   (desk.py, stores/book.py)
           ─► changes       what sinks are told, in order   (sinks/)

    anomaly   opened ──escalated──► … ──► resolved: recovered │ accepted │ accepted_by_age │ ended │ forgotten
    silence   opened ───────────────────► resolved: spoke │ ended │ forgotten

An anomaly's alert opens at its onset (policy.py's ALERT_OPEN) and is resolved with the run of errors it belongs to. Its id follows from
its model, its stream and when it began: whoever tells of the same anomaly again tells of the same alert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from service.events import SEVERITIES, Direction, Result, Severity
from service.state import ALERT_OPEN, EXPIRED, LEVEL, LEVEL_SHIFT, SILENT, Rows

ID = "^[0-9a-f]{28}$"
"""Of an alert: 12 digits of when it began, so that ids sort by that, and 16 of which it is."""
FINDINGS = 10
"""Features that evidence keeps, the greatest contributors."""

Kind = Literal["anomaly", "silence"]
Status = Literal["open", "acknowledged", "resolved"]
Resolution = Literal["recovered", "accepted", "accepted_by_age", "spoke", "ended", "forgotten"]
What = Literal["opened", "escalated", "resolved", "forgotten"]


class Finding(msgspec.Struct, frozen=True):
    """One feature of an event: what it was, what was expected, and its part of the error."""

    feature: str
    contribution: float
    actual: float | None
    expected: float | None
    lower: float | None
    upper: float | None


class Evidence(msgspec.Struct, frozen=True):
    """What an event showed, as far as a person needs it."""

    timestamp: float
    """Of the event, seconds since 1970."""
    state_version: int
    p_value: float | None
    anomaly_score: float | None
    alert_score: float | None
    severity: Severity
    direction: Direction
    contributors: list[Finding]
    """Sorted, the greatest first."""

    @staticmethod
    def of(result: Result) -> Evidence:
        return Evidence(
            float(result.timestamp),
            result.state_version,
            result.p_value,
            result.anomaly_score,
            result.alert_score,
            result.severity,
            result.direction,
            [
                Finding(
                    found.feature,
                    found.contribution,
                    found.actual,
                    found.expected,
                    result.lower.get(found.feature),
                    result.upper.get(found.feature),
                )
                for found in result.contributors[:FINDINGS]
            ],
        )


class Transition(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of an alert's life, as the log keeps it."""

    what: What
    """`forgotten` is of a stream as a whole: all its alerts are."""
    model: str
    stream_id: str
    kind: Kind = "anomaly"
    started_at: float = 0.0
    """When the anomaly began, or the last event before the silence; by the events' own time."""
    severity: Severity = "minor"
    resolution: Resolution | None = None
    evidence: Evidence | None = None
    """Of the event that did it; None where no event did."""
    patience: float | None = None
    """Of a silence: the seconds that were still ordinary."""

    @property
    def alert(self) -> str:
        return alert_id(self.model, self.stream_id, self.kind, self.started_at)


class Acknowledgement(msgspec.Struct, frozen=True):
    """Someone looks after it."""

    by: str
    note: str
    at: float


class Alert(msgspec.Struct, frozen=True):
    """All that is known of one. Times are seconds since 1970."""

    id: str
    kind: Kind
    status: Status
    model: str
    stream_id: str
    severity: Severity
    """The highest it has reached."""
    started_at: float
    """When the anomaly began, by the events' own time; of a silence, the last event before it."""
    opened_at: float
    """When it was told, by the store's clock, as the next two."""
    updated_at: float
    resolved_at: float | None
    resolution: Resolution | None
    live: bool
    """Whether it was about now when it was last told: alerts of the past, replayed or loaded, go to no sink."""
    onset: Evidence | None
    last: Evidence | None
    """Of the last event that is known here. Both null of a silence."""
    patience: float | None
    """Of a silence: the seconds that were still ordinary."""
    acknowledgement: Acknowledgement | None = None

    @property
    def open(self) -> bool:
        return self.resolved_at is None


class Move(NamedTuple):
    """A transition of one of B streams by one of N events."""

    slot: int
    event: int
    what: What
    kind: Kind
    started_at: float
    severity: Severity
    resolution: Resolution | None


@dataclass(frozen=True)
class Standing:
    """The alerts of B streams before they are stepped."""

    flags: NDArray[np.uint32]
    started_at: NDArray[np.float64]
    silent_since: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Rows) -> Standing:
        return cls(rows["flags"].copy(), rows["started_at"].copy(), rows["silent_since"].copy())

    def moves(self, slots: NDArray[np.intp], records: Rows) -> Iterator[Move]:
        """What N scored events, each stream's in order, did to the alerts. `slots` [N] are their streams, `records` [N] theirs."""
        flags = records["flags"]
        if not ((self.flags & (ALERT_OPEN | SILENT)).any() or (flags & ALERT_OPEN).any()):
            return
        order = np.argsort(slots, kind="stable")
        of = slots[order]
        first = np.diff(of, prepend=-1) != 0
        now, since = flags[order], records["started_at"][order]
        was = np.where(first, self.flags[of], np.roll(now, 1))
        before = np.where(first, self.started_at[of], np.roll(since, 1))
        for i in np.flatnonzero((was ^ now) & (ALERT_OPEN | LEVEL | SILENT)).tolist():
            slot, event = int(of[i]), int(order[i])
            if was[i] & SILENT:
                yield Move(slot, event, "resolved", "silence", float(self.silent_since[slot]), "minor", "spoke")
            if now[i] & ALERT_OPEN:
                if not was[i] & ALERT_OPEN:
                    yield Move(slot, event, "opened", "anomaly", float(since[i]), level(now[i]), None)
                elif was[i] & LEVEL < now[i] & LEVEL:
                    yield Move(slot, event, "escalated", "anomaly", float(since[i]), level(now[i]), None)
            elif was[i] & ALERT_OPEN:
                how: Resolution = "accepted_by_age" if now[i] & EXPIRED else "recovered"
                yield Move(slot, event, "resolved", "anomaly", float(before[i]), level(was[i]), how)


def level(flags: int) -> Severity:
    """The severity that the open alert of a stream has reached."""
    return SEVERITIES[max((int(flags) & LEVEL) >> LEVEL_SHIFT, 1)]


def alert_id(model: str, stream_id: str, kind: Kind, started_at: float) -> str:
    ms = min(max(round(1000 * started_at), 0), 16**12 - 1)
    which = hashlib.blake2b("\0".join((model, stream_id, kind, repr(started_at))).encode(), digest_size=8)
    return f"{ms:012x}{which.hexdigest()}"


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Transition)


def encoded(transition: Transition) -> bytes:
    return _encoder.encode(transition)


def decoded(entry: bytes) -> Transition:
    """Raises msgspec.MsgspecError."""
    return _decoder.decode(entry)


def moved(moves: Sequence[Move], model: str, stream_ids: Sequence[str], results: Sequence[Result]) -> dict[int, list[bytes]]:
    """Slot → its moves as the log keeps them, in order; `results` are those of the moves' events, one for each move."""
    entries: dict[int, list[bytes]] = {}
    for move, result in zip(moves, results, strict=True):
        transition = Transition(
            move.what, model, stream_ids[move.slot], move.kind, move.started_at, move.severity, move.resolution, Evidence.of(result)
        )
        entries.setdefault(move.slot, []).append(encoded(transition))
    return entries


def advanced(alert: Alert | None, transition: Transition, at: float, max_age: float) -> Alert | None:
    """The alert after a transition that was committed at `at`; None where it changes nothing.

    A later event of an anomaly that nobody has told of opens its alert; one that is resolved already may open again.
    """
    evidence, what = transition.evidence, transition.what
    live = transition.kind == "silence" or (evidence is not None and at - evidence.timestamp <= max_age)
    if what in ("opened", "escalated") and (alert is None or not alert.open):
        return Alert(
            id=transition.alert,
            kind=transition.kind,
            status="open",
            model=transition.model,
            stream_id=transition.stream_id,
            severity=transition.severity,
            started_at=transition.started_at,
            opened_at=at,
            updated_at=at,
            resolved_at=None,
            resolution=None,
            live=live,
            onset=evidence,
            last=evidence,
            patience=transition.patience,
        )
    if alert is None or not alert.open:
        return None
    if what in ("opened", "escalated"):
        severity = max(alert.severity, transition.severity, key=SEVERITIES.index)
        changed = severity != alert.severity or live != alert.live
        return replace(alert, severity=severity, updated_at=at, live=alert.live or live, last=evidence) if changed else None
    how = transition.resolution if what == "resolved" else "forgotten"
    last = evidence if evidence is not None and alert.kind == "anomaly" else alert.last
    return replace(alert, status="resolved", resolved_at=at, updated_at=at, resolution=how, last=last)
