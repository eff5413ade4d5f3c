"""Bodies ⇄ events and results: one object or an array of them, as JSON or msgpack, or NDJSON. Arrow's columns are in arrow.py.

The whole body is decoded at once; only when that fails is it read again item by item, so that the neighbours of a bad item are
scored and the error names its field and value. The number of items is checked before that: looking at a bad item costs a
hundred times what sending it does.
"""

from __future__ import annotations

import enum
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import cramjam
import msgspec
import numpy as np

from service.errors import BadBody, BadEvent, ItemError, TooLarge
from service.events import MAX_NAME_LENGTH, Event, Result, shown
from service.packed import SHORT_BYTES, look_through
from service.problems import Problem, problem_of

Items = list[Event | ItemError]

_event = msgspec.json.Decoder(Event)
_events = msgspec.json.Decoder(list[Event])
_plain = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()
_packed_event = msgspec.msgpack.Decoder(Event)
_packed_events = msgspec.msgpack.Decoder(list[Event])
_packed_parts = msgspec.msgpack.Decoder(list[msgspec.Raw])
_unpacker = msgspec.msgpack.Decoder()
_packer = msgspec.msgpack.Encoder()
_UNDECODED = (msgspec.MsgspecError, RecursionError, UnicodeError)
"""What decoders raise."""
_PATH = re.compile(r" - at `\$\.?(.*)`$")
_LINE = re.compile(rb"[^ \t\r\n][^\n]*")
_MAX_DIGITS = 400
"""Of a whole number; the largest float has 309."""
OBJECT_BYTES = 512 * 1024
"""Of one object that is no event; the largest mute, written in escapes, takes 350 kB. They are read on the event loop."""
_FIELDS = Event.__struct_fields__
ENCODINGS = ("gzip", "x-gzip", "deflate", "zstd")
"""Content-Encodings that `inflate` undoes."""


class Format(enum.Enum):
    """What a body is written in, by its media type."""

    JSON = "application/json"
    NDJSON = "application/x-ndjson"
    MSGPACK = "application/msgpack"
    ARROW = "application/vnd.apache.arrow.stream"


def decode(content: bytes, form: Format, *, max_events: int) -> tuple[Items, bool]:
    """The items in order, an event or what is wrong with it, of any format but ARROW; and whether the body is one bare event.

    Raises BadBody, TooLarge, and BadEvent for the bare one.
    """
    if form is Format.NDJSON:
        return _decode_lines(content, max_events), False
    if form is Format.MSGPACK:
        return _decode_packed(content, max_events)
    start = content.lstrip()[:1]
    if not start:
        raise BadBody("The body is empty: send an event, an array of events, or NDJSON.")
    if start == b"[":
        return _decode_array(content, max_events), False
    try:
        return [_event.decode(content)], True
    except _UNDECODED:
        return [checked(_parse(content))], True


def decode_one(content: bytes, form: Format) -> Event | None:
    """The bare event that most messages of queues are, without any detour; None = it is something else, which `decode` tells."""
    if form is Format.NDJSON:
        return None
    try:
        return _packed_event.decode(content) if form is Format.MSGPACK else _event.decode(content)
    except _UNDECODED:
        return None


def decode_plain(content: bytes, form: Format, *, max_events: int) -> tuple[list[Any], bool]:
    """The items of a body as plain values, whatever they are, and whether it is one bare item. A line that is no JSON is a BadEvent.

    Raises BadBody and TooLarge.
    """
    if form is Format.NDJSON:
        lines = _limited([line.group() for line in islice(_LINE.finditer(content), max_events + 1)], max_events)
        return [_plain_line(line) for line in lines], False
    if not content.strip():
        raise BadBody("The payload is empty.")
    if form is Format.MSGPACK:
        look_through(content)
        body = _unpack(content)
    else:
        try:
            body = _plain.decode(content)
        except _UNDECODED:
            body = _parse(content)
    return (_limited(body, max_events), False) if isinstance(body, list) else ([body], True)


