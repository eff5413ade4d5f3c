"""Plain log files → lines in order: which stream, when, what. Training, backtest and replay read them; the text is what a shipper sends.

    format.timestamp   what an entry begins with; a line that does not begin with it goes on with the entry before (a stack trace)
    format.stream      found anywhere in an entry: which stream it is of; without one a file is a stream

Files may be gzip'ed; a folder means all files in it. Nothing is held in memory but the entry at hand, or what `by_stream` is asked for.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import re2
from numpy.typing import NDArray

from service.artifact import compiled
from service.errors import BadEvent, TableError
from service.events import MAX_MESSAGE_LENGTH, MAX_NAME_LENGTH
from service.features import parse_timestamp
from service.tables import UNITS, encoding

_FIELDS = {
    "Y": r"\d{4}", "y": r"\d{2}", "m": r"\d{1,2}", "d": r"[ \d]?\d", "e": r"[ \d]?\d", "b": r"[A-Z][a-z]{2}", "B": r"[A-Z][a-z]+",
    "a": r"[A-Z][a-z]{2}", "A": r"[A-Z][a-z]+", "H": r"\d{1,2}", "I": r"\d{1,2}", "p": r"[AaPp][Mm]", "M": r"\d{2}", "S": r"\d{2}",
    "f": r"\d{1,9}", "j": r"\d{3}", "z": r"(?:Z|[+-]\d{2}:?\d{2})", "Z": r"[A-Z]{2,5}", "s": r"\d{9,10}(?:\.\d+)?",
    "T": r"\d{2}:\d{2}:\d{2}", "F": r"\d{4}-\d{2}-\d{2}", "%": "%",
}  # fmt: skip
"""What each field of a time format looks like."""
_LONG = {"T": "%H:%M:%S", "F": "%Y-%m-%d", "e": "%d"}
"""Fields that only C's strptime knows."""
_PER_SECOND = {"%s": 1} | UNITS
"""Time formats that count since 1970."""
_LOOKS_LIKE = {13: "ms", 16: "us", 19: "ns"}
"""What so many digits are, these days."""
_FINER = re.compile(r"([.,]\d{6})\d+")
"""Nanoseconds; strptime knows microseconds at most."""
_GZIP = b"\x1f\x8b"
_PACKED = {b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"BZh9": "bzip2", b"PK\x03\x04": "zip"}
"""How files begin that would be read as one line of garbage."""
HEAD_BYTES = 4_096
_NO_TEXT = bytes(set(range(32)) - set(b"\x01\x02\x03\b\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f")) + b"\x7f"
"""Control characters that a text does not have (it may have colours, and separators); a file of which a twentieth are such is none."""
_EXPORTED = b"__CURSOR="
SPARED = 1_000
"""Lines whose time is none, by which they may exceed the others of a file before it is given up."""
MAX_LINES = 2_000_000
"""Lines held in memory at once by `by_stream`."""
SHOWN_LENGTH = 64
_DAY = 86_400.0
_HALF_A_YEAR = 180 * _DAY


class Entry(NamedTuple):
    """One line of a log, with the lines that go on with it."""

    stream: str
    seconds: float  # since 1970, NaN = the file does not say
    text: str  # as it was written, without its line end


