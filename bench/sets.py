"""The labelled sets of `../shared/data`, each stream with its protocol: what may be learned from, and from where on it is scored.

    row 0 ─── fit ──►│                       learned from, unlabelled (where a set has anomalies there, they stay in)
    row 0 ───────────────── warm ──►│scored  one causal pass over all rows; only those from `scored` on are ranked and counted

The ECG records are scored from their first row on, as their published figures are; everywhere else `fit` and `scored` are one row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.metrics import Bool, Float64, Named, nab_probation, vus_window
from training.data import Float32, Stream, clock

MONDAY = 1_704_067_200.0
"""Start of recordings that carry no timestamps."""
MINUTE = 60.0


@dataclass(frozen=True)
class Case:
    """One stream of T rows."""

    name: str
    x: Float32  # [T, F]
    seconds: Float64  # [T] since 1970
    anomalous: Bool  # [T]
    fit: int
    scored: int
    window: int
    """VUS-PR's, in rows; TSB-AD takes it from the part that is tested."""
    published: bool = False
    """Whether TSB-AD published figures for this stream."""
    named: tuple[Named, ...] = ()
    """Which features made which anomaly; rows count from `scored`."""

    @property
    def label(self) -> Bool:
        """Of the scored rows."""
        return self.anomalous[self.scored :]

    @property
    def stream(self) -> Stream:
        return Stream(self.name, self.x, clock(self.seconds))

    @property
    def days(self) -> float:
        """Of scored rows without a label, at the usual gap between rows."""
        return float((~self.label).sum() * np.median(np.diff(self.seconds))) / 86_400

    def column(self, number: int) -> Case:
        return replace(self, x=self.x[:, number : number + 1], named=())


@dataclass(frozen=True)
class DataSet:
    """Streams with the same features."""

    name: str
    cases: list[Case]
    timed: bool = True
    """Whether the seconds between rows are known."""
    history: list[Float32] = field(default_factory=list)
    """Further recordings to learn from, [n, F] each."""
    alike: bool = True
    """Whether a feature is the same quantity in all streams."""
    waveform: bool = False
    """One feature, whose shape over time is what matters."""
    telemetry: bool = False
    """Column 0 is the signal, the others are command bits."""

    @property
    def features(self) -> int:
        return int(self.cases[0].x.shape[1])

    def signal(self) -> DataSet:
        """Column 0 alone."""
        return replace(self, cases=[case.column(0) for case in self.cases], history=[x[:, :1] for x in self.history])


def load(name: str, data: Path) -> DataSet:
    """One set by its name. Raises KeyError for an unknown one, OSError where `data` lacks it."""
    return SETS[name](data)


def _arrays(name: str, cadence: float, telemetry: bool = False) -> Callable[[Path], DataSet]:
    """Sets of npz files with `train`, `test` and `test_label`."""

    def read(data: Path) -> DataSet:
        published = _published(data / name)
        cases = []
        for path in sorted((data / name).glob("*.npz")):
            content = np.load(path)
            train, test = (content[part].astype(np.float32) for part in ("train", "test"))
            label = np.concatenate([np.zeros(len(train), bool), content["test_label"] > 0])
            case = Case(
                name=path.stem,
                x=np.concatenate([train, test]),
                seconds=MONDAY + cadence * np.arange(len(label), dtype=np.float64),
                anomalous=label,
                fit=len(train),
                scored=len(train),
                window=vus_window(test[:, 0].astype(np.float64)),
                published=path.stem in published,
                named=_named(path.with_suffix(".interpretation.txt")),
            )
            cases.append(case)
        return DataSet(name, cases, telemetry=telemetry)

    return read


def _named(path: Path) -> tuple[Named, ...]:
    """Lines `start-end:feature,feature`, features from 1 on. (SMD's end is the first row after, ASD's the last row of the anomaly.)"""
    if not path.exists():
        return ()
    anomalies = []
    for line in path.read_text().split():
        rows, features = line.split(":")
        start, end = map(int, rows.split("-"))
        anomalies.append(Named(start, end + 1, frozenset(int(number) - 1 for number in features.split(","))))
    return tuple(anomalies)


