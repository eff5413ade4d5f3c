"""OTLP's requests of log records on the wire: protobuf or JSON → records; and its answers. Knows neither streams nor scores.

    ExportLogsServiceRequest 1 resource_logs  1 resource {1 attributes}
                                              2 scope_logs  1 scope {1 name, 3 attributes}
                                                            2 log_records  1 time_unix_nano fixed64 · 11 observed_time_unix_nano fixed64
                                                                           3 severity_text · 2 severity_number · 5 body · 6 attributes
                                                                           9 trace_id · 10 span_id · 12 event_name
    KeyValue {1 key, 2 value}; AnyValue {1 string, 2 bool, 3 int, 4 double, 5 array {1 values}, 6 kvlist {1 values}, 7 bytes}

JSON has the same names in lowerCamelCase, ids as hexadecimal, bytes as base64, whole numbers as numbers or text. Other fields are skipped.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import msgspec

from service.errors import BadBody, TooLarge
from service.wire import FIXED64, LENGTH, VARINT, Malformed, fields, read_varint, varint

MESSAGE = "opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest"
MAX_DEPTH = 32
"""Of values within values."""

Value = str | bool | int | float | None | list[Any] | dict[str, Any]
"""A value as JSON has it; bytes are base64."""
Attributes = Mapping[str, Value]

_NONE: Attributes = {}
_DOUBLE = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Origin:
    """What the records of one scope have in common."""

    resource: Attributes
    scope: str
    scope_attributes: Attributes


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


def text_of(value: Value) -> str:
    """A value as a line or a name can hold it: text as it is, all others as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def decode_protobuf(content: bytes, *, most: int) -> list[Record]:
    """Raises BadBody, and TooLarge for more than `most` records."""
    try:
        return _Reader(content, most).read()
    except IndexError as error:
        raise BadBody(f"The body is not an {MESSAGE}: it is cut off.") from error
    except Malformed as error:
        raise BadBody(f"The body is not an {MESSAGE}: {error}.") from error


def encode_response(rejected: int, message: str) -> bytes:
    """ExportLogsServiceResponse {1 partial_success {1 rejected_log_records, 2 error_message}}; empty where there is nothing to say."""
    inside = (b"\x08" + varint(rejected) if rejected else b"") + _text_field(0x12, message)
    return b"\x0a" + varint(len(inside)) + inside if inside else b""


def encode_status(code: int, message: str) -> bytes:
    """google.rpc.Status {1 code, 2 message}."""
    return b"\x08" + varint(code) + _text_field(0x12, message)


def _text_field(tag: int, text: str) -> bytes:
    content = text.encode(errors="replace")
    return bytes((tag,)) + varint(len(content)) + content if content else b""


