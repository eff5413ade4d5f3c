"""The service on a Redis Cluster gives the numbers of one on a single server, through the loss of a node and the move of a slot."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.stores.cluster import SLOTS
from service.stores.redis import shard_of
from tests.e2e.process import Service
from tests.e2e.test_kill import Killer, recorded, send_all, uninterrupted
from tests.e2e.test_serve import refused
from tests.servers import Move, ValkeyCluster
from tests.times import wait

STREAMS, ROUNDS, EACH = 60, 6, 3


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ValkeyCluster]:
    with ValkeyCluster(tmp_path / "cluster", appendonly="yes", appendfsync="always") as cluster:
        yield cluster


@pytest.fixture
def service(tmp_path: Path, tiny_model_path: Path, cluster: ValkeyCluster) -> Iterator[Service]:
    (tmp_path / "one").mkdir()
    with Service(tmp_path / "one" / "data", model=tiny_model_path, REDIS_URL=cluster.url, REDIS_CLUSTER="true") as running:
        yield running


def bulks() -> Iterator[list[dict[str, Any]]]:
    """Several events of many streams in each, with a spike here and there; now and then one event alone."""
    rng = random.Random(3)
    for i in range(ROUNDS):
        yield [event(f"plant/{s}", EACH * i + j, rng) for j in range(EACH) for s in range(STREAMS)]
        yield [event("alone", i, rng)]


def event(stream_id: str, turn: int, rng: random.Random) -> dict[str, Any]:
    value = rng.gauss(0, 1) + 30 * (rng.random() < 0.02)
    return {"stream_id": stream_id, "values": {"value": value}, "timestamp": 1.7e9 + turn, "event_id": str(turn)}


def test_a_cluster_and_a_single_server_give_the_same_answers_to_the_last_bit(
    service: Service, tmp_path: Path, tiny_model_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    with Service(tmp_path / "two" / "data", model=tiny_model_path) as other, httpx.Client(timeout=20) as client:
        both = (service.url, other.url)
        sent = list(bulks())
        for events in sent:
            answers = [client.post(f"{url}/v1/events", json=events).json() for url in both]
            assert len(answers[0]) == len(events)
            assert answers[0] == answers[1]
            assert not any("detail" in answer for answer in answers[0])
        again = [client.post(f"{url}/v1/events", json=sent[-2]).json() for url in both]
        assert again[0] == again[1]
        assert all(answer["duplicate"] and answer["p_value"] is not None for answer in again[0])
        streams = [client.get(f"{url}/v1/streams/plant%2F7").json() for url in both]
        assert streams[0]["state_version"] == streams[1]["state_version"] == ROUNDS * EACH
        listed = [sorted(stream["stream_id"] for stream in listing(client, url)) for url in both]
        assert listed[0] == listed[1]
        assert len(listed[0]) == STREAMS + 1
        for url in both:
            assert client.delete(f"{url}/v1/streams/alone").status_code == 204
            assert client.get(f"{url}/v1/streams/alone").status_code == 404
            assert client.put(f"{url}/v1/policy", json={"alpha": 0.0005}).status_code == 200


def listing(client: httpx.Client, url: str) -> Iterator[dict[str, Any]]:
    """All streams, page by page."""
    cursor: dict[str, str] | None = {}
    while cursor is not None:
        page = client.get(f"{url}/v1/streams", params={"limit": 20, **cursor}).json()
        yield from page["streams"]
        cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else None


def test_through_killed_nodes_and_a_moving_slot_every_event_is_scored_once_and_as_without_them(
    service: Service, cluster: ValkeyCluster, tiny_detector: Any
) -> None:
    events = recorded()
    half = len(events) // 2
    expected = uninterrupted(tiny_detector, events)
    killed = iter([0, 1, 2])

    def kill() -> None:
        if (i := next(killed, None)) is not None:
            cluster.nodes[i].kill()
            time.sleep(0.2)
            cluster.nodes[i].start()
            cluster.wait()

    killer = Killer(kill, seed=5)
    killer.start()
    try:
        replies = send_all(service, events[:half], size=3)
    finally:
        killer.stop()
    move = Move(cluster, SLOTS[shard_of("s3")])
    move.begin()
    replies |= send_all(service, events[half : half + 10], size=3)
    move.keys()
    replies |= send_all(service, events[half + 10 : half + 20], size=3)  # calm ones: the first alert of a shard waits for the end
    move.end()
    replies |= send_all(service, events[half + 20 :], size=3)
    assert {name: (reply["p_value"], reply["state_version"]) for name, reply in replies.items()} == expected
    assert service.is_ready()


def test_a_lost_node_is_503_and_readiness_off_until_it_is_back(service: Service, cluster: ValkeyCluster) -> None:
    events = [{"stream_id": f"s{i}", "values": {"value": 1.0}, "timestamp": 1.7e9, "event_id": "e"} for i in range(30)]
    with httpx.Client(base_url=service.url, timeout=20) as client:
        assert client.post("/v1/events", json=events).status_code == 200
        cluster.nodes[2].kill()
        later = [event | {"timestamp": 1.7e9 + 1, "event_id": "f"} for event in events]
        refusal = client.post("/v1/events", json=later)
        assert refusal.status_code in (200, 503), refusal.text
        assert refusal.status_code == 503 or any(answer.get("status") == 503 for answer in refusal.json())
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        cluster.nodes[2].start()
        cluster.wait()
        service.wait_ready()
        answers = client.post("/v1/events", json=later).json()
        assert [answer["state_version"] for answer in answers] == [2] * 30


def test_what_a_cluster_cannot_be_used_with_is_refused_in_one_sentence(tiny_model_path: Path, tmp_path: Path) -> None:
    model = ("--model", str(tiny_model_path), "--data-dir", str(tmp_path / "d"))
    url = "redis://127.0.0.1:1"
    streams = refused(*model, REDIS_URL=url, REDIS_CLUSTER="true", STREAMS_INPUT="onset:events")
    assert "Redis Streams need a single server for now" in streams
    assert "ONSET_REDIS_URL" in refused(*model, REDIS_CLUSTER="true")
    assert "unix://" in refused(*model, REDIS_URL="unix:///tmp/x.sock", REDIS_CLUSTER="true")


def test_a_node_of_a_cluster_without_the_setting_is_said_in_the_log(
    valkey_cluster: ValkeyCluster, tiny_model_path: Path, tmp_path: Path
) -> None:
    url = valkey_cluster.nodes[0].url
    with Service(tmp_path / "data", model=tiny_model_path, wait=False, REDIS_URL=url) as service:
        wait(lambda: "set ONSET_REDIS_CLUSTER=true" in service.log.read_text())
        assert service.readiness() in (0, 503)
