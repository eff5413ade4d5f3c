"""A training run from data to published file, told in order. `Job` says what is to be made, `produce` makes it.

train ─► calibrate ─► export ─► evaluate ─► publish (verifies, refuses) ─► report
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.artifact import Feature, Manifest
from service.detector import session_of
from service.errors import ArtifactError, TableError
from service.events import listed
from training import report, synthetic
from training.autoencoder import NoNetwork, Sizes
from training.cache import Cached, replaced
from training.calibrate import calibrate, observe
from training.data import Fleet, Float32, Source, Stream, cut, pad, variance_of
from training.detector import DetectorStep
from training.distributed import ALONE, World
from training.evaluate import ASKED, Scores, detection, false_onsets, false_onsets_by_age, onset_p_at, run_streams, too_few
from training.export import manifest_of, publish, refuse_unfit, to_onnx, training_record
from training.faults import FEWEST, Gain, faulty_streams, found
from training.fit import Lanes, Plan, Trainer, prepare
from training.fit import Progress as Reached
from training.linear import LinearForecast
from training.normaliser import FORECAST_LIMIT, LIMIT
from training.signals import SCALED_LIMIT, ResidualSignals
from training.stillness import ALIKE, longest_runs
from training.tail import HOLD
from training.verify import Runner, StepFunction

MAX_CALIBRATION_LANES, MAX_CALIBRATION_ROWS = 64, 20_000
POOLED_ROWS = 4000
"""Rows of each calibration lane that the pooled constants of the signals, and a linear forecast, are fitted on."""
POOLED_VALUES = 1 << 24
"""Numbers of them that are run through the network at a time: what it holds of each is some twenty times as large."""
MAX_EVALUATION_ROWS = 20_000
"""Unseen rows of a stream that are looked at."""
MAX_FLOOR_ROWS = 1_000_000
"""Rows of a calibration lane that the pooled floor is of."""
CALIBRATION_SEED, EVALUATION_SEED = 9_001, 9_002


@dataclass(frozen=True)
class Job:
    """What is to be made, from what."""

    name: str
    version: str
    description: str
    features: list[str]
    sizes: Sizes
    plan: Plan
    source: Source
    command: str
    data: str
    data_sha256: str
    clip: float
    calibration: Sequence[Stream]  # unlabelled history the tail's constants are fitted on
    calibrated_on: str  # what that is to the network, for the report
    evaluation: Sequence[Stream]  # streams or later rows that neither training nor calibration saw
    counted_from: Sequence[int]  # row of each evaluation stream from which on it is unseen
    pooled_floor: float = 0.1  # share of the pooled deviation below which no stream's scale falls; 0 = none
    streams: int = 0
    rows: int = 0
    sentinels: str = ""  # which values of the history look like no readings, with what to do
    context: frozenset[str] = frozenset()  # features that are not scored
    validation: float = 0.0  # share of each stream's last rows that the network does not learn from
    linear: bool = False  # a linear forecast beside the network
    network: Literal["always", "keep", "if it pays"] = "always"  # "keep" and "if it pays" ask injected faults, and "keep" only tells

    @property
    def scored(self) -> list[bool]:
        return [name not in self.context for name in self.features]


def refuse_features(name: str, version: str, features: Sequence[str], sizes: Sizes, context: frozenset[str]) -> None:
    """Raises TableError where no detector can be made of such features, whatever their rows are."""
    refuse_unfit(name, version, features)
    unknown = sorted(context - set(features))
    if unknown:
        raise TableError(f"There is no column {unknown[0]!r} to be context; there are {listed(features)}.")
    if context >= set(features):
        raise TableError("All columns are context: at least one must be scored.")
    if sizes.waveform and len(features) != 1:
        raise TableError(f"A waveform is one column, here are {len(features)}: {listed(features)}. Leave the others out with --exclude.")
    if sizes.waveform and sizes.cell == "none":
        raise TableError("A waveform is judged by its network: --waveform and --cell none exclude each other.")


def fleet_job(
    cached: Cached,
    paths: Sequence[Path],
    sizes: Sizes,
    plan: Plan,
    validation: float,
    name: str | None,
    version: str,
    command: str,
    context: frozenset[str] = frozenset(),
    keep_network: bool = False,
) -> Job:
    """A detector for the user's own streams. Raises TableError when it could not be made of them, or not be published."""
    streams, features = cached.streams, cached.features
    name = name or slug(paths[0])
    refuse_features(name, version, features, sizes, context)
    fleet = Fleet(streams, validation)
    if max(fleet.splits) < plan.chunk:
        raise TableError(
            f"The longest stream has {max(map(len, streams))} rows, and the network learns from {max(fleet.splits)} of them, the first "
            f"{100 * (1 - validation):g} %: too few to train on ({plan.chunk} at least)."
        )
    if context.issuperset(set(features) - set(cached.unmoved)):
        raise TableError("No scored column has two different values in a stream: there is nothing to learn from these files.")
    if sizes.cell != "none" and not fleet.validates:
        raise TableError(
            f"Nothing says when to stop learning: the rows behind the first {100 * (1 - validation):g} % of the streams have no values. "
            "Leave them out, or look elsewhere with --validation."
        )
    longest = sorted(range(len(streams)), key=lambda i: -len(streams[i]))[:MAX_CALIBRATION_LANES]
    evaluation = [cut(streams[i], max(0, fleet.splits[i] - 4000), fleet.splits[i] + MAX_EVALUATION_ROWS) for i in longest]
    return Job(
        name=name,
        version=version,
        description=f"One detector for {len(streams)} stream(s) of {len(features)} feature(s).",
        features=features,
        sizes=sizes,
        plan=plan,
        source=fleet,
        command=command,
        data=", ".join(path.name for path in paths),
        data_sha256=cached.sha256,
        clip=1e4 if len(features) == 1 and not sizes.waveform else 50.0,
        calibration=_lanes([cut(streams[i], 0, fleet.splits[i]) for i in longest]),
        calibrated_on="the rows that the network learned from",
        evaluation=evaluation,
        counted_from=[min(fleet.splits[i], 4000) for i in longest],
        pooled_floor=0.0 if len(features) == 1 else 0.1,
        streams=len(streams),
        rows=sum(map(len, streams)),
        sentinels=cached.sentinels,
        context=context,
        validation=validation,
        linear=len(features) == 1 and not sizes.waveform,
        network="always" if sizes.waveform else "keep" if keep_network else "if it pays",
    )


