"""A plant's table → files that `fit`, `backtest` and `replay` read: `python -m service split`.

    wide table ── read_batches ──► columns, named by a template such as {stream}.{feature} ──► OUT/STREAM.csv: timestamp, feature, ...
    long table ── read_long ──► tags, named by the same template ──► Spill, by stream ──► aligned ──┘

A wide one is read twice where some column has no number at first: it may be a sensor that was off then, or words to the end.

A historian writes one table with a column for each sensor, or with a row for each reading, in local times, with decimal commas, and words
("ok", "Bad") among the numbers; what trains and scores wants a file for each stream.
"""

from __future__ import annotations

import csv
import gc
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np

from service.errors import TableError
from service.events import some
from service.long_tables import Long, Spill, Suggestion, Tags, aligned, read_long, suggestion
from service.outputs import naming
from service.sentinels import Sentinels, missing_of, places
from service.tables import (
    ONE_COMMA,
    Dialect,
    Float64,
    Notify,
    ReadOptions,
    Rowless,
    Source,
    Table,
    Unsorted,
    find_sources,
    fits,
    read_batches,
    refuse_idle,
)

CELLS = 1 << 22
"""Cells of a batch: some 100 MB with the texts they are read from."""
SINGLE = "value"
"""Feature of a stream with one: the one that the shipped detector takes."""
SHOWN = 8
HALF = 0.5
COMMA = re.compile(r"\s*[-+]?(?:\d{1,3}(?:\.\d{3})+|\d+),\d+\s*")
FEATURE_LAST = "(?P<feature>.+)"
UNIT = re.compile(r"(?<=\S)\s*(?:\[[^\[\]]*\]|\([^()]*\))$")
"""A unit behind a feature's name, with points of its own: `Druck [bar abs.]`."""
PLAIN = Dialect()
Show = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is done, and of how much where that is known."""


@dataclass
class Done:
    """What has been written, and what was left out."""

    rows: Counter[str] = field(default_factory=Counter)  # stream → rows written
    features: dict[str, list[str]] = field(default_factory=dict)  # stream → its features
    last: dict[str, float] = field(default_factory=dict)  # stream → time of its last row
    begin: float = math.inf  # time of the first row of all
    unzoned: bool = False  # times named no zone, and neither did --zone
    unnamed: list[str] = field(default_factory=list)  # columns that the template does not fit
    partly: dict[str, None] = field(default_factory=dict)  # features that some files of their stream lack
    words: dict[str, str] = field(default_factory=dict)  # columns of words alone → one of them
    missing: Counter[str] = field(default_factory=Counter)  # column → cells that are no number among those that are
    comma: tuple[str, str] | None = None  # a column and its first word that is a number with a decimal comma
    hints: list[str] = field(default_factory=list)  # what to do about it
    cells: int = 0  # of the rows written
    numbers: int = 0  # of these cells
    sentinels: Sentinels = field(default_factory=Sentinels)  # of columns or tags
    blanked: Counter[str] = field(default_factory=Counter)  # column or tag → readings of --missing
    # of long tables; by tag
    bad: Counter[str] = field(default_factory=Counter)  # readings whose quality is not good
    bad_words: set[str] = field(default_factory=set)  # such qualities
    twice: Counter[str] = field(default_factory=Counter)  # readings at a time for which a later row has another
    unclear: int = 0  # readings of the hour that a clock set back has twice, of which it cannot be said which

    def report(self) -> list[str]:
        """Sentences for people."""
        written = {name: rows for name, rows in self.rows.items() if rows}
        shapes = Counter(len(self.features[name]) for name in written)
        span = f" from {_time(self.begin)} to {_time(max(self.last.values()))}" if self.last else ""
        span += ", taken for UTC as they name no zone (--zone)" if self.unzoned else ""
        said = [f"{len(written):,} streams, {sum(written.values()):,} rows{span}; features a stream: {_counted(shapes)}."]
        empty = [name for name, rows in self.rows.items() if not rows]
        if empty:
            said.append(f"Without a single number, so without a file: {_some(empty)}.")
        if self.words:
            said.append(f"Left out, words alone: {_some(f'{name} ({word!r})' for name, word in self.words.items())}.")
        if self.partly:
            said.append(f"Not in all files, and missing in the rows of the others: {_some(self.partly)}.")
        if self.missing:
            said.append(f"Words among numbers were taken for missing: {_counts(self.missing)}.")
        if self.blanked:
            said.append(f"Numbers of --missing were taken for missing: {_counts(self.blanked)}.")
        if self.bad:
            said.append(f"Of another quality ({_some(map(repr, sorted(self.bad_words)))}), so taken for missing: {_counts(self.bad)}.")
        if self.twice:
            said.append(f"More than one reading at the same time, of which the last row's was kept: {_counts(self.twice)}.")
        if self.unclear:
            said.append(f"Of the hour that a clock set back has twice, in no order that tells which: {self.unclear:,} readings; the first.")
        if self.unnamed:
            said.append(f"Left out, not of the form of --columns: {_some(self.unnamed)}.")
        return [*said, *self._uneven(), *self._codes(), *self.hints, *self.commas()]

    def word(self, name: str, cell: str) -> None:
        """Take down a word of this column or tag."""
        if self.comma is None and COMMA.fullmatch(cell):
            self.comma = name, cell

    def commas(self) -> list[str]:
        """Whether numbers were taken for words."""
        if self.comma is None:
            return []
        name, cell = self.comma
        if ONE_COMMA.fullmatch(cell):
            return [f"{cell!r} in {name}: --decimal . where its comma is between thousands, --decimal , where decimals follow it."]
        return [f"{cell!r} in {name} has a decimal comma: --decimal , reads it."]

    def _codes(self) -> list[str]:
        """Numbers that are far from all others of their column."""
        found = self.sentinels.found()
        if not found:
            return []
        how = f"{missing_of(found)} takes them for missing."
        return [f"Far from all other readings, as devices write them that have none: {places(found)}. {how}"]

    def _uneven(self) -> list[str]:
        """Streams that lack what most have: they do not go into one detector with them."""
        shapes = Counter(frozenset(self.features[name]) for name, rows in self.rows.items() if rows)
        if len(shapes) < 2:
            return []
        usual, streams = shapes.most_common(1)[0]
        lacking = [
            f"{name} ({_some(sorted(usual - set(self.features[name])))})"
            for name, rows in self.rows.items()
            if rows and set(self.features[name]) < usual
        ]
        return [f"Without features that {streams:,} streams have: {_some(lacking)}."] if lacking and streams > 1 else []


@dataclass(frozen=True)
class _Job:
    """What is the same for all tables of a split."""

    out: Path
    named: re.Pattern[str]
    options: ReadOptions
    dialect: Dialect
    notify: Notify
    show: Show


def split(
    paths: Iterable[Path],
    out: Path,
    template: str,
    options: ReadOptions,
    dialect: Dialect = PLAIN,
    notify: Notify = print,
    long: Long | None = None,
    show: Show = lambda _doing, _done, _of: None,
) -> Done:
    """Write the streams of these tables under `out`. Raises TableError, NotWritten; what was written by then stays."""
    with naming(out):
        if out.exists() and any(out.iterdir()):
            raise TableError(f"{out} is not empty: name another --out, or empty it.")
    named, sources, options = _expression(template), find_sources(paths), replace(options, timed=True)
    unzoned: set[bool] = set()
    if dialect.zone is UTC:
        dialect = replace(dialect, unzoned=lambda: unzoned.add(True))
    job = _Job(out, named, options, dialect, notify, show)
    with _uncollected(), naming(out):
        done = _split_all_wide(sources, job) if long is None else _split_long(sources, job, long)
    done.unzoned = bool(unzoned)
    if not any(done.rows.values()):
        raise TableError(" ".join([f"There is no number in {_some(str(source.path) for source in sources)}.", *done.report()[1:]]))
    return done


@contextmanager
def _uncollected() -> Iterator[None]:
    """Rows are lists in no cycle: looking through them for garbage takes as long as reading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _split_all_wide(sources: list[Source], job: _Job) -> Done:
    refuse_idle(sources, job.options)
    done, rowless = Done(), Rowless(sources, job.notify)
    for source in sources:
        maybe = suggestion(source, job.options, job.dialect)
        if maybe is not None:
            _suggest(source, maybe, done)
        try:
            with rowless.left_out(source):
                _split_wide(source, job, done)
        except Unsorted as error:
            if not done.words and maybe is None:
                raise
            raise TableError(f"{error.detail} If it has a row for each reading, name the columns: --tag COLUMN --value COLUMN.") from None
    rowless.refuse_all()
    return done


