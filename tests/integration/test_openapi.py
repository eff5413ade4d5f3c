"""The served OpenAPI document is true: fuzzed from it, the service answers without 5xx and as the document says."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, assume, given, settings

from bench.prompb import Sent, body_1
from service import openapi
from service.app import create_app
from service.asking import per_event
from service.prompb import pack
from service.settings import Settings
from tests import local
from tests.pushes import export, export_metrics, gauge, point, push_protobuf, record
from tests.tiny import tiny_manifest
from tests.tiny_log import build_tiny_log, tiny_log_manifest

ROUTES = {
    ("POST", "/v1/events"),
    ("POST", "/v1/streams/{stream_id}/events"),
    ("POST", "/v1/streams/{stream_id}/accept"),
    ("GET", "/v1/streams"),
    ("GET", "/v1/streams/{stream_id}"),
    ("DELETE", "/v1/streams/{stream_id}"),
    ("POST", "/v1/sources/{name}"),
    ("POST", "/v1/sources/{name}/{topic}"),
    ("POST", "/api/v2/write"),
    ("POST", "/write"),
    ("POST", "/api/v1/write"),
    ("POST", "/v1/metrics"),
    ("GET", "/v1/alerts"),
    ("GET", "/v1/alerts/count"),
    ("POST", "/v1/alerts/acknowledge"),
    ("POST", "/v1/alerts/accept"),
    ("GET", "/v1/alerts/{alert_id}"),
    ("POST", "/v1/alerts/{alert_id}/acknowledge"),
    ("DELETE", "/v1/alerts/{alert_id}/acknowledge"),
    ("GET", "/v1/mutes"),
    ("PUT", "/v1/mutes/{name}"),
    ("DELETE", "/v1/mutes/{name}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/policy"),
    ("PUT", "/v1/policy"),
    ("DELETE", "/v1/policy"),
    ("GET", "/v1/log-level"),
    ("PUT", "/v1/log-level"),
    ("DELETE", "/v1/log-level"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
}
LOG_DOORS = {("POST", "/loki/api/v1/push"), ("POST", "/v1/logs"), ("GET", "/v1/patterns")}
"""They need a model that takes lines."""
LIVE = {("GET", "/v1/live"), ("GET", "/v1/live/{stream_id}")}
"""Their answers do not end: they are fuzzed up to the first event."""


@pytest.fixture(scope="module")
def served(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the whole app over real HTTP, with its embedded store, in a thread."""
    with serving(tiny_model_path, tmp_path_factory.mktemp("data")) as url:
        yield url


@contextmanager
def serving(model: Path, data_dir: Path, **settings: Any) -> Iterator[str]:
    with local.served(create_app(Settings(model=model, data_dir=data_dir, port=0, **settings))) as port:
        yield f"http://127.0.0.1:{port}"


@schemathesis.serializer("application/x-protobuf")
def a_request_in_protobuf(context: Any, value: Any) -> bytes:
    """No schema describes protobuf: a readable body, whatever was drawn."""
    path = context.case.operation.path
    if path == "/loki/api/v1/push":
        return pack(push_protobuf({'{app="shop"}': [(1_790_000_000_000_000_000, "Took 3 ms for /")]}))
    if path == "/v1/logs":
        return bytes(export(record("Took 3 ms for /", 1_790_000_000_000_000_000), resource={"service.name": "shop"}).SerializeToString())
    if path == "/v1/metrics":
        return bytes(
            export_metrics(gauge("up", point(1.0, 1_790_000_000_000_000_000)), resource={"service.name": "gw"}).SerializeToString()
        )
    return pack(body_1([Sent({"__name__": "up"}, [(1_790_000_000_000, 1.0)])]))


@pytest.fixture(scope="module")
def schema(served: str) -> Any:
    return schemathesis.openapi.from_url(f"{served}/openapi.json")


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_every_operation_answers_as_documented(schema: Any, method: str, path: str) -> None:
    @settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def check(case: Any) -> None:
        assume(_means_a_rate(case.body))
        if path == "/v1/mutes/{name}" and method == "PUT":  # no schema can say which times are ahead
            case.body |= {"starts_at": None, "ends_at": time.time() + 60}
        case.call_and_validate(timeout=10)

    check()


