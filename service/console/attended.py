"""Ranks streams whose open alert somebody looks after, or nobody is to be told of for a while, below those that nobody has taken yet.

    every LOOK_SECONDS   book: open alerts that are acknowledged, or muted ─► their streams ─► marked in the rings (recent.py)

While nobody watches the store is not asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from service.console.recent import ATTENDED, MUTED, Recent
from service.errors import StoreUnavailable
from service.metrics import Metrics
from service.stores.book import Book

LOOK_SECONDS = 2.0
PAUSE_SECONDS = 60.0
"""After a bug."""


class Attended:
    """`watched` says whether anybody would see it, `news` is called when something of it changed."""

    def __init__(self, recent: Mapping[str, Recent], metrics: Metrics, watched: Callable[[], bool], news: Callable[[], None]) -> None:
        self._recent, self._metrics, self._watched, self._news = recent, metrics, watched, news
        self._known: dict[str, tuple[str, str]] = {}
        """Alert → its model and stream; of a silence, which the fleet does not show, ("", "")."""

    async def run(self, book: Book) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if self._watched():
                    await self.look(book)
            except StoreUnavailable:
                continue
            except Exception as error:  # a bug must not end the page; it is counted and logged
                self._metrics.bug(error, task="attended")
                await asyncio.sleep(PAUSE_SECONDS)

    async def look(self, book: Book) -> None:
        """Raises StoreUnavailable."""
        attended, muted = await book.set_aside()
        ids = attended | muted
        new = [id_ for id_ in ids if id_ not in self._known]
        for alert in await book.alerts(new):
            if alert is not None:
                self._known[alert.id] = (alert.model, alert.stream_id) if alert.kind == "anomaly" else ("", "")
        self._known = {id_: self._known[id_] for id_ in ids if id_ in self._known}
        for model, recent in self._recent.items():
            marks = {stream_id: MUTED if id_ in muted else ATTENDED for id_, (of, stream_id) in self._known.items() if of == model}
            if recent.attend(marks):
                self._news()
