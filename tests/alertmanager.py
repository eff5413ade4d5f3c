"""A real Alertmanager that notifies a receiver at once."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bench.servers import free_port
from tests import local
from tests.needs import program

CONFIG = """
route:
  receiver: hook
  group_by: [alertname, stream, severity]
  group_wait: 0s
  group_interval: 1s
  repeat_interval: 1h
receivers:
  - name: hook
    webhook_configs:
      - url: {url}
        send_resolved: true
"""


class Alertmanager:
    """Started on entering. `kill` and `start` again keep the port and forget the alerts, as it does."""

    def __init__(self, folder: Path, hook: str) -> None:
        """`hook` = where it notifies."""
        self._program = program("prometheus-alertmanager", "prometheus-alertmanager")
        self._folder, self._hook, self._port = folder, hook, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Alertmanager:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "am.yml").write_text(CONFIG.format(url=self._hook))
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        listen = [f"--web.listen-address=127.0.0.1:{self._port}", "--cluster.listen-address="]
        files = [f"--config.file={self._folder / 'am.yml'}", f"--storage.path={self._folder / 'data'}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *files, *listen], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._ready():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def alerts(self) -> list[dict[str, Any]]:
        """Those that fire."""
        found: list[dict[str, Any]] = local.get(f"{self.url}/api/v2/alerts", timeout=30).raise_for_status().json()
        return found

    def _ready(self) -> bool:
        try:
            return local.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
