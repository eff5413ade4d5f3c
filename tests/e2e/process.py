"""A real `python -m service serve` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from tests import local
from tests.servers import free_port

START_SECONDS = 60


class Service:
    """Started on entering, terminated on leaving. `kill` and `start` again keep port and data folder."""

    def __init__(self, data_dir: Path, *, model: Path | None = None, wait: bool = True, **environment: str) -> None:
        """`environment` holds settings without their ONSET_ prefix; `wait` = until it is ready."""
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = ["--port", str(self.port), "--data-dir", str(data_dir), *(["--model", str(model)] if model else [])]
        self._environment = environment
        self._wait = wait
        self.source: Path | None = None  # where another copy of the package lies
        self._process: subprocess.Popen[bytes] | None = None
        self.log = data_dir.parent / "service.log"

    def __enter__(self) -> Service:
        try:
            self.start()
        except BaseException:  # it would outlive the tests
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self.terminate()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", *self._arguments],
                env=os.environ | {f"ONSET_{name}": value for name, value in self._environment.items()},
                cwd=self.source,
                stdout=log,
                stderr=log,
            )
        if self._wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            assert self.returncode is None, f"the service ended with {self.returncode}:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready after {seconds} s:\n{self.log.read_text()[-3000:]}"
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
        self._process.wait(10)

    def terminate(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)
