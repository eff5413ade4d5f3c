"""The console's addresses. The page itself is files that Vite built into dist/; where they are missing, table.py stands in.

GET /                       the page                    GET /v1/live               server-sent events, see live.py
GET /assets/…               its files                   GET /v1/live/{stream_id}
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import math
import mimetypes
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.asking import ALPHA_RANGE, LARGEST_ALPHA, SMALLEST_ALPHA
from service.backtest import TAIL
from service.console import table
from service.console.attended import Attended
from service.console.live import STATES, Events, FleetQuery, Live
from service.console.over import Over
from service.console.recent import Recent, Room
from service.console.shared import Shared
from service.console.trial import Trial, TrialLimits, Trials
from service.detector import Detector
from service.errors import ArtifactError, BadParameter, OnsetError, TooLarge, TooSlow, UnknownModel, UnsupportedMedia
from service.events import MAX_NAME_LENGTH, TENANT_HEADER, shown
from service.feed import Feed
from service.metrics import Metrics
from service.policy import Policy
from service.problems import problem_of, respond
from service.stores.live import LiveLog
from service.tasks import Together

CSV, JSON = "text/csv", "application/json"
BODY_SECONDS = 60.0
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


@dataclass(frozen=True)
class ConsoleLimits:
    """Memory for the recent events of all models together, events kept of a stream, pages that watch at once, and uploads."""

    most_bytes: int
    depth: int
    most_watchers: int
    trial: TrialLimits


class Console:
    """The page of one process, fed with what it scores."""

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        default_model: str,
        models: Path,
        policy_of: Callable[[str], Policy],
        limits: ConsoleLimits,
        metrics: Metrics,
    ) -> None:
        """`models` is where the detectors were loaded from, `policy_of` gives the policy in force for one of them."""
        room = Room(limits.most_bytes, detectors)
        recent = {name: Recent(detector.manifest, room, limits.depth) for name, detector in detectors.items()}
        replica = f"{socket.gethostname()}:{os.getpid()}"
        self.log = LiveLog()
        self.shared = Shared(recent, replica, self.log, metrics)
        self.live = Live(recent, limits.most_watchers, replica, metrics, self.shared)
        self.over = Over(recent, metrics, self.live.news)
        self.attended = Attended(recent, metrics, self.shared.watches, self.live.news)
        self.trials = Trials(limits.trial)
        self._detectors = detectors
        self._models = models
        self._policy_of = policy_of
        self._default = default_model
        self._testing, self._counting = asyncio.Lock(), asyncio.Lock()
        self._tested = {name: Together(functools.partial(self._test, name)) for name in detectors}
        self._counted = {name: Together(functools.partial(self._count, name)) for name in detectors}

    def watch(self, feed: Feed) -> Callable[[], None]:
        """Take in what is scored from now on; returns what ends that."""
        return feed.watch(self.live.take)

    def routes(self) -> list[BaseRoute]:
        """To be registered before routes of the same beginning."""
        return [
            Route("/", self.page, methods=["GET"], include_in_schema=False),
            Route("/table", self.table, methods=["GET"], include_in_schema=False),
            Route("/table.css", self.table_style, methods=["GET"], include_in_schema=False),
            Route("/assets/{name}", self.asset, methods=["GET"], include_in_schema=False),
            Route("/v1/live", _Problems(self.fleet), methods=["GET"], include_in_schema=False),
            Route("/v1/live/{stream_id:path}", _Problems(self.stream), methods=["GET"], include_in_schema=False),
            Route("/v1/backtest", _Problems(self.backtest), methods=["POST"], include_in_schema=False),
            Route("/v1/models/{model}/calibration", _Problems(self.calibration), methods=["GET"], include_in_schema=False),
            Route("/v1/models/{model}/self-test", _Problems(self.self_test), methods=["POST"], include_in_schema=False),
        ]

    async def page(self, request: Request) -> Response:
        """The built page, or in its place the table."""
        if _built():
            return FileResponse(DIST / "index.html", headers=HEADERS | {"cache-control": "no-cache"})
        return await self.table(request)

    async def asset(self, request: Request) -> Response:
        """One of the page's files, as they are now: the page may be built anew meanwhile."""
        file = next((file for file in (DIST / "assets").glob("*") if file.name == request.path_params["name"] and file.is_file()), None)
        if file is None:
            raise HTTPException(404)
        headers = {"cache-control": _FOR_EVER, "x-content-type-options": "nosniff", "vary": "Accept-Encoding"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return FileResponse(file, headers=headers)
        content = await asyncio.to_thread(_packed, file, file.stat().st_mtime_ns)
        return Response(content, media_type=mimetypes.guess_type(file.name)[0], headers=headers | {"content-encoding": "gzip"})

    async def table(self, request: Request) -> Response:
        """The streams without a script."""
        self.shared.glance()
        content = table.page(list(self.live.recent.values()), self.live.replica, alone=not _built())
        return HTMLResponse(content, headers=HEADERS | {"cache-control": "no-store"})

    async def table_style(self, request: Request) -> Response:
        headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
        return FileResponse(Path(__file__).parent / "table.css", headers=headers)

    async def fleet(self, request: Request) -> Events:
        """The streams of all replicas, as they are scored."""
        query = request.query_params
        limit, state = query.get("limit", str(DEFAULT_SHOWN)), query.get("state", "")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= MOST_SHOWN):
            raise BadParameter(f"limit is {limit[:64]!r}; it is a whole number from 1 to {MOST_SHOWN}.", "limit", shown(limit))
        if state and state not in STATES:
            raise BadParameter(f"state is {state[:64]!r}; it is one of {', '.join(STATES)}.", "state", shown(state))
        holds = query.get("q", "")
        if len(holds) > MAX_NAME_LENGTH:
            raise BadParameter(f"q has {len(holds)} characters, names have {MAX_NAME_LENGTH} at most.", "q", shown(holds))
        return self.live.fleet(self._model(request), FleetQuery(int(limit), holds, STATES.get(state, 0)), _who(request))

    async def stream(self, request: Request) -> Events:
        """Every event of one stream."""
        stream_id = request.path_params["stream_id"]
        if not 0 < len(stream_id) <= MAX_NAME_LENGTH:
            raise BadParameter(
                f"A stream id has 1 to {MAX_NAME_LENGTH} characters, this one {len(stream_id)}.", "stream_id", shown(stream_id)
            )
        return self.live.stream(self._model(request), stream_id, request.query_params.getlist("feature"), _who(request))

    async def backtest(self, request: Request) -> Response:
        """An uploaded CSV, scored as the service would have scored it."""
        model = self._model(request)
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != CSV:
            raise UnsupportedMedia(f"Content-Type '{media[:64]}' is not read here; send {CSV}.")
        if self._detectors[model].manifest.lines is not None:
            raise BadParameter(f"Model '{model}' takes log lines: a CSV of numbers is nothing to it.", "model")
        query, policy = request.query_params, self._policy_of(model)
        strict, name = query.get("strict", str(policy.strict).lower()), query.get("name", "upload.csv")
        if strict not in ("true", "false"):
            raise BadParameter(f"strict is {strict[:64]!r}; it is true or false.", "strict", shown(strict))
        if not 0 < len(name) <= MAX_NAME_LENGTH:
            raise BadParameter(f"name has {len(name)} characters; it has 1 to {MAX_NAME_LENGTH}.", "name", shown(name))
        alpha = _alpha(query["alpha"]) if "alpha" in query else policy.alpha
        trial = Trial(name, str(self._models), model, alpha, strict == "true", query.get("timestamp"))
        return Response(await self.trials.run(trial, lambda: self._body(request)), media_type=JSON)

    async def calibration(self, request: Request) -> Response:
        """How often small p-values came, of the events held here."""
        return Response(await self._counted[self._model(request)].get(), media_type=JSON)

    async def _count(self, model: str) -> bytes:
        """One at a time: it takes memory to look at all of them."""
        async with self._counting:
            tail = await asyncio.to_thread(self.live.recent[model].tail, TAIL)
        levels = [{"p": level, "events": count} for level, count in zip(TAIL, tail.rarer, strict=True)]
        body = {"events": tail.events, "judged": tail.judged, "onsets": tail.onsets, "tail": levels, "replica": self.live.replica}
        return msgspec.json.encode(body)

    async def self_test(self, request: Request) -> Response:
        """The file's own vectors, run again on this machine as it is now."""
        return Response(await self._tested[self._model(request)].get(), media_type=JSON)

    async def _test(self, model: str) -> bytes:
        """One at a time."""
        detector = self._detectors[model]
        async with self._testing:
            began = time.perf_counter()
            try:
                vectors = await asyncio.to_thread(detector.retest)
            except ArtifactError as error:
                body: dict[str, Any] = {"passed": False, "detail": error.detail}
            else:
                steps, rows, _ = vectors.x.shape
                body = {"passed": True, "steps": steps, "rows": rows, "milliseconds": round(1000 * (time.perf_counter() - began), 1)}
        return msgspec.json.encode(body | {"sha256": detector.sha256, "provider": detector.providers[0]})

    async def _body(self, request: Request) -> bytes:
        """Raises TooLarge, TooSlow."""
        parts, size, most = [], 0, self.trials.limits.max_bytes
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise TooLarge(f"The file is over {most:,} bytes (ONSET_BACKTEST_BYTES).")
                    parts.append(part)
        except TimeoutError as error:
            raise TooSlow(f"The file did not arrive within {BODY_SECONDS:g} s.") from error
        return b"".join(parts)

    def _model(self, request: Request) -> str:
        name = request.path_params.get("model") or request.query_params.get("model") or self._default
        if name not in self.live.recent:
            raise UnknownModel(f"No model '{name[:64]}' is loaded; there is {', '.join(sorted(self.live.recent))}.")
        return name


class _Problems:
    """An ASGI app of what makes an answer; errors of ours become problem details."""

    def __init__(self, handler: Callable[[Request], Awaitable[ASGIApp]]) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._handler(Request(scope, receive))
        except ClientDisconnect:
            return
        except OnsetError as error:
            answer = respond(problem_of(error))
        await answer(scope, receive, send)


def _who(request: Request) -> str:
    """Who asks: the tenant that is named, or else the address, as senders take turns."""
    tenant = request.headers.get(TENANT_HEADER)
    return f"tenant {tenant}" if tenant is not None else request.client.host if request.client else ""


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not SMALLEST_ALPHA <= alpha < LARGEST_ALPHA:
        raise BadParameter(f"alpha is {text[:64]!r}; it is a number {ALPHA_RANGE}.", "alpha", shown(text))
    return alpha


@functools.lru_cache(maxsize=8)
def _packed(file: Path, written: int) -> bytes:
    """A third of it, for slow links; `written` is when it was."""
    return gzip.compress(file.read_bytes(), mtime=0)


def _built() -> bool:
    return (DIST / "index.html").is_file()
