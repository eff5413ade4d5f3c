"""The tables of bench.quality. A row is what `asdict` makes of its Row; rows of several seeds become mean ± standard deviation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from bench.sets import published_scores

Rows = Sequence[dict[str, Any]]
COLUMNS = (
    ("VUS-PR", "vus_pr", 3),
    ("published part", "published_vus_pr", 3),
    ("AUC-PR", "auc_pr", 3),
    ("F1", "f1", 3),
    ("found", "found", 2),
    ("delay", "delay", 0),
    ("false alarms/day", "false_alarms_per_day", 2),
    ("false rows", "false_rows", 4),
    ("NAB", "nab", 1),
    ("blamed", "blamed", 2),
    ("by chance", "blamed_by_chance", 2),
    ("s", "seconds", 0),
)
PEERS = ("LSTMAD", "AutoEncoder", "PCA")


def set_table(name: str, rows: Rows, folder: Path) -> Table:
    """One line a detector; below, what others published on the same streams (they may look ahead)."""
    shown = [column for column in COLUMNS if any(row[column[1]] is not None for row in rows)]
    segments = rows[0]["segments"] if rows else 0
    table = Table(title=f"{name}: {segments} labelled segments", box=box.SIMPLE)
    table.add_column("")
    for title, _, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for detector in dict.fromkeys(row["detector"] for row in rows):
        of_detector = [row for row in rows if row["detector"] == detector]
        table.add_row(detector, *(_figure([row[field] for row in of_detector], digits) for _, field, digits in shown))
    for peer, figures in _published(folder).items():
        table.add_row(f"[dim]{peer}[/]", *(f"[dim]{figures[field]:.3f}[/]" if field in figures else "" for _, field, _ in shown))
    return table


def _published(folder: Path) -> dict[str, dict[str, float]]:
    _, areas = published_scores(folder)
    best = sorted(areas, key=lambda name: -areas[name])[:1]
    found = {f"TSB-AD {name}": {"published_vus_pr": areas[name]} for name in dict.fromkeys([*best, *PEERS]) if name in areas}
    path = folder / "published_tsb_uad.csv"
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "AUC_PR"]
        for name in ("NORMA", "LSTM", "AE"):
            found[f"TSB-UAD {name}"] = {"auc_pr": float(np.mean([float(row[name]) for row in rows]))}
    return found


def summary(rows: Rows) -> Table:
    """VUS-PR / AUC-PR of every detector on every set, and the mean VUS-PR where it ran on all."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    table = Table(title="VUS-PR / AUC-PR; NAB's own score", box=box.SIMPLE)
    for title in ("", *sets, "mean", "NAB"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for detector in dict.fromkeys(row["detector"] for row in rows):
        cells, means = [], []
        for name in sets:
            here = [row for row in rows if row["detector"] == detector and row["set"] == name]
            cells.append(f"{_figure([row['vus_pr'] for row in here], 3)} / {_mean(here, 'auc_pr'):.3f}" if here else "")
            means += [_mean(here, "vus_pr")] if here else []
        nab = [row["nab"] for row in rows if row["detector"] == detector and row["set"] == "nab"]
        table.add_row(detector, *cells, f"{np.mean(means):.3f}" if len(means) == len(sets) else "", _figure(nab, 1))
    return table


def _mean(rows: Rows, field: str) -> float:
    return float(np.mean([row[field] for row in rows]))


def _figure(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ±{np.std(known, ddof=1):.{digits}f}" if len(known) > 1 and np.std(known) > 0 else ""
    return f"{np.mean(known):.{digits}f}{spread}"
