"""Long tables, a row for each reading (time, tag, value, quality), sorted by stream: what `split` does with them.

    read_coded ──► Readings: tag, second, value ──► Spill (a file without a name) ──► aligned: one stream's rows ──► held

Rows may be in any order and the table larger than memory: a stream that does not fit is cut by time in the same way.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import TableError
from service.tables import Coded, CodedRows, Dialect, Float64, ReadOptions, Source, coded_numbers, fits, read_coded

Records = NDArray[np.void]
Int64 = NDArray[np.int64]

RECORD = np.dtype([("second", "f8"), ("value", "f8"), ("feature", "i4")])
SPILL = 1 << 22
"""Records that are held at once: 80 MB, and as much to sort them."""
CELLS = 1 << 19
"""Cells of a batch that is read: some 50 MB of texts."""
GLANCE = 20_000
"""Rows that tell whether a table is a long one."""
FEW = 12
"""Columns of a long table at most, where nobody said that it is one."""
SELDOM = 0.7
ORDERED = 0.1
"""Share of steps against the others, at most, in a file that is in order; where each tag's rows are together, there is one a tag."""
VALUES = frozenset({"value", "val", "wert", "reading", "floatvalue"})
"""What the column of readings is called."""


@dataclass(frozen=True)
class Long:
    """Which columns a long table has."""

    tags: tuple[str, ...]  # together, with points between, the name of a reading's sensor
    values: tuple[str, ...]  # of several each is a sensor, whose name is joined to the tag
    quality: str | None = None
    good: frozenset[str] = frozenset()  # of that column; a reading of another is missing
    every: float = 0.0  # seconds; > 0: a row has the last numbers of an interval and the time of its end
    hold: float = 0.0  # seconds; > 0, with `every`: a reading stands for so long, or until the next one, also one that is no number


MOST_BAD_WORDS = 10
"""That are told of a tag: a column that was taken for the quality by mistake has one in each row."""


@dataclass
class Tags:
    """What is known of each tag, by its number."""

    file: str = ""  # what a tag is of, where the same tag of another file is another one
    names: list[str] = field(default_factory=list)
    numbers: Counter[int] = field(default_factory=Counter)  # readings that are numbers
    words: Counter[int] = field(default_factory=Counter)
    first_word: dict[int, str] = field(default_factory=dict)
    bad: Counter[int] = field(default_factory=Counter)  # readings of a quality that is not good
    bad_words: dict[int, set[str]] = field(default_factory=dict)  # such qualities, up to MOST_BAD_WORDS of a tag
    blanked: Counter[int] = field(default_factory=Counter)  # readings of Dialect.missing
    unclear: int = 0  # readings of the hour that a clock set back has twice, in no order that tells which
    left_out: set[str] = field(default_factory=set)  # tags that `exclude` fits; they have no number

    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def place(self, tag: str) -> int:
        """Its number, given when it is met first."""
        number = self._numbers.setdefault((self.file, tag), len(self.names))
        if number == len(self.names):
            self.names.append(tag)
        return number


@dataclass(frozen=True)
class Readings:
    """Rows of a long table."""

    tags: Int64  # [T] numbers of Tags
    records: Records  # [T] without their features


