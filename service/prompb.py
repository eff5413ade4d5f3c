"""Prometheus remote-write on the wire: snappy and protobuf ⇄ series and samples. Knows neither streams nor scores.

    prometheus.WriteRequest (1.0)              io.prometheus.write.v2.Request (2.0)
      1 timeseries  1 labels {1 name, 2 value}   4 symbols
                    2 samples                    5 timeseries  1 labels_refs: positions of names and values in symbols, by turns
                    3 exemplars                                2 samples
                    4 histograms                               3 histograms · 4 exemplars · 5 metadata {1 type}
      3 metadata                               a sample in both: {1 value f8, 2 timestamp i64 in ms}; other fields are skipped

Written by hand, because a sender's series have the same labels in every request: what precedes a sample is looked up as it is (`find`)
and only decoded where it is new. Values and times are read for all samples at once. Protobuf's own decoder makes an object of every
label of every sample (bench.remote).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as made
from typing import Generic, TypeVar

import cramjam
import numpy as np
from numpy.typing import NDArray

from service.errors import BadBody, TooLarge
from service.wire import FIXED64, LENGTH, VARINT, Body, Malformed, cut_off, field, read_varint, reading, varint

STALE = 0x7FF0_0000_0000_0002
"""The bits of the NaN that ends a series; any other NaN is a value."""
MAX_SYMBOLS = 250_000
MAX_SERIES_LABELS, MAX_REFS = 10_000, 2_000_000
"""Labels of one series of 1.0, and labels_refs of all of 2.0: more than any sender's, and few for the memory that each takes."""
MAX_LABEL_BYTES = 64 * 1024 * 1024
"""Of the labels of a 2.0 request, a symbol counted each time that a series refers to it: a few bytes can do so a million times."""
TYPES = ("", "counter", "gauge", "histogram", "gaugehistogram", "summary", "info", "stateset")
"""Names of Metadata.MetricType of 2.0, by number."""

S = TypeVar("S")

Label = tuple[bytes, bytes]
Find = Callable[[bytes], S | None]
Name = Callable[[bytes, Sequence[Label], str], S]
"""The key of a series whose labels (name, value, as sent) and type ("" = not said) are these → what stands for it."""

_LABELS, _SAMPLES = 1, 2
_WHOLE, _ZERO = 16, 7
"""Bytes of a sample of our time, with a value and with the value 0, which is left out."""
_WHOLE_TAG, _ZERO_TAG = b"\x12\x10\x09", b"\x12\x07\x10"
_SHIFTS = np.arange(0, 42, 7, dtype=np.int64)
_SIX_BYTES = range(1 << 35, 1 << 42)
"""Times in ms that take 6 bytes: 1971 to 2109."""


@dataclass
class Written(Generic[S]):
    """What one request brought: N samples in order, of some series, and what we only count."""

    series: list[S] = made(default_factory=list)
    owner: NDArray[np.intp] = made(default_factory=lambda: np.zeros(0, np.intp))  # [N] into `series`
    bits: NDArray[np.uint64] = made(default_factory=lambda: np.zeros(0, np.uint64))  # [N] of the float64 value
    milliseconds: NDArray[np.int64] = made(default_factory=lambda: np.zeros(0, np.int64))  # [N] since 1970
    histograms: int = 0
    exemplars: int = 0
    metadata: int = 0

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def values(self) -> NDArray[np.float64]:
        return self.bits.view(np.float64)


def unpacked_size(content: bytes) -> int:
    """What a snappy block says it unpacks to, bytes. Raises BadBody."""
    if not content:
        raise BadBody("The body is empty: send a snappy block.")
    try:
        return cramjam.snappy.decompress_raw_len(content)
    except cramjam.DecompressionError as error:
        raise BadBody(f"The body is not a snappy block: {error}.") from error


def unpack(content: bytes) -> bytes:
    """Undo snappy (block format). Raises BadBody. Takes as much memory as `unpacked_size` says."""
    try:
        return bytes(cramjam.snappy.decompress_raw(content))
    except cramjam.DecompressionError as error:
        raise BadBody(f"The body is not a snappy block: {error}.") from error


