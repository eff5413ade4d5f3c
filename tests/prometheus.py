"""A real Prometheus for tests, and a target for it to scrape."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bench.servers import free_port
from tests import local
from tests.needs import program
from tests.programs import Program


class Prometheus(Program):
    """Debian's prometheus with its data in `folder`; it takes remote-write, too."""

    def __init__(self, folder: Path, config: str, port: int | None = None) -> None:
        super().__init__(folder)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._config = config

    def _command(self) -> Sequence[str]:
        (self.folder / "prometheus.yml").write_text(self._config)
        return [
            program("prometheus", "prometheus"),
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--web.enable-remote-write-receiver",
        ]

    def query(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series of an instant query."""
        answer: dict[str, Any] = local.get(f"{self.url}/api/v1/query", params={"query": promql}, timeout=10).json()
        assert answer["status"] == "success", answer
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def shown(self, promql: str) -> str:
        """The query and its answer, as docs/prometheus.md has them."""
        answers = []
        for labels, value in self.query(promql):
            name, about = labels.pop("__name__", ""), ", ".join(f'{label}="{labels[label]}"' for label in sorted(labels))
            answers.append(f"  {name}{{{about}}}  {value:.4g}")
        return "\n".join([promql, *answers])

    def until(self, true: Callable[[], Any], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.runs, self.log
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return local.get(f"{self.url}/-/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False


class Target:
    """Something to scrape: `metrics()` in the text format at /metrics."""

    def __init__(self, metrics: Callable[[], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = metrics().encode()
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a scrape that was given up
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Target:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
