"""Loki's push requests are read as the protobuf library writes them, in both forms alike; what is none is refused with its place."""

from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BadBody, BadEvent, TooLarge
from service.lokipush import Entry, Pushed, decode_json, decode_protobuf, labels_of
from service.wire import varint
from tests.pushes import Line, push_object, push_protobuf

NOW = 1_790_000_000_123_456_789
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TIMES = st.integers(0, 2**62)


def quoted(text: str) -> str:
    """A label's value as Go's %q writes it, near enough."""
    return json.dumps(text, ensure_ascii=False)


@settings(max_examples=200)
@given(st.lists(st.tuples(TEXT, st.lists(st.tuples(TIMES, TEXT, st.dictionaries(TEXT, TEXT, max_size=2)), max_size=4)), max_size=3))
def test_both_forms_say_what_was_sent(streams: list[tuple[str, list[tuple[int, str, dict[str, str]]]]]) -> None:
    lines: dict[str, list[Line]] = {f'{{app={quoted(app)}, n="{i}"}}': list(entries) for i, (app, entries) in enumerate(streams)}
    labels = {name: {"app": app, "n": str(i)} for i, (name, (app, _)) in enumerate(zip(lines, streams, strict=True))}
    expected = [
        Pushed(
            [(name.encode(), value.encode()) for name, value in labels[key].items()],
            [Entry(time, line, metadata) for time, line, metadata in entries],  # type: ignore[misc]
        )
        for key, entries in lines.items()
    ]
    by_protobuf = decode_protobuf(push_protobuf(lines), most=100)
    by_json = decode_json(json.dumps(push_object(lines, labels)).encode(), most=100)
    assert [(list(one.labels), one.entries) for one in by_protobuf] == [(one.labels, one.entries) for one in expected]
    assert by_json == expected


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("{}", {}),
        ('{a="b"}', {"a": "b"}),
        (' { a = "b" , c="d", } ', {"a": "b", "c": "d"}),
        (r'{a="q\"\\\n\t\x41\u00fc\U0001F600\101"}', {"a": 'q"\\\n\tA\u00fc\U0001f600A'}),
        ('{a=`raw \\n`, "dotted.name"="v"}', {"a": "raw \\n", "dotted.name": "v"}),
        ('{a="x, y}=\\"z"}', {"a": 'x, y}="z'}),
        (r'{a="\xff"}', {"a": "\ufffd"}),
    ],
)
def test_labels_are_read_as_loki_writes_them(text: str, labels: dict[str, str]) -> None:
    assert {name.decode(): value.decode(errors="replace") for name, value in labels_of(text)} == labels


@pytest.mark.parametrize("text", ["", "a", "{a}", "{a=b}", '{a="b"', '{a="b" c="d"}', '{="b"}', '{a="b}'])
def test_labels_that_cannot_be_read_are_the_fault_of_their_stream_alone(text: str) -> None:
    with pytest.raises(BadEvent, match="labels"):
        labels_of(text)
    bad, good = decode_protobuf(push_protobuf({text: [(NOW, "a"), (NOW, "b")], '{a="b"}': [(NOW, "c")]}), most=10)
    assert (len(bad.entries), bad.error is not None, good.error) == (2, True, None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Input data was truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `streams`"),
        (b'{"streams": [{"values": []}]}', r"stream.*\$.streams\[0\]"),
        (b'{"streams": [{"stream": {"a": 1}, "values": []}]}', "Expected `str`, got `int`"),
        (b'{"streams": [{"stream": {}, "values": [["1"]]}]}', r"streams.0.values holds \['1'\]"),
        (
            b'{"streams": [{"stream": {}, "values": [["1", "a", {"b": 2}]]}]}',
            r"streams.0.values has structured metadata whose 'b' is 2: it must be text",
        ),
        (
            b'{"streams": [{"stream": {}, "values": [["1", "a"]]}, {"stream": {}, "values": [["soon", "a"]]}]}',
            "streams.1.values has the time 'soon'",
        ),
        (b'{"streams": [{"stream": {}, "values": [["12345678901234567890", "a"]]}]}', "no nanoseconds since 1970"),
        (b'{"streams": [{"stream": {}, "values": [[1%s, "a"]]}]}' % (b"0" * 400), "no nanoseconds since 1970"),
        (b'{"streams": [{"stream": {}, "values": [[true, "a"]]}]}', "no nanoseconds since 1970"),
        (b"\xff\xff", "push request"),
    ],
)
def test_json_that_is_no_request_is_refused_with_its_place(content: bytes, says: str) -> None:
    with pytest.raises(BadBody, match=says):
        decode_json(content, most=10)


