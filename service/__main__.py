"""The command line: `python -m service COMMAND`. Each command imports what it needs, so that --help is quick."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, cast

import typer

if TYPE_CHECKING:
    from service.embedded import EmbeddedStore
    from service.logs import Stderr
    from service.long_tables import Long

app = typer.Typer(
    name="service",
    help="Onset: scores every event of a stream the moment it arrives. Settings are ONSET_... variables; options override them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


TimeFormat = Annotated[
    str, typer.Option(help="Of log files: the time that an entry begins with, as in strptime; %s, ms, us, ns = since 1970.")
]
TimestampRegex = Annotated[
    str, typer.Option(help="Of log files: what an entry begins with, up to its message (RE2). Default: what the model cuts off.")
]
StreamRegex = Annotated[str, typer.Option(help="Of log files: names the stream of an entry (RE2). Default: a file is a stream.")]


@app.command()
def serve(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A model file, or a folder of them; several with commas between: `shipped,models/` is the detector that ships and "
            "yours. Default: the detector that ships."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 = any free one. Default 8080.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis >= 7.0 or Valkey. Default: an embedded valkey-server.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Data of the embedded store. Default ./onset-data.")] = None,
    alpha: Annotated[float | None, typer.Option(help="False onsets per event of a normal stream. Default 0.001.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="No learning allowance for new streams.")] = None,
) -> None:
    """Serve the REST API until SIGTERM or Ctrl-C; what was accepted is finished first."""
    # In force until uvicorn's own handler is, and again after it: a stop while starting ends at once (process 1 of a container would
    # ignore it), and a drained one with 0, where uvicorn raises the signal again.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    gc.disable()  # until memory.settle: what is imported stays, and looking through it takes a sixth of the time to start
    from pydantic import ValidationError  # noqa: PLC0415

    from service import logs  # noqa: PLC0415
    from service.errors import OnsetError  # noqa: PLC0415
    from service.settings import Settings, refusal, unknown  # noqa: PLC0415

    given: dict[str, Any] = {"model": model, "host": host, "port": port, "redis_url": redis_url, "data_dir": data_dir, "alpha": alpha}
    given["strict"] = strict
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        stderr = logs.configure(settings.log_level, settings.log_json, hash_streams=settings.log_hash_streams)
        embedded = None if settings.redis_url else _launched(settings.data_dir)
        from service.app import create_app  # noqa: PLC0415 - takes a second, in which the store reads its data

        asgi = create_app(settings, embedded)
        listening = _listen(settings.host, settings.port)
    except ValidationError as error:
        _refuse(refusal(error))
    except OnsetError as error:
        _refuse(error.detail)
    for name, meant in unknown(os.environ).items():  # not refused: Kubernetes sets some for a Service called onset
        logs.log.warning("unknown_setting", name=name, ignored=True, did_you_mean=meant)
    _run(asgi, listening, settings.drain_seconds, stderr)


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(envvar="DEMO_SECONDS", min=1, max=3600, help="How long it plays; at least 25.")] = 60.0,
    model: Annotated[Path | None, typer.Option(help="A detector of one feature. Default: the one that ships.")] = None,
) -> None:
    """Score this machine's own readings live, disturb it, and show the onset."""
    from service.demo import run  # noqa: PLC0415

    raise typer.Exit(run(seconds, model))


