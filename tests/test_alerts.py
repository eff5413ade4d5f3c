"""An alert's life: read off the flags of a stream, exact however its events are cut into batches; and folded from the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, get_args

import numpy as np
import pytest
from msgspec.structs import replace

from service.alerts import (
    Alert,
    Evidence,
    Finding,
    Resolution,
    Standing,
    Transition,
    advanced,
    alert_id,
    decoded,
    description,
    encoded,
    summary,
)
from service.detector import Detector
from service.events import Event, Line
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.silence import Sweeper
from service.state import ALERT_OPEN, LEVEL_SHIFT, SILENT, StateCodec
from service.stores.memory import MemoryStore
from tests.times import Clock

T0 = 1e9
SETTLED = 600
"""Events after which a stream's state may be frozen."""


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(state_ttl=3600, result_ttl=600)


def make(detector: Detector, store: MemoryStore, **policy: Any) -> Scorer:
    scorer = Scorer(detector, Policy(**policy), store, Metrics(), Limits(), Clock(T0))
    scorer.start()
    return scorer


@pytest.fixture
async def scorer(tiny_detector: Detector, store: MemoryStore) -> AsyncIterator[Scorer]:
    running = make(tiny_detector, store)
    yield running
    await running.drain(5)


def events(values: Sequence[float], stream: str = "s", start: int = 0) -> list[Event]:
    return [
        Event(stream_id=stream, values={"value": value}, timestamp=T0 + start + i, sequence=start + i) for i, value in enumerate(values)
    ]


def quiet(count: int, seed: int = 0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(size=count).clip(-2, 2)]


def told(store: MemoryStore) -> list[Transition]:
    return [decoded(entry) for entry in store.log]


def steps(store: MemoryStore) -> list[tuple[str, str, str, float, str | None]]:
    return [(step.stream_id, step.what, step.severity, step.started_at - T0, step.resolution) for step in told(store)]


async def test_quiet_streams_leave_nothing_in_the_log(scorer: Scorer, store: MemoryStore) -> None:
    await scorer.score(events(quiet(300)))
    assert store.log == []


async def test_an_anomaly_of_many_events_is_one_opening_and_one_recovery(scorer: Scorer, store: MemoryStore) -> None:
    await scorer.score(events([*quiet(SETTLED), *[60.0] * 50]))
    assert steps(store) == [("s", "opened", "critical", SETTLED, None)]
    await scorer.score(events(quiet(30, 1), start=SETTLED + 50))
    assert steps(store)[1:] == [("s", "resolved", "critical", SETTLED, "recovered")]
    opened, resolved = told(store)
    assert opened.alert == resolved.alert == alert_id("tiny", "s", "anomaly", T0 + SETTLED)
    assert opened.evidence is not None
    assert resolved.evidence is not None
    [finding] = opened.evidence.contributors
    assert (finding.feature, finding.actual, opened.evidence.direction) == ("value", 60.0, "up")
    assert finding.upper is not None
    assert finding.upper < 60
    assert resolved.evidence.timestamp == T0 + SETTLED + 50 + 9


async def test_an_alert_of_a_stream_too_young_to_freeze_closes_too(scorer: Scorer, store: MemoryStore) -> None:
    await scorer.score(events([*quiet(100), 60.0, *quiet(50, 1)]))
    assert [step[1] for step in steps(store)] == ["opened", "resolved"]
    assert not any(result.status == "frozen" for result in [await scorer.streams.last("s")])


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_the_log_is_the_same_however_the_events_are_cut(tiny_detector: Detector, size: int) -> None:
    values = [*quiet(100), 60.0, *quiet(20, 1), 6.0, 60.0, 600.0, *quiet(30, 2), 80.0]
    both = [event for pair in zip(events(values, "a"), events(values[::-1], "b"), strict=True) for event in pair]
    logs = []
    for cut in (len(both), size):
        store = MemoryStore(state_ttl=3600, result_ttl=600)
        scorer = make(tiny_detector, store, settled=50)
        for i in range(0, len(both), cut):
            await scorer.score(both[i : i + cut])
        await scorer.drain(5)
        logs.append([[entry for entry in store.log if decoded(entry).stream_id == stream] for stream in ("a", "b")])
    assert logs[0] == logs[1]
    assert len(logs[0][0]) >= 4