def decode_object(content: bytes) -> dict[str, Any]:
    """A body that is one JSON object. Raises BadBody, TooLarge."""
    if len(content) > OBJECT_BYTES:
        raise TooLarge(f"The body has {len(content)} bytes; here it has {OBJECT_BYTES} at most.")
    if not content.strip():
        raise BadBody("The body is empty: send a JSON object.")
    body = _parse(content)
    if not isinstance(body, dict):
        raise BadBody(f"The body is a JSON object, not {shown(body)}.")
    return body


def encode(answers: Sequence[Result | msgspec.Raw | ItemError], form: Format, *, bare: bool) -> bytes:
    """Results, and problems in the place of failed items, in any format but ARROW; `bare` = the one answer without an array.

    Results in JSON and NDJSON may be JSON already.
    """
    encoder = _packer if form is Format.MSGPACK else _encoder
    if bare and form is not Format.NDJSON:
        return encoder.encode(answers[0])
    bodies: list[Result | msgspec.Raw | Problem] = [
        problem_of(answer, index) if isinstance(answer, ItemError) else answer for index, answer in enumerate(answers)
    ]
    return _encoder.encode_lines(bodies) if form is Format.NDJSON else encoder.encode(bodies)


def inflate(content: bytes, max_bytes: int, encoding: str = "gzip") -> bytes:
    """Undo one of ENCODINGS. Raises BadBody, or TooLarge as soon as the result is over `max_bytes`."""
    return _unzstd(content, max_bytes) if encoding == "zstd" else _unzlib(content, max_bytes, encoding.removeprefix("x-"))


def _unzlib(content: bytes, max_bytes: int, encoding: str) -> bytes:
    """Of one member. Deflate also without zlib's head of two bytes: .NET's DeflateStream writes it so."""
    headed = len(content) > 1 and content[0] & 0x0F == zlib.DEFLATED and int.from_bytes(content[:2], "big") % 31 == 0
    bits = zlib.MAX_WBITS if headed else -zlib.MAX_WBITS
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16 if encoding == "gzip" else bits)
    try:
        plain = stream.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise BadBody(f"The body is not {encoding}: {error}.") from error
    if len(plain) > max_bytes:
        raise _too_large_unpacked(max_bytes)
    if not stream.eof:
        raise BadBody(f"The {encoding} body is cut off.")
    if stream.unused_data:
        raise BadBody(f"{len(stream.unused_data)} bytes follow the end of the {encoding} body; send it as one member.")
    return plain


def _unzstd(content: bytes, max_bytes: int) -> bytes:
    """Of any number of frames. What it takes of memory is what comes out, whatever window a frame declares."""
    room = np.empty(max_bytes, np.uint8)  # no page of it is there before it is written to
    try:
        size = cramjam.zstd.decompress_into(content, room.data)
    except cramjam.DecompressionError as error:
        if "write whole buffer" in str(error):
            raise _too_large_unpacked(max_bytes) from error
        raise BadBody(f"The body is not zstd: {error}.") from error
    return room[:size].tobytes()


def _too_large_unpacked(max_bytes: int) -> TooLarge:
    return TooLarge(f"The body is over {max_bytes} bytes when unpacked (ONSET_MAX_BODY_BYTES).")


def _decode_array(content: bytes, max_events: int) -> Items:
    try:
        return list(_limited(_events.decode(content), max_events))
    except _UNDECODED:
        return [_try(item) for item in _limited(_parse(content), max_events)]


def _decode_lines(content: bytes, max_events: int) -> Items:
    found = islice(_LINE.finditer(content), max_events + 1)
    lines = _limited([line.group() for line in found], max_events)
    try:
        return [_event.decode(line) for line in lines]
    except _UNDECODED:
        return [_try_line(line) for line in lines]


