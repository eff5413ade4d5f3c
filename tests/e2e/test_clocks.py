"""Real replicas whose clocks are wrong by up to an hour, over one store, taking over from each other as they are killed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from service.state import header_of
from service.stores.redis import state_key
from tests import local
from tests.brokers import Mosquitto
from tests.e2e.process import Service
from tests.times import wait

HOUR = 3600.0
AHEAD = (0.0, HOUR, -HOUR, 600.0)
EVERY = 2.0
"""Seconds between two events of a stream, by their own times; they are sent far more often, so that a slow machine makes none silent."""
PATIENCE = 3 * EVERY
"""At least."""


@pytest.fixture
def replicas(tmp_path: Path, tiny_model_path: Path, empty_server: str) -> Iterator[list[Service]]:
    """One for each of AHEAD."""
    with ExitStack() as stack:
        made = []
        for i, ahead in enumerate(AHEAD):
            folder = tmp_path / str(i) / "data"
            folder.mkdir(parents=True)
            made.append(Service(folder, model=tiny_model_path, wait=False, forked=not ahead, REDIS_URL=empty_server))
            made[-1].ahead = ahead
            stack.enter_context(made[-1])
        for one in made:
            one.wait_ready()
        yield made


@pytest.fixture
def store(empty_server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(empty_server) as client:
        yield client


def now(store: redis.Redis) -> float:
    seconds, microseconds = store.time()
    return float(seconds + microseconds / 1e6)


def sent(service: Service, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = local.post(f"{service.url}/v1/events", json=events, timeout=30).raise_for_status().json()
    return results


def raised(replicas: list[Service]) -> Counter[str]:
    """How often each stream was said to be silent, by all of them, those that were killed too."""
    lines = [json.loads(line) for one in replicas for line in one.log.read_text().splitlines() if line.startswith("{")]
    return Counter(line["stream_id"] for line in lines if line["event"] == "stream_silent")


class Senders:
    """Of some streams, each event EVERY seconds after the one before by its own time."""

    def __init__(self, count: int) -> None:
        self.speaking = [f"s{i:02}" for i in range(count)]
        self._time = time.time() - 100 * EVERY

    def speak(self, service: Service, events: int = 1) -> None:
        """So many of each stream that speaks."""
        batch = []
        for _ in range(events):
            self._time += EVERY
            batch += [{"stream_id": name, "timestamp": self._time, "values": {"value": 1.0}} for name in self.speaking]
        assert all(result["status"] != "failed" for result in sent(service, batch))

    def speak_on(self, service: Service, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.speak(service)
            time.sleep(0.5)


def test_whatever_clocks_replicas_have_each_silence_is_raised_once_and_none_that_is_none(
    replicas: list[Service], store: redis.Redis, tiny_model_path: Path
) -> None:
    senders = Senders(20)
    senders.speak(replicas[0], 60)
    senders.speak_on(replicas[0], 12)  # by now all judge silences
    stopped: list[str] = []
    for killed, taking in pairwise([*replicas, replicas[0]]):
        killed.kill()
        senders.speak_on(taking, 3)
        assert raised(replicas).keys() <= set(stopped)
        before = now(store)
        senders.speak(taking)
        after = now(store)
        some, senders.speaking = senders.speaking[:4], senders.speaking[4:]
        for name in some:
            value = store.get(state_key("tiny", name))
            assert isinstance(value, bytes)
            deadline = float(header_of(value)["deadline"])
            assert before + PATIENCE / 2 < deadline < after + 3 * PATIENCE
        stopped += some
        killed.start()
        senders.speak_on(taking, 2 * PATIENCE)
        while raised(replicas).keys() != set(stopped):
            senders.speak_on(taking, 0.5)
    assert raised(replicas) == Counter(stopped)


def test_whatever_clocks_replicas_have_a_bulk_without_times_that_is_sent_again_is_stepped_once(replicas: list[Service]) -> None:
    for i, (first, second) in enumerate(pairwise([*replicas, replicas[0], replicas[2], replicas[3], replicas[1]])):
        bulk = [{"stream_id": f"bulk {i}", "event_id": f"{n}", "values": {"value": float(n % 3)}} for n in range(20)]
        once = sent(first, bulk)
        again = sent(second, bulk)
        assert [result["state_version"] for result in once] == list(range(1, 21))
        assert again == [result | {"duplicate": True} for result in once]


def test_whatever_clocks_replicas_have_an_event_without_a_time_gets_that_of_the_store(replicas: list[Service], store: redis.Redis) -> None:
    for one in replicas:
        before = now(store)
        [result] = sent(one, [{"stream_id": f"timeless {one.port}", "values": {"value": 1.0}}])
        assert before - 1 < result["timestamp"] < now(store) + 1


def test_what_mqtt_delivers_at_most_once_is_scored_also_after_a_replica_whose_clock_is_ahead(
    tmp_path: Path, tiny_model_path: Path, empty_server: str, mosquitto: Mosquitto
) -> None:
    """Positions of messages are times of arrival, and those of QoS 0 are in no note."""
    source = {"type": "mqtt", "url": mosquitto.url, "topics": ["clocks/+"], "session": "clocks", "lease_seconds": 1}
    sources = json.dumps([source | {"payload": {"format": "number", "feature": "value"}}])
    publisher = Client(CallbackAPIVersion.VERSION2)
    publisher.connect("127.0.0.1", mosquitto.port)
    publisher.loop_start()

    def scored(service: Service) -> int:
        wait(lambda: count(service, "onset_source_partitions") == 1)
        for i in range(20):
            publisher.publish("clocks/a", str(i % 3), qos=0).wait_for_publish(10)
        wait(lambda: count(service, "onset_events_total") == 20)
        return int(count(service, 'outcome="scored"'))

    try:
        for i, ahead in enumerate((HOUR, 0.0)):
            folder = tmp_path / str(i) / "data"
            folder.mkdir(parents=True)
            service = Service(folder, model=tiny_model_path, forked=not ahead, REDIS_URL=empty_server, SOURCES=sources)
            service.ahead = ahead
            with service:
                assert scored(service) == 20
    finally:
        publisher.loop_stop()
        publisher.disconnect()


def count(service: Service, what: str) -> float:
    """Of the events by MQTT, or of what else has that in its name."""
    lines = [line for line in local.get(f"{service.url}/metrics").text.splitlines() if '"mqtt"' in line and what in line]
    return sum(float(line.split()[-1]) for line in lines if line.startswith(("onset_events_total", "onset_source_partitions")))
