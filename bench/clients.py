"""The senders of a soak: streams of events, delivered in order to random replicas until acknowledged, and again later, shuffled.

Kept streams suffer nothing but the kills. Damaged streams also have their stored values corrupted, deleted and expired under way
(`Vandal`); a client delivers theirs again itself, one request after the other, so that the order of all their answers is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import msgspec
from redis.exceptions import RedisError

from bench.ledger import Answer, Late, Ledger, Sent
from bench.victims import Replica, Store
from service.events import Event, Result
from service.state import SEEN, TOKEN
from service.stores.redis import state_key

REQUEST_SECONDS = 30.0
"""Longer than any request the service still works on: what is sent again is never overtaken by its own first try."""
BACKOFF_SECONDS = 0.03
PAUSE_SECONDS = 0.02
"""Mean rest of a client between two requests, so that the load stays bounded."""
MOST_EVENTS = 6
"""Of one stream in a bulk; with those waiting to be delivered again no more than SEEN."""
MOST_STREAMS = 6
SINGLE, HEDGED = 0.3, 0.2
"""Shares of the requests: one event on its own; one request sent to all replicas at once."""

FLIP = """
if redis.call('STRLEN', KEYS[1]) * 8 <= tonumber(ARGV[1]) then return 0 end
redis.call('SETBIT', KEYS[1], ARGV[1], 1 - redis.call('GETBIT', KEYS[1], ARGV[1]))
return 1
"""


class Kind(enum.Enum):
    """How a stream's events are told apart and ordered."""

    TIMED = "event id and timestamp"
    SEQUENCED = "sequence alone"
    FULL = "event id, sequence and timestamp"
    BARE = "event id alone"


class Source:
    """One stream: a seeded random walk with a jump now and then."""

    def __init__(self, stream_id: str, kind: Kind, *, kept: bool, seed: int) -> None:
        self.stream_id, self.kind, self.kept = stream_id, kind, kept
        self._rng = random.Random(f"{seed}/{stream_id}")
        self._level = self._rng.uniform(-100, 100)
        self._scale = 10 ** self._rng.uniform(-2, 2)
        self._time = 1.7e9 + self._rng.random()
        self.sent = 0
        self.again: list[Sent] = []
        """Answered, and still to be delivered again."""

    def next(self) -> Sent:
        """The next event of the stream."""
        index, self.sent = self.sent, self.sent + 1
        self._level += self._rng.gauss(0, 1)
        self._time += self._rng.uniform(1, 10)
        jump = self._rng.choice((-30.0, 30.0)) if self._rng.random() < 0.01 else 0.0
        identified = self.kind is not Kind.SEQUENCED
        return Sent(
            index,
            Event(
                stream_id=self.stream_id,
                values={"value": round(self._scale * (self._level + jump), 6)},
                timestamp=round(self._time, 3) if self.kind in (Kind.TIMED, Kind.FULL) else None,
                event_id=f"{self.stream_id}-{index}" if identified else None,
                sequence=index * 3 if self.kind in (Kind.SEQUENCED, Kind.FULL) else None,
            ),
        )

    @property
    def room(self) -> int:
        """How many events may be sent before one of `again` is. A bare id is known among the stream's last SEEN alone."""
        if self.kind is not Kind.BARE or not self.again:
            return MOST_EVENTS
        return max(0, SEEN - (self.sent - min(sent.index for sent in self.again)))


class NotAnsweredError(Exception):
    """Not acknowledged: to be sent again."""


class UnexpectedAnswerError(Exception):
    """An answer that no client can do anything with."""


class Door(Protocol):
    """Where events go in. Another way in needs another one of these, and nothing else here."""

    @property
    def replicas(self) -> int: ...

    async def deliver(self, events: Sequence[Event], replica: int) -> list[Answer]:
        """One try. Raises NotAnsweredError, UnexpectedAnswerError."""

    async def forget(self, stream_id: str, replica: int) -> None:
        """Delete a stream. Raises NotAnsweredError, UnexpectedAnswerError."""


