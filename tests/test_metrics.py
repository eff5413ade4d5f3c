from __future__ import annotations

import asyncio
import re
import threading

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitoring import generate
from service.app import Service
from service.asking import SHIPPED_MODELS
from service.detector import Detector
from service.events import Event
from service.feed import Feed
from service.fleet import GATHER_EVENTS, MAX_FOLLOWED, RECENT_SECONDS, Fleet, Recent
from service.metrics import CATALOGUE, P_VALUES, Distribution, Metric, Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.series import COUNTED_SECONDS, Series, exposition
from service.settings import Settings
from service.stores.memory import MemoryStore
from tests.times import Clock


class World:
    """A scorer whose streams are followed and shown."""

    def __init__(self, detector: Detector, most: int = 10) -> None:
        self.metrics, self.clock = Metrics(), Clock(1000.0)
        feed = Feed(self.metrics)
        self.fleet = Fleet(detector.name, detector.manifest.warmup, self.metrics, self.clock)
        self.series = Series(detector.name, detector.manifest.feature_names, most, self.metrics, self.clock)
        feed.watch(self.fleet.gathered.see)
        feed.watch(self.series.gathered.see)
        self.scorer = Scorer(detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), self.metrics, Limits(), feed=feed)
        self.scorer.start()

    async def score(self, stream_id: str, *values: float) -> None:
        await self.scorer.score([Event(stream_id=stream_id, values={"value": value}) for value in values])

    def sample(self, name: str, **labels: str) -> float | None:
        self.metrics.flush()
        return self.metrics.registry.get_sample_value(name, labels or {"model": "tiny"})

    def shown(self, name: str) -> dict[str, float]:
        self.metrics.flush()
        families = text_string_to_metric_families(exposition([self.series.now()]).decode())
        return {sample.labels["stream"]: sample.value for family in families for sample in family.samples if sample.name == name}


def quiet(n: int) -> list[float]:
    values: list[float] = (np.random.default_rng(0).normal(size=n) + 10).tolist()
    return values


