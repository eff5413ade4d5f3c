"""Which of two files of one model is in force: the last one started, taken back where that is gone, asked before a stream starts afresh."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar, cast

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from service.claims import BEAT_SECONDS, EXPIRY_SECONDS, GAP_SECONDS, Stake, StoredClaim
from service.consumer import Consumer, Tap
from service.detector import Detector
from service.errors import BadSetting, ItemError, NotCommitted, StoreUnavailable, Superseded, UnknownStream
from service.events import Delivery, Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.problems import problem_of
from service.scorer import MAX_BATCH, Limits, Scorer
from service.silence import RETURN_SECONDS, Sweeper
from service.state import FORMAT, Origin
from service.stores import StateStore, Write
from service.stores.memory import MemoryStore
from tests.test_consumer import MAPPER, Line
from tests.times import Clock, until
from tests.tiny import build_tiny

T = TypeVar("T")

MODEL, EACH = "tiny", 120
OTHERS = np.array([Origin.STORED, Origin.OTHER_MODEL], np.uint8)
OURS = np.array([Origin.STORED, Origin.NEW], np.uint8)


class Start(Protocol):
    async def __call__(self, file: int, instance: str = "") -> Replica: ...


class Store(MemoryStore):
    """Counts what is asked of its claims, and fails where it is told to. What is set runs once, then and there."""

    def __init__(self) -> None:
        super().__init__(state_ttl=3600, result_ttl=600)
        self.asked = 0
        self.claiming = False
        self.away = self.refuses = False
        """It does not answer; it is read from and refuses to be written to."""
        self.before_load: Callable[[], Awaitable[None]] | None = None
        self.before_commit: Callable[[], Awaitable[None]] | None = None
        self.after_claim: Callable[[], Awaitable[object]] | None = None

    async def claimed(self, model: str) -> bytes:
        self._answer()
        claim = await super().claimed(model)
        if not self.claiming:
            await asyncio.sleep(0)  # others read it, too, before anyone goes on
        return claim

    async def claim(self, model: str, expected: bytes | None, claim: bytes) -> bytes:
        self._answer()
        await self.ping()
        self.claiming = True
        before = await super().claim(model, expected, claim)
        self.claiming = False
        meanwhile, self.after_claim = self.after_claim, None
        if meanwhile is not None:
            await meanwhile()
        return before

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        meanwhile, self.before_load = self.before_load, None
        if meanwhile is not None:
            await meanwhile()
        return await super().load(model, stream_ids)

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        meanwhile, self.before_commit = self.before_commit, None
        if meanwhile is not None:
            await meanwhile()
        return await super().commit(model, writes)

    async def ping(self) -> None:
        if self.away or self.refuses:
            raise StoreUnavailable("The store takes nothing.")

    def lose(self) -> None:
        """All it had, as FLUSHALL does."""
        self.__dict__ |= Store().__dict__

    def _answer(self) -> None:
        self.asked += 1
        if self.away:
            raise StoreUnavailable("The store does not answer.")


class Replica:
    """A scorer of one file, and its claim."""

    def __init__(self, detector: Detector, store: StateStore, clock: Clock, instance: str = "") -> None:
        self.metrics, self.clock, self._store = Metrics(), clock, store
        self.claim = StoredClaim(detector, store, self.metrics, clock, instance=instance)
        self.scorer = Scorer(detector, Policy(), store, self.metrics, Limits(), clock, claim=self.claim)
        self.scorer.start()

    @property
    def serves(self) -> bool:
        served = self.claim.wrong is None
        assert served == bool(self.metrics.in_force.labels(MODEL)._value.get())
        return served

    async def send(self, *events: Event) -> list[Result]:
        answers = await self.scorer.score(events)
        assert not any(isinstance(answer, ItemError) for answer in answers)
        return [answer for answer in answers if isinstance(answer, Result)]

    def sweeper(self, raised: list[tuple[str, str]], name: str = "") -> Sweeper:
        """Adds to `raised` its name and each stream that it finds silent."""
        codec = self.scorer.detector.codec()
        store, metrics, clock = self._store, self.metrics, self.clock
        return Sweeper(MODEL, codec, Policy, store, metrics, 3600, lambda it: raised.append((name, it.stream_id)), clock, claim=self.claim)

    def afresh(self, reason: str = "other_model") -> float:
        return float(self.metrics.fresh.labels(reason)._value.get())


def events(count: int, stream: str = "s", start: int = 0) -> list[Event]:
    return [
        Event(stream_id=stream, values={"value": float(i % 3)}, timestamp=1e9 + i, event_id=f"{stream}-{i}")
        for i in range(start, start + count)
    ]


async def pass_(clock: Clock, seconds: float, *beating: Replica) -> None:
    """Time passes, beat by beat."""
    for _ in range(round(seconds / BEAT_SECONDS)):
        clock.now += BEAT_SECONDS
        for replica in beating:
            await replica.claim.beat()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Detector]:
    folder = tmp_path_factory.mktemp("files")
    return [Detector.load(build_tiny(folder, version=version)) for version in ("1", "2", "3")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def start(files: list[Detector], store: Store, clock: Clock) -> AsyncIterator[Start]:
    """Starts a replica of a file, by its number; of an instance that is restarted by itself, or of none."""
    started: list[Replica] = []

    async def start(file: int, instance: str = "") -> Replica:
        started.append(Replica(files[file], store, clock, instance))
        await started[-1].claim.take()
        return started[-1]

    yield start
    for replica in started:
        await replica.scorer.drain(1)


async def test_the_file_that_was_started_last_is_in_force_and_the_other_is_told_by_its_next_beat(start: Start) -> None:
    old, same = await start(0), await start(0)
    await old.claim.beat()
    assert old.serves
    assert same.serves, "replicas of one file do not supersede each other"
    with capture_logs() as lines:
        new = await start(1)
    [said] = [line for line in lines if line["event"] == "model_in_force"]
    assert said["before"].startswith("version 1 (sha256 ")
    assert new.serves
    assert old.serves, "it has not looked yet"
    with capture_logs() as lines:
        await old.claim.beat()
    assert [line["event"] for line in lines] == ["model_superseded"]
    assert not old.serves
    with pytest.raises(Superseded, match=r"has version 1 \(sha256 .*\), and version 2 \(sha256 .*\) was started after it"):
        await old.send(*events(1))
    await new.send(*events(1))
    again = await start(0)  # a rollback
    for replica in (old, new, again):
        await replica.claim.beat()
    assert (old.serves, new.serves, again.serves) == (True, False, True)


async def test_a_build_whose_states_are_of_another_format_is_another_file(start: Start, store: Store) -> None:
    """Each would start the other's streams afresh, batch after batch."""
    old = await start(0)
    stake = msgspec.json.decode(await store.claimed(MODEL), type=Stake)
    await store.claim(MODEL, None, msgspec.json.encode(msgspec.structs.replace(stake, format=FORMAT + 1)))  # a newer build's start
    await old.claim.beat()
    assert not old.serves