class RestDoor:
    """REST of real processes."""

    def __init__(self, replicas: Sequence[Replica], client: httpx.AsyncClient, rng: random.Random, counts: Counter[str]) -> None:
        self._replicas = replicas
        self._client, self._rng, self._counts = client, rng, counts

    @property
    def replicas(self) -> int:
        return len(self._replicas)

    async def deliver(self, events: Sequence[Event], replica: int) -> list[Answer]:
        alone = len(events) == 1 and self._rng.random() < 0.7
        lines = not alone and self._rng.random() < 0.5
        encoded = [msgspec.json.encode(event) for event in events]
        body = encoded[0] if alone else b"\n".join(encoded) if lines else b"[" + b",".join(encoded) + b"]"
        headers = {"content-type": "application/x-ndjson" if lines else "application/json"}
        response = await self._ask("POST", f"{self._replicas[replica].url}/v1/events", content=body, headers=headers)
        items = [msgspec.json.decode(part) for part in response.content.splitlines()] if lines else msgspec.json.decode(response.content)
        answers = [self._answer(item) for item in (items if isinstance(items, list) else [items])]
        if len(answers) != len(events):
            raise UnexpectedAnswerError(f"{len(answers)} answers to {len(events)} events")
        return answers

    async def forget(self, stream_id: str, replica: int) -> None:
        await self._ask("DELETE", f"{self._replicas[replica].url}/v1/streams/{stream_id}")

    async def _ask(self, method: str, url: str, **content: Any) -> httpx.Response:
        try:
            response = await self._client.request(method, url, timeout=REQUEST_SECONDS, **content)
        except httpx.TimeoutException as error:
            raise UnexpectedAnswerError(f"no answer within {REQUEST_SECONDS:g} s") from error
        except httpx.TransportError as error:
            self._counts["connection_lost"] += 1
            raise NotAnsweredError from error
        if response.status_code in (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS):
            self._counts["refused"] += 1
            raise NotAnsweredError
        late = response.status_code == httpx.codes.CONFLICT and method == "POST"
        unknown = response.status_code == httpx.codes.NOT_FOUND and method == "DELETE"
        if not (response.is_success or late or unknown):
            raise UnexpectedAnswerError(f"{response.status_code}: {response.text[:500]}")
        return response

    def _answer(self, item: dict[str, Any]) -> Answer:
        if "detail" not in item:
            return msgspec.convert(item, Result)
        if item.get("late"):
            return Late()
        if item["status"] in (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS):
            self._counts["refused_in_bulk"] += 1
            raise NotAnsweredError
        raise UnexpectedAnswerError(str(item))


@dataclass
class Pool:
    """Answered events of kept streams, to be delivered again by anyone."""

    waiting: list[Sent]
    rng: random.Random

    def draw(self, most: int) -> list[Sent]:
        """Some of them, by chance."""
        drawn = []
        for _ in range(min(most, len(self.waiting))):
            at = self.rng.randrange(len(self.waiting))
            self.waiting[at], self.waiting[-1] = self.waiting[-1], self.waiting[at]
            drawn.append(self.waiting.pop())
        return drawn


class Client:
    """Sends its own streams, each one's events in order, and delivers again what was answered, its own and others'."""

    def __init__(self, door: Door, ledger: Ledger, sources: Sequence[Source], pool: Pool, rng: random.Random) -> None:
        self.sources = sources
        self._door, self._ledger, self._pool, self._rng = door, ledger, pool, rng

    async def run(self, stopped: asyncio.Event) -> None:
        """Send until stopped, then deliver again what still has to be. Raises UnexpectedAnswerError."""
        while not stopped.is_set():
            await self._turn()
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_SECONDS))
        while rest := self._pool.draw(50) or list(self._left()):
            await self._deliver(rest, hedged=False)

    async def step(self, source: Source) -> None:
        """A new event of this stream alone. Raises UnexpectedAnswerError."""
        await self._deliver([source.next()], hedged=False)

    def _chosen(self, among: Sequence[Source]) -> list[Source]:
        return self._rng.sample(among, 1 if self._rng.random() < SINGLE else min(MOST_STREAMS, len(among)))

    async def _turn(self) -> None:
        """One request: new events of some streams, and old ones."""
        hedged = self._rng.random() < HEDGED
        sources = self._chosen([source for source in self.sources if source.kept] if hedged else self.sources)
        alone = len(sources) == 1
        fresh = [(source, source.next()) for source in sources for _ in range(1 if alone and source.room else self._drawn(source.room))]
        old = [] if alone and fresh else list(self._redelivered(sources))
        items = [*old, *(sent for _, sent in fresh)]
        await self._deliver(items, hedged=hedged)
        for source, sent in fresh:
            if source.kept and source.kind is not Kind.BARE:
                self._pool.waiting.append(sent)
            elif source.kept or sent.index != self._ledger.book(sent.stream_id).first:
                source.again.append(sent)

    def _drawn(self, most: int) -> int:
        return self._rng.randint(0, most)

    def _redelivered(self, sources: Sequence[Source]) -> Iterator[Sent]:
        """Old events for this request: some of its streams', shuffled, and some of anyone's."""
        for source in sources:
            self._rng.shuffle(source.again)
            count = len(source.again) if source.kind is Kind.BARE else self._drawn(len(source.again))
            for _ in range(count):
                yield source.again.pop()
        yield from self._pool.draw(self._drawn(MOST_EVENTS * MOST_STREAMS))

    def _left(self) -> Iterator[Sent]:
        for source in self.sources:
            while source.again:
                yield source.again.pop()

    async def _deliver(self, items: Sequence[Sent], *, hedged: bool) -> None:
        """Until it is acknowledged, to a replica by chance each time, or to all of them; then into the ledger."""
        if not items:
            return
        began = time.monotonic()
        while True:
            try:
                if hedged:
                    answered = await self._everywhere(items)
                else:
                    answers = await self._door.deliver([item.event for item in items], self._rng.randrange(self._door.replicas))
                    answered = list(zip(items, answers, strict=True))
                break
            except NotAnsweredError:
                self._ledger.counts["retry"] += 1
                await asyncio.sleep(self._rng.expovariate(1 / BACKOFF_SECONDS))
        self._ledger.counts["request"] += 1
        self._ledger.counts["hedged_request"] += hedged
        self._ledger.counts["answer"] += len(answered)
        await self._ledger.enter(answered, began)

    async def _everywhere(self, items: Sequence[Sent]) -> list[tuple[Sent, Answer]]:
        """The same request to all replicas at once; of each event the answer that says it was stepped comes first."""
        events = [item.event for item in items]
        tries = (self._door.deliver(events, replica) for replica in range(self._door.replicas))
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        answers = [outcome for outcome in outcomes if isinstance(outcome, list)]
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not (isinstance(outcome, NotAnsweredError) and answers):
                raise outcome
        return [
            (item, answer)
            for i, item in enumerate(items)
            for answer in sorted((each[i] for each in answers), key=lambda answer: not isinstance(answer, Result) or answer.duplicate)
        ]


