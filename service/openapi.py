"""The OpenAPI document: FastAPI's for its own routes, and by hand for the plain ones, with the schemas msgspec decodes by."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from service import alerts, control, events, http_sources, logs, loki, mutes, otlp, patterns, problems
from service.api import MAX_NOTE, MAX_PAGE, MAX_TOP, VISIBLE
from service.artifact import Manifest
from service.asking import ALPHA_RANGE, LARGEST_ALPHA, PERIODS, SMALLEST_ALPHA
from service.bodies import Format
from service.console import messages
from service.console.live import STATES
from service.console.messages import LIVE_EVENTS
from service.console.pages import DEFAULT_SHOWN, MOST_SHOWN
from service.control import PolicyReply
from service.errors import OnsetError
from service.events import (
    EARLIEST_SECONDS,
    FLOAT32_MAX,
    LATEST_SECONDS,
    MAX_MESSAGE_LENGTH,
    MAX_NAME_LENGTH,
    SEVERITIES,
    TENANT_HEADER,
    Event,
    Result,
)
from service.logs import LEVELS, MAX_SECONDS, LevelReply
from service.problems import MEDIA_TYPE, TABLE, Problem
from service.remote_write import MESSAGE_1, MESSAGE_2, PATH
from service.results import TOP
from service.shipped import JSON
from service.stores import CURSOR_DIGITS
from service.stores.book import SCANNED
from service.wire import PROTOBUF

_BUNDLE = b"SwaggerUIBundle({"
_LINES_AS_THEY_ARE = b"""
    plugins: [system => ({fn: {getSampleSchema: (schema, type, config, example) =>
        type === "application/x-ndjson" && typeof example === "string" ? example
        : system.getSystem().fn.jsonSchema202012.getSampleSchema(schema, type, config, example)}})],"""
"""Swagger UI takes every type with json in its name for JSON, shows a text as a string of it, in quotes, and sends that."""
_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
PRINTABLE = f"^[^\\u0000-\\u001F\\u007F]{{1,{MAX_NAME_LENGTH}}}$"
CURSOR_PATTERN = f"^[0-9]{{1,{CURSOR_DIGITS}}}$"
_NOT_FRAMED = {"content-security-policy": "frame-ancestors 'none'", "x-frame-options": "DENY", "x-content-type-options": "nosniff"}
"""The page's buttons change things: nobody is led to press them within a page of somebody else."""
_COMPONENT = "#/components/schemas/{name}"
_DESCRIPTION = """Scores each event of a stream the moment it arrives, with the stream's recurrent state in Redis.

`p_value` is the chance of an event this unusual while the stream is normal; `anomaly_score = log p / log α` is above 1 where it is
rarer than asked; `alert_score` is the same where an anomaly *begins* and 0 elsewhere. Scores are null while a stream warms up."""


def document(app: FastAPI, manifests: Sequence[Manifest], *, live: bool) -> dict[str, Any]:
    """The whole document, made once; it names the features of the loaded models. `live`: whether the console is served."""
    if app.openapi_schema is None:
        spec = get_openapi(title="Onset", version=app.version, description=_DESCRIPTION, routes=app.routes)
        _, components = msgspec.json.schema_components(
            [
                Event,
                Result,
                Problem,
                http_sources.Taken,
                PolicyReply,
                LevelReply,
                alerts.AlertPage,
                alerts.AlertCount,
                alerts.Done,
                mutes.MuteList,
                patterns.PatternPage,
                *(_LIVE_DATA if live else ()),
            ],
            ref_template=_COMPONENT,
        )
        _describe(components)
        kinds = _events(components.pop("Event"), manifests)
        spec.setdefault("components", {}).setdefault("schemas", {}).update(components)
        spec["components"]["schemas"] |= {"Health": _HEALTH, "Model": _MODEL, "PolicyChange": _CHANGE} | kinds
        others = {path: item for path, item in spec.get("paths", {}).items() if not path.startswith(("/health", "/v1/models"))}
        spec["paths"] = _paths(example(manifests[0]) | {"stream_id": "example-1"}) | (_live_paths() if live else {}) | others
        _add_cross_site(spec["paths"])
        spec["servers"] = [{"url": "."}]  # where the document is, so that a proxy may move the service under a path
        _simplify(spec)
        app.openapi_schema = spec
    return app.openapi_schema


def _add_cross_site(paths: dict[str, Any]) -> None:
    """What all operations answer that change something."""
    [(status, title)] = _failures(["cross-site"])
    for item in paths.values():
        for method, operation in item.items():
            if method != "get":
                operation["responses"][str(status)] = _problem(title)