async def test_a_rising_severity_is_told_once_for_each_level(tiny_detector: Detector, store: MemoryStore) -> None:
    scorer = make(tiny_detector, store, settled=10_000)
    await scorer.score(events([*quiet(200), 9.0, 9.0, 60.0, 60.0, 600.0]))
    await scorer.drain(5)
    told_of = [(what, severity) for _, what, severity, _, _ in steps(store)]
    assert told_of[0][0] == "opened"
    assert [what for what, _ in told_of[1:]] == ["escalated"] * (len(told_of) - 1)
    levels = ["minor", "major", "critical"]
    ranks = [levels.index(severity) for _, severity in told_of]
    assert ranks == sorted(set(ranks))
    assert ranks[0] < 2
    assert ranks[-1] == 2


async def test_accepting_resolves_the_alert_once_and_by_age_says_so(tiny_detector: Detector, store: MemoryStore, scorer: Scorer) -> None:
    await scorer.score(events([*quiet(SETTLED), *[60.0] * 20]))
    await scorer.streams.accept("s")
    await scorer.streams.accept("s")
    assert [(step[1], step[4]) for step in steps(store)] == [("opened", None), ("resolved", "accepted")]
    aged = MemoryStore(state_ttl=3600, result_ttl=600)
    by_age = make(tiny_detector, aged, accept_after=15.0)
    await by_age.score(events([*quiet(SETTLED), *[60.0] * 20]))
    await by_age.drain(5)
    assert [(step[1], step[4]) for step in steps(aged)] == [("opened", None), ("resolved", "accepted_by_age")]


async def test_forgetting_a_stream_is_told(scorer: Scorer, store: MemoryStore) -> None:
    await scorer.score(events([*quiet(SETTLED), 60.0]))
    assert await scorer.streams.forget("s")
    assert [step[1] for step in steps(store)] == ["opened", "forgotten"]


async def test_a_silence_is_told_when_it_is_raised_and_when_the_stream_speaks(scorer: Scorer, store: MemoryStore) -> None:
    clock = scorer._clock
    assert isinstance(clock, Clock)
    for i in range(60):
        clock.now = T0 + i
        await scorer.score(events([quiet(60)[i]], start=i))
    sweeper: Sweeper = scorer.sweeper(3600)
    await sweeper.sweep()
    clock.now += 600
    await sweeper.sweep()
    await sweeper.sweep()
    [silence] = told(store)
    assert (silence.what, silence.kind, silence.started_at) == ("opened", "silence", T0 + 59)
    assert silence.patience is not None
    assert silence.patience < 600
    await scorer.score(events([0.0, 0.1], start=700))
    [_, spoke] = told(store)
    assert (spoke.what, spoke.resolution, spoke.alert) == ("resolved", "spoke", silence.alert)


async def test_of_two_replicas_that_race_each_transition_is_logged_once(tiny_detector: Detector, store: MemoryStore) -> None:
    scorers = [make(tiny_detector, store), make(tiny_detector, store)]
    values = [*quiet(100), 60.0, *quiet(50, 1)]
    for event in events(values):
        await asyncio.gather(*(scorer.score([event]) for scorer in scorers))
    for scorer in scorers:
        await scorer.drain(5)
    assert [step[1] for step in steps(store)] == ["opened", "resolved"]


# ── the fold ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def evidence(timestamp: float = T0) -> Evidence:
    return Evidence(timestamp, 7, 1e-9, 3.0, 3.0, "critical", "up", [])


def opening(**changes: Any) -> Transition:
    return replace(Transition("opened", "m", "s", started_at=T0, evidence=evidence()), **changes)


def opened(transition: Transition | None = None) -> Alert:
    alert = advanced(None, transition or opening(), T0 + 1, 3600)
    assert alert is not None
    return alert


def test_a_transition_survives_its_encoding() -> None:
    transition = opening(kind="silence", patience=3.5)
    assert decoded(encoded(transition)) == transition


def test_ids_sort_by_when_the_anomaly_began_and_tell_apart_what_differs() -> None:
    times = [-5.0, 0.0, 1.0, T0, T0 + 0.001, 9e10]
    ids = [alert_id("m", "s", "anomaly", time) for time in times]
    assert ids[2:] == sorted(ids[2:])
    assert len({*ids, alert_id("m2", "s", "anomaly", T0), alert_id("m", "s2", "anomaly", T0), alert_id("m", "s", "silence", T0)}) == 9
    assert {len(id_) for id_ in ids} == {28}


