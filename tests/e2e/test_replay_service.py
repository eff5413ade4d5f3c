"""The same numbers everywhere: what the service answers to a replayed file is what the backtest writes, to the last bit."""

from __future__ import annotations

import io
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console

from service import backtest, log_backtest
from service.asking import SHIPPED_MODELS
from service.detector import Detector
from service.log_files import LogFormat
from service.policy import Policy
from service.replay import Options, run
from service.tables import ReadOptions
from tests import local
from tests.e2e.process import Service
from tests.test_backtest import rows_of
from tests.tiny import build_tiny
from tests.tiny_log import build_tiny_log

UNSORTED = ReadOptions(unsorted=True)
SCORES = ("anomaly_score", "alert_score", "p_value")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("model"), features=("flow", "pressure"), name="pump")


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    with Service(tmp_path / "service", model=model) as running:
        yield running


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Two files with gaps, missing numbers, equal timestamps, rows out of order and a label that must not be sent; and one without rows."""
    folder = tmp_path / "recorded"
    (folder / "hall").mkdir(parents=True)
    (folder / "idle.csv").write_text("timestamp,flow,pressure,anomaly\n")
    rng = np.random.default_rng(5)
    for name, rows in (("a.csv", 300), ("hall/b.csv", 120)):
        seconds = 1.6e9 + np.cumsum(rng.choice([0, 0.5, 1, 60, -3], rows, p=[0.05, 0.3, 0.6, 0.04, 0.01]))
        values = rng.normal(10, 1, (rows, 2))
        values[rows // 2 : rows // 2 + 5] += 25
        lines = [
            f"{t!r},{x!r},{'' if rng.random() < 0.05 else repr(y)},1" for t, (x, y) in zip(seconds.tolist(), values.tolist(), strict=True)
        ]
        (folder / name).write_text("\n".join(["timestamp,flow,pressure,anomaly", *lines]) + "\n")
    return folder


def backtested(recorded: Path, model: Path, out: Path) -> dict[str, list[dict[str, str]]]:
    """Stream → the backtest's rows."""
    detector = Detector.load(model)
    backtest.run([recorded], detector, Policy(tau=detector.manifest.age_constant), out, UNSORTED, Console(file=io.StringIO()))
    return {str(path.relative_to(out).with_suffix("")): rows_of(path) for path in out.rglob("*.csv")}


def served(values: dict[str, Any] | dict[str, str]) -> tuple[float, ...]:
    """Scores as the backtest writes them: finite."""
    default = {"anomaly_score": 0.0, "alert_score": 0.0, "p_value": 1.0}
    return tuple(default[name] if values[name] in (None, "") else float(values[name]) for name in SCORES)


def replayed(service: Service, recorded: Path, out: Path, batch: int) -> dict[str, list[dict[str, str]]]:
    """Stream → the replies in order, as `replay --out` writes them."""
    options = Options(service.url, speed=math.inf, batch=batch, patience=60)
    run([recorded], options, UNSORTED, out, Console(file=io.StringIO()))
    streams: dict[str, list[dict[str, str]]] = {}
    for row in rows_of(out):
        streams.setdefault(row["stream_id"], []).append(row)
    return streams


def assert_same(got: dict[str, list[dict[str, str]]], want: dict[str, list[dict[str, str]]]) -> None:
    assert got.keys() == want.keys()
    for stream, rows in want.items():
        assert [served(row) for row in got[stream]] == [served(row) for row in rows]
        assert [row["is_anomaly"] for row in got[stream]] == [row["is_anomaly"] for row in rows]
        for name in ("flow_expected", "pressure_expected"):
            assert [row[name] for row in got[stream]] == [row[name] for row in rows]
    assert any(row["is_anomaly"] == "true" for rows in want.values() for row in rows)


def test_a_replayed_file_is_answered_with_the_numbers_of_the_backtest(
    service: Service, recorded: Path, model: Path, tmp_path: Path
) -> None:
    want = backtested(recorded, model, tmp_path / "scores")
    assert_same(replayed(service, recorded, tmp_path / "replies.csv", batch=64), want)


def test_the_backtest_counts_the_alerts_that_the_service_opens(service: Service, model: Path, tmp_path: Path) -> None:
    """Of anomalies that grow: each has several onsets, and opens one alert."""
    growing, rng = tmp_path / "growing", np.random.default_rng(5)
    growing.mkdir()
    for name, faults in (("a", [150, 220]), ("b", [60])):
        values = rng.normal(10, 1, (300, 2))
        for at in faults:
            values[at : at + 8] += np.array([5, 6, 8, 12, 20, 30, 45, 60])[:, None]
        rows = (f"{1.6e9 + i!r},{x!r},{y!r}" for i, (x, y) in enumerate(values.tolist()))
        (growing / f"{name}.csv").write_text("\n".join(["timestamp,flow,pressure", *rows, ""]))
    detector = Detector.load(model)
    policy = Policy(tau=detector.manifest.age_constant)
    tallies = backtest.run([growing], detector, policy, tmp_path / "out", UNSORTED, Console(file=io.StringIO())).tallies
    assert all(tally.onsets > tally.alerts == len(tally.alert_rows) > 0 for tally in tallies)
    want = {tally.name.removesuffix(".csv"): tally.alerts for tally in tallies}
    replayed(service, growing, tmp_path / "replies.csv", batch=64)
    for _ in range(100):
        alerts = httpx.get(f"{service.url}/v1/alerts", params={"limit": 1000}).raise_for_status().json()["alerts"]
        opened = Counter(alert["stream_id"] for alert in alerts if alert["kind"] == "anomaly")
        if opened == want:
            break
        time.sleep(0.2)
    assert opened == want


