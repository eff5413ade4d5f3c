"""One alert for each anomaly, told in order and at least once, whatever is killed when: a soak with `kill -9`.

    python -m bench.chaos_alerts [--kills 100] [--seconds 600] [--streams 60] [--model FILE] [--seed 1] [--json FILE]

One valkey-server, two replicas, streams whose anomalies come and go, sent in pieces to either replica until they are answered; `kill -9`
of one of the three at random moments. A webhook that refuses every fifth request is told of the alerts. At the end the book of alerts
(GET /v1/alerts) and what the webhook was told are held against the alert log of an uninterrupted run of the same events:

    book      the same alerts, by id, and the same of them resolved
    webhook   of each alert the same changes in the same order; what came again (same id) is counted, and allowed

Exit code 1 where anything is wrong, or where the time ran out before all kills were done.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from bench import soak as soaks
from bench.ledger import Violation
from bench.nursery import Nursery
from bench.receiver import Receiver
from bench.report import JsonFile, Machine, table
from bench.soak import Model, Plan, Rate, Seconds, Shown, bugs_in, conduct, unseen
from bench.victims import Killer, Replica, Store
from service import alerts
from service.artifact import find_artifacts
from service.asking import SHIPPED_MODELS
from service.detector import Detector
from service.events import Event
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.stores.memory import MemoryStore

REPLICAS = 2
LARGEST_PIECE = 20
"""Events in a request."""
PAUSE_SECONDS = 0.3
"""Between two requests of a stream, at most."""
SETTLE_SECONDS = 120.0

Told = dict[str, list[str]]
"""Alert's id → what happened to it, in order."""


@dataclass
class Report(soaks.Report):
    """What happened."""

    machine: dict[str, Any] = field(default_factory=dict)
    events: int = 0
    alerts: int = 0
    resolved: int = 0
    changes: int = 0
    told_again: int = 0
    refused_by_the_webhook: int = 0


def main(
    kills: Annotated[int, typer.Option(min=1, max=100_000)] = 100,
    seconds: Seconds = 600,
    rate: Rate = 0.5,
    streams: Annotated[int, typer.Option(min=1, max=2000)] = 60,
    seed: Annotated[int, typer.Option(help="Of events and choices; the moments also depend on the machine.")] = 1,
    model: Model = SHIPPED_MODELS,
    json_file: JsonFile = None,
) -> None:
    """Kill while anomalies come and go; every alert is checked."""
    plan = Plan(kills, seconds, rate, streams, seed, find_artifacts(model)[0])
    conduct("kill -9", plan, lambda folder, shown: soak(plan, folder, shown), _table, json_file)


async def soak(plan: Plan, folder: Path, shown: Shown = unseen) -> Report:
    """Everything, in `folder`; what is wrong is in the report."""
    report = Report(plan.named, machine=asdict(Machine.now()))
    rng = random.Random(plan.seed)
    store = Store(folder)
    store.start()
    await store.wait_ready()
    with Receiver(failing=random.Random(plan.seed + 1)) as webhook, Nursery() as nursery:
        settings = {
            "ALERTS_WEBHOOK": webhook.url,
            "ALERTS_PER_MINUTE": "1000000",
            "ALERTS_MAX_AGE_SECONDS": "1000000000",
            "SILENCE": "false",
            "CONSOLE": "false",
        }
        async with httpx.AsyncClient(timeout=10) as client:
            replicas = [Replica(i, folder, store, plan.model, client, nursery, settings) for i in range(REPLICAS)]
            try:
                for replica in replicas:
                    replica.start()
                    await replica.wait_ready()
                senders = [Sender(f"s{i}", random.Random(f"{plan.seed} {i}")) for i in range(plan.streams)]
                await _under_kills(plan, report, rng, store, replicas, senders, client, shown)
                expected = await _expected(Detector.load(plan.model), senders)
                await _check(report, expected, replicas[0], webhook, client)
                report.violations += [bug for replica in replicas for bug in bugs_in(replica)]
            finally:
                for victim in (*replicas, store):
                    victim.stop()
                await store.client.aclose()
    return report


class Sender:
    """One stream: quiet, then an anomaly, then quiet again, and so on."""

    def __init__(self, stream_id: str, rng: random.Random) -> None:
        self.stream_id, self._rng = stream_id, rng
        self.sent: list[Event] = []
        self._values = self._course()
        self._began = time.time() - 3600

    async def run(self, replicas: Sequence[Replica], client: httpx.AsyncClient, stopped: asyncio.Event) -> None:
        while not stopped.is_set():
            await self._send([self._next() for _ in range(self._rng.randint(1, LARGEST_PIECE))], replicas, client)
            await asyncio.sleep(self._rng.uniform(0, PAUSE_SECONDS))

    def _next(self) -> Event:
        i = len(self.sent)
        self.sent.append(Event(self.stream_id, {"value": next(self._values)}, timestamp=self._began + i, sequence=i))
        return self.sent[-1]

    async def _send(self, events: Sequence[Event], replicas: Sequence[Replica], client: httpx.AsyncClient) -> None:
        """To either replica, until all of them are answered."""
        body = [{"stream_id": e.stream_id, "values": e.values, "timestamp": e.timestamp, "sequence": e.sequence} for e in events]
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(f"{self._rng.choice(replicas).url}/v1/events", json=body)
                if answer.status_code == httpx.codes.OK and all("state_version" in result for result in answer.json()):
                    return
            await asyncio.sleep(0.05)

    def _course(self) -> Iterator[float]:
        while True:
            for _ in range(self._rng.randint(30, 150)):
                yield self._rng.gauss(10, 1)
            height = self._rng.choice((8.0, 15.0, 50.0))
            for _ in range(self._rng.randint(1, 40)):
                yield self._rng.gauss(10 + height, 1)


