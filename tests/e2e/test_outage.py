"""A store that goes away and comes back, and more load than can be scored: the service says so and goes on by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests import local
from tests.e2e.process import Service
from tests.servers import Valkey
from tests.times import wait

JSON = {"content-type": "application/json"}


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """Not started yet; keeps its data when it is killed."""
    (tmp_path / "v").mkdir()
    server = Valkey(tmp_path / "v", appendonly="yes", appendfsync="always")
    yield server
    server.kill()


def post(service: Service, value: float, event_id: str) -> httpx.Response:
    event = {"stream_id": "a", "values": {"value": value}, "event_id": event_id}
    return local.post(f"{service.url}/v1/events", content=json.dumps(event), headers=JSON, timeout=10)


def becomes_ready(service: Service, ready: bool) -> None:
    """Waits until the service answers, and answers so."""
    wait(lambda: service.readiness() == (200 if ready else 503))


def test_readiness_follows_the_store_and_scoring_recovers_without_a_restart(valkey: Valkey, tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, wait=False, REDIS_URL=valkey.url) as service:
        becomes_ready(service, False)
        assert post(service, 1.0, "0").status_code == 503
        assert local.get(f"{service.url}/health/live").status_code == 200
        valkey.start()
        becomes_ready(service, True)
        for i in range(7):
            assert post(service, float(i), str(i)).status_code == 200
        last = post(service, 6.0, "6").json()
        assert last["duplicate"]
        pid = service.pid
        for _ in range(2):
            valkey.kill()
            down = post(service, 7.0, "7")
            assert down.status_code == 503
            assert down.headers["content-type"] == "application/problem+json"
            assert int(down.headers["retry-after"]) >= 1
            becomes_ready(service, False)
            assert local.get(f"{service.url}/health/live").status_code == 200
            valkey.start()
            becomes_ready(service, True)
        again = post(service, 6.0, "6").json()
        assert (again["p_value"], again["state_version"]) == (last["p_value"], last["state_version"])
        assert post(service, 7.0, "7").json()["state_version"] == 8
        assert service.pid == pid
        lines = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
        turns = [line for line in lines if line["event"] in ("ready", "not_ready")]
        assert {line["event"] for line in turns[::2]} == {"ready"}, "it was not at first"
        assert {line["event"] for line in turns[1::2]} == {"not_ready"}, "each turn is told once, however often it is asked"
        assert len(turns) >= 5
        assert "does not answer" in turns[1]["reason"]


def test_a_service_without_its_store_starts_and_waits(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, wait=False, forked=False, REDIS_URL="redis://127.0.0.1:1") as service:
        becomes_ready(service, False)
        detail = local.get(f"{service.url}/health/ready").json()["detail"]
        assert "store" in detail
        service.terminate()
        assert service.returncode == 0


def test_more_load_than_can_be_scored_is_refused_and_memory_stays_bounded(tmp_path: Path, tiny_model_path: Path) -> None:
    body = "\n".join(json.dumps({"stream_id": f"s{i}", "values": {"value": 1.0}}) for i in range(1000)).encode()
    with Service(tmp_path / "data", model=tiny_model_path, MAX_QUEUE_EVENTS="3000") as service:
        statuses, peak = asyncio.run(flood(service, body, clients=24, requests=8))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3, "what fits the queue is scored"
        assert peak < 400e6, f"{peak / 1e6:.0f} MB"
        assert post(service, 1.0, "after").status_code == 200
        refused = [line for line in local.get(f"{service.url}/metrics").text.splitlines() if line.startswith("onset_refused_total")]
        assert any('reason="queue"' in line and float(line.rsplit(" ", 1)[1]) == statuses.count(429) for line in refused)


async def flood(service: Service, body: bytes, clients: int, requests: int) -> tuple[list[int], int]:
    """Statuses of all requests, and the service's largest resident size in bytes."""
    statuses: list[int] = []
    process, peak = psutil.Process(service.pid), 0

    async def client() -> None:
        nonlocal peak
        async with httpx.AsyncClient(timeout=30) as session:
            for _ in range(requests):
                response = await session.post(f"{service.url}/v1/events", content=body, headers={"content-type": "application/x-ndjson"})
                statuses.append(response.status_code)
                if response.status_code == 429:
                    assert int(response.headers["retry-after"]) >= 1
                peak = max(peak, process.memory_info().rss)

    await asyncio.gather(*(client() for _ in range(clients)))
    return statuses, peak
