"""What the streams of a fleet look like together, from the feed: how they are judged, how many warm up, how many are anomalous.

The feed tells of every batch in the event loop. Batches are put aside and taken in together, when there are enough of them or
someone looks: one by one a batch of a single event would cost a tenth of its scoring.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, compress, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.events import SEVERITIES
from service.feed import Batch
from service.metrics import Metrics
from service.policy import Verdicts
from service.rounds import Kind, Outcomes

RECENT_SECONDS = 300.0
"""A stream that sends nothing for this long is no longer counted."""
MAX_FOLLOWED = 20_000
"""Streams followed, at most; of more, those heard of longest ago are left out of the count."""
GATHER_EVENTS, GATHER_BATCHES = 4096, 256

_WARMING = 0  # beside positions in SEVERITIES, of which the first is no anomaly
_ORDINARY = -1


class Seen(NamedTuple):
    """What is kept of a batch: without the parts of its replies, whose memory the next batch takes while it is still in the caches."""

    model: str
    stream_ids: Sequence[str]
    outcomes: Outcomes
    verdicts: Verdicts

    @classmethod
    def of(cls, batch: Batch) -> Seen:
        return cls(batch.model, batch.stream_ids, batch.answers.batch.outcomes, batch.answers.batch.verdicts)


class Judged:
    """The N scored events of some batches, in order. Columns are put together when they are asked for."""

    def __init__(self, batches: Sequence[Seen]) -> None:
        self._outcomes = [batch.outcomes for batch in batches]
        self._verdicts = [batch.verdicts for batch in batches]
        scored = np.concatenate([outcomes.kinds for outcomes in self._outcomes]) == Kind.SCORED
        self._scored: slice | NDArray[np.bool_] = slice(None) if scored.all() else scored
        names = chain.from_iterable(batch.stream_ids for batch in batches)
        self.stream_ids = list(names if isinstance(self._scored, slice) else compress(names, scored.tolist()))

    def record(self, name: str) -> Any:
        """[N], or [N, F], a column of the records."""
        return np.concatenate([outcomes.records[name] for outcomes in self._outcomes])[self._scored]

    def verdict(self, name: str) -> Any:
        """[N] a column of the verdicts; of scores NaN = none."""
        return np.concatenate([getattr(verdicts, name) for verdicts in self._verdicts])[self._scored]


class Gathered:
    """Batches of one model put aside until they are worth taking in."""

    def __init__(self, model: str, take: Callable[[Judged], None]) -> None:
        self._model, self._take = model, take
        self._batches: list[Seen] = []
        self._events = 0

    def see(self, batch: Batch) -> None:
        """For the feed."""
        if batch.model == self._model:
            self._batches.append(Seen.of(batch))
            self._events += len(batch.stream_ids)
            if self._events >= GATHER_EVENTS or len(self._batches) >= GATHER_BATCHES:
                self.flush()

    def flush(self) -> None:
        if self._batches:
            batches, self._batches, self._events = self._batches, [], 0
            self._take(Judged(batches))


class Recent:
    """Streams that are not ordinary, each of a kind (a number from 0), until they are, or were not heard of for RECENT_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: OrderedDict[str, tuple[float, int]] = OrderedDict()  # in the order they were heard of last

    def update(self, stream_ids: Sequence[str], kinds: NDArray[np.integer]) -> None:
        """Follow the streams [N] by the kinds of their last events."""
        marked = {stream_ids[i] for i in np.flatnonzero(kinds != _ORDINARY).tolist()}
        if not marked and not self._found:
            return
        now, kind_of = self._clock(), kinds.tolist()
        concerned = marked | self._found.keys()
        last = {stream_id: kind_of[i] for i, stream_id in enumerate(stream_ids) if stream_id in concerned}
        for stream_id, kind in last.items():
            self._found.pop(stream_id, None)
            if kind != _ORDINARY:
                self._found[stream_id] = now, kind
        while len(self._found) > MAX_FOLLOWED:
            self._found.popitem(last=False)

    def count(self, kind: int) -> int:
        """How many there are of this kind now."""
        since = self._clock() - RECENT_SECONDS
        gone = next((i for i, (heard, _) in enumerate(self._found.values()) if heard >= since), len(self._found))
        for stream_id in list(islice(self._found, gone)):
            del self._found[stream_id]
        return sum(found == kind for _, found in self._found.values())


class Fleet:
    """The metrics of one model's streams, which get p-values after `warmup` events."""

    def __init__(self, model: str, warmup: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._warmup, self._metrics = model, warmup, metrics
        self._recent = Recent(clock)
        self.gathered = Gathered(model, self._take)
        metrics.before(self.gathered.flush)
        metrics.warming.labels(model).set_function(lambda: self._recent.count(_WARMING))
        for i, severity in enumerate(SEVERITIES[1:], 1):
            metrics.anomalous.labels(model, severity).set_function(partial(self._recent.count, i))

    def _take(self, judged: Judged) -> None:
        p_value = judged.record("p_value").astype(np.float64)
        self._metrics.judged.labels(self._model).inc(int((~np.isnan(p_value)).sum()))
        self._metrics.p_value.observe(p_value, self._model)
        self._metrics.score.observe(judged.verdict("anomaly_score"), self._model)
        kinds = np.where(judged.record("version") <= self._warmup, _WARMING, _ORDINARY)
        self._recent.update(judged.stream_ids, np.where(judged.verdict("is_anomaly"), judged.verdict("severity"), kinds))
