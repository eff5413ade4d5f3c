from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from service.detector import Detector
from service.events import Event
from service.feed import Batch, Feed
from service.metrics import Metrics
from service.policy import Policy
from service.rounds import Kind
from service.scorer import Limits, Scorer
from service.stores.memory import MemoryStore


async def test_watchers_are_told_of_every_committed_batch_until_they_end(tiny_detector: Detector) -> None:
    metrics = Metrics()
    feed = Feed(metrics)
    scorer = Scorer(tiny_detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), metrics, Limits(), feed=feed)
    scorer.start()
    told: list[Batch] = []
    end = feed.watch(told.append)
    events = [Event(stream_id=name, values={"value": 1.0}, event_id=f"e{name}") for name in "abc"]
    await scorer.score(events)
    await scorer.score(events)
    end()
    await scorer.score(events)
    await scorer.drain(5)
    assert [(batch.model, batch.stream_ids, batch.answers.kinds) for batch in told] == [
        (tiny_detector.name, ["a", "b", "c"], [Kind.SCORED] * 3),
        (tiny_detector.name, ["a", "b", "c"], [Kind.DUPLICATE] * 3),
    ]


async def test_a_watcher_that_fails_is_logged_and_harms_no_other(tiny_detector: Detector) -> None:
    metrics = Metrics()
    feed = Feed(metrics)
    scorer = Scorer(tiny_detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), metrics, Limits(), feed=feed)
    scorer.start()
    told: list[Batch] = []

    def fails(batch: Batch) -> None:
        raise ZeroDivisionError

    feed.watch(fails)
    feed.watch(told.append)
    with capture_logs() as logs:
        [answer] = await scorer.score([Event(stream_id="a", values={"value": 1.0})])
    await scorer.drain(5)
    assert getattr(answer, "state_version", None) == 1
    assert len(told) == 1
    assert [line["event"] for line in logs] == ["unexpected_error"]
    assert "fails" in logs[0]["watcher"]
    assert metrics.registry.get_sample_value("onset_unexpected_errors_total") == pytest.approx(1)