def _describe(components: dict[str, Any]) -> None:
    """Each field's docstring as its description: msgspec reads that of the class alone."""
    modules = (events, problems, http_sources, control, logs, alerts, mutes, patterns, messages)
    for name, schema in components.items():
        [struct] = {vars(module)[name] for module in modules if name in vars(module)}
        for kind in struct.__mro__[: struct.__mro__.index(msgspec.Struct)]:
            [written] = (node for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
            for field, text in pairwise(written.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    description = inspect.cleandoc(ast.literal_eval(text.value)).replace("\n", " ")
                    schema["properties"][ast.unparse(field.target)]["description"] = description


def _simplify(node: Any) -> None:
    """The same in words that generators of clients read.

    They take a property with a default for one that is always there, an `enum` without a type for anything, and stop at `items: false`,
    which says no more than `maxItems` beside it.
    """
    if isinstance(node, dict):
        if node.get("items") is False:
            del node["items"]
        if isinstance(node.get("enum"), list) and "type" not in node:
            node["type"] = "integer" if isinstance(node["enum"][0], int) else "string"
        for name, inner in node.items():
            if name == "properties" and isinstance(inner, dict):  # by name: a feature may be called as a word of the schema is
                for schema in inner.values():
                    schema.pop("default", None)
                _simplify(list(inner.values()))
            else:
                _simplify(inner)
    elif isinstance(node, list):
        for inner in node:
            _simplify(inner)


def add_docs(app: FastAPI) -> None:
    """A page over the document at /docs, whose files come from here: it works without the internet."""
    spec = importlib.util.find_spec("fastapi_swagger")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("fastapi-swagger is not installed; it holds the files of the page at /docs.")
    folder = Path(spec.submodule_search_locations[0]) / "resources"
    script, style, icon = (f"docs/{name}" for name in _ASSETS)  # relative, so that a proxy may move the service under a path

    async def page(request: object) -> Response:
        shown = get_swagger_ui_html(
            openapi_url="openapi.json",
            title="Onset: the REST API",
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
            swagger_ui_parameters={"validatorUrl": None, "displayRequestDuration": True},
        )
        return HTMLResponse(bytes(shown.body).replace(_BUNDLE, _BUNDLE + _LINES_AS_THEY_ARE, 1), headers=_NOT_FRAMED)

    app.router.routes.append(Route("/docs", page, include_in_schema=False))
    for name in _ASSETS:
        app.router.routes.append(Route(f"/docs/{name}", _file(folder / name), include_in_schema=False))


def _file(path: Path) -> Any:
    async def file(request: object) -> Response:
        return FileResponse(path, headers={"cache-control": "public, max-age=86400"})

    return file


def example(manifest: Manifest) -> dict[str, Any]:
    """An event that the model takes."""
    if manifest.kind == "log":
        return {"stream_id": "web-7", "message": "Accepted publickey for deploy from 10.0.0.7 port 52114 ssh2"}
    return {"stream_id": "pump-7", "values": dict.fromkeys(manifest.feature_names[:8], 1.0)}


def _events(schema: dict[str, Any], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The event that the loaded models take, and the same without its stream: msgspec's schema, and what features.py checks beyond it.

    Each of several kinds is a component of its own, for its name is what generated clients call it.
    """
    name = {"type": "string", "pattern": PRINTABLE}
    # Without the first and the last day that a calendar has: in some zone they are of another year.
    written = {"type": "string", "format": "date-time", "pattern": "^(?!0001-01-01|9999-12-31)"}
    time = [{"type": "number", "minimum": EARLIEST_SECONDS, "maximum": LATEST_SECONDS}, written]
    shared = schema["properties"] | {
        "stream_id": name,
        "timestamp": schema["properties"]["timestamp"] | {"anyOf": [*time, {"type": "null"}]},
        "event_id": schema["properties"]["event_id"] | {"anyOf": [name, {"type": "null"}]},
    }
    for field in ("values", "message", "end"):
        del shared[field]
    values = {f"Values-{manifest.name}": _values(manifest) for manifest in manifests if manifest.kind == "sensor"}
    kinds = _readings(shared, values) | (_lines(shared) if any(manifest.kind == "log" for manifest in manifests) else {})
    found = values if len(values) > 1 else {}
    for prefix, bodies in (("", kinds), ("Stream", {kind: _without_stream(body) for kind, body in kinds.items()})):
        own = {f"{prefix}{kind}": {"type": "object", "additionalProperties": False, **body} for kind, body in bodies.items()}
        event = {"anyOf": [_ref(kind) for kind in own]} if len(own) > 1 else own.popitem()[1]
        found |= own | {f"{prefix}Event": {"description": schema["description"], **event}}
    return found


def _values(manifest: Manifest) -> dict[str, Any]:
    """What a sensor model takes."""
    number = {"anyOf": [{"type": "number", "minimum": -FLOAT32_MAX, "maximum": FLOAT32_MAX}, {"type": "null"}]}
    return {
        "type": "object",
        "description": f"Features of model '{manifest.name}'; null or left out = missing.",
        "properties": dict.fromkeys(manifest.feature_names, number),
        "additionalProperties": False,
        "minProperties": 1,
    }


def _readings(shared: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What sensor models take, if there are any."""
    if not values:
        return {}
    properties = shared | {"values": {"anyOf": [_ref(name) for name in values]} if len(values) > 1 else next(iter(values.values()))}
    return {"Reading": {"properties": properties, "required": ["stream_id", "values"]}}


def _lines(shared: dict[str, Any]) -> dict[str, Any]:
    """What log models take: a line, or the end of a session."""
    line = {
        "message": {
            "type": "string",
            "maxLength": MAX_MESSAGE_LENGTH,
            "pattern": r"\S",
            "description": "A log line; the lines that follow its first one (a stack trace) belong to it.",
        }
    }
    end = {"end": {"type": "boolean", "const": True, "description": "The stream's session ends here: an event of its own."}}
    return {
        "LogLine": {"properties": shared | line, "required": ["stream_id", "message"]},
        "SessionEnd": {"properties": shared | end, "required": ["stream_id", "end"]},
    }


def _without_stream(body: dict[str, Any]) -> dict[str, Any]:
    properties = {name: schema for name, schema in body["properties"].items() if name != "stream_id"}
    return {"properties": properties, "required": [name for name in body["required"] if name != "stream_id"]}


_CHANGES = {
    "rate": {"summary": "False onsets per event of a normal stream", "value": {"alpha": 0.001}},
    "words": {"summary": "The same for people", "value": {"false_alarms": "1 per week", "cadence_seconds": 300}},
    "strict": {"summary": "No learning allowance for new streams", "value": {"strict": True}},
}
_STRICT = {"type": "boolean", "description": "No learning allowance for new streams."}
_CHANGE = {
    "description": "What is left out stays as it is. alpha and false_alarms say the same thing: one of them at most.",
    "anyOf": [
        {
            "type": "object",
            "required": [required],
            "properties": {
                "alpha": {
                    "type": "number",
                    "minimum": SMALLEST_ALPHA,
                    "exclusiveMaximum": LARGEST_ALPHA,
                    "description": "False onsets per event of a normal stream.",
                },
                "strict": _STRICT,
            },
            "additionalProperties": False,
        }
        for required in ("alpha", "strict")
    ]
    + [
        {
            "type": "object",
            "required": ["false_alarms"],
            "properties": {
                "false_alarms": {
                    "type": "string",
                    "pattern": f"^[0-9]+(\\.[0-9]+)? per ({'|'.join(PERIODS)})$",
                    "description": f"For each stream. With the cadence it must mean {ALPHA_RANGE} false alarms per event.",
                },
                "cadence_seconds": {
                    "type": "number",
                    "exclusiveMinimum": 0,
                    "description": "Between two events of a stream; ONSET_CADENCE_SECONDS if left out.",
                },
                "strict": _STRICT,
            },
            "additionalProperties": False,
        }
    ],
}
_DATA = [Event, Result, Problem, http_sources.Taken, PolicyReply, LevelReply]
_LIVE_DATA = [data for events in LIVE_EVENTS.values() for data in events.values()]
_HEALTH = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["ok", "unavailable"]}, "detail": {"type": "string"}},
}


