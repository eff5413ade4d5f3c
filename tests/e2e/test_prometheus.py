"""A real Prometheus scrapes a machine, sends it here, and has the scores back; PromQL is what both sides are asked with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import free_port
from service.names import OURS
from tests import local
from tests.e2e.process import Service
from tests.needs import program
from tests.prometheus import Prometheus, Target

CONFIG = """
global: {{scrape_interval: 250ms, external_labels: {{plant: north}}}}
scrape_configs:
- job_name: machine
  static_configs: [{{targets: ["{target}"]}}]
- job_name: onset
  static_configs: [{{targets: ["{onset}"]}}]
remote_write:
- url: http://{onset}/api/v1/write
  queue_config: {{batch_send_deadline: 200ms, min_backoff: 50ms, max_backoff: 200ms, retry_on_http_429: true}}
"""
METRICS = "anomaly_score,onset_anomaly,y,yhat,yhat_lower,yhat_upper"
RULES = """
relabel_configs:
- {source_labels: [__name__], regex: 'oven_.*|onset_events_total', action: keep}
- {regex: instance, action: labeldrop}
"""


class Oven:
    """Its temperature, the parts it has made, and a door that may not be there."""

    def __init__(self) -> None:
        self.scrapes = 0
        self.offset = 0.0
        self.parts = 1_000_000_000.0
        self.rate = 2.0
        self.door = True
        self.on = True

    def metrics(self) -> str:
        if not self.on:
            return ""
        self.scrapes += 1
        self.parts += self.rate + self.scrapes % 2
        lines = [
            f'oven_celsius{{machine="press-1"}} {200 + math.sin(self.scrapes / 3) + self.offset!r}',
            f"oven_parts_total {self.parts!r}",
        ]
        return "\n".join([*lines, *["oven_door 1"] * self.door, ""])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[tuple[Oven, Prometheus, Service]]:
    program("prometheus", "prometheus")  # before anything is started
    folder, oven, port = tmp_path_factory.mktemp("prometheus"), Oven(), free_port()
    rules = folder / "relabel.yml"
    rules.write_text(RULES)
    with (
        Target(oven.metrics) as target,
        Service(
            folder / "data",
            model=tiny_model_path,
            PROMETHEUS_RELABEL=str(rules),
            DRAIN_SECONDS="1",
            REMOTE_WRITE_METRICS=METRICS,
            REMOTE_WRITE_URL=f"http://127.0.0.1:{port}/api/v1/write",
        ) as service,
        Prometheus(folder / "prometheus", CONFIG.format(target=target.address, onset=f"127.0.0.1:{service.port}"), port) as prometheus,
    ):
        yield oven, prometheus, service


SHOWN = (
    '{__name__=~"oven_celsius|yhat|yhat_lower|yhat_upper", machine="press-1"}',
    'max_over_time(anomaly_score{for="oven_celsius"}[5s])',
    'max_over_time(onset_anomaly{for="oven_celsius"}[1m])',
    'max_over_time(oven_celsius[5s]) > on (machine) min_over_time(yhat_upper{for="oven_celsius"}[5s])',
)
NAME = 'oven_celsius{job="machine",machine="press-1",plant="north"}'


def test_a_disturbance_is_found_by_promql_in_the_score_beside_its_series(running: tuple[Oven, Prometheus, Service]) -> None:
    oven, prometheus, _ = running
    calm = 'max_over_time(anomaly_score{for="oven_celsius"}[5s])'
    prometheus.until(lambda: prometheus.query('count_over_time(anomaly_score{for="oven_celsius"}[1m]) > 20'))
    [(labels, score)] = prometheus.query(calm)
    assert labels == {"for": "oven_celsius", "job": "machine", "machine": "press-1", "plant": "north", "model": "tiny"}
    assert score < 2
    oven.offset = 80.0
    prometheus.until(lambda: prometheus.query('max_over_time(anomaly_score{for="oven_celsius"}[5s]) > 2'))
    beyond = 'oven_celsius > on (machine) yhat_upper{for="oven_celsius"}'
    prometheus.until(lambda: prometheus.query(beyond))
    assert prometheus.query('max_over_time(onset_anomaly{for="oven_celsius"}[1m]) == 1')
    for promql in SHOWN:
        print(prometheus.shown(promql), end="\n\n")


def test_a_counter_comes_back_as_its_rate(running: tuple[Oven, Prometheus, Service]) -> None:
    _, prometheus, _ = running
    prometheus.until(lambda: prometheus.query('count_over_time(y{for="oven_parts_total"}[1m]) > 10'))
    [(_, ours)] = prometheus.query('avg_over_time(y{for="oven_parts_total"}[4s])')
    assert 5 < ours < 30  # 2 or 3 parts every 250 ms, and more where a scrape was given up
    [(_, theirs)] = prometheus.query("rate(oven_parts_total[4s])")
    assert ours == pytest.approx(theirs, rel=0.5)


def test_a_series_that_vanishes_ends_its_stream_and_its_scores(running: tuple[Oven, Prometheus, Service]) -> None:
    oven, prometheus, service = running
    prometheus.until(lambda: prometheus.query('onset_anomaly{for="oven_door"}'))
    oven.door = False
    prometheus.until(lambda: prometheus.query('onset_remote_write_unscored_total{what="ended"} > 0'))
    prometheus.until(lambda: not prometheus.query('onset_anomaly{for="oven_door"}'), 10)  # Prometheus' own look-back is five minutes
    assert 'silent_since":null' in local.get(f"{service.url}/v1/streams/oven_door%7Bjob=%22machine%22,plant=%22north%22%7D").text


def test_the_scores_that_prometheus_sends_us_again_are_not_scored(running: tuple[Oven, Prometheus, Service]) -> None:
    _, prometheus, service = running
    prometheus.until(lambda: prometheus.query('onset_remote_write_unscored_total{what="own"} > 0'))
    streams = [stream["stream_id"] for stream in local.get(f"{service.url}/v1/streams").json()["streams"]]
    assert NAME in streams
    assert all(stream.startswith(("oven_", "onset_events_total")) for stream in streams)
    assert not [stream for stream in streams if stream.partition("{")[0] in OURS]
    assert prometheus.query('onset_remote_write_unscored_total{what="rule"} > 0')


def test_a_kill_loses_no_sample_and_scores_none_twice(running: tuple[Oven, Prometheus, Service]) -> None:
    oven, prometheus, service = running
    service.kill()
    before = oven.scrapes
    prometheus.until(lambda: oven.scrapes > before + 10)  # it goes on without us
    service.start()
    prometheus.until(lambda: oven.scrapes > before + 20)
    oven.on = False
    gone = "absent(oven_celsius)"
    prometheus.until(lambda: prometheus.query(gone) and scored(service) == sent(prometheus))
    time.sleep(1)
    assert scored(service) == sent(prometheus) > 40


def scored(service: Service) -> int:
    return int(local.get(f"{service.url}/v1/streams/{NAME}").json()["state_version"])


def sent(prometheus: Prometheus) -> float:
    [(_, count)] = prometheus.query('count_over_time(oven_celsius{machine="press-1"}[10m])')
    return count
