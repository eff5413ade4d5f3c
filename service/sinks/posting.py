"""One request to a sink over HTTP, which may answer anything, or nothing, or for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from service.errors import BadSetting
from service.sinks.teller import Unreachable

TIMEOUT_SECONDS = 10.0
SAID = 500
"""Bytes of an answer that are read: it is for the log."""
UNANSWERED = (httpx.HTTPError, OSError, RuntimeError)
"""What a receiver that does not answer raises; RuntimeError is uvloop's, of a socket that failed a moment ago."""


@dataclass(frozen=True)
class Answer:
    status: int
    said: str
    """Its beginning."""
    retry_after: str

    @property
    def taken(self) -> bool:
        return self.status // 100 == 2


def address(setting: str, url: str) -> str:
    """`url`, if it can be posted to. Raises BadSetting without a word of its password."""
    try:
        parts, sent = urlsplit(url), httpx.URL(url)  # by which it is posted to
    except (ValueError, httpx.InvalidURL) as error:
        raise BadSetting(f"{setting} has '{url.partition('/')[0]}//…', which cannot be read as an address.") from error
    try:
        port = parts.port
    except ValueError as error:
        raise BadSetting(f"{setting} has '{parts.scheme}://{parts.hostname or ''}…': {error}.") from error
    if parts.scheme not in ("http", "https") or not sent.host or port == 0:
        raise BadSetting(f"{setting} has '{parts.scheme}://{parts.hostname or ''}…', which is no http:// or https:// address.")
    return url


async def post(client: httpx.AsyncClient, who: str, url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> Answer:
    """Its status counts, whatever becomes of the text after it. It has so many `seconds` for all of it. Raises Unreachable."""
    status, said, again = 0, b"", ""
    try:
        async with asyncio.timeout(seconds), client.stream("POST", url, content=body, headers=headers) as answer:
            status, again = answer.status_code, answer.headers.get("retry-after", "")
            async for part in answer.aiter_raw():
                said += part[: SAID - len(said)]
                if len(said) == SAID:
                    break
    except UNANSWERED as error:
        if not status:
            raise Unreachable(f"{who} does not answer ({type(error).__name__}: {error}).") from error
    return Answer(status, said.decode(errors="replace"), again)


def retry_after(header: str, now: float, longest: float) -> float | None:
    """Seconds that a Retry-After header asks for, `longest` at most; None = it is none."""
    if header.isascii() and header.isdigit():
        return min(float(header[:9]), longest)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime.fromtimestamp(now, UTC)
    return min(max(seconds.total_seconds(), 0.0), longest)
