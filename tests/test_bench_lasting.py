"""What bench.lasting does to machines, and what it counts of their alerts."""

from __future__ import annotations

import numpy as np
import pytest

from bench.lasting import FAULTS, SETTLE, Case, cases, course, with_fault
from service.state import ALERT_OPEN, Rows, record_dtype
from training.data import Stream

GIVEN, EVENTS, AFTER = 300, 40, 60


def stream() -> Stream:
    rows = GIVEN + SETTLE + EVENTS + AFTER
    x = np.random.default_rng(0).normal(5, 2, (rows, 4)).astype(np.float32)
    x[:, 3] = 1.0  # never moves
    return Stream("m", x, np.zeros((rows, 3), np.float32))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_in_its_rows_and_its_sensors_alone(fault: str) -> None:
    one, case = stream(), Case(fault, 0, np.array([2, 0])[: FAULTS[fault][0]])
    x, normal = with_fault(case, one, GIVEN, EVENTS, AFTER), one.x[GIVEN:]
    changed = ~((x == normal) | (np.isnan(x) & np.isnan(normal)))
    rows, sensors = np.nonzero(changed)
    assert changed.any() == (fault != "no fault")
    assert set(sensors.tolist()) <= set(case.sensors.tolist())
    assert fault == "no fault" or (rows.min(), rows.max()) == (SETTLE, SETTLE + EVENTS - 1)


def test_sensors_that_hardly_move_are_left_alone() -> None:
    assert all(3 not in case.sensors for case in cases([stream()], [GIVEN], 0))


def records(opens: list[tuple[int, int]]) -> Rows:
    """Of four sensors, the third of which contributes most, with alerts open from one row up to another one."""
    rows = np.zeros(SETTLE + EVENTS + AFTER, record_dtype(4))
    rows["contribution"][:, 2] = 1
    for start, end in opens:
        rows["flags"][start:end] = ALERT_OPEN
    return rows


def test_an_alert_is_counted_by_when_it_opens_what_it_covers_and_when_it_closes() -> None:
    case = Case("1 missing", 0, np.array([2]))
    found = course(records([(SETTLE + 4, SETTLE + 14), (SETTLE + 30, SETTLE + EVENTS + 7)]), case, EVENTS)
    assert found is not None
    assert (found.alerts, found.found_at, found.open_share, found.named) == (2, 4, 0.5, (True, True))
    assert (found.open_at_end, found.closed_after) == (True, 7)
    never = course(records([]), case, EVENTS)
    assert never is not None
    assert (never.alerts, never.found_at, never.open_at_end) == (0, np.inf, False)
    assert course(records([(SETTLE - 1, SETTLE)]), case, EVENTS) is None  # it was open before
