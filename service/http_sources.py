"""Addresses that others send what they have to (sources of kind http): POST /v1/sources/{name}, and as to an InfluxDB.

    body ─► one message, its topic what follows the name ─► mapping.py, as declared ─► scorer ─► what became of its events, counted

    status   when                                                                                   who sends it
    200      something was taken: scored, a duplicate, late, or without a reading; `problems` are   goes on
             the first of those that can never be
    422 …    all of its events can never be taken, for the first one's reason (mostly a bad event); goes on, or keeps all until somebody
             or nothing can be read                                                                 mends the mapping: see docs/sources.md
    404 413  no such source; over a limit                                                           as it does
    429 503  the queue is full; the store does not answer, or other replicas were faster            sends all of it again

InfluxDB's addresses, POST /api/v2/write?bucket={name} and /write?db={name}, answer 204 where nothing is refused, and else as it does.

Who sends it may send it again: an event without an identity has that of its time and values, as one of a queue without positions.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import msgspec
import structlog
from starlette.responses import Response

from service.api import JSON, Door, Sent, only, outcomes_of
from service.bodies import Items
from service.errors import BadParameter, ItemError, OnsetError, StoreUnavailable, TooSlow, Unfinished, UnknownSource
from service.events import Event, shown
from service.intake import Incoming
from service.mapping import Mapper
from service.metrics import Metrics
from service.problems import TABLE, Problem, partly_refused, partly_written, problem_of, respond
from service.shipped import beside
from service.sources import Message
from service.sources.options import HttpSource, TimeUnit

PATH, TOPIC_PATH = "/v1/sources/{name}", "/v1/sources/{name}/{topic:path}"
INFLUX_PATH, INFLUX_1_PATH = "/api/v2/write", "/write"
PRECISIONS: Mapping[str, TimeUnit] = {"ns": "ns", "n": "ns", "us": "us", "u": "us", "ms": "ms", "s": "s"}
"""InfluxDB's names for the unit of a line's time; 1.x has the short ones."""
MOST_PROBLEMS = 10
"""Of a reply: senders that do not read it keep some 4 kB for it (Fluent Bit), and take what is longer for a failure."""
TOLD_SECONDS = 60.0
_INFLUX_PARAMETERS = ("bucket", "org", "orgID", "precision"), ("db", "rp", "precision", "consistency", "u", "p")
_INFLUX_CODES = {400: "invalid", 404: "not found", 413: "request too large", 422: "unprocessable entity", 429: "too many requests"}

log = structlog.get_logger(__name__)


class Taken(msgspec.Struct):
    """What became of the events of a request."""

    scored: int = 0
    duplicate: int = 0
    """Sent before: not scored again."""
    late: int = 0
    """Older than the last event of their stream: not scored."""
    no_reading: int = 0
    """Passed over: what payload.missing and payload.good declare, and what beside the numbers of an object is none."""
    rejected: int = 0
    """Can never be taken."""
    problems: list[Problem] = msgspec.field(default_factory=list)
    """Why, of the first of them; `index` is the place among the request's events."""


@dataclass(frozen=True)
class _Scored:
    """A request that was scored: an answer for each of its events, and how many became what (as in Taken; `failed`: to be sent again)."""

    answers: Sequence[msgspec.Raw | ItemError]
    counts: Mapping[str, int]

    @property
    def taken(self) -> bool:
        """Whether anything was."""
        return any(self.counts[name] for name in ("scored", "duplicate", "late"))

    def problems(self, became: str) -> Iterator[tuple[int, ItemError]]:
        """Those that are `rejected`, or have `failed`, by their places."""
        return ((i, error) for i, error in enumerate(self.answers) if isinstance(error, ItemError) and _became(error) == became)


class _Address:
    """One source."""

    def __init__(self, source: HttpSource, max_events: int, metrics: Metrics) -> None:
        self.name, self.model, self.influx = source.name, source.model, source.payload.format == "influx"
        units = {source.payload.timestamp_unit, *(PRECISIONS.values() if self.influx else ())}
        self.mappers = {unit: Mapper(source.payload.model_copy(update={"timestamp_unit": unit}), max_events=max_events) for unit in units}
        self.unit = source.payload.timestamp_unit
        self.latency = metrics.latency.labels(source.name)
        self.no_reading = metrics.source_no_reading.labels(source.name)
        self.told_at = -math.inf
        metrics.begin(door=[source.name])


