"""A stream's value in the store: everything the stream is, as one fixed-size little-endian record.

A batch of values is one numpy structured array, so loading, judging and writing B streams are a few array operations.

    offset  field
    0       magic "ON" · format u2
    4       crc u4                CRC-32 of everything after it
    8       nonce u8 · version u8 the token that compare-and-set compares: a new nonce at every commit, its upper half the writer's tag
    24      model u8              first 64 bits of the model file's hash: a state of another model is never stepped
    32      trail_until f8        until when, by its clock, the store may hold a trail of earlier results (see `stores`)
    40      flags u4              see ALERT_OPEN and the next ones
    44      quiet u4              ordinary events since the last other one
    48      lasting u4 · peak f4  events since the alert opened · its rarest onset
    56      started_at f8         when the running anomaly began, NaN = none runs
    64      gaps u4 · pace, pace_spread, pace_longest f4   the stream's cadence, see cadence.py; the longest knows times of arrival, too
    80      deadline f8           until when, by the store's clock, silence is ordinary; 0 = nobody waits for the stream; negative =
                                  nobody yet, the time of its only arrival so far
    88      watch_until f8        when the store's watch of the stream runs out, 0 = not watched
    96      silent_since f8       last event's arrival, where the stream is silent; NaN = it is not
    104     raw f8                the last event's reading of a counter, whose increase per second is what is scored; NaN = it was none
    112     last                  RECORD: the last event with its result, so that a resent event gets it again
            vector S x f4         the detector's state, opaque
            seen 8 x u8           keys of the last 8 events with an identity, a ring by version
            source u4 · part u4 · offset i8   where the last event from a queue was in it (Delivery in events.py); 0, 0, -1 = there was none
            learner S x f4        the state as if no alert were open, while LEARNER is set

A value ends with the last of `vector`, `seen`, the place in a queue and `learner` that says something.
Versioned by `format`: a reader refuses a format it does not know and the stream starts afresh, counted and logged.
"""

from __future__ import annotations

import enum
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 5
HEAD = b"ON" + FORMAT.to_bytes(2, "little")
TOKEN = slice(8, 24)
"""The bytes of a value that compare-and-set compares."""
SEEN = 8
FLAGS = slice(40, 44)
_CRC, _MODEL = slice(4, 8), slice(24, 32)
_HEAD_BYTES = np.frombuffer(HEAD, np.uint8)

ALERT_OPEN = 1
FROZEN = 2
"""The state learns nothing."""
LEARNER = 4
"""Beside the frozen state the value holds the one that learns on."""
ACCEPTED = 8
"""A change of regime was accepted and is being learned: no alert opens."""
EXPIRED = 16
"""With this event the alert was accepted because of its age."""
LASTING = 32
"""The event is no ordinary one for a frozen state."""
SILENT = 64
"""The stream has been silent for improbably long. The next event clears it."""

LEVEL_SHIFT = 7
LEVEL = 3 << LEVEL_SHIFT
"""Two bits: the severity that the open alert has reached, an index into SEVERITIES."""
ENDING = 512
"""The stream is said to have ended while its alert is open: unless it speaks again, that ends at the deadline. The next event clears it."""

Rows = NDArray[Any]
"""A structured array, [B] of `value_dtype` or [N] of `record_dtype`."""


class Origin(enum.IntEnum):
    """Where a loaded state came from; anything but STORED is a fresh start."""

    STORED = 0
    NEW = 1
    OTHER_MODEL = 2
    CORRUPT = 3


def record_dtype(features: int, likely: int = 0, before: int = 0) -> np.dtype[Any]:
    """One event with its result: what a reply is made from, and all that is kept of it. `likely` and `before` are widths, 0 for sensors."""
    per_feature = [(name, "<f4", (features,)) for name in ("x", "expected", "lower", "upper", "contribution")]
    return np.dtype(
        [
            ("key", "<u8"),  # identity of the event, 0 = none
            ("version", "<u8"),  # events of the stream up to and with this one
            ("timestamp", "<f8"),  # seconds since 1970, UTC
            ("sequence", "<i8"),  # -1 = none
            ("started_at", "<f8"),  # when the running anomaly began, NaN = none runs
            ("p_value", "<f4"),  # NaN while warming up
            ("onset_p", "<f4"),
            ("alpha", "<f4"),  # asked for: what p_value is compared with
            ("onset_alpha", "<f4"),  # what onset_p is compared with: alpha, and more while a stream is new
            ("flags", "<u4"),  # of the stream after this event
            *per_feature,
            ("likely", "<f4", (likely,)),
            ("before", "<f4", (before,)),
        ]
    )


