"""What all soaks share: the plan, how one is shown while it runs, and when it has failed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.ledger import Violation
from bench.servers import console
from bench.victims import Replica

SHOWN = 20
"""Violations that are printed, and after which a soak need not go on."""
BUGS = re.compile(r"unexpected_error|batch_failed|Traceback")

Seconds = Annotated[float, typer.Option(min=1, max=36_000, help="Longest time for the kills; it stops earlier when all are done.")]
Rate = Annotated[float, typer.Option(min=0.1, max=10, help="Kills a second that are tried for.")]
Model = Annotated[Path, typer.Option(help="A detector of one feature, `value`. Default: the one that ships.")]

Shown = Callable[[int, str], None]
"""Told how many kills are done, and how things stand."""


@dataclass(frozen=True)
class Plan:
    """What is done, and its bounds."""

    kills: int
    seconds: float
    """Of traffic under kills, at most."""
    rate: float
    streams: int
    seed: int
    model: Path

    @property
    def named(self) -> dict[str, str]:
        """As reports keep it."""
        return {name: str(value) for name, value in asdict(self).items()}


@dataclass
class Report:
    """What happened, as far as all soaks tell of it."""

    plan: dict[str, str]
    kills: dict[str, int] = field(default_factory=dict)
    kill_seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)


R = TypeVar("R", bound=Report)


def unseen(done: int, state: str) -> None:
    """Where nobody looks on."""


def conduct(
    what: str, plan: Plan, soak: Callable[[Path, Shown], Coroutine[Any, Any, R]], table: Callable[[R], Table], json_file: Path | None
) -> None:
    """Run `soak` in a folder of its own and show how it goes and what came of it; where it goes wrong, the logs stay in `json_file`.logs.

    Raises typer.Exit(1) where anything is wrong, or where the time ran out before all kills were done.
    """
    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())

    with tempfile.TemporaryDirectory(prefix="onset-chaos-") as folder, Progress(*columns, console=screen) as progress:
        task = progress.add_task(what, total=plan.kills, state="")
        report = asyncio.run(soak(Path(folder), lambda done, state: progress.update(task, completed=done, state=state)))
        if report.violations and json_file:
            logs = json_file.with_suffix(".logs")
            logs.mkdir(exist_ok=True)
            for log in Path(folder).glob("*.log"):
                shutil.copy(log, logs)
    screen.print(table(report))
    for violation in report.violations[:SHOWN]:
        screen.print(f"[red]violation[/]: stream {violation.stream_id}, event {violation.event}: {violation.what}", highlight=False)
    if json_file:
        json_file.write_text(json.dumps(asdict(report), indent=2))
    left = plan.kills - sum(report.kills.values())
    if left > 0:
        screen.print(f"{left:,} kills are left: {plan.seconds:g} s were too short for them, give it more --seconds.")
    if report.violations or left > 0:
        raise typer.Exit(1)


def bugs_in(replica: Replica) -> list[Violation]:
    """A bug that the clients did not notice is one nevertheless."""
    bugs = [line for line in replica.log.read_text(errors="replace").splitlines() if BUGS.search(line)]
    return [Violation("-", replica.name, f"{len(bugs)} lines of its log tell of a bug, the first: {bugs[0][:2000]}")] if bugs else []
