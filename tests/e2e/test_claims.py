"""A model's file is replaced by another of its name, under load: every event is answered, and stepped once by the file in force."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from bench.rollout import more, sending
from service.claims import BEAT_SECONDS, EXPIRY_SECONDS
from tests import local
from tests.e2e.process import Service
from tests.servers import Valkey
from tests.times import wait
from tests.tiny import build_tiny

STREAMS = 24
KEY, PARTITIONS = "in", 4


def metric(service: Service, name: str) -> float:
    lines = local.get(f"{service.url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def afresh(service: Service) -> float:
    return metric(service, 'onset_fresh_states_total{reason="other_model"}')


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()
    return [build_tiny(folder, version=version) for folder, version in zip(folders, ("1", "2"), strict=True)]


def test_another_file_is_rolled_out_under_load_and_one_that_dies_gives_way_to_the_former(
    tmp_path: Path, server: Valkey, files: list[Path]
) -> None:
    old = Service(tmp_path / "old" / "data", model=files[0], REDIS_URL=server.url)
    new = Service(tmp_path / "new" / "data", model=files[1], REDIS_URL=server.url)
    with old, sending([old.url, new.url], STREAMS) as senders:
        more(senders, 10)
        with new:
            assert wait(lambda: old.readiness() == 503, 30) < EXPIRY_SECONDS
            assert new.readiness() == 200
            assert local.get(f"{old.url}/health/live").status_code == 200
            said = local.get(f"{old.url}/health/ready").text
            assert "has version 1 (sha256 " in said
            assert "version 2 (sha256 " in said
            more(senders, 20)
            assert (afresh(old), afresh(new)) == (0, STREAMS)
            assert [metric(service, "onset_model_in_force{") for service in (old, new)] == [0, 1]
            refused = [response.json() for sender in senders for response in sender.refusals if response.headers.get("retry-after") == "1"]
            assert any(problem["type"] == "urn:onset:model-superseded" for problem in refused)

            new.kill()
            assert wait(lambda: old.readiness() == 200, EXPIRY_SECONDS + 30) < 2 * EXPIRY_SECONDS
            more(senders, 20)
            assert afresh(old) == STREAMS
            assert metric(old, "onset_model_in_force{") == 1
    assert [files for sender in senders for files in sender.lives()] == [["1", "2", "1"]] * STREAMS
    for service, event in ((old, "model_superseded"), (new, "model_in_force")):
        assert f'"event": "{event}"' in service.log.read_text()


def test_an_old_replica_that_crashes_amid_a_rollout_comes_back_superseded(tmp_path: Path, server: Valkey, files: list[Path]) -> None:
    old, new = (
        Service(tmp_path / name / "data", model=file, wait=False, REDIS_URL=server.url, INSTANCE=f"uid-of-{name}")
        for name, file in zip(("old", "new"), files, strict=True)
    )
    with old:
        old.wait_ready()
        with new:
            new.wait_ready()
            old.kill()
            old.start()
            wait(lambda: "is superseded" in local.get(f"{old.url}/health/ready").text if old.readiness() else False, 30)
            assert (old.readiness(), new.readiness()) == (503, 200)
            new.kill()
            new.start()
            new.wait_ready()
            assert [metric(service, "onset_model_in_force{") for service in (old, new)] == [0, 1]


def test_with_the_embedded_store_another_file_is_in_force_with_its_start(tmp_path: Path, files: list[Path]) -> None:
    events = [{"stream_id": "s", "values": {"value": 1.0}, "timestamp": 1.7e9 + i} for i in range(3)]
    for file, fresh in ((files[0], 0), (files[1], 1), (files[1], 0), (files[0], 1)):
        with Service(tmp_path / "data", model=file) as service:
            answer = local.post(f"{service.url}/v1/events", json=events.pop(0) if len(events) > 1 else events[0]).raise_for_status().json()
            assert answer["model_version"] == file.name.removeprefix("tiny-").removesuffix(".onnx")
            assert (afresh(service), metric(service, "onset_model_in_force{")) == (fresh, 1)


def test_a_file_that_is_refused_takes_nothing_from_the_one_in_force(tmp_path: Path, server: Valkey, files: list[Path]) -> None:
    damaged = bytearray(files[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[1].write_bytes(damaged)
    with Service(tmp_path / "old" / "data", model=files[0], REDIS_URL=server.url) as old:
        new = Service(tmp_path / "new" / "data", model=files[1], REDIS_URL=server.url, wait=False, forked=False)
        with new:
            wait(lambda: new.ended, 15)
            assert new.returncode == 2
        time.sleep(2 * BEAT_SECONDS)
        assert old.readiness() == 200
        assert '"event": "model_superseded"' not in old.log.read_text()


def test_the_queue_goes_over_to_the_new_file_with_nothing_lost_or_scored_twice(tmp_path: Path, server: Valkey, files: list[Path]) -> None:
    lease = 20  # far above what handing over takes on a machine whose disk stalls
    source = json.dumps([{"type": "redis_streams", "key": KEY, "partitions": PARTITIONS, "batch": 20, "lease_seconds": lease}])
    old = Service(tmp_path / "old" / "data", model=files[0], REDIS_URL=server.url, SOURCES=source)
    new = Service(tmp_path / "new" / "data", model=files[1], REDIS_URL=server.url, SOURCES=source)
    keys = [f"{KEY}:{{{p}}}" for p in range(PARTITIONS)]
    sent = 0

    def put(client: Any, rounds: int) -> None:
        nonlocal sent
        for _ in range(rounds):
            for i in range(STREAMS):
                event = {"stream_id": f"s{i}", "values": {"value": float(sent % 7)}, "timestamp": 1.7e9 + sent, "event_id": f"s{i}-{sent}"}
                client.xadd(keys[i % PARTITIONS], {"event": json.dumps(event)})
            sent += 1

    def results(client: Any) -> list[dict[str, Any]]:
        return [json.loads(fields[b"result"]) for _, fields in client.xrange("onset:results")]

    with old, closing(cast("Any", server.client())) as client:
        put(client, 40)
        wait(lambda: len(results(client)) > 100, 30)
        new.start()
        try:
            began = time.monotonic()
            while time.monotonic() < began + 2:
                put(client, 1)
            assert wait(lambda: metric(new, "onset_source_partitions{") == PARTITIONS, 30) < lease - 3, "a lease is longer"
            assert metric(old, "onset_source_partitions{") == 0
            put(client, 5)
            wait(lambda: sum(client.xlen(key) for key in keys) == 0, 30)
            assert (afresh(old), afresh(new)) == (0, STREAMS)
        finally:
            new.kill()
        put(client, 5)
        wait(lambda: sum(client.xlen(key) for key in keys) == 0, EXPIRY_SECONDS + lease + 10)
        done = results(client)
    assert sorted(result["event_id"] for result in done) == sorted(f"s{i}-{n}" for i in range(STREAMS) for n in range(sent))
    assert not any(result["duplicate"] or result["late"] for result in done)
    for i in range(STREAMS):
        of_stream = [(result["model_version"], result["state_version"]) for result in done if result["stream_id"] == f"s{i}"]
        turn, back = of_stream.index(("2", 1)), len(of_stream) - 5
        assert of_stream[:turn] == [("1", n + 1) for n in range(turn)]
        assert of_stream[turn:back] == [("2", n + 1) for n in range(back - turn)]
        assert of_stream[back:] == [("1", n + 1) for n in range(5)]
