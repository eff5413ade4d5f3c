"""Requests as ASGI brings them, and their bodies, within the limits of one request and of all together.

Starlette's Request would do, but making and asking one takes longer than reading an event.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, KeysView
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from service.bodies import ENCODINGS, inflate
from service.errors import Overloaded, TooLarge, TooSlow, UnsupportedMedia
from service.metrics import Metrics


@dataclass(frozen=True)
class DoorLimits:
    """What one request may bring, and all of them together."""

    max_body_bytes: int
    max_batch_events: int
    max_inflight_bytes: int
    max_body_seconds: float = 30.0


class Incoming:
    """One HTTP request. `held` are the bytes that are counted for it, and for its `sender`, who is named before its body is read."""

    __slots__ = ("_headers", "_query", "held", "receive", "scope", "sender")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self.receive = scope, receive
        self.held, self.sender = 0, ""
        self._headers: dict[bytes, bytes] = dict(reversed(list(scope["headers"])))  # of several by one name the first counts
        self._query: QueryParams | None = None

    @property
    def names(self) -> KeysView[bytes]:
        """Of its headers, in small letters."""
        return self._headers.keys()

    def header(self, name: bytes) -> str | None:
        """By its name in small letters."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def media(self) -> str:
        """The type of what is sent, without its parameters, in small letters; "" = it is not said."""
        return (self.header(b"content-type") or "").partition(";")[0].strip().lower()

    def query(self, name: str) -> str | None:
        """A parameter of the address."""
        return self.parameters.get(name) if self.scope["query_string"] else None

    def queries(self, name: str) -> list[str]:
        """Each value of a parameter that may be given again."""
        return self.parameters.getlist(name)

    @property
    def parameters(self) -> QueryParams:
        if self._query is None:
            self._query = QueryParams(self.scope["query_string"])
        return self._query


class Intake:
    """Reads bodies. What is read stays counted until it is released."""

    def __init__(self, limits: DoorLimits, metrics: Metrics) -> None:
        self._limits = limits
        self._refused = metrics.refused
        self._inflight = 0
        self._by_sender: dict[str, int] = {}

    async def body(self, request: Incoming) -> bytes:
        """The body, unpacked. Raises TooLarge, TooSlow, Overloaded, UnsupportedMedia, BadBody, ClientDisconnect; then nothing is held."""
        encoding = request.header(b"content-encoding")
        encoding = "identity" if encoding is None else encoding.lower()
        if encoding != "identity" and encoding not in ENCODINGS:
            raise UnsupportedMedia(f"Content-Encoding '{encoding[:64]}' is not read here; send gzip, deflate, zstd or none.")
        content = await self._sent(request)
        try:
            return content if encoding == "identity" else self._inflated(request, content, encoding)
        except BaseException:
            self.release(request)
            raise

    async def packed(self, request: Incoming, unpacked: Callable[[bytes], int]) -> bytes:
        """A body as it was sent, which unpacks to `unpacked(body)` bytes: they are limited and counted, too. Raises as `body` does."""
        content = await self._sent(request)
        try:
            size = unpacked(content)
            if size > self._limits.max_body_bytes:
                self._refused.labels("body").inc()
                raise TooLarge(f"The body is {size} bytes when unpacked, over {self._limits.max_body_bytes} (ONSET_MAX_BODY_BYTES).")
            self._reserve(request, len(content) + size)
        except BaseException:
            self.release(request)
            raise
        return content

    def here(self, request: Incoming, size: int) -> None:
        """Count `size` bytes of a request whose body is here, and of its reply. Raises Overloaded."""
        self._reserve(request, size)

    def reply(self, request: Incoming, size: int) -> None:
        """Count the reply's `size` bytes, too. Raises Overloaded."""
        self._reserve(request, request.held + size)

    def release(self, request: Incoming) -> None:
        self._count(request, 0)

    async def _sent(self, request: Incoming) -> bytes:
        length = request.header(b"content-length") or ""
        stated = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        if stated > self._limits.max_body_bytes:
            raise self._too_large()
        self._check(request, stated)
        try:
            return await self._read(request)
        except BaseException:
            self.release(request)
            raise

    async def _read(self, request: Incoming) -> bytes:
        reading = self._all(request)
        try:
            waits_for = reading.send(None)
        except StopIteration as done:  # a small body comes with its head, and a timer would cost as much as scoring it
            content: bytes = done.value
            return content
        try:
            async with asyncio.timeout(self._limits.max_body_seconds):
                return await _going_on(reading, waits_for)
        except TimeoutError as error:
            self._refused.labels("slow").inc()
            raise TooSlow(f"The body did not arrive within {self._limits.max_body_seconds:g} s (ONSET_MAX_BODY_SECONDS).") from error

    async def _all(self, request: Incoming) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            content = message.get("body", b"")
            size += len(content)
            if size > self._limits.max_body_bytes:
                raise self._too_large()
            self._reserve(request, size)
            parts.append(content)
            if not message.get("more_body", False):
                return content if len(parts) == 1 else b"".join(parts)

    def _inflated(self, request: Incoming, content: bytes, encoding: str) -> bytes:
        try:
            inflated = inflate(content, self._limits.max_body_bytes, encoding)
        except TooLarge:
            self._refused.labels("body").inc()
            raise
        self._reserve(request, len(inflated))
        return inflated

    def _reserve(self, request: Incoming, size: int) -> None:
        """Count `size` bytes in all for this request, so that memory stays bounded however many clients there are.

        A body is counted as it arrives, also one of a stated length: who states much and sends nothing keeps nobody out.
        """
        if size <= request.held:
            return
        self._check(request, size)
        self._count(request, size)

    def _count(self, request: Incoming, size: int) -> None:
        more = size - request.held
        self._inflight += more
        request.held = size
        self._by_sender[request.sender] = theirs = self._by_sender.get(request.sender, 0) + more
        if not theirs:
            del self._by_sender[request.sender]

    def _check(self, request: Incoming, size: int) -> None:
        """Raises Overloaded where so many bytes of a request would be too many with those of all others.

        An eighth is kept for those who have nothing under way: one sender with many slow bodies does not shut all others out.
        """
        others, most = self._inflight - request.held, self._limits.max_inflight_bytes
        mine = self._by_sender.get(request.sender, 0) - request.held
        if mine:
            most -= most // 8
        if others and others + size > most:
            self._refused.labels("bytes").inc()
            whose = f", {mine} of them from this sender" if mine else ""
            detail = f"{others} bytes of requests and wide replies are being scored{whose} (ONSET_MAX_INFLIGHT_BYTES)."
            raise Overloaded(detail, retry_after=1)

    def _too_large(self) -> TooLarge:
        self._refused.labels("body").inc()
        return TooLarge(f"The body is over {self._limits.max_body_bytes} bytes (ONSET_MAX_BODY_BYTES); send it in parts.")


@types.coroutine
def _going_on(begun: Coroutine[Any, Any, bytes], waits_for: Any) -> Generator[Any, Any, bytes]:
    """Await the rest of a coroutine that was begun by hand and waits for `waits_for`."""
    try:
        while True:
            try:
                answer = yield waits_for
            except BaseException as error:  # a cancellation is the coroutine's to see
                waits_for = begun.throw(error)
            else:
                waits_for = begun.send(answer)
    except StopIteration as done:
        content: bytes = done.value
        return content
