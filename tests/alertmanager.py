"""A real Alertmanager that notifies a receiver at once."""

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


class Alertmanager(Program):
    """It forgets the alerts when it is killed."""

    def __init__(self, folder: Path, hook: str) -> None:
        """`hook` = where it notifies."""
        super().__init__(folder)
        self._hook, self._port = hook, free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def _command(self) -> Sequence[str]:
        config = self.folder / "am.yml"
        config.write_text(CONFIG.format(url=self._hook))
        listen = [f"--web.listen-address=127.0.0.1:{self._port}", "--cluster.listen-address="]
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
