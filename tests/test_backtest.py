"""The backtest's CSVs: complete, finite, causal, and whatever the grouping and chunking the same to the last bit."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.__main__ import app
from service.backtest import Limits, Report, command, read_series, run
from service.detector import Detector
from service.errors import TableError
from service.policy import Policy
from service.tables import ReadOptions, Source
from tests.tiny import WARMUP, build_tiny

UNSORTED = ReadOptions(unsorted=True)


def write(path: Path, values: list[float | str], *, header: str = "timestamp,value", start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"2026-01-01 {i // 3600:02}:{i % 3600 // 60:02}:{i % 60:02},{value}" for i, value in enumerate(values, start)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def series(seed: int, rows: int) -> list[float | str]:
    values: list[float | str] = np.random.default_rng(seed).normal(10, 1, rows).round(3).tolist()
    values[rows // 2] = 40.0
    return values


def score(inputs: list[Path], detector: Detector, out: Path, limits: Limits | None = None) -> Report:
    return run(inputs, detector, Policy(alpha=1e-3), out, UNSORTED, Console(file=io.StringIO()), limits or Limits())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_input_gets_a_file_of_the_same_relative_path_with_a_row_for_each_row(tmp_path: Path, tiny_detector: Detector) -> None:
    data = tmp_path / "data"
    write(data / "a" / "x.csv", series(1, 50))
    write(data / "b" / "y.csv", series(2, 80))
    score([data], tiny_detector, tmp_path / "out")
    x, y = rows_of(tmp_path / "out/a/x.csv"), rows_of(tmp_path / "out/b/y.csv")
    assert (len(x), len(y)) == (50, 80)
    assert list(x[0]) == ["timestamp", "anomaly_score", "alert_score", "p_value", "is_anomaly", "value_expected"]
    assert x[7]["timestamp"] == "2026-01-01 00:00:07"


def test_scores_are_finite_and_zero_while_the_stream_warms_up(tmp_path: Path, tiny_detector: Detector) -> None:
    write(tmp_path / "x.csv", ["", *series(1, 40), ""])
    score([tmp_path / "x.csv"], tiny_detector, tmp_path / "out")
    rows = rows_of(tmp_path / "out/x.csv")
    for row in rows:
        assert all(math.isfinite(float(row[name])) for name in ("anomaly_score", "alert_score", "p_value"))
    for row in [*rows[:WARMUP], rows[-1]]:
        assert (row["anomaly_score"], row["alert_score"], row["p_value"], row["is_anomaly"]) == ("0.0", "0.0", "1.0", "false")
    assert rows[0]["value_expected"] == ""
    assert float(rows[-1]["value_expected"]) == pytest.approx(10, abs=3)


def test_the_spike_is_an_anomaly_whose_onset_alone_has_an_alert_score(tmp_path: Path, tiny_detector: Detector) -> None:
    write(tmp_path / "x.csv", series(1, 100))
    report = score([tmp_path / "x.csv"], tiny_detector, tmp_path / "out")
    rows = rows_of(tmp_path / "out/x.csv")
    assert rows[50]["is_anomaly"] == "true"
    assert float(rows[50]["alert_score"]) > 1
    assert 50 in report.tallies[0].alert_rows
    assert report.tallies[0].onsets == sum(float(row["alert_score"]) > 1 for row in rows)
    assert report.tallies[0].anomalous == sum(row["is_anomaly"] == "true" for row in rows)


def test_a_row_older_than_one_before_it_is_late_and_equal_timestamps_are_fine(tmp_path: Path, tiny_detector: Detector) -> None:
    lines = [f"{100 + i},{10 + i % 3}" for i in range(30)]
    lines[20] = "110,99"
    lines[25] = lines[24]
    (tmp_path / "x.csv").write_text("\n".join(["timestamp,value", *lines]))
    report = score([tmp_path / "x.csv"], tiny_detector, tmp_path / "out")
    rows = rows_of(tmp_path / "out/x.csv")
    assert report.tallies[0].late == 1
    assert [rows[20][name] for name in ("timestamp", "anomaly_score", "p_value", "is_anomaly", "value_expected")] == [
        "110",
        "0.0",
        "1.0",
        "false",
        "",
    ]
    assert float(rows[25]["anomaly_score"]) > 0


def test_scores_of_a_file_do_not_depend_on_the_files_beside_it_or_on_the_chunks(tmp_path: Path, tiny_detector: Detector) -> None:
    data = tmp_path / "data"
    for i in range(11):
        write(data / f"{i}.csv", series(i, 40 + 13 * i))
    score([data], tiny_detector, tmp_path / "together")
    score([data / "7.csv"], tiny_detector, tmp_path / "alone")
    score([data], tiny_detector, tmp_path / "in_pieces", Limits(group_files=3, chunk_events=70))
    for i in range(11):
        assert (tmp_path / f"together/{i}.csv").read_text() == (tmp_path / f"in_pieces/{i}.csv").read_text()
    assert (tmp_path / "together/7.csv").read_text() == (tmp_path / "alone/7.csv").read_text()


def test_a_score_knows_nothing_of_the_rows_after_it(tmp_path: Path, tiny_detector: Detector) -> None:
    values = series(3, 90)
    write(tmp_path / "whole/x.csv", values)
    write(tmp_path / "part/x.csv", values[:60])
    for name in ("whole", "part"):
        score([tmp_path / name], tiny_detector, tmp_path / f"out_{name}")
    assert rows_of(tmp_path / "out_whole/x.csv")[:60] == rows_of(tmp_path / "out_part/x.csv")


def test_columns_are_matched_by_name_and_a_missing_one_is_missing_throughout(tmp_path: Path) -> None:
    detector = Detector.load(build_tiny(tmp_path, features=("x", "y"), name="pair"))
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["time;y;label", *(f"{i};{i % 4};0" for i in range(20))]))
    score([data], detector, tmp_path / "out")
    rows = rows_of(tmp_path / "out/data.csv")
    assert list(rows[0])[-2:] == ["x_expected", "y_expected"]
    assert float(rows[-1]["y_expected"]) == pytest.approx(1.5, abs=1)


def test_a_file_that_fits_no_feature_is_refused_with_both_lists(tmp_path: Path) -> None:
    detector = Detector.load(build_tiny(tmp_path, features=("x", "y"), name="pair"))
    (tmp_path / "data.csv").write_text("time,a,b\n1,2,3\n")
    with pytest.raises(TableError, match=r"columns 'a', 'b', the model the features 'x', 'y'"):
        score([tmp_path / "data.csv"], detector, tmp_path / "out")


@pytest.mark.parametrize("number", [1e39, -1e39])
def test_a_number_beyond_float32_is_refused_by_its_place(tmp_path: Path, tiny_detector: Detector, number: float) -> None:
    write(tmp_path / "x.csv", [1.0, number])
    with pytest.raises(TableError, match=rf"feature 'value', row 2: {re.escape(str(number))} is beyond the range of float32"):
        score([tmp_path / "x.csv"], tiny_detector, tmp_path / "out")


@pytest.mark.parametrize(("first", "step", "told"), [(123_456_789, 3.0, True), (1_000_000, 3.0, False), (123_456_789, 0.0, False)])
def test_a_column_whose_changes_a_detector_cannot_see_is_told(
    tmp_path: Path, tiny_detector: Detector, first: int, step: float, told: bool
) -> None:
    meter: list[float | str] = [first + step * i for i in range(40)]
    source = Source(write(tmp_path / "meter.csv", meter), "meter.csv")
    notes: list[str] = []
    read_series(source, tiny_detector, ReadOptions(), notes.append)
    assert any("of 'value' most changes from row to row are too small" in note for note in notes) == told


def test_inputs_are_never_overwritten_and_never_share_an_output(tmp_path: Path, tiny_detector: Detector) -> None:
    one, two = write(tmp_path / "a/x.csv", series(1, 20)), write(tmp_path / "b/x.csv", series(2, 20))
    with pytest.raises(TableError, match="another input"):
        score([one, two], tiny_detector, tmp_path / "out")
    with pytest.raises(TableError, match="overwritten"):
        score([tmp_path / "a"], tiny_detector, tmp_path / "a")
    assert rows_of(one)[0].keys() == {"timestamp", "value"}


def test_the_report_has_a_tally_for_each_input_in_order(tmp_path: Path, tiny_detector: Detector) -> None:
    for name, rows in (("a", 20), ("b", 70)):
        write(tmp_path / f"data/{name}.csv", series(1, rows))
    report = score([tmp_path / "data"], tiny_detector, tmp_path / "out")
    content = json.loads(json.dumps(report.as_json()))
    assert [(one["name"], one["rows"], one["warming_up"]) for one in content["inputs"]] == [("a.csv", 20, WARMUP), ("b.csv", 70, WARMUP)]
    assert content["alpha"] == 1e-3


def test_the_command_prints_a_summary_and_writes_it_as_json(tmp_path: Path, tiny_model_path: Path) -> None:
    write(tmp_path / "data/x.csv", series(1, 60))
    arguments = ["backtest", str(tmp_path / "data"), "--model", str(tiny_model_path), "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "summary.json")])
    assert ran.exit_code == 0, ran.output
    assert "x.csv" in ran.output
    assert "60 rows in" in ran.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["inputs"][0]["rows"] == len(rows_of(tmp_path / "out/x.csv")) == 60


def test_the_summary_says_of_which_inputs_nothing_was_judged_and_which_seem_to_be_the_newest_first(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    write(tmp_path / "data/short.csv", series(1, WARMUP))
    write(tmp_path / "data/long.csv", series(1, 60))
    newest = write(tmp_path / "data/newest.csv", series(1, 60))
    head, *rows = newest.read_text().splitlines()
    newest.write_text("\n".join([head, *rows[::-1]]))
    ran = CliRunner().invoke(app, ["backtest", str(tmp_path / "data"), "--model", str(tiny_model_path), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    printed = " ".join(ran.output.split())
    assert "Most rows of newest.csv are late: where the newest row is the first, sort the file by time." in printed
    assert f"Nothing of short.csv was judged, so that there is no alert says nothing: from the first {WARMUP} rows of a stream" in printed
    assert f"long.csv 60 {60 - WARMUP} 0 " in printed


def test_files_that_are_not_read_and_values_that_look_like_no_readings_are_told(tmp_path: Path, tiny_model_path: Path) -> None:
    write(tmp_path / "data/a.csv", [-9999, *series(1, 60)])
    write(tmp_path / "data/b.csv", [100 * float(value) for value in series(2, 60)])
    (tmp_path / "data/c.csv.gz").touch()
    ran = CliRunner().invoke(app, ["backtest", str(tmp_path / "data"), "--model", str(tiny_model_path), "--out", str(tmp_path / "out")])
    printed = " ".join(ran.output.split())
    assert "Not read, as they are no .csv, .tsv, .parquet, .npz file: 'c.csv.gz'. Unpack them" in printed
    assert "no reading: -9999 in a.csv (1, 1.6 %). Each is scored" in printed
    assert "`python -m service split FILES --missing -9999` makes such files" in printed


def test_files_without_rows_are_named_counted_and_left_out(tmp_path: Path, tiny_model_path: Path) -> None:
    write(tmp_path / "data/b.csv", series(1, 60))
    write(tmp_path / "data/idle.csv", [])
    (tmp_path / "data/a.csv").write_text("")
    files = {name: str(tmp_path / name) for name in ("data", "out", "summary.json", "report.html")}
    arguments = ["backtest", files["data"], "--model", str(tiny_model_path), "--out", files["out"], "--json", files["summary.json"]]
    ran = CliRunner().invoke(app, [*arguments, "--report", files["report.html"]])
    assert ran.exit_code == 0, ran.output
    printed = " ".join(ran.output.split())
    assert "a.csv is empty. It is left out." in printed
    assert "idle.csv has no rows. It is left out." in printed
    assert "2 of 3 inputs have no rows and are left out." in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [one["name"] for one in summary["inputs"]] == ["b.csv"]
    assert sorted(summary["without_rows"]) == ["a.csv", "idle.csv"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.csv"]
    assert "b.csv" in (tmp_path / "report.html").read_text()


def test_what_is_drawn_is_what_was_scored_where_files_come_and_go_meanwhile(tmp_path: Path, tiny_detector: Detector) -> None:
    """The folder had been listed again: a file that had come since was drawn with another's alerts."""
    for name in ("b", "c"):
        write(tmp_path / f"data/{name}.csv", series(1, 60))
    done = command([tmp_path / "data"], tiny_detector, tmp_path / "out", Policy(), None, [], None)
    write(tmp_path / "data/a.csv", series(1, 60))
    assert [done.load(i).name for i in range(2)] == [tally.name for tally in done.report.tallies] == ["b.csv", "c.csv"]
    (tmp_path / "data/c.csv").unlink()
    with pytest.raises(TableError, match=r"c\.csv cannot be read: No such file or directory"):
        done.load(1)
    with pytest.raises(TableError, match=r"c\.csv cannot be read: No such file or directory"):
        Source(tmp_path / "data/c.csv", "c.csv").stat()


