"""Requests that are answered outside of ASGI: the same answers, in the same order, to the last byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from service.api import OUTCOMES
from service.detector import Detector
from service.writing import Answered, protocol
from tests.test_api import Client, door, event
from tests.test_writing import Counting, Ordinary, Reader, connected
from tests.times import until

OK = [(b"content-length", b"6")]
FAR_AHEAD = 4_000_000_000


def post(body: bytes, *headers: str, path: str = "/v1/events") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def by_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": OK})
    await send({"type": "http.response.body", "body": b"asgi.\n"})


class Directly:
    """Takes what begins with "d", and answers when it is told to."""

    def __init__(self) -> None:
        self.begun: list[Answered] = []

    def __call__(self, scope: Any, content: bytearray, answered: Answered) -> bool:
        if not content.startswith(b"d"):
            return False
        self.begun.append(answered)
        return True

    def answer(self) -> None:
        self.begun.pop(0)(200, OK, b"direct")


async def answers(reader: Reader, count: int) -> list[bytes]:
    """The last bytes of so many."""
    await until(lambda: b"".join(reader.reads).count(b"HTTP/1.1 200 OK\r\n") == count and reader.reads[-1][-6:] in (b"asgi.\n", b"direct"))
    return [part[-6:] for part in b"".join(reader.reads).split(b"HTTP/1.1 200 OK\r\n")[1:]]


async def test_what_is_all_there_is_offered_and_the_rest_is_asgis() -> None:
    direct = Directly()
    async with connected(protocol(Counting(), Ordinary.room, direct), by_asgi) as (transport, reader):
        transport.write(post(b"direct"))
        await until(lambda: len(direct.begun) == 1)
        direct.answer()
        assert await answers(reader, 1) == [b"direct"]
        transport.write(post(b"not"))
        assert await answers(reader, 2) == [b"direct", b"asgi.\n"]
        assert direct.begun == []


async def test_a_small_body_that_comes_after_its_head_is_waited_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.writing.HELD_SECONDS", 60.0)
    direct = Directly()
    async with connected(protocol(Counting(), Ordinary.room, direct), by_asgi) as (transport, reader):
        request = post(b"direct")
        for cut in (3, len(request) - 6, len(request) - 1):
            transport.write(request[:cut])
            await asyncio.sleep(0.01)
            transport.write(request[cut:])
            await until(lambda: len(direct.begun) == 1 or len(reader.reads) > 0)
            direct.answer()
            assert await answers(reader, 1) == [b"direct"]
            reader.reads.clear()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 6\r\n",
        b"Content-Length: 16385\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 6\r\nExpect: 100-continue\r\n",
    ],
)
async def test_one_that_does_not_come_or_is_long_or_waits_to_be_asked_for_is_asgis_to_wait_for(head: bytes) -> None:
    begun = asyncio.Event()

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await by_asgi(scope, receive, send)

    direct = Directly()
    async with connected(protocol(Counting(), Ordinary.room, direct), noting) as (transport, reader):
        transport.write(b"POST /v1/events HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n")
        await asyncio.wait_for(begun.wait(), 20)
        if b": 6" in head:
            transport.write(b"direct")
            await until(lambda: b"".join(reader.reads).endswith(b"asgi.\n"))
        assert direct.begun == []


async def test_who_leaves_before_the_body_came_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.writing.HELD_SECONDS", 60.0)
    begun, direct = [], Directly()

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope)

    async with connected(protocol(Counting(), Ordinary.room, direct), noting) as (transport, _):
        transport.write(post(b"direct")[:-1])
        await asyncio.sleep(0.01)
        transport.abort()
        await asyncio.sleep(0.2)
        assert begun == []
        assert direct.begun == []


async def test_requests_ahead_of_an_answer_keep_their_order() -> None:
    direct = Directly()
    async with connected(protocol(Counting(), Ordinary.room, direct), by_asgi) as (transport, reader):
        transport.write(post(b"direct") + post(b"not") + post(b"d"))
        await until(lambda: len(direct.begun) == 1)
        await asyncio.sleep(0.05)
        assert reader.reads == []
        direct.answer()
        assert await answers(reader, 3) == [b"direct", b"asgi.\n", b"asgi.\n"]


async def test_a_connection_that_is_to_be_closed_is_closed_after_the_answer() -> None:
    direct = Directly()
    async with connected(protocol(Counting(), Ordinary.room, direct), by_asgi) as (transport, reader):
        transport.write(post(b"direct", "Connection: close"))
        await until(lambda: len(direct.begun) == 1)
        direct.answer()
        await asyncio.wait_for(reader.lost.wait(), 20)
        head, _, body = b"".join(reader.reads).partition(b"\r\n\r\n")
        assert body == b"direct"
        assert b"\r\nconnection: close" in head


async def test_an_answer_to_a_client_that_left_is_thrown_away(caplog: pytest.LogCaptureFixture) -> None:
    direct = Directly()
    async with connected(protocol(Counting(), Ordinary.room, direct), by_asgi) as (transport, _):
        transport.write(post(b"direct"))
        await until(lambda: len(direct.begun) == 1)
        transport.abort()
        await asyncio.sleep(0.1)
        direct.answer()
    assert caplog.records == []


@pytest.fixture
async def behind(tiny_detector: Detector) -> AsyncIterator[Client]:
    async with door(tiny_detector) as client:
        yield client


class Count:
    """How many requests are taken."""

    def __init__(self, client: Client) -> None:
        self._begin, self.taken = client.app.begin, 0

    def __call__(self, scope: Any, content: bytearray, answered: Answered) -> bool:
        took = self._begin(scope, content, answered)
        self.taken += took
        return took


async def exchange(client: Client, requests: Iterable[bytes]) -> tuple[list[bytes], int]:
    """The answers to one request after the other, without their dates, and how many did not go through ASGI."""
    count = Count(client)
    found = []
    async with connected(protocol(Counting(), Ordinary.room, count), client.app) as (transport, reader):
        for request in requests:
            reader.reads.clear()
            transport.write(request)
            await until(lambda: _whole(b"".join(reader.reads)))
            head, _, body = b"".join(reader.reads).partition(b"\r\n\r\n")
            found.append(b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"date:")) + body)
    return found, count.taken


def _whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    return bool(found) and len(body) == int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])


NOW = 1_700_000_100
BODIES = [
    *(event(value=i % 7 / 3, timestamp=1_700_000_000 + i) for i in range(12)),
    event(value=None, timestamp=NOW),
    event(timestamp=1),  # late
    event("b", sequence=5, event_id="x", timestamp=NOW),
    event("b", sequence=5, event_id="x", timestamp=NOW),  # a duplicate
    event("b", sequence=3, timestamp=NOW),  # late
    event("b", sequence=4, timestamp=FAR_AHEAD),
    event("ü\n", timestamp=NOW),
    event("é", value=1e300, timestamp=NOW),
    event("é", value=-0.0, timestamp="2026-11-27T12:00:00.25Z"),
    {"stream_id": "c", "values": {"wrong": 1}},
    {"stream_id": "c", "value": 1},
    {"values": {"value": 1}},
    [event("d", timestamp=NOW)],
    [],
    7,
]


async def test_both_ways_give_the_same_answers_and_counts(tiny_detector: Detector) -> None:
    given = []
    for more in ((), ("X-Request-ID: one",)):  # which goes through ASGI
        async with door(tiny_detector) as client:
            contents = [json.dumps(body).encode() for body in BODIES] + [b"{", b"", b" \n7", b"[1"]
            found, taken = await exchange(client, [post(content, "Content-Type: application/json", *more) for content in contents])
            value = client.metrics.registry.get_sample_value
            counts = [value("onset_events_total", {"door": "http", "outcome": outcome}) for outcome in OUTCOMES]
            given.append((found, counts))
            assert (taken > 15) == (more == ()), taken
    assert given[0][0] == given[1][0]
    assert given[0][1] == given[1][1]


PLAIN = json.dumps(event("p")).encode()


@pytest.mark.parametrize(
    ("request_", "taken"),
    [
        (post(PLAIN), 1),
        (
            post(
                PLAIN,
                "Content-Type: application/json; charset=utf-8",
                "Accept: application/json, */*",
                "User-Agent: x",
                "X-Scope-OrgID: one",
            ),
            1,
        ),
        (post(PLAIN, path="/v1/events?model=tiny"), 1),
        (post(PLAIN, path="/v1/events?model=none"), 0),
        (post(PLAIN, path="/v1/events?modle=tiny"), 0),
        (post(PLAIN, path="/v1/events?top_contributors=0"), 0),
        (post(PLAIN, path="/v1/streams/p/events"), 0),
        (post(PLAIN, "Accept: application/x-msgpack"), 0),
        (post(PLAIN, "Content-Type: application/x-ndjson"), 0),
        (post(PLAIN, "Content-Type: text/plain"), 0),
        (post(PLAIN, "Content-Encoding: gzip"), 0),
        (post(PLAIN, "Idempotency-Key: k"), 0),
        (post(PLAIN, "Origin: http://elsewhere"), 0),
        (post(PLAIN, "Sec-Fetch-Site: cross-site"), 0),
        (post(PLAIN, "X-Forwarded-For: 10.0.0.1"), 0),
        (post(PLAIN, "X-Scope-OrgID: ü"), 0),
        (post(b"[" + PLAIN + b"]"), 0),
        (post(json.dumps(event("p" * 100_000)).encode()), 0),
    ],
)
async def test_only_what_is_plain_is_taken(behind: Client, request_: bytes, taken: int) -> None:
    assert (await exchange(behind, [request_]))[1] == taken


async def test_what_is_taken_is_refused_as_it_is_elsewhere(behind: Client) -> None:
    [ours], _ = await exchange(behind, [post(PLAIN)])
    assert ours.startswith(b"HTTP/1.1 200 OK")
    behind.store.down = True
    for buggy in (False, True):
        behind.store.buggy = buggy
        (plain, other), taken = await exchange(
            behind, [post(json.dumps(event("q")).encode(), *more) for more in ((), ("X-Request-ID: one",))]
        )
        assert taken == 1
        assert plain.split(b"reference")[0] == other.split(b"reference")[0]
        assert plain.startswith(b"HTTP/1.1 500" if buggy else b"HTTP/1.1 503")


async def test_it_counts_as_in_flight_while_it_waits_and_not_after(tiny_detector: Detector) -> None:
    async with door(tiny_detector, queue=1) as client:
        client.store.gate.clear()
        held = asyncio.create_task(exchange(client, [post(json.dumps(event("a")).encode())]))
        await asyncio.sleep(0.2)
        waits = asyncio.create_task(exchange(client, [post(json.dumps(event("a")).encode())]))
        await asyncio.sleep(0.2)
        [refused], taken = await exchange(client, [post(json.dumps(event("b")).encode())])
        assert taken == 1
        assert refused.startswith(b"HTTP/1.1 429")
        assert b"retry-after" in refused
        client.store.gate.set()
        for one in (held, waits):
            assert (await one)[0][0].startswith(b"HTTP/1.1 200")
        [after], _ = await exchange(client, [post(json.dumps(event("b")).encode())])
        assert after.startswith(b"HTTP/1.1 200")
