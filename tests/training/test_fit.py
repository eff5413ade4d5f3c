"""From files to a published model: training, resuming, refusing, reporting."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from service.__main__ import app as service_app
from service.detector import Detector
from service.errors import TableError
from service.tables import ReadOptions, find_sources, read_table
from tests.limits import files_of_at_most
from tests.training.conftest import TINY, random_step
from training import pipeline
from training.__main__ import _run, app
from training.autoencoder import Sizes
from training.cache import Cached, alone_in, convert, open_cache, replaced
from training.data import CONTEXT, Block, Fleet, Stream, clock
from training.detector import StepModule
from training.distributed import ALONE
from training.evaluate import Scores, run_streams
from training.export import to_onnx
from training.fit import Drawn, Lanes, Plan, Progress, Trainer, learning_rate, prepare, prepare_all
from training.pipeline import Job, _next_steps, _residuals, _step, _train, fleet_job
from training.report import Shown, draw
from training.synthetic import ANOMALIES, Synthetic, generate, streams

SMALL = Synthetic(0, validation_lanes=8, validation_length=100)
FITTED = "peephole"
PLAN = Plan(steps=8, lanes=4, chunk=24, chunks=2, check_every=1, patience=50)


def streams_of(folder: Path, features: Sequence[str]) -> list[Stream]:
    tables = [read_table(source, notify=lambda _: None) for source in find_sources([folder])]
    return [Stream(table.name, table.matrix(features).astype(np.float32), clock(table.timestamps)) for table in tables]


def fit_arguments(data: Path, out: Path, cell: str) -> list[str]:
    arguments = ["fit", "--data", str(data), "--out", str(out), "--name", "pumps", "--steps", "8", "--cell", cell, "--keep-network"]
    return [*arguments, "--layers", "2", "--hidden", "6", "--code", "3", "--decoder-hidden", "4"]


def fit(data: Path, out: Path, cell: str) -> str:
    """Train a fleet by the command line; what it printed."""
    result = CliRunner().invoke(app, fit_arguments(data, out, cell))
    assert result.exit_code == 0, result.output
    return result.output


_exported = list[bytes]()
"""The graph of `fitted`: to export one takes as long as all else of a small fit."""


@pytest.fixture(scope="session")
def fitted(fleet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A fleet, its folder and what was printed. Not of the standard cell, which test_distributed trains."""

    def kept(step: StepModule) -> bytes:
        _exported.append(to_onnx(step))
        return _exported[-1]

    out = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "to_onnx", kept)
        return out, fit(fleet_folder, out, FITTED)


def test_one_command_makes_a_model_of_a_folder_of_streams(fitted: tuple[Path, str]) -> None:
    out, printed = fitted
    detector = Detector.load(out / "pumps-1.onnx")
    assert detector.manifest.feature_names == ("load", "heat")
    assert detector.manifest.training.streams == 2
    assert detector.manifest.training.rows == 840
    assert len(detector.manifest.training.data_sha256) == 64
    assert "Left out as labels: label" in printed
    assert re.search(r"Reading files .* 2/2 ", printed), "an hour of silence, of years of rows"
    assert "python -m service serve --model" in printed
    assert "python -m service backtest" in printed


def test_the_next_step_serves_the_file_where_its_folder_cannot_be_served(fitted: tuple[Path, str], tmp_path: Path) -> None:
    """A second version beside the first: the command that fit gave was refused, and so was the next restart of the folder's service."""
    for version in (1, 2):
        model = tmp_path / f"pumps-{version}.onnx"
        shutil.copy(fitted[0] / "pumps-1.onnx", model)
        served, *_ = _next_steps(model)
        command, _, why = served.partition("      # ")
        assert command == f"python -m service serve --model {tmp_path if version == 1 else model}"
        assert why.partition(":")[2].partition(",")[0] == (
            "" if version == 1 else f" {tmp_path} holds two models named 'pumps': keep one version of each"
        )


def test_the_report_shows_the_loss_and_a_stream(fitted: tuple[Path, str]) -> None:
    out, _ = fitted
    content = json.loads((out / "report.json").read_text())
    assert content["model"] == "pumps-1.onnx"
    assert len(content["loss"]["training"]) == 2
    assert content["quality"]["calibrated_on"]["rows"] == "the rows that the network learned from"
    assert content["quality"]["false_onsets_on_unseen_rows"]["0.001"]["events"] > 0
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    told = (out / "report.md").read_text()
    assert "![" in told
    assert "\n\nCalibrated on 2 stream(s): too few to know how much others differ, so α may not hold.\n" in told
    page = (out / "report.html").read_text()
    assert 'class="value"' in page
    assert "840 rows of 2 of 2 streams, 5,000 at most of each" in page
    assert "It was fitted to 714 of them, the first of each stream." in page


