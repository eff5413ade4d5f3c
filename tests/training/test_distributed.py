"""One model, however many processes train it, whatever they compute with. The processes are real: started by torchrun, joined by gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from tests.training.conftest import TINY, random_step
from training.__main__ import app
from training.autoencoder import Variant
from training.detector import DetectorStep
from training.distributed import World
from training.fit import Lanes, Plan, Prepared, Trainer, corrupted, counted, loss_of, prepare
from training.synthetic import Synthetic
from training.verify import verify_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
SIZES = ["--hidden", "6", "--code", "3", "--decoder-hidden", "4", "--lanes", "7", "--device", "cpu", "--name", "pumps"]
SECONDS = 300
CLOSE = 1e-4
"""Gradients are summed in another order; after these few steps the weights were measured to differ by 1e-7."""


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["fit", "--data", str(data), "--out", str(out), "--steps", "60", "--keep-network", *SIZES, *more]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*TORCHRUN, *arguments], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(run: subprocess.Popen[str]) -> str:
    """What it printed; nothing of it outlives the test."""
    try:
        return run.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(run.pid)
        for process in (*launcher.children(recursive=True), launcher):
            process.kill()
        run.communicate()
        raise


def checkpoint(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return content


def assert_same_training(one: Path, other: Path) -> None:
    first, second = checkpoint(one), checkpoint(other)
    for name, value in first["best"].items():
        assert torch.allclose(value, second["best"][name], rtol=0, atol=CLOSE), name
    for curve in ("training", "validation"):
        assert np.allclose(first["progress"][curve], second["progress"][curve], atol=CLOSE)


@pytest.fixture(scope="module")
def alone(fleet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("alone")
    result = CliRunner().invoke(app, arguments(fleet_folder, out))
    assert result.exit_code == 0, result.output
    return out


def test_when_a_process_is_killed_the_others_end_and_the_run_continues_to_the_model_of_one(
    alone: Path, fleet_folder: Path, tmp_path: Path
) -> None:
    """Two processes make the model of one, and that a first run of theirs was cut short makes no difference."""
    run = torchrun(*arguments(fleet_folder, tmp_path))
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "checkpoint.pt").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    last = next(worker for worker in workers if worker.environ()["RANK"] == "1")
    last.send_signal(signal.SIGKILL)
    printed = ended(run)
    assert run.returncode != 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert "Published" not in printed
    assert printed.count("Left out as labels") == 1
    assert checkpoint(tmp_path)["progress"]["block"] < 15

    run = torchrun(*arguments(fleet_folder, tmp_path, "--resume"))
    printed = ended(run)
    assert run.returncode == 0, printed
    assert "Continuing at step " in printed
    assert "2 processes on cpu, float32" in printed
    assert " ".join(printed.split()).count("bytes a stream") == 1
    assert_same_training(alone, tmp_path)
    one, two = verify_file(alone / "pumps-1.onnx"), verify_file(tmp_path / "pumps-1.onnx")
    assert two.training.command.startswith("torchrun --nproc-per-node 2 -m training fit")
    assert (one.training.data_sha256, one.training.rows) == (two.training.data_sha256, two.training.rows)
    assert one.cell == two.cell
    assert one.cell.variant == "standard"
    assert one.calibration["tau"] == pytest.approx(two.calibration["tau"], rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_what_is_refused_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("timestamp,value\n1,x\n")
    run = torchrun(*arguments(tmp_path / "bad.csv", tmp_path / "out"))
    printed = ended(run)
    assert run.returncode == 1
    assert printed.count("'x' is not a number") == 1


# ── the split itself, in one process ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 32, 33])
def test_every_lane_belongs_to_exactly_one_process(size: int) -> None:
    lanes = np.arange(32)
    shares = [lanes[World(rank, size).share(32)] for rank in range(size)]
    assert np.concatenate(shares).tolist() == lanes.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def prepared_block(step: DetectorStep) -> Prepared:
    """Five lanes with different numbers of present values."""
    block = Synthetic(0).block(np.random.default_rng(1), 5, 60)
    block.x[10:30, :2] = np.nan
    return prepare(step, torch.from_numpy(block.x), torch.from_numpy(block.t), Lanes.fresh(step, 5))


def cut_to(prepared: Prepared, own: slice) -> Prepared:
    return Prepared(prepared.inputs[:, own], prepared.z[:, own], prepared.present[:, own])


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_losses_and_gradients_of_the_parts_of_a_block_add_up_to_those_of_the_whole(size: int) -> None:
    step = random_step(1)
    whole = prepared_block(step)

    def learned(part: Prepared) -> float:
        outputs = step.autoencoder.sequence(part.inputs, step.autoencoder.fresh(part.inputs.shape[1]))
        loss = loss_of(outputs, part, 7, counted(whole))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    expected = learned(whole)
    gradients = [parameter.grad.clone() for parameter in step.autoencoder.parameters() if parameter.grad is not None]
    step.autoencoder.zero_grad()
    assert sum(learned(cut_to(whole, World(rank, size).share(5))) for rank in range(size)) == pytest.approx(expected, rel=1e-5)
    summed = [parameter.grad for parameter in step.autoencoder.parameters()]
    assert len(summed) == len(gradients)
    for got, want in zip(summed, gradients, strict=True):
        assert got is not None
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("own", [slice(0, 2), slice(2, 5), slice(5, 5)])
def test_a_lane_is_corrupted_alike_however_the_block_is_split(own: slice) -> None:
    step = random_step(1)
    whole = prepared_block(step)
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    assert torch.equal(corrupted(whole, rng, 5, slice(0, 5))[:, own], corrupted(cut_to(whole, own), again, 5, own))
    assert rng.random() == again.random()


# ── precision and device ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cell", [cell for cell in get_args(Variant) if cell != "none"])
def test_every_cell_learns_in_bfloat16_nearly_what_it_learns_in_float32(cell: Variant) -> None:
    plan, source = Plan(steps=6, lanes=4, chunk=24, chunks=2, check_every=1), Synthetic(0, validation_lanes=4, validation_length=100)

    def trained(world: World) -> Trainer:
        torch.manual_seed(0)
        trainer = Trainer(DetectorStep(1, replace(TINY, cell=cell)), source, plan, world=world)
        trainer.run()
        return trainer

    full, half = trained(World()), trained(World(precision=torch.bfloat16))
    (_, expected), (_, losses) = (zip(*trainer.progress.training, strict=True) for trainer in (full, half))
    assert np.isfinite(losses).all()
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected  # bfloat16 did compute
    assert half.progress.best_loss == pytest.approx(full.progress.best_loss, rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in half.network.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_a_sentence(fleet_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments(fleet_folder, tmp_path, "--device", "cuda"))
    assert result.exit_code == 1
    assert "needs a GPU of its own, PyTorch sees 0" in " ".join(result.output.split())
