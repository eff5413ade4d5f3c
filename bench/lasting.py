"""What becomes of a sensor's lasting fault inside a machine? One alert that stays open and names it, and closes once it is over.

    python -m bench.lasting [--fleets mixed:8,apart:8,asd] [--events 2000] [--after 700] [--data ../shared/data] [--out out/fleets]

    rows given to `training fit` ─► SETTLE normal rows ─► the fault, `events` long ─► normal again, `after` rows

Fleets and their models are those of `bench.fleets`, states, policy and steps those of the service. Each machine has each fault in PICKED
choices of sensors, all of what moves; a shift is of so many of the sensor's deviations. Of machines without an open alert (n) the table has
the share with an alert within 20 and 100 events, that of those whose greatest contributor is a faulty sensor as the alert opens and at the
fault's end, alerts, the share of the fault under an open alert, how many are open at its end, and closed 50 and 500 events after it.
"no fault" are the same rows as they came: what is open there is a false alarm, or what the machine really did. With `--single` the shipped
default sees the first faulty sensor alone, from as many rows before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from bench.fleet import default_model
from bench.fleets import GIVEN, ROWS, fitted, machines
from bench.servers import console
from service.detector import Detector
from service.events import Readings
from service.policy import Policy
from service.rounds import advance
from service.state import ALERT_OPEN, Rows
from training.data import Float32, Float64, Stream, variance_of

SETTLE, PICKED, CHUNK = 200, 3, 256
MINUTE = 60.0

Fault = Callable[[Float64, float, float], Float64]
"""(piece [L], deviation, the last value before) → the piece with the fault."""


def _shift(size: float) -> Fault:
    return lambda piece, deviation, last: piece + size * deviation


FAULTS: dict[str, tuple[int, Fault]] = {
    "no fault": (1, lambda piece, deviation, last: piece),
    **{f"{n} shifted by {size:g}": (n, _shift(size)) for n in (1, 2) for size in (1, 2, 4, 8)},
    "1 stuck 4 off": (1, lambda piece, deviation, last: np.full_like(piece, last + 4 * deviation)),
    "1 frozen": (1, lambda piece, deviation, last: np.full_like(piece, last)),
    "1 missing": (1, lambda piece, deviation, last: np.full_like(piece, np.nan)),
}
"""How many sensors, and what happens to each."""


@dataclass(frozen=True)
class Case:
    """A machine with a fault, or without."""

    fault: str
    machine: int
    sensors: NDArray[np.intp]


def cases(streams: list[Stream], given: list[int], seed: int) -> list[Case]:
    """Every machine with every fault, each in PICKED choices of sensors that move."""
    rng = np.random.default_rng(seed)
    every: list[Case] = []
    for machine, (stream, rows) in enumerate(zip(streams, given, strict=True)):
        moves = (np.diff(stream.x[:rows], axis=0) != 0).mean(axis=0) > 0.5
        moving = np.flatnonzero(moves & np.isfinite(stream.x[rows - 1]))
        for fault, (sensors, _) in FAULTS.items():
            every += [Case(fault, machine, rng.choice(moving, sensors, replace=False)) for _ in range(PICKED) if len(moving) >= sensors]
    return every


def with_fault(case: Case, stream: Stream, given: int, events: int, after: int) -> Float32:
    """The rows that follow those given [SETTLE + events + after, F]."""
    x = stream.x[given : given + SETTLE + events + after].astype(np.float64)
    deviation, fault = np.sqrt(variance_of(stream.x[:given])), FAULTS[case.fault][1]
    for j in case.sensors:
        before = x[:SETTLE, j][np.isfinite(x[:SETTLE, j])]
        piece = fault(x[SETTLE : SETTLE + events, j].copy(), float(deviation[j]), float(before[-1]) if len(before) else 0.0)
        x[SETTLE : SETTLE + events, j] = piece
    return x.astype(np.float32)


def play(detector: Detector, policy: Policy, rows: Rows, x: Float32, start: int) -> Rows:
    """Step the states `rows` [B] by x [T, B, F], an event a minute, in place; the records [T, B]."""
    T, B, F = x.shape
    records = np.zeros((T, B), rows.dtype["last"])
    for first in range(0, T, CHUNK):
        part = x[first : first + CHUNK]
        n = len(part)
        times = 1.7e9 + MINUTE * (start + first + np.repeat(np.arange(n, dtype=np.float64), B))
        none = np.zeros(n * B, np.uint64)
        readings = Readings([""] * (n * B), part.reshape(n * B, F), times, none == 0, none.astype(np.int64) - 1, none)
        records[first : first + n] = advance(detector, policy, rows, readings, np.tile(np.arange(B), n)).records.reshape(n, B)
    return records


@dataclass(frozen=True)
class Course:
    """What a case's alert did."""

    alerts: int
    found_at: float  # events after the fault began, inf = never
    open_share: float  # of the fault's events
    named: tuple[bool, bool]  # whether the greatest contributor is a faulty sensor: of the event that opened it, and of the fault's last
    open_at_end: bool
    closed_after: float  # events after its end, inf = not within those there are


