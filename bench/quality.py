"""Does the LSTM pay? Ours with and without it, and what it has to beat, on all labelled sets: same rows, causal, one pass.

    python -m bench.quality [--sets smd,nab] [--seeds 5] [--steps 400] [--quick] [--raw] [--kept] [--data ../shared/data] [--json FILE]

    jobs = set × detector × seed ─► answers of every stream ─► Row, kept in --out ─► a table for each set, a summary

Labels only measure. Each job's result is one file in --out, named after everything it depends on (settings, this code, for ours also
training/ and service/): an interrupted run continues, and only what changed is run again. Seed by seed: what an interruption leaves is
whole seeds, and `--kept` shows them.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import metrics
from bench.baselines import BASELINES, SEEDED, Answer, Baseline
from bench.fitting import FitFailed
from bench.ours import Recipe, Setting, fit_and_score, recipes
from bench.quality_tables import set_table, summary
from bench.report import JsonFile
from bench.servers import console
from bench.sets import SETS, Case, DataSet, load
from training.faults import average_precision

SIGNAL_BASELINES = ("VAR + PCA", "EW level", "|z|")
QUICK_CASES, QUICK_ROWS, QUICK_STEPS = 3, 6000, 40
ROOT = Path(__file__).parent.parent
HARNESS = ("training/faults.py", "bench/metrics.py", "bench/sets.py", "bench/baselines.py", "bench/quality.py")
FITTED = ("bench/sets.py", "bench/ours.py", "training/*.py")
PRODUCT = (*FITTED, *HARNESS, "service/*.py", "service/models/*.onnx")


@dataclass(frozen=True)
class Row:
    """One detector on one set with one seed. Shares are 0..1."""

    set: str
    detector: str
    seed: int
    vus_pr: float
    """Mean over the streams that have a label, as is `auc_pr`."""
    published_vus_pr: float | None
    """Mean over the streams for which TSB-AD published figures."""
    auc_pr: float
    f1: float
    """Over all rows of the set, at the detector's own threshold."""
    segments: int
    found: float
    """Share of the labelled segments with a flag."""
    delay: float | None
    """Median rows from a found segment's start to its first flag."""
    false_alarms: int
    false_alarms_per_day: float | None
    """And stream, on unlabelled rows."""
    false_rows: float
    """Share of the unlabelled rows that are flagged."""
    nab: float | None
    blamed: float | None
    """Share of the found anomalies whose greatest contributor is one of the features that made them."""
    blamed_by_chance: float | None
    seconds: float
    series: dict[str, tuple[float, float]]
    """Stream → its VUS-PR and AUC-PR."""


@dataclass(frozen=True)
class Work:
    """One job: what to run and the name of its result."""

    data: DataSet
    detector: str
    seed: int
    key: str
    answers: Callable[[Path], list[Answer]]
    """Takes the folder for models."""


def main(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("../shared/data"),
    sets: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SETS)}.")] = ",".join(SETS),
    detectors: Annotated[str, typer.Option(help="Only detectors with one of these words in their names, comma-separated.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of everything that depends on one.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of ours at most.")] = 400,
    raw: Annotated[bool, typer.Option("--raw", help="Learn from every event; else open alerts freeze a stream, as served.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_CASES} streams a set, {QUICK_ROWS} rows each, {QUICK_STEPS} steps: does it run?")
    ] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Run nothing: tables of the results that are in --out.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of models and results; what is there is not run again.")] = Path("out/quality"),
    json_file: JsonFile = None,
) -> None:
    """Run what is missing, print a table for each set and a summary."""
    unknown = [name for name in sets.split(",") if name not in SETS]
    if unknown:
        raise typer.BadParameter(f"no set is named {unknown[0]!r}; there are {', '.join(SETS)}.")
    setting = Setting(min(steps, QUICK_STEPS) if quick else steps, raw)
    chosen = [_few(load(name, data)) if quick else load(name, data) for name in sets.split(",")]
    works = [work for one in chosen for work in jobs(one, setting, seeds, quick) if _matches(work.detector, detectors)]
    rows, failures = (_kept(works, out), []) if kept else _run(sorted(works, key=lambda work: work.seed), out)
    screen = console()
    for one in chosen:
        screen.print(set_table(one.name, [asdict(row) for row in rows if row.set == one.name], data / one.name))
    screen.print(summary([asdict(row) for row in rows]))
    if json_file:
        content = {"steps": setting.steps, "raw": raw, "quick": quick, "seeds": seeds, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(content | {"failures": failures}, indent=2))
    if failures:
        screen.print("Without a result:", *failures, sep="\n", markup=False, soft_wrap=True)
        raise typer.Exit(1)


def _matches(detector: str, words: str) -> bool:
    return not words or any(word in detector for word in words.split(","))


def _kept(works: Sequence[Work], out: Path) -> list[Row]:
    return [row for work in works if (row := _read(work, out)) is not None]


