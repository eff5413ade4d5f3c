"""One suite for every state store: what the scorer relies on, held by the dict, by a real server and by a real cluster alike."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis.asyncio as redis
from redis.asyncio.connection import AbstractConnection

from service.errors import StoreRefused, StoreUnavailable
from service.events import Lease
from service.state import TOKEN
from service.stores import FENCED, LOG_LENGTH, LOST, OUTPUT, SILENT, TRAIL_COMMITS, WRITTEN, Output, StateStore, Write
from service.stores.clock import StoreClock
from service.stores.cluster import ClusterStore
from service.stores.memory import MemoryStore
from service.stores.redis import COMMIT_BYTES, COMMIT_STREAMS, SHARDS, TIMEOUT_SECONDS, RedisStore, log_key, shard_of, state_key, trail_key
from tests.servers import Valkey, ValkeyCluster

MODEL = "tiny"

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


class Backend:
    """Opens stores of one kind, with a state TTL and a result TTL in seconds, and lets their time pass."""

    def __init__(self, url: str | None, *, clustered: bool = False) -> None:
        """`url` of an empty server, or of an empty cluster; None = in memory."""
        self._url = url
        self._clustered = clustered
        self._now = 0.0
        self._opened: list[StateStore] = []

    async def open(self, state_ttl: int, result_ttl: int) -> StateStore:
        if self._url is None:
            store: StateStore = MemoryStore(state_ttl=state_ttl, result_ttl=result_ttl, clock=lambda: self._now)
        elif self._clustered:
            store = await opened_cluster(self._url, state_ttl, result_ttl)
        else:
            store = await opened(self._url, state_ttl, result_ttl)
        self._opened.append(store)
        return store

    async def elapse(self, seconds: float) -> None:
        self._now += seconds
        if self._url is not None:
            await asyncio.sleep(seconds)

    async def close(self) -> None:
        for store in self._opened:
            await store.close()

    async def give(self, lease: Lease) -> None:
        """Make the lease a valid one."""
        if self._url is None:
            self._memory.leases[lease.key] = lease.token
        else:
            async with redis.Redis.from_url(self._url) as client:
                await client.set(lease.key, lease.token)

    async def deliver(self, lease: Lease, *entries: bytes) -> None:
        """Put entries into the lease's stream, and have the group read them."""
        if self._url is None:
            self._memory.pending[lease.stream, lease.group] = [*entries]
            self._memory.kept[lease.stream] = [*entries]
        else:
            async with raw(self._url) as client:
                await client.xgroup_create(lease.stream, lease.group, mkstream=True)
                for entry in entries:
                    await client.xadd(lease.stream, {"event": b"{}"}, entry)
                await client.xreadgroup(lease.group, "me", {lease.stream: ">"})

    async def entries(self, lease: Lease) -> tuple[list[bytes], list[bytes]]:
        """Those pending in the group, and those in the stream."""
        if self._url is None:
            return self._memory.pending[lease.stream, lease.group], self._memory.kept[lease.stream]
        async with raw(self._url) as client:
            pending = await client.xpending_range(lease.stream, lease.group, "-", "+", 10_000)
            kept = await client.xrange(lease.stream)
        return [entry["message_id"] for entry in pending], [entry for entry, _ in kept]

    async def log(self, stream_id: str) -> list[bytes]:
        """The part of the alert log that has the stream's entries."""
        if self._url is None:
            return self._memory.log
        shard = shard_of(stream_id)
        if self._clustered:
            store = cast("ClusterStore", self._opened[-1])
            entries = (await store.pipe([("XRANGE", log_key(shard), "-", "+")]))[0]
        else:
            async with raw(self._url) as client:
                entries = await client.xrange(log_key(shard))
        return [fields[1] if isinstance(fields, list) else fields[b"transition"] for _, fields in entries]

    async def results(self) -> list[bytes]:
        """The output stream."""
        if self._url is None:
            return self._memory.results
        async with raw(self._url) as client:
            return [fields[b"result"] for _, fields in await client.xrange(OUTPUT.key)]

    @property
    def _memory(self) -> MemoryStore:
        store = self._opened[-1]
        assert isinstance(store, MemoryStore)
        return store


def raw(url: str) -> Any:
    """A client whose replies are what they are."""
    return redis.Redis.from_url(url)


async def opened(url: str, state_ttl: int = 3600, result_ttl: int = 600) -> RedisStore:
    store = RedisStore(url, state_ttl=state_ttl, result_ttl=result_ttl)
    await store.open()
    return store


async def opened_cluster(url: str, state_ttl: int = 3600, result_ttl: int = 600) -> ClusterStore:
    store = ClusterStore(url, state_ttl=state_ttl, result_ttl=result_ttl)
    await store.open()
    return store


