"""Events a second of the whole path in this process, beside its floor: the sum of the parts that cannot be avoided.

    python -m bench.engine [--quick] [--seconds 10] [--json FILE]

    path    body bytes ─► decode ─► parse ─► load, step, decide, commit (scorer) ─► encode ─► reply bytes        no HTTP
    floor   decode + MGET + step + commit + encode, each alone, one after the other, on the same bodies

Bodies are NDJSON of 1,000 events over 10,000 warm streams: one event a stream (1,000 streams a body), and ten (100 streams a body). The
store is the embedded valkey-server, a process of its own on a unix socket, with `appendfsync always`, as served. Four bodies are in
flight, as four connections would have them, and then one alone. Path and parts take turns in slices, so that a slower minute of the
machine is everybody's.

In the floor:
    decode   msgspec's `decode_lines` of the body into `Event`
    MGET     a blocking redis-py client reads the stored values of the body's streams: as many bytes as the service reads
    step     ONNX Runtime's `run` on ready arrays, padded as the service pads them: once with 1,000 rows, or ten times with 100
    commit   the same client calls the server's commit function with ready arguments: the bytes that the service would send, each call
             writing, its tokens matching, fsync included; with ten events a stream also their results (trails)
    encode   msgspec's `encode_lines` of the body's `Result` objects; the path makes the replies to ordinary events without them
Not in the floor, so what 1 - ratio is spent on: checking fields, events → arrays and back, values ⇄ states with CRC and nonce, policy,
watches, making the arguments of the store's calls, what replies are made of, batching, the event loop, and a second step of streams with an
open alert. The floor pays for MGET even where the service finds a state elsewhere. Its parts wait for each other; with four bodies in
flight the path may overlap its own with the store's (two processes).
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import redis
import typer
import uvloop
from rich.table import Table

from bench.fleet import default_model, fleet_model
from bench.report import LATENCY_COLUMNS, Goal, JsonFile, Latency, Machine, report, table
from bench.traffic import BODY_EVENTS, bodies, sent, stream_id
from bench.warm import TTL_SECONDS, fill, policy_of, warm_rows
from service import bodies as formats
from service import memory
from service.detector import Detector, bucket, session_of
from service.embedded import EmbeddedStore
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.rounds import Kind
from service.scorer import Limits, Scorer
from service.state import TOKEN, StateCodec
from service.stores import Write
from service.stores.redis import FUNCTION, RedisStore, state_key

STREAMS, IN_FLIGHT = 10_000, 4
SLICES = 5
"""Turns of path and parts."""
PARTS = ("decode", "MGET", "step", "commit", "encode")
GOAL = 0.7

Call = tuple[int, list[Any]]
"""Number of keys, then keys and arguments, of one call of the commit function."""


@dataclass
class Times:
    """Seconds of each body in the path and in each part."""

    path: list[float] = field(default_factory=list)
    path_seconds: float = 0.0
    alone: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})


@dataclass(frozen=True)
class Figures:
    """One detector with one shape of bodies."""

    model: str
    features: int
    events_a_stream: int
    events_per_second: float
    """With IN_FLIGHT bodies in flight."""
    alone_events_per_second: float
    """With one body at a time."""
    floor_events_per_second: float
    ratio_to_floor: float
    alone_ratio_to_floor: float
    floor_ms: dict[str, float]
    """Of a body of 1,000 events, by part, means."""
    latency: Latency
    """Of a body, IN_FLIGHT in flight."""
    alone_latency: Latency


def main(
    seconds: Annotated[float, typer.Option(min=0.5, help="Measured time of the path, and of all parts together, for each line.")] = 10.0,
    quick: Annotated[bool, typer.Option("--quick", help="The shipped default alone, a second each.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure path and floor and print a table."""
    machine = Machine.now()
    memory.settle()  # as served
    models = [default_model()] if quick else [default_model(), fleet_model()]
    rows = [measure(model, each, 1.0 if quick else seconds) for model in models for each in (1, 10)]
    goals = [Goal(f"{row.model}, {row.events_a_stream} a stream: ratio to the floor", row.ratio_to_floor, GOAL) for row in rows]
    report([_table(rows)], goals, machine, {"streams": STREAMS, "in_flight": IN_FLIGHT, "rows": [asdict(row) for row in rows]}, json_file)


