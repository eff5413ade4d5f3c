"""Nothing is lost, stepped twice or mixed up, whatever is killed when: a soak with `kill -9`.

    python -m bench.chaos [--kills 1000] [--seconds 3600] [--streams 120] [--model FILE] [--seed 1] [--json FILE]

One valkey-server, two replicas, clients that send many streams to either; `kill -9` of one of the three at random moments, about
--rate a second. Every event is sent until it is acknowledged and at least once more later, shuffled. Every answer is held against
an uninterrupted run of the same events (ledger.py), field by field; so are state versions and stored states at the end.

    kills     traffic under kills; stored values of a third of the streams are corrupted, deleted and expired under way
    counted   the same damage without kills: every fresh start is counted in onset_fresh_states_total, to the last one
    rollout   one replica after the other is started with another version of the model, under traffic; counted too

Exit code 1 where anything is wrong, or where the time ran out before all kills were done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import httpx
import typer
from rich.table import Table

from bench import soak as soaks
from bench.clients import Client, Kind, Pool, RestDoor, Source, UnexpectedAnswerError, Vandal
from bench.ledger import Ledger, Reference
from bench.nursery import Nursery
from bench.report import JsonFile
from bench.soak import SHOWN, Model, Plan, Rate, Seconds, Shown, bugs_in, conduct, unseen
from bench.victims import Killer, Replica, Store, Victim
from service.artifact import UNSEALED, find_artifacts, seal, verify_seal
from service.asking import SHIPPED_MODELS
from service.detector import Detector
from service.stores.redis import state_key

REPLICAS = 2
CLIENTS = 8
DAMAGE_SECONDS = 0.25
"""Mean time between two damages."""
STALLED_SECONDS = 60.0
ROUNDS = 3
"""Of damage or traffic over all damaged streams in the counted parts."""


@dataclass
class Report(soaks.Report):
    """What happened."""

    starts: dict[str, int] = field(default_factory=dict)
    events: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    conflicts_sampled: int = 0
    fresh_starts_counted: dict[str, int] = field(default_factory=dict)
    """In the parts without kills, by reason; each equal to what the clients saw."""
    streams_checked: int = 0


def main(
    kills: Annotated[int, typer.Option(min=1, max=100_000)] = 1000,
    seconds: Seconds = 3600,
    rate: Rate = 1.5,
    streams: Annotated[int, typer.Option(min=CLIENTS, max=2000)] = 120,
    seed: Annotated[int, typer.Option(help="Of events, damage and choices; the moments also depend on the machine.")] = 1,
    model: Model = SHIPPED_MODELS,
    json_file: JsonFile = None,
) -> None:
    """Kill, restart and damage while events flow; every answer is checked."""
    plan = Plan(kills, seconds, rate, streams, seed, find_artifacts(model)[0])
    conduct("kill -9", plan, lambda folder, shown: soak(plan, folder, shown), lambda report: _table(report, plan), json_file)


async def soak(plan: Plan, folder: Path, progress: Shown = unseen) -> Report:
    """Everything, in `folder`; what is wrong is in the report."""
    report = Report(plan.named)
    async with _running(plan, folder) as scene:
        try:
            await _under_kills(scene, plan, report, progress)
            await _check(scene, report)
            progress(sum(report.kills.values()), "without kills")
            await _counted(scene, report, "corrupt", _damage_all(scene, scene.vandal.flip))
            await _counted(scene, report, "new", _damage_all(scene, scene.vandal.delete))
            await _counted(scene, report, "other_model", _roll_out(scene))
        except* UnexpectedAnswerError as errors:
            for error in errors.exceptions:
                scene.ledger.violation("?", "?", str(error))
        report.starts = {victim.name: victim.starts for victim in scene.victims}
        report.counts = dict(scene.ledger.counts)
        report.events = sum(source.sent for source in scene.sources)
        report.conflicts_sampled = int(sum(replica.total("onset_state_conflicts_total") for replica in scene.replicas))
        report.violations = [*scene.ledger.violations, *itertools.chain.from_iterable(map(bugs_in, scene.replicas))]
    return report


@dataclass(frozen=True)
class Scene:
    """Everything that takes part."""

    store: Store
    replicas: Sequence[Replica]
    other_model: Path
    door: RestDoor
    ledger: Ledger
    sources: Sequence[Source]
    clients: Sequence[Client]
    vandal: Vandal
    model: str
    http: httpx.AsyncClient

    @property
    def victims(self) -> list[Victim]:
        return [self.store, *self.replicas]

    @property
    def damaged(self) -> list[tuple[Client, Source]]:
        return [(client, source) for client in self.clients for source in client.sources if not source.kept]


@asynccontextmanager
async def _running(plan: Plan, folder: Path) -> AsyncIterator[Scene]:
    rng = random.Random(plan.seed)
    other = _other_version(plan.model, folder)
    detectors = [Detector.load(path) for path in (plan.model, other)]
    references = {detector.manifest.version: Reference(detector) for detector in detectors}
    ledger = Ledger(references)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=5, limits=limits) as http, contextlib.AsyncExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        store = Store(folder)
        stack.push_async_callback(store.client.aclose)
        replicas = [Replica(number, folder, store, plan.model, http, nursery) for number in range(REPLICAS)]
        for reference in references.values():
            reference.start()
            stack.push_async_callback(reference.stop)
        for victim in (store, *replicas):
            victim.start()
            stack.callback(victim.stop)
            if victim is store:
                await store.wait_ready()
        for replica in replicas:
            await replica.wait_ready()
        door = RestDoor(replicas, http, random.Random(rng.random()), ledger.counts)
        sources = _sources(plan)
        pool = Pool([], random.Random(rng.random()))
        clients = [Client(door, ledger, sources[i::CLIENTS], pool, random.Random(rng.random())) for i in range(CLIENTS)]
        name = detectors[0].name
        damaged = [source for source in sources if not source.kept]
        vandal = Vandal(store, door, ledger, name, damaged, random.Random(rng.random()))
        yield Scene(store, replicas, other, door, ledger, sources, clients, vandal, name, http)


def _sources(plan: Plan) -> list[Source]:
    """Streams of every kind; every third is damaged."""
    kinds = list(Kind)
    sources = []
    for i in range(plan.streams):
        kept, kind = i % 3 != 0, kinds[(i // 3) % len(kinds)]
        sources.append(Source(f"{'kept' if kept else 'damaged'}-{kind.name.lower()}-{i}", kind, kept=kept, seed=plan.seed))
    return sources


def _other_version(path: Path, folder: Path) -> Path:
    """The same detector under another version, so with another hash: to the service it is another model."""
    content = path.read_bytes()
    version = Detector.load(path).manifest.version
    changed = version[:-1] + ("9" if version[-1] != "9" else "8")
    content = content.replace(verify_seal(content, path).encode(), UNSEALED.encode())
    mark = '"version":"%s"'
    content = content.replace((mark % version).encode(), (mark % changed).encode(), 1)
    other = folder / f"other-{changed}.onnx"
    other.write_bytes(seal(content))
    return other


async def _under_kills(scene: Scene, plan: Plan, report: Report, progress: Shown) -> None:
    killer = Killer([scene.store], scene.replicas, random.Random(plan.seed), plan.rate)
    stopped = asyncio.Event()

    async def kill() -> None:
        report.kill_seconds = await killer.run(plan.kills, plan.seconds)
        stopped.set()

    async def watch() -> None:
        """Show how it goes, sample the counters, and end what does not go on or went wrong."""
        while True:
            await asyncio.sleep(0.5)
            for replica in scene.replicas:
                with contextlib.suppress(httpx.HTTPError):
                    await replica.sample()
            counts = scene.ledger.counts
            progress(
                killer.kills.total(), f"{counts['step']:,} events, {counts['retry']:,} retries, {len(scene.ledger.violations)} violations"
            )
            if time.monotonic() - scene.ledger.last_step > STALLED_SECONDS and not stopped.is_set():
                raise UnexpectedAnswerError(f"no event was acknowledged for {STALLED_SECONDS:g} s")
            if len(scene.ledger.violations) >= SHOWN:
                raise UnexpectedAnswerError("too much is wrong to go on")

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            traffic = [group.create_task(client.run(stopped)) for client in scene.clients]
            traffic.append(group.create_task(scene.vandal.run(stopped, DAMAGE_SECONDS)))
            traffic.append(group.create_task(kill()))
            await asyncio.gather(*traffic)
            watching.cancel()
    finally:
        report.kills = dict(killer.kills)


async def _check(scene: Scene, report: Report) -> None:
    """State versions by the API, stored values by the store's own client."""
    for client, source in scene.damaged:
        await client.step(source)
    for source in scene.sources:
        book = scene.ledger.book(source.stream_id)
        if not source.sent or book.broken:
            continue
        reply = (await scene.http.get(f"{scene.replicas[0].url}/v1/streams/{source.stream_id}")).json()
        wanted = source.sent if source.kept else len(book.life)
        if reply.get("state_version") != wanted:
            scene.ledger.violation(source.stream_id, "all", f"{wanted} events were sent, its state has seen {reply.get('state_version')}")
        stored = cast("bytes | None", await scene.store.client.get(state_key(scene.model, source.stream_id)))
        await scene.ledger.check_stored(source.stream_id, stored)
        report.streams_checked += 1


