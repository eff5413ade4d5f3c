"""From an event to people: the real service, a real Alertmanager that notifies a real receiver, and a signed webhook; through kill -9."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.chaos_alerts import soak
from bench.receiver import Receiver
from bench.soak import Plan
from tests.alertmanager import CONFIG, Alertmanager
from tests.e2e.process import Service
from tests.e2e.test_alerts import CALM, NORMAL, STUCK, Sensor, alerts
from tests.test_sinks import SECRET, verified
from tests.times import wait


@pytest.fixture
def people() -> Iterator[Receiver]:
    """Whom Alertmanager notifies."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def alertmanager(tmp_path: Path, people: Receiver) -> Iterator[Alertmanager]:
    with Alertmanager(tmp_path / "alertmanager", CONFIG.format(url=people.url)) as running:
        yield running


def notified(people: Receiver) -> list[tuple[str, str, str]]:
    """Status, stream and severity of all that Alertmanager told, each once and in order."""
    told = [
        (alert["status"], alert["labels"]["stream"], alert["labels"]["severity"])
        for posted in people.posted
        for alert in posted.json["alerts"]
    ]
    return list(dict.fromkeys(told))


def firing(alertmanager: Alertmanager) -> list[dict[str, str]]:
    return [alert["labels"] for alert in alertmanager.alerts()]


def printed(service: Service) -> list[str]:
    """What the sink `stdout` wrote."""
    return [line for line in service.log.read_text().splitlines() if line.startswith('{"id":')]


@pytest.mark.parametrize(
    ("stream", "series"),
    [("line 3/pump", {}), ('oven{"größe"="1",instance="a:9100"}', {"for": "oven", "instance": "a:9100"})],
    ids=["any", "series"],
)
def test_an_anomaly_fires_and_resolves_once_in_alertmanager(
    tmp_path: Path, tiny_model_path: Path, alertmanager: Alertmanager, people: Receiver, stream: str, series: dict[str, str]
) -> None:
    settings = {
        "ALERTS_ALERTMANAGERS": alertmanager.url,
        "ALERTS_KEEP_FIRING_SECONDS": "0",
        "ALERTS_RESEND_SECONDS": "1",
        "ALERTS_RUNBOOK_URL": "https://runbooks.example/onset",
        "ALERTS_STDOUT": "true",
        "PUBLIC_URL": "https://onset.example",
    }
    with Service(tmp_path / "data", model=tiny_model_path, wait=True, forked=True, **settings) as service:
        sensor = Sensor(service, stream)
        sensor.send([*NORMAL, *STUCK])
        people.wait(lambda posted: len(posted) == 1)
        [alert] = alertmanager.alerts()
        assert alert["labels"] == series | {"alertname": "OnsetAnomaly", "stream": stream, "model": "tiny", "severity": "critical"}
        assert "above its expected range since" in alert["annotations"]["summary"]
        assert alert["annotations"]["runbook_url"] == "https://runbooks.example/onset"
        assert alert["annotations"]["link"] == alert["generatorURL"] == f"https://onset.example/?alert={alert['annotations']['alert_id']}"
        assert alert["annotations"]["alert_id"] == alerts(service)[0]["id"]
        for _ in range(3):
            sensor.send(STUCK)
            time.sleep(1.2)  # it is told again, and people are not
        assert len(alertmanager.alerts()) == len(people.posted) == 1
        sensor.send(CALM)
        people.wait(lambda posted: len(posted) == 2)
        wait(lambda: not alertmanager.alerts())
        assert notified(people) == [("firing", stream, "critical"), ("resolved", stream, "critical")]
        wait(lambda: len(printed(service)) == 2)  # each sink is told by itself
        assert ['"event":"opened"' in line for line in printed(service)] == [True, False]


def test_alertmanager_that_was_down_learns_how_things_stand_and_a_short_anomaly_is_held(
    tmp_path: Path, tiny_model_path: Path, alertmanager: Alertmanager, people: Receiver
) -> None:
    settings = {"ALERTS_ALERTMANAGERS": alertmanager.url, "ALERTS_KEEP_FIRING_SECONDS": "3600", "ALERTS_RESEND_SECONDS": "1"}
    with Service(tmp_path / "data", model=tiny_model_path, wait=True, forked=True, **settings) as service:
        alertmanager.kill()
        short, long = Sensor(service, "short"), Sensor(service, "long")
        short.send([*NORMAL, *STUCK, *CALM])
        long.send([*NORMAL, *STUCK])
        wait(lambda: Counter(alert["status"] for alert in alerts(service)) == {"resolved": 1, "open": 1})
        time.sleep(1.5)
        alertmanager.start()
        wait(lambda: {labels["stream"] for labels in firing(alertmanager)} == {"short", "long"})
        alertmanager.kill()  # it forgets what fires
        alertmanager.start()
        wait(lambda: {labels["stream"] for labels in firing(alertmanager)} == {"short", "long"})
        assert {stream for status, stream, _ in notified(people) if status == "firing"} == {"short", "long"}
        assert not [stream for status, stream, _ in notified(people) if status == "resolved"]


def test_a_replica_that_is_killed_between_commit_and_delivery_loses_no_alert(
    tmp_path: Path, tiny_model_path: Path, empty_server: str
) -> None:
    with Receiver(*[503] * 4) as hook:
        settings: dict[str, str] = {"REDIS_URL": empty_server, "ALERTS_WEBHOOK": hook.url, "ALERTS_WEBHOOK_SECRET": SECRET}
        settings |= {"ALERTS_PER_MINUTE": "1000"}
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        with Service(tmp_path / "one" / "data", model=tiny_model_path, wait=True, forked=True, **settings) as one:
            first = [Sensor(one, f"a{i}") for i in range(8)]
            for sensor in first:
                sensor.send(NORMAL)
            for sensor in first:
                sensor.send(STUCK)
            one.kill()  # some are in the log, some in the book, some on their way
            with Service(tmp_path / "two" / "data", model=tiny_model_path, wait=True, forked=True, **settings) as two:
                hook.wait(lambda posted: len(_streams(hook, "opened")) == 8)
                for sensor in first:
                    sensor.move(two)
                    sensor.send(CALM)
                two.kill()
                two.start()
                hook.wait(lambda posted: len(_streams(hook, "resolved")) == 8)
                assert len(alerts(two)) == 8
        taken = {posted.json["id"]: posted.json for posted in hook.posted}.values()
        assert Counter((notice["event"], notice["alert"]["stream_id"]) for notice in taken if notice["event"] != "escalated") == {
            (event, f"a{i}"): 1 for event in ("opened", "resolved") for i in range(8)
        }
        for stream in (f"a{i}" for i in range(8)):
            of_stream = [posted.json["event"] for posted in hook.posted if posted.json["alert"]["stream_id"] == stream]
            assert of_stream.index("opened") < of_stream.index("resolved")


def _streams(hook: Receiver, event: str) -> set[str]:
    """Whose alerts were told; every notice is signed."""
    notices: list[Any] = [verified(posted, SECRET) for posted in list(hook.posted)]
    return {notice["alert"]["stream_id"] for notice in notices if notice["event"] == event}


async def test_under_kill_9_every_anomaly_is_one_alert_told_in_order(tmp_path: Path, tiny_model_path: Path) -> None:
    report = await soak(Plan(kills=5, seconds=12, rate=0.7, streams=30, seed=1, model=tiny_model_path), tmp_path)
    assert report.violations == []
    assert sum(report.kills.values()) >= 1
    assert report.resolved > 3
    assert report.refused_by_the_webhook > 0