def pack(content: bytes) -> bytes:
    return bytes(cramjam.snappy.compress_raw(content))


def decode_1(content: bytes, find: Find[S], name: Name[S], *, most: int) -> Written[S]:
    """A prometheus.WriteRequest. Raises BadBody, and TooLarge for more than `most` series or samples."""
    return _decoded(_Reader1(content, find, name, most))


def decode_2(content: bytes, find: Find[S], name: Name[S], *, most: int) -> Written[S]:
    """An io.prometheus.write.v2.Request, the same."""
    return _decoded(_Reader2(content, find, name, most))


def series_of(labels: bytes, value: bytes, time: bytes) -> bytes:
    """A series of 1.0 with one sample: its encoded labels, the 8 bytes of its value, and its time by `times_of`."""
    size = len(labels) + 11 + len(time)
    return b"".join((b"\x0a", varint(size), labels, b"\x12", bytes((9 + len(time),)), b"\x09", value, time))


def times_of(milliseconds: NDArray[np.int64]) -> list[bytes]:
    """Times since 1970, none before it, as samples have them."""
    if len(milliseconds) and (int(milliseconds.min()) not in _SIX_BYTES or int(milliseconds.max()) not in _SIX_BYTES):
        return [b"\x10" + varint(number) for number in milliseconds.tolist()]
    content = (milliseconds[:, None] >> _SHIFTS & 0x7F | np.array([0x80] * 5 + [0])).astype(np.uint8)
    whole = np.concatenate([np.full((len(content), 1), 0x10, np.uint8), content], axis=1).tobytes()
    return [whole[i : i + 7] for i in range(0, len(whole), 7)]


def encode_labels(labels: Sequence[tuple[str, str]]) -> bytes:
    """The labels of a series of 1.0; sorted by name, as receivers want them."""
    parts = []
    for pair in sorted(labels):
        texts = [part.encode() for part in pair]
        label = b"".join(bytes([tag]) + varint(len(text)) + text for tag, text in zip((0x0A, 0x12), texts, strict=True))
        parts += [b"\x0a", varint(len(label)), label]
    return b"".join(parts)


class _Reader(ABC, Generic[S]):
    """One pass over a body. A sample is noted by where it lies, and read with all others at the end."""

    message = ""

    def __init__(self, content: bytes, find: Find[S], name: Name[S], most: int) -> None:
        self.content, self.find, self.name, self.most = content, find, name, most
        self.body = Body(content)
        self.written = Written[S]()
        self.owner: list[int] = []
        self.starts: list[int] = []
        self.ends: list[int] = []

    @abstractmethod
    def read(self) -> None:
        """Go through `content` once. Raises BadBody, TooLarge."""

    def series(self, found: S) -> int:
        """Position of the next series."""
        here = len(self.written.series)
        if here >= self.most:
            raise TooLarge(f"More than {self.most} series in one request (ONSET_MAX_BATCH_EVENTS): lower max_samples_per_send.")
        self.written.series.append(found)
        return here

    def sample(self, owner: int, start: int, end: int) -> None:
        if len(self.owner) >= self.most:
            raise TooLarge(f"More than {self.most} samples in one request (ONSET_MAX_BATCH_EVENTS): lower max_samples_per_send.")
        self.owner.append(owner)
        self.starts.append(start)
        self.ends.append(end)


