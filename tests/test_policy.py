"""Scores exceed 1 exactly where p < α; alerts open at onsets and close after enough ordinary events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.policy import BOTH, DIRECTIONS, DOWN, NO_DIRECTION, UP, Policy, judge
from service.state import ALERT_OPEN, Rows, StateCodec

CODEC = StateCodec(features=2, state_size=1, model=1)


def record(p: float, onset_p: float = 1.0, alpha: float = 1e-3) -> Rows:
    records = np.zeros(1, CODEC.record)
    records["p_value"], records["onset_p"], records["alpha"] = p, onset_p, alpha
    records["contribution"] = [0.9, 0.1]
    records["lower"], records["upper"] = -1, 1
    return records


def play(policy: Policy, rows: Rows, p_values: list[float], start: float = 0.0) -> list[tuple[bool, float]]:
    """(alert open, start of the run) after each event, one a second; an onset where p is negative: p = |p|."""
    trace = []
    for i, p in enumerate(p_values):
        onset = np.array([abs(p) if p < 0 else 1.0], np.float32)
        policy.track(rows, np.array([0]), np.array([start + i]), np.array([abs(p)], np.float32), onset)
        trace.append((bool(rows["flags"][0] & ALERT_OPEN), float(rows["last"]["started_at"][0])))
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


def test_a_run_of_errors_without_onset_opens_no_alert() -> None:
    assert not any(open_ for open_, _ in play(Policy(), CODEC.fresh(1), [1e-4] * 20))


def test_confidence_grows_to_one_half_at_the_priors_weight() -> None:
    policy = Policy(prior_events=1000)
    confidence = policy.confidence(np.array([0, 1000, 10**9], np.uint64))
    assert confidence[0] == 0
    assert confidence[1] == 0.5
    assert 0.99 < confidence[2] < 1