async def _counted(scene: Scene, report: Report, reason: str, happens: Awaitable[None]) -> None:
    """Let fresh starts happen for one reason, without kills, and hold the service's counter against what the clients saw."""
    counted, seen = await _fresh(scene, reason), scene.ledger.counts["fresh_start"]
    await happens
    counted, seen = await _fresh(scene, reason) - counted, scene.ledger.counts["fresh_start"] - seen
    report.fresh_starts_counted[reason] = counted
    if counted != seen:
        scene.ledger.violation("all", reason, f"{seen} streams started afresh, onset_fresh_states_total counted {counted}")


async def _fresh(scene: Scene, reason: str) -> int:
    """Fresh starts that the replicas have counted."""
    for replica in scene.replicas:
        await replica.sample()
    return round(sum(replica.total(f'onset_fresh_states_total{{reason="{reason}"}}') for replica in scene.replicas))


async def _damage_all(scene: Scene, damage: Callable[[str], Awaitable[None]]) -> None:
    for _ in range(ROUNDS):
        for client, source in scene.damaged:
            await damage(source.stream_id)
            await client.step(source)


async def _roll_out(scene: Scene) -> None:
    """Both replicas get the other file, one after the other; between, the one that has it starts all streams afresh and answers alone."""

    async def traffic() -> None:
        for _ in range(ROUNDS):
            for client, source in scene.damaged:
                await client.step(source)

    for replica in scene.replicas:
        await traffic()
        await replica.sample()
        replica.replace(scene.other_model)
        await replica.wait_ready()
    await traffic()