async def test_the_restart_of_an_instance_brings_no_former_file_back_and_its_replacement_does(start: Start, clock: Clock) -> None:
    old, new = await start(0, "pod-a"), await start(1, "pod-b")
    with capture_logs() as lines:
        crashed = await start(0, "pod-a")  # before it could learn that it is superseded
    assert [line["event"] for line in lines] == ["model_superseded"]
    assert (crashed.serves, new.serves) == (False, True)
    with pytest.raises(Superseded, match="version 2"):
        await crashed.send(*events(1))
    await pass_(clock, 3 * EXPIRY_SECONDS, new, crashed)
    assert (crashed.serves, new.serves) == (False, True)
    await new.claim.beat()
    again = await start(1, "pod-b")
    assert again.serves, "its file is in force"
    undone = await start(0, "pod-c")
    for replica in (old, crashed, again):
        await replica.claim.beat()
    assert (undone.serves, crashed.serves, again.serves) == (True, True, False)
    changed = await start(2, "pod-b")
    assert changed.serves, "another file than it had: somebody has put it there"


async def test_a_new_file_that_crashed_for_long_is_not_tried_again_by_its_restart(start: Start, clock: Clock) -> None:
    old, _ = await start(0, "pod-a"), await start(1, "pod-b")
    await old.claim.beat()
    await pass_(clock, EXPIRY_SECONDS, old)
    assert old.serves
    restarted = await start(1, "pod-b")
    await pass_(clock, 2 * EXPIRY_SECONDS, old, restarted)
    assert (old.serves, restarted.serves) == (True, False)
    again = await start(1, "pod-c")  # the pod was deleted
    await old.claim.beat()
    assert (old.serves, again.serves) == (False, True)