@dataclass(frozen=True)
class LogFormat:
    """How entries are read. Raises TableError for an expression or a time format that cannot be used."""

    timestamp: str = ""
    """RE2: what an entry begins with, up to its message. The group `time`, else the first one, else all of it is the time. "" = nothing."""
    time: str = ""
    """strptime's format of the time, or since 1970 `%s` seconds, `ms`, `us`, `ns`; "" = RFC 3339, ISO 8601 or seconds since 1970."""
    stream: str = ""
    """RE2: the first group, else all of it, names the stream."""
    _begins: Any = field(init=False, repr=False, compare=False)
    _names: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.time and not self.timestamp:
            object.__setattr__(self, "timestamp", f"({_expression(self.time)})\\s*")
        try:
            for name, pattern in (("_begins", self.timestamp), ("_names", self.stream)):
                object.__setattr__(self, name, compiled(pattern) if pattern else None)
        except ValueError as error:
            raise TableError(f"{error}.") from error

    @property
    def header(self) -> str:
        """For `Lines`: what is cut off before a line is matched."""
        return self.timestamp

    def begins(self, line: str) -> str | None:
        """The time that a line begins an entry with, "" where the format names none; None = it goes on with the entry before."""
        if self._begins is None:
            return None if line[:1].isspace() else ""
        found = self._begins.match(line)
        return None if found is None else _named(found, "time")

    def stream_of(self, text: str, file: str) -> str | None:
        """None = the entry names none."""
        if self._names is None:
            return file
        found = self._names.search(text)
        return None if found is None else (_named(found, "stream") or "")[:MAX_NAME_LENGTH] or None


@dataclass
class Counted:
    """What was read, and what could not be used."""

    entries: int = 0
    lines: int = 0
    without_stream: int = 0
    without_time: int = 0
    headless: int = 0
    """Lines before the first entry of a file."""
    headless_one: str = ""
    """What the first of them begins with."""
    torn: int = 0
    """Lines that begin as entries do, but with what is no time."""
    torn_one: str = ""
    """What the first of them begins with."""

    @property
    def left_out(self) -> str:
        torn = f" {self.torn:,} lines begin with what is no time ({self.torn_one!r}), and go on with the entry before." if self.torn else ""
        untimed = ", so pauses are not known: give --time-format, or --timestamp-regex '(\\S+) ' for ISO 8601" if self.without_time else ""
        return (
            f"Left out: {self.without_stream:,} that name no stream, {self.headless:,} lines before the first entry; "
            f"{self.without_time:,} have no time{untimed}.{torn}"
        )


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and those in the folders, sorted. Raises TableError where there are none."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise TableError(f"{path} does not exist.")
        found += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not found:
        raise TableError(f"{', '.join(map(str, paths))}: no file in there.")
    return found


def read(paths: Sequence[Path], format_: LogFormat, counted: Counted | None = None) -> Iterator[Entry]:
    """The entries of all files, one file after the other. Raises TableError for a file that cannot be read, and where there is no entry."""
    counted = counted if counted is not None else Counted()
    for file in files_of(paths):
        yield from _of_file(file, format_, counted)
    if not counted.entries:
        raise _nothing(paths, counted)


def _of_file(file: Path, format_: LogFormat, counted: Counted) -> Iterator[Entry]:
    for seconds, text in _entries(file, format_, counted):
        stream = format_.stream_of(text, file.name)
        if stream is None:
            counted.without_stream += 1
            continue
        counted.entries += 1
        counted.without_time += math.isnan(seconds)
        yield Entry(stream, seconds, text[:MAX_MESSAGE_LENGTH])


def _nothing(paths: Sequence[Path], counted: Counted) -> TableError:
    why = "They are empty."
    if counted.without_stream:
        why = f"In none of {counted.without_stream:,} entries --stream-regex finds a stream."
    elif counted.headless:
        why = f"None of {counted.headless:,} lines begins as --timestamp-regex or --time-format says, such as {counted.headless_one!r}."
        if counted.headless_one.startswith("\x1b"):
            why += " It begins with a colour: take colours out first (sed 's/\\x1b\\[[0-9;]*m//g')."
    return TableError(f"{', '.join(map(str, paths))}: no line of a stream in there. {why}")


@dataclass(frozen=True)
class Spoken:
    """The lines of one stream in order of time, N events. None in place of a text: the session before it ended by silence."""

    stream: str
    seconds: NDArray[np.float64]  # [N]; an end has the time of its session's last line, as it has in the service
    texts: list[str | None]
    source: str
    """The first file that it is said in."""


