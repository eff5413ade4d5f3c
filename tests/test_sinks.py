"""Sinks are told of every change in order, at least once, with patience and within the flood limit."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from bench.receiver import Posted, Receiver
from service import tasks
from service.alerts import Acknowledgement
from service.errors import BadSetting, Fenced
from service.metrics import Metrics
from service.names import bounded
from service.settings import Settings
from service.sinks.alertmanager import Alertmanager, labels
from service.sinks.posting import retry_after
from service.sinks.stdout import Stdout
from service.sinks.teller import Notice, Patience, Sink, Teller, Unreachable
from service.sinks.webhook import Webhook, key_of, signature
from service.stores.book import AT_ONCE, LEASE
from service.tellers import declared
from tests.contracts.test_stores import opened
from tests.test_desk import T0, Office, opening, resolving
from tests.times import until

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
QUICK = Patience(give_up=3600, first_wait=0.01, longest_wait=0.05)
TOKEN = "us"


class Kept:
    """A sink that keeps its notices; it is down for the next `down` of them. `then` follows each."""

    name = "kept"

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.down = 0
        self.then: Callable[[], Awaitable[None]] | None = None

    async def tell(self, notice: Notice) -> None:
        if self.down:
            self.down -= 1
            raise Unreachable("down")
        self.notices.append(notice)
        if self.then:
            await self.then()

    async def close(self) -> None:
        return None

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(notice.event, notice.alert.stream_id if notice.alert else "") for notice in self.notices]


class Desk(Office):
    """An office whose desk is ours, and a teller of one sink."""

    def teller(self, sink: Sink, metrics: Metrics | None = None, patience: Patience = QUICK, **options: Any) -> Teller:
        return Teller(sink, self.book, metrics or Metrics(), patience=patience, clock=lambda: self.now, **options)

    async def ours(self) -> None:
        await self.store.pipe([("SET", LEASE, TOKEN)])

    async def lost(self) -> None:
        await self.store.pipe([("SET", LEASE, "another")])

    async def happen(self, *transitions: Any, max_age: float = math.inf) -> None:
        """Log and fold these."""
        await self.log(*transitions)
        await self.store.pipe([("DEL", LEASE)])
        await self.desk(max_age=max_age).turn()
        await self.ours()


async def all_told(teller: Teller) -> None:
    while await teller.turn(TOKEN):
        pass


@pytest.fixture
async def office(empty_server: str) -> AsyncIterator[Desk]:
    store = await opened(empty_server)
    office = Desk(store)
    office.now = time.time()
    await office.ours()
    yield office
    await store.close()


async def test_each_change_is_told_once_and_in_order_from_the_moment_a_sink_is_new(office: Desk) -> None:
    await office.happen(opening("before"))
    sink = Kept()
    teller = office.teller(sink, public_url="https://onset.example")
    await teller.begin(TOKEN)
    await office.happen(opening("a"), opening("a", what="escalated", severity="critical"))
    [alert] = await office.all(stream_id="a")
    await office.book.acknowledge(alert.id, Acknowledgement("anna", "", T0))
    await office.happen(resolving("a"))
    await all_told(teller)
    assert sink.told == [("opened", "a"), ("escalated", "a"), ("acknowledged", "a"), ("resolved", "a")]
    notice = sink.notices[1]
    assert notice.severity_before == "minor"
    assert notice.alert is not None
    assert notice.alert.link == f"https://onset.example/?alert={alert.id}"
    again = office.teller(Kept())
    await again.begin(TOKEN)
    assert not await again.turn(TOKEN)


async def test_whoever_takes_over_goes_on_where_the_other_one_died(office: Desk) -> None:
    first, second = Kept(), Kept()
    teller = office.teller(first)
    await teller.begin(TOKEN)
    await office.happen(*(opening(f"s{i}") for i in range(6)))
    for _ in range(3):
        await teller.turn(TOKEN)
    first.then = office.lost
    with pytest.raises(Fenced):
        await teller.turn(TOKEN)  # told, but not marked: the next one tells it again
    await office.ours()
    heir = office.teller(second)
    await heir.begin(TOKEN)
    await all_told(heir)
    assert len(first.notices) == 4
    assert {notice.id for notice in first.notices + second.notices} == {told.id for told in await office.book.changes(None, 100)}
    assert [notice.id for notice in second.notices] == sorted(notice.id for notice in second.notices)


async def test_alerts_of_the_past_are_not_told(office: Desk) -> None:
    sink, metrics = Kept(), Metrics()
    teller = office.teller(sink, metrics)
    await teller.begin(TOKEN)
    await office.happen(opening("old"), max_age=3600)
    assert len(await office.book.changes(None, 10)) == 1
    await all_told(teller)
    assert sink.told == []
    assert metrics.registry.get_sample_value("onset_alert_deliveries_total", {"sink": "kept", "outcome": "past"}) == 1


async def test_a_sink_that_is_down_is_told_again_until_it_takes_it(office: Desk) -> None:
    sink, metrics = Kept(), Metrics()
    teller = office.teller(sink, metrics)
    await teller.begin(TOKEN)
    await office.happen(opening("a"), opening("b"))
    sink.down = 5
    with capture_logs() as logs:
        await all_told(teller)
    assert [(entry["event"], entry["sink"], entry["reason"]) for entry in logs] == [("sink_waits", "kept", "down")]
    assert sorted(sink.told) == [("opened", "a"), ("opened", "b")]
    assert metrics.registry.get_sample_value("onset_alert_deliveries_total", {"sink": "kept", "outcome": "retried"}) == 5
    assert metrics.registry.get_sample_value("onset_alert_deliveries_total", {"sink": "kept", "outcome": "delivered"}) == 2
    assert metrics.registry.get_sample_value("onset_alert_lag_seconds", {"sink": "kept"}) == 0


async def test_a_replica_that_keeps_the_book_no_more_says_nothing_of_what_waits(office: Desk) -> None:
    metrics = Metrics()
    with Receiver() as gone:
        url = gone.url
    alertmanager = Alertmanager(url, office.book, metrics, clock=lambda: office.now)
    sinks: list[Teller | Alertmanager] = [office.teller(Webhook(url, ""), metrics), alertmanager]
    for sink in sinks:
        await sink.begin(TOKEN)
    await office.happen(opening("a"))

    def lags() -> list[float | None]:
        return [metrics.registry.get_sample_value("onset_alert_lag_seconds", {"sink": sink.name}) for sink in sinks]

    telling = [asyncio.create_task(sink.run(TOKEN)) for sink in sinks]
    office.now += 500
    await until(lambda: all(lag is not None and lag > 100 for lag in lags()))
    for task in telling:
        await tasks.end(task)
    assert lags() == [0, 0]
    for sink in sinks:
        await sink.close()


async def test_a_replica_that_was_suspended_while_another_took_the_book_tells_nothing_when_it_wakes(office: Desk) -> None:
    with Receiver() as receiver:
        hook = office.teller(Webhook(receiver.url, ""))
        alertmanager = Alertmanager(receiver.url, office.book, Metrics(), clock=lambda: office.now)
        sinks: list[Teller | Alertmanager] = [hook, alertmanager]
        for sink in sinks:
            await sink.begin(TOKEN)
        await office.happen(opening("a"))
        await office.lost()
        for sink in sinks:
            with pytest.raises(Fenced):
                await sink.turn(TOKEN)
        await office.ours()
        await alertmanager.turn(TOKEN)
        assert len(receiver.posted) == 2, "the change, and what is open"
        await office.lost()
        office.now += 60
        with pytest.raises(Fenced):
            await alertmanager.turn(TOKEN)
        assert len(receiver.posted) == 2
        for sink in sinks:
            await sink.close()


async def test_a_notice_that_was_tried_for_too_long_is_a_dead_letter_and_the_next_one_is_told(office: Desk) -> None:
    sink = Kept()
    teller = office.teller(sink, patience=Patience(give_up=0.2, first_wait=0.02, longest_wait=0.05))
    await teller.begin(TOKEN)
    await office.happen(opening("a"))
    sink.down = 1000
    [told] = await office.book.changes(None, 1)
    office.now = told.at
    assert await teller.turn(TOKEN)
    sink.down = 0
    await office.happen(opening("b"))
    await all_told(teller)
    assert sink.told == [("opened", "b")]
    [letter] = [json.loads(letter) for letter in await office.book.letters(10)]
    assert (letter["sink"], letter["reason"], letter["notice"]["alert"]["stream_id"]) == ("kept", "down", "a")


async def test_a_flood_is_one_notice_and_what_was_withheld_stays_so_until_it_escalates(office: Desk) -> None:
    sink, metrics = Kept(), Metrics()
    teller = office.teller(sink, metrics, per_minute=3, public_url="https://onset.example")
    await teller.begin(TOKEN)
    for i in range(10):
        await office.happen(opening(f"s{i}", severity="major"))
    await all_told(teller)
    assert sink.told == [("opened", "s0"), ("opened", "s1"), ("opened", "s2"), ("flood", "")]
    first = sink.notices[-1].flood
    assert first is not None
    assert (first.withheld, first.streams, first.link) == (1, ["s3"], "https://onset.example/")
    await office.happen(resolving("s0"), resolving("s5"), opening("s6", what="escalated", severity="critical"))
    await all_told(teller)
    assert sorted(sink.told[4:]) == [("opened", "s6"), ("resolved", "s0")]  # there is room for critical ones
    office.now += 61
    await all_told(teller)
    [notice] = sink.notices[6:]
    assert notice.flood is not None
    assert notice.flood.withheld == 6  # s4 to s9
    assert notice.flood.by_severity == {"major": 6}
    await office.happen(opening("s7", what="escalated", severity="critical"))
    await office.happen(resolving("s7"), resolving("s8"))
    await all_told(teller)
    assert sink.told[7:] == [("opened", "s7"), ("resolved", "s7")]
    office.now += 61
    await all_told(teller)
    assert len(sink.notices) == 9
    assert metrics.registry.get_sample_value("onset_alert_deliveries_total", {"sink": "kept", "outcome": "withheld"}) == 9


async def test_what_was_told_is_not_withheld_where_that_could_not_be_kept(office: Desk) -> None:
    sink = Kept()
    teller = office.teller(sink, per_minute=1)
    await teller.begin(TOKEN)
    await office.happen(opening("a"), opening("b"))
    for _ in range(2):
        await office.lost()
        with pytest.raises(Fenced):
            await teller.turn(TOKEN)  # not told
        await office.ours()
        sink.then = office.lost
        with pytest.raises(Fenced):
            await teller.turn(TOKEN)  # told, and not kept
        await office.ours()
        sink.then = None
        await teller.turn(TOKEN)
    await office.happen(resolving("a"), resolving("b"))
    office.now += 61
    await all_told(teller)
    assert [event for event, _ in sink.told] == ["opened", "opened", "flood", "resolved"]
    flood = sink.notices[2].flood
    assert flood is not None
    assert flood.withheld == 1


async def test_a_flood_of_minor_alerts_does_not_hide_critical_ones(office: Desk) -> None:
    sink = Kept()
    teller = office.teller(sink, per_minute=2)
    await teller.begin(TOKEN)
    for i in range(5):
        await office.happen(opening(f"m{i}"))
    await office.happen(opening("c", severity="critical"))
    await all_told(teller)
    assert sink.told == [("opened", "m0"), ("opened", "m1"), ("flood", ""), ("opened", "c")]


async def test_a_sink_hears_of_an_alert_once_it_is_as_severe_as_asked(office: Desk) -> None:
    sink, metrics = Kept(), Metrics()
    teller = office.teller(sink, metrics, least="major", per_minute=1)
    await teller.begin(TOKEN)
    await office.happen(opening("a"), resolving("a"))
    await office.happen(opening("b"))
    await office.happen(opening("b", what="escalated", severity="critical"))
    await office.happen(resolving("b"))
    await all_told(teller)
    assert sink.told == [("opened", "b"), ("resolved", "b")]
    [opened, _] = sink.notices
    assert opened.severity_before is None
    assert await office.book.withheld("kept", [opening("a").alert, opening("b").alert]) == set(), "what is over is not kept for good"
    assert metrics.registry.get_sample_value("onset_alert_deliveries_total", {"sink": "kept", "outcome": "below"}) == 2
    assert metrics.registry.get_sample_value("onset_alert_deliveries_total", {"sink": "kept", "outcome": "withheld"}) == 1


async def test_standard_output_has_one_json_line_for_each_notice(office: Desk) -> None:
    to = io.BytesIO()
    teller = office.teller(Stdout(to))
    await teller.begin(TOKEN)
    await office.happen(opening("line 3/pump"), resolving("line 3/pump"))
    await all_told(teller)
    lines = [json.loads(line) for line in to.getvalue().splitlines()]
    assert [(line["event"], line["alert"]["stream_id"], line["alert"]["status"]) for line in lines] == [
        ("opened", "line 3/pump", "open"),
        ("resolved", "line 3/pump", "resolved"),
    ]
    assert lines[0]["alert"]["summary"]


async def test_a_standard_output_that_nobody_reads_any_more_gets_dead_letters_in_the_end(office: Desk) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with io.FileIO(writes, "w") as to:
        teller = office.teller(Stdout(to), patience=Patience(give_up=0.1, first_wait=0.01, longest_wait=0.05))
        await teller.begin(TOKEN)
        await office.happen(opening("a"))
        await all_told(teller)
    [letter] = [json.loads(letter) for letter in await office.book.letters(10)]
    assert "BrokenPipeError" in letter["reason"]


def test_names_of_streams_reach_a_standard_output_of_any_encoding() -> None:
    told = (
        "import asyncio; from service.sinks.stdout import Stdout; from service.sinks.teller import Flood, Notice; "
        "asyncio.run(Stdout().tell(Notice('1', 'flood', 0.0, flood=Flood(1, 0.0, {}, ['größe'], None))))"
    )
    done = subprocess.run([sys.executable, "-c", told], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert json.loads(done.stdout)["flood"]["streams"] == ["größe"]


# ── webhook ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def verified(posted: Posted, secret: str) -> Any:
    """The content, as a receiver that follows the standard reads it."""
    signed = f"{posted.headers['webhook-id']}.{posted.headers['webhook-timestamp']}.".encode() + posted.body
    expected = base64.b64encode(hmac.new(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256).digest()).decode()
    assert hmac.compare_digest(posted.headers["webhook-signature"], f"v1,{expected}")
    return posted.json


def test_the_signature_is_that_of_the_standards_example() -> None:
    body = b'{"test": 2432232314}'
    assert (
        signature(key_of(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


async def test_the_webhook_gets_signed_notices_and_again_after_failures_under_the_same_id(office: Desk) -> None:
    with Receiver(500, 503, 429) as receiver:
        hook = Webhook(receiver.url, SECRET, clock=lambda: T0)
        teller = office.teller(hook)
        await teller.begin(TOKEN)
        await office.happen(opening("a"), resolving("a"))
        await all_told(teller)
        await teller.close()
        notices = [verified(posted, SECRET) for posted in receiver.posted]
        assert [(notice["event"], notice["alert"]["stream_id"]) for notice in notices] == [("opened", "a")] * 4 + [("resolved", "a")]
        assert len({posted.headers["webhook-id"] for posted in receiver.posted}) == 2
        assert receiver.posted[0].headers["webhook-id"] == notices[0]["id"]
        assert receiver.posted[0].headers["webhook-timestamp"] == str(int(T0))
        assert receiver.posted[0].headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", None),
        ("7", 7.0),
        ("99999999999", 60.0),
        ("soon", None),
        ("Mon, 21 Sep 2026 13:46:50 GMT", 10.0),
        ("Mon, 21 Sep 2020 13:46:50 GMT", 0),
        ("Wed, 21 Sep 2033 13:46:50 GMT", 60.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float | None) -> None:
    assert retry_after(header, 1_789_998_400.0, 60.0) == seconds


@pytest.mark.parametrize("after", ["1", "Fri, 27 Nov 2026 12:00:02 GMT"])
async def test_a_webhook_that_says_when_to_come_again_is_waited_for(office: Desk, after: str) -> None:
    noon = 1_795_780_800.0
    with Receiver(429, retry_after=after) as receiver:
        teller = office.teller(Webhook(receiver.url, SECRET, clock=lambda: noon))
        await teller.begin(TOKEN)
        await office.happen(opening("a"))
        await all_told(teller)
        await teller.close()
        first, second = receiver.posted
        assert second.at - first.at >= 1


async def test_a_webhook_that_says_to_come_again_at_once_is_not_run_down(office: Desk) -> None:
    with Receiver(*[503] * 10_000, retry_after="0") as receiver:
        teller = office.teller(Webhook(receiver.url, SECRET), patience=Patience(give_up=1.0, first_wait=0.2))
        await teller.begin(TOKEN)
        await office.happen(opening("a"))
        [told] = await office.book.changes(None, 1)
        office.now = told.at
        await all_told(teller)
        await teller.close()
        assert len(receiver.posted) <= 6


async def test_what_a_webhook_refuses_is_a_dead_letter_at_once(office: Desk) -> None:
    with Receiver(400) as receiver:
        teller = office.teller(Webhook(receiver.url, ""))
        await teller.begin(TOKEN)
        await office.happen(opening("a"))
        await office.happen(opening("b"))
        await all_told(teller)
        await teller.close()
        assert [posted.json["alert"]["stream_id"] for posted in receiver.posted] == ["a", "b"]
        assert "webhook-signature" not in receiver.posted[0].headers
    [letter] = [json.loads(letter) for letter in await office.book.letters(10)]
    assert letter["reason"].startswith("The webhook answered 400")
    assert letter["notice"]["alert"]["stream_id"] == "a"


async def test_a_webhook_that_is_not_there_is_told_when_it_comes_back(office: Desk) -> None:
    with Receiver() as gone:
        port = gone.port
    teller = office.teller(Webhook(f"http://127.0.0.1:{port}/hook", SECRET))
    await teller.begin(TOKEN)
    await office.happen(opening("a"))
    telling = asyncio.create_task(teller.turn(TOKEN))
    await asyncio.sleep(0.3)
    assert not telling.done()
    with Receiver(port=port) as receiver:
        assert await asyncio.wait_for(telling, 20)
        await teller.close()
        assert [verified(posted, SECRET)["event"] for posted in receiver.posted] == ["opened"]


async def test_a_webhook_whose_answer_cannot_be_read_is_a_dead_letter_in_the_end_and_stops_nobody(office: Desk) -> None:
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"what?\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(garble, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        teller = office.teller(Webhook(url, ""), patience=Patience(give_up=0.3, first_wait=0.01, longest_wait=0.05))
        await teller.begin(TOKEN)
        await office.happen(opening("a"))
        await all_told(teller)
        await teller.close()
    [letter] = [json.loads(letter) for letter in await office.book.letters(10)]
    assert letter["reason"].startswith("The webhook does not answer (RemoteProtocolError")


@pytest.mark.parametrize("part", [b"1\r\nx\r\n", b"100000\r\n" + b"x" * 2**20 + b"\r\n"], ids=["slowly", "fast"])
@pytest.mark.parametrize(("status", "letters"), [("200 OK", 0), ("400 Bad Request", 1)])
async def test_an_answer_without_an_end_counts_by_its_status_and_holds_up_nothing(
    office: Desk, part: bytes, status: str, letters: int
) -> None:
    answered: list[asyncio.Event] = []

    async def go_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered.append(asyncio.Event())
        ended = answered[-1]
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            while True:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        ended.set()

    async with await asyncio.start_server(go_on, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        alertmanager = Alertmanager(url, office.book, Metrics(), clock=lambda: office.now, timeout=0.5)
        sinks: list[Teller | Alertmanager] = [office.teller(Webhook(url, "", timeout=0.5)), alertmanager]
        for sink in sinks:
            await sink.begin(TOKEN)
        await office.happen(opening("a"))
        for sink in sinks:
            assert await asyncio.wait_for(sink.turn(TOKEN), 60)
            await sink.close()
        for ended in answered:
            await ended.wait()
    assert len(await office.book.letters(10)) == 2 * letters


async def test_alertmanager_is_told_again_of_what_is_open_however_much_happens_and_though_the_clock_is_set_back(office: Desk) -> None:
    with Receiver() as receiver:
        sink = Alertmanager(receiver.url, office.book, Metrics(), resend=60, clock=lambda: office.now)
        await sink.begin(TOKEN)
        for i in range(8):
            await office.happen(opening(f"s{i}"))
            assert await sink.turn(TOKEN)
            office.now += 20

        def told() -> int:
            return sum(alert["labels"]["stream"] == "s0" for posted in receiver.posted for alert in posted.json)

        assert told() == 1 + 3
        office.now -= 86_400
        assert not await sink.turn(TOKEN)
        assert told() == 1 + 3 + 1
        await sink.close()


async def test_alertmanager_hears_nothing_of_the_past_and_of_an_escalation_that_the_lower_severity_is_over(office: Desk) -> None:
    with Receiver() as receiver:
        sink = Alertmanager(receiver.url, office.book, Metrics(), resend=60, clock=lambda: office.now)
        await sink.begin(TOKEN)
        await office.happen(opening("old"), max_age=3600)
        for _ in range(2):  # nor when it is told again of all that is open
            await sink.turn(TOKEN)
            office.now += 61
        assert receiver.posted == []
        await office.happen(opening("s"))
        await sink.turn(TOKEN)
        await office.happen(opening("s", what="escalated", severity="critical"))
        await sink.turn(TOKEN)
        told = receiver.posted[-1].json
        assert {(alert["labels"]["severity"], "endsAt" in alert) for alert in told} == {("minor", True), ("critical", False)}
        await sink.close()


async def test_an_alertmanager_that_dies_between_changes_lags_by_what_waits_behind_its_telling_again(office: Desk) -> None:
    metrics = Metrics()
    with Receiver() as receiver:
        sink = Alertmanager(receiver.url, office.book, metrics, resend=60, clock=lambda: office.now)
        await sink.begin(TOKEN)
        await office.happen(opening("a"))
        await sink.turn(TOKEN)

    def lag() -> float:
        return metrics.registry.get_sample_value("onset_alert_lag_seconds", {"sink": sink.name}) or 0.0

    assert lag() == 0
    office.now += 60
    telling = asyncio.create_task(sink.run(TOKEN))
    retried = {"sink": sink.name, "outcome": "retried"}
    await until(lambda: metrics.registry.get_sample_value("onset_alert_deliveries_total", retried) or False)
    [alert] = await office.all(stream_id="a")
    await office.book.acknowledge(alert.id, Acknowledgement("anna", "", T0))
    office.now += 500
    assert lag() == 500
    await tasks.end(telling)
    assert lag() == 0
    await sink.close()


async def test_alerts_that_are_too_many_for_a_proxy_before_alertmanager_are_told_in_parts(office: Desk) -> None:
    taken: list[int] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length")]
        alerts = json.loads(await reader.readexactly(length))
        too_large = length > 10_000
        taken.extend([] if too_large else [len(alerts)])
        status = b"413 Request Entity Too Large" if too_large else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        sink = Alertmanager(url, office.book, Metrics(), clock=lambda: office.now)
        await sink.begin(TOKEN)
        await office.happen(*(opening(f"s{i}") for i in range(100)))
        assert await sink.turn(TOKEN)
        await sink.close()
    assert sum(taken) == 2 * 100  # at once, and again as of how things stand
    assert await office.book.letters(1) == []


@pytest.mark.parametrize(("between", "ends"), [(0, [False, False]), (AT_ONCE, [True, False, True, False])])
async def test_alertmanager_is_not_told_that_an_alert_ends_with_the_one_before_it_however_many_there_are(
    office: Desk, between: int, ends: list[bool]
) -> None:
    with Receiver() as receiver:
        sink = Alertmanager(receiver.url, office.book, Metrics(), resend=60, clock=lambda: office.now)
        await sink.begin(TOKEN)
        await office.happen(opening("s"), resolving("s"), *(opening(f"other-{i}", started_at=T0 + 1) for i in range(between)))
        await office.happen(opening("s", started_at=T0 + 2))
        while await sink.turn(TOKEN):
            pass
        told = [alert for posted in receiver.posted for alert in posted.json if alert["labels"]["stream"] == "s"]
        assert ["endsAt" in alert for alert in told] == ends  # at once, and again as of how things stand
        await sink.close()


@pytest.mark.parametrize(
    ("stream_id", "series"),
    [
        ('load{instance="a:9100",job="node"}', {"for": "load", "instance": "a:9100", "job": "node"}),
        (
            'load{for="w",model="x",severity="y",stream="z"}',
            {"for": "load", "exported_for": "w", "exported_model": "x", "exported_severity": "y", "exported_stream": "z"},
        ),
        (
            'load{exported_severity="y",severity="z"}',
            {"for": "load", "exported_severity": "y", "exported_exported_severity": "z"},
        ),
        (
            'load{a="q\\"\\n","größe"="1"}',
            {"for": "load", "a": 'q"\n'},
        ),  # an Alertmanager that does not take such a name would refuse all alerts
        ('{a="1"}', {"a": "1"}),
        (bounded('load{a="' + "x" * 300 + '"}'), {}),
        ("line 3/pump", {}),
        ("pump", {}),
        ("pump{", {}),
    ],
)
def test_the_alert_of_a_series_has_its_labels_to_route_and_silence_by(stream_id: str, series: dict[str, str]) -> None:
    ours = {"alertname": "OnsetAnomaly", "stream": stream_id, "model": "m", "severity": "minor"}
    assert labels("OnsetAnomaly", stream_id, "m", "minor") == series | ours


async def test_a_clock_that_is_set_back_withholds_nothing(office: Desk) -> None:
    sink = Kept()
    teller = office.teller(sink, per_minute=2)
    await teller.begin(TOKEN)
    await office.happen(*(opening(name) for name in "abc"))
    await all_told(teller)
    office.now -= 3600
    await office.happen(opening("d"))
    await all_told(teller)
    assert [event for event, _ in sink.told] == ["opened", "opened", "flood", "opened"]
    assert sink.told[-1] == ("opened", "d")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"alerts_webhook": "ftp://x"}, "ONSET_ALERTS_WEBHOOK has 'ftp://x"),
        ({"alerts_alertmanagers": "alertmanager:9093"}, "ONSET_ALERTS_ALERTMANAGERS"),
        ({"alerts_alertmanagers": "http://a:9093, http://a:9093"}, "the same Alertmanager twice"),
        ({"alerts_alertmanagers": "http://a:9093/?tenant=b"}, "with a query"),
        ({"alerts_webhook": "http://[::1/x"}, "cannot be read as an address"),
        ({"alerts_webhook": "http://x/\x01"}, "cannot be read as an address"),
        ({"alerts_webhook": "http://x", "alerts_webhook_secret": "short"}, "has 5 bytes"),
        ({"alerts_webhook": "http://x", "alerts_webhook_secret": "whsec_!!"}, "no base64"),
        ({"alerts_webhook": "http://x", "alerts_webhook_secret": "whsec_größe"}, "no base64"),
        ({"alerts_webhook": "http://x", "alerts_webhook_secret_file": "/dev/null"}, "is empty"),
        ({"alerts_webhook": "http://x", "alerts_webhook_secret_file": "/nonexistent/secret"}, "cannot be read"),
        ({"alerts_webhook": "http://x", "alerts_webhook_secret": SECRET, "alerts_webhook_secret_file": "x"}, "both set"),
    ],
)
def test_settings_that_cannot_be_used_are_named(office: Desk, setting: dict[str, Any], says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        declared(Settings(**setting), office.book, Metrics())


def test_alertmanagers_behind_one_address_are_told_apart_by_their_paths(office: Desk) -> None:
    settings = Settings(alerts_alertmanagers="https://gateway/north, https://gateway/south/")
    assert [sink.name for sink in declared(settings, office.book, Metrics())] == [
        "alertmanager gateway/north",
        "alertmanager gateway/south",
    ]


def test_a_secret_is_read_from_a_file_and_shown_nowhere(office: Desk, tmp_path: Any) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    settings = Settings(alerts_webhook="http://x", alerts_webhook_secret_file=file, alerts_stdout=True)
    assert [sink.name for sink in declared(settings, office.book, Metrics())] == ["stdout", "webhook"]
    assert SECRET not in repr(Settings(alerts_webhook="http://x", alerts_webhook_secret=SecretStr(SECRET)))
