"""A real HTTP server that keeps what is posted to it, in a thread of its own."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

FAILING = 0.2


@dataclass(frozen=True)
class Posted:
    headers: dict[str, str]
    body: bytes
    at: float
    refused: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """Answers 204, but the first requests by `answers`: their statuses, and a Retry-After where there is one; and a share with 503."""

    def __init__(self, *answers: int, retry_after: str | None = None, failing: random.Random | None = None, port: int = 0) -> None:
        """`failing` draws the share, a fifth; None = none fail so."""
        self.posted: list[Posted] = []
        self._answers, self._retry_after = list(answers), retry_after
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver._answers.pop(0) if receiver._answers else 204
                if failing is not None and failing.random() < FAILING:
                    status = 503
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.posted.append(Posted(headers, body, time.monotonic(), refused=status != 204))
                self.send_response(status)
                if receiver._retry_after is not None and status != 204:
                    self.send_header("retry-after", receiver._retry_after)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def wait(self, true: Callable[[list[Posted]], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true(self.posted):
            assert time.monotonic() < deadline, [posted.body[:300] for posted in self.posted]
            time.sleep(0.05)