def _suggest(source: Source, maybe: Suggestion, done: Done) -> None:
    """Raises TableError where the same times come again with other tags."""
    how = " ".join([f"--tag {maybe.tag!r}", *(f"--value {value!r}" for value in maybe.values)])
    how += " --columns '{stream}.{feature}'" if len(maybe.values) > 1 else ""
    if maybe.sure:
        raise TableError(
            f"{source.path} has several rows of the same time, with other words in column {maybe.tag!r}. Split it with {how}; or "
            f"leave the column out with --exclude {maybe.tag!r}."
        )
    done.hints.append(f"If column {maybe.tag!r} of {source.name} names the sensor of each row, split it with {how} instead.")


def _split_wide(source: Source, job: _Job, done: Done) -> None:
    strange: Counter[str] = Counter()

    def tell(column: str, cell: str) -> None:
        strange[column] += 1
        done.word(column, cell)

    alone = _words_alone(source, job.options, job.dialect)
    for name, cell in alone.items():
        done.word(name, cell)
    places: dict[str, dict[str, str]] | None = None
    rows = 0
    for table in read_batches(source, job.options, job.notify, CELLS, replace(job.dialect, strange=tell)):
        if places is None:
            places = _places(source, table, alone, job.named, done)
        for stream, columns in places.items():
            _append(job.out, stream, columns, table, job.dialect.missing, done)
        rows += len(table)
        job.show(f"rows of {source.name}", rows, None)
    done.missing.update({name: n for name, n in strange.items() if name not in done.words})