def _published(folder: Path) -> frozenset[str]:
    return frozenset(published_scores(folder)[0])


def published_scores(folder: Path) -> tuple[list[str], dict[str, float]]:
    """TSB-AD's streams of this set, and VUS-PR of each of its detectors, mean over them. Empty where there are none."""
    path = folder / "published_vus_pr_tsb_ad.csv"
    if not path.exists():
        return [], {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    header = list(rows[0])
    detectors = header[header.index("train_rows") + 1 : header.index("ts_len")]
    return [row["series"] for row in rows], {name: float(np.mean([float(row[name]) for row in rows])) for name in detectors}


def _skab(data: Path, fit: int = 400) -> DataSet:
    folder = data / "skab"
    cases = []
    for path in sorted(folder.glob("*/*.csv")):
        if path.parent.name == "anomaly-free":
            continue
        seconds, columns = _skab_file(path)
        x, label = columns[:, :8], columns[:, 8] > 0
        name = f"{path.parent.name}-{path.stem}"
        cases.append(Case(name, x.astype(np.float32), seconds, label, fit, fit, vus_window(x[:, 0])))
    _, normal = _skab_file(folder / "anomaly-free/anomaly-free.csv")
    return DataSet("skab", cases, history=[normal[:, :8].astype(np.float32)])


def _skab_file(path: Path) -> tuple[Float64, Float64]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter=";"))[1:]
    seconds = np.array([row[0] for row in rows], "datetime64[us]").astype(np.int64) / 1e6
    return seconds, np.array([row[1:] for row in rows], np.float64)


def _ecg(data: Path) -> DataSet:
    cases = []
    for path in sorted((data / "ecg").glob("MBA*.csv")):
        x, label = np.loadtxt(path, delimiter=",").T
        cases.append(_plain(path.stem, x, label > 0, 1 / 128, fit=len(x) // 10, scored=0, window=vus_window(x)))
    return DataSet("ecg", cases, waveform=True)


def _ucr(data: Path) -> DataSet:
    cases = []
    for path in sorted((data / "ucr").glob("*.txt")):
        fit, start, end = (int(part) for part in path.stem.split("_")[-3:])
        x = np.loadtxt(path)
        label = np.zeros(len(x), bool)
        label[start - 1 : end] = True
        cases.append(_plain(path.stem, x, label, 1.0, fit=fit, scored=fit, window=vus_window(x)))
    return DataSet("ucr", cases, timed=False)


def _plain(name: str, x: Float64, label: Bool, cadence: float, *, fit: int, scored: int, window: int) -> Case:
    seconds = MONDAY + cadence * np.arange(len(x), dtype=np.float64)
    return Case(name, x.astype(np.float32)[:, None], seconds, label, fit, scored, window)


def _nab(data: Path) -> DataSet:
    """Times as recorded; the windows that NAB scores with are the anomalies."""
    folder = data / "nab"
    windows: dict[str, Any] = json.loads((folder / "labels/combined_windows.json").read_text())
    published = _published(folder)
    cases = []
    for name in sorted(windows):
        with (folder / "data" / name).open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        times = np.array([row[0] for row in rows], "datetime64[us]")
        label = np.zeros(len(rows), bool)
        for start, end in windows[name]:
            label[np.searchsorted(times, np.datetime64(start)) : np.searchsorted(times, np.datetime64(end)) + 1] = True
        x = np.array([float(row[1]) for row in rows])
        fit = nab_probation(len(rows))
        seconds: NDArray[np.float64] = times.astype(np.int64) / 1e6
        cases.append(Case(name, x.astype(np.float32)[:, None], seconds, label, fit, fit, vus_window(x), name in published))
    return DataSet("nab", cases, alike=False)


SETS: dict[str, Callable[[Path], DataSet]] = {
    "smd": _arrays("smd", MINUTE),
    "asd": _arrays("asd", 5 * MINUTE),
    "skab": _skab,
    "smap": _arrays("smap", MINUTE, telemetry=True),
    "msl": _arrays("msl", MINUTE, telemetry=True),
    "ecg": _ecg,
    "ucr": _ucr,
    "nab": _nab,
}