def _paths(event: dict[str, Any]) -> dict[str, Any]:
    bare = {name: value for name, value in event.items() if name != "stream_id"}
    stream = _parameter("stream_id", "path", {"type": "string", "pattern": PRINTABLE}, "No control characters; may hold slashes.")
    model = _parameter("model", "query", {"type": "string"}, "Which loaded model; the default one if left out.")
    return {
        "/v1/events": {"post": _scoring("postEvents", "Score events", [model], "Event", event)},
        "/v1/streams/{stream_id}/events": {
            "post": _scoring("postStreamEvents", "Score events of one stream", [stream, model], "StreamEvent", bare)
        },
        "/v1/streams": {
            "get": _operation(
                "listStreams",
                "List streams with their last results",
                [
                    _parameter("cursor", "query", {"type": "string", "pattern": CURSOR_PATTERN}, "next_cursor of the page before."),
                    _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}, "About how many."),
                    _parameter("silent", "query", {"type": "boolean"}, "true: one page of streams silent for improbably long."),
                    model,
                ],
                {"200": _json({"type": "object", "required": ["streams", "next_cursor"], "properties": _PAGE}, "A page.")},
                ["bad-parameter", "unknown-model", "store-unavailable"],
            )
        },
        "/v1/streams/{stream_id}": {
            "get": _operation(
                "getStream",
                "The last result of a stream",
                [stream, model],
                {"200": _json(_ref("Result"), "Its last result.")},
                ["bad-parameter", "unknown-stream", "store-unavailable"],
            ),
            "delete": _operation(
                "deleteStream",
                "Forget a stream",
                [stream, model],
                {"204": {"description": "Forgotten."}},
                ["bad-parameter", "unknown-stream", "store-unavailable"],
            ),
        },
        "/v1/streams/{stream_id}/accept": {
            "post": _operation(
                "acceptStream",
                "Take what a stream is alerted about for its new normal",
                [stream, model],
                {"200": _json(_ref("Result"), "The stream, its alert closed; the same when none was open.")},
                ["bad-parameter", "unknown-stream", "state-conflict", "store-unavailable"],
            )
        },
        **_source_paths(),
        PATH: {"post": _remote_write(model)},
        loki.PATH: {"post": _loki()},
        otlp.PATH: {"post": _otlp()},
        otlp.METRICS_PATH: {"post": _otlp_metrics(model)},
        **_alert_paths(),
        **_mute_paths(),
        patterns.PATH: {"get": _patterns(model)},
        "/v1/policy": _policy_operations(),
        "/v1/log-level": _level_operations(),
        "/v1/models": {"get": _operation("listModels", "Manifests of the loaded models", [], {"200": _json(_MODELS, "The models.")}, [])},
        "/health/live": {"get": _operation("live", "Whether the process should go on", [], _HEALTH_ANSWERS, [])},
        "/health/ready": {"get": _operation("ready", "Whether events can be scored and committed", [], _HEALTH_ANSWERS, [])},
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Prometheus metrics",
                "responses": {"200": {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
            }
        },
    }


