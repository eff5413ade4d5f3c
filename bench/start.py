"""Seconds from starting the service to its first 200 of /health/ready, on a fresh data folder and on the same one again.

python -m bench.start [--repetitions 5] [--json FILE]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bench.servers import console, service


def main(
    repetitions: Annotated[int, typer.Option(min=1, max=50, help="Starts on a fresh folder, and again on the same one.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Start the service again and again and print how long it took to be ready."""
    fresh, again = [], []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder:
            fresh.append(_start(Path(folder)))
            again.append(_start(Path(folder)))
    table = Table(min_width=90, title=f"Seconds from start to ready, {repetitions} times")
    for column in ("data folder", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "data folder" else "right")
    for name, seconds in (("fresh", fresh), ("used before", again)):
        table.add_row(name, *(f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds))))
    console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"fresh": fresh, "used_before": again}, indent=2))


def _start(folder: Path) -> float:
    with service(folder) as server:
        return server.ready_after


if __name__ == "__main__":
    typer.run(main)
