"""kill -9 at any moment loses nothing and scores nothing twice: the scores are those of an uninterrupted run, to the last bit."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.detector import Detector
from service.events import Event
from service.policy import Policy
from service.rounds import advance
from service.state import StateCodec
from tests.e2e.process import Service
from tests.readings import to_readings

STREAMS = 5
EVENTS = 40
"""Per stream."""


def recorded() -> list[dict[str, Any]]:
    """Events of all streams, interleaved, each with an identity."""
    rng = random.Random(7)
    events = []
    for i, stream in itertools.product(range(EVENTS), range(STREAMS)):
        value = round(rng.gauss(10 * stream, 1) + (30 if i in (25, 26) else 0), 3)
        events.append({"stream_id": f"s{stream}", "values": {"value": value}, "timestamp": 1.7e9 + i, "event_id": f"{stream}-{i}"})
    return events


def uninterrupted(detector: Detector, events: list[dict[str, Any]]) -> dict[str, tuple[float | None, int]]:
    """event_id → (p-value, state version) of one run without a service."""
    import numpy as np

    readings, _ = to_readings([Event(**event) for event in events], detector.manifest, now=0)
    slots = np.array([int(stream_id[1:]) for stream_id in readings.stream_ids], np.intp)
    codec = StateCodec(detector.features, detector.state_size, detector.fingerprint)
    records = advance(detector, Policy(tau=detector.manifest.age_constant), codec.fresh(STREAMS), readings, slots).records
    scores = [None if np.isnan(p) else p for p in records["p_value"].tolist()]
    return {event["event_id"]: (p, version) for event, p, version in zip(events, scores, records["version"].tolist(), strict=True)}


@pytest.fixture
def service(tmp_path: Path, tiny_model_path: Path) -> Iterator[Service]:
    with Service(tmp_path / "data", model=tiny_model_path) as running:
        yield running


def send_all(service: Service, events: list[dict[str, Any]], size: int) -> dict[str, dict[str, Any]]:
    """Send events in requests of `size`, each again until it is answered; event_id → reply."""
    replies: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 100
    with httpx.Client(timeout=10) as client:
        for i in range(0, len(events), size):
            batch = events[i : i + size]
            while True:
                assert time.monotonic() < deadline, f"{len(replies)} of {len(events)} events answered"
                try:
                    response = client.post(
                        f"{service.url}/v1/events", content=json.dumps(batch), headers={"content-type": "application/json"}
                    )
                except httpx.TransportError:
                    time.sleep(0.02)
                    continue
                if response.status_code in (429, 503):
                    time.sleep(0.05)
                    continue
                assert response.status_code == 200, response.text
                answers = response.json()
                if any("status" in answer and answer["status"] == 503 for answer in answers):
                    continue
                replies.update(zip((event["event_id"] for event in batch), answers, strict=True))
                break
    return replies


class Killer(threading.Thread):
    """Kills something every now and then until it is stopped."""

    def __init__(self, kill: Callable[[], None], seed: int) -> None:
        super().__init__(daemon=True)
        self._kill = kill
        self._random = random.Random(seed)
        self._stopped = threading.Event()
        self.kills = 0

    def run(self) -> None:
        while not self._stopped.wait(self._random.uniform(0.02, 0.8)):
            self._kill()
            self.kills += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join(30)


def kill_service(service: Service) -> None:
    service.kill()
    service.start()


def kill_store(service: Service) -> None:
    for child in service.children("valkey"):
        child.kill()
    time.sleep(0.3)


@pytest.mark.parametrize("size", [1, 50], ids=["single", "several_of_a_stream"])
@pytest.mark.parametrize("kill", [kill_service, kill_store])
def test_scores_after_kills_are_those_of_an_uninterrupted_run(
    service: Service, tiny_detector: Detector, kill: Callable[[Service], None], size: int
) -> None:
    events = recorded()
    want = uninterrupted(tiny_detector, events)
    killer = Killer(lambda: kill(service), seed=size)
    killer.start()
    try:
        replies: dict[str, dict[str, Any]] = {}
        for i in range(0, len(events), 50):
            replies |= send_all(service, events[i : i + 50], size)
            while killer.kills < 1 + i // 100:
                assert killer.is_alive()
                time.sleep(0.05)
    finally:
        killer.stop()
    assert killer.kills >= 2
    got = {event_id: (reply["p_value"], reply["state_version"]) for event_id, reply in replies.items()}
    assert got == want
    again = send_all(service, events[-STREAMS:], STREAMS)
    assert all(reply["duplicate"] for reply in again.values())
    assert {event_id: (reply["p_value"], reply["state_version"]) for event_id, reply in again.items()} == {
        event["event_id"]: want[event["event_id"]] for event in events[-STREAMS:]
    }


def test_nothing_is_left_running_after_a_stop(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, forked=False) as running:
        children = running.children("valkey")
        assert len(children) == 1
        running.terminate()
        assert running.returncode == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
