"""The book of alerts on a real server: one alert for each anomaly, whoever keeps the book and whenever that one dies."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from service import tasks
from service.alerts import Acknowledgement, Alert, Evidence, Stand, Transition, encoded
from service.console.attended import Attended
from service.console.recent import ATTENDED, Recent
from service.desk import Desk, Keeping
from service.errors import Fenced
from service.events import Severity
from service.metrics import Metrics
from service.sinks.teller import first_cursor
from service.stores import Write
from service.stores.book import ACKS, ALL, LEASE, STREAMS, TABLE, Book, Wanted
from service.stores.cluster import ClusterStore
from service.stores.redis import Command, Commands, RedisStore, log_key
from tests.contracts.test_stores import opened, opened_cluster, value
from tests.servers import ValkeyCluster
from tests.times import until

T0 = 1e9


@dataclass
class Streams:
    """What the desk sees of the streams: as they stand, by stream id; the others are of another model's file."""

    standing: dict[str, Stand] = field(default_factory=dict)

    async def stand(self, stream_ids: Sequence[str]) -> list[Stand]:
        return [self.standing.get(stream_id, Stand(True, None, None)) for stream_id in stream_ids]


class Listener:
    """A sink that has been told up to where `begin` found the changes, or as its test says: all after that are kept for it."""

    def __init__(self, book: Book, name: str) -> None:
        self._book, self.name = book, name

    async def begin(self, token: str) -> None:
        await first_cursor(self._book, token, self.name)

    async def run(self, token: str) -> None:
        return None

    async def close(self) -> None:
        return None


class Telling(Listener):
    """Never done."""

    running = 0

    async def run(self, token: str) -> None:
        self.running += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.running -= 1


class Office:
    """A desk, or several, over one store."""

    def __init__(self, store: RedisStore | ClusterStore) -> None:
        self.store, self.book, self.streams, self.now = store, Book(store), Streams(), 0.0

    def desk(self, metrics: Metrics | None = None, sinks: Sequence[str] = ("listener",), **keeping: Any) -> Desk:
        listeners = [Listener(self.book, name) for name in sinks]
        return Desk(Book(self.store), {"m": self.streams}, metrics or Metrics(), Keeping(**keeping), listeners, clock=lambda: self.now)

    async def log(self, *transitions: Transition) -> None:
        for transition in transitions:
            write = Write(transition.stream_id, b"", value(), log=[encoded(transition)])
            await self.store.delete("m", transition.stream_id)
            assert await self.store.commit("m", [write]) == [1]

    async def all(self, **wanted: Any) -> list[Alert]:
        return (await self.book.page(Wanted(**wanted), "", 1000))[0]

    async def events(self) -> list[tuple[str, str]]:
        return [(told.change.alert.stream_id, told.change.event) for told in await self.book.changes(None, 1000)]


@pytest.fixture(params=["redis", "cluster"])
async def office(request: pytest.FixtureRequest) -> AsyncIterator[Office]:
    if request.param == "cluster":
        cluster: ValkeyCluster = request.getfixturevalue("empty_cluster")
        store: RedisStore | ClusterStore = await opened_cluster(cluster.url)
    else:
        store = await opened(request.getfixturevalue("empty_server"))
    yield Office(store)
    await store.close()


@pytest.fixture
async def desk(office: Office) -> Desk:
    desk = office.desk()
    await desk.turn()
    return desk


def evidence(timestamp: float = T0, **changes: Any) -> Evidence:
    return replace(Evidence(timestamp, 7, 1e-9, 3.0, 3.0, "critical", "up", []), **changes)


def opening(stream_id: str = "s", **changes: Any) -> Transition:
    return replace(Transition("opened", "m", stream_id, started_at=T0, evidence=evidence()), **changes)


def resolving(stream_id: str = "s", **changes: Any) -> Transition:
    return replace(opening(stream_id), what="resolved", resolution="recovered", **changes)


