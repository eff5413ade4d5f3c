"""Prometheus' door over HTTP: every sample is scored once, what is refused is said, and a sender retries exactly what it should."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import time as seconds_now

import httpx
import pytest
from fastapi import FastAPI

from bench.prompb import Sent, body_1, body_2
from service import otlp
from service.alerts import decoded
from service.detector import Detector
from service.events import Event, Result
from service.intake import DoorLimits
from service.metrics import Metrics
from service.names import Names
from service.policy import Policy
from service.prompb import STALE, pack
from service.relabel import read_rules
from service.remote_write import PATH, RemoteWrite
from service.samples import Samples
from service.scorer import Limits, Scorer
from tests.doors import Store, door_over
from tests.tiny import build_tiny

NOW = 1_790_000_000_000
MARKER = struct.unpack("<d", STALE.to_bytes(8, "little"))[0]
V1 = {"content-type": "application/x-protobuf", "content-encoding": "snappy", "x-prometheus-remote-write-version": "0.1.0"}
V2 = V1 | {"content-type": "application/x-protobuf;proto=io.prometheus.write.v2.Request", "x-prometheus-remote-write-version": "2.0.0"}
SAMPLES_WRITTEN = "x-prometheus-remote-write-samples-written"
MAX_STREAMS = 50


class Sender(httpx.AsyncClient):
    """Sends as Prometheus does, to a door in this process."""

    store: Store
    scorer: Scorer
    metrics: Metrics
    ended: dict[str, float]

    async def write(self, *series: Sent, version: int = 1, path: str = PATH, **headers: str) -> httpx.Response:
        content = pack(body_1(series) if version == 1 else body_2(series))
        return await self.post(path, content=content, headers=(V1 if version == 1 else V2) | headers)

    async def last(self, stream_id: str) -> Result:
        return await self.scorer.streams.last(stream_id)

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("onset_events_total", {"door": "remote_write", "outcome": outcome}) or 0

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("onset_refused_total", {"reason": reason}) or 0

    def unscored(self, what: str) -> float:
        return self.metrics.registry.get_sample_value("onset_remote_write_unscored_total", {"what": what}) or 0

    def at(self, milliseconds: float) -> None:
        """What follows is sent at this time."""
        self.scorer._clock = lambda: milliseconds / 1000


@asynccontextmanager
async def sender(
    detector: Detector, relabel: Path | None = None, queue: int = 5000, body: int = 100_000, grace: float = 0, seconds: float = 30
) -> AsyncIterator[Sender]:
    metrics, store, ended = Metrics(), Store(), dict[str, float]()
    limits = Limits(max_queue_events=queue, max_streams=MAX_STREAMS, max_future_seconds=10_000)
    scorer = Scorer(detector, Policy(), store, metrics, limits, clock=lambda: NOW / 1000, alerting=True)
    limit = DoorLimits(max_body_bytes=body, max_batch_events=3000, max_inflight_bytes=1_000_000, max_body_seconds=seconds)
    app, door = FastAPI(), door_over({detector.name: scorer}, store, metrics, limit)
    names = Names(read_rules(relabel) if relabel else (), most=1000)
    receiver = RemoteWrite(door, names, 3000, metrics, [lambda model, ends: ended.update(ends)], grace)
    door.add_post(app, PATH, receiver.post, "remote_write")
    points = Samples(otlp.METRICS_DOOR, metrics, [lambda model, ends: ended.update(ends)], grace)
    door.add_post(
        app, otlp.METRICS_PATH, otlp.OtlpMetrics(door, names, points, 3000, metrics, clock=lambda: NOW / 1000).export, "otlp_metrics"
    )
    async with Sender(transport=httpx.ASGITransport(app), base_url="http://onset") as client:
        client.store, client.metrics, client.scorer, client.ended = store, metrics, scorer, ended
        yield client
    store.commits = math.inf
    store.gate.set()
    await scorer.drain(2)


@pytest.fixture
async def prometheus(tiny_detector: Detector) -> AsyncIterator[Sender]:
    async with sender(tiny_detector) as client:
        yield client


def up(i: int, *values: float, start: int = NOW, step: int = 1000, **labels: str) -> Sent:
    return Sent({"__name__": "up", "instance": f"h{i}", **labels}, [(start + n * step, value) for n, value in enumerate(values)])


def name(i: int) -> str:
    return f'up{{instance="h{i}"}}'


def assert_refused(response: httpx.Response, status: int, *says: str) -> None:
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    for part in says:
        assert part in detail, detail


@pytest.mark.parametrize("version", [1, 2])
async def test_every_series_is_a_stream_scored_at_its_own_time(prometheus: Sender, version: int) -> None:
    reply = await prometheus.write(*(up(i, 1.0, 2.0, 0.0) for i in range(5)), version=version)
    assert (reply.status_code, reply.content, reply.headers[SAMPLES_WRITTEN]) == (204, b"", "15")
    for i in range(5):
        last = await prometheus.last(name(i))
        assert (last.state_version, last.timestamp, last.contributors[0].actual) == (3, NOW / 1000 + 2, 0.0)
    assert prometheus.count("scored") == 15


@pytest.mark.parametrize("version", [1, 2])
async def test_the_scores_are_those_of_the_same_numbers_over_the_other_door(tiny_detector: Detector, version: int) -> None:
    values = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, 9.0, 1.0]
    async with sender(tiny_detector) as one, sender(tiny_detector) as other:
        await one.write(up(1, *values), version=version)
        events = [Event(name(1), {"value": value}, timestamp=NOW / 1000 + n) for n, value in enumerate(values)]
        answers = await other.scorer.score(events)
        expected, got = answers[-1], await one.last(name(1))
    assert isinstance(expected, Result)
    assert (got.anomaly_score, got.p_value, got.expected, got.upper) == (
        expected.anomaly_score,
        expected.p_value,
        expected.expected,
        expected.upper,
    )


@pytest.mark.parametrize("version", [1, 2])
async def test_a_request_sent_again_is_written_again_and_scored_once(prometheus: Sender, version: int) -> None:
    for _ in range(2):
        reply = await prometheus.write(*(up(i, *range(20)) for i in range(3)), version=version)
        assert (reply.status_code, reply.headers[SAMPLES_WRITTEN]) == (204, "60")
    assert (prometheus.count("scored"), prometheus.count("duplicate")) == (60, 60)
    assert (await prometheus.last(name(1))).state_version == 20


async def test_late_samples_are_refused_for_good_and_their_neighbours_are_scored(prometheus: Sender) -> None:
    await prometheus.write(up(1, 1.0), up(2, 1.0))
    reply = await prometheus.write(up(1, 5.0, start=NOW - 5000), up(2, 2.0, start=NOW + 1000))
    assert_refused(reply, 400, "1 of 2 samples were refused", "older than the last one of their stream", name(1))
    assert "retry-after" not in reply.headers
    assert reply.headers[SAMPLES_WRITTEN] == "1"
    assert (prometheus.count("late"), prometheus.count("scored")) == (1, 3)
    assert (await prometheus.last(name(2))).state_version == 2
    assert_refused(reply, 400, f"{name(1)} at {(NOW - 5000) / 1000:.3f}, 5.000 s before that one")
    assert "clock" not in reply.json()["detail"]


async def test_a_late_sample_of_a_sender_whose_clock_was_ahead_is_told_as_such(prometheus: Sender) -> None:
    now = round(seconds_now() * 1000)
    prometheus.at(now)
    await prometheus.write(up(1, 1.0, start=now + 3_600_000))
    assert_refused(await prometheus.write(up(1, 1.0, start=now)), 400, "3600.000 s before that one, which is 3", " s ahead of this clock")


async def test_a_body_that_does_not_arrive_is_to_be_sent_again_and_the_store_is_not_blamed(tiny_detector: Detector) -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"."
        await asyncio.sleep(60)

    async with sender(tiny_detector, seconds=0.05) as client:
        reply = await client.post(PATH, content=stuck(), headers=V1)
    assert_refused(reply, 503, "ONSET_MAX_BODY_SECONDS")
    assert (reply.json()["type"], reply.headers["connection"]) == ("urn:onset:too-slow", "close")


@pytest.mark.parametrize(
    ("series", "says"),
    [
        (Sent({"__name__": "a", "x": "y" * 5000}, [(NOW, 1.0)]), "4096"),
        (Sent({"__name__": "a"}, [(-5, 1.0)]), "time -5 is no time in milliseconds since 1970"),
        (Sent({"__name__": "a"}, [(NOW // 1000, 1.0)]), "time 1790000000 is no time in milliseconds since 1970: it looks like seconds"),
        (Sent({"__name__": "a"}, [(NOW + 10_001_000, 1.0)]), "too far in the future"),
        (Sent({}, [(NOW, 1.0)]), "no labels"),
    ],
)
async def test_a_sample_that_can_never_be_taken_is_a_400_with_its_reason(prometheus: Sender, series: Sent, says: str) -> None:
    reply = await prometheus.write(up(1, 1.0), series)
    assert_refused(reply, 400, "1 of 2 samples were refused", says)
    assert reply.headers[SAMPLES_WRITTEN] == "1"
    assert (prometheus.count("rejected"), prometheus.count("scored")) == (1, 1)


async def test_new_streams_beyond_the_limit_do_not_hold_up_the_others(prometheus: Sender) -> None:
    await prometheus.write(*(up(i, 1.0) for i in range(MAX_STREAMS)))
    reply = await prometheus.write(up(1, 2.0, start=NOW + 1), up(MAX_STREAMS, 2.0))
    assert_refused(reply, 400, "1 of 2", "ONSET_MAX_STREAMS", name(MAX_STREAMS))
    assert (await prometheus.last(name(1))).state_version == 2


async def test_while_the_store_does_not_answer_the_sender_is_to_send_again(prometheus: Sender) -> None:
    prometheus.store.commits = 0
    reply = await prometheus.write(up(1, 1.0))
    assert_refused(reply, 503, "The state store does not answer")
    assert reply.headers["retry-after"] == "1"
    assert prometheus.count("failed") == 1
    prometheus.store.commits = math.inf
    assert (await prometheus.write(up(1, 1.0))).status_code == 204
    assert (await prometheus.last(name(1))).state_version == 1


async def test_a_request_written_in_part_is_sent_again_and_each_sample_is_scored_once(prometheus: Sender) -> None:
    prometheus.store.commits = 1  # of two pieces
    request = [up(1, *range(1500))]
    reply = await prometheus.write(*request)
    assert_refused(reply, 503, "476 of 1500 samples were refused: 476 not written, the store stopped answering")
    assert (reply.headers["retry-after"], reply.headers[SAMPLES_WRITTEN]) == ("1", "1024")
    assert prometheus.count("failed") == 476
    prometheus.store.commits = math.inf
    reply = await prometheus.write(*request)
    assert (reply.status_code, reply.headers[SAMPLES_WRITTEN]) == (204, "1500")
    assert (await prometheus.last(name(1))).state_version == 1500
    assert (prometheus.count("scored"), prometheus.count("duplicate")) == (1500, 1024)


async def test_a_full_queue_is_a_429_with_retry_after(tiny_detector: Detector) -> None:
    async with sender(tiny_detector, queue=10) as prometheus:
        prometheus.store.gate.clear()
        waiting = [asyncio.create_task(prometheus.write(*(up(i, 1.0) for i in range(n, n + 9)))) for n in (0, 10, 20, 30)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        prometheus.store.gate.set()
        replies = [await task for task in waiting]
        assert {reply.status_code for reply in replies} == {204, 429}
        refused = [reply for reply in replies if reply.status_code == 429]
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert (prometheus.refused("queue"), prometheus.refused("batch")) == (len(refused), 0)


async def test_more_samples_than_a_request_may_bring_are_a_413_and_counted(prometheus: Sender) -> None:
    assert_refused(await prometheus.write(up(1, *range(3001))), 413, "ONSET_MAX_BATCH_EVENTS", "max_samples_per_send")
    assert prometheus.refused("batch") == 1


async def test_nan_is_a_missing_value_and_infinity_too(prometheus: Sender) -> None:
    reply = await prometheus.write(up(1, 1.0, float("nan"), float("inf"), 1e300, 2.0))
    assert reply.status_code == 204
    last = await prometheus.last(name(1))
    assert (last.state_version, last.contributors[0].actual) == (5, 2.0)
    assert (prometheus.unscored("missing"), prometheus.unscored("infinite")) == (1, 2)
    await prometheus.write(up(1, float("nan"), start=NOW + 9000))
    assert (await prometheus.last(name(1))).imputed == ["value"]


@pytest.mark.parametrize("version", [1, 2])
async def test_a_stale_marker_ends_its_stream_and_nobody_waits_for_it(prometheus: Sender, version: int) -> None:
    values = [1.0, 1.1] * 20
    for start in (NOW - 79_000, NOW - 39_000):  # how often a stream arrives is known from its second arrival on
        prometheus.at(start + 39_000)
        await prometheus.write(up(1, *values, start=start), up(2, *values, start=start), version=version)
    watched, _ = await prometheus.store.waited("tiny", 10)
    assert watched == 2
    end = up(1, MARKER, start=NOW + 1000)
    for _ in range(2):
        reply = await prometheus.write(end, version=version)
        assert (reply.status_code, reply.headers[SAMPLES_WRITTEN]) == (204, "1")
    assert await prometheus.store.due("tiny", 1e11, 10) == [name(2)]
    last = await prometheus.last(name(1))
    assert (last.state_version, last.is_anomaly, last.silent_since) == (80, False, None)
    assert prometheus.unscored("ended") == 2
    assert prometheus.ended == {name(1): NOW / 1000 + 1}
    for start in (NOW + 2000, NOW + 3000):  # it speaks again: it is waited for again
        prometheus.at(start)
        await prometheus.write(up(1, 1.0, start=start), version=version)
    assert (await prometheus.last(name(1))).state_version == 82
    assert sorted(await prometheus.store.due("tiny", 1e11, 10)) == [name(1), name(2)]


async def test_a_stream_that_was_silent_is_no_longer_once_it_has_ended(prometheus: Sender) -> None:
    for start in (NOW - 79_000, NOW - 39_000):
        prometheus.at(start + 39_000)
        await prometheus.write(up(1, *[1.0, 1.1] * 20, start=start))
    now = NOW / 1000
    sweeper = prometheus.scorer.sweeper(3600)
    sweeper._clock = lambda: now
    await sweeper.sweep()
    now += 100  # more than twice the 40 seconds between arrivals
    await sweeper.sweep()
    assert (await prometheus.last(name(1))).silent_since is not None
    await prometheus.write(up(1, MARKER, start=NOW + 50_000))
    assert (await prometheus.last(name(1))).silent_since is None
    assert await prometheus.scorer.streams.silent(10) == []


async def test_the_alert_of_a_stream_is_resolved_as_it_ends(prometheus: Sender) -> None:
    fault = up(1, *[1.0, 1.1] * 40, *[50.0] * 5, start=NOW - 84_000)
    await prometheus.write(fault)
    end = up(1, MARKER, start=NOW + 1000)
    for _ in range(2):
        await prometheus.write(end)
    told = [decoded(entry) for entry in prometheus.store.log]
    assert [(transition.what, transition.kind, transition.resolution) for transition in told if transition.what != "escalated"] == [
        ("opened", "anomaly", None),
        ("resolved", "anomaly", "ended"),
    ]
    assert told[0].alert == told[-1].alert
    await prometheus.write(up(1, 50.0, start=NOW + 9000))  # it is back, and as ill as before
    assert (await prometheus.last(name(1))).is_anomaly


async def test_an_alert_outlives_a_failed_scrape_and_ends_with_a_series_that_does_not_return(tiny_detector: Detector) -> None:
    fault = [50.0, 51.0]
    async with sender(tiny_detector, grace=300) as prometheus:
        series = [up(i, *[1.0, 1.1] * 40, *fault, start=NOW - 81_000) for i in (1, 2)]
        calm = up(3, *[1.0, 1.1] * 41, start=NOW - 81_000)
        await prometheus.write(*series, calm)
        sweeper = prometheus.scorer.sweeper(3600)
        now = NOW / 1000
        sweeper._clock = lambda: now
        await sweeper.sweep()
        for _ in range(2):  # sent again it gives no more time
            await prometheus.write(*(up(i, MARKER, start=NOW + 1000) for i in (1, 2, 3)))
            prometheus.scorer._clock = lambda: NOW / 1000 + 100
        assert await ends(prometheus) == []
        assert name(3) not in await prometheus.store.due("tiny", 1e11, 10), "without an alert it has ended at once"
        await prometheus.write(up(1, *fault, start=NOW + 110_000))
        now += 299
        await sweeper.sweep()
        assert await ends(prometheus) == []
        now += 2
        await sweeper.sweep()
        assert await ends(prometheus) == [name(2)]
        assert (await prometheus.last(name(1))).state_version == 84
        opened = [told.stream_id for told in map(decoded, prometheus.store.log) if told.what == "opened" and told.kind == "anomaly"]
        assert opened == [name(1), name(2)], "no alert opened again"
        await prometheus.write(up(1, MARKER, start=NOW + 120_000))
        now += 500
        await sweeper.sweep()
        assert await ends(prometheus) == [name(2), name(1)]


async def ends(prometheus: Sender) -> list[str]:
    """Streams whose anomaly was resolved because they ended."""
    return [told.stream_id for told in map(decoded, prometheus.store.log) if (told.kind, told.resolution) == ("anomaly", "ended")]


async def test_a_stale_marker_older_than_the_last_sample_ends_nothing(prometheus: Sender) -> None:
    await prometheus.write(up(1, *[1.0, 1.1] * 40, start=NOW - 79_000))
    prometheus.at(NOW + 2000)
    await prometheus.write(Sent(up(1).labels, [(NOW + 1000, MARKER), (NOW + 2000, 1.0)]))
    assert await prometheus.store.due("tiny", 1e11, 10) == [name(1)]
    await prometheus.write(up(9, MARKER))  # of a stream that never was
    assert (await prometheus.write(up(1, 1.0, start=NOW + 3000))).status_code == 204


async def test_a_counter_is_scored_by_its_increase_per_second_and_survives_a_restart_of_the_target(prometheus: Sender) -> None:
    labels, stream = {"__name__": "requests_total", "job": "a"}, 'requests_total{job="a"}'
    actual = []
    big = 2.0**40
    for time, value in ((0, big), (10, big + 50), (20, big + 150), (30, 40.0), (40, float("nan")), (50, 60.0), (60, 80.0), (80, 80.0)):
        await prometheus.write(Sent(labels, [(NOW + time * 1000, value)]))
        last = await prometheus.last(stream)
        actual.append(last.contributors[0].actual if last.contributors else None)
    # The first reading has no increase, nor has one after a missing one; a counter that fell began again at 0.
    assert actual == [None, 5.0, 10.0, 4.0, None, None, 2.0, 0.0]


async def test_a_counter_is_differenced_within_a_request_as_over_several(tiny_detector: Detector) -> None:
    series = Sent({"__name__": "requests_total"}, [(NOW + n * 1000, float(n * n)) for n in range(1500)])
    async with sender(tiny_detector) as whole, sender(tiny_detector) as parts:
        await whole.write(series)
        for n in range(0, 1500, 250):
            await parts.write(Sent(series.labels, series.samples[n : n + 250]))
            await parts.write(Sent(series.labels, series.samples[n : n + 250]))  # again: not differenced twice
        one, other = await whole.last("requests_total"), await parts.last("requests_total")
    assert one == other
    assert one.contributors[0].actual == 1499**2 - 1498**2


async def test_a_counter_that_ended_begins_anew(prometheus: Sender) -> None:
    labels = {"__name__": "requests_total"}
    await prometheus.write(Sent(labels, [(NOW, 100.0), (NOW + 1000, 110.0), (NOW + 2000, MARKER)]))
    await prometheus.write(Sent(labels, [(NOW + 60_000, 500.0)]))
    assert (await prometheus.last("requests_total")).imputed == ["value"]


async def test_the_type_that_version_2_says_decides_what_a_counter_is(prometheus: Sender) -> None:
    for time, value in ((0, 5.0), (1000, 7.0)):
        gauge = Sent({"__name__": "queue_count"}, [(NOW + time, value)], type=2)
        counter = Sent({"__name__": "queued"}, [(NOW + time, value)], type=1)
        await prometheus.write(gauge, counter, version=2)
    assert (await prometheus.last("queue_count")).contributors[0].actual == 7.0
    assert (await prometheus.last("queued")).contributors[0].actual == 2.0


async def test_rules_choose_and_name_what_is_scored(tiny_detector: Detector, tmp_path: Path) -> None:
    rules = tmp_path / "relabel.yml"
    rules.write_text("relabel_configs:\n- {source_labels: [job], regex: node, action: keep}\n- {regex: replica, action: labeldrop}\n")
    async with sender(tiny_detector, rules) as prometheus:
        reply = await prometheus.write(up(1, 1.0, job="node", replica="a"), up(2, 1.0, 2.0, job="other"))
        assert (reply.status_code, reply.headers[SAMPLES_WRITTEN]) == (204, "3")
        assert (await prometheus.last('up{instance="h1",job="node"}')).state_version == 1
        assert (prometheus.count("scored"), prometheus.unscored("rule")) == (1, 2)


@pytest.mark.parametrize("version", [1, 2])
async def test_what_is_not_scored_is_accepted_and_counted(prometheus: Sender, version: int) -> None:
    ours = Sent({"__name__": "yhat", "for": "up", "model": "tiny"}, [(NOW, 1.0)])
    reply = await prometheus.write(ours, Sent({"__name__": "h"}, [], histograms=2, exemplars=3), version=version)
    headers = reply.headers
    assert reply.status_code == 204
    written = [headers[f"x-prometheus-remote-write-{what}-written"] for what in ("samples", "histograms", "exemplars")]
    assert written == ["1", "2", "3"]
    assert [prometheus.unscored(what) for what in ("own", "histogram", "exemplar")] == [1, 2, 3]
    assert prometheus.count("scored") == 0


async def test_an_empty_request_and_metadata_alone_are_taken(prometheus: Sender) -> None:
    assert (await prometheus.post(PATH, content=pack(body_1([])), headers=V1)).status_code == 204
    assert (await prometheus.post(PATH, content=pack(body_1([], metadata=3)), headers=V1)).status_code == 204
    assert prometheus.unscored("metadata") == 3


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/x-protobuf;proto=prometheus.WriteRequest"}, 204),
        ({"content-type": "application/x-protobuf; proto=prometheus.WriteRequest"}, 204),
        ({"content-type": "application/x-protobuf;proto=io.prometheus.write.v3.Request"}, 415),
        ({"content-type": "application/json"}, 415),
        ({"content-type": ""}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "zstd"}, 415),
    ],
)
async def test_only_snappy_and_the_two_messages_are_read(prometheus: Sender, headers: Mapping[str, str], status: int) -> None:
    reply = await prometheus.post(PATH, content=pack(body_1([up(1, 1.0)])), headers={**V1, **headers})
    assert reply.status_code == status, reply.text
    assert prometheus.count("scored") == (status == 204)


async def test_without_content_encoding_it_is_snappy(prometheus: Sender) -> None:
    headers = {"content-type": "application/x-protobuf"}
    assert (await prometheus.post(PATH, content=pack(body_1([up(1, 1.0)])), headers=headers)).status_code == 204


async def test_a_body_that_cannot_be_read_is_a_400(prometheus: Sender) -> None:
    for content in (b"", b"\x00\x01\x02", pack(b"\x0a\xff\xff"), body_1([up(1, 1.0)])):
        reply = await prometheus.post(PATH, content=content, headers=V1)
        assert_refused(reply, 400, "The body")


async def test_a_snappy_bomb_is_refused_before_it_is_unpacked(prometheus: Sender) -> None:
    bomb = pack(bytes(1_500_000))
    assert len(bomb) < 100_000
    assert_refused(await prometheus.post(PATH, content=bomb, headers=V1), 413, "1500000 bytes when unpacked, over 100000")
    assert_refused(await prometheus.post(PATH, content=bytes(100_001), headers=V1), 413, "over 100000 bytes")
    many = pack(body_1([Sent({"a": f"{i}"}, [(NOW, 1.0)]) for i in range(3001)]))
    assert_refused(await prometheus.post(PATH, content=many, headers=V1), 413, "More than 3000 series")


async def test_a_model_of_several_features_is_told_to_be_the_wrong_one(tmp_path: Path) -> None:
    detector = Detector.load(build_tiny(tmp_path, features=("a", "b")))
    async with sender(detector) as prometheus:
        assert_refused(await prometheus.write(up(1, 1.0)), 422, "has 2 features", "?model=NAME")
        assert_refused(await prometheus.write(up(1, 1.0), path=f"{PATH}?model=none"), 404, "No model 'none'")
