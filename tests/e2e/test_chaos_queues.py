"""A short soak of each queue: replicas and servers under `kill -9`, and every event scored once, in order, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.chaos_queues import WIRES, Plan, soak

BROKERS = {"redis_streams": (), "kafka": ("kafka",), "nats": ("nats",), "mqtt": ("mosquitto (SIGTERM)",), "amqp": ("rabbitmq",)}
"""Beside the store, which Redis Streams are in."""


@pytest.mark.parametrize("source", WIRES)
async def test_through_a_queue_nothing_is_lost_scored_twice_or_put_out_of_order_under_kill_9(
    source: str, tmp_path: Path, tiny_model_path: Path
) -> None:
    report = await soak(Plan(kills=5, seconds=300, rate=1.0, streams=16, seed=1, model=tiny_model_path, source=source), tmp_path)
    assert report.violations == []
    assert {name.rstrip(" 01") for name in report.kills} == {"replica", "store", *BROKERS[source]}
    assert report.counts["result"] == report.counts["event"] > 100
    assert report.counts["again"] > 20
    assert report.streams_checked == 16
