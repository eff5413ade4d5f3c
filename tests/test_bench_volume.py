"""What bench.volume does to counts of lines, and what it counts of alerts and of the rules beside them."""

from __future__ import annotations

import numpy as np
import pytest

from bench.kpis import CALM
from bench.volume import (
    DAY,
    HOUR,
    INCIDENTS,
    KINDS,
    LEARNED,
    ROWS,
    WEEK,
    Copy,
    Incident,
    Kind,
    copies,
    figures,
    last_week,
    opened,
    share,
    simple,
    usual,
    with_incident,
    z,
)


def test_streams_do_by_day_seven_times_as_much_as_by_night_and_half_at_weekends() -> None:
    mean = usual(Kind("", 60, 6000), np.random.default_rng(0), 3)
    np.testing.assert_allclose(HOUR * mean[:DAY].mean(axis=0), [60, 600, 6000])
    assert (mean[:DAY].max(axis=0) / mean[:DAY].min(axis=0)).tolist() == pytest.approx([7, 7, 7], rel=1e-3)
    np.testing.assert_allclose(mean[5 * DAY : 6 * DAY], mean[:DAY] / 2)


def test_an_incident_takes_its_part_of_each_count() -> None:
    part = share(INCIDENTS[0], 300 * LEARNED + 60)
    touched = np.flatnonzero(part)
    assert touched.tolist() == [LEARNED, LEARNED + 1, LEARNED + 2]
    np.testing.assert_allclose(part[touched], [0.8, 1, 0.2])


@pytest.mark.parametrize("incident", INCIDENTS, ids=lambda one: one.name)
def test_it_changes_the_number_of_lines_as_its_name_says(incident: Incident) -> None:
    mean, rng = np.full(ROWS, 10_000.0), np.random.default_rng(0)
    bursts = rng.poisson(mean)
    whole = share(incident, 300 * LEARNED) == 1
    x = with_incident(incident, 300 * LEARNED, bursts, mean, rng)
    assert x[whole].mean() / 10_000 == pytest.approx(incident.times, rel=0.05)
    np.testing.assert_array_equal(x[~whole], bursts[~whole])


def test_copies_differ_from_the_quiet_one_in_their_window_alone() -> None:
    every = copies(KINDS[2], np.random.default_rng(0), 2)
    assert [one.incident for one in every] == [None, *INCIDENTS] * 2
    for quiet, *others in (every[:6], every[6:]):
        assert (quiet.counts % 8 == 0).all()
        for one in others:
            changed = np.flatnonzero(one.counts != quiet.counts[: len(one.counts)])
            assert LEARNED <= one.window[0] <= changed[0]
            assert set(changed.tolist()) <= set(one.window)
            assert len(one.counts) == one.window.stop


def test_an_alert_opens_once_and_ends_after_calm_counts() -> None:
    over = np.zeros(100, bool)
    over[[0, 2, 2 + CALM, 3 + 2 * CALM, 60]] = True
    assert opened(over).tolist() == [0, 3 + 2 * CALM, 60]


def test_the_rule_holds_an_hour_against_the_same_a_week_before() -> None:
    counts = np.tile(np.arange(10, 10 + WEEK), 3)
    assert not last_week(counts).any()
    counts[LEARNED : LEARNED + HOUR] *= 4
    counts[LEARNED + 100 : LEARNED + 100 + HOUR] //= 4
    over = np.flatnonzero(last_week(counts))
    assert LEARNED + HOUR - 1 in over
    assert LEARNED + 100 + HOUR - 1 in over
    assert set(over) <= set(range(LEARNED, LEARNED + 100 + 2 * HOUR))


def test_z_knows_the_day_before_and_its_threshold_the_weeks_learned_from() -> None:
    counts = np.random.default_rng(0).poisson(50.0, ROWS)
    far = z(counts)
    np.testing.assert_array_equal(far[:700], z(counts[:700]))
    day = counts[700 - DAY : 700]
    assert far[700] == pytest.approx(abs(counts[700] - day.mean()) / day.std())
    judged = dict(simple([Copy(0, counts)], 1 / 2016, np.random.default_rng(1)))
    assert (judged["z"][0] < LEARNED).sum() == 2
    later = counts.copy()
    later[LEARNED:] *= 3
    np.testing.assert_array_equal(judged["z"][0][:2], dict(simple([Copy(0, later)], 1 / 2016, np.random.default_rng(1)))["z"][0][:2])


def test_found_is_what_opens_in_the_window_and_by_chance_what_does_so_anyway() -> None:
    none = np.zeros(ROWS, np.int64)
    window = range(LEARNED + 10, LEARNED + 20)
    every = [Copy(0, none), *(Copy(0, none, incident, window) for incident in INCIDENTS[:3])]
    quiet = np.array([LEARNED - 1, LEARNED, LEARNED + 19])
    opens = [quiet, np.array([LEARNED + 10]), np.array([LEARNED + 9, LEARNED + 20]), np.array([], np.int64)]
    row = figures("k", "j", every, opens, 1 / 2016)
    assert row.quiet == pytest.approx(2)
    assert list(row.found.values()) == [1, 0, 0, 0, 0]
    assert list(row.by_chance.values()) == [1, 1, 1, 0, 0]
