"""uvicorn's HTTP protocol, with one write for a response where it makes two, and limits for heads and for replies that nobody reads.

It writes a response's head and its body each by itself, and uvloop sends at once: two packets, two system calls, and a client that is
woken twice, which together takes a sixth of an empty request's time.

A head of any size it would put together in memory, piece by piece: one client that sends a hundred megabytes of a header stops the event
loop for seconds. And it waits for ever for one that does not come.

It keeps what a client does not read for ever, too, even after it has closed the connection. `Unread` lets such clients go.

It takes every connection, until the process has no file descriptor left: then new ones are closed without a word, and nothing else can be
opened either. `Room` is for fewer.

And it makes a task of each request, and calls of ASGI: a sixth of the work for a single event (docs/bench.md). `direct` may answer without.

When it stops, it waits for bodies that do not come until the time to stop is over. `Halves` lets them go before.

And of a request that offers another protocol (`Upgrade: h2c`, as Java's HttpClient sends by default, and curl --http2) it drops the body,
or takes it for the next request. Such an offer may be declined by going on as if it were not there (RFC 9110, 7.8).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

AT_ONCE_BYTES = 65_536
"""More than this is not kept for the end of the turn."""


HEAD_BYTES = 65_536
"""Of a request before its body, of what ends it, and of the line before a chunk."""
HEAD_SECONDS = 60.0
"""How long each of these may take to come. A body has a limit of its own, see intake.py."""
UNREAD_BYTES, UNREAD_SECONDS = 65_536, 30.0
"""A client that takes less than this of a reply in this time, and not the rest of it, is let go."""
PRESSED_SECONDS = 5.0
"""In place of UNREAD_SECONDS while too much is unread."""
LOOK_SECONDS = 1.0
STILL_SECONDS = 1.0
"""While the server stops, a request of whose body nothing comes for so long is let go."""
SPARE = 128
"""File descriptors for all but clients: the store, sinks, files, what a backtest runs in; half of them for probes and scrapes."""
TOLD_SECONDS = 60.0
"""That there is no room for connections is told of once in this time."""
HELD_BYTES, HELD_SECONDS = 16_384, 0.05
"""A body of so many bytes is waited for so long before its request is begun."""
AHEAD_REQUESTS = 256
"""That a client may send before the one in front of them is answered: each takes some kB."""
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: 36\r\n\r\nThe head is over 65536 bytes long.\r\n"
)


def _unavailable(problem: bytes) -> bytes:
    head = (
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nconnection: close\r\nretry-after: 1\r\n"
        b"content-length: %d\r\n\r\n"
    )
    return head % len(problem) + problem


UNFINISHED = _unavailable(
    b'{"type":"urn:onset:not-committed","title":"Broken off in the middle of the request","status":503,'
    b'"detail":"The service stops, and the rest of the body did not come: send it again.","retry_after":1}'
)
NO_MEMORY = _unavailable(
    b'{"type":"urn:onset:no-memory","title":"No memory is left","status":503,'
    b'"detail":"This machine gives the service no more memory now: send it again.","retry_after":2}'
)
TOO_MANY = _unavailable(
    b'{"type":"urn:onset:too-many-connections","title":"As many connections as there are file descriptors for","status":503,'
    b'"detail":"Keep connections and use them again; the service\'s operator may raise its limit of open files.","retry_after":1}'
)
_ALWAYS = (b"/health/", b"/metrics")
"""Whoever asks for these is answered while there is a descriptor left."""

Answered = Callable[[int, Iterable[tuple[bytes, bytes]], bytes], None]
"""Takes a whole response: status, headers, body."""
Direct = Callable[[Any, bytearray, Answered], bool]
"""Gets a request that is all there, its scope and its body, and answers it, now or later; False = ASGI has to."""

log = structlog.get_logger(__name__)


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


@dataclass
class _Mark:
    """When a connection last was found to have got on, and what was unread of it then."""

    since: float
    size: int


class Unread:
    """Connections with something written that their clients have not taken: those that do not get on are let go, the slowest first.

    All of them together may hold `most_bytes` for long. `let_go` is told of each, and `freed` called once what they held is free. An idle
    or a reading client costs nothing here.
    """

    unread_seconds, pressed_seconds, look_seconds = UNREAD_SECONDS, PRESSED_SECONDS, LOOK_SECONDS

    def __init__(self, most_bytes: int, let_go: Callable[[], None], freed: Callable[[], None]) -> None:
        self._most_bytes, self._let_go, self._freed = most_bytes, let_go, freed
        self._marks: dict[Protocol, _Mark] = {}
        """In the order of `since`."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, connection: Protocol) -> None:
        """Not all that was written could be sent."""
        self._marks[connection] = _Mark(connection.loop.time(), connection.unread_bytes)
        if self._timer is None:
            self._look_later(connection.loop)

    def end(self, connection: Protocol) -> None:
        """All is sent, or the connection is lost."""
        self._marks.pop(connection, None)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self.look_seconds
        self._timer = loop.call_at(due, self._look, loop, due)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now, self._timer = loop.time(), None
        for mark in self._marks.values():
            mark.since += now - due  # in which this process itself may have stood still
        self._got_on(now)
        held, gone = sum(connection.unread_bytes for connection in self._marks), list[tuple[Protocol, int]]()
        for connection, mark in list(self._marks.items()):
            if now - mark.since < (self.unread_seconds if held <= self._most_bytes else self.pressed_seconds):
                break
            gone.append((connection, connection.unread_bytes))
            held -= connection.unread_bytes
            self.end(connection)
        if gone:
            log.warning("replies_unread", closed=len(gone), bytes=sum(size for _, size in gone), first=gone[0][0].client)
        for connection, _ in gone:
            connection.transport.abort()  # to close it would wait until all is taken
            self._let_go()
        if gone:
            loop.call_later(self.look_seconds, self._freed)  # the loop drops what was unread in a turn of its own
        if self._marks:
            self._look_later(loop)

    def _got_on(self, now: float) -> None:
        for connection, mark in list(self._marks.items()):
            size = connection.unread_bytes
            if size <= mark.size - UNREAD_BYTES:
                del self._marks[connection]
                self._marks[connection] = _Mark(now, size)