class Spill:
    """Records by key, in a file that has no name and so ends with the process; each key's stay in the order they came in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by `close`
        self._held: list[tuple[Int64, Records]] = []
        self._count = 0
        self._runs: dict[int, array[int]] = {}  # key → place and length of each run of its records, in turns
        self._written = 0

    def add(self, keys: Int64, records: Records) -> None:
        """Take these records."""
        self._held.append((keys, records))
        self._count += len(keys)
        if self._count >= SPILL:
            self._flush()

    def count(self, key: int) -> int:
        """Records of this key."""
        self._flush()
        return sum(self._runs.get(key, ())[1::2])

    def read(self, key: int) -> Iterator[Records]:
        """The records of this key, a run at a time."""
        self._flush()
        runs = self._runs.get(key, array("q"))
        for place, length in zip(runs[::2], runs[1::2], strict=True):
            self._file.seek(place * RECORD.itemsize)
            yield np.frombuffer(self._file.read(length * RECORD.itemsize), RECORD)

    def another(self) -> Spill:
        """An empty one in the same folder."""
        return Spill(self._folder)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def _flush(self) -> None:
        if not self._held:
            return
        keys = np.concatenate([keys for keys, _ in self._held])
        order = np.argsort(keys, kind="stable")
        records = np.concatenate([records for _, records in self._held])[order]
        keys = keys[order]
        self._held, self._count = [], 0
        self._file.seek(self._written * RECORD.itemsize)
        self._file.write(records.tobytes())
        starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
        lengths = np.diff(starts, append=len(keys))
        for key, start, length in zip(keys[starts].tolist(), starts.tolist(), lengths.tolist(), strict=True):
            self._runs.setdefault(key, array("q")).extend((self._written + start, length))
        self._written += len(keys)


def read_long(source: Source, options: ReadOptions, long: Long, dialect: Dialect, tags: Tags) -> Iterator[Readings]:
    """One file in its order, without the tags that `options` exclude. Raises TableError when it gets to what is wrong."""
    asked = [*long.tags, *long.values, *([long.quality] if long.quality else [])]
    doubtful: list[tuple[Readings, Float64]] = []
    ups = downs = 0
    for rows in read_coded(source, options, asked, dialect, CELLS):
        steps = np.diff(rows.seconds)
        ups, downs = ups + int(np.count_nonzero(steps > 0)), downs + int(np.count_nonzero(steps < 0))
        for value in long.values:
            named = _named(rows, long, options, tags, f".{value}" if len(long.values) > 1 else "")
            values = _values(source, rows, value, long, dialect, tags, named)
            records = np.zeros(len(named), RECORD)
            records["second"], records["value"] = rows.seconds, values
            asked_for = named >= 0
            twice = asked_for & (rows.later > 0)
            if twice.any():
                doubtful.append((Readings(named[twice], records[twice]), rows.later[twice]))
            kept = asked_for & ~twice
            yield Readings(named[kept], records[kept])
    if doubtful:
        yield _told_apart(
            np.concatenate([readings.tags for readings, _ in doubtful]),
            np.concatenate([readings.records for readings, _ in doubtful]),
            np.concatenate([later for _, later in doubtful]),
            tags,
            1 if downs < ORDERED * ups else -1 if ups < ORDERED * downs else 0,
        )


def _named(rows: CodedRows, long: Long, options: ReadOptions, tags: Tags, end: str) -> Int64:
    """[T] numbers of the tags; -1 = excluded."""
    columns = [rows.columns[name] for name in long.tags]
    codes, names = columns[0].codes, columns[0].texts()
    for column in columns[1:]:
        texts = column.texts()
        both, codes = np.unique(codes * len(texts) + column.codes, return_inverse=True)
        names = [f"{names[pair // len(texts)]}.{texts[pair % len(texts)]}" for pair in both.tolist()]
    names = [f"{name}{end}" for name in names]
    out = [any(fits(name, pattern) for pattern in options.exclude) for name in names]
    tags.left_out.update(name for name, is_out in zip(names, out, strict=True) if is_out)
    order = [0] * len(names)
    for code in np.argsort(_firsts(codes, len(names))).tolist():  # numbers in the order of the rows
        order[code] = -1 if out[code] else tags.place(names[code])
    return np.array(order, dtype=np.int64)[codes]


def _firsts(codes: Int64, size: int) -> Int64:
    first = np.full(size, len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return first


def _values(source: Source, rows: CodedRows, value: str, long: Long, dialect: Dialect, tags: Tags, named: Int64) -> Float64:
    """[T] values, NaN = missing; what was missing why is counted for each tag."""
    cells = rows.columns[value]
    numbers, words = coded_numbers(source.path, cells, dialect, rows.before)
    values, is_word = numbers[cells.codes], words[cells.codes]
    if long.quality is not None:
        quality = rows.columns[long.quality]
        texts = quality.texts()
        bad = np.array([text not in long.good for text in texts])[quality.codes] & (named >= 0)
        found, count = np.unique(named[bad] * len(quality.distinct) + quality.codes[bad], return_counts=True)
        for both, number in zip(found.tolist(), count.tolist(), strict=True):
            tag, code = divmod(both, len(quality.distinct))
            tags.bad[tag] += number
            if len(said := tags.bad_words.setdefault(tag, set())) < MOST_BAD_WORDS:
                said.add(str(quality.distinct[code]))
        values, is_word = np.where(bad, np.nan, values), is_word & ~bad
    blank = np.isin(values, list(dialect.missing)) & (named >= 0)
    values = np.where(blank, np.nan, values)
    tags.blanked.update(named[blank].tolist())
    is_word &= named >= 0
    _count(tags.words, tags.first_word, named[is_word], cells, np.flatnonzero(is_word))
    good = named[(named >= 0) & ~np.isnan(values)]
    for tag, count in zip(*(part.tolist() for part in np.unique(good, return_counts=True)), strict=True):
        tags.numbers[tag] += count
    return values


def _count(counts: Counter[int], firsts: dict[int, str], tags: Int64, cells: Coded, rows: Int64) -> None:
    found, first, count = np.unique(tags, return_index=True, return_counts=True)
    for tag, at, number in zip(found.tolist(), first.tolist(), count.tolist(), strict=True):
        counts[tag] += number
        firsts.setdefault(tag, str(cells.distinct[cells.codes[rows[at]]]))


def _told_apart(named: Int64, records: Records, later: Float64, tags: Tags, order_of_file: int) -> Readings:
    """Readings of an hour that a clock set back has twice: the second time begins where it goes back, or ends there if newest is first.

    Of two alone, and of two at the same time, as in hourly tables, the order of the file tells which is later: 1, or -1 for newest first.
    """
    order = np.lexsort((np.arange(len(named)), np.floor(records["second"] / 86_400), named))
    named, records, later = named[order], records[order], later[order]
    hours = np.flatnonzero(np.diff(named, prepend=-1) | (np.diff(np.floor(records["second"] / 86_400), prepend=-1) != 0))
    for start, end in zip(hours.tolist(), [*hours[1:].tolist(), len(named)], strict=True):
        steps = np.diff(records["second"][start:end])
        ups, downs = np.flatnonzero(steps > 0), np.flatnonzero(steps < 0)
        if len(downs) == 1 and len(ups):
            records["second"][start + downs[0] + 1 : end] += later[start + downs[0] + 1 : end]
        elif len(ups) == 1 and len(downs):
            records["second"][start : start + ups[0] + 1] += later[start : start + ups[0] + 1]
        elif len(steps) == 1 and order_of_file:
            step, values = steps[0] * order_of_file, records["value"][start:end]
            if step < 0 or (step == 0 and values[0] != values[1]):
                second = start + 1 if order_of_file > 0 else start
                records["second"][second] += later[second]
        elif len(ups) and len(downs):
            tags.unclear += end - start
    return Readings(named, records)


def aligned(
    spill: Spill, key: int, features: list[int], twice: Counter[int], every: float, hold: float
) -> Iterator[tuple[Float64, Float64]]:
    """A stream's instants [T] in order and its values [T, F], some at a time; of two readings at one instant the one that came last.

    `twice` counts the others by their place in `features`. `every` and `hold` as in Long.
    """
    rows = _instants(spill, key, features, twice, every, math.inf if hold else math.nan)
    yield from held(rows, every, hold) if hold else rows


def held(rows: Iterable[tuple[Float64, Float64]], every: float, hold: float) -> Iterator[tuple[Float64, Float64]]:
    """A row each `every` seconds, with the last readings [T, F] that are `hold` seconds old at most. Infinite in `rows`: no number."""
    seconds, values, since = np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))  # of the last row, whose next one is not known yet
    for more, found in rows:
        seconds, fresh = np.append(seconds, more), np.where(np.isnan(found), -np.inf, more[:, None])
        values, since = (np.vstack([values, found]), np.vstack([since, fresh])) if len(values) else (found, fresh)
        last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))[:, None]), axis=0)
        values, since = np.take_along_axis(values, last, axis=0), np.take_along_axis(since, last, axis=0)
        counts = 1 + np.minimum(np.rint(np.diff(seconds) / every) - 1, hold // every).astype(np.int64)
        cuts = np.unique(np.searchsorted(np.cumsum(counts), np.arange(1, counts.sum() + 1, max(1, SPILL // values.shape[1])))).tolist()
        for low, high in pairwise([*cuts, len(counts)]):
            yield _stood(seconds[low:high], values[low:high], since[low:high], counts[low:high], every, hold)
        seconds, values, since = seconds[-1:], values[-1:], since[-1:]
    if len(seconds):
        yield _stood(seconds, values, since, np.ones(1, np.int64), every, hold)


def _stood(seconds: Float64, values: Float64, since: Float64, counts: Int64, every: float, hold: float) -> tuple[Float64, Float64]:
    """Each row as often as is said, `every` seconds apart."""
    places = np.repeat(np.arange(len(counts)), counts)
    at = seconds[places] + every * (np.arange(len(places)) - (np.cumsum(counts) - counts)[places])
    stands = (at[:, None] - since[places] <= hold) & np.isfinite(values[places])
    return at, np.where(stands, values[places], np.nan)


def _instants(
    spill: Spill, key: int, features: list[int], twice: Counter[int], every: float, nothing: float
) -> Iterator[tuple[Float64, Float64]]:
    total = spill.count(key)
    if total <= SPILL:
        if total:
            yield from _rows(np.concatenate(list(spill.read(key))), features, twice, every, nothing)
        return
    sample = np.concatenate([records["second"][:: max(1, len(records) // 1024)] for records in spill.read(key)])
    edges = np.unique(_ends(np.quantile(sample, np.linspace(0, 1, 2 * total // SPILL + 2)[1:-1]), every))
    with closing(spill.another()) as by_time:
        for records in spill.read(key):
            by_time.add(np.searchsorted(edges, _ends(records["second"], every), side="right"), records)
        for part in range(len(edges) + 1):
            if by_time.count(part):
                yield from _rows(np.concatenate(list(by_time.read(part))), features, twice, every, nothing)


def _ends(seconds: Float64, every: float) -> Float64:
    return np.ceil(seconds / every) * every if every else seconds


def _rows(records: Records, features: list[int], twice: Counter[int], every: float, nothing: float) -> Iterator[tuple[Float64, Float64]]:
    """`nothing`: what a reading that is no number is as the last one of an interval; NaN: the last number counts."""
    local = np.full(int(records["feature"].max()) + 1, -1, dtype=np.int64)
    within = [feature for feature in features if feature < len(local)]
    local[within] = np.arange(len(within))
    feature = local[records["feature"]]
    seconds, values, feature = records["second"][feature >= 0], records["value"][feature >= 0], feature[feature >= 0]
    order = np.lexsort((seconds, feature))  # stable: of equal times the one that came last is the last
    seconds, values, feature = seconds[order], values[order], feature[order]
    again = (np.diff(seconds) == 0) & (np.diff(feature) == 0)
    twice.update(feature[:-1][again].tolist())
    kept = np.append(~again, True)
    if every:
        values = np.where(np.isnan(values), nothing, values)
        kept &= ~np.isnan(values)
        seconds, values, feature = _ends(seconds[kept], every), values[kept], feature[kept]
        kept = np.append((np.diff(seconds) != 0) | (np.diff(feature) != 0), True)[: len(seconds)]
    seconds, values, feature = seconds[kept], values[kept], feature[kept]
    order = np.argsort(seconds, kind="stable")
    seconds, values, feature = seconds[order], values[order], feature[order]
    new = np.diff(seconds, prepend=-np.inf) != 0
    rows, instants = np.cumsum(new) - 1, seconds[new]
    step = max(1, SPILL // len(features))
    for start in range(0, len(instants), step):
        low, high = np.searchsorted(rows, [start, start + step])
        matrix = np.full((min(step, len(instants) - start), len(features)), np.nan)
        matrix[rows[low:high] - start, feature[low:high]] = values[low:high]
        yield instants[start : start + step], matrix


@dataclass(frozen=True)
class Suggestion:
    """That a table looks like a long one."""

    tag: str
    values: list[str]
    sure: bool  # the same times come again and again, with other words


def suggestion(source: Source, options: ReadOptions, dialect: Dialect) -> Suggestion | None:
    """How to read this table, where words that come again, a few thousand at most, stand beside numbers in a handful of columns."""
    try:
        rows = next(iter(read_coded(source, options, None, dialect, GLANCE * FEW)))
        numeric = {name: _has_numbers(source, cells, dialect, rows.before) for name, cells in rows.columns.items()}
    except TableError:
        return None  # said by who reads it
    measured = [name for name, some in numeric.items() if some]
    if len(numeric) > FEW or not measured:
        return None
    _, instants = np.unique(rows.seconds, return_inverse=True)
    sure = int(instants.max()) + 1 < SELDOM * len(instants)
    for name, some in numeric.items():
        codes, kinds = rows.columns[name].codes, len(rows.columns[name].distinct)
        pairs = len(np.unique(instants * kinds + codes))
        if not some and 1 < kinds <= len(codes) / 2 and pairs > SELDOM * len(codes):
            values = [known for known in measured if known.strip("_").lower() in VALUES] or measured
            return Suggestion(name, values, sure)
    return None


def _has_numbers(source: Source, cells: Coded, dialect: Dialect, before: int) -> bool:
    try:
        return bool((~np.isnan(coded_numbers(source.path, cells, dialect, before)[0])).any())
    except TableError:
        return True
