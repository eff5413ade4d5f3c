"""Command line of the training: data in, one sealed detector out.

read ─► fit ─► calibrate ─► export ─► evaluate ─► verify & publish ─► report
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

from service.artifact import TEMPLATE
from service.errors import ArtifactError, NotWritten, OnsetError, TableError
from service.log_files import Counted, LogFormat
from service.tables import ReadOptions
from service.terminal import terminal
from training.autoencoder import Sizes, Variant
from training.cache import CACHE, alone_in, convert, open_cache
from training.distributed import Device, Precision, join
from training.export import refuse_unfit
from training.fit import WAVEFORM_PLAN, Plan
from training.lines import Mining, exported, masks_of, preview
from training.logfit import LOG_SIZES, LogPlan
from training.logpipeline import LogJob, keys_of, sessions_of
from training.logpipeline import produce as produce_log
from training.pipeline import (
    MAX_CALIBRATION_LANES,
    MAX_CALIBRATION_ROWS,
    Job,
    bar_of,
    default_job,
    fleet_job,
    produce,
    refuse_features,
    slug,
)
from training.verify import verify_file

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train an LSTM autoencoder on unlabelled streams and publish it as one self-describing ONNX file.",
)
console = terminal()
EXAMPLE = (
    "Example: python -m training fit --data sensors/ --out out/pumps, then python -m service serve --model out/pumps. "
    "In several processes: torchrun --nproc-per-node 4 -m training fit ... "
    "Of logs: python -m training fit --logs app.log --time-format '%Y-%m-%d %H:%M:%S,%f' --out out/app"
)

Out = Annotated[Path, typer.Option(help="Folder for the model, its report (md, html, png, json) and the checkpoint.")]
Seed = Annotated[int, typer.Option(help="Every random number follows from it: same data, same seed, same weights.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps at most; early stopping may end sooner.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of PyTorch. One is usually fastest for networks this small.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out (same data and settings).")]
StreamRegex = Annotated[
    str, typer.Option(help="What names the stream (host, request, block) in a line: RE2, its first group. Default: the file.")
]
TimeFormat = Annotated[
    str,
    typer.Option(
        help="Of the time that a line begins with, as in strptime; %s, ms, us, ns: since 1970. "
        "Default: ISO 8601, where --timestamp-regex finds it."
    ),
]
TimestampRegex = Annotated[
    str, typer.Option(help="What a line begins with before its message: RE2, its group `time` or first group is the time.")
]
Masks = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        help="REPLACEMENT=REGEX (RE2), within each word, such as '<USER>=user-\\w+'; =REGEX keeps numbers that are names, such as "
        "'=^46\\d\\d\\b'. Before the default masks. Repeatable.",
    ),
]
PatternFiles = Annotated[
    list[Path] | None, typer.Option("--patterns", help="Reply of GET /v1/patterns: its lines get templates, too. Repeatable.")
]
Delimiters = Annotated[str, typer.Option(help="Characters that separate words, besides blanks.")]
Similarity = Annotated[float, typer.Option(min=0.05, max=1.0, help="Share of words that two lines of a template have in common at least.")]
Version = Annotated[str, typer.Option(help="Version of the published file.")]


OF_READINGS = ("timestamp", "exclude", "array", "context", "waveform", "validation", "lanes", "device", "precision", "resume")
OF_LINES = ("stream_regex", "time_format", "timestamp_regex", "mask", "delimiters", "similarity", "patterns")
OF_LOGS = (*OF_LINES, "session_seconds")
"""Parameters of `fit` that mean nothing with other data than these."""


@app.command(epilog=EXAMPLE)
def fit(
    context_: typer.Context,
    out: Out,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="CSV (, ; or tab), Parquet or npz file, or a folder of them: one stream each, all with the same features. Repeatable."
        ),
    ] = None,
    logs: Annotated[
        list[Path] | None, typer.Option(help="Instead of --data: log file (.gz too), or a folder of them, for a log model. Repeatable.")
    ] = None,
    sessions: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of --data: file with a session a line, `id,key key key` (the id may be left out). Repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the detector: lower case, digits, - and _. Default: from the files.")] = None,
    version: Version = "1",
    timestamp: Annotated[str | None, typer.Option(help="Column with the time (RFC 3339, ISO or epoch seconds). Default: by name.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Column to leave out. Repeatable. Columns named like labels always are.")
    ] = None,
    array: Annotated[str | None, typer.Option(help="Array of an npz to train on. Default: `train`, or the only one.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Column the network sees but nothing scores, such as a command or a set point. Repeatable.")
    ] = None,
    cell: Annotated[
        Variant, typer.Option(help="LSTM variant. `memoryless` (a perceptron) and `none` are what it has to beat.")
    ] = "standard",
    keep_network: Annotated[
        bool, typer.Option("--keep-network", help="Publish the network even where injected faults are found as well without it.")
    ] = False,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden units of the encoder. Default: 48, of logs 32.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the encoder.")] = 1,
    code: Annotated[int, typer.Option(min=1, help="Width of the bottleneck.")] = 12,
    decoder_hidden: Annotated[int | None, typer.Option(min=1, help="Hidden units of the decoder. Default: 48, of logs 32.")] = None,
    waveform: Annotated[
        bool,
        typer.Option(
            "--waveform", help="One column that is a waveform (ECG, vibration, current), judged by the shape of its last 96 values."
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps at most. Default: 400, of a waveform 900, of logs 300.")] = None,
    validation: Annotated[float, typer.Option(min=0.02, max=0.5, help="Share of each stream's last rows kept for early stopping.")] = 0.15,
    lanes: Annotated[int, typer.Option(min=1, help="Pieces of streams in each step, split over the processes of torchrun.")] = 32,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Annotated[Device, typer.Option(help="Where the network learns. `auto`: a GPU where there is one.")] = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Of its products while it learns; weights and cell states stay float32.")
    ] = "float32",
    resume: Resume = False,
    stream_regex: StreamRegex = "",
    time_format: TimeFormat = "",
    timestamp_regex: TimestampRegex = "",
    mask: Masks = None,
    delimiters: Delimiters = "",
    similarity: Similarity = 0.5,
    session_seconds: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Of logs: silence after which a session of a stream is over. Default: streams go on for ever."),
    ] = None,
    patterns: PatternFiles = None,
) -> None:
    """Train one detector for a whole fleet of streams with the same features, or for the lines of logs.

    The files of --data are read piece by piece and kept as float32 in OUT/cache, so data may be larger than memory. All processes of
    torchrun must see the same OUT. `python -m training lines` shows the templates that --logs would mine.
    """
    given = [paths for paths in (data, logs, sessions) if paths]
    if len(given) != 1:
        _refuse(TableError("Give one of --data (readings), --logs (log files) and --sessions (files of key sequences)."))
    _refuse_others(context_, *((OF_LOGS, "--data") if data else (OF_READINGS, "--logs" if logs else "--sessions")))
    if sessions:
        _refuse_others(context_, OF_LINES, "--sessions")
    if logs or sessions:

        def log_job() -> LogJob:
            if sessions:
                read, templates = keys_of(sessions, session_seconds)
            else:
                mining = Mining(masks=masks_of(mask or ()), delimiters=delimiters, similarity=similarity)
                format_ = LogFormat(timestamp_regex, time_format, stream_regex)
                counted = Counted()
                known = exported(patterns or ())
                with console.status("Reading files") as status:
                    read, templates = sessions_of(given[0], format_, mining, session_seconds, known, counted, console.print, status.update)
                console.print(counted.left_out)
            chosen = Sizes(hidden or LOG_SIZES.hidden, layers, code, decoder_hidden or LOG_SIZES.decoder_hidden, cell)
            log_plan, files = LogPlan(steps=steps or LogPlan.steps, seed=seed), ", ".join(path.name for path in given[0])
            return LogJob(model, version, read, templates, chosen, log_plan, _command(), files, keep_network)

        model = name or slug(given[0][0])
        _run_logs(log_job, out, model, version, threads)
        return
    data = given[0]
    named = name or slug(data[0])
    options = ReadOptions(timestamp=timestamp, exclude=frozenset(exclude or ()), array=array)
    plan = WAVEFORM_PLAN if waveform else Plan(steps=400)
    plan = replace(plan, steps=steps or plan.steps, lanes=lanes, seed=seed)
    sizes = Sizes(hidden or 48, layers, code, decoder_hidden or 48, cell, waveform)

    def job(said: Console) -> Job:
        unscored = frozenset(context or ())

        def fit(features: Sequence[str]) -> None:
            refuse_features(named, version, features, sizes, unscored)

        with bar_of(said) as bar:
            convert(data, options, out / CACHE, said.print, fit, partial(bar.track, description="Reading files"))
        cached = open_cache(out / CACHE)
        said.print(cached.summary)
        return fleet_job(cached, data, sizes, plan, validation, named, version, _command(), unscored, keep_network)

    _run(job, out, threads, resume, device, precision)


@app.command(
    epilog="Example: python -m training lines /var/log/app/*.log --time-format '%Y-%m-%d %H:%M:%S,%f' --stream-regex 'req-[0-9a-f-]+'"
)
def lines(
    files: Annotated[list[Path], typer.Argument(help="Log files, .gz too, or folders of them.")],
    stream_regex: StreamRegex = "",
    time_format: TimeFormat = "",
    timestamp_regex: TimestampRegex = "",
    mask: Masks = None,
    delimiters: Delimiters = "",
    similarity: Similarity = 0.5,
    patterns: PatternFiles = None,
    most: Annotated[int, typer.Option(min=1, help="Templates shown, the most frequent ones.")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all templates with count and example to this file.")] = None,
) -> None:
    """Show the templates that a log model would know, before anything is trained: how often each comes, with an example.

    Look for what is masked and should not be, for words that vary and are no <*>, and for one event that became many templates.
    """
    try:
        preview(
            files,
            LogFormat(timestamp_regex, time_format, stream_regex),
            Mining(masks=masks_of(mask or ()), delimiters=delimiters, similarity=similarity),
            terminal(columns=160),
            most,
            json_file,
            exported(patterns or ()),
        )
    except OnsetError as error:
        _refuse(error)


@app.command()
def default(
    out: Out,
    version: Version = "0.1.0",
    seed: Seed = 0,
    steps: Steps = 600,
    threads: Threads = 1,
    resume: Resume = False,
) -> None:
    """Build the detector that ships with the service: one feature, trained and calibrated on the synthetic generator alone."""
    plan = Plan(steps=steps, seed=seed, chunk=192)
    command = f"python -m training default --version {version} --seed {seed} --steps {steps}"
    _run(lambda said: default_job(plan, version, command), out, threads, resume)


@app.command()
def verify(file: Annotated[Path, typer.Argument(help="A published model.")]) -> None:
    """Check a published file as the service does: hash, self-test vectors, rows independent of their batch."""
    try:
        manifest = verify_file(file)
    except ArtifactError as error:
        _refuse(error)
    console.print(
        f"{file}: {manifest.name} {manifest.version}, {len(manifest.features)} feature(s), "
        f"{4 * manifest.state_size} bytes a stream, warm-up {manifest.warmup} events. Hash, self-test and batch invariance hold."
    )


def _run(
    job: Callable[[Console], Job], out: Path, threads: int, resume: bool, device: Device = "cpu", precision: Precision = "float32"
) -> None:
    """`job` reads the data, in process 0 first; only that process prints."""
    first = os.environ.get("RANK", "0") == "0"
    said, checkpoint = console if first else Console(quiet=True), out / "checkpoint.pt"
    try:
        world = join(device, precision)
        if world.size > 1 or world.device.type != "cpu":
            said.print(f"Training in {world}.")
        with alone_in(out) if world.first else nullcontext():
            produce(world.in_turn(lambda: job(said)), out, threads=threads, resume=resume, console=said, world=world)
    except NotWritten as error:
        _refuse(NotWritten(error.detail + _again(checkpoint)))
    except (OnsetError, ValueError) as error:
        _refuse(error)
    except (MemoryError, RuntimeError) as error:  # torch has errors of its own where there is no memory
        if not _without_memory(error):
            raise
        _refuse(OnsetError(_too_little(error) + _again(checkpoint)))
    except KeyboardInterrupt:
        said.print(f"Stopped.{_again(checkpoint)}", soft_wrap=True)
        raise typer.Exit(130) from None


def _without_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _wanted(error: Exception) -> str:
    return f" ({str(error).splitlines()[0]})" if str(error) else ""


def _too_little(error: Exception) -> str:
    return (
        f"Too little memory{_wanted(error)}. It does not grow with the rows beyond the first {MAX_CALIBRATION_ROWS:,} of the "
        f"{MAX_CALIBRATION_LANES} longest files, but with the columns: leave some out (--exclude), make models of parts of a machine, or "
        "give fewer files; while the network learns, fewer --lanes help, too."
    )


def _again(checkpoint: Path) -> str:
    return f" The same command with --resume continues from {checkpoint}." if checkpoint.is_file() else ""


def _run_logs(job: Callable[[], LogJob], out: Path, name: str, version: str, threads: int) -> None:
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise TableError("A log model is trained in one process: leave torchrun out.")
        refuse_unfit(name, version, [TEMPLATE])
        with alone_in(out):
            produce_log(job(), out, threads=threads, console=console)
    except (OnsetError, ValueError) as error:
        _refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not _without_memory(error):
            raise
        _refuse(OnsetError(f"Too little memory{_wanted(error)}. It grows with the lines: give fewer of them, such as the last weeks."))
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written. A log model is made in one go: there is no --resume.")
        raise typer.Exit(130) from None


def _refuse_others(given: typer.Context, parameters: Sequence[str], data: str) -> None:
    """Refuses those of `parameters` that are on the command line: an option that does nothing there is a mistake."""
    for name in parameters:
        source = given.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            _refuse(TableError(f"--{name.replace('_', '-')} means nothing with {data}."))


def _refuse(error: Exception) -> NoReturn:
    terminal(stderr=True).print(str(error), style="red", soft_wrap=True)
    raise typer.Exit(1)


def _command() -> str:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    return f"{launcher} -m training {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    gc.freeze()  # what is imported stays, and looking through it for garbage again and again took a tenth of a fit
    app()
