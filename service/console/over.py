"""Takes from the page the alerts that ended without an event: their streams were deleted or accepted, have ended, or have expired.

    every LOOK_SECONDS   streams shown with an open alert that have not spoken for a minute ─► their states ─► shown as they stand

An event that ends an alert is seen as any other (feed, shared.py). What else ends one may be done by any replica, or by nobody at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from service.console.recent import Recent
from service.errors import StoreUnavailable
from service.metrics import Metrics

LOOK_SECONDS = 10.0
AT_ONCE = 500
"""States loaded in one go."""
PAUSE_SECONDS = 60.0
"""After a bug."""


class Streams(Protocol):
    """What is asked of a model's streams, see `service.streams`."""

    async def calm(self, stream_ids: Sequence[str]) -> list[bool]: ...


class Over:
    """`news` is called when something of it changed."""

    def __init__(self, recent: Mapping[str, Recent], metrics: Metrics, news: Callable[[], None]) -> None:
        self._recent, self._metrics, self._news = recent, metrics, news

    async def run(self, streams: Mapping[str, Streams]) -> None:
        """Look until cancelled; `streams` by model."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                for model, recent in self._recent.items():
                    await self.look(recent, streams[model])
            except StoreUnavailable:
                continue
            except Exception as error:  # a bug must not end the page; it is counted and logged
                self._metrics.bug(error, task="over")
                await asyncio.sleep(PAUSE_SECONDS)

    async def look(self, recent: Recent, streams: Streams) -> None:
        """Raises StoreUnavailable."""
        resting = recent.resting()
        for i in range(0, len(resting), AT_ONCE):
            some = resting[i : i + AT_ONCE]
            calm = await streams.calm([rest.stream_id for rest in some])
            if recent.over([rest for rest, is_calm in zip(some, calm, strict=True) if is_calm]):
                self._news()
