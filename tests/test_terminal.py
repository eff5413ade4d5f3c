"""What commands print of names that are not theirs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from service.__main__ import app
from service.terminal import Terminal, terminal


def test_brackets_and_colons_of_names_stay_in_lines_and_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    name = "PLC:fan:n [/min] [bold] of [bar]"
    grid = Table()
    grid.add_column(name)
    grid.add_row(name)
    terminal().print(name, style="red")
    terminal(stderr=True).print(grid)
    said = capsys.readouterr()
    assert said.out == f"{name}\n"
    assert said.err.count(name) == 2


def test_what_goes_into_a_pipe_is_as_wide_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    terminal(columns=160).print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"


def test_a_line_of_somebodys_log_gives_the_terminal_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    line = "\x1b]52;c;cm0gLXJm\x07fail\x1b[2J\x9b31med\x00\x7f for user\tx"
    grid = Table()
    grid.add_column(line)
    grid.add_row(line)
    terminal().print(line, grid, sep="\n")
    said = capsys.readouterr().out
    assert said.count("]52;c;cm0gLXJmfail[2J31med for user") == 3
    assert not set(said) & {"\x1b", "\x07", "\x9b", "\x00", "\x7f"}


def test_colours_are_still_colours() -> None:
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="standard").print("bad\x1bX", style="red")
    assert file.getvalue() == "\x1b[31mbadX\x1b[0m\n"


def test_what_a_command_says_of_a_file_gives_none_either(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("timestamp,value,note\x1b[2J\n2026-01-01T00:00:00Z,1,word\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["split", str(table), "--out", str(tmp_path / "out")])
    assert "note[2J" in done.output
    assert "\x1b[2J" not in done.output