def _run(works: Sequence[Work], out: Path) -> tuple[list[Row], list[str]]:
    """Rows of what worked, and sentences on what did not: one failed fit does not cost the other results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows, failures = [], []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(works))
        for work in works:
            name = f"{work.data.name}: {work.detector}, seed {work.seed}"
            progress.update(task, description=name)
            try:
                rows.append(result(work, out))
            except (FitFailed, ImportError) as error:
                failures.append(f"{name}: {error}")
            progress.advance(task)
    return rows, failures


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def jobs(data: DataSet, setting: Setting, seeds: int, quick: bool) -> list[Work]:
    """All jobs on one set; what does not depend on a seed is run once."""
    works = []
    for name, recipe in recipes(data).items():
        for seed in range(seeds if recipe.seeded else 1):
            key = _key(data, name, seed, f"{recipe} {setting} {quick}", PRODUCT)
            model = _key(data, name, seed, f"{recipe} {setting.steps} {quick}", FITTED)
            works.append(Work(data, name, seed, key, _ours(data, recipe, setting, seed, model)))
    for name, baseline in BASELINES.items():
        for seed in range(seeds if name in SEEDED else 1):
            works.append(Work(data, name, seed, _key(data, name, seed, str(quick), HARNESS), _theirs(data, baseline, seed)))
    for name in SIGNAL_BASELINES if data.telemetry else ():
        label, baseline = f"{name}, signal only", BASELINES[name]
        works.append(Work(data, label, 0, _key(data, label, 0, str(quick), HARNESS), _theirs(data.signal(), baseline, 0)))
    return works


def _ours(data: DataSet, recipe: Recipe, setting: Setting, seed: int, model: str) -> Callable[[Path], list[Answer]]:
    return lambda folder: fit_and_score(data, recipe, setting, seed, folder / model)


def _theirs(data: DataSet, baseline: Baseline, seed: int) -> Callable[[Path], list[Answer]]:
    return lambda folder: baseline(data, seed)


def _key(data: DataSet, detector: str, seed: int, settings: str, sources: Sequence[str]) -> str:
    sha = hashlib.sha256(settings.encode())
    for pattern in sources:
        for path in sorted(ROOT.glob(pattern)):
            sha.update(path.read_bytes())
    for case in data.cases:
        sha.update(case.x.tobytes())
    slug = re.sub(r"[^a-z0-9]+", "-", detector.lower()).strip("-")
    return f"{data.name}-{slug}-{seed}-{sha.hexdigest()[:12]}"


def _few(data: DataSet) -> DataSet:
    return replace(data, cases=[_shortened(case) for case in data.cases[:QUICK_CASES]])


def _shortened(case: Case) -> Case:
    rows = min(len(case.x), max(case.fit, case.scored) + QUICK_ROWS)
    named = tuple(one for one in case.named if one.stop <= rows - case.scored)
    return replace(case, x=case.x[:rows], seconds=case.seconds[:rows], anomalous=case.anomalous[:rows], named=named)


def _file(work: Work, out: Path) -> Path:
    return out / "results" / f"{work.key}.json"


def _read(work: Work, out: Path) -> Row | None:
    file = _file(work, out)
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return Row(**content | {"series": {name: tuple(pair) for name, pair in content["series"].items()}})


def result(work: Work, out: Path) -> Row:
    """From its file in `out`, or run now and kept there."""
    if (done := _read(work, out)) is not None:
        return done
    began = time.monotonic()
    answers = work.answers(out / "models")
    row = measure(work.data, work.detector, work.seed, answers, time.monotonic() - began)
    file = _file(work, out)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(row)))
    unfinished.replace(file)
    return row


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(data: DataSet, detector: str, seed: int, answers: Sequence[Answer], seconds: float = 0.0) -> Row:
    """Answers of one detector, one for each case of `data`, against the labels."""
    pairs = list(zip(data.cases, answers, strict=True))
    series = {case.name: _areas(case, answer) for case, answer in pairs if case.label.any()}
    published = [series[case.name][0] for case in data.cases if case.published and case.name in series]
    label, flagged = (np.concatenate(parts) for parts in ([case.label for case in data.cases], [answer.flagged for answer in answers]))
    first = [delay for case, answer in pairs for delay in metrics.delays(answer.flagged, case.label)]
    late = [delay for delay in first if delay is not None]
    false_alarms = sum(int((answer.alarm & ~case.label).sum()) for case, answer in pairs)
    blamed = [judged for case, answer in pairs for judged in _blamed(case, answer)]
    return Row(
        set=data.name,
        detector=detector,
        seed=seed,
        vus_pr=float(np.mean([vus for vus, _ in series.values()])),
        published_vus_pr=float(np.mean(published)) if published else None,
        auc_pr=float(np.mean([area for _, area in series.values()])),
        f1=metrics.f1(flagged, label),
        segments=len(first),
        found=len(late) / max(1, len(first)),
        delay=float(np.median(late)) if late else None,
        false_alarms=false_alarms,
        false_alarms_per_day=false_alarms / sum(case.days for case in data.cases) if data.timed else None,
        false_rows=float(flagged[~label].mean()),
        nab=_nab(pairs) if data.name == "nab" else None,
        blamed=float(np.mean([right for right, _ in blamed])) if blamed else None,
        blamed_by_chance=float(np.mean([chance for _, chance in blamed])) if blamed else None,
        seconds=round(seconds, 1),
        series=series,
    )


def _areas(case: Case, answer: Answer) -> tuple[float, float]:
    return metrics.vus_pr(answer.score, case.label, case.window), average_precision(answer.score, case.label)


def _blamed(case: Case, answer: Answer) -> list[tuple[bool, float]]:
    if answer.contribution is None:
        return []
    return metrics.blamed(answer.contribution, answer.flagged, case.named)


def _nab(pairs: Sequence[tuple[Case, Answer]]) -> float:
    whole = [np.concatenate([np.zeros(case.scored, bool), answer.alarm]) for case, answer in pairs]
    return metrics.nab_score(whole, [case.anomalous for case, _ in pairs])


if __name__ == "__main__":
    typer.run(main)
