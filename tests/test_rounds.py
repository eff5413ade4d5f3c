"""Rounds keep the order within a stream, step nothing twice, and give the same scores however events are cut into batches."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.detector import Detector
from service.events import PLACE, Event, Readings
from service.order import turns
from service.policy import Policy
from service.rounds import Kind, Outcomes, _time_features, advance
from service.state import ACCEPTED, FROZEN, Rows, StateCodec
from tests.readings import to_readings
from training.data import clock

POLICY = Policy()


def readings_of(detector: Detector, events: list[Event]) -> Readings:
    readings, errors = to_readings(events, detector.manifest, now=1e6)
    assert not errors
    return readings


def codec_of(detector: Detector) -> StateCodec:
    return StateCodec(detector.features, detector.state_size, detector.fingerprint)


def run(detector: Detector, rows: Rows, events: list[Event], policy: Policy = POLICY) -> tuple[list[Kind], list[float]]:
    """Kinds and p-values; the stream's row is the number in its id."""
    slots = np.array([int(event.stream_id or "") for event in events], np.intp)
    outcomes = advance(detector, policy, rows, readings_of(detector, events), slots)
    return [Kind(kind) for kind in outcomes.kinds], outcomes.records["p_value"].tolist()


def event(stream: int, value: float = 1.0, **more: float | str | int | None) -> Event:
    return Event(stream_id=str(stream), values={"value": value}, **more)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60))
def test_each_round_has_a_stream_once_and_all_rounds_together_each_event_that_goes(events: list[tuple[int, bool]]) -> None:
    slots, go = np.array([slot for slot, _ in events], np.intp), np.array([goes for _, goes in events], np.bool_)
    made = turns(slots, go)
    position = iter(made.positions.tolist())
    last: dict[int, int] = {}
    for size in made.sizes:
        for i, slot in zip([next(position) for _ in range(size)], made.streams[:size].tolist(), strict=True):
            assert slots[i] == slot
            assert last.get(slot, -1) < i
            last[slot] = i
    assert sorted(made.positions.tolist()) == np.flatnonzero(go).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_any_cut_into_batches_gives_the_same_states_to_the_last_bit(tiny_detector: Detector, seed: int, size: int) -> None:
    """Of streams long enough that alerts open, freeze their states, drop their learners and close, each beside others that stay calm."""
    rng = np.random.default_rng(seed)
    policy = Policy(alpha=0.02, settled=10, passing=3, recovery=2)
    streams = rng.choice(5, size=150, p=[0.1, 0.2, 0.2, 0.2, 0.3])
    values = rng.normal(size=150) * np.where(rng.random(150) < 0.05, 100, 1)
    events = [event(int(s), float(values[i]), timestamp=1000.0 + i) for i, s in enumerate(streams)]
    codec = codec_of(tiny_detector)
    whole, cut = codec.fresh(5), codec.fresh(5)
    run(tiny_detector, whole, events, policy)
    for i in range(0, len(events), size):
        run(tiny_detector, cut, events[i : i + size], policy)
    assert whole.tobytes() == cut.tobytes()


class Sent(NamedTuple):
    stream: int
    time: float
    timed: bool
    sequence: int
    key: int
    source: int
    offset: int
    old: bool


sent = st.builds(
    Sent,
    st.integers(0, 2),
    st.integers(0, 8).map(float),
    st.booleans(),
    st.integers(-1, 5),
    st.integers(0, 12),
    st.integers(0, 2),
    st.integers(0, 6),
    st.sampled_from([False] * 9 + [True]),
)
in_order = st.lists(st.integers(0, 2), max_size=30).map(
    lambda streams: [Sent(stream, float(i), True, i, i + 1, 1, i, False) for i, stream in enumerate(streams)]
)


def queued(time: int, source: int, offset: int) -> Sent:
    return Sent(0, float(time), True, -1, 0, source, offset, False)


