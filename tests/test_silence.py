"""A silence is raised while it lasts, once, and only where the stream's own cadence makes it improbable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from service import cadence, tasks
from service.detector import Detector
from service.errors import StoreUnavailable
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.silence import RETURN_SECONDS, SWEPT, Silence, Sweeper
from service.state import StateCodec
from service.stores import StateStore
from service.stores.clock import StoreClock
from service.stores.memory import MemoryStore
from service.stores.redis import SHARDS, shard_of
from tests.times import Clock

TTL = 3600
CODEC = StateCodec(features=1, state_size=1, model=1)


# ── cadence ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def surprises(gaps: NDArray[Any], alpha: float = 1e-3) -> tuple[float, NDArray[np.float64]]:
    """Share of gaps [B, N] that outlasted the patience, and the patience [B] in the end."""
    rows, raised, told = CODEC.fresh(len(gaps)), 0, 0
    for gap in gaps.T:
        patience = cadence.patience(rows, alpha)
        told += int(np.isfinite(patience).sum())
        raised += int((gap > patience).sum())
        cadence.learn(rows, gap)
    return raised / max(told, 1), cadence.patience(rows, alpha)


RNG = np.random.default_rng(3)
IRREGULAR: dict[str, Callable[[tuple[int, int]], NDArray[Any]]] = {
    "poisson": lambda size: RNG.exponential(60.0, size),
    "heavy-tailed": lambda size: RNG.lognormal(3.0, 2.0, size),
    "jittered": lambda size: 10 * (1 + 0.1 * RNG.normal(size=size)).clip(0.2),
    "bursts": lambda size: np.where(RNG.random(size) < 0.9, 0.0, RNG.exponential(600.0, size)),
    "some lost": lambda size: 10.0 * RNG.geometric(0.8, size),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_gaps_that_are_usual_for_a_stream_are_no_silence(kind: str) -> None:
    share, patience = surprises(IRREGULAR[kind]((40, 2000)))
    assert share <= 1.5e-3
    assert np.isfinite(patience).all()


def test_pauses_of_every_night_are_known_after_a_few() -> None:
    gaps = np.where(np.arange(2000) % 96 == 95, 43_200.0, 300.0)[None]
    share, patience = surprises(gaps)
    assert share * (2000 - cadence.GAPS) <= 4
    assert patience[0] > 43_200


def test_a_regular_stream_is_missed_after_a_few_cadences() -> None:
    for cadence_seconds in (0.1, 10.0, 3600.0):
        _, patience = surprises(np.full((1, 200), cadence_seconds))
        assert 2 < patience[0] / cadence_seconds < 5


def test_nothing_is_said_before_enough_gaps_and_a_stricter_rate_is_more_patient() -> None:
    few, enough = (RNG.exponential(5.0, (1, count)) for count in (cadence.GAPS - 1, cadence.GAPS + 500))
    assert surprises(np.concatenate([few, np.zeros((1, 9))], axis=1))[1][0] == np.inf
    assert surprises(np.concatenate([few, np.ones((1, 1))], axis=1))[1][0] < np.inf
    assert surprises(enough, 1e-6)[1][0] > surprises(enough, 1e-2)[1][0]


def test_an_outage_does_not_hide_the_next_one() -> None:
    gaps = np.full((1, 300), 10.0)
    gaps[0, 200] = 86_400
    assert surprises(gaps)[1][0] < 600


# ── service ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Two replicas over one store, each with a sweeper, and a clock for all."""

    def __init__(self, detector: Detector, store: StateStore, policy: Policy) -> None:
        self.clock, self.store, self.raised = Clock(), store, list[Silence]()
        self.metrics = [Metrics(), Metrics()]
        self.replicas = [Scorer(detector, policy, store, metrics, Limits(), self.clock) for metrics in self.metrics]
        self.sweepers = [
            Sweeper(detector.name, one._codec, lambda: policy, store, metrics, TTL, self.raised.append, self.clock)
            for one, metrics in zip(self.replicas, self.metrics, strict=True)
        ]
        for replica in self.replicas:
            replica.start()

    async def speak(self, stream: str, events: int, gap: float = 10.0, behind: float = 0.0) -> Result:
        """Events in turn over both replicas, one every `gap` seconds."""
        assert events
        for i in range(events):
            self.clock.now += gap
            event = Event(stream_id=stream, values={"value": float(i % 3)}, timestamp=self.clock.now - behind)
            [answer] = await self.replicas[i % 2].score([event])
        assert isinstance(answer, Result)
        return answer

    async def sweep(self) -> None:
        await asyncio.gather(*(sweeper.sweep() for sweeper in self.sweepers))

    def another_sweeper(self) -> Sweeper:
        """Of a replica that starts now."""
        return Sweeper("tiny", self.replicas[0]._codec, Policy, self.store, Metrics(), TTL, self.raised.append, self.clock)

    def sample(self, name: str) -> float:
        return sum(metrics.registry.get_sample_value(name, {"model": "tiny"}) or 0 for metrics in self.metrics)


