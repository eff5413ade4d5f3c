"""uvicorn's HTTP protocol, with one write for a response where it makes two, and limits for the head of a request.

It writes a response's head and its body each by itself, and uvloop sends at once: two packets, two system calls, and a client that is
woken twice, which together takes a sixth of an empty request's time.

A head of any size it would put together in memory, piece by piece: one client that sends a hundred megabytes of a header stops the event
loop for seconds. And it waits for ever for one that does not come.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

AT_ONCE_BYTES = 65_536
"""More than this is not kept for the end of the turn."""


HEAD_BYTES = 65_536
"""Of a request before its body, of what ends it, and of the line before a chunk."""
HEAD_SECONDS = 60.0
"""How long each of these may take to come. A body has a limit of its own, see intake.py."""
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: 36\r\n\r\nThe head is over 65536 bytes long.\r\n"
)


class OneWrite:
    """A transport that writes what came within one turn of the event loop together."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._soon = asyncio.get_running_loop().call_soon
        self._kept: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._kept:
            self._soon(self._flush)
        self._kept.append(data)
        self._size += len(data)
        if self._size > AT_ONCE_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._kept:
            kept, self._kept, self._size = b"".join(self._kept), [], 0
            self._transport.write(kept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    head_seconds = HEAD_SECONDS

    _read = 0
    """Bytes since the last head or piece of a body was there."""
    _waits_since: float | None = None
    """For the rest of one; None = nothing is half there."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(OneWrite(transport))  # type: ignore[arg-type]
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(self.head_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read += len(data)
        super().data_received(data)
        if self._read and self._waits_since is None:
            self._waits_since = self.loop.time()
        if self._read > HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._whole()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._whole()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._whole()
        super().on_message_complete()

    def _whole(self) -> None:
        self._read, self._waits_since = 0, None

    def _look(self) -> None:
        """Close the connection where something has been half there for too long."""
        since, now = self._waits_since, self.loop.time()
        answering = self.cycle is not None and not self.cycle.response_complete
        if since is None or answering:
            since = now
        elif now - since >= self.head_seconds:
            self.transport.close()
            return
        self._timer = self.loop.call_later(since + self.head_seconds - now, self._look)
