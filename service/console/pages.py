"""The console's addresses. The page itself is files that Vite built into dist/; where they are missing, table.py stands in.

GET /                       the page                    GET /v1/live               server-sent events, see live.py
GET /assets/…               its files                   GET /v1/live/{stream_id}
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.artifact import Manifest
from service.console import table
from service.console.live import STATES, Events, FleetQuery, Live
from service.console.recent import Recent
from service.errors import BadParameter, OnsetError, UnknownModel
from service.events import MAX_NAME_LENGTH
from service.feed import Feed
from service.metrics import Metrics
from service.problems import problem_of, respond

DIST = Path(__file__).parent / "dist"
"""Where `make console` puts the built page."""
DEFAULT_SHOWN, MOST_SHOWN = 200, 500
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
"""Nothing inline, nothing from elsewhere."""
_FOR_EVER = "public, max-age=31536000, immutable"
"""Names of built files hold their hash."""


class Console:
    """The page of one process, fed with what it scores."""

    def __init__(
        self, manifests: Mapping[str, Manifest], default_model: str, most_bytes: int, depth: int, most_watchers: int, metrics: Metrics
    ) -> None:
        """`most_bytes` of memory for the recent events of all models together, `depth` events for each stream."""
        share = most_bytes // len(manifests)
        recent = {name: Recent(manifest, share, depth) for name, manifest in manifests.items()}
        self.live = Live(recent, most_watchers, f"{socket.gethostname()}:{os.getpid()}", metrics)
        self._default = default_model
        self._built = (DIST / "index.html").is_file()

    def watch(self, feed: Feed) -> Callable[[], None]:
        """Take in what is scored from now on; returns what ends that."""
        return feed.watch(self.live.take)

    def routes(self) -> list[BaseRoute]:
        """To be registered before routes of the same beginning."""
        return [
            Route("/", self.page, methods=["GET"], include_in_schema=False),
            Route("/table", self.table, methods=["GET"], include_in_schema=False),
            Route("/table.css", _file(Path(__file__).parent / "table.css", "no-cache"), methods=["GET"], include_in_schema=False),
            *(Route(f"/assets/{file.name}", _file(file, _FOR_EVER), methods=["GET"], include_in_schema=False) for file in _built_files()),
            Route("/v1/live", _Problems(self.fleet), methods=["GET"], include_in_schema=False),
            Route("/v1/live/{stream_id:path}", _Problems(self.stream), methods=["GET"], include_in_schema=False),
        ]

    async def page(self, request: Request) -> Response:
        """The built page, or in its place the table."""
        if self._built:
            return FileResponse(DIST / "index.html", headers=HEADERS | {"cache-control": "no-cache"})
        return await self.table(request)

    async def table(self, request: Request) -> Response:
        """The streams without a script."""
        content = table.page(list(self.live.recent.values()), self.live.replica, alone=not self._built)
        return HTMLResponse(content, headers=HEADERS | {"cache-control": "no-store"})

    def fleet(self, request: Request) -> Events:
        """The streams of this replica, as they are scored."""
        query = request.query_params
        limit, state = query.get("limit", str(DEFAULT_SHOWN)), query.get("state", "")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= MOST_SHOWN):
            raise BadParameter(f"limit is {limit[:64]!r}; it is a whole number from 1 to {MOST_SHOWN}.", "limit")
        if state and state not in STATES:
            raise BadParameter(f"state is {state[:64]!r}; it is one of {', '.join(STATES)}.", "state")
        holds = query.get("q", "")
        if len(holds) > MAX_NAME_LENGTH:
            raise BadParameter(f"q has {len(holds)} characters, names have {MAX_NAME_LENGTH} at most.", "q")
        return self.live.fleet(self._model(request), FleetQuery(int(limit), holds, STATES.get(state, 0)))

    def stream(self, request: Request) -> Events:
        """Every event of one stream."""
        stream_id = request.path_params["stream_id"]
        if not 0 < len(stream_id) <= MAX_NAME_LENGTH:
            raise BadParameter(f"A stream id has 1 to {MAX_NAME_LENGTH} characters, this one {len(stream_id)}.", "stream_id")
        return self.live.stream(self._model(request), stream_id, request.query_params.getlist("feature"))

    def _model(self, request: Request) -> str:
        name = request.query_params.get("model") or self._default
        if name not in self.live.recent:
            raise UnknownModel(f"No model '{name[:64]}' is loaded; there is {', '.join(sorted(self.live.recent))}.")
        return name


class _Problems:
    """An ASGI app of what makes an answer; errors of ours become problem details."""

    def __init__(self, handler: Callable[[Request], ASGIApp]) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = self._handler(Request(scope, receive))
        except OnsetError as error:
            answer = respond(problem_of(error))
        await answer(scope, receive, send)


def _built_files() -> list[Path]:
    return sorted(file for file in (DIST / "assets").glob("*") if file.is_file())


def _file(path: Path, caching: str) -> Callable[[Request], Response]:
    def file(request: Request) -> Response:
        return FileResponse(path, headers={"cache-control": caching, "x-content-type-options": "nosniff"})

    return file