def _split_long(sources: list[Source], job: _Job, long: Long) -> Done:
    tags, plan, rowless = Tags(), Plan(job.named), Rowless(sources, job.notify)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with closing(Spill(job.out.parent)) as spill:
        for source in sources:
            tags.file = "" if "stream" in job.named.groupindex else source.name
            rows = 0
            with rowless.left_out(source):
                for readings in read_long(source, job.options, long, job.dialect, tags):
                    plan.learn(source, tags)
                    streams, features = np.array(plan.places, dtype=np.int64).reshape(-1, 2)[readings.tags].T
                    readings.records["feature"] = features
                    spill.add(streams[streams >= 0], readings.records[streams >= 0])
                    rows += len(streams)
                    job.show(f"rows of {source.name}", rows, None)
        rowless.refuse_all()
        done = _write_long(job, spill, tags, plan, long)
    idle = [pattern for pattern in sorted(job.options.exclude) if not any(fits(tag, pattern) for tag in tags.left_out)]
    if idle:
        done.hints.append(f"No tag is called {_some(map(repr, idle))} (--exclude); there are {_some(tags.names)}.")
    return done


@dataclass
class Plan:
    """Where the readings of each tag go."""

    named: re.Pattern[str]
    streams: dict[str, int] = field(default_factory=dict)  # name → number, and so below
    features: dict[str, int] = field(default_factory=dict)
    places: list[tuple[int, int]] = field(default_factory=list)  # by tag: stream and feature, -1 = not of the form
    unnamed: list[str] = field(default_factory=list)

    def learn(self, source: Source, tags: Tags) -> None:
        """Place the tags that are new. Raises TableError where a stream cannot name a file."""
        for tag in tags.names[len(self.places) :]:
            found = _found(source, tag, self.named)
            if found is None:
                self.places.append((-1, -1))
                self.unnamed.append(tag or "(rows without a tag)")
            else:
                stream, feature = (
                    numbers.setdefault(name, len(numbers)) for name, numbers in zip(found, (self.streams, self.features), strict=True)
                )
                self.places.append((stream, feature))


