"""What a door in this process stands on, in the tests of the doors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from service.errors import StoreUnavailable
from service.stores import Write
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
