"""The HTTP door: a request → events → `scorer.score` → a reply. Nothing below knows HTTP.

    POST   /v1/events                      events in JSON, NDJSON, msgpack or Arrow; the reply has the same shape
    POST   /v1/streams/{stream_id}/events  the same for one stream
    POST   /v1/streams/{stream_id}/accept  what the stream is alerted about is its new normal
    GET    /v1/streams                     last results, page by page
    GET    /v1/streams/{stream_id}         last result          DELETE  forget the stream
    GET    /v1/alerts                      alerts, page by page
    GET    /v1/alerts/count                how many there are
    POST   /v1/alerts/acknowledge          someone looks after several
    POST   /v1/alerts/accept               what several are about is their streams' new normal
    GET    /v1/alerts/{id}                 one of them
    GET    /v1/mutes                       whose alerts nobody is told of for a while
    PUT    /v1/mutes/{name}                say so, or change it           DELETE  end it
    POST   /v1/alerts/{id}/acknowledge     someone looks after it         DELETE  nobody does any more
    GET    /v1/patterns                    lines that a log model had no template for (patterns.py)
    GET    /v1/models                      manifests of the loaded detectors
    GET    /v1/policy                      the asked false-alarm rate, and what it means      PUT  change it      DELETE  undo that
    GET    /v1/log-level                   of this replica's log                 PUT  change it      DELETE  undo that
    GET    /health/live  /health/ready  /metrics  /docs

The routes of events and streams are plain Starlette routes, and events are answered before FastAPI's middleware and its router see them,
as ASGI brings them: these would take longer than scoring one (bench.http). A plain request of one event does without ASGI, too: see
`Door.begin`. Their part of the OpenAPI document is in openapi.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar, get_args
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec
import numpy as np
import structlog
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from service import alerts, arrow, lessons, mutes, tracing
from service.alerts import Acknowledgement, Alert
from service.bodies import Format, Items, decode, decode_object, decode_one, encode
from service.control import Control
from service.errors import (
    AlertResolved,
    BadBody,
    BadEvent,
    BadParameter,
    CrossSite,
    ItemError,
    NotCommitted,
    OnsetError,
    Overloaded,
    StoreUnavailable,
    TooLarge,
    TooSlow,
    Unfinished,
    UnknownAlert,
    UnknownModel,
    UnknownMute,
    UnknownSource,
    UnsupportedMedia,
    no_memory,
)
from service.events import MAX_NAME_LENGTH, SEVERITIES, TENANT_HEADER, UNPRINTABLE, Columns, Event, Result, shown
from service.intake import DoorLimits, Incoming, Intake
from service.logs import Level
from service.metrics import Metrics
from service.problems import TABLE, late_problem, plain, problem_of, respond
from service.results import TOP, Answers, Scored
from service.rounds import Kind
from service.scorer import Scorer
from service.stores import CURSOR_DIGITS
from service.stores.book import SCANNED, Became, Book, Wanted
from service.tasks import Together
from service.writing import Answered

DOOR = "http"
JSON = Format.JSON.value
MEDIA = {
    **{form.value: form for form in Format},
    "text/json": Format.JSON,
    "application/ndjson": Format.NDJSON,
    "application/jsonl": Format.NDJSON,
    "application/x-msgpack": Format.MSGPACK,
    "application/vnd.msgpack": Format.MSGPACK,
}
"""What each media type is read as, and asked for in Accept."""
_MEDIA_BYTES = {form: form.value.encode() for form in Format}
EVENTS = "/v1/events"
_STREAM_EVENTS = re.compile("/v1/streams/(.*)/events")
MAX_TOP = 300
FEATURE_BYTES = 100
"""Of an event's reply, for each feature beyond the first: expected value and bounds. A wide model's replies are larger than its bodies."""
MAX_PAGE = 1000
MAX_NOTE = 2000
ALERT_FILTERS = ("status", "severity", "kind", "model", "stream_id", "q", "muted")
_TENANT = TENANT_HEADER.lower().encode()
OUTCOMES = ("scored", "duplicate", "late", "rejected", "failed")

_OF_KIND = {int(Kind.SCORED): "scored", int(Kind.DUPLICATE): "duplicate", int(Kind.REPEATED): "duplicate", int(Kind.LATE): "late"}
_NOT_PLAIN = frozenset(
    (b"content-encoding", b"idempotency-key", b"origin", b"sec-fetch-site", b"x-forwarded-for", b"x-forwarded-proto", b"x-request-id")
)
"""Headers that mean something, here or to uvicorn, and that most clients do not send to the service itself."""

VISIBLE = f"^[!-~]{{1,{MAX_NAME_LENGTH}}}$"
_VISIBLE = re.compile(VISIBLE)
_ALERT_ID = re.compile(alerts.ID)
_READING = ("GET", "HEAD", "OPTIONS")
_OF_PAGES = (b"sec-fetch-site", b"origin", b"host", b"x-forwarded-host")
_ANOTHER_SITE = (
    "A browser sends this for a page of '{}', which is not this service's. Where a proxy changes the Host header, let it pass it on as it "
    "came, or set ONSET_PUBLIC_URL to where people reach the service."
)
_ANOTHER_NAME = "It is asked for as '{}' (its Host), which is none of the service's names: add it to ONSET_ALLOWED_HOSTS if it is one."
_UNPRINTABLE, _SURROGATE = re.compile(UNPRINTABLE), re.compile(r"[\ud800-\udfff]")
_MALFORMED = (BadBody, BadParameter, UnknownModel, UnknownSource, UnsupportedMedia)
_STOPPED = NotCommitted("The service stopped before this was answered: send it again.")
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")

log = structlog.get_logger(__name__)

Word = TypeVar("Word", bound=str)
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Sent:
    """A request of another module's route: its body as it came, who scores it and whose turn it takes."""

    content: bytes
    scorer: Scorer
    sender: str