@pytest.fixture
async def world(tiny_detector: Detector, any_store: StateStore) -> AsyncIterator[World]:
    world = World(tiny_detector, any_store, Policy())
    await world.sweep()
    yield world
    for replica in world.replicas:
        await replica.drain(1)


async def test_a_silence_is_raised_while_it_lasts_once_and_the_next_event_clears_it(world: World) -> None:
    spoken = await world.speak("s", 100)
    world.clock.now += 20
    await world.sweep()
    assert world.raised == []
    world.clock.now += 60
    for _ in range(3):
        await world.sweep()
        world.clock.now += 20
    [silence] = world.raised
    assert (silence.stream_id, silence.last_event) == ("s", spoken.timestamp)
    assert 20 < silence.patience < 60
    seen = await world.replicas[0].streams.last("s")
    assert (seen.silent_since, seen.is_anomaly, seen.state_version) == (spoken.timestamp, True, 100)
    assert [result.stream_id for result in await world.replicas[1].streams.silent(10)] == ["s"]
    assert world.sample("onset_silences_total") == 1
    back = await world.speak("s", 1)
    assert (back.is_anomaly, back.silent_since) == (False, None)
    seen = await world.replicas[0].streams.last("s")
    assert (seen.silent_since, seen.is_anomaly) == (None, False)
    assert await world.replicas[1].streams.silent(10) == []


async def test_the_next_silence_is_raised_again(world: World) -> None:
    for i in (1, 2):
        await world.speak("s", 100)
        world.clock.now += 400
        await world.sweep()
        assert len(world.raised) == i


async def test_a_stream_of_short_bursts_and_long_pauses_is_waited_for_and_not_counted_as_silent(world: World) -> None:
    for _ in range(40):
        await world.speak("s", 1, gap=86_400.0)
        await world.speak("s", 1, gap=0.001)
    assert [await world.store.silent("tiny", 10), (await world.store.waited("tiny", 10))[0]] == [(0, []), 1]


async def test_a_stream_that_speaks_is_looked_at_and_left_alone(world: World) -> None:
    await world.speak("s", 60)
    for _ in range(30):
        await world.speak("s", 3)
        await world.sweep()
    assert world.raised == []