def test_the_published_model_finds_an_offset_and_names_its_feature(fitted: tuple[Path, str], fleet_folder: Path) -> None:
    detector = Detector.load(fitted[0] / "pumps-1.onnx")
    stream = streams_of(fleet_folder, detector.manifest.feature_names)[0]
    x = stream.x.copy()
    x[300:, 1] += 4000
    scores = run_streams(detector.step, detector.state_size, x[:310, None], stream.t[:310, None])
    assert np.nanmin(scores.onset_p[300:]) < 1e-3
    assert scores.contribution[300, 0, 1] > 0.5
    assert np.isfinite(scores.expected[101, 0, 1])
    assert scores.contribution[101, 0, 1] == 0


def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    def trainer(checkpoint: Path | None) -> Trainer:
        return Trainer(random_step(1), SMALL, PLAN, checkpoint)

    whole = trainer(None)
    whole.run()

    def kill(reached: Progress) -> None:
        if reached.block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "checkpoint.pt").run(kill)
    continued = trainer(tmp_path / "checkpoint.pt")
    assert continued.resume()
    assert continued.progress.block == 2
    continued.run()
    assert continued.progress == whole.progress
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, continued.network.state_dict()[name]), name


def test_a_block_is_prepared_beside_others_as_it_is_alone() -> None:
    step, rng = random_step(3), np.random.default_rng(0)

    def drawn(rows: int, lanes: int, lead: int) -> Drawn:
        x = np.cumsum(rng.normal(size=(rows, lanes, 3)), axis=0).astype(np.float32)
        x[rng.random(x.shape) < 0.05] = np.nan
        t = np.stack([clock(1.7e9 + np.cumsum(rng.uniform(50, 70, rows))) for _ in range(lanes)], axis=1)
        return Drawn(Block(x, t), rng, None, slice(1, lanes), lead)

    blocks = [drawn(90, 9, 0), drawn(60, 5, 12), drawn(90, 2, 7)]
    for one, beside in zip(blocks, prepare_all(step, blocks), strict=True):
        x, t = (torch.from_numpy(part[:, one.own].copy()) for part in (one.block.x, one.block.t))
        alone = prepare(step, x, t, Lanes.fresh(step, x.shape[1]))
        for name in ("inputs", "z", "present"):
            assert torch.equal(getattr(beside, name), getattr(alone, name)[one.lead :]), name


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    Trainer(random_step(1), SMALL, replace(PLAN, steps=2), path).run()
    with pytest.raises(ValueError, match=r"belongs to a run with other settings or data: steps 2, now 8\. Use the same ones"):
        Trainer(random_step(1), SMALL, PLAN, path).resume()


def test_what_is_not_as_it_was_is_told_by_its_name(tmp_path: Path) -> None:
    """It was both data hashes, and all names of the columns and all sizes of the network twice over."""
    path, step = tmp_path / "checkpoint.pt", random_step(1)
    was = {"data": "ab", "features": ["heat", "load"], "hidden": 48}
    Trainer(step, SMALL, replace(PLAN, steps=2), path, was).run()
    for now, said in (
        ({"data": "cd"}, "data: the files or their rows. Use"),
        ({"data": "cd", "features": ["flow", "load"]}, "data: the columns, now without 'heat' and with 'flow'. Use"),
        ({"features": ["load", "heat"]}, "data: the columns, now in another order. Use"),
        ({"hidden": 32}, "data: hidden 48, now 32. Use"),
    ):
        with pytest.raises(ValueError, match=said):
            Trainer(step, SMALL, replace(PLAN, steps=2), path, was | now).resume()


