"""bench.quality: metrics against published implementations' values, protocols, and a whole run on a set made here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from bench import quality
from bench.baselines import BASELINES, Answer, Lanes, normalise, threshold
from bench.metrics import Bool, Float64, Named, alarms, blamed, delays, f1, vus_pr, vus_window
from bench.sets import Case, DataSet, load
from training.faults import average_precision


def ranked(seed: int, rows: int, runs: list[tuple[int, int]], tied: bool, shift: float) -> tuple[Float64, Bool]:
    rng, label = np.random.default_rng(seed), np.zeros(rows, bool)
    for start, stop in runs:
        label[start:stop] = True
    score = rng.random(rows) + shift * label
    return (np.round(score, 2) if tied else score), label


# Computed with an implementation that equals tsb-ad's get_metrics to 1e-12, and with scikit-learn's average_precision_score.
KNOWN = [
    ((0, 500, [(100, 120), (300, 301)], False, 0.3), 20, 0.5317014519147736, 0.4745613215012379),
    ((1, 2000, [(0, 30), (40, 60), (1990, 2000)], False, 0.5), 50, 0.625688667715247, 0.6143648565142098),
    ((2, 1000, [(10, 400)], True, 0.1), 125, 0.5492581071971506, 0.523935144617357),
    ((3, 3000, [(5, 6), (50, 55), (62, 64), (2000, 2200)], True, 0.2), 7, 0.21384911663752496, 0.30128987693078635),
]


@pytest.mark.parametrize(("made_by", "window", "vus", "area"), KNOWN)
def test_areas_are_those_of_tsb_ad_and_scikit_learn(
    made_by: tuple[int, int, list[tuple[int, int]], bool, float], window: int, vus: float, area: float
) -> None:
    score, label = ranked(*made_by)
    assert vus_pr(score, label, window) == pytest.approx(vus, abs=1e-12)
    assert average_precision(score, label) == pytest.approx(area, abs=1e-12)


def test_a_perfect_ranking_has_area_one_and_a_constant_one_the_share_of_anomalies() -> None:
    label = np.zeros(1000, bool)
    label[400:500] = True
    assert average_precision(label.astype(float), label) == 1
    assert average_precision(np.ones(1000), label) == pytest.approx(0.1)
    assert vus_pr(label.astype(float), label, 0) == pytest.approx(1)


def test_the_window_is_the_period_and_125_where_there_is_none() -> None:
    assert vus_window(np.sin(2 * np.pi * np.arange(4000) / 40)) == 40
    assert vus_window(np.ones(4000)) == 125
    assert vus_window(np.arange(300, dtype=float)) == 125


def test_an_alarm_begins_after_ten_rows_without_a_flag() -> None:
    flagged = np.zeros(60, bool)
    flagged[[0, 10, 20, 31, 32, 50]] = True
    assert np.flatnonzero(alarms(flagged)).tolist() == [0, 31, 50]


def test_delays_count_from_a_segments_start_and_a_flag_outside_finds_nothing() -> None:
    flagged, label = np.zeros(100, bool), np.zeros(100, bool)
    label[10:20] = label[40:50] = label[99] = True
    flagged[[9, 13, 50, 99]] = True
    assert delays(flagged, label) == [3, None, 0]
    assert f1(flagged, label) == pytest.approx(2 * 2 / (4 + 21))


def test_blame_looks_at_flagged_rows_of_found_anomalies_alone() -> None:
    contribution = np.full((30, 4), 0.25, np.float32)
    contribution[5] = (0.1, 0.7, 0.1, 0.1)
    contribution[6] = (0.9, 0.0, 0.1, 0.0)  # not flagged
    flagged = np.zeros(30, bool)
    flagged[5] = True
    anomalies = [Named(4, 8, frozenset({1, 2})), Named(20, 25, frozenset({0}))]
    assert blamed(contribution, flagged, anomalies) == [(True, 0.5)]


# ── baselines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def made_set(rows: int = 1400, fit: int = 700) -> DataSet:
    """Two streams of three correlated features; in each, feature 1 leaves the others for 40 rows."""
    rng, cases = np.random.default_rng(0), []
    for number in range(2):
        wave = np.sin(2 * np.pi * np.arange(rows) / 50)[:, None] * (1.0, 0.5, -0.8) + 0.05 * rng.normal(size=(rows, 3))
        label = np.zeros(rows, bool)
        label[1000:1040] = True
        wave[label, 1] += 2.0
        named = (Named(1000 - fit, 1040 - fit, frozenset({1})),)
        cases.append(
            Case(f"s{number}", wave.astype(np.float32), 60.0 * np.arange(rows, dtype=np.float64), label, fit, fit, 50, named=named)
        )
    return DataSet("made", cases)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "HalfSpaceTrees"])
def test_no_baseline_looks_ahead(name: str) -> None:
    data = made_set()
    cut = 1010
    short = replace(
        data, cases=[replace(one, x=one.x[:cut], seconds=one.seconds[:cut], anomalous=one.anomalous[:cut]) for one in data.cases]
    )
    for whole, part in zip(BASELINES[name](data, 0), BASELINES[name](short, 0), strict=True):
        n = len(part.score)
        if name != "random":
            np.testing.assert_allclose(whole.score[:n], part.score, rtol=1e-9)
            assert (whole.flagged[:n] == part.flagged).all()


def test_no_baseline_reads_a_label_and_the_linear_one_finds_what_leaves_its_neighbours() -> None:
    data = made_set()
    blind = replace(data, cases=[replace(case, anomalous=np.zeros_like(case.anomalous)) for case in data.cases])
    for name in ("VAR + PCA", "EW level", "|z|"):
        for seen, unseen in zip(BASELINES[name](data, 0), BASELINES[name](blind, 0), strict=True):
            np.testing.assert_array_equal(seen.score, unseen.score)
    row = quality.measure(data, "VAR + PCA", 0, BASELINES["VAR + PCA"](data, 0))
    assert row.auc_pr > 0.9
    assert row.found == 1
    assert row.blamed == 1
    assert row.blamed_by_chance == pytest.approx(1 / 3)


def test_the_threshold_is_the_quantile_of_the_settled_history() -> None:
    history = np.r_[np.full(100, 1e6), np.arange(1000, dtype=float)]
    assert threshold(history) == pytest.approx(998.001)


def test_a_missing_value_scores_zero_and_teaches_nothing() -> None:
    data = made_set()
    lanes = Lanes.of(data)
    x = lanes.x.copy()
    x[500, 0, 0] = np.nan
    with_gap, without = normalise(x, lanes.floor(), 2000, 50), normalise(lanes.x, lanes.floor(), 2000, 50)
    assert with_gap[500, 0, 0] == 0
    np.testing.assert_array_equal(with_gap[:, 1], without[:, 1])
    assert np.isfinite(with_gap).all()


def test_streams_in_different_units_share_no_floor() -> None:
    data = replace(made_set(), alike=False)
    loud = replace(data, cases=[data.cases[0], replace(data.cases[1], x=data.cases[1].x * np.float32(2.0**20))])
    quiet_z, loud_z = (normalise(lanes.x, lanes.floor(), 2000, 50) for lanes in (Lanes.of(data), Lanes.of(loud)))
    np.testing.assert_allclose(quiet_z, loud_z, atol=1e-4)


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_false_alarms_are_counted_for_a_stream_and_day_on_unlabelled_rows() -> None:
    data = made_set()
    answers = []
    for case in data.cases:
        flagged = np.zeros(len(case.label), bool)
        flagged[[50, 100, 305]] = True  # the last is inside the anomaly
        answers.append(Answer(flagged.astype(float), flagged, alarms(flagged)))
    row = quality.measure(data, "made", 0, answers)
    days = (700 - 40) * 60 / 86_400
    assert (row.false_alarms, row.segments, row.found, row.delay) == (4, 2, 1, 5)
    assert row.false_alarms_per_day == pytest.approx(2 / days)
    assert row.false_rows == pytest.approx(2 / 660)


# ── a whole run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_asd(folder: Path) -> None:
    """`made_set` in ASD's format, features counted from 1, end rows inclusive."""
    (folder / "asd").mkdir(parents=True)
    for case in made_set().cases:
        path = folder / "asd" / f"{case.name}.npz"
        np.savez(path, train=case.x[: case.fit], test=case.x[case.fit :], test_label=case.label.astype(np.uint8))
        path.with_suffix(".interpretation.txt").write_text("300-339:2\n")