async def test_an_alert_is_opened_escalated_and_resolved_and_sinks_are_told_of_each_once(office: Office, desk: Desk) -> None:
    await office.log(opening(), opening(what="escalated", severity="major"))
    await desk.turn()
    [alert] = await office.all()
    assert (alert.status, alert.severity, alert.id) == ("open", "major", opening().alert)
    await office.log(resolving())
    await desk.turn()
    [alert] = await office.all()
    assert (alert.status, alert.resolution) == ("resolved", "recovered")
    await desk.turn()
    assert await office.events() == [("s", "opened"), ("s", "escalated"), ("s", "resolved")]
    escalated = (await office.book.changes(None, 10))[1].change
    assert escalated.severity_before == "minor"


def counted(metrics: Metrics) -> float:
    """Open alerts, as this replica says."""
    return sum(sample.value for metric in metrics.alerts_open.collect() for sample in metric.samples)


async def test_a_desk_whose_lease_is_gone_does_not_say_that_another_replica_has_it(office: Office) -> None:
    sink = Telling(office.book, "telling")
    desk = Desk(office.book, {"m": office.streams}, metrics := Metrics(), Keeping(), [sink], clock=lambda: office.now)
    await office.log(opening())
    await desk.turn()
    assert desk.keeps
    with capture_logs() as logs:
        await office.store.pipe([("DEL", LEASE)])
        running = asyncio.create_task(desk.run())
        await until(lambda: len(logs) == 2)
        await until(lambda: counted(metrics) == 1)  # looked at anew, at once
        assert sink.running == 1, "two would tell everything twice"
        await tasks.end(running)
    assert [entry["event"] for entry in logs] == ["alerts_lease_lost", "alerts_kept_here"]


async def test_a_desk_that_died_before_its_write_changed_nothing_and_the_next_one_goes_on(office: Office, desk: Desk) -> None:
    streams = [f"s{i}" for i in range(50)]
    await office.log(*map(opening, streams[:25]))
    await desk.turn()
    await office.log(*map(opening, streams[25:]), *map(resolving, streams[:10]))
    await office.store.pipe([("SET", LEASE, "another")])  # as when it was taken for dead
    with pytest.raises(Fenced):
        await desk.turn()
    with pytest.raises(Fenced):
        await desk.fold()
    assert len(await office.events()) == 25
    await office.store.pipe([("DEL", LEASE)])
    await office.desk().turn()
    told = await office.events()
    assert sorted(told) == sorted([(stream, "opened") for stream in streams] + [(stream, "resolved") for stream in streams[:10]])
    assert len(await office.all(status=frozenset({"open"}))) == 40


async def test_what_was_folded_and_not_yet_taken_out_of_the_log_counts_once(office: Office, desk: Desk) -> None:
    await office.log(opening())
    await desk.turn()
    cursors = await office.book.cursors()
    assert [name for name in cursors if name.startswith("log:")]
    assert await office.book.read(cursors, 10) == []
    assert await office.book.read({}, 10) == []  # taken out
    # As if the desk had died in between: the entry is there again, its id at the cursor.
    [(name, id_)] = [(name, id_) for name, id_ in cursors.items() if name.startswith("log:")]
    await office.store.pipe([("DEL", log_key(int(name[4:])))])
    await office.store.pipe([("XADD", log_key(int(name[4:])), id_, "transition", encoded(opening()))])
    await office.desk().turn()
    await desk.turn()
    assert await office.events() == [("s", "opened")]


async def test_one_desk_keeps_the_book_and_another_takes_over_when_it_leaves(office: Office) -> None:
    first, second = office.desk(metrics := Metrics()), office.desk()
    running = [asyncio.create_task(first.run())]
    await until(lambda: first.keeps)
    running.append(asyncio.create_task(second.run()))
    await office.log(opening())
    async with asyncio.timeout(60):
        while not await office.all():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert len(await office.all()) == 1
    assert not second.keeps
    assert counted(metrics) == 1
    await tasks.end(running[0])
    assert counted(metrics) == 0, "of two replicas that both said it there would be two"
    await until(lambda: second.keeps)
    await tasks.end(running[1])
    assert await office.book.take("the next one, at once")
    assert await office.events() == [("s", "opened")]


