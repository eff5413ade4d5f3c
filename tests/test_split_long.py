"""A historian's long table, a row for each reading, becomes the same files as a wide one."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import TableError
from service.long_tables import Long
from service.split import Done, split
from service.tables import Dialect, ReadOptions, Source, Table, read_table

BERLIN = ZoneInfo("Europe/Berlin")
GERMAN = ReadOptions("Zeit"), Dialect(",", "%d.%m.%Y %H:%M:%S", BERLIN)
TAG = Long(("tag",), ("value",))
PLAIN, ISO = ReadOptions(), Dialect()
Row = tuple[str, str, str]


def readings(minutes: int = 90) -> list[Row]:
    """Two machines of two sensors, one of which writes every second minute."""
    rows = []
    for minute, machine, sensor in itertools.product(range(minutes), ("M1", "M2"), ("a", "b")):
        if sensor == "a" or minute % 2 == 0:
            rows.append((f"2026-11-24T{minute // 60:02}:{minute % 60:02}:00", f"{machine}.{sensor}", f"{minute}.25"))
    return rows


def shuffled(rows: list[Row]) -> list[Row]:
    return random.Random(0).sample(rows, len(rows))


ORDERS: dict[str, Callable[[list[Row]], list[Row]]] = {
    "by time": lambda rows: rows,
    "by tag, then time": lambda rows: sorted(rows, key=lambda row: (row[1], row[0])),
    "newest first": lambda rows: rows[::-1],
    "in no order": shuffled,
}


def csv_of(rows: list[Row], path: Path, header: str = "time,tag,value") -> Path:
    path.write_text("\n".join([header, *map(",".join, rows)]) + "\n", encoding="utf-8")
    return path


def text(folder: Path, content: str, name: str = "plant.csv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def stream(folder: Path, name: str) -> Table:
    return read_table(Source(folder / f"{name}.csv", name))


def taken(
    path: Path | list[Path],
    out: Path,
    template: str = "{stream}.{feature}",
    long: Long = TAG,
    options: ReadOptions = PLAIN,
    dialect: Dialect = ISO,
) -> Done:
    return split(path if isinstance(path, list) else [path], out, template, options, dialect, long=long)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spilled", [1 << 22, 50])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_in_whatever_order_and_cut_a_long_table_gives_the_files_of_a_wide_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, spilled: int, suffix: str
) -> None:
    monkeypatch.setattr("service.long_tables.SPILL", spilled)
    monkeypatch.setattr("service.long_tables.CELLS", 3 * spilled)
    rows = readings()
    by_time = {time: {tag: value for _, tag, value in row} for time, row in itertools.groupby(rows, key=lambda row: row[0])}
    tags = ["M1.a", "M1.b", "M2.a", "M2.b"]
    wide = ["time," + ",".join(tags), *(",".join([time, *(said.get(tag, "") for tag in tags)]) for time, said in by_time.items())]
    split([text(tmp_path, "\n".join(wide), "wide.csv")], tmp_path / "wide", "{stream}.{feature}", ReadOptions())
    rows = ORDERS[order](rows)
    path = tmp_path / f"long.{suffix}"
    if suffix == "csv":
        csv_of(rows, path)
    else:
        times = pa.array([datetime.fromisoformat(time) for time, _, _ in rows], pa.timestamp("ns"))
        named = pa.array([tag for _, tag, _ in rows]).dictionary_encode()
        parquet.write_table(pa.table({"time": times, "tag": named, "value": [float(value) for _, _, value in rows]}), path)
    done = taken(path, tmp_path / "long")
    assert files(tmp_path / "long") == files(tmp_path / "wide")
    assert done.report() == [
        "2 streams, 180 rows from 2026-11-24T00:00:00Z to 2026-11-24T01:29:00Z, taken for UTC as they name no zone (--zone); "
        "features a stream: 2 (2 streams)."
    ]


def test_words_commas_zones_and_bad_quality_are_as_in_wide_tables(tmp_path: Path) -> None:
    path = text(
        tmp_path,
        "Zeit;tag;value;Güte\n"
        "24.11.2026 00:00:00;M1.Temp;60,5;Good\n"
        "24.11.2026 00:00:00;M1.Druck;Bad;Good\n"
        "24.11.2026 00:01:00;M1.Temp;99,9;Uncertain\n"
        "24.11.2026 00:01:00;M1.Druck;4,25;Good\n"
        "24.11.2026 00:02:00;M1.Temp;I/O Timeout;Bad\n"
        "24.11.2026 00:02:00;M1.läuft;True;Good\n"
        "24.11.2026 00:02:00;M1.status;ON;Good\n"
        "24.11.2026 00:02:00;Leitwarte;1;Good\n",
    )
    done = taken(path, tmp_path / "out", long=replace(TAG, quality="Güte", good=frozenset({"Good"})), options=GERMAN[0], dialect=GERMAN[1])
    table = stream(tmp_path / "out", "M1")
    assert list(table.columns) == ["Temp", "Druck", "läuft"]
    np.testing.assert_array_equal(
        table.matrix(["Temp", "Druck", "läuft"]), [[60.5, np.nan, np.nan], [np.nan, 4.25, np.nan], [np.nan] * 2 + [1]]
    )
    assert table.written[0] == "2026-11-23T23:00:00Z"
    assert done.report()[:5] == [
        "1 streams, 3 rows from 2026-11-23T23:00:00Z to 2026-11-23T23:02:00Z; features a stream: 3 (1 streams).",
        "Left out, words alone: M1.status ('ON').",
        "Words among numbers were taken for missing: M1.Druck (1).",
        "Of another quality ('Bad', 'Uncertain'), so taken for missing: M1.Temp (2).",
        "Left out, not of the form of --columns: Leitwarte.",
    ]


@pytest.mark.parametrize("long", [True, False])
def test_a_sensor_that_is_off_to_the_end_stays_a_feature_of_its_machine(tmp_path: Path, long: bool) -> None:
    rows = [
        (f"2026-11-24T00:0{i}:00", f"M{m}.{s}", "Bad" if (m, s) == (2, "b") else str(i)) for i in range(3) for m in (1, 2) for s in "ab"
    ]
    if long:
        done = taken(csv_of(rows, tmp_path / "t.csv"), tmp_path / "out")
    else:
        wide = "time,M1.a,M1.b,M2.a,M2.b\n" + "".join(f"2026-11-24T00:0{i}:00,{i},{i},{i},Bad\n" for i in range(3))
        done = split([text(tmp_path, wide)], tmp_path / "out", "{stream}.{feature}", ReadOptions())
    assert list(stream(tmp_path / "out", "M2").columns) == ["a", "b"]
    assert done.report() == [
        "2 streams, 6 rows from 2026-11-24T00:00:00Z to 2026-11-24T00:02:00Z, taken for UTC as they name no zone (--zone); "
        "features a stream: 2 (2 streams).",
        "Words among numbers were taken for missing: M2.b (3).",
    ]


def test_of_two_readings_at_one_time_the_later_row_wins_and_the_others_are_counted(tmp_path: Path) -> None:
    one = csv_of([("2026-11-24T00:00:00", "M.a", "1"), ("2026-11-24T00:00:00", "M.b", "5")], tmp_path / "1.csv")
    two = csv_of([("2026-11-24T00:00:00", "M.a", "2"), ("2026-11-24T00:00:00", "M.a", "3")], tmp_path / "2.csv")
    done = taken([one, two], tmp_path / "out")
    assert stream(tmp_path / "out", "M").matrix(["a", "b"]).tolist() == [[3.0, 5.0]]
    assert done.report()[1] == "More than one reading at the same time, of which the last row's was kept: M.a (2)."


def test_files_may_be_named_in_any_order_and_without_stream_each_is_one(tmp_path: Path) -> None:
    one = csv_of([("2026-11-24", "a", "1"), ("2026-11-24", "b", "2")], tmp_path / "M1.csv")
    two = csv_of([("2026-11-25", "b", "4"), ("2026-11-25", "a", "3")], tmp_path / "M2.csv")
    taken([two, one], tmp_path / "tags", "{stream}")
    assert stream(tmp_path / "tags", "a").columns["value"].tolist() == [1.0, 3.0]
    taken([two, one], tmp_path / "each", "{feature}")
    assert stream(tmp_path / "each", "M1").matrix(["a", "b"]).tolist() == [[1.0, 2.0]]
    assert stream(tmp_path / "each", "M2").matrix(["a", "b"]).tolist() == [[3.0, 4.0]]
    assert list(stream(tmp_path / "each", "M1").columns) == list(stream(tmp_path / "each", "M2").columns)


HOUR = ["01:30", "02:20", "02:50", "02:10", "02:40", "03:30"]  # of the 25th of October 2026 in Berlin: 02:10 is an hour later than it looks
UTC_OF = ["23:30", "00:20", "00:50", "01:10", "01:40", "02:30"]


@pytest.mark.parametrize("newest_first", [False, True])
def test_the_hour_that_a_clock_set_back_has_twice_is_told_apart_within_each_tag(tmp_path: Path, newest_first: bool) -> None:
    rows = [(f"2026-10-25T{hour}:00", tag, str(i)) for tag in ("a", "b") for i, hour in enumerate(HOUR)]
    done = taken(
        csv_of(rows[::-1] if newest_first else rows, tmp_path / "t.csv"), tmp_path / "out", "{stream}", dialect=Dialect(zone=BERLIN)
    )
    assert done.unclear == 0
    for tag in "ab":
        table = stream(tmp_path / "out", tag)
        assert [time[11:16] for time in table.written] == UTC_OF
        assert table.columns["value"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("by_tag", [False, True])
@pytest.mark.parametrize(
    ("twice", "utc"),
    [(("02:00", "02:00"), ("00:00", "01:00")), (("02:40", "02:10"), ("00:40", "01:10")), (("02:10", "02:40"), ("00:10", "00:40"))],
)
def test_two_readings_in_that_hour_are_told_apart_by_the_order_of_the_file(
    tmp_path: Path, newest_first: bool, by_tag: bool, twice: tuple[str, str], utc: tuple[str, str]
) -> None:
    hours = [f"2026-10-24T{hour:02}:00" for hour in range(24)] + [f"2026-10-25T{hour}" for hour in ("00:00", "01:00", *twice, "03:00")]
    rows = [(hour, tag, str(i)) for i, hour in enumerate(hours) for tag in "ab"]
    if by_tag:
        rows.sort(key=lambda row: row[1])
    taken(csv_of(rows[::-1] if newest_first else rows, tmp_path / "t.csv"), tmp_path / "out", "{stream}", dialect=Dialect(zone=BERLIN))
    for tag in "ab":
        table = stream(tmp_path / "out", tag)
        assert [time[11:16] for time in table.written[-5:]] == ["22:00", "23:00", *utc, "02:00"]
        assert table.columns["value"].tolist() == list(range(len(hours)))


def test_where_the_order_does_not_tell_the_hours_apart_it_is_said(tmp_path: Path) -> None:
    rows = [(f"2026-10-25T02:{minute}:00", "a", "1") for minute in ("10", "40", "20", "50", "30")]
    done = taken(csv_of(rows, tmp_path / "t.csv"), tmp_path / "out", "{stream}", dialect=Dialect(zone=BERLIN))
    assert "5 readings; the first" in done.report()[1]


def test_a_tag_of_several_columns_is_joined_and_tags_may_be_excluded(tmp_path: Path) -> None:
    rows = "time,machine,sensor,value\n2026-11-24,M1,a,1\n2026-11-24,M2,a,2\n2026-11-24,M1,b.setpoint,3\n2026-11-24,M2,7,4\n"
    done = taken(
        text(tmp_path, rows),
        tmp_path / "out",
        long=Long(("machine", "sensor"), ("value",)),
        options=ReadOptions(exclude=frozenset({"*.setpoint", "*.state"})),
    )
    assert "No tag is called '*.state' (--exclude); there are M1.a, M2.a, M2.7." in done.report()
    assert files(tmp_path / "out") == {
        "M1.csv": "timestamp,a\n2026-11-24T00:00:00Z,1.0\n",
        "M2.csv": "timestamp,a,7\n2026-11-24T00:00:00Z,2.0,4.0\n",
    }


def test_a_table_with_a_row_for_each_machine_and_instant_is_split_by_several_columns_of_readings(tmp_path: Path) -> None:
    rows = "".join(f"2026-11-24T00:0{i}:00,M{m},{i}.5,{m},Good\n" for i in range(6) for m in (1, 2))
    path = text(tmp_path, "time,machine,temp,flow,quality\n" + rows)
    with pytest.raises(TableError, match=r"--tag 'machine' --value 'temp' --value 'flow' --columns '\{stream\}.\{feature\}'"):
        split([path], tmp_path / "no", "{stream}", PLAIN)
    done = taken(path, tmp_path / "out", long=Long(("machine",), ("temp", "flow")))
    assert done.report() == [
        "2 streams, 12 rows from 2026-11-24T00:00:00Z to 2026-11-24T00:05:00Z, taken for UTC as they name no zone (--zone); "
        "features a stream: 2 (2 streams)."
    ]
    assert stream(tmp_path / "out", "M2").matrix(["temp", "flow"]).tolist() == [[i + 0.5, 2.0] for i in range(6)]


def test_the_annotated_csv_of_influxdb_is_read_with_its_headers_again_between(tmp_path: Path) -> None:
    notes = "#group,false,false,false,false,true,true\n#datatype,string,long,dateTime:RFC3339,double,string,string\n#default,_result,,,,,\n"
    header = ",result,table,_time,_value,_field,host\n"
    rows = ",,0,2026-11-24T00:00:00.123456789Z,1.5,temp,M1\n", ",,1,2026-11-24T00:00:01Z,2.5,temp,M2\n"
    path = text(tmp_path, notes + header + rows[0] + "\n" + notes + header + rows[1])
    taken(path, tmp_path / "out", long=Long(("host", "_field"), ("_value",)))
    assert files(tmp_path / "out") == {
        "M1.csv": "timestamp,temp\n2026-11-24T00:00:00.123456Z,1.5\n",
        "M2.csv": "timestamp,temp\n2026-11-24T00:00:01Z,2.5\n",
    }


@pytest.mark.parametrize("long", [True, False])
def test_times_in_milliseconds_are_read_and_without_the_option_it_is_named(tmp_path: Path, long: bool) -> None:
    path = text(tmp_path, "t_stamp,tag,value\n1790000000000,7,1\n1790000000500,7,2\n")
    options = ReadOptions(exclude=frozenset({"tag"} if not long else ()))
    asked = TAG if long else None
    with pytest.raises(TableError, match=r"row 1: .* --time-format ms"):
        split([path], tmp_path / "no", "{stream}", options, long=asked)
    split([path], tmp_path / "out", "{stream}", options, Dialect(time_format="ms"), long=asked)
    assert stream(tmp_path / "out", "7" if long else "value").written == ("2026-09-21T14:13:20Z", "2026-09-21T14:13:20.500000Z")


def test_sensors_written_at_instants_of_their_own_are_put_into_rows_by_intervals(tmp_path: Path) -> None:
    rows = [
        ("00:00:03", "M.a", "1"),
        ("00:00:58", "M.b", "2"),
        ("00:00:59", "M.b", "Bad"),
        ("00:01:00", "M.a", "3"),
        ("00:01:00.5", "M.a", "4"),
        ("00:01:20", "M.b", "Bad"),
    ]
    path = csv_of([(f"2026-11-24T{time}", tag, value) for time, tag, value in rows], tmp_path / "t.csv")
    done = taken(path, tmp_path / "all")
    assert "--every SECONDS" not in done.report()[-1]  # half of the cells have one
    taken(path, tmp_path / "out", long=replace(TAG, every=60))
    assert files(tmp_path / "out")["M.csv"] == "timestamp,a,b\n2026-11-24T00:01:00Z,3.0,2.0\n2026-11-24T00:02:00Z,4.0,\n"
    lone = csv_of([(f"2026-11-24T00:00:0{i}", f"M.{tag}", "1") for i, tag in enumerate("abcd")], tmp_path / "lone.csv")
    assert "--every SECONDS" in taken(lone, tmp_path / "lone").report()[-1]
    assert "--hold SECONDS" in taken(lone, tmp_path / "each", long=replace(TAG, every=1)).report()[-1]


@pytest.mark.parametrize("piece", [3, 1 << 22])
def test_a_reading_stands_until_the_next_one_or_for_as_long_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("service.long_tables.SPILL", piece)
    rows = [
        ("00:00:30", "M.a", "1"),
        ("00:00:40", "M.b", "5"),
        ("00:03:00", "M.b", "6"),
        ("00:03:30", "M.a", "7"),
        ("00:03:40", "M.a", "Bad"),
        ("00:20:00", "M.a", "2"),
        ("00:20:10", "M.b", "8"),
    ]
    path = csv_of([(f"2026-11-24T{time}", tag, value) for time, tag, value in rows], tmp_path / "t.csv")
    taken(path, tmp_path / "out", long=replace(TAG, every=60, hold=240))
    assert files(tmp_path / "out")["M.csv"].splitlines() == [
        "timestamp,a,b",
        "2026-11-24T00:01:00Z,1.0,5.0",
        "2026-11-24T00:02:00Z,1.0,5.0",
        "2026-11-24T00:03:00Z,1.0,6.0",
        "2026-11-24T00:04:00Z,,6.0",
        "2026-11-24T00:05:00Z,,6.0",
        "2026-11-24T00:06:00Z,,6.0",
        "2026-11-24T00:07:00Z,,6.0",
        "2026-11-24T00:20:00Z,2.0,",
        "2026-11-24T00:21:00Z,2.0,8.0",
    ]


@pytest.mark.parametrize("piece", [7, 50, 1 << 22])
def test_what_stands_is_the_last_reading_however_the_table_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("service.long_tables.SPILL", piece)
    chance = np.random.default_rng(3)
    known: dict[str, dict[int, float]] = {tag: {} for tag in "abc"}
    for minute in np.cumsum(chance.geometric(0.3, 200)).tolist():
        known[str(chance.choice(list("abc")))][minute] = math.nan if chance.random() < 0.1 else float(minute % 7)
    first, last = min(min(of) for of in known.values()), max(max(of) for of in known.values())
    lines = ["time,tag,value"]
    lines += [f"{60 * minute},M.{tag},{'Bad' if math.isnan(x) else x}" for tag, of in known.items() for minute, x in of.items()]
    taken(text(tmp_path, "\n".join(lines)), tmp_path / "out", long=replace(TAG, every=60, hold=1200))

    def standing(tag: str, minute: int) -> float:
        before = [at for at in known[tag] if minute - 20 <= at <= minute]
        return known[tag][max(before)] if before else math.nan

    wanted = {60.0 * minute: [standing(tag, minute) for tag in "abc"] for minute in range(first, last + 1)}
    wanted = {at: row for at, row in wanted.items() if not all(map(math.isnan, row))}
    found = stream(tmp_path / "out", "M")
    assert found.timestamps.tolist() == list(wanted)
    np.testing.assert_array_equal(found.matrix(["a", "b", "c"]), np.array(list(wanted.values())))


def test_streams_that_lack_what_the_others_have_are_named(tmp_path: Path) -> None:
    rows = [("2026-11-24", f"M{i}.{sensor}", "1") for i in range(3) for sensor in "ab" if (i, sensor) != (1, "b")]
    assert taken(csv_of(rows, tmp_path / "t.csv"), tmp_path / "out").report()[-1] == "Without features that 2 streams have: M1 (b)."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("time,tag,value\n2026-11-24,a,1\nyesterday,a,2\n", "column 'time', row 2: 'yesterday' is neither"),
        ("time,tag,value\n2026-11-24,a,1\n2026-11-24,a,inf\n", "column 'value', row 2: 'inf' is not finite"),
        ("time,name,value\n2026-11-24,a,1\n", "has no column 'tag'; it has 'time', 'name', 'value'"),
        ("when,tag,value\n2026-11-24,a,1\n", "name it with --timestamp; it has 'when', 'tag', 'value'"),
        ("time,tag,value\n2026-11-24,a,1\n2026-11-24,a\n", "row 2 has 2 cells, the header has 3"),
        ("time,tag,value\n2026-11-24,../a,1\n", "'../a' names the stream '../a', which cannot be the name of a file"),
        ("time,tag,value\n", "has no rows"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_column_and_row(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(TableError) as refused:
        taken(text(tmp_path, content), tmp_path / "out", "{stream}")
    assert said in refused.value.detail
    assert "plant.csv" in refused.value.detail


def test_tags_of_another_form_than_asked_are_shown(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"No tag is of the form .* there are M1\.a, M1\.b, M2\.a, M2\.b"):
        taken(csv_of(readings(), tmp_path / "t.csv"), tmp_path / "out", "{stream}/{feature}")


@pytest.mark.parametrize("order", ["by time", "by tag, then time", "newest first", "in no order"])
def test_a_long_table_that_is_split_as_a_wide_one_is_refused_with_the_options_that_split_it(tmp_path: Path, order: str) -> None:
    path = csv_of([(*row, "192") for row in ORDERS[order](readings())], tmp_path / "t.csv", "time,sensor,value,quality")  # type: ignore[misc]
    with pytest.raises(TableError, match="--tag 'sensor' --value 'value'"):
        split([path], tmp_path / "out", "{stream}", ReadOptions())
    assert not (tmp_path / "out").exists()


def test_a_status_beside_one_sensor_is_no_long_table_but_one_of_changes_is_asked_about(tmp_path: Path) -> None:
    rows = [(f"2026-11-24T00:{i:02}:00", "ok" if i % 3 else "warn", str(i)) for i in range(60)]
    done = split([csv_of(rows, tmp_path / "t.csv", "time,status,temp")], tmp_path / "out", "{stream}", ReadOptions())
    assert done.report()[-1] == (
        "If column 'status' of t.csv names the sensor of each row, split it with --tag 'status' --value 'temp' instead."
    )
    done = split(
        [csv_of([(t, "ok", v) for t, _, v in rows], tmp_path / "o.csv", "time,status,temp")], tmp_path / "one", "{stream}", ReadOptions()
    )
    assert len(done.report()) == 2


def test_a_table_larger_than_what_is_held_takes_no_more_memory_than_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.long_tables.SPILL", 1 << 12)
    monkeypatch.setattr("service.long_tables.CELLS", 1 << 12)

    def peak(rows: int) -> int:
        times = [f"2026-11-{1 + i // 86400:02}T{i // 3600 % 24:02}:{i // 60 % 60:02}:{i % 60:02}" for i in range(rows // 32)]
        path = csv_of([(time, tag, "1.5") for time in times for tag in (f"M.{i}" for i in range(32))], tmp_path / f"{rows}.csv")
        del times
        tracemalloc.start()
        taken(path, tmp_path / str(rows))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    small = peak(10_000)
    assert peak(60_000) < 1.5 * small + (1 << 20)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--tag", "tag", "--value", "value", "--good", "quality=Good"], 0, "2 streams, 2 rows"),
        (["--tag", "tag", "--value", "value", "--good", "quality"], 2, "--good 'quality' is not COLUMN=WORD"),
        (["--tag", "tag", "--value", "value", "--good", "quality=Good", "--good", "q=x"], 2, "of one column"),
        (["--good", "quality=Good"], 2, "--good and --every are for a table with a row for each reading"),
        (["--tag", "tag"], 2, "Give both: --tag COLUMN"),
        (["--tag", "tag", "--value", "value", "--every", "60"], 0, "2 streams, 2 rows"),
        (["--tag", "tag", "--value", "value", "--every", "60", "--hold", "600"], 0, "2 streams, 2 rows"),
        (["--tag", "tag", "--value", "value"], 0, "2026-11-24T00:00:00Z, taken for UTC as they name no zone (--zone); features"),
        (["--tag", "tag", "--value", "value", "--zone", "UTC"], 0, "to 2026-11-24T00:00:00Z; features"),
        (["--tag", "tag", "--value", "value", "--hold", "600"], 2, "--hold SECONDS is how long a reading stands"),
        (["--tag", "tag", "--value", "value", "--every", "60", "--hold", "6"], 2, "give both, --hold the larger"),
    ],
)
def test_the_command_takes_a_long_table(tmp_path: Path, options: list[str], status: int, said: str) -> None:
    path = text(tmp_path, "time,tag,value,quality\n2026-11-24,a,1,Good\n2026-11-24,b,2,Good\n")
    done = CliRunner().invoke(app, ["split", str(path), "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == status, done.output
    assert said in done.output


def coded(i: int) -> dict[str, str]:
    """Four tags: a code far off, numbers that go through one, another code far off, one that is near."""
    far, near = ("65535", "65535") if i == 50 else ("1.5", str(65000 + i * 20))
    return {"M1.a": "-9999" if i % 20 == 7 else f"{i}.5", "M1.b": str(990 + i), "M2.a": far, "M2.b": near}


CODES = [(f"2026-11-24T00:{i:02}:00", tag, value) for i in range(60) for tag, value in coded(i).items()]


@pytest.mark.parametrize("long", [True, False])
def test_numbers_that_stand_for_no_reading_are_named_and_may_be_taken_for_missing(tmp_path: Path, long: bool) -> None:
    path = csv_of(CODES, tmp_path / "t.csv")
    if not long:
        lines = [",".join([time, *(value for _, _, value in rows)]) for time, rows in itertools.groupby(CODES, key=lambda row: row[0])]
        path = text(tmp_path, "\n".join(["time,M1.a,M1.b,M2.a,M2.b", *lines]))
    shape, template = TAG if long else None, "{stream}.{feature}"
    done = split([path], tmp_path / "out", template, PLAIN, long=shape)
    assert done.report()[1:] == [
        "Far from all other readings, as devices write them that have none: -9999 in M1.a (3, 5 %); 65535 in M2.a (1, 1.7 %). "
        "--missing -9999 --missing 65535 takes them for missing."
    ]
    done = split([path], tmp_path / "clean", template, PLAIN, replace(ISO, missing=frozenset({-9999.0, 65535.0})), long=shape)
    assert done.report()[1:] == ["Numbers of --missing were taken for missing: M1.a (3), M2.a (1), M2.b (1)."]
    assert np.isnan(stream(tmp_path / "clean", "M1").columns["a"]).sum() == 3


@pytest.mark.parametrize("long", [True, False])
def test_decimal_commas_that_nobody_announced_are_said_and_a_table_of_them_alone_is_refused(tmp_path: Path, long: bool) -> None:
    shape = TAG if long else None
    some = [("2026-11-24T00:00:00", "M.a", "21"), ("2026-11-24T00:01:00", "M.a", "21,5"), ("2026-11-24T00:02:00", "M.a", "1.021,75")]
    head, rows = (
        ("time;tag;value", [";".join(row) for row in some]) if long else ("time;M.a", [f"{time};{value}" for time, _, value in some])
    )
    done = split([text(tmp_path, "\n".join([head, *rows]))], tmp_path / "out", "{stream}.{feature}", PLAIN, long=shape)
    assert done.report()[-1] == "'21,5' in M.a has a decimal comma: --decimal , reads it."
    with pytest.raises(TableError, match=r"no number.*'21,5' in M\.a has a decimal comma: --decimal , reads it"):
        split([text(tmp_path, "\n".join([head, *rows[1:]]), "c.csv")], tmp_path / "no", "{stream}.{feature}", PLAIN, long=shape)
