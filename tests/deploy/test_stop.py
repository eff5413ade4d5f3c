"""How a container's process ends: what Docker and Kubernetes see of a stop."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import local
from tests.e2e.process import Service
from tests.times import wait
from tests.tiny import build_tiny

STOP_SECONDS = 20


def exit_code(service: Service) -> int | None:
    wait(lambda: service.returncode is not None, STOP_SECONDS)
    return service.returncode


def test_a_stopped_service_drains_and_ends_with_0_and_its_store_with_it(tmp_path: Path) -> None:
    with Service(tmp_path / "data", model=build_tiny(tmp_path), forked=False) as service:
        reply = local.post(f"{service.url}/v1/events", json={"stream_id": "a", "values": {"value": 1.0}})
        assert reply.status_code == 200
        (store,) = service.children("valkey-server")
        os.kill(service.pid, signal.SIGTERM)
        assert exit_code(service) == 0
        assert not store.is_running()


def test_a_request_that_is_being_sent_when_the_service_is_stopped_is_still_answered(tmp_path: Path) -> None:
    with Service(tmp_path / "data", model=build_tiny(tmp_path), forked=False) as service:

        def lines() -> Iterator[bytes]:
            for number in range(100):
                if number == 50:
                    os.kill(service.pid, signal.SIGTERM)
                    wait_until_nobody_new_is_let_in(service)
                yield b'{"stream_id": "s%d", "values": {"value": 1.0}}\n' % number

        reply = local.post(f"{service.url}/v1/events", content=lines(), headers={"content-type": "application/x-ndjson"}, timeout=20)
        assert reply.status_code == 200
        assert [json.loads(line)["stream_id"] for line in reply.text.splitlines()] == [f"s{number}" for number in range(100)]
        assert exit_code(service) == 0


def wait_until_nobody_new_is_let_in(service: Service) -> None:
    wait(lambda: not service.is_ready())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads from /proc when the handler is in place")
def test_a_service_stopped_while_it_starts_ends_with_0_at_once(tmp_path: Path) -> None:
    with Service(tmp_path / "data", model=build_tiny(tmp_path), forked=False, wait=False) as service:
        wait(lambda: handles_sigterm(service.pid))
        os.kill(service.pid, signal.SIGTERM)
        assert exit_code(service) == 0


def handles_sigterm(pid: int) -> bool:
    """Whether the process has installed a handler (Linux)."""
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) & 1 << (signal.SIGTERM - 1))
