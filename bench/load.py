"""A lean HTTP/1.1 load generator: closed loops on raw asyncio sockets, one request in flight on each connection.

It shares the machine with the server, so it must cost little: requests are made from templates by one `bytes.replace`, responses
are only split at their length. Closed loops do not show what an overloaded server does to arrivals that do not wait; the latencies
are those of clients that wait for their answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

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

    def percentile(self, share: float) -> float:
        """Latency in milliseconds that `share` of 100 requests stay below."""
        return 1000 * float(np.percentile(self.latencies, share)) if self.latencies else float("nan")


def post(path: str, body: bytes, content_type: str) -> bytes:
    """A request's bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Connection(asyncio.Protocol):
    """Sends, waits for the whole answer, sends again, until told to stop."""

    def __init__(self, make: Request, tally: Tally, window: tuple[float, float]) -> None:
        self._make, self._tally = make, tally
        self._from, self._until = window
        self._buffer = bytearray()
        self._missing = -1  # bytes of the body still to come; -1 = the head is not complete
        self._status = b""
        self._sent_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        if self._missing >= 0:
            self._missing -= len(data)
        else:
            self._buffer += data
            self._read_head()
        if self._missing == 0:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._tally.failures += 1
            self.done.set_result(None)

    def _read_head(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        at = head.find(b"content-length:")
        if at < 0:
            raise RuntimeError("The server's answer has no Content-Length; this generator reads no chunks.")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        self._status = head[9:12]
        self._missing = length - (len(self._buffer) - end - 4)
        self._buffer.clear()

    def _finish(self) -> None:
        now = time.perf_counter()
        self._missing = -1
        if self._from <= now <= self._until:
            if self._status == b"200":
                self._tally.latencies.append(now - self._sent_at)
            else:
                self._tally.failures += 1
        if now >= self._until:
            self.done.set_result(None)
            self._transport.close()
        else:
            self._send()

    def _send(self) -> None:
        request = self._make()
        self._sent_at = time.perf_counter()
        self._transport.write(request)


async def drive(port: int, make: Request, *, connections: int, seconds: float, warmup: float = 1.0) -> Tally:
    """Load `port` on this machine for `warmup` + `seconds`; only what is answered after the warm-up counts."""
    loop = asyncio.get_running_loop()
    begin = time.perf_counter() + warmup
    tally = Tally(seconds=seconds)
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(lambda: _Connection(make, tally, (begin, begin + seconds)), "127.0.0.1", port)
        clients.append(client)
    async with asyncio.timeout(warmup + seconds + 30):
        await asyncio.gather(*(client.done for client in clients))
    return tally
