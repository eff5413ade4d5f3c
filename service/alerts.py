"""An alert's life: one for each anomaly of a stream, and one for each silence, however many events there are.

    commit ─► transitions   read off the stream's flags before and after each event; in the log by the step that writes the state
    log    ─► alerts        folded, one replica at a time   (desk.py, stores/book.py)
           ─► changes       what sinks are told, in order   (sinks/)

    anomaly   opened ──escalated──► … ──► resolved: recovered │ accepted │ accepted_by_age │ ended │ forgotten ──(a log's)──► accepted
    silence   opened ───────────────────► resolved: spoke │ ended │ forgotten

An anomaly's alert opens at its onset (policy.py's ALERT_OPEN) and is resolved with the run of errors it belongs to. Its id follows from
its model, its stream and when it began: whoever tells of the same anomaly again tells of the same alert.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from service.artifact import NEW_TEXT, NUMBER, NUMBERS
from service.events import SEVERITIES, Direction, Line, Result, Severity
from service.lines import plain
from service.mutes import Muted
from service.state import ALERT_OPEN, EXPIRED, LEVEL, LEVEL_SHIFT, SILENT, Rows

ID = "^[0-9a-f]{28}$"
"""Of an alert: 12 digits of when it began, so that ids sort by that, and 16 of which it is."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY = 86_400.0
FINDINGS = 10
"""Features that evidence keeps, the greatest contributors."""
MESSAGE_LENGTH, SHOWN_LENGTH, DESCRIBED_LENGTH = 2_000, 160, 500
"""Characters of a log line that evidence keeps, and that a summary and a description show."""

CARRIES = 0.1
"""Part of the error from which a line's gap or number is named."""
LIKELY = 0.005
"""Chance from which a pattern is named: 0% says nothing."""
_TURNS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
"""Characters that turn the writing direction: one in a name or a line would have the rest of the sentence read backwards."""
Kind = Literal["anomaly", "silence"]
Status = Literal["open", "acknowledged", "resolved"]
Resolution = Literal["recovered", "accepted", "accepted_by_age", "spoke", "ended", "forgotten"]
What = Literal["opened", "escalated", "resolved", "forgotten"]
Outcome = Literal["acknowledged", "already_acknowledged", "accepted", "resolved", "silence", "model_not_loaded", "conflict", "unknown"]
"""Of an alert in a call about several."""


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
    line: Line | msgspec.UnsetType = msgspec.UNSET
    """Of a log model, the message shortened to MESSAGE_LENGTH; left out elsewhere."""
    expected: dict[str, float | None] | msgspec.UnsetType = msgspec.UNSET
    """The same: the likeliest lines in its place, by pattern, with their chances."""

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
            _shortened(result.line) if result.line else msgspec.UNSET,
            result.expected if result.line else msgspec.UNSET,
        )


def _shortened(line: Line) -> Line:
    message = line.message
    return line if message is None or len(message) <= MESSAGE_LENGTH else replace(line, message=message[: MESSAGE_LENGTH - 1] + "…")


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

    @staticmethod
    def accepted(alert: Alert) -> Transition:
        """One that is over is accepted after all."""
        return Transition("resolved", alert.model, alert.stream_id, alert.kind, alert.started_at, alert.severity, "accepted")


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
    muted: Muted | None = None
    """What sinks are not told of it for a while; of one that was resolved meanwhile, were not told of it."""

    @property
    def open(self) -> bool:
        return self.resolved_at is None


class AlertReply(Alert, frozen=True, kw_only=True):
    """An alert as people and programs are shown it."""

    summary: str
    """One sentence: which stream, what, since when."""
    description: str
    """The evidence in words."""
    link: str | None
    """To this alert on the page, where the service knows its own address (ONSET_PUBLIC_URL)."""

    @staticmethod
    def of(alert: Alert, public_url: str) -> AlertReply:
        """`public_url` of the service, "" = not known."""
        link = f"{public_url.rstrip('/')}/?alert={alert.id}" if public_url else None
        known = {name: getattr(alert, name) for name in Alert.__struct_fields__}
        return AlertReply(**known, summary=summary(alert), description=description(alert), link=link)


class AlertPage(msgspec.Struct, frozen=True):
    """Alerts, the latest first."""

    alerts: list[AlertReply]
    next_cursor: str | None
    """Where the next page begins; null = this was the last one."""


class AlertCount(msgspec.Struct, frozen=True):
    """How many alerts there are."""

    count: int
    by_severity: dict[Severity, int]
    """Of each severity, also where there are none."""
    complete: bool
    """Whether these are all; false = there may be more: at `limit`, or after the latest 5,000, the counting ends."""


class Told(msgspec.Struct, frozen=True):
    """What a call about several alerts did to one."""

    id: str
    outcome: Outcome
    stream_id: str | None
    """null = the alert is not known."""
    model: str | None


