"""What only a real cluster can show: nodes that die, slots that move, nodes that know no function."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from bench.servers import free_port
from service.errors import StoreUnavailable
from service.state import TOKEN
from service.stores import LOST, WRITTEN, Write
from service.stores.cluster import SLOTS, ClusterStore
from service.stores.redis import COMMIT_BYTES, POLICY_KEY, TIMEOUT_SECONDS, RedisStore, shard_of, state_key
from tests.contracts.test_stores import opened_cluster as opened
from tests.contracts.test_stores import value
from tests.servers import Move, Valkey, ValkeyCluster

MODEL = "tiny"
SHARD = 7
SLOT = SLOTS[SHARD]
HERE = [name for name in (f"s{i}" for i in range(40_000)) if shard_of(name) == SHARD]
"""Streams of one shard."""


async def all_of(store: ClusterStore, model: str, limit: int) -> list[str]:
    seen: list[str] = []
    page = await store.scan(model, "", limit)
    while page.cursor:
        seen += page.stream_ids
        page = await store.scan(model, page.cursor, limit)
    return seen + page.stream_ids


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ValkeyCluster]:
    """One of the test's own, which keeps what it acknowledged."""
    with ValkeyCluster(tmp_path / "own", appendonly="yes", appendfsync="always") as cluster:
        yield cluster


@pytest.fixture
async def store(empty_cluster: ValkeyCluster) -> AsyncIterator[ClusterStore]:
    store = await opened(empty_cluster.url)
    yield store
    await store.close()


@pytest.fixture
async def own(cluster: ValkeyCluster) -> AsyncIterator[ClusterStore]:
    store = await opened(cluster.url)
    yield store
    await store.close()


async def test_it_is_as_full_as_its_fullest_node(own: ClusterStore, cluster: ValkeyCluster) -> None:
    assert math.isnan((await own.memory()).fullness)
    with cluster.clients() as clients:
        for client, times in zip(clients, (20, 2, 0), strict=True):
            client.config_set("maxmemory", times * client.info("memory")["used_memory"])
    assert 0.25 < (await own.memory()).fullness < 0.75


async def test_a_node_that_evicts_states_is_named(own: ClusterStore, cluster: ValkeyCluster) -> None:
    assert (await own.memory()).evicting == ""
    with cluster.clients() as clients:
        second = clients[1]
        second.config_set("maxmemory-policy", "volatile-lru")
        assert (await own.memory()).evicting == "", "it has no limit"
        second.config_set("maxmemory", 20 * second.info("memory")["used_memory"])
    assert re.fullmatch(r"volatile-lru \(127\.0\.0\.1:\d+\)", (await own.memory()).evicting)


# ── how it is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_commit_is_one_call_for_each_shard_and_a_load_one_mget(store: ClusterStore, empty_cluster: ValkeyCluster) -> None:
    writes = [Write(f"s{i}", b"", value()) for i in range(2000)]
    shards = {shard_of(write.stream_id) for write in writes}
    with empty_cluster.clients() as clients:
        for client in clients:
            client.config_resetstat()
        assert await store.commit(MODEL, writes) == [WRITTEN] * 2000
        assert await store.load(MODEL, [write.stream_id for write in writes]) == [write.value for write in writes]
        stats = [client.info("commandstats") for client in clients]
    assert all(some["cmdstat_fcall"]["calls"] > 0 for some in stats)
    assert sum(some["cmdstat_fcall"]["calls"] for some in stats) == len(shards)
    assert sum(some["cmdstat_mget"]["calls"] for some in stats) == len(shards)


