"""Files of rows as tables: what is read, what is left out, and what is refused with the place named."""

from __future__ import annotations

import gzip
import sys
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from service.errors import TableError
from service.tables import (
    BATCH_CELLS,
    Dialect,
    Notify,
    ReadOptions,
    Source,
    Table,
    find_sources,
    once_each,
    read_batches,
    read_for,
    read_table,
    refuse_idle,
)

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC).timestamp()


DEFAULTS = ReadOptions()


def read_all(folder: Path, notify: Notify) -> list[Table]:
    once = once_each(notify)
    return [read_table(source, notify=once) for source in find_sources([folder])]


def read(path: Path, options: ReadOptions = DEFAULTS, told: list[str] | None = None) -> Table:
    return read_table(Source(path, path.name), options, (told if told is not None else []).append)


def csv_of(folder: Path, text: str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_is_read_with_its_separator(separator: str, tmp_path: Path) -> None:
    text = "time,load,heat\n2024-01-01 12:00:00,1.5,2\n2024-01-01T12:01:00Z,,nan\n".replace(",", separator)
    table = read(csv_of(tmp_path, text))
    assert table.timestamps.tolist() == [NOON, NOON + 60]
    assert list(table.columns) == ["load", "heat"]
    assert table.columns["load"][0] == 1.5
    assert np.isnan([table.columns["load"][1], table.columns["heat"][1]]).all()
    assert len(table) == 2


@pytest.mark.parametrize(
    ("cell", "seconds"),
    [
        ("1704110400", NOON),
        ("1704110400.25", NOON + 0.25),
        ("2024-01-01T12:00:00+00:00", NOON),
        ("2024-01-01T14:00:00+02:00", NOON),
        ("2024-01-01T12:00:00.500Z", NOON + 0.5),
        ("2024-01-01", NOON - 43_200),
    ],
)
def test_times_are_epoch_seconds_or_iso(cell: str, seconds: float, tmp_path: Path) -> None:
    assert read(csv_of(tmp_path, f"ts,v\n{cell},1\n")).timestamps.tolist() == [seconds]


def test_rows_without_a_time_column_count_seconds(tmp_path: Path) -> None:
    assert read(csv_of(tmp_path, "load\n5\n6\n7\n")).timestamps.tolist() == [0.0, 1.0, 2.0]


def test_a_file_without_a_header_gets_numbered_columns(tmp_path: Path) -> None:
    table = read(csv_of(tmp_path, "0.5,1\n0.6,2\n"))
    assert list(table.columns) == ["f0", "f1"]
    assert len(table) == 2


def test_the_time_column_can_be_named(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "when,v\n10,1\n20,2\n")
    assert read(path, ReadOptions(timestamp="when")).timestamps.tolist() == [10.0, 20.0]
    with pytest.raises(TableError, match="has no column 'then'; it has 'when', 'v'"):
        read(path, ReadOptions(timestamp="then"))


def test_labels_are_left_out_and_said_so(tmp_path: Path) -> None:
    told: list[str] = []
    table = read(csv_of(tmp_path, "datetime;v;Anomaly;changepoint\n2024-01-01;1;0;0\n"), told=told)
    assert list(table.columns) == ["v"]
    assert told == ["Left out as labels: Anomaly, changepoint."]


def test_the_only_column_stands_for_the_only_feature_and_one_of_several_does_not(tmp_path: Path) -> None:
    told: list[str] = []
    path = csv_of(tmp_path, "time,v\n1,7\n")
    assert read_for(Source(path, path.name), ["value"], DEFAULTS, told.append)[1].tolist() == [[7.0]]
    assert told == ["Column 'v' is taken for the model's only feature 'value'."]
    path = csv_of(tmp_path, "time,v,w\n1,7,8\n")
    with pytest.raises(TableError, match="has the columns 'v', 'w', the model the features 'value': none fits"):
        read_for(Source(path, path.name), ["value"], DEFAULTS, told.append)


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "time,a,b,host\n1,1,2,x\n")
    assert list(read(path, ReadOptions(exclude=frozenset({"host"}))).columns) == ["a", "b"]
    assert list(read(path, ReadOptions(only=frozenset({"b"}))).columns) == ["b"]