def default_job(plan: Plan, version: str, command: str, lanes: int = 192, length: int = 6000) -> Job:
    """The shipped default: one feature named `value`, the synthetic generator and nothing else."""
    refuse_unfit("default", version, ["value"])
    held_out = synthetic.streams(np.random.default_rng([plan.seed, EVALUATION_SEED]), lanes, length)
    return Job(
        name="default",
        version=version,
        description="Any single reading, without training on it: learned and calibrated on a synthetic generator alone.",
        features=["value"],
        sizes=Sizes(hidden=32, layers=1, code=8, decoder_hidden=16),
        plan=plan,
        source=synthetic.Synthetic(plan.seed),
        command=command,
        data="synthetic generator, training/synthetic.py",
        data_sha256="",
        clip=1e4,
        calibration=synthetic.streams(np.random.default_rng([plan.seed, CALIBRATION_SEED]), lanes, length),
        calibrated_on="streams that the network did not learn from",
        evaluation=held_out,
        counted_from=[0] * len(held_out),
        pooled_floor=0.0,
    )


def produce(
    job: Job, out: Path, *, threads: int = 1, resume: bool = False, console: Console | None = None, world: World = ALONE
) -> Path | None:
    """Make the model of `job` and its report in `out`; returns the published file. Raises ArtifactError when it is refused.

    In every process of `world`: all train, the first does the rest, the others return None.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(job.plan.seed)
    console = console or Console(quiet=True)
    out.mkdir(parents=True, exist_ok=True)
    if world.first and (said := replaced(out, job.name, job.version)):
        console.print(said, style="yellow", soft_wrap=True)
    seconds: dict[str, float] = {}
    step = _step(job, job.sizes)

    with _timed(seconds, "training"):
        reached = _train(step, job, out / "checkpoint.pt", resume, console, world)
    world.part()
    if not world.first:
        return None
    with _timed(seconds, "injected faults"), console.status("Looking for injected faults with the network and without"):
        _pool_signals(step, job)
        step, faults = _what_pays(step, job)
    with _timed(seconds, "calibration"):
        _calibrate(step, job, console)
    with _timed(seconds, "export"), console.status("Exporting"):
        graph = to_onnx(step)
        run = Runner(session_of(graph))
    with _timed(seconds, "evaluation"):
        quality, shown = _evaluate(step, job, run, console)
        quality |= faults
    with _timed(seconds, "verification"), console.status("Verifying"):
        manifest = _manifest(step, job, quality)
        model = _published(step, graph, manifest, out, job)

    with _timed(seconds, "report"), console.status("Drawing the report"):
        report.page(out / "report.html", model, job.evaluation, job.counted_from)
    next_steps = _next_steps(model)
    report.draw(out / "report.png", reached, shown)
    report.write(out, manifest, reached, model, seconds, next_steps)
    _tell(console, manifest, model, seconds, next_steps)
    return model


def _step(job: Job, sizes: Sizes) -> DetectorStep:
    """Without a trained network, with the pooled floor of the scales and the linear forecast."""
    step = DetectorStep(len(job.features), sizes, job.clip, scored=job.scored, linear=job.linear)
    if job.pooled_floor > 0:
        variance = np.mean([variance_of(stream.x[:MAX_FLOOR_ROWS]) for stream in job.calibration], axis=0)
        step.normaliser.floor.copy_(torch.from_numpy(job.pooled_floor * np.sqrt(variance)).clamp(max=LIMIT).float())
    if step.linear is not None:
        _fit_linear(step, step.linear, job.calibration)
    return step


def _fit_linear(step: DetectorStep, linear: LinearForecast, lanes: Sequence[Stream]) -> None:
    whole = list({lane.name: lane for lane in reversed(lanes)}.values())  # the first lane of each stream is all of it
    x, t = pad(whole, min(POOLED_ROWS, max(map(len, whole))))
    prepared = prepare(step, torch.from_numpy(x), torch.from_numpy(t), Lanes.fresh(step, len(whole)))
    linear.fit(prepared.z[:, :, 0].numpy(), prepared.present[:, :, 0].numpy(), [min(len(x), len(lane)) for lane in whole])


def _pool_signals(step: DetectorStep, job: Job) -> None:
    """The pooled constants of the signals, which need the trained network."""
    if isinstance(step.signals, ResidualSignals):
        step.signals.fit(*_residuals(step, *pad(job.calibration, min(POOLED_ROWS, max(map(len, job.calibration))))))


def _what_pays(step: DetectorStep, job: Job) -> tuple[DetectorStep, dict[str, Any]]:
    """The detector to publish, with its network or without, and what was found on injected faults, for the report."""
    if job.network == "always" or isinstance(step.autoencoder, NoNetwork):
        return step, {}
    streams = faulty_streams(job.calibration, job.scored, job.plan.seed)
    if streams is None:
        return step, {
            "published": f"with the network, which was not compared with none: of the rows that it learned from no stream has {FEWEST}, "
            "or none with values that move before and after their middle, for faults to be injected into."
        }
    bare = _step(job, replace(job.sizes, cell="none", waveform=False))
    _pool_signals(bare, job)
    with_network, without = found(step, streams), found(bare, streams)
    gain = Gain.of(with_network["sum"], without["sum"])
    pays = gain.clear or job.network == "keep"
    means = [{name: round(float(draws.mean()), 3) for name, draws in one.items()} for one in (with_network, without)]
    table = {f"with the {job.sizes.cell} network": means[0], "without a network": means[1]}
    table["random"] = dict.fromkeys(means[0], round(streams.share, 3))
    published = f"{'with' if pays else 'without'} the network: with it {gain}"
    if not gain.clear:
        published += ", which may be chance; --keep-network " + ("asks for it" if pays else "publishes it all the same")
    return step if pays else bare, {"injected_faults_average_precision": table, "published": f"{published}."}


def _train(step: DetectorStep, job: Job, checkpoint: Path, resume: bool, console: Console, world: World) -> Reached:
    if isinstance(step.autoencoder, NoNetwork):
        return Reached()
    of_data = {"data": job.data_sha256 or job.data, "features": job.features, "validation": job.validation}
    identity = of_data | asdict(job.sizes)
    trainer = Trainer(step, job.source, job.plan, checkpoint, identity, world)
    if resume:
        world.in_turn(trainer.resume)
    if resume and not checkpoint.is_file():
        console.print(f"There is no {checkpoint} to continue from: beginning anew.")
    if trainer.progress.block:
        console.print(f"Continuing at step {trainer.progress.block * job.plan.chunks}.")
    with bar_of(console) as bar:
        task = bar.add_task("Training", total=trainer.blocks * job.plan.chunks, completed=trainer.progress.block * job.plan.chunks)

        def show(reached: Reached) -> None:
            loss = f"loss {reached.training[-1][1]:.3f}, validation {reached.best_loss:.3f}" if reached.training else ""
            bar.update(task, completed=reached.block * job.plan.chunks, description=f"Training, {loss}")

        reached = trainer.run(show)
    step.autoencoder.cpu()  # calibration, export and verification are of what is served: float32 on a CPU
    return reached


def _calibrate(step: DetectorStep, job: Job, console: Console) -> None:
    x, t = pad(job.calibration, min(MAX_CALIBRATION_ROWS, max(map(len, job.calibration))))
    with bar_of(console) as bar:
        task = bar.add_task("Calibrating", total=len(x))
        observed = observe(step, x, t, lambda: bar.advance(task))
    names = [stream.name for stream in job.calibration]
    step.calibrate(calibrate(observed, step.signals.burn, len(set(names))))
    if observed.runs is not None:
        whole = [names.index(name) for name in dict.fromkeys(names)]  # the first lane of each stream is all of it
        fit_stillness(step, [job.calibration[lane] for lane in whole], observed.runs[:, whole])


def fit_stillness(step: DetectorStep, streams: Sequence[Stream], runs: Float32) -> None:
    """From whole streams, and what was observed of their first rows [T, B, F]: a night or a week-end may lie beyond them."""
    if step.stillness is None:
        return
    longest = np.zeros((2, *runs.shape[1:]), np.float32)
    for i, stream in enumerate(streams):
        if len(stream) > len(runs):
            deviation = np.sqrt(variance_of(stream.x) + step.normaliser.floor.numpy() ** 2)
            longest[:, i] = longest_runs(stream.x, ALIKE / step.stillness.memory * deviation)
    step.stillness.fit(runs, [len(stream) for stream in streams], longest)


def _residuals(step: DetectorStep, x: Float32, t: Float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of x [T, B, F] once each lane has settled, in asinh and in linear units [N, F]; NaN where missing."""
    lanes = max(1, POOLED_VALUES // (len(x) * x.shape[2]))
    pieces = [_residuals_of(step, x[:, i : i + lanes], t[:, i : i + lanes]) for i in range(0, x.shape[1], lanes)]
    return tuple(torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*pieces, strict=True))  # type: ignore[return-value]


