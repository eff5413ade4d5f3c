"""Files of rows → `Table`: what training, backtest and replay read. CSV (`,` `;` or tab), Parquet (extra `arrow`) and npz.

    folder ── walked ──► Source(path, name) ── read_batches ──► consecutive Tables ── read_table ──► Table(name, timestamps, columns)

One file is one stream. Columns of labels are left out by name and said so; every other column must be numeric. Files are read a batch of
rows at a time, so `read_batches` takes files larger than memory, but for an npz whose array is in Fortran's order.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import math
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from service.errors import TableError
from service.events import EARLIEST_SECONDS, FLOAT32_MAX, LATEST_SECONDS, PER_SECOND, listed

Float64 = NDArray[np.float64]
Notify = Callable[[str], None]

SUFFIXES = (".csv", ".tsv", ".parquet", ".npz")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".xlsx", ".xls", ".feather", ".arrow", ".orc", ".avro", ".jsonl", ".ndjson")
"""Of files that most likely hold rows, too, and are not read."""
TIMESTAMP_COLUMNS = ("timestamp", "time", "datetime", "date_time", "date", "ts", "@timestamp", "epoch", "_time", "t_stamp")
LABEL_COLUMNS = frozenset(
    {"anomaly", "anomalies", "is_anomaly", "anomaly_label", "label", "labels", "is_label", "ground_truth", "changepoint", "change_point"}
)
BATCH_CELLS = 1 << 17
"""Cells of a batch."""
GROUPED: dict[str | None, re.Pattern[str]] = {
    ",": re.compile(r"\s*[-+]?\d{1,3}(?:([.\s'’])\d{3})(?:\1\d{3})*(?:,\d+)?\s*"),
    ".": re.compile(r"\s*[-+]?\d{1,3}(?:([,\s'’])\d{3})(?:\1\d{3})*(?:\.\d+)?\s*"),
    None: re.compile(r"\s*[-+]?\d{1,3}(?:(?:,\d{3})+\.\d+|(?:,\d{3}){2,}|(?:([\s'’])\d{3})(?:\1\d{3})*(?:\.\d+)?)\s*"),
}
"""Numbers with marks between thousands, by what stands before the decimals; None = nobody said, so `1,234` may be one or the other."""
_NUMBER = r"[-+]?\d[\d.,]*"
UNIT = re.compile(rf"\s*(?:(?:[A-Z]{{0,3}}[€$£¥]|[A-Z]{{3}})\s*{_NUMBER}|{_NUMBER}(?:\s*[€$£¥%‰]|\s+[^\W\d_]{{1,3}}))\s*")
"""A number with a currency, a per cent sign or a short unit: `€12.50`, `99.5 %`, `12 kW`."""
ONE_COMMA = re.compile(r"\s*[-+]?[1-9]\d{0,2},\d{3}\s*")
MARKS = re.compile(r"[.,\s'’]")
MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "-"})
TRUTHS = {"true": 1.0, "false": 0.0}
EXCEL_SEPARATOR = re.compile(r'"?sep=([,;\t])"?\s*')
"""The line by which Excel is told what separates cells."""
UNITS = {unit: PER_SECOND[unit] for unit in ("ms", "us", "ns")}
"""Forms of times that count since 1970 in less than seconds."""
INFLUX_NOTES = frozenset({"#group", "#datatype", "#default"})
"""What InfluxDB's annotated CSV has in the first cell of lines that are no rows."""
UNTIMED = "No column of times by a name that is known (--timestamp names it): rows are taken to be a second apart, from 1970 on."


class NoColumns(TableError):
    """Every column of a file is left out."""


class NoRows(TableError):
    """A file has a header alone, or not even that."""


class Unsorted(TableError):
    """A row is older than the one before."""


@dataclass(frozen=True)
class Table:
    """One stream's rows, in the order of time."""

    name: str  # path relative to the folder that was given, with `/`
    timestamps: Float64  # [T] epoch seconds UTC, never decreasing unless ReadOptions.unsorted
    columns: dict[str, Float64]  # feature → [T], NaN = missing
    written: Sequence[str]  # [T] the timestamps as the file writes them; empty from `read_batches`

    def __len__(self) -> int:
        return len(self.timestamps)

    def matrix(self, features: Sequence[str]) -> Float64:
        """The named columns as [T, F], in that order. Raises TableError that names the ones the file lacks."""
        absent = [feature for feature in features if feature not in self.columns]
        if absent:
            raise TableError(f"{self.name} has no column {', '.join(map(repr, absent))}; it has {', '.join(map(repr, self.columns))}.")
        return np.stack([self.columns[feature] for feature in features], axis=1)


@dataclass(frozen=True)
class Source:
    """A file to read and the name of its stream."""

    path: Path
    name: str

    def stat(self) -> os.stat_result:
        """Raises TableError where the file is not there any more."""
        try:
            return self.path.stat()
        except OSError as error:
            raise _unread(self, error) from error


@dataclass(frozen=True)
class ReadOptions:
    """What the user says of the columns; all optional."""

    timestamp: str | None = None  # name of the timestamp column
    exclude: frozenset[str] = frozenset()  # columns to leave out; names, or patterns such as *.status
    only: frozenset[str] | None = None  # columns to read, all others are left out
    unsorted: bool = False  # True: rows that go back in time are the caller's business (the service calls them late)
    array: str | None = None  # array of an npz to read; default: `train`, or the only one with two axes
    timed: bool = False  # True: a table without a column of times is refused, where its rows would be a second apart


