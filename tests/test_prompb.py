"""Remote-write's bodies, as the protobuf library writes them, are read to the bit; what is no such body is refused in a sentence."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cramjam
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prompb import Sent, body_1, body_2, message
from service.errors import BadBody, TooLarge
from service.prompb import (
    MAX_REFS,
    MAX_SERIES_LABELS,
    MAX_SYMBOLS,
    STALE,
    Label,
    Written,
    decode_1,
    decode_2,
    encode_labels,
    pack,
    series_of,
    times_of,
    unpack,
    unpacked_size,
)
from service.wire import FEW_FIELDS, varint

NOW = 1_790_000_000_000

Decode = Callable[..., Written[str]]
BOTH = [(body_1, decode_1), (body_2, decode_2)]


@dataclass
class Book:
    """Remembers what keys stand for, and counts what it is asked."""

    known: dict[bytes, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    named: int = 0

    def find(self, key: bytes) -> str | None:
        return self.known.get(key)

    def name(self, key: bytes, labels: Sequence[Label], metric_type: str) -> str:
        self.named += 1
        self.known[key] = ",".join(f"{name.decode(errors='replace')}={value.decode(errors='replace')}" for name, value in labels)
        self.types[self.known[key]] = metric_type
        return self.known[key]


def read(decode: Decode, content: bytes, book: Book | None = None, most: int = 1000) -> Written[str]:
    book = book or Book()
    return decode(content, book.find, book.name, most=most)


def samples(written: Written[str]) -> list[tuple[str, int, int]]:
    """Series, ms and the bits of the value, of every sample in order."""
    owners = [written.series[owner] for owner in written.owner.tolist()]
    return list(zip(owners, written.milliseconds.tolist(), written.bits.tolist(), strict=True))


def attempt(decode: Decode, content: bytes, book: Book | None = None) -> tuple[list[tuple[str, int, int]], str]:
    """The samples, or why there are none."""
    try:
        return samples(read(decode, content, book)), ""
    except BadBody as error:
        return [], error.detail


def bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


def up(i: int, *values: float) -> Sent:
    return Sent({"__name__": "up", "instance": f"host-{i}:9100"}, [(NOW + n, value) for n, value in enumerate(values)])


def name_of(i: int) -> str:
    return f"__name__=up,instance=host-{i}:9100"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
numbers = st.floats(width=64)
times = st.integers(min_value=-(2**63), max_value=2**63 - 1) | st.integers(NOW, NOW + 10**9)
sent_series = st.builds(
    Sent,
    labels=st.dictionaries(texts, texts, max_size=5),
    samples=st.lists(st.tuples(times, numbers), max_size=4),
    type=st.integers(0, 7),
    exemplars=st.integers(0, 2),
    histograms=st.integers(0, 2),
)


@pytest.mark.parametrize(("body", "decode"), BOTH)
@given(sent=st.lists(sent_series, max_size=6))
def test_whatever_the_protobuf_library_writes_is_read_the_same_to_the_bit_the_first_time_and_again(
    body: Callable[[Sequence[Sent]], bytes], decode: Decode, sent: list[Sent]
) -> None:
    book, content = Book(), body(sent)
    for _ in range(2):
        written = read(decode, content, book)
        names = [",".join(f"{name}={series.labels[name]}" for name in sorted(series.labels)) for series in sent]
        assert written.series == names
        expected = [(name, time, bits(value)) for name, series in zip(names, sent, strict=True) for time, value in series.samples]
        assert samples(written) == expected
        assert written.histograms == sum(series.histograms for series in sent)
        assert written.exemplars == sum(series.exemplars for series in sent)


@pytest.mark.parametrize(("body", "decode"), BOTH)
def test_labels_are_decoded_once_however_often_their_series_is_sent(body: Callable[[Sequence[Sent]], bytes], decode: Decode) -> None:
    book = Book()
    for n in range(3):
        written = read(decode, body([up(i, float(n)) for i in range(10)]), book)
        assert samples(written) == [(name_of(i), NOW, bits(float(n))) for i in range(10)]
    assert book.named == 10


def test_series_keep_their_samples_whatever_symbols_a_request_of_2_lists_before_theirs() -> None:
    book = Book()
    read(decode_2, body_2([up(1, 1.0)]), book)
    written = read(decode_2, body_2([Sent({"a": "b", "c": "d"}, [(NOW, 7.0)]), up(1, 2.0)]), book)
    assert samples(written) == [("a=b,c=d", NOW, bits(7.0)), (name_of(1), NOW, bits(2.0))]
    assert book.named == 2


def test_a_series_of_2_says_its_type_and_the_same_labels_of_another_type_are_another_key() -> None:
    book = Book()
    read(decode_2, body_2([Sent({"__name__": "a"}, [(NOW, 1.0)], type=1), Sent({"__name__": "b"}, [(NOW, 1.0)], type=2)]), book)
    assert book.types == {"__name__=a": "counter", "__name__=b": "gauge"}
    read(decode_2, body_2([Sent({"__name__": "a"}, [(NOW, 1.0)], type=2)]), book)
    assert book.types["__name__=a"] == "gauge"
    read(decode_2, body_2([Sent({"__name__": "c"}, [(NOW, 1.0)], type=99)]), book)
    assert book.types["__name__=c"] == ""


@pytest.mark.parametrize(("body", "decode"), BOTH)
def test_the_stale_marker_keeps_its_bits_and_is_no_other_nan(body: Callable[[Sequence[Sent]], bytes], decode: Decode) -> None:
    marker = struct.unpack("<d", STALE.to_bytes(8, "little"))[0]
    written = read(decode, body([up(1, marker, float("nan"))]))
    assert (written.bits == STALE).tolist() == [True, False]


@pytest.mark.parametrize(("body", "decode"), BOTH)
def test_a_label_value_that_looks_like_a_sample_is_none(body: Callable[[Sequence[Sent]], bytes], decode: Decode) -> None:
    trap = b"\x12\x10\x09".decode() + "12345678" + "\x10" + "123456"
    book = Book()
    for _ in range(2):
        written = read(decode, body([Sent({"__name__": "up", "z": trap}, []), Sent({"__name__": "up"}, [(NOW, 3.0)])]), book)
        assert samples(written) == [("__name__=up", NOW, bits(3.0))]


def test_labels_after_the_samples_are_labels_all_the_same() -> None:
    series = message("prometheus", "TimeSeries")
    first, second = series(), series()
    first.labels.add(name="__name__", value="up")
    first.samples.add(value=2.0, timestamp=NOW)
    second.labels.add(name="job", value="x")
    inner = first.SerializeToString() + second.SerializeToString()
    assert samples(read(decode_1, b"\x0a" + bytes([len(inner)]) + inner)) == [("__name__=up,job=x", NOW, bits(2.0))]


def test_refs_may_be_unpacked_and_fields_of_later_versions_are_skipped() -> None:
    content = b"\x22\x00\x22\x01a\x22\x01b"  # symbols
    inner = b"\x08\x01\x08\x02" + b"\x12\x0e\x09" + struct.pack("<d", 5.0) + b"\x10\x07\xa0\x06\x01" + b"\xaa\x06\x02hi"
    written = read(decode_2, content + b"\x2a" + bytes([len(inner)]) + inner + b"\xfa\x3f\x01x")
    assert samples(written) == [("a=b", 7, bits(5.0))]


@pytest.mark.parametrize(("body", "decode"), BOTH)
def test_a_body_cut_off_anywhere_is_refused_or_has_lost_whole_series(body: Callable[[Sequence[Sent]], bytes], decode: Decode) -> None:
    whole = body([up(i, 1.0, 0.0) for i in range(3)])
    complete = samples(read(decode, whole))
    for size in range(len(whole)):
        found, refused = attempt(decode, whole[:size])
        assert refused.startswith("The body is no ") or (found == complete[: len(found)] and not refused)


@given(content=st.binary(max_size=200), second=st.booleans())
def test_random_bytes_are_read_or_refused_and_nothing_else(content: bytes, second: bool) -> None:
    book = Book()
    for _ in range(2):
        _, refused = attempt(decode_2 if second else decode_1, content, book)
        assert refused.startswith(("The body is no", "symbols")) or not refused


def test_what_refs_point_to_must_be_there_and_paired() -> None:
    request = message("io.prometheus.write.v2", "Request")
    for refs, says in (([0, 7], "points to symbol 7, of 2"), ([0], "a name without a value"), ([1, 2**31], "points to symbol")):
        made = request(symbols=["", "a"])
        made.timeseries.add(labels_refs=refs)
        with pytest.raises(BadBody, match=says):
            read(decode_2, made.SerializeToString())
    with pytest.raises(BadBody, match="not UTF-8"):
        read(decode_2, b"\x22\x02\xff\xff")


@pytest.mark.parametrize(("body", "decode"), BOTH)
def test_more_series_or_samples_than_allowed_are_refused_before_they_are_made(
    body: Callable[[Sequence[Sent]], bytes], decode: Decode
) -> None:
    read(decode, body([up(i, 1.0) for i in range(5)]), most=5)
    with pytest.raises(TooLarge, match="More than 4 series"):
        read(decode, body([up(i, 1.0) for i in range(5)]), most=4)
    with pytest.raises(TooLarge, match="More than 4 samples"):
        read(decode, body([up(1, 1.0, 2.0, 3.0, 4.0, 5.0)]), most=4)


@pytest.mark.parametrize("refs", [1, 100])
def test_a_few_symbols_referred_to_a_million_times_are_refused_before_they_are_repeated(refs: int) -> None:
    made = message("io.prometheus.write.v2", "Request")(symbols=["x" * 1_000_000])
    for _ in range(2 * 10_000 // refs):
        made.timeseries.add(labels_refs=[0] * refs)
    content = made.SerializeToString()
    assert len(content) < 1_200_000
    book = Book()
    with pytest.raises(TooLarge, match="The labels come to 20000000000 bytes"):
        read(decode_2, content, book, most=20_000)
    assert not book.known


@pytest.mark.timeout(120)  # it takes two seconds; to put them together one by one took an hour
def test_as_many_unpacked_refs_as_fields_are_read_are_read_in_one_go() -> None:
    refs = FEW_FIELDS - 10
    inner = b"\x08\x00" * refs
    content = b"\x22\x00\x2a" + varint(len(inner)) + inner
    book = Book()
    read(decode_2, content, book)
    [key] = book.known
    assert len(key) > refs


def test_very_many_labels_and_refs_are_refused_before_they_are_made() -> None:
    labels = b"\x0a\x00" * (MAX_SERIES_LABELS + 1)
    with pytest.raises(TooLarge, match="a series of more than 10000 labels"):
        read(decode_1, b"\x0a" + varint(len(labels)) + labels)
    refs = b"\x0a" + varint(MAX_REFS + 1) + bytes(MAX_REFS + 1)
    with pytest.raises(TooLarge, match="2000001 labels_refs"):
        read(decode_2, b"\x22\x00\x2a" + varint(len(refs)) + refs)


def test_more_symbols_than_allowed_are_refused() -> None:
    with pytest.raises(TooLarge, match=f"More than {MAX_SYMBOLS} symbols"):
        read(decode_2, b"\x22\x00" * (MAX_SYMBOLS + 1))


def test_snappy_tells_its_size_before_it_is_unpacked_and_is_refused_where_it_is_none() -> None:
    bomb = pack(bytes(50_000_000))
    assert len(bomb) < 3_000_000
    assert unpacked_size(bomb) == 50_000_000
    assert unpack(pack(b"abc")) == b"abc"
    with pytest.raises(BadBody, match="The body is empty"):
        unpacked_size(b"")
    with pytest.raises(BadBody, match="not a snappy block"):
        unpacked_size(b"\xff" * 20)
    for broken in (b"\x05abc", pack(b"abcdefgh" * 100)[:-3], cramjam.snappy.compress(b"framed")):
        with pytest.raises(BadBody, match="not a snappy block"):
            unpack(bytes(broken))


@pytest.mark.parametrize("times", [[NOW, NOW + 1, 1 << 41], [0, 1, NOW, 1 << 62]])
def test_what_we_write_is_what_the_protobuf_library_reads(times: list[int]) -> None:
    labels, values = {"A": "x", "__name__": "yhat", "a": "ü" * 9000, "z": "1"}, [1.5, 0.0, float("inf"), -2.0][: len(times)]
    encoded = encode_labels(list(labels.items())[::-1])
    body = b"".join(series_of(encoded, struct.pack("<d", v), t) for v, t in zip(values, times_of(np.array(times)), strict=True))
    request = message("prometheus", "WriteRequest").FromString(body)
    assert [[(label.name, label.value) for label in made.labels] for made in request.timeseries] == [sorted(labels.items())] * len(times)
    assert [(s.timestamp, s.value) for made in request.timeseries for s in made.samples] == list(zip(times, values, strict=True))