class Vandal:
    """Damages stored values of some streams, one damage of a stream at a time."""

    def __init__(self, store: Store, door: Door, ledger: Ledger, model: str, sources: Sequence[Source], rng: random.Random) -> None:
        self._store, self._door, self._ledger, self._model, self._sources, self._rng = store, door, ledger, model, sources, rng

    async def run(self, stopped: asyncio.Event, mean_seconds: float) -> None:
        """Until stopped. Raises UnexpectedAnswerError."""
        while not stopped.is_set():
            await asyncio.sleep(self._rng.expovariate(1 / mean_seconds))
            whole = [source for source in self._sources if source.sent and not self._ledger.book(source.stream_id).damages]
            if whole:
                damage = self._rng.choice((self.flip, self.flip, self.delete, self.expire))
                await damage(self._rng.choice(whole).stream_id)

    async def flip(self, stream_id: str) -> None:
        """One bit of the value, any."""
        key = state_key(self._model, stream_id)
        size, _ = await self._insist(lambda: self._store.client.strlen(key))
        bit = self._rng.randrange(8 * size or 1)
        self._ledger.damage(stream_id, fatal=False, applied=False)
        flipped, tries = await self._insist(lambda: self._store.client.eval(FLIP, 1, key, bit))
        # After an answer that was lost the bit may have been flipped twice.
        fatal = bool(flipped) and tries == 1 and bit // 8 in range(TOKEN.start, TOKEN.stop)
        self._ledger.damage(stream_id, fatal=fatal, applied=True)
        self._ledger.counts["bit_flip"] += 1

    async def delete(self, stream_id: str) -> None:
        """By the API."""
        while True:
            self._ledger.damage(stream_id, fatal=False, applied=False)
            try:
                await self._door.forget(stream_id, self._rng.randrange(self._door.replicas))
                break
            except NotAnsweredError:  # it may have been deleted nevertheless
                await asyncio.sleep(BACKOFF_SECONDS)
        self._ledger.damage(stream_id, fatal=True, applied=True)
        self._ledger.counts["delete"] += 1

    async def expire(self, stream_id: str) -> None:
        """Its time to live is over in a millisecond, unless a commit gives it another."""
        self._ledger.damage(stream_id, fatal=False, applied=False)
        await self._insist(lambda: self._store.client.pexpire(state_key(self._model, stream_id), 1))
        await asyncio.sleep(0.005)
        self._ledger.damage(stream_id, fatal=False, applied=True)
        self._ledger.counts["expiry"] += 1

    async def _insist(self, ask: Callable[[], Any]) -> tuple[Any, int]:
        """The store's answer, and the tries until it gave one."""
        for tries in itertools.count(1):
            with contextlib.suppress(RedisError, OSError):
                return await ask(), tries
            await asyncio.sleep(BACKOFF_SECONDS)
        raise AssertionError