def most_connections() -> int:
    """For how many there are file descriptors, once this process may have as many as it is allowed to take by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS takes less than it names
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(soft - SPARE, soft // 2)


class Room:
    """How many connections a server has at most; `refused` is told of each that it refuses."""

    def __init__(self, most: int, refused: Callable[[], None]) -> None:
        self.most, self._refused = most, refused
        self._told_at = -math.inf

    def refuse(self, client: tuple[str, int] | None, now: float) -> None:
        self._refused()
        if now - self._told_at >= TOLD_SECONDS:
            self._told_at = now
            log.error("connections_refused", most=self.most, client=client)


class Protocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`, as `protocol` makes it."""

    unread: Unread
    """Of all connections of a server."""
    room: Room
    _over = False
    """It came when there was no room."""
    head_seconds = HEAD_SECONDS

    _answering: RequestResponseCycle | None = None
    """Of several requests sent at once the one that was begun; `cycle` is the last."""
    _next: tuple[RequestResponseCycle, Any] | None = None
    """Waits until the reply before it is taken."""

    direct: Direct | None = None
    _reads = False
    """What came is being parsed."""
    _held: tuple[RequestResponseCycle, Any] | None = None
    """Not begun yet: its body may have come with its head, or comes at once."""
    _patience: asyncio.TimerHandle | None = None

    came = 0
    """Bytes in all."""
    _declined = b""
    """The head of a request that offers another protocol, without the offer, until it is parsed again."""

    _read = 0
    """Bytes since the last head or piece of a body was there."""
    _waits_since: float | None = None
    """For the rest of one; None = nothing is half there."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of all that is left
        super().connection_made(OneWrite(transport))  # type: ignore[arg-type]
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(self.head_seconds, self._look)
        self._over = len(self.connections) > self.room.most
        if len(self.connections) > self.room.most + SPARE // 2:
            self.room.refuse(self.client, self.loop.time())
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._drop_held()
        self.unread.end(self)
        if self._answering is not None and not self._answering.response_complete:  # uvicorn tells the last one alone
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    @property
    def unread_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def half(self) -> bool:
        """Whether a request is begun whose body is not all there, and which has no answer yet."""
        cycle = self.cycle
        return cycle is not None and cycle is self._answering and cycle.more_body and not (cycle.response_started or cycle.disconnected)

    def let_go(self) -> None:
        """Answer such a request that it is to be sent again."""
        self.transport.write(UNFINISHED)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread.begin(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread.end(self)
        if self._next is not None:
            (cycle, app), self._next = self._next, None
            self._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        self.came += len(data)
        self._read += len(data)
        self._unset_keepalive_if_required()
        self._reads = True
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, MemoryError):  # no fault of the client, which would drop it
                self.transport.write(NO_MEMORY)
                self.transport.close()
            else:
                self.send_400_response("Invalid HTTP request received.")
        self._reads = False
        if self._held is not None:
            self._begin_held()
        if self._read and self._waits_since is None:
            self._waits_since = self.loop.time()
        if self._read > HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def _parse(self, data: bytes) -> None:
        """The parser leaves what follows an offer to whoever takes it up: it goes on behind it. Raises HttpParserError."""
        while not self.transport.is_closing():
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if not self._declined:
                    return
                data, self._declined = self._declined + data[offer.args[0] :], b""
            else:
                return

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers):  # else it is CONNECT
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            kept = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
            self._declined = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, kept)
            return
        self._whole()
        if len(self.pipeline) >= AHEAD_REQUESTS:
            self.transport.abort()
        if self._over and not self.url.startswith(_ALWAYS) and not self.transport.is_closing():
            self.room.refuse(self.client, self.loop.time())
            self.transport.write(TOO_MANY)
            self.transport.close()
        if not self.transport.is_closing():
            super().on_headers_complete()
            self.headers = []  # what follows a chunked body is none of the request's (RFC 9110, 6.5.1)
            self.cycle.keep_alive &= not self._over

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Not before the last reply is taken: of a client that does not read one is kept, not two."""
        if self.flow.write_paused:
            self.flow.pause_reading()
            self._next = (cycle, app)
            return
        self._answering = cycle
        if self._reads and self.direct is not None:
            self._held = (cycle, app)
        else:
            super()._start_asgi_task(cycle, app)

    def _begin_held(self, *, late: bool = False) -> None:
        """Many clients send head and body by themselves: of a small body the rest is waited for, unless it is `late`."""
        if self._held is None:
            return
        cycle, app = self._held
        if cycle.more_body and not late and not cycle.waiting_for_100_continue and _small(cycle.scope["headers"]):
            self._patience = self._patience or self.loop.call_later(HELD_SECONDS, partial(self._begin_held, late=True))
            return
        self._drop_held()
        if cycle.more_body or self.direct is None or not self.direct(cycle.scope, cycle.body, partial(self._answer, cycle)):
            super()._start_asgi_task(cycle, app)

    def _drop_held(self) -> None:
        self._held = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _answer(self, cycle: RequestResponseCycle, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """What the cycle does of a response that is there as a whole."""
        if cycle.disconnected:
            return
        cycle.response_started = cycle.response_complete = True
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def on_body(self, body: bytes) -> None:
        self._whole()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._declined:
            return
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


def _small(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    length = next((value for name, value in headers if name == b"content-length"), b"")
    return len(length) < 6 and length.isdigit() and int(length) <= HELD_BYTES


class Halves:
    """While the server stops: requests whose bodies do not come are let go."""

    def __init__(self, connections: Collection[Protocol]) -> None:
        self._connections = connections
        self._came: dict[Protocol, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(STILL_SECONDS)

    def look(self) -> None:
        """Let those go that were half there at the last look and have brought nothing since."""
        came = {connection: connection.came for connection in self._connections if connection.half}
        still = [connection for connection, size in came.items() if self._came.get(connection) == size]
        if still:
            log.warning("bodies_unfinished", closed=len(still), first=still[0].client)
        for connection in still:
            connection.let_go()
        self._came = came


def protocol(unread: Unread, room: Room, direct: Direct | None = None) -> type[Protocol]:
    """The protocol of one server."""
    return type("Protocol", (Protocol,), {"unread": unread, "room": room, "direct": staticmethod(direct) if direct else None})
