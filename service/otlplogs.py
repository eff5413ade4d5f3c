"""OTLP's requests of log records on the wire: protobuf or JSON → records. Knows neither streams nor scores.

    ExportLogsServiceRequest 1 resource_logs  1 resource {1 attributes}
                                              2 scope_logs  1 scope {1 name, 3 attributes}
                                                            2 log_records  1 time_unix_nano fixed64 · 11 observed_time_unix_nano fixed64
                                                                           3 severity_text · 2 severity_number · 5 body · 6 attributes
                                                                           9 trace_id · 10 span_id · 12 event_name

Attributes and values are in otlpwire.py. In JSON ids are hexadecimal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from service.errors import TooLarge
from service.otlpwire import (
    NONE,
    Attributes,
    Json,
    KeyValue,
    Origin,
    Reader,
    Resource,
    Value,
    Whole,
    attributes_of,
    json_value,
    whole,
)
from service.wire import FIXED64, LENGTH, VARINT, read_varint, reading

MESSAGE = "opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest"


class Record(NamedTuple):
    """A log record."""

    origin: Origin
    nanoseconds: int
    """Since 1970: of the event, or else when it was observed; 0 = neither is known."""
    severity: str
    body: Value
    attributes: Attributes
    trace_id: str
    span_id: str
    event_name: str


def decode_protobuf(content: bytes, *, most: int) -> list[Record]:
    """Raises BadBody, and TooLarge for more than `most` records."""
    with reading(MESSAGE):
        return _Reader(content, most).read()


# ── protobuf ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Reader(Reader):
    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self._most = most
        self._records: list[Record] = []

    def read(self) -> list[Record]:
        for start, end in self.parts(0, len(self.content), 1):
            resource = NONE
            for here, there in self.parts(start, end, 1):
                resource = self.attributes(here, there, 1)
            for here, there in self.parts(start, end, 2):
                self._scope(resource, here, there)
        return self._records

    def _scope(self, resource: Attributes, start: int, end: int) -> None:
        name, attributes = "", NONE
        for here, there in self.parts(start, end, 1):
            name = next((self.text(a, b) for a, b in self.parts(here, there, 1)), "")
            attributes = self.attributes(here, there, 3)
        origin = Origin(resource, name, attributes)
        for here, there in self.parts(start, end, 2):
            if len(self._records) >= self._most:
                raise too_many(self._most)
            self._records.append(self._record(origin, here, there))

    def _record(self, origin: Origin, start: int, end: int) -> Record:
        time = observed = severity_number = 0
        body: Value = None
        attributes: dict[str, Value] = {}
        found: dict[int, tuple[int, int]] = {}
        for number, kind, here, there in self.fields(start, end):
            if kind == FIXED64 and number in (1, 11):
                moment = int.from_bytes(self.content[here:there], "little")
                time, observed = (moment, observed) if number == 1 else (time, moment)
            elif number == 2 and kind == VARINT:
                severity_number, _ = read_varint(self.content, here)
            elif number == 5 and kind == LENGTH:
                body = self.value(here, there, 0)
            elif number == 6 and kind == LENGTH:
                name, value = self.pair(here, there, 0)
                attributes[name] = value
            elif kind == LENGTH:
                found[number] = here, there
        text = {number: self.text(*found[number]) for number in (3, 12) if number in found}
        ids = {number: self.content[slice(*found[number])].hex() for number in (9, 10) if number in found}
        return Record(
            origin,
            time or observed,
            text.get(3, "") or severity_name(severity_number),
            body,
            attributes or NONE,
            ids.get(9, ""),
            ids.get(10, ""),
            text.get(12, ""),
        )


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Scope(Json):
    name: str | None = None
    attributes: list[KeyValue] | None = None


class _LogRecord(Json):
    time_unix_nano: Whole | None = None
    observed_time_unix_nano: Whole | None = None
    severity_number: Whole | None = None
    severity_text: str | None = None
    body: dict[str, Any] | None = None
    attributes: list[KeyValue] | None = None
    trace_id: str | None = None
    span_id: str | None = None
    event_name: str | None = None


class _ScopeLogs(Json):
    scope: _Scope | None = None
    log_records: list[_LogRecord] | None = None


class _ResourceLogs(Json):
    resource: Resource | None = None
    scope_logs: list[_ScopeLogs] | None = None


class _Request(Json):
    resource_logs: list[_ResourceLogs] | None = None


_request = msgspec.json.Decoder(_Request)


def decode_json(content: bytes, *, most: int) -> list[Record]:
    """Raises BadBody, and TooLarge for more than `most` records."""
    with reading(f"{MESSAGE} in JSON"):
        request = _request.decode(content)
    scopes = [(logs.resource, scope) for logs in request.resource_logs or () for scope in logs.scope_logs or ()]
    if sum(len(scope.log_records or ()) for _, scope in scopes) > most:
        raise too_many(most)
    records: list[Record] = []
    for resource, logs in scopes:
        scope = logs.scope or _Scope()
        origin = Origin(attributes_of(resource.attributes) if resource else NONE, scope.name or "", attributes_of(scope.attributes))
        records += [_record(origin, record) for record in logs.log_records or ()]
    return records


def too_many(most: int) -> TooLarge:
    return TooLarge(f"More than {most} log records in one request (ONSET_MAX_LINES): send smaller batches.")


def severity_name(number: int) -> str:
    """The short name of a severity number: INFO, ERROR2; "" = unspecified."""
    if not 1 <= number <= 24:
        return ""
    level = ("TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL")[(number - 1) // 4]
    return level + (str((number - 1) % 4 + 1) if (number - 1) % 4 else "")


def _record(origin: Origin, record: _LogRecord) -> Record:
    time = whole(record.time_unix_nano or 0, "timeUnixNano") or whole(record.observed_time_unix_nano or 0, "observedTimeUnixNano")
    return Record(
        origin,
        time,
        record.severity_text or severity_name(whole(record.severity_number or 0, "severityNumber")),
        None if record.body is None else json_value(record.body, 0),
        attributes_of(record.attributes),
        (record.trace_id or "").lower(),
        (record.span_id or "").lower(),
        record.event_name or "",
    )