def _write_long(job: _Job, spill: Spill, tags: Tags, plan: Plan, long: Long) -> Done:
    if not plan.streams:
        raise TableError(f"No tag is of the form {plan.named.pattern!r}; there are {_some(plan.unnamed)}.")
    done = Done(unnamed=plan.unnamed, unclear=tags.unclear)
    columns, names = _tags_of(plan, tags, done), list(plan.features)
    for written, (name, key) in enumerate(plan.streams.items()):
        places = sorted(columns[key])
        if not places:
            continue
        known = done.features[name] = [names[place] for place in places]
        done.rows[name] += 0
        twice: Counter[int] = Counter()
        for seconds, values in aligned(spill, key, places, twice, long.every, long.hold):
            done.sentinels.look([tags.names[columns[key][place]] for place in places], values)
            _write(job.out, name, known, seconds, values, done)
        done.twice.update({tags.names[columns[key][places[i]]]: count for i, count in twice.items()})
        job.show("streams written", written + 1, len(plan.streams))
    if done.cells and done.numbers < HALF * done.cells and (advice := _fuller(long)):
        done.hints.append(f"Of the cells {done.numbers / done.cells:.0%} have a number: {advice}")
    return done


def _tags_of(plan: Plan, tags: Tags, done: Done) -> dict[int, dict[int, int]]:
    """Stream → feature → tag. A feature that is words alone in all streams is left out; in one of several it is a sensor that is off."""
    alone = [bool(tags.words[tag]) and not tags.numbers[tag] for tag in range(len(plan.places))]
    named = "feature" in plan.named.groupindex
    live = {place[1] for place, is_alone in zip(plan.places, alone, strict=True) if named and not is_alone}
    columns: dict[int, dict[int, int]] = {stream: {} for stream in plan.streams.values()}
    for tag, (stream, feature) in enumerate(plan.places):
        if stream < 0:
            continue
        name = tags.names[tag]
        if alone[tag] and feature not in live:
            done.words[name] = tags.first_word[tag]
            continue
        columns[stream][feature] = tag
        for lacks, counts in ((done.missing, tags.words), (done.bad, tags.bad), (done.blanked, tags.blanked)):
            lacks.update({name: counts[tag]} if counts[tag] else {})
    done.bad_words.update(*(words for tag, words in tags.bad_words.items() if tags.names[tag] in done.bad))
    for tag, cell in tags.first_word.items():
        done.word(tags.names[tag], cell)
    return columns


def _fuller(long: Long) -> str:
    """What would make rows with more numbers; "" = nothing that we know."""
    if not long.every:
        return (
            "sensors of a stream are seldom written at the same instant. --every SECONDS makes a row of the last readings of every so many "
            "seconds."
        )
    if not long.hold:
        return (
            f"sensors write less often than every {long.every:g} s. If they write changes alone, --hold SECONDS lets a reading stand for "
            "so long."
        )
    return ""


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


def _found(source: Source, name: str, named: re.Pattern[str]) -> tuple[str, str] | None:
    """Stream and feature of a column or tag; without {stream} the file is one. Raises TableError where a stream cannot name a file."""
    unit = UNIT.search(name) if named.pattern.endswith(FEATURE_LAST) else None
    bare, behind = (name[: unit.start()], unit[0]) if unit else (name, "")
    found = named.fullmatch(bare)
    if found is None:
        return None
    stream = found.groupdict().get("stream") or source.name.rpartition(".")[0]
    where = PurePosixPath(stream)
    if where.is_absolute() or ".." in where.parts or "\0" in stream:
        raise TableError(f"{source.path}: {name!r} names the stream {stream!r}, which cannot be the name of a file.")
    feature = found.groupdict().get("feature")
    return stream, SINGLE if feature is None else feature + behind