@dataclass(frozen=True)
class Dialect:
    """How a file writes numbers and times."""

    decimal: str | None = None  # what a CSV has before the decimals; None: points, but 1,234 is no number
    time_format: str | None = None  # of times, as in strptime, or one of UNITS; default: ISO 8601 or epoch seconds
    zone: tzinfo = UTC  # of times that name none
    missing: frozenset[float] = frozenset()  # numbers that stand for no reading; heeded by `split`
    unzoned: Callable[[], None] | None = None  # told of each time that names no zone
    strange: Callable[[str, str], None] | None = None  # told column and cell of what is no number, and so missing; None: it is refused


@dataclass(frozen=True)
class Coded:
    """A column of T cells, each different one once."""

    name: str
    codes: NDArray[np.int64]  # [T] places in `distinct`
    distinct: list[Any]  # in the order of their first rows; texts of a CSV, what Arrow has in Parquet

    def texts(self) -> list[str]:
        """The cells as texts, null as an empty one."""
        return ["" if cell is None else str(cell).strip() for cell in self.distinct]

    def first(self, place: int) -> int:
        """Number of the first row of a cell, from 1 on."""
        return int((self.codes == place).argmax()) + 1


@dataclass(frozen=True)
class CodedRows:
    """Rows of a long table."""

    before: int  # rows of the file before these
    seconds: Float64  # [T] epoch seconds UTC, in the file's order
    later: Float64  # [T] seconds until the same clock says the same time again, where a clock set back has it twice; else 0
    columns: dict[str, Coded]


def find_sources(paths: Iterable[Path]) -> list[Source]:
    """The files that `paths` name, folders walked recursively. Raises TableError when a path holds none."""
    sources: list[Source] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            sources += [Source(file, file.relative_to(path).as_posix()) for file in files]
            if not files:
                raise TableError(f"{path} holds no {', '.join(SUFFIXES)} file. {passed_over([path])}".rstrip())
        elif path.is_file():
            sources.append(Source(path, path.name))
        else:
            raise TableError(f"{path} does not exist.")
    return sources


def passed_over(paths: Iterable[Path]) -> str:
    """What of these folders may hold rows and is not read, in words; "" = nothing."""
    found = [
        file for path in paths if path.is_dir() for file in sorted(path.rglob("*")) if file.suffix.lower() in PACKED and file.is_file()
    ]
    if not found:
        return ""
    return f"Not read, as they are no {', '.join(SUFFIXES)} file: {listed(file.name for file in found)}. Unpack them, or save them as CSV."


def refuse_idle(sources: Sequence[Source], options: ReadOptions) -> None:
    """Raises TableError where a name or pattern of `exclude` fits no column of any of these files, or `array` is asked and none is an npz.

    Heads alone are read, and no more of them than it takes.
    """
    if options.array is not None and not any(source.path.suffix.lower() == ".npz" for source in sources):
        raise TableError(f"--array {options.array!r} names an array of an npz file, and there is none: leave it out.")
    idle, columns = sorted(options.exclude), dict[str, None]()
    for source in sources:
        if not idle:
            return
        with suppress(NoRows):
            names = columns_of(source, options)
            idle = [pattern for pattern in idle if not any(fits(name, pattern) for name in names)]
            columns |= dict.fromkeys(names)
    if idle:
        raise TableError(f"--exclude {idle[0]!r} fits no column; there are {listed(columns)}.")


def once_each(notify: Notify) -> Notify:
    """`notify` without repetitions."""
    told: set[str] = set()

    def once(message: str) -> None:
        if message not in told:
            told.add(message)
            notify(message)

    return once


@dataclass
class Rowless:
    """Files without rows among many, which are told and left out: an export of a sensor that said nothing is such a one."""

    sources: Sequence[Source]
    """All of them."""
    notify: Notify
    names: list[str] = field(default_factory=list)

    @contextmanager
    def left_out(self, source: Source) -> Iterator[None]:
        """Around the reading of one of them. Raises NoRows where it is the only one."""
        try:
            yield
        except NoRows as error:
            if len(self.sources) == 1:
                raise
            self.names.append(source.name)
            self.notify(f"{error.detail} It is left out.")

    def refuse_all(self) -> None:
        """Raises NoRows where none of them is left."""
        if len(self.names) == len(self.sources):
            raise NoRows(f"None of {len(self.sources):,} files has a row.")


def read_table(source: Source, options: ReadOptions = ReadOptions(), notify: Notify = print) -> Table:
    """One file. Raises TableError that names file, column, row (the first after the header is 1) and value."""
    batches = list(_batches(_Reading(source, options, notify, texts=True)))
    if len(batches) == 1:
        return batches[0]
    columns = {name: np.concatenate([batch.columns[name] for batch in batches]) for name in batches[0].columns}
    timestamps = np.concatenate([batch.timestamps for batch in batches])
    return Table(source.name, timestamps, columns, list(itertools.chain.from_iterable(batch.written for batch in batches)))


def read_batches(
    source: Source,
    options: ReadOptions = ReadOptions(),
    notify: Notify = print,
    cells: int = BATCH_CELLS,
    dialect: Dialect = Dialect(),
) -> Iterator[Table]:
    """One file as consecutive tables of about `cells` cells each, at least one. Raises TableError when it gets to what is wrong."""
    return _batches(_Reading(source, options, notify, cells, dialect=dialect))


