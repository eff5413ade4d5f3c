from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import httpx
import pytest
from structlog.testing import capture_logs

from service.app import Service, create_app
from service.asking import SHIPPED_MODELS
from service.canary import Canary, CanaryResult
from service.detector import Detector
from service.errors import StoreUnavailable
from service.metrics import Metrics
from service.settings import Settings
from service.stores import Memory, Write
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from tests import tiny

P_VALUE = "chance = Exp(surprise)"


def altered(folder: Path, p_value: str) -> Detector:
    """A sealed detector with its p-value computed otherwise: it passes its self-test, as a wrong model would."""
    assert P_VALUE in tiny.GRAPH
    return Detector.load(tiny.build_tiny(folder, graph=tiny.GRAPH.replace(P_VALUE, p_value)))


def memory() -> MemoryStore:
    return MemoryStore(state_ttl=60, result_ttl=60)


@pytest.mark.parametrize("name", ["shipped", "tiny"])
async def test_a_detector_that_sees_the_fault_is_ok(name: str, tiny_detector: Detector, redis_store: RedisStore) -> None:
    detector = Detector.load(next(SHIPPED_MODELS.glob("default-*.onnx"))) if name == "shipped" else tiny_detector
    finding = await Canary(detector, redis_store, Metrics(), 60).look()
    assert finding.result == "ok"
    assert finding.quiet_score < 0.5
    assert finding.fault_score > 1.5


async def test_a_store_that_takes_no_new_streams_takes_the_canary(tiny_detector: Detector) -> None:
    class NearlyFull(MemoryStore):
        async def memory(self) -> Memory:
            return Memory(0.95)

    finding = await Canary(tiny_detector, NearlyFull(state_ttl=60, result_ttl=60), Metrics(), 60).look()
    assert (finding.result, finding.reason) == ("ok", "")


async def test_its_alert_is_nobodys(tiny_detector: Detector) -> None:
    store = memory()
    assert (await Canary(tiny_detector, store, Metrics(), 60).look()).result == "ok"
    assert store.log == []
    assert await store.count() == 0


async def test_a_detector_that_gives_every_event_the_same_p_value_is_blind(tmp_path: Path) -> None:
    detector = altered(tmp_path, "blind = Mul(surprise, floor)\n  chance = Exp(blind)")
    assert (await Canary(detector, memory(), Metrics(), 60).look()).result == "blind"


async def test_a_detector_that_scores_backwards_is_inverted(tmp_path: Path) -> None:
    detector = altered(tmp_path, "likely = Exp(surprise)\n  chance = Sub(one, likely)")
    assert (await Canary(detector, memory(), Metrics(), 60).look()).result == "inverted"


async def test_scores_that_are_not_those_of_an_undisturbed_run_differ(tiny_detector: Detector) -> None:
    class Forgetful(MemoryStore):
        """Loses one commit in the middle of the quiet part, as a server does that lost its last second."""

        commits = 0

        async def commit(self, model: str, writes: Sequence[Write]) -> list[int]:
            self.commits += 1
            return [1] * len(writes) if self.commits == 3 else list(await super().commit(model, writes))

    finding = await Canary(tiny_detector, Forgetful(state_ttl=60, result_ttl=60), Metrics(), 60).look()
    assert finding.result == "differs"
    assert finding.reason.startswith("event 75 of ")


async def test_runs_repeat_and_are_counted_and_a_change_is_logged_once(tiny_detector: Detector) -> None:
    class Flaky(MemoryStore):
        down = True

        async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
            if self.down:
                raise StoreUnavailable("It is down.")
            return await super().load(model, stream_ids)

    metrics, store = Metrics(), Flaky(state_ttl=60, result_ttl=60)
    metrics.begin(model=["tiny"])
    canary = Canary(tiny_detector, store, metrics, 0.01)
    sample = metrics.registry.get_sample_value
    assert math.isnan(sample("onset_canary_ok", {"model": "tiny"}) or 0)

    async def until(result: CanaryResult, runs: int) -> None:
        while (sample("onset_canary_runs_total", {"model": "tiny", "result": result}) or 0) < runs:  # noqa: ASYNC110 - metrics tell nobody
            await asyncio.sleep(0.01)

    with capture_logs() as logs:
        task = asyncio.create_task(canary.run())
        await until("failed", 2)
        assert sample("onset_canary_ok", {"model": "tiny"}) == 0
        store.down = False
        await until("ok", 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert sample("onset_canary_ok", {"model": "tiny"}) == 1
    assert (sample("onset_canary_score", {"model": "tiny", "part": "fault"}) or 0) > 1
    assert [(line["event"], line["log_level"]) for line in logs] == [("canary_failed", "error"), ("canary_ok", "info")]
    assert logs[0]["reason"] == "It is down."


def test_the_catalogue_knows_all_results() -> None:
    assert list(Metrics.canary_runs.metric.labels["result"]) == list(get_args(CanaryResult))


async def test_the_canary_of_a_running_service_is_counted_among_nobodys_events_and_listed_nowhere(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    app = create_app(Settings(model=tiny_model_path, data_dir=tmp_path, canary_seconds=0.05))
    service: Service = app.state.service
    sample = service.metrics.registry.get_sample_value
    async with service.running(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        while (sample("onset_canary_runs_total", {"model": "tiny", "result": "ok"}) or 0) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert (await client.get("/v1/streams")).json()["streams"] == []
        await client.post("/v1/events", json={"stream_id": "a", "values": {"value": 1.0}})
        assert [stream["stream_id"] for stream in (await client.get("/v1/streams")).json()["streams"]] == ["a"]
        text = (await client.get("/metrics")).text
    assert 'onset_events_total{door="http",outcome="scored"} 1.0' in text
    assert "onset_batch_events_sum 1.0" in text
    assert 'onset_onsets_total{model="tiny"} 0.0' in text
    assert "@" not in text