@torch.no_grad()
def _residuals_of(step: DetectorStep, x: Float32, t: Float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of some lanes, [T, B, F]."""
    lanes = Lanes.fresh(step, x.shape[1])
    prepared = prepare(step, torch.from_numpy(x), torch.from_numpy(t), lanes)
    outputs = step.autoencoder.sequence(prepared.inputs, lanes.network)
    z, forecast, present = prepared.z[1:], outputs.location[:-1], prepared.present[1:]
    linear = (torch.sinh(z) - torch.sinh(forecast.clamp(-FORECAST_LIMIT, FORECAST_LIMIT))).clamp(-SCALED_LIMIT, SCALED_LIMIT)
    settled = min(60, len(z) // 4)
    return tuple(torch.where(present, part, torch.nan)[settled:] for part in (z - forecast, linear))  # type: ignore[return-value]


def _evaluate(step: DetectorStep, job: Job, run: StepFunction, console: Console) -> tuple[dict[str, Any], report.Shown]:
    x, t = pad(job.evaluation, max(map(len, job.evaluation)))
    with bar_of(console) as bar:
        task = bar.add_task("Measuring false onsets on unseen rows", total=len(x))
        onset_p = onset_p_at(run, step.state_size, x, t, on_step=lambda: bar.advance(task))
    row, ends = np.arange(len(x))[:, None], [len(stream) for stream in job.evaluation]
    unseen = (row >= np.array(job.counted_from)) & (row < np.array(ends))  # behind its end a stream is no machine whose sensors died
    support = step.calibration.support
    quality: dict[str, Any] = {"calibrated_on": asdict(support) | {"rows": job.calibrated_on}} if support else {}
    if support and not support.enough:
        quality["warning"] = f"Calibrated on {support.streams} stream(s): too few to know how much others differ, so α may not hold."
    elif support and (longest := max(map(len, job.calibration))) < step.signals.burn + HOLD:
        quality["warning"] = (
            f"Calibrated on {longest} rows of a stream at most: what begins behind its first {step.signals.burn + HOLD:.0f} was never "
            "seen, so α may not hold."
        )
    if job.sentinels:
        quality["values_that_may_be_no_readings"] = job.sentinels
    measured = false_onsets(onset_p, unseen)
    quality |= {"false_onsets_on_unseen_rows": measured}
    if few := too_few(measured["0.001"]):
        quality["unseen_rows_are_few"] = few
    if not any(job.counted_from):
        quality["false_onsets_by_age_at_0.001"] = false_onsets_by_age(onset_p[ASKED.index(1e-3)])
    shortest = min(map(len, job.evaluation))
    at = max(150, min(1000, shortest - 50)) if shortest > 200 else 0
    if at:
        longer = [stream for stream in job.evaluation if len(stream) >= at + 20][:64]
        with console.status("Measuring how injected anomalies are found"):
            quality["injected_anomalies_found_in_20_events"] = detection(run, step.state_size, longer, job.scored, at, job.plan.seed)
    return quality, _shown(step, job, run)


def _shown(step: DetectorStep, job: Job, run: StepFunction) -> report.Shown:
    """The longest unseen stream with a level shift in its last part, for the picture."""
    stream = max(job.evaluation, key=len)
    stream = cut(stream, max(0, len(stream) - 2500), len(stream))
    changed_at = len(stream) - min(150, len(stream) // 3)
    x = stream.x.copy()
    feature = int(np.where(job.scored, np.isfinite(x).sum(axis=0), -1).argmax())
    past = x[:changed_at, feature][np.isfinite(x[:changed_at, feature])]
    x[changed_at : changed_at + 60, feature] += 1.5 * float(np.ptp(past)) if len(past) and np.ptp(past) > 0 else 1.0
    stream = Stream(stream.name, x, stream.t)
    scores: Scores = run_streams(run, step.state_size, *pad([stream], len(stream)))
    return report.Shown(stream, scores, job.features, max(0, len(stream) - 600), changed_at, "offset")


def _manifest(step: DetectorStep, job: Job, quality: dict[str, Any]) -> Manifest:
    record = training_record(
        command=job.command, seed=job.plan.seed, data=job.data, data_sha256=job.data_sha256, streams=job.streams, rows=job.rows
    )
    return manifest_of(
        step,
        name=job.name,
        version=job.version,
        features=[Feature(name=name, role="context" if name in job.context else "scored") for name in job.features],
        training=record,
        description=job.description,
        quality=quality,
    )


def _published(step: DetectorStep, graph: bytes, manifest: Manifest, out: Path, job: Job) -> Path:
    try:
        return publish(step, graph, manifest, out)
    except ArtifactError as error:  # -9999 among readings of 50 leaves a precision matrix that float32 does not hold
        raise ArtifactError(f"{error.detail} {job.sentinels}".rstrip()) from error


def _lanes(streams: Sequence[Stream]) -> list[Stream]:
    """Few streams are watched from several starting points, so that every age has been seen more than once."""
    starts = max(1, min(8, 16 // len(streams)))
    return [cut(stream, i * len(stream) // (starts + 1), len(stream)) for stream in streams for i in range(starts)]


def slug(path: Path) -> str:
    slug = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_")
    return slug[:64] or "detector"


def _next_steps(model: Path) -> list[str]:
    return [
        f"python -m service serve --model {report.servable(model)}",
        "python -m service replay FILE --url http://127.0.0.1:8080 --speed 100x",
        f"python -m service backtest FILES... --model {model} --out backtest/ --report backtest.html",
    ]


def _tell(console: Console, manifest: Manifest, model: Path, seconds: dict[str, float], next_steps: list[str]) -> None:
    measured = manifest.quality["false_onsets_on_unseen_rows"]["0.001"]
    console.print(
        f"\nPublished {model}: {model.stat().st_size:,} bytes, {4 * manifest.state_size:,} bytes a stream, "
        f"{sum(seconds.values()):.0f} s in all."
    )
    if "warning" in manifest.quality:
        console.print(manifest.quality["warning"], style="yellow")
    if "injected_faults_average_precision" in manifest.quality:
        faults = [f"{row['sum']} {name}" for name, row in manifest.quality["injected_faults_average_precision"].items()]
        console.print(f"Average precision on injected faults: {', '.join(faults)}.")
    if "published" in manifest.quality:
        console.print(f"Published {manifest.quality['published']}")
    console.print(
        f"Onsets on {measured['events']:,} unseen rows at α = 0.001: {measured['onsets']}, {measured['ratio']} times what was asked. "
        f"Report: {model.parent / 'report.md'}"
    )
    if "unseen_rows_are_few" in manifest.quality:
        console.print(manifest.quality["unseen_rows_are_few"], style="yellow")
    console.print("Next:")
    for command in next_steps:
        console.print(f"  {command}", soft_wrap=True, highlight=False)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def bar_of(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
