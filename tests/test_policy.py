"""Scores exceed 1 exactly where p < α; alerts open at onsets and close after enough ordinary events."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.policy import BOTH, DIRECTIONS, DOWN, NO_DIRECTION, UP, Policy, judge
from service.state import ACCEPTED, ALERT_OPEN, ENDING, FROZEN, LASTING, LEARNER, Rows, StateCodec

CODEC = StateCodec(features=2, state_size=1, model=1)


def track(policy: Policy, rows: Rows, time: float, p_value: float, onset_p: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next event of the one stream in `rows`."""
    onset_alpha = policy.onset_alpha(rows["version"] + np.uint64(1))
    return policy.track(rows, np.array([time]), np.array([p_value], np.float32), onset_p, onset_alpha)


def record(p: float, onset_p: float = 1.0, alpha: float = 1e-3) -> Rows:
    records = np.zeros(1, CODEC.record)
    records["p_value"], records["onset_p"], records["alpha"], records["onset_alpha"] = p, onset_p, alpha, alpha
    records["contribution"] = [0.9, 0.1]
    records["lower"], records["upper"] = -1, 1
    return records


def play(policy: Policy, rows: Rows, p_values: list[float], start: float = 0.0) -> list[tuple[bool, float]]:
    """(alert open, start of the run) after each event, one a second; an onset where p is negative: p = |p|."""
    trace = []
    for i, p in enumerate(p_values):
        onset = np.array([abs(p) if p < 0 else 1.0], np.float32)
        track(policy, rows, start + i, abs(p), onset)
        trace.append((bool(rows["flags"][0] & ALERT_OPEN), float(rows["started_at"][0])))
    return trace


@given(st.floats(2**-99, 1.0, width=32), st.sampled_from([1e-2, 1e-3, 1 / 2016, 1e-4]))
def test_an_event_is_anomalous_exactly_when_its_p_value_is_below_alpha(p: float, alpha: float) -> None:
    verdict = judge(record(p, alpha=alpha))
    assert bool(verdict.is_anomaly[0]) == bool(np.float32(p) < np.float32(alpha))
    assert verdict.anomaly_score[0] >= 0
    assert 0 <= verdict.grade[0] < 1


@pytest.mark.parametrize(("p", "severity"), [(0.5, 0), (1e-3, 0), (9e-4, 1), (1e-5, 2), (1e-7, 3), (1e-30, 3)])
def test_severity_grows_with_the_score(p: float, severity: int) -> None:
    assert judge(record(p)).severity[0] == severity


def test_no_score_is_no_anomaly() -> None:
    verdict = judge(record(float("nan"), float("nan")))
    assert np.isnan(verdict.anomaly_score[0])
    assert not verdict.is_anomaly[0]
    assert verdict.severity[0] == 0
    assert verdict.direction[0] == NO_DIRECTION


def test_a_normal_event_scores_zero_and_not_minus_zero() -> None:
    assert str(judge(record(1.0)).anomaly_score[0]) == "0.0"


@pytest.mark.parametrize(
    ("x", "direction"), [((5, 0), UP), ((-5, 0), DOWN), ((5, -5), BOTH), ((0.5, 0), UP), ((-0.5, 0.5), DOWN), ((0, 0), NO_DIRECTION)]
)
def test_direction_is_the_side_of_the_band_or_else_of_the_expectation(x: tuple[float, float], direction: int) -> None:
    records = record(1e-9)
    records["x"] = x
    assert DIRECTIONS[judge(records).direction[0]] == DIRECTIONS[direction]


def test_an_alert_opens_at_the_onset_and_closes_after_enough_ordinary_events() -> None:
    trace = play(Policy(recovery=3), CODEC.fresh(1), [0.5, 1e-4, -1e-5, 0.5, 0.5, 1e-4, 0.5, 0.5, 0.5, 0.5])
    assert [open_ for open_, _ in trace] == [False, False, True, True, True, True, True, True, False, False]
    started = [start for _, start in trace]
    assert np.isnan(started[0])
    assert started[1:8] == [1.0] * 7
    assert np.isnan(started[8:]).all()


def test_a_run_of_errors_without_onset_opens_no_alert_and_ends_as_one_with() -> None:
    trace = play(Policy(recovery=3), CODEC.fresh(1), [*[1e-4] * 20, 0.5, 0.5, 0.5])
    assert not any(open_ for open_, _ in trace)
    assert [start for _, start in trace[:-1]] == [0.0] * 22
    assert np.isnan(trace[-1][1])


def test_confidence_grows_to_one_half_at_the_priors_weight() -> None:
    policy = Policy(prior_events=1000)
    confidence = policy.confidence(np.array([0, 1000, 10**9], np.uint64))
    assert confidence[0] == 0
    assert confidence[1] == 0.5
    assert 0.99 < confidence[2] < 1


def old_stream() -> Rows:
    rows = CODEC.fresh(1)
    rows["version"] = 5000
    return rows


def flags(rows: Rows, *names: int) -> list[bool]:
    return [bool(rows["flags"][0] & name) for name in names]


def test_an_open_alert_freezes_the_state_and_keeps_a_learner_while_it_may_be_passing() -> None:
    policy, rows = Policy(passing=3), old_stream()
    play(policy, rows, [0.5, -1e-5])
    assert flags(rows, FROZEN, LEARNER) == [True, True]
    play(policy, rows, [1e-4, 1e-4])
    assert flags(rows, FROZEN, LEARNER) == [True, True]
    play(policy, rows, [1e-4])
    assert flags(rows, FROZEN, LEARNER) == [True, False]


