"""The processes that are measured, started and ended here."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

START_SECONDS = 60.0
READY = "/health/ready"
NONE: Mapping[str, str] = MappingProxyType({})


def console() -> Console:
    """Wide enough for a table where the output is a file or a pipe, which has no width."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen[bytes]
    ready_after: float
    """Seconds from starting the process to the first 200 of its readiness."""


def free_port() -> int:
    """Below the ports that outgoing connections get (from 32,768 on), so that none of them takes it before its server does.

    Nor does another call: none gets a port twice, and each of several processes of pytest has its own.
    """
    first, step = (
        int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")),
        int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")),
    )
    while True:
        port = random.SystemRandom().randrange(20_000 + first, 32_000, step)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


_given: set[int] = set()


@contextmanager
def service(
    data_dir: Path, *, redis_url: str = "", model: str = "", settings: Mapping[str, str] = NONE, ready: str = READY
) -> Iterator[Server]:
    """`python -m service serve` as a user starts it, on a free port. `settings` are further ONSET_... variables."""
    given = {"ONSET_DATA_DIR": str(data_dir), "ONSET_REDIS_URL": redis_url, "ONSET_MODEL": model, **settings}
    with started([sys.executable, "-m", "service", "serve"], {name: value for name, value in given.items() if value}, ready) as server:
        yield server


@contextmanager
def started(command: list[str], settings: dict[str, str], ready: str = READY) -> Iterator[Server]:
    """A server process; it is told its port by ONSET_PORT, and ended by SIGTERM."""
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
    env |= {"ONSET_HOST": "127.0.0.1", "ONSET_PORT": str(port), "ONSET_LOG_LEVEL": "warning", **settings}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        _await(f"http://127.0.0.1:{port}{ready}", process)
        yield Server(port, process, time.perf_counter() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.perf_counter() + START_SECONDS
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"The server ended with {process.returncode} while starting.")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.01)
    raise SystemExit(f"{url} did not answer within {START_SECONDS:.0f} s.")
