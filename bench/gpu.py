"""The step on a GPU: ONNX Runtime's CUDA provider with inputs and outputs bound to the device's memory, beside the CPU's answers.

    python -m bench.gpu [--quick] [--repetitions 50] [--json FILE]

For the shipped default and the detector of eight features, at 1,024 to 65,536 rows: events a second of `run_with_iobinding` with everything
in the GPU's memory (nothing is copied), the same from and to the machine's memory, states included, as the service would, and the CPU
provider's in one thread. Answers from the same states must agree with the CPU's within 1e-4 (p-values: in their logarithm).

Where there is no GPU it says so in one sentence and ends with 0. Goal: 5 million events/s at eight features, of an H100.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer
from numpy.typing import NDArray
from rich.table import Table

from bench.fleet import default_model, fleet_model
from bench.report import Goal, JsonFile, Machine, report, table
from bench.servers import console
from bench.warm import warm_rows
from service.detector import Detector, session_of
from service.errors import BadSetting
from service.policy import Policy

BATCHES = (1024, 4096, 16_384, 65_536)
TOLERANCE = 1e-4
GOAL_EVENTS = 5e6
LOGARITHMIC = ("p_value", "onset_p")

Feed = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Row:
    model: str
    features: int
    rows: int
    bound_events_per_second: float
    copied_events_per_second: float
    cpu_events_per_second: float
    difference: float
    """The largest from the CPU's answers, relative where they are beyond 1."""


def main(
    repetitions: Annotated[int, typer.Option(min=3, help="Of each batch.")] = 50,
    quick: Annotated[bool, typer.Option("--quick", help="The shipped default at the smallest batch.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure where there is a GPU; say why not where there is none."""
    machine = Machine.now()
    try:
        session_of(default_model().read_bytes(), provider="cuda")
    except BadSetting as error:
        console().print(f"bench.gpu did not run: {error.detail}", markup=False, soft_wrap=True)
        return
    models, batches = ([default_model()], BATCHES[:1]) if quick else ([default_model(), fleet_model()], BATCHES)
    rows = [measure(model, batch, repetitions) for model in models for batch in batches]
    report([_table(rows)], goals(rows), machine, {"rows": [asdict(row) for row in rows]}, json_file)


def measure(model: Path, batch: int, repetitions: int) -> Row:
    detector = Detector.load(model)
    gpu, cpu = session_of(model.read_bytes(), provider="cuda"), session_of(model.read_bytes())
    feed = inputs(detector, batch)
    bound, answers = _bound(gpu, feed)
    names = [node.name for node in gpu.get_outputs()]
    bound()
    got = dict(zip(names, (answers[name].numpy() for name in names), strict=True))
    want = dict(zip(names, cpu.run(names, feed), strict=True))

    def copied() -> None:
        gpu.run(names, feed)

    bound_rate, copied_rate = batch / _median(bound, repetitions), batch / _median(copied, repetitions)
    cpu_rate = batch / _median(lambda: cpu.run(names, feed), max(3, repetitions // 10))
    away = max(difference(name, got[name], want[name]) for name in names)
    return Row(detector.name, detector.features, batch, round(bound_rate), round(copied_rate), round(cpu_rate), away)


def inputs(detector: Detector, batch: int) -> Feed:
    """One event of each of `batch` warm streams."""
    return {
        "state": np.resize(warm_rows(detector)["vector"], (batch, detector.state_size)),
        "x": np.random.default_rng(0).normal(20.0, 1.0, (batch, detector.features)).astype(np.float32),
        "t": np.full((batch, 3), 1.0, np.float32),
        "learn": np.ones(batch, np.float32),
        "alpha": np.full(batch, Policy.alpha, np.float32),
    }


def difference(name: str, got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """The largest one; inf where one of both has no answer."""
    if not np.array_equal(np.isnan(got), np.isnan(want)):
        return float("inf")
    if name in LOGARITHMIC:
        got, want = np.log(got), np.log(want)
    away = np.abs(got - want) / np.maximum(1.0, np.abs(want))
    return float(np.nanmax(away, initial=0.0))


def _bound(session: ort.InferenceSession, feed: Feed) -> tuple[Callable[[], None], dict[str, Any]]:
    """A run on values that lie in the GPU's memory, and its answers there."""
    binding = session.io_binding()
    for name, values in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, "cuda", 0))
    answers = {}
    rows = len(feed["x"])
    for node in session.get_outputs():
        answers[node.name] = ort.OrtValue.ortvalue_from_shape_and_type([rows, *node.shape[1:]], np.float32, "cuda", 0)
        binding.bind_ortvalue_output(node.name, answers[node.name])

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run, answers


def _median(call: Callable[[], object], repetitions: int) -> float:
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def goals(rows: list[Row]) -> list[Goal]:
    made = [Goal("largest difference from the CPU's answers", max(row.difference for row in rows), TOLERANCE, at_least=False)]
    fleet = [row.bound_events_per_second for row in rows if row.features == 8]
    return made + ([Goal("events/s at eight features", max(fleet), GOAL_EVENTS)] if fleet else [])


def _table(rows: list[Row]) -> Table:
    made = table("Events/s of the step alone", ("model",), ("rows", "bound", "copied", "CPU, one thread", "difference"))
    for row in rows:
        rates = (row.rows, row.bound_events_per_second, row.copied_events_per_second, row.cpu_events_per_second)
        made.add_row(f"{row.model}, {row.features}", *(f"{value:,.0f}" for value in rates), f"{row.difference:.1e}")
    return made


if __name__ == "__main__":
    typer.run(main)