HEADER = np.dtype(
    [
        ("head", "S4"),
        ("crc", "<u4"),
        ("nonce", "<u8"),
        ("version", "<u8"),
        ("model", "<u8"),
        ("trail_until", "<f8"),
        ("flags", "<u4"),
        ("quiet", "<u4"),
        ("lasting", "<u4"),
        ("peak", "<f4"),
        ("started_at", "<f8"),
        ("gaps", "<u4"),
        ("pace", "<f4"),
        ("pace_spread", "<f4"),
        ("pace_longest", "<f4"),
        ("deadline", "<f8"),
        ("watch_until", "<f8"),
        ("silent_since", "<f8"),
        ("raw", "<f8"),
    ]
)
"""What every value of this format begins with, whichever file's it is."""


def header_of(value: bytes) -> Rows:
    """The HEADER of an intact value."""
    header: Rows = np.frombuffer(value, HEADER, 1)[0]
    return header


def value_dtype(features: int, state_size: int, likely: int, before: int) -> np.dtype[Any]:
    """The stored value of one stream; layout in the module's docstring."""
    return np.dtype(
        [
            *HEADER.descr,
            ("last", record_dtype(features, likely, before)),
            ("vector", "<f4", (state_size,)),
            ("seen", "<u8", (SEEN,)),
            ("source", "<u4"),
            ("part", "<u4"),
            ("offset", "<i8"),
            ("learner", "<f4", (state_size,)),
        ]
    )


def event_key(event_id: str | None, sequence: int | None) -> int:
    """64-bit identity of an event: from its id, else from its sequence number, else 0 (it has none)."""
    if event_id is not None:
        return int.from_bytes(hashlib.blake2b(event_id.encode(), digest_size=8).digest(), "little") | 1
    if sequence is not None:
        return int.from_bytes(hashlib.blake2b(b"#%d" % sequence, digest_size=8, person=b"sequence").digest(), "little") | 1
    return 0


@dataclass(frozen=True)
class Loaded:
    """States of B streams, ready to be stepped in place."""

    rows: Rows  # [B] of value_dtype, writable
    tokens: list[bytes]  # [B] what compare-and-set must find: b"" = no value
    origins: NDArray[np.uint8]  # [B] of Origin


