"""The server's side of a connection: a response is written at once, whole, and in order, and not kept for ever for who does not read it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.testing import capture_logs

from service.writing import AHEAD_REQUESTS, AT_ONCE_BYTES, HEAD_BYTES, SPARE, Halves, Protocol, Room, Unread, protocol
from tests.times import until

LARGE = 30_000_000
"""Bytes: more than the kernel takes of an answer for a client that does not read."""
REQUEST = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers /n with n bytes in pieces of 50,000."""
    assert scope["type"] == "http"
    size = int(scope["path"][1:])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    for start in range(0, max(size, 1), 50_000):
        rest = size - start
        await send({"type": "http.response.body", "body": b"x" * min(rest, 50_000), "more_body": rest > 50_000})


async def at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """The same in one piece."""
    size = int(scope["path"][1:])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"x" * size})


class Reader(asyncio.Protocol):
    """Keeps what each read brought."""

    def __init__(self) -> None:
        self.reads: list[bytes] = []
        self.lost = asyncio.Event()
        self.came = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.reads.append(data)
        self.came.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()

    async def until(self, size: int) -> bytes:
        while len(content := b"".join(self.reads)) < size:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 20)
        return content


class Counting(Unread):
    """Soon out of patience; it counts whom it let go."""

    look_seconds = 0.02

    def __init__(self, unread_seconds: float = 3600, most_bytes: int = 10**9, pressed_seconds: float = 3600) -> None:
        super().__init__(most_bytes, self._count, self._count_freed)
        self.unread_seconds, self.pressed_seconds = unread_seconds, pressed_seconds
        self.gone = self.freed = 0

    def _count(self) -> None:
        self.gone += 1

    def _count_freed(self) -> None:
        self.freed += 1

    @property
    def waiting(self) -> int:
        """Connections with something unread."""
        return len(self._marks)

    def more_than(self, count: int) -> bool:
        return self.waiting > count

    @property
    def bytes(self) -> int:
        """Of them all."""
        return sum(connection.unread_bytes for connection in self._marks)


class Ordinary(Protocol):
    unread = Counting()
    room = Room(1000, lambda: None)


class Impatient(Ordinary):
    head_seconds = 0.3


@asynccontextmanager
async def connected(http: type[Protocol] = Ordinary, app: ASGIApp = echo) -> AsyncIterator[tuple[asyncio.Transport, Reader]]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, ws="none", lifespan="off", log_config=None))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn says it in no other way
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    transport, reader = await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", port)
    yield transport, reader
    transport.close()
    server.should_exit = True
    await running


def head(size: int) -> int:
    """Bytes of the head of an answer of that size."""
    return len(b"HTTP/1.1 200 OK\r\n\r\n") + len(b"date: Thu, 26 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n" % size)


async def test_head_and_body_arrive_together() -> None:
    def reads(port: int) -> list[int]:
        """Of a client that does not share the server's thread, and so sees every single write, sooner or later."""
        with socket.create_connection(("127.0.0.1", port)) as client:
            sizes = []
            for _ in range(300):
                client.sendall(REQUEST % 300)
                sizes.append(len(client.recv(10_000)))
                if sizes[-1] < 300:
                    break
        return sizes

    async with connected() as (transport, _):
        sizes = await asyncio.to_thread(reads, transport.get_extra_info("peername")[1])
        assert set(sizes) == {head(300) + 300}


async def test_a_long_response_arrives_whole() -> None:
    size = 20 * AT_ONCE_BYTES + 7
    async with connected() as (transport, reader):
        transport.write(REQUEST % size)
        content = await reader.until(head(size) + size)
        assert content[-size:] == b"x" * size


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with connected() as (transport, reader):
        transport.write(b"".join(REQUEST % size for size in (1, 60_001, 3)))
        content = await reader.until(head(1) + head(60_001) + head(3) + 60_005)
        lengths = [int(part.split(b"\r\n")[0]) for part in content.split(b"content-length: ")[1:]]
        assert lengths == [1, 60_001, 3]


async def test_the_last_response_of_a_connection_is_written_before_it_closes() -> None:
    async with connected() as (transport, reader):
        transport.write((REQUEST % 5).replace(b"Host", b"Connection: close\r\nHost"))
        await asyncio.wait_for(reader.lost.wait(), 20)
        assert b"".join(reader.reads).endswith(b"\r\n\r\nxxxxx")


