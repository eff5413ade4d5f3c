"""What a door in this process stands on, in the tests of the doors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx

from service.api import Door
from service.app import create_app
from service.control import Alpha, Asked, Control, Strict
from service.errors import StoreUnavailable
from service.intake import DoorLimits
from service.metrics import Metrics
from service.scorer import Scorer
from service.settings import Settings
from service.stores import StateStore, Write
from service.stores.memory import MemoryStore


class Store(MemoryStore):
    """Stops answering after some commits, and its commits wait while the gate is closed."""

    commits = math.inf

    def __init__(self) -> None:
        super().__init__(state_ttl=60, result_ttl=60)
        self.gate = asyncio.Event()
        self.gate.set()

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        await self.gate.wait()
        if self.commits <= 0:
            raise StoreUnavailable("The state store does not answer.")
        self.commits -= 1
        return await super().commit(model, writes)


class Healthy:
    async def live(self) -> str | None:
        return None

    async def ready(self) -> str | None:
        return None


def door_over(
    scorers: dict[str, Scorer], store: StateStore, metrics: Metrics, limits: DoorLimits, public_url: str = "", allowed_hosts: str = ""
) -> Door:
    """A door over these scorers, which are started; the first is the default."""
    for scorer in scorers.values():
        scorer.start()
    control = Control(Asked(Alpha(1e-3), Strict(False)), None, scorers, metrics)
    control.connect(store)
    first = next(iter(scorers))
    return Door(scorers, first, limits, metrics, Healthy(), control, public_url=public_url, allowed_hosts=allowed_hosts)


@asynccontextmanager
async def serving(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a whole service in this process, which ends with it: by then every span is sent, for example."""
    app = create_app(Settings(canary_seconds=0, **settings))  # type: ignore[arg-type]
    async with app.state.service.running(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
