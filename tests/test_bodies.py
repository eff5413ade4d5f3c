"""Bodies ⇄ items: whatever a body holds, its good items are found, its bad ones named, and looking at them costs little."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import cramjam
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import mutes
from service.bodies import OBJECT_BYTES, Format, Items, decode, decode_object, encode, inflate
from service.errors import BadBody, BadEvent, TooLarge
from service.events import MAX_NAME_LENGTH, Event
from service.problems import problem_of, respond

GOOD = b'{"stream_id":"n","values":{"value":1.5}}'
EVENT = Event(stream_id="n", values={"value": 1.5})
MAX = 1000


def refused(error: BadBody | BadEvent) -> None:
    """An error that a reply can be made from."""
    assert error.detail
    respond(problem_of(error))


def items_of(content: bytes, lines: bool = False) -> Items:
    return decode(content, Format.NDJSON if lines else Format.JSON, max_events=MAX)[0]


@pytest.mark.parametrize(
    ("item", "field", "value"),
    [
        (b'{"values":{"value":NaN}}', "values.value", "NaN"),
        (b'{"values":{"value":-Infinity}}', "values.value", "-Infinity"),
        (b'{"values":{"value":%s}}' % (b"9" * 5000), "values.value", "Infinity"),
        (b'{"values":{"value":true}}', "values.value", "true"),
        (b'{"values":{"\\ud800":"x"}}', "values.\ud800", '"x"'),
        (b'{"\\ud800":7}', "\ud800", "7"),
        (b'{"vaules":{"value":1}}', "vaules", '{"value": 1}'),
        (b'{"stream_id":7}', "stream_id", "7"),
        (b'{"stream_id":""}', "stream_id", '""'),
        (b'{"stream_id":"%s"}' % (b"x" * 2000), "stream_id", '"' + "x" * 60 + "..."),
        (b'{"timestamp":false}', "timestamp", "false"),
        (b'{"sequence":%s}' % (b"9" * 30), "sequence", "9" * 30),
        (b'{"values":"\\ud800"}', "values", r'"\\ud800"'),
        (b'{"sequence":"\\ud800"}', "sequence", r'"\\ud800"'),
        (b'{"end":"\\ud800"}', "end", r'"\\ud800"'),
        (b'{"values":%s1%s}' % (b"[" * 800, b"]" * 800), "values", None),
        (b"null", "", "null"),
        (b"[]", "", "[]"),
    ],
)
def test_a_bad_item_is_named_and_its_neighbours_survive(item: bytes, field: str, value: str | None) -> None:
    for body, lines in ((b"[" + GOOD + b"," + item + b"," + GOOD + b"]", False), (b"\n".join([GOOD, item, GOOD]), True)):
        before, bad, after = items_of(body, lines)
        assert before == after == EVENT
        assert isinstance(bad, BadEvent)
        assert bad.field == field
        if value is not None:
            assert bad.value == value
        reply = msgspec.json.decode(encode([bad], Format.JSON, bare=False))  # can be written whatever it holds
        assert reply[0]["status"] == 422
        assert reply[0]["index"] == 0


@pytest.mark.parametrize("depth", [10, 500, 900, 955, 990, 1100, 200_000])
@pytest.mark.parametrize(("opens", "closes"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_of_nesting_breaks_the_decoder(depth: int, opens: bytes, closes: bytes) -> None:
    deep = opens * depth + b"1" + closes * depth
    for item in (deep, b'{"values":{"value":' + deep + b"}}", b'{"stream_id":' + deep + b"}"):
        first, bad = items_of(GOOD + b"\n" + item, lines=True)
        assert first == EVENT
        assert isinstance(bad, BadEvent)
        for body in (item, b"[" + GOOD + b"," + item + b"]"):
            try:
                assert isinstance(items_of(body)[-1], BadEvent)
            except (BadBody, BadEvent) as error:
                refused(error)


def test_control_characters_within_strings_do_not_spoil_the_body() -> None:
    before, strange, after = items_of(b"[" + GOOD + b',{"stream_id":"a\tb"},' + GOOD + b"]")
    assert before == after == EVENT
    assert strange == Event(stream_id="a\tb")  # which features.py refuses by its field


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (b"[" + b"0," * 1_000_000 + b"0]", False),
        (b"[" + b"{}," * 700_000 + b"{}]", False),
        (b"[" + b"{}," * 700_000 + b"0]", False),
        (b"0\n" * 1_000_000, True),
        (b"{}\n" * 700_000, True),
        (b"\n" * 2_000_000 + b"0\n" * 2000, True),
    ],
)
def test_two_megabytes_of_tiny_items_are_refused_quickly_and_in_little_memory(body: bytes, lines: bool) -> None:
    started = time.process_time()
    with pytest.raises(TooLarge, match="More than 1000 events"):
        items_of(body, lines)
    assert time.process_time() - started < 8  # 0.01 to 0.9 s; looking at each of them took 12 to 30 s
    tracemalloc.start()
    with pytest.raises(TooLarge):
        items_of(body, lines)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6, f"{peak / 1e6:.0f} MB"


def test_as_many_items_as_allowed_are_taken_and_not_one_more() -> None:
    assert len(items_of(b"[" + b",".join([GOOD] * MAX) + b"]")) == MAX
    assert len(items_of(b"\n".join([GOOD] * MAX), lines=True)) == MAX
    for body, lines in ((b"[" + b",".join([GOOD] * (MAX + 1)) + b"]", False), (b"\n".join([GOOD] * (MAX + 1)), True)):
        with pytest.raises(TooLarge):
            items_of(body, lines)


def test_blank_lines_and_carriage_returns_between_lines_do_not_count() -> None:
    assert items_of(b"\r\n\n  \n" + GOOD + b"\r\n\t\n" + GOOD, lines=True) == [EVENT, EVENT]
    assert items_of(b"\n \r\n", lines=True) == []


def test_the_last_of_two_equal_keys_counts_also_beside_a_bad_item() -> None:
    twice = b'{"stream_id":"a","stream_id":"b","values":{"value":1,"value":2}}'
    expected = Event(stream_id="b", values={"value": 2.0})
    assert items_of(twice) == [expected]
    assert items_of(b"[" + twice + b",null]")[0] == expected


def raw_deflate(content: bytes) -> bytes:
    """Without a head, as .NET's DeflateStream writes it."""
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(content) + stream.flush()


