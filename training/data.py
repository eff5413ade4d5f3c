"""Streams in, training blocks out. A block is B lanes of consecutive events; the state is carried through its chunks.

    Source.block(rng)     lanes for training, drawn anew for every block
    Source.validation()   the fixed lanes that early stopping looks at: later rows than any training lane sees

Arrays are time-major, as the network runs: x [T, B, F] float32 (NaN = missing), t [T, B, 3] as in the step function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0
CONTEXT = 256
"""Rows before the split that lead a validation lane into the stream; they do not count."""
FEWEST = 16
"""Rows of a stream that is learned from: of lanes that are all shorter than the lags nothing is."""
PIECE = 1 << 18
"""Numbers that are read at a time where all rows of a stream are."""


@dataclass(frozen=True)
class Block:
    """B lanes of T events, and from which event on each counts for the loss."""

    x: Float32  # [T, B, F]
    t: Float32  # [T, B, 3]
    counts_from: int = 32


class Source(Protocol):
    """Where lanes come from."""

    def block(self, rng: np.random.Generator, lanes: int, length: int) -> Block: ...

    def validation(self) -> Block: ...


@dataclass(frozen=True)
class Stream:
    """One stream's rows."""

    name: str
    x: Float32  # [T, F]
    t: Float32  # [T, 3]

    def __len__(self) -> int:
        return len(self.x)


def clock(timestamps: Float64, before: float = np.nan) -> Float32:
    """Epoch seconds [T] → t [T, 3]: seconds since the previous event (NaN = none), second of the day, day of the week (UTC)."""
    gap = np.diff(timestamps, prepend=before)
    day = np.floor(timestamps / 86400)
    return np.stack([gap, timestamps - day * 86400, (day + EPOCH_WEEKDAY) % 7], axis=-1).astype(np.float32)


def variance_of(x: Float32) -> Float64:
    """Of each column of [T, F], F > 1; 0 where nothing is present. Reads a piece at a time: `x` may be a file's."""
    count = np.maximum(_sum(np.isfinite(piece).astype(np.float64) for piece in pieces(x)), 1)
    mean = _sum(np.where(np.isfinite(piece), piece, 0) for piece in pieces(x)) / count
    return np.asarray(_sum(np.where(np.isfinite(piece), piece - mean, 0) ** 2 for piece in pieces(x)) / count)


def pieces(x: Float32) -> Iterator[Float64]:
    """The rows of [T, F] in their order, PIECE numbers at a time."""
    rows = max(1, PIECE // x.shape[1])
    return (x[start : start + rows].astype(np.float64) for start in range(0, len(x), rows))


def _sum(pieces: Iterator[Float64]) -> Float64:
    """Over the rows of all pieces [·, F]. The sum so far is the next piece's first row: added up in the order of the whole, bit for bit."""
    total: Float64 = next(pieces).sum(axis=0)
    for piece in pieces:
        total = np.concatenate([total[None], piece]).sum(axis=0)
    return total


def pad(streams: Sequence[Stream], length: int) -> tuple[Float32, Float32]:
    """Streams side by side: x [length, B, F] and t [length, B, 3]; rows after a stream's end are NaN."""
    x = np.full((length, len(streams), streams[0].x.shape[1]), np.nan, np.float32)
    t = np.full((length, len(streams), 3), np.nan, np.float32)
    for i, stream in enumerate(streams):
        rows = min(length, len(stream))
        x[:rows, i], t[:rows, i] = stream.x[:rows], stream.t[:rows]
        t[0, i, 0] = np.nan
    return x, t


def cut(stream: Stream, start: int, stop: int) -> Stream:
    return Stream(stream.name, stream.x[start:stop], stream.t[start:stop])


class Fleet:
    """The user's streams, each split in time: the last `validation_share` of its rows is never trained on."""

    def __init__(self, streams: Sequence[Stream], validation_share: float = 0.15) -> None:
        self.streams = list(streams)
        self.splits = [max(1, int(len(stream) * (1 - validation_share))) for stream in self.streams]

    def block(self, rng: np.random.Generator, lanes: int, length: int) -> Block:
        """Each lane starts at a random row of a stream: a young stream of any age of the data.

        Streams are chosen in proportion to their rows up to one lane's, so that a long recording does not drown the short ones.
        """
        rows = np.minimum(np.array(self.splits, float), length)
        weights = np.where(rows >= min(FEWEST, rows.max()), rows, 0)
        chosen = rng.choice(len(self.streams), size=lanes, p=weights / weights.sum())
        pieces = []
        for index in chosen:
            last = max(1, self.splits[index] - length + 1)
            start = int(rng.integers(last))
            pieces.append(cut(self.streams[index], start, min(self.splits[index], start + length)))
        return Block(*pad(pieces, max(len(piece) for piece in pieces)))

    @property
    def validates(self) -> bool:
        """Whether there is a value in the rows of `validation` that count: without one every network is as good as any other."""
        block = self.validation()
        return bool(np.isfinite(block.x[block.counts_from :]).any())

    def validation(self) -> Block:
        by_length = np.argsort([-len(stream) for stream in self.streams])[:32].tolist()
        longest = min(CONTEXT, max(self.splits[i] for i in by_length))
        # All lanes have the shortest one's lead: a file of three rows must not take theirs from all others.
        order = [i for i in by_length if 2 * self.splits[i] >= longest]
        pieces = [
            cut(self.streams[i], max(0, self.splits[i] - CONTEXT), min(len(self.streams[i]), self.splits[i] + 2 * CONTEXT)) for i in order
        ]
        leads = [min(CONTEXT, self.splits[i]) for i in order]
        shifted = [cut(piece, lead - min(leads), len(piece)) for piece, lead in zip(pieces, leads, strict=True)]
        return Block(*pad(shifted, max(len(piece) for piece in shifted)), counts_from=min(leads))