async def test_large_values_of_one_shard_are_cut_into_calls_in_their_order(store: ClusterStore) -> None:
    writes = [Write(HERE[0], b"", value(b"x" * (COMMIT_BYTES // 3)))]
    writes += [Write(name, b"", value(b"x" * (COMMIT_BYTES // 3))) for name in HERE[1:6]]
    again = value()
    writes.append(Write(HERE[0], bytes(writes[0].value[TOKEN]), again))
    writes.append(Write(HERE[0], b"", value()))
    assert await store.commit(MODEL, writes) == [WRITTEN] * 7 + [LOST]
    assert await store.load(MODEL, HERE[:6]) == [again, *(write.value for write in writes[1:6])]


@pytest.mark.parametrize("protocol", [2, 3])
async def test_both_protocols_read_the_same(empty_cluster: ValkeyCluster, protocol: int) -> None:
    store = await opened(f"{empty_cluster.nodes[2].url}/0?protocol={protocol}")
    new = value()
    assert await store.commit(MODEL, [Write("a", b"", new, b"t", 5.0)]) == [WRITTEN]
    assert await store.load(MODEL, ["a", "b"]) == [new, None]
    assert await store.load_trails(MODEL, ["a"]) == [[b"t"]]
    assert (await store.scan(MODEL, "", 10)).stream_ids == ["a"]
    assert await store.waited(MODEL, 10) == (1, ["a"])
    assert await store.change_policy({"alpha": b"1"}) == await store.policy() == {"alpha": b"1"}
    assert await store.delete(MODEL, "a")
    await store.close()


async def test_a_cursor_of_nobody_starts_afresh(store: ClusterStore) -> None:
    await store.commit(MODEL, [Write("a", b"", value())])
    for cursor in ("²", "-1", "abc", "17", "9" * 15, "9" * 30, "9" * 50, "0" * 16):
        seen = set()
        page = await store.scan(MODEL, cursor, 10)
        while page.cursor:
            seen |= set(page.stream_ids)
            page = await store.scan(MODEL, page.cursor, 10)
        assert seen | set(page.stream_ids) == {"a"}, cursor


# ── what it refuses ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["unix:///tmp/v.sock", "redis://", "redis://127.0.0.1:6379/1", "nonsense", "redis://a:1,unix:///b"])
def test_a_url_that_is_of_no_cluster_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        ClusterStore(url, state_ttl=60, result_ttl=60)


async def test_a_server_alone_is_no_cluster_and_a_node_of_a_cluster_no_server_alone(empty_cluster: ValkeyCluster, tmp_path: Path) -> None:
    with Valkey(tmp_path / "alone", port=str(free_port())) as alone:
        cluster = ClusterStore(alone.url, state_ttl=60, result_ttl=60)
        with pytest.raises(StoreUnavailable, match="not a node of a Redis Cluster: unset ONSET_REDIS_CLUSTER"):
            await cluster.open()
        await cluster.close()
    store = RedisStore(empty_cluster.nodes[0].url, state_ttl=60, result_ttl=60)
    with pytest.raises(StoreUnavailable, match="node of a Redis Cluster: set ONSET_REDIS_CLUSTER"):
        await store.open()
    await store.close()


async def test_no_cluster_is_told_at_once() -> None:
    store = ClusterStore("redis://127.0.0.1:1,redis://127.0.0.1:2", state_ttl=60, result_ttl=60)
    started = time.monotonic()
    calls = (store.open(), store.load(MODEL, ["a"]), store.commit(MODEL, [Write("a", b"", value())]), store.ping(), store.count())
    for call in (*calls, store.policy(), store.change_policy({"alpha": b"1"}), store.waited(MODEL, 1), store.scan(MODEL, "", 1)):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await call
    assert time.monotonic() - started < 9 * TIMEOUT_SECONDS
    await store.close()


async def test_one_node_that_takes_no_writes_makes_the_store_not_ready(store: ClusterStore, empty_cluster: ValkeyCluster) -> None:
    with empty_cluster.nodes[1].client() as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailable, match="memory"):
                await store.ping()
            with pytest.raises(StoreUnavailable, match="memory"):
                await store.commit(MODEL, [Write(f"s{i}", b"", value()) for i in range(100)])
        finally:
            client.config_set("maxmemory", "0")
    await store.ping()


async def test_nodes_that_lost_the_function_get_it_again(store: ClusterStore, empty_cluster: ValkeyCluster) -> None:
    with empty_cluster.clients() as clients:
        for client in clients[:2]:
            client.function_flush("SYNC")
    writes = [Write(f"s{i}", b"", value()) for i in range(500)]
    assert await store.commit(MODEL, writes) == [WRITTEN] * 500
    assert await store.load(MODEL, [write.stream_id for write in writes]) == [write.value for write in writes]


# ── nodes that die ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def until_written(store: ClusterStore, writes: list[Write]) -> None:
    """Sent again until it is answered."""
    async with asyncio.timeout(30):
        while True:
            try:
                await store.commit(MODEL, writes)
            except StoreUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_all_that_was_acknowledged_survives_the_kill_of_a_node_and_the_same_store_goes_on(
    own: ClusterStore, cluster: ValkeyCluster
) -> None:
    writes = [Write(f"s{i}", b"", value(b"x" * 1400), b"t") for i in range(2000)]
    assert await own.commit(MODEL, writes) == [WRITTEN] * 2000
    await own.change_policy({"alpha": b"1"})
    await asyncio.gather(*(own.ping() for _ in range(10)))  # several open connections, all to be lost
    down = [Write(f"down-{i}", b"", value()) for i in range(100)]
    cluster.nodes[1].kill()
    started = time.monotonic()
    for _ in range(5):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await own.commit(MODEL, down)
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await own.ping()
    assert time.monotonic() - started < 10 * TIMEOUT_SECONDS, "told at once, and not each after the time that an answer may take"
    cluster.nodes[1].start()
    await until_written(own, down)
    assert await own.load(MODEL, [write.stream_id for write in down]) == [write.value for write in down], "whichever attempt wrote them"
    assert await own.load(MODEL, [write.stream_id for write in writes]) == [write.value for write in writes]
    assert await own.load_trails(MODEL, ["s0", "s1"]) == [[b"t"], [b"t"]]
    assert await own.policy() == {"alpha": b"1"}
    assert sorted(await all_of(own, MODEL, 100)) == sorted(write.stream_id for write in [*writes, *down])
    await own.ping()


async def test_after_a_failover_the_new_primary_at_its_own_address_is_used(
    own: ClusterStore, cluster: ValkeyCluster, tmp_path: Path
) -> None:
    with cluster.replica(tmp_path / "replica", of=1) as replica, replica.client() as client:
        writes = [Write(f"s{i}", b"", value(), b"t") for i in range(1000)]
        assert await own.commit(MODEL, writes) == [WRITTEN] * 1000
        cluster.in_step(replica, of=1)
        cluster.nodes[1].kill()
        client.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
        client.function_flush("SYNC")
        new = [Write(write.stream_id, bytes(write.value[TOKEN]), value()) for write in writes]
        await until_written(own, new)
        assert await own.load(MODEL, [write.stream_id for write in writes]) == [write.value for write in new]
        assert await own.count() == 1000
        await own.ping()


# ── slots that move ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_streams_that_were_moved_and_new_ones_are_asked_for_where_they_are(own: ClusterStore, cluster: ValkeyCluster) -> None:
    move = Move(cluster, SLOT)
    moved, stays, new = HERE[:20], HERE[20:30], HERE[30:60]
    first = {name: value() for name in moved + stays}
    assert set(await own.commit(MODEL, [Write(name, b"", first[name]) for name in first])) == {WRITTEN}
    await asyncio.gather(*(own.load(MODEL, [name]) for name in first))  # several connections
    move.begin()
    move.keys(*(state_key(MODEL, name) for name in moved))
    with cluster.nodes[move.target].client() as client:
        client.function_flush("SYNC")

    async def step(name: str) -> tuple[bool, bool]:
        second = value()
        [outcome] = await own.commit(MODEL, [Write(name, first.get(name, b"")[TOKEN], second)])
        return outcome == WRITTEN, await own.load(MODEL, [name]) == [second]

    assert await asyncio.gather(*(step(name) for name in moved + stays + new)) == [(True, True)] * 60
    with cluster.clients() as clients:
        assert clients[move.target].execute_command("CLUSTER", "COUNTKEYSINSLOT", SLOT) == len(moved + new)
        assert clients[move.source].execute_command("CLUSTER", "COUNTKEYSINSLOT", SLOT) == len(stays)
    move.keys()
    move.end()
    assert all(await own.load(MODEL, moved + stays + new))


async def test_a_call_whose_keys_are_in_two_places_waits_until_they_are_in_one(own: ClusterStore, cluster: ValkeyCluster) -> None:
    move, first = Move(cluster, SLOT), value()
    assert await own.commit(MODEL, [Write(name, b"", first, b"t", 1.0) for name in HERE[:2]]) == [WRITTEN] * 2
    move.begin()
    move.keys(state_key(MODEL, HERE[0]))
    started = time.monotonic()
    async with asyncio.timeout(60):
        with pytest.raises(StoreUnavailable, match="TryAgainError"):
            await own.commit(MODEL, [Write(HERE[0], first[TOKEN], value(), b"u", 2.0)])
    assert time.monotonic() - started > 0.75 * TIMEOUT_SECONDS
    second = value()
    commit = asyncio.create_task(own.commit(MODEL, [Write(name, first[TOKEN], second, b"u", 2.0) for name in HERE[:2]]))
    await asyncio.sleep(0.1)
    assert not commit.done()
    move.keys()
    assert await commit == [WRITTEN] * 2
    move.end()
    assert await own.load(MODEL, HERE[:2]) == [second, second]
    assert await own.load_trails(MODEL, HERE[:2]) == [[b"t", b"u"]] * 2
    assert sorted(await own.due(MODEL, 2.0, 10)) == sorted(HERE[:2])


async def test_a_slot_that_moves_while_it_is_written_to_loses_no_write_and_no_order(own: ClusterStore, cluster: ValkeyCluster) -> None:
    move, names = Move(cluster, SLOT), HERE[:30]
    last = {name: value() for name in names}
    assert set(await own.commit(MODEL, [Write(name, b"", last[name], b"0", 1.0) for name in names])) == {WRITTEN}
    ended = asyncio.Event()

    async def writer(some: list[str]) -> int:
        """Writes on the last value that was acknowledged, and only on that."""
        rounds = 0
        while not ended.is_set() or rounds < 3:
            rounds += 1
            new = {name: value(b"%d" % rounds) for name in some}
            assert await own.commit(MODEL, [Write(name, last[name][TOKEN], new[name], b"%d" % rounds, rounds + 1.0) for name in some]) == [
                WRITTEN
            ] * len(some)
            last.update(new)
            assert await own.load(MODEL, some) == [new[name] for name in some]
        return rounds

    def mover() -> None:
        time.sleep(0.1)
        move.begin()
        while move.keys(most=7):
            time.sleep(0.005)
        move.end()
        time.sleep(0.1)

    writers = [asyncio.create_task(writer(names[i::5])) for i in range(5)]
    try:
        await asyncio.to_thread(mover)
    finally:
        ended.set()
    assert all(rounds > 3 for rounds in await asyncio.gather(*writers))
    assert await own.load(MODEL, names) == [last[name] for name in names]
    with cluster.clients() as clients:
        assert clients[move.source].execute_command("CLUSTER", "COUNTKEYSINSLOT", SLOT) == 0
        assert clients[move.target].execute_command("CLUSTER", "COUNTKEYSINSLOT", SLOT) == 2 * len(names) + 1


async def test_what_needs_one_step_finds_its_slot_again(own: ClusterStore, cluster: ValkeyCluster) -> None:
    await own.change_policy({"alpha": b"1"})
    await own.commit(MODEL, [Write(HERE[0], b"", value(), b"t", 1.0)])
    for slot in (SLOT, key_slot(POLICY_KEY)):
        move = Move(cluster, slot)
        move.begin()
        move.keys()
        if slot != SLOT:
            assert await own.change_policy({"strict": b"1"}) == {"alpha": b"1", "strict": b"1"}, "behind ASK"
        move.end()
    assert await own.change_policy({"alpha": None}) == {"strict": b"1"}, "behind MOVED"
    assert await own.delete(MODEL, HERE[0])
    assert await own.load_trails(MODEL, [HERE[0]]) == [[]]
    assert await own.due(MODEL, 10.0, 10) == []


async def test_a_scan_sees_every_stream_though_a_slot_moves_behind_it(own: ClusterStore, cluster: ValkeyCluster) -> None:
    # From a node that the scan has not reached to one that it has passed.
    shard, slot = next((shard, slot) for shard, slot in enumerate(SLOTS) if cluster.first_owner(slot) == 2)
    names = [f"s{i}" for i in range(3000)]
    moving = {name for name in names if shard_of(name) == shard}
    await own.commit(MODEL, [Write(name, b"", value()) for name in names])
    seen: set[str] = set()
    page, move = await own.scan(MODEL, "", 100), Move(cluster, slot)
    moved = False
    while page.cursor:
        seen |= set(page.stream_ids)
        if len(seen) > 1500 and not moved:
            assert not seen & moving
            move.begin()
            move.keys()
            move.end()
            moved = True
        page = await own.scan(MODEL, page.cursor, 100)
    assert moved
    assert moving
    assert seen | set(page.stream_ids) == set(names)
