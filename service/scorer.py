"""THE FLOW of a batch. One scorer per loaded model; both doors call `score`.

    events ─► readings ─► batcher ─► load     our copies (copies.py), one MGET for the other distinct streams
                                     rounds   detector.step() on distinct streams, in a worker thread   (rounds.py)
                                     commit   compare version → write, atomic for each stream           (stores/)
                                     conflict reload the losers and step them again, three times at most
    replies ◄─────────────────────── answer   only now

All that a stream is lies in the store, so any replica scores any stream; a copy only saves loading it, and a stale one loses the
compare. States of another file of the model start afresh only while ours is the one in force (claims.py), which is asked after they were
loaded. Batches that share no stream are under way at once: one is stepped while another is loaded or committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from typing import NamedTuple, TypeVar, cast

import msgspec
import numpy as np
import structlog
from msgspec.structs import replace
from numpy.typing import NDArray

from service import alerts, sessions, tracing
from service.alerts import Standing
from service.artifact import NEW
from service.batcher import Batcher, Waits
from service.claims import Claim, Uncontested
from service.copies import Copies
from service.detector import Detector
from service.errors import BadEvent, ItemError, NotCommitted, OnsetError, StateConflict, StoreUnavailable, TooManyStreams
from service.events import Columns, Delivery, Event, Lease, Parsed, Published, Readings, Result
from service.features import parse, parse_columns
from service.feed import Feed
from service.metrics import Metrics
from service.policy import Policy
from service.reorder import Reorder
from service.results import TOP, Answers, Replies, Scored
from service.rounds import Kind, Outcomes, Positions, advancing
from service.sessions import SessionSweeper
from service.silence import Sweeper, waits
from service.state import EXPIRED, Loaded, Origin, Rows, event_key
from service.stores import FENCED, LOST, NEARLY_FULL, WRITTEN, Memory, StateStore, Write
from service.streams import Streams

ATTEMPTS = 3
"""Besides the one that a stale copy may cost."""
MAX_BATCH = 1024
"""Events of one request that are scored together, and streams of one batch: one inference of the largest bucket steps each once."""
BATCH_EVENTS = 4 * MAX_BATCH
"""Of several requests in one batch: where streams have several events each, the rounds of all are stepped together."""
DEPTH = 3
"""Batches under way at once: one loads, one is stepped, one is committed."""
GATHER_STREAMS = 256
AT_ONCE_EVENTS = 64
"""Up to so many events of distinct streams are stepped within the event loop: that takes less than a millisecond, and handing them to
another thread and back would cost as much again as stepping a few."""
MATCHED_CHARACTERS = 65_536
"""Of log lines that are matched within the event loop without a pause: some 10 ms, of lines without blanks and full of numbers some 100."""
OVERTAKEN = 10_000
"""Streams whose overtaken copy is remembered, at most."""
TOLD_SECONDS = 60.0
"""States that were set back are told of in the log once in this time."""
COUNT_SECONDS = 1.0
"""How long a count of the store's streams is good for, and what it says of its memory."""

_KINDS = list(Kind)
_DONE, _TOLD, _REFUSED, _FAILED = int(Kind.LATE), (int(Kind.SCORED), int(Kind.LATE)), int(Kind.REFUSED), int(Kind.CONFLICT)
"""Kinds up to which a queue's event is done with, those that have a result of their own, and the first of those that are failures."""

Reply = TypeVar("Reply", Result, msgspec.Raw)

_PUBLISHED = (*_TOLD, int(Kind.DUPLICATE))
_encoder = msgspec.json.Encoder()

log = structlog.get_logger(__name__)
_verbose = logging.getLogger("service")


@dataclass(frozen=True)
class Limits:
    """What one scorer accepts."""

    max_queue_events: int = 20_000
    max_streams: int | None = 1_000_000
    """None = no new stream is refused, also where the store is nearly full."""
    max_future_seconds: float = 86_400.0
    result_ttl_seconds: int = 600
    copies_bytes: int = 64 * 1024 * 1024
    reorder_seconds: float = 0.0
    reorder_events: int = 64
    session_ttl_seconds: int = 3600
    """0 = the state TTL."""


class _Piece:
    """Events of one request, and the policy that was in force when it came: a whole request is judged by one.

    `lost` are streams of which an earlier piece of it lost every race: what follows must not be stepped before that is sent again.
    """

    __slots__ = ("came", "events", "lost", "origin", "parsed", "policy", "rounds", "streams")

    def __init__(self, parsed: Parsed, policy: Policy, lost: set[str]) -> None:
        self.parsed, self.policy, self.lost = parsed, policy, lost
        self.came, self.origin = time.perf_counter(), tracing.origin()
        self.events = len(parsed)
        self.streams = frozenset(parsed.stream_ids)
        self.rounds = 1 if len(self.streams) == self.events else max(Counter(parsed.stream_ids).values(), default=0)


class _Settled(NamedTuple):
    """What the write of one stream does in the queues that its events came from."""

    results: list[bytes]
    acks: list[tuple[Lease, bytes]]


_NOTHING = _Settled([], [])


@dataclass(slots=True)
class _Work:
    """N readings that are stepped together, and the B streams that they are of."""

    policy: Policy
    readings: Readings
    slots: Positions
    """[N] which of the streams each is of."""
    stream_ids: Sequence[str]
    """[B] each once."""
    loaded: Loaded
    copied: NDArray[np.bool_]
    """[B] whose states are our copies."""
    standing: Standing
    """Their alerts, before anything was stepped."""