@pytest.mark.parametrize("fill", [lambda: np.empty(1 << 50), lambda: torch.empty(1 << 50)])
def test_too_little_memory_is_told_with_what_to_do(fill: Callable[[], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was a traceback, after the network had learned for hours."""
    (tmp_path / "checkpoint.pt").touch()

    def job(_said: Console) -> Job:
        fill()
        raise AssertionError

    with pytest.raises(typer.Exit):
        _run(job, tmp_path, 1, resume=False)
    said = " ".join(capsys.readouterr().err.split())
    assert "Too little memory (" in said
    assert "leave some out (--exclude)" in said
    assert said.endswith("with --resume continues from " + str(tmp_path / "checkpoint.pt") + ".")


def test_what_signals_are_fitted_on_is_the_same_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 machines of 300 columns it was all of them through the network at once, gigabytes."""
    step, rng = random_step(3), np.random.default_rng(0)
    x = rng.normal(size=(50, 5, 3)).astype(np.float32)
    x[20:, 4] = np.nan
    t = np.stack([clock(1.7e9 + 60 * np.arange(50, dtype=np.float64))] * 5, axis=1)
    whole = _residuals(step, x, t)
    monkeypatch.setattr(pipeline, "POOLED_VALUES", 2 * 50 * 3)
    for one, other in zip(whole, _residuals(step, x, t), strict=True):
        assert torch.allclose(one, other, atol=1e-6, equal_nan=True)
        assert len(one) == 5 * (49 - 12)


def test_to_continue_where_there_is_no_checkpoint_is_told(fleet_folder: Path, tmp_path: Path) -> None:
    convert([fleet_folder], ReadOptions(), tmp_path / "cache", lambda _: None)
    job = fleet_job(open_cache(tmp_path / "cache"), [fleet_folder], TINY, Plan(steps=2, chunk=24, chunks=2), 0.15, None, "1", "")
    said = Console(record=True, quiet=False, file=io.StringIO(), width=400)
    _train(_step(job, TINY), job, tmp_path / "out" / "checkpoint.pt", True, said, ALONE)
    assert "checkpoint.pt to continue from: beginning anew." in said.export_text()


def test_rows_that_were_learned_from_are_not_validated_on_by_a_run_that_continues(fleet_folder: Path, tmp_path: Path) -> None:
    steps, out = Plan(steps=4, chunk=24, chunks=2), tmp_path / "out"
    convert([fleet_folder], ReadOptions(), out / "cache", lambda _: None)

    def train(validation: float, *, resume: bool) -> None:
        job = fleet_job(open_cache(out / "cache"), [fleet_folder], TINY, steps, validation, None, "1", "")
        _train(_step(job, TINY), job, out / "checkpoint.pt", resume, Console(quiet=True), ALONE)

    train(0.15, resume=False)
    train(0.15, resume=True)
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train(0.4, resume=True)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_refused_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read, so there is nothing to continue from"):
        Trainer(random_step(1), SMALL, PLAN, tmp_path / "checkpoint.pt").resume()


@pytest.mark.parametrize(("room", "named", "left"), [(4000, "cache", {".fit.lock"}), (12_000, "checkpoint.pt", {".fit.lock", "cache"})])
def test_a_fit_onto_a_full_disk_names_the_file_and_leaves_no_half_of_one(
    tmp_path: Path, fleet_folder: Path, room: int, named: str, left: set[str]
) -> None:
    with files_of_at_most(room):
        result = CliRunner().invoke(app, ["fit", "--data", str(fleet_folder), "--out", str(tmp_path), "--name", "pumps", "--steps", "8"])
    assert result.exit_code == 1
    printed = " ".join(result.output.split())
    assert f"{named} cannot be written: File too large." in printed
    assert "--resume" not in printed
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_fit_that_filled_the_disk_late_says_how_it_goes_on(
    fitted: tuple[Path, str], fleet_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(fitted[0], out)
    before = (out / "pumps-1.onnx").read_bytes()
    monkeypatch.setattr(pipeline, "to_onnx", lambda step: _exported[0])  # the same weights as when it was made
    with files_of_at_most(len(before) // 2):
        result = CliRunner().invoke(app, [*fit_arguments(fleet_folder, out, FITTED), "--resume"])
    assert result.exit_code == 1
    assert "pumps-1.onnx cannot be written: File too large. It takes " in " ".join(result.output.split())
    assert "with --resume continues from" in " ".join(result.output.split())
    assert (out / "pumps-1.onnx").read_bytes() == before


def test_a_fit_that_is_stopped_names_the_checkpoint_only_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While files were read it had named one to continue from, too."""

    def interrupted(_: object) -> Job:
        raise KeyboardInterrupt

    for said in ("Stopped.", f"Stopped. The same command with --resume continues from {tmp_path / 'checkpoint.pt'}."):
        with pytest.raises(typer.Exit) as stopped:
            _run(interrupted, tmp_path, threads=1, resume=False)
        assert stopped.value.exit_code == 130
        assert capsys.readouterr().out == said + "\n"
        (tmp_path / "checkpoint.pt").touch()


def test_there_is_nothing_to_resume_without_a_checkpoint(tmp_path: Path) -> None:
    assert not Trainer(random_step(1), SMALL, PLAN, tmp_path / "none.pt").resume()


def test_training_lowers_the_validation_loss() -> None:
    trainer = Trainer(random_step(1), SMALL, replace(PLAN, steps=24, lanes=8, chunk=48))
    progress = trainer.run()
    assert progress.best_loss < progress.validation[0][1] - 0.1
    assert trainer.validate() == pytest.approx(progress.best_loss)


def test_training_stops_when_the_validation_part_gets_no_better() -> None:
    trainer = Trainer(random_step(1), SMALL, replace(PLAN, steps=200, learning_rate=0.0, patience=2))
    assert trainer.run().block == 2


def test_the_learning_rate_rises_then_falls() -> None:
    plan = Plan(steps=100)
    rates = [learning_rate(plan, step) for step in range(100)]
    assert max(rates) == rates[10] == plan.learning_rate
    assert rates[0] < 0.1 * plan.learning_rate
    assert rates[99] < 0.02 * plan.learning_rate


def test_training_lanes_never_reach_into_the_validation_part(fleet_folder: Path) -> None:
    source = streams_of(fleet_folder, ["load", "heat"])
    numbered = [replace(stream, x=np.stack([np.arange(len(stream))] * 2, axis=1).astype(np.float32)) for stream in source]
    fleet = Fleet(numbered, validation_share=0.25)
    for seed in range(20):
        assert np.nanmax(fleet.block(np.random.default_rng(seed), 8, 96).x) < fleet.splits[0]
    validation = fleet.validation()
    assert validation.x[validation.counts_from :].min() >= fleet.splits[0]
    cached = Cached(["a", "b"], numbered, [], 0, "", "", "")
    job = fleet_job(cached, [Path("fleet")], Sizes(), Plan(chunk=96), 0.25, None, "1", "")
    assert max(stream.x.max() for stream in job.calibration) < fleet.splits[0], "nor does the calibration"
    for stream, seen in zip(job.evaluation, job.counted_from, strict=True):
        assert stream.x[seen:].min() >= fleet.splits[0], "and what is measured is behind both"


def test_a_file_of_a_few_rows_takes_nothing_from_the_others() -> None:
    """All lanes that are validated on had its lead, and a block that drew nothing but it had a loss that is no number."""
    x = np.arange(900, dtype=np.float32)[:, None]
    streams = [Stream(str(rows), x[:rows], clock(np.arange(float(rows)))) for rows in (900, 800, 3)]
    alone, beside = Fleet(streams[:2]), Fleet(streams)
    assert beside.validation().counts_from == alone.validation().counts_from == CONTEXT
    assert np.array_equal(beside.validation().x, alone.validation().x, equal_nan=True)
    for index in range(200):
        assert len(beside.block(np.random.default_rng(index), 1, 50).x) == 50


def test_the_clock_knows_gaps_days_and_weekdays() -> None:
    monday_noon = 1_704_110_400.0  # 2024-01-01T12:00:00Z
    t = clock(np.array([monday_noon, monday_noon + 90.0]))
    assert np.isnan(t[0, 0])
    assert t[1].tolist() == [90.0, 43_290.0, 0.0]


def test_the_generator_repeats_itself_for_the_same_seed() -> None:
    first, second = (generate(np.random.default_rng(3), 16, 200) for _ in range(2))
    assert np.array_equal(first.x, second.x, equal_nan=True)
    assert (np.diff(first.times, axis=1) > 0).all()
    assert np.isfinite(first.x).mean() > 0.9
    assert not np.array_equal(first.x, generate(np.random.default_rng(4), 16, 200).x, equal_nan=True)


@pytest.mark.parametrize("name", ANOMALIES)
def test_an_anomaly_leaves_the_past_alone(name: str) -> None:
    x = streams(np.random.default_rng(1), 1, 300)[0].x[:, 0].astype(np.float64)
    y = ANOMALIES[name](np.random.default_rng(2), x, 200)
    assert np.array_equal(x[:200], y[:200], equal_nan=True)
    assert not np.array_equal(x[200:], y[200:], equal_nan=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("timestamp,value\n" + "\n".join(f"{i},1" for i in range(20)), "too few to train on"),
        (
            "timestamp,value\n" + "\n".join(f"{i},1" for i in range(150)),  # it had said that 150 are less than 128
            "150 rows, and the network learns from 127 of them, the first 85 %: too few to train on (128 at least)",
        ),
        ("timestamp,value\n1,x\n", "'x' is not a number"),
    ],
)
def test_bad_data_is_refused_in_a_sentence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(content)
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_units_in_brackets_are_no_markup_of_what_is_printed(tmp_path: Path) -> None:
    (tmp_path / "pump.csv").write_text("timestamp,n [/min],Druck [bar]\n" + "\n".join(f"{i},1,2" for i in range(20)))
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "20 rows, 2 feature(s): n [/min], Druck [bar]" in result.output
    assert "too few to train on" in result.output


def test_a_name_with_dollars_is_drawn_as_it_is(tmp_path: Path) -> None:
    rows, stream = np.zeros((20, 1, 1), np.float32), Stream("a", np.zeros((20, 1), np.float32), np.zeros((20, 3), np.float32))
    scores = Scores(np.ones((20, 1), np.float32), np.ones((20, 1), np.float32), rows, rows, rows, rows)
    draw(tmp_path / "report.png", Progress(), Shown(stream, scores, ["cost $x_^$"], 0, None, ""))
    assert (tmp_path / "report.png").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "sensors", "--name", "Pumps"], "'Pumps' is no name of a model: 1 to 64 lower case letters"),
        (["--data", "sensors", "--version", "1/2"], "'1/2' is no version of a model: 1 to 32 letters"),
        (["--logs", "app.log", "--name", "Pumps"], "'Pumps' is no name of a model: 1 to 64 lower case letters"),
        (["--data", "sensors", "--time-format", "%d"], "--time-format means nothing with --data"),
        (["--logs", "app.log", "--device", "cpu"], "--device means nothing with --logs"),
        (["--sessions", "keys.txt", "--mask", "a=b"], "--mask means nothing with --sessions"),
        (["--data", "sensors", "--exclude", "lable"], "--exclude 'lable' fits no column; there are 'timestamp', 'load'."),
        (["--data", "sensors", "--array", "train"], "--array 'train' names an array of an npz file, and there is none"),
    ],
)
def test_what_could_not_be_published_or_means_nothing_is_refused_before_training(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sensors").mkdir()
    Path("sensors/a.csv").write_text("timestamp,load\n" + "\n".join(f"{i},{i % 3}" for i in range(300)))
    result = CliRunner().invoke(app, ["fit", "--out", "out", *arguments])
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.glob("out/checkpoint.pt"))


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("c{}", 301, "301 columns are more than a model takes (300). Leave some out (--exclude COLUMN), or"),
        ("c" * 129 + "{}", 2, "is no name of a column: 1 to 128 characters"),
    ],
)
def test_columns_that_no_model_takes_are_refused_in_plain_words(name: str, count: int, message: str, tmp_path: Path) -> None:
    """It was the validator's "List should have at most 300 items after validation"."""
    head = ",".join(["timestamp", *(name.format(i) for i in range(count))])
    (tmp_path / "a.csv").write_text("\n".join([head, *(f"{i}," + ",".join([str(i % 3)] * count) for i in range(300))]))
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (301, (), "301 columns are more than a model takes"),
        (2, ("--context", "valve"), "There is no column 'valve' to be context; there are 'c0', 'c1'."),
        (2, ("--waveform",), "A waveform is one column, here are 2: 'c0', 'c1'."),
        (3, (), "b.csv lacks 'c2', which a.csv has"),
    ],
)
def test_features_of_which_no_model_can_be_made_are_refused_before_the_rows_are_read(
    columns: int, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    """Of a year of 301 columns all rows were read and written first, and of a fleet all files before the one that lacks a column."""
    for name, count in (("a", columns), ("b", columns - (columns == 3))):
        rows = ["timestamp," + ",".join(f"c{i}" for i in range(count)), "0" + ",1" * count, "1" + ",word" * count]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(("files", "message"), [("a", "a.csv has no rows."), ("ab", "None of 2 files has a row.")])
def test_files_without_a_row_are_told_as_such(files: str, message: str, tmp_path: Path) -> None:
    """It was "0 columns are more than a model takes (300)"."""
    for name in files:
        (tmp_path / f"{name}.csv").write_text("timestamp,load\n")
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    assert " ".join(result.output.split()).endswith(message)


def test_history_without_a_value_to_stop_by_is_refused(tmp_path: Path) -> None:
    """It had published the network as it was before its first step: that one was never bettered."""
    (tmp_path / "a.csv").write_text("timestamp,load\n" + "\n".join(f"{i},{i % 3 if i < 300 else ''}" for i in range(400)))
    arguments = ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--validation", "0.25"])
    assert result.exit_code == 1, result.output
    assert "Nothing says when to stop learning: the rows behind the first 75 %" in " ".join(result.output.split())


def test_what_a_run_replaces_is_said_before_it_begins(tmp_path: Path) -> None:
    assert replaced(tmp_path, "machine", "1") == ""
    (tmp_path / "report.md").touch()
    (tmp_path / "pumps-1.onnx").touch()
    assert "report.md is another model's, and is replaced" in replaced(tmp_path, "machine", "1")
    assert "pumps-1.onnx and its report are there, and are replaced" in replaced(tmp_path, "pumps", "1")
    assert "another --version keeps the file, another --out both" in replaced(tmp_path, "pumps", "1")


def test_two_runs_are_not_in_one_folder_at_once(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"), pytest.raises(TableError, match="Another run makes a model in"), alone_in(tmp_path / "out"):
        pass
    with alone_in(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("heat", "b.csv lacks 'load', which a.csv has: one model, one set of features. --exclude 'load' leaves a column out of all files"),
        ("load,heat", "b.csv has 'heat', which a.csv lacks: one model, one set of features. --exclude 'heat' leaves a column out of all"),
    ],
)
def test_streams_with_other_features_are_refused_with_what_to_do(columns: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("timestamp,load\n" + "\n".join(f"{i},1" for i in range(300)))
    (tmp_path / "b.csv").write_text(f"timestamp,{columns}\n" + "\n".join(f"{i}" + ",1" * len(columns.split(",")) for i in range(9)))
    result = CliRunner().invoke(app, ["fit", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_help_names_every_option_and_an_example() -> None:
    result = CliRunner().invoke(app, ["fit", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    for word in (
        "--data",
        "--out",
        "--resume",
        "--seed",
        "--exclude",
        "--timestamp",
        "--threads",
        "--lanes",
        "--device",
        "--precision",
        "torchrun",
        "Example",
    ):
        assert word in result.output


def test_verify_tells_what_a_file_is_and_refuses_a_changed_one(fitted: tuple[Path, str], tmp_path: Path) -> None:
    model = fitted[0] / "pumps-1.onnx"
    result = CliRunner().invoke(app, ["verify", str(model)])
    assert result.exit_code == 0
    assert "pumps 1, 2 feature(s)" in " ".join(result.output.split())
    content = bytearray(model.read_bytes())
    content[200] ^= 1
    (tmp_path / "changed.onnx").write_bytes(content)
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "changed.onnx")]).exit_code == 1


def test_sizes_are_recorded(fitted: tuple[Path, str]) -> None:
    cell = Detector.load(fitted[0] / "pumps-1.onnx").manifest.cell
    assert (cell.variant, cell.hidden, cell.code, cell.decoder_hidden) == (FITTED, TINY.hidden, TINY.code, TINY.decoder_hidden)


@pytest.mark.parametrize("cell", [FITTED, "bidirectional", "convolutional", "memoryless"])
def test_every_cell_is_trained_published_and_served_by_the_same_commands(
    cell: str, fitted: tuple[Path, str], fleet_folder: Path, tmp_path: Path
) -> None:
    """The standard one is in test_distributed, the coupled one in test_waveform, none in test_bench_quality."""
    out = fitted[0] if cell == FITTED else tmp_path
    if cell != FITTED:
        fit(fleet_folder, out, cell)
    model = out / "pumps-1.onnx"
    manifest = Detector.load(model).manifest  # what the service does: hash, self-test, rows independent
    assert (manifest.cell.variant, manifest.cell.layers) == (cell, 2)
    scores = tmp_path / "scores"
    result = CliRunner().invoke(service_app, ["backtest", str(fleet_folder), "--model", str(model), "--out", str(scores)])
    assert result.exit_code == 0, result.output
    assert len(list(scores.glob("**/*.csv"))) >= 2
