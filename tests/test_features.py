"""What cannot be used is refused by field and value; its neighbours are kept."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadEvent
from service.events import EARLIEST_SECONDS, LATEST_SECONDS, Event, Parsed
from service.features import LATEST_WRITTEN_SECONDS, TOGETHER, parse, parse_timestamp
from tests.readings import to_readings
from tests.tiny import tiny_manifest

MANIFEST = tiny_manifest(("temperature", "flow"))
NOW = 1.7e9


def refused(event: Event) -> BadEvent:
    parsed, errors = parse([event], MANIFEST, now=NOW, max_future=60)
    assert len(parsed) == 0
    return errors[0]


def test_values_are_put_in_the_manifests_order_and_missing_ones_are_nan() -> None:
    events = [
        Event(stream_id="a", values={"flow": 2, "temperature": 1.5}),
        Event(stream_id="b", values={"flow": None, "temperature": 3.0}),
        Event(stream_id="c", values={"flow": 4.0}),
    ]
    readings, errors = to_readings(events, MANIFEST, now=NOW)
    assert not errors
    assert np.array_equal(readings.x, np.array([[1.5, 2], [3, np.nan], [np.nan, 4]], np.float32), equal_nan=True)
    assert readings.timestamp.tolist() == [NOW] * 3
    assert not readings.timed.any()


def test_bad_events_do_not_touch_their_neighbours() -> None:
    events = [
        Event(stream_id="a", values={"flow": 1.0}, timestamp=5.0, sequence=3),
        Event(stream_id="a", values={"flaw": 1.0}),
        Event(stream_id="b", values={"flow": 2.0}, event_id="x"),
    ]
    readings, errors = to_readings(events, MANIFEST, now=NOW)
    assert list(errors) == [1]
    assert list(readings.stream_ids) == ["a", "b"]
    assert readings.sequence.tolist() == [3, -1]
    assert (readings.key != 0).all()


@pytest.mark.parametrize(
    ("event", "field", "says"),
    [
        (Event(values={"flow": 1.0}), "stream_id", "missing"),
        (Event(stream_id="a\nb", values={"flow": 1.0}), "stream_id", "control characters"),
        (Event(stream_id="a\ud800", values={"flow": 1.0}), "stream_id", "control characters"),
        (Event(stream_id="a", values={"flow": 1.0}, event_id="\x00"), "event_id", "control characters"),
        (Event(stream_id="a"), "values", "'values' is missing"),
        (Event(stream_id="a", values={}), "values", "empty"),
        (Event(stream_id="a", values={"flow": 1.0, "speed": 2.0}), "values.speed", "knows 'temperature', 'flow'"),
        (Event(stream_id="a", values={"flow": 1e39}), "values.flow", "range of float32"),
        (Event(stream_id="a", values={"flow": float("nan")}), "values.flow", "flow is NaN; send null"),
        (Event(stream_id="a", values={"flow": float("-inf")}), "values.flow", "send null"),
        (Event(stream_id="a", message="GET /"), "message", "not a log line"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp="yesterday"), "timestamp", "'yesterday' is neither"),
        (
            Event(stream_id="a", values={"flow": 1.0}, timestamp="2023-11-14\ud80000:00:00"),
            "timestamp",
            r"'2023-11-14\ud80000:00:00' is neither",
        ),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=1.7e12), "timestamp", "looks like milliseconds"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=1.7e15), "timestamp", "looks like microseconds"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=1.7e18), "timestamp", "looks like nanoseconds"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=-1e11), "timestamp", "since 1970"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=float("nan")), "timestamp", "since 1970"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=NOW + 61), "timestamp", "too far in the future"),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp="6980-08-19T17:56:26Z"), "timestamp", "would count as late."),
        (
            Event(stream_id="a", values={"flow": 1.0}, timestamp="2026-08-19 17:56:26"),
            "timestamp",
            "late. It names no zone, so it is taken for UTC.",
        ),
        (Event(stream_id="a", values={"flow": 1.0}, timestamp=1.7e12), "timestamp", "or declare the source's payload.timestamp_unit."),
    ],
)
def test_a_bad_event_is_refused_by_field_and_reason(event: Event, field: str, says: str) -> None:
    error = refused(event)
    assert error.field == field
    assert says in error.detail


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:10Z", 10.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-02 00:00:00.5", 86400.5),
        ("2026-11-23T08:00:00.123456Z", 1795420800.123456),
    ],
)
def test_times_are_rfc_3339_and_utc_without_a_zone(text: str, seconds: float) -> None:
    assert parse_timestamp(text) == seconds


def test_every_time_that_is_taken_can_be_shown_in_every_zone() -> None:
    for seconds in (EARLIEST_SECONDS, LATEST_SECONDS, LATEST_WRITTEN_SECONDS):
        shown = [datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours))).isoformat() for hours in (-23, 0, 23)]
        assert {parse_timestamp(text) for text in shown} == {seconds}
    for text in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        with pytest.raises(BadEvent, match="not a time in seconds since 1970"):
            parse_timestamp(text)


BOTH: dict[str, float | None] = {"flow": 1.0, "temperature": 2.0}
ODD = [
    Event(stream_id="a", values=BOTH | {"flow": None}),
    Event(stream_id="a", values={"flow": 1.0}),
    Event(stream_id="a", values={"flow": 1.0, "speed": 2.0}),
    Event(stream_id="a", values=BOTH | {"speed": 3.0}),
    Event(stream_id="a", values=BOTH | {"flow": float("nan")}),
    Event(stream_id="a", values=BOTH | {"flow": 1e39}),
    Event(stream_id="a", values={}),
    Event(stream_id="a"),
    Event(stream_id="a", message="GET /"),
    Event(stream_id="a", values=BOTH, end=True),
    Event(stream_id="a", values=BOTH, timestamp="2023-11-14T00:00:00Z"),
    Event(stream_id="a", values=BOTH, timestamp="5"),
    Event(stream_id="a", values=BOTH, timestamp=float("nan")),
    Event(stream_id="a", values=BOTH, timestamp=NOW + 61),
    Event(values=BOTH),
    Event(stream_id="a\n", values=BOTH),
    Event(stream_id="a", values=BOTH, event_id="\x00"),
]
"""What must be looked at one by one."""


@st.composite
def usual_and_odd_events(draw: st.DrawFn) -> list[Event]:
    """Plain ones, and at most two among them that must be looked at one by one."""
    plain = st.builds(
        Event,
        stream_id=st.sampled_from(["a", "b", "é"]),
        values=st.fixed_dictionaries({"flow": st.floats(-1e6, 1e6), "temperature": st.integers(-100, 100)}),
        timestamp=st.one_of(st.none(), st.floats(0, NOW)),
        event_id=st.one_of(st.none(), st.text("xyz", min_size=1, max_size=3)),
        sequence=st.one_of(st.none(), st.integers(0, 9)),
    )
    events = draw(st.lists(plain, min_size=TOGETHER, max_size=TOGETHER + 4))
    for event in draw(st.lists(st.sampled_from(ODD), max_size=2)):
        events.insert(draw(st.integers(0, len(events))), event)
    return events


@pytest.mark.parametrize("odd", [None, *ODD])
def test_one_odd_event_among_many_is_read_as_it_is_alone(odd: Event | None) -> None:
    plain = [Event(stream_id="a", values=BOTH, timestamp=float(i), sequence=i) for i in range(TOGETHER)]
    read_as_each_alone(plain if odd is None else [*plain, odd])


@given(usual_and_odd_events())
def test_many_events_at_once_are_read_as_each_of_them_alone(events: list[Event]) -> None:
    read_as_each_alone(events)


def read_as_each_alone(events: list[Event]) -> None:
    parsed, errors = parse(events, MANIFEST, now=NOW, max_future=60)
    alone = [parse([event], MANIFEST, now=NOW, max_future=60) for event in events]
    assert {i: error.detail for i, error in errors.items()} == {i: wrong[0].detail for i, (_, wrong) in enumerate(alone) if wrong}
    whole = Parsed.joined(part for part, _ in alone)
    for name in ("stream_ids", "timestamp", "timed", "sequence", "key"):
        assert getattr(parsed, name) == getattr(whole, name), name
    assert np.array_equal(np.array(parsed.values, np.float64), np.array(whole.values, np.float64), equal_nan=True)