def test_an_opening_told_twice_changes_nothing_and_a_recovery_resolves_once() -> None:
    alert = opened()
    assert (alert.status, alert.open, alert.live) == ("open", True, True)
    assert advanced(alert, opening(), T0 + 2, 3600) is None
    recovery = opening(what="resolved", resolution="recovered", evidence=evidence(T0 + 50))
    resolved = advanced(alert, recovery, T0 + 51, 3600)
    assert resolved is not None
    assert (resolved.status, resolved.resolution, resolved.resolved_at) == ("resolved", "recovered", T0 + 51)
    assert resolved.last == evidence(T0 + 50)
    assert advanced(resolved, recovery, T0 + 52, 3600) is None


def test_an_escalation_raises_the_severity_and_opens_what_nobody_told_of() -> None:
    alert = opened(opening(severity="minor"))
    risen = advanced(alert, opening(what="escalated", severity="critical"), T0 + 2, 3600)
    assert risen is not None
    assert (risen.severity, risen.opened_at, risen.updated_at) == ("critical", T0 + 1, T0 + 2)
    assert advanced(risen, opening(what="escalated", severity="major"), T0 + 3, 3600) is None, "it never falls"
    behind = advanced(alert, opening(what="escalated", severity="critical", evidence=evidence(T0 - 4000)), T0 + 2, 3600)
    assert behind is not None
    assert behind.live, "whoever was told that it opened is to be told how it ends"
    late = advanced(None, opening(what="escalated", severity="major"), T0 + 2, 3600)
    assert late == replace(opened(opening(severity="major")), opened_at=T0 + 2, updated_at=T0 + 2)


def test_alerts_of_the_past_are_not_live_and_silences_always_are() -> None:
    assert not opened(opening(evidence=evidence(T0 - 4000))).live
    assert opened(opening(kind="silence", evidence=None)).live


def test_the_event_that_ends_a_silence_is_none_of_its_evidence() -> None:
    spoke = opening(what="resolved", kind="silence", resolution="spoke", evidence=evidence(T0 + 50))
    resolved = advanced(opened(opening(kind="silence", evidence=None)), spoke, T0 + 51, 3600)
    assert resolved is not None
    assert (resolved.resolution, resolved.onset, resolved.last) == ("spoke", None, None)


def test_a_stream_that_speaks_again_amid_its_alert_ends_its_silence_alone() -> None:
    codec = StateCodec(features=1, state_size=1, model=1)
    rows, records = codec.fresh(1), np.zeros(1, codec.record)
    rows["flags"], rows["started_at"], rows["silent_since"] = ALERT_OPEN | 1 << LEVEL_SHIFT | SILENT, T0, T0 + 5
    records["flags"], records["started_at"] = ALERT_OPEN | 1 << LEVEL_SHIFT, T0
    moves = Standing.of(rows).moves(np.array([0]), records)
    assert [(move.what, move.kind, move.started_at) for move in moves] == [("resolved", "silence", T0 + 5)]


def test_a_forgotten_stream_resolves_its_alerts_and_what_is_not_known_stays_unknown() -> None:
    forgotten = Transition("forgotten", "m", "s")
    alert = advanced(opened(), forgotten, T0 + 5, 3600)
    assert alert is not None
    assert alert.resolution == "forgotten"
    assert advanced(None, forgotten, T0 + 5, 3600) is None
    assert advanced(None, opening(what="resolved", resolution="recovered"), T0 + 5, 3600) is None


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

NOON = 1_795_694_530.0
"""2026-11-26 12:02:10 UTC"""


def found(actual: float | None, feature: str = "value", contribution: float = 1.0) -> Finding:
    return Finding(feature, contribution, actual, 20.0, 15.0, 25.0)


def alert_of(*findings: Finding, **changes: Any) -> Alert:
    shown = replace(evidence(NOON), contributors=list(findings))
    alert = advanced(None, opening(stream_id="pump-7/temperature", started_at=NOON, evidence=shown), NOON + 1, 3600)
    assert alert is not None
    return replace(alert, **changes)


AHEAD: dict[str, Any] = {"kind": "silence", "onset": None, "last": None, "started_at": NOON + 3600}
"""Of a sender whose clock is an hour ahead."""