def by_stream(paths: Sequence[Path], format_: LogFormat, silence: float | None, counted: Counted | None = None) -> list[Spoken]:
    """All lines, and an end behind each that was followed by more than `silence` seconds without one in its stream or in all files.

    Raises TableError, also for a line without a time, and for more than MAX_LINES.
    """
    counted = counted if counted is not None else Counted()
    streams: dict[str, list[tuple[float, str]]] = {}
    source: dict[str, str] = {}
    count = 0
    for file in files_of(paths):
        for stream, seconds, text in _of_file(file, format_, counted):
            if math.isnan(seconds):
                raise TableError(f"{file} does not say when {text[:64]!r} was: give --time-format, or --timestamp-regex with the time.")
            if (count := count + 1) > MAX_LINES:
                raise TableError(f"More than {MAX_LINES:,} lines: take them in parts.")
            streams.setdefault(stream, []).append((seconds, text))
            source.setdefault(stream, file.as_posix())
    if not streams:
        raise _nothing(paths, counted)
    newest = max(seconds for rows in streams.values() for seconds, _ in rows)
    return [_spoken(stream, rows, silence, newest, source[stream]) for stream, rows in streams.items()]


def _spoken(stream: str, rows: list[tuple[float, str]], silence: float | None, newest: float, source: str) -> Spoken:
    rows.sort(key=lambda row: row[0])
    seconds, texts = list[float](), list[str | None]()
    for (at, text), (following, _) in zip(rows, [*rows[1:], (newest, "")], strict=True):
        seconds.append(at)
        texts.append(text)
        if silence is not None and following - at > silence:
            seconds.append(at)
            texts.append(None)
    return Spoken(stream, np.array(seconds), texts, source)


def _entries(file: Path, format_: LogFormat, counted: Counted) -> Iterator[tuple[float, str]]:
    """(seconds since 1970 or NaN, text) of each entry that is not blank. Raises TableError, also where most times of the file are none."""
    times, seconds, size = _Times(format_, file), math.nan, 0
    parts: list[str] = []
    for line in _lines(file):
        counted.lines += 1
        said = format_.begins(line)
        began = None if said is None else times.of(said)
        if said is not None and began is None:
            counted.torn, counted.torn_one = counted.torn + 1, counted.torn_one or said[:SHOWN_LENGTH]
        if began is None and parts:
            if size < MAX_MESSAGE_LENGTH:
                parts.append(line)
                size += len(line) + 1
            continue
        if parts:
            yield seconds, "\n".join(parts).rstrip()
        if (began is None and format_.timestamp) or not line.strip():
            counted.headless += bool(line.strip())
            counted.headless_one = counted.headless_one or line.strip()[:SHOWN_LENGTH]
            parts = []
            continue
        seconds, parts, size = math.nan if began is None else began, [line], len(line)
    if parts:
        yield seconds, "\n".join(parts).rstrip()
    times.settle()


def _lines(file: Path) -> Iterator[str]:
    """Of one that is longer than a message the beginning: a file need not have line ends. Raises TableError."""
    try:
        with file.open("rb") as raw:
            begins = raw.read(6)
        if packed := next((name for magic, name in _PACKED.items() if begins.startswith(magic)), None):
            raise TableError(f"{file} is packed by {packed}, which is not read here: unpack it, or pack it by gzip.")
        opened = gzip.open if file.suffix == ".gz" or begins.startswith(_GZIP) else open
        with opened(file, "rb") as content:
            head = content.read(HEAD_BYTES)
        written_in = encoding(head[:2])
        if why := _no_lines(head, written_in):
            raise TableError(f"{file} {why}")
        with opened(file, "rt", encoding=written_in, errors="replace", newline="\n") as lines:
            goes_on = False
            while line := lines.readline(MAX_MESSAGE_LENGTH):
                if not goes_on:
                    yield line.rstrip("\r\n")
                goes_on = not line.endswith("\n")
    except (OSError, EOFError) as error:
        raise TableError(f"{file} cannot be read: {error}.") from error


