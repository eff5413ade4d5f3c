"""A sender that knows no event_id and sends a batch until it is answered: through kill -9 each of its points is stepped once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx

from tests import local
from tests.e2e.process import Service
from tests.e2e.test_kill import Killer, kill_service

BATCHES, POINTS, STREAMS = 30, 20, 4
START = 1_790_000_000


def batch(number: int) -> str:
    """As Telegraf writes it: points of all streams, in the order of their times."""
    moments = range(number * POINTS, (number + 1) * POINTS)
    return "".join(f"press,line=north,no={i % STREAMS} force={(i * 37) % 101},on=t {START + i}000000000\n" for i in moments)


def test_points_that_are_sent_until_they_are_answered_are_stepped_once(tmp_path: Path, tiny_model_path: Path) -> None:
    sources = json.dumps([{"type": "http", "name": "press", "payload": {"format": "influx"}}])
    with Service(tmp_path / "data", model=tiny_model_path, SOURCES=sources) as service:
        killer = Killer(lambda: kill_service(service), seed=3)
        killer.start()
        try:
            with httpx.Client(base_url=service.url, timeout=10) as client:
                for number in range(BATCHES):
                    send(client, batch(number))
                    while killer.kills < 3 * number // BATCHES:
                        assert killer.is_alive()
                        time.sleep(0.05)
                    send(client, batch(number))  # its answer was lost on the way
        finally:
            killer.stop()
        assert killer.kills >= 2
        listed = local.get(f"{service.url}/v1/streams").json()["streams"]
        names = {f"press,line=north,no={no}/{field}" for no in range(STREAMS) for field in ("force", "on")}
        assert {stream["stream_id"]: stream["state_version"] for stream in listed} == dict.fromkeys(names, BATCHES * POINTS // STREAMS)


def send(client: httpx.Client, lines: str) -> None:
    """Until it is answered."""
    deadline = time.monotonic() + 100
    while True:
        assert time.monotonic() < deadline
        try:
            answer = client.post("/api/v2/write", params={"bucket": "press", "org": "plant"}, content=lines)
        except httpx.TransportError:
            time.sleep(0.02)
            continue
        if answer.status_code not in (429, 503):
            assert answer.status_code == 204, answer.text
            return
        time.sleep(0.05)
