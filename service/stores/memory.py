"""A store in a dict, for unit tests; `tests/contracts/test_stores.py` holds it equal to the real one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

from service.events import Lease
from service.state import TOKEN
from service.stores import FENCED, LOST, SILENT, TRAIL_COMMITS, WRITTEN, Memory, Page, Write

_Key = tuple[str, str]


class MemoryStore:
    """Implements StateStore. `clock` gives seconds; values older than their time to live are gone.

    The alert log is `log`. Of a queue there are `leases` (key → token), the entries `pending` of each stream's group and those `kept`
    in it, and the `results`.
    """

    def __init__(self, *, state_ttl: int, result_ttl: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._state_ttl = state_ttl
        self._result_ttl = result_ttl
        self._clock = clock
        self._states: dict[_Key, tuple[float, bytes]] = {}
        self._trails: dict[_Key, tuple[float, list[bytes]]] = {}
        self._watches: dict[_Key, float] = {}
        self._policy: dict[str, bytes] = {}
        self._held: dict[str, tuple[float, str]] = {}
        self._notes: dict[str, tuple[float, list[bytes]]] = {}
        self._claims: dict[str, tuple[float, bytes]] = {}
        self.leases: dict[bytes, bytes] = {}
        self.pending: dict[tuple[bytes, bytes], list[bytes]] = {}
        self.kept: dict[bytes, list[bytes]] = {}
        self.results: list[bytes] = []
        self.log: list[bytes] = []

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        return [self._value((model, stream_id)) for stream_id in stream_ids]

    async def load_trails(self, model: str, stream_ids: Sequence[str]) -> list[list[bytes]]:
        return [self._trail((model, stream_id)) for stream_id in stream_ids]

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        return [self._write((model, write.stream_id), write) for write in writes]

    async def delete(self, model: str, stream_id: str, entry: bytes = b"") -> bool:
        there = self._value((model, stream_id)) is not None
        self._states.pop((model, stream_id), None)
        self._trails.pop((model, stream_id), None)
        self._watches.pop((model, stream_id), None)
        self.log += [entry] if entry else []
        return there

    async def due(self, model: str, now: float, limit: int) -> list[str]:
        found = [
            stream_id for (name, stream_id), due in self._watches.items() if name == model and (due <= now or SILENT <= due <= SILENT + now)
        ]
        return found[:limit]

    async def silent(self, model: str, limit: int) -> tuple[int, list[str]]:
        silent = [stream_id for (name, stream_id), due in self._watches.items() if name == model and due >= SILENT]
        return len(silent), silent[:limit]

    async def watch(self, model: str, times: Mapping[str, float]) -> None:
        for stream_id, due in times.items():
            self._watch((model, stream_id), due)

    async def scan(self, model: str, cursor: str, limit: int) -> Page:
        ids = sorted(stream_id for name, stream_id in self._states if name == model and self._value((name, stream_id)) is not None)
        rest = [stream_id for stream_id in ids if stream_id > cursor]
        return Page(rest[:limit], rest[limit - 1] if len(rest) > limit else "")

    async def waited(self, model: str, limit: int) -> tuple[int, list[str]]:
        watched = [stream_id for name, stream_id in self._watches if name == model]
        silent, _ = await self.silent(model, 0)
        return len(watched) - silent, random.sample(watched, min(limit, len(watched)))

    async def policy(self) -> dict[str, bytes]:
        return dict(self._policy)

    async def change_policy(self, changes: Mapping[str, bytes | None]) -> dict[str, bytes]:
        merged: dict[str, bytes | None] = {**self._policy, **changes}
        self._policy = {name: value for name, value in merged.items() if value is not None}
        return dict(self._policy)

    async def hold(self, name: str, holder: str, seconds: float) -> bool:
        if self._holder(name) not in ("", holder):
            return False
        self._held[name] = (self._clock() + seconds, holder)
        return True

    async def release(self, name: str, holder: str) -> None:
        if self._holder(name) == holder:
            del self._held[name]

    async def note(self, name: str, holder: str, note: bytes, keep: int) -> bool:
        if self._holder(name) != holder:
            return False
        self._notes[name] = (self._clock() + self._state_ttl, [*await self.notes(name), note][-keep:])
        return True

    async def notes(self, name: str) -> list[bytes]:
        until, notes = self._notes.get(name, (0.0, []))
        return list(notes) if self._clock() < until else []

    async def claimed(self, model: str) -> bytes:
        until, claim = self._claims.get(model, (0.0, b""))
        return claim if self._clock() < until else b""

    async def claim(self, model: str, expected: bytes | None, claim: bytes) -> bytes:
        before = await self.claimed(model)
        if expected in (None, before):
            self._claims[model] = (self._clock() + self._state_ttl, claim)
        return before

    async def count(self) -> int:
        return sum(self._value(key) is not None for key in self._states if key[0][0] != "@")

    async def memory(self) -> Memory:
        return Memory()

    async def ping(self) -> None:
        return None

    async def close(self) -> None:
        return None

    def _holder(self, name: str) -> str:
        until, holder = self._held.get(name, (0.0, ""))
        return holder if self._clock() < until else ""

    def _value(self, key: _Key) -> bytes | None:
        until, value = self._states.get(key, (0.0, b""))
        return value if key in self._states and self._clock() < until else None

    def _trail(self, key: _Key) -> list[bytes]:
        until, trail = self._trails.get(key, (0.0, []))
        return list(trail) if self._clock() < until else []

    def _write(self, key: _Key, write: Write) -> int:
        if any(self.leases.get(lease.key) != lease.token for lease, _ in write.acks):
            return FENCED
        if write.value and (self._value(key) or b"")[TOKEN] != write.expected:
            return LOST
        now = self._clock()
        if write.value:
            self._states[key] = (now + (write.ttl or self._state_ttl), bytes(write.value))
        if write.watch is not None:
            self._watch(key, write.watch)
        if write.trail:
            self._trails[key] = (now + self._result_ttl, [*self._trail(key), write.trail][-TRAIL_COMMITS:])
        self.log += write.log
        self.results += write.results
        for lease, entry in write.acks:
            self.pending[lease.stream, lease.group] = [other for other in self._pending(lease) if other != entry]
            if not lease.keep:
                self.kept[lease.stream] = [other for other in self.kept.get(lease.stream, []) if other != entry]
        return WRITTEN

    def _pending(self, lease: Lease) -> list[bytes]:
        return self.pending.get((lease.stream, lease.group), [])

    def _watch(self, key: _Key, due: float) -> None:
        if due:
            self._watches[key] = due
        else:
            self._watches.pop(key, None)
