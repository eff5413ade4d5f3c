"""Two real replicas over one store raise a silence once, while it lasts; the next event, to either, ends it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests import local
from tests.e2e.process import Service
from tests.times import wait


def silences(service: Service) -> float:
    lines = local.get(f"{service.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("onset_silences_total{"))


def speak(service: Service) -> dict[str, Any]:
    answer = local.post(f"{service.url}/v1/events", json={"stream_id": "line 3/pump", "values": {"value": 1.0}}).raise_for_status()
    result: dict[str, Any] = answer.json()
    return result


def silent(service: Service) -> list[str]:
    page = local.get(f"{service.url}/v1/streams", params={"silent": "true"}).raise_for_status().json()
    return [stream["stream_id"] for stream in page["streams"]]


def test_two_replicas_raise_a_silence_once_and_the_next_event_ends_it(tmp_path: Path, tiny_model_path: Path, empty_server: str) -> None:
    folders = [tmp_path / name / "data" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    with (
        Service(folders[0], model=tiny_model_path, REDIS_URL=empty_server) as one,
        Service(folders[1], model=tiny_model_path, REDIS_URL=empty_server) as two,
    ):
        for i in range(52):  # one more than the service wants to know, so that a slow machine has no time to fall silent between
            speak((one, two)[i % 2])
            time.sleep(0.02)
        wait(lambda: silent(two))
        time.sleep(2.5)  # both have swept again
        assert silences(one) + silences(two) == 1
        log = one.log.read_text() + two.log.read_text()
        assert log.count('"event": "stream_silent"') == 1
        assert not speak(one)["is_anomaly"]
        assert silent(two) == []