async def _under_kills(
    plan: Plan,
    report: Report,
    rng: random.Random,
    store: Store,
    replicas: Sequence[Replica],
    senders: Sequence[Sender],
    client: httpx.AsyncClient,
    shown: Shown,
) -> None:
    killer, stopped = Killer([store], replicas, rng, plan.rate), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for sender in senders:
            group.create_task(sender.run(replicas, client, stopped))

        async def watch() -> None:
            while not stopped.is_set():
                shown(killer.kills.total(), f"{sum(len(sender.sent) for sender in senders):,} events")
                await asyncio.sleep(0.5)

        group.create_task(watch())
        report.kill_seconds = await killer.run(plan.kills, plan.seconds)
        stopped.set()
    report.kills = dict(killer.kills)
    report.events = sum(len(sender.sent) for sender in senders)


async def _expected(detector: Detector, senders: Sequence[Sender]) -> Told:
    """What an uninterrupted run of the same events writes into the alert log."""
    store = MemoryStore(state_ttl=10**9, result_ttl=60)
    policy = Policy(tau=detector.manifest.age_constant, silence=False)
    scorer = Scorer(detector, policy, store, Metrics(), Limits())
    scorer.start()
    for sender in senders:
        await scorer.score(sender.sent)
    await scorer.drain(10)
    told: Told = defaultdict(list)
    for transition in map(alerts.decoded, store.log):
        told[transition.alert].append(transition.what)
    return told


async def _check(report: Report, expected: Told, replica: Replica, webhook: Receiver, client: httpx.AsyncClient) -> None:
    report.alerts = len(expected)
    report.resolved = sum(what[-1] == "resolved" for what in expected.values())
    report.changes = sum(map(len, expected.values()))
    deadline = time.monotonic() + SETTLE_SECONDS
    while len(_notices(webhook)) < report.changes and time.monotonic() < deadline:  # noqa: ASYNC110 - the webhook is another thread
        await asyncio.sleep(0.5)
    await asyncio.sleep(2)  # what is one too many would come now
    book = await _book(replica, client)
    told: Told = defaultdict(list)
    for notice in _notices(webhook).values():
        told[notice["alert"]["id"]].append(notice["event"])
    for id_ in expected.keys() | told.keys() | book.keys():
        wanted = expected.get(id_, [])
        if told.get(id_, []) != wanted:
            report.violations.append(Violation("?", id_, f"the webhook was told {told.get(id_, [])} of the alert, and not {wanted}"))
        status = ("resolved" if wanted[-1] == "resolved" else "open") if wanted else None
        if book.get(id_) != status:
            report.violations.append(Violation("?", id_, f"the alert is {book.get(id_)} in the book, and not {status}"))
    report.told_again = len(webhook.posted) - len(_notices(webhook))
    report.refused_by_the_webhook = sum(posted.refused for posted in webhook.posted)


def _notices(webhook: Receiver) -> Mapping[str, Any]:
    """By id, in the order in which they first came; one that was refused and not sent again is none."""
    notices: dict[str, Any] = {}
    for posted in list(webhook.posted):
        notices.setdefault(posted.json["id"], posted.json)
    taken = {posted.json["id"] for posted in list(webhook.posted) if not posted.refused}
    return {id_: notice for id_, notice in notices.items() if id_ in taken}


async def _book(replica: Replica, client: httpx.AsyncClient) -> dict[str, str]:
    """Alert's id → its status."""
    found: dict[str, str] = {}
    query: dict[str, str] = {"limit": "1000"}
    while True:
        page = (await client.get(f"{replica.url}/v1/alerts", params=query)).raise_for_status().json()
        found |= {alert["id"]: alert["status"] for alert in page["alerts"]}
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


def _table(report: Report) -> Table:
    made = table(f"Alerts under kill -9, {report.kill_seconds:.0f} s", ("what",), ("number",))
    rows = {
        "kills": sum(report.kills.values()),
        **{f"  of {name}": count for name, count in sorted(report.kills.items())},
        "events": report.events,
        "alerts": report.alerts,
        "  resolved by the end": report.resolved,
        "changes told": report.changes,
        "  told again under the same id": report.told_again,
        "  of these because the webhook refused": report.refused_by_the_webhook,
        "violations": len(report.violations),
    }
    for what, number in rows.items():
        made.add_row(what, f"{number:,}")
    return made


if __name__ == "__main__":
    typer.run(main)