@pytest.fixture(params=["memory", "redis", "cluster"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    if request.param == "cluster":
        cluster: ValkeyCluster = request.getfixturevalue("empty_cluster")
        backend = Backend(cluster.url, clustered=True)
    else:
        backend = Backend(request.getfixturevalue("empty_server") if request.param == "redis" else None)
    yield backend
    await backend.close()


@pytest.fixture(params=["memory", "redis"])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Of a store that a queue may lie in: not a cluster."""
    queue = Backend(request.getfixturevalue("empty_server") if request.param == "redis" else None)
    yield queue
    await queue.close()


@pytest.fixture
async def store(backend: Backend) -> StateStore:
    return await backend.open(3600, 600)


@pytest.mark.parametrize("kind", ["server", "cluster"])
async def test_opening_a_store_and_every_ping_read_its_clock(request: pytest.FixtureRequest, kind: str) -> None:
    clock, steps = StoreClock(), list[float]()
    if kind == "server":
        store: RedisStore | ClusterStore = RedisStore(request.getfixturevalue("empty_server"), state_ttl=60, result_ttl=60, clock=clock)
    else:
        store = ClusterStore(request.getfixturevalue("empty_cluster").url, state_ttl=60, result_ttl=60, clock=clock)
    await store.open()
    assert abs(clock.ahead) < 1, "it is on this machine"
    clock.read(clock() + 3600, clock.uptime())
    assert clock.ahead > 3590
    clock.when_stepped(lambda: steps.append(clock.ahead))
    await store.ping()
    [ahead] = steps
    assert abs(ahead) < 1
    await store.close()


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


async def test_a_token_is_compared_to_its_last_byte(store: StateStore) -> None:
    """Of two lives of one stream, or of one that was set back by a failover, either half of the tokens may be the same."""
    first = value()
    await store.commit(MODEL, [Write("a", b"", first)])
    for i in range(len(first[TOKEN])):
        other = bytearray(first[TOKEN])
        other[i] ^= 1
        assert await store.commit(MODEL, [Write("a", bytes(other), value())]) == [LOST]
    assert await store.load(MODEL, ["a"]) == [first]


async def test_a_loser_does_not_stop_the_others(store: StateStore) -> None:
    writes = [Write("a", b"", value()), Write("b", b"x" * 16, value()), Write("c", b"", value())]
    assert await store.commit(MODEL, writes) == [True, False, True]
    assert await store.load(MODEL, ["a", "b", "c"]) == [writes[0].value, None, writes[2].value]


async def test_of_two_writes_of_one_stream_in_one_call_the_second_must_know_the_first(store: StateStore) -> None:
    first, second = value(), value()
    writes = [Write("a", b"", first), Write("a", b"", value()), Write("a", first[TOKEN], second)]
    assert await store.commit(MODEL, writes) == [True, False, True]
    assert await store.load(MODEL, ["a"]) == [second]


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


async def test_a_value_may_have_a_time_to_live_of_its_own_which_the_next_write_takes_back(backend: Backend) -> None:
    store = await backend.open(state_ttl=60, result_ttl=60)
    values = {name: value() for name in ("short", "usual", "again")}
    await store.commit("m", [Write(name, b"", content, ttl=0 if name == "usual" else 1) for name, content in values.items()])
    later = value()
    assert list(await store.commit("m", [Write("again", values["again"][TOKEN], later)])) == [WRITTEN]
    await backend.elapse(1.2)
    assert await store.load("m", ["short", "usual", "again"]) == [None, values["usual"], later]


async def test_states_and_trails_are_gone_after_their_time(backend: Backend) -> None:
    store = await backend.open(2, 1)
    await store.commit(MODEL, [Write("a", b"", value(), b"trail")])
    await backend.elapse(1.1)
    assert await store.load_trails(MODEL, ["a"]) == [[]]
    assert (await store.load(MODEL, ["a"]))[0] is not None
    await backend.elapse(1.0)
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


async def test_a_watch_is_written_with_the_value_or_not_at_all(store: StateStore) -> None:
    first = value()
    assert await store.commit(MODEL, [Write("a", b"", first, b"trail", watch=100.5), Write("b", b"", value(), watch=300.0)]) == [True, True]
    assert await store.commit(MODEL, [Write("a", b"", value(), watch=0.0), Write("b", b"x" * 16, value(), watch=1.0)]) == [False, False]
    assert await store.due(MODEL, 100.4, 10) == []
    assert await store.due(MODEL, 100.5, 10) == ["a"]
    assert sorted(await store.due(MODEL, 300.0, 10)) == ["a", "b"]
    assert len(await store.due(MODEL, 300.0, 1)) == 1
    assert await store.due("other", 300.0, 10) == []
    second = value()
    assert await store.commit(MODEL, [Write("a", first[TOKEN], second)]) == [True]
    assert await store.due(MODEL, 200.0, 10) == ["a"], "None leaves the watch as it is"
    assert await store.commit(MODEL, [Write("a", second[TOKEN], value(), b"trail", watch=0.0)]) == [True]
    assert await store.due(MODEL, 300.0, 10) == ["b"]


async def test_a_watch_is_due_at_its_very_time(store: StateStore) -> None:
    at = 1_790_000_000.25
    assert await store.commit(MODEL, [Write("a", b"", value(), watch=at)]) == [WRITTEN]
    assert await store.due(MODEL, at - 0.001, 10) == []
    assert await store.due(MODEL, at, 10) == ["a"]


async def test_watches_can_be_moved_ended_and_counted_as_silent(store: StateStore) -> None:
    now = 1.8e9
    names = [*WEIRD, *(f"s{i}" for i in range(300))]
    assert all(await store.commit(MODEL, [Write(name, b"", value(), watch=now) for name in names]))
    assert sorted(await store.due(MODEL, now, 1000)) == sorted(names)
    await store.watch(MODEL, dict.fromkeys(names[:11], now + 1) | {names[11]: 0.0, names[12]: SILENT + now + 5})
    await store.watch(MODEL, {})
    assert sorted(await store.due(MODEL, now, 1000)) == sorted(names[13:])
    assert await store.silent(MODEL, 10) == (1, [names[12]])
    assert await store.silent(MODEL, 0) == (1, [])
    assert names[12] in await store.due(MODEL, now + 5, 1000), "a silent stream is due when it is to be forgotten"
    assert await store.delete(MODEL, names[12])
    assert await store.silent(MODEL, 10) == (0, [])


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


async def test_streams_are_counted_and_not_the_other_keys_that_they_have(store: StateStore) -> None:
    writes = [Write(f"s{i}", b"", value(), b"trail", 1e10, log=[b"entry"]) for i in range(100)]
    assert await store.commit(MODEL, writes) == [True] * 100
    assert await store.commit(f"@{MODEL}", writes[:3]) == [True] * 3  # of a canary
    assert await store.delete(MODEL, "s7")
    assert await store.count() == 99


async def test_every_write_of_a_mixed_batch_stands_for_itself(store: StateStore) -> None:
    taken = [f"s{i}" for i in range(0, 1500, 7)]
    assert all(await store.commit(MODEL, [Write(name, b"", value(b"old")) for name in taken]))
    writes = [Write(f"s{i}", b"", value(b"v" * (i % 50)), b"trail-%d" % i if i % 3 == 0 else b"") for i in range(1500)]
    assert await store.commit(MODEL, writes) == [i % 7 != 0 for i in range(1500)]
    ids = [write.stream_id for write in writes]
    for i, found in enumerate(await store.load(MODEL, ids)):
        assert (found == writes[i].value) == (i % 7 != 0)
    expected = [[b"trail-%d" % i] if i % 3 == 0 and i % 7 != 0 else [] for i in range(1500)]
    assert await store.load_trails(MODEL, ids) == expected


async def test_a_trail_lives_on_from_its_last_commit(backend: Backend) -> None:
    store = await backend.open(60, 1)
    first, second = value(), value()
    await store.commit(MODEL, [Write("a", b"", first, b"one")])
    await backend.elapse(0.6)
    await store.commit(MODEL, [Write("a", first[TOKEN], second, b"two")])
    await backend.elapse(0.6)
    assert await store.load_trails(MODEL, ["a"]) == [[b"one", b"two"]]


async def test_hundreds_of_calls_at_once_are_all_answered(store: StateStore) -> None:
    writes = [Write(f"s{i}", b"", value()) for i in range(200)]
    assert await asyncio.gather(*(store.commit(MODEL, [write]) for write in writes)) == [[True]] * 200
    assert await asyncio.gather(*(store.load(MODEL, [write.stream_id]) for write in writes)) == [[write.value] for write in writes]


async def test_a_cancelled_call_leaves_no_answer_to_the_next(store: StateStore) -> None:
    writes = [Write(f"s{i}", b"", value(b"x" * 1000)) for i in range(1000)]
    await store.commit(MODEL, writes)
    for i in range(30):
        call = asyncio.create_task(store.load(MODEL, [write.stream_id for write in writes]))
        await asyncio.sleep(0.0003 * i)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert await store.load(MODEL, ["s7", "none"]) == [writes[7].value, None]


async def test_a_scan_finds_the_few_streams_of_one_model_among_many(store: StateStore) -> None:
    await store.commit("many", [Write(f"s{i}", b"", value(), b"t") for i in range(3000)])
    await store.commit("few", [Write(name, b"", value()) for name in ("a", "b")])
    seen: list[str] = []
    page = await store.scan("few", "", 10)
    while True:
        seen += page.stream_ids
        if not page.cursor:
            break
        page = await store.scan("few", page.cursor, 10)
    assert sorted(set(seen)) == ["a", "b"]


async def test_a_model_is_scanned_by_its_very_name(store: StateStore) -> None:
    for model in ("ab", "a*", "a?", "[ab]b", "a"):
        await store.commit(model, [Write(f"of {model}", b"", value())])
    for model in ("ab", "a*", "a?", "[ab]b", "a"):
        assert (await store.scan(model, "", 100)).stream_ids == [f"of {model}"]


async def test_the_policy_is_one_mapping_of_which_each_change_leaves_the_rest(store: StateStore) -> None:
    assert await store.policy() == {}
    assert await store.change_policy({"alpha": b"1"}) == {"alpha": b"1"}
    assert await store.change_policy({"strict": b"\x00\xff", "alpha": None}) == {"strict": b"\x00\xff"}
    assert await store.change_policy({"alpha": b""}) == {"strict": b"\x00\xff", "alpha": b""}
    assert await store.policy() == {"strict": b"\x00\xff", "alpha": b""}
    assert await store.change_policy({"alpha": None, "strict": None, "never there": None}) == {}
    assert await store.policy() == {}


async def test_changes_of_the_policy_at_the_same_time_all_hold(store: StateStore) -> None:
    answers = await asyncio.gather(*(store.change_policy({f"n{i}": b"%d" % i}) for i in range(20)))
    assert all(answers[i][f"n{i}"] == b"%d" % i for i in range(20))
    assert await store.policy() == {f"n{i}": b"%d" % i for i in range(20)}


async def test_the_policy_outlives_the_streams_and_is_none_of_them(backend: Backend) -> None:
    store = await backend.open(1, 1)
    await store.change_policy({"alpha": b"1"})
    assert (await store.scan("policy", "", 10)).stream_ids == []
    assert (await store.scan(MODEL, "", 10)).stream_ids == []
    await backend.elapse(1.1)
    assert await store.policy() == {"alpha": b"1"}


async def test_a_lease_is_one_holders_until_it_expires_or_is_given_up(backend: Backend) -> None:
    store = await backend.open(60, 60)
    assert await store.hold("mqtt/plant", "a", 0.4)
    assert not await store.hold("mqtt/plant", "b", 0.4)
    assert await store.hold("another", "b", 0.4)
    await backend.elapse(0.3)
    assert await store.hold("mqtt/plant", "a", 0.4), "renewed"
    await backend.elapse(0.3)
    assert not await store.hold("mqtt/plant", "b", 0.4)
    await store.release("mqtt/plant", "b")
    assert not await store.hold("mqtt/plant", "b", 60), "another's is not given up"
    await store.release("mqtt/plant", "a")
    assert await store.hold("mqtt/plant", "b", 0.1)
    await backend.elapse(0.2)
    assert await store.hold("mqtt/plant", "a", 60)


async def test_notes_are_the_holders_bounded_and_read_by_the_next_one(store: StateStore) -> None:
    assert not await store.note("plant", "a", b"0", 10), "nobody holds it"
    assert await store.notes("plant") == []
    assert await store.hold("plant", "a", 60)
    for i in range(5):
        assert await store.note("plant", "a", b"%d" % i, 3)
    assert not await store.note("plant", "b", b"x", 3)
    await store.release("plant", "a")
    assert await store.hold("plant", "b", 60)
    assert await store.note("plant", "b", b"\x00\xff", 4)
    assert await store.notes("plant") == [b"2", b"3", b"4", b"\x00\xff"]
    assert await store.notes("another") == []


async def test_a_claim_is_replaced_only_where_it_is_the_expected_one(store: StateStore) -> None:
    assert await store.claimed(MODEL) == b""
    assert await store.claim(MODEL, b"another", b"1") == b""
    assert await store.claimed(MODEL) == b"", "there was none, and that was not expected"
    assert await store.claim(MODEL, b"", b"\x00\xff") == b""
    assert await store.claim(MODEL, b"", b"2") == b"\x00\xff"
    assert await store.claimed(MODEL) == b"\x00\xff"
    assert await store.claim(MODEL, b"\x00\xff", b"3") == b"\x00\xff"
    assert await store.claim(MODEL, None, b"4") == b"3", "whatever it is"
    assert await store.claimed(MODEL) == b"4"
    assert await store.claimed("another") == b""
    assert await store.claim("another", None, b"5") == b""
    assert (await store.scan(MODEL, "", 10)).stream_ids == [], "it is no stream"


async def test_of_many_that_claim_at_once_each_round_has_one_winner(store: StateStore) -> None:
    held = b""
    for i in range(5):
        claims = [b"%d-%d" % (i, j) for j in range(20)]
        found = await asyncio.gather(*(store.claim(MODEL, held, claim) for claim in claims))
        [won] = [claim for claim, before in zip(claims, found, strict=True) if before == held]
        assert set(found) == {held, won}
        held = await store.claimed(MODEL)
        assert held == won


async def test_a_claim_and_notes_outlive_their_last_replacement_by_the_state_ttl(backend: Backend) -> None:
    store = await backend.open(2, 1)
    await store.claim(MODEL, b"", b"1")
    assert await store.hold("plant", "a", 60)
    assert await store.note("plant", "a", b"note", 3)
    await backend.elapse(1.2)
    assert await store.notes("plant") == [b"note"]
    assert await store.claim(MODEL, b"1", b"2") == b"1"
    await backend.elapse(1.2)
    assert await store.notes("plant") == []
    assert await store.claimed(MODEL) == b"2"
    await backend.elapse(1.2)
    assert await store.claimed(MODEL) == b""
    assert await store.claim(MODEL, b"", b"3") == b""


async def test_streams_that_are_waited_for_are_counted_without_the_silent_ones_and_drawn(store: StateStore) -> None:
    assert await store.waited(MODEL, 10) == (0, [])
    await store.watch(MODEL, {f"s{i}": 100.0 + i for i in range(1000)} | {f"silent {i}": SILENT + i for i in range(5)})
    await store.watch("other", {"s": 1.0})
    count, everyone = await store.waited(MODEL, 2000)
    assert count == 1000
    assert len(everyone) == len(set(everyone)) == 1005
    count, some = await store.waited(MODEL, 50)
    assert count == 1000
    assert 50 <= len(some) == len(set(some)) <= 50 + 256
    assert set(some) <= set(everyone)


LEASE = Lease(b"in:{0}", b"in:{0}:lease", b"me#1", b"onset")


async def test_results_and_acks_are_written_with_the_value_or_not_at_all(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    await queue.give(LEASE)
    await queue.deliver(LEASE, b"1-0", b"2-0", b"3-0", b"4-0")
    writes = [
        Write("a", b"", value(), results=[b"a1", b"a2"], acks=[(LEASE, b"1-0"), (LEASE, b"3-0")]),
        Write("b", b"x" * 16, value(), b"trail", 5.0, results=[b"b1"], acks=[(LEASE, b"2-0")]),
        Write("c", b"", value(), acks=[(LEASE, b"")]),
        Write("d", b"", value(), results=[b"d1"]),
    ]
    assert await store.commit(MODEL, writes) == [WRITTEN, LOST, WRITTEN, WRITTEN]
    assert await queue.results() == [b"a1", b"a2", b"d1"]
    assert await queue.entries(LEASE) == ([b"2-0", b"4-0"], [b"2-0", b"4-0"])
    assert await store.load_trails(MODEL, ["b"]) == [[]]


async def test_a_write_under_a_lost_lease_is_fenced_and_its_neighbours_are_not(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    other = Lease(b"in:{1}", b"in:{1}:lease", b"me#2", b"onset")
    newer = LEASE._replace(token=b"you#7")
    for lease in (newer, other):
        await queue.give(lease)
        await queue.deliver(lease, b"1-0", b"2-0", b"3-0")
    first = value()
    writes = [
        Write("a", b"", value(), b"trail", 9.0, results=[b"a"], acks=[(LEASE, b"1-0")]),
        Write("b", b"", first, results=[b"b"], acks=[(other, b"1-0")]),
        Write("c", b"", value(), results=[b"c"], acks=[(other, b"2-0"), (LEASE, b"2-0")]),
        Write("d", b"", value(), results=[b"d"], acks=[(LEASE, b"")]),
        Write("e", b"", b"", results=[b"e"], acks=[(LEASE, b"3-0")]),
        Write("f", b"", value()),
    ]
    assert await store.commit(MODEL, writes) == [FENCED, WRITTEN, FENCED, FENCED, FENCED, WRITTEN]
    assert await store.load(MODEL, ["a", "b", "c", "d", "e", "f"]) == [None, first, None, None, None, writes[5].value]
    assert await store.load_trails(MODEL, ["a"]) == [[]]
    assert await store.due(MODEL, 10.0, 10) == []
    assert await queue.results() == [b"b"]
    assert (await queue.entries(newer))[0] == [b"1-0", b"2-0", b"3-0"]
    assert (await queue.entries(other))[0] == [b"2-0", b"3-0"]


async def test_a_lease_that_nobody_holds_is_lost_too(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    assert await store.commit(MODEL, [Write("a", b"", value(), acks=[(LEASE, b"1-0")])]) == [FENCED]


async def test_the_alert_log_has_the_entries_of_what_was_written_in_the_order_of_the_commits(backend: Backend) -> None:
    store = await backend.open(3600, 600)
    first, second = value(), value()
    assert (
        await store.commit(MODEL, [Write("a", b"", first, log=[b"1", b"2"]), Write("b", b"", value(), watch=5.0, log=[])]) == [WRITTEN] * 2
    )
    assert await store.commit(MODEL, [Write("a", b"x" * 16, second, trail=b"t", log=[b"lost"])]) == [LOST]
    assert await store.commit(MODEL, [Write("a", first[TOKEN], second, trail=b"t", watch=7.0, log=[b"3"])]) == [WRITTEN]
    assert await store.load_trails(MODEL, ["a"]) == [[b"t"]]
    assert await backend.log("a") == [b"1", b"2", b"3"]
    assert await store.delete(MODEL, "a", b"4")
    assert await backend.log("a") == [b"1", b"2", b"3", b"4"]


async def test_the_alert_log_is_beside_results_and_acks(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    await queue.give(LEASE)
    await queue.deliver(LEASE, b"1-0")
    writes = [
        Write("a", b"", value(), results=[b"r"], acks=[(LEASE, b"1-0")], log=[b"1"]),
        Write("a2", b"", value(), acks=[(LEASE._replace(token=b"another"), b"2-0")], log=[b"fenced"]),
    ]
    assert await store.commit(MODEL, writes) == [WRITTEN, FENCED]
    assert await queue.results() == [b"r"]
    assert await queue.entries(LEASE) == ([], [])
    assert await queue.log("a") == [b"1"]
    assert b"fenced" not in await queue.log("a2")


async def test_a_write_without_a_value_leaves_the_stream_as_it_is_whatever_it_is(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    await queue.give(LEASE)
    await queue.deliver(LEASE, b"1-0", b"2-0")
    first = value()
    assert await store.commit(MODEL, [Write("a", b"", first)]) == [WRITTEN]
    writes = [Write("a", b"", b"", results=[b"late"], acks=[(LEASE, b"1-0")]), Write("b", b"x" * 16, b"", acks=[(LEASE, b"2-0")])]
    assert await store.commit(MODEL, writes) == [WRITTEN, WRITTEN]
    assert await store.load(MODEL, ["a", "b"]) == [first, None]
    assert await queue.results() == [b"late"]
    assert await queue.entries(LEASE) == ([], [])


async def test_a_stream_that_is_kept_keeps_its_acknowledged_entries(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    lease = LEASE._replace(keep=True)
    await queue.give(lease)
    await queue.deliver(lease, b"1-0", b"2-0")
    assert await store.commit(MODEL, [Write("a", b"", value(), acks=[(lease, b"1-0")])]) == [WRITTEN]
    assert await queue.entries(lease) == ([b"2-0"], [b"1-0", b"2-0"])


async def test_a_commit_of_many_results_and_acks_is_whole_and_each_streams_in_order(queue: Backend) -> None:
    store = await queue.open(3600, 600)
    await queue.give(LEASE)
    ids = [b"%d-%d" % (i, 2**35 + i) for i in range(1, 9001)]  # Lua unpacks 8,000
    await queue.deliver(LEASE, *ids)
    writes = [
        Write(f"s{i}", b"", value(), results=[b"%d-%d" % (i, j) for j in range(4)], acks=[(LEASE, entry) for entry in ids[i::1000]])
        for i in range(999)
    ]
    assert await store.commit(MODEL, writes) == [WRITTEN] * 999
    assert await store.commit(MODEL, [Write("one", b"", value(), acks=[(LEASE, entry) for entry in ids])]) == [WRITTEN]
    assert await queue.results() == [b"%d-%d" % (i, j) for i in range(999) for j in range(4)]
    assert await queue.entries(LEASE) == ([], [])


# What only a real server can show.


async def test_the_output_stream_is_bounded(empty_server: str) -> None:
    store = RedisStore(empty_server, state_ttl=60, result_ttl=60, output=Output("out", 100))
    await store.open()
    async with redis.Redis.from_url(empty_server) as client:
        await client.set(LEASE.key, LEASE.token)
        for i in range(20):
            await store.commit(MODEL, [Write(f"s{i}", b"", value(), results=[b"r"] * 100, acks=[(LEASE, b"")])])
        assert 100 <= await client.xlen("out") <= 100 + 200
    await store.close()


async def test_the_alert_log_is_bounded(redis_store: RedisStore, empty_server: str) -> None:
    token = b""
    for _ in range(3):
        new = value()
        assert await redis_store.commit(MODEL, [Write("a", token, new, log=[b"entry"] * (LOG_LENGTH // 2))]) == [WRITTEN]
        token = new[TOKEN]
    async with redis.Redis.from_url(empty_server) as client:
        assert LOG_LENGTH <= await client.xlen(log_key(shard_of("a"))) <= LOG_LENGTH + 200


@pytest.mark.parametrize("key", [OUTPUT.key.encode(), LEASE.stream, LEASE.key])
async def test_a_key_of_another_kind_in_the_way_refuses_the_whole_call(redis_store: RedisStore, empty_server: str, key: bytes) -> None:
    async with redis.Redis.from_url(empty_server) as client:
        await client.set(LEASE.key, LEASE.token)
        await client.delete(key)
        await client.hset(key, "a", "b")
        with pytest.raises(StoreRefused, match=r"a key of the service's holds what another program has written.*WRONGTYPE"):
            await redis_store.commit(MODEL, [Write("a", b"", value(), results=[b"r"], acks=[(LEASE, b"1-0")])])
    assert await redis_store.load(MODEL, ["a"]) == [None]


async def test_an_error_that_nobody_knows_is_a_refusal_and_where_it_ends_the_next_call_is_answered(redis_store: RedisStore) -> None:
    with pytest.raises(StoreRefused, match=r"it may be too old, or this is a bug .*unknown command 'NOSUCH'"):
        await redis_store.pipe([("NOSUCH", b"key"), ("GET", b"key")])
    assert await redis_store.pipe([("GET", b"key")]) == [None]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """A server of the test's own, with an append-only file."""
    with Valkey(tmp_path / "own", appendonly="yes", appendfsync="always") as server:
        yield server


async def test_all_that_was_acknowledged_survives_kill_9_and_the_same_store_goes_on(server: Valkey) -> None:
    store = await opened(server.url)
    writes = [Write(f"s{i}", b"", value(b"x" * 1400), b"t") for i in range(2000)]
    assert all(await store.commit(MODEL, writes))
    await store.change_policy({"alpha": b"1"})
    await asyncio.gather(*(store.ping() for _ in range(10)))  # several open connections, all to be lost
    server.kill()
    started = time.monotonic()
    for _ in range(10):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await store.commit(MODEL, [Write("down", b"", value())])
    assert time.monotonic() - started < 10 * TIMEOUT_SECONDS, "told at once, and not each after the time that an answer may take"
    server.start()
    assert await store.load(MODEL, [write.stream_id for write in writes]) == [write.value for write in writes]
    assert await store.policy() == {"alpha": b"1"}
    assert await asyncio.gather(*(store.load(MODEL, ["down"]) for _ in range(16))) == [[None]] * 16
    assert await store.commit(MODEL, [Write("s0", bytes(writes[0].value[TOKEN]), value())]) == [True]
    await store.close()


async def test_a_server_that_loads_its_data_is_unavailable_until_it_has(tmp_path: Path) -> None:
    with Valkey(tmp_path / "own", appendonly="yes", appendfsync="always", key_load_delay="60") as server:
        store = await opened(server.url)
        assert all(await store.commit(MODEL, [Write(f"s{i}", b"", value()) for i in range(16_000)]))  # it looks up every 1024th
        server.kill()
        server.start(loaded=False)
        await asyncio.sleep(0.01)  # nothing ran here meanwhile: the loop sees the lost connection only now
        with pytest.raises(StoreUnavailable, match="BusyLoading"):
            await store.commit(MODEL, [Write("new", b"", value())])
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await store.commit(MODEL, [Write("new", b"", value())]) == [True]
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.05)
        await store.close()


async def test_an_empty_server_at_the_same_address_is_taken_as_it_is(tmp_path: Path) -> None:
    with Valkey(tmp_path / "own") as server:
        store = await opened(server.url)
        first = value()
        await store.commit(MODEL, [Write("a", b"", first)])
        server.kill()
        server.start()
        await asyncio.sleep(0.01)
        await store.ping()
        assert await store.commit(MODEL, [Write("a", first[TOKEN], value()), Write("a", b"", value())]) == [False, True]
        await store.close()


async def test_after_a_failover_the_new_primary_behind_the_address_is_used(server: Valkey, tmp_path: Path) -> None:
    with Valkey(tmp_path / "new") as primary, server.client() as old:
        store = await opened(server.url)
        await asyncio.gather(*(store.ping() for _ in range(5)))
        old.replicaof("127.0.0.1", "1")
        server.socket.rename(tmp_path / "old.sock")
        primary.socket.rename(server.socket)
        with pytest.raises(StoreUnavailable, match="read only"):
            await store.commit(MODEL, [Write("a", b"", value())])
        assert await store.commit(MODEL, [Write("a", b"", value())]) == [True]
        await store.close()


async def test_a_server_that_takes_no_writes_is_not_ready(server: Valkey) -> None:
    store = await opened(server.url)
    with server.client() as client:
        for refuse, accept, why in (
            (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "memory"),
            (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "read only"),
        ):
            client.execute_command(*refuse)
            with pytest.raises(StoreUnavailable, match=why):
                await store.ping()
            with pytest.raises(StoreUnavailable, match=why):
                await store.commit(MODEL, [Write("a", b"", value())])
            with pytest.raises(StoreUnavailable, match=why):
                await store.change_policy({"alpha": b"1"})
            client.execute_command(*accept)
            await store.ping()
    assert await store.load(MODEL, ["a"]) == [None]
    await store.close()


async def test_a_server_without_functions_is_refused_by_name(tmp_path: Path) -> None:
    with Valkey(tmp_path / "old", rename_command="FUNCTION ") as server:
        store = RedisStore(server.url, state_ttl=60, result_ttl=60)
        with pytest.raises(StoreUnavailable, match=r"Redis 7\.0 or Valkey 7\.2"):
            await store.open()
        await store.close()


async def test_a_commit_of_large_values_is_cut_into_calls(redis_store: RedisStore, empty_server: str) -> None:
    writes = [Write(f"s{i}", b"", value(b"x" * (COMMIT_BYTES // 3))) for i in range(7)]
    async with redis.Redis.from_url(empty_server) as client:
        await client.config_resetstat()
        assert all(await redis_store.commit(MODEL, [*writes, Write("huge", b"", value(b"x" * (COMMIT_BYTES + 1)))]))
        calls = await client.info("commandstats")
    assert calls["cmdstat_fcall"]["calls"] == 5
    assert await redis_store.load(MODEL, ["s6"]) == [writes[6].value]


async def test_a_cursor_of_nobody_starts_afresh(redis_store: RedisStore) -> None:
    await redis_store.commit(MODEL, [Write("a", b"", value())])
    for cursor in ("²", "-1", "abc", "9" * 30, str(2**64)):
        assert (await redis_store.scan(MODEL, cursor, 10)).stream_ids == ["a"]


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


async def test_a_commit_is_one_call_for_each_part_a_load_one_and_a_deletion_or_a_change_of_the_policy_one_step(
    redis_store: RedisStore, empty_server: str
) -> None:
    async with redis.Redis.from_url(empty_server) as client:
        await client.config_resetstat()
        writes = [Write(f"s{i}", b"", value()) for i in range(COMMIT_STREAMS + 1)]
        await redis_store.commit(MODEL, writes)
        await redis_store.load(MODEL, [write.stream_id for write in writes])
        assert await redis_store.delete(MODEL, "s0", b"entry")
        assert await redis_store.change_policy({"alpha": b"1", "strict": None}) == {"alpha": b"1"}
        calls = await client.info("commandstats")
    assert calls["cmdstat_fcall"]["calls"] == 2
    assert calls["cmdstat_mget"]["calls"] == 1
    assert calls["cmdstat_multi"]["calls"] == 2


@pytest.mark.parametrize("protocol", [2, 3])
async def test_both_protocols_read_the_same(empty_server: str, protocol: int) -> None:
    store = RedisStore(f"{empty_server}?protocol={protocol}", state_ttl=60, result_ttl=60)
    await store.open()
    new = value()
    assert await store.commit(MODEL, [Write("a", b"", new, b"t", log=[b"entry"])]) == [True]
    assert await store.load(MODEL, ["a", "b"]) == [new, None]
    assert await store.load_trails(MODEL, ["a"]) == [[b"t"]]
    assert (await store.scan(MODEL, "", 10)).stream_ids == ["a"]
    [(shard, [(place, _)])] = await store.read_log(["0-0"] * SHARDS, 10)
    assert shard == shard_of("a")
    assert await store.read_log([place.decode()] * SHARDS, 10) == []
    assert await store.change_policy({"alpha": b"1"}) == await store.policy() == {"alpha": b"1"}
    await store.close()


async def test_no_server_is_told_at_once() -> None:
    store = RedisStore("redis://127.0.0.1:1", state_ttl=60, result_ttl=60)
    started = time.monotonic()
    calls = (store.open(), store.load(MODEL, ["a"]), store.commit(MODEL, [Write("a", b"", value())]), store.ping())
    for call in (*calls, store.policy(), store.change_policy({"alpha": b"1"}), store.waited(MODEL, 1)):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await call
    assert time.monotonic() - started < 7 * TIMEOUT_SECONDS
    await store.close()


async def test_a_socket_whose_handle_the_event_loop_has_closed_is_a_store_that_does_not_answer(
    redis_store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to perform operation on <UnixTransport closed=True>; the handler is closed")  # as uvloop says it

    with monkeypatch.context() as patched:
        patched.setattr(AbstractConnection, "send_packed_command", closed)
        with pytest.raises(StoreUnavailable, match="handler is closed"):
            await redis_store.load(MODEL, ["a"])
    assert await redis_store.load(MODEL, ["a"]) == [None]
