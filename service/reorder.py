"""Holds the events of each stream until it is their turn, for senders whose events overtake each other. Off by default.

    an event is released   when its `sequence` follows the one released last, at once
                           when it, or a later one of its stream, has been held for `seconds`
                           when more than `events` of its stream are held: the earliest of them
    with it                all earlier ones of its stream

Order is by `sequence` where an event has one, else by `timestamp`; an event with neither is not held. What comes after its turn is
released too, and found late by the scorer. Nothing held is answered or acknowledged, so a crash loses nothing: its sender has it still.
Each replica holds for itself: all events of a stream must come to one.
"""

from __future__ import annotations

import asyncio
import bisect
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from service.errors import Overloaded
from service.events import Parsed

Answer = TypeVar("Answer")

REMEMBERED = 100_000
"""Streams whose last released sequence is known; others wait out their time once."""


@dataclass(frozen=True, order=True)
class _Held(Generic[Answer]):
    place: int | float
    """In the stream's order: sequence, which a float would round beyond 2^53, or timestamp."""
    arrival: int
    due: float = field(compare=False)
    event: Parsed = field(compare=False)
    future: asyncio.Future[Answer] = field(compare=False)

    @property
    def sequence(self) -> int:
        return self.event.sequence[0]


class Reorder(Generic[Answer]):
    """One owner of all that is held. `submit` gets released events in their order and returns an answer for each."""

    def __init__(self, submit: Callable[[Parsed], Awaitable[Sequence[Answer]]], *, seconds: float, events: int, max_held: int) -> None:
        """`events` of one stream are held at most, `max_held` of all; beyond that `score` raises Overloaded."""
        self._submit = submit
        self._seconds, self._events, self._max_held = seconds, events, max_held
        self._streams: dict[str, list[_Held[Answer]]] = {}
        self._dues: deque[tuple[float, str]] = deque()
        """In order, since all events are held for as long at most."""
        self._released: OrderedDict[str, int] = OrderedDict()
        self._arrivals = 0
        self.held = 0
        """Events that wait for their turn."""
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def score(self, parsed: Parsed) -> list[Answer | Exception]:
        """An answer for each event, or the error that `submit` raised for it, once the last of them has had its turn."""
        if self.held + len(parsed) > self._max_held:
            raise Overloaded(f"{self.held} events are held until their turn; {self._max_held} may be.", retry_after=1)
        loop = asyncio.get_running_loop()
        due = loop.time() + self._seconds
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in range(len(parsed))]
        ready: list[_Held[Answer]] = []
        for i, (stream_id, future) in enumerate(zip(parsed.stream_ids, futures, strict=True)):
            self._arrivals += 1
            sequence, timed = parsed.sequence[i], parsed.timed[i]
            place = sequence if sequence >= 0 else parsed.timestamp[i]
            held = _Held(place, self._arrivals, due, parsed.part(i, i + 1), future)
            if sequence < 0 and not timed:
                ready.append(held)
                continue
            bisect.insort(self._streams.setdefault(stream_id, []), held)
            self.held += 1
        for stream_id in dict.fromkeys(parsed.stream_ids):
            ready += self._turns(stream_id, now=due - self._seconds)
            if stream_id in self._streams:
                self._dues.append((due, stream_id))
        self._send(ready)
        self._set_timer()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        return cast("list[Answer | Exception]", answers)  # futures fail with Exceptions only, see _answer

    def release(self) -> None:
        """Hold nothing from here on; what is held is released in order."""
        self._seconds = 0.0
        for stream_id in list(self._streams):
            self._send(self._take(stream_id, len(self._streams[stream_id])))
        self._dues.clear()

    async def flush(self) -> None:
        """The same, and wait until it is answered."""
        self.release()
        while self._sending:
            await asyncio.wait(self._sending)

    def _turns(self, stream_id: str, now: float) -> list[_Held[Answer]]:
        """Take what is released of one stream."""
        held = self._streams.get(stream_id, [])
        count = max(len(held) - self._events, 0)
        count = max([count, *(i for i, event in enumerate(held, 1) if event.due <= now)])
        expected = held[count - 1].sequence + 1 if count else self._released.get(stream_id, -1) + 1
        while count < len(held) and expected > 0 and 0 <= held[count].sequence <= expected:
            expected = max(expected, held[count].sequence + 1)
            count += 1
        return self._take(stream_id, count)

    def _take(self, stream_id: str, count: int) -> list[_Held[Answer]]:
        if count == 0:
            return []
        held = self._streams.pop(stream_id)
        taken, rest = held[:count], held[count:]
        self.held -= count
        if rest:
            self._streams[stream_id] = rest
        if taken[-1].sequence >= 0:
            self._released[stream_id] = max(taken[-1].sequence, self._released.pop(stream_id, -1))
            if len(self._released) > REMEMBERED:
                self._released.popitem(last=False)
        return taken

    def _send(self, released: Sequence[_Held[Answer]]) -> None:
        waiting = [held for held in released if not held.future.done()]  # the others' clients left
        if waiting:
            task = asyncio.create_task(self._answer(waiting), name="released")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _answer(self, waiting: Sequence[_Held[Answer]]) -> None:
        answers: Sequence[Answer | Exception]
        try:
            answers = await self._submit(Parsed.joined(held.event for held in waiting))
        except Exception as error:  # whatever it is, it is the clients' to hear
            answers = [error] * len(waiting)
        for held, answer in zip(waiting, answers, strict=True):
            if held.future.done():
                continue
            if isinstance(answer, Exception):
                held.future.set_exception(answer)
            else:
                held.future.set_result(answer)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._dues:
            self._timer = asyncio.get_running_loop().call_at(self._dues[0][0], self._time)

    def _time(self) -> None:
        now = asyncio.get_running_loop().time()
        due: dict[str, None] = {}
        while self._dues and self._dues[0][0] <= now:
            due[self._dues.popleft()[1]] = None
        ready = [held for stream_id in due for held in self._turns(stream_id, now)]
        self._send(ready)
        self._set_timer()