def _no_lines(head: bytes, written_in: str) -> str:
    """Why what a file begins with is no log of lines; "" = it is one."""
    if head.startswith(_EXPORTED):
        return "is journald's export, a field a line: give `journalctl -o short-iso` or `-o json`."
    if written_in.startswith("utf-16") or not head.strip(b"\0"):  # a log that was truncated while it was written begins with zeros
        return ""
    odd = len(head) - len(head.translate(None, _NO_TEXT))
    if 20 * odd <= len(head):
        return ""
    zeros = " Is it UTF-16 without its mark? Turn it into UTF-8 (iconv)." if 3 * head.count(0) > len(head) else ""
    return f"is no text: of its first {len(head):,} bytes {odd:,} are control characters. Leave it out.{zeros}"


class _Times:
    """Times as they are written in one file → seconds since 1970."""

    def __init__(self, format_: LogFormat, file: Path) -> None:
        self._format = re.sub("%([TFe])", lambda found: _LONG[found[1]], format_.time)
        self._file = file
        self._per_second = _PER_SECOND.get(format_.time)
        self._yearless = bool(format_.time) and self._per_second is None and not re.search("%[YyF]", format_.time)
        # A year that is not written is the file's own, or the one before where its first line would be of the time after it was written;
        # a log that crosses its end goes on in the next one.
        self._written = file.stat().st_mtime
        self._year = datetime.fromtimestamp(self._written, UTC).year
        self._last = math.nan
        self._read = self._wrong = 0
        self._refusal: TableError | None = None

    def of(self, said: str) -> float | None:
        """NaN where nothing is said, None where it is no time. Raises TableError where nearly all so far were none."""
        if not said:
            return math.nan
        try:
            seconds = self._parsed(said) if self._per_second is None else self._counted(said, self._per_second)
        except (ValueError, BadEvent) as error:
            form = f" of the form {self._format!r}" if self._format else " of ISO 8601, and no seconds since 1970"
            hint = "" if self._format else " Give --time-format."
            if said.isdigit() and len(said) in _LOOKS_LIKE:
                hint = f" It looks like --time-format {_LOOKS_LIKE[len(said)]}."
            refusal = TableError(f"{self._file}: {said[:SHOWN_LENGTH]!r} is no time{form}.{hint}")
            refusal.__cause__ = error
            self._refusal = self._refusal or refusal
            self._wrong += 1
            self.settle(SPARED)
            return None
        self._read += 1
        self._last = seconds
        return seconds

    def settle(self, spared: int = 0) -> None:
        """Raises TableError where more times were none than were read, by more than `spared`: the format is another one."""
        if self._refusal is not None and self._wrong > self._read + spared:
            raise self._refusal

    def _counted(self, said: str, per_second: int) -> float:
        """Since 1970; the float next to it, as at the doors."""
        return parse_timestamp((int(said) if said.isdigit() else float(said)) / per_second)

    def _parsed(self, said: str) -> float:
        if not self._format:
            number = said.replace(".", "", 1).isdigit()
            return parse_timestamp(float(said) if number else said.replace(",", "."))
        said = _FINER.sub(r"\1", said)
        text, form = (f"{self._year} {said}", f"%Y {self._format}") if self._yearless else (said, self._format)
        moment = datetime.strptime(text, form)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if self._yearless and math.isnan(self._last) and seconds > self._written + _DAY:
            self._year -= 1
            return self._parsed(said)
        if self._yearless and seconds < self._last - _HALF_A_YEAR:
            self._year += 1
            return self._parsed(said)
        return seconds


def _named(found: Any, name: str) -> str:
    groups = found.groupdict()
    text = groups[name] if name in groups else found.group(1) if found.re.groups else found.group()
    return text or ""


def _expression(time: str) -> str:
    """What a time of this format looks like. Raises TableError."""
    if time in _PER_SECOND and time != "%s":
        return r"\d+"
    parts = re.split("%(.?)", time)
    unknown = next((letter for letter in parts[1::2] if letter not in _FIELDS), None)
    if unknown is not None:
        raise TableError(f"%{unknown} of the time format {time!r} is not known here; there is {', '.join('%' + one for one in _FIELDS)}.")
    return "".join(_FIELDS[part] if i % 2 else re2.escape(part) for i, part in enumerate(parts))