def test_a_time_in_json_may_be_a_number() -> None:
    [pushed] = decode_json(b'{"streams": [{"stream": {"a": "b"}, "values": [[1790000000123456789, "x"]]}]}', most=10)
    assert pushed.entries == [Entry(NOW, "x", {})]


def test_every_cut_of_a_request_is_refused_or_read_and_nothing_else_is_raised() -> None:
    whole = push_protobuf({'{a="b"}': [(NOW, "line one", {"trace": "1"}), (NOW + 1, "line two")], '{c="d"}': [(5, "three")]})
    for end in range(len(whole)):
        with contextlib.suppress(BadBody):
            assert sum(len(one.entries) for one in decode_protobuf(whole[:end], most=10)) < 3
    with pytest.raises(BadBody, match=r"logproto.PushRequest: what begins at byte"):
        decode_protobuf(whole[:-1], most=10)


@pytest.mark.timeout(120)  # it takes two seconds; to put them together one by one took half an hour
def test_as_much_metadata_of_a_line_as_a_body_holds_is_read_in_one_go() -> None:
    metadata = {f"{i:06}": "" for i in range(500_000)}
    [pushed] = decode_protobuf(push_protobuf({'{a="b"}': [(NOW, "line", metadata)]}), most=10)
    assert pushed.entries[0].metadata == metadata


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(BadBody):
        decode_protobuf(content, most=10)


def test_a_line_that_is_no_utf_8_is_read_with_replacements() -> None:
    sent = push_protobuf({'{a="b"}': [(NOW, "caf?")]}).replace(b"caf?", b"caf\xe9")
    [pushed] = decode_protobuf(sent, most=10)
    assert pushed.entries[0].line == "caf\ufffd"


def inside(tag: int, content: bytes) -> bytes:
    return bytes([tag]) + varint(len(content)) + content


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a\x00" * 500_000,
        inside(0x0A, b"\x12\x00" * 500_000),
        inside(0x0A, inside(0x0A, b'{a="' + b"x" * 1_000_000 + b'"}')),
        inside(0x0A, inside(0x0A, b'{"' + b"x" * 1_000_000 + b"}")),
    ],
    ids=["streams", "lines", "a label", "a name without an end"],
)
def test_a_megabyte_of_whatever_takes_a_few_to_read(content: bytes) -> None:
    tracemalloc.start()
    with contextlib.suppress(TooLarge):
        decode_protobuf(content, most=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("most", [2, 3])
def test_more_lines_than_allowed_are_refused_in_either_form(most: int) -> None:
    lines: dict[str, list[Line]] = {'{a="1"}': [(1, "x"), (2, "x")], '{a="2"}': [(1, "x"), (2, "x")]}
    with pytest.raises(TooLarge, match=f"More than {most} lines in one request .ONSET_MAX_LINES."):
        decode_protobuf(push_protobuf(lines), most=most)
    with pytest.raises(TooLarge, match=f"More than {most} lines in one request .ONSET_MAX_LINES."):
        decode_json(json.dumps(push_object(lines, {name: {} for name in lines})).encode(), most=most)
    with pytest.raises(TooLarge, match=f"More than {most} streams"):
        decode_protobuf(push_protobuf({f'{{a="{i}"}}': [] for i in range(most + 1)}), most=most)
    assert len(decode_protobuf(push_protobuf(lines), most=4)) == 2
