"""Two real replicas over one store: the false-alarm rate is changed on one, holds on both within seconds, and survives both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from tests import local
from tests.e2e.process import Service
from tests.servers import Valkey
from tests.times import wait

SECONDS = 5.0
MARKED = 4.0


def score(service: Service, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = local.post(f"{service.url}/v1/events", json=events, timeout=20).raise_for_status().json()
    return results


def marked(service: Service, at: int) -> dict[str, Any]:
    """The same unusual event again, after an ordinary one."""
    return score(service, [{"stream_id": "s", "values": {"value": v}, "timestamp": at + i} for i, v in enumerate((0.0, MARKED))])[1]


def metric(service: Service, name: str) -> float:
    lines = local.get(f"{service.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def until(service: Service, alpha: float) -> float:
    """Seconds until the service asks for this rate."""
    return wait(lambda: local.get(f"{service.url}/v1/policy").raise_for_status().json()["alpha"] == alpha)


def test_a_rate_put_on_one_replica_turns_the_verdicts_of_the_other_and_survives_a_restart_of_both(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    folders = [tmp_path / name / "data" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    start = int(time.time()) - 50_000
    with (
        Valkey(tmp_path / "valkey", appendonly="yes", appendfsync="always") as server,
        Service(folders[0], model=tiny_model_path, REDIS_URL=server.url) as one,
        Service(folders[1], model=tiny_model_path, REDIS_URL=server.url, ALPHA="0.002") as two,
    ):
        values = np.random.default_rng(3).normal(size=300).tolist()
        score(one, [{"stream_id": "s", "values": {"value": v}, "timestamp": start + i} for i, v in enumerate(values)])
        first = marked(two, start + 1000)
        assert (first["alpha"], first["is_anomaly"], first["anomaly_score"] > 0) == (0.002, False, True)
        alpha = min(0.4, 3 * first["p_value"])

        changed = local.put(f"{one.url}/v1/policy", json={"alpha": alpha, "strict": True}).raise_for_status().json()
        assert (changed["alpha"], changed["environment"]["alpha"]) == (alpha, 0.001)
        assert marked(one, start + 2000)["is_anomaly"]  # here at once
        took = until(two, alpha)
        assert took < SECONDS
        assert marked(two, start + 3000)["is_anomaly"]
        for service in (one, two):
            assert metric(service, "onset_alpha ") == alpha
            assert metric(service, "onset_policy_changes_total{") == 1

        server.kill()  # the last policy holds without the store, and the store keeps it
        assert local.get(f"{two.url}/v1/policy", timeout=20).json()["alpha"] == alpha
        assert local.put(f"{two.url}/v1/policy", json={"alpha": 0.1}, timeout=20).status_code == 503
        server.start()

        one.kill()
        two.terminate()
        for service in (one, two):
            service.start()
        for i, service in enumerate((one, two)):
            kept = local.get(f"{service.url}/v1/policy").json()
            assert (kept["alpha"], kept["strict"], kept["origin"]) == (alpha, True, changed["origin"])
            assert marked(service, start + 4000 + 1000 * i)["is_anomaly"]
            assert metric(service, "onset_policy_changes_total{") == 0

        assert local.delete(f"{two.url}/v1/policy").json()["alpha"] == 0.002
        until(one, 0.001)
        last = marked(one, start + 6000)
        assert (last["alpha"], last["is_anomaly"]) == (0.001, False)
        assert '"event": "policy_changed"' in one.log.read_text()
