"""New patterns: what no template of a log model matched, masked, with how often and when; for people to look at, and for the next training.

    commit ─► feed ─► here, counted by pattern ─► once a second, added to those in the state store
                                                 GET /v1/patterns ─► a person, or `python -m training lines --patterns FILE`

Keys, of one slot, by model and file (a model that was trained again knows the old ones, and begins with none):

    onset:{patterns}:MODEL@FILE:counts   a hash pattern → how often
    onset:{patterns}:MODEL@FILE:first    a hash pattern → JSON of when it came first, and that line
    onset:{patterns}:MODEL@FILE:last     a sorted set of the patterns by when they came last

Beyond MOST those are forgotten that came least often, the oldest first, among the half that came last longest ago: a flood of patterns that
come once each takes no place of one that comes again and again, and what is new has time to do so.

Best effort, beside the commit: a replica that dies loses what it counted since the last second, and a reply that is lost counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import structlog

from service import tasks
from service.artifact import NEW
from service.detector import Detector
from service.errors import StoreUnavailable, UnknownModel
from service.feed import Batch
from service.lines import Splitter
from service.metrics import Metrics
from service.rounds import Kind
from service.stores.redis import Command, Commands

PATH = "/v1/patterns"
MOST = 1_000
"""Patterns of a model that are kept."""
PENDING = 1_000
"""Patterns that wait to be written; while the store is away, later ones are dropped and counted."""
FLUSH_SECONDS = 1.0
KEPT_SECONDS = 30 * 86_400
"""After the last new pattern of a file."""
PATTERN_LENGTH, EXAMPLE_LENGTH = 1_000, 2_000
"""Characters of a pattern and of a line that are kept."""

log = structlog.get_logger(__name__)


class Pattern(msgspec.Struct, frozen=True):
    """A pattern that no template matched."""

    pattern: str
    count: int
    first_seen: float
    """By the event's time, seconds since 1970, as the next one."""
    last_seen: float
    example: str
    """The first line of it that was kept, shortened."""


class PatternPage(msgspec.Struct, frozen=True):
    """New patterns of one model, the most frequent first."""

    model: str
    patterns: list[Pattern]


class _First(msgspec.Struct, frozen=True):
    at: float
    example: str


@dataclass
class _Counted:
    """What came since the last flush."""

    count: int
    first: float
    last: float
    example: str


_first = msgspec.json.Decoder(_First)


