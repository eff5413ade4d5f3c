"""Files of rows → `Table`: what training, backtest and replay read. CSV (`,` `;` or tab), Parquet (extra `arrow`) and npz.

    folder ── walked ──► Source(path, name) ── read_table ──► Table(name, timestamps, columns)

One file is one stream. Columns of labels are left out by name and said so; every other column must be numeric.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import TableError

Float64 = NDArray[np.float64]
Notify = Callable[[str], None]

SUFFIXES = (".csv", ".tsv", ".parquet", ".npz")
TIMESTAMP_COLUMNS = ("timestamp", "time", "datetime", "date_time", "date", "ts", "@timestamp", "epoch")
LABEL_COLUMNS = frozenset(
    {"anomaly", "anomalies", "is_anomaly", "anomaly_label", "label", "labels", "is_label", "ground_truth", "changepoint", "change_point"}
)
MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "-"})
LATEST_EPOCH = 1e11
"""Seconds; more (the year 5138) means that the column counts milliseconds or less."""


class NoColumns(TableError):
    """Every column of a file is left out."""


@dataclass(frozen=True)
class Table:
    """One stream's rows, in the order of time."""

    name: str  # path relative to the folder that was given, with `/`
    timestamps: Float64  # [T] epoch seconds UTC, never decreasing unless ReadOptions.unsorted
    columns: dict[str, Float64]  # feature → [T], NaN = missing
    written: Sequence[str]  # [T] the timestamps as the file writes them

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


@dataclass(frozen=True)
class ReadOptions:
    """What the user says of the columns; all optional."""

    timestamp: str | None = None  # name of the timestamp column
    exclude: frozenset[str] = frozenset()  # columns to leave out
    only: frozenset[str] | None = None  # columns to read, all others are left out
    unsorted: bool = False  # True: rows that go back in time are the caller's business (the service calls them late)
    array: str | None = None  # array of an npz to read; default: `train`, or the only one with two axes


def find_sources(paths: Iterable[Path]) -> list[Source]:
    """The files that `paths` name, folders walked recursively. Raises TableError when a path holds none."""
    sources: list[Source] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            sources += [Source(file, file.relative_to(path).as_posix()) for file in files]
            if not files:
                raise TableError(f"{path} holds no {', '.join(SUFFIXES)} file.")
        elif path.is_file():
            sources.append(Source(path, path.name))
        else:
            raise TableError(f"{path} does not exist.")
    return sources


def read_tables(paths: Iterable[Path], options: ReadOptions = ReadOptions(), notify: Notify = print) -> Iterator[Table]:
    """All tables under `paths`, one at a time. `notify` gets one sentence per set of columns left out."""
    told: set[str] = set()

    def once(message: str) -> None:
        if message not in told:
            told.add(message)
            notify(message)

    for source in find_sources(paths):
        yield read_table(source, options, once)


