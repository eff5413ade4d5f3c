"""A sensor of a machine that has a value no more, or stands still, is told of by name; what is often so is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from service import arrow
from service.alerts import Evidence, Transition, advanced, summary
from service.artifact import Feature
from service.backtest import Series, Tally, score
from service.detector import Detector
from service.events import Contributor, Event, Readings, Result
from service.policy import Policy, judge
from service.report import Subject, write
from service.rounds import advance
from service.state import ALERT_OPEN, Rows
from service.stores.memory import MemoryStore
from tests.test_scorer import make
from tests.training.conftest import TINY, random_step
from training.calibrate import calibrate, observe
from training.data import Float32, Stream, clock, cut, pad
from training.detector import DetectorStep
from training.export import manifest_of, publish, to_onnx, training_record
from training.fit import Plan
from training.pipeline import _evaluate, default_job, fit_stillness
from training.stillness import LEAST, NEVER, SPAN, STEPS, Runs, Stillness, longest_runs

NAMES = ("load", "heat", "flaky", "switch")
LOAD, HEAT, FLAKY, SWITCH = range(4)
NORMAL, FAULT, AFTER = 1200, 600, 100
ALPHA = 1e-3


def machine(seed: int, rows: int) -> NDArray[np.float64]:
    """[rows, 4]: two readings, one that three of ten times does not come, and a switch that moves some sixty times in a thousand events."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(rows) / 9)
    flaky = np.where(rng.random(rows) < 0.3, np.nan, rng.normal(size=rows))
    switch = np.cumsum(rng.random(rows) < 0.06) % 2
    return np.stack([50 + 10 * wave + rng.normal(size=rows), 300 + 30 * wave + 3 * rng.normal(size=rows), flaky, switch], axis=1)


def calibrated() -> tuple[DetectorStep, Float32]:
    """A detector of such machines, and the runs in them, which it does not know yet."""
    streams = [
        Stream(f"m{i}", machine(i, 2000).astype(np.float32), clock(1.7e9 + 60 * np.arange(2000, dtype=np.float64))) for i in range(8)
    ]
    torch.manual_seed(0)
    step = DetectorStep(4, TINY, clip=50.0)
    seen = observe(step, *pad(streams, 2000))
    step.calibrate(calibrate(seen, step.signals.burn))
    assert seen.runs is not None
    return step.eval(), seen.runs


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Detector]:
    """Published as `training fit` does: one that knows what runs are usual, and the same before that."""
    step, runs = calibrated()
    made = []
    for version in ("0", "1"):
        if version == "1":
            assert step.stillness is not None
            step.stillness.fit(runs, [len(runs)] * runs.shape[1])
        record = training_record(command="", seed=0, data="", data_sha256="", streams=8, rows=16_000)
        manifest = manifest_of(step, name="machine", version=version, features=[Feature(name=name) for name in NAMES], training=record)
        made.append(Detector.load(publish(step, to_onnx(step), manifest, tmp_path_factory.mktemp("machine"))))
    return made[1], made[0]


def play(detector: Detector, x: NDArray[np.float64], rows: Rows | None = None, start: int = 0) -> tuple[Rows, Rows]:
    """Score x [T, B, F] as the service does, an event a minute; the states and the records [T, B]."""
    T, B, F = x.shape
    rows = detector.codec().fresh(B) if rows is None else rows
    times = 1.7e9 + 60.0 * (start + np.repeat(np.arange(T, dtype=np.float64), B))
    none = np.zeros(T * B, np.uint64)
    readings = Readings([""] * (T * B), x.reshape(T * B, F).astype(np.float32), times, none == 0, none.astype(np.int64) - 1, none)
    policy = Policy(alpha=ALPHA, tau=detector.manifest.age_constant)
    return rows, advance(detector, policy, rows, readings, np.tile(np.arange(B), T)).records.reshape(T, B)


def with_fault(feature: int, kind: str, machines: int = 6) -> NDArray[np.float64]:
    """[NORMAL + FAULT + AFTER, machines, 4]: the feature is missing, or what it was last, from NORMAL on for FAULT events."""
    x = np.stack([machine(100 + i, NORMAL + FAULT + AFTER) for i in range(machines)], axis=1)
    fault = slice(NORMAL, NORMAL + FAULT)
    x[fault, :, feature] = np.nan if kind == "missing" else x[NORMAL - 1, :, feature]
    return x