async def test_an_instance_that_restarts_alone_takes_its_model_back_after_the_expiry(start: Start, store: Store, clock: Clock) -> None:
    await start(0, "pod-a")
    await start(1, "pod-b")
    restarted = await start(0, "pod-a")  # and nothing is left of the other
    await pass_(clock, EXPIRY_SECONDS - 1, restarted)
    assert not restarted.serves
    await pass_(clock, 1, restarted)
    assert restarted.serves
    store.lose()
    assert (await start(0, "pod-a")).serves, "of a store that lost everything nothing is known"


async def test_the_mark_of_an_instance_lives_as_long_as_it_beats(files: list[Detector], clock: Clock) -> None:
    store = MemoryStore(state_ttl=60, result_ttl=600, clock=clock)
    old = Replica(files[0], store, clock, "pod-a")
    await old.claim.take()
    await pass_(clock, 200, old)
    new, crashed = Replica(files[1], store, clock), Replica(files[0], store, clock, "pod-a")
    await new.claim.take()
    await crashed.claim.take()
    assert (crashed.serves, new.serves) == (False, True)
    for replica in (old, new, crashed):
        await replica.scorer.drain(1)


async def test_nothing_is_scored_before_the_claim(files: list[Detector], store: Store, clock: Clock) -> None:
    replica = Replica(files[0], store, clock)
    await replica.claim.beat()
    assert store.asked == 0
    with pytest.raises(StoreUnavailable, match="has not been claimed") as caught:
        await replica.send(*events(1))
    assert not isinstance(caught.value, Superseded)
    await replica.claim.take()
    await replica.send(*events(1))
    await replica.scorer.drain(1)


async def test_a_file_that_is_no_longer_renewed_gives_way_after_the_expiry_and_not_before(start: Start, clock: Clock) -> None:
    old, older, new = await start(0), await start(0), await start(1)
    for replica in (old, older):
        await replica.claim.beat()
    await pass_(clock, 3 * EXPIRY_SECONDS, new, old, older)
    assert (old.serves, new.serves) == (False, True), "it is renewed"
    await pass_(clock, EXPIRY_SECONDS - 1, old, older)
    assert not old.serves
    await pass_(clock, 1, old)
    assert old.serves
    await older.claim.beat()
    assert older.serves, "its file is in force again"
    await new.claim.beat()
    assert not new.serves, "it was only cut off, and learns it"


async def test_of_two_superseded_files_one_takes_the_claim_back(start: Start, clock: Clock) -> None:
    first, second, _ = await start(0), await start(1), await start(2)
    for replica in (first, second):
        await replica.claim.beat()
    clock.now += 1
    for _ in range(15):
        clock.now += BEAT_SECONDS
        await asyncio.gather(first.claim.beat(), second.claim.beat())
        assert not (first.serves and second.serves)
    assert first.serves != second.serves


