"""OTLP's doors: POST /v1/logs and /v1/metrics take what an OpenTelemetry Collector or SDK exports over HTTP, as protobuf or JSON.

    body ─► records (otlplogs.py) ─► stream ids, lines ─► shipped.py ─► ExportLogsServiceResponse, in the request's format
    body ─► points (otlpmetrics.py) ─► series (names.py) ─► samples.py ─► ExportMetricsServiceResponse

    status   when                                                                                   the exporter
    200      the request was taken. rejected_log_records (rejected_data_points) counts those that   goes on
             were not scored and never can be (late ones too), error_message says why
    400      the body cannot be read                                                                drops it
    413 415  over a limit; neither of the two formats                                               drops it
    422      it names no model that takes lines, and there is none to take                          drops it
    429 503  the queue is full; the store does not answer, or other replicas were faster            sends all of it again

Errors are a google.rpc.Status. The line is the record's body: text as it is, what has a structure as JSON; without body, its event name.
A point is a sample of the series that Prometheus would make of it, without endings for units and totals: names with _ in place of what
no name may have, the labels job (service.name, behind service.namespace if there is one) and instance (service.instance.id), and its
attributes. Its time in ms is its identity.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
import numpy as np
from starlette.responses import Response

from service import otlpmetrics
from service.api import Door
from service.errors import BadEvent, OnsetError, TooSlow, UnsupportedMedia
from service.features import of_another_unit
from service.intake import Incoming
from service.metrics import Metrics
from service.names import NAME, Names, Series, bounded
from service.otlplogs import Record, decode_json, decode_protobuf
from service.otlpmetrics import Point
from service.otlpwire import encode_response, encode_status, naming, text_of
from service.problems import Problem, partly_written, problem_of
from service.prompb import STALE, Label, Written
from service.samples import Samples, feature_of
from service.shipped import EARLIEST, JSON, Naming, Shipped, Shipping, Tally, beside
from service.wire import PROTOBUF

DOOR, METRICS_DOOR = "otlp", "otlp_metrics"
PATH, METRICS_PATH = "/v1/logs", "/v1/metrics"
SERVICE, NAMESPACE, INSTANCE = "service.name", "service.namespace", "service.instance.id"
PLACES = ("k8s.pod.name", "container.name", "host.name", "log.file.path", "log.file.name")
"""Attributes of which the first that a record has says where it comes from."""

CODES = {400: 3, 404: 5, 413: 8, 415: 3, 422: 3, 429: 8, 503: 14}
"""HTTP status → google.rpc.Code: INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE."""

_METRIC, _LABEL = re.compile(r"^(?=[0-9])|[^a-zA-Z0-9_:]"), re.compile(r"^(?=[0-9])|[^a-zA-Z0-9_]")


class Streams:
    """Records → stream ids: service and place (`checkout/checkout-7d9f`), or a template of attributes.

    A reference is an attribute of the record, its scope or its resource, the first that has it; or trace_id, span_id, severity,
    event_name, scope.
    """

    def __init__(self, template: str) -> None:
        """`template` is ONSET_OTLP_STREAM, "" = service and place. Raises BadSetting."""
        self._naming = Naming("ONSET_OTLP_STREAM", template) if template else None

    def of(self, record: Record) -> str:
        """Raises BadEvent."""
        if self._naming is not None:
            return self._naming.name(lambda name: _reference(record, name), "a record")
        place = next((found for name in PLACES if (found := _attribute(record, name))), "")
        parts = [part for part in (_attribute(record, SERVICE), place) if part]
        if not parts:
            wanted = ", ".join((SERVICE, *PLACES))
            raise BadEvent(f"A record has none of {wanted} to name its stream by: set ONSET_OTLP_STREAM.", "attributes")
        return bounded("/".join(parts))


class Otlp:
    """The route's handler. At most `most` records a request."""

    def __init__(self, shipping: Shipping, streams: Streams, most: int) -> None:
        self._shipping, self._streams, self._most = shipping, streams, most

    async def export(self, request: Incoming) -> Response:
        """Score what an exporter sends."""
        return await _exported(request, self._shipping.door, self._take)

    async def _take(self, request: Incoming, media: str) -> Response:
        started, tally = time.perf_counter(), Tally()
        decode = decode_protobuf if media == PROTOBUF else decode_json
        async with self._shipping.door.sent(request, None, self._shipping.model.of(request)) as sent:
            shipped, count = await beside(partial(self._read, decode, sent.content, tally), len(sent.content))
            await self._shipping.score(sent, shipped, tally)
        self._shipping.answered(time.perf_counter() - started)
        return _answer(tally, count, media)

    def _read(self, decode: Callable[..., list[Record]], content: bytes, tally: Tally) -> tuple[Shipped, int]:
        """The lines of a body by stream, and how many records it has. Raises BadBody, TooLarge."""
        records = decode(content, most=self._most)
        return self._named(records, tally), len(records)

    def _named(self, records: Sequence[Record], tally: Tally) -> Shipped:
        shipped = Shipped()
        for record in records:
            try:
                shipped.add(self._streams.of(record), record.nanoseconds or None, text_of(record.body) or record.event_name)
            except BadEvent as error:
                tally.refuse(error)
        return shipped