@app.command()
def replay(
    files: Annotated[list[Path], typer.Argument(help="CSV, Parquet or npz files, or folders of them; each is one stream. Or log files.")],
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://127.0.0.1:8080",
    speed: Annotated[str, typer.Option(help="Recorded seconds a second, such as 100x; max = as fast as it answers.")] = "1x",
    stream: Annotated[str | None, typer.Option(help="All files are parts of this one stream. Default: a stream for each file.")] = None,
    timestamps: Annotated[str, typer.Option(help="original, or now (the time of sending).")] = "original",
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Events of a request at most.")] = 1000,
    top: Annotated[int, typer.Option(min=1, max=300, help="Contributors shown.")] = 3,
    model: Annotated[str | None, typer.Option(help="Name of the served model. Default: the service's own default.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the replies to this CSV. Started again, name another: what was answered long before has no score any more."
        ),
    ] = None,
    timestamp: Annotated[str | None, typer.Option(help="Name of the timestamp column. Default: found by name.")] = None,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to go on trying while the service does not answer.")] = 120.0,
    time_format: TimeFormat = "",
    timestamp_regex: TimestampRegex = "",
    stream_regex: StreamRegex = "",
) -> None:
    """Post recorded data as live events; safe to interrupt and to repeat. Files are log files where the served model is of logs."""
    from service.errors import OnsetError  # noqa: PLC0415
    from service.log_files import LogFormat  # noqa: PLC0415
    from service.replay import Options, parse_speed, run, timestamps_of  # noqa: PLC0415
    from service.tables import ReadOptions  # noqa: PLC0415

    try:
        options = Options(url, model, parse_speed(speed), timestamps_of(timestamps), stream, batch, top, patience)
        run(
            files,
            options,
            ReadOptions(timestamp=timestamp, unsorted=True),
            out,
            format_=LogFormat(timestamp_regex, time_format, stream_regex),
        )
    except OnsetError as error:
        _refuse(error.detail)
    except KeyboardInterrupt:
        kept = "" if out is None else f" Then name another --out: {out} has scores that are not told again."
        _refuse(f"Interrupted. Start the same replay again and it goes on where it was.{kept}")


@app.command()
def backtest(
    inputs: Annotated[list[Path], typer.Argument(help="CSV, Parquet or npz files, or folders of them; each is one stream. Or log files.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores: one CSV per input, of the same relative path; of log files lines.csv.")],
    model: Annotated[Path | None, typer.Option(help="A model file, or a folder that holds one. Default: the detector that ships.")] = None,
    alpha: Annotated[float, typer.Option(min=1e-9, max=0.499, help="False onsets per event of a normal stream.")] = 1e-3,
    strict: Annotated[bool, typer.Option("--strict", help="No learning allowance for new streams.")] = False,
    timestamp: Annotated[str | None, typer.Option(help="Name of the timestamp column. Default: found by name.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A column to leave out; may be given again.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the summary to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also draw the inputs, their onsets and the calibration into this HTML page.")] = None,
    time_format: TimeFormat = "",
    timestamp_regex: TimestampRegex = "",
    stream_regex: StreamRegex = "",
) -> None:
    """Score whole files as the service would have, without a server. Files are log files where the model is of logs."""
    from service import log_backtest  # noqa: PLC0415
    from service.asking import SHIPPED_MODELS  # noqa: PLC0415
    from service.backtest import command, load_one  # noqa: PLC0415
    from service.errors import OnsetError  # noqa: PLC0415
    from service.log_files import LogFormat  # noqa: PLC0415
    from service.policy import Policy  # noqa: PLC0415

    try:
        detector, policy = load_one(model or SHIPPED_MODELS), Policy(alpha=alpha, strict=strict)
        of_logs = LogFormat(timestamp_regex, time_format, stream_regex)
        if detector.manifest.lines is not None:
            if report or timestamp or exclude:
                _refuse("--report, --timestamp and --exclude are for readings; of log lines the scores are in OUT/lines.csv.")
            log_backtest.command(inputs, detector, out, policy, of_logs, json_file)
            return
        if of_logs != LogFormat():
            _refuse(f"--time-format, --timestamp-regex and --stream-regex are for log files; '{detector.manifest.name}' takes readings.")
        done = command(inputs, detector, out, policy, timestamp, exclude or [], json_file)
        if report:
            from service.report import Subject, write  # noqa: PLC0415

            asked = shlex.join(["python", "-m", "service", *sys.argv[1:]])
            write(report, Subject("Backtest", f"{asked}.", done.detector, done.policy), done.report.tallies, done.load)
            typer.echo(f"Report: {report}")
    except OnsetError as error:
        _refuse(error.detail)