def zstd(content: bytes) -> bytes:
    return bytes(cramjam.zstd.compress(content))


def zstd_of_unknown_size(count: int) -> bytes:
    """So many times the same byte, as a stream is written: the head tells no size, but a window of 128 MiB."""
    last_run_of_one_byte = ((count << 3) | 3).to_bytes(3, "little") + b"x"
    return b"\x28\xb5\x2f\xfd" + bytes([0, 17 << 3]) + last_run_of_one_byte


PACKED = [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate), ("zstd", zstd)]


@pytest.mark.parametrize(("encoding", "pack"), PACKED)
def test_what_is_packed_is_undone_up_to_the_limit_and_nothing_is_dropped_silently(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    assert inflate(pack(b"x" * 100), 100, encoding) == b"x" * 100
    assert inflate(pack(b""), 100, encoding) == b""
    with pytest.raises(TooLarge, match="over 99 bytes"):
        inflate(pack(b"x" * 100), 99, encoding)
    with pytest.raises(TooLarge, match="over 1000 bytes"):
        inflate(pack(bytes(10_000_000)), 1000, encoding)
    for broken in (pack(b"x" * 100)[:-1], b""):
        with pytest.raises(BadBody, match=r"cut off|incomplete frame"):
            inflate(broken, 100, encoding)
    with pytest.raises(BadBody, match=f"not {encoding.removeprefix('x-')}"):
        inflate(b"plain", 100, encoding)
    with pytest.raises(BadBody, match=r"follow the end|Unknown frame"):
        inflate(pack(b"x") + b"junk", 100, encoding)


def test_gzip_is_one_member_and_zstd_any_number_of_frames() -> None:
    with pytest.raises(BadBody, match="follow the end"):
        inflate(gzip.compress(b"x") + gzip.compress(b"y"), 100)
    assert inflate(zstd(b"x") + zstd_of_unknown_size(3), 100, "zstd") == b"xxxx"
    with pytest.raises(TooLarge, match="over 3 bytes"):
        inflate(zstd(b"x") + zstd_of_unknown_size(3), 3, "zstd")


text = st.text(st.characters(codec=None, exclude_categories=[]), max_size=6)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*Event.__struct_fields__, "other"])
almost_events = st.dictionaries(fields, anything | st.dictionaries(st.just("value") | text, anything, max_size=2), max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(almost_events | anything, max_size=4), st.booleans())
def test_any_json_in_any_place_leaves_its_neighbours_and_can_be_answered(items: list[Any], lines: bool) -> None:
    texts = [GOOD.decode(), *(json.dumps(item) for item in items), GOOD.decode()]
    body = "\n".join(texts) if lines else "[" + ",".join(texts) + "]"
    found = items_of(body.encode(), lines)
    assert len(found) == len(texts)
    assert found[0] == found[-1] == EVENT
    errors = [item for item in found if isinstance(item, BadEvent)]
    reply = encode(errors, Format.NDJSON if lines else Format.JSON, bare=False)
    assert len([json.loads(line) for line in reply.splitlines()] if lines else json.loads(reply)) == len(errors)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_items_or_a_bad_body(content: bytes, lines: bool) -> None:
    try:
        items_of(content, lines)
    except (BadBody, BadEvent) as error:
        refused(error)


def test_the_largest_mute_is_read_and_an_object_that_is_larger_is_refused_before_it_is() -> None:
    patterns = [f"*{i:02d}" + "\U0001f600" * (MAX_NAME_LENGTH - 3) for i in range(mutes.PATTERNS)]
    body = {"streams": patterns, "by": patterns[0], "note": "\U0001f600" * mutes.MAX_NOTE, "ends_at": 1.8e9 + 1}
    content = json.dumps(body).encode()  # twelve bytes a character
    assert len(content) > 300_000
    assert mutes.asked("a", decode_object(content), 1.8e9).streams == patterns
    with pytest.raises(TooLarge, match=f"has {OBJECT_BYTES + 1} bytes; here it has {OBJECT_BYTES} at most"):
        decode_object(b"{" * (OBJECT_BYTES + 1))
    with pytest.raises(BadBody, match="not JSON"):
        decode_object(b"{" + b" " * (OBJECT_BYTES - 1))
