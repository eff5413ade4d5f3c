"""What every benchmark reports: the machine and its load, latencies by percentile, goals with what was reached, a table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.table import Table

from bench.servers import console

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


@dataclass(frozen=True)
class Machine:
    """Where and under what load a run began. A load beyond 0.5 means that others took part of the processors."""

    processors: int
    system: str
    python: str
    load_1min: float
    load_5min: float
    began: str
    clock: float
    stolen: float
    """Processor seconds that the host gave to others, since it started."""

    @classmethod
    def now(cls) -> Machine:
        one, five, _ = os.getloadavg()
        system = f"{platform.system()} {platform.machine()}"
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        clock = time.monotonic()
        return cls(psutil.cpu_count() or 1, system, platform.python_version(), round(one, 2), round(five, 2), began, clock, _stolen())

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("clock", "stolen")}

    @property
    def stolen_share(self) -> float:
        """Of the processors' time since the run began: figures of a run beyond some percent say little."""
        return (_stolen() - self.stolen) / max(1e-3, (time.monotonic() - self.clock) * self.processors)

    def __str__(self) -> str:
        loads = f"load {self.load_1min} and {self.load_5min} at the start"
        return f"{self.processors} processors, Python {self.python}, {self.system}, {loads}"


def _stolen() -> float:
    """Of a virtual machine on Linux; elsewhere it is not known and 0."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


@dataclass(frozen=True)
class Latency:
    """Milliseconds that 50, 99 and 99.9 of 100 stay below; of fewer than 1,000 samples p99.9 is nearly the largest."""

    samples: int
    p50_ms: float
    p99_ms: float
    p999_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        if not seconds:
            return cls(0, float("nan"), float("nan"), float("nan"))
        return cls(len(seconds), *(round(1000 * float(value), 3) for value in np.percentile(seconds, (50, 99, 99.9))))

    def cells(self) -> tuple[str, str, str]:
        return f"{self.p50_ms:,.1f}", f"{self.p99_ms:,.1f}", f"{self.p999_ms:,.1f}"


LATENCY_COLUMNS = ("p50 ms", "p99 ms", "p99.9 ms")


@dataclass(frozen=True)
class Goal:
    """A figure and the bound it has to reach: at least, or at most."""

    what: str
    reached: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """Columns of words, then columns of numbers."""
    made = Table(title=title)
    for name in names:
        made.add_column(name)
    for name in numbers:
        made.add_column(name, justify="right")
    return made


def report(tables: Sequence[Table], goals: Sequence[Goal], machine: Machine, figures: dict[str, Any], json_file: Path | None) -> None:
    """Print tables, machine and goals; write the same to `json_file`, where one is asked for."""
    screen = console()
    for one in tables:
        screen.print(one)
    stolen = machine.stolen_share
    screen.print(f"Machine: {machine}; {100 * stolen:.1f} % of its time taken by the host during the run.", highlight=False)
    for goal in goals:
        bound = f"goal {'at least' if goal.at_least else 'at most'} {goal.bound:,g}"
        screen.print(f"{'met   ' if goal.met else 'MISSED'}  {goal.what}: {goal.reached:,.4g} ({bound})", highlight=False, markup=False)
    if json_file:
        content = {
            "machine": machine.as_dict() | {"stolen_share": round(stolen, 4)},
            "goals": [goal.as_dict() for goal in goals],
            **figures,
        }
        json_file.write_text(json.dumps(content, indent=2))
