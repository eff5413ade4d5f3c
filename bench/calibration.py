"""Does the p-value keep its promise? Onsets on normal data, measured against asked, and the detection left at that rate.

    python -m bench.calibration [--data ../shared/data] [--model FILE] [--sets generator,smd] [--asked 0.001,1/2016] [--quick] [--json FILE]

Every set runs through the served step function (ONNX Runtime, padded batches) from fresh states, each channel a stream of its own. The
shipped default was trained and calibrated on the synthetic generator alone, so every set here is unseen. Labels are used to leave the
labelled parts out and to measure, for nothing else. What an exact Poisson stream of the same length would reach is the ceiling of
`within 2x`. Strict compares onset_p with α; else with α_n, which has a new stream's learning allowance on top (service/policy.py).
Everything is learned from, alarms too: the policy's freezing of open alerts is not part of this. With it, NAB is `python -m service
backtest ../shared/data/nab/data --out OUT`, then `python ../shared/tools/nab_score.py --data ../shared/data/nab OUT --threshold 1.0`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import metrics
from bench.report import JsonFile
from bench.servers import console
from bench.sets import MONDAY, load
from service.asking import SHIPPED_MODELS
from service.detector import Detector, load_detectors
from service.policy import Policy
from training import synthetic
from training.data import Float32, Stream, clock, cut, pad

ASKED = "1/1000,1/2016,1/10000"
NAB_ASKED = (2e-3, 1.5e-3, 1e-3, 7e-4, 5e-4)
AGES = (100, 300, 1000, 2000, 4000, 8000, 30_000)
UNSEEN_SEED = 9_003
REACH = 100
"""Events after a labelled segment within which an onset still counts as a hit."""

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """One stream and what is known of its rows."""

    stream: Stream
    normal: Bool  # [T] rows on which an onset is false
    anomalous: Bool | None = None  # [T] labelled rows, where detection is measured


@dataclass(frozen=True)
class Judged:
    """Onset p-values of the streams of one set."""

    parts: list[Part]
    onset_p: Float32  # [T, B] at the asked α
    normal: Bool  # [T, B] normal and judged


@dataclass(frozen=True)
class Row:
    """One set at one α."""

    set: str
    asked: float
    strict: bool
    streams: int
    events: int
    onsets: int
    ratio: float
    within_two: float
    ceiling: float
    by_age: dict[str, float]


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def generator(data: Path) -> Iterator[Part]:
    for stream in synthetic.streams(np.random.default_rng(UNSEEN_SEED), 240, 8000):
        yield Part(stream, np.isfinite(stream.x[:, 0]))


def servers(name: str, rows: int, every: int) -> Callable[[Path], Iterator[Part]]:
    """Each `every`-th channel of the training parts that is not nearly constant."""

    def read(data: Path) -> Iterator[Part]:
        for case in load(name, data).cases:
            for column in range(0, case.x.shape[1], every):
                channel = cut(case.column(column).stream, 0, min(rows, case.fit))
                if len(np.unique(channel.x)) > 5:
                    yield Part(replace(channel, name=f"{case.name}:{column}"), np.ones(len(channel), bool))

    return read


def telemetry(name: str, labelled: bool = False) -> Callable[[Path], Iterator[Part]]:
    """Column 0, the telemetry value; the labelled test part follows the training part in one pass."""

    def read(data: Path) -> Iterator[Part]:
        for case in load(name, data).signal().cases:
            if len(np.unique(case.x[: case.fit])) <= 5:
                continue
            if not labelled:
                yield Part(cut(case.stream, 0, case.fit), np.ones(case.fit, bool))
                continue
            near = np.convolve(case.anomalous, np.ones(2 * REACH + 1), "same") > 0.5
            yield Part(case.stream, ~near & (np.arange(len(near)) >= 500), case.anomalous)

    return read


def ecg(data: Path, rows: int = 20_000) -> Iterator[Part]:
    for case in load("ecg", data).cases:
        for start in range(0, len(case.x) - rows + 1, rows):
            piece = slice(start, start + rows)
            beats = np.convolve(case.anomalous[piece], np.ones(385), "full")[128 : 128 + rows] > 0.5  # a second before, two after
            seconds = MONDAY + np.arange(rows, dtype=np.float64) / 128
            yield Part(Stream(f"{case.name}:{start}", case.x[piece], clock(seconds)), ~beats)


def nab(data: Path) -> Iterator[Part]:
    """Outside the labelled windows and the probation (the first 15 %, at most 750 rows)."""
    for case in load("nab", data).cases:
        yield Part(case.stream, (np.arange(len(case.x)) >= case.scored) & ~case.anomalous, case.anomalous)


SETS: dict[str, Callable[[Path], Iterator[Part]]] = {
    "generator": generator,
    "smd": servers("smd", 10_000, 1),
    "asd": servers("asd", 8640, 2),
    "smap": telemetry("smap"),
    "msl": telemetry("msl"),
    "ecg": ecg,
    "nab": nab,
}
LABELLED = {"smap": telemetry("smap", labelled=True), "msl": telemetry("msl", labelled=True)}


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(detector: Detector, parts: list[Part], asked: float, on_step: Callable[[float], None]) -> Judged:
    """All streams side by side through the served step."""
    x, t = pad([part.stream for part in parts], max(len(part.stream) for part in parts))
    T, B, _ = x.shape
    state, ones, alpha = detector.fresh_states(B), np.ones(B, np.float32), np.full(B, asked, np.float32)
    onset_p = np.empty((T, B), np.float32)
    for i in range(T):
        out = detector.step(state, x[i], t[i], ones, alpha)
        state, onset_p[i] = out.state, out.onset_p
        on_step(1 / T)
    normal = np.zeros((T, B), bool)
    for column, part in enumerate(parts):
        normal[: len(part.normal), column] = part.normal
    return Judged(parts, onset_p, normal & np.isfinite(onset_p))


def alarms(judged: Judged, policy: Policy) -> Bool:
    """[T, B] onsets that open an alert."""
    budget = policy.onset_alpha(np.arange(1, len(judged.onset_p) + 1))
    found: Bool = judged.onset_p < budget[:, None]  # NaN, the warm-up, is not below
    return found


def measure(name: str, judged: Judged, policy: Policy) -> Row:
    false = alarms(judged, policy) & judged.normal
    counts, expected = false.sum(axis=0), policy.alpha * judged.normal.sum(axis=0)
    counts, expected = counts[expected > 0], expected[expected > 0]
    by_age = {}
    for low, high in itertools.pairwise(AGES):
        seen = int(judged.normal[low:high].sum())
        if policy.alpha * seen >= 3:
            by_age[f"{low}-{high}"] = round(float(false[low:high].sum()) / seen / policy.alpha, 2)
    return Row(
        set=name,
        asked=policy.alpha,
        strict=policy.strict,
        streams=len(counts),
        events=int(judged.normal.sum()),
        onsets=int(counts.sum()),
        ratio=round(float(counts.sum() / expected.sum()), 3),
        within_two=round(float(((counts >= expected / 2) & (counts <= 2 * expected)).mean()), 3),
        ceiling=round(float(np.mean([_poisson_within_two(mean) for mean in expected.tolist()])), 3),
        by_age=by_age,
    )


def _poisson_within_two(mean: float) -> float:
    counts = range(math.ceil(mean / 2), math.floor(2 * mean) + 1)
    return math.fsum(math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in counts)


def segments(name: str, judged: Judged, policy: Policy) -> dict[str, Any]:
    """Labelled segments with an alert inside or at most REACH events later, and how many chance would hit at the measured rate."""
    found = alarms(judged, policy)
    rate = float((found & judged.normal).sum() / judged.normal.sum())
    hit, lengths = 0, []
    for column, part in enumerate(judged.parts):
        assert part.anomalous is not None
        edges = np.flatnonzero(np.diff(part.anomalous.astype(np.int8), prepend=0, append=0))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            hit += bool(found[start : end + REACH, column].any())
            lengths.append(end - start + REACH)
    chance = float(sum(1 - math.exp(-rate * length) for length in lengths))
    ratio = round(rate / policy.alpha, 2)
    return {
        "set": name,
        "asked": policy.alpha,
        "strict": policy.strict,
        "segments": len(lengths),
        "hit": hit,
        "by_chance": round(chance, 1),
        "ratio": ratio,
    }


def nab_score(judged: Judged, policy: Policy) -> float:
    """NAB's standard profile at this one threshold, see bench.metrics."""
    found = alarms(judged, policy)
    labels = [part.anomalous for part in judged.parts if part.anomalous is not None]
    return metrics.nab_score([found[: len(label), i] for i, label in enumerate(labels)], labels)