@pytest.fixture(scope="module")
def schema_of_lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of the same app with a model of log lines; no schema says which times are ahead of now."""
    with serving(build_tiny_log(tmp_path_factory.mktemp("log")), tmp_path_factory.mktemp("data"), max_future_seconds=1e11) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), sorted(LOG_DOORS))
def test_every_door_for_log_lines_answers_as_documented(schema_of_lines: Any, method: str, path: str) -> None:
    @settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=schema_of_lines[path][method].as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(timeout=10)

    check()


@pytest.mark.parametrize(("method", "path"), sorted(LIVE))
def test_live_answers_begin_as_documented(served: str, schema: Any, method: str, path: str) -> None:
    post_events(served)
    document = local.get(f"{served}/openapi.json").json()

    @settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def check(case: Any) -> None:
        request = case.as_transport_kwargs(base_url=served)
        with local.stream(method, request["url"], params=request["params"], headers=dict(request["headers"]), timeout=10) as answer:
            documented = document["paths"][path][method.lower()]["responses"]
            assert str(answer.status_code) in documented, request
            content = documented[str(answer.status_code)]["content"]
            media_type = answer.headers["content-type"].partition(";")[0]
            assert media_type in content
            if answer.status_code == 200:
                name, data = next(events_of(answer))
                valid(document, content[media_type]["x-events"][name], data)
            else:
                answer.read()
                valid(document, content[media_type]["schema"], answer.json())

    check()


def test_every_live_event_is_as_documented(served: str) -> None:
    document = local.get(f"{served}/openapi.json").json()
    for path, names in (("/v1/live", ["fleet", "changes"]), ("/v1/live/{stream_id}", ["stream", "events"])):
        post_events(served)
        schemas = document["paths"][path]["get"]["responses"]["200"]["content"]["text/event-stream"]["x-events"]
        assert list(schemas) == names
        with local.stream("GET", served + path.format(stream_id="live/1"), timeout=10) as answer:
            sent = list(itertools.islice(events_of(answer), 2))
        assert [name for name, _ in sent] == names
        for name, data in sent:
            valid(document, schemas[name], data)
            assert any(data[key] for key in ("new", "rows", "features", "t") if key in data)


def post_events(served: str) -> None:
    events = [{"stream_id": "live/1", "values": {"value": value}} for value in (1.0, 1.1, 99.0)]
    assert local.post(f"{served}/v1/events", json=events).status_code == 200


def events_of(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Names and data of server-sent events."""
    rest = b""
    for chunk in answer.iter_bytes():
        *blocks, rest = (rest + chunk).split(b"\n\n")
        for block in blocks:
            name, _, data = block.partition(b"\n")
            if name.startswith(b"event: "):
                yield name.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))


def valid(document: dict[str, Any], schema: dict[str, Any], data: Any) -> None:
    """Raises ValidationError."""
    jsonschema_rs.Draft202012Validator(schema | {"components": document["components"]}).validate(data)


def _means_a_rate(body: Any) -> bool:
    """What no schema can say of a policy: its words and its cadence together mean a rate that can be asked for."""
    if not isinstance(body, dict) or "false_alarms" not in body:
        return True
    try:
        return per_event(body["false_alarms"], body["cadence_seconds"]) > 0
    except (KeyError, ValueError, OverflowError):
        return False


def test_the_examples_of_a_policy_are_taken_and_undone(served: str) -> None:
    content = local.get(f"{served}/openapi.json").json()["paths"]["/v1/policy"]["put"]["requestBody"]["content"]
    for example in content["application/json"]["examples"].values():
        assert local.put(f"{served}/v1/policy", json=example["value"]).status_code == 200
    asked = local.get(f"{served}/v1/policy").json()
    assert (asked["strict"], asked["alpha"], asked["false_alarms"]) == (True, pytest.approx(1 / 2016), "1 per week")
    undone = local.delete(f"{served}/v1/policy").json()
    assert (undone["strict"], undone["alpha"], undone["false_alarms"]) == (False, 0.001, None)


