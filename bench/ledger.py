"""Holds every answer of a soak against one uninterrupted run of the same events, as it comes in.

The uninterrupted run is a Scorer on a memory store in this process, fed with each event once, in the order of its `state_version`. A
stream's *life* is what it has learned since its last fresh start; the ledger keeps who was stepped in it:

    a step        not answered before: it must be the next version of the life, and equal the uninterrupted run in every field
    a duplicate   answered before: `duplicate` with exactly that answer, or without a result, or late; never stepped again in this life.
                  Not answered before it has its result, but where the stream was damaged since it was first asked for
    a fresh start version 1 of a stream that had a life: only where the harness damaged it since, at most once for each damage. Damage that
                  leaves nothing to go on with (deleted, a token that changed) must lead to one, any other may be healed by a good copy

The first thing wrong with a stream is a violation; the stream is no longer looked at.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
from msgspec.structs import replace

from service.detector import Detector
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.state import SILENT, Origin, StateCodec
from service.stores.memory import MemoryStore

CENTURY = 100 * 365 * 24 * 3600
VOLATILE = frozenset({"crc", "nonce", "trail_until", "deadline", "watch_until", "silent_since", "pace", "pace_spread", "pace_longest"})
"""Fields of a value that depend on chance or on the time of arrival: the longest pause is of arrivals, too, and how much a gap beyond what
is usual counts for in pace and spread is by the longest. No score depends on them."""


@dataclass(frozen=True)
class Sent:
    """One event of a stream, the `index`-th from 0 on."""

    index: int
    event: Event

    @property
    def stream_id(self) -> str:
        return self.event.stream_id or ""


@dataclass(frozen=True)
class Late:
    """The answer to a single event that is older than its stream's last."""


Answer = Result | Late


class _WrongError(Exception):
    """What is wrong with an answer."""


@dataclass(frozen=True)
class Violation:
    stream_id: str
    event: str
    what: str


@dataclass(frozen=True)
class Damage:
    """Something done to a stored value that its stream may not survive. `fatal` = it cannot."""

    fatal: bool
    applied_at: float  # monotonic; inf = not known to be yet
    met_life: bool
    """Whether a step of the stream had been answered by then: else nobody could tell the life that ended from the one that began."""


@dataclass
class Book:
    """What is known of one stream."""

    model_version: str = ""
    life: set[int] = field(default_factory=set)
    """Events stepped since the last fresh start."""
    answers: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    """Digests of the results that each event was given, one for each life."""
    first: int = -1
    """The event that began the life."""
    damages: list[Damage] = field(default_factory=list)
    """Since the last step that showed their outcome."""
    resets: int = 0
    """Fresh starts since then."""
    broken: bool = False


class Reference:
    """One model's uninterrupted run."""

    def __init__(self, detector: Detector) -> None:
        self._name = detector.name
        self._codec = StateCodec(detector.features, detector.state_size, detector.fingerprint)
        self._store = MemoryStore(state_ttl=CENTURY, result_ttl=CENTURY)
        policy = Policy(tau=detector.manifest.age_constant)
        self._scorer = Scorer(detector, policy, self._store, Metrics(), Limits(max_queue_events=1_000_000))

    def start(self) -> None:
        self._scorer.start()

    async def stop(self) -> None:
        await self._scorer.drain(5)

    async def forget(self, stream_id: str) -> None:
        await self._scorer.streams.forget(stream_id)

    async def step(self, events: list[Event]) -> list[Result]:
        answers = await self._scorer.score(events)
        results = [answer for answer in answers if isinstance(answer, Result)]
        if len(results) != len(events):
            raise RuntimeError(f"The uninterrupted run refused an event: {answers}.")
        return results

    async def difference(self, stream_id: str, value: bytes | None, ignored: frozenset[str] = frozenset()) -> str:
        """The fields, other than those `ignored`, in which a stored value is not what the uninterrupted run arrived at; "" = none."""
        both = self._codec.decode([value, *await self._store.load(self._name, [stream_id])])
        if both.origins[0] != Origin.STORED:
            return f"the value itself ({Origin(both.origins[0]).name.lower()})"
        both.rows["flags"] &= np.uint32(~SILENT & 0xFFFFFFFF)
        served, wanted = both.rows
        fields = [name for name in self._codec.value.names or () if name not in VOLATILE | ignored]
        return ", ".join(name for name in fields if served[name].tobytes() != wanted[name].tobytes())


