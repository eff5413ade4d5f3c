"""Alerts of the real service, from the event to the REST door: one for each anomaly, through kill -9."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from service.alerts import Transition, encoded
from service.stores import Write
from tests import local
from tests.contracts.test_stores import opened, value
from tests.e2e.process import Service
from tests.times import wait

_rng = random.Random(3)
NORMAL = [round(_rng.gauss(10, 1), 3) for _ in range(600)]
STUCK, CALM = [60.0] * 30, [round(_rng.gauss(10, 0.5), 3) for _ in range(40)]


class Sensor:
    """A stream whose events come one a second by their own time, the last of them about now."""

    def __init__(self, service: Service, stream_id: str) -> None:
        self._service, self._stream_id = service, stream_id
        self._at = time.time() - 1200
        self._sequence = 0

    def move(self, service: Service) -> None:
        """Send to another replica from now on."""
        self._service = service

    def send(self, values: list[float]) -> None:
        events = [
            {"stream_id": self._stream_id, "values": {"value": value}, "timestamp": self._at + i, "sequence": self._sequence + i}
            for i, value in enumerate(values)
        ]
        answer = local.post(f"{self._service.url}/v1/events", json=events, timeout=60).raise_for_status()
        assert [result["duplicate"] or result["late"] for result in answer.json()] == [False] * len(values)
        self._at += len(values)
        self._sequence += len(values)


def alerts(service: Service, **query: str | list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = local.get(f"{service.url}/v1/alerts", params=query, timeout=60).raise_for_status().json()["alerts"]
    return found


def test_an_anomaly_is_one_alert_that_is_acknowledged_and_resolved(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, PUBLIC_URL="https://onset.example") as service:
        sensor = Sensor(service, "line 3/pump")
        sensor.send([*NORMAL, *STUCK])
        wait(lambda: bool(alerts(service)))
        [alert] = alerts(service, status="open", severity="critical", stream_id="line 3/pump", kind="anomaly")
        assert "line 3/pump is " in alert["summary"]
        assert "above its expected range since" in alert["summary"]
        assert "value 60, expected " in alert["description"]
        assert alert["link"] == f"https://onset.example/?alert={alert['id']}"
        address = f"{service.url}/v1/alerts/{alert['id']}"
        assert local.get(address).json() == alert
        noted = local.post(f"{address}/acknowledge", json={"by": "anna", "note": "on it"}).raise_for_status().json()
        assert (noted["status"], noted["acknowledgement"]["by"]) == ("acknowledged", "anna")
        assert alerts(service, status="open") == []
        wanted: list[str | list[str]] = ["acknowledged,open", ["acknowledged", "open"]]
        for both in wanted:  # as most clients write a list
            assert alerts(service, status=both) == [noted]
        undone = local.delete(f"{address}/acknowledge").raise_for_status().json()
        assert (undone["status"], undone["acknowledgement"]) == ("open", None)
        sensor.send(CALM)
        wait(lambda: alerts(service)[0]["status"] == "resolved")
        [alert] = alerts(service)
        assert alert["resolution"] == "recovered"
        assert alert["summary"].startswith("line 3/pump is back to normal")
        late = local.post(f"{address}/acknowledge", json={"by": "anna"})
        assert (late.status_code, late.json()["type"]) == (409, "urn:onset:alert-resolved")
        assert local.get(f"{service.url}/v1/alerts/{28 * 'a'}").status_code == 404
        assert local.post(f"{address}/acknowledge", json={"note": "nobody"}).json()["field"] == "by"
        assert local.get(f"{service.url}/v1/alerts", params={"status": "opened"}).json()["field"] == "status"


def test_accepting_and_deleting_streams_resolves_their_alerts(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as service:
        for stream in ("accepted", "deleted"):
            Sensor(service, stream).send([*NORMAL, *STUCK])
        wait(lambda: len(alerts(service)) == 2)
        local.post(f"{service.url}/v1/streams/accepted/accept").raise_for_status()
        local.delete(f"{service.url}/v1/streams/deleted").raise_for_status()
        wait(lambda: len(alerts(service, status="resolved")) == 2)
        assert {alert["stream_id"]: alert["resolution"] for alert in alerts(service)} == {"accepted": "accepted", "deleted": "forgotten"}


def test_several_alerts_are_counted_acknowledged_and_accepted_at_once_and_each_is_told_of(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as service:
        names = [f"hall-{1 + i % 2}/{i}" for i in range(5)]
        for name in names:
            Sensor(service, name).send([*NORMAL, *STUCK])
        wait(lambda: len(alerts(service)) == len(names))
        counted = local.get(f"{service.url}/v1/alerts/count", params={"status": "open", "q": "HALL-1"}).json()
        assert counted == {"count": 3, "by_severity": {"minor": 0, "major": 0, "critical": 3}, "complete": True}
        ids = {alert["stream_id"]: alert["id"] for alert in alerts(service, q="hall-")}

        def told(what: str, names: list[str]) -> dict[str, str]:
            body = {"by": "anna", "note": "power dip", "ids": [ids[name] for name in names]}
            done = local.post(f"{service.url}/v1/alerts/{what}", json=body).raise_for_status().json()
            assert [one["id"] for one in done["alerts"]] == body["ids"]
            assert sum(done["outcomes"].values()) == len(names)
            return {one["stream_id"]: one["outcome"] for one in done["alerts"]}

        assert told("acknowledge", names[:3]) == dict.fromkeys(names[:3], "acknowledged")
        assert told("acknowledge", names[:4]) == dict.fromkeys(names[:3], "already_acknowledged") | {names[3]: "acknowledged"}
        assert [alert["stream_id"] for alert in alerts(service, status="open")] == [names[4]]
        assert told("accept", names[2:]) == dict.fromkeys(names[2:], "accepted")
        assert told("accept", names[2:]) == dict.fromkeys(names[2:], "resolved")  # at once, or when the book has it
        wait(lambda: len(alerts(service, status="resolved")) == 3)
        assert {alert["resolution"] for alert in alerts(service, status="resolved")} == {"accepted"}
        assert {alert["acknowledgement"]["by"] for alert in alerts(service)} == {"anna"}  # whoever accepted it, too
        unknown = local.post(f"{service.url}/v1/alerts/accept", json={"by": "anna", "ids": [28 * "0"]}).json()
        assert unknown == {"alerts": [{"id": 28 * "0", "outcome": "unknown", "stream_id": None, "model": None}], "outcomes": {"unknown": 1}}
        service.terminate()
        log = service.log.read_text()
        assert '"event": "alerts_acknowledged"' in log
        assert '"event": "alerts_accepted"' in log


def test_what_cannot_be_accepted_here_is_told_of_beside_what_is(tmp_path: Path, tiny_model_path: Path, empty_server: str) -> None:
    async def write(transition: Transition) -> None:
        store = await opened(empty_server)
        await store.commit(transition.model, [Write(transition.stream_id, b"", value(), log=[encoded(transition)])])
        await store.close()

    with Service(tmp_path / "data", model=tiny_model_path, REDIS_URL=empty_server) as service:
        Sensor(service, "stuck").send([*NORMAL, *STUCK])
        now = time.time()
        silent = Transition("opened", "tiny", "silent", "silence", now, patience=5.0)
        elsewhere = Transition("opened", "another", "elsewhere", "anomaly", now)
        for transition in (silent, elsewhere):
            asyncio.run(write(transition))
        wait(lambda: len(alerts(service, status="open")) == 3)
        ids = [alert["id"] for alert in alerts(service)]
        done = local.post(f"{service.url}/v1/alerts/accept", json={"by": "anna", "ids": ids}).raise_for_status().json()
        assert {one["stream_id"]: one["outcome"] for one in done["alerts"]} == {
            "stuck": "accepted",
            "silent": "silence",
            "elsewhere": "model_not_loaded",
        }
        assert done["outcomes"] == {"accepted": 1, "silence": 1, "model_not_loaded": 1}
        assert {alert["stream_id"] for alert in alerts(service, status="open")} == {"silent", "elsewhere"}  # nobody looks after them