class OtlpMetrics:
    """The route's handler for metrics. At most `most` points a request."""

    def __init__(
        self, door: Door, names: Names, samples: Samples, most: int, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives seconds since 1970, for a point without time."""
        self._door, self._names, self._samples, self._most, self._clock = door, names, samples, most, clock
        self._latency = metrics.latency.labels(METRICS_DOOR)

    async def export(self, request: Incoming) -> Response:
        """Score what an exporter sends."""
        return await _exported(request, self._door, self._take)

    async def _take(self, request: Incoming, media: str) -> Response:
        started = time.perf_counter()
        async with self._door.sent(request, None) as sent:
            feature = feature_of(sent.scorer)
            written = await beside(partial(self._read, sent.content, media), len(sent.content))
            tally = await self._samples.take(sent, written, feature)
        self._latency.observe(time.perf_counter() - started)
        if tally.again:
            return _again(sum(tally.refused.values()), len(written), "points", media)
        return _partly(sum(tally.refused.values()), tally.reasons, "rejectedDataPoints", media)

    def _read(self, content: bytes, media: str) -> Written[Series]:
        """Raises BadBody, TooLarge."""
        decode = otlpmetrics.decode_protobuf if media == PROTOBUF else otlpmetrics.decode_json
        exported = decode(content, most=self._most)
        points = sorted(exported.points, key=lambda point: point.nanoseconds)
        written, place, owner = Written[Series](histograms=exported.distributions), dict[bytes, int](), list[int]()
        for point in points:
            key, named = self._series(point)
            if key not in place:
                place[key] = len(place)
                written.series.append(named())
            owner.append(place[key])
        bits = np.array([point.value for point in points], np.float64).view(np.uint64)
        written.bits = np.where([point.ended for point in points], np.uint64(STALE), bits) if points else bits
        now = int(self._clock() * 1000)
        written.milliseconds = np.array([point.nanoseconds // 1_000_000 or now for point in points], np.int64)
        written.owner = np.array(owner, np.intp)
        return written

    def _series(self, point: Point) -> tuple[bytes, Callable[[], Series]]:
        """What tells a point's series from the others of its request, and how it is made."""
        try:
            if 0 < point.nanoseconds < EARLIEST:
                raise of_another_unit(point.nanoseconds, "nanoseconds", "time")
            labels = labels_of(point)
        except BadEvent as error:
            return error.detail.encode(), partial(Series, error=error)
        key = series_key(point.counter, labels)
        return key, lambda: self._names.find(key) or self._names.name(key, labels, "counter" if point.counter else "gauge")


def series_key(counter: bool, labels: Sequence[Label]) -> bytes:
    """What names remember a point's series by: 0xFF is in no UTF-8, and 0x03 begins no key of Prometheus'."""
    digest = hashlib.blake2b(b"\xff".join(part for label in labels for part in label), digest_size=16)
    return b"\x03%d%s" % (counter, digest.digest())


def labels_of(point: Point) -> list[Label]:
    """The labels of a point's series. Raises BadEvent."""
    namespace, service, instance = (point.origin.text(name) for name in (NAMESPACE, SERVICE, INSTANCE))
    labels = {
        NAME: _METRIC.sub("_", naming("A metric's name", point.metric)),
        "job": "/".join(filter(None, (namespace, service))),
        "instance": instance,
    }
    labels |= {_LABEL.sub("_", name): text_of(value) for name, value in point.attributes.items()}
    return [(name.encode(), value.encode(errors="replace")) for name, value in labels.items()]


def _attribute(record: Record, name: str) -> str:
    return text_of(record.attributes[name]) if name in record.attributes else record.origin.text(name)


def _reference(record: Record, name: str) -> str:
    match name:
        case "trace_id" | "span_id" | "severity" | "event_name":
            return str(getattr(record, name))
        case "scope":
            return naming("A scope's name", record.origin.scope)
    return _attribute(record, name)


async def _exported(request: Incoming, door: Door, take: Callable[[Incoming, str], Awaitable[Response]]) -> Response:
    """What `take` makes of a request and what its body is written in; errors as OTLP has them."""
    try:
        if request.media not in (PROTOBUF, JSON):
            raise UnsupportedMedia(f"Content-Type '{request.media[:64]}' is not read here; send {PROTOBUF} or {JSON}.")
        return await take(request, request.media)
    except OnsetError as error:
        door.refuse(error)
        response = _status(problem_of(error), request.media)
        if isinstance(error, TooSlow):
            response.headers["connection"] = "close"
        return response


def _answer(tally: Tally, records: int, media: str) -> Response:
    if tally.again:
        return _again(tally.again, records, "records", media)
    rejected, message = sum(tally.refused.values()) + tally.late, tally.reasons
    if tally.late:
        late = f"{tally.late} older than the last one of their stream (the first: {tally.first_late})"
        message = f"{message}; {late}" if message else late
    return _partly(rejected, message, "rejectedLogRecords", media)


def _again(count: int, of: int, what: str, media: str) -> Response:
    detail = f"{count} of {of} {what} were not written, other replicas were faster: send the request again."
    return _status(partly_written(what, detail), media)


def _partly(rejected: int, message: str, field: str, media: str) -> Response:
    if media == PROTOBUF:
        return Response(encode_response(rejected, message), media_type=PROTOBUF)
    partial = {field: str(rejected), "errorMessage": message}
    return Response(msgspec.json.encode({"partialSuccess": partial} if rejected else {}), media_type=JSON)


def _status(problem: Problem, media: str) -> Response:
    """An error as OTLP has it."""
    code = CODES.get(problem.status, 2)
    headers = {"retry-after": str(problem.retry_after)} if problem.retry_after is not None else None
    if media == PROTOBUF:
        return Response(encode_status(code, problem.detail), problem.status, headers, PROTOBUF)
    return Response(msgspec.json.encode({"code": code, "message": problem.detail}), problem.status, headers, JSON)
