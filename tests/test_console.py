"""What the page is fed with: bounded rings of recent events, and watchers who take from them at their own pace."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.console.live import FleetQuery, Live, carrying, readings, series, short
from service.console.over import Over
from service.console.recent import (
    ANOMALY,
    ATTENDED,
    COLD,
    LEVEL_SHIFT,
    MESSAGE_BYTES,
    MUTED,
    ONSET,
    OPEN,
    QUIET_SECONDS,
    Put,
    Recent,
    Room,
    event_dtype,
)
from service.console.shared import Shared
from service.console.table import page
from service.console.trial import Trial, TrialLimits, Trials
from service.detector import Detector
from service.errors import Overloaded, TooLarge
from service.events import Event
from service.feed import Feed
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.stores.live import LiveLog
from service.stores.memory import MemoryStore
from tests.tiny_log import build_tiny_log

DEPTH = 8


class Fleet:
    """A scorer of the tiny detector whose feed fills a `Recent` of eight events a stream, and a clock."""

    def __init__(self, detector: Detector, streams: int = 100, watchers: int = 4) -> None:
        self.now = 1000.0
        one = event_dtype(detector.manifest).itemsize * DEPTH
        self.recent = Recent(detector.manifest, Room(streams * one, [detector.name]), DEPTH, clock=lambda: self.now)
        metrics = Metrics()
        self.feed = Feed(metrics)
        self.shared = Shared({detector.name: self.recent}, "replica-1", LiveLog(), metrics)
        self.live = Live({detector.name: self.recent}, watchers, "replica-1", metrics, self.shared)
        self.feed.watch(self.live.take)
        self.scorer = Scorer(detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), metrics, Limits(), feed=self.feed)
        self.metrics = metrics

    async def score(self, *events: tuple[str, float]) -> None:
        await self.scorer.score([Event(stream_id=name, values={"value": value}) for name, value in events])
        self.recent.write()

    async def warm(self, *names: str, events: int = 40) -> None:
        """Until nothing but a real change is anomalous."""
        await self.score(*((name, 10.0 + 0.1 * (i % 3)) for i in range(events) for name in names))

    def values(self, name: str, seen: int = 0) -> list[float]:
        slot = self.recent.slot(name)
        assert slot is not None
        return [round(float(v), 3) for v in self.recent.events(slot, seen)["x"][:, 0]]

    def level(self, name: str) -> int:
        """How severe its open alert has been, an index into SEVERITIES."""
        slot = self.recent.slot(name)
        assert slot is not None
        return int(self.recent.last(np.array([slot]))["bits"][0]) >> LEVEL_SHIFT

    def listed(self, **query: Any) -> list[str]:
        return [self.recent.name(slot) for slot in self.recent.top(**query).tolist()]


@asynccontextmanager
async def fleet_of(detector: Detector, **limits: int) -> AsyncIterator[Fleet]:
    fleet = Fleet(detector, **limits)
    fleet.scorer.start()
    yield fleet
    await fleet.scorer.drain(5)


class Watcher:
    """The far end of an answer: takes messages when it wants to."""

    def __init__(self, answer: Any) -> None:
        self._sent: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)  # a client that reads nothing makes `send` wait
        self._left = asyncio.Event()
        self._answer = asyncio.create_task(answer({"type": "http"}, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message.get("body"):
            await self._sent.put(message["body"])

    async def messages(self, wanted: str) -> list[dict[str, Any]]:
        """Messages up to the first one of this name, each {event, data}."""
        got: list[dict[str, Any]] = []
        async with asyncio.timeout(20):
            while not any(one["event"] == wanted for one in got):
                for block in (await self._sent.get()).decode().split("\n\n"):
                    fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
                    if "event" in fields:
                        got.append({"event": fields["event"], "data": json.loads(fields["data"])})
        return got

    async def data(self, wanted: str) -> dict[str, Any]:
        data: dict[str, Any] = next(one["data"] for one in await self.messages(wanted) if one["event"] == wanted)
        return data

    async def leave(self) -> None:
        self._left.set()
        await self._answer

    async def ended(self) -> bool:
        while not self._answer.done():
            try:
                self._sent.get_nowait()
            except asyncio.QueueEmpty:
                await asyncio.sleep(0.01)
        return True


@pytest.mark.parametrize(
    ("bits", "order"), [(0, [0, 1, 3, 4, 5, 6, 7, 8]), (ANOMALY, [7, 1, 8, 0, 3, 4, 5, 6]), (OPEN, [7, 1, 8, 0, 3, 4, 5, 6])]
)
def test_features_that_carry_the_most_come_first_while_something_is_the_matter(bits: int, order: list[int]) -> None:
    events = np.zeros(2, [("score", "f4"), ("contribution", "f4", 9), ("bits", "u1")])
    events["score"] = np.nan, 2.0
    events["contribution"] = [[0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3], [0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.8, 0.0]]
    events["bits"][-1] = bits
    assert carrying(events) == order
    assert carrying(events[:0]) == list(range(8))


async def test_a_ring_holds_the_last_events_of_each_stream_in_order(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.score(*((name, float(i)) for i in range(3) for name in "ab"))
        assert fleet.values("a") == [0, 1, 2]
        await fleet.score(*(("a", float(i)) for i in range(3, 10)))
        assert fleet.values("a") == [2, 3, 4, 5, 6, 7, 8, 9]
        assert fleet.values("a", seen=8) == [8, 9]
        assert fleet.values("b") == [0, 1, 2]


async def test_more_events_of_a_stream_than_its_ring_holds_leave_the_last_ones(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.score(*(("a", float(i)) for i in range(3 * DEPTH + 1)))
        assert fleet.values("a") == [float(i) for i in range(2 * DEPTH + 1, 3 * DEPTH + 1)]


async def test_events_that_were_not_scored_are_in_no_ring(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        event = Event(stream_id="a", values={"value": 1.0}, event_id="once")
        await fleet.scorer.score([event, event])
        await fleet.scorer.score([event])
        fleet.recent.write()
        assert fleet.values("a") == [1.0]


async def test_an_onset_marks_its_event_and_puts_its_stream_first(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.warm("a", "b", "c")
        await fleet.score(("a", 10.0), ("b", 99.0), ("c", 10.1))
        assert fleet.listed(most=10)[0] == "b"
        slot = fleet.recent.slot("b")
        assert slot is not None
        assert int(fleet.recent.events(slot)["bits"][-1]) & (ANOMALY | OPEN | ONSET) == ANOMALY | OPEN | ONSET
        assert fleet.recent.counts().alerting == 1
        assert fleet.listed(most=10, bits=OPEN) == ["b"]
        assert fleet.listed(most=10, holds="C") == ["c"]
        assert fleet.listed(most=1, holds="a") == ["a"]


async def test_open_alerts_stand_in_the_order_of_their_severity_however_long_ago_they_began(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.warm("a", "b", "c")
        await fleet.score(("c", 99.0))
        fleet.now += 300
        await fleet.score(("a", 10.8), ("b", 10.0))
        assert [fleet.level(name) for name in "abc"] == [1, 0, 3]
        assert fleet.listed(most=10) == ["c", "a", "b"]


async def test_an_alert_that_somebody_looks_after_stands_below_those_that_nobody_has_seen_whatever_their_severity(
    tiny_detector: Detector,
) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.warm("a", "b", "c", "calm")
        await fleet.score(("a", 99.0), ("b", 99.0))
        fleet.now += 300
        await fleet.score(("c", 10.8))
        watcher = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10)))
        rows = (await watcher.data("changes"))["rows"]
        assert not any(row[5] & ATTENDED for row in rows)
        assert fleet.recent.attend(dict.fromkeys(("a", "calm", "unknown"), ATTENDED))
        assert fleet.listed(most=10) == ["b", "c", "a", "calm"]
        assert fleet.listed(most=2) == ["b", "c"]
        fleet.live.news()
        rows = (await watcher.data("changes"))["rows"]
        assert {fleet.recent.name(row[0]) for row in rows if row[5] & ATTENDED} == {"a"}  # nobody can look after what is no alert
        assert page([fleet.recent], "replica-1", alone=False).count("△ critical alert acknowledged") == 1
        assert not fleet.recent.attend(dict.fromkeys(("a", "calm"), ATTENDED))
        assert fleet.recent.attend({"a": MUTED})
        assert fleet.listed(most=10) == ["b", "c", "a", "calm"]
        fleet.live.news()
        rows = (await watcher.data("changes"))["rows"]
        assert [(fleet.recent.name(row[0]), row[5] & (ATTENDED | MUTED)) for row in rows if row[5] & (ATTENDED | MUTED)] == [("a", MUTED)]
        assert page([fleet.recent], "replica-1", alone=False).count("△ critical alert muted") == 1
        assert fleet.recent.attend({})
        assert fleet.listed(most=10) == ["a", "b", "c", "calm"]
        await watcher.leave()


async def test_an_alert_that_ended_without_an_event_is_taken_from_the_page(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.warm("deleted", "accepted", "speaks", "open")
        await fleet.score(("deleted", 99.0), ("accepted", 99.0), ("speaks", 99.0), ("open", 99.0))
        watcher = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10, bits=OPEN)))
        assert {shown["id"] for shown in (await watcher.data("fleet"))["new"]} == {"deleted", "accepted", "speaks", "open"}
        streams, over = fleet.scorer.streams, Over(fleet.live.recent, fleet.metrics, fleet.live.news)
        for name in ("deleted", "speaks"):
            assert await streams.forget(name)
        await streams.accept("accepted")
        await over.look(fleet.recent, streams)
        assert len(fleet.listed(most=10, bits=OPEN)) == 4  # each may speak yet
        fleet.now += QUIET_SECONDS + 1
        [rest] = [rest for rest in fleet.recent.resting() if rest.stream_id == "speaks"]
        await fleet.score(("speaks", 99.0))
        assert fleet.recent.over([rest]) == 0
        await over.look(fleet.recent, streams)
        assert fleet.listed(most=10, bits=OPEN) == ["open"]
        assert fleet.recent.counts().alerting == 1
        assert len((await watcher.data("fleet"))["keys"]) == 1
        await watcher.leave()


def test_models_share_the_memory_and_none_is_left_without_a_part(tiny_detector: Detector) -> None:
    room = Room(1600, ["large", "small"])
    assert room.left("large") == 1500
    room.take("large", 1500)
    assert (room.left("large"), room.left("small")) == (0, 100)
    room.take("small", 60)
    assert (room.left("large"), room.left("small")) == (0, 40)
    three = Room(4800, ["large", "wide", "small"])
    three.take("large", 4400)
    three.take("wide", 900)  # one ring of it is more than its part: it has one all the same
    assert three.left("wide") < 0
    assert three.left("small") == 200
    alone = Room(1600, ["one"])
    assert alone.left("one") == 1600
    recent = Recent(tiny_detector.manifest, Room(1, [tiny_detector.name, "other"]), DEPTH)
    assert recent.capacity == 1


async def test_streams_beyond_the_memory_are_left_out_until_another_has_gone_quiet(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector, streams=2) as fleet:
        await fleet.score(("a", 1.0), ("b", 1.0), ("c", 1.0))
        assert set(fleet.listed(most=10)) == {"a", "b"}
        assert fleet.recent.counts().left_out == 1
        fleet.now += QUIET_SECONDS + 1
        await fleet.score(("b", 1.0), ("c", 2.0))
        assert set(fleet.listed(most=10)) == {"b", "c"}
        assert fleet.values("c") == [2.0]


async def test_an_anomalous_stream_finds_room_at_once_but_never_another_ones_that_speaks(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector, streams=2) as fleet:
        await fleet.warm("a", "b", "c")
        assert set(fleet.listed(most=10)) == {"a", "b"}
        fleet.now += 1
        await fleet.score(("c", 99.0), ("a", 10.0), ("b", 10.0))
        assert set(fleet.listed(most=10)) == {"a", "b"}
        fleet.now += 1
        await fleet.score(("c", 99.0), ("a", 10.0))
        assert set(fleet.listed(most=10)) == {"a", "c"}


def put_of(recent: Recent, at: float, **streams: tuple[list[float], int]) -> Put:
    """Scored at `at`; of each stream the times and the bits of its events, whose values say whose they are."""
    names = [name for name, (times, _) in streams.items() for _ in times]
    events = np.zeros(len(names), recent.dtype)
    events["t"] = [time for times, _ in streams.values() for time in times]
    events["bits"] = [bits for times, bits in streams.values() for _ in times]
    events["x"][:, 0] = [ord(name) for name in names]
    events["version"] = np.arange(1, len(names) + 1)
    return Put(names, events, at)


@pytest.mark.parametrize("aged", [True, False])
def test_streams_that_come_together_and_find_the_memory_full_never_get_each_others_events(tiny_detector: Detector, aged: bool) -> None:
    wall = time.time()
    one = event_dtype(tiny_detector.manifest).itemsize * DEPTH
    recent = Recent(tiny_detector.manifest, Room(2 * one, [tiny_detector.name]), DEPTH, clock=lambda: 10_000.0)
    recent.put(put_of(recent, 1000.0, k=([wall - 9000], 0), l=([wall - 9000], 0)))
    puts = [
        put_of(recent, 10_000.0, f=([wall - 2, wall - 1], 0)),
        put_of(recent, 9999.9, s=([wall - 3000, wall - 1500, wall - 1], 0)),  # a slow one
        put_of(recent, 10_000.0, z=([wall - 5, wall - 1], ANOMALY)),
    ]
    recent.merge(puts, aged=aged)
    held = {recent.name(slot): {chr(int(value)) for value in recent.events(slot)["x"][:, 0]} for slot in range(2)}
    assert held == {"f": {"f"}, "s": {"s"}}
    assert recent.counts().left_out == 2


@pytest.mark.parametrize(("bits", "held"), [(ANOMALY, ["new"]), (ANOMALY | OPEN, ["old"])])
def test_a_stream_that_went_quiet_makes_room_though_its_last_event_was_anomalous_but_not_with_an_open_alert(
    tiny_detector: Detector, bits: int, held: list[str]
) -> None:
    one = event_dtype(tiny_detector.manifest).itemsize * DEPTH
    now = 1000.0
    recent = Recent(tiny_detector.manifest, Room(one, [tiny_detector.name]), DEPTH, clock=lambda: now)
    for name, its in (("old", bits), ("new", 0)):
        events = np.zeros(1, recent.dtype)
        events["bits"] = its
        recent.put(Put([name], events, now))
        recent.write()
        now += QUIET_SECONDS + 1
    assert [recent.name(slot) for slot in recent.top(10)] == held


def test_watches_that_ended_are_forgotten_where_there_is_nobody_to_ask(tiny_detector: Detector) -> None:
    fleet = Fleet(tiny_detector)
    tracemalloc.start()
    for i in range(2000):
        fleet.shared.watch(tiny_detector.name, f"stream {i} {'x' * 200}")()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100_000


async def test_batches_are_put_aside_and_written_before_they_are_too_many(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        events = [Event(stream_id=f"s{i}", values={"value": 1.0}) for i in range(50)]
        for _ in range(100):
            await fleet.scorer.score(events)
        assert fleet.recent._pending_events < 4096
        assert fleet.recent.writes == 1


async def test_a_watcher_of_the_fleet_gets_the_history_and_then_what_is_new(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.score(("a", 1.0), ("a", 2.0))
        watcher = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10)))
        first = await watcher.data("fleet")
        assert first["replica"] == "replica-1"
        [shown] = first["new"]
        assert (shown["id"], shown["value"], shown["bits"]) == ("a", [1.0, 2.0], [COLD, COLD])
        await fleet.score(("a", 3.0))
        changes = await watcher.data("changes")
        assert [row[2] for row in changes["rows"]] == [3.0]
        await fleet.score(("b", 4.0))
        assert [one["id"] for one in (await watcher.data("fleet"))["new"]] == ["b"]
        await watcher.leave()
        assert fleet.live.watchers == 0


async def test_a_stream_that_comes_to_be_shown_after_its_event_was_told_has_its_row_without_another_event(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.warm("a", "b")
        await fleet.score(("b", 11.0))
        watcher = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(1)))
        [shown] = (await watcher.data("fleet"))["new"]
        assert shown["id"] == "b"
        await fleet.score(("a", 99.0))
        *told, members, changes = await watcher.messages("fleet")
        assert all(one["data"]["rows"] == [] for one in told)
        assert [one["id"] for one in members["data"]["new"]] == ["a"]
        [row] = changes["data"]["rows"]
        key, _, value, expected, score, bits, rank, *_ = row
        assert [key] == members["data"]["keys"]
        assert (value, bits & ONSET) == (99.0, ONSET)
        assert expected is not None
        assert score > 1
        assert rank > 0
        await watcher.leave()


async def test_a_spike_between_two_messages_is_not_lost(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.warm("a")
        watcher = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10)))
        await watcher.data("fleet")
        await fleet.score(("a", 99.0), ("a", 10.0))
        score, bits = (await watcher.data("changes"))["rows"][0][4:6]
        assert score > 1
        assert bits & ONSET
        await watcher.leave()


async def test_a_watcher_of_a_stream_gets_each_event_once_and_is_told_what_it_missed(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        await fleet.score(("a", 1.0), ("b", 7.0))
        watcher = Watcher(fleet.live.stream(tiny_detector.name, "a", []))
        about, history = (one["data"] for one in await watcher.messages("events"))
        assert (about["stream_id"], about["chosen"], history["x"], history["skipped"]) == ("a", [0], [[1.0]], 0)
        await fleet.score(("a", 2.0), ("b", 7.0), ("a", 3.0))
        assert (await watcher.data("events"))["x"] == [[2.0, 3.0]]
        # It takes nothing while more comes than the ring holds: nothing waits for it, and it is told so.
        await fleet.score(("a", 4.0))
        await asyncio.sleep(0.3)
        await fleet.score(*(("a", float(i)) for i in range(5, 30)))
        await asyncio.sleep(0.3)
        parts: list[dict[str, Any]] = []
        while not parts or parts[-1]["x"][0][-1] < 29:
            parts.append(await watcher.data("events"))
        got = [value for part in parts for value in part["x"][0]]
        assert got[-DEPTH:] == [float(i) for i in range(22, 30)]
        assert len(got) + sum(part["skipped"] for part in parts) == 26
        last = parts[-1]["last"]
        assert last["state_version"] == 29
        assert [one["feature"] for one in last["contributors"]] == ["value"]
        await watcher.leave()


async def test_what_moves_little_at_a_great_height_or_beside_a_great_number_is_seen_to_move(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        for base, odd in ((101_325.0, 101_325.0), (3.0, 65_535.0)):
            values = [base, base + 0.25, base + 0.5, odd]
            name = str(base)
            await fleet.score(*((name, value) for value in values))
            watcher = Watcher(fleet.live.stream(tiny_detector.name, name, []))
            assert (await watcher.data("events"))["x"] == [values]
            await watcher.leave()


async def test_a_stream_may_be_watched_before_it_speaks(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        watcher = Watcher(fleet.live.stream(tiny_detector.name, "later", []))
        assert (await watcher.data("stream"))["stream_id"] == "later"
        await fleet.score(("later", 1.0))
        assert (await watcher.data("events"))["x"] == [[1.0]]
        await watcher.leave()


async def test_watchers_are_limited_and_one_that_left_makes_room(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector, watchers=1) as fleet:
        watcher = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10)))
        await watcher.data("fleet")
        with pytest.raises(Overloaded, match="ONSET_CONSOLE_WATCHERS"):
            fleet.live.fleet(tiny_detector.name, FleetQuery(10))
        await watcher.leave()
        again = Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10)))
        await again.data("fleet")
        await again.leave()


async def test_who_watches_with_more_pages_than_others_gives_one_up_to_them_and_no_more(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector, watchers=4) as fleet:

        def watch(who: str) -> Watcher:
            return Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10), who))

        many = [watch("a") for _ in range(4)]
        for watcher in many:
            await watcher.data("fleet")
        few = [watch("b"), watch("b")]
        for watcher in few:
            await watcher.data("fleet")
        async with asyncio.timeout(20):
            assert [await watcher.ended() for watcher in many[2:]] == [True, True]  # those that came last
        with pytest.raises(Overloaded, match="2 of them yours"):
            watch("b")
        with pytest.raises(Overloaded):
            watch("a")
        third = watch("c")  # one that has none
        await third.data("fleet")
        async with asyncio.timeout(20):
            assert await many[1].ended()
        assert fleet.live.watchers == 4
        for watcher in [*many, *few, third]:
            await watcher.leave()


async def test_closing_ends_every_watcher_and_refuses_new_ones(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector) as fleet:
        watchers = [Watcher(fleet.live.fleet(tiny_detector.name, FleetQuery(10))), Watcher(fleet.live.stream(tiny_detector.name, "a", []))]
        await asyncio.sleep(0.05)
        fleet.live.close()
        async with asyncio.timeout(20):
            assert [await watcher.ended() for watcher in watchers] == [True, True]
        with pytest.raises(Overloaded):
            fleet.live.fleet(tiny_detector.name, FleetQuery(10))


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [([0.1, math.nan, 123.456789, -1e-20], [0.1, None, 123.457, -1e-20]), ([], []), ([0.0], [0.0])],
)
def test_numbers_are_sent_with_the_digits_that_show(numbers: Sequence[float], wanted: list[float | None]) -> None:
    assert short(np.array(numbers, np.float32)) == wanted


def test_a_series_keeps_the_digits_of_its_largest_number_whatever_its_scale() -> None:
    for scale in (1e-12, 1.0, 1e15):
        numbers = np.array([0.123456789, math.nan, -1.0]) * scale
        first, missing, last = series(numbers)
        assert first == pytest.approx(numbers[0], rel=1e-4)
        assert missing is None
        assert last == pytest.approx(-scale)


def test_readings_of_several_decades_are_each_sent_with_their_digits() -> None:
    gauge = np.array([1.01325e3, math.nan, 0.0, -2.5e-9, 3.0e-7], np.float32)  # a pump-down, in mbar
    assert readings(gauge) == [1013.25, None, 0.0, pytest.approx(-2.5e-9), pytest.approx(3e-7)]


async def test_a_log_stream_is_sent_as_its_lines_and_each_pattern_once(tmp_path: Path) -> None:
    detector = Detector.load(build_tiny_log(tmp_path))
    async with fleet_of(detector) as fleet:

        async def say(*messages: str) -> None:
            await fleet.scorer.score([Event(stream_id="web", message=message) for message in messages])

        await say("Accepted connection from 10.0.0.7:80", "Took 9.5 ms for /a", "Ä" * MESSAGE_BYTES)
        watcher = Watcher(fleet.live.stream(detector.name, "web", []))
        about, events = (one["data"] for one in await watcher.messages("events"))
        assert about["kind"] == "log"
        lines = events["lines"]
        assert lines["message"][:2] == ["Accepted connection from 10.0.0.7:80", "Took 9.5 ms for /a"]
        assert lines["message"][2] == "Ä" * (MESSAGE_BYTES // 2) + "…"
        assert lines["code"] == [1, 2, 0]
        assert lines["before"] == [[], [1], [2, 1]]
        assert next(code for code, _ in lines["likely"][1]) == 2
        assert lines["templates"]["2"] == "Took <NUM> ms for <*>"
        await fleet.scorer.score([Event(stream_id="web", end=True)])
        events = await watcher.data("events")
        assert (events["lines"]["message"], events["lines"]["code"]) == ([None], [5])
        assert set(events["lines"]["templates"]) <= {"5", "3", "4"}
        await watcher.leave()
        board = Watcher(fleet.live.fleet(detector.name, FleetQuery(10)))
        shown = await board.data("fleet")
        assert shown["kind"] == "log"
        assert shown["new"][0]["bits"][-1] & OPEN
        assert shown["new"][0]["said"] == lines["message"][2]  # what the open alert is about, also after the end of the session
        await fleet.scorer.score([Event(stream_id="calm", message="Took 1 ms for /b")])
        while [one["said"] for one in shown["new"]] != ["Took 1 ms for /b"]:
            shown = await board.data("fleet")
        await board.leave()


async def test_one_upload_is_read_at_a_time_and_a_second_one_is_refused_unread(tmp_path: Path) -> None:
    trials = Trials(TrialLimits(1_000_000, 1_000, 60))
    trial = Trial("a.csv", str(tmp_path), "tiny", 1e-3, strict=False, timestamp=None)
    arrived, read = asyncio.Event(), 0

    async def upload() -> bytes:
        nonlocal read
        read += 1
        await arrived.wait()
        return b"value\n" * 2_000

    first = asyncio.create_task(trials.run(trial, upload))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="one at a time"):
        await trials.run(trial, upload)
    arrived.set()
    with pytest.raises(TooLarge, match="ONSET_BACKTEST_ROWS"):
        await first
    assert read == 1
    for end in (b"\n", b"\r", b"\r\n"):
        with pytest.raises(TooLarge, match="some 2,000 rows"):
            await trials.run(trial, lambda end=end: uploaded((b"value" + end) * 2_000))  # type: ignore[misc]


SECONDS = 600
"""For a backtest of which the memory is looked at: it has the lowest priority, and on a busy machine its time would be over first."""


async def uploaded(content: bytes) -> bytes:
    return content


@pytest.mark.skipif(sys.platform != "linux", reason="limits with Linux's RLIMIT_DATA")
async def test_an_upload_takes_no_more_memory_than_it_may(tiny_model_path: Path) -> None:
    trials = Trials(TrialLimits(5 * 2**20, 1_000, SECONDS))
    trial = Trial("a.csv", str(tiny_model_path), "tiny", 1e-3, strict=False, timestamp=None)
    names = b",".join(b"%x" % i for i in range(750_000))
    assert len(names) < 5 * 2**20
    with pytest.raises(TooLarge, match=r"takes more than 80 MiB of memory \(the larger of 64 MiB and 16 times"):
        await trials.run(trial, lambda: uploaded(names + b"\n1\n"))
    assert json.loads(await trials.run(trial, lambda: uploaded(b"value\n" + b"1\n" * 900)))["rows"] == 900


async def test_an_upload_for_which_there_is_no_room_says_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(TrialLimits(1_000_000, 1_000, 60))
    trial = Trial("a.csv", str(tmp_path), "tiny", 1e-3, strict=False, timestamp=None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(Overloaded, match=r"cannot be kept for the backtest: No such file or directory\. Make room in .* \(TMPDIR\)"):
        await trials.run(trial, lambda: uploaded(b"value\n1\n"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits with Linux's RLIMIT_DATA")
def test_a_limit_of_memory_from_outside_that_is_smaller_is_kept_to(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"value\n" + b"1\n" * 50)
    trial = Trial("a.csv", str(tiny_model_path), "tiny", 1e-3, strict=False, timestamp=None)
    command = [sys.executable, "-m", "service.console.trial", str(file), json.dumps(asdict(trial)), str(2**40)]
    limited = ["sh", "-c", 'ulimit -d 2097152; exec "$@"', "sh", *command]  # KiB
    done = subprocess.run(limited, capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["rows"] == 50


async def test_a_file_as_large_as_a_small_limit_has_the_memory_that_it_takes(tiny_model_path: Path) -> None:
    trials = Trials(TrialLimits(500_000, 10_000, SECONDS))
    trial = Trial("a.csv", str(tiny_model_path), "tiny", 1e-3, strict=False, timestamp=None)
    upload = b"timestamp,value,note\n" + b"".join(b"%d,1.5,%.31d\n" % (1_790_000_000 + i, i) for i in range(10_000))
    assert 450_000 < len(upload) < 500_000
    assert json.loads(await trials.run(trial, lambda: uploaded(upload)))["rows"] == 10_000


async def test_counting_small_p_values_takes_a_part_of_the_memory_that_the_rings_have(tiny_detector: Detector) -> None:
    async with fleet_of(tiny_detector, streams=2000) as fleet:
        await fleet.warm(*(f"s{i}" for i in range(2000)), events=DEPTH)
        rings = 2000 * DEPTH * event_dtype(tiny_detector.manifest).itemsize
        tracemalloc.start()
        tail = fleet.recent.tail([0.1])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert tail.events == 2000 * DEPTH
        assert peak < rings / 2