class Ledger:
    """All streams' books. `references` by model version."""

    def __init__(self, references: Mapping[str, Reference]) -> None:
        self._references = references
        self.books: dict[str, Book] = {}
        self.counts: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.last_step = time.monotonic()

    def violation(self, stream_id: str, event: str, what: str) -> None:
        self.violations.append(Violation(stream_id, event, what))

    def damage(self, stream_id: str, *, fatal: bool, applied: bool) -> None:
        """To be told before anything is done to a stream's value, and again once it has been (`applied`), with what it came to."""
        book = self.book(stream_id)
        if applied:
            met_life = book.damages[-1].met_life
            book.damages[-1] = Damage(fatal and met_life, time.monotonic(), met_life)
        else:
            book.damages.append(Damage(fatal, float("inf"), bool(book.life)))

    async def enter(self, answered: Iterable[tuple[Sent, Answer]], asked_at: float) -> None:
        """Answers of one request that was first sent at `asked_at` (monotonic), in order."""
        steps: list[tuple[Sent, Result]] = []
        for sent, answer in answered:
            book = self.book(sent.stream_id)
            if book.broken:
                continue
            try:
                fresh = self._judged(book, sent, answer, asked_at)
                if fresh is None:
                    continue
                self._settle(book, asked_at)
            except _WrongError as error:
                self._break(book, sent, str(error))
                continue
            assert isinstance(answer, Result)
            if fresh:
                await self._compare(steps)
                steps = []
                await self._references[answer.model_version].forget(sent.stream_id)
            steps.append((sent, answer))
        await self._compare(steps)

    async def check_stored(self, stream_id: str, value: bytes | None) -> None:
        """The stored value at the end, against the uninterrupted run's."""
        book = self.book(stream_id)
        if book.broken:
            return
        wrong = await self._references[book.model_version].difference(stream_id, value)
        if wrong:
            self.violation(stream_id, "stored value", f"differs from the uninterrupted run in {wrong}")

    def _judged(self, book: Book, sent: Sent, answer: Answer, asked_at: float) -> bool | None:
        """Enter one answer into its book: None = no step, else whether the step began a life. Raises _WrongError."""
        if other := _echo(sent, answer):
            raise _WrongError(other)
        known = book.answers.get(sent.index, ())
        if isinstance(answer, Late) or not answer.expected:
            self.counts["late" if isinstance(answer, Late) or answer.late else "duplicate_without_result"] += 1
            # What is deleted between two looks of the service at the stream takes the result of a lost reply with it.
            if not known and not any(damage.applied_at > asked_at for damage in book.damages):
                raise _WrongError(f"it was never answered, and now without a result: {answer}")
            return None
        digest = _digest(answer)
        if answer.duplicate and digest in known:
            self.counts["duplicate_with_result"] += 1
            return None
        fresh = self._begins(book, sent, answer)
        if fresh:
            self.counts["fresh_start"] += 1
            book.resets += 1
            book.life.clear()
        if not book.life:
            book.first, book.model_version = sent.index, answer.model_version
        book.life.add(sent.index)
        book.answers[sent.index] = (*known, digest)
        self.counts["step"] += 1
        self.counts["answered_by_retry"] += answer.duplicate
        self.last_step = time.monotonic()
        return fresh

    def _begins(self, book: Book, sent: Sent, answer: Result) -> bool:
        """Whether a step is the first of another life; False = it goes on with this one. Raises _WrongError where it is neither."""
        version, repeated = answer.state_version, sent.index in book.life
        other_model = bool(book.life) and answer.model_version != book.model_version
        if version == len(book.life) + 1 and not repeated and not other_model:
            return False
        if version == 1 and (other_model or book.resets < len(book.damages)):
            return True
        if answer.duplicate and sent.index in book.answers:
            raise _WrongError(f"its stored result is not the one it was given: {answer}")
        raise _WrongError(f"stepped{' again' if repeated else ''} as version {version} of a stream at version {len(book.life)}: {answer}")

    def _settle(self, book: Book, asked_at: float) -> None:
        """A step asked for after all damage shows what became of it. Raises _WrongError."""
        if not book.damages or asked_at < max(damage.applied_at for damage in book.damages):
            return
        resets, damages = book.resets, list(book.damages)
        book.damages.clear()
        book.resets = 0
        if resets == 0:
            if any(damage.fatal for damage in damages):
                raise _WrongError("the stream lived on although nothing was left to live on")
            self.counts["healed"] += 1

    async def _compare(self, steps: list[tuple[Sent, Result]]) -> None:
        """Results of new steps, which must be those of the uninterrupted run."""
        for version in {result.model_version for _, result in steps}:
            mine = [(sent, result) for sent, result in steps if result.model_version == version]
            events = [replace(sent.event, timestamp=result.timestamp) for sent, result in mine]
            for (sent, got), want in zip(mine, await self._references[version].step(events), strict=True):
                book = self.book(sent.stream_id)
                if not book.broken and replace(got, duplicate=False) != want:
                    self._break(book, sent, f"answered {differing(got, want)}")

    def _break(self, book: Book, sent: Sent, what: str) -> None:
        book.broken = True
        self.violation(sent.stream_id, f"{sent.index} ({sent.event.event_id or sent.event.sequence})", what)

    def book(self, stream_id: str) -> Book:
        return self.books.setdefault(stream_id, Book())


def _echo(sent: Sent, answer: Answer) -> str:
    """Which other event the answer is to; "" = it is to this one."""
    if isinstance(answer, Late):
        return ""
    event = sent.event
    same = (answer.stream_id, answer.event_id) == (event.stream_id, event.event_id)
    same = same and event.timestamp in (None, answer.timestamp)
    return "" if same else f"answered with stream '{answer.stream_id}', event {answer.event_id}, timestamp {answer.timestamp}"


def _digest(result: Result) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(replace(result, duplicate=False)), digest_size=16).digest()


def differing(got: Result, want: Result) -> str:
    names = [name for name in Result.__struct_fields__ if name != "duplicate" and getattr(got, name) != getattr(want, name)]
    return "; ".join(f"{name} {getattr(got, name)!r}, the uninterrupted run {getattr(want, name)!r}" for name in names)
