"""What this replica has scored, for those that watch: the console, alerts, Prometheus. Told after the commit, before the answer.

A watcher that must not miss anything cannot build on this: a replica that dies between the commit and here tells nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.metrics import Metrics
from service.results import Answers


@dataclass(frozen=True)
class Batch:
    """N events of one batch, in order; of those that were scored `answers` has Kind.SCORED."""

    model: str
    stream_ids: Sequence[str]
    answers: Answers
    messages: Sequence[str | None] | None = None
    """Lines as they were sent; None = a sensor model's."""


Watcher = Callable[[Batch], None]
"""Called in the event loop for every batch: it must return at once, so it puts aside what takes longer."""


class Feed:
    """Tells every watcher of every batch. One that fails is logged and counted; the others, and the batch, do not notice."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Tell it from now on; returns what ends that."""
        self._watchers = [*self._watchers, watcher]

        def end() -> None:
            self._watchers = [other for other in self._watchers if other is not watcher]

        return end

    def tell(self, model: str, stream_ids: Sequence[str], answers: Answers, messages: Sequence[str | None] | None = None) -> None:
        if not self._watchers:
            return
        batch = Batch(model, stream_ids, answers, messages)
        for watcher in self._watchers:
            try:
                watcher(batch)
            except Exception as error:
                self._metrics.bug(error, watcher=getattr(watcher, "__qualname__", repr(watcher)))
