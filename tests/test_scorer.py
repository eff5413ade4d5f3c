"""The flow of a batch: answers in order, nothing stepped twice, neighbours unharmed, races lost and won."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from service.alerts import alert_id
from service.detector import Detector
from service.errors import (
    BadEvent,
    ItemError,
    NotCommitted,
    StateConflict,
    StoreUnavailable,
    TooManyStreams,
    UnknownStream,
)
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import ATTEMPTS, MATCHED_CHARACTERS, MAX_BATCH, Limits, Scorer
from service.state import TOKEN
from service.stores import LOST, WRITTEN, Write
from service.stores.memory import MemoryStore
from tests.times import Clock
from tests.tiny import build_tiny


def make(detector: Detector, store: MemoryStore, limits: Limits | None = None, clock: Clock | None = None) -> Scorer:
    scorer = Scorer(detector, Policy(), store, Metrics(), limits or Limits(), clock or Clock())
    scorer.start()
    return scorer


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(state_ttl=3600, result_ttl=600)


@pytest.fixture
async def scorer(tiny_detector: Detector, store: MemoryStore) -> AsyncIterator[Scorer]:
    running = make(tiny_detector, store)
    yield running
    await running.drain(5)


def events(count: int, stream: str = "s", start: int = 0, *, ids: bool = True, timed: bool = True) -> list[Event]:
    rng = np.random.default_rng(start)
    return [
        Event(
            stream_id=stream,
            values={"value": float(rng.normal())},
            timestamp=1e9 + i if timed else None,
            event_id=f"{stream}-{i}" if ids else None,
        )
        for i in range(start, start + count)
    ]


def results(answers: Sequence[Result | ItemError]) -> list[Result]:
    assert all(isinstance(answer, Result) for answer in answers), [a for a in answers if not isinstance(a, Result)]
    return [answer for answer in answers if isinstance(answer, Result)]


def scores(answers: Sequence[Result | ItemError]) -> list[tuple[float | None, int]]:
    return [(result.p_value, result.state_version) for result in results(answers)]


async def test_answers_come_in_the_order_of_the_items_and_errors_keep_their_place(scorer: Scorer) -> None:
    handed_in = BadEvent("line 3 is not JSON")
    items: list[Event | ItemError] = [
        Event(stream_id="a", values={"value": 1.0}, event_id="1"),
        Event(stream_id="a", values={"speed": 1.0}),
        handed_in,
        Event(stream_id="b", values={"value": 2.0}, event_id="2"),
    ]
    first, bad, same, last = await scorer.score(items)
    assert isinstance(first, Result)
    assert (first.stream_id, first.event_id) == ("a", "1")
    assert isinstance(bad, BadEvent)
    assert bad.field == "values.speed"
    assert same is handed_in
    assert isinstance(last, Result)
    assert (last.stream_id, last.event_id) == ("b", "2")


async def test_scores_are_null_while_warming_up_and_then_a_p_value(scorer: Scorer) -> None:
    warmup = scorer.detector.manifest.warmup
    answers = results(await scorer.score(events(warmup + 2)))
    assert [answer.status for answer in answers] == ["warming_up"] * (warmup - 1) + ["ready"] * 3
    assert [answer.samples_until_ready for answer in answers[:warmup]] == list(range(warmup - 1, -1, -1))
    for cold in answers[:warmup]:
        assert cold.anomaly_score is cold.p_value is cold.alert_score is None
        assert not cold.is_anomaly
    assert all(warm.p_value is not None and 0 < warm.p_value <= 1 for warm in answers[warmup:])


async def test_a_jump_is_an_onset_with_its_direction_and_contributor(scorer: Scorer) -> None:
    await scorer.score(events(50))
    [jump] = results(await scorer.score([Event(stream_id="s", values={"value": 60.0}, timestamp=1e9 + 100)]))
    assert jump.is_anomaly
    assert jump.alert_score is not None
    assert jump.alert_score > 1
    assert jump.direction == "up"
    assert jump.severity == "critical"
    assert jump.contributors[0].feature == "value"
    assert jump.contributors[0].actual == 60.0
    assert jump.anomaly_started_at == 1e9 + 100
    upper = jump.upper["value"]
    assert upper is not None
    assert upper < 60


async def test_concurrent_requests_give_the_scores_of_sequential_ones(tiny_detector: Detector) -> None:
    streams = [f"s{i}" for i in range(20)]
    alone, together = (make(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60)) for _ in range(2))
    want = [scores(await alone.score(events(30, stream))) for stream in streams]
    got = await asyncio.gather(*(together.score(events(30, stream)) for stream in streams))
    assert [scores(answers) for answers in got] == want
    for scorer in (alone, together):
        await scorer.drain(1)


async def test_a_bulk_larger_than_a_batch_is_scored_in_order(scorer: Scorer, tiny_detector: Detector) -> None:
    many = events(2 * MAX_BATCH + 10)
    single = make(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60))
    want = [score for i in range(0, len(many), 100) for score in scores(await single.score(many[i : i + 100]))]
    assert scores(await scorer.score(many)) == want
    await single.drain(1)


async def test_a_bulk_sent_again_gets_its_stored_results(scorer: Scorer) -> None:
    bulk = events(100)
    first = await scorer.score(bulk)
    again = await scorer.score(bulk)
    assert scores(again) == scores(first)
    assert all(result.duplicate and not result.late for result in results(again))
    assert [result.anomaly_score for result in results(again)] == [result.anomaly_score for result in results(first)]


@pytest.mark.parametrize("time", [None, 1e9])
async def test_a_bulk_without_times_or_of_one_time_sent_again_gets_its_stored_results(scorer: Scorer, time: float | None) -> None:
    *bulk, after = (replace(event, timestamp=time) for event in events(41))
    first = await scorer.score(bulk)
    await scorer.score([after])
    again = await scorer.score(bulk)
    assert scores(again) == scores(first)
    assert all(result.duplicate for result in results(again))


async def test_part_of_a_bulk_sent_again_beside_new_events_steps_only_the_new_ones(scorer: Scorer, tiny_detector: Detector) -> None:
    bulk = events(40)
    first = await scorer.score(bulk[:30])
    mixed = results(await scorer.score(bulk[20:]))
    assert [result.duplicate for result in mixed] == [True] * 10 + [False] * 10
    assert scores(mixed[:10]) == scores(first[20:])
    straight = make(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60))
    assert scores(await straight.score(bulk))[30:] == scores(mixed[10:])
    await straight.drain(1)


async def test_an_event_sent_again_with_its_successors_gets_its_stored_result_however_often_that_is(scorer: Scorer) -> None:
    """One event at a time, each with all before it that nobody has heard of yet: a reply that is lost is lost more than once."""
    sent = events(6)
    first = [await scorer.score(sent[: i + 1]) for i in range(len(sent))]
    again = await scorer.score(sent)
    assert all(result.state_version == i + 1 for i, result in enumerate(results(again)))
    assert [scores(answers) for answers in first] == [scores(again)[: i + 1] for i in range(len(sent))]
    await scorer.score(events(1, start=6))
    assert scores(await scorer.score(sent)) == scores(again), "the last of them, too, has its result though another event came since"


async def test_an_event_sent_again_between_a_bulks_and_a_new_one_keeps_its_result(scorer: Scorer) -> None:
    sent = events(5)
    await scorer.score(sent[:2])
    third = await scorer.score(sent[2:3])
    await scorer.score(sent[:4])
    await scorer.score(sent[4:])
    assert scores(await scorer.score(sent[2:3])) == scores(third)


async def test_untimed_events_without_ids_are_new_ones_beside_repeated_ids(scorer: Scorer) -> None:
    bulk = [event for pair in zip(events(4, timed=False), events(4, ids=False, timed=False), strict=True) for event in pair]
    await scorer.score(bulk)
    again = results(await scorer.score(bulk))
    assert [result.duplicate for result in again] == [True, False] * 4
    assert [result.state_version for result in again] == [1, 9, 3, 10, 5, 11, 7, 12]


async def test_an_old_duplicate_whose_result_is_gone_has_a_null_score(scorer: Scorer) -> None:
    for event in events(12):
        await scorer.score([event])
    [old] = results(await scorer.score([events(12)[8]]))
    assert old.duplicate
    assert old.p_value is None
    assert old.state_version == 12


async def test_a_late_event_is_reported_and_not_stepped(scorer: Scorer) -> None:
    await scorer.score(events(10))
    [late] = results(await scorer.score([Event(stream_id="s", values={"value": 0.0}, timestamp=5.0)]))
    assert late.late
    assert not late.duplicate
    assert late.p_value is None
    assert (await scorer.streams.last("s")).state_version == 10


async def test_two_replicas_on_the_same_streams_lose_no_event(tiny_detector: Detector, store: MemoryStore) -> None:
    replicas = [make(tiny_detector, store), make(tiny_detector, store)]
    calls = []
    for i in range(40):
        event = Event(stream_id=f"s{i % 3}", values={"value": float(i)}, event_id=str(i))
        calls.append(replicas[i % 2].score([event]))
    answers = [answer for answered in await asyncio.gather(*calls) for answer in answered]
    done = [answer for answer in answers if isinstance(answer, Result)]
    assert all(isinstance(answer, Result | StateConflict) for answer in answers)
    versions = sorted((result.stream_id, result.state_version) for result in done)
    assert len(set(versions)) == len(versions), "no version of a stream was given out twice"
    for s in range(3):
        kept = (await replicas[0].streams.last(f"s{s}")).state_version
        assert kept == sum(result.stream_id == f"s{s}" for result in done)
    for replica in replicas:
        await replica.drain(1)


class Contended(MemoryStore):
    """A store in which another replica always commits first to some streams."""

    contended = frozenset({"hot"})

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        written = await super().commit(model, [write for write in writes if write.stream_id not in self.contended])
        outcome = iter(written)
        return [write.stream_id not in self.contended and next(outcome) for write in writes]


async def test_losing_every_race_fails_the_item_and_not_its_batch(tiny_detector: Detector) -> None:
    scorer = make(tiny_detector, Contended(state_ttl=60, result_ttl=60))
    lost, won = await scorer.score([Event(stream_id="hot", values={"value": 1.0}), Event(stream_id="cool", values={"value": 1.0})])
    assert isinstance(lost, StateConflict)
    assert f"{ATTEMPTS} times" in lost.detail
    assert isinstance(won, Result)
    await scorer.drain(1)


class Raced(MemoryStore):
    """Another replica is first to a stream as often as it takes to lose it, and then no more."""

    races_left = ATTEMPTS + 1

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        raced = self.races_left > 0 and any(write.stream_id == "hot" for write in writes)
        self.races_left -= raced
        written = iter(await super().commit(model, [write for write in writes if not (raced and write.stream_id == "hot")]))
        return [LOST if raced and write.stream_id == "hot" else next(written) for write in writes]


async def test_what_follows_lost_events_of_its_stream_in_a_long_bulk_is_lost_with_them(tiny_detector: Detector) -> None:
    """Otherwise they are late when they are sent again."""
    scorer = make(tiny_detector, Raced(state_ttl=60, result_ttl=60))
    bulk = events(1, "cool") + events(MAX_BATCH, "hot") + events(1, "cool", 1) + events(9, "hot", MAX_BATCH)
    answers = await scorer.score(bulk)
    lost = [isinstance(answer, StateConflict) for answer in answers]
    assert lost == [event.stream_id == "hot" for event in bulk]
    again = results(await scorer.score(bulk))
    assert [result.late for result in again] == [False] * len(bulk)
    assert [result.state_version for result in again if result.stream_id == "hot"] == list(range(1, MAX_BATCH + 10))
    await scorer.drain(1)


class Failing(MemoryStore):
    """A store that stops answering after some commits."""

    commits_left = 1

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        if self.commits_left == 0:
            raise StoreUnavailable("The store does not answer.")
        self.commits_left -= 1
        return await super().commit(model, writes)


async def test_a_store_that_fails_within_a_bulk_fails_the_rest_of_it_only(tiny_detector: Detector) -> None:
    store = Failing(state_ttl=60, result_ttl=60)
    scorer = make(tiny_detector, store)
    bulk = events(3 * MAX_BATCH)
    answers = await scorer.score(bulk)
    assert all(isinstance(answer, Result) for answer in answers[:MAX_BATCH])
    assert all(isinstance(answer, NotCommitted) for answer in answers[MAX_BATCH:])
    with pytest.raises(StoreUnavailable):
        await scorer.score(bulk[MAX_BATCH:])
    store.commits_left = 100
    assert [result.state_version for result in results(await scorer.score(bulk[MAX_BATCH:]))] == list(
        range(MAX_BATCH + 1, 3 * MAX_BATCH + 1)
    )
    await scorer.drain(1)


async def test_streams_beyond_the_limit_are_refused_until_there_is_room_and_known_ones_go_on(
    tiny_detector: Detector, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make(tiny_detector, store, Limits(max_streams=3))
    for many in (1, 2, 5):  # those that are known take no more room
        answers = await scorer.score([Event(stream_id=f"s{i}", values={"value": 1.0}) for i in range(many)])
    assert [type(answer) for answer in answers] == [Result] * 3 + [TooManyStreams] * 2
    known, new = await scorer.score([Event(stream_id="s0", values={"value": 1.0}), Event(stream_id="s9", values={"value": 1.0})])
    assert isinstance(known, Result)
    assert known.state_version == 4
    assert isinstance(new, TooManyStreams)
    await scorer.streams.forget("s1")
    monkeypatch.setattr("service.scorer.COUNT_SECONDS", 0.0)  # the count is that old
    [new] = await scorer.score([Event(stream_id="s9", values={"value": 1.0})])
    assert isinstance(new, Result)
    await scorer.drain(1)


async def damage(store: MemoryStore) -> None:
    """Flip a bit of the stored value of stream s."""
    [value] = await store.load("tiny", ["s"])
    assert value is not None
    damaged = value[:-1] + bytes([value[-1] ^ 1])
    assert await store.commit("tiny", [Write("s", value[8:24], damaged)]) == [True]


async def test_a_damaged_value_is_never_stepped_but_a_counted_fresh_start(tiny_detector: Detector, store: MemoryStore) -> None:
    scorer = make(tiny_detector, store, Limits(copies_bytes=0))
    await scorer.score(events(10))
    await damage(store)
    [fresh] = results(await scorer.score([Event(stream_id="s", values={"value": 1.0})]))
    assert fresh.state_version == 1
    assert fresh.status == "warming_up"
    registry = scorer._metrics.registry
    assert registry.get_sample_value("onset_fresh_states_total", {"reason": "corrupt"}) == 1
    assert registry.get_sample_value("onset_fresh_states_total", {"reason": "new"}) == 1
    await scorer.drain(1)


async def test_a_damaged_value_is_healed_by_the_copy_of_the_replica_that_wrote_it(scorer: Scorer, store: MemoryStore) -> None:
    await scorer.score(events(10))
    await damage(store)
    [healed] = results(await scorer.score(events(1, start=10)))
    untouched = MemoryStore(state_ttl=3600, result_ttl=600)
    other = make(scorer.detector, untouched)
    assert scores([healed]) == scores(await other.score(events(10) + events(1, start=10)))[-1:]
    await other.drain(1)


def copies_of(scorer: Scorer) -> dict[str, float]:
    return {name: scorer._metrics.copies.labels(name)._value.get() for name in ("hit", "miss", "stale")}


async def test_a_stream_that_comes_again_is_not_loaded_again(scorer: Scorer, store: MemoryStore) -> None:
    for i in range(5):
        await scorer.score(events(1, start=i))
    assert copies_of(scorer) == {"hit": 4, "miss": 1, "stale": 0}
    restarted = make(scorer.detector, store)
    for i in range(5, 10):
        await restarted.score(events(1, start=i))
    assert copies_of(restarted) == {"hit": 3, "miss": 2, "stale": 0}, "from the second one on it was the last to write the stream"
    await restarted.drain(1)


async def test_a_stale_copy_costs_another_attempt_and_changes_no_score(tiny_detector: Detector, store: MemoryStore) -> None:
    replicas = [make(tiny_detector, store), make(tiny_detector, store)]
    answers = [(await replicas[i].score(events(1, start=n)))[0] for n, i in enumerate((0, 0, 1, 0, 0, 0, 1, 1, 0))]
    alone = make(tiny_detector, MemoryStore(state_ttl=3600, result_ttl=600))
    assert scores(answers) == scores(await alone.score([event for n in range(9) for event in events(1, start=n)]))
    assert copies_of(replicas[0])["stale"] > 0
    assert replicas[0]._metrics.conflicts._value.get() == 0
    for scorer in (*replicas, alone):
        await scorer.drain(1)


async def test_a_copy_alone_answers_nothing(tiny_detector: Detector, store: MemoryStore) -> None:
    one, two = make(tiny_detector, store), make(tiny_detector, store)
    await one.score(events(3))
    assert await two.streams.forget("s")
    [again] = results(await one.score(events(1, start=2)))
    assert (again.state_version, again.duplicate) == (1, False), "the stream was forgotten elsewhere: its last event is a new one"
    await one.drain(1)
    await two.drain(1)


class Replicated(MemoryStore):
    """Fails over to a replica that has all but the last commits."""

    down = False

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        if self.down:
            raise StoreUnavailable("The store does not answer.")
        return await super().commit(model, writes)

    async def fail_over(self, replica: dict[str, bytes]) -> None:
        for stream_id, value in replica.items():
            [now] = await self.load("tiny", [stream_id])
            assert now is not None
            assert list(await super().commit("tiny", [Write(stream_id, now[TOKEN], value)])) == [WRITTEN]


async def test_states_that_a_failover_set_back_are_counted_and_told_and_go_on_from_there(tiny_detector: Detector) -> None:
    store = Replicated(state_ttl=3600, result_ttl=600)
    one, two = make(tiny_detector, store), make(tiny_detector, store)
    for stream in ("a", "b", "c"):
        await one.score(events(3, stream))
    lagging = {stream: value for stream, value in zip("ab", await store.load("tiny", ["a", "b"]), strict=True) if value is not None}
    for stream in ("a", "b", "c"):
        await one.score(events(2, stream, 3))
    store.down = True
    with pytest.raises(StoreUnavailable):
        await one.score(events(1, "a", 5))
    store.down = False
    await store.fail_over(lagging)
    with capture_logs() as logs:
        answers = [(await one.score(events(1, stream, 5)))[0] for stream in ("a", "c")]
        [again] = results(await one.score(events(1, "b", 4)))
    assert [result.state_version for result in results(answers)] == [4, 6]
    assert (again.state_version, again.duplicate) == (4, False), "what was lost and is sent again is a new event"
    told = [line for line in logs if line["event"] == "states_set_back"]
    assert [(line["stream_id"], line["state_version"], line["acknowledged"]) for line in told] == [("a", 3, 5)], "once a minute"
    assert one._metrics.set_back._value.get() == 2
    for scorer in (one, two):
        await scorer.drain(1)


async def test_a_stream_that_another_replica_scored_or_that_was_forgotten_is_not_set_back(tiny_detector: Detector) -> None:
    store = MemoryStore(state_ttl=3600, result_ttl=600)
    one, two = make(tiny_detector, store), make(tiny_detector, store)
    await one.score(events(5, "scored") + events(5, "forgotten"))
    await two.score(events(1, "scored", 5))
    assert await two.streams.forget("forgotten")
    await two.score(events(1, "forgotten", 5))
    await one.score(events(1, "scored", 6) + events(1, "forgotten", 6))
    assert copies_of(one)["stale"] == 2
    assert one._metrics.set_back._value.get() == 0
    for scorer in (one, two):
        await scorer.drain(1)


async def test_batches_of_other_streams_do_not_wait_for_a_stream_with_many_events(tiny_detector: Detector, store: MemoryStore) -> None:
    scorer = make(tiny_detector, store)
    hot = asyncio.create_task(scorer.score(events(5 * MAX_BATCH, "hot"), sender="hot"))
    await asyncio.sleep(0)
    quiet = [await scorer.score(events(1, "quiet", start=i), sender="quiet") for i in range(20)]
    assert not hot.done()
    assert [result.state_version for answers in quiet for result in results(answers)] == list(range(1, 21))
    assert [result.state_version for result in results(await hot)] == list(range(1, 5 * MAX_BATCH + 1))
    await scorer.drain(1)


async def test_a_stream_can_be_looked_at_listed_and_forgotten(scorer: Scorer) -> None:
    last = results(await scorer.score(events(10, "a") + events(5, "b")))[9]
    assert (await scorer.streams.last("a")).p_value == last.p_value
    listed, cursor = await scorer.streams.page("", 10)
    assert {result.stream_id: result.state_version for result in listed} == {"a": 10, "b": 5}
    assert cursor == ""
    assert await scorer.streams.forget("a")
    assert not await scorer.streams.forget("a")
    with pytest.raises(UnknownStream, match="stream 'a'"):
        await scorer.streams.last("a")
    [fresh] = results(await scorer.score(events(1, "a")))
    assert fresh.state_version == 1


async def test_what_is_counted_is_what_happened(scorer: Scorer) -> None:
    await scorer.score(events(50))
    for _ in range(2):  # once, and a duplicate
        await scorer.score([Event(stream_id="s", values={"value": 60.0}, timestamp=1e9 + 1000, event_id="jump")])
    sample = scorer._metrics.registry.get_sample_value
    assert sample("onset_onsets_total", {"model": "tiny"}) == 1
    assert sample("onset_anomalies_total", {"model": "tiny"}) == 1
    assert sample("onset_batch_events_sum") == 52
    assert sample("onset_stage_seconds_count", {"stage": "commit"}) == 4
    assert sample("onset_state_bytes", {"model": "tiny"}) == scorer._codec.bytes


async def test_no_items_no_answers(scorer: Scorer) -> None:
    assert await scorer.score([]) == []


async def alarmed(scorer: Scorer, stream: str = "s") -> Result:
    """A stream old enough to be frozen, and an alert on it."""
    await scorer.score(events(600, stream))
    wrong = [Event(stream_id=stream, values={"value": 60.0}, timestamp=1e9 + 1000 + i, event_id=f"wrong-{i}") for i in range(30)]
    return results(await scorer.score(wrong))[-1]


async def test_a_lasting_fault_freezes_its_stream_until_it_is_accepted(scorer: Scorer) -> None:
    frozen = await alarmed(scorer)
    assert (frozen.status, frozen.is_anomaly, frozen.anomaly_started_at) == ("frozen", True, 1e9 + 1000)
    with capture_logs() as logs:
        accepted = await scorer.streams.accept("s")
        again = await scorer.streams.accept("s")
    assert (accepted.status, accepted.anomaly_started_at, accepted.state_version) == ("ready", None, 630)
    assert again == accepted == await scorer.streams.last("s")
    [line] = [line for line in logs if line["event"] == "regime_accepted"]
    assert (line["stream_id"], line["by"], line["anomaly_started_at"], line["state_version"]) == ("s", "call", 1e9 + 1000, 630)
    assert scorer._metrics.registry.get_sample_value("onset_accepted_total", {"model": "tiny", "by": "call"}) == 1
    after = [Event(stream_id="s", values={"value": 60.0}, timestamp=1e9 + 2000 + i) for i in range(300)]
    assert not any(result.status == "frozen" for result in results(await scorer.score(after)))


async def test_an_alert_that_is_over_is_not_accepted_in_the_name_of_the_one_that_followed(scorer: Scorer) -> None:
    await alarmed(scorer)
    meant, another = (alert_id("tiny", "s", "anomaly", 1e9 + second) for second in (1000, 900))
    assert await scorer.streams.accept_alerts({"s": another, "none": another}) == {"s": "resolved", "none": "resolved"}
    assert (await scorer.streams.last("s")).status == "frozen"
    assert await scorer.streams.accept_alerts({"s": meant}) == {"s": "accepted"}
    assert await scorer.streams.accept_alerts({"s": meant}) == {"s": "resolved"}
    assert (await scorer.streams.last("s")).status == "ready"


async def test_an_alert_in_a_state_of_another_file_of_the_model_is_not_told_to_be_over(
    scorer: Scorer, store: MemoryStore, tmp_path: Path
) -> None:
    await alarmed(scorer)
    successor = make(Detector.load(build_tiny(tmp_path, version="2")), store)
    [stand] = await successor.streams.stand(["s"])
    meant = alert_id("tiny", "s", "anomaly", 1e9 + 1000)
    assert stand.open == frozenset({meant})
    assert await successor.streams.accept_alerts({"s": meant, "none": meant}) == {"s": "model_not_loaded", "none": "resolved"}
    with pytest.raises(UnknownStream):
        await successor.streams.accept("s")
    await successor.drain(1)


async def test_the_last_event_sent_again_after_the_acceptance_gets_its_stored_result(scorer: Scorer) -> None:
    frozen = await alarmed(scorer)
    await scorer.streams.accept("s")
    [again] = results(await scorer.score([Event(stream_id="s", values={"value": 60.0}, timestamp=1e9 + 1029, event_id="wrong-29")]))
    assert again.duplicate
    assert (again.status, again.p_value, again.anomaly_started_at) == (frozen.status, frozen.p_value, frozen.anomaly_started_at)


async def test_an_acceptance_that_loses_a_race_is_made_again_and_one_that_always_loses_says_so(tiny_detector: Detector) -> None:
    store = Contended(state_ttl=60, result_ttl=60)
    replicas = [make(tiny_detector, store) for _ in range(2)]
    await alarmed(replicas[0])
    wrong = [Event(stream_id="s", values={"value": 60.0}, timestamp=1e9 + 1100 + i) for i in range(5)]
    await asyncio.gather(*(replicas[0].score([event]) for event in wrong), replicas[1].streams.accept("s"), replicas[0].streams.accept("s"))
    assert (await replicas[0].streams.last("s")).status == "ready"
    store.contended = frozenset()
    await alarmed(replicas[0], "hot")
    store.contended = frozenset({"hot"})
    with pytest.raises(StateConflict, match="call again"):
        await replicas[1].streams.accept("hot")
    with pytest.raises(UnknownStream, match="stream 'none'"):
        await replicas[1].streams.accept("none")
    await alarmed(replicas[0], "calm")
    ids = {name: alert_id("tiny", name, "anomaly", 1e9 + 1000) for name in ("hot", "calm")}
    assert await replicas[1].streams.accept_alerts(ids) == {"hot": "conflict", "calm": "accepted"}
    for replica in replicas:
        await replica.drain(1)


async def test_an_alert_that_is_accepted_by_its_age_is_logged(tiny_detector: Detector, store: MemoryStore) -> None:
    scorer = Scorer(tiny_detector, Policy(accept_after=20), store, Metrics(), Limits(), Clock())
    scorer.start()
    with capture_logs() as logs:
        assert (await alarmed(scorer)).status == "ready"
    [line] = [line for line in logs if line["event"] == "regime_accepted"]
    assert (line["by"], line["stream_id"], line["event_timestamp"]) == ("age", "s", 1e9 + 1020)
    await scorer.drain(1)


async def test_while_a_request_of_long_lines_is_matched_others_get_their_turn_and_its_answers_keep_their_places(
    log_detector: Detector, store: MemoryStore
) -> None:
    scorer, done = make(log_detector, store), list[str]()

    async def send(name: str, lines: Sequence[Event]) -> Sequence[Result | ItemError]:
        answers = await scorer.score(lines)
        done.append(name)
        return answers

    lines = [Event(stream_id=f"s{i}", message=" " if i == 30 else "word " * (MATCHED_CHARACTERS // 10)) for i in range(60)]
    long, short = await asyncio.gather(send("long", lines), send("short", [Event(stream_id="other", message="Took 7 ms for /b")]))
    assert done == ["short", "long"]
    assert len(short) == 1
    places = [answer.field if isinstance(answer, BadEvent) else results([answer])[0].stream_id for answer in long]
    assert places == ["message" if i == 30 else f"s{i}" for i in range(60)]
    await scorer.drain(5)