async def test_a_client_that_left_is_no_trouble_to_the_next() -> None:
    async with connected() as (transport, reader):
        port = transport.get_extra_info("peername")[1]
        gone, _ = await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", port)
        gone.write(REQUEST % 1_000_000)
        gone.abort()
        transport.write(REQUEST % 9)
        assert (await reader.until(head(9) + 9)).endswith(b"x" * 9)


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /1 HTTP/1.1\r\nHost: a\r\nx-long: ",
        b"GET /",
        b"GET /1 HTTP/1.1\r\n",
        b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nx: ",
    ],
)
async def test_a_head_without_end_is_refused_before_it_takes_memory(endless: bytes) -> None:
    piece = b"x-y: " + b"z" * 1000 + b"\r\n" if endless.endswith(b"\r\n") else b"z" * 1000
    async with connected() as (transport, reader):
        transport.write(endless + piece * (HEAD_BYTES // 1000 - 1))
        await asyncio.sleep(0.05)
        assert not reader.lost.is_set()
        for _ in range(1000):
            if reader.lost.is_set():
                break
            transport.write(piece)
            await asyncio.sleep(0.001)
        await asyncio.wait_for(reader.lost.wait(), 20)
        assert b" 431 " in b"".join(reader.reads)


async def test_what_ends_a_chunked_body_has_an_end_too() -> None:
    async with connected() as (transport, reader):
        transport.write(b"POST /1 HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx-y: ")
        for _ in range(1000):
            if reader.lost.is_set():
                break
            transport.write(b"z" * 1000)
            await asyncio.sleep(0.001)
        await asyncio.wait_for(reader.lost.wait(), 20)


async def test_a_body_of_small_chunks_is_no_long_head() -> None:
    async with connected() as (transport, reader):
        transport.write(
            b"POST /9 HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 2 * HEAD_BYTES + b"0\r\n\r\n"
        )
        assert (await reader.until(head(9) + 9)).endswith(b"x" * 9)
        transport.write(REQUEST % 8)
        assert (await reader.until(head(9) + head(8) + 17)).endswith(b"x" * 8)


@pytest.mark.parametrize("begun", [b"", b"GET /1 HTT", b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\n"])
async def test_who_does_not_finish_a_head_is_left(begun: bytes) -> None:
    async with connected(Impatient) as (transport, reader):
        transport.write(begun)
        for _ in range(200):
            if reader.lost.is_set():
                break
            transport.write(b"x: y\r\n" if begun.endswith(b"\r\n") else b"")
            await asyncio.sleep(0.05)
        assert reader.lost.is_set()


async def mirror(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body it got, or the path where there was none."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    body = body or scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("pieces", [1, 2])
async def test_what_follows_a_chunked_body_is_no_header(pieces: int) -> None:
    async def names(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        body = b" ".join(name for name, _ in scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    trailed = b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nContent-Encoding: gzip\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n"
    request = b"POST /a HTTP/1.1\r\nHost: a\r\n" + trailed
    async with connected(app=names) as (transport, reader):
        for sent in (request, request):
            cut = len(sent) if pieces == 1 else sent.index(b"Content-Encoding")
            transport.write(sent[:cut])
            await asyncio.sleep(0.05)
            transport.write(sent[cut:])
            await until(lambda: b"".join(reader.reads).endswith(b"\r\n\r\nhost transfer-encoding"))
            reader.reads.clear()


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
"""As Java's HttpClient has it by default, in a plain http request."""
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("pieces", [1, 2, 1000])
async def test_a_request_that_offers_another_protocol_is_read_whole_and_nothing_of_its_body_as_a_request(pieces: int) -> None:
    requests = [
        b"POST /a HTTP/1.1\r\nHost: a\r\n" + OFFER + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        b"GET /offered HTTP/1.1\r\nHost: a\r\n" + OFFER + b"\r\n",
        b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + OFFER + b"\r\n3\r\nabc\r\n0\r\n\r\n",
        b"GET /last HTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    async with connected(app=mirror) as (transport, reader):
        everything = b"".join(requests)
        step = -(-len(everything) // pieces)
        for start in range(0, len(everything), step):
            transport.write(everything[start : start + step])
            await asyncio.sleep(0.001)
        await until(lambda: b"".join(reader.reads).endswith(b"/last"))
        answers = b"".join(reader.reads).split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert [answer.partition(b"\r\n\r\n")[2] for answer in answers] == [SMUGGLED, b"/offered", b"abc", b"/last"]


async def test_a_tunnel_is_refused() -> None:
    async with connected(app=mirror) as (transport, reader):
        transport.write(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n" + OFFER + b"\r\n")
        await asyncio.wait_for(reader.lost.wait(), 20)
        assert b"".join(reader.reads).startswith(b"HTTP/1.1 400 ")


async def test_an_answer_may_take_longer_than_a_head() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await echo(scope, receive, send)

    async with connected(Impatient, slow) as (transport, reader):
        transport.write(b"POST /5 HTTP/1.1\r\nHost: a\r\ncontent-length: 3\r\n\r\nabc")
        await asyncio.sleep(1)
        release.set()
        assert (await reader.until(head(5) + 5)).endswith(b"x" * 5)


async def another(transport: asyncio.Transport) -> tuple[asyncio.Transport, Reader]:
    """One more client of the same server."""
    return await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", transport.get_extra_info("peername")[1])


@pytest.mark.parametrize("request_", [REQUEST, REQUEST.replace(b"Host", b"Connection: close\r\nHost")])
async def test_who_reads_nothing_of_an_answer_is_let_go_and_others_are_answered(request_: bytes) -> None:
    unread = Counting(unread_seconds=0.3)
    async with connected(protocol(unread, Ordinary.room), at_once) as (deaf, reader):
        deaf.pause_reading()
        deaf.write(request_ % LARGE)
        await until(lambda: unread.waiting)
        transport, other = await another(deaf)
        transport.write(REQUEST % 9)
        await other.until(9)
        await until(lambda: unread.gone)
        assert unread.waiting == 0
        await until(lambda: unread.freed)
        deaf.resume_reading()
        await asyncio.wait_for(reader.lost.wait(), 20)
        assert len(b"".join(reader.reads)) < LARGE
        transport.write(REQUEST % 9)
        await other.until(18)
        transport.close()


async def test_what_is_left_of_an_answer_is_known_however_little_it_is() -> None:
    unread = Counting()

    async def until_full(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not unread.waiting:
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    async with connected(protocol(unread, Ordinary.room), until_full) as (transport, reader):
        transport.pause_reading()
        transport.write(REQUEST % 1)
        await until(lambda: unread.waiting)
        assert 0 < unread.bytes < 2000
        transport.resume_reading()
        await until(lambda: not unread.waiting)
        assert not reader.lost.is_set()


async def test_who_reads_slowly_gets_all_of_an_answer() -> None:
    unread = Counting(unread_seconds=1)
    async with connected(protocol(unread, Ordinary.room), at_once) as (transport, reader):
        transport.write(REQUEST % LARGE)
        began, read = asyncio.get_running_loop().time(), -1
        while len(b"".join(reader.reads)) > read:
            read = len(b"".join(reader.reads))
            transport.pause_reading()
            await asyncio.sleep(0.3)
            transport.resume_reading()
            await reader.until(min(read + LARGE // 6, head(LARGE) + LARGE))
        assert asyncio.get_running_loop().time() - began > unread.unread_seconds
        assert (read, unread.gone) == (head(LARGE) + LARGE, 0)


async def test_while_too_much_is_unread_those_that_do_not_read_go_sooner_the_first_of_them_first() -> None:
    unread = Counting(most_bytes=LARGE, pressed_seconds=0.3)
    async with connected(protocol(unread, Ordinary.room), at_once) as (first, reader):
        clients = [(first, reader), await another(first)]
        for transport, _ in clients:
            before = unread.waiting
            transport.pause_reading()
            transport.write(REQUEST % LARGE)
            await until(partial(unread.more_than, before))
        await until(lambda: unread.gone)
        await asyncio.sleep(0.5)
        assert (unread.gone, unread.waiting) == (1, 1), "what is left is not too much"
        for transport, _ in clients:
            transport.resume_reading()
        await asyncio.wait_for(reader.lost.wait(), 20)
        await clients[1][1].until(head(LARGE) + LARGE)
        clients[1][0].close()


async def test_of_several_requests_the_next_is_not_begun_before_the_answer_is_read() -> None:
    begun: list[str] = []

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        await at_once(scope, receive, send)

    unread = Counting()
    async with connected(protocol(unread, Ordinary.room), noting) as (transport, reader):
        transport.pause_reading()
        transport.write(REQUEST % LARGE + REQUEST % 1 + REQUEST % 2)
        await until(lambda: unread.waiting)
        await asyncio.sleep(0.2)
        assert begun == [f"/{LARGE}"]
        transport.resume_reading()
        content = await reader.until(head(LARGE) + LARGE + head(1) + 1 + head(2) + 2)
        assert content.endswith(b"xx")
        assert begun == [f"/{LARGE}", "/1", "/2"]


async def test_the_request_that_is_answered_learns_that_its_client_left_also_when_others_follow_it() -> None:
    began, told = asyncio.Event(), asyncio.Event()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        began.set()
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with connected(app=waiting) as (transport, _):
        transport.write(REQUEST % 1 + REQUEST % 2)
        await asyncio.wait_for(began.wait(), 20)
        transport.abort()
        await asyncio.wait_for(told.wait(), 20)


async def test_who_sends_very_many_requests_ahead_of_their_answers_is_let_go() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await echo(scope, receive, send)

    async with connected(app=slow) as (transport, reader):
        transport.write(REQUEST % 1 * (AHEAD_REQUESTS + 1))
        await asyncio.sleep(0.1)
        assert not reader.lost.is_set()
        other, gone = await another(transport)
        other.write(REQUEST % 1 * (AHEAD_REQUESTS + 2))
        await asyncio.wait_for(gone.lost.wait(), 20)
        release.set()
        await reader.until((head(1) + 1) * (AHEAD_REQUESTS + 1))


async def test_that_the_service_itself_stood_still_is_held_against_no_client() -> None:
    unread = Counting(unread_seconds=0.5)
    async with connected(protocol(unread, Ordinary.room), at_once) as (transport, reader):
        transport.pause_reading()
        transport.write(REQUEST % LARGE)
        await until(lambda: unread.waiting)
        time.sleep(1)  # noqa: ASYNC251 - the server's loop is this one
        transport.resume_reading()
        await reader.until(head(LARGE) + LARGE)
        assert unread.gone == 0


async def test_a_stop_waits_for_bodies_that_still_come_and_for_no_others() -> None:
    read = asyncio.Event()

    async def length(scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
            read.set()
        body = b"%d" % size
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def piece(transport: asyncio.Transport, content: bytes) -> None:
        read.clear()
        transport.write(content)
        await asyncio.wait_for(read.wait(), 20)

    connections: set[Protocol] = set()

    class Known(Ordinary):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.add(self)

    begun = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
    halves = Halves(connections)
    async with connected(Known, length) as (coming, reader), connected(Known, length) as (stuck, left):
        await piece(coming, begun + b"1")
        await piece(stuck, begun + b"1")
        halves.look()
        for more in (b"2", b"3"):
            await piece(coming, more)
            halves.look()
        await asyncio.wait_for(left.lost.wait(), 20)
        assert b"".join(left.reads).startswith(b"HTTP/1.1 503 ")
        await piece(coming, b"4")
        assert (await reader.until(head(1) + 1)).endswith(b"\r\n\r\n4")
        halves.look()
        halves.look()
        assert not reader.lost.is_set()


async def test_beyond_the_room_new_connections_are_refused_and_told_of_once_while_old_ones_and_probes_are_answered() -> None:
    refused: list[int] = []

    async def ok(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    class Small(Ordinary):
        room = Room(2, lambda: refused.append(1))

    async def ask(port: int, path: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
        answer = await asyncio.wait_for(reader.read(), 20)  # to the end: it is closed
        writer.close()
        await writer.wait_closed()
        return answer

    with capture_logs() as logs:
        async with connected(Small, ok) as (first, reader):
            port = first.get_extra_info("peername")[1]
            second = await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", port)
            for transport, reads in ((first, reader), second):
                transport.write(REQUEST % 1)
                assert (await reads.until(1)).startswith(b"HTTP/1.1 200 ")
            for _ in range(3):
                answer = await ask(port, b"/v1/streams")
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"urn:onset:too-many-connections" in answer
            assert (await ask(port, b"/health/live")).startswith(b"HTTP/1.1 200 ")
            assert (await ask(port, b"/metrics")).startswith(b"HTTP/1.1 200 ")
            first.write(REQUEST % 1)
            await reader.until(2 * len(reader.reads[0]))
            second[0].close()

            async def answered() -> bool:
                return (await ask(port, b"/v1/streams")).startswith(b"HTTP/1.1 200 ")

            await until(answered)
    assert len(refused) >= 3
    assert [entry["event"] for entry in logs] == ["connections_refused"]


def test_there_is_room_for_as_many_connections_as_the_process_may_open_files() -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000))"
    code = f"{limited}; from service.writing import most_connections; print(most_connections())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == 1000 - SPARE