@pytest.mark.parametrize("trouble", ["away", "refuses"])
async def test_a_store_that_is_away_or_refuses_to_be_written_to_takes_the_claim_from_nobody(
    start: Start, store: Store, clock: Clock, trouble: str
) -> None:
    old, new = await start(0), await start(1)
    await old.claim.beat()
    await pass_(clock, 3, new, old)
    setattr(store, trouble, True)
    for _ in range(20):
        clock.now += BEAT_SECONDS
        for replica in (old, new):
            with pytest.raises(StoreUnavailable):
                await replica.claim.beat()
    setattr(store, trouble, False)
    await pass_(clock, GAP_SECONDS, old)  # which is back before those in force
    await pass_(clock, EXPIRY_SECONDS, old, new)
    assert (old.serves, new.serves) == (False, True)
    await pass_(clock, EXPIRY_SECONDS + 1, old)
    assert old.serves, "those in force are gone"


async def test_a_claim_that_the_store_has_lost_is_written_again_by_those_in_force(start: Start, store: Store, clock: Clock) -> None:
    old, new = await start(0), await start(1)
    await old.claim.beat()
    for _ in range(3):
        store.lose()
        await pass_(clock, 1, old, new, old)
        assert (old.serves, new.serves) == (False, True)
    store.lose()
    await pass_(clock, EXPIRY_SECONDS, old)
    assert not old.serves
    await pass_(clock, 1, old)
    assert old.serves, "nobody else wanted it"


async def test_a_claim_that_was_lost_is_one_files_before_a_stream_starts_afresh(start: Start, store: Store) -> None:
    old, new = await start(0), await start(1)
    await new.send(*events(3, "a"))
    assert old.serves, "nobody has told it"
    store._claims.clear()
    assert [answer.state_version for answer in await old.send(*events(1, "a", 3))] == [1]
    await new.claim.beat()
    assert (old.serves, new.serves) == (True, False)


async def test_a_claim_that_nobody_can_read_holds_nobody_up_for_good(start: Start, store: Store, clock: Clock) -> None:
    replica = await start(0)
    await store.claim(MODEL, None, b"\xff nonsense")
    await replica.claim.beat()
    assert not replica.serves
    assert "another file was started" in (replica.claim.wrong or "")
    await pass_(clock, EXPIRY_SECONDS + 1, replica)
    assert replica.serves


async def test_states_of_another_file_are_asked_about_once_a_batch_and_ones_own_never(start: Start, store: Store) -> None:
    old = await start(0)
    streams = [f"s{i}" for i in range(40)]
    await old.send(*(event for stream in streams for event in events(2, stream)))
    new = await start(1)
    store.asked = 0
    await new.claim.confirm(OURS)
    assert store.asked == 0
    await new.claim.confirm(OTHERS)
    assert store.asked == 1
    answers = await new.send(*(event for stream in streams for event in events(1, stream, 2)))
    assert store.asked == 2
    assert [answer.state_version for answer in answers] == [1] * 40
    await new.send(*(event for stream in streams for event in events(1, stream, 3)))
    assert (store.asked, new.afresh()) == (2, 40)


async def test_whoever_meets_streams_of_the_file_in_force_learns_it_then_and_steps_none_of_them(start: Start, store: Store) -> None:
    old, new = await start(0), await start(1)
    await new.send(*events(3, "a"))
    before = await store.load(MODEL, ["a", "b"])
    assert old.serves
    with pytest.raises(Superseded):
        await old.send(*events(1, "b"), *events(1, "a", 3))
    assert not old.serves
    assert await store.load(MODEL, ["a", "b"]) == before
    for ask in (
        old.scorer.streams.last("a"),
        old.scorer.streams.page("", 10),
        old.scorer.streams.accept("a"),
        old.scorer.streams.end({"a": 2e9}),
    ):
        with pytest.raises(Superseded):
            await ask
    assert await store.load(MODEL, ["a", "b"]) == before
    assert [answer.state_version for answer in await new.send(*events(1, "a", 3))] == [4]


