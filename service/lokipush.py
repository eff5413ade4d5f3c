"""Loki's push requests on the wire: protobuf or JSON → the lines of some streams. Knows neither our streams nor scores.

    logproto.PushRequest    1 streams  1 labels: {app="a", host="b"}
                                       2 entries  1 timestamp {1 seconds, 2 nanos} · 2 line · 3 structured metadata {1 name, 2 value}
    JSON                    {"streams": [{"stream": {label: value}, "values": [[nanoseconds as text, line, {name: value}], ...]}, ...]}

Other fields are skipped, and a line's metadata may be left out. Text that is not UTF-8 is read with U+FFFD in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from service.errors import BadBody, BadEvent, TooLarge
from service.events import PER_SECOND
from service.wire import LENGTH, VARINT, Body, read_varint, reading

MESSAGE = "logproto.PushRequest"

REMEMBERED_LENGTH = 2048
"""Of a stream's labels: longer ones are read each time, so that memory stays bounded."""
# Possessive (*+): otherwise each character of a text takes 160 bytes, to go back to.
_PAIR = re.compile(r'\s*+([a-zA-Z_][a-zA-Z0-9_.:]*+|"(?:[^"\\]|\\.)*+")\s*+=\s*+("(?:[^"\\]|\\.)*+"|`[^`]*+`)\s*+(?:,|$)', re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:([abfnrtv\\\"'])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_PLAIN = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_NOTHING: Mapping[str, str] = {}

Label = tuple[bytes, bytes]


class Entry(NamedTuple):
    """A line of a stream."""

    nanoseconds: int
    """Since 1970."""
    line: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pushed:
    """Lines that were sent under one set of labels, in the order sent."""

    labels: Sequence[Label]
    entries: Sequence[Entry]
    error: BadEvent | None = None
    """Why the labels cannot be read."""


class _Stream(msgspec.Struct, gc=False):
    stream: dict[str, str]
    values: list[Any]


class _Push(msgspec.Struct, gc=False):
    streams: list[_Stream]


_push = msgspec.json.Decoder(_Push)


def decode_json(content: bytes, *, most: int) -> list[Pushed]:
    """Raises BadBody, and TooLarge for more than `most` lines or streams."""
    with reading('push request of Loki\'s, {"streams": [{"stream": {}, "values": []}]}'):
        push = _push.decode(content)
    _limited(len(push.streams), "streams", most)
    _limited(sum(len(stream.values) for stream in push.streams), "lines", most)
    return [
        Pushed([(_bytes(name), _bytes(value)) for name, value in stream.stream.items()], [_value(value, i) for value in stream.values])
        for i, stream in enumerate(push.streams)
    ]


def decode_protobuf(content: bytes, *, most: int) -> list[Pushed]:
    """The same of an unpacked logproto.PushRequest."""
    pushed: list[Pushed] = []
    left, body = most, Body(content)
    with reading(MESSAGE):
        streams = ((start, end) for number, kind, start, end in body.fields(0, len(content)) if (number, kind) == (1, LENGTH))
        places = list(islice(streams, most + 1))
        _limited(len(places), "streams", most)
        for start, end in places:
            pushed.append(_stream(body, start, end, left, most))
            left -= len(pushed[-1].entries)
    return pushed


def _limited(count: int, what: str, most: int) -> None:
    if count > most:
        raise TooLarge(f"More than {most} {what} in one request (ONSET_MAX_LINES): send smaller batches.")


def _value(value: Any, stream: int) -> Entry:
    """A line in JSON. Raises BadBody."""
    match value:
        case [str(time) | int(time), str(line)]:
            metadata = _NOTHING
        case [str(time) | int(time), str(line), dict(metadata)] if all(isinstance(text, str) for text in metadata.values()):
            pass
        case [str() | int(), str(), dict(metadata)]:
            name, wrong = next((name, text) for name, text in metadata.items() if not isinstance(text, str))
            raise BadBody(
                f"streams.{stream}.values has structured metadata whose {str(name)[:64]!r} is {str(wrong)[:64]}: it must be text."
            )
        case _:
            raise BadBody(f'streams.{stream}.values holds {str(value)[:64]}, not ["nanoseconds since 1970", "line", {{"name": "value"}}].')
    digits = str(time)
    if isinstance(time, bool) or not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise BadBody(f"streams.{stream}.values has the time {digits[:64]!r}, which is no nanoseconds since 1970.")
    return Entry(int(digits), line, metadata)


def _stream(body: Body, start: int, end: int, left: int, most: int) -> Pushed:
    labels, places = b"", list[tuple[int, int]]()
    for number, kind, here, there in body.fields(start, end):
        if kind == LENGTH and number == 1:
            labels = body.content[here:there]
        elif kind == LENGTH and number == 2:
            if len(places) == left:
                _limited(most + 1, "lines", most)
            places.append((here, there))
    entries = [_entry(body, here, there) for here, there in places]
    try:
        return Pushed(labels_of(labels.decode(errors="replace")), entries)
    except BadEvent as error:
        return Pushed((), entries, error)


def _entry(body: Body, start: int, end: int) -> Entry:
    nanoseconds, line, metadata = 0, "", dict[str, str]()
    for number, kind, here, there in body.fields(start, end):
        if kind != LENGTH:
            continue
        if number == 1:
            nanoseconds = _nanoseconds(body, here, there)
        elif number == 2:
            line = body.content[here:there].decode(errors="replace")
        elif number == 3:
            metadata |= _pair(body, here, there)
    return Entry(nanoseconds, line, metadata or _NOTHING)


def _nanoseconds(body: Body, start: int, end: int) -> int:
    found = {number: read_varint(body.content, here)[0] for number, kind, here, _ in body.fields(start, end) if kind == VARINT}
    seconds = found.get(1, 0)
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * PER_SECOND["ns"] + found.get(2, 0)


def _pair(body: Body, start: int, end: int) -> dict[str, str]:
    places = [(number, here, there) for number, kind, here, there in body.fields(start, end) if kind == LENGTH]
    found = {number: body.content[here:there].decode(errors="replace") for number, here, there in places}
    return {found.get(1, ""): found.get(2, "")}


def labels_of(text: str) -> Sequence[Label]:
    """The labels of `{app="a", host="b"}`. Raises BadEvent."""
    return _remembered(text) if len(text) <= REMEMBERED_LENGTH else _labels(text)


def _labels(text: str) -> Sequence[Label]:
    inside = text.strip()
    if not (inside.startswith("{") and inside.endswith("}")):
        raise _no_labels(text)
    inside, at, labels = inside[1:-1].strip(), 0, []
    while at < len(inside):
        pair = _PAIR.match(inside, at)
        if pair is None:
            raise _no_labels(text)
        labels.append((_unquoted(pair[1]), _unquoted(pair[2])))
        at = pair.end()
    return tuple(labels)


_remembered = lru_cache(maxsize=4096)(_labels)


def _no_labels(text: str) -> BadEvent:
    return BadEvent(f'The labels {text[:128]!r} cannot be read: they look like {{app="a", host="b"}}.', "labels", text[:64])


def _unquoted(text: str) -> bytes:
    """A name, or a string literal of Go's."""
    content = _bytes(text)
    if content[:1] == b"`":
        return content[1:-1]
    return _ESCAPE.sub(_unescaped, content[1:-1]) if content[:1] == b'"' else content


def _unescaped(match: re.Match[bytes]) -> bytes:
    plain, hexadecimal, octal, short, long, other = match.groups()
    if plain:
        return _PLAIN.get(plain, plain)
    if other is not None:
        return match[0]
    if hexadecimal or octal:
        return bytes((int(hexadecimal, 16) if hexadecimal else int(octal, 8) & 0xFF,))
    point = int(short or long, 16)
    return chr(point if point < 0x110000 else 0xFFFD).encode(errors="replace")


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")
