"""How many lines: are floods and logs that say less found in counts of lines, at the asked rate of false alarms?

    python -m bench.volume [--streams 48] [--alpha 0.000496] [--seed 0] [--quick] [--json FILE]

    two weeks of counts, learned from ─► a third, quiet ─────────────────► false alarms ÷ asked
                                   └───► copies with one incident each ──► does an alert open while it lasts?

Made counts of five minutes. What is logged (a line, or a burst of eight) comes at random, at a rate that is seven times as high by day as
by night and half as high at weekends; of a rate that wanders, the log is an autoregression (deviation .4, remembered for three hours). The
streams of a kind have rates that are evenly spaced on a logarithmic scale. An incident begins at any second of the third week: what more
there is is added, what less is left out at random, whole bursts. *By chance*: an alert opens in the same counts of the quiet copy.

The shipped detector scores as `service backtest` does. Beside it: *last week*, an hour with more than three times or less than a third
of the lines of the same hour a week before; *z*, the distance from the mean of the day before in its deviations, beyond what brought each
stream as many alerts as asked in the two weeks learned from; *random*, any count at the asked rate. An alert of theirs ends after CALM
ordinary counts, as the service's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.fleet import default_model
from bench.kpis import CALM, matched
from bench.report import JsonFile, Machine, report, table
from bench.sets import MONDAY
from service.backtest import Scored, Series, Tally, score
from service.detector import Detector
from service.policy import Policy

Float64 = NDArray[np.float64]
Counts = NDArray[np.int64]

EVERY = 300
HOUR, DAY, WEEK = 3600 // EVERY, 86_400 // EVERY, 604_800 // EVERY
LEARNED, ROWS = 2 * WEEK, 3 * WEEK
NIGHT, WEEKEND = 7, 0.5
WANDERS, REMEMBERED = 0.4, 3 * HOUR
RULE = 3


@dataclass(frozen=True)
class Kind:
    """What logs, and how much: from `least` to `most` lines an hour on average on weekdays."""

    name: str
    least: float
    most: float
    burst: int = 1
    wanders: float = 0.0


KINDS = (
    Kind("20 to 200 lines an hour", 20, 200),
    Kind("200 to 6,000", 200, 6000),
    Kind("200 to 6,000 in bursts, wandering", 200, 6000, burst=8, wanders=WANDERS),
)


@dataclass(frozen=True)
class Incident:
    """So many times the usual number of lines for so many seconds."""

    name: str
    times: float
    seconds: int


INCIDENTS = (
    Incident("10 times, 10 min", 10, 600),
    Incident("10 times, 1 h", 10, 3600),
    Incident("3 times, 1 h", 3, 3600),
    Incident("a third, 6 h", 1 / 3, 21_600),
    Incident("a tenth, 3 h", 0.1, 10_800),
)


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def usual(kind: Kind, rng: np.random.Generator, B: int) -> Float64:
    """Bursts (of one line or more) that a count has on average [ROWS, B]."""
    day = np.exp(0.5 * np.log(NIGHT) * np.cos(2 * np.pi * (np.arange(ROWS) / DAY - 0.6)))
    cycle = day / day.mean() * np.where(np.arange(ROWS) % WEEK >= 5 * DAY, WEEKEND, 1.0)
    memory, shocks = np.exp(-1 / REMEMBERED), rng.normal(size=(ROWS, B))
    wander = np.empty((ROWS, B))
    wander[0] = shocks[0]
    for i in range(1, ROWS):
        wander[i] = memory * wander[i - 1] + np.sqrt(1 - memory**2) * shocks[i]
    level = np.exp(kind.wanders * wander - kind.wanders**2 / 2)
    return np.asarray(cycle[:, None] * level * np.geomspace(kind.least, kind.most, B) / HOUR / kind.burst)


def share(incident: Incident, at: float) -> Float64:
    """Of each count's time, what the incident that begins `at` seconds takes [ROWS]."""
    begins = EVERY * np.arange(ROWS)
    return np.asarray(np.clip(np.minimum(at + incident.seconds, begins + EVERY) - np.maximum(at, begins), 0, None) / EVERY)


def with_incident(incident: Incident, at: float, bursts: Counts, mean: Float64, rng: np.random.Generator) -> Counts:
    """Of bursts [ROWS] that came where `mean` [ROWS] were expected, those that come with it."""
    part = share(incident, at)
    if incident.times > 1:
        return bursts + rng.poisson((incident.times - 1) * mean * part)
    return rng.binomial(bursts, 1 - (1 - incident.times) * part)


@dataclass(frozen=True)
class Copy:
    """Counts [n] of a stream up to the end of its incident; of the quiet one all."""

    stream: int
    counts: Counts
    incident: Incident | None = None
    window: range = range(LEARNED, ROWS)
    """Counts that it is part of."""


def copies(kind: Kind, rng: np.random.Generator, B: int) -> list[Copy]:
    """Of each stream the quiet one, then one of each incident."""
    mean = usual(kind, rng, B)
    bursts = rng.poisson(mean)
    made = []
    for b in range(B):
        made.append(Copy(b, kind.burst * bursts[:, b]))
        for incident in INCIDENTS:
            at = rng.uniform(EVERY * LEARNED, EVERY * ROWS - incident.seconds)
            touched = np.flatnonzero(share(incident, at))
            window = range(int(touched[0]), int(touched[-1]) + 1)
            counts = kind.burst * with_incident(incident, at, bursts[:, b], mean[:, b], rng)
            made.append(Copy(b, counts[: window.stop], incident, window))
    return made