async def test_a_long_request_that_is_overtaken_says_for_each_event_what_became_of_it(start: Start, store: Store) -> None:
    old = await start(0)
    await old.send(*events(1))
    bulk = events(2 * MAX_BATCH, start=1)

    async def meanwhile() -> None:
        await start(1)
        await old.claim.beat()

    store.before_commit = meanwhile
    answers = await old.scorer.score(bulk)
    assert [type(answer) for answer in answers] == [Result] * MAX_BATCH + [NotCommitted] * MAX_BATCH
    problem = problem_of(cast("NotCommitted", answers[-1]))
    assert (problem.status, problem.type, problem.retry_after) == (503, "urn:onset:not-committed", 1)
    assert "store" not in problem.title
    assert "is superseded" in problem.detail


async def test_a_stream_that_ends_or_is_accepted_is_asked_about_too(start: Start) -> None:
    old, new = await start(0), await start(1)
    await new.send(*events(3, "a"))
    with pytest.raises(Superseded):
        await old.scorer.streams.end({"a": 2e9})
    old = await start(0)
    with pytest.raises(UnknownStream):
        await old.scorer.streams.accept("a")
    assert old.serves, "its own file is in force"
    with pytest.raises(Superseded):
        await new.scorer.streams.accept("b" if await old.send(*events(1, "b")) else "")


async def test_a_claim_that_is_made_after_it_was_asked_for_loses_the_old_file_its_commit(start: Start, store: Store) -> None:
    """The race: old asks and is in force; then new is started and has the stream; only then old commits."""
    new = await start(1)
    await new.send(*events(2))
    old = await start(0)
    raced: list[Replica] = []

    async def meanwhile() -> None:
        raced.append(await start(1))
        await raced[0].send(*events(1, start=2))

    store.before_commit = meanwhile
    with pytest.raises(Superseded):
        await old.send(*events(1, start=3))
    assert old.afresh() == 0
    [answer] = await raced[0].send(*events(1, start=3))
    assert (answer.state_version, answer.model_version) == (4, "2"), "its own states from before were never touched"


async def test_the_claim_is_asked_for_after_the_states_were_read(start: Start, store: Store) -> None:
    old = await start(0)
    raced: list[Replica] = []

    async def meanwhile() -> None:
        raced.append(await start(1))
        await raced[0].send(*events(2))

    store.before_load = meanwhile
    with pytest.raises(Superseded):
        await old.send(*events(1, start=2))
    [answer] = await raced[0].send(*events(1, start=2))
    assert answer.state_version == 3


async def test_an_answer_that_comes_late_does_not_bring_a_superseded_file_back(start: Start, store: Store) -> None:
    """Its renewal was in time, the answer overtaken by that of a question asked after it."""
    old = await start(0)
    answered = asyncio.Event()
    store.after_claim = answered.wait
    beat = asyncio.create_task(old.claim.beat())
    await asyncio.sleep(0)
    new = await start(1)
    with pytest.raises(Superseded):
        await old.claim.confirm(OTHERS)
    answered.set()
    await beat
    assert (old.serves, new.serves) == (False, True)