def test_every_route_is_documented(served: str) -> None:
    paths = local.get(f"{served}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, item in paths.items() for method in item} == ROUTES | LOG_DOORS | LIVE
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [path for path in paths if path.replace("{alert_id}", "{id}") not in page] == []


def test_what_a_page_of_another_site_asks_for_is_refused_as_documented(served: str) -> None:
    for path, item in local.get(f"{served}/openapi.json").json()["paths"].items():
        for method, operation in item.items():
            if method != "get":
                refused = local.request(method, served + path, headers={"origin": "https://evil.example", "sec-fetch-site": "cross-site"})
                assert refused.status_code == 403, path
                assert "403" in operation["responses"], path


def test_the_page_at_docs_needs_nothing_from_elsewhere(served: str) -> None:
    page = local.get(f"{served}/docs")
    assert page.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert "://" not in page.text
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) == 3
    for file in files:
        answer = local.get(page.url.join(file))
        assert answer.status_code == 200, file
        assert len(answer.content) > 500
    assert local.get(page.url.join("openapi.json")).json()["info"]["title"] == "Onset"


def test_the_examples_of_the_document_are_scored(served: str) -> None:
    paths = local.get(f"{served}/openapi.json").json()["paths"]
    for path in ("/v1/events", "/v1/streams/{stream_id}/events"):
        content = paths[path]["post"]["requestBody"]["content"]
        url = served + path.format(stream_id="pump-7")
        for example in 2 * list(content["application/json"]["examples"].values()):
            answer = local.post(url, json=example["value"])
            assert answer.status_code == 200
            for result in answer.json() if isinstance(example["value"], list) else [answer.json()]:
                assert result["state_version"] > 0
                assert not result["late"]
        lines = local.post(url, content=content["application/x-ndjson"]["example"], headers={"content-type": "application/x-ndjson"})
        assert lines.status_code == 200
        assert [json.loads(line)["duplicate"] for line in lines.text.splitlines()] == [True, True]


def test_what_is_written_beside_a_field_is_in_the_document(served: str) -> None:
    components = local.get(f"{served}/openapi.json").json()["components"]["schemas"]
    for name, field, says in (
        ("Result", "p_value", "while the stream is normal"),
        ("Event", "timestamp", "RFC 3339"),
        ("AlertReply", "severity", "The highest it has reached"),
        ("AlertReply", "summary", "One sentence"),
        ("LiveShown", "bits", "8 = an alert begins"),
    ):
        assert says in components[name]["properties"][field]["description"]


def test_generators_of_clients_read_the_document(served: str, schema_of_lines: Any) -> None:
    """They stop at a boolean in the place of a schema and at a constant that may be left out, and take what has a default for sent."""
    for document in (local.get(f"{served}/openapi.json").json(), schema_of_lines.raw_schema):
        for schema in schemas(document):
            assert not isinstance(schema.get("items"), bool)
            assert "type" in schema or "enum" not in schema, schema
            for name, inner in (schema["properties"] if isinstance(schema.get("properties"), dict) else {}).items():
                assert "default" not in inner, name
                assert "const" not in inner or name in schema["required"], name


def test_kinds_of_events_have_names_of_their_own_where_models_take_several() -> None:
    manifests = [tiny_manifest(("value",), "one"), tiny_manifest(("flow", "level"), "two"), tiny_log_manifest("web")]
    made = openapi.document(FastAPI(), manifests, live=False)
    titles = [schema["title"] for schema in schemas(made["components"]) if isinstance(schema.get("title"), str)]
    assert sorted(titles) == sorted(set(titles))
    taken: list[Any] = [{"values": {"value": 1.0}}, {"values": {"flow": 1.0, "level": None}}, {"message": "Took 3 ms for /"}, {"end": True}]
    refused: list[Any] = [{"values": {"flow": 1.0, "value": 1.0}}, {"end": False}, {"message": " "}]
    named: dict[str, Any] = {"stream_id": "a"}
    for component, beside in (("Event", named), ("StreamEvent", {})):
        schema = made["components"]["schemas"][component]
        assert all(list(kind) == ["$ref"] for kind in schema["anyOf"])
        for event in taken:
            valid(made, schema, event | beside)
        for event in refused:
            with pytest.raises(jsonschema_rs.ValidationError):
                valid(made, schema, event | beside)


def test_features_may_be_called_as_words_of_a_schema_are() -> None:
    features = ("properties", "items", "enum", "default", "type")
    made = openapi.document(FastAPI(), [tiny_manifest(features)], live=False)
    values = made["components"]["schemas"]["Event"]["properties"]["values"]
    assert tuple(values["properties"]) == features
    valid(made, values, dict.fromkeys(features, 1.0))


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every object within a document, among them its schemas."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from schemas(inner)
