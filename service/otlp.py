"""OTLP's door for logs: POST /v1/logs takes what an OpenTelemetry Collector or SDK exports over HTTP, as protobuf or JSON.

    body ─► records (otlplogs.py) ─► stream ids, lines ─► shipped.py ─► ExportLogsServiceResponse, in the request's format

    status   when                                                                                   the exporter
    200      the request was taken. rejected_log_records counts those that were not scored and      goes on
             never can be (late ones too), error_message says why
    400      the body cannot be read                                                                drops it
    413 415  over a limit; neither of the two formats                                               drops it
    422      it names no model that takes lines, and there is none to take                          drops it
    429 503  the queue is full; the store does not answer, or other replicas were faster            sends all of it again

Errors are a google.rpc.Status. The line is the record's body: text as it is, what has a structure as JSON; without body, its event name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from starlette.responses import Response

from service.errors import BadEvent, OnsetError, TooSlow, Unfinished, UnsupportedMedia
from service.intake import Incoming
from service.names import bounded
from service.otlplogs import Record, decode_json, decode_protobuf, encode_response, encode_status, text_of
from service.problems import Problem, problem_of
from service.shipped import RETRY_SECONDS, Naming, Shipped, Shipping, Tally, beside

DOOR = "otlp"
PATH = "/v1/logs"
PROTOBUF, JSON = "application/x-protobuf", "application/json"
SERVICE = "service.name"
PLACES = ("k8s.pod.name", "container.name", "host.name", "log.file.path", "log.file.name")
"""Attributes of which the first that a record has says where it comes from."""

CODES = {400: 3, 404: 5, 413: 8, 415: 3, 422: 3, 429: 8, 503: 14}
"""HTTP status → google.rpc.Code: INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE."""


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
        started = time.perf_counter()
        media = _media(request)
        tally = Tally()
        try:
            if media is None:
                shown = (request.header(b"content-type") or "")[:128]
                raise UnsupportedMedia(f"Content-Type '{shown}' is not read here; send {PROTOBUF} or {JSON}.")
            decode = decode_protobuf if media == PROTOBUF else decode_json
            async with self._shipping.door.sent(request, None, self._shipping.model.of(request)) as sent:
                shipped, count = await beside(partial(self._read, decode, sent.content, tally), len(sent.content))
                await self._shipping.score(sent, shipped, tally)
        except TooSlow as error:  # as a 408 it would be dropped
            response = _status(problem_of(Unfinished(error.detail)), media)
            response.headers["connection"] = "close"
            return response
        except OnsetError as error:
            self._shipping.door.refuse(error)
            return _status(problem_of(error), media)
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


def _attribute(record: Record, name: str) -> str:
    for attributes in (record.attributes, record.origin.scope_attributes, record.origin.resource):
        if name in attributes:
            return text_of(attributes[name])
    return ""


def _reference(record: Record, name: str) -> str:
    match name:
        case "trace_id" | "span_id" | "severity" | "event_name":
            return str(getattr(record, name))
        case "scope":
            return record.origin.scope
    return _attribute(record, name)


def _media(request: Incoming) -> str | None:
    """What the body is written in; None = neither of the two."""
    media = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
    return media if media in (PROTOBUF, JSON) else None


def _answer(tally: Tally, records: int, media: str | None) -> Response:
    if tally.again:
        detail = f"{tally.again} of {records} records were not written, other replicas were faster: send the request again."
        return _status(Problem("urn:onset:partly-written", "Not all records were written", 503, detail, retry_after=RETRY_SECONDS), media)
    rejected, message = sum(tally.refused.values()) + tally.late, tally.reasons
    if tally.late:
        late = f"{tally.late} older than the last one of their stream (the first: {tally.first_late})"
        message = f"{message}; {late}" if message else late
    if media == PROTOBUF:
        return Response(encode_response(rejected, message), media_type=PROTOBUF)
    partial = {"rejectedLogRecords": str(rejected), "errorMessage": message}
    return Response(msgspec.json.encode({"partialSuccess": partial} if rejected else {}), media_type=JSON)


def _status(problem: Problem, media: str | None) -> Response:
    """An error as OTLP has it."""
    code = CODES.get(problem.status, 2)
    headers = {"retry-after": str(problem.retry_after)} if problem.retry_after is not None else None
    if media == PROTOBUF:
        return Response(encode_status(code, problem.detail), problem.status, headers, PROTOBUF)
    return Response(msgspec.json.encode({"code": code, "message": problem.detail}), problem.status, headers, JSON)
