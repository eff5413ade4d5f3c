"""Files as a mapped cache: the same rows, read once, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from service.errors import TableError
from service.tables import BATCH_CELLS, ReadOptions, find_sources
from training.autoencoder import Sizes
from training.cache import Cached, _made_of, convert, open_cache
from training.data import PIECE, Float32, Float64, clock, variance_of
from training.fit import Plan
from training.pipeline import fleet_job

ROWS, FEATURES = 2 * BATCH_CELLS // 3 + 7, ["load", "heat"]
"""More than two batches."""


def converted(data: Path, folder: Path, told: list[str] | None = None) -> Cached:
    convert([data], ReadOptions(), folder, (told if told is not None else []).append)
    return open_cache(folder)


def small(folder: Path, name: str = "a.csv", value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("timestamp,load\n" + "\n".join(f"{i},{value + i % 3}" for i in range(9)))
    return folder


def test_files_without_rows_are_told_and_left_out(tmp_path: Path) -> None:
    alone = converted(small(tmp_path / "alone", "b.csv"), tmp_path / "cache-alone")
    (small(tmp_path / "data", "b.csv") / "a.csv").write_text("timestamp,load,what is not in any other\n")
    (tmp_path / "data" / "c.csv").write_text("")
    told: list[str] = []
    cached = converted(tmp_path / "data", tmp_path / "cache", told)
    assert [stream.name for stream in cached.streams] == ["b.csv"]
    assert cached.sha256 == alone.sha256
    assert [line.rpartition("/")[2] for line in told] == ["a.csv has no rows. It is left out.", "c.csv is empty. It is left out."]
    assert "1 feature(s): load\n2 of 3 files have no rows and are left out." in cached.summary
    assert converted(tmp_path / "data", tmp_path / "cache").summary == cached.summary  # where they are not read again, too
    (tmp_path / "data" / "b.csv").write_text("timestamp,load\n")
    with pytest.raises(TableError, match="None of 3 files has a row"):
        converted(tmp_path / "data", tmp_path / "cache")


def test_packed_files_and_spreadsheets_beside_those_that_are_read_are_told(tmp_path: Path) -> None:
    """Half of a fleet had been left out in silence."""
    folder = small(tmp_path / "data")
    for name in ("b.csv.gz", "c.XLSX", "d.jsonl", "README.md"):
        (folder / name).touch()
    told: list[str] = []
    converted(folder, tmp_path / "cache", told)
    assert (
        "Not read, as they are no .csv, .tsv, .parquet, .npz file: 'b.csv.gz', 'c.XLSX', 'd.jsonl'. Unpack them, or save them as CSV."
        in told
    )


def test_what_is_no_reading_is_told_and_learned_as_the_same_history_without_it(tmp_path: Path) -> None:
    """The scale of a column was widened by them, so that faults were hidden, and the model was refused or not by chance."""
    (small(tmp_path / "data") / "b.csv").write_text("timestamp,load\n" + "\n".join(f"{i},{-9999 if i == 5 else i % 3}" for i in range(99)))
    cached = converted(tmp_path / "data", tmp_path / "cache")
    assert "no reading: -9999 in b.csv (1, 1 %). They are taken for missing here." in cached.summary
    assert "`python -m service split FILES --missing -9999` makes such files" in cached.summary
    stream = cached.streams[1]
    assert np.flatnonzero(np.isnan(stream.x)).tolist() == [5]
    assert np.nanmax(np.abs(stream.x)) == 2
    job = fleet_job(cached, [tmp_path / "data"], Sizes(), Plan(chunk=4), 0.15, None, "1", "")
    assert job.sentinels in cached.summary


def test_of_a_fleet_each_column_is_without_what_is_no_reading_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in "ab":
        readings = [(-9999 if i == 50 else 20 + i % 3, 999 if i == 60 else i % 7 * 300, i % 2 if i % 40 else 65535) for i in range(200)]
        rows = [f"{i},{heat},{flow},{mode},{65535 * (i > 190)}" for i, (heat, flow, mode) in enumerate(readings)]
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["timestamp,heat,flow,mode,bit", *rows]))
    cached = converted(tmp_path / "data", tmp_path / "cache")
    for stream in cached.streams:
        assert np.flatnonzero(np.isnan(stream.x[:, 0])).tolist() == [50]
        assert not np.isnan(stream.x[:, 1]).any(), "999 is amid its readings"
        assert np.flatnonzero(np.isnan(stream.x[:, 2])).tolist() == list(range(0, 200, 40))
        assert not np.isnan(stream.x[:, 3]).any(), "seldom set"
    assert cached.unmoved == []
    assert "-9999 in heat (2, 0.5 %); 65535 in mode (10, 2.5 %). They are taken" in cached.sentinels
    assert "65535 in bit (18, 4.5 %). They are learned" in cached.sentinels


def test_from_when_to_when_the_rows_are_is_told(tmp_path: Path) -> None:
    """A spreadsheet's serial numbers were learned as times of 1970 in silence, local times as those of UTC."""
    (tmp_path / "data").mkdir()
    days = [("2026-03-01 00:00:00", "2026-03-01 00:00:10", "2026-03-01 00:01:00"), ("2026-03-02 23:00:00", "2026-03-03 01:00:00")]
    for name, times in zip("ab", days, strict=True):
        rows = [f"{time},{i}" for i, time in enumerate(times)]
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["timestamp,load", *rows]))
    told = converted(tmp_path / "data", tmp_path / "cache").summary
    assert "\nTimes from 2026-03-01 00:00:00 to 2026-03-03 01:00:00 UTC, for which times that name no zone are taken (" in told
    assert told.endswith("; a stream has a row every 30 to 7,200 s in the mean.")
    (tmp_path / "data" / "a.csv").write_text("timestamp,load\n46023.0,1\n46023.5,2\n")
    (tmp_path / "data" / "b.csv").unlink()
    told = converted(tmp_path / "data", tmp_path / "cache").summary
    assert "\nTimes from 1970-01-01 12:47:03 to 1970-01-01 12:47:03 UTC; a stream has a row every 0.5 s in the mean." in told