class Scorer:
    """Scores events with one detector; `feed` is told of every batch. `clock` gives seconds since 1970.

    `held` = nothing is scored before `ask`; `alerting` = its alerts go into the store's log of them; `claim` says whether its model's
    file is in force.
    """

    def __init__(
        self,
        detector: Detector,
        policy: Policy,
        store: StateStore,
        metrics: Metrics,
        limits: Limits,
        clock: Callable[[], float] = time.time,
        *,
        held: bool = False,
        feed: Feed | None = None,
        alerting: bool = True,
        claim: Claim | None = None,
    ) -> None:
        self.detector = detector
        self._alerting = alerting
        self.claim = claim or Uncontested()
        self.policy = policy
        self._held = held
        self._store = store
        self._metrics = metrics
        self._feed = feed or Feed(metrics)
        self._limits = limits
        self._clock = clock
        self._codec = detector.codec()
        self._replies = Replies(detector.manifest, policy)
        self._copies = Copies(self._codec, limits.copies_bytes)
        self.streams = Streams(
            detector,
            self._codec,
            lambda: self.policy,
            store,
            self._copies,
            self._replies,
            metrics,
            clock,
            alerting=alerting,
            claim=self.claim,
        )
        self._batcher: Batcher[_Piece, Answers] = Batcher(
            self._handle,
            max_batch=BATCH_EVENTS,
            max_streams=MAX_BATCH,
            max_queue=limits.max_queue_events,
            depth=DEPTH,
            gather=GATHER_STREAMS,
        )
        self._reorder: Reorder[Answers | Exception] | None = None
        metrics.held.labels(detector.name).set(0)
        if limits.reorder_seconds:
            self._reorder = Reorder(
                self._submit_in_turn, seconds=limits.reorder_seconds, events=limits.reorder_events, max_held=limits.max_queue_events
            )
            metrics.held.labels(detector.name).set_function(lambda: self._reorder.held if self._reorder else 0)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"step-{detector.name}")
        self._count, self._memory, self._counted_at = 0, Memory(), -COUNT_SECONDS
        self._overtaken: dict[str, tuple[int, float]] = {}
        """Streams whose copy was not what the store has, until they are loaded: its version, and the time of its last event."""
        self._set_back_told_at = -math.inf
        self._stage = {name: metrics.stage.labels(name) for name in ("queue", "load", "step", "commit")}
        self._copied = {name: metrics.copies.labels(name) for name in ("hit", "miss", "stale")}
        self._anomalies, self._onsets = metrics.anomalies.labels(detector.name), metrics.onsets.labels(detector.name)
        self._expected = metrics.expected.labels(detector.name)
        metrics.state_bytes.labels(detector.name).set(self._codec.bytes)
        metrics.queued.labels(detector.name).set_function(lambda: self._batcher.queued)

    @property
    def healthy(self) -> bool:
        """Whether the batch loop runs."""
        return self._batcher.healthy

    def start(self) -> None:
        self._batcher.start()

    def ask(self, alpha: float, strict: bool) -> None:
        """From here on requests are judged by these; those that wait keep what they came with."""
        self._held = False
        if (alpha, strict) != (self.policy.alpha, self.policy.strict):
            self.policy = changed(self.policy, alpha=alpha, strict=strict)

    def stopping(self) -> None:
        """The service begins to stop, and waits for answers under way: no event is held for earlier ones any more."""
        if self._reorder is not None:
            self._reorder.release()

    async def drain(self, seconds: float) -> None:
        """Finish what was accepted within `seconds`, then stop."""
        until = time.monotonic() + seconds
        if self._reorder is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reorder.flush(), seconds)
        await self._batcher.drain(max(0.0, until - time.monotonic()))
        self._worker.shutdown(wait=True)

    async def score(self, items: Sequence[Event | ItemError], *, top_contributors: int = TOP, sender: str = "") -> list[Result | ItemError]:
        """One answer for each item, in order. An ItemError among the items keeps its place; a failed event becomes one.

        Senders take turns: none waits for all that another one has queued.
        Raises Overloaded when the queue is full, StoreUnavailable when nothing of this call is known to be committed, Superseded where
        that is so because another file of the model is in force.
        """
        return await self._scored(items, partial(self._replies.results, top_contributors=top_contributors), sender)

    async def score_as_json(
        self, items: Sequence[Event | ItemError], *, top_contributors: int = TOP, sender: str = "", by_content: bool = False
    ) -> tuple[list[msgspec.Raw | ItemError], list[int]]:
        """The same with results that are JSON already, and the Kind of each event that has one or failed to be scored.

        `by_content`: an event that names no identity has that of its time and values, as one of a queue without positions.
        """
        kinds: list[int] = []

        def replies(events: Sequence[Event], answers: Answers) -> list[msgspec.Raw]:
            kinds.extend(answers.kinds)
            return self._replies.as_json(events, answers, top_contributors=top_contributors)

        return await self._scored(items, replies, sender, by_content=by_content), kinds

    async def _scored(
        self,
        items: Sequence[Event | ItemError],
        replies: Callable[[Sequence[Event], Answers], list[Reply]],
        sender: str,
        *,
        by_content: bool = False,
    ) -> list[Reply | ItemError]:
        self._check()
        events = [item for item in items if isinstance(item, Event)]
        parsed, errors = await self._parse(events)
        if errors:
            events = [event for i, event in enumerate(events) if i not in errors]
        if by_content:
            parsed = changed(parsed, key=[key or _content_key(event) for key, event in zip(parsed.key, events, strict=True)])
        answers: list[Reply | ItemError] = []
        done = await self._submit(parsed, sender)
        for here, outcome in done:
            answers += self._replied(events[here], outcome, replies)
            if len(done) > 1:
                await asyncio.sleep(0)  # a long request lets the others in between its pieces
        if len(answers) == len(items):
            return answers
        of_scored, of_event = iter(answers), itertools.count()
        return [
            item if isinstance(item, ItemError) else errors[i] if (i := next(of_event)) in errors else next(of_scored) for item in items
        ]

    def begin(self, event: Event, sender: str) -> asyncio.Future[Answers] | None:
        """Queue one event; `answer` tells what the future's result means for it. None = it cannot be used, or has to wait for its turn:
        `score` says why, or waits. Raises as that does.
        """
        self._check()
        if self._reorder is not None:
            return None
        detector, now = self.detector, self._clock()
        parsed, errors = parse([event], detector.manifest, now=now, max_future=self._limits.max_future_seconds, matcher=detector.matcher)
        if errors:
            return None
        [future] = self._batcher.queue(self._pieces(parsed), sender)
        return future

    def answer(self, event: Event, answers: Answers) -> bytes | Result | ItemError:
        """What became of an event that was begun: its result as JSON; of a late one, which has none, what is known of its stream."""
        [kind] = answers.kinds
        if kind >= _FAILED:
            return self._failure(event.stream_id or "", Kind(kind))
        if kind == Kind.LATE:
            return self._replies.results([event], answers, top_contributors=0)[0]
        return bytes(self._replies.as_json([event], answers, top_contributors=TOP)[0])

    async def score_columns(self, columns: Columns, *, sender: str = "") -> Scored:
        """The same for events that came as columns, without an object for each."""
        self._check()
        parsed, bad = parse_columns(columns, self.detector.manifest, now=self._clock(), max_future=self._limits.max_future_seconds)
        errors: dict[int, ItemError] = columns.bad | bad
        places = np.array([i for i in range(len(columns)) if i not in errors], np.intp)
        answers, kept = [], []
        for here, outcome in await self._submit(parsed, sender):
            piece = places[here]
            failures = self._failures(parsed.stream_ids[here], outcome)
            errors |= {int(piece[i]): error for i, error in failures.items()}
            if isinstance(outcome, Answers):
                answers.append(outcome)
                kept.append(np.arange(here.start, here.start + len(piece)))
        nothing = self._replies.judged(Outcomes(np.zeros(0, self._codec.record), np.zeros(0, np.uint8)))
        scores = self._replies.scores(answers or [nothing])
        done = np.concatenate([*kept, np.zeros(0, np.intp)])
        places = places[done]
        timestamp = np.where(np.isnan(columns.timestamp[places]), scores.timestamp, columns.timestamp[places])
        event_ids = [columns.event_ids[i] for i in places.tolist()]
        return Scored([parsed.stream_ids[i] for i in done.tolist()], event_ids, timestamp, places, scores, errors)

    async def consume(
        self, deliveries: Sequence[Delivery], sender: str = "", *, replies: bool = False
    ) -> tuple[list[Kind | ItemError], list[Published]]:
        """Score events of queues, at most MAX_BATCH, each partition's in its order; what became of each, or why it cannot be used.

        Where a delivery has a lease, its result is in the output stream by now and its entry is acknowledged, unless it is CONFLICT (send
        it again before any later event of its stream) or FENCED (its partition is another replica's). With `replies` also the results to
        publish, in order: of events that are scored or late, and the stored ones of those that were delivered again, as far as they are
        at hand. Raises as `score` does.
        """
        self._check()
        events = [delivery.event for delivery in deliveries]
        parsed, errors = await self._parse(events)
        kept = [delivery for i, delivery in enumerate(deliveries) if i not in errors]
        arrivals = [time if timed else delivery.arrived for time, timed, delivery in zip(parsed.timestamp, parsed.timed, kept, strict=True)]
        keys = [key or _identity(delivery, replies=replies) for key, delivery in zip(parsed.key, kept, strict=True)]
        # Past the reorder buffer: positions are only exact where a partition is scored in its own order.
        done = await self._batcher.submit(self._pieces(changed(parsed, timestamp=arrivals, key=keys, deliveries=kept)), sender)
        answers = [self._answered(answer) for answer in done]
        of_parsed = [kind for answer in answers for kind in answer.kinds]
        kinds: list[Kind | ItemError] = [_KINDS[kind] for kind in of_parsed]
        if _REFUSED in of_parsed:
            kinds = [self._failure(parsed.stream_ids[i], Kind.REFUSED) if kind == _REFUSED else kind for i, kind in enumerate(kinds)]
        if errors:
            rest = iter(kinds)
            kinds = [errors[i] if i in errors else next(rest) for i in range(len(deliveries))]
        return kinds, self._published(kept, answers) if replies else []

    def _check(self) -> None:
        """Raises StoreUnavailable while nothing may be scored."""
        if self._held:
            raise StoreUnavailable("The policy has not been read from the state store yet.")
        self.claim.check()

    async def _parse(self, events: Sequence[Event]) -> tuple[Parsed, dict[int, BadEvent]]:
        """As features.parse. Lines take far longer than numbers: between many characters of them others get their turn."""
        detector, now, ahead = self.detector, self._clock(), self._limits.max_future_seconds
        if detector.matcher is None:
            return parse(events, detector.manifest, now=now, max_future=ahead)
        parts: list[Parsed] = []
        errors: dict[int, BadEvent] = {}
        for here in _stretches(events):
            if parts:
                await asyncio.sleep(0)
            parsed, wrong = parse(events[here], detector.manifest, now=now, max_future=ahead, matcher=detector.matcher)
            parts.append(parsed)
            errors |= {here.start + i: error for i, error in wrong.items()}
        return parts[0] if len(parts) == 1 else Parsed.joined(parts), errors

    def _answered(self, answer: Answers | Exception) -> Answers:
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _published(self, deliveries: Sequence[Delivery], answers: Sequence[Answers]) -> list[Published]:
        """Results of those that have one of their own."""
        results, start = [], 0
        for answer in answers:
            some = deliveries[start : start + len(answer.kinds)]
            told = [i for i, kind in enumerate(answer.kinds) if kind in _PUBLISHED]
            for i, again in zip(told, self._replies.picked([some[i].event for i in told], answer, told), strict=True):
                reply = replace(again, duplicate=False) if again.duplicate else again  # as it came out, or would have, the first time
                results.append(Published(reply.stream_id, _result_id(reply, some[i]), _encoder.encode(reply)))
            start += len(answer.kinds)
        return results

    def sweeper(self, state_ttl: float, unread: float = 0.0) -> Sweeper:
        """What looks for its silent streams; `unread` as Sweeper takes it."""
        name, policy = self.detector.name, lambda: self.policy
        about = (name, self._codec, policy, self._store, self._metrics, state_ttl)
        return Sweeper(*about, clock=self._clock, claim=self.claim, unread=unread)

    def session_sweeper(self, unread: float = 0.0) -> SessionSweeper | None:
        """What ends its silent sessions, in place of a sweeper; None = the model knows no such sessions. `unread` as Sweeper takes it."""
        lines = self.detector.manifest.lines
        if lines is None or lines.session_seconds is None:
            return None
        about = (self.detector.name, self._codec, lines.session_seconds, self._end_sessions, self._store, self._metrics, self._clock)
        return SessionSweeper(*about, claim=self.claim, unread=unread)

    async def _end_sessions(self, stream_ids: Sequence[str], loaded: Loaded) -> None:
        """Step the end of the session of each of these streams, as sessions.End says."""
        lines = self.detector.manifest.lines
        if lines is None or self._held:  # without the policy nothing is judged
            return
        N, messages = len(stream_ids), [None] * len(stream_ids)
        x = np.full((N, self.detector.features), np.nan, np.float32)
        x[:, 0] = lines.end
        times, nothing = loaded.rows["last"]["timestamp"].copy(), np.zeros(N, np.bool_)
        readings = Readings(stream_ids, x, times, ~nothing, np.full(N, -1), np.zeros(N, np.uint64), messages=messages)
        work = _Work(self.policy, readings, np.arange(N), stream_ids, loaded, nothing, Standing.of(loaded.rows))
        outcomes = await self._step(work, nothing, {})
        became = await self._commit(work, self._replies.judged(outcomes), {})
        won = np.flatnonzero(became == WRITTEN)
        if len(won):
            self._metrics.ended.labels(self.detector.name).inc(len(won))
            self._tell(readings.take(won), self._replies.judged(Outcomes(outcomes.records[won], outcomes.kinds[won])))

    async def _submit(self, parsed: Parsed, sender: str) -> list[tuple[slice, Answers | OnsetError]]:
        """Answers to stretches of the events, in order. Raises where there would be none: then nothing is known to be committed."""
        if self._reorder is not None:
            done: Sequence[Answers | Exception] = await self._reorder.score(parsed)
            stretches = [slice(i, i + 1) for i in range(len(parsed))]
        else:
            pieces = self._pieces(parsed)
            stretches = [slice(i * MAX_BATCH, (i + 1) * MAX_BATCH) for i in range(len(pieces))]
            done = await self._batcher.submit(pieces, sender)
        failed = [answer for answer in done if isinstance(answer, Exception)]
        for error in failed:
            if len(failed) == len(done) or not isinstance(error, OnsetError):
                raise error
        return list(zip(stretches, cast("list[Answers | OnsetError]", done), strict=True))

    async def _submit_in_turn(self, parsed: Parsed) -> list[Answers | Exception]:
        """An answer for each event whose turn it is; what was held is not refused."""
        answers: list[Answers | Exception] = []
        pieces = self._pieces(parsed)
        for piece, answer in zip(pieces, await self._batcher.submit(pieces, admitted=True), strict=True):
            if isinstance(answer, Exception):
                answers += [answer] * piece.events
            else:
                answers += [answer.part(i, i + 1) for i in range(piece.events)]
        return answers

    def _pieces(self, parsed: Parsed) -> list[_Piece]:
        policy, lost = self.policy, set[str]()
        parts = [parsed] if 0 < len(parsed) <= MAX_BATCH else [parsed.part(i, i + MAX_BATCH) for i in range(0, len(parsed), MAX_BATCH)]
        return [_Piece(part, policy, lost) for part in parts]

    async def _handle(self, pieces: list[_Piece], waits: Waits) -> list[Answers]:
        """One batch: pieces of several clients, scored together; in two runs where the policy changed while they waited."""
        self._stage["queue"].observe(time.perf_counter() - min(piece.came for piece in pieces))
        parts: list[Answers] = []
        with tracing.batch(self.detector.name, pieces):
            if _verbose.isEnabledFor(logging.DEBUG):  # asking structlog would take some microseconds of each batch
                log.debug("batch", model=self.detector.name, requests=[tracing.shown(piece.origin.request) for piece in pieces])
            for _, run in itertools.groupby(pieces, key=lambda piece: id(piece.policy)):
                together = list(run)
                parts += await self._judge(together, together[0].policy, waits)
        return parts

    def _count_lines(self, answers: Answers) -> None:
        lines = self.detector.manifest.lines
        if lines is None:
            return
        outcomes = answers.batch.outcomes
        codes = outcomes.records["x"][outcomes.kinds == Kind.SCORED, 0]
        new, ends = int((codes < NEW + 0.5).sum()), int((codes == lines.end).sum())
        for match, count in (("new", new), ("template", len(codes) - new - ends)):
            self._metrics.lines.labels(self.detector.name, match).inc(count)

    async def _judge(self, pieces: list[_Piece], policy: Policy, waits: Waits) -> list[Answers]:
        readings = Readings.of([piece.parsed for piece in pieces], self.detector.features)
        self._metrics.batch.observe(len(readings))
        if any(not piece.lost.isdisjoint(piece.streams) for piece in pieces):
            answers = await self._run_rest(pieces, readings, policy, waits)
        else:
            answers = await self._run(readings, policy, waits)
        self._tell(readings, answers)
        parts, start = [], 0
        for piece in pieces:
            parts.append(answers.part(start, start + piece.events))
            start += piece.events
        if _some_failed(answers):
            for piece, part in zip(pieces, parts, strict=True):
                lost = [stream_id for stream_id, kind in zip(piece.parsed.stream_ids, part.kinds, strict=True) if kind == Kind.CONFLICT]
                piece.lost.update(lost)
        return parts

    async def _run_rest(self, pieces: list[_Piece], readings: Readings, policy: Policy, waits: Waits) -> Answers:
        """All but those whose stream is lost."""
        outcomes = Outcomes.unscored(readings, self._codec.record, policy.alpha)
        outcomes.kinds[:] = Kind.CONFLICT
        go = np.flatnonzero([stream_id not in piece.lost for piece in pieces for stream_id in piece.parsed.stream_ids])
        if len(go):
            ran = (await self._run(readings.take(go), policy, waits)).batch.outcomes
            outcomes.records[go], outcomes.kinds[go] = ran.records, ran.kinds
        return self._replies.judged(outcomes)

    def _tell(self, readings: Readings, answers: Answers) -> None:
        """Those that count and watch what is scored."""
        self._anomalies.inc(answers.anomalies)
        self._onsets.inc(answers.onsets)
        self._expected.inc(answers.expected)
        self._count_lines(answers)
        self._feed.tell(self.detector.name, readings.stream_ids, answers, readings.messages)

    async def _run(self, readings: Readings, policy: Policy, waits: Waits) -> Answers:
        answers, again = await self._attempt(readings, policy, waits)
        pending: Positions = np.flatnonzero(again)
        if len(pending) == 0:
            return answers
        outcomes = answers.batch.outcomes
        for _ in range(ATTEMPTS):
            answers, again = await self._attempt(readings.take(pending), policy, waits)
            attempt = answers.batch.outcomes
            outcomes.records[pending], outcomes.kinds[pending] = attempt.records, attempt.kinds
            pending = pending[again]
            if len(pending) == 0:
                break
        outcomes.kinds[pending] = Kind.CONFLICT
        return self._replies.judged(outcomes)

    async def _attempt(self, readings: Readings, policy: Policy, waits: Waits) -> tuple[Answers, NDArray[np.bool_]]:
        """Load, step, judge and commit once. Also says for each reading whether it must be tried again."""
        index: dict[str, int] = {}
        slots = np.array([index.setdefault(stream_id, len(index)) for stream_id in readings.stream_ids], np.intp)
        stream_ids = list(index)
        with self._stage["load"].time(), tracing.span("load"):
            loaded, copied = await self._load(stream_ids)
            await self.claim.confirm(loaded.origins)
            work = _Work(policy, readings, slots, stream_ids, loaded, copied, Standing.of(loaded.rows))
            trails = await self._trails_of_ageless(work)
        refused = (await self._refused(loaded.origins))[slots]
        with self._stage["step"].time(), tracing.span("step"):
            outcomes = await self._step(work, refused, trails)
        await self._answer_from_trails(work, outcomes, trails)
        answers = self._replies.judged(outcomes)
        with self._stage["commit"].time(), tracing.span("commit"):
            settled = self._settled(work, answers)
            waits()  # heard of once the next line has sent its call
            became = await self._commit(work, answers, settled)
        if (became == WRITTEN).all():
            return answers, np.zeros(len(readings), np.bool_)
        became = became[slots]
        fenced = (became == FENCED) & (readings.place["source"] != 0 if readings.place is not None else False)
        outcomes.kinds[fenced] = Kind.FENCED
        return self._replies.judged(outcomes) if fenced.any() else answers, (became != WRITTEN) & ~fenced

    async def _load(self, stream_ids: list[str]) -> tuple[Loaded, NDArray[np.bool_]]:
        """States of distinct streams, and [B] which of them are our copies."""
        places = self._copies.find(stream_ids)
        copied = places >= 0
        here, missing = np.flatnonzero(copied), np.flatnonzero(~copied)
        self._copied["hit"].inc(len(here))
        self._copied["miss"].inc(len(missing))
        if len(here) == 0:
            return await self._load_stored(stream_ids), copied
        rows, origins = self._codec.fresh(len(stream_ids)), np.full(len(stream_ids), Origin.STORED, np.uint8)
        self._copies.take(places[here], rows, here)
        tokens = self._codec.tokens(rows)
        if len(missing):
            rest = await self._load_stored([stream_ids[i] for i in missing.tolist()])
            rows[missing], origins[missing] = rest.rows, rest.origins
            for i, token in zip(missing.tolist(), rest.tokens, strict=True):
                tokens[i] = token
        return Loaded(rows, tokens, origins), copied

    async def _load_stored(self, stream_ids: Sequence[str]) -> Loaded:
        loaded = self._codec.decode(await self._store.load(self.detector.name, stream_ids))
        if self._overtaken:
            self._look_back(stream_ids, loaded)
        return loaded

    def _look_back(self, stream_ids: Sequence[str], loaded: Loaded) -> None:
        """Count states that are older than the copy was: the store has lost what it had acknowledged. One that was deleted and has begun
        again has later events.
        """
        last, versions = loaded.rows["last"]["timestamp"].tolist(), loaded.rows["version"].tolist()
        back = []
        for i, stream_id in enumerate(stream_ids):
            version, timestamp = self._overtaken.pop(stream_id, (0, 0.0))
            if loaded.origins[i] == Origin.STORED and versions[i] < version and last[i] < timestamp:
                back.append((stream_id, versions[i], version))
        self._metrics.set_back.inc(len(back))
        if back and time.monotonic() - self._set_back_told_at >= TOLD_SECONDS:
            self._set_back_told_at = time.monotonic()
            stream_id, version, acknowledged = back[0]
            about = {"model": self.detector.name, "streams": len(back), "stream_id": stream_id}
            log.error("states_set_back", **about, state_version=version, acknowledged=acknowledged)

    def _drop_overtaken(self, stream_ids: Sequence[str]) -> None:
        """Drop copies of these distinct streams, which are not what the store has."""
        if not stream_ids:  # nearly always
            return
        places = self._copies.find(stream_ids)
        here = np.flatnonzero(places >= 0)
        if len(here):
            rows = self._codec.fresh(len(here))
            self._copies.take(places[here], rows, np.arange(len(here)))
            if len(self._overtaken) > OVERTAKEN:  # of loads that failed
                self._overtaken.clear()
            known = zip(here.tolist(), rows["version"].tolist(), rows["last"]["timestamp"].tolist(), strict=True)
            self._overtaken |= {stream_ids[i]: (version, timestamp) for i, version, timestamp in known}
        self._copies.drop(stream_ids)

    async def _step(self, work: _Work, refused: NDArray[np.bool_], trails: dict[int, Rows]) -> Outcomes:
        """Step the states in place by what is not refused [N]; many events in the worker thread, which other batches use between parts."""
        outcomes = Outcomes.unscored(work.readings, self._codec.record, work.policy.alpha)
        if not refused.any():
            await self._advance(work, trails, outcomes)
            return outcomes
        outcomes.kinds[refused] = Kind.REFUSED
        go = np.flatnonzero(~refused)
        stepped = Outcomes(outcomes.records[go], outcomes.kinds[go])
        await self._advance(changed(work, readings=work.readings.take(go), slots=work.slots[go]), trails, stepped)
        outcomes.records[go], outcomes.kinds[go] = stepped.records, stepped.kinds
        return outcomes

    async def _advance(self, work: _Work, trails: dict[int, Rows], outcomes: Outcomes) -> None:
        readings, slots, rows = work.readings, work.slots, work.loaded.rows
        repeated = _known(trails, slots, readings.key) if trails else None
        parts = advancing(self.detector, work.policy, rows, readings, slots, repeated, outcomes)
        if len(slots) <= AT_ONCE_EVENTS and len(slots) == len(rows):
            while _goes_on(parts):
                pass
            return
        while await asyncio.get_running_loop().run_in_executor(self._worker, _goes_on, parts):
            pass

    async def _commit(self, work: _Work, answers: Answers, settled: dict[int, _Settled]) -> NDArray[np.uint8]:
        """Write the states that were stepped, and what queues are told; [B] WRITTEN, LOST or FENCED."""
        stream_ids, loaded, copied, slots, outcomes = work.stream_ids, work.loaded, work.copied, work.slots, answers.batch.outcomes
        scored = np.flatnonzero(outcomes.kinds == Kind.SCORED)
        events = np.bincount(slots[scored], minlength=len(stream_ids))
        changed = np.flatnonzero(events)
        # Without a compare a copy vouches for nothing: what it alone would answer is asked of the store.
        unknown = copied & (events == 0)
        became = np.where(unknown, LOST, WRITTEN).astype(np.uint8)
        self._drop_overtaken([stream_ids[slot] for slot in np.flatnonzero(unknown).tolist()])
        told = [slot for slot in settled if events[slot] == 0 and not unknown[slot]]
        if len(changed) == 0 and not told:
            return became
        trailed = self._trailed(loaded.rows, slots, events, outcomes)
        loaded.rows["trail_until"][slots[trailed]] = self._clock() + self._limits.result_ttl_seconds
        rows = loaded.rows if len(changed) == len(stream_ids) else loaded.rows[changed]
        # A stream that another replica wrote last is likely to be written by it again: a copy would be stale.
        stays = copied[changed] | (loaded.origins[changed] != Origin.STORED) | self._codec.ours(rows)
        watches, ttls = self._waits(rows, work.policy), self._ttls(rows)
        values = self._codec.encode(rows)
        trails = self._new_trails(trailed, slots, outcomes)
        logs = self._moved(work, scored, answers)
        writes = [
            Write(
                stream_ids[slot],
                loaded.tokens[slot],
                value,
                trails.get(slot, b""),
                watch,
                *settled.get(slot, _NOTHING),
                logs.get(slot, ()),
                ttl,
            )
            for slot, value, watch, ttl in zip(changed.tolist(), values, watches, ttls, strict=True)
        ]
        writes += [Write(stream_ids[slot], b"", b"", b"", None, *settled[slot]) for slot in told]
        self._copies.drop([stream_ids[slot] for slot in changed[~stays].tolist()])
        outcome = np.array(await self._store.commit(self.detector.name, writes), np.uint8)
        became[told] = outcome[len(changed) :]
        became[changed] = outcome = outcome[: len(changed)]
        written = outcome == WRITTEN
        kept = np.flatnonzero(written & stays)
        self._copies.keep([writes[i].stream_id for i in kept.tolist()], rows[kept])
        self._drop_overtaken([writes[i].stream_id for i in np.flatnonzero(~written).tolist()])
        if not written.all():
            self._copied["stale"].inc(int((copied[changed] & (outcome == LOST)).sum()))
            self._metrics.conflicts.inc(int((~copied[changed] & (outcome == LOST)).sum()))
        self._count_fresh(stream_ids, loaded.origins, changed[written])
        for i in scored[outcomes.records["flags"][scored] & EXPIRED != 0].tolist():
            if became[slots[i]] == WRITTEN:
                self.streams.accepted(stream_ids[slots[i]], outcomes.records[i], by="age")
        return became

    def _settled(self, work: _Work, answers: Answers) -> dict[int, _Settled]:
        """Slot → what its write does in queues of the store: results of events that are scored or late, acks of all that are done."""
        settled: dict[int, _Settled] = {}
        if work.readings.deliveries is None:
            return settled
        kinds, slot_of = answers.kinds, work.slots.tolist()
        done = [
            (i, delivery)
            for i, delivery in enumerate(work.readings.deliveries)
            if delivery is not None and delivery.lease is not None and kinds[i] <= _DONE
        ]
        told = [i for i, _ in done if kinds[i] in _TOLD]
        published = self._replies.picked([delivery.event for i, delivery in done if kinds[i] in _TOLD], answers, told)
        results = {i: _encoder.encode(result) for i, result in zip(told, published, strict=True)}
        for i, delivery in done:
            here = settled.setdefault(slot_of[i], _Settled([], []))
            here.acks.append((cast("Lease", delivery.lease), delivery.entry))
            if i in results:
                here.results.append(results[i])
        return settled

    def _waits(self, rows: Rows, policy: Policy) -> Sequence[float | None]:
        """As silence.waits; for a model of sessions as sessions.waits."""
        lines, now = self.detector.manifest.lines, self._clock()
        ended = None if lines is None else rows["last"]["x"][:, 0] == lines.end
        if lines is not None and ended is not None and lines.session_seconds is not None:
            return sessions.waits(rows, lines.session_seconds, now, ended)
        return waits(rows, policy.alpha, now, ended) if policy.silence else [None] * len(rows)

    def _ttls(self, rows: Rows) -> list[int]:
        """As Write.ttl: a session that is over is not remembered for as long as a stream that may speak again at any time."""
        lines = self.detector.manifest.lines
        if lines is None or lines.session_seconds is None:
            return [0] * len(rows)
        ended: list[bool] = (rows["last"]["x"][:, 0] == lines.end).tolist()
        return [self._limits.session_ttl_seconds if over else 0 for over in ended]

    def _moved(self, work: _Work, scored: Positions, answers: Answers) -> dict[int, list[bytes]]:
        """Slot → what this batch did to its alerts, for the log."""
        stream_ids, messages = work.stream_ids, work.readings.messages
        moves = list(work.standing.moves(work.slots[scored], answers.batch.outcomes.records[scored])) if self._alerting else []
        if not moves:
            return {}
        places = scored[[move.event for move in moves]].tolist()
        said = [None] * len(moves) if messages is None else [messages[i] for i in places]
        events = [Event(stream_id=stream_ids[move.slot], message=message) for move, message in zip(moves, said, strict=True)]
        results = self._replies.picked(events, answers, places)
        return alerts.moved(moves, self.detector.name, stream_ids, results)

    @staticmethod
    def _trailed(rows: Rows, slots: Positions, events: NDArray[np.intp], outcomes: Outcomes) -> Positions:
        """Events whose results a trail is to keep, those of a stream in its order: of several in this batch, all; and the stream's
        last one before it, where that was sent again: its result may have been lost on the way, and its place is now another's.
        """
        of_one = events[slots]
        kept = (outcomes.kinds == Kind.SCORED) & (of_one > 1)
        if outcomes.kinds.any():  # not all SCORED
            last = outcomes.records["version"] == rows["version"][slots] - of_one.astype(np.uint64)
            again = np.flatnonzero((outcomes.kinds == Kind.DUPLICATE) & (of_one > 0) & last)
            again = again[np.unique(slots[again], return_index=True)[1]]
            kept |= (outcomes.kinds == Kind.SCORED) & np.isin(slots, slots[again])
            kept[again] = True
        return np.flatnonzero(kept)

    def _new_trails(self, trailed: Positions, slots: Positions, outcomes: Outcomes) -> dict[int, bytes]:
        """Slot → blob of the results at `trailed`."""
        if len(trailed) == 0:
            return {}
        ordered = trailed[np.argsort(slots[trailed], kind="stable")]
        changed, sizes = np.unique(slots[ordered], return_counts=True)
        return dict(zip(changed.tolist(), self._codec.encode_trails(outcomes.records[ordered], sizes.tolist()), strict=True))

    async def _trails_of_ageless(self, work: _Work) -> dict[int, Rows]:
        """Trails that must be known before stepping: of streams with an event that has an id, and neither a sequence nor an age.

        Such an event sent again cannot be told from a new one: it has no time, or that of the stream's last event (many lines of a log
        have the same).
        """
        readings, slots, rows = work.readings, work.slots, work.loaded.rows
        ageless = ~readings.timed | (readings.timestamp == rows["last"]["timestamp"][slots])
        ageless &= (readings.key != 0) & (readings.sequence < 0)
        if not ageless.any():
            return {}
        if readings.place is not None:  # a position tells it
            ageless &= readings.place["source"] == 0
        return await self._load_trails(np.unique(slots[ageless & (rows["trail_until"][slots] > self._clock())]), work.stream_ids)

    async def _answer_from_trails(self, work: _Work, outcomes: Outcomes, trails: dict[int, Rows]) -> None:
        """Events that were not stepped because they are old get their stored result where a trail still holds it."""
        if not outcomes.kinds.any():  # all SCORED
            return
        readings, slots = work.readings, work.slots
        old = np.flatnonzero(np.isin(outcomes.kinds, (Kind.REPEATED, Kind.LATE)) & (readings.key != 0))
        if len(old) == 0:
            return
        trails = trails | await self._load_trails(np.setdiff1d(slots[old], list(trails)), work.stream_ids)
        found = {(slot, int(record["key"])): record for slot, records in trails.items() for record in records}
        for i in old.tolist():
            record = found.get((int(slots[i]), int(readings.key[i])))
            if record is not None:
                outcomes.records[i], outcomes.kinds[i] = record, Kind.DUPLICATE

    async def _load_trails(self, slots: Positions, stream_ids: Sequence[str]) -> dict[int, Rows]:
        """Slot → records of its trail."""
        if len(slots) == 0:
            return {}
        blobs = await self._store.load_trails(self.detector.name, [stream_ids[slot] for slot in slots.tolist()])
        return {
            slot: np.concatenate([self._codec.decode_trail(blob) for blob in trail])
            for slot, trail in zip(slots.tolist(), blobs, strict=True)
            if trail
        }

    async def _refused(self, origins: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """[B] whether a stream is new and the store has no room for it."""
        new: NDArray[np.bool_] = origins == Origin.NEW
        most = self._limits.max_streams
        if most is None:
            return np.zeros_like(new)
        if not new.any():
            return new
        if time.monotonic() - self._counted_at > COUNT_SECONDS:
            self._count, self._memory, self._counted_at = await self._store.count(), await self._store.memory(), time.monotonic()
        room = 0 if self._memory.nearly_full else most - self._count
        refused: NDArray[np.bool_] = new & (np.cumsum(new) > room)
        self._count += int((new & ~refused).sum())
        return refused

    def _replied(
        self, events: list[Event], answers: Answers | OnsetError, replies: Callable[[Sequence[Event], Answers], list[Reply]]
    ) -> list[Reply | ItemError]:
        if isinstance(answers, Answers) and not _some_failed(answers):
            return list(replies(events, answers))
        failures = self._failures([event.stream_id or "" for event in events], answers)
        if isinstance(answers, OnsetError):
            return list(failures.values())
        made: list[Reply | ItemError] = list(replies(events, answers))
        for i, error in failures.items():
            made[i] = error
        return made

    def _failures(self, stream_ids: Sequence[str], answers: Answers | OnsetError) -> dict[int, ItemError]:
        """Which events of a piece were not scored, by position."""
        if isinstance(answers, OnsetError):
            error = NotCommitted(f"{answers.detail} Earlier events of this request are scored; send this one again.")
            return dict.fromkeys(range(len(stream_ids)), error)
        if max(answers.kinds, default=0) < _FAILED:  # nearly always
            return {}
        return {i: self._failure(stream_ids[i], Kind(kind)) for i, kind in enumerate(answers.kinds) if kind >= _FAILED}

    def _failure(self, stream_id: str, kind: Kind) -> ItemError:
        if kind == Kind.CONFLICT:
            return StateConflict(f"Other replicas committed stream '{stream_id}' first, {ATTEMPTS} times: send the event again.")
        why = f"the store already holds {self._limits.max_streams} streams (ONSET_MAX_STREAMS)"
        if self._memory.nearly_full:
            why = f"the store's memory is {self._memory.fullness:.0%} full (maxmemory): beyond {NEARLY_FULL:.0%} known streams alone go on"
        return TooManyStreams(f"Stream '{stream_id}' is new and {why}.", "stream_id")

    def _count_fresh(self, stream_ids: Sequence[str], origins: NDArray[np.uint8], written: Positions) -> None:
        """Count streams that started afresh, once they are committed; what should not happen is logged with the stream."""
        for slot in written[origins[written] != Origin.STORED].tolist():
            origin = Origin(origins[slot])
            self._metrics.fresh.labels(origin.name.lower()).inc()
            if origin != Origin.NEW:
                log.warning("stream_started_afresh", stream_id=stream_ids[slot], model=self.detector.name, reason=origin.name.lower())


def _some_failed(answers: Answers) -> bool:
    """Hardly ever."""
    return max(answers.kinds, default=0) >= _FAILED


def _identity(delivery: Delivery, *, replies: bool) -> int:
    """Of an event that names none: its place in a queue, by which its stored result is found, or else its time and content; 0 = none."""
    if delivery.source:
        return event_key(f"{delivery.source}/{delivery.position}", None) if replies and delivery.lease is None else 0
    return _content_key(delivery.event)


def _content_key(event: Event) -> int:
    """Identity of an event by its time and content; 0 = it has no time."""
    if event.timestamp is None:
        return 0
    return event_key(f"{event.timestamp} {event.values if event.message is None else event.message}", None)


def _result_id(reply: Result, delivery: Delivery) -> str:
    """Its place in its stream, with file and time: one that starts afresh counts from 1 again. Of a late event's result too, whose stream
    has a result of that version already.
    """
    named = f"{reply.model}/{reply.model_version}/{reply.stream_id}/{reply.state_version}/{reply.timestamp}"
    if not reply.late:
        return named
    place = f"{delivery.source}-{delivery.position}" if delivery.source else str(reply.timestamp)
    return f"{named}/late/{reply.event_id or place}"


def _stretches(events: Sequence[Event]) -> Iterator[slice]:
    """All of them, at least one stretch, of at most MATCHED_CHARACTERS or a single line."""
    start = characters = 0
    for i, event in enumerate(events):
        length = len(event.message or "")
        if start < i and characters + length > MATCHED_CHARACTERS:
            yield slice(start, i)
            start, characters = i, 0
        characters += length
    yield slice(start, len(events))


def _goes_on(parts: Iterator[None]) -> bool:
    """Compute the next part; whether there may be another."""
    try:
        next(parts)
    except StopIteration:
        return False
    return True


def _known(trails: dict[int, Rows], slots: Positions, key: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """[N] whether a reading's identity is in its stream's trail."""
    known = np.zeros(len(slots), np.bool_)
    for slot, records in trails.items():
        here = slots == slot
        known[here] = np.isin(key[here], records["key"][records["key"] != 0])
    return known
