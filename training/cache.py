"""The folder of a run, and in it the user's files, converted once into two files of float32 that are mapped, not loaded: data may be
larger than memory.

    cache/x.f32 [rows, F]    cache/t.f32 [rows, 3]    cache/index.json: names, rows, features, which of them never moved,
                                                 files without rows, what may be no readings, SHA-256, and what they were made of

All streams lie in the same two files, one after the other: a fleet may have more streams than a process may open files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from service.errors import TableError
from service.events import listed
from service.outputs import naming
from service.sentinels import Found, Sentinels, advice, blank, columns_of, of
from service.tables import (
    Dialect,
    Notify,
    ReadOptions,
    Rowless,
    Source,
    as_float32,
    features_of,
    find_sources,
    once_each,
    passed_over,
    read_batches,
    refuse_idle,
)
from training.data import Float32, Stream, clock

CACHE = "cache"
"""Its folder, in the folder of the model."""
LOCK = ".fit.lock"
FORMAT = 8
FILES = {"index.json", "x.f32", "t.f32"}
READ = 1 << 20
GROWING = 100
"""Steps up of a column, for each one down, from which it is a counter. A tank is emptied more often, what is measured goes both ways."""


@dataclass(frozen=True)
class Cached:
    """Streams with the same features whose rows stay on the disk until they are looked at."""

    features: list[str]
    streams: list[Stream]
    unmoved: list[str]  # features that have no two different values in any stream
    rowless: int  # files without rows, which are no stream
    sentinels: str  # which values look like no readings, with what to do; "" = none does
    times: str  # from when to when the rows are, in words
    sha256: str  # of names and rows: the same data, the same hash
    counters: Sequence[str] = ()  # features that only grow

    @property
    def summary(self) -> str:
        names = ", ".join(self.features[:8]) + " …" * (len(self.features) > 8)
        read = f"Read {len(self.streams)} stream(s), {sum(map(len, self.streams)):,} rows, {len(self.features)} feature(s): {names}"
        if self.rowless:
            read += f"\n{self.rowless:,} of {self.rowless + len(self.streams):,} files have no rows and are left out."
        read += f"\n{self.times}"
        if self.sentinels:
            read += f"\n{self.sentinels}"
        if self.counters:
            read += (
                f"\nOnly grows, as a counter does (kWh, pieces, hours): {listed(self.counters)}. What comes after the history is beyond "
                f"all that was learned: --exclude {self.counters[0]!r} leaves a column out, or have the historian give what it grows by."
            )
        if not self.unmoved:
            return read
        return (
            f"{read}\nIn no stream two different values: {listed(self.unmoved)}. How they move cannot be learned, and when one does, "
            f"that is an anomaly; --exclude {self.unmoved[0]!r} leaves a column out."
        )


def replaced(out: Path, name: str, version: str) -> str:
    """What a run replaces in `out`, in words; "" = nothing."""
    model, reported = out / f"{name}-{version}.onnx", out / "report.md"
    if model.is_file():
        there = f"{model} and its report are there, and are replaced when this one is made"
        return f"{there}: another --version keeps the file, another --out both."
    return f"{reported} is another model's, and is replaced when this one is made: another --out keeps it." if reported.is_file() else ""


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Makes the folder of a run. Raises TableError while another is in it: they would replace each other's checkpoint, model and report;
    NotWritten where it cannot be made.
    """
    with naming(out / LOCK):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TableError(f"Another run makes a model in {out}: wait for it, or choose another --out.") from None
        yield


