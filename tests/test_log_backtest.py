"""The backtest of log files; that its scores are the served ones: e2e/test_replay_service.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import log_files
from service.__main__ import app
from service.detector import Detector
from service.errors import TableError
from service.log_backtest import run
from service.log_files import LogFormat, by_stream
from service.policy import Policy
from tests.test_backtest import rows_of
from tests.tiny import build_tiny
from tests.tiny_log import TEMPLATES, build_tiny_log

FORMAT = LogFormat(time="%Y-%m-%d %H:%M:%S", stream=r"\[(req-\d)\]")
OPENED, TOOK, CLOSED = "Accepted connection from 10.0.0.7:4711", "Took 12.5 ms for /a", "Closed connection from 10.0.0.7:4711"
LOG = {
    "a.log": [
        f"2026-11-26 08:00:00 [req-1] {OPENED}",
        f"2026-11-26 08:00:01 [req-2] {OPENED}",
        f"2026-11-26 08:00:02 [req-1] {TOOK}",
        "2026-11-26 08:00:03 [req-1] Segfault at 0xdeadbeef",
        "  in libfoo.so",
        "2026-11-26 08:00:04 of no stream",
    ],
    "b.log": [f"2026-11-26 08:00:01 [req-1] {TOOK}", f"2026-11-26 08:02:00 [req-2] {OPENED}"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "logs"
    made.mkdir()
    for name, lines in LOG.items():
        (made / name).write_text("\n".join(lines) + "\n")
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose sessions are over after a minute."""
    return build_tiny_log(tmp_path_factory.mktemp("model"), header=r"(\d{4}-\d\d-\d\d \S+) \[\S+\] ", session_seconds=60.0)


def test_each_line_is_a_row_in_order_of_time_whatever_file_it_is_in_and_a_silence_is_an_end(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    report, alerts = run([folder], Detector.load(model), Policy(), tmp_path / "out", FORMAT)
    rows = rows_of(tmp_path / "out" / "lines.csv")
    end = "(end of session)"
    assert [(row["timestamp"][11:19], row["stream_id"], row["template"]) for row in rows] == [
        ("08:00:00", "req-1", TEMPLATES[0]),
        ("08:00:01", "req-1", TEMPLATES[1]),
        ("08:00:01", "req-2", TEMPLATES[0]),
        ("08:00:01", "req-2", end),
        ("08:00:02", "req-1", TEMPLATES[1]),
        ("08:00:03", "req-1", "(new pattern)"),
        ("08:00:03", "req-1", end),
        ("08:02:00", "req-2", TEMPLATES[0]),
    ]
    assert {tally.name: tally.rows for tally in report.tallies} == {"req-1": 5, "req-2": 3}
    assert rows[0]["likeliest"] == TEMPLATES[0]
    assert float(rows[0]["chance"]) > 0.9
    assert (rows[5]["carried_by"], float(rows[5]["share"]) > 0.5) == ("template", True)
    assert rows[5]["line"] == "2026-11-26 08:00:03 [req-1] Segfault at 0xdeadbeef"
    assert (rows[5]["is_anomaly"], rows[3]["line"]) == ("true", "")
    assert float(rows[5]["alert_score"]) > 1
    assert rows[7]["p_value"] == rows[2]["p_value"]  # a new session
    assert [row[-1] for row in alerts] == ["", rows[5]["line"]]  # one that ended after its first line, and what was new


def test_the_command_shows_the_lines_at_which_alerts_open(folder: Path, model: Path, tmp_path: Path) -> None:
    options = ["--time-format", FORMAT.time, "--stream-regex", FORMAT.stream]
    answer = CliRunner().invoke(app, ["backtest", str(folder), "--model", str(model), "--out", str(tmp_path / "out"), *options])
    assert answer.exit_code == 0, answer.output
    assert "▲ req-1  alert " in answer.output
    assert re.search(r"p \d\S+  template \d+%  Segfault at 0xdeadbeef\n", answer.output), "why, and the line without its time and request"
    assert "Left out: 1 that name no stream" in answer.output


def test_what_a_line_holds_does_not_reach_the_terminal(folder: Path, model: Path, tmp_path: Path) -> None:
    file = folder / "a.log"
    file.write_text(file.read_text().replace("Segfault at", "\x1b]0;title\x07\x1b[31mSegfault\x1b[0m at"))
    options = ["--time-format", FORMAT.time, "--stream-regex", FORMAT.stream]
    answer = CliRunner().invoke(app, ["backtest", str(folder), "--model", str(model), "--out", str(tmp_path / "out"), *options])
    assert "\ufffd]0;title\ufffdSegfault at 0xdeadbeef" in answer.output
    assert "\x1b]" not in answer.output
    assert "in libfoo.so" not in answer.output
    assert "\x1b[31mSegfault" in (tmp_path / "out" / "lines.csv").read_text()  # as it was written


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--report", "x.html"], "are for readings"),
        (["--timestamp", "t"], "are for readings"),
        (["--timestamp-regex", r"\["], "is no time"),
    ],
)
def test_what_is_not_for_log_files_is_refused(folder: Path, model: Path, tmp_path: Path, options: list[str], says: str) -> None:
    (folder / "a.log").write_text(f"[x {OPENED}\n")
    (folder / "b.log").unlink()
    answer = CliRunner().invoke(app, ["backtest", str(folder), "--model", str(model), "--out", str(tmp_path / "out"), *options])
    assert answer.exit_code == 2
    assert says in answer.output


def test_options_of_log_files_are_refused_where_the_model_takes_readings(folder: Path, tmp_path: Path) -> None:
    sensors = build_tiny(tmp_path)
    answer = CliRunner().invoke(app, ["backtest", str(folder), "--model", str(sensors), "--out", str(tmp_path), "--time-format", "%s"])
    assert answer.exit_code == 2
    assert "are for log files" in answer.output


def test_a_line_without_a_time_and_too_many_lines_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TableError, match=r"b\.log does not say when"):
        by_stream([folder / "b.log"], LogFormat(), None)
    monkeypatch.setattr(log_files, "MAX_LINES", 3)
    with pytest.raises(TableError, match="More than 3 lines"):
        by_stream([folder], FORMAT, None)


def test_a_stream_goes_on_where_nothing_says_that_it_ended(folder: Path) -> None:
    one, two = by_stream([folder], FORMAT, None)
    assert None not in one.texts + two.texts
    one, two = by_stream([folder], FORMAT, 118.0)
    assert one.texts[-1] == "2026-11-26 08:00:03 [req-1] Segfault at 0xdeadbeef\n  in libfoo.so"
    assert [text is None for text in two.texts] == [False, True, False]
