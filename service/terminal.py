"""What commands say to people: names and lines of theirs as they are."""

from __future__ import annotations

from rich.console import Console


def terminal(*, stderr: bool = False, columns: int = 120) -> Console:
    """A console that takes nothing for markup or an emoji (`Druck [bar]`, `n [/min]`, `PLC:fan:1`); `columns` wide if a file or a pipe."""
    known = Console(stderr=stderr).is_terminal
    return Console(stderr=stderr, markup=False, emoji=False, width=None if known else columns)
