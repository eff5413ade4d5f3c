"""OTLP's door for metrics: points are read as OpenTelemetry's own library writes them, scored once, and answered as the protocol says."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest, ExportMetricsServiceResponse
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint, Sum

from service.detector import Detector
from service.errors import BadBody, TooLarge
from service.otlp import METRICS_DOOR, METRICS_PATH
from service.otlpmetrics import decode_json, decode_protobuf
from service.otlpwire import MAX_NAMING
from tests import pushes
from tests.pushes import export_metrics, gauge
from tests.test_remote_write import MAX_STREAMS, NOW, Sender, sender
from tests.tiny import build_tiny

NS = NOW * 1_000_000
PROTOBUF, JSON = {"content-type": "application/x-protobuf"}, {"content-type": "application/json"}
GATEWAY = {"service.name": "gw", "service.namespace": "plant", "service.instance.id": "i-1", "host.name": "h"}
OVEN = 'oven_temperature{instance="i-1",job="plant/gw",line_no="1"}'
CUMULATIVE, DELTA = 2, 1


@pytest.fixture
async def exporter(tiny_detector: Detector) -> AsyncIterator[Sender]:
    async with sender(tiny_detector) as client:
        yield client


def point(value: float, time: int = NS, flags: int = 0, **attributes: Any) -> NumberDataPoint:
    return pushes.point(value, time, flags, {name.replace("__", "."): said for name, said in attributes.items()})


def counter(name: str, *points: NumberDataPoint, temporality: int = CUMULATIVE, rises: bool = True) -> Metric:
    return Metric(name=name, sum=Sum(data_points=points, aggregation_temporality=temporality, is_monotonic=rises))  # type: ignore[arg-type]


def request(*metrics: Metric) -> ExportMetricsServiceRequest:
    return export_metrics(*metrics, resource=GATEWAY)


async def export(client: Sender, *metrics: Metric, path: str = METRICS_PATH) -> tuple[int, str]:
    """Sends it; the points that were rejected, and why."""
    reply = await client.post(path, content=request(*metrics).SerializeToString(), headers=PROTOBUF)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-protobuf"), reply.content
    answer = ExportMetricsServiceResponse()
    answer.ParseFromString(reply.content)
    return answer.partial_success.rejected_data_points, answer.partial_success.error_message


def count(client: Sender, outcome: str) -> float:
    return client.metrics.registry.get_sample_value("onset_events_total", {"door": METRICS_DOOR, "outcome": outcome}) or 0


@settings(max_examples=200)
@given(
    st.one_of(st.integers(-(2**53), 2**53), st.floats()), st.integers(0, 2**63), st.dictionaries(st.text("ab", max_size=3), st.text("xyz"))
)
def test_both_forms_say_what_was_sent(value: float, time: int, attributes: dict[str, Any]) -> None:
    made = request(gauge("a", point(value, time, 0, **attributes)), counter("b", point(1, 2)), counter("c", point(1, 2), temporality=DELTA))
    [first, second, third] = decode_protobuf(made.SerializeToString(), most=3).points
    for as_number in (True, False):
        content = MessageToJson(made, use_integers_for_enums=as_number).encode()
        assert repr(decode_json(content, most=3).points) == repr([first, second, third]), "NaN is no number"
    assert (first.metric, first.nanoseconds, dict(first.attributes), first.counter) == ("a", time, attributes, False)
    assert first.value == value or (math.isnan(first.value) and math.isnan(value))
    assert (second.counter, third.counter, second.origin.resource) == (True, False, GATEWAY)


@given(st.binary(max_size=200))
def test_any_bytes_are_points_or_a_bad_body(content: bytes) -> None:
    for decode in (decode_protobuf, decode_json):
        with contextlib.suppress(BadBody):
            decode(content, most=10)


def test_more_points_than_allowed_are_refused() -> None:
    made = request(gauge("a", *(point(1.0, i) for i in range(3))))
    for decode, content in ((decode_protobuf, made.SerializeToString()), (decode_json, MessageToJson(made).encode())):
        assert len(decode(content, most=3).points) == 3
        with pytest.raises(TooLarge, match="ONSET_MAX_BATCH_EVENTS"):
            decode(content, most=2)


async def test_a_point_is_a_sample_of_the_series_that_prometheus_would_name_so(exporter: Sender) -> None:
    points = [point(200.0 + i, NS + i * 10**9, line__no=1) for i in range(3)]
    assert await export(exporter, gauge("oven.temperature", *reversed(points))) == (0, "")
    last = await exporter.last(OVEN)
    assert (last.state_version, last.timestamp) == (3, NOW / 1000 + 2)
    assert last.contributors[0].actual == 202
    assert await export(exporter, gauge("oven.temperature", *points)) == (0, "")
    assert ((await exporter.last(OVEN)).state_version, count(exporter, "scored"), count(exporter, "duplicate")) == (3, 3, 3)
    reply = await exporter.post(METRICS_PATH, content=MessageToJson(request(gauge("oven.temperature", points[0]))), headers=JSON)
    assert (reply.status_code, reply.json()) == (200, {})
    assert count(exporter, "duplicate") == 4


@pytest.mark.parametrize(("per_second", "unit"), [(1, "seconds"), (1000, "milliseconds"), (10**6, "microseconds")])
async def test_a_point_whose_time_is_in_another_unit_is_refused_and_its_neighbour_scored(
    exporter: Sender, per_second: int, unit: str
) -> None:
    wrong = NS * per_second // 10**9
    rejected, why = await export(exporter, gauge("oven.temperature", point(200.0, NS, line__no=1), point(201.0, wrong, line__no=1)))
    assert rejected == 1
    assert f"time {wrong} is no time in nanoseconds since 1970: it looks like {unit}" in why
    assert (await exporter.last(OVEN)).state_version == 1


async def test_a_sum_that_only_rises_is_scored_by_its_rate_and_what_was_added_since_the_last_export_as_it_is(exporter: Sender) -> None:
    def of(temporality: int, rises: bool, name: str) -> Metric:
        points = [point(100 + 5 * i, NS + i * 10**9) for i in range(3)]
        return counter(name, *points, temporality=temporality, rises=rises)

    await export(exporter, of(CUMULATIVE, True, "pieces"), of(DELTA, True, "scrap"), of(CUMULATIVE, False, "level"))
    actual = {}
    for name in ("pieces", "scrap", "level"):
        actual[name] = (await exporter.last(f'{name}{{instance="i-1",job="plant/gw"}}')).contributors[0].actual
    assert actual == {"pieces": 5, "scrap": 110, "level": 110}


async def test_late_points_are_rejected_with_the_reason_and_their_neighbours_are_scored(exporter: Sender) -> None:
    await export(exporter, gauge("a", point(1.0, NS)))
    rejected, why = await export(exporter, gauge("a", point(1.0, NS - 10**9)), gauge("b", point(1.0, NS - 10**9)))
    assert (rejected, count(exporter, "late"), count(exporter, "scored")) == (1, 1, 2)
    assert why.startswith('1 older than the last one of their stream (the first: a{instance="i-1",job="plant/gw"}')
    reply = await exporter.post(METRICS_PATH, content=MessageToJson(request(gauge("a", point(1.0, NS - 10**9)))), headers=JSON)
    assert reply.json()["partialSuccess"]["rejectedDataPoints"] == "1"
    rejected, why = await export(exporter, *(gauge(f"m{i}", point(1.0)) for i in range(MAX_STREAMS)))
    assert rejected == 2
    assert "ONSET_MAX_STREAMS" in why


async def test_a_point_without_a_value_ends_its_series(exporter: Sender) -> None:
    await export(exporter, gauge("a", point(1.0)))
    assert await export(exporter, gauge("a", point(0.0, NS + 10**9, flags=1))) == (0, "")
    assert exporter.ended == {'a{instance="i-1",job="plant/gw"}': NOW / 1000 + 1}
    assert (await exporter.last('a{instance="i-1",job="plant/gw"}')).state_version == 1


async def test_histograms_are_counted_and_a_point_without_time_is_of_now(exporter: Sender) -> None:
    distribution = Metric(name="cycle")
    distribution.histogram.data_points.add(count=3, sum=4.5)
    assert await export(exporter, distribution, gauge("a", point(1.0, 0))) == (0, "")
    assert (exporter.unscored("histogram"), count(exporter, "scored")) == (1, 1)


async def test_rules_choose_and_name_points_as_they_do_samples(tiny_detector: Detector, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "relabel_configs: [{regex: instance|job, action: labeldrop}, {source_labels: [__onset_type__], regex: counter, action: drop}]"
    )
    async with sender(tiny_detector, rules) as exporter:
        await export(exporter, gauge("a", point(1.0)), counter("b", point(1)))
        assert (await exporter.last("a")).state_version == 1
        assert (exporter.unscored("rule"), count(exporter, "scored")) == (1, 1)


async def test_an_exporter_is_told_when_to_send_again_and_when_not(exporter: Sender, tmp_path: Path) -> None:
    exporter.store.commits = 0
    reply = await exporter.post(METRICS_PATH, content=request(gauge("a", point(1.0))).SerializeToString(), headers=PROTOBUF)
    assert (reply.status_code, reply.headers["retry-after"], reply.headers["content-type"]) == (503, "1", "application/x-protobuf")
    exporter.store.commits = math.inf
    for content, headers, status in ((b"\xff", PROTOBUF, 400), (b"[", JSON, 400), (b"", {"content-type": "text/plain"}, 415)):
        assert (await exporter.post(METRICS_PATH, content=content, headers=headers)).status_code == status
    reply = await exporter.post(METRICS_PATH, content=json.dumps({"resourceMetrics": []}), headers=JSON)
    assert (reply.status_code, reply.json()) == (200, {})
    async with sender(Detector.load(build_tiny(tmp_path, ("a", "b")))) as wide:
        reply = await wide.post(METRICS_PATH, content=b"{}", headers=JSON)
        assert (reply.status_code, reply.json()["code"]) == (422, 3)


async def test_names_that_are_too_long_are_refused_and_their_neighbours_scored(exporter: Sender) -> None:
    rejected, why = await export(exporter, gauge("m" * (MAX_NAMING + 1), point(1.0), point(2.0)), gauge("a", point(1.0)))
    assert (rejected, count(exporter, "scored")) == (2, 1)
    assert f"at most {MAX_NAMING}" in why
    made = export_metrics(gauge("a", point(1.0), point(2.0)), resource={"service.name": "x" * (MAX_NAMING + 1)})
    answer = ExportMetricsServiceResponse()
    answer.ParseFromString((await exporter.post(METRICS_PATH, content=made.SerializeToString(), headers=PROTOBUF)).content)
    assert answer.partial_success.rejected_data_points == 2
