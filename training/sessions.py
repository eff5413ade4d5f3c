"""Log lines as a detector learns them: sessions of codes, with the seconds between them and the numbers they carry.

    0 = a pattern that no template matches · 1..V = templates · V + 1 = the end of the session

Shapes: T lines, N sessions, V templates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.artifact import NEW
from service.errors import TableError
from training.data import Float32

Ints = NDArray[np.int64]
MOST_NUMBERS = 4
MAX_KEYS = 100_000
"""Different keys of a file of key sequences: more are no keys, but values."""


@dataclass(frozen=True)
class Session:
    """Lines of one stream, from a beginning to an end. A stream that never ends is one session that has not ended."""

    stream: str
    codes: Ints  # [T]
    gaps: Float32  # [T] seconds since the line before, NaN = none or not known
    numbers: Float32  # [T, 4], NaN = none
    ended: bool = True
    first: bool = True  # begins where the session began
    lines: tuple[str, ...] = ()  # as they were written, where that is known
    start: int = 0  # lines of the session before these

    def __len__(self) -> int:
        return len(self.codes)

    def cut(self, start: int, stop: int) -> Session:
        """Lines start to stop; where something was cut off, the rest neither begins nor ends the session."""
        stop = min(stop, len(self))
        return replace(
            self,
            codes=self.codes[start:stop],
            gaps=self.gaps[start:stop],
            numbers=self.numbers[start:stop],
            ended=self.ended and stop == len(self),
            first=self.first and start == 0,
            lines=self.lines[start:stop],
            start=self.start + start,
        )

    def knowing(self, known: NDArray[np.bool_]) -> Session:
        """The same for one that knows only the templates whose codes `known` [V + 2] marks."""
        return replace(self, codes=np.where(known[self.codes], self.codes, NEW))


@dataclass(frozen=True)
class Sessions:
    """What a log detector is trained on."""

    sessions: list[Session]  # in the order of their beginnings
    templates: list[str]
    sha256: str

    @property
    def codes(self) -> int:
        """V + 2: templates, the new pattern, the end."""
        return len(self.templates) + 2

    @property
    def lines(self) -> int:
        return sum(map(len, self.sessions))

    @property
    def streams(self) -> int:
        return len({session.stream for session in self.sessions})


def read_sessions(paths: Sequence[Path]) -> Sessions:
    """Files with a session a line: keys separated by blanks, before them an optional `id,`. Raises TableError that names the line."""
    read: list[tuple[str, list[str]]] = []
    digest = hashlib.sha256()
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TableError(f"{path} cannot be read: {error.strerror}.") from error
        digest.update(content)
        read += _lines_of(path, content)
    templates = _ordered({key for _, keys in read for key in keys})
    if not templates:
        raise TableError(f"{', '.join(map(str, paths))}: there is no session, which is a line of keys separated by blanks.")
    if len(templates) > MAX_KEYS:
        raise TableError(f"{len(templates):,} different keys are more than {MAX_KEYS:,}: these are no keys of patterns.")
    codes = {key: code for code, key in enumerate(templates, start=1)}
    return Sessions([keyed(name, [codes[key] for key in keys]) for name, keys in read], templates, digest.hexdigest())


def keyed(stream: str, codes: Sequence[int]) -> Session:
    """A session of which nothing but the codes is known."""
    T = len(codes)
    return Session(stream, np.array(codes, np.int64), np.full(T, np.nan, np.float32), np.full((T, MOST_NUMBERS), np.nan, np.float32))


def _lines_of(path: Path, content: bytes) -> list[tuple[str, list[str]]]:
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        name, comma, keys = line.rpartition(",")
        if comma and " " in name.strip():
            raise TableError(f"{path}, line {number}: keys are separated by blanks, one comma may stand behind the session's id.")
        if keys.strip():
            found.append((name.strip() or f"{path.stem}-{number}", keys.split()))
    return found


def _ordered(keys: set[str]) -> list[str]:
    """As numbers where all are."""
    return sorted(keys, key=lambda key: (int(key), key) if key.isdecimal() else (1 << 62, key))