def columns_of(source: Source, options: ReadOptions = ReadOptions()) -> list[str]:
    """All columns of a file, the time's and labels among them. Raises TableError."""
    try:
        if source.path.suffix.lower() == ".parquet":
            with _parquet_file(source) as (file, _):
                return list(file.schema_arrow.names)
        if source.path.suffix.lower() == ".npz":
            with _npz_arrays(source) as arrays:
                return _npz_names(source, arrays, options)
        with _csv_rows(source) as rows:
            first = next(rows, None)
    except OSError as error:
        raise _unread(source, error) from error
    if first is None:
        raise NoRows(f"{source.path} is empty.")
    return [name.strip() for name in _header(first)]


def features_of(source: Source, options: ReadOptions = ReadOptions()) -> list[str]:
    """The columns of the tables that `read_batches` gives, by its first row. Raises TableError, NoRows where there is none."""
    return list(next(read_batches(source, options, lambda _said: None, cells=1)).columns)


def read_coded(source: Source, options: ReadOptions, wanted: Sequence[str] | None, dialect: Dialect, cells: int) -> Iterator[CodedRows]:
    """Some columns, None = all, of a CSV or Parquet file whose rows are in any order. Raises TableError when it gets to what is wrong."""
    readers = {".csv": _csv_coded, ".tsv": _csv_coded, ".parquet": _parquet_coded}
    suffix = source.path.suffix.lower()
    if suffix not in readers:
        raise TableError(f"{source.path} is not one of {', '.join(readers)}.")
    reading = _Reading(source, options, lambda _said: None, cells, dialect=dialect)
    before = 0
    try:
        for time, columns in readers[suffix](reading, wanted):
            if len(time.codes):
                seconds, later = _coded_times(reading, time, before)
                yield CodedRows(before, seconds[time.codes], later[time.codes], columns)
            before += len(time.codes)
    except OSError as error:
        raise _unread(source, error) from error
    if before == 0:
        raise NoRows(f"{source.path} has no rows.")


def coded_numbers(path: Path, cells: Coded, dialect: Dialect, before: int) -> tuple[Float64, NDArray[np.bool_]]:
    """Of each different cell its number, NaN = missing, and whether it is a word. Raises TableError for an infinite one."""
    decimal, distinct = dialect.decimal, cells.distinct
    words = np.zeros(len(distinct), dtype=np.bool_)
    try:
        if any(cell is None or isinstance(cell, bool) for cell in distinct):
            raise ValueError
        values = np.array([_pointed(cell, decimal) if isinstance(cell, str) else cell for cell in distinct], dtype=np.float64)
    except (ValueError, TypeError):
        known = [_number_or_word(_as_written(cell, decimal), decimal) for cell in distinct]
        values = np.array([math.nan if value is None else value for value in known], dtype=np.float64)
        words[[i for i, value in enumerate(known) if value is None]] = True
    infinite = np.isinf(values)
    if infinite.any():
        place = int(infinite.argmax())
        raise _infinite(path, cells.name, before + cells.first(place), repr(cells.distinct[place]))
    return values, words


def _coded_times(reading: _Reading, time: Coded, before: int) -> tuple[Float64, Float64]:
    """Of each different time its seconds, the first of two, and how much later the second is."""
    dialect, cells = reading.dialect, time.distinct
    unit = UNITS.get(dialect.time_format or "")
    counted = unit or (dialect.time_format is None and all(isinstance(cell, int | float) or _is_number(str(cell)) for cell in cells[:1]))
    later = np.zeros(len(cells))
    if counted:
        wrong = next((i for i, cell in enumerate(cells) if cell is None or not _is_number(str(cell))), None)
        if wrong is not None:
            raise TableError(
                f"{reading.source.path}: column {time.name!r}, row {before + time.first(wrong)}: {cells[wrong]!r} is not a time in epoch "
                "seconds, as the first is."
            )
        seconds = np.array(cells, dtype=np.float64) / (unit or 1.0)
        bad = ~((seconds >= EARLIEST_SECONDS) & (seconds < LATEST_SECONDS))
        if bad.any():
            _refuse_epoch(reading.source, time.name, float(seconds[bad.argmax()]), before + time.first(int(bad.argmax())))
        return seconds, later
    seconds = np.empty(len(cells))
    for i, cell in enumerate(cells):
        moment = cell if isinstance(cell, datetime) else None
        if moment is None:
            try:
                moment = _parsed(dialect, str(cell))
            except ValueError:
                moment = _moment(reading, time.name, before + time.first(i), str(cell))
        zoned = _zoned(dialect, moment)
        if zoned is None:
            raise _skipped(reading, time.name, before + time.first(i), str(cell))
        seconds[i] = zoned.timestamp()
        if dialect.zone is not UTC:
            later[i] = zoned.replace(fold=1).timestamp() - seconds[i]
    return seconds, later


