"""Through a queue nothing is lost, scored twice or put out of order, whatever is killed when: a soak with `kill -9`.

    python -m bench.chaos_queues [--source redis_streams] [--kills 300] [--seconds 1800] [--streams 60] [--seed 1] [--json FILE]

One state store, the broker, two replicas with a spare each that reads too; `kill -9` of one of them at random moments, about --rate a
second (mosquitto gets a SIGTERM: killed, it may lose what it had confirmed; of Kafka's mock cluster, which
keeps everything in memory, the brokers are taken from the network and put back). Beside that one consumer more comes, reads for a while and
leaves by SIGTERM, again and again. Most kills wait until a result has come out since the last one: a group that is killed faster than its
members are found missing does nothing at all. Producers send each stream's events in order until the broker has confirmed them, so some
twice, and old ones again, shuffled. Events have an id, a time, a sequence, or several of them. Through RabbitMQ none has an id alone: that
is known among its stream's last eight (docs/queues.md), and a kill of the broker may bring older ones again.
Every result is held against an uninterrupted run of the same events:

    order     of each stream the versions 1, 2, 3, … come out in that order
    once      no version comes out twice; where the broker can only publish at least once, it is the same to the last bit
    lost      at the end every event sent has its result, the queue is empty, and there are no dead letters
    scores    every field equals the uninterrupted run's, and so do the stored states at the end

Exit code 1 where anything is wrong, or where the time ran out before all kills were done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import httpx
import typer
from msgspec.structs import replace
from rich.table import Table

from bench import soak as soaks
from bench.bus_wires import AmqpWire, MqttWire
from bench.clients import Kind, Source
from bench.ledger import Reference, Violation, differing
from bench.nursery import Nursery
from bench.report import JsonFile
from bench.soak import SHOWN, Model, Rate, Seconds, Shown, bugs_in, conduct, unseen
from bench.victims import Killer, Replica, Store, Victim
from bench.wires import KafkaWire, NatsWire, NotSentError, RedisStreamsWire, Wire
from service.artifact import find_artifacts
from service.asking import SHIPPED_MODELS
from service.detector import Detector
from service.events import Event, Result
from service.state import SEEN
from service.stores.redis import state_key

REPLICAS, PARTITIONS, PRODUCERS = 2, 4, 4
PAUSE_SECONDS = 0.03
"""Mean rest of a producer between two sendings, so that the load stays bounded."""
MOST_EVENTS, MOST_STREAMS = 5, 8
MOST_UNDER_WAY = 500
"""Events without a result; with so many the producers rest, or a slow machine would be measured and not the service."""
POLL_SECONDS = 0.05
STALLED_SECONDS = 90.0
GUEST_SECONDS = 4.0
"""Mean time that a consumer more stays, and that none is there."""
SAMPLE_SECONDS = 2.0
WRONG = ("lost", "double", "order", "scores")
PLACES = frozenset({"source", "offset", "part"})
"""Of a state: where in the queue its last event was; the uninterrupted run has no queue."""


@dataclass(frozen=True)
class Plan(soaks.Plan):
    source: str = "redis_streams"


@dataclass
class Report(soaks.Report):
    """What happened."""

    counts: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WRONG, 0))
    """Of `counts`."""
    streams_checked: int = 0


WIRES: dict[str, Callable[[Path, Store], Wire]] = {
    "redis_streams": lambda folder, store: RedisStreamsWire(store, PARTITIONS),
    "kafka": lambda folder, store: KafkaWire(folder, PARTITIONS),
    "nats": lambda folder, store: NatsWire(folder, PARTITIONS),
    "mqtt": lambda folder, store: MqttWire(folder),
    "amqp": lambda folder, store: AmqpWire(folder, PARTITIONS),
}


def main(
    source: Annotated[str, typer.Option(help=f"Which queue: {', '.join(WIRES)}.")] = "redis_streams",
    kills: Annotated[int, typer.Option(min=1, max=100_000)] = 300,
    seconds: Seconds = 1800,
    rate: Rate = 1.0,
    streams: Annotated[int, typer.Option(min=PRODUCERS, max=2000)] = 60,
    seed: Annotated[int, typer.Option(help="Of events and choices; the moments also depend on the machine.")] = 1,
    model: Model = SHIPPED_MODELS,
    json_file: JsonFile = None,
) -> None:
    """Kill and restart while events flow through a queue; every result is checked."""
    if source not in WIRES:
        raise typer.BadParameter(f"'{source}' is none of {', '.join(WIRES)}.", param_hint="--source")
    plan = Plan(kills, seconds, rate, streams, seed, find_artifacts(model)[0], source)
    what = f"kill -9, {source}"
    conduct(what, plan, lambda folder, shown: soak(plan, folder, shown), lambda report: _table(report, plan), json_file)


async def soak(plan: Plan, folder: Path, progress: Shown = unseen) -> Report:
    """Everything, in `folder`; what is wrong is in the report."""
    report = Report(plan.named)
    async with _running(plan, folder) as scene:
        try:
            await _under_kills(scene, plan, report, progress)
            await _check(scene, report)
        except StalledError as error:
            scene.reader.wrong("lost", "?", "?", str(error))
        for replica in scene.replicas:
            scene.reader.violations += bugs_in(replica)
        report.counts = dict(scene.counts)
        report.counts["delivered_again"] = scene.delivered_again
        report.wrong = {name: scene.reader.kinds[name] for name in WRONG}
        report.violations = scene.reader.violations
    return report


class StalledError(Exception):
    """Nothing goes on."""


class Producer:
    """Sends some streams' events, each stream's in order, and old ones again."""

    def __init__(self, wire: Wire, sources: Sequence[Source], counts: Counter[str], rng: random.Random) -> None:
        self._wire, self._sources, self._counts, self._rng = wire, sources, counts, rng

    async def run(self, stopped: asyncio.Event, history: dict[str, list[Event]]) -> None:
        while not stopped.is_set():
            if self._counts["event"] - self._counts["result"] > MOST_UNDER_WAY:
                await asyncio.sleep(POLL_SECONDS)
                continue
            items = list(self._drawn(history))
            await self._send(items)
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_SECONDS))

    def _drawn(self, history: dict[str, list[Event]]) -> Sequence[Event]:
        """New events of some streams, and some that were sent before."""
        items = []
        for source in self._rng.sample(self._sources, min(MOST_STREAMS, len(self._sources))):
            sent = history[source.stream_id]
            # A bare id is known among the stream's last SEEN alone, also when a sending that was not confirmed is made again.
            known = sent[MOST_EVENTS - SEEN :] if source.kind is Kind.BARE else sent
            old = self._rng.sample(known, min(len(known), self._rng.randint(0, 2)))
            new = [source.next().event for _ in range(self._rng.randint(1, MOST_EVENTS))]
            sent += new
            self._counts["event"] += len(new)
            self._counts["again"] += len(old)
            items += [*old, *new]
        return items

    async def _send(self, items: Sequence[Event]) -> None:
        for tries in itertools.count():
            try:
                await self._wire.send(items)
            except NotSentError:
                await asyncio.sleep(self._rng.expovariate(1 / POLL_SECONDS))
            else:
                self._counts["sending"] += 1
                self._counts["sending_tried_again"] += tries
                self._counts["entry"] += len(items)
                return


class Reader:
    """Holds every result against what was sent and the uninterrupted run, as it comes out."""

    def __init__(self, wire: Wire, reference: Reference, history: dict[str, list[Event]], counts: Counter[str]) -> None:
        self._wire, self._reference, self._history, self._counts = wire, reference, history, counts
        self._came: dict[str, list[Result]] = {stream_id: [] for stream_id in history}
        self._compared: Counter[str] = Counter()
        self._broken: set[str] = set()
        self.violations: list[Violation] = []
        self.kinds: Counter[str] = Counter()
        """Of the violations."""
        self.last = time.monotonic()

    def wrong(self, kind: str, stream_id: str, event: str, what: str) -> None:
        """A violation, `kind` of WRONG; the stream is no longer looked at."""
        self.kinds[kind] += 1
        self.violations.append(Violation(stream_id, event, what))
        self._broken.add(stream_id)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                results = await self._wire.results()
            except NotSentError:
                results = []
            if results:
                self.last = time.monotonic()
                await self._enter(results)
            else:
                await asyncio.sleep(POLL_SECONDS)

    @property
    def missing(self) -> dict[str, int]:
        """Streams with events that have no result yet, and how many."""
        left = {stream_id: len(sent) - self._compared[stream_id] for stream_id, sent in self._history.items()}
        return {stream_id: count for stream_id, count in left.items() if count and stream_id not in self._broken}

    @property
    def whole(self) -> list[str]:
        """Streams with which nothing is wrong."""
        return [stream_id for stream_id, came in self._came.items() if came and stream_id not in self._broken]

    async def _enter(self, results: Sequence[Result]) -> None:
        new = []
        for result in results:
            if result.late:
                self._counts["late"] += 1
            elif result.stream_id not in self._came:
                self.wrong("double", result.stream_id, "?", "a result of a stream that nobody sent")
            elif result.stream_id not in self._broken and self._is_new(result):
                new.append(result)
        events = [self._history[result.stream_id][result.state_version - 1] for result in new]
        # Without a time of its own an event has that of its arrival, which is in the result.
        stepped = await self._reference.step(
            [replace(event, timestamp=result.timestamp) for event, result in zip(events, new, strict=True)]
        )
        for event, got, want in zip(events, new, stepped, strict=True):
            self._compared[got.stream_id] += 1
            named = str(event.event_id or event.sequence)
            if got != want:
                self.wrong("scores", got.stream_id, named, differing(got, want))
            elif event.timestamp not in (None, got.timestamp) or event.event_id != got.event_id:
                self.wrong("scores", got.stream_id, named, f"answered as event {got.event_id} of {got.timestamp}")

    def _is_new(self, result: Result) -> bool:
        """Whether it is the next version of its stream, and not one that came before."""
        came = self._came[result.stream_id]
        if result.state_version == len(came) + 1 and len(came) < len(self._history[result.stream_id]):
            came.append(result)
            self._counts["result"] += 1
            return True
        before = came[result.state_version - 1] if 1 <= result.state_version <= len(came) else None
        if before is not None and not self._wire.exactly and replace(result, duplicate=before.duplicate) == before:
            self._counts["result_again"] += 1
        else:
            kind = "double" if result.state_version <= len(came) else "order"
            self.wrong(kind, result.stream_id, str(result.event_id), f"version {result.state_version} came out after version {len(came)}")
        return False


@dataclass(frozen=True)
class Scene:
    """Everything that takes part."""

    store: Store
    wire: Wire
    replicas: Sequence[Replica]
    reference: Reference
    producers: Sequence[Producer]
    history: dict[str, list[Event]]
    reader: Reader
    counts: Counter[str]
    model: str
    door: str

    @property
    def victims(self) -> list[Victim]:
        return [self.store, *self.wire.victims, *self.replicas]

    @property
    def delivered_again(self) -> int:
        """Events that the replicas knew already, at least: what a process counted after its last sample died with it."""
        names = [f'onset_events_total{{door="{self.door}",outcome="{outcome}"}}' for outcome in ("duplicate", "late")]
        return round(sum(replica.total(name) for replica in self.replicas for name in names))


@asynccontextmanager
async def _running(plan: Plan, folder: Path) -> AsyncIterator[Scene]:
    rng = random.Random(plan.seed)
    detector = Detector.load(plan.model)
    reference = Reference(detector)
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    async with httpx.AsyncClient(timeout=5, limits=limits) as http, contextlib.AsyncExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        store = Store(folder)
        stack.push_async_callback(store.client.aclose)
        wire = WIRES[plan.source](folder, store)
        reference.start()
        stack.push_async_callback(reference.stop)
        for victim in (store, *wire.victims):
            victim.start()
            stack.callback(victim.stop)
            await victim.wait_ready()
        await wire.open()
        stack.push_async_callback(wire.close)
        replicas = [Replica(number, folder, store, plan.model, http, nursery, wire.settings) for number in range(REPLICAS)]
        for replica in replicas:
            replica.start()
            stack.callback(replica.stop)
        for replica in replicas:
            await replica.wait_ready()
        kinds = [Kind.FULL if kind is Kind.BARE and wire.forgets else kind for kind in Kind]
        sources = [Source(f"{kinds[i % 4].name.lower()}-{i}", kinds[i % 4], kept=True, seed=plan.seed) for i in range(plan.streams)]
        history: dict[str, list[Event]] = {source.stream_id: [] for source in sources}
        producers = [Producer(wire, sources[i::PRODUCERS], counts, random.Random(rng.random())) for i in range(PRODUCERS)]
        reader = Reader(wire, reference, history, counts)
        yield Scene(store, wire, replicas, reference, producers, history, reader, counts, detector.name, plan.source)


async def _under_kills(scene: Scene, plan: Plan, report: Report, progress: Shown) -> None:
    killer = Killer([scene.store, *scene.wire.victims], scene.replicas, random.Random(plan.seed), plan.rate, lambda: scene.counts["result"])
    stopped = asyncio.Event()

    async def kill() -> None:
        report.kill_seconds = await killer.run(plan.kills, plan.seconds)
        stopped.set()

    async def sample() -> None:
        while True:
            for replica in scene.replicas:
                with contextlib.suppress(httpx.HTTPError):
                    await replica.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def watch() -> None:
        """Until all is out; show how it goes, and end what does not go on."""
        while not (stopped.is_set() and not scene.reader.missing and not await _left(scene.wire)):
            await asyncio.sleep(0.5)
            left, wrong, counts = sum(scene.reader.missing.values()), len(scene.reader.violations), scene.counts
            state = f"{counts['event']:,} events, {counts['result']:,} results, {left:,} under way, {wrong} violations"
            progress(killer.kills.total(), state)
            if wrong >= SHOWN:
                raise StalledError("too much is wrong to go on")
            if left and time.monotonic() - scene.reader.last > STALLED_SECONDS:
                raise StalledError(f"no result came out for {STALLED_SECONDS:g} s; without one are events of {scene.reader.missing}")

    beside = [asyncio.create_task(scene.reader.run(), name="reader"), asyncio.create_task(sample(), name="sampler")]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(producer.run(stopped, scene.history)) for producer in scene.producers]
            tasks.append(group.create_task(kill()))
            group.create_task(_guests(scene, random.Random(plan.seed + 1), stopped))
            group.create_task(watch())
    except* StalledError as errors:
        raise errors.exceptions[0] from None
    finally:
        for task in beside:
            task.cancel()
        report.kills = dict(killer.kills)


async def _guests(scene: Scene, rng: random.Random, stopped: asyncio.Event) -> None:
    """One consumer more comes and leaves, again and again."""
    while not stopped.is_set():
        host = rng.choice(scene.replicas)
        guest = host.another()
        try:
            while not (stopped.is_set() or guest.child.ended or await host.answers(guest)):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
            await _rest(rng, stopped)
        finally:
            await asyncio.to_thread(guest.child.stop)
        scene.counts["guest"] += 1
        await _rest(rng, stopped)


async def _rest(rng: random.Random, stopped: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopped.wait(), rng.expovariate(1 / GUEST_SECONDS))


async def _left(wire: Wire) -> int:
    """Entries that are not acknowledged; more than none while the broker does not say."""
    try:
        return await wire.waiting()
    except NotSentError:
        return 1


async def _dead(wire: Wire) -> int:
    """Dead letters; asked for again while the broker does not say. Raises StalledError."""
    deadline = time.monotonic() + STALLED_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(NotSentError):
            return await wire.dead()
        await asyncio.sleep(POLL_SECONDS)
    raise StalledError(f"the broker did not say for {STALLED_SECONDS:g} s how many dead letters there are")


async def _check(scene: Scene, report: Report) -> None:
    """Dead letters, and the stored states against the uninterrupted run's."""
    if dead := await _dead(scene.wire):
        scene.reader.wrong("lost", "-", "-", f"{dead} entries became dead letters")
    for stream_id in scene.reader.whole:
        stored = cast("bytes | None", await scene.store.client.get(state_key(scene.model, stream_id)))
        if different := await scene.reference.difference(stream_id, stored, ignored=PLACES):
            scene.reader.wrong("scores", stream_id, "stored value", f"differs from the uninterrupted run in {different}")
        report.streams_checked += 1


def _table(report: Report, plan: Plan) -> Table:
    total = sum(report.kills.values())
    table = Table(
        min_width=90, title=f"{plan.source}: {total:,} of {plan.kills:,} kill -9 in {report.kill_seconds:,.0f} s, {plan.streams} streams"
    )
    table.add_column("what")
    table.add_column("", justify="right")
    for name, kills in sorted(report.kills.items()):
        table.add_row(f"kills of {name}", f"{kills:,}")
    rows = {
        "events": "event",
        "entries, events sent again among them": "entry",
        "delivered more than once, at least": "delivered_again",
        "sendings": "sending",
        "  not confirmed, and tried again": "sending_tried_again",
        "results": "result",
        "  published again": "result_again",
        "late, of events sent again": "late",
        "consumers that came and left": "guest",
    }
    for label, name in rows.items():
        table.add_row(label, f"{report.counts.get(name, 0):,}")
    table.add_row("final states compared", f"{report.streams_checked:,}")
    for name, label in zip(WRONG, ("lost", "double", "out of order", "other scores than the uninterrupted run's"), strict=True):
        table.add_row(f"[bold]{label}", f"[bold]{report.wrong[name]:,}")
    return table


if __name__ == "__main__":
    typer.run(main)
