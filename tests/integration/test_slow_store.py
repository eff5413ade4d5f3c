"""A store that answers late: by readiness nobody is sent to the replicas then, and nobody may be taken for silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bench.servers import free_port
from service.detector import Detector
from service.errors import StoreUnavailable
from service.events import Event
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.silence import RETURN_SECONDS
from service.stores import PING_SECONDS, usable
from service.stores.redis import TIMEOUT_SECONDS, RedisStore
from tests.servers import Valkey
from tests.times import Clock


class Late:
    """Between a client and a server: what the client sends arrives `seconds` later."""

    def __init__(self, port: int) -> None:
        self.seconds, self._to = 0.0, port
        self.port = free_port()
        self._pipes = set[asyncio.Task[None]]()

    async def __aenter__(self) -> Late:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed is let go

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        for pipe in (self._pipe(reader, back, late=True), self._pipe(there, writer, late=False)):
            self._pipes.add(asyncio.create_task(pipe))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, late: bool) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.seconds * late)
                writer.write(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "own", port=str(free_port())) as server:
        yield server


@pytest.fixture
async def late(server: Valkey) -> AsyncIterator[Late]:
    async with Late(server.port) as late:
        yield late


@pytest.fixture
async def store(late: Late) -> AsyncIterator[RedisStore]:
    store = RedisStore(f"redis://127.0.0.1:{late.port}", state_ttl=3600, result_ttl=600)
    await store.open()
    yield store
    await store.close()


async def test_while_a_store_is_too_slow_for_readiness_no_stream_is_taken_for_silent(
    late: Late, store: RedisStore, server: Valkey, tiny_detector: Detector
) -> None:
    clock, metrics = Clock(), Metrics()
    scorer = Scorer(tiny_detector, Policy(), store, metrics, Limits(), clock)
    scorer.start()
    sweeper = scorer.sweeper(3600)
    await sweeper.sweep()
    for i in range(100):
        clock.now += 10
        await scorer.score([Event("a", {"value": float(i % 3)}, timestamp=clock.now)])
    clock.now += 300
    late.seconds = (PING_SECONDS + TIMEOUT_SECONDS) / 2  # every call is answered in time, but no probe
    with pytest.raises(StoreUnavailable, match="does not answer a ping"):
        await usable(store)
    with pytest.raises(StoreUnavailable, match="does not answer a ping"):
        await sweeper.sweep()
    late.seconds = 0.0
    with server.client() as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(StoreUnavailable, match="its memory is full"):
            await sweeper.sweep()
        client.config_set("maxmemory", "0")
    assert (await store.silent(tiny_detector.name, 1))[0] == 0
    clock.now += RETURN_SECONDS
    await sweeper.sweep()
    assert (await store.silent(tiny_detector.name, 1))[0] == 1
    await scorer.drain(5)