def read_table(source: Source, options: ReadOptions = ReadOptions(), notify: Notify = print) -> Table:
    """One file. Raises TableError that names file, column, row (the first after the header is 1) and value."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".npz": _read_npz}
    suffix = source.path.suffix.lower()
    if suffix not in readers:
        raise TableError(f"{source.path} is not one of {', '.join(SUFFIXES)}.")
    try:
        table = readers[suffix](source, options, notify)
    except OSError as error:
        raise TableError(f"{source.path} cannot be read: {error}.") from error
    if not table.columns:
        raise NoColumns(f"{source.path} has no numeric column left to read.")
    if len(table) == 0:
        raise TableError(f"{source.path} has no rows.")
    for column, values in table.columns.items():
        _refuse_infinite(source, column, values)
    if not options.unsorted:
        _refuse_unsorted(source, table.timestamps)
    return table


def read_for(
    source: Source, features: Sequence[str], options: ReadOptions = ReadOptions(), notify: Notify = print
) -> tuple[Table, Float64]:
    """One file for a model of F features: its table, and [T, F] in the model's order, NaN where the file has no such column.

    The only column of a file stands for the only feature of a model, whatever its name. Raises TableError when nothing fits.
    """
    try:
        table = read_table(source, replace(options, only=frozenset(features)), notify)
    except NoColumns:
        table = read_table(source, options, notify)
        if len(features) != 1 or len(table.columns) != 1:
            raise TableError(
                f"{source.path} has the columns {_listed(table.columns)}, the model the features {_listed(features)}: none fits. "
                "Rename the columns, or take a model that was trained on such files (python -m training fit --data ...)."
            ) from None
        name, values = next(iter(table.columns.items()))
        notify(f"Column '{name}' is taken for the model's only feature '{features[0]}'.")
        return table, values[:, None]
    absent = [feature for feature in features if feature not in table.columns]
    if absent:
        notify(f"{source.path} lacks {_listed(absent)}: missing in every event.")
    missing = np.full(len(table), np.nan)
    return table, np.stack([table.columns.get(feature, missing) for feature in features], axis=1)


def _listed(names: Iterable[str]) -> str:
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


# ── CSV ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_csv(source: Source, options: ReadOptions, notify: Notify) -> Table:
    with source.path.open(newline="", encoding="utf-8-sig") as file:
        try:
            separator = _separator(file.readline())
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=separator) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise TableError(f"{source.path} is not a text table: {error}.") from error
    if not rows:
        raise TableError(f"{source.path} is empty.")
    header = _header(rows)
    body = rows[1:] if header is rows[0] else rows
    _refuse_ragged(source, body, len(header))
    names = [name.strip() for name in header]
    _refuse_twins(source, names)
    cells: dict[str, Sequence[str]] = dict(zip(names, zip(*body, strict=True) if body else [()] * len(names), strict=True))
    time_column = _time_column(source, list(cells), options)
    kept = _kept_columns(source, list(cells), time_column, options, notify)
    columns = {name: _numbers(source, name, cells[name]) for name in kept}
    if time_column is None:
        return _numbered(source, columns, len(body))
    return Table(source.name, _times(source, time_column, cells[time_column]), columns, cells[time_column])


def _separator(line: str) -> str:
    return max(",;\t", key=line.count)


def _header(rows: list[list[str]]) -> list[str]:
    """The first row, or f0, f1, ... when that row is already numbers."""
    if all(_is_number(cell) for cell in rows[0]):
        return [f"f{i}" for i in range(len(rows[0]))]
    return rows[0]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_ragged(source: Source, body: list[list[str]], width: int) -> None:
    for number, row in enumerate(body, 1):
        if len(row) != width:
            raise TableError(f"{source.path}: row {number} has {len(row)} cells, the header has {width}.")


def _numbers(source: Source, column: str, cells: Sequence[str]) -> Float64:
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        return np.array([_number(source, column, number, cell) for number, cell in enumerate(cells, 1)])


def _number(source: Source, column: str, number: int, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        if cell.strip().lower() in MISSING:
            return math.nan
        raise TableError(
            f"{source.path}: column {column!r}, row {number}: {cell!r} is not a number (leave the column out with --exclude {column!r})."
        ) from None


def _times(source: Source, column: str, cells: Sequence[str]) -> Float64:
    try:
        seconds = np.array(cells, dtype=np.float64)
    except ValueError:
        return np.array([_time(source, column, number, cell) for number, cell in enumerate(cells, 1)])
    return _checked_epoch(source, column, seconds)


def _time(source: Source, column: str, number: int, cell: str) -> float:
    try:
        moment = datetime.fromisoformat(cell.strip())
    except ValueError:
        raise TableError(
            f"{source.path}: column {column!r}, row {number}: {cell!r} is neither an ISO 8601 time nor epoch seconds "
            "(name the time column with --timestamp)."
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _checked_epoch(source: Source, column: str, seconds: Float64) -> Float64:
    bad = ~(np.abs(seconds) < LATEST_EPOCH)  # true for NaN too
    if bad.any():
        row = int(bad.argmax())
        raise TableError(f"{source.path}: column {column!r}, row {row + 1}: {seconds[row]!r} is not a time in epoch seconds.")
    return seconds


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_parquet(source: Source, options: ReadOptions, notify: Notify) -> Table:
    try:
        import pyarrow as pa  # noqa: PLC0415  optional: extra `arrow`
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise TableError(f"{source.path}: reading Parquet needs the extra 'arrow': pip install 'onset[arrow]'.") from error
    try:
        content = parquet.read_table(source.path)
    except pa.ArrowException as error:
        raise TableError(f"{source.path} is not a Parquet file: {error}.") from error
    names = content.column_names
    _refuse_twins(source, names)
    time_column = _time_column(source, names, options)
    kept = _kept_columns(source, names, time_column, options, notify)
    columns = {name: _arrow_numbers(source, name, content.column(name).to_pylist()) for name in kept}
    if time_column is None:
        return _numbered(source, columns, content.num_rows)
    times = content.column(time_column).to_pylist()
    return Table(source.name, _arrow_times(source, time_column, times), columns, [_text(time) for time in times])


def _arrow_numbers(source: Source, column: str, values: list[object]) -> Float64:
    return np.array([math.nan if value is None else _number(source, column, i, str(value)) for i, value in enumerate(values, 1)])


def _arrow_times(source: Source, column: str, values: list[object]) -> Float64:
    if values and isinstance(values[0], int | float):
        return _checked_epoch(source, column, np.array([math.nan if value is None else value for value in values], dtype=np.float64))
    return np.array([_time(source, column, number, _text(value)) for number, value in enumerate(values, 1)])


def _text(time: object) -> str:
    return time.isoformat() if isinstance(time, datetime) else str(time)


# ── npz ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_npz(source: Source, options: ReadOptions, notify: Notify) -> Table:
    try:
        with np.load(source.path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        raise TableError(f"{source.path} is not an npz of plain arrays: {error}.") from error
    matrix = arrays[_npz_array(source, arrays, options)].astype(np.float64)
    names = [str(name) for name in arrays["features"]] if "features" in arrays else [f"f{i}" for i in range(matrix.shape[1])]
    if len(names) != matrix.shape[1]:
        raise TableError(f"{source.path}: `features` has {len(names)} names for {matrix.shape[1]} columns.")
    _refuse_twins(source, names)
    kept = _kept_columns(source, names, None, options, notify)
    columns = {name: np.ascontiguousarray(matrix[:, names.index(name)]) for name in kept}
    if "timestamps" not in arrays:
        return _numbered(source, columns, len(matrix))
    return Table(source.name, _npz_times(source, arrays, len(matrix)), columns, arrays["timestamps"].astype(str).tolist())


def _npz_array(source: Source, arrays: dict[str, NDArray[np.generic]], options: ReadOptions) -> str:
    flat = [name for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "fiu"]
    wanted = options.array or ("train" if "train" in flat else flat[0] if len(flat) == 1 else None)
    if wanted not in flat or wanted is None:
        raise TableError(f"{source.path} has the numeric arrays with two axes {flat}: name one of them with --array.")
    return wanted


def _npz_times(source: Source, arrays: dict[str, NDArray[np.generic]], rows: int) -> Float64:
    values = arrays["timestamps"]
    if values.shape != (rows,):
        raise TableError(f"{source.path}: `timestamps` has shape {values.shape}, the array has {rows} rows.")
    if values.dtype.kind == "M":
        return values.astype("datetime64[us]").astype(np.float64) / 1e6
    return _checked_epoch(source, "timestamps", values.astype(np.float64))


# ── what all formats share ───────────────────────────────────────────────────────────────────────────────────────────


def _time_column(source: Source, names: list[str], options: ReadOptions) -> str | None:
    if options.timestamp is not None:
        if options.timestamp not in names:
            raise TableError(f"{source.path} has no column {options.timestamp!r}; it has {', '.join(map(repr, names))}.")
        return options.timestamp
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[name] for name in TIMESTAMP_COLUMNS if name in by_name), None)


def _refuse_twins(source: Source, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableError(f"{source.path} has more than one column {', '.join(map(repr, twice))}.")


def _kept_columns(source: Source, names: list[str], time_column: str | None, options: ReadOptions, notify: Notify) -> list[str]:
    candidates = [name for name in names if name != time_column and name not in options.exclude]
    if options.only is not None:
        return [name for name in candidates if name in options.only]
    labels = [name for name in candidates if name.lower() in LABEL_COLUMNS]
    if labels:
        notify(f"Left out as labels: {', '.join(labels)}.")
    return [name for name in candidates if name not in labels]


def _numbered(source: Source, columns: dict[str, Float64], rows: int) -> Table:
    """A table without times: its rows are a second apart, from 0 on."""
    return Table(source.name, np.arange(rows, dtype=np.float64), columns, [str(row) for row in range(rows)])


def _refuse_infinite(source: Source, column: str, values: Float64) -> None:
    infinite = np.isinf(values)
    if infinite.any():
        row = int(infinite.argmax())
        raise TableError(f"{source.path}: column {column!r}, row {row + 1}: {values[row]!r} is not finite.")


def _refuse_unsorted(source: Source, timestamps: Float64) -> None:
    back = np.diff(timestamps) < 0
    if back.any():
        row = int(back.argmax()) + 2
        raise TableError(
            f"{source.path}: row {row} has timestamp {_shown(timestamps[row - 1])}, before row {row - 1}'s {_shown(timestamps[row - 2])}: "
            "sort the file by time."
        )


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat()
