"""Does a fitted fleet keep its promise? Onsets on rows that neither its network nor its tail learned from, measured against asked.

    python -m bench.fleets [--fleets mixed:8,apart:8,mixed:40,asd,smd] [--seeds 1] [--data ../shared/data] [--quick] [--out out/fleets]

    rows given to `training fit` ─►│ later rows: counted        one pass over all rows from a fresh state, each rate asked for by itself

`mixed:N` are N machines of 10 sensors, three synthetic streams through one matrix that differs by a fifth between machines, and noise; of
`apart:N` each sensor is a synthetic stream of its own. `asd` and `smd` are their unlabelled training parts, 12,000 rows a machine at most.
Everything is learned from, and strict: onset_p against α. What a machine does that is new to it counts as a false onset here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from bench.fitting import fit
from bench.servers import console
from bench.sets import MINUTE, load
from service.artifact import find_artifacts
from service.detector import Detector
from training import synthetic
from training.data import Float64, Stream, clock, cut, pad
from training.evaluate import false_onsets, onset_p_at
from training.verify import StepFunction

SENSORS, SOURCES = 10, 3
ROWS, LONGEST = 12_960, 12_000
BEGIN = 1.7e9
KINDS = ("apart", "mixed")
GIVEN = {"mixed": 2 / 3, "apart": 2 / 3, "asd": 0.7, "smd": 0.7}
"""Share of each stream's rows that `training fit` gets; it keeps the last 15 % of them for its own report."""


def machines(fleet: str, data: Path, seed: int, rows: int) -> list[Stream]:
    """The streams of `mixed:N`, `apart:N`, or of a set's training parts."""
    kind, _, number = fleet.partition(":")
    if not number:
        return [cut(case.stream, 0, min(case.fit, LONGEST, rows)) for case in load(kind, data).cases]
    rng = np.random.default_rng([seed, int(number), KINDS.index(kind)])
    mixing = rng.normal(size=(SOURCES, SENSORS))
    times = BEGIN + MINUTE * np.arange(rows, dtype=np.float64)
    return [Stream(f"machine-{i}", _machine(rng, kind, mixing, rows).astype(np.float32), clock(times)) for i in range(int(number))]


def _machine(rng: np.random.Generator, kind: str, mixing: Float64, rows: int) -> Float64:
    """[rows, SENSORS]"""
    if kind == "apart":
        return np.asarray(synthetic.generate(rng, SENSORS, rows).x.T)
    hidden = synthetic.generate(rng, SOURCES, rows).x
    hidden = np.where(np.isfinite(hidden), hidden, np.nanmean(hidden, axis=1, keepdims=True))
    hidden = (hidden - hidden.mean(axis=1, keepdims=True)) / (hidden.std(axis=1, keepdims=True) + 1e-9)
    own = mixing * (1 + 0.2 * rng.normal(size=mixing.shape))
    return np.asarray(hidden.T @ own + 0.2 * rng.normal(size=(rows, SENSORS)) * np.exp(0.3 * rng.normal(size=SENSORS)))


def fitted(streams: list[Stream], given: list[int], seed: int, steps: int, folder: Path) -> Detector:
    """By `training fit` with its network, kept in `folder`."""
    if not any(folder.glob("*.onnx")):
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        for stream, rows in zip(streams, given, strict=True):
            times = BEGIN + np.nancumsum(stream.t[:rows, 0].astype(np.float64))
            np.savez(folder / "rows" / f"{stream.name}.npz", train=stream.x[:rows], timestamps=times)
        options = ("--keep-network", "--name", "fleet", "--seed", str(seed), "--steps", str(steps))
        fit(folder / "rows", folder, *options, log=folder / "fit.log")
    return Detector.load(find_artifacts(folder)[0])


def measure(streams: list[Stream], given: list[int], step: StepFunction, state_size: int) -> dict[str, dict[str, float]]:
    """Onsets on the later rows, by the rate that is asked for."""
    x, t = pad(streams, max(map(len, streams)))
    row, ends = np.arange(len(x))[:, None], np.array([len(stream) for stream in streams])
    return false_onsets(onset_p_at(step, state_size, x, t), (row >= np.array(given)) & (row < ends))


def main(
    fleets: Annotated[str, typer.Option(help="Comma-separated: mixed:N, apart:N, asd, smd.")] = "mixed:8,apart:8,mixed:40,asd,smd",
    seeds: Annotated[int, typer.Option(min=1, help="Of the machines and of their networks.")] = 1,
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("../shared/data"),
    quick: Annotated[bool, typer.Option("--quick", help="2,000 rows, 20 steps: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the models; what is there is not fitted again.")] = Path("out/fleets"),
) -> None:
    """Fit each fleet, measure it, print a table."""
    unknown = [name for name in fleets.split(",") if name.partition(":")[0] not in GIVEN]
    if unknown:
        raise typer.BadParameter(f"no fleet is named {unknown[0]!r}; there are mixed:N, apart:N, asd and smd.")
    rows, steps = (2000, 20) if quick else (ROWS, 400)
    found: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for seed in range(seeds):
        for fleet in fleets.split(","):
            streams = machines(fleet, data, seed, rows)
            given = [int(GIVEN[fleet.partition(":")[0]] * len(stream)) for stream in streams]
            detector = fitted(streams, given, seed, steps, out / f"{fleet.replace(':', '-')}-{seed}-{rows}-{steps}")
            found.append((f"{fleet}, seed {seed}", measure(streams, given, detector.step, detector.state_size)))
    console().print(_table(found))


def _table(found: list[tuple[str, dict[str, dict[str, Any]]]]) -> Table:
    table = Table(title="Onsets on rows that were not learned from: found (÷ asked ± Poisson's error)", box=box.SIMPLE_HEAD)
    for column in ("fleet", "events", *(f"at {rate}" for rate in found[0][1])):
        table.add_column(column, justify="left" if column == "fleet" else "right")
    for name, by_rate in found:
        table.add_row(name, f"{next(iter(by_rate.values()))['events']:,}", *map(_said, by_rate.values()))
    return table


def _said(row: dict[str, Any]) -> str:
    error = max(row["onsets"], 1) ** 0.5 / row["events"] / row["asked"]
    return f"{row['onsets']} ({row['ratio']:.2f} ± {error:.2f})"


if __name__ == "__main__":
    typer.run(main)