def test_numbers_do_not_depend_on_how_events_are_cut_into_requests(service: Service, recorded: Path, model: Path, tmp_path: Path) -> None:
    want = backtested(recorded, model, tmp_path / "scores")
    rng = random.Random(3)
    for stream, rows in want.items():
        sent = rows_of(recorded / f"{stream}.csv")
        events = [
            {
                "timestamp": float(row["timestamp"]),
                "values": {name: float(row[name]) if row[name] else None for name in ("flow", "pressure")},
            }
            for row in sent
        ]
        got: list[dict[str, Any]] = []
        with httpx.Client(base_url=service.url) as client:
            while events:
                part, events = events[: (size := rng.choice([1, 1, 2, 3, 7, 40]))], events[size:]
                answer = client.post(f"/v1/streams/sliced:{stream}/events", content=json.dumps(part)).raise_for_status()
                got += answer.json()
        assert [served(reply) for reply in got] == [served(row) for row in rows]
        assert [json.dumps(reply["is_anomaly"]) for reply in got] == [row["is_anomaly"] for row in rows]


def test_the_shipped_detector_gives_the_same_numbers_live_and_in_the_backtest(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    values = 20 + 5 * np.sin(np.arange(600) / 20) + rng.normal(0, 0.3, 600)
    values[450:455] = 60
    lines = [f"2026-03-0{1 + i // 288}T{i % 288 // 12:02}:{i % 12 * 5:02}:00Z,{value!r}" for i, value in enumerate(values.tolist())]
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded/x.csv").write_text("\n".join(["timestamp,value", *lines]) + "\n")
    want = backtested(tmp_path / "recorded", next(SHIPPED_MODELS.glob("*.onnx")), tmp_path / "scores")["x"]
    with Service(tmp_path / "service") as running:
        got = replayed(running, tmp_path / "recorded", tmp_path / "replies.csv", batch=37)["x"]
    assert [served(row) for row in got] == [served(row) for row in want]
    assert [row["value_expected"] for row in got] == [row["value_expected"] for row in want]
    assert float(want[450]["alert_score"]) > 1


def test_a_service_killed_during_a_replay_costs_nothing(service: Service, recorded: Path, model: Path, tmp_path: Path) -> None:
    want = backtested(recorded, model, tmp_path / "scores")
    over = threading.Event()
    kills = 0

    def killing() -> None:
        nonlocal kills
        while kills < 3 and not over.wait(0.15):
            service.kill()
            kills += 1
            service.start()

    killer = threading.Thread(target=killing)
    killer.start()
    try:
        got = replayed(service, recorded, tmp_path / "replies.csv", batch=2)
    finally:
        over.set()
        killer.join()
    assert kills > 0
    assert_same(got, want)


def test_a_replay_of_what_was_replayed_before_scores_nothing_again(service: Service, recorded: Path, tmp_path: Path) -> None:
    first = replayed(service, recorded, tmp_path / "first.csv", batch=50)
    again = replayed(service, recorded, tmp_path / "again.csv", batch=50)
    versions = {one["stream_id"]: one["state_version"] for one in local.get(f"{service.url}/v1/streams").json()["streams"]}
    for stream, rows in first.items():
        assert versions[stream] == sum(row["late"] == "false" for row in rows)
        assert all(row["duplicate"] == "true" or row["late"] == "true" for row in again[stream])


def test_features_that_the_model_does_not_know_end_a_replay_with_what_to_do(service: Service, tmp_path: Path) -> None:
    from service.errors import TableError

    (tmp_path / "x.csv").write_text("timestamp,speed,torque\n1,2,3\n")
    with pytest.raises(TableError, match="'speed', 'torque', the model the features 'flow', 'pressure'"):
        run([tmp_path / "x.csv"], Options(service.url), UNSORTED, console=Console(file=io.StringIO()))


def test_a_log_file_is_served_as_it_is_backtested_ends_of_sessions_included(tmp_path: Path) -> None:
    header, stream = r"(\d{4}-\d\d-\d\d \S+) \[\S+\] ", r"\[(req-\d+)\]"
    model = build_tiny_log(tmp_path, header=header, session_seconds=60.0)
    log, rng = tmp_path / "app.log", np.random.default_rng(0)
    said = ["Accepted connection from 10.0.0.7:4711", "Took 12.5 ms for /a", "Closed connection from 10.0.0.7:4711", "Disk is on fire"]
    seconds = 1.6e9 + np.cumsum(rng.choice([0.0, 1.0, 30.0], 400))
    with log.open("w") as file:
        for at in seconds.tolist():
            moment = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{moment} [req-{rng.integers(9)}] {said[rng.choice(4, p=[0.3, 0.5, 0.18, 0.02])]}\n")
    format_ = LogFormat(time="%Y-%m-%d %H:%M:%S", stream=stream)
    log_backtest.run([log], Detector.load(model), Policy(), tmp_path / "out", format_)
    with Service(tmp_path / "service", model=model) as service:
        options = Options(service.url, speed=math.inf, batch=64)
        for again in (False, True):
            reports = run([log], options, UNSORTED, tmp_path / f"{again}.csv", Console(file=io.StringIO()), format_)
            assert not any(report.refused for report in reports.values())
            assert all(report.duplicates + report.late == again * report.events for report in reports.values())
    wanted = by_stream_of(tmp_path / "out" / "lines.csv")
    assert by_stream_of(tmp_path / "False.csv") == wanted
    assert sum(row[3] == "(end of session)" for rows in wanted.values() for row in rows) > 20


def by_stream_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Stream → scores, template, likeliest line, its chance and the line of each row."""
    streams: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows_of(path):
        said = (row["template"], row["likeliest"], float(row["chance"] or "nan"), row["line"])
        streams.setdefault(row["stream_id"], []).append((*served(row), *said))
    return streams