def test_a_column_of_times_that_is_left_out_counts_no_time(tmp_path: Path) -> None:
    """It had been taken for the time all the same."""
    path = csv_of(tmp_path, "time,ts,a\n5,7,1\n")
    assert read(path, ReadOptions(exclude=frozenset({"time"}))).timestamps.tolist() == [7.0]


def test_what_is_to_be_left_out_and_is_not_there_is_refused_before_rows_are_read(tmp_path: Path) -> None:
    """A misspelt column had been learned from, in silence."""
    csv_of(tmp_path, "time,load,pump.status\n1,wet,x\n", "a.csv")
    csv_of(tmp_path, "", "empty.csv")
    np.savez(tmp_path / "b.npz", train=np.zeros((2, 2)), features=np.array(["load", "heat"]))
    parquet.write_table(pa.table({"time": [1.0], "flow": [2.0]}), tmp_path / "c.parquet")
    sources = find_sources([tmp_path])
    refuse_idle(sources, ReadOptions(exclude=frozenset({"heat", "*.status", "flow", "time"}), array="train"))
    with pytest.raises(TableError, match=r"--exclude 'heet' fits no column; there are 'time', 'load', 'pump\.status', 'heat', 'flow'\.$"):
        refuse_idle(sources, ReadOptions(exclude=frozenset({"heet", "load"})))
    with pytest.raises(TableError, match=r"--array 'train' names an array of an npz file, and there is none"):
        refuse_idle(sources[:1], ReadOptions(array="train"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "time,a\n1,1\n2,wet\n",
            r"a\.csv: column 'a', row 2: 'wet' is not a number .*takes words among numbers for missing.*--exclude",
        ),
        *((f"time;a\n1;{cell}\n", "number alone, without its unit") for cell in ("€12.50", "99.5%", "12 kW", "-3,5 €", "EUR 1.20", "US$7")),
        *((f"time;a\n1;{cell}\n", "leave (it|the column) out with --exclude") for cell in ("1.2.3", "12ab", "AB12", "5 units")),
        ('time,a\n1,"1,094"\n', r"`python -m service split` reads it, with --decimal \. where its comma is between thousands"),
        ("time;a\n1;12,5\n", r"is it a decimal comma\?"),
        ("time,a\n1,inf\n", r"column 'a', row 1: .*inf.* is not finite; leave the cell empty"),
        ("time,a\n2024-01-01,1\nsoon,2\n", r"column 'time', row 2: 'soon' is neither an ISO 8601 time nor epoch seconds"),
        ("time,a\n1704110400000,1\n", r"column 'time', row 1: .* is not a time in epoch seconds"),
        ("time,a\n1,1\n2,2\n1,3\n", r"row 3 has timestamp .* before row 2's .*: sort the file by time"),
        ("time,a\n1,1\n2\n", r"row 2 has 1 cells, the header has 2"),
        ("time,a,a\n1,1,2\n", r"more than one column 'a'"),
        ("time\n1\n", r"no numeric column left"),
        ("time,a\n", r"has no rows"),
        ("", r"is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=message):
        read(csv_of(tmp_path, text))


LONG = BATCH_CELLS // 2 + 3
"""Rows of two columns: more than one batch."""


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        (LONG - 1, "{row},wet", r"column 'a', row {row}: 'wet' is not a number"),
        (LONG - 1, "{row},-inf", r"column 'a', row {row}: .*inf.* is not finite"),
        (LONG - 1, "soon,1", r"column 'time', row {row}: 'soon' is not a time in epoch seconds"),
        (LONG - 1, "2024-01-01,1", r"column 'time', row {row}: '2024-01-01' is not a time in epoch seconds"),
        (LONG - 1, "1e12,1", r"column 'time', row {row}: .* is not a time in epoch seconds"),
        (LONG - 1, "{row}", r"row {row} has 1 cells, the header has 2"),
        (LONG - 2, "5,1", r"row {row} has timestamp 1970-01-01T00:00:05\+00:00, before row {before}'s 1970-01-01T18:12:1"),
    ],
)
def test_the_place_of_what_is_refused_is_counted_from_the_first_row_of_a_long_file(
    row: int, line: str, message: str, tmp_path: Path
) -> None:
    lines = [f"{number},1" for number in range(1, LONG + 1)]
    lines[row - 1] = line.format(row=row)
    with pytest.raises(TableError, match=message.format(row=row, before=row - 1)):
        read(csv_of(tmp_path, "time,a\n" + "\n".join(lines)))


