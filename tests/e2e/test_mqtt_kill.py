"""Two replicas as processes on one MQTT session: kill -9 at any moment, and numbers without id or time are scored once and in order."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from tests import local
from tests.brokers import Mosquitto
from tests.buses import Plant
from tests.e2e.process import Service
from tests.rigs import each_once
from tests.servers import Valkey
from tests.times import until

STREAMS, NUMBERS, KILLS = 12, 150, 3


async def test_replicas_that_are_killed_under_way_leave_every_number_scored_once_and_in_order(
    tmp_path: Path, tiny_model_path: Path, mosquitto: Mosquitto
) -> None:
    rng = random.Random(5)
    sent = {f"s{stream}": [float(i) if stream % 3 else 1.5 for i in range(NUMBERS)] for stream in range(STREAMS)}
    source = {
        "type": "mqtt",
        "url": mosquitto.url,
        "topics": ["kill/in/+"],
        "session": "kill",
        "payload": {"format": "number", "topic": "kill/in/{sensor}", "stream_id": "sensor"},
        "output": "kill/out/{stream_id}",
        "dead_letters": "kill/dead",
        "batch": 40,
        "lease_seconds": 0.6,
    }
    with ExitStack() as stack:
        server = stack.enter_context(Valkey(tmp_path / "store", appendonly="yes"))
        settings: dict[str, Any] = {"REDIS_URL": server.url, "SOURCES": json.dumps([source])}
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        replicas = [
            stack.enter_context(Service(tmp_path / name / "data", model=tiny_model_path, wait=False, **settings)) for name in ("a", "b")
        ]
        plant = stack.enter_context(Plant(mosquitto, "kill-plant", "kill/out/#"))
        for replica in replicas:
            await asyncio.to_thread(replica.wait_ready)
        await until(lambda: any(map(_connected, replicas)))
        for i in range(NUMBERS):
            mids = [plant.publish(f"kill/in/{stream}", numbers[i]) for stream, numbers in sent.items()]
            if i % (NUMBERS // KILLS) == 10:
                await until(lambda: any(map(_connected, replicas)))
                await asyncio.sleep(rng.uniform(0, 0.05))
                victim = next((replica for replica in replicas if _connected(replica)), replicas[0])
                victim.kill()
                victim.start()
        await plant.wait(mids)
        await until(lambda: len(each_once(plant.results("kill/out"))) >= STREAMS * NUMBERS)
        results = each_once(plant.results("kill/out"))
    for stream, numbers in sent.items():
        mine = [result for result in results if result.stream_id == stream]
        assert [result.state_version for result in mine] == list(range(1, NUMBERS + 1)), stream
        assert [result.contributors[0].actual for result in mine] == numbers, stream


def _connected(replica: Service) -> bool:
    """Whether it has the session."""
    try:
        lines = local.get(f"{replica.url}/metrics", timeout=2).text.splitlines()
    except httpx.TransportError:
        return False
    return any(line.startswith("onset_source_partitions{") and line.endswith(" 1.0") for line in lines)
