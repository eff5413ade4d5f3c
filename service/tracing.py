"""Which request, which batch: for the log lines, and for OpenTelemetry's traces where OTEL_EXPORTER_OTLP_ENDPOINT names a collector.

    POST /v1/events            a trace of the client's, or a new one        receive SOURCE     the same for a batch of a queue
    batch                      a trace of its own, with a link to each request in it
      ├─ load   ├─ step   └─ commit

A batch is of many requests, so it is nobody's child. Without that variable no exporter is imported and a span is a shared object that does
nothing. What a span is told: model, door, numbers of events; no values and no streams' names.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from service.errors import BadSetting

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext, Tracer

REQUEST: ContextVar[str | int] = ContextVar("request", default="")
"""Id of the request under way: the client's, or a number of ours; "" = none is."""
BATCH: ContextVar[str | int] = ContextVar("batch", default="")
REQUEST_HEADER = b"x-request-id"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

STREAM_PATH = re.compile(r"(/v1/streams/)(.+?)(/events|/accept)?")
"""An address with a stream's name."""
_VISIBLE = re.compile(rb"[!-~]{1,128}")
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()
_process = secrets.token_hex(4)
_numbers = itertools.count(1)

Asgi = Callable[[Any, Any, Any], Awaitable[None]]
T = TypeVar("T")


class Origin(NamedTuple):
    """Where a piece of a batch came from."""

    request: str | int
    span: SpanContext | None


class Piece(Protocol):
    """What a batch is made of."""

    @property
    def events(self) -> int: ...
    @property
    def origin(self) -> Origin: ...


class _Tracing:
    """The process's tracer; None while tracing is off."""

    tracer: Tracer | None = None


def wanted() -> bool:
    """Whether the environment asks for traces."""
    return any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


@contextlib.asynccontextmanager
async def exporting(version: str) -> Any:
    """Send traces as long as it is open, if they are wanted. Raises BadSetting without the extra `otel`."""
    if not wanted():
        yield
        return
    provider = _provider(version)
    _Tracing.tracer = provider.get_tracer("onset", version)
    try:
        yield
    finally:
        _Tracing.tracer = None
        await asyncio.to_thread(provider.shutdown)  # it sends what it still has


def origin() -> Origin:
    """Of what is under way here, for `batch`."""
    return Origin(REQUEST.get(), None if _Tracing.tracer is None else _api().get_current_span().get_span_context())


def on() -> bool:
    """Whether traces are sent."""
    return _Tracing.tracer is not None


def numbered(do: Callable[..., T], *given: Any) -> T:
    """`do(*given)` as a request by an id of ours."""
    token = REQUEST.set(next(_numbers))
    try:
        return do(*given)
    finally:
        REQUEST.reset(token)


def span(name: str) -> AbstractContextManager[Any]:
    """A part of what is under way."""
    return _NOTHING if _Tracing.tracer is None else _Tracing.tracer.start_as_current_span(name)


def batch(model: str, pieces: Iterable[Piece]) -> AbstractContextManager[Any]:
    """A batch of these; its id is in the log lines from here on."""
    BATCH.set(next(_numbers))
    if _Tracing.tracer is None:
        return _NOTHING
    spans = {
        piece.origin.span.span_id: piece.origin.span for piece in pieces if piece.origin.span is not None and piece.origin.span.is_valid
    }
    events = sum(piece.events for piece in pieces)
    attributes: dict[str, Any] = {"onset.model": model, "onset.events": events, "onset.batch": shown(BATCH.get())}
    links = [_api().Link(found) for found in spans.values()]
    context = importlib.import_module("opentelemetry.context").Context()
    return _Tracing.tracer.start_as_current_span("batch", context=context, links=links, attributes=attributes)


def shown(id_: str | int) -> str:
    """An id as people see it; numbers of ours with the process's own part before them."""
    return f"{_process}-{id_}" if isinstance(id_, int) else id_


@contextmanager
def receiving(source: str, partition: str, entries: int) -> Iterator[None]:
    """A batch of a queue, from here to where its entries are acknowledged."""
    REQUEST.set(next(_numbers))
    if _Tracing.tracer is None:
        yield
        return
    attributes: dict[str, Any] = {
        "messaging.system": source,
        "messaging.destination.partition.id": partition,
        "messaging.batch.message_count": entries,
    }
    with _Tracing.tracer.start_as_current_span(f"receive {source}", kind=_api().SpanKind.CONSUMER, attributes=attributes):
        yield


async def request(app: Asgi, scope: Any, receive: Any, send: Any) -> None:
    """Let `app` answer an HTTP request, by an id: the client's X-Request-ID, or one of ours."""
    id_: str | int = next(_numbers)
    for name, value in scope["headers"]:
        if name == REQUEST_HEADER and _VISIBLE.fullmatch(value):
            id_ = value.decode()
    REQUEST.set(id_)
    if _Tracing.tracer is None:
        await app(scope, receive, send)
    else:
        await _traced(_Tracing.tracer, app, scope, receive, send)


async def _traced(tracer: Tracer, app: Asgi, scope: Any, receive: Any, send: Any) -> None:
    api = _api()
    propagator = importlib.import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
    parent = propagator.extract({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
    route, method = _route(scope["path"]), scope["method"]
    attributes = {"http.request.method": method, "http.route": route, "url.scheme": scope["scheme"], "onset.request": shown(REQUEST.get())}
    with tracer.start_as_current_span(f"{method} {route}", context=parent, kind=api.SpanKind.SERVER, attributes=attributes) as found:

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                found.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    found.set_status(api.StatusCode.ERROR)
            await send(message)

        await app(scope, receive, sending)


def _route(path: str) -> str:
    """The path without a stream's name: there are as many as streams, and they may be nobody's business."""
    match = STREAM_PATH.fullmatch(path)
    return f"{match[1]}{{stream_id}}{match[3] or ''}" if match else path if len(path) < 64 else "(long)"


def _provider(version: str) -> TracerProvider:
    try:
        trace = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        name = next(name for name in ENDPOINTS if os.environ.get(name))
        raise BadSetting(f"{name} is set, but traces need OpenTelemetry: install onset[otel], or unset it.") from error
    about = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "onset"), "service.version": version, "service.instance.id": _process}
    provider: TracerProvider = trace.TracerProvider(resource=resources.Resource.create(about), shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    return provider


def _api() -> Any:
    return importlib.import_module("opentelemetry.trace")


def of_span() -> dict[str, str]:
    """trace_id and span_id of what is under way, as log lines name them."""
    if _Tracing.tracer is None:
        return {}
    found = _api().get_current_span().get_span_context()
    return {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"} if found.is_valid else {}
