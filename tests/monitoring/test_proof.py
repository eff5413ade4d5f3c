"""A real Prometheus and a real Alertmanager watch the service while it scores: no query of ours is without data, and alerts arrive."""

from __future__ import annotations

import csv
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import yaml

from bench.receiver import Receiver
from monitoring.generate import ROOT
from monitoring.queries import Found, ask, queries, table, variables
from monitoring.rules import RULES
from service.artifact import find_artifacts
from tests import local
from tests.alertmanager import Alertmanager
from tests.e2e.process import Service
from tests.prometheus import Prometheus
from tests.servers import Valkey
from tests.tiny_log import build_tiny_log

NAB = ROOT / "../shared/data/nab/data/realAWSCloudwatch"
SHIPPED = ROOT / "service/models"
STREAMS, KNOWN, LIVE = 6, 600, 800
"""Streams, readings of each before Prometheus looks (enough to know what is normal), and after that at most."""
FAULTY = "web/0"
WAIT_SECONDS = 60


def readings() -> list[list[float]]:
    """Of the Numenta benchmark's servers where it lies beside the checkout, otherwise made up: [STREAMS][KNOWN + LIVE]."""
    files = sorted(NAB.glob("ec2_cpu_utilization_*.csv"))[:STREAMS]
    if len(files) == STREAMS:
        return [[float(row["value"]) for row in csv.DictReader(file.open())][: KNOWN + LIVE] for file in files]
    t, rng = np.arange(KNOWN + LIVE), np.random.default_rng(0)
    made: list[list[float]] = [(50 + 10 * np.sin(t / 20 + i) + rng.normal(size=len(t))).tolist() for i in range(STREAMS)]
    return made


def until(holds: Callable[[], Any], what: str) -> Any:
    """Wait for it, and return it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS} s: {what}"
        time.sleep(0.2)
    return found


class Received(Receiver):
    """A webhook for Alertmanager, and what it was told."""

    @property
    def alerts(self) -> list[dict[str, Any]]:
        return [alert for posted in self.posted for alert in posted.json["alerts"]]

    @property
    def notices(self) -> list[str]:
        """The receiver of each notification."""
        return [posted.json["receiver"] for posted in self.posted]

    def of(self, status: str) -> list[dict[str, Any]]:
        """The service's alerts of the stream that is off."""
        wanted = {"alertname": "OnsetAnomaly", "stream": FAULTY}
        return [alert for alert in self.alerts if alert["status"] == status and wanted.items() <= alert["labels"].items()]


