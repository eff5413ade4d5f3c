"""InfluxDB's lines are read as its documentation escapes them; a bad one is named by the place, and its neighbours are read."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BadEvent, TooLarge
from service.lineprotocol import decode


def points(text: str) -> list[Any]:
    return decode(text.encode(), most=100)


def one(text: str) -> dict[str, Any]:
    [point] = points(text)
    assert isinstance(point, dict), point
    return point


@pytest.mark.parametrize(
    ("line", "name", "tags", "fields"),
    [
        ("cpu,host=a idle=91.5,user=3i 5", "cpu", {"host": "a"}, {"idle": 91.5, "user": 3}),
        ("m f=1", "m", {}, {"f": 1.0}),
        ("m a=1.,b=.5,c=-1.5E-3,d=1e3,e=12u,f=-7i", "m", {}, {"a": 1.0, "b": 0.5, "c": -0.0015, "d": 1000.0, "e": 12, "f": -7}),
        ("m a=t,b=TRUE,c=f,d=False", "m", {}, {"a": True, "b": True, "c": False, "d": False}),
        (r'm a="x, y=z",b="say \"hi\" \\ C:\dir",c=""', "m", {}, {"a": "x, y=z", "b": r'say "hi" \ C:\dir', "c": ""}),
        ('m a="two\nlines" 5', "m", {}, {"a": "two\nlines"}),
        (r"a\,b\ c=d,t\=k=v\,w\ x f\ g=1", "a,b c=d", {"t=k": "v,w x"}, {"f g": 1.0}),
        (r"m,p=C:\dir\new f=1", "m", {"p": r"C:\dir\new"}, {"f": 1.0}),
        ('m,quoted="web\\ 1" f=1', "m", {"quoted": '"web 1"'}, {"f": 1.0}),
        ("  m   f=1   5  \r\n", "m", {}, {"f": 1.0}),
    ],
)
def test_what_is_escaped_belongs_to_its_name(line: str, name: str, tags: dict[str, str], fields: dict[str, Any]) -> None:
    point = one(line)
    assert (point["name"], point["tags"], point["fields"]) == (name, tags, fields)


def test_a_series_has_its_tags_in_order_and_a_time_only_where_it_was_sent() -> None:
    assert one("m,b=2,a=1 f=1 17") == {
        "name": "m",
        "tags": {"b": "2", "a": "1"},
        "fields": {"f": 1.0},
        "series": "m,a=1,b=2",
        "timestamp": 17,
    }
    assert one("m,a=1,b=2 f=1")["series"] == "m,a=1,b=2"
    assert "timestamp" not in one("m f=1")


@pytest.mark.parametrize(("digits", "value"), [(19, 10**19 - 1), (5000, math.inf)])
def test_a_whole_number_of_any_length_is_a_number_or_beyond_all_of_them(digits: int, value: float) -> None:
    assert one(f"m f={'9' * digits}i")["fields"] == {"f": value}


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\\"), min_size=1, max_size=8)
TIMES = st.none() | st.integers(0, 2**62)
VALUES = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
)


def escaped(text: str, marks: str) -> str:
    return "".join(f"\\{character}" if character in marks else character for character in text)


def written(value: Any) -> str:
    if isinstance(value, str):
        return f'"{escaped(value, chr(34) + chr(92))}"'
    return f"{value}i" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


@settings(max_examples=300)
@given(NAMES, st.dictionaries(NAMES, NAMES, max_size=3), st.dictionaries(NAMES, VALUES, min_size=1, max_size=3), TIMES)
def test_what_is_written_as_documented_is_read_as_it_was(
    name: str, tags: dict[str, str], fields: dict[str, Any], moment: int | None
) -> None:
    if name[0] in "# \t":
        name = f"m{name}"
    head = ",".join([escaped(name, ", "), *(f"{escaped(tag, ',= ')}={escaped(value, ',= ')}" for tag, value in tags.items())])
    body = ",".join(f"{escaped(field, ',= ')}={written(value)}" for field, value in fields.items())
    point = one(f"{head} {body}" + ("" if moment is None else f" {moment}"))
    assert (point["name"], point["tags"], point.get("timestamp")) == (name, tags, moment)
    assert point["fields"] == fields
    assert [type(value) for value in point["fields"].values()] == [type(value) for value in fields.values()]


@pytest.mark.parametrize(
    ("line", "at"),
    [
        ("m", 2),
        ("m,", 2),
        ("m,a f=1", 2),
        ("m,a= f=1", 2),
        (r"m,a=b\,c=d f=1", 9),
        (r"m,a=b\\,c=d f=1", 10),
        ("m f", 3),
        ("m f=abc", 3),
        ("m f=nan", 3),
        ('m f="x', 3),
        ("m f=1i5", 3),
        ("m f=1,", 7),
        ("m f=1 x", 6),
        ("m f=1 5 6", 6),
        (",a=b f=1", 1),
    ],
)
def test_a_bad_line_is_named_by_the_place_and_its_neighbours_are_read(line: str, at: int) -> None:
    before, error, after = points(f"# a comment\n\nm f=1\r\n{line}\nm f=2 7")
    assert (before["fields"], after["fields"], after["timestamp"]) == ({"f": 1.0}, {"f": 2.0}, 7)
    assert isinstance(error, BadEvent)
    assert error.field == "line"
    assert f"at character {at} " in error.detail


def test_bytes_that_are_no_utf8_cost_one_character() -> None:
    [point] = decode(b"m,host=M\xfcller f=1", most=10)
    assert isinstance(point, dict)
    assert point["tags"] == {"host": "M\ufffdller"}


def test_more_lines_than_allowed_are_too_many_and_nothing_else_is() -> None:
    assert len(decode(b"m f=1\n# c\n\n" * 5, most=5)) == 5
    with pytest.raises(TooLarge, match="More than 5 lines"):
        decode(b"m f=1\n" * 6, most=5)


@pytest.mark.parametrize("line", ['m f="\\"\n', 'm f="x\n', "m,a=b\\,c=d f=1\n", "\\", "m,", "a=", "# c\n", 'm f="' + "\\" * 99])
def test_no_line_is_gone_through_again_and_again(line: str) -> None:
    content = (line * (300_000 // len(line))).encode()
    started = time.process_time()
    with contextlib.suppress(TooLarge):
        decode(content, most=200_000)
    assert time.process_time() - started < 60  # some seconds, where going through it for each line would take hours