def _places(source: Source, table: Table, alone: dict[str, str], named: re.Pattern[str], done: Done) -> dict[str, dict[str, str]]:
    """Stream → {feature: column}, without features that are words alone in all streams. Raises TableError where none fits."""
    found = {name: _found(source, name, named) for name in table.columns}
    live = {place[1] for name, place in found.items() if place and name not in alone} if "feature" in named.groupindex else set()
    places: dict[str, dict[str, str]] = {}
    for name, place in found.items():
        if name in alone and (place is None or place[1] not in live):
            done.words[name] = alone[name]
        elif place is None:
            done.unnamed.append(name)
        else:
            places.setdefault(place[0], {})[place[1]] = name
            done.words.pop(name, None)  # a sensor that a file before had words alone of
    names = [name for name in table.columns if name not in alone]
    if not places and names:
        raise TableError(f"{source.path}: no column is of the form {named.pattern!r}; there are {_some(names)}.")
    return places


def _append(out: Path, stream: str, columns: dict[str, str], table: Table, missing: frozenset[float], done: Done) -> None:
    """Those rows of the batch that have a number."""
    known = done.features.setdefault(stream, list(columns))
    if new := [feature for feature in columns if feature not in known]:
        if done.rows[stream]:
            _widen(out, stream, new)
        known += new
    done.partly.update(dict.fromkeys(f"{stream}: {feature}" for feature in known if feature in new or feature not in columns))
    names = [columns.get(feature, feature) for feature in known]
    values = np.full((len(table), len(known)), np.nan)
    there = [feature in columns for feature in known]
    values[:, there] = table.matrix([name for name, found in zip(names, there, strict=True) if found])
    blank = np.isin(values, list(missing))
    values[blank] = np.nan
    done.blanked.update({name: count for name, count in zip(names, blank.sum(axis=0).tolist(), strict=True) if count})
    done.sentinels.look(names, values)
    begin = _write(out, stream, known, table.timestamps, values, done)
    if begin is not None:
        raise TableError(
            f"{table.name}: stream {stream!r} begins at {_time(begin)}, before the end of the file before: name them in order of time."
        )


def _widen(out: Path, stream: str, new: list[str]) -> None:
    """Give the rows that are written these features, as missing."""
    path = out / f"{stream}.csv"
    wider = path.with_suffix(".csv.wider")
    with path.open(encoding="utf-8", newline="") as file, wider.open("w", encoding="utf-8", newline="") as to:
        rows = csv.reader(file)
        csv.writer(to, lineterminator="\n").writerows(chain([[*next(rows), *new]], ([*row, *[""] * len(new)] for row in rows)))
    wider.replace(path)


def _write(out: Path, stream: str, columns: list[str], seconds: Float64, values: Float64, done: Done) -> float | None:
    """Add the rows that have a number; or nothing, and say when they begin, where that is before the end of what is there."""
    kept = np.flatnonzero(~np.isnan(values).all(axis=1))
    done.rows[stream] += 0
    if len(kept) == 0:
        return None
    if seconds[kept[0]] < done.last.get(stream, -math.inf):
        return float(seconds[kept[0]])
    done.last[stream], done.begin = float(seconds[kept[-1]]), min(done.begin, float(seconds[kept[0]]))
    path = out / f"{stream}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [] if done.rows[stream] else [",".join(map(_cell, ["timestamp", *columns]))]
    for second, row in zip(seconds[kept].tolist(), values[kept].tolist(), strict=True):
        lines.append(",".join([_time(second), *("" if math.isnan(value) else repr(value) for value in row)]))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    done.rows[stream] += len(kept)
    done.cells += values[kept].size
    done.numbers += int(np.count_nonzero(~np.isnan(values[kept])))
    return None


def _cell(name: str) -> str:
    quoted = name.replace('"', '""')
    return f'"{quoted}"' if re.search(r'[",\n;\t]', name) else name


@lru_cache(maxsize=1 << 16)  # streams have times in common
def _time(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat().replace("+00:00", "Z")


def _counts(counts: Counter[str]) -> str:
    return _some(f"{name} ({count:,})" for name, count in counts.most_common())


def _counted(shapes: Counter[int]) -> str:
    return ", ".join(f"{size} ({streams:,} streams)" for size, streams in sorted(shapes.items())) or "none"


def _some(names: Iterable[str]) -> str:
    return some(names, SHOWN)
