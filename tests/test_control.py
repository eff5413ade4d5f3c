"""α and strict at run time: what is asked is checked, kept, shared by replicas, and changes verdicts but no state."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from service import tasks
from service.control import Alpha, Asked, Control, Strict
from service.detector import Detector
from service.errors import BadParameter, StoreUnavailable
from service.events import Columns, Delivery, Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import MAX_BATCH, Limits, Scorer
from service.stores import StateStore
from service.stores.memory import MemoryStore
from tests.times import Clock

START = 1.8e9
MARKED = 4.0


class Replica:
    """A scorer and its control over a store that others use too."""

    def __init__(self, detector: Detector, store: StateStore, clock: Clock, *, cadence: float | None = None, silence: bool = True) -> None:
        self.metrics, self.clock = Metrics(), clock
        self.scorer = Scorer(detector, Policy(silence=silence), store, self.metrics, Limits(), clock, held=True)
        self.control = Control(Asked(Alpha(1e-3), Strict(False)), cadence, {"tiny": self.scorer}, self.metrics, clock)
        self.control.connect(store)
        self.scorer.start()

    async def change(self, **body: Any) -> None:
        await self.control.change(body)

    async def score(self, stream: str, values: list[float], gap: float = 10.0) -> list[Result]:
        """Events `gap` seconds apart, the last one now."""
        self.clock.now += gap * len(values)
        events = [
            Event(
                stream_id=stream,
                values={"value": v},
                timestamp=self.clock.now - gap * (len(values) - 1 - i),
                event_id=f"{self.clock.now}/{i}",
            )
            for i, v in enumerate(values)
        ]
        answers = await self.scorer.score(events)
        assert all(isinstance(answer, Result) for answer in answers)
        return [answer for answer in answers if isinstance(answer, Result)]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
async def replicas(tiny_detector: Detector, any_store: StateStore) -> AsyncIterator[tuple[Replica, Replica]]:
    clock = Clock(START)
    pair = Replica(tiny_detector, any_store, clock), Replica(tiny_detector, any_store, clock)
    for replica in pair:
        await replica.control.refresh()
    yield pair
    for replica in pair:
        await replica.scorer.drain(1)


def normal(events: int) -> list[float]:
    return [float(v) for v in np.random.default_rng(3).normal(size=events).round(3)]


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "field", "value", "said"),
    [
        ({}, "alpha", "", "Nothing to change"),
        ({"alpha": 0.5}, "alpha", "0.5", "from 1e-09 to below 0.5"),
        ({"alpha": 0}, "alpha", "0", "from 1e-09"),
        ({"alpha": 1e-20}, "alpha", "1e-20", "from 1e-09"),
        ({"alpha": -1}, "alpha", "-1", "from 1e-09"),
        ({"alpha": math.nan}, "alpha", "NaN", "from 1e-09"),
        ({"alpha": 10**400}, "alpha", "1000", "from 1e-09"),
        ({"alpha": True}, "alpha", "true", "a number"),
        ({"alpha": "0.001"}, "alpha", '"0.001"', "a number"),
        ({"alpha": None}, "alpha", "null", "a number"),
        ({"strict": 1}, "strict", "1", "true or false"),
        ({"strict": "true"}, "strict", '"true"', "true or false"),
        ({"alpha": 0.01, "strict": None}, "strict", "null", "true or false"),
        ({"ALPHA": 0.01}, "ALPHA", "0.01", "alpha, false_alarms, cadence_seconds, strict"),
        ({"false_alarms": "1 per week"}, "cadence_seconds", "", "ONSET_CADENCE_SECONDS is not set"),
        ({"false_alarms": "1 per week", "cadence_seconds": 0}, "cadence_seconds", "0", "above 0"),
        ({"false_alarms": "1 per week", "cadence_seconds": None}, "cadence_seconds", "null", "above 0"),
        ({"false_alarms": "1 per week", "cadence_seconds": True}, "cadence_seconds", "true", "above 0"),
        ({"false_alarms": "1 per week", "cadence_seconds": math.inf}, "cadence_seconds", "Infinity", "above 0"),
        ({"false_alarms": "1 per week", "cadence_seconds": 10**400}, "false_alarms", '"1 per week"', ""),
        ({"false_alarms": "often", "cadence_seconds": 60}, "false_alarms", '"often"', "(hour, day, week, month, year)"),
        ({"false_alarms": 7, "cadence_seconds": 60}, "false_alarms", "7", "reads like"),
        ({"false_alarms": "1 per hour", "cadence_seconds": 3600}, "false_alarms", '"1 per hour"', "1 false alarms per event"),
        ({"false_alarms": "0 per week", "cadence_seconds": 60}, "false_alarms", '"0 per week"', "from 1e-09"),
        ({"false_alarms": "1 per week", "cadence_seconds": 60, "alpha": 0.01}, "alpha", "0.01", "one of them"),
        ({"cadence_seconds": 60}, "cadence_seconds", "60", "false_alarms"),
        ({"cadence_seconds": 60, "strict": True}, "cadence_seconds", "60", "false_alarms"),
    ],
)
async def test_what_cannot_be_asked_is_refused_by_field_and_value_and_changes_nothing(
    tiny_detector: Detector, body: dict[str, Any], field: str, value: str, said: str
) -> None:
    store = MemoryStore(state_ttl=60, result_ttl=60)
    replica = Replica(tiny_detector, store, Clock(START))
    with pytest.raises(BadParameter) as caught:
        await replica.control.change(body)
    assert caught.value.field == field
    assert caught.value.value.startswith(value) if value else not caught.value.value
    assert said in caught.value.detail
    assert await store.policy() == {}
    await replica.scorer.drain(1)


async def test_a_rate_in_words_is_kept_with_its_words(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    await one.change(false_alarms="1 per week", cadence_seconds=300)
    await two.control.refresh()
    for replica in replicas:
        asked = await replica.control.reply()
        assert asked.alpha == pytest.approx(1 / 2016)
        assert (asked.false_alarms, asked.cadence_seconds) == ("1 per week", 300.0)
        assert (asked.origin["alpha"].source, asked.origin["alpha"].changed_at) == ("run time", START)
        assert (asked.origin["strict"].source, asked.origin["strict"].changed_at) == ("environment", None)
        assert asked.environment == {"alpha": 1e-3, "strict": False}


async def test_the_words_need_no_cadence_where_one_is_configured(tiny_detector: Detector) -> None:
    replica = Replica(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60), Clock(START), cadence=60.0)
    await replica.change(false_alarms="1 per day")
    assert replica.scorer.policy.alpha == pytest.approx(1 / 1440)
    await replica.scorer.drain(1)


# ── one policy for all replicas ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_change_holds_here_at_once_and_elsewhere_after_a_refresh_and_is_undone_alike(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    with capture_logs() as lines:
        await one.change(alpha=0.02, strict=True)
        assert (one.scorer.policy.alpha, one.scorer.policy.strict) == (0.02, True)
        assert (two.scorer.policy.alpha, two.scorer.policy.strict) == (1e-3, False)
        await two.control.refresh()
        assert (two.scorer.policy.alpha, two.scorer.policy.strict) == (0.02, True)
        await two.control.refresh()
    changed = [line for line in lines if line["event"] == "policy_changed"]
    assert [(line["by"], line["alpha"], line["alpha_before"]) for line in changed] == [("call", 0.02, 1e-3), ("refresh", 0.02, 1e-3)]
    assert (one.sample("onset_alpha"), one.sample("onset_strict")) == (0.02, 1.0)
    assert (one.sample("onset_policy_changes_total", by="call"), two.sample("onset_policy_changes_total", by="call")) == (1, None)
    assert two.sample("onset_policy_changes_total", by="refresh") == 1
    await two.control.reset()
    await one.control.refresh()
    for replica in replicas:
        assert (replica.scorer.policy.alpha, replica.scorer.policy.strict) == (1e-3, False)
        assert (await replica.control.reply()).origin["alpha"].source == "environment"
        assert (replica.sample("onset_alpha"), replica.sample("onset_strict")) == (1e-3, 0.0)


async def test_changes_of_different_values_on_two_replicas_both_hold(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    await asyncio.gather(one.change(alpha=0.02), two.change(strict=True))
    for replica in replicas:
        await replica.control.refresh()
        assert (replica.scorer.policy.alpha, replica.scorer.policy.strict) == (0.02, True)


async def test_after_a_restart_nothing_is_scored_before_the_change_is_known(tiny_detector: Detector, any_store: StateStore) -> None:
    clock = Clock(START)
    before = Replica(tiny_detector, any_store, clock)
    await before.change(alpha=0.02)
    after = Replica(tiny_detector, any_store, clock)
    event = Event(stream_id="s", values={"value": 1.0})
    columns = Columns(["s"], [None], {"value": np.ones(1)}, np.full(1, np.nan), np.full(1, -1), {})
    for score in (
        lambda: after.scorer.score([event]),
        lambda: after.scorer.consume([Delivery(event, 0, 0, START)]),
        lambda: after.scorer.score_columns(columns),
    ):
        with pytest.raises(StoreUnavailable, match="policy has not been read"):
            await score()
    with pytest.raises(StoreUnavailable, match="policy has not been read"):
        after.scorer.begin(event, "")
    with capture_logs() as lines:
        await after.control.refresh()
    assert [line["event"] for line in lines] == ["policy_overrules_environment"]
    assert (await after.score("s", [1.0]))[0].threshold == 1.0
    assert after.scorer.policy.alpha == 0.02
    assert after.sample("onset_policy_changes_total", by="refresh") is None
    for replica in (before, after):
        await replica.scorer.drain(1)


class Unsteady(MemoryStore):
    """A store that may not answer, answer wrongly, or wait before it does."""

    down = False
    bug = False

    def __init__(self) -> None:
        super().__init__(state_ttl=3600, result_ttl=600)
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0

    async def policy(self) -> dict[str, bytes]:
        self.asked += 1
        if self.bug:
            raise KeyError("a bug")
        if self.down:
            raise StoreUnavailable("The store does not answer.")
        answer = await super().policy()
        await self.gate.wait()
        return answer

    async def waited(self, model: str, limit: int) -> tuple[int, list[str]]:
        if self.down:
            raise StoreUnavailable("The store does not answer.")
        return await super().waited(model, limit)


async def refreshed(store: Unsteady) -> None:
    """A refresh began and ended."""
    asked = store.asked
    async with asyncio.timeout(20):
        while store.asked < asked + 3:  # noqa: ASYNC110 - one may be under way, and a reply asks, too
            await asyncio.sleep(0.005)


async def test_while_the_store_is_lost_the_last_policy_holds_and_the_refresh_goes_on(tiny_detector: Detector) -> None:
    store = Unsteady()
    replica = Replica(tiny_detector, store, Clock(START))
    await replica.change(alpha=0.02)
    task = asyncio.create_task(replica.control.run(every=0.005))
    with capture_logs() as lines:
        for store.down, store.bug in ((True, False), (False, True), (False, False)):
            await refreshed(store)
            assert replica.scorer.policy.alpha == 0.02
            assert not task.done()
            if store.down:
                assert (await replica.control.reply()).expected_false_alarms["tiny"].reason is not None
    assert sum(line["event"] == "policy_not_refreshed" for line in lines) == 1
    assert (replica.sample("onset_unexpected_errors_total") or 0) >= 1
    await store.change_policy({"alpha": None})
    await refreshed(store)
    assert replica.scorer.policy.alpha == 1e-3
    await tasks.end(task)
    await replica.scorer.drain(1)


async def test_a_refresh_that_began_before_a_change_does_not_undo_it(tiny_detector: Detector) -> None:
    store = Unsteady()
    replica = Replica(tiny_detector, store, Clock(START))
    await replica.control.refresh()
    store.gate.clear()
    refresh = asyncio.create_task(replica.control.refresh())
    await asyncio.sleep(0)
    change = asyncio.create_task(replica.change(alpha=0.02))
    await asyncio.sleep(0)
    store.gate.set()
    await change
    assert replica.scorer.policy.alpha == 0.02
    await refresh
    assert replica.scorer.policy.alpha == 0.02
    await replica.scorer.drain(1)


@pytest.mark.parametrize("kept", [b"", b"nonsense", b'{"value": 0.7}', b'{"value": 1e-20}', b'{"value": "0.1"}', b"\xff", b"[1]"])
async def test_a_kept_value_that_cannot_be_used_leaves_the_last_one_and_is_logged_once(tiny_detector: Detector, kept: bytes) -> None:
    store = MemoryStore(state_ttl=60, result_ttl=60)
    replica = Replica(tiny_detector, store, Clock(START))
    await replica.change(alpha=0.02)
    with capture_logs() as lines:
        await store.change_policy({"alpha": kept, "of a newer version": b"?", "strict": b'{"value": true, "new": 1}'})
        for _ in range(3):
            await replica.control.refresh()
    assert (replica.scorer.policy.alpha, replica.scorer.policy.strict) == (0.02, True)
    assert sum(line["event"] == "policy_unusable" for line in lines) == 1
    await replica.change(alpha=0.03)
    assert replica.scorer.policy.alpha == 0.03
    await replica.scorer.drain(1)


# ── verdicts, states, alerts ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_change_turns_verdicts_at_once_and_a_duplicate_keeps_its_own(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    await one.score("s", normal(300))
    [before] = await one.score("s", [MARKED])
    assert before.p_value is not None
    assert not before.is_anomaly
    await one.change(alpha=min(0.4, 3 * before.p_value))
    sent = Event(stream_id="s", values={"value": MARKED}, timestamp=one.clock.now, event_id=f"{one.clock.now}/0")
    [again] = await one.scorer.score([sent])
    assert isinstance(again, Result)
    assert again.duplicate
    assert (again.anomaly_score, again.is_anomaly, again.alpha) == (before.anomaly_score, before.is_anomaly, before.alpha)
    [after] = await one.score("s", [MARKED])
    assert after.is_anomaly
    await two.control.refresh()
    shown = await two.scorer.streams.last("s")
    assert (shown.alpha, shown.is_anomaly) == (after.alpha, True)


async def test_an_open_alert_outlives_changes_and_closes_as_ever(replicas: tuple[Replica, Replica]) -> None:
    one, _ = replicas
    await one.score("s", normal(600))
    [opened] = await one.score("s", [500.0])
    assert (opened.status, opened.is_anomaly) == ("frozen", True)
    for alpha in (1e-9, 0.4, 1e-6):
        await one.change(alpha=alpha, strict=alpha > 0.1)
        [lasting] = await one.score("s", [500.0])
        assert (lasting.status, lasting.is_anomaly) == ("frozen", True)
        assert lasting.anomaly_started_at == opened.anomaly_started_at
        assert lasting.expected == pytest.approx(opened.expected, abs=1e-6)
    back = await one.score("s", normal(11))
    assert back[-1].status == "ready"
    assert back[-1].anomaly_started_at is None
    assert not back[-1].is_anomaly


async def test_a_request_is_judged_by_one_policy_even_when_it_waits_in_pieces(tiny_detector: Detector) -> None:
    class Slow(Unsteady):
        async def load(self, model: str, stream_ids: Any) -> list[bytes | None]:
            await self.gate.wait()
            return await super().load(model, stream_ids)

    store = Slow()
    replica = Replica(tiny_detector, store, Clock(START))
    await replica.control.refresh()
    store.gate.clear()
    values = [Event(stream_id=f"s{i % 7}", values={"value": float(i % 5)}, timestamp=START + i) for i in range(2 * MAX_BATCH + 100)]
    first = asyncio.create_task(replica.scorer.score(values))
    small = asyncio.create_task(replica.scorer.score([Event(stream_id="small", values={"value": 1.0})]))
    await asyncio.sleep(0.01)
    await replica.change(alpha=0.02)
    later = asyncio.create_task(replica.scorer.score([Event(stream_id="small", values={"value": 1.0}), *values[:3]]))
    await asyncio.sleep(0.01)
    store.gate.set()
    assert {answer.alpha for answer in await first if isinstance(answer, Result)} == {1e-3}
    assert {answer.alpha for answer in await small if isinstance(answer, Result)} == {1e-3}
    assert {answer.alpha for answer in await later if isinstance(answer, Result)} == {0.02}
    await replica.scorer.drain(1)


# ── what it means ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_any_cadence_the_expectation_is_null_and_says_why(replicas: tuple[Replica, Replica]) -> None:
    one, _ = replicas
    await one.score("young", normal(10))
    meant = (await one.control.reply()).expected_false_alarms["tiny"]
    assert (meant.cadence, meant.per_stream_and_day, meant.per_stream_and_week, meant.fleet_per_day) == (None, None, None, None)
    assert meant.reason is not None
    assert "ONSET_CADENCE_SECONDS" in meant.reason


async def test_a_configured_cadence_gives_the_expectation_of_a_stream_and_none_of_the_fleet(replicas: tuple[Replica, Replica]) -> None:
    one, _ = replicas
    await one.change(false_alarms="1 per week", cadence_seconds=300)
    meant = (await one.control.reply()).expected_false_alarms["tiny"]
    assert meant.cadence == "configured"
    assert meant.per_stream_and_week == pytest.approx(1, rel=1e-3)
    assert meant.per_stream_and_day == pytest.approx(1 / 7, rel=1e-3)
    assert (meant.active_streams, meant.fleet_per_day) == (None, None)
    assert meant.reason is not None


async def test_the_expectation_follows_the_cadences_that_live_streams_really_have(
    replicas: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = replicas
    for i in range(6):
        one.clock.now = START
        for _ in range(2):  # how often a stream arrives is known from its second arrival on
            await one.score(f"live {i}", normal(100), gap=10.0 if i % 2 else 30.0)
    await one.score("young", normal(20))
    await two.change(alpha=0.01, strict=True)
    meant = (await two.control.reply()).expected_false_alarms["tiny"]
    assert meant.cadence == "measured"
    assert (meant.active_streams, meant.sampled_streams) == (6, 6)
    assert meant.events_per_stream_and_day == pytest.approx((8640 + 2880) / 2, rel=0.02)
    assert meant.fleet_per_day == pytest.approx(0.01 * 3 * (8640 + 2880), rel=0.02)
    assert meant.per_stream_and_week == pytest.approx(7 * 0.01 * 5760, rel=0.02)
    assert (meant.reason, meant.extra_while_learning) == (None, 0)
    monkeypatch.setattr("service.control.SAMPLED", 2)
    drawn = (await two.control.reply()).expected_false_alarms["tiny"]
    assert drawn.per_stream_and_day is not None
    assert drawn.fleet_per_day == pytest.approx(6 * drawn.per_stream_and_day, rel=0.001), "of all, not of those that were drawn"


async def test_who_asks_for_less_than_the_calibration_could_see_is_cautioned(tiny_detector: Detector) -> None:
    calibration = tiny_detector.manifest.calibration | {"support": {"streams": 100, "events": 1_000_000, "onsets": 2000, "enough": True}}
    manifest = tiny_detector.manifest.model_copy(update={"calibration": calibration})
    assert manifest.rarest == 1e-5
    seen = Detector(manifest, tiny_detector.sha256, tiny_detector._session)
    replica = Replica(seen, MemoryStore(state_ttl=60, result_ttl=60), Clock(START))
    for alpha, cautioned in ((1e-5, False), (9e-6, True)):
        await replica.change(alpha=alpha)
        caution = (await replica.control.reply()).expected_false_alarms["tiny"].caution
        assert (caution is not None) is cautioned
        assert caution is None or "1e-05" in caution
    await replica.scorer.drain(1)


async def test_with_silence_off_the_fleet_is_unknown_and_says_so(tiny_detector: Detector) -> None:
    replica = Replica(tiny_detector, MemoryStore(state_ttl=60, result_ttl=60), Clock(START), cadence=60.0, silence=False)
    meant = (await replica.control.reply()).expected_false_alarms["tiny"]
    assert meant.per_stream_and_day == pytest.approx(1.44)
    assert (meant.active_streams, meant.fleet_per_day) == (None, None)
    assert "ONSET_SILENCE" in (meant.reason or "")
    await replica.scorer.drain(1)
