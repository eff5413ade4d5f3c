"""What tests of queues share: events, the answers of an uninterrupted run, and reading what came out."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import redis.asyncio as redis

from service.detector import Detector
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.stores.memory import MemoryStore
from tests.times import until


def recorded(count: int, streams: int) -> list[dict[str, Any]]:
    """Events of all streams, interleaved, without identities: only their positions tell them apart from repeated ones."""
    rng = random.Random(7)
    return [
        {
            "stream_id": f"s{stream}",
            "values": {"value": round(rng.gauss(10 * stream, 1) + (30 if i == 25 else 0), 3)},
            "timestamp": 1.7e9 + i,
        }
        for i in range(count)
        for stream in range(streams)
    ]


async def uninterrupted(detector: Detector, events: Sequence[dict[str, Any]]) -> list[Result]:
    """The replies of one run over REST, by stream and version."""
    store = MemoryStore(state_ttl=3600, result_ttl=600)
    scorer = Scorer(detector, Policy(tau=detector.manifest.age_constant), store, Metrics(), Limits())
    scorer.start()
    answers = await scorer.score([msgspec.convert(event, Event) for event in events])
    await scorer.drain(5)
    return in_order([answer for answer in answers if isinstance(answer, Result)])


def in_order(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda result: (result.stream_id, result.state_version))


class Queue:
    """The user's side of the streams."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def add(self, *events: dict[str, Any], key: str = "onset:events") -> list[bytes]:
        """One entry each; their ids."""
        async with self.client.pipeline(transaction=False) as pipeline:
            for event in events:
                pipeline.xadd(key, {"event": json.dumps(event)})
            return list(await pipeline.execute())

    async def results(self) -> list[Result]:
        """In the order they came out."""
        entries = await self.client.xrange("onset:results")
        return [msgspec.json.decode(fields[b"result"], type=Result) for _, fields in entries]

    async def dead(self) -> list[dict[str, str]]:
        entries = await self.client.xrange("onset:dead-letters")
        return [{name.decode(): value.decode(errors="replace") for name, value in fields.items()} for _, fields in entries]

    async def empty(self, *keys: str) -> None:
        """Wait until all entries are acknowledged, and so deleted."""

        async def gone() -> bool:
            return not any([await self.client.xlen(key) for key in keys or ("onset:events",)])

        await until(gone)


@asynccontextmanager
async def queue(url: str) -> AsyncIterator[Queue]:
    async with redis.Redis.from_url(url) as client:
        yield Queue(client)