@pytest.mark.parametrize(
    ("alert", "says"),
    [
        (alert_of(found(28.1)), "pump-7/temperature is 3.1 above its expected range since 12:02:10 UTC."),
        (alert_of(found(-1234.567)), "pump-7/temperature is 1250 below its expected range since 12:02:10 UTC."),
        (alert_of(found(25.00012)), "pump-7/temperature is 0.00012 above its expected range since 12:02:10 UTC."),
        (
            alert_of(found(28.1, "flow", 0.8), found(None, "speed", 0.2)),
            "flow of pump-7/temperature is 3.1 above its expected range since 12:02:10 UTC.",
        ),
        (
            alert_of(found(None, "speed", 1.0), found(20.0, "flow", 0.0)),
            "speed of pump-7/temperature has no value since 12:02:10 UTC.",
        ),
        (
            alert_of(found(20.0)),
            "pump-7/temperature behaves unusually since 12:02:10 UTC: its values are in their ranges, their course is not.",
        ),
        (
            alert_of(found(20.0, "flow", 0.8), found(21.0, "speed", 0.2)),
            "pump-7/temperature behaves unusually since 12:02:10 UTC: its values are in their ranges, their course is not, "
            "that of flow most.",
        ),
        (
            alert_of(found(28.1), updated_at=NOON + 90_000),
            "pump-7/temperature is 3.1 above its expected range since 2026-11-26 12:02:10 UTC.",
        ),
        (alert_of(kind="silence", onset=None, last=None), "pump-7/temperature has been silent since 12:02:10 UTC."),
        (alert_of(**AHEAD), "pump-7/temperature has been silent since 12:02:11 UTC."),
        (
            alert_of(**AHEAD, resolution="spoke", resolved_at=NOON + 61, updated_at=NOON + 61),
            "pump-7/temperature speaks again: it was silent from 12:02:11 UTC to 12:03:11 UTC.",
        ),
        (
            alert_of(found(28.1), resolution="recovered", resolved_at=NOON + 61, updated_at=NOON + 61, last=evidence(NOON + 60)),
            "pump-7/temperature is back to normal: its anomaly began at 12:02:10 UTC, and was over at 12:03:10 UTC.",
        ),
        (
            alert_of(found(28.1), resolution="recovered", resolved_at=NOON + 9e5, updated_at=NOON + 9e5, last=evidence(NOON + 60)),
            "pump-7/temperature is back to normal: its anomaly began at 2026-11-26 12:02:10 UTC, and was over at 2026-11-26 12:03:10 UTC.",
        ),
        (
            alert_of(found(28.1), resolution="accepted", resolved_at=NOON + 60),
            "pump-7/temperature has a new normal: the change that began at 12:02:10 UTC was accepted by call.",
        ),
    ],
)
def test_an_alert_is_one_sentence_that_a_person_can_act_on(alert: Alert, says: str) -> None:
    assert summary(alert) == says


def test_every_way_to_end_has_its_words() -> None:
    for resolution in get_args(Resolution):
        assert "{" not in summary(alert_of(found(28.1), resolution=resolution, resolved_at=NOON))


def test_the_description_has_the_evidence_at_the_onset_and_at_last() -> None:
    assert description(alert_of(found(28.1))) == (
        "At the onset (2026-11-26 12:02:10 UTC): value 28.1, expected 20 (15 to 25); p-value 1e-09, "
        "alert score 3 (1 = as rare as asked for)."
    )
    mixed = [found(31.0, "flow", 0.75), found(None, "speed", 0.25)]
    later = replace(evidence(NOON + 60), contributors=mixed, p_value=None, alert_score=0.0)
    assert description(alert_of(found(28.1), last=later)).endswith(
        "At last (2026-11-26 12:03:10 UTC): flow 31, expected 20 (15 to 25), 75% of the error; speed has no value, expected 20 (15 to 25), "
        "25% of the error; no p-value."
    )
    silence = alert_of(kind="silence", onset=None, last=None, patience=12.5)
    assert description(silence) == (
        "The last event of stream pump-7/temperature was at 2026-11-26 12:02:10 UTC. Up to 12.5 s without an event are ordinary for it."
    )
    assert description(alert_of(**AHEAD)).startswith(
        "The last event of stream pump-7/temperature was at 2026-11-26 13:02:10 UTC by its own clock, which is ahead."
    )


REQUEST = "<IP> GET <*> HTTP/<NUM> status: <NUM> len: <NUM>"


