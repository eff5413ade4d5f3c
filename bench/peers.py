"""Events a second of what one would use instead, on the same events in the same run: theirs bare, ours durable and over HTTP.

    python -m bench.peers [--quick] [--seconds 9] [--json FILE]

    ours          the service: HTTP, bodies of 1,000 events over 10,000 warm streams, one event a stream, each state in the append-only file
                  before its answer; the load generator on the same machine takes its part of the processors
    window LSTM   what tutorials do: for each event an LSTM autoencoder (hidden 64, encoder and decoder) reads the stream's last 64 values
                  again; 1,000 streams a batch, windows kept as arrays, all processors; in PyTorch, and the same network in ONNX Runtime
    river         HalfSpaceTrees behind MinMaxScaler, one for each of 10 streams, warm, `score_one` and `learn_one`, defaults
    rrcf          a robust random cut forest of 40 full trees of 256 points, one stream's: forget, insert, codisp
    xStream       pysad's, one stream's, `fit_score_partial`, defaults

Peers run in this process: nothing is parsed, stored or sent. They take turns in slices, the service's load among them. One value an event.
Goals: at least 10 times the window in ONNX Runtime, and 5 times river. Needs `.[train,bench]`.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import psutil
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from bench.http import STREAMS, warm_service
from bench.load import Tally, drive
from bench.report import LATENCY_COLUMNS, Goal, JsonFile, Latency, Machine, report, table
from bench.servers import Server
from bench.traffic import BODY_EVENTS, bodies, requests

WINDOW, HIDDEN = 64, 64
TREES, POINTS = 40, 256
MODELS, SETTLED = 10, 600
"""Streams that river has a detector each for, and the events those have seen: its trees are built by the first ones."""
SLICES = 3
OURS, ONNX, RIVER = "ours, durable, over HTTP", "window LSTM, ONNX Runtime", "river HalfSpaceTrees"
ONNX_GOAL, RIVER_GOAL = 10.0, 5.0

Values = NDArray[np.float32]
Peer = Callable[[Values], None]
"""Scores one event of each of some streams, [B]; what each call takes is its latency."""


@dataclass(frozen=True)
class Row:
    detector: str
    events_per_second: float
    events_a_call: int
    latency: Latency
    """Of a call; ours: of a body of 1,000 events, four in flight."""


@dataclass
class Spent:
    calls: list[float] = field(default_factory=list)
    events: int = 0


class WindowAutoencoder(nn.Module):
    """The usual one: encode the window [B, T, 1], repeat the last state, decode, score by the mean squared error [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(1, HIDDEN, batch_first=True)
        self.decoder = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.output = nn.Linear(HIDDEN, 1)

    def forward(self, window: Tensor) -> Tensor:
        _, (hidden, _) = self.encoder(window)
        decoded, _ = self.decoder(hidden[-1].unsqueeze(1).expand(-1, WINDOW, -1))
        error: Tensor = ((self.output(decoded) - window) ** 2).mean(dim=(1, 2))
        return error


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Measured time of each.")] = 9.0,
    quick: Annotated[bool, typer.Option("--quick", help="A second and a half each: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run ours and the peers in turn and print a table."""
    machine = Machine.now()
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder, warm_service(Path(folder)) as server:
        rows = measure(server, 1.5 if quick else seconds)
    report([_table(rows)], goals(rows), machine, {"rows": [asdict(row) for row in rows]}, json_file)


def measure(server: Server, seconds: float) -> list[Row]:
    peers: dict[str, tuple[int, Peer]] = {
        "window LSTM, PyTorch": (BODY_EVENTS, window_in_torch()),
        ONNX: (BODY_EVENTS, window_in_onnx()),
        RIVER: (1, half_space_trees()),
        "rrcf": (1, cut_forest()),
        "pysad xStream": (1, xstream()),
    }
    spent, ours = {name: Spent() for name in peers}, Tally()
    make, rng = requests(bodies(range(STREAMS))), np.random.default_rng(0)
    for _ in range(SLICES):
        ours.add(asyncio.run(drive(server.port, make, connections=4, seconds=seconds / SLICES)))
        for name, (events, peer) in peers.items():
            _run(peer, events, spent[name], seconds / SLICES, rng)
    if ours.failures:
        raise SystemExit(f"{ours.failures} requests failed; the figures do not count.")
    rows = [Row(OURS, round(ours.rate * BODY_EVENTS, 1), BODY_EVENTS, ours.latency)]
    return rows + [_row(name, events, spent[name]) for name, (events, _) in peers.items()]


def goals(rows: list[Row]) -> list[Goal]:
    rate = {row.detector: row.events_per_second for row in rows}
    return [Goal(f"events/s of {name}'s", rate[OURS] / rate[name], bound) for name, bound in ((ONNX, ONNX_GOAL), (RIVER, RIVER_GOAL))]


def _run(peer: Peer, events: int, spent: Spent, seconds: float, rng: np.random.Generator) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        values = rng.normal(20.0, 1.0, (BODY_EVENTS // events, events)).astype(np.float32)
        for some in values:
            began = time.perf_counter()
            peer(some)
            spent.calls.append(time.perf_counter() - began)
            spent.events += events
            if time.perf_counter() >= until:
                break


def _row(name: str, events: int, spent: Spent) -> Row:
    return Row(name, round(spent.events / sum(spent.calls), 1), events, Latency.of(spent.calls))


# ── the window again for each event ───────────────────────────────────────────────────────────────────────────────────────────


def _windows(score: Callable[[Values], object]) -> Peer:
    """Keeps the windows of STREAMS streams [S, T, 1]; a call is the next 1,000 streams' turn."""
    windows = np.random.default_rng(1).normal(20.0, 1.0, (STREAMS, WINDOW, 1)).astype(np.float32)
    turns = itertools.cycle(range(0, STREAMS, BODY_EVENTS))

    def one_event_each(values: Values) -> None:
        first = next(turns)
        some = windows[first : first + len(values)]
        some[:, :-1] = some[:, 1:].copy()
        some[:, -1, 0] = values
        score(some)

    return one_event_each


def window_in_torch() -> Peer:
    torch.manual_seed(0)
    torch.set_num_threads(psutil.cpu_count() or 1)
    network = WindowAutoencoder().eval()

    def score(windows: Values) -> object:
        with torch.inference_mode():
            return network(torch.from_numpy(windows)).numpy()

    return _windows(score)


def window_in_onnx() -> Peer:
    torch.manual_seed(0)
    session = ort.InferenceSession(window_graph(), providers=["CPUExecutionProvider"])
    return _windows(lambda windows: session.run(None, {"window": windows}))


def window_graph() -> bytes:
    """The same network; of a fixed number of rows, which is the fastest."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own future
        example: Any = (torch.zeros(BODY_EVENTS, WINDOW, 1),)
        buffer: Any = content  # it takes one, its signature does not say so
        torch.onnx.export(WindowAutoencoder().eval(), example, buffer, dynamo=False, opset_version=18, input_names=["window"])
    return content.getvalue()


# ── detectors in Python, one for each stream ──────────────────────────────────────────────────────────────────────────────────


def half_space_trees() -> Peer:
    from river import anomaly, preprocessing  # noqa: PLC0415  optional: extra `bench`

    made = [preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(seed=i) for i in range(MODELS)]
    for model in made:
        for value in np.random.default_rng(4).normal(20.0, 1.0, SETTLED).tolist():
            model.learn_one({"value": value})
    models = itertools.cycle(made)

    def one_event(values: Values) -> None:
        model, event = next(models), {"value": float(values[0])}
        model.score_one(event)
        model.learn_one(event)

    return one_event


def cut_forest() -> Peer:
    """Forests that are full: each event also forgets one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rrcf asks pkg_resources for its own version
        import rrcf  # noqa: PLC0415  optional: extra `bench`
    np.random.seed(0)  # rrcf draws from there
    points = np.random.default_rng(2).normal(20.0, 1.0, (POINTS, 1))
    forest = [rrcf.RCTree(points, index_labels=list(range(POINTS))) for _ in range(TREES)]
    count = itertools.count(POINTS)

    def one_event(values: Values) -> None:
        i = next(count)
        for tree in forest:
            tree.forget_point(i - POINTS)
            tree.insert_point(values.astype(np.float64), index=i)
            tree.codisp(i)

    return one_event


def xstream() -> Peer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models: Any = import_module("pysad.models")  # optional: extra `bench`; typed only where it is installed
    model = models.xStream(random_state=0)

    def one_event(values: Values) -> None:
        model.fit_score_partial(values)

    return one_event


def _table(rows: list[Row]) -> Table:
    made = table("Events/s on the same events", ("detector",), ("events/s", "ours ÷ it", "events a call", *LATENCY_COLUMNS))
    for row in rows:
        ratio = rows[0].events_per_second / row.events_per_second
        made.add_row(row.detector, f"{row.events_per_second:,.0f}", f"{ratio:,.1f}", f"{row.events_a_call:,}", *row.latency.cells())
    return made


if __name__ == "__main__":
    typer.run(main)