def test_a_counter_is_told_and_what_goes_both_ways_or_is_emptied_often_is_not(tmp_path: Path) -> None:
    rng, steps = np.random.default_rng(0), np.arange(3000)
    energy = np.where(steps % 7 == 3, np.nan, 9000 + np.cumsum(rng.random(3000)))  # wraps once
    columns = {
        "kWh": np.where(energy >= 10_000, energy - 10_000, energy),
        "tank": steps % 240 + 0.0,
        "temperature": 0.1 * steps + rng.normal(size=3000),
        "load": rng.normal(size=3000),
        "still": np.zeros(3000),
    }
    for name in ("m1", "m2"):
        lines = [",".join("" if np.isnan(value) else f"{value:.4f}" for value in row) for row in zip(*columns.values(), strict=True)]
        text = "\n".join([f"timestamp,{','.join(columns)}", *(f"{60 * i + 1_700_000_000},{line}" for i, line in enumerate(lines))])
        (tmp_path / f"{name}.csv").write_text(text)
    cached = converted(tmp_path, tmp_path / "cache")
    assert list(cached.counters) == ["kWh"]
    assert "Only grows, as a counter does (kWh, pieces, hours): 'kWh'." in cached.summary
    assert "--exclude 'kWh' leaves a column out" in cached.summary


def test_zeros_and_numbers_that_are_common_are_learned_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [f"{i},{0 if i == 50 else 20 + i % 3},{999 if i % 4 else i % 7}" for i in range(200)]
    (tmp_path / "data" / "a.csv").write_text("\n".join(["timestamp,heat,mode", *rows]))
    cached = converted(tmp_path / "data", tmp_path / "cache")
    assert not np.isnan(cached.streams[0].x).any()
    assert "0 in heat (1, 0.5 %); 999 in mode (150, 75 %). They are learned as usual, and hide faults." in cached.summary
    assert "taken for missing" not in cached.summary


def test_a_file_that_has_gone_since_it_was_found_is_named(tmp_path: Path) -> None:
    """It had been a traceback."""
    [source] = find_sources([small(tmp_path / "data")])
    source.path.unlink()
    with pytest.raises(TableError, match=r"a\.csv cannot be read: No such file or directory"):
        _made_of([source], ReadOptions())


def test_columns_that_stand_in_every_stream_are_told_and_nothing_else_is_refused(tmp_path: Path) -> None:
    """They were taken in silence: a sensor whose column was empty in the history raised an alert with each of its first moves."""
    (tmp_path / "data").mkdir()
    for name, serial in (("a", 1), ("b", 2)):
        lines = [f"{i},{serial},,{i % 3},{'' if i < 299 else 7}" for i in range(300)]
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["timestamp,serial,heat,load,flow", *lines]))
    cached = converted(tmp_path / "data", tmp_path / "cache")
    assert cached.unmoved == ["serial", "heat", "flow"]
    assert "In no stream two different values: 'serial', 'heat', 'flow'." in cached.summary
    assert "different" not in converted(small(tmp_path / "moving"), tmp_path / "other").summary

    def job(context: frozenset[str]) -> object:
        return fleet_job(cached, [tmp_path], Sizes(), Plan(), 0.15, None, "1", "", context)

    assert job(frozenset())
    with pytest.raises(TableError, match="No scored column has two different values in a stream"):
        job(frozenset({"load"}))


