"""Two replicas as processes on the same Redis Streams: kill -9 at any moment, and every event is scored once, in order, to the last bit."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

import httpx

from service.detector import Detector
from tests.e2e.process import Service
from tests.queues import in_order, queue, recorded, uninterrupted
from tests.servers import Valkey

STREAMS, EVENTS, PARTITIONS, KILLS = 30, 60, 3, 4


async def test_replicas_that_are_killed_under_way_leave_every_event_scored_once_and_in_order(
    tmp_path: Path, tiny_model_path: Path, tiny_detector: Detector
) -> None:
    events = recorded(EVENTS, STREAMS)
    keys = [f"onset:events:{{{p}}}" for p in range(PARTITIONS)]
    rng = random.Random(3)
    with ExitStack() as stack:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        server = stack.enter_context(Valkey(tmp_path / "store", appendonly="yes"))
        replicas = [
            stack.enter_context(
                Service(
                    tmp_path / name / "data",
                    model=tiny_model_path,
                    REDIS_URL=server.url,
                    STREAMS_INPUT="onset:events",
                    STREAMS_PARTITIONS=str(PARTITIONS),
                    STREAMS_LEASE_SECONDS="1",
                    STREAMS_BATCH="20",
                )
            )
            for name in ("a", "b")
        ]
        async with queue(server.url) as q:
            for i in range(0, len(events), 30):
                for event in events[i : i + 30]:
                    await q.add(event, key=keys[int(event["stream_id"][1:]) % PARTITIONS])
                if i // 30 % (EVENTS // KILLS) == 5:
                    await asyncio.sleep(rng.uniform(0, 0.3))
                    victim = rng.choice(replicas)
                    victim.kill()
                    await asyncio.to_thread(victim.start)
            await q.empty(*keys, seconds=60)
            results = await q.results()
            names = await q.client.xinfo_consumers(keys[0], "onset")
        assert in_order(results) == await uninterrupted(tiny_detector, events)
        for stream in range(STREAMS):
            versions = [result.state_version for result in results if result.stream_id == f"s{stream}"]
            assert versions == list(range(1, EVENTS + 1)), "the output is in each stream's order"
        assert len(names) <= 2, "dead members are struck off the group"
        async with httpx.AsyncClient() as client:
            owned = [_owned((await client.get(f"{replica.url}/metrics")).text) for replica in replicas]
        assert sum(owned) == PARTITIONS
        assert min(owned) >= 1


def _owned(metrics: str) -> float:
    [line] = [line for line in metrics.splitlines() if line.startswith("onset_source_partitions{")]
    return float(line.split()[-1])