def _table(report: Report, plan: Plan) -> Table:
    total = sum(report.kills.values())
    counts = report.counts
    table = Table(
        min_width=90,
        title=f"{total:,} of {plan.kills:,} kill -9 in {report.kill_seconds:,.0f} s; {report.events:,} events of {plan.streams} streams",
    )
    table.add_column("what")
    table.add_column("", justify="right")
    for name, kills in sorted(report.kills.items()):
        table.add_row(f"kills of {name} (starts)", f"{kills:,} ({report.starts[name]:,})")
    rows = {
        "requests answered": "request",
        "to both replicas at once": "hedged_request",
        "requests sent again": "retry",
        "  connection lost": "connection_lost",
        "  refused with 503 or 429": "refused",
        "  refused in part": "refused_in_bulk",
        "events answered": "answer",
        "steps": "step",
        "  answered only by a retry": "answered_by_retry",
        "duplicates with their stored result": "duplicate_with_result",
        "duplicates whose result is gone": "duplicate_without_result",
        "delivered again and late": "late",
        "bit flips": "bit_flip",
        "deletions": "delete",
        "expiries": "expiry",
        "fresh starts seen": "fresh_start",
        "damage healed": "healed",
    }
    for label, name in rows.items():
        table.add_row(label, f"{counts.get(name, 0):,}")
    table.add_row("conflicts, at least", f"{report.conflicts_sampled:,}")
    for reason, number in report.fresh_starts_counted.items():
        table.add_row(f"fresh starts without kills, {reason}: seen = counted", f"{number:,}")
    table.add_row("final states compared", f"{report.streams_checked:,}")
    table.add_row("[bold]violations", f"[bold]{len(report.violations):,}")
    return table


if __name__ == "__main__":
    typer.run(main)
