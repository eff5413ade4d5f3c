"""Sources of kind http: what other senders have is mapped as declared, scored once, and answered so that they do what is right."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI

from service import http_sources
from service.detector import Detector
from service.events import Result
from service.http_sources import HttpSources
from service.intake import DoorLimits
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.sources.options import HttpSource
from tests.doors import Store, door_over

NOW = 1_790_000_000
MAX_EVENTS, MAX_BODY, MAX_STREAMS = 50, 20_000, 30
TELEGRAF = "cpu,host=a,cpu=cpu0 idle=91.5,busy=3i"
OUTCOMES = ("scored", "duplicate", "late", "rejected", "failed")


class Sender(httpx.AsyncClient):
    """Sends to sources in this process."""

    store: Store
    scorer: Scorer
    metrics: Metrics

    async def last(self, stream_id: str) -> Result:
        return await self.scorer.streams.last(stream_id)

    def counts(self, name: str) -> tuple[float, ...]:
        values = [self.metrics.registry.get_sample_value("onset_events_total", {"door": name, "outcome": outcome}) for outcome in OUTCOMES]
        return tuple(value or 0 for value in values)


@asynccontextmanager
async def sending(detector: Detector, **payloads: dict[str, Any]) -> AsyncIterator[Sender]:
    """To sources of these names."""
    metrics, store = Metrics(), Store()
    limits = Limits(max_streams=MAX_STREAMS, max_future_seconds=10_000)
    scorer = Scorer(detector, Policy(), store, metrics, limits, clock=lambda: NOW)
    limit = DoorLimits(max_body_bytes=MAX_BODY, max_batch_events=MAX_EVENTS, max_inflight_bytes=3_000_000)
    app, door = FastAPI(), door_over({detector.name: scorer}, store, metrics, limit)
    declared = [HttpSource.model_validate({"name": name, "payload": payload}) for name, payload in payloads.items()]
    sources = HttpSources(door, declared, MAX_EVENTS, metrics, clock=lambda: NOW)
    for path, handler in (
        (http_sources.PATH, sources.post),
        (http_sources.TOPIC_PATH, sources.post),
        (http_sources.INFLUX_PATH, sources.write),
        (http_sources.INFLUX_1_PATH, sources.write),
    ):
        door.add_post(app, path, handler, path)
    async with Sender(transport=httpx.ASGITransport(app), base_url="http://onset") as client:
        client.store, client.metrics, client.scorer = store, metrics, scorer
        yield client
    store.commits = math.inf
    await scorer.drain(2)


@pytest.fixture
async def sender(tiny_detector: Detector) -> AsyncIterator[Sender]:
    async with sending(
        tiny_detector,
        telegraf={"format": "influx"},
        batches={
            "each": ["metrics", "fields"],
            "stream_id": "{payload.tags.host}/{payload.name}/{name}",
            "timestamp": "payload.timestamp",
            "values": "value",
        },
        plant={
            "topic": "{line}/{machine}",
            "stream_id": "{line}/{machine}",
            "timestamp": "t",
            "timestamp_unit": "ms",
            "values": "v",
            "good": {"q": True},
        },
        plain={},
        events={"format": "cloudevents", "stream_id": "{ce.subject}/{headers.X-Line}"},
    ) as client:
        yield client


def became(answer: httpx.Response) -> tuple[int, ...]:
    """Events scored, duplicate, late, without a reading, rejected."""
    assert answer.status_code == 200, answer.text
    taken = answer.json()
    return tuple(taken[name] for name in ("scored", "duplicate", "late", "no_reading", "rejected"))


def at(line: str, seconds: int) -> str:
    return f"{line} {seconds}000000000\n"


async def test_every_field_of_a_series_of_influx_is_a_stream_and_what_is_sent_again_is_scored_once(sender: Sender) -> None:
    body = at(TELEGRAF, NOW) + at('disk,host=a,path=/ used=5i,mode="rw"', NOW) + at(TELEGRAF, NOW + 10)
    assert became(await sender.post("/v1/sources/telegraf", content=body)) == (5, 0, 0, 1, 0)
    packed, encoding = gzip.compress(body.encode()), {"content-encoding": "gzip"}
    assert became(await sender.post("/v1/sources/telegraf", content=packed, headers=encoding)) == (0, 5, 0, 1, 0)
    last = await sender.last("cpu,cpu=cpu0,host=a/idle")
    assert (last.state_version, last.timestamp) == (2, NOW + 10)
    assert (await sender.last("disk,host=a,path=//used")).state_version == 1
    assert became(await sender.post("/v1/sources/telegraf", content=at(TELEGRAF, NOW + 5))) == (0, 0, 2, 0, 0)
    assert sender.counts("telegraf") == (5, 5, 2, 0, 0)
    assert sender.metrics.registry.get_sample_value("onset_source_no_reading_total", {"source": "telegraf"}) == 2


async def test_lists_within_a_list_are_gone_through_as_telegraf_sends_them_in_json(sender: Sender) -> None:
    metric = {"name": "cpu", "tags": {"host": "a"}, "fields": {"idle": 91.5, "busy": 3, "state": "on"}, "timestamp": NOW}
    body = {"metrics": [metric, metric | {"tags": {"host": "b"}}, metric | {"timestamp": NOW + 10}]}
    assert became(await sender.post("/v1/sources/batches", json=body)) == (6, 0, 0, 3, 0)
    assert (await sender.last("a/cpu/idle")).timestamp == NOW + 10
    assert (await sender.last("b/cpu/busy")).state_version == 1


async def test_what_follows_the_name_in_the_address_is_the_topic_and_the_key(sender: Sender) -> None:
    reading = {"v": 71.3, "q": True, "t": NOW * 1000 + 250}
    assert became(await sender.post("/v1/sources/plant/line-1/press%207", json=reading)) == (1, 0, 0, 0, 0)
    assert (await sender.last("line-1/press 7")).timestamp == NOW + 0.25
    assert became(await sender.post("/v1/sources/plant/line-1/press%207", json=reading | {"q": False, "t": 5e12})) == (0, 0, 0, 1, 0)
    assert became(await sender.post("/v1/sources/plain/pump-7/temperature", json={"values": {"value": 3}})) == (1, 0, 0, 0, 0)
    assert (await sender.last("pump-7/temperature")).state_version == 1
    refused = await sender.post("/v1/sources/plant", json=reading)
    assert (refused.status_code, refused.json()["field"]) == (422, "topic")


async def test_a_binary_cloud_event_has_its_attributes_in_headers_of_any_case(sender: Sender) -> None:
    headers = {"CE-SpecVersion": "1.0", "ce-id": "1", "ce-source": "s", "ce-subject": "press", "ce-type": "reading", "X-Line": "7"}
    for expected in ((1, 0, 0, 0, 0), (0, 1, 0, 0, 0)):
        assert became(await sender.post("/v1/sources/events", json={"value": 4}, headers=headers)) == expected
    assert (await sender.last("press/7")).state_version == 1


async def test_some_that_can_never_be_taken_are_named_and_the_others_are_scored(sender: Sender) -> None:
    body = at("m f=1", NOW) + "m f=abc\n" + f"m g=2 {NOW}\n" + at("m h=3", NOW + 20_000) + at("m i=4", NOW)
    with structlog.testing.capture_logs() as logs:
        answers = [await sender.post("/v1/sources/telegraf", content=body) for _ in range(2)]
    assert [became(answer) for answer in answers] == [(2, 0, 0, 0, 3), (0, 2, 0, 0, 3)]
    problems = answers[0].json()["problems"]
    assert [(problem["index"], problem["status"], problem["field"]) for problem in problems] == [
        (1, 422, "line"),
        (2, 422, "timestamp"),
        (3, 409, "timestamp"),
    ]
    assert "it looks like s" in problems[1]["detail"]
    assert sender.counts("telegraf") == (2, 2, 0, 6, 0)
    assert [(line["event"], line["source"], line["rejected"], line["of"]) for line in logs] == [("events_rejected", "telegraf", 3, 5)]
    assert "at character 3" in logs[0]["reason"]


async def test_of_many_the_first_are_told(sender: Sender) -> None:
    answer = await sender.post("/v1/sources/telegraf", content=at("m f=1", NOW) + "bad\n" * 40)
    assert became(answer) == (1, 0, 0, 0, 40)
    assert [problem["index"] for problem in answer.json()["problems"]] == list(range(1, 11))
    assert len(answer.content) < 4096


async def test_where_nothing_can_be_taken_the_sender_is_told_by_the_status(sender: Sender) -> None:
    for content, status, field in (("bad\n" * 3, 422, "line"), (at("m f=1", NOW + 20_000), 409, "timestamp")):
        answer = await sender.post("/v1/sources/telegraf", content=content)
        assert (answer.status_code, answer.json()["field"], answer.json()["index"]) == (status, field, 0)
    assert "None of 3 events" in (await sender.post("/v1/sources/telegraf", content="bad\n" * 3)).json()["detail"]
    for content in ("", '{"a', '{"values": {"value": "hot"}, "stream_id": "a"}'):
        answer = await sender.post("/v1/sources/plain", content=content)
        assert answer.status_code == 422
        assert answer.json()["detail"].endswith(".")
    assert sender.counts("plain") == (0, 0, 0, 3, 0)
    for source, body in (("telegraf", "# nothing\n"), ("plain", "[]")):
        assert became(await sender.post(f"/v1/sources/{source}", content=body)) == (0, 0, 0, 0, 0)


async def test_results_are_told_where_they_are_asked_for(sender: Sender) -> None:
    body = at('m f=1,note="x"', NOW) + "bad\n"
    [result, passed, bad] = (await sender.post("/v1/sources/telegraf?results=true", content=body)).json()
    assert (result["stream_id"], result["state_version"], result["event_id"]) == ("m/f", 1, None)
    assert (passed["type"], passed["index"]) == ("urn:onset:no-reading", 1)
    assert (bad["status"], bad["index"]) == (422, 2)


async def test_what_a_store_that_goes_away_leaves_is_sent_again_and_scored_once(sender: Sender) -> None:
    body = "".join(at(f"m f={i}", NOW + i) for i in range(40))
    sender.store.commits = 0
    answer = await sender.post("/v1/sources/telegraf", content=body)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    sender.store.commits = math.inf
    assert became(await sender.post("/v1/sources/telegraf", content=body)) == (40, 0, 0, 0, 0)
    assert became(await sender.post("/v1/sources/telegraf", content=body)) == (0, 40, 0, 0, 0)
    assert (await sender.last("m/f")).state_version == 40
    assert sender.counts("telegraf") == (40, 40, 0, 0, 40)


async def test_what_has_no_time_is_known_by_the_key_of_its_request(sender: Sender) -> None:
    body = [{"stream_id": "a", "values": {"value": 1}}, {"stream_id": "a", "values": {"value": 1}}]
    for expected in ((2, 0, 0, 0, 0), (0, 2, 0, 0, 0)):
        assert became(await sender.post("/v1/sources/plain", json=body, headers={"Idempotency-Key": "k-1"})) == expected
    assert became(await sender.post("/v1/sources/plain", json=body)) == (2, 0, 0, 0, 0)
    assert became(await sender.post("/v1/sources/plain", json=body)) == (2, 0, 0, 0, 0)


async def test_influx_clients_of_both_versions_are_answered_as_they_expect(sender: Sender) -> None:
    for address in ("/api/v2/write?bucket=telegraf&org=o", "/write?db=telegraf&u=a&p=b&consistency=one"):
        assert (await sender.post(address)).status_code == 204  # Home Assistant asks so whether it may write
        assert (await sender.post(address, content=at(TELEGRAF, NOW))).status_code == 204
        for unit, moment in (("s", NOW), ("ms", NOW * 1000), ("us", NOW * 10**6), ("ns", NOW * 10**9)):
            assert (await sender.post(f"{address}&precision={unit}", content=f"{TELEGRAF} {moment}")).status_code == 204
        partly = await sender.post(address, content=at(TELEGRAF, NOW) + f"{TELEGRAF} {NOW}")
        assert partly.status_code == 400
        assert partly.json()["message"] == partly.json()["error"]
        assert partly.json()["message"].startswith("partial write: 2 of 4 events are refused. The first: ")
        assert (await sender.post(address, content="bad")).json()["error"].startswith("partial write: 1 of 1")
        unknown_unit = await sender.post(f"{address}&precision=h", content=at(TELEGRAF, NOW))
        assert (unknown_unit.status_code, unknown_unit.json()["code"]) == (422, "unprocessable entity")
        sender.store.commits = 0
        away = await sender.post(address, content=at(TELEGRAF, NOW + 1))
        assert (away.status_code, away.headers["retry-after"], away.json()["code"]) == (503, "1", "unavailable")
        sender.store.commits = math.inf
    assert sender.counts("telegraf")[:2] == (2, 22)
    for address, status in (("/api/v2/write?bucket=nope", 404), ("/api/v2/write", 404), ("/write?db=plain", 422)):
        assert (await sender.post(address, content=at(TELEGRAF, NOW))).status_code == status
    unknown = await sender.post("/api/v2/write?bucket=telegraf&db=telegraf", content=at(TELEGRAF, NOW))
    assert (unknown.status_code, "'db' is no parameter here" in unknown.json()["message"]) == (422, True)


async def test_the_unit_of_a_line_is_the_declared_one_where_the_request_names_none(tiny_detector: Detector) -> None:
    async with sending(tiny_detector, gateway={"format": "influx", "timestamp_unit": "ms"}) as sender:
        assert (await sender.post("/write?db=gateway", content=f"m f=1 {NOW}123")).status_code == 204
        assert (await sender.last("m/f")).timestamp == NOW + 0.123
        assert (await sender.post("/write?db=gateway&precision=s", content=f"m f=1 {NOW + 1}")).status_code == 204
        assert (await sender.last("m/f")).timestamp == NOW + 1


async def test_a_request_has_the_limits_of_the_other_doors(sender: Sender) -> None:
    many = await sender.post("/v1/sources/telegraf", content="".join(at(TELEGRAF, NOW + i) for i in range(26)))
    assert (many.status_code, many.json()["type"]) == (413, "urn:onset:too-large")
    assert (await sender.post("/v1/sources/telegraf", content="#" * (MAX_BODY + 1))).status_code == 413
    packed = gzip.compress(b"#" * (MAX_BODY + 1))
    assert (await sender.post("/v1/sources/telegraf", content=packed, headers={"content-encoding": "gzip"})).status_code == 413
    assert (await sender.post("/v1/sources/telegraf", content="x", headers={"content-encoding": "br"})).status_code == 415
    for asked, field in (("model=other", "model"), ("results=yes", "results"), ("precision=s", "precision")):
        refused = await sender.post(f"/v1/sources/telegraf?{asked}", content=at(TELEGRAF, NOW))
        assert (refused.status_code, refused.json()["field"]) == (422, field)
    unknown = await sender.post("/v1/sources/nope", content="")
    assert (unknown.status_code, unknown.json()["type"]) == (404, "urn:onset:unknown-source")
    assert "there is batches, events, plain, plant, telegraf" in unknown.json()["detail"]
    streams = await sender.post("/v1/sources/telegraf", content="".join(at(f"m f{i}=1", NOW) for i in range(MAX_STREAMS + 1)))
    assert became(streams) == (MAX_STREAMS, 0, 0, 0, 1)
    assert (await sender.post("/v1/sources/telegraf", content=at("m another=1", NOW))).status_code == 429


async def test_log_lines_come_as_agents_send_records(log_detector: Detector) -> None:
    records = [{"date": NOW + i + 0.5, "log": f"Took {i}.5 ms for /cart", "host": "web-1"} for i in range(3)]
    async with sending(log_detector, fluentbit={"stream_id": "host", "message": "log", "timestamp": "date"}) as sender:
        assert became(await sender.post("/v1/sources/fluentbit", json=records)) == (3, 0, 0, 0, 0)
        lines = "\n".join(json.dumps(record) for record in records)
        headers = {"content-type": "application/x-ndjson"}
        assert became(await sender.post("/v1/sources/fluentbit", content=lines, headers=headers)) == (0, 3, 0, 0, 0)
        assert (await sender.last("web-1")).state_version == 3


async def test_halves_of_characters_are_refused_in_words_that_can_be_sent(sender: Sender) -> None:
    events = [{"stream_id": f"a{name}", "values": {"value": 1}, "timestamp": NOW} for name in ("", "\ud800")]
    answer = await sender.post("/v1/sources/plain", content=json.dumps(events))
    assert became(answer) == (1, 0, 0, 0, 1)
    assert (await sender.post("/v1/sources/plain", content=json.dumps(events[1:]))).status_code == 422
    body = json.dumps({"metrics": [{"name": "\ud800", "tags": {"host": "a"}, "fields": {"x": 1}, "timestamp": NOW}] * 2})
    refused = await sender.post("/v1/sources/batches", content=body)
    assert (refused.status_code, "None of 2 events" in refused.json()["detail"]) == (422, True)
