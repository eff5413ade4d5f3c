"""OTLP's door for logs over HTTP: every record is scored once, and an exporter is answered as the protocol says."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse

from service import otlp
from service.api import Door
from service.detector import Detector
from service.errors import BadEvent, BadSetting
from service.events import MAX_MESSAGE_LENGTH
from service.otlplogs import Record
from service.otlpwire import MAX_NAMING, Origin
from service.shipped import Shipping
from tests.log_doors import LINES, MAX_LINES, NOW, Shipper, shipper
from tests.pushes import export, record
from tests.test_otlplogs import as_json

NS = NOW * 10**9
PROTOBUF, JSON = {"content-type": "application/x-protobuf"}, {"content-type": "application/json"}
SHOP = {"service.name": "shop", "k8s.pod.name": "shop-7d9f", "host.name": "node-1"}


def at_otlp(app: FastAPI, shipping: Shipping, door: Door) -> None:
    door.add_post(app, otlp.PATH, otlp.Otlp(shipping, otlp.Streams(""), MAX_LINES).export, "otlp_logs")


@pytest.fixture
async def exporter(log_detector: Detector) -> AsyncIterator[Shipper]:
    async with shipper(at_otlp, otlp.DOOR, log_detector) as client:
        yield client


def records(*lines: str, start: int = NS) -> list[Any]:
    return [record(line, start + i * 10**9) for i, line in enumerate(lines)]


async def send(client: Shipper, request: ExportLogsServiceRequest, *, path: str = otlp.PATH) -> ExportLogsServiceResponse:
    reply = await client.post(path, content=request.SerializeToString(), headers=PROTOBUF)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-protobuf"), reply.content
    answer = ExportLogsServiceResponse()
    answer.ParseFromString(reply.content)
    return answer


def status_of(reply: httpx.Response) -> tuple[int, str]:
    """Of a google.rpc.Status in protobuf, whose first two fields are a code below 128 and a text."""
    assert reply.headers["content-type"] == "application/x-protobuf"
    content = reply.content
    assert (content[0], content[2]) == (0x08, 0x12)
    start = 4 if content[3] < 128 else 5
    return content[1], content[start:].decode()


async def test_every_record_is_an_event_of_the_stream_that_service_and_pod_name(exporter: Shipper) -> None:
    answer = await send(exporter, export(*records(*LINES), resource=SHOP))
    assert not answer.HasField("partial_success")
    last = await exporter.last("shop/shop-7d9f")
    assert (last.state_version, last.timestamp, exporter.count("scored")) == (4, NOW + 3, 4)


@pytest.mark.parametrize("packed", [False, True])
async def test_json_is_answered_in_json_and_gzip_is_read(exporter: Shipper, packed: bool) -> None:
    content, headers = as_json(export(*records(*LINES), resource=SHOP)), dict(JSON)
    if packed:
        content, headers = gzip.compress(content), headers | {"content-encoding": "gzip"}
    reply = await exporter.post(otlp.PATH, content=content, headers=headers)
    assert (reply.status_code, reply.headers["content-type"], reply.json()) == (200, "application/json", {})
    assert (await exporter.last("shop/shop-7d9f")).state_version == 4


async def test_a_request_sent_again_is_scored_once(exporter: Shipper) -> None:
    request = export(*records(*LINES), *[record(f"Took {i} ms for /", NS + 10**10) for i in range(30)], resource=SHOP)
    for _ in range(3):
        assert not (await send(exporter, request)).HasField("partial_success")
    assert (exporter.count("scored"), exporter.count("duplicate")) == (34, 68)


async def test_records_that_can_never_be_taken_are_rejected_and_the_others_scored(exporter: Shipper) -> None:
    await send(exporter, export(record(LINES[0], NS), resource=SHOP))
    long, future = record("x" * (MAX_MESSAGE_LENGTH + 1), NS + 1), record("x", NS + 10**14)
    answer = await send(exporter, export(record("old", NS - 10**6), long, future, record(LINES[1], NS + 10**6), resource=SHOP))
    told = answer.partial_success
    assert told.rejected_log_records == 2
    for part in ("1 ahead of this clock (the first: timestamp ", "1 older than"):
        assert part in told.error_message
    assert (exporter.count("scored"), exporter.count("rejected"), exporter.count("late"), exporter.cut) == (3, 1, 1, 1)
    reply = await exporter.post(otlp.PATH, content=as_json(export(record("older", NS - 10**6), resource=SHOP)), headers=JSON)
    assert reply.json()["partialSuccess"]["rejectedLogRecords"] == "1"


async def test_a_record_without_a_name_for_its_stream_is_rejected_with_what_is_wanted(exporter: Shipper) -> None:
    answer = await send(exporter, export(record(LINES[0], NS)))
    assert answer.partial_success.rejected_log_records == 1
    assert "none of service.name, k8s.pod.name" in answer.partial_success.error_message


async def test_lines_are_bodies_whatever_they_are_or_else_the_events_name(exporter: Shipper) -> None:
    said = [record({"msg": "a", "n": 1}, NS), record(None, NS + 1, event_name="user.login"), record(7, NS + 2), record(None, NS + 3)]
    assert not (await send(exporter, export(*said, resource=SHOP))).HasField("partial_success")
    assert (exporter.count("scored"), exporter.blank) == (3, 1)


async def test_a_record_without_time_is_of_now_and_has_no_identity(exporter: Shipper) -> None:
    for _ in range(2):
        await send(exporter, export(record(LINES[0]), resource=SHOP))
    assert exporter.count("scored") == 2
    await send(exporter, export(record(LINES[0], observed_time_unix_nano=NS + 1), resource=SHOP))
    assert (await exporter.last("shop/shop-7d9f")).timestamp == pytest.approx(NOW)


async def test_errors_are_a_status_in_the_format_of_the_request(exporter: Shipper) -> None:
    reply = await exporter.post(otlp.PATH, content=b"\xff", headers=PROTOBUF)
    assert (reply.status_code, *status_of(reply)[:1]) == (400, 3)
    assert "ExportLogsServiceRequest" in status_of(reply)[1]
    reply = await exporter.post(otlp.PATH, content=b"[", headers=JSON)
    assert (reply.status_code, reply.json()["code"]) == (400, 3)
    reply = await exporter.post(otlp.PATH, content=b"", headers={"content-type": "text/plain"})
    assert (reply.status_code, reply.json()["code"]) == (415, 3)
    reply = await exporter.post(f"{otlp.PATH}?model=none", content=b"", headers=PROTOBUF)
    assert (reply.status_code, status_of(reply)[0]) == (404, 5)
    assert exporter.metrics.registry.get_sample_value("onset_refused_total", {"reason": "malformed"}) == 4
    many = export(*[record("x", NS)] * (MAX_LINES + 1), resource=SHOP)
    reply = await exporter.post(otlp.PATH, content=many.SerializeToString(), headers=PROTOBUF)
    assert (reply.status_code, status_of(reply)[0]) == (413, 8)


async def test_while_the_store_does_not_answer_the_exporter_is_to_send_again(exporter: Shipper) -> None:
    exporter.store.commits = 0
    request = export(*records(*LINES), resource=SHOP)
    reply = await exporter.post(otlp.PATH, content=request.SerializeToString(), headers=PROTOBUF)
    assert (reply.status_code, reply.headers["retry-after"], status_of(reply)[0]) == (503, "1", 14)
    assert exporter.count("failed") == 4
    exporter.store.commits = 1e9
    await send(exporter, request)
    assert exporter.count("scored") == 4


async def test_no_model_that_takes_lines_is_said(tiny_detector: Detector) -> None:
    async with shipper(at_otlp, otlp.DOOR, tiny_detector) as client:
        reply = await client.post(otlp.PATH, content=b"{}", headers=JSON)
        assert (reply.status_code, reply.json()["message"]) == (422, "No model that takes log lines is loaded (ONSET_MODEL).")


def named(template: str = "", *, scope: str = "", attributes: dict[str, Any] | None = None, **resource: Any) -> str:
    dotted = {name.replace("__", "."): value for name, value in resource.items()}
    made = Record(Origin(dotted, scope, {"library": "x"}), NS, "INFO", "b", attributes or {}, "ab" * 16, "cd" * 8, "login")
    return otlp.Streams(template).of(made)


def test_a_stream_is_service_and_place_or_what_the_template_says() -> None:
    assert named(service__name="shop") == "shop"
    assert named(service__name="shop", host__name="h") == "shop/h"
    assert named(service__name="shop", host__name="h", k8s__pod__name="p") == "shop/p"
    assert named(attributes={"log.file.name": "a.log"}) == "a.log"
    assert named("{service.name}/{trace_id}", service__name="shop") == "shop/" + "ab" * 16
    assert named("{severity}-{event_name}-{scope}-{library}", scope="s") == "INFO-login-s-x"
    assert named("{code}", attributes={"code": 7}, code=8) == "7", "the record's own attribute comes first"
    assert len(named(service__name="s" * 300)) == 256
    with pytest.raises(BadSetting, match="ONSET_OTLP_STREAM cannot be used"):
        otlp.Streams("{a} }")


async def test_the_reply_to_json_with_nothing_in_it_is_json(exporter: Shipper) -> None:
    reply = await exporter.post(otlp.PATH, content=json.dumps({"resourceLogs": []}), headers=JSON)
    assert (reply.status_code, reply.json()) == (200, {})


async def test_a_name_that_many_records_share_is_refused_where_it_is_too_long(exporter: Shipper) -> None:
    """It was gone through for each: a request of 2 MB, most of it one name, took half a minute."""
    answer = await send(exporter, export(*records(*LINES), resource={"service.name": "x" * (MAX_NAMING + 1)}))
    assert answer.partial_success.rejected_log_records == len(LINES)
    assert f"at most {MAX_NAMING}" in answer.partial_success.error_message
    for template, origin in (("{a}", Origin({"a": "x" * (MAX_NAMING + 1)})), ("{scope}", Origin({}, "x" * (MAX_NAMING + 1)))):
        with pytest.raises(BadEvent, match=f"at most {MAX_NAMING}"):
            otlp.Streams(template).of(Record(origin, NS, "", "a line", {}, "", "", ""))
