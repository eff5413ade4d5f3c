"""Two real replicas over one store end sessions that fall silent, each once, though one of them is killed; a later line begins the next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests import local
from tests.e2e.process import Service
from tests.log_doors import LINES
from tests.times import wait
from tests.tiny_log import build_tiny_log

SESSIONS = 20


def push(service: Service, session: int, *lines: str) -> None:
    values = [[str(time.time_ns()), line] for line in lines]
    body = {"streams": [{"stream": {"request": f"r{session}"}, "values": values}]}
    local.post(f"{service.url}/loki/api/v1/push", json=body, timeout=20).raise_for_status()


def streams(service: Service) -> dict[str, dict[str, Any]]:
    page = local.get(f"{service.url}/v1/streams", params={"limit": "1000"}, timeout=20).raise_for_status().json()
    return {stream["stream_id"]: stream for stream in page["streams"]}


def test_every_session_ends_once_though_a_replica_is_killed_and_a_later_line_begins_the_next(tmp_path: Path, empty_server: str) -> None:
    model = build_tiny_log(tmp_path, session_seconds=8.0)
    folders = [tmp_path / name / "data" for name in ("one", "two")]
    for folder in folders:
        folder.parent.mkdir()
    with Service(folders[0], model=model, REDIS_URL=empty_server) as one, Service(folders[1], model=model, REDIS_URL=empty_server) as two:
        for session in range(SESSIONS):
            push((one, two)[session % 2], session, LINES[0])
            push((two, one)[session % 2], session, *LINES[1:3])
        one.kill()
        wait(lambda: all(stream["state_version"] != 3 for stream in streams(two).values()))
        time.sleep(2.5)  # it has swept again
        ended = streams(two)
        assert len(ended) == SESSIONS
        assert {(stream["state_version"], stream["line"]["template"]) for stream in ended.values()} == {(4, "(end of session)")}
        push(two, 0, LINES[0])
        begun = streams(two)['{request="r0"}']
        assert (begun["state_version"], begun["line"]["before"], begun["late"]) == (5, [], False)
