r"""InfluxDB's line protocol: lines → points as plain values. Knows neither streams nor scores.

    weather,station=north\ gate temp=21.5,wet=t,n=3i,note="a \"b\"" 1795797153000000000
    → {"name": "weather", "tags": {"station": "north gate"}, "fields": {"temp": 21.5, "wet": True, "n": 3, "note": 'a "b"'},
       "timestamp": 1795797153000000000, "series": "weather,station=north gate"}

A backslash stands before a comma, a space, or a `=` (not of the measurement) that belongs to a name or a tag, and before `"` or another
backslash within a text; before anything else it is one itself. Blank lines and those that begin with # are nothing. Text that is not UTF-8
is read with U+FFFD in its place.
"""

from __future__ import annotations

import re
from typing import Any

from service.errors import BadEvent, TooLarge
from service.events import shown

# Possessive (++): what is escaped must not be taken for a mark when a line does not match at once.
_MEASUREMENT = re.compile(r"[ \t]*+((?:\\[, ]|[^, \n])++)")
_TAG = re.compile(r",((?:\\[,= ]|[^,= \n])++)=((?:\\[,= ]|[^,= \n])++)")
_FIELD = re.compile(
    r"((?:\\[,= ]|[^,= \n])++)=(?:"
    r'"((?:[^"\\]++|\\.)*+)"'
    r"|([+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?)([iu]?)"
    r"|(true|True|TRUE|t|T|false|False|FALSE|f|F)"
    r")(?=[, \r\n]|\Z)",
    re.DOTALL,
)
_TIME = re.compile(r" *+(?:(-?\d{1,20}) *+)?\r?(?:\n|\Z)")
_NOTHING = re.compile(r"(?:[ \t\r]*+(?:#[^\n]*+)?(?:\n|\Z))++")
_WHOLE_DIGITS = 20
"""Of 64 bits, with their sign. Python makes no int of thousands."""
_IN_MEASUREMENT, _IN_TAG, _IN_TEXT = re.compile(r"\\([, ])"), re.compile(r"\\([,= ])"), re.compile(r'\\(["\\])')


def decode(content: bytes, *, most: int) -> list[dict[str, Any] | BadEvent]:
    """Its points, or what is wrong with a line, in order. Raises TooLarge for more than `most`."""
    text, at = content.decode(errors="replace"), 0
    points: list[dict[str, Any] | BadEvent] = []
    while at < len(text):
        if nothing := _NOTHING.match(text, at):
            at = nothing.end()
            continue
        if len(points) == most:
            raise TooLarge(f"More than {most} lines in one request (ONSET_MAX_BATCH_EVENTS): send them in parts.")
        point, at = _point(text, at)
        points.append(point)
    return points


def _point(text: str, start: int) -> tuple[dict[str, Any] | BadEvent, int]:
    """The point of the line that begins here, and where the next one does."""
    if (found := _MEASUREMENT.match(text, start)) is None:
        return _bad(text, start, start, "a measurement")
    name, tags, fields = _plain(_IN_MEASUREMENT, found[1]), dict[str, str](), dict[str, Any]()
    at = found.end()
    while found := _TAG.match(text, at):
        tags[_plain(_IN_TAG, found[1])] = _plain(_IN_TAG, found[2])
        at = found.end()
    if text[at : at + 1] != " ":
        return _bad(text, start, at, "a tag such as ,host=a, or a space and the fields")
    mark = " "
    while text[at : at + 1] == mark:
        at += 1
        while mark == " " and text[at : at + 1] == " ":
            at += 1
        if (found := _FIELD.match(text, at)) is None:
            return _bad(text, start, at, 'a field such as temp=21.5, n=3i, on=true or note="text"')
        fields[_plain(_IN_TAG, found[1])] = _value(found)
        at, mark = found.end(), ","
    if (found := _TIME.match(text, at)) is None:
        return _bad(text, start, at, "a time in whole digits, or the end of the line")
    series = ",".join([name, *(f"{tag}={value}" for tag, value in sorted(tags.items()))])
    point = {"name": name, "tags": tags, "fields": fields, "series": series}
    return (point if found[1] is None else point | {"timestamp": int(found[1])}), found.end()


def _value(found: re.Match[str]) -> Any:
    _, written, number, whole, truth = found.groups()
    if written is not None:
        return _plain(_IN_TEXT, written)
    if number is None:
        return truth[0] in "tT"
    return int(number) if whole and len(number) <= _WHOLE_DIGITS and number.lstrip("+-").isdigit() else float(number)


def _plain(escaped: re.Pattern[str], text: str) -> str:
    return escaped.sub(r"\1", text) if "\\" in text else text


def _bad(text: str, start: int, at: int, wanted: str) -> tuple[BadEvent, int]:
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    here = shown(text[at:end][:40]) if at < end else "the end of the line"
    detail = f"The line {shown(text[start:end].strip())} is no line protocol: at character {at - start + 1} {wanted} is wanted, not {here}."
    return BadEvent(detail, "line", here), end + 1
