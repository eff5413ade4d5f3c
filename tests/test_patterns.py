"""What no template matched is counted by pattern in the store, bounded, and can be had by people and by the next training."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import patterns
from service.app import Service, create_app
from service.detector import Detector
from service.errors import StoreUnavailable, TableError, UnknownModel
from service.metrics import Metrics
from service.patterns import Patterns
from service.settings import Settings
from service.stores.redis import RedisStore
from tests.servers import ValkeyCluster
from training.lines import Mining, exported, mine

NOW = 1_795_420_800.0


@asynccontextmanager
async def serving(path: Path, url: str, *, cluster: bool = False) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    app = create_app(Settings(model=path, redis_url=url, redis_cluster=cluster, canary_seconds=0))
    service: Service = app.state.service
    async with service.running(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client, service


async def send(client: httpx.AsyncClient, *messages: str, at: float = NOW, ids: str = "") -> list[dict[str, Any]]:
    events = [{"stream_id": "a", "message": text, "timestamp": at + i, "event_id": f"{ids}{i}"} for i, text in enumerate(messages)]
    replies: list[dict[str, Any]] = (await client.post("/v1/events", json=events)).json()
    return replies


async def test_new_patterns_of_all_replicas_are_counted_by_pattern_with_when_and_an_example(log_path: Path, empty_server: str) -> None:
    async with serving(log_path, empty_server) as (client, service):
        await send(client, "Segfault at 0xdead in 7\n stack", "Took 3 ms for /x", "Segfault at 0xbeef in 8", "Oops", ids="one")
        await send(client, "Segfault at 0xdead in 7\n stack", ids="one")  # a duplicate is no new line
        assert sample(service, "template") == 1
        assert sample(service, "new") == 3
    async with serving(log_path, empty_server) as (client, service):  # what the first had not written when it ended, it wrote then
        await send(client, "Segfault at 0xf00d in 9", at=NOW + 60, ids="two")
        await service.patterns.flush()
        page = (await client.get("/v1/patterns")).json()
        assert page["model"] == "tiny-log"
        segfault, oops = page["patterns"]
        assert segfault == {
            "pattern": "Segfault at <HEX> in <NUM>",
            "count": 3,
            "first_seen": NOW,
            "last_seen": NOW + 60,
            "example": "Segfault at 0xdead in 7\n stack",
        }
        assert (oops["pattern"], oops["count"]) == ("Oops", 1)
        assert len((await client.get("/v1/patterns", params={"limit": 1})).json()["patterns"]) == 1


def sample(service: Service, match: str) -> float | None:
    return service.metrics.registry.get_sample_value("onset_lines_total", {"model": "tiny-log", "match": match})


async def test_a_model_that_reads_no_lines_has_no_patterns(tiny_model_path: Path, empty_server: str) -> None:
    async with serving(tiny_model_path, empty_server) as (client, _):
        for query in ({}, {"model": "tiny"}):
            response = await client.get("/v1/patterns", params=query)
            assert response.status_code == 404


async def test_patterns_are_bounded_and_the_oldest_are_forgotten(
    log_path: Path, redis_store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MOST", 5)
    monkeypatch.setattr(patterns, "PENDING", 8)
    detector, metrics = Detector.load(log_path), Metrics()
    found = Patterns({"tiny-log": detector}, metrics)
    found.connect(redis_store)
    for i in range(10):
        found._count("tiny-log", "x" * (i + 1), NOW + i)
    assert metrics.registry.get_sample_value("onset_patterns_dropped_total", {"model": "tiny-log"}) == 2
    await found.flush()
    assert {one.pattern for one in (await found.page("tiny-log", 10)).patterns} == {"x" * i for i in range(4, 9)}
    found._count("tiny-log", "long " * 1000, NOW + 99)
    await found.flush()
    page = await found.page("", 10)
    assert len(page.patterns) == 5
    assert max(len(one.pattern) for one in page.patterns) == patterns.PATTERN_LENGTH
    with pytest.raises(UnknownModel, match="there is tiny-log"):
        await found.page("other", 10)


async def test_a_flood_of_patterns_that_come_once_takes_no_place_of_one_that_comes_again(
    log_path: Path, redis_store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By when they came last alone, a scan of a web server had emptied the list of the errors of the night in a minute."""
    monkeypatch.setattr(patterns, "MOST", 6)
    found = Patterns({"tiny-log": Detector.load(log_path)}, Metrics())
    found.connect(redis_store)
    for i, text in enumerate(("Segfault", "Oops", "Segfault", *("x" * (i + 1) for i in range(20)), "Panic")):
        found._count("tiny-log", text, NOW + i)
        await found.flush()
    kept = {one.pattern: one.count for one in (await found.page("tiny-log", 10)).patterns}
    assert kept["Segfault"] == 2
    assert kept.keys() >= {"Panic", "x" * 20, "x" * 19}
    assert "Oops" not in kept
    assert len(kept) == 6


async def test_of_several_log_models_one_is_to_be_named(log_path: Path) -> None:
    detector = Detector.load(log_path)
    with pytest.raises(UnknownModel, match=r"^Name a log model by \?model=; there is a, b\.$"):
        await patterns.Patterns({"a": detector, "b": detector}, Metrics()).page("", 10)
    with pytest.raises(UnknownModel, match=r"^None of the loaded models reads log lines, so there are no patterns\.$"):
        await patterns.Patterns({}, Metrics()).page("", 10)


async def test_they_are_kept_in_a_cluster_too(log_path: Path, empty_cluster: ValkeyCluster) -> None:
    async with serving(log_path, empty_cluster.url, cluster=True) as (client, service):
        await send(client, "Segfault at 0xdead in 7", "Oops")
        await service.patterns.flush()
        assert {one["pattern"] for one in (await client.get("/v1/patterns")).json()["patterns"]} == {"Segfault at <HEX> in <NUM>", "Oops"}


async def test_what_cannot_be_written_waits_for_the_store(log_path: Path, redis_store: RedisStore) -> None:
    found = Patterns({"tiny-log": Detector.load(log_path)}, Metrics())
    found._count("tiny-log", "Oops 1", NOW)
    with pytest.raises(StoreUnavailable):
        await found.flush()
    found._count("tiny-log", "Oops 2", NOW + 1)
    found.connect(redis_store)
    task = asyncio.create_task(found.run())
    async with asyncio.timeout(30):
        while not (page := await found.page("", 10)).patterns:  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.05)
    task.cancel()
    assert [(one.pattern, one.count) for one in page.patterns] == [("Oops <NUM>", 2)]


async def test_an_export_gives_the_next_model_templates_for_them(log_path: Path, empty_server: str, tmp_path: Path) -> None:
    async with serving(log_path, empty_server) as (client, service):
        await send(client, "Segfault at 0xdead in 7")
        await service.patterns.flush()
        (tmp_path / "patterns.json").write_bytes((await client.get("/v1/patterns")).content)
    seen = exported([tmp_path / "patterns.json"])
    assert "Segfault at <HEX> in <NUM>" in mine(["a b", *seen], Mining()).templates
    with pytest.raises(TableError, match="no reply of GET /v1/patterns"):
        exported([tmp_path / "absent"])