@pytest.mark.parametrize("every", [5, 60, 240])
async def test_a_sender_that_collects_readings_of_each_second_is_not_silent_in_between(world: World, every: int) -> None:
    async def send() -> None:
        """What Prometheus does for some seconds, and a gateway for a minute."""
        for step in range(every):
            world.clock.now += 1
            if step % max(2, every // 20) == 1:
                await world.sweep()
        events = [Event("s", {"value": float(i % 3)}, timestamp=world.clock.now - every + 1 + i) for i in range(every)]
        await world.replicas[0].score(events)

    for _ in range(max(20, 200 // every)):
        await send()
    assert world.raised == []
    world.clock.now += 3 * every
    await world.sweep()
    [silence] = world.raised
    assert every < silence.patience < 3 * every


async def test_an_outage_on_our_side_makes_nobody_more_than_twice_as_patient(world: World) -> None:
    await world.speak("s", 100)
    world.clock.now += 3600
    await world.replicas[0].score([Event("s", {"value": 1.0}, timestamp=world.clock.now - 3590 + 10 * i) for i in range(360)])
    await world.speak("s", 5)
    world.clock.now += 120
    await world.sweep()
    [silence] = world.raised
    assert 20 < silence.patience < 100


async def test_a_stream_that_ended_after_one_delivery_has_not_paused_since_then(world: World) -> None:
    def delivery() -> list[Event]:
        return [Event("s", {"value": float(i % 3)}, timestamp=world.clock.now - 100 + i) for i in range(100)]

    scorer = world.replicas[0]
    await scorer.score(delivery())
    await scorer.streams.end({"s": world.clock.now})
    world.clock.now += 86_400
    await scorer.score(delivery())
    for _ in range(3):
        world.clock.now += 100
        await scorer.score(delivery())
    world.clock.now += 3600
    await world.sweep()
    [silence] = world.raised
    assert silence.patience < 1000


async def test_a_first_delivery_in_parts_says_nothing_of_how_often_they_come(world: World) -> None:
    events = [Event("s", {"value": float(i % 3)}, timestamp=world.clock.now - 100 + i) for i in range(100)]
    for part in (events[:60], events[60:]):
        world.clock.now += 0.1
        await world.replicas[0].score(part)
    world.clock.now += 90
    await world.sweep()
    assert world.raised == []


async def test_a_stream_whose_clock_is_ahead_is_missed_as_any_other(world: World) -> None:
    spoken = await world.speak("s", 100, behind=-3600)
    world.clock.now += 20
    await world.sweep()
    assert world.raised == []
    world.clock.now += 60
    await world.sweep()
    assert [(silence.stream_id, silence.last_event) for silence in world.raised] == [("s", spoken.timestamp)]


async def test_nobody_waits_for_the_past_or_for_a_stream_too_new(world: World) -> None:
    await world.speak("old", 100, behind=86_400)
    await world.speak("new", 20)
    world.clock.now += 7200
    await world.sweep()
    assert world.raised == []


async def test_a_stream_that_turns_to_the_past_or_is_forgotten_is_no_longer_waited_for(world: World) -> None:
    await world.speak("gone", 100)
    await world.replicas[0].streams.forget("gone")
    world.clock.now += 7200
    await world.sweep()
    assert world.raised == []
    assert await world.store.due("tiny", 1e11, 10) == []


@pytest.mark.parametrize("unread", [0.0, 55.0])
async def test_while_nobody_may_read_a_queue_since_its_replica_was_killed_no_stream_of_it_is_raised(world: World, unread: float) -> None:
    sweeper = world.replicas[0].sweeper(TTL, unread)
    await sweeper.sweep()
    await world.speak("s", 100)
    for _ in range(60):
        world.clock.now += 1
        await sweeper.sweep()
    assert (await world.store.silent("tiny", 1))[0] == (not unread)
    if unread:  # another replica reads on: the backlog, and then what comes
        await world.speak("s", 5)
        await sweeper.sweep()
        assert (await world.store.silent("tiny", 1))[0] == 0
    for _ in range(300):
        world.clock.now += 1
        await sweeper.sweep()
    assert (await world.store.silent("tiny", 1))[0] == 1


async def test_after_a_start_every_stream_gets_its_patience_anew(world: World, tiny_detector: Detector) -> None:
    await world.speak("s", 100)
    world.clock.now += 3000
    late = world.another_sweeper()
    await late.sweep()
    assert world.raised == []
    world.clock.now += 120
    await late.sweep()
    assert len(world.raised) == 1


async def test_after_a_start_a_fast_stream_has_the_time_that_its_sender_needs_to_come_back(world: World, tiny_detector: Detector) -> None:
    await world.speak("s", 100, gap=0.02)
    world.clock.now += 4  # the service was down
    late = world.another_sweeper()
    for seconds, raised in ((0, 0), (RETURN_SECONDS - 1, 0), (1, 1)):
        world.clock.now += seconds
        await late.sweep()
        assert len(world.raised) == raised


async def test_streams_that_get_their_patience_anew_do_not_keep_one_that_falls_silent_from_being_seen(world: World) -> None:
    slow = [f"slow {i}" for i in range(SWEPT + 10)]
    quick = next(name for i in range(10_000) if shard_of(name := f"quick {i}") == SHARDS - 1)  # behind all others in the store
    for i in range(60):
        world.clock.now += 600
        await world.replicas[0].score([Event(stream_id=name, values={"value": i % 3}, timestamp=world.clock.now) for name in slow])
    world.clock.now += 20_000  # the service was down
    await world.speak(quick, 60, gap=1.0)
    late = world.another_sweeper()
    for seconds in (0, RETURN_SECONDS + 5):
        world.clock.now += seconds
        await late.sweep()
    assert [silence.stream_id for silence in world.raised] == [quick]
    for _ in range(4):
        world.clock.now += 1000
        await late.sweep()
    assert {silence.stream_id for silence in world.raised} == {quick, *slow}


@pytest.mark.parametrize("jump", [600.0, -200.0])
async def test_after_a_pause_of_the_process_or_a_change_of_its_clock_every_stream_gets_its_patience_anew(world: World, jump: float) -> None:
    sweeper = world.another_sweeper()
    running = asyncio.create_task(sweeper.run(every=0.01))
    for _ in range(20):
        await world.speak("s", 5, gap=1.0)
        await asyncio.sleep(0.03)
    world.clock.now += jump
    await asyncio.sleep(0.1)
    assert world.raised == []
    [answer] = await world.replicas[0].score([Event(stream_id="s", values={"value": 0.0})])  # it has only our clock
    assert isinstance(answer, Result)
    later = world.clock.now + 150
    async with asyncio.timeout(30):
        while world.clock.now < later and not world.raised:
            world.clock.now += 2
            await asyncio.sleep(0.03)
    assert [silence.stream_id for silence in world.raised] == ["s"]
    await tasks.end(running)


async def test_a_frozen_stream_that_falls_silent_stays_frozen_and_an_acceptance_leaves_it_silent(world: World) -> None:
    await world.speak("s", 600)
    for _ in range(3):
        world.clock.now += 10
        await world.replicas[0].score([Event(stream_id="s", values={"value": 99.0}, timestamp=world.clock.now)])
    world.clock.now += 300
    await world.sweep()
    seen = await world.replicas[0].streams.last("s")
    assert (seen.status, seen.silent_since is not None) == ("frozen", True)
    accepted = await world.replicas[1].streams.accept("s")
    assert (accepted.status, accepted.silent_since) == ("ready", seen.silent_since)


async def test_with_silence_off_no_watch_is_written(tiny_detector: Detector) -> None:
    world = World(tiny_detector, MemoryStore(state_ttl=TTL, result_ttl=600), Policy(silence=False))
    await world.speak("s", 100)
    assert await world.store.due("tiny", 1e11, 10) == []
    for replica in world.replicas:
        await replica.drain(1)


class Failing(MemoryStore):
    down = True

    async def due(self, model: str, now: float, limit: int) -> list[str]:
        if self.down:
            raise StoreUnavailable("The store does not answer.")
        raise KeyError("a bug")


class Away(MemoryStore):
    away = False

    async def due(self, model: str, now: float, limit: int) -> list[str]:
        if self.away:
            raise StoreUnavailable("The store does not answer.")
        return await super().due(model, now, limit)


@pytest.mark.parametrize(("outage", "raised"), [(3, 1), (60, 0)])
async def test_a_store_that_stalls_now_and_then_hides_no_stream_that_seldom_speaks(
    tiny_detector: Detector, outage: int, raised: int
) -> None:
    store = Away(state_ttl=TTL, result_ttl=600)
    world = World(tiny_detector, store, Policy())
    sweeper = world.sweepers[0]
    await sweeper.sweep()
    await world.speak("slow", 100, gap=300.0)
    for second in range(3000):
        world.clock.now += 1
        store.away = second % 600 >= 600 - outage
        if store.away:
            with pytest.raises(StoreUnavailable):
                await sweeper.sweep()
        else:
            await sweeper.sweep()
    assert len(world.raised) == raised  # after a minute's outage it has its patience anew, which is more than ten minutes
    for replica in world.replicas:
        await replica.drain(1)


@pytest.mark.parametrize("stalls", [range(3, 9), range(3, 30, 2)])
async def test_who_may_have_been_turned_away_for_seconds_has_time_to_come_back(tiny_detector: Detector, stalls: range) -> None:
    store = Away(state_ttl=TTL, result_ttl=600)
    world = World(tiny_detector, store, Policy())
    sweeper = world.sweepers[0]
    await sweeper.sweep()
    await world.speak("quick", 200, gap=1.0)
    for second in range(stalls.stop + 9):
        world.clock.now += 1
        store.away = second in stalls
        with contextlib.suppress(StoreUnavailable):
            await sweeper.sweep()
        if second < 2:
            await world.speak("quick", 1, gap=0.0)
    assert world.raised == []
    for _ in range(60):
        world.clock.now += 1
        await sweeper.sweep()
    assert [silence.stream_id for silence in world.raised] == ["quick"]
    for replica in world.replicas:
        await replica.drain(1)


async def test_an_outage_is_one_line_however_long_it_lasts(tiny_detector: Detector) -> None:
    store = Away(state_ttl=TTL, result_ttl=600)
    world = World(tiny_detector, store, Policy())
    with capture_logs() as logs:
        running = asyncio.create_task(world.sweepers[0].run(every=0.01))
        for store.away in (True, False, True, False):
            await asyncio.sleep(0.1)
        await tasks.end(running)
    assert [entry["event"] for entry in logs] == ["sweep_failed"] * 2
    for replica in world.replicas:
        await replica.drain(1)


async def test_a_sweeper_outlives_outages_and_bugs(tiny_detector: Detector) -> None:
    world = World(tiny_detector, Failing(state_ttl=TTL, result_ttl=600), Policy())
    for down, counted in ((True, 0), (False, 1)):
        world.store.down = down  # type: ignore[attr-defined]
        with capture_logs():
            task = asyncio.create_task(world.sweepers[0].run())
            await asyncio.sleep(0.05)
            assert not task.done()
            task.cancel()
        assert world.metrics[0].registry.get_sample_value("onset_unexpected_errors_total") == counted
    for replica in world.replicas:
        await replica.drain(1)


# ── the store's clock ────────────────────────────────────────────────────────────────────────────────────────────────


class Seen:
    """The store as one replica sees it, which reads its clock with each ping. `ahead` [1] is how far that is ahead of all uptimes."""

    def __init__(self, store: StateStore, uptime: Clock, ahead: list[float]) -> None:
        self._store, self._ahead, self.clock = store, ahead, StoreClock(uptime)
        self.before_load: Callable[[], Awaitable[object]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def ping(self) -> None:
        self.clock.read(self.clock.uptime() + self._ahead[0], self.clock.uptime())

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        if (call := self.before_load) is not None:
            self.before_load = None
            await call()
        return await self._store.load(model, stream_ids)


class Steps:
    """Two replicas over a store whose clock may step; each learns of that by its own pings alone."""

    def __init__(self, detector: Detector, store: StateStore) -> None:
        self.uptime, self.ahead, self.raised = Clock(7000.0), [1.8e9], list[Silence]()
        self.seen = [Seen(store, self.uptime, self.ahead) for _ in range(2)]
        self.replicas = [Scorer(detector, Policy(), cast("StateStore", seen), Metrics(), Limits(), seen.clock) for seen in self.seen]
        self.sweepers = []
        for one, seen in zip(self.replicas, self.seen, strict=True):
            sweeper = Sweeper(detector.name, one._codec, Policy, cast("StateStore", seen), Metrics(), TTL, self.raised.append, seen.clock)
            seen.clock.when_stepped(sweeper.anew)
            self.sweepers.append(sweeper)
            one.start()

    async def speak(self, replica: int) -> None:
        event = Event(stream_id="s", values={"value": 1.0}, timestamp=self.uptime.now + 1.8e9)
        assert isinstance((await self.replicas[replica].score([event]))[0], Result)

    async def sweep(self) -> None:
        for sweeper in self.sweepers:
            await sweeper.sweep()

    async def go_on(self, events: int, gap: float = 10.0) -> None:
        for i in range(events):
            self.uptime.now += gap
            await self.speak(i % 2)
            await self.sweep()


@pytest.fixture
async def steps(tiny_detector: Detector, any_store: StateStore) -> AsyncIterator[Steps]:
    steps = Steps(tiny_detector, any_store)
    await steps.sweep()
    yield steps
    for replica in steps.replicas:
        await replica.drain(1)


@pytest.mark.parametrize("seconds", [250.0, -3600.0, 25.0, -25.0])
async def test_when_the_stores_clock_steps_nothing_that_speaks_is_raised_and_what_does_not_is_in_its_time(
    steps: Steps, seconds: float
) -> None:
    await steps.go_on(100)
    steps.ahead[0] += seconds
    steps.uptime.now += 5
    await steps.sweep()
    await steps.seen[0].ping()
    await steps.go_on(5)
    assert steps.raised == []
    last = steps.uptime.now
    while not steps.raised:
        steps.uptime.now += 1
        await steps.sweep()
        assert steps.uptime.now < last + 120
    assert last + 20 < steps.uptime.now < last + steps.raised[0].patience + 2
    await steps.sweep()
    assert len(steps.raised) == 1


async def test_a_stream_that_a_replica_wrote_by_the_new_clock_is_not_judged_by_the_one_that_a_sweep_began_with(steps: Steps) -> None:
    await steps.go_on(100)

    async def step() -> None:
        steps.ahead[0] -= 3600
        await steps.seen[0].ping()
        await steps.speak(0)

    for _ in range(10):  # until the stream is due to be looked at
        steps.uptime.now += 9.9
        steps.seen[1].before_load = step
        await steps.sweepers[1].sweep()
        if steps.seen[1].before_load is None:
            break
        steps.uptime.now += 0.1
        await steps.speak(0)
    assert steps.seen[1].before_load is None
    assert steps.raised == []
    await steps.go_on(5)
    assert steps.raised == []