@dataclass
class World:
    service: Service
    prometheus: str
    alertmanager: str
    received: Received
    faulty: threading.Event

    def count(self, name: str) -> float:
        """Sum of a metric, as the service tells it."""
        lines = local.get(f"{self.service.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def models(folder: Path) -> Path:
    """The shipped detector, and one of log lines."""
    folder.mkdir()
    shutil.copy(find_artifacts(SHIPPED)[0], folder)
    build_tiny_log(folder)
    return folder


@contextmanager
def traffic(url: str, store: str, faulty: threading.Event) -> Iterator[None]:
    """Readings of all streams, five a second each, over HTTP and a queue; of the first one far off while `faulty`."""
    values, stop = readings(), threading.Event()

    def sent(i: int, at: float, shift: float = 0.0) -> list[dict[str, Any]]:
        shifts = [shift] + [0.0] * (STREAMS - 1)
        return [{"stream_id": f"web/{n}", "values": {"value": series[i] + shifts[n]}, "timestamp": at} for n, series in enumerate(values)]

    with httpx.Client(base_url=url, timeout=30) as client, redis.Redis.from_url(store) as queue:
        start = time.time() - 0.2 * KNOWN
        known = [event for i in range(KNOWN) for event in sent(i, start + 0.2 * i)]
        client.post("/v1/events", json=known).raise_for_status()
        client.post("/v1/events", json={"stream_id": "web/0", "values": {"no such": 1.0}})

        def send() -> None:
            for i in range(KNOWN, KNOWN + LIVE):
                client.post("/v1/events", json=sent(i, time.time(), 60.0 if faulty.is_set() else 0.0)).raise_for_status()
                lines = [{"stream_id": "web", "message": message} for message in (f"Took {i} ms for /a", f"Unheard of {i}")]
                client.post("/v1/events?model=tiny-log", json=lines).raise_for_status()
                queue.xadd("onset:events", {"event": json.dumps({"stream_id": "queued", "values": {"value": float(i % 7)}})})
                if stop.wait(0.2):
                    return

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def prometheus_config(rules_file: Path, target: str, alertmanager: str) -> str:
    """The one that ships, which looks every second; rules hold for a second where they hold for minutes."""
    config = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())
    del config["remote_write"]  # tests/e2e/test_prometheus.py
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [onset, _] = config["scrape_configs"]
    del onset["dns_sd_configs"]
    config["scrape_configs"] = [onset | {"static_configs": [{"targets": [target]}]}]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    rules = yaml.safe_load((ROOT / "monitoring/prometheus/rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["for"] = "1s"
    rules_file.write_text(yaml.safe_dump(rules))
    config["rule_files"] = [str(rules_file)]
    return yaml.safe_dump(config)


def alertmanager_config(hook: str, *, patient: bool = False) -> str:
    """The one that ships, with a receiver, and without its patience unless it is `patient`."""
    config = yaml.safe_load((ROOT / "monitoring/alertmanager/alertmanager.yml").read_text())

    def hasten(route: dict[str, Any]) -> None:
        route |= {"group_wait": "0s", "group_interval": "1s"}
        for child in route.get("routes", []):
            hasten(child)

    if not patient:
        hasten(config["route"])
    for named in config["receivers"]:
        named["webhook_configs"] = [{"url": hook, "send_resolved": True}]
    return yaml.safe_dump(config)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("monitoring")
    (folder / "service").mkdir()
    faulty = threading.Event()
    with (
        Valkey(folder / "store") as store,
        Received() as received,
        Alertmanager(folder / "alertmanager", alertmanager_config(received.url)) as alertmanager,
        Service(
            folder / "service/data",
            model=models(folder / "models"),
            DEFAULT_MODEL="default",
            REDIS_URL=store.url,
            STREAM_METRICS="100",
            CANARY_SECONDS="3",
            STREAMS_INPUT="onset:events",
            ALERTS_ALERTMANAGERS=alertmanager.url,
            ALERTS_KEEP_FIRING_SECONDS="1",
            ALERTS_RUNBOOK_URL="https://example.org/runbooks",
        ) as service,
        Prometheus(
            folder / "prometheus", prometheus_config(folder / "rules.yml", f"127.0.0.1:{service.port}", alertmanager.address)
        ) as prometheus,
        traffic(service.url, store.url, faulty),
    ):
        yield World(service, prometheus.url, alertmanager.url, received, faulty)


def test_an_anomaly_arrives_at_alertmanager_and_is_resolved_when_it_is_over(world: World) -> None:
    def ruled() -> list[dict[str, Any]]:
        asked = [f'stream="{FAULTY}"', 'alertname="OnsetStreamAnomalous"']
        alerts: list[dict[str, Any]] = local.get(f"{world.alertmanager}/api/v2/alerts", params={"filter": asked}).json()
        return [alert for alert in alerts if alert["status"]["inhibitedBy"]]

    until(lambda: world.count("onset_streams_shown") > STREAMS, "the queue's stream")
    before = len(world.received.of("firing"))
    world.faulty.set()
    firing = until(lambda: world.received.of("firing")[before:], "an alert of the stream that is off")[-1]
    [rule] = until(ruled, "the rule about the same stream, inhibited by the service's own alert")
    world.faulty.clear()
    resolved = until(lambda: [alert for alert in world.received.of("resolved") if alert["startsAt"] >= firing["startsAt"]], "its end")[-1]
    print(json.dumps({"firing": firing, "by the rule": rule, "resolved": resolved}, indent=2))
    assert firing["labels"]["model"] == rule["labels"]["model"] == "default"
    assert firing["labels"]["severity"] in ("minor", "major", "critical")
    assert FAULTY in firing["annotations"]["summary"]
    assert rule["annotations"]["summary"] == f"{FAULTY} is anomalous."
    assert "default has taken it for anomalous" in rule["annotations"]["description"]
    assert rule["annotations"]["runbook_url"].endswith("OnsetStreamAnomalous.md")
    assert resolved["endsAt"] > firing["startsAt"]


def test_every_query_of_every_panel_and_rule_returns_data(world: World) -> None:
    values = variables(30, 1, FAULTY, "value")

    def empty(found: list[Found]) -> list[str]:
        return [f"{one.asked.where}: {one.asked.expr}" for one in found if one.series == 0]

    found = ask(world.prometheus, queries(), values, 30)
    if empty(found):  # a series that has begun a moment ago: the next scrapes have it
        time.sleep(5)
        found = ask(world.prometheus, queries(), values, 30)
    print(table(found))
    assert empty(found) == []
    assert {one.asked.where for one in found} >= {f"rule {rule.name}" for rule in RULES}


def test_the_numbers_are_those_of_the_traffic(world: World) -> None:
    def value(query: str) -> float:
        reply = local.get(f"{world.prometheus}/api/v1/query", params={"query": query}).json()
        return float(reply["data"]["result"][0]["value"][1])

    assert value('sum(onset_events_total{outcome="scored"})') > STREAMS * KNOWN
    assert value('sum(onset_events_total{outcome="rejected"})') == 1
    assert value("sum(onset_onsets_total)") >= 1
    assert value("min(onset_canary_ok)") == 1
    assert value('min(onset_build_info{version!=""})') == 1
    share = value('sum(onset_p_value_bucket{le="0.5"}) / sum(onset_p_value_count)')
    assert 0 < share < 1
    assert not math.isnan(value(f'max(yhat_upper{{stream="{FAULTY}"}})'))


def test_no_rule_complains_about_the_service_itself(world: World) -> None:
    reply = local.get(f"{world.prometheus}/api/v1/rules").raise_for_status().json()
    rules = [rule for group in reply["data"]["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    health = [group for group in reply["data"]["groups"] if group["name"] == "onset-health"]
    assert [rule["name"] for group in health for rule in group["rules"] if rule["state"] == "firing"] == []


@pytest.fixture(name="told")
def told_fixture(tmp_path: Path) -> Iterator[tuple[str, Received]]:
    """A patient Alertmanager's address, and what it told."""
    with (
        Received() as received,
        Alertmanager(tmp_path / "alertmanager", alertmanager_config(received.url, patient=True)) as alertmanager,
    ):
        yield alertmanager.url, received


def test_a_hundred_critical_anomalies_at_once_are_one_page(told: tuple[str, Received]) -> None:
    url, received = told
    labels = {"alertname": "OnsetAnomaly", "model": "default", "severity": "critical"}
    local.post(f"{url}/api/v2/alerts", json=[{"labels": labels | {"stream": f"pump-{i}"}} for i in range(100)]).raise_for_status()
    until(lambda: len(received.alerts) >= 100, "all alerts")
    assert received.notices == ["onset-pager"]


def test_while_the_store_is_away_one_page_says_so_and_another_installations_pages_come(told: tuple[str, Received]) -> None:
    url, received = told
    firing = [
        ("OnsetUnavailable", "onset"),
        ("OnsetAlertsNotKept", "onset"),
        ("OnsetEventsFailing", "onset"),
        ("OnsetEventsFailing", "onset-b"),
    ]
    alerts = [{"labels": {"alertname": name, "severity": "critical", "job": job}} for name, job in firing]
    local.post(f"{url}/api/v2/alerts", json=alerts).raise_for_status()
    until(lambda: len(received.alerts) >= 2, "two pages")
    time.sleep(2)  # the others' groups wait as long
    paged = {(alert["labels"]["alertname"], alert["labels"]["job"]) for alert in received.alerts}
    assert paged == {("OnsetUnavailable", "onset"), ("OnsetEventsFailing", "onset-b")}