class HttpSources:
    """The routes' handlers over a door. At most `max_events` of a request; `clock` gives seconds since 1970."""

    def __init__(
        self, door: Door, sources: Iterable[HttpSource], max_events: int, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        self._door, self._metrics, self._clock = door, metrics, clock
        self._addresses = {source.name: _Address(source, max_events, metrics) for source in sources}

    async def post(self, request: Incoming) -> Response:
        """Score what is sent to a source; `results=true` = with all that is known of each event, as POST /v1/events answers."""
        only(request, "results")
        results = request.query("results")
        if results not in (None, "true", "false"):
            raise BadParameter(f"results is {shown(results)}; it is true or false.", "results", shown(results))
        named = request.scope["path_params"]
        address = self._address(named["name"])
        scored = await self._scored(request, address, address.unit, named.get("topic", ""))
        if refused := _to_be_sent_again(scored) or _nothing_taken(scored):
            return respond(refused)
        if results == "true":
            bodies = [problem_of(answer, i) if isinstance(answer, ItemError) else answer for i, answer in enumerate(scored.answers)]
            return Response(msgspec.json.encode(bodies), media_type=JSON)
        problems = [problem_of(error, i) for i, error in islice(scored.problems("rejected"), MOST_PROBLEMS)]
        counts = {name: count for name, count in scored.counts.items() if name != "failed"}
        return Response(msgspec.json.encode(Taken(**counts, problems=problems)), media_type=JSON)

    async def write(self, request: Incoming) -> Response:
        """Score lines that are sent as to an InfluxDB, whose bucket, or database, names the source."""
        try:
            return await self._write(request)
        except OnsetError as error:
            self._door.refuse(error)
            return _influx(problem_of(error))

    async def _write(self, request: Incoming) -> Response:
        second = request.scope["path"].endswith(INFLUX_PATH)
        only(request, *_INFLUX_PARAMETERS[not second])
        name = request.query("bucket" if second else "db") or ""
        address = self._address(name)
        if not address.influx:
            raise BadParameter(
                f"Source '{name}' does not read InfluxDB's lines: declare payload: {{format: influx}}.", "bucket", shown(name)
            )
        precision = request.query("precision")
        if precision and precision not in PRECISIONS:
            raise BadParameter(f"precision is {shown(precision)}; it is {', '.join(PRECISIONS)}.", "precision", shown(precision))
        scored = await self._scored(request, address, PRECISIONS[precision] if precision else address.unit, "")
        if again := _to_be_sent_again(scored):
            return _influx(again)
        for _, first in scored.problems("rejected"):
            # Clients of InfluxDB 1.x know by these words that it is of no use to send it again.
            detail = f"partial write: {scored.counts['rejected']} of {len(scored.answers)} events are refused. The first: {first.detail}"
            return _influx(partly_refused("events", detail))
        return Response(status_code=204)

    def _address(self, name: str) -> _Address:
        address = self._addresses.get(name)
        if address is None:
            known = f"there is {', '.join(sorted(self._addresses))}" if self._addresses else "there is none"
            raise UnknownSource(f"No source '{name[:64]}' of type http is declared (ONSET_SOURCES); {known}.")
        return address

    async def _scored(self, request: Incoming, address: _Address, unit: TimeUnit, topic: str) -> _Scored:
        """Raises as Door.sent and Scorer.score do, and ItemError where nothing can be read."""
        started = time.perf_counter()
        try:
            async with self._door.sent(request, None, address.model) as sent:
                headers = dict(reversed(request.scope["headers"]))
                key = request.header(b"idempotency-key") or None
                message = Message(b"", 0, self._clock(), sent.content, headers, topic or None, topic, key)
                items = await beside(partial(self._mapped, address, unit, message), len(sent.content))
                self._door.expect(request, sent.scorer, len(items))
                scored = await self._score(sent, address, items)
        except TooSlow as error:  # as a 408 it would be dropped
            raise Unfinished(error.detail) from error
        address.latency.observe(time.perf_counter() - started)
        return scored

    def _mapped(self, address: _Address, unit: TimeUnit, message: Message) -> Items:
        try:
            return list(address.mappers[unit].events(message)[0])
        except ItemError as error:
            self._count(address, {"rejected": 1})
            self._tell(address, 1, 1, error)
            raise

    async def _score(self, sent: Sent, address: _Address, items: Items) -> _Scored:
        try:
            answers, kinds = await sent.scorer.score_as_json(items, sender=sent.sender, by_content=True)
        except StoreUnavailable:
            self._count(address, {"failed": sum(isinstance(item, Event) for item in items)})
            raise
        errors = Counter(_became(answer) for answer in answers if isinstance(answer, ItemError))
        scored = _Scored(answers, outcomes_of(kinds) | {name: errors[name] for name in ("no_reading", "rejected", "failed")})
        self._count(address, scored.counts)
        for _, error in islice(scored.problems("rejected"), 1):
            self._tell(address, scored.counts["rejected"], len(items), error)
        return scored

    def _count(self, address: _Address, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            metric = address.no_reading if name == "no_reading" else self._metrics.events.labels(address.name, name)
            metric.inc(count)

    def _tell(self, address: _Address, rejected: int, events: int, first: ItemError) -> None:
        """In the log: hardly any sender shows anybody what it is answered."""
        if (now := time.monotonic()) - address.told_at >= TOLD_SECONDS:
            address.told_at = now
            log.warning("events_rejected", source=address.name, rejected=rejected, of=events, reason=first.detail)


def _became(error: ItemError) -> str:
    status = TABLE[type(error)][0]
    return "no_reading" if status < 400 else "rejected" if status < 500 else "failed"


def _to_be_sent_again(scored: _Scored) -> Problem | None:
    """What is known by its identity is not scored twice."""
    for _, first in scored.problems("failed"):
        detail = f"{scored.counts['failed']} of {len(scored.answers)} events were not written: send the request again. {first.detail}"
        return partly_written("events", detail)
    return None


def _nothing_taken(scored: _Scored) -> Problem | None:
    """Where all that has a reading is rejected, it is the sender or the mapping that is wrong, and not an event: it is to know."""
    if scored.taken:
        return None
    for i, first in scored.problems("rejected"):
        problem = problem_of(first, i)
        if (count := scored.counts["rejected"]) > 1:
            problem.detail = f"None of {count} events can be taken. The first: {problem.detail}"
        return problem
    return None


def _influx(problem: Problem) -> Response:
    """An error as InfluxDB has it: 2.x in `message`, 1.x in `error`."""
    code = _INFLUX_CODES.get(problem.status, "unavailable" if problem.status == 503 else "internal error")
    headers = {"retry-after": str(problem.retry_after)} if problem.retry_after is not None else None
    return Response(
        msgspec.json.encode({"code": code, "message": problem.detail, "error": problem.detail}), problem.status, headers, media_type=JSON
    )
