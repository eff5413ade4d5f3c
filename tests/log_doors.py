"""A door for log lines in this process, over a store that can be made to fail: what the tests of Loki's and OTLP's doors start from."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from service import shipped
from service.api import Door
from service.detector import Detector
from service.events import Result
from service.feed import Batch, Feed
from service.intake import DoorLimits
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from tests.doors import Store, door_over

NOW = 1_790_000_000
MAX_STREAMS, MAX_LINES, MAX_BODY = 50, 6000, 1_000_000
LINES = ("Accepted connection from 10.0.0.7", "Took 12.5 ms for /cart", "Closed connection from 10.0.0.7", "Disk sda is 93 percent full")

Add = Callable[[FastAPI, shipped.Shipping, Door], None]
"""Adds the route under test."""


class Shipper(httpx.AsyncClient):
    """Sends to a door in this process."""

    store: Store
    scorer: Scorer
    metrics: Metrics
    name: str

    async def last(self, stream_id: str) -> Result:
        return await self.scorer.streams.last(stream_id)

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("onset_events_total", {"door": self.name, "outcome": outcome}) or 0

    @property
    def blank(self) -> float:
        return self.metrics.registry.get_sample_value("onset_blank_lines_total", {"door": self.name}) or 0

    @property
    def cut(self) -> float:
        return self.metrics.registry.get_sample_value("onset_cut_lines_total", {"door": self.name}) or 0


@asynccontextmanager
async def shipper(
    add: Add, name: str, *detectors: Detector, models: str = "", queue: int = 20_000, watch: Callable[[Batch], Any] | None = None
) -> AsyncIterator[Shipper]:
    """`detectors`, of which the first is the default; `models` as ONSET_LOGS_MODEL; `watch` is told of what is scored."""
    metrics, store = Metrics(), Store()
    feed = Feed(metrics)
    if watch is not None:
        feed.watch(watch)
    limits = Limits(max_queue_events=queue, max_streams=MAX_STREAMS, max_future_seconds=10_000)
    scorers = {
        detector.name: Scorer(detector, Policy(), store, metrics, limits, clock=lambda: NOW, feed=feed, alerting=True)
        for detector in detectors
    }
    limit = DoorLimits(max_body_bytes=MAX_BODY, max_batch_events=100, max_inflight_bytes=3_000_000)
    app, door = FastAPI(), door_over(scorers, store, metrics, limit)
    model = shipped.log_model([detector.manifest for detector in detectors], models)
    add(app, shipped.Shipping(door, name, model, metrics, queue, clock=lambda: NOW), door)
    async with Shipper(transport=httpx.ASGITransport(app), base_url="http://onset") as client:
        client.store, client.metrics, client.name = store, metrics, name
        client.scorer = next((scorer for scorer in scorers.values() if scorer.detector.manifest.kind == "log"), scorers[detectors[0].name])
        yield client
    store.commits = math.inf
    store.gate.set()
    for scorer in scorers.values():
        await scorer.drain(2)