def _source_paths() -> dict[str, Any]:
    """Addresses of sources of type http, whose bodies only their senders and the declared mapping know."""
    name = _parameter(
        "name", "path", {"type": "string", "pattern": "^[a-z0-9_-]{1,64}$"}, "A source of type http, as ONSET_SOURCES has it."
    )
    topic = _parameter("topic", "path", {"type": "string", "minLength": 1}, "What payload.topic names the levels of; may hold slashes.")
    results = _parameter("results", "query", {"type": "boolean"}, "true: a result or problem for each event.")
    key = _parameter("Idempotency-Key", "header", {"type": "string", "pattern": VISIBLE}, "Gives events without an identity one.")
    each = {"type": "array", "items": {"anyOf": [_ref("Result"), _ref("Problem")]}}
    said = {"200": _json({"anyOf": [_ref("Taken"), each]}, "What became of the events.")}
    failures = ["bad-event", "future-event", "bad-parameter", "unknown-source", "too-large", "unsupported-media", "bad-body"]
    failures += ["overloaded", "too-many-streams", "store-unavailable"]
    body = {"required": True, "content": {"application/json": {"schema": {}}, "text/plain": {"schema": {"type": "string"}}}}
    paths = {}
    for path, operation, parameters in (
        (http_sources.PATH, "postToSource", [name]),
        ("/v1/sources/{name}/{topic}", "postToSourceTopic", [name, topic]),
    ):
        summary = "Score what a sender of another kind has, as its source's payload declares"
        paths[path] = {"post": _operation(operation, summary, [*parameters, results, key, _TENANT], said, failures) | {"requestBody": body}}
    lines = {"required": True, "content": {"text/plain": {"schema": {"type": "string"}, "example": "oven,line=1 temp=214.5"}}}
    fault = {"type": "object", "required": ["code", "message"], "properties": {"code": _TEXT, "message": _TEXT, "error": _TEXT}}
    answers = {"204": {"description": "Everything was taken."}}
    answers |= {str(status): _json(fault, title) for status, title in _failures(failures)}
    precision = _parameter("precision", "query", {"enum": list(http_sources.PRECISIONS)}, "Unit of the lines' times; else the source's.")
    for path, operation, own in ((http_sources.INFLUX_PATH, "influxWrite", "bucket"), (http_sources.INFLUX_1_PATH, "influx1Write", "db")):
        source = _parameter(own, "query", {"type": "string"}, "The source, whose payload has format: influx.") | {"required": True}
        summary = "Score lines that are sent as to an InfluxDB"
        paths[path] = {"post": _operation(operation, summary, [source, precision, _TENANT], answers, []) | {"requestBody": lines}}
    return paths


def _live_paths() -> dict[str, Any]:
    """Server-sent events: OpenAPI 3.1 can say of their answer that it is text, and what the text holds beside it."""
    stream = _parameter("stream_id", "path", {"type": "string", "pattern": PRINTABLE}, "No control characters; may hold slashes.")
    model = _parameter("model", "query", {"type": "string"}, "Which loaded model; the default one if left out.")
    fleet = [
        _parameter(
            "limit", "query", {"type": "integer", "minimum": 1, "maximum": MOST_SHOWN, "default": DEFAULT_SHOWN}, "Streams at most."
        ),
        _parameter("q", "query", {"type": "string", "maxLength": MAX_NAME_LENGTH}, "What a stream's name holds, whatever its case."),
        _parameter("state", "query", {"enum": list(STATES)}, "Only streams in this state."),
        model,
    ]
    feature = _parameter("feature", "query", {"type": "array", "items": {"type": "string"}}, "These; else those that carry the most.")
    of_fleet = ["bad-parameter", "unknown-model", "overloaded"]
    return {
        "/v1/live": {
            "get": _operation("liveFleet", "The streams as they are scored, the anomalous first", fleet, _live("/v1/live"), of_fleet)
        },
        "/v1/live/{stream_id}": {
            "get": _operation("liveStream", "Every event of one stream", [stream, feature, model], _live("/v1/live/{stream_id}"), of_fleet)
        },
    }


def _live(path: str) -> dict[str, Any]:
    events = {name: _ref(data.__name__) for name, data in LIVE_EVENTS[path].items()}
    named = ", ".join(f"`{name}` ({data.__name__})" for name, data in LIVE_EVENTS[path].items())
    text = {
        "type": "string",
        "description": f"Server-sent events, each with one JSON object as its data: {named}; `bye` ({{}}) at the end.",
    }
    return {"200": {"description": "An answer that does not end.", "content": {"text/event-stream": {"schema": text, "x-events": events}}}}


def _patterns(model: dict[str, Any]) -> dict[str, Any]:
    limit = _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}, "At most.")
    return _operation(
        "listPatterns",
        "Lines that a log model had no template for, by pattern, the most frequent first",
        [limit, model | {"description": "A model that reads log lines; the only one if left out."}],
        {"200": _json(_ref("PatternPage"), "New patterns since the model's file is in use, at most 1,000.")},
        ["bad-parameter", "unknown-model", "store-unavailable"],
    )


