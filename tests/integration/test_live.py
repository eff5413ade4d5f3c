"""Replicas that see each other's events through a real store: two of them, whose loops are turned by hand and by one clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from service.console.recent import ANOMALY, ONSET, Recent, Room
from service.console.shared import (
    ASK_SECONDS,
    ASKED_SECONDS,
    FLEET,
    HEARD_SECONDS,
    HISTORY_STREAMS,
    HOLD_SECONDS,
    TELL_BYTES,
    Ask,
    Part,
    Shared,
)
from service.detector import Detector
from service.errors import StoreUnavailable
from service.events import Event
from service.feed import Batch, Feed
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.stores.cluster import ClusterStore
from service.stores.live import ASKS_KEY, EVENTS_KEY, EXPIRY_SECONDS, LiveLog
from service.stores.redis import Commands, RedisStore
from tests.servers import ValkeyCluster
from tests.times import Clock
from tests.tiny_log import build_tiny_log

DEPTH = 32
STREAMS = 5000


class Replica:
    """A scorer over the shared store, the rings that it fills, and its side of the common view."""

    def __init__(self, name: str, detector: Detector, store: RedisStore | ClusterStore, clock: Clock) -> None:
        metrics = Metrics()
        self.recent = Recent(detector.manifest, Room(STREAMS * DEPTH * 64, [detector.name]), DEPTH, clock=clock)
        log = LiveLog(clock)
        log.connect(store)
        self.shared = Shared({detector.name: self.recent}, name, log, metrics, clock)
        self.model = detector.name
        feed = Feed(metrics)
        feed.watch(self._see)
        self.scorer = Scorer(detector, Policy(), store, metrics, Limits(), feed=feed)
        self.news = 0
        self.shared.news = self._told

    def _see(self, batch: Batch) -> None:
        put = self.recent.read(batch)
        if put is not None:
            self.shared.take(batch.model, put)

    def _told(self) -> None:
        self.news += 1

    async def score(self, *events: tuple[str, float, float]) -> None:
        """(stream, timestamp, value) each."""
        await self.scorer.score([Event(stream_id=name, timestamp=at, values={"value": value}) for name, at, value in events])

    def times(self, name: str) -> list[float]:
        self.recent.write()
        slot = self.recent.slot(name)
        return [] if slot is None else [float(t) for t in self.recent.events(slot)["t"]]


class Pair:
    """Two replicas, of which pages watch the first."""

    def __init__(self, detector: Detector, store: RedisStore | ClusterStore) -> None:
        self.clock = Clock(1000.0)
        self.here, self.there = (Replica(name, detector, store, self.clock) for name in ("here", "there"))
        self.store: Commands = store

    async def turn(self, seconds: float = 0.2) -> None:
        """Some time passes, and both exchange what they have."""
        self.clock.now += seconds
        for replica in (self.here, self.there, self.here):
            while await replica.shared.turn():
                pass

    async def settle(self) -> None:
        """Until everything that was held is written."""
        await self.turn()
        await self.turn(HOLD_SECONDS + 0.01)

    async def told(self) -> int:
        """Entries that replicas have told."""
        return int((await self.store.pipe([("XLEN", EVENTS_KEY)]))[0])


@asynccontextmanager
async def pair_of(detector: Detector, store: RedisStore | ClusterStore) -> AsyncIterator[Pair]:
    pair = Pair(detector, store)
    for replica in (pair.here, pair.there):
        replica.scorer.start()
    yield pair
    for replica in (pair.here, pair.there):
        await replica.scorer.drain(5)


@pytest.fixture
async def pair(redis_store: RedisStore, tiny_detector: Detector) -> AsyncIterator[Pair]:
    async with pair_of(tiny_detector, redis_store) as pair:
        yield pair


async def spread(pair: Pair, name: str, times: Sequence[float]) -> None:
    for i, at in enumerate(times):
        await (pair.here, pair.there)[i % 2].score((name, at, 10.0))


async def check_the_whole_fleet(pair: Pair) -> None:
    """A stream spread over both, one of each alone; before and while somebody watches."""
    await spread(pair, "both", [float(t) for t in range(1, 9)])
    await pair.there.score(("theirs", 1.0, 5.0))
    await pair.here.score(("ours", 1.0, 5.0))
    end = pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    await pair.settle()
    assert pair.here.times("both") == [float(t) for t in range(1, 9)]
    assert (pair.here.times("theirs"), pair.here.times("ours")) == ([1.0], [1.0])
    assert pair.here.shared.replicas == 2
    for first in range(9, 25, 4):
        await spread(pair, "both", [float(t) for t in range(first, first + 4)])
        await pair.turn()
    await pair.settle()
    assert pair.here.times("both") == [float(t) for t in range(1, 25)]
    end()


async def test_a_page_sees_what_every_replica_scored_in_order_and_each_event_once(pair: Pair) -> None:
    await check_the_whole_fleet(pair)
    slot = pair.here.recent.slot("both")
    assert slot is not None
    assert pair.here.recent.version(slot) == 24
    assert pair.here.recent.mixed(slot) == 1  # by the history; afterwards nothing was written twice
    assert pair.here.news > 0


async def test_the_same_in_a_cluster(empty_cluster: ValkeyCluster, tiny_detector: Detector) -> None:
    store = ClusterStore(empty_cluster.url, state_ttl=60, result_ttl=60)
    await store.open()
    async with pair_of(tiny_detector, store) as pair:
        await check_the_whole_fleet(pair)
    await store.close()


async def test_an_anomaly_that_another_replica_scored_ranks_first_with_its_onset(pair: Pair) -> None:
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    for name in ("calm", "bad"):
        await pair.there.score(*((name, float(t), 10.0 + 0.1 * (t % 3)) for t in range(40)))
    await pair.there.score(("bad", 41.0, 99.0), ("calm", 41.0, 10.0))
    await pair.settle()
    recent = pair.here.recent
    assert [recent.name(slot) for slot in recent.top(2).tolist()] == ["bad", "calm"]
    slot = recent.slot("bad")
    assert slot is not None
    assert int(recent.events(slot)["bits"][-1]) & (ANOMALY | ONSET) == ANOMALY | ONSET


async def test_while_nobody_watches_nothing_is_told_and_nothing_held(pair: Pair) -> None:
    await spread(pair, "both", [1.0, 2.0, 3.0])
    await pair.turn(1.0)
    await pair.turn(1.0)
    assert await pair.told() == 0
    assert pair.here.times("both") == [1.0, 3.0]
    assert pair.here.shared.replicas == 1


async def test_a_watch_that_ended_is_told_nothing_more(pair: Pair) -> None:
    end = pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    await pair.there.score(("theirs", 1.0, 5.0))
    await pair.settle()
    end()
    await pair.turn(ASKED_SECONDS + 1)
    told = await pair.told()
    await pair.there.score(("theirs", 2.0, 5.0))
    await pair.turn(1.0)
    assert (await pair.told(), pair.here.shared.replicas) == (told, 1)
    again = pair.here.shared.watch(pair.here.model, "theirs")
    await pair.turn()
    assert pair.here.times("theirs") == [1.0, 2.0]  # what it missed comes as history
    again()


async def test_watching_one_stream_brings_all_that_is_held_of_it(pair: Pair) -> None:
    times = [float(t) for t in range(1, DEPTH + 1)]
    await pair.there.score(*(("theirs", t, 5.0) for t in times))
    pair.here.shared.watch(pair.here.model, "theirs")
    await pair.turn()
    assert pair.here.times("theirs") == times


async def test_a_fleet_brings_the_last_event_of_its_calm_streams_too_so_that_all_are_found(pair: Pair) -> None:
    many = HISTORY_STREAMS + 700
    await pair.there.score(*((f"s{i}", t, 5.0) for i in range(many) for t in (1.0, 2.0)))
    await pair.here.score((f"s{many - 1}", 3.0, 5.0))
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    assert pair.here.recent.counts().streams == many
    assert [pair.here.times(name) for name in ("s0", f"s{many - 2}", f"s{many - 1}")] == [[1.0, 2.0], [2.0], [3.0]]


async def test_a_replica_that_has_gone_is_no_longer_counted_and_holds_nothing_up(pair: Pair) -> None:
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    await pair.turn(ASK_SECONDS)
    assert pair.here.shared.replicas == 2
    await pair.here.score(("ours", 1.0, 5.0))
    assert pair.here.times("ours") == []
    pair.clock.now += HEARD_SECONDS + 1
    await pair.here.shared.turn()
    assert (pair.here.shared.replicas, pair.here.times("ours")) == (1, [1.0])
    await pair.here.score(("ours", 2.0, 5.0))
    assert pair.here.times("ours") == [1.0, 2.0]


async def test_of_more_than_a_replica_may_tell_the_anomalous_and_the_last_come_first(pair: Pair) -> None:
    await pair.there.score(*(("s999", float(t - 40), 10.0 + 0.1 * (t % 3)) for t in range(40)))
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    names, odd = [f"s{i}" for i in range(1000)], ("s999", 5.0)
    await pair.there.score(*((name, float(t), 99.0 if (name, t) == odd else 10.0 + 0.1 * (t % 3)) for name in names for t in range(10)))
    await pair.settle()
    left_out = pair.here.shared.left_out
    assert left_out > 1000
    assert all(pair.here.times(name)[-1] == 9.0 for name in names)
    assert odd[1] in pair.here.times(odd[0])
    assert pair.here.recent.dtype.itemsize * (10_000 - left_out) < TELL_BYTES


async def test_a_look_at_the_plain_table_brings_the_others_streams_too(pair: Pair) -> None:
    await pair.there.score(("theirs", 1.0, 5.0))
    pair.here.shared.glance()
    await pair.turn()
    assert pair.here.times("theirs") == [1.0]


async def test_without_a_store_the_own_events_are_still_seen(pair: Pair, tiny_detector: Detector) -> None:
    lonely = Shared({tiny_detector.name: pair.here.recent}, "here", LiveLog(), Metrics(), pair.clock)
    with pytest.raises(StoreUnavailable):
        await lonely.turn()
    await pair.here.score(("ours", 1.0, 5.0))
    assert pair.here.times("ours") == [1.0]


async def test_what_is_told_is_gone_from_the_store_when_nobody_adds_to_it(pair: Pair) -> None:
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    await pair.there.score(("theirs", 1.0, 5.0))
    await pair.turn()
    lives = await pair.store.pipe([("TTL", ASKS_KEY), ("TTL", EVENTS_KEY)])
    assert all(0 < seconds <= 30 for seconds in lives)


async def ahead(pair: Pair) -> None:
    """The store's clock was ahead when a replica asked: what is added to that stream has ids of then."""
    ask = msgspec.msgpack.encode(Ask("gone", {}, {}))
    await pair.store.pipe([("XADD", ASKS_KEY, f"{10**13}-1", "ask", ask), ("EXPIRE", ASKS_KEY, 30)])