@pytest.fixture(scope="module")
def rows() -> tuple[Float64, Float64]:
    """Times [T] and values [T, F] of a file of several batches."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(ROWS, 2)).round(3)
    values[1000, 1] = np.nan
    return 1.7e9 + np.cumsum(rng.uniform(0.5, 2, ROWS)).round(2), values


def write(path: Path, times: Float64, values: Float64) -> None:
    if path.name == "a.csv":
        lines = ["timestamp,load,heat", *(f"{time!r},{x!r},{y!r}" for time, (x, y) in zip(times.tolist(), values.tolist(), strict=True))]
        path.write_text("\n".join(lines))
    elif path.name == "a.parquet":
        columns = {"timestamp": times, "load": values[:, 0], "heat": pa.array(values[:, 1], from_pandas=True)}  # a null, not a NaN
        parquet.write_table(pa.table(columns), path, row_group_size=50_000)
    else:
        matrix = np.asfortranarray(values) if path.name == "fortran.npz" else values
        np.savez_compressed(path, rows=matrix, timestamps=times, features=np.array(FEATURES))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.npz", "fortran.npz"])
def test_a_file_of_many_batches_has_its_rows_and_times_in_the_cache(name: str, rows: tuple[Float64, Float64], tmp_path: Path) -> None:
    times, values = rows
    write(tmp_path / name, times, values)
    cached = converted(tmp_path / name, tmp_path / "cache")
    assert cached.features == FEATURES
    assert [stream.name for stream in cached.streams] == [name]
    assert np.array_equal(cached.streams[0].x, values.astype(np.float32), equal_nan=True)
    assert np.array_equal(cached.streams[0].t, clock(times), equal_nan=True)


def test_streams_lie_one_after_the_other_and_start_without_a_gap(tmp_path: Path) -> None:
    data = small(small(tmp_path / "data"), "b.csv", 5).resolve()
    cached = converted(data, tmp_path / "cache")
    assert [stream.name for stream in cached.streams] == ["a.csv", "b.csv"]
    assert cached.streams[1].x[:3, 0].tolist() == [5.0, 6.0, 7.0]
    assert all(np.isnan(stream.t[0, 0]) and (stream.t[1:, 0] == 1).all() for stream in cached.streams)


def test_the_data_hash_changes_with_any_row_and_name(tmp_path: Path) -> None:
    first = converted(small(tmp_path / "a"), tmp_path / "cache-a").sha256
    assert len(first) == 64
    assert converted(small(tmp_path / "b"), tmp_path / "cache-b").sha256 == first
    assert converted(small(tmp_path / "c", value=1.5), tmp_path / "cache-c").sha256 != first
    assert converted(small(tmp_path / "d", "renamed.csv"), tmp_path / "cache-d").sha256 != first


def test_files_that_have_not_changed_are_not_read_again(tmp_path: Path) -> None:
    data, told = small(tmp_path / "data"), list[str]()
    first = converted(data, tmp_path / "cache", told)
    assert told == []
    again = converted(data, tmp_path / "cache", told)
    assert (again.sha256, len(told)) == (first.sha256, 1)
    assert "have not changed" in told[0]
    small(data, value=7.0)
    os.utime(data / "a.csv", ns=(1, 1))  # even where the clock is coarse, another file
    assert converted(data, tmp_path / "cache", told).streams[0].x[0, 0] == 7.0
    assert len(told) == 1
    convert([data], ReadOptions(timestamp="timestamp"), tmp_path / "cache", told.append)
    assert len(told) == 1, "other options read other rows"


def test_a_refused_file_leaves_no_cache(tmp_path: Path) -> None:
    data = small(tmp_path / "data")
    (data / "b.csv").write_text("timestamp,load\n1,x\n")
    with pytest.raises(TableError, match="'x' is not a number"):
        converted(data, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_files_of_one_name_in_two_folders_are_two_streams(tmp_path: Path) -> None:
    folders = [small(tmp_path / "north"), small(tmp_path / "south", value=5)]
    convert(folders, ReadOptions(), tmp_path / "cache", lambda _: None)
    assert [stream.name for stream in open_cache(tmp_path / "cache").streams] == ["north/a.csv", "south/a.csv"]


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "data")
    with pytest.raises(TableError, match=r"a\.csv is given twice"):
        convert([folder, folder / "a.csv"], ReadOptions(), tmp_path / "cache", lambda _: None)


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("precious")
    with pytest.raises(TableError, match=r"holds 'mine\.txt'"):
        converted(small(tmp_path / "data"), tmp_path / "cache")
    assert (tmp_path / "cache" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["x.f32", "t.f32", "index.json"])
def test_a_cache_that_was_cut_short_is_made_again(name: str, tmp_path: Path) -> None:
    data, told = small(tmp_path / "data"), list[str]()
    first = converted(data, tmp_path / "cache").streams[0].x.copy()
    os.truncate(tmp_path / "cache" / name, 8)
    assert np.array_equal(converted(data, tmp_path / "cache", told).streams[0].x, first)
    assert not told


def test_a_number_beyond_float32_is_refused_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("timestamp,load\n0,1\n1,1e39\n")
    with pytest.raises(TableError, match=r"feature 'load', row 2: 1e\+39 is beyond the range of float32"):
        converted(tmp_path / "a.csv", tmp_path / "cache")


def test_a_column_whose_changes_float32_does_not_keep_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = "\n".join(f"{i},{123_456_789 + 3 * i},{i % 5}" for i in range(40))
        (tmp_path / "data" / f"{name}.csv").parent.mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.csv").write_text(f"timestamp,meter,load\n{rows}\n")
    told: list[str] = []
    converted(tmp_path / "data", tmp_path / "cache", told)
    assert len(told) == 2, "one for each file"
    assert all("of 'meter' most changes from row to row are too small" in line for line in told)


def test_the_variance_of_a_stream_is_the_same_by_pieces(rows: tuple[Float64, Float64]) -> None:
    x: Float32 = np.tile(rows[1], (4, 1)).astype(np.float32)
    assert x.size > 2 * PIECE
    present = np.isfinite(x)
    count = present.sum(axis=0)
    wide = x.astype(np.float64)
    centred = np.where(present, wide - np.where(present, wide, 0).sum(axis=0) / count, 0)
    assert np.array_equal(variance_of(x), (centred**2).sum(axis=0) / count)
    assert variance_of(np.full((5, 2), np.nan, np.float32)).tolist() == [0, 0]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

ALLOWED = 48 << 20
LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow.parquet
from service.tables import ReadOptions
from training.cache import convert, open_cache
from training.data import Fleet

def use(data, folder):
    convert([Path(data)], ReadOptions(), Path(folder), print)
    cached = open_cache(Path(folder))
    fleet = Fleet(cached.streams)
    fleet.validation()
    for seed in range(20):
        fleet.block(np.random.default_rng(seed), 32, 512)
    return sum(map(len, cached.streams))

little, little_cache, large, large_cache, allowed = sys.argv[1:]
use(little, little_cache)
status = Path("/proc/self/status").read_text()
held = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (held + int(allowed), held + int(allowed)))
print(use(large, large_cache))
"""
"""Uses a small file, then a large one with so many bytes more than the first took. What is mapped from a file does not count: the kernel
takes it back when memory is short."""