async def test_who_has_lost_the_book_hears_of_it_when_it_renews(office: Office) -> None:
    assert await office.book.take("us")
    await office.book.renew("us")
    await office.book.release("us")
    for holder in ("nobody", "them"):
        assert holder == "nobody" or await office.book.take(holder)
        with pytest.raises(Fenced):
            await office.book.renew("us")


async def test_a_long_fold_keeps_its_lease(office: Office) -> None:
    assert await office.book.take("us")
    await office.store.pipe([("PEXPIRE", LEASE, 500)])
    await office.book.write("us", [], [], {})
    [left] = await office.store.pipe([("PTTL", LEASE)])
    assert left > 2000
    assert not await office.book.take("them")


async def test_a_long_look_keeps_its_lease(office: Office, desk: Desk) -> None:
    await office.log(opening())
    await desk.turn()
    await office.store.pipe([("PEXPIRE", LEASE, 500)])
    await desk.look()
    [left] = await office.store.pipe([("PTTL", LEASE)])
    assert left > 2000


async def test_a_clock_that_is_set_back_puts_off_no_look(office: Office, desk: Desk) -> None:
    await office.log(opening())
    await desk.turn()
    office.streams.standing["s"] = Stand(False, None, None)
    office.now -= 3600
    await desk.turn()
    assert [alert.resolution for alert in await office.all()] == ["forgotten"]


async def test_an_acknowledgement_is_shown_and_told_and_can_be_undone(office: Office, desk: Desk) -> None:
    await office.log(opening())
    await desk.turn()
    [alert] = await office.all()
    await office.book.acknowledge(alert.id, Acknowledgement("anna", "on it", 5.0))
    [known] = await office.all(status=frozenset({"acknowledged"}))
    assert known.acknowledgement == Acknowledgement("anna", "on it", 5.0)
    assert await office.all(status=frozenset({"open"})) == []
    await office.log(opening(what="escalated", severity="critical"))
    await desk.turn()
    [known] = await office.all()
    assert (known.status, known.severity) == ("acknowledged", "critical")
    await office.book.acknowledge(known.id, None)
    [known] = await office.all()
    assert (known.status, known.acknowledgement) == ("open", None)
    assert await office.book.acknowledge(known.id, None) == known  # of which nobody is told
    await office.book.acknowledge(known.id, Acknowledgement("anna", "", 6.0))
    await office.log(resolving())
    await desk.turn()
    [known] = await office.all()
    assert (known.status, known.acknowledgement) == ("resolved", Acknowledgement("anna", "", 6.0))
    assert [event for _, event in await office.events()] == [
        "opened",
        "acknowledged",
        "escalated",
        "unacknowledged",
        "acknowledged",
        "resolved",
    ]
    await office.log(opening())
    await desk.turn()
    [again] = await office.all()
    assert (again.status, again.acknowledgement) == ("open", None)


async def test_of_several_alerts_those_are_acknowledged_that_nobody_looks_after_and_no_other(office: Office, desk: Desk) -> None:
    transitions = [opening(name) for name in ("a", "b", "noted", "over")]
    await office.log(*transitions, resolving("over"))
    await desk.turn()
    a, b, noted, over = (transition.alert for transition in transitions)
    await office.book.acknowledge(noted, Acknowledgement("bob", "mine", 4.0))
    anna = Acknowledgement("anna", "power dip", 5.0)
    became = await office.book.acknowledge_open([b, over, noted, 28 * "0", a, b], anna)
    assert [(id_, one.outcome) for id_, one in became.items()] == [
        (b, "acknowledged"),
        (over, "resolved"),
        (noted, "already_acknowledged"),
        (28 * "0", "unknown"),
        (a, "acknowledged"),
    ]
    by = {alert.stream_id: alert.acknowledgement for alert in await office.all(status=frozenset({"acknowledged"}))}
    assert by == {"a": anna, "b": anna, "noted": Acknowledgement("bob", "mine", 4.0)}
    again = await office.book.acknowledge_open([a, b], Acknowledgement("anna", "power dip", 6.0))
    assert [one.outcome for one in again.values()] == ["already_acknowledged"] * 2
    assert sorted(name for name, event in await office.events() if event == "acknowledged") == ["a", "b", "noted"]