def convert(
    paths: Sequence[Path],
    options: ReadOptions,
    folder: Path,
    notify: Notify,
    fit: Callable[[Sequence[str]], None] = lambda _: None,
    track: Callable[[Sequence[Source]], Iterable[Source]] = iter,
) -> None:
    """Make `folder` of the files under `paths`, or leave it when it is of these very files. `fit` raises TableError where no model can be
    made of such features: before the rows are read, which may take hours. `track` shows how far that is. Raises TableError, NotWritten,
    and leaves nothing then.
    """
    sources = told_apart(find_sources(paths))
    if left := passed_over(paths):
        notify(left)
    refuse_idle(sources, options)
    made_of = _made_of(sources, options)
    index = _index(folder)
    if index.get("made_of") == made_of and _whole(folder, index):
        notify(f"Rows are taken from {folder}: the files have not changed.")
        return
    fit(_one_set(sources, options))
    partial = folder.with_name(folder.name + ".partial")
    for old in (folder, partial):
        _refuse_foreign(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        with naming(folder):
            partial.mkdir(parents=True)
            index = _write(sources, options, partial, once_each(notify), track)
            (partial / "index.json").write_text(json.dumps({**index, "made_of": made_of}))
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_cache(folder: Path) -> Cached:
    """What `convert` made."""
    index = _index(folder)
    names, lengths, features = index["names"], index["lengths"], index["features"]
    x, t = _mapped(folder / "x.f32", len(features)), _mapped(folder / "t.f32", 3)
    ends = np.cumsum(lengths).tolist()
    streams = [Stream(name, x[end - rows : end], t[end - rows : end]) for name, rows, end in zip(names, lengths, ends, strict=True)]
    return Cached(
        features, streams, index["unmoved"], index["rowless"], index["sentinels"], index["times"], index["sha256"], index["counters"]
    )


def told_apart(sources: Sequence[Source]) -> list[Source]:
    """Where two folders have files of the same name, all are named by their paths from the folder that holds them all."""
    paths = [source.path.resolve() for source in sources]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise TableError(f"{twice[0]} is given twice: each file is one stream.")
    if len({source.name for source in sources}) == len(sources):
        return list(sources)
    common = os.path.commonpath([path.parent for path in paths])
    return [replace(source, name=path.relative_to(common).as_posix()) for source, path in zip(sources, paths, strict=True)]


def _refuse_foreign(folder: Path) -> None:
    """Raises TableError where `folder` holds what is not of a cache, and so is not to be removed."""
    foreign = sorted(path.name for path in folder.glob("*") if path.name not in FILES)
    if foreign:
        raise TableError(f"{folder} is where rows are kept, and holds {foreign[0]!r}, which is none of them: choose another --out.")


def _mapped(path: Path, width: int) -> Float32:
    # asarray: a slice of a memmap is a memmap, an object of many times the size.
    return np.asarray(np.memmap(path, np.float32, mode="r")).reshape(-1, width)


def _index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _whole(folder: Path, index: dict[str, Any]) -> bool:
    """Whether the files are as long as they were written: a disk that was full or a machine that went down may have left less."""
    widths, rows = {"x.f32": len(index["features"]), "t.f32": 3}, sum(index["lengths"])
    return all((folder / name).is_file() and (folder / name).stat().st_size == 4 * width * rows for name, width in widths.items())


def _made_of(sources: Sequence[Source], options: ReadOptions) -> list[Any]:
    stats = [source.stat() for source in sources]
    files = [[str(one.path.resolve()), one.name, stat.st_size, stat.st_mtime_ns] for one, stat in zip(sources, stats, strict=True)]
    return [FORMAT, {**asdict(options), "exclude": sorted(options.exclude)}, files]


def _write(
    sources: Sequence[Source],
    options: ReadOptions,
    folder: Path,
    notify: Notify,
    track: Callable[[Sequence[Source]], Iterable[Source]],
) -> dict[str, Any]:
    sha, rowless, sentinels, growing = hashlib.sha256(), Rowless(sources, notify), Sentinels(), _Growing()
    names, lengths, features, moved = list[str](), list[int](), list[str](), np.array(False)
    spans, unzoned = list[tuple[float, float]](), set[bool]()
    dialect = Dialect(unzoned=lambda: unzoned.add(True))
    with (folder / "x.f32").open("wb") as x, (folder / "t.f32").open("w+b") as t:
        for source in track(sources):
            start, rows, before = t.tell(), 0, np.nan
            least, most = np.array(np.inf), np.array(-np.inf)
            with rowless.left_out(source):
                for table in read_batches(source, options, notify, dialect=dialect):
                    if rows == 0:
                        names.append(source.name)
                        first = float(table.timestamps[0])
                        sha.update(source.name.encode())
                    features = features or list(table.columns)
                    sentinels.look(columns_of(source.name, features), table.matrix(features))
                    values = as_float32(source, features, table.matrix(features), notify, rows)
                    growing.look(values)
                    least, most = np.fmin(least, np.fmin.reduce(values)), np.fmax(most, np.fmax.reduce(values))
                    content = values.tobytes()
                    sha.update(content)
                    x.write(content)
                    t.write(clock(table.timestamps, before).tobytes())
                    rows, before = rows + len(table), table.timestamps[-1]
                spans.append((first, float(before)))
                moved = moved | (least < most)
                lengths.append(rows)
                _hash_from(t, start, sha)
    rowless.refuse_all()
    found = sentinels.found()
    if none := of(found, none=True):
        moved = _leave_out(none, folder / "x.f32", names, lengths, features)
    unmoved = [feature for feature, moves in zip(features, moved.tolist(), strict=True) if not moves]
    counters = [feature for feature, grows in zip(features, growing.counters(len(names)), strict=True) if grows]
    kept = {"counters": counters, "names": names, "lengths": lengths, "features": features, "unmoved": unmoved}
    said = [
        advice(none, "They are taken for missing here. Served, each is an anomaly."),
        advice(of(found, none=False), "They are learned as usual, and hide faults."),
    ]
    times = _spanned(spans, lengths, unzoned=bool(unzoned))
    return {**kept, "rowless": len(rowless.names), "times": times, "sentinels": "\n".join(filter(None, said)), "sha256": sha.hexdigest()}


class _Growing:
    """How often features [F] go up and down from one number to the next, within pieces of streams."""

    def __init__(self) -> None:
        self._ups = self._downs = np.zeros(0)

    def look(self, values: Float32) -> None:
        """A piece [T, F] of a stream; NaN = missing."""
        steps = [np.diff(column[~np.isnan(column)]) for column in values.T]
        ups = np.array([float((step > 0).sum()) for step in steps])
        downs = np.array([float((step < 0).sum()) for step in steps])
        self._ups, self._downs = (ups + self._ups, downs + self._downs) if len(self._ups) else (ups, downs)

    def counters(self, streams: int) -> list[bool]:
        """Which features only grow, but for one that wraps or was set back: once a stream in the mean, and once in so many steps."""
        grows = (self._ups >= GROWING) & (self._ups >= GROWING * self._downs) & (self._downs <= streams)
        return [bool(one) for one in grows]


def _spanned(spans: Sequence[tuple[float, float]], rows: Sequence[int], *, unzoned: bool) -> str:
    """From when to when: a serial number of a spreadsheet is a time of 1970, and a local one is hours off, and nothing else tells it."""
    first, last = (datetime.fromtimestamp(end, UTC).isoformat(" ", "seconds")[:19] for end in (min(spans)[0], max(end for _, end in spans)))
    every = sorted((end - start) / (count - 1) for (start, end), count in zip(spans, rows, strict=True) if count > 1) or [0.0]
    apart = " to ".join(dict.fromkeys(f"{seconds:,.4g}" for seconds in (every[0], every[-1])))
    zone = ", for which times that name no zone are taken (`python -m service split --zone` makes it of local ones)" if unzoned else ""
    return f"Times from {first} to {last} UTC{zone}; a stream has a row every {apart} s in the mean."


def _one_set(sources: Sequence[Source], options: ReadOptions) -> list[str]:
    """The features of all files that have rows, by their first ones. Raises TableError where they differ, NoRows where there are none."""
    first, features, rowless = "", list[str](), Rowless(sources, lambda _said: None)
    for source in sources:
        with rowless.left_out(source):
            columns = features_of(source, options)
            first, features = (first, features) if features else (source.name, columns)
            _refuse_uneven(source.name, columns, first, features)
    rowless.refuse_all()
    return features


def _refuse_uneven(name: str, columns: Sequence[str], first: str, features: Sequence[str]) -> None:
    """Raises TableError where the columns of a file are not the features, which are those of the first one."""
    lacked = [column for column in features if column not in columns]
    if uneven := lacked or [column for column in columns if column not in features]:
        said = f"lacks {listed(lacked)}, which {first} has" if lacked else f"has {listed(uneven)}, which {first} lacks"
        raise TableError(
            f"{name} {said}: one model, one set of features. --exclude {uneven[0]!r} leaves a column out of all files; where a machine "
            "has no such sensor, give its file an empty column of that name, or fit its kind by itself with another --name."
        )


def _leave_out(none: Found, path: Path, names: Sequence[str], lengths: Sequence[int], features: Sequence[str]) -> NDArray[np.bool_]:
    """Make what is no reading missing in the file of rows; returns which features [F] then still move in any stream."""
    numbers = defaultdict[str, list[float]](list)
    for number, where in none.items():
        for place in where:
            numbers[place.column].append(number)
    file, moved, first = np.memmap(path, np.float32, mode="r+"), np.zeros(len(features), bool), 0
    x = file.reshape(-1, len(features))
    for name, rows in zip(names, lengths, strict=True):
        least, most = np.full(len(features), np.inf), np.full(len(features), -np.inf)
        for start in range(first, first + rows, READ // len(features)):
            piece = x[start : min(start + READ // len(features), first + rows)]
            for i, column in enumerate(columns_of(name, features)):
                if column in numbers:
                    blank(piece[:, i], numbers[column])
            least, most = np.fmin(least, np.fmin.reduce(piece)), np.fmax(most, np.fmax.reduce(piece))
        moved |= least < most
        first += rows
    file.flush()
    return moved


def _hash_from(file: BinaryIO, start: int, sha: Any) -> None:
    """The file's bytes from `start` on, into the hash; the file stands at its end again."""
    file.seek(start)
    while piece := file.read(READ):
        sha.update(piece)