def measure(model: Path, each: int, seconds: float) -> Figures:
    """Path and floor of one model with bodies of `each` events a stream."""
    detector = Detector.load(model)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        times = runner.run(_with_store(Setup(model, detector, each), seconds))
    floor_ms = {part: 1000 * float(np.mean(taken)) for part, taken in times.parts.items()}
    floor = 1000 * BODY_EVENTS / sum(floor_ms.values())
    together, alone = BODY_EVENTS * len(times.path) / times.path_seconds, BODY_EVENTS * len(times.alone) / sum(times.alone)
    return Figures(
        detector.name,
        detector.features,
        each,
        round(together),
        round(alone),
        round(floor),
        round(together / floor, 3),
        round(alone / floor, 3),
        {part: round(value, 3) for part, value in floor_ms.items()},
        Latency.of(times.path),
        Latency.of(times.alone),
    )


@dataclass(frozen=True)
class Setup:
    """What one line of the table is about."""

    model: Path
    detector: Detector
    each: int

    def batches(self, first: int) -> list[range]:
        """Numbers of STREAMS streams from `first` on, those of a body together."""
        width = BODY_EVENTS // self.each
        return [range(start, start + width) for start in range(first, first + STREAMS, width)]


async def _with_store(setup: Setup, seconds: float) -> Times:
    with tempfile.TemporaryDirectory(prefix="onset-bench-") as folder:
        embedded = EmbeddedStore(Path(folder) / "store")
        url = await embedded.start()
        try:
            await fill(url, setup.detector, range(STREAMS))
            with redis.Redis.from_url(url) as client:
                client.config_set("auto-aof-rewrite-percentage", 0)  # it would take a processor in some slices and not in others
                return await _take_turns(setup, url, seconds, client)
        finally:
            await embedded.stop()


async def _take_turns(setup: Setup, url: str, seconds: float, client: redis.Redis) -> Times:
    times = Times()
    templates = bodies(range(STREAMS), setup.each, setup.detector.manifest.feature_names)
    turn = itertools.cycle(templates)
    store = RedisStore(url, state_ttl=TTL_SECONDS, result_ttl=600)
    await store.open()
    engine = Engine(setup.detector, store)
    try:
        results = await engine.results(sent(next(turn), setup.each))
        floor = Floor(setup, templates, results, await turns(setup, url), client)
        await engine.run(turn, setup.each, 1.0, [], in_flight=IN_FLIGHT)
        for _ in range(SLICES):
            times.path_seconds += await engine.run(turn, setup.each, seconds / SLICES, times.path, in_flight=IN_FLIGHT)
            await engine.run(turn, setup.each, seconds / SLICES / 2, times.alone, in_flight=1)
            floor.run(seconds / SLICES, times.parts)
    finally:
        await engine.close()
    return times


class Engine:
    """The service's own parts from a body's bytes to the reply's bytes. Open it within the event loop; close it."""

    def __init__(self, detector: Detector, store: RedisStore) -> None:
        self._store = store
        self._scorer = Scorer(detector, policy_of(detector), store, Metrics(), Limits())
        self._scorer.start()

    async def close(self) -> None:
        await self._scorer.drain(5)
        await self._store.close()

    async def results(self, body: bytes) -> list[Result]:
        """Every event scored, or SystemExit: what is measured must be the whole work."""
        answers = await self._scorer.score(_events(body))
        results = [answer for answer in answers if isinstance(answer, Result) and not answer.late and not answer.duplicate]
        _check(len(results), answers)
        return results

    async def answer(self, body: bytes) -> bytes:
        """The same as the door does it."""
        answers, kinds = await self._scorer.score_as_json(_events(body))
        _check(kinds.count(Kind.SCORED), answers)
        return formats.encode(answers, formats.Format.NDJSON, bare=False)

    async def run(self, bodies_: Iterator[bytes], each: int, seconds: float, taken: list[float], *, in_flight: int) -> float:
        """Answer bodies for that long; returns the seconds until the last was answered."""
        began = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - began < seconds:
                body = sent(next(bodies_), each)
                start = time.perf_counter()
                await self.answer(body)
                taken.append(time.perf_counter() - start)

        await asyncio.gather(*(client() for _ in range(in_flight)))
        return time.perf_counter() - began


def _events(body: bytes) -> formats.Items:
    items, _ = formats.decode(body, formats.Format.NDJSON, max_events=BODY_EVENTS)
    return items


def _check(scored: int, answers: Sequence[object]) -> None:
    if scored < len(answers):
        raise SystemExit(f"{len(answers) - scored} of {len(answers)} events were not scored; the first answer: {answers[0]}")


