"""What commands say to people: names and lines of theirs as they are, but for what a terminal would do instead of showing it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Without control characters: by one that begins an escape sequence, a line of somebody's log writes a title or into the clipboard."""
    return _CONTROLS.sub("", text)


class Terminal(Console):
    """Of which only the colours are commands to the terminal, and none of the texts."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def terminal(*, stderr: bool = False, columns: int = 120) -> Console:
    """A console that takes nothing for markup or an emoji (`Druck [bar]`, `n [/min]`, `PLC:fan:1`); `columns` wide if a file or a pipe."""
    known = Console(stderr=stderr).is_terminal
    return Terminal(stderr=stderr, markup=False, emoji=False, width=None if known else columns)