@dataclass(frozen=True)
class _Reading:
    """One reading of a file."""

    source: Source
    options: ReadOptions
    notify: Notify
    cells: int = BATCH_CELLS
    texts: bool = False  # whether Table.written is wanted
    dialect: Dialect = Dialect()

    def rows(self, width: int) -> int:
        """Rows of a batch."""
        return max(1, self.cells // max(1, width))


def _batches(reading: _Reading) -> Iterator[Table]:
    source, options = reading.source, reading.options
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".npz": _read_npz}
    suffix = source.path.suffix.lower()
    if suffix not in readers:
        unpack = " Unpack it, or save it as CSV." if suffix in PACKED else ""
        raise TableError(f"{source.path} is not one of {', '.join(SUFFIXES)}.{unpack}")
    rows, last = 0, -math.inf
    try:
        for table in readers[suffix](reading):
            if not table.columns:
                raise NoColumns(f"{source.path} has no numeric column left to read.")
            for column, values in table.columns.items():
                _refuse_infinite(source, column, values, rows)
            if len(table) == 0:
                continue
            if not options.unsorted:
                _refuse_unsorted(source, np.concatenate([[last], table.timestamps]), rows)
            rows, last = rows + len(table), table.timestamps[-1]
            yield table
    except OSError as error:
        raise _unread(source, error) from error
    if rows == 0:
        raise NoRows(f"{source.path} has no rows.")


def _unread(source: Source, error: OSError) -> TableError:
    return TableError(f"{source.path} cannot be read: {error.strerror or error}.")


def read_for(source: Source, features: Sequence[str], options: ReadOptions, notify: Notify) -> tuple[Table, Float64]:
    """One file for a model of F features: its table, and [T, F] in the model's order, NaN where the file has no such column.

    The only column of a file stands for the only feature of a model, whatever its name. Raises TableError when nothing fits.
    """
    try:
        table = read_table(source, replace(options, only=frozenset(features)), notify)
    except NoColumns:
        table = read_table(source, options, notify)
        if len(features) != 1 or len(table.columns) != 1:
            raise TableError(
                f"{source.path} has the columns {listed(table.columns)}, the model the features {listed(features)}: none fits. "
                "Rename the columns, or choose a model of such files (--model; python -m training fit --data ... makes one)."
            ) from None
        name, values = next(iter(table.columns.items()))
        notify(f"Column '{name}' is taken for the model's only feature '{features[0]}'.")
        return table, values[:, None]
    absent = [feature for feature in features if feature not in table.columns]
    if absent:
        notify(f"{source.path} lacks {listed(absent)}: missing in every event.")
    missing = np.full(len(table), np.nan)
    return table, np.stack([table.columns.get(feature, missing) for feature in features], axis=1)


def as_float32(source: Source, features: Sequence[str], values: Float64, notify: Notify, before: int = 0) -> NDArray[np.float32]:
    """Values [T, F], the rows behind the first `before`, as a detector takes them. Raises TableError where one is beyond its range.

    Tells of features that hardly move any more as float32: a meter that stands at 123,456,789 and counts by ones moves by eights.
    """
    beyond = np.argwhere(np.abs(values) > FLOAT32_MAX)
    if len(beyond):
        row, j = beyond[0].tolist()
        raise TableError(
            f"{source.path}: feature {features[j]!r}, row {before + row + 1}: {values[row, j]} is beyond the range of float32; "
            "leave the cell empty where a value is missing."
        )
    x = values.astype(np.float32)
    lost = [name for name, wide, narrow in zip(features, values.T, x.T, strict=True) if _stands_still(wide, narrow)]
    if lost:
        notify(
            f"{source.path}: of {listed(lost)} most changes from row to row are too small beside the values: a detector keeps seven "
            "digits (float32). Take a constant off all values, or give what a counter grows by."
        )
    return x


def _stands_still(wide: Float64, narrow: NDArray[np.float32]) -> bool:
    """Whether most changes of a column [T] are lost in its float32."""
    change = np.diff(wide)
    moved = np.isfinite(change) & (change != 0)
    return 2 * int((moved & (np.diff(narrow) == 0)).sum()) > int(moved.sum())


# ── CSV ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_csv(reading: _Reading) -> Iterator[Table]:
    with _csv_rows(reading.source) as rows:
        yield from _csv_tables(reading, rows)


@contextmanager
def _csv_rows(source: Source) -> Iterator[Iterator[list[str]]]:
    with source.path.open("rb") as content:
        begins = content.read(2)
    if begins in (b"\x1f\x8b", b"PK"):
        raise TableError(f"{source.path} is packed, or a spreadsheet that is called otherwise: unpack it, or save it as CSV.")
    written_in = encoding(begins)
    with source.path.open(newline="", encoding=written_in) as file:
        try:
            line = file.readline()
            told = EXCEL_SEPARATOR.fullmatch(line)
            if told is None:
                file.seek(0)
            yield filter(None, csv.reader(file, delimiter=told[1] if told else _separator(line)))
        except UnicodeDecodeError as error:
            raise TableError(
                f"{source.path} is not in UTF-8: {error}. If a Windows of western Europe wrote it, `iconv -f WINDOWS-1252 -t UTF-8 "
                "FILE > OTHER.csv` makes it so."
            ) from error
        except csv.Error as error:
            raise TableError(f"{source.path} is not a text table: {error}.") from error


def encoding(begins: bytes) -> str:
    """By a file's first two bytes: UTF-16 with its mark, as Excel writes "Unicode text", else UTF-8, whose mark is none of the text."""
    return "utf-16" if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _csv_coded(reading: _Reading, wanted: Sequence[str] | None) -> Iterator[tuple[Coded, dict[str, Coded]]]:
    source = reading.source
    with _csv_rows(source) as all_rows:
        header = next(all_rows, None)
        rows: Iterator[list[str]] = all_rows
        if header is not None and header[0] in INFLUX_NOTES:
            rows = (row for row in all_rows if row[0] not in INFLUX_NOTES)
            header = next(rows, None)
        if header is None:
            raise NoRows(f"{source.path} is empty.")
        names = [name.strip() for name in header]
        time, places = _coded_columns(reading, names, wanted)
        before = 0
        while batch := list(itertools.islice(rows, reading.rows(len(names)))):
            if header in batch:  # InfluxDB writes it again above each of its tables
                batch = [row for row in batch if row != header]
            _refuse_ragged(source, batch, len(names), before)
            before += len(batch)
            cells = list(zip(*batch, strict=True)) if batch else [()] * len(names)
            yield _code(time, cells[names.index(time)]), {name: _code(name, cells[place]) for name, place in places.items()}


