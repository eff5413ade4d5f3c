"""While a mute is in force sinks are told of none of the alerts that open; what is still open afterwards they are told then."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from msgspec.structs import replace

from bench.receiver import Receiver
from service import mutes
from service.alerts import Acknowledgement, Stand
from service.console.attended import Attended
from service.console.recent import ATTENDED, MUTED, Recent
from service.errors import BadParameter, TooLarge
from service.metrics import Metrics
from service.mutes import Mute, MuteReply, holding, matches
from service.sinks.alertmanager import Alertmanager
from service.sinks.teller import Teller
from service.stores.book import LEASE
from tests.contracts.test_stores import opened
from tests.test_desk import evidence, opening, resolving
from tests.test_sinks import TOKEN, Desk, Kept, all_told

NOW = 1_795_000_000.0


class Plant(Desk):
    """An office whose desk looks when it is told to."""

    async def look(self) -> None:
        await self.store.pipe([("DEL", LEASE)])
        await self.desk(self.metrics, max_age=3600).turn()
        await self.ours()

    metrics = Metrics()

    async def muted(self, *streams: str, name: str = "m", after: float = 0.0, seconds: float = 3600.0, model: str | None = None) -> None:
        now = time.time()
        await self.book.mute(Mute(name, list(streams), model, now + after, now + after + seconds, "anna", "", now))


@pytest.fixture
async def office(empty_server: str) -> AsyncIterator[Plant]:
    office = Plant(await opened(empty_server))
    office.now = time.time()
    await office.ours()
    yield office
    await office.store.close()


@pytest.fixture
async def sink() -> Kept:
    return Kept()


@pytest.fixture
async def teller(office: Plant, sink: Kept) -> Teller:
    teller = office.teller(sink)
    await teller.begin(TOKEN)
    return teller


def test_an_asterisk_is_any_characters_and_nothing_else_is_special() -> None:
    for pattern in ("M03.Temp", "M03*", "*Temp", "M*.*", "*", "M03.Temp*", "**0*e*"):
        assert matches(pattern, "M03.Temp"), pattern
    for pattern in ("M03", "m03.Temp", "M03?Temp", "M03.[T]emp", "*M", "M03.Temp*p", "Temp*", "M0*03.Temp", "*x*", "*0*0*"):
        assert not matches(pattern, "M03.Temp"), pattern
    assert matches("Temp [°C]*", "Temp [°C] 1")
    assert not matches("*a" * 100 + "*b", "a" * 256)  # at once


def test_a_mute_is_of_its_model_and_its_streams_and_says_whether_it_is_in_force() -> None:
    mute = Mute("m", ["s", "t*"], "m", NOW, NOW + 60, "anna", "", NOW)
    assert [mute.holds(*of, NOW) for of in (("m", "s"), ("m", "t1"), ("m", "u"), ("n", "s"))] == [True, True, False, False]
    states = [MuteReply.of(mute, NOW + after).state for after in (-1, 0, 59, 60)]
    assert states == ["coming", "in_force", "in_force", "over"]
    assert holding([mute, later := replace(mute, ends_at=NOW + 90)], "m", "s", NOW) == later
    assert holding([mute], "m", "u", NOW) is None


def test_a_mute_holds_what_is_committed_right_after_it_though_the_log_cuts_times_off_to_milliseconds() -> None:
    mute = Mute("m", ["s"], None, NOW + 0.0007, NOW + 60, "anna", "", NOW)
    assert mute.holds("m", "s", NOW)
    assert not mute.holds("m", "s", NOW - 0.001)
    assert not mute.holds("m", "s", NOW + 60)


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"streams": "M03*"}, "streams", "a list of 1 to 100 names"),
        ({"streams": []}, "streams", "a list of 1 to 100 names"),
        ({"streams": ["M03*", ""]}, "streams[1]", "1 to 256 characters"),
        ({"ends_at": None}, "ends_at", "a time with its zone"),
        ({"ends_at": "2026-11-18T20:00:00"}, "ends_at", "a time with its zone"),
        ({"ends_at": "tomorrow"}, "ends_at", "a time with its zone"),
        ({"ends_at": True}, "ends_at", "a time with its zone"),
        ({"ends_at": NOW - 1}, "ends_at", "a time that is not past"),
        ({"ends_at": NOW * 1000}, "ends_at", "a time with its zone"),
        ({"starts_at": NOW + 99, "ends_at": NOW + 99}, "ends_at", "later than starts_at"),
        ({"ends_at": NOW + 366 * 86_400 + 1}, "ends_at", "at most 366 days ahead"),
        ({"by": ""}, "by", "names who says so"),
        ({"note": 7}, "note", "a text of at most 2000 characters"),
        ({"note": "x" * 2001}, "note", "a text of at most 2000 characters"),
        ({"model": ""}, "model", "the name of a model"),
        ({"until": NOW}, "until", "it has streams, model, starts_at, ends_at, by, note"),
    ],
)
def test_a_mute_that_cannot_be_meant_is_refused_with_the_part_to_blame(body: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(BadParameter, match=says) as refused:
        mutes.asked("m", {"streams": ["M03*"], "ends_at": NOW + 60, "by": "anna"} | body, NOW)
    assert refused.value.field == field


def test_a_mute_is_from_now_on_unless_it_says_from_when_and_times_have_their_zones() -> None:
    asked = mutes.asked("m", {"streams": ["a", "a"], "ends_at": "2026-11-18T22:00:00+01:00", "by": "anna"}, NOW)
    assert (asked.starts_at, asked.ends_at, asked.streams, asked.model) == (NOW, 1_795_035_600.0, ["a"], None)
    assert mutes.asked("m", {"streams": ["a"], "starts_at": NOW - 60, "ends_at": NOW + 1, "by": "anna"}, NOW).starts_at == NOW - 60
    assert mutes.asked("m", {"streams": ["a"], "ends_at": NOW + 366 * 86_400, "by": "anna"}, NOW).ends_at == NOW + 366 * 86_400
    whole = {"streams": ["a"], "model": "press", "note": "x" * 2000, "ends_at": NOW + 1, "by": "anna"}
    assert (mutes.asked("m", whole, NOW).model, mutes.asked("m", whole, NOW).note) == ("press", "x" * 2000)
    with pytest.raises(BadParameter, match="1 to 64 letters"):
        mutes.asked("line 3", {}, NOW)


def test_so_many_mutes_are_kept_and_those_that_are_not_over_have_so_many_names() -> None:
    def named(name: str, streams: int = 1, ends_at: float = NOW + 1) -> Mute:
        return Mute(name, [f"s-{i}" for i in range(streams)], None, NOW - 9, ends_at, "anna", "", NOW)

    most = [named(f"m-{i}") for i in range(1000)]
    mutes.check_room(named("m-0"), most)
    mutes.check_room(named("m-1000"), most[1:])
    with pytest.raises(TooLarge, match="There are 1000 mutes"):
        mutes.check_room(named("m-1000"), most)
    full = [named(f"m-{i}", 100) for i in range(20)]
    mutes.check_room(named("m-0", 100), full)
    mutes.check_room(named("m-20", 100), [named("m-0", 100, NOW), *full[1:]])
    with pytest.raises(TooLarge, match="more than 2000 names"):
        mutes.check_room(named("m-20"), full)


async def test_nobody_is_told_of_what_opens_and_is_over_while_a_mute_is_in_force(office: Plant, teller: Teller, sink: Kept) -> None:
    await office.muted("line-3", "line-3.*")
    await office.happen(opening("line-3"), opening("line-3.a", severity="critical"), opening("line-30"))
    await office.happen(opening("line-3.a", what="escalated", severity="critical"))
    await office.happen(resolving("line-3"), resolving("line-3.a"), resolving("line-30"))
    await all_told(teller)
    assert sink.told == [("opened", "line-30"), ("resolved", "line-30")]
    assert await office.book.withheld("kept", [opening(name).alert for name in ("line-3", "line-3.a")]) == set()
    [alert] = await office.all(stream_id="line-3")
    assert alert.muted is not None
    assert (alert.muted.mute, alert.muted.told, alert.resolution) == ("m", None, "recovered")


async def test_what_is_open_when_the_mute_ends_is_told_then_and_only_once(office: Plant, teller: Teller, sink: Kept) -> None:
    await office.muted("s*")
    await office.happen(opening("s1"), opening("s2"))
    await office.happen(opening("s1", what="escalated", severity="critical"))
    await office.look()
    await all_told(teller)
    assert sink.told == []
    assert office.metrics.registry.get_sample_value("onset_alerts_muted") == 2
    assert {alert.stream_id for alert in await office.all(muted=True)} == {"s1", "s2"}
    await office.happen(resolving("s2"))
    office.now += 3601
    for _ in range(2):
        await office.look()
        await all_told(teller)
    assert sink.told == [("opened", "s1")]
    [notice] = sink.notices
    assert notice.alert is not None
    assert (notice.alert.severity, notice.alert.muted) == ("critical", None)
    assert office.metrics.registry.get_sample_value("onset_alerts_muted") == 0
    assert await office.all(muted=True, status=frozenset({"open"})) == []
    await office.happen(resolving("s1"))
    await all_told(teller)
    assert sink.told[1:] == [("resolved", "s1")]


async def test_thousands_of_muted_alerts_are_gone_beyond_at_once_and_what_is_told_does_not_wait_for_them(
    office: Plant, teller: Teller, sink: Kept
) -> None:
    await office.muted("s*")
    many = [opening(f"s{i}") for i in range(250)]
    await office.happen(*many)
    await office.happen(opening("other"))
    await office.happen(*(resolving(one.stream_id) for one in many[:-1]))
    await office.happen(resolving("other"))
    turns = 0
    while await teller.turn(TOKEN):
        turns += 1
    assert sink.told == [("opened", "other"), ("resolved", "other")]
    assert turns < 20
    assert await office.book.withheld("kept", [one.alert for one in many]) == {many[-1].alert}
    await office.book.unmute("m")
    await office.look()
    await all_told(teller)
    assert sink.told[2:] == [("opened", many[-1].stream_id)]


async def test_what_was_told_before_escalates_in_silence_and_ends_aloud(office: Plant, teller: Teller, sink: Kept) -> None:
    await office.happen(opening("a"), opening("b"))
    await office.muted("*")
    for name in "ab":
        await office.happen(opening(name, what="escalated", severity="critical"))
    await office.happen(resolving("b"))
    await all_told(teller)
    assert sorted(sink.told) == [("opened", "a"), ("opened", "b"), ("resolved", "b")]
    await office.book.unmute("m")
    await office.look()
    await all_told(teller)
    assert sink.told[3:] == [("escalated", "a")]
    assert sink.notices[3].severity_before == "minor"


async def test_a_mute_counts_from_when_to_when_by_the_time_of_the_commit_whenever_it_is_folded(
    office: Plant, teller: Teller, sink: Kept
) -> None:
    await office.muted("before", after=3600)
    await office.muted("over", name="n", after=-3600, seconds=3600)
    await office.muted("other", name="o", model="another")
    await office.happen(opening("before"), opening("over"), opening("other"))
    await all_told(teller)
    assert sorted(sink.told) == [("opened", "before"), ("opened", "other"), ("opened", "over")]
    await office.muted("late", name="p")
    await office.log(opening("late"), resolving("late"))
    office.now += 7200  # no replica was there; the mute is over by now
    await office.happen()
    await all_told(teller)
    assert len(sink.told) == 3


async def test_a_mute_that_goes_on_under_another_name_keeps_its_alerts(office: Plant, teller: Teller, sink: Kept) -> None:
    await office.muted("s", seconds=60)
    await office.happen(opening("s"))
    await office.muted("s", name="longer", seconds=3600)
    office.now += 61
    await office.look()
    await all_told(teller)
    [alert] = await office.all()
    assert alert.muted is not None
    assert (alert.muted.mute, sink.told) == ("longer", [])


async def test_an_alert_of_the_past_that_catches_up_while_it_is_muted_is_told_afterwards(office: Plant, teller: Teller, sink: Kept) -> None:
    past = evidence(office.now - 7200)
    await office.log(opening(evidence=past))
    await office.look()
    await office.muted("s")
    present = replace(opening(evidence=evidence(office.now)), what="escalated", severity="critical")
    await office.log(present)
    await office.look()
    await all_told(teller)
    assert sink.told == []
    await office.book.unmute("m")
    await office.look()
    await all_told(teller)
    assert sink.told == [("opened", "s")]


async def test_the_fleet_sets_muted_alerts_aside_while_they_are_open_and_muted(office: Plant) -> None:
    marked: list[dict[str, int]] = []

    class Marking:
        def attend(self, marks: dict[str, int]) -> bool:
            marked.append(marks)
            return True

    attended = Attended({"m": cast("Recent", Marking())}, Metrics(), lambda: True, lambda: None)
    await office.happen(opening("before"))
    await office.muted("*")
    await office.happen(opening("passing"), opening("lasting"))
    await office.book.acknowledge_open([opening(name).alert for name in ("before", "lasting")], Acknowledgement("anna", "", NOW))
    await attended.look(office.book)
    await office.happen(resolving("passing"))
    await attended.look(office.book)
    await office.book.unmute("m")
    await office.look()
    await attended.look(office.book)
    assert marked == [
        {"before": ATTENDED, "passing": MUTED, "lasting": MUTED},
        {"before": ATTENDED, "lasting": MUTED},
        {"before": ATTENDED, "lasting": ATTENDED},
    ]


async def test_who_takes_an_alert_the_moment_its_mute_ends_has_taken_it(office: Plant) -> None:
    await office.muted("s")
    await office.happen(opening())
    await office.book.unmute("m")
    anna = Acknowledgement("anna", "", NOW)
    stand = office.streams.stand

    async def meanwhile(stream_ids: Sequence[str]) -> list[Stand]:
        assert await office.book.acknowledge(opening().alert, anna) is not None
        return await stand(stream_ids)

    office.streams.stand = meanwhile  # type: ignore[method-assign]
    await office.look()
    [alert] = await office.all()
    assert (alert.muted, alert.status, alert.acknowledgement) == (None, "acknowledged", anna)
    assert [event for _, event in await office.events()] == ["opened", "acknowledged", "opened"]


async def test_a_thousand_mutes_that_are_over_cost_nothing_and_those_in_force_do_not_hold_the_service_up(
    office: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], bool]] = []
    holding = mutes.holding

    def watched(some: list[Mute], *one: Any) -> Mute | None:
        asked.append(({mute.name for mute in some}, threading.current_thread() is threading.main_thread()))
        return holding(some, *one)

    monkeypatch.setattr(mutes, "holding", watched)
    await office.muted("s", name="over", after=-7200)
    await office.muted("s", name="coming", after=7200)
    await office.happen(opening("s"))
    await office.look()
    assert asked == []
    await office.muted("t", name="now")
    await office.happen(opening("t"))
    await office.look()
    assert asked
    assert all(one == ({"now"}, False) for one in asked)


async def test_alertmanager_has_nothing_that_is_muted_and_keeps_what_it_had_as_it_was(office: Plant) -> None:
    with Receiver() as receiver:
        sink = Alertmanager(receiver.url, office.book, Metrics(), resend=60, keep_firing=0, clock=lambda: office.now)
        await sink.begin(TOKEN)

        async def told() -> set[tuple[str, str, bool]]:
            """Stream, severity and whether it is over, of all posts since the last call."""
            receiver.posted.clear()
            office.now += 61
            await sink.turn(TOKEN)
            posts = [alert for posted in receiver.posted for alert in posted.json]
            return {(alert["labels"]["stream"], alert["labels"]["severity"], "endsAt" in alert) for alert in posts}

        await office.happen(opening("a"))
        assert await told() == {("a", "minor", False)}
        await office.muted("*")
        await office.happen(opening("b"), opening("a", what="escalated", severity="critical"))
        for _ in range(2):
            assert await told() == {("a", "minor", False)}
        await office.book.unmute("m")
        await office.look()
        assert await told() == {("a", "minor", True), ("a", "critical", False), ("b", "minor", False)}
        await office.muted("*")
        await office.happen(opening("c"), resolving("c"), resolving("a"))
        assert ("a", "critical", True) in await told()
        assert not {stream for stream, _, _ in await told()} & {"a", "c"}
        await sink.close()


async def test_mutes_are_forgotten_with_the_alerts_of_their_time_unless_they_were_changed_meanwhile(office: Plant) -> None:
    await office.muted("s", after=-100, seconds=50)
    await office.muted("s", name="n")
    [over, current] = await office.book.mutes()
    assert (over.name, current.name) == ("m", "n")
    await office.book.forget_mutes(over.ends_at)
    assert len(await office.book.mutes()) == 2
    await office.book.forget_mutes(over.ends_at + 1)
    assert await office.book.mutes() == [current]
    assert await office.book.unmute("n")
    assert not await office.book.unmute("n")