def wide(path: Path, rows: int) -> Path:
    """A file of 8 features, the same 30,000 rows again and again."""
    some = np.random.default_rng(0).normal(size=(min(rows, 30_000), 8))
    values = np.resize(some, (rows, 8))
    if path.suffix == ".npz":
        np.savez(path, rows=values)
    elif path.suffix == ".parquet":  # one row group, not compressed: what is worst
        table = pa.table({f"f{i}": values[:, i] for i in range(8)})
        parquet.write_table(table, path, row_group_size=rows, compression=None, use_dictionary=False)
    else:
        text = "".join(",".join(f"{cell:.9f}" for cell in row) + "\n" for row in some)
        path.write_text("f0,f1,f2,f3,f4,f5,f6,f7\n" + text * (rows // len(some)))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="limits with Linux's RLIMIT_DATA")
@pytest.mark.parametrize(("suffix", "rows"), [(".parquet", 3_200_000), (".npz", 3_200_000), (".csv", 600_000)])
def test_a_file_needs_a_fraction_of_its_size_in_memory(suffix: str, rows: int, tmp_path: Path) -> None:
    little, large = wide(tmp_path / f"little{suffix}", 30_000), wide(tmp_path / f"large{suffix}", rows)
    assert large.stat().st_size > (55e6 if suffix == ".csv" else 200e6)
    arguments = [*(str(path) for path in (little, tmp_path / "little", large, tmp_path / "large")), str(ALLOWED)]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own one reserves more than it uses
    command = [sys.executable, "-c", LIMITED, *arguments]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) == rows


def test_of_a_long_stream_calibration_and_evaluation_take_parts(tmp_path: Path) -> None:
    rows = 400_000
    np.savez(tmp_path / "a.npz", rows=np.random.default_rng(0).normal(size=(rows, 1)))
    cached = converted(tmp_path / "a.npz", tmp_path / "cache")
    job = fleet_job(cached, [tmp_path], Sizes(), Plan(), 0.5, "a", "1", "")
    assert job.rows == rows
    assert [len(stream) for stream in job.evaluation] == [24_000]
    assert job.counted_from == [4000]
    assert not any(stream.x.flags.owndata for stream in (*job.calibration, *job.evaluation))