def said(message: str, template: str | None, *findings: Finding, expected: dict[str, float | None]) -> Alert:
    seen = replace(
        evidence(NOON), contributors=list(findings), line=Line(message, template, template is None, ["Started"]), expected=dict(expected)
    )
    alert = advanced(None, opening(stream_id="web-1", started_at=NOON, evidence=seen), NOON + 1, 3600)
    assert alert is not None
    return alert


def test_a_lines_alert_says_what_about_it_was_unusual() -> None:
    gap, status = Finding("gap", 0.7, 0.09, 0.0119, 0.0003, 0.128), Finding("number_2", 0.2, 404.0, 200.0, 190.0, 210.0)
    little, which = Finding("number_3", 0.02, 1.0, 2.0, 0.0, 3.0), Finding("template", 0.08, 3.0, None, None, None)
    message = "10.0.0.7 GET /a HTTP/1.1 status: 404 len: 17"
    alert = said(message, REQUEST, gap, status, which, little, expected={"Took <NUM> ms": 0.64, REQUEST: 0.33, "Stopped": 0.03})
    assert description(alert) == (
        f"At the onset (2026-11-26 12:02:10 UTC): '{message}', which is '{REQUEST}' (33% here); likelier was 'Took <NUM> ms' (64%); "
        "before it came 'Started'; gap to the line before 0.09 s, expected 0.0119 s (0.0003 to 0.128), 70% of the error; "
        "number_2 ('status: <NUM>') 404, expected 200 (190 to 210), 20% of the error; p-value 1e-09, "
        "alert score 3 (1 = as rare as asked for)."
    )
    likeliest = said(message, REQUEST, gap, expected={REQUEST: 0.9, "Stopped": 0.03})
    assert "likelier" not in description(likeliest)
    long = said("x" * 600, None, which, expected={"Started": 0.9951, "Stopped": 0.0049})
    assert summary(long).endswith(": " + "x" * 159 + "…")
    assert "'" + "x" * 499 + "…', which" in description(long)
    assert "likelier was 'Started' (100%); before" in description(long)
    unknown = said("Went", None, which, expected={"Started": 0.5, "(new pattern)": 0.01, "Stopped": 0.001})
    assert "'Went', which no pattern of the model matches (1% here); likelier was 'Started' (50%); before" in description(unknown)
    assert "number_1 ('HTTP/<NUM>') 2" in description(said(message, REQUEST, Finding("number_1", 1.0, 2.0, 1.1, 1, 1.2), expected={}))


def test_an_alert_says_that_the_lines_before_were_like_its_own() -> None:
    """Of a burst, such as failed logins, the line that opens the alert is like the others."""
    which = Finding("template", 1.0, 3.0, None, None, None)
    alert = said("Failed", "Failed", which, expected={"Started": 0.9})
    line, evidence = Line("Failed", "Failed", False, ["Failed", "Failed", "Started"]), alert.onset
    assert evidence is not None
    run = description(replace(alert, onset=replace(evidence, line=line), last=replace(evidence, line=line)))
    assert "'Failed', which is 'Failed', as were the 2 lines before it; likelier was 'Started' (90%); p-value" in run
    new = description(replace(alert, onset=replace(evidence, line=Line("Went", None, True, ["(new pattern)"] * 5))))
    assert "'Went', which no pattern of the model matches, as were the 5 lines before it; likelier" in new
    assert "before it came 'Failed'; p-value" in description(replace(alert, onset=replace(evidence, line=replace(line, before=["Failed"]))))


def test_a_name_or_a_line_does_not_turn_the_sentence_around() -> None:
    """By a character that begins writing from right to left."""
    assert summary(alert_of(found(28.1), stream_id="\u202e7-pmup\u2066")) == "7-pmup is 3.1 above its expected range since 12:02:10 UTC."
    assert "\u202e" not in description(said("a \u202e b", None, expected={"Started": 1.0}))


def test_what_a_line_holds_does_not_reach_a_terminal() -> None:
    alert = said("\x1b[31m\x1b[1mERROR\x1b[0m disk \x07\x00gone\x1b]0;title\x9b\r\n  at f", None, expected={"Started": 1.0})
    assert summary(alert) == "web-1 logs unusual lines since 12:02:10 UTC: ERROR disk \ufffd\ufffdgone\ufffd]0;title\ufffd"
    assert "'ERROR disk \ufffd\ufffdgone\ufffd]0;title\ufffd', which no pattern of the model matches; likelier was" in description(alert)