def _alert_paths() -> dict[str, Any]:
    identity = _parameter("alert_id", "path", {"type": "string", "pattern": alerts.ID}, "Of the alert.")
    several = {"type": "array", "minItems": 1, "uniqueItems": True}
    filters = [
        _parameter("status", "query", several | {"items": {"enum": list(get_args(alerts.Status))}}, "Some of these."),
        _parameter(
            "severity", "query", several | {"items": {"enum": list(SEVERITIES[1:])}}, "The highest that was reached: some of these."
        ),
    ]
    for parameter in filters:
        parameter |= {"style": "form", "explode": False}
    reply = {"200": _json(_ref("AlertReply"), "The alert.")}
    taken = ["unknown-alert", "alert-resolved", "store-unavailable"]
    post = _operation(
        "acknowledgeAlert",
        "Someone looks after an alert",
        [identity],
        reply,
        [*taken, "bad-body", "too-slow", "too-large", "unsupported-media", "bad-parameter", "overloaded"],
    )
    post["requestBody"] = {"required": True, "content": {JSON: {"schema": _ACKNOWLEDGEMENT}}}
    filters += [
        _parameter("kind", "query", {"enum": list(get_args(alerts.Kind))}, "One of them; both if left out."),
        _parameter("stream_id", "query", {"type": "string", "pattern": PRINTABLE}, "Of this stream only."),
        _parameter("q", "query", {"type": "string", "maxLength": MAX_NAME_LENGTH}, "What the stream's name holds, whatever its case."),
        _parameter("model", "query", {"type": "string"}, "Of this model only."),
        _parameter("muted", "query", {"type": "boolean"}, "true: those that no sink is told of now; false: the others."),
    ]
    return {
        "/v1/alerts": {
            "get": _operation(
                "listAlerts",
                "List alerts, the latest first",
                [
                    *filters,
                    _parameter("cursor", "query", {"type": "string", "pattern": alerts.ID}, "next_cursor of the page before."),
                    _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}, "At most."),
                ],
                {"200": _json(_ref("AlertPage"), "A page; it may have fewer alerts than asked for, or none, and yet a next_cursor.")},
                ["bad-parameter", "store-unavailable"],
            )
        },
        "/v1/alerts/count": {
            "get": _operation(
                "countAlerts",
                "How many alerts a list would have",
                [
                    *filters,
                    _parameter(
                        "limit",
                        "query",
                        {"type": "integer", "minimum": 1, "maximum": SCANNED, "default": MAX_PAGE},
                        "The counting ends, 500 at a time, where so many are found.",
                    ),
                ],
                {"200": _json(_ref("AlertCount"), "How many, and whether these are all.")},
                ["bad-parameter", "store-unavailable"],
            )
        },
        "/v1/alerts/acknowledge": {
            "post": _of_several("acknowledgeAlerts", "Someone looks after those of some alerts that nobody does yet", [])
        },
        "/v1/alerts/accept": {
            "post": _of_several(
                "acceptAlerts", "Take what some alerts are about for their streams' new normal, and acknowledge them", ["model-superseded"]
            )
        },
        "/v1/alerts/{alert_id}": {"get": _operation("getAlert", "One alert", [identity], reply, ["unknown-alert", "store-unavailable"])},
        "/v1/alerts/{alert_id}/acknowledge": {
            "post": post,
            "delete": _operation("unacknowledgeAlert", "Nobody looks after an alert any more", [identity], reply, taken),
        },
    }


