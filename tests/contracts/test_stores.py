"""One suite for every state store: what the scorer relies on, held by the dict and by a real server alike."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import pytest
import redis.asyncio as redis

from service.errors import StoreUnavailable
from service.state import TOKEN
from service.stores import TRAIL_COMMITS, StateStore, Write
from service.stores.memory import MemoryStore
from service.stores.redis import COMMIT_STREAMS, RedisStore, state_key, trail_key

MODEL = "tiny"
Opener = Callable[[int, int], Awaitable[StateStore]]

WEIRD = [
    "plant-7/line 3/pump",
    "a:b:c",
    "{braces}",
    "}{",
    "glob*?[a-z]^",
    "onset:{001}:tiny:x",
    "~tilde",
    "温度センサー",
    "😀",
    "é" * 256,
    "x",
]


def value(content: bytes = b"state") -> bytes:
    """A value with a token of its own."""
    return os.urandom(8) + os.urandom(16) + content


@pytest.fixture(params=["memory", "redis"])
async def open_store(request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    """Opens a store with a state TTL and a result TTL in seconds, empty at first."""
    url: str | None = request.getfixturevalue("empty_server") if request.param == "redis" else None
    opened: list[StateStore] = []

    async def opener(state_ttl: int, result_ttl: int) -> StateStore:
        if url is None:
            store: StateStore = MemoryStore(state_ttl=state_ttl, result_ttl=result_ttl)
        else:
            real = RedisStore(url, state_ttl=state_ttl, result_ttl=result_ttl)
            await real.open()
            store = real
        opened.append(store)
        return store

    yield opener
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: Opener) -> StateStore:
    return await open_store(3600, 600)


async def test_what_was_never_written_is_none(store: StateStore) -> None:
    assert await store.load(MODEL, ["a", "b"]) == [None, None]
    assert await store.load(MODEL, []) == []
    assert await store.load_trails(MODEL, ["a"]) == [[]]


async def test_a_first_write_expects_nothing_and_the_next_its_token(store: StateStore) -> None:
    first, second = value(), value()
    assert await store.commit(MODEL, [Write("a", b"", first)]) == [True]
    assert await store.load(MODEL, ["a"]) == [first]
    assert await store.commit(MODEL, [Write("a", first[TOKEN], second)]) == [True]
    assert await store.load(MODEL, ["a"]) == [second]


async def test_a_write_against_another_token_changes_nothing(store: StateStore) -> None:
    first = value()
    await store.commit(MODEL, [Write("a", b"", first)])
    assert await store.commit(MODEL, [Write("a", b"", value(), b"trail")]) == [False]
    assert await store.commit(MODEL, [Write("a", value()[TOKEN], value(), b"trail")]) == [False]
    assert await store.commit(MODEL, [Write("new", value()[TOKEN], value())]) == [False]
    assert await store.load(MODEL, ["a", "new"]) == [first, None]
    assert await store.load_trails(MODEL, ["a"]) == [[]]


async def test_a_loser_does_not_stop_the_others(store: StateStore) -> None:
    writes = [Write("a", b"", value()), Write("b", b"x" * 16, value()), Write("c", b"", value())]
    assert await store.commit(MODEL, writes) == [True, False, True]
    assert await store.load(MODEL, ["a", "b", "c"]) == [writes[0].value, None, writes[2].value]


async def test_of_many_writers_exactly_one_wins_each_round(store: StateStore) -> None:
    token = b""
    for _ in range(20):
        values = [value() for _ in range(8)]
        outcomes = await asyncio.gather(*(store.commit(MODEL, [Write("hot", token, v)]) for v in values))
        winners = [v for v, [won] in zip(values, outcomes, strict=True) if won]
        assert len(winners) == 1
        assert await store.load(MODEL, ["hot"]) == winners
        token = winners[0][TOKEN]


async def test_a_value_shorter_than_its_token_can_be_replaced(store: StateStore) -> None:
    for short in (b"x" * 3, b"x" * 12):
        [before] = await store.load(MODEL, ["a"])
        assert await store.commit(MODEL, [Write("a", (before or b"")[TOKEN], short)]) == [True]
        assert await store.load(MODEL, ["a"]) == [short]
    assert await store.commit(MODEL, [Write("a", (b"x" * 12)[TOKEN], value())]) == [True]


async def test_trails_keep_the_last_commits_in_order(store: StateStore) -> None:
    token = b""
    for i in range(TRAIL_COMMITS + 3):
        new = value()
        await store.commit(MODEL, [Write("a", token, new, b"" if i == 5 else b"trail-%d" % i)])
        token = new[TOKEN]
    kept = [b"trail-%d" % i for i in range(TRAIL_COMMITS + 3) if i != 5][-TRAIL_COMMITS:]
    assert await store.load_trails(MODEL, ["a", "none"]) == [kept, []]


async def test_states_and_trails_are_gone_after_their_time(open_store: Opener) -> None:
    store = await open_store(2, 1)
    await store.commit(MODEL, [Write("a", b"", value(), b"trail")])
    await asyncio.sleep(1.1)
    assert await store.load_trails(MODEL, ["a"]) == [[]]
    assert (await store.load(MODEL, ["a"]))[0] is not None
    await asyncio.sleep(1.0)
    assert await store.load(MODEL, ["a"]) == [None]
    assert await store.commit(MODEL, [Write("a", b"", value())]) == [True]


async def test_models_do_not_share_streams(store: StateStore) -> None:
    mine, other = value(), value()
    await store.commit("one", [Write("a", b"", mine)])
    await store.commit("two", [Write("a", b"", other)])
    assert await store.load("one", ["a"]) == [mine]
    assert await store.delete("two", "a")
    assert await store.load("one", ["a"]) == [mine]
    assert (await store.scan("two", "", 10)).stream_ids == []


async def test_deleting_forgets_the_trail_too(store: StateStore) -> None:
    await store.commit(MODEL, [Write("a", b"", value(), b"trail")])
    assert await store.delete(MODEL, "a")
    assert not await store.delete(MODEL, "a")
    assert await store.load(MODEL, ["a"]) == [None]
    assert await store.load_trails(MODEL, ["a"]) == [[]]


async def test_any_printable_name_is_a_stream_of_its_own(store: StateStore) -> None:
    writes = [Write(name, b"", value(), b"t" + name.encode()) for name in WEIRD]
    assert await store.commit(MODEL, writes) == [True] * len(WEIRD)
    assert await store.load(MODEL, WEIRD) == [write.value for write in writes]
    assert await store.load_trails(MODEL, WEIRD) == [[write.trail] for write in writes]
    assert sorted((await store.scan(MODEL, "", 1000)).stream_ids) == sorted(WEIRD)


async def test_a_scan_sees_every_stream_that_stays(store: StateStore) -> None:
    stay = [f"stay-{i}" for i in range(300)]
    await store.commit(MODEL, [Write(name, b"", value()) for name in stay])
    seen: set[str] = set()
    cursor, pages = "", 0
    while True:
        page = await store.scan(MODEL, cursor, 20)
        await store.commit(MODEL, [Write(f"come-{pages}-{i}", b"", value()) for i in range(10)])
        await store.delete(MODEL, f"come-{pages - 1}-3")
        seen |= set(page.stream_ids)
        cursor, pages = page.cursor, pages + 1
        if not cursor:
            break
    assert pages > 3
    assert seen >= set(stay)


async def test_a_commit_of_many_streams_is_whole(store: StateStore) -> None:
    writes = [Write(f"s{i}", b"", value(b"x" * 1400)) for i in range(10_000)]
    assert await store.commit(MODEL, writes) == [True] * 10_000
    assert await store.load(MODEL, [write.stream_id for write in writes]) == [write.value for write in writes]
    assert await store.count() == 10_000
    await store.ping()


# What only a real server can show.


async def test_a_server_that_lost_the_function_gets_it_again(redis_store: RedisStore, empty_server: str) -> None:
    async with redis.Redis.from_url(empty_server) as client:
        await client.function_flush("SYNC")
    assert await redis_store.commit(MODEL, [Write("a", b"", value())]) == [True]


async def test_the_keys_of_a_stream_share_a_shard(redis_store: RedisStore, empty_server: str) -> None:
    await redis_store.commit(MODEL, [Write("{a}b", b"", value(), b"trail")])
    async with redis.Redis.from_url(empty_server) as client:
        keys = sorted(cast("list[bytes]", await client.keys("*")))
    assert keys == sorted([state_key(MODEL, "{a}b"), trail_key(MODEL, "{a}b")])
    assert len({key.partition(b"}")[0] for key in keys}) == 1


async def test_a_commit_is_one_call_for_each_part_and_a_load_one(redis_store: RedisStore, empty_server: str) -> None:
    async with redis.Redis.from_url(empty_server) as client:
        await client.config_resetstat()
        writes = [Write(f"s{i}", b"", value()) for i in range(COMMIT_STREAMS + 1)]
        await redis_store.commit(MODEL, writes)
        await redis_store.load(MODEL, [write.stream_id for write in writes])
        calls = await client.info("commandstats")
    assert calls["cmdstat_fcall"]["calls"] == 2
    assert calls["cmdstat_mget"]["calls"] == 1


@pytest.mark.parametrize("protocol", [2, 3])
async def test_both_protocols_read_the_same(empty_server: str, protocol: int) -> None:
    store = RedisStore(f"{empty_server}?protocol={protocol}", state_ttl=60, result_ttl=60)
    await store.open()
    new = value()
    assert await store.commit(MODEL, [Write("a", b"", new, b"t")]) == [True]
    assert await store.load(MODEL, ["a", "b"]) == [new, None]
    assert await store.load_trails(MODEL, ["a"]) == [[b"t"]]
    assert (await store.scan(MODEL, "", 10)).stream_ids == ["a"]
    await store.close()


async def test_no_server_is_told_at_once() -> None:
    store = RedisStore("redis://127.0.0.1:1", state_ttl=60, result_ttl=60)
    started = time.monotonic()
    for call in (store.open(), store.load(MODEL, ["a"]), store.commit(MODEL, [Write("a", b"", value())]), store.ping()):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await call
    assert time.monotonic() - started < 3
    await store.close()