class _Reader1(_Reader[S]):
    message = "prometheus.WriteRequest"

    def read(self) -> None:
        content, find, at, size = self.content, self.find, 0, len(self.content)
        while at < size:
            if content[at] != 0x0A:
                at = self._other(at)
                continue
            length, start = content[at + 1], at + 2
            if length > 127:
                length, start = read_varint(content, at + 1)
            at = start + length
            if at > size:
                raise cut_off(start)
            # One sample at the end, as a live sender sends it. A known key is whole labels and nothing else: a sample begins behind it.
            rest = _WHOLE if content[at - 18 : at - 15] == _WHOLE_TAG else _ZERO if content[at - 9 : at - 6] == _ZERO_TAG else length
            found = find(content[start : at - rest - 2]) if rest + 2 <= length else None
            if found is None:
                self._series(start, at)
            else:
                self.sample(self.series(found), at - rest, at)

    def _other(self, at: int) -> int:
        """A field of the request that is no plain series; returns where the next one starts."""
        self.body.looked()
        number, kind, start, end = field(self.content, at, len(self.content))
        if number == 1 and kind == LENGTH:
            self._series(start, end)
        elif number == 3:
            self.written.metadata += 1
        return end

    def _series(self, start: int, end: int) -> None:
        labels, parts, samples = list[Label](), list[bytes](), list[tuple[int, int]]()
        tag = start
        for number, kind, here, there in self.body.fields(start, end):
            if number == _LABELS and kind == LENGTH:
                if len(labels) == MAX_SERIES_LABELS:
                    raise TooLarge(f"Byte {start} begins a series of more than {MAX_SERIES_LABELS} labels.")
                labels.append(_label(self.body, here, there))
                parts.append(self.content[tag:there])
            elif number == _SAMPLES and kind == LENGTH:
                samples.append((here, there))
            elif number == 3:
                self.written.exemplars += 1
            elif number == 4:
                self.written.histograms += 1
            tag = there
        key = b"".join(parts)
        found = self.find(key)
        owner = self.series(self.name(key, labels, "") if found is None else found)
        for here, there in samples:
            self.sample(owner, here, there)


class _Reader2(_Reader[S]):
    message = "io.prometheus.write.v2.Request"

    def read(self) -> None:
        content, symbols, places = self.content, [], []
        for number, kind, start, end in self.body.fields(0, len(content)):
            if kind == LENGTH and number == 4:
                symbols.append(content[start:end])
            elif kind == LENGTH and number == 5:
                places.append((start, end))
            if len(symbols) > MAX_SYMBOLS:
                raise TooLarge(f"More than {MAX_SYMBOLS} symbols in one request: lower max_samples_per_send.")
            if len(places) > self.most:
                raise TooLarge(f"More than {self.most} series in one request (ONSET_MAX_BATCH_EVENTS): lower max_samples_per_send.")
        packed, types = [], []
        for i, (start, end) in enumerate(places):
            refs, kind = self._series(i, start, end)
            packed.append(refs)
            types.append(kind)
        if b"\xff" in b"".join(symbols):
            raise BadBody("symbols has one that is not UTF-8.")
        symbol = symbols.__getitem__
        for positions, kind in zip(_refs(packed, list(map(len, symbols))), types, strict=True):
            texts = list(map(symbol, positions))
            key = b"\x02%d%s" % (kind, b"\xff".join(texts))  # 0xFF is in no UTF-8, and 0x02 begins no key of 1.0
            found = self.find(key)
            if found is None:
                pairs = list(zip(texts[::2], texts[1::2], strict=True))
                found = self.name(key, pairs, TYPES[kind] if kind < len(TYPES) else "")
            self.written.series.append(found)

    def _series(self, owner: int, start: int, end: int) -> tuple[bytes, int]:
        """Note the samples of a series; returns its labels_refs as they are, and its type."""
        refs, metric_type = list[bytes](), 0
        for number, kind, here, there in self.body.fields(start, end):
            if number == _SAMPLES and kind == LENGTH:
                self.sample(owner, here, there)
            elif number == _LABELS and kind in (LENGTH, VARINT):  # packed or not, it is the same varints
                refs.append(self.content[here:there])
            elif number == 3:
                self.written.histograms += 1
            elif number == 4:
                self.written.exemplars += 1
            elif number == 5 and kind == LENGTH:
                self.written.metadata += 1
                metric_type = next((self.content[a] for n, k, a, _ in self.body.fields(here, there) if (n, k) == (1, VARINT)), 0)
        return b"".join(refs), metric_type


def _decoded(reader: _Reader[S]) -> Written[S]:
    with reading(reader.message):
        reader.read()
        _read_samples(reader)
    return reader.written