class Floor:
    """What cannot be avoided, part by part, all else made ready before. Its streams are its own: nobody changes their tokens."""

    def __init__(self, setup: Setup, bodies_: Sequence[bytes], results: Sequence[Result], calls: Turns, client: redis.Redis) -> None:
        decoder, encoder = msgspec.json.Decoder(Event), msgspec.json.Encoder()
        keys = [[state_key(setup.detector.name, stream_id(i)) for i in some] for some in setup.batches(STREAMS)]
        for some in calls.first:
            write(client, some)
        step = stepping(setup)
        self._ready: dict[str, Iterator[Callable[[], object]]] = {
            "decode": itertools.cycle([partial(decoder.decode_lines, body) for body in bodies_]),
            "MGET": itertools.cycle([partial(client.mget, some) for some in keys]),
            "step": itertools.repeat(step),
            "commit": itertools.cycle([partial(write, client, some) for turn in (calls.there, calls.back) for some in turn]),
            "encode": itertools.repeat(lambda: encoder.encode_lines(results)),
        }

    def run(self, seconds: float, taken: dict[str, list[float]]) -> None:
        """The parts in turn, one body each, for that long."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for part, calls in self._ready.items():
                call = next(calls)
                began = time.perf_counter()
                call()
                taken[part].append(time.perf_counter() - began)


def stepping(setup: Setup) -> Callable[[], None]:
    """The runs of one body on ready arrays, padded as the service pads them."""
    detector = setup.detector
    rows = BODY_EVENTS // setup.each
    session, padded = session_of(setup.model.read_bytes()), bucket(rows)
    rng = np.random.default_rng(0)
    feed = {
        "state": np.resize(warm_rows(detector)["vector"], (padded, detector.state_size)),
        "x": rng.normal(20.0, 1.0, (padded, detector.features)).astype(np.float32),
        "t": np.full((padded, 3), 1.0, np.float32),
        "learn": np.ones(padded, np.float32),
        "alpha": np.full(padded, Policy.alpha, np.float32),
    }

    def step() -> None:
        for _ in range(setup.each):
            session.run(None, feed)

    return step


@dataclass(frozen=True)
class Turns:
    """Ready calls of the commit function, for each body a list: onto nothing, then there and back between two values of each stream."""

    first: list[list[Call]]
    there: list[list[Call]]
    back: list[list[Call]]


class _Recorder(RedisStore):
    """Keeps the calls of its commit function instead of sending them."""

    def __init__(self, url: str) -> None:
        super().__init__(url, state_ttl=TTL_SECONDS, result_ttl=600)
        self.calls: list[Call] = []

    async def call(self, function: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> list[int]:
        self.calls.append((len(keys), [*keys, *arguments]))
        return []


async def turns(setup: Setup, url: str) -> Turns:
    """The calls that the service's store makes for the same streams, values and trails."""
    codec = StateCodec(setup.detector.features, setup.detector.state_size, setup.detector.fingerprint)
    kinds = warm_rows(setup.detector)
    recorder = _Recorder(url)
    made = Turns([], [], [])
    for some in setup.batches(STREAMS):
        rows = np.resize(kinds, len(some))
        here, there = ([bytes(value) for value in codec.encode(rows)] for _ in range(2))
        [trail] = codec.encode_trails(np.repeat(rows[:1]["last"], setup.each), [setup.each]) if setup.each > 1 else [b""]
        nothing = [b""] * len(some)
        for calls, before, after in ((made.first, nothing, here), (made.there, here, there), (made.back, there, here)):
            recorder.calls = []
            writes = [Write(stream_id(i), old[TOKEN], new, trail) for i, old, new in zip(some, before, after, strict=True)]
            await recorder.commit(setup.detector.name, writes)
            if not recorder.calls:
                raise SystemExit("The store commits by another way than is recorded here: this is a bug of the benchmark.")
            calls.append(recorder.calls)
    await recorder.close()
    return made


def write(client: redis.Redis, calls: Sequence[Call]) -> None:
    for keys, arguments in calls:
        written = client.fcall(FUNCTION, keys, *arguments)
        if not all(written):
            raise SystemExit("A ready commit met another token: this is a bug of the benchmark.")


def _table(rows: Sequence[Figures]) -> Table:
    numbers = ("path, events/s", "one body at a time", "floor", "ratio", "ratio, one", *(f"{part} ms" for part in PARTS), *LATENCY_COLUMNS)
    made = table(f"Bodies of {BODY_EVENTS:,} events over {STREAMS:,} streams, {IN_FLIGHT} in flight", ("model", "a stream"), numbers)
    for row in rows:
        rates = (row.events_per_second, row.alone_events_per_second, row.floor_events_per_second)
        ratios = (row.ratio_to_floor, row.alone_ratio_to_floor)
        cells = [f"{value:,.0f}" for value in rates] + [f"{value:.2f}" for value in ratios]
        cells += [f"{row.floor_ms[part]:.2f}" for part in PARTS] + list(row.latency.cells())
        made.add_row(f"{row.model}, {row.features} feature{'s' * (row.features > 1)}", str(row.events_a_stream), *cells)
    return made


if __name__ == "__main__":
    typer.run(main)