@settings(max_examples=150, deadline=None)
@example([queued(0, 1, 5), queued(1, 0, 0), queued(2, 1, 5)])  # delivered again behind one of no queue
@given(st.lists(sent, min_size=1, max_size=40) | st.builds(operator.add, in_order, st.lists(sent, min_size=1, max_size=3)))
def test_duplicates_and_late_events_within_a_batch_are_what_they_are_one_by_one(tiny_detector: Detector, events: list[Sent]) -> None:
    def readings(some: list[Sent]) -> Readings:
        _, time, timed, sequence, key, source, offset, _ = zip(*some, strict=True)
        place = np.array([(a, 0, b if a else -1) for a, b in zip(source, offset, strict=True)], PLACE)
        x = np.array([[float(k % 5)] for k in key], np.float32)
        columns = np.array(time), np.array(timed), np.array(sequence, np.int64), np.array(key, np.uint64)
        return Readings([""] * len(some), x, *columns, None, place)

    def advanced(rows: Rows, some: list[Sent]) -> Outcomes:
        old = np.array([event.old for event in some])
        return advance(tiny_detector, POLICY, rows, readings(some), np.array([event.stream for event in some], np.intp), old)

    codec = codec_of(tiny_detector)
    whole, single = codec.fresh(3), codec.fresh(3)
    together, one_by_one = advanced(whole, events), [advanced(single, [event]) for event in events]
    assert whole.tobytes() == single.tobytes()
    for i, alone in enumerate(one_by_one):
        kind, expected = Kind(int(together.kinds[i])), Kind(int(alone.kinds[0]))
        within = kind is Kind.DUPLICATE and expected in (Kind.REPEATED, Kind.LATE)  # answered from its own batch
        assert kind is expected or within
        if not within:
            assert together.records[i].tobytes() == alone.records[0].tobytes()