def course(records: Rows, case: Case, events: int) -> Course | None:
    """Of records [T]; None where an alert is open as the fault begins."""
    is_open = records["flags"] & ALERT_OPEN != 0
    if is_open[SETTLE - 1]:
        return None
    during = is_open[SETTLE : SETTLE + events]
    opens = np.flatnonzero(during & ~is_open[SETTLE - 1 : SETTLE + events - 1])
    first = SETTLE + int(opens[0]) if len(opens) else SETTLE
    named = tuple(int(records["contribution"][at].argmax()) in case.sensors.tolist() for at in (first, SETTLE + events - 1))
    later = ~is_open[SETTLE + events :]
    closed = float(later.argmax()) if later.any() else np.inf
    return Course(
        len(opens), float(opens[0]) if len(opens) else np.inf, float(during.mean()), (named[0], named[1]), bool(during[-1]), closed
    )


def measured(detector: Detector, streams: list[Stream], given: list[int], events: int, after: int, seed: int, single: bool) -> Table:
    """One fleet's table."""
    policy = Policy(tau=detector.manifest.age_constant)
    every = cases(streams, given, seed)
    states = detector.codec().fresh(len(streams))
    longest = max(given)
    normal = opened = flagged = 0
    for i, stream in enumerate(streams):  # each from its own first row to the last one given
        own = states[i : i + 1]
        records = play(detector, policy, own, stream.x[: given[i], None], 0)
        states[i : i + 1] = own
        late = (records["flags"][:, 0] & ALERT_OPEN != 0)[given[i] // 2 :]
        normal, flagged, opened = normal + len(late), flagged + int(late.sum()), opened + int((late[1:] & ~late[:-1]).sum())
    x = np.stack([with_fault(case, streams[case.machine], given[case.machine], events, after) for case in every], axis=1)
    rows = states[[case.machine for case in every]]
    records = play(detector, policy, rows, x, longest)
    alone: dict[int, Course | None] = {}
    if single:
        default = Detector.load(default_model())
        one = Policy(tau=default.manifest.age_constant)
        mine = np.stack([streams[c.machine].x[: given[c.machine], c.sensors[0]][-min(given) :] for c in every], axis=1)
        first = default.codec().fresh(len(every))
        play(default, one, first, mine[:, :, None], 0)
        its = np.stack([x[:, i, c.sensors[0]] for i, c in enumerate(every)], axis=1)[:, :, None]
        single_records = play(default, one, first, its, longest)
        alone = {i: course(single_records[:, i], c, events) for i, c in enumerate(every)}
    false = f"{opened} alerts in {normal:,} normal rows ({1000 * opened / normal:.2f} per 1,000), open for {flagged / normal:.1%} of them"
    title = f"{len(streams)} machines, {false}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in (
        "fault",
        "n",
        "within 20",
        "within 100",
        "named",
        "at last",
        "alerts a fault",
        "of it open",
        "open at end",
        "closed in 50",
        "in 500",
    ):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for name in FAULTS:
        mine_ = [i for i, case in enumerate(every) if case.fault == name]
        table.add_row(name, *_row([course(records[:, i], every[i], events) for i in mine_]))
        if single:
            table.add_row("  alone", *_row([alone[i] for i in mine_]))
    return table


def _row(courses: list[Course | None]) -> list[str]:
    known = [one for one in courses if one is not None]
    if not known:
        return ["0"]
    found = [one for one in known if one.alerts]
    ended = [one for one in found if one.open_at_end]
    shares = [np.mean([one.found_at < n for one in known]) for n in (20, 100)]
    numbers = [f"{share:.0%}" for share in shares]
    numbers.append(f"{np.mean([one.named[0] for one in found]):.0%}" if found else "")
    numbers.append(f"{np.mean([one.named[1] for one in ended]):.0%}" if ended else "")
    numbers.append(f"{np.mean([one.alerts for one in known]):.1f}")
    numbers += [f"{np.mean([one.open_share for one in known]):.0%}", f"{len(ended)}"]
    numbers += [f"{sum(one.closed_after < n for one in ended)}" for n in (50, 500)]
    return [str(len(known)), *numbers]


def main(
    fleets: Annotated[str, typer.Option(help="Comma-separated, as in bench.fleets.")] = "mixed:8,apart:8,asd",
    seed: Annotated[int, typer.Option(help="Of the machines, their networks and the faults.")] = 0,
    events: Annotated[int, typer.Option(help="Of each fault.")] = 2000,
    after: Annotated[int, typer.Option(help="Normal events after it.")] = 700,
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("../shared/data"),
    single: Annotated[bool, typer.Option("--single", help="The shipped default beside it, on the first faulty sensor alone.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the models; what is there is not fitted again.")] = Path("out/fleets"),
) -> None:
    """Fit each fleet, break its sensors, print a table of each."""
    for fleet in fleets.split(","):
        streams = machines(fleet, data, seed, ROWS)
        given = [int(GIVEN[fleet.partition(":")[0]] * len(stream)) for stream in streams]
        detector = fitted(streams, given, seed, 400, out / f"{fleet.replace(':', '-')}-{seed}-{ROWS}-400")
        if ":" in fleet and max(given) + SETTLE + events + after > ROWS:  # other machines of the fleet, which run for longer
            streams = machines(fleet, data, seed, max(given) + SETTLE + events + after)
        lasts = min(events, min(len(stream) - rows for stream, rows in zip(streams, given, strict=True)) - SETTLE - after)
        console().print(f"{fleet}, seed {seed}, faults of {lasts:,} events")
        console().print(measured(detector, streams, given, lasts, after, seed, single))


if __name__ == "__main__":
    typer.run(main)
