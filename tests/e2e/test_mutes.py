"""A mute on the real service: nobody is told what begins meanwhile, through kill -9, and everybody what is still open afterwards."""

from __future__ import annotations

import time
from pathlib import Path

from bench.receiver import Receiver
from tests import local
from tests.alertmanager import CONFIG, Alertmanager
from tests.e2e.process import Service
from tests.e2e.test_alert_sinks import firing
from tests.e2e.test_alerts import CALM, NORMAL, STUCK, Sensor, alerts
from tests.times import wait

BODY = {"streams": ["line-3", "line-3/*"], "by": "anna", "note": "boiler inspection"}


def test_a_line_under_maintenance_wakes_nobody_also_through_kill_9_and_what_lasts_is_told_when_it_is_over(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    with Receiver() as hook, Receiver() as people, Alertmanager(tmp_path / "alertmanager", CONFIG.format(url=people.url)) as alertmanager:
        settings = {
            "ALERTS_WEBHOOK": hook.url,
            "ALERTS_ALERTMANAGERS": alertmanager.url,
            "ALERTS_KEEP_FIRING_SECONDS": "0",
            "ALERTS_RESEND_SECONDS": "1",
        }
        with Service(tmp_path / "data", model=tiny_model_path, wait=True, forked=True, **settings) as service:
            address = f"{service.url}/v1/mutes/boiler"
            made = local.put(address, json=BODY | {"ends_at": time.time() + 3600}).raise_for_status().json()
            assert (made["state"], made["streams"], made["model"]) == ("in_force", BODY["streams"], None)
            streams = [Sensor(service, name) for name in ("line-3/passing", "line-3/lasting", "line-30/other")]
            for sensor in streams:
                sensor.send(NORMAL)
            service.kill()
            service.start()
            for sensor in streams:
                sensor.send(STUCK)
            wait(lambda: len(alerts(service)) == 3)
            assert {alert["stream_id"] for alert in alerts(service, muted="true")} == {"line-3/passing", "line-3/lasting"}
            assert [alert["stream_id"] for alert in alerts(service, muted="false")] == ["line-30/other"]
            service.kill()
            service.start()
            streams[0].send(CALM)
            wait(lambda: len(alerts(service, status="resolved")) == 1)
            wait(lambda: [labels["stream"] for labels in firing(alertmanager)] == ["line-30/other"])
            hook.wait(lambda posted: len(posted) > 0)  # each sink is told by itself
            assert {posted.json["alert"]["stream_id"] for posted in list(hook.posted)} == {"line-30/other"}
            [listed] = local.get(f"{service.url}/v1/mutes").json()["mutes"]
            assert listed == made
            assert local.delete(address).status_code == 204
            assert local.delete(address).json()["type"] == "urn:onset:unknown-mute"
            wait(lambda: {labels["stream"] for labels in firing(alertmanager)} == {"line-30/other", "line-3/lasting"})
            hook.wait(lambda posted: posted[-1].json["alert"]["stream_id"] == "line-3/lasting")
            told = [(posted.json["event"], posted.json["alert"]["stream_id"]) for posted in hook.posted]
            assert [one for one in told if one[1] != "line-30/other"] == [("opened", "line-3/lasting")]
            refused = local.put(address, json=BODY | {"ends_at": "2026-11-28T16:00:00"})
            assert (refused.status_code, refused.json()["field"]) == (422, "ends_at")
            assert local.put(f"{address}%20x", json=BODY | {"ends_at": time.time() + 9}).json()["field"] == "name"
            much = {"streams": [f"other-{i}" for i in range(100)], "ends_at": time.time() + 3600, "by": "anna"}
            many = [local.put(f"{service.url}/v1/mutes/n{i}", json=much).status_code for i in range(21)]
            assert many == 20 * [200] + [413]
            assert local.put(f"{service.url}/v1/mutes/n0", json=much).status_code == 200  # in its own place