def test_the_batches_of_a_file_are_its_table_in_pieces(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "a,b\n" + "\n".join(f"{i},{i * i}" for i in range(10)))
    whole, batches = read(path), list(read_batches(Source(path, path.name), cells=6))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert np.concatenate([batch.timestamps for batch in batches]).tolist() == whole.timestamps.tolist()
    assert np.concatenate([batch.matrix(["a", "b"]) for batch in batches]).tolist() == whole.matrix(["a", "b"]).tolist()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_the_hour_that_a_clock_set_back_has_twice_is_told_apart_across_batches(tmp_path: Path, suffix: str, rows: int) -> None:
    times = ["2026-10-25 02:30:00", "2026-10-25 02:45:00", "2026-10-25 02:00:00", "2026-10-25 02:30:00", "2026-10-25 03:00:00"]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("time,a\n" + "".join(f"{time},1\n" for time in times))
    else:
        parquet.write_table(pa.table({"time": times, "a": [1.0] * 5}), path)
    batches = list(read_batches(Source(path, path.name), cells=2 * rows, dialect=Dialect(zone=ZoneInfo("Europe/Berlin"))))
    seconds = np.concatenate([batch.timestamps for batch in batches])
    assert np.diff(seconds).tolist() == [900, 900, 1800, 1800]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_times_in_milliseconds_are_read_where_the_caller_says_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("time,a\n1704110400000,1\n1704110400500,1\n")
    else:
        parquet.write_table(pa.table({"time": [1704110400000, 1704110400500], "a": [1.0, 1.0]}), path)
    [table] = read_batches(Source(path, path.name), dialect=Dialect(time_format="ms"))
    assert table.timestamps.tolist() == [NOON, NOON + 0.5]


def test_an_array_in_fortrans_order_is_read_as_any_other(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "a.npz", rows=np.asfortranarray(values))
    assert read(tmp_path / "a.npz").matrix(["f0", "f1"]).tolist() == values.tolist()


def test_a_long_file_is_one_table_with_its_times_as_written(tmp_path: Path) -> None:
    table = read(csv_of(tmp_path, "time,a\n" + "\n".join(f"{number},1" for number in range(LONG))))
    assert len(table) == len(table.written) == LONG
    assert table.written[-1] == str(LONG - 1)
    assert table.timestamps[-1] == LONG - 1


def test_rows_that_go_back_in_time_are_read_where_the_caller_asks_for_them(tmp_path: Path) -> None:
    path = csv_of(tmp_path, "time,a\n5,1\n4,2\n")
    assert read(path, ReadOptions(unsorted=True)).timestamps.tolist() == [5.0, 4.0]


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    moments = [datetime(2024, 1, 1, 12, tzinfo=UTC), datetime(2024, 1, 1, 12, 1, tzinfo=UTC)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"timestamp": moments, "load": [1.0, None], "count": [3, 4], "label": [0, 1]}), path)
    table = read(path)
    assert table.timestamps.tolist() == [NOON, NOON + 60]
    assert np.isnan(table.columns["load"][1])
    assert table.columns["count"].tolist() == [3.0, 4.0]
    assert list(table.columns) == ["load", "count"]