async def test_asks_are_heard_after_the_stores_clock_was_set_back(pair: Pair) -> None:
    await ahead(pair)
    await pair.turn()
    await pair.store.pipe([("DEL", ASKS_KEY)])  # as it is by itself once nobody watches
    await pair.turn(2 * EXPIRY_SECONDS + 1)
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    await pair.there.score(("theirs", 1.0, 5.0))
    await pair.settle()
    assert pair.here.times("theirs") == [1.0]


async def test_what_others_tell_is_heard_where_asks_began_before_the_stores_clock_was_set_back(pair: Pair) -> None:
    await ahead(pair)
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    await pair.there.score(("theirs", 1.0, 5.0))
    await pair.settle()
    assert pair.here.times("theirs") == [1.0]


async def test_what_others_tell_is_heard_again_after_a_pause_in_which_the_stores_clock_was_set_back(pair: Pair) -> None:
    pair.here.shared.watch(pair.here.model, FLEET)
    await pair.turn()
    part = msgspec.msgpack.encode(Part("gone", "", pair.here.model, "", [], b"", b""))
    await pair.store.pipe([("XADD", EVENTS_KEY, f"{10**13}-1", "part", part)])
    await pair.here.shared.turn()
    await pair.store.pipe([("DEL", EVENTS_KEY)])
    pair.clock.now += 2 * EXPIRY_SECONDS + 1
    await pair.turn()
    await pair.there.score(("theirs", 1.0, 5.0))
    await pair.settle()
    assert pair.here.times("theirs") == [1.0]


async def test_lines_of_a_log_that_another_replica_scored_are_seen_with_their_text(redis_store: RedisStore, tmp_path: Path) -> None:
    async with pair_of(Detector.load(build_tiny_log(tmp_path)), redis_store) as pair:
        pair.here.shared.watch(pair.here.model, FLEET)
        await pair.turn()
        await pair.there.scorer.score([Event(stream_id="web", timestamp=1.0, message="Took 9.5 ms for /a")])
        await pair.settle()
        slot = pair.here.recent.slot("web")
        assert slot is not None
        assert pair.here.recent.events(slot)["message"].tolist() == [b"Took 9.5 ms for /a"]