def _of_several(name: str, summary: str, slugs: list[str]) -> dict[str, Any]:
    """An operation on alerts that are named by their ids."""
    operation = _operation(
        name,
        summary,
        [],
        {"200": _json(_ref("Done"), "What became of each. Safe to repeat.")},
        ["bad-body", "too-slow", "too-large", "unsupported-media", "bad-parameter", "overloaded", "store-unavailable", *slugs],
    )
    ids = {"type": "array", "minItems": 1, "maxItems": MAX_PAGE, "items": {"type": "string", "pattern": alerts.ID}}
    body = _ACKNOWLEDGEMENT | {
        "required": ["by", "ids"],
        "properties": _ACKNOWLEDGEMENT["properties"] | {"ids": ids},
        "example": {"by": "anna", "note": "power dip in hall 2", "ids": [f"019ab8f3c1d4{i:016x}" for i in (17, 18)]},
    }
    operation["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    return operation


_ACKNOWLEDGEMENT: dict[str, Any] = {
    "type": "object",
    "required": ["by"],
    "properties": {
        "by": {"type": "string", "pattern": PRINTABLE, "description": "Who looks after it."},
        "note": {"type": "string", "maxLength": MAX_NOTE},
    },
    "additionalProperties": False,
    "example": {"by": "anna", "note": "bearing ordered, watching it until Friday"},
}


def _mute_paths() -> dict[str, Any]:
    name = _parameter("name", "path", {"type": "string", "pattern": mutes.NAME}, "Of the mute, which who makes it chooses.")
    put = _operation(
        "putMute",
        "Tell nobody of some streams' alerts from one time to another, such as those of a line under maintenance",
        [name],
        {"200": _json(_ref("MuteReply"), "The mute, in place of the one that had its name. Safe to repeat.")},
        ["bad-body", "too-slow", "too-large", "unsupported-media", "bad-parameter", "overloaded", "store-unavailable"],
    )
    moment = {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "number"}], "description": "Its zone named, or since 1970."}
    named = {"type": "string", "pattern": PRINTABLE}
    body = {
        "type": "object",
        "required": ["streams", "ends_at", "by"],
        "properties": {
            "streams": {
                "type": "array",
                "minItems": 1,
                "maxItems": mutes.PATTERNS,
                "items": named,
                "description": "Whole names; * is any characters.",
            },
            "model": {"anyOf": [named, {"type": "null"}], "description": "Of this model only."},
            "starts_at": {"anyOf": [*moment["anyOf"], {"type": "null"}], "description": "Now if left out."},
            "ends_at": moment,
            "by": named | {"description": "Who says so."},
            "note": {"type": "string", "maxLength": mutes.MAX_NOTE},
        },
        "additionalProperties": False,
        "example": {"streams": ["line-3", "line-3.*"], "ends_at": "2026-11-28T16:00:00+01:00", "by": "anna", "note": "boiler inspection"},
    }
    put["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    taken = ["unknown-mute", "store-unavailable"]
    return {
        "/v1/mutes": {
            "get": _operation(
                "listMutes", "Whose alerts nobody is told of", [], {"200": _json(_ref("MuteList"), "All.")}, ["store-unavailable"]
            )
        },
        "/v1/mutes/{name}": {
            "put": put,
            "delete": _operation("deleteMute", "End a mute", [name], {"204": {"description": "It is over."}}, taken),
        },
    }


def _policy_operations() -> dict[str, Any]:
    reply = {"200": _json(_ref("PolicyReply"), "The policy in force here, and the false alarms it means.")}
    put = _operation(
        "putPolicy",
        "Change the asked false-alarm rate, on all replicas, at once",
        [],
        reply,
        ["bad-body", "too-slow", "too-large", "unsupported-media", "bad-parameter", "overloaded", "store-unavailable"],
    )
    put["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref("PolicyChange"), "examples": _CHANGES}}}
    return {
        "get": _operation("getPolicy", "The asked false-alarm rate, where it comes from, and what it means", [], reply, []),
        "put": put,
        "delete": _operation("deletePolicy", "Go back to the environment's, on all replicas", [], reply, ["store-unavailable"]),
    }


def _level_operations() -> dict[str, Any]:
    reply = {"200": _json(_ref("LevelReply"), "The level in force in the answering replica.")}
    put = _operation(
        "putLogLevel",
        "Change the level of the answering replica's log",
        [],
        reply,
        ["bad-body", "too-slow", "too-large", "unsupported-media", "bad-parameter", "overloaded"],
    )
    seconds = {
        "type": ["number", "null"],
        "exclusiveMinimum": 0,
        "maximum": MAX_SECONDS,
        "description": "Then it is the environment's again.",
    }
    properties = {"level": {"enum": list(LEVELS)}, "seconds": seconds}
    schema = {"type": "object", "properties": properties, "required": ["level"], "additionalProperties": False}
    examples = {"for ten minutes": {"value": {"level": "debug", "seconds": 600}}}
    put["requestBody"] = {"required": True, "content": {JSON: {"schema": schema, "examples": examples}}}
    return {
        "get": _operation("getLogLevel", "The level of the answering replica's log", [], reply, []),
        "put": put,
        "delete": _operation("deleteLogLevel", "Go back to the environment's level", [], reply, []),
    }


def _remote_write(model: dict[str, Any]) -> dict[str, Any]:
    count = {"schema": {"type": "integer"}}
    written = {f"X-Prometheus-Remote-Write-{what}-Written": count for what in ("Samples", "Histograms", "Exemplars")}
    operation = _operation(
        "remoteWrite",
        "Score what a Prometheus sends: remote-write 1.0 and 2.0",
        [model, _TENANT],
        {
            "204": {"description": "Everything was taken.", "headers": written},
            "400": _problem("The body cannot be read; or some samples can never be taken, and the others are scored."),
        },
        ["unsupported-media", "too-large", "bad-parameter", "overloaded", "store-unavailable", "unknown-model"],
    )
    message = {**_BINARY, "description": f"Snappy (block format) of {MESSAGE_1}, or with proto={MESSAGE_2} of that."}
    operation["requestBody"] = {"required": True, "content": {PROTOBUF: {"schema": message}}}
    return operation


def _loki() -> dict[str, Any]:
    operation = _operation(
        "lokiPush",
        "Score log lines that are pushed as to Loki",
        [_LOGS_MODEL, _TENANT],
        {
            "204": {"description": "Everything was taken: scored, a duplicate, late, or blank."},
            "400": _problem("The body cannot be read; or some lines can never be taken, and the others are scored."),
        },
        ["unsupported-media", "too-large", "bad-parameter", "overloaded", "store-unavailable", "unknown-model"],
    )
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    entry = {
        "type": "array",
        "minItems": 2,
        "maxItems": 3,
        "prefixItems": [_NANOSECONDS, {"type": "string", "description": "The line."}, {**texts, "description": "Structured metadata."}],
    }
    name = {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}
    labels = {"type": "object", "minProperties": 1, "propertyNames": name, "additionalProperties": {"type": "string", "minLength": 1}}
    stream = {
        "type": "object",
        "required": ["stream", "values"],
        "properties": {"stream": {**labels, "description": "Labels."}, "values": {"type": "array", "items": entry}},
    }
    push = {"type": "object", "required": ["streams"], "properties": {"streams": {"type": "array", "items": stream}}}
    example = {"streams": [{"stream": {"app": "shop", "host": "web-1"}, "values": [["1764144000000000000", "Took 12.5 ms for /cart"]]}]}
    message = {**_BINARY, "description": "Snappy (block format) of logproto.PushRequest."}
    operation["requestBody"] = {
        "required": True,
        "content": {JSON: {"schema": push, "example": example}, PROTOBUF: {"schema": message}},
    }
    return operation


def _otlp() -> dict[str, Any]:
    operation = _exporting("otlpLogs", "Score log records that are exported by OTLP/HTTP", _LOGS_MODEL, "rejectedLogRecords")
    example = {
        "resourceLogs": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]},
                "scopeLogs": [{"logRecords": [{"timeUnixNano": "1764144000000000000", "body": {"stringValue": "Took 12.5 ms for /cart"}}]}],
            }
        ]
    }
    value, attributes = _any_value()
    text = {"type": "string"}
    texts = dict.fromkeys(("severityText", "traceId", "spanId", "eventName"), text)
    times = dict.fromkeys(("timeUnixNano", "observedTimeUnixNano"), _NANOSECONDS)
    number = {"severityNumber": {"enum": list(range(25))}}
    record = {"type": "object", "properties": {**times, **number, **texts, "body": value, "attributes": attributes}}
    named = {"type": "object", "properties": {"name": text, "attributes": attributes}}
    scope = {"type": "object", "properties": {"scope": named, "logRecords": _list_of(record)}}
    resource = {"type": "object", "properties": {"resource": _owner(attributes), "scopeLogs": _list_of(scope)}}
    request = {"type": "object", "properties": {"resourceLogs": _list_of(resource)}}
    message = {**_BINARY, "description": "An opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest."}
    operation["requestBody"] = {
        "required": True,
        "content": {JSON: {"schema": request, "example": example}, PROTOBUF: {"schema": message}},
    }
    return operation


