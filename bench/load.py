"""A lean HTTP/1.1 load generator on raw asyncio sockets, one request in flight on each connection.

    drive   closed loops: each connection waits for its answer and sends again; latencies are those of clients that wait
    offer   an open loop: requests are due at a stated rate, whatever the server does; a latency counts from when the request was due

It shares the machine with the server, so it must cost little: requests are made from templates by `bytes.replace`, responses are only
split at their length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.report import Latency

PATIENCE_SECONDS = 30.0

Request = Callable[[], bytes]
"""Makes the next request's bytes, head and body."""


@dataclass
class Tally:
    """What came back within the measured time."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    @property
    def latency(self) -> Latency:
        return Latency.of(self.latencies)

    def add(self, other: Tally) -> None:
        """Count another load of the same server as one with this."""
        self.seconds += other.seconds
        self.latencies += other.latencies
        self.failures += other.failures


@dataclass
class Offered:
    """What became of requests that were due at a rate, whatever the server did."""

    accepted: list[tuple[float, float]] = field(default_factory=list)
    """When each that was answered with 200 was due, by `time.perf_counter`, and how long it took from then."""
    refused: int = 0
    """Answered with 429."""
    hintless: int = 0
    """429 without Retry-After."""
    failed: int = 0
    """Any other answer, or none."""
    unsent: int = 0
    """Due while every connection waited for an answer."""
    ended: float = 0.0
    """When the last one was sent, by `time.perf_counter`."""

    @property
    def offered(self) -> int:
        return len(self.accepted) + self.refused + self.failed + self.unsent

    @property
    def latency(self) -> Latency:
        return Latency.of([seconds for _, seconds in self.accepted])


def post(path: str, body: bytes, content_type: str, tenant: str = "") -> bytes:
    """A request's bytes; `tenant` as Mimir and Loki name it."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}X-Scope-OrgID: {tenant}\r\n\r\n".encode() + body if tenant else f"{head}\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """Sends a request, reads the whole answer, says so by `answered`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._missing = -1  # bytes of the body still to come; -1 = the head is not complete
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._missing >= 0:
            self._missing -= len(data)
        else:
            self._buffer += data
            self._read_head()
        if self._missing == 0:
            self._missing = -1
            self.answered(int(self._head[9:12]), self._head)

    def answered(self, status: int, head: bytes) -> None:
        raise NotImplementedError

    def _read_head(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        self._head = bytes(self._buffer[:end]).lower()
        at = self._head.find(b"content-length:")
        if at < 0:
            raise RuntimeError("The server's answer has no Content-Length; this generator reads no chunks.")
        length = int(self._head[at + 15 :].split(b"\r\n", 1)[0])
        self._missing = length - (len(self._buffer) - end - 4)
        self._buffer.clear()


class _Loop(_Connection):
    """Sends again at once, until told to stop."""

    def __init__(self, make: Request, tally: Tally, window: tuple[float, float]) -> None:
        super().__init__()
        self._make, self._tally = make, tally
        self._from, self._until = window
        self._sent_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._tally.failures += 1
            self.done.set_result(None)

    def answered(self, status: int, head: bytes) -> None:
        now = time.perf_counter()
        if self._from <= now <= self._until:
            if status == 200:
                self._tally.latencies.append(now - self._sent_at)
            else:
                self._tally.failures += 1
        if now >= self._until:
            self.done.set_result(None)
            self.transport.close()
        else:
            self._send()

    def _send(self) -> None:
        request = self._make()
        self._sent_at = time.perf_counter()
        self.transport.write(request)


async def drive(port: int, make: Request, *, connections: int, seconds: float, warmup: float = 1.0) -> Tally:
    """Load `port` on this machine for `warmup` + `seconds`; only what is answered after the warm-up counts."""
    loop = asyncio.get_running_loop()
    begin = time.perf_counter() + warmup
    tally = Tally(seconds=seconds)
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(lambda: _Loop(make, tally, (begin, begin + seconds)), "127.0.0.1", port)
        clients.append(client)
    async with asyncio.timeout(warmup + seconds + 30):
        await asyncio.gather(*(client.done for client in clients))
    return tally


class _Pooled(_Connection):
    """One connection of an open loop; goes back to the idle ones with its answer."""

    def __init__(self, idle: list[_Pooled], tally: Offered) -> None:
        super().__init__()
        self._idle, self._tally = idle, tally
        self._due: float | None = None

    @property
    def busy(self) -> bool:
        return self._due is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self._tally.failed += 1
            self._due = None
        elif self in self._idle:
            self._idle.remove(self)

    def send(self, request: bytes, due: float) -> None:
        self._due = due
        self.transport.write(request)

    def answered(self, status: int, head: bytes) -> None:
        assert self._due is not None
        if status == 200:
            self._tally.accepted.append((self._due, time.perf_counter() - self._due))
        elif status == 429:
            self._tally.refused += 1
            self._tally.hintless += b"\r\nretry-after:" not in head
        else:
            self._tally.failed += 1
        self._due = None
        self._idle.append(self)


async def offer(port: int, make: Request, *, rate: float, seconds: float, connections: int) -> Offered:
    """Requests due `rate` times a second for that long; then waits for the answers, PATIENCE_SECONDS at most."""
    loop = asyncio.get_running_loop()
    tally, idle = Offered(), list[_Pooled]()
    clients = [(await loop.create_connection(lambda: _Pooled(idle, tally), "127.0.0.1", port))[1] for _ in range(connections)]
    began, sent = time.perf_counter(), 0
    while sent < rate * seconds:
        while sent < min(rate * (time.perf_counter() - began), rate * seconds):
            if idle:
                idle.pop().send(make(), began + sent / rate)
            else:
                tally.unsent += 1
            sent += 1
        await asyncio.sleep(min(0.005, 1 / rate))
    tally.ended = time.perf_counter()
    until = tally.ended + PATIENCE_SECONDS
    while any(client.busy for client in clients) and time.perf_counter() < until:  # noqa: ASYNC110 - a deadline, and only at the end
        await asyncio.sleep(0.005)
    tally.failed += sum(client.busy for client in clients)
    for client in clients:
        client.transport.abort()
    return tally