@pytest.mark.parametrize(
    ("feature", "kind"), [(LOAD, "missing"), (HEAT, "missing"), (FLAKY, "missing"), (LOAD, "frozen"), (HEAT, "frozen")]
)
def test_a_dead_sensor_is_one_alert_that_names_it_and_lasts_as_long_as_it_is_dead(
    detectors: tuple[Detector, Detector], feature: int, kind: str
) -> None:
    _, records = play(detectors[0], with_fault(feature, kind))
    fault = records[NORMAL : NORMAL + FAULT]
    is_open = fault["flags"] & ALERT_OPEN != 0
    told = is_open.argmax(axis=0)
    assert is_open.any(axis=0).all()
    assert told.max() <= 60  # the flaky one is often missing for a while
    assert all(is_open[first:, i].all() for i, first in enumerate(told.tolist()))
    later = fault[100:]
    assert (later["contribution"].argmax(axis=2) == feature).mean() > 0.95
    assert (later["p_value"] < ALPHA).all()
    assert judge(later.ravel()).is_anomaly.all()
    assert (records["flags"][-1] & ALERT_OPEN == 0).all()


async def test_people_are_told_which_sensor_it_is_and_that_it_has_no_value(detectors: tuple[Detector, Detector], tmp_path: Path) -> None:
    several = with_fault(LOAD, "missing")[: NORMAL + 60]
    _, records = play(detectors[0], several)
    opens = (records["onset_p"] < ALPHA) & (records["contribution"][:, :, LOAD] == 1)
    x = several[:, int(opens.any(axis=0).argmax())]  # of some the others are unusual sooner
    values = [{name: None if number != number else number for name, number in zip(NAMES, row, strict=True)} for row in x.tolist()]  # noqa: PLR0124 - NaN
    events = [Event(stream_id="press-4", values=row, timestamp=1.7e9 + 60 * i) for i, row in enumerate(values)]
    scorer = make(detectors[0], MemoryStore(state_ttl=3600, result_ttl=60))
    scorer.start()
    results = [one for one in await scorer.score(events) if isinstance(one, Result)]
    columns = {"stream_id": ["by columns"] * len(x), "timestamp": 1.7e9 + 60 * np.arange(len(x), dtype=np.float64)}
    columns |= {name: pa.array(x[:, j], from_pandas=True) for j, name in enumerate(NAMES)}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns))
    sent = arrow.decode(sink.getvalue().to_pybytes(), max_events=len(x), max_bytes=10**6)
    scored = await scorer.score_columns(sent)
    answers = pa.ipc.open_stream(arrow.encode(scored, NAMES, ("machine", "1"), len(x), top_contributors=10)).read_all()
    assert answers["contributors"].to_pylist() == [[msgspec.structs.asdict(part) for part in one.contributors] for one in results]
    await scorer.drain(5)
    onset = next(one for one in results[NORMAL:] if one.contributors[0].feature == "load" and (one.alert_score or 0) > 1)
    assert onset.contributors[0] == Contributor("load", 1.0, None, onset.expected["load"])
    assert [one.feature for one in results[NORMAL + 1].contributors if one.actual is None] == []  # missing for now, as it may be
    at = float(onset.timestamp)
    alert = advanced(None, Transition("opened", "machine", "press-4", started_at=at, evidence=Evidence.of(onset)), at, 3600)
    assert alert is not None
    assert summary(alert).startswith("load of press-4 has no value since ")

    table = Series("press-4", [str(i) for i in range(len(x))], 1.7e9 + 60 * np.arange(len(x), dtype=np.float64), x.astype(np.float32))
    tally = Tally("press-4")
    policy = Policy(tau=detectors[0].manifest.age_constant)
    score([table], detectors[0], policy, lambda i, first, scored: tally.add(first, scored))
    write(tmp_path / "out.html", Subject("Backtest", "Of a test.", detectors[0], policy), [tally], lambda i: table)
    assert "load 100 %: no value, expected" in (tmp_path / "out.html").read_text()


def test_a_sensor_that_dies_while_another_fault_is_rarer_is_named_beside_it(detectors: tuple[Detector, Detector]) -> None:
    x = with_fault(HEAT, "missing")
    x[NORMAL - 100 : NORMAL + FAULT, :, LOAD] += 3000
    _, records = play(detectors[0], x)
    dead = records[NORMAL + 60 : NORMAL + FAULT]["contribution"]
    assert (dead[:, :, HEAT] > 0.05).all()
    assert (dead[:, :, LOAD] > 0.3).mean() > 0.9
    assert dead.sum(axis=2) == pytest.approx(1, abs=1e-5)
    assert (records[NORMAL - 90 : NORMAL - 1]["contribution"][:, :, HEAT] < 0.05).all()