class Done(msgspec.Struct, frozen=True):
    """What a call did to several alerts."""

    alerts: list[Told]
    """In the order in which they were named, each once."""
    outcomes: dict[Outcome, int]
    """How many of each."""


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a sink is told."""

    event: Literal["opened", "escalated", "acknowledged", "unacknowledged", "resolved"]
    alert: Alert
    """As it is by then."""
    severity_before: Severity | None = None
    """Where it escalated."""


class Stand(NamedTuple):
    """How a stream stands, by its state."""

    there: bool
    """Whether there is a state at all."""
    last: Evidence | None
    """None: there is none, or it is of another file of the model."""
    open: frozenset[str] | None
    """Ids of its open alerts; None: there is no state, or none that can be read."""


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

    A later event of an anomaly that nobody has told of opens its alert; one that is resolved already may open again, and be accepted.
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
    if transition.resolution == "accepted" and evidence is None:
        over = alert is not None and not alert.open and alert.resolution != "accepted"
        return replace(alert, updated_at=at, resolution="accepted") if alert is not None and over else None
    if alert is None or not alert.open:
        return None
    if what in ("opened", "escalated"):
        severity = max(alert.severity, transition.severity, key=SEVERITIES.index)
        changed = severity != alert.severity or live != alert.live
        return replace(alert, severity=severity, updated_at=at, live=alert.live or live, last=evidence) if changed else None
    how = transition.resolution if what == "resolved" else "forgotten"
    last = evidence if evidence is not None and alert.kind == "anomaly" else alert.last
    return replace(alert, status="resolved", resolved_at=at, updated_at=at, resolution=how, last=last)


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def summary(alert: Alert) -> str:
    """One sentence: which stream, what, since when."""
    return _summary(alert).translate(_TURNS)


def _summary(alert: Alert) -> str:
    began = alert.started_at if alert.kind == "anomaly" else min(alert.started_at, alert.opened_at)  # a sender's clock may be ahead
    since, until = _clock(began, alert.updated_at), _clock(_over(alert), alert.updated_at)
    if alert.resolution is not None:
        return f"{alert.stream_id} {_ENDS[alert.resolution].format(since=since, until=until)}."
    if alert.kind == "silence":
        return f"{alert.stream_id} has been silent since {since}."
    if alert.onset is not None and alert.onset.line:
        return f"{alert.stream_id} logs unusual lines since {since}: {_said(alert.onset.line, SHOWN_LENGTH)}"
    for evidence in (alert.last, alert.onset):
        for finding in evidence.contributors[:1] if evidence else ():
            if finding.actual is None:
                return f"{_named(alert, finding)} has no value since {since}."
            if (beside := _beside(finding)) is not None:
                return f"{_named(alert, finding)} is {beside} its expected range since {since}."
    most = alert.onset.contributors[:1] if alert.onset is not None and len(alert.onset.contributors) > 1 else ()
    whose = "".join(f", that of {finding.feature} most" for finding in most)
    return f"{alert.stream_id} behaves unusually since {since}: its values are in their ranges, their course is not{whose}."


def _over(alert: Alert) -> float:
    """When it was over; an anomaly by its events' own time, as it began: a history is loaded in seconds."""
    if alert.kind == "anomaly" and alert.last is not None:
        return alert.last.timestamp
    return alert.resolved_at or alert.updated_at


def description(alert: Alert) -> str:
    """The evidence, for whoever has to act: values and what was expected, how improbable that is, what carries it."""
    return _description(alert).translate(_TURNS)


def _description(alert: Alert) -> str:
    if alert.kind == "silence":
        patience = f" Up to {_number(alert.patience)} s without an event are ordinary for it." if alert.patience is not None else ""
        whose = " by its own clock, which is ahead" if alert.started_at > alert.opened_at else ""
        return f"The last event of stream {alert.stream_id} was at {_clock(alert.started_at, math.inf)}{whose}.{patience}"
    sentences = []
    for title, evidence in (("At the onset", alert.onset), ("At last", alert.last)):
        if evidence is not None and (title == "At the onset" or evidence != alert.onset):
            sentences.append(f"{title} ({_clock(evidence.timestamp, math.inf)}): {_shown(evidence)}")
    return " ".join(sentences)


_ENDS: dict[Resolution, str] = {
    "recovered": "is back to normal: its anomaly began at {since}, and was over at {until}",
    "accepted": "has a new normal: the change that began at {since} was accepted by call",
    "accepted_by_age": "has a new normal: the change that began at {since} was accepted because of its age",
    "spoke": "speaks again: it was silent from {since} to {until}",
    "ended": "has ended: its alert began at {since}",
    "forgotten": "is no longer known: it was deleted, expired or started afresh; its alert began at {since}",
}