def test_a_frozen_state_takes_no_rare_event_for_ordinary_and_an_event_without_value_for_nothing() -> None:
    policy, rows = Policy(recovery=3), old_stream()
    trace = play(policy, rows, [-1e-5, *[0.005] * 1000, *[float("nan")] * 10, 0.5, 0.5])
    assert all(open_ for open_, _ in trace)
    assert play(policy, rows, [float("nan"), 0.5])[-1][0] is False
    assert not rows["flags"][0]
    often = play(Policy(alpha=0.05, recovery=3), old_stream(), [-1e-5, *[0.03] * 10])
    assert all(open_ for open_, _ in often), "what is rarer than asked for is not ordinary, however often that is asked for"


def test_a_stream_too_young_to_know_what_is_normal_learns_through_its_alerts() -> None:
    rows = CODEC.fresh(1)
    play(Policy(), rows, [-1e-5])
    assert flags(rows, ALERT_OPEN, FROZEN) == [True, False]


def test_within_an_open_alert_only_a_much_rarer_onset_counts() -> None:
    rows, counted = old_stream(), []
    for p in (1e-4, 9e-5, 2e-5, 1e-5 / 2, 1e-6, 1e-7):
        [onset] = track(Policy(), rows, 1.0, p, np.array([p], np.float32))
        counted.append(bool(onset < 1))
    assert counted == [True, False, False, True, False, True]


def test_an_accepted_alert_is_closed_and_none_opens_until_the_stream_is_ordinary_again() -> None:
    policy, rows = Policy(recovery=3), old_stream()
    play(policy, rows, [-1e-5, 0.5, 0.5])
    rows["learner"] = 7
    assert policy.accept(rows)
    assert rows["vector"][0] == 7
    assert not policy.accept(rows)
    assert flags(rows, ALERT_OPEN, FROZEN, LEARNER, ACCEPTED) == [False, False, False, True]
    assert not any(open_ for open_, _ in play(policy, rows, [0.5, -1e-5, 1e-4, -1e-6, 0.5, 0.5, 0.5]))
    assert flags(rows, ACCEPTED) == [False]
    assert play(policy, rows, [-1e-5])[-1][0]


def test_a_stream_that_has_ended_is_not_waited_for_because_its_alert_is_accepted() -> None:
    policy, rows = Policy(), old_stream()
    play(policy, rows, [-1e-5])
    rows["flags"] |= ENDING
    assert policy.accept(rows)
    assert flags(rows, ALERT_OPEN, ACCEPTED, ENDING) == [False, True, True]


def test_a_lasting_anomaly_is_accepted_by_its_age_if_so_configured() -> None:
    rows = old_stream()
    trace = play(Policy(accept_after=5), rows, [-1e-5, *[1e-4] * 6])
    assert [open_ for open_, _ in trace] == [True] * 5 + [False] * 2
    assert [start for _, start in trace] == pytest.approx([0.0] * 5 + [math.nan, 6.0], nan_ok=True)
    assert flags(rows, ACCEPTED, FROZEN) == [True, False]
    assert all(open_ for open_, _ in play(Policy(), old_stream(), [-1e-5, *[1e-4] * 6]))


def test_an_event_of_a_lasting_fault_is_anomalous_though_less_rare_than_its_onset() -> None:
    calm, lasting = record(0.005), record(0.005)
    lasting["flags"] = LASTING
    assert not judge(calm).is_anomaly[0]
    verdict = judge(lasting)
    assert verdict.is_anomaly[0]
    assert verdict.severity[0] == 1
    assert 0 < verdict.grade[0] < 1
    assert verdict.anomaly_score[0] == judge(calm).anomaly_score[0]


def test_the_allowance_is_spent_while_a_stream_is_new_and_strict_spends_none() -> None:
    ages = np.array([100, 1000, 10**8], np.uint64)
    allowed = Policy(alpha=1e-3, tau=1500.0).onset_alpha(ages)
    assert allowed == pytest.approx([4e-3, 1e-3 * 2.5**0.5, 1e-3], rel=1e-3)
    assert (Policy(alpha=1e-3, tau=1500.0, strict=True).onset_alpha(ages) == np.float32(1e-3)).all()


def test_an_alert_opens_exactly_when_its_score_is_above_one() -> None:
    for strict, opens in ((False, True), (True, False)):
        policy, rows = Policy(alpha=1e-3, tau=1500.0, strict=strict), CODEC.fresh(1)
        rows["version"] = 99
        onset_p = np.array([2e-3], np.float32)
        track(policy, rows, 0.0, 0.5, onset_p)
        records = record(0.5, 2e-3)
        records["onset_alpha"] = policy.onset_alpha(np.array([100]))
        assert bool(rows["flags"][0] & ALERT_OPEN) == opens == bool(judge(records).alert_score[0] > 1)


def test_what_the_setting_means_is_stated() -> None:
    stated = Policy(alpha=1e-3, tau=1500.0).promise(warmup=100)
    assert stated["per_stream_and_1000_events"] == 1
    assert 2 < stated["extra_while_learning"] < 4
    assert Policy(alpha=1e-3, tau=1500.0, strict=True).promise(warmup=100)["extra_while_learning"] == 0
