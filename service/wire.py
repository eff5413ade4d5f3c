"""Protobuf's wire format, read by hand where a message's usual shape is known; writes what little we answer. And what is no message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from service.errors import BadBody, TooLarge

PROTOBUF = "application/x-protobuf"
"""The media type."""
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
BYTES_A_FIELD, FEW_FIELDS = 2.5, 500_000
"""A field takes so many bytes on average, where there are more than a few. One of two bytes says next to nothing and costs a microsecond,
an empty message twice that; the attribute `pid`=200 is four fields in 12 bytes."""


class Malformed(Exception):
    """What is no message; says where."""


def cut_off(at: int) -> Malformed:
    return Malformed(f"what begins at byte {at} is cut off")


@contextmanager
def reading(message: str) -> Iterator[None]:
    """What is wrong with a body that is to be such a message, in protobuf or JSON, becomes BadBody."""
    try:
        yield
    except IndexError as error:
        raise BadBody(f"The body is no {message}: it is cut off.") from error
    except (Malformed, msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BadBody(f"The body is no {message}: {error}.") from error


class Body:
    """A message with those within it: each field that is looked at counts, and each empty message, as there may be only so many."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.allowed = self._left = max(FEW_FIELDS, int(len(content) / BYTES_A_FIELD))

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Of the message that lies there: number, wire type, and where its content lies. Raises Malformed, IndexError, TooLarge."""
        if at >= end:
            self.looked()
        content = self.content
        while at < end:
            self.looked()
            number, kind, start, at = field(content, at, end)
            yield number, kind, start, at

    def looked(self) -> None:
        """One more is looked at. Raises TooLarge."""
        self._left -= 1
        if self._left < 0:
            raise TooLarge(f"The body has more than {self.allowed} fields in {len(self.content)} bytes: send it in several.")


def field(content: bytes, at: int, end: int) -> tuple[int, int, int, int]:
    tag, start = content[at], at + 1
    if tag > 127:
        tag, start = read_varint(content, at)
    kind = tag & 7
    if kind == LENGTH:
        size = content[start]
        start += 1
        if size > 127:
            size, start = read_varint(content, start - 1)
        there = start + size
    elif kind == VARINT:
        _, there = read_varint(content, start)
    elif kind in (FIXED64, FIXED32):
        there = start + (8 if kind == FIXED64 else 4)
    else:
        raise Malformed(f"byte {at} begins a field of the unknown wire type {kind}")
    if there > end:
        raise cut_off(at)
    if tag < 8:
        raise Malformed(f"byte {at} begins a field without a number")
    return tag >> 3, kind, start, there


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = shift = 0
    while shift < 70:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise Malformed(f"byte {at} is within a number beyond 64 bits")


def varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
