"""Parts of the demo; the whole minute is in e2e/test_demo.py."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from service.demo import (
    BURST_MEMORY_BYTES,
    BURST_MEMORY_SHARE,
    MIN_SECONDS,
    MUST_SEE,
    RATE,
    Board,
    Disturbance,
    Gauge,
    Phases,
    Sampler,
    gauges,
    run,
    verdict,
)
from tests.times import wait


def result(*, alert: float | None = 0.0, status: str = "ready") -> dict[str, Any]:
    return {
        "status": status,
        "samples_until_ready": 0,
        "anomaly_score": alert,
        "alert_score": alert,
        "p_value": None if alert is None else 10 ** (-3 * alert),
        "is_anomaly": bool(alert and alert > 1),
        "threshold": 1.0,
        "expected": {"value": 5.0},
        "lower": {"value": 4.0},
        "upper": {"value": None},
        "contributors": [{"feature": "value", "contribution": 1.0, "actual": 50.0, "expected": 5.0}],
    }


def board(**alerts: float) -> tuple[Board, Phases]:
    """A board of three streams; `alerts`: stream → second of its onset, out of 60."""
    phases = Phases.of(60)
    names = ("cpu", "disk-write", "memory", "network")
    shown = Board([Gauge(f"this-machine/{name}", "%", lambda: 1.0) for name in names], phases, "http://x")
    for tick in range(60):
        for name in names:
            onset = alerts.get(name.replace("-", "_")) == tick
            shown.tracks[f"this-machine/{name}"].see(float(tick), 5.0, result(alert=1.7 if onset else 0.1))
    shown.latencies = [0.002] * 60
    return shown, phases


def judged(shown: Board, phases: Phases) -> tuple[int, str]:
    output = io.StringIO()
    return verdict(shown, phases, Console(file=output, width=200)), output.getvalue()


def test_the_disturbance_comes_after_a_third_yet_not_before_it_is_judged_and_leaves_time_to_see_its_end() -> None:
    for total in (MIN_SECONDS, 60.0, 300.0):
        phases = Phases.of(total)
        assert phases.begin == pytest.approx(max(total / 3, 12))
        assert phases.begin + 6 <= phases.end < total - 5


def test_a_counter_becomes_a_rate_over_the_last_second_and_nothing_before_it_has_one() -> None:
    moment = {"clock": 0.0, "counter": 0.0}
    gauge = Gauge("s", "B/s", lambda: moment["counter"], per_second=True)
    sampler = Sampler([gauge], clock=lambda: moment["clock"])
    readings = []
    for tick in range(RATE * 2):
        moment["clock"], moment["counter"] = tick / RATE, 1000.0 * min(tick, RATE) / RATE
        readings.append(sampler.sample().get("s"))
    assert readings[: RATE - 1] == [None] * (RATE - 1)
    assert readings[RATE] == pytest.approx(1000)
    assert readings[RATE + 5] == pytest.approx(500)


def test_a_counter_that_starts_again_gives_no_negative_rate() -> None:
    counts = iter([*(float(i) for i in range(100, 111)), 3.0])
    ticks = iter(range(100))
    sampler = Sampler([Gauge("s", "/s", lambda: next(counts), per_second=True)], clock=lambda: next(ticks) / RATE)
    assert [sampler.sample() for _ in range(12)][-1] == {"s": 0.0}


def test_this_machine_has_readings_of_what_the_disturbance_hits() -> None:
    found = {gauge.stream for gauge in gauges()}
    assert found & set(MUST_SEE)
    sampler = Sampler(gauges())
    for _ in range(RATE + 2):
        readings = sampler.sample()
        time.sleep(0.01)
    assert readings.keys() == found
    assert all(value >= 0 for value in readings.values())


def test_a_disturbance_ends_its_processes_and_removes_its_file(tmp_path: Path) -> None:
    disturbance = Disturbance(tmp_path, 30)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    disturbance.start()
    started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert len(started) == (psutil.cpu_count() or 1) + 2
    wait(lambda: any(tmp_path.iterdir()))
    disturbance.stop()
    assert not any(child.is_running() for child in started)
    assert not any(tmp_path.iterdir())


def test_a_disturbance_takes_memory_and_gives_it_back(tmp_path: Path) -> None:
    disturbance = Disturbance(tmp_path, 30)
    disturbance.start()
    held = disturbance._children[-1]
    least = 0.9 * min(BURST_MEMORY_BYTES, BURST_MEMORY_SHARE * psutil.virtual_memory().available)
    wait(lambda: psutil.Process(held.pid).memory_info().rss >= least)
    disturbance.stop()
    assert not psutil.pid_exists(held.pid)


def test_a_disturbance_ends_by_itself(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    disturbance = Disturbance(tmp_path, 0.2)
    disturbance.start()
    started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert started
    _, alive = psutil.wait_procs(started, timeout=10)
    disturbance.stop()
    assert not alive


def test_a_disturbance_flagged_on_the_disk_alone_is_enough() -> None:
    code, said = judged(*board(disk_write=21))
    assert code == 0
    assert "1.0 s after it began" in said
    assert "240 events scored" in said
    assert "all false: 0" in said


def test_a_disturbance_that_is_not_flagged_where_it_must_be_fails_the_demo() -> None:
    code, said = judged(*board(network=21))
    assert code == 1
    assert "NOT flagged on this-machine/cpu, this-machine/disk-write, this-machine/memory" in said


def test_onsets_before_and_long_after_the_disturbance_do_not_count() -> None:
    code, said = judged(*board(cpu=10, disk_write=50))
    assert code == 1
    assert "all false: 1" in said


def test_the_table_shows_warm_up_normal_streams_and_the_onset() -> None:
    shown, phases = board(cpu=21)
    shown.tracks["this-machine/memory"].see(59, 5.0, result(alert=None, status="warming_up"))
    for said in ("\n".join(shown.lines(25.0)), _drawn(shown, 25.0, 160), _drawn(shown, 25.0, 80)):
        assert "▲ ONSET +1.0 s" in said
        assert "warming up" in said
        assert "DISTURBANCE" in said
    assert "begins in" in shown.lines(phases.begin - 5)[0]
    assert "over" in shown.lines(phases.end + 1)[0]


def _drawn(shown: Board, at: float, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(shown.render(at, width))
    return output.getvalue()


def test_a_demo_whose_service_cannot_start_fails_with_its_last_words(tmp_path: Path) -> None:
    output = io.StringIO()
    assert run(40, tmp_path / "missing.onnx", Console(file=output, width=200)) == 1
    assert "The demo failed." in output.getvalue()
    assert "missing.onnx" in output.getvalue()