# ── telling ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("../shared/data"),
    model: Annotated[Path, typer.Option(help="A model of one feature.")] = SHIPPED_MODELS,
    sets: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SETS)}.")] = ",".join(SETS),
    asked: Annotated[str, typer.Option(help="False onsets per event, comma-separated numbers or fractions.")] = ASKED,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the streams, 6,000 rows each, no detection.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure the sets and print the tables."""
    unknown = [name for name in sets.split(",") if name not in SETS]
    if unknown:
        raise typer.BadParameter(f"no set is named {unknown[0]!r}; there are {', '.join(SETS)}.")
    rates, chosen = [float(Fraction(rate)) for rate in asked.split(",")], {name: SETS[name] for name in sets.split(",")}
    detector = next(iter(load_detectors(model).values()))
    screen = console()
    rows: list[Row] = []
    hits: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    tau = detector.manifest.age_constant
    detection = {} if quick else {name: NAB_ASKED if name == "nab" else rates for name in chosen if name in LABELLED or name == "nab"}
    runs = len(chosen) * len(rates) + sum(map(len, detection.values()))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("Scoring", total=runs)

        def judged(load: Callable[[Path], Iterator[Part]], asked: float) -> Judged:
            parts = list(load(data))
            return run(detector, _few(parts) if quick else parts, asked, lambda share: progress.advance(task, share))

        for name, load in chosen.items():
            progress.update(task, description=name)
            for rate in rates:
                seen = judged(load, rate)
                rows += [measure(name, seen, Policy(alpha=rate, strict=strict, tau=tau)) for strict in (True, False)]
        for name, of_name in detection.items():
            progress.update(task, description=f"{name}, detection")
            for rate in of_name:
                seen = judged(LABELLED.get(name, nab), rate)
                for strict in (True, False):
                    policy = Policy(alpha=rate, strict=strict, tau=tau)
                    if name == "nab":
                        scores.append({"asked": rate, "strict": strict, "score": nab_score(seen, policy)})
                    else:
                        hits.append(segments(name, seen, policy))
    screen.print(_promise(rows))
    if hits:
        screen.print(_hits(hits))
    if scores:
        screen.print(_nab(scores))
    if json_file:
        content = {"model": detector.manifest.filename, "sha256": detector.sha256, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(content | {"segments": hits, "nab": scores}, indent=2))


def _few(parts: list[Part]) -> list[Part]:
    return [Part(cut(part.stream, 0, 6000), part.normal[:6000]) for part in parts[:: 5 if len(parts) > 20 else 2]]


def _promise(rows: list[Row]) -> Table:
    ages = [f"{low}-{high}" for low, high in itertools.pairwise(AGES)]
    title = "False onsets, measured ÷ asked; share of streams within a factor 2, of Poisson's own; measured ÷ asked from this age on"
    table = Table(title=title, box=box.SIMPLE)
    for column in ("set", "asked", "", "events", "onsets", "ratio", "within 2x", *(f"{low}…" for low in AGES[:-1])):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        good = "green" if 0.5 <= row.ratio <= 2 else "red"
        shares = f"{row.within_two:.2f} of {row.ceiling:.2f}"
        mode = "strict" if row.strict else "allowance"
        figures = (
            f"{row.events:,}",
            str(row.onsets),
            f"[{good}]{row.ratio:.2f}[/]",
            shares,
            *(str(row.by_age.get(age, "")) for age in ages),
        )
        table.add_row(row.set, f"{row.asked:.2g}", mode, *figures)
    return table


def _hits(hits: list[dict[str, Any]]) -> Table:
    table = Table(title="Labelled segments with an alert, against chance at the measured rate", box=box.SIMPLE)
    for column in ("set", "asked", "", "hit", "by chance", "false ÷ asked"):
        table.add_column(column, justify="right")
    for row in hits:
        mode = "strict" if row["strict"] else "allowance"
        table.add_row(row["set"], f"{row['asked']:.2g}", mode, f"{row['hit']}/{row['segments']}", str(row["by_chance"]), str(row["ratio"]))
    return table


def _nab(scores: list[dict[str, Any]]) -> Table:
    table = Table(title="NAB, standard profile, at the asked rate (no threshold chosen on labels)", box=box.SIMPLE)
    table.add_column("")
    for asked in NAB_ASKED:
        table.add_column(f"{asked:.2g}", justify="right")
    for strict in (True, False):
        table.add_row("strict" if strict else "allowance", *(str(row["score"]) for row in scores if row["strict"] == strict))
    return table


if __name__ == "__main__":
    typer.run(main)
