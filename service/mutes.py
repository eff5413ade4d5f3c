"""Mutes: alerts that nobody is to be told of for a while, such as those of a line under maintenance.

    PUT /v1/mutes/NAME ─► the book ─► the desk: an alert that opens, or escalates, while one is in force is muted: no sink is told
                                        ├── resolved meanwhile: nobody ever is
                                        └── open when no mute holds it any more: told then, at the desk's next look

What is scored, learned, listed and counted is as ever.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Literal, TypeGuard

import msgspec

from service.errors import BadParameter, TooLarge
from service.events import EARLIEST_SECONDS, MAX_NAME_LENGTH, UNPRINTABLE, Severity, shown

NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MOST = 1000
"""Mutes that are kept."""
PATTERNS = 100
"""Of one mute, at most."""
PATTERNS_OF_ALL = 2000
"""Of all that are not over: each alert is held against them, five hundred alerts within the lease of the book."""
LONGEST_SECONDS = 366 * 86_400.0
"""A mute that nobody remembers is a service that says nothing."""
MAX_NOTE = 2000
PARTS = ("streams", "model", "starts_at", "ends_at", "by", "note")

_NAME, _UNPRINTABLE, _SURROGATE = re.compile(NAME), re.compile(UNPRINTABLE), re.compile(r"[\ud800-\udfff]")


class Mute(msgspec.Struct, frozen=True):
    """Which alerts nobody is told of, and from when to when, in seconds since 1970 by the store's clock."""

    name: str
    streams: list[str]
    """Whole names of streams; `*` is any characters, also none."""
    model: str | None
    """null = of all models."""
    starts_at: float
    ends_at: float
    by: str
    note: str
    changed_at: float

    def holds(self, model: str, stream_id: str, at: float) -> bool:
        ours = self.model in (None, model) and self.covers(at, at)
        return ours and any(matches(pattern, stream_id) for pattern in self.streams)

    def covers(self, first: float, last: float) -> bool:
        """Whether it is in force at some time between these, which may be of the log's entries: cut off to milliseconds."""
        return math.floor(1000 * self.starts_at) / 1000 <= last and first < self.ends_at


class Muted(msgspec.Struct, frozen=True):
    """What is not told of an alert while it is muted."""

    mute: str
    """Its name."""
    until: float
    """The mute's end, seconds since 1970."""
    told: Severity | None
    """The severity that was told before it began; null = nobody was told of the alert."""


class MuteReply(Mute, frozen=True, kw_only=True):
    """A mute as people and programs are shown it."""

    state: Literal["coming", "in_force", "over"]

    @staticmethod
    def of(mute: Mute, now: float) -> MuteReply:
        known = {name: getattr(mute, name) for name in Mute.__struct_fields__}
        return MuteReply(**known, state="coming" if now < mute.starts_at else "in_force" if now < mute.ends_at else "over")


class MuteList(msgspec.Struct, frozen=True):
    """All mutes, the one that ends first first. Those that are over are kept for as long as resolved alerts are."""

    mutes: list[MuteReply]


def matches(pattern: str, name: str) -> bool:
    """Whether it is the whole name. In linear time, whatever the pattern."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    *middle, last = rest
    if not name.startswith(first):
        return False
    at = len(first)
    for part in middle:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(name) - at >= len(last) and name.endswith(last)


def holding(mutes: Iterable[Mute], model: str, stream_id: str, at: float) -> Mute | None:
    """Of the mutes that hold this stream's alerts at that time the one that ends last; None = none does."""
    return max((mute for mute in mutes if mute.holds(model, stream_id, at)), key=lambda mute: mute.ends_at, default=None)


def asked(name: str, body: Mapping[str, Any], now: float) -> Mute:
    """The mute that a request asks for. Raises BadParameter."""
    if not _NAME.fullmatch(name):
        raise _bad("name", name, "1 to 64 letters, digits, dots, - and _, the first a letter or digit")
    for part, value in body.items():
        if part not in PARTS:
            raise BadParameter(f"'{part[:64]}' is no part of a mute; it has {', '.join(PARTS)}.", part[:64], shown(value))
    streams, model, by, note = body.get("streams"), body.get("model"), body.get("by"), body.get("note", "")
    if not isinstance(streams, list) or not 0 < len(streams) <= PATTERNS:
        raise _bad("streams", streams, f"a list of 1 to {PATTERNS} names of streams, in which * is any characters")
    for i, pattern in enumerate(streams):
        if not _text(pattern):
            raise _bad(f"streams[{i}]", pattern, f"a name of 1 to {MAX_NAME_LENGTH} characters, in which * is any characters")
    if model is not None and not _text(model):
        raise _bad("model", model, "the name of a model; left out, it is all of them")
    if not _text(by):
        raise _bad("by", by, f"names who says so, in 1 to {MAX_NAME_LENGTH} characters")
    if not (isinstance(note, str) and len(note) <= MAX_NOTE and not _SURROGATE.search(note)):
        raise _bad("note", note, f"a text of at most {MAX_NOTE} characters")
    starts_at = now if body.get("starts_at") is None else _moment("starts_at", body["starts_at"])
    ends_at = _moment("ends_at", body.get("ends_at"))
    if ends_at <= max(starts_at, now):
        raise _bad("ends_at", body["ends_at"], "a time that is not past, and later than starts_at")
    if ends_at - now > LONGEST_SECONDS:
        raise _bad("ends_at", body["ends_at"], "at most 366 days ahead, in seconds where it is a number")
    return Mute(name, list(dict.fromkeys(streams)), model, starts_at, ends_at, by, note, now)


def check_room(asked: Mute, kept: Iterable[Mute]) -> None:
    """Whether this one may be kept beside those, in place of one of its name. Raises TooLarge."""
    others = [mute for mute in kept if mute.name != asked.name]
    if len(others) >= MOST:
        raise TooLarge(f"There are {len(others)} mutes, as many as are kept: end some of them (DELETE).")
    if len(asked.streams) + sum(len(mute.streams) for mute in others if mute.ends_at > asked.changed_at) > PATTERNS_OF_ALL:
        raise TooLarge(f"Mutes that are not over would have more than {PATTERNS_OF_ALL} names between them: use *, or end some.")


def _text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH and not _UNPRINTABLE.search(value)


def _moment(field: str, value: Any) -> float:
    """Raises BadParameter. A time without a zone is refused: it is a person's, who means his own."""
    what = "a time with its zone (2026-11-28T16:00:00+01:00, …Z), or seconds since 1970"
    if isinstance(value, int | float) and not isinstance(value, bool) and EARLIEST_SECONDS <= value < 1e11:
        return float(value)
    if not isinstance(value, str) or not value.isascii():
        raise _bad(field, value, what)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise _bad(field, value, what) from None
    if moment.tzinfo is None:
        raise _bad(field, value, what)
    return moment.timestamp()


def _bad(field: str, value: Any, what: str) -> BadParameter:
    return BadParameter(f"{field} is {shown(value)}; it is {what}.", field, shown(value))