def test_an_event_sent_again_gets_its_stored_result_and_is_not_stepped(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    events = [event(0, float(i % 3), timestamp=float(i), event_id=f"e{i}") for i in range(10)]
    _, first = run(tiny_detector, rows, events)
    before = rows.tobytes()
    kinds, again = run(tiny_detector, rows, [events[-1]])
    assert kinds == [Kind.DUPLICATE]
    assert again == first[-1:]
    assert rows.tobytes() == before


def test_an_id_among_the_last_eight_is_repeated_even_with_a_new_time(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    run(tiny_detector, rows, [event(0, timestamp=float(i), event_id=f"e{i}") for i in range(10)])
    kinds, _ = run(tiny_detector, rows, [event(0, timestamp=100.0 + i, event_id=f"e{i}") for i in (1, 2, 3, 8)])
    # e1 left the ring of eight and has a newer time: it can only be taken for a new event. Its arrival pushes e2 out of the ring.
    assert kinds == [Kind.SCORED, Kind.SCORED, Kind.SCORED, Kind.REPEATED]


def test_the_same_id_twice_in_one_batch_is_answered_once(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(2)
    run(tiny_detector, rows, [event(0, timestamp=float(i)) for i in range(6)])
    twice = [
        event(0, 2.0, timestamp=10.0, event_id="a"),
        event(0, 3.0, timestamp=11.0, event_id="b"),
        event(0, 2.0, timestamp=10.0, event_id="a"),
    ]
    kinds, scores = run(tiny_detector, rows, twice)
    assert kinds == [Kind.SCORED, Kind.SCORED, Kind.DUPLICATE]
    assert scores[2] == scores[0]
    assert rows["version"][0] == 8


def test_an_id_that_comes_again_far_behind_in_its_batch_is_answered_once(tiny_detector: Detector) -> None:
    """Beyond the ring of eight, and without a time that would make it late."""
    rows = codec_of(tiny_detector).fresh(1)
    kinds, scores = run(tiny_detector, rows, [event(0, float(i), event_id=f"e{i % 20}") for i in range(21)])
    assert kinds == [Kind.SCORED] * 20 + [Kind.DUPLICATE]
    assert rows["version"][0] == 20
    np.testing.assert_array_equal(scores[20], scores[0])


def test_an_older_event_is_late_and_changes_nothing(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    run(tiny_detector, rows, [event(0, timestamp=100.0)])
    before = rows.tobytes()
    kinds, scores = run(tiny_detector, rows, [event(0, timestamp=99.9)])
    assert kinds == [Kind.LATE]
    assert np.isnan(scores[0])
    assert rows.tobytes() == before


def test_an_event_of_the_same_time_is_scored(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    assert run(tiny_detector, rows, [event(0, timestamp=5.0), event(0, timestamp=5.0)])[0] == [Kind.SCORED, Kind.SCORED]


def test_sequence_orders_the_events_in_place_of_the_time(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    kinds, _ = run(
        tiny_detector,
        rows,
        [event(0, timestamp=50.0, sequence=5), event(0, timestamp=40.0, sequence=6), event(0, timestamp=60.0, sequence=4)],
    )
    assert kinds == [Kind.SCORED, Kind.SCORED, Kind.LATE]
    assert run(tiny_detector, rows, [event(0, timestamp=40.0, sequence=6)])[0] == [Kind.DUPLICATE]
    assert run(tiny_detector, rows, [event(0, timestamp=70.0, sequence=6, event_id="another")])[0] == [Kind.LATE]


def test_an_event_without_time_is_never_late(tiny_detector: Detector) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    run(tiny_detector, rows, [event(0, timestamp=2e6)])  # ahead of the arrival time 1e6
    assert run(tiny_detector, rows, [event(0)])[0] == [Kind.SCORED]
    assert rows["last"]["timestamp"][0] == 2e6


def test_the_increase_of_a_counter_is_of_two_readings_with_nothing_in_between(tiny_detector: Detector) -> None:
    rows, given = codec_of(tiny_detector).fresh(1), []
    for i, raw in enumerate((100.0, 130.0, None, 190.0, 190.0)):
        readings = readings_of(tiny_detector, [event(0, timestamp=10.0 * i)])
        outcomes = advance(
            tiny_detector, POLICY, rows, replace(readings, raw=None if raw is None else np.array([raw])), np.zeros(1, np.intp)
        )
        given.append(float(outcomes.records["x"][0, 0]))
    assert given == pytest.approx([math.nan, 3.0, 1.0, math.nan, 0.0], nan_ok=True)


def test_the_event_that_opens_an_alert_teaches_the_learner_alone(tiny_detector: Detector) -> None:
    rows, policy = codec_of(tiny_detector).fresh(1), Policy(settled=10)
    run(tiny_detector, rows, [event(0, float(i % 3), timestamp=float(i)) for i in range(50)], policy)
    before = rows["vector"][:, 1:].copy()  # mean and deviation
    run(tiny_detector, rows, [event(0, 1000.0, timestamp=50.0)], policy)
    assert rows["flags"][0] & FROZEN
    np.testing.assert_array_equal(rows["vector"][:, 1:], before)
    assert (rows["learner"][:, 1:] != before).any()


def test_a_sensor_learns_after_an_acceptance_as_it_always_does(tiny_detector: Detector) -> None:
    rows, policy = codec_of(tiny_detector).fresh(2), Policy(settled=10)
    some = [event(stream, float(i % 3), timestamp=float(i)) for i in range(50) for stream in (0, 1)]
    run(tiny_detector, rows, some, policy)
    rows["flags"][0], rows["quiet"] = ACCEPTED, 0
    run(tiny_detector, rows, [event(stream, 1.5, timestamp=50.0) for stream in (0, 1)], policy)
    assert rows["flags"].tolist() == [ACCEPTED, 0]
    np.testing.assert_array_equal(rows["vector"][0], rows["vector"][1])


def test_a_detector_is_told_the_times_that_it_was_trained_with() -> None:
    moments = [datetime(1970, 1, 1, tzinfo=UTC), datetime(2026, 11, 29, 23, 59, 59, tzinfo=UTC), datetime(2026, 11, 30, tzinfo=UTC)]
    seconds = np.array([moment.timestamp() for moment in moments])
    t = _time_features(seconds, np.diff(seconds, prepend=np.nan))
    np.testing.assert_array_equal(t, clock(seconds))
    assert t[:, 2].tolist() == [moment.weekday() for moment in moments]
    assert t[1:, 1].tolist() == [86_399, 0]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_no_readings_no_rounds(tiny_detector: Detector, count: int) -> None:
    rows = codec_of(tiny_detector).fresh(1)
    kinds, _ = run(tiny_detector, rows, [event(0, timestamp=float(i)) for i in range(count)])
    assert kinds == [Kind.SCORED] * count
    assert rows["version"][0] == count