@app.command()
def split(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="CSV (, ; or tab) or Parquet files with a column for each sensor or a row for each reading, or folders of them."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder: a CSV for each stream, times in UTC.")],
    columns: Annotated[
        str,
        typer.Option(
            help="How columns, or tags, are named: '{stream}.{feature}' makes a stream of those that have all before the last point in "
            "common, '{stream}' a stream of each, for the detector that ships; '{feature}' a stream of each file."
        ),
    ] = "{stream}",
    timestamp: Annotated[str | None, typer.Option(help="Name of the timestamp column. Default: found by name.")] = None,
    time_format: Annotated[
        str | None,
        typer.Option(
            help="Of the times, as in strptime, such as '%d.%m.%Y %H:%M:%S'; ms, us or ns for such since 1970. "
            "Default: ISO 8601 or seconds since 1970."
        ),
    ] = None,
    zone: Annotated[str | None, typer.Option(help="Time zone of times that name none, such as Europe/Berlin. Default: UTC.")] = None,
    decimal: Annotated[
        str | None, typer.Option(help="What stands before the decimals: . or , Default: points, and 1,234 is no number.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A column or tag to leave out, or a pattern such as '*.status'. Repeatable.")
    ] = None,
    missing: Annotated[
        list[float] | None, typer.Option(help="A number that stands for no reading, such as -9999 or 65535. Repeatable.")
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="Of a table with a row for each reading: the column that names its sensor. Repeatable: then joined by points."),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(help="Of such a table: the column of the readings. Repeatable: then its name is joined to the tag."),
    ] = None,
    good: Annotated[
        list[str] | None,
        typer.Option(help="Of such a table: COLUMN=WORD of good readings, such as quality=Good; others are missing. Repeatable."),
    ] = None,
    every: Annotated[
        float,
        typer.Option(min=0, help="Of such a table: a row for every so many seconds, with the last readings of each sensor in them."),
    ] = 0.0,
    hold: Annotated[
        float,
        typer.Option(
            min=0, help="With --every, of sensors that write changes alone: a reading stands for so many seconds, or until the next."
        ),
    ] = 0.0,
) -> None:
    """Make a file for each stream of a historian's table, wide or long: what fit, backtest and replay read."""
    from datetime import UTC  # noqa: PLC0415
    from zoneinfo import ZoneInfo  # noqa: PLC0415

    from rich.progress import Progress  # noqa: PLC0415

    from service.errors import OnsetError  # noqa: PLC0415
    from service.split import split as split_tables  # noqa: PLC0415
    from service.tables import Dialect, ReadOptions  # noqa: PLC0415
    from service.terminal import terminal  # noqa: PLC0415

    if decimal not in (None, ".", ","):
        _refuse(f"--decimal {decimal!r} is neither . nor a comma.")
    try:
        where = UTC if zone is None else ZoneInfo(zone)
    except (ValueError, OSError, LookupError):
        _refuse(f"--zone {zone!r} is no time zone, such as Europe/Berlin or UTC.")
    long = _long(tag or [], value or [], good or [], every, hold)
    options, dialect = ReadOptions(timestamp, frozenset(exclude or ())), Dialect(decimal, time_format, where, frozenset(missing or ()))
    console = terminal(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("reading", total=None)

            def show(doing: str, done: int, of: int | None) -> None:
                progress.update(task, description=f"{done:,} {doing}", completed=done, total=of)

            done = split_tables(files, out, columns, options, dialect, _say, long, show)
    except OnsetError as error:
        _refuse(error.detail)
    for sentence in done.report():
        _say(sentence)


def _long(tag: list[str], value: list[str], good: list[str], every: float, hold: float) -> Long | None:
    """A table with a row for each reading, by the options of `split`; None = it has a column for each sensor."""
    from service.long_tables import Long  # noqa: PLC0415

    if bool(tag) != bool(value):
        _refuse("Give both: --tag COLUMN, which names the sensor of each row, and --value COLUMN, which has its reading.")
    if (good or every) and not tag:
        _refuse("--good and --every are for a table with a row for each reading: name its columns with --tag COLUMN and --value COLUMN.")
    if hold and not 0 < every <= hold:
        _refuse("--hold SECONDS is how long a reading stands in the rows that --every SECONDS makes: give both, --hold the larger.")
    qualities = [(column, word) for column, equals, word in (pair.rpartition("=") for pair in good) if equals and column]
    if len(qualities) < len(good) or len({column for column, _ in qualities}) > 1:
        _refuse(f"--good {' --good '.join(map(repr, good))} is not COLUMN=WORD, of one column, such as quality=Good.")
    if not tag:
        return None
    quality = qualities[0][0] if qualities else None
    return Long(tuple(tag), tuple(value), quality, frozenset(word.strip() for _, word in qualities), every, hold)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="An .onnx file made by `python -m training fit`, or a folder of them.")],
) -> None:
    """Verify model files and print their manifests."""
    from service.artifact import find_artifacts  # noqa: PLC0415
    from service.detector import Detector  # noqa: PLC0415
    from service.errors import OnsetError  # noqa: PLC0415
    from service.terminal import terminal  # noqa: PLC0415

    console = terminal()
    try:
        for file in find_artifacts(model):
            detector = Detector.load(file)
            console.print(f"{file} passes its self-test (sha256 {detector.sha256[:16]}…, {', '.join(detector.providers)})")
            console.print_json(detector.manifest.model_dump_json())
    except OnsetError as error:
        _refuse(error.detail)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        _refuse(f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port (0 = any free one) or --host.")
    return listening


def _launched(data_dir: Path) -> EmbeddedStore:
    from service.embedded import EmbeddedStore  # noqa: PLC0415

    embedded = EmbeddedStore(data_dir)
    atexit.register(embedded.abandon)
    embedded.launch()
    return embedded


def _run(asgi: Any, listening: socket.socket, drain_seconds: float, stderr: Stderr) -> None:
    import asyncio  # noqa: PLC0415

    import uvicorn  # noqa: PLC0415

    from service import logs, memory, tasks  # noqa: PLC0415
    from service.openapi import example  # noqa: PLC0415
    from service.writing import Halves, Room, Unread, most_connections, protocol  # noqa: PLC0415

    class Announcing(uvicorn.Server):
        """Says where it listens, once it does."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            memory.settle()
            if self.started:
                url = _url(*listening.getsockname()[:2])
                wrong = await service.ready()
                curl = f"  curl -s {url}/v1/events -H 'content-type: application/json' -d {shlex.quote(json.dumps(sample))}"
                then = f"Not ready yet: {wrong} Then try" if wrong else "Try"
                to = stderr if service.settings.alerts_stdout else sys.stdout  # which has nothing but alerts then
                _announce(f"Onset serves {url} (page: {url}/, API: {url}/docs). {then}:\n{curl}", cast("TextIO", to))
                models = {name: detector.manifest.version for name, detector in service.detectors.items()}
                logs.log.info("serving", url=url, version=asgi.version, models=models, not_ready=wrong)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            logs.log.info("stopping", drain_seconds=drain_seconds)
            service.stopping()
            halves = asyncio.create_task(Halves(self.server_state.connections).run())  # type: ignore[arg-type]
            await super().shutdown(sockets)
            await tasks.end(halves)
            logs.log.info("stopped")

    service = asgi.state.service
    stderr.lost = service.metrics.log_lost.inc
    unread = Unread(service.settings.max_inflight_bytes, service.metrics.refused.labels("unread").inc, memory.give_back)
    room = Room(most_connections(), service.metrics.refused.labels("connections").inc)
    config = uvicorn.Config(
        asgi,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http=protocol(unread, room, asgi.begin),
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        # Longer than proxies and senders keep a connection (60 s and less): were we the first to close it, a request could meet that.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    server = Announcing(config)
    sample = example(service.detectors[service.default_model].manifest)
    # uvicorn logs a failed start with its traceback; the sentence below is all there is to say.
    logging.getLogger("uvicorn.error").addFilter(lambda record: service.failure is None)
    try:
        server.run(sockets=[listening])
    except SystemExit:
        if service.failure is None:
            raise
    if service.failure is not None:
        _refuse(service.failure)


def _announce(text: str, to: TextIO) -> None:
    """For who started it by hand: a full disk or a reader that is gone is no reason not to serve."""
    try:
        print(text, file=to, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())  # or what is left of it would fail again as the process ends


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches what listens on `host`."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"


def _say(sentence: str, *, err: bool = False) -> None:
    from service.terminal import harmless  # noqa: PLC0415

    typer.echo(harmless(sentence), err=err)


def _refuse(reason: str) -> NoReturn:
    _say(f"onset: {reason}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
