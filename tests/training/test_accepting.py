"""An alert of log lines that is over is accepted by its id: who comes in the morning finds it resolved, ten lines after the new one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from service import lessons
from service.alerts import Alert, Evidence, Transition, advanced
from service.artifact import Feature, Lines
from service.detector import Detector
from service.events import Line
from tests.doors import serving
from tests.times import until
from tests.training.logs import CACHE, CLOSE, OPEN, READ, TEMPLATES, WRITE, normal
from training.export import manifest_of, publish, training_record
from training.logs import ACCEPTED, LogStep

SAID = {OPEN: "open a", READ: "read b", WRITE: "write c in <NUM> ms", CACHE: "cache hit", CLOSE: "close"}
RELEASE, OTHER = "cache warmed for region eu", "Out of memory: killed process 7"
PATTERNS = dict(zip((OPEN, READ, WRITE, CACHE, CLOSE), TEMPLATES, strict=True))


@pytest.fixture(scope="module")
def model(host: LogStep, host_graph: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = training_record(command="python -m training", seed=0, data="none", data_sha256="", streams=1, rows=1)
    features = [Feature(name=name) for name in ("template", "gap")]
    manifest = manifest_of(host, name="lines", version="1", features=features, training=record, lines=Lines(templates=TEMPLATES))
    return publish(host, host_graph, manifest, tmp_path_factory.mktemp("host"))


@pytest.fixture
async def client(model: Path, empty_server: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(model=model, redis_url=empty_server, alpha=1e-4) as running:
        yield running


class Host:
    """A stream that goes on as it did, with other lines in it."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client, self._rng, self._moment = client, np.random.default_rng(3), 1_795_420_800.0

    async def says(self, *new: str, sessions: int = 40) -> None:
        messages = [*new, *(SAID[code] for _ in range(sessions) for code in normal(self._rng))]
        events = []
        for message in messages:
            self._moment += 10.0 if message == SAID[READ] else 1.0
            events.append({"stream_id": "host", "message": message, "timestamp": self._moment})
        (await self._client.post("/v1/events", json=events)).raise_for_status()

    async def alerts(self, many: int) -> list[dict[str, Any]]:
        """All of them, the latest first, once there are so many and all are over."""
        found: list[dict[str, Any]] = []

        async def there() -> bool:
            found[:] = (await self._client.get("/v1/alerts")).raise_for_status().json()["alerts"]
            return len(found) >= many and all(alert["status"] == "resolved" for alert in found)

        await until(there)
        assert len(found) == many
        return found

    async def accept(self, *ids: str) -> dict[str, int]:
        done = await self._client.post("/v1/alerts/accept", json={"by": "anna", "note": "release 7", "ids": ids})
        outcomes: dict[str, int] = done.raise_for_status().json()["outcomes"]
        return outcomes


async def test_an_alert_that_is_over_is_accepted_and_its_line_opens_none_any_more(client: httpx.AsyncClient) -> None:
    host = Host(client)
    await host.says(sessions=150)
    for _ in range(2):
        await host.says(RELEASE)
    ids = [alert["id"] for alert in await host.alerts(2)]
    assert await host.accept(*ids) == {"accepted": 2}

    async def marked() -> bool:
        return {alert["resolution"] for alert in await host.alerts(2)} == {"accepted"}

    await until(marked)
    [alert, _] = await host.alerts(2)
    assert alert["acknowledgement"] | {"at": 0} == {"by": "anna", "note": "release 7", "at": 0}
    assert alert["status"] == "resolved"
    for _ in range(3):
        await host.says(RELEASE)
    await host.says(OTHER)
    [another, *_] = await host.alerts(3)
    assert another["onset"]["line"]["message"] == OTHER
    assert await host.accept(*ids) == {"resolved": 2}, "once is enough"