def _code(name: str, cells: Sequence[str]) -> Coded:
    places: defaultdict[str, int] = defaultdict()
    places.default_factory = places.__len__
    return Coded(name, np.fromiter(map(places.__getitem__, cells), np.int64, len(cells)), list(places))


def _csv_tables(reading: _Reading, rows: Iterator[list[str]]) -> Iterator[Table]:
    """At least one, empty where there is a header alone."""
    source = reading.source
    first = next(rows, None)
    if first is None:
        raise NoRows(f"{source.path} is empty.")
    header = _header(first)
    body = rows if header is first else itertools.chain([first], rows)
    names = [name.strip() for name in header]
    _refuse_twins(source, names)
    time_column = _time_column(source, names, reading.options)
    kept = _kept_columns(names, time_column, reading.options, reading.notify)
    before, epoch, last = 0, True, -math.inf
    while (batch := list(itertools.islice(body, reading.rows(len(names))))) or before == 0:
        _refuse_ragged(source, batch, len(names), before)
        cells: dict[str, Sequence[str]] = dict(zip(names, zip(*batch, strict=True) if batch else [()] * len(names), strict=True))
        columns = {name: _numbers(reading, name, cells[name], before) for name in kept}
        if time_column is None:
            yield _numbered(reading, columns, before, len(batch))
        else:
            written = cells[time_column]
            epoch = _is_number(written[0]) if before == 0 and written else epoch
            times = _times(reading, time_column, written, before, epoch, last)
            last = times[-1] if len(times) else last
            yield Table(source.name, times, columns, written if reading.texts else ())
        if not batch:
            return
        before += len(batch)


def _separator(line: str) -> str:
    return max(",;\t", key=line.count)


def _header(first: list[str]) -> list[str]:
    """The first row, or f0, f1, ... when that row is already numbers."""
    if all(_is_number(cell) for cell in first):
        return [f"f{i}" for i in range(len(first))]
    return first


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_ragged(source: Source, batch: list[list[str]], width: int, before: int) -> None:
    for number, row in enumerate(batch, before + 1):
        if len(row) != width:
            raise TableError(f"{source.path}: row {number} has {len(row)} cells, the header has {width}.")


def _numbers(reading: _Reading, column: str, cells: Sequence[str], before: int) -> Float64:
    """`before`, here and below: rows of the file before these."""
    decimal = reading.dialect.decimal
    try:
        return np.array(cells if decimal != "," else [_pointed(cell, decimal) for cell in cells], dtype=np.float64)
    except ValueError:
        return np.array([_number(reading, column, number, cell) for number, cell in enumerate(cells, before + 1)])


def _pointed(cell: str, decimal: str | None) -> str:
    """The cell as Python writes numbers, without marks between thousands. Raises ValueError: the other mark stands elsewhere."""
    if GROUPED[decimal].fullmatch(cell):
        whole, point, part = cell.partition(decimal or ".")
        return MARKS.sub("", whole) + (f".{part}" if point else "")
    if decimal == ",":
        if "." in cell:
            raise ValueError
        return cell.replace(",", ".")
    return cell


def _as_written(cell: object, decimal: str | None) -> str:
    """A cell of Parquet as a CSV has it."""
    return cell if isinstance(cell, str) else "" if cell is None else str(cell).replace(".", decimal or ".")


def _number(reading: _Reading, column: str, number: int, cell: str) -> float:
    try:
        return float(_pointed(cell, reading.dialect.decimal))
    except ValueError:
        text = cell.strip().lower()
        if text in MISSING:
            return math.nan
        if text in TRUTHS:
            return TRUTHS[text]
        if reading.dialect.strange is not None:
            reading.dialect.strange(column, cell)
            return math.nan
        raise TableError(
            f"{reading.source.path}: column {column!r}, row {number}: {cell!r} is not a number ({_advice(column, cell)})."
        ) from None


def _number_or_word(cell: str, decimal: str | None) -> float | None:
    """None for a word."""
    try:
        return float(_pointed(cell, decimal))
    except ValueError:
        text = cell.strip().lower()
        return math.nan if text in MISSING else TRUTHS.get(text)


def _advice(column: str, cell: str) -> str:
    """What to do about a cell that is no number."""
    if ONE_COMMA.fullmatch(cell):
        return "`python -m service split` reads it, with --decimal . where its comma is between thousands, with --decimal , where it is not"
    if re.fullmatch(r"\s*[-+]?[\d.]*\d,\d+\s*", cell):
        return "is it a decimal comma? `python -m service split --decimal ,` makes files with points"
    if re.match(r"\s*\d{1,4}[-./]\d{1,2}[-./]\d{1,4}", cell):
        joined = "" if ":" in cell else ", after writing the time of day into the same column where it is in another"
        return f"if it is the time, name it with --timestamp {column!r}{joined}; else leave the column out with --exclude {column!r}"
    if UNIT.fullmatch(cell):
        return "write the number alone, without its unit"
    return (
        "`python -m service split` takes words among numbers for missing; where the column is no reading, leave it out with "
        f"--exclude {column!r}, a pattern such as '*.status' leaves out many"
    )


