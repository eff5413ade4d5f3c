"""Two real replicas over one store raise a silence once, while it lasts; the next event, to either, ends it. A killed one raises none."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import redis

from tests import local
from tests.e2e.process import Service
from tests.times import wait


def sample(service: Service, name: str) -> float:
    lines = local.get(f"{service.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def silences(service: Service) -> float:
    return sample(service, "onset_silences_total")


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


def test_a_replica_that_is_killed_makes_no_stream_of_its_queue_silent(tmp_path: Path, tiny_model_path: Path, empty_server: str) -> None:
    folders = [tmp_path / name / "data" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    enough = threading.Event()

    def write(client: redis.Redis, at: float, value: int) -> None:
        for i in range(20):
            event = {"stream_id": f"s{i}", "timestamp": at, "values": {"value": value % 3}}
            client.xadd(f"in:{{{i % 2}}}", {"event": json.dumps(event)})

    def write_on() -> None:
        with redis.Redis.from_url(empty_server) as client:
            for value in range(10_000):
                write(client, time.time(), value)
                if enough.wait(0.3):
                    return

    with (
        Service(folders[0], model=tiny_model_path, REDIS_URL=empty_server, STREAMS_INPUT="in", STREAMS_PARTITIONS="2") as one,
        Service(folders[1], model=tiny_model_path, REDIS_URL=empty_server, STREAMS_INPUT="in", STREAMS_PARTITIONS="2") as two,
        redis.Redis.from_url(empty_server) as client,
    ):
        wait(lambda: sample(one, "onset_source_partitions") == sample(two, "onset_source_partitions") == 1)
        began = time.time()
        for value in range(60):
            write(client, began + (value - 60) * 0.3, value)
        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            wait(lambda: sample(two, "onset_streams_live") == 20)
            two_before = sample(two, "onset_silences_total")
            one.kill()
            wait(lambda: sample(two, "onset_source_partitions") == 2)
            count = sample(two, "onset_events_total")
            wait(lambda: sample(two, "onset_events_total") > count + 100)
            assert sample(two, "onset_silences_total") == two_before == 0
        finally:
            enough.set()
            writer.join()