def test_without_it_neither_is_told(detectors: tuple[Detector, Detector]) -> None:
    _, without = detectors
    for kind in ("missing", "frozen"):
        _, records = play(without, with_fault(LOAD, kind))
        assert (records["flags"][NORMAL : NORMAL + FAULT] & ALERT_OPEN != 0).mean() < 0.5
        if kind == "missing":
            assert (records["contribution"][NORMAL : NORMAL + FAULT, :, LOAD] == 0).all()


def test_what_is_often_missing_or_still_changes_no_false_alarm(detectors: tuple[Detector, Detector]) -> None:
    x = np.stack([machine(200 + i, 3000) for i in range(6)], axis=1)
    (_, told), (_, before) = (play(detector, x) for detector in detectors)
    for name in ("p_value", "onset_p", "contribution"):
        assert np.array_equal(told[name], before[name], equal_nan=True)
    assert np.isnan(x[:, :, FLAKY]).mean() > 0.25


def test_an_accepted_dead_sensor_is_ordinary_until_it_speaks_and_dies_again(detectors: tuple[Detector, Detector]) -> None:
    detector, _ = detectors
    x = with_fault(LOAD, "missing", machines=1)
    rows, _ = play(detector, x[: NORMAL + 300])
    assert Policy().accept(rows)
    rows, after = play(detector, x[NORMAL + 300 : NORMAL + FAULT], rows, NORMAL + 300)
    assert (after["p_value"] >= ALPHA).mean() > 0.95
    assert after["flags"][-1] & ALERT_OPEN == 0
    rows, _ = play(detector, x[NORMAL + FAULT :], rows, NORMAL + FAULT)
    again = np.stack([machine(600, 1400)], axis=1)
    again[:, :, LOAD] = np.nan
    _, dead = play(detector, again, rows, NORMAL + FAULT + AFTER)
    overdue = dead["contribution"][:, 0, LOAD] == 1
    assert overdue.any()  # twice as long as what was accepted
    assert overdue.argmax() > 600


def test_an_absence_that_passed_is_known_the_next_time(detectors: tuple[Detector, Detector]) -> None:
    x = np.stack([machine(300, 2400)], axis=1)
    for start in (1200, 1600, 2000):
        x[start : start + 40, 0, LOAD] = np.nan
    _, records = play(detectors[0], x)
    named = records["contribution"][:, 0, LOAD] == 1
    assert named[1200:1240].any()
    assert not named[1600:].any()


def test_a_feature_that_a_machine_never_had_is_not_missed(detectors: tuple[Detector, Detector]) -> None:
    x = np.stack([machine(400, 1500)], axis=1)
    x[:, :, HEAT] = np.nan
    _, records = play(detectors[0], x)
    assert (records["contribution"][:, :, HEAT] == 0).all()


def test_a_machine_without_any_value_is_told_though_nothing_of_it_can_be_scored(detectors: tuple[Detector, Detector]) -> None:
    x = np.stack([machine(500, NORMAL + 300)], axis=1)
    x[NORMAL:] = np.nan
    _, records = play(detectors[0], x)
    dead = records[NORMAL:, 0]
    assert (dead["flags"][60:] & ALERT_OPEN != 0).all()
    assert (dead["p_value"][60:] < ALPHA).all()
    assert np.isnan(play(detectors[1], x)[1]["p_value"][NORMAL:]).all()


@torch.no_grad()
def test_a_new_stream_that_moves_little_does_not_stand_still() -> None:
    """A stand-by machine: its sensors' noise is a third of a thousandth of what they do in others. The second of them is dead."""
    step = DetectorStep(2, TINY, clip=50.0)
    step.normaliser.floor.fill_(0.1)
    x = 3e-4 * np.random.default_rng(3).normal(size=(600, 8, 2))
    x[150:, :, 1] = x[149, :, 1]
    runs = observe(step, x.astype(np.float32), np.tile(np.array([60, 0, 0], np.float32), (600, 8, 1))).runs
    assert runs is not None
    assert runs[:, :, 0].max() < LEAST
    assert (runs[599, :, 1] >= 450).all()


def test_a_switch_that_nobody_uses_is_quiet_and_what_is_still_once_it_has_moved_is_not(detectors: tuple[Detector, Detector]) -> None:
    rows = NORMAL + FAULT + AFTER
    x = np.stack([machine(300 + i, rows) for i in range(6)], axis=1)
    x[:, :, SWITCH] = 1.0  # of the fleet's others it moves some sixty times in a thousand events
    used = x.copy()
    used[150:300, :, SWITCH] = x[150:300, :, LOAD] > 50
    (_, never), (_, no_runs), (_, once) = play(detectors[0], x), play(detectors[1], x), play(detectors[0], used)
    assert np.array_equal(never["flags"], no_runs["flags"])
    assert np.array_equal(never["p_value"], no_runs["p_value"], equal_nan=True)
    named = once["contribution"].argmax(axis=2)[400:] == SWITCH
    assert (named & (once["flags"][400:] & ALERT_OPEN != 0)).any(axis=0).all()