def _decode_packed(content: bytes, max_events: int) -> tuple[Items, bool]:
    if not content:
        raise BadBody("The body is empty: send an event or an array of events.")
    count = _packed_length(content)
    if count is None:
        try:
            return [_packed_event.decode(content)], True
        except _UNDECODED:
            return [_unpacked(content)], True
    if count > max_events:  # before an object is made for each of them
        raise _too_many(max_events)
    try:
        return list(_packed_events.decode(content)), False
    except _UNDECODED:
        return [_try_packed(part) for part in _unpack(content, _packed_parts)], False


def _packed_length(content: bytes) -> int | None:
    """Items of the array that msgpack begins with; None = it begins with something else."""
    kind = content[0]
    if kind in (0xDC, 0xDD):
        return int.from_bytes(content[1 : 3 if kind == 0xDC else 5], "big")
    return kind & 0x0F if 0x90 <= kind <= 0x9F else None


def _try_packed(part: msgspec.Raw) -> Event | ItemError:
    try:
        return _packed_event.decode(part)
    except _UNDECODED:
        try:
            return _unpacked(part)
        except BadEvent as error:
            return error
        except BadBody as error:
            return BadEvent(error.detail.replace("The body", "The item", 1))


def _unpacked(content: bytes | msgspec.Raw) -> Event:
    """An event that is no ordinary one, or what is wrong with it. Raises BadEvent, BadBody."""
    if memoryview(content).nbytes > SHORT_BYTES:  # to look through it would take as long as what that is to prevent
        event: Event = _unpack(content, _packed_event)
        return event
    return checked(_unpack(content))


def _unpack(content: bytes | msgspec.Raw, decoder: msgspec.msgpack.Decoder[Any] = _unpacker) -> Any:
    """Msgpack → what the decoder makes of it, plain values. Raises BadBody, and BadEvent where it makes events."""
    try:
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        raise _wrong(error, {}) from error
    except RecursionError as error:
        raise BadBody("The body is nested too deeply: an event is a map with one map in it.") from error
    except UnicodeDecodeError as error:
        raise BadBody(f"The body has a string that is not UTF-8: byte {error.start} of it is {error.object[error.start]:#04x}.") from error
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise BadBody(f"The body is not msgpack: {error}.") from error


def _limited(items: list[Any], max_events: int) -> list[Any]:
    if len(items) > max_events:
        raise _too_many(max_events)
    return items


def _too_many(max_events: int) -> TooLarge:
    return TooLarge(f"More than {max_events} events in one request (ONSET_MAX_BATCH_EVENTS): send them in parts.")


def _try_line(line: bytes) -> Event | ItemError:
    try:
        return _event.decode(line)
    except _UNDECODED:
        try:
            return _try(_parse(line, "line"))
        except BadBody as error:
            return BadEvent(error.detail)


def _plain_line(line: bytes) -> Any:
    try:
        return _plain.decode(line)
    except _UNDECODED:
        try:
            return _parse(line, "line")
        except BadBody as error:
            return BadEvent(error.detail)


def _try(item: Any) -> Event | ItemError:
    try:
        return checked(item)
    except BadEvent as error:
        return error


def _parse(content: bytes, what: str = "body") -> Any:
    """JSON, and what some senders take for it, so that the field can be named: NaN and Infinity, whole numbers of any length,
    control characters within strings. Raises BadBody.
    """
    try:
        text = content.decode()
        try:
            return json.loads(text, strict=False)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a whole number of thousands of digits, which Python does not convert
            return json.loads(text, strict=False, parse_int=_whole)
    except RecursionError as error:
        raise BadBody(f"The {what} is nested too deeply: an event is an object with one object in it.") from error
    except UnicodeDecodeError as error:
        raise BadBody(f"The {what} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}.") from error
    except ValueError as error:
        raise BadBody(f"The {what} is not JSON: {error}.") from error


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def checked(item: Any) -> Event:
    """Plain values → an event. Raises BadEvent that names the field and the value."""
    if not isinstance(item, dict):
        raise BadEvent(f"An event is an object, not {shown(item)}.", value=shown(item))
    for name in item:
        if not isinstance(name, str):  # msgpack has such
            raise BadEvent(f"A field's name is text, not {shown(name)}.", value=shown(item[name]))
        if name not in _FIELDS:
            raise BadEvent(f"'{name[:64]}' is no field of an event; {_meant(name, item[name])}.", name[:64], shown(item[name]))
    _check_values(item.get("values"))
    if isinstance(sequence := item.get("sequence"), float) and sequence.is_integer():
        item["sequence"] = int(sequence)  # JSON has no integers: 7.0 is 7
    try:
        return msgspec.convert(item, Event)
    except UnicodeEncodeError:  # half a character in a text, where none belongs: named like any other
        return checked({name: _whole_characters(value) for name, value in item.items()})
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise _wrong(error, item) from error