def test_a_set_is_read_with_its_protocol(tmp_path: Path) -> None:
    write_asd(tmp_path)
    data, made = load("asd", tmp_path), made_set()
    for read, case in zip(data.cases, made.cases, strict=True):
        np.testing.assert_array_equal(read.x, case.x)
        np.testing.assert_array_equal(read.anomalous, case.anomalous)
        assert (read.fit, read.scored, read.named) == (700, 700, case.named)


def test_a_run_prints_its_tables_and_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    write_asd(tmp_path / "data")
    app, figures = Typer(), tmp_path / "figures.json"
    app.command()(quality.main)
    arguments = ["--data", str(tmp_path / "data"), "--sets", "asd", "--detectors", "without,PCA,random", "--steps", "8"]
    arguments += ["--out", str(tmp_path / "out"), "--json", str(figures)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    for name in ("without LSTM", "VAR + PCA", "random"):
        assert name in first.output
    rows = {row["detector"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows["VAR + PCA"]["auc_pr"] > 0.9 > rows["random"]["auc_pr"]
    assert rows["without LSTM"]["auc_pr"] > 2 * rows["random"]["auc_pr"]

    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/models").rglob("*.onnx")}
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/results").iterdir()}
    lost = next(path for path in results if "without" in path.name)
    lost.unlink()
    kept = CliRunner().invoke(app, [*arguments, "--kept"])
    assert kept.exit_code == 0, kept.output
    assert {row["detector"] for row in json.loads(figures.read_text())["rows"]} == {"VAR + PCA", "random"}
    assert not lost.exists()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/results").iterdir()}
    assert again.keys() == results.keys()
    assert {path for path in again if again[path] != results[path]} == {lost}
    assert len(models) == 1
    assert models == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/models").rglob("*.onnx")}


def test_seed_by_seed_so_that_an_interruption_leaves_whole_seeds(tmp_path: Path) -> None:
    write_asd(tmp_path / "data")
    app, figures = Typer(), tmp_path / "figures.json"
    app.command()(quality.main)
    arguments = ["--data", str(tmp_path / "data"), "--sets", "asd", "--detectors", "random,always", "--seeds", "3"]
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--json", str(figures)]).exit_code == 0
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["detector"], row["seed"]) for row in rows] == [("random", 0), ("always 1", 0), ("random", 1), ("random", 2)]


def test_a_fit_that_fails_is_said_and_costs_no_other_result(tmp_path: Path) -> None:
    (tmp_path / "data/asd").mkdir(parents=True)
    for case in made_set(rows=1060, fit=40).cases:  # too short to train on
        label = case.anomalous[40:].astype(np.uint8)
        np.savez(tmp_path / f"data/asd/{case.name}.npz", train=case.x[:40], test=case.x[40:], test_label=label)
    app = Typer()
    app.command()(quality.main)
    arguments = ["--data", str(tmp_path / "data"), "--sets", "asd", "--detectors", "detector,random", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "asd: detector, seed 0: `training fit` ended with 1" in result.output
    assert "random" in result.output


def test_an_unknown_set_is_refused_by_name() -> None:
    app = Typer()
    app.command()(quality.main)
    result = CliRunner().invoke(app, ["--sets", "smd,nothing"])
    assert result.exit_code == 2
    assert "nothing" in result.output