def _times(reading: _Reading, column: str, cells: Sequence[str], before: int, epoch: bool, last: float) -> Float64:
    """`epoch`: as the file's first time is, so are all. `last`: the time of the row before these, -inf = none."""
    source, unit = reading.source, UNITS.get(reading.dialect.time_format or "")
    if unit is None and (not epoch or reading.dialect.time_format is not None):
        return _moments(reading, column, cells, before, last)
    try:
        seconds = np.array(cells, dtype=np.float64)
    except ValueError:
        row = next(i for i, cell in enumerate(cells) if not _is_number(cell))
        raise TableError(
            f"{source.path}: column {column!r}, row {before + row + 1}: {cells[row]!r} is not a time in epoch seconds."
        ) from None
    return _checked_epoch(source, column, seconds / (unit or 1.0), before)


def _moments(reading: _Reading, column: str, cells: Sequence[str], before: int, last: float) -> Float64:
    """Local times that a clock set back has twice are the later ones where they go back from the row before, or where rows an hour or more
    apart say the same time again.
    """
    seconds = np.empty(len(cells))
    step = 0.0
    for i, cell in enumerate(cells):
        moment = _moment(reading, column, before + i + 1, cell)
        second = moment.timestamp()
        if second < last or (second == last and step >= 3600):
            second = moment.replace(fold=1).timestamp()
        step = second - last if last > -math.inf else 0.0
        seconds[i] = last = second
    return seconds


def _moment(reading: _Reading, column: str, number: int, cell: str) -> datetime:
    dialect = reading.dialect
    try:
        moment = _parsed(dialect, cell)
    except ValueError:
        wanted = f"is not of the form {dialect.time_format!r}" if dialect.time_format else "is neither an ISO 8601 time nor epoch seconds"
        raise TableError(
            f"{reading.source.path}: column {column!r}, row {number}: {cell!r} {wanted} (name the time column with --timestamp; "
            "`python -m service split --time-format` reads times of other forms)."
        ) from None
    zoned = _zoned(dialect, moment)
    if zoned is None:
        raise _skipped(reading, column, number, cell)
    return zoned


def _zoned(dialect: Dialect, moment: datetime) -> datetime | None:
    """In the dialect's zone where it names none; None = its clocks are set forward across that time."""
    if moment.tzinfo is not None:
        return moment
    if dialect.unzoned:
        dialect.unzoned()
    moment = moment.replace(tzinfo=dialect.zone)
    skipped = dialect.zone is not UTC and moment.replace(fold=1).timestamp() < moment.timestamp()
    return None if skipped else moment


def _skipped(reading: _Reading, column: str, number: int, cell: str) -> TableError:
    return TableError(
        f"{reading.source.path}: column {column!r}, row {number}: {cell!r} is no time in {reading.dialect.zone}: its clocks are set "
        "forward across it. If the historian's are not, name a zone without: --zone Etc/GMT-1 is an hour ahead of UTC all the year."
    )


def _parsed(dialect: Dialect, cell: str) -> datetime:
    return datetime.strptime(cell.strip(), dialect.time_format) if dialect.time_format else datetime.fromisoformat(cell.strip())


def _checked_epoch(source: Source, column: str, seconds: Float64, before: int) -> Float64:
    bad = ~((seconds >= EARLIEST_SECONDS) & (seconds < LATEST_SECONDS))  # true for NaN too
    if bad.any():
        row = int(bad.argmax())
        _refuse_epoch(source, column, float(seconds[row]), before + row + 1)
    return seconds


def _refuse_epoch(source: Source, column: str, second: float, row: int) -> NoReturn:
    advice = " (are they milliseconds? `python -m service split --time-format ms` reads them)" if second >= LATEST_SECONDS else ""
    raise TableError(f"{source.path}: column {column!r}, row {row}: {second!r} is not a time in epoch seconds{advice}.")


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_parquet(reading: _Reading) -> Iterator[Table]:
    with _parquet_file(reading.source) as (file, pa):
        yield from _parquet_tables(reading, file, pa)


@contextmanager
def _parquet_file(source: Source) -> Iterator[tuple[Any, Any]]:
    try:
        import pyarrow as pa  # noqa: PLC0415  optional: extra `arrow`
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise TableError(f"{source.path}: reading Parquet needs the extra 'arrow': pip install 'onset[arrow]'.") from error
    try:
        # Without a buffer's size, the pages of a whole row group are read at once: the whole file, where it has one.
        with parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file, pa
    except MemoryError:  # Arrow's own is an ArrowException too
        raise
    except pa.ArrowException as error:
        raise TableError(f"{source.path} is not a Parquet file: {error}.") from error


def _parquet_coded(reading: _Reading, wanted: Sequence[str] | None) -> Iterator[tuple[Coded, dict[str, Coded]]]:
    with _parquet_file(reading.source) as (file, pa):
        time, places = _coded_columns(reading, file.schema_arrow.names, wanted)
        columns = [time, *places]
        for batch in file.iter_batches(batch_size=reading.rows(len(columns)), columns=columns, use_threads=False):
            coded = {name: _arrow_coded(reading.source, name, batch.column(name), pa) for name in columns}
            yield coded.pop(time), coded


