"""A plant's table → files that `fit`, `backtest` and `replay` read: `python -m service split`.

    wide table ── read_batches ──► columns, named by a template such as {stream}.{feature} ──► OUT/STREAM.csv: timestamp, feature, ...

Read twice where some column has no number at first: it may be a sensor that was off then, or words to the end.

A historian writes one table with a column for each sensor, in local times, with decimal commas, and words ("ok", "Bad") among the numbers;
what trains and scores wants a file for each stream.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import numpy as np

from service.errors import TableError
from service.tables import Dialect, Notify, ReadOptions, Source, Table, find_sources, read_batches

CELLS = 1 << 22
"""Cells of a batch: some 100 MB with the texts they are read from."""
SINGLE = "value"
"""Feature of a stream with one: the one that the shipped detector takes."""
SHOWN = 8
PLAIN = Dialect()


@dataclass
class Done:
    """What has been written, and what was left out."""

    rows: Counter[str] = field(default_factory=Counter)  # stream → rows written
    features: dict[str, list[str]] = field(default_factory=dict)  # stream → its features
    last: dict[str, float] = field(default_factory=dict)  # stream → time of its last row
    unnamed: list[str] = field(default_factory=list)  # columns that the template does not fit
    words: dict[str, str] = field(default_factory=dict)  # columns of words alone → one of them
    missing: Counter[str] = field(default_factory=Counter)  # column → cells that are no number among those that are

    def report(self) -> list[str]:
        """Sentences for people."""
        written = {name: rows for name, rows in self.rows.items() if rows}
        shapes = Counter(len(self.features[name]) for name in written)
        said = [f"{len(written):,} streams, {sum(written.values()):,} rows; features a stream: {_counted(shapes)}."]
        empty = [name for name, rows in self.rows.items() if not rows]
        if empty:
            said.append(f"Without a single number, so without a file: {_some(empty)}.")
        if self.words:
            said.append(f"Left out, words alone: {_some(f'{name} ({word!r})' for name, word in self.words.items())}.")
        if self.missing:
            said.append(f"Words among numbers were taken for missing: {_some(f'{name} ({n:,})' for name, n in self.missing.items())}.")
        if self.unnamed:
            said.append(f"Left out, not of the form of --columns: {_some(self.unnamed)}.")
        return said


def split(paths: Iterable[Path], out: Path, template: str, options: ReadOptions, dialect: Dialect = PLAIN, notify: Notify = print) -> Done:
    """Write the streams of these tables under `out`. Raises TableError; what was written by then stays."""
    if out.exists() and any(out.iterdir()):
        raise TableError(f"{out} is not empty: name another --out, or empty it.")
    named, done = _expression(template), Done()
    for source in find_sources(paths):
        strange: Counter[str] = Counter()

        def tell(column: str, cell: str, strange: Counter[str] = strange) -> None:
            strange[column] += 1

        alone = _words_alone(source, options, dialect)
        done.words |= alone
        places: dict[str, dict[str, str]] | None = None
        for table in read_batches(source, options, notify, CELLS, replace(dialect, strange=tell)):
            if places is None:
                places = _places(source, [name for name in table.columns if name not in alone], named, done)
            times = [_time(second) for second in table.timestamps.tolist()]
            for stream, columns in places.items():
                _append(out, stream, columns, table, times, done)
        done.missing.update({name: n for name, n in strange.items() if name not in done.words})
    return done


def _words_alone(source: Source, options: ReadOptions, dialect: Dialect) -> dict[str, str]:
    """Columns with words and without a single number → their first word. Reads until each column has shown a number."""
    words: dict[str, str] = {}
    blank: set[str] | None = None

    def tell(column: str, cell: str) -> None:
        words.setdefault(column, cell)

    for table in read_batches(source, options, lambda _said: None, CELLS, replace(dialect, strange=tell)):
        blank = {name for name in (table.columns if blank is None else blank) if np.isnan(table.columns[name]).all()}
        if not blank:
            break
    return {name: word for name, word in words.items() if name in (blank or ())}


def _expression(template: str) -> re.Pattern[str]:
    """What a column's name looks like. Raises TableError."""
    parts = re.split(r"(\{\w*\})", template)
    places = parts[1::2]
    if not 1 <= len(places) <= 2 or len(set(places)) < len(places) or set(places) - {"{stream}", "{feature}"}:
        raise TableError(f"--columns {template!r} names no {{stream}} or {{feature}}, or something else: such as '{{stream}}.{{feature}}'.")
    if re.search(r"\}\{", template):
        raise TableError(f"--columns {template!r} has nothing between {{stream}} and {{feature}} that tells where one ends.")
    return re.compile("".join(f"(?P<{part[1:-1]}>.+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _places(source: Source, names: list[str], named: re.Pattern[str], done: Done) -> dict[str, dict[str, str]]:
    """Stream → {feature: column}; without {stream} the file is one. Raises TableError where none fits, or a stream cannot name a file."""
    places: dict[str, dict[str, str]] = {}
    for name in names:
        found = named.fullmatch(name)
        if found is None:
            done.unnamed.append(name)
            continue
        stream = found.groupdict().get("stream") or source.name.rpartition(".")[0]
        where = PurePosixPath(stream)
        if where.is_absolute() or ".." in where.parts or "\0" in stream:
            raise TableError(f"{source.path}: column {name!r} names the stream {stream!r}, which cannot be the name of a file.")
        places.setdefault(stream, {})[found.groupdict().get("feature", SINGLE)] = name
    if not places:
        raise TableError(f"{source.path}: no column is of the form {named.pattern!r}; there are {_some(names)}.")
    return places


def _append(out: Path, stream: str, columns: dict[str, str], table: Table, times: list[str], done: Done) -> None:
    """Those rows of the batch that have a number."""
    known = done.features.setdefault(stream, list(columns))
    if known != list(columns):
        raise TableError(f"{table.name}: stream {stream!r} has the features {_some(columns)}, in a file before {_some(known)}.")
    values = np.stack([table.columns[name] for name in columns.values()], axis=1)
    kept = np.flatnonzero(~np.isnan(values).all(axis=1))
    done.rows[stream] += 0
    if len(kept) == 0:
        return
    if table.timestamps[kept[0]] < done.last.get(stream, -math.inf):
        raise TableError(
            f"{table.name}: stream {stream!r} begins at {times[kept[0]]}, before the end of the file before: name them in order of time."
        )
    done.last[stream] = float(table.timestamps[kept[-1]])
    path = out / f"{stream}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [] if done.rows[stream] else [",".join(map(_cell, ["timestamp", *columns]))]
    for i, row in zip(kept.tolist(), values[kept].tolist(), strict=True):
        lines.append(",".join([times[i], *("" if math.isnan(value) else repr(value) for value in row)]))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    done.rows[stream] += len(kept)


def _cell(name: str) -> str:
    quoted = name.replace('"', '""')
    return f'"{quoted}"' if re.search(r'[",\n;\t]', name) else name


def _time(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat().replace("+00:00", "Z")


def _counted(shapes: Counter[int]) -> str:
    return ", ".join(f"{size} ({streams:,} streams)" for size, streams in sorted(shapes.items())) or "none"


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN:,} more" if len(shown) > SHOWN else "")