@torch.no_grad()
def test_runs_are_those_that_a_loop_counts_also_where_learning_is_frozen() -> None:
    step = DetectorStep(2, TINY, clip=50.0)
    still = step.stillness
    assert still is not None
    rng = np.random.default_rng(0)
    x = (np.arange(1500)[:, None, None] * np.array([7, 3]) % 11 - 5).astype(np.float32)  # no two values are nearly the same
    for at in range(150, 1500, 30):
        j = int(rng.integers(2))
        x[at : at + int(rng.integers(1, 30)), 0, j] = np.nan if at % 60 else x[at - 1, 0, j]
    learns = rng.random(1500) > 0.3
    state, run, was, longest = step.fresh_state(1), [0, 0], [0, 0], np.zeros((2, 2))
    last: list[float] = [float("nan")] * 2
    for i in range(len(x)):
        parts = step.layout.split(state)
        may = torch.tensor([bool(learns[i])])
        judged, after = step.judge(parts, torch.from_numpy(x[i]).t(), torch.tensor([[60.0, 0.0, 0.0]]).t(), may)
        state = step.layout.join(parts, {**parts, **after}, judged.event.learns)
        assert judged.runs is not None
        for j in range(2):
            value = float(x[i, 0, j])
            kind = 1 if np.isnan(value) else 2 if value == last[j] and i > 150 else 0
            kind = 0 if kind == 1 and np.isnan(last[j]) else kind
            goes_on = kind != 0 and kind == was[j]
            if not goes_on and learns[i] and was[j]:
                longest[was[j] - 1, j] = max(longest[was[j] - 1, j], run[j])
            run[j], was[j] = (run[j] + 1 if goes_on else int(kind != 0)), kind
            last[j] = last[j] if np.isnan(value) else value
            if i > 150:
                assert (float(judged.runs.length[j, 0]), bool(judged.runs.missing[j, 0])) == (run[j], kind == 1)
    held = step.layout.split(state)["still"][:, 0].abs() // SPAN
    levels = torch.stack([held // STEPS, held % STEPS])
    assert (longest > 5).all()
    assert torch.equal(levels, torch.from_numpy(np.ceil(4 * np.log2(longest + 1) - 0.01)).float())


def test_what_is_usual_is_of_the_fleet_without_the_one_that_is_dead_and_its_rate_of_the_others() -> None:
    runs = np.zeros((1000, 10, 3), np.float32)
    runs[100:900, 0, 0] = -np.arange(1, 801)  # dead in one machine
    for b in range(10):
        runs[500:520, b, 1] = -np.arange(1, 21)  # a gap in each
        runs[:, b, 2] = np.arange(1, 1001)  # never moves
    still = Stillness([True] * 3, 1e4)
    still.fit(runs, [1000] * 10)
    usual = 2 ** (still.usual[:, :, 0] / 4) - 1
    assert usual[0].tolist() == pytest.approx([0, 20, 0], abs=4)
    assert usual[1].tolist() == pytest.approx([0, 0, 1000], rel=0.2)
    rate = still.log_rate[:, :, 0].exp() * 10_000 / 6
    assert rate[0].tolist() == pytest.approx([1.5, 0.5, 0.5], rel=1e-3)  # of the dead one its neighbours say that it is unusual
    assert rate[1].tolist() == pytest.approx([0.5, 0.5, 0.5], rel=1e-3)
    # The others of the fleet move, and are still for a hundred events once: a machine in which it never moved is none in which it died.
    runs[:, :, 2] = 0
    runs[200:300, 1:, 2] = np.arange(1, 101)[:, None]
    runs[:, 0, 2] = np.arange(1000)
    still.fit(runs, [1000] * 10)
    assert still.log_rate[1, 2].exp().item() * 10_000 / 6 == pytest.approx(0.5, rel=1e-3)
    runs[:300, 0, 2], runs[300:, 0, 2] = 0, np.arange(700)
    still.fit(runs, [1000] * 10)
    assert still.log_rate[1, 2].exp().item() * 10_000 / 6 == pytest.approx(1.5, rel=1e-3)
    context = Stillness([True, False, True], 1e4)
    context.fit(runs, [1000] * 10)
    assert (context.usual[:, 1] == NEVER).all()


def test_the_longest_runs_of_a_file_are_those_that_a_loop_counts() -> None:
    rng = np.random.default_rng(1)
    rows, F = 3000, 200  # 1,310 rows a piece
    x = rng.normal(size=(rows, F)).astype(np.float32)
    for j in range(F):
        for start in rng.integers(0, rows - 1, 3):
            length = int(rng.integers(1, rows))
            x[start : start + length, j] = np.nan if rng.random() < 0.5 else x[start, j] + 1e-4 * rng.random(len(x[start : start + length]))
    expected = np.zeros((2, F))
    for j in range(F):
        run, last, ever = [0, 0], np.nan, False
        for value in x[:, j].tolist():
            missing = value != value  # noqa: PLR0124 - NaN
            run = [run[0] + 1 if missing and ever else 0, run[1] + 1 if abs(value - last) <= 1e-3 else 0]
            last, ever = value, ever or not missing
            expected[:, j] = np.maximum(expected[:, j], run)
    assert expected.max(axis=1).min() > 2047
    assert np.array_equal(longest_runs(x, np.full(F, 1e-3)), np.minimum(expected, 2047))


def test_a_night_beyond_the_rows_that_calibration_runs_over_is_usual_too() -> None:
    step = DetectorStep(2, TINY, clip=50.0)
    assert step.stillness is not None
    rng = np.random.default_rng(2)
    observed, streams = np.zeros((400, 3, 2), np.float32), []
    for i in range(3):
        x = rng.normal(size=(2000, 2)).astype(np.float32)
        x[1000:1500, 0] = 7 + 1e-5 * rng.normal(size=500)
        x[1200:1300, 1] = np.nan
        streams.append(Stream(f"m{i}", x, clock(1.7e9 + 60 * np.arange(2000, dtype=np.float64))))
    fit_stillness(step, streams, observed)
    usual = 2 ** (step.stillness.usual[:, :, 0] / 4) - 1
    assert usual[:, 0].tolist() == pytest.approx([0, 500], rel=0.2)
    assert usual[:, 1].tolist() == pytest.approx([100, 0], rel=0.2)
    fit_stillness(step, [cut(stream, 0, 400) for stream in streams], observed)
    assert (step.stillness.usual == 0).all()


def test_the_more_often_it_happened_in_history_the_longer_a_run_must_be() -> None:
    still = Stillness([True, True], 1e4)
    still.usual[:] = 0.0
    still.log_rate[:] = torch.log(torch.tensor([[[1e-4], [1e-2]]] * 2))
    told = [0, 0]
    alpha, learns = torch.tensor([1e-3]), torch.tensor([False])
    for n in range(1, 100):
        length = torch.full((2, 1), float(n))
        missing = torch.ones(2, 1, dtype=torch.bool)
        runs = Runs(length, length.log(), missing, missing, ~missing, (torch.zeros(2, 1), torch.zeros(2, 1)))
        overdue = still.overdue(runs, torch.tensor([True]), learns, alpha)
        for j in range(2):
            told[j] = told[j] or (n if overdue.features[j, 0] > 0 else 0)
        assert bool((overdue.log_p < np.log(1e-3)).all()) == bool(overdue.features.any())
    assert told == [LEAST, 32]  # √10 times as long


def test_one_feature_has_none_of_it() -> None:
    assert random_step(1).stillness is None
    assert "still" not in {slot.name for slot in random_step(1).layout.slots}


def test_the_state_of_a_machine_is_no_larger_for_it() -> None:
    """What the network answered last is told by its own state, so it need not be kept beside it."""
    names = {slot.name: slot.size for slot in random_step(4).layout.slots}
    assert names["still"] == 4
    assert "forecast" not in names


def test_the_end_of_a_file_is_no_machine_whose_sensors_died(detectors: tuple[Detector, Detector]) -> None:
    """A fit measures false onsets on files side by side: what lies behind the end of a shorter one is not of it."""
    ends, seen = (1000, 700), 500
    streams = [
        Stream(f"m{i}", machine(200 + i, rows).astype(np.float32), clock(1.7e9 + 60 * np.arange(rows, dtype=np.float64)))
        for i, rows in enumerate(ends)
    ]
    job = replace(default_job(Plan(), "1", "", lanes=1, length=200), features=list(NAMES), evaluation=streams, counted_from=[seen, seen])
    quality, _ = _evaluate(random_step(len(NAMES)), job, detectors[0].step, Console(quiet=True))
    for row in quality["false_onsets_on_unseen_rows"].values():
        assert row["events"] == sum(ends) - 2 * seen
        assert row["onsets"] == 0
