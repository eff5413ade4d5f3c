"""A real `python -m service serve` in a process of its own.

Forked from a process that has imported the service already (bench/nursery.py): 0.3 s of a processor a start in place of 1.1. All that comes
after the imports is the same. What is about starting, ending or the command line itself asks for `forked=False`.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from bench.nursery import Born, Nursery
from bench.servers import free_port
from tests import local

START_SECONDS, STOP_SECONDS = 60, 30
AHEAD = Path(__file__).with_name("ahead")
_asking = threading.Lock()
"""The nursery answers one at a time, and tests kill and start from threads."""


@functools.cache
def _nursery() -> Nursery:
    nursery = Nursery().__enter__()
    atexit.register(nursery.__exit__, None, None, None)
    return nursery


class Service:
    """Started on entering, terminated on leaving. `kill` and `start` again keep port and data folder."""

    def __init__(self, data_dir: Path, *, model: Path | None = None, wait: bool = True, forked: bool = True, **environment: str) -> None:
        """`environment` holds settings without their ONSET_ prefix; `wait` = until it is ready."""
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = {"port": str(self.port), "data_dir": str(data_dir)} | ({"model": str(model)} if model else {})
        self._environment = environment
        self._wait = wait
        self._forked = forked and hasattr(os, "pidfd_open")  # Linux
        self.source: Path | None = None  # where another copy of the package lies; not forked
        self.ahead = 0.0  # of the machine's clock, as the process sees it; not forked
        self._process: subprocess.Popen[bytes] | Born | None = None
        self.log = data_dir.parent / "service.log"

    def __enter__(self) -> Service:
        try:
            self.start()
        except BaseException:  # it would outlive the tests
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None and not self.ended:
            self.terminate()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        assert self._process is not None
        return self._process.ended if isinstance(self._process, Born) else self._process.poll() is not None

    @property
    def returncode(self) -> int | None:
        """Of one that was not forked."""
        assert isinstance(self._process, subprocess.Popen)
        return self._process.poll()

    def start(self) -> None:
        environment = os.environ | {f"ONSET_{name}": value for name, value in self._environment.items()}
        if self.ahead:
            path = os.pathsep.join([str(AHEAD), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment |= {"PYTHONPATH": path, "AHEAD": str(self.ahead)}
        if self._forked:
            self.log.touch()  # it is there at once
            with _asking:
                self._process = _nursery().serve(
                    environment | {f"ONSET_{name.upper()}": value for name, value in self._options.items()}, self.log
                )
        else:
            arguments = [part for name, value in self._options.items() for part in (f"--{name.replace('_', '-')}", value)]
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", "service", "serve", *arguments]
                self._process = subprocess.Popen(command, env=environment, cwd=self.source, stdout=log, stderr=log)
        if self._wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            assert not self.ended, f"the service ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready after {START_SECONDS} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)

    def is_ready(self) -> bool:
        return self.readiness() == 200

    def readiness(self) -> int:
        """Status of the readiness probe; 0 = no answer."""
        try:
            return local.get(f"{self.url}/health/ready", timeout=2).status_code
        except httpx.TransportError:
            return 0

    def children(self, name: str) -> list[psutil.Process]:
        """Child processes whose command contains `name`."""
        try:
            return [child for child in psutil.Process(self.pid).children(recursive=True) if name in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def kill(self) -> None:
        """kill -9, of the service alone."""
        assert self._process is not None
        self._process.kill()
        self._await_end(10)

    def terminate(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._await_end(STOP_SECONDS)

    def _await_end(self, seconds: float) -> None:
        if isinstance(self._process, subprocess.Popen):
            self._process.wait(seconds)
        else:
            assert self._process is not None
            assert self._process.wait(seconds), f"the service has not ended after {seconds} s:\n{self.log.read_text()[-3000:]}"
