"""The server's side of a connection: a response is written at once, whole, and in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import Receive, Scope, Send

from service.writing import AT_ONCE_BYTES, Protocol

REQUEST = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers /n with n bytes in pieces of 50,000."""
    assert scope["type"] == "http"
    size = int(scope["path"][1:])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    for start in range(0, max(size, 1), 50_000):
        rest = size - start
        await send({"type": "http.response.body", "body": b"x" * min(rest, 50_000), "more_body": rest > 50_000})


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


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.Transport, Reader]]:
    server = uvicorn.Server(uvicorn.Config(echo, port=0, http=Protocol, ws="none", lifespan="off", log_config=None))
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