def _arrow_coded(source: Source, name: str, values: Any, pa: Any) -> Coded:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    encoded = values.dictionary_encode(null_encoding="encode")
    distinct = _arrow_moments(source, name, encoded.dictionary, pa)
    return Coded(name, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), distinct)


def _parquet_tables(reading: _Reading, file: Any, pa: Any) -> Iterator[Table]:
    """At least one, empty where there are no rows."""
    source, names = reading.source, file.schema_arrow.names
    _refuse_twins(source, names)
    time_column = _time_column(source, names, reading.options)
    kept = _kept_columns(names, time_column, reading.options, reading.notify)
    wanted = kept if time_column is None else [time_column, *kept]
    before, last = 0, -math.inf
    # One thread: each more holds a decoded column.
    batches = file.iter_batches(batch_size=reading.rows(len(wanted)), columns=wanted or names, use_threads=False)
    for batch in itertools.chain(batches, [file.schema_arrow.empty_table()] if file.metadata.num_rows == 0 else []):
        columns = {name: _arrow_numbers(reading, name, batch.column(name), before, pa) for name in kept}
        if time_column is None:
            yield _numbered(reading, columns, before, batch.num_rows)
        else:
            times = _arrow_moments(source, time_column, batch.column(time_column), pa)
            written = [_text(time) for time in times] if reading.texts else ()
            seconds = _arrow_times(reading, time_column, times, before, last)
            last = seconds[-1] if len(seconds) else last
            yield Table(source.name, seconds, columns, written)
        before += batch.num_rows


def _arrow_numbers(reading: _Reading, column: str, values: Any, before: int, pa: Any) -> Float64:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type):
        return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))  # null is NaN
    cells = _arrow_moments(reading.source, column, values, pa)
    decimal = reading.dialect.decimal
    return np.array([_number(reading, column, i, _as_written(cell, decimal)) for i, cell in enumerate(cells, before + 1)])


def _arrow_moments(source: Source, column: str, values: Any, pa: Any) -> list[object]:
    if pa.types.is_timestamp(values.type) and values.type.unit == "ns":  # finer than Python's times, and than seconds in a float
        values = values.cast(pa.timestamp("us", values.type.tz), safe=False)
    try:
        times: list[object] = values.to_pylist()
    except (OverflowError, ValueError) as error:
        raise TableError(f"{source.path}: column {column!r} holds a time that cannot be read: {error}.") from error
    return times


def _arrow_times(reading: _Reading, column: str, values: list[object], before: int, last: float) -> Float64:
    source = reading.source
    if values and isinstance(values[0], int | float):
        seconds = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        return _checked_epoch(source, column, seconds / UNITS.get(reading.dialect.time_format or "", 1.0), before)
    if reading.dialect.time_format is not None and values and isinstance(values[0], datetime):
        reading = replace(reading, dialect=replace(reading.dialect, time_format=None))
    return _moments(reading, column, [_text(value) for value in values], before, last)


def _text(time: object) -> str:
    return time.isoformat() if isinstance(time, datetime) else str(time)


# ── npz ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Member:
    """An array of an npz that is read from its start on, a few rows at a time."""

    file: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool  # Fortran's order: its first row ends where the array ends

    def read(self, rows: int) -> NDArray[Any]:
        """The next `rows` rows. Raises ValueError where the file ends before."""
        width = math.prod(self.shape[1:])
        content = self.file.read(rows * width * self.dtype.itemsize)
        return np.frombuffer(content, self.dtype).reshape(rows, *self.shape[1:])

    def whole(self) -> NDArray[Any]:
        flat = _Member(self.file, (math.prod(self.shape),), self.dtype, by_column=False)
        return flat.read(flat.shape[0]).reshape(self.shape, order="F" if self.by_column else "C")


def _member(file: IO[bytes]) -> _Member:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    return _Member(file, shape, dtype, by_column)


def _read_npz(reading: _Reading) -> Iterator[Table]:
    with _npz_arrays(reading.source) as arrays:
        yield from _npz_tables(reading, arrays)


@contextmanager
def _npz_arrays(source: Source) -> Iterator[dict[str, _Member]]:
    try:
        with zipfile.ZipFile(source.path) as archive, ExitStack() as stack:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            yield {name.removesuffix(".npy"): _member(stack.enter_context(archive.open(name))) for name in names}
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise TableError(f"{source.path} is not an npz of plain arrays: {error}.") from error


def _npz_tables(reading: _Reading, arrays: dict[str, _Member]) -> Iterator[Table]:
    """At least one, empty where there are no rows."""
    source = reading.source
    names = _npz_names(source, arrays, reading.options)
    matrix = arrays[_npz_array(source, arrays, reading.options)]
    rows, width = matrix.shape
    _refuse_twins(source, names)
    kept = _kept_columns(names, None, reading.options, reading.notify)
    times = arrays.get("timestamps")
    if times is not None and times.shape != (rows,):
        raise TableError(f"{source.path}: `timestamps` has shape {times.shape}, the array has {rows} rows.")
    everything = matrix.whole() if matrix.by_column else None
    for before in range(0, max(1, rows), reading.rows(width)):
        count = min(reading.rows(width), rows - before)
        part = (matrix.read(count) if everything is None else everything[before : before + count]).astype(np.float64)
        columns = {name: np.ascontiguousarray(part[:, names.index(name)]) for name in kept}
        if times is None:
            yield _numbered(reading, columns, before, count)
        else:
            moments = times.read(count)
            written = moments.astype(str).tolist() if reading.texts else ()
            yield Table(source.name, _npz_times(source, moments, before), columns, written)