def test_a_column_to_leave_out_that_is_not_there_is_refused(tmp_path: Path, tiny_model_path: Path) -> None:
    write(tmp_path / "data/b.csv", series(1, 60))
    arguments = ["backtest", str(tmp_path / "data"), "--model", str(tiny_model_path), "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, [*arguments, "--exclude", "lable"])
    assert ran.exit_code == 2
    assert "--exclude 'lable' fits no column; there are " in ran.output
    assert not (tmp_path / "out").exists()


def test_files_of_which_none_has_rows_are_refused(tmp_path: Path, tiny_detector: Detector) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"data/{name}.csv", [])
    with pytest.raises(TableError, match="None of 2 files has a row"):
        score([tmp_path / "data"], tiny_detector, tmp_path / "out")


def test_a_lower_rate_gives_fewer_alerts(tmp_path: Path, tiny_model_path: Path) -> None:
    write(tmp_path / "x.csv", series(1, 400))
    alerts = []
    for alpha in ("0.1", "0.001"):
        arguments = [str(tmp_path / "x.csv"), "--model", str(tiny_model_path), "--out", str(tmp_path / alpha), "--alpha", alpha]
        assert CliRunner().invoke(app, ["backtest", *arguments, "--json", str(tmp_path / "s.json")]).exit_code == 0
        alerts.append(json.loads((tmp_path / "s.json").read_text())["inputs"][0]["alerts"])
    assert alerts[0] > alerts[1] > 0


def test_names_in_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "data/Druck [bar].csv", series(1, 20), header="timestamp,n [/min]")
    ran = CliRunner().invoke(app, ["backtest", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert "Column 'n [/min]' is taken for" in ran.output
    assert "Druck [bar].csv" in ran.stdout


def test_a_folder_of_several_models_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_tiny(tmp_path, name=name)
    write(tmp_path / "data/x.csv", series(1, 20))
    ran = CliRunner().invoke(app, ["backtest", str(tmp_path / "data"), "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "one-1.onnx, two-1.onnx" in ran.output