def _otlp_metrics(model: dict[str, Any]) -> dict[str, Any]:
    operation = _exporting("otlpMetrics", "Score points of gauges and sums that are exported by OTLP/HTTP", model, "rejectedDataPoints")
    points = [{"timeUnixNano": "1764144000000000000", "asDouble": 214.5}]
    example = {
        "resourceMetrics": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "gateway"}}]},
                "scopeMetrics": [{"metrics": [{"name": "oven.temperature", "gauge": {"dataPoints": points}}]}],
            }
        ]
    }
    _, attributes = _any_value()
    integer = {"type": "string", "pattern": "^-?[0-9]{1,18}$"}
    numbers = {"asDouble": {"type": "number"}, "asInt": integer, "flags": {"type": "integer", "enum": [0, 1]}}
    point = {"type": "object", "properties": {"timeUnixNano": _NANOSECONDS, **numbers, "attributes": attributes}}
    gauge = {"type": "object", "properties": {"dataPoints": _list_of(point)}}
    about = {"aggregationTemporality": {"type": "integer", "enum": [0, 1, 2]}, "isMonotonic": {"type": "boolean"}}
    total = {"type": "object", "properties": {"dataPoints": _list_of(point), **about}}
    metric = {"type": "object", "properties": {"name": {"type": "string"}, "gauge": gauge, "sum": total}}
    scope = {"type": "object", "properties": {"metrics": _list_of(metric)}}
    resource = {"type": "object", "properties": {"resource": _owner(attributes), "scopeMetrics": _list_of(scope)}}
    request = {"type": "object", "properties": {"resourceMetrics": _list_of(resource)}}
    message = {**_BINARY, "description": "An opentelemetry.proto.collector.metrics.v1.ExportMetricsServiceRequest."}
    operation["requestBody"] = {
        "required": True,
        "content": {JSON: {"schema": request, "example": example}, PROTOBUF: {"schema": message}},
    }
    return operation


def _exporting(name: str, summary: str, model: dict[str, Any], rejected: str) -> dict[str, Any]:
    """An operation of OTLP's, without what it is sent."""
    status = {"type": "object", "required": ["code", "message"], "properties": {"code": {"type": "integer"}, "message": {"type": "string"}}}
    partial = {
        "type": "object",
        "properties": {rejected: {"type": "string"}, "errorMessage": {"type": "string"}},
        "description": "Left out where all was taken.",
    }
    answer = {"type": "object", "properties": {"partialSuccess": partial}}
    failures = {
        str(code): {"description": f"{title} A google.rpc.Status.", "content": _either(status)}
        for code, title in _failures(
            ["bad-body", "unsupported-media", "too-large", "bad-parameter", "overloaded", "store-unavailable", "unknown-model"]
        )
    }
    taken = {"200": {"description": "Taken, in full or in part, in the request's format.", "content": _either(answer)}}
    return _operation(name, summary, [model, _TENANT], {**taken, **failures}, [])


def _any_value() -> tuple[dict[str, Any], dict[str, Any]]:
    """OTLP's AnyValue, and its attributes."""
    text = {"type": "string"}
    plain = {
        "stringValue": text,
        "boolValue": {"type": "boolean"},
        "intValue": {"type": "string", "pattern": "^-?[0-9]{1,18}$"},
        "doubleValue": {"type": "number"},
        "bytesValue": text,
    }
    inner = {"type": "object", "properties": plain, "additionalProperties": False, "description": "Another AnyValue, in fact of any kind."}
    pairs = _list_of({"type": "object", "properties": {"key": text, "value": inner}})
    of_several = {
        name: {"type": "object", "properties": {"values": values}}
        for name, values in (("arrayValue", _list_of(inner)), ("kvlistValue", pairs))
    }
    value = {"type": "object", "description": "An AnyValue: it has one of these.", "properties": {**plain, **of_several}}
    return value, _list_of({"type": "object", "properties": {"key": text, "value": value}})


def _owner(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"attributes": attributes}}


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _either(schema: dict[str, Any]) -> dict[str, Any]:
    return {JSON: {"schema": schema}, PROTOBUF: {"schema": {**_BINARY, "description": "The same message."}}}


_BINARY = {"type": "string", "format": "binary"}
_ARROW = "An IPC stream; columns stream_id, timestamp, event_id and sequence, and one of numbers for each feature. Needs the extra 'arrow'."