# ── who judges them ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Opens = list[Counts]
"""Of each copy where alerts open."""


def ours(every: Sequence[Copy], detector: Detector, policy: Policy, advanced: Callable[[int], None]) -> Opens:
    """All copies side by side through the backtest."""
    tallies = [Tally("") for _ in every]

    def sink(i: int, first: int, scored: Scored) -> None:
        tallies[i].add(first, scored)
        advanced(len(scored.kinds))

    seconds = MONDAY + EVERY * np.arange(1.0, ROWS + 1)
    series = [Series("", [], seconds[: len(one.counts)], one.counts.astype(np.float32)[:, None]) for one in every]
    score(series, detector, policy, sink)
    return [np.array(tally.alert_rows, np.int64) for tally in tallies]


def opened(over: NDArray[np.bool_]) -> Counts:
    """Where alerts open in [n]: what is over opens one, CALM others end it."""
    at = np.flatnonzero(over)
    return at[np.diff(at, prepend=-CALM - 1) > CALM]


def last_week(counts: Counts) -> NDArray[np.bool_]:
    """[n] whether the hour that ends with a count has more than RULE times the lines of that a week before, or less than a part of RULE."""
    hour = np.convolve(counts, np.ones(HOUR, np.int64))[: len(counts)]
    over = np.zeros(len(counts), np.bool_)
    now, then = hour[WEEK + HOUR :], hour[HOUR:-WEEK]
    over[WEEK + HOUR :] = (now > RULE * then) | (RULE * now < then)
    return over


def z(counts: Counts) -> Float64:
    """[n] how far each is from the mean of the day before, in its deviations; the first day's are 0."""
    day = np.lib.stride_tricks.sliding_window_view(counts, DAY)[:-1]
    far = np.abs(counts[DAY:] - day.mean(axis=1)) / np.maximum(day.std(axis=1), 1e-9)
    return np.concatenate([np.zeros(DAY), far])


def simple(every: Sequence[Copy], alpha: float, rng: np.random.Generator) -> Iterator[tuple[str, Opens]]:
    """The three beside it."""
    yield "last week", [opened(last_week(one.counts)) for one in every]
    far = [z(one.counts) for one in every]
    thresholds = {
        one.stream: matched(mine[:LEARNED, None], round(alpha * LEARNED)) for one, mine in zip(every, far, strict=True) if not one.incident
    }
    yield "z", [opened(mine > thresholds[one.stream]) for one, mine in zip(every, far, strict=True)]
    yield "random", [np.flatnonzero(rng.random(len(one.counts)) < alpha) for one in every]


# ── what they found ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figures:
    """Of one judge on one kind of stream."""

    kind: str
    judge: str
    streams: int
    quiet: float
    """Alerts that open in the quiet third week ÷ asked."""
    found: dict[str, int]
    """Incident → streams in which an alert opens while it lasts."""
    by_chance: dict[str, int]
    """The same of the quiet copy."""

    def cells(self) -> list[str]:
        return [f"{self.quiet:.1f}", *(f"{self.found[one.name]} ({self.by_chance[one.name]})" for one in INCIDENTS)]


def figures(kind: str, judge: str, every: Sequence[Copy], opens: Opens, alpha: float) -> Figures:
    quiet = {one.stream: at for one, at in zip(every, opens, strict=True) if not one.incident}
    alarms = sum(int((at >= LEARNED).sum()) for at in quiet.values())
    found, by_chance = ({one.name: 0 for one in INCIDENTS} for _ in range(2))
    for one, at in zip(every, opens, strict=True):
        if one.incident:
            found[one.incident.name] += any(row in one.window for row in at.tolist())
            by_chance[one.incident.name] += any(row in one.window for row in quiet[one.stream].tolist())
    return Figures(kind, judge, len(quiet), alarms / (alpha * (ROWS - LEARNED) * len(quiet)), found, by_chance)


def _table(rows: Sequence[Figures], alpha: float, B: int) -> Table:
    title = f"Found of {B} incidents each (by chance), counts of five minutes, 1 in {1 / alpha:,.0f} asked"
    made = table(title, ("lines", "judge"), ("false alarms ÷ asked", *(one.name for one in INCIDENTS)))
    for row in rows:
        made.add_row(row.kind if row.judge == "Onset" else "", row.judge, *row.cells(), end_section=row.judge == "random")
    return made


def main(
    streams: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 48,
    alpha: Annotated[float, typer.Option(help="The asked rate of false alarms; as it is, one a week of each stream.")] = 1 / 2016,
    seed: Annotated[int, typer.Option(help="Of all counts and incidents.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three streams of each kind: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Make the streams, let all judge them, print what is found."""
    machine = Machine.now()
    detector = Detector.load(default_model())
    policy = Policy(alpha=alpha, tau=detector.manifest.age_constant)
    B = 3 if quick else streams
    rows: list[Figures] = []
    with Progress(console=Console(stderr=True)) as progress:
        for i, kind in enumerate(KINDS):
            rng = np.random.default_rng([seed, i])
            every = copies(kind, rng, B)
            task = progress.add_task(kind.name, total=sum(len(one.counts) for one in every))
            found = [("Onset", ours(every, detector, policy, lambda n, task=task: progress.advance(task, n))), *simple(every, alpha, rng)]  # type: ignore[misc]
            rows += [figures(kind.name, judge, every, opens, alpha) for judge, opens in found]
    written: dict[str, Any] = {"alpha": alpha, "seed": seed, "rows": [asdict(row) for row in rows]}
    report([_table(rows, alpha, B)], [], machine, written, json_file)


if __name__ == "__main__":
    typer.run(main)
