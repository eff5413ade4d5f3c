"""What bench.kpis does to ordinary readings, and what it counts of alerts and baselines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.kpis import (
    CALM,
    FAMILIES,
    LOOKED_BACK,
    METHODS,
    WINDOW,
    Fault,
    distances,
    faults,
    made,
    main,
    matched,
    raised,
    season_ago,
    sent,
    with_fault,
)

AT, STREAMS = 400, 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fault_is_in_its_readings_alone_and_within_what_the_figure_can_be(name: str) -> None:
    family = FAMILIES[name]
    ordinary = made(family, np.random.default_rng(0), AT + 320, STREAMS)
    again = made(family, np.random.default_rng(0), AT + 320, STREAMS)
    np.testing.assert_array_equal(ordinary.x, again.x)
    assert (ordinary.deviation > 0).all()
    for fault in faults(family):
        x = with_fault(family, fault, ordinary, AT, np.random.default_rng(1))
        assert len(x) == (family.flat if fault.size == 0 else WINDOW)
        assert (x >= family.least).all()
        assert (x <= family.most).all()
        changed = (x != ordinary.x[AT : AT + len(x)]).any(axis=1)
        assert changed.any()
        assert fault.name not in ("spike", "dip") or np.flatnonzero(changed).tolist() == [0]
    np.testing.assert_array_equal(ordinary.x, again.x)


def test_a_spike_is_of_so_many_deviations_and_a_counter_that_jumped_stays_there() -> None:
    noise, counter = FAMILIES["noise"], FAMILIES["counter"]
    readings = made(noise, np.random.default_rng(0), AT + WINDOW, 1)
    np.testing.assert_allclose(with_fault(noise, Fault("spike", 6), readings, AT, np.random.default_rng(1))[0] - readings.x[AT], 6 * 2.0)
    counts = made(counter, np.random.default_rng(0), AT + WINDOW, 1)
    jumped = with_fault(counter, Fault("shift", 6), counts, AT, np.random.default_rng(1)) - counts.x[AT : AT + WINDOW]
    assert np.ptp(jumped) == 0
    assert (np.diff(with_fault(counter, Fault("stands still"), counts, AT, np.random.default_rng(1)), axis=0) == 0).all()


def test_distances_know_only_what_came_before() -> None:
    x = np.random.default_rng(0).normal(size=(300, 2))
    whole = distances(x)
    np.testing.assert_array_equal(whole[:200], distances(x[:200]))
    before = x[LOOKED_BACK - 7 : 2 * LOOKED_BACK - 7, 1]
    spread = np.median(np.abs(before - np.median(before)))
    assert whole[2 * LOOKED_BACK - 7, 1] == pytest.approx(abs(x[2 * LOOKED_BACK - 7, 1] - np.median(before)) / spread)
    assert (whole[:LOOKED_BACK] == 0).all()
    still = np.zeros((LOOKED_BACK + 2, 1))
    still[-1] = 1
    assert distances(still)[-2, 0] == 0 < distances(still)[-1, 0]


def test_a_season_that_repeats_is_no_distance_and_one_that_is_missing_is() -> None:
    x = np.tile(np.arange(7.0), 40)[:, None] + np.random.default_rng(0).normal(0, 0.1, (280, 1))
    x[-1] = 3.0
    far = season_ago(x, 7)
    assert far[-1, 0] > 4 * far[:-1].max()


def test_a_ratio_knows_the_reading_so_many_before() -> None:
    family = replace(FAMILIES["daily orders"], ago=2)
    ratio = sent(family, np.array([[2.0], [4.0], [3.0], [0.0], [3.0]]))
    np.testing.assert_array_equal(ratio, [[np.nan], [np.nan], [1.5], [0.0], [1.0]])
    assert sent(FAMILIES["daily orders"], ratio) is ratio


def test_alerts_end_after_calm_readings_and_the_threshold_brings_no_more_of_them_than_asked() -> None:
    far = np.zeros((100, 1))
    far[[10, 12, 12 + CALM, 13 + 2 * CALM, 60], 0] = (5, 4, 4, 3, 2)
    assert [raised(far, level) for level in (4.5, 3.5, 2.5, 1.5)] == [1, 1, 2, 3]
    assert matched(far, 2) == 2
    assert matched(far, 1) == 3
    assert matched(far, 0) == 5


def test_it_runs_and_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(streams=40, alpha=1e-3, accept_after=0, seed=0, quick=True, json_file=tmp_path / "kpis.json")
    written = json.loads((tmp_path / "kpis.json").read_text())
    assert {one["family"] for one in written["families"]} == set(FAMILIES) - {"hourly revenue ÷ a week ago"}  # 150 hours are less
    assert all(set(shares) == set(METHODS) for one in written["families"] for shares in one["found"].values())
    assert "Ordinary readings" in capsys.readouterr().out