async def test_two_replicas_that_accept_at_once_and_a_stream_that_speaks_meanwhile_lose_nothing(model: Path, empty_server: str) -> None:
    async with serving(model=model, redis_url=empty_server, alpha=1e-4) as a, serving(model=model, redis_url=empty_server, alpha=1e-4) as b:
        host, beside = Host(a), Host(b)
        await host.says(sessions=150)
        await host.says(RELEASE)
        [alert] = await host.alerts(1)
        done = await asyncio.gather(host.accept(alert["id"]), host.says(sessions=10), beside.accept(alert["id"]))
        assert [one for one in done if one] == [{"accepted": 1}] * 2
        await host.says(RELEASE)
        await host.alerts(1)


async def test_an_alert_is_not_accepted_where_its_stream_is_gone_or_teaches_nothing(client: httpx.AsyncClient) -> None:
    host = Host(client)
    await host.says(sessions=150)
    await host.says(RELEASE)
    [alert] = await host.alerts(1)
    (await client.delete("/v1/streams/host")).raise_for_status()
    assert await host.accept(alert["id"]) == {"resolved": 1}
    assert (await host.alerts(1))[0]["acknowledgement"] is None


def alert_of(message: str, template: str | None, before: list[str]) -> Alert:
    line = Line(message=message, template=template, new=template is None, before=before)
    onset = Evidence(1e9, 1, 1e-6, 2.0, 2.0, "major", "none", [], line=line, expected={})
    return Alert(28 * "0", "anomaly", "resolved", "lines", "host", "major", 1e9, 1e9, 1e9, 1e9, "recovered", True, onset, None, None)


def test_a_lesson_has_the_rare_lines_that_the_alert_shows_and_of_an_odd_pause_nothing(model: Path) -> None:
    detector = Detector.load(model)

    def taught(*shown: Alert) -> list[list[int]]:
        x = lessons.heard(detector, shown)
        assert x is not None
        return [np.flatnonzero(row).tolist() for row in lessons.learned(detector, x)]

    usual = [PATTERNS[code] for code in (READ, OPEN, CLOSE, WRITE, WRITE)]
    new, rare = alert_of(RELEASE, None, usual), alert_of("open a", PATTERNS[OPEN], usual)
    pause = alert_of(SAID[WRITE], PATTERNS[WRITE], usual)
    cut_off = alert_of("word " * 400, None, usual)
    both = alert_of(RELEASE, None, ["(new pattern)", PATTERNS[OPEN], *usual[:3]])
    of_new, of_rare, nothing, unknown, of_both = taught(new, rare, pause, cut_off, both)
    assert (len(of_new), len(of_rare), nothing, unknown) == (1, 1, [], [])
    assert of_new != of_rare
    assert sorted(of_both) == sorted([*of_new, *of_rare]), "the new one before it may be of any kind"
    assert [taught(one)[0] for one in (new, rare)] == [of_new, of_rare], "whatever is accepted beside it"


def test_an_alert_is_told_to_be_accepted_once_and_one_that_is_open_again_stays_so() -> None:
    over = alert_of(RELEASE, None, [])
    accepted = advanced(over, Transition.accepted(over), 2e9, 60.0)
    assert accepted is not None
    assert (accepted.status, accepted.resolution, accepted.resolved_at) == ("resolved", "accepted", 1e9)
    assert not lessons.teaches(accepted)
    for other in (accepted, None, replace(over, status="open", resolved_at=None, resolution=None)):
        assert advanced(other, Transition.accepted(over), 2e9, 60.0) is None


def test_what_is_accepted_is_not_forgotten_however_seldom_it_comes(host: LogStep) -> None:
    """It faded: a line that came twice a day was told of again after some days, one of once a week each time."""
    own, place = torch.zeros(1, host.counts.width), torch.tensor([0])
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])
    own = host.counts.own_after(own, place, yes, no)
    own = host.counts.own_after(own, place + 1, no, yes)
    for _ in range(30_000):
        own = host.counts.own_after(own, place + 1, no, no)
    assert own[0, 0] == ACCEPTED
    assert own[0, 1] == 0