def _wrong(error: Exception, item: Mapping[str, Any]) -> BadEvent:
    """What a decoder said, with the value that was sent, if the item is at hand."""
    what, _, _ = str(error).partition(" - at ")
    path = _PATH.search(str(error))
    field = path.group(1) if path else ""
    value = shown(item.get(field.partition(".")[0])) if item else ""
    return BadEvent(f"{field or 'The event'}: {what}{f'; got {value}' if value else ''}.", field, value)


def _whole_characters(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _meant(name: str, value: Any) -> str:
    """What to write instead of a field that is none: the two that people try first are a list of events, and a reading of its own."""
    if isinstance(value, list):
        return "several events are an array by themselves, [{...}, {...}], or one a line"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'readings go into values: {{"values": {{"{name[:64]}": {shown(value)}}}}}'
    return f"it has {', '.join(_FIELDS)}"


def from_fields(fields: Mapping[bytes, bytes]) -> Event:
    """An event written flat, field by field; what is no field of an event is a feature. Raises BadEvent."""
    item: dict[str, Any] = {}
    values: dict[str, float | None] = {}
    for raw, content in fields.items():
        try:
            name, text = raw.decode(), content.decode()
        except UnicodeDecodeError as error:
            raise BadEvent(f"{shown(raw.decode(errors='replace'))} is not UTF-8.", raw.decode(errors="replace")[:64]) from error
        if name in ("stream_id", "event_id", "message"):
            item[name] = text
        elif name in ("timestamp", "sequence"):
            number = to_number(text)
            item[name] = text if number is None else number
        elif name == "end":
            item[name] = {"true": True, "false": False}.get(text, text)
        elif text in ("", "null"):
            values[name] = None
        elif (number := to_number(text)) is not None:
            values[name] = number
        else:
            raise BadEvent(
                f"values.{name[:64]} is {shown(text)}, not a number; leave it empty where it is missing.",
                f"values.{name[:64]}",
                shown(text),
            )
    return checked(item | {"values": values} if values else item)


def to_number(text: str) -> int | float | None:
    """None = it is not one."""
    if len(text) > _MAX_DIGITS:  # which Python would read for milliseconds
        return None
    try:
        return int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        return None


def _check_values(values: Any) -> None:
    """Name the feature whose value is no number; msgspec's message names only `values`."""
    if not isinstance(values, dict):
        return
    for name, number in values.items():
        if not isinstance(name, str):
            raise BadEvent(f"A feature's name is text, not {shown(name)}.", "values", shown(name))
        field = f"values.{name[:64]}"
        if not 0 < len(name) <= MAX_NAME_LENGTH:
            raise BadEvent(f"A feature's name has 1 to {MAX_NAME_LENGTH} characters, this one {len(name)}.", field, shown(number))
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadEvent(f"{field} is {shown(number)}, not a number; send null for a missing value.", field, shown(number))
        if not math.isfinite(as_float(number)):
            raise BadEvent(f"{field} is {shown(number)}; send null for a missing value.", field, shown(number))


def as_float(number: int | float) -> float:
    """A whole number beyond all floats is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
