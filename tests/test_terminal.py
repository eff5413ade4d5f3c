"""What commands print of names that are not theirs."""

from __future__ import annotations

import pytest
from rich.table import Table

from service.terminal import terminal


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
