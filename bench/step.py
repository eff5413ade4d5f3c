"""Microseconds that one step of the detector takes, by features, LSTM variant and batch.

    python -m bench.step [--quick] [--json FILE]

Every model has a floor beside it, measured in the same moments: a plain LSTM autoencoder of the same sizes with a running mean and
deviation, its state split and joined, and nothing else. Machines and hours differ, ratios to the floor hardly do. Weights are random but
for the shipped default; states are those of streams 120 events old. One thread of ONNX Runtime, rows padded as the service pads them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import onnx
import torch
import typer
from rich.table import Table
from torch import Tensor

import service
from bench.report import JsonFile
from bench.servers import console
from service.detector import bucket, session_of
from training.autoencoder import Autoencoder, Sizes, Variant
from training.data import Float32
from training.detector import DetectorStep, StepModule
from training.export import INPUTS, to_onnx
from training.layout import Keeps, Layout, Slot
from training.verify import probe_inputs

BATCHES = (1, 64, 256, 1024)
SIZES = {1: Sizes(hidden=32, code=8, decoder_hidden=16), 8: Sizes(decoder_hidden=24), 38: Sizes(decoder_hidden=24)}
AGE, REPETITIONS = 120, 300


class Floor(StepModule):
    """What an LSTM autoencoder costs with no detector around it. Same inputs and as many outputs as the step function."""

    def __init__(self, features: int, sizes: Sizes) -> None:
        super().__init__()
        self.features = features
        self.autoencoder = Autoencoder(features, features, sizes)
        running = tuple(Slot(name, features, Keeps.ROWS) for name in ("mean", "variance", "forecast"))
        self.layout = Layout([*self.autoencoder.slots, *running])

    @property
    def state_size(self) -> int:
        return self.layout.size

    def forward(self, state: Tensor, x: Tensor, t: Tensor, learn: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        slots = self.layout.slots
        parts = dict(zip([slot.name for slot in slots], torch.split(state, [slot.size for slot in slots], dim=1), strict=True))
        difference = torch.where(torch.isnan(x), 0.0, x - parts["mean"])
        z = difference / torch.sqrt(parts["variance"] + 1.0)
        forecast, after = self.autoencoder.step(z, parts)
        learned = {"mean": parts["mean"] + 0.01 * difference, "variance": parts["variance"] + 0.01 * difference * difference}
        after |= {**learned, "forecast": forecast}
        p_value, error = torch.exp(-(z - parts["forecast"]).abs()), z - parts["forecast"]
        answers = (p_value[:, 0], learn * alpha * t[:, 0], parts["forecast"], parts["forecast"] - 1, parts["forecast"] + 1, error)
        return torch.cat([after[slot.name] for slot in slots], dim=1), *answers


@dataclass(frozen=True)
class Model:
    """A step function with what it is compared to."""

    name: str
    features: int
    graph: bytes
    floor: str  # name of its floor; its own where it is one

    @property
    def nodes(self) -> int:
        return len(onnx.load_from_string(self.graph).graph.node)


@dataclass(frozen=True)
class Figures:
    """One model at one batch."""

    model: str
    features: int
    nodes: int
    state_bytes: int
    batch: int
    microseconds_per_event: float  # median
    least_microseconds_per_event: float
    ratio_to_floor: float  # of the medians


def main(
    quick: Annotated[bool, typer.Option("--quick", help="The shipped default and its floor only, few repetitions.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Time the step functions and print a table."""
    torch.set_num_threads(1)
    figures = measure(shipped() if quick else everything(), repetitions=20 if quick else REPETITIONS)
    console().print(_table(figures))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in figures], indent=2))


def shipped() -> list[Model]:
    """The default as it ships, and its floor."""
    file = next((Path(service.__file__).parent / "models").glob("default-*.onnx"))
    return [_floor(1), Model("default", 1, file.read_bytes(), "floor, 1 feature")]


def everything() -> list[Model]:
    models = shipped()
    for features in (8, 38):
        models += [_floor(features), _random(f"fleet, {features} features", features, SIZES[features])]
    for variant in get_args(Variant):
        sizes = SIZES[1]
        models.append(_random(variant, 1, Sizes(sizes.hidden, sizes.layers, sizes.code, sizes.decoder_hidden, variant)))
    return models


def _floor(features: int) -> Model:
    name = f"floor, {features} feature{'s' * (features > 1)}"
    torch.manual_seed(0)
    return Model(name, features, to_onnx(Floor(features, SIZES[features])), name)


def _random(name: str, features: int, sizes: Sizes) -> Model:
    torch.manual_seed(0)
    return Model(name, features, to_onnx(DetectorStep(features, sizes)), f"floor, {features} feature{'s' * (features > 1)}")


class Timed:
    """One model's session with its inputs at one batch, and the seconds its runs took."""

    def __init__(self, model: Model, batch: int) -> None:
        self.session = session_of(model.graph)
        rows = bucket(batch)
        x, t, learn, alpha = probe_inputs(AGE, rows, model.features)
        self.state_size = int(self.session.get_inputs()[0].shape[1])
        state = np.zeros((rows, self.state_size), np.float32)
        for i in range(AGE):
            self.feed: dict[str, Float32] = dict(zip(INPUTS, (state, x[i], t[i], learn[i], alpha[i]), strict=True))
            state = self.session.run(None, self.feed)[0]
        self.seconds: list[float] = []

    def run(self) -> None:
        began = time.perf_counter()
        self.session.run(None, self.feed)
        self.seconds.append(time.perf_counter() - began)


def measure(models: Sequence[Model], repetitions: int, batches: Sequence[int] = BATCHES) -> list[Figures]:
    """All models take turns, so that a slower minute of the machine is everybody's."""
    figures = []
    for batch in batches:
        timed = {model.name: Timed(model, batch) for model in models}
        for _ in range(repetitions):
            for one in timed.values():
                one.run()
        median = {name: float(np.median(one.seconds)) for name, one in timed.items()}
        figures += [
            Figures(
                model=model.name,
                features=model.features,
                nodes=model.nodes,
                state_bytes=4 * timed[model.name].state_size,
                batch=batch,
                microseconds_per_event=round(1e6 * median[model.name] / batch, 3),
                least_microseconds_per_event=round(1e6 * min(timed[model.name].seconds) / batch, 3),
                ratio_to_floor=round(median[model.name] / median[model.floor], 2),
            )
            for model in models
        ]
    return figures


def _table(figures: Sequence[Figures]) -> Table:
    batches = sorted({row.batch for row in figures})
    table = Table(title="µs per event, median (ratio to the floor), one thread")
    table.add_column("model")
    for column in ("nodes", "state bytes", *(f"batch {batch}" for batch in batches)):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(row.model for row in figures):
        rows = [row for row in figures if row.model == name]
        cells = [f"{row.microseconds_per_event:.2f} ({row.ratio_to_floor:.2f})" for row in rows]
        table.add_row(name, str(rows[0].nodes), str(rows[0].state_bytes), *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
