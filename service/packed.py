"""Msgpack, looked through before objects of any kind are made of it.

A map's keys may be numbers, whose hashes anyone knows: 86,506 that are chosen so that each meets many others in Python's table take six
seconds, twice as many 27. (Those of text hang on a secret of the process.) And each byte may be a map by itself, which takes 64 and more.
"""

from __future__ import annotations

from service.errors import BadBody, TooLarge

SHORT_BYTES = 8192
"""What is no longer does no harm."""
WIDE = 1000
"""Maps of more entries have text as keys."""
BYTES_A_PART, FEW_PARTS = 4, 100_000
"""A part takes so many bytes on average, where there are more than a few: those of some ten thousand short readings, 7 MB at most."""

_TEXTS = frozenset((*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB))
_BYTES = {
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
    0xD4: 2,
    0xD5: 3,
    0xD6: 5,
    0xD7: 9,
    0xD8: 17,
}
_COUNTED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_EXT = (0xC7, 0xC8, 0xC9)


def _own(head: int) -> int:
    """Of the bytes or parts that follow a head, those that it says itself."""
    if 0xA0 <= head < 0xC0:
        return head & 0x1F
    if 0x80 <= head < 0xA0:
        return head & 0x0F
    return 1 if head in _EXT else _BYTES.get(head, 0)


def _within(head: int) -> int:
    """How many parts an entry has: 2 = a map's, 1 = an array's; 0 = what follows are bytes."""
    if 0x80 <= head < 0x90 or head in (0xDE, 0xDF):
        return 2
    return int(0x90 <= head < 0xA0 or head in (0xDC, 0xDD))


_WIDTH, _OWN, _WITHIN = (
    [_COUNTED.get(head, 0) for head in range(256)],
    [_own(head) for head in range(256)],
    [_within(head) for head in range(256)],
)


def look_through(content: bytes) -> None:
    """Raises BadBody and TooLarge; what is no msgpack is for the decoder to tell. A million parts take a second."""
    if len(content) <= SHORT_BYTES:
        return
    most = max(FEW_PARTS, len(content) // BYTES_A_PART)
    at, left, wide, outer = 0, 1, False, list[tuple[int, bool]]()
    for _ in range(most):
        if at >= len(content):
            return
        head = content[at]
        if wide and left % 2 == 0 and head not in _TEXTS:
            raise BadBody(f"The body has a map of more than {WIDE} entries with a key that is no text.")
        left, at, width = left - 1, at + 1, _WIDTH[head]
        count = _OWN[head] + (int.from_bytes(content[at : at + width], "big") if width else 0)
        at += width
        if each := _WITHIN[head]:
            outer.append((left, wide))
            left, wide = count * each, each == 2 and count > WIDE
        else:
            at += count
        while left == 0 and outer:
            left, wide = outer.pop()
    if at < len(content):
        raise TooLarge(f"The body has more than {most} parts in {len(content)} bytes: send it in several.")