async def test_the_page_learns_whose_open_anomalies_somebody_looks_after_and_when_that_is_no_longer_so(office: Office, desk: Desk) -> None:
    silence = opening("quiet", kind="silence")
    await office.log(*(opening(name) for name in ("a", "b", "over")), silence)
    await desk.turn()
    anna = Acknowledgement("anna", "", 5.0)
    await office.book.acknowledge_open([opening(name).alert for name in ("a", "over")] + [silence.alert], anna)
    await office.log(resolving("over"))
    await desk.turn()
    marked: list[dict[str, int]] = []

    class Marking:
        def attend(self, marks: dict[str, int]) -> bool:
            marked.append(marks)
            return True

    attended = Attended({"m": cast("Recent", Marking()), "another": cast("Recent", Marking())}, Metrics(), lambda: True, lambda: None)
    await attended.look(office.book)
    await office.book.acknowledge(opening("a").alert, None)
    await attended.look(office.book)
    assert marked == [{"a": ATTENDED}, {}, {}, {}]


async def test_who_takes_an_alert_while_several_are_acknowledged_keeps_it(office: Office, desk: Desk) -> None:
    await office.log(opening("a"), opening("b"))
    await desk.turn()
    bob = Acknowledgement("bob", "mine", 4.0)

    async def taken() -> None:
        await office.book.acknowledge(opening("a").alert, bob)

    slow = Book(cast("Commands", _ReadThenTurn(office.store, taken)))
    became = await slow.acknowledge_open([opening("a").alert, opening("b").alert], Acknowledgement("anna", "all", 5.0))
    assert [one.outcome for one in became.values()] == ["already_acknowledged", "acknowledged"]
    assert {alert.acknowledgement for alert in await office.all(stream_id="a")} == {bob}


async def test_alerts_are_found_by_a_part_of_their_streams_name_and_counted_by_severity(office: Office, desk: Desk) -> None:
    names = ("Hall-2/pump-1", "hall-2/pump-2", "hall-3/pump-1")
    severities: tuple[Severity, ...] = ("minor", "critical", "critical")
    await office.log(*(opening(name, started_at=T0 + i, severity=severities[i]) for i, name in enumerate(names)))
    await desk.turn()
    assert {alert.stream_id for alert in await office.all(holds="HALL-2")} == set(names[:2])
    assert await office.all(holds="hall-4") == []
    assert await office.book.count(Wanted()) == (Counter(minor=1, critical=2), True)
    assert await office.book.count(Wanted(holds="hall-2")) == (Counter(minor=1, critical=1), True)
    await office.book.acknowledge_open([alert.id for alert in await office.all(holds="hall-3")], Acknowledgement("anna", "", 5.0))
    assert await office.book.count(Wanted(status=frozenset({"open"}))) == (Counter(minor=1, critical=1), True)