def _scoring(name: str, summary: str, parameters: list[Any], event_schema: str, sample: dict[str, Any]) -> dict[str, Any]:
    either = {"anyOf": [_ref("Result"), _ref("Problem")]}
    answers = {
        "200": {
            "description": "A result for each event, in order and in the shape of the request, in its format or the one Accept wants; "
            "in a bulk a refused event leaves a problem in its place.",
            "content": {
                Format.JSON.value: {"schema": {"anyOf": [_ref("Result"), {"type": "array", "items": either}]}},
                Format.NDJSON.value: {"schema": {"type": "string", "description": "One result or problem a line."}},
                Format.MSGPACK.value: {"schema": {**_BINARY, "description": "The same as in JSON."}},
                Format.ARROW.value: {
                    "schema": {
                        **_BINARY,
                        "description": "A column for each field of a result, and `problem`, which a refused row holds alone.",
                    }
                },
            },
        },
        "409": _problem("A single event older than the stream's last one, or ahead of the service's clock."),
    }
    others = ("unknown-stream", "unknown-alert", "unknown-source", "alert-resolved", "no-reading")
    slugs = [slug for _, slug, _, _ in TABLE.values() if slug not in others]
    top = _parameter(
        "top_contributors", "query", {"type": "integer", "minimum": 0, "maximum": MAX_TOP, "default": TOP}, "Features to explain by."
    )
    key = _parameter(
        "Idempotency-Key",
        "header",
        {"type": "string", "pattern": VISIBLE},
        "Gives events without event_id an identity, so that the request can be sent again.",
    )
    operation = _operation(name, summary, [*parameters, top, key, _TENANT], answers, slugs)
    event: dict[str, Any] = _ref(event_schema)
    # All are timed, so that none is late after another, whichever is tried first.
    timed = sample | {"timestamp": "2026-11-23T08:00:00Z", "event_id": "a-17"}
    two = [timed, timed | {"timestamp": "2026-11-23T08:01:00Z", "event_id": "a-18"}]
    examples = {
        "one": {"summary": "One event", "value": timed},
        "several": {"summary": "Two events with an identity, safe to send again", "value": two},
    }
    operation["requestBody"] = {
        "required": True,
        "content": {
            Format.JSON.value: {"schema": {"anyOf": [event, {"type": "array", "items": event}]}, "examples": examples},
            Format.MSGPACK.value: {"schema": {**_BINARY, "description": "The same as in JSON: a map, or an array of maps."}},
            Format.ARROW.value: {"schema": {**_BINARY, "description": _ARROW}},
            Format.NDJSON.value: {
                "schema": {"type": "string"},
                "example": "".join(msgspec.json.encode(one).decode() + "\n" for one in two),
            },
        },
    }
    return operation


def _operation(name: str, summary: str, parameters: list[Any], answers: dict[str, Any], slugs: list[str]) -> dict[str, Any]:
    responses = dict(answers)
    for status, title in _failures(slugs):
        responses.setdefault(str(status), _problem(title))
    return {"operationId": name, "summary": summary, "parameters": parameters, "responses": responses}


def _failures(slugs: list[str]) -> list[tuple[int, str]]:
    rows: list[tuple[type[OnsetError], tuple[int, str, str, int | None]]] = list(TABLE.items())
    titles: dict[int, list[str]] = {}
    for _, (status, slug, title, _) in rows:
        if slug in slugs:
            titles.setdefault(status, []).append(title)
    return [(status, "; ".join(found) + ".") for status, found in sorted(titles.items())]


def _parameter(name: str, where: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _COMPONENT.format(name=name)}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _problem(description: str) -> dict[str, Any]:
    return {"description": description, "content": {MEDIA_TYPE: {"schema": _ref("Problem")}}}


_TENANT = _parameter(
    TENANT_HEADER,
    "header",
    {"type": "string", "pattern": VISIBLE},
    "Whose turn the request takes, and whose share of the queue; without it, that of the address it comes from.",
)
_NANOSECONDS = {"type": "string", "pattern": "^[1-9][0-9]{17,18}$", "description": "Nanoseconds since 1970, of 1973 or later."}
_LOGS_MODEL = _parameter("model", "query", {"type": "string"}, "Which loaded model; if left out, the one of ONSET_LOGS_MODEL.")
_PAGE = {"streams": {"type": "array", "items": {"$ref": "#/components/schemas/Result"}}, "next_cursor": {"type": ["string", "null"]}}
_MODELS = {"type": "object", "required": ["models"], "properties": {"models": {"type": "array", "items": _ref("Model")}}}
_TEXT: dict[str, Any] = {"type": "string"}
_FEATURE = {
    "type": "object",
    "required": ["name", "unit", "role"],
    "properties": {
        "name": _TEXT,
        "unit": {"type": ["string", "null"]},
        "role": {"enum": ["scored", "context"], "description": "Context is given to the network and never scored."},
    },
}
_MODEL = {
    "type": "object",
    "description": "A loaded model: its file's manifest, of which this names what clients ask for, and how it runs here.",
    "required": ["name", "version", "kind", "features", "warmup", "sha256", "alpha", "strict", "default", "in_force"],
    "properties": {
        "name": _TEXT | {"description": "For the parameter model."},
        "version": _TEXT,
        "kind": {"enum": ["sensor", "log"], "description": "Whether it takes values or messages."},
        "description": _TEXT,
        "features": {"type": "array", "items": _FEATURE},
        "warmup": {"type": "integer", "description": "Events of a stream until it is scored."},
        "sha256": _TEXT,
        "alpha": {"type": "number", "description": "The false-alarm rate in force, per event."},
        "strict": _STRICT,
        "default": {"type": "boolean", "description": "Whether it scores where no model is named."},
        "in_force": {"type": "boolean", "description": "Whether this file is; if not, another one of its name scores, on other replicas."},
    },
}
_HEALTH_ANSWERS = {"200": _json(_ref("Health"), "Yes."), "503": _json(_ref("Health"), "No, and why.")}