def test_true_is_1_and_false_0_as_in_a_payload(tmp_path: Path) -> None:
    """A valve of a table by pandas: `True` in its CSV, a column of booleans in its Parquet."""
    wanted = [1.0, 0.0, np.nan, 1.0]
    path = csv_of(tmp_path, "time,valve\n0,True\n60,False\n120,\n180,true\n")
    assert np.array_equal(read(path).columns["valve"], wanted, equal_nan=True)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"time": [0.0, 60.0, 120.0, 180.0], "valve": [True, False, None, True]}), path)
    assert np.array_equal(read(path).columns["valve"], wanted, equal_nan=True)


def test_times_of_parquet_in_nanoseconds_are_read_to_the_microsecond(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for zone in (None, "UTC"):
        times = pa.array([1_700_000_000_123_456_789, 1_700_000_001_000_000_001], pa.timestamp("ns", zone))
        parquet.write_table(pa.table({"timestamp": times, "load": [1.0, 2.0]}), path)
        assert read(path).timestamps.tolist() == [1_700_000_000.123456, 1_700_000_001.0]


def test_a_second_column_of_times_in_nanoseconds_is_refused_by_its_name(tmp_path: Path) -> None:
    """It was Arrow's "not safely convertible to microseconds", without file and column."""
    times = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    parquet.write_table(pa.table({"timestamp": times, "sent": times, "load": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(TableError, match=r"column 'sent', row 1: .*if it is the time, name it with --timestamp 'sent'; else leave"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("times", [pa.array([2**62], pa.timestamp("us")), pa.array([2**52], pa.timestamp("s"))])
def test_a_time_of_parquet_that_no_calendar_shows_is_refused_by_its_column(tmp_path: Path, times: pa.Array) -> None:
    parquet.write_table(pa.table({"timestamp": times, "load": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(TableError, match="column 'timestamp' holds a time that cannot be read"):
        read(tmp_path / "a.parquet")


def test_a_time_that_is_none_or_before_the_year_1_is_refused_by_its_row(tmp_path: Path) -> None:
    csv_of(tmp_path, "time,v\n-6e10,1\n-9e10,2\n", "a.csv")
    with pytest.raises(TableError, match=r"column 'time', row 2: .*-9.*is not a time"):
        read(tmp_path / "a.csv")
    np.savez(tmp_path / "a.npz", a=np.ones((2, 1)), timestamps=np.array(["2024-01-01", "NaT"], "datetime64[s]"))
    with pytest.raises(TableError, match=r"column 'timestamps', row 2: .*nan.*is not a time"):
        read(tmp_path / "a.npz")


def test_parquet_with_text_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"timestamp": [1.0, 2.0], "host": ["1", "x"]}), path)
    with pytest.raises(TableError, match=r"column 'host', row 2: 'x' is not a number"):
        read(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(TableError, match="is not a Parquet file"):
        read(path)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"timestamp": pa.array([], pa.float64()), "load": pa.array([], pa.float64())}), path)
    with pytest.raises(TableError, match="has no rows"):
        read(path)
    parquet.write_table(pa.table({"label": [1, 0]}), path)
    with pytest.raises(TableError, match="no numeric column left"):
        read(path)
    np.savez(tmp_path / "a.npz", a=np.ones((0, 2)))
    with pytest.raises(TableError, match="has no rows"):
        read(tmp_path / "a.npz")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as on a machine where it is not installed
    with pytest.raises(TableError, match=r"onset\[arrow\]"):
        read(tmp_path / "a.parquet")


def test_an_npz_gives_its_train_array(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, train=np.arange(6.0).reshape(3, 2), test=np.ones((4, 2)), test_label=np.zeros(4))
    assert read(path).columns["f1"].tolist() == [1.0, 3.0, 5.0]
    assert len(read(path, ReadOptions(array="test"))) == 4
    with pytest.raises(TableError, match=r"numeric arrays with two axes \['train', 'test'\]"):
        read(path, ReadOptions(array="other"))


def test_an_npz_may_carry_times_and_names(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    times = np.array(["2024-01-01T12:00", "2024-01-01T12:01"], "datetime64[s]")
    np.savez(path, rows=np.ones((2, 2), np.float32), timestamps=times, features=np.array(["load", "heat"]))
    table = read(path)
    assert table.timestamps.tolist() == [NOON, NOON + 60]
    assert list(table.columns) == ["load", "heat"]
    np.savez(path, a=np.ones((2, 2)), b=np.ones((2, 2)))
    with pytest.raises(TableError, match="name one of them with --array"):
        read(path)
    np.savez(path, a=np.ones((2, 2)), timestamps=np.arange(3.0))
    with pytest.raises(TableError, match=r"`timestamps` has shape \(3,\), the array has 2 rows"):
        read(path)


def test_an_npz_that_is_broken_or_holds_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, a=np.ones((50, 2)), names=np.array([{}], dtype=object))
    with pytest.raises(TableError, match="is not an npz of plain arrays"):
        read(path)
    np.savez(path, a=np.ones((50, 2)))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TableError, match="is not an npz of plain arrays"):
        read(path)


def test_folders_are_walked_and_named_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    csv_of(tmp_path / "site", "time,v,label\n1,1,0\n", "b.csv")
    csv_of(tmp_path, "time,v,label\n1,1,0\n", "a.csv")
    csv_of(tmp_path, "nothing to read", "readme.txt")
    told: list[str] = []
    tables = read_all(tmp_path, told.append)
    assert [table.name for table in tables] == ["a.csv", "site/b.csv"]
    assert len(told) == 1


def test_a_path_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no"):
        find_sources([tmp_path])
    with pytest.raises(TableError, match="does not exist"):
        find_sources([tmp_path / "none.csv"])
    with pytest.raises(TableError, match=r"is not one of \.csv"):
        read(csv_of(tmp_path, "x", "a.txt"))


def test_packed_files_are_told_to_be_unpacked(tmp_path: Path) -> None:
    """Of a folder of them it was said that there is nothing in it, of one called .csv that a Windows may have written it."""
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"time,v\n0,1\n"))
    with pytest.raises(TableError, match=r"holds no .* file\. Not read, .* 'a\.csv\.gz'\. Unpack them"):
        find_sources([tmp_path])
    with pytest.raises(TableError, match=r"a\.csv\.gz is not one of .*\. Unpack it"):
        read(tmp_path / "a.csv.gz")
    for begins in (gzip.compress(b"time,v\n0,1\n"), b"PK\x03\x04"):
        (tmp_path / "a.csv").write_bytes(begins)
        with pytest.raises(TableError, match=r"a\.csv is packed, or a spreadsheet"):
            read(tmp_path / "a.csv")


def test_a_date_whose_time_is_in_another_column_is_not_taken_for_midnight(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"name it with --timestamp 'Date', after writing the time of day into the same column"):
        read(csv_of(tmp_path, "Date,Time,v\n2026-01-01,00:01:00,1\n"))


def test_a_matrix_has_the_columns_in_the_asked_order(tmp_path: Path) -> None:
    table = read(csv_of(tmp_path, "time,a,b\n1,1,2\n"))
    assert table.matrix(["b", "a"]).tolist() == [[2.0, 1.0]]
    with pytest.raises(TableError, match=r"has no column 'c'; it has 'a', 'b'"):
        table.matrix(["c"])


def test_rows_that_are_numbered_for_want_of_times_are_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("Zeitstempel,t\n1789336800000,1\n1789336860000,2\n")
    assert [table.timestamps.tolist() for table in read_all(tmp_path, said.append)] == [[0.0, 1.0], [0.0, 1.0]]
    assert said == ["No column of times by a name that is known (--timestamp names it): rows are taken to be a second apart, from 1970 on."]