# ── protobuf ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Reader:
    """One pass over a body."""

    def __init__(self, content: bytes, most: int) -> None:
        self._content, self._most = content, most
        self._records: list[Record] = []

    def read(self) -> list[Record]:
        for start, end in self._parts(0, len(self._content), 1):
            resource = _NONE
            for here, there in self._parts(start, end, 1):
                resource = self._attributes(here, there, 1)
            for here, there in self._parts(start, end, 2):
                self._scope(resource, here, there)
        return self._records

    def _scope(self, resource: Attributes, start: int, end: int) -> None:
        name, attributes = "", _NONE
        for here, there in self._parts(start, end, 1):
            name = next((self._text(a, b) for a, b in self._parts(here, there, 1)), "")
            attributes = self._attributes(here, there, 3)
        origin = Origin(resource, name, attributes)
        for here, there in self._parts(start, end, 2):
            if len(self._records) >= self._most:
                raise too_many(self._most)
            self._records.append(self._record(origin, here, there))

    def _record(self, origin: Origin, start: int, end: int) -> Record:
        time = observed = severity_number = 0
        body: Value = None
        found: dict[int, tuple[int, int]] = {}
        for number, kind, here, there in fields(self._content, start, end):
            if kind == FIXED64 and number in (1, 11):
                moment = int.from_bytes(self._content[here:there], "little")
                time, observed = (moment, observed) if number == 1 else (time, moment)
            elif number == 2 and kind == VARINT:
                severity_number, _ = read_varint(self._content, here)
            elif number == 5 and kind == LENGTH:
                body = self._value(here, there, 0)
            elif kind == LENGTH and number != 6:
                found[number] = here, there
        text = {number: self._text(*found[number]) for number in (3, 12) if number in found}
        ids = {number: self._content[slice(*found[number])].hex() for number in (9, 10) if number in found}
        return Record(
            origin,
            time or observed,
            text.get(3, "") or severity_name(severity_number),
            body,
            self._attributes(start, end, 6),
            ids.get(9, ""),
            ids.get(10, ""),
            text.get(12, ""),
        )

    def _attributes(self, start: int, end: int, field: int) -> Attributes:
        pairs = [self._pair(here, there, 0) for here, there in self._parts(start, end, field)]
        return dict(pairs) if pairs else _NONE

    def _pair(self, start: int, end: int, depth: int) -> tuple[str, Value]:
        key, value = "", None
        for number, kind, here, there in fields(self._content, start, end):
            if number == 1 and kind == LENGTH:
                key = self._text(here, there)
            elif number == 2 and kind == LENGTH:
                value = self._value(here, there, depth)
        return key, value

    def _value(self, start: int, end: int, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise Malformed(f"byte {start} is within {MAX_DEPTH} values, one in the other")
        value: Value = None
        for number, kind, here, there in fields(self._content, start, end):
            if kind == LENGTH and number == 1:
                value = self._text(here, there)
            elif kind == VARINT and number in (2, 3):
                unsigned, _ = read_varint(self._content, here)
                value = bool(unsigned) if number == 2 else unsigned - (1 << 64) if unsigned >> 63 else unsigned
            elif kind == FIXED64 and number == 4:
                [value] = _DOUBLE.unpack(self._content[here:there])
            elif kind == LENGTH and number == 5:
                value = [self._value(a, b, depth + 1) for a, b in self._parts(here, there, 1)]
            elif kind == LENGTH and number == 6:
                value = dict(self._pair(a, b, depth + 1) for a, b in self._parts(here, there, 1))
            elif kind == LENGTH and number == 7:
                value = base64.b64encode(self._content[here:there]).decode()
        return value

    def _parts(self, start: int, end: int, field: int) -> list[tuple[int, int]]:
        """Where the messages and texts of one field lie."""
        return [(here, there) for number, kind, here, there in fields(self._content, start, end) if number == field and kind == LENGTH]

    def _text(self, start: int, end: int) -> str:
        return self._content[start:end].decode(errors="replace")


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_Whole = int | str


class _Json(msgspec.Struct, rename="camel", gc=False):
    """As protobuf has it in JSON: null, as what is left out, is a field's default."""


class _KeyValue(_Json):
    key: str | None = None
    value: dict[str, Any] | None = None


class _Resource(_Json):
    attributes: list[_KeyValue] | None = None


class _Scope(_Json):
    name: str | None = None
    attributes: list[_KeyValue] | None = None


class _LogRecord(_Json):
    time_unix_nano: _Whole | None = None
    observed_time_unix_nano: _Whole | None = None
    severity_number: _Whole | None = None
    severity_text: str | None = None
    body: dict[str, Any] | None = None
    attributes: list[_KeyValue] | None = None
    trace_id: str | None = None
    span_id: str | None = None
    event_name: str | None = None


class _ScopeLogs(_Json):
    scope: _Scope | None = None
    log_records: list[_LogRecord] | None = None


class _ResourceLogs(_Json):
    resource: _Resource | None = None
    scope_logs: list[_ScopeLogs] | None = None


class _Request(_Json):
    resource_logs: list[_ResourceLogs] | None = None


_request = msgspec.json.Decoder(_Request)


def decode_json(content: bytes, *, most: int) -> list[Record]:
    """Raises BadBody, and TooLarge for more than `most` records."""
    try:
        request = _request.decode(content)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BadBody(f"The body is not an {MESSAGE} in JSON: {error}.") from error
    scopes = [(logs.resource, scope) for logs in request.resource_logs or () for scope in logs.scope_logs or ()]
    if sum(len(scope.log_records or ()) for _, scope in scopes) > most:
        raise too_many(most)
    records: list[Record] = []
    for resource, logs in scopes:
        scope = logs.scope or _Scope()
        origin = Origin(_attributes(resource.attributes) if resource else _NONE, scope.name or "", _attributes(scope.attributes))
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
    time = _whole(record.time_unix_nano or 0, "timeUnixNano") or _whole(record.observed_time_unix_nano or 0, "observedTimeUnixNano")
    return Record(
        origin,
        time,
        record.severity_text or severity_name(_whole(record.severity_number or 0, "severityNumber")),
        None if record.body is None else _json_value(record.body, 0),
        _attributes(record.attributes),
        (record.trace_id or "").lower(),
        (record.span_id or "").lower(),
        record.event_name or "",
    )


def _attributes(pairs: Sequence[_KeyValue] | None) -> Attributes:
    return {pair.key or "": None if pair.value is None else _json_value(pair.value, 0) for pair in pairs} if pairs else _NONE


def _json_value(value: Any, depth: int) -> Value:
    """An AnyValue, which has one of some names. Raises BadBody."""
    if depth > MAX_DEPTH:
        raise BadBody(f"A value is within {MAX_DEPTH} others, one in the other.")
    if not isinstance(value, dict):
        raise _no_value(value)
    for name, content in value.items():
        read = _VALUES.get(name)
        if read is not None and content is not None:
            return read(content, depth)
    return None


def _list(content: Any, depth: int) -> Value:
    return [_json_value(value, depth + 1) for value in _values(content)]


def _kvlist(content: Any, depth: int) -> Value:
    pairs = _values(content)
    if not all(isinstance(pair, dict) and isinstance(pair.get("key"), str | None) for pair in pairs):
        raise _no_value(content)
    return {pair.get("key") or "": None if pair.get("value") is None else _json_value(pair["value"], depth + 1) for pair in pairs}


def _values(content: Any) -> list[Any]:
    if not isinstance(content, dict):
        raise _no_value(content)
    values = content.get("values")
    if values is not None and not isinstance(values, list):
        raise _no_value(content)
    return values or []


def _of(kind: type) -> Callable[[Any, int], Value]:
    def read(content: Any, depth: int) -> Value:
        if not isinstance(content, kind):
            raise _no_value(content)
        return cast("Value", content)

    return read


def _int(content: Any, depth: int) -> Value:
    return _whole(content, "intValue", signed=True)


def _double(content: Any, depth: int) -> Value:
    try:
        return float(content)
    except (TypeError, ValueError, OverflowError) as error:
        raise _no_value(content) from error


_VALUES: Mapping[str, Callable[[Any, int], Value]] = {
    "stringValue": _of(str),
    "boolValue": _of(bool),
    "intValue": _int,
    "doubleValue": _double,
    "arrayValue": _list,
    "kvlistValue": _kvlist,
    "bytesValue": _of(str),
}


def _no_value(content: Any) -> BadBody:
    return BadBody(f"The body has {str(content)[:64]!r} where a value is: an object such as {{'stringValue': 'text'}}.")


def _whole(content: Any, name: str, *, signed: bool = False) -> int:
    """A whole number of 64 bits, as a number or as text. Raises BadBody."""
    text = str(content)
    digits = text[1:] if signed and text.startswith("-") else text
    if isinstance(content, bool) or not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise BadBody(f"{name} is {text[:64]!r}, not a whole number of 64 bits.")
    return int(text)
