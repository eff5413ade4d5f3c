"""A session that falls silent ends: by one event, whoever sweeps and whoever is killed, and never while lines come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.alerts import decoded
from service.detector import Detector
from service.events import Event, Result
from service.feed import Batch, Feed
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.sessions import SessionSweeper
from service.silence import FOREIGN_SECONDS, RETURN_SECONDS
from service.stores import StateStore
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from tests.log_doors import LINES
from tests.tiny_log import build_tiny_log

TTL, SECONDS = 3600, 30.0
ACCEPTED, TOOK, CLOSED = LINES[:3]


@pytest.fixture(scope="module")
def log_detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector.load(build_tiny_log(tmp_path_factory.mktemp("sessions"), session_seconds=SECONDS))


class World:
    """Two replicas over one store, each with a sweeper, and a clock for all."""

    def __init__(self, detector: Detector, store: StateStore, policy: Policy | None = None) -> None:
        self.now, self.store, self.detector = 1.8e9, store, detector
        self.policy = policy or Policy()
        self.told: list[tuple[str, float, str | None]] = []
        self.metrics: list[Metrics] = []
        self.replicas: list[Scorer] = []
        self.sweepers: list[SessionSweeper] = []
        for _ in range(2):
            self.start()

    def start(self, detector: Detector | None = None) -> None:
        """One more replica, or one of another file."""
        metrics = Metrics()
        feed = Feed(metrics)
        feed.watch(self._watch)
        replica = Scorer(detector or self.detector, self.policy, self.store, metrics, Limits(), lambda: self.now, feed=feed)
        replica.start()
        sweeper = replica.session_sweeper()
        assert sweeper is not None
        self.metrics.append(metrics)
        self.replicas.append(replica)
        self.sweepers.append(sweeper)

    def _watch(self, batch: Batch) -> None:
        records, messages = batch.answers.batch.outcomes.records, batch.messages
        assert messages is not None
        self.told += zip(batch.stream_ids, records["x"][:, 0].tolist(), messages, strict=True)

    async def say(self, *lines: str | None, stream: str = "s", gap: float = 1.0, behind: float = 0.0, replica: int = 0) -> Result:
        """Lines (None = the session's end), one every `gap` seconds."""
        for line in lines:
            self.now += gap
            event = Event(stream, None, line, self.now - behind, end=line is None)
            [answer] = await self.replicas[replica].score([event])
        assert isinstance(answer, Result), answer
        return answer

    async def sweep(self) -> None:
        await asyncio.gather(*(sweeper.sweep() for sweeper in self.sweepers))

    async def last(self, stream: str = "s") -> Result:
        return await self.replicas[1].streams.last(stream)

    @property
    def ends(self) -> list[str]:
        """Streams whose end was told, in order."""
        return [stream for stream, code, _ in self.told if code == 5]

    def sample(self, name: str) -> float:
        return sum(metrics.registry.get_sample_value(name, {"model": "tiny-log"}) or 0 for metrics in self.metrics)


@pytest.fixture
async def world(log_detector: Detector, any_store: StateStore) -> AsyncIterator[World]:
    world = World(log_detector, any_store)
    await world.sweep()
    yield world
    for replica in world.replicas:
        await replica.drain(1)


async def test_a_session_whose_lines_may_wait_in_a_queue_that_nobody_reads_is_not_over(world: World) -> None:
    world.sweepers = [sweeper for replica in world.replicas if (sweeper := replica.session_sweeper(unread=55.0))]
    await world.sweep()
    await world.say(ACCEPTED, TOOK)
    for _ in range(4):  # of two replicas one was killed: the other reads its part later
        world.now += (SECONDS + 50) / 4
        await world.sweep()
    assert world.ends == []
    await world.say(CLOSED)
    world.now += SECONDS + 50
    await world.sweep()
    assert world.ends == []
    world.now += 10
    await world.sweep()
    assert world.ends == ["s"]


async def test_a_session_that_falls_silent_ends_once_by_a_scored_event_of_its_last_lines_time(world: World) -> None:
    line = await world.say(ACCEPTED, TOOK, CLOSED)
    world.now += SECONDS - 1
    await world.sweep()
    assert world.ends == []
    world.now += 2
    for _ in range(4):
        await world.sweep()
        world.now += 20
    last = await world.last()
    assert (last.state_version, last.timestamp, last.is_anomaly) == (line.state_version + 1, line.timestamp, False)
    assert last.line
    assert last.line.template == "(end of session)"
    assert last.p_value is not None
    assert last.p_value > 0.8
    assert world.told[-1] == ("s", 5.0, None)
    assert world.ends == ["s"]
    assert world.sample("onset_sessions_ended_total") == 1


async def test_a_session_whose_line_was_the_last_before_another_file_came_into_force_ends_when_its_own_is_again(
    world: World, tmp_path: Path
) -> None:
    await world.say(ACCEPTED, TOOK, CLOSED)
    world.start(Detector.load(build_tiny_log(tmp_path, session_seconds=SECONDS + 1)))
    other = world.sweepers.pop()
    await other.sweep()
    for _ in range(2):
        world.now += SECONDS + 20
        await other.sweep()
    assert world.ends == []
    await world.sweep()
    world.now += FOREIGN_SECONDS
    await world.sweep()
    assert world.ends == ["s"]


async def test_a_session_that_stops_too_early_is_an_anomaly_with_an_alert(world: World) -> None:
    await world.say(ACCEPTED)
    world.now += SECONDS + 1
    await world.sweep()
    last = await world.last()
    assert last.is_anomaly
    assert next(iter(last.expected)) == "Took <NUM> ms for <*>", "what would have been normal"
    assert world.sample("onset_onsets_total") == 1
    if isinstance(world.store, MemoryStore):
        [opened] = [decoded(entry) for entry in world.store.log]
        assert (opened.what, opened.stream_id, opened.evidence is not None) == ("opened", "s", True)


async def test_hundreds_of_sessions_end_once_each_with_two_sweepers_at_once(world: World) -> None:
    for replica in world.replicas:
        await replica.score([Event(f"s{i}", None, ACCEPTED, world.now) for i in range(400)])
    world.now += SECONDS + 1
    for _ in range(3):
        await world.sweep()
    assert sorted(world.ends) == sorted(f"s{i}" for i in range(400))
    assert world.sample("onset_sessions_ended_total") == 400


async def test_a_line_keeps_its_session_going(world: World) -> None:
    for i in range(5):
        await world.say(TOOK, gap=SECONDS - 1, replica=i % 2)
        await world.sweep()
    assert (world.ends, (await world.last()).state_version) == ([], 5)
    world.now += SECONDS + 1
    await world.sweep()
    assert world.ends == ["s"]


async def test_a_line_that_is_written_while_the_session_is_about_to_end_wins(world: World) -> None:
    await world.say(ACCEPTED)
    world.now += SECONDS + 1
    replica = world.replicas[0]
    loaded = replica._codec.decode(await world.store.load("tiny-log", ["s"]))
    await world.say(TOOK, gap=0.0, replica=1)
    await replica._end_sessions(["s"], loaded)
    assert (world.ends, (await world.last()).state_version) == ([], 2)
    await world.sweep()
    assert world.ends == [], "it has its time anew"
    world.now += SECONDS + 1
    await world.sweep()
    assert world.ends == ["s"]


async def test_a_line_after_the_end_begins_the_next_session_also_one_from_before_the_end_was_known(world: World) -> None:
    said = await world.say(ACCEPTED, TOOK)
    world.now += SECONDS + 1
    await world.sweep()
    assert isinstance(said.timestamp, float)
    [late] = await world.replicas[1].score([Event("s", None, ACCEPTED, said.timestamp + 0.5)])
    assert isinstance(late, Result)
    assert late.line
    assert (late.late, late.line.before, late.state_version) == (False, [], 4)
    assert next(part for part in [*late.contributors, None] if part is None or part.feature == "gap") is None, (
        "a session's first line has no gap"
    )
    world.now += SECONDS + 1
    await world.sweep()
    assert world.ends == ["s", "s"]


async def test_lines_that_are_sent_again_after_the_end_begin_no_session(world: World) -> None:
    events = [Event("s", None, TOOK if i else ACCEPTED, world.now + min(i, 1), f"e{i}") for i in range(30)]  # most of one instant
    await world.replicas[0].score(events)
    world.now += SECONDS + 1
    await world.sweep()
    for replica in world.replicas:
        assert all(isinstance(answer, Result) and answer.duplicate for answer in await replica.score(events))
    assert (world.ends, (await world.last()).state_version) == (["s"], 31)


async def test_a_session_that_has_ended_by_its_own_event_does_not_end_again(world: World) -> None:
    await world.say(ACCEPTED, TOOK, CLOSED, None)
    world.now += 10 * SECONDS
    await world.sweep()
    assert (world.ends, (await world.last()).state_version) == (["s"], 4)
    assert await world.store.due("tiny-log", 1e11, 10) == []


async def test_sessions_of_an_old_file_end_too(world: World) -> None:
    await world.say(ACCEPTED, stream="old", behind=1e8)
    world.now += SECONDS + 1
    await world.sweep()
    assert world.ends == ["old"]


async def test_after_a_start_every_session_has_its_time_anew_and_then_ends(world: World) -> None:
    await world.say(ACCEPTED)
    world.now += 3000  # nobody swept
    world.sweepers.clear()
    world.start()
    for seconds, ended in ((0.0, []), (SECONDS - 1, []), (1.0, ["s"]), (SECONDS, ["s"])):
        world.now += seconds
        await world.sweep()
        assert world.ends == ended


async def test_a_stream_whose_session_is_over_is_forgotten_sooner_than_others(log_detector: Detector) -> None:
    clock = [1.8e9]
    world = World(log_detector, MemoryStore(state_ttl=10 * TTL, result_ttl=600, clock=lambda: clock[0]))
    await world.sweep()
    for stream, lines in (("over", (ACCEPTED, TOOK, CLOSED, None)), ("open", (ACCEPTED,)), ("again", (CLOSED, None, ACCEPTED))):
        await world.say(*lines, stream=stream)
    clock[0] += Limits().session_ttl_seconds + 1
    page, _ = await world.replicas[0].streams.page("", 10)
    assert {result.stream_id for result in page} == {"open", "again"}
    for replica in world.replicas:
        await replica.drain(1)


async def test_nobody_waits_for_a_session_that_is_forgotten(world: World) -> None:
    await world.say(ACCEPTED)
    await world.replicas[0].streams.forget("s")
    world.now += SECONDS + 1
    await world.sweep()
    assert world.ends == []


async def test_sessions_end_where_silences_are_not_raised(log_detector: Detector) -> None:
    world = World(log_detector, MemoryStore(state_ttl=TTL, result_ttl=600), Policy(silence=False))
    await world.sweep()
    await world.say(ACCEPTED)
    world.now += SECONDS + 1
    await world.sweep()
    assert world.ends == ["s"]
    for replica in world.replicas:
        await replica.drain(1)


async def test_no_session_ends_before_the_policy_is_known(world: World) -> None:
    await world.say(ACCEPTED)
    world.now += SECONDS + 1
    for replica in world.replicas:
        replica._held = True
    await world.sweep()
    assert world.ends == []
    world.replicas[0].ask(1e-3, strict=False)
    await world.sweep()
    assert world.ends == ["s"]


async def test_a_short_session_ends_no_sooner_than_senders_need_to_come_back_after_a_start(tmp_path: Path) -> None:
    quick = Detector.load(build_tiny_log(tmp_path, "quick", session_seconds=1.0))
    world = World(quick, MemoryStore(state_ttl=TTL, result_ttl=600))
    await world.say(ACCEPTED)
    await world.sweep()
    for seconds, ended in ((RETURN_SECONDS - 1, []), (1.0, ["s"])):
        world.now += seconds
        await world.sweep()
        assert world.ends == ended
    for replica in world.replicas:
        await replica.drain(1)


async def test_a_model_of_long_lived_streams_has_no_sessions_that_end(tmp_path: Path, redis_store: RedisStore) -> None:
    detector = Detector.load(build_tiny_log(tmp_path))
    scorer = Scorer(detector, Policy(silence=False), redis_store, Metrics(), Limits())
    assert scorer.session_sweeper() is None
    scorer.start()
    await scorer.score([Event("s", None, ACCEPTED, 1.8e9)])
    assert await redis_store.due("tiny-log", 1e11, 10) == []
    await scorer.drain(1)