class Patterns:
    """Of all log models of this process."""

    def __init__(self, detectors: Mapping[str, Detector], metrics: Metrics) -> None:
        self._metrics = metrics
        self._store: Commands | None = None
        self._keys: dict[str, bytes] = {}
        self._splitters: dict[str, Splitter] = {}
        self._pending: dict[str, dict[str, _Counted]] = {}
        for name, detector in detectors.items():
            if (matcher := detector.matcher) is not None:
                self._keys[name] = f"onset:{{patterns}}:{name}@{detector.sha256[:16]}:".encode()
                self._splitters[name] = matcher.splitter  # it has masked these words a moment before
                self._pending[name] = {}

    def connect(self, store: Commands) -> None:
        """Where they lie."""
        self._store = store

    def see(self, batch: Batch) -> None:
        """A watcher of the feed."""
        if batch.messages is None or batch.model not in self._pending:
            return
        outcomes = batch.answers.batch.outcomes
        records = outcomes.records
        new = np.flatnonzero((outcomes.kinds == Kind.SCORED) & (records["x"][:, 0] < NEW + 0.5)).tolist()
        for i in new:
            if (text := batch.messages[i]) is not None:
                self._count(batch.model, text, float(records["timestamp"][i]))

    async def run(self) -> None:
        """Write what was counted, once a second, until cancelled."""
        await tasks.repeat(self.flush, FLUSH_SECONDS, _not_written, partial(self._metrics.bug, task="patterns"))

    async def stop(self) -> None:
        """Write what is left, once nothing more is scored."""
        try:
            await self.flush()
        except StoreUnavailable as error:
            _not_written(error)

    async def flush(self) -> None:
        """Write what was counted since the last time. Raises StoreUnavailable: then it is kept for the next."""
        for model, pending in self._pending.items():
            if not pending:
                continue
            taken, self._pending[model] = pending, {}
            try:
                await self._write(self._keys[model], taken)
            except BaseException:
                later, self._pending[model] = self._pending[model], taken
                for text, one in later.items():
                    self._add(model, text, one)
                raise

    async def page(self, model: str, limit: int) -> PatternPage:
        """The `limit` most frequent ones; model "" = the only one that reads lines. Raises UnknownModel, StoreUnavailable."""
        if not model and len(self._keys) == 1:
            model = next(iter(self._keys))
        if model not in self._keys:
            known = ", ".join(sorted(self._keys)) or "none"
            if not model and not self._keys:
                raise UnknownModel("None of the loaded models reads log lines, so there are no patterns.")
            which = f"Model {model[:64]!r} is none that reads log lines" if model else "Name a log model by ?model="
            raise UnknownModel(f"{which}; there is {known}.")
        key = self._keys[model]
        counts, first, last = await self._asked(
            [("HGETALL", key + b"counts"), ("HGETALL", key + b"first"), ("ZRANGE", key + b"last", 0, -1, "WITHSCORES")]
        )
        firsts, lasts = _pairs(first), _pairs(last)
        often = sorted(((int(count), text) for text, count in _pairs(counts).items()), reverse=True)
        found = []
        for count, text in often[:limit]:
            if text in firsts and text in lasts:  # another replica may be forgetting it at this moment
                began = _first.decode(firsts[text])
                found.append(Pattern(text.decode(), count, min(began.at, float(lasts[text])), float(lasts[text]), began.example))
        return PatternPage(model, found)

    def _count(self, model: str, message: str, at: float) -> None:
        text = self._splitters[model].pattern(message, PATTERN_LENGTH)
        self._add(model, text, _Counted(1, at, at, message[:EXAMPLE_LENGTH]))

    def _add(self, model: str, text: str, one: _Counted) -> None:
        pending = self._pending[model]
        known = pending.get(text)
        if known is not None:
            known.count += one.count
            known.first, known.last = min(known.first, one.first), max(known.last, one.last)
        elif len(pending) < PENDING:
            pending[text] = one
        else:
            self._metrics.patterns_dropped.labels(model).inc(one.count)

    async def _write(self, key: bytes, counted: Mapping[str, _Counted]) -> None:
        counts, first, last = (key + part for part in (b"counts", b"first", b"last"))
        commands: list[Command] = []
        for text, one in counted.items():
            commands.append(("HINCRBY", counts, text.encode(), one.count))
            commands.append(("HSETNX", first, text.encode(), msgspec.json.encode(_First(one.first, one.example))))
            commands.append(("ZADD", last, "GT", one.last, text.encode()))
        commands += [("EXPIRE", part, KEPT_SECONDS) for part in (counts, first, last)]
        [*_, number] = await self._asked([*commands, ("ZCARD", last)])
        if number > MOST:
            [older] = await self._asked([("ZRANGE", last, 0, number - MOST // 2 - 1)])
            [often] = await self._asked([("HMGET", counts, *older)])
            rarest = [text for _, text in sorted(zip(often, older, strict=True), key=lambda one: int(one[0] or 0))[: number - MOST]]
            await self._asked([("HDEL", counts, *rarest), ("HDEL", first, *rarest), ("ZREM", last, *rarest)])

    async def _asked(self, commands: Sequence[Command]) -> list[Any]:
        if self._store is None:
            raise StoreUnavailable("The state store has not been opened yet.")
        return await self._store.pipe(commands, atomic=True)


def _not_written(error: StoreUnavailable) -> None:
    log.warning("patterns_not_written", error=error.detail)


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """Of a hash, or of a sorted set with its scores, however the server's protocol writes them."""
    if isinstance(reply, Mapping):
        return dict(reply)
    if reply and isinstance(reply[0], list | tuple):
        return dict(reply)
    return dict(zip(reply[::2], reply[1::2], strict=True))