def _named(alert: Alert, finding: Finding) -> str:
    """A stream of one feature is called by its name alone."""
    single = alert.onset is not None and len(alert.onset.contributors) == 1
    return alert.stream_id if single else f"{finding.feature} of {alert.stream_id}"


def _beside(finding: Finding) -> str | None:
    """How far outside its band a feature lies; None = it does not."""
    if finding.actual is not None and finding.upper is not None and finding.actual > finding.upper:
        return f"{_number(finding.actual - finding.upper)} above"
    if finding.actual is not None and finding.lower is not None and finding.actual < finding.lower:
        return f"{_number(finding.lower - finding.actual)} below"
    return None


def _said(line: Line, length: int) -> str:
    """A line as a sentence shows it: its first one, without colours and control characters, or else its pattern."""
    text = plain((line.message or line.template or "").strip().partition("\n")[0].rstrip("\r"))
    return text if len(text) <= length else text[: length - 1] + "…"


def _shown_line(evidence: Evidence, line: Line) -> str:
    """The line, what was likelier in its place, and what else about it was unusual."""
    chances = {pattern: chance or 0.0 for pattern, chance in (evidence.expected or {}).items()}
    pattern = NEW_TEXT if line.new else line.template or ""
    own, alike = chances.get(pattern, 0.0), len(list(takewhile(pattern.__eq__, line.before)))
    likelier = [f"'{plain(other)}' ({chance:.0%})" for other, chance in chances.items() if chance > own and chance >= LIKELY]
    which = "which no pattern of the model matches" if line.new else f"which is '{plain(line.template or '')}'"
    run = f", as were the {alike} lines before it" if alike > 1 else ""
    parts = [
        f"'{_said(line, DESCRIBED_LENGTH)}', {which}{f' ({own:.0%} here)' if own >= LIKELY else ''}{run}",
        f"likelier was {' or '.join(likelier)}" if likelier else "",
        f"before it came '{plain(line.before[0])}'" if line.before and not run else "",
        *[_measured(found, line) for found in evidence.contributors if found.feature != "template" and found.contribution >= CARRIES],
        _rarity(evidence),
    ]
    return "; ".join(part for part in parts if part)


def _measured(found: Finding, line: Line) -> str:
    """A line's gap or number: what it was, what was expected."""
    named = "gap to the line before" if found.feature == "gap" else f"{found.feature}{_place(found.feature, line.template or '')}"
    unit = " s" if found.feature == "gap" else ""
    return (
        f"{named} {_number(found.actual)}{unit}, expected {_number(found.expected)}{unit} ({_number(found.lower)} to "
        f"{_number(found.upper)}), {found.contribution:.0%} of the error"
    )


def _place(feature: str, template: str) -> str:
    """Where the number lies in its line, with the word before it."""
    if feature not in NUMBERS:
        return ""
    left, words = NUMBERS.index(feature) + 1, plain(template).split()
    for i, word in enumerate(words):
        if (left := left - word.count(NUMBER)) <= 0 < word.count(NUMBER):
            return f" ('{' '.join(words[max(i - 1, 0) : i + 1]) if word.startswith(NUMBER) else word}')"
    return ""


def _shown(evidence: Evidence) -> str:
    if evidence.line:
        return _shown_line(evidence, evidence.line)
    parts = [
        f"{found.feature} {'has no value' if found.actual is None else _number(found.actual)}, "
        f"expected {_number(found.expected)} ({_number(found.lower)} to {_number(found.upper)})"
        + (f", {found.contribution:.0%} of the error" if len(evidence.contributors) > 1 else "")
        for found in evidence.contributors[:3]
    ]
    return f"{'; '.join(parts) or 'no values'}; {_rarity(evidence)}"


def _rarity(evidence: Evidence) -> str:
    """How rare the event is by itself, and at an onset what came with it: that is what is told, also where the event is ordinary."""
    chance = f"p-value {evidence.p_value:.2g}" if evidence.p_value is not None else "no p-value"
    score = f", alert score {evidence.alert_score:.3g} (1 = as rare as asked for)" if (evidence.alert_score or 0.0) > 1.0 else ""
    return f"{chance}{score}."


def _number(number: float | None) -> str:
    """Four digits, without an exponent where people would not expect one."""
    if number is None:
        return "unknown"
    if number == 0 or not 1e-4 <= abs(number) < 1e9:
        return f"{number:.4g}"
    digits = max(0, 3 - math.floor(math.log10(abs(number))))
    text = f"{number:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _clock(seconds: float, beside: float) -> str:
    """Time of the day in UTC; with its date unless that is clear beside another time."""
    time = EPOCH + timedelta(seconds=seconds)
    return time.strftime("%H:%M:%S UTC" if abs(beside - seconds) < DAY else "%Y-%m-%d %H:%M:%S UTC")