class StateCodec:
    """Values of one detector ⇄ bytes. `model` is the detector's fingerprint."""

    def __init__(self, features: int, state_size: int, model: int, likely: int = 0, before: int = 0) -> None:
        self.value = value_dtype(features, state_size, likely, before)
        self.record = record_dtype(features, likely, before)
        starts: Mapping[str, Any] = self.value.fields or {}
        self._with_vector, self._with_seen, self.bytes = (starts[name][1] for name in ("seen", "source", "learner"))
        """The most that a value without learner takes."""
        self._sizes = (self._with_vector, self._with_seen, self.bytes, self.value.itemsize)
        self._model = model
        self._tag = int.from_bytes(os.urandom(4), "little")
        """Of what this codec encodes: tells a replica whether it was the last to write a stream."""

    def fresh(self, rows: int) -> Rows:
        """States of streams that have seen nothing."""
        fresh = np.zeros(rows, self.value)
        fresh["head"], fresh["model"] = HEAD, self._model
        fresh["offset"] = fresh["last"]["sequence"] = -1
        fresh["last"]["timestamp"] = fresh["last"]["started_at"] = fresh["started_at"] = fresh["silent_since"] = fresh["raw"] = np.nan
        return fresh

    def decode(self, values: Sequence[bytes | None]) -> Loaded:
        """Stored values → states. A missing, foreign or damaged value becomes a fresh state that says so in `origins`."""
        rows, origins = self.fresh(len(values)), np.full(len(values), Origin.NEW, np.uint8)
        sizes = np.array([-1 if value is None else len(value) for value in values], np.intp)
        for size in np.unique(sizes[sizes >= 0]).tolist():
            places = np.flatnonzero(sizes == size)
            origins[places] = self._read(rows, places, [values[i] or b"" for i in places.tolist()], size)
        return Loaded(rows, [b"" if value is None else value[TOKEN] for value in values], origins)

    def encode(self, rows: Rows) -> list[bytes | memoryview]:
        """States → values, each with a new nonce and its CRC. Writes both into `rows`."""
        rows["nonce"] = np.frombuffer(os.urandom(4 * len(rows)), "<u4") | np.uint64(self._tag << 32)
        sizes = np.where(rows["seen"].any(axis=1), self._with_seen, self._with_vector)
        sizes = np.where(rows["source"] != 0, self.bytes, sizes)
        sizes = np.where(rows["flags"] & LEARNER != 0, self.value.itemsize, sizes)
        size = int(sizes.max(initial=self._with_vector))
        content = np.ascontiguousarray(bytes_of(rows)[:, :size])
        view = content.reshape(-1).data  # values are slices of one buffer: copying a thousand takes as long as their CRCs
        starts = range(0, len(view), size)
        ends = [start + own for start, own in zip(starts, sizes.tolist(), strict=True)]
        crc = np.array([zlib.crc32(view[start + 8 : end]) for start, end in zip(starts, ends, strict=True)], "<u4")
        rows["crc"] = crc
        content[:, _CRC] = crc.view(np.uint8).reshape(-1, 4)
        return [view[start:end] for start, end in zip(starts, ends, strict=True)]

    def tokens(self, rows: Rows) -> list[bytes]:
        """What compare-and-set must find where these states [B] are stored."""
        content = bytes_of(rows)[:, TOKEN].tobytes()
        return [content[i : i + 16] for i in range(0, len(content), 16)]

    def ours(self, rows: Rows) -> NDArray[np.bool_]:
        """[B] whether a state was last written through this codec."""
        ours: NDArray[np.bool_] = rows["nonce"] >> np.uint64(32) == self._tag
        return ours

    def encode_trails(self, records: Rows, sizes: Sequence[int]) -> list[bytes]:
        """Results of one commit, those of a stream side by side, so many of each → its trail's blob: crc u4, model u8, records."""
        model, content = self._model.to_bytes(8, "little"), records.tobytes()
        crc, ends = zlib.crc32(model), np.cumsum(sizes) * self.record.itemsize
        own = [content[end - size * self.record.itemsize : end] for end, size in zip(ends.tolist(), sizes, strict=True)]
        return [b"".join((zlib.crc32(records_, crc).to_bytes(4, "little"), model, records_)) for records_ in own]

    def decode_trail(self, blob: bytes) -> Rows:
        """A trail's blob → records [N]; none when it is damaged or another model's."""
        content = blob[4:]
        intact = zlib.crc32(content).to_bytes(4, "little") == blob[:4] and content[:8] == self._model.to_bytes(8, "little")
        return np.frombuffer(content[8:] if intact else b"", self.record)

    def _read(self, rows: Rows, places: NDArray[np.intp], values: list[bytes], size: int) -> NDArray[np.uint8]:
        """Where values, all of `size` bytes, come from; those of this model are put into `rows` at `places`."""
        if size < _MODEL.stop:
            return np.full(len(values), Origin.CORRUPT, np.uint8)
        content = np.frombuffer(b"".join(values), np.uint8).reshape(-1, size)
        crc = [zlib.crc32(memoryview(value)[8:]) for value in values]
        intact = (content[:, :4] == _HEAD_BYTES).all(axis=1) & (_number(content, _CRC) == crc)
        ours = _number(content, _MODEL) == self._model
        fits = np.zeros(len(values), np.bool_)
        if size in self._sizes:
            fits = (_number(content, FLAGS) & LEARNER != 0) == (size == self.value.itemsize)
        good = intact & ours & fits
        if good.any():
            bytes_of(rows)[places[good], :size] = content[good]
        return np.where(good, Origin.STORED, np.where(intact & ~ours, Origin.OTHER_MODEL, Origin.CORRUPT)).astype(np.uint8)


def bytes_of(rows: Rows) -> NDArray[np.uint8]:
    """The memory of [B] records as [B, bytes]."""
    return rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)


def _number(content: NDArray[np.uint8], where: slice) -> NDArray[Any]:
    """The little-endian number in these columns of [B, bytes]."""
    return np.ascontiguousarray(content[:, where]).view(f"<u{where.stop - where.start}")[:, 0]