def _read_samples(reader: _Reader[S]) -> None:
    """Values and times of all samples that were noted; those of the usual shapes at once."""
    written, content = reader.written, reader.content
    starts, ends = np.array(reader.starts, np.intp), np.array(reader.ends, np.intp)
    N = len(starts)
    written.owner = np.array(reader.owner, np.intp)
    written.bits, written.milliseconds = np.zeros(N, np.uint64), np.zeros(N, np.int64)
    body, sizes, done = np.frombuffer(content, np.uint8), ends - starts, np.zeros(N, np.bool_)
    for size, before in ((_WHOLE, 9), (_ZERO, 0)):
        places = np.flatnonzero(sizes == size)
        block = body[starts[places, None] + np.arange(size)]  # [n, size]
        time = block[:, before + 1 :]
        usual = (block[:, before] == 0x10) & (time[:, :5] >= 0x80).all(axis=1) & (time[:, 5] < 0x80)
        if before:
            usual &= block[:, 0] == 0x09
            written.bits[places[usual]] = np.ascontiguousarray(block[usual, 1:9]).view("<u8")[:, 0]
        written.milliseconds[places[usual]] = ((time[usual] & 0x7F).astype(np.int64) << _SHIFTS).sum(axis=1)
        done[places[usual]] = True
    for i in np.flatnonzero(~done).tolist():
        written.bits[i], written.milliseconds[i] = _sample(reader.body, reader.starts[i], reader.ends[i])


def _sample(body: Body, start: int, end: int) -> tuple[int, int]:
    """Bits of the value, and ms; what is left out is 0."""
    bits = milliseconds = 0
    for number, kind, here, there in body.fields(start, end):
        if number == 1 and kind == FIXED64:
            bits = int.from_bytes(body.content[here:there], "little")
        elif number == 2 and kind == VARINT:
            unsigned, _ = read_varint(body.content, here)
            milliseconds = unsigned - (1 << 64) if unsigned >> 63 else unsigned
    return bits, milliseconds


def _label(body: Body, start: int, end: int) -> Label:
    name = value = b""
    for number, kind, here, there in body.fields(start, end):
        if number == 1 and kind == LENGTH:
            name = body.content[here:there]
        elif number == 2 and kind == LENGTH:
            value = body.content[here:there]
    return name, value


def _refs(packed: Sequence[bytes], lengths: Sequence[int]) -> Iterator[list[int]]:
    """The labels_refs of each series; `lengths` of the symbols. Raises TooLarge before any symbol is repeated."""
    data = np.frombuffer(b"".join(packed), np.uint8)
    if (count := np.count_nonzero(data < 0x80)) > MAX_REFS:
        raise TooLarge(f"{count} labels_refs in one request, at most {MAX_REFS}: lower max_samples_per_send.")
    last = np.flatnonzero(data < 0x80)
    if len(data) and (len(last) == 0 or last[-1] != len(data) - 1):
        raise Malformed("labels_refs is cut off")
    first = np.r_[0, last[:-1] + 1].astype(np.intp)[: len(last)]
    length = last - first + 1
    if len(length) and length.max() > 5:
        raise Malformed("labels_refs holds a number beyond 32 bits")
    numbers = (data[first] & 0x7F).astype(np.int64)
    for k in range(1, int(length.max(initial=1))):
        more = length > k
        numbers[more] |= (data[first[more] + k] & 0x7F).astype(np.int64) << (7 * k)
    if len(numbers) and numbers.max() >= len(lengths):
        raise Malformed(f"labels_refs points to symbol {numbers.max()}, of {len(lengths)}")
    if (size := int(np.array(lengths, np.int64)[numbers].sum())) > MAX_LABEL_BYTES:
        raise TooLarge(f"The labels come to {size} bytes, symbols counted as often as series refer to them; at most {MAX_LABEL_BYTES}.")
    ends = np.searchsorted(last, np.cumsum([len(part) for part in packed]) - 1, side="right").tolist()
    flat, start = numbers.tolist(), 0
    for part, end in zip(packed, ends, strict=True):
        if part and part[-1] >= 0x80:
            raise Malformed("labels_refs is cut off")
        if (end - start) % 2:
            raise Malformed(f"labels_refs has {end - start} numbers: a name without a value")
        yield flat[start:end]
        start = end
