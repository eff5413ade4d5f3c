"""Bodies ⇄ events and results: one JSON object, a JSON array, or NDJSON.

The whole body is decoded at once; only when that fails is it read again item by item, so that the neighbours of a bad item are
scored and the error names its field and value.
"""

from __future__ import annotations

import enum
import json
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

from service.errors import BadBody, BadEvent, ItemError, TooLarge
from service.events import MAX_NAME_LENGTH, Event, Result
from service.problems import Problem, problem_of

Items = list[Event | ItemError]

_event = msgspec.json.Decoder(Event)
_events = msgspec.json.Decoder(list[Event])
_encoder = msgspec.json.Encoder()
_PATH = re.compile(r" - at `\$\.?(.*)`$")
_UNKNOWN_FIELD = re.compile(r"unknown field `(.*?)`")


class Shape(enum.Enum):
    """How the items of a body are laid out; the reply has the same."""

    SINGLE = "application/json"
    ARRAY = "application/json; array"
    LINES = "application/x-ndjson"

    @property
    def media_type(self) -> str:
        return self.value.partition(";")[0]


def decode(content: bytes, *, lines: bool, max_events: int) -> tuple[Items, Shape]:
    """A body's items in order: an event, or what is wrong with it. Raises BadBody, TooLarge."""
    if lines:
        return _limited(_decode_lines(content), max_events), Shape.LINES
    start = content.lstrip()[:1]
    if not start:
        raise BadBody("The body is empty: send an event, an array of events, or NDJSON.")
    if start == b"[":
        return _limited(_decode_array(content), max_events), Shape.ARRAY
    try:
        return [_event.decode(content)], Shape.SINGLE
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return [_checked(_parse(content))], Shape.SINGLE


def encode(answers: Sequence[Result | ItemError], shape: Shape) -> bytes:
    """Results, and problems in the place of failed items, in the shape of the request."""
    if shape is Shape.SINGLE:
        return _encoder.encode(answers[0])
    bodies: list[Result | Problem] = [
        problem_of(answer, index) if isinstance(answer, ItemError) else answer for index, answer in enumerate(answers)
    ]
    return _encoder.encode_lines(bodies) if shape is Shape.LINES else _encoder.encode(bodies)


def inflate(content: bytes, max_bytes: int) -> bytes:
    """Undo gzip. Raises BadBody, or TooLarge as soon as the result is over `max_bytes`."""
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise BadBody(f"The body is not gzip: {error}.") from error
    if len(plain) > max_bytes:
        raise TooLarge(f"The body is over {max_bytes} bytes when unpacked (ONSET_MAX_BODY_BYTES).")
    if not stream.eof:
        raise BadBody("The gzip body is cut off.")
    return plain


def _limited(items: Items, max_events: int) -> Items:
    if len(items) > max_events:
        raise TooLarge(f"{len(items)} events in one request; at most {max_events} are taken (ONSET_MAX_BATCH_EVENTS).")
    return items


def _decode_array(content: bytes) -> Items:
    try:
        return list(_events.decode(content))
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return [_try(item) for item in _parse(content)]


def _decode_lines(content: bytes) -> Items:
    lines = [line for line in content.splitlines() if line.strip()]
    try:
        return [_event.decode(line) for line in lines]
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return [_try_line(line) for line in lines]


def _try_line(line: bytes) -> Event | ItemError:
    try:
        return _event.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        try:
            return _try(_parse(line, "line"))
        except BadBody as error:
            return BadEvent(error.detail)


def _try(item: Any) -> Event | ItemError:
    try:
        return _checked(item)
    except BadEvent as error:
        return error


def _parse(content: bytes, what: str = "body") -> Any:
    """JSON that may hold NaN and Infinity, so that their field can be named. Raises BadBody."""
    try:
        return json.loads(content.decode())
    except RecursionError as error:
        raise BadBody(f"The {what} is nested too deeply: an event is an object with one object in it.") from error
    except UnicodeDecodeError as error:
        raise BadBody(f"The {what} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}.") from error
    except ValueError as error:
        raise BadBody(f"The {what} is not JSON: {error}.") from error


def _checked(item: Any) -> Event:
    """A parsed item → an event. Raises BadEvent that names the field and the value."""
    if not isinstance(item, dict):
        raise BadEvent(f"An event is an object, not {_shown(item)}.")
    _check_values(item.get("values"))
    if isinstance(sequence := item.get("sequence"), float) and sequence.is_integer():
        item["sequence"] = int(sequence)  # JSON has no integers: 7.0 is 7
    try:
        return msgspec.convert(item, Event)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        message = str(error)
        unknown = _UNKNOWN_FIELD.search(message)
        path = _PATH.search(message)
        field = unknown.group(1) if unknown else path.group(1) if path else ""
        if unknown:
            known = ", ".join(Event.__struct_fields__)
            raise BadEvent(f"'{field[:64]}' is no field of an event; it has {known}.", field[:64]) from error
        what = message.partition(" - at ")[0]
        raise BadEvent(f"{field or 'The event'}: {what}; got {_shown(item.get(field.partition('.')[0]))}.", field) from error


def _check_values(values: Any) -> None:
    """Name the feature whose value is no number; msgspec's message names only `values`."""
    if not isinstance(values, dict):
        return
    for name, number in values.items():
        field = f"values.{name[:64]}"
        if not 0 < len(name) <= MAX_NAME_LENGTH:
            raise BadEvent(f"A feature's name has 1 to {MAX_NAME_LENGTH} characters, this one {len(name)}.", field)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadEvent(f"{field} is {_shown(number)}, not a number; send null for a missing value.", field)
        if isinstance(number, float) and not math.isfinite(number):
            raise BadEvent(f"{field} is {number}; send null for a missing value.", field)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 64 else text[:61] + "..."
