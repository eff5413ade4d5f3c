"""A plant's wide table becomes a file for each stream, which is read as any other."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import TableError
from service.long_tables import Long
from service.split import split
from service.tables import Dialect, ReadOptions, Source, Table, read_table

BERLIN = ZoneInfo("Europe/Berlin")
WIDE = """Zeit;M1.Temp;M1.Druck;M1.status;M2.Temp;M2.Druck;note
24.11.2026 00:00:00;60,5;4,25;ok;61,0;Bad;x
24.11.2026 00:01:00;60,6;;ok;;;x
24.11.2026 00:02:00;60,7;4,27;ok;61,2;4,1;x
"""
GERMAN = ReadOptions("Zeit"), Dialect(",", "%d.%m.%Y %H:%M:%S", BERLIN)


def written(folder: Path, text: str, name: str = "plant.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def stream(folder: Path, name: str) -> Table:
    return read_table(Source(folder / f"{name}.csv", name))


def test_columns_of_a_machine_become_one_file_with_words_left_out_or_missing(tmp_path: Path) -> None:
    done = split([written(tmp_path, WIDE)], tmp_path / "out", "{stream}.{feature}", *GERMAN)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["M1.csv", "M2.csv"]
    one, two = stream(tmp_path / "out", "M1"), stream(tmp_path / "out", "M2")
    assert one.columns["Temp"].tolist() == [60.5, 60.6, 60.7]
    assert [math.isnan(value) for value in one.columns["Druck"]] == [False, True, False]
    assert one.written[0] == "2026-11-23T23:00:00Z"
    assert list(one.columns) == ["Temp", "Druck"]
    assert len(two) == 2  # of the minute in which it said nothing there is no row
    assert math.isnan(two.columns["Druck"][0])
    assert done.report() == [
        "2 streams, 5 rows from 2026-11-23T23:00:00Z to 2026-11-23T23:02:00Z; features a stream: 2 (2 streams).",
        "Left out, words alone: M1.status ('ok'), note ('x').",
        "Words among numbers were taken for missing: M2.Druck (1).",
    ]


@pytest.mark.parametrize("cells", [8, 1 << 22])
def test_a_sensor_that_was_off_at_first_is_none_of_words_alone_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: int
) -> None:
    monkeypatch.setattr("service.split.CELLS", cells)
    rows = "".join(f"2026-11-24T00:{i:02}:00,{i},{'Bad' if i < 30 else i},ok\n" for i in range(60))
    done = split([written(tmp_path, "time,M.a,M.late,M.status\n" + rows)], tmp_path / "out", "{stream}.{feature}", ReadOptions())
    late = stream(tmp_path / "out", "M").columns["late"].tolist()
    assert late[30:] == list(range(30, 60))
    assert all(map(math.isnan, late[:30]))
    assert (done.words, dict(done.missing)) == ({"M.status": "ok"}, {"M.late": 30})


def test_each_column_is_a_stream_of_the_shipped_detector_and_one_without_numbers_has_no_file(tmp_path: Path) -> None:
    text = "time,a/t1,a/t2,dead\n2026-11-24T00:00:00,1,2,\n2026-11-24T00:01:00,,3,\n"
    done = split([written(tmp_path, text)], tmp_path / "out", "{stream}", ReadOptions())
    assert stream(tmp_path / "out", "a/t1").columns["value"].tolist() == [1.0]
    assert stream(tmp_path / "out", "a/t2").columns["value"].tolist() == [2.0, 3.0]
    assert done.report()[1] == "Without a single number, so without a file: dead."


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    moments = pa.array([1_790_000_000, 1_790_000_060], pa.timestamp("s"))
    table = pa.table({"time": moments, "M1.a": [1.0, 2.0], "M1.b": [3, None], "M1.status": ["ok", "ok"]})
    parquet.write_table(table, tmp_path / "plant.parquet")
    split([tmp_path / "plant.parquet"], tmp_path / "one", "{stream}.{feature}", ReadOptions(), Dialect(zone=BERLIN))
    text = "time,M1.a,M1.b,M1.status\n2026-09-21T14:13:20,1,3,ok\n2026-09-21T14:14:20,2,,ok\n"
    split([written(tmp_path, text)], tmp_path / "two", "{stream}.{feature}", ReadOptions(), Dialect(zone=BERLIN))
    assert (tmp_path / "one/M1.csv").read_text() == (tmp_path / "two/M1.csv").read_text()


def test_the_hour_that_a_clock_set_back_has_twice_stays_in_order(tmp_path: Path) -> None:
    hours = ["2026-10-25T01:30:00", "2026-10-25T02:30:00", "2026-10-25T02:30:00", "2026-10-25T03:30:00"]
    text = "time,a\n" + "".join(f"{hour},{i}\n" for i, hour in enumerate(hours))
    split([written(tmp_path, text)], tmp_path / "same", "{stream}", ReadOptions(), Dialect(zone=BERLIN))
    utc = ["2026-10-24T23:30:00Z", "2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z"]
    assert list(stream(tmp_path / "same", "a").written) == utc
    minutes = ["2026-10-25T02:50:00", "2026-10-25T02:10:00", "2026-10-25T02:20:00"]
    text = "time,a\n" + "".join(f"{minute},{i}\n" for i, minute in enumerate(minutes))
    split([written(tmp_path, text, "back.csv")], tmp_path / "back", "{stream}", ReadOptions(), Dialect(zone=BERLIN))
    assert list(stream(tmp_path / "back", "a").written) == ["2026-10-25T00:50:00Z", "2026-10-25T01:10:00Z", "2026-10-25T01:20:00Z"]


def test_a_time_that_is_there_twice_is_no_hour_of_a_clock_set_back_where_rows_are_closer(tmp_path: Path) -> None:
    minutes = ["01:50", "02:10", "02:10", "02:20", "02:10"]
    text = "time,a\n" + "".join(f"2026-10-25T{minute}:00,{i}\n" for i, minute in enumerate(minutes))
    split([written(tmp_path, text)], tmp_path / "out", "{stream}", ReadOptions(), Dialect(zone=BERLIN))
    assert [time[11:16] for time in stream(tmp_path / "out", "a").written] == ["23:50", "00:10", "00:10", "00:20", "01:10"]
    with pytest.raises(TableError, match="unless clocks were set back here: `python -m service split --zone Europe/Berlin`"):
        split([written(tmp_path, text)], tmp_path / "utc", "{stream}", ReadOptions())


def test_points_of_a_unit_do_not_name_a_machine(tmp_path: Path) -> None:
    names = ["H.M1.Druck [bar abs.]", "H.M1.Temp. [°C]", "H.M1.Weg (mm v. N.)", "H.M1.p", "H.M1.q [a].r"]
    path = written(tmp_path, f"time;{';'.join(names)}\n2026-11-24;1;2;3;4;5\n")
    done = split([path], tmp_path / "out", "{stream}.{feature}", ReadOptions())
    assert done.features == {"H.M1": ["Druck [bar abs.]", "Temp. [°C]", "Weg (mm v. N.)", "p"], "H.M1.q [a]": ["r"]}
    split([path], tmp_path / "each", "{stream}", ReadOptions())
    assert (tmp_path / "each" / "H.M1.Druck [bar abs.].csv").is_file()


@pytest.mark.parametrize("long", [False, True])
def test_a_time_that_its_zone_has_not_is_refused_for_it_is_another_zones(tmp_path: Path, long: bool) -> None:
    rows = "\n".join(f"2026-03-29 {at},A,1" for at in ("01:50", "02:10", "03:10"))
    path = written(tmp_path, f"time,tag,a\n{rows}\n")
    asked = Long(("tag",), ("a",)) if long else None
    dialect = Dialect(zone=BERLIN)
    with pytest.raises(TableError, match=r"row 2: '2026-03-29 02:10' is no time in Europe/Berlin.*--zone Etc/GMT-1"):
        split([path], tmp_path / "out", "{stream}", ReadOptions(exclude=frozenset() if long else frozenset({"tag"})), dialect, long=asked)
    split([path], tmp_path / "all-year", "{stream}", ReadOptions(), Dialect(zone=ZoneInfo("Etc/GMT-1")), long=Long(("tag",), ("a",)))
    assert stream(tmp_path / "all-year", "A").written[1] == "2026-03-29T01:10:00Z"


def test_a_table_whose_times_are_not_found_is_refused_and_not_numbered(tmp_path: Path) -> None:
    for header in ("Zeit", "Zeitstempel"):
        with pytest.raises(TableError, match=f"no column of times by a name that is known: name it with --timestamp; it has '{header}'"):
            split([written(tmp_path, f"{header};a\n1789336800000;1\n")], tmp_path / "out", "{stream}", ReadOptions())


@pytest.mark.parametrize(
    ("decimal", "cells", "numbers"),
    [
        (",", ["1.234,50", "12", "-1.234.567", "1 234,5", "1'234", "12,5E-3"], [1234.5, 12.0, -1234567.0, 1234.5, 1234.0, 0.0125]),
        (",", ["12.5", "1.2345", "1.234,5,6", "0,1"], [math.nan, math.nan, math.nan, 0.1]),
        (".", ['"1,234.50"', "1 234", "12.5"], [1234.5, 1234.0, 12.5]),
        (".", ['"1,234"', '"1,2.5"', "3", '"1,234,567"', '"0,1"'], [1234.0, math.nan, 3.0, 1234567.0, math.nan]),
        (None, ['"1,234"', '"1,2.5"', "3", '"1,234,567"', '"1,234.5"'], [math.nan, math.nan, 3.0, 1234567.0, 1234.5]),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_marks_between_thousands_are_read_and_other_marks_make_no_number(
    tmp_path: Path, decimal: str | None, cells: list[str], numbers: list[float], long: bool
) -> None:
    separator = ";" if decimal == "," else ","
    lines = [separator.join(["time", "tag", "a"])]
    lines += [separator.join([f"2026-11-24T00:{minute:02}", "A", cell]) for minute, cell in enumerate([*cells, "7"])]
    path = written(tmp_path, "\n".join(lines))
    asked = Long(("tag",), ("a",)) if long else None
    done = split([path], tmp_path / "out", "{stream}", ReadOptions(), Dialect(decimal), long=asked)
    one = stream(tmp_path / "out", "A" if long else "a")
    at = dict(zip(one.written, one.columns["value"].tolist(), strict=True))
    assert [at.get(f"2026-11-24T00:{minute:02}:00Z", math.nan) for minute in range(len(cells))] == pytest.approx(numbers, nan_ok=True)
    assert sum(done.missing.values()) == sum(map(math.isnan, numbers))


def test_grouped_thousands_before_a_comma_ask_for_the_decimal_comma(tmp_path: Path) -> None:
    done = split([written(tmp_path, "time;a\n2026-11-24;1.234,50\n2026-11-25;7\n")], tmp_path / "out", "{stream}", ReadOptions())
    assert done.report()[-1] == "'1.234,50' in a has a decimal comma: --decimal , reads it."


def test_a_single_comma_before_three_digits_asks_what_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, 'time,orders\n2026-11-24,998\n2026-11-25,"1,094"\n')
    done = split([path], tmp_path / "out", "{stream}", ReadOptions())
    asked = "--decimal . where its comma is between thousands, --decimal , where decimals follow it."
    assert done.report()[-1] == f"'1,094' in orders: {asked}"
    ran = CliRunner().invoke(app, ["split", str(path), "--out", str(tmp_path / "thousands"), "--decimal", "."])
    assert ran.exit_code == 0, ran.output
    assert stream(tmp_path / "thousands", "orders").columns["value"].tolist() == [998.0, 1094.0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_what_excel_writes_is_read_as_it_is(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    for name, text in (("sep.csv", "sep=;\r\nZeit;Öl [°C]\r\n2026-11-24;1,5\r\n"), ("tab.csv", "Zeit\tÖl [°C]\r\n2026-11-24\t1,5\r\n")):
        (tmp_path / name).write_text(mark + text, encoding=encoding, newline="")
        done = split([tmp_path / name], tmp_path / f"{name}-out", "{stream}", ReadOptions("Zeit"), Dialect(","))
        assert done.rows == {"Öl [°C]": 1}


def test_a_file_in_another_encoding_is_refused_with_what_makes_it_readable(tmp_path: Path) -> None:
    (tmp_path / "plant.csv").write_text("time;Öl [°C]\n2026-11-24;1\n", encoding="cp1252")
    with pytest.raises(TableError, match=r"is not in UTF-8: .*iconv -f WINDOWS-1252 -t UTF-8"):
        split([tmp_path / "plant.csv"], tmp_path / "out", "{stream}", ReadOptions())


def test_files_of_one_stream_each_keep_their_names_and_months_are_put_together(tmp_path: Path) -> None:
    one = written(tmp_path, "time,t,p\n2026-11-24,1,2\n", "M1.csv")
    split([one], tmp_path / "each", "{feature}", ReadOptions())
    assert list(stream(tmp_path / "each", "M1").columns) == ["t", "p"]
    months = [written(tmp_path, f"time,a\n2026-{month:02}-01,{month}\n", f"{month}.csv") for month in (1, 2)]
    split(months, tmp_path / "year", "{stream}", ReadOptions())
    assert stream(tmp_path / "year", "a").columns["value"].tolist() == [1.0, 2.0]
    with pytest.raises(TableError, match="name them in order of time"):
        split(months[::-1], tmp_path / "wrong", "{stream}", ReadOptions())


def test_files_of_a_stream_may_have_other_columns_in_another_order(tmp_path: Path) -> None:
    contents = [
        "time,M.b [x,y],M.a,M.c,N.a\n2026-10-01,2,1,Bad,1\n2026-10-02,,1,Bad,1\n",
        "time,N.a,M.a,M.b [x,y]\n2026-11-01,1,10,20\n",
        "time,M.a,M.c,M.d,N.a\n2026-12-01,1,3,4,1\n",
    ]
    months = [
        written(tmp_path, content.replace("b [x,y]", '"M.b [x,y]"').replace('M."M.', '"M.'), f"{i}.csv")
        for i, content in enumerate(contents)
    ]
    done = split(months, tmp_path / "out", "{stream}.{feature}", ReadOptions())
    assert (tmp_path / "out" / "M.csv").read_text() == (
        'timestamp,"b [x,y]",a,c,d\n'
        "2026-10-01T00:00:00Z,2.0,1.0,,\n2026-10-02T00:00:00Z,,1.0,,\n2026-11-01T00:00:00Z,20.0,10.0,,\n2026-12-01T00:00:00Z,,1.0,3.0,4.0\n"
    )
    assert list(stream(tmp_path / "out", "N").columns) == ["a"]
    assert not done.words
    assert "Not in all files, and missing in the rows of the others: M: b [x,y], M: c, M: d." in done.report()


@pytest.mark.parametrize("long", [Long(("tag",), ("value",)), None])
def test_files_without_rows_are_told_and_left_out(tmp_path: Path, long: Long | None) -> None:
    (tmp_path / "in").mkdir()
    header, row = ("time,tag,value", "2026-01-01T00:00:00Z,M1.a,1") if long else ("time,M1.a", "2026-01-01T00:00:00Z,1")
    written(tmp_path / "in", f"{header}\n", "idle.csv")
    full = written(tmp_path / "in", f"{header}\n{row}\n", "jan.csv")
    told: list[str] = []
    done = split([tmp_path / "in"], tmp_path / "out", "{stream}.{feature}", ReadOptions(), notify=told.append, long=long)
    assert done.rows == {"M1": 1}
    assert [line.rpartition("/")[2] for line in told] == ["idle.csv has no rows. It is left out."]
    full.write_text("")
    with pytest.raises(TableError, match="None of 2 files has a row"):
        split([tmp_path / "in"], tmp_path / "none", "{stream}.{feature}", ReadOptions(), notify=told.append, long=long)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{machine}", "names no {stream}"),
        ("{stream}{feature}", "nothing between"),
        ("plain", "names no {stream}"),
        ("{stream}.{stream}", "names no {stream}"),
        ("{stream}:{feature}", "no column is of the form"),
    ],
)
def test_a_template_that_fits_nothing_is_refused_with_what_there_is(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(TableError, match=re.escape(said)):
        split([written(tmp_path, WIDE)], tmp_path / "out", template, *GERMAN)


def test_a_stream_cannot_leave_the_folder_nor_add_to_one_that_is_there(tmp_path: Path) -> None:
    path = written(tmp_path, "time,../a\n2026-11-24,1\n")
    with pytest.raises(TableError, match="cannot be the name of a file"):
        split([path], tmp_path / "out", "{stream}", ReadOptions())
    with pytest.raises(TableError, match="is not empty"):
        split([path], tmp_path, "{stream}", ReadOptions())


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--decimal", ",", "--time-format", "%d.%m.%Y %H:%M:%S", "--zone", "Europe/Berlin"], 0, "2 streams, 5 rows"),
        (["--decimal", ";"], 2, "--decimal ';'"),
        (["--zone", "Mars/North"], 2, "--zone 'Mars/North' is no time zone"),
        ([], 2, "--time-format"),
    ],
)
def test_the_command_says_what_it_did_or_what_to_write_instead(tmp_path: Path, options: list[str], status: int, said: str) -> None:
    asked: list[Any] = [
        "split",
        written(tmp_path, WIDE),
        "--out",
        tmp_path / "out",
        "--columns",
        "{stream}.{feature}",
        "--timestamp",
        "Zeit",
    ]
    done = CliRunner().invoke(app, [*map(str, asked), *options])
    assert done.exit_code == status
    assert said in done.output