async def test_of_more_alerts_than_are_looked_at_the_latest_are_counted_and_said_not_to_be_all(
    office: Office, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.log(*(opening(f"s{i}", started_at=T0 + i) for i in range(5)))
    await desk.turn()
    monkeypatch.setattr("service.stores.book.AT_ONCE", 2)
    monkeypatch.setattr("service.stores.book.SCANNED", 4)
    assert await office.book.count(Wanted()) == (Counter(minor=4), False)
    assert await office.book.count(Wanted(), 1) == (Counter(minor=2), False)
    assert await office.book.count(Wanted(stream_id="s1")) == (Counter(minor=1), True)


@pytest.mark.parametrize(
    ("meanwhile", "then", "told"),
    [
        (resolving(), "resolved", ["opened", "resolved"]),
        (opening(what="escalated", severity="critical"), "acknowledged", ["opened", "escalated", "acknowledged"]),
    ],
)
async def test_what_happens_to_an_alert_while_it_is_acknowledged_is_not_told_as_undone(
    office: Office, desk: Desk, meanwhile: Transition, then: str, told: list[str]
) -> None:
    await office.log(opening())
    await desk.turn()
    await office.log(meanwhile)
    slow = Book(cast("Commands", _ReadThenTurn(office.store, desk.turn)))
    alert = await slow.acknowledge(meanwhile.alert, Acknowledgement("anna", "", 5.0))
    assert alert is not None
    assert (alert.status, alert.severity) == (then, "minor" if then == "resolved" else "critical")
    assert [event for _, event in await office.events()] == told
    assert (await office.book.changes(None, 10))[-1].change.alert == alert


class _ReadThenTurn:
    """A store whose first reader is so slow that something else is done before what was read is used."""

    def __init__(self, store: RedisStore | ClusterStore, done: Callable[[], Awaitable[None]]) -> None:
        self._store, self._turn = store, [done]

    async def pipe(self, commands: Sequence[Command]) -> list[Any]:
        replies = await self._store.pipe(commands)
        while self._turn:
            await self._turn.pop()()
        return replies


async def test_pages_are_the_latest_first_and_filtered(office: Office, desk: Desk) -> None:
    await office.log(*(opening(f"s{i % 3}", started_at=T0 + i, severity=("minor", "major", "critical")[i % 3]) for i in range(9)))
    await office.log(resolving("s0", started_at=T0), opening("s1", kind="silence", started_at=T0 + 100))
    await desk.turn()
    first, cursor = await office.book.page(Wanted(), "", 4)
    second, cursor = await office.book.page(Wanted(), cursor, 4)
    third, end = await office.book.page(Wanted(), cursor, 4)
    assert [alert.started_at - T0 for alert in [*first, *second, *third]] == [100, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert end == ""
    assert [alert.started_at - T0 for alert in await office.all(stream_id="s1")] == [100, 7, 4, 1]
    assert [alert.started_at - T0 for alert in await office.all(stream_id="s1", kind="anomaly")] == [7, 4, 1]
    assert {alert.stream_id for alert in await office.all(severity=frozenset({"major", "critical"}))} == {"s1", "s2"}
    assert [alert.started_at - T0 for alert in await office.all(status=frozenset({"resolved"}))] == [0]
    assert len(await office.all(status=frozenset({"open", "acknowledged"}))) == 9
    assert await office.all(model="another") == []
    assert [alert.started_at - T0 for alert in await office.all(stream_id="s0", status=frozenset({"open"}))] == [6, 3]


async def test_deleting_a_stream_resolves_all_its_alerts_and_no_other(office: Office, desk: Desk) -> None:
    await office.log(opening("a"), opening("a", kind="silence", started_at=T0 + 5), opening("b"), opening("a", model="other"))
    await desk.turn()
    await office.store.delete("m", "a", encoded(Transition("forgotten", "m", "a")))
    await desk.turn()
    resolved = {(alert.model, alert.stream_id, alert.resolution) for alert in await office.all()}
    assert resolved == {("m", "a", "forgotten"), ("m", "b", None), ("other", "a", None)}


async def test_a_look_keeps_what_streams_show_and_resolves_alerts_whose_streams_know_nothing_of_them(office: Office) -> None:
    metrics = Metrics()
    desk = office.desk(metrics, look=60)
    await office.log(opening("expired"), opening("afresh"), opening("foreign"), opening("on"), opening("told"))
    later = evidence(T0 + 50)
    office.streams.standing = {
        "expired": Stand(False, None, None),
        "afresh": Stand(True, later, frozenset()),
        "on": Stand(True, later, frozenset({opening("on").alert})),
        "told": Stand(True, later, frozenset()),
    }
    await office.log(resolving("told"))
    await desk.turn()
    found = {alert.stream_id: alert for alert in await office.all()}
    assert {stream: alert.resolution for stream, alert in found.items()} == {
        "expired": "forgotten",
        "afresh": "forgotten",
        "foreign": None,
        "on": None,
        "told": "recovered",
    }
    assert found["on"].last == later
    for _ in range(2):
        assert metrics.registry.get_sample_value("onset_alerts_open", {"kind": "anomaly", "severity": "minor"}) == 2
        await desk.look()
    office.streams.standing["on"] = Stand(True, evidence(T0 + 70), frozenset({opening("on").alert}))
    await desk.turn()
    assert (await office.all(stream_id="on"))[0].last == later  # no look yet
    office.now += 61
    await desk.turn()
    assert (await office.all(stream_id="on"))[0].last == evidence(T0 + 70)


async def test_a_look_reads_the_log_once_more_before_an_alert_is_forgotten(office: Office, desk: Desk) -> None:
    """A stream may say how its alert ended between the last fold and the look."""
    await office.log(opening())
    await desk.fold()
    await office.log(resolving())
    office.streams.standing = {"s": Stand(True, evidence(T0 + 50), frozenset())}
    await desk.look()
    assert [alert.resolution for alert in await office.all()] == ["recovered"]


async def test_an_alert_of_a_model_that_nobody_has_any_more_is_resolved_with_its_streams_state(office: Office, desk: Desk) -> None:
    transition = opening(model="gone")
    assert await office.store.commit("gone", [Write("s", b"", value(), log=[encoded(transition)])]) == [1]
    for then in ("open", "resolved"):
        office.now += 61
        await desk.turn()
        assert [alert.status for alert in await office.all()] == [then]
        await office.store.delete("gone", "s")  # or it has expired
    [alert] = await office.all()
    assert alert.resolution == "forgotten"


async def test_an_alert_of_the_past_is_told_when_it_catches_up_with_the_present(office: Office) -> None:
    desk = office.desk()
    await office.log(opening())
    office.now = T0 + 10_000
    office.streams.standing["s"] = Stand(True, evidence(T0 + 1000), frozenset({opening().alert}))
    await desk.turn()
    [alert] = await office.all()
    assert not alert.live
    office.streams.standing["s"] = Stand(True, evidence(T0 + 9000), frozenset({opening().alert}))
    office.now += 61
    await desk.turn()
    [alert] = await office.all()
    assert alert.live
    assert [(told.change.event, told.change.alert.live) for told in await office.book.changes(None, 10)] == [
        ("opened", False),
        ("opened", True),
    ]


async def test_an_alert_of_the_past_that_escalates_in_the_present_is_told_as_opened(office: Office) -> None:
    metrics = Metrics()
    office.now = time.time()
    desk = office.desk(metrics)
    await desk.turn()
    past, present = evidence(office.now - 7200), evidence(office.now)
    await office.log(opening(evidence=past), opening(what="escalated", severity="major", evidence=present))
    await office.log(opening("t", evidence=past), opening("t", what="escalated", evidence=present), resolving("t", evidence=present))
    await desk.turn()
    told = [told.change for told in await office.book.changes(None, 10)]
    live = [(change.alert.stream_id, change.event, change.severity_before) for change in told if change.alert.live]
    assert sorted(live) == [("s", "opened", None), ("t", "opened", None), ("t", "resolved", None)]
    sample = metrics.registry.get_sample_value
    for event, count in (("opened", 2), ("escalated", 1), ("resolved", 1)):
        assert sample("onset_alert_transitions_total", {"kind": "anomaly", "event": event}) == count
    assert sample("onset_alerts_open", {"kind": "anomaly", "severity": "major"}) == 1
    assert sample("onset_alerts_open", {"kind": "anomaly", "severity": "minor"}) == 0


async def test_open_alerts_that_nobody_looks_after_are_counted_at_each_look(office: Office) -> None:
    metrics = Metrics()
    office.now = time.time()
    desk = office.desk(metrics)
    await office.log(*(opening(name, severity="critical") for name in ("gone", "noted", "alone")))
    office.streams.standing = {"gone": Stand(False, None, None)}
    await desk.turn()

    def unattended() -> float | None:
        return metrics.registry.get_sample_value("onset_alerts_unattended", {"kind": "anomaly", "severity": "critical"})

    assert unattended() == 2
    await office.book.acknowledge_open([opening("noted").alert], Acknowledgement("anna", "", 5.0))
    office.now += 61
    await desk.turn()
    assert unattended() == 1
    assert metrics.registry.get_sample_value("onset_alerts_open", {"kind": "anomaly", "severity": "critical"}) == 2


async def test_more_alerts_than_may_be_open_are_dropped_and_counted_until_there_is_room(office: Office) -> None:
    metrics = Metrics()
    desk = office.desk(metrics, max_open=2)
    await office.log(*map(opening, "abc"))
    await desk.turn()
    assert len(await office.all()) == 2
    assert metrics.registry.get_sample_value("onset_alerts_dropped_total") == 1
    [kept, _] = await office.all()
    await office.log(resolving(kept.stream_id), opening("d"))
    await desk.turn()
    assert len(await office.all(status=frozenset({"open"}))) == 2


async def test_what_all_sinks_have_been_told_of_is_kept_no_longer(office: Office) -> None:
    office.now = time.time()

    async def kept(*sinks: str, after: float = 61, retention: float = 3600) -> list[str]:
        office.now += after
        await office.store.pipe([("DEL", LEASE)])
        await office.desk(sinks=sinks, retention=retention).turn()
        return [told.id for told in await office.book.changes(None, 10)]

    await office.log(opening("first"))
    assert await kept() == []  # where there is no sink
    await kept("hook", "elsewhere")
    await office.log(*(opening(f"s{i}") for i in range(5)))
    ids = await kept("hook", "elsewhere")
    [token] = await office.store.pipe([("GET", LEASE)])
    await office.book.delivered(token.decode(), "hook", ids[3])
    await office.book.delivered(token.decode(), "elsewhere", ids[1])
    assert await kept("hook", "elsewhere") == ids[2:]
    assert await kept("hook") == ids[2:]  # another replica may tell it
    assert await kept("hook", after=3600) == ids[4:]
    await office.log(opening("new"))
    assert len(await kept("new one")) == 1  # of which it is to be told
    assert await kept() == []
    await office.log(opening("newest"))
    assert len(await kept("hook")) == 1


async def test_resolved_alerts_are_forgotten_by_age_and_by_number(office: Office) -> None:
    desk = office.desk(max_resolved=3, retention=1000)
    await office.log(*(opening(f"s{i}") for i in range(6)))
    await desk.turn()
    await office.book.acknowledge(opening("s1").alert, Acknowledgement("anna", "", 5.0))
    for transitions in ([resolving(f"s{i}") for i in range(5)], [opening("s0")]):
        await office.log(*transitions)
        await desk.fold()
    await desk._tidy()
    assert len(await office.all(status=frozenset({"resolved"}))) == 3
    assert len(await office.all()) == 5
    office.now = 1e11
    await desk.turn()
    assert {alert.stream_id for alert in await office.all()} == {"s0", "s5"}, "one that opened again is not forgotten"
    left = await office.store.pipe([("ZCARD", STREAMS), ("ZCARD", ALL), ("HLEN", TABLE), ("HLEN", ACKS)])
    assert left == [2, 2, 2, 0]


async def test_an_unreadable_entry_is_counted_and_the_others_are_folded(office: Office) -> None:
    metrics = Metrics()
    desk = office.desk(metrics)
    await office.store.commit("m", [Write("s", b"", value(), log=[b"\xff nonsense", encoded(opening())])])
    await desk.turn()
    assert len(await office.all()) == 1
    assert metrics.registry.get_sample_value("onset_unexpected_errors_total") == 1