class Jittery(Store):
    """Answers in any order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        return await self._after(super().load(model, stream_ids))

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        return await self._after(super().commit(model, writes))

    async def claimed(self, model: str) -> bytes:
        return await self._after(super().claimed(model))

    async def _after(self, ask: Awaitable[T]) -> T:
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
        answer = await ask
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
        return answer


@pytest.mark.parametrize("seed", range(5))
async def test_however_two_files_are_interleaved_a_stream_starts_afresh_once_for_each_change_of_the_one_in_force(
    files: list[Detector], clock: Clock, seed: int
) -> None:
    store, chance = Jittery(seed), random.Random(seed)
    replicas = [Replica(files[i % 2], store, clock) for i in range(4)]
    for replica in replicas:
        await replica.claim.take()
    streams, changes, refused = [f"s{i}" for i in range(8)], 1, 0
    answered: dict[str, list[Result]] = {stream: [] for stream in streams}
    again = set[str]()
    """Events that were refused before: with others of their batch, which lost the compare, they may have been committed all the same."""

    async def sender(stream: str) -> None:
        nonlocal refused
        for event in events(EACH, stream):
            while True:
                try:
                    [answer] = await chance.choice(replicas).scorer.score([event])
                except Superseded:
                    refused += 1
                    again.add(event.event_id or "")
                    await asyncio.sleep(0)
                    continue
                if isinstance(answer, Result):  # no lost race
                    answered[stream].append(answer)
                    break

    async def operator() -> None:
        nonlocal changes
        file = 1
        while any(len(answers) < EACH for answers in answered.values()):
            for _ in range(chance.randrange(30, 150)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                await chance.choice(replicas).claim.beat()
            elif changes < 6:
                file, changes = 1 - file, changes + 1
                await replicas[file].claim.take()

    await asyncio.gather(*map(sender, streams), operator())
    for replica in replicas:
        await replica.scorer.drain(1)
    assert changes > 2
    assert refused > 0
    starts = sum(replica.afresh() for replica in replicas)
    assert 0 < starts <= len(streams) * changes
    for answers in answered.values():
        assert len(answers) == EACH
        assert sum(answer.state_version == 1 for answer in answers[1:]) <= changes
        for before, answer in itertools.pairwise(answers):
            afresh = answer.state_version == 1 and (answer.model_version != before.model_version or answer.event_id in again)
            goes_on = (answer.model_version, answer.state_version) == (before.model_version, before.state_version + 1)
            assert afresh or goes_on


async def test_the_alerts_of_a_stream_are_known_from_its_state_whichever_file_that_is_of(start: Start) -> None:
    """So whoever keeps the book of alerts resolves those of a stream that has started afresh as forgotten."""
    old = await start(0)
    await old.send(*events(40, "s"))
    [alert] = await old.send(Event(stream_id="s", values={"value": 1000.0}, timestamp=1e9 + 40))
    assert alert.is_anomaly
    new = await start(1)
    [by_old], [by_new] = await old.scorer.streams.stand(["s"]), await new.scorer.streams.stand(["s"])
    assert by_old.last is not None
    assert by_new.last is None
    assert by_old.open is not None
    assert len(by_old.open) == 1
    assert by_new.open == by_old.open, "not started afresh yet"
    await new.send(*events(1, "s", 41))
    [by_old], [by_new] = await old.scorer.streams.stand(["s"]), await new.scorer.streams.stand(["s"])
    assert (by_old.last, by_old.open, by_new.open) == (None, frozenset(), frozenset())
    [nothing] = await old.scorer.streams.stand(["never there"])
    assert (nothing.there, nothing.open) == (False, None)


async def test_sweepers_of_a_superseded_file_leave_the_watches_of_the_other_alone(start: Start, store: Store, clock: Clock) -> None:
    old, new = await start(0), await start(1)
    raised: list[tuple[str, str]] = []

    of_old, of_new = old.sweeper(raised, "old"), new.sweeper(raised, "new")
    for each in (of_old, of_new):
        await each.sweep()
    for i in range(60):
        clock.now += 10
        await new.send(Event(stream_id="s", values={"value": float(i % 3)}, timestamp=clock.now))
    assert old.serves
    clock.now += 4000
    with pytest.raises(Superseded):
        await of_old.sweep()
    assert not old.serves
    await of_new.sweep()
    assert raised == [("new", "s")]
    assert await store.silent(MODEL, 10) == (1, ["s"])


async def test_after_it_was_superseded_a_file_gives_its_streams_their_patience_anew(start: Start, store: Store, clock: Clock) -> None:
    old = await start(0)
    raised: list[tuple[str, str]] = []
    of_old = old.sweeper(raised)
    await of_old.sweep()
    for i in range(60):
        clock.now += 10
        await old.send(Event(stream_id="s", values={"value": float(i % 3)}, timestamp=clock.now))
    await start(1)
    await old.claim.beat()
    task = asyncio.create_task(of_old.run(every=0))
    for i in range(400):  # nobody could send to it
        clock.now += RETURN_SECONDS / 2
        await asyncio.sleep(0.0001)
        if i == 398:
            await start(0)
            await old.claim.beat()
    task.cancel()
    assert raised == []
    clock.now += 4000
    await of_old.sweep()
    assert raised == [("", "s")]


async def test_a_stream_that_fell_silent_while_another_file_was_in_force_is_raised_when_its_own_is_again(
    start: Start, store: Store, clock: Clock
) -> None:
    old = await start(0)
    for i in range(60):
        clock.now += 10
        await old.send(Event(stream_id="s", values={"value": float(i % 3)}, timestamp=clock.now))
    raised: list[tuple[str, str]] = []

    new = await start(1)
    of_new = new.sweeper(raised, "new")
    for _ in range(2):
        clock.now += 600
        await of_new.sweep()
    assert raised == [], "it cannot say for how long silence is ordinary"
    assert await store.due(MODEL, clock.now, 10) == [], "and is not asked of it again with each sweep, in the place of others"
    of_old = (await start(0)).sweeper(raised, "old")
    await of_old.sweep()
    clock.now += 600
    await of_old.sweep()
    assert raised == [("old", "s")]


async def test_no_two_results_that_a_queue_publishes_have_one_identity_however_often_a_stream_starts_afresh(start: Start) -> None:
    """A server that drops what it has seen, as JetStream does, dropped results of the new file."""
    named: list[str] = []

    async def consume(replica: Replica, first: int) -> None:
        deliveries = [Delivery(event, 1, i, 0.0) for i, event in enumerate(events(5, start=first), first)]
        for _ in range(2):  # delivered again, the same
            _, published = await replica.scorer.consume(deliveries, replies=True)
            named.extend(result.id for result in published)

    for turn, file in enumerate((0, 1, 0)):
        replica = await start(file)
        await consume(replica, 5 * turn)
    await replica.scorer.streams.forget("s")
    await consume(replica, 15)
    assert Counter(Counter(named).values()) == {2: 20}


class Counted(Line):
    def __init__(self, lines: list[Counted]) -> None:
        super().__init__()
        lines.append(self)
        self.open_ = False

    async def open(self) -> None:
        self.open_ = True


async def test_a_queue_is_read_while_the_file_is_in_force_and_let_go_of_at_once_when_it_is_not(
    files: list[Detector], store: Store, clock: Clock, start: Start
) -> None:
    replica, lines = Replica(files[0], store, clock), list[Counted]()
    tap = Tap(lambda: Consumer(Counted(lines), replica.scorer, replica.metrics, MAPPER, fuse=1), replica.claim, replica.metrics, seconds=30)
    tap.start()
    await asyncio.sleep(0.01)
    assert [line.open_ for line in lines] == [False], "before the claim"
    await replica.claim.take()
    await until(lambda: lines[0].open_)
    new = await start(1)
    await new.send(*events(1, "s"))
    lines[0].put({"stream_id": "s", "values": {"value": 1}, "timestamp": 1.8e9})
    await until(lambda: lines[0].closed)
    assert len(lines[0].abandoned) >= 1
    assert lines[0].settled == []
    await asyncio.sleep(0.01)
    assert len(lines) == 1, "nobody reads it here"
    await start(0)
    await replica.claim.beat()
    await until(lambda: len(lines) == 2 and lines[1].open_)
    await tap.stop()
    assert lines[1].closed
    await replica.scorer.drain(1)


def test_what_is_wrong_with_a_source_shows_before_its_model_is_claimed(files: list[Detector], store: Store) -> None:
    def wrong() -> None:
        raise BadSetting("nonsense")

    with pytest.raises(BadSetting, match="nonsense"):
        Tap(wrong, StoredClaim(files[0], store, Metrics()), Metrics(), seconds=1)  # type: ignore[arg-type]
    assert store.asked == 0
