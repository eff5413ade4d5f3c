"""The embedded store: what it acknowledged survives any kill, and nothing is left running."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from service.embedded import EmbeddedStore
from service.errors import StoreUnavailable
from service.stores import Write
from service.stores.redis import RedisStore

WRITES = [Write(f"s{i}", b"", i.to_bytes(2, "big") * 20) for i in range(500)]
IDS = [write.stream_id for write in WRITES]
VALUES = [write.value for write in WRITES]


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(tmp_path / "data")
    await store.start()
    yield store
    await store.stop()


async def opened(embedded: EmbeddedStore) -> RedisStore:
    store = RedisStore(embedded.url, state_ttl=3600, result_ttl=60)
    await store.open()
    return store


async def answers_again(store: RedisStore, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            await store.ping()
            return
        except StoreUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


async def test_acknowledged_writes_survive_kill_9_of_the_server(embedded: EmbeddedStore) -> None:
    store = await opened(embedded)
    assert all(await store.commit("m", WRITES))
    killed = embedded.pid
    psutil.Process(killed).kill()
    await asyncio.sleep(0.01)
    await answers_again(store)
    assert embedded.pid != killed
    assert await store.load("m", IDS) == VALUES
    assert await store.commit("m", [Write("new", b"", b"x" * 40)]) == [True]
    await store.close()


async def test_a_request_during_the_outage_fails_soon_and_clearly(embedded: EmbeddedStore) -> None:
    store = await opened(embedded)
    process = psutil.Process(embedded.pid)
    process.suspend()
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await store.load("m", IDS)
    assert time.monotonic() - started < 3
    process.resume()
    await answers_again(store)
    assert await store.load("m", ["s0"]) == [None]
    await store.close()


async def test_a_restart_is_counted(tmp_path: Path) -> None:
    restarts = []
    embedded = EmbeddedStore(tmp_path / "data", on_restart=lambda: restarts.append(1))
    await embedded.start()
    psutil.Process(embedded.pid).kill()
    async with asyncio.timeout(10):
        while not restarts:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await embedded.stop()
    assert restarts == [1]


async def test_a_stopped_store_leaves_no_process_and_no_socket_and_starts_again_with_its_data(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / "data")
    await embedded.start()
    store = await opened(embedded)
    await store.commit("m", WRITES)
    await store.close()
    pid = embedded.pid
    await embedded.stop()
    assert not psutil.pid_exists(pid)
    assert not (tmp_path / "data" / "store.sock").exists()
    again = EmbeddedStore(tmp_path / "data")
    await again.start()
    store = await opened(again)
    assert await store.load("m", IDS) == VALUES
    await store.close()
    await again.stop()


async def test_two_services_never_share_a_folder(embedded: EmbeddedStore, tmp_path: Path) -> None:
    second = EmbeddedStore(tmp_path / "data")
    with pytest.raises(StoreUnavailable, match=r"is in use by process \d+"):
        await second.start()


async def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / ("long" * 30) / "data")
    url = await embedded.start()
    assert len(url) < 107
    store = await opened(embedded)
    await store.close()
    await embedded.stop()
    assert not Path(url.removeprefix("unix://")).parent.exists()


PARENT = """
import asyncio, sys
from pathlib import Path
from service.embedded import EmbeddedStore
async def main():
    store = EmbeddedStore(Path(sys.argv[1]))
    await store.start()
    print(store.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's; elsewhere the next start ends the orphan")
async def test_a_killed_service_takes_its_store_along_and_the_next_one_finds_everything(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        orphan = int(await asyncio.to_thread(parent.stdout.readline))
        store = RedisStore(f"unix://{folder}/store.sock", state_ttl=60, result_ttl=60)
        await store.open()
        assert all(await store.commit("m", WRITES))
        await store.close()
        parent.kill()
    embedded = EmbeddedStore(folder)
    await embedded.start()
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
    store = await opened(embedded)
    assert await store.load("m", IDS) == VALUES
    await store.close()
    await embedded.stop()
