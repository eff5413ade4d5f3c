"""What OTLP's messages of every signal have in common on the wire, in protobuf and JSON: attributes and their values; and its answers.

    KeyValue {1 key, 2 value}; AnyValue {1 string, 2 bool, 3 int, 4 double, 5 array {1 values}, 6 kvlist {1 values}, 7 bytes}

JSON has the same names in lowerCamelCase, bytes as base64, whole numbers as numbers or text. Other fields are skipped.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from service.errors import BadBody, BadEvent
from service.wire import FIXED64, LENGTH, VARINT, Body, Malformed, read_varint, varint

MAX_DEPTH = 32
"""Of values within values."""

Value = str | bool | int | float | None | list[Any] | dict[str, Any]
"""A value as JSON has it; bytes are base64."""
Attributes = Mapping[str, Value]

NONE: Attributes = {}
MAX_NAMING = 4096
"""Characters of a text that many records or points share and are named by: said once, it would be gone through for each of them."""
_DOUBLE = struct.Struct("<d")


def text_of(value: Value) -> str:
    """A value as a line or a name can hold it: text as it is, all others as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


@dataclass(frozen=True, slots=True)
class Origin:
    """What records or points have in common: a resource, and a scope."""

    resource: Attributes
    scope: str = ""
    scope_attributes: Attributes = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def text(self, name: str) -> str:
        """Of an attribute of the scope or the resource, "" = neither has it. Raises BadEvent for one that is too long."""
        if name not in self._texts:
            found = next((attributes[name] for attributes in (self.scope_attributes, self.resource) if name in attributes), None)
            self._texts[name] = text_of(found)
        return naming(name, self._texts[name])


def naming(what: str, text: str) -> str:
    """The text, once it is short enough to name many by. Raises BadEvent."""
    if len(text) > MAX_NAMING:
        raise BadEvent(f"{what[:64]} has {len(text)} characters, and is to name a stream: at most {MAX_NAMING}.", what[:64])
    return text


def encode_response(rejected: int, message: str) -> bytes:
    """Export…ServiceResponse {1 partial_success {1 rejected_…, 2 error_message}}; empty where there is nothing to say."""
    inside = (b"\x08" + varint(rejected) if rejected else b"") + _text_field(0x12, message)
    return b"\x0a" + varint(len(inside)) + inside if inside else b""


def encode_status(code: int, message: str) -> bytes:
    """google.rpc.Status {1 code, 2 message}."""
    return b"\x08" + varint(code) + _text_field(0x12, message)


def _text_field(tag: int, text: str) -> bytes:
    content = text.encode(errors="replace")
    return bytes((tag,)) + varint(len(content)) + content if content else b""


# ── protobuf ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Reader(Body):
    """One pass over a body."""

    def attributes(self, start: int, end: int, field: int) -> Attributes:
        return dict(self.pair(here, there, 0) for here, there in self.parts(start, end, field)) or NONE

    def pair(self, start: int, end: int, depth: int) -> tuple[str, Value]:
        key, value = "", None
        for number, kind, here, there in self.fields(start, end):
            if number == 1 and kind == LENGTH:
                key = self.text(here, there)
            elif number == 2 and kind == LENGTH:
                value = self.value(here, there, depth)
        return key, value

    def value(self, start: int, end: int, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise Malformed(f"byte {start} is within {MAX_DEPTH} values, one in the other")
        value: Value = None
        for number, kind, here, there in self.fields(start, end):
            if kind == LENGTH and number == 1:
                value = self.text(here, there)
            elif kind == VARINT and number in (2, 3):
                unsigned, _ = read_varint(self.content, here)
                value = bool(unsigned) if number == 2 else unsigned - (1 << 64) if unsigned >> 63 else unsigned
            elif kind == FIXED64 and number == 4:
                [value] = _DOUBLE.unpack(self.content[here:there])
            elif kind == LENGTH and number == 5:
                value = [self.value(a, b, depth + 1) for a, b in self.parts(here, there, 1)]
            elif kind == LENGTH and number == 6:
                value = dict(self.pair(a, b, depth + 1) for a, b in self.parts(here, there, 1))
            elif kind == LENGTH and number == 7:
                value = base64.b64encode(self.content[here:there]).decode()
        return value

    def parts(self, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Where the messages and texts of one field lie; one by one, as there may be one in every two bytes."""
        return ((here, there) for number, kind, here, there in self.fields(start, end) if number == wanted and kind == LENGTH)

    def text(self, start: int, end: int) -> str:
        return self.content[start:end].decode(errors="replace")


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

Whole = int | str


class Json(msgspec.Struct, rename="camel", gc=False):
    """As protobuf has it in JSON: null, as what is left out, is a field's default."""


class KeyValue(Json):
    key: str | None = None
    value: dict[str, Any] | None = None


class Resource(Json):
    attributes: list[KeyValue] | None = None


def attributes_of(pairs: Sequence[KeyValue] | None) -> Attributes:
    return {pair.key or "": None if pair.value is None else json_value(pair.value, 0) for pair in pairs} if pairs else NONE


def json_value(value: Any, depth: int) -> Value:
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
    return [json_value(value, depth + 1) for value in _values(content)]


def _kvlist(content: Any, depth: int) -> Value:
    pairs = _values(content)
    if not all(isinstance(pair, dict) and isinstance(pair.get("key"), str | None) for pair in pairs):
        raise _no_value(content)
    return {pair.get("key") or "": None if pair.get("value") is None else json_value(pair["value"], depth + 1) for pair in pairs}


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
    return whole(content, "intValue", signed=True)


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


def whole(content: Any, name: str, *, signed: bool = False) -> int:
    """A whole number of 64 bits, as a number or as text. Raises BadBody."""
    text = str(content)
    digits = text[1:] if signed and text.startswith("-") else text
    if isinstance(content, bool) or not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise BadBody(f"{name} is {text[:64]!r}, not a whole number of 64 bits.")
    return int(text)