def _npz_names(source: Source, arrays: dict[str, _Member], options: ReadOptions) -> list[str]:
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("objects are not read")
    _, width = arrays[_npz_array(source, arrays, options)].shape
    names = [str(name) for name in arrays["features"].whole().reshape(-1)] if "features" in arrays else [f"f{i}" for i in range(width)]
    if len(names) != width:
        raise TableError(f"{source.path}: `features` has {len(names)} names for {width} columns.")
    return names


def _npz_array(source: Source, arrays: dict[str, _Member], options: ReadOptions) -> str:
    flat = [name for name, array in arrays.items() if len(array.shape) == 2 and array.dtype.kind in "fiu"]
    wanted = options.array or ("train" if "train" in flat else flat[0] if len(flat) == 1 else None)
    if wanted not in flat or wanted is None:
        raise TableError(f"{source.path} has the numeric arrays with two axes {flat}: name one of them with --array.")
    return wanted


def _npz_times(source: Source, values: NDArray[Any], before: int) -> Float64:
    if values.dtype.kind == "M":
        seconds = values.astype("datetime64[us]").astype(np.float64) / 1e6
        return _checked_epoch(source, "timestamps", np.where(np.isnat(values), np.nan, seconds), before)
    return _checked_epoch(source, "timestamps", values.astype(np.float64), before)


# ── what all formats share ───────────────────────────────────────────────────────────────────────────────────────────


def _time_column(source: Source, names: list[str], options: ReadOptions) -> str | None:
    if options.timestamp is not None:
        if options.timestamp not in names:
            raise TableError(f"{source.path} has no column {options.timestamp!r}; it has {listed(names)}.")
        return options.timestamp
    by_name = {name.lower(): name for name in reversed(names) if not any(fits(name, pattern) for pattern in options.exclude)}
    found = next((by_name[name] for name in TIMESTAMP_COLUMNS if name in by_name), None)
    if found is None and options.timed:
        raise _untimed(source, names)
    return found


def _untimed(source: Source, names: list[str]) -> TableError:
    return TableError(f"{source.path} has no column of times by a name that is known: name it with --timestamp; it has {listed(names)}.")


def _coded_columns(reading: _Reading, names: list[str], wanted: Sequence[str] | None) -> tuple[str, dict[str, int]]:
    """The time column and the places of those wanted. Raises TableError where one is absent."""
    source = reading.source
    _refuse_twins(source, names)
    time = _time_column(source, names, reading.options)
    if time is None:
        raise _untimed(source, names)
    wanted = [name for name in names if name != time] if wanted is None else wanted
    absent = [name for name in wanted if name not in names]
    if absent:
        raise TableError(f"{source.path} has no column {', '.join(map(repr, absent))}; it has {listed(names)}.")
    return time, {name: names.index(name) for name in wanted}


def _refuse_twins(source: Source, names: list[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise TableError(f"{source.path} has more than one column {', '.join(map(repr, twice))}.")


def _kept_columns(names: list[str], time_column: str | None, options: ReadOptions, notify: Notify) -> list[str]:
    out = {name for name in names if any(fits(name, pattern) for pattern in options.exclude)}
    candidates = [name for name in names if name != time_column and name not in out]
    if options.only is not None:
        return [name for name in candidates if name in options.only]
    labels = [name for name in candidates if name.lower() in LABEL_COLUMNS]
    if labels:
        notify(f"Left out as labels: {', '.join(labels)}.")
    return [name for name in candidates if name not in labels]


def fits(name: str, pattern: str) -> bool:
    """Whether a column or tag is what `exclude` names."""
    return name == pattern or fnmatchcase(name, pattern)


def _numbered(reading: _Reading, columns: dict[str, Float64], before: int, rows: int) -> Table:
    """A table without times: its rows are a second apart, from 0 on."""
    if before == 0 and reading.source.path.suffix.lower() != ".npz":
        reading.notify(UNTIMED)
    written = [str(row) for row in range(before, before + rows)] if reading.texts else ()
    return Table(reading.source.name, np.arange(before, before + rows, dtype=np.float64), columns, written)


def _refuse_infinite(source: Source, column: str, values: Float64, before: int) -> None:
    infinite = np.isinf(values)
    if infinite.any():
        row = int(infinite.argmax())
        raise _infinite(source.path, column, before + row + 1, repr(float(values[row])))


def _infinite(path: Path, column: str, row: int, written: str) -> TableError:
    return TableError(f"{path}: column {column!r}, row {row}: {written} is not finite; leave the cell empty where a value is missing.")


def _refuse_unsorted(source: Source, timestamps: Float64, before: int) -> None:
    """`timestamps` of the row before these, -inf for none, and of these."""
    back = timestamps[1:] < timestamps[:-1]
    if back.any():
        row = int(back.argmax()) + 1
        how = "sort the file by time"
        if timestamps[row - 1] - timestamps[row] <= 3600:
            how += ", unless clocks were set back here: `python -m service split --zone Europe/Berlin` tells the two hours apart"
        raise Unsorted(
            f"{source.path}: row {before + row} has timestamp {_shown(timestamps[row])}, before row {before + row - 1}'s "
            f"{_shown(timestamps[row - 1])}: {how}."
        )


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat()
