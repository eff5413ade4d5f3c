"""A real Alertmanager for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.servers import free_port
from tests import local
from tests.needs import program
from tests.programs import Program

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
"""Notifies `url` at once."""


class Alertmanager(Program):
    """It forgets the alerts when it is killed."""

    def __init__(self, folder: Path, config: str) -> None:
        super().__init__(folder)
        self._config = config
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.address}"

    def _command(self) -> Sequence[str]:
        config = self.folder / "am.yml"
        config.write_text(self._config)
        listen = [f"--web.listen-address={self.address}", "--cluster.listen-address="]
        files = [f"--config.file={config}", f"--storage.path={self.folder / 'data'}"]
        return [program("prometheus-alertmanager", "prometheus-alertmanager"), *files, *listen]

    def alerts(self) -> list[dict[str, Any]]:
        """Those that fire."""
        found: list[dict[str, Any]] = local.get(f"{self.url}/api/v2/alerts", timeout=30).raise_for_status().json()
        return found

    def _answers(self) -> bool:
        try:
            return local.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