def test_what_is_generated_is_what_is_committed() -> None:
    stale = [name for name, content in generate.files().items() if (generate.ROOT / name).read_text() != content]
    assert not stale, "run python -m monitoring.generate"


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch("onset_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert metric.name.endswith("_seconds") == (metric.unit == "seconds")
    assert metric.name.endswith("_bytes") == (metric.unit == "bytes")
    assert "stream" not in metric.labels
    assert metric.meaning.endswith(".")
    assert metric.action.endswith((".", "?"))


def test_each_name_is_in_the_catalogue_once_and_nothing_else_is_exported() -> None:
    service = Service(Settings(model=SHIPPED_MODELS))
    service.metrics.begin(source=["redis_streams"], door=["redis_streams"])
    exported = {family.name for family in service.metrics.registry.collect() if not family.name.startswith("process_")}
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    assert exported == {name.removesuffix("_total").removesuffix("_info") for name in names}


def test_series_exist_from_the_start_so_that_a_rate_has_no_gap() -> None:
    metrics = Metrics()
    assert metrics.registry.get_sample_value("onset_events_total", {"door": "http", "outcome": "late"}) is None
    metrics.begin(model=["a", "b"], door=["http"])
    sample = metrics.registry.get_sample_value
    assert sample("onset_events_total", {"door": "http", "outcome": "late"}) == 0
    assert sample("onset_onsets_total", {"model": "b"}) == 0
    assert sample("onset_accepted_total", {"model": "b", "by": "age"}) == 0
    assert sample("onset_p_value_count", {"model": "a"}) == 0
    assert sample("onset_source_lag", {"source": "redis_streams"}) is None
    metrics.events.labels("http", "late").inc()
    metrics.begin(model=["a"], door=["http", "redis_streams"])
    assert sample("onset_events_total", {"door": "http", "outcome": "late"}) == 1


def test_a_distribution_is_the_histogram_of_its_values() -> None:
    metric = Metric("x", "histogram", "1", {"model": ()}, "X.", "-")
    values = np.r_[np.random.default_rng(1).uniform(size=1000), 0.001, 0.05, 1.0, np.nan]
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distribution = Distribution(metric, P_VALUES, ours)
    distribution.observe(values[:300], "m")
    distribution.observe(values[300:], "m")
    histogram = Histogram("x", "X.", ["model"], buckets=P_VALUES, registry=theirs)
    for value in values[~np.isnan(values)].tolist():
        histogram.labels("m").observe(value)

    def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(generate_latest(registry).decode())
        return {(sample.name, sample.labels.get("le", "")): sample.value for f in families for sample in f.samples if f.name == "x"}

    assert samples(ours) == pytest.approx(samples(theirs))
    assert len(samples(ours)) == len(P_VALUES) + 3


async def test_judged_events_and_their_p_values_are_counted_and_those_of_a_warming_stream_are_not(tiny_detector: Detector) -> None:
    world = World(tiny_detector)
    await world.score("a", *quiet(30))
    assert world.sample("onset_judged_events_total") == 30 - tiny_detector.manifest.warmup
    assert world.sample("onset_p_value_count") == 30 - tiny_detector.manifest.warmup
    assert world.sample("onset_anomaly_score_count") == 30 - tiny_detector.manifest.warmup
    await world.score("a", 1e9)
    assert world.sample("onset_p_value_bucket", model="tiny", le="0.001") == 1
    assert world.sample("onset_anomaly_score_bucket", model="tiny", le="1.0") == 30 - tiny_detector.manifest.warmup
    await world.scorer.drain(5)


async def test_streams_are_counted_as_warming_and_as_anomalous_by_their_last_event(tiny_detector: Detector) -> None:
    world = World(tiny_detector)
    await world.score("a", *quiet(3))
    await world.score("b", *quiet(30))
    assert world.sample("onset_streams_warming") == 1
    await world.score("b", 10.0, 1e9)
    await world.score("c", *quiet(30), 1e9, 10.0)
    assert [world.sample("onset_streams_anomalous", model="tiny", severity=name) for name in ("minor", "major", "critical")] == [0, 0, 1]
    await world.score("b", *quiet(20))
    assert world.sample("onset_streams_anomalous", model="tiny", severity="critical") == 0
    assert world.sample("onset_streams_warming") == 1
    world.clock.now += RECENT_SECONDS + 1
    assert world.sample("onset_streams_warming") == 0
    await world.scorer.drain(5)


def test_a_bounded_number_of_streams_is_followed() -> None:
    recent = Recent(Clock(1000.0))
    names = [str(i) for i in range(MAX_FOLLOWED + 5)]
    recent.update(names, np.ones(len(names), np.intp))
    assert recent.count(1) == MAX_FOLLOWED


async def test_a_stream_is_shown_with_its_reading_band_score_and_onset(tiny_detector: Detector) -> None:
    world = World(tiny_detector)
    awkward = 'a"b\\c'
    await world.score(awkward, *quiet(3))
    assert world.shown("y") == {awkward: pytest.approx(quiet(3)[-1])}
    assert world.shown("anomaly_score") == {}
    await world.score(awkward, *quiet(60))
    lower, expected, upper = (world.shown(name)[awkward] for name in ("yhat_lower", "yhat", "yhat_upper"))
    assert lower < expected < upper
    assert world.shown("contribution") == {awkward: pytest.approx(1)}
    assert world.shown("anomaly_onset_timestamp_seconds") == {}
    await world.scorer.drain(5)


async def test_the_onset_of_a_shown_stream_is_its_time(tiny_detector: Detector) -> None:
    world = World(tiny_detector)
    values = [*quiet(60), 1e9, 10.0]
    events = [Event(stream_id="a", values={"value": value}, timestamp=100.0 + i) for i, value in enumerate(values)]
    await world.scorer.score(events)
    assert world.shown("anomaly_onset_timestamp_seconds") == {"a": 160.0}
    assert world.shown("anomaly_event_timestamp_seconds") == {"a": 161.0}
    assert world.shown("anomaly_grade") == {"a": 0}
    await world.score("a", 1e12)
    assert 0 < world.shown("anomaly_grade")["a"] <= 1
    await world.scorer.drain(5)


async def test_places_are_kept_until_a_stream_is_gone_and_others_are_counted_as_not_shown(tiny_detector: Detector) -> None:
    world = World(tiny_detector, most=2)
    for name in "abc":
        await world.score(name, 1.0)
    assert set(world.shown("y")) == {"a", "b"}
    assert world.sample("onset_streams_shown") == 2
    assert world.sample("onset_streams_not_shown_total") == 1
    world.clock.now += RECENT_SECONDS / 2
    await world.score("b", 2.0)
    world.clock.now += RECENT_SECONDS / 2 + 1
    assert world.shown("y") == {"b": 2.0}
    await world.score("c", 3.0)
    assert world.shown("y") == {"b": 2.0, "c": 3.0}
    await world.scorer.drain(5)


async def test_the_events_of_a_shown_stream_are_counted_for_an_hour_after_its_last_one(tiny_detector: Detector) -> None:
    world = World(tiny_detector, most=2)
    await world.score("a", *quiet(7))
    await world.score("b", *quiet(3))
    assert world.shown("stream_events") == {"a": 7, "b": 3}
    world.clock.now += RECENT_SECONDS + 1
    await world.score("b", 10.0)
    assert world.shown("y") == {"b": 10.0}
    assert world.shown("stream_events") == {"a": 7, "b": 4}
    world.clock.now += COUNTED_SECONDS - RECENT_SECONDS
    assert world.shown("stream_events") == {"b": 4}
    await world.score("c", 1.0)
    assert world.shown("stream_events") == {"c": 1}, "the places of those that are not heard of are given away"
    await world.scorer.drain(5)


async def test_batches_that_nobody_looks_at_are_taken_in_after_a_bounded_number_of_events(tiny_detector: Detector) -> None:
    world = World(tiny_detector)
    sample = world.metrics.registry.get_sample_value
    world.metrics.begin(model=["tiny"])
    names, rounds = [str(i) for i in range(512)], GATHER_EVENTS // 512
    events = [Event(stream_id=name, values={"value": float(i)}) for i in range(rounds) for name in names]
    await world.scorer.score(events[:-1])
    before = sample("onset_judged_events_total", {"model": "tiny"})
    await world.scorer.score(events[-1:])
    assert before == 0
    assert sample("onset_judged_events_total", {"model": "tiny"}) == 512 * (rounds - tiny_detector.manifest.warmup)
    await world.scorer.drain(5)


async def test_the_time_a_request_waits_is_a_stage_of_its_batch(tiny_detector: Detector) -> None:
    world = World(tiny_detector)
    await world.score("a", 1.0)
    assert world.sample("onset_stage_seconds_count", stage="queue") == 1
    assert world.sample("onset_stage_seconds_count", stage="step") == 1
    await world.scorer.drain(5)


async def test_the_series_of_single_streams_are_written_beside_the_event_loop() -> None:
    metrics, written = Metrics(), threading.Event()

    def write() -> bytes:
        assert written.wait(20), "the event loop waits for it"
        return b"other 1\n"

    metrics.also(lambda: write)
    scrape = asyncio.create_task(metrics.exposition())
    await asyncio.sleep(0)
    written.set()
    content = await scrape
    assert content.endswith(b"other 1\n")
    assert b"onset_events_total" in content
