"""Traces as a real OTLP/HTTP receiver gets them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from bench.receiver import Receiver
from service import tracing
from service.app import create_app
from service.errors import BadSetting
from service.settings import Settings
from tests.doors import serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(Receiver):
    """What an OpenTelemetry collector is to its senders."""

    @property
    def bodies(self) -> list[bytes]:
        return [posted.body for posted in self.posted]

    @property
    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for sent in requests for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    @property
    def resource(self) -> dict[str, str]:
        [first, *_] = ExportTraceServiceRequest.FromString(self.bodies[0]).resource_spans
        return {entry.key: entry.value.string_value for entry in first.resource.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as listening:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listening.port}")
        yield listening


def attributes(span: Span) -> dict[str, str | int]:
    return {entry.key: entry.value.string_value or entry.value.int_value for entry in span.attributes}


async def test_a_trace_goes_from_the_door_to_the_commit(
    collector: Collector, tiny_model_path: Path, empty_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(model=tiny_model_path, redis_url=empty_server) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "client-7"}
        event = {"stream_id": "secret", "values": {"value": 123456.5}}
        assert (await client.post("/v1/events", json=event, headers=headers)).status_code == 200
    [request], [batch] = collector.named("POST /v1/events"), collector.named("batch")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.kind == Span.SPAN_KIND_SERVER
    about = attributes(request)
    assert (about["http.route"], about["http.response.status_code"], about["onset.request"]) == ("/v1/events", 200, "client-7")
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(request.trace_id, request.span_id)]
    assert batch.trace_id != request.trace_id
    assert attributes(batch)["onset.events"] == 1
    for name in ("load", "step", "commit"):
        [part] = collector.named(name)
        assert (part.trace_id, part.parent_span_id) == (batch.trace_id, batch.span_id)
        assert batch.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano <= batch.end_time_unix_nano
    assert request.start_time_unix_nano <= batch.start_time_unix_nano
    assert batch.end_time_unix_nano <= request.end_time_unix_nano
    assert collector.resource["service.name"] == "onset"


async def test_a_batch_has_a_link_to_each_of_its_requests(collector: Collector, tiny_model_path: Path, empty_server: str) -> None:
    async with serving(model=tiny_model_path, redis_url=empty_server) as client:
        posts = [client.post("/v1/events", json={"stream_id": str(i), "values": {"value": 1.0}}) for i in range(8)]
        assert {reply.status_code for reply in await asyncio.gather(*posts)} == {200}
    requests = {span.span_id for span in collector.named("POST /v1/events")}
    links = [link.span_id for span in collector.named("batch") for link in span.links]
    assert len(requests) == 8
    assert sorted(links) == sorted(requests)
    assert len(collector.named("batch")) < 8


async def test_no_span_says_a_streams_name_or_a_value(collector: Collector, tiny_model_path: Path, empty_server: str) -> None:
    async with serving(model=tiny_model_path, redis_url=empty_server) as client:
        body = {"values": {"value": 123456.5}}
        await client.post("/v1/streams/plant/secret-7/events", json=body)
        await client.get("/v1/streams/plant/secret-7")
        await client.post("/v1/streams/plant/secret-7/accept")
    names = {span.name for span in collector.spans}
    assert {f"POST /v1/streams/{{stream_id}}{rest}" for rest in ("/events", "/accept")} | {"GET /v1/streams/{stream_id}"} <= names
    assert not any(b"secret" in content or b"123456" in content for content in collector.bodies)


async def test_a_failed_request_is_an_error_of_its_span(collector: Collector, tiny_model_path: Path, empty_server: str) -> None:
    app = create_app(Settings(model=tiny_model_path, redis_url=empty_server, canary_seconds=0))
    async with app.state.service.running(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        app.state.service._closing = True
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.post("/v1/events", json={"stream_id": "a"})).status_code == 422
    [ready], [refused] = collector.named("GET /health/ready"), collector.named("POST /v1/events")
    assert ready.status.code == ready.status.STATUS_CODE_ERROR
    assert (refused.status.code, attributes(refused)["http.response.status_code"]) == (refused.status.STATUS_CODE_UNSET, 422)


async def test_a_batch_of_a_queue_is_linked_to_where_it_was_received(
    collector: Collector, tiny_model_path: Path, empty_server: str
) -> None:
    with redis.Redis.from_url(empty_server) as queue:
        queue.xadd("onset:events", {"event": json.dumps({"stream_id": "a", "values": {"value": 1.0}})})
        async with serving(model=tiny_model_path, redis_url=empty_server, streams_input="onset:events"):
            async with asyncio.timeout(20):
                while not await asyncio.to_thread(queue.xlen, "onset:results"):  # noqa: ASYNC110 - the server tells nobody
                    await asyncio.sleep(0.02)
    [received], [batch] = collector.named("receive redis_streams"), collector.named("batch")
    assert received.kind == Span.SPAN_KIND_CONSUMER
    assert attributes(received)["messaging.batch.message_count"] == 1
    assert [link.span_id for link in batch.links] == [received.span_id]


async def test_without_the_extra_the_service_says_what_to_install(
    collector: Collector, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(BadSetting, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set, but .* install onset\[otel\]"):
        async with serving(model=tiny_model_path, data_dir=tmp_path):
            pass


@pytest.mark.parametrize("environment", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}])
async def test_without_an_endpoint_nothing_is_traced(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not tracing.wanted()
    async with tracing.exporting("1"):
        assert tracing.span("load") is tracing.span("step")
        assert tracing.origin().span is None


def test_without_an_endpoint_the_exporter_is_not_even_imported() -> None:
    code = "import sys, service.app; print([name for name in sys.modules if name.startswith('opentelemetry.exporter')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