class Health(Protocol):
    """What the probes ask."""

    async def live(self) -> str | None:
        """None, or what is wrong."""

    async def ready(self) -> str | None: ...


class Application(FastAPI):
    """Lets its door answer events first."""

    door: Door | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await tracing.request(self._answer, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if "\ufffd" in path and not _is_utf8(scope["raw_path"]):  # else all names that only differ there would be one stream
            shown = scope["raw_path"][:256].decode("latin-1")
            return await respond(problem_of(BadParameter("The address is not UTF-8.", "path", shown)))(scope, receive, send)
        if self.door is not None and self.door.hosts and (host := _strange_host(scope["headers"], self.door.hosts)):
            return await respond(problem_of(CrossSite(_ANOTHER_NAME.format(host[:256]))))(scope, receive, send)
        if scope["method"] not in _READING and (page := _stranger(scope["headers"], self.door.origin if self.door else None)):
            return await respond(problem_of(CrossSite(_ANOTHER_SITE.format(page[:256]))))(scope, receive, send)
        if self.door is not None and scope["method"] == "POST":
            if path == EVENTS:
                return await self.door.answer(scope, receive, send)
            if path.endswith("/events") and (found := _STREAM_EVENTS.fullmatch(path)):
                return await self.door.answer(scope, receive, send, found[1])
        return await self._route(scope, receive, send)

    def begin(self, scope: Scope, content: bytearray, answered: Answered) -> bool:
        """As `Door.begin`; not where the name that is asked for matters, nor where traces are sent, which have a span for each request."""
        return (
            self.door is not None
            and not self.door.hosts
            and not tracing.on()
            and tracing.numbered(self.door.begin, scope, content, answered)
        )

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await super().__call__(scope, receive, sending)
        except asyncio.CancelledError:  # see Door.answer
            if not begun:
                await respond(problem_of(_STOPPED))(scope, receive, send)


class Door:
    """All routes over some scorers, by model name."""

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        default_model: str,
        limits: DoorLimits,
        metrics: Metrics,
        health: Health,
        control: Control,
        book: Book | None = None,
        public_url: str = "",
        level: Level | None = None,
        allowed_hosts: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`book` of alerts; `public_url` under which people reach the service, "" = not known; `allowed_hosts` as the setting; `clock`
        gives seconds since 1970.
        """
        self._scorers = scorers
        self._default = default_model
        self._limits = limits
        self._metrics = metrics
        self._health = health
        self._control = control
        self._intake = Intake(limits, metrics)
        self._book = book or Book()
        self._clock = clock
        self._public_url = public_url
        self.origin = _origin(public_url)
        self.hosts = _hosts(allowed_hosts, public_url)
        self._level = level or Level("info")
        self._exposition = Together(self._exposed)
        self._latency = metrics.latency.labels(DOOR)
        self._events = {outcome: metrics.events.labels(DOOR, outcome) for outcome in OUTCOMES}

    def add_to(self, app: Application) -> None:
        """Register the routes; the most specific first."""
        app.door = self
        app.router.routes += [
            Route(EVENTS, self._guarded(self.post_events, scores=True), methods=["POST"], name="post_events"),
            Route(
                "/v1/streams/{stream_id:path}/events",
                self._guarded(self.post_events, scores=True),
                methods=["POST"],
                name="post_stream_events",
            ),
            Route("/v1/streams/{stream_id:path}/accept", self._guarded(self.post_accept), methods=["POST"], name="post_accept"),
            Route("/v1/streams", self._guarded(self.list_streams), methods=["GET"], name="list_streams"),
            Route("/v1/streams/{stream_id:path}", self._guarded(self.one_stream), methods=["GET", "DELETE"], name="one_stream"),
            Route("/v1/alerts", self._guarded(self.list_alerts), methods=["GET"], name="list_alerts"),
            Route("/v1/alerts/count", self._guarded(self.count_alerts), methods=["GET"], name="count_alerts"),
            Route("/v1/alerts/acknowledge", self._guarded(self.acknowledge_several), methods=["POST"], name="acknowledge_several"),
            Route("/v1/alerts/accept", self._guarded(self.accept_several), methods=["POST"], name="accept_several"),
            Route("/v1/alerts/{alert_id}", self._guarded(self.one_alert), methods=["GET"], name="one_alert"),
            Route("/v1/alerts/{alert_id}/acknowledge", self._guarded(self.acknowledge), methods=["POST", "DELETE"], name="acknowledge"),
            Route("/v1/mutes", self._guarded(self.list_mutes), methods=["GET"], name="list_mutes"),
            Route("/v1/mutes/{name}", self._guarded(self.mute), methods=["PUT", "DELETE"], name="mute"),
            Route("/v1/log-level", self._guarded(self.log_level), methods=["GET", "PUT", "DELETE"], name="log_level"),
            Route("/v1/policy", self._guarded(self.policy), methods=["GET", "PUT", "DELETE"], name="policy"),
            Route("/metrics", self.get_metrics, methods=["GET"], name="metrics"),
        ]
        app.get("/v1/models", name="list_models")(self.list_models)
        app.get("/health/live", name="live")(self.get_live)
        app.get("/health/ready", name="ready")(self.get_ready)
        app.add_exception_handler(HTTPException, _http_problem)  # type: ignore[arg-type]
        app.add_exception_handler(Exception, self._unexpected)

    async def answer(self, scope: Scope, receive: Receive, send: Send, stream_id: str | None = None) -> None:
        """Score one event, or many; of the stream in the path, where it names one."""
        try:
            replied, media = await self._score(Incoming(scope, receive), stream_id)
        except asyncio.CancelledError:  # the server's, once the time to stop is over; it would answer 500
            replied, media = self._failed(scope["path"], _STOPPED), b""
        except Exception as error:
            self.refuse(error)
            replied, media = self._failed(scope["path"], error), b""
        if isinstance(replied, Response):
            await replied(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _headers(replied, media)})
        await send({"type": "http.response.body", "body": replied})

    def begin(self, scope: Scope, content: bytearray, answered: Answered) -> bool:
        """Score the event of a request that is all there, and as plain as most of a single event are, without ASGI.

        False = it is not plain, or not right: nothing was done, and it is `answer`'s.
        """
        started, request = time.perf_counter(), Incoming(scope, _no_more)
        plain = self._plain(request, content)
        if plain is None:
            return False
        scorer, event = plain
        try:
            self._intake.here(request, len(content) + _wide(scorer))
            with self._answering(1):
                future = scorer.begin(event, request.sender)
        except Exception as error:
            self._intake.release(request)
            _give(self._failed(EVENTS, error), answered)
            return True
        if future is None:
            self._intake.release(request)
            return False
        future.add_done_callback(partial(self._begun, request, scorer, event, started, answered))
        return True

    def _plain(self, request: Incoming, content: bytearray) -> tuple[Scorer, Event] | None:
        """Who scores it, and the event."""
        path, method = request.scope["path"], request.scope["method"]
        if path != EVENTS or method != "POST" or len(content) > self._limits.max_body_bytes or not request.names.isdisjoint(_NOT_PLAIN):
            return None
        try:
            only(request, "model")
            form = _format(request)
            if form is not Format.JSON or _accepted(request, form) is not form:
                return None
            scorer, request.sender = self._scorer(request), _sender(request)
        except OnsetError:
            return None
        event = decode_one(bytes(content), form)
        return None if event is None else (scorer, event)

    def _begun(
        self, request: Incoming, scorer: Scorer, event: Event, started: float, answered: Answered, future: asyncio.Future[Answers]
    ) -> None:
        """An event that was begun is scored, or not."""
        self._intake.release(request)
        try:
            with self._answering(1):
                answers = future.result()
            answer = scorer.answer(event, answers)
            self._events[_outcome(answer) if isinstance(answer, ItemError) else _OF_KIND[answers.kinds[0]]].inc()
            replied = answer if isinstance(answer, bytes) else _unscored(answer, event)
        except Exception as error:
            _give(self._failed(EVENTS, error), answered)
        else:
            self._latency.observe(time.perf_counter() - started)
            _give(replied, answered)

    async def post_events(self, request: Request) -> Response:
        """The same by way of the router."""
        replied, media = await self._score(_incoming(request), request.path_params.get("stream_id"))
        return replied if isinstance(replied, Response) else Response(replied, media_type=media.decode())

    async def list_streams(self, request: Request) -> Response:
        """A page of streams with their last results."""
        asked = _incoming(request)
        only(asked, "model", "silent", "limit", "cursor")
        scorer = self._scorer(asked)
        silent = asked.query("silent")
        if silent not in (None, "true", "false"):
            raise BadParameter(f"silent is {silent[:64]!r}; it is true or false.", "silent", shown(silent))
        if silent == "true":
            found = await scorer.streams.silent(_number(asked, "limit", 100, 1, MAX_PAGE))
            return _json({"streams": found, "next_cursor": None})
        cursor = asked.query("cursor") or ""
        if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) <= CURSOR_DIGITS):
            raise _no_cursor(cursor)
        results, following = await scorer.streams.page(cursor, _number(asked, "limit", 100, 1, MAX_PAGE))
        return _json({"streams": results, "next_cursor": following or None})

    async def one_stream(self, request: Request) -> Response:
        """The last result of a stream; or forget it."""
        asked = _incoming(request)
        only(asked, "model")
        scorer, stream_id = self._scorer(asked), request.path_params["stream_id"]
        if request.method != "DELETE":
            return _json(await scorer.streams.last(stream_id))
        if not await scorer.streams.forget(stream_id):
            await scorer.streams.last(stream_id)  # raises UnknownStream
        log.info("stream_forgotten", stream_id=stream_id, model=scorer.detector.name)
        return Response(status_code=204)

    async def post_accept(self, request: Request) -> Response:
        """Close a stream's alert and learn what it was about; its summary. Safe to repeat."""
        asked = _incoming(request)
        only(asked, "model")
        result = await self._scorer(asked).streams.accept(request.path_params["stream_id"])
        return _json(result)

    async def list_alerts(self, request: Request) -> Response:
        """A page of alerts, the latest first."""
        asked = _incoming(request)
        only(asked, *ALERT_FILTERS, "limit", "cursor")
        wanted = _wanted(asked)
        cursor = asked.query("cursor") or ""
        if cursor and not _ALERT_ID.fullmatch(cursor):
            raise _no_cursor(cursor)
        found, following = await self._book.page(wanted, cursor, _number(asked, "limit", 100, 1, MAX_PAGE))
        return _json(alerts.AlertPage([self._shown(alert) for alert in found], following or None))

    async def count_alerts(self, request: Request) -> Response:
        """How many alerts a list would have."""
        asked = _incoming(request)
        only(asked, *ALERT_FILTERS, "limit")
        counted, complete = await self._book.count(_wanted(asked), _number(asked, "limit", MAX_PAGE, 1, SCANNED))
        by_severity = {severity: counted[severity] for severity in SEVERITIES[1:]}
        return _json(alerts.AlertCount(counted.total(), by_severity, complete))

    async def acknowledge_several(self, request: Request) -> Response:
        """Someone looks after those of some alerts that nobody does yet; what became of each. Safe to repeat."""
        ids, by = _several(await self._object(_incoming(request)), self._clock())
        done = _done(await self._book.acknowledge_open(ids, by))
        if done.outcomes.get("acknowledged"):
            log.info("alerts_acknowledged", by=by.by, note=by.note, alerts=done.outcomes["acknowledged"])
        return _json(done)

    async def accept_several(self, request: Request) -> Response:
        """What some alerts are about is their streams' new normal; what became of each. Safe to repeat."""
        ids, by = _several(await self._object(_incoming(request)), self._clock())
        known = dict(zip(ids, await self._book.alerts(ids), strict=True))
        outcomes = await self._accept(known, by)
        done = _done({id_: Became(outcomes[id_], alert) for id_, alert in known.items()})
        if done.outcomes.get("accepted"):
            log.info("alerts_accepted", by=by.by, note=by.note, alerts=done.outcomes["accepted"])
        return _json(done)

    async def _accept(self, known: Mapping[str, Alert | None], by: Acknowledgement) -> dict[str, alerts.Outcome]:
        """Acknowledge and accept alerts, by id as the book has them, where that can be done here."""
        outcomes: dict[str, alerts.Outcome] = {}
        meant: dict[str, dict[str, str]] = {}
        past: dict[str, list[Alert]] = {}
        for id_, alert in known.items():
            if alert is not None and alert.model in self._scorers and lessons.teaches(alert):
                past.setdefault(alert.model, []).append(alert)
            elif alert is None or not alert.open:
                outcomes[id_] = "unknown" if alert is None else "resolved"
            elif alert.kind == "silence":
                outcomes[id_] = "silence"
            elif alert.model not in self._scorers:
                outcomes[id_] = "model_not_loaded"
            elif alert.stream_id in meant.setdefault(alert.model, {}):  # one of them is over, and the book does not know yet
                outcomes[id_] = "conflict"
            else:
                meant[alert.model][alert.stream_id] = id_
        for model, ids in meant.items():
            await self._book.acknowledge_open(list(ids.values()), by)
            became = await self._scorers[model].streams.accept_alerts(ids)
            outcomes |= {ids[stream_id]: outcome for stream_id, outcome in became.items()}
        for model, some in past.items():
            outcomes |= await self._scorers[model].streams.accept_past(some)
        if signed := [alert.id for some in past.values() for alert in some if outcomes[alert.id] == "accepted"]:
            await self._book.sign(signed, by)
        return outcomes

    async def one_alert(self, request: Request) -> Response:
        """One alert."""
        id_ = request.path_params["alert_id"]
        [alert] = await self._book.alerts([id_]) if _ALERT_ID.fullmatch(id_) else [None]
        return _json(self._shown(_known(id_, alert)))

    async def acknowledge(self, request: Request) -> Response:
        """Someone looks after an alert, or (DELETE) nobody does any more; the alert as it is then. Safe to repeat."""
        by = _acknowledgement(await self._object(_incoming(request)), self._clock()) if request.method == "POST" else None
        id_ = request.path_params["alert_id"]
        alert = _known(id_, await self._book.acknowledge(id_, by) if _ALERT_ID.fullmatch(id_) else None)
        if not alert.open:
            raise AlertResolved(f"Alert '{alert.id}' of stream '{alert.stream_id}' is resolved ({alert.resolution}).")
        return _json(self._shown(alert))

    async def list_mutes(self, request: Request) -> Response:
        """Whose alerts nobody is told of for a while."""
        now = self._clock()
        return _json(mutes.MuteList([mutes.MuteReply.of(mute, now) for mute in await self._book.mutes()]))

    async def mute(self, request: Request) -> Response:
        """Nobody is told of some streams' alerts from one time to another, or (DELETE) that is over. Safe to repeat."""
        name, now = request.path_params["name"], self._clock()
        if request.method == "DELETE":
            if not await self._book.unmute(name):
                raise UnknownMute(f"No mute '{name[:64]}' is known.")
            log.info("unmuted", mute=name)
            return Response(status_code=204)
        asked = mutes.asked(name, await self._object(_incoming(request)), now)
        mutes.check_room(asked, await self._book.mutes())
        await self._book.mute(asked)
        log.info("muted", mute=name, streams=asked.streams, model=asked.model, until=asked.ends_at, by=asked.by, note=asked.note)
        return _json(mutes.MuteReply.of(asked, now))

    def _shown(self, alert: Alert) -> alerts.AlertReply:
        return alerts.AlertReply.of(alert, self._public_url)

    async def policy(self, request: Request) -> Response:
        """The policy in force; changed by PUT, the environment's again by DELETE, on all replicas."""
        if request.method == "PUT":
            await self._control.change(await self._object(_incoming(request)))
        elif request.method == "DELETE":
            await self._control.reset()
        return _json(await self._control.reply())

    async def log_level(self, request: Request) -> Response:
        """The level of this replica's log; changed by PUT, for a while if it says so, the environment's again by DELETE."""
        if request.method == "PUT":
            self._level.change(await self._object(_incoming(request)))
        elif request.method == "DELETE":
            self._level.reset()
        return _json(self._level.reply())

    async def list_models(self) -> Response:
        """The manifests of the loaded detectors, with the hash of their files and where they run."""
        models = [
            {
                **scorer.detector.manifest.model_dump(mode="json"),
                "sha256": scorer.detector.sha256,
                "providers": scorer.detector.providers,
                "alpha": scorer.policy.alpha,
                "strict": scorer.policy.strict,
                "expected_false_alarms": scorer.policy.promise(scorer.detector.manifest.warmup),
                "default": name == self._default,
                "in_force": scorer.claim.wrong is None,
            }
            for name, scorer in self._scorers.items()
        ]
        return _json({"models": models})

    async def get_live(self) -> Response:
        """Whether the process should go on: its batch loops turn."""
        return _health(await self._health.live())

    async def get_ready(self) -> Response:
        """Whether events can be scored and committed now."""
        return _health(await self._health.ready())

    async def get_metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(await self._exposition.get(), media_type=CONTENT_TYPE_LATEST)

    async def _exposed(self) -> bytes:
        await self._health.ready()  # keeps its gauge true where no probe asks
        return await self._metrics.exposition()

    def add_post(self, app: FastAPI, path: str, handler: Callable[[Incoming], Awaitable[Response]], name: str) -> None:
        """Register a route of another module that scores what it is sent, with the same answers to errors."""

        async def handle(request: Request) -> Response:
            return await handler(_incoming(request))

        app.router.routes.append(Route(path, self._guarded(handle, scores=True), methods=["POST"], name=name))

    def add_get(self, app: FastAPI, path: str, handler: Callable[[str, int], Awaitable[msgspec.Struct]], name: str) -> None:
        """The same of a page that is asked for by `model` ("" = not named) and `limit`."""

        async def handle(request: Request) -> Response:
            asked = _incoming(request)
            return _json(await handler(asked.query("model") or "", _number(asked, "limit", 100, 1, MAX_PAGE)))

        app.router.routes.append(Route(path, self._guarded(handle), methods=["GET"], name=name))

    @asynccontextmanager
    async def sent(self, request: Incoming, unpacked: Callable[[bytes], int] | None, model: str = "") -> AsyncIterator[Sent]:
        """What such a route scores, which counts as in flight until the block ends: a packed body, see Intake.packed; None = a plain one.

        `model` is the one that scores where the request names none, "" = the default one. Raises as Intake does, but Unfinished for
        TooSlow, and UnknownModel, BadParameter.
        """
        scorer, sender = self._scorer(request, model), _sender(request)
        request.sender = sender
        try:
            content = await (self._intake.body(request) if unpacked is None else self._intake.packed(request, unpacked))
        except TooSlow as error:  # as a 408 it would be dropped
            raise Unfinished(error.detail) from error
        try:
            yield Sent(content, scorer, sender)
        except Overloaded:
            self._metrics.refused.labels("queue").inc()
            raise
        except TooLarge:  # more of them than a request may bring
            self._metrics.refused.labels("batch").inc()
            raise
        finally:
            self._intake.release(request)

    async def _score(self, request: Incoming, stream_id: str | None) -> tuple[bytes | Response, bytes]:
        """The reply's body and its media type; or a whole response, of a single event that is refused."""
        started = time.perf_counter()
        if stream_id is not None and not 0 < len(stream_id) <= MAX_NAME_LENGTH:
            raise BadParameter(
                f"A stream id has 1 to {MAX_NAME_LENGTH} characters, this one {len(stream_id)}.", "stream_id", shown(stream_id)
            )
        only(request, "model", "top_contributors")
        scorer = self._scorer(request)
        top = _number(request, "top_contributors", TOP, 0, MAX_TOP)
        form = _format(request)
        reply = _accepted(request, form)
        if form is Format.ARROW or reply is Format.ARROW:
            arrow.pyarrow()  # says what is missing before anything is scored
        request.sender = sender = _sender(request)
        content = await self._intake.body(request)
        try:
            address = _Address(stream_id, request.header(b"idempotency-key"))
            if form is Format.ARROW:
                columns = address.columns(self._columns(content))
                self.expect(request, scorer, len(columns))
                replied = await self._answer_columns(scorer, columns, reply, top, sender)
            else:
                items, bare = self._decoded(content, form)
                del content
                self.expect(request, scorer, len(items))
                replied = await self._answer(scorer, address.items(items), reply, top, sender, bare=bare)
        finally:
            self._intake.release(request)
        self._latency.observe(time.perf_counter() - started)
        return replied, _MEDIA_BYTES[reply]

    def expect(self, request: Incoming, scorer: Scorer, events: int) -> None:
        """Count what the reply will take. Raises Overloaded."""
        self._intake.reply(request, events * _wide(scorer))

    async def _answer(self, scorer: Scorer, items: Items, reply: Format, top: int, sender: str, *, bare: bool) -> bytes | Response:
        if not bare and reply in (Format.JSON, Format.NDJSON):
            return await self._answer_in_json(scorer, items, reply, top, sender)
        with self._answering(len(items)):
            answers = await scorer.score(items, top_contributors=top, sender=sender)
        if bare:
            [answer], [item] = answers, items
            self._events[_outcome(answer)].inc()
            if isinstance(answer, ItemError) or answer.late:
                return _unscored(answer, item)
        else:
            self._count(Counter(map(_outcome, answers)))
            _some_committed(answers)
        if reply is Format.ARROW:
            manifest = scorer.detector.manifest
            return arrow.encode_rows(answers, manifest.feature_names, lines=manifest.kind == "log")
        return encode(answers, reply, bare=bare)

    async def _answer_in_json(self, scorer: Scorer, items: Items, reply: Format, top: int, sender: str) -> bytes:
        with self._answering(len(items)):
            answers, kinds = await scorer.score_as_json(items, top_contributors=top, sender=sender)
        self._count(outcomes_of(kinds))
        self._count(Counter(_outcome(answer) for answer in answers if isinstance(answer, ItemError)))
        _some_committed(answers)
        return encode(answers, reply, bare=False)

    async def _answer_columns(self, scorer: Scorer, columns: Columns, reply: Format, top: int, sender: str) -> bytes | Response:
        if reply is not Format.ARROW or scorer.detector.manifest.kind == "log":
            return await self._answer(scorer, columns.items(), reply, top, sender, bare=False)
        with self._answering(len(columns)):
            scored = await scorer.score_columns(columns, sender=sender)
        self._count(_outcomes(scored))
        manifest = scorer.detector.manifest
        model = (manifest.name, manifest.version)
        return arrow.encode(scored, manifest.feature_names, model, len(columns), top_contributors=top)

    @contextmanager
    def _answering(self, events: int) -> Iterator[None]:
        """Count what becomes of a request that is refused as a whole."""
        try:
            yield
        except Overloaded:
            self._metrics.refused.labels("queue").inc()
            raise
        except StoreUnavailable:
            self._events["failed"].inc(events)
            raise

    def _decoded(self, content: bytes, form: Format) -> tuple[Items, bool]:
        try:
            return decode(content, form, max_events=self._limits.max_batch_events)
        except TooLarge:
            self._metrics.refused.labels("batch").inc()
            raise
        except BadEvent:  # the one that came
            self._events["rejected"].inc()
            raise

    def _columns(self, content: bytes) -> Columns:
        try:
            return arrow.decode(content, max_events=self._limits.max_batch_events, max_bytes=self._limits.max_body_bytes)
        except TooLarge:
            self._metrics.refused.labels("batch").inc()
            raise
        except BadEvent:  # a column of all of them
            self._metrics.refused.labels("malformed").inc()
            raise

    async def _object(self, request: Incoming) -> dict[str, Any]:
        """The body as one JSON object."""
        form = _format(request)
        if form is not Format.JSON:
            raise UnsupportedMedia(f"Content-Type '{form.value}' is not read here; send {JSON}.")
        content = await self._intake.body(request)
        try:
            return decode_object(content)
        finally:
            self._intake.release(request)

    def _scorer(self, request: Incoming, default: str = "") -> Scorer:
        name = request.query("model") or default or self._default
        scorer = self._scorers.get(name)
        if scorer is None:
            raise UnknownModel(f"No model '{name[:64]}' is loaded; there is {', '.join(sorted(self._scorers))}.")
        return scorer

    def _guarded(self, handler: Handler, *, scores: bool = False) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                if scores:
                    self.refuse(error)
                return self._failed(request.url.path, error)

        return guarded

    def refuse(self, error: Exception) -> None:
        """Count a sender's request that cannot be taken as it is: how many events it was to bring nobody can tell."""
        if isinstance(error, _MALFORMED):
            self._metrics.refused.labels("malformed").inc()

    def _failed(self, path: str, error: Exception) -> Response:
        """Errors of ours become problem details, here and nowhere else."""
        if (lack := no_memory(error)) is not None:  # of a 500 many senders drop what they sent
            self._metrics.refused.labels("memory").inc()
            error = lack
        if isinstance(error, OnsetError):
            response = respond(problem_of(error))
            if isinstance(error, TooSlow):
                response.headers["connection"] = "close"  # what is still to come of the body is nothing we read
            return response
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        return self._bug(path, error)  # must not take the connection with it; it is counted and logged

    async def _unexpected(self, request: Request, error: Exception) -> Response:
        return self._bug(request.url.path, error)

    def _bug(self, path: str, error: Exception) -> Response:
        """The client gets a reference, the log the rest."""
        reference = uuid.uuid4().hex[:12]
        self._metrics.bug(error, reference=reference, path=path[:256])
        return respond(plain(500, "A bug of ours", f"This is a bug; its reference in the service's log is {reference}."))

    def _count(self, outcomes: Mapping[str, int]) -> None:
        for outcome, count in outcomes.items():
            self._events[outcome].inc(count)


def _stranger(headers: Sequence[tuple[bytes, bytes]], ours: bytes | None) -> str:
    """The origin of another site's page that a browser sends a request for; "" = it is our own page, or no browser. `ours` is our own, too.

    There are no passwords here, so any page that someone looks at could close alerts, if the browser reaches the service. What only reads
    is not asked: no page sees the answer. Sec-Fetch-Site comes over https and to loopback alone, Origin always.
    """
    told = {name: value for name, value in headers if name in _OF_PAGES}
    site, origin = told.get(b"sec-fetch-site"), told.get(b"origin")
    if site is None:
        own = origin is None or origin.partition(b"://")[2] in (told.get(b"host"), told.get(b"x-forwarded-host"))
    else:
        own = site in (b"same-origin", b"none")
    return "" if own or (ours is not None and origin == ours) else (origin or b"another site").decode("latin-1")


def _hosts(allowed: str, public_url: str) -> frozenset[str]:
    """Names that the service is asked for by; none = any."""
    names = {name.strip().lower() for name in allowed.split(",")}
    return frozenset({*names, urlsplit(public_url.lower()).hostname or "localhost", "localhost"}) if allowed else frozenset()


def _strange_host(headers: Sequence[tuple[bytes, bytes]], names: Collection[str]) -> str:
    """The host that a request asks for, where it is no address and none of the service's names; "" = it is, or is not said.

    To a browser a page whose own name comes to resolve to the service is no other site's: it would read all, and change it.
    """
    host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1")
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name and name not in names:
            ipaddress.ip_address(name)
    except ValueError:
        return host
    return ""


def _origin(url: str) -> bytes | None:
    """What browsers call pages under this address; None = it is not known."""
    parts = urlsplit(url.lower())
    return f"{parts.scheme}://{parts.netloc}".encode() if url else None


def _is_utf8(path: bytes) -> bool:
    """Whether an address as it was sent names characters."""
    try:
        unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return False
    return True


async def _http_problem(request: Request, error: HTTPException) -> Response:
    """Unknown addresses and wrong methods."""
    response = respond(
        plain(error.status_code, str(error.detail), f"{request.method} {request.url.path[:256]}: {error.detail}. See /docs.")
    )
    response.headers.update(error.headers or {})
    return response


def _incoming(request: Request) -> Incoming:
    return Incoming(request.scope, request.receive)


def _outcome(answer: Result | ItemError) -> str:
    if isinstance(answer, ItemError):
        return "rejected" if TABLE[type(answer)][0] < 500 else "failed"
    return "duplicate" if answer.duplicate else "late" if answer.late else "scored"


def _wide(scorer: Scorer) -> int:
    """Bytes of a reply that an event is counted for."""
    return (scorer.detector.features - 1) * FEATURE_BYTES


def _give(replied: Response | bytes, answered: Answered) -> None:
    if isinstance(replied, Response):
        answered(replied.status_code, replied.raw_headers, bytes(replied.body))
    else:
        answered(200, _headers(replied, _MEDIA_BYTES[Format.JSON]), replied)


def _headers(replied: bytes, media: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-length", b"%d" % len(replied)), (b"content-type", media)]


def _unscored(answer: Result | ItemError, event: Event | ItemError) -> Response:
    """The reply to a single event that failed, or came too late."""
    if isinstance(answer, ItemError):
        return respond(problem_of(answer))
    sequence = event.sequence if isinstance(event, Event) else None
    return respond(late_problem(answer.stream_id, sequence, answer.timestamp, answer.state_version))


def _outcomes(scored: Scored) -> Counter[str]:
    counted: Counter[str] = Counter(map(_outcome, scored.errors.values()))
    kinds = np.bincount(np.delete(scored.scores.kinds, np.isin(scored.places, list(scored.errors))), minlength=len(Kind))
    return +(counted + Counter(_of_kinds(kinds)))


def outcomes_of(kinds: Sequence[int]) -> dict[str, int]:
    """How many events of these Kinds became what, but for those that are errors."""
    return _of_kinds([kinds.count(kind) for kind in Kind])


def _of_kinds(events: Sequence[int] | NDArray[np.intp]) -> dict[str, int]:
    """Outcomes of those that are no errors; `events` of each Kind."""
    counted = dict.fromkeys(_OF_KIND.values(), 0)
    for kind, outcome in _OF_KIND.items():
        counted[outcome] += int(events[kind])
    return counted


async def _no_more() -> Message:
    """Of a request that is all there."""
    return {"type": "http.disconnect"}


def _some_committed(answers: Sequence[object]) -> None:
    """Raises StoreUnavailable where there are answers, and none is more than that."""
    if answers and all(isinstance(answer, NotCommitted) for answer in answers):
        raise StoreUnavailable(str(answers[0]))


@dataclass(frozen=True)
class _Address:
    """The stream that the path names, and the identity that the Idempotency-Key header gives to events without one."""

    stream_id: str | None
    key: str | None

    def __post_init__(self) -> None:
        if self.key is not None and not _VISIBLE.fullmatch(self.key):
            raise BadParameter(f"Idempotency-Key has 1 to {MAX_NAME_LENGTH} visible ASCII characters.", "Idempotency-Key", shown(self.key))

    def items(self, items: Items) -> Items:
        if self.stream_id is None and self.key is None:
            return items
        return [item if isinstance(item, ItemError) else self._event(item, i) for i, item in enumerate(items)]

    def columns(self, columns: Columns) -> Columns:
        bad, stream_ids, event_ids = columns.bad, columns.stream_ids, columns.event_ids
        if self.stream_id is not None:
            strangers = {i: self._stranger(name) for i, name in enumerate(stream_ids) if name not in (None, self.stream_id)}
            bad, stream_ids = strangers | bad, [self.stream_id] * len(columns)
        if self.key is not None:
            own = zip(event_ids, columns.sequence.tolist(), strict=True)
            event_ids = [f"{self.key}#{i}" if name is None and number < 0 else name for i, (name, number) in enumerate(own)]
        return replace(columns, bad=bad, stream_ids=stream_ids, event_ids=event_ids)

    def _event(self, event: Event, i: int) -> Event | ItemError:
        if self.stream_id is not None and event.stream_id not in (None, self.stream_id):
            return self._stranger(event.stream_id)
        changes = {}
        if self.stream_id is not None:
            changes["stream_id"] = self.stream_id
        if self.key is not None and event.event_id is None and event.sequence is None:
            changes["event_id"] = f"{self.key}#{i}"
        return msgspec.structs.replace(event, **changes) if changes else event

    def _stranger(self, sent: str | None) -> BadEvent:
        return BadEvent(f"stream_id is '{sent}' in the body and '{self.stream_id}' in the path.", "stream_id", shown(sent))


def _format(request: Incoming) -> Format:
    """What the body is written in. Raises UnsupportedMedia."""
    given = request.header(b"content-type")
    if given is None:
        return Format.JSON
    if (form := MEDIA.get(given)) is None:
        form = MEDIA.get(request.media)
        if form is None:
            known = ", ".join(form.value for form in Format)
            raise UnsupportedMedia(f"Content-Type '{request.media[:64]}' is not read here; send {known}.")
    return form


def _accepted(request: Incoming, sent: Format) -> Format:
    """What to reply in: the first of ours among the most wanted in Accept; as the request where it names none of them."""
    wanted = request.header(b"accept")
    return sent if wanted is None or wanted == "*/*" else _preferred(wanted, sent)


@lru_cache(maxsize=256)
def _preferred(wanted: str, sent: Format) -> Format:
    best, weight = sent, 0.0
    for part in wanted.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        form = sent if media in ("*/*", "application/*") else MEDIA.get(media)
        q = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        if form is not None and _WEIGHT.fullmatch(q) and float(q) > weight:
            best, weight = form, float(q)
    return best


def _sender(request: Incoming) -> str:
    """Whose turn a request takes: the tenant's that it names, or else its address's."""
    tenant = request.header(_TENANT)
    if tenant is None:
        client = request.scope.get("client")
        return client[0] if client else ""
    if not _VISIBLE.fullmatch(tenant):
        raise BadParameter(f"{TENANT_HEADER} has 1 to {MAX_NAME_LENGTH} visible ASCII characters.", TENANT_HEADER, shown(tenant))
    return f"tenant {tenant}"


def _number(request: Incoming, name: str, default: int, least: int, most: int) -> int:
    text = request.query(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise BadParameter(f"{name} is {text[:64]!r}; it is a whole number from {least} to {most}.", name, shown(text))
    return int(text)


def only(request: Incoming, *names: str) -> None:
    """What another name asks for would be left out: a list would have more than is meant, another model score. Raises BadParameter."""
    for name in request.parameters if request.scope["query_string"] else ():
        if name not in names:
            raise BadParameter(
                f"'{name[:64]}' is no parameter here; there are {', '.join(names)}.", name[:64], shown(request.query(name) or "")
            )


def _words(request: Incoming, name: str, known: Sequence[Word], *, most: int = 10) -> list[Word]:
    """Those of the known words that a parameter names, with commas between or given again for each."""
    given = request.queries(name)
    if not given:
        return []
    text = ",".join(given)
    found = [word for word in known if word in text.split(",")]
    if not found or set(text.split(",")) - set(known) or len(found) > most:
        several = ", several with commas between" if most > 1 else ""
        raise BadParameter(f"{name} is {text[:64]!r}; it is {', '.join(known)}{several}.", name, shown(text))
    return found


def _no_cursor(text: str) -> BadParameter:
    return BadParameter(f"cursor {text[:64]!r} is none of ours: take next_cursor of the page before.", "cursor", shown(text))


def _known(id_: str, alert: Alert | None) -> Alert:
    if alert is None:
        raise UnknownAlert(f"No alert '{id_[:64]}' is known: resolved ones are forgotten after a while.")
    return alert


def _wanted(asked: Incoming) -> Wanted:
    """Which alerts are asked for, by ALERT_FILTERS. Raises BadParameter."""
    holds = asked.query("q") or ""
    if len(holds) > MAX_NAME_LENGTH:
        raise BadParameter(f"q has {len(holds)} characters, names have {MAX_NAME_LENGTH} at most.", "q", shown(holds))
    return Wanted(
        frozenset(_words(asked, "status", get_args(alerts.Status))),
        frozenset(_words(asked, "severity", SEVERITIES[1:])),
        next(iter(_words(asked, "kind", get_args(alerts.Kind), most=1)), None),
        asked.query("model"),
        asked.query("stream_id"),
        holds,
        {"true": True, "false": False}.get(next(iter(_words(asked, "muted", ("true", "false"), most=1)), "")),
    )


def _several(body: Mapping[str, Any], now: float) -> tuple[list[str], Acknowledgement]:
    """Ids of the alerts that are meant, each once, and who says so. Raises BadParameter."""
    by = _acknowledgement({name: value for name, value in body.items() if name != "ids"}, now, "by, note and ids")
    ids = body.get("ids")
    if not isinstance(ids, list) or not 0 < len(ids) <= MAX_PAGE:
        raise BadParameter(f"ids is {shown(ids)}; it is a list of 1 to {MAX_PAGE} ids of alerts.", "ids", shown(ids))
    for i, id_ in enumerate(ids):
        if not isinstance(id_, str) or not _ALERT_ID.fullmatch(id_):
            raise BadParameter(f"ids[{i}] is {shown(id_)}; an alert's id is 28 digits and letters a to f.", f"ids[{i}]", shown(id_))
    return list(dict.fromkeys(ids)), by


def _done(became: Mapping[str, Became]) -> alerts.Done:
    """What became of alerts, by id."""
    told = [
        alerts.Told(id_, outcome, alert.stream_id if alert else None, alert.model if alert else None)
        for id_, (outcome, alert) in became.items()
    ]
    return alerts.Done(told, dict(Counter(one.outcome for one in told)))


def _acknowledgement(body: Mapping[str, Any], now: float, parts: str = "by and note") -> Acknowledgement:
    """Raises BadParameter."""
    for name, value in body.items():
        if name not in ("by", "note"):
            raise BadParameter(f"'{name[:64]}' is no part of an acknowledgement; it has {parts}.", name[:64], shown(value))
    by, note = body.get("by"), body.get("note", "")
    if not (isinstance(by, str) and 0 < len(by) <= MAX_NAME_LENGTH and not _UNPRINTABLE.search(by)):
        raise BadParameter(f"by is {shown(by)}; it names who looks after it, in 1 to {MAX_NAME_LENGTH} characters.", "by", shown(by))
    if not (isinstance(note, str) and len(note) <= MAX_NOTE and not _SURROGATE.search(note)):
        raise BadParameter(f"note is {shown(note)}; it is a text of at most {MAX_NOTE} characters.", "note", shown(note))
    return Acknowledgement(by, note, now)


def _json(reply: Any) -> Response:
    return Response(msgspec.json.encode(reply), media_type=JSON)


def _health(wrong: str | None) -> Response:
    body = {"status": "ok"} if wrong is None else {"status": "unavailable", "detail": wrong}
    return Response(msgspec.json.encode(body), 200 if wrong is None else 503, media_type=JSON)
