"""bench.logs: what its simple rows report, and how F1 is weighted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.host_logs import DAY, FIRST, GROUPS, HOSTS, Incident, lines_of
from bench.logs import NEVER, Case, event_and_length, event_length_counts, load, row, two_grams

TRAIN = "1 2 3\n1 2 2 3\n" * 40
NORMAL = "1 2 3\n1 2 2 3\n"
ABNORMAL = "1 9 3\n1 2\n1 2 2 2 2 3\n1 3 2\n1 3 3 2\n"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    folder = tmp_path / "openstack"
    folder.mkdir()
    for name, content in (("train", TRAIN), ("test_normal", NORMAL), ("test_abnormal", ABNORMAL)):
        (folder / f"{name}.txt").write_text(content)
    return load("openstack", tmp_path, 1, 1)


def test_the_asked_rate_follows_from_the_training_sessions_alone(case: Case) -> None:
    assert case.asked == 1 / 80
    assert case.alpha == pytest.approx(1 / 80 / 4.5)


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (two_grams, [1, 2, NEVER, 1, 1]),
        (event_and_length, [1, 2, 4, NEVER, NEVER]),
        (event_length_counts, [1, 2, 4, NEVER, 4]),
    ],
)
def test_each_simple_row_reports_a_session_where_it_becomes_odd(case: Case, method: object, found: list[int]) -> None:
    assert callable(method)
    normal, abnormal = method(case, 0)
    assert (normal == NEVER).all()
    assert abnormal.tolist() == found


def test_f1_counts_the_sessions_of_the_real_test_set_where_a_part_of_them_is_here(case: Case) -> None:
    found = np.array([0, NEVER]), np.array([0, 0, 0, 0, NEVER])
    here = row(case, "x", 0, found)
    assert (here.tpr, here.fpr) == (0.8, 0.5)
    assert here.f1 == pytest.approx(200 * 4 / (4 + 1 + 5))
    real = row(replace(case, name="hdfs"), "x", 0, found)
    assert real.f1 == pytest.approx(200 * 0.8 * 16_838 / (0.8 * 16_838 + 0.5 * 553_366 + 16_838))


def test_an_incident_changes_what_its_host_says_in_its_time_and_nothing_else() -> None:
    usual = lines_of(3, FIRST, ())
    assert {host for _, host, _ in usual} == set(HOSTS)
    start = FIRST + 3 * DAY
    more = {"bursts": "sudo", "single": "OOM", "missing": "heartbeat (1 min)", "volume": "ten times"}
    assert more.keys() == set(GROUPS)
    for group, kind in more.items():
        changed = lines_of(3, FIRST, [Incident(group, kind, "app", start, start + 600)])
        differ = set(usual) ^ set(changed)
        assert {host for _, host, _ in differ} == {"app"}
        assert all(start <= t < start + 610 for t, _, _ in differ)
        assert (len(changed) < len(usual)) == (group == "missing")
